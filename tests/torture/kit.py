"""Shared by all parts: the world of a run, processes forked from one that has imported everything, and what a trial found."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HANG_S = 30.0  # a refusal may not take longer
CELL_S = 300.0  # nor may a cell of this size, on a busy machine
THROUGH = (
    97  # exit status of a child whose function let an exception through, which a user would have seen as a traceback
)


@dataclasses.dataclass(frozen=True)
class World:
    """One run of the torture.

    Attributes:
        folder: Where everything is written.
        seed: What every trial is drawn from.
        workers: Trials at once.
        part: Name of the part at work.
    """

    folder: Path
    seed: int
    workers: int
    part: str = ""

    def draw(self, number: int) -> random.Random:
        """Random numbers of a trial."""
        return random.Random(f"{self.seed}/{self.part}/{number}")

    @contextlib.contextmanager
    def trial_folder(self, number: int, outcome: Outcome) -> Iterator[Path]:
        """Folder of a trial; it stays where something was found in it."""
        path = self.folder / self.part / f"{number:05d}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            if not outcome.findings:
                shutil.rmtree(path, ignore_errors=True)


@dataclasses.dataclass
class Outcome:
    """What a trial did and found."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    findings: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def check(self, right: bool, name: str, seen: object) -> bool:
        """Count a check, and keep what was seen where it failed."""
        self.counts["checks"] += 1
        if not right:
            self.findings.append((name, " ".join(str(seen).split())[:400]))
        return right


@dataclasses.dataclass(frozen=True)
class Ended:
    """A child that ended: its exit status (negative for a signal), what it printed, and how long it took."""

    status: int
    out: str
    err: str
    seconds: float
    hung: bool

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def said(self) -> list[str]:
        """Lines on standard error."""
        return [line for line in self.err.splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"status {self.status} after {self.seconds:.1f} s; " + " / ".join(
            (self.said or self.out.splitlines())[-3:]
        )


def warm() -> None:
    """Import what a cell needs, once: processes are forked from here."""
    from ptqbench.launch.worker import PRELOADED

    names = (
        "cli",
        "hydra_app",
        "foreground",
        "sweeps.compose",
        "results.tables",
        "results.terminal",
        "results.report_page",
    )
    for name in (
        *PRELOADED,
        *(f"ptqbench.{name}" for name in names),
        "ptqbench.launch.dispatch",
        "pydantic",
        "matplotlib.figure",
    ):
        importlib.import_module(name)


class Running:
    """A forked process at work on a function that returns an exit status."""

    def __init__(self, function: Callable[[], int], cwd: Path, env: dict[str, str] | None = None) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed in end()
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(function, cwd, env or {})
        self._handle = os.pidfd_open(self.pid)
        self._status: int | None = None

    def _be(self, function: Callable[[], int], cwd: Path, env: dict[str, str]) -> None:
        status = THROUGH
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for descriptor, file in zip((1, 2), self._files, strict=True):
                os.dup2(file.fileno(), descriptor)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True, encoding="utf-8")
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True, encoding="utf-8")
            os.environ.update(env)
            os.chdir(cwd)
            status = function() or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt as error:  # what the interpreter does with one that no function caught
            status = 130
            if "ptqbench" in "".join(traceback.format_tb(error.__traceback__)[1:]):
                traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)

    def signal(self, number: int) -> bool:
        """Send a signal; False where the process has ended."""
        if self.over(0.0):
            return False
        os.kill(self.pid, number)
        return True

    def over(self, timeout: float) -> bool:
        """Whether it ended within so many seconds."""
        if self._status is None and select.select([self._handle], [], [], max(0.0, timeout))[0]:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status is not None

    def end(self, limit: float = CELL_S) -> Ended:
        """Wait for the end; what takes longer than ``limit`` seconds is killed with all that it started."""
        hung = not self.over(self.started + limit - time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            if hung:
                os.killpg(self.pid, signal.SIGKILL)
        self.over(60.0)
        os.close(self._handle)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(self._status if self._status is not None else -9, *texts, time.monotonic() - self.started, hung)


def command(*words: object, before: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """What ``python -m ptqbench WORDS`` does, after ``before`` in the same process."""

    def go() -> int:
        from ptqbench.cli import main

        before()
        return main([str(word) for word in words])

    return go


def job(folder: Path) -> Callable[[], int]:
    """What a job of a run folder does."""

    def go() -> int:
        from ptqbench.run import main

        return main([str(folder)])

    return go
