"""§12: every rival reads what it claims to read, learns only from train rows, leaves the models alone, and is counted right."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import LATENTWIRE as lw

pytestmark = pytest.mark.trains

COLOURS = ("rose", "ruby", "sand")
ASKED = "Which colour?"
UNBRIDGED = [name for name, kind in lw.METHODS.items() if not kind.bridged]
SMALL = {"device": "cpu", "dtype": "float32", "state_cache": "memory", "rival_steps": 2, "rival_tries": 1}
PAIR = {"sender": "tiny-llama", "receiver": "tiny-qwen"}
FLAGS = ("--sender", "tiny-llama", "--receiver", "tiny-qwen", "--device", "cpu", "--state_cache", "memory")


def lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(i: int, colour: str) -> str:
    thing, who = ("hat", "cup", "car", "pen")[i % 4], ("Anna", "Ben", "Carl")[i % 5 % 3]
    return f"Number {i}: {who} keeps one {colour} {thing} and shows it to nobody."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with class answers: ``here``, and ``moved``, whose test rows have each other's texts. ``free``: phrases."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"context": sentence(i, COLOURS[i % 3]), "question": ASKED, "label": COLOURS[i % 3]} for i in range(84)]
    train, test = rows[:72], rows[72:]
    moved = [{**row, "context": other["context"]} for row, other in zip(test, test[1:] + test[:1], strict=True)]
    for name, own in (("here", test), ("moved", moved)):
        lines(folder / name / "train.jsonl", train)
        lines(folder / name / "test.jsonl", own)
    free = [
        {"context": f"é{i} {row['context']}", "question": ASKED, "answer": f"{row['label']} {i}"}
        for i, row in enumerate(rows)
    ]
    lines(folder / "free" / "train.jsonl", free[:72])
    lines(folder / "free" / "test.jsonl", free[72:])
    return folder


def contest_on(dataset: str | Path, **asked: Any) -> lw.Contest:
    """Models and rows, without a command around them."""
    settings = lw.BaselineSettings(**{**SMALL, **PAIR, "dataset": str(dataset), **asked})
    return lw.contest_of(settings, str(dataset), settings.seed)


@pytest.fixture(scope="module")
def toy() -> lw.Contest:
    return contest_on("toy", num_samples=40, samples=120)


@pytest.fixture(scope="module")
def here(data: Path) -> lw.Contest:
    return contest_on(data / "here")


@pytest.fixture(scope="module")
def free(data: Path) -> lw.Contest:
    return contest_on(data / "free")


def asking(contest: lw.Contest, seed: int | None = None, **asked: Any) -> lw.Contest:
    """The same models and rows, asked otherwise."""
    found = lw.Contest(contest.setup, contest.settings, contest.asked.model_copy(update=asked), contest.responder)
    found.seed = contest.seed if seed is None else seed
    return found


@contextlib.contextmanager
def using(name: str, contest: lw.Contest, **asked: Any) -> Iterator[Any]:
    """A method that is ended whatever happens."""
    method = lw.METHODS[name](asking(contest, **asked))
    try:
        yield method
    finally:
        method.end()


def scores(answers: Sequence[lw.Answer]) -> torch.Tensor:
    return torch.tensor([answer.scores for answer in answers])


# ---- who reads what ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random token classifier of the shape that LLMLingua-2 loads."""
    from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("weights") / "bert-base-multilingual-cased"
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = BertForTokenClassification(
            BertConfig(vocab_size=len(pieces), num_labels=2, initializer_range=1.0, **sizes)
        )
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    return folder


WORLDS: dict[tuple[str, str], lw.Contest] = {}


