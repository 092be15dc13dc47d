"""SLURM through submitit: one array per resource group, chunked to the cluster's largest array.

A command that is killed at any moment of a submission leaves either no job or sound jobs, and submits nothing twice:

* The token of an array is written into its run folders before the submission. The array's name holds the token, so a later
  command finds the jobs in the queue (``ptqbench.runs.queue``), even where the job's number was never written down.
* The tasks of an array are written before the submission too, under names that do not depend on the job's number. Every job
  links its own task to the name under which submitit looks for it (``TAKE_TASK``).

Where ``sbatch`` fails, the queue is asked for the token before the failure is believed. Commands that submit into the same
folder of runs take turns. The state of a cell comes from its run folder, never from submitit or SLURM's accounting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell.labels import counted
from ptqbench.cell.spec import LauncherSpec
from ptqbench.errors import ConfigError, StorageError
from ptqbench.launch.job import CellJob
from ptqbench.launch.nodes import failing, say_left_out
from ptqbench.launch.summary import Summary
from ptqbench.runs.failures import KINDS
from ptqbench.runs.files import file_lock, write_json
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, UNREADABLE, RunFolder
from ptqbench.runs.queue import JOB_NAME, QUEUED, Queue, ask, settings
from ptqbench.sweeps.plan import Row, groups, plan
from ptqbench.sweeps.resolve import Known

if TYPE_CHECKING:
    from ptqbench.sweeps.resources import Needs

JOBS_FOLDER = ".slurm"
LOCK = ".submit.lock"
DEFAULT_ARRAY = 1000
FOLLOW_S = 3.0
STUCK_S = 30.0
"""Seconds for which a job must show a reason that it can never start before a waiting command gives it up; SLURM shows some such
reasons for a moment only."""
LOOKS, LOOK_S = 4, 3.0
"""How often the queue is asked for a submission whose outcome is not known, and the seconds between."""
REFUSED = re.compile(r"^sbatch: (?:error|fatal)", re.MULTILINE)
UNKNOWN = re.compile(
    r"time|contact|connect|communicat|transmit|receiv|zero bytes|socket|unexpected|slurmctld", re.IGNORECASE
)
REPLACED = "%\\\n"
"""Characters that SLURM does not take as they are in the names of output files."""
WARNING_SHARE = 4
"""A job is warned in the last quarter of its time at the earliest, so that a short job has time to work."""
KEPT = ("SLURM_CONF",)
OURS = ("job-name", "array")
"""Options of ``sbatch`` by which the jobs of cells are recognised."""
TAKE_TASK = (
    "id=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}\n"
    'task={logs}/"$id"_submitted.pkl; rm -f "$task.save_tmp"\n'
    '[ -e "$task" ] || ln -s "task_${{SLURM_ARRAY_TASK_ID:-0}}.pkl" "$task"'
)
"""Lines of the batch script by which a job takes its task, one of those that ``_write_tasks`` wrote. What is there already stays:
submitit puts an equal file there after the submission, and one that counts the requeues when a job is requeued. A job killed while
it writes the latter leaves a ``.save_tmp``, because of which submitit would not requeue it again."""

CONFIG_FILES = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")


def available() -> bool:
    """Whether this machine belongs to a SLURM cluster: ``sbatch`` is on PATH, and a configuration or a controller is found.

    A cluster whose controller is down still counts, so that nothing meant for it runs on a login node instead.
    """
    if shutil.which("sbatch") is None:
        return False
    if os.environ.get("SLURM_CONF") or any(Path(name).is_file() for name in CONFIG_FILES):
        return True
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def submitting(folders: Iterable[RunFolder]) -> Iterator[None]:
    """Hold the locks of folders of runs, so that no other command plans and submits their cells meanwhile.

    Raises:
        StorageError: The lock cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for root in sorted({folder.path.parent.resolve() for folder in folders}):
            try:
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(root / LOCK))
            except OSError as error:
                raise StorageError.of(error, f"{root / LOCK} cannot be locked") from error
        yield


