"""Qronos: correct the whole drift at the first channel, then run GPTQ on the rest.

Objective: min over Q of ||Xq Q^T - X W^T||_F^2. With H = Xq^T Xq, C = Xq^T (X - Xq), 1 the first channel in processing
order, 2 all later ones, and L = damping * mean(diag H):

    q_1 = round(w_1 + (W C^T)_1 / H_11)                            w_1's best value with the rest at W, then rounded
    W_2 <- W_2 + ((w_1 - q_1) H_12 + (W C^T)_2) (H_22 + L I)^-1     the rest's best value, pulled towards W_2
    GPTQ on W_2 with H_22 + L I

which is the published form with its terms rearranged, so that no drift and no rounding error give exactly no change.

Legend: weight W (out, in); second_moment H and cross_moment C (in, in) at the same scale.
Source: arXiv 2505.11695; Xilinx/brevitas@b106358c. Deviations: damping is a fraction of the mean diagonal
(``eigenvalue_damping`` converts Brevitas' fraction of the largest eigenvalue); H_11 stays undamped; the first group's
grid, if dynamic, is fitted on W before the correction, since q_1 needs it; dead channels are dropped from C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_finite, require_shape
from ptqbench.numerics.column_loop import LoopOptions
from ptqbench.numerics.compensated import check_problem, checked_factor, compensated_rounding, in_processing_order
from ptqbench.numerics.factorisation import Factor
from ptqbench.numerics.grid import Grid, LinearResult
from ptqbench.numerics.group_grids import GroupGrids
from ptqbench.numerics.groups import untouched_result


def qronos(
    weight: Tensor,
    second_moment: Tensor,
    cross_moment: Tensor,
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
        weight: (out, in), not modified.
        second_moment: (in, in) of the quantized stream, not modified.
        cross_moment: (in, in) C = Xq^T (X - Xq) at the scale of ``second_moment``, not modified.
        grid: Column ranges covering all input channels.
        damping: Fraction of the mean diagonal; see ``eigenvalue_damping``.
        column_block: See ``gptq``.
        act_order: See ``gptq``; the first channel is then the one of largest energy.
        static_groups: See ``gptq``.
        group_refit: See ``gptq``.
        on_cholesky_failure: See ``gptq``.
        grid_weight: See ``gptq``.
        factor: See ``gptq``.
        engine: See ``gptq``.
        keep_working: See ``gptq``.

    Returns:
        The rounded weight.

    Raises:
        ConfigError: A shape or an option is wrong.
        NumericalError: NaN or infinity in an input, or a moment that is singular after damping.
        UnsupportedError: The engine cannot serve.
    """
    options = LoopOptions(column_block, static_groups, group_refit, keep_working)
    check_problem(weight, second_moment, grid, grid_weight)
    require_shape("cross_moment", cross_moment, second_moment.shape)
    require_finite("cross_moment", cross_moment)
    dtype = compute_dtype(weight)
    if all(part.spec.untouched for part in grid):
        return untouched_result(weight, grid, dtype)
    factor = checked_factor(second_moment, factor, damping, act_order, on_cholesky_failure)
    drift = in_processing_order(cross_moment.to(factor.upper.dtype), factor).to(dtype)
    first = 0 if factor.order is None else int(factor.order[0])
    coupling = second_moment[:, first].to(dtype)
    coupling = coupling if factor.order is None else coupling[factor.order]
    trailing = factor.upper[1:, 1:].to(dtype)

    def correct(work: Tensor, grids: GroupGrids) -> None:
        """Apply the two equations above to W (n, m) in place; the loop then finds channel 1 on its grid."""
        # pull = (W C^T)^T, every channel's share of the drift
        pull = drift @ work
        own = grids.of_position[0]
        if not grids.fitted[own]:
            grids.fit(own, work[grids.positions[own]].T)
        # q_1 = round(w_1 + (W C^T)_1 / H_11)
        w, q = work[0].clone(), work[0].clone()
        if coupling[0] > 0:
            w += pull[0] / coupling[0]
        grids.round(0, w, torch.empty_like(w), q)
        # W_2 <- W_2 + ((w_1 - q_1) H_12 + (W C^T)_2) (H_22 + L I)^-1; U without its first row and column factors the inverse
        rhs = pull[1:] + torch.outer(coupling[1:], work[0] - q)
        work[1:] += trailing.T @ (trailing @ rhs)
        work[0] = q

    return compensated_rounding(weight, grid, factor, options, grid_weight=grid_weight, prepare=correct, engine=engine)


def eigenvalue_damping(second_moment: Tensor, fraction: float) -> float:
    """Convert a damping relative to the largest eigenvalue into one relative to the mean diagonal.

    Brevitas uses 1e-6 (weight-only) and 1e-3 (W4A4) times the largest eigenvalue.

    Args:
        second_moment: (in, in) symmetric, not modified.
        fraction: Fraction of the largest eigenvalue.

    Returns:
        The same damping as a fraction of the mean diagonal.
    """
    require_finite("second_moment", second_moment)
    moment = second_moment.to(compute_dtype(second_moment))
    return float(fraction * torch.linalg.eigvalsh(moment)[-1] / moment.diagonal().mean())
