"""The grids of all groups while the column loop runs: fitted when it reaches them, then used to round channel by channel.

Legend: n input channels, m rows worked on at once, G groups; c is a code minus its zero point z.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.groups import Group
from ptqbench.numerics.levels import IntegerLevels, Levels, fit_levels

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
        # (G, m) each; low and high, the limits of c, are there for the column kernel.
        self.groups, self.positions = groups, positions
        self.scale, self.zero_point, self.low, self.high = like.new_zeros(4, len(groups), like.shape[1]).unbind(0)
        self._levels: list[Levels | None] = [None] * len(groups)
        self.fitted = [False] * len(groups)
        # The group of every processing position.
        self.of_position = [0] * len(like)
        owners = [g for g, members in enumerate(positions) for _ in range(len(members))]
        for p, g in zip(torch.cat(positions).tolist(), owners, strict=True):
            self.of_position[p] = g

    def fit(self, g: int, values: Tensor) -> None:
        """Fit group ``g`` on ``values`` (m, size)."""
        levels = fit_levels(values.contiguous(), self.groups[g].spec, self.groups[g].number)
        self.scale[g], self.zero_point[g] = levels.scale, levels.zero_point
        if isinstance(levels, IntegerLevels):
            self.low[g], self.high[g] = levels.low, levels.high
        self._levels[g], self.fitted[g] = levels, True

    def round(self, position: int, w: Tensor, c: Tensor, q: Tensor) -> None:
        """Write c and q of one channel w, each (m,); its group must be fitted."""
        self._levels[self.of_position[position]].round(w, c, q)  # type: ignore[union-attr]

    def write_codes(self, start: int, centred: Tensor, codes: Tensor) -> None:
        """Write the codes of the channels from position ``start`` on, given their c (k, m), into ``codes`` (k, m)."""
        first = 0
        for g, run in groupby(self.of_position[start : start + len(centred)]):
            here = slice(first, first + len(list(run)))
            # code = c + z; where z is real, rounded because it leaves rounding errors
            found = centred[here] + self.zero_point[g]
            codes[here] = found.round_() if self.groups[g].spec.zero_point == "real" else found
            first = here.stop
