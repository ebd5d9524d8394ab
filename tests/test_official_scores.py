"""§5 DATA: our scores beside each data set's published rule, written here anew, on hostile strings."""

from __future__ import annotations

import collections
import random
import re
import string
from typing import Any

import pytest

import LATENTWIRE as lw


def made(name: str) -> lw.Task:
    return lw.make_task(lw.DataSettings(dataset=name))


def scored(name: str, said: str, *golds: str) -> dict[str, Any]:
    """Our record of one free answer."""
    part = made(name)
    return lw.record_of(part, lw.Example(f"{name}:0", "c", "q", golds), lw.Answer(said))


# ---- strings -------------------------------------------------------------------------------------------------------

PIECES = (
    "yes", "no", "noanswer", "Yes.", "NO!", "the", "a", "an", "The", "A", "An", "cat", "Cat's", "don't", "U.S.", "us",
    "1,000", "1000", "-5", "$5", ".5", "5%", "“q”", "x—y", "é", "e\u0301", "ß", "SS", "İ", "i", "\u00a0", "\u200b", "\t",
    "\n", "  ", "", "_", "a_b", "^", "東京", "🙂", "½", "²", "the-cat", "a.", "(an)", "yes-no", "no answer", "ﬁ", "Ⅳ", "\x00",
    "\u2028", "theatre", "Ａ", "＄", "'", "--", "…", "`the`", "answer", "I", "ANSWER:", "####", "\ufeff",
)  # fmt: skip


def strings(seed: str, count: int) -> list[str]:
    """Hostile strings: each piece alone, and random rows of them."""
    rng = random.Random(seed)
    mixed = [rng.choice(("", " ", " ")).join(rng.choices(PIECES, k=rng.randint(0, 6))) for _ in range(count)]
    return [*PIECES, *mixed]


def normal(text: str) -> str:
    """The normalisation that SQuAD 1.1 and HotpotQA publish: lower, then punctuation, then articles, then white space."""
    kept = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(said: str, gold: str) -> float:
    ours, theirs = normal(said).split(), normal(gold).split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def squad_scores(said: str, golds: tuple[str, ...]) -> tuple[float, float]:
    """evaluate-v1.1.py: the best annotator, for each measure."""
    return max(float(normal(said) == normal(gold)) for gold in golds), max(overlap(said, gold) for gold in golds)


def hotpot_scores(said: str, gold: str) -> tuple[float, float]:
    """hotpot_evaluate_v1.py: yes, no and noanswer share no words with longer answers."""
    ours, theirs = normal(said), normal(gold)
    apart = ours != theirs and {"yes", "no", "noanswer"} & {ours, theirs}
    return float(ours == theirs), 0.0 if apart else overlap(said, gold)


# ---- SQuAD and HotpotQA --------------------------------------------------------------------------------------------


def test_squad_by_its_script():
    """D7: EM and F1 of evaluate-v1.1.py, best of several annotators."""
    rng, pool = random.Random("squad"), strings("squad", 300)
    part = made("squad")
    for _ in range(4000):
        said, golds = rng.choice(pool), tuple(rng.choices(pool, k=rng.randint(1, 4)))
        row = lw.record_of(part, lw.Example("0", "c", "q", golds), lw.Answer(said))
        em, f1 = squad_scores(said, golds)
        assert row["em"] == em, (said, golds)
        assert row["f1"] == pytest.approx(f1), (said, golds)
        assert row["gen_correct"] == em, (said, golds)


@pytest.mark.parametrize(
    ("said", "gold", "f1"),
    [
        ("yes", "yes", 1),
        ("Yes.", "the yes", 1),
        ("yes it is", "yes", 0),
        ("yes", "yes he was", 0),
        ("no", "no man's land", 0),
        ("no man", "no", 0),
        ("noanswer", "noanswer at all", 0),
        ("no answer", "noanswer", 0),
        ("no man", "no man's land", 0.4),
        ("yes and no", "no and yes", 1),
    ],
)
def test_hotpotqa_gives_nothing_for_half_a_yes(said, gold, f1):
    """D7: with SQuAD's F1 a "yes it is" had 0.5 where HotpotQA's own script gives 0."""
    assert scored("hotpotqa", said, gold)["f1"] == pytest.approx(f1)


