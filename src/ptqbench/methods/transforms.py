"""Transforms: the basis in which a model is quantized."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from ptqbench.methods.base import Statistic

if TYPE_CHECKING:
    from ptqbench.models.architecture import Architecture
    from ptqbench.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class NoTransform:
    """Quantize in the basis of the checkpoint."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Never skip."""
        return None
