"""Which group every input channel belongs to, and the fitted grids of those groups.

There are three kinds of group: a whole column range (``group_size`` None), consecutive original channels, and, for dynamic
groups under ``act_order``, consecutive channels *of one range* in processing order. With a single range the last kind is that of
the original algorithm. With several ranges it keeps a group from mixing precisions.

Legend: out = rows of the weight, in = input channels, G = number of groups in column order of their ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqbench.numerics.grid import Grid, LinearResult, code_dtype
from ptqbench.numerics.grid_spec import GridSpec


@dataclass(frozen=True)
class Group:
    """Input channels that share one scale per row.

    Attributes:
        spec: Their grid.
        channels: (size,) int64 original channels, in processing order.
        whole_range: Whether the group is a complete column range (``group_size`` None). Its grid is always fitted before any
            rounding, on the original weight.
    """

    spec: GridSpec
    channels: Tensor
    whole_range: bool


def plan_groups(grid: Grid, order: Tensor | None = None) -> list[Group]:
    """Cut every column range into its groups.

    Args:
        grid: A valid grid.
        order: (in,) processing order to form groups in; ``None`` for consecutive original channels. Not modified.

    Returns:
        The groups, range after range; the last of a range holds the remainder.
    """
    groups = []
    for part in grid:
        # The channels of the range, in the order of the model or in processing order, cut at every group_size.
        if order is None:
            channels = torch.arange(part.start, part.stop)
        else:
            channels = order[(order >= part.start) & (order < part.stop)].cpu()
        size = None if part.spec.untouched else part.spec.group_size
        pieces = (channels,) if size is None else torch.split(channels, size)
        groups += [Group(part.spec, piece, size is None) for piece in pieces]
    return groups


def group_index(groups: list[Group], in_features: int, device: torch.device) -> Tensor:
    """Return the (in,) int32 map from original channel to group."""
    index = torch.empty(in_features, dtype=torch.int32)
    for g, group in enumerate(groups):
        index[group.channels] = g
    return index.to(device)


def columns_of(weight: Tensor, group: Group) -> Tensor:
    """Return the columns of one group; a view where the channels are consecutive."""
    first, size = int(group.channels[0]), group.channels.numel()
    if int(group.channels[-1]) == first + size - 1 and bool((group.channels.diff() == 1).all()):
        return weight[:, first : first + size]
    return weight[:, group.channels.to(weight.device)]


def untouched_result(weight: Tensor, grid: Grid, dtype: torch.dtype) -> LinearResult:
    """Return the result of a grid without any quantized range: the weight itself, bit for bit."""
    groups = plan_groups(grid)
    scale = torch.ones(weight.shape[0], len(groups), dtype=dtype, device=weight.device)
    index = group_index(groups, weight.shape[1], weight.device)
    return LinearResult(None, scale, torch.zeros_like(scale), index, weight.clone())


def assemble(
    weight: Tensor, grid: Grid, groups: list[Group], scale: Tensor, zero_point: Tensor, codes: Tensor, values: Tensor
) -> LinearResult:
    """Build a ``LinearResult`` from the group-major tensors of a solver.

    Args:
        weight: (out, in) the caller's weight, for its dtype and device; not modified.
        grid: The grid.
        groups: Its plan.
        scale: (G, out).
        zero_point: (G, out).
        codes: (out, in) in original column order, any dtype.
        values: (out, in) in original column order, any dtype.

    Returns:
        The result with contiguous tensors, without damping entries.
    """
    return LinearResult(
        codes=codes.to(code_dtype(grid)).contiguous(),
        scale=scale.T.contiguous(),
        zero_point=zero_point.T.contiguous(),
        group_index=group_index(groups, weight.shape[1], weight.device),
        dequantized=values.to(weight.dtype).contiguous(),
    )


def split_rows(result: LinearResult, rows: list[int]) -> list[LinearResult]:
    """Split the result of stacked linears that share their input (q, k, v) into one result per linear.

    Args:
        result: Result for the weights stacked along out_features; not modified.
        rows: out_features of each linear, in stacking order; their sum must be the number of rows.

    Returns:
        One result per linear; the tensors are views.
    """

    def split(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(rows) if tensor is None else torch.split(tensor, rows)

    per_row = ("codes", "scale", "zero_point", "dequantized", "working")
    parts = zip(*(split(getattr(result, name)) for name in per_row), strict=True)
    return [replace(result, **dict(zip(per_row, part, strict=True))) for part in parts]