def submit(rows: Sequence[Row], launcher: LauncherSpec, summary: Summary) -> list[str]:
    """Submit cells.

    Args:
        rows: Cells to run; their folders exist.
        launcher: Partition, account and the like.
        summary: Prints a line per array.

    Returns:
        Numbers of the submitted arrays.

    Raises:
        ConfigError: ``sbatch`` refuses, an option of ``launcher.sbatch`` belongs to ptqbench, or SLURM cannot write into the
            folder of runs. Arrays that were submitted before stay.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("launcher=slurm: no sbatch on PATH; use launcher=local, or load the module of SLURM")
    taken = sorted({name.replace("_", "-") for name in launcher.sbatch} & set(OURS))
    if taken:
        raise ConfigError(
            f"launcher.sbatch: expected no {' or '.join(OURS)}, which ptqbench sets itself, got {taken[0]}"
        )
    for root in {row.cell.folder.path.parent.resolve() for row in rows if row.cell.folder is not None}:
        if set(REPLACED) & set(str(root)):
            raise ConfigError(
                f"launcher=slurm: SLURM replaces % and \\ in the names of output files, got {str(root)!r}; choose another "
                "execution.runs_dir, or launcher=local"
            )
    failed = left_out(rows, launcher)
    if failed:
        summary.say(say_left_out(failed), "nodes", "yellow")
        launcher = dataclasses.replace(launcher, exclude=(*launcher.exclude, *failed))
    # Cells with equal needs share an array, unless it would be larger than the cluster allows.
    size, arrays = _largest_array(), []
    for amount, members in groups(rows).items():
        for start in range(0, len(members), size):
            arrays.append((amount, members[start : start + size], uuid.uuid4().hex[:12]))
    return [_submit_array(amount, members, token, launcher, summary) for amount, members, token in arrays]


def left_out(rows: Sequence[Row], launcher: LauncherSpec) -> dict[str, str]:
    """Nodes that a submission of these cells leaves out because cells failed there, with a few words on each."""
    roots = {row.cell.folder.path.parent for row in rows if row.cell.folder is not None}
    return {node: why for root in sorted(roots) for node, why in failing(root, launcher.forgive_h).items()}


def follow(rows: Sequence[Row], launcher: LauncherSpec, summary: Summary, submitted: Callable[[], None]) -> None:
    """Wait until every cell is done, failed or cancelled, or has a job that can never start.

    A cell whose job left the queue without a result is submitted again. While SLURM does not answer, nothing is concluded.

    Args:
        rows: Cells that were submitted, or run already.
        launcher: Partition, account and the like.
        summary: Prints what happens.
        submitted: Called when cells were submitted again.
    """
    left, deaths, known = [row.cell for row in rows], Counter[str](), Known()
    waiting = _Waiting(summary)
    while left:
        try:
            now = plan(left, known, patient=True)
        except ConfigError as problem:
            summary.say(str(problem), "waiting", "yellow")
            continue
        again = []
        for row in now:
            folder = row.cell.folder
            if folder is None or row.state == RUNNING or (row.state == QUEUED and not waiting.in_vain(row)):
                continue
            # The cell has ended, its job can never start, or its job has left the queue without a word.
            over = row.state in (DONE, FAILED, CANCELLED, UNREADABLE, QUEUED)
            if not over and deaths[folder.run_id] < KINDS["killed"].retries:
                deaths[folder.run_id] += 1
                again.append(row)
                continue
            left.remove(row.cell)
            _settle(row, folder, summary)
        if again:
            _submit_again(again, launcher, summary, known)
            submitted()
        waiting.say(now)
        running = [row.cell for row in now if row.state == RUNNING]
        summary.draw(running, len(left) - len(running))
        time.sleep(FOLLOW_S if left else 0)


def _submit_again(rows: Sequence[Row], launcher: LauncherSpec, summary: Summary, known: Known) -> None:
    """Submit cells whose jobs vanished, unless another command has done so meanwhile."""
    with submitting(row.cell.folder for row in rows if row.cell.folder is not None):
        todo = [row for row in plan([row.cell for row in rows], known, patient=True) if row.todo]
        if todo:
            summary.say(f"{counted(len(todo), 'cell')} whose jobs ended without a result", "again", "yellow")
            submit(todo, launcher, summary)


class _Waiting:
    """Prints why jobs wait, and knows since when jobs have had a reason that they can never start."""

    def __init__(self, summary: Summary) -> None:
        self._summary, self._said = summary, set[str]()
        self._stuck: dict[str, float] = {}

    def in_vain(self, row: Row) -> bool:
        """Whether the job of a queued cell has shown for ``STUCK_S`` that it can never start."""
        assert row.cell.folder is not None
        if row.job is None or row.job.obstacle is None:
            self._stuck.pop(row.cell.folder.run_id, None)
            return False
        return time.time() - self._stuck.setdefault(row.cell.folder.run_id, time.time()) >= STUCK_S

    def say(self, rows: Sequence[Row]) -> None:
        """Print each reason for which jobs wait, once."""
        reasons = Counter(row.job.reason for row in rows if row.job is not None and row.job.state == "PENDING")
        for reason, count in reasons.items():
            if reason not in self._said:
                example = next(row.detail for row in rows if row.job is not None and row.job.reason == reason)
                self._summary.say(f"{counted(count, 'cell')} in the queue, e.g. {example}", "waiting", "yellow")
        self._said |= reasons.keys()


def cancel(folders: Sequence[RunFolder], queue: Queue) -> int:
    """Take the jobs of cells out of the queue; returns how many there were."""
    jobs = [job.job_id for folder in folders if (job := queue.job_of(folder)) is not None]
    # In parts, since the length of a command line is limited.
    for start in range(0, len(jobs), 500):
        subprocess.run(["scancel", *jobs[start : start + 500]], check=False)
    return len(jobs)


def _settle(row: Row, folder: RunFolder, summary: Summary) -> None:
    """Print how a cell ended."""
    if row.state == DONE:
        summary.finished(row.cell)
    elif row.state == CANCELLED:
        summary.note(CANCELLED, row.cell, "stopped; what is finished stays")
    elif row.state == FAILED:
        summary.failed_on_record(row.cell)
    elif row.state in (QUEUED, UNREADABLE):
        summary.failed(row.cell, "config", row.detail, str(folder.path))
    else:
        summary.failed(row.cell, "killed", "its jobs ended again and again without a result", str(folder.path))


def _submit_array(amount: Needs, members: Sequence[Row], token: str, launcher: LauncherSpec, summary: Summary) -> str:
    """Submit cells with the same needs; returns the number of their array."""
    import submitit

    folders = [row.cell.folder for row in members if row.cell.folder is not None]
    logs = folders[0].path.parent.resolve() / JOBS_FOLDER / token
    work_s = amount.time_min * 60 - _signal_delay_s(amount, launcher)
    tasks = [CellJob(str(folder.path.resolve()), work_s) for folder in folders]
    # Ahead of the submission: what later commands and the jobs themselves need, should this process be killed.
    _record(folders, token, None, logs)
    _write_tasks(tasks, logs, amount.time_min, launcher.max_requeues)
    try:
        with clean_environment(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the exception
            executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=launcher.max_requeues)
            executor.update_parameters(**_parameters(amount, token, logs, launcher))
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
            number = str(jobs[0].job_id).partition("_")[0]
    except (submitit.core.utils.FailedJobError, RuntimeError, subprocess.CalledProcessError, OSError) as error:
        number = _taken(error, token, folders, f"{counted(len(folders), 'cell')} ({amount.describe()})")
    _record(folders, token, number, logs)
    summary.say(f"submitted job {number}: {counted(len(folders), 'cell')}, {amount.describe()}; output in {logs}")
    return number


def _taken(error: BaseException, token: str, folders: Sequence[RunFolder], what: str) -> str:
    """Find the array that SLURM has taken although ``sbatch`` failed.

    Returns:
        The number of the array.

    Raises:
        ConfigError: SLURM has not taken it, or it is not known whether it has. In the second case the token stays in the run
            folders, so that later commands recognise the jobs.
    """
    # A refusal in plain words is certain; after a lost connection the array may show up in the queue later.
    said, sure = _last_line(error), bool(REFUSED.search(str(error))) and not UNKNOWN.search(_last_line(error))
    for look in range(1 if sure else LOOKS):
        time.sleep(LOOK_S if look else 0)
        try:
            number = ask().number_of(token)
        except ConfigError as problem:
            raise ConfigError(
                f"sbatch failed for {what}: {said}; it is not known whether SLURM has taken them: {problem}; "
                "the same command looks for them before it submits"
            ) from None
        if number is not None:
            return number
    # No job can have the token: without it the cells are pending again.
    if sure:
        for folder in folders:
            folder.submission_path.unlink(missing_ok=True)
    raise ConfigError(f"sbatch refused {what}: {said}") from None


def _write_tasks(tasks: Sequence[CellJob], logs: Path, time_min: int, max_requeues: int) -> None:
    """Write the tasks of an array in submitit's form, ahead of the submission."""
    from submitit.core.utils import DelayedSubmission

    logs.mkdir(parents=True, exist_ok=True)
    for index, task in enumerate(tasks):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(time_min, max_requeues)
        delayed.dump(logs / f"task_{index}.pkl")


