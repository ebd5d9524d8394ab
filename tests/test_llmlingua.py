"""LLMLingua's package on today's transformers against the untouched one on the last version that it runs on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import package_folder

import LATENTWIRE as lw

pytestmark = pytest.mark.slow
pytest.importorskip("llmlingua")

PINS = ("llmlingua==0.2.2", "transformers==4.47.1", "tokenizers==0.21.4", "huggingface_hub==0.36.2")

# Its only change to the package: nothing is downloaded to count tokens for the statistics.
REFERENCE = """
import json, sys
from types import SimpleNamespace
import tiktoken, transformers
assert transformers.__version__ == "4.47.1", transformers.__version__
tiktoken.encoding_for_model = lambda name: SimpleNamespace(encode=str.split)
from llmlingua import PromptCompressor
loaded = {folder: PromptCompressor(folder, "cpu", {"trust_remote_code": False}) for folder in sys.argv[3:]}
with open(sys.argv[1]) as file:
    cases = json.load(file)
found = [loaded[folder].compress_prompt(context, **how)["compressed_prompt"] for folder, context, how in cases]
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""

PROSE = (
    "the river of a small town in winter, its bridge; 1874 and Königsberg were built by many hands that nobody named "
    "while water rose over stone. Engineers (three of them) said: it holds? It held! A year later their letters went "
    "to the museum, where visitors read 'what is lost' in 20 languages"
)
QUESTION = "Who built the bridge?"


def prose(count: int, seed: int = 0) -> str:
    """So many words in random order."""
    return " ".join(random.Random(seed).choices(PROSE.split(), k=count))


LONG, MEDIUM, SHORT = prose(170), prose(45), prose(25)
SEVERAL = [prose(24, seed) for seed in range(1, 8)]
MANY = [prose(7, seed) for seed in range(20, 40)]
ASKED = {"question": QUESTION, "condition_in_question": "after_condition", "rank_method": "longllmlingua"}
COMPARED = {**ASKED, "condition_compare": True}
DYNAMIC = {**COMPARED, "dynamic_context_compression_ratio": 0.3, "reorder_context": "sort"}
CASES = {
    "one_window": (MEDIUM, {}),
    "several_windows": (LONG, {}),
    "odd_windows": (LONG, {"iterative_size": 77}),
    "several_contexts": (SEVERAL, {}),
    "question": (LONG, {**ASKED, "concate_question": False}),
    "question_before": (SEVERAL, {**ASKED, "condition_in_question": "before"}),
    "question_after": (SEVERAL, {**ASKED, "condition_in_question": "after", "context_budget": "+0"}),
    "compared": (LONG, COMPARED),
    "compared_contexts": (SEVERAL, {**COMPARED, "context_budget": "+50"}),
    "dynamic": (SEVERAL, {**DYNAMIC, "iterative_size": 100, "concate_question": False}),
    "dynamic_unasked": (SEVERAL, {"dynamic_context_compression_ratio": 0.3}),
    "ranked_only": (MANY, {**DYNAMIC, "use_token_level_filter": False, "context_budget": "+0"}),
}
RATES = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder of the old packages, made once; whatever else they need is this environment's."""
    return package_folder("llmlingua-reference", PINS)


def save_model(folder: Path, **changes: object) -> Path:
    """A random Llama as both versions of transformers read it."""
    folder.mkdir()
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("e", "r"), ("Ġ", "w"), ("o", "f")]
    tokenizer = lw.byte_tokenizer(("<pad>", "<bos>", "<eos>"), merges, add_bos=True)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, _ = lw.random_model("LlamaConfig", 5, tokenizer, **sizes)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0} | changes))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model, and the same with positions for half of the long text: keys and values are thrown away on the way."""
    base = tmp_path_factory.mktemp("models")
    return {"wide": save_model(base / "wide"), "narrow": save_model(base / "narrow", max_position_embeddings=300)}


@pytest.fixture(scope="module")
def compressors(folders):
    """Ours, around loaded models."""
    settings = lw.ModelSettings(device="cpu", dtype="float32")
    return {name: lw.prompt_compressor(lw.load_lm(str(path), settings, True)) for name, path in folders.items()}


def all_cases() -> dict[str, tuple[str, str | list[str], dict[str, object]]]:
    """Every case at every rate, the narrow model's, and a short text that only ours compresses."""
    found = {
        f"{name}-{rate}": ("wide", text, {"rate": rate, **how}) for name, (text, how) in CASES.items() for rate in RATES
    }
    found |= {f"narrow-{rate}": ("narrow", LONG, {"rate": rate, "iterative_size": 100}) for rate in RATES}
    found |= {
        f"narrow_asked-{rate}": ("narrow", LONG, {"rate": rate, **COMPARED, "iterative_size": 60}) for rate in RATES
    }
    return found | {"short": ("wide", SHORT, {"rate": 0.25})}


