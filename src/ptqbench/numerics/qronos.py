"""Qronos: correct the whole drift at the first channel, then run GPTQ on the rest.

Objective: min over Q of ||Xq Q^T - X W^T||_F^2. With H = Xq^T Xq, C = Xq^T (X - Xq), 1 the first channel in processing
order, 2 all later ones, and L = damping * mean(diag H):

    q_1 = round(w_1 + (W C^T)_1 / H_11)                            the best w_1 with the rest at W, then rounded
    W_2 <- W_2 + ((w_1 - q_1) H_12 + (W C^T)_2) (H_22 + L I)^-1     the best rest, pulled towards W_2
    GPTQ on W_2 with H_22 + L I

This is the published form with its terms rearranged, so that no drift and no rounding error give exactly no change.

Legend: weight W (out, in); second_moment H and cross_moment C (in, in) at the same scale.
Source: arXiv 2505.11695; Xilinx/brevitas@b106358c. Deviations: damping is a fraction of the mean diagonal
(``eigenvalue_damping`` converts Brevitas' fraction of the largest eigenvalue); H_11 stays undamped; the first group's
grid, if dynamic, is fitted on W before the correction, since q_1 needs it; dead channels are dropped from C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_finite
from ptqbench.numerics.compensated import SolverOptions, in_processing_order, solve_by_columns
from ptqbench.numerics.factorisation import Factor
from ptqbench.numerics.grid import Grid, LinearResult
from ptqbench.numerics.group_grids import GroupGrids


def qronos(
    weight: Tensor, second_moment: Tensor, cross_moment: Tensor, grid: Grid, **options: Unpack[SolverOptions]
) -> LinearResult:
    """Quantize one weight, or the stacked weights of linears that share their input.

    Args:
        weight: (out, in), not modified.
        second_moment: (in, in) of the quantized stream, not modified.
        cross_moment: (in, in) C = Xq^T (X - Xq) at the scale of ``second_moment``, not modified.
        grid: Column ranges covering all input channels.
        options: See ``SolverOptions``. With ``act_order`` the first channel is the one of largest energy;
            ``eigenvalue_damping`` gives the ``damping`` of Brevitas.

    Returns:
        The rounded weight.

    Raises:
        ConfigError: A shape or an option is wrong.
        NumericalError: NaN or infinity in an input, or a moment that is singular after damping.
        UnsupportedError: The engine cannot serve.
    """
    require_finite("cross_moment", cross_moment, second_moment.shape)

    def correction(factor: Factor) -> Callable[[Tensor, GroupGrids], None]:
        return _correction(factor, second_moment, cross_moment, compute_dtype(weight))

    return solve_by_columns(weight, second_moment, grid, prepare=correction, **options)


def _correction(
    factor: Factor, second_moment: Tensor, cross_moment: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, GroupGrids], None]:
    """Return the function that applies the first two equations of this module to the rows at hand."""
    # C and the column H_21 in processing order; U without its first row and column: (H_22 + L I)^-1 = U_22^T U_22
    drift = in_processing_order(cross_moment.to(factor.upper.dtype), factor).to(dtype)
    first = 0 if factor.order is None else int(factor.order[0])
    coupling = second_moment[:, first].to(dtype)
    coupling = coupling if factor.order is None else coupling[factor.order]
    trailing = factor.upper[1:, 1:].to(dtype)

    def correct(work: Tensor, grids: GroupGrids) -> None:
        """Change W (n, m) in place; the loop then finds channel 1 on its grid."""
        # pull = (W C^T)^T, every channel's share of the drift
        pull = drift @ work
        # q_1 needs its grid: a dynamic group is fitted on W before the correction.
        own = grids.of_position[0]
        if not grids.fitted[own]:
            grids.fit(own, work[grids.positions[own]].T)
        # q_1 = round(w_1 + (W C^T)_1 / H_11); a dead channel has no drift
        w, q = work[0].clone(), work[0].clone()
        if coupling[0] > 0:
            w += pull[0] / coupling[0]
        grids.round(0, w, torch.empty_like(w), q)
        # W_2 <- W_2 + ((w_1 - q_1) H_12 + (W C^T)_2) (H_22 + L I)^-1
        rhs = pull[1:] + torch.outer(coupling[1:], work[0] - q)
        work[1:] += trailing.T @ (trailing @ rhs)
        work[0] = q

    return correct


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
