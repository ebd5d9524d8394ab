"""slurm/job.slurm with a stand-in for LATENTWIRE.py: its words under plain bash, its signals on a real small SLURM."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurmbox import SlurmBox

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, SITE, MARLOWE = (ROOT / "slurm" / name for name in ("job.slurm", "site.env", "marlowe.env"))

# Counts steps until the file `enough` appears; told to stop, it takes half a second to save, as the real one does.
# With --unsaved it ends as if saving had failed, with that status.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

def value(flag, default=None):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default

told = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: told.append(number))
print("words", sys.argv[1:], flush=True)
if value("--fail") or sys.argv[1] != "train":
    sys.exit(int(value("--fail", "0")))
rank = os.environ.get("SLURM_PROCID" if "SLURM_STEP_ID" in os.environ else "RANK", "0")
folder = Path(value("--output_dir", "."))
folder.mkdir(parents=True, exist_ok=True)
saved = folder / f"saved{rank}"
step = first = int(saved.read_text()) if saved.exists() else 0
print(f"rank {rank} starts at {first}", flush=True)
while not told and not (folder / "enough").exists():
    time.sleep(0.1)
    step += 1
if told:
    time.sleep(0.5)
    if value("--unsaved"):
        sys.exit(int(value("--unsaved")))
    saved.write_text(str(step))
    kept = folder / "checkpoint" / f"step-{step:08d}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "state.json").write_text("{}")
    print(f"rank {rank} saved {step}", flush=True)
    sys.exit(128 + told[0])
print(f"rank {rank} ends", flush=True)
if rank == "0":
    (folder / "DONE").touch()
"""


