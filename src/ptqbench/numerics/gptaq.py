"""GPTAQ: GPTQ that also lets each channel's input drift be absorbed by later channels.

Objective: min over Q of ||Xq Q^T - X W^T||_F^2, X being the inputs of the full-precision stream and Xq those of the
quantized one. Row j of P is the least-squares image of channel j's drift on the later channels:

    D = (X - Xq)^T Xq = C^T,   P = strength * strictly_upper(D U^T) U,   w_l <- w_l - e_j U_jl + w_j P_jl  (l > j)

with the current w_j before rounding.

Legend: weight W (out, in); second_moment H = Xq^T Xq; cross_moment C = Xq^T (X - Xq); both at the same scale, (in, in).
Source: arXiv 2504.02692; Intelligent-Computing-Lab-Yale/GPTAQ@883afc6. The code fixes ``strength`` at 0.25; the paper does not
have it. Deviations: P always multiplies values before rounding (``as_code`` for the mixture of the original); each linear is
damped once (``repeated_damping`` for the original, which damps a shared moment again for every linear).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.checks import compute_dtype, require_finite
from ptqbench.numerics.column_loop import Drift
from ptqbench.numerics.compensated import SolverOptions, in_processing_order, solve_by_columns
from ptqbench.numerics.factorisation import Factor
from ptqbench.numerics.grid import Grid, LinearResult


def gptaq(
    weight: Tensor,
    second_moment: Tensor,
    cross_moment: Tensor,
    grid: Grid,
    *,
    strength: float = 0.25,
    as_code: bool = False,
    **options: Unpack[SolverOptions],
) -> LinearResult:
    """Quantize one weight, or the stacked weights of linears that share their input.

    Args:
        weight: (out, in), not modified.
        second_moment: (in, in) of the quantized stream, not modified.
        cross_moment: (in, in) C = Xq^T (X - Xq) at the scale of ``second_moment``, not modified.
        grid: Column ranges covering all input channels.
        strength: Factor of P; 0 is GPTQ.
        as_code: In updates beyond the block multiply P by the rounded weights, as the original code does. Then
            ``column_block`` influences the result.
        options: See ``SolverOptions``.

    Returns:
        The rounded weight.

    Raises:
        ConfigError: A shape or an option is wrong.
        NumericalError: NaN or infinity in an input, or a moment that is singular after damping.
        UnsupportedError: The engine cannot serve.
    """
    require_finite("cross_moment", cross_moment, second_moment.shape)

    def drift(factor: Factor) -> Drift:
        return Drift(drift_matrix(factor, cross_moment, strength).to(compute_dtype(weight)), as_code)

    # P = 0 leaves the update of GPTQ.
    return solve_by_columns(weight, second_moment, grid, drift=None if strength == 0 else drift, **options)


def drift_matrix(factor: Factor, cross_moment: Tensor, strength: float) -> Tensor:
    """Return P, the strictly upper triangular image of every channel's drift on later channels.

    Args:
        factor: Factor of a second moment at the scale of ``cross_moment``, not modified.
        cross_moment: (in, in) C = Xq^T (X - Xq) in original order, not modified. Dead channels are dropped.
        strength: Factor of the result.

    Returns:
        P (in, in) in processing order, in the dtype of the factor.
    """
    upper = factor.upper
    # D = (X - Xq)^T Xq = C^T
    drift = in_processing_order(cross_moment.to(upper.dtype), factor).T
    # P = strength * strictly_upper(D U^T) U
    return (drift @ upper.T).triu_(1).mul_(strength) @ upper


def repeated_damping(damping: float, times: int) -> float:
    """Return the damping after adding ``damping`` times the current mean diagonal ``times`` times.

    The original code damps the moment shared by k, v, q (and up, gate) in place, once per linear and in that order:
    the second linear sees (1 + damping)^2 - 1, the third (1 + damping)^3 - 1. Under ``act_order`` it copies the moment first.

    Args:
        damping: Fraction of the mean diagonal.
        times: 1 for the first linear of the group, 2 for the second, and so on.

    Returns:
        The equivalent single damping.

    Raises:
        ConfigError: ``times`` is below 1.
    """
    if times < 1:
        raise ConfigError(f"times: expected at least 1, got {times}")
    return damping if times == 1 else (1 + damping) ** times - 1
