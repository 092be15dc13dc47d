"""Factor the damped second moment once for every linear that shares it.

    (H + damping * mean(diag H) * I)^-1 = U^T U,   U upper triangular, channels in processing order

Let R be upper triangular with H = R R^T (H damped): R is the Cholesky factor of H with rows and columns reversed, reversed
back. Then U = R^-1. This takes one factorisation and one triangular inverse, and a singular H shows in a single place.

Legend: H (in, in) ``second_moment``, any positive multiple of X^T X; U (in, in).
Source: IST-DASLab/gptq@2d65066, arXiv 2210.17323 section 3 (Cholesky reformulation).
Deviations: a dead channel (H_jj = 0) counts as 0 in the mean diagonal. The original sets it to 1 first, which makes
the result depend on the scale of H; with the original's scale (2/N times a sum over tokens) the two differ by the
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
"""First damping to try after a failure with none at all: the published default."""
INVERSION_LEAF = 256
"""Triangular blocks up to this size are inverted by a plain solve."""
PIVOT_TOLERANCE = 8.0
"""A squared pivot below this many machine epsilons of its diagonal entry is rounding noise."""


@dataclass(frozen=True)
class Factor:
    """The factorised second moment; depends on nothing but the moment and the three options.

    Attributes:
        upper: U, (in, in), rows and columns in processing order; float32, or float64 for a float64 moment.
        order: (in,) int64, ``order[p]`` is the original channel processed at position p; ``None`` = original order.
        dead: (in,) bool in original order, channels without any input.
        damping: The damping asked for, a fraction of the mean diagonal.
        act_order: Whether channels are processed by descending diagonal.
        damping_used: The damping that the factorisation succeeded with.
        retries: How often it had to be raised.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    damping: float
    act_order: bool
    damping_used: float
    retries: int

    def require_options(self, in_features: int, damping: float, act_order: bool) -> None:
        """Raise ``ConfigError`` if this factor was made for another size, damping or order.

        Args:
            in_features: Input channels of the weight.
            damping: Damping asked of the solver.
            act_order: Order asked of the solver.

        Raises:
            ConfigError: The factor does not fit.
        """
        expected, got = (in_features, damping, act_order), (self.dead.numel(), self.damping, self.act_order)
        if expected != got:
            raise ConfigError(
                f"factor: expected (in_features, damping, act_order) {expected}, got a factor made with {got}; "
                "pass the same options to factorise and to the solver"
            )


def factorise(
    second_moment: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    on_cholesky_failure: str = "raise",
) -> Factor:
    """Factor the damped inverse second moment for the column loop.

    Args:
        second_moment: (in, in) symmetric positive semidefinite, at any positive scale; only one triangle is read; not
            modified. float64 is factorised in float64, anything else in float32.
        damping: Fraction of the mean diagonal added to the diagonal, >= 0.
        act_order: Process channels by descending diagonal (ties in original order).
        on_cholesky_failure: ``raise``, or ``retry`` with ten times the damping (recorded in the result).

    Returns:
        The factor.

    Raises:
        ConfigError: Wrong shape or option.
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
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None

    used = damping
    for retries in range(MAX_RETRIES + 1):
        upper = _inverse_factor(moment, dead, order, used)
        if upper is not None:
            return Factor(upper, order, dead, damping, act_order, used, retries)
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
    # One copy, already permuted and reversed: H backwards = L L^T gives H = R R^T with R = L backwards.
    backwards = torch.arange(len(moment) - 1, -1, -1, device=moment.device) if order is None else order.flip(0)
    flipped = moment[backwards[:, None], backwards]
    # A dead channel is uncoupled; any positive entry leaves the others alone. The mean keeps the scale.
    flipped.diagonal().add_(damping * mean).add_(dead[backwards] * mean)
    # H backwards = L L^T; a failure, or a pivot L_jj^2 that is rounding noise, means that the moment is singular
    lower, info = torch.linalg.cholesky_ex(flipped)
    noise = PIVOT_TOLERANCE * torch.finfo(moment.dtype).eps * flipped.diagonal()
    if int(info) != 0 or not bool((lower.diagonal().square() > noise).all()):
        return None
    del flipped
    return _invert_lower(lower).flip(0, 1)


def _invert_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves: n^3 / 3 operations, nearly all in matrix products.

    A triangular solve against the identity would ignore the zeros of the identity and cost three times as much.
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
