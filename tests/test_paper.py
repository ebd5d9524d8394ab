"""§14 FIGURES AND TABLES, §15 SUITES: records to numbers, tables, figures, a page and a paper.

Most tests use a small suite on disk: the facts of one real evaluation of the toy run, and records drawn at random.
"""

from __future__ import annotations

import csv
import gc
import html
import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from conftest import TOY, contents
from matplotlib.figure import Figure

import LATENTWIRE as lw

ROOT = Path(__file__).resolve().parent.parent
MAIN = (ROOT / "latex" / "main.tex").read_text(encoding="utf-8")
latex = pytest.mark.skipif(
    not shutil.which("latexmk"), reason="no latexmk: apt-get install texlive-latex-recommended latexmk"
)
trains = pytest.mark.trains  # the toy run behind it is trained

N = 60
SEEDS = (1, 2, 3)
SKILL = {"bridge": 0.85, "control:zero": 0.25, "control:shuffled": 0.2, "text": 0.8, "probe": 0.9, "text_relay:8": 0.5,
         "text_relay:16": 0.55, "lora": 0.95}  # fmt: skip
ALIKE = {name for name in SKILL if not lw.METHODS[name].bridged and not lw.METHODS[name].seeded}  # nothing is drawn
SUITE = [(data, size, seed) for data in ("toy", "odd_set") for size in (8, 24) for seed in SEEDS]
READERS = ("aggregate", "stats", "statistical_test", "figures", "tables", "report")


# ---- a suite on disk -----------------------------------------------------------------------------------------------


