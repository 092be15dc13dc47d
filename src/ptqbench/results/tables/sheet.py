"""A table before it is printed: columns, rows, sections and footnotes; and the comparison laid out as such a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import cast

import numpy as np
import pandas as pd

from ptqbench.evaluate.records import LARGEST
from ptqbench.results.metrics import AVERAGE, KINDS, MISSING, format_nats, format_spread, higher_is_better, kind, known
from ptqbench.results.tables.names import KEYS
from ptqbench.results.tables.pivot import BITS, NOT_MEASURED, Pivot, averaged, best, pivot

BOLD = (
    "Bold: best of a model and bitwidth, and what is within the spread of the difference to it "
    "(over seeds where there are several, else the standard error of the evaluation)."
)
SPREAD = "±: sample standard deviation over seeds."
WIDEST = 24
"""Characters of a label that stand on one line."""
PADDING = 2
"""Characters that stand for the space between two columns."""
INFINITE = f"inf: a perplexity above {LARGEST:.0e} in one seed or more."


Key = tuple[str, ...]
"""Names of a row of the comparison: model, method, bitwidth."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        group: A heading above it, which it shares with its neighbours of the same group.
        numeric: Whether it holds numbers; they are aligned to the right and never broken.
        note: Number of a footnote of its heading, counted from 1.
    """

    name: str
    group: str = ""
    numeric: bool = True
    note: int | None = None


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
    _group: Hashable = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def add(self, row: list[Entry], group: Hashable) -> None:
        """Append a row. A new section begins where its group is not that of the row above."""
        if self.rows and group != self._group:
            self.sections.append(len(self.rows))
        self._group = group
        self.rows.append(row)

    def note(self, text: str) -> int:
        """Number a footnote; equal words share a number."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1

    def below(self) -> list[str]:
        """The lines below a printed table: footnotes with their numbers, then remarks."""
        return [*(f"[{number}] {text}" for number, text in enumerate(self.notes, 1)), *self.remarks]

    def parts(self, width: int) -> list[Sheet]:
        """Cut a sheet that is wider than this many characters into several, each with the labels of the rows.

        Returns:
            Sheets of the same rows; the title stands over the first, footnotes and remarks below the last.
        """
        lead, needed = self.lead(), self.widths()
        room = width - sum(needed[place] for place in lead)
        if sum(needed) <= width:
            return [self]
        sheets = [
            dataclasses.replace(
                self, columns=[self.columns[n] for n in group], rows=[[row[n] for n in group] for row in self.rows],
                title="", notes=[], remarks=[],
            )
            for group in (lead + more for more in self.packed(needed, room))
        ]  # fmt: skip
        sheets[0].title, sheets[-1].notes, sheets[-1].remarks = self.title, self.notes, self.remarks
        return sheets

    def widths(self) -> list[int]:
        """Characters that every column needs with the space behind it. A heading may be broken at spaces, a label at ``WIDEST``."""
        found = []
        for place, column in enumerate(self.columns):
            widest = max((len(row[place].text) for row in self.rows), default=0)
            head = max(map(len, column.name.split(" ")))
            found.append(max(head, widest if column.numeric else min(widest, WIDEST)) + PADDING)
        return found

    def lead(self) -> tuple[int, ...]:
        """Places of the leading columns, which hold the labels of the rows."""
        return tuple(takewhile(lambda place: not self.columns[place].numeric, range(len(self.columns))))

    def packed(self, needed: Sequence[int], room: int) -> list[tuple[int, ...]]:
        """Distribute the columns behind the labels over parts, from left to right.

        Args:
            needed: Width of every column.
            room: Width of a part without labels.

        Returns:
            Places of the columns of every part. A group of columns is broken only where it is wider than a part, and does then
            not share a part with another broken one. A part is wider than the room only where a single column is.
        """
        parts: list[tuple[int, ...]] = [()]
        behind, broken = range(len(self.lead()), len(self.columns)), False
        for _, members in groupby(behind, key=lambda place: self.columns[place].group or place):
            whole = tuple(members)
            fits = sum(needed[place] for place in whole) <= room
            if broken:
                parts.append(())
            for unit in [whole] if fits else [(place,) for place in whole]:
                if parts[-1] and sum(needed[place] for place in parts[-1] + unit) > room:
                    parts.append(())
                parts[-1] += unit
            broken = not fits and len(whole) > 1
        return parts

    def groups(self) -> list[tuple[str, int]]:
        """Group headings from left to right with the number of columns below each; empty where no column has one."""
        spans = [(group, len(list(members))) for group, members in groupby(self.columns, key=lambda c: c.group)]
        return spans if any(group for group, _ in spans) else []


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
    frame, remarks = averaged(frame)
    found = pivot(frame)
    metrics = list(found.mean.columns)
    if brief and (fewer := main_metrics(metrics)) != metrics:
        metrics = fewer
        remarks.append("The scores of single tasks: --format md or csv.")
    look = _Lookup(found)
    sheet = _lay_out(look, metrics, "model" in columns and found.mean.index.get_level_values("model").nunique() > 1)
    sheet.title = title
    sheet.remarks = [*_legend(found, metrics, look), *remarks, *_unknown(frame)]
    return sheet


