"""Several processes at once: one cache, one run folder. Nothing is made twice, and nobody dies of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_stopping import MODELS, Child

import LATENTWIRE as lw

TEXTS = [letter * length for letter in "abcd" for length in range(1, 16)]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)


# ---- the cache of sender states ------------------------------------------------------------------------------------


@pytest.fixture
def caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., Any]]:
    """caching(nap) makes a ``prepare`` whose command line caches the states of sixty texts, in a dozen groups."""
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    plain = lw.by_length
    monkeypatch.setattr(lw, "by_length", lambda rows, tokens: plain(rows, 60))
    lm = lw.load_lm(
        "tiny-llama", lw.TrainSettings(dataset="toy", device="cpu", dtype="float32")
    )  # once for all of them

    def prepared(owner: Path, go: Path, nap: float = 0.0) -> Callable[[Callable[[], None]], None]:
        def prepare(mark: Callable[[], None]) -> None:
            states = lw.LM.states

            def counting(self: lw.LM, rows: Any, layers: Any) -> lw.States:
                time.sleep(nap)
                with (tmp_path / "read").open("a") as stream:
                    print(len(rows), file=stream)
                mark()
                return states(self, rows, layers)

            def collect(words: Any) -> int:
                until(go.exists)
                with lw.catching_signals():
                    store = lw.collect_states(lm, TEXTS, [0, 1], 64, "disk", lambda done, total: None, owner)
                assert len(store.index) == len(TEXTS) and float(store.flat.float().abs().sum()) > 0
                return 0

            lw.LM.states, lw.main = counting, collect  # type: ignore[assignment, method-assign]

        return prepare

    return prepared


def read_rows(tmp_path: Path) -> int:
    """How many texts the sender has read in all processes together."""
    return sum(map(int, (tmp_path / "read").read_text().split()))


@pytest.mark.parametrize("owners", ["one", "many"])
def test_first_uses_of_a_cache_at_once_all_succeed(owners, caching, tmp_path):
    """M10: eight processes want the same states at the same moment, of the same run or of others; one computes them."""
    go = tmp_path / "go"
    names = [tmp_path / ("owner" if owners == "one" else f"owner{number}") for number in range(8)]
    children = [Child(tmp_path / f"child{n}", [], caching(owner, go, 0.02)) for n, owner in enumerate(names)]
    go.touch()
    codes = [child.exit_code() for child in children]
    assert codes == [0] * 8, "\n".join(child.said for child in children)
    assert read_rows(tmp_path) == len(TEXTS)
    [folder] = (tmp_path / "cache" / "states").iterdir()  # nothing is left but the states
    assert (folder / "states.bin").is_file()


def test_one_that_is_killed_is_followed_by_one_that_waited(caching, tmp_path):
    """M10: the lock goes with its process."""
    go = tmp_path / "go"
    go.touch()
    first = Child(tmp_path / "first", [], caching(tmp_path / "a", go, 0.3))
    first.until(first.marked.exists)
    second = Child(tmp_path / "second", [], caching(tmp_path / "b", go))
    second.until(lambda: "waiting" in second.said, seconds=15)
    os.kill(first.pid, signal.SIGKILL)
    assert first.exit_code() == -signal.SIGKILL
    assert second.exit_code() == 0, second.said
    assert len([*(tmp_path / "cache" / "states").iterdir()]) == 1


def test_one_that_waits_stops_when_told(caching, tmp_path):
    """M10, J11: waiting for somebody else's states is a loop as well."""
    go = tmp_path / "go"
    go.touch()
    first = Child(tmp_path / "first", [], caching(tmp_path / "a", go, 2.0))
    first.until(first.marked.exists)

    def stoppable(mark: Callable[[], None]) -> None:
        caching(tmp_path / "b", go)(mark)
        plain = lw.main

        def stopped(words: Any) -> int:
            try:
                with lw.catching_signals(), lw.breakable(tmp_path, "the wait"):
                    return plain(words)
            except lw.Interrupted as stop:
                return 128 + stop.number

        lw.main = stopped  # type: ignore[assignment]

    second = Child(tmp_path / "second", [], stoppable)
    second.until(lambda: "waiting" in second.said, seconds=15)
    os.kill(second.pid, signal.SIGTERM)
    assert second.exit_code(4) == 143, second.said
    os.kill(first.pid, signal.SIGKILL)
    first.exit_code()


# ---- two evaluations -----------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("command", ["eval", "baseline"])
def test_a_second_evaluation_in_the_same_folder_is_refused(command, toy_run, tmp_path):
    """J5: two at once would compute every row twice and write them all; the second is told so."""
    run = Path(shutil.copytree(toy_run, tmp_path / "run", symlinks=True))
    words = ["eval", "--checkpoint", str(run), "--methods", "bridge,zero", "--num_samples", "12"]
    if command == "baseline":
        words = ["baseline", "zeroshot", *MODELS, "--dataset", "toy", "--num_samples", "12", "--samples", "40"]
        words += ["--output_dir", str(run / "rivals")]
    release = tmp_path / "release"

    def holding(mark: Callable[[], None]) -> None:
        plain = lw.compute_rows

        def waiting(*args: Any, **options: Any) -> None:
            mark()
            until(release.exists)
            plain(*args, **options)

        lw.compute_rows = waiting

    first = Child(tmp_path / "first", words, holding)
    first.until(first.marked.exists)
    second = Child(tmp_path / "second", words, lambda mark: None)
    assert second.exit_code() == 2, second.said
    [line] = [line for line in second.said.splitlines() if line.startswith("error: ")]
    assert "another process" in line and str(run) in line
    release.touch()
    assert first.exit_code() == 0, first.said
    where = run if command == "eval" else run / "rivals"
    rows = lw.read_rows(where / "records.jsonl")
    assert len({(row["method"], row["id"]) for row in rows}) == len(rows)
    third = Child(
        tmp_path / "third", words, lambda mark: None
    )  # the lock went with the process, and nothing is left of it
    assert third.exit_code() == 0 and lw.read_rows(where / "records.jsonl") == rows
    assert not [path for path in where.iterdir() if path.name.startswith(".")]
