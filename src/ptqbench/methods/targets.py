"""Targets: the weight that rounding aims at."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from ptqbench.methods.base import Statistic, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.models.architecture import Architecture
    from ptqbench.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Weight:
    """Aim at the weight itself, under the second moment of the quantized stream."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Never skip."""
        return None

    def aim(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Return ``weight`` (out, in) and the second moment (in, in), both as they are."""
        return weight, statistics.second_moment
