"""The local pool: one process per cell, one GPU (or a share of the cores) per process.

Every cell has a process of its own, so that a crash, an out-of-memory kill or a leak ends one cell and nothing else. The pool
learns how a cell ended from its run folder and from the exit status. Where a worker died without a record (SIGKILL, segmentation
fault), the cell is started again and goes on behind its last finished block. ``launch.worker`` starts the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ptqbench.cell.spec import ModelSpec
from ptqbench.errors import StorageError
from ptqbench.launch.summary import Summary
from ptqbench.launch.worker import Child, Slot, start
from ptqbench.models.architecture import from_config
from ptqbench.models.source import locate
from ptqbench.runs import provenance
from ptqbench.runs.attempt import log_lines, record_death
from ptqbench.runs.failures import KINDS, classify
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, UNREADABLE, RunFolder
from ptqbench.sweeps.cells import Cell
from ptqbench.sweeps.plan import Row
from ptqbench.sweeps.resources import GIB

POLL_S = 0.1
ELSEWHERE_S = 2.0
GRACE_S = 15.0
CPU_SHARE = 4
"""Most cores that the pool gives to a cell which does not ask for a number."""
ENVIRONMENT = 1
"""Exit status of a worker that could not use its run folder because of the disk; 2 where a person can mend the reason."""


@dataclasses.dataclass
class Task:
    """A cell on its way to an end.

    Attributes:
        cell: The cell.
        folder: Its run folder.
        tries: How often it was tried again after a recorded failure.
        deaths: How often its worker died without a record since ``progress`` last grew.
        progress: Number of finished blocks at the last death.
    """

    cell: Cell
    folder: RunFolder
    tries: int = 0
    deaths: int = 0
    progress: int = 0


@dataclasses.dataclass
class Worker:
    """A running process, with its output."""

    task: Task
    slot: Slot
    process: Child
    log: Path


def run_pool(rows: Sequence[Row], summary: Summary, workers: int | None = None) -> None:
    """Run cells until every one is done, has failed, or was cancelled.

    Args:
        rows: Cells to run; their folders exist.
        summary: Prints what happens.
        workers: Processes at once. None is one per GPU, or per group of GPUs if a cell needs several; without GPUs, as many as
            cores and memory allow.
    """
    Pool([Task(row.cell, row.cell.folder) for row in rows if row.cell.folder], slots(rows, workers), summary).run()


def slots(rows: Sequence[Row], workers: int | None) -> list[Slot]:
    """Divide this machine among workers.

    Args:
        rows: Cells to run.
        workers: As ``run_pool`` has it.
    """
    cores = provenance.cores()
    gpus = visible_gpus() if any(row.needs is not None and row.needs.gpus for row in rows) else []
    if gpus:
        # Each worker gets as many GPUs as the largest cell needs; a cell that needs more than there are gets all of them.
        each = min(len(gpus), max(row.needs.gpus for row in rows if row.needs is not None))
        together = [",".join(gpus[at : at + each]) for at in range(0, len(gpus) - each + 1, each)]
        chosen = together[: workers or len(together)]
        return [Slot(devices, max(1, cores // len(chosen))) for devices in chosen]
    # On CPU: as many of the largest cell as fit into the free memory, each with the cores that a cell asks for.
    specs = [row.cell.spec for row in rows if row.cell.spec is not None]
    asked = {(spec.model, spec.execution.threads) for spec in specs}  # the files of a model are read once
    share = min(max((_threads(*one) for one in asked), default=1), cores)
    largest = max([row.needs.host_mem_gib for row in rows if row.needs is not None] or [1.0])
    count = workers or max(1, min(cores // share, int(_memory_gib() // largest), len(rows)))
    return [Slot(None, max(1, cores // count)) for _ in range(count)]


def _threads(model: ModelSpec, asked: int | None) -> int:
    """The threads that a cell asks for; else those that its model keeps busy, at most ``CPU_SHARE``."""
    return asked or min(CPU_SHARE, from_config(locate(model).config).useful_threads)


def visible_gpus() -> list[str]:
    """Indices of the GPUs that this process may use, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() and part.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return found.stdout.split() if found.returncode == 0 else []


