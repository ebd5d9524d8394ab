"""§5 DATA: own files in the forms in which people have them: read as meant, one flag away, or refused with the row."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import LATENTWIRE as lw

TINY = ("--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu", "--width", "32", "--batch_size", "4",
        "--val_samples", "4")  # fmt: skip
REVIEWS = [(f"the film number {i} was shown", ("neg", "pos")[i % 2]) for i in range(40)]


def opened(path: Path, **settings: Any) -> lw.Task:
    return lw.make_task(lw.DataSettings(dataset=str(path), **settings))


def rows(path: Path, **settings: Any) -> list[lw.Example]:
    """Every row once: those of train, and those of test where they are others."""
    part = opened(path, **settings)
    found = part.load("train")[0] + part.load("test")[0]
    return sorted({(e.context, e.question, e.answers): e for e in found}.values(), key=lambda e: e.context)


def pairs(path: Path, **settings: Any) -> set[tuple[str, str]]:
    return {(e.context, e.answers[0]) for e in rows(path, **settings)}


def refused(path: Path, **settings: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(lw.LatentWireError) as caught:
        rows(path, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def attempt(path: Path) -> str:
    """Why a file is refused, or nothing."""
    try:
        rows(path)
    except lw.LatentWireError as error:
        return str(error)
    return ""


def jsonl(path: Path, items: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def parquet(path: Path, items: list[dict[str, Any]], names: list[str] | None = None, column: str = "label") -> Path:
    """A Parquet file; with ``names`` as the package datasets writes class labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(items)
    if names:
        features = {column: {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The lines of ``train --dry_run`` on a file."""

    def run(path: Path, *words: str) -> list[str]:
        length = () if "--epochs" in words else ("--steps", "4")
        code = lw.main(["train", "--dataset", str(path), *TINY, *length, *words, "--dry_run"])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out.splitlines()

    return run


def said(lines: Iterable[str]) -> str:
    return "\n".join(line for line in lines if line.startswith("data: "))


# ---- delimited text ------------------------------------------------------------------------------------------------


def test_sst2_as_glue_has_it(tmp_path):
    """D1, U5: tab-separated with a header, a dev split with labels and a test split without any."""
    lines = [f"hide new secretions {i} from ``the parental units''\t{i % 2}" for i in range(40)]
    written(tmp_path / "train.tsv", "\n".join(["sentence\tlabel", *lines, ""]))
    dev = [f"it 's a charming {i} and often affecting journey\t{i % 2}" for i in range(12)]
    written(tmp_path / "dev.tsv", "\n".join(["sentence\tlabel", *dev, ""]))
    written(tmp_path / "test.tsv", "\n".join(["index\tsentence", *(f"{i}\tuneasy mishmash" for i in range(12)), ""]))
    part = opened(tmp_path, labels=["negative", "positive"])
    assert (len(part.load("train")[0]), len(part.load("test")[0])) == (40, 12)
    assert part.load("test")[1].endswith("dev.tsv")
    assert {e.answers[0] for e in part.load("test")[0] if "journey" in e.context} == {"negative", "positive"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('gamma "5 stars', "alpha 9"),
        ('"gamma 5', 'alpha 9"'),
        ('"', '"'),
        ('"so good" he said', 'and "no" again'),
        ('5" screen', 'a 7" one'),
    ],
)
def test_stray_quotes_in_tsv_are_text(first, second, tmp_path):
    """D1: two stray quotes made one text of four rows, labels included."""
    texts = [f"tweet {i}" for i in range(60)]
    texts[6], texts[10] = first, second
    body = [f"{text}\t{('bad', 'good')[i % 2]}" for i, text in enumerate(texts)]
    path = written(tmp_path / "tweets.tsv", "\n".join(["text\tlabel", *body, ""]))
    assert pairs(path) == {(text, ("bad", "good")[i % 2]) for i, text in enumerate(texts)}


def test_well_quoted_tsv_is_unquoted(tmp_path):
    """D1: a TSV that csv.writer wrote, with line ends, tabs and quotes inside its cells."""
    texts = [f'one "{i}"\twith a tab\nand a line' if i % 3 == 0 else f"plain {i}" for i in range(30)]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t").writerows([["text", "label"], *([t, "ab"[i % 2]] for i, t in enumerate(texts))])
    path = written(tmp_path / "own.tsv", stream.getvalue())
    assert pairs(path) == {(text, "ab"[i % 2]) for i, text in enumerate(texts)}


def test_tsv_quotes_that_may_mean_either_lose_no_row(tmp_path):
    """D1: with free answers nothing tells a cell of two lines from two rows with a stray quote each."""
    lines = [f"what is {i}\tanswer {i}" for i in range(40)]
    lines[6], lines[10] = '"what is 6\tanswer 6', 'what is 10\tanswer 10"'
    path = written(tmp_path / "qa.tsv", "\n".join(["text\tanswer", *lines, ""]))
    line = attempt(path)
    assert "row 8" in line if line else len(rows(path)) == 40


def test_a_csv_cell_that_swallowed_rows_is_refused(tmp_path):
    """D1: the same two quotes in a CSV would hide three rows and their labels in one text."""
    lines = [f"review {i},{('bad', 'good')[i % 2]}" for i in range(60)]
    lines[6], lines[10] = f'"{lines[6]}', 'review 10",bad'
    assert "row 8" in refused(written(tmp_path / "own.csv", "\n".join(["text,label", *lines, ""])))
    first = [f"{('bad', 'good')[i % 2]},review {i}" for i in range(60)]
    first[6], first[10] = 'bad,"review 6', 'bad,review 10"'
    assert "row 8" in refused(written(tmp_path / "first.csv", "\n".join(["label,text", *first, ""])))


def test_line_ends_and_commas_inside_a_csv_cell_are_text(tmp_path):
    """D1: what a good file may hold is not taken for swallowed rows."""
    texts = [f"dear {i},\nthis was good, really,\nbad luck" for i in range(30)]
    body = "".join(f'"{text}",{("bad", "good")[i % 2]}\n' for i, text in enumerate(texts))
    path = written(tmp_path / "own.csv", f"text,label\n{body}")
    assert pairs(path) == {(text, ("bad", "good")[i % 2]) for i, text in enumerate(texts)}


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "pipe"), (",", "comma")])
def test_kaggle_reviews_with_another_delimiter(mark, name, tmp_path, planned):
    """U5: a .csv parted by semicolons, tabs or bars is read as it is, and so it is said."""
    body = [f'"{text}, or so"{mark}{label}{mark}{i}' for i, (text, label) in enumerate(REVIEWS)]
    path = written(tmp_path / "own.csv", "\n".join([f"review{mark}sentiment{mark}id", *body, ""]))
    assert pairs(path) == {(f"{text}, or so", label) for text, label in REVIEWS}
    lines = said(planned(path))
    assert name in lines or mark == ","
    assert "'id'" in lines.partition("unused")[2] or " id" in lines.partition("unused")[2]


@pytest.mark.parametrize("asked", ["semicolon", ";"])
def test_a_delimiter_may_be_named(asked, tmp_path):
    """U5: where the first lines mislead, --delimiter decides."""
    body = [f"a, b, {text};{label}" for text, label in REVIEWS]
    path = written(tmp_path / "own.csv", "\n".join(["text;label", *body, ""]))
    assert pairs(path, delimiter=asked) == {(f"a, b, {text}", label) for text, label in REVIEWS}
    with pytest.raises(lw.LatentWireError, match="--delimiter"):
        rows(path, delimiter="both")


def test_trec_as_its_authors_give_it(tmp_path):
    """U5: ``LOC:city Where is it ?``, Latin-1, no header, its own suffix: one flag away."""
    kinds = ("NUM:dist", "LOC:city", "HUM:ind")
    body = "".join(f"{kinds[i % 3]} How far is caf\xe9 number {i} ?\n" for i in range(45))
    path = written(tmp_path / "train_5500.label", body, "latin-1")
    assert "--delimiter" in refused(path)
    found = pairs(path, delimiter="space", text_column="2", label_column="1")
    assert found == {(f"How far is caf\xe9 number {i} ?", kinds[i % 3]) for i in range(45)}


def test_ag_news_without_a_header(tmp_path, planned):
    """U5: class, title, description, all quoted, no header: the first row is no header, and columns are numbers."""
    body = [f'"{i % 4 + 1}","Title {i}","Reuters - news item {i}, with a comma"' for i in range(60)]
    path = written(tmp_path / "train.csv", "\n".join([*body, ""]))
    named = {"text_column": "3", "label_column": "1", "labels": ["world", "sports", "business", "technology"]}
    found = pairs(path, **named)
    assert len(found) == 60
    assert ("Reuters - news item 0, with a comma", "world") in found
    assert ("Reuters - news item 59, with a comma", "technology") in found
    lines = said(planned(path, "--text_column", "3", "--label_column", "1", "--labels", ",".join(named["labels"])))
    assert "no header" in lines
    line = refused(path)
    assert "1, 2, 3" in line and "--text_column" in line


def test_a_header_in_other_letters_is_a_header(tmp_path):
    """U5: ``Text,Label``."""
    path = written(tmp_path / "own.csv", "\n".join(["Text,Label", *(f"{t},{a}" for t, a in REVIEWS), ""]))
    assert pairs(path) == set(REVIEWS)


# ---- encodings and packed files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_are_found_out(encoding, suffix, tmp_path, planned):
    """U5: a byte order mark decides, then UTF-8, then what Windows writes; what is no UTF-8 is said."""
    named = [(f"{text} – “déjà vu” für {i} €", label) for i, (text, label) in enumerate(REVIEWS)]
    if suffix == ".jsonl":
        text = "".join(json.dumps({"text": t, "label": a}, ensure_ascii=False) + "\n" for t, a in named)
    else:
        text = "\n".join(mark.join(row) for mark in [",\t"[suffix == ".tsv"]] for row in [("text", "label"), *named])
    path = written(tmp_path / f"own{suffix}", text, encoding)
    assert pairs(path) == set(named)
    if encoding != "utf-8-sig":
        assert encoding[:6] in said(planned(path))


def test_one_bad_byte_in_a_utf8_file_is_no_other_encoding(tmp_path):
    """U5: guessing cp1252 would spoil every other accent in silence."""
    lines = [f"caf\xe9 number {i},{a}" for i, (_, a) in enumerate(REVIEWS)]
    path = written(tmp_path / "own.csv", "\n".join(["text,label", *lines, ""]))
    data = path.read_bytes().replace("\xe9 number 7".encode(), b"\xe9 number 7")
    path.write_bytes(data)
    line = refused(path)
    assert "row 9" in line and "--encoding" in line
    assert len(pairs(path, encoding="latin-1")) == 40
    assert "--encoding" in refused(path, encoding="ascii")
    with pytest.raises(lw.LatentWireError, match="--encoding"):
        rows(path, encoding="klingon")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize(("pack", "end"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_packed_files_are_unpacked(pack, end, suffix, tmp_path):
    """U5: reviews.jsonl.gz."""
    mark = "\t" if suffix == ".tsv" else ","
    items = [{"text": text, "label": label} for text, label in REVIEWS]
    plain = {
        ".jsonl": "\n".join(map(json.dumps, items)),
        ".json": json.dumps(items),
    }.get(suffix, "\n".join(mark.join(row) for row in [("text", "label"), *REVIEWS]))
    path = tmp_path / f"reviews{suffix}{end}"
    path.write_bytes(pack(plain.encode()))
    assert pairs(path) == set(REVIEWS)
    path.write_bytes(pack(plain.encode())[:-12])
    refused(path)
    path.write_bytes(b"not packed at all")
    refused(path)


# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["data", "rows", "examples"])
def test_one_mapping_that_holds_the_rows(key, tmp_path):
    """U5: {"version": ..., "data": [...]}."""
    items = [{"text": text, "label": label} for text, label in REVIEWS]
    for indent in (None, 2):
        path = written(tmp_path / "own.json", json.dumps({"version": "1", key: items}, indent=indent))
        assert pairs(path) == set(REVIEWS)


def test_squad_as_its_authors_give_it(tmp_path):
    """U5: articles, paragraphs, questions; every annotator's answer counts."""
    articles = [
        {"title": f"t{a}", "paragraphs": [
            {"context": f"red blue {a} {p}", "qas": [
                {"id": f"{a}-{p}-{q}", "question": f"what {q}?",
                 "answers": [{"text": "red", "answer_start": 0}, {"text": "red blue", "answer_start": 0}]}
                for q in range(2)]}
            for p in range(3)]}
        for a in range(5)]  # fmt: skip
    path = written(tmp_path / "train-v1.1.json", json.dumps({"version": "1.1", "data": articles}))
    found = rows(path)
    assert len(found) == 30
    assert {e.answers for e in found} == {("red", "red blue")}
    assert {e.question for e in found} == {"what 0?", "what 1?"}
    assert opened(path).words == ()


def test_nested_fields_are_found_and_can_be_named(tmp_path, planned):
    """U5: {"document": {"text": ...}, "annotation": {"label": ...}}."""
    path = jsonl(
        tmp_path / "own.jsonl",
        (
            {"id": i, "document": {"text": t, "lang": "en"}, "annotation": {"label": a}}
            for i, (t, a) in enumerate(REVIEWS)
        ),
    )
    assert pairs(path) == set(REVIEWS)
    assert pairs(path, text_column="document.text", label_column="annotation.label") == set(REVIEWS)
    lines = said(planned(path))
    assert "document.text" in lines and "annotation.label" in lines
    assert "document.lang" in lines.partition("unused")[2]
    assert "document.text" in refused(path, text_column="document.body")
    hole = jsonl(
        tmp_path / "hole.jsonl", [*({"d": {"text": t}, "label": a} for t, a in REVIEWS), {"d": 3, "label": "pos"}]
    )
    assert "row 41" in refused(hole)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"text": "a \\ud83d b", "label": "pos"}', "surrogate"),
        ('{"text": "a", "label": "\\udc00"}', "surrogate"),
        ('{"text": "a", "label": ' + "[" * 100_000 + "]" * 100_000 + "}", ""),
        ('{"text": NaN, "label": "pos"}', "empty"),
        ('{"text": "a", "label": NaN}', "empty"),
        ('{"text": null, "label": "pos"}', "empty"),
        ('{"text": "a", "label": null}', "empty"),
        ('{"text": "  ", "label": "pos"}', "empty"),
        ('{"text": "a", "label": "neg", "label": "pos"}', "label"),
        ('{"text": ["a", "b"], "label": "pos"}', "list"),
        ('{"text": {"a": 1}, "label": "pos"}', "text"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", ""),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(text, word, tmp_path):
    """D2, D3: half characters, bottomless nesting, NaN and null, a name that stands twice."""
    lines = [json.dumps({"text": t, "label": a}) for t, a in REVIEWS]
    lines[6] = text
    line = refused(written(tmp_path / "own.jsonl", "\n".join(lines)))
    assert "row 7" in line and word in line
    assert len(line) < 600


# ---- columns -------------------------------------------------------------------------------------------------------


def test_two_columns_of_one_name_are_refused(tmp_path):
    """D2: the last one won."""
    path = written(tmp_path / "own.csv", "\n".join(["text,label,text", *(f"{t},{a},x" for t, a in REVIEWS), ""]))
    assert "'text'" in refused(path)
    table = pa.table([pa.array([t for t, _ in REVIEWS]), pa.array([a for _, a in REVIEWS]), pa.array(["z"] * 40)],
                     names=["text", "label", "label"])  # fmt: skip
    pq.write_table(table, tmp_path / "own.parquet")
    assert "'label'" in refused(tmp_path / "own.parquet")


def test_a_long_cell_is_read(tmp_path):
    """D3: a cell of 140 kB was refused, with no way round."""
    long = "word " * 28_000
    lines = ["text,label", *(f"{t},{a}" for t, a in REVIEWS), f'"{long}",pos']
    assert (long, "pos") in pairs(written(tmp_path / "own.csv", "\n".join([*lines, ""])))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_squad_rows_without_an_answer_are_named(form, tmp_path):
    """D3: SQuAD 2.0 has questions without answers; they were a traceback."""
    items = [
        {"id": f"q{i}", "title": "t", "context": f"red blue {i}", "question": f"what {i}?",
         "answers": {"text": [] if i == 4 else ["red"], "answer_start": [] if i == 4 else [0]}}
        for i in range(20)
    ]  # fmt: skip
    path = tmp_path / f"own.{form}"
    path = parquet(path, items) if form == "parquet" else jsonl(path, items)
    line = refused(path)
    assert "row 5" in line and "answer" in line
    for split in ("train", "validation"):
        parquet(tmp_path / "squad" / f"{split}.parquet", items)
    with pytest.raises(lw.LatentWireError, match=r"squad.*row 5.*answer"):
        lw.make_task(lw.DataSettings(dataset="squad", data_dir=tmp_path)).load("train")


def test_bytes_in_parquet_are_text(tmp_path):
    """D2: a column of bytes would read "b'...'"."""
    path = parquet(tmp_path / "own.parquet", [{"text": t.encode(), "label": a} for t, a in REVIEWS])
    assert pairs(path) == set(REVIEWS)


def test_used_and_unused_columns_are_said(tmp_path, planned):
    """U3, U4: what is left aside is no secret."""
    path = written(
        tmp_path / "own.csv", "\n".join(["text,label,stars,user", *(f"{t},{a},5,me" for t, a in REVIEWS), ""])
    )
    lines = said(planned(path))
    used, _, unused = lines.partition("unused")
    assert "'text'" in used and "'label'" in used
    assert "stars" in unused and "user" in unused


# ---- labels --------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[list[Any], list[str]]] = {
    "floats": ([0.0, 1.0], ["0", "1"]),
    "booleans": ([False, True], ["false", "true"]),
    "strings": (["0", "1"], ["0", "1"]),
    "float strings": (["0.0", "1.0"], ["0", "1"]),
    "boolean strings": (["False", "True"], ["false", "true"]),
    "stars": ([1, 5], ["1", "5"]),
    "signs": ([-1, 1], ["-1", "1"]),
    "halves": ([0.5, 1.5], ["0.5", "1.5"]),
    "mixed": ([0, 1.0], ["0", "1"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_labels_that_are_numbers_take_names_in_their_order(name, tmp_path):
    """D2, U2: floats and booleans became the words "0.0" and "True"; 1 and 5 could not be named at all."""
    values, keys = NUMBERS[name]
    items = [{"text": t, "label": values[a == "pos"]} for t, a in REVIEWS]
    path = jsonl(tmp_path / "own.jsonl", items)
    wanted = {(t, ("bad", "good")[a == "pos"]) for t, a in REVIEWS}
    assert pairs(path, labels=["bad", "good"]) == wanted
    assert opened(path, labels=["bad", "good"]).words == ("bad", "good")
    assert pairs(path, labels=[f"{keys[1]}=good", f"{keys[0]}=bad"]) == wanted
    line = refused(path)
    assert "--labels" in line and all(key in line.lower() for key in keys)


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.bool_(), pa.int8(), pa.uint64()])
def test_number_labels_in_parquet(kind, tmp_path):
    """D2: what pandas writes."""
    labels = pa.array([a == "pos" for _, a in REVIEWS]).cast(pa.int8()).cast(kind)
    pq.write_table(pa.table({"text": [t for t, _ in REVIEWS], "label": labels}), tmp_path / "own.parquet")
    wanted = {(t, ("bad", "good")[a == "pos"]) for t, a in REVIEWS}
    assert pairs(tmp_path / "own.parquet", labels=["bad", "good"]) == wanted


def test_nan_in_parquet_is_refused_with_its_row(tmp_path):
    """D2: pandas writes a missing label as NaN among floats, and as null among words."""
    for missing in (float("nan"), None):
        items = [{"text": t, "label": missing if i == 8 else float(a == "pos")} for i, (t, a) in enumerate(REVIEWS)]
        assert "row 9" in refused(parquet(tmp_path / "own.parquet", items), labels=["bad", "good"])
    items = [{"text": None if i == 8 else t, "label": a} for i, (t, a) in enumerate(REVIEWS)]
    assert "row 9" in refused(parquet(tmp_path / "own.parquet", items))


def test_names_and_values_must_fit(tmp_path):
    """U2: three stars and two names, or a value without a name, are refused rather than shifted."""
    path = jsonl(tmp_path / "own.jsonl", ({"text": f"t {i}", "label": i % 3 + 1} for i in range(30)))
    assert "3" in refused(path, labels=["bad", "good"])
    assert "row 3" in refused(path, labels=["1=bad", "2=good"])
    found = {a for _, a in pairs(path, labels=["1=bad", "2=fair", "3=good"])}
    assert found == {"bad", "fair", "good"}
    gap = jsonl(tmp_path / "gap.jsonl", ({"text": f"t {i}", "label": i % 2 + 1} for i in range(30)))
    refused(gap, labels=["bad", "fair", "good"])  # is 1 bad, or fair?


def test_words_may_be_renamed(tmp_path):
    """U2: pos=positive."""
    path = jsonl(tmp_path / "own.jsonl", ({"text": t, "label": a} for t, a in REVIEWS))
    found = pairs(path, labels=["neg=negative", "pos=positive"])
    assert found == {(t, {"neg": "negative", "pos": "positive"}[a]) for t, a in REVIEWS}


BANKING = [f"{'card_' if i % 2 else 'top_up_'}{i}" for i in range(77)]


def test_banking77_as_the_hub_gives_it(tmp_path, planned):
    """U2: 77 integer labels with names in the file became the generation of the string "52"."""
    items = [{"text": f"question {i}", "label": i % 77} for i in range(160)]
    folder = tmp_path / "banking77"
    for split in ("train", "test"):
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", items, BANKING)
    part = opened(folder)
    assert part.words == tuple(BANKING)
    assert part.headline == "accuracy"
    for split in ("train", "test"):
        assert all(e.answers == (BANKING[e.label],) for e in part.load(split)[0])
        assert len(part.load(split)[0]) == 160
    lines = said(planned(folder))
    assert "77 classes" in lines
    assert len(lines) < 1500
    hidden = parquet(tmp_path / "hidden.parquet", [*items, {"text": "?", "label": -1}], BANKING)
    assert "row 161" in refused(hidden)


def test_names_in_the_file_yield_to_the_users(tmp_path):
    """U2: --labels counts, names in Parquet metadata where there are none."""
    items = [{"text": t, "label": int(a == "pos")} for t, a in REVIEWS]
    path = parquet(tmp_path / "own.parquet", items, ["NEG", "POS"])
    assert {a for _, a in pairs(path)} == {"NEG", "POS"}
    assert pairs(path, labels=["bad", "good"]) == {(t, ("bad", "good")[a == "pos"]) for t, a in REVIEWS}
    assert opened(path, labels=["POS", "NEG"]).words == ("POS", "NEG")
    assert pairs(path, labels=["POS", "NEG"]) == {(t, ("NEG", "POS")[a == "pos"]) for t, a in REVIEWS}


@pytest.mark.parametrize(
    ("distinct", "total", "classes"),
    [(2, 10, True), (3, 10, False), (20, 100, True), (21, 105, False), (21, 210, True), (150, 1500, True),
     (150, 1400, False), (1000, 10_000, True), (1001, 10_020, False)],
)  # fmt: skip
def test_how_many_different_answers_are_classes(distinct, total, classes, tmp_path):
    """U2: up to 20 with five rows each, up to 1,000 with ten rows each; beyond, answers are free."""
    path = jsonl(tmp_path / "own.jsonl", ({"text": f"t {i}", "label": f"w{i % distinct}"} for i in range(total)))
    part = opened(path)
    assert (len(part.words), part.headline) == ((distinct, "accuracy") if classes else (0, "f1"))


def test_many_numbers_far_apart_are_answers(tmp_path):
    """U2: sums of money are no classes that need names; the grades 0 to 40 are."""
    sums = jsonl(tmp_path / "sums.jsonl", ({"text": f"t {i}", "answer": str(i % 40 * 917)} for i in range(800)))
    assert opened(sums).words == ()
    grades = jsonl(tmp_path / "grades.jsonl", ({"text": f"t {i}", "answer": str(i % 41)} for i in range(820)))
    assert "--labels" in refused(grades)


def test_nearly_equal_classes_are_named_in_one_line(tmp_path, planned):
    """U2: "positive", "Positive" and "negative " became three classes in silence."""
    words = ["positive", "Positive", "negative", "negative "]
    path = jsonl(tmp_path / "own.jsonl", ({"text": f"t {i}", "label": words[i % 4]} for i in range(40)))
    [line] = [line for line in planned(path) if "nearly" in line or "differ only" in line]
    assert all(repr(word) in line for word in words)
    assert opened(path).words == ("Positive", "negative", "positive")
    clean = jsonl(tmp_path / "clean.jsonl", ({"text": f"t {i}", "label": words[i % 2 * 2]} for i in range(40)))
    assert "nearly" not in said(planned(clean))


# ---- multiple choice -----------------------------------------------------------------------------------------------

OPTIONS = ["puppies", "seeds", "rain", "the sun", "fire"]


def choice_item(form: str, i: int) -> dict[str, Any]:
    """Row ``i`` in one of the forms of ARC, OpenBookQA (hub, and as its authors give it), MMLU and a plain list."""
    count = 5 if i % 10 == 0 else 4
    right, options = i % 4, [f"{word} {i}" for word in OPTIONS[:count]]
    letters = list("ABCDE"[:count]) if i % 2 else list("12345"[:count])
    parts = [{"text": text, "label": letter} for text, letter in zip(options, letters, strict=True)]
    return {
        "arc": {"id": str(i), "question": f"Q {i}?", "choices": {"text": options, "label": letters},
                "answerKey": letters[right]},
        "openbookqa": {"question_stem": f"Q {i}?", "choices": {"text": options, "label": letters},
                       "answerKey": letters[right]},
        "authors": {"id": str(i), "question": {"stem": f"Q {i}?", "choices": parts}, "answerKey": letters[right]},
        "mmlu": {"question": f"Q {i}?", "subject": "s", "choices": options, "answer": right},
        "words": {"question": f"Q {i}?", "options": options, "answer": options[right]},
    }[form]  # fmt: skip


@pytest.mark.parametrize("form", ["arc", "openbookqa", "authors", "mmlu", "words"])
def test_multiple_choice_reads_the_options(form, tmp_path, planned):
    """U3, D5: it trained on the question alone; each row has its own number of options."""
    path = jsonl(tmp_path / "own.jsonl", (choice_item(form, i) for i in range(60)))
    part = opened(path)
    assert part.words == tuple("ABCDE")
    found = rows(path)
    assert len(found) == 60
    for example in found:
        i = int(re.search(r"Q (\d+)\?", part.sender_text(example))[1])  # type: ignore[index]
        assert example.answers == ("ABCD"[i % 4],) and example.label == i % 4
        assert example.options == (5 if i % 10 == 0 else 4)
        text = part.sender_text(example)
        assert f"{'ABCD'[i % 4]}. {OPTIONS[i % 4]} {i}" in text
        assert ("E. fire" in text) == (i % 10 == 0)
    assert "choice" in said(planned(path))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"answer": "nothing of it"}, "nothing of it"),
        ({"answer": 4}, "4"),
        ({"choices": []}, "options"),
        ({"choices": "a or b"}, "options"),
        ({"choices": ["a", None, "c", "d"]}, "choices"),
    ],
)
def test_a_bad_multiple_choice_row_is_named(change, word, tmp_path):
    """U3: the row, and what is wrong with it."""
    items = [choice_item("mmlu", i) for i in range(20)]
    items[5] = {**items[5], **change}
    line = refused(jsonl(tmp_path / "own.jsonl", items))
    assert "row 6" in line and word in line


