"""What is there for speed alone gives the numbers of the plain way: the head's loss, groups of like widths, attention."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bridges import trainer
from test_losses import LATENT, examples
from test_models import load, tensor

import LATENTWIRE as lw

BASE = ["--steps", "4", "--batch_size", "7", "--normalize", "none"]


def ragged() -> list[lw.Example]:
    """Rows of which some are many times as long as others, in the text as in the answer."""
    lengths = (3, 90, 5, 40, 88, 7, 30)
    return examples(
        [f"text {i} " + "word " * n for i, n in enumerate(lengths)], [f"answer {'x' * n}" for n in reversed(lengths)]
    )


# ---- the loss under a frozen head --------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_head_s_own_output_becomes_the_gradient_of_cross_entropy(cap: float | None) -> None:
    torch.manual_seed(0)
    lm: Any = SimpleNamespace(head=torch.nn.Linear(16, 2**19 + 3), cap=cap)  # four rows at a time
    lm.head.requires_grad_(False)
    hidden, weights = torch.randn(11, 16, requires_grad=True), torch.rand(11)
    targets = torch.randint(0, 2**19, (11,))
    nats, best = lw.FrozenHeadLoss.apply(hidden, targets, lm)
    (mine,) = torch.autograd.grad((nats * weights).sum(), hidden)
    logits = lm.head(hidden)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    wanted = F.cross_entropy(logits, targets, reduction="none")
    (theirs,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    assert torch.allclose(nats, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) and theirs.abs().max() > 0.01
    assert best.tolist() == logits.argmax(-1).tolist() and not best.requires_grad


def test_no_float32_logits_are_kept_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load("tiny-qwen")
    monkeypatch.setattr(lw.LM, "logits", lambda *_: pytest.fail("the whole table"))
    packed = lw.lay_out(lm, None, [lm.ids("a b")] * 3, [lm.ids("cat")] * 3)
    assert lw.supervise(lm, packed).mean_per_row() > 0


# ---- groups of like widths ---------------------------------------------------------------------------------------


def cost(groups: list[list[int]], widths: list[int], overhead: int) -> int:
    return sum(len(group) * max(widths[i] for i in group) + overhead for group in groups)


def test_groups_cost_least() -> None:
    """Against every way to cut the rows, sorted by width, into runs."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        widths = torch.randint(1, 60, (6,), generator=generator).tolist()
        found = [group.tolist() for group in lw.by_width(torch.tensor(widths), overhead=20)]
        assert sorted(itertools.chain(*found)) == list(range(6))
        order = sorted(range(6), key=widths.__getitem__)
        ways = []
        for cuts in itertools.product([False, True], repeat=5):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
            ways.append(cost([order[a:b] for a, b in itertools.pairwise(edges)], widths, 20))
        assert cost(found, widths, 20) == min(ways)


def test_alike_rows_stay_together_and_other_devices_have_one_group() -> None:
    assert len(lw.by_width(torch.tensor([30] * 9))) == 1
    widths = torch.tensor([1, 900, 1, 900])
    assert [group.tolist() for group in lw.by_width(widths)] in ([[0, 2], [1, 3]], [[1, 3], [0, 2]])
    assert len(lw.by_width(widths.to("meta"))) == 1
    right = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert lw.widths_of(right).tolist() == [3, 1]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--encoder", "hidden", "--sender", "tiny-llama", "--pooler", "resampler", "--init", "none"],
        ["--use_deep_prefix", "--use_lora", "--lora_dropout", "0.3", "--use_latent_adapters", "--latent_keep_end", "0.5"],
    ],
)  # fmt: skip
def test_a_step_in_groups_has_the_loss_and_gradients_of_one(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*(LATENT if "hidden" not in flags else ["--receiver", "tiny-qwen"]), *BASE, *flags]
    part = lw.QuestionAnswering(lw.TrainSettings(dataset="toy", protocol="question-agnostic"))
    counts, plain = [], lw.by_width

    def counted(widths: torch.Tensor, overhead: int = 64) -> list[torch.Tensor]:
        groups = plain(widths, overhead)
        counts.append(len(groups))
        return groups

    def step(groups: Any) -> tuple[float, list[torch.Tensor]]:
        one = trainer(ragged(), *flags, part=part, own=True)
        one.prepare()
        one.bridge.train()
        torch.manual_seed(3)
        for parameter in one.parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape)
        monkeypatch.setattr(lw, "by_width", groups)
        value = one.backward(range(7))["loss"]
        return value, [p.grad for p in one.parameters if p.grad is not None]

    loss, gradients = step(counted)
    whole, wanted = step(lambda widths, overhead=64: [torch.arange(len(widths))])
    assert max(counts) > 1 and loss == pytest.approx(whole, rel=1e-5)
    assert len(gradients) == len(wanted) > 3
    largest = max(float(gradient.norm()) for gradient in wanted)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert float((mine - theirs).norm()) < 1e-4 * float(theirs.norm()) + 1e-6 * largest


