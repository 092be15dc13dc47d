"""What commands print: the result of a cell, states of cells, and the comparison, also to a file or as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell.labels import tallied
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import MISSING, format_value, measured, part
from ptqbench.runs.files import number
from ptqbench.runs.folder import DONE, PENDING, RunFolder
from ptqbench.runs.places import write_output

if TYPE_CHECKING:
    import argparse

    import pandas as pd
    from rich.console import Group
    from rich.table import Table

    from ptqbench.results.tables import Sheet, Source

PAGE = 150
"""Characters beside each other on a page of Markdown or HTML; a wider table is cut between its models."""
STATUS_ROWS = 40
"""Lines of ``status`` without ``--all``."""
SUFFIXES = {".md": "md", ".tex": "latex", ".html": "html", ".csv": "csv"}


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """How a comparison is printed.

    Attributes:
        style: ``terminal``, ``md``, ``latex``, ``html`` or ``csv``.
        output: File to write; None prints.
        picture: File for a picture of the comparison; None draws none.
        title: Printed above.
        columns: As ``tables.comparison_sheet`` takes them.
        check: Whether to print the papers' figures beside ours instead of the comparison.
        paper: Whether to print the papers' own tables instead, with our figures in them.
        papers: Which papers' tables, as ``paper_tables.paper_tables`` takes them.
    """

    style: str = "terminal"
    output: str | None = None
    picture: str | None = None
    title: str = ""
    columns: tuple[str, ...] = ("metric",)
    check: bool = False
    paper: bool = False
    papers: tuple[str, ...] = ()


def result_table(title: str, result: dict[str, Any]) -> Table:
    """Lay out the result of one cell as a table. What a damaged result lacks is a dash."""
    from rich.table import Table
    from rich.text import Text

    # Labels may be folded, numbers never.
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± s.e.", justify="right", no_wrap=True)
    for name, value, error in _metrics(result):
        table.add_row(Text(name), format_value(name, value), "" if error is None else format_value(name, error))
    # What it cost in bits, bytes and seconds: (amount, unit, format, ending).
    bits, times = part(result, "bits"), part(result, "timings")
    rows = {
        "nominal weight bits": (number(bits, "nominal_w_bits"), 1, ".3f", ""),
        "true weight bits": (number(bits, "effective_w_bits"), 1, ".3f", ""),
        "packed weights": (number(bits, "packed_bytes"), 2**20, ".2f", " MiB"),
        "time": (sum(number(times, name) or 0.0 for name in times) if times else None, 1, ".1f", " s"),
    }
    for name, (amount, unit, style, ending) in rows.items():
        table.add_row(name, MISSING if amount is None else f"{amount / unit:{style}}{ending}", "")
    return table


def _metrics(result: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Name, value and standard error of every metric; the value is NaN where a damaged result has no number."""
    metrics = part(result, "metrics")
    for name in metrics:
        known = part(metrics, name)
        try:
            value = measured(known)
        except (KeyError, TypeError, ValueError):
            value = math.nan
        yield name, value, number(known, "stderr")


def result_line(result: dict[str, Any]) -> str:
    """The result of one cell on one line, with the names of the parts that a damaged result lacks."""
    parts = [f"{name} {format_value(name, value)}" for name, value, _ in _metrics(result)]
    bits = number(part(result, "bits"), "effective_w_bits")
    lacking = [name for name in ("metrics", "bits") if not part(result, name)]
    parts += [] if bits is None else [f"{bits:.2f} bits"]
    return ", ".join([*parts, *([f"result.json lacks {' and '.join(lacking)}"] if lacking else [])])


def print_status(folders: Sequence[RunFolder], every: bool = False) -> None:
    """Print the cells that are neither finished nor pending, and how many cells are in each state.

    Args:
        folders: Run folders.
        every: Whether finished and pending cells are listed too, without a limit.
    """
    from rich.console import Console

    from ptqbench.runs.queue import look
    from ptqbench.sweeps.plan import describe

    queue = look(folders)
    lines = [(folder.path.name, *describe(folder, queue)) for folder in folders]
    counts = Counter(state for _, state, _ in lines)
    said = tallied(counts) or "no run folders"
    listed = [line for line in lines if every or line[1] not in (DONE, PENDING)]
    Console().print(status_view(listed, len(listed) if every else STATUS_ROWS, said))


