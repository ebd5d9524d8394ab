"""What 'slurm' hands to sbatch: sites and profiles, kinds of GPUs, and everything that must reach the job."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import LATENTWIRE as lw

Call = tuple[dict[str, str], list[str]]
TRAIN = ("--job", "training", "--dataset", "sst2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, on no particular site."""
    monkeypatch.chdir(tmp_path)
    for name in [*lw.os.environ]:
        if name.startswith(("SBATCH_", "SLURM_", "LATENTWIRE_SITE")):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Call]]:
    """The dry run's sbatch calls: (environment, command) each."""

    def run(*words: str) -> list[Call]:
        assert lw.main(["slurm", *words, "--dry_run"]) == 0, capsys.readouterr().err
        found = []
        for line in capsys.readouterr().out.replace("\\\n", " ").splitlines():
            said = shlex.split(line)
            start = said.index("sbatch")
            found.append((dict(word.split("=", 1) for word in said[:start]), said[start:]))
        return found

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a command that must be refused."""

    def run(*words: str) -> str:
        assert lw.main(["slurm", *words, "--dry_run"]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
        return said.err

    return run


def job_words(command: list[str]) -> list[str]:
    """What job.slurm is given."""
    return command[next(i for i, word in enumerate(command) if word.endswith("job.slurm")) + 1 :]


# ---- what must reach the job ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["training", "experiment", "baseline", "benchmark"])
def test_the_environment_goes_along_whatever_the_site_exports(job, shown, monkeypatch):
    """J1: SBATCH_EXPORT=NONE is a site's default; the job's variables must come along all the same."""
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    calls = shown("--job", job, "--dataset", "sst2", *(["--array_seeds", "1,2"] if job == "training" else []))
    assert all("--export=ALL" in command[: command.index(job_script(command))] for _, command in calls)


def job_script(command: list[str]) -> str:
    """The path of job.slurm in a command."""
    return next(word for word in command if word.endswith("job.slurm"))


@pytest.mark.parametrize("job", ["training", "experiment"])
def test_the_number_of_processes_is_promised_in_the_command(job, shown):
    """J1: four GPUs promise four processes in words that no site can drop; the job compares them with what it has."""
    environment, command = shown("--job", job, "--dataset", "sst2", "--gpus", "4")[0]
    words = job_words(command)
    assert words[words.index("--world_size") + 1] == environment["LATENTWIRE_PROCESSES"] == "4"


def test_one_process_and_evaluations_promise_nothing(shown):
    """J1: a promise stands where several processes are to train, nowhere else."""
    assert "--world_size" not in job_words(shown(*TRAIN, "--gpus", "1")[0][1])
    _, evaluation, together = shown("--job", "experiment", "--dataset", "sst2", "--gpus", "4")
    assert "--world_size" not in [*job_words(evaluation[1]), *job_words(together[1])]


# ---- kinds of GPUs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words", "processes", "option"),
    [
        ("a100:4", (), "4", None),
        ("a100:2,h100:1", (), "3", None),
        ("4", (), "4", None),
        ("", (), "1", None),
        ("a100:4", ("--gpus", "2"), "2", "--gpus=a100:2"),
        ("4", ("--gpus", "2"), "2", "--gpus=2"),
    ],
)
def test_gpus_of_a_kind(asked, words, processes, option, shown, monkeypatch):
    """J5: sbatch takes SBATCH_GPUS=a100:4, and so does 'slurm'; --gpus changes the number and keeps the kind."""
    monkeypatch.setenv("SBATCH_GPUS", asked)
    environment, command = shown(*TRAIN, *words)[0]
    assert environment["LATENTWIRE_PROCESSES"] == processes
    assert [word for word in command if word.startswith("--gpus")] == ([option] if option else [])


@pytest.mark.parametrize("asked", ["a100:", "many", "-1", "a100:4:2x", "1.5"])
def test_gpus_that_are_no_number_are_one_line(asked, refused, monkeypatch):
    """J5: what sbatch could not take either is told by the variable's name."""
    monkeypatch.setenv("SBATCH_GPUS", asked)
    line = refused(*TRAIN)
    assert "SBATCH_GPUS" in line and asked in line


# ---- sites ---------------------------------------------------------------------------------------------------------


