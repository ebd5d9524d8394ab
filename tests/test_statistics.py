"""§4 STATISTICS against numbers computed another way, and by simulation: what a test must reject and must not."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

import LATENTWIRE as lw

Z = 1.959963984540054  # the normal's 97.5 % point

Draw = Callable[[np.random.Generator], Any]


def rejected(p_values: Sequence[float]) -> float:
    return sum(p <= 0.05 for p in p_values) / len(p_values)


def in_clusters(rng: np.random.Generator, count: int, size: int, spread: float) -> np.ndarray:
    """Noise of ``count`` × ``size`` rows, of which the rows of a cluster share ``spread``."""
    return np.repeat(rng.normal(0, spread, count), size) + rng.normal(0, 1, count * size)


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


def rounded_beta(a: float, b: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Values 0, 1/steps, .. 1 and the share of a beta variable that is rounded to each."""
    edges = np.clip((np.arange(steps + 2) - 0.5) / steps, 0, 1)
    return np.arange(steps + 1) / steps, np.diff(stats.beta.cdf(edges, a, b))


def accuracy_scores(rng: np.random.Generator) -> tuple[np.ndarray, float, None]:
    return (rng.random(300) < 0.8).astype(float), 0.8, None


def f1_scores(rng: np.random.Generator) -> tuple[np.ndarray, float, None]:
    values, shares = rounded_beta(2, 5, 20)
    return rng.choice(values, 300, p=shares), float(values @ shares), None


def skewed_scores(rng: np.random.Generator) -> tuple[np.ndarray, float, None]:
    return rng.beta(0.5, 5, 100), 1 / 11, None


CONTEXTS = np.repeat(np.arange(100), 4).tolist()


def scores_of_shared_contexts(rng: np.random.Generator) -> tuple[np.ndarray, float, list[int]]:
    """Four questions on each of a hundred contexts, 70 % right; contexts are of very different difficulty."""
    point = stats.norm.ppf(0.7) * math.sqrt(1 + 1.5**2)
    return (in_clusters(rng, 100, 4, 1.5) < point).astype(float), 0.7, CONTEXTS


def coverage(draw: Draw, draws: int, method: str = "percentile", clustered: bool = True) -> float:
    rng, hits = np.random.default_rng(21), 0
    for seed in range(draws):
        values, true, clusters = draw(rng)
        low, high = lw.bootstrap_interval(values.tolist(), seed, 500, method, clusters if clustered else None)
        hits += low <= true <= high
    return hits / draws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "method"),
    [(accuracy_scores, "percentile"), (f1_scores, "percentile"), (scores_of_shared_contexts, "percentile"),
     (skewed_scores, "bca"), (scores_of_shared_contexts, "bca")],
)  # fmt: skip
def test_bootstrap_covers_the_true_mean_95_times_in_100(draw: Draw, method: str) -> None:
    """2,000 data sets of 300 (right/wrong, F1), 100 (skewed) or 100 × 4 (clustered) scores."""
    assert coverage(draw, 2000, method) == pytest.approx(0.95, abs=0.015)


def test_without_clusters_the_bootstrap_is_too_sure() -> None:
    """300 data sets of 100 × 4 scores: the same scores as above, the clusters not told."""
    assert coverage(scores_of_shared_contexts, 300, clustered=False) < 0.87


@pytest.mark.parametrize("kind", ["right/wrong", "F1", "continuous"])
def test_bootstrap_by_counts_is_scipys(kind: str) -> None:
    rng = np.random.default_rng(4)
    values = {"right/wrong": (rng.random(90) < 0.7).astype(float), "F1": rng.integers(0, 9, 90) / 8,
              "continuous": rng.gamma(1, 1, 90)}[kind]  # fmt: skip
    found = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    error = 0.06 * values.std() / math.sqrt(len(values))  # of a quantile of 20,000 draws: sd 0.019 standard errors
    assert lw.bootstrap_interval(values.tolist(), 2, 20_000) == pytest.approx(tuple(found), abs=error)


def test_bootstrap_of_clusters_draws_whole_clusters() -> None:
    """Rows of 12 drawn clusters put together, again and again, as the definition says."""
    rng = np.random.default_rng(5)
    names = rng.integers(0, 12, 60).tolist()
    values = (np.array(names) % 4 + rng.integers(0, 9, 60)) / 11
    rows = [values[np.array(names) == name] for name in sorted(set(names))]
    draws = [np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]).mean() for _ in range(8000)]
    want = np.quantile(draws, [0.025, 0.975])
    assert lw.bootstrap_interval(values.tolist(), 2, 20_000, clusters=names) == pytest.approx(tuple(want), abs=0.006)
    alone = lw.bootstrap_interval(values.tolist(), 2, 20_000)
    assert want[1] - want[0] > 1.2 * (alone[1] - alone[0])


@pytest.mark.parametrize("clustered", [False, True])
def test_bca_is_efrons(clustered: bool) -> None:
    """Efron 1987: bias from the draws, acceleration from the jackknife; here over clusters of very different size."""
    rng = np.random.default_rng(6)
    values = rng.gamma(0.5, 1, 40)
    names = np.sort(rng.integers(0, 4, 40) ** 2 + rng.integers(0, 9, 40)) if clustered else np.arange(40)
    values[names == names.max()] += 1
    rows = [values[names == name] for name in sorted(set(names.tolist()))]
    m = len(rows)
    picks = np.random.default_rng(7).integers(0, m, (20_000, m))
    sums, sizes = np.array([row.sum() for row in rows]), np.array([len(row) for row in rows])
    draws = sums[picks].sum(1) / sizes[picks].sum(1)
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    away = without.mean() - without
    bias = stats.norm.ppf((draws < values.mean()).mean())
    pull = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    levels = [stats.norm.cdf(bias + (bias + z) / (1 - pull * (bias + z))) for z in (-Z, Z)]
    error, clusters = 0.1 * draws.std(), names.tolist() if clustered else None
    found = lw.bootstrap_interval(values.tolist(), 8, 20_000, "bca", clusters)
    assert found == pytest.approx(tuple(np.quantile(draws, levels)), abs=error)
    assert found[1] > lw.bootstrap_interval(values.tolist(), 8, 20_000, clusters=clusters)[1] + 2 * error


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


