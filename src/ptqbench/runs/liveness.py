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
from collections.abc import Mapping
from typing import Any

from ptqbench.runs.files import number
from ptqbench.runs.processes import machine, started

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
    pid, begun = number(held, "pid"), number(held, "started")
    if held.get("machine") != machine() or pid is None or begun is None:
        return None
    return int(pid) if started(int(pid)) == begun else None


def me() -> dict[str, Any]:
    """Describe this process: host, boot, number, start, and its SLURM job if any."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": platform.node(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "slurm_job": job,
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }
