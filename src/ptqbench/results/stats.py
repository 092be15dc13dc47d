"""Is one cell better than another, or is the difference noise? Standard errors, paired tests, spread over seeds, verdicts.

Two cells of one model are measured on the same examples, and most examples have the same outcome in both. A paired test looks at
the examples whose outcomes differ. Two standard errors side by side ignore the pairing, and need samples several times larger for
the same answer. Scores are mappings from the identity of an example (task, number, digest of the prompt) to its score. Two cells
with different sets of identities are refused, never compared on the common part.

Sources: E. McNemar 1947 (exact form: a binomial test on the discordant pairs); B. Efron 1979 (percentile bootstrap);
S. Holm 1979. scipy computes the tests; this module chooses the test for each number. Imports neither torch nor pandas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

from ptqbench.errors import ConfigError
from ptqbench.results.metrics import known

CONFIDENCE = 0.95
N_RESAMPLES = 10_000
BATCH_ELEMENTS = 1 << 22
"""Resampled examples held at once."""

LARGEST_LOSS = 700.0
"""Nats up to which exp is finite in float64."""

Array = np.ndarray
Scores = Mapping[Hashable, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two cells on the same examples; every difference is that of the second cell to the first.

    Attributes:
        kind: ``accuracy``, or the kind of metric (``metrics.KINDS``). Differences of a perplexity are relative: second / first - 1.
        first: Value of the first cell.
        second: Value of the second cell.
        difference: Point estimate of the difference.
        low: Lower end of its confidence interval.
        high: Upper end of its confidence interval.
        p_value: Two-sided p-value of "no difference".
        n: Number of examples (of windows for a perplexity).
        test: Name of the test that gave the p-value.
        confidence: Coverage of the interval.
        noise: What a difference must exceed because the measurement itself is no finer.
        draws: Number of seeds behind each value.
    """

    kind: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    test: str
    confidence: float = CONFIDENCE
    noise: float = 0.0
    draws: tuple[int, int] = (1, 1)

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes zero, and the difference is not within the noise of the measurement."""
        return not self.low <= 0 <= self.high and abs(self.difference) > self.noise

    @property
    def better(self) -> bool:
        """Whether the second cell has the better value."""
        return (self.difference > 0) == (self.kind == "accuracy" or known(self.kind).higher)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean over seeds; ``std`` (n - 1 in the denominator) and the t interval of the mean may be None (see ``over_seeds``)."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def standard_error(values: Sequence[float] | Array) -> float | None:
    """Standard error of the mean, sqrt(sum (v - mean)^2 / (n - 1) / n); None for fewer than two values.

    For 0/1 scores this is lm-eval's ``acc_stderr``.
    """
    if len(values) < 2:
        return None
    return float(stats.sem(np.asarray(values, dtype=np.float64), ddof=1))


def paired(first: Scores, second: Scores) -> tuple[Array, Array]:
    """Bring the scores of two cells into the same order.

    Args:
        first: Identity of an example -> score; not modified.
        second: The same examples, in any order; not modified.

    Returns:
        Two float64 arrays in the order of ``first``.

    Raises:
        ConfigError: The sets of examples differ, are empty, or a score is not finite.
    """
    # The examples must be the same; one that is not is named in the message.
    missing, extra = first.keys() - second.keys(), second.keys() - first.keys()
    if missing or extra:
        example = min(missing or extra, key=str)
        raise ConfigError(
            f"expected two cells measured on the same examples, but {len(missing)} of {len(first)} are missing in the second "
            f"and {len(extra)} of {len(second)} in the first (e.g. {example!r}); evaluate both with the same data and prompts"
        )
    if not first:
        raise ConfigError("expected at least one example to compare, got none")
    arrays = np.array(list(first.values()), dtype=np.float64), np.array([second[k] for k in first], dtype=np.float64)
    if not all(np.isfinite(values).all() for values in arrays):
        raise ConfigError("expected finite scores to compare, got NaN or infinity")
    return arrays


def mcnemar(first: Array, second: Array) -> float:
    """Exact two-sided p-value of McNemar's test.

    Among the examples that only one of the two cells gets right, each cell is right with probability 1/2 under the null hypothesis.

    Args:
        first: (n,) scores, 0 or 1.
        second: (n,) scores of the same examples.

    Returns:
        The p-value; 1 where the cells never differ.

    Raises:
        ConfigError: A score is neither 0 nor 1.
    """
    if not _binary(first, second):
        raise ConfigError(
            "expected scores of 0 and 1 for McNemar's test, got others: compare such scores by a paired t test"
        )
    only_first, discordant = int(((first == 1) & (second == 0)).sum()), int((first != second).sum())
    return 1.0 if discordant == 0 else float(stats.binomtest(only_first, discordant, 0.5).pvalue)


def paired_bootstrap(
    first: Array, second: Array, confidence: float = CONFIDENCE, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(second) - mean(first). An example is resampled together with both its scores.

    Args:
        first: (n,) scores.
        second: (n,) scores of the same examples.
        confidence: Coverage aimed at.
        n_resamples: Number of resamples.
        seed: Seed of the resampling; equal seeds give equal intervals.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if np.ptp(differences) == 0:  # scipy has no interval of a constant
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=n_resamples,
        batch=max(1, BATCH_ELEMENTS // len(differences)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare_accuracy(first: Scores, second: Scores, confidence: float = CONFIDENCE, seed: int = 0) -> Comparison:
    """Compare the accuracies of two cells on the same examples.

    The interval is that of the paired bootstrap. The p-value is McNemar's for scores of 0 and 1, else that of the paired t test.

    Args:
        first: Identity of an example -> score of the first cell.
        second: The same for the second.
        confidence: Coverage of the interval.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: The examples are not the same.
    """
    a, b = paired(first, second)
    low, high = paired_bootstrap(a, b, confidence, seed=seed)
    exact = _binary(a, b)
    p_value = mcnemar(a, b) if exact else _t_test(b - a, confidence)[0]
    means = float(a.mean()), float(b.mean()), float((b - a).mean())
    test = "exact McNemar" if exact else "paired t"
    return Comparison("accuracy", *means, low, high, p_value, len(a), test, confidence)


def compare_average(pairs: Sequence[tuple[Scores, Scores]], confidence: float = CONFIDENCE) -> Comparison:
    """Compare two cells by the unweighted mean of their accuracies on several tasks.

    Examples are a sample, tasks are fixed. The standard error is sqrt(sum_t se_t^2) / T over the T tasks, where se_t is the
    standard error of the paired differences in task t. The difference is taken as normally distributed.

    Raises:
        ConfigError: No task, or a task whose examples are not the same or fewer than two.
    """
    if not pairs:
        raise ConfigError("expected at least one task to average, got none")
    arrays = [paired(first, second) for first, second in pairs]
    first, second = (float(np.mean([pair[i].mean() for pair in arrays])) for i in (0, 1))
    # The error of the mean of T independent differences.
    errors = [standard_error(b - a) for a, b in arrays]
    if any(error is None for error in errors):
        raise ConfigError("expected at least two examples in every task of an average")
    error = math.sqrt(math.fsum(e**2 for e in errors if e is not None)) / len(errors)
    # The normal interval, and the two-sided p-value of a difference of zero.
    difference = second - first
    half = error * float(stats.norm.ppf((1 + confidence) / 2))
    p_value = float(2 * stats.norm.sf(abs(difference) / error)) if error else _certain(difference)
    n = sum(len(a) for a, _ in arrays)
    low, high = difference - half, difference + half
    return Comparison("accuracy", first, second, difference, low, high, p_value, n, "paired z", confidence)


def compare_perplexity(
    first: Scores, second: Scores, tokens_per_window: int, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare two perplexities of one text by the losses of its windows.

    log(perplexity) is the mean of the windows' mean losses. So exponentiating the paired t interval of the difference of losses
    gives an interval of the ratio of the perplexities.

    Args:
        first: Identity of a window -> sum of its negative log-likelihoods, in nats.
        second: The same windows in the second cell.
        tokens_per_window: Predicted tokens of each window.
        confidence: Coverage of the interval.

    Raises:
        ConfigError: The windows are not the same, or there are fewer than two.
    """
    a, b = (sums / tokens_per_window for sums in paired(first, second))
    _several_windows(a)
    p_value, low, high = _t_test(b - a, confidence)
    values = math.exp(min(float(a.mean()), LARGEST_LOSS)), math.exp(min(float(b.mean()), LARGEST_LOSS))
    # exp(difference of mean losses) is the ratio of the perplexities; 1 less is the relative change.
    change, low, high = (math.expm1(min(loss, LARGEST_LOSS)) for loss in (float((b - a).mean()), low, high))
    return Comparison("perplexity", *values, change, low, high, p_value, len(a), "paired t", confidence)