def test_mcnemar_finds_a_real_difference() -> None:
    rng = np.random.default_rng(12)
    found = [lw.mcnemar_exact((rng.random(200) < 0.8).tolist(), (rng.random(200) < 0.6).tolist()) for _ in range(50)]
    assert rejected(found) > 0.9


def test_mcnemar_wants_pairs() -> None:
    with pytest.raises(lw.LatentWireError, match="2 and 1 were given"):
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


def test_permutation_finds_a_real_difference() -> None:
    rng = np.random.default_rng(14)
    draws = [(rng.normal(0.6, 0.3, 80), rng.normal(0.4, 0.3, 80)) for _ in range(30)]
    found = [lw.paired_permutation(a.tolist(), b.tolist(), seed, 199) for seed, (a, b) in enumerate(draws)]
    assert rejected(found) > 0.9


def test_permutation_wants_pairs() -> None:
    """Two lists of different length are a mistake; numpy would stretch one of them."""
    with pytest.raises(lw.LatentWireError, match="3 and 1 were given"):
        lw.paired_permutation([0.1, 0.2, 0.3], [0.1])


def exact_flips(differences: Sequence[int]) -> float:
    """Two-sided p of all 2^n sign flips of whole numbers, by adding up one distribution at a time."""
    ways = {0: 1}
    for difference in map(int, differences):
        grown: dict[int, int] = {}
        for total, count in ways.items():
            for signed in (total + difference, total - difference):
                grown[signed] = grown.get(signed, 0) + count
        ways = grown
    return sum(count for total, count in ways.items() if abs(total) >= abs(sum(differences))) / sum(ways.values())


@pytest.mark.parametrize(("n", "largest", "lift"), [(14, 9, 1), (40, 3, 0), (40, 3, 1), (60, 1, 0), (400, 4, 0)])
def test_sampled_flips_are_the_lottery_of_all_flips(n: int, largest: int, lift: int) -> None:
    differences = np.random.default_rng(n + lift).integers(-largest, largest + 1, n) + lift
    exact = exact_flips(differences)
    found = lw.paired_permutation((differences / 8).tolist(), [0.0] * n, 3, 9_999)
    assert found == pytest.approx(exact, abs=6 * math.sqrt(exact * (1 - exact) / 10_000) + 2e-4)


def test_sampled_flips_of_right_and_wrong_are_mcnemars() -> None:
    a, b = pairs(31, 16, both=100)
    exact = lw.mcnemar_exact(a, b)
    assert lw.paired_permutation(a, b, 1) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


@pytest.mark.parametrize("n", [63, 64, 200])
def test_permutation_of_many_pairs_depends_on_its_seed_too(n: int) -> None:
    a, b = np.random.default_rng(0).random((2, n)).tolist()
    assert len({lw.paired_permutation(a, b, 7, 299) for _ in range(5)}) == 1


@pytest.mark.parametrize("n", [1, 30])
def test_permutation_of_one_differing_pair_is_one(n: int) -> None:
    assert lw.paired_permutation([1.0] + [0.5] * (n - 1), [0.0] + [0.5] * (n - 1)) == 1.0


def test_permutation_of_scores_that_are_no_numbers_is_no_finding() -> None:
    with contextlib.suppress(lw.LatentWireError):  # a refusal is as good
        assert not lw.paired_permutation([math.nan] + [0.5] * 29, [0.25] * 30) < 0.05


# ---- what a test must and must not reject ------------------------------------------------------------------------


