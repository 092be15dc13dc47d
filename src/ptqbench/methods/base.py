"""What the four roles are given and what they give back.

A member of a role is a frozen dataclass of plain hyper-parameters plus one method. It keeps no state between linears, does
no I/O and moves no tensor between devices. The pipeline collects the union of the statistics that the four members of a
method ``need``, once, in one pass, and calls

    transform -> target.aim -> solver.solve -> refine.repair

for every group of linears that share an input. Rows are independent given the statistics of the input, so a group (q, k, v)
arrives stacked along its rows and shares one factorisation.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import Grid, LinearResult
    from ptqbench.spec import RunSpec


class Statistic(enum.Enum):
    """A statistic of the inputs of a linear over all calibration tokens."""

    SECOND_MOMENT = "second_moment"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one group of linears, summed over calibration tokens.

    Attributes:
        second_moment: Uncentred x^T x per token, (in_features, in_features) float32.
        n_tokens: Number of tokens behind it.
    """

    second_moment: Tensor
    n_tokens: int


class Member(Protocol):
    """What every member of every role has."""

    needs: ClassVar[frozenset[Statistic]]

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Say why this member makes no sense in a cell, or None."""


class Transform(Member, Protocol):
    """In which basis do we quantize?"""


class Target(Member, Protocol):
    """Which weight should rounding aim at?"""

    def aim(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Return the weight to aim at, (out, in), and the second moment that rounding must use, (in, in)."""


class Solver(Member, Protocol):
    """How is a linear rounded?"""

    def solve(self, weight: Tensor, second_moment: Tensor, statistics: Statistics, grid: Grid) -> LinearResult:
        """Round ``weight`` (out, in) to the grid; it is not modified."""


class Refine(Member, Protocol):
    """What is repaired after rounding?"""

    def repair(self, weight: Tensor, result: LinearResult, statistics: Statistics) -> LinearResult:
        """Return a better result on the same codes; ``weight`` is the original one."""
