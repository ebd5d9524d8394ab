"""§16: documents whose latents are kept, found by a sentence encoder and read before a question."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

TEXTS = ["aabawzaxya", "ccxcwcczcy", "wdxddydddz", "bbbwzbxbyb"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with documents."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"doc {i}", "text": text, "page": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*words: object) -> int:
    return lw.main(["store", *map(str, words)])


def opened(folder: str, **settings: Any) -> lw.LatentStore:
    return lw.LatentStore(Path(folder), lw.StoreSettings(action="ask", file=folder, **settings))


@pytest.fixture
def store(here: Path, toy_run: Path, sentence_model: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run("build", "docs.jsonl", "--checkpoint", toy_run, "--sentence_model", sentence_model, "-o", "ST") == 0
    assert "4 documents added, 4 in all" in capsys.readouterr().out
    return "ST"


def test_an_answer_is_that_of_the_nearest_documents_messages_in_order(store, toy_run, capsys):
    assert run("ask", store, TEXTS[1], "--top", 2, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    first, second = line["documents"]
    assert first["id"] == "doc 1" and first["row"]["page"] == 1
    assert abs(first["distance"]) < 1e-3 < second["distance"]
    bridge = lw.load(toy_run)
    messages = dict(zip([f"doc {i}" for i in range(4)], bridge.encode(TEXTS), strict=True))
    [wanted] = bridge.answer([[messages["doc 1"], messages[second["id"]]]])
    assert line["answer"] == wanted.text and line["tokens"] == wanted.tokens == 16
    assert list(line["scores"].values()) == pytest.approx(wanted.scores, abs=1e-5)
    assert run("ask", store, TEXTS[1], "--top", 2) == 0
    told = capsys.readouterr()
    assert told.out.strip() == wanted.text
    assert told.err.startswith(f"from doc 1 (1.00), {second['id']} (") and "16 positions read" in told.err


def test_several_messages_are_read_one_after_another(toy_run):
    bridge = lw.load(toy_run)
    one, two, three = bridge.encode(TEXTS[:3])
    assert bridge.answer([[one], [two]]) == bridge.answer([one, two])
    end = bridge.receiver()
    soft, apart = (
        end.open([(bytes(one), bytes(two)), (bytes(three), bytes(one))]),
        end.open([*map(bytes, (one, two, three))]),
    )
    assert torch.equal(soft.embeds[0], torch.cat([apart.embeds[0], apart.embeds[1]]))
    assert torch.equal(soft.embeds[1], torch.cat([apart.embeds[2], apart.embeds[0]]))
    both, turned = bridge.answer([[one, two], [two, one]])
    assert both.tokens == 16 and both.nbytes == len(bytes(one)) + len(bytes(two))
    assert both.scores != pytest.approx(turned.scores, abs=1e-4)
    for uneven in ([[one], [one, two]], [[]]):
        with pytest.raises(lw.LatentWireError, match="as many messages"):
            bridge.answer(uneven)


def test_what_is_there_stays_and_more_is_added_once(store, toy_run, monkeypatch, capsys):
    encode, made = lw.LoadedBridge.encode, list[str]()
    monkeypatch.setattr(
        lw.LoadedBridge, "encode", lambda self, texts, **k: made.extend(texts) or encode(self, texts, **k)
    )
    before = opened(store).find([TEXTS[0]])
    Path("more.jsonl").write_text(
        "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in [("a", "new"), ("b", TEXTS[0]), ("c", "new")])
    )
    assert run("build", "docs.jsonl", "more.jsonl", "-o", store) == 0
    assert made == ["new"] and "1 documents added, 5 in all" in capsys.readouterr().out
    assert opened(store).find([TEXTS[0]])[0][0] == before[0][0]
    assert set(opened(store).digests()) == {"a", *(f"doc {i}" for i in range(4))}


def test_texts_without_rows_are_named_by_their_files(here, toy_run, sentence_model, capsys):
    Path("texts").mkdir()
    for number, text in enumerate(TEXTS):
        Path("texts", f"n{number}.txt").write_text(text)
    assert (
        run(
            "build",
            "texts",
            "--checkpoint",
            toy_run,
            "--sentence_model",
            sentence_model,
            "-o",
            "ST",
            "--num_samples",
            3,
        )
        == 0
    )
    assert set(opened("ST").digests()) == {"n0", "n1", "n2"}


def test_only_one_builds_at_a_time(store, capsys):
    Path("more.jsonl").write_text(json.dumps({"id": "new", "text": "new"}) + "\n")
    with lw.alone_in(Path(store)):
        other = subprocess.run(
            [sys.executable, lw.__file__, "store", "build", "more.jsonl", "-o", store], capture_output=True, text=True
        )
    assert other.returncode == 2 and "another process is working in ST" in other.stderr
    assert run("build", "more.jsonl", "-o", store) == 0


def test_rows_without_an_id_and_files_of_one_name(here, toy_run, sentence_model, capsys):
    for folder, texts in {"fa": ["one", "two"], "fb": ["three"]}.items():
        Path(folder).mkdir()
        rows = [{"id": f"{folder}-{i}" if folder == "fb" else None, "text": text} for i, text in enumerate(texts)]
        Path(folder, "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--checkpoint", toy_run, "--sentence_model", sentence_model, "-o", "ST"]
    assert run("build", "fa/d.jsonl", "fb/d.jsonl", *words) == 0
    assert set(opened("ST").digests()) == {"d-1", "d-2", "fb-0"}


def test_more_messages_than_the_receiver_has_room_for_are_refused(toy_run):
    bridge = lw.load(toy_run)
    [message] = bridge.encode(TEXTS[:1])
    room = bridge.receiver().lm.room
    with pytest.raises(lw.LatentWireError, match=rf"tiny-qwen has {room:}; read fewer"):
        bridge.answer([[message] * (room // 8)])


def test_vectors_have_length_one_and_are_a_texts_own(store):
    found = opened(store).vectors([*TEXTS, "a longer text than the others of them", "", "x" * 5000])
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 7, abs=1e-5)
    assert torch.allclose(found[:1], opened(store).vectors(TEXTS[:1]), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["build", "docs.jsonl"], "store build needs"), (["build", "docs.jsonl", "-o", "new"], "store build needs"),
        (["ask", "nowhere", "x"], "nowhere is no store"), (["ask", "ST"], "needs a question"),
        (["ask", "ST", "x", "--top", "9"], "holds 4 documents; lower --top"), (["frob", "ST"], "'build', 'ask' or 'compare'"),
        (["build", "other.jsonl", "-o", "ST"], "another text as 'doc 1'"), (["compare", "ST"], "toy has no questions"),
        (["build", "twice.jsonl", "-o", "ST"], "two of the documents are named 'x'"),
        (["ask", "ST", "x", "--sentence_model", "other"], "leave --sentence_model out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(words, line, store, capsys):
    Path("other.jsonl").write_text(json.dumps({"id": "doc 1", "text": "another"}) + "\n")
    Path("twice.jsonl").write_text("".join(json.dumps({"id": "x", "text": text}) + "\n" for text in ("a", "b")))
    assert run(*words) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert line in told and told.startswith("error: ")
    assert set(opened("ST").digests()) == {f"doc {i}" for i in range(4)}


def test_another_bridge_or_sentence_encoder_is_refused(store, toy_run, tmp_path, capsys):
    note = json.loads(Path(store, "store.json").read_text())
    Path(store, "store.json").write_text(json.dumps(note | {"bridge": "0" * 12}))
    assert run("ask", store, "x") == 2
    assert "another bridge" in capsys.readouterr().err
    Path(store, "store.json").write_text("[]")
    assert run("ask", store, "x") == 2


def test_a_sender_that_needs_the_question_has_no_store(here, toy_run, sentence_model, monkeypatch, capsys):
    monkeypatch.setattr(lw.LoadedBridge, "told", True)
    assert run("build", "docs.jsonl", "--checkpoint", toy_run, "--sentence_model", sentence_model, "-o", "ST") == 2
    assert "--protocol question-agnostic" in capsys.readouterr().err
    assert not Path("ST").exists()


def test_without_lancedb_it_says_what_to_install(here, toy_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert run("build", "docs.jsonl", "--checkpoint", toy_run, "-o", "ST") == 2
    assert "pip install lancedb==0.40.0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions about texts, two for each, and a run that learned little from them."""
    folder, draw = tmp_path_factory.mktemp("questions"), random.Random(0)
    rows = []
    for number in range(120):
        text = rows[-1]["context"] if number % 2 else "".join(draw.choices("abcdwxyz", k=24))
        rows.append({"context": text, "question": f"{text[:6]} {number}?", "answer": text[8:12]})
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lw.train(dataset=str(folder / "qa.jsonl"), sender="tiny-llama", receiver="tiny-qwen", device="cpu", dtype="float32", steps=3,
             protocol="question-agnostic", output_dir=folder / "run")  # fmt: skip
    tested = [e.context for e in lw.make_task(lw.DataSettings(dataset=str(folder / "qa.jsonl"))).load("test")[0]]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tested))
    return folder