def compare_windows(
    first: Scores, second: Scores, kind: str, noise: float = 0.0, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare the means of a figure over the windows of a text, which are equally long, by the paired t test.

    Args:
        first: Identity of a window -> its mean KL divergence in nats, or its share of equal first tokens.
        second: The same windows in the second cell.
        kind: ``kl`` or ``top1``.
        noise: What a difference must exceed.
        confidence: Coverage of the interval.

    Raises:
        ConfigError: The windows are not the same, or there are fewer than two.
    """
    a, b = paired(first, second)
    _several_windows(a)
    p_value, low, high = _t_test(b - a, confidence)
    means = float(a.mean()), float(b.mean()), float((b - a).mean())
    return Comparison(kind, *means, low, high, p_value, len(a), "paired t", confidence, noise)


def compare_flips(first: Scores, second: Scores, confidence: float = CONFIDENCE, seed: int = 0) -> Comparison:
    """Compare shares of changed answers, as ``compare_accuracy`` compares accuracies.

    McNemar's test then looks at the examples whose answer only one of the two cells has changed.
    """
    return dataclasses.replace(compare_accuracy(first, second, confidence, seed), kind="flips")


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Spread:
    """Mean and spread of a metric over seeds. With one seed, or with an infinite value, the spread is unknown.

    Raises:
        ConfigError: There is no value.
    """
    if not values:
        raise ConfigError("expected the value of at least one seed, got none")
    n, mean = len(values), float(np.mean(values))
    # Scaled to the largest value, so that no square overflows.
    scale = max(map(abs, values)) or 1.0
    if n == 1 or math.isinf(scale):
        return Spread(n, mean, None, None, None)
    std = scale * float(np.std(np.asarray(values) / scale, ddof=1))
    half = std / math.sqrt(n) * float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Spread(n, mean, std, mean - half, mean + half)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p-values of several comparisons (Holm).

    If every claim has an adjusted p-value below alpha, the chance that any of the claims is false is below alpha.

    The k-th smallest of m p-values is multiplied by m - k + 1, capped at 1, and raised to the largest before it. Order is kept.
    """
    adjusted: dict[str, float] = {}
    running = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def verdict(found: Comparison, first: str, second: str, p_value: float | None = None) -> str:
    """Say in one sentence which of two cells is better, or that the sample is too small to tell.

    A difference is claimed only if the p-value is below 1 - confidence, the interval excludes zero, and it exceeds the noise.

    Args:
        found: The comparison of ``second`` with ``first``.
        first: Name of the first cell.
        second: Name of the second.
        p_value: A p-value adjusted for several comparisons; None takes that of the comparison.
    """
    p = found.p_value if p_value is None else p_value
    unit = {"perplexity": " % of the perplexity", "kl": " nats"}.get(found.kind, " points")
    difference, low, high = (in_unit(found, value) for value in (found.difference, found.low, found.high))
    what = "windows" if known(found.kind).of_text else "examples"
    seeds = "" if found.draws == (1, 1) else f", {found.draws[0]} and {found.draws[1]} seeds"
    facts = (
        f"{difference}{unit}, {100 * found.confidence:.0f} % interval {low} to {high}, p = {p:.2g}, "
        f"{found.n} {what}{seeds}"
    )
    if p >= 1 - found.confidence or not found.distinguishable:
        within = abs(found.difference) <= found.noise and found.noise > 0
        why = f"within the noise floor of {found.noise:.2g} nats" if within else "at this sample size"
        return f"{second} and {first} are not distinguishable {why} ({facts})"
    return f"{second} is {'better' if found.better else 'worse'} than {first} ({facts})"


def p_text(p_value: float) -> str:
    """A p-value as tables print it."""
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.0e}"


def in_unit(found: Comparison, value: float) -> str:
    """A difference with its sign: in nats for a KL divergence, in percent of a perplexity, in points of a share."""
    return f"{value:+.3g}" if found.kind == "kl" else f"{100 * value:+.2f}"


def _several_windows(values: Array) -> None:
    if len(values) < 2:
        raise ConfigError("expected at least two windows to compare the figures of a text, got one: use a longer text")


def _t_test(differences: Array, confidence: float) -> tuple[float, float, float]:
    """p-value and interval of the mean of paired differences; equal differences have no spread to test against."""
    mean, error = float(differences.mean()), standard_error(differences)
    if not error:
        return _certain(mean), mean, mean
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(confidence)
    return float(found.pvalue), float(interval.low), float(interval.high)


def _certain(difference: float) -> float:
    """The p-value of a difference without spread."""
    return 1.0 if difference == 0 else 0.0


def _binary(*arrays: Array) -> bool:
    return all(bool(np.isin(values, (0, 1)).all()) for values in arrays)
