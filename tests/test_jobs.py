"""§13 SUITES: grids of runs, their aggregate, what would be submitted to SLURM, and the status of runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOY

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "slurm --job training --time 12:00:00",
    "slurm --job training --gpus 4 --time 12:00:00",
    "slurm --job eval --gpus 1 --time 2:00:00 --checkpoint runs/x",
    "slurm --job experiment --gpus 4 --time 24:00:00",
]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints that must end well."""
    assert lw.main([*words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that must be refused."""
    assert lw.main([*words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def calls(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """The dry run's sbatch calls: (environment, command)."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        start = words.index("sbatch")
        found.append((dict(word.split("=", 1) for word in words[:start]), words[start:]))
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTWIRE_SITE", "marlowe")  # the documents' cluster
    for name in lw.site_settings(ROOT, "marlowe"):
        monkeypatch.delenv(name, raising=False)


# ---- experiment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        ("--name a --dataset sst2", ["runs/a"]),
        ("--name baseline_experiment", ["runs/baseline_experiment"]),
        ("--name c --dataset toy --latent_len 16,32,64", [f"runs/c/latent_len{n}" for n in (16, 32, 64)]),
        ("--name c --dataset toy --latent_len 16 32 64", [f"runs/c/latent_len{n}" for n in (16, 32, 64)]),
        ("--name g --dataset hotpot,sst2,agnews", ["runs/g/hotpot", "runs/g/sst2", "runs/g/agnews"]),
        ("--name s --seeds 1,2 --dataset toy --layers 0,1", ["runs/s/seed1", "runs/s/seed2"]),
        ("--name o --dataset toy --output_dir out --lr 0.1,0.2 --seed 7", ["out/lr0.1", "out/lr0.2"]),
    ],
)
def test_flags_with_several_values_span_a_grid(words, folders):
    mine, others = lw.divided(lw.ExperimentSettings, shlex.split(words))
    settings = lw.ExperimentSettings.build(lw.parse_flags(mine, lw.ExperimentSettings)[0])
    runs = lw.planned(settings, others)
    assert [str(run.output_dir) for run in runs] == folders
    assert all(run.auto_resume for run in runs)
    assert len({run.digest() for run in runs}) == len(runs)
    assert {run.dataset for run in runs} <= {"sst2", "toy", "hotpot", "agnews"}


def test_a_suite_gives_an_experiment_its_values(capsys):
    mine, others = lw.divided(lw.ExperimentSettings, ["--name", "demo", "--seeds", "1,2"])
    runs = lw.planned(lw.ExperimentSettings(name="demo"), others)
    assert mine == ["--name", "demo"]
    assert [(run.dataset, run.steps, run.seed) for run in runs] == [
        ("rotten_tomatoes", 180, 1),
        ("rotten_tomatoes", 180, 2),
    ]


def test_an_experiment_of_several_processes_ends_at_a_failure(monkeypatch):
    """The one that failed would begin the next run while the others wait for it in this one."""

    def failing(settings, report):
        raise lw.LatentWireError("no luck today")

    monkeypatch.setattr(lw, "train_run", failing)
    monkeypatch.setattr(lw, "launched", lambda: (0, 2, 0))
    words = ["--name", "e", *TOY, "--latent_len", "2,4"]
    settings, _ = lw.settings_from(lw.ExperimentSettings, words[:2])
    with pytest.raises(lw.LatentWireError, match="no luck today"):
        lw.run_experiment(settings, words[2:], lw.Silent())


def test_dry_run_prints_commands_that_can_be_typed(capsys):
    lines = shown(
        capsys, "experiment", "--name", "c", "--latent_len", "4,8", "--dataset", "toy", "--dry-run"
    ).splitlines()
    after = [shlex.split(line)[2] for line in lines[2:-1]]
    assert after == ["aggregate", "stats", "report"] and lines[-1].startswith("# 2 runs, about ")
    for line, latents in zip(lines[:2], ("4", "8"), strict=True):
        assert re.search(
            r"  # 1,000 steps of 32 rows, all test rows \(counted as 1,000\) x \d+ methods: about \S+ FLOP$", line
        ), line
        train, evaluate = (shlex.split(part, comments=True)[2:] for part in line.split(" && "))
        settings, _ = lw.settings_from(lw.TrainSettings, train[1:])
        assert train[0] == "train" and settings.latent_len == int(latents) and settings.auto_resume
        assert evaluate == ["eval", f"--checkpoint={settings.output_dir}"]