def test_activations_that_are_computed_again_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputed block looks up what is being read: with groups it would be the last one."""
    one = trainer(ragged(), *LATENT, *BASE, "--gradient_checkpointing", own=True)
    one.prepare()
    batch, seen = one.hear(one.train_rows), []
    forward = one.receiver.forward
    monkeypatch.setattr(
        one.receiver, "forward", lambda packed, **o: seen.append(len(packed.mask)) or forward(packed, **o)
    )
    lw.supervise(one.receiver, batch.answered(batch.soft))
    assert seen == [7]


def test_messages_are_joined_in_their_places() -> None:
    a = lw.Message(torch.full((2, 3, 4), 1.0), "fp32", "x", torch.tensor([[True, True, False], [True, True, True]]))
    b = lw.Message(torch.full((1, 2, 4), 2.0), "fp32", "x", torch.tensor([[True, True]]))
    joined = lw.Message.of([a, b], torch.tensor([2, 0, 1]))
    assert [float(row.latents[0, 0, 0]) for row in joined.rows()] == [1.0, 2.0, 1.0]
    assert [row.latents.shape[1] for row in joined.rows()] == [3, 2, 2]
    whole = replace(a, mask=None)
    assert lw.Message.of([whole, whole], torch.arange(4)).mask is None


# ---- attention over short texts ----------------------------------------------------------------------------------


def attend(length: int, seen: int, heads: int, shared: int, dtype: torch.dtype, masked: bool) -> Any:
    """Our attention beside the library's, in a dtype and in float64: outputs and gradients of the query."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(length)
    shapes = [(2, heads, length, 16), (2, shared, seen, 16), (2, shared, seen, 16)]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    mask = (torch.rand(2, 1, length, seen) < 0.7) | (torch.arange(seen) == 0) if masked else None
    module = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True, training=False)
    results = []
    for attention, kind in (
        (lw.short_attention, dtype),
        (sdpa_attention_forward, dtype),
        (sdpa_attention_forward, torch.float64),
    ):
        inputs = [value.to(kind).requires_grad_() for value in values]
        output, _ = attention(module, *inputs, mask, scaling=0.3)
        gradients = torch.autograd.grad(output.double().square().sum(), inputs)
        results.append([output.double(), *(gradient.double() for gradient in gradients)])
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 1), (6, 2)])
def test_short_attention_is_as_near_to_the_truth_as_the_library_s(heads: int, shared: int, masked: bool) -> None:
    for mine, theirs, truth in zip(*attend(9, 9, heads, shared, torch.bfloat16, masked), strict=True):
        size = float(truth.norm())
        assert float((mine - truth).norm()) / size < max(1.5 * float((theirs - truth).norm()) / size, 5e-3)
    for mine, theirs, _ in zip(*attend(9, 9, heads, shared, torch.float32, masked), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "seen"), [(1, 12), (1100, 1100), (5, 12)])
def test_what_is_long_or_one_token_is_left_to_the_library(length: int, seen: int) -> None:
    mine, theirs, _ = attend(length, seen, 2, 1, torch.bfloat16, masked=False)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_only_bfloat16_on_a_cpu_takes_it_and_answers_alike() -> None:
    half, whole = (lw.load_lm("tiny-gemma", lw.ModelSettings(device="cpu", dtype=d)) for d in ("bfloat16", "float32"))
    assert half.config._attn_implementation == "latentwire" and whole.config._attn_implementation == "sdpa"
    packed = [lw.lay_out(lm, None, [lm.ids("the weather is"), lm.ids("x")], left=True) for lm in (half, whole)]
    mine, wanted = (lm.prefill(one).logits for lm, one in zip((half, whole), packed, strict=True))
    assert torch.allclose(mine, wanted, atol=0.05 * float(wanted.abs().max()))


# ---- answers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_beginnings_that_answers_share_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts = load("tiny-qwen"), ("card lost", "card lost abroad", "card late", "card", "top up", "pin", "pin")
    candidates = [[lm.ids(text) for text in texts], [lm.ids(text) for text in texts[2:]]]
    prefill = lm.prefill(lw.lay_out(lm, None, [lm.ids("which is it?"), lm.ids("and now")], left=True))
    plain = []
    for number, given in enumerate(candidates):
        for ids in given:
            state = prefill.rows(torch.tensor([number]))
            logits = [state.logits]
            for token in ids[:-1]:
                state = lm.extend(state, tensor([token]), torch.ones(1, 1, dtype=torch.bool))
                logits.append(state.logits)
            plain.append(float(sum(row.log_softmax(-1)[0, token] for row, token in zip(logits, ids, strict=True))))
    read = []
    advance = lm.advance
    monkeypatch.setattr(lm, "advance", lambda p, c, ids, real: read.append(ids.shape[0]) or advance(p, c, ids, real))
    found = lm.score(prefill, candidates)
    assert [score for row in found for score in row] == pytest.approx(plain, abs=1e-3)
    assert read == [4 + 3], (
        "'card los' is a beginning of 'card lost abroa', 'car' of 'card lat', and 'pin' stands twice"
    )