def _record(folders: Sequence[RunFolder], token: str, number: str | None, logs: Path) -> None:
    """Write the ``submission.json`` of the cells of an array; its number is None as long as it is not known."""
    common = {"launcher": "slurm", "token": token, "job": number, "logs": str(logs), "time": time.time()}
    for task, folder in enumerate(folders):
        write_json(folder.submission_path, common | {"task": task})


def _parameters(amount: Needs, token: str, logs: Path, launcher: LauncherSpec) -> dict[str, Any]:
    known: dict[str, Any] = {
        "job_name": JOB_NAME.format(token=token),
        "time": amount.time_min,
        "cpus_per_task": amount.cpus,
        "mem": f"{int(amount.host_mem_gib * 1024)}M",
        "array_parallelism": launcher.array_parallelism,
        "signal_delay_s": _signal_delay_s(amount, launcher),
        "stderr_to_stdout": True,
        "setup": [TAKE_TASK.format(logs=shlex.quote(str(logs))), *launcher.setup],
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "gpus_per_node": amount.gpus or None,
        "additional_parameters": {"requeue": True, **launcher.sbatch, **_excluded(launcher)},
    }
    return {name: value for name, value in known.items() if value is not None}


def _excluded(launcher: LauncherSpec) -> dict[str, str]:
    """The nodes to leave out, those of ``launcher.sbatch`` among them."""
    given = launcher.sbatch.get("exclude")
    names = [*([] if given is None else [str(given)]), *launcher.exclude]
    return {"exclude": ",".join(names)} if names else {}


def _signal_delay_s(amount: Needs, launcher: LauncherSpec) -> int:
    return min(launcher.signal_delay_s, amount.time_min * 60 // WARNING_SHARE)


def _largest_array() -> int:
    """Number of tasks that one array may have."""
    with contextlib.suppress(ConfigError, KeyError, ValueError):
        return max(1, int(settings()["MaxArraySize"]) - 1)
    return DEFAULT_ARRAY


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the settings of a surrounding job, which ``sbatch`` would apply to the new one."""
    inherited = {
        key: os.environ.pop(key)
        for key in list(os.environ)
        if key.startswith(("SLURM_", "SBATCH_", "SRUN_")) and key not in KEPT
    }
    try:
        yield
    finally:
        os.environ.update(inherited)


def _last_line(error: BaseException) -> str:
    """The last error of ``sbatch`` in the output that an exception holds, else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sbatch: fatal", "sbatch: error"))]
    return (said or lines or [type(error).__name__])[-1]
