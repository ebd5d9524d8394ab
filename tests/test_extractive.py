"""§12: rivals that choose words: what is chosen, what fits, what is trained on it; and a question that both ends know."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_baselines import ASKED, FLAGS, asking, contest_on, data, using  # noqa: F401

import LATENTWIRE as lw

trains = pytest.mark.trains
CHOOSING = ("extractive", "extractive:windows", "extractive:bytes", "random_words")
TUNED = "extractive+prompt_tuning"
FOUND, WHO = "The old lighthouse was built by Jürgen in 1874.", "Who built the lighthouse?"
SENTENCES = [
    "Anna lives in a small town by the sea.", "  Every morning she buys bread at the harbour.", f"\n{FOUND}",
    " Few visitors see it 👍🏽, for “the road” is closed.",
    " She paints it from her window, and sends what she has painted to an aunt who collects such things in Évora.",
]  # fmt: skip
STORY = "".join(SENTENCES)
ASKED_ORDER, CENTRAL_ORDER = [2, 4, 1, 0, 3], [4, 0, 2, 1, 3]
"""Sentences, the best first: "the" (in 4 of 5), "built", "lighthouse" and "who" (in 1) are asked; 0 and 2 are as central."""
NASTY = [
    "", " ", "\n\n", "a", "漢字" * 150, 'He said "Go." Then he (Ben.) went.', "a\n\n b\nc\n", "  many   spaces.    here  ",
    "One! Two? 3.5 is e.g. three", "x" * 33 + " " + "y" * 64 + ". z", "w " * 50 + "end.\tNext\r\nline", STORY,
]  # fmt: skip


@pytest.fixture(scope="module")
def worlds(data) -> dict[str, lw.EvalContext]:  # noqa: F811
    """The same models and questions with free answers under each protocol."""
    names = ("aware", "shared", "agnostic")
    return {name: contest_on(data / "free", protocol=f"question-{name}") for name in names}


@pytest.fixture(scope="module")
def agnostic(worlds) -> lw.EvalContext:
    return worlds["agnostic"]


@pytest.fixture(scope="module")
def bridged(data, tmp_path_factory) -> Callable[..., Path]:  # noqa: F811
    """Bridges of one step with a latent for every two tokens of one side, each made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def made(protocol: str, unit: str, encoder: str = "byte") -> Path:
        if (key := (protocol, unit, encoder)) not in runs:
            folder = runs[key] = tmp_path_factory.mktemp("bridged") / "run"
            how = ("--encoder", encoder, "--pooler", "window", "--init", "copy", "--windows_on", unit, "--ratio", "2")
            asked = ("--dataset", str(data / "free"), "--protocol", f"question-{protocol}", "--steps", "1")
            lw.train_main([*FLAGS, *how, *asked, "--max_tokens", "255", "--output_dir", str(folder)])
        return runs[key]

    return made


@pytest.fixture(scope="module")
def run(bridged) -> Path:
    """Windows of the receiver's tokens, and a shared question."""
    return bridged("shared", "receiver")


def beside(folder: Path) -> lw.EvalContext:
    return lw.open_context(lw.EvalSettings(checkpoint=folder, state_cache="memory"), lw.Checkpoint.open(folder))


def asked_of(contest: lw.EvalContext, context: str = STORY, question: str = WHO, **more: Any) -> lw.Example:
    return replace(contest.examples[0], context=context, question=question, **more)


def kept(contest: lw.EvalContext, name: str, example: lw.Example, **asked: Any) -> str:
    """What a method lets through of one text."""
    with using(name, contest, **asked) as method:
        return method.read([example])[0].context if name == TUNED else method.contexts([example])[0]


def together(words: Sequence[str], places: Iterable[int]) -> str:
    """Those of a text's words, in its order: as they stood where they stood side by side, else a space apart."""
    text, last = "", -1
    for place in sorted(places):
        text += words[place] if place == last + 1 else f" {words[place].strip()}"
        last = place
    return text.strip()


