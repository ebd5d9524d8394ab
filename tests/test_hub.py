"""§10, §16: a bridge goes to the hub and comes back; the hub is on this machine, the client the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import LATENTWIRE as lw

TEXTS = ["aabawzaxya", "ccxcwcczcy", "wdxddydddz"]


class Hub(BaseHTTPRequestHandler):
    """Repositories, commits and files as the hub's API has them; each commit keeps all files."""

    commits: dict[str, dict[str, bytes]]
    heads: dict[str, str]

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def reply(self, value: Any, code: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self) -> None:
        self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else b"".join(self.chunks())
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.reply({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.reply({"url": f"http://{self.headers['Host']}/you/bridge", "name": "you/bridge"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            rows = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = dict(self.commits.get(self.heads.get(repo, ""), {}))
            files |= {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            self.commits[oid], self.heads[repo] = files, oid
            self.reply(
                {
                    "success": True,
                    "commitOid": oid,
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}",
                    "hookOutput": "",
                }
            )
        else:
            self.missing()

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def do_GET(self) -> None:
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?(\?.*)?", self.path):
            repo, kind, revision = info[1], info[2], info[3] or "main"
            oid = self.heads.get(repo) if revision == "main" else revision
            if oid not in self.commits:
                self.missing()
                return
            files = self.commits[oid]
            tree = [
                {"type": "file", "path": n, "oid": hashlib.sha1(d).hexdigest(), "size": len(d)}
                for n, d in files.items()
            ]
            self.reply(
                tree if kind == "tree" else {"id": repo, "sha": oid, "siblings": [{"rfilename": n} for n in files]}
            )
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            data = self.commits.get(self.heads[file[1]] if file[2] == "main" else file[2], {}).get(file[3])
            if data is None:
                self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.reply(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=file[2])
        else:
            self.missing()

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A hub, and a command that runs with it."""
    handler = type("Here", (Hub,), {"commits": {}, "heads": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hidden = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"}
    env = {name: value for name, value in os.environ.items() if name not in hidden and "proxy" not in name.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_good",
            "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, lw.__file__, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=env | more, check=False, timeout=300
        )

    yield SimpleNamespace(run=run, files=lambda: handler.commits[handler.heads["you/bridge"]], heads=handler.heads)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_pushed_bridge_comes_back_with_the_same_bits(toy_run, hub, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    lw.evaluate(run, methods=["bridge", "control"], num_samples=24)
    pushed = hub.run("push", run, "you/bridge")
    assert pushed.returncode == 0, pushed.stderr
    assert f"you/bridge@{hub.heads['you/bridge']}" in pushed.stdout
    assert {Path(name).suffix for name in hub.files()} == {".safetensors", ".json", ".md"}, "no code"
    card = hub.files()["README.md"].decode()
    results = json.loads((run / "results.json").read_text())
    assert results["verdict"] in card and "another text's latents" in card and 'load("you/bridge")' in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "latentwire"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for place in (run, "you/bridge", f"you/bridge@{hub.heads['you/bridge']}"):
        out = tmp_path / f"{str(place)[-5:]}.jsonl"
        done = hub.run("encode", "t.jsonl", "--checkpoint", place, "-o", out)
        assert done.returncode == 0, done.stderr
    made = [(tmp_path / f"{end}.jsonl").read_bytes() for end in (str(run)[-5:], "ridge", hub.heads["you/bridge"][-5:])]
    assert made[0] == made[1] == made[2]
    refused = hub.run("eval", "--checkpoint", "you/bridge")
    assert refused.returncode == 2 and "--output_dir" in refused.stderr


def test_a_card_names_published_data_for_leaderboards(toy_run, tmp_path, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "card"
    shutil.copytree(toy_run, run)
    lw.evaluate(run, methods=["bridge", "control"], num_samples=24)
    folder.mkdir()
    monkeypatch.setattr(lw.Toy, "hub", ("someone/toy",))
    lw.write_card(lw.Checkpoint.open(run), lw.PushSettings(run=run, repo="you/bridge"), folder)
    results = json.loads((run / "results.json").read_text())
    score = round(100 * results["methods"]["bridge"]["accuracy"], 2)
    [entry] = yaml.safe_load((folder / ".eval_results" / "toy.yaml").read_text())
    assert entry["dataset"]["id"] == "someone/toy" and entry["value"] == score
    index = yaml.safe_load((folder / "README.md").read_text().split("---")[1])["model-index"]
    assert index[0]["results"][0]["metrics"][0]["value"] == score


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line(toy_run, hub):
    for words, more, phrase in (
        (("push", toy_run, "you/bridge"), {"HF_TOKEN": "hf_bad"}, "HF_TOKEN"),
        (("push", toy_run, "bridge"), {}, "OWNER/NAME"),
        (("push", "nowhere", "you/bridge"), {}, "nowhere"),
        (("answer", toy_run / "DONE", "--checkpoint", "you/none"), {}, "the hub gives none either"),
    ):
        done = hub.run(*words, **more)
        assert done.returncode == 2 and phrase in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
