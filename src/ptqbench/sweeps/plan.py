"""What a sweep will do: every cell with its state and what it needs, grouped by resources. Submits nothing, imports no torch."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from ptqbench.errors import DataNotHereError
from ptqbench.models.architecture import from_config, published
from ptqbench.runs.folder import DONE, FAILED, RUNNING, UNREADABLE, RunFolder
from ptqbench.runs.queue import QUEUED, Job, Queue, look, submission
from ptqbench.sweeps.cells import INVALID, SKIPPED, Cell
from ptqbench.sweeps.measured import Took, taken
from ptqbench.sweeps.resolve import Known
from ptqbench.sweeps.resources import Needs, doubled, needs, time_limit

Kind = tuple[str, bool]
MORE_MEMORY = ("gpu_memory", "host_memory", "killed")


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of a plan.

    Attributes:
        cell: The cell.
        state: State of the run folder, or ``queued`` for a cell that waits in SLURM.
        needs: Resources; None for a cell that cannot run. An invalid cell has them where only its data are missing, or only a
            model whose shape is published.
        detail: Why it is skipped or invalid, how far it is, or how it failed.
        job: Its SLURM job, where it is queued.
        took: What it took, where it is done.
    """

    cell: Cell
    state: str
    needs: Needs | None
    detail: str = ""
    job: Job | None = None
    took: Took | None = None

    @property
    def todo(self) -> bool:
        """Whether a launch would start the cell."""
        return self.needs is not None and self.state not in (DONE, RUNNING, QUEUED, SKIPPED, INVALID, UNREADABLE)

    @property
    def absent(self) -> bool:
        """Whether the cell could run if its model and data were on this machine."""
        return self.needs is not None and self.state == INVALID


def plan(cells: Sequence[Cell], known: Known | None = None, patient: bool = False) -> list[Row]:
    """Look at every cell: folder, queue, resources.

    Args:
        cells: As composed; not modified.
        known: What this command has looked up already.
        patient: Whether SLURM must answer, as before a submission; else a row says where it does not.

    Raises:
        ConfigError: ``patient``, and SLURM does not answer.
    """
    known = known or Known()
    queue = look((cell.folder for cell in cells if cell.folder is not None), patient)
    rows = [_row(cell, queue, known) for cell in cells]
    finished = calibrated(rows)
    return [_corrected(row, finished[_kind(row)].factor) if _kind(row) in finished else row for row in rows]


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the finished cells of a kind needed, beside what was estimated.

    Attributes:
        count: Number of cells.
        factor: Median over cells of the seconds taken / the seconds estimated.
        peak_gib: Largest peak memory, GiB: of the GPU for cells on one, else of the host. None if not recorded.
        asked_gib: Largest memory that was asked for, GiB.
    """

    count: int
    factor: float
    peak_gib: float | None
    asked_gib: float


def calibrated(rows: Sequence[Row]) -> dict[Kind, Finished]:
    """Compare the finished cells of a plan with their estimates.

    Args:
        rows: A plan with estimates as ``resources`` makes them.

    Returns:
        What was needed, by kind: model, and whether on a GPU.
    """
    found: dict[Kind, list[tuple[float, float | None, float]]] = {}
    for row in rows:
        if row.took is not None and row.needs is not None:
            asked = row.needs.gpu_mem_gib if row.needs.gpus else row.needs.host_mem_gib
            found.setdefault(_kind(row), []).append((row.took.ratio, row.took.peak_gib, asked))
    return {kind: _finished(measured) for kind, measured in found.items()}


def _finished(measured: Sequence[tuple[float, float | None, float]]) -> Finished:
    ratios, peaks, asked = zip(*measured, strict=True)
    known = [peak for peak in peaks if peak is not None]
    return Finished(len(ratios), statistics.median(ratios), max(known, default=None), max(asked))


def _kind(row: Row) -> Kind:
    spec = row.cell.spec or row.cell.draft
    return (spec.model.name if spec else "", bool(row.needs and row.needs.gpus))


def _corrected(row: Row, factor: float) -> Row:
    """Scale the estimate of an unfinished cell; the time limit only grows."""
    # A time limit that the request gives stays as it is.
    spec = row.cell.spec or row.cell.draft
    if row.needs is None or row.state == DONE or spec is None:
        return row
    minutes = row.needs.estimate_min * factor
    longer = spec.resources.time_min or max(row.needs.time_min, time_limit(minutes))
    return dataclasses.replace(row, needs=dataclasses.replace(row.needs, estimate_min=minutes, time_min=longer))


def groups(rows: Sequence[Row], absent: bool = False) -> dict[Needs, list[Row]]:
    """Group what is to be done by resources, in order of first appearance; estimates are left out of the key.

    Args:
        rows: A plan.
        absent: Whether to group the cells whose models or data are not on this machine instead.
    """
    found: dict[Needs, list[Row]] = {}
    for row in rows:
        if row.needs is not None and (row.absent if absent else row.todo):
            found.setdefault(dataclasses.replace(row.needs, estimate_min=0.0), []).append(row)
    return found


def _row(cell: Cell, queue: Queue, known: Known) -> Row:
    if cell.spec is None or cell.folder is None:
        return _not_composed(cell, known)
    if cell.skipped is not None:
        return Row(cell, SKIPPED, None, cell.skipped)
    state, detail = describe(cell.folder, queue)
    if state == UNREADABLE:
        return Row(cell, state, None, detail)
    shape = from_config(known.config(cell.spec.model))
    amount = needs(cell.spec, shape)
    if state == FAILED and (cell.folder.failure() or {}).get("kind") in MORE_MEMORY:
        amount = doubled(amount)
    if state == DONE:
        return Row(cell, state, amount, detail, took=taken(cell.folder, amount, shape))
    return Row(cell, state, amount, detail, queue.job_of(cell.folder) if state == QUEUED else None)


def _not_composed(cell: Cell, known: Known) -> Row:
    """The row of a cell without run id; it is estimated where only its model or its data are missing."""
    if cell.draft is None:
        return Row(cell, INVALID, None, str(cell.problem))
    model = cell.draft.model
    if isinstance(cell.problem, DataNotHereError):
        return Row(cell, INVALID, needs(cell.draft, from_config(known.config(model))), str(cell.problem))
    shape = published().get(model.name)
    if shape is None:
        return Row(cell, INVALID, None, str(cell.problem))
    detail = f"{model.hub_id} is neither in the hub cache nor reachable: prefetch it, or give model.path=FOLDER"
    return Row(cell, INVALID, needs(cell.draft, shape), detail)


def describe(folder: RunFolder, queue: Queue) -> tuple[str, str]:
    """State of a run folder and of its job in the queue, and a few words on it."""
    state, detail = folder.examined()
    if state in (DONE, UNREADABLE):
        return state, detail
    if state == RUNNING:
        beat = folder.heartbeat() or {}
        return state, f"{beat.get('stage', 'start')} {beat.get('done', 0)}/{beat.get('total', 0)}"
    job = queue.job_of(folder)
    if job is not None:
        return QUEUED, job.describe()
    failure = (folder.failure() or {}) if state == FAILED else {}
    if failure:
        return state, f"{failure.get('kind', 'unknown')}: {failure.get('message', '')}"
    sent = submission(folder) if queue.problem else None
    return state, f"as the disk says; it was submitted as job {sent.get('job')}, but {queue.problem}" if sent else ""