@pytest.mark.parametrize("name", UNBRIDGED)
def test_a_rival_reads_its_text_and_a_control_does_not(name, data, toy_run, classifier, tmp_path):
    if "lingua" in name:
        pytest.importorskip("llmlingua")
    own: dict[str, Any] = {
        "kv_cache": {"sender": "tiny-qwen"}, "control:wrong_task": {"wrong_task": toy_run},
        "llmlingua2": {"llmlingua2_model": str(classifier)},
    }.get(name, {})  # fmt: skip
    found = []
    for place in ("here", "moved"):
        asked = {"methods": [name], "token_budget_k": 60, "byte_budget": 60, "output_dir": tmp_path, **own}
        key = place, json.dumps(own, default=str)
        contest = WORLDS[key] = WORLDS.get(key) or contest_on(data / place, **asked)
        contest = asking(contest, methods=[name])
        contest.home = tmp_path / place
        assert lw.chosen_methods(contest.asked, contest.setup) == [name]
        method = lw.METHODS[name](contest)
        try:
            found.append(scores(method.answers(sorted(contest.examples, key=lambda e: int(e.id)))))
        finally:
            method.end()
    assert found[0].shape == (12, 3) and found[0].isfinite().all()
    difference = float((found[0] - found[1]).abs().max())
    reads = not lw.METHODS[name].control or name == "control:wrong_task"  # a bridge reads there, but for something else
    assert difference > 1e-3 if reads else difference < 1e-5


# ---- few shots -----------------------------------------------------------------------------------------------------------


def shown(contest: lw.Contest, name: str = "fewshot:receiver") -> list[str]:
    text = lw.METHODS[name](contest).shown
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


@pytest.mark.parametrize(("shots", "each"), [(1, 1), (3, 1), (5, 2), (6, 2), (7, 3)])
@pytest.mark.parametrize("role", ["receiver", "sender"])
def test_shots_are_balanced_and_never_none_of_a_class(here, shots, each, role):
    rows = shown(asking(here, shots=shots), f"fewshot:{role}")
    assert len(rows) >= shots
    assert Counter(row.rpartition("Answer: ")[2] for row in rows) == dict.fromkeys(COLOURS, each)
    train = {here.setup.part.receiver_text(e) + f"Answer: {e.answers[0]}" for e in here.setup.splits["train"]}
    test = {here.setup.part.receiver_text(e) for e in here.examples}
    assert {*rows} <= train and len({*rows}) == len(rows)
    assert not any(row.rpartition("Answer: ")[0] in test for row in rows)


def test_shots_are_chosen_and_ordered_by_the_seed(here):
    rows = {seed: shown(asking(here, seed, shots=6)) for seed in (1, 2, 3)}
    assert shown(asking(here, 1, shots=6)) == rows[1]
    assert len({frozenset(own) for own in rows.values()}) == 3
    assert len({tuple(row.rpartition("Answer: ")[2] for row in own) for own in rows.values()}) > 1


def test_shots_stand_before_the_text_and_the_receiver_reads_them(here):
    method, some = lw.METHODS["fewshot:receiver"](asking(here, shots=3)), here.examples[:3]
    prompts = method.prompts(some, method.contexts(some))
    assert prompts == [method.shown + here.setup.part.receiver_text(e) for e in some]
    lm = here.setup.receiver
    ids = [lm.ids(prompt + "Answer:") for prompt in prompts]
    for answer, row in zip(method.answers(some), ids, strict=True):
        wanted = [spoken(lm, row, lm.ids(f" {word}")) for word in COLOURS]
        assert answer.scores == pytest.approx(wanted, abs=1e-4)


