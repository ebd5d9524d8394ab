"""§7 to §11: words and latents in one message, from the choice of words to what each part is worth."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bridges import load, packets, ready, stirred

import LATENTWIRE as lw

CONTEXT = (
    "The tower was built in 1889 by Gustave. Many people visit it each year. Its steps are painted brown. "
    "The garden beside it has old trees, and birds live there. A café sells tea."
)
QUESTION = "Who built the tower?"
SHARED = ["--encoder", "hidden", "--pooler", "mixed", "--init", "copy", "--ratio", "3", "--d_z", "64", "--coarse", "16",
          "--run_words", "4", "--protocol", "question-shared"]  # fmt: skip
PAIR = ["--sender", "tiny-llama", "--receiver", "tiny-qwen"]


def examples(*contexts: str) -> list[lw.Example]:
    return [lw.Example(str(i), text, QUESTION, ("Gustave",)) for i, text in enumerate(contexts or (CONTEXT,))]


def made(*flags: str, own: Any = None, protocol: str = "question-shared") -> lw.Trainer:
    part = lw.QuestionAnswering(lw.TrainSettings(dataset="toy", protocol=protocol))
    return ready(own or examples(CONTEXT, CONTEXT[:90], "A short one."), *SHARED, *PAIR, *flags, part=part)


def sent(one: lw.Trainer, **options: Any) -> lw.Message:
    states = one.writer.states([one.part.sender_text(e) for e in one.train_rows])
    with torch.no_grad():
        return one.bridge.encode(states, one.bridge.language(0), **options)


def positions(message: lw.Message, lm: lw.LM) -> list[int]:
    assert message.words is not None
    return [row.latents.shape[1] + sum(len(lm.ids(t)) for t in row.words[0]) for row in message.rows() if row.words]


# ---- what travels --------------------------------------------------------------------------------------------------


def test_with_a_ratio_of_one_the_message_is_the_text_and_is_read_as_the_text():
    one = made("--ratio", "1")
    message = sent(one)
    assert message.words == tuple((e.context,) for e in one.train_rows) and message.latents.shape[1] == 0
    receiver = lw.Receiver(one.promptings[0], one.bridge, 6)
    soft = receiver.open(packets(one, one.train_rows))
    lm, prompting = receiver.lm, receiver.prompting
    packed = prompting.pack(soft, one.train_rows)
    after = [lm.ids(f"\nQuestion: {QUESTION}\n{prompting.anchor}")] * len(one.train_rows)
    plain = prompting.joined(
        None, [[*lm.ids(e.context), *t] for e, t in zip(one.train_rows, after, strict=True)], None, True
    )
    for row in range(len(one.train_rows)):
        assert torch.equal(packed.embeds[row][packed.mask[row]], plain.embeds[row][plain.mask[row]])


@pytest.mark.parametrize("protocol", ["question-shared", "question-agnostic", "question-aware"])
@pytest.mark.parametrize("ratio", [1.5, 3.0, 8.0])
def test_a_message_keeps_to_its_positions_in_the_texts_order(ratio, protocol):
    one = made("--ratio", str(ratio), protocol=protocol)
    message, lm = sent(one), one.receiver
    for example, row, count in zip(one.train_rows, message.rows(), positions(message, lm), strict=True):
        text = one.part.sender_text(example) if protocol == "question-aware" else example.context
        assert count <= -(-len(lm.ids(text)) // ratio) + 1  # a word cut apart may have one token more
        place = 0
        assert row.words is not None
        for piece in " ".join(row.words[0]).split():
            place = text.index(piece, place) + len(piece)
    assert message.mask is None or message.mask.any()


def test_the_words_answer_the_question_before_anything_is_learned():
    words = " ".join(sent(made("--ratio", "4")).words[0])  # type: ignore[index]
    assert "The tower was built" in words and QUESTION not in words


def test_without_the_question_at_the_receiver_the_question_travels_first():
    aware = " ".join(sent(made("--ratio", "4", protocol="question-aware")).words[0])  # type: ignore[index]
    assert "Who built the" in aware


def test_words_alone_take_the_whole_budget():
    one = made()
    mixed, alone = sent(one), sent(one, coarse=0)
    assert alone.latents.shape[1] == 0 and alone.words is not None and mixed.words is not None
    assert all(len(row) == 1 for row in alone.words)
    assert all(len(a[0]) >= len("".join(m)) for a, m in zip(alone.words, mixed.words, strict=True))
    assert len(alone.words[0][0]) > len("".join(mixed.words[0]))


def test_a_coarse_latent_is_the_mean_of_what_is_not_said_and_stands_in_its_place():
    one = made("--coarse", "200", "--ratio", "2")
    message = sent(one)
    assert message.words is not None and message.latents.shape[1] == 1
    lm, start = one.receiver, one.bridge.start
    states = one.writer.states([one.part.sender_text(one.train_rows[0])])
    (excerpt,) = one.bridge.pooler.excerpts(one.bridge.encoder(states), states, 2.0)
    tokens, shift = lm.heard([CONTEXT]), len(QUESTION) + 1
    left = torch.ones(tokens.mask.shape[1])
    for begin, end in excerpt.said:
        left[(tokens.spans[0, :, 0] < end - shift) & (tokens.spans[0, :, 1] > begin - shift)] = 0
    mean = (tokens.embeds[0] * left[:, None]).sum(0) / left.sum()
    wanted = (mean - start.mean) @ start.down / start.size
    torch.testing.assert_close(message.latents[0, 0], wanted, rtol=0.05, atol=0.05)
    assert message.words[0] == excerpt.words and CONTEXT.startswith(excerpt.words[0])


def test_every_receiver_reads_the_same_words():
    one = made("--receivers", "tiny-qwen,tiny-gemma")
    data = packets(one, one.train_rows)
    for ear, lm in enumerate(one.setup.receivers):
        receiver = lw.Receiver(one.promptings[ear], one.bridge, 6)
        message = lw.Message.from_bytes(data[0])
        soft = receiver.open(data[:1])
        assert message.words is not None and soft.mask is not None
        assert int(soft.mask.sum()) == positions(message, lm)[0]


def test_features_work_on_the_latents_among_words():
    flags = ("--use_deep_prefix", "--use_latent_adapters", "--use_coprocessor", "--use_latent_refiner")
    one = stirred(made(*flags), 0.02)
    soft = one.hear(one.train_rows[:1]).soft
    assert soft.changes is not None and soft.real is not None and soft.mask is not None
    changed = soft.changes.abs().sum((-1, -2, -3))[0] > 0
    message = one.hear(one.train_rows[:1]).message
    assert int(changed.sum()) == message.latents.shape[1] < int(soft.mask.sum())
    first = len(one.receiver.ids(message.words[0][0]))  # type: ignore[index]
    assert changed[first] and not changed[:first].any()
    one.step()


# ---- the score -----------------------------------------------------------------------------------------------------


def test_the_score_begins_as_retrievals_and_learns_where_answers_are():
    one = made("--lr", "1e-2", "--coarse", "0", "--answer_ce_weight", "0", "--k_token_ce_weight", "0",
               "--first_token_ce_weight", "0", "--selection_weight", "1", own=examples(CONTEXT))  # fmt: skip
    pooler = one.bridge.pooler
    states = one.writer.states([one.part.sender_text(e) for e in one.train_rows])

    def order() -> list[int]:
        with torch.no_grad():
            return pooler.scores(one.bridge.encoder(states), states)[0].argsort(descending=True).tolist()

    runs = pooler.runs(states)[0]
    assert order() == runs.prior.argsort(descending=True).tolist()
    text = states.texts[0]
    place = text.index("Gustave")
    target = next(i for i, (a, b, _) in enumerate(runs.spans) if a <= place < b)
    losses = [one.step()["loss_selection"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1 and order()[0] == target


def test_the_selection_loss_is_the_cross_entropy_of_the_runs_with_the_answer():
    one = made(own=[*examples(CONTEXT), replace(examples(CONTEXT[:90])[0], answers=("not there",))])
    heard = one.hear(one.train_rows)
    supervised = lw.supervise(heard.receiver, heard.answered(heard.soft), heard)
    found = float(lw.LOSSES["selection"](lw.LossSettings()).term(supervised).detach())
    pooler = one.bridge.pooler
    scores = pooler.scores(one.bridge.encoder(heard.states), heard.states)[0]
    runs, place = pooler.runs(heard.states)[0], heard.states.texts[0].index("Gustave")
    hit = [i for i, (a, b, _) in enumerate(runs.spans) if a < place + 7 and b > place]
    assert found == pytest.approx(float(-scores.softmax(0)[hit].sum().log()) / 2, rel=1e-5)


def test_the_swap_loss_asks_the_receiver_which_of_two_runs_to_send():
    """Target: the logistic function of the nats that the answer costs more where one run takes the other's place."""
    one = made("--answer_ce_weight", "0", "--k_token_ce_weight", "0", "--first_token_ce_weight", "0", "--lr", "1e-2",
               "--selection_weight", "0", "--swap_weight", "1", own=examples(CONTEXT))  # fmt: skip
    heard, pooler = one.hear(one.train_rows), one.bridge.pooler
    tokens = one.bridge.encoder(heard.states)
    scores, runs = pooler.scores(tokens, heard.states)[0], pooler.runs(heard.states)[0]
    swaps = lw.LOSSES["swap"](lw.LossSettings()).swaps(heard, pooler, tokens)
    [(taken_out, put_in)] = swaps.values()
    plain, other = (one.bridge.encode(heard.states, swaps=given) for given in (None, swaps))
    assert plain.words is not None and other.words is not None
    pieces = [heard.states.texts[0][slice(*runs.spans[i][:2])].strip() for i in (taken_out, put_in)]
    assert [pieces[0] in " ".join(m.words[0]) for m in (plain, other)] == [True, False]
    assert [pieces[1] in " ".join(m.words[0]) for m in (plain, other)] == [False, True]

    def nats(message: lw.Message) -> float:
        soft = heard.receiver.weave(one.bridge.decode(message), message.words)
        return float(lw.supervise(heard.receiver, heard.answered(soft), heard).nats.sum().detach())

    change, margin = nats(other) - nats(plain), float((scores[taken_out] - scores[put_in]).detach())
    target = 1 / (1 + math.exp(-change))
    wanted = -target * math.log(1 / (1 + math.exp(-margin))) - (1 - target) * math.log(1 / (1 + math.exp(margin)))
    supervised = lw.supervise(heard.receiver, heard.answered(heard.soft), heard)
    found = lw.LOSSES["swap"](lw.LossSettings()).term(supervised)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    found.backward()
    after = one.bridge.pooler.judge[-1].bias.grad  # the same for both runs: only what tells them apart learns
    assert float(after.abs()) < 1e-6 and float(one.bridge.pooler.judge[-1].weight.grad.abs().max()) > 0
    assert "loss_swap" in one.step()


