"""§7 and §8: latents that start as the receiver's own embeddings, windows, ragged messages, several receivers."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import LATENTWIRE as lw

CPU = lw.ModelSettings(device="cpu", dtype="float32")
TINY = ("tiny-llama", "tiny-qwen", "tiny-gemma")
NEXT = dict(zip(TINY, TINY[1:] + TINY[:1], strict=True))
TEXTS = (
    "The other man heard thunder in the valley.",
    "Zoë's naïve café costs 9 €  – überall",
    "👍🏽 an emoji, and 日本語",
    "x",
)
TINY_RUN = ["--device", "cpu", "--dtype", "float32", "--dataset", "toy", "--state_cache", "memory", "--steps", "8",
            "--batch_size", "4", "--width", "32", "--heads", "2", "--depth", "1", "--dropout", "0", "--codec", "fp32"]  # fmt: skip
COPY = ["--pooler", "window", "--init", "copy", "--ratio", "1", "--windows_on", "receiver", "--d_z", "64"]


@functools.cache
def load(name: str) -> lw.LM:
    return lw.load_lm(name, CPU)


def rows(texts: Sequence[str], answers: Sequence[str] = ("a", "b", "c", "d")) -> list[lw.Example]:
    found = zip(texts, itertools.cycle(range(len(answers))), strict=False)
    return [lw.Example(str(i), text, "", (answers[label],), label) for i, (text, label) in enumerate(found)]


def trainer(examples: Sequence[lw.Example], *flags: str, part: lw.Task | None = None, own: bool = False) -> lw.Trainer:
    """A trainer on own examples; its frozen models are shared by the tests unless they are to be its ``own``."""
    settings, _ = lw.resolve(lw.settings_from(lw.TrainSettings, [*TINY_RUN, *flags])[0])
    get = (lambda name: lw.load_lm(name, CPU)) if own or settings.use_lora or settings.gradient_checkpointing else load
    receiver, *others = [get(name) for name in lw.receivers_of(settings)]
    splits = {"train": list(examples), "validation": list(examples)}
    part = part or lw.make_task(settings)
    setup = lw.Setup(lw.open_reader(settings), receiver, part, splits, "here", others=tuple(others))
    return lw.Trainer(settings, lw.Run(Path("nowhere")), setup, lw.Silent())


def ready(examples: Sequence[lw.Example], *flags: str, part: lw.Task | None = None, own: bool = False) -> lw.Trainer:
    """The same with states, statistics and closed-form start, in evaluation mode."""
    made = trainer(examples, *flags, part=part, own=own)
    made.prepare()
    made.bridge.eval()
    return made


@torch.no_grad()
def stirred(made: lw.Trainer, size: float = 0.1) -> lw.Trainer:
    """Weights as if something had been learned: what starts as zero is not zero any more."""
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return made


@torch.no_grad()
def encoded(made: lw.Trainer, examples: Sequence[lw.Example], ear: int = 0) -> lw.Message:
    return made.hear(examples, ear).message


def listener(made: lw.Trainer, ear: int = 0) -> lw.Receiver:
    return lw.Receiver(made.promptings[ear], made.bridge, 6)


def packets(made: lw.Trainer, examples: Sequence[lw.Example], ear: int = 0) -> list[bytes]:
    message = replace(encoded(made, examples, ear), bridge=made.bridge.language(ear))
    return [row.to_bytes() for row in message.rows()]


def sums(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


# ---- latents that are the text itself ----------------------------------------------------------------------------


def assert_heard_as_text(made: lw.Trainer, examples: Sequence[lw.Example]) -> None:
    """The receiver gives the same logits, label scores and words to the message as to the text's own ids."""
    prompting, lm = made.prompting, made.receiver
    texts = [[*lm.ids(example.context), *lm.ids(prompting.anchor)] for example in examples]
    gold = [prompting.answer_ids("some words") for _ in examples]
    with torch.no_grad():
        heard = made.hear(examples)
        own = lw.supervise(lm, prompting.joined(heard.soft, [lm.ids(prompting.anchor)] * len(examples), gold)).logits
        wanted = lw.supervise(lm, prompting.joined(None, texts, gold)).logits
        told = listener(made).respond(prompting.joined(None, texts, None, left=True), examples)
    assert float((own - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    for mine, theirs in zip(listener(made).answers(examples, packets(made, examples)), told, strict=True):
        assert mine.text == theirs.text and mine.first_correct == theirs.first_correct
        assert mine.scores == pytest.approx(theirs.scores, abs=2e-4)
        assert mine.nll_per_token == pytest.approx(theirs.nll_per_token, abs=2e-4)


@pytest.mark.parametrize("encoder", ["byte", "hidden"])
@pytest.mark.parametrize("name", TINY)
def test_untrained_copies_at_ratio_1_are_heard_as_the_text(name: str, encoder: str) -> None:
    reads = ["--encoder", "byte"] if encoder == "byte" else ["--sender", NEXT[name], "--encoder", "hidden"]
    made = ready(rows(TEXTS), *reads, "--receiver", name, *COPY)
    assert_heard_as_text(made, made.train_rows)
    assert encoded(made, made.train_rows).mask.sum(1).tolist() == [len(made.receiver.ids(text)) for text in TEXTS]


@pytest.mark.parametrize("adapter", [["--adapter", "mlp"], ["--film"], ["--use_latent_refiner"]])
def test_parts_that_start_as_nothing_leave_the_copy_exact(adapter: list[str]) -> None:
    made = ready(rows(TEXTS), "--encoder", "byte", "--receiver", "tiny-qwen", *COPY, *adapter)
    assert_heard_as_text(made, made.train_rows)


@pytest.mark.parametrize(("sender", "receiver"), [("tiny-llama", "tiny-llama"), ("tiny-llama", "tiny-gemma")])
def test_windows_of_encoder_tokens_copy_exactly_where_tokens_align(sender: str, receiver: str) -> None:
    """Single bytes on both sides; the texts have none of tiny-gemma's merged pairs."""
    flags = ["--sender", sender, "--receiver", receiver, *COPY, "--windows_on", "encoder"]
    made = ready(rows(["bold moves cost us", "Why?"]), *flags)
    assert_heard_as_text(made, made.train_rows)


@pytest.mark.parametrize("on", ["encoder", "receiver"])
def test_tokenizers_that_trim_offsets_lose_no_token(on: str) -> None:
    """Llama 3 says that a blank before a word stands for no character."""
    from tokenizers import processors

    made = trainer(rows(["two  blanks here", "a b"]), "--encoder", "byte", "--receiver", "tiny-qwen", *COPY, own=True)
    inner = made.receiver.tokenizer.backend_tokenizer
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    assert (2, 2) in made.receiver.tokenizer("a  b", return_offsets_mapping=True).offset_mapping
    spans = made.receiver.pieces("two  blanks")[1]
    assert [b for _, b in spans] == [a for a, _ in spans[1:]] + [11] and all(a < b for a, b in spans)
    made.bridge.shape = replace(
        made.bridge.shape, settings=made.bridge.shape.settings.model_copy(update={"windows_on": on})
    )
    made.prepare()
    made.bridge.eval()
    if on == "receiver":
        assert_heard_as_text(made, made.train_rows)
    shares = made.bridge.windows(made.hear(made.train_rows).states).receiver_tokens
    assert torch.allclose(shares.sum(1), made.receiver.heard([e.context for e in made.train_rows]).mask.float())


def rank(x: torch.Tensor, basis: torch.Tensor) -> float:
    """Squared error of rows that pass through an orthonormal basis (D, d) around their mean."""
    centred = x - x.mean(0)
    return float((centred - centred @ basis @ basis.T).square().mean())


@pytest.mark.parametrize("name", TINY)
def test_narrow_latents_are_the_best_approximation_of_the_embeddings(name: str) -> None:
    made = ready(rows(TEXTS), "--encoder", "byte", "--receiver", name, *COPY, "--d_z", "8")
    heard = made.receiver.heard(TEXTS)
    with torch.no_grad():
        soft = made.hear(made.train_rows).soft
    x, arrived = heard.embeds[heard.mask], soft.embeds[soft.mask]
    best = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:8].T
    noise = torch.linalg.qr(torch.randn(x.shape[1], 8, generator=torch.Generator().manual_seed(0)))[0]
    error = float((x - arrived).square().mean())
    assert error == pytest.approx(rank(x, best), rel=1e-3)
    assert error < 0.8 * rank(x, noise)


def test_fewer_training_tokens_than_latent_numbers() -> None:
    made = ready(rows(["ab", "bc"]), "--encoder", "byte", "--receiver", "tiny-qwen", *COPY, "--d_z", "48")
    assert_heard_as_text(made, made.train_rows)


@pytest.mark.parametrize("reads", [["--encoder", "byte"], ["--sender", "tiny-llama"]])
def test_ridge_latents_approximate_the_copied_ones_without_the_receivers_tokens(reads: list[str]) -> None:
    texts = [example.context for example in lw.Toy(lw.DataSettings(dataset="toy")).load("train")[0][:24]]
    flags = [*reads, "--encoder", reads[1] if reads[0] == "--encoder" else "hidden", "--receiver", "tiny-qwen"]
    flags += ["--pooler", "window", "--ratio", "2", "--d_z", "16", "--width", "64"]
    copied = encoded(ready(rows(texts), *flags, "--init", "copy"), rows(texts))
    made = ready(rows(texts), *flags, "--init", "ridge")
    found = encoded(made, made.train_rows)
    x, y = copied.latents[copied.mask], found.latents[found.mask]
    assert 1 - float((x - y).square().sum() / (x - x.mean(0)).square().sum()) > 0.3
    with torch.no_grad():
        alone = made.bridge.encode(replace(made.hear(made.train_rows).states, heard=None))
    assert torch.equal(alone.latents, found.latents)


def test_a_second_receiver_starts_by_a_ridge_map_onto_its_own_embeddings() -> None:
    examples = rows([example.context for example in lw.Toy(lw.DataSettings(dataset="toy")).load("train")[0][:24]])
    flags = [
        "--encoder",
        "byte",
        "--receivers",
        "tiny-llama,tiny-qwen",
        *COPY,
        "--windows_on",
        "encoder",
        "--ratio",
        "2",
    ]
    made, plain = ready(examples, *flags), trainer(examples, *flags)
    with torch.no_grad():
        heard = made.hear(examples, ear=1)
        tokens = made.setup.receivers[1].heard([example.context for example in examples])
        windows = made.bridge.windows(heard.states)
        wanted = lw.weighted_mean(lw.share_in(windows.spans, tokens.spans, tokens.mask), tokens.embeds)[windows.mask]
        drawn = plain.bridge.decode(heard.message, 1).embeds[windows.mask]
    both = [torch.corrcoef(torch.stack([x.flatten(), wanted.flatten()]))[0, 1]
            for x in (heard.soft.embeds[windows.mask], drawn)]  # fmt: skip
    assert both[0] > 0.8 > 0.3 > both[1].abs()
    assert torch.equal(made.bridge.ears[0].adapter.map.bias, torch.zeros(48))


def test_a_receiver_that_joins_late_starts_from_the_language_as_it_is_written() -> None:
    """Its map is the ridge regression of its own embeddings on what a trained, refined bridge sends."""
    examples = rows([example.context for example in lw.Toy(lw.DataSettings(dataset="toy")).load("train")[0][:24]])
    flags = [
        "--encoder",
        "hidden",
        "--sender",
        "tiny-llama",
        "--receivers",
        "tiny-llama,tiny-qwen",
        *COPY,
        "--dropout",
        "0.5",
    ]
    made = stirred(ready(examples, *flags, "--windows_on", "encoder", "--use_latent_refiner"))
    made.bridge.train()
    with torch.no_grad():
        made.bridge.begin([made.sample([example.context for example in examples])], [1])
        made.bridge.eval()
        sent = encoded(made, examples)
        x = sent.latents[sent.mask].double()
        heard = made.setup.receivers[1].heard([example.context for example in examples])
        y = heard.embeds[heard.mask].double()
        x, y = x - x.mean(0), y - y.mean(0)
        gram = x.T @ x
        wanted = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(64), x.T @ y).T
    assert torch.allclose(made.bridge.ears[1].adapter.map.weight, wanted.float(), atol=1e-4)