def write_run(
    folder: Path,
    template: Path,
    right: Mapping[str, Sequence[bool]],
    *,
    data: str = "toy",
    size: int = 8,
    seed: int = 1,
    config: Mapping[str, Any] | None = None,
    golds: str = "abcd",
    prefix: str = "",
    **facts: Any,
) -> Path:
    """A run folder as 'eval' leaves it, with facts from ``template`` and rows that say who was ``right``."""
    own = json.loads((template / "evaluation.json").read_text())
    made = own["provenance"]
    n = len(next(iter(right.values())))
    keys = {name: lw.digest_of([name, data] if name in ALIKE else [name, data, size, seed]) for name in right}
    made |= {"record_key": keys.get("bridge", "none"), "record_keys": keys, "latent_len": size}
    made |= {"seed_of_training": seed, "data_digest": lw.digest_of([data, n])}
    made |= {"command": ["LATENTWIRE.py", "eval", f"--checkpoint={folder.name}"]}
    made["asked"] = lw.digest_of([data, size, {name: v for name, v in (config or {}).items() if name != "seed"}])
    own |= {"dataset": data, "n": n, "order": [*right], "seed": seed}
    own |= {"kind": {name: lw.Kind.of(name).kind for name in right}, "drawn": {n: lw.Kind.of(n).drawn for n in right}}
    rows = []
    for name, values in right.items():
        tokens = {"bridge": size, "text": 40}.get(name, int(name.partition(":")[2]) if "relay" in name else 3)
        for i, value in enumerate(values):
            label = i % 4
            said = label if value else (label + 1 + i // 4 % 3) % 4
            scores = [-1.0 - (k != said) for k in range(4)]
            row = {"key": keys[name], "method": name, "id": f"{prefix}{i}", "gold": [golds[label]]}
            row["generated"] = golds[said]
            row |= {"bytes": 9 * tokens, "tokens": tokens, "gold_tokens": 2, "em": float(value), "f1": float(value)}
            row |= {"gen_correct": float(value), "nll_per_token": 0.5, "first_correct": bool(value), "label": label}
            row |= {"prediction": said, "scores": scores, "correct": bool(value), "seconds": 0.001}
            rows.append(lw.sealed(row))
    asked = {row["id"]: (row["id"], row["gold"], row["label"]) for row in rows}
    own |= {"answers": lw.answers_digest(asked.values()), **facts}
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lw.write_json(folder / "evaluation.json", own)
    settings = json.loads((template / "config.json").read_text())
    settings |= {"dataset": data, "latent_len": size, "seed": seed, "output_dir": str(folder), **(config or {})}
    lw.write_json(folder / "config.json", settings)
    shutil.copyfile(template / "diagnostics.jsonl", folder / "diagnostics.jsonl")
    return folder


def drawn(data: str, size: int, seed: int, names: Sequence[str] = tuple(SKILL), n: int = N) -> dict[str, list[bool]]:
    """Who is right: by chance, and the same every time."""
    found = {}
    for name in names:
        rng = random.Random(f"{data} {name}" if name in ALIKE else f"{data} {name} {size} {seed}")
        found[name] = [rng.random() < SKILL[name] for _ in range(n)]
    return found


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """statsmodels collects garbage at every correction; what is there already need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def real(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run evaluated by 'eval' itself, on 60 rows. Read-only."""
    folder = tmp_path_factory.mktemp("real") / "run"
    shutil.copytree(toy_run, folder)
    lw.eval_main(["--checkpoint", str(folder), "--num_samples", str(N), "--state_cache", "memory"])
    return folder


@pytest.fixture(scope="module")
def suite(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two data sets, two sizes, three seeds, eight methods. Read-only: the results files are what the records say."""
    base = tmp_path_factory.mktemp("suite") / "runs"
    for data, size, seed in SUITE:
        folder = base / f"{data}-latent_len{size}" / f"seed{seed}"
        write_run(folder, real, drawn(data, size, seed), data=data, size=size, seed=seed)
        lw.open_evaluation(folder).rebuild()
    shutil.copyfile(real / "artifacts.safetensors", base / "toy-latent_len8" / "seed1" / "artifacts.safetensors")
    (base / "benchmark").mkdir()
    shutil.copyfile(ROOT / "latex" / "results" / "benchmark.json", base / "benchmark" / "benchmark.json")
    before = contents(base)
    yield base
    assert contents(base) == before, "a test wrote into the shared suite; it must work on a copy"


@pytest.fixture(scope="module")
def small(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two columns of the suite. Read-only."""
    base = tmp_path_factory.mktemp("small") / "runs"
    for name in ("toy-latent_len8", "odd_set-latent_len24"):
        shutil.copytree(suite / name, base / name)
    (base / "toy-latent_len8" / "seed1" / "artifacts.safetensors").unlink()
    before = contents(base)
    yield base
    assert contents(base) == before, "a test wrote into the shared runs; it must work on a copy"


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """The same to change."""
    return Path(shutil.copytree(small, tmp_path / "runs"))


@pytest.fixture(scope="module")
def gallery(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Every figure of the suite, and what was said."""
    folder = tmp_path_factory.mktemp("gallery")
    drawn, without = lw.draw_figures(lw.ReportInputs.below(suite), folder)
    assert not without
    return folder, [path.name for path in drawn]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not look at figures."""
    monkeypatch.setattr(lw, "draw_figures", lambda *_: ([], []))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a command that must be refused."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        assert lw.main([str(word) for word in words]) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def column_of(base: Path, data: str = "toy", size: int = 8) -> lw.ResultGroup:
    columns, left = lw.result_groups(lw.evaluations_below(base))
    assert not left
    return next(c for c in columns if (c.key["dataset"], c.key["latent_len"]) == (data, size))


def change_rows(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None], *, seal: bool = True) -> None:
    """Every record through ``change``; None leaves it out. ``seal`` gives what changed its sum, as whoever forges would."""
    path = run / "records.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [(row, change(dict(row))) for row in before]
    kept = [new if new == old or not seal else lw.sealed(new) for old, new in rows if new is not None]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    lw.write_json(path, value)


def other_outcome(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose answer is right where it was wrong and wrong where it was right, all of it in agreement."""
    said = (row["label"] + 1) % len(row["scores"]) if row["correct"] else row["label"]
    scores = [-1.0 - (k != said) for k in range(len(row["scores"]))]
    return {**row, "prediction": said, "scores": scores, "correct": not row["correct"]}


def flip(method: str, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The other outcome of one row of one method."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return other_outcome(row) if (row["method"], row["id"]) == (method, name) else row

    return change


def words_of(command: str, base: Path, out: Path) -> list[Any]:
    """A reading command over a folder of runs."""
    runs = sorted(path.parent for path in base.rglob("records.jsonl")) or [base, base]
    told = {"report": [base], "statistical_test": ["--exp1", runs[0], "--exp2", runs[-1]]}
    return [command, *told.get(command, ["--base_dir", base, "--output_dir", out])]


# ---- records are everything ----------------------------------------------------------------------------------------


@trains
@pytest.mark.parametrize(
    ("command", "harm"), [("aggregate", "gone"), ("report", "gone"), ("aggregate", "damaged"), ("report", "torn")]
)
def test_results_are_made_anew_from_facts_and_records(command, harm, own, say, tmp_path, no_figures):
    run = own / "odd_set-latent_len24" / "seed2"
    path = run / "results.json"
    before = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "damaged":
        change_json(path, lambda told: told["methods"]["bridge"].update(accuracy=0.123))
    else:
        path.write_bytes(before[:100])
    assert not path.exists() or path.read_bytes() != before
    say(*words_of(command, run, tmp_path / "out"))
    assert path.read_bytes() == before


@trains
def test_what_eval_wrote_is_a_function_of_facts_and_records(real, tmp_path, say):
    run = Path(shutil.copytree(real, tmp_path / "run"))
    (run / "results.json").unlink()
    say("aggregate", "--base_dir", run, "--output_dir", "out")
    assert (run / "results.json").read_bytes() == (real / "results.json").read_bytes()
    facts = json.loads((run / "evaluation.json").read_text())
    assert not {*facts} & {*lw.DERIVED}, "facts must not say what records say"
    change_rows(run, flip("probe", "1"))
    say("aggregate", "--base_dir", run, "--output_dir", "out")
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (real, run))
    gap = old["methods"]["probe"]["accuracy"] - new["methods"]["probe"]["accuracy"]
    assert abs(gap) == pytest.approx(1 / N)
    assert {name for name in old["methods"] if old["methods"][name] != new["methods"][name]} == {"probe"}


@trains
@pytest.mark.parametrize("command", READERS)
def test_without_records_there_are_no_numbers(command, own, refused, tmp_path):
    gone = own / "odd_set-latent_len24" / "seed1" / "records.jsonl"  # the first of all
    gone.unlink()
    words = words_of(command, own, tmp_path / "out")
    if command == "statistical_test":
        words = [command, "--exp1", gone.parent, "--exp2", own / "toy-latent_len8" / "seed1"]
    assert str(gone) in refused(*words)
    assert not (tmp_path / "out").exists()
    if command != "statistical_test":
        assert str(gone) in refused(*words_of(command, gone.parent, tmp_path / "out"))


@trains
def test_an_evaluation_that_has_just_begun_is_left_out(own, say, refused, tmp_path):
    begun = own / "toy-latent_len8" / "seed1"
    for name in ("records.jsonl", "results.json"):
        (begun / name).unlink()
    assert f"left out: {begun / 'results.json'}: " in say(
        "aggregate", "--base_dir", own, "--output_dir", tmp_path / "out"
    )
    assert "no whole evaluation" in refused("report", begun)


@trains
@pytest.mark.parametrize("command", READERS)
def test_a_folder_without_runs_says_what_to_do(command, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(*words_of(command, tmp_path / "empty", tmp_path / "out"))
    assert "empty" in error and "eval" in error


@trains
def test_two_methods_are_compared_once_however_many_tables_show_it(small, monkeypatch, tmp_path):
    battery, calls = lw.battery, []
    monkeypatch.setattr(lw, "battery", lambda *scores, **options: calls.append(1) or battery(*scores, **options))
    material = lw.ReportInputs.below(small)
    told = [lw.compared(column, correction="none") for column in material.groups]
    trained = [name for name in SKILL if lw.METHODS[name].trained]  # each is also beside the best constant answer
    once = sum(len(own["comparisons"]) + len(trained) for own in told)
    assert trained and len(calls) == once > 0
    again = [lw.compared(column) for column in material.groups]
    assert len(calls) == once
    lw.write_tables(material, tmp_path)  # the best method is also compared with the second
    assert len(calls) == sum(len(column.differences) for column in material.groups)
    for a, b in zip(told, again, strict=True):  # a correction of one table is not seen in another
        assert all(row["p_corrected"] == row["p"] for row in a["comparisons"].values())
        assert any(row["p_corrected"] > row["p"] for row in b["comparisons"].values())


@trains
@pytest.mark.parametrize("command", ["figures", "tables", "report"])
def test_a_damaged_benchmark_is_named(command, own, refused, tmp_path):
    damaged = own / "benchmark" / "benchmark.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text('{"rows": [')
    error = refused(*words_of(command, own, tmp_path / "out"))
    assert str(damaged) in error and "JSON" in error


def differing(a: Any, b: Any, where: str = "") -> set[str]:
    """Paths of the values that are not the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        return set().union(*(differing(a[key], b[key], f"{where}/{key}") for key in a))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return set().union(*(differing(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))))
    return set() if a == b else {where}


def everything(base: Path, out: Path, say: Callable[..., str]) -> dict[str, Any]:
    """All numbers that come from a folder of runs."""
    say("aggregate", "--base_dir", base, "--output_dir", out)
    say("stats", "--base_dir", base, "--output_dir", out)
    say("tables", "--base_dir", base, "--output_dir", out)
    found: dict[str, Any] = {"results": {str(p.parent.relative_to(base)): json.loads(p.read_text())
                                         for p in sorted(base.rglob("results.json"))}}  # fmt: skip
    for path in sorted(out.iterdir()):
        text = path.read_text()
        found[path.name] = json.loads(text) if path.suffix == ".json" else text.splitlines()
    return found


@trains
@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("harm", ["outcome", "half", "field", "unsealed", "gold", "gone"])
def test_an_edited_record_is_refused_in_one_line(command, harm, own, refused, tmp_path):
    """No number is made of a record that somebody changed: not of the outcome alone, nor where all of it agrees."""
    run = own / "odd_set-latent_len24" / "seed1"  # the first of all
    change: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "outcome": other_outcome, "half": lambda row: row | {"correct": not row["correct"]},
        "field": lambda row: row | {"f1": 1 - row["f1"]},
        "unsealed": lambda row: {k: v for k, v in other_outcome(row).items() if k != "sum"},
        "gold": lambda row: row | {"gold": ["z"]}, "gone": lambda row: {k: v for k, v in row.items() if k != "gold"},
    }  # fmt: skip
    before = (run / "results.json").read_bytes()
    change_rows(run, lambda row: change[harm](row) if (row["method"], row["id"]) == ("text", "7") else row, seal=False)
    words = words_of(command, own, tmp_path / "out")
    if command == "statistical_test":
        words = [command, "--exp1", run, "--exp2", own / "odd_set-latent_len24" / "seed2"]
    number = next(
        n for n, line in enumerate((run / "records.jsonl").read_text().splitlines(), 1)
        if (json.loads(line)["method"], json.loads(line)["id"]) == ("text", "7")
    )  # fmt: skip
    assert f"{run / 'records.jsonl'} line {number} " in refused(*words)
    assert not (tmp_path / "out").exists() and (run / "results.json").read_bytes() == before


@trains
@pytest.mark.parametrize("command", READERS)
def test_gold_answers_changed_and_sealed_again_are_refused(command, own, refused, tmp_path):
    """Sums can be made again; the evaluation still knows what was asked, whether one method has it otherwise or all."""
    for names in (("text",), tuple(SKILL)):
        run = own / "odd_set-latent_len24" / "seed1"
        change_rows(run, lambda row, n=names: row | {"gold": ["z"]} if row["id"] == "7" and row["method"] in n else row)
        words = words_of(command, own, tmp_path / "out")
        if command == "statistical_test":
            words = [command, "--exp1", run, "--exp2", own / "odd_set-latent_len24" / "seed2"]
        assert f"{run / 'records.jsonl'}: " in refused(*words) and not (tmp_path / "out").exists()


@trains
@pytest.mark.parametrize("method", [pytest.param("text", marks=pytest.mark.slow), "bridge"])
def test_one_record_changes_what_stems_from_it_and_nothing_else(method, own, say, tmp_path):
    before = everything(own, tmp_path / "out", say)
    run = own / "toy-latent_len8" / "seed1"
    change_rows(run, flip(method, "7"))
    after = everything(own, tmp_path / "out", say)
    places = differing(before, after)
    title = "toy"
    at = [c["title"] for c in before["statistical_report.json"]["columns"]].index(title)
    member = [r["seed"] for r in before["aggregated_results.json"]["groups"][at]["runs"]].index(1)
    mine = [f"/aggregated_results.json/groups/{at}/methods/{method}/",
            f"/results/toy-latent_len8/seed1/methods/{method}/",
            f"/statistical_report.json/columns/{at}/methods/{method}/"]  # fmt: skip
    assert {f"{mine[0]}mean", f"{mine[0]}values/0", f"{mine[2]}mean", f"{mine[1]}accuracy"} <= places
    if method != "bridge":  # then every comparison of the column is another
        compared = f"/statistical_report.json/columns/{at}/comparisons/"
        assert f"{compared}{method}/difference" in places
        mine += [f"{compared}{method}/"]
        spread = {p for p in places if p.startswith(compared) and p.rsplit("/", 1)[1] in ("p_corrected", "significant")}
        places -= spread  # Holm's correction is over the family
        rivals = before["statistical_report.json"]["columns"][at]["families"]["rivals"]
        assert method in rivals and {p.removeprefix(compared).split("/")[0] for p in spread} <= {*rivals}
    else:
        mine += [f"/statistical_report.json/columns/{at}/comparisons/"]
    told = ("/results/toy-latent_len8/seed1/", f"/aggregated_results.json/groups/{at}/runs/{member}/verdict",
            f"/statistical_report.json/columns/{at}/")  # fmt: skip
    for place in sorted(places):
        if place.endswith(("/verdict", "/p", "/communication")) or "/p_bridge_vs/" in place or "/p_above_" in place:
            assert place.startswith((*told, *mine)), place
        elif place.startswith("/results/"):
            assert place.startswith(f"/results/toy-latent_len8/seed1/methods/{method}/") or "/gates" in place, place
        elif place.split("/")[1].endswith(".json"):
            assert place.startswith(tuple(mine)), place
    cells = {name: changed_cells(before[name], after[name], sign) for name, sign in
             (("main_results.tex", "&"), ("table.md", "|"), ("aggregated_results.csv", ","))}  # fmt: skip
    plain = lw.PLAIN_NAMES.get(method, method)
    tex_heads = [head.strip() for head in before["main_results.tex"][2].rstrip("\\ ").split("&")]
    assert {(row[0].strip(), tex_heads[i]) for row, i in cells["main_results.tex"]} == {(plain, title)}
    changed = {(row[1].strip(), i) for row, i in cells["table.md"]}
    assert (plain, before["table.md"][0].split("|").index(f" {title}, accuracy %, n {N} ")) in changed
    if method != "bridge":
        assert len(changed) == 1
    at = [before["aggregated_results.csv"][0].split(",").index(head) for head in ("dataset", "latent_len", "method")]
    # a list, such as layers, is one quoted cell
    assert {tuple(row[i] for i in at) for row, _ in cells["aggregated_results.csv"]} == {("toy", "8", method)}


def changed_cells(before: list[str], after: list[str], sign: str) -> list[tuple[list[str], int]]:
    """(row's cells, index) of the cells that changed."""
    found = []
    for old, new in zip(before, after, strict=True):
        a, b = (next(csv.reader([text])) if sign == "," else text.split(sign) for text in (old, new))
        found += [(a, i) for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return found


@trains
def test_the_papers_counts_follow_the_records(own, small, say):
    numbers = {}
    for state in ("before", "after"):
        say("tables", "--base_dir", own, "--output_dir", state)
        numbers[state] = dict(re.findall(r"\\lwset\{(\w+)\}\{(.*)\}", Path(state, "numbers.tex").read_text()))
        for seed in SEEDS if state == "before" else ():
            change_rows(own / "toy-latent_len8" / f"seed{seed}",
                        lambda r: other_outcome(r) if r["method"] == "bridge" and r["correct"] else r)  # fmt: skip
    assert (
        numbers["before"]["nrecords"] == str(2 * N * (3 * len({*SKILL} - ALIKE) + len(ALIKE)))
        and numbers["after"]["ncells"] == "2"
    )
    told = [lw.compared(column)["communication"] for column in (column_of(small), column_of(small, "odd_set", 24))]
    assert told[0] and int(numbers["before"]["nshown"]) == sum(told) == int(numbers["after"]["nshown"]) + 1
    changed = {key for key in numbers["before"] if numbers["before"][key] != numbers["after"][key]}
    assert "nshown" in changed <= {"nshown", "nrivalsahead"}
    assert numbers["before"]["latents"] == "8, 24" and numbers["before"]["seeds"] == "1, 2, 3"
    assert numbers["before"]["nmethods"] == str(len(SKILL)) and numbers["before"]["ndatasets"] == "2"


# ---- aggregate -----------------------------------------------------------------------------------------------------


@trains
def test_every_table_says_what_the_records_say(suite, say):
    out, own = Path("results"), suite
    said = say("aggregate", "--base_dir", own, "--output_dir", out)
    shown_table = (out / "table.md").read_text().rstrip()
    assert said == f"{lw.plain(shown_table)}\n{out / 'aggregated_results.json'}\n"
    told = json.loads((out / "aggregated_results.json").read_text())
    groups = {(g["dataset"], g["latent_len"]): g for g in told["groups"]}
    with (out / "aggregated_results.csv").open() as stream:
        rows = {(r["dataset"], int(r["latent_len"]), r["method"]): r for r in csv.DictReader(stream)}
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in (out / "aggregated_results.md").read_text().splitlines()
    ]
    listed = {(line[0], int(line[2]), line[4]): line for line in lines[2:]}
    table = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in (out / "table.md").read_text().splitlines()
        if "|" in line
    ]
    assert told["left_out"] == [] and len(groups) == 4 and len(rows) == len(listed) == 4 * len(SKILL)
    assert [row[0] for row in table[2:]] == [lw.PLAIN_NAMES.get(name, name) for name in lw.METHODS if name in SKILL]
    for (data, size), group in groups.items():
        assert [run["seed"] for run in group["runs"]] == [*SEEDS]
        assert [(out / run["file"]).resolve() for run in group["runs"]] == [
            own / f"{data}-latent_len{size}" / f"seed{seed}" / "results.json" for seed in SEEDS
        ]
        column = table[0].index(f"{data}, {size} latents, accuracy %, n {N}")
        for name in SKILL:
            seeds = [] if name in ALIKE else [*SEEDS]
            scores = [sum(drawn(data, size, seed)[name]) / N for seed in seeds or SEEDS[:1]]
            own_told, row, line = group["methods"][name], rows[data, size, name], listed[data, size, name]
            assert own_told["values"] == pytest.approx(scores) and own_told["seeds"] == seeds
            spread = stdev(scores) if seeds else None
            assert own_told["mean"] == pytest.approx(mean(scores)) and own_told["sd"] == pytest.approx(spread)
            low, high = own_told["ci"]
            assert low <= own_told["mean"] <= high
            for field, value in (
                ("mean", own_told["mean"]),
                ("sd", own_told["sd"]),
                ("ci_low", low),
                ("ci_high", high),
            ):
                assert (float(row[field]) if row[field] else None) == pytest.approx(value)
            assert row["runs"] == line[7] == str(len(scores)) and row["settings"] == line[3] == group["settings"]
            assert line[6] == f"{mean(scores):.3f}" + (f" ± {spread:.3f}" if seeds else "")
            shown = next(r for r in table if r[0] == lw.PLAIN_NAMES.get(name, name))[column]
            spread = f" ± {100 * spread:.1f} (3)" if spread else f" ({100 * low:.1f}–{100 * high:.1f})"
            above = " ↑" if mean(scores) > group["methods"]["bridge"]["mean"] else ""
            assert shown == f"{100 * mean(scores):.1f}{spread}{above}"


