"""Run a decoder block in stages, so that every linear is executed exactly once while it is being quantized.

A pre-norm decoder block has four points at which the input of a group of linears is complete:

    norm -> [q, k, v] | attention -> [o] | norm -> [gate, up] | activation -> [down]

``staged`` runs an installed transformers block as a generator that yields the input of each group. Between two yields the
caller may replace the weights of the group just announced; the block then continues with them. Attention (RoPE, query and
key norms, grouped queries, the attention kernel) and the gated activation are the installed modules themselves: their
linears are swapped for modules that play back the outputs already computed, and their output projection for the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptqbench.models.architecture import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT


@dataclasses.dataclass(frozen=True)
class Stage:
    """A group of linears that share one input."""

    name: str
    linears: tuple[str, ...]


STAGES = (Stage("qkv", ATTENTION_INPUT), Stage("o", ATTENTION_OUTPUT), Stage("gate_up", MLP_INPUT), Stage("down", MLP_OUTPUT))


@dataclasses.dataclass(frozen=True)
class Positions:
    """What every block needs to know about token positions; the same for all windows of one length.

    ``rope`` holds cos and sin, each (1, tokens, head_dim); ``mask`` is what the installed mask builder returns for
    unpadded causal windows (None where the attention kernel is causal by itself).
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None


class _Playback(nn.Module):
    """Answer with an output computed earlier."""

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


def staged(block: nn.Module, hidden: Tensor, positions: Positions) -> Generator[Tensor, None, Tensor]:
    """Run a block, pausing where the input of each of the four ``STAGES`` is known.

    Args:
        block: An installed transformers decoder layer (Llama, Qwen2 or Qwen3).
        hidden: Residual stream entering the block, (batch, tokens, hidden_size), not modified.
        positions: RoPE tables and mask for this window length.

    Yields:
        The input of each stage in order, (batch, tokens, in_features).

    Returns:
        The residual stream leaving the block, equal to ``block(hidden, ...)`` bit for bit.
    """
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    normed = block.get_submodule("input_layernorm")(hidden)
    yield normed
    with _swapped(attention, _outputs(block, ATTENTION_INPUT, normed) | {"o_proj": nn.Identity()}):
        mixed = attention(normed, position_embeddings=positions.rope, attention_mask=positions.mask)[0]
    yield mixed
    hidden = hidden + block.get_submodule(ATTENTION_OUTPUT[0])(mixed)
    normed = block.get_submodule("post_attention_layernorm")(hidden)
    yield normed
    with _swapped(mlp, _outputs(block, MLP_INPUT, normed) | {"down_proj": nn.Identity()}):
        gated = mlp(normed)
    yield gated
    return hidden + block.get_submodule(MLP_OUTPUT[0])(gated)


def finish(run: Generator[Tensor, None, Tensor]) -> Tensor:
    """Run a staged block to its end and return the residual stream that leaves it."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            output: Tensor = stop.value
            return output


def forward(block: nn.Module, hidden: Tensor, positions: Positions) -> Tensor:
    """Run a block in one go. Shapes as in ``staged``."""
    output = block(hidden, attention_mask=positions.mask, position_embeddings=positions.rope)
    return output if isinstance(output, torch.Tensor) else output[0]
