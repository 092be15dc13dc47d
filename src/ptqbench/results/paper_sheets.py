"""Paper tables laid out for printing: ``7.14 / 7.1`` in every place, marks, and the reasons below the table.

A reason that holds for a whole table is a line below it. One that holds for a whole row or column is a footnote of its label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby, product

import pandas as pd

from ptqbench.results.figures import Figure
from ptqbench.results.metrics import MISSING, format_value, higher_is_better, known
from ptqbench.results.paper_tables import QUOTED, PaperTable, Place, paper_tables
from ptqbench.results.reported import Value, in_words
from ptqbench.results.tables import Column, Entry, Sheet

BEYOND = "*"
NO_BREAK = "\u00a0"
MOST_DECIMALS = 3
LEGEND = "Ours / reported."
NOISE = (
    f"{BEYOND}: further apart than noise explains: with several seeds, the 95 % interval of a further seed (Student's t); with one "
    "seed, 1.96 standard errors of the evaluation; and half a unit of the last printed digit."
)

Axis = tuple[str | int, ...]
"""Where a printed row or column is: a number of a line, a model, a metric, as far as these run along it."""


def paper_sheets(frame: pd.DataFrame, papers: Sequence[str] = ()) -> list[Sheet]:
    """Lay out the papers' own tables with our figures in them.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.
        papers: As ``paper_tables`` takes them.

    Returns:
        One sheet per table; none where no paper is named and no printed figure belongs to a quantized cell.
    """
    return [paper_sheet(table) for table in paper_tables(frame, papers)]


def paper_sheet(table: PaperTable) -> Sheet:
    """Lay out one table in the paper's shape."""
    grid, section = _Grid(table), _section(table)
    remarks, notes = _notes(grid)
    sheet = Sheet(grid.columns(), title=_title(table))
    sheet.columns = [
        column if at is None else Column(column.name, column.group, note=_number(sheet, notes.get(at, [])))
        for column, at in zip(sheet.columns, grid.column_places, strict=True)
    ]
    before: list[str] = []
    for at in grid.rows:
        labels = grid.labels(at)
        # A label that repeats the one above is left out, as in print; the last one never is.
        shown = [
            "" if before[: n + 1] == labels[: n + 1] and n + 1 < len(labels) else text for n, text in enumerate(labels)
        ]
        before = labels
        lead = [Entry(text) for text in shown]
        lead[-1] = Entry(labels[-1], note=_number(sheet, notes.get(at, [])))
        places = [(key, table.places.get(key)) for key in (grid.key(at, column) for column in grid.across)]
        values = [_entry(key[-1], place, _number(sheet, notes.get(key, []))) for key, place in places]
        sheet.add([*lead, *values], section(labels[0], at))
    sheet.remarks = [*_legend(table), *remarks]
    return sheet


def _section(table: PaperTable) -> Callable[[str, Axis], Hashable]:
    """What rows between two rules share: the model; or whether the paper has them, and the bits where it groups rows by these."""
    if table.down == ("model",):
        return lambda label, at: ""
    if "model" in table.down:
        return lambda label, at: label
    bits = [line.bits for line in table.lines if line.figures]
    grouped = len(list(groupby(bits))) == len(set(bits))
    return lambda label, at: (bool(table.lines[int(at[0])].figures), label if grouped or label == bits[0] else "")


class _Grid:
    """The printed rows and columns of a table."""

    def __init__(self, table: PaperTable) -> None:
        self.table = table
        axes: dict[str, Sequence[str | int]] = {
            "method": range(len(table.lines)), "model": table.models, "metric": table.metrics
        }  # fmt: skip
        self._down = [axis for axis in ("model", "method") if axis in table.down]
        self._across = [axis for axis in ("model", "method") if axis not in table.down] + ["metric"]
        self._several = len(table.metrics) > 1
        rows = product(*(axes[axis] for axis in self._down))
        across = list(product(*(axes[axis] for axis in self._across)))
        # A row or column without any place is none.
        self.rows = [row for row in rows if any(self.key(row, column) in table.places for column in across)]
        self.across = [column for column in across if any(self.key(row, column) in table.places for row in self.rows)]

    def key(self, row: Axis, column: Axis) -> tuple[int, str, str]:
        """The place in a row and a column."""
        found = dict(zip(self._down, row, strict=True)) | dict(zip(self._across, column, strict=True))
        return int(found["method"]), str(found["model"]), str(found["metric"])

    def labels(self, row: Axis) -> list[str]:
        """What stands in front of a row."""
        return [text for axis, at in zip(self._down, row, strict=True) for text in self._words(axis, at)]

    @property
    def column_places(self) -> list[Axis | None]:
        """Which column each printed one is; None for those of labels."""
        return [*[None] * (len(self._down) + ("method" in self._down)), *self.across]

    def columns(self) -> list[Column]:
        """Headings: the first axis that runs across stands above the others."""
        heads = {"model": ["model"], "method": ["bits", "method"]}
        lead = [Column(name, numeric=False) for axis in self._down for name in heads[axis]]
        for column in self.across:
            words = [text for axis, at in zip(self._across, column, strict=True) for text in self._words(axis, at)]
            words = words if self._several or len(words) == 1 else words[:-1]
            lead.append(Column(" ".join(words[1:]) or words[0], words[0] if words[1:] else ""))
        return lead

    def _words(self, axis: str, at: str | int) -> list[str]:
        if axis == "method":
            line = self.table.lines[int(at)]
            # A space before each plus, so that a narrow heading is broken there.
            return [line.bits, line.method if axis in self._down else line.method.replace("+", " +")]
        return [metric_words(str(at)) if axis == "metric" else str(at)]


