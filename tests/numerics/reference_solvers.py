"""Slow, obviously correct counterparts of the solvers: numpy, one row and one channel at a time, no factorisation.

Nothing here is shared with the package: grids are anything with the fields below. Every solver works on the remaining
least-squares problem in its textbook form: rounding channel j changes the others by -e_j Hinv[j, rest] / Hinv[j, j] with
Hinv the inverse of the Hessian of the channels that are left, recomputed from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Spec(Protocol):
    """How a range of columns is rounded."""

    bits: int
    scheme: str
    group_size: int | None
    clip_search: bool
    sym_nonnegative_row: str
    range_contains_zero: bool
    zero_point: str


class Part(Protocol):
    """Columns [start, stop) and their grid."""

    start: int
    stop: int
    spec: Spec


def fit_row(row: np.ndarray, spec: Spec, shrink: float = 1.0) -> tuple[float, float]:
    """Return scale and zero point of one row, written out scheme by scheme."""
    low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
    b = spec.bits
    if not (spec.range_contains_zero and spec.zero_point == "integer"):
        if not spec.range_contains_zero and row.min() < row.max():
            low, high = float(row.min()), float(row.max())
        if low == high == 0.0:
            high = 1.0
        low, high = shrink * low, shrink * high
        scale = (high - low) / (2**b - 1)
        return scale, -low / scale if spec.zero_point == "real" else float(np.round(-low / scale))
    if spec.scheme == "sym_signed":
        return shrink * max(-low, high, 1e-5) / (2 ** (b - 1) - 1), 0.0
    if spec.scheme == "sym_gptq":
        largest = max(-low, high)
        low = 0.0 if low == 0.0 and spec.sym_nonnegative_row == "as_code" else -largest
        high = largest
    if low == 0.0 and high == 0.0:
        low, high = -1.0, 1.0
    low, high = shrink * low, shrink * high
    scale = (high - low) / (2**b - 1)
    return scale, float(2 ** (b - 1)) if spec.scheme == "sym_gptq" else float(np.round(-low / scale))


def round_value(x: float, scale: float, zero: float, spec: Spec) -> tuple[int, float]:
    """Return code and value of one number."""
    signed = spec.scheme == "sym_signed"
    low, high = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if signed else (0, 2**spec.bits - 1)
    steps = round(x / scale, 9) if spec.scheme == "sym_gptq" else x / scale  # a tie is met in spite of rounding errors
    level = np.round(steps + zero) if spec.zero_point == "real" else np.round(steps) + zero
    code = int(min(max(level, low), high))
    return code, scale * (code - zero)


def fit_with_search(row: np.ndarray, spec: Spec) -> tuple[float, float, float, float]:
    """Return p, scale, zero point and loss of the first best shrink factor of one row."""
    best = (1.0, *fit_row(row, spec), float("inf"))
    for i in range(80 if spec.clip_search else 1):
        p = 1 - i / 100
        scale, zero = fit_row(row, spec, p)
        loss = sum(abs(round_value(float(x), scale, zero, spec)[1] - float(x)) ** 2.4 for x in row)
        if loss < best[3]:
            best = (p, scale, zero, loss)
    return best


def fit_group(row: np.ndarray, spec: Spec) -> tuple[float, float]:
    """Return scale and zero point of one row, with the clip search where the grid asks for it."""
    return fit_with_search(row, spec)[1:3]


def rtn(weight: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and values of rounding to nearest."""
    codes, values = np.zeros(weight.shape, dtype=int), np.zeros(weight.shape)
    size = spec.group_size or weight.shape[1]
    for r, row in enumerate(weight):
        for start in range(0, len(row), size):
            scale, zero = fit_group(row[start : start + size], spec)
            for j in range(start, min(start + size, len(row))):
                codes[r, j], values[r, j] = round_value(row[j], scale, zero, spec)
    return codes, values


