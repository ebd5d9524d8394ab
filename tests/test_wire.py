"""§7 WIRE: a Message really serialises, refuses whatever is not one, and is all that the receiving process needs."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
CPU = lw.ModelSettings(device="cpu", dtype="float32")
STEP = {
    "fp32": 0.0,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "int8": 1 / 127,
    "int4": 1 / 7,
    "fsq4": 1 / 2,
    "fsq3": 1,
    "fsq2": 2,  # the highest level stands for 1 as well, and turning back spreads it; test_bridges.py looks at the levels
}  # largest error / largest number


def latents(rows: int = 1, count: int = 4, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(seed))


def written(codec: str, *shape: int) -> torch.Tensor:
    """Latents as a bridge with this codec writes them."""
    return lw.CODECS[codec]().bound(latents(*shape))


SMALL = lw.Message(latents(1, 1, 2), "fp16", "abcdef").to_bytes()


def assert_refused(data: bytes) -> str:
    """One ``LatentWireError`` of one line, and no other exception."""
    with pytest.raises(lw.LatentWireError) as error:
        lw.Message.from_bytes(data)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(lw.CODECS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 64), (1, 3, 5), (4, 8, 16)])
def test_a_message_comes_back_with_its_codecs_precision(codec: str, shape: tuple[int, int, int]) -> None:
    sent = lw.Message(written(codec, *shape), codec, "some bridge")
    found = lw.Message.from_bytes(sent.to_bytes())
    assert (found.codec, found.bridge) == (codec, "some bridge")
    assert found.latents.dtype == torch.float32
    assert found.latents.shape == sent.latents.shape
    worst = (found.latents - sent.latents).abs().amax((1, 2))
    assert (worst <= STEP[codec] * sent.latents.abs().amax((1, 2)) * 1.001).all()
    assert codec == "fp32" or worst.max() > 0


@pytest.mark.parametrize("codec", list(lw.CODECS))
@pytest.mark.parametrize("count", [1, 8, 33])
def test_bytes_are_counted_not_computed(codec: str, count: int) -> None:
    message = lw.Message(written(codec, 1, count), codec, "b")
    assert message.nbytes == len(message.to_bytes())


def test_the_same_message_is_the_same_bytes_every_time() -> None:
    message = lw.Message(latents(), "fp16", "b")
    assert len({message.to_bytes() for _ in range(64)}) == 1


def test_a_smaller_codec_makes_a_smaller_message() -> None:
    sizes = {codec: lw.Message(written(codec, 1, 32, 64), codec, "b").nbytes for codec in lw.CODECS}
    assert sizes["fp32"] - sizes["fp16"] == pytest.approx(2 * 32 * 64, abs=16)
    assert sizes["fp16"] - 2 * 32 * 64 < 300  # the header


def test_latents_that_require_grad_or_are_strided_can_be_sent() -> None:
    tensor = latents(1, 6, 4).transpose(1, 2).requires_grad_()
    found = lw.Message.from_bytes(lw.Message(tensor, "fp32", "b").to_bytes())
    assert torch.equal(found.latents, tensor.detach())
    assert not found.latents.requires_grad


def test_rows_are_one_message_each() -> None:
    whole = lw.Message(latents(3), "fp32", "b")
    rows = whole.rows()
    assert torch.equal(torch.cat([row.latents for row in rows]), whole.latents)
    assert [(row.latents.shape[0], row.codec, row.bridge) for row in rows] == [(1, "fp32", "b")] * 3


@pytest.mark.parametrize("codec", list(lw.CODECS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_the_codec_cannot_carry_are_refused_or_kept(codec: str, bad: float) -> None:
    """Never silently something else: the receiver would read infinity."""
    tensor = latents()
    tensor[0, 1, 2] = bad
    try:
        found = lw.Message.from_bytes(lw.Message(tensor, codec, "b").to_bytes()).latents
    except lw.LatentWireError:
        return
    assert found.isfinite().all()
    assert float(found[0, 1, 2]) == pytest.approx(bad, rel=0.01)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused() -> None:
    for place in range(len(SMALL)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            broken = bytearray(SMALL)
            broken[place] ^= flip
            assert_refused(bytes(broken))


def test_every_truncation_is_refused() -> None:
    for length in range(len(SMALL)):
        assert_refused(SMALL[:length])


@pytest.mark.parametrize("tail", [b"\0", b"x", SMALL])
def test_a_tail_is_refused(tail: bytes) -> None:
    assert "tail" in assert_refused(SMALL + tail)


@pytest.mark.parametrize(
    "data",
    [b"", b"L", b"LWIR", b"hello world, this is text", b"\0" * 200, bytes(range(256)), SMALL[1:], zlib.compress(SMALL),
     pickle.dumps([1.0] * 40), save({"latents": torch.zeros(1, 2, 3)}), b'{"latents": [[0, 1]]}', b"LWIR" * 60],
)  # fmt: skip
def test_foreign_bytes_are_refused(data: bytes) -> None:
    assert_refused(data)


@pytest.mark.parametrize("version", [0, 1, 65535])
def test_another_version_is_refused(version: int) -> None:
    assert version != lw.Message.VERSION
    assert f"version {version}" in assert_refused(SMALL[:4] + struct.pack("<H", version) + SMALL[6:])


def framed(body: bytes) -> bytes:
    """A right header, with the right sum, around any body."""
    message = lw.Message
    return message.HEADER.pack(message.MAGIC, message.VERSION, zlib.crc32(body), len(body)) + body


def notes() -> dict[str, str]:
    """What a real message of codec fp32 says beside its tensor."""
    body = lw.Message(latents(1, 1, 2), "fp32", "b").to_bytes()[lw.Message.HEADER.size :]
    return json.loads(body[8 : 8 + struct.unpack_from("<Q", body)[0]])["__metadata__"]


def tensors(value: torch.Tensor, name: str = "latents", codec: str = "fp32") -> bytes:
    return save({name: value}, metadata={key: text.replace("fp32", codec) for key, text in notes().items()})


BODIES = {
    "empty": b"",
    "short": b"abc",
    "noise": bytes(range(256)),
    "no JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "JSON, but no object": struct.pack("<Q", 8) + b"[1,2,3] " + bytes(8),
    "a length beyond the end": struct.pack("<Q", 2**60) + b"{}",
    "no notes": save({"latents": torch.zeros(1, 2, 3)}),
    "other notes": save({"latents": torch.zeros(1, 2, 3)}, metadata={"format": "pt"}),
    "another tensor": tensors(torch.zeros(1, 2, 3), "weights"),
    "a codec that is not known": tensors(torch.zeros(1, 2, 3), codec="fp39"),
    "two dimensions": tensors(torch.zeros(2, 3)),
    "whole numbers": tensors(torch.zeros(1, 2, 3, dtype=torch.int64)),
    "not a number": tensors(torch.full((1, 2, 3), torch.nan)),
    "no latents": tensors(torch.zeros(1, 0, 3)),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    """Its sum is right, so only reading it can tell."""
    assert_refused(framed(body))


def test_the_frame_used_above_is_the_real_one() -> None:
    assert framed(SMALL[lw.Message.HEADER.size :]) == SMALL
    lw.Message.from_bytes(framed(tensors(torch.zeros(1, 2, 3))))


# ---- the receiving side ------------------------------------------------------------------------------------------


@functools.cache
def listener(seed: int = 0) -> lw.Receiver:
    """An untrained bridge between two tiny models: enough to send and to read."""
    sender, receiver = lw.load_lm("tiny-llama", CPU), lw.load_lm("tiny-qwen", CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = lw.BridgeShape.of(lw.BridgeSettings(width=32, d_z=16, latent_len=4), sender, receiver)
        bridge = lw.Bridge(shape).eval()
    part = lw.Toy(lw.DataSettings(dataset="toy"))
    return lw.Receiver(lw.Prompting(receiver, part, part.anchor), bridge, 4)


@torch.no_grad()
def sent(text: str, ear: lw.Receiver) -> bytes:
    sender = lw.load_lm("tiny-llama", CPU)
    states = sender.states([lw.sender_ids(sender, text, 64)], ear.bridge.shape.layers)
    return ear.bridge.encode(states, ear.name).to_bytes()


def row(text: str = "") -> lw.Example:
    return lw.Example("0", text, "", ("a",), 0)


def test_a_message_of_another_bridge_is_refused() -> None:
    mine, other = listener(), listener(seed=1)
    assert mine.name != other.name
    assert mine.answers([row()], [sent("the sky", mine)])
    with pytest.raises(lw.LatentWireError, match=rf"{other.name}.*{mine.name}") as error:
        mine.answers([row(), row()], [sent("the sky", mine), sent("the sky", other)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 16), (1, 5, 16), (1, 4, 8), (1, 1, 16), (2, 4, 16), (0, 4, 16)])
def test_a_message_of_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    """One message, one example, exactly the bridge's latents: nothing is broadcast or answered twice."""
    ear = listener()
    with pytest.raises(lw.LatentWireError) as error:
        ear.answers([row()], [lw.Message(torch.randn(shape), "fp16", ear.name).to_bytes()])
    assert "\n" not in str(error.value)


