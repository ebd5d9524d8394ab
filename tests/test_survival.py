"""Runs that are killed, cut off, damaged or starved: what was saved is whole, and going on ends with the same bytes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY, contents

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--width", "16", "--heads", "2", "--depth", "1", "--d_z", "16", "--batch_size", "8", "--patience", "0")
LENGTH = ("--steps", "12", "--eval_every", "3", "--keep_checkpoints", "3")
UNLIKE = {
    "seconds",
    "tokens_per_s",
    "host",
    "job",
    "peak_memory_bytes",
}  # what two runs of the same thing may differ in
DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


class Listening(lw.Silent):
    """A Report that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def heard(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.said)


def train(folder: Path, *flags: str) -> Listening:
    """The small run in ``folder``; → what it said."""
    report = Listening()
    lw.train_main([*TOY, *SMALL, *LENGTH, "--output_dir", str(folder), *flags], report)
    return report


def alike(value: Any) -> Any:
    """``value`` without what may differ between two runs of the same thing."""
    if isinstance(value, dict):
        return {key: alike(item) for key, item in value.items() if key not in UNLIKE}
    return value


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal: the raw weights and optimizer of the newest and best checkpoint, progress and log."""
    newest = lw.Checkpoints(folder / "checkpoint").steps()[0]
    found: dict[str, Any] = {"newest": newest.name}
    for place in (newest, folder / "checkpoint" / "best"):
        role = "best" if place.name == "best" else "newest"
        found |= {f"{role}/{path.name}": path.read_bytes() for path in place.glob("*.safetensors")}
        state = json.loads((place / "state.json").read_text())
        found |= {f"{role}/{key}": alike(state[key]) for key in ("progress", "steps", "sha256", "task", "bridge")}
    found["log"] = [alike(row) for row in lw.read_rows(folder / "diagnostics.jsonl")]
    found["done"] = (folder / "DONE").exists()
    return found


def assert_same(folder: Path, whole: Path) -> None:
    """``folder`` ended exactly as ``whole`` did."""
    mine, wanted = outcome(folder), outcome(whole)
    assert {"newest/bridge.safetensors", "newest/optimizer.safetensors", "best/bridge.safetensors"} <= wanted.keys()
    rows = itertools.zip_longest(mine["log"], wanted["log"])
    assert [pair for pair in rows if pair[0] != pair[1]][:3] == []
    assert [key for key in wanted if mine.get(key) != wanted[key]] == []
    assert mine.keys() == wanted.keys()


def leftovers(*folders: Path) -> list[str]:
    """Files and folders that only an unfinished save leaves behind."""
    found = [path for folder in folders if folder.exists() for path in folder.rglob("*")]
    return [
        str(p)
        for p in found
        if (p.name.startswith(".") and p.suffix != ".lock") or any(m in p.name for m in ("tmp", "partial", ".old"))
    ]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[lw.Trainer], None]) -> None:
    """Do ``act`` right after training's step ``step``, before it is logged or saved."""
    plain = lw.Trainer.step

    def stepping(self: lw.Trainer) -> dict[str, float]:
        row = plain(self)
        if self.progress.step == step:
            act(self)
        return row

    monkeypatch.setattr(lw.Trainer, "step", stepping)


def interrupted(folder: Path, step: int, *flags: str) -> None:
    """The small run, stopped by SIGTERM at ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(lw.Interrupted):
            train(folder, *flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run without any interruption. Read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, stopped at step 8. Read-only."""
    folder = tmp_path_factory.mktemp("half") / "run"
    interrupted(folder, 8)
    return folder