def test_hotpotqa_by_its_script():
    """D7: EM and F1 of hotpot_evaluate_v1.py, alone and as a part of a mixture."""
    rng, pool = random.Random("hotpotqa"), strings("hotpotqa", 300)
    alone, mixed = made("hotpotqa"), made("squad,hotpotqa")
    for _ in range(4000):
        said, gold = rng.choice(pool), rng.choice(pool)
        em, f1 = hotpot_scores(said, gold)
        for part in (alone, mixed):
            row = lw.record_of(part, lw.Example("hotpotqa:0", "c", "q", (gold,)), lw.Answer(said))
            assert row["em"] == em, (said, gold)
            assert row["f1"] == pytest.approx(f1), (said, gold)
        row = lw.record_of(mixed, lw.Example("squad:0", "c", "q", (gold,)), lw.Answer(said))
        assert row["f1"] == pytest.approx(squad_scores(said, (gold,))[1]), (said, gold)


# ---- GSM8K ---------------------------------------------------------------------------------------------------------


def published_number(completion: str) -> str | None:
    """Its authors' rule: what follows the first "#### ", digits, points and commas, commas dropped."""
    found = re.search(r"#### (-?[0-9.,]+)", completion)
    return found[1].strip().replace(",", "") if found else None


def test_gsm8k_by_its_authors_rule():
    """D7: an answer in the published form is right where their extraction gives its value (18.0 is 18)."""
    rng, part = random.Random("gsm8k"), made("gsm8k")
    golds = ["18", "-5", "0", "70000", "1234567", "12.5", "3"]
    tails = ["", " ", "\n", " dollars", " and then 7", "\n#### 9", ". Or 4", "%", " 3"]
    heads = ["", "6 * 3 = 18\n", "First 5, then 3.\n", "It is 12. ", "#### none\n"]
    for _ in range(3000):
        gold = rng.choice(golds)
        number = rng.choice([*golds, f"{int(float(gold)):,}", gold, gold, "1,234,567", "70,000"])
        said = f"{rng.choice(heads)}#### {number}{rng.choice(tails)}"
        row = lw.record_of(part, lw.Example("0", "c", "", (gold,)), lw.Answer(said))
        official = published_number(said)
        assert official is not None
        assert row["gen_correct"] == float(float(official.rstrip(".")) == float(gold)), (said, gold)


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("#### 18", "18", 1),
        ("#### 18 because 18 = 20 - 2", "18", 1),
        ("#### 5\n\nNext problem: 18", "18", 0),
        ("18", "18", 1),  # short answers are what the models are taught here
        ("18.00", "18", 1),
        ("The answer is 18.", "18", 1),
        ("20 - 2 = 18", "18", 1),
        ("18 - 2 = 16", "18", 0),
        ("", "18", 0),
        ("eighteen", "18", 0),
    ],
)
def test_gsm8k_by_hand(said, gold, right):
    """D7: with the mark, the first number behind it; without one, the last number said."""
    assert scored("gsm8k", said, gold)["gen_correct"] == right


