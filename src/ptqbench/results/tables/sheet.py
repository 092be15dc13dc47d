"""What a printed table consists of, whatever it is printed as: columns, cells, sections and footnotes; and the comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd

from ptqbench.errors import ConfigError
from ptqbench.evaluate.records import LARGEST
from ptqbench.results.metrics import (
    AVERAGE,
    MISSING,
    format_bits,
    format_nominal,
    format_spread,
    higher_is_better,
    kind,
)
from ptqbench.results.tables.names import KEYS
from ptqbench.results.tables.pivot import BITS, NOT_MEASURED, Pivot, best, pivot, task_average

BOLD = (
    "Bold: best of a model and bitwidth, and what is within the spread of the difference to it "
    "(over seeds where there are several, else the standard error of the evaluation)."
)
SPREAD = "±: sample standard deviation over seeds."
INFINITE = f"inf: a perplexity above {LARGEST:.0e} in one seed or more."


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: an optional heading over several columns, its own heading, whether it holds numbers, and may be wrapped."""

    name: str
    group: str = ""
    numeric: bool = True
    wrap: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One cell of a printed table; ``note`` counts from 1."""

    text: str
    bold: bool = False
    note: int | None = None


@dataclasses.dataclass
class Sheet:
    """A table to print. ``sections`` lists the rows before which a line is drawn."""

    columns: list[Column]
    rows: list[list[Entry]] = dataclasses.field(default_factory=list)
    sections: list[int] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    title: str = ""

    def note(self, text: str) -> int:
        """Number a footnote; equal words share a number."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def comparison_sheet(
    frame: pd.DataFrame, title: str = "", columns: Sequence[str] = ("metric",), brief: bool = False
) -> Sheet:
    """Lay out the comparison of a tidy frame.

    Args:
        frame: As ``tidy`` returns it, not modified.
        title: Printed above.
        columns: ``["model", "metric"]`` gives every model its own columns, as papers do; ``["metric"]`` one row per model.
        brief: Where cells have several tasks, show their average alone, without a column per task.

    Returns:
        The sheet. Nominal and true bits stand side by side; a missing value is a dash with a footnote.
    """
    remarks = []
    try:
        frame = task_average(frame)
    except ConfigError as refusal:
        remarks.append(f"{refusal}.")
    found = pivot(frame)
    metrics = list(found.mean.columns)
    if brief and any(name.startswith(AVERAGE) for name in metrics):
        metrics = [name for name in metrics if kind(name) == "perplexity" or name.startswith(AVERAGE)]
        remarks.append("The scores of single tasks: --format md or csv.")
    wide, look = "model" in columns and found.mean.index.get_level_values("model").nunique() > 1, _Lookup(found)
    sheet = _by_model(look, metrics) if wide else _by_row(look, metrics)
    sheet.title = title
    sheet.remarks = [*_legend(found, metrics, look), *remarks, *_unknown(frame)]
    return sheet


class _Lookup:
    """A comparison as plain dictionaries: a thousand single look-ups in a frame take a second."""

    def __init__(self, found: Pivot) -> None:
        self.reasons, marks = found.reasons, best(found)
        self.several = bool((found.bits["n_seeds"] > 1).any())
        self.any_bold = bool(marks.any(axis=None))
        self.bits, self.mean, self.spread, self.count, self.marks = (
            {cast("tuple[str, ...]", key): row for key, row in frame.to_dict("index").items()}
            for frame in (found.bits, found.mean, found.spread, found.count, marks)
        )

    def entry(self, sheet: Sheet, key: tuple[str, ...], metric: str) -> Entry:
        """One value as it is printed: with its spread, bold, or a dash with the reason."""
        if key not in self.mean:
            return Entry(MISSING, note=sheet.note("not part of this table"))
        value = self.mean[key][metric]
        if pd.isna(value):
            return Entry(MISSING, note=sheet.note(self.reasons.get(key, NOT_MEASURED)))
        text, count = format_spread(metric, value, self.spread[key][metric]), self.count[key][metric]
        text += "" if count == self.bits[key]["n_seeds"] else f" (n={count})"
        return Entry(text, bool(self.marks[key][metric]))

    def partly(self, sheet: Sheet, key: tuple[str, ...]) -> int | None:
        """Footnote at the name of a row that has values although some of its cells have none, or no place for a dash."""
        values = self.mean[key].values()
        somewhere = not values or any(pd.notna(value) for value in values)
        return sheet.note(self.reasons[key]) if key in self.reasons and somewhere else None