@pytest.mark.trains
@pytest.mark.slow
def test_experiment_runs_everything_once_and_goes_on_after_a_failure(capsys, monkeypatch):
    words = ["experiment", "--name", "e", *TOY, "--steps", "12", "--latent_len", "2,4", "--num_samples", "20"]
    train, broken = lw.train_run, [True]

    def failing(settings, report):
        if broken[0] and settings.latent_len == 2:
            raise lw.LatentWireError("no luck today")
        return train(settings, report)

    monkeypatch.setattr(lw, "train_run", failing)
    assert lw.main(words) == 1
    out = capsys.readouterr().out
    assert "failed: runs/e/latent_len2: no luck today" in out
    assert Path("runs/e/latent_len4/results.json").exists()
    broken[0] = False
    before = Path("runs/e/latent_len4/records.jsonl").read_bytes()
    assert "runs/e/latent_len4 is finished already" in shown(capsys, *words)
    assert Path("runs/e/latent_len4/records.jsonl").read_bytes() == before
    groups = json.loads(Path("runs/e/aggregated_results.json").read_text())["groups"]
    assert [group["latent_len"] for group in groups] == [2, 4]
    assert all(group["n"] == 20 and len(group["methods"]["bridge"]["values"]) == 1 for group in groups)
    assert "--only 2: the experiment has 2 runs" in refused(capsys, *words, "--only", "2")


@pytest.mark.trains
@pytest.mark.slow
def test_stages_one_at_a_time_are_the_whole(capsys):
    words = ["experiment", "--name", "p", *TOY, "--steps", "6", "--seeds", "1,2", "--num_samples", "10"]
    for stage in ("train", "eval"):
        for number in ("1", "0"):
            assert lw.main([*words, "--stage", stage, "--only", number]) == 0
    assert lw.main([*words, "--stage", "aggregate"]) == 0
    [group] = json.loads(Path("runs/p/aggregated_results.json").read_text())["groups"]
    assert sorted(run["seed"] for run in group["runs"]) == [1, 2]
    assert len(group["methods"]["bridge"]["values"]) == 2 and group["methods"]["bridge"]["sd"] is not None