class Pool:
    """The event loop over workers: starts them, sees how they end, and starts again what can be mended by that."""

    def __init__(self, tasks: Sequence[Task], slots: Sequence[Slot], summary: Summary) -> None:
        self._waiting, self._free, self._summary = deque(tasks), list(slots), summary
        self._running: list[Worker] = []
        self._elsewhere: list[Task] = []  # cells on which processes of others work
        self._looked = 0.0

    def run(self) -> None:
        """Run everything. On Ctrl-C the workers stop at their next step, and the interruption is raised again."""
        try:
            while self._waiting or self._running or self._elsewhere:
                while self._waiting and self._free:
                    self._start(self._waiting.popleft(), self._free.pop(0))
                self._reap()
                self._look_elsewhere()
                self._summary.draw([w.task.cell for w in self._running], len(self._waiting) + len(self._elsewhere))
                time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise

    def _start(self, task: Task, slot: Slot) -> None:
        if task.folder.cancel_path.exists():
            self._summary.note(CANCELLED, task.cell, "not started")
            self._free.append(slot)
            return
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{task.tries}-{task.deaths}.log"
        log = task.folder.path / "logs" / name
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
            self._running.append(Worker(task, slot, start(task.folder.path, log, slot), log))
        except OSError as error:
            self._summary.failed(task.cell, classify(error).name, f"no worker could be started: {error}", "")
            self._free.append(slot)

    def _reap(self) -> None:
        for worker in [worker for worker in self._running if worker.process.status() is not None]:
            self._running.remove(worker)
            self._free.append(worker.slot)
            self._ended(worker)

    def _ended(self, worker: Worker) -> None:
        """Conclude from the run folder, and only then from the exit status, how a worker ended."""
        task, state, status = worker.task, worker.task.folder.state(), worker.process.status() or 0
        if state == DONE:
            self._summary.finished(task.cell)
        elif state == RUNNING:
            self._summary.say(f"{task.cell.name}: another process works on it; waiting for it", "elsewhere", "yellow")
            self._elsewhere.append(task)
        elif state == CANCELLED or task.folder.cancel_path.exists():
            self._summary.note(CANCELLED, task.cell, "stopped; what is finished stays")
        elif state == FAILED:
            self._failed(task)
        elif state == UNREADABLE or (status > 0 and _said(worker.log)):  # it could not even record a failure
            message = task.folder.examined()[1] or _said(worker.log) or _describe(status)
            self._summary.failed(task.cell, "disk" if status == ENVIRONMENT else "config", message, str(worker.log))
        else:
            self._died(worker, status)

    def _failed(self, task: Task) -> None:
        failure = task.folder.failure() or {}
        kind = KINDS.get(str(failure.get("kind")), KINDS["code"])
        if kind.retries > task.tries and not kind.more_memory:  # the same machine has no more memory the next time
            task.tries += 1
            self._summary.say(f"{task.cell.name}: {kind.name}: {failure.get('message')}", "again", "yellow")
            self._waiting.append(task)
            return
        self._summary.failed_on_record(task.cell)

    def _died(self, worker: Worker, status: int) -> None:
        """Start a cell again whose worker died without a record, unless it dies again and again without progress."""
        task, name = worker.task, _describe(status)
        # Progress is a further finished block; it starts the count of deaths anew.
        finished = sum(1 for _ in task.folder.state_path.glob("*")) if task.folder.state_path.is_dir() else 0
        task.deaths = 1 if finished > task.progress else task.deaths + 1
        task.progress = max(finished, task.progress)
        if task.deaths > KINDS["killed"].retries:
            with contextlib.suppress(OSError, StorageError):
                record_death(task.folder, name, worker.log)
            self._summary.failed(task.cell, "killed", name, str(worker.log))
            return
        self._summary.say(f"{task.cell.name}: {name}; goes on behind its last finished block", "again", "yellow")
        self._waiting.appendleft(task)

    def _look_elsewhere(self) -> None:
        """See whether other processes have ended their cells; what they left unfinished is started here."""
        if time.time() - self._looked < ELSEWHERE_S:
            return
        self._looked = time.time()
        for task in list(self._elsewhere):
            state = task.folder.state()
            if state == RUNNING:
                continue
            self._elsewhere.remove(task)
            if state == DONE:
                self._summary.finished(task.cell)
            elif state == FAILED:
                self._failed(task)
            else:
                self._waiting.append(task)

    def _stop(self) -> None:
        for worker in self._running:
            worker.process.signal(signal.SIGINT)
        # One deadline for all of them, then the hard way.
        deadline = time.time() + GRACE_S
        for worker in self._running:
            if not worker.process.wait(max(0.1, deadline - time.time())):
                worker.process.signal(signal.SIGKILL)


def _said(log: Path) -> str | None:
    """The last error line of a worker that could neither begin nor record that in the run folder."""
    prefix = "ptqbench: "
    lines = [line.removeprefix(prefix) for line in log_lines(log) if line.startswith(prefix)]
    return lines[-1] if lines else None


def _describe(status: int) -> str:
    if status >= 0:
        return f"the worker ended with status {status} without a result"
    with contextlib.suppress(ValueError):
        return f"the worker was ended by {signal.Signals(-status).name}"
    return f"the worker was ended by signal {-status}"


def _memory_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / GIB