@pytest.fixture(scope="module")
def expected(packages, folders, tmp_path_factory) -> dict[str, str]:
    """What the untouched package says to every case."""
    base, cases = tmp_path_factory.mktemp("reference"), all_cases()
    asked, told = base / "cases.json", base / "found.json"
    asked.write_text(json.dumps([(str(folders[model]), text, how) for model, text, how in cases.values()]))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFERENCE, asked, told, *folders.values()],
        env={**os.environ, "PYTHONPATH": str(packages)}, check=True, cwd=base,
    )  # fmt: skip
    return dict(zip(cases, json.loads(told.read_text()), strict=True))


@pytest.mark.parametrize("case", [case for case in all_cases() if case != "short"])
def test_equals_the_untouched_package(case, expected, compressors):
    model, text, how = all_cases()[case]
    found = compressors[model].compress_prompt(text, **how)["compressed_prompt"]
    assert found == expected[case]


def test_cases_differ(expected):
    """No case is trivial: what comes out is shorter than what went in, and every rate says something else."""
    for case, (_, text, how) in all_cases().items():
        whole = "\n\n".join([text] if isinstance(text, str) else text)
        assert case == "short" or 0 < len(expected[case]) < len(whole) + len(str(how.get("question", ""))), case
    for name in CASES:
        assert len({expected[f"{name}-{rate}"] for rate in RATES}) == 3, name


def test_short_prompts_are_compressed(expected, compressors):
    """The package returns a prompt shorter than its window all but as it is (its issue 196); ours does not."""
    _, text, how = all_cases()["short"]
    assert len(expected["short"]) >= len(text) - 3
    tokenizer = compressors["wide"].tokenizer
    count = len(tokenizer(text, add_special_tokens=False).input_ids)
    assert 100 < count < 200
    found = compressors["wide"].compress_prompt(text, **how)["compressed_prompt"]
    assert 0.15 < len(tokenizer(found, add_special_tokens=False).input_ids) / count < 0.35


@pytest.mark.parametrize("count", [150, 401, 402, 403, 605, 606])
def test_equal_windows_leave_no_window_whole(compressors, count):
    compressor = compressors["wide"]
    tokenizer = compressor.tokenizer
    text = tokenizer.decode(tokenizer(LONG, add_special_tokens=False).input_ids[:count])
    found = compressor.compress_prompt(text, rate=0.25, iterative_size=0)["compressed_prompt"]
    assert 0.18 < len(tokenizer(found, add_special_tokens=False).input_ids) / count < 0.32


def test_a_text_read_before_compresses_the_same(folders, compressors):
    lm = lw.load_lm(str(folders["wide"]), lw.ModelSettings(device="cpu", dtype="float32"), True)
    for rate in RATES:
        how = {"rate": rate, **DYNAMIC, "iterative_size": 0}
        fresh, again = lw.prompt_compressor(lm), [compressors["wide"].compress_prompt(SEVERAL, **how) for _ in range(2)]
        assert [found["compressed_prompt"] for found in again] == [
            fresh.compress_prompt(SEVERAL, **how)["compressed_prompt"]
        ] * 2


def test_selective_writes_a_shared_character_once(folders):
    lm = lw.load_lm(str(folders["wide"]), lw.ModelSettings(device="cpu", dtype="float32"), True)
    contest = SimpleNamespace(
        speaker=lm, asked=SimpleNamespace(compressor=None), receiver_of=lambda role: SimpleNamespace(lm=lm)
    )
    text = "北京市 and 🎻 of Königsberg"
    found = lw.Selective(contest).compress(lw.Example("1", text, "", ("",)), len(lm.ids(text)) - 3)
    left = iter(text)
    assert 0 < len(found) < len(text) and all(character in left for character in found), found
