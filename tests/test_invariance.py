"""§9 and §10: how a step is cut into micro-batches, or shared among processes, changes its gradient by rounding only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_bridges import ready, rows, stirred
from test_losses import LATENT, examples

import LATENTWIRE as lw

OWN = examples(
    (
        "a first text, which is longer",
        "short one",
        "Zoë's naïve café",
        "x",
        "a fifth text, the longest of all of them, by far",
    ),
    ("a cat", "b", "a dog in Rome", "b", "a cat"),
)
OFF = ["--answer_ce_weight", "0", "--k_token_ce_weight", "0", "--first_token_ce_weight", "0"]
HIDDEN = ["--sender", "tiny-llama", "--encoder", "hidden"]
TERMS: dict[str, list[str]] = {
    "the usual ones": [],
    "first token entropy": ["--first_token_entropy_weight", "1"],
    "autoscale": ["--first_token_autoscale", "--first_token_ce_weight", "1"],
    "kd": [*OFF, "--kd_weight", "1", "--kd_tau", "2"],
    "state_kd": [*OFF, "--state_kd_weight", "1"],
    "latent_align": [*OFF, "--latent_align_weight", "1", "--latent_align_metric", "both"],
    "latent_prefix_align": [*OFF, "--latent_prefix_align_weight", "1", "--latent_align_metric", "both"],
    "gist": [*OFF, "--use_gist_head", "--gist_weight", "1", "--gist_mask_prob", "0.4"],
    "reconstruction": [*OFF, "--reconstruction_weight", "1"],
    "continuation": [*OFF, "--continuation_weight", "1"],
    "contrast": [*OFF, "--contrast_weight", "1", "--contrast_margin", "9"],
    "manifold": [*OFF, "--manifold_weight", "1"],
    "scale": ["--scale_weight", "1"],
    "rms": [*OFF, "--rms_weight", "1"],
    "diversity": [*OFF, "--diversity_weight", "1"],
    "text step": ["--warmup_text_latent_steps", "9", "--text_align_weight", "1"],
    "dropout": [*HIDDEN, "--dropout", "0.3"],
    "latent dropout": ["--latent_keep_start", "0.5", "--latent_keep_end", "0.5", "--contrast_weight", "1"],
    "deep prefix dropout": ["--use_deep_prefix", "--deep_prefix_dropout", "0.4"],
    "lora dropout": [*HIDDEN, "--use_lora", "--lora_on", "both", "--lora_dropout", "0.4"],
    "lora dropout in a text step": [
        "--use_lora",
        "--lora_on",
        "receiver",
        "--lora_dropout",
        "0.4",
        "--warmup_text_latent_steps",
        "9",
    ],
}


def made(*flags: str, own: Sequence[lw.Example] = OWN) -> lw.Trainer:
    """A stirred bridge of ragged messages over question answering, five rows a step, about to train."""
    part = lw.QuestionAnswering(lw.TrainSettings(dataset="toy", protocol="question-agnostic"))
    one = stirred(ready(own, *LATENT, "--batch_size", str(len(own)), *flags, part=part), 0.02)
    one.bridge.train()
    return one


def gradient(one: lw.Trainer, size: int, processes: int = 1) -> tuple[dict[str, float], torch.Tensor]:
    """A step's logged values and gradient, ``size`` rows at a time, summed over pretended processes."""
    values: dict[str, float] = {}
    total: Any = 0
    for rank in range(processes):
        one.world = lw.World(rank, processes)
        for name, value in one.gradients(1, size).items():
            values[name] = values.get(name, 0.0) + value
        zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters]
        total = total + torch.cat([grad.flatten() for grad in zeros])
    return values, total


@pytest.mark.parametrize("term", TERMS)
def test_a_steps_gradient_is_the_same_however_its_rows_are_cut(term: str) -> None:
    """M5: contrast, diversity, manifold, text steps, gist, state_kd, latent_prefix_align, autoscale, LoRA's dropout."""
    one = made(*TERMS[term])
    wanted, whole = gradient(one, len(OWN))
    assert float(whole.norm()) > 0
    for size, processes in ((2, 1), (1, 1), (5, 2), (1, 3)):
        values, grads = gradient(one, size, processes)
        assert float((grads - whole).norm() / whole.norm()) < 1e-4, (size, processes)
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-6), (size, processes)