def test_compare_answers_from_latents_texts_and_nothing(questions, sentence_model, tmp_path, capsys):
    out = tmp_path / "ST"
    assert (
        run(
            "build",
            questions / "docs.jsonl",
            "--checkpoint",
            questions / "run",
            "--sentence_model",
            sentence_model,
            "-o",
            out,
        )
        == 0
    )
    count = len(set(opened(str(out)).digests().values()))
    assert f"{count} documents added" in capsys.readouterr().out and 8 <= count <= 24
    assert run("compare", out, "--num_samples", 18, "--top", 2) == 0
    told = capsys.readouterr().err
    assert "18 questions" in told and "2 read for each" in told and "right one among them" in told
    kept = lw.read_rows(next(out.glob("compare-top2-n18-*.jsonl")))
    assert [row["method"] for row in kept] == ["latents"] * 16 + ["text"] * 16 + ["nothing"] * 16 + ["latents"] * 2 + [
        "text"
    ] * 2 + ["nothing"] * 2
    assert len({row["id"] for row in kept}) == 18 and len({row["text"] for row in kept}) < 18
    table = lw.table_of_reading(kept, "")
    for name, f1, interval, tokens, ms, p in table.rows:
        mine = [row for row in kept if row["method"] == name]
        assert f1 == f"{100 * sum(row['score'] for row in mine) / 18:.1f}"
        assert tokens == {"latents": "16", "text": "49", "nothing": "0"}[name]
        assert bool(p) == (name != "latents") and float(ms) >= 0
        low, high = map(float, interval.split("–"))
        assert low <= float(f1) <= high
        assert f"{name} " in told
    texts = {
        lw.LatentStore.digest(row["text"]): f"docs-{i}"
        for i, row in reversed([*enumerate(lw.read_rows(questions / "docs.jsonl"), 1)])
    }
    assert all(row["found"] == (texts[row["text"]] in row["documents"]) for row in kept)
    assert run("compare", out, "--num_samples", 18, "--top", 2) == 0  # nothing is answered again
    assert lw.read_rows(next(out.glob("compare-top2-n18-*.jsonl"))) == kept
    [answer] = lw.load(questions / "run").answer([row_messages(out, kept[0])], [kept[0]["question"]])
    assert answer.text == kept[0]["answer"]