def paired_scores(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Continuous scores of 50 examples, some of them hard for both methods."""
    hard = rng.random(50)
    return hard * rng.random(50), hard * rng.random(50)


def paired_steps(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same in quarters: full of ties and of pairs without difference."""
    a, b = paired_scores(rng)
    return np.round(4 * a) / 4, np.round(4 * b) / 4


def paired_answers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong on 200 examples, some of them hard for both methods."""
    hard = rng.random(200)
    return rng.random(200) < hard, rng.random(200) < hard


def p_values_of(test: Callable[..., float], draw: Draw, draws: int, *rest: Any) -> list[float]:
    rng, found = np.random.default_rng(31), []
    for seed in range(draws):
        a, b = draw(rng)
        found.append(test(a.tolist(), b.tolist(), *((seed, 499, *rest) if test is lw.paired_permutation else ())))
    assert all(0 < p <= 1 for p in found)
    return found


@pytest.mark.parametrize("test", [lw.paired_permutation, lw.paired_t])
def test_the_null_is_rejected_5_times_in_100(test: Callable[..., float]) -> None:
    """2,000 data sets of 50 pairs."""
    assert rejected(p_values_of(test, paired_scores, 2000)) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("test", "draw"),
    [(lw.mcnemar_exact, paired_answers), (lw.wilcoxon_p, paired_steps), (lw.paired_permutation, paired_steps)],
)
def test_tests_of_few_values_do_not_reject_the_null_too_often(test: Callable[..., float], draw: Draw) -> None:
    """2,000 data sets of 200 right/wrong pairs or of 50 pairs in quarters."""
    assert 0.02 <= rejected(p_values_of(test, draw, 2000)) <= 0.065


TWELVE = np.repeat(np.arange(12), 5).tolist()


def paired_in_clusters(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Twelve contexts of five questions; which method is better is mostly a matter of the context."""
    return in_clusters(rng, 12, 5, 2.0), rng.normal(0, 0.5, 60)


def test_whole_clusters_flip_together_or_the_null_is_rejected_too_often() -> None:
    """2,000 data sets of 12 × 5 pairs (500 for the wrong way, which forgets the clusters)."""
    told = p_values_of(lw.paired_permutation, paired_in_clusters, 2000, TWELVE)
    assert rejected(told) == pytest.approx(0.05, abs=0.015)
    assert rejected(p_values_of(lw.paired_permutation, paired_in_clusters, 500)) > 0.25


TESTS = [lw.paired_permutation, lw.paired_t, lw.wilcoxon_p]


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("n", [60, 200])
def test_every_test_finds_a_huge_difference_without_spread(test: Callable[..., float], n: int) -> None:
    """0.50 ± 0.004; with 200 examples an earlier paired bootstrap, which did not centre its null, gave p = 0.5."""
    rng = np.random.default_rng(1)
    base = rng.random(n) / 2
    ahead = base + rng.normal(0.5, 0.004, n)
    assert test(ahead.tolist(), base.tolist()) < 3e-4
    assert test(base.tolist(), ahead.tolist()) < 3e-4


def test_everything_agrees_on_a_huge_difference() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(200) / 2
    ahead = base + rng.normal(0.5, 0.004, 200)
    found = lw.battery(ahead.tolist(), base.tolist(), resamples=1000)
    assert found["difference"] == pytest.approx(0.5, abs=0.001)
    assert 0.498 < found["ci"][0] < found["ci"][1] < 0.502
    assert max(found[name] for name in ("p", "p_permutation", "p_t", "p_wilcoxon")) < 0.003
    assert found["cohens_d"] > 100
    low, high, p = lw.crossed_interval(np.stack([ahead - base] * 3, 1) + rng.normal(0, 0.001, (200, 3)))
    assert 0.49 < low < high < 0.51 and p < 1e-4


def test_every_test_finds_that_one_is_always_right() -> None:
    a, b = [1.0] * 200, [1.0, 0.0] * 100
    assert max(test(a, b) for test in TESTS) < 3e-4
    assert lw.mcnemar_exact([True] * 200, [True, False] * 100) == pytest.approx(2 / 2**100)


@pytest.mark.parametrize("test", TESTS)
def test_two_sided_tests_do_not_mind_who_is_first(test: Callable[..., float]) -> None:
    a, b = np.random.default_rng(3).random((2, 40)).tolist()
    assert test(a, b) == pytest.approx(test(b, a))
    assert test(a, a) == 1.0


# ---- paired t, Wilcoxon, effect sizes ----------------------------------------------------------------------------


def signed_ranks(differences: Sequence[float]) -> float:
    """Wilcoxon's exact two-sided p: the share of all sign patterns whose sum of ranks is as far out."""
    left = [d for d in differences if d]
    ranks = stats.rankdata([abs(d) for d in left])
    return exact_flips([int(2 * r if d > 0 else -2 * r) for r, d in zip(ranks, left, strict=True)])


def t_of(differences: Sequence[float]) -> float:
    n, mean = len(differences), sum(differences) / len(differences)
    return mean / math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)


@pytest.mark.parametrize("n", [5, 20, 45])
def test_t_and_wilcoxon_are_their_definitions(n: int) -> None:
    a, b = np.random.default_rng(n).normal(0.3, 1, (2, n)).tolist()
    differences = [x - y for x, y in zip(a, b, strict=True)]
    tail, _ = integrate.quad(lambda x: stats.t.pdf(x, n - 1), abs(t_of(differences)), math.inf)
    assert lw.paired_t(a, b) == pytest.approx(2 * tail, rel=1e-5)
    assert lw.wilcoxon_p(a, b) == pytest.approx(signed_ranks(differences), rel=1e-9)


