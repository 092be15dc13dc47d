"""Which submitted cells still wait or run in SLURM, from one call of ``squeue``. Needs no accounting.

The name of every array holds a token of its own (``ptqbench-TOKEN``), which is written into the run folders *before* the
submission. So a cell is recognised in the queue even where the submitting process was killed before it wrote down the job's
number, and where ``sbatch`` reported the failure of a submission that SLURM had taken.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ptqbench.errors import ConfigError, StorageError
from ptqbench.runs.files import number, read_record
from ptqbench.runs.folder import RunFolder

JOB_NAME = "ptqbench-{token}"
QUEUED = "queued"
HELD = ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT")
LIVE = (*HELD, "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING")
"""``HELD``: states of jobs that do not run yet or again. ``LIVE``: those of all jobs that wait or run."""
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
"""Reasons of pending jobs that do not go away by waiting, with what to do."""
OF_ONE_JOB = re.compile(r"(Assoc|QOS).*(PerJob|PerNode)", re.IGNORECASE)
"""Limits of an account that a single job exceeds. Other limits (``AssocMaxJobsLimit``) are lifted when other jobs end."""
OF_ACCOUNT = re.compile(r"(Assoc|QOS)(Max|Grp|Min)", re.IGNORECASE)
TRIES, PAUSE_S, TIMEOUT_S = 10, 3.0, 60.0
"""How often ``squeue`` is called, the seconds between two calls, and the seconds that a call may take."""
SHORT_S = 8.0
"""Seconds that a command waits for SLURM where it can go on with what is on disk."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One task of an array in the queue, as ``squeue`` shows it."""

    job_id: str
    state: str
    reason: str

    @property
    def obstacle(self) -> str | None:
        """Why the job can never start, and what to do about it; None where waiting can help."""
        if self.state not in HELD:
            return None
        # SLURM writes reasons in one word or several, by version: "JobHoldMaxRequeue", "launch failed requeued held".
        word = self.reason.replace(" ", "").replace("_", "").lower()
        if OF_ONE_JOB.search(word):
            return (
                "it asks for more than the limits of the account allow: lower resources, or take another launcher.qos"
            )
        return next((advice for reason, advice in NEVER.items() if reason.lower() == word), None)

    def describe(self) -> str:
        """The state of the job in a few words, and what keeps it from starting."""
        where = f"job {self.job_id} {self.state.lower()} ({self.reason})"
        if self.obstacle is not None:
            return f"{where}: can never start: {self.obstacle}; then: ptqbench cancel, and the same command again"
        limited = self.state == "PENDING" and OF_ACCOUNT.match(self.reason)
        return f"{where}: a limit of the account; starts when other jobs end, if ever" if limited else where


def submission(folder: RunFolder) -> dict[str, Any] | None:
    """The content of ``submission.json``: the SLURM job that was submitted for a cell; None where there was none."""
    data = read_record(f"{folder.path}/submission.json")
    return data if data.get("launcher") == "slurm" else None


@dataclasses.dataclass(frozen=True)
class Queue:
    """A snapshot of the jobs of this user.

    Attributes:
        jobs: By token and number of the task.
        problem: Why SLURM did not answer, in which case there are no jobs; None where it answered.
    """

    jobs: Mapping[tuple[str, int], Job]
    problem: str | None = None

    def job_of(self, folder: RunFolder) -> Job | None:
        """The job of a cell that waits or runs, if any."""
        sent = submission(folder) or {}
        task = number(sent, "task")
        return None if task is None else self.jobs.get((str(sent.get("token")), int(task)))

    def number_of(self, token: str) -> str | None:
        """Number of the array that was submitted under a token and waits or runs, if any."""
        ids = (job.job_id.partition("_")[0] for (name, _), job in self.jobs.items() if name == token)
        return next(ids, None)


def look(folders: Iterable[RunFolder], patient: bool = False) -> Queue:
    """Ask SLURM about the jobs of this user, if any of the folders was ever submitted.

    Args:
        folders: Run folders.
        patient: Whether the queue must be known: ask ``TRIES`` times, then raise. Else ask once, and return a queue with
            ``problem``.

    Raises:
        ConfigError: ``patient``, and SLURM does not answer; a guess would submit a cell twice.
    """
    if shutil.which("squeue") is None or not any(_was_submitted(folder) for folder in folders):
        return Queue({})
    if patient:
        return ask()
    try:
        return ask(1, SHORT_S)
    except ConfigError as error:
        return Queue({}, str(error))


def ask(tries: int = TRIES, timeout_s: float = TIMEOUT_S) -> Queue:
    """Ask SLURM about the jobs of this user.

    Args:
        tries: How often ``squeue`` is called at most.
        timeout_s: Seconds that a call may take.

    Raises:
        ConfigError: SLURM does not answer.
    """
    jobs = {}
    # A line is "17_3|ptqbench-TOKEN|PENDING|Resources"; a job that is no array has no task number, and is task 0.
    for line in _squeue(tries, timeout_s):
        job_id, name, state, reason = [*line.strip().split("|", 3), "", "", ""][:4]
        if name.startswith("ptqbench-") and state in LIVE:
            task = job_id.partition("_")[2]
            jobs[name.removeprefix("ptqbench-"), int(task) if task.isdigit() else 0] = Job(job_id, state, reason)
    return Queue(jobs)


def settings() -> dict[str, str]:
    """The configuration of the cluster, by name.

    Raises:
        ConfigError: The controller does not answer.
    """
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"scontrol does not answer ({type(error).__name__})") from error
    if done.returncode != 0:
        said = textwrap.shorten(done.stderr, 160, placeholder=" ...")
        raise ConfigError(f"the controller does not answer: {said}")
    return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", done.stdout, re.MULTILINE))


def _was_submitted(folder: RunFolder) -> bool:
    try:
        return submission(folder) is not None
    except StorageError:  # the state of the cell says so
        return False


def _squeue(tries: int, timeout_s: float) -> list[str]:
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
        # The controller is busy or restarts: it answers again within seconds.
        problem = " ".join(done.stderr.split())
        if attempt + 1 < tries:
            time.sleep(PAUSE_S)
    raise ConfigError(f"squeue does not answer ({problem}); try again when SLURM is back")