def best_words(pieces: Sequence[str], order: Sequence[int], size: Callable[[str], int], budget: int) -> str:
    """The words of a text's pieces, these in this order, up to the first that does not fit."""
    of = [(number, word) for number, piece in enumerate(pieces) for word in re.findall(r"\s*\S+", piece)]
    ranked = [place for number in order for place, (own, _) in enumerate(of) if own == number]
    texts = (together([word for _, word in of], ranked[:count]) for count in range(len(of) + 1))
    return [*itertools.takewhile(lambda text: size(text) <= budget, texts)][-1]


# ---- sentences, runs and scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY)
def test_sentences_and_runs_cover_any_text(text):
    sentences = lw.sentence_spans(text)
    assert "".join(text[a:b] for a, b in sentences) == text and all(a < b for a, b in sentences)
    for most in (1, 3, 8):
        runs = lw.word_runs(text, sentences, most)
        assert "".join(text[a:b] for a, b, _ in runs) == text and all(a < b for a, b, _ in runs)
        for number, own in itertools.groupby(runs, key=lambda run: run[2]):
            spans = [(a, b) for a, b, _ in own]
            assert (spans[0][0], spans[-1][1]) == sentences[number]  # none crosses its sentence
            counts = [len(re.findall(r"\S{1,32}", text[a:b])) for a, b in spans]
            assert max(counts) <= most and max(counts) - min(counts) <= 1
            assert len(counts) == max(1, math.ceil(sum(counts) / most))
        assert lw.joined_spans(text, [(a, b) for a, b, _ in reversed(runs)]) == text.strip()


@pytest.mark.parametrize("text", NASTY)
def test_white_space_leads_sentences_and_runs(text):
    sentences = lw.sentence_spans(text)
    for most in (None, 1, 3, 8):
        spans = sentences if most is None else [run[:2] for run in lw.word_runs(text, sentences, most)]
        pieces = [text[a:b] for a, b in spans]
        assert all(piece and not piece[-1].isspace() for piece in pieces[:-1])  # nothing comes after the last
        assert not pieces or pieces[-1].strip() or not text.strip()


@pytest.mark.parametrize(
    "sentences",
    [
        ['He said "Go."', "  Then (Ben.)", " he left!", "\nA title", "\n3.5 is less?", " Yes"],
        ["(It is.)", " 'Is it?'", " [No!]", "\tSo be it. "],
        ["今日は。", "明日は！", "本当？", "はい"],
        ["今日は。", " 明日は！", "\n3。", "5 is.", " no"],
        SENTENCES,
        ["He left!", "\n\nA title", "\n \n3.5"],
        ["He left!", "\r\nA title"],
        ["One.", " Two.\n"],
        ["「行け。」", "彼は"],
        ["本当！？", "はい"],
    ],
)
def test_where_a_sentence_ends(sentences):
    text = "".join(sentences)
    assert [text[a:b] for a, b in lw.sentence_spans(text)] == sentences


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        ("one two\tthree  four\nfive ", 2, ["one", " two\tthree", "  four\nfive "]),
        ("one two\tthree  four\nfive", 4, ["one two", "\tthree  four\nfive"]),
        (" one two", 1, [" one", " two"]),
        (f"a {'b' * 33} c", 1, ["a", f" {'b' * 32}", "b", " c"]),
        ("漢" * 70, 1, ["漢" * 32, "漢" * 32, "漢" * 6]),
        (" \n", 3, [" \n"]),
    ],
)
def test_runs_by_hand(text, most, wanted):
    assert [text[a:b] for a, b, _ in lw.word_runs(text, [(0, len(text))], most)] == wanted


def test_pieces_that_stood_apart_are_held_apart_by_a_space():
    text = "one two  three.\nfour 漢字漢字"
    assert lw.joined_spans(text, [(9, 16), (0, 4)]) == "one three."
    assert lw.joined_spans(text, [(9, 14), (14, 16), (16, 20)]) == "three.\nfour"
    assert lw.joined_spans(text, [(21, 22), (23, 24), (24, 25), (0, 3)]) == "one 漢 漢字"
    assert lw.joined_spans("one two.\n  four", [(0, 4), (9, 15)]) == "one four"
    text = "one two  three.\n four"  # as words are cut, with the white space before them
    assert lw.joined_spans(text, [(0, 3), (7, 15)]) == "one three."
    assert lw.joined_spans(text, [(15, 21), (3, 7)]) == "two four"
    assert lw.joined_spans(text, [(15, 21), (7, 15)]) == "three.\n four"