# ---- folders -------------------------------------------------------------------------------------------------------


def test_hub_shards_are_one_split(tmp_path):
    """U5: train-00000-of-00002.parquet, test-00000-of-00001.parquet; a missing shard is told."""
    items = [{"text": t, "label": a} for t, a in REVIEWS]
    for shard in range(2):
        parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", items[20 * shard : 20 * shard + 20])
    parquet(tmp_path / "test-00000-of-00001.parquet", [{"text": f"{t} again", "label": a} for t, a in REVIEWS])
    part = opened(tmp_path)
    assert {(e.context, e.answers[0]) for e in part.load("train")[0]} == set(REVIEWS)
    assert len({e.id for e in part.load("train")[0]}) == 40
    assert len(part.load("test")[0]) == 40
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    assert "1 of 2" in refused(tmp_path)


def test_imdb_a_folder_of_texts_per_class(tmp_path, planned):
    """U5: train/pos/0_9.txt, train/neg, test/..., and train/unsup, which has no class."""
    for split, count in (("train", 12), ("test", 6)):
        for label in ("pos", "neg"):
            for i in range(count):
                written(tmp_path / split / label / f"{i}_7.txt", f"{split} {label} film {i}<br />\nbon appétit\n")
    for i in range(5):
        written(tmp_path / "train" / "unsup" / f"{i}_0.txt", "nobody knows")
    written(tmp_path / "README", "Large Movie Review Dataset")
    part = opened(tmp_path)
    assert part.words == ("neg", "pos")
    assert (len(part.load("train")[0]), len(part.load("test")[0])) == (24, 12)
    for example in part.load("train")[0] + part.load("test")[0]:
        assert f" {example.answers[0]} film" in example.context
    assert "unsup" in said(planned(tmp_path))
    assert pairs(tmp_path / "train") == {(e.context, e.answers[0]) for e in part.load("train")[0]}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_validation_file_is_the_test_split_where_there_is_no_other(name, tmp_path, planned):
    """U5: such a run trained, and then eval failed."""
    jsonl(tmp_path / "train.jsonl", ({"text": t, "label": a} for t, a in REVIEWS))
    jsonl(tmp_path / f"{name}.jsonl", ({"text": f"other {t}", "label": a} for t, a in REVIEWS[:20]))
    part = opened(tmp_path)
    assert {e.context for e in part.load("test")[0]} == {f"other {t}" for t, _ in REVIEWS[:20]}
    assert {e.context for e in part.load("train")[0]} == {t for t, _ in REVIEWS}
    assert re.search(rf"{name}\.jsonl\W.*test", said(planned(tmp_path)))
    jsonl(tmp_path / "test.jsonl", ({"text": f"last {t}", "label": a} for t, a in REVIEWS[:20]))
    assert all(e.context.startswith("last") for e in opened(tmp_path).load("test")[0])


