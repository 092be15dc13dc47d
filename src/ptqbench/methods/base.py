"""What the four roles are given and what they give back; the role of the transform itself is in ``methods.transform``.

A member of a role is a frozen dataclass of plain hyper-parameters plus one method. It keeps no state between linears, does
no I/O and moves no tensor between devices. The pipeline collects the union of the statistics that the members of a method
``need``, once, in one pass, and calls

    transform -> target.aim -> solver.solve -> refine.repair

for every group of linears that share an input. Rows are independent given the statistics of the input, so a group (q, k, v)
arrives stacked along its rows and shares one factorisation. A linear without any input is rounded to nearest and meets no
member.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ptqbench.cell.spec import UNTOUCHED_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import Grid, LinearResult
    from ptqbench.numerics.targets import RmsScale

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


class Member:
    """What every member of every role has, with the defaults that most members keep."""

    FILES: ClassVar[Mapping[str, str]] = {}
    """Options that name a file -> options that hold the digest of its content."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to collect for it; a constant of the class, or a consequence of its options."""
        return frozenset()

    @property
    def files(self) -> dict[str, str | None]:
        """Digest of every file that it reads -> where the file lies; None where only the content is known."""
        given = {getattr(self, digest): getattr(self, path) for path, digest in self.FILES.items()}
        return {digest: path for digest, path in given.items() if digest is not None}

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Say why this member makes no sense in a cell, or None."""
        return None


class Scoped(Member):
    """A member that acts on rounded weights, perhaps not on those of all linears."""

    @property
    def exclude(self) -> tuple[LinearName, ...]:
        """Linears on which it does not act."""
        return ()


class Target(Scoped, ABC):
    """Which weight should rounding aim at? Excluded linears keep their own weight as the target."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells that round no weight."""
        return _idle(f"target {spec.method.target.name}", spec)

    @property
    def rms_scale(self) -> RmsScale:
        """Which token weights, for a target that needs ``TOKEN_WEIGHTS`` (see ``numerics.targets``)."""
        return "none"

    @abstractmethod
    def aim(self, weight: Tensor, statistics: Statistics) -> Aim:
        """Return what to aim at for ``weight`` (out, in), which is not modified."""


class Solver(Member, ABC):
    """How is a linear rounded?"""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells in which everything stays at 16 bits."""
        if spec.calibrates:  # a transform alone: a check that it keeps the function
            return None
        name = spec.bitwidth.name
        return f"bitwidth {name} leaves everything at {UNTOUCHED_BITS} bits; the unquantized model is +method=fp16"

    @property
    def one_by_one(self) -> bool:
        """Whether every linear is rounded by itself instead of in stacked groups."""
        return False

    @abstractmethod
    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        """Round ``aim.weight`` (out, in) to the grid; it is not modified.

        Args:
            aim: What to reproduce.
            statistics: Statistics of the inputs, not modified.
            grid: The grid of every column.
            keep_working: Return the working copy as well, where the solver has one (``LinearResult.working``).
        """


class Refine(Scoped, ABC):
    """What is repaired after rounding? Excluded linears keep the solver's result."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells that round no weight."""
        return _idle(f"refine {spec.method.refine.name}", spec)

    @property
    def reads_working(self) -> bool:
        """Whether it reads the solver's working copy."""
        return False

    @abstractmethod
    def repair(self, weight: Tensor, aim: Aim, result: LinearResult, statistics: Statistics) -> Repaired:
        """Return a better result on the same codes; ``weight`` is the original one. ``result.stored`` is not None."""


def _idle(member: str, spec: RunSpec) -> str | None:
    if spec.method.solver.name == "none":
        return f"{member} acts on rounded weights, but solver none rounds nothing; use a solver"
    if spec.quantizes and spec.bitwidth.w_bits >= UNTOUCHED_BITS:
        return (
            f"{member} acts on rounded weights, but bitwidth {spec.bitwidth.name} leaves them at {UNTOUCHED_BITS} bits"
        )
    return None
