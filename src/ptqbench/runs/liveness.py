"""Which process this is, and whether another one still lives. Imports neither torch nor pandas.

The holder of a lease (``ptqbench.runs.lease``) is dead

* on the same host and boot: as soon as its process is gone. A process that got the same number later has another start, which
  the kernel counts in ticks since boot, independent of the clock;
* in the same SLURM job: as soon as the job has been restarted, since SLURM ends a job before it restarts it;
* elsewhere: when it has given no sign of life for ``HEARTBEAT_EXPIRY_S``.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ptqbench.runs.files import number

HEARTBEAT_INTERVAL_S = 10.0
HEARTBEAT_EXPIRY_S = 90.0


def alive(held: Mapping[str, Any], beat: float | None, now: float | None = None) -> bool:
    """Whether the holder of a lease still works.

    Args:
        held: Content of ``lease.json``; a field that is missing or of another type is ignored.
        beat: Time of the last heartbeat in the folder, seconds since the epoch, or None.
        now: The time, seconds since the epoch; None asks the clock.

    Returns:
        False only where the holder is certainly gone, was silent for longer than ``HEARTBEAT_EXPIRY_S``, or has signs of life
        only in the future, which are those of a wrong clock or a damaged file.
    """
    here = me()
    known = number(held, "pid") is not None and number(held, "started") is not None
    if held.get("machine") == here["machine"] and known:
        return local_process(held) is not None
    if held.get("slurm_job") is not None and held["slurm_job"] == here["slurm_job"]:
        return bool((number(held, "slurm_restart") or 0) >= here["slurm_restart"])
    now = time.time() if now is None else now
    return any(t is not None and abs(now - t) < HEARTBEAT_EXPIRY_S for t in (number(held, "time"), beat))


def local_process(held: Mapping[str, Any]) -> int | None:
    """Number of the process that a lease names, where it lives on this machine; else None."""
    pid, started = number(held, "pid"), number(held, "started")
    if held.get("machine") != _machine() or pid is None or started is None:
        return None
    return int(pid) if _started(int(pid)) == started else None


def me() -> dict[str, Any]:
    """Describe this process: host, boot, number, start, and its SLURM job if any."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "slurm_job": job,
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


@cache
def _machine() -> str:
    """Identify host, boot and process namespace: where all agree, a process number means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}:{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{uuid.getnode()}"


def _started(pid: int) -> float | None:
    """When a process was started; None where there is no such process, or a zombie.

    On Linux: the kernel's clock ticks since boot, which do not depend on the clock. Elsewhere: seconds since the epoch.
    """
    try:
        # The name in parentheses may hold any character. Behind it the first field is the state, the twentieth the start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _created(pid)
    except (OSError, IndexError, ValueError):  # it ended meanwhile
        return None


def _created(pid: int) -> float | None:
    """As ``_started``, on systems without ``/proc``."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