def test_a_test_file_without_labels_is_passed_over(tmp_path, planned):
    """U5: Kaggle's and GLUE's test files hide their labels; a fifth of train is then held out, and it is said."""
    jsonl(tmp_path / "train.jsonl", ({"text": t, "label": a} for t, a in REVIEWS))
    jsonl(tmp_path / "test.jsonl", ({"text": f"{t} hidden"} for t, _ in REVIEWS))
    part = opened(tmp_path)
    train, test = part.load("train")[0], part.load("test")[0]
    assert (len(train), len(test)) == (32, 8)
    assert not {e.context for e in train} & {e.context for e in test}
    assert "test.jsonl" in said(planned(tmp_path)) and "no labels" in said(planned(tmp_path))


def test_two_files_for_one_split_are_refused(tmp_path):
    """U5: train.csv and train.jsonl: which one?"""
    jsonl(tmp_path / "train.jsonl", ({"text": t, "label": a} for t, a in REVIEWS))
    written(tmp_path / "train.csv", "\n".join(["text,label", *(f"{t},{a}" for t, a in REVIEWS), ""]))
    line = refused(tmp_path)
    assert "train.csv" in line and "train.jsonl" in line


# ---- what is said --------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_was_understood(tmp_path, planned):
    """U4: it never opened the data and printed 180 lines of JSON."""
    items = [{"text": "long " * 200 if i % 4 == 0 else t, "label": a, "id": i} for i, (t, a) in enumerate(REVIEWS)]
    path = jsonl(tmp_path / "own.jsonl", items)
    lines = planned(path, "--max_tokens", "64", "--val_samples", "0")
    assert 2 <= len(said(lines).splitlines()) <= 5
    assert len(lines) <= 12 and not any(line.startswith("{") for line in lines)
    found = said(lines)
    assert "2 classes" in found and "neg 20" in found and "pos 20" in found
    assert re.search(r"\d+(\.\d+)? ?%", found), "the share of texts that are cut"
    assert "4 steps" in found
    assert not (tmp_path / "runs").exists()


