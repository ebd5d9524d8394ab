"""§16: two models before any training: what stands in the way, what a linear map keeps, what comes through untrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import LATENTWIRE as lw

CPU = lw.ModelSettings(device="cpu", dtype="float32")
TEXTS = [e.context for e in lw.make_task(lw.DataSettings(dataset="toy")).load("train")[0][:90]]


@pytest.fixture(scope="module")
def pair() -> lw.PairOfModels:
    return lw.PairOfModels(lw.load_lm("tiny-llama", CPU), lw.load_lm("tiny-qwen", CPU), TEXTS)


@pytest.fixture(scope="module")
def twins() -> lw.PairOfModels:
    """One model as both ends."""
    lm = lw.load_lm("tiny-qwen", CPU)
    return lw.PairOfModels(lm, lm, TEXTS)


def test_states_are_means_over_the_receivers_tokens(pair, monkeypatch):
    lm, text = pair.sender, "abcdwx"
    whole = lm.states([[*lm.bos, *lm.ids(text)]], [lm.layer_index(name) for name in pair.LAYERS]).hidden[
        0, :, len(lm.bos) :
    ]
    monkeypatch.setattr(
        lw, "pieces_of", lambda reader, t: ([0] * 2, [(0, 2), (2, 6)]) if reader is pair.receiver else reader.pieces(t)
    )
    spans = lm.pieces(text)[1]
    assert spans == [(i, i + 1) for i in range(6)]
    found = pair.states(text)
    assert torch.allclose(found[:, 0], whole[:, :2].mean(1), atol=1e-6)
    assert torch.allclose(found[:, 1], whole[:, 2:].mean(1), atol=1e-6)


def test_a_model_understands_itself(twins):
    assert twins.tokenizers() == {"sender_tokens_per_receiver_token": 1.0, "borders_in_common": 1.0}
    model, r2 = twins.fit(0)
    assert twins.sender.layer_index(twins.LAYERS[0]) == 0 and r2 > 0.999  # layer 0 is the embeddings themselves
    mapped = twins.mapped(model, 0)
    assert twins.nearest(mapped) == 1.0
    own, other = twins.attention(mapped)
    assert own > 0.999 and other < own - 0.05


def test_noise_keeps_nothing(twins, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    noise = [(torch.randn(states.shape, generator=generator), rows) for states, rows in twins.tokens]
    monkeypatch.setitem(vars(twins), "tokens", noise)
    model, r2 = twins.fit(0)
    assert r2 < 0.05
    assert twins.nearest(twins.mapped(model, 0)) < 0.5


def test_the_held_out_texts_are_never_fitted(pair, monkeypatch):
    seen = []
    import sklearn.linear_model

    fit = sklearn.linear_model.RidgeCV.fit
    monkeypatch.setattr(sklearn.linear_model.RidgeCV, "fit", lambda self, x, y: seen.append(len(x)) or fit(self, x, y))
    pair.fit(0)
    assert seen == [sum(len(rows) for _, rows in pair.tokens[: pair.cut])] and pair.cut == 60


def test_texts_that_a_model_has_no_room_for_are_left_out(pair):
    long = "a" * (pair.receiver.room + 1)
    assert long not in lw.PairOfModels(pair.sender, pair.receiver, [*TEXTS, long]).texts
    with pytest.raises(lw.LatentWireError, match="0 of 2 texts"):
        lw.PairOfModels(pair.sender, pair.receiver, ["", long])


def test_attention_without_a_known_part_is_left_out(pair, monkeypatch):
    model, _ = pair.fit(0)
    monkeypatch.setattr(pair.receiver, "blocks", torch.nn.ModuleList([torch.nn.Linear(2, 2)] * pair.receiver.n_layers))
    assert pair.attention(pair.mapped(model, 0)) is None


def test_the_command_measures_and_keeps_all_of_it(tmp_path, capsys):
    words = [
        "pair",
        "tiny-llama",
        "tiny-qwen",
        "--dataset",
        "toy",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--num_samples",
        "40",
    ]
    assert lw.main([*words, "--output_dir", str(tmp_path / "p")]) == 0
    told = capsys.readouterr().out
    for phrase in ("sender tiny-llama", "receiver tiny-qwen", "terms: tiny-llama: random weights", "100 % of the receiver's",
                   "cosine", "latent bridge", "another text's latents", "training it:"):  # fmt: skip
        assert phrase in told
    kept = json.loads((tmp_path / "p" / "pair.json").read_text())
    assert set(kept["training_free"]) >= {"bridge", "control:shuffled", "control:none", "text", "probe"}
    results = json.loads((tmp_path / "p" / "bridge" / "results.json").read_text())
    assert kept["verdict"] == results["verdict"]
    config = json.loads((tmp_path / "p" / "bridge" / "config.json").read_text())
    best = max(kept["layers"], key=kept["layers"].get)
    assert config["steps"] == 0 and config["layers"] == [best]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny-llama"], "RECEIVER is missing"), (["tiny-llama", "tiny-qven"], "did you mean 'tiny-qwen'"),
        (["tiny-llama", "tiny-qwen", "--dataset", "notes"], "has no classes"),
        (["tiny-llama", "tiny-qwen", "--num_samples", "5"], "--num_samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused_in_a_line(words, line, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refuse("pair", *words)
    assert not Path("runs").exists()
