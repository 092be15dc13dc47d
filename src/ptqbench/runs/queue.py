"""Which submitted cells still wait or run in SLURM, from one call of ``squeue``. Needs no accounting.

Every array is submitted under a name that nothing else has (``ptqbench-TOKEN``), and the token is written into the run
folders *before* the submission. So a cell is recognised in the queue even where the submitting process was killed before it
could write the job's number.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ptqbench.errors import ConfigError
from ptqbench.runs.folder import RunFolder, read_json

JOB_NAME = "ptqbench-{token}"
QUEUED = "queued"
LIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESIZING",
}
TRIES, PAUSE_S = 10, 3.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One task of an array in the queue."""

    job_id: str
    state: str
    reason: str


def submission(folder: RunFolder) -> dict[str, Any] | None:
    """The job that was submitted for a cell, if any."""
    data = read_json(folder.submission_path)
    return data if isinstance(data, dict) and data.get("launcher") == "slurm" else None


class Queue:
    """A snapshot of the jobs of this user: (token, task) -> job."""

    def __init__(self, jobs: Mapping[tuple[str, int], Job]) -> None:
        """Hold a snapshot."""
        self._jobs = dict(jobs)

    def job_of(self, folder: RunFolder) -> Job | None:
        """The living job of a cell."""
        sent = submission(folder)
        return None if sent is None else self._jobs.get((str(sent["token"]), int(sent["task"])))

    def __len__(self) -> int:
        """Number of living tasks of ptqbench."""
        return len(self._jobs)


def look(folders: Iterable[RunFolder]) -> Queue:
    """Ask SLURM about the jobs of this user, if any of the folders was ever submitted.

    Raises:
        ConfigError: SLURM does not answer; guessing would submit a cell twice.
    """
    if all(submission(folder) is None for folder in folders):
        return Queue({})
    if shutil.which("squeue") is None:
        return Queue({})
    lines = _squeue()
    jobs = {}
    for line in lines:
        job_id, name, state, reason = [*line.strip().split("|", 3), "", "", ""][:4]
        if name.startswith("ptqbench-") and state in LIVE:
            task = job_id.partition("_")[2]
            jobs[name.removeprefix("ptqbench-"), int(task) if task.isdigit() else 0] = Job(job_id, state, reason)
    return Queue(jobs)


def _squeue() -> list[str]:
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%j|%T|%r"]
    problem = ""
    for attempt in range(TRIES):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            problem = "no answer within 60 s"
            continue
        if done.returncode == 0:
            return done.stdout.splitlines()
        problem = " ".join(done.stderr.split())
        if attempt + 1 < TRIES:
            time.sleep(PAUSE_S)
    raise ConfigError(f"squeue does not answer ({problem}); try again when SLURM is back")
