"""RUN.sh, run for real from a temporary folder, with a stub `python3` in place of venv and pip: offline and fast."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-torch.lock", "requirements-torch-cpu.lock")
FILLS = ["venv", "pip", "probe", "pip", "pip"]  # torch from a folder? from its own index? else PyPI's; then the rest
TOOLS = ("awk", "bash", "cat", "cp", "df", "dirname", "grep", "mkdir", "rm")

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
    case " $* " in *" --no-index "*) exit "${STUB_LOCAL_TORCH:-1}" ;; esac
    case "${STUB_PIP:-works}" in
      works) echo "Successfully installed" ;;
      slow) until [ -e "$STUB_GO" ]; do "$REAL_PYTHON" -c 'import time; time.sleep(0.05)'; done ;;
      real) exec "$REAL_PYTHON" -m pip "$@" ;;
      full) while [ "$1" != --log ]; do shift; done
        echo "ERROR: Could not install packages: [Errno 28] No space left on device" >"$2"; exit 1 ;;
      other) while [ "$1" != --log ]; do shift; done
        echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE." >"$2"; exit 1 ;;
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
        self.lock = self.home / "requirements.lock"
        for name in ("requirements-torch.lock", "requirements-torch-cpu.lock"):
            (self.home / name).write_text("# nothing\n")
        self.require("# nothing\n")
        (self.home / "LATENTWIRE.py").write_text(STUB_PROGRAM)
        self.venv = self.home / ".venv"
        self.stamp = self.venv / "latentwire-stamp"
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"this machine has no {tool}"
            (self.bin / tool).symlink_to(found)
        self.stub("python3", STUB_PYTHON)
        self.stub("uname", "#!/bin/bash\necho Linux\n")
        self.stub("ldconfig")

    def require(self, text: str, lock: str | None = None) -> None:
        """These requirements, and a lock made from them."""
        self.requirements.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.lock.write_text(f"# requirements.txt sha256:{digest}\n{text if lock is None else lock}")

    def stub(self, name: str, text: str = "#!/bin/bash\n") -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(
        self, *arguments: str, cwd: Path | None = None, script: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, cwd=cwd, script=script, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *arguments: str, cwd: Path | None = None, script: str = "", **env: str) -> subprocess.Popen[str]:
        """The same, not waited for."""
        base = {"PATH": str(self.bin), "STUB_LOG": str(self.log), "REAL_PYTHON": sys.executable, "HOME": str(self.bin)}
        return subprocess.Popen(
            ["bash", script or str(self.home / "RUN.sh"), *arguments],
            cwd=cwd or self.home,
            env={**base, "LATENTWIRE_MIN_DISK_GB": "0", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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


@pytest.mark.parametrize(
    ("command", "preload", "library"),
    [
        ("train", None, "/there is/libjemalloc.so.2"),
        ("demo", None, "/there is/libjemalloc.so.2"),
        ("eval", None, None),
        ("train", "", "/there is/libjemalloc.so.2"),
        ("train", "/mine.so", None),
    ],
)
def test_trainings_take_an_allocator_that_is_at_hand(
    box: Sandbox, command: str, preload: str | None, library: str | None
) -> None:
    box.stub(
        "ldconfig",
        """#!/bin/bash
echo $'\tlibjemalloc.so.2 (libc6) => /32 bits/libjemalloc.so.2'
echo $'\tlibjemalloc.so.2 (libc6,x86-64) => /there is/libjemalloc.so.2'
""",
    )
    box.stub("env", '#!/bin/bash\necho "env $1" >>"$STUB_LOG"; shift; exec "$@"\n')
    done = box.run(command, **({} if preload is None else {"LD_PRELOAD": preload}))
    assert done.stdout.startswith(f"program ['{command}']")
    assert [call for call in box.calls() if call.startswith("env")] == (
        [f"env LD_PRELOAD={library}"] if library else []
    )
    assert (f"LD_PRELOAD=/there\\ is/libjemalloc.so.2 .venv/bin/python LATENTWIRE.py {command}" in done.stderr) == bool(
        library
    )


def test_exit_status_passes_through(box: Sandbox) -> None:
    assert box.run("eval", STUB_EXIT="7").returncode == 7


def test_relative_paths_are_the_callers(box: Sandbox, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    done = box.run("train", cwd=elsewhere)
    assert done.stdout == f"program ['train'] {elsewhere}\n"
    assert box.stamp.exists()
    assert list(elsewhere.iterdir()) == []
    assert box.verbs() == FILLS
    box.run("train")
    assert box.verbs() == []


def test_cdpath_does_not_mislead(box: Sandbox, tmp_path: Path) -> None:
    done = box.run("train", cwd=tmp_path, script="the product/RUN.sh", CDPATH=str(tmp_path))
    assert done.stdout == f"program ['train'] {tmp_path}\n"
    assert box.stamp.exists()


def test_installs_once(box: Sandbox) -> None:
    box.run("demo")
    venv, local, probe, torch, rest = box.calls()
    assert venv == "venv .venv"
    assert local.startswith("pip install ")
    assert local.endswith(" --no-index --no-deps --require-hashes -r requirements-torch-cpu.lock")
    assert probe == "probe https://download.pytorch.org/whl/cpu/torch/"
    assert torch.endswith(" --no-deps --require-hashes -r requirements-torch.lock")
    assert rest.endswith(" --no-deps --require-hashes -r requirements.lock")
    assert "index" not in torch + rest
    done = box.run("demo")
    assert box.calls() == []
    assert done.stderr == "+ .venv/bin/python LATENTWIRE.py demo\n"


def test_changed_requirements_install_again(box: Sandbox) -> None:
    box.run("demo")
    box.calls()
    box.require("# something\n")
    assert box.run("demo").returncode == 0
    assert box.verbs() == FILLS[1:]
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
    assert box.verbs() == FILLS


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
    [
        ("fails", "pip install failed"),
        ("full", "the disk is full"),
        ("other", "not the file that the lock names"),
        ("killed", ""),
    ],
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
    assert box.verbs() == FILLS
    assert box.stamp.exists()


def test_failed_reinstall_leaves_no_stamp(box: Sandbox) -> None:
    box.run("demo")
    box.require("# something\n")
    assert_refused(box.run("demo", STUB_PIP="fails"), "pip install failed")
    assert not box.stamp.exists()


def test_no_network(box: Sandbox) -> None:
    """With the real pip, whose words RUN.sh looks for, and an address where nobody answers."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    box.require("latentwire-no-such-package==1\n", f"latentwire-no-such-package==1 --hash=sha256:{'0' * 64}\n")
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


