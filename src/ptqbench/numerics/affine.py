"""The arithmetic of one quantization range: range -> step and offset, value -> code -> value.

    value = scale * (codes - zero_point),   codes = clamp(round_half_even(value / scale) + zero_point, low, high)

A ``real`` zero point is added before rounding: codes = clamp(round_half_even(value / scale + zero_point), low, high).

Legend: r rows, c columns of one group; ``scale`` and ``zero_point`` have one entry per row. Zero lies on every ``plain``
grid.

Ties of ``sym_gptq``: scale = 2 m / (2^bits - 1), m being the largest magnitude of a row. A weight of -m then lies exactly
half a step between two codes, and so do other simple fractions of m. Quotients in floating point miss the tie by rounding
errors of either sign. ``tie_shift`` therefore rounds them first to multiples of 2^(bits + 2) eps, which is at least twice the
largest such error. A tie then goes to the even code in every dtype, as in exact arithmetic.

Source: IST-DASLab/gptq@2d65066 (``asym``, ``sym_gptq``); spcl/QuaRot@5008669 (``sym_signed``);
efsotr/NeUQI@2331daf (plain minimum and maximum). Deviations: a row of one value is exact on a plain range, where NeUQI gives it
scale 1 and loses it; a step that would underflow to zero is raised to the smallest normal number, so that rows of subnormal
weights stay finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.grid_spec import GridSpec

SIGNED_FLOOR = 1e-5
"""Smallest range of ``sym_signed``: rows of smaller weights get this one (QuaRot)."""


def value_range(values: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Return the range of every row that the grid has to span; it contains zero unless the grid says otherwise.

    Args:
        values: (r, c), not modified.
        spec: The grid; symmetric schemes mirror the larger end.

    Returns:
        ``xmin`` and ``xmax``, each (r,), with xmin < xmax, and xmin <= 0 <= xmax if the range contains zero.
    """
    # min and max of the row, extended to zero where the range has to contain it or would be empty
    xmin, xmax = torch.aminmax(values, dim=1)
    extended = torch.full_like(xmin, True, dtype=torch.bool) if spec.range_contains_zero else xmin == xmax
    xmin, xmax = torch.where(extended, xmin.clamp(max=0), xmin), torch.where(extended, xmax.clamp(min=0), xmax)
    # symmetric: (-m, m) with m the larger end; ``as_code`` leaves (0, m) where no weight is negative
    if spec.scheme in ("sym_gptq", "sym_signed"):
        xmax = torch.maximum(-xmin, xmax)
        if spec.scheme == "sym_signed":
            xmax = xmax.clamp(min=SIGNED_FLOOR)
        keep_zero = spec.scheme == "sym_gptq" and spec.sym_nonnegative_row == "as_code"
        xmin = torch.where(xmin < 0, -xmax, xmin) if keep_zero else -xmax
    # A row of zeros gets (-1, 1), or (0, 1) on a grid that is not plain: zero is on the grid for any kind of zero point.
    empty = (xmin == 0) & (xmax == 0)
    return torch.where(empty, -1.0 if spec.plain else 0.0, xmin), torch.where(empty, 1.0, xmax)


def scale_from_range(xmin: Tensor, xmax: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Return ``scale`` and ``zero_point`` for a range (any shape, element by element).

    Args:
        xmin: Lower end, <= 0 if the range contains zero; not modified.
        xmax: Upper end, >= 0 likewise; not modified.
        spec: The grid.

    Returns:
        ``scale`` > 0 and ``zero_point``, integers held in the dtype of the range unless the grid wants real ones.
    """
    low, high = spec.code_limits
    if spec.scheme == "sym_signed":
        # scale = xmax / (2^(bits - 1) - 1),   zero_point = 0
        scale = xmax / high
        return scale, torch.zeros_like(scale)
    # scale = (xmax - xmin) / (2^bits - 1)
    scale = ((xmax - xmin) / (high - low)).clamp(min=torch.finfo(xmin.dtype).tiny)
    # zero_point = 2^(bits - 1) on symmetric grids, else -xmin / scale, rounded unless it is real
    if spec.scheme == "sym_gptq":
        return scale, torch.full_like(scale, float(2 ** (spec.bits - 1)))
    return scale, -xmin / scale if spec.zero_point == "real" else torch.round(-xmin / scale)


def tie_shift(spec: GridSpec) -> float:
    """Return the number that is added to value / scale and subtracted again, so that ties are exact; 0 changes nothing.

    A quotient of 2^(bits + 1) or more in magnitude gets an end code in any case. For smaller ones the sum lies between
    2^(bits + 2) and 2^(bits + 3), where floating-point numbers are 2^(bits + 2) eps apart, eps being that of the dtype.
    """
    return 6.0 * 2**spec.bits if spec.scheme == "sym_gptq" else 0.0


def to_codes(values: Tensor, scale: Tensor, zero_point: Tensor, spec: GridSpec) -> Tensor:
    """Round to codes held in the dtype of ``values``; ``scale`` and ``zero_point`` broadcast against ``values``."""
    low, high = spec.code_limits
    # steps = value / scale; what misses a tie of sym_gptq by a rounding error is put on it
    steps = values / scale
    if shift := tie_shift(spec):
        steps.add_(shift).sub_(shift)
    # codes = clamp(round(steps) + z, low, high); a real z is added before rounding
    if spec.zero_point == "real":
        return steps.add_(zero_point).round_().clamp_(low, high)
    return steps.round_().add_(zero_point).clamp_(low, high)


def to_values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values of floating-point ``codes``; ``scale`` and ``zero_point`` broadcast against them."""
    return scale * (codes - zero_point)
