"""RUN.sh slurm on a real small SLURM with real tiny training: whatever ends a job, the run ends as if nothing had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TOY
from slurmbox import SlurmBox

import LATENTWIRE as lw

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [*TOY, "--width", "32", "--depth", "1", "--batch_size", "8", "--patience", "0", "--checkpoint_interval", "2"]
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where a user stands: runs/ and the cache are here, RUN.sh is elsewhere."""
    return tmp_path


@pytest.fixture
def latentwire(box: SlurmBox, here: Path) -> Call:
    """bash RUN.sh WORDS, in the cluster's environment."""

    def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {"LATENTWIRE_SITE": "marlowe", "LATENTWIRE_PYTHON": sys.executable}
        env = {**box.env, **own, "LATENTWIRE_CACHE": str(here / "cache"), **variables}
        command = ["bash", str(ROOT / "RUN.sh"), *words]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=300)

    return call


def submitted(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The numbers of the submitted jobs."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\d+):", done.stdout, re.M)


def steps_done(run: Path) -> int:
    """Rows of the log so far."""
    path = run / "diagnostics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(run: Path, step: int, timeout: float = 120) -> None:
    """Wait until training has come so far."""
    end = time.monotonic() + timeout
    while steps_done(run) < step:
        assert time.monotonic() < end, f"{run} is at step {steps_done(run)}, not at {step}"
        time.sleep(0.05)


def saved_step(run: Path) -> int:
    """The newest checkpoint's step; it must be whole."""
    newest = lw.Checkpoints(run / "checkpoint").steps()[0]
    return int(lw.load_checkpoint(newest)[1]["progress"]["step"])


def result(run: Path) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """The finished run's weights, bit for bit, and its loss curve."""
    assert (run / "DONE").exists()
    newest = lw.Checkpoints(run / "checkpoint").steps()[0]
    files = [*newest.glob("*.safetensors"), run / "checkpoint" / "best" / "bridge.safetensors"]
    rows = lw.read_rows(run / "diagnostics.jsonl")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}, [(r["step"], r["loss"]) for r in rows]


def log_of(here: Path, name: str) -> str:
    """What a job has printed."""
    return (here / "runs" / name).read_text()


