"""Run a decoder block in stages, so that every linear is executed exactly once while the block is quantized.

A decoder block has four points at which the input of a group of linears is complete:

    norm -> [q, k, v] | attention -> [o] (-> norm) | norm -> [gate, up] | activation -> [down] (-> norm)

Which of the four norms there are is a property of the family (``models.family``).

``staged`` runs an installed transformers block as a generator that yields the input of each group. The caller may then replace
the weights of that group; the block continues with the new weights. Attention (RoPE, query and key norms, grouped queries, the
attention kernel) and the gated activation are the installed modules themselves. Their linears are swapped for modules that play
back outputs already computed, and their output projections for the identity.

A rewritten block (``models.quantized``) may have linears that ``prepare`` their input in their own forward (online transform,
quantizer, order of channels). It may have a pair of ``basis_changes``: the residual stream goes through the first before the
output of o is added, and through the second before that of down. The norms take the stream unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.models.family import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT, Family, family_of
from ptqbench.models.quantized import PlannedLayer, QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Stage:
    """A group of linears with one input. ``adds``: whether their output itself is added to the residual stream."""

    name: str
    linears: tuple[str, ...]
    adds: bool = False


STAGES = (
    Stage("qkv", ATTENTION_INPUT),
    Stage("o", ATTENTION_OUTPUT, adds=True),
    Stage("gate_up", MLP_INPUT),
    Stage("down", MLP_OUTPUT, adds=True),
)


def stages_of(family: Family) -> tuple[Stage, ...]:
    """List the stages of a family's blocks. A linear whose output passes a norm first does not add to the residual stream."""
    through_norm = {"o": family.norms.behind_attention, "down": family.norms.behind_mlp}
    return tuple(
        stage if through_norm.get(stage.name) is None else dataclasses.replace(stage, adds=False) for stage in STAGES
    )


@dataclasses.dataclass(frozen=True)
class StageInput:
    """The tensors at the beginning of a stage.

    Attributes:
        inputs: Input of its linears before ``prepare``, (batch, tokens, in_features).
        residual: The stream that their output will be added to, (batch, tokens, hidden_size), after a basis change; None for
            stages that do not add.
    """

    inputs: Tensor
    residual: Tensor | None


@dataclasses.dataclass(frozen=True)
class Positions:
    """RoPE tables and mask; the same for all windows of one length.

    Attributes:
        rope: cos and sin, each (1, tokens, rotated channels of a head).
        mask: What the installed mask builder returns for unpadded windows; None where the attention kernel is causal by itself.
        others: Index of a block -> the positions of that block, where they differ (sliding windows).
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    others: Mapping[int, Positions] = dataclasses.field(default_factory=dict)

    def of(self, block: nn.Module) -> Positions:
        """Return the positions of a block."""
        attention: Any = block.get_submodule("self_attn")
        return self.others.get(attention.layer_idx, self)


class _Playback(nn.Module):
    """A linear that returns an output computed earlier."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


