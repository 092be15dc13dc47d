"""The forms in which a checkpoint is loaded: as it is, scaled, with norms folded, Hadamard-rotated, or in eigenbases.

Each class fulfils ``models.fuse.Basis``: it changes the tensors of a checkpoint and plans what runs online. Its matrices are
float64 and are moved to the device of the tensors that they act on.

Sources: arXiv 2404.00456 (QuaRot), 2412.14363 (ResQ), 2604.26378 (CoQuant); codes spcl/QuaRot@5008669,
utkarsh-dmx/project-resq@cb87d0d, Zachary5895/CoQuant@0e2e343.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ptqbench.models.family import ATTENTION_OUTPUT, FAMILIES, MLP_OUTPUT, Family

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.methods.precision import Precision
    from ptqbench.models.fuse import Tensors
    from ptqbench.models.quantized import BlockPlan

Granularity = Literal["full_shared", "one_per_decoder", "per_layer"]


@dataclasses.dataclass(frozen=True)
class PlainBasis:
    """The checkpoint as it is; only quantizers are installed, and where asked for a rotation ``key`` (e, e) of queries and keys."""

    precision: Precision
    key: Tensor | None = dataclasses.field(default=None, kw_only=True)
    unties: ClassVar[bool] = False

    def embedding(self, tensors: Tensors) -> Tensors:
        return tensors

    def block(self, tensors: Tensors, index: int) -> Tensors:
        return tensors

    def head(self, tensors: Tensors) -> Tensors:
        return tensors

    def plan(self, index: int) -> BlockPlan | None:
        return self.precision.at(index).block_plan(key_rotation=_for_all_heads(self.key, self.precision))


def clip_name(linear: str) -> str:
    """Name of the clip thresholds of a linear among the bases of a block."""
    return f"clip_{linear.rpartition('.')[2]}"


@dataclasses.dataclass(frozen=True)
class ScaledBasis(PlainBasis):
    """Channels divided by scales where they are produced, columns multiplied by them where they are read; nothing runs online.

    Attributes:
        bases: ``l.STAGE`` of block l, see `ptqbench.models.fuse.scale_block`, and clip thresholds; may read from disk.
        stages: Inputs that are scaled.
        clipped: Linears whose scaled weights are clipped, each with its thresholds ``l.clip_NAME`` (rows, groups).
    """

    bases: Mapping[str, Tensor]
    stages: tuple[str, ...]
    clipped: tuple[str, ...] = ()

    def block(self, tensors: Tensors, index: int) -> Tensors:
        """Scale the inputs of stages, then clip."""
        from ptqbench.models.fuse import scale_block
        from ptqbench.numerics.awq import clamped

        scales = {stage: self.bases[f"{index}.{stage}"] for stage in self.stages}
        scaled = scale_block(tensors, scales, self.precision.architecture)
        for linear in self.clipped:
            name, thresholds = f"{linear}.weight", self.bases[f"{index}.{clip_name(linear)}"]
            size = self.precision.spec.bitwidth.group_size or scaled[name].shape[1]
            scaled[name] = clamped(scaled[name], thresholds.to(scaled[name]), size)
        return scaled


class _Folded:
    """A basis with norm gains folded into the linears behind them; the stream enters and leaves the blocks in one basis each.

    Attributes:
        center_embedding: Whether row means are subtracted from the embedding.
    """

    center_embedding: bool
    unties: ClassVar[bool] = True

    def entering(self) -> Tensor | None:
        """T (d, d) of the stream that the first block reads, or None."""
        return None

    def leaving(self) -> Tensor | None:
        """T (d, d) of the stream that the head reads, or None."""
        return None

    def embedding(self, tensors: Tensors) -> Tensors:
        """Rotate rows into the basis of the first block."""
        from ptqbench.models.fuse import rotate_embedding

        return rotate_embedding(tensors, self.entering(), center=self.center_embedding)

    def head(self, tensors: Tensors) -> Tensors:
        """Fold the final norm and read the stream in the basis behind the last block."""
        from ptqbench.models.fuse import rotate_head

        return rotate_head(tensors, self.leaving(), self._family())

    def _family(self) -> Family:
        """Where the blocks normalise, and how."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FoldedBasis(_Folded):
    """Norm gains folded and nothing else: the stream that bases are computed from.

    Attributes:
        center_embedding: Whether row means are subtracted from the embedding.
        family: Where the blocks of the checkpoint normalise.
    """

    center_embedding: bool = False
    family: Family = FAMILIES["llama"]

    def _family(self) -> Family:
        return self.family

    def block(self, tensors: Tensors, index: int) -> Tensors:
        from ptqbench.models.fuse import fold_norms

        return fold_norms(tensors, self.family)

    def plan(self, index: int) -> BlockPlan | None:
        return None


