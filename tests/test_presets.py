"""Presets, the documents' configuration files, overrides, experiments from a file, and latents against text."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_papers import PAPERS

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
Say = Callable[..., str]
SMOKE = {
    "dataset": "squad", "samples": 160, "epochs": 2.0, "batch_size": 8, "latent_len": 32, "d_z": 256, "adapter": "mlp",
    "hidden_mult": 2, "first_token_ce_weight": 0.5, "k_token_ce_weight": 0.5, "kd_weight": 0.0, "lr": 1e-4,
    "encoder": "byte", "append_bos_after_prefix": "yes",
}  # fmt: skip
PRESETS = {
    "smoke-base": SMOKE,
    "smoke-lora": SMOKE | {"use_lora": True, "lora_r": 8, "lora_alpha": 16.0, "lora_target_modules": ["attn_firstN:12"]},
    "smoke-prefix": SMOKE | {"use_prefix": True, "prefix_tokens": 16, "prefix_projection": True},
    "smoke-deep_prefix": SMOKE | {"use_deep_prefix": True, "deep_prefix_len": 32},
    "smoke-latent_adapters": SMOKE | {"use_latent_adapters": True, "latent_adapter_layers": ["0.25", "0.5", "0.75"]},
    "smoke-coprocessor": SMOKE | {"use_coprocessor": True, "coprocessor_len": 2},
    "smoke-gist_head": SMOKE | {"use_gist_head": True, "gist_weight": 0.1},
    "smoke-refiner": SMOKE | {"use_latent_refiner": True, "latent_refiner_layers": 2},
    "minimal": {"dataset": "squad", "samples": 1000, "epochs": 1.0, "batch_size": 8, "latent_len": 32},
    "wire-small": {"dataset": "squad", "latent_len": 16, "d_z": 32, "codec": "int4", "quantize_from": 0.8},
    "mixed": {
        "dataset": "squad", "encoder": "hidden", "layers": ["0.3", "0.6"], "pooler": "mixed", "ratio": [4.0], "init": "copy",
        "adapter": "mlp", "d_z": 64, "codec": "int4", "max_tokens": 384, "protocol": "question-shared",
    },
    "notes": {
        "dataset": "notes", "encoder": "hidden", "layers": ["0.3", "0.6"], "pooler": "mixed", "ratio": [4.0], "run_words": 4,
        "init": "copy", "adapter": "mlp", "d_z": 32, "codec": "fsq4", "protocol": "question-agnostic", "samples": 800,
        "val_samples": 40, "steps": 50, "lr": 2e-3, "batch_size": 16, "eval_every": 50,
    },
    "hero": {
        "dataset": "squad", "samples": 87599, "epochs": 24.0, "batch_size": 64, "latent_len": 32, "d_z": 256,
        "encoder": "byte", "lr": 1e-4, "warmup_steps": 500, "first_token_ce_weight": 0.5, "k_token_ce": 4, "kd_tau": 1.0,
        "calibration": "embed_rms", "anchor_text": "Answer: ", "append_bos_after_prefix": "yes", "eval_samples": 200,
        "eval_seeds": [42, 123, 456],
    },
}  # fmt: skip
FULL = """{"dataset": "squad", "samples": 87599, "epochs": 24, "batch_size": 64, "latent_len": 32, "d_z": 256,
  "encoder_type": "byte", "lr": 1e-4, "warmup_steps": 500, "first_token_ce_weight": 0.5, "k_token_ce": 4, "kd_tau": 1.0,
  "calibration": "embed_rms", "anchor_text": "Answer: ", "append_bos_after_prefix": true, "eval_samples": 200,
  "eval_seeds": [42, 123, 456]}"""
MODEL = """{"source_model": "meta-llama/Meta-Llama-3.1-8B-Instruct", "target_model": "Qwen/Qwen2.5-7B-Instruct",
  "calibration": "embed_rms", "anchor_text": "Answer: ", "append_bos_after_prefix": true, "first_token_top_p": 0.95,
  "first_token_temperature": 0.7, "eos_ban_steps": 4}"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in lw.SCRIPT_LISTS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line that must be refused; → its one line on stderr."""

    def run(*words: Any) -> str:
        assert lw.main([str(word) for word in words]) == 2, words
        out, line = capsys.readouterr()
        assert not out
        assert re.fullmatch(r"error: \S.*\n", line), line
        return line

    return run


