"""Damaged and forged files by the thousand: one line says what is wrong, quickly, in little memory, or nothing changed.

The same seeds make the same cases everywhere. LATENTWIRE_FUZZ=10000 asks for so many of each kind; a case that failed is
named by its number, and ``LATENTWIRE_FUZZ_ONLY=number`` runs it alone.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import shutil
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bounds import TooLong, lean, timed

import LATENTWIRE as lw

CASES = int(os.environ.get("LATENTWIRE_FUZZ", "100"))
MANY = max(1000, CASES)
"""Cases of the slow tests, and the minutes after which they stop and say how many there were."""

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, -1e300, 1e-300, "", " ", "0", "1", "-1",
    "1e300", "NaN", "Infinity", "null", "true", "no", "x" * 5000, "\x00", "\x1b[2J", "\u202e", "é", "😀", "../../etc/passwd",
    "/dev/zero", "a\nb", "{context}", "{0.__class__}", "=1+1", "<b>", "[", "]", "'", '"', ",", [], {}, [[]], [None], ["a"] * 50,
    {"a": {"b": {"c": 1}}}, [1, 2, 3], "9" * 5000, "a" * 12, "0123456789ab", ["x", "y"],
]  # fmt: skip
TOKENS = [
    b"\x00", b"\xff\xfe", b"\n", b"\r\n", b'"', b"'", b",", b"\t", b"{", b"}", b"[" * 3000, b"]", b":", b"NaN", b"Infinity", b"-",
    b"1e999", b"9" * 5000, b"null", b"true", b"\\u0000", b"\\ud800", b"\xc3", b"\xed\xa0\x80", b"&a ", b"*a", b"<<: ", b"---\n",
    b"!!python/object:os.system ", b"? ", b"\xef\xbb\xbf", b"\x7f" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 0),
    struct.pack("<i", -1),
]  # fmt: skip


# ---- ways to damage ------------------------------------------------------------------------------------------------


def hurt_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three small damages."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            return rng.choice(TOKENS)
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        near = min(len(data), at + rng.randrange(1, 9))
        kind = rng.randrange(8)
        if kind <= 1:  # a bit
            here = min(at, len(data) - 1)
            data = data[:here] + bytes([data[here] ^ 1 << rng.randrange(8)]) + data[here + 1 :]
        elif kind == 2:  # the end is missing
            data = data[:at]
        elif kind == 3:  # something is missing
            data = data[:at] + data[near:]
        elif kind == 4:  # something stands there twice
            data = data[:near] + data[at:]
        elif kind == 5:  # something else stands there
            data = data[:at] + rng.choice(TOKENS) + data[near:]
        elif kind == 6:  # something is put in
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        else:  # parts change places
            data = data[to:] + data[at:to] + data[:at]
    return data


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def hurt_tree(tree: Any, rng: random.Random) -> Any:
    """The same JSON with one to three values that others might have put there."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = [*places(tree)]
        if not found:
            return rng.choice(NASTY)
        path = rng.choice(found)
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        kind, key = rng.randrange(8), path[-1]
        if kind <= 3:
            inner[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 4:
            del inner[key]
        elif kind == 5:
            inner[key] = [inner[key]]
        elif kind == 6:
            other = tree
            for step in rng.choice(found):
                try:
                    other = other[step]
                except (LookupError, TypeError):
                    break
            inner[key] = copy.deepcopy(other)
        elif isinstance(inner, dict):
            inner[rng.choice(["more", "", "__class__", "name", "\x1b[31m", str(key) + " "])] = copy.deepcopy(
                rng.choice(NASTY)
            )
        else:
            inner.append(copy.deepcopy(rng.choice(NASTY)))
    return tree


def hurt_text(tree: Any, rng: random.Random) -> bytes:
    """Another tree as JSON, sometimes damaged as text too."""
    data = json.dumps(hurt_tree(tree, rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return hurt_bytes(data, rng) if rng.random() < 0.2 else data


# ---- what is attacked ----------------------------------------------------------------------------------------------


class Target:
    """Something that reads files: ``make`` damages one, ``read`` reads it, ``judge`` looks at what was believed."""

    def make(self, rng: random.Random) -> Any:
        """One case."""
        raise NotImplementedError

    def read(self, case: Any) -> Any:
        """What the program makes of it."""
        raise NotImplementedError

    def judge(self, case: Any, result: Any) -> str:
        """What is wrong with an accepted case, or nothing."""
        raise NotImplementedError


class Messages(Target):
    """Messages of every codec, raw or with a right checksum around a wrong body."""

    def __init__(self) -> None:
        numbers = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
        words = (("Some words, ", "é 🙂 ", "", " and " * 40, "more."),)
        written = {codec: lw.CODECS[codec]().bound(numbers) for codec in lw.CODECS}
        plain = {codec: lw.Message(latents, codec, "0123456789ab") for codec, latents in written.items()}
        mixed = {f"{codec} and words": replace(message, words=words) for codec, message in plain.items()}
        self.good = {name: message.to_bytes() for name, message in (plain | mixed).items()}
        self.sent = {name: lw.Message.from_bytes(data) for name, data in self.good.items()}

    @staticmethod
    def framed(body: bytes, version: int = lw.Message.VERSION) -> bytes:
        """A right frame."""
        return lw.Message.HEADER.pack(lw.Message.MAGIC, version, zlib.crc32(body), len(body)) + body

    def make(self, rng: random.Random) -> tuple[str, bytes, bool]:
        """(codec, bytes, whether the checksum was made again)."""
        codec = rng.choice([*self.good])
        data, kind = self.good[codec], rng.randrange(4)
        if kind == 0:
            return codec, hurt_bytes(data, rng), False
        body = data[lw.Message.HEADER.size :]
        if codec.endswith("words"):
            sizes = lw.Message.SIZES.size if kind == 2 else len(body)  # half of them are hurt where the sizes stand
            return codec, self.framed(hurt_bytes(body[:sizes], rng) + body[sizes:], lw.Message.MIXED), True
        if kind == 1:
            return codec, self.framed(hurt_bytes(body, rng)), True
        size = struct.unpack_from("<Q", body)[0]
        header = json.loads(body[8 : 8 + size])
        said = json.loads(header["__metadata__"]["message"])
        if kind == 2:
            header["__metadata__"]["message"] = hurt_text(said, rng).decode("utf-8", "replace")
            text = json.dumps(header).encode()
        else:
            text = hurt_text(header, rng)
        return codec, self.framed(struct.pack("<Q", len(text)) + text + body[8 + size :]), True

    def read(self, case: tuple[str, bytes, bool]) -> lw.Message:
        """As a stranger's."""
        return lw.Message.from_bytes(case[1])

    def judge(self, case: tuple[str, bytes, bool], result: lw.Message) -> str:
        """Without a new checksum nothing may change; with one, latents are as many as there are bytes for."""
        codec, data, summed = case
        same = torch.equal(result.latents, self.sent[codec].latents) and result.words == self.sent[codec].words
        if not summed and not (data == self.good[codec] and same):
            return "a damaged message was accepted"
        if (
            result.latents.numel() > 2 * len(data)
            or not result.latents.isfinite().all()
            or not result.bridge.isprintable()
        ):
            return f"{tuple(result.latents.shape)} of {len(data)} bytes for {result.bridge!r}"
        return ""


class Folders(Target):
    """Files of a folder, of which a case changes one or two; the others stand as they were."""

    def __init__(self, good: dict[str, bytes], folder: Path) -> None:
        self.good, self.folder = good, folder
        self.put({})

    def put(self, changed: dict[str, bytes]) -> None:
        """Write what a case changes, restore all else."""
        for name, data in self.good.items():
            path = self.folder / name
            wanted = changed.get(name, data)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != wanted:
                path.write_bytes(wanted)


class CheckpointFiles(Folders):
    """A bridge with its state: sums right or wrong."""

    def __init__(self, toy_run: Path, folder: Path) -> None:
        best = toy_run / "checkpoint" / "best"
        super().__init__(
            {name: (best / name).read_bytes() for name in ("state.json", "bridge.safetensors")}, folder / "theirs"
        )
        self.state = json.loads(self.good["state.json"])
        self.print = self.read({}).fingerprint()
        size = struct.unpack_from("<Q", self.good["bridge.safetensors"])[0]
        self.head = json.loads(self.good["bridge.safetensors"][8 : 8 + size])
        self.rest = self.good["bridge.safetensors"][8 + size :]

    @staticmethod
    def summed(state: Any) -> bytes:
        """A state with its own sum."""
        if isinstance(state, dict):
            state.pop("digest", None)
            state["digest"] = lw.digest_of(state)
        return json.dumps(state).encode("utf-8", "surrogatepass")

    def make(self, rng: random.Random) -> dict[str, bytes]:
        """State, shape or tensors; most of them as one would forge them, with right sums."""
        kind, good = rng.randrange(6), self.good
        if kind == 0:
            return {"state.json": hurt_bytes(good["state.json"], rng)}
        if kind == 1:
            return {"bridge.safetensors": hurt_bytes(good["bridge.safetensors"], rng)}
        if kind <= 3:
            state = copy.deepcopy(self.state)
            part = rng.choice(["shape", "shape", "settings", "task", "receivers", "sender", "progress", "sha256", ""])
            state = {**state, part: hurt_tree(state[part], rng)} if part else hurt_tree(state, rng)
            if (
                rng.random() < 0.3
                and isinstance(state, dict)
                and all(isinstance(state.get(k), dict) for k in ("shape", "settings"))
            ):
                for name in rng.sample(
                    ["latent_len", "d_z", "width", "depth", "heads", "pooler", "adapter", "codec"], 2
                ):
                    state["shape"][name] = state["settings"][name] = rng.choice(NASTY)  # agreeing with each other
            return {"state.json": self.summed(state)}
        head = hurt_text(self.head, rng)
        tensors = (
            struct.pack("<Q", len(head)) + head + self.rest
            if kind == 4
            else hurt_bytes(good["bridge.safetensors"], rng)
        )
        state = copy.deepcopy(self.state)
        state["sha256"]["bridge"] = hashlib.sha256(tensors).hexdigest()
        return {"bridge.safetensors": tensors, "state.json": self.summed(state)}

    def read(self, case: dict[str, bytes]) -> lw.Bridge:
        """As a command opens it."""
        self.put(case)
        return lw.open_bridge(self.folder)[0]

    def judge(self, case: dict[str, bytes], result: lw.Bridge) -> str:
        """The same weights, unless other weights came with sums of their own; nothing left without memory."""
        if any(tensor.device.type == "meta" for tensor in result.state_dict().values()):
            return "an empty bridge"
        if "bridge.safetensors" not in case and result.fingerprint() != self.print:
            return "other weights than those of the file"
        return ""


class RecordFiles(Folders):
    """Records and facts of an evaluation."""

    def __init__(self, evaluated: Path, folder: Path) -> None:
        names = ("records.jsonl", "evaluation.json", "results.json", "config.json")
        super().__init__({name: (evaluated / name).read_bytes() for name in names}, folder / "theirs")
        self.rows = [json.loads(line) for line in self.good["records.jsonl"].splitlines()]
        self.told = self.read({})

    def make(self, rng: random.Random) -> dict[str, bytes]:
        """One file as bytes or as values."""
        name = rng.choice(["records.jsonl", "records.jsonl", "evaluation.json", "results.json", "config.json"])
        if rng.random() < 0.4:
            return {name: hurt_bytes(self.good[name], rng)}
        if name != "records.jsonl":
            return {name: hurt_text(json.loads(self.good[name]), rng)}
        rows = copy.deepcopy(self.rows)
        at = rng.randrange(len(rows))
        kind = rng.randrange(4)
        if kind == 0:
            rows.append(rows[at])
        elif kind == 1:
            del rows[at]
        else:
            rows[at] = hurt_tree(rows[at], rng)
        return {name: "".join(json.dumps(row) + "\n" for row in rows).encode()}

    def read(self, case: dict[str, bytes]) -> str:
        """As aggregate, tables and report see it."""
        self.put(case)
        material = lw.ReportInputs.below(self.folder)
        told = [{name: column.summaries[name] for name in column.methods} for column in material.groups]
        shown = [lw.results_table(member.results).rows for column in material.groups for member in column.members]
        return json.dumps(
            [told, shown, [lw.compared(column)["comparisons"] for column in material.groups]], default=str
        )

    def judge(self, case: dict[str, bytes], result: str) -> str:
        """Where the records say the same, so do the numbers; means are shares, whatever was put in."""
        rows = case.get("records.jsonl", self.good["records.jsonl"])
        told = json.loads(result)[0]
        for column in told:
            for name, one in column.items():
                if not 0 <= one["mean"] <= 1 or not all(0 <= end <= 1 for end in one["ci"]):
                    return f"{name}: mean {one['mean']}, interval {one['ci']}"
        try:
            same = [json.loads(line) for line in rows.splitlines()] == self.rows
        except ValueError:
            same = False
        if "results.json" in case and told and result != self.told:
            return "results.json changed what the records say"
        if "records.jsonl" in case and same and result != self.told:
            return "the same records say something else"
        return ""


class ConfigFiles(Folders):
    """Config files in JSON and YAML."""

    JSON: ClassVar[dict[str, Any]] = {
        "dataset": "toy", "sender": "tiny-llama", "receiver": "tiny-qwen", "steps": 5, "lr": 1e-3, "lora": {"r": 4},
        "labels": ["no", "yes"], "seeds": [1, 2], "use_prefix": True, "samples": None,
    }  # fmt: skip
    YAML: ClassVar[bytes] = b"""dataset: toy
sender: tiny-llama
receiver: tiny-qwen
steps: 5
lr: 1e-3
lora:
  r: 4
labels:
  - no
  - yes
seeds: [1, 2]
use_prefix: yes
samples: ~
# a remark
"""

    def __init__(self, folder: Path) -> None:
        super().__init__({"c.json": json.dumps(self.JSON).encode(), "c.yaml": self.YAML}, folder)
        self.told = self.read({"c.json": self.good["c.json"]})
        assert self.told == self.read({"c.yaml": self.YAML})

    def make(self, rng: random.Random) -> dict[str, bytes]:
        """Either of them."""
        name = rng.choice(["c.json", "c.yaml"])
        return {
            name: hurt_text(self.JSON, rng)
            if name == "c.json" and rng.random() < 0.7
            else hurt_bytes(self.good[name], rng)
        }

    def read(self, case: dict[str, bytes]) -> Any:
        """The settings."""
        self.put(case)
        return lw.settings_from(lw.TrainSettings, ["--config", str(self.folder / next(iter(case)))])[0]

    def judge(self, case: dict[str, bytes], result: Any) -> str:
        """The same JSON is the same settings, and nothing is trusted because a file says so."""
        if result.plugin or getattr(result, "trust_remote_code", False):
            return "a file was trusted"
        try:
            same = json.loads(case.get("c.json", b"")) == self.JSON
        except ValueError:
            same = False
        return "the same file means something else" if same and result != self.told else ""


class DataFiles(Folders):
    """A data file of one's own, in one format."""

    def __init__(self, suffix: str, folder: Path) -> None:
        self.suffix = suffix
        self.rows = [
            {"text": f"text {i} {'aa' if i % 2 else 'bb'}, “quoted” é", "label": ("good", "bad")[i % 2]}
            for i in range(40)
        ]
        super().__init__({f"own{suffix}": self.written(self.rows)}, folder)
        self.told = self.read({})

    def written(self, rows: Any) -> bytes:
        """Rows in the format."""
        if self.suffix == ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
        if self.suffix == ".csv":
            import csv

            stream = io.StringIO()
            csv.writer(stream).writerows([["text", "label"], *(row.values() for row in rows)])
            return stream.getvalue().encode("utf-8", "surrogatepass")
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()

    def make(self, rng: random.Random) -> dict[str, bytes]:
        """Other bytes, or other values in a right file."""
        name = f"own{self.suffix}"
        if rng.random() < 0.6:
            return {name: hurt_bytes(self.good[name], rng)}
        rows = copy.deepcopy(self.rows)
        at = rng.randrange(len(rows))
        rows[at] = hurt_tree(rows[at], rng)
        try:
            return {name: self.written(rows)}
        except Exception:  # rows of no common type cannot be written
            return {name: hurt_bytes(self.good[name], rng)}

    def read(self, case: dict[str, bytes]) -> Any:
        """All rows, as Examples."""
        self.put(case)
        part = lw.make_task(lw.DataSettings(dataset=str(self.folder / f"own{self.suffix}")))
        return [[(e.context, e.answers, e.label) for e in part.load(split)[0]] for split in ("train", "test")]

    def judge(self, case: dict[str, bytes], result: Any) -> str:
        """Where the values are the same, so are the rows; a text never holds another row's label."""
        data = case.get(f"own{self.suffix}", b"")
        if data == self.good[f"own{self.suffix}"] and result != self.told:
            return "the same file is read differently"
        if self.suffix == ".jsonl":
            try:
                same = [json.loads(line) for line in data.decode().split("\n") if line.strip()] == self.rows
            except ValueError:
                same = False
            if same and result != self.told:
                return "the same rows are read differently"
        return ""


# ---- the attack ----------------------------------------------------------------------------------------------------


def attack(target: Target, name: str, cases: int) -> int:
    """Reads so many cases; fails with the first five that went wrong; → how many were tried."""
    only = os.environ.get("LATENTWIRE_FUZZ_ONLY")
    wrong: list[str] = []
    began, worked, tried, accepted = time.monotonic(), time.process_time(), 0, 0
    with lean():
        for number in [int(only)] if only else range(cases):
            if len(wrong) >= 5:
                break
            rng = random.Random(f"{name} {number}")
            case, tried = target.make(rng), tried + 1
            try:
                with timed():
                    result = target.read(case)
                accepted += 1
                if why := target.judge(case, result):
                    wrong.append(f"case {number}: {why}")
            except lw.LatentWireError as error:
                if not str(error).strip() or len(str(error)) > 4000:
                    wrong.append(f"case {number}: no line of a person's: {str(error)[:80]!r}")
            except TooLong as error:
                wrong.append(f"case {number}: {error}")
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                own = [
                    frame
                    for frame in traceback.extract_tb(error.__traceback__)
                    if frame.filename.endswith("LATENTWIRE.py")
                ]
                at = f"{own[-1].name}, line {own[-1].lineno}" if own else f"{place.filename}:{place.lineno}"
                wrong.append(f"case {number}: {type(error).__name__} in {at}: {str(error)[:120]}")
    assert not wrong, f"{name}, {tried} cases:\n" + "\n".join(wrong)
    assert only or accepted < tried or tried < 20, "nothing was refused"
    took = f"{time.process_time() - worked:.1f} s of work"
    print(f"{name}: {tried} cases, {accepted} accepted, {time.monotonic() - began:.0f} s, {took}")
    return tried


@pytest.fixture(scope="module")
def targets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    """A target by name; only two of them need a trained run."""
    home = tmp_path_factory.mktemp("fuzz")

    def trained() -> Path:
        return Path(request.getfixturevalue("toy_run"))

    def records() -> Target:
        run = Path(shutil.copytree(trained(), home / "evaluated", symlinks=True))
        asked = lw.EvalSettings(checkpoint=run, num_samples=12, methods=["bridge", "control:shuffled"])
        lw.eval_run(asked, lw.Silent())
        return RecordFiles(run, home / "records")

    made: dict[str, Callable[[], Target]] = {
        "message": Messages, "checkpoint": lambda: CheckpointFiles(trained(), home / "checkpoint"), "records": records,
        "config": lambda: ConfigFiles(home / "config"), "jsonl": lambda: DataFiles(".jsonl", home / "jsonl"),
        "csv": lambda: DataFiles(".csv", home / "csv"), "parquet": lambda: DataFiles(".parquet", home / "parquet"),
    }  # fmt: skip
    known: dict[str, Target] = {}

    def target(name: str) -> Target:
        if name not in known:
            known[name] = made[name]()
        return known[name]

    return target


TARGETS = {
    "message": "S3", "checkpoint": "S4", "records": "S5", "config": "D8", "jsonl": "D3", "csv": "D1", "parquet": "D2",
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_one_line_or_change_nothing(name: str, targets: Callable[[str], Target]) -> None:
    """S3, S4, S5, D1, D2, D3, D8: no other exception, no case over ten seconds, no more than 500 MB, nothing unnoticed."""
    cases = CASES // 5 if name == "records" else CASES  # six commands read each of them
    assert attack(targets(name), name, cases) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files_are_one_line_or_change_nothing(name: str, targets: Callable[[str], Target]) -> None:
    """S3, S4, S5, D1, D2, D3, D8: the same a thousand times, or as often as LATENTWIRE_FUZZ says."""
    assert attack(targets(name), name, MANY) >= 1


def test_the_same_seed_makes_the_same_case(targets: Callable[[str], Target]) -> None:
    """A case that failed can be made again by its number."""
    for name in ("message", "config", "csv"):
        target = targets(name)
        assert target.make(random.Random(f"{name} 7")) == target.make(random.Random(f"{name} 7"))
