"""Compare two rows of a table of which each is several draws (seeds): by the spread over examples and the spread over draws.

A value has two sources of chance: which examples or windows it was measured on, and which calibration windows and rotations were
drawn. A test over the examples takes the draws as given, and a test over the draws takes the examples as given. Here the squared
standard errors of both are added. The sum counts what a draw does to a single example twice, so that it is never too small on
average (A. B. Owen 2007, The pigeonhole bootstrap; A. C. Cameron, J. B. Gelbach and D. L. Miller 2011, multiway clustering). The
degrees of freedom are those of F. E. Satterthwaite (1946). Imports neither torch nor pandas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats as scipy_stats

from ptqbench.errors import ConfigError
from ptqbench.results.stats import CONFIDENCE, LARGEST_LOSS, Array, Comparison, Scores, paired

TEST = "t over examples and draws"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A metric of all draws of a row.

    Attributes:
        draws: Seeds in words -> the scores of each part. An accuracy has one part; an average over tasks has one per task. A score
            of a perplexity is the mean loss of a window, in nats.
        random: Whether another seed would give other values. Where not, the one value is all there is.
    """

    draws: Mapping[str, Sequence[Scores]]
    random: bool = True


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source of chance: the square of a standard error, and its degrees of freedom."""

    variance: float
    freedom: float


def compare_draws(kind: str, first: Sample, second: Sample, noise: float = 0.0) -> Comparison:
    """Compare two rows by the means over their draws.

    Args:
        kind: As ``stats.Comparison`` has it.
        first: A row.
        second: Another; all its draws were measured on the same examples.
        noise: What a difference must exceed.

    Returns:
        The comparison; its values are means over the draws, of a perplexity the exponential of the mean loss. Where both rows have
        the same seeds, differences are taken within a seed. A random row of one draw is taken to spread as the other does.

    Raises:
        ConfigError: A draw was measured on other examples, or there are fewer than two examples.
    """
    parts = [_aligned(first, second, place) for place in range(len(next(iter(first.draws.values()))))]
    # Over the examples: differences of the means over draws, part by part; parts are independent and count alike.
    differences = [b.mean(axis=0) - a.mean(axis=0) for a, b in parts]
    if min(map(len, differences)) < 2:
        raise ConfigError("expected at least two windows or examples to compare, got one")
    chance = [_Part(d.var(ddof=1) / len(d) / len(parts) ** 2, len(d) - 1) for d in differences]
    # Over the draws: their values.
    values = [np.mean([pair[side].mean(axis=1) for pair in parts], axis=0) for side in (0, 1)]
    chance += _over_draws(first, second, values)
    difference = float(np.mean([d.mean() for d in differences]))
    p_value, low, high = _t_test(difference, chance)
    a, b = (float(one.mean()) for one in values)
    if kind == "perplexity":
        a, b = (math.exp(min(loss, LARGEST_LOSS)) for loss in (a, b))
        difference, low, high = (math.expm1(min(loss, LARGEST_LOSS)) for loss in (difference, low, high))
    n, draws = sum(map(len, differences)), (len(first.draws), len(second.draws))
    return Comparison(kind, a, b, difference, low, high, p_value, n, TEST, CONFIDENCE, noise, draws)


def _aligned(first: Sample, second: Sample, place: int) -> tuple[Array, Array]:
    """The scores of a part, (draws, examples) for each row, with the examples in the same order."""
    common: Mapping[Hashable, float] = next(iter(first.draws.values()))[place]
    a, b = (np.array([paired(common, draw[place])[1] for draw in row.draws.values()]) for row in (first, second))
    return a, b


def _over_draws(first: Sample, second: Sample, values: Sequence[Array]) -> list[_Part]:
    """What the draws add to the variance of the difference."""
    if list(first.draws) == list(second.draws) and len(first.draws) > 1:
        within = values[1] - values[0]
        return [_Part(within.var(ddof=1) / len(within), len(within) - 1)]
    spread = [_Part(one.var(ddof=1), len(one) - 1) if len(one) > 1 else None for one in values]
    # A row of one draw borrows the spread of the other, if another seed would change it.
    for row, other, mine in ((first, second, 0), (second, first, 1)):
        theirs = spread[1 - mine]
        if len(row.draws) == 1 and row.random and theirs is not None:
            return [_Part(theirs.variance * (1 + 1 / len(other.draws)), theirs.freedom)]
    return [
        _Part(part.variance / len(one), part.freedom)
        for part, one in zip(spread, values, strict=True)
        if part is not None
    ]


def _t_test(difference: float, chance: Iterable[_Part]) -> tuple[float, float, float]:
    """Two-sided p-value of no difference, and the interval of the difference."""
    parts = [part for part in chance if part.variance > 0]
    variance = math.fsum(part.variance for part in parts)
    if not variance:
        return (1.0 if difference == 0 else 0.0), difference, difference
    freedom = variance**2 / math.fsum(part.variance**2 / part.freedom for part in parts)
    error = math.sqrt(variance)
    half = error * float(scipy_stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return float(2 * scipy_stats.t.sf(abs(difference) / error, freedom)), difference - half, difference + half
