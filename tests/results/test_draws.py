"""Rows of several seeds: against scipy where there is but one source of chance, by hand where there are two, and in simulation."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from ptqbench.errors import ConfigError
from ptqbench.results.draws import Sample, compare_draws

SEEDS = ("0", "1", "2")


def sample(values, random=True, seeds=SEEDS):
    """A row from (draws, examples) of scores in one part."""
    return Sample({seed: [dict(enumerate(map(float, row)))] for seed, row in zip(seeds, values, strict=False)}, random)


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    hard = rng.normal(2, 0.5, 40)
    return hard + rng.normal(0, 0.1, (3, 40)), hard + 0.05 + rng.normal(0, 0.1, (3, 40))


def test_equal_draws_leave_the_paired_t_test_over_examples(scores):
    a, b = (np.tile(one[0], (3, 1)) for one in scores)
    found, expected = compare_draws("kl", sample(a), sample(b)), reference.ttest_rel(b[0], a[0])
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (found.first, found.second) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    assert (found.n, found.draws) == (40, (3, 3))


def test_differences_equal_on_all_examples_leave_the_t_test_over_draws():
    a = np.tile(np.linspace(1, 2, 20), (3, 1))
    moved = np.array([0.1, 0.12, 0.17])
    found = compare_draws("kl", sample(a), sample(a + moved[:, None]))
    expected = reference.ttest_1samp(moved, 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    # With other seeds on the two sides, the differences within a seed mean nothing: Welch's test.
    b = a + np.array([0.02, 0.0, 0.07])[:, None]
    found = compare_draws("kl", sample(b), sample(a + moved[:, None], seeds=("3", "4", "5")))
    expected = reference.ttest_ind(a[:, 0] + moved, b[:, 0], equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue)


def test_two_sources_of_chance_by_hand(scores):
    a, b = scores
    found = compare_draws("perplexity", sample(a), sample(b))
    over_examples, over_draws = (b - a).mean(axis=0), (b - a).mean(axis=1)
    parts = [(over_examples.var(ddof=1) / 40, 39), (over_draws.var(ddof=1) / 3, 2)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    difference = (b - a).mean()
    half = math.sqrt(variance) * reference.t.ppf(0.975, freedom)
    assert found.difference == pytest.approx(math.expm1(difference))
    assert found.low == pytest.approx(math.expm1(difference - half))
    assert found.high == pytest.approx(math.expm1(difference + half))
    assert found.p_value == pytest.approx(2 * reference.t.sf(difference / math.sqrt(variance), freedom))
    assert (found.first, found.second) == (pytest.approx(math.exp(a.mean())), pytest.approx(math.exp(b.mean())))


def test_a_random_row_of_one_draw_borrows_the_spread_of_the_other():
    a, moved = np.tile(np.linspace(1, 2, 20), (3, 1)), np.array([0.1, 0.12, 0.17])
    many, one = sample(a + moved[:, None]), sample(a[:1])
    expected = reference.ttest_ind(a[:1, 0], a[:, 0] + moved, equal_var=True)  # pooled: the variance of the three
    assert compare_draws("kl", one, many).p_value == pytest.approx(expected.pvalue)
    assert compare_draws("kl", many, one).p_value == pytest.approx(expected.pvalue)
    # What has no randomness is known without error.
    fixed = sample(a[:1], random=False)
    assert compare_draws("kl", fixed, many).p_value == pytest.approx(reference.ttest_1samp(moved, 0.0).pvalue)


def test_an_average_weighs_its_tasks_alike():
    rng = np.random.default_rng(1)
    tasks = [rng.integers(0, 2, (3, n)).astype(float) for n in (30, 200)]
    others = [np.clip(one + rng.integers(-1, 2, one.shape) * (rng.random(one.shape) < 0.3), 0, 1) for one in tasks]
    rows = [
        Sample({seed: [dict(enumerate(part[i])) for part in parts] for i, seed in enumerate(SEEDS)})
        for parts in (tasks, others)
    ]
    found = compare_draws("accuracy", *rows)
    d = [b - a for a, b in zip(tasks, others, strict=True)]
    assert found.difference == pytest.approx(np.mean([one.mean() for one in d]))
    per_task = [one.mean(axis=0).var(ddof=1) / one.shape[1] / 4 for one in d]
    over_draws = np.mean([one.mean(axis=1) for one in d], axis=0).var(ddof=1) / 3
    parts = [(per_task[0], 29), (per_task[1], 199), (over_draws, 2)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    assert found.p_value == pytest.approx(2 * reference.t.sf(abs(found.difference) / math.sqrt(variance), freedom))


def test_examples_are_paired_by_identity_not_by_place():
    a, b = np.random.default_rng(2).normal(size=(2, 3, 12))
    turned = Sample(
        {seed: [dict(reversed(list(part.items()))) for part in parts] for seed, parts in sample(b).draws.items()}
    )
    assert compare_draws("kl", sample(a), turned).p_value == pytest.approx(
        compare_draws("kl", sample(a), sample(b)).p_value
    )
    with pytest.raises(ConfigError, match="same examples"):
        compare_draws("kl", sample(a), sample(b[:, :11]))
    with pytest.raises(ConfigError, match="at least two"):
        compare_draws("kl", sample(a[:, :1]), sample(b[:, :1]))


def test_seeds_that_move_all_examples_alike_are_no_evidence():
    """Two rows without a difference: seeds move everything a little, which a test over examples alone takes for an effect."""
    rng, n = np.random.default_rng(3), 300
    over_both, over_examples = [], []
    for _ in range(n):
        a, b = (rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.3, (3, 200)) for _ in range(2))
        over_both.append(compare_draws("kl", sample(a), sample(b, seeds=("3", "4", "5"))).p_value < 0.05)
        over_examples.append(reference.ttest_rel(a.mean(axis=0), b.mean(axis=0)).pvalue < 0.05)
    assert sum(over_both) / n < 0.07
    assert sum(over_examples) / n > 0.4