def test_nobody_elses_account_is_the_default(shown):
    """U9: without a site of one's own no account, partition, time or memory is asked for."""
    environment, command = shown(*TRAIN)[0]
    assert not {"SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_MEM_PER_NODE"} & environment.keys()
    assert not [word for word in command if word.startswith(("--account", "--partition"))]
    assert environment["SBATCH_GPUS"] == "1"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_documents_account_is_a_named_profile(how, shown, monkeypatch):
    """U9: --site marlowe, or LATENTWIRE_SITE=marlowe once for all, is all that their cluster needs."""
    if how == "variable":
        monkeypatch.setenv("LATENTWIRE_SITE", "marlowe")
    environment, command = shown(*TRAIN, *(["--site", "marlowe"] if how == "flag" else []))[0]
    assert environment["SBATCH_ACCOUNT"] == "marlowe-m000066" and environment["SBATCH_PARTITION"] == "preempt"
    assert environment["SBATCH_TIMELIMIT"] == "12:00:00" and environment["SBATCH_MEM_PER_NODE"] == "256G"
    assert "--output=runs/preempt_training_%j.log" in command
    assert "--site" not in command and "marlowe" not in job_words(command)


def test_a_site_may_be_any_file_and_flags_and_environment_win(here, shown, monkeypatch):
    """U9: one's own profile, under what is set already and under flags."""
    mine = here / "mine.env"
    mine.write_text(
        '# mine\n\nSBATCH_ACCOUNT="my project" # pays\n  SBATCH_QOS=long\nSBATCH_PARTITION=gpu\nSBATCH_GPUS=2\n'
    )
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("LATENTWIRE_SITE", "marlowe")
    environment, command = shown(*TRAIN, "--site", str(mine), "--qos", "short")[0]
    assert environment["SBATCH_ACCOUNT"] == "my project" and environment["SBATCH_QOS"] == "long"
    assert "SBATCH_PARTITION" not in environment and "--qos=short" in command
    assert environment["LATENTWIRE_PROCESSES"] == "2" and "--output=runs/other_training_%j.log" in command


def test_an_unknown_site_is_one_line(refused):
    """U9: a misspelled profile is told with those that there are."""
    line = refused(*TRAIN, "--site", "marlow")
    assert "marlow" in line and "marlowe" in line.replace("marlow'", "")


@pytest.mark.parametrize(
    ("text", "number", "phrase"),
    [
        ("SBATCH_ACCOUNT=a\nPATH=/tmp/evil\n", 2, "PATH"),
        ("LD_PRELOAD=/tmp/evil.so\n", 1, "LD_PRELOAD"),
        ("LATENTWIRE_PYTHON=/tmp/evil\n", 1, "LATENTWIRE_PYTHON"),
        ("SBATCH_ACCOUNT\n", 1, "SBATCH_ACCOUNT"),
        ("#\n\nSBATCH_ACCOUNT = mine\n", 3, "SBATCH_ACCOUNT"),
        ("SBATCH_ACCOUNT='mine\n", 1, "SBATCH_ACCOUNT"),
        ("SBATCH_ACCOUNT=my project\n", 1, "SBATCH_ACCOUNT"),
        ("export SBATCH_ACCOUNT=mine\n", 1, "export"),
        ("SBATCH_QOS=a SBATCH_ACCOUNT=b\n", 1, "SBATCH_QOS"),
        ("=x\n", 1, "=x"),
        ("SBATCH_ACCOUNT=$(id)\n", 1, "SBATCH_ACCOUNT"),
    ],
)
def test_lines_that_are_no_sbatch_variables_are_refused(text, number, phrase, here, refused):
    """J5: SBATCH_NAME=VALUE a line, which bash and sbatch read alike; anything else is one line with the file's line."""
    mine = here / "mine.env"
    mine.write_text(text)
    line = refused(*TRAIN, "--site", str(mine))
    assert str(mine) in line and f"line {number}" in line and phrase in line


def test_a_site_that_is_no_text_is_one_line(here, refused):
    """J5: not even a file of bytes is a traceback."""
    (here / "mine.env").write_bytes(b"SBATCH_ACCOUNT=\xff\xfe\n")
    assert "mine.env" in refused(*TRAIN, "--site", str(here / "mine.env"))
    (here / "folder").mkdir()
    assert "folder" in refused(*TRAIN, "--site", str(here / "folder"))
