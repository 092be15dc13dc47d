"""The callable that a SLURM task runs. It holds the path of a run folder and a time, so that no code or state is pickled."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ptqbench.errors import CellBusy, TimeLimitTooShort
from ptqbench.runs.attempt import record_failure
from ptqbench.runs.files import read_record
from ptqbench.runs.folder import RunFolder

USED_UP = 0.7
"""Share of its time after which an interrupted attempt counts as ended by the time limit."""


@dataclasses.dataclass(frozen=True)
class CellJob:
    """Run the cell of a folder. After a warning (time limit, preemption) the job is requeued and goes on where it stopped.

    Attributes:
        folder: Absolute path of the run folder.
        work_s: Seconds from the start of the job to the warning before its time limit.
    """

    folder: str
    work_s: float

    def __call__(self) -> str:
        """Run the cell.

        Returns:
            The run id, also where another process works on the cell.

        Raises:
            RunFailed: The cell failed. SLURM shows the task as FAILED too.
            TimeLimitTooShort: The last two attempts of this job used up their time without finishing anything.
        """
        from ptqbench.run import run_folder

        folder = RunFolder(Path(self.folder))
        if stalled(folder, self.work_s, os.environ.get("SLURM_JOB_ID")):
            error = TimeLimitTooShort(
                f"two attempts in a row ran for their {self.work_s / 60:.1f} min and finished no decoder block and no text: "
                "raise resources.time_min (what is finished stays)"
            )
            record_failure(folder, error, folder.attempts[-1])
            raise error
        try:
            run_folder(folder)
        except CellBusy as busy:
            print(busy)
        return folder.run_id

    def checkpoint(self) -> Any:
        """The task that submitit keeps for the requeued job: the same, since finished blocks are on disk already."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def stalled(folder: RunFolder, work_s: float, job: str | None) -> bool:
    """Whether a job is requeued again and again without progress.

    Args:
        folder: The cell.
        work_s: Seconds that an attempt has before it is warned.
        job: Number of the job. Only its attempts count, since those of an earlier job may have had another time limit.

    Returns:
        True where the last two attempts are of this job, used up their time, and left no new file of finished work.
    """
    # The last two attempts are of this job, and each used up its time.
    last = folder.attempts[-2:]
    if job is None or len(last) < 2:
        return False
    for path in last:
        slurm = read_record(path / "meta.json").get("slurm")
        if not isinstance(slurm, dict) or slurm.get("SLURM_JOB_ID") != job or _duration(path) < USED_UP * work_s:
            return False
    return not finished_since(folder, last[0])


def finished_since(folder: RunFolder, attempt: Path) -> bool:
    """Whether a file of finished work is younger than the beginning of an attempt, by the clock of the file system."""
    began = (attempt / "meta.json").stat().st_mtime
    finished = [path for root in (folder.state_path, folder.records_path) for path in root.rglob("*") if path.is_file()]
    return any(path.stat().st_mtime >= began for path in finished)


def _duration(attempt: Path) -> float:
    """Seconds from the beginning of an attempt to its last sign of life, by the clock of the file system."""
    try:
        return (attempt / "heartbeat.json").stat().st_mtime - (attempt / "meta.json").stat().st_mtime
    except OSError:
        return 0.0
