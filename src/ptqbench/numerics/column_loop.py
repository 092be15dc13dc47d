"""Round one channel at a time and push its error into the channels still unrounded (GPTQ, GPTAQ, Qronos).

Objective: min over Q on the grid of trace((W - Q) H (W - Q)^T), greedily, channel by channel. With U from
``numerics/factorisation.py`` and j running in processing order:

    e_j = w_j - q_j,     w_l <- w_l - e_j U_jl / U_jj + w_j P_jl   for all l > j        (P = 0 except in GPTAQ)

Legend: n input channels, m rows worked on at once, G groups, k channels of a block. Everything is held transposed,
(n, m), so that a channel is contiguous. Inside the loop the letters are those of the papers: w, q, e, U, P; c is a code minus
its zero point.

A channel needs all its updates before it is rounded, in any order. Inside a panel of ``PANEL`` channels a channel gathers them
when it is reached, by one matrix-vector product. Across panels and blocks matrix products spread them. On a GPU the kernel of
``numerics/fused_columns.py`` rounds panels where it can serve; the loop here is its reference. ``numerics/reference.py`` has
the same algorithm in plain lines.

Source: IST-DASLab/gptq@2d65066; arXiv 2210.17323 section 3 and algorithm 1. Deviation: with ``group_refit`` "fresh" a group is
fitted on fully up-to-date weights even where it reaches beyond the column block, so ``column_block`` never changes a result.
"stale" reads what the original reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.checks import require_choice
from ptqbench.numerics.fused_columns import PANEL as FUSED_PANEL
from ptqbench.numerics.fused_columns import FusedPanels, use_fused
from ptqbench.numerics.group_grids import GroupGrids

PANEL = 32
"""Channels per panel; with the row chunk of the solvers, a panel's weights and errors fit a second-level cache."""


@dataclass(frozen=True)
class LoopOptions:
    """Options of the column loop.

    Attributes:
        column_block: Channels per block; the rest of the weight is updated once per block.
        static_groups: Fit all groups before rounding, over consecutive original channels.
        group_refit: ``fresh`` or ``stale``: which weights a dynamic group is fitted on when it is reached.
        keep_working: Return the working copy too: every channel as the blocks before its own left it.
    """

    column_block: int = 128
    static_groups: bool = False
    group_refit: str = "fresh"
    keep_working: bool = False

    def __post_init__(self) -> None:
        """Reject impossible values."""
        require_choice("group_refit", self.group_refit, ("fresh", "stale"))
        if self.column_block < 1:
            raise ConfigError(f"column_block: expected a positive integer, got {self.column_block}")


@dataclass(frozen=True)
class Drift:
    """The additional update of GPTAQ.

    Attributes:
        matrix: P (n, n), strictly upper triangular, in processing order.
        as_code: Multiply P by the rounded weights in updates beyond the block, as the original code does.
    """

    matrix: Tensor
    as_code: bool


