"""What strangers send: plug-ins, models, messages, checkpoints, names and config files of people one does not know."""

from __future__ import annotations

import ast
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import bounded
from conftest import TOY, edit_state
from safetensors.torch import load_file, save, save_file

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
SMALL = ("--width", "64", "--lr", "1e-3")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused: code 2, one clean line on stderr within seconds; → that line."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        with bounded(60):
            code = lw.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 2, (words, out, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
        assert all(character.isprintable() for character in err.rstrip("\n")), repr(err)
        return err

    return run


@pytest.fixture
def registries() -> Iterator[None]:
    """What a plug-in adds is taken out again afterwards."""
    before = {kind: (dict(r.parts), dict(r.aliases)) for kind, r in lw.REGISTRIES.items()}
    yield
    for kind, (parts, aliases) in before.items():
        lw.REGISTRIES[kind].parts, lw.REGISTRIES[kind].aliases = parts, aliases


@pytest.fixture
def copy(toy_run: Path, tmp_path: Path) -> Path:
    """A trained run of one's own."""
    return Path(shutil.copytree(toy_run, tmp_path / "theirs", symlinks=True))


def checkpoints(run: Path) -> list[Path]:
    return [path.parent for path in (run / "checkpoint").glob("*/state.json")]


# ---- S1: plug-ins named inside a checkpoint ------------------------------------------------------------------------


def armed(run: Path, plugin: Path, sum_of_it: str | None = None) -> Path:
    """A run that says it was made with a plug-in, wherever a run says so."""

    def change(state: dict[str, Any]) -> None:
        state["settings"]["plugin"] = [str(plugin)]
        state["plugins"] = [{"name": plugin.name, "sha256": sum_of_it or sha256(plugin)}]

    for folder in checkpoints(run):
        edit_state(folder, change)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"plugin": [str(plugin)]}))
    return run


def booby(folder: Path, text: str = "") -> tuple[Path, Path]:
    """(plug-in that leaves a mark when it is run, the mark); no two are the same file."""
    mark, path = folder / "was-run", folder / "their tricks.py"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{text}\n")
    return path, mark


OPENS = {
    "encode": ("encode", "--text", "aaaaaaxxxx", "--checkpoint", "RUN", "--output", "OUT/m.wire"),
    "answer": ("answer", "OUT/good.wire", "--checkpoint", "RUN"),
    "eval": ("eval", "--checkpoint", "RUN", "--num_samples", "4", "--output_dir", "OUT/eval"),
    "eval --prompt": ("eval", "--checkpoint", "GOOD", "--num_samples", "4", "--output_dir", "OUT/eval", "--prompt", "RUN",
                      "--methods", "bridge,control:shuffled,prompt"),
    "benchmark": ("benchmark", "--checkpoint", "RUN", "--benchmark", "latency", "--num_trials", "1", "--output_dir",
                  "OUT/benchmark"),
    "figures": ("figures", "--checkpoint", "RUN", "--num_samples", "4", "--output_dir", "OUT/figures"),
    "train --resume RUN": ("train", "--resume", "RUN", "--steps", "62"),
    "train --resume": ("train", *TOY, *SMALL, "--steps", "62", "--output_dir", "RUN", "--resume"),
    "train --extend": ("train", "--extend", "RUN", "--receivers", "tiny-gemma", "--steps", "2", "--output_dir", "OUT/new"),
    "train --start_from": ("train", *TOY, *SMALL, "--steps", "2", "--start_from", "RUN", "--output_dir", "OUT/new"),
    "train --config": ("train", "--config", "RUN/config.json", "--output_dir", "OUT/new", "--steps", "2"),
}  # fmt: skip


@pytest.mark.parametrize("command", [name for name in OPENS if name != "eval --prompt"])
def test_a_checkpoints_plugin_is_never_run_unasked(
    command: str, copy: Path, toy_run: Path, tmp_path: Path, refused
) -> None:
    """S1: every command that opens a checkpoint refuses it, naming the flag that would allow its plug-in."""
    plugin, mark = booby(tmp_path / "home")
    armed(copy, plugin)
    if command == "answer":
        (tmp_path / "good.wire").write_bytes(lw.encode_text(toy_run, "aaaaaaxxxx"))
    words = [w.replace("RUN", str(copy)).replace("OUT", str(tmp_path)) for w in OPENS[command]]
    said = refused(*words)
    assert not mark.exists()
    assert "--plugin" in said
    again = shlex.split(said.partition("--plugin")[2].partition(";")[0])[0]  # the flag's value, as a shell reads it
    assert Path(again).name == plugin.name


def test_a_checkpoint_of_an_older_release_names_its_plugin_by_path_alone(copy: Path, tmp_path: Path, refused) -> None:
    """S1: without a digest nothing is run either."""
    plugin, mark = booby(tmp_path / "home")
    armed(copy, plugin)
    for folder in checkpoints(copy):
        edit_state(folder, lambda state: state.pop("plugins"))
    assert "--plugin" in refused(
        "encode", "--text", "aaaaaaxxxx", "--checkpoint", copy, "--output", tmp_path / "m.wire"
    )
    assert not mark.exists()


def test_the_same_file_given_on_the_command_line_is_run(copy: Path, tmp_path: Path, say) -> None:
    """S1: what the refusal asks for is enough, from whatever folder."""
    plugin, mark = booby(tmp_path / "home")
    elsewhere = Path(shutil.copy(plugin, tmp_path / "elsewhere.py"))  # its content counts, not its name
    armed(copy, plugin)
    say("encode", "--text", "aaaaaaxxxx", "--checkpoint", copy, "--output", tmp_path / "m.wire", "--plugin", elsewhere)
    assert mark.exists()
    word = say("answer", tmp_path / "m.wire", "--checkpoint", copy, "--plugin", plugin)
    assert word.strip() in "abcd"


