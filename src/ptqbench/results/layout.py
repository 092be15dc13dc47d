"""Fit a sheet to the width of a terminal without breaking a number or leaving anything out.

Where a sheet is too wide, its labels are folded first. Where that is not enough, it is printed in several parts, one below the
other, each with the labels of the rows. Where not even one column of numbers has room beside the labels, every row becomes a list.
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

from ptqbench.results.tables import Column, Entry, Sheet, with_head_notes

NARROW = 12
"""Width to which a label or a heading may be folded."""
BREAKS = re.compile(r"[^ ]* ?"), re.compile(r"[^/=,]*[/=,]?"), re.compile(r"[^_]*_?")
"""Pieces of a label, from coarse to fine: behind a space; behind ``/``, ``=`` or a comma; behind an underscore."""
GAP, DENSE_GAP = 3, 2
"""Room between two columns: with a line between them, and without."""
PLAIN = str.maketrans({"±": "~", "↑": "^", "↓": "v", "Δ": "d", "–": "-", "×": "x", "≤": "<", "…": ".", "\u00a0": " "})
"""Replacements, each as wide as the original, for terminals that can show ASCII alone."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Columns that stand side by side, with their widths."""

    places: tuple[int, ...]
    widths: tuple[int, ...]
    dense: bool


def fitted(sheet: Sheet, width: int, ascii_only: bool = False) -> RenderableType:
    """Lay out a sheet so that no line is longer than ``width``, unless a single number is.

    Args:
        sheet: Not modified. A model that all rows share moves into the title; where room is short, other labels do too.
        width: Columns of the terminal.
        ascii_only: Whether the terminal can show nothing but ASCII.
    """
    sheet = with_head_notes(_with_ascii(sheet) if ascii_only else sheet)
    sheet, common = without_common(sheet, ("model",))
    parts = _parts(sheet, width)
    if len(parts) != 1:  # too wide: take out every label that all rows share, and try again
        sheet, more = without_common(sheet, ("method", "bitwidth", "nominal", "true", "seeds"))
        common, parts = common + more, _parts(sheet, width)
    title = Text("\n".join([*([sheet.title] if sheet.title else []), *common]))
    tables: list[RenderableType] = [*([_table(sheet, part) for part in parts] or _as_lists(sheet, width))]
    if len(parts) > 1:  # an empty line between parts
        tables = [item for table in tables for item in (table, Text(""))][:-1]
    return Group(*([title] if title.plain else []), *tables)


def without_common(sheet: Sheet, names: Sequence[str]) -> tuple[Sheet, list[str]]:
    """Take out the named columns that hold one value and no footnote; at least one column of labels stays.

    Returns:
        The sheet without them, and what they said: ``model: tiny``.
    """
    common, kept = [], list(range(len(sheet.columns)))
    for place, column in enumerate(sheet.columns):
        entries = {row[place] for row in sheet.rows}
        labels = [other for other in kept if not sheet.columns[other].numeric]
        last = labels == [place]
        if column.name in names and len(entries) == 1 and not last and (only := entries.pop()).note is None:
            common.append(f"{_heading(column)}: {only.text}")
            kept.remove(place)
    rows = [[row[place] for place in kept] for row in sheet.rows]
    return dataclasses.replace(sheet, columns=[sheet.columns[place] for place in kept], rows=rows), common


def _parts(sheet: Sheet, width: int) -> list[_Part]:
    """Columns side by side, in one part where they fit; no part where they never do."""
    places = tuple(range(len(sheet.columns)))
    widths = [_widths(sheet, place) for place in places]
    least, natural = [one for one, _ in widths], tuple(one for _, one in widths)
    # Everything at its natural width, with lines between the columns or without.
    for dense, gap in ((False, GAP), (True, DENSE_GAP)):
        if sum(natural) + gap * (len(places) - 1) <= width:
            return [_Part(places, natural, dense)]
    # As many columns at their least width as fit beside the labels; the others go to further parts.
    lead, needed = sheet.lead(), [one + DENSE_GAP for one in least]
    room = width + DENSE_GAP - sum(needed[place] for place in lead)
    if max(needed[len(lead) :], default=0) > room:
        return []
    groups = [lead + more for more in sheet.packed(needed, room)]
    # What room is left over is given back to the columns of a part.
    return [_Part(group, _shared_out(group, natural, least, width), True) for group in groups]


