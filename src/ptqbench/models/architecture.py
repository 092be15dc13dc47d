"""The shape of a decoder: dimensions and tensor names. Imports neither torch nor transformers.

What the supported families differ in is in ``models.family``. ``architectures.csv`` has the published shapes of the supported
models, so that a sweep can be planned before anything is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ptqbench.errors import ConfigError
from ptqbench.models.family import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FULL,
    MLP_INPUT,
    MLP_OUTPUT,
    SLIDING,
    Family,
    family_of,
)

__all__ = ["ATTENTION_INPUT", "ATTENTION_OUTPUT", "MLP_INPUT", "MLP_OUTPUT", "Architecture", "from_config", "published"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Dimensions of a decoder. ``head_dim`` need not be ``hidden_size / n_heads`` (in Qwen3 it is not).

    Attributes:
        model_type: The family.
        attention: What each block attends to, ``full_attention`` or ``sliding_attention``; empty where all attend to everything.
        window: Width of the sliding window in tokens, the own one included.
        rope_free: Which blocks do not rotate queries and keys; empty for none.
    """

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
    model_type: str = "llama"
    attention: tuple[str, ...] = ()
    window: int | None = None
    rope_free: tuple[bool, ...] = ()

    @property
    def family(self) -> Family:
        """What the blocks of its ``model_type`` have in common."""
        return family_of(self.model_type)

    def attends(self, block: int) -> str:
        """What a block attends to: ``full_attention`` or ``sliding_attention``."""
        return self.attention[block] if self.attention else FULL

    def block_kind(self, block: int) -> tuple[str, bool]:
        """What blocks differ in beside their weights: what they attend to, and whether they rotate queries and keys."""
        return self.attends(block), not (self.rope_free and self.rope_free[block])

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
        """Name of each tensor of a loaded block, without its prefix -> shape."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self.linear_shapes().items()}
        biased = (
            ATTENTION_INPUT * self.qkv_bias + ATTENTION_OUTPUT * self.o_bias + (MLP_INPUT + MLP_OUTPUT) * self.mlp_bias
        )
        shapes |= {f"{name}.bias": (self.linear_shapes()[name][0],) for name in biased}
        if self.qk_norm:
            whole = self.family.qk_norm == "all"
            shapes["self_attn.q_norm.weight"] = (self.q_dim if whole else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.kv_dim if whole else self.head_dim,)
        return shapes | {f"{norm}.weight": (self.hidden_size,) for norm in self.family.all_norms}

    def stored_block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor of a block as the checkpoint holds it, with fused linears -> shape."""
        shapes, linears = self.block_shapes(), self.linear_shapes()
        for whole, parts in self.family.fused.items():
            for part in parts:
                del shapes[f"{part}.weight"]
            shapes[f"{whole}.weight"] = (sum(linears[part][0] for part in parts), linears[parts[0]][1])
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every tensor of the checkpoint -> shape, without ``lm_head`` if embeddings are tied."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for block in range(self.n_blocks):
            shapes |= {f"model.layers.{block}.{name}": shape for name, shape in self.stored_block_shapes().items()}
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
        UnsupportedError: The family, or what its blocks attend to, is not supported.
    """
    family = family_of(config.get("model_type"))
    config = {**family.defaults, **config}
    width, heads, blocks = (_size(config, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    qkv_bias, o_bias, mlp_bias = (_flag(config, key) if isinstance(key, str) else key for key in family.biases)
    attention = family.attention(config, blocks)
    windowed = SLIDING in attention
    rope_free = () if family.rope_free is None else family.rope_free(config, blocks)
    shape = Architecture(
        hidden_size=width,
        n_blocks=blocks,
        n_heads=heads,
        n_kv_heads=_kv_heads(config, heads, family),
        head_dim=_head_dim(config, width, heads, family),
        intermediate_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        qk_norm=family.qk_norm != "none",
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        model_type=family.model_type,
        attention=attention if windowed else (),
        window=_size(config, "sliding_window") if windowed else None,
        rope_free=rope_free if any(rope_free) else (),
    )
    if shape.n_heads % shape.n_kv_heads:
        raise ConfigError(f"config.json: {shape.n_kv_heads} key/value heads do not divide {shape.n_heads} query heads")
    if width % heads and family.heads_divide_width:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} does not divide hidden_size {width}, as {family.model_type} requires"
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


def _kv_heads(config: Mapping[str, Any], heads: int, family: Family) -> int:
    """Read the number of key/value heads. Null is the number of query heads."""
    key = "num_key_value_heads"
    if config.get(key) is None and (key in config or family.kv_heads_optional):
        return heads
    return _size(config, key)


def _head_dim(config: Mapping[str, Any], width: int, heads: int, family: Family) -> int:
    """Read ``head_dim``, or take the family's default; else divide the width among the query heads."""
    if "head_dim" not in config or (family.null_head_dim and config["head_dim"] is None):
        return family.head_dim or _size({"head_dim": width // heads}, "head_dim")
    return _size(config, "head_dim")


def published() -> dict[str, Architecture]:
    """Shapes of the supported public models, by the name used in ``conf/model``."""
    text = resources.files("ptqbench").joinpath("models/architectures.csv").read_text()
    flags = {"tied_embeddings", "qkv_bias", "qk_norm"}
    fields = [f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING]
    return {
        row["model"]: Architecture(
            **{n: row[n] == "true" if n in flags else int(row[n]) for n in fields},  # type: ignore[arg-type]
            model_type=row["model_type"],
        )
        for row in csv.DictReader(text.splitlines())
    }
