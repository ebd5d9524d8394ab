"""§16: many texts, messages and rows at once, from files, folders and pipes."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import LATENTWIRE as lw

TEXTS = {"one": "aabawzaxya", "two": "ccxcwcczcy", "three": "wdxddydddz", "four": "bbbwzbxbyb", "five": "aawxyzaaaa"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts, and the same as rows with a label that nobody needs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    rows = [{"id": name, "review": text, "stars": None} for name, text in TEXTS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "review"], *TEXTS.items()])
    return tmp_path


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """What standard input holds."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def run(*words: object) -> int:
    return lw.main([str(word) for word in words])


@pytest.fixture(scope="module")
def wanted(toy_run: Path) -> dict[str, str]:
    """The answer to each text, alone."""
    return {name: lw.answer_message(toy_run, lw.encode_text(toy_run, text)) for name, text in TEXTS.items()}


def test_a_folder_of_texts_is_a_folder_of_messages_in_order(folder, toy_run, wanted, capsys):
    assert run("encode", "texts", "--checkpoint", toy_run, "-o", "out") == 0
    index = lw.read_rows(Path("out/messages.jsonl"))
    assert [row["id"] for row in index] == sorted(TEXTS)
    for row in index:
        assert lw.answer_message(toy_run, (Path("out") / row["file"]).read_bytes()) == wanted[row["id"]]
    capsys.readouterr()
    assert run("answer", "out", "--checkpoint", toy_run) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: {wanted[name]}" for name in sorted(TEXTS)]
    Path("out/messages.jsonl").unlink()  # the files alone do as well
    assert run("answer", "out", "--checkpoint", toy_run) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: {wanted[name]}" for name in sorted(TEXTS)]


def test_one_text_is_one_file_unless_more_is_meant(folder, toy_run):
    for out, made in (("m", "m"), ("a.b", "a.b"), ("there", "there/one.wire"), ("m.jsonl", "m.jsonl")):
        if out == "there":
            Path(out).mkdir()
        assert run("encode", "texts/one.txt", "--checkpoint", toy_run, "-o", out) == 0
        assert Path(made).is_file()
    assert Path("m").read_bytes() == Path("a.b").read_bytes() == Path("there/one.wire").read_bytes()
    assert run("encode", "texts/one.txt", "texts/two.txt", "--checkpoint", toy_run, "-o", "out.v1") == 0
    assert sorted(path.name for path in Path("out.v1").iterdir()) == ["messages.jsonl", "one.wire", "two.wire"]


def test_what_is_there_is_not_made_again_and_more_is_added(folder, toy_run, monkeypatch, capsys):
    encode, made = lw.LoadedBridge.encode, list[str]()
    monkeypatch.setattr(
        lw.LoadedBridge, "encode", lambda self, texts, *rest: made.extend(texts) or encode(self, texts, *rest)
    )
    for files, new in ((["one", "two"], 2), (["one", "two"], 0), (["one", "two", "three"], 1)):
        made.clear()
        paths = [f"texts/{name}.txt" for name in files]
        assert run("encode", *paths, "--checkpoint", toy_run, "-o", "m.jsonl") == 0
        assert len(made) == new
    assert "1 messages, 2 there already" in capsys.readouterr().err
    assert [row["id"] for row in lw.read_rows(Path("m.jsonl"))] == ["one", "two", "three"]
    before = Path("m.jsonl").read_bytes()
    Path("m.jsonl").write_bytes(before[:-30])  # killed while it wrote the last line
    assert (
        run("encode", "texts/one.txt", "texts/two.txt", "texts/three.txt", "--checkpoint", toy_run, "-o", "m.jsonl")
        == 0
    )
    assert [row["id"] for row in lw.read_rows(Path("m.jsonl"))] == ["one", "two", "three"]
    Path("texts/one.txt").write_text("another text")
    assert run("encode", "texts/one.txt", "--checkpoint", toy_run, "-o", "m.jsonl") == 2
    assert "'one' of another text" in capsys.readouterr().err


