"""Transforms: the basis in which a model is quantized.

A transform says how it splits the axes (``layout``), which grids follow for a cell (``precision``), and in which basis the
checkpoint is loaded (``basis``). The one that ``needs_statistics`` wants eigenbases computed first (``ptqbench.bases``).
Random factors come from ``rotation_seed`` alone: the seed of the cell does not change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.methods.base import Statistic
from ptqbench.methods.precision import Layout, Precision
from ptqbench.spec import UNTOUCHED_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.numerics.hadamard import OddHadamard
    from ptqbench.spec import RunSpec

Bits = Annotated[int, Field(ge=2, le=UNTOUCHED_BITS)]
Seed = Annotated[int, Field(ge=0)]
ISO_LOWEST_BITS, ISO_BULK_BITS, ISO_HIGH_BITS = 2, 4, 6
"""ResQ's "4/4/4": equal shares at 2 and 6 bits leave the mean at 4."""


@dataclasses.dataclass(frozen=True)
class NoTransform:
    """Quantize in the basis of the checkpoint."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    needs_statistics: ClassVar[bool] = False

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Never skip."""
        return None

    def layout(self) -> Layout:
        """Split nothing."""
        return Layout()

    def precision(self, spec: RunSpec, architecture: Architecture) -> Precision:
        """Build the grids of a cell."""
        return Precision(spec, architecture, self.layout())

    def basis(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Basis | None:
        """The checkpoint's own, with quantizers where activations, keys or values are quantized; else None."""
        from ptqbench.methods.basis import PlainBasis

        precision = self.precision(spec, architecture)
        return None if precision.block_plan() is None else PlainBasis(precision)


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """Spread outliers by orthogonal matrices that cancel (QuaRot, arXiv 2404.00456).

    Attributes:
        r1: Rotation of the residual stream: a Hadamard with random signs, a Haar matrix, a bare Hadamard, or none.
        r2: Whether values are rotated per head (fused).
        r3: Whether queries and keys are rotated per head after RoPE (online; installed where keys are quantized).
        r4: Whether the input of down_proj is transformed (online).
        head_mix: ``hadamard`` transforms the input of o across heads (online); ``none`` leaves R2 fully fused.
        odd_hadamard: Rule for the odd factor of R1 and R4: ``paley`` builds it; ``table`` (QuaRot code) and ``as_code``
            (ResQ and CoQuant code) follow the codes' divisor lists. Head mixing always builds it.
        center_embedding: Subtract row means from the embedding (on in the code; changes an RMSNorm model).
        rotation_seed: Names the random factors.
        int8_down_proj: Weight and input of down_proj at 8 bits.
    """

    r1: Literal["random_hadamard", "haar", "hadamard", "none"] = "random_hadamard"
    r2: bool = True
    r3: bool = True
    r4: bool = True
    head_mix: Literal["hadamard", "none"] = "hadamard"
    odd_hadamard: Literal["paley", "table", "as_code"] = "paley"
    center_embedding: bool = False
    rotation_seed: Seed = 0
    int8_down_proj: bool = False

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    needs_statistics: ClassVar[bool] = False

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip widths for which no Hadamard matrix can be built."""
        shape, rule = architecture, self.odd_hadamard
        per_head = self.r2 or (self.r3 and spec.bitwidth.k_bits < UNTOUCHED_BITS)
        if per_head and shape.head_dim & (shape.head_dim - 1):
            return f"r2 and r3 need a head_dim that is a power of two, {spec.model.name} has {shape.head_dim}; set them to false"
        checks: list[tuple[bool, int, OddHadamard, str]] = [
            (
                self.r1 in ("random_hadamard", "hadamard"),
                shape.hidden_size,
                rule,
                f"r1={self.r1} (hidden_size; haar works)",
            ),
            (self.r4, shape.intermediate_size, rule, "r4 (intermediate_size)"),
            (self.head_mix == "hadamard", shape.n_heads, "paley", "head_mix=hadamard (heads)"),
        ]
        objections = (_no_hadamard(order, its_rule, what) for used, order, its_rule, what in checks if used)
        return next((objection for objection in objections if objection is not None), None)

    def layout(self) -> Layout:
        """Split nothing."""
        return Layout(int8_down_proj=self.int8_down_proj)

    def precision(self, spec: RunSpec, architecture: Architecture) -> Precision:
        """Build the grids of a cell."""
        return Precision(spec, architecture, self.layout())

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Draw the rotations.

        Raises:
            UnsupportedError: An order has no Hadamard matrix; `skip_reason` says so beforehand.
        """
        from ptqbench.methods.basis import HadamardBasis
        from ptqbench.numerics.hadamard import hadamard_matrix

        head_dim = architecture.head_dim
        head = hadamard_matrix(head_dim).double().T / head_dim**0.5 if self.r2 or self.r3 else None
        return HadamardBasis(
            precision=self.precision(spec, architecture),
            residual=self._residual(architecture.hidden_size),
            heads=head if self.r2 else None,
            key=head if self.r3 else None,
            mixed_heads=architecture.n_heads if self.head_mix == "hadamard" else None,
            down=_down_transform(architecture, self.odd_hadamard, self.rotation_seed) if self.r4 else None,
            center_embedding=self.center_embedding,
        )

    def _residual(self, width: int) -> Tensor | None:
        import torch

        from ptqbench.numerics.hadamard import hadamard_transform
        from ptqbench.numerics.orthogonal import generator, haar, odd_factor

        draws = generator(self.rotation_seed, "r1")
        if self.r1 == "none":
            return None
        if self.r1 == "haar":
            return haar(width, draws)
        signs = torch.ones(width, dtype=torch.float64)
        if self.r1 == "random_hadamard":
            signs = 2.0 * torch.randint(0, 2, (width,), generator=draws) - 1
        factor = odd_factor(width, self.odd_hadamard, generator(self.rotation_seed, "r1 odd factor"))
        return hadamard_transform(torch.diag(signs.double()), odd_factor=factor)


@dataclasses.dataclass(frozen=True)
class Subspace:
    """Keep the most important directions at high precision, randomise inside the parts (ResQ, CoQuant).

    Attributes:
        objective: What is diagonalised: ``activation`` second moments (ResQ), or ``joint`` with weight moments (CoQuant).
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
    """

    objective: Literal["activation", "joint"] = "activation"
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

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.objective != "joint" and (self.pre_fuse_compensation or self.kv_joint):
            raise ConfigError(
                "method.transform: pre_fuse_compensation and kv_joint belong to objective=joint, "
                f"got objective={self.objective}"
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
        if self.objective == "joint" and self.granularity != "per_layer":
            return f"objective=joint exists only with granularity=per_layer (as in its code), got {self.granularity}"
        if self.objective == "joint" and self.low_bits(spec) >= UNTOUCHED_BITS:
            return "objective=joint weighs rounding noise of weights and inputs: it vanishes where both have 16 bits"
        bits = spec.bitwidth
        if self.iso_bits and {bits.w_bits, bits.a_bits, bits.k_bits, bits.v_bits} - {ISO_BULK_BITS, UNTOUCHED_BITS}:
            return f"iso_bits (2, 4 and 6 bits) is defined for {ISO_BULK_BITS} bits, bitwidth {bits.name} has others"
        return _no_hadamard(
            architecture.intermediate_size, self.odd_hadamard, "down_proj's transform (intermediate_size)"
        )

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
            output_per_head=True,
            basis_changes={"full_shared": 0, "one_per_decoder": 1, "per_layer": 2}[self.granularity],
            basis_change_bits=self.basis_change_bits,
            key_rotation_bits=self.key_rotation_bits,
            rope_output_bits=self.rope_output_bits,
        )

    def precision(self, spec: RunSpec, architecture: Architecture) -> Precision:
        """Build the grids of a cell."""
        return Precision(spec, architecture, self.layout())

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Put eigenbases, random rotations and the Hadamard transform together.

        Args:
            spec: The cell.
            architecture: Dimensions.
            bases: Eigenbases by name, from ``ptqbench.bases.compute_bases``; read when they are needed.

        Raises:
            ConfigError: There are no eigenbases.
        """
        from ptqbench.methods.basis import SubspaceBasis
        from ptqbench.numerics.orthogonal import generator
        from ptqbench.numerics.subspace import random_rotations

        if bases is None:
            raise ConfigError(
                "transform 'subspace' needs eigenbases: compute them first (ptqbench.bases.compute_bases)"
            )
        layout = self.layout()
        residual, head = random_rotations(
            layout.parts(architecture.hidden_size),
            layout.parts(architecture.head_dim),
            generator(self.rotation_seed, "subspace"),
        )
        return SubspaceBasis(
            precision=self.precision(spec, architecture),
            granularity=self.granularity,
            bases=bases,
            residual_rotation=residual,
            head_rotation=head,
            down=_down_transform(architecture, self.odd_hadamard, self.rotation_seed),
            center_embedding=self.center_embedding,
        )


def _no_hadamard(order: int, rule: OddHadamard, what: str) -> str | None:
    """Say why there is no Hadamard matrix of an order, or None."""
    if order & (order - 1) == 0:
        return None
    from ptqbench.numerics.hadamard import factorise_order

    try:
        factorise_order(order, rule)
    except UnsupportedError as error:
        return f"{what}: {error}"
    return None


def _down_transform(architecture: Architecture, rule: OddHadamard, seed: int) -> Callable[[Tensor], Tensor]:
    """Build the transform of down_proj's input, the same for its weight and for the activations that enter it."""
    from functools import partial

    from ptqbench.numerics.hadamard import factorise_order, hadamard_transform
    from ptqbench.numerics.orthogonal import generator, odd_factor

    width = architecture.intermediate_size
    if factorise_order(width, rule) == factorise_order(width, "paley"):
        return hadamard_transform  # the constructed factor is cached on the device
    return partial(hadamard_transform, odd_factor=odd_factor(width, rule, generator(seed, "down odd factor")))