def test_a_job_ended_four_ways_ends_like_an_uninterrupted_run(box, latentwire, here):
    flags = [*TRAIN, "--steps", "1500", "--eval_every", "500", "--dataset", "toy"]
    run, plugin, slowly = here / "runs" / "job", here / "slow.py", here / "slowly"
    slowly.touch()  # until it is gone, training outlasts the wait for the time limit's warning on any machine
    plugin.write_text(
        "import os, time, LATENTWIRE as lw\nstep = lw.Trainer.step\n"
        f"def slow(self):\n    time.sleep(0.02 * os.path.exists({str(slowly)!r}))\n    return step(self)\nlw.Trainer.step = slow\n"
    )
    asked = ["slurm", "--job", "training", *flags, "--plugin", str(plugin), "--output_dir", "runs/job"]
    started = time.monotonic()
    [job] = submitted(latentwire(*asked, SBATCH_SIGNAL="B:USR1@120"))
    reached = []

    def comes_back(how: str) -> None:
        box.wait_state(job, "PENDING", timeout=60)
        reached.append(saved_step(run))
        assert reached == sorted(set(reached)), f"no progress saved by {how}: {reached}"
        box.rush(job)

    wait_for_step(run, 50)
    near = int((time.monotonic() - started) / 60) + 2  # minutes: less than two are left, however slow the start was
    assert box.run("scontrol", "update", f"JobId={job}", f"TimeLimit={near}").returncode == 0
    box.wait_state(job, "PENDING", timeout=80)  # by the time limit's own warning, sent at the next look of slurmctld
    comes_back("time limit")
    box.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for_step(run, reached[-1] + 50)
    assert box.run("scontrol", "requeue", job).returncode == 0
    comes_back("scontrol requeue")
    wait_for_step(run, reached[-1] + 50)
    urgent = box.run("sbatch", "--parsable", "-p", "gpu", "-A", "marlowe-m000066", "-N2", "--exclusive", "--output=/dev/null",
                     "--wrap", "true").stdout.strip()  # fmt: skip
    box.wait_state(urgent, "COMPLETED", timeout=60)
    comes_back("preemption")
    wait_for_step(run, reached[-1] + 50)
    box.run("scancel", job)
    box.wait_state(job, "CANCELLED")
    reached.append(saved_step(run))
    assert reached[3] > reached[2]
    status = latentwire("status")
    assert re.search(rf"runs/job +not running +{reached[3]}/1500", status.stdout), status.stdout
    log = log_of(here, f"preempt_training_{job}.log")
    assert log.count("host=") == 4 and log.count("status=143") + log.count("status=138") == 4
    assert box.show(job)["Restarts"] == "3"

    slowly.unlink()
    [again] = submitted(latentwire(*asked))  # the same command, a new job
    box.wait_state(again, "COMPLETED", timeout=300)
    assert f"resuming at step {reached[3]} of 1500" in log_of(here, f"preempt_training_{again}.log")
    plain = latentwire("train", *flags, "--output_dir", "runs/plain")
    assert plain.returncode == 0, plain.stderr
    assert result(run) == result(here / "runs" / "plain")
    assert [step for step, _ in result(run)[1]] == list(range(1, 1501))
    assert not [p for p in [*run.rglob(".*"), *(here / "cache" / "states").glob(".*")] if p.name != "."]
    assert latentwire(*asked).returncode == 0
    print(f"\nsaved at steps {reached}: time limit, requeue, preemption, scancel")


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_processes_of_a_job_equal_one(box, latentwire, here, launcher):
    flags = [*TRAIN, "--steps", "400", "--eval_every", "100", "--dataset", "toy"]
    words = ["slurm", "--job", "training", "--gpus", "2", "--launcher", launcher, *flags]
    [job] = submitted(latentwire(*words))
    run = here / "runs" / f"experiment_{job}"
    wait_for_step(run, 100)
    box.run("scancel", "--batch", "--signal=USR1", job)
    box.wait_state(job, "PENDING", timeout=60)
    assert 100 <= saved_step(run) < 400
    box.rush(job)
    [whole] = submitted(latentwire(*words))
    for number in (job, whole):
        box.wait_state(number, "COMPLETED", timeout=300)
    assert result(run) == result(here / "runs" / f"experiment_{whole}")
    log = log_of(here, f"preempt_training_{job}.log")
    assert log.count("2 processes share 8 rows per step") == 2 and log.count("resuming at step") == 1
    alone = latentwire("train", *flags, "--output_dir", "runs/alone")
    assert alone.returncode == 0, alone.stderr
    losses = [loss for _, loss in result(run)[1]]
    assert losses == pytest.approx([loss for _, loss in result(here / "runs" / "alone")[1]], rel=1e-4)


def test_a_dead_rank_ends_the_job(box, latentwire, here):
    plugin = here / "die.py"
    plugin.write_text(
        "import os, signal, LATENTWIRE as lw\nstep = lw.Trainer.step\n"
        "def dying(self):\n    if self.world.rank == 1 and self.progress.step == 40:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return step(self)\nlw.Trainer.step = dying\n"
    )
    flags = [*TRAIN, "--steps", "4000", "--eval_every", "20", "--dataset", "toy", "--plugin", str(plugin)]
    [job] = submitted(latentwire("slurm", "--job", "training", "--gpus", "2", *flags, PYTHONPATH=str(ROOT)))
    box.wait_state(job, "FAILED", timeout=300)
    log = log_of(here, f"preempt_training_{job}.log")
    assert "lost the others" in log and "not requeued: it failed without having been told to stop" in log
    assert saved_step(here / "runs" / f"experiment_{job}") == 40


def test_seeds_as_an_array(box, latentwire, here):
    flags = [*TRAIN, "--steps", "30", "--dataset", "toy", "--output_dir", "runs/sweep"]
    [job] = submitted(latentwire("slurm", "--job", "training", "--array-seeds", "42,123", *flags))
    for element in range(2):
        box.wait_state(f"{job}_{element}", "COMPLETED", timeout=300)
    seeds = [json.loads((here / "runs" / "sweep" / f"seed{n}" / "config.json").read_text())["seed"] for n in (42, 123)]
    assert seeds == [42, 123]
    assert result(here / "runs" / "sweep" / "seed42")[0] != result(here / "runs" / "sweep" / "seed123")[0]


