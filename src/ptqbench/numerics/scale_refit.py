"""Refit of the row scales to the layer's output: the control for every null-space comparison.

Objective, independently for every output row i of the dequantized weight Q,

    min over alpha_i  || X (alpha_i Q_i - W_i)^T ||^2      =>      alpha_i = (W H Q^T)_ii / (Q H Q^T)_ii

Shapes: W = ``weight`` (m, n); Q = ``dequantized`` (m, n); H = ``second_moment`` (n, n), X^T X up to a positive factor;
alpha (m,). Codes and zero points stay; the scale of each row is multiplied by alpha_i (``null_space.apply_row_scale``).

Source: derived. This row scale is optimal under H, so it bounds what any refinement of row scales, such as Q2N (arXiv
2506.11044), can gain on the calibration data. It needs no damping: each problem is scalar, and only zero rows are singular.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype, require_finite


def refit_row_scale(weight: Tensor, dequantized: Tensor, second_moment: Tensor) -> Tensor:
    """Return the row scales that minimise the output error on the calibration inputs.

    Args:
        weight: (m, n) reference weight W, any float dtype, not modified.
        dequantized: (m, n) rounded weight Q in the same channel order, not modified.
        second_moment: (n, n) H of the same channels; any positive scaling gives the same result; not modified.

    Returns:
        (m,) alpha in float64 if an argument is float64, else float32. A row gets 1 where its output energy (Q H Q^T)_ii is
        zero or lost in the rounding errors of its summands, because its scale cannot be determined. alpha may be negative
        for a row whose rounding is worse than zero.

    Raises:
        ConfigError: The shapes do not fit.
        NumericalError: NaN or infinity in an argument or in the result.
    """
    rows, columns = weight.shape
    require_finite("weight", weight)
    require_finite("dequantized", dequantized, (rows, columns))
    require_finite("second_moment", second_moment, (columns, columns))
    dtype = compute_dtype(weight, dequantized, second_moment)
    reference, rounded, hessian = weight.to(dtype), dequantized.to(dtype), second_moment.to(dtype)
    # (Q H Q^T)_ii
    projected = rounded @ hessian
    energy = (projected * rounded).sum(dim=1)
    # (|Q| |H| |Q|^T)_ii bounds the summands of that energy; below eps times this bound it is noise of the cancellation.
    summands = ((rounded.abs() @ hessian.abs()) * rounded.abs()).sum(dim=1)
    determined = energy > torch.finfo(dtype).eps * summands
    # alpha_i = (W H Q^T)_ii / (Q H Q^T)_ii
    alpha = (projected * reference).sum(dim=1) / torch.where(determined, energy, torch.ones_like(energy))
    alpha = torch.where(determined, alpha, torch.ones_like(alpha))
    require_finite("row_scale", alpha)
    return alpha
