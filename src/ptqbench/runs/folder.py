"""The run folder: where a cell lives on disk. Every path is a property, every write is atomic, the state is derived.

    runs/<slug>-<run_id>/
        spec.json                 the cell, complete
        attempts/NNN/             meta.json (provenance), log.txt, heartbeat.json
        lease.json                who works on the cell now (``ptqbench.runs.lease``)
        submission.json           the job that was submitted for it, if any
        cancel.json               somebody asked for it to be stopped
        state/                    finished blocks: the unit of resume
        layers.parquet            one row per linear
        records/                  losses of every window, scores of every example (``evaluate.records``)
        result.json               written last: its existence *is* "done"
        synced.json               which result Weights & Biases has (``ptqbench.tracking``)
        failure.json              class, message, traceback and log tail of the last failed attempt

No file is ever appended to by two processes. Imports neither torch nor pandas.
"""

from __future__ import annotations

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
from ptqbench.runs.files import number, read_bytes, read_record
from ptqbench.runs.files import read_json as read_json
from ptqbench.runs.files import replacing as replacing
from ptqbench.runs.files import write_json as write_json
from ptqbench.runs.files import write_text as write_text
from ptqbench.runs.liveness import alive

DONE, FAILED, RUNNING, INTERRUPTED = "done", "failed", "running", "interrupted"
PENDING, DAMAGED, CANCELLED, UNREADABLE = "pending", "damaged", "cancelled", "unreadable"


def block_path(state: Path, index: int) -> Path:
    """Name the file of a finished decoder block."""
    return state / f"block_{index:04d}.safetensors"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One cell on disk."""

    path: Path

    @property
    def run_id(self) -> str:
        """The identity in the folder's name."""
        return self.path.name[-RUN_ID_LENGTH:]

    @property
    def spec_path(self) -> Path:
        """The cell as plain data."""
        return self.path / "spec.json"

    @property
    def result_path(self) -> Path:
        """Exists exactly when the cell is done."""
        return self.path / "result.json"

    @property
    def failure_path(self) -> Path:
        """Why the last attempt failed."""
        return self.path / "failure.json"

    @property
    def lease_path(self) -> Path:
        """Who works on the cell now."""
        return self.path / "lease.json"

    @property
    def submission_path(self) -> Path:
        """The job that was submitted for the cell."""
        return self.path / "submission.json"

    @property
    def cancel_path(self) -> Path:
        """Exists while the cell is to be stopped."""
        return self.path / "cancel.json"

    @property
    def layers_path(self) -> Path:
        """One row per linear, Parquet."""
        return self.path / "layers.parquet"

    @property
    def bases_path(self) -> Path:
        """What is kept of eigenbases beside the matrices: ``engine.bases.recorded_facts``."""
        return self.path / "bases.json"

    @property
    def records_path(self) -> Path:
        """Finished texts and tasks, Parquet."""
        return self.path / "records"

    def windows_path(self, label: str) -> Path:
        """One row per window of a text."""
        return self.records_path / "windows" / f"{quote(label, safe='')}.parquet"

    def examples_path(self, task: str) -> Path:
        """One row per example of a task."""
        return self.records_path / "examples" / f"{quote(task, safe='')}.parquet"

    @property
    def state_path(self) -> Path:
        """Finished blocks."""
        return self.path / "state"

    def block_path(self, index: int) -> Path:
        """One finished decoder block."""
        return block_path(self.state_path, index)

    @property
    def synced_path(self) -> Path:
        """Which result of the cell W&B has, if any."""
        return self.path / "synced.json"

    @property
    def attempts(self) -> list[Path]:
        """Folders of all attempts, oldest first."""
        folder = self.path / "attempts"
        return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def new_attempt(self) -> Path:
        """Create the folder of the next attempt; two processes never get the same one."""
        number = len(self.attempts) + 1
        while True:
            path = self.path / "attempts" / f"{number:03d}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return path

    def spec_bytes(self) -> bytes:
        """The content of ``spec.json``.

        Raises:
            OSError: There is no such file.
        """
        return read_bytes(f"{self.path}/spec.json")

    def read_spec(self) -> RunSpec:
        """Read the cell back.

        Raises:
            ConfigError: The file is missing or damaged, or does not describe the cell the folder is named after.
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
        return number(self.heartbeat() or {}, "time")

    def holder(self, now: float | None = None) -> dict[str, Any] | None:
        """The lease of whoever works on the cell now, if that is somebody who lives."""
        held = read_record(self.lease_path)
        return held if held and alive(held, self.beat_time(), now) else None

    def state(self, now: float | None = None) -> str:
        """Derive the state from the files: done, failed, running, interrupted, cancelled, damaged, unreadable or pending."""
        return self.examined(now)[0]

    def examined(self, now: float | None = None) -> tuple[str, str]:
        """The state, and why the files cannot be read where they cannot."""
        try:
            return self._state(now), ""
        except StorageError as error:
            return UNREADABLE, str(error)
        except OSError as error:
            return UNREADABLE, str(StorageError.of(error, f"{error.filename or self.path} cannot be read"))

    def _state(self, now: float | None) -> str:
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
    """Find the folder of a cell under ``execution.runs_dir``; an existing one counts whatever its slug."""
    return folders_of([spec])[0]


def folders_of(specs: Sequence[RunSpec]) -> list[RunFolder]:
    """Find the folders of many cells, listing every ``execution.runs_dir`` once."""
    found: dict[Path, dict[str, Path]] = {}
    folders = []
    for spec in specs:
        root, identifier = Path(spec.execution.runs_dir), run_id(spec)
        if root not in found:
            names = sorted(os.listdir(root), reverse=True) if root.is_dir() else []
            found[root] = {name[-RUN_ID_LENGTH:]: root / name for name in names}
        folders.append(RunFolder(found[root].get(identifier, root / f"{labels.slug(spec)}-{identifier}")))
    return folders


def create(spec: RunSpec, folder: RunFolder | None = None) -> RunFolder:
    """Create (or find) the folder of a cell and write its spec.

    The identity of an existing folder is the same by its name; execution fields (device, folders) become those of ``spec``.

    Args:
        spec: The cell.
        folder: Its folder where that is known already; None looks for it.

    Raises:
        StorageError: The folder cannot be made or written: no permission, a file in its place, a full disk.
    """
    folder = folder or folder_of(spec)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        data = to_dict(spec)
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
        tail = name[-RUN_ID_LENGTH:]
        named = len(name) > RUN_ID_LENGTH and all(c in "0123456789abcdef" for c in tail)
        if named and os.path.exists(f"{root}/{name}/spec.json"):
            yield RunFolder(root / name)
