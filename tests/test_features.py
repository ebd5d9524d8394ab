"""§6 and §8: what may be added to a receiver starts as nothing, learns, and works the same in every way of reading."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bridges import TINY, rows, sums, trainer

import LATENTWIRE as lw

TEXTS = (
    "a text of more tokens, each of four bytes, than there are in the window.",
    "short",
    "Zoë's naïve café 👍🏽",
    "of middle length",
)
PLAIN = ["--encoder", "byte", "--pooler", "window", "--init", "copy", "--ratio", "1", "--d_z", "16", "--lr", "1e-2",
         "--warmup_steps", "0"]  # fmt: skip
FEATURES = {
    "lora": ["--use_lora"],
    "lora on few": ["--use_lora", "--lora_target_modules", "attn_mlp_firstN:1", "--lora_r", "2"],
    "prefix": ["--use_prefix", "--prefix_tokens", "3"],
    "projected prefix": ["--use_prefix", "--prefix_projection"],
    "deep prefix": ["--use_deep_prefix"],
    "short deep prefix": ["--use_deep_prefix", "--deep_prefix_len", "2"],
    "coprocessor mean": ["--use_coprocessor"],
    "coprocessor first": ["--use_coprocessor", "--coprocessor_pool", "first", "--coprocessor_len", "2"],
    "coprocessor max": ["--use_coprocessor", "--coprocessor_pool", "max", "--coprocessor_len", "9"],
    "latent adapters": ["--use_latent_adapters", "--latent_adapter_layers", "0", "1", "--latent_adapter_heads", "2"],
    "gist": ["--use_gist_head", "--gist_weight", "1", "--gist_hidden", "16"],
    "refiner": ["--use_latent_refiner"],
    "film": ["--film"],
    "mlp": ["--adapter", "mlp"],
    "everything": ["--use_lora", "--use_prefix", "--use_deep_prefix", "--use_coprocessor", "--use_latent_adapters"],
}
SENDING = {
    "sender's lora": ["--use_lora", "--lora_on", "sender", "--layers", "-1", "--init", "ridge"],
    "both loras": ["--use_lora", "--lora_on", "both", "--layers", "-1", "--init", "ridge"],
}
SILENT = ("gist",)  # changes no answer


def built(name: str, feature: str = "", *flags: str, texts: Sequence[str] = TEXTS) -> lw.Trainer:
    """A trainer for a receiver with a feature; whatever it shares with one without is equal."""
    reads = ["--sender", "tiny-llama", "--encoder", "hidden"] if feature in SENDING or "--sender" in flags else []
    extra = (FEATURES | SENDING).get(feature, [])
    made = trainer(rows(texts), *PLAIN, *reads, "--receiver", name, *extra, *flags)
    made.prepare()
    return made


def twins(name: str, feature: str, *flags: str) -> tuple[lw.Trainer, lw.Trainer]:
    """The same bridge without and with the feature."""
    reads = ["--sender", "tiny-llama", "--layers", "-1", "--init", "ridge"] if feature in SENDING else []
    plain, made = built(name, "", *reads, *flags), built(name, feature, *flags)
    missing = made.bridge.load_state_dict(plain.bridge.state_dict(), strict=False)
    assert not missing.unexpected_keys
    for each in (plain, made):
        each.bridge.eval()
    return plain, made


def feature_parameters(made: lw.Trainer, plain: lw.Trainer) -> dict[str, torch.nn.Parameter]:
    """What the feature added."""
    own = plain.bridge.state_dict().keys()
    return {n: p for n, p in made.bridge.named_parameters() if n not in own} | made.lora


@torch.no_grad()
def stir(made: lw.Trainer, plain: lw.Trainer) -> None:
    """The feature's weights as if it had learned something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in feature_parameters(made, plain).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def answered(made: lw.Trainer, examples: Sequence[lw.Example] | None = None) -> torch.Tensor:
    """Logits where the gold answers are predicted."""
    heard = made.hear(examples or made.train_rows)
    return lw.supervise(heard.receiver, heard.answered(heard.soft)).logits


@pytest.mark.parametrize("feature", [*FEATURES, *SENDING])
@pytest.mark.parametrize("name", [TINY[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TINY[1:])])
def test_a_feature_starts_as_nothing_and_then_matters(name: str, feature: str) -> None:
    plain, made = twins(name, feature)
    before = answered(plain)
    assert float((answered(made) - before).abs().max()) < 1e-5 * float(before.abs().max())
    stir(made, plain)
    moved = float((answered(made) - before).abs().max())
    assert (moved < 1e-5 * float(before.abs().max())) if feature in SILENT else moved > 1e-3 * float(before.abs().max())


