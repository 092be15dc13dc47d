"""Choose how far to shrink the range of a row so that clipping plus rounding costs least.

Objective, per row: the first minimum over p in {1, 0.99, ..., 0.21} of ``sum_j |q_j(p) - x_j|^2.4``, where both ends of
the range are multiplied by p.

Legend: r rows, c columns of one group, f factors tried at once.
Source: IST-DASLab/gptq@2d65066 and spcl/QuaRot@5008669 (``mse`` search: grid 100, maxshrink 0.8, norm 2.4).
Deviation: none in the result; rows and factors are evaluated together, in pieces bounded by ``CHUNK_ELEMENTS``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.affine import scale_from_range, to_codes, to_values
from ptqbench.numerics.grid_spec import GridSpec

STEPS = 80
STEP_DENOMINATOR = 100
EXPONENT = 2.4
CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}
"""Largest number of trial values alive at once: half a second-level cache on a CPU, some hundred MB on a GPU."""


def best_shrink(values: Tensor, xmin: Tensor, xmax: Tensor, spec: GridSpec) -> Tensor:
    """Return the shrink factor of every row.

    Args:
        values: (r, c), not modified.
        xmin: (r,) lower end of the unshrunk range, not modified.
        xmax: (r,) upper end, not modified.
        spec: The grid; its zero point is refitted for every factor (constant for symmetric schemes).

    Returns:
        (r,) factors in (0.2, 1]. All-zero rows keep 1, as does a row whose losses are all equal or infinite.
    """
    budget = CHUNK_ELEMENTS.get(values.device.type, 2**22)
    columns = values.shape[1]
    rows_at_once = max(1, min(values.shape[0], budget // columns))
    factors_at_once = max(1, min(STEPS, budget // (rows_at_once * columns)))
    # Rows are independent: as many at a time as the budget allows, and as many factors as fit beside them.
    pieces = zip(*(torch.split(t, rows_at_once) for t in (values, xmin, xmax)), strict=True)
    return torch.cat([_search_rows(x, low, high, spec, factors_at_once) for x, low, high in pieces])


def _search_rows(values: Tensor, xmin: Tensor, xmax: Tensor, spec: GridSpec, factors_at_once: int) -> Tensor:
    # p_i = (100 - i) / 100, divided in float64, so that every p is the nearest number to it in the dtype used.
    steps = STEP_DENOMINATOR - torch.arange(STEPS, dtype=torch.float64, device=values.device)
    factors = (steps / STEP_DENOMINATOR).to(values.dtype)
    best_loss = torch.full_like(xmin, torch.inf)
    best = torch.ones_like(xmin)
    for piece in torch.split(factors, factors_at_once):
        # The least loss of this piece, the first one where several are equal.
        loss = _losses(values, xmin, xmax, piece, spec)
        smallest, index = loss.min(dim=0)
        # Pieces come in falling order of p: only a smaller loss replaces what was found before.
        better = smallest < best_loss
        best = torch.where(better, piece[index], best)
        best_loss = torch.where(better, smallest, best_loss)
    return best


def _losses(values: Tensor, xmin: Tensor, xmax: Tensor, factors: Tensor, spec: GridSpec) -> Tensor:
    """Return the loss of every factor and row, (f, r)."""
    # scale and zero point (f, r) of the range (p xmin, p xmax)
    scale, zero_point = scale_from_range(factors[:, None] * xmin, factors[:, None] * xmax, spec)
    scale, zero_point = scale.unsqueeze(2), zero_point.unsqueeze(2)
    # q_j(p), (f, r, c)
    trial = to_values(to_codes(values, scale, zero_point, spec), scale, zero_point)
    # sum_j |q_j(p) - x_j|^2.4
    return trial.sub_(values).abs_().pow_(EXPONENT).sum(dim=2)