def gptq(
    weight: np.ndarray,
    moment: np.ndarray,
    grid: Sequence[Part],
    damping: float = 0.01,
    order: np.ndarray | None = None,
    static: bool = False,
    drift: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Round by explicit inverse downdates; dynamic groups see fully updated weights (``group_refit`` fresh).

    ``drift`` (n, n) in processing order is GPTAQ's strictly upper P: its row j is added times the current w_j.
    """
    n = weight.shape[1]
    h = moment.copy()
    dead = np.diag(h) == 0
    mean = np.diag(h).mean()
    h[np.diag_indices(n)] += damping * mean + dead * mean
    order = np.arange(n) if order is None else order
    groups = []  # (spec, channels, fitted before dead channels are zeroed)
    for part in grid:
        members = [j for j in (range(n) if static else order) if part.start <= j < part.stop]
        size = part.spec.group_size or len(members)
        whole = part.spec.group_size is None
        groups += [(part.spec, members[s : s + size], whole) for s in range(0, len(members), size)]
    group_of = {j: g for g, (_, members, _) in enumerate(groups) for j in members}

    codes, values = np.zeros(weight.shape, dtype=int), np.zeros(weight.shape)
    for r in range(len(weight)):
        w = np.where(dead, 0.0, weight[r])
        fitted = {}
        for g, (spec, members, whole) in enumerate(groups):
            if whole or static:
                fitted[g] = fit_group((weight[r] if whole else w)[sorted(members)], spec) if spec.bits < 16 else None
        for step, j in enumerate(order):
            rest = order[step:]
            spec, members, _ = groups[group_of[j]]
            if group_of[j] not in fitted:
                fitted[group_of[j]] = fit_group(w[members], spec)
            inverse = np.linalg.inv(h[np.ix_(rest, rest)])
            before = w[j]
            codes[r, j], values[r, j] = (0, w[j]) if spec.bits == 16 else round_value(w[j], *fitted[group_of[j]], spec)
            w[rest] -= (w[j] - values[r, j]) * inverse[0] / inverse[0, 0]
            if drift is not None:
                w[rest[1:]] += before * drift[step, step + 1 :]
    return codes, values


def block_loop(
    weight: np.ndarray, moment: np.ndarray, spec: Spec, block: int, drift: np.ndarray, damping: float = 0.01
) -> np.ndarray:
    """Return the values of the original code's loop, quirks included.

    Groups are refitted on the weight as the last finished block left it; the block buffer holds rounded values once
    the loop is through, and those are what ``drift`` multiplies beyond the block.
    """
    w, n = weight.copy(), weight.shape[1]
    u = np.linalg.cholesky(np.linalg.inv(moment + damping * np.diag(moment).mean() * np.eye(n))).T
    grids = [fit_group(row, spec) for row in weight]
    values = np.zeros_like(w)
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        w1, errors = w[:, i1:i2].copy(), np.zeros((len(w), i2 - i1))
        for i in range(i2 - i1):
            c = i1 + i
            if spec.group_size and c % spec.group_size == 0:
                grids = [fit_group(row, spec) for row in w[:, c : c + spec.group_size]]
            for r in range(len(w)):
                before = w1[r, i]
                values[r, c] = round_value(before, *grids[r], spec)[1]
                errors[r, i] = (before - values[r, c]) / u[c, c]
                w1[r, i:] += -errors[r, i] * u[c, c:i2] + before * drift[c, c:i2]
        w[:, i2:] += -errors @ u[i1:i2, i2:] + w1 @ drift[i1:i2, i2:]
    return values


def gptaq_drift(moment: np.ndarray, cross: np.ndarray, damping: float) -> np.ndarray:
    """Return P at strength 1 row by row: channel j's drift regressed on the channels after it.

    P_j = d_j restricted to the channels > j, times the inverse of the damped Hessian of those channels, where d_j is
    row j of (X - Xq)^T Xq.
    """
    n = len(moment)
    h = moment + damping * np.diag(moment).mean() * np.eye(n)
    p = np.zeros((n, n))
    for j in range(n - 1):
        p[j, j + 1 :] = cross.T[j, j + 1 :] @ np.linalg.inv(h[j + 1 :, j + 1 :])
    return p


def qronos(
    weight: np.ndarray, xq: np.ndarray, x: np.ndarray, spec: Spec, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Round by solving the two least-squares problems on the data, then GPTQ on the remaining channels.

    The moments are sums over the rows of ``xq`` and ``x`` (T, n).
    """
    n = weight.shape[1]
    lam = damping * (xq**2).sum() / n
    codes, values = np.zeros(weight.shape, dtype=int), np.zeros(weight.shape)
    for r, w in enumerate(weight):
        grid = fit_group(w, spec)
        target = x @ w
        first = np.linalg.lstsq(xq[:, :1], target - xq[:, 1:] @ w[1:], rcond=None)[0][0]
        codes[r, 0], values[r, 0] = round_value(first, *grid, spec)
        # min ||xq_2 v - (target - xq_1 q_1)||^2 + lam ||v - w_2||^2 as one stacked least-squares problem
        lhs = np.vstack([xq[:, 1:], np.sqrt(lam) * np.eye(n - 1)])
        rhs = np.concatenate([target - xq[:, 0] * values[r, 0], np.sqrt(lam) * w[1:]])
        v = np.linalg.lstsq(lhs, rhs, rcond=None)[0]
        h = xq[:, 1:].T @ xq[:, 1:] + lam * np.eye(n - 1)
        for j in range(1, n):
            inverse = np.linalg.inv(h[j - 1 :, j - 1 :])
            codes[r, j], values[r, j] = round_value(v[j - 1], *grid, spec)
            v[j - 1 :] -= (v[j - 1] - values[r, j]) * inverse[0] / inverse[0, 0]
    return codes, values
