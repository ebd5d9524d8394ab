"""§16: a gateway that speaks OpenAI's Completions and Chat in front of a bridge."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engines import engine  # noqa: F401

import LATENTWIRE as lw

uvicorn = pytest.importorskip("uvicorn", reason="pip install '.[serve]'")
FUZZ = int(os.environ.get("LATENTWIRE_FUZZ", "300"))
TEXTS = ["".join(random.Random(f"serve-{i}").choices("abcdwxyz", k=10)) for i in range(640)]


def ask(port: int, path: str, body: Any = None, key: str = "") -> tuple[int, str]:
    """Status and body of a request; bytes travel as they are, anything else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(connection):
        head = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("GET" if body is None else "POST", path, data, head)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


@contextlib.contextmanager
def serving(bridge: lw.LoadedBridge, run: Path, **settings: Any) -> Iterator[int]:
    """The gateway in a thread; its port."""
    gateway = lw.Gateway(bridge, lw.ServeSettings(run=run, **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(gateway.app(), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield port
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def bridge(toy_run: Path) -> lw.LoadedBridge:
    return lw.load(toy_run)


@pytest.fixture(scope="module")
def port(bridge: lw.LoadedBridge, toy_run: Path) -> Iterator[int]:
    with serving(bridge, toy_run, max_body=5000) as port:
        yield port


def test_completions_and_chat_give_the_bridges_answers(port, bridge):
    [message] = bridge.encode(TEXTS[:1])
    [wanted] = bridge.answer([message])
    code, reply = ask(port, "/v1/completions", {"model": "any", "prompt": "", "context": TEXTS[0], "temperature": 0})
    told = json.loads(reply)
    assert code == 200 and told["choices"][0]["text"] == wanted.text and told["object"] == "text_completion"
    assert told["usage"]["prompt_tokens"] == 8 and told["latentwire"]["bytes"] == len(bytes(message))
    assert told["latentwire"]["text_tokens"] == len(bridge.lm(0).ids(TEXTS[0]))
    marked = [{"role": "system", "content": "Answer."},
              {"role": "user", "content": [{"type": "text", "text": f"<context>{TEXTS[0]}</context>Which letter?"}]}]  # fmt: skip
    for body in (
        {"messages": marked},
        {"messages": [*marked[:1], {"role": "user", "content": ""}], "context": TEXTS[0]},
    ):
        code, reply = ask(port, "/v1/chat/completions", body)
        assert code == 200 and json.loads(reply)["choices"][0]["message"] == {
            "role": "assistant",
            "content": wanted.text,
        }
    code, reply = ask(port, "/v1/chat/completions", {"messages": marked, "stream": True})
    events = [line.removeprefix("data: ") for line in reply.splitlines() if line]
    assert code == 200 and events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == wanted.text
    assert deltas[-1]["finish_reason"] == "stop" and deltas[-1]["delta"] == {}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose receiver writes answers of its own, not class words."""
    folder = tmp_path_factory.mktemp("writer")
    draw = random.Random(0)
    rows = [
        {"context": "".join(draw.choices("abcdwxyz", k=10)), "answer": f"{draw.randrange(10**6)} b"} for _ in range(40)
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lw.train_main(["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--dataset", str(folder / "own.jsonl"), "--steps", "2",
                   "--device", "cpu", "--dtype", "float32", "--output_dir", str(folder / "run")])  # fmt: skip
    return folder / "run"


def said(reply: str, chat: bool) -> list[str]:
    """What each event of a stream adds."""
    events = [json.loads(line.removeprefix("data: ")) for line in reply.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    return [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]


@pytest.mark.parametrize("where", ["our own receiver", "an engine"])
def test_what_is_written_is_streamed_as_it_comes(where, writer, toy_run, engine):  # noqa: F811
    own = lw.load(writer)
    wanted = [answer.text for answer in own.answer(own.encode(TEXTS[:4]))]
    assert all(len(own.lm(0).ids(text)) > 3 for text in wanted)
    served = own if where == "our own receiver" else lw.load(writer, vllm=engine[0])
    with serving(served, writer) as port:
        for chat, path in ((False, "/v1/completions"), (True, "/v1/chat/completions")):
            asked = {"messages": [{"role": "user", "content": ""}]} if chat else {"prompt": ""}
            for text, whole in zip(TEXTS[:4], wanted, strict=True):
                body = asked | {"context": text}
                told = json.loads(ask(port, path, body)[1])["choices"][0]
                assert (told["message"]["content"] if chat else told["text"]) == whole
                code, reply = ask(port, path, body | {"stream": True})
                parts = said(reply, chat)
                assert code == 200 and "".join(parts) == whole and len([part for part in parts if part]) > 2
                assert reply.endswith("data: [DONE]\n\n") and '"finish_reason": "stop"' in reply
            body = asked | {"context": TEXTS[0], "max_tokens": 2}
            short = json.loads(ask(port, path, body)[1])["choices"][0]
            code, reply = ask(port, path, body | {"stream": True})
            assert "".join(said(reply, chat)) == (short["message"]["content"] if chat else short["text"])
            assert '"finish_reason": "length"' in reply
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            bodies = [{"prompt": "", "context": text, "stream": bool(i % 2)} for i, text in enumerate(TEXTS[:4] * 8)]
            replies = [*pool.map(lambda body: ask(port, "/v1/completions", body)[1], bodies)]
    texts = ["".join(said(r, False)) if "data:" in r else json.loads(r)["choices"][0]["text"] for r in replies]
    assert texts == wanted * 8


def test_an_engine_that_stumbles_says_so_in_the_stream(writer, engine):  # noqa: F811
    engine[1].stumbles = True
    with serving(lw.load(writer, vllm=engine[0]), writer) as port:
        code, reply = ask(port, "/v1/completions", {"prompt": "", "context": TEXTS[0], "stream": True})
        assert code == 200 and "[DONE]" not in reply
        assert "out of memory" in reply.splitlines()[-2] and "engine_error" in reply
        engine[1].stumbles, engine[1].broken = False, "no JSON"
        code, reply = ask(port, "/v1/completions", {"prompt": "", "context": TEXTS[0], "stream": True})
        assert code == 502 and "in the midst of an answer" in reply


def test_many_clients_at_once_get_their_own_answers(port, bridge):
    wanted = [answer.text for answer in bridge.answer(bridge.encode(TEXTS))]

    def client(number: int) -> list[str]:
        said = []
        for text in TEXTS[20 * number : 20 * number + 20]:
            code, reply = ask(port, "/v1/completions", {"prompt": "", "context": text})
            assert code == 200, reply
            said.append(json.loads(reply)["choices"][0]["text"])
        return said

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert [text for said in pool.map(client, range(32)) for text in said] == wanted
    metrics = ask(port, "/metrics")[1]
    assert 'latentwire_requests_total{path="/v1/completions",status="200"}' in metrics
    batches = next(line for line in metrics.splitlines() if line.startswith('latentwire_seconds_count{part="answer"}'))
    assert float(batches.split()[1]) < 640, "what waits is answered together"


GOOD = {"prompt": "q", "context": "aabb", "messages": [{"role": "user", "content": "<context>aabb</context>q"}]}
BAD: list[Any] = [
    b"", b"{", b"null", b"[]", b"1", b"\xff\xfe", b'{"a":1,"a":2}', b'{"prompt": NaN}', b"[" * 4000, b"{}",
    {"prompt": "no text"}, {"prompt": 1, "context": "a"}, {"prompt": "", "context": " "}, {"context": "a"},
    {"prompt": "", "context": "a", "n": 2}, {"prompt": "", "context": "a", "max_tokens": 0},
    {"prompt": "", "context": "a", "max_tokens": "many"},
    {"prompt": "", "context": b"\xed\xa0\x80".decode("utf-8", "surrogatepass")},
    {"messages": []}, {"messages": [{"role": "king", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=lambda body: repr(body)[:40])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_requests_are_told_why(path, body, port):
    code, reply = ask(port, path, body)
    error = json.loads(reply)["error"]
    assert code == 400 and error["type"] == "invalid_request_error" and len(error["message"]) > 5


def test_sizes_paths_and_keys(port, bridge, toy_run, monkeypatch):
    assert ask(port, "/v1/completions", {"prompt": "", "context": "a" * 6000})[0] == 413
    assert ask(port, "/v1/nothing", {})[0] == 404 and ask(port, "/v1/completions")[0] == 405
    assert json.loads(ask(port, "/health")[1])["status"] == "ok"
    assert json.loads(ask(port, "/v1/models")[1])["data"][0]["id"] == toy_run.name
    monkeypatch.setenv("LATENTWIRE_API_KEY", "secret")
    for key, code in (("", 401), ("wrong", 401), ("secret", 200)):
        assert ask(port, "/v1/completions", GOOD, key)[0] == code


def test_damaged_requests_never_end_it(port):
    rng, good = random.Random(42), json.dumps(GOOD).encode()
    for _ in range(FUZZ):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data) or 1)
            change = rng.choice(["flip", "cut", "repeat", "insert"])
            if change == "flip" and data:
                data[place] = rng.randrange(256)
            elif change == "cut":
                del data[place : place + rng.randint(1, 30)]
            elif change == "repeat":
                data[place:place] = data[place : place + rng.randint(1, 60)] * rng.randint(1, 8)
            else:
                data[place:place] = rng.choice(
                    [b"\0", b"NaN", b"1e999", b"[[[[", b'"\\ud800"', b"{}", b"null", b"\x1b[31m"]
                )
        code, reply = ask(port, rng.choice(["/v1/completions", "/v1/chat/completions"]), bytes(data))
        assert code in (200, 400, 413), (bytes(data), reply)
    assert ask(port, "/v1/completions", GOOD)[0] == 200


def test_an_engine_that_dies_is_told_and_found_again(toy_run, engine):  # noqa: F811
    url, handler = engine
    bridge = lw.load(toy_run, vllm=url)
    with serving(bridge, toy_run) as port:
        assert ask(port, "/v1/completions", GOOD)[0] == 200
        handler.broken = "gone"
        code, reply = ask(port, "/v1/completions", GOOD)
        assert code == 502 and json.loads(reply)["error"]["type"] == "engine_error"
        handler.broken = ""
        assert ask(port, "/v1/completions", GOOD)[0] == 200


@pytest.mark.slow
def test_a_stopped_gateway_finishes_what_it_began(toy_run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, lw.__file__, "serve", str(toy_run), "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        with contextlib.suppress(OSError):
            if ask(port, "/health")[0] == 200:
                break
        time.sleep(0.2)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        asked = [pool.submit(ask, port, "/v1/completions", {"prompt": "", "context": text}) for text in TEXTS[:32]]
        concurrent.futures.wait(asked, return_when="FIRST_COMPLETED")
        server.send_signal(signal.SIGTERM)
        codes = [reply.result()[0] for reply in asked if not reply.exception()]
    assert codes and set(codes) == {200}
    out, err = server.communicate(timeout=60)
    assert "Traceback" not in err and f"serving {toy_run} at http://127.0.0.1:{port}/v1" in out
