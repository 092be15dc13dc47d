"""Compare two finished cells, or two rows of several seeds, on the same examples, and say which differences are significant.

Imports neither torch nor lm_eval.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, cast

from ptqbench.errors import ConfigError
from ptqbench.evaluate.records import example_rows, example_scores, window_scores
from ptqbench.results import stats
from ptqbench.results.draws import Sample, compare_draws
from ptqbench.results.metrics import kind, known, part
from ptqbench.runs.files import number
from ptqbench.runs.folder import DONE, RunFolder

UNDECIDED = "undecided"
AVERAGE = re.compile(r"average\((.+)\)")
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Side:
    """Finished cells that differ in their seeds alone: a row of a table, or one cell.

    Attributes:
        draws: Seeds in words -> the cell.
        random: Whether another seed would give other values.
    """

    draws: Mapping[str, RunFolder]
    random: bool = True


@dataclasses.dataclass(frozen=True)
class Judged:
    """One metric of two cells.

    Attributes:
        metric: Name of the column.
        found: The paired comparison of the second cell with the first.
        adjusted: Its p-value after Holm's correction over all metrics that were compared.
        verdict: One sentence.
    """

    metric: str
    found: stats.Comparison
    adjusted: float
    verdict: str

    @property
    def word(self) -> str:
        """What the second cell is: ``better``, ``worse`` or ``undecided``."""
        if self.adjusted >= 1 - self.found.confidence or not self.found.distinguishable:
            return UNDECIDED
        return "better" if self.found.better else "worse"


@dataclasses.dataclass(frozen=True)
class Apart:
    """A window or an example on which two cells differ.

    Attributes:
        name: Number of the window; task and number of the example.
        first: Value of the first cell.
        second: Value of the second cell.
        margins: Of an example with choices, log-likelihood of the right one less that of the best other, in both cells, nats;
            NaN where there is none.
    """

    name: str
    first: float
    second: float
    margins: tuple[float, float] = (math.nan, math.nan)


def compare_cells(first: RunFolder, second: RunFolder, names: tuple[str, str] = ("first", "second")) -> list[Judged]:
    """Compare every metric that two finished cells share, as ``compare_sides`` does."""
    return compare_sides(Side({"": first}), Side({"": second}), names)


def compare_sides(first: Side, second: Side, names: tuple[str, str] = ("first", "second")) -> list[Judged]:
    """Compare every metric that two rows share, and the average over their tasks if both have the same one.

    Args:
        first: Finished cells.
        second: Others, evaluated on the same data.
        names: What the verdicts call them.

    Returns:
        One judgement per metric, in the order of the first cell's result; p-values corrected for their number (Holm).

    Raises:
        ConfigError: A cell is not finished, they share no metric, or a metric was measured on other examples.
    """
    # The more metrics, the more of them differ by chance: p-values are corrected for their number.
    found = {metric: compare_metric(first, second, metric) for metric in shared_metrics(first, second)}
    return [judged(metric, found[metric], p_value, names) for metric, p_value in holm(found).items()]


def shared_metrics(first: Side, second: Side) -> list[str]:
    """The metrics and averages over tasks that every cell of two rows has; errors are those of ``compare_sides``."""
    folders = [*first.draws.values(), *second.draws.values()]
    results = [_finished(folder) for folder in folders]
    shared = [name for name in results[0]["metrics"] if all(name in one["metrics"] for one in results)]
    if not shared:
        raise ConfigError(f"{folders[0].path.name} and {folders[-1].path.name} share no metric: evaluate both alike")
    averages = results[0].get("averages", {})
    return shared + [name for name in averages if all(name in one.get("averages", {}) for one in results)]


def compare_metric(first: Side, second: Side, metric: str) -> stats.Comparison:
    """Compare two rows by one metric, or by ``average(task/metric, ...)``; errors are those of ``compare_sides``."""
    results = [_finished(folder) for folder in (*first.draws.values(), *second.draws.values())]
    noise = max(number(part(part(one, "metrics"), metric), "noise") or 0.0 for one in results)
    several, word = max(len(first.draws), len(second.draws)) > 1, kind(metric)
    tasks = AVERAGE.fullmatch(metric)
    try:
        if several:
            called = word if word in ("perplexity", "kl", "top1", "flips") else "accuracy"
            return compare_draws(called, _sample(first, metric), _sample(second, metric), noise)
        (a,), (b,) = first.draws.values(), second.draws.values()
        if tasks:
            return stats.compare_average([(example_scores(a, one), example_scores(b, one)) for one in _tasks(metric)])
        return _compare(a, b, metric, noise)
    except ConfigError as error:
        raise ConfigError(f"{metric}: {error}") from None


def holm(found: Mapping[Key, stats.Comparison]) -> dict[Key, float]:
    """The p-values of comparisons, corrected for their number."""
    return dict(
        zip(found, stats.holm({str(i): one.p_value for i, one in enumerate(found.values())}).values(), strict=True)
    )


def judged(metric: str, found: stats.Comparison, adjusted: float, names: tuple[str, str]) -> Judged:
    """Put a comparison with its corrected p-value into words."""
    return Judged(metric, found, adjusted, stats.verdict(found, *names, adjusted))


def _tasks(metric: str) -> list[str]:
    """The tasks of ``average(task/metric, ...)``."""
    found = AVERAGE.fullmatch(metric)
    return [] if found is None else found[1].split(", ")


def _sample(side: Side, metric: str) -> Sample:
    """The scores of all draws of a row behind a metric."""
    return Sample({seed: _scores(folder, metric) for seed, folder in side.draws.items()}, side.random)


def _scores(folder: RunFolder, metric: str) -> list[Mapping[Hashable, float]]:
    if known(metric).of_text:
        values, n_tokens = _windows(folder, metric)
        n = n_tokens if kind(metric) == "perplexity" else 1  # losses are sums over the tokens of a window
        return [{window: value / n for window, value in values.items()}]
    return [example_scores(folder, one, known(one).column) for one in _tasks(metric) or [metric]]


def furthest_apart(first: RunFolder, second: RunFolder, metric: str, n: int) -> tuple[list[Apart], int]:
    """Find the windows or examples on which two cells differ most in a metric.

    Args:
        first: A finished cell.
        second: Another, evaluated on the same data.
        metric: A metric that both have.
        n: At most so many.

    Returns:
        Those that differ, the largest difference first: of the value, then of the margin. Losses are in nats per token.
        And how many differ.
    """
    find = _windows_apart if known(metric).of_text else _examples_apart
    apart = find(first, second, metric)
    apart.sort(key=lambda one: (abs(one.second - one.first), _moved(one)), reverse=True)
    return apart[:n], len(apart)


def _windows_apart(first: RunFolder, second: RunFolder, metric: str) -> list[Apart]:
    (a, n_tokens), (b, _) = (_windows(folder, metric) for folder in (first, second))
    # Losses are sums over the tokens of a window, the other figures are means.
    n = n_tokens if kind(metric) == "perplexity" else 1
    numbers = [cast("tuple[int, str]", key)[0] for key in a]
    pairs = [(a[key] / n, b[key] / n) for key in a]
    return [Apart(f"window {i}", *pair) for i, pair in zip(numbers, pairs, strict=True) if pair[0] != pair[1]]


def _examples_apart(first: RunFolder, second: RunFolder, metric: str) -> list[Apart]:
    column = known(metric).column or kind(metric)
    a, b = (_by_identity(example_rows(folder, metric, column)) for folder in (first, second))
    found = []
    for key, row in a.items():
        values = float(row[column]), float(b[key][column])
        if values[0] != values[1]:
            found.append(Apart(f"{row['task']} {row['example']}", *values, (_margin(row), _margin(b[key]))))
    return found


def _by_identity(rows: list[dict[str, Any]]) -> dict[Hashable, dict[str, Any]]:
    return {(row["task"], row["example"], row["digest"]): row for row in rows}


def _margin(row: dict[str, Any]) -> float:
    """Log-likelihood of the right choice less that of the best other; NaN where there are no choices."""
    scores, target = list(row["log_likelihoods"] or []), str(row["target"])
    if len(scores) < 2 or not target.isdigit() or int(target) >= len(scores):
        return math.nan
    right = scores.pop(int(target))
    return float(right - max(scores))


def _moved(one: Apart) -> float:
    difference = abs(one.margins[1] - one.margins[0])
    return difference if math.isfinite(difference) else 0.0


def _finished(folder: RunFolder) -> dict[str, Any]:
    result = folder.result()
    if result is None:
        state = folder.state()
        what = "its result.json cannot be used" if state == DONE else f"it is {state}"
        raise ConfigError(f"expected two finished cells, got {folder.path.name}: {what}; run it first")
    return result


def _compare(first: RunFolder, second: RunFolder, metric: str, noise: float) -> stats.Comparison:
    word, of_text = kind(metric), known(metric).of_text
    if not of_text:
        a, b = (example_scores(folder, metric, known(metric).column) for folder in (first, second))
        return stats.compare_flips(a, b) if word == "flips" else stats.compare_accuracy(a, b)
    (a, n_tokens), (b, _) = (_windows(folder, metric) for folder in (first, second))
    if word == "perplexity":
        return stats.compare_perplexity(a, b, n_tokens)
    return stats.compare_windows(a, b, word, noise)


def _windows(folder: RunFolder, metric: str) -> tuple[dict[Hashable, float], int]:
    """The values of the windows behind a metric, and the predicted tokens per window."""
    return window_scores(folder, metric.rpartition("/")[0], known(metric).column or kind(metric))
