"""What the four roles are given and what they give back.

A member of a role is a frozen dataclass of plain hyper-parameters plus one method. It keeps no state between linears, does
no I/O and moves no tensor between devices. The pipeline collects the union of the statistics that the members of a method
``need``, once, in one pass, and calls

    transform -> target.aim -> solver.solve -> refine.repair

for every group of linears that share an input. Rows are independent given the statistics of the input, so a group (q, k, v)
arrives stacked along its rows and shares one factorisation. A member with an attribute ``exclude`` (names of linears) is
passed over for those: they keep the weight as their target, or the solver's result.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Literal, Protocol

from ptqbench.cell.spec import UNTOUCHED_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.methods.precision import Precision
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.numerics.grid import Grid, LinearResult

LinearName = Literal[
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


class Statistic(enum.Enum):
    """A statistic of the inputs of a linear over all calibration tokens."""

    SECOND_MOMENT = "second_moment"
    CROSS_MOMENT = "cross_moment"
    RESIDUAL_MOMENT = "residual_moment"
    TOKEN_WEIGHTS = "token_weights"
    POSITION_MEAN = "position_mean"


REFERENCE = frozenset({Statistic.CROSS_MOMENT, Statistic.RESIDUAL_MOMENT, Statistic.TOKEN_WEIGHTS})
"""Statistics that compare the quantized stream with the full-precision one, which is run only if one of them is needed."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one group of linears: means over calibration tokens, float32. What nobody needs is None.

    Xq are the inputs in the quantized stream (n channels), X those of the same tokens in the full-precision stream, R and Rq
    what the output is added to (m channels). Where token weights are needed (D, Dq: see ``numerics.targets``),
    ``weighted_moment`` is there and the moments after it carry the weights; elsewhere D = Dq = 1.

    Attributes:
        second_moment: Xq^T Xq, (n, n), uncentred, never weighted; always there.
        n_tokens: Number of tokens behind the means.
        weighted_moment: (Dq Xq)^T (Dq Xq), (n, n); only for a stage that adds to the residual stream.
        cross_moment: (Dq Xq)^T (D X - Dq Xq), (n, n).
        residual_moment: (Dq Xq)^T (D R - Dq Rq), (n, m); only for a stage that adds to the residual stream.
        position_moment: Second moment of the mean over windows, position by position, (n, n).
        linears: Names of the linears stacked in the group, in order.
    """

    second_moment: Tensor
    n_tokens: int
    weighted_moment: Tensor | None = None
    cross_moment: Tensor | None = None
    residual_moment: Tensor | None = None
    position_moment: Tensor | None = None
    linears: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Aim:
    """What rounding is asked to reproduce, and under which measure.

    Attributes:
        weight: (out, in) weight to round.
        second_moment: (in, in) moment that rounding must use; carries token weights where the target has them.
        cross_moment: (in, in) drift of the inputs that the target has not made up for, at the scale of ``second_moment``;
            None for no drift or none collected.
        grid_weight: (out, in) weight on which the grids are fitted; None for ``weight``.
        damping: Damping of the correction as a fraction of the mean diagonal; None if there was no correction to damp.
    """

    weight: Tensor
    second_moment: Tensor
    cross_moment: Tensor | None = None
    grid_weight: Tensor | None = None
    damping: float | None = None


@dataclasses.dataclass(frozen=True)
class Repaired:
    """A rounded group after refinement.

    Attributes:
        result: The result, on the codes and zero points that the solver chose.
        row_scale: (out,) factor of every row's scale; None if nothing was rescaled.
        null_space_rank: Signal rank behind the row scales; None if none was sought or none was found.
    """

    result: LinearResult
    row_scale: Tensor | None = None
    null_space_rank: int | None = None


class Member(Protocol):
    """What every member of every role has."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to collect for it; a constant of the class, or a consequence of its options."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Say why this member makes no sense in a cell, or None."""


class Transform(Member, Protocol):
    """In which basis do we quantize?"""

    @property
    def needs_statistics(self) -> bool:
        """Whether eigenbases must be computed first (``ptqbench.engine.bases``)."""

    def precision(self, spec: RunSpec, architecture: Architecture) -> Precision:
        """Return the grids of weights, inputs, keys and values in this basis."""

    def basis(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Basis | None:
        """Return how tensors are fused and blocks are planned; None for the checkpoint as it is."""


class Target(Member, Protocol):
    """Which weight should rounding aim at?

    A target that needs ``TOKEN_WEIGHTS`` has an attribute ``rms_scale`` that says which (see ``numerics.targets``).
    """

    def aim(self, weight: Tensor, statistics: Statistics) -> Aim:
        """Return what to aim at for ``weight`` (out, in), which is not modified."""


class Solver(Member, Protocol):
    """How is a linear rounded?

    A solver with an attribute ``one_by_one`` that is true gets every linear by itself instead of stacked groups.
    """

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid) -> LinearResult:
        """Round ``aim.weight`` (out, in) to the grid; it is not modified."""


class Refine(Member, Protocol):
    """What is repaired after rounding?"""

    def repair(self, weight: Tensor, aim: Aim, result: LinearResult, statistics: Statistics) -> Repaired:
        """Return a better result on the same codes; ``weight`` is the original one. ``result.codes`` is not None."""


def idle_reason(member: str, spec: RunSpec) -> str | None:
    """Say that a member which acts on rounded weights has nothing to do in a cell, or None."""
    if spec.method.solver.name == "none":
        return f"{member} acts on rounded weights, but solver none rounds nothing; use a solver"
    if spec.quantizes and spec.bitwidth.w_bits >= UNTOUCHED_BITS:
        return (
            f"{member} acts on rounded weights, but bitwidth {spec.bitwidth.name} leaves them at {UNTOUCHED_BITS} bits"
        )
    return None