@trains
def test_what_is_made_of_runs_goes_beside_them(own, say):
    """Without --output_dir nothing lands in the working folder."""
    before = {*contents(own)}
    say("aggregate", "--base_dir", own)
    made = {"aggregated_results.json", "aggregated_results.csv", "aggregated_results.md", "table.md"}
    assert {*contents(own)} - before == made
    say("stats", "--base_dir", own)
    reports = {"statistical_report.json", "statistical_report.txt"}
    assert {*contents(own)} - before == made | reports
    first = {name: (own / name).read_bytes() for name in reports}
    for name in reports:
        (own / name).unlink()
    say("stats", "--results_path", own / "aggregated_results.json")
    assert {name: (own / name).read_bytes() for name in reports} == first
    assert [path.resolve() for path in Path().iterdir()] == [own]


@trains
@pytest.mark.parametrize("field", ["protocol", "prompts", "data_digest"])
def test_runs_of_one_setting_that_were_asked_otherwise_are_refused(field, own, refused, tmp_path):
    odd, first = (own / "toy-latent_len8" / f"seed{seed}" for seed in (2, 1))

    def change(facts: dict[str, Any]) -> None:
        (facts if field == "protocol" else facts["provenance"])[field] = "another"

    change_json(odd / "evaluation.json", change)
    for command in ("aggregate", "stats", "tables"):
        error = refused(*words_of(command, own, tmp_path / "out"))
        assert str(odd / "results.json") in error and str(first / "results.json") in error
        assert f"differ in {field}" in error and "another" in error
    assert not (tmp_path / "out").exists()


@trains
@pytest.mark.parametrize(
    "other", [{"config": {"lr": 0.5}}, {"size": 16}, {"n": 50}, {"data": "else"}, {"split": "validation"}]
)
def test_other_settings_or_data_stand_apart(other, real, tmp_path):
    n = other.get("n", N)
    kept = {key: value for key, value in other.items() if key != "n"}
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"seed{seed}", real, drawn("toy", 8, seed), seed=seed)
        write_run(tmp_path / "runs" / "b" / f"seed{seed}", real, drawn("toy", 8, seed + 5, n=n), seed=seed, **kept)
    columns, left = lw.result_groups(lw.evaluations_below(tmp_path / "runs"))
    assert not left and sorted(len(column.members) for column in columns) == [2, 2]
    assert len({column.title for column in columns}) == 2
    for column in columns:
        assert len({member.file.parent.parent for member in column.members}) == 1


