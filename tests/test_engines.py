"""§11, §16: the receiver's part in an engine: prompts as embeddings, over HTTP and as files."""

from __future__ import annotations

import base64
import http.server
import io
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

TEXTS = ["aabawzaxya", "ccxcwcczcy", "wdxddydddz", "bbbwzbxbyb", "aawxyzaaaa"]


class Engine(http.server.BaseHTTPRequestHandler):
    """What vLLM's server does with embeddings, one model, greedy: enough of /v1/models, /tokenize and /v1/completions."""

    lm: lw.LM
    bodies: list[dict[str, Any]]
    broken = ""
    stumbles = False
    shift = 0

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def reply(self, value: Any, code: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "served", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"tokens": [i + self.shift for i in self.lm.ids(body["prompt"])]})
            return
        self.bodies.append(body)
        if self.broken:
            self.reply(self.broken.encode(), 400 if self.broken.startswith("{") else 200)
            return
        choices = [self.choice(i, prompt, body) for i, prompt in enumerate(body["prompt_embeds"])][::-1]
        if not body.get("stream"):
            self.reply({"choices": choices})
            return
        rounds = itertools.zip_longest(*([(c["index"], token) for token in c["token_ids"]] for c in choices))
        events = [{"choices": [{"index": said[0], "token_ids": [said[1]]}]} for turn in rounds for said in turn if said]
        events = [*events[:2], {"error": {"message": "out of memory"}}] if self.stumbles else events
        self.reply(
            "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, {"choices": []}]).encode()
            + b"data: [DONE]\n\n"
        )

    @torch.no_grad()
    def choice(self, index: int, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        row = torch.load(io.BytesIO(base64.b64decode(prompt)), weights_only=True)
        tokens, tops = [], []
        for _ in range(body["max_tokens"]):
            logits = self.lm.model(inputs_embeds=row[None]).logits[0, -1].float().log_softmax(-1)
            best = int(logits.argmax())
            token = body.get("allowed_token_ids", [best])[0]
            tops.append({f"token_id:{t}": float(logits[t]) for t in {best, token}})
            tokens.append(token)
            if token in body.get("stop_token_ids", []) and not body.get("ignore_eos"):
                break
            row = torch.cat([row, self.lm.embed(torch.tensor([token]))])
        return {"index": index, "token_ids": tokens, "logprobs": {"top_logprobs": tops} if "logprobs" in body else None}


@pytest.fixture
def engine(toy_run: Path) -> Iterator[tuple[str, type[Engine]]]:
    """A server of the toy run's receiver; its address and its class."""
    handler = type("Here", (Engine,), {"lm": lw.load(toy_run).lm(0), "bodies": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_an_engine_gives_the_answers_and_scores_of_our_own_receiver(toy_run, engine):
    url, handler = engine
    own, served = lw.load(toy_run), lw.load(toy_run, vllm=url)
    messages = own.encode(TEXTS)
    here, there = own.answer(messages), served.answer(messages)
    assert [a.text for a in there] == [a.text for a in here]
    for a, b in zip(there, here, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3)
        assert (a.first_correct, a.nbytes, a.tokens) == (b.first_correct, b.nbytes, b.tokens)
    assert all("prompt" not in body and body["temperature"] == 0 for body in handler.bodies), "embeddings alone"
    raw = [
        a.text for a in own.receiver().listen([e for e, _ in own.asked(messages, None)], [*map(bytes, messages)], False)
    ]
    ours = [
        a.text
        for a in served.receiver().listen([e for e, _ in own.asked(messages, None)], [*map(bytes, messages)], False)
    ]
    assert ours == raw, "what is generated is cut alike"


class InProcess:
    """Stands for the module vllm: an LLM of the toy run's receiver, asked as the real one is."""

    __spec__ = ModuleSpec("vllm", None)
    lm: lw.LM
    SamplingParams = dict

    def LLM(self, path: str, **options: Any) -> InProcess:
        self.made = path, options
        return self

    def generate(self, prompts: list[dict[str, Any]], params: dict[str, Any], use_tqdm: bool) -> list[Any]:
        body = {"max_tokens": params["max_tokens"], **params}
        outputs = []
        for index, prompt in enumerate(prompts):
            data = base64.b64encode(lw.tensor_file(prompt["prompt_embeds"])).decode()
            found = Engine.choice(SimpleNamespace(lm=self.lm), index, data, body)
            tops = (found["logprobs"] or {"top_logprobs": []})["top_logprobs"]
            places = [{int(k.partition(":")[2]): SimpleNamespace(logprob=v) for k, v in top.items()} for top in tops]
            outputs.append(
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=found["token_ids"], logprobs=places or None)])
            )
        return outputs


