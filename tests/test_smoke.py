"""The must-hold table: every smoke preset trains two frozen receivers, saves, opens again and answers the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

pytestmark = pytest.mark.trains
COLOURS, ANIMALS = ("red", "blue", "green", "black", "white"), ("cat", "dog", "owl", "fox")
RECEIVERS = ("tiny-qwen", "tiny-llama")
PARTS = {
    "smoke-base": "grad_ears.{}.adapter", "smoke-lora": "grad_lora", "smoke-prefix": "grad_ears.{}.key_values",
    "smoke-deep_prefix": "grad_ears.{}.key_values", "smoke-latent_adapters": "grad_ears.{}.readers",
    "smoke-coprocessor": "grad_ears.{}.key_values", "smoke-gist_head": "grad_ears.{}.gist", "smoke-refiner": "grad_refiner",
}  # fmt: skip
QUICK = ("smoke-base", "smoke-lora")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 passages that name an animal and its colour, asked for both."""
    path = tmp_path_factory.mktemp("animals") / "animals.jsonl"
    said = [f"{COLOURS[i % 5]} {ANIMALS[i % 4]}" for i in range(60)]
    rows = [
        {"context": f"In house {i} lives a {what}.", "question": "Who lives there?", "answer": what}
        for i, what in enumerate(said)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def frozen_sum(model: Any) -> str:
    """SHA-256 of a model's own weights, whatever was put beside them."""
    sums = hashlib.sha256()
    for name, tensor in sorted((name.replace(".base_layer", ""), t) for name, t in model.state_dict().items()):
        if "lora_" not in name:
            sums.update(name.encode() + tensor.numpy().tobytes())
    return sums.hexdigest()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """An evaluation's records without their times."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "sum")} for row in lw.read_rows(folder / "records.jsonl")
    ]


def said(trainer: lw.Trainer, ear: int, examples: list[lw.Example]) -> list[lw.Answer]:
    """Answers of the bridge and the models that training left in memory."""
    sender, limit = trainer.sender, lw.text_limit(trainer.settings, trainer.sender)
    texts = [trainer.part.sender_text(example) for example in examples]
    writer = lw.Sender(sender, trainer.bridge, limit, trainer.receiver)
    listener = lw.Receiver(trainer.promptings[ear], trainer.bridge, 8, trainer.settings)
    with torch.no_grad():
        sent = [row.to_bytes() for row in writer.message(texts, listener.name, ear).rows()]
    return listener.answers(examples, sent)


def switch_off(trainer: lw.Trainer, preset: str) -> None:
    """Take the preset's feature out of the trained bridge and its models."""
    for lm, part in zip(trainer.setup.receivers, trainer.bridge.ears, strict=True):
        for layer in lm.tuned:
            layer.enable_adapters(False)
        lm.tuned, part.key_values, part.readers = [], None, torch.nn.ModuleDict()
    trainer.bridge.refiner = None


def assert_gist_teaches(trainer: lw.Trainer) -> None:
    """The head changes no answer; its loss changes what the encoder writes."""
    trainer.bridge.zero_grad()
    heard = trainer.hear(trainer.train_rows[:4])
    lw.LOSSES["gist"](trainer.settings).term(lw.supervise(heard.receiver, heard.answered(heard.soft), heard)).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in trainer.bridge.encoder.blocks.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    "preset", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARTS]
)
def test_smoke_preset(preset, data, tmp_path, monkeypatch):
    models, trainers = [], []
    load, train = lw.load_weights, lw.Trainer.train

    def loading(*words, **options):
        found = load(*words, **options)
        models.append((found[0], frozen_sum(found[0])))
        return found

    monkeypatch.setattr(lw, "load_weights", loading)
    monkeypatch.setattr(lw.Trainer, "train", lambda self: trainers.append(self) or train(self))
    monkeypatch.setattr(torch.autograd, "set_detect_anomaly", contextlib.nullcontext)  # it keeps every call's trace
    flags = ["--preset", preset, "--receivers", ",".join(RECEIVERS), "--dataset", str(data), "--device", "cpu"]
    summary = lw.train_main([*flags, "--eval_every", "12", "--debug", "--output_dir", str(tmp_path / "run")])
    (trainer,) = trainers
    assert (summary["steps"], summary["best_step"]) == (12, 12)

    log = lw.read_rows(tmp_path / "run" / "diagnostics.jsonl")
    losses = [row["loss"] for row in log]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert {row["receiver"] for row in log} == {*RECEIVERS}
    for ear, name in enumerate(RECEIVERS):
        mine = [row[PARTS[preset].format(ear)] for row in log if row["receiver"] == name]
        assert min(mine) > 0, (name, mine)

    flags = ["--checkpoint", str(tmp_path / "run"), "--num_samples", "6", "--max_new_tokens", "8"]
    flags += ["--methods", "bridge", "--fresh_eval", "--output_dir"]
    results = lw.eval_main([*flags, str(tmp_path / "a")])
    assert results["headline"] == "f1" and results["latent"]["errors"] == 0
    assert [*results["receivers"]] == [*RECEIVERS]
    lw.eval_main([*flags, str(tmp_path / "b")])
    first, second = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert first == second and len(first) == 2 * 6
    assert len(models) == 2 + 2 * 3 and all(frozen_sum(model) == before for model, before in models)

    own = [p for model, _ in models for name, p in model.named_parameters() if "lora_" not in name]
    assert all(p.grad is None and not p.requires_grad for p in own)

    trainer.bridge.eval()
    known = {example.id: example for example in lw.test_split(trainer.part, None)[0]}
    answered = []
    for ear in range(2):
        mine = first[6 * ear : 6 * ear + 6]
        examples = [known[row["id"]] for row in mine]
        answers = said(trainer, ear, examples)
        assert [answer.text for answer in answers] == [row["generated"] for row in mine]
        assert [a.nll_per_token for a in answers] == pytest.approx([row["nll_per_token"] for row in mine], abs=1e-4)
        answered.append((examples, [answer.nll_per_token for answer in answers]))
    if preset == "smoke-gist_head":
        assert_gist_teaches(trainer)
    switch_off(trainer, preset)
    for ear, (examples, before) in enumerate(answered):
        after = [answer.nll_per_token for answer in said(trainer, ear, examples)]
        shift = max(abs(a - b) for a, b in zip(after, before, strict=True))
        assert (shift > 0) == (preset not in ("smoke-base", "smoke-gist_head")), shift


def test_every_smoke_preset_is_in_the_table():
    assert [name for name in lw.PRESETS if name.startswith("smoke-")] == [*PARTS]
