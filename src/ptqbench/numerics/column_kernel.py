"""The Triton kernel behind ``numerics/fused_columns.py``: the only module that needs triton, imported only there.

One launch rounds the channels of one panel for all rows. A program owns ``ROWS`` rows and takes the channels in order:

    w_i <- w_i - sum_{j<i} e_j U_ji / U_jj + sum_{j<i} w_j P_ji,     c_i, q_i = round(w_i),     e_i = w_i - q_i

Legend: as in ``numerics/column_loop.py``; everything is (channels, rows), a channel contiguous. A group's ``low`` and
``high`` are limits of c, the code minus its zero point.
Source: the loop of ``numerics/column_loop.py``, which stays the reference. Deviation: the sums run over the whole panel
at once and in another order, so the last bits differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptqbench.numerics import group_grids

VERSION = triton.__version__
REAL = tl.constexpr(group_grids.REAL)
UNTOUCHED = tl.constexpr(group_grids.UNTOUCHED)


@triton.jit
def _half_even(x: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, ties to even; adding 2^23 leaves no fraction bits. Larger magnitudes are integers."""
    size = tl.abs(x)
    rounded = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _read(
    i: tl.tensor, weights: tl.tensor, upper: tl.tensor, drift: tl.tensor, scale: tl.tensor, zero_point: tl.tensor,
    low: tl.tensor, high: tl.tensor, group: tl.tensor, kind: tl.tensor, tie_shift: tl.tensor, rows: tl.tensor,
    length: tl.tensor, row: tl.tensor, past: tl.tensor, DRIFT: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Load what channel ``i`` of the panel needs: w before the panel, its coefficients, its grid."""
    # Where the grids of this channel lie. Rows beyond the last one are masked and get harmless numbers.
    inside = row < rows
    grid = tl.load(group + i).to(tl.int64) * rows + row
    # w_i, and the coefficients U_ji / U_jj and P_ji of the channels j < i
    w = tl.load(weights + i * rows + row, mask=inside, other=0.0)
    u = tl.load(upper + i * length + past, mask=past < i, other=0.0)
    p = u
    if DRIFT:
        p = tl.load(drift + i * length + past, mask=past < i, other=0.0)
    # scale, z, and the limits of c
    s = tl.load(scale + grid, mask=inside, other=1.0)
    z = tl.load(zero_point + grid, mask=inside, other=0.0)
    lowest = tl.load(low + grid, mask=inside, other=0.0)
    highest = tl.load(high + grid, mask=inside, other=0.0)
    return w, u, p, s, z, lowest, highest, tl.load(kind + i), tl.load(tie_shift + i)


@triton.jit(do_not_specialize=["group", "kind", "tie_shift", "length"])
def round_panel(
    weights: tl.tensor, errors: tl.tensor, values: tl.tensor, codes: tl.tensor, upper: tl.tensor, drift: tl.tensor,
    scale: tl.tensor, zero_point: tl.tensor, low: tl.tensor, high: tl.tensor, group: tl.tensor, kind: tl.tensor,
    tie_shift: tl.tensor, rows: tl.tensor, length: tl.tensor, CHANNELS: tl.constexpr, ROWS: tl.constexpr, DRIFT: tl.constexpr,
) -> None:  # fmt: skip
    """Round a panel.

    Args:
        weights: (length, rows) float32 w, up to date with all channels before the panel; overwritten by the values just
            before rounding.
        errors: (length, rows) float32, receives e.
        values: (length, rows) float32, receives q.
        codes: (length, rows) integers, receives the codes; 0 for untouched channels.
        upper: (length, length) float32, row i holds U_ji / U_jj over j; only j < i is read.
        drift: (length, length) float32, row i holds P_ji over j; not read without ``DRIFT``.
        scale: (G, rows) float32; so are the next three.
        zero_point: For the codes, and for rounding where it is real.
        low: Smallest c.
        high: Largest c.
        group: (length,) int32, the group of each channel.
        kind: (length,) int32, ``group_grids.INTEGER``, ``REAL`` or ``UNTOUCHED``.
        tie_shift: (length,) float32, ``affine.tie_shift`` of the grid of each channel.
        rows: Number of rows.
        length: Channels of the panel, at most ``CHANNELS``.
        CHANNELS: Power of two.
        ROWS: Rows per program, a power of two.
        DRIFT: Whether there is a P.
    """
    # The rows of this program, and the tiles of past e and w, empty at first.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    past = tl.arange(0, CHANNELS)
    past_e = tl.zeros((CHANNELS, ROWS), dtype=tl.float32)
    past_w = past_e
    # The next channel is read while this one is computed: no channel is written before it has been read.
    w, u, p, s, z, lowest, highest, which, tie = _read(
        0, weights, upper, drift, scale, zero_point, low, high, group, kind, tie_shift, rows, length, row, past, DRIFT
    )
    for i in range(length):
        following = tl.minimum(i + 1, length - 1)
        w1, u1, p1, s1, z1, lowest1, highest1, which1, tie1 = _read(
            following, weights, upper, drift, scale, zero_point, low, high, group, kind, tie_shift, rows, length, row,
            past, DRIFT,
        )  # fmt: skip
        # w_i <- w_i - sum_{j<i} e_j U_ji / U_jj; rows of the tile that are not filled yet hold zeros
        w -= tl.sum(past_e * u[:, None], axis=0)
        # GPTAQ: w_i <- w_i + sum_{j<i} w_j P_ji
        if DRIFT:
            w += tl.sum(past_w * p[:, None], axis=0)
        # steps = w / scale with ties made exact;   c = clamp(round_half_even(steps + z) - z), z only where it is real
        shift = tl.where(which == REAL, z, 0.0)
        steps = (tl.div_rn(w, s) + tie) - tie
        c = _half_even(steps + shift) - shift
        c = tl.where(c < lowest, lowest, tl.where(c > highest, highest, c))  # keeps NaN, unlike minimum and maximum
        # q_i = scale * c_i,   e_i = w_i - q_i,   code_i = c_i + z
        q = tl.where(which == UNTOUCHED, w, c * s)
        e = w - q
        at = i * rows + row
        code = tl.where(which == UNTOUCHED, 0.0, _half_even(c + z)).to(tl.int32)
        tl.store(weights + at, w, mask=inside)
        tl.store(errors + at, e, mask=inside)
        tl.store(values + at, q, mask=inside)
        tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)
        # Row i of the tiles keeps e_i (and w_i) for the channels that follow.
        past_e = tl.where((past == i)[:, None], e[None, :], past_e)
        if DRIFT:
            past_w = tl.where((past == i)[:, None], w[None, :], past_w)
        w, u, p, s, z, lowest, highest, which, tie = w1, u1, p1, s1, z1, lowest1, highest1, which1, tie1


INTERPRETED = not isinstance(round_panel, triton.JITFunction)
"""Whether triton runs its kernels in Python (``TRITON_INTERPRET``), which accepts CPU tensors."""