@pytest.fixture
def half(half_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that stopped at step 8."""
    return Path(shutil.copytree(half_run, tmp_path / "half", symlinks=True))


@pytest.fixture
def ended(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that does not know yet that it is done."""
    folder = Path(shutil.copytree(whole, tmp_path / "ended", symlinks=True))
    (folder / "DONE").unlink()
    return folder


# ---- processes that are killed -------------------------------------------------------------------------------------


def forked(work: Callable[[], int | None], log: Path) -> int:
    """Start ``work`` in a process of its own, a copy of this one, which writes to ``log``; → its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        torch.set_num_threads(1)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def exit_code(pid: int, patience: float = 120) -> int:
    """Wait for a process of ours; → its exit code, or minus the signal that killed it."""
    deadline = time.monotonic() + patience
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"process {pid} hung")
        time.sleep(0.005)


def die_inside(functions: list[tuple[Any, str]], number: int, note: Path, already: bool = False) -> None:
    """This process kills itself at its ``number``-th call that changes the disk inside ``functions``, noted in ``note``.

    A file that is written at that moment is left half. ``already`` counts from now on, wherever it is.
    """
    inside, calls = [int(already)], [0]

    def entering(function: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **options: Any) -> Any:
            inside[0] += 1
            try:
                return function(*args, **options)
            finally:
                inside[0] -= 1

        return functools.wraps(function)(entered)

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            calls[0] += bool(inside[0])
            if inside[0] and calls[0] == number:
                if name == "write_bytes":
                    with open(args[0], "wb") as stream:
                        stream.write(args[1][: len(args[1]) // 2])
                with open(note, "w") as stream:
                    stream.write(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return called

    for owner, name in functions:
        setattr(owner, name, entering(getattr(owner, name)))
    for name in DISK_CALLS:
        setattr(os, name, dying(name, getattr(os, name)))
    Path.write_bytes = dying("write_bytes", Path.write_bytes)  # type: ignore[method-assign]


def deaths(home: Path, work: Callable[[int, Path], None]) -> Iterator[tuple[int, str]]:
    """Fork ``work(number, note)``, which dies at its ``number``-th call, for 1, 2, … until one lives on.

    → (number, the call it died at), after each.
    """
    number, died = 0, True
    while died:
        number += 1
        note, log = home / f"note{number}", home / f"log{number}"
        code = exit_code(forked(functools.partial(work, number, note), log))
        died = note.exists()
        assert code == (-9 if died else 0), log.read_text()
        yield number, note.read_text() if died else "the end"


SAVES: list[tuple[Any, str]] = [(lw.Trainer, "save"), (lw.Trainer, "save_best")]
STARTS: list[tuple[Any, str]] = [(lw.Run, "start"), (lw.Trainer, "restore")]


def mark_first_step(mark: Path) -> None:
    """This process makes the file ``mark`` when its training begins."""
    plain = lw.Trainer.step

    def stepping(self: lw.Trainer) -> dict[str, float]:
        mark.touch()
        return plain(self)

    lw.Trainer.step = stepping  # type: ignore[method-assign]


class Torture:
    """One command, started again and again; every start dies of something else."""

    def __init__(self, home: Path) -> None:
        self.home, self.attempts, self.counts = home, 0, dict.fromkeys(("kill", "in a save", "in caching", "exec"), 0)
        self.counts |= dict.fromkeys(("SIGTERM", "SIGUSR1", "SIGINT"), 0)
        self.plugin = home / "groups.py"  # several groups of sender states, so that a kill can come between them
        self.plugin.write_text(
            "import LATENTWIRE as lw\nplain = lw.by_length\nlw.by_length = lambda rows, tokens: plain(rows, 64)\n"
        )

    def words(self, folder: Path) -> list[str]:
        often = ["--steps", "350", "--eval_every", "7", "--checkpoint_interval", "0.2", "--auto_resume"]
        return ["train", *TOY, *SMALL, *often, "--plugin", str(self.plugin), "--output_dir", str(folder)]

    def start(self, folder: Path, prepare: Callable[[], None] = lambda: None) -> tuple[int, Path, Path]:
        """A forked process with ``prepare`` done in it; → its id, its mark of the first step, its log."""
        self.attempts += 1
        mark, log = self.home / f"mark{self.attempts}", self.home / f"log{self.attempts}"

        def work() -> int:
            mark_first_step(mark)
            prepare()
            return lw.main(self.words(folder))

        return forked(work, log), mark, log

    def attempt(self, folder: Path, kind: str, value: Any) -> bool:
        """One start of the command with one fault; → whether the fault struck before the run was over."""
        note = self.home / f"note{self.attempts}"
        if kind == "exec":
            with (self.home / f"exec{self.attempts}").open("w") as log:
                self.attempts += 1
                command = [sys.executable, str(ROOT / "LATENTWIRE.py"), *self.words(folder)]
                process = subprocess.Popen(command, stdout=log, stderr=log)
                time.sleep(value)
                process.kill()
                return self.struck("exec", process.wait(), 9, Path(log.name))
        if kind in ("in a save", "in caching"):
            places = SAVES if kind == "in a save" else [(lw, "collect_states")]
            pid, _, log = self.start(folder, lambda: die_inside(places, value, note))
            code = exit_code(pid)
            assert note.exists() == (code == -9), log.read_text()
            return self.struck(kind, code, 9, log)
        pid, mark, log = self.start(folder)
        number, delay, in_training = value
        deadline = time.monotonic() + 60
        while in_training and not mark.exists() and time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # over before it began
                break
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pid, number)
        code = exit_code(pid)
        if number != signal.SIGKILL and in_training and code:
            assert code == 128 + number and "stopped at step" in log.read_text(), (code, log.read_text())
        return self.struck(kind, code, number, log)

    def struck(self, kind: str, code: int, number: int, log: Path) -> bool:
        text = log.read_text()
        assert code in (0, -number, 128 + number), f"{kind}: exit code {code}\n{text}"
        assert "Traceback" not in text or code == 130, text  # Ctrl-C before main() is Python's own
        self.counts[kind] += code != 0
        return code != 0


def faults(seed: int) -> list[tuple[str, Any]]:
    """What happens to each start: first in caching, then everywhere."""
    rng = random.Random(seed)
    first = [("in caching", number) for number in (2, 5, 8, 11)]
    rest: list[tuple[str, Any]] = [("exec", rng.uniform(0, 4)) for _ in range(3)]
    rest += [("kill", (signal.SIGKILL, rng.uniform(0, 1.2), False)) for _ in range(5)]
    rest += [("kill", (signal.SIGKILL, rng.uniform(0, 0.4), True)) for _ in range(4)]
    rest += [("in a save", rng.randint(1, 45)) for _ in range(12)]
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        number = getattr(signal, name)
        rest += [(name, (number, rng.uniform(0, 0.3), True)) for _ in range(4)]
        rest.append((name, (number, rng.uniform(0, 0.6), False)))
    rng.shuffle(rest)
    return first + rest


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    for name in ("tiny-llama", "tiny-qwen"):  # what takes seconds to import, every fork has from here
        lw.load_lm(name, lw.TrainSettings(device="cpu", dtype="float32"))
    torture = Torture(tmp_path)
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache-whole"))
    pid, _, log = torture.start(tmp_path / "whole")
    assert exit_code(pid) == 0, log.read_text()
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    queue, runs = faults(seed=7), [tmp_path / "run0"]
    while queue:
        kind, value = queue[0]
        if torture.attempt(runs[-1], kind, value):
            queue.pop(0)
            continue
        log = sorted(tmp_path.glob("log*"), key=lambda path: path.stat().st_mtime)[-1]
        assert (runs[-1] / "DONE").exists(), log.read_text()  # over before the fault came: it strikes the next run
        runs.append(tmp_path / f"run{len(runs)}")
        if kind == "in caching":
            queue.pop(0)  # the store is there by now
    pid, _, log = torture.start(runs[-1])
    assert exit_code(pid) == 0, log.read_text()
    for run in runs:
        assert_same(run, tmp_path / "whole")
        steps = [row["step"] for row in lw.read_rows(run / "diagnostics.jsonl")]
        assert steps == list(range(1, 351))
        for path in lw.Checkpoints(run / "checkpoint").steps():
            lw.load_checkpoint(path)
    assert leftovers(*runs, tmp_path / "cache" / "states") == []
    stores = [contents(tmp_path / name / "states") for name in ("cache", "cache-whole")]
    # one that is killed while it holds a lock, of a store that is complete by then, leaves an empty file that nobody waits for
    locks = {name for name in stores[0] if name.endswith(".lock")}
    assert {name: data for name, data in stores[0].items() if name not in locks} == stores[1]
    assert not any(stores[0][name] for name in locks)
    counts = torture.counts
    with capsys.disabled():
        print(f"\n{torture.attempts} starts of {len(runs)} run(s), ended by: {counts}")
    assert sum(counts[kind] for kind in ("kill", "in a save", "in caching", "exec")) >= 20
    assert counts["in a save"] >= 8 and counts["in caching"] >= 2 and counts["exec"] >= 2
    assert sum(counts[name] for name in ("SIGTERM", "SIGUSR1", "SIGINT")) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "places", "validation_rows"),
    [(0, STARTS, 48), (2, STARTS, 48), (2, SAVES, 48), (2, SAVES, 0)],
    ids=["start", "resume", "last saves", "last saves without validation"],
)
def test_a_kill_at_every_single_disk_call(begun, places, validation_rows, tmp_path, monkeypatch):
    """Every call, one after the other, in a run of three steps that keeps one checkpoint and finds each the best."""
    flags = ["--steps", "3", "--eval_every", "1", "--keep_checkpoints", "1", "--val_samples", str(validation_rows)]
    monkeypatch.setattr(lw.Trainer, "validate", lambda self: {"val_loss": -self.progress.step})
    train(tmp_path / "whole", *flags)
    if begun:
        interrupted(tmp_path / "begun", begun, *flags)

    def work(number: int, note: Path) -> None:
        run = tmp_path / f"run{number}"
        if begun:
            shutil.copytree(tmp_path / "begun", run, symlinks=True)
        die_inside(places, number, note)
        train(run, *flags, "--auto_resume")

    for at in deaths(tmp_path, work):
        number = at[0]
        run = tmp_path / f"run{number}"
        if begun and validation_rows:
            copy = Path(shutil.copytree(run, tmp_path / f"copy{number}", symlinks=True))
            assert lw.resolve_checkpoint(copy).name == "best", at
            assert lw.open_bridge(lw.resolve_checkpoint(copy))[0].fingerprint(), at
        train(run, *flags, "--auto_resume")
        assert_same(run, tmp_path / "whole")
        assert leftovers(run) == [], at
        assert [path.name for path in lw.Checkpoints(run / "checkpoint").steps()] == ["step-00000003"], at
        shutil.rmtree(run)
    assert number > (15 if places is SAVES else 3)


# ---- damaged checkpoints -------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut": lambda folder: cut(folder / "bridge.safetensors"),
    "weights flipped": lambda folder: flip(folder / "bridge.safetensors"),
    "optimizer cut": lambda folder: cut(folder / "optimizer.safetensors"),
    "optimizer flipped": lambda folder: flip(folder / "optimizer.safetensors"),
    "optimizer gone": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "state cut": lambda folder: cut(folder / "state.json"),
    "state gone": lambda folder: (folder / "state.json").unlink(),
    "state a list": lambda folder: (folder / "state.json").write_text("[]"),
    "empty folder": emptied,
}


@pytest.mark.trains
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, ended, whole):
    DAMAGE[damage](ended / "checkpoint" / "step-00000012")
    report = train(ended, "--resume")
    assert report.heard("step-00000012", "corrupt", "going back to the one before"), report.said
    assert report.heard("resuming at step 9 of 12")
    assert_same(ended, whole)


@pytest.mark.trains
def test_no_whole_checkpoint_is_one_line(ended):
    for path in lw.Checkpoints(ended / "checkpoint").steps():
        cut(path / "bridge.safetensors")
    with pytest.raises(lw.LatentWireError, match=r"no checkpoint in .* is whole; start anew") as refused:
        train(ended, "--resume")
    assert "\n" not in str(refused.value)


@pytest.mark.trains
@pytest.mark.parametrize("keep", [1, 2])
def test_as_many_checkpoints_as_asked_and_the_best_beside_them(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(lw.Trainer, "validate", lambda self: {"val_loss": float(self.progress.step)})  # 1 is the best
    flags = ["--steps", "6", "--eval_every", "1", "--keep_checkpoints", str(keep)]
    train(tmp_path / "run", *flags)
    checkpoints = lw.Checkpoints(tmp_path / "run" / "checkpoint")
    assert [path.name for path in checkpoints.steps()] == [f"step-{6 - i:08d}" for i in range(keep)]
    tensors, state = lw.load_checkpoint(checkpoints.best)
    assert state["progress"]["step"] == 1 and set(tensors) == {"bridge"}
    assert set(lw.load_checkpoint(checkpoints.steps()[0])[0]) == {"bridge", "optimizer"}


# ---- how to go on --------------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("spelling", ["", "preempt_checkpoint", "checkpoint", "checkpoint/step-00000008"])
def test_resume_with_a_path_needs_nothing_else(spelling, half, whole):
    assert (half / "preempt_checkpoint" / "step-00000008" / "state.json").is_file()
    summary = lw.train_main(["--resume", str(half / spelling)])
    assert Path(summary["run"]) == half
    assert_same(half, whole)


@pytest.mark.trains
def test_resume_with_a_path_from_inside_the_run(half, whole, monkeypatch):
    monkeypatch.chdir(half)
    lw.train_main(["--resume", "preempt_checkpoint"])
    assert_same(half, whole)


def test_resume_with_a_path_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(lw.LatentWireError, match=r"--resume .*nowhere: no run there"):
        lw.train_main(["--resume", str(tmp_path / "nowhere")])


@pytest.mark.trains
def test_auto_resume_starts_and_goes_on_and_resume_does_not_start(tmp_path, whole):
    folder = tmp_path / "run"
    with pytest.raises(lw.LatentWireError, match="nothing to resume"):
        train(folder, "--resume")
    assert not folder.exists()
    interrupted(folder, 5, "--auto_resume")
    report = train(folder, "--auto_resume")
    assert report.heard("resuming at step 5 of 12")
    assert_same(folder, whole)
    assert train(folder, "--auto_resume").heard("finished already")


@pytest.mark.trains
def test_a_kill_before_the_first_checkpoint_starts_from_the_beginning(tmp_path, whole):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, lambda trainer: 1 / 0)  # an end without any save
        with pytest.raises(ZeroDivisionError):
            train(folder)
    assert not lw.Checkpoints(folder / "checkpoint").steps() and (folder / "diagnostics.jsonl").exists()
    train(folder, "--resume")
    assert_same(folder, whole)


@pytest.mark.trains
def test_a_step_whose_validation_was_stopped_is_logged_once(tmp_path, whole):
    """J11: the log had its row twice when the save after the validation that was done anew was killed."""
    folder = tmp_path / "run"
    stopped_in_validation(6, *TOY, *SMALL, *LENGTH, "--output_dir", str(folder))
    assert [row["step"] for row in lw.read_rows(folder / "diagnostics.jsonl")] == [1, 2, 3, 4, 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw.Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder, "--resume")
    assert lw.read_rows(folder / "diagnostics.jsonl")[-1]["step"] == 6
    assert train(folder, "--resume").heard("resuming at step 6 of 12")
    assert_same(folder, whole)


@pytest.mark.trains
@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("lr", "0.5", "lr 0.0005 there, 0.5 now"),
        ("seed", "7", "seed 42 there, 7 now"),
        ("batch_size", "16", "batch_size 8 there, 16 now"),
        ("latent_len", "3", "latent_len 8 there, 3 now"),
        ("eval_every", "4", "eval_every 3 there, 4 now"),
        ("receiver", "tiny-gemma", "receiver 'tiny-qwen' there, 'tiny-gemma' now"),
        ("load_in_8bit", "yes", "load_in_8bit False there, True now"),
        ("steps", "9", "steps 12 there, 9 now"),
    ],
)
def test_what_determines_the_result_must_not_differ(flag, value, told, half):
    before = contents(half)
    with pytest.raises(lw.LatentWireError, match="holds a different run") as refused:
        train(half, "--resume", f"--{flag}", value)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert contents(half) == before


EXECUTION: dict[str, list[str]] = {
    "data_dir": ["."], "offline": ["yes"], "device": ["auto"], "sender_device": ["cpu"], "receiver_device": ["cpu:0"],
    "device_map": ["auto"], "bf16": ["no"], "fp16": ["no"], "resume": ["yes"], "auto_resume": ["yes"],
    "checkpoint_interval": ["0"], "keep_checkpoints": ["1"], "world_size": ["1"], "gradient_checkpointing": ["yes"],
    "optimizer_offload": ["yes"], "log_every": ["1"], "state_cache": ["memory"], "num_dataloader_workers": ["2"],
    "dataloader_pin_memory": ["yes"], "use_optimized_dataloader": ["yes"],
    "tag": ["x"], "eval_samples": ["7"], "eval_seeds": ["1"], "log_shapes": ["yes"], "profile": ["yes"], "profile_memory": ["yes"],
}  # fmt: skip
"""Every setting that only says how to run, with another value than the run began with."""


def test_every_execution_setting_is_tried_below():
    known = {name for name in lw.TrainSettings.fields() if lw.TrainSettings.extras(name)["execution"]}
    assert known - EXECUTION.keys() == {
        "output_dir",
        "seeds",
        "track",
        "debug",
        "plugin",
        "trust_remote_code",
    }  # the folder differs anyway; seeds are many; plug-ins and trust have tests of their own
    # runs; the last two write more rows or elsewhere: tests of their own


@pytest.mark.trains
@pytest.mark.parametrize("name", EXECUTION)
@pytest.mark.slow
def test_what_only_says_how_to_run_may_differ_and_changes_no_bit(name, half, whole):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("auto is CUDA here")
    report = train(half, "--resume", f"--{name}", *EXECUTION[name])
    assert report.heard("resuming at step 8 of 12")
    assert_same(half, whole)


@pytest.mark.trains
def test_more_steps_go_on_with_the_same_rows_and_fewer_are_refused(ended, monkeypatch):
    (ended / "DONE").touch()
    before = json.loads((ended / "checkpoint" / "step-00000012" / "state.json").read_text())["task"]
    assert before["train_rows"] == 12 * 8  # more steps would take more rows, were they asked for at the start
    with pytest.raises(lw.LatentWireError, match="add --resume to go on to the new length"):
        train(ended, "--steps", "20")
    running: list[bool] = []
    stop_at(monkeypatch, 13, lambda trainer: running.append((ended / "DONE").exists()))
    report = train(ended, "--steps", "20", "--resume")
    assert report.heard("grows from 12 to 20 steps") and running == [False]
    assert (ended / "DONE").exists()
    assert [row["step"] for row in lw.read_rows(ended / "diagnostics.jsonl")] == list(range(1, 21))
    assert json.loads((ended / "checkpoint" / "step-00000020" / "state.json").read_text())["task"] == before
    for fewer in ("19", "13"):
        with pytest.raises(lw.LatentWireError, match="steps can only grow"):
            train(ended, "--steps", fewer, "--resume")
    with pytest.raises(lw.LatentWireError, match="steps 12 there, 5 now"):
        train(ended, "--steps", "5", "--resume")
    assert train(ended, "--resume").heard("finished already")  # the first command again


@pytest.mark.trains
def test_a_longer_run_that_is_interrupted_never_shrinks_silently(ended):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 14, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(lw.Interrupted):
            train(ended, "--steps", "20", "--resume")
    with pytest.raises(lw.LatentWireError, match="steps can only grow"):
        train(ended, "--steps", "15", "--resume")
    train(ended, "--steps", "20", "--resume")
    assert lw.read_rows(ended / "diagnostics.jsonl")[-1]["step"] == 20


@pytest.mark.trains
def test_a_longer_run_that_was_stopped_is_finished_nowhere(ended):
    """U6: a copy of its best checkpoint called itself finished, and the command to go on was refused."""
    assert lw.load_checkpoint(ended / "checkpoint" / "best")[1]["finished"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 13, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(lw.Interrupted):
            train(ended, "--steps", "20", "--resume")
    state = lw.load_checkpoint(ended / "checkpoint" / "best")[1]
    assert not state["finished"]
    told = lw.unfinished(lw.Checkpoint(ended / "checkpoint" / "best", {}, state))
    assert told.startswith("training stopped at step 13 of 20 (") and told.endswith(" --steps 20)")


@pytest.mark.trains
def test_a_run_whose_best_is_damaged_can_grow(ended):
    """U6: rewriting the best of a run that grows must not end it where that cannot be read."""
    (ended / "checkpoint" / "best" / "state.json").write_text("{")
    train(ended, "--steps", "20", "--resume")
    assert lw.load_checkpoint(ended / "checkpoint" / "best")[1]["finished"]


def stopped_in_validation(step: int, *words: str) -> None:
    """A training that SIGTERM stops in the validation after ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        plain = lw.Trainer.validation_sums

        def told(self: lw.Trainer, size: int) -> dict[str, float]:
            if self.progress.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, size)

        patch.setattr(lw.Trainer, "validation_sums", told)
        with pytest.raises(lw.Interrupted):
            lw.train_main([*words], Listening())


