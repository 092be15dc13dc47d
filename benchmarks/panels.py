"""Other ways to round a panel of the column loop on a CPU: numba, and torch.compile; for ``column_loop.py --alternatives``.

Each stands in for ``ptqbench.numerics.column_loop._round_panel`` where all channels of a panel belong to one fitted affine group
with an integer zero point and there is no drift, which is what the benchmark measures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ptqbench.numerics import column_loop

Panel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _with_numba() -> Panel:
    import numba
    import numpy

    @numba.njit(fastmath=False)
    def run(w: Any, e: Any, q: Any, c: Any, upper: Any, scale: Any, low: Any, high: Any) -> None:
        channels, rows = w.shape
        for i in range(channels):
            for j in range(i):
                factor = upper[j, i]
                for r in range(rows):
                    w[i, r] -= factor * e[j, r]
            for r in range(rows):
                code = min(max(numpy.rint(w[i, r] / scale[r]), low[r]), high[r])
                c[i, r] = code
                q[i, r] = code * scale[r]
                e[i, r] = w[i, r] - q[i, r]

    return lambda *tensors: run(*(tensor.numpy() for tensor in tensors))


def _with_compile() -> Panel:
    @torch.compile(dynamic=False)
    def run(w: Tensor, upper: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        done: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i in range(w.shape[0]):
            now = w[i]
            for j, (_, _, _, e) in enumerate(done):
                now = now - upper[j, i] * e
            c = torch.minimum(torch.maximum(torch.round(now / scale), low), high)
            q = c * scale
            done.append((now, c, q, now - q))
        return tuple(torch.stack(column) for column in zip(*done, strict=True))

    def panel(
        w: Tensor, e: Tensor, q: Tensor, c: Tensor, upper: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> None:
        for target, found in zip((w, c, q, e), run(w, upper, scale, low, high), strict=True):
            target.copy_(found)

    return panel


def available() -> dict[str, Callable[[], Panel]]:
    """What can be tried here."""
    return ({"numba": _with_numba} if importlib.util.find_spec("numba") else {}) | {"torch.compile": _with_compile}


@contextmanager
def replaced(panel: Panel) -> Iterator[None]:
    """Round panels another way for a while."""
    plain = column_loop._round_panel

    def other(block: Any, first: int, last: int, grids: Any) -> None:
        here, g = slice(first, last), grids.of_position[block.start + first]
        tensors = (block.weights[here], block.errors[here], block.values[here], block.centred[here])
        panel(*tensors, block.upper[here, here].contiguous(), grids.scale[g], grids.low[g], grids.high[g])

    column_loop._round_panel = other
    try:
        yield
    finally:
        column_loop._round_panel = plain