def test_an_engine_in_this_process_answers_as_the_server_does(toy_run, tmp_path, monkeypatch, capsys):
    own = lw.load(toy_run)
    inside = InProcess()
    inside.lm = own.lm(0)
    monkeypatch.setitem(sys.modules, "vllm", inside)
    messages = own.encode(TEXTS)
    (tmp_path / "m.wire").write_bytes(bytes(messages[0]))
    words = ["answer", str(tmp_path / "m.wire"), "--checkpoint", str(toy_run), "--engine", "vllm"]
    assert lw.main(words) == 2
    assert "has no files" in capsys.readouterr().err
    load_lm = lw.load_lm

    def with_files(*asked: Any) -> lw.LM:
        lm = load_lm(*asked)
        lm.model.name_or_path = "a/folder"
        return lm

    monkeypatch.setattr(lw, "load_lm", with_files)
    here, there = own.answer(messages), lw.load(toy_run, vllm="vllm").answer(messages)
    assert [a.text for a in there] == [a.text for a in here]
    for a, b in zip(there, here, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3) and a.first_correct == b.first_correct
    path, options = inside.made
    assert path == "a/folder" and options["enable_prompt_embeds"] and options["dtype"] == "float32"
    assert lw.main(words) == 0
    assert capsys.readouterr().out.strip() == here[0].text
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert lw.main(words) == 2
    assert "pip install vllm" in capsys.readouterr().err


def test_an_evaluation_by_an_engine_has_rows_of_its_own(toy_run, engine, tmp_path):
    found, keys = [], []
    for words in ({}, {"vllm": engine[0]}):
        result = lw.evaluate(
            toy_run, methods=["bridge", "control:shuffled"], num_samples=16, output_dir=tmp_path, **words
        )
        found.append({name: one["accuracy"] for name, one in result["methods"].items()})
        keys.append({row["key"] for row in lw.records_in(tmp_path / "records.jsonl")})
    assert found[0] == found[1] and engine[1].bodies
    assert len(keys[0]) == len(keys[1] - keys[0]) == 1


@pytest.mark.parametrize(
    ("broken", "phrase"),
    [('{"error": "too long"}', "400"), ("no JSON", "no vLLM server"), ('{"choices": NaN}', "400")],
)
def test_a_server_that_fails_is_one_line(broken, phrase, toy_run, engine, tmp_path, capsys):
    url, handler = engine
    message = tmp_path / "m.wire"
    message.write_bytes(lw.encode_text(toy_run, TEXTS[0]))
    handler.broken = broken
    assert lw.main(["answer", str(message), "--checkpoint", str(toy_run), "--vllm", url]) == 2
    err = capsys.readouterr().err
    assert phrase in err and len(err.splitlines()) == 1


def test_another_model_no_server_and_no_address_are_refused(toy_run, engine, tmp_path, capsys):
    url, handler = engine
    message = tmp_path / "m.wire"
    message.write_bytes(lw.encode_text(toy_run, TEXTS[0]))
    handler.shift = 1
    for address, phrase in ((url, "whose tokens are not those of"), ("http://127.0.0.1:9", "--enable-prompt-embeds"),
                            ("file:///etc", "give vllm, or an address")):  # fmt: skip
        assert lw.main(["answer", str(message), "--checkpoint", str(toy_run), "--vllm", address]) == 2
        err = capsys.readouterr().err
        assert phrase in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("flag", ["use_deep_prefix", "use_latent_adapters", "use_lora"])
def test_what_embeddings_cannot_carry_is_refused_by_name(flag, tmp_path, capsys):
    run = tmp_path / "r"
    lw.train(dataset="toy", sender="tiny-llama", receiver="tiny-qwen", steps=1, output_dir=run, **{flag: True})
    (tmp_path / "m.wire").write_bytes(lw.encode_text(run, TEXTS[0]))
    assert lw.main(["export", str(tmp_path / "m.wire"), "--checkpoint", str(run)]) == 2
    name = "LoRA" if flag == "use_lora" else flag
    assert name in capsys.readouterr().err


def test_exported_prompts_are_what_the_receiver_reads(toy_run, tmp_path):
    import numpy
    from safetensors.torch import load_file

    bridge, paths = lw.load(toy_run), [tmp_path / f"{name}.wire" for name in "ab"]
    for path, text in zip(paths, TEXTS, strict=False):
        path.write_bytes(lw.encode_text(toy_run, text))
    wanted = bridge.prompt_embeds([path.read_bytes() for path in paths])
    lm = bridge.lm(0)
    assert len(wanted[0]) == len(lm.bos) + 8 + len(bridge.receiver().prompting.after())

    def exported(kind: str, *messages: Path) -> Path:
        out = tmp_path / f"out.{kind}"
        words = ["export", *map(str, messages), "--checkpoint", str(toy_run), "--to", kind, "-o", str(out)]
        assert lw.main(words) == 0
        return out

    tensors = load_file(exported("safetensors", *paths))
    assert all(torch.equal(tensors[name], prompt) for name, prompt in zip("ab", wanted, strict=True))
    assert torch.equal(torch.from_numpy(numpy.load(exported("npy", paths[0]))), wanted[0])
    body = json.loads(exported("vllm", *paths).read_text())
    rows = [torch.load(io.BytesIO(base64.b64decode(row)), weights_only=True) for row in body["prompt_embeds"]]
    assert all(torch.equal(row, prompt) for row, prompt in zip(rows, wanted, strict=True))
    asked = json.loads(exported("sglang", paths[1]).read_text())
    assert torch.equal(torch.tensor(asked["input_embeds"][0]), wanted[1])
    assert lw.main(["export", *map(str, paths), "--checkpoint", str(toy_run), "--to", "npy"]) == 2
