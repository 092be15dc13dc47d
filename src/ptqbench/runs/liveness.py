"""Which process this is, and whether another one still lives. Imports neither torch nor pandas.

The holder of a lease (``ptqbench.runs.lease``) is dead

* on the same host and boot: when its process is gone (or its number was given to another process since), at once;
* in the same SLURM job: when the job has been restarted since, at once (SLURM has ended the previous incarnation);
* elsewhere: when it has not given a sign of life for ``HEARTBEAT_EXPIRY_S``.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

HEARTBEAT_INTERVAL_S = 10.0
HEARTBEAT_EXPIRY_S = 90.0
SAME_START_S = 5.0  # the kernel counts from boot, and the time of boot moves when the clock is adjusted


def alive(held: dict[str, Any], beat: float | None, now: float | None = None) -> bool:
    """Tell whether the holder of a lease still works.

    Args:
        held: Content of ``lease.json``.
        beat: Time of the last heartbeat in the folder, seconds since the epoch, or None.
        now: The time it is; None asks the clock.

    Returns:
        False only where the holder is certainly gone, or silent for longer than ``HEARTBEAT_EXPIRY_S``.
    """
    here = me()
    if held.get("machine") == here["machine"]:
        created = _created(int(held["pid"]))
        return created is not None and abs(created - float(held.get("created") or 0)) < SAME_START_S
    if held.get("slurm_job") is not None and held["slurm_job"] == here["slurm_job"]:
        return int(held.get("slurm_restart", 0)) >= int(here["slurm_restart"])
    last = max(float(held.get("time", 0)), beat or 0.0)
    return (time.time() if now is None else now) - last < HEARTBEAT_EXPIRY_S


def me() -> dict[str, Any]:
    """Describe this process: host, boot, number, start, and its SLURM job if any."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "created": _created(os.getpid()),
        "slurm_job": job,
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


@cache
def _machine() -> str:
    """Identify boot and process namespace: where both agree, a process number means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}:{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{uuid.getnode()}"


def _created(pid: int) -> float | None:
    """When a process was created, seconds since the epoch; None if there is no such process (or a zombie)."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None
