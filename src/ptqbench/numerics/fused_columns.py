"""The column loop of GPUs: one kernel launch per panel, where the plain loop needs several per channel.

Objective and legend: as in ``numerics/column_loop.py``. Its plain loop is the reference and serves float64 and CPUs. Channels
beyond the panel are updated by matrix products in both.

A program of the kernel (``numerics/column_kernel.py``) owns ``ROWS`` rows and keeps the errors e of the whole panel in
registers, as a tile (``PANEL``, ``ROWS``). Channel i gathers sum_j e_j U_ji / U_jj by one reduction over that tile, where the
plain loop takes a product. It then writes its own error into the tile by a mask. The kernel writes every number once and
reads none of them back. So no program waits for another, and the next channel is loaded while this one is rounded.
Products and sums are not fused, so that e is the error of exactly the q that is stored.

Source: the plain loop. Deviation: sums run in another order, so a weight within rounding error of the border between two codes
may get the other code; later channels absorb the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import util
from types import ModuleType

import torch
from torch import Tensor

from ptqbench.errors import UnsupportedError
from ptqbench.numerics.affine import tie_shift
from ptqbench.numerics.checks import require_choice
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.group_grids import GroupGrids, kind

ENGINES = ("auto", "plain", "fused")
"""``auto`` is fused wherever it can serve and there is a GPU; ``fused`` fails where it cannot."""
PANEL = 128
"""Most channels per launch: with ``ROWS`` and four warps, 32 registers per thread hold the errors, and as many w for GPTAQ."""
SMALLEST_TILE = 16
ROWS = 32
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_forbidden = False


def forbid_fused(forbidden: bool = True) -> None:
    """Make ``auto`` mean ``plain`` in this process, for nodes on which triton cannot compile; False allows the kernel again."""
    global _forbidden
    _forbidden = forbidden


def engine_on(device: torch.device) -> str:
    """Return which column loop ``auto`` takes for float32 work, to be recorded with a result.

    Args:
        device: Where the weights are rounded.

    Returns:
        ``"plain"``, or ``"fused"`` with the version of triton.
    """
    fused = device.type == "cuda" and _has_triton() and not _forbidden
    return f"fused, triton {_kernels().VERSION}" if fused else "plain"


def use_fused(engine: str, work: Tensor, specs: Sequence[GridSpec] = ()) -> bool:
    """Choose the engine.

    Args:
        engine: One of ``ENGINES``.
        work: (n, m), for dtype, device and layout.
        specs: The grids of all groups.

    Returns:
        Whether to use the kernel.

    Raises:
        ConfigError: There is no such engine.
        UnsupportedError: ``fused`` was asked for and cannot serve.
    """
    require_choice("engine", engine, ENGINES)
    if engine == "plain" or (engine == "auto" and (_forbidden or not work.is_cuda)):
        return False
    reason = _obstacle(work, specs)
    if reason and engine == "fused":
        raise UnsupportedError(f"engine fused: {reason}; choose engine 'auto' or 'plain'")
    return not reason


class FusedPanels:
    """Rounds panels of one weight with the kernel."""

    def __init__(self, grids: GroupGrids) -> None:
        """Store the group and the kind of grid of every channel where the kernel reads them.

        Args:
            grids: Grids of the rows at hand; they may be fitted later, panel by panel.
        """
        # Per channel: its group, its kind of grid, its shift for ties.
        self._grids = grids
        kinds = [kind(group.spec) for group in grids.groups]
        rows = [grids.of_position, [kinds[g] for g in grids.of_position]]
        self._group, self._kind = torch.tensor(rows, dtype=torch.int32).to(grids.scale.device).unbind(0)
        shifts = [tie_shift(grids.groups[g].spec) for g in grids.of_position]
        self._shift = torch.tensor(shifts, dtype=torch.float32).to(grids.scale.device)

    def round(
        self,
        position: int,
        weights: Tensor,
        errors: Tensor,
        values: Tensor,
        codes: Tensor,
        upper: Tensor,
        drift: Tensor | None,
    ) -> None:
        """Round the k channels that start at a position; their groups must be fitted.

        Args:
            position: Processing position of the first channel.
            weights: (k, m) contiguous float32, updated in place to the values just before rounding.
            errors: (k, m) contiguous float32, receives e.
            values: (k, m) contiguous float32, receives q.
            codes: (k, m) contiguous integers, receives the codes.
            upper: U_jl / U_jj, (k, k), not modified; only its strictly upper part is read.
            drift: P, (k, k), likewise.

        Raises:
            UnsupportedError: Triton cannot compile or start the kernel here.
        """
        # The kernel reads row i of U^T (and P^T): the coefficients of all earlier channels for channel i.
        k, m = weights.shape
        here = slice(position, position + k)
        upper = upper.T.contiguous()
        coefficients = (upper, upper if drift is None else drift.T.contiguous())
        grids = (self._grids.scale, self._grids.zero_point, self._grids.low, self._grids.high)
        # One program per ROWS rows; the tile of past errors has a power of two of channels.
        tile = max(SMALLEST_TILE, 1 << (k - 1).bit_length())
        try:
            with torch.cuda.device_of(weights):
                _kernels().round_panel[(-(-m // ROWS),)](
                    weights, errors, values, codes, *coefficients, *grids,
                    self._group[here], self._kind[here], self._shift[here], m, k,
                    CHANNELS=tile, ROWS=ROWS, DRIFT=drift is not None, **LAUNCH,
                )  # fmt: skip
        except Exception as error:
            found = next(iter(str(error).splitlines()), "")
            raise UnsupportedError(
                f"engine fused: expected triton to compile the column loop for {weights.device}, got "
                f"{type(error).__name__}: {found}; use execution.column_loop=plain (engine='plain' of a solver)"
            ) from error


@cache
def _kernels() -> ModuleType:
    """Import the kernel, and triton with it."""
    from ptqbench.numerics import column_kernel

    return column_kernel


@cache
def _has_triton() -> bool:
    return util.find_spec("triton") is not None


def _obstacle(work: Tensor, specs: Sequence[GridSpec]) -> str:
    """Return why the kernel cannot serve, in words; empty if it can."""
    for spec in specs:
        if not spec.integer:
            return f"the kernel rounds to integer grids, got format {spec.format}"
    if not _has_triton():
        return "triton is not installed"
    if work.dtype != torch.float32 or not work.is_contiguous():
        return f"expected contiguous float32 work, got {work.dtype}"
    if not work.is_cuda and not _kernels().INTERPRETED:
        return f"expected a CUDA device, got {work.device}"
    return ""
