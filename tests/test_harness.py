"""§16: what lm-evaluation-harness asks, answered through a bridge; the slow test runs the harness itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import package_folder

import LATENTWIRE as lw

TEXTS = ["aabawzaxya", "ccxcwcczcy", "wdxddydddz"]
PINS = ("lm_eval==0.4.13", "pytablewriter==1.2.1", "DataProperty==1.1.1", "tabledata==1.3.5", "mbstrdecoder==1.1.5",
        "typepy==2.0.0", "tcolorpy==0.1.7", "pathvalidate==3.3.1", "chardet==7.7.0")  # fmt: skip


@pytest.fixture(scope="module")
def bridge(toy_run: Path) -> lw.LoadedBridge:
    return lw.load(toy_run)


def requests(bridge: lw.LoadedBridge, toy_run: Path, **settings: Any) -> lw.HarnessRequests:
    return lw.HarnessRequests(bridge, lw.HarnessSettings(checkpoint=toy_run, **settings), lw.Silent())


def asked(*pairs: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def choices(texts: list[str], last: str = "?") -> list[SimpleNamespace]:
    return asked(*((f"{text}\n{last}", f" {word}") for text in texts for word in "abcd"))


def nats(found: list[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in found]


@pytest.fixture(scope="module")
def scores(bridge) -> list[float]:
    """Our own scores of each text's class words."""
    return [score for answer in bridge.answer(bridge.encode(TEXTS)) for score in answer.scores]


def test_latents_give_the_scores_and_words_of_our_own_answers(bridge, toy_run, scores):
    found = requests(bridge, toy_run).loglikelihood(choices(TEXTS))
    assert nats(found) == pytest.approx(scores, abs=1e-4)
    written = requests(bridge, toy_run).generate_until(
        asked(*((f"{t}\n?", {"until": ["\n"], "max_gen_toks": 3}) for t in TEXTS))
    )
    said = [
        answer.text
        for answer in bridge.receiver().answers(
            [lw.Example("0", "", "", ("a",))] * 3, [*map(bytes, bridge.encode(TEXTS))]
        )
    ]
    assert [text.strip() for text in written] == said


def test_greedy_is_said_of_what_would_be_written(bridge, toy_run):
    harness = requests(bridge, toy_run)
    written = harness.generate_until(asked(*((f"{text}\n?", {"until": "\n", "max_gen_toks": 2}) for text in TEXTS)))
    greedy = [said for _, said in harness.loglikelihood(choices(TEXTS))]
    assert greedy == [text == f" {word}" for text in written for word in "abcd"]
    assert any(greedy)


def test_text_is_the_receiver_itself(bridge, toy_run):
    lm, context = bridge.receiver().lm, f"{TEXTS[0]}\n?"
    ids, more = lm.ids(context), lm.continuation(context, " a b")
    with torch.no_grad():
        logits = lm.model(torch.tensor([[*lm.bos, *ids, *more]])).logits[0].log_softmax(-1)
    places = range(len(lm.bos) + len(ids) - 1, len(lm.bos) + len(ids) + len(more) - 1)
    wanted = sum(logits[place, token].item() for place, token in zip(places, more, strict=True))
    for send in (context, f"{context} "):  # a space before what is scored belongs to it
        [(value, _)] = requests(bridge, toy_run, send="text").loglikelihood(
            asked((send, " a b"[len(send) - len(context) :]))
        )
        assert value == pytest.approx(wanted, abs=1e-4)


def test_controls_send_another_text_or_nothing(bridge, toy_run, scores):
    order = sorted(range(3), key=lambda i: lw.digest_of((TEXTS[i], "")))
    others = {order[i]: order[(i + 1) % 3] for i in range(3)}
    found = nats(requests(bridge, toy_run, send="shuffled").loglikelihood(choices(TEXTS)))
    assert found == pytest.approx(
        [score for i in range(3) for score in scores[4 * others[i] : 4 * others[i] + 4]], abs=1e-4
    )
    none = nats(requests(bridge, toy_run, send="none").loglikelihood(choices(TEXTS)))
    assert none[:4] == pytest.approx(none[4:8], abs=1e-5)
    assert none[:4] != pytest.approx(scores[:4], abs=1e-2)


