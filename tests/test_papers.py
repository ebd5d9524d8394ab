"""Presets after published methods: each trains, reopens with the same answers, goes on exactly, and names its paper."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from test_survival import outcome, stop_at

import LATENTWIRE as lw

AFTER = {"dataset": "squad", "protocol": "question-agnostic", "max_tokens": 384}
PAPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "arc-encoder": ("2510.20535", {
        "layers": ["0.93"], "pooler": "window", "ratio": [4.0], "adapter": "mlp", "hidden_mult": 2,
        "continuation_weight": 0.8, "reconstruction_weight": 0.2}),
    "xrag": ("2405.13792", {
        "encoder": "simple-st", "pooler": "mean", "latent_len": 1, "adapter": "mlp", "hidden_mult": 2, "kd_weight": 2.0,
        "reconstruction_weight": 1.0}),
    "icae": ("2307.06945", {
        "layers": ["-1"], "latent_len": 40, "use_lora": True, "lora_on": "sender", "lora_r": 32, "reconstruction_weight": 1.0}),
    "gist": ("2304.08467", {
        "layers": ["-1"], "latent_len": 4, "use_deep_prefix": True, "use_lora": True, "lora_on": "both"}),
    "500xcompressor": ("2408.03094", {
        "layers": ["-1"], "latent_len": 16, "use_deep_prefix": True, "use_lora": True, "lora_on": "sender", "lora_r": 32,
        "reconstruction_weight": 1.0}),
    "latentmas": ("2511.20639", {"layers": ["-1"], "pooler": "mean", "ratio": [1.0], "init": "ridge", "steps": 0}),
    "interlat": ("2511.09149", {
        "layers": ["-1"], "pooler": "window", "ratio": [1.0], "adapter": "mlp", "kd_weight": 1.0, "contrast_weight": 0.5}),
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, sentence_model: str) -> list[str]:
    """Questions about texts, for tiny models on a CPU, and a tiny sentence encoder."""
    folder, draw = tmp_path_factory.mktemp("papers"), random.Random(0)
    rows = []
    for _ in range(80):
        text, place = "".join(draw.choices("abcdwxyz", k=24)), draw.randrange(20)
        rows.append({"context": text, "question": f"after {text[place]}?", "answer": text[place + 1 : place + 3]})
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(folder / "qa.jsonl"), "--sentence_model", sentence_model, "--sender", "tiny-llama", "--device",
            "cpu", "--receiver", "tiny-qwen", "--dtype", "float32", "--samples", "48", "--val_samples", "8", "--max_tokens", "64",
            "--batch_size", "8"]  # fmt: skip


def train(name: str, words: list[str], folder: Path, *more: str) -> None:
    steps = [] if name == "latentmas" else ["--steps", "4"]
    lw.train_main(["--preset", name, *words, *steps, *more, "--output_dir", str(folder)])


@pytest.mark.parametrize("name", PAPERS)
def test_a_method_is_the_papers_with_what_differs(name, say):
    number, values = PAPERS[name]
    assert lw.PRESETS[name]() == AFTER | values
    told = say("show", name)
    assert f"arXiv {number}" in told and "\n  paper: " in told and "\n  here: " in told
    assert re.search(r"\d", told.partition("paper: ")[2].partition("here: ")[0]), "the paper's own numbers"
    assert max(map(len, told.splitlines())) <= 101
    assert lw.PRESETS["training-free"] is lw.PRESETS["latentmas"]


@pytest.mark.parametrize("name", PAPERS)
def test_a_method_trains_reopens_and_goes_on(name, words, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(name, words, whole)
    bridge, again = lw.load(whole), lw.load(whole)
    examples = make_examples(words)
    texts, questions = [e.context for e in examples], [e.question for e in examples]
    messages = bridge.encode(texts)
    answers = bridge.answer(messages, questions)
    assert [*map(bytes, again.encode(texts))] == [*map(bytes, messages)]
    assert again.answer([*map(bytes, messages)], questions) == answers
    results = lw.evaluate(whole, methods=["bridge", "control:shuffled"], num_samples=8, output_dir=tmp_path / "out")
    assert results["n"] == 8 and {"bridge", "control:shuffled"} <= set(results["methods"])
    if name == "latentmas":  # nothing is trained
        return
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(lw.Interrupted):
            train(name, words, half)
    train(name, words, half, "--resume")
    mine, wanted = outcome(half), outcome(whole)
    assert mine.keys() == wanted.keys()
    assert [key for key in wanted if mine[key] != wanted[key]] == []


def make_examples(words: list[str]) -> list[lw.Example]:
    return lw.make_task(lw.DataSettings(dataset=words[1])).load("test")[0][:6]