def test_effects_are_paired_differences_beside_the_run_named_base(tmp_path):
    right = {"base": [1, 0, 0, 0, 1, 0, 1, 0, 0, 0], "better": [1] * 10, "same": [1, 0, 0, 0, 1, 0, 1, 0, 0, 0]}
    for name, values in right.items():
        asked = {"key": "k", "method": "bridge", "gold": ["a"], "label": 0}
        rows = [
            lw.sealed({**asked, "id": str(i), "prediction": 1 - v, "correct": bool(v)}) for i, v in enumerate(values)
        ]
        made = {
            "record_key": "k",
            "sender": {"name": "a"},
            "receiver": {"name": "b"},
            "seed_of_training": 1,
            "source_sha256": "x",
        }
        found = {"dataset": "toy", "split": "test", "n": 10, "headline": "accuracy", "provenance": made,
                 "methods": {"bridge": {"accuracy": sum(values) / 10}}}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    told = lw.beside_base(tmp_path)["effects"]
    assert told.keys() == {"better", "same"}
    assert told["better"]["difference"] == pytest.approx(0.7) and told["same"]["difference"] == 0
    assert told["better"]["p"] == pytest.approx(2 / 2**7) and told["same"]["p"] == 1
    assert told["better"]["q"] == pytest.approx(2 * told["better"]["p"]) and told["better"]["ci"][0] > 0.3
    (tmp_path / "same" / "records.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(lw.LatentWireError, match="other rows"):
        lw.beside_base(tmp_path)


def test_the_suite_of_effects_changes_one_thing_in_each_run():
    runs = {run.output_dir.name: run for run in lw.planned(lw.ExperimentSettings(name="effects"), [])}
    base = runs.pop("base").determining()
    changed = {name: {k for k, v in run.determining().items() if base[k] != v} for name, run in runs.items()}
    assert len(runs) == 26 and all(len(keys) in (1, 2) for keys in changed.values()), changed
    losses = {f"{name}_weight" for name in lw.LOSSES} - {
        "answer_ce_weight",
        "selection_weight",
        "swap_weight",
    }  # of pooler mixed alone
    assert losses <= set().union(*changed.values()), losses - set().union(*changed.values())


# ---- slurm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", DOCUMENTS)
def test_the_documents_commands(words, capsys):
    for environment, command in calls(shown(capsys, *words.split(), "--dry-run")):
        assert environment["SBATCH_ACCOUNT"] == "marlowe-m000066" and environment["SBATCH_PARTITION"] == "preempt"
        assert environment["LATENTWIRE_PYTHON"] == sys.executable
        assert command[:2] == ["sbatch", "--parsable"]
        assert f"--time={words.split('--time ')[1].split()[0]}" in command
        log = next(word for word in command if word.startswith("--output="))
        assert log.startswith("--output=runs/preempt_") and log.endswith(".log")


def test_the_documents_preemptible_trainer(capsys):
    words = "finalization/training/preemptible_trainer.py --auto_resume --checkpoint_interval 180 --save_dir runs/experiment_7"
    settings = json.loads(shown(capsys, *words.split(), "--dataset", "toy", "--dry_run", "full"))
    assert (settings["auto_resume"], settings["checkpoint_interval"]) == (True, 180)
    assert settings["output_dir"] == "runs/experiment_7"


def test_the_documents_sbatch_script_submits_training(capsys):
    [(_, command)] = calls(shown(capsys, "finalization/slurm/submit_main.slurm", "--dry_run"))
    assert "train" in command and "--auto_resume" in command


def test_training_starts_one_process_per_gpu_and_goes_on_by_itself(capsys):
    [(environment, command)] = calls(
        shown(capsys, *DOCUMENTS[1].split(), "--dataset", "trec", "--lr", "0.5", "--dry_run")
    )
    assert {"--gpus=4", "--ntasks=4"} <= {*command}
    assert (environment["LATENTWIRE_PROCESSES"], environment["LATENTWIRE_LAUNCHER"]) == ("4", "srun")
    job = command[command.index(str(ROOT / "slurm" / "job.slurm")) + 1 :]
    assert job[0] == "train" and {"--auto_resume", "trec"} <= {*job}
    assert job[job.index("--output_dir") + 1] == "runs/experiment_{job}"
    [(environment, command)] = calls(shown(capsys, *DOCUMENTS[1].split(), "--launcher", "torchrun", "--dry_run"))
    assert environment["LATENTWIRE_LAUNCHER"] == "torchrun" and not [word for word in command if "--ntasks" in word]


def test_seeds_make_an_array(capsys):
    words = "slurm --job training --array-seeds 42,123,456 --dataset sst2 --output_dir runs/s --dry_run"
    [(environment, command)] = calls(shown(capsys, *words.split()))
    assert "--array=0-2" in command and environment["LATENTWIRE_SEEDS"] == "42 123 456"
    assert command[-5:] == ["--output_dir", "runs/s/seed{seed}", "--seed", "{seed}", "--auto_resume"]
    assert any("%A_%a" in word for word in command)


def test_an_experiment_is_a_pipeline(capsys):
    words = "slurm --job experiment --name n --dataset sst2,trec --array_seeds 1,2 --num_samples 50 --dry_run"
    train, evaluate, together = calls(shown(capsys, *words.split()))
    assert "--array=0-3" in train[1] and "--array=0-3" in evaluate[1]
    assert not [word for word in train[1] if word.startswith("--dependency")]
    for after, (_, command) in (("train", evaluate), ("eval", together)):
        assert f"--dependency=afterok:<id of {after}>" in command and "--kill-on-invalid-dep=yes" in command
    assert train[1][-4:] == ["--stage", "train", "--only", "{task}"]
    assert together[1][-2:] == ["--stage", "aggregate"]


def test_flags_win_over_the_environment_and_that_over_the_site(capsys, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "mine")
    monkeypatch.setenv("SBATCH_GPUS", "2")
    [(environment, command)] = calls(shown(capsys, "slurm", "--account", "other", "--dry_run"))
    assert "SBATCH_PARTITION" not in environment and environment["LATENTWIRE_PROCESSES"] == "2"
    assert "--account=other" in command and "--output=runs/mine_training_%j.log" in command


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        ("--job trainig", ("unknown job 'trainig'", "'training'")),
        ("--job benchmarks", ("unknown job 'benchmarks'", "benchmark")),
        ("--datset sst2", ("--datset", "'dataset'")),
        ("--job training --lr fast", ("--lr", "fast")),
        ("--job eval", ("--checkpoint",)),
        ("--job eval --checkpoint x --latnet_len 4", ("--latnet_len",)),
        ("--gpus -1", ("--gpus",)),
        ("--launcher mpi", ("--launcher", "mpi")),
        ("--job training --dataset sst2", ("sbatch", "--dry_run")),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(words, phrases, capsys, monkeypatch):
    monkeypatch.setattr(lw.shutil, "which", lambda name: None)
    line = refused(capsys, "slurm", *words.split())
    assert all(phrase in line for phrase in phrases), line
    assert not Path("runs").exists()


def test_the_last_finished_run_is_evaluated(toy_run, capsys):
    shutil.copytree(toy_run, "runs/old")
    [(_, command)] = calls(shown(capsys, "slurm", "--job", "eval", "--dry_run"))
    assert command[-3:] == ["eval", "--checkpoint", "runs/old"]


def test_a_refusal_by_sbatch_is_passed_on(capsys, monkeypatch, tmp_path):
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    assert "sbatch refused the job: sbatch: error: Invalid account" in refused(capsys, "slurm", "--dataset", "sst2")
    stub.write_text('#!/bin/sh\necho "$SBATCH_ACCOUNT $LATENTWIRE_PROCESSES $*" > called\necho "77;box"\n')
    out = shown(capsys, "slurm", "--gpus", "2", "--dataset", "sst2")
    assert "job 77: training in runs/experiment_77; follow it: tail -f runs/preempt_training_77.log" in out
    assert "  train --dataset sst2 --output_dir runs/experiment_77 --auto_resume" in out
    called = Path("called").read_text()
    assert called.startswith("marlowe-m000066 2 --parsable") and "--ntasks=2" in called
    assert Path("runs").is_dir()


def test_submitting_needs_no_torch(tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "LATENTWIRE.py"),
        "slurm",
        "--job",
        "training",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sbatch" in done.stdout and not imported & {"torch", "transformers", "datasets"}


# ---- status --------------------------------------------------------------------------------------------------------


def test_status_shows_runs_and_jobs(toy_run, capsys, monkeypatch, tmp_path):
    assert "no runs below runs" in shown(capsys, "status")
    shutil.copytree(toy_run, "runs/done")
    shutil.copytree(toy_run, "runs/going")
    Path("runs/going/DONE").unlink()
    state = lw.Checkpoints(Path("runs/going/checkpoint")).steps()[0] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"job": "7"}))
    stub = tmp_path / "bin" / "squeue"
    stub.parent.mkdir()
    stub.write_text(
        "#!/bin/sh\necho '7|7|RUNNING|training|None|runs/going'\n"
        "echo '8|8|PENDING|training|Priority|runs/experiment_{job}'\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    monkeypatch.setenv("COLUMNS", "120")
    lines = {
        line.split()[0]: line.split()[1:]
        for line in shown(capsys, "status").splitlines()
        if line.strip().startswith("runs/")
    }
    assert lines["runs/done"][:2] == ["finished", "60/60"]
    assert lines["runs/going"][:2] == ["running", "60/60"] and lines["runs/going"][-1] == "7"
    assert lines["runs/experiment_8"] == ["pending", "Priority", "8"]


@pytest.mark.parametrize("dry", [["--dry_run"], ["--dry_run", "full"], ["--dry_run=full"], ["--dry_run_full"]])
@pytest.mark.parametrize("command", ["experiment --name e", "slurm --job training"])
def test_no_spelling_of_a_dry_run_does_anything(command, dry, say, monkeypatch):
    """U3: --dry_run full was taken for no dry run at all by experiment and slurm."""
    ran = []
    monkeypatch.setattr(lw.subprocess, "run", lambda *args, **named: ran.append(args))
    monkeypatch.setattr(lw, "run_experiment", lambda *args: ran.append(args))
    assert "train" in say(*command.split(), *TOY, *dry)
    assert not ran and not Path("runs").exists()


def test_a_promise_of_processes_is_made_to_the_training_alone(capsys):
    """J1: the stages after it have one process, and died of the word."""
    words = "slurm --job experiment --dry_run --gpus 4 --name n --dataset sst2 --world_size 4 --steps=9"
    train, evaluate, together = (command for _, command in calls(shown(capsys, *words.split())))
    assert "--world_size" in train and "--world_size" not in {*evaluate, *together}
    assert lw.without_flag(["a", "--world-size=4", "--b", "--world_size", "4", "c"], "world_size") == ["a", "--b", "c"]


def test_a_delimiter_is_no_grid(tmp_path):
    """J9: --delimiter , made two runs of one name."""
    (tmp_path / "f.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    settings = lw.ExperimentSettings(name="own")
    assert len(lw.planned(settings, [*TOY[:4], "--dataset", str(tmp_path / "f.csv"), "--delimiter", ","])) == 1


def test_the_cost_of_epochs_is_theirs():
    """U4: 24 passes over 87,599 rows cost as much as a thousand steps."""
    run = lw.TrainSettings(sender="smollm2-135m", receiver="gemma-3-270m", dataset="sst2", epochs=24, samples=87599)
    few = run.model_copy(update={"epochs": 1})
    assert 10 < lw.cost_of(run, {"num_samples": 1000})[1] / lw.cost_of(few, {"num_samples": 1000})[1] < 24


def test_a_benchmark_that_was_stopped_is_finished_by_its_experiment(tmp_path, monkeypatch):
    """J11: its file was there, so the rest was never measured."""
    settings = lw.ExperimentSettings(name="paper", output_dir=tmp_path)
    runs = [lw.TrainSettings(sender="tiny-llama", receiver="tiny-qwen", dataset="toy", output_dir=tmp_path / "run")]
    done, asked = settings.folder / "benchmark" / "benchmark.json", []
    done.parent.mkdir(parents=True)
    monkeypatch.setattr(lw, "benchmark_run", lambda *_: asked.append(1))
    monkeypatch.setattr(lw, "write_benchmark", lambda *_: None)
    monkeypatch.setattr(lw.ReportInputs, "below", lambda *_: 1 / 0)
    for text, times in (('{"latency": [], "unfinished": ["memory"]}', 1), ('{"latency": []}', 1)):
        done.write_text(text)
        with pytest.raises(ZeroDivisionError):
            lw.put_together(settings, runs, lw.Silent())
        assert len(asked) == times


def test_models_that_were_trusted_for_training_are_trusted_for_what_follows():
    """S2: an experiment trained with --trust_remote_code, and refused its own model afterwards."""
    run = lw.TrainSettings(sender="tiny-llama", receiver="tiny-qwen", dataset="toy", trust_remote_code=True)
    assert lw.evaluation_of(run, Path("x")).trust_remote_code
    assert lw.benchmark_of(lw.ExperimentSettings(name="paper"), [run]).trust_remote_code
