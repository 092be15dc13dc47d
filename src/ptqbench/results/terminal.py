"""What people see on a terminal and in a picture: result tables, states, the comparison, the installation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.errors import ConfigError
from ptqbench.runs.folder import DONE, PENDING, RunFolder
from ptqbench.runs.places import write_output

if TYPE_CHECKING:
    import argparse

    from rich.table import Table
    from rich.text import Text

    from ptqbench.results.tables import Entry, Sheet, Source

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
    """Lay out the result of one cell."""
    from rich.table import Table

    from ptqbench.results.tables import format_value

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    for name, metric in result["metrics"].items():
        error = metric.get("stderr")
        table.add_row(name, format_value(name, metric["value"]), "" if error is None else format_value(name, error))
    table.add_row("nominal weight bits", f"{result['bits']['nominal_w_bits']:.3f}", "")
    table.add_row("true weight bits", f"{result['bits']['effective_w_bits']:.3f}", "")
    table.add_row("packed weights", f"{result['bits']['packed_bytes'] / 2**20:.2f} MiB", "")
    table.add_row("time", f"{sum(result['timings'].values()):.1f} s", "")
    return table


def result_line(result: dict[str, Any]) -> str:
    """Say the result of one cell in one line."""
    from ptqbench.results.tables import format_value

    parts = [f"{name} {format_value(name, metric['value'])}" for name, metric in result["metrics"].items()]
    return ", ".join([*parts, f"{result['bits']['effective_w_bits']:.2f} bits"])


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
        table.add_row(folder.path.name, state, Text(detail))
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

        console = Console(highlight=False)
        console.print(rich_table(sheet))
        for line in [*(f"[{number}] {text}" for number, text in enumerate(sheet.notes, 1)), *sheet.remarks]:
            console.print(line, markup=False, style="dim" if line in sheet.remarks else "")
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


def rich_table(sheet: Sheet) -> Table:
    """Lay out a sheet for the terminal; a model that is the same in every row moves into the title.

    Where columns may be wrapped, room is short: words then stand in it instead of lines between columns.
    """
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.table import Table

    constant = [
        place
        for place, column in enumerate(sheet.columns)
        if column.name == "model" and len({row[place].text for row in sheet.rows}) == 1
    ]
    title = [sheet.title] if sheet.title else []
    title += [f"model: {sheet.rows[0][place].text}" for place in constant]
    kept = [place for place in range(len(sheet.columns)) if place not in constant]
    dense = any(column.wrap for column in sheet.columns)
    box, padding = (SIMPLE_HEAD, (0, 1, 0, 0)) if dense else (HEAVY_HEAD, (0, 1))
    caption = "\n".join(title) or None
    out = Table(title=caption, title_justify="left", box=box, padding=padding, show_edge=False, pad_edge=False)
    for place in kept:
        column = sheet.columns[place]
        head = f"{_broken(column.group)}\n{column.name}" if column.group else column.name
        fixed = not (column.numeric or column.wrap)
        out.add_column(head, justify="right" if column.numeric else "left", no_wrap=fixed, overflow="fold")
    for number, row in enumerate(sheet.rows):
        if number in sheet.sections:
            out.add_section()
        out.add_row(*(_rich_entry(row[place]) for place in kept))
    return out


def _rich_entry(entry: Entry) -> Text:
    """An entry as text of its own: as markup it would be parsed once to be measured and once to be printed."""
    from rich.text import Text

    text = entry.text.replace(" ± ", "±")
    return Text(text if entry.note is None else f"{text} [{entry.note}]", style="bold" if entry.bold else "")


def _broken(group: str, width: int = 12) -> str:
    """Break a long label at its underscores, so that it does not widen a column of numbers."""
    return group if len(group) <= width else group.replace("_", "_\n")