def test_nothing_to_swap_is_no_loss():
    one = made("--ratio", "1", "--swap_weight", "1", own=examples(CONTEXT))
    heard = one.hear(one.train_rows)
    supervised = lw.supervise(heard.receiver, heard.answered(heard.soft), heard)
    assert float(lw.LOSSES["swap"](lw.LossSettings()).term(supervised)) == 0


def test_what_mixes_learns_to_select_unless_it_is_told_otherwise(toy_run):
    assert made().settings.selection_weight == 1.0
    assert made("--selection_weight", "0").settings.selection_weight == 0.0
    assert lw.Checkpoint.open(toy_run).settings.selection_weight == 0.0


# ---- bytes ---------------------------------------------------------------------------------------------------------

LATENTS = torch.linspace(-1, 1, 24).view(1, 3, 8)
WORDS = (("Zoë said", " and then", "", " 🙂."),)


@pytest.mark.parametrize("codec", [*lw.CODECS])
def test_a_message_of_words_comes_back_as_it_was(codec):
    latents = lw.CODECS[codec]().bound(LATENTS)
    message = lw.Message(latents, codec, "abc", None, WORDS)
    back = lw.Message.from_bytes(message.to_bytes())
    assert (back.words, back.codec, back.bridge) == (WORDS, codec, "abc")
    near = {"fsq2": 0.5, "fsq3": 0.3}.get(codec, 0.2)  # test_bridges.py looks at the levels
    torch.testing.assert_close(back.latents, latents, rtol=near, atol=near)
    alone = lw.Message(LATENTS[:, :0], codec, "abc", None, (("only words",),))
    assert lw.Message.from_bytes(alone.to_bytes()).words == (("only words",),)
    assert len(alone.to_bytes()) == 18 + 15 + len(codec) + len("abc") + len("only words")