@pytest.mark.trains
def test_a_stopped_validation_is_due_though_the_run_grows(tmp_path):
    """J11: the new length had its validations elsewhere, and the same row was logged for ever."""
    words = [*TOY, *SMALL, "--output_dir", str(tmp_path / "run")]
    stopped_in_validation(3, *words, "--steps", "30")
    lw.train_main([*words, "--steps", "50", "--resume"], Listening())
    rows = lw.read_rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 51))
    assert [row["step"] for row in rows if "val_loss" in row] == [3, *range(5, 51, 5)]


@pytest.mark.trains
def test_a_validation_done_anew_rounds_as_the_first_one(tmp_path):
    """J11: --quantize_from is a matter of the step, whether a step of training came before or not."""
    words = [*TOY, *SMALL, *LENGTH, "--quantize_from", "0.3", "--codec", "int4", "--output_dir"]
    lw.train_main([*words, str(tmp_path / "whole")], Listening())
    stopped_in_validation(9, *words, str(tmp_path / "run"))
    lw.train_main([*words, str(tmp_path / "run"), "--resume"], Listening())
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.trains
def test_the_best_of_steps_that_were_lost_is_not_kept(tmp_path, whole):
    """A kill between saving the best and saving the step; going on, those steps may turn out otherwise."""
    folder = tmp_path / "run"
    save = lw.Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw.Checkpoints, "save", lambda self, step, *rest: save(self, step, *rest) if step < 6 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder)
    assert lw.load_checkpoint(folder / "checkpoint" / "best")[1]["progress"]["step"] == 6
    interrupted(folder, 4, "--resume")
    state = lw.load_checkpoint(lw.Checkpoints(folder / "checkpoint").steps()[0])[1]
    assert state["progress"]["step"] == 4 and state["progress"]["best_step"] == 0
    train(folder, "--resume")
    assert_same(folder, whole)


