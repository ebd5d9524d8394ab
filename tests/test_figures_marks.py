"""Figures looked at: nothing over the edge, nothing over each other, every mark explained, no rival left out."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_paper import ALIKE, SKILL, N, change_json, change_rows, real, write_run  # noqa: F401

import LATENTWIRE as lw

pytestmark = pytest.mark.trains  # the toy run behind it is trained

LONG = "a_data_set_with_a_rather_long_name"
TUNED = ("lora", "prompt_tuning")
NAMES = (*SKILL, "prompt_tuning", "ensemble", "token_budget", "zeroshot:sender", "fewshot:receiver", "sender_label")


def drawn(data: str, size: int, seed: int) -> dict[str, list[bool]]:
    """Who is right: by chance, and the same every time."""
    found = {}
    for name in NAMES:
        fixed = name in ALIKE or not (lw.METHODS[name].bridged or lw.METHODS[name].seeded)
        rng = random.Random(f"{data} {name}" if fixed else f"{data} {name} {size} {seed}")
        found[name] = [rng.random() < SKILL.get(name, 0.6) for _ in range(N)]
    return found


def without_tokens(row: dict[str, Any]) -> dict[str, Any]:
    """A rival that reads the whole text counts no tokens that stand for it."""
    return row | ({"tokens": None, "bytes": 0} if row["method"] in TUNED else {})


@pytest.fixture(scope="module")
def several(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two data sets, two sizes, two seeds."""
    base = tmp_path_factory.mktemp("several")
    for data, size, seed in itertools.product(("toy", LONG), (8, 24), (1, 2)):
        run = base / f"{data}-latent_len{size}" / f"seed{seed}"
        write_run(run, real, drawn(data, size, seed), data=data, size=size, seed=seed)
        change_rows(run, without_tokens)
        change_json(run / "evaluation.json", lambda facts: facts.pop("answers", None))  # the rows are drawn at random
    return base


@pytest.fixture(scope="module")
def material(several: Path) -> Callable[[str], lw.ReportInputs]:
    """What is below a folder, put together once."""
    return functools.cache(lambda below: lw.ReportInputs.below(several / below))


outside: list[str] = []
"""Texts of the last figure that run over its edge."""


@pytest.fixture
def look(
    material: Callable[[str], lw.ReportInputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Figure]:
    """Draws a figure of all runs or of some, as it is drawn for print; → what was drawn."""
    kept: list[Figure] = []
    save = Figure.savefig
    outside.clear()

    def saved(canvas: Figure, path: Any, **how: Any) -> None:
        save(canvas, path, **how)
        kept.append(canvas)
        if "dpi" not in how:
            return
        before, canvas.dpi = canvas.dpi, how["dpi"]  # places are known as they were drawn
        edge = canvas.bbox
        for text in texts(canvas):
            box = text.get_window_extent()
            if not (box.x0 >= -2 and box.y0 >= -2 and box.x1 <= edge.x1 + 2 and box.y1 <= edge.y1 + 2):
                outside.append(text.get_text())
        canvas.dpi = before

    def draw(name: str, below: str = "") -> Figure:
        monkeypatch.setattr(Figure, "savefig", saved)
        assert lw.FIGURES[name](material(below), tmp_path / name)
        return kept[-1]

    return draw


ONE = f"{LONG}-latent_len8"
DRAWN = [("methods", ""), ("methods", ONE), ("methods", f"{ONE}/seed1"), ("learning_curve", ""), ("pareto", ""),
         ("learning_curve", f"{ONE}/seed1"), ("pareto", ONE), ("relay", ""), ("tokens", "")]  # fmt: skip


def texts(canvas: Figure) -> list[Text]:
    """Every text that can be seen."""
    hidden = {label for one in canvas.axes for axis in (one.xaxis, one.yaxis) if not axis.get_visible()
              for label in axis.get_ticklabels(which="both")}  # fmt: skip
    found = [text for text in canvas.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = {id(label) for one in canvas.axes for axis in (one.xaxis, one.yaxis)
             for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) for label in (tick.label1, tick.label2)}  # fmt: skip
    shown = {id(label) for labels in map(tick_labels, axes_of(canvas)) for label in labels}
    return [text for text in found if text not in hidden and (id(text) not in ticks or id(text) in shown)]


def axes_of(canvas: Figure) -> list[Any]:
    """All axes, across and up."""
    return [axis for one in canvas.axes for axis in (one.xaxis, one.yaxis)]


def tick_labels(axis: Any) -> list[Text]:
    """An axis' labels within its limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    inside = [tick for tick in ticks if low <= tick.get_loc() <= high]
    return [
        label for tick in inside for label in (tick.label1, tick.label2) if label.get_visible() and label.get_text()
    ]


def said(canvas: Figure) -> str:
    """All words of a figure, on one line."""
    return " ".join(" ".join(text.get_text().split()) for text in texts(canvas))


@pytest.mark.parametrize(("name", "below"), DRAWN)
def test_no_text_runs_over_the_edge(name, below, look):
    """V13: "n = 1066" is not cut off, however long a data set's name is."""
    look(name, below)
    assert not outside


@pytest.mark.parametrize(("name", "below"), DRAWN)
@pytest.mark.slow
def test_tick_labels_do_not_lie_over_each_other(name, below, look):
    """V13: on a logarithmic axis, too."""
    for axis in axes_of(look(name, below)):
        boxes = [(label.get_window_extent(), label.get_text()) for label in tick_labels(axis)]
        for (a, first), (b, second) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), (first, second)