@pytest.mark.parametrize(
    ("last_lines", "context", "parts"),
    [
        (1, "a\nb\nAnswer:", ("a\nb", "Answer:")), (2, "a\nb\nAnswer:", ("a", "b\nAnswer:")), (0, "a\nb", ("a\nb", "")),
        (1, "one line", ("one line", "")), (1, "\nAnswer:", ("\nAnswer:", "")), (3, "a\nb", ("a\nb", "")), (1, "", ("", "")),
    ],
)  # fmt: skip
def test_the_last_lines_stay_and_all_above_is_sent(bridge, toy_run, monkeypatch, last_lines, context, parts):
    harness = requests(bridge, toy_run, last_lines=last_lines)
    assert harness.parts(context) == parts
    monkeypatch.setattr(type(bridge.part), "asks", True)  # where the receiver gets a question, it begins a line
    head, after = parts
    assert harness.parts(context) == (head, f"\n{after}" if after else "")


def test_a_sender_that_knows_the_question_is_told_the_last_lines(bridge, toy_run, monkeypatch):
    harness = requests(bridge, toy_run)
    assert harness.message_key("text", "\nWho? ") == ("text", "")
    monkeypatch.setattr(bridge.part, "sender_prompt", "{question}\n{context}")
    assert harness.message_key("text", "\nWho? ") == ("text", "Who?")


def test_another_text_is_never_the_same_one_asked_otherwise(bridge, toy_run, monkeypatch):
    monkeypatch.setattr(bridge.part, "sender_prompt", "{question}\n{context}")
    harness = requests(bridge, toy_run, send="shuffled")
    contexts = [f"{text}\n{question}" for text in TEXTS[:2] for question in ("who?", "when?", "why?")]
    wires = [wire for wire, _ in harness.read(contexts)]
    texts = {wire: key[0] for key, wire in harness.sent.items()}
    assert [texts[wire] for wire in wires] == [TEXTS[1]] * 3 + [TEXTS[0]] * 3
    with pytest.raises(lw.LatentWireError, match="second text"):
        harness.read(contexts[:3])