def main_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics of texts and the averages over tasks; all metrics where there is no average."""
    fewer = [name for name in metrics if known(name).of_text or name.startswith(AVERAGE)]
    return fewer if any(name.startswith(AVERAGE) for name in metrics) else list(metrics)


class _Lookup:
    """A comparison as plain dictionaries, because single look-ups in a frame are slow: a thousand take a second."""

    def __init__(self, found: Pivot) -> None:
        self.reasons, self.deviations, marks = found.reasons, found.deviations, best(found)
        self.several = bool((found.bits["n_seeds"] > 1).any())
        self.any_bold = bool(marks.any(axis=None))
        self.bits, self.mean, self.spread, self.count, self.marks = (
            {cast("Key", key): row for key, row in frame.to_dict("index").items()}
            for frame in (found.bits, found.mean, found.spread, found.count, marks)
        )

    def entry(self, sheet: Sheet, key: Key, metric: str) -> Entry:
        """One value as it is printed: with its spread, perhaps bold; a dash with the reason where there is none."""
        if key not in self.mean:
            return Entry(MISSING, note=sheet.note("not part of this table"))
        value = self.mean[key][metric]
        if pd.isna(value):
            return Entry(MISSING, note=sheet.note(self.reasons.get(key, NOT_MEASURED)))
        text, count = format_spread(metric, value, self.spread[key][metric]), self.count[key][metric]
        text += "" if count == self.bits[key]["n_seeds"] else f" (n={count})"
        return Entry(text, bool(self.marks[key][metric]))

    def about(self, key: Key, wide: bool) -> list[str]:
        """Footnotes for the name of a row: why some of its cells have no value, where no dash says so, and its deviations."""
        values = self.mean[key].values()
        somewhere = not values or any(pd.notna(value) for value in values)
        reason = [self.reasons[key]] if key in self.reasons and somewhere else []
        deviation = self.deviations.get(key)
        return reason + ([] if deviation is None else [f"{key[0]}: {deviation}" if wide else deviation])


def _lay_out(look: _Lookup, metrics: list[str], wide: bool) -> Sheet:
    """The table itself; ``wide`` gives every model its own columns."""
    models, seeds = dict.fromkeys(key[0] for key in look.mean), look.several and not wide
    heads = [Column(key, numeric=False) for key in (KEYS[1:] if wide else KEYS)]
    heads += [Column("nominal", "w bits"), Column("true", "w bits"), *([Column("seeds")] if seeds else [])]
    if wide:
        heads += [Column(short(name), model) for model in models for name in metrics]
    else:
        heads += [Column(heading(name), name.rpartition("/")[0]) for name in metrics]
    sheet = Sheet(heads)
    for keys in _by_model(look.mean, models) if wide else ([key] for key in look.mean):
        # What the row is called, with a footnote at its method where a cell behind it has no value or departs from the method.
        known = [key for key in keys if key in look.mean]
        model, method, width = keys[0]
        said = dict.fromkeys(words for key in known for words in look.about(key, wide))
        lead = [Entry(method, note=sheet.note("; ".join(said)) if said else None), Entry(width)]
        # Its bits, as a range where models differ, and its values.
        bits = [[look.bits[key][name] for key in known] for name in BITS]
        numbers = [
            _range(bits[0], "g"),
            _range(bits[1], ".2f"),
            *([str(look.bits[keys[0]]["n_seeds"])] if seeds else []),
        ]
        values = [look.entry(sheet, key, name) for key in keys for name in metrics]
        row = [*([] if wide else [Entry(model)]), *lead, *map(Entry, numbers), *values]
        sheet.add(row, width if wide else (model, width))
    return sheet


def _by_model(keys: Iterable[Key], models: Iterable[str]) -> Iterator[list[Key]]:
    """For every method and bitwidth its row in each model, known or not; rows of one bitwidth stand together."""
    pairs = dict.fromkeys(key[1:] for key in keys)
    widths = list(dict.fromkeys(width for _, width in pairs))
    for method, width in sorted(pairs, key=lambda pair: widths.index(pair[1])):
        yield [(model, method, width) for model in models]


def heading(metric: str) -> str:
    """The last part of a metric's name with an arrow: up where higher is better."""
    return f"{metric.rpartition('/')[2]} {'↑' if higher_is_better(metric) else '↓'}"


