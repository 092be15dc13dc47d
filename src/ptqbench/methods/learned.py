"""Rotations learned by descent on the loss of the quantized network (SpinQuant, arXiv 2405.16406).

The options are here: what is learned, from which start, and with which steps. ``ptqbench.engine.rotations`` learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS, added
from ptqbench.errors import ConfigError
from ptqbench.methods.layout import Layout
from ptqbench.methods.transform import Learning, Transform, fixed_stream
from ptqbench.methods.transforms import Seed, down_transform, head_hadamard, no_hadamard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis

Rate = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class LearnedRotation(Transform):
    """Learn the rotation of the residual stream and one of the value heads per block (SpinQuant).

    Attributes:
        init: Where learning starts: Hadamards with random signs, or Haar matrices.
        r2: Whether values are rotated per head (fused), by a learned matrix per block that all its heads share.
        r3: Whether queries and keys are rotated by a Hadamard after RoPE (online; installed where keys are quantized).
        r4: Whether the input of down_proj is transformed by a Hadamard (online).
        steps: Steps of descent.
        learning_rate: Longest step, falling along half a cosine.
        momentum: Share of the velocity kept.
        batch_size: Calibration windows per step.
        quantize_weights: Round weights to nearest in the loss; off where a solver compensates rounding errors afterwards.
        odd_hadamard: As for ``hadamard``.
        center_embedding: As for ``hadamard``.
        rotation_seed: Names the random factors, i.e. the start.
        int8_down_proj: Weight and input of down_proj at 8 bits.
        output_group: As for ``hadamard``.
    """

    init: Literal["random_hadamard", "haar"] = "random_hadamard"
    r2: bool = True
    r3: bool = True
    r4: bool = True
    steps: Count = 100
    learning_rate: Rate = 1.5
    momentum: Momentum = 0.0
    batch_size: Count = 1
    quantize_weights: bool = False
    odd_hadamard: Literal["paley", "table", "as_code"] = "paley"
    center_embedding: bool = False
    rotation_seed: Seed = 0
    int8_down_proj: bool = False
    output_group: Literal["token", "head"] = added("token")

    @property
    def learning(self) -> Learning:
        """The descent."""
        return Learning(self.steps, self.learning_rate, self.momentum, self.batch_size, self.quantize_weights)

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip widths without a Hadamard matrix, and cells whose loss does not depend on the rotations."""
        shape, rule = architecture, self.odd_hadamard
        reason = fixed_stream(shape, "the learned r1", "take hadamard with r1=none") or constant_loss(
            spec, self.learning
        )
        if reason is not None:
            return reason
        needs_power = (self.r2 and self.init == "random_hadamard") or (
            self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS
        )
        if needs_power and shape.head_dim & (shape.head_dim - 1):
            return f"r2 and r3 need a head_dim that is a power of two, got {shape.head_dim}; use init=haar r3=false"
        if self.init == "random_hadamard":
            reason = no_hadamard(shape.hidden_size, "paley", "init=random_hadamard (hidden_size; haar works)")
        if self.r4:
            reason = reason or no_hadamard(shape.intermediate_size, rule, "r4 (intermediate_size)")
        return reason or self.precision(spec, architecture).skip_reason()

    def layout(self) -> Layout:
        """No split; down_proj may have bits of its own."""
        return Layout(int8_down_proj=self.int8_down_proj, output_per_head=self.output_group == "head")

    def start(self, architecture: Architecture) -> dict[str, Tensor]:
        """Draw the rotations that learning starts from.

        Returns:
            ``residual`` (d, d) and, for every block l, ``l.heads`` (e, e); float64.
        """
        from ptqbench.numerics.orthogonal import generator

        found = {"residual": self._draw(architecture.hidden_size, generator(self.rotation_seed, "learned r1"))}
        for index in range(architecture.n_blocks if self.r2 else 0):
            draws = generator(self.rotation_seed, f"learned r2 {index}")
            found[f"{index}.heads"] = self._draw(architecture.head_dim, draws)
        return found

    def _draw(self, width: int, draws: torch.Generator) -> Tensor:
        from ptqbench.numerics.orthogonal import haar, random_hadamard

        return haar(width, draws) if self.init == "haar" else random_hadamard(width, draws)

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Put the rotations and the online Hadamards together; gradients reach the rotations.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: The rotations by the names of `start`.

        Raises:
            ConfigError: There are no rotations.
        """
        from ptqbench.methods.basis import HadamardBasis

        if bases is None:
            raise ConfigError(
                "transform 'learned_rotation' needs its rotations: learn them first (ptqbench.engine.rotations)"
            )
        return HadamardBasis(
            precision=self.precision(spec, architecture, bases),
            residual=bases["residual"],
            heads=None,
            key=head_hadamard(architecture) if self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS else None,
            mixed_heads=None,
            down=down_transform(architecture, self.odd_hadamard, self.rotation_seed) if self.r4 else None,
            center_embedding=self.center_embedding,
            block_heads=bases if self.r2 else None,
        )


def constant_loss(spec: RunSpec, learning: Learning) -> str | None:
    """Say that the loss of a cell does not depend on rotations, which cancel unless something between them is rounded."""
    bits = spec.bitwidth
    if min(bits.a_bits, bits.k_bits, bits.v_bits) < UNTOUCHED_BITS:
        return None
    if learning.quantize_weights and bits.w_bits < UNTOUCHED_BITS:
        return None
    return (
        f"learned rotations: bitwidth {bits.name} quantizes neither inputs nor keys nor values, so the loss does not "
        "depend on them; set quantize_weights=true"
    )