def test_no_message_is_written_twice(bridge, toy_run, monkeypatch):
    encode, made = lw.LoadedBridge.encode, list[str]()
    monkeypatch.setattr(
        lw.LoadedBridge, "encode", lambda self, texts, *rest: made.extend(texts) or encode(self, texts, *rest)
    )
    harness = requests(bridge, toy_run)
    harness.loglikelihood(choices(TEXTS))
    harness.generate_until(asked((f"{TEXTS[0]}\n?", {})))
    assert sorted(made) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("settings", "ask", "line"),
    [
        ({}, lambda h: h.loglikelihood_rolling(asked(("text",))), "no context"),
        ({}, lambda h: h.generate_until(asked(("a\n?", {"do_sample": True}))), "do_sample=False"),
        ({"send": "shuffled"}, lambda h: h.loglikelihood(asked(("a\n?", " b"))), "second text"),
        ({"send": "text"}, lambda h: h.loglikelihood(asked(("a " * 100_000, " b"))), "num_fewshot"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_line(bridge, toy_run, settings, ask, line):
    with pytest.raises(lw.LatentWireError, match=line):
        ask(requests(bridge, toy_run, **settings))


def test_a_chat_has_its_frame_and_text_has_none(bridge, toy_run, monkeypatch):
    monkeypatch.setitem(vars(bridge.receiver().prompting), "frame", ([5, 6], [7]))
    read, lay_out = [], lw.lay_out
    monkeypatch.setattr(
        lw,
        "lay_out",
        lambda lm, soft, after, answers=None, before=(), left=False: (
            read.append((list(before), after)) or lay_out(lm, soft, after, answers, before, left)
        ),
    )
    lm = bridge.receiver().lm
    for send, before, after in (("latents", [*lm.bos, 5, 6], [*lm.ids("?"), 7]), ("text", lm.bos, lm.ids("ab\n?"))):
        harness = requests(bridge, toy_run, send=send)
        for ask in (
            lambda h: h.loglikelihood(asked(("ab\n?", " a"))),
            lambda h: h.generate_until(asked(("ab\n?", {"max_new_tokens": 1}))),
        ):
            read.clear()
            ask(harness)
            assert read[-1] == (before, [after])


@pytest.mark.parametrize("alias", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_has_several_names(alias, bridge, toy_run):
    [text] = requests(bridge, toy_run).generate_until(asked((f"{TEXTS[0]}\n?", {alias: 1})))
    assert len(bridge.receiver().lm.ids(text)) <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "hf"],
        ["--mod", "hf"],
        ["--model_args=a"],
        ["-M", "hf"],
        ["--device", "x"],
        ["--apply_chat_template"],
        ["--use_cache", "x"],
    ],
)
def test_flags_that_would_change_what_is_measured_are_refused(words, toy_run, monkeypatch, capsys):
    from types import ModuleType

    for name in ("lm_eval", "lm_eval.__main__", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, what in (
        ("lm_eval.__main__", "cli_evaluate"),
        ("lm_eval.api.model", "LM"),
        ("lm_eval.api.registry", "register_model"),
    ):
        setattr(sys.modules[name], what, None)
    assert lw.main(["harness", "--checkpoint", str(toy_run), "-t", "boolq", *words]) == 2
    line = capsys.readouterr().err
    assert "leave it out" in line and words[0].partition("=")[0] in line


def test_the_command_says_what_to_install_and_what_to_leave_out(toy_run, monkeypatch, capsys):
    words = ["harness", "--checkpoint", str(toy_run), "--tasks", "boolq"]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert lw.main(words) == 2
    assert "pip install lm_eval==0.4.13" in capsys.readouterr().err


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task of choices and one of writing, on rows of toy."""
    rows = lw.make_task(lw.DataSettings(dataset="toy")).load("test")[0][:24]
    lines = [json.dumps({"text": e.context, "label": e.label}) for e in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{text}}}}\\n?"
"""
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\noutput_type: multiple_choice\n{common}doc_to_choice: [a, b, c, d]\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f'task: write\noutput_type: generate_until\n{common}doc_to_target: \' {{{{["a","b","c","d"][label]}}}}\'\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 2}\nmetric_list: [{metric: exact_match}]\n'
    )
    return tmp_path


@pytest.mark.slow
def test_the_harness_itself_runs_tasks_through_the_wire(toy_run, tasks, bridge, tmp_path):
    env = os.environ | {"PYTHONPATH": str(package_folder("lm-eval-cli", PINS)), "HF_DATASETS_OFFLINE": "1"}

    def ran(*words: str) -> dict[str, Any]:
        out = tmp_path / "out" / str(len(words)) / words[-1]
        command = [sys.executable, lw.__file__, "harness", "--checkpoint", str(toy_run), "--tasks", "choose,write"]
        command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        [results] = out.rglob("results_*.json")
        return json.loads(results.read_text())

    results = ran("--batch_size", "8")
    assert results["config"]["bridge"] == bridge.digest
    assert results["results"]["choose"]["acc,none"] > 0.9
    assert results["results"]["write"]["exact_match,none"] > 0.8
    shuffled = ran("--send", "shuffled")["results"]["choose"]["acc,none"]
    assert shuffled < 0.6 < results["results"]["choose"]["acc,none"]

    # the text alone: as the harness's own class for models reads and scores it
    lm, hf = bridge.receiver().lm, tmp_path / "hf"
    lm.model.save_pretrained(hf)
    lm.tokenizer.save_pretrained(hf)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={hf},dtype=float32",
               "--tasks", "choose,write", "--include_path", str(tasks), "--output_path", str(tmp_path / "theirs"),
               "--log_samples", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ran("--send", "text")
    for task in ("choose", "write"):
        [mine], [theirs] = (
            [*(tmp_path / where).rglob(f"samples_{task}_*.jsonl")] for where in ("out/2/text", "theirs")
        )
        for left, right in zip(lw.read_rows(mine), lw.read_rows(theirs), strict=True):
            if task == "write":
                assert left["filtered_resps"] == right["filtered_resps"]
            else:
                for (a, said), (b, their) in zip(left["filtered_resps"], right["filtered_resps"], strict=True):
                    assert float(a) == pytest.approx(float(b), abs=1e-3)
                    assert str(said) == str(their)