@contextmanager
def _swapped(module: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: module.get_submodule(name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            module.set_submodule(name, replacement)
        yield
    finally:
        for name, original in originals.items():
            module.set_submodule(name, original)


def _outputs(block: nn.Module, linears: tuple[str, ...], inputs: Tensor) -> dict[str, nn.Module]:
    return {name.split(".")[-1]: _Playback(block.get_submodule(name)(inputs)) for name in linears}


Run = Generator[StageInput | None, None, Tensor]
"""A run of a block: yields the input of each stage (with parking, then None), and returns the stream that leaves the block."""


def staged(block: nn.Module, hidden: Tensor, positions: Positions, park: torch.device | None = None) -> Run:
    """Run a block, pausing where the input of each of the four ``STAGES`` is known.

    Args:
        block: An installed transformers decoder layer of a supported family, stock or rewritten.
        hidden: Residual stream entering the block, (batch, tokens, hidden_size), not modified.
        positions: RoPE tables and mask for this window length.
        park: Device on which tensors wait while the run is paused; None for their own.

    Yields:
        Input and residual of each stage in order; with ``park`` each is followed by a second pause with None, in which the run
        holds nothing on the device.

    Returns:
        The residual stream leaving the block, equal to ``block(hidden, ...)`` bit for bit.
    """
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    norms, positions = family_of_block(block).norms, positions.of(block)
    before_o, before_down = block.basis_changes if isinstance(block, PlannedLayer) else (None, None)
    # x = norm_1(h): the input of q, k, v.
    held = [_normed(block, norms.before_attention, hidden), hidden]
    del hidden
    yield from _pause(held, park, adds=False)
    inputs, hidden = held
    # Attention plays back q, k, v of the (perhaps rounded) linears; without its o_proj it returns the input of o.
    with _swapped(attention, _outputs(block, ATTENTION_INPUT, inputs) | {"o_proj": nn.Identity()}):
        inputs = attention(inputs, position_embeddings=positions.rope, attention_mask=positions.mask)[0]
    held = [inputs, hidden if before_o is None else before_o(hidden)]
    del inputs, hidden
    yield from _pause(held, park, adds=norms.behind_attention is None)
    # h' = change_1(h) + norm_2(o(x)), and x = norm_3(h'): the input of gate and up.
    hidden = held[1] + _normed(block, norms.behind_attention, block.get_submodule(ATTENTION_OUTPUT[0])(held[0]))
    held = [_normed(block, norms.before_mlp, hidden), hidden]
    del hidden
    yield from _pause(held, park, adds=False)
    inputs, hidden = held
    # act(gate) * up, the input of down.
    with _swapped(mlp, _outputs(block, MLP_INPUT, inputs) | {"down_proj": nn.Identity()}):
        inputs = mlp(inputs)
    held = [inputs, hidden if before_down is None else before_down(hidden)]
    del inputs, hidden
    yield from _pause(held, park, adds=norms.behind_mlp is None)
    # out = change_2(h') + norm_4(down(x)).
    output: Tensor = held[1] + _normed(block, norms.behind_mlp, block.get_submodule(MLP_OUTPUT[0])(held[0]))
    return output


def family_of_block(block: nn.Module) -> Family:
    """Find the family of an installed decoder layer."""
    attention: Any = block.get_submodule("self_attn")
    return family_of(attention.config.model_type)


def _normed(block: nn.Module, norm: str | None, hidden: Tensor) -> Tensor:
    """Apply a norm of a block; None is no norm."""
    output: Tensor = hidden if norm is None else block.get_submodule(norm)(hidden)
    return output


def _pause(held: list[Tensor], park: torch.device | None, adds: bool) -> Generator[StageInput | None, None, None]:
    """Yield ``held`` (input, residual) and then, with ``park``, wait with both tensors on that device.

    ``held`` must be the only reference to the tensors, so that parking frees the memory of the device.
    """
    device = held[0].device
    yield StageInput(held[0], held[1] if adds else None)
    if park is not None:
        held[:] = [tensor.to(park) for tensor in held]
        yield None
        held[:] = [tensor.to(device) for tensor in held]


def finish(run: Run) -> Tensor:
    """Run a staged block to its end and return the residual stream that leaves it."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            output: Tensor = stop.value
            return output


def forward(block: nn.Module, hidden: Tensor, positions: Positions) -> Tensor:
    """Run a block in one go. Shapes as in ``staged``."""
    own = positions.of(block)
    output = block(hidden, attention_mask=own.mask, position_embeddings=own.rope)
    return output if isinstance(output, torch.Tensor) else output[0]


def prepared(linear: nn.Module, inputs: Tensor) -> Tensor:
    """Return the factor that is multiplied with the weight of a linear: ``prepare`` of the inputs, or the inputs themselves."""
    return linear.prepare(inputs) if isinstance(linear, QuantizedLinear) else inputs


def behind(block: nn.Module, stage: str, inputs: Tensor, positions: Positions) -> Tensor:
    """Return the output of the module that begins with a stage: the attention for ``qkv``, the MLP for ``gate_up``.

    Args:
        block: An installed decoder layer.
        stage: ``qkv`` or ``gate_up``.
        inputs: Input of its linears, (batch, tokens, hidden_size), not modified.
        positions: RoPE tables and mask for this window length.
    """
    if stage == "qkv":
        attention = block.get_submodule("self_attn")
        own = positions.of(block)
        output: Tensor = attention(inputs, position_embeddings=own.rope, attention_mask=own.mask)[0]
    else:
        output = block.get_submodule("mlp")(inputs)
    return output