def test_long_words_are_deflated():
    text = "the same words again and again " * 20
    message = lw.Message(LATENTS[:, :0], "int8", "abc", None, ((text,),))
    assert len(message.to_bytes()) < len(text) / 4
    assert lw.Message.from_bytes(message.to_bytes()).words == ((text,),)


def forged(change: Any) -> bytes:
    """A message with another body and the right checksum."""
    body = change(lw.Message(LATENTS, "int8", "abc", None, WORDS).to_bytes()[18:])
    return struct.pack("<4sHIQ", b"LWIR", 3, zlib.crc32(body), len(body)) + body


def bomb(body: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    words = packer.compress(b"a" * (lw.Message.MOST_WORDS + 1)) + packer.flush()
    return lw.Message.SIZES.pack(4, 3, 1, 0, 8, len(words)) + b"int8abc" + words


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: body[:10],
        lambda body: b"\xff" + body[1:],
        lambda body: body.replace(b"int8", b"int9"),
        lambda body: body.replace(b"abc", b"a\nc"),
        lambda body: body.replace(b"\xff", b"x", 1),
        lambda body: body.replace("ë".encode(), b"\xc3x"),
        lambda body: body[:3] + struct.pack("<I", 4) + body[7:],
        lambda body: body[:3] + struct.pack("<I", 2**32 - 1) + body[7:],
        lambda body: body[:7] + struct.pack("<I", 0) + body[11:],
        lambda body: body[:2] + b"\1" + body[3:],
        bomb,
    ],
)
def test_a_forged_message_of_words_is_refused_in_one_line(change):
    with pytest.raises(lw.LatentWireError, match="message body is not what its header promises"):
        lw.Message.from_bytes(forged(change))


