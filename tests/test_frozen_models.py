"""§6 and its caches: a frozen model is whole, is the one that was named, and says the same each time it is asked."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bridges import CPU, TEXTS, TINY_RUN, listener, packets, ready, rows, stirred, trainer
from test_survival import exit_code, forked

import LATENTWIRE as lw

LAYER = "model.layers.1.mlp.down_proj.weight"


def saved(name: str, folder: Path) -> Path:
    """A tiny model as ``save_pretrained`` leaves it."""
    model, tokenizer, _ = lw.load_weights(name, torch.float32, offline=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to."""
    return saved("tiny-llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(work: Callable[[], Any], *words: str) -> None:
    """``work`` ends with one line that holds these words."""
    with pytest.raises(lw.LatentWireError) as error:
        work()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    for word in words:
        assert word in text, (word, text)


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a model folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# ---- weights that are not all there --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["lm_head.weight", LAYER, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_folder_that_lacks_a_tensor_is_refused_by_its_name(lost: str, folder: Path) -> None:
    """M1: what is missing would be random, other at every load, and cached as the model's states."""
    edited(folder, lambda tensors: tensors.pop(lost))
    refused(lambda: lw.load_lm(str(folder), CPU), lost, str(folder))


def test_of_many_missing_tensors_five_are_named(folder: Path) -> None:
    """M1: a lost shard is hundreds of names."""
    lost = [name for name in load_file(folder / "model.safetensors") if "layers.1" in name]
    edited(folder, lambda tensors: [tensors.pop(name) for name in lost])
    with pytest.raises(lw.LatentWireError, match=str(len(lost))) as error:
        lw.load_lm(str(folder), CPU)
    assert sum(name in str(error.value) for name in lost) == 5


def test_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    """M1: a head that is the embedding table is nowhere in the file, and a folder with all its tensors loads."""
    folder = saved("tiny-gemma", tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    here, there = lw.load_lm(str(folder), CPU), lw.load_lm("tiny-gemma", CPU)
    assert all(torch.equal(a, b) for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "more",
    [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_tensors_that_the_config_does_not_know_are_refused_inside_the_blocks(more: str, folder: Path) -> None:
    """M1: a folder whose config says fewer layers, or another architecture, than its weights are for."""
    edited(folder, lambda tensors: tensors.update({more: torch.zeros(4)}))
    refused(lambda: lw.load_lm(str(folder), CPU), more)


@pytest.mark.parametrize(
    "more", ["vision_tower.layers.0.weight", "score.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_tensors_beside_the_blocks_do_no_harm(more: str, folder: Path) -> None:
    """M1: picture towers, other heads and old buffers are no reason to refuse a model."""
    edited(folder, lambda tensors: tensors.update({more: torch.zeros(4)}))
    assert lw.load_lm(str(folder), CPU).n_layers == 2


def test_a_model_with_holes_is_one_line_of_a_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """M1: told before there is a run folder."""
    edited(folder, lambda tensors: tensors.pop(LAYER))
    words = [*TINY_RUN, "--sender", str(folder), "--receiver", "tiny-qwen", "--output_dir", str(tmp_path / "run")]
    assert lw.main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and LAYER in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def gguf_model() -> tuple[Any, Any]:
    """A tiny model whose tokenizer a GGUF file can hold: the converter wants a merge."""
    pytest.importorskip("gguf")
    tokenizer = lw.byte_tokenizer(("<pad>", "<bos>", "<eos>"), [("t", "h")], add_bos=True)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return lw.random_model("LlamaConfig", 1, tokenizer, hidden_size=48, intermediate_size=96, **heads)


def write_gguf(made: tuple[Any, Any], path: Path, without: str = "nothing", parts: int = 0, scale: float = 1.0) -> Path:
    """The model as a GGUF file, without the tensors whose name holds a word; as the first of some ``parts``."""
    import gguf

    (model, tokenizer), path = made, Path(path)
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges(["t h"])
    for add, number in ((writer.add_pad_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(number)
    if parts:
        writer.add_uint16("split.count", parts)
        writer.add_uint16("split.no", 0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if without not in name:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), (tensor * scale).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("without", "parts"), [("layers.1", 0), ("layers.1", 2), ("lm_head", 2)])
def test_a_part_of_a_gguf_file_is_refused_and_not_cached(
    without: str, parts: int, gguf_model: Any, cache: Path, tmp_path: Path
) -> None:
    """M1: the first file of a split; the one that lacks only the head looks like a model with a tied head."""
    path = write_gguf(gguf_model, tmp_path / "m-00001-of-00002.gguf", without, parts)
    refused(lambda: lw.load_lm(str(path), CPU), "part" if parts else "layers.1")
    assert not list(cache.glob("models/*"))


# ---- which model it is -----------------------------------------------------------------------------------------------


def touched(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file in place and give it back its size's look: its times are what they were."""
    before, data = path.stat(), path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(change(data))
        stream.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_weight_edited_in_the_middle_is_another_model(folder: Path, cache: Path) -> None:
    """M3: of a file of 4 MiB the first and the last MiB stay, and so do its size and its times."""
    edited(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2**20)}))  # no tensor of the model
    before = [lw.load_lm(str(folder), CPU).revision for _ in range(2)]
    touched(folder / "model.safetensors", lambda data: data[: len(data) // 2] + b"\1" + data[len(data) // 2 + 1 :])
    after = lw.load_lm(str(folder), CPU).revision
    assert before[0] == before[1] != after


@pytest.mark.parametrize(
    "name",
    ["merges.txt", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "chat_template.jinja", "tokenizer.json",
     "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "config.json"],
)  # fmt: skip
def test_every_file_that_decides_on_tokens_or_states_counts(name: str, folder: Path, cache: Path) -> None:
    """M3: with another template or vocabulary the same weights read other ids."""
    path = folder / name
    if not path.exists():
        path.write_text("x y\n")
    before = lw.folder_revision(folder)
    path.write_text(path.read_text() + "\n")
    after = lw.folder_revision(folder)
    path.unlink()
    assert len({before, after, lw.folder_revision(folder)}) == 3


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "trainer_state.json", "training_args.bin", ".gitattributes"])
def test_what_decides_nothing_does_not_count(name: str, folder: Path, cache: Path) -> None:
    """M3: else a note beside a model would make its checkpoints strangers."""
    before = lw.folder_revision(folder)
    (folder / name).write_text("nothing that a model reads")
    assert lw.folder_revision(folder) == before


def test_sums_of_large_files_are_remembered(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M3: a second start does not read 16 GB again; a file that was just written is not trusted to stay."""
    path, read, plain = folder / "model.safetensors", [], lw.sha256_of

    def counting(path: Path) -> str:
        read.append(path.name)
        return plain(path)

    monkeypatch.setattr(lw, "sha256_of", counting)
    first = lw.folder_revision(folder)
    assert lw.folder_revision(folder) == first and read.count(path.name) == 2, "changed a moment ago: never remembered"
    before = os.stat
    old = 10**9 * 3600

    class Older:
        """Times of an hour ago."""

        def __init__(self, seen: os.stat_result) -> None:
            self.seen = seen

        def __getattr__(self, name: str) -> Any:
            value = getattr(self.seen, name)
            return (
                value - old
                if name in ("st_mtime_ns", "st_ctime_ns")
                else value - 3600
                if name.endswith("time")
                else value
            )

    monkeypatch.setattr(Path, "stat", lambda self, **options: Older(before(self, **options)))
    read.clear()
    assert [lw.folder_revision(folder) for _ in range(3)] == [first] * 3
    assert read.count(path.name) == 1


def test_a_gguf_files_revision_is_the_files_own(gguf_model: Any, cache: Path, tmp_path: Path) -> None:
    """M3: the dense copy depends on the library that made it, the model does not."""
    path = write_gguf(gguf_model, tmp_path / "a.gguf")
    first = lw.load_lm(str(path), CPU).revision
    shutil.rmtree(cache)
    assert lw.load_lm(str(path), CPU).revision == first
    assert lw.load_lm(str(write_gguf(gguf_model, tmp_path / "a.gguf", scale=1.5)), CPU).revision != first


# ---- caches that are not believed ------------------------------------------------------------------------------------


def weights_of(lm: lw.LM) -> list[torch.Tensor]:
    return [p.clone() for p in lm.model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("damage", ["other", "middle", "cut", "tokenizer", "more", "no sums"])
def test_a_damaged_dense_copy_of_a_gguf_file_is_made_anew(
    damage: str, gguf_model: Any, cache: Path, tmp_path: Path, llama: Path
) -> None:
    """M4: else another model put there trains under this one's name and revision."""
    path = write_gguf(gguf_model, tmp_path / "a.gguf")
    wanted = weights_of(lw.load_lm(str(path), CPU))
    (dense,) = (cache / "models").iterdir()
    before = {p.name for p in dense.iterdir()}
    if damage == "other":
        for name in ("model.safetensors", "config.json"):
            shutil.copy(llama / name, dense / name)
    elif damage == "middle":
        touched(dense / "model.safetensors", lambda data: data[:-5000] + b"\1\1\1\1" + data[-4996:])
    elif damage == "cut":
        touched(dense / "model.safetensors", lambda data: data[:-8])
    elif damage == "tokenizer":
        (dense / "tokenizer.json").unlink()
    elif damage == "more":
        (dense / "chat_template.jinja").write_text("{{ messages }}")
    else:
        for known in [p for p in dense.iterdir() if "sum" in p.name]:
            known.unlink()
        edited(dense, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert equal(weights_of(lw.load_lm(str(path), CPU)), wanted)
    assert {p.name for p in dense.iterdir()} == before


def collected(lm: lw.LM | None = None, limit: int = 40) -> lw.StateStore:
    """States of some texts from the disk's cache."""
    lm = lm or lw.load_lm("tiny-llama", CPU)
    return lw.collect_states(lm, TEXTS, [0, 1], limit, "disk", lambda done, total: None)


NOTES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not JSON": lambda notes: "{",
    "a list": lambda notes: [1],
    "null": lambda notes: None,
    "no shape": lambda notes: {k: v for k, v in notes.items() if k != "shape"},
    "a word for a shape": lambda notes: notes | {"shape": "abc"},
    "a shape of words": lambda notes: notes | {"shape": ["1", "2", "3"]},
    "a negative shape": lambda notes: notes | {"shape": [-n for n in notes["shape"]]},
    "layers and widths exchanged": lambda notes: (
        notes | {"shape": [notes["shape"][0], notes["shape"][2], notes["shape"][1]]}
    ),
    "no offsets": lambda notes: {k: v for k, v in notes.items() if k != "offsets"},
    "too few offsets": lambda notes: notes | {"offsets": notes["offsets"][:-1]},
    "offsets that shrink": lambda notes: notes | {"offsets": [0, 5, 3, *notes["offsets"][3:]]},
    "offsets beyond the file": lambda notes: notes | {"offsets": [*notes["offsets"][:-1], 10**12]},
    "offsets of words": lambda notes: notes | {"offsets": ["x"]},
    "a share that is none": lambda notes: notes | {"truncated": "all"},
    "deep": lambda notes: "[" * 100_000,
}


@pytest.mark.parametrize("damage", NOTES)
def test_damaged_notes_on_states_mean_computed_again(damage: str, cache: Path) -> None:
    """M4: never a traceback, never other states."""
    before = collected()
    wanted, offsets = before.flat.clone(), before.offsets.clone()
    path = next(cache.glob("states/*/notes.json"))
    whole = json.loads(path.read_text())
    told = NOTES[damage](whole)
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    for source in ("computed", "cached"):
        again = collected()
        assert again.source.startswith(source)
        assert (
            torch.equal(again.flat, wanted)
            and torch.equal(again.offsets, offsets)
            and again.truncated == before.truncated
        )
    assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize("damage", ["zeros", "middle", "longer", "shorter", "gone", "a folder"])
def test_damaged_states_are_computed_again(damage: str, cache: Path) -> None:
    """M4: a file of zeros of the right size was trained on; its times prove nothing."""
    wanted = collected().flat.clone()
    path = next(cache.glob("states/*/states.bin"))
    if damage in ("gone", "a folder"):
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    else:
        change: dict[str, Callable[[bytes], bytes]] = {
            "zeros": lambda data: bytes(len(data)),
            "middle": lambda data: data[:1000] + b"\1\2\3\4" + data[1004:],
            "longer": lambda data: data + b"\0" * 8,
            "shorter": lambda data: data[:-8],
        }
        touched(path, change[damage])
    again = collected()
    assert again.source == "computed" and torch.equal(again.flat, wanted)
    assert torch.equal(collected().flat, wanted)


def test_states_half_computed_are_not_believed_either(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M4: what a killed process left says 'done' of groups whose states are not there any more."""
    wanted = collected().flat.clone()
    shutil.rmtree(cache)
    plain = Path.rename

    def killed(self: Path, target: Any) -> Any:
        if self.parent.name == "states":
            raise KeyboardInterrupt
        return plain(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            collected()
    for path in cache.glob("states/.*/states.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(collected().flat, wanted)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
def test_caches_are_their_owners_alone(cache: Path, gguf_model: Any, tmp_path: Path) -> None:
    """M4: whatever the umask, nobody else may put a model or states there; what an older version left open is closed."""
    before = os.umask(0)
    try:
        collected()
        lw.load_lm(str(write_gguf(gguf_model, tmp_path / "a.gguf")), CPU)
    finally:
        os.umask(before)
    private = [cache / "states", cache / "models"]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in private] == [0o700] * 2
    (cache / "states").chmod(0o777)
    collected()
    assert stat.S_IMODE((cache / "states").stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_somebody_else_is_refused(cache: Path) -> None:
    """M4: its owner could change what is read at any time."""
    (cache / "states").mkdir(parents=True, mode=0o700)
    os.chown(cache / "states", 12345, 12345)
    refused(collected, "states", "LATENTWIRE_CACHE")
    shutil.rmtree(cache)
    (cache / "elsewhere").mkdir(parents=True)
    (cache / "states").symlink_to(cache / "elsewhere")
    os.chown(cache / "elsewhere", 12345, 12345)
    refused(collected, "states", "LATENTWIRE_CACHE")


# ---- the same answer each time ---------------------------------------------------------------------------------------

LORA = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--use_lora", "--lora_on", "both", "--lora_dropout", "0.4"]


def test_lora_drops_nothing_but_in_training() -> None:
    """M2: validation, messages, scores and words of one bridge are the same to the bit, and are those without dropout."""
    examples, heard = rows(TEXTS), []
    for flags in (LORA, LORA, [*LORA[:-2], "--lora_dropout", "0"]):
        made = stirred(ready(examples, *flags, "--lora_r", "4"))
        sent = packets(made, examples)
        answers = [
            [(a.text, a.scores, a.nll_per_token) for a in listener(made).answers(examples, sent)] for _ in range(2)
        ]
        assert answers[0] == answers[1]
        values = [made.validate() for _ in range(2)]  # leaves the bridge training
        assert values[0] == values[1]
        heard.append((sent, answers[0], values[0]))
    assert heard[0] == heard[1] == heard[2]


def test_lora_does_drop_in_training() -> None:
    """M2: switched off for good it would be no dropout; a step's gradients depend on it and on nothing else."""
    losses = []
    for rate in ("0.4", "0.4", "0"):
        made = stirred(ready(rows(TEXTS), *LORA[:-1], rate))
        made.bridge.train()
        losses.append(made.gradients(1, 4)["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.trains
def test_two_evaluations_of_one_checkpoint_are_equal_to_the_bit(tmp_path: Path, say: Callable[..., str]) -> None:
    """M2: label scores differed by up to 0.88 nats, 30 of 40 generations differed."""
    own = ["--lr", "3e-2", "--steps", "6", "--output_dir", tmp_path / "run"]
    say("train", *TINY_RUN, *LORA, *own)
    told = []
    for name in ("first", "second"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        say("eval", "--checkpoint", tmp_path / name, "--methods", "bridge", "--num_samples", "12", "--device", "cpu")
        found = lw.read_rows(tmp_path / name / "records.jsonl")
        told.append([[row.get("id"), row.get("scores"), row.get("text"), row.get("prediction")] for row in found])
    assert told[0] == told[1] and len(told[0]) >= 12
    assert re.search(r"\d", json.dumps(told[0]))


# ---- answers that were cut -------------------------------------------------------------------------------------------


def test_an_answer_that_was_cut_does_not_end() -> None:
    """M7: an end token behind the cut teaches the receiver to stop in the middle of a sentence."""
    made = trainer(rows(TEXTS), "--encoder", "byte", "--receiver", "tiny-qwen", "--max_answer_tokens", "4")
    prompting, lm = made.prompting, made.receiver
    end, whole = lm.tokenizer.eos_token_id, prompting.answer_token_ids("a long answer")
    assert prompting.answer_ids("a long answer") == whole[:4] and end not in whole
    short = prompting.answer_token_ids("a b")[:4]
    assert len(short) == 4 and prompting.answer_ids("a b") == [*short, end], "nothing of it was cut"


def test_what_is_scored_of_a_cut_answer_is_all_that_was_taught() -> None:
    """M7: nats per gold token, alignment and scores took the last id off, as if it were always the end."""
    own = [lw.Example(str(i), text, "", ("a long answer",), 0) for i, text in enumerate(TEXTS)]
    made = ready(
        own,
        "--encoder",
        "byte",
        "--receiver",
        "tiny-qwen",
        "--max_answer_tokens",
        "4",
        part=lw.QuestionAnswering(CPU_TASK),
    )
    heard = made.hear(own)
    with torch.no_grad():
        wanted = lw.supervise(made.receiver, heard.answered(heard.soft)).nats.view(len(own), 4).mean(1)
    told = listener(made).answers(own, packets(made, own))
    assert [answer.nll_per_token for answer in told] == pytest.approx(wanted.tolist(), rel=1e-3)


CPU_TASK = lw.TrainSettings(dataset="toy", protocol="question-agnostic")

# ---- models that read only so far, or in another way ----------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "OPTConfig": {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32,
                  "max_position_embeddings": 64},
    "GPTJConfig": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    "MptConfig": {"n_layers": 2, "d_model": 32, "n_heads": 2, "max_seq_len": 64},
    "CodeGenConfig": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}  # fmt: skip
STRANGERS: dict[str, dict[str, Any]] = {
    "MambaConfig": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 4},
    "RwkvConfig": {"num_hidden_layers": 2, "hidden_size": 32, "attention_hidden_size": 32, "context_length": 64},
    "Llama4TextConfig": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32,
                         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2},
    "OPTConfig": {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 16,
                  "do_layer_norm_before": False},
    "XLNetConfig": {"n_layer": 2, "d_model": 32, "n_head": 2},
}  # fmt: skip


def made_folder(family: str, sizes: dict[str, Any], folder: Path) -> str:
    """A tiny random model of a family, with byte tokens."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = lw.byte_tokenizer(("<pad>", "<bos>", "<eos>"), [], add_bos=True)
    config = getattr(transformers, family)(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


LONG = rows([f"{letter}{' and so on' * 20}" for letter in "abcd"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sender_reads_no_further_than_its_positions(family: str, tmp_path: Path) -> None:
    """M8: IndexError in training; the texts are cut and their share is known, as with --max_tokens."""
    name = made_folder(family, FAMILIES[family], tmp_path)
    made = ready(LONG, "--sender", name, "--encoder", "hidden", "--receiver", "tiny-qwen", "--max_tokens", "512")
    assert made.writer.store.truncated == 1.0 and int(made.writer.store.offsets.diff().max()) == 64
    assert len(packets(made, LONG)) == 4


def test_a_sentence_encoder_reads_no_further_than_its_positions(tmp_path: Path) -> None:
    """M8, J10: stq with more tokens than the encoder has positions, which its own first and last token share."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "and", "so", "on", "a"]
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    made = ready(
        LONG, "--encoder", "stq", "--sentence_model", str(tmp_path), "--receiver", "tiny-qwen", "--max_tokens", "512"
    )
    assert made.writer.store.truncated == 1.0 and int(made.writer.store.offsets.diff().max()) == 15


def test_a_prompt_longer_than_the_receivers_positions_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """M8: 64 soft tokens, an anchor and an answer are more than 64 positions; told before there is a run folder."""
    name = made_folder("GPT2Config", FAMILIES["GPT2Config"], tmp_path / "model")
    words = [*TINY_RUN, "--sender", "tiny-llama", "--receiver", name, "--latent_len", "64"]
    assert lw.main(["train", *words, "--output_dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "64" in told and "positions" in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.trains
def test_a_receiver_with_few_positions_is_trained_and_evaluated(tmp_path: Path, say: Callable[..., str]) -> None:
    """M8: it crashed in evaluation, after training, where a row's text is longer than it can read: the text is cut."""
    name = made_folder("GPT2Config", FAMILIES["GPT2Config"], tmp_path / "model")
    table = "text,label\n" + "".join(
        f"{i} {'and so on ' * (1 + i % 12)},{'yes' if i % 2 else 'no'}\n" for i in range(80)
    )
    (tmp_path / "own.csv").write_text(table)
    own = ["--dataset", tmp_path / "own.csv", "--sender", "tiny-llama", "--receiver", name, "--latent_len", "4"]
    say("train", *TINY_RUN, *own, "--steps", "2", "--output_dir", tmp_path / "run")
    say("eval", "--checkpoint", tmp_path / "run", "--methods", "bridge,text", "--device", "cpu")
    found = lw.read_rows(tmp_path / "run" / "records.jsonl")
    assert {row["method"] for row in found} == {"bridge", "text"}
    assert not [row["error"] for row in found if "error" in row]


@pytest.mark.trains
def test_long_questions_leave_room_for_latents_and_answers(tmp_path: Path, say: Callable[..., str]) -> None:
    """M8: where the receiver is told the question, neither the latents nor the answer beside it were counted."""
    name = made_folder("GPT2Config", FAMILIES["GPT2Config"], tmp_path / "model")
    table = [
        {"context": f"the sky of {i}", "question": "what is it, " * (1 + i % 7), "answer": f"a word or two of {i}"}
        for i in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    own = ["--dataset", tmp_path / "own.jsonl", "--sender", "tiny-llama", "--receiver", name, "--latent_len", "16"]
    own += ["--protocol", "question-agnostic", "--max_answer_tokens", "20", "--kd_weight", "1"]
    say("train", *TINY_RUN, *own, "--steps", "2", "--output_dir", tmp_path / "run")
    say("eval", "--checkpoint", tmp_path / "run", "--methods", "bridge,text", "--device", "cpu")
    assert not [row["error"] for row in lw.read_rows(tmp_path / "run" / "records.jsonl") if "error" in row]


@pytest.mark.parametrize(
    "flags",
    [
        ("--pooler", "window", "--ratio", "1,4"),
        ("--pooler", "shared_private", "--latent_shared_len", "40", "--latent_private_len", "20"),
        ("--reconstruction_weight", "1", "--language_tokens", "60"),
    ],
)
def test_however_long_a_message_grows_the_receiver_must_have_room(
    flags: tuple[str, ...], tmp_path: Path, refuse
) -> None:
    """M8: only --latent_len was counted."""
    name = made_folder("GPT2Config", FAMILIES["GPT2Config"], tmp_path / "model")
    words = [*TINY_RUN, "--sender", "tiny-llama", "--receiver", name, *flags, "--output_dir", tmp_path / "run"]
    assert "64 positions" in refuse("train", *words) and not (tmp_path / "run").exists()


@pytest.mark.trains
def test_lora_drops_where_a_layer_gets_all_tokens_in_one_row(tmp_path: Path, say: Callable[..., str]) -> None:
    """M2: OPT flattens its rows before fc1, and training ended in a traceback."""
    name = made_folder("OPTConfig", FAMILIES["OPTConfig"], tmp_path / "model")
    own = [
        "--sender",
        "tiny-llama",
        "--receiver",
        name,
        "--latent_len",
        "2",
        "--use_lora",
        "--lora_target_modules",
        "fc1",
    ]
    say("train", *TINY_RUN, *own, "--lora_dropout", "0.1", "--steps", "2", "--output_dir", tmp_path / "run")
    lm = lw.load_lm(name, CPU)
    layer = lw.LoraDropout(lm, 0.5, 0)
    values, mask = torch.randn(6, 4), torch.ones(2, 3, dtype=torch.bool)
    lm.dropping = (mask, (1, 2))
    torch.testing.assert_close(layer(values), layer(values.view(2, 3, 4)).view(6, 4))
    with pytest.raises(lw.LatentWireError, match="mixes tokens of all texts"):
        layer(torch.randn(5, 4))


def test_masks_that_older_files_kept_are_no_other_architecture(tmp_path: Path) -> None:
    """M1: GPT-Neo's causal mask stood among its weights once; the library leaves it aside."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    name = made_folder("GPTNeoConfig", sizes | {"max_position_embeddings": 64}, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {f"transformer.h.{i}.attn.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert lw.load_lm(name, CPU).n_layers == 2


def test_positions_that_begin_behind_the_padding_are_not_there_twice(tmp_path: Path) -> None:
    """M8, J10: MPNet's are numbered as RoBERTa's are, and its name does not say so; special tokens in a text are text."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "and", "so", "on", "a"]
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    config = transformers.MPNetConfig(vocab_size=len(words), max_position_embeddings=18, **sizes)
    transformers.MPNetModel(config).save_pretrained(tmp_path)
    reader = lw.SentenceReader(str(tmp_path), torch.device("cpu"), offline=True)
    assert reader.most == 15
    assert reader.states([[*reader.bos, *reader.ids("and so on " * 9)][: reader.most]], [0]).hidden.shape[2] == 15
    assert not {0, 2} & {*reader.ids("a [SEP] and [CLS]")}


ODD_CONFIGS = [
    "[]",
    '{"model_type": "llama", "hidden_size": "abc"}',
    '{"model_type": "llama", "num_attention_heads": 0}',
]


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_odd_configs_are_one_line(config: str, tmp_path: Path) -> None:
    """J9: other exceptions of the library went through as tracebacks."""
    saved("tiny-llama", tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(lw.LatentWireError):
        lw.load_lm(str(tmp_path), CPU)
    with pytest.raises(lw.LatentWireError, match="--sentence_model"):
        lw.SentenceReader(str(tmp_path), torch.device("cpu"), offline=True)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M3: the sum of a model folder needed one, and so did states that stay in memory."""
    saved("tiny-llama", tmp_path)
    monkeypatch.setenv("LATENTWIRE_CACHE", "/proc/nowhere")
    assert len(lw.load_lm(str(tmp_path), CPU).identity()["revision"]) >= 12
    reader = lw.ByteReader(torch.device("cpu"))
    assert lw.collect_states(reader, ["a text"], [0], 64, "disk", lambda *_: None).source == "computed"


def test_rows_without_tokens_are_ids_all_the_same() -> None:
    ids, mask = lw.pad_rows([[], []], 0, torch.device("cpu"))
    assert (ids.dtype, mask.dtype, ids.shape) == (torch.long, torch.bool, (2, 0))


@pytest.mark.parametrize("family", STRANGERS)
def test_a_model_that_cannot_be_read_our_way_is_refused_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    """M8: no attention cache, embeddings of another width than its states, no causal order: one line, no traceback."""
    name = made_folder(family, STRANGERS[family], tmp_path)
    refused(lambda: lw.load_lm(name, CPU), name, " here")


# ---- chat frames -------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
CROOKED = {
    "needs a system turn": "{% if messages[0].role != 'system' %}{{ raise_exception('first a system turn') }}{% endif %}"
    + CHAT,
    "takes parts only": "{% for m in messages %}<u>{{ m.content[0].text }}</u>{% endfor %}<a>",
    "adds to the words": "{% for m in messages %}{{ m.content + 1 }}{% endfor %}<a>",
    "repeats the content": "{% for m in messages %}{{ m.content }} and again {{ m.content }}{% endfor %}<a>",
    "leaves the content out": "{% for m in messages %}<u></u>{% endfor %}<a>",
    "malformed": "{% for m in messages %}{{ m.content }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHAT,
    "divides by nothing": "{{ 1 // 0 }}" + CHAT,
    "takes all memory": "{{ 'x' * 10**15 }}" + CHAT,
    "deep": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}" + CHAT,
}


def talking(folder: Path, template: str) -> str:
    """A model folder with a chat template."""
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "endless" else k for k in CROOKED])
def test_a_template_that_makes_no_frame_is_refused_in_one_line(
    kind: str, folder: Path, cache: Path, tmp_path: Path
) -> None:
    """M9: four kinds were tracebacks and nested loops never ended."""
    lm = lw.load_lm(talking(folder, CROOKED[kind]), CPU)

    def work() -> int:
        refused(lm.chat_frame, str(folder), "template")
        deadline = time.monotonic() + 5
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        return threading.active_count() - 1  # none goes on behind the refusal

    code = exit_code(forked(work, tmp_path / "log"), patience=25)  # a process of its own: it may never end
    assert code == 0, (tmp_path / "log").read_text()[-600:]


def test_a_template_that_is_in_order_makes_a_frame(folder: Path, cache: Path) -> None:
    """M9: the same words before and after whatever is said."""
    lm = lw.load_lm(talking(folder, CHAT), CPU)
    assert lm.chat_frame() == (lm.ids("<u>"), lm.ids("</u><a>"))


@pytest.mark.trains
def test_the_frame_is_the_checkpoints_own(
    folder: Path, tmp_path: Path, cache: Path, say: Callable[..., str], monkeypatch: Any
) -> None:
    """M9: a template that prints the time drifts between training and evaluation."""
    name = talking(folder, "{{ strftime_now('%H:%M:%S.%f') }}" + CHAT)
    flags = ["--sender", "tiny-qwen", "--receiver", name, "--anchor_mode", "chat", "--steps", "2"]
    say("train", *TINY_RUN, *flags, "--output_dir", tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoint/best/state.json").read_text())
    (frame,) = state["task"]["frames"].values()
    assert len(frame) == 2
    seen = []
    plain = lw.Prompting.joined

    def joining(self: lw.Prompting, *given: Any, **named: Any) -> lw.Packed:
        seen.append(self.frame)
        return plain(self, *given, **named)

    monkeypatch.setattr(lw.Prompting, "joined", joining)
    say("eval", "--checkpoint", tmp_path / "run", "--methods", "bridge", "--num_samples", "4", "--device", "cpu")
    say("answer", "--checkpoint", tmp_path / "run", encoded(tmp_path, say))
    assert seen and {json.dumps(frame) for frame in seen} == {json.dumps(frame)}


def encoded(tmp_path: Path, say: Callable[..., str]) -> Path:
    """A message from the run."""
    path = tmp_path / "message.wire"
    path.write_bytes(lw.encode_text(tmp_path / "run", "some text"))
    return path


def test_an_empty_gold_answer_in_chat_mode_is_scored(folder: Path, cache: Path) -> None:
    """M9: IndexError; what is said of nothing is the end token."""
    own = [lw.Example("0", "a text", "", ("",), 0), lw.Example("1", "a text", "", ("b",), 1)]
    flags = ["--encoder", "byte", "--receiver", talking(folder, CHAT), "--anchor_mode", "chat"]
    made = ready(own, *flags, part=lw.QuestionAnswering(CPU_TASK), own=True)
    told = listener(made).answers(own, packets(made, own))
    assert all(answer.nll_per_token is not None and answer.nll_per_token > 0 for answer in told)


# ---- several at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", ["one", "many"])
def test_all_who_use_an_empty_cache_at_once_succeed(owners: str, cache: Path, tmp_path: Path) -> None:
    """M10: 119 of 160 died that were started for the same run folder, 2 of 160 of different ones."""
    lm = lw.load_lm("tiny-llama", CPU)
    for attempt in range(3):
        start = time.monotonic() + 0.3

        def work(number: int, start: float = start, attempt: int = attempt) -> int:
            time.sleep(max(0.0, start - time.monotonic()))
            owner = tmp_path / ("owner" if owners == "one" else str(number))
            store = lw.collect_states(lm, [*TEXTS, str(attempt)], [1], 40, "disk", lambda done, total: None, owner)
            return 0 if len(store.flat) == int(store.offsets[-1]) and bool(store.flat.abs().sum(-1).all()) else 7

        pids = [forked(lambda number=number: work(number), tmp_path / f"log{number}") for number in range(8)]
        codes = [exit_code(pid) for pid in pids]
        assert codes == [0] * 8, [(tmp_path / f"log{i}").read_text()[-400:] for i, code in enumerate(codes) if code]
    left = [path for path in (cache / "states").iterdir() if path.name.startswith(".")]
    assert left == []


def test_all_who_convert_a_model_at_once_succeed(gguf_model: Any, cache: Path, tmp_path: Path) -> None:
    """M10: a sibling; each renamed the other's finished copy away."""
    path = write_gguf(gguf_model, tmp_path / "a.gguf")
    lw.gguf_to_dense([path], "warm")  # imports

    def work() -> int:
        found = lw.gguf_to_dense([path], "a")
        return 0 if {"config.json", "model.safetensors"} <= {p.name for p in found.iterdir()} else 7

    pids = [forked(work, tmp_path / f"log{number}") for number in range(6)]
    codes = [exit_code(pid) for pid in pids]
    assert codes == [0] * 6, [(tmp_path / f"log{i}").read_text()[-400:] for i, code in enumerate(codes) if code]


def test_a_gguf_file_is_put_into_the_dtype_of_its_use_once(
    gguf_model: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy holds the bits that converting at each load gave, and is the same model to what refers to it."""
    path = write_gguf(gguf_model, tmp_path / "a.gguf")
    full, _, revision = lw.load_weights(str(path), torch.float32, offline=True)
    half, _, same = lw.load_weights(str(path), torch.bfloat16, offline=True)
    assert revision == same
    assert full.state_dict().keys() == half.state_dict().keys()
    for weight, rounded in zip(full.state_dict().values(), half.state_dict().values(), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(weight.bfloat16(), rounded)
    names = [folder.name for folder in sorted((cache / "models").glob("a-*"))]
    assert names == [f"a-{revision}", f"a-{revision}-bfloat16"]
    monkeypatch.setattr(lw, "convert_dtype", lambda *_: pytest.fail("made again"))
    again, _, _ = lw.load_weights(str(path), torch.bfloat16, offline=True)
    assert all(map(torch.equal, half.state_dict().values(), again.state_dict().values()))


# ---- windows that cost nothing -------------------------------------------------------------------------------------------


def test_spans_are_cut_once_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """M11: with byte tokens most of a step was tokenising its texts again for where their tokens stand."""
    flags = [
        "--encoder",
        "hidden",
        "--sender",
        "tiny-llama",
        "--receiver",
        "tiny-qwen",
        "--pooler",
        "window",
        "--init",
        "copy",
    ]
    made = ready(rows(TEXTS), *flags, "--ratio", "2", "--d_z", "64", "--windows_on", "receiver")
    read, plain = [], lw.LM.pieces

    def counting(self: lw.LM, text: str) -> Any:
        read.append(text)
        return plain(self, text)

    monkeypatch.setattr(lw.LM, "pieces", counting)
    made.bridge.train()
    for step in (1, 2, 3):
        made.gradients(step, 2)
    made.validate()
    assert read == []


@pytest.mark.parametrize("tokens", [3000])
def test_windows_of_a_long_text_take_little_memory(tokens: int) -> None:
    """M11: tables of every window by every token: 8 texts of 3,000 bytes took 8 x 1,500 x 3,000 numbers, several times."""
    text = rows([("abcdefgh ijk " * (tokens // 13))] * 8)
    flags = ["--encoder", "byte", "--receiver", "tiny-llama", "--pooler", "window", "--init", "copy", "--d_z", "48"]
    made = ready(text, *flags, "--ratio", "2", "--windows_on", "receiver", "--max_bytes", "4000")
    started = time.process_time()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        made.bridge.windows(made.writer.states([e.context for e in text]))
    largest = max(abs(event.self_cpu_memory_usage) for event in seen.key_averages())
    assert largest < 400e6, f"{largest / 1e6:.0f} MB"  # 1,185 before; one table of windows by tokens is 144
    assert time.process_time() - started < 5


# ---- every combination that is accepted works --------------------------------------------------------------------------------


@pytest.mark.trains
def test_private_latents_are_evaluated_with_their_attention(tmp_path: Path, say: Callable[..., str]) -> None:
    """J8: torch.stack of unequal K, before results.json."""
    from safetensors import safe_open

    flags = ["--sender", "tiny-llama", "--receivers", "tiny-qwen,tiny-gemma", "--pooler", "shared_private"]
    sizes = ["--latent_shared_len", "5", "--latent_private_len", "3", "--steps", "2"]
    say("train", *TINY_RUN, *flags, *sizes, "--output_dir", tmp_path / "run")
    say("eval", "--checkpoint", tmp_path / "run", "--methods", "bridge", "--num_samples", "6", "--device", "cpu")
    for path in sorted((tmp_path / "run").rglob("artifacts*.safetensors")):
        with safe_open(path, "pt") as opened:
            attention = opened.get_tensor("attention")
        assert attention.shape[:4] == (6, 1, 2, 8)  # rows, blocks, heads, K
        assert torch.allclose(attention.float().sum(-1), torch.ones(()), atol=1e-2)


@pytest.mark.trains
def test_a_rival_that_diverged_is_not_trained_again(tmp_path: Path, say: Callable[..., str], monkeypatch: Any) -> None:
    """J8: a cached_property that raises is no cache: every batch trained it anew."""
    tried, plain = [], lw.TunedMethod.fit

    def counting(self: lw.TunedMethod, rate: float) -> Any:
        tried.append(rate)
        return math.nan, plain(self, rate)[1]

    monkeypatch.setattr(lw.TunedMethod, "fit", counting)
    own = [
        "--dataset",
        "toy",
        "--sender",
        "tiny-llama",
        "--receiver",
        "tiny-qwen",
        "--methods",
        "prompt_tuning",
        "--rival_lrs",
        "1,2",
        "--rival_steps",
        "1",
    ]
    rest = ["--num_samples", "12", "--batch_size", "4", "--device", "cpu", "--output_dir", tmp_path / "rivals"]
    lw.main(["baseline", *map(str, [*own, *rest])])
    assert tried == [1.0, 2.0]
    found = [row for path in (tmp_path / "rivals").rglob("records.jsonl") for row in lw.read_rows(path)]
    assert len(found) == 12 and all("diverged" in row["error"] for row in found)


BESIDE = {
    "ratio": ["--pooler", "window", "--init", "copy", "--ratio", "4", "--d_z", "64"],
    "private latents": ["--pooler", "shared_private", "--latent_shared_len", "5", "--latent_private_len", "3"],
    "auto": ["--batch_size", "auto"],
}


@pytest.mark.trains
@pytest.mark.parametrize("kind", BESIDE)
def test_the_linear_bridge_stands_beside_every_run(kind: str, tmp_path: Path, say: Callable[..., str]) -> None:
    """J8: only error rows beside --ratio, private latents and --batch_size auto."""
    flags = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--steps", "2", *BESIDE[kind]]
    say("train", *TINY_RUN, *flags, "--output_dir", tmp_path / "run")
    lw.main(
        [
            "eval",
            "--checkpoint",
            str(tmp_path / "run"),
            "--methods",
            "linear_bridge",
            "--num_samples",
            "6",
            "--device",
            "cpu",
        ]
    )
    found = lw.read_rows(tmp_path / "run" / "records.jsonl")
    assert [row.get("error") for row in found] == [None] * 6


def test_names_of_parts_are_normalised() -> None:
    """J8: --encoder prompt stayed a second name of the constant encoder, with another run folder and other answers to ==."""
    spelled = [lw.resolve(lw.settings_from(lw.TrainSettings, [*TINY_RUN, "--receiver", "tiny-qwen", "--encoder", name])[0])[0]
               for name in ("prompt", "constant")]  # fmt: skip
    assert [one.encoder for one in spelled] == ["constant"] * 2
    assert spelled[0].digest() == spelled[1].digest()
    for registry, field in itertools.product((lw.ENCODERS, lw.POOLERS, lw.ADAPTERS), ("encoder", "pooler", "adapter")):
        for alias, name in registry.aliases.items() if registry.noun == field else ():
            one = lw.TrainSettings(dataset="toy", sender="tiny-llama", receiver="tiny-qwen", **{field: alias})
            assert getattr(lw.resolve(one)[0], field) == name
