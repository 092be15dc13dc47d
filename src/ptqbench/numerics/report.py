"""Figures of merit of one rounded linear.

Legend: weight W and dequantized Q (out, in); second_moment S (in, in), undamped, at any positive scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_shape
from ptqbench.numerics.second_moment import panels


def relative_weight_error(weight: Tensor, dequantized: Tensor) -> float:
    """Return ||W - Q||_F^2 / ||W||_F^2.

    Args:
        weight: (out, in), not modified.
        dequantized: (out, in), not modified.

    Returns:
        The ratio of squared norms; 0.0 where both vanish, infinity where only ||W|| does.
    """
    require_shape("dequantized", dequantized, weight.shape)
    dtype = compute_dtype(weight, dequantized)
    reference = weight.to(dtype)
    sums = ((t.square().sum(dtype=torch.float64)) for t in (reference - dequantized.to(dtype), reference))
    return quotient(*sums)


def relative_output_error(weight: Tensor, dequantized: Tensor, second_moment: Tensor) -> float:
    """Return trace((W - Q) S (W - Q)^T) / trace(W S W^T), the relative squared error of the linear's output.

    Args:
        weight: (out, in), not modified.
        dequantized: (out, in), not modified.
        second_moment: (in, in) symmetric and undamped, not modified.

    Returns:
        The ratio; 0.0 where both vanish (an all-zero weight reproduced, inputs without energy), infinity where only
        the denominator does.
    """
    require_shape("dequantized", dequantized, weight.shape)
    require_shape("second_moment", second_moment, (weight.shape[1], weight.shape[1]))
    dtype = compute_dtype(weight, dequantized, second_moment)
    reference, moment = weight.to(dtype), second_moment.to(dtype)
    error = reference - dequantized.to(dtype)
    return quotient(energy(error, moment), energy(reference, moment))


def energy(rows: Tensor, second_moment: Tensor) -> Tensor:
    """Return trace(X S X^T) from one triangle of the symmetric S: blocks off the diagonal count twice.

    Args:
        rows: X (rows, in) in the dtype of ``second_moment``, not modified.
        second_moment: S (in, in) symmetric, not modified.

    Returns:
        Scalar, float64, on the device of ``rows``.
    """
    total = rows.new_zeros((), dtype=torch.float64)
    for start, stop in panels(len(second_moment)):
        # X_p S_pp + 2 X_before S_before,p for the channels p of the panel
        here = rows[:, start:stop]
        product = here @ second_moment[start:stop, start:stop]
        if start:
            product.addmm_(rows[:, :start], second_moment[:start, start:stop], alpha=2)
        # sum over rows and panel of X_p times that
        total += product.mul_(here).sum(dtype=torch.float64)
    return total


def quotient(numerator: Tensor, denominator: Tensor) -> float:
    """Return the quotient of two scalars; rounding below zero counts as zero, 0 / 0 is 0 and x / 0 infinity."""
    above, below = max(float(numerator), 0.0), max(float(denominator), 0.0)
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return above / below