def test_a_bridge_reads_only_its_own_kind_of_message():
    one = made()
    receiver = lw.Receiver(one.promptings[0], one.bridge, 6)
    language, width = one.bridge.language(0), one.bridge.shape.settings.d_z
    plain = lw.Message(torch.zeros(1, 2, width), "fp32", language).to_bytes()
    with pytest.raises(lw.LatentWireError, match="no words beside its latents"):
        receiver.open([plain])
    with pytest.raises(lw.LatentWireError, match="words beside its latents"):
        lw.Message.from_bytes(packets(one, one.train_rows)[0], lw.Wanted(language, width, None, True))
    assert load("tiny-qwen").name == receiver.lm.name


@pytest.mark.parametrize(("flags", "missing"), [(("--init", "copy"), "--ratio 4"), (("--ratio", "4"), "--init copy")])
def test_what_is_missing_is_named(flags, missing, refuse, tmp_path):
    words = ("--dataset", "toy", *PAIR, "--pooler", "mixed", *flags, "--output_dir", tmp_path / "r")
    assert missing in refuse("train", *words)


def test_latents_do_not_take_more_than_the_ratio_leaves(refuse, tmp_path):
    words = ("--dataset", "toy", *PAIR, *SHARED, "--ratio", "20", "--output_dir", tmp_path / "r")
    assert "--coarse 16" in refuse("train", *words)


def test_more_words_than_a_receiver_reads_are_refused():
    one = made()
    receiver, width = lw.Receiver(one.promptings[0], one.bridge, 6), one.bridge.shape.settings.d_z
    words = (("word " * 100_000,),)
    data = lw.Message(torch.zeros(1, 0, width), "fp32", one.bridge.language(0), None, words).to_bytes()
    with pytest.raises(lw.LatentWireError, match="positions is longer than tiny-qwen reads"):
        receiver.open([data])


def test_words_that_were_not_read_do_not_travel():
    one = made("--max_tokens", "60", "--ratio", "1")
    message, read = sent(one), one.writer.spans([one.part.sender_text(one.train_rows[0])])[0][-1][1]
    assert message.words is not None
    said = "".join(message.words[0])
    assert CONTEXT.startswith(said) and len(QUESTION) + 1 + len(said) <= read < len(QUESTION) + 1 + len(CONTEXT)


