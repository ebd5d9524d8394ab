"""RUN.sh, run for real from a temporary folder, with a stub `python3` in place of venv and pip: offline and fast."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("awk", "bash", "cat", "cp", "df", "dirname", "grep", "mkdir", "rm", "sed", "uname")

# Plays the system's Python and, copied into .venv/bin, the environment's. It writes what it is asked into $STUB_LOG,
# and is the real Python for everything but -m venv, -m pip, the index probe, and the version it claims to be.
STUB_PYTHON = r"""#!/bin/bash
claim=${STUB_VERSION:-3, 12, 1}
case "$1 $2" in
  "-m venv")
    shift 2; echo "venv $*" >>"$STUB_LOG"
    if [ "$1" = --clear ]; then shift; rm -rf "$1"; fi
    mkdir -p "$1/bin"; cp "$0" "$1/bin/python" ;;
  "-m pip")
    shift 2; echo "pip $*" >>"$STUB_LOG"
    case "${STUB_PIP:-works}" in
      works) echo "Successfully installed" ;;
      real) exec "$REAL_PYTHON" -m pip "$@" ;;
      full) while [ "$1" != --log ]; do shift; done
        echo "ERROR: Could not install packages: [Errno 28] No space left on device" >"$2"; exit 1 ;;
      killed) kill -KILL $PPID; exit 1 ;;
      *) echo "ERROR: something else" >&2; exit 1 ;;
    esac ;;
  -c*)
    case "$2" in
      *urllib*) echo "probe $3" >>"$STUB_LOG"; exit "${STUB_INDEX:-1}" ;;
      *ensurepip*) exit "${STUB_NO_VENV:-0}" ;;
    esac
    exec "$REAL_PYTHON" -c "import sys; sys.version_info = ($claim); exec(sys.argv.pop(1))" "${@:2}" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""

STUB_PROGRAM = """import os, sys
print("program", sys.argv[1:], os.getcwd())
sys.exit(int(os.environ.get("STUB_EXIT", "0")))
"""


