"""Solvers: how one linear (or a stack of linears with one input) is rounded to a grid."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ptqbench.errors import UnsupportedError
from ptqbench.methods.base import Aim, Solver, Statistic, Statistics
from ptqbench.methods.targets import Damping

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import Grid, LinearResult


@dataclasses.dataclass(frozen=True)
class NoSolver(Solver):
    """Round nothing: the unquantized reference."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        if spec.quantizes:
            return f"method {spec.method.name} rounds nothing, so bitwidth {spec.bitwidth.name} cannot apply; use bitwidth=fp16"
        return None

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        raise UnsupportedError("solver 'none' was asked to round a linear; expected a cell at 16 bits")


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Solver):
    """Round every weight to the nearest point of its grid (RTN)."""

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        """Round ``aim.weight`` (out, in); the second moment is not used."""
        from ptqbench.numerics.rtn import round_to_nearest

        return round_to_nearest(aim.weight, grid, grid_weight=aim.grid_weight)


@dataclasses.dataclass(frozen=True)
class Gptq(Solver):
    """Round column by column and push each rounding error into the columns still unrounded (arXiv 2210.17323).

    Attributes:
        damping: Added to the diagonal of the second moment, as a fraction of its mean.
        column_block: Columns rounded before the remaining ones are updated. With one grid per row it affects speed alone.
        act_order: Round columns in the order of decreasing input energy.
        static_groups: Fit the grids of all groups before rounding, so that groups are contiguous in model order.
        group_refit: ``fresh`` fits a group's grid on the updated weights, ``stale`` as the authors' code does.
        on_cholesky_failure: ``raise``, or ``retry`` with ten times the damping, noted in the layer record.
    """

    damping: Damping = 0.01
    column_block: Annotated[int, Field(ge=1)] = 128
    act_order: bool = False
    static_groups: bool = False
    group_refit: Literal["fresh", "stale"] = "fresh"
    on_cholesky_failure: Literal["raise", "retry"] = "raise"

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip blocks of a format whose channels would not be neighbours."""
        form = spec.bitwidth.w_format
        if self.act_order and not self.static_groups and form != "int":
            return (
                f"act_order with dynamic groups scatters the channels of a block, {form} stores blocks of neighbours; "
                "use static_groups=true"
            )
        return super().skip_reason(spec, architecture)

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        """Round ``aim.weight`` (out, in) with compensation under ``aim.second_moment`` (in, in)."""
        from ptqbench.numerics.gptq import gptq

        return gptq(
            aim.weight,
            aim.second_moment,
            grid,
            grid_weight=aim.grid_weight,
            keep_working=keep_working,
            **self.loop_options,
        )

    @property
    def loop_options(self) -> dict[str, Any]:
        """The options that every solver built on the column loop of GPTQ takes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Gptq)}


@dataclasses.dataclass(frozen=True)
class Gptaq(Gptq):
    """GPTQ that also lets later columns absorb the drift of each column's input (arXiv 2504.02692).

    Attributes:
        strength: Factor of the drift term; 0.25 is hard-wired in the authors' code and absent from the paper.
        as_code: In updates beyond the column block use the rounded weights, as the authors' code does.
        damping_as_code: Damp the moment that k, v, q (and up, gate) share again for each of them, as the authors' code does
            by accident; without effect under ``act_order``, where it copies the moment.
    """

    strength: Annotated[float, Field(ge=0, le=1)] = 0.25
    as_code: bool = False
    damping_as_code: bool = False

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return Gptq.needs | (frozenset({Statistic.CROSS_MOMENT}) if self.strength > 0 else frozenset())

    @property
    def one_by_one(self) -> bool:
        """Whether the linears of a group are damped differently."""
        return self.damping_as_code and not self.act_order

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        """Round ``aim.weight`` (out, in) with compensation of errors and drift."""
        from ptqbench.numerics.gptaq import gptaq, repeated_damping

        # Without drift the update is that of GPTQ.
        if aim.cross_moment is None:
            return super().solve(aim, statistics, grid, keep_working)
        # The authors' code damps the same matrix again for every linear of a group.
        options = self.loop_options | {"keep_working": keep_working, "grid_weight": aim.grid_weight}
        if self.one_by_one:
            options["damping"] = repeated_damping(self.damping, _TIMES_DAMPED.get(statistics.linears[0], 1))
        special: dict[str, Any] = {"strength": self.strength, "as_code": self.as_code}
        return gptaq(aim.weight, aim.second_moment, aim.cross_moment, grid, **special, **options)


_TIMES_DAMPED = {"self_attn.v_proj": 2, "self_attn.q_proj": 3, "mlp.gate_proj": 2}
"""How often the authors' code has damped the shared moment when it comes to a linear; once for the others."""


@dataclasses.dataclass(frozen=True)
class Qronos(Gptq):
    """Correct the whole drift with the first column, then run GPTQ on the rest (arXiv 2505.11695).

    Attributes:
        damping_relative_to: ``mean_diagonal``, or ``largest_eigenvalue`` of the second moment as Brevitas does.
    """

    damping_relative_to: Literal["mean_diagonal", "largest_eigenvalue"] = "mean_diagonal"

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT, Statistic.CROSS_MOMENT})

    def solve(self, aim: Aim, statistics: Statistics, grid: Grid, keep_working: bool = False) -> LinearResult:
        """Round ``aim.weight`` (out, in) with compensation of errors and drift."""
        from ptqbench.numerics.qronos import eigenvalue_damping, qronos

        options = self.loop_options | {"keep_working": keep_working, "grid_weight": aim.grid_weight}
        if self.damping_relative_to == "largest_eigenvalue":
            options["damping"] = eigenvalue_damping(aim.second_moment, self.damping)
        # A target that corrects all of the drift leaves C = 0.
        cross = aim.second_moment.new_zeros(aim.second_moment.shape) if aim.cross_moment is None else aim.cross_moment
        return qronos(aim.weight, aim.second_moment, cross, grid, **options)