def test_bm25_by_hand():
    units = [["a", "b"], ["a"], ["c", "c", "d"]]  # 2 terms a unit in the mean
    a, c = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)  # in two units of three, in one of three
    assert lw.rarities(units) == pytest.approx({"a": a, "b": c, "c": c, "d": c})
    short, long = 1.5 * (0.25 + 0.75 * 1 / 2), 1.5 * (0.25 + 0.75 * 3 / 2)
    wanted = [a * 2.5 / (1 + 1.5), a * 2.5 / (1 + short), c * 2 * 2.5 / (2 + long)]
    assert lw.bm25(["a", "c", "x", "a"], units) == pytest.approx(wanted)
    assert lw.bm25(["c"], units, k1=1.0, b=0.0) == pytest.approx([0, 0, c * 2 * 2 / 3])
    assert lw.bm25(["a"], [["a"], ["a"]])[0] == pytest.approx(math.log(1.2)) and lw.bm25(["a"], [[], []]) == [0, 0]
    assert lw.terms_of("Élan, l'été: SNAKE_case 3.5") == ["élan", "l", "été", "snake_case", "3", "5"]


def test_centrality_by_hand():
    assert lw.centrality([["a", "b"]] * 3) == pytest.approx([1, 1, 1])
    assert lw.centrality([["a"], ["b"], []]) == [0, 0, 0] and lw.centrality([["a"]]) == [0]
    assert lw.centrality([["a"], ["a", "b"], ["b"]]) == pytest.approx([0.5**0.5 / 2, 0.5**0.5, 0.5**0.5 / 2])
    common, rare = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    cosine = common / math.hypot(common, 2 * rare)
    assert lw.centrality([["a"], ["a", "b", "b"], ["c"]]) == pytest.approx([cosine / 2, cosine / 2, 0])


