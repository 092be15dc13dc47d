"""Fit a sheet to the width of a terminal. A number is never broken: labels are folded, then columns go to a further part.

Parts stand one below the other, each with the labels of the rows; where not even one column has room beside them, every row
becomes a list. Nothing is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len, chop_cells
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ptqbench.results.tables import Column, Entry, Sheet

NARROW = 12
"""Width to which a label or a heading may be folded."""
BREAKS = re.compile(r"[^ _/=,]*[ _/=,]?")
GAP, DENSE_GAP = 3, 2
"""Room between two columns: with a line between them, and without."""
PLAIN = str.maketrans({"±": "~", "↑": "^", "↓": "v", "Δ": "d", "–": "-", "×": "x", "≤": "<", "…": "."})
"""Letters of one column each for terminals that know nothing but ASCII."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Columns that stand side by side, with their widths."""

    places: tuple[int, ...]
    widths: tuple[int, ...]
    dense: bool


def fitted(sheet: Sheet, width: int, ascii_only: bool = False) -> RenderableType:
    """Lay out a sheet so that no line is longer than ``width``, unless a number is.

    Args:
        sheet: Not modified. A model that is the same in every row moves into the title, and other labels where room is short.
        width: Columns of the terminal.
        ascii_only: Whether the terminal can show nothing but ASCII.
    """
    sheet = _with_ascii(sheet) if ascii_only else sheet
    sheet, common = without_common(sheet, ("model",))
    parts = _parts(sheet, width)
    if len(parts) != 1:
        sheet, more = without_common(sheet, ("method", "bitwidth", "nominal", "true", "seeds"))
        common, parts = common + more, _parts(sheet, width)
    title = Text("\n".join([*([sheet.title] if sheet.title else []), *common]))
    tables: list[Table | Text] = [*([_table(sheet, part) for part in parts] or _as_lists(sheet, width))]
    if len(parts) > 1:
        tables = [item for table in tables for item in (table, Text(""))][:-1]
    return Group(*([title] if title.plain else []), *tables)


def without_common(sheet: Sheet, names: Sequence[str]) -> tuple[Sheet, list[str]]:
    """Take out columns of one value without a footnote, as words for the title; one column of labels stays."""
    common, kept = [], list(range(len(sheet.columns)))
    for place, column in enumerate(sheet.columns):
        entries = {row[place] for row in sheet.rows}
        labels = [other for other in kept if not sheet.columns[other].numeric]
        last = labels == [place]
        if column.name in names and len(entries) == 1 and not last and (only := entries.pop()).note is None:
            common.append(f"{_heading(column, ' ')}: {only.text}")
            kept.remove(place)
    rows = [[row[place] for place in kept] for row in sheet.rows]
    return dataclasses.replace(sheet, columns=[sheet.columns[place] for place in kept], rows=rows), common


def _parts(sheet: Sheet, width: int) -> list[_Part]:
    """Columns side by side, in one part where they fit; no part where they never do."""
    everything = tuple(range(len(sheet.columns)))
    least = [_least(sheet, place) for place in everything]
    natural = [max(one, _natural(sheet, place)) for place, one in zip(everything, least, strict=True)]
    for dense, gap in ((False, GAP), (True, DENSE_GAP)):
        if sum(natural) + gap * (len(everything) - 1) <= width:
            return [_Part(everything, tuple(natural), dense)]
    numeric = [column.numeric for column in sheet.columns]
    lead = everything[: numeric.index(True)] if True in numeric else everything
    found: list[_Part] = []
    start = len(lead)
    while start < len(everything) or not found:
        for end in range(len(everything), min(start, len(everything) - 1), -1):
            places = (*lead, *everything[start:end])
            room = width - DENSE_GAP * (len(places) - 1)
            if sum(least[place] for place in places) <= room:
                found.append(
                    _Part(places, _shared_out([natural[p] for p in places], [least[p] for p in places], room), True)
                )
                start = end
                break
        else:
            return []
    return found


