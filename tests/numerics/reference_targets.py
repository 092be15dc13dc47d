"""Slow, obviously correct references for output-aware targets in numpy, and the toys that share them.

Nothing here is shared with the package; tensors are taken and given back so that tests need not convert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPS = 1e-5
TOY_TARGETS: dict[tuple[str, float, float, float], list[list[float]]] = {
    ("none", 1, 0, 0): [[1.028124, -0.359381, 0.483752, -0.920812], [0.194429, 0.847147, -0.568859, 0.046557]],
    ("none", 1, 0, 0.01): [[1.026001, -0.358899, 0.483448, -0.918486], [0.194149, 0.845297, -0.568633, 0.047748]],
    ("none", 1, 1, 0.01): [[0.886667, -0.316988, 0.564904, -0.964615], [0.277642, 0.773160, -0.539474, -0.098292]],
    ("none", 0.5, 0.25, 0.01): [[0.928167, -0.318972, 0.462088, -0.870775], [0.217948, 0.754614, -0.577027, 0.037364]],
    ("common", 1, 1, 0.01): [[0.882243, -0.309021, 0.551105, -0.960854], [0.253188, 0.768075, -0.539718, -0.087939]],
    ("split", 1, 1, 0.01): [[0.892773, -0.329710, 0.411812, -0.874980], [0.270801, 0.721941, -0.605406, -0.089781]],
}
"""Golden targets of ``toy`` by (rms_scale, alpha, beta, damping)."""


@dataclass(frozen=True)
class Streams:
    """Raw token matrices of one linear in both streams; weight is (m, n)."""

    x: Tensor
    xq: Tensor
    r: Tensor
    rq: Tensor
    weight: Tensor

    def scales(self, rms_scale: str) -> tuple[Tensor, Tensor]:
        """Return the diagonals of D and D_q, written out token by token."""
        d, dq = (
            torch.tensor([1 / np.sqrt(np.mean((r[t] + weight @ x[t]) ** 2) + EPS) for t in range(len(x))])
            for x, r, weight in (arrays(self.x, self.r, self.weight), arrays(self.xq, self.rq, self.weight))
        )
        ones = torch.ones_like(d)
        return {"none": (ones, ones), "common": (d, d), "split": (d, dq)}[rms_scale]


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def random_streams(tokens: int = 40, n: int = 7, m: int = 5, seed: int = 0, drift: float = 0.3) -> Streams:
    """Draw a correlated input, a residual and independent drifts of both."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    xq, rq = normal(tokens, n) @ normal(n, n), 2 * normal(tokens, m)
    return Streams(xq + drift * normal(tokens, n), xq, rq + drift * normal(tokens, m), rq, normal(m, n))


def raw_target(streams: Streams, rms_scale: str, damping: float, *, residual: bool = True) -> Tensor:
    """Solve the damped objective by least squares on the stacked raw rows: no moments, no strengths."""
    d, dq = (s[:, None] for s in arrays(*streams.scales(rms_scale)))
    x, xq, r, rq, weight = arrays(streams.x, streams.xq, streams.r, streams.rq, streams.weight)
    left, goal = dq * xq, d * (x @ weight.T)
    if residual:
        goal = goal + d * r - dq * rq
    n = left.shape[1]
    root = np.sqrt(damping * (left**2).sum() / n)
    rows = np.vstack([left, root * np.eye(n)])
    return torch.from_numpy(np.linalg.lstsq(rows, np.vstack([goal, root * weight.T]), rcond=None)[0].T)


def asym_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point per row; the range contains 0."""
    rows = weight.double().tolist()
    scale = [(max(0.0, *row) - min(0.0, *row)) / (2**bits - 1) for row in rows]
    zero_point = [round(-min(0.0, *row) / s) for row, s in zip(rows, scale, strict=True)]
    return torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point, dtype=torch.float64)


def slow_gptq(weight: Tensor, second_moment: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return codes: channel after channel, each time minimising over all later ones with a fresh matrix inverse."""
    rest, moment, step, zero = arrays(weight, second_moment, scale, zero_point)
    rest, n, codes = rest.copy(), weight.shape[1], np.zeros(weight.shape)
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(n)
    for j in range(n):
        inverse = np.linalg.inv(damped[j:, j:])
        codes[:, j] = np.clip(np.round(rest[:, j] / step) + zero, 0, 2**bits - 1)
        error = rest[:, j] - step * (codes[:, j] - zero)
        rest[:, j:] -= np.outer(error / inverse[0, 0], inverse[0])
    return torch.from_numpy(codes)


def toy() -> Streams:
    """Return the four-token example of the golden numbers."""

    def matrix(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    xq = matrix([[1, 0, 0.5, 0], [0.2, 1, 0, 0.3], [0, 0.4, 1, 0], [0.5, 0, 0.2, 1]])
    r = matrix([[1, 0], [0, 1], [1, 1], [0, 0]])
    drift = 0.1 * matrix([[1, 0, 0, -1], [0, 1, -1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    rq = r + 0.1 * matrix([[1, -1], [0, 1], [-1, 0], [1, 1]])
    return Streams(xq + drift, xq, r, rq, matrix([[0.9, -0.3, 0.4, -0.8], [0.2, 0.7, -0.6, 0.1]]))
