"""Where the time of a cell goes: seconds per kind of work. On a GPU, measuring does not make the host wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

EVALUATION_TIMINGS = ("perplexity_s", "zero_shot_s", "fidelity_s")
"""Names of measurements that belong to the evaluation; all others are made while a model is quantized."""
MOST_PENDING = 4096
"""Measurements of a GPU that may be waiting to be read."""


class Timings:
    """Seconds per kind of work, summed.

    Where CUDA is in use, a measurement is a pair of events on its stream that is read later, so that the host can run ahead.
    Where the GPU was idle, the seconds between two events are those that the host took.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the enclosed work to ``name``."""
        import torch

        if not torch.cuda.is_initialized():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - start
            return
        # Events are put into the stream and read later: the host does not wait for the GPU.
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        try:
            yield
        finally:
            ended.record()
            self._pending.append((name, begun, ended))
            if len(self._pending) > MOST_PENDING:
                self._settle()

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by kind of work, of everything that has been measured."""
        self._settle()
        return self._seconds

    def _settle(self) -> None:
        for name, start, end in self._pending:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._pending.clear()
