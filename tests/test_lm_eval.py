"""Label scores against EleutherAI's lm-evaluation-harness: the same rows, its own prompts, requests and arithmetic.

The whole bar, four published data sets and own labels, both models, zero and five shots:

    LATENTWIRE_LM_EVAL_ROWS=200 python -m pytest -m slow -s tests/test_lm_eval.py

Our prediction is the harness's ``acc`` where all labels have one token count, as the labels of these data sets have with
both models. Where counts differ we divide by tokens, ``acc`` by nothing and ``acc_norm`` by characters: there its
log-likelihoods are compared, and our prediction is compared with what our rule makes of them.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import package_folder

import LATENTWIRE as lw

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("two_threads")]

PINS = ("lm_eval==0.4.13",)
PUBLISHED = Path(lw.__file__).resolve().parent.parent / "shared" / "data"
CPU = lw.ModelSettings(device="cpu", dtype="float32")
FEW = [("gemma-3-270m", "sst2", 0, 30), ("smollm2-135m", "openbookqa", 5, 8), ("smollm2-135m", "own", 0, 16)]
ROWS = int(os.environ.get("LATENTWIRE_LM_EVAL_ROWS", "0"))
ALL = [
    (model, dataset, shots, ROWS)
    for model in ("smollm2-135m", "gemma-3-270m")
    for dataset in ("sst2", "boolq", "arc_challenge", "openbookqa", "own")
    for shots in (0, 5)
]
LABELS = ("negative", "thumbs up")  # of one token and of two

# HFLM and ConfigurableTask as they are; the only addition notes which ids each request became.
HARNESS = """
import json, sys
import datasets
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

class Watched(HFLM):
    def _loglikelihood_tokens(self, requests, **options):
        self.seen = {texts: [context, continuation] for texts, context, continuation in requests}
        return super()._loglikelihood_tokens(requests, **options)

with open(sys.argv[2]) as file:
    case = json.load(file)
lm = Watched(pretrained=sys.argv[1], dtype="float32", device="cpu", batch_size=case["batch_size"])
read = lambda: datasets.DatasetDict(test=datasets.Dataset.from_list(case["rows"]))
task = ConfigurableTask(config={
    "task": "case", "custom_dataset": read, "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "label", "num_fewshot": len(case["shown"]),
    "fewshot_config": {"sampler": "first_n", "samples": case["shown"]} if case["shown"] else None,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
})
none = TaskManager(include_defaults=False)  # looking through its own tasks takes seconds
found = simple_evaluate(model=lm, tasks=[task], task_manager=none, bootstrap_iters=0, log_samples=True)
told = [
    {
        "prompts": [context for context, _ in sample["arguments"]],
        "ids": [lm.seen[tuple(texts)] for texts in sample["arguments"]],
        "scores": [score for score, _ in sample["filtered_resps"]],
        "acc": sample["acc"], "acc_norm": sample["acc_norm"],
    }
    for sample in sorted(found["samples"]["case"], key=lambda sample: sample["doc_id"])
]
with open(sys.argv[3], "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with the harness, made once; whatever else it needs is this environment's."""
    pytest.importorskip("sacrebleu")
    return package_folder("lm-eval", PINS)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory) -> Path:
    """SST-2 as somebody's own file, with labels of several tokens and of one."""
    folder = tmp_path_factory.mktemp("own")
    part = lw.make_task(lw.DataSettings(dataset="sst2", data_dir=PUBLISHED))
    for split, count in (("train", 200), ("test", 872)):
        rows = lw.hash_order(part.load(split)[0], 0)[:count]
        lines = [json.dumps({"text": e.context, "label": LABELS[e.label or 0]}) for e in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@dataclass(frozen=True)
class Ours:
    """What we read and said, row by row."""

    contest: lw.EvalContext
    examples: list[lw.Example]
    records: list[dict[str, Any]]
    read: list[lw.TokenIds]
    shown: str

    @property
    def labels(self) -> list[lw.TokenIds]:
        """The ids of each label."""
        return self.contest.receiver.prompting.label_ids

    @property
    def likelihoods(self) -> list[list[float]]:
        """Nats of each label, before any division."""
        counts = [len(ids) for ids in self.labels]
        shares = counts if len({*counts}) > 1 else [1] * len(counts)
        return [[score * share for score, share in zip(row["scores"], shares, strict=True)] for row in self.records]

    def told(self, example: lw.Example) -> dict[str, Any]:
        """An example for the harness, which puts examples, spaces and answers together by itself."""
        part, anchor = self.contest.setup.part, self.contest.receiver.prompting.anchor
        return {"text": part.receiver_text(example) + anchor, "choices": list(part.words), "label": example.label}

    def examples_shown(self) -> list[dict[str, Any]]:
        """The rows in a few-shot prompt, in its order."""
        found, left = [], self.shown
        pieces = {}
        for example in self.contest.setup.splits["train"]:
            told = self.told(example)
            pieces[f"{told['text']} {example.answers[0]}\n\n"] = told
        while left:
            piece = next(piece for piece in pieces if left.startswith(piece))
            found.append(pieces[piece])
            left = left.removeprefix(piece)
        return found


def answer(lm: lw.LM, dataset: str, shots: int, rows: int) -> Ours:
    """Our side, through the door of the command ``baseline``."""
    settings = lw.BaselineSettings(
        sender=lm.name, receiver=lm.name, device="cpu", dtype="float32", data_dir=PUBLISHED, num_samples=rows,
        shots=shots or 5, labels=list(LABELS) if Path(dataset).exists() else None,
    )  # fmt: skip
    read: list[lw.TokenIds] = []
    lay_out, prefill_ids = lw.lay_out, lw.LM.prefill_ids

    def watched(lm, soft, after, answers=None, before=(), left=False):
        read.extend([] if shots else [[*before, *ids] for ids in after])
        return lay_out(lm, soft, after, answers, before, left)

    def watched_ids(self, prompts, most):  # lays out what the prompts share apart from the rest
        read.extend(prompts)
        return prefill_ids(self, prompts, most)

    records: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw, "load_lm", lambda *_: lm)
        patch.setattr(lw, "lay_out", watched)
        patch.setattr(lw.LM, "prefill_ids", watched_ids)
        contest = lw.context_of(settings, dataset, 42)
        method = lw.METHODS["fewshot:receiver" if shots else "zeroshot:receiver"](contest)
        lw.compute_rows(method, contest.examples, 8, records.extend)
    by_id = {example.id: example for example in contest.examples}
    shown = method.shown if isinstance(method, lw.FewShot) else ""
    return Ours(contest, [by_id[row["id"]] for row in records], records, read, shown)


