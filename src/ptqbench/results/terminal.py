"""What people see on a terminal and in a picture: result tables, states, the comparison, the installation."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.errors import ConfigError
from ptqbench.results.metrics import MISSING, format_value, measured
from ptqbench.runs.files import number
from ptqbench.runs.folder import DONE, PENDING, RunFolder
from ptqbench.runs.places import write_output

if TYPE_CHECKING:
    import argparse

    from rich.table import Table

    from ptqbench.results.tables import Sheet, Source

STATUS_ROWS = 40


SUFFIXES = {".md": "md", ".tex": "latex", ".html": "html", ".csv": "csv"}


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """How a comparison is printed: style, file, picture, title, and what the columns are."""

    style: str = "terminal"
    output: str | None = None
    picture: str | None = None
    title: str = ""
    columns: tuple[str, ...] = ("metric",)
    check: bool = False


def result_table(title: str, result: dict[str, Any]) -> Table:
    """Lay out the result of one cell; what a damaged result lacks is a dash."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± s.e.", justify="right", no_wrap=True)
    for name, value, error in _metrics(result):
        table.add_row(Text(name), format_value(name, value), "" if error is None else format_value(name, error))
    bits, times = _members(result, "bits"), _members(result, "timings")
    rows = {
        "nominal weight bits": (number(bits, "nominal_w_bits"), 1, ".3f", ""),
        "true weight bits": (number(bits, "effective_w_bits"), 1, ".3f", ""),
        "packed weights": (number(bits, "packed_bytes"), 2**20, ".2f", " MiB"),
        "time": (sum(number(times, name) or 0.0 for name in times) if times else None, 1, ".1f", " s"),
    }
    for name, (amount, unit, style, ending) in rows.items():
        table.add_row(name, MISSING if amount is None else f"{amount / unit:{style}}{ending}", "")
    return table


def _members(result: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a result; empty where a damaged result has none."""
    part = result.get(name)
    return part if isinstance(part, dict) else {}


def _metrics(result: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Name, value and standard error of every metric; the value is NaN where a damaged result has no number."""
    for name, metric in _members(result, "metrics").items():
        known = metric if isinstance(metric, dict) else {}
        try:
            value = measured(known)
        except (KeyError, TypeError, ValueError):
            value = math.nan
        yield name, value, number(known, "stderr")


def result_line(result: dict[str, Any]) -> str:
    """Say the result of one cell in one line."""
    parts = [f"{name} {format_value(name, value)}" for name, value, _ in _metrics(result)]
    bits = number(_members(result, "bits"), "effective_w_bits")
    lacking = [name for name in ("metrics", "bits") if not _members(result, name)]
    parts += [] if bits is None else [f"{bits:.2f} bits"]
    return ", ".join([*parts, *([f"result.json lacks {' and '.join(lacking)}"] if lacking else [])])


def print_status(folders: Sequence[RunFolder], every: bool = False) -> None:
    """Print what is running, waiting or failed, and the count per state.

    Args:
        folders: Run folders.
        every: Whether finished and pending cells are listed too, without a limit.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ptqbench.runs.queue import look
    from ptqbench.sweeps.plan import describe

    console, table, counts, hidden = Console(), Table(show_edge=False, pad_edge=False), Counter[str](), 0
    for column in ("cell", "state", "detail"):
        table.add_column(column, overflow="fold")
    queue = look(folders)
    for folder in folders:
        state, detail = describe(folder, queue)
        counts[state] += 1
        if not every and (state in (DONE, PENDING) or table.row_count >= STATUS_ROWS):
            hidden += state not in (DONE, PENDING)
            continue
        table.add_row(Text(folder.path.name), state, Text(detail))
    if table.row_count:
        console.print(table)
    if hidden:
        console.print(f"and {hidden} more (--all lists every cell)")
    console.print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no run folders")


def table_options(given: argparse.Namespace, title: str, columns: tuple[str, ...]) -> TableOptions:
    """Complete the options of the command line: the style follows the suffix of the output where it is not given."""
    style = given.format or (SUFFIXES.get(Path(given.output).suffix) if given.output else "terminal")
    if style is None:
        raise ConfigError(f"--output {given.output}: expected a name in {', '.join(SUFFIXES)}, or say --format")
    if style == "terminal" and given.output:
        raise ConfigError("--format terminal cannot be written to a file; choose md, latex, html or csv")
    return TableOptions(style, given.output, given.picture, title, columns, given.check)


def print_table(sources: Iterable[Source], options: TableOptions) -> None:
    """Print the comparison of cells, or the papers' figures beside theirs; write it to a file, draw it, as the options say."""
    from ptqbench.results import tables

    frame = tables.tidy(sources)
    if frame.empty:
        print("no cells")
        return
    if options.check:
        from ptqbench.results.reported import check, check_sheet

        found = check(frame)
        if options.style == "csv":
            put(found.to_csv(index=False), options.output)
        else:
            brief = options.style == "terminal"
            print_sheet(check_sheet(found, options.title, brief), options.style, options.output)
        return
    sheet = tables.comparison_sheet(frame, options.title, options.columns, brief=options.style == "terminal")
    if options.style == "csv":
        put(frame.to_csv(index=False), options.output)
    else:
        print_sheet(sheet, options.style, options.output)
    if options.picture is not None and not frame["metric"].isna().all():
        from ptqbench.results.picture import draw

        draw(tables.comparison(frame), options.picture, tables.standard_errors(frame))
        print(f"picture: {options.picture}")


def print_sheet(sheet: Sheet, style: str, output: str | None = None) -> None:
    """Print a sheet to the terminal, or as Markdown, LaTeX or HTML to the terminal or a file."""
    from ptqbench.results import tables

    if style == "terminal":
        from rich.console import Console

        from ptqbench.results.layout import as_ascii, fitted

        console = Console(highlight=False)
        ascii_only = not console.encoding.lower().startswith("utf")
        console.print(fitted(sheet, console.width, ascii_only))
        for line in [*(f"[{number}] {text}" for number, text in enumerate(sheet.notes, 1)), *sheet.remarks]:
            said = as_ascii(line) if ascii_only else line
            console.print(said, markup=False, style="dim" if line in sheet.remarks else "")
    elif style == "html":
        put(tables.html_page(tables.html(sheet), sheet.title or "ptqbench"), output)
    else:
        put(tables.markdown(sheet) if style == "md" else tables.latex(sheet), output)


def put(text: str, output: str | None) -> None:
    """Print text, or write it to a file and say so."""
    if output is None:
        print(text, end="")
        return
    write_output(output, text)
    print(f"written: {output}")