def test_gsm8k_gold_is_what_the_authors_take():
    """D7: their extraction of the gold answer is ours."""
    part = made("gsm8k")
    for text in ("6*3=<<6*3=18>>18\n#### 18", "x\n#### 1,234", "y\n#### -5", "z\n#### 12.50", "w\n####  7"):
        wanted = published_number(text) or text.rsplit("####", 1)[1].strip()
        assert part.read({"question": "q", "answer": text}, 0).answers == (wanted,)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-$5", -5), ("$-5", -5), ("−5", -5), ("−$5", -5), ("–5", -5), ("-€1,000.50", -1000.5), ("(-5)", -5), ("x=-5", -5),
        (".5", 0.5), ("-.5", -0.5), ("$.50", 0.5), ("0.5", 0.5), ("1e3", 1000), ("1E3", 1000), ("1.5e-3", 0.0015),
        ("2e+2", 200), ("1 000", 1000), ("1 234 567", 1234567), ("1\u00a0000", 1000), ("1\u202f000.5", 1000.5),
        ("1\u2009000", 1000), ("1,000", 1000), ("-1,000", -1000), ("1,000,000.25", 1000000.25), ("3.", 3), ("3.0", 3),
        ("10-12", 12), ("10–12", 12), ("10 - 12", 12), ("10 − 12", 12), ("COVID-19", 19), ("5 items", 5), ("5eggs", 5),
        ("3e", 3), ("18 19", 19), ("1 00", 0), ("12 34", 34), ("1, 2, 3", 3), ("1,2,3", 3), ("2024, 500", 500),
        ("1 0000", 0), ("No.5", 5), ("a1", 1), ("...7", 7), ("1.2.3", 3), ("+7", 7), ("50%", 50), ("$5.", 5),
        ("16 eggs a day", 16), ("x", None), ("-", None), (".", None), ("$", None), ("e3e", 3), ("−", None), ("1,", 1),
        ("12 500 in 2024", 2024), ("0", 0), ("007", 7),
    ],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(text, number):
    """D6: -$5, −5 (U+2212), .5, 1e3 and 1 000 were misread."""
    assert lw.last_number(text) == number


@pytest.mark.parametrize("mark", [("", ""), ("$", ""), ("", " dollars"), ("€", "."), ("", "!")])
def test_a_number_reads_the_same_in_every_dress(mark):
    """D6: written with groups, an exponent, either minus: one number."""
    rng = random.Random("numbers")
    for _ in range(300):
        number = rng.choice([rng.randint(-(10**7), 10**7), rng.randint(-99, 99), round(rng.uniform(-5000, 5000), 2)])
        sign, size = "-" * (number < 0), abs(number)
        for grouped in (f"{size}", f"{size:,}", f"{size:,}".replace(",", " "), f"{size:,}".replace(",", "\u202f")):
            for minus in ("-", "−", "–"):
                said = f"it is {sign and minus}{mark[0]}{grouped}{mark[1]}"
                assert lw.last_number(said) == number, said


# ---- classes: by the likelihood of the class words -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sst2", "agnews", "trec", "rotten_tomatoes", "boolq", "openbookqa", "mmlu"])
def test_classes_are_right_by_the_highest_score(name):
    """D7: GLUE, AG News, TREC, BoolQ, OpenBookQA and MMLU count rows whose highest score is gold; the first of equals."""
    rng, part = random.Random(name), made(name)
    rows, right = [], 0
    for _ in range(400):
        scores = tuple(rng.choice([-1.0, -2.0, -2.5, rng.uniform(-9, 0)]) for _ in part.words)
        label = rng.randrange(len(part.words))
        example = lw.Example("0", "c", "", (part.words[label],), label)
        rows.append(lw.record_of(part, example, lw.Answer("", scores)))
        right += scores.index(max(scores)) == label
    assert lw.summarize(rows, part.headline, 0)["accuracy"] == right / 400
    assert part.headline == "accuracy"


def arc_row(options: int, key: int, digits: bool = False) -> dict[str, Any]:
    labels = list("12345" if digits else "ABCDE")[:options]
    return {"id": "x", "question": "Which?", "answerKey": labels[key],
            "choices": {"text": [f"thing {i}" for i in range(options)], "label": labels}}  # fmt: skip


@pytest.mark.parametrize("options", [3, 4, 5])
@pytest.mark.parametrize("digits", [False, True])
def test_arc_chooses_among_the_rows_own_options(options, digits):
    """D5, D7: E was scored on every row, though nearly all have four options; the leaderboard knows the row's own only."""
    part = made("arc_challenge")
    for key in range(options):
        example = part.read(arc_row(options, key, digits), 0)
        assert (example.answers, example.label) == (("ABCDE"[key],), key)
        assert part.sender_text(example).count("\n") == options
        for favourite in range(5):
            scores = tuple(0.0 if i == favourite else -1.0 - i for i in range(5))
            row = lw.record_of(part, example, lw.Answer("ABCDE"[favourite], scores))
            allowed = scores[:options]
            assert row["prediction"] == allowed.index(max(allowed))
            assert row["correct"] == (row["prediction"] == key)


