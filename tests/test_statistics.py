"""§4 STATISTICS against numbers computed another way, and by simulation: what a test must reject and must not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

import LATENTWIRE as lw

Z = 1.959963984540054  # the normal's 97.5 % point


# ---- Wilson ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962),
     (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718), (0, 20, 0.0, 0.1611)],
)  # fmt: skip
def test_wilson_known_values(right: int, n: int, low: float, high: float) -> None:
    """The last four are Newcombe's examples (1998, Statistics in Medicine 17, table I, method 3)."""
    assert lw.wilson_interval(right, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 7), (400, 872), (872, 872)])
def test_wilson_formula(right: int, n: int) -> None:
    share = right / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    assert lw.wilson_interval(right, n) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_wilson_other_confidence() -> None:
    narrow, wide = lw.wilson_interval(30, 100, 0.5), lw.wilson_interval(30, 100, 0.99)
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]


# ---- bootstrap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["accuracy", "f1"])
def test_bootstrap_covers_the_true_mean_19_times_in_20(kind: str) -> None:
    rng, n, draws = np.random.default_rng(3), 80, 200
    true = 0.7 if kind == "accuracy" else 0.5
    hits = 0
    for seed in range(draws):
        values = rng.random(n) < true if kind == "accuracy" else rng.beta(2, 2, n)
        low, high = lw.bootstrap_interval(values.astype(float).tolist(), seed, resamples=400)
        hits += low <= true <= high
    assert 0.89 <= hits / draws <= 0.985


def test_bootstrap_agrees_with_the_normal_interval_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    half = Z * values.std() / math.sqrt(len(values))
    assert lw.bootstrap_interval(values.tolist()) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.01
    )


def test_bootstrap_depends_on_its_seed_only() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    np.random.seed(1)
    first = lw.bootstrap_interval(values, 7, 200)
    np.random.seed(2)
    assert lw.bootstrap_interval(values, 7, 200) == first
    assert lw.bootstrap_interval(values, 8, 200) != first


@pytest.mark.parametrize(("value", "n"), [(1.0, 40), (0.0, 40), (1.0, 1), (0.0, 2)])
def test_bootstrap_of_all_right_or_all_wrong_is_wilsons(value: float, n: int) -> None:
    """Trap T9: never NaN, never of zero width."""
    low, high = lw.bootstrap_interval([value] * n)
    assert (low, high) == lw.wilson_interval(int(value * n), n)
    assert 0 <= low < high <= 1


def test_bootstrap_of_any_other_constant_is_that_constant() -> None:
    assert lw.bootstrap_interval([0.25] * 30) == (0.25, 0.25)


# ---- exact McNemar -----------------------------------------------------------------------------------------------


def pairs(only_a: int, only_b: int, both: int = 5, neither: int = 3) -> tuple[list[bool], list[bool]]:
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return a, b


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (10, 2), (2, 10), (0, 12), (7, 8), (30, 12)])
def test_mcnemar_is_a_sum_of_binomials(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    p = lw.mcnemar_exact(*pairs(only_a, only_b))
    assert p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert p == lw.mcnemar_exact(*pairs(only_a, only_b, both=50, neither=0))


def test_mcnemar_is_a_probability_and_symmetric() -> None:
    for only_a, only_b in itertools.product(range(12), repeat=2):
        p = lw.mcnemar_exact(*pairs(only_a, only_b))
        assert 0 < p <= 1
        assert p == pytest.approx(lw.mcnemar_exact(*pairs(only_b, only_a)))


def test_mcnemar_rejects_a_huge_effect() -> None:
    assert lw.mcnemar_exact([True] * 100, [False] * 100) < 1e-20


def rejected(p_values: Sequence[float]) -> float:
    return sum(p < 0.05 for p in p_values) / len(p_values)


def test_mcnemar_keeps_the_null_95_times_in_100() -> None:
    rng = np.random.default_rng(11)
    found = []
    for _ in range(400):
        hard = rng.random(200)  # both methods find the same examples hard
        a, b = rng.random(200) < hard, rng.random(200) < hard
        found.append(lw.mcnemar_exact(a.tolist(), b.tolist()))
    assert 0.01 <= rejected(found) <= 0.07


def test_mcnemar_finds_a_real_difference() -> None:
    rng = np.random.default_rng(12)
    found = [lw.mcnemar_exact((rng.random(200) < 0.8).tolist(), (rng.random(200) < 0.6).tolist()) for _ in range(50)]
    assert rejected(found) > 0.9


def test_mcnemar_wants_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        lw.mcnemar_exact([True, False], [True])


# ---- paired permutation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [([3.0, 1.0, 4.0, 1.5, 5.0], [2.0, 1.5, 3.0, 1.0, 2.0]), ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), ([0.2, 0.4], [0.4, 0.2]),
     ([0.1, 0.9, 0.5, 0.5, 0.7, 0.2, 1.0], [0.0, 0.3, 0.6, 0.5, 0.1, 0.2, 0.4])],
)  # fmt: skip
def test_permutation_of_few_pairs_counts_every_sign_flip(a: list[float], b: list[float]) -> None:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in
            itertools.product((1, -1), repeat=len(a))]  # fmt: skip
    extreme = sum(abs(s) >= abs(sum(differences)) - 1e-12 for s in sums)
    assert lw.paired_permutation(a, b) == pytest.approx(extreme / len(sums))


