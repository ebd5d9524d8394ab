"""§3 RECORDS: a kill, a full disk or a torn line never costs what was saved before."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
from pathlib import Path
from typing import Any

import pytest
from conftest import contents

import LATENTWIRE as lw


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(path: Path, data: bytes) -> None:
    """Half the bytes reach the disk, then it is full."""
    with path.open("wb") as stream:
        stream.write(data[: len(data) // 2])
    full_disk()


# ---- one file ------------------------------------------------------------------------------------------------------


def test_write_atomic_writes_whole_files_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    for data in (b"first", b"", b"a longer second"):
        lw.write_atomic(path, data)
        assert contents(tmp_path) == {"a/b/file.json": data}


@pytest.mark.parametrize(
    ("target", "name", "fault"),
    [(Path, "write_bytes", half_written), (lw, "sync", full_disk), (Path, "replace", full_disk)],
    ids=["write", "sync", "rename"],
)
def test_write_atomic_keeps_the_old_file_when_any_stage_fails(target, name, fault, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    lw.write_atomic(path, b"old")
    monkeypatch.setattr(target, name, fault)
    with pytest.raises(lw.LatentWireError, match=r"cannot write .*results\.json: No space left on device"):
        lw.write_atomic(path, b"the new one")
    assert contents(tmp_path) == {"results.json": b"old"}


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(lw.LatentWireError, match=r"cannot write .*file"):
        lw.write_atomic(tmp_path / "taken" / "file", b"x")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_cannot_say(number, tmp_path):
    lw.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(lw.LatentWireError, match="not finite"):
        lw.write_json(tmp_path / "a.json", {"x": number})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


# ---- one folder ----------------------------------------------------------------------------------------------------


def save_folder(target: Path, text: str) -> None:
    with lw.replacing_folder(target) as temporary:
        (temporary / "state.json").write_text(text)


def test_replacing_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    target = tmp_path / "checkpoint"
    for text in ("first", "second"):
        save_folder(target, text)
        assert contents(tmp_path) == {"checkpoint/state.json": text.encode()}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def fail_on_call(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, number: int, error: BaseException) -> None:
    """The ``number``-th call of ``target.name`` raises instead."""
    real, calls = getattr(target, name), []

    def maybe(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(target, name, maybe)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("target", "name", "number"),
    [(Path, "write_text", 1), (lw, "sync", 1), (lw, "sync", 2), (Path, "rename", 1), (Path, "rename", 2)],
    ids=["body", "sync-file", "sync-folder", "rename-old-away", "rename-new-in"],
)
def test_replacing_folder_keeps_the_old_one_on_failure_at_any_stage(target, name, number, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    save_folder(folder, "old")
    with monkeypatch.context() as patch:
        fail_on_call(patch, target, name, number, FULL)
        with pytest.raises(lw.LatentWireError, match=r"cannot write .*checkpoint: No space left"):
            save_folder(folder, "new")
    assert contents(tmp_path) == {"checkpoint/state.json": b"old"}
    save_folder(folder, "newer")
    assert contents(tmp_path) == {"checkpoint/state.json": b"newer"}


def test_an_error_of_the_body_passes_through_unchanged(tmp_path):
    def body() -> None:
        with lw.replacing_folder(tmp_path / "checkpoint"):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        body()
    assert not list(tmp_path.iterdir())


def test_recovered_repairs_a_kill_between_the_two_renames(tmp_path):
    folder = tmp_path / "checkpoint"
    save_folder(folder, "old")
    folder.rename(tmp_path / ".checkpoint.old")  # where a kill leaves it
    assert lw.recovered(folder) == folder
    assert contents(tmp_path) == {"checkpoint/state.json": b"old"}


def test_recovered_leaves_a_finished_save_alone(tmp_path):
    folder = tmp_path / "checkpoint"
    save_folder(folder, "new")
    (tmp_path / ".checkpoint.old").mkdir()  # a kill after the second rename
    assert (lw.recovered(folder) / "state.json").read_text() == "new"
    save_folder(folder, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_save_after_a_kill_between_the_renames_still_has_a_predecessor(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    save_folder(folder, "old")
    folder.rename(tmp_path / ".checkpoint.old")
    with monkeypatch.context() as patch:
        fail_on_call(patch, lw, "sync", 1, FULL)
        with pytest.raises(lw.LatentWireError):
            save_folder(folder, "new")
    assert (lw.recovered(folder) / "state.json").read_text() == "old"


# ---- JSON lines ----------------------------------------------------------------------------------------------------

ROWS = [{"id": "1", "text": "naïve\u2028\u0085 line\nbreak"}, {"id": "2", "x": 1.5}, {"id": "3", "none": None}]


def test_rows_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "records.jsonl"
    assert lw.read_rows(path) == []
    lw.append_rows(path, ROWS[:2])
    lw.append_rows(path, ROWS[2:])
    assert lw.read_rows(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS)


@pytest.mark.parametrize("torn", [b'{"id": "4", "te', b"{", b'{"id": "4"}', '{"id": "é'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off_and_the_rest_kept(torn, tmp_path):
    path = tmp_path / "records.jsonl"
    lw.append_rows(path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert lw.read_rows(path) == ROWS
    assert path.read_bytes() == whole
    lw.append_rows(path, [{"id": "5"}])
    assert lw.read_rows(path) == [*ROWS, {"id": "5"}]


@pytest.mark.parametrize("bad", [b"{not json", b'{"id": "2"', b"\xff\xfe", b""])
def test_a_bad_line_in_the_middle_is_named_by_number(bad, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": "1"}\n' + bad + b'\n{"id": "3"}\n')
    before = path.read_bytes()
    with pytest.raises(lw.LatentWireError, match=r"records\.jsonl line 2 is not JSON"):
        lw.read_rows(path)
    assert path.read_bytes() == before


def test_append_refuses_nan_and_keeps_the_file_readable(tmp_path):
    path = tmp_path / "records.jsonl"
    lw.append_rows(path, ROWS)
    with pytest.raises(lw.LatentWireError, match="not finite"):
        lw.append_rows(path, [{"x": float("nan")}])
    assert lw.read_rows(path) == ROWS


def test_append_on_a_full_disk_is_one_line_and_costs_no_earlier_row(tmp_path):
    path = tmp_path / "records.jsonl"
    lw.append_rows(path, ROWS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))  # room for half a row
    try:
        with pytest.raises(lw.LatentWireError, match=r"cannot write .*records\.jsonl: File too large"):
            lw.append_rows(path, [{"id": "4"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lw.read_rows(path) == ROWS


# ---- a run folder --------------------------------------------------------------------------------------------------

SETTINGS = lw.TrainSettings(dataset="toy", steps=3, sender="tiny-llama", receiver="tiny-qwen", dtype="float32")


def test_a_run_holds_config_environment_and_source_before_any_work(tmp_path):
    run = lw.Run.start(tmp_path / "run", SETTINGS, resume=False)
    assert set(contents(run.folder)) == {"config.json", "env.json", "source.py"}
    assert lw.TrainSettings(**json.loads(run.config_path.read_text())) == SETTINGS
    assert (run.folder / "source.py").read_bytes() == Path(lw.__file__).read_bytes()
    made = json.loads((run.folder / "env.json").read_text())
    assert made["source_sha256"] == lw.sha256_of(run.folder / "source.py")
    assert made["packages"]["torch"] == lw.torch.__version__
    assert made["python"] == platform.python_version()
    assert {"host", "command", "commit", "started", "latentwire"} <= set(made)
    assert not run.done


def test_the_trainer_starts_only_after_the_run_folder_is_complete(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []

    def trainer(*args: Any) -> Any:
        seen.append(set(contents(folder)))
        raise lw.LatentWireError("stop here")

    monkeypatch.setattr(lw, "Trainer", trainer)
    with pytest.raises(lw.LatentWireError, match="stop here"):
        lw.train_run(SETTINGS.model_copy(update={"output_dir": folder, "device": "cpu"}), lw.Silent())
    assert seen == [{"config.json", "env.json", "source.py"}]


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [
        (SETTINGS, False, r"this very run \(unfinished\); add --resume"),
        (SETTINGS.model_copy(update={"steps": 4}), False, r"a shorter run \(steps 3 there, 4 now\); add --resume"),
        (SETTINGS.model_copy(update={"steps": 2}), True, r"different run \(steps 3 there, 2 now\)"),
        (SETTINGS.model_copy(update={"seed": 4, "lr": 0.5}), True, r"lr 0.0005 there, 0.5 now; seed 42 there, 4 now"),
    ],
)
def test_a_run_never_starts_on_top_of_another(settings, resume, message, tmp_path):
    folder = lw.Run.start(tmp_path / "run", SETTINGS, resume=False).folder
    before = contents(folder)
    with pytest.raises(lw.LatentWireError, match=message):
        lw.Run.start(folder, settings, resume)
    assert contents(folder) == before


def test_the_same_run_goes_on_even_with_other_execution_settings(tmp_path):
    folder = lw.Run.start(tmp_path / "run", SETTINGS, resume=False).folder
    before = contents(folder)
    again = SETTINGS.model_copy(update={"log_every": 1, "device": "cpu", "resume": "yes", "state_cache": "memory"})
    assert lw.Run.start(folder, again, resume=True).folder == folder
    assert contents(folder) == before
    lw.write_atomic(folder / "DONE", b"")
    with pytest.raises(lw.LatentWireError, match=r"this very run \(finished\)"):
        lw.Run.start(folder, SETTINGS, resume=False)


def test_results_without_a_config_are_not_overwritten(tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(lw.LatentWireError, match="results without config"):
        lw.Run.start(tmp_path / "run", SETTINGS, resume=False)
    assert not contents(tmp_path)


def test_nothing_to_resume_creates_nothing(tmp_path):
    with pytest.raises(lw.LatentWireError, match="nothing to resume"):
        lw.Run.start(tmp_path / "run", SETTINGS, resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", '{"steps": ', "[]"])
def test_a_damaged_config_is_one_line(text, tmp_path):
    folder = lw.Run.start(tmp_path / "run", SETTINGS, resume=False).folder
    (folder / "config.json").write_text(text)
    with pytest.raises(lw.LatentWireError, match=r"config\.json"):
        lw.Run.start(folder, SETTINGS, resume=True)
