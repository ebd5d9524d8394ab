"""Training: the loop's arithmetic, exact resume, and what a run leaves behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--dataset", "toy", "--device", "cpu", "--dtype", "float32"]
MEMORY = ["--state_cache", "memory", "--patience", "0"]


def train(folder: Path, *flags: str) -> dict:
    return lw.train_main([*TOY, *MEMORY, "--output_dir", str(folder), *flags])


def weights(folder: Path, name: str = "") -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoint" / name if name else lw.Checkpoints(folder / "checkpoint").steps()[0]
    return lw.load_checkpoint(checkpoint)[0]["bridge"]


def rows(folder: Path) -> list[dict]:
    return lw.read_rows(folder / "diagnostics.jsonl")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.trains
def test_same_seed_same_weights_and_other_seed_other_weights(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(tmp_path / name, "--steps", "6", "--seed", seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.trains
def test_toy_loss_curve_is_pinned(tmp_path):
    train(tmp_path / "run", "--steps", "20", "--lr", "1e-3", "--log_every", "1", "--eval_every", "20")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    pinned = json.loads((ROOT / "tests" / "toy_losses.json").read_text())
    assert losses == pytest.approx(pinned, rel=2e-3)


@pytest.mark.trains
def test_diagnostics_hold_what_the_documents_read(tmp_path):
    train(tmp_path / "run", "--steps", "4", "--log_every", "1", "--eval_every", "2")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    terms = {"loss_answer_ce", "loss_k_token_ce", "loss_first_token_ce"}
    for row in found:
        assert {"step", "loss", "first_acc", "grad_norm", "lr", "tokens_per_s", "seconds", *terms} <= row.keys()
        weighted = row["loss_answer_ce"] + 0.5 * row["loss_k_token_ce"] + 0.5 * row["loss_first_token_ce"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
    assert [("val_loss" in row) for row in found] == [False, True, False, True]
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.trains
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    train(tmp_path / "large", "--steps", "3", "--batch_size", "16", "--dropout", "0")
    train(tmp_path / "small", "--steps", "3", "--batch_size", "4", "--grad_accum", "4", "--dropout", "0")
    large, small = rows(tmp_path / "large"), rows(tmp_path / "small")
    assert [r["loss"] for r in large] == pytest.approx([r["loss"] for r in small], rel=1e-4)
    a, b = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


@pytest.mark.trains
def test_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    train(tmp_path / "whole", "--steps", "10", "--eval_every", "5")
    step = lw.Trainer.step

    def interrupted_at_seven(self):
        row = step(self)
        if self.progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(lw.Trainer, "step", interrupted_at_seven)
    with pytest.raises(lw.Interrupted) as stopped:
        train(tmp_path / "cut", "--steps", "10", "--eval_every", "5")
    assert (stopped.value.where, stopped.value.number) == ("step 7", signal.SIGTERM)
    monkeypatch.setattr(lw.Trainer, "step", step)
    train(tmp_path / "cut", "--steps", "10", "--eval_every", "5", "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(weights(tmp_path / "whole", "best"), weights(tmp_path / "cut", "best"))
    assert [r["step"] for r in rows(tmp_path / "whole")] == [r["step"] for r in rows(tmp_path / "cut")]
    assert not list((tmp_path / "cut").rglob("*tmp*"))


@pytest.mark.trains
@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "LATENTWIRE.py"),
        "train",
        *TOY,
        *MEMORY,
        "--steps",
        "100000",
        "--output_dir",
        "run",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    log = tmp_path / "run" / "diagnostics.jsonl"
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with:" in errors and "--resume" in errors and "Traceback" not in errors
    assert weights(tmp_path / "run")


@pytest.mark.trains
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "run", "--steps", "2", "--eval_every", "1")
    before = weights(tmp_path / "run")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(lw.LatentWireError, match="No space left"):
        lw.Checkpoints(tmp_path / "run" / "checkpoint").save(2, {"bridge": before}, {"schema": 1})
    monkeypatch.undo()
    assert same(before, weights(tmp_path / "run"))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir())
    assert names == ["best", "step-00000001", "step-00000002"]


@pytest.mark.trains
def test_early_stop_keeps_the_best_validation(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.5, 4.0, 5.0])
    monkeypatch.setattr(lw.Trainer, "validate", lambda self: {"val_loss": next(values)})
    flags = [*TOY, "--state_cache", "memory", "--steps", "50", "--eval_every", "1", "--patience", "3"]
    summary = lw.train_main([*flags, "--output_dir", str(tmp_path / "run")])
    assert (summary["steps"], summary["best_step"], summary["val_loss"]) == (5, 2, 1.0)


@pytest.mark.trains
def test_several_seeds_make_one_run_each(tmp_path):
    lw.train_main([*TOY, *MEMORY, "--steps", "2", "--seeds", "1", "2", "--output_dir", str(tmp_path / "sweep")])
    assert not same(weights(tmp_path / "sweep" / "seed1"), weights(tmp_path / "sweep" / "seed2"))


def test_learning_rate_warms_up_then_falls_to_two_percent():
    settings = lw.TrainSettings(dataset="toy", lr=1.0, warmup_steps=10)
    assert [lw.learning_rate(settings, step, 100) for step in (1, 10)] == [0.1, 1.0]
    assert lw.learning_rate(settings, 55, 100) == pytest.approx(0.02 + 0.98 * 0.5)
    assert lw.learning_rate(settings, 100, 100) == pytest.approx(0.02)


def test_every_epoch_shows_every_row_once_in_another_order():
    order = [lw.row_at(7, position, 11) for position in range(22)]
    assert sorted(order[:11]) == sorted(order[11:]) == list(range(11))
    assert order[:11] != order[11:]


@pytest.mark.trains
def test_sender_runs_once_per_distinct_text_and_seeds_share_the_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    texts: list[int] = []
    states = lw.LM.states

    def counting(self, rows, layers):
        texts.append(len(rows))
        return states(self, rows, layers)

    monkeypatch.setattr(lw.LM, "states", counting)
    shared = [*TOY, "--steps", "4", "--batch_size", "256", "--state_cache", "disk"]
    lw.train_main([*shared, "--output_dir", str(tmp_path / "a"), "--seed", "1"])
    distinct = len({e.context for e in lw.Toy(lw.TrainSettings(dataset="toy")).load("train")[0]})
    assert sum(texts) == distinct
    lw.train_main([*shared, "--output_dir", str(tmp_path / "b"), "--seed", "2"])
    assert sum(texts) == distinct


@pytest.mark.trains
def test_layers_mix_and_no_normaliser_train_too(tmp_path):
    flags = ["--layers", "0", "0.5", "-1", "--normalize", "none", "--calibration", "none", "--codec", "fp32"]
    train(tmp_path / "run", "--steps", "3", *flags)
    bridge, settings, _ = lw.open_bridge(tmp_path / "run" / "checkpoint" / "best")
    assert bridge.shape.layers == (0, 1, 2) and bridge.encoder.mix.shape == (3,) and settings.codec == "fp32"


def test_float_losses_never_hide_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(lw, "total_loss", lambda found, settings: (found.nats.mean() * math.nan, {}))
    with pytest.raises(lw.LatentWireError, match="not finite at step 1"):
        train(tmp_path / "run", "--steps", "2")
    shutil.rmtree(tmp_path / "run")
