"""The run folder: where a cell lives on disk. Every write is atomic. The state is derived from the files, never stored.

    runs/<slug>-<run_id>/
        spec.json                 the cell, complete
        attempts/NNN/             meta.json (provenance), log.txt, heartbeat.json
        lease.json                who works on the cell now (``ptqbench.runs.lease``)
        submission.json           the SLURM job that was submitted for it, if any
        cancel.json               exists while the cell is to be stopped
        state/                    finished decoder blocks: the unit of resume
        layers.parquet            one row per linear
        bases.json                facts about the eigenbases, where the method has any (``engine.bases.recorded_facts``)
        records/                  losses of every window, scores of every example (``evaluate.records``)
        result.json               written last: its existence *is* "done"
        synced.json               which result Weights & Biases has (``ptqbench.tracking``)
        failure.json              class, message, traceback and log tail of the last failed attempt

No two processes append to the same file. Imports neither torch nor pandas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import RUN_ID_LENGTH, run_id
from ptqbench.cell.spec import RunSpec, build, to_dict
from ptqbench.errors import ConfigError, StorageError
from ptqbench.runs.files import moment, read_bytes, read_record
from ptqbench.runs.files import read_json as read_json
from ptqbench.runs.files import replacing as replacing
from ptqbench.runs.files import write_json as write_json
from ptqbench.runs.files import write_text as write_text
from ptqbench.runs.liveness import alive

DONE, FAILED, RUNNING, INTERRUPTED = "done", "failed", "running", "interrupted"
PENDING, DAMAGED, CANCELLED, UNREADABLE = "pending", "damaged", "cancelled", "unreadable"


def block_path(state: Path, index: int) -> Path:
    """The file of a finished decoder block."""
    return state / f"block_{index:04d}.safetensors"


class _In:
    """A path below the run folder, as an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type) -> Path:
        return folder.path / self._name


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One cell on disk. What each path holds is said at the top of this module."""

    path: Path

    spec_path = _In("spec.json")
    result_path = _In("result.json")
    failure_path = _In("failure.json")
    lease_path = _In("lease.json")
    submission_path = _In("submission.json")
    cancel_path = _In("cancel.json")
    layers_path = _In("layers.parquet")
    bases_path = _In("bases.json")
    records_path = _In("records")
    state_path = _In("state")
    synced_path = _In("synced.json")

    @property
    def run_id(self) -> str:
        """The identity in the folder's name."""
        return self.path.name[-RUN_ID_LENGTH:]

    def windows_path(self, label: str) -> Path:
        """The losses of a text, one row per window."""
        return self.records_path / "windows" / f"{quote(label, safe='')}.parquet"

    def examples_path(self, task: str) -> Path:
        """The answers to a task, one row per example."""
        return self.records_path / "examples" / f"{quote(task, safe='')}.parquet"

    def block_path(self, index: int) -> Path:
        """One finished decoder block."""
        return block_path(self.state_path, index)

    @property
    def attempts(self) -> list[Path]:
        """Folders of all attempts, oldest first."""
        folder = self.path / "attempts"
        return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def new_attempt(self) -> Path:
        """Create the folder of the next attempt; two processes never get the same one."""
        number = len(self.attempts) + 1
        while True:  # the number may have been taken meanwhile
            path = self.path / "attempts" / f"{number:03d}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
            number += 1

    def spec_bytes(self) -> bytes:
        """The content of ``spec.json``.

        Raises:
            OSError: There is no such file.
        """
        return read_bytes(f"{self.path}/spec.json")

    def read_spec(self) -> RunSpec:
        """Read the cell back.

        Raises:
            ConfigError: The file is missing, damaged, or describes another cell than the folder's name.
            StorageError: The file cannot be read.
        """
        data = read_record(self.spec_path)
        if not data:
            raise ConfigError(f"{self.spec_path} is missing or not valid JSON; expected the spec of a cell")
        spec = build(RunSpec, data)
        if run_id(spec) != self.run_id:
            raise ConfigError(
                f"{self.spec_path} describes cell {run_id(spec)}, not {self.run_id}: the folder was edited or copied, "
                "or ptqbench has changed since; give the request again to make a new folder"
            )
        return spec

    def result(self) -> dict[str, Any] | None:
        """The result of a finished cell, None if it is not finished or its file is damaged.

        Raises:
            StorageError: There is a result, and it cannot be read.
        """
        data = read_record(f"{self.path}/result.json")
        return data if data and data.get("run_id") == self.run_id else None

    def failure(self) -> dict[str, Any] | None:
        """The failure of the last attempt, if it failed."""
        return read_record(self.failure_path) or None

    def heartbeat(self) -> dict[str, Any] | None:
        """The last sign of life of the newest attempt."""
        attempts = self.attempts
        return (read_record(attempts[-1] / "heartbeat.json") or None) if attempts else None

    def beat_time(self) -> float | None:
        """When the newest attempt last gave a sign of life, seconds since the epoch."""
        return moment(self.heartbeat() or {}, "time")

    def holder(self, now: float | None = None) -> dict[str, Any] | None:
        """The lease of the cell where its holder is alive, else None.

        Args:
            now: The time, seconds since the epoch; None asks the clock.
        """
        held = read_record(self.lease_path)
        return held if held and alive(held, self.beat_time(), now) else None

    def state(self, now: float | None = None) -> str:
        """Derive the state from the files: done, failed, running, interrupted, cancelled, damaged, unreadable or pending."""
        return self.examined(now)[0]

    def examined(self, now: float | None = None) -> tuple[str, str]:
        """The state as ``state`` has it, and why the files cannot be read, which is empty where they can."""
        try:
            return self._state(now), ""
        except StorageError as error:
            return UNREADABLE, str(error)
        except OSError as error:
            return UNREADABLE, str(StorageError.of(error, f"{error.filename or self.path} cannot be read"))

    def _state(self, now: float | None) -> str:
        # In the order of what outweighs what: a result counts whatever else lies there, a living holder more than an old failure.
        if self.result_path.exists():
            return DONE if self.result() is not None else DAMAGED
        if self.holder(now) is not None:
            return RUNNING
        if self.failure_path.exists():
            return FAILED
        if self.cancel_path.exists():
            return CANCELLED
        return INTERRUPTED if self.attempts else PENDING


