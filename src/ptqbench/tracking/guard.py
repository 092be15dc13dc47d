"""The cell's side of tracking: start the helper, wait a bounded time at the end, and say what was not uploaded. Never raises."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import RunSpec, TrackingSpec, to_dict
from ptqbench.errors import StorageError
from ptqbench.runs.files import number, read_record, write_json
from ptqbench.runs.folder import RunFolder

ANSWER_S = 20.0
"""Seconds within which W&B must answer at the beginning, while the cell works."""
WAIT_S = 30.0
"""Seconds that a finished cell waits for W&B."""
HURRY_S = 5.0
"""The same for an interrupted cell, whose process may have little time left."""
SLOW_S = 5.0
"""A failure that took longer than this opens the breaker, because other cells would wait as long."""
BREAKER = ".wandb_unreachable.json"
"""File in a runs folder: W&B kept a cell waiting, when, and with which reason."""
BREAKER_S = 600.0
"""Seconds for which no other cell of that runs folder tries."""


class Helper:
    """The helper process."""

    def __init__(self, log: Path) -> None:
        """Start the process; ``log`` receives what wandb prints."""
        command = [sys.executable, "-m", "ptqbench.tracking.helper"]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, start_new_session=True
            )

    def give(self, folder: RunFolder, tracking: TrackingSpec, live: bool) -> None:
        """Hand over a run folder; ``live`` if its cell is still at work."""
        assert self._process.stdin is not None
        where = {"folder": str(folder.path.absolute()), "tracking": to_dict(tracking)}
        job = where | {"live": live, "timeout_s": ANSWER_S}
        with contextlib.suppress(BrokenPipeError):  # the process has died, as its outcome will say
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def cell_ended(self) -> None:
        """Tell a live helper that its cell has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def outcome(self, patience_s: float) -> dict[str, Any]:
        """Wait for the outcome of the last job (see ``helper.project``), at most so many seconds."""
        assert self._process.stdout is not None
        # The answer is one line, which may arrive in parts.
        answer, deadline = b"", time.monotonic() + patience_s
        while not answer.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                return {"reason": f"W&B did not take it within {patience_s:.0f} s", "failed_after_s": patience_s}
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                return {"reason": f"the process that talks to W&B ended with status {self._process.wait()}"}
            answer += part
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        """Kill the process and wandb's own service, which is in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def followed(spec: RunSpec, folder: RunFolder) -> Iterator[None]:
    """Project a cell to W&B while the enclosed work runs, if the cell asks for that.

    The outcome is written to ``tracking.json`` in the attempt's folder. A failure is also said on standard error. A cell waits at
    most ``WAIT_S`` at its end; if W&B does not answer, only one cell of a runs folder waits in ``BREAKER_S``.
    """
    if spec.tracking.mode == "none":
        yield
        return
    helper, reason = _start(spec, folder)
    patience = WAIT_S
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        patience = HURRY_S
        raise
    finally:
        # Whatever happens here, the cell's own result or exception passes; the process is ended before anything is written.
        outcome: dict[str, Any] = {"reason": reason}
        try:
            if helper is not None:
                helper.cell_ended()
                outcome = {"reason": "interrupted"}
                outcome = helper.outcome(patience)
        except Exception as error:
            outcome = {"reason": f"{type(error).__name__}: {error}"}
        finally:
            if helper is not None:
                helper.end()
            with contextlib.suppress(OSError, ValueError, StorageError):  # a full disk, a closed terminal
                _record(spec, folder, outcome)


def _start(spec: RunSpec, folder: RunFolder) -> tuple[Helper | None, str | None]:
    """Start the helper of a cell, or say why there is none."""
    refusal = _breaker_is_open(spec)
    if refusal is not None:
        return None, refusal
    try:
        helper = Helper(folder.path / "wandb.log")
        helper.give(folder, spec.tracking, live=True)
    except Exception as error:
        return None, f"cannot start the process that talks to W&B: {error}"
    return helper, None


def _breaker_is_open(spec: RunSpec) -> str | None:
    """Say why W&B is not tried if it kept another cell of this runs folder waiting a moment ago; else None."""
    found: dict[str, Any] = {}
    with contextlib.suppress(StorageError):
        found = read_record(Path(spec.execution.runs_dir) / BREAKER)
    opened = number(found, "time")
    if spec.tracking.mode != "online" or opened is None or not 0 <= time.time() - opened <= BREAKER_S:
        return None
    return f"not tried, as it did not answer within the last {BREAKER_S / 60:.0f} min ({found.get('reason')})"


def _record(spec: RunSpec, folder: RunFolder, outcome: dict[str, Any]) -> None:
    """Write down the outcome of a cell's projection, and say why it failed, if it did."""
    reason = outcome["reason"]
    if reason is None:
        mark(folder, spec.execution.runs_dir, spec.tracking.mode, outcome)
    else:
        if spec.tracking.mode == "online" and outcome.get("failed_after_s", 0.0) > SLOW_S:
            write_json(Path(spec.execution.runs_dir) / BREAKER, {"time": time.time(), "reason": reason})
        outcome["again"] = f"python -m ptqbench sync --runs-dir {spec.execution.runs_dir}"
        print(f"ptqbench: W&B: not uploaded: {reason}; upload later with: {outcome['again']}", file=sys.stderr)
    if folder.attempts:
        write_json(folder.attempts[-1] / "tracking.json", {"mode": spec.tracking.mode, **outcome})


def mark(folder: RunFolder, runs_dir: str, mode: str, outcome: dict[str, Any]) -> None:
    """Record in ``synced.json`` that W&B has the result of a cell, if the cell has one, and close the breaker."""
    if mode == "online":
        (Path(runs_dir) / BREAKER).unlink(missing_ok=True)
    if folder.result() is not None:
        place = {key: outcome.get(key) for key in ("project", "entity", "url")}
        write_json(folder.synced_path, {"mode": mode, **place, "result": digest(folder), "time": time.time()})


def is_marked(folder: RunFolder, tracking: TrackingSpec) -> bool:
    """Whether W&B has the present result of a cell in the place that ``tracking`` names; offline files do not count as upload."""
    found = read_record(folder.synced_path)
    return (
        found.get("result") == digest(folder)
        and found.get("project") == tracking.project
        and tracking.entity in (None, found.get("entity"))
        and found.get("mode") in ("online", tracking.mode)
    )


def digest(folder: RunFolder) -> str:
    """Hash the result file of a finished cell."""
    return f"sha256:{hashlib.sha256(folder.result_path.read_bytes()).hexdigest()}"


def towards(spec: RunSpec, mode: str, project: str | None, entity: str | None) -> TrackingSpec:
    """Where a finished cell is projected to: what its spec says, replaced by what is given here."""
    given = {key: value for key, value in {"mode": mode, "project": project, "entity": entity}.items() if value}
    return dataclasses.replace(spec.tracking, **given)  # type: ignore[arg-type]