def test_messages_and_examples_are_paired() -> None:
    ear = listener()
    message = sent("the sky", ear)
    for examples, data in (([row()], [message] * 2), ([row()] * 2, [message])):
        with pytest.raises((lw.LatentWireError, ValueError)):
            ear.answers(examples, data)


@pytest.mark.parametrize("data", [b"", b"no message"])
def test_an_empty_message_is_refused_even_after_asking_without_a_source(data: bytes) -> None:
    ear = listener()
    ear.answers([row()], None)
    with pytest.raises(lw.LatentWireError):
        ear.answers([row()], [data])


def test_the_receiver_hears_the_message_not_the_examples_text() -> None:
    ear = listener()
    first, second = sent("the sky is blue", ear), sent("zzzz 2018 !!", ear)
    assert ear.answers([row("one text")], [first]) == ear.answers([row("another, longer text")], [first])
    assert ear.answers([row()], [first]) != ear.answers([row()], [second])


@pytest.mark.parametrize(
    "text", ["Heliotrope quartz vexes jolly umbrellas in Reykjavik", "Straßenbahn №2018 überfüllt"]
)
def test_a_message_holds_neither_text_nor_label(text: str) -> None:
    data = sent(text, listener()).lower()
    for word in [text, *text.split(), "sentiment", "negative", "positive", "tiny-llama", "tiny-qwen"]:
        for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
            assert word.lower().encode(encoding) not in data, word
    ids = lw.load_lm("tiny-llama", CPU).ids(text)
    for kind in "BHIQ":
        assert struct.pack(f"<4{kind}", *ids[:4]) not in data


