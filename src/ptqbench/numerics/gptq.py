"""GPTQ: error-compensated rounding against the second moment of the inputs.

Objective: min over Q on a fixed grid of ||X W^T - X Q^T||_F^2 = trace((W - Q) S (W - Q)^T). One channel after the other is
rounded, each followed by the exact least-squares update of the remaining channels.

Legend: weight W (out, in); second_moment S (in, in), any positive multiple of X^T X (damping is relative).
Source: arXiv 2210.17323 section 3; IST-DASLab/gptq@2d65066. Deviations: see ``numerics/factorisation.py`` (mean
diagonal with dead channels, one Cholesky) and ``numerics/column_loop.py`` (``group_refit`` "fresh" is the default).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ptqbench.numerics.compensated import SolverOptions, solve_by_columns
from ptqbench.numerics.grid import Grid, LinearResult


def gptq(weight: Tensor, second_moment: Tensor, grid: Grid, **options: Unpack[SolverOptions]) -> LinearResult:
    """Quantize one weight, or the stacked weights of linears that share their input.

    Args:
        weight: (out, in), any floating dtype, not modified; rounded in float64 if float64, else in float32.
        second_moment: (in, in) uncentred, at any positive scale, not modified; factorised in its own precision.
        grid: Column ranges covering all input channels. An untouched range takes up error but is not rounded; a
            wholly untouched grid returns the weight bit for bit.
        options: See ``SolverOptions``.

    Returns:
        The rounded weight. Dead channels (zero diagonal) get the code of zero.

    Raises:
        ConfigError: A shape or an option is wrong.
        NumericalError: NaN or infinity in an input, or a moment that is singular after damping.
        UnsupportedError: The engine cannot serve.
    """
    return solve_by_columns(weight, second_moment, grid, **options)