@trains
def test_another_version_of_the_data_stands_apart_where_settings_differ(real, tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        run = write_run(tmp_path / "runs" / name, real, drawn("toy", 8, 1), config={"lr": rate})
        change_json(run / "evaluation.json", lambda f, name=name: f["provenance"].update(data_digest=name))
    columns, _ = lw.result_groups(lw.evaluations_below(tmp_path / "runs"))
    assert [len(column.members) for column in columns] == [1, 1]
    assert {column.title for column in columns} == {"toy, a", "toy, b"}


@trains
def test_columns_of_runs_with_one_name_can_be_told_apart(real, tmp_path, say):
    for home, rate in (("x", 0.1), ("y", 0.2)):
        write_run(tmp_path / "runs" / home / "a", real, drawn("toy", 8, 1), config={"lr": rate})
    say("tables", "--base_dir", "runs", "--output_dir", "out")
    columns, _ = lw.result_groups(lw.evaluations_below(tmp_path / "runs"))
    assert len(columns) == 2 and len({column.title for column in columns}) == 2


@trains
def test_a_rival_without_a_bridge_joins_the_bridges_column(real, tmp_path, say):
    base = tmp_path / "runs"
    shutil.copytree(real, base / "bridge")
    common = ["--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu", "--dtype", "float32"]
    for folder, rows in (("same", N), ("fewer", 30)):
        lw.main(["baseline", "sender_label", "--dataset", "toy", "--num_samples", str(rows), *common, "--output_dir",
                 str(base / folder)])  # fmt: skip
    columns, left = lw.result_groups(lw.evaluations_below(base))
    assert not left and len(columns) == 2
    [joined] = [column for column in columns if "bridge" in column.summaries]
    assert {member.file.parent.name for member in joined.members} == {"bridge", "same"}
    assert "sender_label" in joined.summaries and joined.key["n"] == N
    [alone] = [column for column in columns if column is not joined]
    assert {*alone.summaries} == {"sender_label"} and alone.key["n"] == 30


@trains
def test_unfinished_evaluations_are_left_out_and_told(own, say, no_figures):
    short, broken = own / "toy-latent_len8" / "seed2", own / "odd_set-latent_len24" / "seed3"
    change_rows(short, lambda row: None if row["method"] == "lora" and int(row["id"]) >= 58 else row)
    change_rows(broken, lambda row: row | {"error": "no luck"} if (row["method"], row["id"]) == ("probe", "0") else row)
    out = say("aggregate", "--base_dir", own, "--output_dir", "out")
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert lines == [
        f"left out: {broken / 'results.json'}: probe has 60 of 60 rows, 1 of them failed",
        f"left out: {short / 'results.json'}: lora has 58 of 60 rows",
    ]
    told = json.loads(Path("out/aggregated_results.json").read_text())
    assert [f"left out: {line}" for line in told["left_out"]] == lines
    seeds = {(g["dataset"], g["latent_len"]): [r["seed"] for r in g["runs"]] for g in told["groups"]}
    assert seeds == {("toy", 8): [1, 3], ("odd_set", 24): [1, 2]}
    assert "left out: " in say("stats", "--base_dir", own, "--output_dir", "out")
    page = lw.write_report(own).read_text()
    assert all(html.escape(line) in page for line in lines)


# ---- statistics ----------------------------------------------------------------------------------------------------


CONSTANT = [float(i % 4 == 0) for i in range(N)]  # the classes take turns, so one answer is right in every fourth row


def of_families(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names by family, by hand: what carries nothing about the example, and all else."""
    bars = [name for name in found if name == lw.CONSTANT or name.startswith("control:")]
    return {"controls": bars, "rivals": [name for name in found if name not in bars]}


def correct_by_hand(
    found: Mapping[str, Mapping[str, Any]], correction: Callable[[Sequence[float]], Sequence[float]]
) -> dict[str, float]:
    """Corrected p by name, within the two families."""
    told: dict[str, float] = {}
    for names in of_families(found).values():
        told |= zip(names, correction([found[name]["p"] for name in names]), strict=True)
    return told


def holm_by_hand(p_values: Sequence[float]) -> list[float]:
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = least
    return found


def bh_by_hand(p_values: Sequence[float], factor: float = 1.0) -> list[float]:
    m = len(p_values)
    return [min([1.0, *(factor * m * q / sum(x <= q for x in p_values) for q in p_values if q >= p)]) for p in p_values]


@trains
def test_comparisons_are_those_of_the_functions(small, say):
    say("stats", "--base_dir", small, "--output_path", "told.json")
    told = json.loads(Path("told.json").read_text())
    assert [(c["dataset"], c["latent_len"]) for c in told["columns"]] == [("odd_set", 24), ("toy", 8)]
    for column in told["columns"]:
        rights = [drawn(column["dataset"], column["latent_len"], seed) for seed in SEEDS]
        scores = {name: np.array([own[name] for own in rights], dtype=float).T for name in SKILL}
        scores[lw.CONSTANT] = np.array([CONSTANT]).T
        assert column["reference"] == "bridge" and {*column["comparisons"]} == {*scores} - {"bridge"}
        for name, row in column["comparisons"].items():
            gaps = scores["bridge"] - scores[name]
            low, high, p = lw.crossed_interval(gaps)
            assert (row["p"], row["ci"], row["seeds"]) == (pytest.approx(p), pytest.approx([low, high]), 3)
            direct = lw.battery(scores["bridge"].mean(1).tolist(), scores[name].mean(1).tolist())
            assert row["difference"] == pytest.approx(gaps.mean())
            for field in ("p_t", "p_wilcoxon", "p_permutation", "cohens_d", "hedges_g", "n"):
                assert row[field] == pytest.approx(direct[field]), field
        told_of = column["comparisons"]
        assert {n: row["p_corrected"] for n, row in told_of.items()} == pytest.approx(
            correct_by_hand(told_of, holm_by_hand)
        )
        assert {family: {*names} for family, names in column["families"].items()} == {
            family: {*names} for family, names in of_families(told_of).items()
        }
        assert all(row["family"] == next(f for f, own in column["families"].items() if n in own)
                   for n, row in told_of.items())  # fmt: skip
    assert Path("told.txt").read_text().count("corrected: holm over 3 of controls, 5 of rivals") == 2


@trains
def test_one_seed_is_compared_row_by_row(suite, say):
    say("stats", "--base_dir", suite / "toy-latent_len8" / "seed2", "--output_dir", "out")
    [column] = json.loads(Path("out/statistical_report.json").read_text())["columns"]
    right = {name: [float(x) for x in own] for name, own in drawn("toy", 8, 2).items()} | {lw.CONSTANT: CONSTANT}
    assert {*column["comparisons"]} == {*right} - {"bridge"}
    for name, row in column["comparisons"].items():
        direct = lw.battery(right["bridge"], right[name])
        assert {key: row[key] for key in direct} == direct and row["test"] == "McNemar, exact"
        assert row["p"] == lw.mcnemar_exact([bool(x) for x in right["bridge"]], [bool(x) for x in right[name]])


@trains
@pytest.mark.parametrize("how", ["holm", "bh", "fdr_bh", "by", "bonferroni", "none"])
def test_corrections_are_within_the_families_of_a_column(how, suite, say):
    run = suite / "toy-latent_len8" / "seed2"
    out = say("stats", "--base_dir", run, "--output_path", "told.json", "--correction", how, "--alpha", "0.01")
    [column] = json.loads(Path("told.json").read_text())["columns"]
    by_hand: dict[str, Callable[[Sequence[float]], Sequence[float]]] = {
        "holm": holm_by_hand, "bonferroni": lambda p: [min(1.0, len(p) * x) for x in p], "none": list,
        "bh": bh_by_hand, "fdr_bh": bh_by_hand, "by": lambda p: bh_by_hand(p, sum(1 / k for k in range(1, len(p) + 1))),
    }  # fmt: skip
    wanted = correct_by_hand(column["comparisons"], by_hand[how])
    assert len(wanted) == len(SKILL)
    assert {name: row["p_corrected"] for name, row in column["comparisons"].items()} == pytest.approx(
        wanted, rel=1e-9, abs=0
    )
    assert {n: row["significant"] for n, row in column["comparisons"].items()} == {
        n: q < 0.01 for n, q in wanted.items()
    }
    assert f"corrected: {how} over 3 of controls, 5 of rivals" in out


@trains
def test_equal_columns_are_corrected_once(real, tmp_path):
    """Two names of equal scores are one test: a family with a twin is corrected as without it."""
    right, twin, found = drawn("toy", 8, 1), "text_relay:16", {}
    for name, rights in (("with", right | {twin: right["text_relay:8"]}), ("without", {**right})):
        if name == "without":
            del rights[twin]
        write_run(tmp_path / name, real, rights)
        found[name] = lw.compared(column_of(tmp_path / name))["comparisons"]
    assert found["with"][twin]["same_as"] == "text_relay:8" and "same_as" not in found["with"]["text_relay:8"]
    assert found["with"][twin]["p_corrected"] == found["with"]["text_relay:8"]["p_corrected"]
    assert {n: r["p_corrected"] for n, r in found["with"].items() if n != twin} == {
        n: r["p_corrected"] for n, r in found["without"].items()
    }


@trains
def test_a_broken_rival_is_marked_everywhere_and_compared_nowhere(real, tmp_path, say, no_figures):
    """A trained method that is no better than the best constant answer says nothing about what bridges are worth."""
    for seed in SEEDS:
        right = drawn("toy", 8, seed) | {"probe": [i % 4 == seed % 4 for i in range(N)]}
        write_run(tmp_path / "runs" / f"seed{seed}", real, right, seed=seed)
    out = say("aggregate", "--base_dir", "runs", "--output_dir", "out")
    say("tables", "--base_dir", "runs", "--output_dir", "out")
    said = say("stats", "--base_dir", "runs", "--output_dir", "out")
    [column] = json.loads(Path("out/statistical_report.json").read_text())["columns"]
    assert {*column["broken"]} == {"probe"} and "best constant answer" in column["broken"]["probe"]
    assert {*column["comparisons"]} == {*SKILL, lw.CONSTANT} - {"bridge", "probe"}
    assert "probe is broken and not compared" in said
    for text in (out, Path("out/table.md").read_text(), Path("out/main_results.tex").read_text()):
        marked = [line for line in text.splitlines() if line.endswith(("|", r"\\")) and "broken" in line]
        assert len(marked) == 1 and lw.PLAIN_NAMES.get("probe", "probe") in marked[0]
    with Path("out/aggregated_results.csv").open() as stream:
        assert [row["method"] for row in csv.DictReader(stream) if row["broken"]] == ["probe"]
    page = lw.write_report(Path("runs")).read_text()
    assert "probe is broken and not compared" in page and "Broken is not beaten" in page
    results = json.loads(Path("runs/seed1/results.json").read_text())
    assert "probe" in results["gates"] and "probe" not in results["p_bridge_vs"] and "text" in results["p_bridge_vs"]


@trains
def test_an_unknown_word_of_statistics_is_refused_with_advice(suite, refused):
    assert "'holm'" in refused("stats", "--base_dir", suite, "--correction", "hom")
    assert "'bonferroni'" in refused("stats", "--base_dir", suite, "--correction", "bonferoni")
    runs = [suite / "toy-latent_len8" / f"seed{seed}" for seed in (1, 2)]
    assert "'holm'" in refused("statistical_test", "--exp1", runs[0], "--exp2", runs[1], "--correction", "hom")
    assert "'text'" in refused("stats", "--base_dir", suite, "--baseline", "txt")
    error = refused("stats", "--base_dir", suite, "--baseline", "fewshot:receiver")
    assert "fewshot:receiver" in error and "bridge" in error
    assert not Path("results").exists()


@trains
def test_another_reference(small, say):
    base = small / "toy-latent_len8"
    [theirs] = [lw.compared(column) for column in lw.result_groups(lw.evaluations_below(base))[0]]
    for word in ("text", "direct"):
        say("stats", "--base_dir", base, "--output_path", "text.json", "--baseline", word)
        [mine] = json.loads(Path("text.json").read_text())["columns"]
        assert mine["reference"] == "text" and {*mine["comparisons"]} == {*SKILL} - {"text"}
        a, b = mine["comparisons"]["bridge"], theirs["comparisons"]["text"]
        assert a["difference"] == pytest.approx(-b["difference"]) and a["p"] == pytest.approx(b["p"])


@pytest.mark.slow
@trains
def test_an_aggregate_stands_for_its_runs(own, say):
    say("aggregate", "--base_dir", own, "--output_dir", "results")
    say("stats", "--results_path", "results/aggregated_results.json", "--output_path", "x.json")
    say("stats", "--base_dir", own, "--output_path", "y.json")
    assert Path("x.json").read_bytes() == Path("y.json").read_bytes()
    say("tables", "--results_path", "results/aggregated_results.json", "--output_dir", "x")
    say("tables", "--base_dir", own, "--output_dir", "y")
    assert contents(Path("x")) == contents(Path("y"))


@trains
@pytest.mark.parametrize("path", ["nowhere", "nowhere/aggregated_results.json", "other.json"])
def test_a_results_path_that_is_none_is_refused(path, refused):
    Path("other.json").write_text("{}")
    assert path.split("/")[0] in refused("stats", "--results_path", path, "--output_path", "x.json")


@trains
def test_few_rows_and_few_seeds_are_told(suite, real, tmp_path):
    def warned(base: Path, size: int = 8) -> list[str]:
        return lw.compared(column_of(base, size=size))["warnings"]

    assert [line.split(":")[0] for line in warned(suite)] == ["n = 60 is small"]
    assert [line.split(":")[0] for line in warned(suite / "toy-latent_len8" / "seed1")] == ["n = 60 is small", "1 seed"]
    many = drawn("toy", 8, 1, n=100)
    write_run(tmp_path / "many" / "seed1", real, many)
    assert [line.split(":")[0] for line in warned(tmp_path / "many")] == ["1 seed"]
    write_run(tmp_path / "many" / "seed2", real, drawn("toy", 8, 2, n=100), seed=2)
    assert [line.split(":")[0] for line in warned(tmp_path / "many")] == ["2 seeds"]


@trains
def test_two_experiments_side_by_side(suite, say):
    a, b = (suite / "toy-latent_len8" / f"seed{seed}" for seed in (1, 2))
    out = say("statistical_test", "--exp1", a, "--exp2", b, "--output_path", "runs.json")
    told = json.loads(Path("runs.json").read_text())
    assert {*told["comparisons"]} == {*SKILL} and "latent bridge" in out and "n = 60" in out.replace("\n", " ")
    for name, row in told["comparisons"].items():
        one, two = ([float(x) for x in drawn("toy", 8, seed)[name]] for seed in (1, 2))
        direct = lw.battery(one, two)
        assert {key: row[key] for key in direct} == direct
        assert (told["means"][name]["exp1"]["mean"], told["means"][name]["exp2"]["mean"]) == (
            pytest.approx(mean(one)), pytest.approx(mean(two)))  # fmt: skip
    for control in (True, False):
        family = [row for name, row in told["comparisons"].items() if lw.Kind.of(name).control == control]
        assert [row["p_corrected"] for row in family] == pytest.approx(holm_by_hand([row["p"] for row in family]))
    say("statistical_test", "--exp1", a.parent, "--exp2", suite / "toy-latent_len24", "--output_path", "seeds.json")
    told = json.loads(Path("seeds.json").read_text())
    eight, more = (np.array([drawn("toy", size, s)["bridge"] for s in SEEDS], dtype=float).T for size in (8, 24))
    low, high, p_value = lw.crossed_interval(eight - more)
    row = told["comparisons"]["bridge"]
    assert (row["p"], row["ci"]) == (pytest.approx(p_value), pytest.approx([low, high]))
    assert told["comparisons"]["text"]["difference"] == 0 and told["comparisons"]["text"]["p"] == 1


@trains
def test_experiments_on_other_rows_are_refused(suite, real, refused, tmp_path):
    a, b = suite / "toy-latent_len8", suite / "odd_set-latent_len8"
    error = refused("statistical_test", "--exp1", a, "--exp2", b)
    assert str(a) in error and str(b) in error and "dataset" in error
    few = write_run(tmp_path / "few", real, drawn("toy", 8, 1, n=50))
    assert "differ in n" in refused("statistical_test", "--exp1", a / "seed1", "--exp2", few)
    moved = write_run(tmp_path / "moved", real, drawn("toy", 8, 1), prefix="x")
    assert "test rows" in refused("statistical_test", "--exp1", a / "seed1", "--exp2", moved)
    assert "holds 4 results" in refused("statistical_test", "--exp1", suite, "--exp2", a)


@trains
def test_experiments_with_the_same_names_of_other_questions_are_refused(suite, real, refused, tmp_path):
    """Rows are called 0 to n − 1 in every data set; what was asked may still be something else."""
    other = write_run(tmp_path / "other", real, drawn("toy", 8, 1))
    change_json(other / "evaluation.json", lambda facts: facts["provenance"].update(data_digest="elsewhere"))
    words = ("statistical_test", "--exp1", suite / "toy-latent_len8" / "seed1", "--exp2", other)
    assert "data" in refused(*words)
    shutil.rmtree(other)
    write_run(other, real, drawn("toy", 8, 1), golds="wxyz")
    change_json(other / "evaluation.json", lambda facts: facts["provenance"].update(data_digest="elsewhere"))
    assert "data" in refused(*words)
    change_rows(other, lambda row: row | {"gold": ["abcd"[row["label"]]]})
    assert "the gold answers are not those of the evaluation" in refused(*words)


# ---- figures -------------------------------------------------------------------------------------------------------


@trains
def test_every_figure_is_drawn_in_type_that_prints(gallery):
    folder, drawn_names = gallery
    assert drawn_names == [f"{name}.png" for name in lw.FIGURES]
    found = contents(folder)
    assert {*found} == {f"{name}.{kind}" for name in lw.FIGURES for kind in ("png", "pdf")}
    for name, data in found.items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"%PDF") and len(data) > 3000
        if name.endswith("pdf"):
            assert b"/Type3" not in data and b"/FontFile2" in data and b"/CreationDate" not in data


@trains
@pytest.mark.slow
def test_figures_drawn_again_are_the_same(gallery, suite, say):
    lw.opened_artifacts.cache_clear()
    some = ("methods", "latents", "attention", "pareto", "learning_curve")
    out = say("figures", "--base_dir", suite, "--output_dir", "two", "--only", ",".join(some))
    assert out.splitlines() == [f"two/{name}.png" for name in some]
    again = contents(Path("two"))
    assert len(again) == 2 * len(some) and again.items() <= contents(gallery[0]).items()


@trains
def test_latents_and_attention_need_artefacts(suite, say, refused):
    run = suite / "toy-latent_len8" / "seed2"
    out = say("figures", "--base_dir", run, "--output_dir", "out")
    [without] = [line for line in out.splitlines() if line.startswith("nothing to draw for ")]
    assert {"latents", "attention", "latency", "tokens"} == {*without.removeprefix("nothing to draw for ").split(", ")}
    assert not [*Path("out").glob("latents*"), *Path("out").glob("attention*")]
    assert "nothing to draw for latents" in refused(
        "figures", "--base_dir", run, "--output_dir", "out", "--only", "latents"
    )
    assert "'latents'" in refused("figures", "--base_dir", run, "--output_dir", "out", "--only", "latnets")


@trains
def test_a_checkpoint_is_evaluated_and_drawn(real, tmp_path, capsys):
    run = Path(shutil.copytree(real, tmp_path / "runs" / "toy"))
    before = contents(run)
    words = ["figures", "--checkpoint", str(run), "--num_samples", "20", "--only", "latents", "--output_dir", "out"]
    assert lw.main(words) == 0, capsys.readouterr().err
    assert "out/latents.png" in capsys.readouterr().out.splitlines()
    assert {path.name for path in Path("out").glob("*.p*")} == {"latents.png", "latents.pdf"}
    assert contents(run) == before, "drawing a checkpoint must not touch its own evaluation"
    arrays, about = lw.opened_artifacts(Path("out/evaluation/artifacts.safetensors"))
    assert len(arrays["latents"]) == len(about["ids"]) == 20


@trains
def test_artefacts_are_the_messages_and_where_they_looked(real):
    arrays, about = lw.opened_artifacts(real / "artifacts.safetensors")
    settings = lw.EvalSettings(checkpoint=real, num_samples=N, state_cache="memory")
    channel = lw.open_context(settings, lw.Checkpoint.open(real))
    assert about["ids"] == [example.id for example in channel.examples]
    assert about["labels"] == [example.label for example in channel.examples]
    for i, latents in enumerate(channel.latents):
        assert np.array_equal(arrays["latents"][i][: len(latents)], latents.half().float().numpy())
        sent = lw.Message.from_bytes(channel.messages[i]).latents[0].float().numpy()
        np.testing.assert_allclose(arrays["latents"][i], sent, atol=2e-3)
    maps = arrays["attention"]
    assert maps.shape[:1] == (20,) and maps.shape[3] == channel.bridge.shape.settings.latent_len
    for i, tokens in enumerate(about["tokens"]):
        assert "".join(tokens) == channel.text(channel.examples[i])
        np.testing.assert_allclose(maps[i, :, :, :, : len(tokens)].sum(-1), 1, atol=2e-3)
        assert not maps[i, :, :, :, len(tokens) :].any()


# ---- tables --------------------------------------------------------------------------------------------------------

FEW = ("bridge", "control:zero", "text")
NASTY = r"a_b%c&d#e$f{g}h~i^j\k<l$"


def test_every_special_sign_is_escaped():
    wanted = r"a\_b\%c\&d\#e$\mathdollar$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k$<$l$\mathdollar$"
    assert lw.tex(NASTY) == wanted
    assert lw.tex("plain 12.5") == "plain 12.5"


@trains
def test_names_with_special_signs_come_through(real, tmp_path, say, no_figures):
    write_run(tmp_path / "runs" / "a", real, drawn("toy", 8, 1, FEW), data=NASTY)
    say("tables", "--base_dir", "runs", "--output_dir", "tables")
    say("aggregate", "--base_dir", "runs", "--output_dir", "out")
    for name in ("main_results", "comparisons", "results", "numbers"):
        assert (
            lw.tex(NASTY) in Path(f"tables/{name}.tex").read_text()
            and NASTY not in Path(f"tables/{name}.tex").read_text()
        )
    assert html.escape(NASTY, quote=False) in lw.write_report(tmp_path / "runs").read_text()


@trains
@pytest.mark.parametrize("name", [r"$\nosuch$", r"\alpha_b^c % {"])
def test_no_name_breaks_a_figure(name, real, tmp_path, say):
    for size in (8, 24):
        write_run(tmp_path / "runs" / f"l{size}", real, drawn("toy", size, 1, FEW), data=name, size=size)
    say("figures", "--base_dir", "runs", "--output_dir", "figures", "--only", "methods,tokens")


@trains
@pytest.mark.parametrize("name", ["<b>&amp;</b>", "a|b"])
def test_no_name_breaks_a_page_or_a_table(name, real, tmp_path, say, no_figures):
    write_run(tmp_path / "runs" / "a", real, drawn("toy", 8, 1, FEW), data=name)
    say("aggregate", "--base_dir", "runs", "--output_dir", "out")
    for file in ("table", "aggregated_results"):
        rows = [line for line in Path(f"out/{file}.md").read_text().splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows[:3]
    page = lw.write_report(tmp_path / "runs").read_text()
    assert html.escape(name) in page and "<b>" not in page


@trains
def test_tables_have_rules_and_every_method(suite, say):
    written = say("tables", "--base_dir", suite, "--output_dir", "tables").split()
    assert written == [f"tables/{name}.tex" for name in lw.TABLES], "every table has something to say here"
    for name in lw.TABLES:
        text = Path(f"tables/{name}.tex").read_text()
        if name in ("numbers", "results"):
            continue
        assert (
            all(text.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule")) and r"\hline" not in text
        )
        rows = [line for line in text.splitlines() if "&" in line]
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
        assert "nan" not in text.lower() and "None" not in text
    main = Path("tables/main_results.tex").read_text()
    assert all(f"{lw.tex(lw.PLAIN_NAMES.get(name, name))} &" in main for name in SKILL)
    say("tables", "--base_dir", suite, "--output_path", "all.tex")
    assert Path("all.tex").read_text().count(r"\toprule") == len(lw.TABLES) - 2


@trains
def test_an_old_table_without_material_goes(suite, say):
    Path("tables").mkdir()
    for name in ("latency", "tokens"):
        Path(f"tables/{name}.tex").write_text("old")
    say("tables", "--base_dir", suite / "toy-latent_len8", "--output_dir", "tables")
    assert not Path("tables/latency.tex").exists() and not Path("tables/tokens.tex").exists()


@trains
@pytest.mark.parametrize(("bridge", "text", "bold"), [(60, 30, True), (60, 59, False), (40, 40, False), (0, 55, True)])
def test_bold_is_what_is_significantly_best(bridge, text, bold, real, tmp_path, say):
    right = {"bridge": bridge, "control:zero": 0, "text": text}
    run = write_run(tmp_path / "runs" / "a", real, {name: [i < k for i in range(N)] for name, k in right.items()})
    say("tables", "--base_dir", run, "--output_dir", "tables")
    bolds = [
        line.split("&")[0].strip()
        for line in Path("tables/main_results.tex").read_text().splitlines()
        if "textbf" in line
    ]
    assert bolds == ([lw.PLAIN_NAMES["bridge" if bridge > text else "text"]] if bold else [])
    rows = [[float(i < k) for i in range(N)] for k in (max(bridge, text), min(bridge, text))]
    assert (lw.battery(*rows)["p"] < 0.05) == bold


# ---- main.tex ------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """LaTeX without comments, and without keys and names in it."""
    text = re.sub(r"(?<!\\)%.*", "", text)
    text = re.sub(r"\\(ref|label|cite[tp]?|input|lw|fittable|url)\*?(\[[^]]*\])?\{[^}]*\}", "", text)
    return re.sub(r"\\(whentable|whenfigure)\{[^}]*\}", "", text)


def test_no_number_is_typed_in_abstract_or_results():
    abstract = MAIN.partition(r"\begin{abstract}")[2].partition(r"\end{abstract}")[0]
    results = MAIN.partition(r"\section{Results}")[2].partition(r"\section{")[0]
    for part in (abstract, results):
        assert len(part) > 500
        assert not re.findall(r".{0,20}\d.{0,20}", plain(part))


@trains
def test_every_number_that_the_paper_cites_is_written(suite, say):
    say("tables", "--base_dir", suite, "--output_dir", "tables")
    written = dict(re.findall(r"\\lwset\{([^}]+)\}\{(.*)\}", Path("tables/numbers.tex").read_text()))
    body = re.sub(r"(?<!\\)%.*", "", MAIN).partition(r"\begin{document}")[2]
    cited = {*re.findall(r"\\lw\{([^}#]+)\}", MAIN.partition(r"\title")[2])}
    assert body and len(cited) > 10 and cited <= {*written}
    assert all(written[key] for key in cited)


def test_every_table_and_figure_that_the_paper_names_is_registered():
    text = re.sub(r"(?<!\\)%.*", "", MAIN)
    tables = {*re.findall(r"\\(?:whentable|fittable)\{(\w+)\}", text), *re.findall(r"tables/(\w+)\.tex", text)}
    figures = {*re.findall(r"\\(?:whenfigure|showfigure|showtall)\{(\w+)\}", text)}
    assert tables == {*lw.TABLES}
    assert figures == {*lw.FIGURES}


# ---- the paper -----------------------------------------------------------------------------------------------------


@trains
def test_without_latex_the_paper_says_what_to_install(own, say, monkeypatch, no_figures):
    monkeypatch.setattr(lw.shutil, "which", lambda name: None)
    out = say("paper", "--base_dir", own, "--output_dir", "latex")
    assert "apt-get install" in out and "latexmk" in out and not Path("latex/main.pdf").exists()
    assert Path("latex/main.tex").read_text() == MAIN and Path("latex/tables/numbers.tex").exists()
    assert Path("latex/results/aggregated_results.json").exists()


def test_a_paper_without_runs_says_what_to_give(refused):
    assert "paper --base_dir" in refused("paper", "--output_dir", "latex")


@pytest.fixture
def copied_figures(gallery: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's figures, as drawn before: that they are drawn twice alike is another test's."""
    monkeypatch.setattr(lw, "draw_figures", lambda material, folder: shutil.copytree(gallery[0], folder))


@trains
@latex
@pytest.mark.slow
def test_the_papers_pdf_has_the_records_numbers(suite, say, copied_figures):
    assert say("paper", "--base_dir", suite, "--output_dir", "latex").splitlines()[-1] == "latex/main.pdf"
    assert "LaTeX Warning: There were undefined" not in Path("latex/main.log").read_text(errors="replace")
    if shutil.which("pdftotext"):
        command = ["pdftotext", "-layout", "latex/main.pdf", "-"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for data, size in (("toy", 8), ("odd_set", 24)):
            assert lw.cell(column_of(suite, data, size).summaries["bridge"]) in text


@pytest.mark.slow
@latex
def test_the_paper_is_built_twice_alike(suite, say, copied_figures):
    built = {}
    for name in ("one", "two"):
        say("paper", "--base_dir", suite, "--output_dir", name)
        kept = ("tables/", "main.pdf")
        built[name] = {path: data for path, data in contents(Path(name)).items() if path.startswith(kept)}
    assert {path for path in built["one"] if built["one"][path] != built["two"].get(path)} == set()
    assert len(built["one"]) == len(built["two"]) == 1 + len(lw.TABLES)


@pytest.mark.slow
@latex
def test_a_paper_about_a_name_with_special_signs(real, tmp_path, say, no_figures):
    write_run(tmp_path / "runs" / "a", real, drawn("toy", 8, 1, FEW), data=NASTY)
    assert say("paper", "--base_dir", "runs", "--output_dir", "latex").splitlines()[-1] == "latex/main.pdf"
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", "latex/main.pdf", "-"], capture_output=True, text=True, check=True).stdout
        assert "c&d#e$f" in re.sub(r"-?\s", "", text)  # lines may break within it, braces have other codes


# ---- the page ------------------------------------------------------------------------------------------------------


@trains
@pytest.mark.parametrize("single", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_page_says_all_of_it_and_needs_nothing(single, own, say, monkeypatch):
    folder = own / "toy-latent_len8" / "seed2" if single else own / "toy-latent_len8"
    assert say("report", folder) == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and 'name="viewport"' in page and "width=device-width" in page
    assert page.index('class="verdict') < page.index("<table") and "communication shown" in page
    assert "<script" not in page and "@import" not in page and "url(" not in page and "<link" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!["']?data:)[^\s>]+""", page)
    rows = re.findall(r'<tr class="\w*">(?:.|\n)*?<td>(.*?)</td>', page)
    assert {html.escape(lw.PLAIN_NAMES.get(name, name)).replace("&#x27;", "&#39;") for name in SKILL} <= {*rows}
    for seed in (2,) if single else SEEDS:
        assert f"LATENTWIRE.py eval --checkpoint=seed{seed}" in page
    assert "torch" in page and "Linux" in page and page.count("data:image/png;base64,") >= 3
    told = column_of(folder).summaries["bridge"]
    assert f"{100 * told['mean']:.1f}" in page
    before = contents(folder)
    made = [folder / "figures" / f"{name}.png" for name in lw.FIGURES if f"figures/{name}.png" in before]
    monkeypatch.setattr(lw, "draw_figures", lambda *_: (made, []))
    say("report", folder)
    assert contents(folder) == before


# ---- experiments ---------------------------------------------------------------------------------------------------


def planned(*words: str) -> list[lw.TrainSettings]:
    mine, others = lw.divided(lw.ExperimentSettings, words)
    settings = lw.ExperimentSettings.build(lw.parse_flags(mine, lw.ExperimentSettings)[0])
    return lw.planned(settings, others)


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("baseline", [""]),
        ("compression", [f"latent_len{k}" for k in (16, 32, 64)]),
        ("generalization", ["hotpotqa", "sst2", "agnews"]),
        ("tokens", [f"latent_len{k}/seed{s}" for k in (4, 8, 16, 24, 32, 128) for s in (42, 123, 456)]),
        ("significance", [f"seed{s}" for s in (42, 123, 456, 789, 1011)]),
        ("paper", [f"{data}-latent_len{k}/seed{s}" for data in ("sst2", "agnews", "trec", "boolq", "gsm8k")
                   for k in (8, 24) for s in (42, 123, 456)]),
        ("mixed", [f"question-{asked}-{name}" for asked in ("shared", "agnostic") for name in (
            "2x/seed42", "4x/seed42", "4x/seed123", "4x/seed456", "8x/seed42", "16x/seed42")]),
    ],
)  # fmt: skip
def test_the_runs_of_a_suite(name, folders):
    runs = planned("--name", name)
    assert [str(run.output_dir) for run in runs] == [str(Path("runs") / name / folder) for folder in folders]
    for run in runs:
        where = str(run.output_dir)
        if "latent_len" in where:
            assert run.latent_len == int(re.findall(r"latent_len(\d+)", where)[0])
        if "seed" in where:
            assert run.seed == int(re.findall(r"seed(\d+)", where)[0])
        if name == "mixed":
            [(protocol, ratio)] = re.findall(r"(question-\w+)-(\d+)x", where)
            assert (run.pooler, run.protocol, run.ratio) == ("mixed", protocol, [float(ratio)])
            assert lw.named_methods(lw.suite_of(name)["evaluation"]["methods"])
        if name in ("paper", "generalization"):
            assert run.dataset == where.split("/")[2].partition("-")[0]
    assert len({run.digest() for run in runs}) == len(runs)


@pytest.mark.parametrize("name", [*lw.SUITES, "my_own"])
def test_fast_mode_is_a_rehearsal(name):
    settings = lw.ExperimentSettings(name=name, fast_mode=True)
    words = ["--dataset", "sst2"] if name == "my_own" else []
    runs = lw.planned(settings, words)
    assert [str(run.output_dir) for run in runs] == [
        str(run.output_dir) for run in lw.planned(lw.ExperimentSettings(name=name), words)
    ]
    for run in runs:
        assert run.steps <= 20 and run.samples <= 32
        assert lw.evaluation_values(settings, run)["num_samples"] <= 32


OWN = ("--name", "x", "--dataset", "sst2", "--seeds", "1,2", "--num_samples", "9", "--methods", "bridge,text")


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that need not be measured."""
    monkeypatch.setattr(lw, "device_limits", lambda device, dtype: {"flop_per_s": 1e12})


@pytest.mark.parametrize("words", [("--name", "paper"), ("--name", "tokens", "--fast_mode"), OWN])
def test_a_dry_run_says_what_would_be_typed_and_what_it_costs(words, say, rated):
    lines = say("experiment", *words, "--dry_run").splitlines()
    runs = planned(*words)
    mine, _ = lw.divided(lw.ExperimentSettings, words)
    asked = lw.ExperimentSettings.build(lw.parse_flags(mine, lw.ExperimentSettings)[0])
    assert not Path("runs").exists()
    for run, line in zip(runs, lines[: len(runs)], strict=True):
        command, _, cost = line.partition("  # ")
        rows = (
            f"{asked.num_samples} test rows"
            if asked.num_samples
            else r"(all test rows \(counted as 1,000\)|12 test rows)"
        )
        length = rf"{run.steps or lw.DEFAULT_STEPS:,} steps of {run.rows_per_step} rows"
        assert re.fullmatch(rf"{length}, {rows} x \d+ methods: about \S+ FLOP", cost)
        train, evaluate = (shlex.split(part)[2:] for part in command.split(" && "))
        again, _ = lw.settings_from(lw.TrainSettings, train[1:])
        assert (train[0], evaluate[0]) == ("train", "eval")
        assert again.model_dump() == run.model_dump()
        wanted = lw.evaluation_of(run, run.output_dir, **lw.evaluation_values(asked, run))
        typed = lw.settings_from(lw.EvalSettings, evaluate[1:])[0]
        assert typed.model_dump() == wanted.model_dump()
    after = [shlex.split(line)[2] for line in lines[len(runs) : -1]]
    assert after == [*(["benchmark"] if "paper" in words else []), "aggregate", "stats", "report"]
    assert lines[-1].startswith(f"# {len(runs)} runs, about ")


def test_a_dry_runs_evaluation_is_on_the_trainings_device_and_data(say, rated):
    """What 'experiment' hands from training to evaluation must be in the words that it prints."""
    words = ("--name", "x", *TOY, "--offline", "--data_dir", "somewhere")
    line = say("experiment", *words, "--dry_run").splitlines()[0]
    evaluate = shlex.split(line.partition("  # ")[0].split(" && ")[1])[2:]
    typed = lw.settings_from(lw.EvalSettings, evaluate[1:])[0]
    [run] = planned(*words)
    assert typed.model_dump() == lw.evaluation_of(run, run.output_dir).model_dump()


def test_costs_grow_with_work():
    base = lw.TrainSettings(dataset="sst2", sender="smollm2-135m", receiver="gemma-3-270m", steps=100)
    asked = {"num_samples": 100, "methods": ["bridge", "text"]}
    first = lw.cost_of(base, asked)[1]
    more = [{"steps": 200}, {"latent_len": 64}, {"sender": "Llama-3.1-8B"}, {"receiver": "Llama-3.1-8B"}]
    assert first > 0 and all(lw.cost_of(base.model_copy(update=own), asked)[1] > first for own in more)
    assert lw.cost_of(base, {**asked, "num_samples": 1000})[1] > first
    assert lw.cost_of(base, {**asked, "methods": ["all"]})[1] > first


def test_the_total_is_the_sum_of_the_runs(say, rated):
    lines = say("experiment", *OWN, "--steps", "10", "--dry_run").splitlines()
    runs = [float(re.findall(r"about (\S+) FLOP", line)[0]) for line in lines[:2]]
    [(count, total)] = re.findall(r"^# (\d+) runs, about (\S+) FLOP", lines[-1])
    assert count == "2" and float(total) == pytest.approx(sum(runs), rel=0.1)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("smollm2-135m", 135e6), ("gemma-3-270m", 270e6), ("meta-llama/Meta-Llama-3.1-8B-Instruct", 8e9),
     ("tiny-llama", 1e5),
     ("Qwen/Qwen2.5-0.5B", 0.5e9), ("qwen2.5-1.5b", 1.5e9), (None, 1e5)],
)  # fmt: skip
def test_parameters_in_a_name(name, wanted):
    assert lw.parameters_in(name) == pytest.approx(wanted)


@trains
def test_failures_are_told_last_and_the_rest_is_put_together(real, capsys, monkeypatch, no_figures):
    def train(settings: lw.TrainSettings, report: lw.Report) -> None:
        if settings.latent_len == 8 and settings.seed == 2:
            raise lw.LatentWireError("no luck today")

    def evaluate(settings: lw.EvalSettings, report: lw.Report) -> None:
        size, seed = (int(re.findall(rf"{name}(\d+)", str(settings.checkpoint))[0]) for name in ("latent_len", "seed"))
        write_run(settings.checkpoint, real, drawn("toy", size, seed), size=size, seed=seed)
        if (size, seed) == (24, 3):
            change_rows(settings.checkpoint, lambda row: None if row["id"] == "59" else row)

    monkeypatch.setattr(lw, "train_run", train)
    monkeypatch.setattr(lw, "eval_run", evaluate)
    words = ["experiment", "--name", "e", *TOY, "--latent_len", "8,24", "--seeds", "1,2,3"]
    assert lw.main(words) == 1
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "failed: runs/e/latent_len8/seed2: no luck today"
    assert last[1].startswith("failed: runs/e/latent_len24/seed3: ") and "bridge has 59 of 60 rows" in last[1]
    groups = json.loads(Path("runs/e/aggregated_results.json").read_text())["groups"]
    assert [(g["latent_len"], [r["seed"] for r in g["runs"]]) for g in groups] == [(8, [1, 3]), (24, [1, 2])]
    columns = json.loads(Path("runs/e/statistical_report.json").read_text())["columns"]
    assert [column["seeds"] for column in columns] == [2, 2] and Path("runs/e/report.html").exists()


# ---- the documents' scripts ----------------------------------------------------------------------------------------


@trains
@pytest.mark.slow
def test_the_documents_commands_on_finished_runs(own, say):
    assert "results/aggregated_results.json" in say(
        "telepathy/aggregate_results.py", "--base_dir", "runs/", "--output_dir", "results/")  # fmt: skip
    aggregated = ["--results_path", "results/aggregated_results.json", "--output_path"]
    for script in ("telepathy/statistical_tests.py", "./scripts/statistical_testing.py"):
        say(script, *aggregated, "results/statistical_analysis.json")
        assert len(json.loads(Path("results/statistical_analysis.json").read_text())["columns"]) == 2
        Path("results/statistical_analysis.json").unlink()
    say("scripts/generate_paper_tables.py", *aggregated, "results/paper_tables.tex")
    assert Path("results/paper_tables.tex").read_text().count(r"\bottomrule") >= 3


@trains
@pytest.mark.parametrize(
    ("script", "figure"), [("generate_tsne_visualization", "latents"), ("attention_analysis", "attention")]
)
def test_the_documents_pictures_of_a_checkpoint(script, figure, real, tmp_path, capsys):
    shutil.copytree(real, tmp_path / "runs" / "sst2")
    words = [f"telepathy/{script}.py", "--checkpoint", "runs/sst2/bridge_sst2.pt", "--dataset", "toy",
             "--num_samples", "50",
             "--output_dir", "figures/tsne"]  # fmt: skip
    assert lw.main(words) == 0, capsys.readouterr().err
    assert Path(f"figures/tsne/{figure}.png").exists() and Path(f"figures/tsne/{figure}.pdf").exists()


def test_the_documents_paper_evaluation(say, rated):
    lines = say("telepathy/run_enhanced_paper_evaluation.py", "--fast_mode", "--dry_run").splitlines()
    assert lines[-1].startswith("# 30 runs, about ")
    assert lw.without_script(["telepathy/submit_enhanced_paper_eval.slurm"]) == shlex.split(
        "slurm --job experiment --name paper")  # fmt: skip


def test_the_ticks_of_a_loss_over_four_decades_do_not_overlap(tmp_path, monkeypatch):
    boxes = []

    def look(canvas: Figure, path: Path, **options: Any) -> None:
        canvas.draw_without_rendering()
        low, high = (f(canvas.axes[0].get_ylim()) for f in (min, max))
        labels = [
            x
            for x in canvas.axes[0].get_yticklabels(which="both")
            if x.get_text() and low <= x.get_position()[1] <= high
        ]
        boxes.append(sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0))

    monkeypatch.setattr(Figure, "savefig", look)
    logs = {f"runs/{n}": [{"step": i, "loss": 10 ** (1 - n * i / 30)} for i in range(100)] for n in (1, 2)}
    lw.FIGURES["learning_curve"](lw.ReportInputs([], [], logs, {}, None, {}), tmp_path / "curve")
    assert len(boxes) == 2 and all(len(own) >= 4 for own in boxes)
    assert all(below.y1 <= above.y0 for own in boxes for below, above in itertools.pairwise(own))


# ---- size ----------------------------------------------------------------------------------------------------------

LARGE = """
import json, sys, time
import LATENTWIRE as lw
import matplotlib.figure, pandas, scipy.stats, sklearn.manifold, statsmodels.stats.multitest
start, told = time.process_time(), []
rows = [json.loads(line) for line in open("runs/large/records.jsonl")]
unit, rows = time.process_time() - start, None
start = time.process_time()
for command in ("aggregate", "stats", "figures"):
    assert lw.main([command, "--base_dir", "runs", "--output_dir", "out"]) == 0
    told.append(time.process_time() - start - sum(told))
print(json.dumps({"unit": unit, "seconds": told, "gigabytes": lw.peak_memory(lw.torch.device("cpu")) / 2**30}))
"""


@pytest.mark.slow
def test_a_hundred_thousand_records_are_no_burden(real, tmp_path):
    names = [name for name in lw.METHODS if not name.startswith("text_relay:")][:20]
    right = {name: [random.Random(f"{name} {i}").random() < 0.6 for i in range(5000)] for name in names}
    write_run(tmp_path / "runs" / "large", real, right)
    shutil.copyfile(real / "artifacts.safetensors", tmp_path / "runs" / "large" / "artifacts.safetensors")
    assert sum(1 for _ in (tmp_path / "runs" / "large" / "records.jsonl").open()) == 100_000
    command = [sys.executable, "-c", LARGE]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**lw.os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # a thread that waits for another counts as work
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert sum(told["seconds"]) <= 20 * told["unit"], told  # parsing the file once; 10 alone, 16 beside other tests
    assert told["gigabytes"] < 1, told
