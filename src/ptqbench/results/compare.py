"""Compare two finished cells on the same examples, and say which differences are significant. Imports neither torch nor lm_eval."""

from __future__ import annotations

import dataclasses

from ptqbench.errors import ConfigError
from ptqbench.evaluate.records import example_scores, window_scores
from ptqbench.results import stats
from ptqbench.runs.folder import RunFolder


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


def compare_cells(first: RunFolder, second: RunFolder, names: tuple[str, str] = ("first", "second")) -> list[Judged]:
    """Compare every metric that two finished cells share, and the average over their tasks if both have the same one.

    Args:
        first: A finished cell.
        second: Another, evaluated on the same data.
        names: What the verdicts call them.

    Returns:
        One judgement per metric, in the order of the first cell's result; p-values corrected for their number (Holm).

    Raises:
        ConfigError: A cell is not finished, they share no metric, or a metric was measured on other examples.
    """
    results = [folder.result() for folder in (first, second)]
    if results[0] is None or results[1] is None:
        raise ConfigError(f"expected two finished cells, got {first.path.name} and {second.path.name}: run them first")
    shared = [name for name in results[0]["metrics"] if name in results[1]["metrics"]]
    if not shared:
        raise ConfigError(f"{first.path.name} and {second.path.name} share no metric: evaluate both alike")
    found = {name: _compare(first, second, name) for name in shared}
    # The average over tasks, if both cells have the same one.
    for name, average in results[0].get("averages", {}).items():
        if name in results[1].get("averages", {}):
            pairs = [(example_scores(first, task), example_scores(second, task)) for task in average["tasks"]]
            found[name] = stats.compare_average(pairs)
    # The more metrics, the more of them differ by chance: p-values are corrected for their number.
    adjusted = stats.holm({name: comparison.p_value for name, comparison in found.items()})
    return [
        Judged(name, comparison, adjusted[name], stats.verdict(comparison, *names, adjusted[name]))
        for name, comparison in found.items()
    ]


def _compare(first: RunFolder, second: RunFolder, metric: str) -> stats.Comparison:
    label, _, word = metric.rpartition("/")
    if word != "perplexity":
        return stats.compare_accuracy(example_scores(first, metric), example_scores(second, metric))
    losses, n_tokens = window_scores(first, label)
    return stats.compare_perplexity(losses, window_scores(second, label)[0], n_tokens)
