"""The shape of a decoder: dimensions and tensor names. Imports neither torch nor transformers.

Covers dense pre-norm decoders with RMSNorm, RoPE, a gated MLP and grouped-query attention: Llama, Qwen2 (bias on q, k, v) and
Qwen3 (RMSNorm on every query and key head). ``architectures.csv`` has the published shapes of the supported models, so that a
sweep can be planned before anything is downloaded.
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
NORM_READERS = {"input_layernorm": ATTENTION_INPUT, "post_attention_layernorm": MLP_INPUT}
"""Norm of a block -> the linears that read its output."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Dimensions of a decoder. ``head_dim`` need not be ``hidden_size / n_heads`` (in Qwen3 it is not)."""

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
    o_bias: bool = False
    mlp_bias: bool = False

    @property
    def q_dim(self) -> int:
        """Width of the concatenated query heads, the input of o_proj."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.n_kv_heads * self.head_dim

    @property
    def useful_threads(self) -> int:
        """How many threads of a CPU the products of a block keep busy.

        Threads of a small product wait for each other longer than they compute, above all where other processes use the cores.
        With one thread per 192 x 192 weights of a square linear, a window of 512 tokens is half a millisecond of work for each.
        """
        return max(1, (self.hidden_size // 192) ** 2)

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
        biased = (
            ATTENTION_INPUT * self.qkv_bias + ATTENTION_OUTPUT * self.o_bias + (MLP_INPUT + MLP_OUTPUT) * self.mlp_bias
        )
        shapes |= {f"{name}.bias": (self.linear_shapes()[name][0],) for name in biased}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        norm = (self.hidden_size,)
        return shapes | {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every tensor of the checkpoint -> shape, without ``lm_head`` if embeddings are tied."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for block in range(self.n_blocks):
            shapes |= {f"model.layers.{block}.{name}": shape for name, shape in self.block_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def linear_params(self) -> int:
        """Number of weights in the linears of all blocks, which a weight quantizer rounds."""
        return self.n_blocks * sum(rows * columns for rows, columns in self.linear_shapes().values())


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read the dimensions from a Hugging Face ``config.json``, with the defaults of the transformers class.

    Raises:
        ConfigError: A dimension is missing, is not a positive integer, or does not fit the others.
    """
    kind = config.get("model_type")
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    attention_bias = kind != "qwen2" and _flag(config, "attention_bias")
    shape = Architecture(
        hidden_size=width,
        n_blocks=_size(config, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, width, heads),
        intermediate_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=kind == "qwen2" or attention_bias,
        qk_norm=kind == "qwen3",
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and _flag(config, "mlp_bias"),
    )
    if shape.n_heads % shape.n_kv_heads:
        raise ConfigError(f"config.json: {shape.n_kv_heads} key/value heads do not divide {shape.n_heads} query heads")
    if kind == "llama" and width % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} does not divide hidden_size {width}, as llama requires"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"config.json: head_dim must be even for rotary embeddings, got {shape.head_dim}")
    return shape


def _size(config: Mapping[str, Any], key: str) -> int:
    """Read a positive integer; neither true nor 4.0 is one."""
    if key not in config:
        raise ConfigError(f"config.json of the model has no {key!r}")
    value = config[key]
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """Read true or false; false where the key is absent."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Read the number of key/value heads. Null is the number of query heads; an absent key is so in Llama, and an error in Qwen."""
    absent_means_heads = config.get("model_type") == "llama" or "num_key_value_heads" in config
    if absent_means_heads and config.get("num_key_value_heads") is None:
        return heads
    return _size(config, "num_key_value_heads")


def _head_dim(config: Mapping[str, Any], width: int, heads: int) -> int:
    """Read ``head_dim``; where it is absent, Qwen3 has 128 and the others divide the width among the query heads."""
    kind = config.get("model_type")
    if "head_dim" not in config or (kind == "llama" and config["head_dim"] is None):
        return 128 if kind == "qwen3" else _size({"head_dim": width // heads}, "head_dim")
    return _size(config, "head_dim")


def published() -> dict[str, Architecture]:
    """Shapes of the supported public models, by the name used in ``conf/model``."""
    text = resources.files("ptqbench").joinpath("models/architectures.csv").read_text()
    flags = {"tied_embeddings", "qkv_bias", "qk_norm"}
    fields = [f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING]
    return {
        row["model"]: Architecture(**{n: row[n] == "true" if n in flags else int(row[n]) for n in fields})  # type: ignore[arg-type]
        for row in csv.DictReader(text.splitlines())
    }