@pytest.mark.parametrize("n", [20, 200])
def test_paired_t_and_mcnemar_are_statsmodels(n: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.weightstats import DescrStatsW

    rng = np.random.default_rng(n)
    a, b = rng.normal(0.1, 1, (2, n))
    assert lw.paired_t(a.tolist(), b.tolist()) == pytest.approx(DescrStatsW(a - b).ttest_mean()[1])
    table = [[5, 17 * n // 200], [31 * n // 200, 9]]
    assert lw.mcnemar_exact(*pairs(table[1][0], table[0][1])) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_t_of_a_difference_without_spread() -> None:
    assert lw.paired_t([0.5] * 9, [0.25] * 9) == 0.0
    assert lw.paired_t([0.5] * 9, [0.5] * 9) == 1.0


def test_t_of_one_pair_finds_nothing() -> None:
    assert lw.paired_t([1.0], [0.0]) == 1.0


def test_wilcoxon_leaves_equal_pairs_out() -> None:
    a, b = np.random.default_rng(5).normal(0.3, 1, (2, 6)).tolist()
    assert lw.wilcoxon_p([*a, 0.5, 0.5], [*b, 0.5, 0.5]) == lw.wilcoxon_p(a, b)


@pytest.mark.parametrize("n", [14, 20])
def test_wilcoxon_stays_exact_with_equal_pairs(n: int) -> None:
    a, b = np.random.default_rng(n).normal(0.3, 1, (2, n)).tolist()
    assert lw.wilcoxon_p([*a, 0.5], [*b, 0.5]) == pytest.approx(lw.wilcoxon_p(a, b))


def test_wilcoxon_sees_ties_of_decimal_scores() -> None:
    a, b = [3, 2, 4, 9, 8, 5], [2, 1, 3, 7, 9, 4]
    assert lw.wilcoxon_p(a, b) == pytest.approx(signed_ranks([x - y for x, y in zip(a, b, strict=True)]))
    assert lw.wilcoxon_p([x / 10 for x in a], [y / 10 for y in b]) == lw.wilcoxon_p(a, b)


def test_effect_size_is_t_over_root_n() -> None:
    a, b = np.random.default_rng(1).normal(0.2, 1, (2, 37)).tolist()
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert lw.cohens_d(a, b) == pytest.approx(t_of(differences) / math.sqrt(37))
    assert lw.cohens_d(b, a) == pytest.approx(-lw.cohens_d(a, b))


@pytest.mark.parametrize(("freedom", "factor"), [(2, 0.5642), (3, 0.7236), (4, 0.7979), (10, 0.9228), (40, 0.9811)])
def test_hedges_factor(freedom: int, factor: float) -> None:
    """Hedges' (1981) exact factor; 0.5642 = 1/√π and 0.7979 = √(2/π)."""
    a, b = np.random.default_rng(freedom).normal(1, 1, (2, freedom + 1)).tolist()
    assert lw.hedges_g(a, b) / lw.cohens_d(a, b) == pytest.approx(factor, abs=6e-5)
    assert factor == pytest.approx(1 - 3 / (4 * freedom - 1), abs=0.01)  # his approximation


def test_hedges_g_has_no_bias_where_cohens_d_has() -> None:
    """4,000 data sets of 8 pairs, true effect 0.8: standard error of the mean 0.007."""
    rng = np.random.default_rng(8)
    draws = [(rng.normal(0.8, 1, 8).tolist(), [0.0] * 8) for _ in range(4000)]
    assert np.mean([lw.hedges_g(a, b) for a, b in draws]) == pytest.approx(0.8, abs=0.021)
    assert np.mean([lw.cohens_d(a, b) for a, b in draws]) > 0.87


@pytest.mark.parametrize(("a", "b"), [([0.5] * 9, [0.25] * 9), ([0.5] * 9, [0.5] * 9), ([1.0], [0.0])])
def test_no_spread_no_effect_size(a: list[float], b: list[float]) -> None:
    assert lw.cohens_d(a, b) is None and lw.hedges_g(a, b) is None


# ---- published examples ------------------------------------------------------------------------------------------

SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
ZEA_MAYS = (
    [23.5, 12, 21, 22, 19.125, 21.5, 22.125, 20.375, 18.25, 21.625, 23.25, 21, 22.125, 23, 12],
    [17.375, 20.375, 20, 20, 18.375, 18.625, 18.625, 15.25, 16.5, 18, 16.25, 18, 12.75, 15.5, 18],
)


def test_students_sleep() -> None:
    """Student 1908, R's ``sleep``: t = -4.0621, p = 0.002833, d = t / √10; all nine differences have one sign."""
    assert lw.paired_t(*SLEEP) == pytest.approx(0.002833, abs=5e-7)
    assert lw.cohens_d(*SLEEP) == pytest.approx(-4.0621 / math.sqrt(10), abs=2e-5)
    assert lw.wilcoxon_p(*SLEEP) == pytest.approx(2 / 2**9)
    assert lw.paired_permutation(*SLEEP) == pytest.approx(2 / 2**9)


def test_darwins_maize() -> None:
    """Fisher 1935, The Design of Experiments, §17 and §21: t = 2.148, p 0.0497; 2 × 863 of 2^15 flips reach 314 eighths."""
    eighths = [round(8 * (x - y)) for x, y in zip(*ZEA_MAYS, strict=True)]
    assert sum(eighths) == 314 and t_of(eighths) == pytest.approx(2.148, abs=5e-4)
    assert lw.paired_t(*ZEA_MAYS) == pytest.approx(0.0497, abs=5e-5)
    assert lw.paired_permutation(*ZEA_MAYS, resamples=2**15) == pytest.approx(2 * 863 / 2**15)
    assert lw.paired_permutation(*ZEA_MAYS) == pytest.approx(0.0527, abs=0.009)  # 9,999 of them
    assert lw.wilcoxon_p(*ZEA_MAYS) == pytest.approx(signed_ranks(eighths), rel=1e-9)


def test_agrestis_approval_ratings() -> None:
    """Agresti 1990, p. 350, R's ``mcnemar.test``: 1,600 people asked twice; 150 left the president, 86 came to him."""
    p = lw.mcnemar_exact(*pairs(150, 86, both=794, neither=570))
    assert p == pytest.approx(2 * sum(math.comb(236, k) for k in range(87)) / 2**236, rel=1e-9)
    assert p == pytest.approx(float(stats.chi2.sf((abs(150 - 86) - 1) ** 2 / 236, 1)), rel=0.15)  # R's, corrected


THROMBOLYSIS = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
                0.7590, 1.0000]  # fmt: skip


@pytest.mark.parametrize(("how", "found"), [("bonferroni", 3), ("holm", 3), ("fdr_bh", 4), ("bh", 4), ("none", 9)])
def test_thrombolysis_of_benjamini_and_hochberg(how: str, found: int) -> None:
    """Benjamini and Hochberg 1995, §3.2: at 0.05 Bonferroni rejects three of fifteen hypotheses, theirs four."""
    assert sum(p <= 0.05 for p in lw.corrected(THROMBOLYSIS, how)) == found


@pytest.mark.parametrize(
    ("how", "want"),
    [("holm", [0.03, 0.06, 0.06, 0.02]), ("bonferroni", [0.04, 0.16, 0.12, 0.02]), ("fdr_bh", [0.02, 0.04, 0.04, 0.02]),
     ("fdr_by", [x * 25 / 12 for x in (0.02, 0.04, 0.04, 0.02)]), ("none", [0.01, 0.04, 0.03, 0.005])],
)  # fmt: skip
def test_corrections_by_hand(how: str, want: list[float]) -> None:
    """Four p-values, of which Holm (1979) rejects two at 0.05; 25/12 = 1 + 1/2 + 1/3 + 1/4 (Benjamini, Yekutieli 2001)."""
    assert lw.corrected([0.01, 0.04, 0.03, 0.005], how) == pytest.approx(want)


# ---- corrections -------------------------------------------------------------------------------------------------


def p_adjust(p: Sequence[float], how: str) -> list[float]:
    """What R's p.adjust does: running maxima from the smallest (Holm), running minima from the largest (BH, BY)."""
    n, order = len(p), sorted(range(len(p)), key=lambda i: p[i])
    ranked = [p[i] for i in order]
    if how == "bonferroni":
        done = [n * x for x in ranked]
    elif how == "holm":
        done = list(itertools.accumulate(((n - i) * x for i, x in enumerate(ranked)), max))
    else:
        much = sum(1 / k for k in range(1, n + 1)) if how in ("by", "fdr_by") else 1
        done = [*itertools.accumulate((much * n / (i + 1) * ranked[i] for i in reversed(range(n))), min)][::-1]
    return [min(1.0, done[order.index(i)]) for i in range(n)]


@pytest.mark.parametrize("how", [*lw.CORRECTIONS])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_corrections_are_rs_p_adjust(how: str, n: int) -> None:
    p_values = (np.random.default_rng(n).random(n) ** 3).round(3).tolist()  # ties among them
    assert lw.corrected(p_values, how) == pytest.approx(p_adjust(p_values, how))
    if how in ("bh", "by"):
        assert lw.corrected(p_values, how) == pytest.approx(
            stats.false_discovery_control(p_values, method=how).tolist()
        )


def test_corrections_of_nothing_and_of_none() -> None:
    assert lw.corrected([]) == [] and lw.corrected([], "none") == []
    assert lw.corrected([0.3, 0.01], "none") == [0.3, 0.01]


@pytest.mark.parametrize(("wrong", "right"), [("hlom", "holm"), ("fdrbh", "fdr_bh"), ("bonferoni", "bonferroni")])
def test_an_unknown_correction_is_refused_with_advice(wrong: str, right: str) -> None:
    with pytest.raises(lw.LatentWireError, match=f"did you mean '{right}'"):
        lw.corrected([0.1], wrong)
    with pytest.raises(lw.LatentWireError, match=f"did you mean '{right}'"):
        lw.comprehensive_comparison_report("text", [0.0, 1.0] * 5, {"M": [1.0] * 10}, wrong, n_bootstrap=50)


# ---- seeds and examples crossed ----------------------------------------------------------------------------------


def crossed_scores(rng: np.random.Generator, seeds: int, share: float, n: int = 100) -> np.ndarray:
    """Scores (n, seeds) around zero; ``share`` of the mean's variance is the seeds', the rest is the examples'."""
    spread = math.sqrt(n * (1 - share))
    own = rng.normal(0, spread, (n, seeds))
    return rng.normal(0, spread, (n, 1)) + rng.normal(0, math.sqrt(seeds * share), (1, seeds)) + own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "share", "at_least"),
    [(3, 0.0, 0.94), (3, 0.5, 0.93), (3, 0.85, 0.91), (5, 0.0, 0.94), (5, 0.5, 0.94), (5, 0.85, 0.925)],
)
def test_crossed_interval_covers_the_mean(seeds: int, share: float, at_least: float) -> None:
    """2,000 data sets of 100 × 3 or 5; at worst 92 % where three seeds matter more than the examples, but not alone."""
    rng, hits, found = np.random.default_rng(41), 0, []
    for _ in range(2000):
        low, high, p = lw.crossed_interval(crossed_scores(rng, seeds, share))
        hits += low <= 0 <= high
        found.append(p)
        assert (low <= 0 <= high) == (p >= 0.05)
    assert at_least <= hits / 2000 <= 0.98
    assert rejected(found) <= 1 - at_least