def test_another_file_of_the_same_name_is_no_substitute(copy: Path, tmp_path: Path, refused) -> None:
    """S1: both digests are named, so that one sees which file is which."""
    plugin, _ = booby(tmp_path / "home")
    armed(copy, plugin)
    old = sha256(plugin)
    plugin.write_text(plugin.read_text() + "# changed since\n")
    said = refused(
        "encode", "--text", "aaaaaaxxxx", "--checkpoint", copy, "--output", tmp_path / "m.wire", "--plugin", plugin
    )
    assert old[:6] in said
    assert sha256(plugin)[:6] in said


def test_a_damaged_list_of_plugins_is_one_line(copy: Path, tmp_path: Path, refused) -> None:
    """S1, S4: the list is checked like all else."""
    for wrong in (7, [7], [{"name": "x.py"}], [{"name": 7, "sha256": "0" * 64}], {"x.py": "0"}, None, [None]):
        edit_state(copy / "checkpoint" / "best", lambda state, value=wrong: state.update(plugins=value))
        refused("encode", "--text", "aaaaaaxxxx", "--checkpoint", copy, "--output", tmp_path / "m.wire")


# ---- S2: code that comes with a model ------------------------------------------------------------------------------


def test_no_call_leaves_remote_code_to_a_prompt() -> None:
    """S2: every from_pretrained and load_dataset says whether code that comes along is run."""
    tree = ast.parse((ROOT / "LATENTWIRE.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in ("from_pretrained", "load_dataset")
    ]
    assert len(asked) >= 4
    silent = [c.lineno for c in asked if "trust_remote_code" not in {word.arg for word in c.keywords}]
    assert not silent


@pytest.fixture
def strange_model(tmp_path: Path) -> tuple[Path, Path]:
    """(A model folder that brings its own Python code, the mark that this code leaves when it is run.)"""
    model, tokenizer = lw.tiny_llama()
    folder, mark = tmp_path / "strange", tmp_path / "was-run"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "code.StrangeConfig", "AutoModelForCausalLM": "code.StrangeForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    return folder, mark


def test_a_models_own_code_is_not_run_by_saying_yes(strange_model, tmp_path: Path, refused, monkeypatch) -> None:
    """S2: nothing is asked on standard input; the flag is named."""
    folder, mark = strange_model
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    words = ["train", *TOY, "--steps", "2", "--output_dir", tmp_path / "run", "--sender", folder]
    said = refused(*words)
    assert not mark.exists()
    assert "--trust_remote_code" in said


def test_a_models_own_code_is_run_when_asked_for(strange_model, monkeypatch, tmp_path: Path) -> None:
    """S2: the flag does what it says."""
    folder, mark = strange_model
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = lw.ModelSettings(device="cpu", dtype="float32", trust_remote_code=True)
    assert lw.load_lm(str(folder), settings).width == 48
    assert mark.exists()


def test_trust_is_never_read_from_a_checkpoint_or_a_file(copy: Path, tmp_path: Path, refused) -> None:
    """S2: a stranger's run cannot ask for it, in its checkpoint or its config."""
    for folder in checkpoints(copy):
        edit_state(folder, lambda state: state["settings"].update(trust_remote_code=True))
    assert lw.open_bridge(copy / "checkpoint" / "best")[1].trust_remote_code is False
    config = json.loads((copy / "config.json").read_text()) | {"trust_remote_code": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" in refused("train", "--resume", copy, "--steps", "62")
    assert "trust_remote_code" in refused("train", "--config", copy / "config.json", "--output_dir", tmp_path / "new")


# ---- S3: messages --------------------------------------------------------------------------------------------------


def framed(body: bytes) -> bytes:
    """A right header, with the right sum, around any body."""
    message = lw.Message
    return message.HEADER.pack(message.MAGIC, message.VERSION, zlib.crc32(body), len(body)) + body


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(safetensors header, what the message says of itself, numbers)."""
    body = data[lw.Message.HEADER.size :]
    size = struct.unpack_from("<Q", body)[0]
    header = json.loads(body[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["message"]), body[8 + size :]


def joined(header: Mapping[str, Any], said: Any, numbers: bytes) -> bytes:
    """The inverse of ``parts``; ``said`` may be text already."""
    text = said if isinstance(said, str) else json.dumps(said)
    top = json.dumps({**header, "__metadata__": {**header["__metadata__"], "message": text}}).encode()
    top += b" " * (-len(top) % 8)
    return framed(struct.pack("<Q", len(top)) + top + numbers)


def message(codec: str = "int4", shape: tuple[int, int, int] = (1, 4, 8), bridge: str = "0123456789ab") -> bytes:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lw.Message(lw.CODECS[codec]().bound(numbers), codec, bridge).to_bytes()


def assert_refused(data: bytes) -> str:
    """One ``LatentWireError`` of one line, quickly and in little memory."""
    with bounded(), pytest.raises(lw.LatentWireError) as error:
        lw.Message.from_bytes(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_helpers_make_real_messages() -> None:
    for codec in lw.CODECS:
        lw.Message.from_bytes(joined(*parts(message(codec))))


@pytest.mark.parametrize(
    "width",
    [20000, 10**9, 10**30, 9, 6, 0, -8, "8.5", "abc", "", "1e300", 1e300, True, None, [8], {"a": 8}, "8\n", "٨", " 8"],
)
def test_the_width_a_message_claims_is_not_believed(width: Any) -> None:
    """S3: 260 bytes that claim a width cost neither 6.5 GB nor a night."""
    header, said, numbers = parts(message())
    assert said["width"] == "8"
    assert_refused(joined(header, said | {"width": width}, numbers))


def test_a_width_is_there_exactly_where_it_is_needed() -> None:
    """S3: it may not be dropped where two numbers share a byte, nor be added where its codec has none."""
    header, said, numbers = parts(message())
    del said["width"]
    assert_refused(joined(header, said, numbers))
    header, said, numbers = parts(message("int8"))
    assert_refused(joined(header, said | {"width": "8"}, numbers))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_wide_message_costs_no_matrix_of_that_width(codec: str) -> None:
    """S3: an honest body of 20,000 numbers a latent is no reason to make a matrix of 20,000 x 20,000."""
    count = 20000 if codec == "int8" else 10000
    tensors = {"latents": torch.ones(1, 1, count, dtype=lw.CODECS[codec]().dtype), "scale": torch.ones(1, 1).half()}
    said = {"codec": codec, "bridge": "0123456789ab"} | ({"width": "20000"} if codec == "int4" else {})
    assert_refused(framed(save(tensors, metadata={"message": json.dumps(said)})))


@pytest.mark.parametrize(
    ("key", "value"),
    [("codec", "int9"), ("codec", 4), ("codec", None), ("codec", ["int4"]), ("codec", {}), ("bridge", 7), ("bridge", None),
     ("bridge", "a" * 5000), ("bridge", "red\x1b[31m"), ("bridge", "two\nlines"), ("bridge", ""), ("more", "x")],
)  # fmt: skip
def test_what_a_message_says_of_itself_has_a_schema(key: str, value: Any) -> None:
    """S3: strings where strings belong, nothing more, and no control characters."""
    header, said, numbers = parts(message())
    told = assert_refused(joined(header, said | {key: value}, numbers))
    assert told.isprintable()


@pytest.mark.parametrize(
    "said", ["", "null", "7", "[]", '"x"', "{", "[" * 20000, '{"codec": NaN}', '{"a":' * 9000, '{"codec":"fp32","codec":"int4"}']
)  # fmt: skip
def test_notes_that_are_no_notes(said: str) -> None:
    """S3: whatever stands there instead of a mapping is one line."""
    header, _, numbers = parts(message())
    assert_refused(joined(header, said, numbers))


@pytest.mark.parametrize("missing", ["codec", "bridge"])
def test_notes_must_be_whole(missing: str) -> None:
    """S3: nothing has a default."""
    header, said, numbers = parts(message())
    del said[missing]
    assert_refused(joined(header, said, numbers))


def test_a_header_is_bounded_and_holds_nothing_else() -> None:
    """S3: at most 64 KiB, latents and scale and the notes, each where it belongs."""
    header, said, numbers = parts(message("fp32"))
    long = json.dumps({**header, "__metadata__": {"message": json.dumps(said)}}).encode() + b" " * 70000
    assert_refused(framed(struct.pack("<Q", len(long)) + long + numbers))
    assert_refused(joined({**header, "__metadata__": {"format": "pt"}}, said, numbers))
    at = len(numbers)
    more = {"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]}
    assert_refused(joined({**header, "more": more}, said, numbers + bytes(4)))
    assert_refused(joined({**header, "scale": more}, said, numbers + bytes(4)))


@pytest.mark.parametrize(
    "shape", [[1, 4], [1, 4, 8, 1], [1, 4, -8], [1, 2**62, 2**62], [0, 4, 8], [1, 4, "8"], [1, 4, 8.0], 7, None]
)
def test_a_shape_is_three_sizes(shape: Any) -> None:
    """S3: and they are those of the numbers that follow."""
    header, said, numbers = parts(message("fp32"))
    assert_refused(joined({**header, "latents": {**header["latents"], "shape": shape}}, said, numbers))


@pytest.fixture(scope="module")
def letter(toy_run: Path) -> bytes:
    """A real message for the toy run."""
    return lw.encode_text(toy_run, "aaaaaaxxxx")


@pytest.mark.parametrize("shape", [(1, 8, 32), (1, 8, 128), (1, 9, 64), (1, 7, 64), (2, 8, 64), (1, 1, 1)])
def test_a_message_of_another_shape_is_refused_on_the_command_line(
    shape: tuple[int, int, int], letter: bytes, toy_run: Path, tmp_path: Path, refused
) -> None:
    """S3: the checkpoint says what shape is expected; the line names both or at least the right one."""
    name = lw.Message.from_bytes(letter).bridge
    (tmp_path / "m.wire").write_bytes(message("fp16", shape, name))
    said = refused("answer", tmp_path / "m.wire", "--checkpoint", toy_run)
    assert "64" in said


@pytest.mark.parametrize("shape", [(1, 8, 64), (1, 30000, 64), (4000, 8, 64)])
def test_a_message_of_another_bridge_is_refused_before_it_is_unpacked(
    shape: tuple[int, int, int], letter: bytes, toy_run: Path, tmp_path: Path, refused, monkeypatch
) -> None:
    """S3: name and shape are compared first; the numbers are not even looked at."""
    mine = lw.Message.from_bytes(letter).bridge
    (tmp_path / "m.wire").write_bytes(message("int8", shape, "0123456789ab"))
    monkeypatch.setattr(lw.Codec, "unpack", lambda *_: pytest.fail("unpacked"))
    said = refused("answer", tmp_path / "m.wire", "--checkpoint", toy_run)
    assert "0123456789ab" in said or mine in said


def test_another_codec_of_the_same_bridge_is_still_heard(letter: bytes, toy_run: Path) -> None:
    """S3: what is right stays right: eval --codec int4 sends such messages."""
    sent = lw.Message.from_bytes(letter)
    for codec in (name for name in lw.CODECS if not lw.CODECS[name]().bounded):
        data = lw.Message(sent.latents, codec, sent.bridge).to_bytes()
        assert lw.answer_message(toy_run, data) == lw.answer_message(toy_run, letter)


def test_a_message_of_terminal_commands_is_told_in_plain_characters(toy_run: Path, tmp_path: Path, refused) -> None:
    """S3, S6: a bridge's name cannot clear the reader's screen."""
    header, said, numbers = parts(message("fp16", (1, 8, 64)))
    (tmp_path / "m.wire").write_bytes(joined(header, said | {"bridge": "\x1b[2J\x1b]0;owned\x07"}, numbers))
    refused("answer", tmp_path / "m.wire", "--checkpoint", toy_run)


# ---- S4: checkpoints -----------------------------------------------------------------------------------------------


def forged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A state that is wrong though its sums are right."""
    return lambda folder: edit_state(folder, change)


def at(*path: Any, value: Any) -> Callable[[Path], None]:
    """A state with another value at one place."""

    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return forged(change)


def without(*path: Any) -> Callable[[Path], None]:
    """A state that lacks one thing."""

    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return forged(change)


def other_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other tensors, and the sums that belong to them."""

    def act(folder: Path) -> None:
        path = folder / "bridge.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        edit_state(folder, lambda state: state["sha256"].update(bridge=sha256(path)))

    return act


def other_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another file, and the sum that belongs to it."""

    def act(folder: Path) -> None:
        path = folder / "bridge.safetensors"
        path.write_bytes(change(path.read_bytes()))
        edit_state(folder, lambda state: state["sha256"].update(bridge=sha256(path)))

    return act


def state_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "state.json").write_text(text) and None


FORGED = {
    "no safetensors": other_bytes(lambda data: b"no tensors at all"),
    "cut short": other_bytes(lambda data: data[:-7]),
    "an endless header": other_bytes(lambda data: struct.pack("<Q", 2**62) + data[8:]),
    "one tensor less": other_tensors(lambda t: t.pop(sorted(t)[0])),
    "one tensor more": other_tensors(lambda t: t.update(more=torch.zeros(3))),
    "another shape": other_tensors(lambda t: t.update({sorted(t)[-1]: torch.zeros(3, 3)})),
    "another dtype": other_tensors(lambda t: t.update({k: v.double() for k, v in t.items()})),
    "whole numbers": other_tensors(lambda t: t.update({k: v.int() for k, v in t.items()})),
    "not a number": other_tensors(lambda t: t.update({k: v * torch.nan for k, v in t.items()})),
    "task null": at("task", value=None),
    "task a list": at("task", value=["a"]),
    "no words": without("task", "words"),
    "words null": at("task", "words", value=None),
    "words a number": at("task", "words", value=7),
    "words of numbers": at("task", "words", value=[1, 2, 3, 4]),
    "no anchor": without("task", "anchor"),
    "anchor a list": at("task", "anchor", value=["?"]),
    "no receivers": at("receivers", value=[]),
    "receivers null": at("receivers", value=None),
    "receivers of strings": at("receivers", value=["tiny-qwen"]),
    "receiver without name": without("receivers", 0, "name"),
    "another receiver": at("receivers", 0, "name", value="tiny-gemma"),
    "sender null": at("sender", value=None),
    "sender a string": at("sender", value="tiny-llama"),
    "no ears": at("shape", "ears", value=[]),
    "ears null": at("shape", "ears", value=None),
    "ear without width": without("shape", "ears", 0, "width"),
    "ear of another name": at("shape", "ears", 0, "name", value="tiny-gemma"),
    "ear of words": at("shape", "ears", 0, "width", value="wide"),
    "ear of rms words": at("shape", "ears", 0, "rms", value="loud"),
    "readers null": at("shape", "ears", 0, "readers", value=None),
    "twenty thousand ears": forged(lambda s: s["shape"].update(ears=s["shape"]["ears"] * 20_000)),
    "sender width negative": at("shape", "sender_width", value=-1),
    "sender width a fraction": at("shape", "sender_width", value=48.5),
    "sender width huge": at("shape", "sender_width", value=10**30),
    "layers null": at("shape", "layers", value=None),
    "layers far away": at("shape", "layers", value=[10**9]),
    "layers of words": at("shape", "layers", value=["one"]),
    "four million latents": forged(lambda s: [s[k].update(latent_len=4_000_000) for k in ("shape", "settings")]),
    "a width of a billion": forged(lambda s: [s[k].update(width=2**30) for k in ("shape", "settings")]),
    "latents wider than the world": at("shape", "d_z", value=10**30),
    "a billion blocks": forged(lambda s: [s[k].update(depth=10**9) for k in ("shape", "settings")]),
    "a billion refiner blocks": forged(
        lambda s: [s[k].update(use_latent_refiner=True, latent_refiner_layers=10**9) for k in ("shape", "settings")]
    ),
    "no heads": at("shape", "heads", value=0),
    "unknown pooler": at("shape", "pooler", value="theirs"),
    "shape null": at("shape", value=None),
    "shape a list": at("shape", value=[1, 2]),
    "shape unlike settings": at("settings", "latent_len", value=4),
    "settings null": at("settings", value=None),
    "settings of another kind": at("settings", "latent_len", value="many"),
    "settings with more": at("settings", "latent_length", value=8),
    "progress null": at("progress", value=None),
    "no sums": without("sha256"),
    "no sum of the bridge": without("sha256", "bridge"),
    "sums null": at("sha256", value=None),
    "a file outside": forged(lambda s: s["sha256"].update({"../best/bridge": s["sha256"]["bridge"]})),
    "not JSON": state_text("{"),
    "a list": state_text("[]"),
    "null": state_text("null"),
    "deep JSON": state_text("[" * 100_000),
    "a number of 5,000 digits": state_text("9" * 5000),
    "not UTF-8": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe\x00") and None,
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_checkpoint_is_one_line(what: str, copy: Path, tmp_path: Path, refused) -> None:
    """S4: nothing of it costs more than reading it, and nothing of it is a traceback."""
    FORGED[what](copy / "checkpoint" / "best")
    said = refused("encode", "--text", "aaaaaaxxxx", "--checkpoint", copy, "--output", tmp_path / "m.wire")
    assert "theirs" in said  # the folder's name: which checkpoint it is


STATES = {
    "answer": ("no receivers", "layers far away"),
    "eval": ("task null", "receivers null", "words a number"),
    "train --resume": ("progress null", "no ears", "another shape"),
    "train --extend": ("settings null", "no ears"),
    "train --start_from": ("task null", "another shape"),
}


@pytest.mark.parametrize(
    ("command", "what"), [(name, what) for name, all_of_it in STATES.items() for what in all_of_it]
)
def test_every_command_that_opens_one_checks_it(
    command: str, what: str, copy: Path, letter: bytes, tmp_path: Path, refused
) -> None:
    """S4: not only encode."""
    for folder in checkpoints(copy):
        FORGED[what](folder)
    (tmp_path / "good.wire").write_bytes(letter)
    refused(*(w.replace("RUN", str(copy)).replace("OUT", str(tmp_path)) for w in OPENS[command]))


def test_status_shows_runs_beside_a_forged_one(toy_run: Path, tmp_path: Path, say, monkeypatch) -> None:
    """S4: one strange run among mine is named as such; the others are listed."""
    for name in ("mine", "theirs"):
        shutil.copytree(toy_run, tmp_path / name, symlinks=True)
    for folder in checkpoints(tmp_path / "theirs"):
        edit_state(folder, lambda state: state.update(progress=None))
    monkeypatch.chdir(tmp_path)
    out = say("status", ".")
    assert "mine" in out
    assert "60/60" in out


def test_a_checkpoint_is_compared_before_it_is_built(copy: Path, monkeypatch) -> None:
    """S4: with a shape that does not fit its tensors, no parameter of it ever takes memory."""
    FORGED["four million latents"](copy / "checkpoint" / "best")
    real = torch.nn.Parameter.__new__

    def watched(cls: Any, data: Any = None, *rest: Any, **options: Any) -> Any:
        assert data is None or data.device.type == "meta" or data.numel() < 10**6
        return real(cls, data, *rest, **options)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", watched)
    with pytest.raises(lw.LatentWireError):
        lw.open_bridge(copy / "checkpoint" / "best")


def test_a_checkpoint_that_is_right_opens_as_before(copy: Path, toy_run: Path) -> None:
    """S4: the same weights, and no trace of the placeholder they were compared with."""
    bridge, trained, _ = lw.open_bridge(copy / "checkpoint" / "best")
    tensors = load_file(toy_run / "checkpoint" / "best" / "bridge.safetensors")
    assert {name: value.tolist() for name, value in bridge.state_dict().items()} == {
        n: v.tolist() for n, v in tensors.items()
    }
    assert {value.device.type for value in (*bridge.parameters(), *bridge.buffers())} == {"cpu"}
    assert trained.latent_len == 8


# ---- S6: what is written -------------------------------------------------------------------------------------------

NASTY = {
    "markup": "x[/red].csv",
    "link": "[bold]x[link=http://e.invalid].csv",
    "formula": "=1+1,x.csv".replace(",", "_"),
    "html": "<img src=x onerror=alert(1)>.csv".replace("/", "_"),
    "pipe": "a|b`c`*d*.csv",
    "tex": "a$b^c_{d}\\end.csv",
    "escape": "red\x1b[31m\x07.csv",
    "turned": "abc\u202etxt.csv",
    "lines": "two\nlines.csv",
}


def own_rows(path: Path, words: tuple[str, str] = ("yes", "no"), count: int = 60) -> Path:
    """A small file of one's own, of two classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{'abcdefghij'[i % 10] * 3}{i} {'aa' if i % 2 else 'bb'},{words[i % 2]}" for i in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def clean(text: str) -> bool:
    """No control or format characters but line breaks and tabs."""
    return not any(unicodedata.category(sign) in ("Cc", "Cf") for sign in text if sign not in "\n\t")


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY.keys())
def test_a_table_on_the_terminal_shows_names_as_they_are(name: str, capsys) -> None:
    """S6: in rich's tables nothing is markup and nothing is a command to the terminal."""
    with lw.RichReport() as report:
        report.rows(lw.TextTable(("method", name), [(name, "1.0")], name))
        report.say(f"data: {name}")
    out = capsys.readouterr().out
    assert clean(out)
    shown = name.replace("\n", "").replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")
    assert shown[:7] in out.replace("\n", "")


@pytest.mark.parametrize("name", ["markup", "link", "escape"])
def test_status_shows_folders_of_any_name(name: str, toy_run: Path, tmp_path: Path, say) -> None:
    """S6: a folder is no markup."""
    shutil.copytree(toy_run, tmp_path / NASTY[name].replace("/", "⁄"), symlinks=True)
    out = say("status", tmp_path)
    assert clean(out)
    assert "60/60" in out


def test_a_command_to_type_is_quoted(tmp_path: Path, say) -> None:
    """S6: what 'next:' says can be typed as it stands."""
    folder = tmp_path / "two words; $HOME"
    out = say("train", *TOY, *SMALL, "--steps", "2", "--output_dir", folder)
    said = out.rpartition("next: ")[2].splitlines()[0]
    assert shlex.split(said) == ["eval", "--checkpoint", str(folder)]


def test_a_line_of_error_is_one_line_without_commands(refused, tmp_path: Path) -> None:
    """S6: whatever stands in a flag."""
    refused("train", "--dataset", "x\x1b[2J\ny")
    refused("train", "--dataset", tmp_path / "a\nb\x9b31m.csv")
    refused("show", "\x1b]0;owned\x07")


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY.keys())
def test_markdown_shows_names_as_they_are(name: str) -> None:
    """S6: one row is one line, of as many cells as it has; no HTML, no code, no emphasis, no links."""
    table = lw.TextTable(["method", name], [[name, "1.0"], ["plain", "2.0"]]).markdown()
    lines = table.strip().splitlines()
    assert len(lines) == 4
    assert clean(table)
    for line in (lines[0], lines[2]):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
        assert "<" not in line
        assert not re.search(r"(?<!\\)[`*\[]", line)
    assert lines[3] == "| plain | 2.0 |"
    assert "prompt_tuning" in lw.TextTable(["prompt_tuning"], []).markdown()


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY.keys())
def test_latex_shows_names_as_they_are(name: str) -> None:
    """S6: nothing that stands in a name is a command, an option or the end of a paragraph."""
    made = lw.tex(name)
    assert "\n" not in made
    assert clean(made)
    assert not re.search(r"(?<!\{)\[", made)
    for sign in "$&%#_^~":
        known = {"$": r"$\mathdollar$", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
        left = re.sub(r"\$[^$]*\$", "", made)  # formulas of our own
        assert not re.search(rf"(?<!\\){re.escape(sign)}", left.replace(known.get(sign, "\0"), "")), made


def test_a_latex_row_may_begin_with_a_bracket() -> None:
    """S6: after a line's end a bracket would be its optional argument."""
    made = lw.TextTable(["method", "a"], [["plain", "1"], ["[5pt] more", "2"]]).tex().decode()
    assert not re.search(r"\\\\\s*\[", made)
    assert "5pt" in made


def test_latex_of_any_name_compiles(tmp_path: Path) -> None:
    """S6: asked of LaTeX itself, where it is here."""
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex here")
    names = [
        *NASTY.values(),
        "文字.csv",
        "naïve 😀",
        "``quotes''",
        "-- --- ?` !`",
        "\x00\x1b",
        "\n\n",
        "[1pt]",
        "]",
        "*",
    ]
    table = lw.TextTable(["method", "value"], [[name, name] for name in names]).tex().decode()
    text = (
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage{amsmath}\\begin{document}"
        + table
        + "\\end{document}"
    )
    (tmp_path / "t.tex").write_text(text, encoding="utf-8")
    call = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-800:]


