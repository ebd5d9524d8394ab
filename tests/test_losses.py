"""§9 and §10: every loss against a computation by hand, and the schedules that steer them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bridges import TINY_RUN, ready, rows, stirred, trainer

import LATENTWIRE as lw

TEXTS = ("a first text, which is longer", "short one", "Zoë's naïve café")
ANSWERS = ("a cat", "b", "a dog in Rome")
LATENT = ["--encoder", "byte", "--receiver", "tiny-qwen", "--pooler", "window", "--init", "copy", "--ratio", "2",
          "--d_z", "64", "--windows_on", "receiver", "--protocol", "question-agnostic"]  # fmt: skip
ELSEWHERE = (
    "answer_ce",
    "k_token_ce",
    "first_token_ce",
    "selection",
    "swap",
)  # the last two are of another pooler, in test_mixed.py
KINDS = [name for name in lw.LOSSES if name not in ELSEWHERE]


given: Any = SimpleNamespace(head=torch.clone, cap=None, logits=torch.clone)
"""A model whose hidden states are its logits."""


def examples(texts: Sequence[str] = TEXTS, answers: Sequence[str] = ANSWERS) -> list[lw.Example]:
    return [lw.Example(str(i), t, "", (a,)) for i, (t, a) in enumerate(zip(texts, answers, strict=True))]


def made(*flags: str, own: Sequence[lw.Example] = ()) -> lw.Trainer:
    """A stirred bridge of ragged messages over question answering."""
    part = lw.QuestionAnswering(lw.TrainSettings(dataset="toy", protocol="question-agnostic"))
    return stirred(ready(own or examples(), *LATENT, *flags, part=part), 0.02)


@torch.no_grad()
def found(
    one: lw.Trainer,
    own: Sequence[lw.Example] = (),
    soft: lw.SoftPrompt | None = None,
    others: Sequence[lw.Example] = (),
    places: Sequence[int] = (),
) -> lw.Supervised:
    """What the losses see of the ``own`` rows; ``others`` are their partners, ``places`` those in a training stream."""
    heard = one.hear(own or one.train_rows, places=places)
    heard = replace(heard, soft=soft) if soft else heard
    heard = replace(heard, partners=one.hear(others, places=places)) if others else heard
    return lw.supervise(heard.receiver, heard.answered(heard.soft), heard)


@torch.no_grad()
def loss(name: str, seen: lw.Supervised, **settings: Any) -> float:
    return float(lw.LOSSES[name](lw.LossSettings(**settings)).term(seen))


@torch.no_grad()
def logits_alone(one: lw.Trainer, soft: torch.Tensor | None, ids: list[int]) -> torch.Tensor:
    """(T, V) of one row by the model's own forward: BOS, soft tokens, ids; no padding."""
    lm = one.receiver
    embeds = [lm.embed(torch.tensor([[*lm.bos, *ids]]).long())] if lm.bos or ids else []
    parts = [embeds[0][:, : len(lm.bos)]] if embeds else []
    parts += [soft[None]] if soft is not None else []
    parts += [embeds[0][:, len(lm.bos) :]] if embeds else []
    return lm.model(inputs_embeds=torch.cat(parts, 1), use_cache=False).logits[0]


def by_hand(one: lw.Trainer, soft: torch.Tensor | None, before: list[int], wanted: list[int]) -> torch.Tensor:
    """Logits (N, V) from which each of ``wanted`` is predicted."""
    return logits_alone(one, soft, [*before, *wanted[:-1]])[-len(wanted) :]


