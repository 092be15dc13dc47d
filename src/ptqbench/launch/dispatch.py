"""From composed cells to finished ones: plan, announce, prepare the folders, hand over to a launcher, report."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

from ptqbench.cell.spec import LauncherSpec
from ptqbench.errors import ConfigError
from ptqbench.launch import local, slurm
from ptqbench.launch.report import Report, print_plan
from ptqbench.runs.folder import FAILED, RUNNING, create, read_json, write_json
from ptqbench.runs.liveness import alive, me
from ptqbench.runs.queue import QUEUED
from ptqbench.sweeps.cells import Cell
from ptqbench.sweeps.plan import Row, plan


def launch(cells: Sequence[Cell], wait: bool = False, only_failed: bool = False) -> int:
    """Run what is not done.

    Args:
        cells: As composed; the launcher is that of the first composed cell.
        wait: Whether to follow cells that SLURM runs; the other launchers always wait.
        only_failed: Leave everything alone but failed cells.

    Returns:
        Exit status: 1 if a cell failed or could not be composed, 130 if cells were cancelled, else 0.

    Raises:
        ConfigError: Cells are to run on a GPU of this machine, which has none.
    """
    launcher = next((cell.spec.launcher for cell in cells if cell.spec is not None), LauncherSpec())
    kind = choose(launcher)
    rows = plan(cells)
    if only_failed:
        rows = [row for row in rows if row.state == FAILED]
    todo = [row for row in rows if row.todo]
    if kind == "print":
        print_plan(rows)
        return 0
    progress = all(cell.spec.execution.progress for cell in cells if cell.spec is not None)
    with Report(rows, live=progress) as report:
        if todo:
            report.announce(_how(kind, launcher))
        _check_devices(kind, todo)
        for row in todo:
            if row.cell.spec is not None and row.cell.folder is not None:
                create(row.cell.spec, row.cell.folder)
                row.cell.folder.cancel_path.unlink(missing_ok=True)
        elsewhere = [row for row in rows if row.state in (RUNNING, QUEUED)]
        _run(kind, launcher, todo, elsewhere, wait or launcher.wait, report)
    return report.finish()


def cancel(cells: Sequence[Cell]) -> str:
    """Stop what runs or waits: jobs leave the queue, workers stop at their next step. Finished blocks stay.

    Returns:
        A sentence about what was stopped.
    """
    rows = [row for row in plan(cells) if row.state in (RUNNING, QUEUED)]
    folders = [row.cell.folder for row in rows if row.cell.folder is not None]
    for folder in folders:
        write_json(folder.cancel_path, {"time": time.time(), "by": me()})
    jobs = slurm.cancel(folders)
    for folder in folders:
        held = read_json(folder.lease_path)
        if isinstance(held, dict) and held.get("machine") == me()["machine"] and alive(held, None):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(held["pid"]), signal.SIGINT)
    return f"asked {len(folders)} cells to stop ({jobs} jobs taken out of the queue)"


def choose(launcher: LauncherSpec) -> str:
    """Resolve ``auto``: SLURM where it is and this is not a job already, else the local pool."""
    if launcher.kind != "auto":
        return launcher.kind
    return "slurm" if slurm.available() and "SLURM_JOB_ID" not in os.environ else "local"


def _check_devices(kind: str, todo: list[Row]) -> None:
    """Refuse cells that are to run on a GPU of this machine where it has none, before any has a run folder."""
    asked = [row.cell.spec for row in todo if row.cell.spec is not None and row.cell.spec.execution.device == "cuda"]
    if asked and kind in ("local", "inline"):
        from ptqbench.run import device_of

        device_of(asked[0])


def _how(kind: str, launcher: LauncherSpec) -> str:
    if kind == "slurm":
        return f"on SLURM (partition {launcher.partition or 'default'}), one array per line:"
    return "on this machine, one process per cell:" if kind == "local" else "one after another in this process:"


def _run(kind: str, launcher: LauncherSpec, todo: list[Row], elsewhere: list[Row], wait: bool, report: Report) -> None:
    if kind == "slurm":
        if todo:
            slurm.submit(todo, launcher, report)
        if wait:
            slurm.follow([*todo, *elsewhere], launcher, report)
        else:
            for row in [*todo, *elsewhere]:
                report.counts["submitted" if row.state != RUNNING else RUNNING] += 1
            if todo:
                report.say("follow with: python -m ptqbench status, or the same command with --wait")
    elif kind == "local":
        local.run_pool([*todo, *[row for row in elsewhere if row.state == RUNNING]], report, launcher.workers)
    elif kind == "inline":
        _run_inline(todo, report)
    else:
        raise ConfigError(f"unknown launcher {kind!r}")


def _run_inline(todo: list[Row], report: Report) -> None:
    from ptqbench.errors import CellBusy, RunFailed
    from ptqbench.foreground import Bar
    from ptqbench.run import run_cell

    for row in todo:
        cell = row.cell
        if cell.spec is None or cell.folder is None:
            continue
        try:
            with Bar(report.errors, cell.name, cell.spec.execution.progress and report.errors.is_terminal) as bar:
                run_cell(cell.spec, cell.folder, bar)
            report.finished(cell)
        except CellBusy as busy:
            report.note("running elsewhere", cell, str(busy))
        except RunFailed:
            report.failed_on_record(cell)