@dataclasses.dataclass(frozen=True)
class HadamardBasis(_Folded):
    """QuaRot: one rotation of the residual stream, one of all heads, and online Hadamard transforms.

    Attributes:
        precision: Grids.
        residual: R1 (d, d), or None.
        heads: R2 (e, e), or None.
        key: R3 (e, e), or None.
        mixed_heads: H where heads are mixed by a Hadamard, or None.
        down: R4, the transform of down_proj's input channels, or None.
        center_embedding: Whether row means are subtracted from the embedding.
        block_heads: R2 of block l under ``l.heads`` (e, e) in place of ``heads``; None for one matrix everywhere.
        online_dtype: Arithmetic of the online transforms of o and down: ``float32`` (float64 for a float64 model), or
            ``model``.
    """

    precision: Precision
    residual: Tensor | None
    heads: Tensor | None
    key: Tensor | None
    mixed_heads: int | None
    down: Callable[[Tensor], Tensor] | None
    center_embedding: bool
    block_heads: Mapping[str, Tensor] | None = None
    online_dtype: Literal["float32", "model"] = "float32"

    def _family(self) -> Family:
        return self.precision.architecture.family

    def entering(self) -> Tensor | None:
        return self.residual

    def leaving(self) -> Tensor | None:
        return self.residual

    def block(self, tensors: Tensors, index: int) -> Tensors:
        """Fold norms, then rotate by R1, R2, head mixing and R4."""
        from ptqbench.models.fuse import BlockRotations, fold_norms, rotate_block

        shape, residual = self.precision.architecture, self.residual
        # R1 on both sides of the stream, R2 between v and o, the head mixing before o, R4 before down.
        rotations = BlockRotations(
            attention_input=residual,
            attention_output=residual,
            mlp_input=residual,
            mlp_output=residual,
            heads=self.heads if self.block_heads is None else self.block_heads[f"{index}.heads"],
            heads_per_kv=shape.n_heads // shape.n_kv_heads,
            mixed_heads=self.mixed_heads,
            down=self.down,
        )
        return rotate_block(fold_norms(tensors, self._family()), rotations)

    def plan(self, index: int) -> BlockPlan | None:
        """Online transforms of o and down, R3 on keys and queries, quantizers."""
        from functools import partial

        from ptqbench.numerics.orthogonal import mix_heads

        # Each online transform of an input cancels the same transform in the weight.
        online: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.mixed_heads is not None:
            online[ATTENTION_OUTPUT[0]] = partial(mix_heads, n_heads=self.mixed_heads)
        if self.down is not None:
            online[MLP_OUTPUT[0]] = self.down
        if self.online_dtype == "model":
            online = {name: partial(_in_own_type, transform) for name, transform in online.items()}
        return self.precision.at(index).block_plan(online, _for_all_heads(self.key, self.precision))


def _for_all_heads(rotation: Tensor | None, precision: Precision) -> Tensor | None:
    return None if rotation is None else rotation.expand(precision.architecture.n_kv_heads, -1, -1)


def _in_own_type(transform: Callable[..., Tensor], x: Tensor) -> Tensor:
    return transform(x, dtype=x.dtype)