def plain(box: Sandbox) -> None:
    """Linux without anything."""


@pytest.mark.parametrize("machine", [gpu, slurm, mac])
def test_cpu_torch_is_not_for_this_machine(box: Sandbox, machine: Callable[[Sandbox], None]) -> None:
    machine(box)
    assert box.run("demo", STUB_INDEX="0", STUB_LOCAL_TORCH="0").returncode == 0
    _, *pips = box.calls()
    assert [call.split()[-1] for call in pips] == ["requirements-torch.lock", "requirements.lock"]


@pytest.mark.parametrize("machine", [plain, slurm_without_gpus])
def test_cpu_torch_without_gpu(box: Sandbox, machine: Callable[[Sandbox], None]) -> None:
    """S8: from PyTorch's own index and from no other."""
    machine(box)
    assert box.run("demo", STUB_INDEX="0").returncode == 0
    *_, torch, rest = box.calls()
    index = "--index-url https://download.pytorch.org/whl/cpu"
    assert torch.endswith(f" --no-deps --require-hashes {index} -r requirements-torch-cpu.lock")
    assert "extra-index" not in torch + rest
    assert rest.endswith(" --no-deps --require-hashes -r requirements.lock")
    assert "index" not in rest


def test_cpu_torch_from_a_folder_that_pip_knows(box: Sandbox) -> None:
    """PyTorch's index is not asked."""
    assert box.run("demo", STUB_INDEX="1", STUB_LOCAL_TORCH="0").returncode == 0
    _, *pips = box.calls()
    assert [call.split()[-1] for call in pips] == ["requirements-torch-cpu.lock", "requirements.lock"]


def test_gpu_that_appears_replaces_cpu_torch(box: Sandbox) -> None:
    box.run("demo", STUB_INDEX="0")
    box.calls()
    gpu(box)
    assert box.run("demo", STUB_INDEX="0").returncode == 0
    venv, torch, _ = box.calls()
    assert venv == "venv --clear .venv"
    assert torch.endswith(" -r requirements-torch.lock")
    assert "index-url" not in torch
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


@pytest.mark.parametrize("name", ["requirements.txt", *LOCKS])
def test_missing_requirements(box: Sandbox, name: str) -> None:
    (box.home / name).unlink()
    assert_refused(box.run("demo"), f"{name} is missing")


