"""Which group every input channel belongs to, and the fitted grids of those groups.

There are three kinds of group: a whole column range (``group_size`` None), consecutive original channels, and, for dynamic
groups under ``act_order``, consecutive channels *of one range* in processing order. With a single range the last kind is that of
the original algorithm. With several ranges it keeps a group from mixing precisions.

Legend: out = rows of the weight, in = input channels, G = number of groups in column order of their ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqbench.numerics.checks import compute_dtype
from ptqbench.numerics.grid import Grid, LinearResult, code_dtype
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.microscaling import tensor_number
from ptqbench.numerics.stored import Stored


@dataclass(frozen=True)
class Group:
    """Input channels that share one scale per row.

    Attributes:
        spec: Their grid.
        channels: (size,) int64 original channels, in processing order.
        whole_range: Whether the group is a complete column range (``group_size`` None). Its grid is always fitted before any
            rounding, on the original weight.
        number: Scalar that all rows and groups of the range share (``microscaling.tensor_number``); None where there is none.
    """

    spec: GridSpec
    channels: Tensor
    whole_range: bool
    number: Tensor | None = None


def plan_groups(grid: Grid, source: Tensor, order: Tensor | None = None) -> list[Group]:
    """Cut every column range into its groups.

    Args:
        grid: A valid grid.
        source: (out, in) weight that the grids are fitted on, for what all rows of a range share; not modified.
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
        spec, number = part.spec, None
        if not (spec.integer or spec.untouched) and spec.own_format.per_tensor:
            peak = source[:, part.start : part.stop].to(compute_dtype(source)).abs().max()
            number = tensor_number(peak, spec.own_format, spec.largest_scale)
        size = None if spec.untouched else spec.block
        pieces = (channels,) if size is None else torch.split(channels, size)
        groups += [Group(spec, piece, size is None, number) for piece in pieces]
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


def untouched_result(weight: Tensor) -> LinearResult:
    """Return the result of a grid without any quantized range: the weight itself, bit for bit."""
    return LinearResult(None, weight.clone())


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
    # One number per range that has any; groups of a range share it.
    numbers = list({id(group.number): group.number for group in groups if group.number is not None}.values())
    has_zero_points = any(group.spec.integer for group in groups)
    stored = Stored(
        specs=tuple(group.spec for group in groups),
        codes=codes.to(code_dtype(grid)).contiguous(),
        scale=scale.T.contiguous(),
        zero_point=zero_point.T.contiguous() if has_zero_points else None,
        group_index=group_index(groups, weight.shape[1], weight.device),
        tensor_scale=torch.stack(numbers) if numbers else None,
    )
    return LinearResult(stored, values.to(weight.dtype).contiguous())


def split_rows(result: LinearResult, rows: list[int]) -> list[LinearResult]:
    """Split the result of stacked linears that share their input (q, k, v) into one result per linear.

    Args:
        result: Result for the weights stacked along out_features; not modified.
        rows: out_features of each linear, in stacking order; their sum must be the number of rows.

    Returns:
        One result per linear; the tensors are views.
    """
    stored = [None] * len(rows) if result.stored is None else result.stored.split_rows(rows)
    dequantized = torch.split(result.dequantized, rows)
    working = [None] * len(rows) if result.working is None else torch.split(result.working, rows)
    return [
        replace(result, stored=kept, dequantized=values, working=copy)
        for kept, values, copy in zip(stored, dequantized, working, strict=True)
    ]