def nats(logits: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    return -logits.log_softmax(-1)[torch.arange(len(wanted)), torch.tensor(wanted)]


def prompts(seen: lw.Supervised) -> list[torch.Tensor]:
    """Each row's real soft tokens."""
    soft = seen.batch.soft
    return [row if soft.mask is None else row[soft.mask[i]] for i, row in enumerate(soft.embeds)]


def embedded_text(one: lw.Trainer) -> lw.SoftPrompt:
    """The very embeddings of the text prompt up to the anchor."""
    part = one.part
    heard = one.receiver.heard([part.receiver_text(example) for example in one.train_rows])
    return lw.SoftPrompt(heard.embeds, heard.mask)


# ---- the answer's cross-entropies --------------------------------------------------------------------------------


def test_answer_losses_are_means_over_rows_of_means_over_tokens() -> None:
    one = made()
    seen, prompting = found(one), one.prompting
    anchor, first, four, whole = one.receiver.ids(prompting.anchor), [], [], []
    for soft, example in zip(prompts(seen), one.train_rows, strict=True):
        ids = prompting.answer_ids(example.answers[0])
        each = nats(by_hand(one, soft, [*prompting.after(example, text=False)], ids), ids)
        first.append(float(each[0]))
        four.append(float(each[:2].mean()))
        whole.append(float(each.mean()))
    assert anchor
    for name, values in (("answer_ce", whole), ("k_token_ce", four), ("first_token_ce", first)):
        assert loss(name, seen, k_token_ce=2) == pytest.approx(sum(values) / 3, rel=1e-4), name


def test_entropy_of_the_first_token() -> None:
    one = made()
    seen = found(one)
    shares = seen.logits[seen.order == 0].softmax(-1)
    entropy = torch.distributions.Categorical(probs=shares).entropy().mean()
    assert loss("first_token_entropy", seen) == pytest.approx(-float(entropy), rel=1e-4)
    flat = replace(seen, lm=given, hidden=torch.zeros_like(seen.logits))
    assert loss("first_token_entropy", flat) == pytest.approx(-math.log(seen.logits.shape[1]), rel=1e-5)


# ---- distillation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "state_kd"])
def test_nothing_is_distilled_where_the_soft_prompt_is_the_text(name: str) -> None:
    part = lw.Toy(lw.TrainSettings(dataset="toy"))  # one token to a letter: nothing merges over a border
    one = stirred(ready(rows(["abcd wxyz", "dd"]), *LATENT, part=part))
    seen = found(one, soft=embedded_text(one))
    assert abs(loss(name, seen)) < 1e-6
    assert loss(name, found(one)) > 1e-3


@pytest.mark.parametrize(("tau", "count"), [(1.0, 99), (3.0, 99), (0.5, 1)])
def test_distillation_is_the_kl_from_the_text_reader(tau: float, count: int) -> None:
    one = made()
    seen, prompting, parts = found(one), one.prompting, []
    for soft, example in zip(prompts(seen), one.train_rows, strict=True):
        ids = prompting.answer_ids(example.answers[0])
        student = (by_hand(one, soft, prompting.after(example, text=False), ids) / tau).softmax(-1)
        teacher = (by_hand(one, None, prompting.after(example), ids) / tau).softmax(-1)
        parts.append((teacher * (teacher.log() - student.log())).sum(-1)[:count].mean())
    wanted = float(torch.stack(parts).mean()) * tau**2
    assert loss("kd", seen, kd_tau=tau, k_token_ce=count) == pytest.approx(wanted, rel=1e-3)


def test_distance_of_states_is_in_units_of_the_text_readers_own() -> None:
    one = made(own=examples(TEXTS[:1], ANSWERS[:1]))
    seen, prompting, lm = found(one), one.prompting, one.receiver
    ids = prompting.answer_ids(ANSWERS[0])
    before = {False: prompting.after(one.train_rows[0], text=False), True: prompting.after(one.train_rows[0])}
    states = []
    for text in (False, True):
        embeds = lm.embed(torch.tensor([[*before[text], *ids[:-1]]]))
        whole = embeds if text else torch.cat([prompts(seen)[0][None], embeds], 1)
        with torch.no_grad():
            hidden = lm.model(inputs_embeds=whole, output_hidden_states=True).hidden_states
        states.append([h[0, -len(ids) :][:3] for h in hidden])
    parts = [(s - t).square().mean() / t.square().mean() for s, t in zip(*states, strict=True)]
    for layer in (0, 1, 2):
        assert loss("state_kd", seen, state_kd_layers=[str(layer)], k_token_ce=3) == pytest.approx(
            float(parts[layer]), rel=1e-3
        )
    both = (parts[1] + parts[2]) / 2
    assert loss("state_kd", seen, state_kd_layers=["0.5", "-1"], k_token_ce=3) == pytest.approx(float(both), rel=1e-3)


# ---- the soft prompt itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "mse", "both"])
def test_alignment_is_nothing_at_the_answers_own_embeddings(metric: str) -> None:
    one = made()
    gold = [one.receiver.continuation(one.prompting.anchor, f" {answer}") for answer in ANSWERS]
    assert len({*map(len, gold)}) == 3  # a mean over all tokens would be another
    ids, mask = lw.pad_rows(gold, one.receiver.pad, one.receiver.device)
    seen = found(one, soft=lw.SoftPrompt(one.receiver.embed(ids), mask))
    for name in ("latent_align", "latent_prefix_align"):
        assert abs(loss(name, seen, latent_align_metric=metric)) < 1e-5
    plain = found(one)
    own, wanted = plain.batch.soft.embeds[:, 0], one.receiver.embed(ids[:, 0])
    cosine = float(1 - torch.nn.functional.cosine_similarity(own, wanted).mean())
    square = float((own - wanted).square().mean()) / one.receiver.embed_rms**2
    by_name = {"cosine": cosine, "mse": square, "both": cosine + square}
    assert loss("latent_align", plain, latent_align_metric=metric) == pytest.approx(by_name[metric], rel=1e-4)
    rows_of = [
        (s[: len(g)], one.receiver.embed(torch.tensor(g))[: len(s)]) for s, g in zip(prompts(plain), gold, strict=True)
    ]
    cosine = sum(float(1 - torch.nn.functional.cosine_similarity(s, g).mean()) for s, g in rows_of) / 3
    square = sum(float((s - g).square().mean()) for s, g in rows_of) / 3 / one.receiver.embed_rms**2
    by_name = {"cosine": cosine, "mse": square, "both": cosine + square}
    assert loss("latent_prefix_align", plain, latent_align_metric=metric) == pytest.approx(by_name[metric], rel=1e-4)


def test_alignment_and_gist_with_nothing_to_compare_cost_nothing() -> None:
    one = made("--use_gist_head", "--gist_mask_prob", "0.999999")
    seen = found(one, places=range(3))
    blind = replace(seen.batch.soft, mask=torch.zeros_like(seen.batch.soft.mask))
    seen = replace(seen, forward=replace(seen.batch, soft=blind))
    assert loss("latent_prefix_align", seen) == loss("gist", seen) == 0
    assert loss("gist", found(one)) > 0.1  # rows outside a training stream have no keys, and nothing is masked


def test_a_perfect_gist_head_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made("--use_gist_head", "--gist_mask_prob", "0", "--gist_target_len", "5", "--gist_weight", "1")
    lm, head = one.receiver, one.bridge.ears[0].gist
    ids, mask = lw.pad_rows([lm.ids(text)[:5] for text in TEXTS], lm.pad, lm.device)
    wanted, seen = lm.embed(ids) / lm.embed_rms, found(one)
    with torch.no_grad():
        drawn = head(seen.batch.message.latents, seen.batch.message.mask)
    assert drawn.shape == (3, 5, lm.width)
    assert loss("gist", seen) == pytest.approx(float((drawn - wanted)[mask].square().mean()), rel=1e-4)
    monkeypatch.setattr(type(head), "forward", lambda self, latents, mask: wanted)
    assert loss("gist", seen) == 0


def test_the_gist_head_looks_at_real_latents_and_must_be_there() -> None:
    one = made("--use_gist_head")
    message, head = found(one).batch.message, one.bridge.ears[0].gist
    with torch.no_grad():
        whole = head(message.latents, message.mask)
        alone = [head(row.latents, None)[0] for row in message.rows()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, alone, strict=True))
    with pytest.raises(lw.LatentWireError, match="--use_gist_head"):
        loss("gist", found(made()))


