"""Refinements: what is repaired after rounding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from ptqbench.methods.base import Statistic, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.models.architecture import Architecture
    from ptqbench.numerics.grid import LinearResult
    from ptqbench.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class NoRefinement:
    """Leave the rounded linear as the solver made it."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Never skip."""
        return None

    def repair(self, weight: Tensor, result: LinearResult, statistics: Statistics) -> LinearResult:
        """Return ``result`` unchanged."""
        return result