def test_a_message_is_as_long_for_a_long_text() -> None:
    assert len(sent("x", listener())) == len(sent("a much longer text, of many more words than the other", listener()))


# ---- another process ---------------------------------------------------------------------------------------------

RECEIVER_PROCESS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
import LATENTWIRE as lw

torch.set_num_threads(1)
loaded, real = [], lw.load_weights
lw.load_weights = lambda name, *rest: (loaded.append(name), real(name, *rest))[1]
bridge, settings, state = lw.open_bridge(Path(sys.argv[1]))
receiver = lw.load_lm(settings.receiver, settings)
part = lw.make_task(settings)
listener = lw.Receiver(lw.Prompting(receiver, part, state["task"]["anchor"]), bridge)
folder = Path(sys.argv[2])
data = [path.read_bytes() for path in sorted(folder.glob("*.message"))]
gold = json.loads((folder / "gold.json").read_text())
examples = [lw.Example(str(i), "", "", (word,)) for i, word in enumerate(gold)]  # no text ever gets here
answers = listener.answers(examples, data)
assert loaded == [settings.receiver] and settings.sender not in loaded, loaded
print(json.dumps([asdict(answer) for answer in answers]))
"""


@pytest.fixture(scope="module")
def channel(toy_run: Path) -> Any:
    settings = lw.EvalSettings(checkpoint=toy_run, device="cpu", state_cache="memory", num_samples=24)
    return lw.open_context(settings, lw.Checkpoint.open(toy_run))


@pytest.mark.trains
@pytest.mark.slow
def test_another_process_answers_from_the_bytes_alone(channel: lw.EvalContext, tmp_path: Path, toy_run: Path) -> None:
    here = lw.METHODS["bridge"](channel).answers(channel.examples)
    for number, data in enumerate(channel.messages):
        (tmp_path / f"{number:03}.message").write_bytes(data)
    (tmp_path / "gold.json").write_text(json.dumps([example.answers[0] for example in channel.examples]))
    command = [sys.executable, "-c", RECEIVER_PROCESS, str(lw.resolve_checkpoint(toy_run)), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert len({answer.text for answer in here}) > 1
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["text"] == mine.text
        assert theirs["scores"] == pytest.approx(mine.scores, abs=1e-5)
        assert theirs["nll_per_token"] == pytest.approx(mine.nll_per_token, abs=1e-5)
        assert (theirs["first_correct"], theirs["nbytes"]) == (mine.first_correct, mine.nbytes)


@pytest.mark.trains
def test_evaluated_messages_hold_no_text_and_are_counted(channel: lw.EvalContext) -> None:
    for example, data in zip(channel.examples, channel.messages, strict=True):
        assert example.context.encode() not in data
        assert lw.Message.from_bytes(data).bridge == channel.receiver.name
    sizes = [answer.nbytes for answer in lw.METHODS["bridge"](channel).answers(channel.examples[:3])]
    assert sizes == [len(data) for data in channel.messages[:3]]
