"""The file alone, in an empty folder, does the job."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def alone(tmp_path):
    shutil.copy(ROOT / "LATENTWIRE.py", tmp_path)

    def run(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, "LATENTWIRE.py", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.mark.trains
def test_tiny_train_and_eval_end_well_in_a_minute(alone, tmp_path):
    started = time.monotonic()
    train = (
        "--sender",
        "tiny-llama",
        "--receiver",
        "tiny-qwen",
        "--dataset",
        "toy",
        "--steps",
        "60",
        "--output_dir",
        "r",
    )
    for words in (("train", *train), ("eval", "--checkpoint", "r")):
        done = alone(*words)
        assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert "communication shown" in done.stdout and "another text's latents" in done.stdout
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "config.json", "env.json", "source.py", "diagnostics.jsonl", "checkpoint", "preempt_checkpoint", "DONE",
        "records.jsonl", "evaluation.json", "results.json", "details.json", "artifacts.safetensors",
        }  # fmt: skip


@pytest.mark.trains
@pytest.mark.slow
def test_test_command_checks_itself_where_there_are_no_tests(alone):
    done = alone("test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed:") == 4 and "communication shown" in done.stdout


def test_pipe_output_is_plain_text(alone):
    assert "\x1b[" not in alone("list").stdout + alone("train", "--help").stdout