@pytest.mark.parametrize("term", [name for name in TERMS if "dropout" in name or name == "gist"])
def test_what_is_random_is_another_in_the_next_step(term: str) -> None:
    """M5: masks follow from a row's place in the stream, so that the same row is not always dropped alike."""
    one = made(*TERMS[term], own=OWN[:1] if term == "gist" else OWN[:2])
    found = [
        torch.cat([p.grad.flatten() for p in one.parameters if p.grad is not None])
        for step in (1, 3)
        if one.gradients(step, 1)
    ]
    assert not torch.allclose(*found)


@pytest.mark.trains
def test_the_size_seen_in_training_counts_steps_not_micro_batches() -> None:
    """M5: --calibration train_stats: one move a step, by the mean of all its rows."""
    found = []
    flags = [
        "--encoder",
        "hidden",
        "--sender",
        "tiny-llama",
        "--receiver",
        "tiny-qwen",
        "--calibration",
        "train_stats",
        "--batch_size",
        "5",
    ]
    for size in (5, 2, 1):
        one = stirred(ready(rows(["a", "bc", "def def", "ghij" * 5, "k"]), *flags))
        one.bridge.train()
        one.progress.micro = size
        for _ in range(3):
            one.step()
        found.append(float(one.bridge.ears[0].adapter.seen_rms))
        one.validate()
        assert float(one.bridge.ears[0].adapter.seen_rms) == found[-1]
    assert found[0] > 0 and found == pytest.approx([found[0]] * 3, rel=1e-4)


# ---- partners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["contrast", "diversity"])
@pytest.mark.parametrize("size", [6, 1])
def test_rows_are_compared_with_rows_of_another_answer_only(term: str, size: int) -> None:
    """M6: on SST-2 57 % of the partners shared the gold answer; the latents of an equal answer need not be worse.

    One text for each of two answers: whoever the partner is, what the term must be is known.
    """
    texts = {"a cat": "the one text", "b": "another text"}
    own = examples(
        [texts[answer] for answer in ("a cat", "a cat", "a cat", "b", "a cat", "a cat")],
        ["a cat"] * 3 + ["b"] + ["a cat"] * 2,
    )
    one = made(*TERMS[term], own=own)
    heard = {answer: one.hear([example]) for answer, example in (("a cat", own[0]), ("b", own[3]))}
    wanted = 0.0
    for example in own:
        mine, other = heard[example.answers[0]], heard["b" if example.answers[0] == "a cat" else "a cat"]
        if term == "diversity":
            cosine = torch.nn.functional.cosine_similarity
            wanted += float(cosine(mine.soft.embeds.flatten(1), other.soft.embeds.flatten(1))) / 6
        else:
            nats = [
                float(lw.supervise(mine.receiver, mine.answered(soft)).nats.mean()) for soft in (mine.soft, other.soft)
            ]
            wanted += max(0.0, 9 - (nats[1] - nats[0])) / 6
    assert heard["b"].soft.embeds.shape == heard["a cat"].soft.embeds.shape
    assert gradient(one, size)[0][f"loss_{term}"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("term", ["contrast", "diversity"])
def test_a_term_between_rows_alone_trains_one_row_at_a_time(term: str) -> None:
    """M6: RuntimeError: element 0 of tensors does not require grad."""
    one = made(*TERMS[term])
    values, grads = gradient(one, 1)
    assert abs(values["loss"]) > 0 and float(grads.norm()) > 0


@pytest.mark.parametrize("term", ["contrast", "diversity"])
def test_rows_that_all_have_one_answer_are_refused_in_one_line(term: str) -> None:
    """M6: there is nobody to compare with; told before any step."""
    own = examples(("one", "two"), ("same", "same"))
    with pytest.raises(lw.LatentWireError, match=term) as error:
        gradient(made(*TERMS[term], own=own), 1)
    assert "\n" not in str(error.value)


def test_own_latents_and_anothers_are_thinned_alike() -> None:
    """M6: latent dropout took slots from the own message only, which made it look worse than the other one.

    Two texts of equal latents and different answers: whichever slots are dropped, neither is better than the other.
    """
    own = examples(("the very same text", "the very same text"), ("b", "a cat"))
    flags = [
        "--latent_keep_start",
        "0.3",
        "--latent_keep_end",
        "0.3",
        "--contrast_weight",
        "1",
        "--contrast_margin",
        "2",
    ]
    values, _ = gradient(made(*OFF, *flags, own=own), 2)
    assert values["loss_contrast"] == pytest.approx(2.0, rel=1e-4)
