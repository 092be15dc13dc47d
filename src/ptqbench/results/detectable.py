"""The smallest difference that an evaluation can show, before it is run.

A paired, two-sided test at level 5 % finds a difference with a probability (power) of 80 % if it is at least

    (z_0.975 + z_0.8) s / sqrt(n) = 2.80 s / sqrt(n)

for n examples or windows and a standard deviation s of the differences between two cells. Of answers that are right or wrong,
s^2 is at most the share of answers that differ (I. S. Connor 1987, for McNemar's test); of perplexities, s is that of a window's
mean loss. Both are taken from finished cells of the same evaluation, else from the pairs of quantized cells of the embedded model
(``DISCORDANT``, ``SPREAD``). The spread over seeds is not in it. Imports neither torch, pandas nor scipy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from ptqbench.cell.spec import EvaluationSpec, PerplexitySpec, RunSpec
from ptqbench.data.protocols import PROTOCOLS
from ptqbench.data.task_sizes import size_of
from ptqbench.errors import PtqbenchError
from ptqbench.evaluate.records import example_scores, window_scores
from ptqbench.runs.folder import DONE, RunFolder
from ptqbench.sweeps.plan import Row
from ptqbench.sweeps.resources import text_tokens

LEVEL, POWER = 0.05, 0.8
Z = statistics.NormalDist().inv_cdf(1 - LEVEL / 2) + statistics.NormalDist().inv_cdf(POWER)
DISCORDANT = 0.15
"""Share of answers in which two cells differ: median over the pairs of quantized cells of ``sweep demo`` (0.09 to 0.22)."""
SPREAD, SPREAD_TOKENS = 0.09, 255
"""Standard deviation of the difference of a window's mean loss, nats, and the tokens of a window: the same (0.05 to 0.18)."""
LOOKED_AT = 3
"""Finished cells of an evaluation that are read."""
TASKS_NAMED = 2
"""Most tasks that are listed one by one."""
HEADING = f"smallest difference (paired test, two-sided {100 * LEVEL:g} %, power {100 * POWER:g} %)"
Scores = Mapping[Hashable, float]


def of_shares(n: int, discordant: float) -> float:
    """The smallest difference of two accuracies over ``n`` examples of which a share ``discordant`` differs."""
    return min(Z * math.sqrt(discordant / n), 1.0)


def of_average(parts: Sequence[tuple[int, float]]) -> float:
    """The same of the mean over tasks, each with its examples and its share of answers that differ."""
    return min(Z * math.sqrt(math.fsum(discordant / n for n, discordant in parts)) / len(parts), 1.0)


