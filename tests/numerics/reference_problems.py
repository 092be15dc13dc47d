"""Small synthetic problems and the worked examples that several test files share."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64

HESSIAN = torch.tensor(
    [[2.58, 0.4, 1.2, 1.12], [0.4, 2.32, 0.8, 0.6], [1.2, 0.8, 2.58, 0.4], [1.12, 0.6, 0.4, 2.18]], dtype=F64
)
WEIGHT = torch.tensor([[0.9, -0.3, 0.4, -0.8], [0.2, 0.7, -0.6, 0.1]], dtype=F64)
QUANTIZED_INPUTS = torch.tensor([[1, 0, 0.5, 0], [0.2, 1, 0, 0.3], [0, 0.4, 1, 0], [0.5, 0, 0.2, 1]], dtype=F64)
DRIFT = 0.1 * torch.tensor([[1, 0, 0, -1], [0, 1, -1, 0], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=F64)


def correlated_inputs(tokens: int, channels: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Return (tokens, channels) inputs with strong correlations and channel energies spread over two decades."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=gen, dtype=F64) / channels**0.5
    energy = 10 ** torch.linspace(-1, 1, channels, dtype=F64)[torch.randperm(channels, generator=gen)]
    x = torch.randn(tokens, channels, generator=gen, dtype=F64) @ (mix + 0.3 * torch.eye(channels, dtype=F64))
    return (x * energy).to(dtype)


def random_weight(rows: int, channels: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Return a (rows, channels) Gaussian weight."""
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