def test_rows_alone_do_not_know_that_seeds_differ() -> None:
    """300 data sets of 100 × 3, half of the variance the seeds': a t-test of the rows' means rejects far too often."""
    rng = np.random.default_rng(42)
    means = [crossed_scores(rng, 3, 0.5).mean(1).tolist() for _ in range(300)]
    assert rejected([lw.paired_t(row, [0.0] * 100) for row in means]) > 0.1


def test_crossed_interval_by_analysis_of_variance() -> None:
    """V6: statsmodels' mean squares of the two-way table; the seeds' whole, Cochran's weighted t (1950)."""
    from pandas import DataFrame
    from statsmodels.api import OLS  # noqa: F401 (registers the formulas)
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    scores = crossed_scores(np.random.default_rng(1), 4, 0.4, 12) + 0.7
    rows, seeds = np.indices(scores.shape)
    frame = DataFrame({"score": scores.ravel(), "row": rows.ravel(), "seed": seeds.ravel()})
    table = anova_lm(ols("score ~ C(row) + C(seed)", frame).fit())
    row, seed, rest = (table["sum_sq"] / table["df"])[["C(row)", "C(seed)", "Residual"]]
    mean = scores.mean()

    def half(alpha: float) -> float:
        parts = (row - rest) / 48, seed / 48
        weighted = stats.t.isf(alpha / 2, 11) * parts[0] + stats.t.isf(alpha / 2, 3) * parts[1]
        return weighted / math.sqrt(sum(parts))

    assert row > rest and seed > rest
    low, high, p = lw.crossed_interval(scores)
    assert (low, high) == pytest.approx((mean - half(0.05), mean + half(0.05))) and half(p) == pytest.approx(mean)


def test_crossed_interval_without_one_of_the_two_is_students() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, 8)
    for scores in (np.repeat(values[:, None], 3, 1), np.repeat(values[None], 20, 0)):
        low, high, p = lw.crossed_interval(scores)
        t = stats.ttest_1samp(values, 0)
        assert (low, high) == pytest.approx(tuple(t.confidence_interval())) and p == pytest.approx(t.pvalue)


def test_crossed_interval_with_clusters_is_statsmodels_robust_one() -> None:
    """Seeds that agree leave the ratio estimator's variance: least squares with cluster-robust errors."""
    from statsmodels.api import OLS

    rng = np.random.default_rng(3)
    names = rng.integers(0, 9, 50)
    values = names / 9 + rng.normal(0, 1, 50)
    fit = OLS(values, np.ones(50)).fit(cov_type="cluster", cov_kwds={"groups": names}, use_t=True)
    low, high, p = lw.crossed_interval(np.repeat(values[:, None], 3, 1), names.tolist())
    assert (low, high) == pytest.approx(tuple(fit.conf_int()[0])) and p == pytest.approx(fit.pvalues[0])


