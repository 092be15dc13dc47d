"""What is stored of a rounded linear, and the only way back from there to its weight.

    W_ij = row_scale_i * scale_ig * (codes_ij - zero_point_ig),   g = group_index_j

Legend: W (out, in); G groups of input channels. Absent row scales are 1, absent zero points 0.
Source: ``value = scale * (code - zero_point)`` is that of IST-DASLab/gptq@2d65066. In the formats of ``numerics/formats.py`` a code
is the value of the element itself (mxint: its integer), and the scale is what multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.null_space import apply_row_scale

ROW_SCALE_BITS = 16
TENSOR_SCALE_BITS = 32


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """Rebuild a weight.

    Args:
        tensors: Those of ``Stored.tensors``, not modified.

    Returns:
        (out, in) in the dtype of the scale.
    """
    group, scale, zero_point = tensors["group_index"].long(), tensors["scale"], tensors.get("zero_point")
    # scale * (codes - zero_point), then the row scale
    codes = tensors["codes"].to(scale.dtype)
    weight = scale[:, group] * (codes if zero_point is None else codes - zero_point[:, group])
    row_scale = tensors.get("row_scale")
    return weight if row_scale is None else apply_row_scale(row_scale, weight)


@dataclass(frozen=True)
class Stored:
    """The stored form of one linear, or of stacked ones.

    Attributes:
        specs: The grid of every group.
        codes: (out, in) in the smallest dtype that holds every code of the grid: uint8, int8 or int16, and float8_e4m3fn for the
            elements of floating-point formats. Columns of an untouched range inside a mixed grid hold 0 and mean nothing.
        scale: (out, G), groups of all column ranges in column order; float32, or float64 when the weight is.
        group_index: (in,) int32, the group of each input channel. It is not monotone when ``act_order`` forms its groups in
            processing order (``static_groups`` off).
        zero_point: (out, G), dtype of ``scale``; integers within the codes. They may lie outside the codes where the range need
            not contain zero, and between them where the zero point is ``real``. None where the format has none.
        tensor_scale: (ranges,), the number that all blocks of a column range share, where the format has one: NVFP4's G, or the
            scale of ``fp8``. It is part of ``scale`` already.
        row_scale: (out,) factors that could not be folded into ``scale``; None for 1.
    """

    specs: tuple[GridSpec, ...]
    codes: Tensor
    scale: Tensor
    group_index: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None
    row_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "specs")
        return {name: tensor for name, tensor in named if tensor is not None}

    def weight(self) -> Tensor:
        """Return the weight (out, in) in the dtype of the scale."""
        return decode(self.tensors())

    def bits(self) -> float:
        """Return the bits per weight: codes, scales, zero points, numbers per tensor, row scales."""
        rows, columns = self.codes.shape
        sizes = torch.bincount(self.group_index, minlength=len(self.specs)).tolist()
        # Of one row: codes, then scale and zero point of every group. Of all rows: what they share.
        row = sum(size * spec.bits + spec.bits_per_group for size, spec in zip(sizes, self.specs, strict=True))
        row += 0 if self.row_scale is None else ROW_SCALE_BITS
        shared = 0 if self.tensor_scale is None else TENSOR_SCALE_BITS * self.tensor_scale.numel()
        return float((rows * row + shared) / (rows * columns))

    def scaled(self, alpha: Tensor) -> Stored:
        """Multiply row i of the weight by ``alpha`` (out,), which is not modified.

        A scale of 16 bits per row and group takes up the factor. A scale of a format cannot: then rows get a scale of their own.
        """
        if all(spec.folds for spec in self.specs):
            return replace(self, scale=apply_row_scale(alpha, self.scale))
        earlier = torch.ones_like(alpha) if self.row_scale is None else self.row_scale
        return replace(self, row_scale=(alpha * earlier).to(self.scale.dtype))

    def split_rows(self, rows: Sequence[int]) -> list[Stored]:
        """Cut the form of stacked linears into those of the linears, of ``rows`` rows each; the tensors are views."""
        per_row = [name for name in ("codes", "scale", "zero_point", "row_scale") if getattr(self, name) is not None]
        parts = zip(*(torch.split(getattr(self, name), list(rows)) for name in per_row), strict=True)
        return [replace(self, **dict(zip(per_row, part, strict=True))) for part in parts]
