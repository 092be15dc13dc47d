"""Round every weight to the nearest value of its grid.

Objective: min over Q on the grid of ``|w - q|`` entry by entry. The grid is fitted to the weight, per row and group.

Legend: weight (out, in). Source: the baseline of IST-DASLab/gptq@2d65066. Deviation: there are groups, symmetric schemes and
mixed precision; that baseline has one asymmetric grid per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.affine import to_values
from ptqbench.numerics.checks import compute_dtype, require_finite
from ptqbench.numerics.grid import Grid, LinearResult, check_weight, code_dtype
from ptqbench.numerics.groups import assemble, columns_of, plan_groups, untouched_result
from ptqbench.numerics.levels import fit_levels


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
    check_weight(weight, grid, grid_weight)
    dtype = compute_dtype(weight)
    if all(part.spec.untouched for part in grid):
        return untouched_result(weight)
    source = weight if grid_weight is None else grid_weight
    groups = plan_groups(grid, source)
    scales, zeros = [], []
    codes = torch.zeros(weight.shape, dtype=code_dtype(grid), device=weight.device)
    values = weight.clone()
    for group in groups:
        # scale and zero_point of every row, fitted on the weight or on ``grid_weight``
        levels = fit_levels(columns_of(source, group).to(dtype), group.spec, group.number)
        scales.append(levels.scale)
        zeros.append(levels.zero_point)
        if group.spec.untouched:
            continue
        # codes = round(w / scale) + zero_point within the codes,   q = scale * (codes - zero_point)
        rounded = levels.codes(columns_of(weight, group).to(dtype))
        columns_of(codes, group).copy_(rounded)
        columns_of(values, group).copy_(to_values(rounded, levels.scale[:, None], levels.zero_point[:, None]))
    result = assemble(weight, grid, groups, torch.stack(scales), torch.stack(zeros), codes, values)
    require_finite("dequantized", result.dequantized)
    return result