def given(*words: Any, kind: type[lw.Settings] = lw.TrainSettings) -> dict[str, Any]:
    """The settings that words say, those at their default left out."""
    settings, _ = lw.settings_from(kind, [str(word) for word in words])
    return settings.model_dump(mode="json", exclude_defaults=True)


def changed(values: dict[str, Any], kind: type[lw.Settings] = lw.TrainSettings) -> dict[str, Any]:
    """``values`` without those that are the default."""
    return {name: value for name, value in values.items() if kind.fields()[name].default != value}


def write(name: str, value: Any) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def runs(say: Say, *words: Any) -> dict[str, lw.TrainSettings]:
    """An experiment's planned runs by folder, from the commands that its dry run prints."""
    found = {}
    for line in say("experiment", *words, "--dry_run").splitlines():
        if " && " not in line:
            continue
        train, evaluate = (shlex.split(part, comments=True)[2:] for part in line.split(" && "))
        settings, _ = lw.settings_from(lw.TrainSettings, train[1:])
        assert lw.settings_from(lw.EvalSettings, evaluate[1:])[0].checkpoint == settings.output_dir
        found[str(settings.output_dir).removeprefix("runs/")] = settings
    return found


# ---- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values"), PRESETS.items())
def test_a_preset_is_the_documents_configuration(name, values, say):
    assert given("--preset", name) == changed(values)
    shown = json.loads(say("train", "--preset", name, "--dry_run", "full"))
    assert {key: shown[key] for key in values} == values
    assert f"preset {name}\n" in say("show", name)
    assert f"  dataset: {values.get('dataset', 'squad')}\n" in say("show", name)
    assert f"  {name}" in say("list", "presets")


def test_every_preset_is_in_the_table_and_fits_its_command():
    assert {*lw.PRESETS} == {*PRESETS, "embedding-baselines", *PAPERS}
    assert given("--preset", "embedding-baselines", kind=lw.EvalSettings) == {
        "methods": ["embed:raw", "embed:anchor", "embed:adapter"]
    }


def test_text_about_presets_needs_no_torch():
    for words in (["list", "presets"], ["show", "smoke-lora"], ["compare", "--help"]):
        command = [sys.executable, "-X", "importtime", str(ROOT / "LATENTWIRE.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout
        assert not re.search(r"\| +torch$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", 5e-4),
        ("--preset smoke-base", 1e-4),
        ("--preset smoke-base --config c.json", 2e-4),
        ("--config c.json --preset smoke-base", 2e-4),
        ("--preset smoke-base --config c.json --override lr=3e-4", 3e-4),
        ("--lr 4e-4 --preset smoke-base --config c.json --override optimizer.lr=3e-4", 4e-4),
    ],
)
def test_defaults_preset_file_override_flag(words, value, say):
    write("c.json", {"lr": 2e-4})
    assert json.loads(say("train", *words.split(), "--dry_run", "full"))["lr"] == value
    assert lw.train_main([*words.split(), "--dry_run"])["lr"] == value


def test_a_preset_beats_the_suite_of_the_command(say):
    shown = json.loads(say("demo", "--preset", "minimal", "--dry_run", "full"))
    assert (shown["dataset"], shown["epochs"], shown["steps"], shown["lr"]) == ("squad", 1.0, None, 1e-3)


