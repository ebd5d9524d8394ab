"""Several processes, several devices, and memory that runs out: the same numbers, or one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY
from test_survival import LENGTH, SMALL, Listening, assert_same, interrupted
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent


def train(folder: Path, *flags: str) -> Listening:
    """The small run with the documents' batch of 32; → what it said."""
    report = Listening()
    length = ["--steps", "6", "--eval_every", "3"]
    lw.train_main([*TOY, *SMALL, "--batch_size", "32", *length, "--output_dir", str(folder), *flags], report)
    return report


def log(folder: Path) -> list[dict[str, Any]]:
    return lw.read_rows(folder / "diagnostics.jsonl")


def curve(folder: Path, *names: str) -> list[float]:
    """The numbers of a run, step by step."""
    wanted = names or ("loss", "grad_norm", "val_loss", "val_accuracy")
    return [row[name] for row in log(folder) for name in wanted if name in row]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``train``, in one piece with memory enough. Read-only."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder)
    return folder


# ---- several processes ---------------------------------------------------------------------------------------------

PLUGIN = """
import os, signal, time
from pathlib import Path
import LATENTWIRE as lw

rank, notes = os.environ.get("RANK", "0"), Path(os.environ["NOTES"])
groups, states, step, save = lw.by_length, lw.LM.states, lw.Trainer.step, lw.Checkpoints.save

def note(what, text):
    with (notes / what).open("a") as stream:
        stream.write(f"{text}\\n")

def counting(self, rows, layers):
    note(f"states{rank}", len(rows))
    return states(self, rows, layers)

def stepping(self):
    if os.environ.get("DIES") == f"{rank}:{self.progress.step + 1}":
        os.kill(os.getpid(), signal.SIGKILL)
    if "PAUSE" in os.environ and self.progress.step >= 5:
        note(f"waits{rank}", self.progress.step)
        time.sleep(float(os.environ["PAUSE"]))
    return step(self)

def saving(self, number, *rest):
    note(f"saves{rank}", number)
    save(self, number, *rest)

lw.by_length = lambda rows, tokens: groups(rows, 64)
lw.LM.states, lw.Trainer.step, lw.Checkpoints.save = counting, stepping, saving

compute, lw.EvalContext.patience = lw.compute_rows, 0

def computing(method, group, *rest):
    if group:
        note(f"batches{rank}", len(group))
    batches = len((notes / f"batches{rank}").read_text().split()) if group else 0
    if os.environ.get("DIES_EVALUATING") == f"{rank}:{batches}":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return compute(method, group, *rest)

lw.compute_rows = computing
"""


