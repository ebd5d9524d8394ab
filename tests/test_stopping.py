"""Told to stop, every long loop stops within seconds, keeps what is done and says how to go on; going on ends the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")

PATIENCE = 4.0
"""Seconds from a signal to the end. Every loop below would take ten and more, most of them minutes."""
NAP = 0.4
"""Seconds that each of a model's forward passes takes once it is slow."""
MODELS = ("--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu", "--dtype", "float32")
SMALL = ("--width", "16", "--heads", "2", "--depth", "1", "--d_z", "16", "--latent_len", "2", "--batch_size", "8")
LENGTH = ("--steps", "6", "--eval_every", "3", "--patience", "0")
WORDS = [a + b for a, b in itertools.product(("ba", "co", "di"), ("lam", "mir", "nos", "pet", "rut", "sev"))]
"""Eighteen classes of several tokens each: one batch of them takes as many forward passes to score."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows of each class, as a CSV file."""
    path, draw = tmp_path_factory.mktemp("data") / "many.csv", random.Random(0)
    rows = [f"{word} {''.join(draw.choices('wxyz', k=6))} {word},{word}" for word in WORDS for _ in range(10)]
    draw.shuffle(rows)
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.fixture
def words(data: Path) -> list[str]:
    """A small training run's flags, without its folder."""
    return [*MODELS, "--dataset", str(data), *SMALL, *LENGTH]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, never stopped. Read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    lw.train_main([*MODELS, "--dataset", str(data), *SMALL, *LENGTH, "--output_dir", str(folder)])
    return folder


def result(run: Path) -> tuple[dict[str, bytes], list[Any]]:
    """A finished run's weights and optimizer, bit for bit, and its log without times."""
    assert (run / "DONE").exists()
    newest = lw.Checkpoints(run / "checkpoint").steps()[0]
    files = [*newest.glob("*.safetensors"), run / "checkpoint" / "best" / "bridge.safetensors"]
    rows = lw.read_rows(run / "diagnostics.jsonl")
    log = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}, log


