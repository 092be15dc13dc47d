"""One attempt at a cell: its folder, its log, its sign of life, and the record of its failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ptqbench.errors import CellBusy, PtqbenchError, RunFailed, StorageError
from ptqbench.runs import provenance
from ptqbench.runs.failures import classify
from ptqbench.runs.files import write_json
from ptqbench.runs.folder import RunFolder
from ptqbench.runs.lease import Lease
from ptqbench.runs.liveness import HEARTBEAT_INTERVAL_S
from ptqbench.runs.outcome import one_line

LOG_TAIL_LINES = 40
SHOWN_INTERVAL_S = 2.0
INTERRUPTING = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGINT is Ctrl-C and ``cancel``. The others are SLURM's warning before the end, after which submitit requeues the job."""


class Observer(Protocol):
    """Watches a cell at work: a progress bar, a heartbeat, a tracker."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self) -> None:
        """One step of the current stage is done."""


class Silent:
    """An observer that shows nothing and remembers the stage and the step."""

    def __init__(self) -> None:
        self.name, self.done, self.total = "start", 0, 0

    def stage(self, name: str, total: int) -> None:
        self.name, self.done, self.total = name, 0, total

    def advance(self) -> None:
        self.done += 1


class Attempt(Silent):
    """The running attempt. It passes progress on to another observer, and a thread writes a heartbeat every ten seconds.

    Attributes:
        path: The attempt's folder.
        interrupted: Whether a signal has come. It is remembered because libraries can swallow the exception that a signal
            raises, or replace it by another.
    """

    def __init__(self, folder: RunFolder, path: Path, shown: Observer, held: Lease | None) -> None:
        """Write the first heartbeat and start the thread of the others.

        Args:
            folder: The cell.
            path: The attempt's folder, existing.
            shown: Observer that shows progress to a person.
            held: The lease, which is checked at every step.
        """
        super().__init__()
        self.path, self.interrupted = path, False
        self._folder, self._shown, self._held = folder, shown, held
        self._stop, self._beating = threading.Event(), threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stage(self, name: str, total: int) -> None:
        super().stage(name, total)
        self._shown.stage(name, total)
        logging.getLogger("ptqbench").info("stage %s: %d steps", name, total)

    def advance(self) -> None:
        """Count and show a step.

        Raises:
            KeyboardInterrupt: A signal came, and a library swallowed its exception.
            CellBusy: Another process has taken the cell over.
        """
        super().advance()
        self._shown.advance()
        if self.interrupted:
            raise KeyboardInterrupt
        if time.time() - self._last > SHOWN_INTERVAL_S:
            with contextlib.suppress(OSError):
                self._beat()
        if self._held is not None:
            self._held.check()

    def superseded(self) -> bool:
        """Whether another process has taken the cell over. Its records belong to that process now."""
        return self._held is not None and not self._held.is_mine()

    def end(self, outcome: str) -> None:
        """Stop the thread and write the last heartbeat, with how the attempt ended."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the result or the failure is on record already
            self._beat(ended=outcome)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk must not end work that may still finish
                self._beat()
            with contextlib.suppress(OSError):
                if self._folder.cancel_path.exists():
                    os.kill(os.getpid(), signal.SIGINT)  # interrupts the main thread as Ctrl-C would
                    return

    def _beat(self, **more: str) -> None:
        with self._beating:  # both the thread and ``advance`` write heartbeats
            self._last = time.time()
            beat = {"time": self._last, "stage": self.name, "done": self.done, "total": self.total}
            write_json(self.path / "heartbeat.json", beat | more)


@contextlib.contextmanager
def attempt(folder: RunFolder, shown: Observer, held: Lease | None = None) -> Iterator[Attempt]:
    """Open an attempt at a cell. An exception that is raised inside is recorded in ``failure.json``.

    After a signal, and after another process has taken the cell over, an exception is an interruption and no failure.

    Args:
        folder: The cell.
        shown: Observer that shows progress to a person.
        held: The lease of the cell.

    Raises:
        RunFailed: The work raised an exception; one line that names the record.
        StorageError: The attempt's folder cannot be made.
    """
    current = _begin(folder, shown, held)
    try:
        with _logged(current.path), _interruptible(current):
            try:
                yield current
            except Exception as error:
                _give_up(folder, current, error)
    except BaseException as error:  # submitit ends a job that it requeues with SystemExit
        current.end("failed" if isinstance(error, RunFailed) else "interrupted")
        raise
    current.end("done")


