"""GPTQ: error-compensated rounding against the second moment of the inputs.

Objective: min over Q on a fixed grid of ||X W^T - X Q^T||_F^2 = trace((W - Q) S (W - Q)^T), solved channel by channel
with the exact least-squares update of the remaining channels.

Legend: weight W (out, in); second_moment S (in, in), any positive multiple of X^T X (damping is relative).
Source: arXiv 2210.17323 section 3; IST-DASLab/gptq@2d65066. Deviations: see ``numerics/factorisation.py`` (mean
diagonal with dead channels, one Cholesky) and ``numerics/column_loop.py`` (``group_refit`` "fresh" is the default).
"""

from __future__ import annotations

from torch import Tensor

from ptqbench.numerics.checks import compute_dtype
from ptqbench.numerics.column_loop import LoopOptions
from ptqbench.numerics.compensated import check_problem, checked_factor, compensated_rounding
from ptqbench.numerics.factorisation import Factor
from ptqbench.numerics.grid import Grid, LinearResult
from ptqbench.numerics.groups import untouched_result


def gptq(
    weight: Tensor,
    second_moment: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    column_block: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    group_refit: str = "fresh",
    on_cholesky_failure: str = "raise",
    grid_weight: Tensor | None = None,
    factor: Factor | None = None,
    engine: str = "auto",
    keep_working: bool = False,
) -> LinearResult:
    """Quantize one weight, or the stacked weights of linears that share their input.

    Args:
        weight: (out, in), any floating dtype, not modified; rounded in float64 if float64, else in float32.
        second_moment: (in, in) uncentred, at any positive scale, not modified; factorised in its own precision.
        grid: Column ranges covering all input channels. An untouched range takes up error but is not rounded; a
            wholly untouched grid returns the weight bit for bit.
        damping: Fraction of the mean diagonal added to the diagonal.
        column_block: Channels per block; with ``group_refit`` "fresh" of no influence on the result.
        act_order: Process channels by descending diagonal. Dynamic groups then follow the processing order.
        static_groups: Fit all groups on the weight before rounding, over consecutive original channels.
        group_refit: ``fresh`` fits a dynamic group on up-to-date weights, ``stale`` on those of the last block's end,
            as the original code does.
        on_cholesky_failure: ``raise`` or ``retry``.
        grid_weight: (out, in), fit all grids on this weight instead; not modified.
        factor: ``factorise(second_moment, ...)`` made with the same options, to share it between linears.
        engine: How the column loop runs, the same up to rounding errors: ``plain``, ``fused`` (one kernel launch per block,
            see ``numerics/fused_columns.py``), or ``auto``: fused on a GPU where it can serve, plain elsewhere.
        keep_working: Return the working copy as well (``LinearResult.working``), as the authors' code of Q2N reads it; its
            content depends on ``column_block``.

    Returns:
        The rounded weight. Dead channels (zero diagonal) get the code of zero.

    Raises:
        ConfigError: A shape or an option is wrong, or ``factor`` was made with other options.
        NumericalError: NaN or infinity in an input, or a moment that is singular after damping.
        UnsupportedError: The engine cannot serve.
    """
    options = LoopOptions(column_block, static_groups, group_refit, keep_working)
    check_problem(weight, second_moment, grid, grid_weight)
    if all(part.spec.untouched for part in grid):
        return untouched_result(weight, grid, compute_dtype(weight))
    factor = checked_factor(second_moment, factor, damping, act_order, on_cholesky_failure)
    return compensated_rounding(weight, grid, factor, options, grid_weight=grid_weight, engine=engine)