@pytest.mark.trains
def test_a_changed_source_file_is_told(half, monkeypatch):
    plain = lw.sha256_of
    assert not train(Path(shutil.copytree(half, f"{half}2", symlinks=True)), "--resume").heard("warning")
    monkeypatch.setattr(lw, "sha256_of", lambda path: "0" * 64 if path == Path(lw.__file__) else plain(path))
    assert train(half, "--resume").heard("warning: LATENTWIRE.py changed since step 8", "source.py")


@pytest.mark.trains
def test_a_second_process_in_the_same_folder_is_refused(half, whole, tmp_path):
    ready, log = tmp_path / "ready", tmp_path / "log"

    def first() -> None:
        def wait(trainer: lw.Trainer) -> None:
            ready.touch()
            time.sleep(600)

        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 9, wait)
            train(half, "--resume")

    pid = forked(first, log)
    try:
        while not ready.exists():
            assert not os.waitpid(pid, os.WNOHANG)[0], log.read_text()
            time.sleep(0.01)
        with pytest.raises(lw.LatentWireError, match=r"another process is working in .*; wait, stop it") as refused:
            train(half, "--resume")
        assert "\n" not in str(refused.value)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    train(half, "--resume")  # the lock went with the process
    assert_same(half, whole)


@pytest.mark.trains
def test_a_clock_that_jumps_changes_nothing(tmp_path, whole, monkeypatch):
    plain, jumped, saves = time.time, [0.0], []
    save = lw.Checkpoints.save
    monkeypatch.setattr(time, "time", lambda: plain() + jumped[0])
    monkeypatch.setattr(lw.Checkpoints, "save", lambda self, step, *rest: (saves.append(step), save(self, step, *rest)))
    stop_at(monkeypatch, 4, lambda trainer: jumped.__setitem__(0, -1e9))
    stop_at(monkeypatch, 8, lambda trainer: jumped.__setitem__(0, 1e9))
    train(tmp_path / "run", "--checkpoint_interval", "0")
    assert saves == list(range(1, 13))
    assert_same(tmp_path / "run", whole)
    seconds = [row["seconds"] for row in lw.read_rows(tmp_path / "run" / "diagnostics.jsonl")]
    assert seconds == sorted(seconds) and seconds[-1] < 60