def of_perplexity(n: int, spread: float) -> float:
    """The smallest relative difference of two perplexities over ``n`` windows whose loss differences spread by ``spread``, nats."""
    return math.expm1(Z * spread / math.sqrt(n))


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Of a text or task: examples or windows, and the spread (share) of the differences between two cells."""

    n: int
    spread: float
    known: bool


def detectable(rows: Sequence[Row]) -> list[str]:
    """Say what the evaluations of a plan can show: one line for the texts and one for the tasks of each.

    Args:
        rows: A plan.
    """
    protocols: dict[tuple[object, ...], list[tuple[RunSpec, RunFolder | None]]] = {}
    for row in rows:
        spec = row.cell.spec or row.cell.draft
        if spec is not None:
            done = row.cell.folder if row.state == DONE else None
            protocols.setdefault(_key(spec.evaluation), []).append((spec, done))
    said = [line for cells in protocols.values() for line in _protocol(cells)]
    return [f"{HEADING} of {line}" for line in dict.fromkeys(said)]


def _key(evaluation: EvaluationSpec) -> tuple[object, ...]:
    texts = (
        (label, text.dataset, text.protocol, text.seq_len, text.portion) for label, text in evaluation.texts.items()
    )
    return *texts, evaluation.tasks, evaluation.limit


def _protocol(cells: Sequence[tuple[RunSpec, RunFolder | None]]) -> Iterator[str]:
    evaluation = cells[0][0].evaluation
    # Finished cells that round something, of one model at a time.
    finished: dict[str, list[RunFolder]] = {}
    for spec, folder in cells:
        found = finished.setdefault(spec.model.name, [])
        if folder is not None and spec.quantizes and len(found) < LOOKED_AT:
            found.append(folder)
    if evaluation.texts:
        yield "; ".join(_text(label, text, finished) for label, text in evaluation.texts.items())
    if evaluation.tasks:
        yield _tasks(evaluation, [folder for several in finished.values() for folder in several][:LOOKED_AT])


def _text(label: str, text: PerplexitySpec, finished: Mapping[str, Sequence[RunFolder]]) -> str:
    """One text, over all models; windows and their spread are known where a model has finished cells."""
    protocol = PROTOCOLS.get(str(text.protocol))
    windows = int(text_tokens(text.dataset) * (text.portion[1] - text.portion[0])) // text.seq_len
    windows = max(min(windows, (protocol and protocol.max_windows) or windows), 2)
    usual = _Measured(windows, SPREAD * math.sqrt(SPREAD_TOKENS / (text.seq_len - 1)), known=False)

    def losses(folder: RunFolder) -> Scores:
        values, n_tokens = window_scores(folder, label)
        return {window: loss / n_tokens for window, loss in values.items()}

    found = [_looked_up(folders, losses, statistics.stdev) or usual for folders in finished.values()]
    differences = [100 * of_perplexity(one.n, one.spread) for one in found]
    return (
        f"{label}/perplexity: {_range(differences)} % ({_range([one.n for one in found], '.0f')} windows that differ by "
        + (f"{_range([one.spread for one in found])} nats, {_origin(found)})")
    )


def _tasks(evaluation: EvaluationSpec, folders: Sequence[RunFolder]) -> str:
    names = sorted(dict.fromkeys(task.partition("/")[0] for task in evaluation.tasks))
    found = {}
    for name in names:
        metric = next(task for task in evaluation.tasks if task.partition("/")[0] == name)
        usual = _Measured(size_of(name).measured(evaluation.limit), DISCORDANT, known=False)

        def scores(folder: RunFolder, metric: str = metric) -> Scores:
            return example_scores(folder, metric)

        found[name] = _looked_up(folders, scores, lambda moved: sum(one != 0 for one in moved) / len(moved)) or usual
    points = {name: 100 * of_shares(one.n, one.spread) for name, one in found.items()}
    shares = _range([100 * one.spread for one in found.values()], ".2g")
    facts = f"{shares} % of answers differ, {_origin(list(found.values()))}"
    if len(names) <= TASKS_NAMED:
        listed = "; ".join(f"{name}: {points[name]:.1f} points of {found[name].n} examples" for name in names)
        return f"{listed} ({facts})"
    fine, coarse = min(names, key=points.__getitem__), max(names, key=points.__getitem__)
    average = 100 * of_average([(one.n, one.spread) for one in found.values()])
    return (
        f"{len(names)} tasks: {points[fine]:.1f} points ({fine}) to {points[coarse]:.1f} ({coarse}), "
        f"of their mean {average:.1f} ({facts})"
    )


def _looked_up(
    folders: Sequence[RunFolder], read: Callable[[RunFolder], Scores], spread: Callable[[list[float]], float]
) -> _Measured | None:
    """The median over the pairs of finished cells; None where there is no pair with equal examples."""
    scores = []
    for folder in folders:
        try:
            scores.append(read(folder))
        except (PtqbenchError, OSError, KeyError, ValueError):
            continue  # a damaged record leaves the usual figure
    pairs = [(a, b) for a, b in itertools.combinations(scores, 2) if a.keys() == b.keys() and len(a) > 1]
    spreads = [spread([b[one] - a[one] for one in a]) for a, b in pairs]
    if not spreads or not math.isfinite(statistics.median(spreads)) or not statistics.median(spreads):
        return None
    return _Measured(len(pairs[0][0]), statistics.median(spreads), known=True)


def _origin(found: Sequence[_Measured]) -> str:
    known = {one.known for one in found}
    if known == {True}:
        return "as in finished cells"
    return "assumed" if known == {False} else "as in finished cells, else assumed"


def _range(values: Sequence[float], style: str = ".2g") -> str:
    """The smallest and the largest of some numbers, once where they print alike."""
    texts = [f"{value:{style}}" for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