def test_arc_by_its_leaderboards_rule():
    """D7: one point where the one reported choice is the key (1/k for k reported ones; we always report one)."""
    rng, part = random.Random("arc"), made("arc_challenge")
    rows, points = [], 0.0
    for _ in range(400):
        options = rng.choice([3, 4, 4, 4, 5])
        example = part.read(arc_row(options, rng.randrange(options), rng.random() < 0.2), 0)
        scores = [rng.choice([-1.0, -2.0, rng.uniform(-9, 0)]) for _ in range(5)]
        reported = ["ABCDE"[scores[:options].index(max(scores[:options]))]]
        points += 1 / len(reported) if example.answers[0] in reported else 0.0
        rows.append(lw.record_of(part, example, lw.Answer("", tuple(scores))))
    assert lw.summarize(rows, "accuracy", 0)["accuracy"] == pytest.approx(points / 400)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "openbookqa",
            {"question_stem": "q", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "C"},
        ),
        ("mmlu", {"question": "q", "choices": list("wxyz"), "answer": 2}),
        ("mmlu", {"question": "q", "choices": list("wxyz"), "answer": "2"}),
    ],
)
def test_gold_letters_are_the_published_ones(name, row):
    """D7: the key is read as its publishers mean it."""
    example = made(name).read(row, 0)
    assert (example.answers, example.label) == (("C",), 2)
    assert "C. y" in example.context


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mmlu", {"question": "q", "choices": list("wxyz"), "answer": -1}),
        ("mmlu", {"question": "q", "choices": list("wxyz"), "answer": 4}),
        (
            "openbookqa",
            {"question_stem": "q", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": ""},
        ),
        ("arc_challenge", {"question": "q", "choices": {"text": list("wx"), "label": list("AB")}, "answerKey": "C"}),
    ],
)
def test_hidden_keys_are_no_answers(name, row):
    """D5: a key of -1 or "" (a hidden test split) would be Python's last letter, or some other."""
    with pytest.raises((ValueError, IndexError, KeyError)):
        made(name).read(row, 0)


@pytest.mark.parametrize("answer", [True, False, 1, 0])
def test_boolq_gold_is_its_boolean(answer):
    """D7: BoolQ's answer is true or false; yes is true."""
    example = made("boolq").read({"passage": "p", "question": "is it", "answer": answer}, 0)
    assert (example.answers[0], example.label) == (("no", "yes")[bool(answer)], int(answer))


@pytest.mark.parametrize("answer", ["false", -1, None])
def test_boolq_takes_nothing_else_for_a_boolean(answer):
    """D7: bool("false") is True, and -1 is SuperGLUE's hidden label."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        made("boolq").read({"passage": "p", "question": "is it", "answer": answer}, 0)


@pytest.mark.parametrize("label", [0.5, "0.5", None, True + 0.25])
def test_a_label_between_two_classes_is_none(label):
    """D2: int(0.5) is 0."""
    with pytest.raises((ValueError, TypeError)):
        made("sst2").read({"sentence": "fine", "label": label}, 0)


@pytest.mark.parametrize("text", [None, float("nan")])
def test_a_missing_text_is_no_text(text):
    """D2: None became the text "None"."""
    for name, row in (
        ("sst2", {"sentence": text, "label": 1}),
        ("boolq", {"passage": text, "question": "q", "answer": True}),
    ):
        with pytest.raises((ValueError, TypeError)):
            made(name).read(row, 0)


# ---- classes: what was generated -----------------------------------------------------------------------------------


def test_a_generated_class_is_right_when_it_is_the_word():
    """D7: no script scores generated classes; ours wants the word, with any case and punctuation, and nothing else."""
    for name in ("sst2", "boolq", "arc_challenge", "mmlu", "agnews", "trec"):
        part = made(name)
        for label, word in enumerate(part.words):
            example = lw.Example("0", "c", "", (word,), label)
            for said in (word, f" {word}.", word.upper(), f'"{word}"'):
                assert part.correct(said, example) == 1, (name, said)
            others = [other for other in part.words if other != word]
            for said in ("", ".", f"not {word}", f"{word} {others[0]}", *others, word * 2):
                assert part.correct(said, example) == 0, (name, said)
