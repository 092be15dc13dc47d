"""AWQ: the loss of a scale, and the thresholds at which the weights of a group are clipped.

    loss of a scale        tr(D S D^T),                   D = Q - W
    error of a clip        e = D_g S_gg D_g^T             per row and group, D = Q(clamp(W, -pM, pM)) - W, M = max abs(W_g)
    p = 1, 1 - 1/steps, .. (as long as at most ``shrink`` is taken away); the first least error wins

Legend: W (m, n) scaled weight; Q its rounding on the grid of the cell; S (n, n) second moment of its inputs, S_gg (G, g, g) its
blocks on the diagonal, one for every group of g channels. A last group with fewer channels is padded with zeros.
Source: arXiv 2306.00978, code mit-han-lab/llm-awq@d6e797a, which computes both from tokens; the moments give the same choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def moment_loss(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs, mean over tokens and sum over outputs: tr(D S D^T), in float64.

    Args:
        weight: W (m, n), not modified.
        rounded: Q (m, n), not modified.
        moment: S (n, n) float64, not modified.
    """
    difference = rounded.double() - weight.double()
    return float(((difference @ moment) * difference).sum())


def grouped(columns: Tensor, group_size: int) -> Tensor:
    """Cut the last axis into groups: (.., n) -> (.., G, g)."""
    padded: Tensor = pad(columns, (0, -columns.shape[-1] % group_size))
    return padded.reshape(*columns.shape[:-1], -1, group_size)


def group_moments(inputs: Tensor, group_size: int) -> Tensor:
    """Sum x_g^T x_g over tokens for every group of channels.

    Args:
        inputs: (T, n), not modified.
        group_size: g.

    Returns:
        (G, g, g) float64.
    """
    groups = grouped(inputs.double(), group_size).transpose(0, 1)
    return groups.mT @ groups


def clip_thresholds(
    weight: Tensor, moments: Tensor, round_: Callable[[Tensor], Tensor], steps: int, shrink: float
) -> Tensor:
    """Find the threshold of least output error for every row and group.

    Args:
        weight: W (m, n) float32 or float64, not modified.
        moments: S_gg (G, g, g) float64, not modified; a common factor does not matter.
        round_: Rounds a weight (m, n) on the grid of the cell.
        steps: Candidates are 1/steps apart.
        shrink: Share of the range that is taken away at most, not reached itself.

    Returns:
        (m, G) in the dtype of the weight.
    """
    size = moments.shape[-1]
    largest = grouped(weight.abs(), size).amax(-1)
    best = torch.full_like(largest, torch.inf, dtype=torch.float64)
    thresholds = largest.clone()
    for i in range(int(shrink * steps)):
        # e = D_g S_gg D_g^T of every row and group at this share of its range.
        candidate = largest * (1 - i / steps)
        difference = grouped((round_(clamped(weight, candidate, size)) - weight).double(), size).transpose(0, 1)
        error = ((difference @ moments) * difference).sum(-1).T
        better = error < best
        best, thresholds = torch.where(better, error, best), torch.where(better, candidate, thresholds)
    return thresholds


def clamped(weight: Tensor, thresholds: Tensor, group_size: int) -> Tensor:
    """Clamp every group of a row to its threshold.

    Args:
        weight: (m, n), not modified.
        thresholds: (m, G), not negative, not modified.
        group_size: g.

    Returns:
        (m, n).
    """
    limit = thresholds.to(weight.dtype).repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    return torch.minimum(torch.maximum(weight, -limit), limit)