def spoken(lm: lw.LM, ids: list[int], said: list[int]) -> float:
    """Log-likelihood by the library's own forward pass."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*lm.bos, *ids, *said]])).logits[0, -len(said) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum())


def test_a_class_whose_rows_are_all_too_long_is_refused(here):
    train = [replace(e, context="long " * 60) if e.answers[0] == "sand" else e for e in here.setup.splits["train"]]
    setup = replace(here.setup, splits={**here.setup.splits, "train": train})
    contest = lw.Contest(setup, here.settings, here.asked, here.responder)
    with pytest.raises(lw.LatentWireError, match=r"'sand'.*--max_tokens"):
        lw.METHODS["fewshot:receiver"](contest).answers(here.examples[:1])
    train[-1] = replace(train[-1], context="short", answers=("sand",), label=2)
    assert sum(row.startswith("short\n") for row in shown(contest)) == 1


def test_shots_of_free_answers_are_as_many_as_asked(free):
    rows = shown(asking(free, shots=4))
    known = {(e.context, e.answers[0]) for e in free.setup.splits["train"]}
    assert len({*rows}) == 4
    assert {(row.partition("\n")[0], row.rpartition("Answer: ")[2]) for row in rows} <= known
    answers = lw.METHODS["fewshot:sender"](asking(free, shots=2)).answers(free.examples[:2])
    assert all(answer.nll_per_token > 0 and not answer.scores for answer in answers)


def test_more_shots_than_the_receiver_reads_are_refused(here):
    with pytest.raises(lw.LatentWireError, match=r"longer than tiny-qwen reads.*--shots"):
        lw.METHODS["fewshot:receiver"](asking(here, shots=30)).answers(here.examples[:1])


# ---- what is trained in the receiver -------------------------------------------------------------------------------------

TUNED = ("lora", "prompt_tuning", "control:prompt_tuning")


def frozen(lm: lw.LM) -> tuple[dict[str, torch.Tensor], dict[str, type], torch.Tensor]:
    ids = torch.tensor([[*lm.bos, *lm.ids("the cat?")]])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    return weights, {name: type(part) for name, part in lm.model.named_modules()}, logits


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("receiver", ["tiny-qwen", "tiny-gemma"])
def test_what_was_trained_in_the_receiver_is_taken_out_again(name, receiver):
    contest = contest_on("toy", receiver=receiver, num_samples=4, samples=40)
    lm = contest.setup.receiver
    weights, kinds, logits = frozen(lm)
    plain = scores(contest.responder.answers(contest.examples, None, text=True))
    method = lw.METHODS[name](contest)
    tuned = scores(method.answers(contest.examples))
    assert not torch.allclose(tuned, plain)
    method.end()
    after, others, said = frozen(lm)
    assert others == kinds and weights.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert torch.equal(said, logits)
    assert (lm.lora, lm.tuned, lm.always_tuned) == ({}, [], False)
    assert not hasattr(lm.backbone, "peft_config")
    assert not any(p.requires_grad for p in lm.model.parameters())
    fresh = lw.Responder(contest.responder.prompting)
    assert torch.equal(scores(fresh.answers(contest.examples, None, text=True)), plain)


def test_a_text_read_in_between_does_not_see_the_adapters(toy):
    some = toy.examples[:4]
    plain = scores(lw.Responder(toy.responder.prompting).answers(some, None, text=True))
    with using("lora", toy, rival_steps=4, rival_lrs=[1e-2]) as method:
        assert not torch.allclose(scores(method.answers(some)), plain)
        between = scores(lw.Responder(toy.responder.prompting).answers(some, None, text=True))
    assert torch.equal(between, plain)


@pytest.mark.parametrize("name", TUNED)
def test_the_loss_falls(toy, name):
    rows = toy.setup.splits["train"][:32]
    with using(name, toy, rival_steps=30, rival_lrs=[1e-2]) as method:
        method.begin()
        before = float(method.loss(rows).detach())
        assert method.tuned
        after = float(method.loss(rows).detach())
    assert after < before - 0.5


@pytest.mark.parametrize("name", TUNED)
def test_the_learning_rate_of_the_lowest_validation_loss_is_kept(toy, name, monkeypatch):
    losses = {1e-2: 2.0, 1e-3: 1.0, 3e-3: 3.0}

    def fit(self: Any, rate: float) -> tuple[float, dict[str, torch.Tensor]]:
        return losses[rate], {key: torch.full_like(value, rate) for key, value in self.begin().items()}

    monkeypatch.setattr(lw.TunedMethod, "fit", fit)
    with using(name, toy, rival_lrs=[*losses]) as method:
        assert all(torch.equal(value, torch.full_like(value, 1e-3)) for value in method.tuned.values())
    assert method.details == {"learning_rate": 1e-3, "validation_loss": {"0.01": 2.0, "0.001": 1.0, "0.003": 3.0}}


def test_own_rates_are_tried_as_many_as_asked(toy):
    for tries in (1, 2):
        method = lw.METHODS["prompt_tuning"](asking(toy, rival_tries=tries, rival_steps=1))
        assert method.tuned
        assert [*method.details["validation_loss"]] == ["0.003", "0.01"][:tries]
        lowest = min(method.details["validation_loss"].values())
        assert method.details["validation_loss"][f"{method.details['learning_rate']:g}"] == lowest


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of 1 and more end in NaN."""
    loss, fit = lw.TunedMethod.loss, lw.TunedMethod.fit

    def noting(self: Any, rate: float) -> Any:
        self.rate = rate
        return fit(self, rate)

    monkeypatch.setattr(lw.TunedMethod, "fit", noting)
    monkeypatch.setattr(
        lw.TunedMethod, "loss", lambda self, rows: loss(self, rows) * (math.nan if self.rate >= 1 else 1)
    )


