"""§12: what a receiver can read from K positions at best, learned for each text by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_baselines import PAIR, SMALL

import LATENTWIRE as lw

TEXTS = {name: f"{name} has a {pet} and lives in {town}." for name, pet, town in
         [("Ada", "cat", "Rome"), ("Ben", "dog", "Oslo"), ("Cleo", "fish", "Lima"), ("Dan", "bird", "Bern")]}  # fmt: skip


def rows_of(name: str, text: str) -> list[dict[str, str]]:
    _, _, _, pet, *_, town = text.rstrip(".").split()
    asked = [("What pet?", pet), ("Which town?", town), ("Who?", name)]
    return [{"context": text, "question": question, "answer": answer} for question, answer in asked]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> lw.EvalContext:
    """Every text has three questions, of which the receiver is told."""
    folder = tmp_path_factory.mktemp("ceiling")
    rows = [row for name, text in TEXTS.items() for row in rows_of(name, text)]
    more = [row for i in range(8) for row in rows_of(f"Eve{i}", f"Eve{i} has a cow{i} and lives in Bonn{i}.")]
    for split, some in (("train", more), ("test", rows)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    words = {
        **SMALL,
        **PAIR,
        "dataset": str(folder),
        "protocol": "question-shared",
        "soft_tokens": 6,
        "ceiling_steps": 25,
    }
    settings = lw.BaselineSettings(**{**words, "num_samples": None})
    return lw.context_of(settings, str(folder), settings.seed)


def asking(context: lw.EvalContext, **asked: object) -> lw.EvalContext:
    return lw.EvalContext(context.setup, context.settings, context.asked.model_copy(update=asked), context.receiver)


def test_no_latent_learns_from_its_own_question(shared):
    method = lw.METHODS["ceiling"](shared)
    for example in shared.examples:
        learned = method.others(example)
        assert learned and all(row.context == example.context and row.question != example.question for row in learned)
        assert {row.question for row in learned} | {example.question} == {"What pet?", "Which town?", "Who?"}


@pytest.mark.parametrize("name", ["ceiling", "ceiling:reconstruction"])
def test_what_is_learned_lowers_its_objective_text_by_text(name, shared):
    method, some = lw.METHODS[name](shared), shared.examples[:3]
    start, mask = method.start(some)
    soft = method.learned(some)
    with torch.no_grad():
        before, after = (float(method.loss(latents, mask, some)) for latents in (start, soft.embeds))
        alone = [float(method.loss(soft.embeds[i : i + 1], mask[i : i + 1], some[i : i + 1])) for i in range(3)]
    assert after < before - 0.3 and after == pytest.approx(sum(alone), rel=1e-3)
    torch.testing.assert_close(method.learned(some[1:2]).embeds[0], soft.embeds[1], rtol=1e-3, atol=1e-3)


def test_it_begins_as_means_of_the_texts_own_embeddings(shared):
    context = asking(shared, ceiling_steps=0)
    method, example = lw.METHODS["ceiling"](context), context.examples[0]
    lm = context.receiver.lm
    embeds = lm.embed(torch.tensor(lm.ids(example.context))).float()
    index = torch.arange(len(embeds)) * 6 // len(embeds)
    wanted = torch.stack([embeds[index == k].mean(0) for k in range(6)])
    torch.testing.assert_close(method.learned([example]).embeds[0], wanted, rtol=1e-4, atol=1e-5)
    (answer,) = method.answers([example])
    assert answer.tokens == 6 and answer.nbytes == 0


def test_a_text_with_one_question_is_refused(shared):
    method = lw.METHODS["ceiling"](shared)
    lonely = lw.Example("x", "Nobody asked about this.", "What?", ("it",))
    method.told  # noqa: B018  read before the row is added
    method.told[lonely.context] = [lonely]
    with pytest.raises(lw.LatentWireError, match="no other question about the text of 'x'"):
        method.answers([lonely])


def test_it_runs_where_the_receiver_is_asked(shared, tmp_path: Path):
    named = shared.asked.model_copy(update={"methods": ["ceiling"]})
    assert lw.chosen_methods(named, shared.setup) == ["ceiling"]
    aware = lw.SQuAD(lw.TrainSettings(dataset="squad"))
    setup = lw.Setup(shared.setup.sender, shared.setup.receiver, aware, shared.setup.splits, "here")
    assert lw.chosen_methods(named, setup) == []