def short(metric: str) -> str:
    """A metric's whole name on one line, with its arrow."""
    return f"{metric.rpartition('/')[0]} {heading(metric)}"


def _range(values: list[float], style: str) -> str:
    """The smallest and the largest of some numbers, once where they print alike; a dash where there is none."""
    texts = [f"{value:{style}}" for value in sorted(values) if pd.notna(value)]
    if not texts:
        return MISSING
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}-{texts[-1]}"


def _legend(found: Pivot, metrics: list[str], look: _Lookup) -> list[str]:
    """What bold, plus-minus and inf mean where they occur, and what numbered and averaged metrics were measured on."""
    lines = [BOLD] if look.any_bold else []
    if found.spread.notna().any(axis=None):
        counts = sorted(set(found.count.where(found.mean.notna(), 0).to_numpy().ravel().tolist()) - {0, 1})
        lines.append(f"{SPREAD} n = {' or '.join(map(str, counts))}.")
    lines += [INFINITE] if np.isinf(found.mean[metrics]).any(axis=None) else []
    lines += [f"{name}: {KINDS[name].meaning}." for name in dict.fromkeys(map(kind, metrics)) if known(name).meaning]
    lines += _noise_floors(found, metrics)
    lines += [f"{name}: {found.protocols[name]}." for name in metrics if "@" in name or name.startswith(AVERAGE)]
    return lines


def _noise_floors(found: Pivot, metrics: list[str]) -> list[str]:
    """A line for each metric with a value, or a difference between values of a model and bitwidth, within its noise floor."""
    lines = []
    for metric in metrics:
        floor = found.noise[metric]
        # The smallest of a group is compared with zero, every other value with the next smaller one.
        groups = found.mean[metric].sort_values(kind="stable").groupby(level=["model", "bitwidth"], sort=False)
        steps = groups.diff().fillna(found.mean[metric]).reindex(floor.index)
        if ((steps <= floor) & (floor > 0)).any():
            lines.append(
                f"{metric}: differences of up to {format_nats(floor.max())} nats are noise: the unquantized model "
                "differs from itself by as much in other batches."
            )
    return lines


def _unknown(frame: pd.DataFrame) -> list[str]:
    """A line for each cell that no row can show, because its model is unknown."""
    lost = frame[frame["model"].isna()]
    return [f"{run_id}: {reason}" for run_id, reason in zip(lost["run_id"], lost["reason"], strict=True)]