def _shared_out(group: Sequence[int], natural: Sequence[int], least: Sequence[int], width: int) -> tuple[int, ...]:
    """Widths between the least and the natural ones that fill the room: the widest column gives way first."""
    widths = {place: natural[place] for place in group}
    room = width - DENSE_GAP * (len(group) - 1)
    while sum(widths.values()) > room:
        widest = max((place for place in group if widths[place] > least[place]), key=widths.__getitem__)
        widths[widest] -= 1
    return tuple(widths.values())


def _widths(sheet: Sheet, place: int) -> tuple[int, int]:
    """The least and the natural width of a column.

    A number needs its whole width, and a label or heading at most ``NARROW``. The natural width is that of the widest entry; a
    heading of moderate length stays on one line.
    """
    column = sheet.columns[place]
    widest = max((cell_len(_text(row[place])) for row in sheet.rows), default=1)
    pieces = [_heading(column)]
    for break_ in BREAKS:
        pieces = [part for piece in pieces for part in break_.findall(piece)]
    heads = max(map(cell_len, pieces), default=1)
    least = max(1, widest if column.numeric else min(widest, NARROW), min(heads, NARROW))
    return least, max(least, widest, min(cell_len(column.name), NARROW))


def _table(sheet: Sheet, part: _Part) -> Table:
    box, padding = (SIMPLE_HEAD, (0, 1, 0, 0)) if part.dense else (HEAVY_HEAD, (0, 1))
    out = Table(box=box, padding=padding, show_edge=False, pad_edge=False)
    shown = list(zip(part.places, part.widths, strict=True))
    for place, width in shown:
        column = sheet.columns[place]
        head = "\n".join(line for piece in (column.group, column.name) for line in folded(piece, width) if piece)
        out.add_column(Text(head), justify="right" if column.numeric else "left", width=width, no_wrap=True)
    for number, row in enumerate(sheet.rows):
        if number in sheet.sections:
            out.add_section()
        entries = ((row[place], width) for place, width in shown)
        out.add_row(*(Text("\n".join(folded(_text(e), w)), style="bold" if e.bold else "") for e, w in entries))
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
                value, heading = _text(entry), f"  {_heading(column)}:"
                beside = cell_len(f"{heading} {value}") <= width
                lines += [] if beside else [Text(heading)]
                lines.append(Text(f"{heading} {value}" if beside else f"    {value}", no_wrap=True, overflow="ignore"))
    return lines


def folded(text: str, width: int) -> list[str]:
    """Break text into lines, at the coarsest of ``BREAKS`` that will do.

    >>> folded("resq n_samples=128", 15)
    ['resq', 'n_samples=128']
    """
    lines = [""]
    for piece in _pieces(text, width, BREAKS):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _pieces(text: str, width: int, breaks: Sequence[re.Pattern[str]]) -> list[str]:
    """Cut text into pieces that fit, by the first of these breaks that is fine enough; anywhere where none is."""
    if cell_len(text.rstrip()) <= width:
        return [text]
    if not breaks:
        return chop_cells(text, width)
    return [piece for word in breaks[0].findall(text) for piece in _pieces(word, width, breaks[1:])]


def _heading(column: Column) -> str:
    return f"{column.group} {column.name}".strip()


def _text(entry: Entry) -> str:
    text = entry.text.replace(" ± ", "±").replace(" ~ ", "~")
    return text if entry.note is None else f"{text} [{entry.note}]"


def as_ascii(text: str) -> str:
    """Text in ASCII alone."""
    return text.translate(PLAIN).encode("ascii", "replace").decode()


def _with_ascii(sheet: Sheet) -> Sheet:
    columns = [dataclasses.replace(c, name=as_ascii(c.name), group=as_ascii(c.group)) for c in sheet.columns]
    rows = [[dataclasses.replace(entry, text=as_ascii(entry.text)) for entry in row] for row in sheet.rows]
    return dataclasses.replace(sheet, columns=columns, rows=rows, title=as_ascii(sheet.title))
