"""Descent on matrices with orthonormal columns: the Cayley step with momentum (SpinQuant's rotations).

Objective: min f(X) over X with X^T X = I, given gradients G of f as if X were free. One step from X with velocity V:

    V <- momentum V - G
    W  = M - M^T,   M = V X^T - X (X^T V X^T) / 2                skew; X moves along W X, a tangent of the constraint
    a  = min(learning_rate, 1 / ||W||_1)                          ||.||_1: largest absolute column sum
    X <- (I - a W / 2)^-1 (I + a W / 2) X                         the Cayley transform of a skew matrix is orthogonal
    V <- W X_before

Shapes: X, V, G (n, p), p <= n, float64; W (n, n); a rotation has p = n.

Source: arXiv 2405.16406 (SpinQuant), code facebookresearch/SpinQuant@8f47aa3, whose optimiser is that of arXiv 2002.01113.
Deviations: the linear system is solved. The code iterates Y = X + a W (X + Y) / 2 five times; to stay near the constraint it
renormalises rows before every step and replaces X by a QR factor at random, in one step of a hundred. Here X meets the
constraint up to rounding, and nothing is drawn. Otherwise steps are those of the code, except that its step of 1e8 at W = 0 is
``learning_rate`` here (X does not move either way).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.checks import require_finite, require_matrix, require_shape


class CayleyStep(NamedTuple):
    """Where a step led.

    Attributes:
        point: (n, p) float64 with orthonormal columns.
        velocity: (n, p) float64, a tangent at the point before the step.
        length: The step a that was taken, at most the learning rate.
    """

    point: Tensor
    velocity: Tensor
    length: float


def skew_direction(point: Tensor, velocity: Tensor) -> Tensor:
    """Return W, the skew matrix whose flow ``W X`` is the tangent part of a velocity.

    Args:
        point: (n, p) float64 X with orthonormal columns, not modified.
        velocity: (n, p) float64 V, not modified.

    Returns:
        (n, n), exactly skew. It is zero for a velocity X S with symmetric S, which no motion on the constraint can follow.
    """
    # M = V X^T - X (X^T V X^T) / 2,   W = M - M^T
    moved = velocity @ point.mT
    moved = moved - point @ (point.mT @ moved) / 2
    return moved - moved.mT


def cayley_transform(point: Tensor, skew: Tensor, length: float) -> Tensor:
    """Return ``(I - a W / 2)^-1 (I + a W / 2) X``.

    Args:
        point: (n, p) float64, not modified.
        skew: (n, n) float64 W, not modified.
        length: a; the inverse motion is that of -a.

    Returns:
        (n, p) with the inner products of the columns of ``point``, up to rounding.
    """
    # solve (I - a W / 2) Y = (I + a W / 2) X
    half = length / 2 * skew
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    moved: Tensor = torch.linalg.solve(identity - half, point + half @ point)
    return moved


def cayley_step(
    point: Tensor, gradient: Tensor, velocity: Tensor | None = None, *, learning_rate: float, momentum: float = 0.0
) -> CayleyStep:
    """Take one step of descent.

    Args:
        point: (n, p) float64 with orthonormal columns, p <= n, not modified.
        gradient: (n, p) of the objective at the point, any float dtype, not modified.
        velocity: (n, p) of the step before, not modified; None for zero.
        learning_rate: Longest step, > 0.
        momentum: Share of the velocity that is kept, in [0, 1).

    Returns:
        The new point and velocity.

    Raises:
        ConfigError: A shape or an option is wrong.
        NumericalError: The gradient holds NaN or infinity.
    """
    require_matrix("point", point)
    require_shape("gradient", gradient, point.shape)
    if point.shape[0] < point.shape[1]:
        raise ConfigError(f"point: expected at least as many rows as columns, got {list(point.shape)}")
    if not (0 <= momentum < 1 and 0 < learning_rate < math.inf):
        raise ConfigError(f"expected a positive learning_rate and momentum in [0, 1), got {learning_rate}, {momentum}")
    require_finite("gradient", gradient)
    before = point.double()
    # V <- momentum V - G
    wanted = -gradient.to(before) if velocity is None else momentum * velocity.to(before) - gradient.to(before)
    skew = skew_direction(before, wanted)
    # a = min(learning_rate, 1 / ||W||_1)
    size = float(skew.abs().sum(dim=0).max())
    length = min(learning_rate, 1 / size) if size > 0 else learning_rate
    # X <- Cayley(a W) X,   V <- W X_before
    return CayleyStep(cayley_transform(before, skew, length), skew @ before, length)


def cosine_rate(step: int, steps: int, learning_rate: float) -> float:
    """Return the learning rate of a step: half a cosine from ``learning_rate`` down towards 0.

    Args:
        step: From 0.
        steps: Number of steps in all, >= 1.
        learning_rate: That of step 0.

    Returns:
        A positive rate.
    """
    return learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