def test_table_statistics_scale_and_size_are_nothing_at_their_targets() -> None:
    one = made()
    lm, seen = one.receiver, found(one)
    ids = torch.linspace(0, lm.table.weight.shape[0] - 1, 8192).long().unique()
    heard = seen.batch
    table = replace(seen, forward=replace(heard, soft=lw.SoftPrompt(lm.embed(ids)[None])))
    assert loss("manifold", table) < 1e-10
    mean, deviation = lm.embed(ids).mean(0), lm.embed(ids).std(0, correction=0)
    parts = [
        (own.mean(0) - mean).square().mean() + (own.std(0, correction=0) - deviation).square().mean()
        for own in prompts(seen)
    ]
    assert loss("manifold", seen) == pytest.approx(float(sum(parts)) / 3 / lm.embed_rms**2, rel=1e-4)
    lone = replace(seen, forward=replace(heard, soft=lw.SoftPrompt(lm.embed(ids[:1])[None])))
    assert math.isfinite(loss("manifold", lone))
    adapter = one.bridge.ears[0].adapter
    with torch.no_grad():
        adapter.scale.fill_(1.0)
        assert loss("scale", seen) == 0
        adapter.scale.fill_(1.5)
    assert loss("scale", seen) == pytest.approx(0.25)
    raw = [adapter.raw(row.latents)[0].square().mean().sqrt() / lm.embed_rms for row in heard.message.rows()]
    assert loss("rms", seen) == pytest.approx(sum(float((r.detach() - 1) ** 2) for r in raw) / 3, rel=1e-4)
    with torch.no_grad():
        adapter.map.weight.zero_()
        adapter.map.bias.fill_(lm.embed_rms)
    assert loss("rms", seen) < 1e-10


