"""How the local pool starts the process of a cell.

On CPU the process is forked from a server (the standard library's ``forkserver``) that has imported everything a cell needs and
computed nothing, because ten seconds of imports would exceed the work of a small cell. On a GPU the process is a fresh interpreter,
because a process that has touched CUDA must not be forked, and for some drivers importing is enough.

In both cases ``ptqbench.run.main`` does the work, output goes to a file, and the worker ends with the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = (
    "ptqbench.run", "ptqbench.engine.pipeline", "ptqbench.engine.rotations", "ptqbench.data.windows", "ptqbench.models.source",
    "ptqbench.evaluate.perplexity", "ptqbench.evaluate.zero_shot", "lm_eval.evaluator", "lm_eval.models.huggingface", "datasets",
    "pyarrow.parquet", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one worker may use.

    Attributes:
        gpu: Index of its GPU, or indices of its GPUs with commas; None for a worker on CPU.
        threads: Number of cores.
    """

    gpu: str | None
    threads: int


@dataclasses.dataclass(frozen=True)
class Child:
    """A started worker.

    Attributes:
        pid: Number of its process.
        status: Exit status, negative for a signal; None while it runs.
        join: Waits for its end, at most so many seconds.
    """

    pid: int
    status: Callable[[], int | None]
    join: Callable[[float], object]

    def wait(self, timeout: float) -> bool:
        """Wait for its end, at most ``timeout`` seconds; returns whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.join(timeout)
        return self.status() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.status() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start(folder: Path, log: Path, slot: Slot) -> Child:
    """Start the worker of a cell.

    Args:
        folder: Run folder with ``spec.json``.
        log: File for its output, in an existing folder.
        slot: What the worker may use.
    """
    return _spawned(folder, log, slot) if slot.gpu is not None else _forked(folder, log, slot)


def _spawned(folder: Path, log: Path, slot: Slot) -> Child:
    """A fresh interpreter."""
    environment = os.environ | {"OMP_NUM_THREADS": str(slot.threads), "CUDA_VISIBLE_DEVICES": str(slot.gpu)}
    command = [sys.executable, "-m", "ptqbench.run", "--with-parent", str(folder)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    return Child(process.pid, process.poll, process.wait)


def _forked(folder: Path, log: Path, slot: Slot) -> Child:
    """A fork of a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with _environment("OMP_NUM_THREADS", str(slot.threads)):  # read once, when the server imports torch
        forkserver.ensure_running()
    process = context.Process(target=_work, args=(folder, log, slot.threads, dict(os.environ)))
    process.start()
    assert process.pid is not None
    return Child(process.pid, lambda: process.exitcode, process.join)


def _work(folder: Path, log: Path, threads: int, environment: dict[str, str]) -> None:
    """Run the cell in a forked process."""
    # The server has the environment of its own start; the one of this moment is passed along.
    os.environ.update(environment | {"OMP_NUM_THREADS": str(threads)})
    with log.open("wb") as stream:  # standard output and error, of native code too
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    import torch

    from ptqbench.run import main

    torch.set_num_threads(threads)
    sys.exit(main(["--with-parent", str(folder)]))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