@pytest.mark.parametrize(
    "words", ["--steps 5", "--override steps=5", "--config c.json", "--config c.json --override epochs=1 --steps 5"]
)
def test_a_higher_layer_replaces_the_rival_of_a_lower_one(words):
    write("c.json", {"steps": 5})
    assert {"steps": 5}.items() <= given("--preset", "smoke-base", *words.split()).items()
    assert "epochs" not in given("--preset", "smoke-base", *words.split())


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--override lora.r=16 use_lora=yes", {"lora_r": 16, "use_lora": True}),
        ("--override lora.r=16 --override features.use_lora=true", {"lora_r": 16, "use_lora": True}),
        ("--override=lora_r=16 --override=lora_r=32", {"lora_r": 32}),
        ("--override layers=1,2 --seed 7", {"layers": ["1", "2"], "seed": 7}),
        ("--override system.data.dataset=sst2", {"dataset": "sst2"}),
        ("--hero --seed 3", changed(PRESETS["hero"]) | {"seed": 3}),
        ("--preset smoke-base --hero", changed(PRESETS["hero"])),
        ("--preset minimal --hero no", changed(PRESETS["minimal"])),
    ],
)
def test_override_and_hero(words, values, say):
    assert given(*words.split()) == values
    shown = json.loads(say("train", *words.split(), "--dry_run", "full"))
    assert {name: shown[name] for name in values} == values


def test_an_override_keeps_its_spaces_commas_and_equals_signs(say):
    words = ("--override", "anchor_text=a = b, c ", "tag=x")
    assert given(*words) == {"anchor_text": "a = b, c ", "tag": "x"}
    assert json.loads(say("train", *words, "--dry_run", "full"))["anchor_text"] == "a = b, c "


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        ("--preset smoke-lara", ("unknown preset 'smoke-lara'", "did you mean 'smoke-lora'?")),
        ("--preset embedding-baselines", ("'methods'", "preset embedding-baselines")),
        ("--config configs/smoke/lara.json", ("configs/smoke/lara.json not found",)),
        ("--override lora.q=1", ("'lora.q'", "--override")),
        ("--override lora_r", ("'lora_r' is not key=value", "lora.r=16")),
        ("--override =3", ("key=value",)),
        ("--override lr=fast", ("--lr", "'fast'")),
        ("--override latent_len=8 soft_tokens=9", ("latent_len", "twice")),
        ("--override", ("--override needs a value",)),
        ("--hreo", ("did you mean 'hero'?",)),
    ],
)
def test_a_wrong_preset_or_override_is_one_line(words, phrases, refuse):
    line = refuse("train", *words.split(), "--dry_run")
    for phrase in phrases:
        assert phrase in line


# ---- configuration files -------------------------------------------------------------------------------------------


def test_the_documents_paths_name_presets_until_a_file_is_there(say):
    for name in PRESETS:
        if name.startswith("smoke-"):
            assert given("--config", f"configs/smoke/{name[6:]}.json") == given("--preset", name)
    words = shlex.split("--config configs/smoke/lora.json --use_lora --lora_r 16 --lora_alpha 32")
    shown = json.loads(say("latentwire/train.py", *words, "--dry_run", "full"))
    assert (shown["lora_r"], shown["lora_alpha"], shown["dataset"]) == (16, 32.0, "squad")
    write("configs/smoke/lora.json", {"dataset": "sst2"})
    assert given("--config", "configs/smoke/lora.json") == {"dataset": "sst2"}
    shown = json.loads(say("eval", "--config", "configs/baseline/embedding_baselines.json", "--dry_run"))
    assert shown["methods"] == ["embed:raw", "embed:anchor", "embed:adapter"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (FULL, PRESETS["hero"]),
        (json.dumps({name: value for name, value in json.loads(FULL).items() if name not in (
            "calibration", "anchor_text", "append_bos_after_prefix", "eval_samples", "eval_seeds")}),
         {name: value for name, value in PRESETS["hero"].items() if name not in (
             "calibration", "anchor_text", "append_bos_after_prefix", "eval_samples", "eval_seeds")}),
        (MODEL, {"sender": "meta-llama/Meta-Llama-3.1-8B-Instruct", "receiver": "Qwen/Qwen2.5-7B-Instruct",
                 "anchor_text": "Answer: ", "append_bos_after_prefix": "yes", "first_token_top_p": 0.95,
                 "first_token_temperature": 0.7, "eos_ban_steps": 4}),
        (json.dumps({"dataset": "squad", "samples": 1000, "epochs": 1, "batch_size": 8, "latent_len": 32}),
         PRESETS["minimal"]),
        ("append_bos_after_prefix: no\n", {"append_bos_after_prefix": "no"}),
        ("append_bos_after_prefix: auto\n", {}),
    ],
    ids=["full", "training", "model", "minimal", "yaml-no", "yaml-auto"],
)  # fmt: skip
def test_the_documents_files_load(text, values):
    assert given("--config", write("c.json", text)) == changed(values)


