"""Which configurations the block executor models exactly; everything else in a ``config.json`` is refused by name.

The rules are those of transformers 5: its defaults, its older spellings (``rope_scaling`` beside ``rope_parameters``, ``type``
beside ``rope_type``), and the keys that make it load something else than the plain model. Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
"""Type of the rotary embedding -> the parameters that it cannot do without."""
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # fmt: skip


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what the block executor does not model exactly, or transformers cannot build.

    Args:
        config: The content of ``config.json``.

    Raises:
        ConfigError: A value is missing, has the wrong type, or cannot be.
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
    """Name the way a checkpoint was quantized, as far as its configuration says."""
    name = section.get("quant_method") or section.get("format") if isinstance(section, Mapping) else None
    return f": {name}" if name else ""


def _check_values(config: Mapping[str, Any], shape: Architecture) -> None:
    """Check the values that concern neither dimensions nor attention."""
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"hidden_act {activation!r} in config.json is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
        raise ConfigError(f"config.json: rms_norm_eps must be a float in [0, 1), got {epsilon!r}")
    context = config.get("max_position_embeddings", 1)
    if type(context) is not int or context < 1:
        raise ConfigError(f"config.json: max_position_embeddings must be a positive integer, got {context!r}")
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or not -shape.vocab_size <= padding < shape.vocab_size):
        raise ConfigError(
            f"config.json: pad_token_id must be null or below vocab_size {shape.vocab_size}, got {padding!r}"
        )
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"b?float\d+\w*", name)):
            raise ConfigError(
                f"config.json: {key} must be the name of a floating-point type such as 'bfloat16', got {name!r}"
            )


def _check_attention(config: Mapping[str, Any], n_blocks: int) -> None:
    """Refuse blocks that do not attend to every earlier token, as ``layer_types`` or the older keys of Qwen say."""
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
    """Refuse rotary embeddings that transformers cannot build from these parameters, or not for whole heads."""
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
    _check_rope_numbers(
        dict(config), {"rope_theta": config.get("rope_theta", 1e4)} | dict(rope), kind, f"config.json: {key}", head_dim
    )


def _check_rope_numbers(config: dict[str, Any], rope: dict[str, Any], kind: str, where: str, head_dim: int) -> None:
    """Check that every number of a rotary embedding is one, and that the formulas divide by none that is zero."""
    if not _positive(rope["rope_theta"]):
        raise ConfigError(f"{where}: rope_theta must be a positive number, got {rope['rope_theta']!r}")
    if kind == "default":
        return
    rope |= {k: config[k] for k in ("original_max_position_embeddings",) if k in config}
    required = [name for name in ROPE_TYPES[kind] if name in ROPE_NUMBERS and kind != "yarn"]
    for name in ROPE_NUMBERS:
        value = rope.get(name)
        if (value is not None and not _positive(value)) or (value is None and name in required):
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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
