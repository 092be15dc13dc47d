"""What GPTQ, GPTAQ and Qronos share around the column loop: checks, order of the steps, chunks of rows.

The order of the steps follows the original code: grids of whole ranges are fitted on the untouched weight; dead
channels are zeroed; static groups are fitted; channels are permuted; the loop runs; the permutation is undone.

Legend: weight (out, in); n input channels; m rows worked on at once, held transposed (n, m).
Source: IST-DASLab/gptq@2d65066. Rows never interact, so they are solved in chunks that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_finite, require_matrix, require_shape
from ptqbench.numerics.column_loop import Drift, LoopOptions, run_columns
from ptqbench.numerics.factorisation import Factor, factorise
from ptqbench.numerics.grid import Grid, LinearResult, code_dtype, validate_grid
from ptqbench.numerics.group_grids import GroupGrids
from ptqbench.numerics.groups import assemble, columns_of, plan_groups

ROW_CHUNK = {"cpu": 4096}
"""Most rows solved together; device types that are not listed take all rows at once."""


def check_problem(weight: Tensor, second_moment: Tensor, grid: Grid, grid_weight: Tensor | None) -> None:
    """Check the arguments that every solver takes.

    Args:
        weight: (out, in), not modified.
        second_moment: (in, in), not modified; its values are checked by ``factorise``.
        grid: The grid.
        grid_weight: (out, in) or ``None``, not modified.

    Raises:
        ConfigError: A shape is wrong or the grid does not cover the weight.
        NumericalError: A weight holds NaN or infinity.
    """
    require_matrix("weight", weight)
    columns = weight.shape[1]
    validate_grid(grid, columns)
    require_shape("second_moment", second_moment, (columns, columns))
    require_finite("weight", weight)
    if grid_weight is not None:
        require_shape("grid_weight", grid_weight, weight.shape)
        require_finite("grid_weight", grid_weight)


def checked_factor(
    second_moment: Tensor, factor: Factor | None, damping: float, act_order: bool, on_cholesky_failure: str
) -> Factor:
    """Return the given factor after checking that it fits the options, or compute one."""
    if factor is None:
        return factorise(second_moment, damping=damping, act_order=act_order, on_cholesky_failure=on_cholesky_failure)
    factor.require_options(len(second_moment), damping, act_order)
    return factor


def in_processing_order(matrix: Tensor, factor: Factor) -> Tensor:
    """Return a copy of an (in, in) matrix in processing order, rows and columns of dead channels zeroed."""
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
    prepare: Callable[[Tensor, GroupGrids], None] | None = None,
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
        prepare: Called per chunk of rows before the loop with the weights (n, m) in processing order, dead channels
            zeroed, which it may change in place, and the grids, which it may fit.
        engine: How the loop runs, ``auto``, ``plain`` or ``fused``: see ``numerics/fused_columns.py``.

    Returns:
        The rounded weight, damping entries included.

    Raises:
        NumericalError: The result is not finite.
        UnsupportedError: The engine cannot serve.
    """
    dtype, order = compute_dtype(weight), factor.order
    upper = factor.upper.to(dtype)
    groups = plan_groups(grid, None if options.static_groups else order)
    inverse = torch.arange(weight.shape[1], device=weight.device) if order is None else torch.argsort(order)
    positions = [inverse[group.channels.to(weight.device)] for group in groups]
    codes = torch.empty(weight.shape, dtype=code_dtype(grid), device=weight.device)
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    working = torch.empty_like(values, dtype=dtype) if options.keep_working else None
    scales, zeros = [], []
    for here in _row_chunks(weight):
        # Transposed copy in processing order, dead channels at zero (steps 2 and 4 of the original code).
        work = _transposed(weight[here], factor, dtype)
        grids = GroupGrids(groups, positions, work)
        # Grids of whole ranges and static groups (steps 1 and 3).
        _fit_before_loop(grids, weight[here], None if grid_weight is None else grid_weight[here], work, factor, options)
        # Qronos: its correction by the first channel.
        if prepare is not None:
            prepare(work, grids)
        # The loop (step 7); then back to the order of the model (step 8).
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
    """Cut the rows into the fewest chunks allowed, of nearly equal size."""
    rows = len(weight)
    count = -(-rows // ROW_CHUNK.get(weight.device.type, rows))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _transposed(weight: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy (n, m) in processing order with dead channels zeroed."""
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
    """Fit the grids that do not depend on the rounding.

    Whole ranges are fitted on the weight as it is; static groups, and all groups under ``grid_weight``, with dead channels at 0.
    """
    source = weight if grid_weight is None else grid_weight
    zeroed = work if grid_weight is None else _transposed(grid_weight, factor, work.dtype)
    for g, group in enumerate(grids.groups):
        if group.whole_range:
            grids.fit(g, columns_of(source, group).to(work.dtype))
        elif options.static_groups or grid_weight is not None:
            grids.fit(g, zeroed[grids.positions[g]].T)
