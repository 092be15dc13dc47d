"""The lease of a run folder: at most one process works on a cell.

``lease.json`` names its holder (host, boot, process, SLURM job). Whoever wants the cell reads it under a file lock that is
held for a moment only; the long-lived protection is the holder's sign of life (``ptqbench.runs.liveness``), since locks are lost
or ignored on some cluster file systems.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ptqbench.errors import CellBusy
from ptqbench.runs.folder import read_json, write_json
from ptqbench.runs.liveness import alive, me

if TYPE_CHECKING:
    from ptqbench.runs.folder import RunFolder

LOCK_TIMEOUT_S = 60.0


@contextlib.contextmanager
def lease(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Hold the lease of a run folder.

    Args:
        folder: Existing run folder.

    Yields:
        The lease as written.

    Raises:
        CellBusy: A living process holds it; names host, process and since when.
    """
    mine = {"token": uuid.uuid4().hex, "time": time.time(), **me()}
    with _lock(folder):
        held = read_json(folder.lease_path)
        if isinstance(held, dict) and alive(held, folder.beat_time()):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(held["time"])))
            raise CellBusy(
                f"{folder.path.name} is being worked on by process {held['pid']} on {held['host']} since {since}; "
                "left to it (the same command shows its result when it is done)"
            )
        write_json(folder.lease_path, mine)
    try:
        yield mine
    finally:
        with contextlib.suppress(CellBusy, OSError), _lock(folder):
            if (read_json(folder.lease_path) or {}).get("token") == mine["token"]:
                folder.lease_path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    try:
        with FileLock(folder.path / ".lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise CellBusy(f"{folder.path}/.lock was held for {LOCK_TIMEOUT_S:.0f} s: look for a hanging process") from None