def test_diversity_compares_prompts_with_other_answers_only() -> None:
    one = made(own=examples((*TEXTS, "a fourth"), ("yes", "no", "yes", "yes")))
    pairs = ((0, 1), (1, 2), (2, 1), (3, 1))
    seen = found(one, others=[one.train_rows[j] for _, j in pairs])
    assert seen.batch.partners and seen.batch.partners.soft.embeds.shape[1] < seen.batch.soft.embeds.shape[1]
    flat = torch.nn.utils.rnn.pad_sequence(prompts(seen), batch_first=True).flatten(1)
    cosines = [torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0) for i, j in pairs]
    assert loss("diversity", seen) == pytest.approx(float(sum(cosines)) / 4, abs=1e-5)
    met = {(one.train_rows[lw.row_at(one.settings.seed, place, 4)].id, one.partner_of(place).id) for place in range(60)}
    assert met == {("0", "1"), ("2", "1"), ("3", "1"), ("1", "0"), ("1", "2"), ("1", "3")}
    alike = [replace(example, answers=("yes",)) for example in one.train_rows]
    with pytest.raises(lw.LatentWireError, match="--diversity_weight compares rows of different answers"):
        assert made("--diversity_weight", "1", own=alike).compares


# ---- the text itself ---------------------------------------------------------------------------------------------


def test_reconstruction_is_the_cross_entropy_of_the_texts_first_tokens() -> None:
    one = made()
    seen, lm, parts = found(one), one.receiver, []
    for soft, text in zip(prompts(seen), TEXTS, strict=True):
        ids = lm.ids(text)[:6]
        parts.append(float(nats(by_hand(one, soft, lm.ids("\nText:"), ids), ids).mean()))
    assert loss("reconstruction", seen, language_tokens=6) == pytest.approx(sum(parts) / 3, rel=1e-4)