# ---- folders that go, disks that fill ------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("step", [7, 9, 12])
def test_checkpoints_deleted_meanwhile_cost_one_line(step, tmp_path, monkeypatch, whole):
    folder = tmp_path / "run"
    stop_at(monkeypatch, step, lambda trainer: shutil.rmtree(folder / "checkpoint"))
    report = train(folder)
    assert sum("deleted meanwhile" in line for line in report.said) <= 1
    assert (folder / "DONE").exists()
    newest = outcome(folder)
    wanted = outcome(whole)
    assert newest["newest/bridge.safetensors"] == wanted["newest/bridge.safetensors"]
    assert lw.open_bridge(folder / "checkpoint" / "best")[0].fingerprint()


@pytest.mark.trains
@pytest.mark.parametrize("step", [7, 3, 6, 12])
def test_a_run_folder_deleted_meanwhile_is_one_line(step, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stop_at(monkeypatch, step, lambda trainer: shutil.rmtree(folder))
    assert lw.main(["train", *TOY, *SMALL, *LENGTH, "--output_dir", str(folder)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and str(folder) in errors
    assert not (folder / "DONE").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root mounts a disk")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """No byte is left."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while stream.write(b"x" * size) == size:
                    pass


def remounted(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


TROUBLE: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], str]] = {
    "full": (fill, lambda disk: (disk / "filler").unlink(), "No space left on device"),
    "read-only": (lambda disk: remounted(disk, "ro"), lambda disk: remounted(disk, "rw"), "Read-only file system"),
}


@pytest.mark.trains
@pytest.mark.parametrize(("trouble", "step"), [("full", 7), ("full", 9), ("read-only", 9)])  # 7 is logged, 9 saved
def test_a_disk_in_trouble_is_one_line_and_costs_nothing_saved(trouble, step, tiny_disk, whole, monkeypatch, capsys):
    begin, end, reason = TROUBLE[trouble]
    folder = tiny_disk / "run"
    words = ["train", *TOY, *SMALL, *LENGTH, "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, lambda trainer: begin(tiny_disk))
        assert lw.main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot write ") and errors.count("\n") == 1
    assert reason in errors and "what was saved before is kept" in errors
    newest = lw.Checkpoints(folder / "checkpoint").steps()[0]
    assert newest.name == "step-00000006" and lw.load_checkpoint(newest)
    assert lw.open_bridge(folder / "checkpoint" / "best")[0].fingerprint()
    assert lw.main([*words, "--resume"]) == 2  # still in trouble: still one line
    assert capsys.readouterr().err.count("\n") == 1
    end(tiny_disk)
    assert lw.main([*words, "--resume"]) == 0
    assert_same(folder, whole)
    assert leftovers(folder) == []


# ---- sender states -------------------------------------------------------------------------------------------------


@pytest.fixture
def caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., lw.StateStore], list[int]]:
    """Collects the states of 40 texts in groups of few; and counts the rows that the sender read."""
    plain, states, read = lw.by_length, lw.LM.states, []
    lm = lw.load_lm("tiny-llama", lw.TrainSettings(dataset="toy", device="cpu", dtype="float32"))
    texts = [letter * length for letter in "abcd" for length in range(1, 11)]

    def counting(self: lw.LM, rows: Any, layers: Any) -> lw.States:
        read.append(len(rows))
        return states(self, rows, layers)

    monkeypatch.setattr(lw, "by_length", lambda rows, tokens: plain(rows, 40))
    monkeypatch.setattr(lw.LM, "states", counting)

    def collect(cache: str, tick: Callable[[int, int], None] = lambda done, total: None) -> lw.StateStore:
        monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / cache))
        return lw.collect_states(lm, texts, [0, 1], 64, "disk", tick, tmp_path / "owner")

    return collect, read