def status_view(lines: Sequence[tuple[str, str, str]], most: int, said: str) -> Group:
    """Lay out the states of cells.

    Args:
        lines: Run folder, state and detail of every cell that is listed.
        most: Number of cells that are shown.
        said: The line below them.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for column in ("cell", "state", "detail"):
        table.add_column(column, overflow="fold")
    for name, state, detail in lines[:most]:
        table.add_row(Text(name), state, Text(detail))
    more = [Text(f"and {len(lines) - most} more (--all lists every cell)")] if len(lines) > most else []
    return Group(*([table] if lines else []), *more, Text(said))


def table_options(
    given: argparse.Namespace, title: str, columns: tuple[str, ...], papers: tuple[str, ...] = ()
) -> TableOptions:
    """Read the options of the command line.

    Raises:
        ConfigError: As ``output_style``, or two tables are asked for.
    """
    if given.check and given.paper:
        raise ConfigError("--check and --paper are two tables of the same figures; choose one")
    if given.picture and given.paper:
        raise ConfigError("--picture draws the comparison; expected it without --paper")
    style = output_style(given)
    return TableOptions(style, given.output, given.picture, title, columns, given.check, given.paper, papers)


def output_style(given: argparse.Namespace) -> str:
    """The style of ``--format``; without it, the suffix of ``--output`` says it.

    Raises:
        ConfigError: The suffix says no style, or the terminal's style is to be written to a file.
    """
    style: str | None = given.format or (SUFFIXES.get(Path(given.output).suffix) if given.output else "terminal")
    if style is None:
        raise ConfigError(f"--output {given.output}: expected a name in {', '.join(SUFFIXES)}, or say --format")
    if style == "terminal" and given.output:
        raise ConfigError("--format terminal cannot be written to a file; choose md, latex, html or csv")
    return style


def print_table(sources: Iterable[Source], options: TableOptions) -> None:
    """Print cells as the options say: the comparison, or the papers' figures beside theirs; to a file, with a picture."""
    from ptqbench.results import tables

    frame = tables.tidy(sources)
    if frame.empty:
        print("no cells")
        return
    data, lay_out = _contents(frame, options)
    if options.paper and data.empty:
        print("no printed figure belongs to a quantized cell here")
        return
    if options.style == "csv":
        put(data.to_csv(index=False), options.output)
    else:
        print_sheets(lay_out(), options.style, options.output)
    # A picture shows our values alone, if there are any.
    ours_alone = not options.check and not options.paper
    if options.picture is not None and ours_alone and not frame["metric"].isna().all():
        from ptqbench.results.picture import draw

        draw(tables.pivot(tables.averaged(frame)[0]), options.picture)
        print(f"picture: {options.picture}")


def _contents(frame: pd.DataFrame, options: TableOptions) -> tuple[pd.DataFrame, Callable[[], list[Sheet]]]:
    """What is asked for: as a frame, and how to lay it out."""
    from ptqbench.results import paper_sheets, paper_tables, reported, tables

    terminal = options.style == "terminal"
    if options.paper:
        found = paper_tables.paper_tables(frame, options.papers)
        return paper_tables.frame_of(found), lambda: [paper_sheets.paper_sheet(table) for table in found]
    if options.check:
        checked = reported.check(frame)
        brief = options.style in ("terminal", "latex")
        return checked, lambda: [reported.check_sheet(checked, options.title, brief)]
    return frame, lambda: [tables.comparison_sheet(frame, options.title, options.columns, terminal)]


def print_sheets(sheets: Sequence[Sheet], style: str, output: str | None = None) -> None:
    """Print sheets, one below the other, to the terminal, or as Markdown, LaTeX or HTML to the terminal or a file."""
    from ptqbench.results import tables

    if style == "terminal":
        for number, sheet in enumerate(sheets):
            print("\n" * min(number, 1), end="")
            _print_sheet(sheet)
    elif style == "latex":
        put("\n".join(map(tables.latex, sheets)), output)
    else:
        parts = [part for sheet in sheets for part in sheet.parts(PAGE)]
        if style == "html":
            title = next((sheet.title for sheet in sheets if sheet.title), "ptqbench")
            put(tables.html_page("".join(map(tables.html, parts)), title), output)
        else:
            put("\n".join(map(tables.markdown, parts)), output)


def _print_sheet(sheet: Sheet) -> None:
    from rich.console import Console

    from ptqbench.results.layout import as_ascii, fitted

    console = Console(highlight=False)
    ascii_only = not console.encoding.lower().startswith("utf")
    console.print(fitted(sheet, console.width, ascii_only))
    for line in sheet.below():
        said = as_ascii(line) if ascii_only else line
        console.print(said, markup=False, style="dim" if line in sheet.remarks else "")


def put(text: str, output: str | None) -> None:
    """Print text, or write it to a file and say so."""
    if output is None:
        print(text, end="")
        return
    write_output(output, text)
    print(f"written: {output}")
