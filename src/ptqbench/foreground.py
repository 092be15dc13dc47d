"""Run one cell in this process, with a progress bar and a result table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptqbench.cell import labels
from ptqbench.cell.spec import RunSpec
from ptqbench.errors import CellBusy, ConfigError
from ptqbench.runs.folder import RunFolder, create, folder_of
from ptqbench.runs.lease import drop_stale
from ptqbench.sweeps.resolve import skip_reason


class Bar:
    """A progress bar over the steps of the current stage: decoder blocks, windows or tasks (a ``runs.attempt.Observer``)."""

    def __init__(self, progress: Progress, title: str) -> None:
        """Add the bar to a display.

        Args:
            progress: The display.
            title: Words before the bar.
        """
        self._progress, self._title = progress, title
        self._task = progress.add_task(title, total=None)

    def stage(self, name: str, total: int) -> None:
        self._progress.reset(self._task, total=total, description=f"{self._title}: {name}")

    def advance(self) -> None:
        self._progress.advance(self._task)


def run_shown(spec: RunSpec, folder: RunFolder, title: str, console: Console) -> dict[str, Any]:
    """Run a cell as ``run.run_cell`` does, with a progress bar where the console is a terminal and the cell wants one.

    Args:
        spec: The resolved cell.
        folder: Its run folder, existing.
        title: Words before the bar.
        console: Where the bar is drawn; it is cleared at the end.

    Returns:
        The content of ``result.json``.
    """
    from ptqbench.run import run_cell

    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = spec.execution.progress and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        return run_cell(spec, folder, Bar(progress, title))


def run_one(spec: RunSpec) -> int:
    """Run a cell in this process unless it is done, and print its result.

    Args:
        spec: The resolved cell.

    Returns:
        Exit status 0, also where another process works on the cell.

    Raises:
        ConfigError: The combination makes no sense, or the cell asks for a GPU and there is none.
        RunFailed: The cell failed.
        StorageError: The run folder cannot be made, read or written.
    """
    from ptqbench.results.terminal import result_table

    console, name = Console(), labels.name(spec)
    reason = skip_reason(spec)
    if reason is not None:
        raise ConfigError(f"this combination is skipped: {reason}")
    folder, state = folder_of(spec), "already done"
    result = folder.result()
    if result is not None:
        drop_stale(folder)
    else:
        from ptqbench.engine.work import device_of

        device_of(spec)  # refuses a GPU that is not there, before a run folder exists
        state, folder = "done", create(spec, folder)
        folder.cancel_path.unlink(missing_ok=True)
        try:
            result = run_shown(spec, folder, name, Console(stderr=True))
        except CellBusy as busy:
            console.print(str(busy), soft_wrap=True, highlight=False, markup=False)
            return 0
    console.print(result_table(f"{name} ({state})", result))
    console.print(f"run folder: {folder.path}", soft_wrap=True, highlight=False, markup=False)
    return 0
