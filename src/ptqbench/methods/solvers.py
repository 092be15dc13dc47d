"""Solvers: how one linear (or a stack of linears with one input) is rounded to an integer grid."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.errors import UnsupportedError
from ptqbench.methods.base import Statistic, Statistics
from ptqbench.spec import UNTOUCHED_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import Grid, LinearResult
    from ptqbench.spec import RunSpec


def _nothing_to_round(spec: RunSpec) -> str | None:
    if spec.quantizes:
        return None
    return f"bitwidth {spec.bitwidth.name} leaves everything at {UNTOUCHED_BITS} bits; the unquantized model is +method=fp16"


@dataclasses.dataclass(frozen=True)
class NoSolver:
    """Round nothing: the unquantized reference."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip bitwidths below 16."""
        if spec.quantizes:
            return f"method {spec.method.name} rounds nothing, so bitwidth {spec.bitwidth.name} cannot apply; use bitwidth=fp16"
        return None

    def solve(self, weight: Tensor, second_moment: Tensor, statistics: Statistics, grid: Grid) -> LinearResult:
        """Refuse: cells with this solver round nothing."""
        raise UnsupportedError("solver 'none' was asked to round a linear; expected a cell at 16 bits")


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Round every weight to the nearest point of its grid (RTN)."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells in which everything stays at 16 bits."""
        return _nothing_to_round(spec)

    def solve(self, weight: Tensor, second_moment: Tensor, statistics: Statistics, grid: Grid) -> LinearResult:
        """Round ``weight`` (out, in); the second moment is not used."""
        from ptqbench.numerics.rtn import round_to_nearest

        return round_to_nearest(weight, grid)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Round column by column and push each rounding error into the columns still unrounded (arXiv 2210.17323).

    Attributes:
        damping: Added to the diagonal of the second moment, as a fraction of its mean.
        column_block: Columns rounded before the remaining ones are updated; a matter of speed alone with one grid per row.
        act_order: Round columns in the order of decreasing input energy.
        static_groups: Fit the grids of all groups before rounding, so that groups are contiguous in model order.
        group_refit: ``fresh`` fits a group's grid on the updated weights, ``stale`` as the authors' code does.
        on_cholesky_failure: ``raise``, or ``retry`` with ten times the damping, recorded in the layer report.
    """

    damping: Annotated[float, Field(ge=0)] = 0.01
    column_block: Annotated[int, Field(ge=1)] = 128
    act_order: bool = False
    static_groups: bool = False
    group_refit: Literal["fresh", "stale"] = "fresh"
    on_cholesky_failure: Literal["raise", "retry"] = "raise"

    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells in which everything stays at 16 bits."""
        return _nothing_to_round(spec)

    def solve(self, weight: Tensor, second_moment: Tensor, statistics: Statistics, grid: Grid) -> LinearResult:
        """Round ``weight`` (out, in) with compensation under ``second_moment`` (in, in)."""
        from ptqbench.numerics.gptq import gptq

        return gptq(weight, second_moment, grid, **dataclasses.asdict(self))