# ---- from training to the verdict ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on sixty questions, each about a text of its own."""
    home = tmp_path_factory.mktemp("mixed")
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve"]
    rows = [
        {
            "context": CONTEXT.replace("Gustave", f"{names[i % 5]}{i}"),
            "question": QUESTION,
            "answer": f"{names[i % 5]}{i}",
        }
        for i in range(160)
    ]
    (home / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lw.train_main(["--dataset", str(home / "q.jsonl"), *PAIR, "--device", "cpu", "--dtype", "float32", *SHARED, "--width", "32",
                   "--steps", "4", "--batch_size", "8", "--val_samples", "8", "--output_dir", str(home / "run")])  # fmt: skip
    return home / "run"


def test_an_evaluation_tells_the_parts_apart(run):
    results = lw.eval_main(["--checkpoint", str(run), "--methods", "bridge,control,parts", "--num_samples", "16"])
    methods = results["methods"]
    assert {name for name in methods if name.startswith("parts:")} == {
        "parts:words", "parts:words_budget", "parts:latents", "parts:other_latents",
    }  # fmt: skip
    gain = methods["bridge"]["f1"] - methods["parts:words_budget"]["f1"]
    assert results["parts"]["parts:words_budget"]["gain"] == pytest.approx(gain)
    assert results["verdict"].endswith(lw.which_part(results["parts"], "f1"))
    assert methods["parts:words"]["tokens"] < methods["bridge"]["tokens"]
    assert methods["parts:latents"]["bytes"] < methods["bridge"]["bytes"]
    for name in ("control:zero", "control:mean", "control:gaussian"):  # controls say no word of the text
        assert methods[name]["tokens"] == methods["parts:latents"]["tokens"]


def test_a_control_says_no_words(run):
    checkpoint = lw.Checkpoint.open(run)
    context = lw.open_context(lw.EvalSettings(checkpoint=run, num_samples=6), checkpoint)
    for name in ("control:zero", "control:mean", "control:gaussian", "parts:latents"):
        for example in context.examples:
            words = lw.Message.from_bytes(lw.METHODS[name](context).message(example)).words
            assert words is not None and not any(words[0])
    own = lw.METHODS["parts:other_latents"](context)
    for example in context.examples:
        mine = lw.Message.from_bytes(lw.METHODS["bridge"](context).message(example))
        other = lw.Message.from_bytes(own.message(example))
        assert mine.words == other.words and not torch.equal(mine.latents, other.latents)


def test_encode_and_answer_give_what_an_evaluation_heard(run, say, tmp_path):
    say("encode", "--text", CONTEXT, "--question", QUESTION, "--checkpoint", run, "-o", tmp_path / "m.wire")
    message = lw.Message.from_bytes((tmp_path / "m.wire").read_bytes())
    assert message.words is not None and "The tower" in "".join(message.words[0])
    first = say("answer", tmp_path / "m.wire", "--checkpoint", run, "--question", QUESTION)
    assert first == say("answer", tmp_path / "m.wire", "--checkpoint", run, "--question", QUESTION)


@pytest.mark.parametrize(
    ("words", "others", "said"),
    [
        ((0.1, 0.01), (0.1, 0.01), "its latents carry something of the text (f1 +0.100"),
        ((0.1, 0.01), (0.1, 0.2), "prepare the reader and carry nothing that is shown"),
        ((0.1, 0.01), (-0.1, 0.01), "prepare the reader and carry nothing that is shown"),
        ((0.1, 0.01), None, "is not tested without parts:other_latents"),
        ((0.1, 0.2), (0.1, 0.01), "add nothing that is shown"),
        ((-0.1, 0.2), (0.1, 0.01), "add nothing that is shown"),
        ((-0.1, 0.01), (0.1, 0.01), "take something away"),
    ],
)
def test_the_verdict_says_which_part_communicates(words, others, said):
    found = {"parts:words_budget": words} | ({"parts:other_latents": others} if others else {})
    parts = {name: dict(zip(("gain", "p"), values, strict=True)) for name, values in found.items()}
    assert said in lw.which_part(parts, "f1")


def test_a_linear_bridge_beside_it_selects_nothing(refuse, tmp_path):
    for name in ("selection_weight", "swap_weight"):
        assert name in lw.METHODS["linear_bridge"].dropped  # type: ignore[attr-defined]
        words = ("--dataset", "toy", *PAIR, f"--{name}", "1", "--output_dir", tmp_path / "r")
        assert "--pooler mixed" in refuse("train", *words)
