"""SmoothQuant: part of the range of the inputs is moved into the weights that read them (arXiv 2211.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.methods.precision import STAGE_LINEARS
from ptqbench.methods.transform import Calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.models.walk import BlockView

StageName = Literal["qkv", "o", "gate_up", "down"]


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Calibrated):
    """Divide the channels of an input by scales and multiply the columns of the weights by them; nothing runs online.

    Attributes:
        alpha: Share of the range that is moved: 0 leaves columns that all peak at 1, 1 leaves inputs that do.
        pairs: Inputs that are scaled: ``qkv`` and ``gate_up`` (in the norms before them), ``down`` (in the rows of up), ``o`` (in
            the rows of v).
        n_samples: Calibration windows behind the largest magnitudes.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.85
    pairs: tuple[StageName, ...] = ("qkv", "gate_up")
    n_samples: Annotated[int, Field(ge=1)] = 512

    statistics: ClassVar[Literal["magnitudes"]] = "magnitudes"

    def __post_init__(self) -> None:
        """Refuse a stage that is named twice."""
        if len(set(self.pairs)) < len(self.pairs):
            raise ConfigError(f"method.transform.pairs: expected every input once, got {list(self.pairs)}")

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells in which nothing that is scaled is rounded, and inputs that no norm produces."""
        from ptqbench.models.family import producers

        bits = spec.bitwidth
        rounded = [bits.w_bits, bits.a_bits, *([bits.v_bits] if "o" in self.pairs else [])]
        if min(rounded) >= UNTOUCHED_BITS:
            return (
                f"smoothquant moves ranges between inputs and weights, and bitwidth {bits.name} leaves both at "
                f"{UNTOUCHED_BITS} bits"
            )
        bare = [stage for stage in self.pairs if stage not in producers(architecture.family)]
        if bare:
            left = [stage for stage in self.pairs if stage not in bare]
            return (
                f"smoothquant scales {', '.join(bare)} in the norm before it, and {architecture.model_type} has none there; "
                f"take method.transform.pairs=[{','.join(left)}]"
            )
        return self.precision(spec, architecture).skip_reason()

    def solve_block(self, view: BlockView, spec: RunSpec) -> dict[str, Tensor]:
        """Compute the scales of a block: ``qkv``, ``gate_up`` (d,), ``down`` (f,), ``o`` (G e,)."""
        import torch

        from ptqbench.models.fuse import by_value_head
        from ptqbench.numerics.smoothing import smoothing_scale

        scales: dict[str, Tensor] = {}
        for stage in self.pairs:
            # xmax_j over all tokens, wmax_j over the rows of all weights that read the channel.
            columns = [view.tensors[f"{linear}.weight"].abs().amax(0) for linear in STAGE_LINEARS[stage]]
            inputs, weights = view.magnitudes[f"largest.{stage}"], torch.stack(columns).amax(0)
            if stage == "o":  # the query heads of a key/value head read the same channels of v
                inputs, weights = (by_value_head(sizes, view.architecture).amax(0) for sizes in (inputs, weights))
            scales[stage] = smoothing_scale(inputs, weights, self.alpha)
        return scales

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Apply the scales.

        Raises:
            ConfigError: There are no scales.
        """
        from ptqbench.methods.basis import ScaledBasis

        if bases is None:
            raise ConfigError("transform 'smoothquant' needs its scales: compute them first (ptqbench.engine.bases)")
        return ScaledBasis(self.precision(spec, architecture, bases), bases, self.pairs)
