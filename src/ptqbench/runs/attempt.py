"""One attempt at a cell: its folder, its log, its sign of life, and the record of its failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ptqbench.errors import PtqbenchError, RunFailed
from ptqbench.runs import provenance
from ptqbench.runs.failures import classify
from ptqbench.runs.folder import RunFolder, write_json
from ptqbench.runs.liveness import HEARTBEAT_INTERVAL_S

LOG_TAIL_LINES = 40
SHOWN_INTERVAL_S = 2.0


class Observer(Protocol):
    """Watches a cell at work: a progress bar, a heartbeat, a tracker."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self) -> None:
        """One step of the current stage is done."""


class Silent:
    """Watch without showing anything; remembers where the cell is."""

    def __init__(self) -> None:
        """Start before the first stage."""
        self.name, self.done, self.total = "start", 0, 0

    def stage(self, name: str, total: int) -> None:
        """Remember the stage."""
        self.name, self.done, self.total = name, 0, total

    def advance(self) -> None:
        """Count a step."""
        self.done += 1


class Attempt(Silent):
    """The running attempt; passes progress on to another observer and beats every ten seconds."""

    def __init__(self, folder: RunFolder, path: Path, shown: Observer) -> None:
        """Begin beating.

        Args:
            folder: The cell.
            path: The attempt's folder, existing.
            shown: Observer that shows progress to a person.
        """
        super().__init__()
        self.path, self._folder, self._shown = path, folder, shown
        self._stop, self._beating = threading.Event(), threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stage(self, name: str, total: int) -> None:
        """Remember, show and log the stage."""
        super().stage(name, total)
        self._shown.stage(name, total)
        logging.getLogger("ptqbench").info("stage %s: %d steps", name, total)

    def advance(self) -> None:
        """Count and show a step."""
        super().advance()
        self._shown.advance()
        if time.time() - self._last > SHOWN_INTERVAL_S:
            with contextlib.suppress(OSError):
                self._beat()

    def end(self, outcome: str) -> None:
        """Stop beating; the last beat says how the attempt ended."""
        self._stop.set()
        self._thread.join()
        self._beat(ended=outcome)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk must not kill the work that may still finish
                self._beat()
            if self._folder.cancel_path.exists():
                os.kill(os.getpid(), signal.SIGINT)  # ends the main thread as Ctrl-C would
                return

    def _beat(self, **more: str) -> None:
        with self._beating:  # the heartbeat thread and the work both beat
            self._last = time.time()
            beat = {"time": self._last, "stage": self.name, "done": self.done, "total": self.total}
            write_json(self.path / "heartbeat.json", beat | more)


@contextlib.contextmanager
def attempt(folder: RunFolder, shown: Observer) -> Iterator[Attempt]:
    """Open an attempt at a cell; whatever is raised inside is recorded in ``failure.json``.

    Raises:
        RunFailed: The work raised; one line, naming the record.
    """
    path = folder.new_attempt()
    folder.failure_path.unlink(missing_ok=True)  # that of an earlier attempt stays in its own folder
    write_json(path / "meta.json", provenance.collect())
    handler = logging.FileHandler(path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("ptqbench")
    root.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.INFO)
    current = Attempt(folder, path, shown)
    try:
        with _interruptible():
            yield current
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, cancellation; submitit ends a requeued task with SystemExit
        current.end("interrupted")
        raise
    except Exception as error:
        if _is_requeue(error):
            current.end("interrupted")
            raise
        ours.exception("the attempt failed")
        record_failure(folder, error, path, current.name)
        current.end("failed")
        raise RunFailed(f"{type(error).__name__}: {_one_line(error)} (recorded in {folder.failure_path})") from error
    else:
        current.end("done")
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT, by which cells are cancelled, interrupt: what a shell starts in the background is told to ignore it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_requeue(error: Exception) -> bool:
    """Whether an exception is only the end of a SLURM job that requeues itself.

    submitit calls ``scontrol requeue`` from its signal handler, inside whatever the work was doing. When the job is ended before
    that command returns, the handler raises the command's death by signal into the work.
    """
    died = isinstance(error, subprocess.CalledProcessError) and error.returncode < 0
    return died and list(error.cmd)[:2] == ["scontrol", "requeue"]  # type: ignore[attr-defined]


def record_failure(folder: RunFolder, error: BaseException, attempt: Path | None = None, stage: str = "start") -> None:
    """Write ``failure.json``.

    Args:
        folder: The cell.
        error: What was raised.
        attempt: Folder of the attempt, None where the cell failed before one began.
        stage: What the cell was doing.
    """
    log: list[str] = []
    if attempt is not None:
        log = (attempt / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    record = {
        "class": type(error).__name__,
        "kind": classify(error).name,
        "expected": isinstance(error, PtqbenchError),
        "message": _one_line(error),
        "traceback": "".join(traceback.format_exception(error)),
        "log_tail": log[-LOG_TAIL_LINES:],
        "attempt": attempt.name if attempt is not None else None,
        "stage": stage,
        "time": time.time(),
    }
    if attempt is not None:
        write_json(attempt / "failure.json", record)
    write_json(folder.failure_path, record)


def record_death(folder: RunFolder, how: str, log: Path) -> None:
    """Record that a cell's process was ended from outside, repeatedly, and could not say so itself.

    Args:
        folder: The cell.
        how: What is known, e.g. the signal.
        log: Output of the process.
    """
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    attempts, beat = folder.attempts, folder.heartbeat() or {}
    record = {
        "class": "Killed",
        "kind": "killed",
        "expected": False,
        "message": how,
        "traceback": "",
        "log_tail": tail[-LOG_TAIL_LINES:],
        "attempt": attempts[-1].name if attempts else None,
        "stage": beat.get("stage", "start"),
        "time": time.time(),
    }
    write_json(folder.failure_path, record)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
