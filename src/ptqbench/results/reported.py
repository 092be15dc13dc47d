"""The papers' figures beside ours: what was reported, what we measured, the difference, and whether the two may be compared.

A figure is judged only where calibration, evaluation and options are those of the paper's protocol; otherwise the table says why
not. A second-hand figure (one paper quoting another) is shown and never judged. ``paper_tables`` shows the same figures in the
shape of the papers' tables.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pandas as pd

from ptqbench.errors import ConfigError
from ptqbench.results.figures import Figure, average_of, figures, load, objections, same_cell
from ptqbench.results.metrics import MISSING, format_spread, format_value, known
from ptqbench.results.tables import KEYS, Column, Entry, Sheet, pivot, records, task_average
from ptqbench.results.tables.pivot import NOT_MEASURED

PERPLEXITY_TOLERANCE = 0.05
"""Relative difference of perplexities up to which two figures agree: seeds, hardware and library versions move more than 1 %."""
ACCURACY_TOLERANCE = 0.015
"""Difference of accuracies up to which two figures agree, as a fraction: about two standard errors of 2000 questions."""
AGREES, DIFFERS, NO_RESULT = "agrees", "differs", "no result"
INCOMPARABLE, SECOND_HAND = "not comparable", "second-hand"
RESULT = [
    *KEYS, "metric", "reported", "ours", "spread", "delta", "verdict", "missing", "why", "paper", "table", "provenance", "protocol",
    "note", "printed",
]  # fmt: skip


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Join the papers' figures to cells.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.

    Returns:
        One row per pair of a table's row (seeds averaged) and a printed figure, in the table's order. ``verdict`` is one of
        agrees, differs, not comparable, second-hand, no result. ``why`` says what stands against a comparison, ``missing`` why
        there is no value of ours.
    """
    printed, words = load()
    cells = frame.dropna(subset=["model", "solver"])
    ours, rows = Ours(cells, words), []
    for cell in records(cells.drop_duplicates(KEYS)):
        for figure in figures(printed[printed["model"] == cell["model"]], words):
            if same_cell(cell, figure):
                rows.append(_pair(cell, figure, ours.value(key_of(cell), figure.metric)))
    order = {key: place for place, key in enumerate(ours.keys)}
    rows.sort(key=lambda row: order[key_of(row)])
    return pd.DataFrame(rows, columns=RESULT)


Key = tuple[str, ...]


def key_of(cell: dict[str, Any]) -> Key:
    """The names of a row of a table: model, method, bitwidth."""
    return tuple(cell[name] for name in KEYS)


@dataclasses.dataclass(frozen=True)
class Value:
    """What a row of a table has of a metric.

    Attributes:
        mean: Mean over seeds; NaN where there is none.
        spread: Sample standard deviation over seeds; NaN for one seed.
        error: Standard error of the mean; of the evaluation where there is one seed.
        seeds: Number of seeds.
        measured_on: The protocol in words.
        missing: Why there is no value; empty where there is one.
    """

    mean: float
    spread: float
    error: float
    seeds: int
    measured_on: str
    missing: str


class Ours:
    """Values of cells by row and metric, with the averages over the papers' task sets.

    Attributes:
        keys: The rows in the order of a table.
        metrics: Names of what was measured, without the numbers that tell protocols apart.
    """

    def __init__(self, cells: pd.DataFrame, words: dict[str, Any]) -> None:
        self._refusals: dict[str, str] = {}
        averaged = cells
        for tasks in sorted(
            {tuple(protocol["tasks"]) for protocol in words["protocols"].values() if "tasks" in protocol}
        ):
            try:
                more = task_average(averaged, tasks)
            except ConfigError as error:
                self._refusals[average_of(tasks)] = str(error)
                continue
            # The new rows get the names of the tasks.
            old = more.index < len(averaged)
            averaged = more.assign(metric=more["metric"].where(old, average_of(tasks)))
        found = pivot(averaged)
        self.keys = [cast("Key", key) for key in found.mean.index]
        self.metrics = list(dict.fromkeys(name.split("@")[0] for name in found.mean.columns))
        self._columns = {m: [name for name in found.mean.columns if name.split("@")[0] == m] for m in self.metrics}
        self._found = found
        # Plain dictionaries, because single look-ups in a frame are slow.
        self._mean, self._spread, self._error, self._count = (
            cast("dict[Key, dict[str, float]]", one.to_dict("index"))
            for one in (found.mean, found.spread, found.error, found.count)
        )

    def value(self, key: Key, metric: str) -> Value:
        """The value of a row; of the first protocol that has one, where a metric was measured under several."""
        for column in self._columns.get(metric, ()):
            if not math.isnan(mean := self._mean[key][column]):
                spread, error, seeds = (one[key][column] for one in (self._spread, self._error, self._count))
                return Value(mean, spread, error, int(seeds), self._found.protocols[column], "")
        missing = self._found.reasons.get(key) or self._refusals.get(metric) or NOT_MEASURED
        return Value(math.nan, math.nan, math.nan, 0, "", missing)


