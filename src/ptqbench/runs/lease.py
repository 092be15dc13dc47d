"""The lease of a run folder: at most one process works on a cell.

``lease.json`` names its holder (host, boot, process, SLURM job). A process that wants the cell reads it under a file lock, which
is held for a moment only. For the hours of the work the holder's sign of life counts (``ptqbench.runs.liveness``), because locks
are lost or ignored on some cluster file systems.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from ptqbench.errors import CellBusy, StorageError
from ptqbench.runs import artefacts
from ptqbench.runs.files import TEMPORARY, abandoned, file_lock, moment, read_record, remove_temporaries, write_json
from ptqbench.runs.liveness import me

if TYPE_CHECKING:
    from ptqbench.runs.folder import RunFolder

LOCK_TIMEOUT_S = 60.0
WRITTEN_BY_COMMANDS = ("spec", "submission", "cancel", "synced")
"""Files that commands write without the lease."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """The lease of a run folder. This process holds it, unless it was silent for so long that another one took over.

    Attributes:
        folder: The cell.
        record: The lease as written.
    """

    folder: RunFolder
    record: dict[str, Any]

    def check(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            CellBusy: Another process has taken the cell over.
        """
        if not self.is_mine():
            raise CellBusy(
                f"{self.folder.path.name} was taken over by another process while this one was suspended or its file system "
                "hung; left to it (the same command shows its result when it is done)"
            )

    def is_mine(self) -> bool:
        """Whether ``lease.json`` still names this process, or cannot be read now."""
        try:
            return bool(read_record(self.folder.lease_path).get("token") == self.record["token"])
        except StorageError:
            return True

    @contextlib.contextmanager
    def confirmed(self) -> Iterator[None]:
        """Hold the folder's lock while the result is written, so that no other process takes over meanwhile.

        Raises:
            CellBusy: Another process has taken the cell over.
        """
        with _lock(self.folder):
            self.check()
            yield


@contextlib.contextmanager
def lease(folder: RunFolder) -> Iterator[Lease]:
    """Hold the lease of a run folder. Files that killed holders left half written are removed.

    Args:
        folder: Existing run folder.

    Yields:
        The lease.

    Raises:
        CellBusy: A living process holds it; the message names host, process and since when.
        StorageError: The folder cannot be read or written.
    """
    mine = Lease(folder, {"token": uuid.uuid4().hex, "time": time.time(), **me()})
    with _lock(folder):
        held = folder.holder()
        if held is not None:
            raise CellBusy(
                f"{folder.path.name} is being worked on by process {held.get('pid')} on {held.get('host')} "
                f"since {_when(held)}; left to it (the same command shows its result when it is done)"
            )
        # Nobody works on the cell now, so whatever is half written is a dead process's.
        _clean(folder)
        write_json(folder.lease_path, mine.record)
    try:
        yield mine
    finally:  # the lease goes, unless another process has taken it over
        with contextlib.suppress(CellBusy, StorageError), _lock(folder):
            if read_record(folder.lease_path).get("token") == mine.record["token"]:
                folder.lease_path.unlink(missing_ok=True)


def drop_stale(folder: RunFolder) -> None:
    """Remove the lease and the half-written files of a process that was killed after it had written the result."""
    if os.path.exists(folder.lease_path):
        with contextlib.suppress(CellBusy, StorageError), _lock(folder):
            if folder.holder() is None:
                _clean(folder)
                folder.lease_path.unlink(missing_ok=True)


def _clean(folder: RunFolder) -> None:
    """Remove the temporary files of killed processes; called under the lock, while no process works on the cell."""
    # ".spec.json.<writer>.tmp" was to become spec.json.
    mine = (path for path in folder.path.glob(TEMPORARY) if path.name.split(".")[1] not in WRITTEN_BY_COMMANDS)
    remove_temporaries([*mine, *abandoned(folder.path), *abandoned(folder.path.parent / artefacts.FOLDER)])
    for place in (folder.state_path, folder.path / "attempts", folder.records_path):
        remove_temporaries(place.rglob(TEMPORARY))


def _when(held: dict[str, Any]) -> str:
    since = moment(held, "time")
    return "an unknown time" if since is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


@contextlib.contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock. An ``OSError``, here or inside the block, becomes a ``StorageError``."""
    try:
        with file_lock(folder.path / ".lock", LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise CellBusy(f"{folder.path}/.lock was held for {LOCK_TIMEOUT_S:.0f} s: look for a hanging process") from None
    except OSError as error:
        raise StorageError.of(error, f"the run folder {folder.path} cannot be written") from error