@pytest.mark.parametrize("on", ["encoder", "receiver"])
@pytest.mark.parametrize("reads", [["--encoder", "byte"], ["--encoder", "hidden", "--sender", "tiny-llama"]])
def test_continuation_hears_the_first_half_and_says_the_second(
    reads: list[str], on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*reads, "--windows_on", on]
    one = made(*flags)
    sent: list[lw.Message] = []
    decode = lw.Bridge.decode

    def noting(self: lw.Bridge, message: lw.Message, ear: int = 0, keys: Sequence[int] = ()) -> lw.SoftPrompt:
        sent.append(message)
        return decode(self, message, ear, keys)

    monkeypatch.setattr(lw.Bridge, "decode", noting)
    value = loss("continuation", found(one), language_tokens=5)
    half, parts = sent[-1], []
    for row, text in zip(half.rows(), TEXTS, strict=True):
        ids = one.receiver.ids(text[len(text) // 2 :])[:5]
        with torch.no_grad():
            soft = decode(one.bridge, row).embeds[0]
        parts.append(float(nats(by_hand(one, soft, [], ids), ids).mean()))
    assert value == pytest.approx(sum(parts) / 3, rel=1e-4)
    texts = [text[: len(text) // 2] + "#" * (len(text) - len(text) // 2) for text in TEXTS]
    for row, text in enumerate(texts):  # a text whose other half is another one
        own = examples([text], ANSWERS[:1])
        one.train_rows, one.validation_rows = own, []
        one.progress.step = 1  # keeps what was fitted
        one.prepare()
        loss("continuation", found(one))
        assert torch.allclose(sent[-1].latents[0], half.rows()[row].latents[0], atol=1e-5)
        assert not torch.allclose(sent[-2].latents[0], sent[-1].latents[0][:1], atol=1e-3)


def test_continuation_needs_windows_and_bears_texts_without_a_first_half() -> None:
    one = made(own=examples(("x", ""), ("a", "b")))
    assert math.isfinite(loss("continuation", found(one))) and math.isfinite(loss("reconstruction", found(one)))
    other = ready(
        examples(), "--encoder", "byte", "--pooler", "resampler", "--receiver", "tiny-qwen", "--latent_len", "3"
    )
    with pytest.raises(lw.LatentWireError, match="--pooler window"):
        loss("continuation", found(other))


def test_contrast_wants_other_texts_latents_to_be_worse_by_a_margin() -> None:
    one = made()
    last = [one.train_rows[i - 1] for i in range(3)]
    seen, prompting, gains = found(one, others=last), one.prompting, []
    softs = prompts(seen)
    for row, example in enumerate(one.train_rows):
        ids, before = prompting.answer_ids(example.answers[0]), prompting.after(example, text=False)
        own, other = (nats(by_hand(one, soft, before, ids), ids).mean() for soft in (softs[row], softs[row - 1]))
        gains.append(float(other - own))
    for margin in (0.0, 0.5, 3.0):
        wanted = sum(max(0.0, margin - gain) for gain in gains) / 3
        assert loss("contrast", seen, contrast_margin=margin) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    better = replace(seen, lm=given, hidden=torch.nn.functional.one_hot(seen.targets, seen.logits.shape[1]) * 99.0)
    assert loss("contrast", better, contrast_margin=0.5) == 0
    lone = found(one, one.train_rows[:1], others=last[:1])  # one row is compared as well as many
    assert loss("contrast", lone, contrast_margin=3.0) == pytest.approx(max(0.0, 3.0 - gains[0]), rel=1e-3)


APART = ("selection", "swap", "manifold", "contrast", "diversity", "gist", "state_kd", "latent_prefix_align")


@pytest.mark.parametrize("name", [name for name in lw.LOSSES if name not in APART])
def test_a_batch_costs_the_mean_of_its_rows(name: str) -> None:
    """Empty slots and neighbours do not count; the terms left out compare rows with each other or tokens with tokens."""
    one = made()
    each = [loss(name, found(one, [row])) for row in one.train_rows]
    assert loss(name, found(one)) == pytest.approx(sum(each) / 3, rel=2e-4)


def test_empty_slots_change_no_loss() -> None:
    """Two rows cost the same beside a third one of zero length's weight: longer, so that it leaves them empty slots."""
    one = made("--use_gist_head", "--gist_mask_prob", "0")
    long = replace(one.train_rows[1], id="9")
    pair = found(one, [one.train_rows[1], long], others=one.train_rows[::2])

    def wider(heard: lw.ForwardContext) -> lw.ForwardContext:
        soft, message = heard.soft, heard.message
        wide = torch.nn.functional.pad(soft.embeds, (0, 0, 0, 4), value=7.0)
        mask = torch.nn.functional.pad(soft.mask, (0, 4))
        latents = torch.nn.functional.pad(message.latents, (0, 0, 0, 4), value=7.0)
        softer = replace(soft, embeds=wide, mask=mask, memory=latents)
        return replace(heard, soft=softer, message=replace(message, latents=latents, mask=mask))

    assert pair.batch.partners
    heard = wider(replace(pair.batch, partners=wider(pair.batch.partners)))
    with torch.no_grad():
        padded = lw.supervise(heard.receiver, heard.answered(heard.soft), heard)
    for name in {*lw.LOSSES} - {"selection", "swap"}:
        assert loss(name, padded) == pytest.approx(loss(name, pair), rel=1e-4, abs=1e-6), name


# ---- in training -------------------------------------------------------------------------------------------------


@pytest.mark.trains
def test_every_loss_trains_alone_and_is_logged(tmp_path: Path) -> None:
    for name in KINDS:
        flags = [*TINY_RUN, *LATENT, "--use_gist_head", "--steps", "3", "--val_samples", "0", "--samples", "4"]
        flags += [f"--{kind}_weight=0" for kind in ELSEWHERE]
        flags += [f"--{name}_weight=1", "--lr", "3e-4", "--warmup_steps", "0", "--gist_mask_prob", "0"]
        lw.train_main([*flags, "--output_dir", str(tmp_path / name)])
        log = lw.read_rows(tmp_path / name / "diagnostics.jsonl")
        values = [row[f"loss_{name}"] for row in log]
        assert len(values) == 3 and all(math.isfinite(value) for value in values), name
        assert [row["loss"] for row in log] == pytest.approx(values)
        assert not any(key.startswith("loss_") and key != f"loss_{name}" for row in log for key in row)
        assert values[-1] < values[0] or name == "scale", (name, values)
        assert all(math.isfinite(row["grad_norm"]) for row in log)


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_reaches_the_bridge(name: str) -> None:
    one = made("--use_gist_head")
    heard = replace(one.hear(one.train_rows), partners=one.hear(one.train_rows[::-1]))
    seen = lw.supervise(heard.receiver, heard.answered(heard.soft), heard)
    value = lw.LOSSES[name](lw.LossSettings(contrast_margin=9.0)).term(seen)
    value.backward()
    grads = [p.grad for p in one.bridge.parameters() if p.grad is not None]
    assert grads and sum(float(grad.abs().sum()) for grad in grads) > 0
    assert all(grad.isfinite().all() for grad in grads)
    assert all(p.grad is None for p in one.receiver.model.parameters())


def test_the_total_is_the_weighted_sum() -> None:
    one = made()
    settings = lw.LossSettings(kd_weight=0.3, rms_weight=2.0, k_token_ce_weight=0)
    with torch.no_grad():
        total, values = lw.total_loss(found(one), settings)
    assert set(values) == {f"loss_{n}" for n in ("answer_ce", "first_token_ce", "kd", "rms")}
    wanted = (
        values["loss_answer_ce"]
        + 0.5 * values["loss_first_token_ce"]
        + 0.3 * values["loss_kd"]
        + 2 * values["loss_rms"]
    )
    assert float(total) == pytest.approx(wanted, rel=1e-5)


# ---- schedules ---------------------------------------------------------------------------------------------------


def test_the_first_tokens_weight_over_a_run() -> None:
    plain = lw.LossSettings(first_token_ce_weight=0.5)
    assert [lw.first_token_weight(plain, step, 1000) for step in (1, 500, 1000)] == [0.5] * 3
    cosine = lw.LossSettings(first_token_ce_weight=0.5, first_token_ce_schedule="cosine", first_token_ce_peak=8.5)
    wanted = {1: 8.5, 400: 8.5, 550: 0.5 + 8 * (1 + math.cos(math.pi / 4)) / 2, 700: 4.5, 1000: 0.5}
    assert {step: lw.first_token_weight(cosine, step, 1000) for step in wanted} == pytest.approx(wanted)
    held = lw.LossSettings(first_token_ce_schedule="cosine", first_token_ce_warmup_frac=1.0)
    assert lw.first_token_weight(held, 1000, 1000) == 8.0
    warm = lw.LossSettings(first_token_ce_weight=2.0, first_token_ce_schedule="warmup")
    assert [lw.first_token_weight(warm, step, 1000) for step in (1, 50, 200, 900)] == [0.01, 0.5, 2.0, 2.0]


@pytest.mark.parametrize(("lag", "factor"), [(0.25, 1.0), (1.0, 1.0), (3.0, 3.0), (20.0, 8.0)])
def test_autoscale_raises_the_first_token_while_it_lags(lag: float, factor: float) -> None:
    """By each row's own lag: that of the first row is ``lag``, of the second 1; both answers cost 2 nats a token."""
    costs = torch.full((2, 40), 2.0, dtype=torch.float64)
    costs[0, 0], costs[0, 1:] = 2 * lag, (80 - 2 * lag) / 39
    logits = torch.stack([torch.zeros(80), costs.flatten().expm1().log().float()], 1)  # -log softmax of 0 is the cost
    row, order = torch.arange(2).repeat_interleave(40), torch.arange(40).repeat(2)
    seen = lw.Supervised(given, logits, torch.zeros(80, dtype=torch.long), row, order)
    for auto in (False, True):
        total, values = lw.total_loss(seen, lw.LossSettings(first_token_autoscale=auto, k_token_ce_weight=0))
        first = ((factor if auto else 1.0) * 2 * lag + 2) / 2
        assert float(total) == pytest.approx(2.0 + 0.5 * first, rel=1e-5)
        assert values == pytest.approx({"loss_answer_ce": 2.0, "loss_first_token_ce": lag + 1}, rel=1e-5)


def test_k_moves_in_a_line() -> None:
    one = trainer(examples(), *LATENT, "--steps", "9", "--adaptive_k_start", "1", "--adaptive_k_end", "9")
    assert [one.scheduled(step).k_token_ce for step in range(1, 10)] == list(range(1, 10))
    up = trainer(examples(), *LATENT, "--steps", "9", "--adaptive_k_end", "12", "--k_token_ce", "4")
    assert [up.scheduled(step).k_token_ce for step in (1, 5, 9)] == [4, 8, 12]
    still = trainer(examples(), *LATENT, "--steps", "9")
    assert still.scheduled(5) is still.settings


def test_the_ratio_changes_after_each_third_and_validation_takes_the_last() -> None:
    one = ready(examples(), *LATENT, "--ratio", "1", "2", "4", "--steps", "30")
    seen = []
    for step in range(1, 31):
        one.scheduled(step)
        seen.append(one.bridge.ratio)
    assert seen == [1.0] * 10 + [2.0] * 10 + [4.0] * 10
    counts = []
    for step in (0, 15, 29):
        one.progress.step = step
        one.scheduled(step + 1)
        counts.append(int(found(one).batch.message.mask.sum(1)[0]))
    ids = len(one.receiver.ids(TEXTS[0]))
    assert counts == [ids, math.ceil(ids / 2), math.ceil(ids / 4)]
    one.scheduled(1)
    one.validate()
    assert one.bridge.ratio == 4.0


def test_latents_are_quantised_from_the_said_part_on() -> None:
    one = trainer(examples(), *LATENT, "--steps", "11", "--quantize_from", "0.5", "--codec", "int4")
    seen = []
    for step in range(1, 12):
        one.scheduled(step)
        seen.append(one.bridge.quantize)
    assert seen == [False] * 5 + [True] * 6
    never = trainer(examples(), *LATENT, "--steps", "11")
    never.scheduled(11)
    assert not never.bridge.quantize
    always = trainer(examples(), *LATENT, "--steps", "11", "--codec", "fsq4")
    always.scheduled(1)
    assert always.bridge.quantize


@pytest.mark.parametrize(("start", "end", "power", "progress", "kept"),
                         [(0.2, 1.0, 1.0, 0.5, 0.6), (1.0, 0.5, 2.0, 0.5, 0.875), (0.3, 0.3, 1.0, 0.1, 0.3)])  # fmt: skip
def test_latent_dropout_keeps_the_said_share(
    start: float, end: float, power: float, progress: float, kept: float
) -> None:
    settings = lw.ScheduleSettings(latent_keep_start=start, latent_keep_end=end, latent_keep_power=power)
    soft, keys = lw.SoftPrompt(torch.zeros(60, 50, 4)), [1000 + 7 * i for i in range(60)]
    mask = lw.dropped(soft, keys, settings, progress).mask
    assert float(mask.float().mean()) == pytest.approx(kept, abs=0.03)
    some = [lw.dropped(soft.rows(torch.tensor([i])), keys[i : i + 1], settings, progress).mask[0] for i in (0, 13, 59)]
    assert all(torch.equal(own, mask[i]) for own, i in zip(some, (0, 13, 59), strict=True))
    assert len({tuple(row.tolist()) for row in mask}) > 50


def test_latent_dropout_leaves_one_real_latent_at_least() -> None:
    settings = lw.ScheduleSettings(latent_keep_start=0.01, latent_keep_end=0.01)
    real = torch.arange(6)[None] < torch.randint(1, 7, (80, 1), generator=torch.Generator().manual_seed(0))
    mask = lw.dropped(lw.SoftPrompt(torch.zeros(80, 6, 4), real), list(range(80)), settings, 0.5).mask
    assert (mask.sum(1) >= 1).all() and not (mask & ~real).any() and mask.sum() < 100
    whole = lw.SoftPrompt(torch.zeros(2, 6, 4), real[:2])
    assert lw.dropped(whole, [1, 2], lw.ScheduleSettings(), 0.5) is whole


def test_latent_dropout_is_the_rows_own_in_any_micro_batch() -> None:
    flags = ["--latent_keep_start", "0.5", "--latent_keep_end", "0.5", "--dropout", "0.2", "--kd_weight", "1"]
    flags += [
        "--latent_align_weight",
        "1",
        "--reconstruction_weight",
        "1",
        "--continuation_weight",
        "1",
        "--rms_weight",
        "1",
    ]
    own = examples((*TEXTS, "a fourth text"), (*ANSWERS, "x"))
    totals = []
    for size in (4, 2, 1):
        one = made(*flags, "--sender", "tiny-llama", "--encoder", "hidden", own=own)
        one.bridge.train()
        values = one.gradients(1, size)
        totals.append((values["loss"], torch.cat([p.grad.flatten() for p in one.parameters if p.grad is not None])))
    for value, grads in totals[1:]:
        assert value == pytest.approx(totals[0][0], rel=1e-5)
        assert torch.allclose(grads, totals[0][1], atol=1e-5 * float(grads.abs().max()))
    plain = made("--kd_weight", "1", own=own)
    plain.bridge.train()
    assert plain.hear(own, places=range(4)).soft.mask.sum() > one.hear(own, places=range(4)).soft.mask.sum()


# ---- stage A -----------------------------------------------------------------------------------------------------


def test_text_steps_alternate_in_the_beginning() -> None:
    def steps(*flags: str) -> list[int]:
        one = trainer(examples(), *LATENT, "--steps", "40", "--batch_size", "3", *flags)
        return [step for step in range(1, 41) if one.reads_text(step)]

    assert steps() == [] and steps("--stages", "B,C") == []
    assert steps("--stages", "A,B") == [1, 3, 5, 7, 9]
    assert steps("--stages", "A", "--warmup_text_latent_steps", "4") == [1, 3]
    assert steps("--warmup_text_latent_epochs", "6") == [1, 3, 5]
    tail = steps("--stages", "A", "--warmup_tail_prob", "0.5")
    assert tail[:5] == [1, 3, 5, 7, 9] and 8 <= len(tail[5:]) <= 22
    with pytest.raises(lw.LatentWireError, match="stages"):
        steps("--stages", "D")


def test_a_text_step_pulls_each_prompt_to_its_texts_own_embeddings() -> None:
    """The text is spread evenly over the row's own latents, however many others of the batch have."""
    one = made("--windows_on", "encoder")
    with torch.no_grad():
        heard = one.hear(one.train_rows)
        value, seen = lw.text_step(heard, one.settings)
    gaps, lm = [], one.receiver
    for text, count, soft in zip(TEXTS, heard.message.mask.sum(1).tolist(), heard.soft.embeds, strict=True):
        ids = lm.ids(text)
        places = [i * count // len(ids) for i in range(len(ids))]
        own = [[token for token, place in zip(ids, places, strict=True) if place == slot] for slot in range(count)]
        wanted = torch.stack([lm.embed(torch.tensor(tokens)).mean(0) for tokens in own])
        gaps.append(float((soft[:count] - wanted).square().mean()) / lm.embed_rms**2)
    assert float(value) == pytest.approx(sum(gaps) / 3, rel=1e-4)
    told = [nats(by_hand(one, None, one.prompting.after(e), ids), ids)
            for e in one.train_rows for ids in [one.prompting.answer_ids(e.answers[0])]]  # fmt: skip
    assert torch.allclose(seen.nats, torch.cat(told), atol=1e-3)


@pytest.mark.trains
@pytest.mark.parametrize("lora", [[], ["--use_lora"]], ids=["bridge", "lora"])
def test_stage_a_lowers_the_distance_to_the_text(lora: list[str], tmp_path: Path) -> None:
    flags = [
        "--encoder",
        "byte",
        "--receiver",
        "tiny-qwen",
        "--pooler",
        "resampler",
        "--latent_len",
        "4",
        "--stages",
        "A,B",
        "--lr",
        "1e-2",
        *lora,
    ]
    lw.train_main([*TINY_RUN, *flags, "--steps", "16", "--warmup_text_latent_steps", "12", "--val_samples", "0",
                   "--output_dir", str(tmp_path / "run")])  # fmt: skip
    log = lw.read_rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["step"] for row in log if row.get("mode") == "text"] == [1, 3, 5, 7, 9, 11]
    told = [row["loss_text_align"] for row in log if "loss_text_align" in row]
    assert len(told) == 6 and sum(told[-2:]) < sum(told[:2])
    assert all(("loss_answer_ce" in row) != ("loss_text_align" in row) for row in log)


def test_only_lora_can_learn_from_the_text_itself() -> None:
    for flags, learns in (([], False), (["--use_lora"], True)):
        one = made(*flags)
        heard = one.hear(one.train_rows)
        value, seen = lw.text_step(heard, one.settings)
        align, _ = lw.text_step(
            replace(heard, prompting=one.prompting), one.settings.model_copy(update={"text_align_weight": 0.0})
        )
        assert (float(align.detach()) > 1) == learns and float(value.detach()) > float(align.detach())
        if learns:
            value.backward()
            assert any(float(p.grad.abs().sum()) > 0 for p in one.lora.values() if p.grad is not None)
            assert seen.nats.requires_grad