class Team:
    """Starts the same command in several processes, as torchrun does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.plugin = home / "watch.py"
        self.plugin.write_text(PLUGIN)

    def words(self, folder: Path, *flags: str) -> list[str]:
        if flags and flags[0] in ("eval", "baseline"):
            return [str(ROOT / "LATENTWIRE.py"), *flags, "--plugin", str(self.plugin), "--output_dir", str(folder)]
        own = ["--plugin", str(self.plugin), "--output_dir", str(folder), "--auto_resume"]
        length = ["--steps", "12", "--eval_every", "4"]
        return [str(ROOT / "LATENTWIRE.py"), "train", *TOY, *SMALL, *length, *own, *flags]

    def notes(self, folder: Path) -> Path:
        place = self.home / f"{folder.name}-notes"
        place.mkdir(exist_ok=True)
        return place

    def noted(self, folder: Path, what: str) -> list[int]:
        path = self.notes(folder) / what
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def start(self, folder: Path, size: int, *flags: str, **env: str) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        many = ["-m", "torch.distributed.run", "--nproc_per_node", str(size), "--master_addr", "127.0.0.1"]
        launcher = [*many, "--master_port", str(port)] if size > 1 else []
        cache = str(self.home / f"{folder.name}-cache")
        return subprocess.Popen(
            [sys.executable, *launcher, *self.words(folder, *flags)],
            env={**os.environ, "NOTES": str(self.notes(folder)), "LATENTWIRE_CACHE": cache, **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, folder: Path, size: int, *flags: str, **env: str) -> tuple[int, str]:
        process = self.start(folder, size, *flags, **env)
        try:
            text, _ = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise AssertionError(f"hung: {process.communicate()[0]}") from None
        return process.returncode, text


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    return Team(tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="module")
def together(team: Team) -> Path:
    """A run by two processes without interruption. Read-only."""
    folder = team.home / "together"
    code, text = team.run(folder, 2, "--world_size", "2")
    assert code == 0, text
    assert "2 processes share 8 rows per step" in text and text.count("resuming") == 0
    return folder


@pytest.fixture(scope="module")
def alone(team: Team) -> Path:
    """The same run by one process."""
    folder = team.home / "alone"
    code, text = team.run(folder, 1)
    assert code == 0, text
    return folder


def assert_close(folder: Path, other: Path) -> None:
    """The same loss curve up to rounding, with as many rows."""
    assert [row["step"] for row in log(folder)] == [row["step"] for row in log(other)] == list(range(1, 13))
    assert curve(folder) == pytest.approx(curve(other), rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(together, alone, team):
    settings = json.loads((together / "config.json").read_text())
    assert settings["dropout"] > 0
    assert_close(together, alone)
    assert (together / "DONE").exists()
    assert team.noted(together, "saves0") == [4, 8, 12] and team.noted(together, "saves1") == []


@pytest.mark.slow
def test_two_processes_share_the_sender_states(together, alone, team):
    shares = [sum(team.noted(together, f"states{rank}")) for rank in (0, 1)]
    whole = sum(team.noted(alone, "states0"))
    assert sum(shares) == whole and min(shares) > whole / 3


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_auto_resume_goes_on(together, team):
    folder = team.home / "died"
    started = time.monotonic()
    code, text = team.run(folder, 2, DIES="1:6")
    assert code != 0 and time.monotonic() - started < 150
    assert "error: process 0 of 2 lost the others" in text and "go on with --auto_resume" in text, text
    assert not (folder / "DONE").exists()
    newest = lw.Checkpoints(folder / "checkpoint").steps()[0]
    assert newest.name == "step-00000004" and lw.load_checkpoint(newest)
    code, text = team.run(folder, 2)
    assert code == 0 and text.count("resuming at step 4 of 12") == 1, text
    assert_same(folder, together)


@pytest.mark.slow
def test_a_signal_to_all_saves_once_and_one_process_goes_on_for_two(together, team):
    folder = team.home / "signalled"
    process = team.start(folder, 2, PAUSE="0.5")
    deadline = time.monotonic() + 180
    while not team.noted(folder, "waits1") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "stopped at step" in text and "lost the others" not in text, text
    stopped = log(folder)[-1]["step"]
    assert 5 <= stopped < 12 and not (folder / "DONE").exists()
    assert team.noted(folder, "saves0") == sorted({4, stopped, *([8] if stopped > 8 else [])})
    code, text = team.run(folder, 1)
    assert code == 0 and "1 process(es) go on where 2 worked: equal up to rounding" in text, text
    assert f"resuming at step {stopped} of 12" in text
    assert_close(folder, together)


@pytest.mark.slow
def test_several_seeds_by_the_same_processes(team):
    folder = team.home / "seeds"
    code, text = team.run(folder, 2, "--seeds", "1,2", "--steps", "4")
    assert code == 0 and text.count("2 processes share") == 2, text
    assert all((folder / f"seed{seed}" / "DONE").exists() for seed in (1, 2))


@pytest.mark.slow
def test_another_number_of_processes_than_asked_is_one_line(team):
    folder = team.home / "mismatch"
    code, text = team.run(folder, 2, "--world_size", "3")
    assert code != 0 and "error: --world_size 3, but 2 started; type: torchrun --nproc_per_node 3" in text
    assert "exitcode  : 2" in text and not folder.exists()


METHODS = "bridge,text,control:shuffled,control:zero,token_budget"
RIVALS = ("baseline", "zeroshot", "fewshot", "token_budget", "lora", *TOY, "--num_samples", "40", "--samples", "40",
          "--steps", "2", "--rival_tries", "1", "--batch_size", "8")  # fmt: skip


def evaluation(toy_run: Path) -> list[str]:
    return ["eval", "--checkpoint", str(toy_run), "--methods", METHODS, "--num_samples", "60", "--batch_size", "8"]


def timeless(folder: Path) -> list[str]:
    """The records' lines without the times and the sums over them."""
    rows = lw.read_rows(folder / "records.jsonl")
    return [json.dumps({name: value for name, value in row.items() if name not in ("seconds", "sum")}) for row in rows]


