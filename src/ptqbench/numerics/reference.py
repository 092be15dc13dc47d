"""Every solver, target and refinement on a page: plain lines in the order of the papers, in float64, for reading.

The modules beside this one compute the same with blocks, panels, kernels and shared factorisations, in float32 or float64;
``tests/numerics/test_reference.py`` holds them to this file. Nothing in a run imports it.

    W (m, n)    weight: m outputs, n input channels          Q (m, n)    rounded weight, every entry on the grid of its row
    X, Xq (T, n)  inputs of T tokens: full-precision model, partly quantized model
    R, Rq (T, m)  the tensors that the linear's output is added to, in the same two models
    H = Xq^T Xq (n, n) second moment          C = Xq^T (X - Xq) (n, n) cross moment with the drift

A channel is dead where H_jj = 0: no input ever reached it. Everything is float64; no argument is modified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ptqbench.numerics.reference_formats import FORMATS as FORMATS
from ptqbench.numerics.reference_formats import FloatGrid as FloatGrid
from ptqbench.numerics.reference_formats import fit_format as fit_format
from ptqbench.numerics.reference_formats import minifloat as minifloat

# ---------------------------------------------------------------------------------------------------------------- grids


class Grid(NamedTuple):
    """One integer grid per row, value = scale * (code - zero_point): scale and zero_point (m, 1), codes low..high."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    tie_unit: float = 0.0

    def codes(self, values: Tensor) -> Tensor:
        """Return clamp(round_half_even(value / scale) + zero_point) of (m, c) values."""
        steps = values / self.scale
        if self.tie_unit:  # what misses a half step by a rounding error is put on it
            steps = torch.round(steps / self.tie_unit) * self.tie_unit
        return (torch.round(steps) + self.zero_point).clamp(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """Return the (m, c) values of codes."""
        return self.scale * (codes - self.zero_point)


def fit_grid(values: Tensor, bits: int, scheme: str = "asym", clip_search: bool = False) -> Grid:
    """Fit one grid to every row of (m, c) values (IST-DASLab/gptq quant.py; spcl/QuaRot quant_utils.py for ``sym_signed``)."""
    # The range of a row contains zero; symmetric grids mirror its larger end.
    xmin, xmax = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    if scheme != "asym":
        xmax = torch.maximum(-xmin, xmax)
        xmin = -xmax
    if scheme == "sym_signed":
        xmax = xmax.clamp(min=1e-5)
    empty = (xmin == 0) & (xmax == 0)
    xmin, xmax = torch.where(empty, -1.0, xmin), torch.where(empty, 1.0, xmax)

    def grid(p: Tensor) -> Grid:
        if scheme == "sym_signed":  # scale = max|w| / (2^(b-1) - 1), codes -2^(b-1) .. 2^(b-1) - 1
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            return Grid(p * xmax / high, torch.zeros_like(xmax), low, high)
        levels = 2**bits - 1
        scale = (p * xmax - p * xmin) / levels  # scale = (xmax - xmin) / (2^b - 1), codes 0 .. 2^b - 1
        if scheme == "sym_gptq":  # -max|w| lies half a step between two codes: ties count as ties
            middle = torch.full_like(scale, 2 ** (bits - 1))
            return Grid(scale, middle, 0, levels, tie_unit=2 ** (bits + 2) * torch.finfo(torch.float64).eps)
        return Grid(scale, torch.round(-p * xmin / scale), 0, levels)

    # Clip search: the first p of 1, 0.99, ..., 0.21 with the least sum_j |q_j - w_j|^2.4, row by row.
    best_p, best_loss = torch.ones_like(xmax), torch.full_like(xmax, torch.inf)
    for percent in range(100, 20, -1) if clip_search else ():
        p = torch.full_like(xmax, percent / 100)
        loss = (grid(p).values(grid(p).codes(values)) - values).abs().pow(2.4).sum(1, keepdim=True)
        best_p, best_loss = torch.where(loss < best_loss, p, best_p), torch.minimum(loss, best_loss)
    return grid(best_p)


class Options(NamedTuple):
    """The grid and the order of rounding; ``group_size`` consecutive channels share a scale per row (None: all).

    A ``format`` has blocks of its own; then bits, scheme and ``clip_search`` say nothing.
    """

    bits: int
    scheme: str = "asym"
    clip_search: bool = False
    group_size: int | None = None
    act_order: bool = False
    static_groups: bool = False
    format: str | None = None

    @property
    def block(self) -> int | None:
        """Channels per scale; None for all."""
        return self.group_size if self.format is None else FORMATS[self.format][0]

    def fit(self, values: Tensor, W: Tensor) -> Grid | FloatGrid:
        """Fit the grid of these options to some columns (m, c) of the weight W."""
        if self.format is not None:
            return fit_format(values, W, self.format)
        return fit_grid(values, self.bits, self.scheme, self.clip_search)


class Rounded(NamedTuple):
    """Codes and values, each (m, n) in the order of the weight."""

    codes: Tensor
    values: Tensor


# --------------------------------------------------------------------------------------------------------------- scales


def smoothing_scale(X: Tensor, W: Tensor, alpha: float, floor: float = 1e-5) -> Tensor:
    """SmoothQuant: s (n,), for inputs X / s and the weight W diag(s) (arXiv 2211.10438); W: all rows that read X, stacked."""
    xmax, wmax = X.abs().amax(0), W.abs().amax(0)
    s: Tensor = xmax**alpha / wmax.clamp(min=floor) ** (1 - alpha)
    return s.clamp(min=floor)


def awq_search(
    W: Tensor, X: Tensor, round_: Callable[[Tensor], Tensor], output: Callable[[Tensor], Tensor], n_grid: int = 20
) -> tuple[int, Tensor]:
    """AWQ: the exponent i / n_grid and the scale s (n,) with the least error of ``output(W)`` (arXiv 2306.00978)."""
    best, least = (0, torch.ones_like(X[0])), torch.inf
    for i in range(n_grid):
        # s = u^r with u the mean magnitude of a channel; normalised
        s = (X.abs().mean(0) ** (i / n_grid)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = float((output(round_(W * s) / s) - output(W)).square().mean())
        if loss < least:
            best, least = (i, s), loss
    return best


def awq_clip(
    W: Tensor, X: Tensor, round_: Callable[[Tensor], Tensor], group: int, steps: int = 20, shrink: float = 0.5
) -> Tensor:
    """AWQ: thresholds (m, groups) at which the scaled weight W is clipped; X are the inputs divided by the scale."""
    pieces = list(zip(W.split(group, 1), X.split(group, 1), strict=True))
    M = torch.stack([w.abs().amax(1) for w, _ in pieces], 1)
    best, limits = torch.full_like(M, torch.inf), M.clone()
    for i in range(int(shrink * steps)):
        p = 1 - i / steps
        clamped = torch.cat(
            [w.clamp(-p * m[:, None], p * m[:, None]) for (w, _), m in zip(pieces, M.T, strict=True)], 1
        )
        errors = zip((round_(clamped) - W).split(group, 1), (x for _, x in pieces), strict=True)
        e = torch.stack([(x @ d.T).square().mean(0) for d, x in errors], 1)
        best, limits = torch.where(e < best, e, best), torch.where(e < best, p * M, limits)
    return limits


# -------------------------------------------------------------------------------------------------------------- solvers


def rtn(W: Tensor, options: Options) -> Rounded:
    """Round to nearest: min over Q on the grid of ``|w - q|``, entry by entry."""
    pieces = W.split(options.block or W.shape[1], dim=1)
    grids = [options.fit(piece, W) for piece in pieces]
    codes = [grid.codes(piece) for grid, piece in zip(grids, pieces, strict=True)]
    values = [grid.values(code) for grid, code in zip(grids, codes, strict=True)]
    return Rounded(torch.cat(codes, 1), torch.cat(values, 1))


def gptq(W: Tensor, H: Tensor, options: Options, damping: float = 0.01) -> Rounded:
    """GPTQ: min over Q of ||X (W - Q)^T||^2, channel by channel (arXiv 2210.17323, algorithm 1; gptq.py of the code)."""
    order = processing_order(H, options)
    U = inverse_factor(H, damping, order)
    work = without_dead(W, H)[:, order]
    found = round_columns(work, U, grids_of(W, work, order, options))
    return in_model_order(found, order)


def gptaq(W: Tensor, H: Tensor, C: Tensor, options: Options, damping: float = 0.01, strength: float = 0.25) -> Rounded:
    """GPTAQ: min over Q of ||Xq Q^T - X W^T||^2; later channels absorb each channel's drift (arXiv 2504.02692)."""
    order = processing_order(H, options)
    U = inverse_factor(H, damping, order)
    # D = (X - Xq)^T Xq = C^T: how the drift of channel j projects on every channel. Dead channels have none.
    D = live_part(C, H)[order][:, order].T
    # P_j: the least-squares image of that drift on the channels after j. strength is 0.25 in the code, absent in the paper.
    P = strength * (D @ U.T).triu(diagonal=1) @ U
    work = without_dead(W, H)[:, order]
    found = round_columns(work, U, grids_of(W, work, order, options), P)
    return in_model_order(found, order)


def qronos(W: Tensor, H: Tensor, C: Tensor, options: Options, damping: float = 0.01) -> Rounded:
    """Qronos: correct the whole drift with the first channel, then GPTQ on the rest (arXiv 2505.11695)."""
    order = processing_order(H, options)
    U = inverse_factor(H, damping, order)
    work = without_dead(W, H)[:, order]
    grid_at = grids_of(W, work, order, options)
    H1, C1 = H[order][:, order], live_part(C, H)[order][:, order]
    target = work @ (H1 + C1).T  # row i: Xq^T X w_i, what the outputs should project to
    # q_1 = round(((Xq^T X w)_1 - H_12 w_2) / H_11): the best first weight while the others stay at W.
    best = (target[:, 0] - work[:, 1:] @ H1[1:, 0]) / H1[0, 0] if H1[0, 0] > 0 else work[:, 0]
    grid = grid_at(0, work)
    first = grid.values(grid.codes(best[:, None]))
    # w_2 <- (H_22 + L I)^-1 ((Xq^T X w)_2 + L w_2 - H_21 q_1): the best others, pulled towards W by the damping L.
    L = damping * H.diagonal().mean() * torch.eye(len(H) - 1, dtype=H.dtype)
    L = L + torch.diag((H1.diagonal()[1:] == 0).double())  # any positive number for a dead channel
    rest = torch.linalg.solve(H1[1:, 1:] + L, (target[:, 1:] + work[:, 1:] @ L - first * H1[1:, 0]).T).T
    # GPTQ on the others; q_1 is on its grid already and passes on no error.
    return in_model_order(round_columns(torch.cat([first, rest], 1), U, grid_at), order)


def round_columns(
    W: Tensor, U: Tensor, grid_at: Callable[[int, Tensor], Grid | FloatGrid], P: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the loop of GPTQ on weights in processing order; with P that of GPTAQ."""
    w, codes, values = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for j in range(W.shape[1]):
        grid = grid_at(j, w)
        # q_j = round(w_j)
        codes[:, j : j + 1] = grid.codes(w[:, j : j + 1])
        values[:, j : j + 1] = grid.values(codes[:, j : j + 1])
        # e_j = (w_j - q_j) / U_jj
        e = (w[:, j] - values[:, j]) / U[j, j]
        # w_l <- w_l - e_j U_jl for all l > j: the least-squares answer of the channels that are left
        w[:, j + 1 :] -= torch.outer(e, U[j, j + 1 :])
        # GPTAQ: w_l <- w_l + w_j P_jl, with w_j before rounding
        if P is not None:
            w[:, j + 1 :] += torch.outer(w[:, j], P[j, j + 1 :])
    return codes, values


def inverse_factor(H: Tensor, damping: float, order: Tensor) -> Tensor:
    """Return the upper triangular U with (H + L I)^-1 = U^T U, L = damping * mean diag H (2210.17323, step 3)."""
    damped = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    damped = damped + torch.diag((H.diagonal() == 0).double())  # any positive number for a dead channel
    inverse = torch.linalg.inv(damped[order][:, order])
    lower: Tensor = torch.linalg.cholesky((inverse + inverse.T) / 2)
    return lower.T


def processing_order(H: Tensor, options: Options) -> Tensor:
    """Return the channels by falling energy H_jj (``act_order``), else as they are."""
    n = len(H)
    return torch.argsort(H.diagonal(), descending=True, stable=True) if options.act_order else torch.arange(n)


def grids_of(W: Tensor, work: Tensor, order: Tensor, options: Options) -> Callable[[int, Tensor], Grid | FloatGrid]:
    """Return the function that gives the grid of position j, the weights being w (m, n) by then."""
    size = options.block
    if size is None:  # one grid per row, fitted on the original weight, dead channels and all
        whole = options.fit(W, W)
        return lambda j, w: whole
    if options.static_groups:  # consecutive channels of the model, fitted before the loop
        static = [options.fit(piece, W) for piece in work[:, torch.argsort(order)].split(size, dim=1)]
        return lambda j, w: static[int(order[j]) // size]
    fitted: dict[
        int, Grid | FloatGrid
    ] = {}  # consecutive channels in processing order, fitted when the first one is reached

    def dynamic(j: int, w: Tensor) -> Grid | FloatGrid:
        if j // size not in fitted:
            fitted[j // size] = options.fit(w[:, j : j + size], W)
        return fitted[j // size]

    return dynamic


def without_dead(W: Tensor, H: Tensor) -> Tensor:
    """Return W with the columns of dead channels at zero."""
    return W * (H.diagonal() != 0)


def live_part(C: Tensor, H: Tensor) -> Tensor:
    """Return C with rows and columns of dead channels at zero."""
    live = (H.diagonal() != 0).double()
    return C * torch.outer(live, live)


def in_model_order(found: tuple[Tensor, Tensor], order: Tensor) -> Rounded:
    """Undo the processing order."""
    back = torch.argsort(order)
    return Rounded(found[0][:, back], found[1][:, back])


# -------------------------------------------------------------------------------------------------------------- targets


def qep_target(W: Tensor, X: Tensor, Xq: Tensor, alpha: float = 0.5, damping: float = 1.0) -> Tensor:
    """QEP: W + alpha W C^T (H + L I)^-1, a share alpha of what makes up for the drift (arXiv 2504.09629).

    alpha = 0 is the target ``weight``: W itself.
    """
    # H = Xq^T Xq, C = Xq^T (X - Xq), L = damping * mean diag H
    H, C = Xq.T @ Xq, Xq.T @ (X - Xq)
    L = damping * H.diagonal().mean()
    # min over V of ||Xq V^T - X W^T||^2 + L ||V - W||^2 at alpha = 1; the drift of dead channels counts for nothing
    inverse: Tensor = torch.linalg.inv(H + L * torch.eye(len(H), dtype=H.dtype))
    return W + alpha * without_dead(W, H) @ C.T @ inverse


def loaq_target(
    W: Tensor, X: Tensor, Xq: Tensor, R: Tensor | None = None, Rq: Tensor | None = None, *, rms_scale: str = "none",
    alpha: float = 1.0, beta: float = 1.0, damping: float = 0.01, eps: float = 1e-5, dead_channels: str = "zero",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """LoaQ: the weight with which the quantized model gives the full-precision output (arXiv 2509.06297, 2512.01546).

    Levels: ``linear`` without R; ``sublayer`` with R and rms_scale none; ``rms`` with R and rms_scale common or split.

    Returns:
        The target (m, n), and H (n, n), under which it has to be rounded.
    """
    # D, Dq: one weight per token, the frozen scale 1 / rms of the RMSNorm behind the sum; 1 where there is none
    D = Dq = torch.ones(len(X), 1, dtype=W.dtype)
    if R is not None and Rq is not None and rms_scale != "none":
        D, Dq = (1 / ((r + x @ W.T) ** 2).mean(1, keepdim=True).add(eps).sqrt() for r, x in ((R, X), (Rq, Xq)))
        Dq = D if rms_scale == "common" else Dq
    # H = (Dq Xq)^T (Dq Xq),   C = (Dq Xq)^T (D X - Dq Xq),   G = (Dq Xq)^T (D R - Dq Rq)
    H, C = (Dq * Xq).T @ (Dq * Xq), (Dq * Xq).T @ (D * X - Dq * Xq)
    G = torch.zeros_like(W).T if R is None or Rq is None else (Dq * Xq).T @ (D * R - Dq * Rq)
    # Dead channels keep their weight; their drift counts for nothing, or (keep_column) the live ones make up for it.
    live = H.diagonal() != 0
    moved = W if dead_channels == "keep_column" else W * live
    # target = W + (alpha W C^T + beta G^T) (H + L I)^-1,   L = damping * mean diag H
    right = (alpha * moved @ C.T + beta * G.T)[:, live]
    L = damping * H.diagonal().mean() * torch.eye(int(live.sum()), dtype=W.dtype)
    target = W.clone()
    target[:, live] += torch.linalg.solve(H[live][:, live] + L, right.T).T
    return target, H


# ---------------------------------------------------------------------------------------------------------- refinements


def null_space_row_scale(W: Tensor, Q: Tensor, S: Tensor, threshold: float = 0.1, ridge: float = 0.2) -> Tensor:
    """Q2N: row scales (m,) that move the error towards the null space of the inputs (arXiv 2506.11044; S second moment)."""
    # S = U diag(s) U^T with s falling; negative eigenvalues are rounding errors
    s, U = torch.linalg.eigh(S)
    s, U = s.flip(0).clamp(min=0), U.flip(1)
    # r: the smallest with (s_{r+1} + ...) / (s_1 + ... + s_{r-1}) <= threshold; s_0 and s_r are in neither sum
    ranks = range(2, len(s) + 1)
    r = next((r for r in ranks if s[1:r].sum() > 1e-12 and s[r + 1 :].sum() <= threshold * s[1:r].sum()), None)
    if r is None:  # no signal space: nothing is rescaled
        return torch.ones(len(W), dtype=W.dtype)
    # P = U2 U2^T projects on the null space; W_proj keeps W on the signal space and Q on the null space
    P = U[:, r:] @ U[:, r:].T
    W_proj: Tensor = W - W @ P + Q @ P
    # min over alpha of ||diag(alpha) Q - W_proj||^2 + ridge ||alpha - 1||^2; a zero row keeps 1
    stiffness = (Q * Q).sum(1) + ridge
    return torch.where(stiffness > 0, ((W_proj * Q).sum(1) + ridge) / stiffness, 1.0)


def scale_refit(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Row scales (m,) of least output error, the control for Q2N: alpha_i = (W H Q^T)_ii / (Q H Q^T)_ii (derived)."""
    # min over alpha_i of ||X (alpha_i Q_i - W_i)^T||^2, one scalar least-squares problem per row
    wanted, energy = (W @ H @ Q.T).diagonal(), (Q @ H @ Q.T).diagonal()
    # A row without any output has no scale to find.
    return torch.where(energy > 0, wanted / energy, 1.0)
