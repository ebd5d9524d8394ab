"""§13, §16: the bridge from Python: load, encode, answer; train and evaluate with keywords."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import LATENTWIRE as lw

README = Path(lw.__file__).with_name("README.md").read_text()
TEXTS = ["aabawzaxya", "ccxcwcczcy", "wdxddydddz", "bbbwzbxbyb", "aawxyzaaaa"]


@pytest.fixture(scope="module")
def bridge(toy_run: Path) -> lw.LoadedBridge:
    return lw.load(toy_run)


def test_the_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(block.replace("steps=60", "steps=2"), "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[b'LWIR', b'LWIR'\] \[('[abcd]'(, )?){2}\]", last), last


def test_many_texts_are_what_each_is_alone(bridge, toy_run):
    messages = bridge.encode(TEXTS)
    answers = bridge.answer(messages)
    assert [message.latents.shape for message in messages] == [(1, 8, 64)] * len(TEXTS)
    alone = [bridge.encode([text])[0].latents for text in TEXTS]
    assert all((a - m.latents).abs().max() < 1e-4 for a, m in zip(alone, messages, strict=True))
    assert [answer.text for answer in answers] == [lw.answer_message(toy_run, bytes(m)) for m in messages]
    assert {answer.text for answer in answers} <= set("abcd") and {len(answer.scores) for answer in answers} == {4}
    assert [answer.nbytes for answer in answers] == [len(bytes(m)) for m in messages]
    assert [a.text for a in bridge.answer([bytes(m) for m in messages])] == [a.text for a in answers], (
        "bytes do as well"
    )


def test_small_batches_change_no_answer(toy_run, bridge):
    small = lw.LoadedBridge(toy_run, batch_size=2)
    assert [a.text for a in small.answer(small.encode(TEXTS))] == [a.text for a in bridge.answer(bridge.encode(TEXTS))]


def test_the_answers_are_those_of_the_evaluation(toy_run, tmp_path, bridge):
    lw.evaluate(toy_run, methods=["bridge"], num_samples=24, output_dir=tmp_path)
    texts = {e.id: e.context for e in lw.Toy(lw.DataSettings(dataset="toy")).load("test")[0]}
    records = list(lw.records_in(tmp_path / "records.jsonl"))
    answers = bridge.answer(bridge.encode([texts[row["id"]] for row in records]))
    assert [answer.text for answer in answers] == ["abcd"[row["prediction"]] for row in records]
    for answer, row in zip(answers, records, strict=True):
        assert answer.scores == pytest.approx(row["scores"], abs=1e-4)


def test_nothing_is_loaded_twice(toy_run, monkeypatch):
    names: list[str] = []
    real = lw.load_lm
    monkeypatch.setattr(lw, "load_lm", lambda name, *rest: names.append(name) or real(name, *rest))
    bridge = lw.load(str(toy_run))
    assert names == [], "models load where they are first used"
    for _ in range(2):
        bridge.answer(bridge.encode(TEXTS))
    assert sorted(names) == ["tiny-llama", "tiny-qwen"]
    assert bridge.receiver() is bridge.receiver("tiny-qwen")


def test_a_receiver_alone_loads_no_sender(toy_run, bridge, monkeypatch):
    messages = bridge.encode(TEXTS[:1])
    monkeypatch.setattr(lw, "open_reader", lambda *_: pytest.fail("the sender was loaded"))
    assert lw.load(toy_run).answer(messages)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda b: b.encode(TEXTS, ["who?"]), "questions=1 for 5 texts"),
        (lambda b: b.encode(["one"], "who?"), "questions=one text for 1 texts"),
        (lambda b: b.answer(b.encode(["aab"]), ["who?", "what?"]), "questions=2 for 1 messages"),
        (lambda b: b.answer([b"nothing"]), "not a LatentWire message"),
        (lambda b: b.encode(["aab"], receiver="tiny-qwn"), "no receiver 'tiny-qwn' here; did you mean 'tiny-qwen'?"),
        (lambda b: lw.load("nowhere"), "nowhere"),
        (lambda b: lw.train(dataset="toy", stepz=3), "unknown flag --stepz; did you mean 'steps'"),
        (lambda b: lw.train(dataset="toy", steps="many"), "steps"),
    ],
)
def test_what_does_not_fit_is_one_line(bridge, call, told):
    with pytest.raises(lw.LatentWireError) as error:
        call(bridge)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 3}, ["--steps", "3"]),
        ({"use_lora": True, "film": False}, ["--use_lora", "yes", "--film", "no"]),
        ({"seeds": [1, 2]}, ["--seeds", "1", "2"]),
        ({"layers": (), "anchor_text": None}, []),
        ({"anchor_text": ""}, ["--anchor_text", ""]),
        ({"anchor_text": "-x:"}, ["--anchor_text=-x:"]),
        ({"output_dir": Path("a b")}, ["--output_dir", "a b"]),
    ],
)
def test_keywords_are_the_words_of_the_command_line(given: dict[str, Any], words: list[str]):
    assert lw.words_from(given) == words
    lw.settings_from(lw.TrainSettings, lw.words_from(given))


def test_keywords_train_what_flags_train(tmp_path, toy_run):
    told = {"sender": "tiny-llama", "receiver": "tiny-qwen", "dataset": "toy", "device": "cpu", "dtype": "float32"}
    lw.train(**told, steps=60, width=64, lr=1e-3, output_dir=tmp_path / "run")
    assert lw.open_bridge(tmp_path / "run")[0].fingerprint() == lw.open_bridge(toy_run)[0].fingerprint()


def test_help_says_shapes_and_errors():
    for part in (lw.load, lw.train, lw.LoadedBridge.encode, lw.LoadedBridge.answer):
        assert "LatentWireError" in part.__doc__
    assert "(1, K, D_w)" in lw.LoadedBridge.encode.__doc__ and "LatentWireError" in lw.LoadedBridge.answer.__doc__