def states_of(tmp_path: Path, cache: str) -> dict[str, bytes]:
    found = contents(tmp_path / cache / "states")
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


@pytest.mark.parametrize("groups", [1, 4])
def test_states_that_a_killed_process_had_done_are_not_done_again(groups, caching, tmp_path):
    collect, read = caching
    collect("whole")
    total, first = sum(read), sum(read[:groups])
    read.clear()

    def killed() -> None:
        ticking = iter(range(0, 10**6, 11))
        lw.time.monotonic = lambda: float(next(ticking))  # marks are made every ten seconds: here after every group
        count = [0]
        mark = lw.mark_done

        def marking(states: Any, done: Any, fresh: list[int]) -> float:
            now = mark(states, done, fresh)
            count[0] += 1
            if count[0] == groups:
                os.kill(os.getpid(), signal.SIGKILL)
            return now

        lw.mark_done = marking
        collect("cut")

    assert exit_code(forked(killed, tmp_path / "log")) == -9
    assert len(leftovers(tmp_path / "cut")) == 1
    collect("cut")
    assert sum(read) == total - first
    assert states_of(tmp_path, "cut") == states_of(tmp_path, "whole")
    assert leftovers(tmp_path / "cut") == []
    read.clear()
    collect("cut")
    assert read == []