def test_the_storys_sentences_are_ranked_as_by_hand():
    units = [re.findall(r"\w+", sentence.lower()) for sentence in SENTENCES]
    terms = sorted({term for unit in units for term in unit})
    counts = np.array([[unit.count(term) for term in terms] for unit in units])
    found = (counts > 0).sum(0)
    vectors = counts * np.log(1 + (5 - found + 0.5) / (found + 0.5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    central = ((vectors @ vectors.T).sum(1) - 1) / 4
    assert lw.centrality(units) == pytest.approx(central.tolist())
    assert sorted(range(5), key=lambda i: -central[i].round(9)) == CENTRAL_ORDER
    rare, common = math.log(4), math.log(1 + 1.5 / 4.5)
    lengths = [1.5 * (0.25 + 0.75 * len(unit) / (56 / 5)) for unit in units]
    once = [2.5 / (1 + length) for length in lengths]
    asked = [common * once[0], common * once[1], (common + 2 * rare) * once[2], common * once[3], rare * once[4]]
    assert lw.bm25(["who", "built", "the", "lighthouse"], units) == pytest.approx(asked)
    assert sorted(range(5), key=lambda i: -round(asked[i], 9)) == ASKED_ORDER


# ---- what is chosen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["aware", "shared"])
@pytest.mark.parametrize("name", ["extractive", "extractive:bytes", TUNED])
def test_the_sentence_that_answers_is_read(name, protocol, worlds):
    ids, before = worlds[protocol].setup.receiver.ids, "\nQuestion: {}\n" if protocol == "aware" else ""
    buys = "Every morning she buys bread at the harbour."
    for question, wanted in ((WHO, FOUND), ("When does she buy bread?", buys)):
        apart = before.format(question)
        size = {"token_budget_k": len(ids(wanted)) + len(ids(apart)), "byte_budget": len((wanted + apart).encode())}
        assert kept(worlds[protocol], name, asked_of(worlds[protocol], question=question), **size) == wanted


@pytest.mark.parametrize("name", ["extractive", "extractive:bytes", TUNED])
def test_a_sender_that_sees_no_question_is_not_helped_by_it(name, agnostic):
    whole = SENTENCES[4].strip()
    for wanted in ("She paints it from her window, and sends what", whole, f"{SENTENCES[0]} {whole}"):
        size = {"token_budget_k": len(agnostic.setup.receiver.ids(wanted)), "byte_budget": len(wanted.encode())}
        for question in (WHO, "When does she buy bread?", ""):
            assert kept(agnostic, name, asked_of(agnostic, question=question), **size) == wanted


def test_the_window_that_answers_is_read(worlds):
    words = [f"w{i}" if i != 30 else "lighthouse" for i in range(72)]
    for protocol, first in (("shared", 24), ("agnostic", 0)):  # none is more central, and the first comes first
        window = " ".join(words[first : first + 24])
        contest, budget = worlds[protocol], len(worlds[protocol].setup.receiver.ids(window))
        assert kept(contest, "extractive:windows", asked_of(contest, " ".join(words)), token_budget_k=budget) == window


@pytest.mark.parametrize("protocol", ["aware", "shared", "agnostic"])
def test_without_a_question_the_central_sentence_is_read(protocol, worlds):
    text, central = "Dogs chase cats. Cats chase mice. Mice eat cheese. Snow is cold.", "Cats chase mice."
    ids = worlds[protocol].setup.receiver.ids
    asked = central if protocol == "agnostic" else "Snow is cold."
    for question, wanted in (("", central), ("?", central), ("Is snow cold?", asked)):
        apart = len(ids(f"\nQuestion: {question}\n")) if protocol == "aware" else 0
        found = kept(worlds[protocol], "extractive", asked_of(worlds[protocol], text, question),
                     token_budget_k=len(ids(wanted)) + apart)  # fmt: skip
        assert found == wanted


@pytest.mark.parametrize("budget", [1, 25, 48, 71, 150, 280])
@pytest.mark.parametrize("protocol", ["shared", "agnostic"])
@pytest.mark.parametrize("name", ["extractive", "extractive:windows", "extractive:bytes"])
def test_the_best_pieces_are_read_word_by_word(name, protocol, budget, worlds):
    contest, pieces, order = worlds[protocol], SENTENCES, ASKED_ORDER if protocol == "shared" else CENTRAL_ORDER
    if name == "extractive:windows":
        words = re.findall(r"\s*\S+", STORY)
        pieces = ["".join(words[first : first + 19]) for first in (0, 19, 38)]  # of 57
        # "built" and "lighthouse" are in 1, "who" is in 2; 0 and 1 share "the" and "by", 1 and 2 share "it"
        order = [1, 2, 0] if protocol == "shared" else [1, 0, 2]
    cost = str.encode if name == "extractive:bytes" else contest.setup.receiver.ids
    wanted = best_words(pieces, order, lambda text: len(cost(text)), budget)
    assert kept(contest, name, asked_of(contest), token_budget_k=budget, byte_budget=budget) == wanted


@pytest.mark.parametrize("budget", [1, 25, len(FOUND), 71, 150, 280])
@pytest.mark.parametrize("name", CHOOSING)
def test_no_budget_is_exceeded_and_one_more_run_would_not_fit(name, budget, agnostic):
    found = kept(agnostic, name, asked_of(agnostic), token_budget_k=budget, byte_budget=budget)
    with using(name, agnostic) as method:
        ranked = method.ranked(asked_of(agnostic))
    texts = [lw.joined_spans(STORY, ranked[:count]) for count in range(len(ranked) + 1)]
    ids = agnostic.setup.receiver.ids
    sizes = [len(text.encode() if name == "extractive:bytes" else ids(text)) for text in texts]
    assert sizes[texts.index(found)] <= budget < sizes[texts.index(found) + 1]
    words = iter(STORY.split())
    assert all(word in words for word in found.split())  # in the text's order


@pytest.mark.parametrize("name", [*CHOOSING, TUNED])
def test_a_text_that_fits_stays_as_it_is(name, agnostic):
    text = f" \n{STORY}  Bye. "
    assert kept(agnostic, name, asked_of(agnostic, text), token_budget_k=400, byte_budget=400) == text


def test_random_words_are_those_of_the_seed_and_the_row(agnostic):
    def of(seed: int, name: str = "0") -> str:
        return kept(agnostic, "random_words", asked_of(agnostic, id=name), token_budget_k=80, seed=seed)

    assert of(1) == of(1) and len({of(1), of(2), of(1, "1")}) == 3


# ---- what is trained on it -----------------------------------------------------------------------------------------------


@trains
def test_soft_tokens_are_trained_and_asked_before_the_best_sentences(agnostic, monkeypatch):
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    pack = lw.Prompting.pack

    def noting(self: Any, soft: Any, examples: Any, **how: Any) -> Any:
        seen[how["answers"]] |= {e.context for e in examples}
        return pack(self, soft, examples, **how)

    monkeypatch.setattr(lw.Prompting, "pack", noting)
    with using(TUNED, agnostic, token_budget_k=40, rival_steps=16) as method:
        method.answers(agnostic.examples)
        best = lw.METHODS["extractive"](method.context)
    learned = [*agnostic.setup.splits["train"], *agnostic.setup.splits["validation"]]
    assert {e.id for e in learned} >= {e.id for e in agnostic.examples}  # the same ids, other rows
    assert seen == {True: {*best.contexts(learned)}, False: {*best.contexts(agnostic.examples)}}
    assert not seen[True] & {e.context for e in learned} and "" not in seen[True]


@trains
@pytest.mark.parametrize("protocol", ["aware", "agnostic", "shared"])
def test_its_answers_tell_what_was_read(protocol, worlds):
    contest, lm = worlds[protocol], worlds[protocol].setup.receiver
    examples, found = [replace(e, context=f"{e.context} {STORY}") for e in contest.examples], []
    for name in ("extractive", TUNED):
        with using(name, contest, token_budget_k=120) as method:
            answers = method.answers(examples)
            found.append([(answer.tokens, answer.nbytes) for answer in answers])
    texts = [kept(contest, "extractive", e, token_budget_k=120) for e in examples]
    assert found == [[(len(lm.ids(text)), len(text.encode())) for text in texts]] * 2
    asked = len(lm.ids(f"\nQuestion: {ASKED}\n")) if protocol == "aware" else 0
    assert all(105 - asked < tokens <= 120 - asked and tokens != nbytes for tokens, nbytes in found[0])


@trains
@pytest.mark.parametrize(
    ("protocol", "unit", "encoder", "length"),
    [
        ("aware", "encoder", "byte", 40),
        ("agnostic", "encoder", "byte", 40),
        ("agnostic", "encoder", "byte", 4000),  # of which 2,048 are read
        ("shared", "encoder", "byte", 40),
        ("agnostic", "receiver", "byte", 40),
        ("agnostic", "receiver", "byte", 300),
        ("shared", "receiver", "byte", 40),
        ("aware", "encoder", "hidden", 40),
        ("aware", "encoder", "hidden", 300),
    ],
)
def test_a_row_of_the_same_id_has_the_budget_of_a_message_of_its_own(protocol, unit, encoder, length, bridged):
    channel = beside(bridged(protocol, unit, encoder))
    own, part, lm = channel.examples[0], channel.setup.part, channel.setup.sender
    other = replace(own, context=f"{own.context} {(STORY * 20)[:length]}")
    read = [part.sender_text(e) for e in (own, other)]
    if unit == "receiver":
        wanted = [math.ceil(len(channel.setup.receiver.ids(text)) / 2) for text in read]
    elif encoder == "byte":  # four bytes are read together
        wanted = [math.ceil(min(len(text.encode()), 2048) / 8) for text in read]
    else:
        wanted = [math.ceil(min(len(lm.ids(text)), 255 - len(lm.bos)) / 2) for text in read]
    writer = lw.Sender(lm, channel.bridge, lw.text_limit(channel.settings, lm), channel.first)
    assert [writer.message([text], channel.receiver.name).latents.shape[1] for text in read] == wanted
    assert len(channel.latents[0]) == wanted[0] < wanted[1]
    assert [channel.token_budget(e) for e in (own, replace(own), other)] == [wanted[0], *wanted]


@trains
def test_a_row_of_the_same_id_is_shortened_to_a_budget_of_its_own(run, bridged):
    for channel in (beside(run), beside(bridged("agnostic", "encoder"))):
        own = channel.examples[0]
        rows = [own, replace(own, context=f"{own.context} {STORY}"), replace(own, context=f"{own.context} {FOUND}")]
        best = lw.METHODS["extractive"](channel)
        wanted = [best.compress(e, channel.token_budget(e)) for e in rows]
        assert [e.context for e in lw.METHODS[TUNED](channel).read(rows)] == wanted and all(wanted)
        assert len({*map(channel.token_budget, rows)}) == len({*wanted}) == 3


# ---- a question that both ends know --------------------------------------------------------------------------------------


def test_both_ends_read_a_shared_question(worlds):
    found = {}
    for name, contest in worlds.items():
        part, example = contest.setup.part, contest.examples[0]
        heard = contest.setup.receiver.tokenizer.decode(contest.receiver.prompting.after(example, False))
        found[name] = [ASKED in text for text in (part.sender_text(example), part.question_text(example), heard)]
        assert part.question_text(replace(example, question="")) == ""
    assert found == {"aware": [True, False, False], "shared": [True] * 3, "agnostic": [False, True, True]}


@pytest.mark.parametrize("name", CHOOSING)
def test_only_a_question_that_latents_would_hold_counts(name, worlds):
    example = asked_of(worlds["aware"])
    with using(name, worlds["aware"]) as method:
        whole, asked = method.compress(example, 120), method.size(WHO)
        sizes = {"token_budget_k": 120, "byte_budget": 120}
        less, shared, agnostic = (kept(contest, name, example, **sizes) for contest in worlds.values())
        assert shared == whole and 60 < method.size(less) <= 120 - asked < method.size(whole)
        assert agnostic == kept(worlds["agnostic"], name, replace(example, question=""), **sizes)
        assert (agnostic == whole) is (name == "random_words") and 120 - asked < method.size(agnostic) <= 120


def test_older_budgets_do_not_count_a_shared_question_either(worlds):
    example, lm = asked_of(worlds["shared"]), worlds["shared"].setup.receiver
    with using("token_budget", worlds["shared"], token_budget_k=50) as method:
        assert method.ids(example) == [*lm.ids(STORY)[:50], *lm.ids(f"\nQuestion: {WHO}\n")]
    assert kept(worlds["shared"], "byte_budget", example, byte_budget=50) == STORY[:50]
    assert asking(worlds["shared"], budget_ratio=3.0).token_budget(example) == round(len(lm.ids(STORY)) / 3)


@trains
def test_an_evaluation_says_that_the_question_was_shared(run, tmp_path):
    names = ("bridge", *CHOOSING, TUNED)
    lw.eval_main(["--checkpoint", str(run), "--state_cache", "memory", "--methods", ",".join(names), "--rival_steps", "1",
                  "--rival_tries", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert (facts["protocol"], facts["asked_apart"], facts["order"]) == ("question-shared", True, [*names])
    rows = {(row["method"], row["id"]): row for row in lw.read_rows(tmp_path / "records.jsonl")}
    assert len(rows) == 12 * len(names)
    for (name, key), row in rows.items():
        unit = "bytes" if name == "extractive:bytes" else "tokens"
        assert 20 < row[unit] <= rows["bridge", key][unit]


@trains
def test_a_message_with_a_shared_question_is_answered_with_it(run):
    first, second = (lw.encode_text(run, STORY, question) for question in (WHO, ASKED))
    assert first != second
    assert lw.answer_message(run, first, WHO) != lw.answer_message(run, first, "Where does Anna buy her bread?")
    with pytest.raises(lw.LatentWireError, match="give it to the receiver with --question"):
        lw.answer_message(run, first)


@trains
def test_protocols_do_not_share_a_table(data, tmp_path):  # noqa: F811
    for protocol, name in itertools.product(("aware", "shared", "agnostic"), ("control:none", "extractive")):
        lw.main(["baseline", name, "--dataset", str(data / "free"), "--num_samples", "4", *FLAGS, "--protocol",
                 f"question-{protocol}", "--output_dir", str(tmp_path / protocol / name)])  # fmt: skip
    columns, left = lw.result_groups(lw.evaluations_below(tmp_path))
    found = [({member.facts["protocol"] for member in column.members}, {*column.summaries}) for column in columns]
    assert not left and [len(protocols) for protocols, _ in found] == [1, 1, 1]
    assert all(names == {"control:none", "extractive"} for _, names in found)
    keys = {member.facts["provenance"]["record_key"] for column in columns for member in column.members}
    assert len(keys) == 3