@torch.no_grad()
def test_what_is_learned_weighs_scales_and_adds_to_the_copy() -> None:
    """Tokens of a window by the encoder's salience, the whole by a gate, and what the encoder says itself on top."""
    texts = ["bold moves", "cost us all we had"]
    flags = ["--sender", "tiny-llama", "--receiver", "tiny-llama", *COPY, "--windows_on", "encoder", "--ratio", "3"]
    made = stirred(ready(rows(texts), *flags))
    bridge, states = made.bridge, made.hear(made.train_rows).states
    pooled, weights = bridge.pooler(bridge.encoder(states), states.mask, bridge.windows(states))
    found, lm = bridge.encode(states), made.receiver
    for row, text in enumerate(texts):
        ids, count = lm.ids(text), -(-len(text) // 3)
        own = weights[row, 1 : len(ids) + 1]  # behind BOS
        assert own.max() > 1.05 * own.min()
        for slot in range(count):
            inside = torch.tensor([i * count // len(ids) == slot for i in range(len(ids))])
            mean = (own[inside, None] * lm.embed(torch.tensor(ids))[inside]).sum(0) / own[inside].sum()
            start = torch.nn.functional.pad(mean / bridge.start.size, (0, 16)) * (
                1 + bridge.start.gate(pooled[row, slot])
            )
            assert torch.allclose(found.latents[row, slot], start + bridge.to_wire(pooled[row, slot]), atol=1e-5)
    assert bridge.to_wire(pooled).abs().max() > 0.05 and bridge.start.gate(pooled).abs().max() > 0.02


# ---- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratio"), [(1, None), (3, None), (40, None), (8, 1.0), (8, 2.0), (8, 3.5), (8, 99.0)]
)
def test_every_token_lies_in_one_window_in_order(count: int, ratio: float | None) -> None:
    rng = random.Random(str((count, ratio)))
    lengths = [1, 2, 7, 31, rng.randrange(8, 30)]
    for bos in (0, 1):
        width = max(lengths) + bos
        mask = torch.tensor([[i < n + bos for i in range(width)] for n in lengths])
        spans = torch.tensor([[(0, 0)] * bos + [(2 * i, 2 * i + 2) for i in range(width - bos)] for _ in lengths])
        states = lw.States(torch.zeros(len(lengths), 1, width, 4), mask, spans=spans * mask[..., None])
        cut = lw.Windows.cut(states, "encoder", count, ratio)
        assert cut.receiver_tokens is None
        for row, length in enumerate(lengths):
            wanted = min(count, length) if ratio is None else -int(-length // ratio)
            assert int(cut.mask[row].sum()) == wanted and cut.mask[row, :wanted].all()
            inside = cut.tokens[row]
            assert inside[:, length + bos :].sum() == 0 and inside[:, :bos].sum() == 0 and inside[wanted:].sum() == 0
            assert (inside[:, bos : length + bos].sum(0) == 1).all()
            places = inside[:, bos : length + bos].argmax(0).tolist()
            assert places == sorted(places)
            sizes = inside[:wanted].sum(1)
            assert float(sizes.max() - sizes.min()) <= 1 and sizes.min() >= 1
            assert cut.spans[row, 0, 0] == 0 and cut.spans[row, wanted - 1, 1] == 2 * length


def test_ratios_below_one_token_a_latent_are_refused() -> None:
    for ratio in ("0", "0.5", "-2"):
        with pytest.raises(lw.LatentWireError, match="ratio"):
            lw.settings_from(lw.TrainSettings, ["--pooler", "window", "--ratio", ratio])


def test_the_control_without_source_cannot_copy_it() -> None:
    with pytest.raises(lw.LatentWireError, match="constant"):
        lw.settings_from(lw.TrainSettings, ["--encoder", "constant", "--pooler", "window", "--init", "copy"])


POOLERS = {
    "resampler": ["--pooler", "resampler", "--latent_len", "3"],
    "windows": ["--pooler", "window", "--ratio", "2"],
    "few windows": ["--pooler", "window", "--latent_len", "3", "--init", "copy"],
    "ridge": ["--pooler", "window", "--ratio", "3", "--init", "ridge", "--windows_on", "receiver"],
    "private": ["--pooler", "shared_private", "--latent_len", "3", "--latent_private_len", "1"],
    "refined": ["--pooler", "window", "--ratio", "2", "--use_latent_refiner"],
}


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("reads", ["byte", "tiny-llama", "tiny-qwen"])
def test_a_row_has_the_same_latents_alone_and_beside_longer_rows(reads: str, pooler: str) -> None:
    encoder = ["--encoder", "byte"] if reads == "byte" else ["--sender", reads, "--encoder", "hidden"]
    made = stirred(ready(rows((*TEXTS, "")), *encoder, "--receiver", "tiny-gemma", "--d_z", "16", *POOLERS[pooler]))
    together = encoded(made, made.train_rows)
    assert together.latents.isfinite().all()
    with torch.no_grad():
        prompts = made.hear(made.train_rows).soft
    for number, row in enumerate(together.rows()):
        alone = encoded(made, made.train_rows[number : number + 1])
        assert torch.allclose(alone.latents, row.latents, atol=1e-5), TEXTS[number]
        with torch.no_grad():
            own = made.hear(made.train_rows[number : number + 1]).soft.embeds[0]
        assert torch.allclose(own, prompts.embeds[number, : len(own)], atol=1e-5)


@pytest.mark.parametrize("pooler", ["resampler", "few windows", "ridge"])
@pytest.mark.parametrize("encoder", ["stq", "simple-st"])
def test_sentence_encoders_read_a_row_alone_as_in_a_batch(encoder: str, pooler: str, sentence_model: str) -> None:
    flags = ["--encoder", encoder, "--sentence_model", sentence_model, "--receiver", "tiny-qwen", "--d_z", "16"]
    made = stirred(ready(rows((*TEXTS, "")), *flags, *POOLERS[pooler]))
    together = encoded(made, made.train_rows)
    for number, row in enumerate(together.rows()):
        alone = encoded(made, made.train_rows[number : number + 1])
        assert torch.allclose(alone.latents, row.latents, atol=1e-5)
    with torch.no_grad():
        states = made.hear(made.train_rows).states
        tokens = made.bridge.encoder(states)
    same_token = torch.allclose(tokens[0, 0], tokens[0, 1], atol=1e-6)
    assert same_token == (encoder == "simple-st")
    vector = made.bridge.encoder.standard(states)[0, 0][states.mask[0]].mean(0)
    assert encoder == "stq" or torch.allclose(tokens[0, 0], made.bridge.encoder.project(vector), atol=1e-5)


def test_latents_of_a_first_half_need_an_encoder_that_stopped_there(sentence_model: str) -> None:
    flags = [
        "--encoder",
        "stq",
        "--sentence_model",
        sentence_model,
        "--receiver",
        "tiny-qwen",
        "--continuation_weight",
        "1",
    ]
    made = ready(rows(TEXTS), *flags, *POOLERS["few windows"])
    with pytest.raises(lw.LatentWireError, match="first half"):
        made.gradients(1, 4)


def test_bytes_are_all_read_and_255_is_only_ever_filling() -> None:
    reader = lw.ByteReader(torch.device("cpu"))
    for text in (*TEXTS, "\U0010ffff", "a\x00b", "ab"):
        states = reader.states([reader.ids(text)], [0])
        found = bytes(states.hidden[0, 0].flatten().tolist())
        data = text.encode()
        assert found[: len(data)] == data and 255 not in data
        assert set(found[len(data) :]) <= {255} and len(found) - len(data) < 4
        ids, spans = reader.pieces(text)
        assert len(ids) == len(spans) and spans[0][0] == 0 and spans[-1][1] == len(text)
        assert [len(text[a:b]) > 0 for a, b in spans] == [True] * len(spans)


def test_every_byte_of_a_text_changes_its_latents() -> None:
    made = stirred(ready(rows(["abcdefghij"]), "--encoder", "byte", "--receiver", "tiny-qwen", "--latent_len", "2"))
    texts = [
        "abcdefghij",
        *("abcdefghij"[:i] + "Q" + "abcdefghij"[i + 1 :] for i in range(10)),
        "abcdefghijk",
    ]
    made.train_rows = rows(texts)
    made.prepare()
    latents = encoded(made, made.train_rows).latents
    for other in latents[1:]:
        assert (other - latents[0]).abs().max() > 1e-4


@pytest.mark.parametrize("on", ["encoder", "receiver"])
@pytest.mark.parametrize("keep", ["head", "tail", "both"])
def test_what_is_cut_off_never_travels(keep: str, on: str) -> None:
    flags = ["--encoder", "byte", "--receiver", "tiny-qwen", *COPY, "--windows_on", on, "--max_bytes", "8"]
    flags += ["--keep", keep, "--protocol", "question-agnostic", "--ratio", "3"]
    sent = []
    for hidden in ("secretsecretsecr", "QQQQQQQQQQQQQQQQ"):
        text = {"head": f"abcdefgh{hidden}", "tail": f"{hidden}abcdefgh", "both": f"abcd{hidden}efgh"}[keep]
        made = trainer(rows([text, "abcdefgh"]), *flags)
        made.writer.collect([text, "abcdefgh"], "memory", lambda done, total: None)
        assert made.writer.store.truncated == 0.5
        made.bridge.eval()
        sent.append(encoded(made, made.train_rows[:1]).latents)
        whole = encoded(made, made.train_rows[1:]).latents
    assert torch.equal(*sent)
    assert keep == "both" or torch.allclose(sent[0], whole, atol=1e-6)


@pytest.mark.parametrize(("keep", "wanted"), [("head", "1234"), ("tail", "6789"), ("both", "1289")])
def test_the_kept_part_of_a_long_text(keep: str, wanted: str) -> None:
    sender = lw.load_lm("tiny-llama", CPU)
    sender.keep = keep
    ids = lw.sender_ids(sender, "123456789", 5)
    assert ids == [*sender.bos, *sender.ids(wanted)]
    spans = lw.sender_spans(sender, "123456789", 5)
    assert "".join("123456789"[a:b] for a, b in spans) == wanted and spans[0] == (0, 0)


def test_the_share_of_cut_questions() -> None:
    part, reader = lw.QuestionAnswering(CPU_TASK), lw.ByteReader(torch.device("cpu"))
    asked = [
        lw.Example("0", "a passage", "Who?", ("x",)),
        lw.Example("1", "a passage", "Who went where and why?", ("x",)),
    ]
    assert lw.questions_cut(part, asked, reader, 100) == 0
    assert lw.questions_cut(part, asked, reader, 2) == 0.5
    reader.keep = "tail"
    assert lw.questions_cut(part, asked, reader, 3) == 1


CPU_TASK = lw.TrainSettings(dataset="toy")


# ---- messages ----------------------------------------------------------------------------------------------------


def test_ragged_messages_travel_alone_and_are_answered_as_in_the_batch() -> None:
    made = stirred(ready(rows(TEXTS), "--encoder", "byte", "--receiver", "tiny-gemma", *COPY, "--ratio", "4",
                         "--use_deep_prefix", "--use_latent_adapters", "--codec", "fp32"))  # fmt: skip
    sent = packets(made, made.train_rows)
    whole, messages = encoded(made, made.train_rows), [lw.Message.from_bytes(data) for data in sent]
    assert [m.latents.shape[1] for m in messages] == whole.mask.sum(1).tolist()
    with pytest.raises(lw.LatentWireError, match="empty slots"):
        whole.to_bytes()
    for row, message in enumerate(messages):
        assert torch.equal(message.latents[0], whole.latents[row][whole.mask[row]])
    assert len(sent[3]) < len(sent[2]) < len(sent[0])
    together, ear = listener(made).answers(made.train_rows, sent), listener(made)
    for row, answer in enumerate(together):
        (alone,) = ear.answers(made.train_rows[row : row + 1], sent[row : row + 1])
        assert alone.text == answer.text and alone.scores == pytest.approx(answer.scores, abs=2e-4)
    with torch.no_grad():
        direct = ear.respond(made.prompting.pack(made.bridge.decode(whole), made.train_rows), made.train_rows)
    assert [a.text for a in direct] == [a.text for a in together]
    assert [a.nll_per_token for a in direct] == pytest.approx([a.nll_per_token for a in together], abs=1e-4)


def test_private_latents_differ_by_receiver_and_shared_ones_do_not() -> None:
    flags = ["--encoder", "byte", "--receivers", "tiny-llama,tiny-qwen", "--pooler", "shared_private"]
    made = ready(rows(TEXTS), *flags, "--latent_shared_len", "3", "--latent_private_len", "2")
    one, two = (encoded(made, made.train_rows, ear).latents for ear in (0, 1))
    assert one.shape[1] == 5 and torch.equal(one[:, :3], two[:, :3])
    assert (one[:, 3:] - two[:, 3:]).abs().amax((1, 2)).min() > 1e-2
    for ear in (0, 1):
        assert listener(made, ear).answers(made.train_rows, packets(made, made.train_rows, ear))


@pytest.mark.parametrize("width", [1, 7, 16])
@pytest.mark.parametrize(("codec", "top"), [("int8", 127), ("int4", 7)])
def test_whole_number_codecs_are_off_by_half_a_step_at_most(codec: str, top: int, width: int) -> None:
    latents = (
        torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
        * torch.tensor([1e-2, 1, 50])[:, None, None]
    )
    latents[0, 0] = 0
    (first, *_) = lw.Message(latents, codec, "x").rows()
    back = lw.Message.from_bytes(lw.Message(latents, codec, "x").to_bytes()).latents
    assert torch.equal(lw.Message.from_bytes(first.to_bytes()).latents[0], back[0])
    assert back.shape == latents.shape and torch.equal(back[0, 0], torch.zeros(width))
    turned, returned = latents.double() @ lw.rotation(width), back.double() @ lw.rotation(width)
    step = turned.abs().amax(-1, keepdim=True) / top
    assert ((returned - turned).abs() <= step * (0.5 + top * 2e-3) + 1e-7).all()
    assert width == 1 or (returned - turned).abs().max() > step.min() * 0.1


@pytest.mark.parametrize("width", [1, 7, 16, 640])
def test_whole_number_codecs_turn_without_a_loss(width: int) -> None:
    assert torch.allclose(lw.rotation(width) @ lw.rotation(width).T, torch.eye(width, dtype=torch.float64), atol=1e-12)


def test_a_latents_outlier_does_not_round_the_rest_of_it_away() -> None:
    latents = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(0))
    latents[..., 3] = 40
    back = lw.Message.from_bytes(lw.Message(latents, "int4", "x").to_bytes()).latents
    rest = torch.arange(256) != 3
    error = (back - latents)[..., rest].std() / latents[..., rest].std()
    assert error < 0.5, f"{error:.2f}; without the turn 1, since 40 / 7 is more than twice anything else there"


@pytest.mark.parametrize("width", [1, 7, 16, 640])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scalar_quantisation_has_its_levels_and_is_off_by_half_of_one(bits: int, width: int) -> None:
    """Mentzer et al. 2023 (arXiv 2309.15505): L levels from -L/2 to L/2 - 1, zero among them; the highest stands for 1 too."""
    codec, half = lw.CODECS[f"fsq{bits}"](), 2 ** (bits - 1)
    latents = codec.bound(torch.randn(3, 50, width, generator=torch.Generator().manual_seed(width)) * 2)
    latents[0, 0] = 0
    sent = lw.Message(latents, f"fsq{bits}", "x")
    back = lw.Message.from_bytes(sent.to_bytes()).latents
    turned, levels = latents.double() @ lw.rotation(width), back.double() @ lw.rotation(width) * half
    assert torch.allclose(levels, levels.round(), atol=1e-5) and set(levels.round().flatten().tolist()) == {
        *map(float, range(-half, half))
    }
    assert (levels - (turned * half).round().clamp(max=half - 1)).abs().max() < 1e-5
    assert torch.equal(back[0, 0], torch.zeros(width))
    again = lw.Message.from_bytes(lw.Message(back, f"fsq{bits}", "x").to_bytes()).latents
    assert torch.allclose(again, back, atol=1e-6), "what has arrived can be sent on"


def test_a_bridge_learns_to_write_for_scalar_quantisation() -> None:
    """Bounded from the first step, with tanh's gradient; rounding has the identity's."""
    codec = lw.CODECS["fsq3"]()
    latents = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bounded = codec.bound(latents)
    assert torch.allclose(bounded @ lw.rotation(9).float(), (latents @ lw.rotation(9).float()).tanh(), atol=1e-6)
    weights = torch.arange(54.0).view(2, 3, 9)
    (expected,) = torch.autograd.grad((bounded * weights).sum(), latents, retain_graph=True)
    (codec.through(bounded) * weights).sum().backward()
    assert torch.equal(latents.grad, expected)


def test_numbers_that_were_not_written_for_scalar_quantisation_are_refused() -> None:
    with pytest.raises(lw.LatentWireError, match=r"use --codec fp16"):
        lw.Message(torch.full((1, 2, 4), 1.5), "fsq4", "x").to_bytes()


def test_smaller_codecs_make_smaller_messages() -> None:
    names = ("fsq2", "fsq3", "fsq4", "int4", "int8", "fp16", "fp32")
    sizes = [len(lw.Message(torch.full((1, 8, 33), 0.1), codec, "x").to_bytes()) for codec in names]
    assert sizes == sorted(set(sizes))
    for codec, count in {"int4": 17, "fsq4": 17, "fsq3": 15, "fsq2": 9}.items():
        body = lw.CODECS[codec]().pack(torch.full((1, 8, 33), 0.1))["latents"]
        assert body.shape == (1, 8, count) and body.dtype == torch.uint8


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_training_through_a_codec_has_its_values_and_the_gradient_of_the_identity(codec: str) -> None:
    latents = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    through = lw.CODECS[codec]().through(latents)
    arrived = lw.Message.from_bytes(lw.Message(latents, codec, "x").to_bytes()).latents
    assert torch.allclose(through, arrived, atol=1e-6)
    weights = torch.arange(54.0).view(2, 3, 9)
    (through * weights).sum().backward()
    assert torch.equal(latents.grad, weights)
    assert (codec == "fp32") == torch.equal(arrived, latents)


@pytest.mark.parametrize("codec", ["int4", "fsq2"])
def test_quantised_latents_in_training_are_those_on_the_wire(codec: str) -> None:
    flags = ["--encoder", "byte", "--pooler", "resampler", "--receiver", "tiny-qwen", "--latent_len", "3"]
    made = ready(rows(TEXTS), *flags, "--codec", codec)
    plain, sent = encoded(made, made.train_rows), packets(made, made.train_rows)
    made.bridge.quantize = True
    coarse = encoded(made, made.train_rows)
    arrived = torch.cat([lw.Message.from_bytes(data).latents for data in sent])
    assert torch.allclose(coarse.latents, arrived, atol=1e-6)
    assert (coarse.latents - plain.latents).abs().max() > 0.05


# ---- who reads what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "sender", "receiver"), [("question-aware", True, False), ("question-agnostic", False, True)]
)
def test_the_question_is_read_by_one_side_only(protocol: str, sender: bool, receiver: bool) -> None:
    settings = lw.TrainSettings(dataset="toy", protocol=protocol)
    part, lm = lw.QuestionAnswering(settings), load("tiny-qwen")
    example = lw.Example("0", "Ann went to Rome.", "Where is Ann?", ("Rome",))
    assert ("Where is Ann?" in part.sender_text(example)) == sender
    assert example.context in part.sender_text(example)
    prompting = lw.prompting_of(settings, part, lm)
    latent, text = (lm.tokenizer.decode(prompting.after(example, text)) for text in (False, True))
    assert ("Where is Ann?" in latent) == receiver and example.context not in latent
    assert latent.endswith("Answer:") and "Where is Ann?" in text and text.startswith(example.context)
    made = ready([example, replace(example, id="1", question="Who is in Rome?")], "--encoder", "byte", "--receiver",
                 "tiny-qwen", "--latent_len", "3", "--protocol", protocol, part=part)  # fmt: skip
    sent = packets(made, made.train_rows)
    assert (sent[0] == sent[1]) != sender
    one, two = listener(made).answers(made.train_rows, sent)
    assert one.nll_per_token != two.nll_per_token


LINGUA, CLASSIC = ("byte", "window", "copy"), ("hidden", "resampler", "none")
AUTO = [
    ("--dataset squad", LINGUA, None, "gemma-3-270m,smollm2-135m"),
    ("--dataset squad --receiver tiny-qwen", LINGUA, None, "tiny-qwen"),
    ("--dataset toy --receivers tiny-llama,tiny-qwen", LINGUA, None, "tiny-llama,tiny-qwen"),
    ("--dataset toy --llama_id tiny-llama --qwen_id tiny-qwen", LINGUA, None, "tiny-llama,tiny-qwen"),
    ("--dataset toy", CLASSIC, "smollm2-135m", "gemma-3-270m"),
    ("--dataset toy --sender tiny-llama", CLASSIC, "tiny-llama", "gemma-3-270m"),
    ("--dataset squad --sender tiny-llama --receiver tiny-qwen", CLASSIC, "tiny-llama", "tiny-qwen"),
    ("--dataset squad --encoder hidden", CLASSIC, "smollm2-135m", "gemma-3-270m"),
    ("--dataset toy --sender tiny-gemma --receivers tiny-llama,tiny-qwen", ("hidden", *LINGUA[1:]), "tiny-gemma",
     "tiny-llama,tiny-qwen"),
    ("--dataset toy --encoder byte --receiver tiny-qwen", LINGUA, None, "tiny-qwen"),
    ("--dataset toy --encoder byte --sender tiny-llama --receiver tiny-qwen", LINGUA, None, "tiny-llama,tiny-qwen"),
    ("--dataset toy --receivers tiny-qwen,tiny-qwen --receiver tiny-qwen", LINGUA, None, "tiny-qwen"),
    ("--dataset toy --encoder constant --receiver tiny-qwen", ("constant", "resampler", "none"), None, "tiny-qwen"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "parts", "sender", "receivers"), AUTO, ids=[row[0] for row in AUTO])
def test_what_is_chosen_where_nothing_is_said(
    flags: str, parts: tuple[str, ...], sender: str | None, receivers: str
) -> None:
    asked = lw.settings_from(lw.TrainSettings, [*flags.split(), "--device", "cpu", "--offline"])[0]
    found, _ = lw.resolve(asked)
    assert (found.encoder, found.pooler, found.init) == parts
    assert found.sender == sender and ",".join(lw.receivers_of(found)) == receivers
    assert (found.receivers is None) == ("," not in receivers) and found.receiver == receivers.split(",")[0]
    assert found.adapter == ("mlp" if parts[2] == "copy" else "linear")
    assert (found.d_z, found.latent_len) == ((256, 32) if parts[2] == "copy" else (64, 8))
    assert lw.resolve(found)[0] == found


def test_what_was_said_stays_with_the_interlingua() -> None:
    words = ["--dataset", "squad", "--receiver", "tiny-qwen", "--d_z", "16", "--latent_len", "4", "--device", "cpu"]
    found = lw.resolve(lw.settings_from(lw.TrainSettings, words)[0])[0]
    assert (found.encoder, found.d_z, found.latent_len, found.dtype) == ("byte", 16, 4, "float32")


# ---- several receivers, from training to answers -----------------------------------------------------------------

PAIR = [*TINY_RUN, "--receivers", "tiny-qwen,tiny-llama", "--latent_len", "4", "--d_z", "24", "--batch_size", "16",
        "--steps", "24", "--lr", "3e-3", "--val_samples", "16", "--eval_every", "12", "--patience", "0"]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return lw.load_checkpoint(lw.Checkpoints(folder / "checkpoint").steps()[0])[0]["bridge"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watched(work: Callable[[], object]) -> list[str]:
    """Names of the models that ``work`` loads, and that their weights are afterwards what they were."""
    loaded: list[tuple[lw.LM, str]] = []
    real = lw.load_lm

    def noting(*args: object, **options: object) -> lw.LM:
        lm = real(*args, **options)  # type: ignore[arg-type]
        loaded.append((lm, sums(lm.model)))
        return lm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw, "load_lm", noting)
        work()
    for lm, before in loaded:
        assert sums(lm.model) == before, lm.name
    return [lm.name for lm, _ in loaded]


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished byte → tiny-qwen and tiny-llama run whose frozen models are watched."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    found = watched(lambda: lw.train_main([*PAIR, "--output_dir", str(folder)]))
    assert found == ["tiny-qwen", "tiny-llama"]
    return folder


def test_a_receiver_that_is_not_there_is_told_before_any_is_evaluated(pair_run: Path, tmp_path: Path) -> None:
    """Evaluating the first takes minutes."""
    known = lw.Checkpoint.open(pair_run).bridge().shape.ears[0].name
    asked = lw.EvalSettings(
        checkpoint=pair_run, receivers=[known, "nobody"], output_dir=tmp_path / "out", num_samples=4
    )
    with pytest.raises(lw.LatentWireError, match="no receiver 'nobody' here"):
        lw.eval_run(asked, lw.Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.trains
def test_receivers_learn_in_turn_and_all_improve(pair_run: Path) -> None:
    log = lw.read_rows(pair_run / "diagnostics.jsonl")
    for name in ("tiny-qwen", "tiny-llama"):
        losses = [row["loss"] for row in log if row["receiver"] == name]
        assert len(losses) >= 6 and sum(losses[-3:]) < 0.85 * sum(losses[:3]), name
    made = [lw.Trainer.ear_at.__get__(type("T", (), {"fresh": [0, 1], "settings": CPU_TASK})())(s) for s in range(1, 9)]
    assert set(made) == {0, 1}


@pytest.mark.trains
def test_evaluation_answers_for_each_receiver_and_for_both(pair_run: Path, tmp_path: Path) -> None:
    asked = ["--checkpoint", str(pair_run), "--device", "cpu", "--state_cache", "memory", "--num_samples", "8"]
    asked += ["--methods", "bridge,text,control:zero", "--output_dir"]
    found = lw.eval_main([*asked, str(tmp_path / "both")])
    assert list(found["receivers"]) == ["tiny-qwen", "tiny-llama"]
    assert found["joint"].keys() >= {"rescored", "oracle", "agreement"}
    for name, own in found["receivers"].items():
        alone = lw.eval_main([*asked, str(tmp_path / name), "--receivers", name])
        assert alone["methods"] == own["methods"] and alone["provenance"]["receiver"]["name"] == name
    values = [own["methods"]["bridge"]["nll_per_token"] for own in found["receivers"].values()]
    assert values[0] != values[1]


@pytest.mark.trains
def test_a_resumed_run_of_several_receivers_has_the_same_bits(pair_run: Path, tmp_path: Path, monkeypatch) -> None:
    step = lw.Trainer.step

    def interrupted(self: lw.Trainer) -> dict[str, float]:
        row = step(self)
        if self.progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(lw.Trainer, "step", interrupted)
    with pytest.raises(lw.Interrupted):
        lw.train_main([*PAIR, "--output_dir", str(tmp_path / "cut")])
    monkeypatch.setattr(lw.Trainer, "step", step)
    lw.train_main([*PAIR, "--output_dir", str(tmp_path / "cut"), "--resume"])
    assert same(weights(pair_run), weights(tmp_path / "cut"))
    logs = [
        [row["loss"] for row in lw.read_rows(folder / "diagnostics.jsonl")] for folder in (pair_run, tmp_path / "cut")
    ]
    assert logs[0] == logs[1]


def extend(run: Path, folder: Path, *flags: str) -> lw.Bridge:
    words = ["--extend", str(run), "--receivers", "tiny-gemma", "--steps", "4", "--output_dir", str(folder)]
    lw.train_main([*words, *flags])
    return lw.open_bridge(lw.resolve_checkpoint(folder))[0]


@pytest.mark.trains
def test_a_third_receiver_learns_the_language_and_changes_nothing_else(pair_run: Path, tmp_path: Path) -> None:
    old = lw.open_bridge(lw.resolve_checkpoint(pair_run))[0]
    new = extend(pair_run, tmp_path / "more")
    assert [ear.name for ear in new.shape.ears] == ["tiny-qwen", "tiny-llama", "tiny-gemma"]
    before, after = old.state_dict(), weights(tmp_path / "more")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"2"}
    assert new.fingerprint(shared=True) == old.fingerprint(shared=True) and new.fingerprint() != old.fingerprint()
    untrained = extend(pair_run, tmp_path / "start", "--steps", "0")
    assert not same(untrained.state_dict(), new.state_dict())
    asked = lw.EvalSettings(checkpoint=pair_run, device="cpu", state_cache="memory", num_samples=4)
    channel = lw.open_context(asked, lw.Checkpoint.open(pair_run), 1)
    own = lw.Receiver(channel.receiver.prompting, new).answers(channel.examples, channel.messages)
    assert own == channel.receiver.answers(channel.examples, channel.messages)
    assert all({row["receiver"]} == {"tiny-gemma"} for row in lw.read_rows(tmp_path / "more" / "diagnostics.jsonl"))
    prompting = lw.Prompting(load("tiny-gemma"), channel.setup.part, channel.receiver.prompting.anchor)
    assert lw.Receiver(prompting, new).answers(channel.examples, channel.messages)


@pytest.mark.trains
def test_extending_needs_a_new_receiver_and_the_same_bridge(pair_run: Path, tmp_path: Path) -> None:
    with pytest.raises(lw.LatentWireError, match="name a new receiver"):
        lw.train_main(["--extend", str(pair_run), "--receivers", "tiny-qwen", "--output_dir", str(tmp_path / "a")])
    with pytest.raises(lw.LatentWireError, match="differs in d_z"):
        extend(pair_run, tmp_path / "b", "--d_z", "8")


@pytest.mark.trains
def test_extending_keeps_private_latents_lora_and_colours(tmp_path: Path) -> None:
    flags = ["--receivers", "tiny-qwen", "--encoder", "hidden", "--sender", "tiny-llama", "--pooler", "shared_private"]
    flags += ["--latent_len", "3", "--latent_private_len", "1", "--use_lora", "--lora_on", "both", "--colorize"]
    lw.train_main([*TINY_RUN, *flags, "--steps", "3", "--lr", "1e-2", "--output_dir", str(tmp_path / "old")])
    old = lw.open_bridge(lw.resolve_checkpoint(tmp_path / "old"))[0]
    start = extend(tmp_path / "old", tmp_path / "start", "--steps", "0")
    new = extend(tmp_path / "old", tmp_path / "new")
    assert new.fingerprint(shared=True) == old.fingerprint(shared=True)
    assert all(torch.equal(new.state_dict()[name], tensor) for name, tensor in old.state_dict().items())
    moved = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert {name.split(".")[0] for name in moved} == {"pooler", "ears"}
    assert all(name.startswith(("pooler.private.1.", "ears.1.")) for name in moved)
    assert torch.allclose(start.ears[1].adapter.colour, torch.stack(load("tiny-gemma").table_statistics))
    lora = [lw.load_checkpoint(lw.resolve_checkpoint(tmp_path / name))[0]["lora"] for name in ("old", "new", "start")]
    assert all(torch.equal(lora[1][name], tensor) for name, tensor in lora[0].items())
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in lora[0].items() if name.startswith("0."))
    fresh = [name for name in lora[1] if name.startswith("2.")]
    assert fresh and any(not torch.equal(lora[1][name], lora[2][name]) for name in fresh)


@pytest.mark.parametrize("text", ["Kenya (/ˈkɛnjə/)", "🙂🙂 ok", "plain words"])
def test_weighted_copies_are_means_of_embeddings_whatever_letters_share_their_bytes(text: str) -> None:
    """Several tokens of one letter cover its receiver token several times; weights below 1 must not turn it negative."""
    sender, lm = (lw.load_lm(name, lw.ModelSettings(device="cpu")) for name in ("tiny-qwen", "tiny-llama"))
    settings = lw.BridgeSettings(pooler="window", init="copy", latent_len=3, d_z=48, width=32)
    bridge = lw.Bridge(lw.BridgeShape.of(settings, sender, lm)).eval()
    states = lw.Sender(sender, bridge, 64, lm).states([text])
    assert states.heard is not None
    windows = bridge.windows(states)
    for weight in (1e-3, 0.3, 0.6, 3.0):
        copied = bridge.start.copied(states, windows, torch.full(states.mask.shape, weight))
        assert torch.allclose(copied, bridge.start.copied(states, windows), atol=1e-4), weight