def test_a_signal_while_caching_loses_nothing(caching, tmp_path):
    collect, read = caching
    collect("whole")
    total = sum(read)
    read.clear()

    def stop(done: int, count: int) -> None:
        if done == 3:
            raise lw.Interrupted(tmp_path, "the sender states", signal.SIGTERM)

    with pytest.raises(lw.Interrupted):
        collect("cut", stop)
    before = sum(read)
    collect("cut")
    assert 0 < before < sum(read) == total
    assert states_of(tmp_path, "cut") == states_of(tmp_path, "whole")


def test_a_kill_at_every_single_disk_call_of_caching(caching, tmp_path):
    """Whatever the moment: the next attempt finishes the same store, computes what is missing, and leaves nothing else."""
    collect, _ = caching
    collect("whole")

    def work(number: int, note: Path) -> None:
        die_inside([(lw, "collect_states")], number, note)
        collect("cut")

    for number, at in deaths(tmp_path, work):
        collect("cut")
        assert states_of(tmp_path, "cut") == states_of(tmp_path, "whole"), (number, at)
        assert leftovers(tmp_path / "cut") == [], (number, at)
        shutil.rmtree(tmp_path / "cut")
    assert number > 6


def test_states_that_were_all_computed_are_never_computed_again(caching, tmp_path):
    """Killed at any call after the last mark: only the bookkeeping is left to do."""
    collect, read = caching
    collect("whole")

    def work(number: int, note: Path) -> None:
        mark = lw.mark_done

        def marked(states: Any, done: Any, fresh: list[int]) -> float:
            now = mark(states, done, fresh)
            die_inside([], number, note, already=True)
            return now

        lw.mark_done = marked
        collect("cut")

    for number, _ in deaths(tmp_path, work):
        read.clear()
        collect("cut")
        assert read == [], number
        shutil.rmtree(tmp_path / "cut")
    assert number > 3


