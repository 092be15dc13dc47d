"""A checkpoint of which only the part in use is in memory: embedding, one decoder block, or the head.

The skeleton is the installed transformers class on the meta device. A part is materialised from safetensors when it is
needed and dropped afterwards, so the resident memory of a pass is one block, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.models.architecture import Architecture, from_config
from ptqbench.models.source import ModelSource
from ptqbench.models.stages import Positions

Overlay = Callable[[int, nn.Module], None]
TensorEdit = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


class BlockwiseModel:
    """A causal language model that loads its parts on demand.

    Attributes:
        architecture: Dimensions.
        dtype: Floating-point type of all weights and of the residual stream.
        device: Where parts are materialised.
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype, device: torch.device, edit: TensorEdit | None = None) -> None:
        """Build the skeleton; no weight is read yet.

        Args:
            source: The checkpoint.
            dtype: Target floating-point type.
            device: Target device.
            edit: Function-preserving change of the tensors of a block (``tensors, block index -> tensors``).
        """
        self.source, self.dtype, self.device, self._edit = source, dtype, device, edit
        self.architecture: Architecture = from_config(source.config)
        self.config: Any = AutoConfig.from_pretrained(source.folder)
        self.config._attn_implementation = "sdpa"
        with init_empty_weights(include_buffers=False):
            self._skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self._skeleton.eval()

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.architecture.n_blocks

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up (batch, tokens) int64 token ids: residual stream (batch, tokens, hidden_size) on the CPU."""
        with self._part("model.embed_tokens") as embedding:
            return embedding(tokens.to(self.device)).cpu()

    def positions(self, n_tokens: int) -> Positions:
        """Build the RoPE tables and the causal mask for windows of ``n_tokens``."""
        probe = torch.empty(1, n_tokens, self.architecture.hidden_size, dtype=self.dtype, device=self.device)
        ids = torch.arange(n_tokens, device=self.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=probe, attention_mask=None, past_key_values=None, position_ids=ids
        )
        rope = self._skeleton.get_submodule("model.rotary_emb").to(self.device)(probe, ids)
        return Positions(rope=rope, mask=mask)

    @contextmanager
    def block(self, index: int, overlay: Overlay | None = None) -> Iterator[nn.Module]:
        """Hold one decoder block in memory; ``overlay`` may replace its weights (quantized ones, say) after loading."""
        with self._part(f"model.layers.{index}") as block:
            if overlay is not None:
                overlay(index, block)
            yield block

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Hold final norm and output projection: a function (..., hidden_size) -> float32 logits (..., vocab_size)."""
        tied = self.architecture.tied_embeddings
        with self._part("model.norm") as norm, self._part("model.embed_tokens" if tied else "lm_head") as output:
            yield lambda hidden: nn.functional.linear(norm(hidden), output.weight).float()

    def materialise(self, overlay: Overlay | None = None) -> PreTrainedModel:
        """Load the whole model on its device, for evaluators that need one; ends the life of this object as a stream."""
        for name in ("model.embed_tokens", "model.norm", *([] if self.architecture.tied_embeddings else ["lm_head"])):
            self._load(name)
        for index in range(self.n_blocks):
            block = self._load(f"model.layers.{index}")
            if overlay is not None:
                overlay(index, block)
        self._skeleton.tie_weights()
        return self._skeleton.to(self.device)  # type: ignore[arg-type, return-value]

    @contextmanager
    def _part(self, name: str) -> Iterator[nn.Module]:
        module = self._load(name)
        try:
            yield module
        finally:
            module.to("meta")

    def _load(self, name: str) -> nn.Module:
        module = self._skeleton.get_submodule(name)
        tensors = self._read(f"{name}.", {key: tuple(value.shape) for key, value in module.state_dict().items()})
        if self._edit is not None and name.startswith("model.layers."):
            tensors = self._edit(tensors, int(name.rsplit(".", 1)[1]))
        placed = {key: value.to(device=self.device, dtype=self.dtype) for key, value in tensors.items()}
        module.load_state_dict(placed, strict=True, assign=True)
        module.requires_grad_(False)
        return module

    def _read(self, prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read tensors by name, each checked for shape and finiteness."""
        shards = self.source.shards
        tensors: dict[str, Tensor] = {}
        for key, shape in shapes.items():
            name = prefix + key
            path = shards.get(name) or shards.get("*")
            if path is None:
                raise ConfigError(f"{self.source.folder}: the weight index has no tensor {name!r}")
            try:
                with safe_open(path, framework="pt") as shard:
                    value: Tensor = shard.get_tensor(name)
            except SafetensorError as error:
                raise ConfigError(f"{path}: cannot read tensor {name!r}: {error}") from None
            if tuple(value.shape) != shape:
                raise ConfigError(f"{path}: tensor {name!r} has shape {tuple(value.shape)}, config.json says {shape}")
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(f"{path}: tensor {name!r} holds NaN or infinity; the checkpoint is damaged")
            tensors[key] = value
        return tensors
