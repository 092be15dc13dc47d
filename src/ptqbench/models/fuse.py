"""Fold norms and rotations into the tensors of an embedding, a decoder block, or the head.

Objective: the same function of the tokens, in a basis that quantizes better. With row-vector activations every rotation
T cancels: ``W <- W T`` where a linear reads the rotated stream, ``W <- T'^T W`` and ``b <- b T'`` where it writes one.
The gains are folded first, because an RMSNorm commutes with orthogonal maps only if its gain is one.

Shapes: d hidden size; H query and G key/value heads, e head_dim; tensors carry their checkpoint names without prefix:
``weight`` for the embedding, ``norm.weight`` and ``lm_head.weight`` for the head.

Source: arXiv 2404.00456 (QuaRot), 2412.14363 (ResQ); see ``numerics.orthogonal``. Everything is returned in float64:
the caller rounds once, to the data type of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ptqbench.errors import UnsupportedError
from ptqbench.models.family import ATTENTION_INPUT, ATTENTION_OUTPUT, FAMILIES, MLP_INPUT, MLP_OUTPUT, Family, producers
from ptqbench.models.stages import STAGES
from ptqbench.numerics.orthogonal import (
    fold_gain,
    mix_heads,
    rotate_head_inputs,
    rotate_head_outputs,
    rotate_input,
    rotate_output,
)

if TYPE_CHECKING:
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.quantized import BlockPlan

Tensors = dict[str, Tensor]
LLAMA = FAMILIES["llama"]


class Basis(Protocol):
    """An equivalent form of a checkpoint: its changed tensors, and the transforms that run online.

    The embedding and the head receive any subset of the vocabulary rows; each row is changed by itself.
    """

    @property
    def unties(self) -> bool:
        """Whether the output projection of a tied model becomes a matrix of its own."""

    def embedding(self, tensors: Tensors) -> Tensors:
        """Change ``weight`` (rows, d)."""

    def block(self, tensors: Tensors, index: int) -> Tensors:
        """Change the tensors of a decoder block."""

    def head(self, tensors: Tensors) -> Tensors:
        """Change ``norm.weight`` (d,) and ``lm_head.weight`` (rows, d)."""

    def plan(self, index: int) -> BlockPlan | None:
        """Return the online transforms and quantizers to install in a loaded block; None for none."""


@dataclasses.dataclass(frozen=True)
class BlockRotations:
    """The orthogonal maps of one block; None is no map.

    Attributes:
        attention_input: (d, d) basis of the stream that q, k, v read.
        attention_output: (d, d) basis that o_proj writes.
        mlp_input: (d, d) basis that gate and up read.
        mlp_output: (d, d) basis that down_proj writes.
        heads: (e, e) or (G, e, e) rotation of the value heads, undone in o_proj.
        heads_per_kv: H / G.
        mixed_heads: H, if a Hadamard across heads enters the input side of o_proj (an online transform cancels it).
        down: Orthogonal transform of the last axis of the weight of down_proj; its input gets the same transform online.
        output_order: (H e,) order of the columns of o_proj; its input gets the same order online.
    """

    attention_input: Tensor | None = None
    attention_output: Tensor | None = None
    mlp_input: Tensor | None = None
    mlp_output: Tensor | None = None
    heads: Tensor | None = None
    heads_per_kv: int = 1
    mixed_heads: int | None = None
    down: Callable[[Tensor], Tensor] | None = None
    output_order: Tensor | None = None


def fold_norms(tensors: Tensors, family: Family = LLAMA) -> Tensors:
    """Multiply the norm gains of a block into the linears that read the norms; the gains become 1.

    Args:
        tensors: A block, not modified. Norms of queries and keys (before RoPE), and norms behind attention and MLP, are not
            folded: no linear reads their output.
        family: Where the block normalises.

    Returns:
        All tensors of the block, in float64.

    Raises:
        UnsupportedError: The block has other norms than the family.
    """
    found = {name.removesuffix(".weight") for name in tensors if name.endswith("layernorm.weight")}
    if found != set(family.all_norms):
        raise UnsupportedError(f"expected the norms of {family.model_type}, {family.all_norms}, got {sorted(found)}")
    folded = _double(tensors)
    for norm, linears in family.readers.items():
        # W <- W diag(g), g <- 1; the weight of a norm is its gain less ``gain_offset``.
        gain = family.gain_offset + folded[f"{norm}.weight"]
        for linear in linears:
            folded[f"{linear}.weight"] = fold_gain(folded[f"{linear}.weight"], gain)
        folded[f"{norm}.weight"] = torch.full_like(gain, 1 - family.gain_offset)
    return folded


def scale_block(tensors: Tensors, scales: Mapping[str, Tensor], architecture: Architecture) -> Tensors:
    """Divide the inputs of stages by scales in what produces them, and multiply the columns of their linears.

    Args:
        tensors: A block, not modified.
        scales: Stage -> positive scales: (d,) for ``qkv`` and ``gate_up``, (f,) for ``down``, and (G e,) for ``o``, where all query
            heads of a key/value head share them. What is left out stays.
        architecture: Dimensions.

    Returns:
        All tensors of the block, in float64.
    """
    scaled, family = _double(tensors), architecture.family
    readers, from_ = {stage.name: stage.linears for stage in STAGES}, producers(family)
    for stage, given in scales.items():
        # g <- g / s of a norm, whose weight is its gain less ``gain_offset``; W <- diag(1/s) W and b <- b / s of a linear.
        producer = from_[stage]
        offset = family.gain_offset if producer in family.readers else 0.0
        scale = given.to(scaled[f"{producer}.weight"])
        for name in (f"{producer}.weight", f"{producer}.bias"):
            if name in scaled:
                scaled[name] = ((offset + scaled[name]).transpose(0, -1) / scale).transpose(0, -1) - offset
        # W <- W diag(s).
        columns = to_query_heads(scale, architecture) if stage == "o" else scale
        for linear in readers[stage]:
            scaled[f"{linear}.weight"] = scaled[f"{linear}.weight"] * columns
    return scaled


def to_query_heads(channels: Tensor, architecture: Architecture) -> Tensor:
    """Repeat what belongs to the channels of the value heads, (G e,), for every query head that reads them: (H e,)."""
    heads = channels.reshape(architecture.n_kv_heads, 1, architecture.head_dim)
    return heads.expand(-1, architecture.n_heads // architecture.n_kv_heads, -1).flatten()


def by_value_head(channels: Tensor, architecture: Architecture) -> Tensor:
    """Arrange what belongs to the input channels of o, (H e,), by the value channel that they come from: (H / G, G e)."""
    heads = channels.reshape(architecture.n_kv_heads, -1, architecture.head_dim)
    return heads.transpose(0, 1).flatten(1)


def rotate_block(tensors: Tensors, rotations: BlockRotations) -> Tensors:
    """Move a norm-folded block into another basis. The stream of a family with norms behind a linear cannot be rotated.

    Args:
        tensors: A block with unit gains, not modified.
        rotations: The maps; moved to the device of the tensors.

    Returns:
        All tensors of the block, in float64.
    """
    rotated = _double(tensors)
    # W <- W T where a linear reads the stream; W <- T^T W and b <- b T where it writes it.
    _read(rotated, ATTENTION_INPUT, rotations.attention_input)
    _write(rotated, ATTENTION_OUTPUT, rotations.attention_output)
    _read(rotated, MLP_INPUT, rotations.mlp_input)
    _write(rotated, MLP_OUTPUT, rotations.mlp_output)
    # Value heads and o_proj, then the input side of down_proj.
    _rotate_heads(rotated, rotations)
    if rotations.down is not None:
        name = f"{MLP_OUTPUT[0]}.weight"
        rotated[name] = rotations.down(rotated[name])
    return rotated


def rotate_embedding(tensors: Tensors, rotation: Tensor | None, *, center: bool = False) -> Tensors:
    """Move embedding rows into another basis.

    Args:
        tensors: ``weight`` (rows, d), not modified.
        rotation: (d, d), or None.
        center: Subtract the mean of each row first, as the codes do. This changes the function of RMSNorm models.

    Returns:
        ``weight`` in float64.
    """
    weight = tensors["weight"].double()
    if center:
        weight = weight - weight.mean(dim=1, keepdim=True)
    return {"weight": weight if rotation is None else rotate_input(weight, rotation.to(weight.device))}


def rotate_head(tensors: Tensors, rotation: Tensor | None, family: Family = LLAMA) -> Tensors:
    """Fold the final norm into the output projection and let it read the rotated stream.

    Args:
        tensors: ``norm.weight`` (d,) and ``lm_head.weight`` (rows, d), not modified.
        rotation: (d, d), or None.
        family: How the norm computes its gain.

    Returns:
        Both, in float64, with unit gain.
    """
    gain, weight = family.gain_offset + tensors["norm.weight"].double(), tensors["lm_head.weight"].double()
    weight = fold_gain(weight, gain)
    if rotation is not None:
        weight = rotate_input(weight, rotation.to(weight.device))
    return {"norm.weight": torch.full_like(gain, 1 - family.gain_offset), "lm_head.weight": weight}


def part_order(n_heads: int, parts: Sequence[int]) -> Tensor:
    """List head channels part by part: [first part of head 0..H-1 | second part of head 0..H-1 | ...].

    Columns of the weight and activations (after their quantization in head layout) take the same index:
    ``x[..., index] @ weight[:, index].T``.

    Args:
        n_heads: H.
        parts: Widths of the parts of one head, low to high, with sum e; zeros allowed.

    Returns:
        (H e,) int64 permutation.
    """
    channels = torch.arange(n_heads * sum(parts)).reshape(n_heads, sum(parts))
    return torch.cat([piece.flatten() for piece in channels.split(list(parts), dim=1)])


def _double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _read(tensors: Tensors, linears: Sequence[str], rotation: Tensor | None) -> None:
    """Let linears read the stream in a basis."""
    for linear in linears if rotation is not None else ():
        weight = tensors[f"{linear}.weight"]
        tensors[f"{linear}.weight"] = rotate_input(weight, rotation.to(weight.device))  # type: ignore[union-attr]


def _write(tensors: Tensors, linears: Sequence[str], rotation: Tensor | None) -> None:
    """Let linears write the stream in a basis; a bias is written too."""
    for linear in linears if rotation is not None else ():
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in tensors:
                tensors[name] = rotate_output(tensors[name], rotation.to(tensors[name].device))  # type: ignore[union-attr]


def _rotate_heads(tensors: Tensors, rotations: BlockRotations) -> None:
    """Rotate value heads, undo it in o_proj, then mix and reorder o_proj's columns."""
    output, value = f"{ATTENTION_OUTPUT[0]}.weight", ATTENTION_INPUT[2]
    # v <- v T per head; T^T on the columns of o_proj that read the head cancels it.
    if rotations.heads is not None:
        heads = rotations.heads.to(tensors[output].device)
        for name in (f"{value}.weight", f"{value}.bias"):
            if name in tensors:
                tensors[name] = rotate_head_outputs(tensors[name], heads)
        tensors[output] = rotate_head_inputs(tensors[output], heads, rotations.heads_per_kv)
    # A Hadamard across heads on the columns of o_proj; the online transform of its input cancels it.
    if rotations.mixed_heads is not None:
        tensors[output] = mix_heads(tensors[output], rotations.mixed_heads)
    # The columns of o_proj, part by part; the input is reordered online.
    if rotations.output_order is not None:
        tensors[output] = tensors[output][:, rotations.output_order.to(tensors[output].device)]