def harness(packages: Path, ours: Ours, folder: Path) -> list[dict[str, Any]]:
    """What the harness reads and says, in its own process, with the same model folder."""
    case = {
        "rows": [ours.told(example) for example in ours.examples],
        "shown": ours.examples_shown(),
        "batch_size": max(1, min(16, 800 // max(map(len, ours.read)))),  # its logits are of every position
    }
    asked, told, name = folder / "case.json", folder / "found.json", ours.contest.setup.receiver.name
    asked.write_text(json.dumps(case))
    alias = lw.LMS[name]()
    model = lw.gguf_to_dense(alias.pieces(), name, alias.sha256)
    env = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", HARNESS, model, asked, told]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(told.read_text())


@pytest.fixture(scope="module")
def loaded() -> dict[str, lw.LM]:
    """Models that were used already."""
    return {}


@pytest.mark.parametrize(("model", "dataset", "shots", "rows"), ALL if ROWS else FEW)
def test_the_harness_predicts_the_same(model, dataset, shots, rows, packages, request, loaded, tmp_path, capsys):
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is not there: the published Parquet files are needed")
    lm = loaded[model] if model in loaded else loaded.setdefault(model, lw.load_lm(model, CPU))
    where = str(request.getfixturevalue("own_file")) if dataset == "own" else dataset
    ours = answer(lm, where, shots, rows)
    theirs = harness(packages, ours, tmp_path)
    assert len(ours.records) == len(theirs) == rows and not any("error" in row for row in ours.records)

    # the same text and the same ids go in, with a BOS where the model wants one
    prompts = [ours.shown + ours.told(example)["text"] for example in ours.examples]
    assert bool(ours.shown) == bool(shots) and len(lm.bos) == (model == "gemma-3-270m")
    assert ours.read == [[*lm.bos, *lm.ids(prompt)] for prompt in prompts]
    assert [row["prompts"] for row in theirs] == [[prompt] * len(ours.labels) for prompt in prompts]
    assert [row["ids"] for row in theirs] == [[[ids, label] for label in ours.labels] for ids in ours.read]

    # the same comes out
    pairs = [*zip(ours.records, theirs, strict=True)]
    apart = max(
        abs(a - b)
        for mine, row in zip(ours.likelihoods, theirs, strict=True)
        for a, b in zip(mine, row["scores"], strict=True)
    )
    same = sum(mine["prediction"] == lw.argmax(lw.by_length_of(ours.labels, row["scores"])) for mine, row in pairs)
    as_acc = sum(mine["correct"] == row["acc"] for mine, row in pairs)
    right = sum(mine["correct"] for mine, _ in pairs) / rows
    acc, acc_norm = (sum(row[name] for row in theirs) / rows for name in ("acc", "acc_norm"))
    with capsys.disabled():
        print(
            f"\n{model} {dataset}, {shots} shots: {same} of {rows} predictions the same, log-likelihoods at most {apart:.0e} "
            f"nats apart; accuracy {right:.3f}, the harness's acc {acc:.3f} and acc_norm {acc_norm:.3f}"
        )
    assert apart <= 1e-2
    assert same >= 0.99 * rows
    assert as_acc >= 0.99 * rows or len({len(ids) for ids in ours.labels}) > 1
    assert (dataset == "own") == (len({len(ids) for ids in ours.labels}) > 1)
