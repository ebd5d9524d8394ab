"""§12: every rival reads what it claims to read, learns only from train rows, leaves the models alone, and is counted right."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


def contest_on(dataset: str | Path, **asked: Any) -> lw.EvalContext:
    """Models and rows, without a command around them."""
    settings = lw.BaselineSettings(**{**SMALL, **PAIR, "dataset": str(dataset), **asked})
    return lw.context_of(settings, str(dataset), settings.seed)


@pytest.fixture(scope="module")
def toy() -> lw.EvalContext:
    return contest_on("toy", num_samples=40, samples=120)


@pytest.fixture(scope="module")
def here(data: Path) -> lw.EvalContext:
    return contest_on(data / "here")


@pytest.fixture(scope="module")
def free(data: Path) -> lw.EvalContext:
    return contest_on(data / "free")


def asking(contest: lw.EvalContext, **asked: Any) -> lw.EvalContext:
    """The same models and rows, asked otherwise."""
    return lw.EvalContext(contest.setup, contest.settings, contest.asked.model_copy(update=asked), contest.receiver)


@contextlib.contextmanager
def using(name: str, contest: lw.EvalContext, **asked: Any) -> Iterator[Any]:
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


WORLDS: dict[tuple[str, str], lw.EvalContext] = {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("same_model_bridge", "probe:receiver") else n
        for n in UNBRIDGED
        if not n.startswith("ceiling")
    ],  # test_ceiling.py
)
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


def shown(contest: lw.EvalContext, name: str = "fewshot:receiver") -> list[str]:
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
    rows = {seed: shown(asking(here, seed=seed, shots=6)) for seed in (1, 2, 3)}
    assert shown(asking(here, seed=1, shots=6)) == rows[1]
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
    contest = lw.EvalContext(setup, here.settings, here.asked, here.receiver)
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
    plain = scores(contest.receiver.answers(contest.examples, None, text=True))
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
    fresh = lw.Receiver(contest.receiver.prompting)
    assert torch.equal(scores(fresh.answers(contest.examples, None, text=True)), plain)


def test_a_text_read_in_between_does_not_see_the_adapters(toy):
    some = toy.examples[:4]
    plain = scores(lw.Receiver(toy.receiver.prompting).answers(some, None, text=True))
    with using("lora", toy, rival_steps=4, rival_lrs=[1e-2]) as method:
        assert not torch.allclose(scores(method.answers(some)), plain)
        between = scores(lw.Receiver(toy.receiver.prompting).answers(some, None, text=True))
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
        size = toy.setup.receiver.embed_rms  # rates of prompt tuning count in it
        assert [*method.details["validation_loss"]] == [f"{rate * size:g}" for rate in method.rates[:tries]]
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
    chosen_by = {e.context for e in toy.setup.splits["validation"][:32]}  # a quarter as many as train rows, at least 32
    assert seen[True] == splits["train"] and seen[False] == chosen_by < splits["validation"]


def test_batches_hold_texts_of_like_length_and_every_row_equally_often(toy):
    train = [replace(e, context="word " * (1 + 7 * i % 23)) for i, e in enumerate(toy.setup.splits["train"])]
    setup = replace(toy.setup, splits={**toy.setup.splits, "train": train})
    contest, rows, size = lw.EvalContext(setup, toy.settings, toy.asked, toy.receiver), train, 4
    steps = 2 * len(rows) // size  # two passes
    with using("lora", contest) as method:
        groups = [*method.course(steps, size)]
        again = [*method.course(steps, size)]
    assert groups == again
    assert {len(group) for group in groups} == {size}
    counts = Counter(example.id for group in groups for example in group)
    assert set(counts.values()) == {2} and len(counts) == len(rows)
    spread = sum(max(len(e.context) for e in group) - min(len(e.context) for e in group) for group in groups)
    plain = [rows[lw.row_at(toy.seed, place, len(rows))] for place in range(steps * size)]
    random_spread = sum(
        max(len(e.context) for e in group) - min(len(e.context) for e in group) for group in lw.batches(plain, size)
    )
    assert spread < 0.6 * random_spread
    lengths = [len(group[0].context) for group in groups[:8]]
    assert lengths != sorted(lengths)  # easy and hard batches come in any order


def test_the_prompt_alone_tells_everyone_the_same(toy):
    method = lw.METHODS["control:prompt_tuning"](asking(toy, rival_steps=8))
    found = scores(method.answers(toy.examples))
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-5)
    answer = method.answers(toy.examples[:1])[0]
    assert answer.nbytes == 0


@pytest.mark.parametrize("receiver", ["tiny-qwen", "tiny-llama"])
def test_the_loss_is_the_cross_entropy_of_the_answer_alone(receiver, data):
    contest = contest_on(data / "free", receiver=receiver, soft_tokens=5)
    lm, part = contest.setup.receiver, contest.setup.part
    rows = sorted(contest.setup.splits["train"], key=lambda e: len(e.answers[0]))[::12]
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
    assert len({len(e.answers[0]) for e in rows}) > 1

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


# ---- probes --------------------------------------------------------------------------------------------------------------


def by_hand(contest: lw.EvalContext, reader: lw.LM, layer: int, pooling: str, examples: Sequence[lw.Example]) -> Any:
    """Features of each text, read alone."""
    rows = [[*reader.bos, *reader.ids(contest.setup.part.sender_text(e))] for e in examples]
    with torch.no_grad():
        states = [reader.model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0] for row in rows]
    part = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}[pooling]
    return torch.stack([part(h) for h in states]).numpy()


@pytest.mark.parametrize("name", ["probe", "probe:receiver"])
def test_a_probe_equals_scikit_learns_grid_search_called_directly(name, here):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reader = here.setup.receiver if name == "probe:receiver" else here.setup.sender
    train, test = here.setup.splits["train"], here.examples
    with using(name, here, probe_layers=["1", "2"], pooling=["mean", "last"]) as method:
        found = method.answers(test)
    direct = {}
    for layer in (1, 2):
        for pooling in ("mean", "last"):
            search = GridSearchCV(
                make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
                {"logisticregression__C": [0.001, 0.01, 0.1, 1.0]}, cv=3,
            )  # fmt: skip
            search.fit(by_hand(here, reader, layer, pooling, train), [e.label for e in train])
            direct[layer, pooling] = search, by_hand(here, reader, layer, pooling, test)
    told = {(one["layers"][0], one["pooling"]): one for one in method.details["tried"]}
    assert [*told] == [*direct]
    for key, (search, x) in direct.items():
        assert told[key]["C"] == search.best_params_["logisticregression__C"]
        assert told[key]["cross_validation"] == pytest.approx(search.best_score_, abs=1e-6)
        assert told[key]["accuracy"] == pytest.approx(search.score(x, [e.label for e in test]), abs=1e-6)
    search, x = max(direct.values(), key=lambda one: one[0].best_score_)
    wanted = torch.from_numpy(search.predict_log_proba(x)).float()
    torch.testing.assert_close(scores(found), wanted, rtol=0, atol=2e-3)
    assert [answer.text for answer in found] == [COLOURS[i] for i in search.predict(x)]


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pooling_is_what_it_says(pooling, here):
    flat = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(1))
    store = lw.StateStore(flat, torch.tensor([0, 4, 5, 9]), {"a": 0, "b": 1, "c": 2}, 0.0, "here")
    pieces = [flat[5:9], flat[0:4]]
    rows = {"mean": [p.mean(0) for p in pieces], "last": [p[-1] for p in pieces], "first": [p[0] for p in pieces]}
    torch.testing.assert_close(store.pooled(["c", "a"], pooling), torch.stack(rows[pooling]).flatten(1))
    with using("probe", here, probe_layers=["1"], pooling=[pooling]) as method:
        x = torch.from_numpy(method.features(here.examples[:5], (1,), pooling))
    wanted = torch.from_numpy(by_hand(here, here.setup.sender, 1, pooling, here.examples[:5]))
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-4)


def test_layers_are_chosen_by_cross_validation_and_never_by_test_rows(toy, monkeypatch):
    chance = random.Random(3)

    def features(self: Any, examples: Sequence[lw.Example], layers: Sequence[int], pooling: str) -> Any:
        """Layer 1 tells of every train row and lies of the test rows; layer 2 tells of some, and of every test row."""
        learned = len(examples) == len(toy.setup.splits["train"])
        told = [e.label for e in examples]
        if learned and layers == (2,):
            told = [label if chance.random() < 0.6 else chance.randrange(4) for label in told]
        if not learned and layers == (1,):
            told = [(label + 1) % 4 for label in told]
        return torch.eye(4)[told].numpy()

    monkeypatch.setattr(lw.ProbeMethod, "features", features)
    for order in (["1", "2"], ["2", "1"]):
        with using("probe", toy, probe_layers=order) as method:
            assert method.best[1] == (1,)
        assert sorted(one["accuracy"] for one in method.details["tried"]) == [0.0, 1.0]
        assert [one["layers"] for one in method.details["tried"]] == [[int(order[0])], [int(order[1])]]


def test_a_text_that_stands_in_both_splits_does_not_stop_the_probe(here):
    twin = replace(here.setup.splits["train"][0], id="twin", context=here.examples[3].context)
    splits = {**here.setup.splits, "train": [twin, *here.setup.splits["train"]]}
    contest = lw.EvalContext(replace(here.setup, splits=splits), here.settings, here.asked, here.receiver)
    assert len(lw.METHODS["probe"](contest).answers(here.examples)) == len(here.examples)


def test_a_class_that_train_never_shows_is_never_said(here):
    train = [e for e in here.setup.splits["train"] if e.label != 1]
    contest = lw.EvalContext(replace(here.setup, splits={**here.setup.splits, "train": train}), here.settings, here.asked,
                         here.receiver)  # fmt: skip
    found = lw.METHODS["probe"](contest).answers(here.examples)
    assert {answer.scores[1] for answer in found} == {-1e9}
    assert all(math.exp(answer.scores[0]) + math.exp(answer.scores[2]) == pytest.approx(1) for answer in found)


# ---- what the sender says ------------------------------------------------------------------------------------------------


def heard(contest: lw.EvalContext, examples: Sequence[lw.Example], contexts: Sequence[str]) -> list[lw.Answer]:
    """What the receiver answers where other words stand for the text."""
    changed = [replace(e, context=text) for e, text in zip(examples, contexts, strict=True)]
    return lw.Receiver(contest.receiver.prompting).answers(changed, None, text=True)


def test_relays_of_every_budget_read_the_beginning_of_one_note(here, monkeypatch):
    contest, said = asking(here, relay_tokens=50), []
    generate = lw.LM.generate

    def counting(self: lw.LM, prefill: Any, count: int, *rest: Any, **more: Any) -> list[str]:
        if self is here.setup.sender:
            said.append(count)
        return generate(self, prefill, count, *rest, **more)

    monkeypatch.setattr(lw.LM, "generate", counting)
    some, lm = here.examples[:5], here.setup.sender
    whole = None
    for count in (50, 1, 2, 4, 8, 16):
        answers = lw.METHODS[f"text_relay:{count}"](contest).answers(some)
        notes = contest.notes(some)
        whole = whole or notes
        assert notes == whole and max(map(len, notes)) > 16
        texts = [lm.tokenizer.decode(note[:count]).strip() for note in notes]
        wanted = heard(here, some, texts)
        torch.testing.assert_close(scores(answers), scores(wanted), rtol=0, atol=1e-4)
        assert [answer.nbytes for answer in answers] == [len(text.encode()) for text in texts]
        assert [answer.tokens for answer in answers] == [len(here.setup.receiver.ids(text)) for text in texts]
    assert said == [50]


def test_a_note_is_greedy_after_the_text_and_the_task(here):
    contest, lm, example = asking(here, relay_tokens=3), here.setup.sender, here.examples[0]
    opening = here.setup.part.receiver_text(example).rstrip() + "\n\nWhich of these is it: rose, ruby, sand?"
    ids = lm.ids(f"{opening} Name it, then say why, for somebody who cannot read the text.\nNote:")
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([[*lm.bos, *ids]])).logits[0, -1].argmax()))
    assert contest.notes([example]) == [lm.ids(lm.tokenizer.decode(ids[-3:]).strip())]


def test_relays_longer_than_a_note_may_be_do_not_run(here):
    names = [f"text_relay:{count}" for count in (1, 2, 4, 8, 16, 50)]
    found = lw.chosen_methods(asking(here, methods=["text_relay"], relay_tokens=16).asked, here.setup)
    assert found == names[:5]


def test_the_senders_own_label_is_all_that_the_receiver_reads(here):
    sender, lm = here.setup.sender, here.setup.receiver
    answers = lw.METHODS["sender_label"](here).answers(here.examples)
    labels = []
    for example in here.examples:
        ids = sender.ids(here.setup.part.receiver_text(example) + "Answer:")
        likely = [spoken(sender, ids, sender.ids(f" {word}")) for word in COLOURS]
        labels.append(COLOURS[likely.index(max(likely))])
    assert len({*labels}) > 1
    told = [f"The answer is {label}." for label in labels]
    torch.testing.assert_close(scores(answers), scores(heard(here, here.examples, told)), rtol=0, atol=1e-4)
    assert [(a.nbytes, a.tokens) for a in answers] == [(len(label), len(lm.ids(label))) for label in labels]


def test_where_answers_are_free_the_senders_words_are_its_label(free):
    method, some = lw.METHODS["sender_label"](free), free.examples[:3]
    said = [answer.text for answer in lw.METHODS["zeroshot:sender"](free).answers(some)]
    assert method.contexts(some) == said and any(said)


def test_an_ensemble_multiplies_the_two_models_probabilities(here):
    both = [scores(lw.METHODS[name](here).answers(here.examples)) for name in ("text", "zeroshot:sender")]
    found = lw.METHODS["ensemble"](here).answers(here.examples)
    wanted = both[0].log_softmax(-1) + both[1].log_softmax(-1)
    torch.testing.assert_close(scores(found), wanted, rtol=0, atol=1e-4)
    assert [answer.text for answer in found] == [COLOURS[i] for i in wanted.argmax(-1).tolist()]
    assert not lw.chosen_methods(
        asking(here, methods=["ensemble"]).asked, replace(here.setup, part=lw.Task(here.settings))
    )


# ---- budgets -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agnostic(data: Path) -> lw.EvalContext:
    return contest_on(data / "free", protocol="question-agnostic")


@pytest.mark.parametrize("count", [3, 30, 41, 500])
@pytest.mark.parametrize("keep", ["head", "tail", "both"])
def test_a_token_budget_keeps_the_question_and_exactly_so_many_tokens(keep, count, free, agnostic):
    name, lm = "token_budget" if keep == "head" else f"token_budget:{keep}", free.setup.receiver
    for contest in (free, agnostic):
        with using(name, contest, token_budget_k=count) as method:
            rows = [method.ids(example) for example in contest.examples]
            answers = method.answers(contest.examples[:2])
        assert [answer.tokens for answer in answers] == [len(row) for row in rows[:2]]
        assert [answer.nbytes for answer in answers] == [len(lm.tokenizer.decode(row).encode()) for row in rows[:2]]
        for example, row in zip(contest.examples, rows, strict=True):
            own, asked = lm.ids(example.context), lm.ids(f"\nQuestion: {ASKED}\n")
            room = count if contest is agnostic else max(0, count - len(asked))
            left = {"head": room, "tail": 0, "both": room // 2}[keep]
            kept = own if room >= len(own) else own[:left] + own[len(own) - (room - left) :]
            assert row == [*kept, *asked] if contest is agnostic else row == [*kept, *asked][:count]
            assert contest is agnostic or len(row) == min(count, len(own) + len(asked))


def test_a_budget_may_be_a_share_of_the_text_or_as_many_as_latents(free):
    lm, example = free.setup.receiver, free.examples[0]
    whole = len(lm.ids(free.setup.part.receiver_text(example)))
    assert asking(free, budget_ratio=3.0).token_budget(example) == round(whole / 3)
    assert asking(free, soft_tokens=7).token_budget(example) == 7
    assert asking(free, token_budget_k=9).token_budget(example) == 9


@pytest.mark.parametrize("count", [15, 16, 17, 31, 32, 33, 400])
def test_a_byte_budget_keeps_the_question_and_whole_characters(count, free, agnostic):
    contexts = ["é" * 20, "👍🏽" * 5, "plain words and more of them"]
    for contest in (free, agnostic):
        examples = [replace(e, context=text) for e, text in zip(contest.examples, contexts, strict=False)]
        with using("byte_budget", contest, byte_budget=count) as method:
            found = method.contexts(examples)
            prompts = method.prompts(examples, found)
            answers = method.answers(examples)
        room = count if contest is agnostic else count - len(ASKED)
        for text, kept in zip(contexts, found, strict=True):
            size = len(kept.encode())
            assert text.startswith(kept) and size <= room
            assert kept == text or size + len(text[len(kept)].encode()) > room
        assert prompts == [f"{kept}\nQuestion: {ASKED}\n" for kept in found]
        assert [answer.nbytes for answer in answers] == [len(kept.encode()) for kept in found]


@pytest.mark.parametrize("budget", [1, 12, 30])
@pytest.mark.parametrize("compressor", ["tiny-llama", "tiny-qwen"])
def test_selective_keeps_the_most_surprising_tokens_that_fit(budget, compressor, free):
    lm, reader = lw.load_lm(compressor, free.settings), free.setup.receiver
    named = None if compressor == "tiny-llama" else compressor
    with using("selective", free, compressor=named, methods=["selective"]) as method:
        assert method.model.name == compressor
        for example in free.examples[:3]:
            ids, spans = lm.pieces(example.context)
            with torch.no_grad():
                logs = lm.model(torch.tensor([[*lm.bos, *ids]])).logits[0].log_softmax(-1)
            offset = len(lm.bos)
            nats = [math.inf if i + offset == 0 else -float(logs[i + offset - 1, t]) for i, t in enumerate(ids)]
            order = sorted(range(len(ids)), key=lambda i: -nats[i])
            texts = [
                "".join(
                    example.context[at] for at in sorted({at for i in order[:n] for at in range(*spans[i])})
                ).strip()
                for n in range(len(ids) + 1)
            ]
            fitting = [n for n, text in enumerate(texts) if len(reader.ids(text)) <= budget]
            assert method.compress(example, budget) in {texts[n] for n in fitting[-2:]}


def test_a_text_that_fits_is_not_compressed(free):
    with using("selective", free, token_budget_k=500, methods=["selective"]) as method:
        assert method.contexts(free.examples) == [e.context for e in free.examples]
    asked = len(free.setup.receiver.ids(f"\nQuestion: {ASKED}\n"))
    with using("selective", free, token_budget_k=asked + 20, methods=["selective"]) as method:
        found = method.contexts(free.examples)
    assert all(15 <= len(free.setup.receiver.ids(text)) <= 20 for text in found)


@pytest.mark.parametrize("name", ["llmlingua", "longllmlingua", "llmlingua2"])
@pytest.mark.parametrize("budget", [60, 150])
def test_llmlingua_comes_near_the_budget(name, budget, free, classifier):
    pytest.importorskip("llmlingua")
    words = random.Random(7)
    text = " ".join("".join(words.choices("abcdeghilmnorstu", k=words.randint(2, 7))) for _ in range(75))
    text = ". ".join(text[i : i + 60].strip() for i in range(0, len(text), 60)) + "."
    example = replace(free.examples[0], context=text)
    asked = {"methods": [name], "llmlingua2_model": str(classifier)}
    with using(name, free, **asked) as method:
        plain = random.getstate(), torch.get_rng_state()
        assert method.compressor
        assert random.getstate() == plain[0] and torch.equal(torch.get_rng_state(), plain[1])
        found = method.compress(example, budget)
    size = len(free.setup.receiver.ids(found))
    assert len(free.setup.receiver.ids(text)) > 300
    assert abs(size - budget) <= 0.1 * budget


SHORTENED = ("extractive", "extractive:windows", "extractive:bytes", "random_words", "extractive+prompt_tuning")


@pytest.mark.parametrize("name", ["selective", *SHORTENED])
def test_what_shortens_texts_of_class_tasks_runs_only_when_it_is_named(name, here, free):
    for contest, words, runs in ((here, ["all"], False), (here, [name], True), (free, ["all"], True)):
        asked = asking(contest, methods=words, byte_budget=60).asked
        assert (name in lw.chosen_methods(asked, contest.setup)) is runs


# ---- caches, partners, other tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen", "tiny-gemma"])
def test_a_cache_of_the_same_model_says_what_the_text_says(name, data):
    contest = contest_on(data / "here", sender=name, receiver=name, methods=["kv_cache"])
    assert lw.chosen_methods(contest.asked, contest.setup) == ["kv_cache"]
    some = contest.examples
    found, text = lw.METHODS["kv_cache"](contest).answers(some), lw.METHODS["text"](contest).answers(some)
    torch.testing.assert_close(scores(found), scores(text), rtol=0, atol=1e-4)
    assert [answer.text for answer in found] == [answer.text for answer in text]
    lm = contest.setup.receiver
    config, counts = lm.config, [len(lm.ids(contest.setup.part.receiver_text(e))) for e in some]
    assert [answer.tokens for answer in found] == counts
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * lm.blocks[0].self_attn.head_dim * 4
    assert [answer.nbytes for answer in found] == [each * count for count in counts]


def test_a_cache_needs_models_of_one_shape(here):
    asked = asking(here, methods=["kv_cache"]).asked
    assert lw.chosen_methods(asked, here.setup) == []
    twin = lw.load_lm("tiny-qwen", here.settings)
    assert lw.chosen_methods(asked, replace(here.setup, sender=twin)) == ["kv_cache"]


@pytest.fixture(scope="module")
def channel(toy_run: Path) -> lw.EvalContext:
    settings = lw.EvalSettings(checkpoint=toy_run, num_samples=40, state_cache="memory")
    return lw.open_context(settings, lw.Checkpoint.open(toy_run))


def test_a_partner_of_the_same_label_is_another_example(channel):
    method = lw.METHODS["same_label"](channel)
    labels = [example.label for example in channel.examples]
    assert [labels[i] for i in method.partner] == labels
    assert sorted(method.partner) == [*range(40)] and all(i != p for i, p in enumerate(method.partner))
    assert [method.message(e) for e in channel.examples] == [channel.messages[p] for p in method.partner]
    alone = lw.EvalContext(channel.setup, channel.settings, channel.asked, channel.receiver, None)
    lonely = next(i for i, label in enumerate(labels) if label == 0)
    alone.examples = [e for i, e in enumerate(channel.examples) if labels[i] != 0 or i == lonely]
    partner = lw.METHODS["same_label"](alone).partner
    assert [i for i, p in enumerate(partner) if i == p] == [
        i for i, e in enumerate(alone.examples) if e is channel.examples[lonely]
    ]


def test_a_bridge_of_the_task_itself_is_no_wrong_task(toy, here, toy_run):
    with pytest.raises(lw.LatentWireError, match="trained on toy, the task itself"):
        lw.METHODS["control:wrong_task"](asking(toy, wrong_task=toy_run)).answers(toy.examples[:1])
    assert not lw.chosen_methods(asking(here, methods=["control:wrong_task"]).asked, here.setup)
    answers = lw.METHODS["control:wrong_task"](asking(here, wrong_task=toy_run)).answers(here.examples[:2])
    assert all(len(answer.scores) == 3 and answer.nbytes > 0 for answer in answers)


def test_a_trained_bridge_is_trained_with_the_seed_it_is_asked(toy, tmp_path):
    seeds, languages = [], set()
    for seed in (42, 7):
        contest = asking(toy, seed=seed, rival_steps=1, soft_tokens=3)
        contest.home = tmp_path / str(seed)
        inner = lw.METHODS["linear_bridge"](contest).inner
        seeds.append(inner.context.settings.seed)
        assert inner.context.bridge.shape.settings.latent_len == 3 and inner.context.setup.sender.name == "tiny-llama"
        assert inner.context.examples == toy.examples
        assert {e.id for e in inner.context.setup.splits["train"]} <= {e.id for e in toy.setup.splits["train"]}
        languages.add(inner.context.bridge.fingerprint())
    assert seeds == [42, 7] and len(languages) == 2


def test_a_bridge_trained_longer_or_with_another_seed_is_another_bridge(toy, tmp_path):
    found = []
    for seed, epochs in ((1, 0.5), (1, 1.0), (1, 0.5), (2, 0.5)):
        contest = asking(toy, seed=seed, rival_steps=None, rival_epochs=epochs)
        contest.home = tmp_path
        channel = lw.METHODS["linear_bridge"](contest).inner.context
        found.append((channel.bridge.fingerprint(), channel.settings.steps, channel.settings.seed))
    assert found[0] == found[2] and len({name for name, _, _ in found}) == 3
    assert [one[1:] for one in found] == [(2, 1), (4, 1), (2, 1), (2, 2)]


def test_beside_a_bridge_another_kind_is_trained_as_long(toy, toy_run, tmp_path):
    found = {}
    for steps in (None, 3):
        settings = lw.EvalSettings(checkpoint=toy_run, num_samples=8, state_cache="memory", rival_steps=steps)
        channel = lw.open_context(settings, lw.Checkpoint.open(toy_run))
        channel.home = tmp_path
        inner = lw.METHODS["linear_bridge"](channel).inner.context.settings
        found[steps] = (inner.steps, inner.batch_size)
    trained = json.loads((toy_run / "config.json").read_text())
    assert found == {None: (trained["steps"], trained["batch_size"]), 3: (3, 32)}


def test_what_methods_tell_is_kept_apart(toy):
    """V9: two kinds of prompt tuning with the same settings had one place in details.json, and the second took it."""
    contest, names = asking(toy), ["prompt_tuning", "control:prompt_tuning", "lora"]
    assert len({*lw.record_keys(contest, names, {True: "a", False: "a"}).values()}) == 3


def test_a_trained_bridge_is_the_one_of_its_learning_rates_that_validates_best(toy, tmp_path):
    """V5: `baseline linear_bridge --rival_lrs` once trained at the usual rate and said nothing."""
    contest = asking(toy, rival_steps=2, rival_lrs=[1e-9, 1e-2], soft_tokens=3)
    contest.home = tmp_path
    method = lw.METHODS["linear_bridge"](contest)
    states = {}
    chosen = method.inner.context.settings.lr
    for folder in tmp_path.glob("linear_bridge-*"):
        states[json.loads((folder / "config.json").read_text())["lr"]] = lw.load_checkpoint(
            folder / "checkpoint" / "best"
        )[1]
    assert {*states} == {1e-9, 1e-2}
    best = max(states, key=lambda rate: states[rate]["progress"]["best"])
    assert method.details["learning_rate"] == chosen == best
    assert method.details["validation"] == {
        f"{rate:g}": {k: v for k, v in state["progress"]["best_validation"].items() if k.startswith("val_")}
        for rate, state in states.items()
    }
    contest.setup = replace(contest.setup, splits=contest.setup.splits | {"validation": []})
    with pytest.raises(lw.LatentWireError, match="no validation rows to choose among --rival_lrs"):
        _ = lw.METHODS["linear_bridge"](contest).inner


def test_the_same_model_bridge_goes_from_the_receiver_to_itself(here, tmp_path):
    contest = asking(here, rival_steps=1)
    contest.home = tmp_path
    channel = lw.METHODS["same_model_bridge"](contest).inner.context
    assert (channel.setup.sender.name, channel.setup.receiver.name) == ("tiny-qwen", "tiny-qwen")
    assert (channel.settings.encoder, channel.settings.steps) == (here.settings.encoder, 1)


def test_the_linear_bridge_takes_plain_means_of_states(toy, tmp_path):
    contest = asking(toy, rival_steps=1, soft_tokens=3)
    contest.home = tmp_path
    bridge = lw.METHODS["linear_bridge"](contest).inner.context.bridge
    assert isinstance(bridge.pooler, lw.MeanPooler) and not [*bridge.pooler.parameters()]
    tokens, mask = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    shares = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).expand(2, 2, 6)
    latents, weights = bridge.pooler(tokens, mask, lw.Windows(shares, None, shares.sum(-1) > 0, shares))
    torch.testing.assert_close(latents, torch.stack([tokens[:, :2].mean(1), tokens[:, 2:].mean(1)], 1))
    assert torch.equal(weights, torch.ones(2, 6))


# ---- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["fewshot"], {"fewshot:receiver", "fewshot:sender"}),
        (["zeroshot"], {"text", "zeroshot:sender"}),
        (["zeroshot:receiver"], {"text"}),
        (["text"], {"text"}),
        (["token_budget"], {"token_budget"}),
        (["token_budget:tail", "token_budget"], {"token_budget:tail", "token_budget"}),
        (["probe"], {"probe"}),
        (["linear_probe", "text+prompt_tuning"], {"probe", "prompt_tuning"}),
        (["text_relay"], {f"text_relay:{count}" for count in (1, 2, 4, 8, 16, 50)}),
        (["control"], {name for name in lw.METHODS if name.startswith("control:")}),
        (["all"], {*lw.METHODS}),
        ([], set()),
    ],
)
def test_methods_are_named_by_name_alias_group_or_all(words, wanted):
    assert lw.named_methods(words) == wanted


@pytest.mark.parametrize("word", ["fewshots", "control:", "text_rely", ""])
def test_an_unknown_name_is_no_group(word):
    with pytest.raises(lw.LatentWireError, match="unknown method"):
        lw.named_methods(["text", word])


# ---- what shows that a method is broken ----------------------------------------------------------------------------------


def graded(right: int, count: int = 100, **fields: Any) -> list[dict[str, Any]]:
    """Rows of four classes, said in turn."""
    found = []
    for i in range(count):
        said = i % 4
        label = said if i < right else (said + 1) % 4
        found.append({"label": label, "prediction": said, "correct": said == label, **fields})
    return found


def free_rows(empty: int, long: int, count: int = 100) -> list[dict[str, Any]]:
    return [{"generated": "" if i < empty else "word", "gold_tokens": 9 if i < long else 8} for i in range(count)]


def test_a_method_below_chance_is_broken(toy):
    part = toy.setup.part
    found = lw.gates(lw.Kind.of("lora"), graded(16), part.words, 8)  # 0.25 - 2·√(0.25·0.75/100) = 0.163
    assert len(found) == 1 and "0.160 is below chance (0.250)" in found[0]
    assert lw.gates(lw.Kind.of("lora"), graded(17), part.words, 8) == []
    assert lw.gates(lw.Kind.of("lora"), graded(1, 19), part.words, 8) == []
    assert len(lw.gates(lw.Kind.of("lora"), graded(0, 20), part.words, 8)) == 1


def test_a_method_that_says_one_class_only_is_broken(toy):
    rows = [{**row, "prediction": 2, "correct": row["label"] == 2} for row in graded(100)]
    assert lw.gates(lw.Kind.of("probe"), rows, toy.setup.part.words, 8) == ["it always says 'c'"]
    assert lw.gates(lw.Kind.of("probe"), [row for row in rows if row["correct"]], toy.setup.part.words, 8) == []
    assert lw.gates(lw.Kind.of("probe"), [{**rows[0], "prediction": 1}, *rows[1:]], toy.setup.part.words, 8) == []


def test_free_answers_that_are_empty_or_cut_off_are_broken(free):
    part = free.setup.part
    assert lw.gates(lw.Kind.of("text"), free_rows(5, 5), part.words, 8) == []
    assert [text[:4] for text in lw.gates(lw.Kind.of("text"), free_rows(6, 0), part.words, 8)] == ["6.0%"]
    assert [
        "longer than the 8 tokens" in text for text in lw.gates(lw.Kind.of("text"), free_rows(0, 6), part.words, 8)
    ] == [True]
    assert len(lw.gates(lw.Kind.of("text"), free_rows(6, 6), part.words, 8)) == 2
    assert lw.gates(lw.Kind.of("text"), [{**row, "generated": " \n"} for row in free_rows(0, 0)], part.words, 8)


def test_controls_and_failed_rows_are_not_judged(toy):
    part = toy.setup.part
    for name, method in lw.METHODS.items():
        assert bool(lw.gates(lw.Kind.of(name), graded(0), part.words, 8)) is not method.control
    assert lw.gates(lw.Kind.of("lora"), [*graded(0), {"error": "memory"}], part.words, 8) == []


def test_records_know_how_long_the_shortest_accepted_answer_is(free):
    example = replace(free.examples[0], answers=("a long answer", "short"))
    saved: list[dict[str, Any]] = []
    lw.compute_rows(lw.METHODS["text"](free), [example], 1, saved.extend)
    assert saved[0]["gold_tokens"] == len(free.setup.receiver.ids(" short"))


# ---- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def baseline(tmp_path, monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in an empty folder → exit code, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> tuple[int, str, str]:
        code = lw.main(["baseline", *map(str, words), *FLAGS])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Names of the methods whose rows are computed."""
    names: list[str] = []
    compute = lw.compute_rows

    def noting(method: lw.Method, examples: Sequence[lw.Example], *rest: Any) -> None:
        names.append(method.name)
        compute(method, examples, *rest)

    monkeypatch.setattr(lw, "compute_rows", noting)
    return names


