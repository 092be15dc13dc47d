"""Grids of weights: which values a quantized weight may take, how they are fitted, and what they cost in bits.

    value = scale * (codes - zero_point)

A linear's grid is a sequence of column ranges, each with its own ``GridSpec`` (mixed precision). A range is one group, or is cut
into groups of ``group_size`` consecutive input channels. Every (row, group) has its own scale and zero point. Rounding is
half-to-even. The range of the values contains zero and the zero point is an integer, unless an asymmetric grid says otherwise.
The formats of ``numerics/formats.py`` are symmetric, and their blocks are the groups.
Without ``range_contains_zero`` it is the plain minimum and maximum (efsotr/NeUQI@2331daf), so that zero may be off the grid. A
real ``zero_point`` puts both ends of the range exactly on the grid instead of zero.

Legend: weight (out_features, in_features); values (r, c) = rows x columns of one group; scale, zero_point (r,).
Source: IST-DASLab/gptq@2d65066 (``asym``, ``sym_gptq``), spcl/QuaRot@5008669 (``sym_signed``).
Deviation: ``sym_gptq`` rows without a negative entry get a symmetric range unless ``sym_nonnegative_row`` is ``as_code``. The
original halves their scale but keeps the zero point, so that they saturate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.affine import scale_from_range, value_range
from ptqbench.numerics.checks import compute_dtype, require_finite, require_matrix
from ptqbench.numerics.clip_search import best_shrink
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.stored import TENSOR_SCALE_BITS, Stored


@dataclass(frozen=True)
class ColumnRange:
    """Input channels [start, stop) and their grid."""

    start: int
    stop: int
    spec: GridSpec


Grid = tuple[ColumnRange, ...]


@dataclass(frozen=True)
class LinearResult:
    """The rounded weight of one linear.

    Attributes:
        stored: Codes and scales; ``None`` when the whole grid is untouched.
        dequantized: (out, in) in the dtype of the weight.
        damping_used: Fraction of the mean diagonal that was added; 0.0 where no factorisation took place.
        damping_retries: How often the damping was raised before the factorisation succeeded.
        order: (in,) int64, ``order[p]`` is the channel that was rounded as number p; ``None`` for the order of the weight.
        working: (out, in) float32 or float64 in the column order of the weight; ``None`` unless the solver was asked for it
            (``keep_working``). Every column is that of the solver's copy of the weight when the channel's block began: it has
            the updates by all earlier blocks and none by its own. Dead channels hold 0.
    """

    stored: Stored | None
    dequantized: Tensor
    damping_used: float = 0.0
    damping_retries: int = 0
    order: Tensor | None = None
    working: Tensor | None = None


def uniform_grid(in_features: int, spec: GridSpec) -> Grid:
    """Return the grid that treats all ``in_features`` columns alike."""
    return (ColumnRange(0, in_features, spec),)


def validate_grid(grid: Grid, in_features: int) -> None:
    """Check that the ranges cover [0, in_features) in column order without gap or overlap.

    Args:
        grid: Column ranges.
        in_features: Number of input channels of the linear.

    Raises:
        ConfigError: There is a gap, an overlap, an empty range, or the wrong end.
    """
    position = 0
    for i, part in enumerate(grid):
        if part.start != position or part.stop <= part.start:
            raise ConfigError(
                f"grid: expected range {i} to start at column {position} and to be non-empty, "
                f"got [{part.start}, {part.stop})"
            )
        position = part.stop
    if position != in_features:
        raise ConfigError(f"grid: expected ranges covering {in_features} columns, got {position}")


def check_weight(weight: Tensor, grid: Grid, grid_weight: Tensor | None) -> None:
    """Check the arguments that every solver takes.

    Args:
        weight: (out, in), not modified.
        grid: Its grid.
        grid_weight: (out, in), the weight that the grid is fitted on instead, or ``None``; not modified.

    Raises:
        ConfigError: A shape is wrong or the grid does not cover the weight.
        NumericalError: A weight holds NaN or infinity.
    """
    require_matrix("weight", weight)
    validate_grid(grid, weight.shape[1])
    require_finite("weight", weight)
    if grid_weight is not None:
        require_finite("grid_weight", grid_weight, weight.shape)


def fit(values: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Fit one grid per row to the values of one group.

    Args:
        values: (r, c) floating point, finite, not modified; computed in float64 if float64, else in float32.
        spec: The grid. An untouched one yields scale 1 and zero point 0.

    Returns:
        ``scale`` (r,) > 0 and ``zero_point`` (r,). A row of zeros gets the range (-1, 1) (``sym_signed``: the floor 1e-5; a
        grid that is not ``plain``: (0, 1)), so that its scale is finite and it rounds to exact zeros. Where the range need
        not contain zero, a constant row gets the range from zero to the constant, which is then exact.

    Raises:
        ConfigError: ``values`` is not a non-empty floating-point matrix.
    """
    require_matrix("values", values)
    values = values.to(compute_dtype(values))
    if spec.untouched:
        one = values.new_ones(values.shape[0])
        return one, torch.zeros_like(one)
    # The range of every row, shrunk to a share of it if asked for, given or searched, gives scale and zero point.
    xmin, xmax = value_range(values, spec)
    if spec.clip_ratio != 1:
        xmin, xmax = xmin * spec.clip_ratio, xmax * spec.clip_ratio
    if spec.clip_search:
        shrink = best_shrink(values, xmin, xmax, spec)
        xmin, xmax = xmin * shrink, xmax * shrink
    return scale_from_range(xmin, xmax, spec)


def code_dtype(grid: Grid) -> torch.dtype:
    """Return the smallest dtype that holds every code of the grid (0 for untouched ranges).

    This is uint8, int8 or int16 for integers. The elements of every floating-point format are exact in float8_e4m3fn.
    """
    specs = [part.spec for part in grid if not part.spec.untouched]
    if any(not spec.integer and spec.own_format.elements.emin is not None for spec in specs):
        return torch.float8_e4m3fn
    limits = [spec.code_limits for spec in specs]
    low, high = min((low for low, _ in limits), default=0), max((high for _, high in limits), default=0)
    if low >= 0 and high <= 255:
        return torch.uint8
    return torch.int8 if low >= -128 and high <= 127 else torch.int16


def nominal_bits(grid: Grid) -> float:
    """Return the average bits per weight of the codes alone; untouched columns count 16."""
    return sum((part.stop - part.start) * part.spec.bits for part in grid) / grid[-1].stop


def effective_bits(grid: Grid, rows: int) -> float:
    """Return the true average bits per weight: codes plus what is stored per row and group, and per tensor.

    Untouched columns cost 16 bits and nothing else. The channel-to-group map of ``act_order`` with dynamic groups is not counted
    (one integer per input channel, shared by all rows).

    Args:
        grid: A valid grid.
        rows: Number of rows, which share the number per tensor that some formats have. It cancels elsewhere.

    Returns:
        Bits per weight.
    """
    # Bits of one row: codes, then a scale and perhaps a zero point per group.
    row, shared = 0, 0
    for part in grid:
        columns, spec = part.stop - part.start, part.spec
        groups = 1 if spec.block is None else -(-columns // spec.block)
        row += columns * spec.bits + groups * spec.bits_per_group
        if not (spec.integer or spec.untouched):
            shared += TENSOR_SCALE_BITS * spec.own_format.per_tensor
    return (rows * row + shared) / (rows * grid[-1].stop)