class Child:
    """A command line in a process of its own, a copy of this one; ``prepare`` may slow it down, and calls ``mark``."""

    def __init__(self, home: Path, words: list[str], prepare: Callable[[Callable[[], None]], None]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.marked, self.log = home / "marked", home / "log"
        self.marked.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.stdout = sys.stderr = self.log.open("w", buffering=1)
            torch.set_num_threads(1)
            prepare(self.marked.touch)
            code = lw.main(words)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    @property
    def said(self) -> str:
        """What it has printed so far, on one line where the terminal wrapped it."""
        return self.log.read_text() if self.log.exists() else ""

    def ended(self) -> int | None:
        """The exit code, once there is one."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def until(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until it is so far."""
        end = time.monotonic() + seconds
        while not ready():
            code = self.ended()
            assert code is None, f"it ended with {code}:\n{self.said}"
            assert time.monotonic() < end, f"not so far within {seconds} s:\n{self.said}"
            time.sleep(0.01)

    def exit_code(self, seconds: float = 60) -> int:
        """The exit code, which must come within so many seconds; → it."""
        end = time.monotonic() + seconds
        while (code := self.ended()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it did not end within {seconds} s:\n{self.said}")
            time.sleep(0.01)
        return code

    def stopped(self, number: int = signal.SIGTERM) -> str:
        """Tell it to stop once it has called ``mark``; it must end in time, say so in one line, and how to go on; → that."""
        self.until(self.marked.exists)
        time.sleep(0.2)  # into the loop
        os.kill(self.pid, number)
        assert self.exit_code(PATIENCE) == 128 + number, self.said
        assert "Traceback" not in self.said
        [line] = [line for line in self.said.splitlines() if "go on with:" in line]
        assert line.startswith("stopped"), line
        return line


def slow_models(when: Callable[[], bool] = lambda: True, nap: float = NAP) -> None:
    """Every forward pass of this process takes ``nap`` seconds longer, from the moment ``when`` says so."""
    for name in ("forward", "advance"):
        plain = getattr(lw.LM, name)

        def napping(self: lw.LM, *args: Any, plain: Callable[..., Any] = plain, **options: Any) -> Any:
            if when():
                time.sleep(nap)
            return plain(self, *args, **options)

        setattr(lw.LM, name, napping)


def marking(owner: Any, name: str, number: int, mark: Callable[[], None]) -> Callable[[], bool]:
    """``mark`` at the beginning of the ``number``-th call; → whether that was."""
    plain, calls = getattr(owner, name), [0]

    def called(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            mark()
        return plain(*args, **options)

    setattr(owner, name, called)
    return lambda: calls[0] >= number


def slow_from(owner: Any, name: str, number: int = 1) -> Callable[[Callable[[], None]], None]:
    """A ``prepare``: models are slow from the ``number``-th call of a function on, which is the mark."""
    return lambda mark: slow_models(marking(owner, name, number, mark))


def endless(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """A ``prepare``: a function never comes back by itself, but works on in Python."""

    def forever(mark: Callable[[], None]) -> None:
        def working(*args: Any, **options: Any) -> Any:
            mark()
            for _ in range(300):
                time.sleep(0.1)
            raise AssertionError("nobody stopped it")

        setattr(owner, name, working)

    return forever


def unhurried(mark: Callable[[], None]) -> None:
    """A ``prepare`` that changes nothing."""


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_validation_stops_and_goes_on(number, words, whole, tmp_path):
    """J11: told in the first validation, it keeps the step before it; resumed, it validates first and ends the same."""
    run = tmp_path / "run"
    words = ["train", *words, "--output_dir", str(run)]
    line = Child(tmp_path / "child", words, slow_from(lw.Trainer, "validation_sums")).stopped(number)
    assert str(run) in line and "--resume" in line
    assert [path.name for path in lw.Checkpoints(run / "checkpoint").steps()] == ["step-00000003"]
    assert not (run / "checkpoint" / "best").exists()  # nothing was validated
    lw.train_main([*words[1:], "--resume"])
    assert result(run) == result(whole)


@pytest.mark.trains
def test_a_step_of_many_parts_stops_and_goes_on(words, tmp_path):
    """J11: a step may take minutes where rows are gathered one at a time; what it began is not kept, the step before is."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    parts = ["--batch_size", "1", "--grad_accum_steps", "16", "--steps", "3"]
    lw.train_main([*words, *parts, "--output_dir", str(plain)])
    words = ["train", *words, *parts, "--output_dir", str(run)]
    Child(tmp_path / "child", words, slow_from(lw.Trainer, "step", 3)).stopped()
    assert [path.name for path in lw.Checkpoints(run / "checkpoint").steps()] == ["step-00000002"]
    lw.train_main([*words[1:], "--resume"])
    assert result(run) == result(plain)


@pytest.mark.trains
@pytest.mark.parametrize("place", ["load_lm", "training_splits", "sender_ids"])
def test_what_comes_before_the_first_step_stops(place, words, whole, tmp_path):
    """J11: data, models and tokens take minutes as well; the line that tells how to go on is one that works."""
    run = tmp_path / "run"
    words = ["train", *words, "--output_dir", str(run)]
    line = Child(tmp_path / "child", words, endless(lw, place)).stopped()
    again = line.partition("LATENTWIRE.py ")[2] or line.partition("go on with: ")[2]
    flags = again.split()[again.split().index("train") + 1 :]
    lw.train_main(flags)
    assert result(run) == result(whole)


@pytest.mark.trains
def test_state_caching_stops_and_goes_on(words, whole, tmp_path, monkeypatch):
    """J11: what the sender had read is kept and not read again."""
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    by_length, states = lw.by_length, lw.LM.states
    monkeypatch.setattr(lw, "by_length", lambda rows, tokens: by_length(rows, 100))
    run, read = tmp_path / "run", tmp_path / "read"

    def counting(self: lw.LM, rows: Any, layers: Any) -> lw.States:
        found = states(self, rows, layers)
        with read.open("a") as stream:
            print(len(rows), file=stream)
        return found

    monkeypatch.setattr(lw.LM, "states", counting)
    words = ["train", *words, "--output_dir", str(run)]
    line = Child(tmp_path / "child", words, slow_from(lw.LM, "hidden_states", 4)).stopped()
    assert "--resume" in line
    first = [int(n) for n in read.read_text().split()]
    lw.train_main([*words[1:], "--resume"])
    assert result(run) == result(whole)
    distinct = json.loads(next((tmp_path / "cache" / "states").glob("*/notes.json")).read_text())["shape"][0]
    assert len(first) >= 3 and distinct
    texts = {row["text"] for row in rows_of(words)}
    assert sum(int(n) for n in read.read_text().split()) <= len(texts)


def rows_of(words: list[str]) -> list[dict[str, str]]:
    """The rows of the run's own file."""
    import csv

    with Path(words[words.index("--dataset") + 1]).open() as stream:
        return [*csv.DictReader(stream)]


# ---- evaluation and rivals -----------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("method", ["bridge", "text", "text_relay:8", "selective", "zeroshot:sender"])
def test_an_evaluation_stops_and_goes_on(method, whole, tmp_path):
    """J11: told within a batch, it keeps the batches before; the same command does the rest, and nothing twice."""
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    words = ["eval", "--checkpoint", str(run), "--methods", method, "--batch_size", "16", "--num_samples", "40"]
    line = Child(tmp_path / "child", words, slow_from(lw, "record_of", 17)).stopped()
    assert str(run) in line and "eval" in line
    kept = lw.read_rows(run / "records.jsonl")
    assert len(kept) in (16, 32) and not (run / "results.json").exists()
    assert lw.main(words) == 0
    rows = lw.read_rows(run / "records.jsonl")
    assert rows[: len(kept)] == kept and len({row["id"] for row in rows}) == len(rows) == 36


@pytest.mark.trains
@pytest.mark.parametrize("place", ["load_lm", "collect_states", "compression", "results_from"])
def test_an_evaluation_stops_between_its_batches(place, whole, tmp_path):
    """J11: loading, caching, counting and statistics are loops as well."""
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    words = ["eval", "--checkpoint", str(run), "--methods", "bridge,control:shuffled", "--num_samples", "20"]
    Child(tmp_path / "child", words, endless(lw, place)).stopped()
    assert lw.main(words) == 0
    assert len(lw.read_rows(run / "records.jsonl")) == 40


def slow_fit(mark: Callable[[], None]) -> None:
    """A ``prepare``: the probe's regression takes for ever."""
    from sklearn.linear_model import LogisticRegression

    endless(LogisticRegression, "fit")(mark)


QUICK = ("probe", "lora", "linear_bridge")
TRAINED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, method in lw.METHODS.items()
    if method.trained
]


@pytest.mark.trains
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.slow
def test_a_rival_in_training_stops_and_goes_on(method, data, tmp_path):
    """J11: each rival that learns is told while it learns; the same command ends as if nothing had happened."""
    words = ["baseline", method, *MODELS, "--dataset", str(data), "--samples", "48", "--num_samples", "24"]
    words += ["--rival_steps", "6", "--rival_lrs", "1e-3", "--rival_batch", "8", "--soft_tokens", "2"]
    folder, plain = tmp_path / "cut", tmp_path / "plain"
    kind = lw.METHODS[method]
    if issubclass(kind, lw.TunedMethod):
        prepare = slow_from(lw.TunedMethod, "loss", 4)
    elif issubclass(kind, lw.TrainedBridge):
        prepare = slow_from(lw.Trainer, "step", 3)
    else:
        assert issubclass(kind, lw.ProbeMethod), f"{method} learns; where is it slow?"
        prepare = slow_fit
    line = Child(tmp_path / "child", [*words, "--output_dir", str(folder)], prepare).stopped()
    assert str(folder) in line and "baseline" in line and not (folder / "results.json").exists()
    if issubclass(kind, lw.TrainedBridge):
        assert [*folder.glob("*/checkpoint/step-*/state.json")]  # the steps before are kept
    for place in (folder, plain):
        lw.main([*words, "--output_dir", str(place)])
    found = [json.loads((place / "results.json").read_text()) for place in (folder, plain)]
    assert found[0]["methods"][method]["accuracy"] == found[1]["methods"][method]["accuracy"]
    scores = [{row["id"]: row["scores"] for row in lw.read_rows(p / "records.jsonl")} for p in (folder, plain)]
    assert scores[0] == scores[1]
    assert found[0]["details"] == found[1]["details"]


@pytest.mark.trains
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_a_tuned_rival_does_not_learn_its_steps_twice(method, data, tmp_path, monkeypatch):
    """J11: a rival takes hours on a GPU; what it had learned when it was told to stop is kept, or a job never ends."""
    words = ["baseline", method, *MODELS, "--dataset", str(data), "--samples", "48", "--num_samples", "24"]
    words += [
        "--rival_steps",
        "8",
        "--rival_lrs",
        "1e-3,1e-2",
        "--rival_batch",
        "8",
        "--output_dir",
        str(tmp_path / "cut"),
    ]
    loss, learned = lw.TunedMethod.loss, tmp_path / "learned"

    def counting(self: Any, examples: Any) -> Any:
        found = loss(self, examples)
        if torch.is_grad_enabled():
            with learned.open("a") as stream:
                print("step", file=stream)
        return found

    monkeypatch.setattr(lw.TunedMethod, "loss", counting)
    steps = [0]

    def prepare(mark: Callable[[], None]) -> None:
        def late() -> bool:
            steps[0] = learned.read_text().count("step") if learned.exists() else 0
            if steps[0] >= 12:  # in the second training
                mark()
            return steps[0] >= 12

        slow_models(late)

    Child(tmp_path / "child", words, prepare).stopped()
    lw.main(words)
    assert 16 <= learned.read_text().count("step") <= 17
    assert (tmp_path / "cut" / "results.json").exists()


@pytest.mark.slow
def test_an_experiment_stops_in_each_of_its_stages(words, tmp_path, monkeypatch):
    """J11: a grid stops in the run it is at, and the same command goes on there."""
    monkeypatch.chdir(tmp_path)
    at = words.index("--latent_len")
    asked = ["experiment", "--name", "grid", *words[:at], *words[at + 2 :], "--latent_len", "2,3"]
    asked += ["--num_samples", "20", "--methods", "bridge,zero"]
    Child(tmp_path / "one", asked, slow_from(lw.Trainer, "step", 8)).stopped()
    assert (tmp_path / "runs/grid/latent_len2/results.json").exists()
    Child(tmp_path / "two", asked, slow_from(lw, "record_of")).stopped()
    assert not (tmp_path / "runs/grid/latent_len3/results.json").exists()
    Child(tmp_path / "three", asked, endless(lw, "statistical_report")).stopped()
    assert (tmp_path / "runs/grid/latent_len3/results.json").exists()
    lw.main(asked)
    assert (tmp_path / "runs/grid/aggregated_results.json").exists()


# ---- benchmarks ----------------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize(
    "part",
    ["decoding", "growth", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batched", "memory", "training"))],
)
def test_a_benchmark_stops_and_goes_on(part, whole, tmp_path, monkeypatch):
    """J11: each part stops; parts that were measured whole are kept, and not measured again where nothing changed."""
    monkeypatch.setattr(lw, "device_limits", lambda *_: {"bytes_per_s": 1e10, "flop_per_s": 1e11})  # seconds of work
    out, first = tmp_path / "out", "latency"
    words = ["benchmark", "--checkpoint", str(whole), "--benchmark", f"{first},{part}", "--output_dir", str(out)]
    words += ["--arms", "bridge,text", "--num_trials", "1", "--warmup", "1", "--batch_sizes", "1"]
    words += ["--answer_tokens", "1", "--input_tokens", "8", "--max_seconds", "0.01"]
    line = Child(tmp_path / "child", words, slow_from(lw.BENCHMARKS[part], "rows")).stopped()
    assert "benchmark" in line and str(out) in line
    kept = json.loads((out / "benchmark.json").read_text())
    assert kept[first] and part not in kept
    if part != "decoding":  # one of them is enough
        return
    shutil.copy(out / "benchmark.json", tmp_path)
    assert lw.main([*words, "--num_trials", "2"]) == 0  # another question
    assert json.loads((out / "benchmark.json").read_text())[first] != kept[first]
    shutil.copy(tmp_path / "benchmark.json", out)
    assert lw.main(words) == 0
    found = json.loads((out / "benchmark.json").read_text())
    assert found[part] and found[first] == kept[first]
    assert lw.main(words) == 0  # finished: asked again, it is measured again
    assert json.loads((out / "benchmark.json").read_text())[first] != kept[first]


# ---- several processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    """One that is free just now."""
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """ranks(rank, size, words, prepare) → a process that srun would have started as one of ``size``."""
    port, started = free_port(), list[Child]()

    def start(
        rank: int,
        size: int,
        words: list[str],
        prepare: Callable[[Callable[[], None]], None] = unhurried,
        how: str = "srun",
    ) -> Child:
        def known(mark: Callable[[], None]) -> None:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
            mine = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            if how != "srun":
                mine = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in mine.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            prepare(mark)

        started.append(Child(tmp_path / f"rank{rank}", words, known))
        return started[-1]

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


@pytest.mark.parametrize(
    ("rank", "number", "how"),
    [
        (0, signal.SIGTERM, "srun"),
        pytest.param(0, signal.SIGINT, "srun", marks=pytest.mark.slow),
        (1, signal.SIGTERM, "srun"),
        pytest.param(0, signal.SIGTERM, "by hand", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(rank, number, how, words, tmp_path, ranks):
    """J3: one process where two were promised: it tells for whom it waits, and ends when told."""
    child = ranks(rank, 2, ["train", *words, "--output_dir", str(tmp_path / "run")], how=how)
    child.until(lambda: "waiting for" in child.said, seconds=15)
    assert re.search(rf"waiting for .*\b{1 - rank}\b.* of 2", child.said), child.said
    assert ("SLURM_STEP_NUM_TASKS" if how == "srun" else "WORLD_SIZE") in child.said
    os.kill(child.pid, number)
    assert child.exit_code(PATIENCE) == 128 + number
    assert "Traceback" not in child.said and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_come_late_train_together(words, tmp_path, ranks):
    """J3: the second one comes seconds after the first; nothing is lost by the wait."""
    words = ["train", *words, "--output_dir", str(tmp_path / "run")]
    first = ranks(0, 2, words)
    first.until(lambda: "waiting for" in first.said, seconds=15)
    second = ranks(1, 2, words)
    assert (first.exit_code(), second.exit_code()) == (0, 0), first.said + second.said
    assert "2 processes share 8 rows per step" in first.said and (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_a_validation_of_several_processes_stops_and_goes_on(told, words, tmp_path, ranks):
    """J11: told together they stop together; if only one is told, they stop where they next meet, in agreement."""
    run = tmp_path / "run"
    words = ["train", *words, "--output_dir", str(run)]
    pair = [ranks(rank, 2, words, slow_from(lw.Trainer, "validation_sums")) for rank in (0, 1)]
    for child in pair:
        child.until(child.marked.exists)
    for rank in told:
        os.kill(pair[rank].pid, signal.SIGTERM)
    codes = [child.exit_code(PATIENCE if len(told) == 2 else 60) for child in pair]
    assert codes == [143, 143], pair[0].said + pair[1].said
    assert [path.name for path in lw.Checkpoints(run / "checkpoint").steps()] == ["step-00000003"]
    pair = [ranks(rank, 2, [*words, "--resume"]) for rank in (0, 1)]
    assert [child.exit_code() for child in pair] == [0, 0], pair[0].said
    assert [row["step"] for row in lw.read_rows(run / "diagnostics.jsonl")] == [*range(1, 7)]
