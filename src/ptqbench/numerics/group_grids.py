"""The grids of all groups while the column loop runs: fitted when it reaches them, then used to round channel by channel.

    c = clamp(round_half_even(w / scale), low - z, high - z),     q = scale * c

Legend: n input channels, m rows worked on at once, G groups; c is a code minus its zero point z.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from ptqbench.numerics.affine import tie_shift
from ptqbench.numerics.grid import fit
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.groups import Group

INTEGER, REAL, UNTOUCHED = range(3)
"""How the column kernel tells grids apart: by their zero point, or that they keep the weight."""


def kind(spec: GridSpec) -> int:
    """Return ``INTEGER``, ``REAL`` or ``UNTOUCHED``."""
    if spec.untouched:
        return UNTOUCHED
    return REAL if spec.zero_point == "real" else INTEGER


class GroupGrids:
    """The grids of all groups for the rows at hand; the loop fits a group when it reaches it."""

    def __init__(self, groups: list[Group], positions: list[Tensor], like: Tensor) -> None:
        """Reserve an unfitted grid for every group.

        Args:
            groups: The plan.
            positions: Per group, the processing positions of its channels.
            like: (n, m), for the number of rows, dtype and device.
        """
        # (G, m) each, and per group its views of them, so that rounding a channel indexes nothing.
        self.groups, self.positions = groups, positions
        self.scale, self.zero_point, self.low, self.high = like.new_zeros(4, len(groups), like.shape[1]).unbind(0)
        self._of_group = list(zip(*(t.unbind(0) for t in (self.scale, self.low, self.high)), strict=True))
        self.fitted = [False] * len(groups)
        # The group of every processing position.
        self.of_position = [0] * len(like)
        owners = [g for g, members in enumerate(positions) for _ in range(len(members))]
        for p, g in zip(torch.cat(positions).tolist(), owners, strict=True):
            self.of_position[p] = g

    def fit(self, g: int, values: Tensor) -> None:
        """Fit group ``g`` on ``values`` (m, size)."""
        spec = self.groups[g].spec
        scale, zero_point = fit(values.contiguous(), spec)
        low, high = spec.code_limits
        self.scale[g], self.zero_point[g] = scale, zero_point
        # Limits of c: q = scale * clamp(round(w / scale), low - z, high - z) needs no shift by z.
        self.low[g], self.high[g] = low - zero_point, high - zero_point
        self.fitted[g] = True

    def round(self, position: int, w: Tensor, c: Tensor, q: Tensor) -> None:
        """Write c and q of one channel w, each (m,)."""
        g = self.of_position[position]
        spec = self.groups[g].spec
        if spec.untouched:
            c.zero_()
            q.copy_(w)
            return
        scale, low, high = self._of_group[g]
        # steps = w / scale; what misses a tie of sym_gptq by a rounding error is put on it
        torch.div(w, scale, out=c)
        if shift := tie_shift(spec):
            c.add_(shift).sub_(shift)
        # c = round_half_even(steps); for a real z the code is the integer: c = round_half_even(steps + z) - z
        if spec.zero_point == "real":
            c.add_(self.zero_point[g]).round_().sub_(self.zero_point[g])
        else:
            c.round_()
        # c <- clamp(c, low - z, high - z),   q = scale * c
        torch.mul(c.clamp_(low, high), scale, out=q)

    def write_codes(self, start: int, centred: Tensor, codes: Tensor) -> None:
        """Write the codes of the channels from position ``start`` on, given their c (k, m), into ``codes`` (k, m)."""
        first = 0
        for g, run in groupby(self.of_position[start : start + len(centred)]):
            here = slice(first, first + len(list(run)))
            # code = c + z, rounded because a real z leaves rounding errors
            untouched = self.groups[g].spec.untouched
            codes[here] = centred[here] if untouched else (centred[here] + self.zero_point[g]).round_()
            first = here.stop