def test_the_share_of_cut_texts_is_right(tmp_path, planned):
    """U4: counted by the tokenizer that will read them (tiny models read one byte a token)."""
    items = [{"text": f"{i:03}" + "x" * (97 if i % 4 == 0 else 20), "label": a} for i, (_, a) in enumerate(REVIEWS)]
    path = jsonl(tmp_path / "own.jsonl", items)
    words = ("--max_tokens", "64", "--val_samples", "0", "--epochs", "1")
    train = opened(path).load("train")[0]
    share = sum(len(e.context) > 64 for e in train) / len(train)
    assert f"{100 * share:.1f}%" in said(planned(path, *words)).replace(" %", "%")


def test_a_dry_run_refuses_what_training_would_refuse(tmp_path, capsys):
    """U4: a file that cannot be read is told before anything is queued."""
    path = jsonl(tmp_path / "own.jsonl", ({"txt": t, "label": a} for t, a in REVIEWS))
    assert lw.main(["train", "--dataset", str(path), *TINY, "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert "--text_column" in err and "txt" in err and "Traceback" not in err


def test_all_settings_are_printed_on_request(tmp_path, capsys):
    """U4: --dry_run full."""
    path = jsonl(tmp_path / "own.jsonl", ({"text": t, "label": a} for t, a in REVIEWS))
    assert lw.main(["train", "--dataset", str(path), *TINY, "--dry_run", "full"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == str(path)


@pytest.mark.trains
def test_training_says_the_same(tmp_path, capsys):
    """U4: the data lines of a real run; the share cut off is among them."""
    items = [{"text": t, "label": a, "id": i} for i, (t, a) in enumerate(REVIEWS)]
    path = jsonl(tmp_path / "own.jsonl", items)
    assert lw.main(["train", "--dataset", str(path), *TINY, "--steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    found = [line for line in (out + err).splitlines() if line.startswith("data: ")]
    assert 2 <= len(found) <= 5
    assert "2 classes" in said(found) and "unused" in said(found) and "id" in said(found).partition("unused")[2]


# ---- rare classes --------------------------------------------------------------------------------------------------


def rare_file(folder: Path, rare: int) -> Path:
    """80 rows, of which ``rare`` are urgent; all of those in train, test has none."""
    named = [(f"ticket {i} about invoice {37 * i}", "normal") for i in range(80 - rare)]
    jsonl(
        folder / "train.jsonl",
        ({"text": t, "label": a} for t, a in [*named, *((f"fire {i}", "urgent") for i in range(rare))]),
    )
    jsonl(folder / "test.jsonl", ({"text": f"other {t}", "label": a} for t, a in [*named[:18], ("smoke", "urgent")]))
    return folder


@pytest.mark.trains
@pytest.mark.parametrize(("rare", "runs"), [(1, False), (2, True), pytest.param(4, True, marks=pytest.mark.slow)])
def test_a_rare_class_does_not_end_an_evaluation(rare, runs, tmp_path, capsys):
    """D4: cross-validation met folds without the class: "not JSON compliant: nan", and no probe at the second call."""
    home = tmp_path / "data"
    home.mkdir()
    run = str(tmp_path / "run")
    words = [*TINY, "--val_samples", "0", "--steps", "24"]
    assert lw.main(["train", "--dataset", str(rare_file(home, rare)), *words, "--output_dir", run]) == 0
    seen = []
    for _ in range(2):
        capsys.readouterr()
        code = lw.main(["eval", "--checkpoint", run, "--batch_size", "8"])
        out, err = capsys.readouterr()
        assert code == 0 and "Traceback" not in err
        found = json.loads((Path(run) / "results.json").read_text()) if (Path(run) / "results.json").exists() else None
        found = found or json.loads(next(Path(run).rglob("results*.json")).read_text())
        seen.append(("probe" in found["methods"], "probe" in out + err))
    assert seen[0] == seen[1] == (runs, True)


def test_classes_that_hardly_occur_are_said(tmp_path, planned):
    """D4, U4: one line before anything is trained."""
    assert "urgent" in said(planned(rare_file(tmp_path, 2))).partition("fewer than")[2]


# ---- a class of the own file in other places -----------------------------------------------------------------------


def test_numbers_mean_the_same_in_every_split(tmp_path):
    """D2, U2: a test file that lacks a class, or writes 1.0 for 1, is read by the training file's order."""
    train = jsonl(tmp_path / "train.jsonl", ({"text": f"t {i}", "label": (1, 3, 5)[i % 3]} for i in range(30)))
    jsonl(tmp_path / "test.jsonl", ({"text": f"u {i}", "label": (3.0, "5")[i % 2]} for i in range(12)))
    part = opened(train.parent, labels=["bad", "fair", "good"])
    assert Counter(e.answers[0] for e in part.load("test")[0]) == {"fair": 6, "good": 6}
    assert [e.label for e in part.load("test")[0]] == [1, 2] * 6
    jsonl(tmp_path / "test.jsonl", ({"text": f"u {i}", "label": 4} for i in range(12)))
    with pytest.raises(lw.LatentWireError, match=r"test\.jsonl row 1.*4"):
        opened(train.parent, labels=["bad", "fair", "good"]).load("test")