@pytest.mark.parametrize("feature", [*FEATURES, *SENDING])
@pytest.mark.parametrize("losses", [[], ["--kd_weight", "1"]], ids=["answers", "distilled"])
def test_every_weight_of_a_feature_learns_within_three_steps(feature: str, losses: list[str]) -> None:
    """Also beside distillation, whose text reader switches LoRA off."""
    made, plain = (
        built("tiny-qwen", feature, "--steps", "8", *losses),
        trainer(rows(TEXTS), *PLAIN, "--receiver", "tiny-qwen"),
    )
    frozen = [sums(made.receiver.backbone) if not made.lora else "", made.receiver.table.weight.clone()]
    base = {n: p.clone() for n, p in made.receiver.model.named_parameters() if "lora_" not in n}
    own = feature_parameters(made, plain)
    if feature in SENDING:
        own = made.lora
    assert own
    made.bridge.train()
    learned: set[str] = set()
    for _ in range(3):
        made.step()
        learned |= {n for n, p in own.items() if p.grad is not None and float(p.grad.abs().max()) > 0}
    asleep = {n for n in own.keys() - learned if not n.endswith("in_proj_bias")}  # a key's bias changes no attention
    assert not asleep
    assert all(torch.equal(p, base[n]) for n, p in made.receiver.model.named_parameters() if n in base)
    assert all(p.grad is None for n, p in made.receiver.model.named_parameters() if "lora_" not in n)
    assert torch.equal(made.receiver.table.weight, frozen[1])
    assert not frozen[0] or sums(made.receiver.backbone) == frozen[0]


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in SILENT])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_cached_continuation_equals_one_full_forward(name: str, feature: str) -> None:
    """Ragged and left-padded, past tiny-gemma's window, two tokens at a time and one alone."""
    plain, made = twins(name, feature)
    stir(made, plain)
    lm, examples = made.receiver, made.train_rows
    soft = made.hear(examples).soft
    assert soft.mask is not None and not soft.mask.all()
    state = lm.prefill(made.prompting.pack(soft, examples))
    assert int(state.mask.sum(1).max()) > 16
    more = torch.tensor([lm.ids(" of")[:2], lm.ids("so it")[:2], lm.ids("!?")[:2], lm.ids("12")[:2]])
    steps = [state.logits[:, None]]
    for ids in (more, more[:, :1], more[:, 1:]):
        hidden, mask = lm.advance(state, state.cache, ids, torch.ones_like(ids, dtype=torch.bool))
        state = replace(state, mask=mask)
        steps.append(lm.logits(hidden))
    cached = torch.cat(steps, 1)
    said = torch.cat([more, more[:, :1], more[:, 1:]], 1).tolist()
    for row, example in enumerate(examples):
        own = made.hear([example]).soft
        packed = made.prompting.joined(own, [made.prompting.after(example, text=False)], [[*said[row], 0]])
        whole = lm.logits(lm.forward(packed, use_cache=False).last_hidden_state[packed.rows, packed.columns])
        assert torch.allclose(cached[row], whole, atol=2e-4 * float(whole.abs().max())), example.context


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in SILENT])
@torch.no_grad()
def test_candidates_are_scored_with_the_feature(feature: str) -> None:
    """Rows of the cache are copied for each candidate, and what the soft prompt brings along with them."""
    plain, made = twins("tiny-gemma", feature)
    stir(made, plain)
    lm, examples = made.receiver, made.train_rows
    soft = made.hear(examples).soft
    words = [lm.ids(" yes it is"), lm.ids(" no")]
    scores = lm.score(lm.prefill(made.prompting.pack(soft, examples)), [words] * len(examples))
    for number, word in enumerate(words):
        packed = made.prompting.joined(soft, [made.prompting.after()] * len(examples), [word] * len(examples))
        found = lw.supervise(lm, packed)
        wanted = torch.zeros(len(examples)).index_add(0, found.rows, -found.nats)
        assert [row[number] for row in scores] == pytest.approx(wanted.tolist(), abs=2e-3)


@pytest.mark.parametrize("feature", [*FEATURES, *SENDING])
@torch.no_grad()
def test_text_and_no_source_are_answered_by_the_frozen_model(feature: str) -> None:
    plain, made = twins("tiny-gemma", feature)
    stir(made, plain)
    made.hear(made.train_rows)  # whatever a soft prompt switched on is off again
    answered(made)
    for text in (True, False):
        found = [lw.Receiver(t.prompting, t.bridge, 4).answers(t.train_rows, None, text=text) for t in (plain, made)]
        assert found[0] == found[1]
    assert answered(made).ne(answered(plain)).any() or feature in SILENT


CHECKPOINTED = [f for f in (*FEATURES, *SENDING) if f not in ("film", "mlp")]