def _pair(cell: dict[str, Any], figure: Figure, ours: Value) -> dict[str, Any]:
    """One row of the result: a figure beside the mean of a cell's row."""
    reasons = objections(cell, figure, ours.measured_on)
    names = {name: cell[name] for name in KEYS} | {"metric": figure.metric}
    values = {"reported": figure.value, "ours": ours.mean, "spread": ours.spread, "delta": ours.mean - figure.value}
    said = {"verdict": _verdict(figure, ours.mean, bool(reasons)), "missing": ours.missing, "why": "; ".join(reasons)}
    source = {name: figure.row[name] for name in ("paper", "table", "provenance", "protocol", "note")}
    return names | values | said | source | {"printed": figure.text}


def _verdict(figure: Figure, ours: float, objections: bool) -> str:
    if figure.row["provenance"] == "second_hand":
        return SECOND_HAND
    if pd.isna(ours):
        return NO_RESULT
    if objections:
        return INCOMPARABLE
    relative = not known(figure.metric).share
    difference = abs(ours - figure.value) / (figure.value if relative else 1.0)
    return AGREES if difference <= (PERPLEXITY_TOLERANCE if relative else ACCURACY_TOLERANCE) else DIFFERS


def check_sheet(found: pd.DataFrame, title: str = "", brief: bool = False) -> Sheet:
    """Lay out what ``check`` returned. Footnotes say why two figures may not be compared.

    Args:
        found: As ``check`` returns it, not modified.
        title: Printed above.
        brief: For a terminal: model and bitwidth stand above their rows instead of in every row, and the source of a figure is
            a footnote too.
    """
    labels = ["method", "metric"] if brief else [*KEYS, "metric"]
    columns = [*labels, "reported", "ours", "delta", "verdict", *([] if brief else ["source"])]
    sheet = Sheet([Column(name, numeric=name in ("reported", "ours", "delta")) for name in columns], title=title)
    previous = None
    for row in records(found):
        group = row["model"], row["bitwidth"]
        if brief and group != previous:
            sheet.add([*(Entry(name, bold=True) for name in group), *[Entry("")] * (len(columns) - 2)], group)
        previous = group
        sheet.add(_check_row(sheet, row, brief), group)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in found["verdict"].value_counts().items())
    summary = counted or "no printed figure belongs to these cells"
    sheet.remarks = [
        f"{summary}.",
        f"agrees: within {100 * PERPLEXITY_TOLERANCE:g} % of a perplexity or {100 * ACCURACY_TOLERANCE:g} points of an accuracy, "
        "and nothing stands against the comparison. Second-hand figures are never judged.",
    ]
    return sheet


def _check_row(sheet: Sheet, row: dict[str, Any], brief: bool) -> list[Entry]:
    metric, missing, why = row["metric"], row["missing"], row["why"]
    source = f"{row['paper']}, {row['table']} ({row['provenance'].replace('_', ' ')})"
    printed, name = row["printed"], brief_name(metric)
    if brief:
        lead = [Entry(row["method"]), Entry(in_words(name))]
        reported, rest = Entry(printed, note=sheet.note(source)), []
    else:
        lead, reported, rest = [*(Entry(row[key]) for key in KEYS), Entry(name)], Entry(printed), [Entry(source)]
    ours = Entry(format_spread(metric, row["ours"], row["spread"]), note=sheet.note(missing) if missing else None)
    verdict = Entry(row["verdict"], note=sheet.note(why) if why else None)
    return [*lead, reported, ours, Entry(_delta(metric, row["delta"])), verdict, *rest]


def brief_name(metric: str) -> str:
    """A metric; an average over tasks says how many there are, because their names fill a line."""
    if not metric.startswith("average of "):
        return metric
    return f"average of {metric.count(',') + 1}/acc"


def in_words(metric: str) -> str:
    """A metric for a narrow column: ``wikitext2 ppl``."""
    return metric.replace("/perplexity", " ppl").replace("/", " ")


def _delta(metric: str, delta: float) -> str:
    if pd.isna(delta):
        return MISSING
    sign = "+" if delta >= 0 else "-"
    return sign + format_value(metric, abs(delta))