def test_a_site_that_exports_nothing_changes_nothing(box, latentwire, here):
    """J1: SBATCH_EXPORT=NONE; two GPUs train with two processes, and an array finds its seeds."""
    flags = [*TRAIN, "--steps", "20", "--dataset", "toy"]
    bare = {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"}
    [pair] = submitted(latentwire("slurm", "--job", "training", "--gpus", "2", *flags, **bare))
    [array] = submitted(
        latentwire(
            "slurm", "--job", "training", "--array-seeds", "42,123", *flags, "--output_dir", "runs/sweep", **bare
        )
    )
    box.wait_state(pair, "COMPLETED", timeout=300)
    assert "2 processes share 8 rows per step" in log_of(here, f"preempt_training_{pair}.log")
    for element in range(2):
        box.wait_state(f"{array}_{element}", "COMPLETED", timeout=300)
    assert {path.name for path in (here / "runs" / "sweep").iterdir()} == {"seed42", "seed123"}


def test_a_time_limit_below_the_warning_ends(box, latentwire, here):
    """J2: each turn is told to stop as soon as it begins; the third is the last."""
    asked = [
        "slurm",
        "--job",
        "training",
        "--time",
        "1",
        *TRAIN,
        "--steps",
        "5000",
        "--eval_every",
        "5000",
        "--dataset",
        "toy",
    ]
    plugin = here / "slow.py"
    plugin.write_text(  # SIGUSR1 to the script, as SLURM sends it, before the first step
        "import os, signal, time, LATENTWIRE as lw\nprepare = lw.Trainer.prepare\n"
        "def told(self):\n    os.kill(os.getppid(), signal.SIGUSR1)\n    time.sleep(1)\n    prepare(self)\n"
        "lw.Trainer.prepare = told\n"
    )
    [job] = submitted(latentwire(*asked, "--plugin", str(plugin)))
    for turn in ("1", "2"):  # not only PENDING: that it is before its first turn, too
        box.wait_until(lambda turn=turn: box.show(job).get("Restarts") == turn, f"job {job} was requeued", 90)
        box.rush(job)
    box.wait_state(job, "FAILED", timeout=300)
    assert box.show(job)["Restarts"] == "2"
    assert "not requeued: nothing was saved" in log_of(here, f"preempt_training_{job}.log")


def test_an_experiment_is_a_pipeline_that_stops_at_a_failure(box, latentwire, here):
    flags = [*TOY, "--steps", "20", "--num_samples", "20", "--latent_len", "2,4"]
    good = submitted(latentwire("slurm", "--job", "experiment", "--name", "good", *flags))
    plugin = here / "fail.py"
    plugin.write_text(
        "import LATENTWIRE as lw\ndef failing(self):\n    raise lw.LatentWireError('no luck')\nlw.Trainer.step = failing\n"
    )
    bad = submitted(latentwire("slurm", "--job", "experiment", "--name", "bad", *flags, "--plugin", str(plugin)))
    assert len(good) == len(bad) == 3
    box.wait_state(good[2], "COMPLETED", timeout=300)
    groups = json.loads((here / "runs" / "good" / "aggregated_results.json").read_text())["groups"]
    assert [group["latent_len"] for group in groups] == [2, 4]
    assert re.search(r"runs/good/latent_len2 +evaluated", latentwire("status", COLUMNS="120").stdout)
    assert "failed: runs/bad/latent_len2: no luck" in log_of(here, f"preempt_train_{bad[0]}_0.log")
    box.wait_state(bad[1], "CANCELLED", timeout=300)
    box.wait_state(bad[2], "CANCELLED", timeout=60)


def test_a_wrong_account_is_refused_with_the_reason(latentwire, here):
    done = latentwire("slurm", "--job", "training", "--account", "marlowe", *TRAIN)
    assert done.returncode == 2
    assert "Invalid account or account/partition combination specified" in done.stderr
    assert "Traceback" not in done.stderr and os.listdir(here) == ["runs"]
