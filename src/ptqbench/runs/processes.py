"""Processes of this machine: which machine it is, and when a process began. Imports neither torch nor pandas."""

from __future__ import annotations

import platform
import uuid
from functools import cache
from pathlib import Path


@cache
def machine() -> str:
    """Identify host, boot and process namespace: where all agree, a process number means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}:{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{uuid.getnode()}"


def started(pid: int) -> float | None:
    """When a process of this machine was started; None where there is no such process, or a zombie.

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
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
