"""Run cells here, one after another, with a progress bar and a result table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptqbench.errors import ConfigError, PtqbenchError, RunFailed
from ptqbench.fingerprint import run_id
from ptqbench.resolve import skip_reason
from ptqbench.spec import RunSpec
from ptqbench.store import DONE, create, folder_of


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
            TextColumn("{task.description}"),
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


class Session:
    """Cells run by one command. In a sweep one failed cell never stops the others."""

    def __init__(self, many: bool) -> None:
        """Open a session.

        Args:
            many: Whether failures are counted (a sweep) or raised (a single cell).
        """
        self.many, self.counts, self._seen = many, {"done": 0, "already done": 0, "skipped": 0, "failed": 0}, set[str]()
        self.console, self.errors = Console(), Console(stderr=True)

    def run(self, spec: RunSpec) -> None:
        """Run a cell unless it is done, impossible, or a duplicate of an earlier one of this session."""
        name = f"{spec.model.name} {spec.method.name} {spec.bitwidth.name} seed {spec.seed}"
        reason = skip_reason(spec)
        if reason is not None:
            if not self.many:
                raise ConfigError(f"this combination is skipped: {reason}")
            self.counts["skipped"] += 1
            self._say(f"[yellow]skipped[/] {name}: {reason}")
            return
        if run_id(spec) in self._seen:
            return
        self._seen.add(run_id(spec))
        folder = folder_of(spec)
        if folder.state() == DONE:
            self.counts["already done"] += 1
            self._show("already done", name, folder.result() or {}, str(folder.path))
            return
        folder = create(spec)
        try:
            with Bar(self.errors, name, spec.execution.progress and self.errors.is_terminal) as bar:
                from ptqbench.run import run_cell

                result = run_cell(spec, folder, bar)
        except RunFailed as error:
            if not self.many:
                raise
            self.counts["failed"] += 1
            self._say(f"[red]failed[/] {name}: {error}")
            return
        self.counts["done"] += 1
        self._show("done", name, result, str(folder.path))

    def refuse(self, error: PtqbenchError) -> None:
        """Count a cell of a sweep that could not even be composed, and say why."""
        self.counts["failed"] += 1
        self.errors.print(f"ptqbench: {error}", soft_wrap=True, highlight=False, markup=False)

    def finish(self) -> int:
        """Print the counts of a sweep; exit status 1 if anything failed."""
        if self.many:
            self._say(", ".join(f"{count} {state}" for state, count in self.counts.items() if count) or "nothing to do")
        return 1 if self.counts["failed"] else 0

    def _show(self, state: str, name: str, result: dict[str, Any], path: str) -> None:
        from ptqbench.show import result_line, result_table

        if self.many:
            self._say(f"[green]{state}[/] {name}: {result_line(result)}")
        else:
            self.console.print(result_table(f"{name} ({state})", result))
            self._say(f"run folder: {path}")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def run_cells(cells: Iterable[RunSpec]) -> int:
    """Run the cells of a sweep in order and return the exit status."""
    session = Session(many=True)
    for cell in cells:
        try:
            session.run(cell)
        except PtqbenchError as error:
            session.refuse(error)
    return session.finish()