def site_defaults(path: Path = MARLOWE) -> dict[str, str]:
    """A site's file, read as LATENTWIRE.py reads it."""
    lines = path.read_text().splitlines()
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line, comments=True))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the stand-in, in which jobs are submitted and write."""
    folder = tmp_path / "the product"
    folder.mkdir()
    (folder / "LATENTWIRE.py").write_text(STAND_IN)
    return folder


def words_of(log: str) -> list[str]:
    """The words LATENTWIRE.py got."""
    (line,) = [line for line in log.splitlines() if line.startswith("words ")]
    return list(ast.literal_eval(line.removeprefix("words ")))


# Without SLURM: the script is plain bash with a few variables set.


def run_script(home: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """job.slurm as SLURM would run it in job 7."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LATENTWIRE_"))}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        cwd=home,
        env={
            **inherited,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_SUBMIT_DIR": str(home),
            "LATENTWIRE_PYTHON": sys.executable,
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def stub(folder: Path, name: str, text: str) -> Path:
    """An executable of our own."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_site_files_read_the_same_in_bash_and_python() -> None:
    """U9: what everyone gets names no cluster's account; the documents' account is a profile beside it."""
    assert site_defaults(SITE) == {"SBATCH_GPUS": "1"}
    assert site_defaults(MARLOWE) == {
        "SBATCH_ACCOUNT": "marlowe-m000066",
        "SBATCH_PARTITION": "preempt",
        "SBATCH_GPUS": "1",
        "SBATCH_TIMELIMIT": "12:00:00",
        "SBATCH_MEM_PER_NODE": "256G",
    }
    for path in (SITE, MARLOWE):
        command = ["env", "-i", "bash", "-c", f'set -a; . "{path}"; env']
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert {line for line in done.stdout.splitlines() if line.startswith("SBATCH_")} == {
            f"{name}={value}" for name, value in site_defaults(path).items()
        }
    assert "marlowe-m000066" not in SITE.read_text()


def test_script_names_no_cluster() -> None:
    """What is particular to a cluster stands in site.env and profiles alone."""
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "#SBATCH --nodes=1",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@120",
    ]


def test_log_says_what_ran(home: Path) -> None:
    done = run_script(home, "eval", "--text", "two  words", "*", "$HOME")
    assert (done.returncode, done.stderr) == (0, "")
    host, date, job, commit, command, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"host=\S+", host)
    assert re.fullmatch(r"date=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", date)
    assert (job, commit) == ("job=7 id=7 restart=0", "commit=none")
    words = ["eval", "--text", "two  words", "*", "$HOME"]
    assert shlex.split(command.removeprefix("command=")) == [sys.executable, f"{home}/LATENTWIRE.py", *words]
    assert words_of(done.stdout) == words
    assert re.fullmatch(r"status=0 seconds=\d+", last)


def test_placeholders(home: Path) -> None:
    words = ("eval", "--a=runs/x_{job}/seed{seed}", "{task}", "{job}{job}", "{other}")
    array = {
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "LATENTWIRE_SEEDS": "42 1&3 456",
    }
    assert words_of(run_script(home, *words, **array).stdout) == ["eval", "--a=runs/x_7/seed1&3", "1", "77", "{other}"]
    assert words_of(run_script(home, "eval", "{job}").stdout) == ["eval", "7"]


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        ((), {}, "no command"),
        (("train", "{seed}"), {"LATENTWIRE_SEEDS": "1 2"}, "need sbatch --array"),
        (("train", "{seed}"), {"LATENTWIRE_SEEDS": "1 2", "SLURM_ARRAY_TASK_ID": "2"}, "LATENTWIRE_SEEDS='1 2'"),
        (("train",), {"LATENTWIRE_PYTHON": "/no/such/python"}, "no Python at /no/such/python"),
        (("train",), {"LATENTWIRE_PYTHON": ""}, "the product/.venv/bin/python; run 'bash RUN.sh --version' once"),
        (("train",), {"LATENTWIRE_HOME": "/no/such/folder"}, "no LATENTWIRE.py in /no/such/folder"),
        (("train",), {"LATENTWIRE_PROCESSES": "two"}, "a whole number above 0, not 'two'"),
        (("train",), {"LATENTWIRE_PROCESSES": "2", "LATENTWIRE_LAUNCHER": "direct"}, "starts one process, not 2"),
        (("train",), {"LATENTWIRE_LAUNCHER": "mpirun"}, "direct, srun or torchrun, not 'mpirun'"),
        (("train",), {"LATENTWIRE_LAUNCHER": "torchrun", "SLURM_JOB_NUM_NODES": "2"}, "for one node; take srun"),
        (("train",), {"LATENTWIRE_RESTARTS": "many"}, "a whole number, not 'many'"),
    ],
)
def test_mistakes_are_one_line(home: Path, words: tuple[str, ...], variables: dict[str, str], says: str) -> None:
    done = run_script(home, *words, **variables)
    assert (done.returncode, done.stderr) == (2, "")
    *_, line, last = done.stdout.splitlines()
    assert line.startswith("job.slurm: ") and says in line
    assert re.fullmatch(r"status=2 seconds=\d+", last)
    assert "words" not in done.stdout.replace("LATENTWIRE_SEEDS", "")


def test_outside_a_job(home: Path) -> None:
    done = run_script(home, "train", SLURM_JOB_ID="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("job.slurm: not inside a job; submit it: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [("--output_dir", "a run"), ("--output-dir=a run",), ("--resume", "--save_dir=a run")]
)
def test_finished_run_is_not_started_again(home: Path, words: tuple[str, ...]) -> None:
    (home / "a run").mkdir()
    (home / "a run" / "DONE").touch()
    done = run_script(home, "train", *words)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2] == "job.slurm: nothing to do: a run/DONE exists"
    assert words_of(run_script(home, "eval", *words).stdout) == ["eval", *words]


@pytest.mark.parametrize(("status", "why"), [(2, "status 2 is a mistake"), (1, "without having been told to stop")])
def test_failure_is_not_requeued(home: Path, status: int, why: str) -> None:
    done = run_script(home, "train", "--fail", str(status))
    assert done.returncode == status
    *_, line, last = done.stdout.splitlines()
    assert line.startswith("job.slurm: not requeued: ") and why in line
    assert last.startswith(f"status={status} ")


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (("train",), {"SLURM_NTASKS": "4"}),
        (("experiment", "--name", "x", "--stage", "train"), {"SLURM_NTASKS": "4"}),
        (("train", "--world_size", "4"), {}),
        (("train", "--world-size=4"), {"LATENTWIRE_PROCESSES": "2", "SLURM_NTASKS": "2"}),
        (("train",), {"LATENTWIRE_PROCESSES": "4", "SLURM_NTASKS": "2"}),
    ],
)
def test_fewer_processes_than_promised_are_refused(
    home: Path, words: tuple[str, ...], variables: dict[str, str]
) -> None:
    """J1: a job whose variables stayed behind says so, and does not train with one process on four GPUs."""
    done = run_script(home, *words, **variables)
    assert (done.returncode, done.stderr) == (2, "")
    *_, line, last = done.stdout.splitlines()
    assert line.startswith("job.slurm: ") and ("--export=ALL" in line or "--ntasks" in line)
    assert last.startswith("status=2 ") and "words" not in done.stdout


def test_what_was_promised_is_told_once(home: Path, tmp_path: Path) -> None:
    """J1: a promise that is kept starts the processes; evaluations in a job with several tasks need no promise."""
    stub(tmp_path, "srun", ECHO)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_script(home, "train", "--world_size", "4", LATENTWIRE_PROCESSES="4", SLURM_NTASKS="4", PATH=path)
    assert done.returncode == 0 and done.stdout.splitlines().count("--world_size") == 1, done.stdout
    assert words_of(run_script(home, "eval", SLURM_NTASKS="4").stdout) == ["eval"]


@pytest.fixture
def scontrol(tmp_path: Path) -> Callable[..., Callable[[], list[str]]]:
    """scontrol(state, more) puts a stub on the PATH; what it returns says which calls changed something."""

    def install(state: str, more: str = "") -> Callable[[], list[str]]:
        calls = tmp_path / "calls"
        answer = f"echo JobId=9 JobState={state} {more} Reason=None" if state else "echo no controller >&2; exit 1"
        stub(tmp_path, "scontrol", f'#!/bin/bash\necho "$*" >>{shlex.quote(str(calls))}\n{answer}\n')
        return lambda: [line for line in calls.read_text().splitlines() if not line.startswith("show job -o 7")]

    return install


@pytest.mark.parametrize(
    ("state", "says", "requeues"),
    [("RUNNING", "requeueing 7_1", ["requeue 7_1"]), ("COMPLETING", "ending this job", []), ("", "does not say", [])],
)
def test_state_decides_on_the_requeue(
    home: Path,
    tmp_path: Path,
    scontrol: Callable[..., Callable[[], list[str]]],
    state: str,
    says: str,
    requeues: list[str],
) -> None:
    calls = scontrol(state)
    variables = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = run_script(home, "train", "--fail", "143", PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    assert done.returncode == 143
    assert says in done.stdout
    assert calls() == requeues


# A turn of a job: what it leaves in the run folder, and the status it ends with.
TURN = """
import sys
from pathlib import Path

kept, status = sys.argv[sys.argv.index("--turn") + 1].split(",")
place = Path("run", kept or "diagnostics.jsonl")
place.parent.mkdir(parents=True, exist_ok=True)
with place.open("a") as stream:
    print("{}", file=stream)
sys.exit(int(status))
"""


@pytest.mark.parametrize(
    ("kept", "status", "restarts", "more", "requeued"),
    [
        ("checkpoint/step-00000020/state.json", 138, "7", "", True),
        ("seed1/checkpoint/step-00000020/state.json", 138, "7", "", True),
        ("records.jsonl", 138, "7", "", True),
        ("checkpoint/step-00000020/state.json", 138, "9999", "", False),  # bounded, whatever it does
        ("", 138, "0", "", True),  # a first turn may go by with downloads
        ("", 138, "2", "", False),  # not three of them
        ("", 138, "9999", "", False),
        ("", 138, "2", "PreemptTime=None", False),
        ("", 143, "9", "PreemptTime=2026-11-29T21:00:00", True),  # preempted before anything could be saved
    ],
)
def test_a_requeue_needs_progress(
    home: Path,
    tmp_path: Path,
    scontrol: Callable[..., Callable[[], list[str]]],
    kept: str,
    status: int,
    restarts: str,
    more: str,
    requeued: bool,
) -> None:
    """J2: a turn that saved nothing is not followed by another for ever."""
    calls = scontrol("RUNNING", more)
    (home / "LATENTWIRE.py").write_text(TURN)
    (home / "run" / "checkpoint" / "step-00000010").mkdir(parents=True)
    (home / "run" / "checkpoint" / "step-00000010" / "state.json").touch()
    words = ("train", "--output_dir", "run", "--turn", f"{kept},{status}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_script(home, *words, SLURM_RESTART_COUNT=restarts, PATH=path)
    assert done.returncode == status
    assert calls() == (["requeue 7"] if requeued else []), done.stdout
    assert requeued or "job.slurm: not requeued: " in done.stdout.splitlines()[-2]


@pytest.mark.parametrize(
    "words",
    [
        ("baseline", "all", "--dataset", "sst2"),  # no folder is named: where to look is not known
        ("eval", "--checkpoint", "run/checkpoint/best"),  # records go beside the checkpoints
    ],
)
def test_progress_is_looked_for_where_it_is_saved(words, home, tmp_path, scontrol):
    """J2: such jobs got no third turn, however much they had done."""
    calls = scontrol("RUNNING", "")
    (home / "LATENTWIRE.py").write_text(TURN)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_script(home, *words, "--turn", "records.jsonl,138", SLURM_RESTART_COUNT="2", PATH=path)
    assert done.returncode == 138 and calls() == ["requeue 7"], done.stdout


def test_a_crash_while_saving_is_not_requeued(home: Path, tmp_path: Path, scontrol: Callable[..., Any]) -> None:
    """J2: told to stop, the first turn dies of a full disk: another would die of it as well."""
    calls = scontrol("RUNNING")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LATENTWIRE_"))}
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "train", "--output_dir", "run", "--unsaved", "1"],
        cwd=home,
        env={
            **inherited,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_SUBMIT_DIR": str(home),
            "LATENTWIRE_PYTHON": sys.executable,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    said = ""
    while " starts at 0" not in said:
        said += job.stdout.readline()
    job.send_signal(signal.SIGUSR1)
    said += job.communicate(timeout=30)[0]
    assert job.returncode == 1
    assert "not requeued: nothing was saved" in said.splitlines()[-2], said
    assert not (tmp_path / "calls").exists() or calls() == []


ECHO = '#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep -E "^(MASTER_|OMP_|SRUN_)"\n'


def test_srun_gets_as_many_processes_as_asked_for(home: Path, tmp_path: Path) -> None:
    stub(tmp_path, "srun", ECHO)
    stub(tmp_path, "scontrol", "#!/bin/bash\nprintf '%s\\n' first second\n")
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LATENTWIRE_PROCESSES": "4",
        "SLURM_CPUS_PER_TASK": "3",
        "OMP_NUM_THREADS": "",
    }
    done = run_script(home, "train", "--lr", "1", **variables).stdout.splitlines()
    options = ["--export=ALL", "--ntasks=4", "--kill-on-bad-exit=0", "--wait=60"]
    assert done[5:14] == [*options, sys.executable, f"{home}/LATENTWIRE.py", "train", "--lr", "1"]
    assert done[14:16] == ["--world_size", "4"]
    assert {"MASTER_ADDR=127.0.0.1", "MASTER_PORT=10007", "OMP_NUM_THREADS=3", "SRUN_CPUS_PER_TASK=3"} <= set(done)
    variables |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "OMP_NUM_THREADS": "5"}
    done = run_script(home, "eval", **variables).stdout.splitlines()
    assert {"MASTER_ADDR=first", "OMP_NUM_THREADS=5"} <= set(done)
    assert "--world_size" not in done


def test_torchrun_is_told_to_pass_signals_on(home: Path, tmp_path: Path) -> None:
    python = stub(tmp_path, "python", ECHO)
    done = run_script(
        home, "train", LATENTWIRE_PYTHON=str(python), LATENTWIRE_PROCESSES="2", LATENTWIRE_LAUNCHER="torchrun"
    ).stdout.splitlines()
    assert done[5:9] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in done
    assert "--shutdown-timeout=100" in done


def git(folder: Path, *words: str) -> str:
    """git's answer; the identity is given here, so that none need be configured."""
    names = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def cloned(home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(home as a clone with a finished run in an ignored folder, another clone of the same remote)."""
    git(tmp_path, "init", "--bare", "remote")
    other = tmp_path / "other"
    git(home, "init")
    git(home, "config", "user.name", "t")
    git(home, "config", "user.email", "t@example.com")
    (home / ".gitignore").write_text("runs/\n")
    git(home, "add", ".")
    git(home, "commit", "-m", "first")
    git(home, "remote", "add", "origin", str(tmp_path / "remote"))
    git(home, "push", "-u", "origin", "main")
    git(tmp_path, "clone", str(tmp_path / "remote"), str(other))
    run = home / "runs" / "a"
    (run / "checkpoint").mkdir(parents=True)
    for name in ("enough", "results.json", "records.jsonl", "report.html", "checkpoint/weights.pt", "page.html"):
        (run / name).write_text("x")
    (run / "large.json").write_bytes(bytes(20_000_000))
    (home / "staged").touch()
    git(home, "add", "staged")
    return home, other


SYNC = {"LATENTWIRE_GIT_SYNC": "1"}


def test_git_is_left_alone_by_default(cloned: tuple[Path, Path]) -> None:
    home, _ = cloned
    before = git(home, "rev-parse", "HEAD")
    done = run_script(home, "train", "--output_dir", "runs/a")
    assert f"commit={before}" in done.stdout.splitlines()
    assert (git(home, "rev-parse", "HEAD"), git(home, "status", "--porcelain")) == (before, "A  staged")


def test_git_sync_pulls_before_and_pushes_small_results_after(cloned: tuple[Path, Path]) -> None:
    home, other = cloned
    (other / "newer").touch()
    git(other, "add", ".")
    git(other, "commit", "-m", "second")
    git(other, "push")
    assert "FAILED" not in run_script(home, "train", "--output_dir", "runs/a", **SYNC).stdout
    assert (home / "newer").exists()
    git(other, "pull")
    assert git(other, "log", "-1", "--format=%s") == "results: job 7"
    assert git(other, "show", "--format=", "--name-only", "HEAD").split() == [
        "runs/a/records.jsonl",
        "runs/a/report.html",
        "runs/a/results.json",
    ]
    assert git(home, "status", "--porcelain") == "A  staged"
    stub(
        home / ".git" / "hooks",
        "post-commit",
        f'#!/bin/bash\nrm "$0"\ncd {shlex.quote(str(other))}\nunset ${{!GIT_*}}\n'
        "git -c user.name=t -c user.email=t@example.com commit --allow-empty -m meanwhile\ngit push\n",
    )
    (home / "runs" / "a" / "results.json").write_text("better")
    (home / "LATENTWIRE.py").write_text(STAND_IN + "# being edited\n")
    assert "FAILED" not in run_script(home, "eval", "--checkpoint", "runs/a", **SYNC).stdout
    git(other, "pull")
    assert git(other, "log", "-2", "--format=%s").splitlines() == ["results: job 7", "meanwhile"]
    assert (home / "LATENTWIRE.py").read_text().endswith("# being edited\n")


def test_git_sync_without_news(cloned: tuple[Path, Path]) -> None:
    home, _ = cloned
    run_script(home, "train", "--output_dir", "runs/a", **SYNC)
    pushed = git(home, "rev-parse", "origin/main")
    again = run_script(home, "eval", "--checkpoint", "runs/a", **SYNC)
    assert "FAILED" not in again.stdout
    assert git(home, "rev-parse", "HEAD") == git(home, "rev-parse", "origin/main") == pushed


def test_git_failure_does_not_fail_the_job(cloned: tuple[Path, Path], tmp_path: Path) -> None:
    home, _ = cloned
    git(home, "remote", "set-url", "origin", str(home / "nowhere"))
    stub(tmp_path, "sleep", "#!/bin/bash\n")
    done = run_script(home, "train", "--output_dir", "runs/a", PATH=f"{tmp_path}:{os.environ['PATH']}", **SYNC)
    assert done.returncode == 0
    loud = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert [line.split(" FAILED")[0] for line in loud] == ["job.slurm: GIT PULL", "job.slurm: GIT PUSH"]
    assert (home / "runs" / "a" / "DONE").exists()


# On a real SLURM.

Submit = Callable[..., str]


@pytest.fixture
def submit(box: SlurmBox, home: Path) -> Submit:
    """submit(words, options) → the job's number; its log is home/NUMBER.log."""

    def submit(words: str, options: str = "", script: Path = SCRIPT, **variables: str) -> str:
        done = subprocess.run(
            [
                "sbatch",
                "--parsable",
                "--export=ALL",
                f"--output={home}/%j.log",
                *shlex.split(options),
                str(script),
                *shlex.split(words),
            ],
            cwd=home,
            env={**site_defaults(), **box.env, "LATENTWIRE_PYTHON": sys.executable, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def log_of(home: Path, job: str) -> str:
    """What the job has printed so far."""
    path = home / f"{job}.log"
    return path.read_text() if path.exists() else ""


def wait_for(home: Path, job: str, text: str, times: int = 1, timeout: float = 30) -> None:
    """Wait until the job's log holds ``text``."""
    end = time.monotonic() + timeout
    while log_of(home, job).count(text) < times:
        assert time.monotonic() < end, f"no {times} x {text!r} in {log_of(home, job)!r}"
        time.sleep(0.05)


LAUNCHERS = {
    "direct": ("", {}),
    "srun": ("--ntasks=2", {"LATENTWIRE_PROCESSES": "2"}),
    "torchrun": ("--ntasks=2", {"LATENTWIRE_PROCESSES": "2", "LATENTWIRE_LAUNCHER": "torchrun"}),
}
launchers = pytest.mark.parametrize("launcher", ["direct", "srun"])


@pytest.fixture
def train(submit: Submit, home: Path) -> Callable[..., str]:
    """train(launcher) → the number of a job that trains in home/run and has begun to count."""

    def train(launcher: str, options: str = "") -> str:
        more, variables = LAUNCHERS[launcher]
        job = submit("train --output_dir run --auto_resume", f"{more} {options}", **variables)
        wait_for(home, job, " starts at 0", times=1 if launcher == "direct" else 2)
        time.sleep(0.3)
        return job

    return train


def assert_comes_back(box: SlurmBox, home: Path, job: str) -> None:
    """The stopped job starts again, goes on where every process of it saved, and completes; the log keeps both parts."""
    box.wait_state(job, "PENDING")
    (home / "run" / "enough").touch()
    box.rush(job)
    box.wait_state(job, "COMPLETED")
    log = log_of(home, job)
    saved = dict(re.findall(r"rank (\d) saved (\d+)", log))
    assert saved and all(int(step) > 0 for step in saved.values())
    starts = [f"rank {rank} starts at {step}" for rank, step in saved.items()]
    assert all(start in log for start in starts), log
    assert log.startswith("host=")
    assert re.findall(r"^job=.*$", log, re.M) == [f"job={job} id={job} restart={number}" for number in (0, 1)]
    assert re.fullmatch(r"status=0 seconds=\d+", log.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_time_limit_warning(box: SlurmBox, home: Path, train: Callable[..., str], launcher: str) -> None:
    """scancel --batch sends what --signal=B: sends, to the same process."""
    job = train(launcher)
    box.run("scancel", "--batch", "--signal=USR1", job)
    assert_comes_back(box, home, job)
    status = 1 if launcher == "torchrun" else 138
    log = log_of(home, job)
    assert f"job.slurm: told to stop (SIGUSR1), ended with status {status}; requeueing {job}\n" in log
    assert re.search(rf"^status={status} seconds=\d+\n(slurmstepd.*\n)*host=", log, re.M), log


@pytest.mark.slow
@launchers
def test_requeue_by_hand(box: SlurmBox, home: Path, train: Callable[..., str], launcher: str) -> None:
    job = train(launcher)
    assert box.run("scontrol", "requeue", job).returncode == 0
    assert_comes_back(box, home, job)
    assert "not requeued: SLURM is ending this job" in log_of(home, job)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "partition"), [("direct", "preempt"), ("srun", "preempt"), ("srun", "grace")])
def test_preemption(
    box: SlurmBox, home: Path, submit: Submit, train: Callable[..., str], launcher: str, partition: str
) -> None:
    """With a grace time, only the processes that srun started are told, at once; the script must ask for the requeue."""
    job = train(launcher, f"--partition={partition}")
    urgent = submit("eval", "--partition=gpu --nodes=2 --gpus=8 --exclusive")
    box.wait_state(urgent, "COMPLETED")
    assert_comes_back(box, home, job)


@pytest.mark.slow
@launchers
def test_cancelled_stays_cancelled(box: SlurmBox, home: Path, train: Callable[..., str], launcher: str) -> None:
    job = train(launcher)
    box.run("scancel", job)
    wait_for(home, job, "status=143")
    assert "saved" in log_of(home, job)
    assert "not requeued: SLURM is ending this job" in log_of(home, job)
    box.wait_state(job, "CANCELLED")
    assert box.show(job)["Restarts"] == "0"


@pytest.mark.slow
def test_job_that_may_not_be_requeued_says_so(box: SlurmBox, home: Path, train: Callable[..., str]) -> None:
    job = train("direct", "--no-requeue")
    box.run("scancel", "--batch", "--signal=USR1", job)
    assert box.wait_state(job, "FAILED")["ExitCode"] == "138:0"
    assert "not requeued: SLURM refused" in log_of(home, job)


@pytest.mark.slow
def test_mistakes_fail_and_finished_runs_complete(box: SlurmBox, home: Path, submit: Submit) -> None:
    (home / "run").mkdir()
    (home / "run" / "DONE").touch()
    mistaken, finished = submit("train --fail 2"), submit("train --output_dir run")
    state = box.wait_state(mistaken, "FAILED")
    assert (state["ExitCode"], state["Restarts"]) == ("2:0", "0")
    box.wait_state(finished, "COMPLETED")
    assert "nothing to do: run/DONE exists" in log_of(home, finished)


@pytest.mark.slow
def test_only_the_warned_element_of_an_array_comes_back(box: SlurmBox, home: Path, submit: Submit) -> None:
    """The last element's SLURM_JOB_ID is the array's own number, so that it is the one to warn."""
    job = submit(
        "train --output_dir runs/experiment_{job}/seed{seed} --seed {seed}",
        f"--array=0-2 --output='{home}/%A_%a.log'",
        LATENTWIRE_SEEDS="42 123 456",
    )
    runs = home / "runs" / f"experiment_{job}"
    for element in range(3):
        wait_for(home, f"{job}_{element}", " starts at 0")
    assert f"job={job}_2 id={job} restart=0" in log_of(home, f"{job}_2")
    box.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    box.wait_state(f"{job}_2", "PENDING")
    for seed in (42, 123, 456):
        (runs / f"seed{seed}" / "enough").touch()
    box.rush(f"{job}_2")
    for element in range(3):
        assert box.wait_state(f"{job}_{element}", "COMPLETED")["Restarts"] == str(int(element == 2))
    assert sorted(path.name for path in runs.iterdir()) == ["seed123", "seed42", "seed456"]
    assert all((run / "DONE").exists() for run in runs.iterdir())


DOCUMENTED_HEADER = """#!/bin/bash
#SBATCH --job-name=latentwire
#SBATCH --nodes=1
#SBATCH --gpus=4
#SBATCH --account=marlowe-m000066    # CRITICAL: exact string
#SBATCH --partition=preempt          # CRITICAL: exact string
#SBATCH --time=12:00:00
#SBATCH --mem=256GB
#SBATCH --signal=TERM@120            # Preemption warning
#SBATCH --requeue                    # Auto-restart on preemption
#SBATCH --output=/projects/m000066/sujinesh/LatentWire/runs/%j.log
"""


@pytest.mark.slow
def test_documented_header_runs(box: SlurmBox, home: Path) -> None:
    """As documented but for --output, whose folder is on their cluster alone."""
    script = home / "theirs.slurm"
    script.write_text(
        f"{DOCUMENTED_HEADER}\nexport LATENTWIRE_PYTHON={shlex.quote(sys.executable)}\necho gpus=$CUDA_VISIBLE_DEVICES\n"
        f"exec bash {shlex.quote(str(SCRIPT))} train --auto_resume --save_dir runs/experiment_$SLURM_JOB_ID\n"
    )
    (home / "enough").touch()
    command = ["sbatch", "--parsable", f"--output={home}/%j.log"]
    done = subprocess.run([*command, str(script)], cwd=home, env=box.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    state = box.wait_state(job, "COMPLETED")
    assert (state["Account"], state["Partition"], state["TimeLimit"]) == ("marlowe-m000066", "preempt", "12:00:00")
    assert (state["MinMemoryNode"], state["JobName"], state["Requeue"]) == ("256G", "latentwire", "1")
    log = log_of(home, job)
    assert "gpus=0,1,2,3\n" in log
    assert words_of(log) == ["train", "--auto_resume", "--save_dir", f"runs/experiment_{job}"]


@pytest.mark.slow
def test_wrong_account_is_refused(box: SlurmBox, home: Path) -> None:
    script = home / "theirs.slurm"
    script.write_text(DOCUMENTED_HEADER.replace("marlowe-m000066", "marlowe") + "true\n")
    done = box.run("sbatch", script)
    assert done.returncode == 1
    assert "Invalid account or account/partition combination specified" in done.stderr


@pytest.mark.slow
def test_options_come_before_environment_before_site(box: SlurmBox, home: Path) -> None:
    """With the very line that slurm/README.md gives, for a profile."""
    (line,) = [line for line in (ROOT / "slurm" / "README.md").read_text().splitlines() if "site.env;" in line]
    line = line.replace("site.env;", "marlowe.env;")

    def submitted(options: str = "", **variables: str) -> list[str]:
        command = f"{line.strip()}\nsbatch --parsable --hold {options} {shlex.quote(str(SCRIPT))} train"
        env = {**box.env, **variables}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        job = box.show(done.stdout.strip())
        box.run("scancel", done.stdout.strip())
        return [job[name] for name in ("Account", "Partition", "TresPerJob", "TimeLimit", "MinMemoryNode")]

    mine = {"SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "1:00:00", "SBATCH_GPUS": "2"}
    assert submitted() == ["marlowe-m000066", "preempt", "gres:gpu:1", "12:00:00", "256G"]
    assert submitted(**mine) == ["marlowe-m000066", "gpu", "gres:gpu:2", "01:00:00", "256G"]
    options = "--partition=grace --time=30 --gpus=3 --mem=8G"
    assert submitted(options, **mine) == ["marlowe-m000066", "grace", "gres:gpu:3", "00:30:00", "8G"]