@pytest.fixture(scope="module")
def strange_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of alice's with a run on her own file of a nasty name and nasty classes, trained and evaluated."""
    home = tmp_path_factory.mktemp("home") / "alice"
    data = own_rows(home / "data" / "=1+1[bold]<b>|`x`.csv", ("=yes[/red]", "no<script>|"))
    run = home / "runs" / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr("getpass.getuser", lambda: "alice")
        words = ["train", *TOY, *SMALL, "--dataset", str(data), "--steps", "4", "--output_dir", str(run)]
        patch.setattr("sys.argv", ["LATENTWIRE.py", *words])
        assert lw.main(words) == 0
        words = ["eval", "--checkpoint", str(run), "--methods", "bridge,control:shuffled,text"]
        patch.setattr("sys.argv", ["LATENTWIRE.py", *words])
        assert lw.main(words) == 0
        assert lw.main(["report", str(run)]) == 0
        assert lw.main(["aggregate", "--base_dir", str(home / "runs"), "--output_dir", str(home / "together")]) == 0
        assert lw.main(["tables", "--base_dir", str(home / "runs"), "--output_dir", str(home / "tables")]) == 0
    return run


def test_a_spreadsheet_finds_no_formula(strange_run: Path) -> None:
    """S6: cells that begin like one are text."""
    import csv

    with (strange_run.parents[1] / "together" / "aggregated_results.csv").open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert any("1+1" in cell for cell in cells)
    numbers = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
    assert not [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell and not numbers.fullmatch(cell)]


