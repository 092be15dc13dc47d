"""What a launch prints: the plan before it begins, one line per cell that ends, a live view on a terminal, and the counts."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ptqbench.cell.labels import brief, counted
from ptqbench.errors import DataNotHereError, StorageError
from ptqbench.results.detectable import detectable
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, UNREADABLE
from ptqbench.sweeps.cells import INVALID, SKIPPED
from ptqbench.sweeps.measured import COLUMNS, compared
from ptqbench.sweeps.plan import Row, calibrated, groups
from ptqbench.sweeps.resources import duration

if TYPE_CHECKING:
    from ptqbench.sweeps.cells import Cell

ALREADY = "already done"
RUNNING_SHOWN = 8
ORDER = (DONE, ALREADY, "submitted", RUNNING, SKIPPED, CANCELLED, FAILED)  # of the counts at the end


LONG_DETAIL = 60
"""Number of characters from which a detail that several cells of a plan share is written once, below the table."""
COMPARED = 8
"""Kinds of finished cells whose times a plan shows beside the estimates, for each device."""
PLAN_COLUMNS = ("cell", "state", "needs", "estimate", "detail")


class Summary:
    """Counts how cells end, and prints it. The launchers call it.

    Attributes:
        rows: The plan.
        console: Standard output.
        errors: Standard error, where the live view is drawn.
        counts: Number of cells by state.
    """

    def __init__(self, rows: Sequence[Row], live: bool) -> None:
        """Print nothing yet.

        Args:
            rows: The plan.
            live: Whether a live view is drawn, on a terminal only.
        """
        self.rows, self.console, self.errors = rows, Console(), Console(stderr=True)
        self._names = _names(rows)
        self.counts: Counter[str] = Counter()
        self._live = (
            Live(console=self.errors, auto_refresh=False, transient=True) if live and self.errors.is_terminal else None
        )
        self._began, self._drawn, self._finished = time.time(), 0.0, 0
        self._failed: list[tuple[str, str, str]] = []

    def __enter__(self) -> Summary:
        """Print the cells that are settled before anything runs, and start the live view."""
        for row in self.rows:
            if row.state == SKIPPED:
                self.note(SKIPPED, row.cell, row.detail)
            elif row.state in (INVALID, UNREADABLE):
                self.failed(row.cell, "config", row.detail, "")
            elif row.state == DONE and row.cell.folder is not None:
                self.finished(row.cell, ALREADY)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def announce(self, how: str) -> None:
        """Print how many cells will run, where, and what each group of them needs.

        Args:
            how: Where they run, as the end of a sentence.
        """
        todo = groups(self.rows)
        total = sum(len(rows) for rows in todo.values())
        self.say(f"{total} of {counted(len(self.rows), 'cell')} to run, {how}")
        for amount, rows in todo.items():
            estimate = sum(row.needs.estimate_min for row in rows if row.needs is not None)
            kind = (
                f"about {estimate / 60 * amount.gpus:.1f} GPU-hours"
                if amount.gpus
                else f"about {duration(estimate)} of work"
            )
            self.say(f"  {len(rows)} x {amount.describe()} ({kind}, estimated)")

    def finished(self, cell: Cell, state: str = DONE) -> None:
        """Count and print a cell that has its result."""
        from ptqbench.results.terminal import result_line

        self._finished += state == DONE
        result: dict[str, Any] = (cell.folder.result() if cell.folder is not None else None) or {}
        self.counts[state] += 1
        self.say(f"{self._called(cell)}: {result_line(result) if result else ''}", state, "green")

    def failed(self, cell: Cell, kind: str, message: str, log: str) -> None:
        """Count and print a cell that has failed and is not tried again.

        Args:
            cell: The cell.
            kind: Name of the kind of failure, as in ``failure.json``.
            message: One line.
            log: Where to read more; empty for nowhere.
        """
        self._failed.append((self._called(cell), f"{kind}: {message}", log))
        self.counts[FAILED] += 1
        self.say(f"{self._called(cell)}: {kind}: {message}", FAILED, "red")

    def failed_on_record(self, cell: Cell, message: str = "see the run folder") -> None:
        """Count and print a cell that has failed, as its ``failure.json`` has it.

        Args:
            cell: The cell.
            message: Printed where there is no such record.
        """
        assert cell.folder is not None
        failure, log = {"kind": "disk", "message": message}, cell.folder.path
        with contextlib.suppress(OSError, StorageError):
            failure = cell.folder.failure() or failure
            log = cell.folder.attempts[-1] / "log.txt" if cell.folder.attempts else log
        self.failed(cell, str(failure.get("kind")), str(failure.get("message")), str(log))

    def note(self, state: str, cell: Cell, message: str) -> None:
        """Count ``state``, and print that something else happened to a cell."""
        self.counts[state] += 1
        self.say(f"{self._called(cell)}: {message}", state, "yellow")

    def warn(self, text: str) -> None:
        """Print something that went wrong beside the cells."""
        self.say(text, "warning", "yellow")

    def say(self, text: str, mark: str = "", style: str = "") -> None:
        """Print a line without markup, since names, messages and folders may hold brackets.

        Args:
            text: The line.
            mark: A word before it.
            style: Colour of that word.
        """
        line = Text.assemble((mark, style), " " if mark else "", text)
        (self._live.console if self._live else self.console).print(line, soft_wrap=True, highlight=False)

    def draw(self, running: Sequence[Cell], waiting: int) -> None:
        """Refresh the live view, at most twice a second.

        Args:
            running: Cells that processes work on.
            waiting: Number of cells that have not begun, or that others work on.
        """
        if self._live is None or time.time() - self._drawn < 0.5:
            return
        self._drawn = time.time()
        table = Table(show_edge=False, pad_edge=False, show_header=False)
        for cell in running[:RUNNING_SHOWN]:
            beat = (cell.folder.heartbeat() if cell.folder is not None else None) or {}
            words = (
                self._called(cell),
                str(beat.get("stage", "start")),
                f"{beat.get('done', 0)}/{beat.get('total', 0)}",
            )
            table.add_row(*map(Text, words))
        if len(running) > RUNNING_SHOWN:
            table.add_row(f"and {len(running) - RUNNING_SHOWN} more", "", "")
        # At the rate of finished cells so far, which covers any number of workers.
        spent, left = time.time() - self._began, waiting + len(running)
        eta = duration(spent / self._finished * left / 60) if self._finished else "not known yet"
        state = f"{len(running)} running, {waiting} waiting, {self._summary() or 'none finished'}; time left: {eta}"
        self._live.update(Group(table, Text(state)), refresh=True)

    def finish(self) -> int:
        """Print the failures and the counts; returns exit status 1 if a cell failed, else 130 if one was cancelled, else 0."""
        if self._failed:
            table = Table(title="failed cells", title_justify="left", show_edge=False, pad_edge=False)
            for column in ("cell", "reason", "log"):
                table.add_column(column, overflow="fold")
            for row in self._failed:
                table.add_row(*(Text(part) for part in row))
            self.console.print(table)
        self.say(self._summary() or "nothing to do")
        return 1 if self.counts[FAILED] else 130 if self.counts[CANCELLED] else 0

    def _summary(self) -> str:
        states = sorted(self.counts, key=lambda state: ORDER.index(state) if state in ORDER else len(ORDER))
        return ", ".join(f"{self.counts[state]} {state}" for state in states if self.counts[state])

    def _called(self, cell: Cell) -> str:
        return self._names.get(cell.name, cell.name)


def _repeated(rows: Sequence[Row]) -> dict[str, str]:
    """A mark for each long detail that several cells share: ``(1)``, ``(2)`` and so on."""
    said = Counter(row.detail for row in rows if len(row.detail) >= LONG_DETAIL)
    often = [detail for detail, count in said.items() if count > 1]
    return {detail: f"({number})" for number, detail in enumerate(often, 1)}


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """The name of every cell -> the name without what says nothing beside those of the others."""
    names = [row.cell.name for row in rows]
    return dict(zip(names, brief(names), strict=True))


def _plan_line(row: Row, names: Mapping[str, str], notes: Mapping[str, str]) -> tuple[str, ...]:
    known = row.needs if row.todo or row.state == INVALID else None
    asked, estimate = (known.describe(), duration(known.estimate_min)) if known else ("", "")
    return names[row.cell.name], row.state, asked, estimate, notes.get(row.detail, row.detail)


def _print_cells(console: Console, lines: Sequence[tuple[str, ...]]) -> None:
    """Print a heading and a line per cell. Long lines are folded on a terminal and kept whole in a file or a pipe."""
    if console.is_terminal:
        table = Table(*lines[0], show_edge=False, pad_edge=False)
        for line in lines[1:]:
            table.add_row(*map(Text, line))
        console.print(table)
        return
    _print_aligned(lines)


def _print_aligned(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def _missing(cell: Cell) -> str:
    """The name of the data set or the model that a cell needs and this machine lacks."""
    if isinstance(cell.problem, DataNotHereError):
        return cell.problem.repository
    return "" if cell.draft is None else cell.draft.model.name


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=not console.is_terminal, highlight=False)


def print_plan(rows: Sequence[Row], every_cell: bool = True) -> None:
    """Print a plan: its cells, sums per group of resources, how good the estimates were, and which differences it can show.

    Args:
        rows: The plan.
        every_cell: Whether each cell gets a line.
    """
    console = Console()
    if every_cell:
        notes, names = _repeated(rows), _names(rows)
        _print_cells(console, [PLAN_COLUMNS, *(_plan_line(row, names, notes) for row in rows)])
        for reason, mark in notes.items():
            _line(console, f"{mark} {reason}")
    else:
        reasons = Counter((row.state, row.detail) for row in rows if row.state in (INVALID, SKIPPED))
        for (state, reason), count in reasons.items():
            _line(console, f"{count} {state}: {reason}")
    # What there is to do, by resources, and what cannot be done here yet.
    todo, absent = groups(rows), groups(rows, absent=True)
    for amount, members in [*todo.items(), *absent.items()]:
        hours = sum(row.needs.estimate_min for row in members if row.needs is not None) / 60 * max(amount.gpus, 1)
        missing = ", ".join(sorted({_missing(row.cell) for row in members if row.absent}))
        where = f" whose models or data are not on this machine ({missing})" if missing else ""
        unit = "GPU-hours" if amount.gpus else "hours"
        _line(console, f"{counted(len(members), 'cell')}{where}: {amount.describe()}; estimated {hours:.1f} {unit}")
    if absent:
        _line(console, "load what is not on this machine with: python -m ptqbench prefetch")
    # What finished cells took, and how far the estimates above were corrected by that.
    finished = [(row.cell.spec, row.took) for row in rows if row.cell.spec is not None and row.took is not None]
    for device, lines in compared(finished).items():
        _line(console, f"finished cells on {device}, measured / estimated (median):")
        _print_aligned([COLUMNS, *lines[:COMPARED]])
        if len(lines) > COMPARED:
            _line(console, f"and {len(lines) - COMPARED} more that differ less")
    for (model, on_gpu), found in calibrated(rows).items():
        peak = (
            "" if found.peak_gib is None else f"; peak memory {found.peak_gib:.3g} of {found.asked_gib:g} GiB asked for"
        )
        _line(
            console,
            f"estimates of {model} on {'GPU' if on_gpu else 'CPU'}: x {found.factor:.2f}, what "
            f"{counted(found.count, 'finished cell')} took (median){peak}",
        )
    for text in detectable(rows):
        _line(console, text)
    running = [row for row in rows if row.state == RUNNING]
    _line(
        console,
        ", ".join(f"{n} {state}" for state, n in sorted(Counter(row.state for row in rows).items())) or "no cells",
    )
    if not todo and not running:
        console.print("nothing to run")
