"""The shape of a decoder: dimensions, tensor names and parameter counts. Imports neither torch nor transformers.

Covers dense pre-norm decoders with RMSNorm, RoPE, SwiGLU and grouped-query attention: Llama, Qwen2 (bias on q, k, v) and
Qwen3 (RMSNorm on every query and key head). The published shapes of the supported models lie in ``architectures.csv``, so
that a sweep can be planned before anything is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ptqbench.errors import ConfigError

ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Dimensions of a decoder; ``head_dim`` is never derived from ``hidden_size / n_heads`` (Qwen3 differs)."""

    hidden_size: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def q_dim(self) -> int:
        """Width of the concatenated query heads, the input of o_proj."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.n_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name of each linear of a block -> (out_features, in_features)."""
        d, f = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_dim, d),
            "self_attn.k_proj": (self.kv_dim, d),
            "self_attn.v_proj": (self.kv_dim, d),
            "self_attn.o_proj": (d, self.q_dim),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor of a block, without its prefix -> shape."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self.linear_shapes().items()}
        if self.qkv_bias:
            shapes |= {f"{name}.bias": (self.linear_shapes()[name][0],) for name in ATTENTION_INPUT}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        norm = (self.hidden_size,)
        return shapes | {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every tensor of the checkpoint -> shape (no ``lm_head`` when embeddings are tied)."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for block in range(self.n_blocks):
            shapes |= {f"model.layers.{block}.{name}": shape for name, shape in self.block_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def linear_params(self) -> int:
        """Number of weights in the linears of all blocks: what a weight quantizer rounds."""
        return self.n_blocks * sum(rows * columns for rows, columns in self.linear_shapes().values())

    @property
    def total_params(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        biases = self.n_blocks * (self.q_dim + 2 * self.kv_dim) * self.qkv_bias
        norms = (2 * self.n_blocks + 1) * self.hidden_size + 2 * self.n_blocks * self.head_dim * self.qk_norm
        return self.linear_params + self.vocab_size * self.hidden_size * (2 - self.tied_embeddings) + norms + biases


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read the dimensions from a Hugging Face ``config.json``.

    Raises:
        ConfigError: A dimension is missing, or the key/value heads do not divide the query heads.
    """
    kind = config.get("model_type")
    try:
        heads = int(config["num_attention_heads"])
        shape = Architecture(
            hidden_size=int(config["hidden_size"]),
            n_blocks=int(config["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or (128 if kind == "qwen3" else int(config["hidden_size"]) // heads)),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            qk_norm=kind == "qwen3",
        )
    except KeyError as error:
        raise ConfigError(f"config.json of the model has no {error.args[0]!r}") from None
    if shape.n_heads % shape.n_kv_heads:
        raise ConfigError(f"config.json: {shape.n_kv_heads} key/value heads do not divide {shape.n_heads} query heads")
    return shape


def published() -> dict[str, Architecture]:
    """Shapes of the supported public models, by the name used in ``conf/model``."""
    text = resources.files("ptqbench").joinpath("models/architectures.csv").read_text()
    flags = {"tied_embeddings", "qkv_bias", "qk_norm"}
    fields = [f.name for f in dataclasses.fields(Architecture)]
    return {
        row["model"]: Architecture(**{n: row[n] == "true" if n in flags else int(row[n]) for n in fields})  # type: ignore[arg-type]
        for row in csv.DictReader(text.splitlines())
    }