def metric_words(metric: str) -> str:
    """A metric in a heading, with its direction."""
    if not metric:
        return ""
    words = f"avg of {metric.count(',') + 1}" if metric.startswith("average of ") else in_words(metric)
    return f"{words}{NO_BREAK}{'↑' if higher_is_better(metric) else '↓'}"


def _notes(grid: _Grid) -> tuple[list[str], dict[Axis, list[str]]]:
    """Where each reason is said: below the table, or as a footnote of a column, a row or a place."""
    table = grid.table
    rows = {row: [key for column in grid.across if (key := grid.key(row, column)) in table.places] for row in grid.rows}
    columns = {c: [key for row in grid.rows if (key := grid.key(row, c)) in table.places] for c in grid.across}
    remarks: list[str] = []
    notes: dict[Axis, list[str]] = {}
    lines_down = "method" in table.down
    for at in grid.rows if lines_down else grid.across:  # what the paper's method is called here
        line = table.lines[int(at[-1] if lines_down else at[0])]
        if line.names and line.names != [line.method]:
            notes[at] = [f"here: {', '.join(line.names)}"]
    # A reason against comparing can hold where there are both figures; one why ours is missing, where there is a cell.
    with_cell = {key: place for key, place in table.places.items() if place.ours}
    compared = {key: place for key, place in with_cell.items() if place.figure}
    for could_be, kind in ((compared, "why"), (with_cell, "unmeasured"), (table.places, "absent")):
        could, said = set(could_be), dict[str, set[Axis]]()
        for key, place in could_be.items():
            for reason in getattr(place, kind):
                said.setdefault(reason, set()).add(key)
        for reason, holders in said.items():
            if holders == could and len(could) > 1:
                remarks.append(f"Everywhere: {reason}.")
                continue
            for labels in (columns, rows):
                for at, keys in labels.items():
                    here = could.intersection(keys)
                    if len(here) > 1 and here <= said[reason] and here & holders:
                        notes.setdefault(at, []).append(reason)
                        holders = holders - here
            for place_key in holders:
                notes.setdefault(place_key, []).append(reason)
    return remarks, notes


def _number(sheet: Sheet, reasons: Sequence[str]) -> int | None:
    return sheet.note("; ".join(reasons)) if reasons else None


def _entry(metric: str, place: Place | None, note: int | None) -> Entry:
    if place is None:
        return Entry(MISSING)
    reported = place.figure.text if place.figure else MISSING
    return Entry(
        f"{_ours(metric, place.ours, place.figure)}{BEYOND if place.beyond_noise else ''} / {reported}", note=note
    )


def _ours(metric: str, ours: Value | None, figure: Figure | None) -> str:
    """Our value: an accuracy with the decimals of the printed one, at least one; a perplexity with one more, at most three."""
    if ours is None:
        return MISSING
    if figure is None or figure.decimals < 0 or not math.isfinite(ours.mean) or ours.mean >= 1e4:
        return format_value(metric, ours.mean)
    if known(metric).share:
        return f"{100 * ours.mean:.{max(figure.decimals, 1)}f}"
    return f"{ours.mean:.{min(figure.decimals + 1, MOST_DECIMALS)}f}"


def _title(table: PaperTable) -> str:
    source = f" (arXiv {table.arxiv})" if table.arxiv else ""
    where = {"": "", QUOTED: ", as quoted by others"}.get(table.table, f", {table.table}")
    metric = f": {metric_words(table.metrics[0])}" if len(table.metrics) == 1 and table.metrics[0] else ""
    return f"{table.paper}{source}{where}{metric}"


def _legend(table: PaperTable) -> list[str]:
    """What the numbers and marks mean, and how many there are."""
    places = list(table.places.values())
    printed, both = _number_of(places), [place for place in places if not math.isnan(place.noise)]
    if not printed:
        return [LEGEND, f"No figure of {table.paper} that ptqbench knows belongs to these cells."]
    alike = [place for place in both if not place.why]
    beyond = _number_of(place for place in alike if place.beyond_noise)
    counted = f"None of the {printed} printed figures has one of ours beside it yet."
    if both:
        counted = f"Of {printed} printed figures, {_number_of(both)} have one of ours beside them, {_number_of(alike)} by the "
        counted += f"same protocol; of these, {beyond} beyond the noise."
    seeds = sorted({place.ours.seeds for place in places if place.ours} - {0, 1})
    return [
        f"{LEGEND} {counted}",
        *([NOISE] if any(place.beyond_noise for place in both) else []),
        *([f"Ours: mean over {' or '.join(map(str, seeds))} seeds where there are several."] if seeds else []),
        *(
            [f"Also printed there, for models that are not here: {', '.join(table.absent_models)}."]
            * bool(table.absent_models)
        ),
    ]


def _number_of(places: Iterable[Place]) -> int:
    """Number of printed figures in these places; one that several cells of ours belong to counts once."""
    return len({id(place.figure) for place in places if place.figure})
