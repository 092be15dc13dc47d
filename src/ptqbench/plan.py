"""What a sweep will do: every cell with its state and what it needs, grouped by resources. Submits nothing, imports no torch."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence

from ptqbench.cells import INVALID, SKIPPED, Cell
from ptqbench.models.architecture import from_config, published
from ptqbench.resolve import Known
from ptqbench.resources import START_S, Needs, doubled, needs, time_limit
from ptqbench.squeue import QUEUED, Queue, look
from ptqbench.store import DONE, FAILED, RUNNING, RunFolder

Kind = tuple[str, bool]
MORE_MEMORY = ("gpu_memory", "host_memory", "killed")


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of a plan.

    Attributes:
        cell: The cell.
        state: State of the run folder, or ``queued`` for a cell that waits in SLURM.
        needs: Resources; None for a cell that cannot run. An invalid cell has them where only its model is not here, and the
            model is one of those whose shapes are known.
        detail: Why it is skipped or invalid, where it is, or how it failed.
    """

    cell: Cell
    state: str
    needs: Needs | None
    detail: str = ""

    @property
    def todo(self) -> bool:
        """Whether a launch would start the cell."""
        return self.needs is not None and self.state not in (DONE, RUNNING, QUEUED, SKIPPED, INVALID)


def plan(cells: Sequence[Cell], known: Known | None = None) -> list[Row]:
    """Look at every cell: folder, queue, resources.

    Args:
        cells: As composed; not modified.
        known: Shared lookups of this command.
    """
    known = known or Known()
    queue = look(cell.folder for cell in cells if cell.folder is not None)
    rows = [_row(cell, queue, known) for cell in cells]
    factors = calibrated(rows)
    return [_corrected(row, factors.get(_kind(row), (1.0, 0))[0]) for row in rows]


def calibrated(rows: Sequence[Row]) -> dict[Kind, tuple[float, int]]:
    """Compare the finished cells of a plan with their estimates.

    Args:
        rows: A plan with estimates as ``resources`` makes them.

    Returns:
        By model, and whether on a GPU: the median of the seconds that a cell took over those estimated, and the number of cells
        behind it.
    """
    found: dict[Kind, list[float]] = {}
    for row in rows:
        result = row.cell.folder.result() if row.state == DONE and row.cell.folder is not None else None
        timings = (result or {}).get("timings")
        if row.needs is not None and isinstance(timings, dict) and result is not None:
            on_gpu = result.get("peak_gpu_gib") is not None
            if on_gpu == bool(row.needs.gpus):
                seconds = START_S + sum(timings.values())
                found.setdefault(_kind(row), []).append(seconds / (60 * row.needs.estimate_min))
    return {kind: (statistics.median(ratios), len(ratios)) for kind, ratios in found.items()}


def _kind(row: Row) -> Kind:
    spec = row.cell.spec or row.cell.draft
    return (spec.model.name if spec else "", bool(row.needs and row.needs.gpus))


def _corrected(row: Row, factor: float) -> Row:
    """Scale the estimate of a cell that is still to be done; the time that it asks for only grows."""
    spec = row.cell.spec or row.cell.draft
    if row.needs is None or row.state == DONE or spec is None:
        return row
    minutes = row.needs.estimate_min * factor
    longer = spec.resources.time_min or max(row.needs.time_min, time_limit(minutes))
    return dataclasses.replace(row, needs=dataclasses.replace(row.needs, estimate_min=minutes, time_min=longer))


def groups(rows: Sequence[Row]) -> dict[Needs, list[Row]]:
    """Group what is to be done by resources, in order of first appearance; estimates are left out of the key."""
    found: dict[Needs, list[Row]] = {}
    for row in rows:
        if row.todo and row.needs is not None:
            found.setdefault(dataclasses.replace(row.needs, estimate_min=0.0), []).append(row)
    return found


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Number of cells per state."""
    return dict(Counter(row.state for row in rows))


def _row(cell: Cell, queue: Queue, known: Known) -> Row:
    if cell.spec is None or cell.folder is None:
        shape = None if cell.draft is None else published().get(cell.draft.model.name)
        if cell.draft is not None and shape is not None:
            model = cell.draft.model
            detail = f"{model.hub_id} is neither in the hub cache nor reachable: prefetch it, or give model.path=FOLDER"
            return Row(cell, INVALID, needs(cell.draft, shape), detail)
        return Row(cell, INVALID, None, str(cell.problem))
    if cell.skipped is not None:
        return Row(cell, SKIPPED, None, cell.skipped)
    state, detail = describe(cell.folder, queue)
    amount = needs(cell.spec, from_config(known.config(cell.spec.model)))
    if state == FAILED and (cell.folder.failure() or {}).get("kind") in MORE_MEMORY:
        amount = doubled(amount)
    return Row(cell, state, amount, detail)


def describe(folder: RunFolder, queue: Queue) -> tuple[str, str]:
    """State of a run folder, with the queue taken into account, and a few words on it."""
    state = folder.state()
    job = None if state in (DONE, RUNNING) else queue.job_of(folder)
    if job is not None:
        return QUEUED, f"job {job.job_id} {job.state.lower()} ({job.reason})"
    if state == RUNNING:
        beat = folder.heartbeat() or {}
        return state, f"{beat.get('stage', 'start')} {beat.get('done', 0)}/{beat.get('total', 0)}"
    failure = (folder.failure() or {}) if state == FAILED else {}
    return state, f"{failure.get('kind', 'unknown')}: {failure.get('message', '')}" if failure else ""