def test_a_cpu_without_packed_bfloat16_answers_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 alone: oneDNN refuses to reorder such weights, and the plain ones are used."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    lm = lw.load_lm("tiny-qwen", lw.ModelSettings(device="cpu", dtype="bfloat16"))
    lm.pack()
    assert not lm.packed and "forward" not in vars(lm.head)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 for this CPU")
def test_packed_weights_answer_alike_and_only_where_nothing_learns() -> None:
    settings = lw.ModelSettings(device="cpu", dtype="bfloat16")
    plain, packed = lw.load_lm("tiny-qwen", settings), lw.load_lm("tiny-qwen", settings)
    packed.pack()
    packed.pack()  # once is enough
    assert packed.packed and not plain.packed
    inputs = [lw.lay_out(lm, None, [lm.ids("the weather"), lm.ids("x")], left=True) for lm in (plain, packed)]
    wanted, found = (lm.prefill(one).logits for lm, one in zip((plain, packed), inputs, strict=True))
    assert torch.allclose(found, wanted, atol=0.03 * float(wanted.abs().max()))
    hidden = torch.randn(3, plain.width, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(plain.head(hidden), packed.head(hidden)) and packed.head(hidden).requires_grad


@pytest.mark.parametrize(("dtype", "total"), [("float32", 2**40), ("bfloat16", 2**10)])
def test_float32_and_models_as_large_as_memory_are_not_packed(dtype: str, total: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))
    lm = lw.load_lm("tiny-qwen", lw.ModelSettings(device="cpu", dtype=dtype))
    lm.pack()
    assert not lm.packed and "forward" not in vars(lm.head)


def test_equal_prompts_are_read_and_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant control: one prompt, many gold answers."""
    lm, part = load("tiny-qwen"), lw.make_task(lw.TrainSettings(dataset="toy"))
    end = lw.Receiver(lw.Prompting(lm, part, "Answer:"))
    golds = [*part.words, part.words[0], part.words[1]]
    given = [lw.Example(str(i), "", "", (gold,)) for i, gold in enumerate(golds)]
    soft = lw.SoftPrompt(torch.randn(1, 3, lm.width).expand(len(given), -1, -1))
    apart = [
        end.respond(end.prompting.pack(soft.rows(torch.tensor([i])), [e]), [e], [7])[0] for i, e in enumerate(given)
    ]
    read, prefill = [], lm.prefill
    monkeypatch.setattr(lm, "prefill", lambda packed: read.append(len(packed.mask)) or prefill(packed))
    found = end.respond(end.prompting.pack(soft, given), given, [7] * len(given))
    assert read == [1] and len(found) == len(given)
    for mine, alone in zip(found, apart, strict=True):
        assert replace(mine, scores=(), nll_per_token=0.0) == replace(alone, scores=(), nll_per_token=0.0)
        assert mine.nll_per_token == pytest.approx(alone.nll_per_token, rel=1e-4)
        assert mine.scores == pytest.approx(alone.scores, rel=1e-4)
    other = lw.SoftPrompt(soft.embeds + torch.arange(len(given))[:, None, None])
    end.respond(end.prompting.pack(other, given), given)
    assert read == [1, len(given)]
    drawing = lw.Receiver(end.prompting, how=lw.DecodeSettings(first_token_temperature=1.0))
    drawing.respond(end.prompting.pack(soft, given), given)
    assert read[2:] == [len(given)], "each draws its own first token"


def test_prompts_of_like_widths_are_answered_together_with_the_answers_of_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, part = load("tiny-gemma"), lw.make_task(lw.TrainSettings(dataset="toy"))
    end = lw.Receiver(lw.Prompting(lm, part, "Answer:"))
    texts = [f"{i} " + "word " * (120 if i % 3 else 2) for i in range(9)]
    given = [lw.Example(str(i), text, "", (part.words[i % 2],)) for i, text in enumerate(texts)]
    packed, read, prefill = end.prompting.pack(None, given, text=True), [], lm.prefill
    monkeypatch.setattr(lm, "prefill", lambda some: read.append(tuple(some.mask.shape)) or prefill(some))
    found = end.respond(packed, given)
    assert sorted(rows for rows, _ in read) == [3, 6] and min(width for _, width in read) < 40
    monkeypatch.setattr(lw, "by_width", lambda widths, overhead=64: [torch.arange(len(widths))])
    for mine, whole in zip(found, end.respond(packed, given), strict=True):
        assert mine.text == whole.text and mine.nll_per_token == pytest.approx(whole.nll_per_token, rel=1e-3)
        assert mine.scores == pytest.approx(whole.scores, rel=1e-3)
