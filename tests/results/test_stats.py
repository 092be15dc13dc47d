"""Statistics against slow independent implementations, textbook values, and their coverage in simulation."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqbench.errors import ConfigError
from ptqbench.results import stats

bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12)


def numbered(values):
    return {f"example {i}": float(v) for i, v in enumerate(values)}


def arrays(pairs):
    return np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs], float)


def test_standard_error_by_hand():
    assert stats.standard_error([1, 0, 0, 1, 1]) == pytest.approx(math.sqrt((3 * 0.16 + 2 * 0.36) / 4 / 5))
    assert stats.standard_error([3.0]) is None


def slow_mcnemar(pairs):
    """Every assignment of the discordant pairs to the two cells is equally likely; count those at least as uneven."""
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    n = only_first + only_second
    uneven = [
        abs(sum(coins) - Fraction(n, 2)) >= abs(only_first - Fraction(n, 2))
        for coins in itertools.product((0, 1), repeat=n)
    ]
    return sum(uneven) / len(uneven)


@settings(max_examples=60, deadline=None)
@given(bits)
def test_mcnemar_equals_enumeration(pairs):
    assert stats.mcnemar(*arrays(pairs)) == pytest.approx(slow_mcnemar(pairs))


def test_mcnemar_known_value():
    """5 against 15 discordant pairs: 2 * sum_{k<=5} C(20, k) / 2^20 = 0.041389."""
    pairs = [(1, 0)] * 5 + [(0, 1)] * 15 + [(1, 1)] * 70 + [(0, 0)] * 10
    assert stats.mcnemar(*arrays(pairs)) == pytest.approx(0.04138946533203125)


def test_mcnemar_refuses_other_scores():
    with pytest.raises(ConfigError, match="0 and 1"):
        stats.mcnemar(np.array([0.5]), np.array([1.0]))


def test_bootstrap_equals_a_plain_loop():
    generator = np.random.default_rng(3)
    first, second = generator.random(40), generator.random(40) + 0.1
    other = np.random.default_rng(4)
    means = []
    for _ in range(4000):
        chosen = other.integers(0, 40, 40)
        means.append(second[chosen].mean() - first[chosen].mean())
    slow = np.quantile(means, [0.025, 0.975])
    found = stats.paired_bootstrap(first, second)
    spread = (second - first).std() / math.sqrt(40)
    assert np.abs(np.array(found) - slow).max() < 0.15 * spread  # both are Monte Carlo; a quantile's error is 0.04 here
    assert found == stats.paired_bootstrap(first, second)
    assert found != stats.paired_bootstrap(first, second, seed=1)


def test_bootstrap_keeps_pairs_together():
    """Cells that move together: the paired interval is narrow where two independent ones would be wide."""
    first = np.arange(50.0)
    low, high = stats.paired_bootstrap(first, first + 1 + 0.01 * (first % 2))
    assert 1.0 < low < high < 1.01
    assert stats.paired_bootstrap(first, first + 2) == (2.0, 2.0)


@pytest.mark.parametrize("effect", [0.0, 0.08])
def test_accuracy_interval_covers_and_the_test_keeps_its_level(effect):
    """400 simulated comparisons of 300 examples: about 95 % of intervals cover; false claims stay below 5 %."""
    generator = np.random.default_rng(7)
    covered = claimed = 0
    for _ in range(400):
        first = generator.random(300) < 0.6
        flips = generator.random(300)
        second = np.where(first, flips >= 0.1 - effect / 1.2, flips < 0.15 + effect / 0.8)
        found = stats.paired_bootstrap(first.astype(float), second.astype(float), n_resamples=400)
        p_value = stats.mcnemar(first, second)
        truth = 0.6 * -(0.1 - effect / 1.2) + 0.4 * (0.15 + effect / 0.8)
        covered += found[0] <= truth <= found[1]
        claimed += p_value < 0.05
    assert 0.915 <= covered / 400 <= 0.98
    assert claimed / 400 < 0.07 if effect == 0 else claimed / 400 > 0.8


def test_compare_accuracy_uses_identities_not_order():
    first = numbered([1, 0, 1, 1, 0, 0])
    second = dict(reversed(numbered([1, 1, 1, 1, 1, 0]).items()))
    found = stats.compare_accuracy(first, second)
    assert (found.first, found.second, found.n) == (0.5, pytest.approx(5 / 6), 6)
    assert found.difference == pytest.approx(2 / 6)
    assert found.p_value == 0.5  # two discordant pairs, both one way
    assert found.test == "exact McNemar"
    assert stats.compare_accuracy(numbered([0.5, 1, 0]), numbered([0.25, 1, 1])).test == "paired t"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (numbered([1, 0]), numbered([1, 0, 1]), "0 of 2 are missing in the second and 1 of 3 in the first"),
        ({"a": 1.0}, {"b": 1.0}, "same examples"),
        ({}, {}, "at least one"),
        ({"a": 1.0}, {"a": float("nan")}, "finite"),
    ],
)
def test_unmatched_examples_are_refused(first, second, words):
    for compare in (stats.compare_accuracy, lambda a, b: stats.compare_perplexity(a, b, 1)):
        with pytest.raises(ConfigError, match=words):
            compare(first, second)


def test_perplexity_comparison_by_hand():
    """Differences 1, 2, 3, 6 of the mean losses: mean 3, standard error 1.0801, t(3, 0.975) = 3.182446."""
    first, second = numbered([10, 20, 30, 40]), numbered([20, 40, 60, 100])
    found = stats.compare_perplexity(first, second, 10)
    error = math.sqrt(14 / 3 / 4)
    assert (found.first, found.second) == (pytest.approx(math.exp(2.5)), pytest.approx(math.exp(5.5)))
    assert math.log1p(found.difference) == pytest.approx(3)
    assert math.log1p(found.low) == pytest.approx(3 - 3.182446305 * error)
    assert math.log1p(found.high) == pytest.approx(3 + 3.182446305 * error)
    t = 3 / error  # closed form of the t distribution with 3 degrees of freedom
    tail = 0.5 - (math.atan(t / math.sqrt(3)) + math.sqrt(3) * t / (3 + t * t)) / math.pi
    assert found.p_value == pytest.approx(2 * tail)
    with pytest.raises(ConfigError, match="two windows"):
        stats.compare_perplexity({"w": 1.0}, {"w": 2.0}, 10)


def test_perplexity_interval_covers():
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(500):
        common = generator.normal(300, 40, 25)  # windows differ far more than cells do
        first, second = common + generator.normal(0, 2, 25), common + 1.5 + generator.normal(0, 2, 25)
        found = stats.compare_perplexity(numbered(first), numbered(second), 100)
        covered += math.log1p(found.low) <= 0.015 <= math.log1p(found.high)
    assert 0.925 <= covered / 500 <= 0.975


def test_equal_cells_are_never_told_apart():
    same = numbered([1, 0, 1])
    for found in (
        stats.compare_accuracy(same, same),
        stats.compare_perplexity(same, same, 5),
        stats.compare_average([(same, same)]),
    ):
        assert (found.p_value, found.low, found.high) == (1.0, 0.0, 0.0)
        assert "not distinguishable at this sample size" in stats.verdict(found, "a", "b")


def test_average_counts_every_task_once():
    small = numbered([0, 0, 1, 0]), numbered([1, 0, 1, 0])
    large = numbered([1, 0] * 50), numbered([1, 1, 1, 0] * 25)
    found = stats.compare_average([small, large])
    assert found.first == pytest.approx((0.25 + 0.5) / 2)
    assert found.difference == pytest.approx(0.25)
    errors = [
        np.std(np.array(list(b.values())) - list(a.values()), ddof=1) / math.sqrt(len(a)) for a, b in (small, large)
    ]
    error = math.hypot(*errors) / 2
    assert found.high - found.low == pytest.approx(2 * 1.959963985 * error)
    assert found.p_value == pytest.approx(math.erfc(0.25 / error / math.sqrt(2)))
    with pytest.raises(ConfigError, match="at least one task"):
        stats.compare_average([])
    with pytest.raises(ConfigError, match="two examples"):
        stats.compare_average([(numbered([1]), numbered([1]))])


def test_spread_over_seeds():
    found = stats.over_seeds([5.0, 6.0, 7.0])
    assert (found.n, found.mean, found.std) == (3, 6.0, pytest.approx(1.0))
    assert found.high - found.mean == pytest.approx(4.302652730 / math.sqrt(3))
    assert stats.over_seeds([5.0]) == stats.Spread(1, 5.0, None, None, None)
    with pytest.raises(ConfigError, match="one seed"):
        stats.over_seeds([])


def test_holm_known_values():
    """Holm's own procedure on 0.01, 0.04, 0.03, 0.005: 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 raised to 0.06."""
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(found) == ["a", "b", "c", "d"]
    assert list(found.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}
    assert stats.holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_equals_its_step_down_definition(values, alpha):
    named = {str(i): v for i, v in enumerate(values)}
    rejected = set()
    for place, name in enumerate(sorted(named, key=named.get)):
        if named[name] * (len(named) - place) > alpha:
            break
        rejected.add(name)
    assert {name for name, p in stats.holm(named).items() if p <= alpha} == rejected


def test_verdict_names_the_better_cell_and_the_unit():
    accuracy = stats.compare_accuracy(numbered([0] * 30 + [1] * 70), numbered([1] * 100))
    assert stats.verdict(accuracy, "rtn", "gptq").startswith("gptq is better than rtn (+30.00 points, 95 % interval")
    assert "not distinguishable" in stats.verdict(accuracy, "rtn", "gptq", p_value=0.2)  # after correction
    losses = numbered([10.0, 11.0, 12.0, 10.5])
    higher = {key: value + 1 + 0.01 * value for key, value in losses.items()}
    perplexity = stats.compare_perplexity(losses, higher, 10)
    assert stats.verdict(perplexity, "gptq", "rtn").startswith("rtn is worse than gptq (+")
    assert "% of the perplexity" in stats.verdict(perplexity, "gptq", "rtn")


def test_imports_no_torch():
    code = "import ptqbench.results.stats, sys; assert not {'torch', 'pandas', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_spread_over_seeds_does_not_overflow():
    spread = stats.over_seeds([1e299, 3e299])
    assert (spread.mean, spread.std) == pytest.approx((2e299, 2**0.5 * 1e299))
    assert stats.over_seeds([1.0, math.inf]).std is None
