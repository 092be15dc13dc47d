"""Factor the damped second moment once for every linear that shares it.

    (H + damping * mean(diag H) * I)^-1 = U^T U,   U upper triangular, channels in processing order

Let R be upper triangular with H = R R^T, H being damped. Then U = R^-1. R is the Cholesky factor of H in reversed order of the
channels, put back in order. This takes one factorisation and one triangular inverse, and a singular H shows in one place.

Legend: H (in, in) ``second_moment``, any positive multiple of X^T X; U (in, in).
Source: IST-DASLab/gptq@2d65066, arXiv 2210.17323 section 3 (Cholesky reformulation).
Deviations: a dead channel (H_jj = 0) counts as 0 in the mean diagonal. The original sets it to 1 first, so that its result
depends on the scale of H; with the original's scale (2/N times a sum over tokens) the two means differ by the
number of dead channels over the trace. Dead channels also come last under ``act_order``. A pivot below rounding error
counts as a failed factorisation. ``retry`` multiplies the damping by ten, at most four times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics.checks import compute_dtype, require_choice, require_finite, require_matrix, require_shape

MAX_RETRIES = 4
RETRY_FACTOR = 10.0
RETRY_START = 0.01
"""The damping that follows a failure with damping 0: the published default."""
INVERSION_LEAF = 256
"""Triangular blocks up to this size are inverted by a plain solve."""
PIVOT_TOLERANCE = 8.0
"""A squared pivot below this many machine epsilons of its diagonal entry is rounding noise."""


@dataclass(frozen=True)
class Factor:
    """The factorised second moment.

    Attributes:
        upper: U, (in, in), rows and columns in processing order; float32, or float64 for a float64 moment.
        order: (in,) int64, ``order[p]`` is the original channel processed at position p; ``None`` for the original order.
        dead: (in,) bool in original order, channels without any input.
        damping_used: The damping that the factorisation succeeded with.
        retries: How often it had to be raised.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    damping_used: float
    retries: int


def factorise(
    second_moment: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    on_cholesky_failure: str = "raise",
) -> Factor:
    """Factor the damped inverse second moment for the column loop.

    Args:
        second_moment: (in, in) symmetric positive semidefinite, at any positive scale, not modified. float64 is factorised in
            float64, anything else in float32.
        damping: Fraction of the mean diagonal added to the diagonal, >= 0.
        act_order: Process channels by descending diagonal (ties in original order).
        on_cholesky_failure: ``raise``, or ``retry`` with ten times the damping (recorded in the result).

    Returns:
        The factor.

    Raises:
        ConfigError: The shape or an option is wrong.
        NumericalError: NaN or infinity, a negative diagonal, an all-zero moment, or a matrix that stays singular.
    """
    require_matrix("second_moment", second_moment)
    require_shape("second_moment", second_moment, (len(second_moment), len(second_moment)))
    require_choice("on_cholesky_failure", on_cholesky_failure, ("raise", "retry"))
    if not 0 <= damping < float("inf"):
        raise ConfigError(f"damping: expected a finite fraction >= 0, got {damping}")
    require_finite("second_moment", second_moment)
    moment = second_moment.to(compute_dtype(second_moment))
    diagonal = moment.diagonal()
    _require_diagonal(diagonal)
    # Channels without input, and the order of processing: by falling H_jj under act_order.
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None

    # Factor H + damping mean(diag H) I, with more damping where that fails and ``retry`` is set.
    used = damping
    for retries in range(MAX_RETRIES + 1):
        upper = _inverse_factor(moment, dead, order, used)
        if upper is not None:
            return Factor(upper, order, dead, used, retries)
        if on_cholesky_failure == "raise":
            break
        used = used * RETRY_FACTOR if used > 0 else RETRY_START
    raise NumericalError(
        f"second_moment: expected a positive definite matrix after damping, got a singular one with damping {damping} "
        f"({retries} retries); use more calibration tokens, a larger damping, or on_cholesky_failure: retry"
    )


def _require_diagonal(diagonal: Tensor) -> None:
    lowest, index = diagonal.min(dim=0)
    if lowest < 0:
        raise NumericalError(f"second_moment: expected a diagonal >= 0, got {lowest.item()} at index {int(index)}")
    if not bool(diagonal.any()):
        raise NumericalError("second_moment: expected a non-zero matrix, got zeros only; no input reached this linear")


def _inverse_factor(moment: Tensor, dead: Tensor, order: Tensor | None, damping: float) -> Tensor | None:
    """Return U, or ``None`` if the damped moment is not positive definite to working precision."""
    mean = moment.diagonal().mean()
    # One copy of H in reversed processing order: H reversed = L L^T gives H = R R^T with R = L reversed.
    backwards = torch.arange(len(moment) - 1, -1, -1, device=moment.device) if order is None else order.flip(0)
    flipped = moment[backwards[:, None], backwards]
    # H <- H + damping mean(diag H) I. A dead channel is uncoupled: any positive entry leaves the others alone, and the mean
    # keeps the scale.
    flipped.diagonal().add_(damping * mean).add_(dead[backwards] * mean)
    # H reversed = L L^T
    lower = cholesky(flipped)
    if lower is None:
        return None
    del flipped
    # U = R^-1 = L^-1 reversed
    return _invert_lower(lower).flip(0, 1)


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a symmetric matrix, or ``None`` where it is singular to working precision.

    Args:
        matrix: (n, n) A, not modified; its lower triangle is read.

    Returns:
        L (n, n) with A = L L^T. ``None`` also where a squared pivot L_jj^2 is rounding noise of A_jj.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    noise = PIVOT_TOLERANCE * torch.finfo(matrix.dtype).eps * matrix.diagonal()
    return lower if int(info) == 0 and bool((lower.diagonal().square() > noise).all()) else None


def _invert_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves: n^3 / 3 operations, nearly all in matrix products.

    A triangular solve against the identity makes no use of its zeros and costs three times as much.
    """
    size = len(lower)
    if size <= INVERSION_LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        leaf: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return leaf
    # [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]).neg_()
    return inverse
