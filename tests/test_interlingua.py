"""The interlingua at work: the documents' commands, encode and answer, stages, mixtures, arms, decoding, diagnostics."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import contents, edit_state

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
DATA = ROOT.parent / "shared" / "data"
PAIR = ("tiny-qwen", "tiny-llama")
SIZE = [
    "--device", "cpu", "--state_cache", "memory", "--latent_len", "6", "--d_z", "32", "--width", "32", "--heads", "2",
    "--depth", "1", "--batch_size", "8",
]  # fmt: skip
TINY = ["--receivers", ",".join(PAIR), *SIZE]
Say = Callable[..., str]
pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line that must succeed; → what it printed."""

    def run(*words: Any) -> str:
        code = lw.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line that must be refused with exit code 2; → its one line on stderr."""

    def run(*words: Any) -> str:
        code = lw.main([str(word) for word in words])
        line = capfd.readouterr().err
        assert code == 2, words
        assert re.fullmatch(r"error: \S.*\n", line), line
        return line

    return run


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions about who has what; answers are free."""
    names, colours, things = (
        ("Anna", "Ben", "Carl"),
        ("red", "blue", "green", "black", "white"),
        ("hat", "cup", "car", "pen"),
    )
    rows = [(names[i % 3], f"{colours[i % 5]} {things[i % 4]}", i) for i in range(60)]
    path = tmp_path_factory.mktemp("owners") / "owners.jsonl"
    lines = [
        {"context": f"{who} has a {what}, number {i}.", "question": f"What has {who}?", "answer": what}
        for who, what, i in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trained(data: Path | str, folder: Path, *flags: str) -> Path:
    lw.train_main([*TINY, "--dataset", str(data), "--val_samples", "4", "--output_dir", str(folder), *flags])
    return folder


@pytest.fixture(scope="module")
def duo(owners: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with two receivers whose sender sees the question. Read-only."""
    folder = trained(owners, tmp_path_factory.mktemp("duo") / "run", "--steps", "3", "--append_bos_after_prefix", "yes")
    before = contents(folder)
    yield folder
    assert contents(folder) == before, "a test wrote into the shared run; it must work on a copy"


@pytest.fixture(scope="module")
def agnostic(owners: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but the receiver is asked. Read-only."""
    return trained(
        owners, tmp_path_factory.mktemp("agnostic") / "run", "--steps", "3", "--protocol", "question-agnostic"
    )


def evaluate(run: Path, out: Path | str, *flags: str) -> dict[str, Any]:
    return lw.eval_main(["--checkpoint", str(run), "--num_samples", "8", "--output_dir", str(out), *flags])


def records(folder: Path | str, receiver: str = "tiny-qwen") -> dict[str, dict[str, dict[str, Any]]]:
    """An evaluation's records by method and example, without times, keys, and the sums over all that."""
    name = "results.json" if receiver == PAIR[0] else f"results-{receiver}.json"
    keys = json.loads(Path(folder, name).read_text())["provenance"]["record_keys"]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in lw.read_rows(Path(folder, "records.jsonl")):
        if row["key"] == keys.get(row["method"]):
            mine = {name: value for name, value in row.items() if name not in ("seconds", "key", "sum")}
            found.setdefault(row["method"], {})[row["id"]] = mine
    return found


def channel_of(run: Path, receiver: str = "tiny-qwen", **asked: Any) -> lw.EvalContext:
    settings = lw.EvalSettings(checkpoint=run, num_samples=asked.pop("num_samples", 8), state_cache="memory", **asked)
    return lw.open_context(settings, lw.Checkpoint.open(run), PAIR.index(receiver))


# ---- the documents' commands, run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of real data sets, in Hub schema."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}")
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("data")
    for name, count in {"squad/train": 40, "squad/validation": 8, "gsm8k/train": 40, "gsm8k/test": 12}.items():
        first = next(parquet.ParquetFile(DATA / f"{name}.parquet").iter_batches(batch_size=count))
        (folder / name).parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_batches([first]), folder / f"{name}.parquet")
    return folder


CORE = (
    "--llama_id tiny-llama --qwen_id tiny-qwen --samples 8 --epochs 1 --batch_size 64 --latent_len 32 --d_z 256 "
    "--dataset squad --K 4 --first_token_ce_weight 0.5 --warm_anchor_text 'Answer: ' --save_dir runs/experiment_1"
)
PLAIN = "--samples 8 --steps 2 --save_dir runs/my_run"
SMOKE = f"{PLAIN} --receivers tiny-llama,tiny-qwen"
CLI_EVAL = "latentwire.cli.eval --ckpt runs/my_run/ckpt --dataset squad --samples 200"
FULL = {
    "dataset": "squad", "samples": 87599, "epochs": 24, "batch_size": 64, "latent_len": 32, "d_z": 256,
    "encoder_type": "byte", "lr": 1e-4, "warmup_steps": 500, "first_token_ce_weight": 0.5, "k_token_ce": 4, "kd_tau": 1.0,
    "calibration": "embed_rms", "anchor_text": "Answer: ", "append_bos_after_prefix": True, "eval_samples": 200,
    "eval_seeds": [42, 123, 456],
}  # fmt: skip
MODEL = {
    "source_model": "tiny-llama", "target_model": "tiny-qwen", "calibration": "embed_rms", "anchor_text": "Answer: ",
    "append_bos_after_prefix": True, "first_token_top_p": 0.95, "first_token_temperature": 0.7, "eos_ban_steps": 4,
}  # fmt: skip
MINIMAL = {"dataset": "squad", "samples": 1000, "epochs": 1, "batch_size": 8, "latent_len": 32}
COMMANDS = {  # id: train, eval, settings that must have arrived; model names and sizes are this test's
    "003": (
        f"latentwire/train.py {CORE}",
        "latentwire/eval.py --ckpt runs/experiment_*/epoch24 --samples 200 --dataset squad --calibration embed_rms "
        "--latent_anchor_text 'Answer: '",
        {
            "encoder": "byte",
            "pooler": "window",
            "init": "copy",
            "k_token_ce": 4,
            "receivers": ["tiny-llama", "tiny-qwen"],
        },
    ),
    "004": (
        "train --dataset squad --epochs 24 --latent_len 32 --samples 4 --receivers tiny-llama,tiny-qwen",
        "eval --checkpoint runs/checkpoint --samples 200",
        {"latent_len": 32, "epochs": 24.0, "d_z": 256},
    ),
    "002-lora": (
        f"latentwire/train.py --config configs/smoke/lora.json --use_lora --lora_r 16 --lora_alpha 32 {SMOKE}",
        CLI_EVAL,
        {"lora_r": 16, "lora_alpha": 32.0, "use_lora": True},
    ),
    "002-gist": (
        f"latentwire/train.py --config configs/smoke/gist_head.json --use_gist_head --gist_weight 0.1 --gist_target_len 48 {SMOKE}",
        CLI_EVAL,
        {"gist_target_len": 48, "gist_weight": 0.1},
    ),
    "002-deep": (
        f"latentwire/train.py --config configs/smoke/deep_prefix.json --use_deep_prefix --prefix_len 10 {SMOKE}",
        CLI_EVAL,
        {"deep_prefix_len": 10},
    ),
    "002-base": (
        f"latentwire.cli.train --config configs/smoke/base.json {SMOKE} --debug --profile_memory --log_shapes",
        CLI_EVAL,
        {"pooler": "window", "encoder": "byte", "debug": True, "profile_memory": True, "log_shapes": True},
    ),
    "004-full": (f"train --config full.json {SMOKE}", CLI_EVAL, {"warmup_steps": 500, "batch_size": 64}),
    "004-model": (
        f"train --config model.json --dataset squad {PLAIN}",
        CLI_EVAL,
        {"sender": "tiny-llama", "eos_ban_steps": 4},
    ),
    "004-minimal": (f"train --config minimal.json {SMOKE}", CLI_EVAL, {"batch_size": 8, "encoder": "byte"}),
}
QUICK = ("003",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_the_documents_commands_run(name, published, say):
    for file, tree in (("full", FULL), ("model", MODEL), ("minimal", MINIMAL)):
        Path(f"{file}.json").write_text(json.dumps(tree))
    train, evaluation, settings = COMMANDS[name]
    small = ["--val_samples", "4", "--width", "32", "--heads", "2", "--depth", "1", "--max_bytes", "256"]
    said = say(*shlex.split(train), "--data_dir", published, "--device", "cpu", *small)
    (run,) = Path("runs").iterdir()
    saved = json.loads((run / "checkpoint" / "best" / "state.json").read_text())["settings"]
    assert {key: saved[key] for key in settings} == settings
    log = lw.read_rows(run / "diagnostics.jsonl")
    assert all({"step", "loss", "first_acc"} <= row.keys() for row in log)
    assert ("shapes: States.hidden (" in said) == ("--log_shapes" in train)
    assert any(name.startswith("grad_ears") for name in log[0]) == ("--debug" in train)
    assert ("peak_memory_bytes" in log[0]) == ("--profile_memory" in train)
    shown = say(*shlex.split(evaluation), "--device", "cpu", "--max_new_tokens", "2")
    results = json.loads((run / "results.json").read_text())
    assert (results["dataset"], results["n"], results["split"]) == ("squad", 8, "test")
    assert {"bridge", "control:zero", "control:none", "token_budget", "text"} <= results["methods"].keys()
    assert all(summary["errors"] == 0 for summary in results["methods"].values())
    assert "receivers together" in shown or settings.get("sender")
    assert "compression: " in shown


@pytest.mark.slow
def test_the_documents_python_examples(published, say):
    small = ["--data_dir", str(published), "--device", "cpu", "--val_samples", "4", "--max_bytes", "256"]
    train = ["--llama_id", "tiny-llama", "--samples", "16", "--epochs", "3", "--batch_size", "8", "--latent_len", "32"]
    lw.train_main([*train, "--d_z", "256", "--dataset", "squad", *small, "--output_dir", "runs/my_run"])
    asked = ["--ckpt", "runs/my_run/epoch3", "--samples", "200", "--dataset", "squad", "--fresh_eval"]
    results = lw.eval_main([*asked, "--data_dir", str(published), "--max_new_tokens", "4"])
    assert re.fullmatch(r"F1 Score: \d\.\d{4}", f"F1 Score: {results['latent']['f1']:.4f}")
    assert results["latent"] == results["methods"]["bridge"]
    diagnostics = [json.loads(line) for line in Path("runs/my_run/diagnostics.jsonl").read_text().splitlines()]
    assert [d["step"] for d in diagnostics] == [1, 2, 3, 4, 5, 6]
    shown = say("scripts/compare_baselines.py", "--latent", "runs/my_run/eval.json", "--text", "runs/my_run/eval.json")
    assert "latent bridge" in shown and "full text" in shown and "n 8" in shown


# ---- encode and answer ---------------------------------------------------------------------------------------------------


def wired(run: Path, example: lw.Example, question: str) -> None:
    Path("said.txt").write_text(example.context, encoding="utf-8")
    asked = ["--question", question] if question else []
    assert lw.main(["encode", "said.txt", "--checkpoint", str(run), "-o", "a.wire", *asked]) == 0
    assert lw.main(["encode", "--text", example.context, "--checkpoint", str(run), "-o", "b.wire", *asked]) == 0
    assert Path("a.wire").read_bytes() == Path("b.wire").read_bytes()


@pytest.mark.slow
def test_a_message_from_a_file_is_answered_as_in_the_evaluation(duo, agnostic):
    calls, wanted = [], []
    for run, aware in ((duo, True), (agnostic, False)):
        evaluate(run, run.parent.name, "--methods", "bridge")
        channel = channel_of(run)
        example, file = channel.examples[0], f"{run.parent.name}.wire"
        wired(run, example, example.question if aware else "")
        assert Path("a.wire").read_bytes() == channel.messages[0]
        Path("a.wire").rename(file)
        asked = [] if aware else ["--question", example.question]
        answers = {name: records(run.parent.name, name)["bridge"][example.id]["generated"] for name in PAIR}
        for receiver in (*PAIR, ""):
            named = ["--receiver", receiver] if receiver else []
            calls.append(["answer", file, "--checkpoint", str(run), *named, *asked])
            wanted.append(answers[receiver or PAIR[0]])
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import LATENTWIRE as lw\n"
    program += f"sys.exit(max(lw.main(words) for words in {calls!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "".join(f"{lw.plain(text)}\n" for text in wanted) and len(set(wanted)) > 1


def test_the_receiver_of_a_question_agnostic_message_must_be_asked(agnostic, refuse, say):
    say("encode", "--text", "Anna has a red hat.", "--checkpoint", agnostic, "-o", "a.wire")
    assert "--question" in refuse("answer", "a.wire", "--checkpoint", agnostic)
    answers = {
        say("answer", "a.wire", "--checkpoint", agnostic, "--question", q) for q in ("Who?", "What has Anna?", "When?")
    }
    assert len(answers) > 1


def test_a_text_without_a_question_needs_none(toy_run, say):
    classes = {"a", "b", "c", "d"}
    for letter in "abcd":
        say("encode", "--text", f"{letter * 6}wxyz", "--checkpoint", toy_run, "-o", "a.wire")
        assert say("answer", "a.wire", "--checkpoint", toy_run) == f"{letter}\n"
    run = trained("toy", Path("run"), "--steps", "1", "--protocol", "question-agnostic")
    say("encode", "--text", "aaaaaawxyz", "--checkpoint", run, "-o", "a.wire")
    assert say("answer", "a.wire", "--checkpoint", run).strip() in classes


def test_private_latents_are_written_for_their_receiver(owners, say):
    flags = ["--pooler", "shared_private", "--latent_private_len", "2", "--encoder", "byte", "--steps", "2"]
    run = trained(owners, Path("run"), *flags)
    evaluate(run, "out", "--methods", "bridge")
    sent = []
    for receiver in PAIR:
        channel = channel_of(run, receiver)
        example = channel.examples[0]
        words = ["--text", example.context, "--checkpoint", run, "--question", example.question, "--receiver", receiver]
        say("encode", *words, "-o", "a.wire")
        alone, together = (lw.Message.from_bytes(data) for data in (Path("a.wire").read_bytes(), channel.messages[0]))
        torch.testing.assert_close(alone.latents, together.latents, rtol=2e-3, atol=2e-3)  # fp16's last bit
        assert (alone.bridge, alone.codec) == (together.bridge, together.codec)
        sent.append(together.latents[0])
        answer = say("answer", "a.wire", "--checkpoint", run, "--receiver", receiver)
        assert answer.strip() == lw.plain(records("out", receiver)["bridge"][example.id]["generated"])
    assert torch.equal(sent[0][:4], sent[1][:4]) and not torch.equal(sent[0][4:], sent[1][4:])


@pytest.mark.parametrize("text", ["word " * 100, "word " * 2000, "x" * 300, "Is it a file?\nNo."])
def test_any_text_is_encoded(text, duo, capsys):
    assert lw.main(["encode", "--text", text, "--checkpoint", str(duo), "-o", "a.wire"]) == 0
    out, err = capsys.readouterr()
    assert f"for {len(text.encode())} bytes of text" in out
    assert (re.fullmatch(r"cut: [\d,]+ of [\d,]+ tokens were read.*\n", err) is not None) == (len(text) > 5000), err
    latents = lw.Message.from_bytes(Path("a.wire").read_bytes()).latents
    assert latents.shape[0] == 1 and 1 <= latents.shape[1] <= 6 and latents.shape[2] == 32


def test_what_cannot_be_encoded_or_answered_is_one_line(duo, agnostic, say, refuse):
    say("encode", "--text", "Anna has a red hat.", "--checkpoint", duo, "-o", "a.wire")
    line = refuse("answer", "a.wire", "--checkpoint", agnostic, "--question", "What?")
    assert "message was written by bridge" in line
    for receiver in ("tiny-gemma", "tiny-lama", "no/such/model"):
        for words in (("answer", "a.wire"), ("encode", "--text", "x", "-o", "b.wire")):
            line = refuse(*words, "--checkpoint", duo, "--receiver", receiver)
            assert f"no receiver '{receiver}' here" in line and "tiny-qwen, tiny-llama" in line
    assert "nothing.wire not found" in refuse("answer", "nothing.wire", "--checkpoint", duo)
    assert "no checkpoint at nowhere" in refuse("answer", "a.wire", "--checkpoint", "nowhere")
    assert "no checkpoint at nowhere" in refuse("encode", "--text", "x", "--checkpoint", "nowhere")
    Path("picture.png").write_bytes(b"\x89PNG\xff\xfe")
    assert "picture.png" in refuse("encode", "picture.png", "--checkpoint", duo)
    assert "not a LatentWire message" in refuse("answer", "picture.png", "--checkpoint", duo)
    assert not Path("b.wire").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_encode_and_answer_work_on_the_device_of_the_run(owners, say):
    run = trained(owners, Path("run"), "--steps", "1", "--device", "cuda")
    say("encode", "--text", "Anna has a red hat.", "--checkpoint", run, "-o", "a.wire")
    assert say("answer", "a.wire", "--checkpoint", run)


def test_another_codec_shrinks_the_messages_of_a_trained_run(duo):
    sizes = {}
    for codec in ("fp32", "fp16", "int8", "int4"):
        results = evaluate(
            duo, codec, "--codec", codec, "--methods", "bridge", "--receivers", "tiny-qwen", "--max_new_tokens", "2"
        )
        assert results["provenance"]["codec"] == codec
        channel = channel_of(duo, codec=codec)
        assert {lw.Message.from_bytes(data).codec for data in channel.messages} == {codec}
        sizes[codec] = results["latent"]["bytes"]
        assert sizes[codec] == sum(map(len, channel.messages)) / 8 == results["compression"]["message_bytes"]
    numbers = 6 * 32
    assert sizes["fp32"] - sizes["fp16"] == pytest.approx(numbers * 2, abs=16)
    assert sizes["fp16"] > sizes["int8"] > sizes["int4"]
    assert evaluate(duo, "same", "--methods", "bridge", "--max_new_tokens", "2")["latent"]["bytes"] == sizes["fp16"]


# ---- stages ------------------------------------------------------------------------------------------------------------


def modes(run: Path) -> list[str | None]:
    return [row.get("mode") for row in lw.read_rows(run / "diagnostics.jsonl")]


@pytest.mark.slow
def test_stages_one_by_one_and_in_one_command(owners, duo):
    both = trained(
        owners,
        Path("abc"),
        "--steps",
        "8",
        "--stages",
        "A,B,C",
        "--warmup_text_latent_steps",
        "5",
        "--eval_samples",
        "4",
    )
    assert modes(both) == ["text", None, "text", None, "text", None, None, None]
    log = lw.read_rows(both / "diagnostics.jsonl")
    assert all(("loss_text_align" in row) == (row.get("mode") == "text") for row in log)
    results = json.loads((both / "results.json").read_text())
    assert (
        results["n"] == 4 and {"bridge", "text", "control:shuffled"} <= results["methods"].keys() and results["joint"]
    )
    assert modes(trained(owners, Path("a"), "--steps", "8", "--stages", "A")) == ["text", *[None] * 7]
    assert not Path("a/results.json").exists()
    tail = trained(owners, Path("b"), "--steps", "8", "--stages", "B", "--warmup_tail_prob", "0.5")
    assert set(modes(tail)) == {"text", None}
    assert set(modes(duo)) == {None}
    shutil.copytree(duo, "c")
    again = lw.train_main(["--stages", "C", "--output_dir", "c", "--eval_samples", "4", "--device", "cpu"])
    assert again["results"]["n"] == 4 and contents(duo).items() <= contents(Path("c")).items()


def test_wrong_stages_are_one_line_and_begin_nothing(owners, refuse):
    words = ["train", *TINY, "--dataset", owners, "--steps", "1", "--output_dir", "run"]
    for stages in ("X", "A,X", "A,B,C,D"):
        assert "give A, B and C" in refuse(*words, "--stages", stages)
    assert "--output_dir" in refuse("train", "--stages", "C")
    assert not Path("run").exists()


# ---- mixtures ----------------------------------------------------------------------------------------------------------


def test_a_mixture_trains_and_judges_each_part_by_its_own_rules(published, monkeypatch):
    trainers: list[lw.Trainer] = []
    train = lw.Trainer.train
    monkeypatch.setattr(lw.Trainer, "train", lambda self: trainers.append(self) or train(self))
    run = trained("squad,gsm8k", Path("run"), "--steps", "2", "--data_dir", str(published), "--max_bytes", "64")
    rows = [*trainers[0].train_rows, *trainers[0].validation_rows]
    assert {row.id.partition(":")[0] for row in rows} == {"squad", "gsm8k"}
    assert len({row.id for row in rows}) == len(rows)
    generated = lw.LM.generate

    def told(self, prefill, *rest, **options):
        return ["$ 7.0"] * len(generated(self, prefill, *rest, **options))

    monkeypatch.setattr(lw.LM, "generate", told)
    channel = channel_of(run, num_samples=24, data_dir=published)
    part = channel.setup.part
    channel.examples[:] = [lw.replace(e, answers=("7",)) for e in channel.examples]
    own = {name: lw.TASKS[name](lw.TrainSettings(dataset=name)) for name in ("squad", "gsm8k")}
    assert len(channel.examples) == 20 and {e.id.partition(":")[0] for e in channel.examples} == {*own}
    for example in channel.examples:
        task = own[example.id.partition(":")[0]]
        assert part.sender_text(example) == task.sender_text(example) == channel.text(example)
        assert part.receiver_text(example) == task.receiver_text(example)
        record = lw.record_of(part, example, lw.Answer("$ 7.0"))
        assert record["gen_correct"] == task.correct("$ 7.0", example) == float("gsm8k" in example.id)
    results = lw.eval_main(["--checkpoint", "run", "--num_samples", "24", "--methods", "bridge", "--receivers", "tiny-qwen",
                            "--data_dir", str(published)])  # fmt: skip
    assert (results["dataset"], results["headline"], results["n"]) == ("squad,gsm8k", "f1", 20)
    found = records("run")["bridge"]
    assert {name.partition(":")[0] for name in found} == {*own} and len(found) == 20


def test_the_token_budget_of_a_mixture_keeps_the_question(published):
    run = trained("squad,gsm8k", Path("run"), "--steps", "1", "--data_dir", str(published), "--max_bytes", "64")
    channel = channel_of(run, num_samples=12, token_budget_k=120, data_dir=published)
    method, lm = lw.TokenBudget(channel), channel.setup.receiver
    for example in channel.examples:
        said = lm.tokenizer.decode(method.ids(example))
        assert len(method.ids(example)) <= 120
        assert example.question[:80] in said


def test_a_mixture_is_a_relative_of_its_parts_relatives(duo):
    shutil.copytree(duo, "run")
    for trained_on, reported in (
        ("rotten_tomatoes,squad", "sst2"),
        ("rotten_tomatoes", "squad,sst2"),
        ("sst2,squad", "squad,sst2"),
    ):
        edit_state(Path("run/checkpoint/best"), lambda state, name=trained_on: state["settings"].update(dataset=name))
        words = ["--checkpoint", "run", "--dataset", reported, "--offline"]
        with pytest.raises(lw.LatentWireError, match="share texts" if "rotten" in trained_on else "sst2"):
            lw.eval_main(words)


def test_an_experiment_still_takes_several_data_sets_as_a_grid(say):
    planned = say("experiment", "--name", "g", "--dataset", "squad,hotpotqa", "--latent_len", "8,16", "--dry_run")
    found = [shlex.split(line.split(" && ")[0]) for line in planned.splitlines() if " && " in line]
    points = {tuple(sorted(w for w in words if w.startswith(("--dataset", "--latent_len")))) for words in found}
    assert points == {(f"--dataset={name}", f"--latent_len={k}") for name in ("squad", "hotpotqa") for k in (8, 16)}


# ---- arms of an evaluation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 1, 20, 25, 40, 200])
def test_a_token_budget_is_kept_and_so_is_the_question(budget, duo, monkeypatch):
    for receiver in PAIR:
        channel = channel_of(duo, receiver, token_budget_k=budget)
        lm, count = channel.setup.receiver, budget or 6
        for example in channel.examples:
            ids = lw.TokenBudget(channel).ids(example)
            question = lm.ids(f"\nQuestion: {example.question}\n")
            whole = len(lm.ids(example.context)) + len(question)
            assert len(ids) == min(count, whole)
            assert ids[-len(question) :] == question or (count < len(question) and ids == question[:count])
            head = max(0, len(ids) - len(question))
            assert ids[:head] == lm.ids(example.context)[:head]
    monkeypatch.setattr(lw.TokenBudget, "ids", lambda self, example: lm.ids(channel.setup.part.receiver_text(example)))
    text = lw.TokenBudget(channel).answers(channel.examples)
    assert [a.text for a in text] == [a.text for a in lw.TextMethod(channel).answers(channel.examples)]


@pytest.mark.parametrize("protocol", ["duo", "agnostic"])
def test_embeddings_with_an_anchor_are_the_text(protocol, request):
    results = evaluate(
        request.getfixturevalue(protocol),
        "out",
        "--preset",
        "embedding-baselines",
        "--methods",
        "text,embed:raw,embed:anchor,embed:adapter",
    )
    assert [*results["methods"]] == ["embed:raw", "embed:anchor", "embed:adapter", "text"]
    for receiver in PAIR:
        found = records("out", receiver)
        for name, same in (("embed:anchor", True), ("embed:raw", False), ("embed:adapter", False)):
            rows = [(found[name][i], found["text"][i]) for i in found["text"]]
            assert all(a["generated"] == b["generated"] for a, b in rows) is same
            near = [a["nll_per_token"] == pytest.approx(b["nll_per_token"], abs=1e-4) for a, b in rows]
            assert all(near) if same else not any(near)


def test_a_trained_prompt_is_a_control_that_reads_nothing(owners, duo, refuse):
    prompt = trained(
        owners, Path("prompt"), "--steps", "3", "--encoder", "constant", "--append_bos_after_prefix", "yes"
    )
    results = evaluate(duo, "out", "--prompt", "prompt", "--methods", "bridge,control:prompt,control:none")
    assert results["best_control"] in ("control:prompt", "control:none") and "control:prompt" in results["p_bridge_vs"]
    alone = evaluate(prompt, "alone", "--methods", "bridge")
    assert alone["latent"]["errors"] == 0
    for receiver in PAIR:
        mine, its = records("out", receiver)["control:prompt"], records("alone", receiver)["bridge"]
        assert len({row["generated"] for row in mine.values()}) == 1
        assert {i: row["generated"] for i, row in mine.items()} == {i: row["generated"] for i, row in its.items()}
    line = refuse(
        "eval", "--checkpoint", duo, "--prompt", duo, "--methods", "bridge,control:prompt", "--output_dir", "no"
    )
    assert "train it with --encoder constant" in line
    assert (
        "control:prompt" not in evaluate(duo, "without", "--receivers", "tiny-qwen", "--max_new_tokens", "2")["methods"]
    )


@torch.no_grad()
def likelihood(channel: lw.EvalContext, row: int, text: str) -> float:
    """log p(text, end | message) by one plain forward pass of the receiver over everything."""
    listener, lm = channel.receiver, channel.setup.receiver
    soft = listener.open([channel.messages[row]]).embeds
    ids = [*lm.bos, *lm.ids("Answer:"), *lm.ids(f" {text}"), lm.tokenizer.eos_token_id]
    count = len(lm.ids(f" {text}")) + 1
    embeds = torch.cat([soft, lm.table(torch.tensor([ids]))], 1)
    logs = lm.model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    return float(
        sum(
            logs[i - 1, token]
            for i, token in zip(range(embeds.shape[1] - count, embeds.shape[1]), ids[-count:], strict=True)
        )
    )


def test_joint_rescoring_is_the_argmax_of_summed_likelihoods(duo, monkeypatch):
    channels = [channel_of(duo, name) for name in PAIR]
    examples = channels[0].examples
    said = [[e.answers[0] if i % 2 else "hi" if i % 3 else "a car" for i, e in enumerate(examples)],
            [("The car!", e.answers[0], "hi")[i % 3] for i, e in enumerate(examples)]]  # fmt: skip
    heard = [
        [lw.record_of(channels[0].setup.part, e, lw.Answer(text)) for e, text in zip(examples, texts, strict=True)]
        for texts in said
    ]
    judged: list[str] = []
    token_f1 = lw.token_f1
    with monkeypatch.context() as patch:
        patch.setattr(lw, "token_f1", lambda text, gold: judged.append(text) or token_f1(text, gold))
        found = lw.joint(heard, channels, 42)
    chosen = []
    for row, texts in enumerate(zip(*said, strict=True)):
        sums = [sum(likelihood(channel, row, text) for channel in channels) for text in texts]
        chosen.append(texts[0] if sums[0] >= sums[1] else texts[1])
    assert judged == chosen
    assert {a == text for text, a, b in zip(chosen, *said, strict=True) if a != b} == {True, False}
    f1 = [lw.token_f1(text, e.answers[0]) for text, e in zip(chosen, examples, strict=True)]
    assert found["rescored"]["mean"] == pytest.approx(sum(f1) / 8)
    assert found["rescored_correct"]["mean"] == pytest.approx(sum(value == 1 for value in f1) / 8)
    singles = [sum(row["f1"] for row in rows) / 8 for rows in heard]
    assert found["oracle"]["mean"] >= max(*singles, found["rescored"]["mean"])
    assert found["oracle"]["mean"] == pytest.approx(sum(max(a["f1"], b["f1"]) for a, b in zip(*heard, strict=True)) / 8)
    same = [lw.normalize_answer(a) == lw.normalize_answer(b) for a, b in zip(*said, strict=True)]
    assert 0 < sum(same) < 8 and found["agreement"]["mean"] == pytest.approx(sum(same) / 8)
    assert all(value["ci"][0] <= value["mean"] <= value["ci"][1] for value in found.values())


def test_receivers_one_after_the_other_say_the_same_but_nothing_together(duo):
    together = evaluate(duo, "together", "--methods", "bridge,text", "--max_new_tokens", "4")
    apart = evaluate(duo, "apart", "--methods", "bridge,text", "--max_new_tokens", "4", "--sequential_eval")
    assert "joint" in together and "joint" not in apart
    assert together["receivers"] == apart["receivers"] and together["methods"] == apart["methods"]
    for receiver in PAIR:
        assert records("together", receiver) == records("apart", receiver)


def test_compression_is_counted_by_hand(duo):
    results = evaluate(duo, "out", "--methods", "bridge", "--receivers", "tiny-llama", "--max_new_tokens", "2")
    channel = channel_of(duo, "tiny-llama")
    texts = [f"{e.question}\n{e.context}".encode() for e in channel.examples]
    sent, found = sum(map(len, channel.messages)), results["compression"]
    tokens, latents = sum(map(len, texts)), sum(lw.Message.from_bytes(m).latents.shape[1] for m in channel.messages)
    assert latents == 6 * 8  # tiny-llama reads bytes, one token each
    assert found["claimed"] == "sequence"
    assert found["sequence"] == found["receiver_kv"] == pytest.approx(tokens / latents)
    assert found["bytes_vs_utf8"] == pytest.approx(tokens / sent) and found["bytes_vs_utf8"] < 1
    assert found["bytes_vs_zlib"] == pytest.approx(sum(len(zlib.compress(t, 9)) for t in texts) / sent)
    assert "an expansion" in lw.side_remarks(results)[0]
    assert results["latent"]["bytes"] == sent / 8


# ---- decoding ----------------------------------------------------------------------------------------------------------


def test_no_end_token_while_it_is_banned(duo):
    channel = channel_of(duo)
    lm, prompting = channel.setup.receiver, channel.receiver.prompting
    packed = prompting.pack(channel.receiver.open(channel.messages), channel.examples)
    lm.ends = set(range(0, 262)) - {*lm.ids("bcdefg")}  # nearly everything would end an answer
    logits = lm.prefill(packed).logits
    assert {int(token) for token in logits.argmax(-1)} & lm.ends
    free = lm.generate(lm.prefill(packed), 8)
    assert "" in free
    for banned in (1, 3, 8):
        how = lw.DecodeSettings(eos_ban_steps=banned)
        said = lm.generate(lm.prefill(packed), 8, how)
        assert all(len(text) >= banned and not set(text[:banned]) - set("bcdefg") for text in said)
    for ban, texts in ((0, free), (3, lm.generate(lm.prefill(packed), 8, lw.DecodeSettings(eos_ban_steps=3)))):
        listener = lw.Receiver(prompting, channel.bridge, 8, lw.DecodeSettings(eos_ban_steps=ban))
        assert [answer.text for answer in listener.answers(channel.examples, channel.messages)] == texts


def test_the_first_token_is_drawn_from_a_nucleus_by_the_example_alone(duo):
    common = ["--methods", "bridge,control:none", "--receivers", "tiny-qwen", "--max_new_tokens", "4"]
    drawn = ["--first_token_temperature", "4"]
    flags = {
        "greedy": [], "narrow": [*drawn, "--first_token_top_p", "1e-6"], "warm": drawn, "again": drawn,
        "single": [*drawn, "--batch_size", "1"], "three": [*drawn, "--batch_size", "3"], "cold": ["--first_token_top_p", "0.5"],
    }  # fmt: skip
    for name, words in flags.items():
        evaluate(duo, name, *common, *words)
    said = {
        name: {method: {i: row["generated"] for i, row in rows.items()} for method, rows in records(name).items()}
        for name in flags
    }
    assert said["greedy"] == said["narrow"] == said["cold"]
    assert said["warm"] == said["again"] == said["single"] == said["three"]
    assert said["warm"]["bridge"] != said["greedy"]["bridge"]
    assert len(set(said["greedy"]["control:none"].values())) == 1 < len(set(said["warm"]["control:none"].values()))


def test_a_nucleus_holds_the_fewest_tokens_that_reach_its_share():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(400, 4)

    def seen(top_p: float) -> set[int]:
        how = lw.DecodeSettings(first_token_top_p=top_p, first_token_temperature=1.0)
        return set(lw.nucleus(logits, how, range(400)).tolist())

    assert [seen(p) for p in (0.4, 0.6, 0.9, 1.0)] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


@pytest.mark.parametrize("after", ["yes", "no", "auto"])
def test_bos_stands_where_it_stood_in_training(after, owners, monkeypatch):
    seen: list[tuple[bool, lw.Packed]] = []
    forward = lw.LM.forward

    def noted(self, packed, *rest, **options):
        if packed.soft is not None and self.name == "tiny-llama":
            seen.append((torch.is_grad_enabled(), packed))
        return forward(self, packed, *rest, **options)

    monkeypatch.setattr(lw.LM, "forward", noted)
    flags = ["--steps", "1", "--append_bos_after_prefix", after, "--dataset", str(owners), "--output_dir", "run"]
    lw.train_main([*SIZE, "--receivers", "tiny-llama,tiny-qwen", *flags])
    lw.train_main([*SIZE, "--receivers", "tiny-llama", *flags[:-1], "one"])
    lw.eval_main(["--checkpoint", "one", "--num_samples", "4", "--methods", "bridge", "--max_new_tokens", "2"])
    lm = lw.load_lm("tiny-llama", lw.ModelSettings(device="cpu", dtype="float32"))
    bos, anchor = lm.embed(torch.tensor(lm.bos)), lm.embed(torch.tensor(lm.ids("Answer:")))
    assert {training for training, _ in seen} == {True, False}
    for _, packed in seen:
        assert packed.soft is not None
        assert packed.at is not None
        for row, places in zip(packed.embeds, packed.at.tolist(), strict=True):
            wanted = [row[places].detach(), bos, anchor] if after == "yes" else [bos, row[places].detach(), anchor]
            start = places[0] - (after != "yes")
            whole = torch.cat(wanted)
            assert torch.equal(row[start : start + len(whole)].detach(), whole)
            assert not packed.mask[0, :0].any() and places == [*range(places[0], places[0] + 6)]


def test_an_evaluation_cannot_move_bos(duo, agnostic, refuse):
    refused = refuse("eval", "--checkpoint", duo, "--append_bos_after_prefix", "no", "--output_dir", "out")
    assert "--append_bos_after_prefix" in refused
    assert "the checkpoint has" in refuse(
        "eval", "--checkpoint", agnostic, "--append_bos_after_prefix", "yes", "--output_dir", "out"
    )
    common = ["--methods", "bridge", "--receivers", "tiny-qwen", "--max_new_tokens", "2"]
    evaluate(duo, "yes", "--append_bos_after_prefix", "yes", *common)
    evaluate(agnostic, "no", "--append_bos_after_prefix", "no", *common)


# ---- what a run tells of itself --------------------------------------------------------------------------------------------


def test_debug_rows_shapes_and_memory(owners, say, monkeypatch):
    monkeypatch.setattr(torch.autograd, "set_detect_anomaly", contextlib.nullcontext)  # it keeps every call's trace
    flags = ["--dataset", owners, "--steps", "4", "--debug", "--log_shapes", "--profile_memory", "--output_dir", "run"]
    said = say("train", *TINY, *flags)
    log = lw.read_rows(Path("run/diagnostics.jsonl"))
    for row in log:
        ear = PAIR.index(row["receiver"])
        parts = {name: value for name, value in row.items() if name.startswith("grad_") and name != "grad_norm"}
        assert {"grad_encoder", "grad_pooler", "grad_to_wire", "grad_start", f"grad_ears.{ear}.adapter"} == parts.keys()
        assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
        assert row["peak_memory_bytes"] > 10_000_000
    assert said.count("shapes: ") == 1
    for piece in (
        "States.hidden (8, 1, ",
        "Message.latents (8, 6, 32)",
        "SoftPrompt.embeds (8, 6, ",
        "Packed.embeds (8, ",
    ):
        assert piece in said
    plain = trained(owners, Path("plain"), "--steps", "4")
    assert [row["loss"] for row in lw.read_rows(plain / "diagnostics.jsonl")] == [row["loss"] for row in log]


@pytest.mark.slow
def test_a_profile_names_the_parts_of_steps_3_to_8(owners, say):
    said = say("train", *TINY, "--dataset", owners, "--steps", "9", "--profile", "--output_dir", "run")
    table = Path("run/profile/parts.txt").read_text()
    parts = {name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+) s +[\d.]+%$", table, re.M)}
    assert table in said and [*parts] == ["sender", "encoder", "adapter", "receiver"]
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", table)) == pytest.approx(100, abs=0.3)
    seconds = lw.read_rows(Path("run/diagnostics.jsonl"))[-1]["seconds"]
    assert min(parts["encoder"], parts["receiver"]) > 0 and sum(parts.values()) < seconds
    trace = json.loads(Path("run/profile/trace.json").read_text())
    assert {"aten::addmm", "aten::linear"} & {event.get("name") for event in trace["traceEvents"]}
    assert "Self CPU" in Path("run/profile/operators.txt").read_text()
    operations = Path("run/profile/operations.txt").read_text()
    lines = re.findall(r"^(aten::\w+|\S.*?) +([\d.]+) s +([\d.]+)% +(\d+) calls$", operations, re.M)
    assert operations in said and len(lines) == 12 == len(operations.splitlines())
    assert [float(row[1]) for row in lines] == sorted((float(row[1]) for row in lines), reverse=True)
    assert max(map(len, operations.splitlines())) <= 80 and sum(float(row[2]) for row in lines) <= 100.5


def test_parts_of_a_step_add_up(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(lw.time, "perf_counter", lambda: float(next(now)))
    costs = lw.Costs(True)
    clock = costs.start()
    border = torch.ones(1, requires_grad=True)
    for part, own in (
        ("sender", ()),
        ("encoder", (border * 1, "adapter")),
        ("adapter", (border * 2, "receiver")),
        ("receiver", ()),
    ):
        clock(part, *own)
    assert costs.seconds == {"sender": 1.0, "encoder": 1.0, "adapter": 1.0, "receiver": 1.0}
    assert [line.split() for line in costs.table().splitlines()] == [
        [name, "1.000", "s", "25.0%"] for name in ("sender", "encoder", "adapter", "receiver")
    ]
    idle = lw.Costs(False)
    idle.start()("sender")
    assert not any(idle.seconds.values())


def test_shapes_are_told_in_stage_a_too(owners, say):
    words = ["--dataset", owners, "--steps", "4", "--stages", "A", "--log_shapes", "--output_dir", "run"]
    assert say("train", *TINY, *words).count("shapes: ") == 1


def test_a_short_run_can_be_profiled(owners, say):
    say("train", *TINY, "--dataset", owners, "--steps", "1", "--profile", "--output_dir", "run")
    assert "receiver" in Path("run/profile/parts.txt").read_text()


def test_debug_stops_where_the_first_number_is_none(owners, monkeypatch):
    monkeypatch.setattr(lw.AnswerCE, "term", lambda self, found: found.logits.sum() * float("nan"))
    with (
        pytest.warns(UserWarning, match="Error detected"),
        pytest.raises(lw.LatentWireError, match=r"MulBackward0.* nan.*step 1; lower"),
    ):
        trained(owners, Path("run"), "--steps", "2", "--debug")


@pytest.mark.parametrize("words", [["--track", "wanbd"], ["--report_to", "tensorboard,wanbd"], ["--track", "wandb"]])
def test_a_tracker_that_is_not_there_is_refused_before_the_run_begins(words, owners, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refuse("train", *TINY, "--dataset", owners, "--steps", "1", "--output_dir", "run", *words)
    assert "wandb" in line
    assert not Path("run").exists()


@pytest.mark.slow
def test_tensorboard_gets_the_log(owners):
    pytest.importorskip("tensorboard")
    run = trained(owners, Path("run"), "--steps", "2", "--track", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    losses = [row["loss"] for row in lw.read_rows(run / "diagnostics.jsonl")]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_wandb_gets_the_log(owners, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trained(owners, Path("run"), "--steps", "2", "--track", "wandb")
    assert list(run.glob("wandb/offline-run-*"))


class Logged(list):
    """Stands for a tracker's module: what it was begun with, and every row."""

    __spec__ = ModuleSpec("tracker", None)  # other libraries look whether it is there

    def init(self, **begun: Any) -> Logged:
        self.append(begun)
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        self.append((step, row))


@pytest.mark.slow
def test_trackio_gets_the_log(owners, monkeypatch, tmp_path):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trained(owners, Path("run"), "--steps", "2", "--track", "trackio")
    trackio.finish()
    assert (tmp_path / "trackio" / "latentwire.db").is_file()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_row_of_the_log_is_tracked(name, owners, monkeypatch):
    tracker = Logged()
    monkeypatch.setitem(sys.modules, name, tracker)
    run = trained(owners, Path("run"), "--steps", "3", "--report_to", name)
    begun, *rows = tracker
    assert begun["name"].startswith("run") and begun["config"]["latent_len"] == 6
    assert (begun["name"] == "run") == (name == "wandb"), "trackio finds a run that goes on by its name"
    assert rows == [(row["step"], row) for row in lw.read_rows(run / "diagnostics.jsonl")]


BLEU = ("--methods", "bridge", "--receivers", "tiny-llama", "--max_new_tokens", "2", "--bleu")


def test_bleu_of_texts_written_back(duo):
    pytest.importorskip("sacrebleu")
    found = evaluate(duo, "out", *BLEU)["reconstruction"]
    assert 0 <= found["bleu"] < 0.05 and found["n"] == 8 and found["signature"]


def test_texts_are_written_back_from_their_messages(duo, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert "pip install sacrebleu" in refuse(
        "eval", "--checkpoint", duo, "--output_dir", "no", "--num_samples", 4, *BLEU
    )
    compared: list[Any] = []
    scorer = SimpleNamespace(corpus_bleu=lambda *texts: compared.extend(texts) or SimpleNamespace(score=12.5))
    monkeypatch.setitem(sys.modules, "sacrebleu", scorer)
    results = evaluate(duo, "out", *BLEU)
    channel = channel_of(duo, "tiny-llama")
    said, (texts,) = compared
    assert texts == [f"{e.question}\n{e.context}" for e in channel.examples] and len(said) == 8
    assert len(set(said)) > 1 and max(map(len, said)) > 16  # as long as the text, not as an answer
    assert results["reconstruction"]["bleu"] == 0.125
    assert "BLEU of texts written back: 0.1250" in lw.side_remarks(results)


@pytest.mark.trains
def test_stage_b_begins_with_what_stage_a_learned(owners, refuse):
    first = trained(owners, Path("a"), "--stages", "A", "--steps", "4")
    second = trained(owners, Path("b"), "--stages", "B", "--start_from", str(first), "--steps", "0")
    kept = [lw.open_bridge(lw.resolve_checkpoint(run))[0].fingerprint() for run in (first, second)]
    assert kept[0] == kept[1]
    third = trained(owners, Path("c"), "--stages", "B", "--start_from", str(first), "--steps", "2")
    assert lw.open_bridge(lw.resolve_checkpoint(third))[0].fingerprint() != kept[0]
    line = refuse("train", *TINY, "--dataset", owners, "--start_from", first, "--d_z", "20", "--output_dir", "d")
    assert "--start_from a: that bridge has other parts" in line


@pytest.mark.parametrize("mode", ["text", "chat", "none"])
def test_what_stands_before_an_answer(mode):
    lm = lw.load_lm("tiny-llama", lw.ModelSettings(device="cpu"))
    lm.tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"
    settings = lw.TrainSettings(dataset="toy", anchor_mode=mode)
    part = lw.make_task(settings)
    prompting, example = lw.prompting_of(settings, part, lm), part.load("test")[0][0]
    soft = lw.SoftPrompt(torch.zeros(1, 3, lm.width))
    frame = (lm.ids("<user>"), lm.ids("</user><bot>")) if mode == "chat" else ([], [])
    tail = {"text": lm.ids("?"), "chat": [], "none": lm.ids("\n")}[mode]
    wanted = [*lm.bos, *frame[0], *[lm.pad] * 3, *frame[1], *tail]
    packed = prompting.pack(soft, [example])
    own = lm.embed(torch.tensor([wanted])).index_fill(1, torch.arange(3) + 1 + len(frame[0]), 0.0)
    assert torch.equal(packed.embeds, own)
    read = prompting.pack(None, [example], text=True)
    text = part.receiver_text(example)
    words = [*lm.ids(text), *frame[1]] if mode == "chat" else lm.ids(text + {"text": "?", "none": "\n"}[mode])
    assert torch.equal(read.embeds, lm.embed(torch.tensor([[*lm.bos, *frame[0], *words]])))
    answer = prompting.answer_ids("b")
    assert answer == [*(lm.ids("b") if mode == "chat" else lm.ids(" b")), lm.tokenizer.eos_token_id]


def test_a_chat_anchor_needs_a_template(owners, refuse):
    line = refuse("train", *TINY, "--dataset", owners, "--anchor_mode", "chat", "--steps", "1", "--output_dir", "run")
    assert "no chat template" in line and not Path("run").exists()
