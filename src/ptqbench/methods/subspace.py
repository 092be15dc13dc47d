"""The transform of ResQ and CoQuant: important directions of an eigenbasis at high precision.

Sources: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; arXiv 2604.26378 (CoQuant), code
Zachary5895/CoQuant@0e2e343.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS, added
from ptqbench.errors import ConfigError
from ptqbench.methods.layout import Layout
from ptqbench.methods.learned import Count, Momentum, Rate, constant_loss
from ptqbench.methods.transform import Calibrated, FileMatrix, Learning, fixed_stream
from ptqbench.methods.transforms import Bits, Seed, down_transform, no_hadamard

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.models.walk import BlockView
    from ptqbench.numerics.hadamard import OddHadamard

EIGEN = 9.0
"""Operations of a symmetric eigendecomposition over n^3."""
ISO_LOWEST_BITS, ISO_BULK_BITS, ISO_HIGH_BITS = 2, 4, 6
"""ResQ's "4/4/4": equal shares at 2 and 6 bits leave the mean at 4."""

STAND_IN_BITS = 4
ODD_FACTOR = "odd_factor"


@dataclasses.dataclass(frozen=True)
class Subspace(Calibrated):
    """Keep the most important directions at high precision, randomise inside the parts (ResQ, CoQuant).

    Attributes:
        objective: What is diagonalised: ``activation`` second moments (ResQ), or ``joint`` with weight moments (CoQuant).
            ``outlier`` diagonalises and rotates nothing: the high part is the channels of largest magnitude (ResQ's baseline).
        granularity: One basis of the residual stream for the model, per block, or per norm (CoQuant's code has ``joint`` per norm
            alone; the others minimise the mean of the normalised objectives of the inputs that share a basis).
        high_bits: Bits of the important directions.
        high_fraction: Their share of the hidden size and of every head.
        n_samples: Calibration windows behind the bases.
        pre_fuse_compensation: Solve before the norm gain and return behind it (``joint`` and ``per_layer`` alone).
        kv_joint: Weigh values by what reads them and keys by queries (``joint`` alone).
        iso_bits: The least important ``high_fraction`` of directions at 2 bits; with 4-bit bulk and 6 high bits the mean
            stays 4 (``full_shared`` alone).
        odd_hadamard: Rule for the odd factor of down_proj's transform: built, or as in the codes' divisor list.
        center_embedding: Subtract row means from the embedding (on in both codes; changes an RMSNorm model).
        key_rotation_bits: Bits of the online key rotation.
        rope_output_bits: Bits of queries and keys before it.
        basis_change_bits: Bits of the residual stream entering a basis change.
        basis_change_weight_bits: Bits of its stored matrix, on a symmetric grid per output channel; 16 in the codes.
        int8_down_proj: Weight and input of down_proj at 8 bits.
        rotation_seed: Names the random factors, which do not depend on the objective.
        outlier_norm: Magnitude of a channel over the calibration tokens: largest (``linf``) or summed (``l1``).
        output_group: Grids of the input of o: per token and ``head``, or per ``token`` (a grid for each part of all heads).
        learned_rotation: Learn the random factors on the loss of the quantized network (``full_shared`` alone).
        learning_rate: Longest step of that, falling along half a cosine.
        learning_steps: Number of steps, one calibration window each.
        learning_momentum: Share of the velocity kept.
        rotation_file: R1 and R2 as the codes save them (``R-*.bin``: ``R1_0`` to ``R1_2``, ``R2_0`` to ``R2_2`` or one R2 for
            every block), or safetensors with their names; ``odd_factor`` (K, K) may stand beside them, the odd factor of
            down_proj's transform, orthogonal or, as in the codes' tables, sqrt(K) times that. The cell is identified by the
            content, not by the path.
        rotation_digest: Content of that file; filled in when a request is resolved.
        basis_file: U as the codes save it (``U-*.bin``). A ``rotation_file`` may hold these names as well. What no file
            holds is computed and drawn as without files.
        basis_digest: Content of that file; filled in when a request is resolved.
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
    rotation_file: str | None = added(None)
    rotation_digest: str | None = added(None)
    basis_file: str | None = added(None)
    basis_digest: str | None = added(None)
    basis_change_weight_bits: Annotated[int, Field(ge=2, le=UNTOUCHED_BITS)] = added(16)

    FILES: ClassVar[Mapping[str, str]] = {"rotation_file": "rotation_digest", "basis_file": "basis_digest"}
    statistics: ClassVar[Literal["moments"]] = "moments"
    without_effect_on_bases: ClassVar[frozenset[str]] = frozenset(
        {
            "high_bits", "odd_hadamard", "key_rotation_bits", "rope_output_bits", "basis_change_bits", "int8_down_proj",
            "rotation_seed", "output_group", "learned_rotation", "learning_rate", "learning_steps", "learning_momentum",
            "rotation_file", "rotation_digest", "basis_file", "basis_digest", "basis_change_weight_bits",
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
        if self.pre_fuse_compensation and self.granularity != "per_layer":
            raise ConfigError(
                "method.transform: pre_fuse_compensation solves before the gain of one norm and expects granularity=per_layer, "
                f"got {self.granularity}"
            )
        if self.learned_rotation and (self.granularity != "full_shared" or self.objective != "activation"):
            raise ConfigError(
                "method.transform: learned_rotation expects objective=activation and granularity=full_shared, "
                f"got {self.objective} and {self.granularity}"
            )
        if self.learned_rotation and (self.rotation_file is not None or self.rotation_digest is not None):
            raise ConfigError("method.transform: learned_rotation and rotation_file each give R1 and R2; choose one")
        if self.objective == "outlier" and any(
            (self.rotation_file, self.rotation_digest, self.basis_file, self.basis_digest)
        ):
            raise ConfigError(
                "method.transform: objective=outlier rotates nothing; remove rotation_file and basis_file"
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
        fixed = fixed_stream(architecture, f"a {self.granularity} basis", "take none, or hadamard with r1=none")
        if fixed is not None:
            return fixed
        for width in (architecture.hidden_size, architecture.head_dim):
            self.layout().parts(width)
        if self.objective == "outlier" and self.granularity != "per_layer":
            return f"objective=outlier exists only with granularity=per_layer (as in its code), got {self.granularity}"
        bits = spec.bitwidth
        if bits.kv_measure is not None:
            return "bitwidth.kv_measure is not defined for keys and values that a subspace splits into parts"
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

        # The order of the draws is that of `numerics.subspace.random_rotations`: the same seed gives the same factors.
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

    def from_files(self, architecture: Architecture, held: Collection[str]) -> dict[str, FileMatrix]:
        """Take what the files hold: U under the names of the bases, R1 and R2 part by part, the odd factor.

        Raises:
            ConfigError: The files hold nothing of these names.
        """
        found = self._bases_in(architecture, held) | self._rotations_in(architecture, held)
        if ODD_FACTOR in held:
            order = _odd_order(architecture.intermediate_size, self.odd_hadamard)
            found[f"given.{ODD_FACTOR}"] = FileMatrix(ODD_FACTOR, (order, order), table=True)
        if not found:
            raise ConfigError(
                f"method.transform: expected U (layer.0.self_attn.value, ...), R1_1, R2_1 or {ODD_FACTOR} in its files, "
                f"got {sorted(held)[:5]}"
            )
        return found

    def _bases_in(self, architecture: Architecture, held: Collection[str]) -> dict[str, FileMatrix]:
        """All bases of a cell, if the files hold those of any block."""
        if not any(name.startswith("layer.") or name == "attn_mlp" for name in held):
            return {}
        # Names of the codes: one basis of the stream for the model, for a block, or for a norm; values and keys per block.
        hidden, head = (architecture.hidden_size,) * 2, (architecture.head_dim,) * 2
        per_head = (architecture.n_kv_heads, *head)
        streams = {
            "full_shared": {},
            "one_per_decoder": {"residual": "self_attn_mlp"},
            "per_layer": {"attention": "self_attn", "mlp": "mlp"},
        }[self.granularity]
        found = {"residual": FileMatrix("attn_mlp", hidden)} if self.granularity == "full_shared" else {}
        for index in range(architecture.n_blocks):
            found |= {f"{index}.{ours}": FileMatrix(f"layer.{index}.{name}", hidden) for ours, name in streams.items()}
            found[f"{index}.value"] = FileMatrix(f"layer.{index}.self_attn.value", per_head)
            key_shape = head if self.granularity == "full_shared" else per_head
            found[f"{index}.key"] = FileMatrix(f"layer.{index}.self_attn.key_pos", key_shape)
        return found

    def _rotations_in(self, architecture: Architecture, held: Collection[str]) -> dict[str, FileMatrix]:
        """R1 and R2, if the files hold any part of them. The codes number the parts 0 (lowest), 1 (bulk), 2 (high)."""
        if not any(name.rpartition(".")[2].startswith(("R1_", "R2_")) for name in held):
            return {}
        hidden, head = (self.layout().parts(n) for n in (architecture.hidden_size, architecture.head_dim))
        found = {f"given.residual_{i}": FileMatrix(f"R1_{i}", (n, n)) for i, n in enumerate(hidden) if n}
        per_block = any(name.endswith(".R2_1") for name in held)
        for at in range(architecture.n_blocks) if per_block else ("",):
            prefix, ours = (f"model.layers.{at}.self_attn.", f"head_{at}") if per_block else ("", "head")
            found |= {f"given.{ours}_{i}": FileMatrix(f"{prefix}R2_{i}", (n, n)) for i, n in enumerate(head) if n}
        return found

    def low_bits(self, spec: RunSpec) -> int:
        """Bits of the bulk part in the joint objective; they scale it and leave its eigenvectors as they are.

        Where weights and inputs have 16 bits the objective would vanish: 4 bits stand in, as in CoQuant's code.
        """
        bits = min(spec.bitwidth.w_bits, spec.bitwidth.a_bits)
        return bits if bits < UNTOUCHED_BITS else STAND_IN_BITS

    def pass_basis(self, architecture: Architecture) -> Basis:
        """Norms folded: moments are those of what rotations meet."""
        from ptqbench.methods.basis import FoldedBasis

        return FoldedBasis(self.center_embedding, architecture.family)

    @property
    def pass_form(self) -> dict[str, Any]:
        """Folded norms, and perhaps a centred embedding."""
        return {"center_embedding": self.center_embedding}

    def depends_on(self, spec: RunSpec) -> dict[str, Any]:
        """The options that enter the eigenbases; ``facts`` tells them from bases of an earlier format, which held no facts."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.without_effect_on_bases}
        low_bits = self.low_bits(spec) if self.objective == "joint" else None
        return {"transform": options, "low_bits": low_bits, "facts": True}

    def solve_block(self, view: BlockView, spec: RunSpec) -> dict[str, Tensor]:
        """Compute the eigenbases of a block (``methods.eigenbases``)."""
        from ptqbench.methods.eigenbases import eigenbases

        tensors = view.tensors if self.objective == "joint" else {}
        return eigenbases(self, view.moments, tensors, view.architecture, self.low_bits(spec))

    @property
    def shares(self) -> bool:
        """Whether the residual stream of all blocks has one basis."""
        return self.granularity == "full_shared"

    def shared_term(self, view: BlockView) -> Tensor:
        """What both inputs of a block ask of the basis that they share, (d, d)."""
        from ptqbench.methods.eigenbases import stream_objective

        tensors = view.tensors if self.objective == "joint" else {}
        return stream_objective(self, view.moments, tensors, view.architecture.family)

    def solve_model(self, total: Tensor, n_blocks: int) -> dict[str, Tensor]:
        """Diagonalise the mean over all 2 L inputs of the stream."""
        from ptqbench.methods.eigenbases import diagonalised

        return diagonalised("residual", total / (2 * n_blocks))

    def pass_flop(self, architecture: Architecture, tokens: int, forward: float) -> float:
        """Count a pass, the moments of the attention's and the MLP's input, and their eigendecompositions."""
        d = architecture.hidden_size
        return forward + architecture.n_blocks * (2.0 * tokens * d**2 + 2 * EIGEN * d**3)

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
            basis_change_weight_bits=self.basis_change_weight_bits,
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
            precision=self.precision(spec, architecture, bases),
            granularity=self.granularity,
            bases=bases,
            residual_rotation=residual,
            head_rotation=head,
            down=down_transform(architecture, self.odd_hadamard, self.rotation_seed, bases.get(f"given.{ODD_FACTOR}")),
            center_embedding=self.center_embedding,
        )

    def _rotations(
        self, architecture: Architecture, bases: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """R1 of the residual stream and R2 of the heads (one, or one per block where they are learned)."""
        import torch

        from ptqbench.numerics.orthogonal import generator
        from ptqbench.numerics.subspace import random_rotations

        hidden, head = (self.layout().parts(n) for n in (architecture.hidden_size, architecture.head_dim))
        if self.objective == "outlier":
            return torch.eye(sum(hidden), dtype=torch.float64), torch.eye(sum(head), dtype=torch.float64)
        # Where the factors come from: drawn, read from a file, or learned; one R2 for all blocks or one for each.
        source = "given" if f"given.residual_{_first(hidden)}" in bases else "rotation"
        if source == "rotation" and not self.learned_rotation:
            return random_rotations(hidden, head, generator(self.rotation_seed, "subspace"))
        residual = torch.block_diag(*(bases[f"{source}.residual_{i}"] for i, size in enumerate(hidden) if size))
        if f"{source}.head_{_first(head)}" in bases:
            return residual, torch.block_diag(*(bases[f"{source}.head_{i}"] for i, size in enumerate(head) if size))
        blocks = range(architecture.n_blocks)
        own = ([bases[f"{source}.head_{at}_{i}"] for i, size in enumerate(head) if size] for at in blocks)
        return residual, tuple(torch.block_diag(*parts) for parts in own)


def _first(parts: tuple[int, ...]) -> int:
    """Index of the first part that has channels."""
    return next(i for i, size in enumerate(parts) if size)


def _odd_order(width: int, rule: OddHadamard) -> int:
    from ptqbench.numerics.hadamard import factorise_order

    return factorise_order(width, rule)[0]