def alike(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same records, in any order: to the bit but for likelihoods, since rows that were left go on
    in other batches, and some CPUs add up another number of rows in another order."""
    rows = [
        sorted(map(json.loads, timeless(one)), key=lambda row: (row["method"], row["id"])) for one in (folder, other)
    ]
    found, wanted = ([[row.pop("nll_per_token"), *row.pop("scores")] for row in own] for own in rows)
    return rows[0] == rows[1] and found == [pytest.approx(row, abs=1e-4) for row in wanted]


@pytest.fixture(scope="module")
def evaluated(team: Team, toy_run: Path) -> Path:
    """An evaluation by one process. Read-only."""
    folder = team.home / "evaluated"
    code, text = team.run(folder, 1, *evaluation(toy_run))
    assert code == 0, text
    return folder


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(evaluated, team, toy_run):
    folder = team.home / "evaluated-together"
    code, text = team.run(folder, 2, *evaluation(toy_run))
    assert code == 0 and text.count("communication shown") == text.count("record key") == 1, text
    assert timeless(folder) == timeless(evaluated) and len(timeless(folder)) == 300
    assert [len(team.noted(folder, f"batches{rank}")) for rank in (0, 1)] == [20, 20]  # 8 batches of 5 methods
    alone, together = (json.loads((place / "results.json").read_text()) for place in (evaluated, folder))
    assert {key for key in alone if alone[key] != together[key]} <= {"seconds", "provenance"}


@pytest.mark.slow
def test_two_processes_run_the_rivals_as_one_does(team):
    alone, folder = team.home / "rivals", team.home / "rivals-together"
    codes = [team.run(place, size, *RIVALS) for place, size in ((alone, 1), (folder, 2))]
    assert [(code, "broken: lora" in text) for code, text in codes] == [(1, True), (1, True)], codes
    assert timeless(folder) == timeless(alone) and len(timeless(folder)) == 240
    assert (folder / "table.md").read_text() == (alone / "table.md").read_text()
    assert [len(team.noted(folder, f"batches{rank}")) for rank in (0, 1)] == [20, 10]  # lora's five are the leader's


@pytest.mark.slow
def test_a_process_that_dies_ends_the_evaluation_and_the_same_command_goes_on(evaluated, team, toy_run):
    folder = team.home / "evaluation-died"
    code, text = team.run(folder, 2, *evaluation(toy_run), DIES_EVALUATING="1:3")
    assert code != 0 and "error: process 0 of 2 lost the others" in text and "with the same command" in text, text
    assert timeless(folder) == timeless(evaluated)[:32] and not (folder / "results.json").exists()
    code, text = team.run(folder, 2, *evaluation(toy_run))
    assert code == 0 and alike(folder, evaluated), text


@pytest.mark.slow
def test_a_signal_ends_the_evaluation_of_all_processes_together(evaluated, team, toy_run):
    folder = team.home / "evaluation-signalled"
    process = team.start(folder, 2, *evaluation(toy_run), PAUSE="0.5")
    deadline = time.monotonic() + 180
    while len(team.noted(folder, "batches1")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=180)
    assert process.returncode != 0 and "lost the others" not in text, text
    assert text.count("stopped at") == 1 and "of 60 (evaluating" in text, text
    rows = timeless(folder)
    assert 32 <= len(rows) < 300 and rows == timeless(evaluated)[: len(rows)]
    code, text = team.run(folder, 1, *evaluation(toy_run))
    assert code == 0 and alike(folder, evaluated), text


def test_a_sender_short_of_memory_takes_fewer_texts_at_a_time(tmp_path, monkeypatch):
    lm, plain, tried = lw.load_lm("tiny-llama", lw.ModelSettings(device="cpu")), lw.LM.states, []
    texts = [f"text number {number}" for number in range(10)]

    def collected(limit: int) -> lw.StateStore:
        def states(self: lw.LM, rows: Any, layers: Any) -> lw.States:
            tried.append(len(rows))
            if len(rows) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(self, rows, layers)

        monkeypatch.setattr(lw.LM, "states", states)
        return lw.collect_states(lm, texts, [1], 64, "memory", lambda done, total: None)

    whole, small = collected(10), collected(3)
    assert torch.allclose(whole.flat, small.flat, atol=1e-5) and torch.equal(whole.offsets, small.offsets)
    assert tried == [10, 10, 5, 3, 2, 5, 3, 2]
    with pytest.raises(lw.LatentWireError, match="no memory for one text"):
        collected(0)


@pytest.mark.trains
def test_an_evaluation_short_of_memory_takes_fewer_rows_at_a_time(plain_run, tmp_path, monkeypatch):
    flags = ["--checkpoint", str(plain_run), "--methods", "bridge", "--num_samples", "30", "--output_dir"]
    whole = lw.eval_main([*flags, str(tmp_path / "whole")])
    plain, sizes = lw.Receiver.listen, []

    def limited(self: lw.Receiver, examples: Any, data: Any, text: bool) -> Any:
        sizes.append(len(examples))
        if len(examples) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, examples, data, text)

    monkeypatch.setattr(lw.Receiver, "listen", limited)
    small = lw.eval_main([*flags, str(tmp_path / "small")])
    assert sizes[0] > 8 and sum(size for size in sizes if size <= 8) >= 30
    assert small["methods"]["bridge"]["accuracy"] == whole["methods"]["bridge"]["accuracy"]


def test_quantised_models_are_other_models():
    lm = lw.load_lm("tiny-llama", lw.ModelSettings(device="cpu"))
    before = lm.identity()
    lm.model.is_loaded_in_4bit = True
    assert lm.identity() == before | {"bits": 4}


def test_more_processes_asked_than_started_is_one_line(tmp_path, capsys):
    assert lw.main(["train", *TOY, "--world_size", "2", "--output_dir", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --world_size 2, but 1 started") and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_shares_are_whole_and_equal():
    for size in (1, 2, 3, 7):
        shares = [lw.World(rank, size).share_of(range(32)) for rank in range(size)]
        assert [item for share in shares for item in share] == list(range(32))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- memory that runs out ------------------------------------------------------------------------------------------

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
SHORTAGES: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(CPU_MESSAGE),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError,
}


def limit_training(monkeypatch: pytest.MonkeyPatch, most: int, shortage: Callable[[], BaseException]) -> list[Any]:
    """Memory for ``most`` rows; it runs out late, when gradients have been added up already. → what was tried."""
    plain, tried = lw.Trainer.backward, []

    def limited(self: lw.Trainer, places: Any) -> dict[str, float]:
        tried.append(list(places))
        values = plain(self, places)
        if len(places) > most:
            raise shortage()
        return values

    monkeypatch.setattr(lw.Trainer, "backward", limited)
    monkeypatch.setattr(lw.gc, "collect", lambda: 0)  # takes long in a process that tests everything
    return tried


@pytest.mark.trains
@pytest.mark.parametrize("kind", SHORTAGES)
def test_out_of_memory_halves_the_rows_and_keeps_the_curve(kind, tmp_path, plain_run, monkeypatch):
    tried = limit_training(monkeypatch, 11, SHORTAGES[kind])
    report = train(tmp_path / "run")
    said = [line for line in report.said if "memory ran out" in line]
    assert said == [f"memory ran out with {n} rows at a time; going on with {n // 2}" for n in (32, 16)]
    assert [len(places) for places in tried[:6]] == [32, 16, 8, 8, 8, 8]
    assert all(len(places) == 8 for places in tried[2:])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dropout"] > 0
    assert curve(tmp_path / "run") == pytest.approx(curve(plain_run), rel=1e-4)
    state = lw.load_checkpoint(lw.Checkpoints(tmp_path / "run" / "checkpoint").steps()[0])[1]
    assert state["progress"]["micro"] == 8


@pytest.mark.trains
def test_other_errors_are_not_taken_for_a_shortage(tmp_path, monkeypatch):
    limit_training(monkeypatch, 11, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(tmp_path / "run")


@pytest.mark.trains
@pytest.mark.parametrize("size", ["32", "auto"])
def test_one_row_that_does_not_fit_is_one_line(size, tmp_path, monkeypatch):
    tried = limit_training(monkeypatch, 0, SHORTAGES["cpu"])
    with pytest.raises(lw.LatentWireError, match="one row at a time does not fit into memory; use --") as refused:
        train(tmp_path / "run", "--batch_size", size)
    assert "\n" not in str(refused.value) and len(tried[-1]) == 1


@pytest.mark.trains
def test_out_of_memory_in_validation_halves_its_own_rows(tmp_path, plain_run, monkeypatch):
    plain = lw.Trainer.hear

    def limited(self: lw.Trainer, examples: Any, *rest: Any) -> lw.ForwardContext:
        soft = plain(self, examples, *rest)
        if not self.bridge.training and len(examples) > 11:
            raise SHORTAGES["cpu"]()
        return soft

    monkeypatch.setattr(lw.Trainer, "hear", limited)
    report = train(tmp_path / "run")
    said = [line for line in report.said if "memory ran out" in line]
    assert said == [f"memory ran out with {n} rows at a time; going on with {n // 2}" for n in (64, 32, 16)]
    assert curve(tmp_path / "run") == pytest.approx(curve(plain_run), rel=1e-5)


@pytest.fixture
def uneven(tmp_path: Path) -> list[str]:
    """Flags for a file whose texts are of 1 to 60 letters."""
    rows = [f"{'abcd'[i // 60] * (i % 60 + 1)},{'no' if i % 3 else 'yes'}" for i in range(240)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return ["--dataset", str(tmp_path / "texts.csv")]


@pytest.mark.trains
def test_batch_size_auto_finds_the_most_rows_that_fit(uneven, tmp_path, monkeypatch):
    train(tmp_path / "plain", *uneven)
    tried = limit_training(monkeypatch, 11, SHORTAGES["cuda"])
    texts: list[list[str]] = []
    prompt = lw.Trainer.hear

    def noting(self: lw.Trainer, examples: Any, ear: int = 0, places: Any = (), *rest: Any) -> lw.ForwardContext:
        if places:
            texts.append([example.context for example in examples])
        return prompt(self, examples, ear, places, *rest)

    trainers: list[lw.Trainer] = []
    monkeypatch.setattr(lw.Trainer, "hear", noting)
    monkeypatch.setattr(lw.Trainer, "restore", lambda self: trainers.append(self))
    report = train(tmp_path / "auto", *uneven, "--batch_size", "auto")
    assert report.heard("--batch_size auto: 11 rows at a time, 32 per optimizer step")
    assert not report.heard("memory ran out")
    trials = [len(places) for places in tried]
    assert trials[0] == 32 and trials[: trials.index(11) + 1].count(11) == 1
    shown = {text for group in texts for text in group}
    longest = sorted(map(len, shown), reverse=True)[: len(set(texts[0]))]
    assert sorted(map(len, set(texts[0])), reverse=True) == longest and min(longest) > 40
    assert trials[-3:] == [11, 11, 10]  # a step of 32
    assert curve(tmp_path / "auto") == pytest.approx(curve(tmp_path / "plain"), rel=1e-4)
    for most in range(1, 33):
        monkeypatch.setattr(lw.Trainer, "backward", lambda self, places, most=most: places[most:] and oom())
        assert trainers[0].fitting() == most


def oom() -> None:
    raise SHORTAGES["cuda"]()


@pytest.mark.trains
def test_batch_size_auto_takes_all_rows_where_memory_is_enough(tmp_path, plain_run):
    report = train(tmp_path / "run", "--batch_size", "auto", "--effective_batch", "32")
    assert report.heard("--batch_size auto: 32 rows at a time, 32 per optimizer step")
    assert curve(tmp_path / "run") == curve(plain_run)


SHORT = """
import resource, sys
from pathlib import Path
import LATENTWIRE as lw

def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def then_limit(self):
    prepare(self)
    before = size("VmSize")
    self.backward(range(512))
    need = size("VmPeak") - before
    assert need > 50 * 2**20, need
    self.bridge.zero_grad()
    resource.setrlimit(resource.RLIMIT_AS, (before + need * 3 // 4, resource.RLIM_INFINITY))

class Loud(lw.Silent):
    def say(self, text):
        print(text)

prepare, lw.Trainer.prepare = lw.Trainer.prepare, then_limit
lw.train_main(sys.argv[1:], Loud())
"""
"""A training whose address space is limited to three quarters of what one whole batch needs beside what is there."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory in use is read from /proc")
def test_a_machine_whose_memory_really_runs_out(tmp_path):
    more = ["--batch_size", "512", "--steps", "2", "--width", "256", "--heads", "4", "--val_samples", "0"]
    flags = [*TOY, *SMALL, *more]
    lw.train_main([*flags, "--output_dir", str(tmp_path / "enough")])
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    found = subprocess.run(
        [sys.executable, "-c", SHORT, *flags, "--output_dir", str(tmp_path / "short")],
        env={**os.environ, **exact, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "memory ran out with 512 rows at a time; going on with 256" in found.stdout
    assert curve(tmp_path / "short") == pytest.approx(curve(tmp_path / "enough"), rel=1e-4)


# ---- several devices -----------------------------------------------------------------------------------------------


class Elsewhere(TorchFunctionMode):
    """Tensors asked to be on another device stay on the CPU but are known as that device's; mixing two devices raises.

    It proves that our Python, and the library's that it calls, never lets tensors of two devices meet in one call,
    as CUDA would demand; indexes and single numbers may come from the CPU there, and so here. It proves nothing about
    kernels, memory, or what autograd does inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Any, torch.device]] = {}
        self.seen: set[str] = set()

    def where(self, tensor: torch.Tensor) -> torch.device:
        reference, place = self.known.get(id(tensor), (lambda: None, torch.device("cpu")))
        return place if reference() is tensor else torch.device("cpu")

    def put(self, value: Any, place: torch.device) -> Any:
        """Note that every tensor in ``value`` is on ``place``."""
        for item in tree_flatten(value)[0]:
            if isinstance(item, torch.Tensor):
                self.known[id(item)] = (weakref.ref(item), place)
                self.seen.add(str(place))
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.where(args[0])
        if func == torch.Tensor.data.__set__:
            self.put(args[0], self.where(args[1]))
            return func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self.move(func, args, options)
        asked = options.get("device")
        if asked is not None:
            options["device"] = "cpu"
        items = [item for item in tree_flatten((args, options))[0] if isinstance(item, torch.Tensor)]
        places = {self.where(item) for item in items if item.dim()}
        name = getattr(func, "__name__", "")
        if (
            name in ("__getitem__", "__setitem__", "copy_", "index_put", "_has_compatible_shallow_copy_type")
            or "__get__" in name
        ):
            places = {self.where(args[0])}
        if len(places) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got {sorted(map(str, places))}"
            )
        place = torch.device(asked) if asked is not None else next(iter(places), torch.device("cpu"))
        return self.put(func(*args, **options), place)

    def move(self, func: Any, args: Any, options: dict[str, Any]) -> torch.Tensor:
        """``.to(...)`` and ``.cpu()``."""
        place = self.where(args[0])
        for item in (*args[1:], *options.values()):
            if isinstance(item, str | torch.device | torch.Tensor):
                place = self.where(item) if isinstance(item, torch.Tensor) else torch.device(item)
        place = torch.device("cpu") if func is torch.Tensor.cpu else place

        def here(item: Any) -> Any:
            return "cpu" if isinstance(item, str | torch.device) else getattr(item, "dtype", item)

        moved = func(args[0], *map(here, args[1:]), **{name: here(item) for name, item in options.items()})
        if moved is args[0] and place != self.where(args[0]):
            moved = args[0].clone()
        return self.put(moved, place)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    with Elsewhere() as mode:
        yield mode


def test_the_stand_in_for_a_second_device_refuses_what_cuda_refuses(elsewhere):
    here, there = torch.ones(3), torch.ones(3, device="cuda:0")
    assert (here.device.type, there.device.type) == ("cpu", "cuda") and there[1:].device == there.device
    assert (here + there.cpu()).device.type == "cpu" and (here.to("cuda:0") + there).device == there.device
    assert torch.nn.Linear(3, 3).to("cuda:0")(there).device == there.device
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.nn.Linear(3, 3)(there)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()


@pytest.mark.trains
@pytest.mark.parametrize(
    ("pair", "methods"),
    [
        pytest.param(("cuda:0", "cuda:1"), ",".join(lw.METHODS), marks=pytest.mark.slow),
        (("cuda:0", "cpu"), "bridge,text"),
        pytest.param(("cpu", "cuda:0"), "bridge,text", marks=pytest.mark.slow),
    ],
)
def test_sender_and_receiver_on_different_devices(pair, methods, tmp_path, plain_run, elsewhere):
    """From the sender's states over the store and the bridge to gradients, validation, checkpoint and evaluation."""
    places = ["--sender_device", pair[0], "--receiver_device", pair[1]]
    train(tmp_path / "run", *places, "--state_cache", "memory")
    assert elsewhere.seen >= {*pair}
    words = ["--checkpoint", str(tmp_path / "run"), "--num_samples", "8", "--state_cache", "memory", *places]
    results = lw.eval_main([*words, "--methods", methods])
    assert results["provenance"]["device"] == pair[1] and "failed" not in results
    assert not any("error" in row for row in lw.read_rows(tmp_path / "run" / "records.jsonl"))
    assert curve(tmp_path / "run") == pytest.approx(curve(plain_run), rel=1e-5)


@pytest.mark.trains
def test_each_model_has_its_own_device_flag(tmp_path, plain_run):
    places = ["--sender_device", "cpu", "--receiver_device", "cpu:0"]
    report = train(tmp_path / "run", *places)
    assert report.heard("float32 on cpu and cpu:0")
    assert curve(tmp_path / "run") == curve(plain_run)
    results = lw.eval_main(
        ["--checkpoint", str(tmp_path / "run"), "--num_samples", "8", "--methods", "bridge", *places]
    )
    assert results["provenance"]["device"] == "cpu:0" and results["n"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("pair", [("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_sender_and_receiver_on_different_real_devices(pair, tmp_path, plain_run):
    places = ["--sender_device", pair[0], "--receiver_device", pair[1]]
    train(tmp_path / "run", *places)
    assert curve(tmp_path / "run", "loss")[:3] == pytest.approx(curve(plain_run, "loss")[:3], rel=5e-2)
    results = lw.eval_main(["--checkpoint", str(tmp_path / "run"), "--num_samples", "8", *places])
    assert results["provenance"]["device"] == pair[1] and "failed" not in results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for the tiny models as folders, as ``save_pretrained`` writes them."""
    home, flags = tmp_path_factory.mktemp("folders"), []
    for role, name in (("--sender", "tiny-llama"), ("--receiver", "tiny-qwen")):
        model, tokenizer = lw.LMS[name]()
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        flags += [role, str(home / name)]
    return flags


@pytest.mark.trains
@pytest.mark.parametrize("spread", ["auto", "disk"])
def test_device_map_gives_the_same_curve(spread, folders, tmp_path, plain_run, monkeypatch):
    """auto, which has one place to choose from here; and the upper block on disk, so that accelerate's hooks bring it in."""
    models: list[lw.LM] = []
    create = lw.LM.__init__

    def created(self: lw.LM, *args: Any) -> None:
        create(self, *args)
        models.append(self)

    def on_disk(settings: Any) -> dict[str, Any]:
        there = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        spread = dict.fromkeys(there, "cpu") | {"model.layers.1": "disk"}
        return {"device_map": spread, "offload_folder": str(tmp_path / "offload")}

    given: list[dict[str, Any]] = []
    load = lw.load_weights

    def loading(name: str, dtype: torch.dtype, offline: bool, trust: bool, **placed: Any) -> Any:
        given.append(placed)
        return load(name, dtype, offline, trust, **placed)

    monkeypatch.setattr(lw, "load_weights", loading)
    monkeypatch.setattr(lw.LM, "__init__", created)
    if spread == "disk":
        monkeypatch.setattr(lw, "placement", on_disk)
    report = train(tmp_path / "run", *folders, "--device_map", "auto")
    assert report.heard("float32 on all devices")
    assert given == [{"device_map": "auto"}] * 2 if spread == "auto" else len(models) == 2
    if spread == "disk":
        assert all(hasattr(lm.model, "hf_device_map") for lm in models)
        assert hasattr(models[1].blocks[1], "_hf_hook") and models[1].blocks[1].mlp.up_proj.weight.is_meta
    assert curve(tmp_path / "run") == pytest.approx(curve(plain_run), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits_without_cuda_are_refused_in_one_line(bits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lw.main(["train", *TOY, f"--load_in_{bits}bit", "--output_dir", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: --load_in_{bits}bit needs CUDA") and errors.count("\n") == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits_reach_from_pretrained(bits, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lw, "require", lambda module, package=None: asked.append(module))
    settings = lw.TrainSettings(**{f"load_in_{bits}bit": True, "dtype": "bfloat16", "device": "cpu"})
    found = lw.placement(settings)
    config = found["quantization_config"]
    assert asked == ["bitsandbytes"] and set(found) == {"quantization_config"}
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    if bits == 4:
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        lw, "load_weights", lambda name, dtype, offline, trust, **placed: (given.update(placed), None, "")
    )
    monkeypatch.setattr(lw, "LM", lambda *parts: SimpleNamespace())
    lw.load_lm("some/model", settings, own_device="cpu:0")
    assert given["device_map"] == {"": torch.device("cpu:0")} and given["quantization_config"].to_dict()


def test_nothing_asked_for_places_nothing():
    assert lw.placement(lw.TrainSettings()) == {}
    assert lw.placement(lw.TrainSettings(device_map="auto")) == {"device_map": "auto"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_four_bits_on_cuda(folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    train(tmp_path / "run", *folders, "--device", "cuda", "--load_in_4bit", "--dtype", "bfloat16")
    assert curve(tmp_path / "run", "loss")[-1] < curve(tmp_path / "run", "loss")[0]


# ---- less memory ---------------------------------------------------------------------------------------------------


def one_backward(name: str, recompute: bool) -> tuple[torch.Tensor, int, int]:
    """A loss through a receiver → the soft prompt's gradient, how often a block ran, bytes kept for backward."""
    lm = lw.load_lm(name, lw.TrainSettings(device="cpu", dtype="float32"))
    if recompute:
        lm.checkpoint_activations()
    runs, kept = [0], [0]
    for block in lm.blocks:
        block.mlp.register_forward_pre_hook(lambda *seen: runs.__setitem__(0, runs[0] + 1))
    embeds = torch.randn(3, 4, lm.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    packed = lw.lay_out(lm, lw.SoftPrompt(embeds), [lm.ids("?")] * 3, [lm.ids(" abc")] * 3, before=lm.bos)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = lw.supervise(lm, packed).nats.mean()
        held = kept[0]
    loss.backward()
    assert embeds.grad is not None
    return embeds.grad, runs[0], held


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen", "tiny-gemma"])
def test_activations_are_computed_again_and_gradients_stay(name):
    plain, once, much = one_backward(name, recompute=False)
    again, twice, little = one_backward(name, recompute=True)
    assert (once, twice) == (2, 4) and little < much / 2
    assert torch.allclose(plain, again, rtol=1e-6, atol=1e-9)


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("receiver", ["tiny-llama", "tiny-qwen", "tiny-gemma"])
def test_gradient_checkpointing_keeps_losses_and_validation(receiver, tmp_path, monkeypatch):
    again: list[int] = []
    forward = lw.ResamplerBlock.forward

    def counting(self: lw.ResamplerBlock, *args: torch.Tensor) -> torch.Tensor:
        again.append(1)
        return forward(self, *args)

    monkeypatch.setattr(lw.ResamplerBlock, "forward", counting)
    runs = {}
    for name, flags in (("plain", []), ("again", ["--gradient_checkpointing"])):
        again.clear()
        train(tmp_path / name, "--receiver", receiver, "--steps", "3", *flags)
        runs[name] = len(again)
    assert curve(tmp_path / "again") == pytest.approx(curve(tmp_path / "plain"), rel=1e-6)
    assert runs["again"] == runs["plain"] + 3  # once more for each step, not for validation


@pytest.mark.trains
def test_an_optimizer_in_cpu_memory_changes_no_bit(tmp_path):
    def small(folder: Path, *flags: str) -> None:
        lw.train_main([*TOY, *SMALL, *LENGTH, "--output_dir", str(folder), *flags])

    small(tmp_path / "plain")
    small(tmp_path / "offloaded", "--optimizer_offload")
    assert_same(tmp_path / "offloaded", tmp_path / "plain")
    interrupted(tmp_path / "cut", 5, "--optimizer_offload")
    small(tmp_path / "cut", "--optimizer_offload", "--resume")
    assert_same(tmp_path / "cut", tmp_path / "plain")


def test_an_offloaded_optimizer_holds_its_state_on_the_cpu_only(elsewhere):
    layer = torch.nn.Linear(3, 2).to("cuda:0")
    optimizer = lw.offloaded_adamw([{"params": list(layer.parameters())}], lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.ones(4, 3, device="cuda:0")).sum().backward()
    for parameter in layer.parameters():
        elsewhere.put(parameter.grad, torch.device("cuda:0"))
    optimizer.step()
    tensors = lw.optimizer_tensors(optimizer)
    assert len(tensors) == 6 and {elsewhere.where(tensor).type for tensor in tensors.values()} == {"cpu"}
    assert layer.weight.device.type == "cuda" and bool((layer.weight != before).all())