@dataclass(frozen=True)
class _Block:
    """Channels [start, stop) of the loop; (k, m) unless said otherwise."""

    start: int
    stop: int
    weights: Tensor  # w, updated in place; holds the values just before rounding afterwards
    values: Tensor  # q
    errors: Tensor  # e
    centred: Tensor  # c
    upper: Tensor  # U_jl / U_jj, (k, n - start)
    drift: Tensor | None  # P, (k, n - start)
    drift_source: Tensor  # w, or q with ``as_code``: what P multiplies beyond the block

    def push(self, done: slice, columns: slice | Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Add to ``target``, in place, the updates that the channels ``done`` cause at ``columns``, and return it."""
        # w_l <- w_l - sum_j e_j U_jl / U_jj
        target.addmm_(self.upper[done, columns].T, self.errors[done], alpha=-1)
        # GPTAQ: w_l <- w_l + sum_j w_j P_jl
        return target if self.drift is None else target.addmm_(self.drift[done, columns].T, source[done])


def run_columns(
    work: Tensor, upper: Tensor, grids: GroupGrids, options: LoopOptions, drift: Drift | None, codes_dtype: torch.dtype,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Round all channels.

    Args:
        work: (n, m) weights in processing order; overwritten.
        upper: U (n, n), not modified.
        grids: Grids of the groups; those that are not fitted yet are fitted here.
        options: Blocking and group options.
        drift: P of GPTAQ, not modified.
        codes_dtype: Integer dtype that holds every code.
        engine: ``plain``, ``fused``, or ``auto`` (``fused_columns.use_fused``).

    Returns:
        Codes, values and, if ``options`` ask for it, the working copy (else ``None``), each (n, m) in processing order.

    Raises:
        UnsupportedError: The engine ``fused`` was asked for and cannot serve, or its kernel does not compile here.
    """
    fused = FusedPanels(grids) if use_fused(engine, work, [group.spec for group in grids.groups]) else None
    size = min(options.column_block, len(work))
    # Stale groups are fitted on the weights as they were when the block began, so that those are kept.
    stale = options.group_refit == "stale" and not all(grids.fitted)
    codes, values = torch.empty_like(work, dtype=codes_dtype), torch.empty_like(work)
    working = torch.empty_like(work) if options.keep_working else None
    errors, centred = torch.empty_like(work[:size]), torch.empty_like(work[:size])
    for start in range(0, len(work), size):
        stop = min(start + size, len(work))
        here, k = slice(start, stop), stop - start
        if working is not None:
            working[here] = work[here]
        weights = work[here].clone() if stale else work[here]
        block = _Block(
            start,
            stop,
            weights,
            values[here],
            errors[:k],
            centred[:k],
            upper[here, start:] / upper.diagonal()[here, None],
            None if drift is None else drift.matrix[here, start:],
            values[here] if drift is not None and drift.as_code else weights,
        )
        for first, last in _panels(block, grids, PANEL if fused is None else FUSED_PANEL):
            # Fit the group that begins here.
            g = grids.of_position[start + first]
            if not grids.fitted[g]:
                positions = grids.positions[g]
                grids.fit(g, (work[positions] if stale else _current(work, block, first, positions)).T)
            # Round the channels of the panel: q, e and c.
            if fused is None:
                _round_panel(block, first, last, grids)
            else:
                _round_fused(block, first, last, fused, codes[here])
            # w_l <- w_l - sum_j e_j U_jl / U_jj + sum_j w_j P_jl for the rest l of the block, j over the panel.
            block.push(slice(first, last), slice(last, k), weights[last:], weights)
        # The same for all channels l beyond the block, j over the block (the lazy batch update of arXiv 2210.17323).
        block.push(slice(0, k), slice(k, None), work[stop:], block.drift_source)
        if fused is None:
            grids.write_codes(start, block.centred, codes[here])
        block.values.add_(0.0)  # -0.0 (a negative value rounded to c = 0) becomes 0.0, as in dequantize(codes)
    return codes, values, working


def _panels(block: _Block, grids: GroupGrids, longest: int) -> list[tuple[int, int]]:
    """Cut a block into panels of at most ``longest`` channels, and wherever an unfitted group begins.

    The fit of a group needs the updates by all channels before it.
    """
    size = block.stop - block.start
    seen = {g for g, fitted in enumerate(grids.fitted) if fitted}
    cuts = set(range(0, size, longest)) | {size}
    for i, g in enumerate(grids.of_position[block.start : block.stop]):
        if g not in seen:
            cuts.add(i)
            seen.add(g)
    return list(pairwise(sorted(cuts)))


def _round_panel(block: _Block, first: int, last: int, grids: GroupGrids) -> None:
    """Round channels [first, last) of a block, each after the updates by the earlier channels of the panel."""
    # Row i of U^T and P^T: the coefficients of all earlier channels for channel i.
    here = slice(first, last)
    upper = block.upper[here, here].T.contiguous().unbind(0)
    drift = None if block.drift is None else block.drift[here, here].T.contiguous().unbind(0)
    past_w, past_e = block.weights[here].T, block.errors[here].T
    channels = (t[here].unbind(0) for t in (block.weights, block.centred, block.values, block.errors))
    for i, (w, c, q, e) in enumerate(zip(*channels, strict=True)):
        if i:
            # w_i <- w_i - sum_{j<i} e_j U_ji / U_jj
            w.addmv_(past_e[:, :i], upper[i][:i], alpha=-1)
            # GPTAQ: w_i <- w_i + sum_{j<i} w_j P_ji
            if drift is not None:
                w.addmv_(past_w[:, :i], drift[i][:i])
        # q_i = round(w_i), c_i its code minus the zero point
        grids.round(block.start + first + i, w, c, q)
        # e_i = w_i - q_i; ``upper`` holds U_ij / U_ii
        torch.sub(w, q, out=e)


def _round_fused(block: _Block, first: int, last: int, fused: FusedPanels, codes: Tensor) -> None:
    """Do with the kernel what ``_round_panel`` does, and write ``codes`` (k, m) of the block as well."""
    here = slice(first, last)
    weights, errors, values = block.weights[here], block.errors[here], block.values[here]
    drift = None if block.drift is None else block.drift[here, here]
    fused.round(block.start + first, weights, errors, values, codes[here], block.upper[here, here], drift)


def _current(work: Tensor, block: _Block, done: int, positions: Tensor) -> Tensor:
    """Return the weights at ``positions`` after the updates by the first ``done`` channels of the block.

    Weights inside the block have these updates already. Weights beyond it get them here, on a copy.
    """
    current = work[positions]
    beyond = positions >= block.stop
    if done and bool(beyond.any()):
        columns = positions[beyond] - block.start
        current[beyond] = block.push(slice(0, done), columns, current[beyond], block.drift_source)
    return current
