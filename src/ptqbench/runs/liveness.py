"""Which process this is, and whether another one still lives. Imports neither torch nor pandas.

The holder of a lease (``ptqbench.runs.lease``) is dead

* on the same host and boot: when its process is gone (or its number was given to another process since, which the kernel's
  count of ticks tells, not the clock), at once;
* in the same SLURM job: when the job has been restarted since, at once (SLURM has ended the previous incarnation);
* elsewhere: when it has not given a sign of life for ``HEARTBEAT_EXPIRY_S``.
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
    """Tell whether the holder of a lease still works.

    Args:
        held: Content of ``lease.json``; a field that is missing or of another type tells nothing.
        beat: Time of the last heartbeat in the folder, seconds since the epoch, or None.
        now: The time it is; None asks the clock.

    Returns:
        False only where the holder is certainly gone, silent for longer than ``HEARTBEAT_EXPIRY_S``, or heard of at no time
        but a future one, which a wrong clock or a damaged file has written.
    """
    here = me()
    if (
        held.get("machine") == here["machine"]
        and number(held, "pid") is not None
        and number(held, "started") is not None
    ):
        return local_process(held) is not None
    if held.get("slurm_job") is not None and held["slurm_job"] == here["slurm_job"]:
        return bool((number(held, "slurm_restart") or 0) >= here["slurm_restart"])
    now = time.time() if now is None else now
    return any(t is not None and abs(now - t) < HEARTBEAT_EXPIRY_S for t in (number(held, "time"), beat))


def local_process(held: Mapping[str, Any]) -> int | None:
    """Number of the living process of this machine that a lease names; None if it names none."""
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