def test_written_pages_hold_no_raw_html(strange_run: Path) -> None:
    """S6: a data set's name and its classes are text in report.html and in Markdown."""
    together = strange_run.parents[1] / "together"
    for path in (strange_run / "report.html", together / "table.md", together / "aggregated_results.md"):
        text = path.read_text()
        assert "1+1" in text
        assert "<b>" not in text.replace("</b>", "").partition("<body")[2] or path.suffix == ".md"
        assert "<b>|" not in text and "<script>|" not in text


# ---- S7: a run that can be given away ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["env.json", "results.json", "evaluation.json", "report.html"])
def test_records_do_not_name_the_user(name: str, strange_run: Path) -> None:
    """S7: neither by the home folder nor by the login name; what was typed can still be read."""
    text = (strange_run / name).read_text()
    assert "alice" not in text
    if name == "env.json":
        assert "~/runs/mine" in text


def test_what_is_put_together_does_not_name_the_user(strange_run: Path) -> None:
    """S7: in no file of aggregate and tables."""
    for folder in ("together", "tables"):
        for path in (strange_run.parents[1] / folder).rglob("*"):
            assert path.is_dir() or b"alice" not in path.read_bytes(), path


def test_encode_and_answer_need_no_data(strange_run: Path, tmp_path: Path, say) -> None:
    """S7: the checkpoint has the classes and prompts; the file it was trained on may be gone."""
    run = Path(shutil.copytree(strange_run, tmp_path / "given away", symlinks=True))
    data = next((strange_run.parents[1] / "data").iterdir())
    hidden = data.rename(data.with_suffix(".gone"))
    try:
        say("encode", "--text", "aaa1 bb", "--checkpoint", run, "--output", tmp_path / "m.wire")
        said = say("answer", tmp_path / "m.wire", "--checkpoint", run).strip()
        without_it = (tmp_path / "m.wire").read_bytes()
    finally:
        hidden.rename(data)
    assert said in ("=yes[/red]", "no<script>|")
    say("encode", "--text", "aaa1 bb", "--checkpoint", run, "--output", tmp_path / "n.wire")
    assert (tmp_path / "n.wire").read_bytes() == without_it
    assert say("answer", tmp_path / "n.wire", "--checkpoint", run).strip() == said