def _shared_out(natural: Sequence[int], least: Sequence[int], room: int) -> tuple[int, ...]:
    """Widths between the least and the natural ones that fill the room: the widest column gives way first."""
    widths = list(natural)
    while sum(widths) > room:
        widest = max((place for place, one in enumerate(widths) if one > least[place]), key=widths.__getitem__)
        widths[widest] -= 1
    return tuple(widths)


def _natural(sheet: Sheet, place: int) -> int:
    """Widest entry; a heading of moderate length stays on one line where there is room."""
    entries = max((cell_len(_text(row[place])) for row in sheet.rows), default=1)
    return max(entries, min(cell_len(sheet.columns[place].name), NARROW))


def _least(sheet: Sheet, place: int) -> int:
    """A number needs its whole width; labels and headings are folded down to ``NARROW``."""
    column = sheet.columns[place]
    natural = max((cell_len(_text(row[place])) for row in sheet.rows), default=1)
    heads = max(map(cell_len, BREAKS.findall(_heading(column, " "))), default=1)
    return max(1, natural if column.numeric else min(natural, NARROW), min(heads, NARROW))


def _table(sheet: Sheet, part: _Part) -> Table:
    box, padding = (SIMPLE_HEAD, (0, 1, 0, 0)) if part.dense else (HEAVY_HEAD, (0, 1))
    out = Table(box=box, padding=padding, show_edge=False, pad_edge=False)
    for place, width in zip(part.places, part.widths, strict=True):
        column = sheet.columns[place]
        head = "\n".join(line for piece in (column.group, column.name) for line in folded(piece, width) if piece)
        out.add_column(Text(head), justify="right" if column.numeric else "left", width=width, no_wrap=True)
    for number, row in enumerate(sheet.rows):
        if number in sheet.sections:
            out.add_section()
        cells = zip(part.places, part.widths, strict=True)
        out.add_row(
            *(Text("\n".join(folded(_text(row[p]), width)), style="bold" if row[p].bold else "") for p, width in cells)
        )
    return out


def _as_lists(sheet: Sheet, width: int) -> list[Text]:
    """Every row as a list of its values, each on one line, with its heading or below it."""
    lines = []
    for row in sheet.rows:
        for numeric, members in groupby(zip(sheet.columns, row, strict=True), key=lambda pair: pair[0].numeric):
            if not numeric:
                lines.append(Text(" ".join(_text(entry) for _, entry in members), style="bold"))
                continue
            for column, entry in members:
                value, heading = _text(entry), f"  {_heading(column, ' ')}:"
                beside = cell_len(f"{heading} {value}") <= width
                lines += [] if beside else [Text(heading)]
                lines.append(Text(f"{heading} {value}" if beside else f"    {value}", no_wrap=True, overflow="ignore"))
    return lines


def folded(text: str, width: int) -> list[str]:
    """Break text into lines, behind a space, ``_``, ``/``, ``=`` or comma where there is one.

    >>> folded("gptq rotation_seed=12", 14)
    ['gptq rotation_', 'seed=12']
    """
    lines = [""]
    for word in BREAKS.findall(text):
        pieces = [word] if cell_len(word.rstrip()) <= width else chop_cells(word, width)
        for piece in pieces:
            if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def _heading(column: Column, between: str) -> str:
    return f"{column.group}{between}{column.name}".strip()


def _text(entry: Entry) -> str:
    text = entry.text.replace(" ± ", "±").replace(" ~ ", "~")
    return text if entry.note is None else f"{text} [{entry.note}]"


def as_ascii(text: str) -> str:
    """Text in letters that every terminal has."""
    return text.translate(PLAIN).encode("ascii", "replace").decode()


def _with_ascii(sheet: Sheet) -> Sheet:
    columns = [dataclasses.replace(c, name=as_ascii(c.name), group=as_ascii(c.group)) for c in sheet.columns]
    rows = [[dataclasses.replace(entry, text=as_ascii(entry.text)) for entry in row] for row in sheet.rows]
    return dataclasses.replace(sheet, columns=columns, rows=rows, title=as_ascii(sheet.title))