@dataclasses.dataclass(frozen=True)
class SubspaceBasis(_Folded):
    """ResQ and CoQuant: T = U R, an eigenbasis U randomised inside each precision part by R.

    Attributes:
        precision: Grids.
        granularity: Which blocks share a basis of the residual stream.
        bases: Name -> U, see `eigenbases`; may read from disk. The shared one is ``residual``; those of block l are
            ``l.attention`` and ``l.mlp``, or ``l.residual`` for both; ``l.value`` (G, e, e); ``l.key`` (G, e, e) or (e, e).
        residual_rotation: R1 (d, d).
        head_rotation: R2 (e, e), or one for every block.
        down: Online transform of down_proj's input channels.
        center_embedding: Whether row means are subtracted from the embedding.
    """

    precision: Precision
    granularity: Granularity
    bases: Mapping[str, Tensor]
    residual_rotation: Tensor
    head_rotation: Tensor | tuple[Tensor, ...]
    down: Callable[[Tensor], Tensor]
    center_embedding: bool

    def _family(self) -> Family:
        return self.precision.architecture.family

    def entering(self) -> Tensor:
        return self.attention_basis(0)

    def leaving(self) -> Tensor:
        return self.attention_basis(self.precision.architecture.n_blocks)

    def attention_basis(self, index: int) -> Tensor:
        """T (d, d) of the stream that block ``index`` reads, or that the head reads behind the last block.

        Behind the last block no basis was computed (unless all share one), and the stream is in that of R1 alone.
        """
        if self.granularity == "full_shared":
            return self._rotated("residual")
        if index == self.precision.architecture.n_blocks:
            return self.residual_rotation
        return self._rotated(f"{index}.{'residual' if self.granularity == 'one_per_decoder' else 'attention'}")

    def mlp_basis(self, index: int) -> Tensor:
        """T (d, d) of the stream that the MLP of block ``index`` reads."""
        return self._rotated(f"{index}.mlp") if self.granularity == "per_layer" else self.attention_basis(index)

    def value_basis(self, index: int) -> Tensor:
        """T (G, e, e) of the values of a block."""
        return self._head(index, "value")

    def key_basis(self, index: int) -> Tensor:
        """T (G, e, e) of the keys of a block after RoPE."""
        return self._head(index, "key")

    def _rotated(self, name: str) -> Tensor:
        basis = self.bases[name]
        return basis @ self.residual_rotation.to(basis.device)

    def _head(self, index: int, name: str) -> Tensor:
        basis, rotation = self.bases[f"{index}.{name}"], self.head_rotation
        rotation = rotation[index] if isinstance(rotation, tuple) else rotation
        return (basis @ rotation.to(basis.device)).expand(self.precision.architecture.n_kv_heads, -1, -1)

    def block(self, tensors: Tensors, index: int) -> Tensors:
        """Fold norms, rotate the streams and the value heads, reorder o's columns, transform down_proj's."""
        from ptqbench.models.fuse import BlockRotations, fold_norms, rotate_block

        shape = self.precision.architecture
        # A linear reads the stream in the basis of its own norm and writes it in that of the next one.
        attention, mlp = self.attention_basis(index), self.mlp_basis(index)
        rotations = BlockRotations(
            attention_input=attention,
            attention_output=mlp,
            mlp_input=mlp,
            mlp_output=self.attention_basis(index + 1),
            heads=self.value_basis(index),
            heads_per_kv=shape.n_heads // shape.n_kv_heads,
            down=self.down,
            output_order=self.precision.output_order(),
        )
        return rotate_block(fold_norms(tensors, self._family()), rotations)

    def plan(self, index: int) -> BlockPlan | None:
        """Online Hadamard of down, order of o, key rotation, residual basis changes, quantizers."""
        # Between two norms the residual stream changes its basis: h <- h T^T T'.
        first = second = None
        if self.granularity != "full_shared":
            here = self.mlp_basis(index)
            following = self.attention_basis(index + 1).to(here.device)
            second = here.mT @ following
            if self.granularity == "per_layer":
                first = self.attention_basis(index).mT @ here
        return self.precision.at(index).block_plan({MLP_OUTPUT[0]: self.down}, self.key_basis(index), (first, second))