@pytest.mark.slow
def test_crossed_interval_of_clusters_covers_the_mean() -> None:
    """1,000 data sets of 40 × 3 rows and 3 seeds; without the clusters nearly one interval in five misses."""
    rng, hits, alone = np.random.default_rng(43), 0, 0
    names = np.repeat(np.arange(40), 3).tolist()
    for _ in range(1000):
        scores = in_clusters(rng, 40, 3, 1.5)[:, None] + rng.normal(0, 0.1, (1, 3)) + rng.normal(0, 0.5, (120, 3))
        hits += lw.crossed_interval(scores, names)[2] >= 0.05
        alone += lw.crossed_interval(scores)[2] >= 0.05
    assert 0.93 <= hits / 1000 <= 0.975 and alone < 890


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_crossed_interval_of_constant_scores(value: float) -> None:
    assert lw.crossed_interval(np.full((20, 3), value)) == (value, value, float(value == 0))


@pytest.mark.parametrize(
    ("scores", "clusters"),
    [([[0.1], [0.2], [0.4]], None), ([[0.1, 0.2, 0.4]], None), ([[0.1, 0.2], [0.3, 0.1]], ["a", "a"])],
)
@pytest.mark.filterwarnings("ignore")
def test_crossed_interval_wants_two_of_each(scores: list[list[float]], clusters: list[str] | None) -> None:
    with pytest.raises(lw.LatentWireError):
        lw.crossed_interval(scores, clusters)


# ---- clusters, rows in another order, constant scores ------------------------------------------------------------


