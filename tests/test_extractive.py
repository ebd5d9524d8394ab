"""§12: rivals that choose words: what is chosen, what fits, what is trained on it; and a question that both ends know."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_baselines import ASKED, FLAGS, asking, contest_on, data, using  # noqa: F401

import LATENTWIRE as lw

trains = pytest.mark.trains
CHOOSING = ("extractive", "extractive:windows", "extractive:bytes", "random_words")
TUNED = "extractive+prompt_tuning"
FOUND, WHO = "The old lighthouse was built by Jürgen in 1874.", "Who built the lighthouse?"
STORY = (
    "Anna lives in a small town by the sea.  Every morning she buys bread at the harbour.\n"
    f"{FOUND} Few visitors see it 👍🏽, for “the road” is closed. "
    "She paints it from her window, and sends what she has painted to an aunt who collects such things in Évora."
)
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
def run(data, tmp_path_factory) -> Path:  # noqa: F811
    """A bridge of one step with a latent for every two tokens, and a shared question."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    made = ("--encoder", "byte", "--pooler", "window", "--init", "copy", "--windows_on", "receiver", "--ratio", "2")
    asked = ("--dataset", str(data / "free"), "--protocol", "question-shared", "--steps", "1")
    lw.train_main([*FLAGS, *made, *asked, "--output_dir", str(folder)])
    return folder


def asked_of(contest: lw.EvalContext, context: str = STORY, question: str = WHO, **more: Any) -> lw.Example:
    return replace(contest.examples[0], context=context, question=question, **more)


def kept(contest: lw.EvalContext, name: str, example: lw.Example, **asked: Any) -> str:
    """What a method lets through of one text."""
    with using(name, contest, **asked) as method:
        return method.read([example])[0].context if name == TUNED else method.contexts([example])[0]


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


def test_where_a_sentence_ends():
    text = 'He said "Go."  Then (Ben.) he left!\n\nA title\n3.5 is less? Yes'
    found = [text[a:b] for a, b in lw.sentence_spans(text)]
    assert found == ['He said "Go."  ', "Then (Ben.) ", "he left!\n\n", "A title\n", "3.5 is less? ", "Yes"]


def test_pieces_that_stood_apart_are_held_apart_by_a_space():
    text = "one two  three.\nfour 漢字漢字"
    assert lw.joined_spans(text, [(9, 16), (0, 4)]) == "one three."
    assert lw.joined_spans(text, [(9, 14), (14, 16), (16, 20)]) == "three.\nfour"
    assert lw.joined_spans(text, [(21, 22), (23, 24), (24, 25), (0, 3)]) == "one 漢 漢字"
    assert lw.joined_spans("one two.\n  four", [(0, 4), (9, 15)]) == "one four"


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


# ---- what is chosen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["extractive", "extractive:bytes", TUNED])
def test_the_sentence_that_answers_is_read(name, agnostic):
    size = {"token_budget_k": len(agnostic.setup.receiver.ids(FOUND)), "byte_budget": len(FOUND.encode())}
    assert kept(agnostic, name, asked_of(agnostic), **size) == FOUND
    other = asked_of(agnostic, question="When does she buy bread?")
    assert kept(agnostic, name, other, **size) == "Every morning she buys bread at the harbour."


def test_the_window_that_answers_is_read(agnostic):
    words = [f"w{i}" if i != 30 else "lighthouse" for i in range(72)]
    second = " ".join(words[24:48])
    budget = len(agnostic.setup.receiver.ids(second))
    assert kept(agnostic, "extractive:windows", asked_of(agnostic, " ".join(words)), token_budget_k=budget) == second


def test_without_a_question_the_central_sentence_is_read(agnostic):
    text = "Dogs chase cats. Cats chase mice. Mice eat cheese. Snow is cold."
    budget = len(agnostic.setup.receiver.ids("Cats chase mice."))
    for question, wanted in (("", "Cats chase mice."), ("?", "Cats chase mice."), ("Is snow cold?", "Snow is cold.")):
        assert kept(agnostic, "extractive", asked_of(agnostic, text, question), token_budget_k=budget) == wanted


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
@pytest.mark.parametrize("protocol", ["agnostic", "shared"])
def test_its_answers_tell_what_was_read(protocol, worlds):
    found = []
    for name in ("extractive", TUNED):
        with using(name, worlds[protocol], token_budget_k=40) as method:
            answers = method.answers(worlds[protocol].examples)
            found.append([(answer.tokens, answer.nbytes) for answer in answers])
    assert found[0] == found[1] and all(20 < tokens <= 40 for tokens, _ in found[0])


@trains
def test_a_row_of_the_same_id_has_a_budget_of_its_own(run):
    channel = lw.open_context(lw.EvalSettings(checkpoint=run, state_cache="memory"), lw.Checkpoint.open(run))
    own = channel.examples[0]
    other = replace(own, context=f"{own.context} {STORY}")
    budgets = [math.ceil(len(channel.setup.receiver.ids(f"{ASKED}\n{e.context}")) / 2) for e in (own, other)]
    assert [channel.token_budget(e) for e in (own, other)] == budgets and budgets[0] == len(channel.latents[0])
    best = lw.METHODS["extractive"](channel)
    wanted = [best.compress(e, budget) for e, budget in zip((own, other), budgets, strict=True)]
    assert [e.context for e in lw.METHODS[TUNED](channel).read([own, other])] == wanted and all(wanted)


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
        less, *others = (
            kept(contest, name, example, token_budget_k=120, byte_budget=120) for contest in worlds.values()
        )
        assert others == [whole, whole] and 60 < method.size(less) <= 120 - asked < method.size(whole)


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