@pytest.mark.parametrize("feature", CHECKPOINTED)
def test_recomputed_activations_give_the_same_loss_and_gradients(feature: str) -> None:
    found = []
    for flags in ([], ["--gradient_checkpointing"]):
        made, plain = (
            built("tiny-gemma", feature, "--kd_weight", "1", *flags),
            trainer(rows(TEXTS), *PLAIN, "--receiver", "tiny-qwen"),
        )
        stir(made, plain)
        made.bridge.train()
        values = made.gradients(1, 4)
        grads = [p.grad for p in made.parameters if p.grad is not None]
        found.append((values["loss"], torch.cat([grad.flatten() for grad in grads])))
        assert made.receiver.recompute == bool(flags)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6 * float(found[0][1].abs().max()))


# ---- from training to a reopened checkpoint ----------------------------------------------------------------------

TOGETHER = {
    "keys and values": ["--use_prefix", "--use_deep_prefix", "--use_coprocessor", "--use_latent_refiner"],
    "lora": ["--use_lora", "--lora_on", "both", "--sender", "tiny-llama", "--encoder", "hidden"],
    "readers": [
        "--use_latent_adapters",
        "--use_prefix",
        "--prefix_projection",
        "--use_gist_head",
        "--gist_weight",
        "1",
    ],
}


@pytest.mark.trains
@pytest.mark.parametrize("which", TOGETHER)
def test_a_reopened_bridge_answers_as_the_trained_one(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[lw.Trainer] = []
    train = lw.Trainer.train
    monkeypatch.setattr(lw.Trainer, "train", lambda self: (kept.append(self), train(self))[1])
    run = tmp_path / "run"
    common = ["--device", "cpu", "--dtype", "float32", "--dataset", "toy", "--state_cache", "memory", "--width", "16"]
    common += ["--heads", "2", "--depth", "1", "--receiver", "tiny-gemma", *PLAIN, "--batch_size", "8"]
    lw.train_main([*common, "--steps", "4", *TOGETHER[which], "--val_samples", "0", "--output_dir", str(run)])
    made = kept[0]
    made.bridge.eval()
    asked = ["--checkpoint", str(run), "--device", "cpu", "--num_samples", "8", "--state_cache", "memory"]
    settings = lw.EvalSettings.build({"checkpoint": run, "device": "cpu", "num_samples": 8})
    channel = lw.open_context(settings, lw.Checkpoint.open(run))
    made.writer.collect([channel.text(e) for e in channel.examples], "memory", lambda done, total: None)
    with torch.no_grad():
        message = replace(made.hear(channel.examples).message, bridge=channel.receiver.name)
    sent = [row.to_bytes() for row in message.rows()]
    assert sent == channel.messages
    here = lw.Receiver(made.prompting, made.bridge).answers(channel.examples, sent)
    there = channel.receiver.answers(channel.examples, channel.messages)
    assert here == there
    words = [*asked, "--methods", "bridge,text,control:none"]
    first = lw.eval_main(words)
    shutil.move(run / "records.jsonl", run / "first.jsonl")
    again = lw.eval_main([*words, "--fresh_eval"])
    assert first["methods"] == again["methods"]
    records = [[{k: v for k, v in row.items() if k not in ("seconds", "sum")} for row in lw.read_rows(run / name)]
               for name in ("first.jsonl", "records.jsonl")]  # fmt: skip
    assert records[0] == records[1]
    own = {row["id"]: row for row in records[0] if row["method"] == "bridge"}
    assert [own[e.id]["generated"] for e in channel.examples] == [answer.text for answer in here]
    assert [own[e.id]["nll_per_token"] for e in channel.examples] == pytest.approx(
        [a.nll_per_token for a in here], abs=1e-4
    )
    frozen = lw.load_lm("tiny-gemma", lw.ModelSettings(device="cpu", dtype="float32"))
    alone = lw.Receiver(lw.Prompting(frozen, made.part, made.prompting.anchor), made.bridge).answers(
        channel.examples, None, text=True
    )
    told = {row["id"]: row for row in records[0] if row["method"] == "text"}
    assert [told[e.id]["nll_per_token"] for e in channel.examples] == pytest.approx(
        [a.nll_per_token for a in alone], abs=1e-5
    )


# ---- what each feature changes -----------------------------------------------------------------------------------


def key_values(*flags: str) -> tuple[lw.Trainer, torch.Tensor, torch.Tensor]:
    """(trainer, what is added to keys and values (B, K, L, 2, D_kv), mask) of ragged messages."""
    made, plain = built("tiny-qwen", "", *flags), trainer(rows(TEXTS), *PLAIN, "--receiver", "tiny-qwen")
    stir(made, plain)
    made.bridge.eval()
    with torch.no_grad():
        soft = made.hear(made.train_rows).soft
    assert soft.changes is not None and soft.mask is not None
    return made, soft.changes, soft.mask


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--use_prefix", "--prefix_tokens", "3"], 3),
        (["--use_prefix", "--prefix_tokens", "99"], 99),
        (["--use_deep_prefix"], 99),
        (["--use_deep_prefix", "--deep_prefix_len", "2"], 2),
        (["--use_coprocessor"], 1),
        (["--use_coprocessor", "--coprocessor_len", "2"], 2),
    ],
)
def test_how_many_soft_tokens_a_feature_changes(flags: list[str], count: int) -> None:
    made, changes, _ = key_values(*flags)
    size = changes.abs().amax((2, 3, 4))
    assert (size[:, :count] > 0).all() and (size[:, count:] == 0).all()
    assert changes.shape[2:] == (2, 2, made.receiver.blocks[0].self_attn.k_proj.out_features)
    assert torch.equal(changes[0], changes[1]) == ("--use_prefix" in flags)


