"""Print the comparison of two cells, of two rows of several seeds, or of two sweeps; and where two cells differ most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ptqbench.errors import ConfigError
from ptqbench.results.compare import (
    UNDECIDED,
    Judged,
    compare_metric,
    compare_sides,
    furthest_apart,
    holm,
    judged,
    shared_metrics,
)
from ptqbench.results.metrics import MISSING, format_value, kind, known, order
from ptqbench.results.named import SHOWN
from ptqbench.results.sides import Row, asked, pairs
from ptqbench.results.stats import CONFIDENCE, Comparison, in_unit, p_text
from ptqbench.results.tables import Column, Entry, Sheet, records, tidy
from ptqbench.results.terminal import print_sheets
from ptqbench.runs.folder import RunFolder

UNITS = "Difference: B - A, in percent of a perplexity, in points of a share (printed in percent), in nats of a KL divergence."
TESTS = (
    "p: paired tests on the same windows and examples, corrected for the number of {} (Holm). "
    "undecided: not distinguishable at this sample size."
)
SEVERAL = (
    "Several seeds: values are means over them (of a perplexity the exponential of the mean loss), and p and interval count the "
    "spread over seeds as well as that over windows and examples."
)
FIGURES = [
    *map(Column, ("A", "B", "difference", f"{100 * CONFIDENCE:.0f} % interval", "p")), Column("B is", numeric=False)
]  # fmt: skip
MARGIN = "margin: log-likelihood of the right choice less that of the best other, in nats."


def print_comparison(first: str, second: str, root: str | None, n_examples: int = 0) -> None:
    """Print how two finished cells, two rows of several seeds, or two sweeps compare.

    Args:
        first: The first of them, as ``sides.asked`` takes it.
        second: The other.
        root: Folder of run folders; None for that of the request.
        n_examples: Windows and examples to list of every metric.

    Raises:
        ConfigError: A word means no cell or different ones, a cell is not finished, or they were measured on different examples.
    """
    one, other = asked(first, root), asked(second, root)
    if one.sweep != other.sweep:
        raise ConfigError(f"expected two sweeps or two cells, got one of each: {first!r} and {second!r}")
    if one.sweep:
        if n_examples:
            raise ConfigError("--examples: expected two cells to list examples of, got two sweeps; name the cells")
        sheet = _sweeps(one.rows, other.rows, (first, second))
        for word, missing in (("A", one.missing), ("B", other.missing)):
            if missing:
                more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
                sheet.remarks.append(
                    f"{word} has {len(missing)} cells without a result: {'; '.join(missing[:SHOWN])}{more}."
                )
        print_sheets([sheet], "terminal")
        return
    (a,), (b,) = one.rows, other.rows
    if a.run_ids & b.run_ids:
        same = ", ".join(sorted(a.run_ids & b.run_ids))
        raise ConfigError(f"expected two cells to compare, got {same} twice ({first!r} and {second!r})")
    if n_examples and max(len(a.run_ids), len(b.run_ids)) > 1:
        raise ConfigError("--examples: expected one seed of each side to list examples of; name the seeds")
    verdicts = compare_sides(a.side, b.side, ("A", "B"))
    print_sheets([_overview((a, b), verdicts)], "terminal")
    # An average has no examples of its own.
    for metric in [one.metric for one in verdicts if "(" not in one.metric] if n_examples else []:
        (cell,), (rival,) = a.side.draws.values(), b.side.draws.values()
        furthest = _furthest((cell, rival), metric, n_examples)
        if furthest is not None:
            print()
            print_sheets([furthest], "terminal")


def _overview(rows: tuple[Row, Row], verdicts: list[Judged]) -> Sheet:
    """One row per metric: both values, the difference with its interval and p-value, and what B is."""
    sheet = Sheet([Column("metric", numeric=False), *FIGURES])
    sheet.title = "\n".join(f"{word}: {row.called()}" for word, row in zip("AB", rows, strict=True))
    measured_on = [_protocols(row) for row in rows]
    # In the order of tables.
    for one in sorted(verdicts, key=lambda one: order(one.metric)):
        note = _note(sheet, *(said.get(one.metric) for said in measured_on))
        sheet.rows.append([Entry(_short(one.metric), note=note), *_row(one)])
    sheet.remarks = [UNITS, TESTS.format("metrics"), *_remarks(verdicts)]
    return sheet


def _sweeps(first: Sequence[Row], second: Sequence[Row], words: tuple[str, str]) -> Sheet:
    """One row per pair of rows of two sweeps and metric; p-values are corrected for all of them."""
    together, alone = pairs(first, second)
    sheet = Sheet(
        [Column("model", numeric=False), Column("pair", numeric=False), Column("metric", numeric=False), *FIGURES]
    )
    sheet.title = "\n".join(f"{letter}: {word}" for letter, word in zip("AB", words, strict=True))
    # All comparisons first, since each p-value depends on the others.
    found: dict[tuple[int, str], Comparison] = {}
    for place, (a, b) in enumerate(together):
        try:
            found |= {
                (place, metric): compare_metric(a.side, b.side, metric) for metric in shared_metrics(a.side, b.side)
            }
        except ConfigError as error:
            sheet.remarks.append(f"not compared: {_pair(a, b)}: {error}.")
    verdicts = [
        (place, judged(metric, found[place, metric], p_value, ("A", "B")))
        for (place, metric), p_value in holm(found).items()
    ]
    protocols = {row.run_ids: _protocols(row) for pair in together for row in pair}
    for place, one in sorted(verdicts, key=lambda pair: (pair[0], order(pair[1].metric))):
        a, b = together[place]
        note = _note(sheet, *(protocols[row.run_ids].get(one.metric) for row in (a, b)))
        labels = [Entry(a.names[0]), Entry(_pair(a, b)), Entry(_short(one.metric), note=note)]
        sheet.add([*labels, *_row(one)], place)
    sheet.remarks += [UNITS, TESTS.format(f"lines ({len(verdicts)})"), *_remarks([one for _, one in verdicts])]
    sheet.remarks += [f"without a partner: {'; '.join(' '.join(row.names) for row in alone)}."] if alone else []
    return sheet


def _note(sheet: Sheet, a: str | None, b: str | None) -> int | None:
    """The footnote of a metric that the two sides measured differently; None where they did not."""
    return None if a == b else sheet.note(f"measured differently: A {a}; B {b}")


def _pair(a: Row, b: Row) -> str:
    """What two rows are, each name once where it is that of both."""
    return " ".join(x if x == y else f"{x} | {y}" for x, y in list(zip(a.names, b.names, strict=True))[1:])


def _protocols(row: Row) -> dict[str, str]:
    """What each metric of a row was measured on."""
    return {one["metric"]: one["protocol"] for one in records(tidy([(next(iter(row.side.draws.values())), None)]))}


def _remarks(verdicts: list[Judged]) -> Iterator[str]:
    """What the names, the tests and the noise of some verdicts mean."""
    yield from dict.fromkeys(
        f"{_short(one.metric)}: {one.metric}." for one in verdicts if _short(one.metric) != one.metric
    )
    if any(one.found.draws != (1, 1) for one in verdicts):
        yield SEVERAL
    yield from _noise(verdicts)


def _row(one: Judged) -> list[Entry]:
    """The entries of a metric behind its name."""
    found = one.found
    shown = "acc" if found.kind == "accuracy" else found.kind
    values = [format_value(shown, value) for value in (found.first, found.second)]
    difference, low, high = (in_unit(found, value) for value in (found.difference, found.low, found.high))
    return [
        *map(Entry, [*values, difference, f"{low} to {high}", p_text(one.adjusted)]),
        Entry(one.word, one.word != UNDECIDED),
    ]


def _short(metric: str) -> str:
    """A metric; an average over tasks says how many there are, because their names fill a column."""
    return f"average of {metric.count(',') + 1} tasks" if "(" in metric else metric


def _noise(verdicts: list[Judged]) -> Iterator[str]:
    for one in verdicts:
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
