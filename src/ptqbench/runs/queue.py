"""Which submitted cells still wait or run in SLURM, from one call of ``squeue``. Needs no accounting.

Every array is submitted under a name that nothing else has (``ptqbench-TOKEN``), and the token is written into the run
folders *before* the submission. So a cell is recognised in the queue even where the submitting process was killed before it
could write the job's number, and where ``sbatch`` reported a failure of what SLURM had taken.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ptqbench.errors import ConfigError, StorageError
from ptqbench.runs.files import number, read_record
from ptqbench.runs.folder import RunFolder

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
NEVER = {
    "PartitionTimeLimit": "it asks for more time than the partition allows: lower resources.time_min, or take another "
    "launcher.partition",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows: take another launcher.partition",
    "PartitionConfig": "no node of the partition is as large as it asks for: lower resources.cpus, resources.gpus or "
    "resources.host_mem_gib, or take another launcher.partition",
    "BadConstraints": "no node has what it asks for: look at launcher.constraint and resources",
    "DependencyNeverSatisfied": "the job that it waits for has failed: look at launcher.sbatch.dependency",
    "InvalidAccount": "look at launcher.account",
    "InvalidQOS": "look at launcher.qos",
    "AccountNotAllowed": "the partition does not take this account: look at launcher.account and launcher.partition",
    "QOSNotAllowed": "the partition does not take this QOS: look at launcher.qos and launcher.partition",
    "JobHoldMaxRequeue": "SLURM has put it back into the queue too often and holds it: look at its log",
    "launchfailedrequeuedheld": "SLURM could not start it and holds it: ask the administrator, or scontrol release",
    "jobrequeuedinheldstate": "SLURM has put it back into the queue and holds it: scontrol release",
}
"""Reasons of pending jobs that no waiting changes, with what to do."""
OF_ONE_JOB = re.compile(r"(Assoc|QOS).*(PerJob|PerNode)", re.IGNORECASE)
"""Limits of an account that a single job exceeds; other limits (``AssocMaxJobsLimit``) end with other jobs."""
OF_ACCOUNT = re.compile(r"(Assoc|QOS)(Max|Grp|Min)", re.IGNORECASE)
TRIES, PAUSE_S, TIMEOUT_S = 10, 3.0, 60.0
SHORT_S = 8.0
"""Seconds that a command waits for SLURM where it can go on with what the disk says."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One task of an array in the queue."""

    job_id: str
    state: str
    reason: str

    @property
    def obstacle(self) -> str | None:
        """Why the job can never start, and what to do; None where waiting can help."""
        if self.state not in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT"):
            return None
        word = self.reason.replace(" ", "").replace("_", "").lower()
        if OF_ONE_JOB.search(word):
            return (
                "it asks for more than the limits of the account allow: lower resources, or take another launcher.qos"
            )
        return next((advice for reason, advice in NEVER.items() if reason.lower() == word), None)

    def describe(self) -> str:
        """Say in a few words where the job is, and what keeps it there."""
        where = f"job {self.job_id} {self.state.lower()} ({self.reason})"
        if self.obstacle is not None:
            return f"{where}: can never start: {self.obstacle}; then: ptqbench cancel, and the same command again"
        limited = self.state == "PENDING" and OF_ACCOUNT.match(self.reason)
        return f"{where}: a limit of the account; starts when other jobs end, if ever" if limited else where


def submission(folder: RunFolder) -> dict[str, Any] | None:
    """The job that was submitted for a cell, if any."""
    data = read_record(f"{folder.path}/submission.json")
    return data if data.get("launcher") == "slurm" else None


class Queue:
    """A snapshot of the jobs of this user: (token, task) -> job.

    Attributes:
        problem: Why SLURM did not answer, which makes the snapshot empty; None where it did.
    """

    def __init__(self, jobs: Mapping[tuple[str, int], Job], problem: str | None = None) -> None:
        self._jobs, self.problem = dict(jobs), problem

    def job_of(self, folder: RunFolder) -> Job | None:
        """The living job of a cell."""
        sent = submission(folder) or {}
        task = number(sent, "task")
        return None if task is None else self._jobs.get((str(sent.get("token")), int(task)))

    def number_of(self, token: str) -> str | None:
        """Number of the living array that was submitted under a token."""
        ids = (job.job_id.partition("_")[0] for (name, _), job in self._jobs.items() if name == token)
        return next(ids, None)

    def __len__(self) -> int:
        """Number of living tasks of ptqbench."""
        return len(self._jobs)


def look(folders: Iterable[RunFolder], patient: bool = False) -> Queue:
    """Ask SLURM about the jobs of this user, if any of the folders was ever submitted.

    Args:
        folders: Run folders.
        patient: Whether to ask again and again, and to raise rather than to answer with ``Queue.problem``.

    Raises:
        ConfigError: SLURM does not answer; guessing would submit a cell twice.
    """
    if shutil.which("squeue") is None or not any(_was_submitted(folder) for folder in folders):
        return Queue({})
    return ask(TRIES, TIMEOUT_S) if patient else _asked_once()


def ask(tries: int = TRIES, timeout_s: float = TIMEOUT_S) -> Queue:
    """Ask SLURM about the jobs of this user.

    Args:
        tries: How often.
        timeout_s: Seconds that a try may take.

    Raises:
        ConfigError: SLURM does not answer.
    """
    jobs = {}
    for line in _squeue(tries, timeout_s):
        job_id, name, state, reason = [*line.strip().split("|", 3), "", "", ""][:4]
        if name.startswith("ptqbench-") and state in LIVE:
            task = job_id.partition("_")[2]
            jobs[name.removeprefix("ptqbench-"), int(task) if task.isdigit() else 0] = Job(job_id, state, reason)
    return Queue(jobs)


def _asked_once() -> Queue:
    try:
        return ask(1, SHORT_S)
    except ConfigError as error:
        return Queue({}, str(error))


def _was_submitted(folder: RunFolder) -> bool:
    try:
        return submission(folder) is not None
    except StorageError:  # said of the cell itself
        return False


def _squeue(tries: int = TRIES, timeout_s: float = TIMEOUT_S) -> list[str]:
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%j|%T|%r"]
    problem = ""
    for attempt in range(tries):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout_s:g} s"
            continue
        if done.returncode == 0:
            return done.stdout.splitlines()
        problem = " ".join(done.stderr.split())
        if attempt + 1 < tries:
            time.sleep(PAUSE_S)
    raise ConfigError(f"squeue does not answer ({problem}); try again when SLURM is back")
