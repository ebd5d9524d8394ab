"""One file from outside the project adds one part of each kind, with settings of its own, and touches nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import LATENTWIRE as lw

PLUGIN = '''
from dataclasses import replace

import LATENTWIRE as lw
import torch
from torch import nn


@lw.task("letters")
class Letters(lw.Classification):
    """Letters: which of two begins the text."""

    words, anchor, headline = ("alpha", "beta"), "It is", "{metric}"

    def load(self, split):
        return [lw.Example(f"{{split}}{{i}}", f"{{'ab'[i % 2]}} {{split}} {{i}}", "", (self.words[i % 2],), i % 2)
                for i in range(120 if split == "train" else 60)], "made here"


@lw.ENCODERS.register("halved")
class Halved(lw.HiddenEncoder):
    """Hidden states, made smaller."""

    class Config(lw.Settings):
        """Encoder halved"""

        shrink: float = lw.setting(0.5, "By how much.", gt=0)

    def __init__(self, shape):
        super().__init__(shape)
        self.shrink = self.Config.of(shape.settings).shrink

    def forward(self, states):
        return super().forward(states) * self.shrink


@lw.POOLERS.register("strided")
class Strided(lw.Pooler):
    """The mean of every n-th token, to which each latent adds its own numbers."""

    class Config(lw.Settings):
        """Pooler strided"""

        stride: int = lw.setting(2, "Tokens from one that is looked at to the next.", "step_between", ge=1)

    def __init__(self, shape):
        super().__init__(shape)
        self.stride = self.Config.of(shape.settings).stride
        self.slots = nn.Parameter(torch.randn(shape.settings.latent_len, shape.settings.width))

    def forward(self, tokens, mask, windows=None, ear=0):
        tokens, mask = tokens[:, :: self.stride], mask[:, :: self.stride, None].float()
        return (tokens * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) + self.slots, None


@lw.ADAPTERS.register("gated")
class Gated(lw.Adapter):
    """The linear map times a gate."""

    class Config(lw.Settings):
        """Adapter gated"""

        gate_start: float = lw.setting(1.0, "Where the gate begins.")

    def __init__(self, shape, ear):
        super().__init__(shape, ear)
        self.gate = nn.Parameter(torch.tensor(self.Config.of(shape.settings).gate_start))

    def raw(self, latents):
        return super().raw(latents) * self.gate


@lw.FEATURES.register("shift")
class Shift(lw.Feature):
    """Moves every latent by the same learned numbers."""

    class Config(lw.Settings):
        """Feature shift"""

        use_shift: bool = lw.setting(False, "Whether latents are moved.")
        shift_start: float = lw.setting(0.0, "By how much at first.")

    switches = ("use_shift",)

    def __init__(self, shape):
        super().__init__()
        self.by = nn.Parameter(torch.full((shape.settings.d_z,), self.Config.of(shape.settings).shift_start))

    def forward(self, latents, mask, keys=()):
        return latents + self.by


@lw.LOSSES.register("small_logits")
class SmallLogits(lw.Loss):
    """The mean square of the logits, to a power."""

    class Config(lw.Settings):
        """Loss small_logits"""

        logit_power: float = lw.setting(2.0, "That power.", gt=0)

    def term(self, found):
        return found.mean_per_row() * 0 + found.logits.abs().pow(self.Config.of(self.settings).logit_power).mean() * 1e-6


@lw.METHODS.register("first_words")
class FirstWords(lw.Method):
    """The text's first words."""

    class Config(lw.Settings):
        """Method first_words"""

        words_kept: int = lw.setting(1, "How many words.", ge=1)

    bridged = False

    def answers(self, examples):
        kept = self.Config.of(self.context.asked).words_kept
        cut = [replace(example, context=" ".join(example.context.split()[:kept])) for example in examples]
        return [replace(answer, tokens=kept) for answer in self.context.receiver.answers(cut, None, text=True)]
{more}'''
METRIC = '''