@pytest.mark.trains
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_training_caches_stops_and_goes_on(number, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    states = lw.LM.states

    def signalled(self: lw.LM, rows: Any, layers: Any) -> lw.States:
        os.kill(os.getpid(), number)
        return states(self, rows, layers)

    folder = tmp_path / "run"
    words = ["train", *TOY, *SMALL, *LENGTH, "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw.LM, "states", signalled)
        assert lw.main(words) == 128 + number
    assert "stopped at the sender states" in capsys.readouterr().err
    assert lw.main([*words, "--resume"]) == 0
    assert_same(folder, whole)
    assert leftovers(folder, tmp_path / "cache" / "states") == []


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.trains
def test_an_evaluation_stopped_by_a_signal_goes_on_with_what_is_missing(toy_run, tmp_path, monkeypatch, capsys):
    words = ["eval", "--num_samples", "40", "--batch_size", "8", "--methods", "bridge,zero,text"]
    runs = {name: Path(shutil.copytree(toy_run, tmp_path / name, symlinks=True)) for name in ("whole", "cut")}
    plain, answered, stop_after = lw.Receiver.answers, [], [0]

    def counting(self: lw.Receiver, examples: Any, data: Any, text: bool = False) -> list[lw.Answer]:
        answered.append(len(examples))
        if len(answered) == stop_after[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, examples, data, text)

    monkeypatch.setattr(lw.Receiver, "answers", counting)
    assert lw.main([*words, "--checkpoint", str(runs["whole"])]) == 0
    assert sum(answered) == 3 * 40
    answered.clear()
    stop_after[0] = 7
    assert lw.main([*words, "--checkpoint", str(runs["cut"])]) == 143
    assert "go on with:" in capsys.readouterr().err
    assert not (runs["cut"] / "results.json").exists()
    kept = len(lw.read_rows(runs["cut"] / "records.jsonl"))
    assert kept == 6 * 8 and sum(answered) == 7 * 8  # the batch in work is lost
    stop_after[0] = 0
    assert lw.main([*words, "--checkpoint", str(runs["cut"])]) == 0
    assert sum(answered) == 3 * 40 + 8
    found = [json.loads((runs[name] / "results.json").read_text()) for name in ("whole", "cut")]
    for results in found:
        results.pop("provenance")
        for method in results["methods"].values():
            method.pop("seconds", None)
            method.pop("seconds_per_example", None)
            method["nll_per_token"] = round(method["nll_per_token"], 5)  # rows of other batches, on some processors
    assert alike(found[0]) == alike(found[1])
