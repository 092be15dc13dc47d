"""Figures of merit of one rounded linear.

Legend: weight W and dequantized Q (out, in); second_moment S (in, in), undamped, at any positive scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_shape


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
    return _ratio((reference - dequantized.to(dtype)).square(), reference.square())


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
    return _ratio((error @ moment).mul_(error), (reference @ moment).mul_(reference))


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """Return the quotient of two sums taken in float64; rounding below zero counts as zero."""
    above = max(float(numerator.sum(dtype=torch.float64)), 0.0)
    below = max(float(denominator.sum(dtype=torch.float64)), 0.0)
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return above / below