def eighths_and_names(n: int = 60) -> tuple[list[float], list[float], list[str]]:
    """Scores that add up without rounding, and the clusters of their rows."""
    rng = np.random.default_rng(15)
    a, b = (rng.integers(0, 9, (2, n)) / 8).tolist()
    return a, b, [f"context {i}" for i in rng.integers(0, n // 4, n)]


def test_cluster_sums_by_hand() -> None:
    sums, sizes = lw.cluster_sums([[1, 10], [2, 20], [4, 40]], ["b", "a", "b"])
    assert sums.tolist() == [[5, 50], [2, 20]] and sizes.tolist() == [2, 1]
    sums, sizes = lw.cluster_sums([1.0, 2.0], None)
    assert sums.tolist() == [[1], [2]] and sizes.tolist() == [1, 1]


@pytest.mark.parametrize("call", ["percentile", "bca", "permutation", "crossed"])
def test_clusters_of_one_row_are_no_clusters(call: str) -> None:
    a, b, _ = eighths_and_names()
    ways: dict[str, Callable[..., Any]] = {
        "percentile": lambda names: lw.bootstrap_interval(a, 1, 500, clusters=names),
        "bca": lambda names: lw.bootstrap_interval(a, 1, 500, "bca", names),
        "permutation": lambda names: lw.paired_permutation(a, b, 1, 500, names),
        "crossed": lambda names: lw.crossed_interval(np.array([a, b]).T, names),
    }
    assert ways[call](list(range(60))) == pytest.approx(ways[call](None))


@pytest.mark.parametrize("call", ["percentile", "bca", "permutation", "crossed"])
def test_copies_of_a_row_tell_nothing_new(call: str) -> None:
    """Three copies of every row, told as clusters, give what the rows give; not told, they pretend to more."""
    a, b, _ = eighths_and_names()
    ways: dict[str, Callable[..., Any]] = {
        "percentile": lambda x, y, names: lw.bootstrap_interval(x, 1, 500, clusters=names),
        "bca": lambda x, y, names: lw.bootstrap_interval(x, 1, 500, "bca", names),
        "permutation": lambda x, y, names: lw.paired_permutation(x, y, 1, 500, names),
        "crossed": lambda x, y, names: lw.crossed_interval(np.array([x, y]).T, names),
    }
    want = ways[call](a, b, None)
    assert ways[call](a * 3, b * 3, list(range(60)) * 3) == pytest.approx(want)
    assert ways[call](a * 3, b * 3, None) != pytest.approx(want)


@pytest.mark.parametrize("clustered", [False, True])
def test_the_order_of_rows_does_not_matter(clustered: bool) -> None:
    a, b, names = eighths_and_names()
    found = []
    for order in (range(60), np.random.default_rng(1).permutation(60).tolist()):
        x, y, own = [a[i] for i in order], [b[i] for i in order], [names[i] for i in order] if clustered else None
        told = lw.battery(x, y, 5, 800, own)
        found.append([*told["ci"], *(value for value in told.values() if isinstance(value, float))])
        found[-1] += [*lw.crossed_interval(np.array([x, y]).T, own)]
    assert found[0] == pytest.approx(found[1])


def test_names_of_clusters_do_not_matter() -> None:
    a, b, names = eighths_and_names()
    other = [(name[::-1], 7) for name in names]
    assert lw.battery(a, b, 5, 500, names) == lw.battery(a, b, 5, 500, other)


def test_clusters_of_another_length_are_refused() -> None:
    a, b, names = eighths_and_names()
    with pytest.raises((ValueError, lw.LatentWireError)):
        lw.bootstrap_interval(a, clusters=names[1:])
    with pytest.raises((ValueError, lw.LatentWireError)):
        lw.paired_permutation(a, b, clusters=names[1:])


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_depends_on_its_seed_with_every_method(method: str) -> None:
    a, _, names = eighths_and_names()
    for clusters in (None, names):
        first = lw.bootstrap_interval(a, 7, 300, method, clusters)
        assert lw.bootstrap_interval(a, 7, 300, method, clusters) == first
        assert lw.bootstrap_interval(a, 8, 300, method, clusters) != first


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_constant_scores_have_an_interval_with_every_method(method: str, value: float) -> None:
    low, high = lw.bootstrap_interval([value] * 20, 0, 100, method, [i // 2 for i in range(20)])
    assert 0 <= low <= value <= high <= 1 and (low < high) == (value != 0.25)


@pytest.mark.filterwarnings("ignore")
def test_bca_of_clusters_with_one_mean() -> None:
    found = lw.bootstrap_interval([0.0, 1.0] * 30, 0, 200, "bca", [i // 2 for i in range(60)])
    assert found == pytest.approx((0.5, 0.5))


def test_one_cluster_has_no_interval_of_zero_width() -> None:
    try:
        low, high = lw.bootstrap_interval([0.0, 1.0, 1.0] * 20, 0, 200, clusters=["all"] * 60)
    except lw.LatentWireError:
        return  # a refusal is as good
    assert low < high


def test_clusters_of_right_answers_only_are_as_wide_as_their_number() -> None:
    copies = lw.bootstrap_interval([1.0] * 90, clusters=[i // 30 for i in range(90)])
    assert copies == pytest.approx(lw.bootstrap_interval([1.0] * 3))


# ---- everything at once ------------------------------------------------------------------------------------------


def test_battery_is_made_of_its_parts() -> None:
    a, b, names = eighths_and_names()
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    found = lw.battery(a, b, 3, 600)
    d = lw.cohens_d(a, b)
    assert found["difference"] == pytest.approx(sum(a) / 60 - sum(b) / 60) and found["n"] == 60
    assert tuple(found["ci"]) == lw.bootstrap_interval(gaps, 3, 600)
    assert found["p"] == found["p_permutation"] == lw.paired_permutation(a, b, 3, 599)
    assert (found["p_t"], found["p_wilcoxon"]) == (lw.paired_t(a, b), lw.wilcoxon_p(a, b))
    assert (found["cohens_d"], found["hedges_g"]) == (d, lw.hedges_g(a, b))
    assert found["p_mcnemar"] is None and found["test"] == "permutation"
    told = lw.battery(a, b, 3, 600, names)
    assert tuple(told["ci"]) == lw.bootstrap_interval(gaps, 3, 600, clusters=names)
    assert told["p"] == lw.paired_permutation(a, b, 3, 599, names)


def test_battery_of_right_and_wrong_reports_mcnemar_unless_rows_share_clusters() -> None:
    a, b = ([float(x) for x in own] for own in pairs(12, 4, both=20, neither=14))
    found = lw.battery(a, b, 0, 500)
    assert found["test"] == "McNemar, exact"
    assert found["p"] == found["p_mcnemar"] == lw.mcnemar_exact(*pairs(12, 4))
    clustered = lw.battery(a, b, 0, 500, [i // 2 for i in range(50)])
    assert clustered["test"] == "permutation" and clustered["p_mcnemar"] is None
    assert clustered["p"] == clustered["p_permutation"]


def test_battery_turns_round_with_its_arguments() -> None:
    a, b, _ = eighths_and_names()
    here, there = lw.battery(a, b, 1, 4000), lw.battery(b, a, 1, 4000)
    for name in ("difference", "cohens_d", "hedges_g"):
        assert here[name] == pytest.approx(-there[name])
    for name in ("p_t", "p_wilcoxon", "p_permutation"):
        assert here[name] == pytest.approx(there[name])
    assert not any("power" in name for name in here)  # V7: that of an observed effect says nothing that p does not
    assert here["ci"] == pytest.approx([-x for x in there["ci"][::-1]], abs=0.015)


@pytest.mark.parametrize("scores", [[0.5] * 30, [1.0] * 30, [0.0, 0.5, 1.0] * 10])
def test_battery_of_equal_scores_finds_nothing(scores: list[float]) -> None:
    found = lw.battery(scores, scores, 0, 100)
    assert found["difference"] == 0 and found["cohens_d"] is found["hedges_g"] is None
    assert found["p"] == found["p_permutation"] == found["p_t"] == found["p_wilcoxon"] == 1.0


def test_the_interval_of_no_difference_has_no_side() -> None:
    low, high = lw.battery([1.0, 0.0, 1.0] * 10, [1.0, 0.0, 1.0] * 10, 0, 100)["ci"]
    assert low == pytest.approx(-high)


# ---- the report of several methods beside one baseline -----------------------------------------------------------


def text_and_latents(n: int = 200) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(15)
    text = rng.beta(4, 3, n)
    return text.tolist(), np.clip(text + rng.normal(0.05, 0.15, n), 0, 1).tolist()


def test_report_as_documented() -> None:
    text_scores, latent_scores = text_and_latents()
    report = lw.comprehensive_comparison_report(
        "Text Baseline", text_scores, {"Latent M=32": latent_scores}, correction="fdr_bh"
    )
    results, told = report.results, str(report)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert (results["baseline"], results["n"], results["correction"]) == ("Text Baseline", 200, "fdr_bh")
    assert results["alpha"] == 0.05 and results["warnings"] == []
    row = results["comparisons"]["Latent M=32"]
    gaps = np.array(latent_scores) - np.array(text_scores)
    assert row["difference"] == pytest.approx(gaps.mean())
    half = Z * gaps.std(ddof=1) / math.sqrt(200)
    assert row["ci"] == pytest.approx([gaps.mean() - half, gaps.mean() + half], abs=0.1 * half)
    assert row["p_t"] == pytest.approx(stats.ttest_rel(latent_scores, text_scores).pvalue)
    assert row["p"] == row["p_corrected"] <= 0.001 and row["significant"] is True
    for name, own in (("Text Baseline", text_scores), ("Latent M=32", latent_scores)):
        mean = results["means"][name]
        assert mean["mean"] == pytest.approx(sum(own) / 200)
        assert tuple(mean["ci"]) == lw.bootstrap_interval(own, 42, 10_000, "bca")
        assert name in told and f"{sum(own) / 200:.4f}" in told
    for number in (f"{row['difference']:+.4f}", f"{row['ci'][0]:+.4f}", f"{row['ci'][1]:+.4f}", f"{row['p']:.2g}",
                   f"{row['cohens_d']:.3g}", "significant", "permutation", "fdr_bh"):  # fmt: skip
        assert number in told


def several_methods() -> tuple[list[float], dict[str, list[float]]]:
    rng = np.random.default_rng(16)
    base = rng.integers(0, 9, 50) / 8
    return base.tolist(), {f"M={m}": (base + rng.integers(-2, 3 + m, 50) / 8).tolist() for m in range(4)}


def report_of_several(correction: str = "fdr_bh", **options: Any) -> lw.ComparisonReport:
    return lw.comprehensive_comparison_report("text", *several_methods(), correction, n_bootstrap=400, **options)


def test_report_is_made_of_batteries() -> None:
    base, methods = several_methods()
    rows = report_of_several(random_state=5).results["comparisons"]
    for name, scores in methods.items():
        told = {key: value for key, value in rows[name].items() if key not in ("p_corrected", "significant")}
        assert told == lw.battery(scores, base, 5, 400)


@pytest.mark.parametrize("correction", [*lw.CORRECTIONS, "none"])
def test_report_corrects_for_its_number_of_methods(correction: str) -> None:
    rows = report_of_several(correction).results["comparisons"]
    assert list(rows) == ["M=0", "M=1", "M=2", "M=3"]
    p_values = [row["p"] for row in rows.values()]
    want = p_values if correction == "none" else p_adjust(p_values, correction)
    assert [row["p_corrected"] for row in rows.values()] == pytest.approx(want)
    assert [row["significant"] for row in rows.values()] == [q < 0.05 for q in want]
    assert rows["M=3"]["significant"] and not rows["M=0"]["significant"]


def test_report_depends_on_its_seed_only() -> None:
    first = report_of_several(random_state=1)
    np.random.seed(2)
    assert report_of_several(random_state=1) == first
    assert report_of_several(random_state=2).results != first.results


def test_report_obeys_its_alpha() -> None:
    strict = report_of_several(alpha=0.0)
    assert not any(row["significant"] for row in strict.results["comparisons"].values())
    assert "significant" not in str(strict) and strict.results["alpha"] == 0.0


@pytest.mark.parametrize(("n", "warned"), [(2, True), (19, True), (20, False)])
def test_report_warns_of_few_examples(n: int, warned: bool) -> None:
    text, latents = text_and_latents(n)
    report = lw.comprehensive_comparison_report("text", text, {"M": latents}, n_bootstrap=100)
    assert bool(report.results["warnings"]) == ("careful" in str(report)) == warned
    assert not warned or f"n = {n}" in str(report)


def test_report_wants_the_same_examples() -> None:
    with pytest.raises(lw.LatentWireError, match=r"text has 3.*short has 2") as refused:
        lw.comprehensive_comparison_report("text", [0.1, 0.2, 0.3], {"same": [1, 2, 3], "short": [0.1, 0.2]})
    assert "same has" not in str(refused.value)
    with pytest.raises(lw.LatentWireError, match="two or more"):
        lw.comprehensive_comparison_report("text", [0.1], {"M": [0.2]})


@pytest.mark.parametrize("kind", [bool, int, float, np.float32, np.bool_])
def test_report_takes_right_and_wrong_of_any_type(kind: type) -> None:
    a, b = pairs(12, 4, both=10, neither=4)
    arrays = np.array(a, dtype=kind), np.array(b, dtype=kind)
    for text, latents in (arrays, ([kind(x) for x in a], [kind(x) for x in b])):
        report = lw.comprehensive_comparison_report("text", text, {"M": latents}, n_bootstrap=200)
        json.dumps(report.results, allow_nan=False)
        assert report.results["comparisons"]["M"]["p"] == pytest.approx(lw.mcnemar_exact(a, b))
        assert "McNemar, exact" in str(report)


EXTREME = {
    "all right": [1.0] * 30, "all wrong": [0.0] * 30, "constant": [0.25] * 30, "one off": [0.25] * 28 + [0.5, 0.75],
    "halves": [0.0, 1.0] * 15, "thirds": [1 / 3, 2 / 3, 1.0] * 10, "large": [1e9, -1e9, 3.0] * 10,
}  # fmt: skip


@pytest.mark.parametrize("text", EXTREME)
@pytest.mark.parametrize("latents", EXTREME)
def test_report_of_extreme_scores_is_json_without_a_warning(text: str, latents: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lw.comprehensive_comparison_report(
            "text", EXTREME[text], {"M": EXTREME[latents], "same": EXTREME[text]}, n_bootstrap=100
        )
    json.dumps(report.results, allow_nan=False)
    assert "nan" not in str(report)
    assert report.results["comparisons"]["same"]["p"] == 1.0


def test_report_of_no_method_is_the_baseline_alone() -> None:
    report = lw.comprehensive_comparison_report("text", [0.0, 1.0, 1.0], {}, n_bootstrap=100)
    assert report.results["comparisons"] == {} and [*report.results["means"]] == ["text"]


def test_report_keeps_the_baseline_apart_from_a_method_of_its_name() -> None:
    try:
        report = lw.comprehensive_comparison_report("text", [0.0, 1.0] * 20, {"text": [1.0] * 40}, n_bootstrap=100)
    except lw.LatentWireError:
        return  # a refusal is as good
    assert report.results["comparisons"]["text"]["difference"] == 0.5


@pytest.mark.filterwarnings("ignore")
def test_report_refuses_scores_that_are_no_numbers() -> None:
    with pytest.raises(lw.LatentWireError):
        lw.comprehensive_comparison_report("text", [0.5] * 29 + [math.nan], {"M": [0.25] * 30}, n_bootstrap=100)


# ---- the best constant answer ------------------------------------------------------------------------------------


def test_the_best_constant_answer_of_classes_is_the_commonest_one() -> None:
    rows = [{"id": str(i), "label": int(i < 3), "gold": [["no", "yes"][i < 3]]} for i in range(8)]
    answer, values = lw.constant_values(rows, {"headline": "accuracy"})
    assert answer == "no" and values == [0.0] * 3 + [1.0] * 5


def test_the_best_constant_answer_of_free_text_is_the_one_of_highest_f1() -> None:
    """'the red house' alone is right once, but shares a word with three of four."""
    golds = [["the red house"], ["red"], ["red car"], ["blue"]]
    answer, values = lw.constant_values(
        [{"id": str(i), "gold": gold} for i, gold in enumerate(golds)], {"headline": "f1"}
    )
    want = {word: [max(lw.token_f1(word, g) for g in gold) for gold in golds] for gold in golds for word in gold}
    assert answer == max(want, key=lambda word: sum(want[word])) == "red" and values == want["red"]