def test_permutation_of_equal_scores_is_one() -> None:
    assert lw.paired_permutation([0.5, 0.25, 1.0] * 10, [0.5, 0.25, 1.0] * 10) == 1.0


def test_permutation_depends_on_its_seed_only() -> None:
    a, b = np.random.default_rng(0).random((2, 60)).tolist()
    np.random.seed(1)
    first = lw.paired_permutation(a, b, 7, 299)
    np.random.seed(2)
    assert lw.paired_permutation(a, b, 7, 299) == first


def test_permutation_rejects_a_huge_effect() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(5, 1, 100), rng.normal(0, 1, 100)
    assert lw.paired_permutation(a.tolist(), b.tolist()) <= 2 / 10_000 + 1e-9


def test_permutation_keeps_the_null_95_times_in_100() -> None:
    rng = np.random.default_rng(13)
    found = []
    for seed in range(300):
        hard = rng.random(40)
        a, b = hard * rng.random(40), hard * rng.random(40)
        found.append(lw.paired_permutation(a.tolist(), b.tolist(), seed, resamples=199))
    assert all(0 < p <= 1 for p in found)
    assert 0.02 <= rejected(found) <= 0.085


def test_permutation_finds_a_real_difference() -> None:
    rng = np.random.default_rng(14)
    draws = [(rng.normal(0.6, 0.3, 80), rng.normal(0.4, 0.3, 80)) for _ in range(30)]
    found = [lw.paired_permutation(a.tolist(), b.tolist(), seed, 199) for seed, (a, b) in enumerate(draws)]
    assert rejected(found) > 0.9


def test_permutation_wants_pairs() -> None:
    """Two lists of different length are a mistake; numpy would stretch one of them."""
    with pytest.raises(ValueError, match=r".+"):
        lw.paired_permutation([0.1, 0.2, 0.3], [0.1])


# ---- the best constant answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "gold"), [(14, [0] * 10 + [1] * 10), (13, [0] * 5 + [1] * 15), (20, [2, 1] * 10)])
def test_beats_constant_is_a_binomial_tail_at_the_majoritys_share(right: int, gold: list[int]) -> None:
    n, share = len(gold), max(gold.count(value) for value in set(gold)) / len(gold)
    tail = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(right, n + 1))
    assert lw.beats_constant([True] * right + [False] * (n - right), gold) == pytest.approx(tail)


def test_the_majority_answer_does_not_beat_itself() -> None:
    gold = [0] * 70 + [1] * 30
    assert lw.beats_constant([label == 0 for label in gold], gold) > 0.4
    assert lw.beats_constant([True] * 95 + [False] * 5, gold) < 1e-6


def test_one_class_only_cannot_be_beaten() -> None:
    assert lw.beats_constant([True] * 20, [1] * 20) == 1.0