@pytest.mark.parametrize("below", ["", ONE, f"{ONE}/seed1"])
def test_bars_say_what_their_whiskers_and_lines_are(below, look):
    """V13: the interval and, where it is drawn, the dotted line are explained on the figure."""
    canvas = look("methods", below)
    words = said(canvas)
    assert "95 %" in words and "60" in words  # the interval, and n
    dotted = [line for one in canvas.axes for line in one.lines if line.get_linestyle() == ":"]
    assert not dotted or "constant" in words


def test_the_interval_over_latents_is_explained(look):
    """V13: whiskers are 95 % intervals, and it says so."""
    assert "95 %" in said(look("tokens"))


@pytest.mark.parametrize("below", ["", f"{ONE}/seed1"])
def test_a_learning_curve_has_its_validation(below, look, material):
    """V13: what the caption promises is drawn, at the steps where it was measured."""
    canvas = look("learning_curve", below)
    log = next(iter(material(below).logs.values()))
    steps = [row["step"] for row in log if "val_loss" in row]
    lines = [line for one in canvas.axes for line in one.lines]
    assert any([*map(int, line.get_xdata())] == steps for line in lines)
    assert "validation" in said(canvas)


def test_the_pareto_figure_has_every_rival_and_every_data_set(look):
    """V3: nothing is dropped because it counts no tokens, and no data set because the bridge is worse on it."""
    words = said(look("pareto"))
    for name in (*TUNED, "bridge", "text", "ensemble", "token_budget"):
        assert lw.PLAIN_NAMES.get(name, name) in words, name
    assert "toy" in words and LONG in words


def test_the_bridges_colour_is_its_own(look):
    """V3: no rival looks like the bridge."""
    canvas = look("pareto", ONE)
    legends = [*canvas.legends, *(one.get_legend() for one in canvas.axes if one.get_legend())]
    marks = {text.get_text(): (to_hex(handle.get_color()), handle.get_marker())
             for legend in legends for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
             if hasattr(handle, "get_marker")}  # fmt: skip
    bridge = marks.pop(lw.PLAIN_NAMES["bridge"])
    assert marks and bridge[0] not in {colour for colour, _ in marks.values()}
    assert len({*marks.values()}) == len(marks)


def test_what_stands_in_a_cell_is_explained(material, tmp_path):
    """V13: ±, (2) and d are defined where they stand."""
    columns = material(ONE).groups
    table = lw.groups_table(columns)
    assert "(2)" in table
    note = table.rpartition("|\n")[2]
    assert "±" in note and "seeds" in note and "95 %" in note and re_brackets(note)
    report = lw.statistical_report(columns, tmp_path / "s.json", None, "holm", 0.05)
    assert "Cohen" in report and "95 %" in report


def re_brackets(note: str) -> bool:
    """Whether a note says what the number in brackets is."""
    return "(" in note or "bracket" in note
