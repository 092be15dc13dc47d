"""The grids of one group of channels, one per row: how values are rounded to codes. The solvers know nothing else about a grid.

    value = scale * (code - zero_point)

A grid has a module that fits it and a class here that rounds: integers (``affine.py``), the formats of ``formats.py``
(``microscaling.py``, ``scale_search.py``), and columns that keep their values.

Legend: r rows, c channels of the group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ptqbench.numerics.affine import tie_shift, to_codes
from ptqbench.numerics.checks import compute_dtype
from ptqbench.numerics.grid import fit
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.microscaling import to_element
from ptqbench.numerics.scale_search import fit_scale


class Levels(Protocol):
    """A fitted group.

    Attributes:
        scale: (r,).
        zero_point: (r,), 0 where the grid has none.
    """

    scale: Tensor
    zero_point: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """Round ``values`` (r, c), which are not modified, to codes held in their dtype."""

    def round(self, w: Tensor, c: Tensor, q: Tensor) -> None:
        """Round one channel ``w`` (r,): write its code minus the zero point to ``c`` (r,) and its value to ``q`` (r,)."""


class IntegerLevels:
    """Consecutive integers from ``low`` to ``high``, minus the zero point: c = clamp(round_half_even(w / scale), low, high)."""

    def __init__(self, scale: Tensor, zero_point: Tensor, spec: GridSpec) -> None:
        low, high = spec.code_limits
        self.scale, self.zero_point, self._spec = scale, zero_point, spec
        # Limits of c: q = scale * clamp(round(w / scale), low - z, high - z) needs no shift by z.
        self.low, self.high = low - zero_point, high - zero_point
        self._shift, self._real = tie_shift(spec), spec.zero_point == "real"

    def codes(self, values: Tensor) -> Tensor:
        return to_codes(values, self.scale[:, None], self.zero_point[:, None], self._spec)

    def round(self, w: Tensor, c: Tensor, q: Tensor) -> None:
        # steps = w / scale; what misses a tie of sym_gptq by a rounding error is put on it
        torch.div(w, self.scale, out=c)
        if self._shift:
            c.add_(self._shift).sub_(self._shift)
        # c = round_half_even(steps); for a real z the code is the integer: c = round_half_even(steps + z) - z
        if self._real:
            c.add_(self.zero_point).round_().sub_(self.zero_point)
        else:
            c.round_()
        # c <- clamp(c, low - z, high - z),   q = scale * c
        torch.mul(c.clamp_(self.low, self.high), self.scale, out=q)


class FormatLevels:
    """The elements of a format: c = element(w / scale)."""

    def __init__(self, scale: Tensor, spec: GridSpec) -> None:
        self.scale, self.zero_point, self._elements = scale, torch.zeros_like(scale), spec.own_format.elements

    def codes(self, values: Tensor) -> Tensor:
        return to_element(values / self.scale[:, None], self._elements)

    def round(self, w: Tensor, c: Tensor, q: Tensor) -> None:
        # c = element(w / scale),   q = scale * c
        c.copy_(to_element(w / self.scale, self._elements))
        torch.mul(c, self.scale, out=q)


class Untouched:
    """Columns that keep their values; their codes are 0 and mean nothing."""

    def __init__(self, scale: Tensor) -> None:
        self.scale, self.zero_point = scale, torch.zeros_like(scale)

    def codes(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def round(self, w: Tensor, c: Tensor, q: Tensor) -> None:
        c.zero_()
        q.copy_(w)


def fit_levels(values: Tensor, spec: GridSpec, number: Tensor | None = None) -> Levels:
    """Fit one grid per row to the values of one group.

    Args:
        values: (r, c) floating point, finite, not modified; computed in float64 if float64, else in float32.
        spec: The grid.
        number: What the whole tensor shares, a scalar (``Group.number``); not modified.

    Returns:
        The fitted grids.

    Raises:
        ConfigError: ``values`` is not a non-empty floating-point matrix.
    """
    if spec.integer or spec.untouched:
        scale, zero_point = fit(values, spec)
        return Untouched(scale) if spec.untouched else IntegerLevels(scale, zero_point, spec)
    values = values.to(compute_dtype(values))
    return FormatLevels(fit_scale(values, spec, number), spec)