@pytest.mark.parametrize(
    ("tree", "values"),
    [
        ({"lora": {"r": 4, "alpha": 8, "dropout": 0.5}}, {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.5}),
        ({"prefix": {"tokens": 4, "projection": True}}, {"prefix_tokens": 4, "prefix_projection": True}),
        ({"deep_prefix": {"len": 4, "dropout": 0.5}}, {"deep_prefix_len": 4, "deep_prefix_dropout": 0.5}),
        ({"deep_prefix": {"prefix_len": 4}}, {"deep_prefix_len": 4}),
        (
            {"latent_adapters": {"layers": "4,8,12", "heads": 8}},
            {"latent_adapter_layers": ["4", "8", "12"], "latent_adapter_heads": 8},
        ),
        ({"coprocessor": {"len": 2, "width": 64}}, {"coprocessor_len": 2, "coprocessor_width": 64}),
        ({"gist": {"weight": 0.1, "target_len": 24}}, {"gist_weight": 0.1, "gist_target_len": 24}),
        ({"gist": {"use_gist_head": True}}, {"use_gist_head": True}),
        ({"refiner": {"layers": 3, "heads": 2}}, {"latent_refiner_layers": 3, "latent_refiner_heads": 2}),
        ({"latent_refiner": {"layers": 3}}, {"latent_refiner_layers": 3}),
        ({"encoder": {"type": "byte", "d_z": 32}}, {"encoder": "byte", "d_z": 32}),
        ({"adapter": {"adapter_hidden_mult": 2, "scale_l2": 0.5}}, {"hidden_mult": 2, "scale_weight": 0.5}),
        ({"adapter": {"hidden_mult": 2, "film": True}}, {"hidden_mult": 2, "film": True}),
        ({"data": {"samples": 160}, "evaluation": {"samples": 5}}, {"samples": 160, "eval_samples": 5}),
        ({"optimizer": {"lr": 1e-4, "max_grad_norm": 2.0}}, {"lr": 1e-4, "clip": 2.0}),
        ({"losses": {"k_ce_weight": 0.25, "kd_first_k_weight": 1.0}}, {"k_token_ce_weight": 0.25, "kd_weight": 1.0}),
        ({"a": {"lora": {"r": 4}}}, {"lora_r": 4}),
        ({"lora.r": 4}, {"lora_r": 4}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_section_says_which_setting_its_key_is(tree, values):
    assert given("--config", write("c.json", tree)) == values


@pytest.mark.parametrize(
    ("tree", "phrases"),
    [
        ({"lora": {"rank_of": 4}}, ("'lora.rank_of'", "config file c.json")),
        ({"optimizer": {"lrr": 4}}, ("'optimizer.lrr'", "did you mean 'lr'?")),
        ({"coprocessor": {"dropout": 0.5}}, ("'coprocessor.dropout'",)),
        ({"prefix": {"len": 4}}, ("'prefix.len'",)),
        ({"lora": {"r": 4}, "features": {"lora_r": 4}}, ("lora_r", "twice")),
        ({"latent_len": 4, "encoder": {"soft_tokens": 4}}, ("latent_len", "twice")),
        ({"append_bos_after_prefix": "maybe"}, ("--append_bos_after_prefix", "'maybe'")),
        ({"base_config": "smoke-base"}, ("'base_config'",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_key_in_a_section_is_one_line(tree, phrases, refuse):
    line = refuse("train", "--config", write("c.json", tree), "--dry_run")
    for phrase in phrases:
        assert phrase in line


def test_eval_seeds_have_nothing_to_do_in_one_training():
    notes = list(lw.notes_on(lw.TrainSettings(eval_seeds=[1, 2])))
    assert len(notes) == 1 and "--eval_seeds" in notes[0] and "--seeds" in notes[0]


def test_a_tag_stands_in_the_default_folder():
    plain, tagged = lw.TrainSettings(dataset="toy"), lw.TrainSettings(dataset="toy", tag="a/b")
    assert lw.run_folder(plain) == Path("runs") / f"toy-{plain.digest()}"
    assert lw.run_folder(tagged) == Path("runs") / f"toy-a_b-{plain.digest()}"


@pytest.mark.parametrize("spelling", ["--print-argv", "--print_argv"])
@pytest.mark.parametrize(
    "words", ["--hero", "--preset smoke-lora --lr 1 --no-bf16 --layers -1 -4", "--bf16 --anchor_text a --resume"]
)
def test_print_argv_is_one_line_that_says_the_same(words, spelling, say):
    line = say("train", *words.split(), spelling)
    assert line.count("\n") == 1
    program = shlex.split(line)
    assert program[:1] == ["python"] and program[2] == "train"
    assert lw.settings_from(lw.TrainSettings, program[3:])[0] == lw.settings_from(lw.TrainSettings, words.split())[0]


# ---- experiments ---------------------------------------------------------------------------------------------------

ABLATION = {
    "base_config": "configs/smoke/base.json",
    "base_overrides": ["optimizer.lr=2e-4"],
    "runs": [
        {"name": "baseline", "overrides": {}},
        {"name": "deep", "overrides": {"features.use_deep_prefix": True, "deep_prefix.deep_prefix_len": 16}},
        {"name": "lora", "overrides": ["use_lora=true", "lora.r=4"]},
    ],
    "sweeps": {"losses.first_token_ce_weight": [0.3, 0.7], "encoder.latent_len": [8, 16]},
}


def test_an_experiment_from_a_file(say):
    found = runs(say, "--name", "a", "--config", write("ablation.json", ABLATION))
    grid = [f"a/first_token_ce_weight{w}-latent_len{k}" for w in (0.3, 0.7) for k in (8, 16)]
    assert list(found) == ["a/baseline", "a/deep", "a/lora", *grid]
    assert all((run.dataset, run.lr, run.hidden_mult) == ("squad", 2e-4, 2) for run in found.values())
    deep, lora = found["a/deep"], found["a/lora"]
    assert (deep.use_deep_prefix, deep.deep_prefix_len, deep.use_lora) == (True, 16, False)
    assert (lora.use_lora, lora.lora_r, lora.use_deep_prefix) == (True, 4, False)
    assert [(found[name].first_token_ce_weight, found[name].latent_len) for name in grid] == [
        (0.3, 8), (0.3, 16), (0.7, 8), (0.7, 16)]  # fmt: skip


def test_what_is_typed_beats_the_file_of_an_experiment(say):
    path = write("ablation.json", {key: value for key, value in ABLATION.items() if key != "runs"})
    found = runs(say, "--config", path, "--override", "lr=1", "--latent_len", "4", "--seeds", "1,2")
    assert list(found) == [f"experiment/first_token_ce_weight{w}/seed{s}" for w in (0.3, 0.7) for s in (1, 2)]
    assert all((run.latent_len, run.lr) == (4, 1.0) for run in found.values())


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        ("--preset smoke-lora", ["experiment"]),
        ("--preset smoke-base --latent_len 8,16", ["experiment/latent_len8", "experiment/latent_len16"]),
        ("--hero", [f"experiment/seed{seed}" for seed in (42, 123, 456)]),
        ("--hero --seed 5", ["experiment"]),
        ("--hero --seeds 1,2", ["experiment/seed1", "experiment/seed2"]),
        ("--hero --config swept.json", ["experiment/seed7", "experiment/seed8"]),
        ("--config seeds.json --name n --dataset toy", ["n/seed3", "n/seed4"]),
        ("--config seeds.json --preset hero", ["experiment/seed3", "experiment/seed4"]),
    ],
)
def test_an_experiment_takes_presets_and_seeds_from_below(words, folders, say):
    write("seeds.json", {"seeds": [3, 4]})
    write("swept.json", {"sweeps": {"seed": [7, 8]}})
    found = runs(say, *words.split())
    assert list(found) == folders
    assert not any(run.seeds or run.eval_seeds for run in found.values())
    if "seeds.json" not in words or "preset" in words:
        assert {run.dataset for run in found.values()} == {"squad"}


def test_eval_samples_are_the_test_rows_of_an_experiment(say):
    assert " --num_samples=200 " in say("experiment", "--hero", "--seed", "1", "--dry_run")
    assert " --num_samples=9 " in say("experiment", "--hero", "--seed", "1", "--num_samples", "9", "--dry_run")


@pytest.mark.parametrize(
    ("tree", "phrases"),
    [
        ({"runs": [{"overrides": {}}]}, ('"name"', "config file a.json")),
        ({"runs": {"name": "a"}}, ('"name"',)),
        ({"runs": 5}, ('"name"',)),
        ({"sweeps": [1]}, ("sweeps like",)),
        ({"sweeps": {"latent_lem": [1]}}, ("'latent_lem'", "did you mean 'latent_len'?")),
        ({"sweeps": {"latent_len": [8, "many"]}}, ("--latent_len", "'many'")),
        ({"base_config": "no.json"}, ("no.json not found",)),
        ({"base_overrides": "lr"}, ("'lr' is not key=value",)),
        ({"base_overrides": 5}, ("'5' is not key=value",)),
        ({"runs": [{"name": "a", "overrides": {"lorra.r": 1}}]}, ("'lorra.r'", "run a")),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, ("same name",)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_wrong_experiment_file_is_one_line(tree, phrases, refuse):
    line = refuse("experiment", "--config", write("a.json", tree), "--dry_run")
    for phrase in phrases:
        assert phrase in line


def runs_only(dry: str) -> str:
    """The lines of a dry run that are runs, without those that put them together."""
    return "\n".join(line for line in dry.splitlines() if " && " in line)


@pytest.mark.slow
def test_the_single_model_script_reads_its_lists(say, monkeypatch):
    script = "scripts/run_llama_single.sh"
    same = say("experiment", "--name", "llama_single", "--preset", "smoke-base", "--dry_run")
    assert runs_only(say(script, "--dry_run")) == runs_only(same)
    monkeypatch.setenv("LATENT_LEN_LIST", "32,48,64")
    monkeypatch.setenv("D_Z_LIST", "256,384")
    folders = [f"runs/llama_single/latent_len{k}-d_z{d}" for k in (32, 48, 64) for d in (256, 384)]
    assert re.findall(r"--output_dir=(\S+)", runs_only(say(script, "--dry_run"))) == folders
    assert re.findall(r"--output_dir=(\S+)", runs_only(say(script, "--latent_len", 8, "--dry_run"))) == [
        "runs/llama_single/d_z256", "runs/llama_single/d_z384"]  # fmt: skip
    for other in ("experiment", "scripts/run_pipeline.sh"):
        assert runs_only(say(other, "--dry_run")).count("\n") == 0
    assert say(script, "--hero", "--seed", 1, "--dry_run").count("--samples=87599") == 6


def test_a_submitted_preset_keeps_its_data_set(say):
    assert "--dataset sst2" not in say("slurm", "--job", "training", "--preset", "smoke-base", "--dry_run")
    assert "--dataset sst2" in say("slurm", "--job", "training", "--dry_run")
    pipeline = say("slurm", "--job", "experiment", "--hero", "--print_argv")
    assert "--array=0-2" in pipeline and "--hero" in pipeline


# ---- latents against text ------------------------------------------------------------------------------------------


def evaluated(folder: str, right: dict[str, list[int]], headline: str = "accuracy", gold: str = "a") -> Path:
    """A run folder with records of these scores per method, and one older record that does not count."""
    old = {"key": "old", "method": "bridge", "id": "0", "gold": ["z"]}
    records = [old | {"label": 1, "prediction": 1, "correct": True}]
    for method, scores in right.items():
        records += [
            {"key": "k", "method": method, "id": str(i), "gold": [gold], "label": 0, "prediction": 1 - x, "correct": bool(x),
             "f1": float(x)}
            for i, x in enumerate(scores)
        ]  # fmt: skip
    write(f"{folder}/records.jsonl", "".join(json.dumps(lw.sealed(row)) + "\n" for row in records))
    made = {"record_key": "k", "sender": {"name": "tiny-llama"}, "receiver": {"name": "tiny-qwen"}}
    results = {"dataset": "toy", "split": "test", "n": 9, "headline": headline, "methods": {}, "provenance": made}
    return write(f"{folder}/results.json", results).parent


def test_latents_against_text_of_two_runs_or_one(say):
    bridge, text = [1] * 12 + [0] * 8, [1] * 20
    a, b = evaluated("a", {"bridge": bridge}), evaluated("b", {"text": text, "bridge": [0] * 20})
    found = lw.head_to_head(a, b)
    assert found["methods"]["bridge"]["accuracy"] == 0.6 and found["methods"]["text"]["accuracy"] == 1.0
    assert tuple(found["methods"]["bridge"]["ci"]) == lw.bootstrap_interval(bridge, 42)
    assert found["p_bridge_vs"] == {"text": lw.mcnemar_exact(bridge, text)}
    shown = say("scripts/compare_baselines.py", "--latent", a / "eval.json", "--text", b / "results.json")
    for piece in ("latent bridge", "60.0", "full text", "100.0", "-40.0 points of accuracy", "n 20", "tiny-qwen"):
        assert piece in shown
    both = evaluated("c", {"bridge": bridge, "text": text})
    assert lw.head_to_head(both, both)["p_bridge_vs"] == found["p_bridge_vs"]
    a, b = evaluated("a", {"bridge": bridge}, "f1"), evaluated("b", {"text": text}, "f1")
    assert lw.head_to_head(a, b)["p_bridge_vs"] == {"text": lw.paired_permutation(bridge, text, 42)}


@pytest.mark.parametrize(
    ("latent", "text", "phrases"),
    [
        ("nowhere", "text", ("nowhere", "run folder")),
        ("seeds", "text", ("no results of one run at seeds",)),
        ("broken", "text", ("no results of one run at broken",)),
        ("text", "text", ("no rows of method bridge", "eval --checkpoint text")),
        ("fewer", "text", ("different questions", "2 and 3 rows")),
        ("othergold", "text", ("different questions",)),
        ("otherheadline", "text", ("different questions",)),
        ("failed", "text", ("failed rows of method bridge",)),
        ("edited", "text", ("edited/records.jsonl line 5", "changed after it was written")),
    ],
)
def test_what_cannot_be_compared_is_one_line(latent, text, phrases, refuse):
    evaluated("text", {"text": [1, 1, 1]})
    evaluated("fewer", {"bridge": [1, 1]})
    evaluated("othergold", {"bridge": [1, 1, 1]}, gold="b")
    evaluated("otherheadline", {"bridge": [1, 1, 1]}, headline="f1")
    write("seeds/results.json", {"runs": [], "methods": {}})
    write("broken/results.json", "{")
    error = {"key": "k", "method": "bridge", "id": "1", "gold": ["a"], "error": "no memory"}
    with (evaluated("failed", {"bridge": [1, 1, 1]}) / "records.jsonl").open("a") as stream:
        stream.write(json.dumps(lw.sealed(error)) + "\n")
    with (evaluated("edited", {"bridge": [1, 1, 1]}) / "records.jsonl").open("a") as stream:
        stream.write(json.dumps(lw.sealed(error) | {"id": "2"}) + "\n")
    line = refuse("compare", "--latent", latent, "--text", text)
    for phrase in phrases:
        assert phrase in line