SHORT = ("--dataset", "toy", "--num_samples", "24", "--samples", "60", "--steps", "2", "--rival_tries", "1",
         "--relay_tokens", "8", "--output_dir", "out")  # fmt: skip


def always(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it says the first class whatever it reads."""
    said = lw.Answer("a", (0.0, -1.0, -1.0, -1.0))
    monkeypatch.setattr(lw.METHODS[method], "answers", lambda self, examples: [said] * len(examples))


def test_a_broken_trained_rival_fails_the_command(baseline, monkeypatch):
    always("lora", monkeypatch)
    code, out, err = baseline("lora", "control:none", *SHORT)
    assert (code, err) == (1, "") and "broken: lora on toy: it always says 'a'" in out
    gates = json.loads(Path("out/results.json").read_text())["gates"]
    assert gates == {"lora": {"broken": ["it always says 'a'"], "fails": True}}
    assert baseline("lora", *SHORT)[0] == 1
    assert Path("out/table.md").read_text().count("| lora |") == 1


def test_a_broken_untrained_rival_is_told_only(baseline, monkeypatch):
    always("text", monkeypatch)
    always("control:none", monkeypatch)
    code, out, err = baseline("zeroshot:receiver", "control:none", *SHORT)
    assert (code, err) == (0, "") and "careful: text on toy: it always says 'a'" in out
    assert "control:none on toy" not in out


def test_failed_rows_fail_the_command_and_are_computed_again(baseline, monkeypatch, computed):
    def broken(self: Any, examples: Any) -> Any:
        raise RuntimeError("no such kernel")

    answers = lw.METHODS["text"].answers
    monkeypatch.setattr(lw.METHODS["text"], "answers", broken)
    code, out, err = baseline("text", "probe", *SHORT)
    assert (code, err) == (1, "") and "rows failed: 24 of text" in out
    monkeypatch.setattr(lw.METHODS["text"], "answers", answers)
    computed.clear()
    assert baseline("text", "probe", *SHORT)[0] == 0 and computed == ["text"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("zeroshoot", "--dataset", "toy"), "unknown method 'zeroshoot'"),
        (
            ("bridge", "--dataset", "toy"),
            "bridge needs a bridge; evaluate it with eval --checkpoint RUN --methods bridge",
        ),
        (("embed", "--dataset", "toy"), "embed:adapter needs a bridge"),
        (("text", "same_label", "--dataset", "toy"), "same_label needs a bridge"),
        (("text",), "--dataset is missing"),
        (("all",), "--dataset is missing"),
        (("text", "--dataset", "toys"), "toys"),
        (("kv_cache", "--dataset", "toy"), "none of kv_cache can run on toy"),
        (("control:wrong_task", "--dataset", "toy"), "none of control:wrong_task can run on toy"),
        (("text", "--dataset", "toy", "--shots", "0"), "shots"),
        (("probe", "--dataset", "toy", "--pooling", "middle"), "middle"),
        (("probe", "--dataset", "toy", "--probe_layers", "9"), "layer 9"),
    ],
)
def test_what_cannot_run_is_one_line(words, line, baseline):
    code, _, err = baseline(*words, "--num_samples", "4", "--samples", "20")
    assert code == 2 and re.fullmatch(r"error: \S.*\n", err) and line in err
    assert not [*Path().rglob("results.json")]


def test_a_second_call_computes_nothing_and_other_shots_only_few_shots(baseline, computed):
    names = ("control:none", "text", "probe", "fewshot:receiver", "sender_label", "prompt_tuning")
    assert baseline(*names, *SHORT)[0] == 0
    assert computed == [name for name in lw.METHODS if name in names]
    results, rows = json.loads(Path("out/results.json").read_text()), Path("out/records.jsonl").read_bytes()
    computed.clear()
    assert baseline(*names, *SHORT)[0] == 0 and computed == []
    again = json.loads(Path("out/results.json").read_text())
    assert Path("out/records.jsonl").read_bytes() == rows
    assert again["methods"] == results["methods"] and again["details"] == results["details"]
    assert {*results["details"]} == {"probe", "prompt_tuning"}
    assert baseline(*names, *SHORT, "--shots", "9")[0] == 0 and computed == ["fewshot:receiver"]
    computed.clear()
    assert baseline(*names, *SHORT, "--fresh_eval")[0] == 0 and len(computed) == 6


def test_results_follow_from_the_records_and_the_table_from_the_results(baseline):
    code, out, _ = baseline("text", "probe", "kv_cache", "control:none", *SHORT)
    assert "kv_cache cannot run on toy" in out
    results, rows = json.loads(Path("out/results.json").read_text()), lw.read_rows(Path("out/records.jsonl"))
    assert code == 0 and (results["n"], results["dataset"], results["headline"]) == (24, "toy", "accuracy")
    for name, summary in results["methods"].items():
        own = [row for row in rows if row["method"] == name]
        assert len(own) == 24 and {row["key"] for row in own} == {results["provenance"]["record_keys"][name]}
        assert summary["accuracy"] == sum(row["correct"] for row in own) / 24
        assert all(row["correct"] == (lw.argmax(row["scores"]) == row["label"]) for row in own)
    best = max(results["methods"], key=lambda name: results["methods"][name]["accuracy"])
    assert results["verdict"] == f"best: {best}, accuracy {results['methods'][best]['accuracy']:.3f}"
    table = Path("out/table.md").read_text()
    probe = results["methods"]["probe"]
    low, high = (100 * x for x in probe["ci"])
    assert f"| linear probe on sender | {100 * probe['accuracy']:.1f} ({low:.1f}–{high:.1f}) |" in table
    assert "| toy, accuracy %, n 24 |" in table and "out/table.md" in out
    broken = {*results["gates"]}
    for name, summary in results["methods"].items():
        low, high = (100 * x for x in summary["ci"])
        assert (
            f"| {100 * summary['accuracy']:.1f} ({low:.1f}–{high:.1f}){' broken' if name in broken else ''} |" in table
        )


def test_a_kill_between_methods_keeps_the_rows(baseline, monkeypatch, computed):
    answers = lw.METHODS["probe"].answers

    def killed(self: Any, examples: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lw.METHODS["probe"], "answers", killed)
    assert baseline("text", "probe", *SHORT)[0] == 130
    assert Counter(row["method"] for row in lw.read_rows(Path("out/records.jsonl"))) == {"text": 24}
    monkeypatch.setattr(lw.METHODS["probe"], "answers", answers)
    computed.clear()
    assert baseline("text", "probe", *SHORT)[0] == 0 and computed == ["probe"]


def test_a_signal_stops_at_the_next_word_and_leaves_the_receiver_whole(toy, tmp_path):
    contest = asking(toy, rival_steps=4, batch_size=8)
    contest.home, contest.report, contest.signals = tmp_path, lw.Silent(), [15]
    with pytest.raises(lw.Interrupted):
        lw.run_methods(contest, {"text": "key"}, tmp_path)
    assert len(lw.read_rows(tmp_path / "records.jsonl")) == 8
    with pytest.raises(lw.Interrupted):
        lw.run_methods(contest, {"lora": "key"}, tmp_path)
    assert toy.setup.receiver.tuned == [] and toy.setup.receiver.lora == {}


CHOSEN = {
    "ceiling",
    "ceiling:reconstruction",
    "token_budget",
    "token_budget:tail",
    "token_budget:both",
    "extractive",
    "extractive:windows",
    "random_words",
}
COMPRESSORS = {"selective", "llmlingua", "longllmlingua", "llmlingua2"}
BUDGETS = {*CHOSEN, *COMPRESSORS, "extractive+prompt_tuning"}
PROMPTS = {"prompt_tuning", "control:prompt_tuning", "extractive+prompt_tuning"}
BRIDGES = {"same_model_bridge", "linear_bridge"}
SHOTS = {"fewshot:receiver", "fewshot:sender"}
PROBES = {"probe", "probe:receiver"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"shots": 7}, SHOTS),
        ({"rank": 3}, {"lora"}),
        ({"rival_steps": 9}, PROMPTS | BRIDGES | {"lora"}),
        ({"rival_lrs": [0.5]}, PROMPTS | {"lora"} | BRIDGES),
        ({"rival_batch": 3}, PROMPTS | {"lora"}),
        ({"pooling": ["last"]}, PROBES),
        ({"probe_layers": ["1"]}, PROBES),
        ({"soft_tokens": 5}, PROMPTS | BRIDGES | BUDGETS),
        ({"token_budget_k": 5}, BUDGETS),
        ({"budget_ratio": 5.0}, BUDGETS),
        ({"byte_budget": 5}, {"byte_budget", "extractive:bytes"}),
        ({"compressor": "tiny-gemma"}, COMPRESSORS),
        ({"llmlingua2_model": "there"}, {"llmlingua2"}),
        ({"wrong_task": Path("there")}, {"control:wrong_task"}),
        ({"seed": 7}, SHOTS | PROMPTS | BRIDGES | {"lora", "random_words"}),
        ({"batch_size": 3}, set()),
    ],
)
def test_a_changed_setting_computes_again_what_it_changes_and_nothing_else(change, wanted, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(lw, "compute_rows", lambda method, rows, size, save: save([
        {"id": e.id, "gold": [*e.answers], "label": e.label, "prediction": e.label, "correct": True} for e in rows
    ]))  # fmt: skip
    contexts = asking(toy), asking(toy, **change)
    before, after = (lw.record_keys(context, UNBRIDGED, "key") for context in contexts)
    for context, keys in zip(contexts, (before, after), strict=True):
        lw.run_methods(context, keys, tmp_path)
    assert {name for name in UNBRIDGED if before[name] != after[name]} == wanted
    rows = Counter(row["method"] for row in lw.read_rows(tmp_path / "records.jsonl"))
    assert {name for name, count in rows.items() if count == 2 * len(toy.examples)} == wanted


def test_later_seeds_run_what_a_seed_changes_and_data_sets_have_folders(baseline, data, computed):
    two = ("--datasets", f"toy,{data / 'here'},toy", "--seeds", "1,2,1")
    again = ["fewshot:receiver", "random_words"]
    code = baseline("text", "fewshot:receiver", "probe", "random_words", *two, *SHORT[2:])[0]
    assert code in (0, 1)
    own = re.sub(r"[^\w.-]+", "_", str(data / "here"))
    found = {
        str(path.parent.relative_to("out")): json.loads(path.read_text()) for path in Path("out").rglob("results.json")
    }
    assert {name: [*one["methods"]] for name, one in found.items()} == {
        "toy/seed1": ["text", "probe", *again], "toy/seed2": again,
        f"{own}/seed1": ["text", "probe", *again], f"{own}/seed2": again,
    }  # fmt: skip
    assert [found[f"toy/seed{seed}"]["provenance"]["seed_of_training"] for seed in (1, 2)] == [1, 2]
    assert [found[f"toy/seed{seed}"]["provenance"]["settings"]["seed"] for seed in (1, 2)] == [1, 2]
    texts = {row["gold"][0] for row in lw.read_rows(Path("out", own, "seed2", "records.jsonl"))}
    assert texts == {*COLOURS}
    table = Path("out/table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| fewshot:receiver"))
    names = sorted(("toy", own), key=lambda name: found[f"{name}/seed1"]["dataset"])
    for name, cell in zip(names, line.split(" | ")[1:], strict=True):
        values = torch.tensor(
            [100 * found[f"{name}/seed{s}"]["methods"]["fewshot:receiver"]["accuracy"] for s in (1, 2)]
        )
        low, high = (100 * x for x in found[f"{name}/seed1"]["methods"]["fewshot:receiver"]["ci"])
        apart = f"{values.mean():.1f} ± {values.std():.1f} (2)"  # seeds that agree show the interval of one
        assert cell.rstrip(" |").removesuffix(" broken") == (
            apart if values.std() else f"{values.mean():.1f} ({low:.1f}–{high:.1f})"
        )
    assert [computed.count(name) for name in ("text", *again)] == [2, 4, 4]


def test_the_table_has_a_gap_where_a_method_did_not_run(baseline):
    assert baseline("text", *SHORT)[0] == 0
    lines = Path("out/table.md").read_text().splitlines()
    facts = json.loads(Path("out/evaluation.json").read_text()) | {"dataset": "b"}
    facts["provenance"]["record_keys"] = {"probe": facts["provenance"]["record_keys"]["text"]}
    facts["order"] = ["probe"]
    other = Path("out/other")
    other.mkdir()
    (other / "evaluation.json").write_text(json.dumps(facts))
    rows = [lw.sealed(row | {"method": "probe"}) for row in lw.read_rows(Path("out/records.jsonl"))]
    (other / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns, left = lw.result_groups(lw.evaluations_below(Path("out")))
    told = lw.groups_table(columns).splitlines()
    mean = lines[2].split(" | ")[1].removesuffix(" |")
    assert not left and told[0] == "| method | b, accuracy %, n 24 | toy, accuracy %, n 24 |"
    assert told[2:4] == [f"| full text | – | {mean} |", f"| linear probe on sender | {mean} | – |"]


def test_a_laptop_takes_less_unless_it_is_told_otherwise():
    said: list[str] = []
    report = lw.Silent()
    report.say = said.append  # type: ignore[method-assign]
    sized = lw.sized(lw.BaselineSettings(device="cpu", samples=77), report)
    assert (sized.samples, sized.rival_tries, sized.relay_tokens) == (77, 2, 16)
    assert said == ["CPU: --rival_tries 2 --relay_tokens 16; other values win"]


# ---- beside a bridge -----------------------------------------------------------------------------------------------------


def test_rivals_run_beside_a_bridge(toy_run, tmp_path):
    results = lw.eval_main(["--checkpoint", str(toy_run), "--num_samples", "24", "--state_cache", "memory", "--methods",
                            "bridge,same_label,byte_budget,fewshot,token_budget,lora,control:prompt_tuning,zeroshot:sender",
                            "--rival_steps", "2", "--rival_tries", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    methods = results["methods"]
    assert {*methods} == {
        "bridge", "same_label", "byte_budget", "fewshot:receiver", "fewshot:sender", "token_budget", "lora",
        "control:prompt_tuning", "zeroshot:sender",
    }  # fmt: skip
    assert all(summary["errors"] == 0 for summary in methods.values())
    assert methods["same_label"]["accuracy"] > 0.9 < methods["bridge"]["accuracy"]
    assert results["best_control"] == "control:prompt_tuning" and not results["communication"]
    assert (
        results["verdict"].startswith("not tested: control:shuffled did not run")
        and "24 test rows" in results["verdict"]
    )
    assert {*results["details"]} == {"lora", "control:prompt_tuning"} and {*results["seconds"]} == {*methods}


@pytest.fixture(scope="module")
def shallow(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sender is read, and loaded, up to its embeddings only."""
    folder = tmp_path_factory.mktemp("shallow") / "run"
    lw.train_main([*FLAGS, "--dataset", str(data / "here"), "--steps", "1", "--width", "32", "--source_layer", "0",
                   "--output_dir", str(folder)])  # fmt: skip
    return folder


@pytest.mark.parametrize("layer", ["1", "2"])
def test_a_probe_of_a_layer_that_was_not_loaded_is_refused(layer, shallow, tmp_path):
    asked = ["--checkpoint", str(shallow), "--state_cache", "memory", "--methods", "probe", "--probe_layers", layer]
    with pytest.raises(lw.LatentWireError, match=rf"--probe_layers {layer}: .* up to 0"):
        lw.eval_main([*asked, "--output_dir", str(tmp_path)])


def test_a_bridge_of_another_task_reads_its_own_layers(shallow, toy_run, here):
    settings = lw.EvalSettings(checkpoint=shallow, state_cache="memory", wrong_task=toy_run)
    channel = lw.open_context(settings, lw.Checkpoint.open(shallow))
    method = lw.METHODS["control:wrong_task"](channel)
    answers = method.answers(channel.examples)
    whole = lw.METHODS["control:wrong_task"](asking(here, wrong_task=toy_run))
    wanted = {e.id: answer for e, answer in zip(here.examples, whole.answers(here.examples), strict=True)}
    assert method.inner.context.bridge.shape.layers > (0,) and channel.setup.sender.top == 0
    torch.testing.assert_close(scores(answers), scores([wanted[e.id] for e in channel.examples]), rtol=0, atol=1e-4)


def test_without_names_an_evaluation_runs_its_usual_methods(channel):
    names = lw.chosen_methods(channel.asked, channel.setup)
    assert names == ["bridge", "control:zero", "control:shuffled", "control:mean", "control:gaussian", "control:none",
                     "text", "probe"]  # fmt: skip


def test_beside_a_bridge_budgets_are_those_of_its_message(channel):
    example = channel.examples[0]
    long = replace(example, context="ab" * 2000)
    assert channel.token_budget(example) == channel.bridge.shape.settings.latent_len == channel.slots
    size = len(channel.messages[channel.position[example.id]])
    assert lw.METHODS["byte_budget"](channel).contexts([long]) == [long.context[:size]]
    assert channel.speaker is not channel.setup.sender or len(channel.setup.sender.blocks) == 2
    assert len(channel.speaker.blocks) == channel.speaker.n_layers