def test_a_diverged_learning_rate_is_never_chosen(toy, diverging):
    method = lw.METHODS["prompt_tuning"](asking(toy, rival_lrs=[1.0, 1e-3]))
    assert method.tuned and method.details["learning_rate"] == 1e-3
    assert json.loads(json.dumps(method.details, allow_nan=False))["validation_loss"]["1"] is None


def test_training_that_diverges_at_every_rate_is_rows_with_an_error(toy, diverging):
    saved: list[dict[str, Any]] = []
    with using("lora", toy, rival_lrs=[1.0, 2.0]) as method:
        lw.compute_rows(method, toy.examples[:2], 2, saved.extend)
    assert ["--rival_lrs" in row["error"] for row in saved] == [True, True]


@pytest.mark.parametrize("name", ["lora", "prompt_tuning"])
def test_training_looks_at_train_rows_and_choosing_at_validation_rows(toy, name, monkeypatch):
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    loss = lw.TunedMethod.loss

    def noting(self: Any, examples: Sequence[lw.Example]) -> torch.Tensor:
        seen[torch.is_grad_enabled()] |= {e.context for e in examples}
        return loss(self, examples)

    monkeypatch.setattr(lw.TunedMethod, "loss", noting)
    with using(name, toy, rival_steps=16) as method:
        assert method.tuned
    splits = {key: {e.context for e in rows} for key, rows in toy.setup.splits.items()}
    assert seen[True] == splits["train"] and seen[False] == splits["validation"]


def test_the_prompt_alone_tells_everyone_the_same(toy):
    method = lw.METHODS["control:prompt_tuning"](asking(toy, rival_steps=8))
    found = scores(method.answers(toy.examples))
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-5)
    answer = method.answers(toy.examples[:1])[0]
    assert answer.nbytes == 0


@pytest.mark.parametrize("receiver", ["tiny-qwen", "tiny-llama"])
def test_the_loss_is_the_cross_entropy_of_the_answer_alone(receiver, data):
    contest = contest_on(data / "here", receiver=receiver, soft_tokens=5)
    lm, part, rows = contest.setup.receiver, contest.setup.part, contest.setup.splits["train"][:3]
    tuning, alone = lw.METHODS["prompt_tuning"](contest), lw.METHODS["control:prompt_tuning"](contest)
    with torch.no_grad(), using("lora", contest) as lora:
        lora.begin()
        found = {"lora": float(lora.loss(rows))}
    with torch.no_grad():
        for name, method in (("text", tuning), ("alone", alone)):
            method.begin()
            method.prompt.embedding.weight.add_(torch.randn(method.prompt.embedding.weight.shape))
            found[name] = float(method.loss(rows))
    assert tuning.soft(2).embeds.shape == (2, 5, lm.width)

    def by_hand(soft: torch.Tensor, text: bool) -> float:
        losses = []
        for e in rows:
            before = lm.ids((part.receiver_text(e) if text else "") + "Answer:")
            answer = [*lm.ids(f" {e.answers[0]}"), lm.tokenizer.eos_token_id]
            pieces = [lm.table(torch.tensor(ids, dtype=torch.long)) for ids in (lm.bos, [*before, *answer[:-1]])]
            logits = lm.model(inputs_embeds=torch.cat([pieces[0], soft, pieces[1]])[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[-len(answer) :], torch.tensor(answer)))
        return float(torch.stack(losses).mean())

    with torch.no_grad():
        assert found["lora"] == pytest.approx(by_hand(torch.zeros(0, lm.width), True), abs=1e-5)
        assert found["text"] == pytest.approx(by_hand(tuning.prompt.embedding.weight, True), abs=1e-5)
        assert found["alone"] == pytest.approx(by_hand(alone.prompt.embedding.weight, False), abs=1e-5)


def test_lora_has_the_rank_that_was_asked(toy):
    with using("lora", toy, rank=3) as method:
        ranks = {len(p) for name, p in method.begin().items() if "lora_A" in name}
        scales = {part.scaling["default"] for part in toy.setup.receiver.tuned}
    assert (ranks, scales) == ({3}, {2.0})
