"""Round every weight to the nearest value of its grid.

Objective: min over Q on the grid of ``|w - q|`` entry by entry, the grid being fitted per row and group to the weight.

Legend: weight (out, in). Source: the baseline of IST-DASLab/gptq@2d65066. Deviation: groups, symmetric schemes and
mixed precision are honoured (that baseline knows asymmetric rows only).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.affine import to_codes, to_values
from ptqbench.numerics.checks import compute_dtype, require_finite, require_matrix, require_shape
from ptqbench.numerics.grid import Grid, LinearResult, validate_grid
from ptqbench.numerics.groups import assemble, columns_of, fit_groups, plan_groups, untouched_result


def round_to_nearest(weight: Tensor, grid: Grid, *, grid_weight: Tensor | None = None) -> LinearResult:
    """Quantize a weight by rounding to nearest.

    Args:
        weight: (out, in), any floating dtype, not modified; computed in float64 if float64, else in float32.
        grid: Column ranges covering all input channels. An untouched range keeps its values bit for bit.
        grid_weight: (out, in), fit the grids on this weight instead; not modified.

    Returns:
        The rounded weight with its codes.

    Raises:
        ConfigError: The grid does not cover the weight, or a shape is wrong.
        NumericalError: The weight holds NaN or infinity.
    """
    require_matrix("weight", weight)
    validate_grid(grid, weight.shape[1])
    require_finite("weight", weight)
    if grid_weight is not None:
        require_shape("grid_weight", grid_weight, weight.shape)
        require_finite("grid_weight", grid_weight)
    dtype = compute_dtype(weight)
    if all(part.spec.untouched for part in grid):
        return untouched_result(weight, grid, dtype)
    groups = plan_groups(grid)
    scale, zero_point = fit_groups(weight if grid_weight is None else grid_weight, groups, dtype)
    codes = torch.zeros(weight.shape, dtype=torch.int16, device=weight.device)
    values = weight.clone()
    for g, group in enumerate(groups):
        if group.spec.untouched:
            continue
        # codes = clamp(round(w / scale) + zero_point),   q = scale * (codes - zero_point)
        rounded = to_codes(columns_of(weight, group).to(dtype), scale[g, :, None], zero_point[g, :, None], group.spec)
        columns_of(codes, group).copy_(rounded)
        columns_of(values, group).copy_(to_values(rounded, scale[g, :, None], zero_point[g, :, None]))
    result = assemble(weight, grid, groups, scale, zero_point, codes, values)
    require_finite("dequantized", result.dequantized)
    return result