def folder_of(spec: RunSpec) -> RunFolder:
    """Find the folder of a cell under ``execution.runs_dir`` by its run id; without one, the folder that it will get."""
    return folders_of([spec])[0]


def folders_of(specs: Sequence[RunSpec]) -> list[RunFolder]:
    """Find the folders of many cells as ``folder_of`` does, with one listing of every ``execution.runs_dir``."""
    found: dict[Path, dict[str, Path]] = {}
    folders = []
    for spec in specs:
        root, identifier = Path(spec.execution.runs_dir), run_id(spec)
        if root not in found:
            # In reverse order, so that the first of several folders with one run id is the one that stays.
            names = sorted(os.listdir(root), reverse=True) if root.is_dir() else []
            found[root] = {name[-RUN_ID_LENGTH:]: root / name for name in names}
        folders.append(RunFolder(found[root].get(identifier, root / f"{labels.slug(spec)}-{identifier}")))
    return folders


def create(spec: RunSpec, folder: RunFolder | None = None) -> RunFolder:
    """Create (or find) the folder of a cell and write its spec.

    An existing folder has the same identity, by its name; its execution fields (device, folders) are replaced by those of ``spec``.

    Args:
        spec: The cell.
        folder: Its folder, where that is known already; None looks for it.

    Raises:
        StorageError: The folder cannot be made or written: no permission, a file in its place, a full disk.
    """
    folder = folder or folder_of(spec)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        data = to_dict(spec)
        # Of a sweep that is asked for again, no file is written and flushed once more.
        if read_json(folder.spec_path) != data:
            write_json(folder.spec_path, data)
    except OSError as error:
        raise StorageError.of(error, f"the run folder {folder.path} cannot be written") from error
    return folder


def all_runs(root: Path) -> Iterator[RunFolder]:
    """Yield every run folder under a root, sorted by name; anything else there is ignored."""
    if not root.is_dir():
        return
    for name in sorted(os.listdir(root)):
        # The name is checked before the disk is asked: there may be thousands of folders.
        tail = name[-RUN_ID_LENGTH:]
        named = len(name) > RUN_ID_LENGTH and all(c in "0123456789abcdef" for c in tail)
        if named and os.path.exists(f"{root}/{name}/spec.json"):
            yield RunFolder(root / name)
