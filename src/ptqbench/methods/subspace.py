"""The transform of ResQ and CoQuant: important directions of an eigenbasis at high precision.

Sources: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; arXiv 2604.26378 (CoQuant), code
Zachary5895/CoQuant@0e2e343.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.methods.base import Statistic
from ptqbench.methods.learned import Count, Learning, Momentum, Rate, constant_loss
from ptqbench.methods.precision import FromLayout, Layout
from ptqbench.methods.transforms import Bits, Seed, down_transform, no_hadamard

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis

ISO_LOWEST_BITS, ISO_BULK_BITS, ISO_HIGH_BITS = 2, 4, 6
"""ResQ's "4/4/4": equal shares at 2 and 6 bits leave the mean at 4."""


@dataclasses.dataclass(frozen=True)
class Subspace(FromLayout):
    """Keep the most important directions at high precision, randomise inside the parts (ResQ, CoQuant).

    Attributes:
        objective: What is diagonalised: ``activation`` second moments (ResQ), or ``joint`` with weight moments (CoQuant).
            ``outlier`` diagonalises and rotates nothing: the high part is the channels of largest magnitude (ResQ's baseline).
        granularity: One basis of the residual stream for the model, per block, or per norm.
        high_bits: Bits of the important directions.
        high_fraction: Their share of the hidden size and of every head.
        n_samples: Calibration windows behind the bases.
        pre_fuse_compensation: Solve before the norm gain and return behind it (``joint`` alone).
        kv_joint: Weigh values by what reads them and keys by queries (``joint`` alone).
        iso_bits: The least important ``high_fraction`` of directions at 2 bits; with 4-bit bulk and 6 high bits the mean
            stays 4 (``full_shared`` alone).
        odd_hadamard: Rule for the odd factor of down_proj's transform: built, or as in the codes' divisor list.
        center_embedding: Subtract row means from the embedding (on in both codes; changes an RMSNorm model).
        key_rotation_bits: Bits of the online key rotation.
        rope_output_bits: Bits of queries and keys before it.
        basis_change_bits: Bits of the residual stream entering a basis change.
        int8_down_proj: Weight and input of down_proj at 8 bits.
        rotation_seed: Names the random factors, which do not depend on the objective.
        outlier_norm: Magnitude of a channel over the calibration tokens: largest (``linf``) or summed (``l1``).
        output_group: Grids of the input of o: per token and ``head``, or per ``token`` (a grid for each part of all heads).
        learned_rotation: Learn the random factors on the loss of the quantized network (``full_shared`` alone).
        learning_rate: Longest step of that, falling along half a cosine.
        learning_steps: Number of steps, one calibration window each.
        learning_momentum: Share of the velocity kept.
    """

    objective: Literal["activation", "joint", "outlier"] = "activation"
    granularity: Literal["full_shared", "one_per_decoder", "per_layer"] = "full_shared"
    high_bits: Bits = 8
    high_fraction: Annotated[float, Field(ge=0, le=1)] = 0.125
    n_samples: Annotated[int, Field(ge=1)] = 512
    pre_fuse_compensation: bool = False
    kv_joint: bool = False
    iso_bits: bool = False
    odd_hadamard: Literal["paley", "as_code"] = "paley"
    center_embedding: bool = False
    key_rotation_bits: Bits = 8
    rope_output_bits: Bits = 8
    basis_change_bits: Bits = 8
    int8_down_proj: bool = False
    rotation_seed: Seed = 0
    outlier_norm: Literal["linf", "l1"] = "linf"
    output_group: Literal["head", "token"] = "head"
    learned_rotation: bool = False
    learning_rate: Rate = 1.5
    learning_steps: Count = 100
    learning_momentum: Momentum = 0.9

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    needs_statistics: ClassVar[bool] = True
    without_effect_on_bases: ClassVar[frozenset[str]] = frozenset(
        {
            "high_bits", "odd_hadamard", "key_rotation_bits", "rope_output_bits", "basis_change_bits", "int8_down_proj",
            "rotation_seed", "output_group", "learned_rotation", "learning_rate", "learning_steps", "learning_momentum",
        }
    )  # fmt: skip
    """Options that cells with the same eigenbases may differ in."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.objective != "joint" and (self.pre_fuse_compensation or self.kv_joint):
            raise ConfigError(
                "method.transform: pre_fuse_compensation and kv_joint belong to objective=joint, "
                f"got objective={self.objective}"
            )
        if self.learned_rotation and (self.granularity != "full_shared" or self.objective != "activation"):
            raise ConfigError(
                "method.transform: learned_rotation expects objective=activation and granularity=full_shared, "
                f"got {self.objective} and {self.granularity}"
            )
        if self.iso_bits and (self.granularity != "full_shared" or self.high_bits != ISO_HIGH_BITS):
            raise ConfigError(
                f"method.transform: iso_bits expects granularity=full_shared and high_bits={ISO_HIGH_BITS}, "
                f"got {self.granularity} and {self.high_bits}"
            )

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip undefined objectives and widths for which no Hadamard matrix can be built.

        Raises:
            UnsupportedError: ``high_fraction`` rounds to no channel of the hidden size or of a head.
        """
        for width in (architecture.hidden_size, architecture.head_dim):
            self.layout().parts(width)
        if self.objective != "activation" and self.granularity != "per_layer":
            return f"objective={self.objective} exists only with granularity=per_layer (as in its code), got {self.granularity}"
        if self.objective == "joint" and self.low_bits(spec) >= UNTOUCHED_BITS:
            return "objective=joint weighs rounding noise of weights and inputs: it vanishes where both have 16 bits"
        bits = spec.bitwidth
        below = [b for b in (bits.w_bits, bits.a_bits, bits.k_bits, bits.v_bits) if b < UNTOUCHED_BITS]
        if self.high_fraction and max(below, default=0) > self.high_bits:
            return (
                f"method.transform.high_bits={self.high_bits} is below the {max(below)} bits of bitwidth {bits.name}: the most "
                f"important directions would get the fewest bits"
            )
        if self.iso_bits and {bits.w_bits, bits.a_bits, bits.k_bits, bits.v_bits} - {ISO_BULK_BITS, UNTOUCHED_BITS}:
            return f"iso_bits (2, 4 and 6 bits) is defined for {ISO_BULK_BITS} bits, bitwidth {bits.name} has others"
        what = "down_proj's transform (intermediate_size)"
        reason = no_hadamard(architecture.intermediate_size, self.odd_hadamard, what)
        if reason is None and self.learning is not None:
            reason = constant_loss(spec, self.learning)
        return reason or self.precision(spec, architecture).skip_reason()

    @property
    def learning(self) -> Learning | None:
        """How the random factors are learned; None if they are not."""
        if not self.learned_rotation:
            return None
        return Learning(self.learning_steps, self.learning_rate, self.learning_momentum, 1, False)

    def start(self, architecture: Architecture) -> dict[str, Tensor]:
        """Draw the factors that learning starts from, which are those used without it.

        Returns:
            For every precision part i that has channels, low to high: ``rotation.residual_i`` and, for every block l,
            ``rotation.head_l_i``; float64, orthogonal.
        """
        from ptqbench.numerics.orthogonal import generator, haar

        draws = generator(self.rotation_seed, "subspace")
        parts = self.layout().parts
        found = {
            f"rotation.residual_{i}": haar(size, draws)
            for i, size in enumerate(parts(architecture.hidden_size))
            if size
        }
        heads = {i: haar(size, draws) for i, size in enumerate(parts(architecture.head_dim)) if size}
        for index in range(architecture.n_blocks):
            found |= {f"rotation.head_{index}_{i}": value for i, value in heads.items()}
        return found

    def low_bits(self, spec: RunSpec) -> int:
        """Bits of the bulk part in the joint objective (they do not change its eigenvectors)."""
        return min(spec.bitwidth.w_bits, spec.bitwidth.a_bits)

    def layout(self) -> Layout:
        """Split the hidden size and every head into two parts (three with ``iso_bits``)."""
        return Layout(
            high_fraction=self.high_fraction,
            high_bits=self.high_bits,
            lowest_fraction=self.high_fraction if self.iso_bits else 0.0,
            lowest_bits=ISO_LOWEST_BITS if self.iso_bits else UNTOUCHED_BITS,
            int8_down_proj=self.int8_down_proj,
            output_per_head=self.output_group == "head",
            # A permutation is no matrix to store.
            basis_changes=0
            if self.objective == "outlier"
            else {"full_shared": 0, "one_per_decoder": 1, "per_layer": 2}[self.granularity],
            basis_change_bits=self.basis_change_bits,
            key_rotation_bits=self.key_rotation_bits,
            rope_output_bits=self.rope_output_bits,
        )

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Put eigenbases, random rotations and the Hadamard transform together.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: Eigenbases by name, from ``ptqbench.engine.bases.compute_bases``; read when they are needed.

        Raises:
            ConfigError: There are no eigenbases.
        """
        from ptqbench.methods.basis import SubspaceBasis

        if bases is None:
            raise ConfigError(
                "transform 'subspace' needs eigenbases: compute them first (ptqbench.engine.bases.compute_bases)"
            )
        residual, head = self._rotations(architecture, bases)
        return SubspaceBasis(
            precision=self.precision(spec, architecture),
            granularity=self.granularity,
            bases=bases,
            residual_rotation=residual,
            head_rotation=head,
            down=down_transform(architecture, self.odd_hadamard, self.rotation_seed),
            center_embedding=self.center_embedding,
        )

    def _rotations(
        self, architecture: Architecture, bases: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """R1 of the residual stream and R2 of the heads (one, or one per block where they are learned)."""
        import torch

        from ptqbench.numerics.orthogonal import block_diag, generator
        from ptqbench.numerics.subspace import random_rotations

        hidden, head = (self.layout().parts(n) for n in (architecture.hidden_size, architecture.head_dim))
        if self.objective == "outlier":
            return torch.eye(sum(hidden), dtype=torch.float64), torch.eye(sum(head), dtype=torch.float64)
        if not self.learned_rotation:
            return random_rotations(hidden, head, generator(self.rotation_seed, "subspace"))
        residual = block_diag([bases[f"rotation.residual_{i}"] for i, size in enumerate(hidden) if size])
        blocks = range(architecture.n_blocks)
        learned = ([bases[f"rotation.head_{at}_{i}"] for i, size in enumerate(head) if size] for at in blocks)
        return residual, tuple(block_diag(parts) for parts in learned)