class Sandbox:
    """A folder with a copy of RUN.sh and stubs, and a PATH on which nothing else is found."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin, self.log = folder / "the product", folder / "bin", folder / "log"
        self.home.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "RUN.sh", self.home)
        self.requirements = self.home / "requirements.txt"
        self.requirements.write_text("# nothing\n")
        (self.home / "LATENTWIRE.py").write_text(STUB_PROGRAM)
        self.venv = self.home / ".venv"
        self.stamp = self.venv / "latentwire-stamp"
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"this machine has no {tool}"
            (self.bin / tool).symlink_to(found)
        self.stub("python3", STUB_PYTHON)

    def stub(self, name: str, text: str = "#!/bin/bash\n") -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(
        self, *arguments: str, cwd: Path | None = None, script: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        base = {"PATH": str(self.bin), "STUB_LOG": str(self.log), "REAL_PYTHON": sys.executable, "HOME": str(self.bin)}
        return subprocess.run(
            ["bash", script or str(self.home / "RUN.sh"), *arguments],
            cwd=cwd or self.home,
            env={**base, "LATENTWIRE_MIN_DISK_GB": "0", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """What the stubs were asked to do since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def verbs(self) -> list[str]:
        return [line.split()[0] for line in self.calls()]


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one line from RUN.sh that holds the words, and the program was not started."""
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("RUN.sh: ")]
    for word in words:
        assert word in line
    assert "program" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_usage_installs_nothing(box: Sandbox, arguments: tuple[str, ...]) -> None:
    (box.bin / "python3").unlink()
    done = box.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bash RUN.sh demo" in done.stdout
    assert "LATENTWIRE.py --help" in done.stdout
    assert not box.venv.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        ("test", "-k", "a and b"),
        ("train", "--name", "two  words", "", "*", "$HOME", "--help"),
        ("slurm", "x"),
        ("--version",),
    ],
)
def test_arguments_pass_through(box: Sandbox, arguments: tuple[str, ...]) -> None:
    done = box.run(*arguments)
    assert done.returncode == 0, done
    assert done.stdout == f"program {list(arguments)} {box.home}\n"
    assert done.stderr.splitlines()[-1].startswith(f"+ .venv/bin/python LATENTWIRE.py {arguments[0]}")


def test_exit_status_passes_through(box: Sandbox) -> None:
    assert box.run("eval", STUB_EXIT="7").returncode == 7


def test_relative_paths_are_the_callers(box: Sandbox, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    done = box.run("train", cwd=elsewhere)
    assert done.stdout == f"program ['train'] {elsewhere}\n"
    assert box.stamp.exists()
    assert list(elsewhere.iterdir()) == []
    assert box.verbs() == ["venv", "pip"]
    box.run("train")
    assert box.verbs() == []


def test_cdpath_does_not_mislead(box: Sandbox, tmp_path: Path) -> None:
    done = box.run("train", cwd=tmp_path, script="the product/RUN.sh", CDPATH=str(tmp_path))
    assert done.stdout == f"program ['train'] {tmp_path}\n"
    assert box.stamp.exists()


def test_installs_once(box: Sandbox) -> None:
    box.run("demo")
    venv, pip = box.calls()
    assert venv == "venv .venv"
    assert pip.startswith("pip install ")
    assert pip.endswith(" -r requirements.txt")
    done = box.run("demo")
    assert box.calls() == []
    assert done.stderr == "+ .venv/bin/python LATENTWIRE.py demo\n"


def test_changed_requirements_install_again(box: Sandbox) -> None:
    box.run("demo")
    box.calls()
    box.requirements.write_text("# something\n")
    assert box.run("demo").returncode == 0
    assert box.verbs() == ["pip"]
    box.run("demo")
    assert box.calls() == []


def test_changed_python_starts_clean(box: Sandbox) -> None:
    box.run("demo")
    box.calls()
    assert box.run("demo", STUB_VERSION="3, 13, 0").returncode == 0
    assert [line for line in box.calls() if line.startswith("venv")] == ["venv --clear .venv"]
    box.run("demo", STUB_VERSION="3, 13, 5")
    assert box.calls() == []


def test_python_that_vanished_starts_clean(box: Sandbox) -> None:
    box.run("demo")
    box.calls()
    (box.venv / "bin" / "python").unlink()
    assert box.run("demo").returncode == 0
    assert box.verbs() == ["venv", "pip"]


def test_users_own_python_comes_first(box: Sandbox) -> None:
    box.stub("python3.13", STUB_PYTHON)
    assert "+ python3 -m venv .venv" in box.run("demo").stderr


def test_newer_python_is_found_beside_an_old_one(box: Sandbox) -> None:
    box.stub("python3", STUB_PYTHON.replace("claim=", "claim='3, 9, 2' #"))
    box.stub("python3.13", "#!/bin/bash\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
    box.stub("python3.12", STUB_PYTHON)
    done = box.run("demo")
    assert done.returncode == 0
    assert "+ python3.12 -m venv .venv" in done.stderr


def test_no_python(box: Sandbox) -> None:
    (box.bin / "python3").unlink()
    assert_refused(box.run("demo"), "no Python >= 3.11 found", "no python3 on PATH", "LATENTWIRE_PYTHON")
    assert not box.venv.exists()


def test_old_python(box: Sandbox) -> None:
    assert_refused(box.run("demo", STUB_VERSION="3, 10, 9"), "no Python >= 3.11 found", "python3 is 3.10.9")
    assert not box.venv.exists()


def test_no_venv_module(box: Sandbox) -> None:
    assert_refused(box.run("demo", STUB_NO_VENV="1"), "apt install python3-venv")
    assert not box.venv.exists()


def test_no_disk(box: Sandbox) -> None:
    done = box.run("demo", LATENTWIRE_MIN_DISK_GB="999999")
    assert_refused(done, "not enough disk space", "999999 GB needed", "GB free")
    assert box.calls() == []
    assert not box.venv.exists()


def test_disk_limit_is_six_unless_said(box: Sandbox) -> None:
    box.stub("df", "#!/bin/bash\necho Filesystem\necho /dev/x 9 9 $((6 * 1048576 - 1)) 9% /\n")
    env = dict(os.environ, PATH=str(box.bin), STUB_LOG=str(box.log), REAL_PYTHON=sys.executable)
    env.pop("LATENTWIRE_MIN_DISK_GB", None)
    env.pop("LATENTWIRE_PYTHON", None)
    command = ["bash", str(box.home / "RUN.sh"), "demo"]
    assert_refused(subprocess.run(command, env=env, capture_output=True, text=True), "5 GB free, 6 GB needed")
    assert box.run("demo", LATENTWIRE_MIN_DISK_GB="5").returncode == 0


def test_disk_limit_that_is_no_number(box: Sandbox) -> None:
    assert_refused(
        box.run("demo", LATENTWIRE_MIN_DISK_GB="6.5"), "LATENTWIRE_MIN_DISK_GB must be a whole number of GB, not '6.5'"
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [("fails", "pip install failed"), ("full", "the disk is full"), ("killed", "")],
)
def test_failed_install_leaves_no_stamp(box: Sandbox, how: str, words: str) -> None:
    done = box.run("demo", STUB_PIP=how)
    if how == "killed":
        assert done.returncode != 0
    else:
        assert_refused(done, words)
    assert not box.stamp.exists()
    box.calls()
    assert box.run("demo").returncode == 0
    assert box.verbs() == ["venv", "pip"]
    assert box.stamp.exists()


def test_failed_reinstall_leaves_no_stamp(box: Sandbox) -> None:
    box.run("demo")
    box.requirements.write_text("# something\n")
    assert_refused(box.run("demo", STUB_PIP="fails"), "pip install failed")
    assert not box.stamp.exists()


def test_no_network(box: Sandbox) -> None:
    """With the real pip, whose words RUN.sh looks for, and an address where nobody answers."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    box.requirements.write_text("latentwire-no-such-package==1\n")
    done = box.run(
        "demo",
        STUB_PIP="real",
        PIP_DRY_RUN="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
    )
    assert_refused(done, "cannot reach the package index: ", "Connection refused")
    assert not box.stamp.exists()


