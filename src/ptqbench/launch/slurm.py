"""SLURM through submitit: one array per resource group, chunked to the cluster's largest array.

Every array is prepared before the first is submitted. The token of an array is written into its run folders before the
submission and the job's number after it, so that a process killed in between submits nothing twice (``ptqbench.runs.queue``).
The state of a cell is never asked of submitit or of SLURM's accounting: it is in the run folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell.spec import LauncherSpec
from ptqbench.errors import ConfigError
from ptqbench.launch.job import CellJob
from ptqbench.launch.report import Report
from ptqbench.runs.failures import KINDS
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, RunFolder, write_json
from ptqbench.runs.queue import JOB_NAME, QUEUED
from ptqbench.sweeps.plan import Row, groups, plan
from ptqbench.sweeps.resolve import Known

if TYPE_CHECKING:
    from ptqbench.sweeps.resources import Needs

JOBS_FOLDER = ".slurm"
DEFAULT_ARRAY = 1000
FOLLOW_S = 3.0
WARNING_SHARE = 4  # the warning comes in the last quarter of a short job at the earliest, else it would never work
KEPT = ("SLURM_CONF",)


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


def submit(rows: Sequence[Row], launcher: LauncherSpec, report: Report) -> list[str]:
    """Submit cells.

    Args:
        rows: Cells to run; their folders exist.
        launcher: Partition, account and the like.
        report: Told of every array.

    Returns:
        Numbers of the submitted arrays.

    Raises:
        ConfigError: ``sbatch`` refuses; says what it said. Arrays submitted before stay.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("launcher=slurm: no sbatch on PATH; use launcher=local, or load the module of SLURM")
    size, arrays = _largest_array(), []
    for amount, members in groups(rows).items():
        for start in range(0, len(members), size):
            arrays.append((amount, members[start : start + size], uuid.uuid4().hex[:12]))
    return [_submit_array(amount, members, token, launcher, report) for amount, members, token in arrays]


def follow(rows: Sequence[Row], launcher: LauncherSpec, report: Report) -> None:
    """Wait until every submitted cell is done, failed or cancelled; a cell that vanished from the queue is submitted again."""
    left, deaths, known = [row.cell for row in rows], dict[str, int](), Known()
    while left:
        now = plan(left, known)
        again = []
        for row in now:
            folder = row.cell.folder
            if folder is None or row.state in (RUNNING, QUEUED):
                continue
            if row.state not in (DONE, FAILED, CANCELLED) and deaths.get(folder.run_id, 0) < KINDS["killed"].retries:
                deaths[folder.run_id] = deaths.get(folder.run_id, 0) + 1
                again.append(row)
                continue
            left.remove(row.cell)
            _settle(row, folder, report)
        if again:
            report.say(f"[yellow]again[/] {len(again)} cells whose jobs ended without a result")
            submit(again, launcher, report)
        running = [row.cell for row in now if row.state == RUNNING]
        report.draw(running, len(left) - len(running))
        time.sleep(FOLLOW_S)


def cancel(folders: Sequence[RunFolder]) -> int:
    """Take the living jobs of cells out of the queue; returns how many."""
    from ptqbench.runs.queue import look

    queue = look(folders)
    jobs = [job.job_id for folder in folders if (job := queue.job_of(folder)) is not None]
    for start in range(0, len(jobs), 500):
        subprocess.run(["scancel", *jobs[start : start + 500]], check=False)
    return len(jobs)


def _settle(row: Row, folder: RunFolder, report: Report) -> None:
    if row.state == DONE:
        report.finished(row.cell)
    elif row.state == CANCELLED:
        report.note(CANCELLED, row.cell, "stopped; what is finished stays")
    elif row.state == FAILED:
        report.failed_on_record(row.cell)
    else:
        report.failed(row.cell, "killed", "its jobs ended again and again without a result", str(folder.path))


def _submit_array(amount: Needs, members: Sequence[Row], token: str, launcher: LauncherSpec, report: Report) -> str:
    import submitit

    folders = [row.cell.folder for row in members if row.cell.folder is not None]
    logs = folders[0].path.parent.resolve() / JOBS_FOLDER / token
    for task, folder in enumerate(folders):
        _record(folder, token, task, None, logs)
    try:
        with _clean_environment(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the exception
            executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=launcher.max_requeues)
            executor.update_parameters(**_parameters(amount, token, launcher))
            with executor.batch():
                work_s = amount.time_min * 60 - _signal_delay_s(amount, launcher)
                jobs = [executor.submit(CellJob(str(folder.path.resolve()), work_s)) for folder in folders]
            number = str(jobs[0].job_id).partition("_")[0]
    except (submitit.core.utils.FailedJobError, RuntimeError, subprocess.CalledProcessError, OSError) as error:
        for folder in folders:
            folder.submission_path.unlink(missing_ok=True)
        raise ConfigError(f"sbatch refused {len(folders)} cells ({amount.describe()}): {_last_line(error)}") from None
    for task, folder in enumerate(folders):
        _record(folder, token, task, number, logs)
    report.say(f"submitted job {number}: {len(folders)} cells, {amount.describe()}; output in {logs}")
    return number


def _record(folder: RunFolder, token: str, task: int, number: str | None, logs: Path) -> None:
    record = {"launcher": "slurm", "token": token, "task": task, "job": number, "logs": str(logs), "time": time.time()}
    write_json(folder.submission_path, record)


def _parameters(amount: Needs, token: str, launcher: LauncherSpec) -> dict[str, Any]:
    known: dict[str, Any] = {
        "job_name": JOB_NAME.format(token=token),
        "time": amount.time_min,
        "cpus_per_task": amount.cpus,
        "mem": f"{int(amount.host_mem_gib * 1024)}M",
        "array_parallelism": launcher.array_parallelism,
        "signal_delay_s": _signal_delay_s(amount, launcher),
        "stderr_to_stdout": True,
        "setup": list(launcher.setup) or None,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "gpus_per_node": amount.gpus or None,
        "additional_parameters": {"requeue": True, **launcher.sbatch},
    }
    return {name: value for name, value in known.items() if value is not None}


def _signal_delay_s(amount: Needs, launcher: LauncherSpec) -> int:
    return min(launcher.signal_delay_s, amount.time_min * 60 // WARNING_SHARE)


def _largest_array() -> int:
    try:
        text = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return DEFAULT_ARRAY
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(1, int(match[1]) - 1) if match else DEFAULT_ARRAY


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Submit as from a login node: settings of a surrounding job would leak into the new one."""
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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sbatch: fatal", "sbatch: error"))]
    return (said or lines or [type(error).__name__])[-1]
