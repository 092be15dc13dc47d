"""What a launch tells a person: the plan before it begins, one line per finished cell, a live view on a terminal, the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ptqbench.errors import DataNotHereError
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING
from ptqbench.sweeps.cells import INVALID, SKIPPED
from ptqbench.sweeps.plan import Row, calibrated, counts, groups
from ptqbench.sweeps.resources import duration

if TYPE_CHECKING:
    from ptqbench.sweeps.cells import Cell

ALREADY = "already done"
RUNNING_SHOWN = 8
ORDER = (DONE, ALREADY, "submitted", RUNNING, SKIPPED, CANCELLED, FAILED)  # of the counts at the end


PLAN_COLUMNS = ("cell", "state", "needs", "estimate", "detail")


class Report:
    """Counts and prints; the launchers call it."""

    def __init__(self, rows: Sequence[Row], live: bool) -> None:
        """Begin.

        Args:
            rows: The plan.
            live: Whether a live view is drawn (on a terminal only).
        """
        self.rows, self.console, self.errors = rows, Console(), Console(stderr=True)
        self.counts: Counter[str] = Counter()
        self._live = (
            Live(console=self.errors, auto_refresh=False, transient=True) if live and self.errors.is_terminal else None
        )
        self._began, self._drawn, self._finished = time.time(), 0.0, 0
        self._failed: list[tuple[str, str, str]] = []

    def __enter__(self) -> Report:
        """Say what was settled before anything runs."""
        for row in self.rows:
            if row.state == SKIPPED:
                self._count(SKIPPED, f"[yellow]skipped[/] {row.cell.name}: {row.detail}")
            elif row.state == INVALID:
                self.failed(row.cell, "config", row.detail, "")
            elif row.state == DONE and row.cell.folder is not None:
                self.finished(row.cell, ALREADY)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        if self._live:
            self._live.stop()

    def announce(self, how: str) -> None:
        """Print what will be done and where."""
        todo = groups(self.rows)
        total = sum(len(rows) for rows in todo.values())
        self.say(f"{total} of {len(self.rows)} cells to run, {how}")
        for amount, rows in todo.items():
            estimate = sum(row.needs.estimate_min for row in rows if row.needs is not None)
            kind = f"about {estimate / 60:.1f} GPU-hours" if amount.gpus else f"about {duration(estimate)} of work"
            self.say(f"  {len(rows)} x {amount.describe()} ({kind}, estimated)")

    def finished(self, cell: Cell, state: str = DONE) -> None:
        """A cell has its result."""
        from ptqbench.results.terminal import result_line

        self._finished += state == DONE
        result: dict[str, Any] = (cell.folder.result() if cell.folder is not None else None) or {}
        self._count(state, f"[green]{state}[/] {cell.name}: {result_line(result) if result else ''}")

    def failed(self, cell: Cell, kind: str, message: str, log: str) -> None:
        """A cell has failed for good."""
        self._failed.append((cell.name, f"{kind}: {message}", log))
        self._count(FAILED, f"[red]failed[/] {cell.name}: {kind}: {message}")

    def failed_on_record(self, cell: Cell) -> None:
        """A cell has failed for good and has said how in its ``failure.json``."""
        assert cell.folder is not None
        failure, attempts = cell.folder.failure() or {}, cell.folder.attempts
        log = attempts[-1] / "log.txt" if attempts else cell.folder.path
        self.failed(cell, str(failure.get("kind")), str(failure.get("message")), str(log))

    def note(self, state: str, cell: Cell, message: str) -> None:
        """Something else happened to a cell; ``state`` is counted."""
        self._count(state, f"[yellow]{state}[/] {cell.name}: {message}")

    def say(self, text: str) -> None:
        """Print a line."""
        (self._live.console if self._live else self.console).print(text, soft_wrap=True, highlight=False)

    def draw(self, running: Sequence[Cell], waiting: int) -> None:
        """Refresh the live view, at most twice a second."""
        if self._live is None or time.time() - self._drawn < 0.5:
            return
        self._drawn = time.time()
        table = Table(show_edge=False, pad_edge=False, show_header=False)
        for cell in running[:RUNNING_SHOWN]:
            beat = (cell.folder.heartbeat() if cell.folder is not None else None) or {}
            table.add_row(cell.name, str(beat.get("stage", "start")), f"{beat.get('done', 0)}/{beat.get('total', 0)}")
        if len(running) > RUNNING_SHOWN:
            table.add_row(f"and {len(running) - RUNNING_SHOWN} more", "", "")
        spent, left = time.time() - self._began, waiting + len(running)
        eta = duration(spent / self._finished * left / 60) if self._finished else "not known yet"
        state = f"{len(running)} running, {waiting} waiting, {self._summary() or 'none finished'}; time left: {eta}"
        self._live.update(Group(table, Text(state)), refresh=True)

    def finish(self) -> int:
        """Print the failures and the counts; exit status 1 if anything failed, 130 if anything was cancelled."""
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

    def _count(self, state: str, line: str) -> None:
        self.counts[state] += 1
        self.say(line)


def _plan_line(row: Row) -> tuple[str, ...]:
    known = row.needs if row.todo or row.state == INVALID else None
    asked, estimate = (known.describe(), duration(known.estimate_min)) if known else ("", "")
    return row.cell.name, row.state, asked, estimate, row.detail


def _print_cells(console: Console, lines: Sequence[tuple[str, ...]]) -> None:
    """Print a heading and a line per cell: folded on a terminal, as long as it is in a file or a pipe."""
    if console.is_terminal:
        table = Table(*lines[0], show_edge=False, pad_edge=False)
        for line in lines[1:]:
            table.add_row(*map(Text, line))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def _missing(cell: Cell) -> str:
    """What of a cell is not on this machine."""
    if isinstance(cell.problem, DataNotHereError):
        return cell.problem.repository
    return "" if cell.draft is None else cell.draft.model.name


def print_plan(rows: Sequence[Row], every_cell: bool = True) -> None:
    """Print every cell with its state and needs, and the sums per resource group."""
    console = Console()
    if every_cell:
        _print_cells(console, [PLAN_COLUMNS, *map(_plan_line, rows)])
    todo = groups(rows)
    for amount, members in todo.items():
        hours = sum(row.needs.estimate_min for row in members if row.needs is not None) / 60
        console.print(
            f"{len(members)} cells: {amount.describe()}; estimated {hours:.1f} {'GPU-' if amount.gpus else ''}hours",
            highlight=False,
        )
    absent = [row for row in rows if row.state == INVALID and row.needs is not None]
    if absent:
        hours = sum(row.needs.estimate_min for row in absent if row.needs is not None) / 60
        names = ", ".join(sorted({_missing(row.cell) for row in absent}))
        console.print(
            f"{len(absent)} cells whose models or data are not on this machine ({names}): estimated {hours:.1f} GPU-hours; "
            "load them with: python -m ptqbench prefetch",
            highlight=False,
        )
    for (model, on_gpu), found in calibrated(rows).items():
        peak = (
            "" if found.peak_gib is None else f"; peak memory {found.peak_gib:.3g} of {found.asked_gib:g} GiB asked for"
        )
        console.print(
            f"estimates of {model} on {'GPU' if on_gpu else 'CPU'}: x {found.factor:.2f}, what {found.count} finished cells took "
            f"(median){peak}",
            highlight=False,
        )
    running = [row for row in rows if row.state == RUNNING]
    console.print(", ".join(f"{n} {state}" for state, n in sorted(counts(rows).items())) or "no cells", highlight=False)
    if not todo and not running:
        console.print("nothing to run")
