"""What GPTQ, GPTAQ and Qronos share around the column loop: options, checks, order of the steps, chunks of rows.

The order of the steps is that of the original code:

    1. fit the grids of whole ranges on the weight as it is     4. put the channels in processing order
    2. set dead channels to zero                                5. run the loop
    3. fit static groups                                        6. put the channels back in the order of the model

Legend: weight (out, in); n input channels; m rows worked on at once, held transposed (n, m).
Source: IST-DASLab/gptq@2d65066. Rows never interact, so they are solved in chunks that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_finite, require_shape
from ptqbench.numerics.column_loop import Drift, LoopOptions, run_columns
from ptqbench.numerics.factorisation import Factor, factorise
from ptqbench.numerics.grid import Grid, LinearResult, check_weight, code_dtype
from ptqbench.numerics.group_grids import GroupGrids
from ptqbench.numerics.groups import assemble, columns_of, plan_groups, untouched_result

ROW_CHUNK = {"cpu": 4096}
"""Most rows solved together; device types that are not listed take all rows at once."""

Prepare = Callable[[Tensor, GroupGrids], None]
"""What is done to a chunk of rows before the loop. It gets the weights (n, m) in processing order with dead channels at zero,
which it may change in place, and the grids, which it may fit."""


class SolverOptions(TypedDict, total=False):
    """Options that GPTQ, GPTAQ and Qronos share; ``solve_by_columns`` has the defaults.

    Attributes:
        damping: Fraction of the mean diagonal added to the diagonal of the second moment.
        act_order: Process channels by descending diagonal. Dynamic groups then follow the processing order.
        on_cholesky_failure: ``raise``, or ``retry`` with ten times the damping.
        column_block: Channels per block. It has no influence on the result where ``group_refit`` is "fresh".
        static_groups: Fit all groups on the weight before rounding, over consecutive original channels.
        group_refit: ``fresh`` fits a dynamic group on up-to-date weights, ``stale`` on those of the last block's end,
            as the original code does.
        keep_working: Return the working copy as well (``LinearResult.working``), which the authors' code of Q2N reads. Its
            content depends on ``column_block``.
        grid_weight: (out, in), the weight that all grids are fitted on instead; not modified.
        engine: How the column loop runs: ``plain``, ``fused`` (one kernel launch per panel, see ``numerics/fused_columns.py``),
            or ``auto``: fused on a GPU where it can serve, plain elsewhere. Results are the same up to rounding errors.
    """

    damping: float
    act_order: bool
    on_cholesky_failure: str
    column_block: int
    static_groups: bool
    group_refit: str
    keep_working: bool
    grid_weight: Tensor | None
    engine: str


def solve_by_columns(
    weight: Tensor,
    second_moment: Tensor,
    grid: Grid,
    *,
    drift: Callable[[Factor], Drift] | None = None,
    prepare: Callable[[Factor], Prepare] | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    on_cholesky_failure: str = "raise",
    column_block: int = 128,
    static_groups: bool = False,
    group_refit: str = "fresh",
    keep_working: bool = False,
    grid_weight: Tensor | None = None,
    engine: str = "auto",
) -> LinearResult:
    """Check the arguments, factor the second moment and round all channels of a weight with error compensation.

    This is GPTQ. ``drift`` makes GPTAQ's additional update from the factor, ``prepare`` Qronos' correction. The other options
    are those of ``SolverOptions``; shapes and errors are those of ``gptq``.
    """
    options = LoopOptions(column_block, static_groups, group_refit, keep_working)
    check_weight(weight, grid, grid_weight)
    require_shape("second_moment", second_moment, (weight.shape[1], weight.shape[1]))
    if all(part.spec.untouched for part in grid):
        return untouched_result(weight)
    factor = factorise(second_moment, damping=damping, act_order=act_order, on_cholesky_failure=on_cholesky_failure)
    return compensated_rounding(
        weight,
        grid,
        factor,
        options,
        grid_weight=grid_weight,
        drift=None if drift is None else drift(factor),
        prepare=None if prepare is None else prepare(factor),
        engine=engine,
    )


def in_processing_order(matrix: Tensor, factor: Factor) -> Tensor:
    """Return a copy of an (in, in) matrix in processing order, with rows and columns of dead channels at zero."""
    kept = torch.where(factor.dead[:, None] | factor.dead, 0, matrix)
    return kept if factor.order is None else kept[factor.order[:, None], factor.order]


def compensated_rounding(
    weight: Tensor,
    grid: Grid,
    factor: Factor,
    options: LoopOptions,
    *,
    grid_weight: Tensor | None = None,
    drift: Drift | None = None,
    prepare: Prepare | None = None,
    engine: str = "auto",
) -> LinearResult:
    """Round all channels of a weight with error compensation.

    Args:
        weight: (out, in) finite, not modified.
        grid: A valid grid with at least one quantized range.
        factor: The factorised second moment; not modified.
        options: Blocking and group options.
        grid_weight: (out, in), fit all grids on this weight; dynamic groups are then fitted before the loop. Not
            modified.
        drift: GPTAQ's additional update.
        prepare: What is done to every chunk of rows before the loop.
        engine: See ``SolverOptions``.

    Returns:
        The rounded weight, damping entries included.

    Raises:
        NumericalError: The result is not finite.
        UnsupportedError: The engine cannot serve.
    """
    dtype, order = compute_dtype(weight), factor.order
    upper = factor.upper.to(dtype)
    source = weight if grid_weight is None else grid_weight
    groups = plan_groups(grid, source, None if options.static_groups else order)
    inverse = torch.arange(weight.shape[1], device=weight.device) if order is None else torch.argsort(order)
    positions = [inverse[group.channels.to(weight.device)] for group in groups]
    codes = torch.empty(weight.shape, dtype=code_dtype(grid), device=weight.device)
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    working = torch.empty_like(values, dtype=dtype) if options.keep_working else None
    scales, zeros = [], []
    for here in _row_chunks(weight):
        # Steps 2 and 4.
        work = _transposed(weight[here], factor, dtype)
        grids = GroupGrids(groups, positions, work)
        # Steps 1 and 3.
        _fit_before_loop(grids, weight[here], None if grid_weight is None else grid_weight[here], work, factor, options)
        # Qronos corrects the drift with the first channel here.
        if prepare is not None:
            prepare(work, grids)
        # Steps 5 and 6.
        found = run_columns(work, upper, grids, options, drift, codes.dtype, engine)
        for whole, part in zip((codes, values, working), found, strict=True):
            if whole is not None and part is not None:
                whole[here] = part.T if order is None else part[inverse].T
        scales.append(grids.scale)
        zeros.append(grids.zero_point)
    result = assemble(weight, grid, groups, torch.cat(scales, 1), torch.cat(zeros, 1), codes, values)
    require_finite("dequantized", result.dequantized)
    return replace(
        result, damping_used=factor.damping_used, damping_retries=factor.retries, order=order, working=working
    )


def _row_chunks(weight: Tensor) -> list[slice]:
    """Cut the rows into as few chunks of nearly equal size as ``ROW_CHUNK`` allows."""
    rows = len(weight)
    count = -(-rows // ROW_CHUNK.get(weight.device.type, rows))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _transposed(weight: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy (n, m) in processing order with dead channels at zero."""
    columns = weight.T if factor.order is None else weight.T[factor.order]
    work = columns.to(dtype, copy=True, memory_format=torch.contiguous_format)
    work[factor.dead if factor.order is None else factor.dead[factor.order]] = 0
    return work


def _fit_before_loop(
    grids: GroupGrids,
    weight: Tensor,
    grid_weight: Tensor | None,
    work: Tensor,
    factor: Factor,
    options: LoopOptions,
) -> None:
    """Fit the grids that do not depend on the rounding: whole ranges, static groups, and all groups under ``grid_weight``.

    Whole ranges are fitted on the weight as it is, groups with dead channels at zero.
    """
    source = weight if grid_weight is None else grid_weight
    zeroed = work if grid_weight is None else _transposed(grid_weight, factor, work.dtype)
    for g, group in enumerate(grids.groups):
        if group.whole_range:
            grids.fit(g, columns_of(source, group).to(work.dtype))
        elif options.static_groups or grid_weight is not None:
            grids.fit(g, zeroed[grids.positions[g]].T)
