"""What all tests share: no network, an own cache, one thread, and one trained toy run that is never written to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurmbox import PACKAGES, SlurmBox

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("LATENTWIRE_DATA", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

POLICY = """
function slurm_job_submit(job, partitions, user)
  if job.account ~= "marlowe-m000066" then return slurm.ESLURM_INVALID_ACCOUNT end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user) return slurm.SUCCESS end
return slurm.SUCCESS
"""

KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentwire" / "tests"
"""What takes long to make, from one session to the next."""
TOY = ("--sender", "tiny-llama", "--receiver", "tiny-qwen", "--dataset", "toy", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="session", autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cached states go to a session folder, dense copies of GGUF files are made once; the two shared cores stay usable."""
    cache = str(tmp_path_factory.mktemp("cache"))
    os.environ["LATENTWIRE_CACHE"] = cache
    import torch

    import LATENTWIRE as lw

    torch.set_num_threads(1)
    plain = lw.gguf_to_dense

    def kept(pieces: Any, name: str, sha256: str | None = None) -> Path:
        if not sha256 or os.environ["LATENTWIRE_CACHE"] != cache:  # another file, or a test of the cache itself
            return plain(pieces, name, sha256)
        os.environ["LATENTWIRE_CACHE"] = str(KEPT)
        try:
            return plain(pieces, name, sha256)
        finally:
            os.environ["LATENTWIRE_CACHE"] = cache

    lw.gguf_to_dense = kept


LONG = ("test_slurm_training", "test_models", "test_survival", "test_devices", "test_paper")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's state as if it had been written so."""
    import LATENTWIRE as lw

    path = folder / "state.json"
    state = json.loads(path.read_text())
    del state["digest"]
    change(state)
    path.write_text(json.dumps({**state, "digest": lw.digest_of(state)}))


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished tiny-llama → tiny-qwen run on toy, 60 steps. Read-only: copy it to change it."""
    import LATENTWIRE as lw

    folder = tmp_path_factory.mktemp("toy") / "run"
    lw.train_main([*TOY, "--steps", "60", "--width", "64", "--lr", "1e-3", "--output_dir", str(folder)])
    before = contents(folder)
    yield folder
    assert contents(folder) == before, "a test wrote into the shared toy_run; it must work on a copy"


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random one-layer BERT that reads bytes."""
    import torch
    from transformers import BertConfig, BertModel

    import LATENTWIRE as lw

    folder = tmp_path_factory.mktemp("sentences")
    tokenizer = lw.byte_tokenizer(("<pad>", "<bos>", "<eos>"), [("t", "h")], add_bos=False)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def box() -> Iterator[SlurmBox]:
    """Two nodes of 8 CPUs and 4 pretended GPUs; the account must be right."""
    if SlurmBox.missing():
        pytest.skip(f"no SLURM here ({', '.join(SlurmBox.missing())}): apt-get install {PACKAGES}")
    with SlurmBox(nodes=2, extra="JobSubmitPlugins=lua\n", files={"job_submit.lua": POLICY}) as running:
        yield running


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must succeed quietly; → what it printed."""
    import LATENTWIRE as lw

    def run(*words: Any) -> str:
        code = lw.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), words
        return out

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused with exit code 2; → its one line on stderr."""
    import LATENTWIRE as lw

    def run(*words: Any) -> str:
        code = lw.main([str(word) for word in words])
        line = capsys.readouterr().err
        assert code == 2, words
        assert re.fullmatch(r"error: \S.*\n", line), line
        assert "Traceback" not in line
        return line

    return run


def package_folder(name: str, pins: tuple[str, ...]) -> Path:
    """A folder with other versions of packages, made once; whatever else they need is this environment's."""
    folder = KEPT / name / f"{sys.implementation.cache_tag}-{hashlib.sha256(repr(pins).encode()).hexdigest()[:12]}"
    done = folder / "complete"
    if not done.is_file():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--retries", "1", "--timeout", "20"]
        made = subprocess.run([*command, "--upgrade", "--target", folder, *pins], capture_output=True, text=True)
        if made.returncode:
            why = (made.stderr.strip() or "pip failed").splitlines()[-1]
            pytest.skip(f"{', '.join(pins)} cannot be had: {why}")
        done.touch()
    return folder


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Both cores, for real models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
