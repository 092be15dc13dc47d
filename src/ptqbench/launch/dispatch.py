"""From composed cells to finished ones: plan, announce, make the run folders, hand over to a launcher, sum up."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Sequence

from ptqbench.cell.labels import counted
from ptqbench.cell.spec import LauncherSpec
from ptqbench.errors import CellBusy, RunFailed, StorageError
from ptqbench.launch import local, slurm
from ptqbench.launch.ending import Sweep, conclude, follow_up
from ptqbench.launch.nodes import say_left_out
from ptqbench.launch.summary import Summary, print_plan
from ptqbench.runs.failures import classify
from ptqbench.runs.files import read_record, write_json
from ptqbench.runs.folder import DONE, FAILED, RUNNING, create
from ptqbench.runs.lease import drop_stale
from ptqbench.runs.liveness import local_process, me
from ptqbench.runs.outcome import one_line, outcome
from ptqbench.runs.queue import QUEUED, look, submission
from ptqbench.sweeps.cells import Cell
from ptqbench.sweeps.plan import Row, describe, plan


def launch(
    cells: Sequence[Cell], wait: bool = False, only_failed: bool = False, name: str = "", dry: bool = False
) -> int:
    """Run what is not done.

    Args:
        cells: As composed. The launcher is that of the first cell that could be composed.
        wait: Whether to wait for cells that SLURM runs; the other launchers always wait.
        only_failed: Whether to run failed cells only.
        name: Name of the sweep, for its last word; empty for cells of a command line.
        dry: Whether to print the plan and do nothing else.

    Returns:
        Exit status: 1 if a cell failed, could not be composed, or waits for a job that can never start; else 130 if cells
        were cancelled; else 0.

    Raises:
        ConfigError: Cells ask for a GPU, and this machine has none; or SLURM refuses them or does not answer.
        StorageError: The folder of runs cannot be locked.
    """
    launcher = next((cell.spec.launcher for cell in cells if cell.spec is not None), LauncherSpec())
    kind, sweep = choose(launcher), Sweep.of(name or "command line", cells, launcher)
    if dry or kind == "print":
        rows = _chosen(plan(cells), only_failed)
        print_plan(rows)
        if kind == "slurm" and (failed := slurm.left_out(rows, launcher)):
            print(f"nodes {say_left_out(failed)}")
        return 0
    with contextlib.ExitStack() as lock:
        if kind == "slurm":  # other commands for the same cells wait until these are in the queue, and plan then
            lock.enter_context(slurm.submitting(cell.folder for cell in cells if cell.folder is not None))
        rows = _chosen(plan(cells, patient=kind == "slurm"), only_failed)
        todo = [row for row in rows if row.todo]
        progress = all(cell.spec.execution.progress for cell in cells if cell.spec is not None)
        with Summary(rows, live=progress) as summary:
            if todo:
                summary.announce(_how(kind, launcher))
            _check_devices(kind, todo)
            todo = [row for row in todo if _prepared(row.cell, summary)]
            if kind == "slurm" and todo:
                slurm.submit(todo, launcher, summary)
            if kind == "slurm":
                follow_up(sweep, launcher, summary.warn)
            elif launcher.mail is not None:
                summary.warn("launcher.mail: only SLURM sends a mail; launcher.on_done runs a command of your own")
            lock.close()
            # What a process that was killed after writing its result has left beside it.
            for row in rows:
                if row.state == DONE and row.cell.folder is not None:
                    drop_stale(row.cell.folder)
            elsewhere = [row for row in rows if row.state in (RUNNING, QUEUED)]
            if kind == "slurm" and (wait or launcher.wait):
                again = functools.partial(follow_up, sweep, launcher, summary.warn)
                slurm.follow([*todo, *elsewhere], launcher, summary, again)
            else:
                _run(kind, launcher, todo, elsewhere, summary)
    status = summary.finish()
    conclude(sweep, summary.warn)
    return status


def _chosen(rows: list[Row], only_failed: bool) -> list[Row]:
    return [row for row in rows if row.state == FAILED] if only_failed else rows


def _prepared(cell: Cell, summary: Summary) -> bool:
    """Make the folder of a cell. Where that is impossible, this cell fails and the others go on."""
    assert cell.spec is not None
    assert cell.folder is not None
    try:
        create(cell.spec, cell.folder)
        cell.folder.cancel_path.unlink(missing_ok=True)
    except (OSError, StorageError) as error:
        summary.failed(cell, classify(error).name, one_line(error), "")
        return False
    return True


def cancel(cells: Sequence[Cell]) -> str:
    """Stop cells that run or wait: jobs leave the queue, workers stop at their next step. Finished blocks stay.

    Returns:
        One line that says what was stopped.
    """
    folders = [cell.folder for cell in cells if cell.folder is not None and cell.skipped is None]
    queue, asked, silent = look(folders), [], 0
    for folder in folders:
        state, _ = describe(folder, queue)
        # Where SLURM does not answer, any submitted cell may wait there: its job finds the wish when it starts.
        if state not in (RUNNING, QUEUED) and not (queue.problem and state != DONE and submission(folder)):
            continue
        try:
            write_json(folder.cancel_path, {"time": time.time(), "by": me()})
        except OSError:
            silent += 1
            continue
        asked.append(folder)
    jobs = slurm.cancel(asked, queue)
    # Processes of this machine are interrupted at once; those elsewhere see the wish at their next heartbeat.
    for folder in asked:
        with contextlib.suppress(ProcessLookupError, PermissionError, StorageError):
            pid = local_process(read_record(folder.lease_path))
            if pid is not None:
                os.kill(pid, signal.SIGINT)
    if not asked and not silent and not queue.problem:
        return "no cell runs or waits"
    said = f"asked {counted(len(asked), 'cell')} to stop ({counted(jobs, 'job')} taken out of the queue)"
    said += f"; {queue.problem}: their jobs stop soon after they start" if queue.problem else ""
    return f"{said}; {counted(silent, 'run folder')} cannot be written" if silent else said


def choose(launcher: LauncherSpec) -> str:
    """Resolve the launcher ``auto``: SLURM on a machine of a cluster, outside its jobs; else the local pool."""
    if launcher.kind != "auto":
        return launcher.kind
    return "slurm" if slurm.available() and "SLURM_JOB_ID" not in os.environ else "local"


def _check_devices(kind: str, todo: list[Row]) -> None:
    """Refuse cells that ask for a GPU of this machine where it has none, before any of them gets a run folder."""
    asked = [row.cell.spec for row in todo if row.cell.spec is not None and row.cell.spec.execution.device == "cuda"]
    if asked and kind in ("local", "inline"):
        from ptqbench.engine.work import device_of

        device_of(asked[0])


def _how(kind: str, launcher: LauncherSpec) -> str:
    if kind == "slurm":
        return f"on SLURM (partition {launcher.partition or 'default'}), one array per line:"
    return "on this machine, one process per cell:" if kind == "local" else "one after another in this process:"


def _run(kind: str, launcher: LauncherSpec, todo: list[Row], elsewhere: list[Row], summary: Summary) -> None:
    """Run what is to do, or say what SLURM runs; ``elsewhere`` are cells that run or wait already."""
    if kind == "slurm":
        for row in [*todo, *elsewhere]:
            summary.counts["submitted" if row.state != RUNNING else RUNNING] += 1
            if row.job is not None and row.job.obstacle is not None:
                summary.say(f"{row.cell.name}: {row.detail}", QUEUED, "yellow")
        if todo:
            summary.say("follow with: python -m ptqbench status, or the same command with --wait")
    elif kind == "local":
        local.run_pool([*todo, *[row for row in elsewhere if row.state == RUNNING]], summary, launcher.workers)
    else:
        _run_inline(todo, summary)


def _run_inline(todo: list[Row], summary: Summary) -> None:
    """Run cells one after another in this process."""
    from ptqbench.foreground import run_shown

    for row in todo:
        cell = row.cell
        if cell.spec is None or cell.folder is None:
            continue
        try:
            run_shown(cell.spec, cell.folder, cell.name, summary.errors)
            summary.finished(cell)
        except CellBusy as busy:
            summary.note("running elsewhere", cell, str(busy))
        except RunFailed as failed:
            summary.failed_on_record(cell, str(failed))
        except Exception as error:  # whatever it is, the other cells go on
            summary.failed(cell, classify(error).name, outcome(error)[0], "")
