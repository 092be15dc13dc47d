"""Follow the cells of a sweep from outside, until all have ended: a view that is refreshed in place, or a line per change.

A look reads one directory entry per run folder, and the files of those that have changed or that somebody works on. Every file by
which a cell changes its state is renamed into its run folder, which then has another time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live

from ptqbench.cell.labels import tallied
from ptqbench.errors import ConfigError, StorageError
from ptqbench.launch.ending import ENDED, left_over, status_of
from ptqbench.launch.slurm import STUCK_S
from ptqbench.results.terminal import status_view
from ptqbench.runs.files import number
from ptqbench.runs.folder import CANCELLED, DAMAGED, DONE, FAILED, INTERRUPTED, PENDING, RUNNING, UNREADABLE, RunFolder
from ptqbench.runs.queue import QUEUED, SHORT_S, Queue, ask, submission
from ptqbench.sweeps.cells import Cell
from ptqbench.sweeps.plan import describe
from ptqbench.sweeps.resources import duration

RACY_S = 2.0
"""Age from which a folder's time tells a later change apart; some file systems count whole seconds."""
UNSETTLED = (RUNNING, INTERRUPTED, UNREADABLE)
"""States that a sign of life or the clock ends, without a change in the run folder itself."""
SHOWN = (FAILED, UNREADABLE, DAMAGED, CANCELLED, RUNNING, INTERRUPTED, QUEUED)
"""States that are listed, the most urgent first."""
FRAME = 8
"""Lines of a terminal that are no cells: heading, counts and what may be folded."""


@dataclasses.dataclass(frozen=True)
class Look:
    """A cell as it was seen.

    Attributes:
        name: Name of its run folder.
        state: As ``status`` has it.
        detail: A few words.
        stuck: Whether its job can never start.
    """

    name: str
    state: str
    detail: str
    stuck: bool = False


@dataclasses.dataclass(frozen=True)
class _Known:
    """What the files of a run folder say, and when they were read."""

    stamp: int
    read: float
    state: str
    detail: str
    job: tuple[str, int] | None


class Watcher:
    """Looks at run folders, and remembers what has not changed since.

    Attributes:
        problem: Why SLURM did not answer the last time; empty where it did or was not asked.
    """

    def __init__(self) -> None:
        """Start with nothing known."""
        self._known: dict[str, _Known] = {}
        self.problem = ""

    def look(self, folders: Sequence[RunFolder]) -> list[Look]:
        """The state of every cell now."""
        found = [self._read(folder) for folder in folders]
        waiting = {known.job for known in found if known.job is not None and known.state not in (*ENDED, RUNNING)}
        queue = self._ask() if waiting and shutil.which("squeue") else Queue({})
        looks = []
        for folder, known in zip(folders, found, strict=True):
            job = queue.jobs.get(known.job) if known.job in waiting and known.job is not None else None
            if job is not None and known.state not in (DONE, RUNNING, UNREADABLE):
                looks.append(Look(folder.path.name, QUEUED, job.describe(), job.obstacle is not None))
            else:
                looks.append(Look(folder.path.name, known.state, known.detail))
        return looks

    def _read(self, folder: RunFolder) -> _Known:
        try:
            stamp = folder.path.stat().st_mtime_ns
        except OSError:
            stamp = 0
        known = self._known.get(folder.path.name)
        settled = known is not None and known.state not in UNSETTLED and known.read - known.stamp / 1e9 > RACY_S
        if known is None or known.stamp != stamp or not settled:
            known = self._known[folder.path.name] = self._fresh(folder, stamp)
        return known

    def _fresh(self, folder: RunFolder, stamp: int) -> _Known:
        now = time.time()
        state, detail = describe(folder, Queue({})) if stamp else (PENDING, "")
        task, sent = None, None
        if state not in (DONE, RUNNING, UNREADABLE) and stamp:
            try:
                sent = submission(folder) or {}
                task = number(sent, "task")
            except StorageError as error:
                state, detail = UNREADABLE, str(error)
        return _Known(
            stamp, now, state, detail, (str(sent.get("token")), int(task)) if sent and task is not None else None
        )

    def _ask(self) -> Queue:
        try:
            self.problem = ""
            return ask(1, SHORT_S)
        except ConfigError as error:
            self.problem = str(error)
            return Queue({})


def watch_sweep(cells: Sequence[Cell], seconds: float) -> int:
    """Follow the cells of a sweep as ``watch`` does; those that cannot run count too."""
    others = Counter(cell.state() for cell in cells if cell.folder is None or cell.skipped is not None)
    folders = [cell.folder for cell in cells if cell.folder is not None and cell.skipped is None]
    return watch(lambda: folders, seconds, others)


def watch(find: Callable[[], Sequence[RunFolder]], seconds: float, others: Mapping[str, int] | None = None) -> int:
    """Show the states of cells again and again until every cell has ended.

    Args:
        find: Finds the run folders; asked before every look, since new ones may appear.
        seconds: Between two looks.
        others: Number of cells that have no run folder, by state.

    Returns:
        Exit status as a sweep has it: 1 if a cell failed, could not be composed or has a job that can never start; else 130 if
        cells were cancelled; else 0.
    """
    console, watcher, since = Console(), Watcher(), dict[str, float]()
    first = before = watcher.look(find())
    began, looks = time.time(), first
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            counts = Counter(look.state for look in looks) + Counter(others)
            # A job is given up once it has been stuck for a while: SLURM shows some reasons for a moment only.
            since = {look.name: since.get(look.name, time.time()) for look in looks if look.stuck}
            stuck = sum(time.time() - moment >= STUCK_S for moment in since.values())
            left = left_over(counts) - stuck
            said = _said(counts, left, sum(look.state == DONE for look in first), time.time() - began, watcher.problem)
            if live is not None:
                live.update(_view(looks, said, console.height), refresh=True)
            elif looks is first:
                print(said, flush=True)
            else:
                _print_changes(before, looks)
            # Nothing may change between two looks at the end: a launcher may be about to try a failed cell again.
            if not left and (looks is first or looks == before):
                break
            time.sleep(seconds)
            before, looks = looks, watcher.look(find())
    if live is None and looks is not first:
        print(said, flush=True)
    return status_of(counts)


def _said(counts: Counter[str], left: int, done_before: int, spent: float, problem: str) -> str:
    """The counts in one line, with the time left at the rate of the cells that were finished meanwhile."""
    said = tallied(counts) or "no run folders"
    finished = counts[DONE] - done_before
    said += f"; time left: {duration(spent / finished * left / 60)}" if left and finished > 0 else ""
    if left and not counts[RUNNING] and not counts[QUEUED]:
        said += "; nothing runs or waits now: start what is left with ptqbench sweep"
    return f"{said}; {problem}" if problem else said


def _view(looks: Sequence[Look], said: str, height: int) -> Group:
    """The list of ``status``, the most urgent cells first, as long as the terminal is high."""
    listed = sorted((look for look in looks if look.state in SHOWN), key=lambda look: SHOWN.index(look.state))
    return status_view([(look.name, look.state, look.detail) for look in listed], max(1, height - FRAME), said)


def _print_changes(before: Sequence[Look], looks: Sequence[Look]) -> None:
    """Print a line for each cell that has another state."""
    states = {look.name: look.state for look in before}
    for look in looks:
        if states.get(look.name, PENDING) != look.state:
            detail = f": {look.detail}" if look.detail else ""
            print(f"{time.strftime('%H:%M:%S')} {look.name}: {look.state}{detail}", flush=True)