def gpu(box: Sandbox) -> None:
    box.stub("nvidia-smi")


def slurm(box: Sandbox) -> None:
    box.stub("sinfo", "#!/bin/bash\necho gpu:h100:4\n")


def slurm_without_gpus(box: Sandbox) -> None:
    box.stub("sbatch")
    box.stub("sinfo", "#!/bin/bash\necho '(null)'\n")


def mac(box: Sandbox) -> None:
    box.stub("uname", "#!/bin/bash\necho Darwin\n")


def linux(box: Sandbox) -> None:
    box.stub("uname", "#!/bin/bash\necho Linux\n")


@pytest.mark.parametrize("machine", [gpu, slurm, mac])
def test_cpu_torch_is_not_for_this_machine(box: Sandbox, machine: Callable[[Sandbox], None]) -> None:
    linux(box)
    machine(box)
    box.requirements.write_text("torch==2.13.0\n")
    assert box.run("demo", STUB_INDEX="0").returncode == 0
    assert box.verbs() == ["venv", "pip"]


@pytest.mark.parametrize("machine", [linux, slurm_without_gpus])
def test_cpu_torch_without_gpu(box: Sandbox, machine: Callable[[Sandbox], None]) -> None:
    linux(box)
    machine(box)
    box.requirements.write_text("numpy==2\ntorch==2.13.0  # a comment\ntorchvision==1\n")
    assert box.run("demo", STUB_INDEX="0").returncode == 0
    _, probe, torch, rest = box.calls()
    assert probe == "probe https://download.pytorch.org/whl/cpu/torch/"
    assert torch.endswith(" torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu")
    assert rest.endswith(" -r requirements.txt")


def test_cpu_torch_index_out_of_reach(box: Sandbox) -> None:
    linux(box)
    box.requirements.write_text("torch==2.13.0\n")
    assert box.run("demo", STUB_INDEX="1").returncode == 0
    assert box.verbs() == ["venv", "probe", "pip"]


def test_gpu_that_appears_replaces_cpu_torch(box: Sandbox) -> None:
    linux(box)
    box.requirements.write_text("torch==2.13.0\n")
    box.run("demo", STUB_INDEX="0")
    box.calls()
    gpu(box)
    assert box.run("demo", STUB_INDEX="0").returncode == 0
    venv, pip = box.calls()
    assert venv == "venv --clear .venv"
    assert "--extra-index-url" not in pip
    box.run("demo", STUB_INDEX="0")
    assert box.calls() == []


def test_named_python_needs_no_venv(box: Sandbox) -> None:
    done = box.run("demo", "x y", LATENTWIRE_PYTHON=sys.executable)
    assert done.stdout == f"program ['demo', 'x y'] {box.home}\n"
    assert done.stderr.startswith(f"+ {sys.executable} LATENTWIRE.py demo ")
    assert box.calls() == []
    assert not box.venv.exists()


def test_named_python_that_will_not_do(box: Sandbox) -> None:
    assert_refused(box.run("demo", LATENTWIRE_PYTHON="/no/such/python"), "LATENTWIRE_PYTHON=/no/such/python", "not a")
    old = box.run("demo", LATENTWIRE_PYTHON="python3", STUB_VERSION="3, 8, 1")
    assert_refused(old, "LATENTWIRE_PYTHON=python3 is 3.8.1", ">= 3.11")


def test_missing_requirements(box: Sandbox) -> None:
    box.requirements.unlink()
    assert_refused(box.run("demo"), "requirements.txt is missing")


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "RUN.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_packages_that_only_carry_files_are_installed_without_their_dependencies(box: Sandbox) -> None:
    box.requirements.write_text("# nothing\n# no-deps: model-a==1\n# no-deps: model-b==2\n")
    assert box.run("demo").returncode == 0
    pips = [line for line in box.calls() if "--no-deps" in line]
    assert len(pips) == 1
    assert pips[0].endswith("--no-deps model-a==1 model-b==2")