@lw.METRICS.register("first_letter")
class FirstLetter(lw.Metric):
    """Whether the answer begins like a gold one, to which a bonus is added."""

    class Config(lw.Settings):
        """Metric first_letter"""

        bonus: float = lw.setting(0.0, "Added to each score.", ge=0, le=1)

    def score(self, said, golds):
        return min(1.0, float(any(said.strip()[:1] == gold[:1] for gold in golds)) + self.config.bonus)
'''
BENCHMARK = '''

@lw.BENCHMARKS.register("tokenizing")
class Tokenizing(lw.Benchmark):
    """How long tokenizing takes."""

    class Config(lw.Settings):
        """Benchmark tokenizing"""

        repeats: int = lw.setting(3, "Times that a text is tokenized.", ge=1)

    def rows(self):
        lm, repeats = self.bench.receiver, self.config.repeats
        yield {"arm": "tokenizing", "repeats": repeats, "tokens": len(lm.ids("a b c") * repeats)}
'''
SMALL = "--sender tiny-llama --receiver tiny-qwen --latent_len 4 --d_z 16 --width 16 --heads 2 --device cpu"


class Outside:
    """An empty folder with the program alone, and a plug-in beside it."""

    def __init__(self, home: Path) -> None:
        self.home, self.plugin = home, home / "mine.py"
        (home / "LATENTWIRE.py").write_bytes(Path(lw.__file__).read_bytes())
        self.write()

    def write(self, more: str = METRIC + BENCHMARK, metric: str = "first_letter") -> None:
        """The plug-in file."""
        self.plugin.write_text(PLUGIN.format(more=more, metric=metric))

    def run(self, words: str, code: int = 0) -> str:
        """What a command prints, on both streams."""
        command = [sys.executable, "LATENTWIRE.py", *words.split()]
        done = subprocess.run(
            command, cwd=self.home, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}, check=False
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """Trained once with every part of the plug-in."""
    home = Outside(tmp_path_factory.mktemp("outside"))
    parts = "--encoder halved --pooler strided --adapter gated --use_shift"
    own = "--shrink 0.25 --stride 3 --gate_start 0.5 --shift_start 0.1 --logit-power 3 --small_logits_weight 0.5"
    home.run(f"train --dataset letters {SMALL} {parts} {own} --steps 4 --output_dir run --plugin mine.py")
    home.run("eval --checkpoint run --methods bridge,control,first_words --words_kept 2 --bonus 0.25 --plugin mine.py")
    return home


def rows_of(run: Path, method: str) -> list[dict]:
    """Its records."""
    rows = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    return [row for row in rows if row["method"] == method]


@pytest.mark.trains
def test_a_runs_settings_and_checkpoint_hold_those_of_its_parts(outside: Outside) -> None:
    """Settings of parts lie beside all others, in what is saved and in the tensors."""
    config = json.loads((outside.home / "run" / "config.json").read_text())
    asked = {"shrink": 0.25, "stride": 3, "gate_start": 0.5, "use_shift": True, "shift_start": 0.1, "logit_power": 3.0,
             "small_logits_weight": 0.5}  # fmt: skip
    assert {name: config[name] for name in asked} == asked
    first = json.loads((outside.home / "run" / "diagnostics.jsonl").read_text().splitlines()[0])
    assert first["loss_small_logits"] > 0
    state = json.loads((outside.home / "run" / "checkpoint" / "best" / "state.json").read_text())
    assert state["shape"]["stride"] == 3
    assert "words_kept" not in state["shape"]


@pytest.mark.trains
def test_a_metric_decides_and_its_settings_are_kept(outside: Outside) -> None:
    """A task names the metric; records, summaries, verdict and facts hold it; nothing is read from them without it."""
    results = json.loads((outside.home / "run" / "results.json").read_text())
    rows = rows_of(outside.home / "run", "bridge")
    assert results["headline"] == "first_letter"
    assert results["methods"]["bridge"]["first_letter"] == pytest.approx(sum(r["first_letter"] for r in rows) / 60)
    assert {0.25, 1.0} >= {row["first_letter"] for row in rows}
    assert "first_letter" in results["verdict"]
    assert json.loads((outside.home / "run" / "evaluation.json").read_text())["metric"] == {"bonus": 0.25}
    assert "--plugin" in outside.run("aggregate --base_dir run", 2)
    assert "first_letter" in outside.run("aggregate --base_dir run --plugin mine.py")


@pytest.mark.slow
def test_a_benchmark_is_measured_and_written(outside: Outside) -> None:
    """Its rows stand in the JSON and in a table."""
    outside.run("benchmark --benchmark tokenizing --checkpoint run --repeats 4 --output_dir b --plugin mine.py")
    (row,) = json.loads((outside.home / "b" / "benchmark.json").read_text())["tokenizing"]
    assert row["repeats"] == 4
    assert row["tokens"] % 4 == 0
    assert "tokenizing" in (outside.home / "b" / "benchmark.md").read_text()


@pytest.mark.trains
def test_an_evaluation_holds_the_method(outside: Outside) -> None:
    """The method's own setting makes its rows, under a key of their own."""
    rows = rows_of(outside.home / "run", "first_words")
    assert {row["tokens"] for row in rows} == {2}
    outside.run("eval --checkpoint run --methods first_words --words_kept 1 --bonus 0.25 --plugin mine.py")
    again = rows_of(outside.home / "run", "first_words")
    assert {row["tokens"] for row in again} == {1, 2}
    assert len({row["key"] for row in again}) == 2


@pytest.mark.trains
@pytest.mark.parametrize("words", ["eval --checkpoint run", "train --output_dir run --resume run --steps 6",
                                   "encode --text a --checkpoint run"])  # fmt: skip
def test_without_the_plugin_it_is_refused_with_the_flag_to_add(outside: Outside, words: str) -> None:
    """Nothing runs from a file that the user did not name as code."""
    said = outside.run(words, 2)
    assert "--plugin mine.py" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_edited_plugin_makes_a_methods_rows_stale(outside: Outside) -> None:
    """Of a bridge it is refused, since the bridge was made with other code; another file's method is computed again."""
    other = outside.home / "method.py"
    whole = outside.plugin.read_text()
    method = (
        "from dataclasses import replace\nimport LATENTWIRE as lw\n"
        + whole[whole.index("\n\n@lw.METHODS") : whole.index("\n\n@lw.METRICS")]
    )
    method = method.replace("first_words", "other_words").replace("words_kept", "other_kept")
    ask = "eval --checkpoint run --methods other_words --plugin mine.py method.py"
    other.write_text(method)
    outside.run(ask)
    outside.run(ask)
    assert len(rows_of(outside.home / "run", "other_words")) == 60
    other.write_text(method + "# edited\n")
    outside.run(ask)
    assert len(rows_of(outside.home / "run", "other_words")) == 120


@pytest.mark.trains
def test_help_list_and_show_follow(outside: Outside) -> None:
    """The plug-in's settings have flags, a heading and a help text; its parts are listed and shown."""
    shown = outside.run("train --help-all --plugin mine.py")
    for words in ("Pooler strided:", "--stride INTEGER", "also --step_between", "--small_logits_weight FLOAT"):
        assert words in shown
    listed = outside.run("list --plugin mine.py")
    for name in (
        "letters",
        "halved",
        "strided",
        "gated",
        "shift",
        "small_logits",
        "first_words",
        "first_letter",
        "tokenizing",
    ):
        assert f"  {name} " in listed
    assert "--words_kept INTEGER" in outside.run("show first_words --plugin mine.py")
    assert "--words_kept INTEGER" in outside.run("eval --help-all --plugin mine.py")


def test_a_setting_that_exists_is_refused_in_one_line(tmp_path: Path) -> None:
    """Two settings of one spelling cannot be told apart."""
    home = Outside(tmp_path)
    home.plugin.write_text(PLUGIN.format(more="", metric="accuracy").replace("stride: int", "steps: int"))
    said = home.run("train --dataset letters --plugin mine.py --dry_run", 2)
    assert "--steps of Strided.Config is a setting of TrainSettings; rename it" in said


def test_a_bad_value_of_a_parts_setting_is_named(tmp_path: Path) -> None:
    """Limits of a part's settings hold like all others."""
    home = Outside(tmp_path)
    said = home.run("train --dataset letters --plugin mine.py --stride 0", 2)
    assert said.startswith("error: --stride: it should be greater than or equal to 1")
