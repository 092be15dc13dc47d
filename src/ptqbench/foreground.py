"""Run one cell here, with a progress bar and a result table."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptqbench.cell import labels
from ptqbench.cell.spec import RunSpec
from ptqbench.errors import CellBusy, ConfigError
from ptqbench.runs.folder import create, folder_of
from ptqbench.runs.lease import drop_stale
from ptqbench.sweeps.resolve import skip_reason


class Bar:
    """A progress bar over the blocks (or windows, or tasks) of the current stage; shown on a terminal only."""

    def __init__(self, console: Console, title: str, enabled: bool) -> None:
        """Prepare the bar.

        Args:
            console: Where it is drawn.
            title: Words before the bar.
            enabled: Whether it is drawn at all.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not enabled)
        self._title, self._task = title, self._progress.add_task(title, total=None)

    def __enter__(self) -> Bar:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and clear the line."""
        self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage."""
        self._progress.reset(self._task, total=total, description=f"{self._title}: {name}")

    def advance(self) -> None:
        """Move on by one step."""
        self._progress.advance(self._task)


def run_one(spec: RunSpec) -> int:
    """Run a cell here unless it is done, and show its result.

    Args:
        spec: The resolved cell.

    Returns:
        Exit status 0; also where another process works on the cell.

    Raises:
        ConfigError: The combination makes no sense, or there is no GPU for it.
        RunFailed: The cell failed.
    """
    from ptqbench.results.terminal import result_table

    console, errors, name = Console(), Console(stderr=True), labels.name(spec)
    reason = skip_reason(spec)
    if reason is not None:
        raise ConfigError(f"this combination is skipped: {reason}")
    folder, state = folder_of(spec), "already done"
    result = folder.result()
    if result is not None:
        drop_stale(folder)
    else:
        from ptqbench.engine.work import device_of
        from ptqbench.run import run_cell

        device_of(spec)
        state, folder = "done", create(spec, folder)
        folder.cancel_path.unlink(missing_ok=True)
        try:
            with Bar(errors, name, spec.execution.progress and errors.is_terminal) as bar:
                result = run_cell(spec, folder, bar)
        except CellBusy as busy:
            console.print(str(busy), soft_wrap=True, highlight=False, markup=False)
            return 0
    console.print(result_table(f"{name} ({state})", result))
    console.print(f"run folder: {folder.path}", soft_wrap=True, highlight=False, markup=False)
    return 0