def test_requirements_that_the_lock_does_not_know(box: Sandbox) -> None:
    """S8: a pin that is changed in requirements.txt alone would not be installed, so it is refused."""
    box.requirements.write_text("numpy==3\n")
    assert_refused(box.run("demo"), "requirements.lock was made from another requirements.txt", ".ci/lock.py")
    assert not box.stamp.exists()


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "RUN.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_two_at_once_fill_it_once(box: Sandbox) -> None:
    """J5: the second RUN.sh waits for the first, says so, and finds the work done."""
    go = box.home / "go"
    first = box.start("demo", STUB_PIP="slow", STUB_GO=str(go))
    deadline = time.monotonic() + 30
    while "pip install" not in (box.log.read_text() if box.log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = box.start("list")
    assert second.stderr is not None
    said = second.stderr.readline()
    go.touch()
    ends = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert said == "RUN.sh: another RUN.sh is filling .venv; waiting until it is done\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert ["program ['demo']" in ends[0], "program ['list']" in ends[1]] == [True, True]
    assert box.verbs() == FILLS


def test_a_lock_ends_with_its_holder(box: Sandbox) -> None:
    """J5: nobody waits for a RUN.sh that was killed while it installed."""
    assert box.run("demo", STUB_PIP="killed").returncode != 0
    assert (box.home / ".venv.lock").exists()
    done = box.run("demo")
    assert done.returncode == 0
    assert "waiting" not in done.stderr


def test_a_full_venv_needs_no_lock(box: Sandbox) -> None:
    """J5: where nothing is to be installed, nothing is written either: the folder may be read-only."""
    box.run("demo")
    (box.home / ".venv.lock").unlink()
    assert box.run("demo").returncode == 0
    assert not (box.home / ".venv.lock").exists()


def test_lock_that_cannot_be_made(box: Sandbox) -> None:
    (box.home / ".venv.lock").mkdir()
    assert_refused(box.run("demo"), "cannot write")


Pins = dict[str, list[tuple[Requirement, list[str]]]]


def locked(name: str) -> Pins:
    """Package → its pins in a lock file, with their sums."""
    found: Pins = {}
    for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            pin, *sums = re.split(r"\s+--hash=sha256:", line)
            found.setdefault(canonicalize_name(Requirement(pin).name), []).append((Requirement(pin), sums))
    return found


def test_locks_hold_every_requirement() -> None:
    """S8: each pin of requirements.txt, and each package of files, is in a lock with the sums of its files."""
    text = (ROOT / "requirements.txt").read_text()
    for name in LOCKS:
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert f"# requirements.txt sha256:{digest}\n" in (ROOT / name).read_text(), (
            "type: .venv/bin/python .ci/lock.py"
        )
        for entries in locked(name).values():
            for found, sums in entries:
                assert str(found.specifier).startswith("==")
                assert sums
                assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in sums), found
    lock = {**locked("requirements.lock"), **locked("requirements-torch.lock")}
    pins = [line.removeprefix("# no-deps: ") for line in text.splitlines() if "==" in line]
    assert len(pins) > 30
    for pin in map(Requirement, pins):
        assert {found.specifier for found, _ in lock[canonicalize_name(pin.name)]} == {pin.specifier}


def test_locks_hold_what_is_needed_and_nothing_else() -> None:
    """S8: pip is told --no-deps, so the locks must be closed: from the requirements one reaches all of them."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    torch = locked("requirements-torch.lock")
    entries = [pin for pins in [*locked("requirements.lock").values(), *torch.values()] for pin, _ in pins]
    here = {canonicalize_name(pin.name): pin for pin in entries if not pin.marker or pin.marker.evaluate()}
    wanted = [Requirement(line) for line in lines if "==" in line and not line.startswith("#")]
    seen: set[tuple[str, str]] = set()
    while wanted:
        pin = wanted.pop()
        name = canonicalize_name(pin.name)
        assert name in here, f"{pin} is in no lock"
        version = str(here[name].specifier).removeprefix("==")
        assert pin.specifier.contains(version, prereleases=True), f"{pin}, but {version} is locked"
        try:
            asks = [Requirement(text) for text in metadata.distribution(name).requires or []]
        except metadata.PackageNotFoundError:
            assert name in torch, name  # CUDA's, which this environment may do without
            asks = []
        for extra in {"", *pin.extras} - {extra for package, extra in seen if package == name}:
            seen.add((name, extra))
            wanted += [ask for ask in asks if ask.marker is None or ask.marker.evaluate({"extra": extra})]
    data = {line.split()[-1].split("==")[0] for line in lines if line.startswith("# no-deps: ")}
    assert {*here} - {name for name, _ in seen} - data - {*torch} == set()


def test_cpu_torch_is_locked_by_file() -> None:
    """S8: the sums of torch's CPU builds stand beside their files' names, for each Python and processor."""
    ((pin, sums),) = locked("requirements-torch-cpu.lock")["torch"]
    ((plain, others),) = locked("requirements-torch.lock")["torch"]
    assert str(pin.specifier) == f"{plain.specifier}+cpu"
    text = (ROOT / "requirements-torch-cpu.lock").read_text()
    version = re.escape(str(plain.specifier).removeprefix("=="))
    files = {
        name: digest
        for digest, name in re.findall(rf"^# ([0-9a-f]{{64}}) torch-{version}\+cpu-(\S+)\.whl$", text, re.M)
    }
    assert sorted(files.values()) == sorted(sums)
    assert {*files} >= {f"cp{v}-cp{v}-manylinux_2_28_{kind}" for v in (311, 312, 313) for kind in ("x86_64", "aarch64")}
    assert {*sums}.isdisjoint(others)


def test_actions_are_named_by_commit() -> None:
    """S8: a tag can be moved to other code; a commit cannot."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        uses = re.findall(r"uses: *(\S.*)", path.read_text())
        assert uses
        for line in uses:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} +# v\d+(\.\d+)+", line), line
