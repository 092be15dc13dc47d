"""The configurations that the block executor models exactly. Everything else in a ``config.json`` is refused by name.

The rules are those of transformers 5: its defaults, its older spellings (``rope_scaling`` beside ``rope_parameters``, ``type``
beside ``rope_type``), and the keys that make it load something else than the plain model. Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.architecture import Architecture, from_config
from ptqbench.models.checkpoint import SIXTEEN_BITS

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6",
               "sigmoid", "tanh", "mish", "hardswish", "leaky_relu", "linear")  # fmt: skip
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
FOREIGN_KEYS = {
    "per_layer_config": "gives blocks different shapes",
    "transformers_weights": "names another weight file",
    "configuration_files": "names another configuration file",
    "fusion_config": "changes the modules of the model",
}
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Type of the rotary embedding -> its required parameters."""
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # fmt: skip


def _typed(*types: type) -> Callable[[Any], bool]:
    """A test whether a value has one of these types exactly, so that true is no integer."""
    return lambda value: type(value) in types


def _is_float_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"b?float\d+\w*", value) is not None)


FLOAT_NAME = "the name of a floating-point type such as 'bfloat16'"
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rms_norm_eps": (lambda value: isinstance(value, float) and 0 <= value < 1, "a float in [0, 1)"),
    "max_position_embeddings": (lambda value: type(value) is int and value > 0, "a positive integer"),
    "dtype": (_is_float_name, FLOAT_NAME),
    "torch_dtype": (_is_float_name, FLOAT_NAME),
    # Other values change what attention sees, or what the model returns.
    "is_causal": (lambda value: value is True, "true"),
    "return_dict": (lambda value: value is True, "true"),
    "is_encoder_decoder": (lambda value: value is False, "false"),
    "output_attentions": (lambda value: value is False, "false"),
    # transformers builds no model with another type, although these have no effect here.
    "bos_token_id": (_typed(int, type(None)), "an integer or null"),
    "eos_token_id": (_typed(int, list, type(None)), "an integer, a list of integers or null"),
    "use_cache": (_typed(bool), "true or false"),
    "initializer_range": (_typed(float), "a float"),
    "attention_dropout": (_typed(int, float, type(None)), "a number or null"),
}
"""Key -> whether transformers and the block executor take a value, and what is expected. Absent keys have a default."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what the block executor does not model exactly, or transformers cannot build.

    Args:
        config: The content of ``config.json``.

    Raises:
        ConfigError: A value is missing, has the wrong type, or is impossible.
        UnsupportedError: Another architecture, a quantized checkpoint, attention within windows, an unknown activation function
            or rotary embedding.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UnsupportedError(f"model_type {kind!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            raise UnsupportedError(
                f"it is already quantized ({key} in config.json{_scheme(config[key])}); {SIXTEEN_BITS}"
            )
    for key, effect in FOREIGN_KEYS.items():
        if config.get(key) is not None:
            raise UnsupportedError(f"{key} in config.json {effect}, which is not supported; remove it")
    shape = from_config(config)
    _check_values(config, shape)
    _check_attention(config, shape.n_blocks)
    _check_rope(config, shape.head_dim)


def _scheme(section: Any) -> str:
    """The name of the quantization method of a checkpoint, as far as its configuration says."""
    name = section.get("quant_method") or section.get("format") if isinstance(section, Mapping) else None
    return f": {name}" if name else ""


def _check_values(config: Mapping[str, Any], shape: Architecture) -> None:
    """Check the values that concern neither dimensions nor the kind of attention."""
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"hidden_act {activation!r} in config.json is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    for key, (fits, expected) in VALUES.items():
        if key in config and not fits(config[key]):
            raise ConfigError(f"config.json: {key} must be {expected}, got {config[key]!r}")
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or not -shape.vocab_size <= padding < shape.vocab_size):
        raise ConfigError(
            f"config.json: pad_token_id must be null or below vocab_size {shape.vocab_size}, got {padding!r}"
        )


def _check_attention(config: Mapping[str, Any], n_blocks: int) -> None:
    """Refuse blocks that do not attend to every earlier token, by ``layer_types`` or by the older keys of Qwen."""
    kinds = config.get("layer_types")
    if kinds is None:
        windowed = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
        first = config.get("max_window_layers", 28)
        if windowed and config["model_type"] != "llama" and not (isinstance(first, int) and first >= n_blocks):
            raise UnsupportedError("it has sliding-window attention (use_sliding_window), which is not supported")
        return
    if not isinstance(kinds, list) or len(kinds) != n_blocks:
        raise ConfigError(
            f"config.json: layer_types must be a list with one entry for each of {n_blocks} blocks, got {kinds!r}"
        )
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    if other is not None:
        raise UnsupportedError(f"layer_types in config.json asks for {other!r}; only 'full_attention' is supported")


def _check_rope(config: Mapping[str, Any], head_dim: int) -> None:
    """Refuse rotary embeddings that transformers cannot build, and those that rotate a part of each head."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: {key} must be a mapping, got {rope!r}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedError(f"{key} in config.json differs between kinds of attention, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope_type {kind!r} in config.json is not supported; known: {', '.join(ROPE_TYPES)}")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise UnsupportedError(
            f"partial_rotary_factor {share!r} in config.json is not supported; only whole heads are rotated"
        )
    missing = next((name for name in ROPE_TYPES[kind] if name not in rope), None)
    if missing is not None:
        raise ConfigError(f"config.json: {key} of type {kind!r} has no {missing!r}")
    # transformers also reads these two beside the mapping: theta where the mapping has none, the other one first.
    numbers = {"rope_theta": config.get("rope_theta", 1e4), **rope}
    if "original_max_position_embeddings" in config:
        numbers["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    _check_rope_numbers(numbers, kind, f"config.json: {key}", head_dim)


def _check_rope_numbers(rope: Mapping[str, Any], kind: str, where: str, head_dim: int) -> None:
    """Check that every number of a rotary embedding is one, and that no formula divides by zero."""
    if not _positive(rope["rope_theta"]):
        raise ConfigError(f"{where}: rope_theta must be a positive number, got {rope['rope_theta']!r}")
    if kind == "default":
        return
    required = ROPE_TYPES[kind] if kind != "yarn" else ()
    for name in ROPE_NUMBERS:
        value = rope.get(name)
        if not _positive(value) and (value is not None or name in required):
            raise ConfigError(f"{where}: {name} must be a positive number, got {value!r}")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = rope[name]
        if not isinstance(values, list) or len(values) != head_dim // 2 or not all(map(_positive, values)):
            raise ConfigError(f"{where}: {name} must be a list of {head_dim // 2} positive numbers (head_dim / 2)")
    if kind == "llama3" and rope["high_freq_factor"] == rope["low_freq_factor"]:
        raise ConfigError(
            f"{where}: high_freq_factor must differ from low_freq_factor, both are {rope['low_freq_factor']!r}"
        )
    if kind == "dynamic" and head_dim == 2:
        raise ConfigError(f"{where}: a dynamic rotary embedding needs a head_dim above 2")


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
