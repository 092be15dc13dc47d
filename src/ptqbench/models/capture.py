"""Second moments inside a live decoder block: of the inputs of its linears, and of its heads after RoPE.

Objective: ``S = (1/T) sum_t x_t x_t^T`` for the inputs of q_proj and up_proj, for values (bias included) and keys of every
key/value head, and for queries summed over the query heads that read a key/value head.

Shapes: T tokens; d hidden size; G key/value heads, g query heads each, e head_dim; heads arrive as (batch, heads, tokens, e).

Source: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d. Nothing of the modeling code is copied: the installed
attention ends with a call of a registered function with queries and keys after RoPE (and after query and key norms), and a wrapper
of this function reads them. Deviation: sums are float64 (the codes round each window's product to float32).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ptqbench.models.stages import Positions, forward
from ptqbench.numerics.second_moment import MomentSum

_READING, _STOCK = "ptqbench_reading_sdpa", "sdpa"


@dataclasses.dataclass(frozen=True)
class BlockMoments:
    """Second moments per token of one decoder block, float64.

    Attributes:
        attention: Input of q, k, v, (d, d).
        mlp: Input of gate and up, (d, d).
        value: Output of v_proj per key/value head, (G, e, e).
        key: Keys after RoPE per key/value head, (G, e, e).
        query: Queries after RoPE, summed over the query heads of a key/value head, (G, e, e).
        largest: Largest magnitude per channel of ``attention`` and ``mlp`` (d,), ``value`` and ``key`` (G, e).
        mean_abs: Mean magnitude per channel of the same.
    """

    attention: Tensor
    mlp: Tensor
    value: Tensor
    key: Tensor
    query: Tensor
    largest: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    mean_abs: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors under flat names, for a file."""
        flat = {name: getattr(self, name) for name in ("attention", "mlp", "value", "key", "query")}
        for name in ("largest", "mean_abs"):
            flat |= {f"{name}.{key}": value for key, value in getattr(self, name).items()}
        return flat

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> BlockMoments:
        """Rebuild the moments from the result of ``tensors``, on a device."""
        whole: dict[str, Any] = {name: value.to(device) for name, value in tensors.items() if "." not in name}
        for name in ("largest", "mean_abs"):
            prefix = f"{name}."
            whole[name] = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
        return cls(**whole)


class Magnitudes:
    """Running largest and mean magnitude of the channels (last axis) of several tensors."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, name: str, tokens: Tensor) -> None:
        """Add (..., tokens, channels)."""
        size = tokens.detach().abs()
        largest = size.amax(-2).double()
        self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
        self.sums[name] = self.sums.get(name, 0.0) + size.double().sum(-2)
        self.counts[name] += tokens.shape[-2]

    def means(self) -> dict[str, Tensor]:
        """Mean magnitudes by name, float64."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Heads:
    """Running sums over the attention calls of a block."""

    def __init__(self, magnitudes: Magnitudes) -> None:
        self.sums: dict[str, Tensor] = {}
        self.n_tokens = 0
        self.magnitudes = magnitudes

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        n_kv_heads = key.shape[1]
        self.n_tokens += key.shape[0] * key.shape[2]
        for name, heads in (("query", query), ("key", key), ("value", value)):
            # (batch, g G, tokens, e) -> (G, batch * g * tokens, e): all rows of one key/value head.
            grouped = heads.unflatten(1, (n_kv_heads, -1)).transpose(0, 1).flatten(1, 3).double()
            if name != "query":
                self.magnitudes.add(name, grouped)
            # S_k += sum_t x_t x_t^T, in float64.
            product = grouped.mT @ grouped
            self.sums[name] = product if name not in self.sums else self.sums[name] + product

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.n_tokens for name, total in self.sums.items()}


def _read_and_attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    reader: Any = module
    reader.heads_read.add(query, key, value)
    return AttentionInterface()[_STOCK](module, query, key, value, *args, **kwargs)


AttentionInterface.register(_READING, _read_and_attend)


@contextmanager
def _reading(block: nn.Module, moments: dict[str, MomentSum], heads: _Heads) -> Iterator[None]:
    """Add to the sums in every forward of the block. On exit the block is restored."""
    attention: Any = block.get_submodule("self_attn")
    stock = attention.config

    def read(name: str, inputs: Tensor) -> None:
        moments[name].add(inputs)
        heads.magnitudes.add(name, inputs.flatten(0, -2))

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read(name, args[0]))
        for name in moments
    ]
    attention.config = copy.copy(stock)
    attention.config._attn_implementation = _READING
    attention.heads_read = heads
    try:
        yield
    finally:
        attention.config = stock
        del attention.heads_read
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read_moments(
    block: nn.Module, hidden: list[Tensor], positions: Positions, device: torch.device
) -> tuple[BlockMoments, list[Tensor]]:
    """Run a block over all windows and sum its second moments.

    Args:
        block: Installed decoder block with sdpa attention and no plan; unchanged on return.
        hidden: Residual streams entering the block, (batch, tokens, d) each, not modified.
        positions: RoPE tables and mask for this window length.
        device: Where the block lives.

    Returns:
        The moments on the device, and the residual streams leaving the block, each on the device of the one entering it.
    """
    q_proj, up_proj = "self_attn.q_proj", "mlp.up_proj"
    moments = {name: MomentSum(hidden[0].shape[-1], torch.float64) for name in (q_proj, up_proj)}
    magnitudes = Magnitudes()
    heads = _Heads(magnitudes)
    # One forward of every window adds to all sums and gives the stream behind the block.
    with _reading(block, moments, heads):
        leaving = [forward(block, states.to(device), positions).to(states.device) for states in hidden]
    called = {q_proj: "attention", up_proj: "mlp"}
    largest, mean_abs = (
        {called.get(name, name): value for name, value in sizes.items()}
        for sizes in (magnitudes.largest, magnitudes.means())
    )
    sums = heads.means()
    return BlockMoments(
        moments[q_proj].mean(), moments[up_proj].mean(), **sums, largest=largest, mean_abs=mean_abs
    ), leaving  # fmt: skip
