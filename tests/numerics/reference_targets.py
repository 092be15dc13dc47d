"""Slow, obviously correct references for output-aware targets, and the toys that share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqbench.numerics.targets import RmsScale, TargetMoments, corrected_target, token_weights

EPS = 1e-5
TOY_TARGETS: dict[tuple[RmsScale, float, float, float], list[list[float]]] = {
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

    def scales(self, rms_scale: RmsScale) -> tuple[Tensor, Tensor]:
        """Return the diagonals of D and D_q, written out token by token."""
        tokens = range(self.x.shape[0])
        hidden, hidden_q = self.r + self.x @ self.weight.T, self.rq + self.xq @ self.weight.T
        d = torch.stack([1 / torch.sqrt((hidden[t] ** 2).mean() + EPS) for t in tokens])
        dq = torch.stack([1 / torch.sqrt((hidden_q[t] ** 2).mean() + EPS) for t in tokens])
        return {"none": (torch.ones_like(d), torch.ones_like(d)), "common": (d, d), "split": (d, dq)}[rms_scale]

    def moments(self, rms_scale: RmsScale = "none", *, residual: bool = True, batch: int = 3) -> TargetMoments:
        """Stream the tokens through the accumulator in uneven batches."""
        n, m = self.x.shape[1], self.weight.shape[0]
        moments = TargetMoments(n, m if residual else None, dtype=torch.float64)
        for x, xq, r, rq in zip(*(part.split(batch) for part in (self.x, self.xq, self.r, self.rq)), strict=True):
            weights = token_weights(rms_scale, r + x @ self.weight.T, rq + xq @ self.weight.T, eps=EPS)
            moments.add(x, xq, r if residual else None, rq if residual else None, weights)
        return moments

    def target(self, rms_scale: RmsScale = "none", alpha: float = 1, beta: float = 1, damping: float = 0.01) -> Tensor:
        """Return the corrected target through the streaming path."""
        moments = self.moments(rms_scale).means()
        return corrected_target(self.weight, *moments, alpha=alpha, beta=beta, damping=damping)


def random_streams(tokens: int = 40, n: int = 7, m: int = 5, seed: int = 0, drift: float = 0.3) -> Streams:
    """Draw a correlated input, a residual and independent drifts of both."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    xq, rq = normal(tokens, n) @ normal(n, n), 2 * normal(tokens, m)
    return Streams(xq + drift * normal(tokens, n), xq, rq + drift * normal(tokens, m), rq, normal(m, n))


def raw_target(streams: Streams, rms_scale: RmsScale, damping: float, *, residual: bool = True) -> Tensor:
    """Solve the damped objective by least squares on the stacked raw rows: no moments, no strengths."""
    d, dq = (s[:, None] for s in streams.scales(rms_scale))
    left, goal = dq * streams.xq, d * (streams.x @ streams.weight.T)
    if residual:
        goal = goal + d * streams.r - dq * streams.rq
    n = left.shape[1]
    root = (damping * (left**2).sum() / n).sqrt()
    rows = torch.cat([left, root * torch.eye(n, dtype=left.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([goal, root * streams.weight.T])).solution.T


def asym_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point per row; the range contains 0."""
    high, low = weight.max(1).values.clamp(min=0), weight.min(1).values.clamp(max=0)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def round_to(column: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the codes of one channel."""
    return (torch.round(column / scale) + zero_point).clamp(0, 2**bits - 1)


def slow_gptq(weight: Tensor, second_moment: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round channel after channel, each time minimising over all later channels with a fresh matrix inverse."""
    rest, n, codes = weight.clone(), weight.shape[1], torch.zeros_like(weight)
    damped = second_moment + 0.01 * second_moment.diagonal().mean() * torch.eye(n, dtype=weight.dtype)
    for j in range(n):
        inverse = torch.linalg.inv(damped[j:, j:])
        codes[:, j] = round_to(rest[:, j], scale, zero_point, bits)
        error = rest[:, j] - scale * (codes[:, j] - zero_point)
        rest[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


def toy() -> Streams:
    """Return the four-token example of the golden numbers."""

    def matrix(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    xq = matrix([[1, 0, 0.5, 0], [0.2, 1, 0, 0.3], [0, 0.4, 1, 0], [0.5, 0, 0.2, 1]])
    r = matrix([[1, 0], [0, 1], [1, 1], [0, 0]])
    drift = 0.1 * matrix([[1, 0, 0, -1], [0, 1, -1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    rq = r + 0.1 * matrix([[1, -1], [0, 1], [-1, 0], [1, 1]])
    return Streams(xq + drift, xq, r, rq, matrix([[0.9, -0.3, 0.4, -0.8], [0.2, 0.7, -0.6, 0.1]]))
