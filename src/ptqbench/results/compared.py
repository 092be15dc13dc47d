"""Print the comparison of two finished cells: metric by metric, and where they differ most."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ptqbench.errors import ConfigError
from ptqbench.results.compare import UNDECIDED, Judged, compare_cells, furthest_apart
from ptqbench.results.metrics import MISSING, format_value, kind, known, order
from ptqbench.results.named import label_of, run_named
from ptqbench.results.stats import in_unit
from ptqbench.results.tables import Column, Entry, Sheet, records, tidy
from ptqbench.results.terminal import print_sheets
from ptqbench.runs.folder import RunFolder

UNITS = "Difference: B - A, in percent of a perplexity, in points of a share (printed in percent), in nats of a KL divergence."
TESTS = (
    "p: paired tests on the same windows and examples, corrected for the number of metrics (Holm). "
    "undecided: not distinguishable at this sample size."
)
MARGIN = "margin: log-likelihood of the right choice less that of the best other, in nats."


def print_comparison(first: str, second: str, root: Path, n_examples: int = 0) -> None:
    """Print how two finished cells compare.

    Args:
        first: What the first cell is called, as ``named.run_named`` takes it.
        second: The same for the second.
        root: Folder of run folders.
        n_examples: Windows and examples to list of every metric.

    Raises:
        ConfigError: A name means no cell or several, a cell is not finished, or they were measured on different examples.
    """
    cells = run_named(first, root), run_named(second, root)
    if cells[0].run_id == cells[1].run_id:
        raise ConfigError(f"expected two cells to compare, got {cells[0].run_id} twice ({first!r} and {second!r})")
    judged = compare_cells(*cells, ("A", "B"))
    print_sheets([_overview(cells, judged)], "terminal")
    # An average has no examples of its own.
    for metric in [one.metric for one in judged if "(" not in one.metric] if n_examples else []:
        sheet = _furthest(cells, metric, n_examples)
        if sheet is not None:
            print()
            print_sheets([sheet], "terminal")


def _overview(cells: tuple[RunFolder, RunFolder], judged: list[Judged]) -> Sheet:
    """One row per metric: both values, the difference with its interval and p-value, and what B is."""
    heads = [Column("metric", numeric=False), *map(Column, ("A", "B", "difference"))]
    heads += [Column(f"{100 * judged[0].found.confidence:.0f} % interval"), Column("p"), Column("B is", numeric=False)]
    called = [f"{word}: {label_of(folder)} ({folder.run_id})" for word, folder in zip("AB", cells, strict=True)]
    sheet = Sheet(heads, title="\n".join(called))
    measured_on = [{row["metric"]: row["protocol"] for row in records(tidy([(folder, None)]))} for folder in cells]
    # In the order of tables.
    for one in sorted(judged, key=lambda one: order(one.metric)):
        a, b = (said.get(one.metric) for said in measured_on)
        note = None if a == b else sheet.note(f"measured differently: A {a}; B {b}")
        sheet.rows.append([Entry(_short(one.metric), note=note), *_row(one)])
    averages = [f"{_short(one.metric)}: {one.metric}." for one in judged if _short(one.metric) != one.metric]
    sheet.remarks = [UNITS, TESTS, *averages, *_noise(judged)]
    return sheet


def _row(one: Judged) -> list[Entry]:
    """The entries of a metric behind its name."""
    found = one.found
    shown = "acc" if found.kind == "accuracy" else found.kind
    values = [format_value(shown, value) for value in (found.first, found.second)]
    difference, low, high = (in_unit(found, value) for value in (found.difference, found.low, found.high))
    p_value = f"{one.adjusted:.3f}" if one.adjusted >= 0.001 else f"{one.adjusted:.0e}"
    return [*map(Entry, [*values, difference, f"{low} to {high}", p_value]), Entry(one.word, one.word != UNDECIDED)]


def _short(metric: str) -> str:
    """A metric; an average over tasks says how many there are, because their names fill a column."""
    return f"average of {metric.count(',') + 1} tasks" if "(" in metric else metric


def _noise(judged: list[Judged]) -> Iterator[str]:
    for one in judged:
        if 0 < one.found.noise >= abs(one.found.difference):
            yield f"{one.metric}: differences of up to {one.found.noise:.3g} nats are noise of the measurement."


def _furthest(cells: tuple[RunFolder, RunFolder], metric: str, n: int) -> Sheet | None:
    """The windows or examples on which the cells differ most in a metric; None where there are none."""
    apart, n_apart = furthest_apart(*cells, metric, n)
    if not apart:
        return None
    windows = known(metric).of_text
    what, last = ("window", ["difference"]) if windows else ("example", ["margin A", "margin B"])
    which = f"all {n_apart} {what}s that differ"
    if len(apart) < n_apart:
        which = f"the {len(apart)} of {n_apart} {what}s that differ most"
    unit = ", nats per token" if kind(metric) == "perplexity" else ""
    sheet = Sheet([Column(what, numeric=False), *map(Column, ("A", "B", *last))], title=f"{metric}: {which}{unit}")
    for one in apart:
        numbers = [one.second - one.first] if windows else list(one.margins)
        texts = [f"{value:.3g}" for value in (one.first, one.second)]
        texts += [MISSING if math.isnan(value) else f"{value:+.3g}" for value in numbers]
        sheet.rows.append([Entry(one.name), *map(Entry, texts)])
    if any(math.isfinite(margin) for one in apart for margin in one.margins):
        sheet.remarks = [MARGIN]
    return sheet