@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_keys_and_values_change_in_their_layer_at_their_soft_token(layer: int, which: int) -> None:
    made, changes, mask = key_values("--use_deep_prefix")
    only = torch.zeros_like(changes)
    only[:, :, layer, which] = changes[:, :, layer, which]
    soft, seen = made.hear(made.train_rows).soft, []
    projection = (made.receiver.blocks[layer].self_attn.k_proj, made.receiver.blocks[layer].self_attn.v_proj)[which]
    for change in (torch.zeros_like(changes), only):
        packed = made.prompting.pack(replace(soft, changes=change), made.train_rows)
        with made.receiver.reading(packed.soft, packed.at):
            hook = projection.register_forward_hook(lambda module, args, output: seen.append(output))
            made.receiver.backbone(inputs_embeds=packed.embeds, attention_mask=packed.mask.long(),
                                   position_ids=packed.positions, use_cache=False)  # fmt: skip
            hook.remove()
    gap = seen[1] - seen[0]
    anchor = len(made.prompting.after())
    for row, real in enumerate(mask.sum(1).tolist()):
        start = gap.shape[1] - anchor - real  # left-padded, tiny-qwen has no BOS
        assert torch.allclose(gap[row, start : start + real], only[row, :real, layer, which], atol=1e-5)
        assert gap[row, start + real :].abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["mean", "first", "max"])
def test_the_coprocessor_sees_real_latents_only(pool: str) -> None:
    made, changes, mask = key_values("--use_coprocessor", "--coprocessor_pool", pool, "--coprocessor_kv_scale", "0.5")
    own = made.bridge.ears[0].key_values.coprocessor
    with torch.no_grad():
        latents = made.hear(made.train_rows).message.latents
        for row, real in enumerate(mask.sum(1).tolist()):
            seen = latents[row, :real]
            pooled = {"mean": seen.mean(0), "first": seen[0], "max": seen.amax(0)}[pool]
            assert torch.allclose(changes[row, 0].flatten(), 0.5 * own(pooled[None])[0], atol=1e-6)


@torch.no_grad()
def test_latent_adapters_see_real_latents_only_and_stand_where_they_were_asked() -> None:
    plain, made = twins("tiny-qwen", "latent adapters")
    stir(made, plain)
    assert sorted(made.bridge.ears[0].readers) == ["0", "1"]
    soft = made.hear(made.train_rows).soft
    hidden = torch.randn(len(TEXTS), 3, made.receiver.width)
    whole = soft.readers[1](hidden, soft)
    for row, real in enumerate(soft.mask.sum(1).tolist()):
        alone = lw.SoftPrompt(soft.embeds[row : row + 1, :real], None, soft.memory[row : row + 1, :real])
        assert torch.allclose(soft.readers[1](hidden[row : row + 1], alone)[0], whole[row], atol=1e-5)
    assert built("tiny-qwen", "", "--use_latent_adapters", "--latent_adapter_layers", "-1").bridge.shape.ears[
        0
    ].readers == (1,)


@pytest.mark.parametrize(
    ("asked", "wanted", "count"),
    [
        (["auto"], ["q_proj", "k_proj", "v_proj", "o_proj"], 2),
        (["attn_firstN:1"], ["q_proj", "k_proj", "v_proj", "o_proj"], 1),
        (["attn_mlp_firstN:1"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
        (["v_proj", "down_proj"], ["v_proj", "down_proj"], 2),
    ],
)
def test_which_layers_lora_adapts(asked: list[str], wanted: list[str], count: int) -> None:
    made = built("tiny-qwen", "", "--use_lora", "--lora_r", "3", "--lora_target_modules", *asked)
    layers = {name.split(".lora_")[0] for name in made.lora}
    assert {layer.rpartition(".")[2] for layer in layers} == set(wanted) and len(layers) == count * len(wanted)
    assert {min(p.shape) for p in made.lora.values()} == {3}
    assert all(name.startswith("1.") for name in made.lora)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(lw.LatentWireError, match=r"q_projj.*q_proj"):
        built("tiny-qwen", "", "--use_lora", "--lora_target_modules", "q_projj")