def _by_row(look: _Lookup, metrics: list[str]) -> Sheet:
    heads = [Column(key, numeric=False) for key in KEYS]
    heads += [Column("nominal", "w bits"), Column("true", "w bits"), *([Column("seeds")] if look.several else [])]
    sheet = Sheet(heads + [Column(heading(name), name.rpartition("/")[0]) for name in metrics])
    previous = None
    for place, key in enumerate(look.mean):
        if previous is not None and (key[0], key[2]) != previous:
            sheet.sections.append(place)
        previous = key[0], key[2]
        bits = look.bits[key]
        lead = [*key, format_nominal(bits["nominal_w_bits"]), format_bits(bits["effective_w_bits"])]
        entries = [Entry(text) for text in [*lead, *([str(bits["n_seeds"])] if look.several else [])]]
        entries[1] = Entry(key[1], note=look.partly(sheet, key))
        sheet.rows.append(entries + [look.entry(sheet, key, name) for name in metrics])
    return sheet


def _by_model(look: _Lookup, metrics: list[str]) -> Sheet:
    models = list(dict.fromkeys(key[0] for key in look.mean))
    heads = [Column(key, numeric=False) for key in KEYS[1:]] + [Column("nominal", "w bits"), Column("true", "w bits")]
    sheet = Sheet(heads + [Column(short(name), model) for model in models for name in metrics])
    methods: dict[str, dict[str, None]] = {}
    for _, method, width in look.mean:
        methods.setdefault(width, {})[method] = None
    for width, named in methods.items():
        sheet.sections += [len(sheet.rows)] if sheet.rows else []
        for method in named:
            keys = [(model, method, width) for model in models]
            bits = [look.bits[key] for key in keys if key in look.bits]
            nominal, true = ([b[name] for b in bits] for name in BITS)
            lead = [method, width, _range(nominal, "g"), _range(true, ".2f")]
            notes = [look.partly(sheet, key) for key in keys if key in look.mean]
            entries = [Entry(text) for text in lead]
            entries[0] = Entry(method, note=next((note for note in notes if note is not None), None))
            sheet.rows.append(entries + [look.entry(sheet, key, name) for key in keys for name in metrics])
    return sheet


def heading(metric: str) -> str:
    """The last words of a metric with its direction: an arrow to the better side."""
    return f"{metric.rpartition('/')[2]} {'↑' if higher_is_better(metric) else '↓'}"


def short(metric: str) -> str:
    """A metric in one line for a narrow column."""
    label = metric.rpartition("/")[0]
    return f"{label} {heading(metric)}"


def _range(values: list[float], style: str) -> str:
    texts = [f"{value:{style}}" for value in sorted(values) if pd.notna(value)]
    if not texts:
        return MISSING
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}-{texts[-1]}"


def _legend(found: Pivot, metrics: list[str], look: _Lookup) -> list[str]:
    lines = [BOLD] if look.any_bold else []
    if found.spread.notna().any(axis=None):
        counts = sorted(set(found.count.where(found.mean.notna(), 0).to_numpy().ravel().tolist()) - {0, 1})
        lines.append(f"{SPREAD} n = {' or '.join(map(str, counts))}.")
    lines += [INFINITE] if np.isinf(found.mean[metrics]).any(axis=None) else []
    lines += [f"{name}: {found.protocols[name]}." for name in metrics if "@" in name or name.startswith(AVERAGE)]
    return lines


def _unknown(frame: pd.DataFrame) -> list[str]:
    """Cells that no row can show, because nothing says what they are."""
    lost = frame[frame["model"].isna()]
    return [f"{run_id}: {reason}" for run_id, reason in zip(lost["run_id"], lost["reason"], strict=True)]