@pytest.mark.parametrize(
    "prompt", ["{context.__class__}", "{context:>999999999}", "{0}", "{question!r:>9}", "{", "{secret}"]
)
def test_a_stored_prompt_is_text_with_two_gaps(prompt: str, strange_run: Path, tmp_path: Path, refused) -> None:
    """S7, S4: what a stranger's checkpoint asks is filled in, not run through everything that format can do."""
    run = Path(shutil.copytree(strange_run, tmp_path / "theirs", symlinks=True))
    for folder in checkpoints(run):
        edit_state(folder, lambda state: state["task"].update(sender_prompt=prompt))
    refused("encode", "--text", "aaa1 bb", "--checkpoint", run, "--output", tmp_path / "m.wire")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "..", ".", "", "a\nb"])
def test_an_experiment_stays_in_its_folder(name: str, refused, tmp_path: Path, monkeypatch) -> None:
    """S7: its name is a name."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    refused("experiment", "--name", name, "--dataset", "toy", "--steps", "2", "--dry_run")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", ".."])
def test_the_runs_of_a_file_stay_in_its_folder(name: str, refused, tmp_path: Path, monkeypatch) -> None:
    """S7: as do the runs that a file lists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"dataset": "toy", "runs": [{"name": name}, {"name": "fine"}]}))
    refused("experiment", "--name", "mine", "--config", "plan.json", "--dry_run")


