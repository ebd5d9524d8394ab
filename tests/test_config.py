"""§1 CONFIG: defaults < file < flags, every spelling of a flag, advice for every mistake, and what names a run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import LATENTWIRE as lw

# The product's promise: a setting that is renamed, dropped or given another default must be changed here on purpose.
SHARED = {
    "dataset": None, "data_dir": None, "text_column": None, "question_column": None, "label_column": None, "context": "full",
    "labels": None, "plugin": [], "offline": False, "delimiter": "auto", "encoding": "auto",
    "device": "auto", "sender_device": None, "receiver_device": None, "device_map": None, "load_in_8bit": False,
    "load_in_4bit": False, "dtype": "auto", "bf16": False, "fp16": False, "deterministic": False,
    "trust_remote_code": False,
    "append_bos_after_prefix": "auto", "first_token_top_p": 1.0, "first_token_temperature": 0.0, "eos_ban_steps": 0,
}  # fmt: skip
THIRDS = ["0.25", "0.5", "0.75"]
FEATURES = {
    "use_lora": False, "lora_on": "receiver", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
    "lora_target_modules": ["auto"], "use_prefix": False, "prefix_tokens": 16, "prefix_projection": False,
    "use_deep_prefix": False, "deep_prefix_len": None, "deep_prefix_dropout": 0.0, "use_coprocessor": False,
    "coprocessor_len": 1, "coprocessor_width": 256, "coprocessor_kv_scale": 0.8, "coprocessor_pool": "mean",
    "use_latent_adapters": False, "latent_adapter_layers": THIRDS, "latent_adapter_heads": 4, "use_gist_head": False,
    "gist_target_len": 48, "gist_hidden": 512, "gist_mask_prob": 0.15, "use_latent_refiner": False,
    "latent_refiner_layers": 2, "latent_refiner_heads": 4,
}  # fmt: skip
LOSSES = {
    "answer_ce_weight": 1.0, "k_token_ce": 4, "k_token_ce_weight": 0.5, "first_token_ce_weight": 0.5,
    "first_token_ce_schedule": "none", "first_token_ce_peak": 8.0, "first_token_ce_warmup_frac": 0.4,
    "first_token_autoscale": False, "first_token_entropy_weight": 0.0, "kd_weight": 0.0, "kd_tau": 1.0,
    "state_kd_weight": 0.0, "state_kd_layers": THIRDS, "latent_align_weight": 0.0, "latent_align_metric": "cosine",
    "latent_prefix_align_weight": 0.0, "gist_weight": 0.0, "reconstruction_weight": 0.0, "continuation_weight": 0.0,
    "language_tokens": 48, "contrast_weight": 0.0, "contrast_margin": 0.5, "manifold_weight": 0.0, "scale_weight": 0.0,
    "rms_weight": 0.0, "diversity_weight": 0.0, "selection_weight": 0.0, "swap_weight": 0.0,
}  # fmt: skip
SCHEDULE = {
    "stages": ["B"], "warmup_text_latent_steps": None, "warmup_text_latent_epochs": None, "warmup_tail_prob": 0.0,
    "text_align_weight": 1.0, "adaptive_k_start": None, "adaptive_k_end": None, "latent_keep_start": 1.0,
    "latent_keep_end": 1.0, "latent_keep_power": 1.0,
}  # fmt: skip
TRAIN = SHARED | FEATURES | LOSSES | SCHEDULE | {
    "data_seed": 0,
    "latent_len": 8, "d_z": 64, "layers": ["0.5"], "encoder": "hidden", "pooler": "resampler", "adapter": "linear",
    "width": 256, "depth": 2, "heads": 4, "dropout": 0.1, "normalize": "token", "calibration": "embed_rms",
    "codec": "fp16", "anchor_text": None, "anchor_mode": "text",
    "ratio": None, "latent_shared_len": None, "latent_private_len": 0, "windows_on": "encoder", "init": "none",
    "run_words": 8, "coarse": 64,
    "hidden_mult": 1, "adapter_metadata": True, "film": False, "colorize": False, "prefix_target_rms": 0.015,
    "prefix_gain": 1.0, "quantize_from": 1.0,
    "steps": None, "epochs": None, "batch_size": 32, "grad_accum": 1, "effective_batch": None, "lr": 5e-4, "weight_decay": 0.01,
    "warmup_steps": None, "clip": 1.0, "eval_every": None, "patience": 5, "seed": 42,
    "sender": None, "receiver": None, "samples": None, "val_samples": 400, "max_tokens": 256, "seeds": None,
    "output_dir": None, "resume": None, "auto_resume": False, "checkpoint_interval": 300.0, "keep_checkpoints": 2,
    "world_size": None, "gradient_checkpointing": False, "optimizer_offload": False, "log_every": 1, "state_cache": "disk",
    "track": [], "debug": False, "log_shapes": False, "profile": False, "profile_memory": False,
    "num_dataloader_workers": None, "dataloader_pin_memory": False, "use_optimized_dataloader": False,
    "receivers": None, "llama_id": None, "qwen_id": None, "extend": None, "start_from": None, "protocol": "question-aware",
    "sentence_model": "minilm", "max_bytes": 2048, "keep": "head",
    "max_answer_tokens": 32, "tag": None, "eval_samples": None, "eval_seeds": None,
}  # fmt: skip
RIVALS = {
    "shots": 5, "rank": 8, "rival_steps": None, "rival_epochs": 3.0, "rival_lrs": None, "rival_tries": 3,
    "rival_batch": 16, "probe_layers": None, "pooling": ["mean"], "relay_tokens": 50, "compressor": None,
    "llmlingua2_model": None, "budget_ratio": None, "byte_budget": None, "ceiling_steps": 60, "wrong_task": None,
}  # fmt: skip
EVAL = SHARED | RIVALS | {
    "bleu": False, "artifacts": 500, "checkpoint": None, "num_samples": None, "split": "test", "methods": None, "batch_size": 32,
    "max_new_tokens": None, "soft_tokens": None, "source_layer": None, "seed": 42, "output_dir": None,
    "state_cache": "disk", "fresh_eval": False, "receivers": None, "codec": None, "prompt": None, "token_budget_k": None,
    "sequential_eval": False, "vllm": None, "calibration": None, "anchor_text": None,
}  # fmt: skip
BASELINE = SHARED | RIVALS | {
    "methods": None, "sender": None, "receiver": None, "datasets": None, "seeds": None, "samples": None,
    "num_samples": None, "val_samples": 400, "data_seed": 0, "soft_tokens": 8, "max_tokens": 256, "batch_size": 32,
    "max_new_tokens": None, "token_budget_k": None, "seed": 42, "state_cache": "disk", "fresh_eval": False,
    "protocol": "question-aware", "output_dir": Path("runs/baselines"),
}  # fmt: skip
KINDS = {"train": lw.TrainSettings, "eval": lw.EvalSettings, "baseline": lw.BaselineSettings}


RESOLVED = ("dtype", "sender", "receiver")


def resolved(capsys: pytest.CaptureFixture[str], *words: Any, command: str = "train") -> dict[str, Any]:
    """What ``--dry_run`` prints, before models and dtype are chosen for the machine; the Python door reads the same."""
    texts = [str(word) for word in words]
    assert (
        lw.main([command, *texts, "--dry_run", "full"] if command == "train" else [command, *texts, "--dry_run"]) == 0
    ), capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out)
    assert {"train": lw.train_main, "eval": lw.eval_main}[command]([*texts, "--dry_run"]) == shown
    asked, _ = lw.settings_from(KINDS[command], texts)
    assert all(getattr(asked, name) in (shown[name], None, "auto") for name in RESOLVED if name in shown)
    return shown | {name: getattr(asked, name) for name in RESOLVED if name in shown}


def refused(capsys: pytest.CaptureFixture[str], *words: Any, command: str = "train") -> str:
    """The one line on stderr of words that must be refused before anything happens."""
    assert lw.main([command, *map(str, words), "--dry_run"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def config_file(folder: Path, text: str) -> Path:
    path = folder / ("settings.json" if text.lstrip().startswith("{") else "settings.yaml")
    path.write_text(text, encoding="utf-8")
    return path


# ---- defaults, file, flags -----------------------------------------------------------------------------------------


def test_names_and_defaults_of_rivals_are_pinned():
    assert {name: info.default for name, info in lw.BaselineSettings.fields().items()} == BASELINE


@pytest.mark.parametrize(("command", "table"), [("train", TRAIN), ("eval", EVAL)])
def test_names_and_defaults_are_pinned(command, table, capsys):
    assert {name: info.default for name, info in KINDS[command].fields().items()} == table
    shown = resolved(capsys, command=command)
    assert len(shown.pop("digest")) == 12
    assert shown == table


@pytest.mark.parametrize(
    "text",
    [
        '{"dataset": "sst2", "lr": 1e-3, "soft_tokens": 16, "seeds": [1, 2]}',
        '{"data": {"dataset": "sst2"}, "bridge": {"latent-len": 16}, "optim": {"lr": 0.001, "deep": {"seeds": [1, 2]}}}',
        "dataset: sst2\nlr: 1e-3\nsoft_tokens: 16\nseeds: [1, 2]\n",
        "data:\n  dataset: sst2\noptim:\n  lr: 1e-3\n  seeds:\n  - 1\n  - 2\nbridge:\n  num_latents: 16\n",
    ],
    ids=["json-flat", "json-nested", "yaml-flat", "yaml-nested"],
)
def test_file_beats_defaults_and_flags_beat_the_file(text, tmp_path, capsys):
    path = config_file(tmp_path, text)
    from_file = {"dataset": "sst2", "lr": 0.001, "latent_len": 16, "seeds": [1, 2]}
    shown = resolved(capsys, "--config", path)
    assert {name: shown[name] for name in TRAIN} == TRAIN | from_file
    shown = resolved(capsys, "--config", path, "--lr", "0.5", "--latent_len", 4)
    assert {name: shown[name] for name in TRAIN} == TRAIN | from_file | {"lr": 0.5, "latent_len": 4}


def test_a_saved_run_config_is_a_config_file(toy_run, capsys):
    saved = json.loads((toy_run / "config.json").read_text())
    shown = resolved(capsys, "--config", toy_run / "config.json")
    assert shown.pop("digest") == lw.TrainSettings(**saved).digest()
    assert shown == saved


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"layers": [16, 20, -1]}', "layers", ["16", "20", "-1"]),
        ('{"source_layer": 31}', "layers", ["31"]),
        ("layers: 0.75\n", "layers", ["0.75"]),
        ("layers: 16,20\n", "layers", ["16", "20"]),
        ("labels: negative positive\n", "labels", ["negative", "positive"]),
        ("seeds: 42\n", "seeds", [42]),
        ("bf16: yes\n", "dtype", "bfloat16"),
        ('{"use_fp16": "yes"}', "dtype", "float16"),
        ('{"output_dir": "runs/x"}', "output_dir", "runs/x"),
    ],
)
def test_a_file_may_write_values_as_naturally_as_flags(text, name, value, tmp_path, capsys):
    assert resolved(capsys, "--config", config_file(tmp_path, text))[name] == value


# ---- spellings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--soft_tokens 16", "latent_len", 16),
        ("--num-latents=16", "latent_len", 16),
        ("--latent-len 16", "latent_len", 16),
        ("--latent_len=16", "latent_len", 16),
        ("--wire_width 32", "d_z", 32),
        ("--source_layer 31", "layers", ["31"]),
        ("--layers 16 20 24", "layers", ["16", "20", "24"]),
        ("--layers 16,20,24", "layers", ["16", "20", "24"]),
        ("--layers=16,20", "layers", ["16", "20"]),
        ("--layers -1 -4", "layers", ["-1", "-4"]),
        ("--layers=-1,-4", "layers", ["-1", "-4"]),
        ("--layers 0.25 0.75 --steps 3", "layers", ["0.25", "0.75"]),
        ("--seeds 42 123 456", "seeds", [42, 123, 456]),
        ("--seeds 42,123,456", "seeds", [42, 123, 456]),
        ("--labels no,yes", "labels", ["no", "yes"]),
        ("--plugins a.py b.py", "plugin", ["a.py", "b.py"]),
        ("--plugin a.py --plugin b.py", "plugin", ["a.py", "b.py"]),
        ("--grad_accum 4", "grad_accum", 4),
        ("--gradient_accumulation_steps 4", "grad_accum", 4),
        ("--gradient-accumulation-steps=4", "grad_accum", 4),
        ("--learning_rate 2e-4", "lr", 2e-4),
        ("--max_steps 7", "steps", 7),
        ("--epochs 1.5", "epochs", 1.5),
        ("--max_train_samples 50", "samples", 50),
        ("--output_dir runs/a", "output_dir", "runs/a"),
        ("--save_dir runs/a", "output_dir", "runs/a"),
        ("--source_model tiny-qwen", "sender", "tiny-qwen"),
        ("--sender_id tiny-qwen", "sender", "tiny-qwen"),
        ("--target_model tiny-qwen", "receiver", "tiny-qwen"),
        ("--use_fp16 yes", "dtype", "float16"),
        ("--use_fp16 no", "dtype", "auto"),
        ("--fp16", "dtype", "float16"),
        ("--bf16", "dtype", "bfloat16"),
        ("--no-bf16", "dtype", "auto"),
        ("--bf16=true", "dtype", "bfloat16"),
        ("--bf16 --dtype bfloat16", "dtype", "bfloat16"),
        ("--K 8", "k_token_ce", 8),
        ("--k_token_ce_from_prefix 8", "k_token_ce", 8),
        ("--warm_anchor_text Reply:", "anchor_text", "Reply:"),
        ("--no_resume", "resume", None),
        ("--resume no", "resume", None),
        ("--resume", "resume", "yes"),
        ("--resume --seed 3", "resume", "yes"),
        ("--auto-resume --seed 3", "auto_resume", True),
        ("--batch_size auto", "batch_size", "auto"),
        ("--batch_size auto --elastic_base_batch 64", "effective_batch", 64),
        ("--keep_last_n 5", "keep_checkpoints", 5),
        ("--num_processes 2", "world_size", 2),
        ("--cpu_offload", "optimizer_offload", True),
        ("--grad_ckpt", "gradient_checkpointing", True),
        ("--use_4bit", "load_in_4bit", True),
        ("--append_bos_after_prefix true", "append_bos_after_prefix", "yes"),
        ("--append_bos_after_prefix auto", "append_bos_after_prefix", "auto"),
        ("--use_lora --lora_r 16 --lora_alpha 32", "lora_r", 16),
        ("--use_deep_prefix --prefix_len 10", "deep_prefix_len", 10),
        ("--min_new_tokens 4", "eos_ban_steps", 4),
        ("--tag first", "tag", "first"),
    ],
)
def test_every_spelling_of_a_train_flag(words, name, value, capsys, monkeypatch):
    monkeypatch.setattr(lw, "load_plugins", lambda paths: None)  # the files that some name are not there
    assert resolved(capsys, *words.split())[name] == value


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--checkpoint runs/a", "checkpoint", "runs/a"),
        ("--ckpt runs/a", "checkpoint", "runs/a"),
        ("--samples 200", "num_samples", 200),
        ("--max_samples 200", "num_samples", 200),
        ("--latent_len 8", "soft_tokens", 8),
        ("--source-layer 31", "source_layer", ["31"]),
        ("--methods bridge control:zero", "methods", ["bridge", "control:zero"]),
        ("--methods bridge,text", "methods", ["bridge", "text"]),
        ("--fresh_eval", "fresh_eval", True),
        ("--split validation", "split", "validation"),
    ],
)
def test_every_spelling_of_an_eval_flag(words, name, value, capsys):
    assert resolved(capsys, *words.split(), command="eval")[name] == value


def test_a_value_with_spaces_stays_whole(capsys):
    assert resolved(capsys, "--anchor_text", "The answer is: ")["anchor_text"] == "The answer is: "


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        ("--latent_lem 8", ("--latent_lem", "did you mean 'latent_len'?")),
        ("--soft-token 8", ("--soft_token", "did you mean 'soft_tokens'?")),
        ("--zzz 8", ("unknown flag --zzz", "--help")),
        ("--steps", ("--steps needs a value",)),
        ("--layers --steps 3", ("--layers needs a value",)),
        ("--steps 3 4", ("'4' is not a flag",)),
        ("sst2", ("'sst2' is not a flag", "--dataset")),
        ("--steps abc", ("--steps", "'abc'")),
        ("--steps 1.5", ("--steps", "'1.5'")),
        ("--steps -1", ("--steps", "greater than or equal to 0", "'-1'")),
        ("--latent_len 0", ("--latent_len", "1")),
        ("--soft_tokens -3", ("--latent_len", "'-3'")),
        ("--dropout 1", ("--dropout", "less than 1")),
        ("--lr 0", ("--lr", "greater than 0")),
        ("--lr nan", ("--lr",)),
        ("--lr inf", ("--lr", "finite")),
        ("--epochs inf", ("--epochs", "finite")),
        ("--seeds 1 two", ("--seeds", "'two'")),
        ("--dtype int8", ("--dtype", "bfloat16", "'int8'")),
        ("--state_cache tape", ("--state_cache", "memory")),
        ("--auto_resume=flase", ("--auto_resume", "flase")),
        ("--batch_size some", ("--batch_size", "some")),
        ("--batch_size 0", ("--batch_size", "0")),
        ("--batch_size auto --grad_accum 2", ("--batch_size auto", "--effective_batch")),
        ("--effective_batch 64", ("--effective_batch", "--batch_size auto")),
        ("--resume nowhere/run", ("--resume nowhere/run", "config.json")),
        ("--width 100 --heads 3", ("--width 100", "--heads 3")),
        ("--steps 3 --epochs 1", ("--steps", "--epochs")),
        ("--bf16 --fp16", ("--bf16", "--fp16", "disagree")),
        ("--bf16 --dtype float32", ("--bf16", "float32", "disagree")),
        ("--samples 3", ("--samples", "4")),
    ],
)
def test_a_wrong_flag_is_named_with_what_to_type(words, phrases, capsys):
    line = refused(capsys, *words.split())
    for phrase in phrases:
        assert phrase in line


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ('{"latent_lem": 8}', ("latent_lem", "settings.json", "did you mean 'latent_len'?")),
        ("optim:\n  stepz: 8\n", ("stepz", "settings.yaml", "did you mean 'steps'?")),
        ('{"steps": "many"}', ("--steps", "'many'")),
        ('{"steps": -1}', ("--steps", "-1")),
        ("width: 100\nheads: 3\n", ("--width 100", "--heads 3")),
        ("bf16: true\nuse_fp16: true\n", ("--bf16", "--fp16")),
        ("1: 2\n", ("'1'",)),
        ("[1, 2]", ("one mapping",)),
        ("just words", ("one mapping",)),
        ("a: [1", ("neither JSON nor YAML",)),
        ("one:\n  steps: 5\ntwo:\n  steps: 6\n", ("steps",)),
    ],
)
def test_a_wrong_config_file_is_explained(text, phrases, tmp_path, capsys):
    line = refused(capsys, "--config", config_file(tmp_path, text))
    for phrase in phrases:
        assert phrase in line


def test_a_config_file_that_is_missing_or_not_text(tmp_path, capsys):
    assert "no.json not found" in refused(capsys, "--config", tmp_path / "no.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.json" in refused(capsys, "--config", tmp_path / "binary.json")


def test_unknown_keys_are_refused_in_python_too():
    with pytest.raises(lw.LatentWireError, match="did you mean 'steps'"):
        lw.TrainSettings.build({"step": 3})


# ---- the digest ----------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {"dataset": "toy", "labels": ["a"], "plugin": ["a.py"], "layers": ["0.25"], "seeds": [1]} | {
    "codec": "fp32", "dtype": "float32", "normalize": "none", "calibration": "none", "encoder": "x", "pooler": "x",
    "context": "supporting",
    "adapter": "x", "anchor_text": "x", "anchor_mode": "chat", "text_column": "x", "question_column": "x",
    "label_column": "x", "delimiter": "tab", "encoding": "cp1252",
    "sender": "x", "receiver": "x", "state_cache": "memory", "device": "cpu", "data_dir": "x", "output_dir": "x",
    "sender_device": "cpu", "receiver_device": "cpu", "device_map": "auto", "resume": "yes", "world_size": 2,
    "epochs": 2.0, "steps": 7, "samples": 7, "warmup_steps": 7, "eval_every": 7, "num_dataloader_workers": 7,
    "append_bos_after_prefix": "yes", "first_token_top_p": 0.9, "lora_on": "both", "lora_target_modules": ["q_proj"],
    "lora_dropout": 0.1, "deep_prefix_dropout": 0.1, "coprocessor_pool": "max", "latent_adapter_layers": ["1"],
    "first_token_ce_schedule": "cosine",
    "state_kd_layers": ["1"], "latent_align_metric": "mse", "stages": ["A", "B"],
    "latent_keep_start": 0.5, "latent_keep_end": 0.5, "ratio": [4.0], "windows_on": "receiver", "init": "copy",
    "quantize_from": 0.5, "receivers": ["x"], "llama_id": "x", "qwen_id": "x", "extend": "x", "start_from": "x",
    "sentence_model": "x",
    "keep": "tail", "protocol": "question-agnostic", "tag": "x", "eval_samples": 7, "eval_seeds": [1],
    "track": ["wandb"],
}  # fmt: skip
BESIDE = {
    "effective_batch": {"batch_size": "auto"}, "ratio": {"pooler": "window"}, "init": {"pooler": "window"},
    "latent_private_len": {"pooler": "shared_private"},
}  # fmt: skip
EXECUTION = {
    "data_dir", "offline", "plugin", "trust_remote_code",  # plug-ins count by what they hold, not by where they lie
    "device", "bf16", "fp16", "seeds", "output_dir", "resume", "log_every", "state_cache",
    "num_dataloader_workers", "dataloader_pin_memory", "use_optimized_dataloader", "sender_device", "receiver_device",
    "device_map", "auto_resume", "checkpoint_interval", "keep_checkpoints", "world_size", "gradient_checkpointing",
    "optimizer_offload", "tag", "eval_samples", "eval_seeds", "track", "debug", "log_shapes", "profile", "profile_memory",
}  # fmt: skip


def another(name: str) -> Any:
    """A valid value of a train setting other than its default."""
    default = TRAIN[name]
    if name in OTHER:
        return OTHER[name]
    return not default if isinstance(default, bool) else default * 2 if default else 1


@pytest.mark.parametrize("name", sorted(TRAIN))
def test_the_digest_changes_with_what_determines_the_result_and_nothing_else(name):
    beside = BESIDE.get(name, {})
    before, changed = lw.TrainSettings(**beside), lw.TrainSettings(**beside, **{name: another(name)})
    assert getattr(changed, name) != getattr(before, name)
    comparable = changed.model_copy(update={"dtype": "auto"}) if name in ("bf16", "fp16") else changed
    assert (comparable.digest() == before.digest()) is (name in EXECUTION)


def test_equal_settings_have_equal_digests_however_they_are_said(tmp_path, capsys):
    path = config_file(tmp_path, '{"model": {"dtype": "bfloat16"}, "latent_len": 16}')
    said = [("--bf16", "--soft_tokens", 16), ("--dtype", "bfloat16", "--latent-len=16"), ("--config", path)]
    assert len({resolved(capsys, *words)["digest"] for words in said}) == 1


# ---- dry run -------------------------------------------------------------------------------------------------------


def test_dry_run_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = resolved(capsys, "--dataset", "toy", "--output_dir", "runs/a", "--steps", 3)
    assert (shown["dataset"], shown["output_dir"], shown["steps"]) == ("toy", "runs/a", 3)
    assert not list(tmp_path.iterdir())


def test_dry_run_from_python_trains_nothing(tmp_path):
    tiny = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--dataset", "toy", "--steps", "1", "--samples", "8"]
    lw.train_main([*tiny, "--batch_size", "4", "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [lw.TrainSettings, lw.EvalSettings])
def test_every_setting_has_help_and_no_spelling_means_two_things(kind):
    for name, info in kind.fields().items():
        assert len(info.description or "") > 10, f"--{name} has no help"
    spellings = [s for name in kind.fields() for s in (name, *kind.extras(name)["aliases"])]
    assert len(spellings) == len(set(spellings))


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        lw.TrainSettings().steps = 5


def test_settings_travel_between_processes():
    """Also those that parts bring; what was given and what is a default stays known."""
    settings = lw.TrainSettings.build({"dataset": "toy", "hidden_mult": 3})
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings and type(again) is type(settings)
    assert again.model_fields_set == settings.model_fields_set
    assert again.hidden_mult == 3