def test_a_pipe_of_rows(folder, toy_run, wanted, monkeypatch, capsys):
    typed(monkeypatch, Path("rows.jsonl").read_bytes())
    assert run("encode", "-", "--text_column", "review", "--checkpoint", toy_run, "-o", "-") == 0
    piped = capsys.readouterr().out
    assert [row["id"] for row in lines(piped)] == [f"row-{n}" for n in range(1, 6)]
    typed(monkeypatch, piped.encode())
    assert run("answer", "-", "--checkpoint", toy_run, "--json") == 0
    out = lines(capsys.readouterr().out)
    assert [row["answer"] for row in out] == [*wanted.values()]
    assert all(list(row) == ["id", "answer", "scores", "tokens", "bytes"] for row in out)
    assert all(row["answer"] == max(row["scores"], key=row["scores"].get) and row["tokens"] == 8 for row in out)
    typed(monkeypatch, lw.encode_text(toy_run, TEXTS["one"]))
    assert run("answer", "-", "--checkpoint", toy_run) == 0
    assert capsys.readouterr().out == f"{wanted['one']}\n", "one message as it is"


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.csv", "-"])
def test_predict_gives_the_same_rows_with_answers(source, folder, toy_run, wanted, monkeypatch, capsys):
    typed(monkeypatch, Path("rows.jsonl").read_bytes())
    assert run("predict", source, "--text_column", "review", "--checkpoint", toy_run) == 0
    out = lines(capsys.readouterr().out)
    assert [(row["id"], row["review"], row["answer"]) for row in out] == [(n, TEXTS[n], wanted[n]) for n in TEXTS]
    assert {row["bytes"] for row in out} == {len(lw.encode_text(toy_run, "a"))} and {row["tokens"] for row in out} == {
        8
    }


def test_predict_goes_on_and_writes_tables(folder, toy_run, wanted, capsys):
    words = ("predict", "rows.jsonl", "--text_column", "review", "--checkpoint", toy_run, "-o")
    assert run(*words, "p.jsonl") == 0
    whole, rows = Path("p.jsonl").read_text(), Path("rows.jsonl").read_text()
    Path("p.jsonl").write_text(whole[: len(whole) // 2])
    assert run(*words, "p.jsonl") == 0
    assert [row["answer"] for row in lines(Path("p.jsonl").read_text())] == [*wanted.values()]
    assert run(*words, "p.csv") == 0
    with Path("p.csv").open(newline="") as stream:
        table = [*csv.DictReader(stream)]
    assert [row["answer"] for row in table] == [*wanted.values()]
    assert json.loads(table[0]["scores"]).keys() == set("abcd")
    capsys.readouterr()
    Path("rows.jsonl").write_text(json.dumps({"id": "other", "review": "a", "stars": None}) + "\n")
    assert run(*words, "p.jsonl") == 2
    assert "other rows" in capsys.readouterr().err
    Path("p.jsonl").write_text(whole.replace('"bridge": "', '"bridge": "0'))
    Path("rows.jsonl").write_text(rows)
    assert run(*words, "p.jsonl") == 2
    assert "another bridge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["encode", "texts/one.txt", "texts/two.txt"], "2 texts need more than one file"),
        (["encode", "texts/one.txt", "texts", "-o", "out"], "two of the texts are named 'one'"),
        (["encode", "empty", "-o", "out"], "a folder without a *.txt"),
        (["encode", "rows.csv", "--text_column", "nope", "-o", "out"], "has no column 'nope'"),
        (["answer", "empty"], "a folder without a message"),
        (["answer", "no.jsonl"], "not found"),
        (["answer", "rows.jsonl"], "line 1 is no message"),
        (["answer", "rows.csv"], "not a LatentWire message"),
        (["predict", "rows.csv", "--text_column", "text"], "has no column 'text'"),
        (["predict", "nothing.csv"], "not found"),
        (["predict", "rows.csv", "--text_column", "review", "-o", "p.xlsx"], ".jsonl or .csv"),
        (["predict", "taken.csv"], "a column 'answer'"),
        (["predict", "hole.jsonl"], "row 2: empty text"),
    ],
)
def test_bad_input_is_one_line(words, phrase, folder, toy_run, capsys):
    Path("empty").mkdir()
    Path("taken.csv").write_text("text,answer\na,b\n")
    Path("hole.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    assert run(*words, "--checkpoint", toy_run) == 2
    err = capsys.readouterr().err
    assert phrase in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "line", ["[]", "1", "null", "{}", '{"id": 1, "wire": "!"}', '{"id": 1, "file": "/etc/passwd"}', "{" * 5000, "\x00"]
)
def test_a_damaged_index_is_one_line(line, folder, toy_run, capsys):
    Path("m.jsonl").write_text(f"{line}\n")
    assert run("answer", "m.jsonl", "--checkpoint", toy_run) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