# ---- J7: plug-ins by content ---------------------------------------------------------------------------------------

POOLER = """
import LATENTWIRE as lw
from torch import nn

@lw.POOLERS.register("{name}")
class Mine(lw.Pooler):
    \"\"\"A pooler of my own: the mean token, to which each latent adds its own numbers.\"\"\"

    def __init__(self, shape):
        super().__init__(shape)
        self.own = nn.Parameter(lw.torch.randn(shape.settings.latent_len, shape.settings.width))

    def forward(self, tokens, mask, windows=None, ear=0):
        weights = mask[..., None].float()
        return (tokens * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True) + self.own, None
"""
METHOD = """
import LATENTWIRE as lw

@lw.METHODS.register("{name}")
class Mine(lw.Method):
    \"\"\"A method of my own: always the same message.\"\"\"

    def message(self, example):
        return self.context.messages[{index}]
"""


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(Run with a pooler of one's own, its plug-in.)"""
    home = tmp_path_factory.mktemp("pooled")
    plugin = home / "my pooler.py"
    plugin.write_text(POOLER.format(name="mine"))
    parts = dict(lw.POOLERS.parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        own = ["--pooler", "mine", "--plugin", "my pooler.py"]
        assert lw.main(["train", *TOY, *SMALL, "--steps", "2", *own, "--output_dir", "run"]) == 0
    yield home / "run", plugin
    lw.POOLERS.parts = parts


def test_a_checkpoint_remembers_name_and_sum_of_its_plugins(pooled: tuple[Path, Path]) -> None:
    """J7, S1: not where they lie."""
    run, plugin = pooled
    for folder in checkpoints(run):
        state = json.loads((folder / "state.json").read_text())
        assert state["plugins"] == [{"name": "my pooler.py", "sha256": sha256(plugin)}]


def test_a_plugin_pooler_is_reopened_from_another_folder(pooled, tmp_path: Path, say, monkeypatch) -> None:
    """J7: the plug-in may have moved."""
    made, plugin = pooled
    run = shutil.copytree(made, tmp_path / "run", symlinks=True)
    moved = Path(shutil.copy(plugin, tmp_path / "moved.py"))
    monkeypatch.chdir(tmp_path)
    say("encode", "--text", "aaaaaaxxxx", "--checkpoint", run, "--output", "m.wire", "--plugin", moved.name)
    assert say("answer", "m.wire", "--checkpoint", run, "--plugin", plugin).strip() in "abcd"
    out = say("train", "--resume", run, "--steps", "3", "--plugin", "moved.py")
    assert "3/3" in out


@pytest.mark.slow
def test_a_plugin_pooler_in_a_process_of_its_own(pooled, tmp_path: Path) -> None:
    """J7, S1: without the plug-in one line names the flag; an edited one is refused by its sum; with it all is well."""
    run, plugin = pooled
    edited = tmp_path / plugin.name
    edited.write_text(plugin.read_text() + "# edited\n")
    program, rest = str(ROOT / "LATENTWIRE.py"), ["--checkpoint", str(run), "--output", "m.wire"]

    def encode(*more: str) -> tuple[int, str]:
        call = [sys.executable, program, "encode", "--text", "aaaaaaxxxx", *rest, *more]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    code, said = encode()
    assert (code, said.count("\n")) == (2, 1)
    assert "--plugin 'my pooler.py'" in said
    code, said = encode("--plugin", str(edited))
    assert (code, said.count("\n")) == (2, 1)
    assert sha256(plugin)[:6] in said
    assert sha256(edited)[:6] in said
    assert encode("--plugin", str(plugin)) == (0, "")


def rows_of(run: Path, method: str) -> list[dict[str, Any]]:
    return [
        row
        for line in (run / "records.jsonl").read_text().splitlines()
        if (row := json.loads(line))["method"] == method
    ]


def test_an_edited_plugin_method_gets_new_rows(copy: Path, tmp_path: Path, registries, say) -> None:
    """J7: rows belong to the code that made them; those of other methods are kept."""
    asked = ["eval", "--checkpoint", copy, "--num_samples", "8", "--methods", "bridge,control:shuffled,stubborn"]
    for index in (0, 1):
        plugin = tmp_path / str(index) / "stubborn.py"
        plugin.parent.mkdir()
        plugin.write_text(METHOD.format(name="stubborn", index=index))
        lw.METHODS.parts.pop("stubborn", None)  # as in a process of its own
        say(*asked, "--plugin", plugin)
    rows = rows_of(copy, "stubborn")
    assert len(rows) == 16
    assert len({row["key"] for row in rows}) == 2
    assert len(rows_of(copy, "bridge")) == 8


def test_a_run_given_by_another_path_is_the_same_run(
    copy: Path, toy_run: Path, tmp_path: Path, say, monkeypatch
) -> None:
    """J7: --wrong_task enters a row's key by what the run holds, not by how its path is written."""
    data = own_rows(tmp_path / "own.csv")
    say("train", *TOY, *SMALL, "--dataset", data, "--steps", "2", "--output_dir", tmp_path / "other")
    asked = [
        "eval",
        "--checkpoint",
        copy,
        "--num_samples",
        "8",
        "--methods",
        "bridge,control:shuffled,control:wrong_task",
    ]
    monkeypatch.chdir(tmp_path)
    for spelled in (tmp_path / "other", "other", "./other/checkpoint/best"):
        say(*asked, "--wrong_task", spelled)
    assert len(rows_of(copy, "control:wrong_task")) == 8
    say("train", *TOY, *SMALL, "--dataset", data, "--steps", "3", "--output_dir", tmp_path / "third")
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "third").rename(tmp_path / "other")  # another bridge in its place
    say(*asked, "--wrong_task", "other")
    assert len(rows_of(copy, "control:wrong_task")) == 16


# ---- D8: config files ----------------------------------------------------------------------------------------------


def config(tmp_path: Path, text: str | bytes, name: str = "c.yaml") -> Any:
    """The settings that a file makes."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded():
        return lw.settings_from(lw.TrainSettings, ["--config", str(path)])[0]


def test_words_in_a_file_stay_as_they_are_written(tmp_path: Path) -> None:
    """D8: no, on and 007 are words where words are asked for; nothing is a date, a time or a number of base 60."""
    words = ["no", "yes", "on", "off", "n", "true", "False", "007", "1.0", "1e3", "0x10", "0o7", "1_000", "12:30", "2026-02-30",
             "=", "null", "~", ".inf", "5"]  # fmt: skip
    assert config(tmp_path, f"dataset: toy\nlabels: [{', '.join(words)}]\n").labels == words
    listed = "".join(f"  - {word}\n" for word in words)
    assert config(tmp_path, f"dataset: toy\nlabels:\n{listed}").labels == words
    assert config(tmp_path, json.dumps({"dataset": "toy", "labels": ["no", "yes"]})).labels == ["no", "yes"]
    assert config(tmp_path, "anchor_text: no\ntag: 2026-01-01\n").anchor_text == "no"
    assert config(tmp_path, "anchor_text: no\ntag: 2026-01-01\n").tag == "2026-01-01"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("use_lora: yes", "use_lora", True), ("use_lora: true", "use_lora", True), ("use_lora: off", "use_lora", False),
     ("steps: 100", "steps", 100), ("seed: 010", "seed", 10), ("lr: 1e-3", "lr", 1e-3), ("lr: .001", "lr", 1e-3),
     ("samples: null", "samples", None), ("samples: ~", "samples", None), ("samples:", "samples", None),
     ("seeds: [1, 2]", "seeds", [1, 2]), ("batch_size: auto", "batch_size", "auto"), ("lora: {r: 4}", "lora_r", 4),
     ("append_bos_after_prefix: yes", "append_bos_after_prefix", "yes"), ("tag: 'null'", "tag", "null"),
     ("anchor_text: |\n  Answer:\n", "anchor_text", "Answer:\n"), ('{"lr": 0.001, "steps": null}', "lr", 1e-3)],
)  # fmt: skip
def test_settings_in_a_file_mean_what_they_say(text: str, name: str, value: Any, tmp_path: Path) -> None:
    """D8: the file's own types do not matter, the settings' do."""
    assert getattr(config(tmp_path, text), name) == value


BAD = {
    "nested aliases": "a: &a [x,x]\n"
    + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in itertools.pairwise("abcdefghijklmn"))
    + "labels: *n\n",
    "an alias": "seed: &s 1\ndata_seed: *s\n",
    "an alias of itself": "labels: &a [*a]\n",
    "a merge": "base: &b {seed: 1}\n<<: *b\n",
    "200,000 keys": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "200,000 keys as JSON": json.dumps({f"k{i}": i for i in range(60_000)}),
    "a megabyte of labels": "labels: [" + "a," * 400_000 + "]\n",
    "more than a megabyte": "# " + "x" * 2**20 + "\nseed: 1\n",
    "deep lists": "labels: " + "[" * 5000 + "]" * 5000,
    "deep lists in JSON": '{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep mappings": "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 600)),
    "deep indents": "- " * 20_000 + "x",
    "a long number": "seed: " + "9" * 5000,
    "a long number in JSON": '{"seed": ' + "9" * 5000 + "}",
    "an impossible date": "seed: 2026-02-30",
    "an object": "seed: !!python/object/apply:os.system ['true']",
    "a tag": "labels: !!set {a, b}",
    "a binary": "tag: !!binary aGVsbG8=",
    "a timestamp": "tag: !!timestamp 2026-01-01",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is null": "~: 1\n",
    "a list": "[1, 2]",
    "a word": "seed",
    "nothing": "",
    "NUL": b"seed: \0",
    "a control character": "tag: 'a\x1b[2J'",
    "half a character": b"tag: \xc3",
    "UTF-16": "seed: 1".encode("utf-16"),
    "an open quote": 'tag: "abc',
    "a tab": "a:\n\tb: 1",
    "NaN": "lr: .nan",
    "infinity": "lr: .inf",
    "a list for a number": "seed: [1, [2, {3: 4}]]",
    "a mapping for a number": "seed: {a: {b: 1}}",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("command", ["train", "experiment"])
def test_a_bad_config_file_is_one_line(what: str, command: str, tmp_path: Path, refused) -> None:
    """D8: within seconds, and in little memory."""
    text = BAD[what]
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(command, "--config", tmp_path / "c.yaml", "--dry_run")
    assert len(said) < 1000