def _begin(folder: RunFolder, shown: Observer, held: Lease | None) -> Attempt:
    """Make the folder of an attempt and write its provenance and first heartbeat."""
    try:
        path = folder.new_attempt()
        folder.failure_path.unlink(missing_ok=True)  # earlier attempts keep theirs in their own folders
        write_json(path / "meta.json", provenance.collect())
        (path / "log.txt").touch()
        return Attempt(folder, path, shown, held)
    except OSError as error:
        raise StorageError.of(error, f"the run folder {folder.path} cannot be written") from error


def _give_up(folder: RunFolder, current: Attempt, error: Exception) -> None:
    """Record an exception of the work, unless it is an interruption, and raise what it means.

    Raises:
        KeyboardInterrupt: A signal came before it.
        CellBusy: Another process has the cell.
        RunFailed: The cell failed; recorded.
    """
    # An interruption, except where submitit says that it does not requeue the job: then the time limit is too short.
    if current.interrupted and classify(error).name != "time_limit":
        raise KeyboardInterrupt from error
    # A process that took the cell over owns its records; nothing is written for this one.
    if isinstance(error, CellBusy) or current.superseded():
        raise error if isinstance(error, CellBusy) else CellBusy(f"{folder.path.name} was taken over") from error
    logging.getLogger("ptqbench").error("the attempt failed", exc_info=error)
    failed = f"{type(error).__name__}: {one_line(error)}"
    try:
        record_failure(folder, error, current.path, current.name)
    except OSError as unwritten:
        raise RunFailed(f"{failed} (not recorded: {folder.failure_path}: {one_line(unwritten)})") from error
    raise RunFailed(f"{failed} (recorded in {folder.failure_path})") from error


class _Log(logging.FileHandler):
    """The log of an attempt. Where the disk is full or gone, lines are lost without a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write all log records to ``log.txt``, ours from INFO on."""
    handler = _Log(path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Warnings of libraries are kept too; of ours, every stage.
    root, ours = logging.getLogger(), logging.getLogger("ptqbench")
    root.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _interruptible(current: Attempt) -> Iterator[None]:
    """Note that a signal came, then call the handler that was there before.

    SIGINT, by which cells are cancelled, interrupts even where it was ignored, as in a background job of a shell.
    """
    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in INTERRUPTING}

    def remember(number: int, frame: FrameType | None) -> None:
        current.interrupted = True
        handler = before[signal.Signals(number)]
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    for number, handler in before.items():
        if callable(handler) or number == signal.SIGINT:
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is remember:
                signal.signal(number, handler)


def record_failure(folder: RunFolder, error: BaseException, attempt: Path | None = None, stage: str = "start") -> None:
    """Write ``failure.json``, also into the folder of the attempt.

    Args:
        folder: The cell.
        error: What was raised.
        attempt: Folder of the attempt; None where the cell failed before one began.
        stage: What the cell was doing.
    """
    record = {
        "class": type(error).__name__,
        "kind": classify(error, stage).name,
        "expected": isinstance(error, PtqbenchError),
        "message": one_line(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    log = None if attempt is None else attempt / "log.txt"
    _write_failure([folder.path] if attempt is None else [attempt, folder.path], record, attempt, stage, log)


def record_death(folder: RunFolder, how: str, log: Path) -> None:
    """Write the ``failure.json`` of a cell whose process was killed again and again, and could not write it itself.

    Args:
        folder: The cell.
        how: What is known, e.g. the signal.
        log: Output of the process.
    """
    attempts, stage = folder.attempts, str((folder.heartbeat() or {}).get("stage", "start"))
    record = {"class": "Killed", "kind": "killed", "expected": False, "message": how, "traceback": ""}
    _write_failure([folder.path], record, attempts[-1] if attempts else None, stage, log)


def _write_failure(
    places: Sequence[Path], what: dict[str, Any], attempt: Path | None, stage: str, log: Path | None
) -> None:
    record = what | {
        "log_tail": log_lines(log)[-LOG_TAIL_LINES:] if log else [],
        "attempt": attempt.name if attempt else None,
        "stage": stage,
        "time": time.time(),
    }
    for place in places:
        write_json(place / "failure.json", record)


def log_lines(log: Path) -> list[str]:
    """The lines of a log; none where it cannot be read."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
