"""One attempt at a cell: its folder, its log, its sign of life, and the record of its failure."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ptqbench import provenance
from ptqbench.errors import PtqbenchError, RunFailed
from ptqbench.store import HEARTBEAT_INTERVAL_S, RunFolder, write_json

LOG_TAIL_LINES = 40


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

    def __init__(self, path: Path, shown: Observer) -> None:
        """Begin beating.

        Args:
            path: The attempt's folder, existing.
            shown: Observer that shows progress to a person.
        """
        super().__init__()
        self.path, self._shown, self._stop = path, shown, threading.Event()
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

    def end(self, outcome: str) -> None:
        """Stop beating; the last beat says how the attempt ended."""
        self._stop.set()
        self._thread.join()
        self._beat(ended=outcome)

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk must not kill the work that may still finish
                self._beat()

    def _beat(self, **more: str) -> None:
        beat = {"time": time.time(), "stage": self.name, "done": self.done, "total": self.total}
        write_json(self.path / "heartbeat.json", beat | more)


@contextlib.contextmanager
def attempt(folder: RunFolder, shown: Observer) -> Iterator[Attempt]:
    """Open an attempt at a cell; whatever is raised inside is recorded in ``failure.json``.

    Raises:
        RunFailed: The work raised; one line, naming the record.
    """
    path = folder.new_attempt()
    write_json(path / "meta.json", provenance.collect())
    handler = logging.FileHandler(path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("ptqbench")
    root.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.INFO)
    current = Attempt(path, shown)
    try:
        yield current
    except KeyboardInterrupt:
        current.end("interrupted")
        raise
    except Exception as error:
        ours.exception("the attempt failed")
        _record_failure(folder, path, current, error)
        current.end("failed")
        raise RunFailed(f"{type(error).__name__}: {_one_line(error)} (recorded in {folder.failure_path})") from error
    else:
        folder.failure_path.unlink(missing_ok=True)
        current.end("done")
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _record_failure(folder: RunFolder, path: Path, current: Attempt, error: Exception) -> None:
    log = (path / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    record = {
        "class": type(error).__name__,
        "expected": isinstance(error, PtqbenchError),
        "message": _one_line(error),
        "traceback": "".join(traceback.format_exception(error)),
        "log_tail": log[-LOG_TAIL_LINES:],
        "attempt": path.name,
        "stage": current.name,
        "time": time.time(),
    }
    write_json(folder.failure_path, record)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