def row_messages(out: Path, row: dict[str, Any]) -> list[bytes]:
    """The messages of the documents that a row names, in its order."""
    kept = {item["id"]: item["message"] for item in opened(str(out)).table.search().limit(100).to_list()}
    return [kept[name] for name in row["documents"]]


def test_nothing_is_left_where_the_documents_are_not_there(here, toy_run, sentence_model, capsys):
    assert run("build", "missing.jsonl", "--checkpoint", toy_run, "--sentence_model", sentence_model, "-o", "ST") == 2
    assert "missing.jsonl" in capsys.readouterr().err and not Path("ST").exists()


def test_messages_without_a_latent_are_read_in_turn_as_well():
    soft = lw.SoftPrompt(torch.arange(24.0).view(4, 3, 2), memory=torch.zeros(4, 0, 5), mask=torch.ones(4, 3).bool())
    for count in (1, 2, 4):
        joined = soft.in_turn(count)
        assert joined.embeds.shape == (4 // count, 3 * count, 2) and joined.memory.shape == (4 // count, 0, 5)
        assert joined.embeds.flatten().tolist() == soft.embeds.flatten().tolist() and joined.mask.shape == (
            4 // count,
            3 * count,
        )


@pytest.mark.slow
@pytest.mark.alone
def test_a_large_store_survives_being_killed(here, toy_run, sentence_model):
    """Twice with SIGKILL; then it has every document once, is searched by its index, and little memory was needed."""
    count, draw = int(os.environ.get("LATENTWIRE_DOCUMENTS", "20000")), random.Random(0)
    texts = ["".join(draw.choice("abcdwxyz") for _ in range(12)) for _ in range(count)]
    Path("many.jsonl").write_text("".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    command = [sys.executable, lw.__file__, "store", "build", "many.jsonl", "--checkpoint", str(toy_run),
               "--sentence_model", sentence_model, "-o", "ST"]  # fmt: skip
    counts = [0]
    for _ in range(2):
        building = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and (not Path("ST/store.json").exists() or held() <= counts[-1]):
            time.sleep(0.3)
        building.send_signal(signal.SIGKILL)
        building.wait()
        counts.append(held())
    assert 0 < counts[1] < counts[2] < count
    measured = "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True, stdout=s.DEVNULL, stderr=s.DEVNULL)"
    measured += "; print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", measured, *command], check=True, capture_output=True, text=True)
    peak = int(done.stdout) / 1024
    store = opened("ST")
    assert store.digests() == {f"d{i}": lw.LatentStore.digest(text) for i, text in enumerate(texts)}
    assert [index.num_unindexed_rows for index in store.table.list_indices()] == [0]
    store.find([texts[0]])
    times = []
    for i in range(0, count, count // 20):
        began = time.perf_counter()
        [[nearest, *_]] = store.find([texts[i]])
        times.append(time.perf_counter() - began)
        assert nearest["id"] == f"d{i}" or nearest["_distance"] < 1e-3
    print(f"{count} documents, killed at {counts[1:]}, peak {peak:.0f} MB, found in {1e3 * sorted(times)[10]:.1f} ms")
    assert peak < 2000 and sorted(times)[10] < 0.1


def held() -> int:
    """How many documents the store in this folder has."""
    import lancedb

    names = lancedb.connect("ST").list_tables().tables
    return lancedb.connect("ST").open_table("documents").count_rows() if "documents" in names else 0
