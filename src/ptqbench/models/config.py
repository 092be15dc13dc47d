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
from ptqbench.models.family import FULL, SLIDING, Family, family_of

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
    "use_bidirectional_attention": (lambda value: value in (None, False), "false"),
    "final_logit_softcapping": (lambda value: value is None or _positive(value), "null or a positive number"),
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
        UnsupportedError: Another family, a quantized checkpoint, an unknown activation function or rotary embedding, or a trait
            that the installed class would ignore.
    """
    family = family_of(config.get("model_type"))
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            raise UnsupportedError(
                f"it is already quantized ({key} in config.json{_scheme(config[key])}); {SIXTEEN_BITS}"
            )
    for key, effect in FOREIGN_KEYS.items():
        if config.get(key) is not None:
            raise UnsupportedError(f"{key} in config.json {effect}, which is not supported; remove it")
    shape = from_config(config)
    family.check_traits(config)
    _check_values(config, shape)
    _check_rope(config, shape.head_dim, family)


def _scheme(section: Any) -> str:
    """The name of the quantization method of a checkpoint, as far as its configuration says."""
    name = section.get("quant_method") or section.get("format") if isinstance(section, Mapping) else None
    return f": {name}" if name else ""


def _check_values(config: Mapping[str, Any], shape: Architecture) -> None:
    """Check the values that concern neither dimensions nor the kind of attention."""
    key = shape.family.activation
    activation = config.get(key, shape.family.defaults.get(key, "silu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"{key} {activation!r} in config.json is not supported; known: {', '.join(ACTIVATIONS)}")
    other = config.get("hidden_act")
    if key != "hidden_act" and other not in (None, activation):
        raise UnsupportedError(
            f"hidden_act {other!r} in config.json has no effect beside {key} {activation!r}; remove it"
        )
    for key, (fits, expected) in VALUES.items():
        if key in config and not fits(config[key]):
            raise ConfigError(f"config.json: {key} must be {expected}, got {config[key]!r}")
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or not -shape.vocab_size <= padding < shape.vocab_size):
        raise ConfigError(
            f"config.json: pad_token_id must be null or below vocab_size {shape.vocab_size}, got {padding!r}"
        )


def _check_rope(config: Mapping[str, Any], head_dim: int, family: Family) -> None:
    """Refuse rotary embeddings that the class of a family cannot build, or would not read."""
    given = {key: config.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    for key, rope in given.items():
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: {key} must be a mapping, got {rope!r}")
    if family.rope_by_kind:
        _check_rope_by_kind(config, given["rope_parameters"], given["rope_scaling"], head_dim, family)
        return
    key = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    if any(isinstance(value, Mapping) for value in given[key].values()):
        raise UnsupportedError(f"{key} in config.json differs between kinds of attention, which is not supported")
    _check_one_rope(config, given[key], key, head_dim, family)


def _check_rope_by_kind(
    config: Mapping[str, Any], by_kind: Mapping[str, Any], scaling: Mapping[str, Any], head_dim: int, family: Family
) -> None:
    """Check one rotary embedding for each kind of attention; the older ``rope_scaling`` belongs to full attention."""
    if any(kind not in (FULL, SLIDING) or not isinstance(own, Mapping | None) for kind, own in by_kind.items()):
        raise ConfigError(
            f"config.json: rope_parameters must map {FULL!r} and {SLIDING!r} to mappings, got {dict(by_kind)!r}"
        )
    if scaling.get("type") and "rope_type" not in scaling:
        raise UnsupportedError(
            f"type {scaling['type']!r} of rope_scaling in config.json has no effect in the {family.model_type} of transformers; "
            f"call it rope_type"
        )
    theta = {FULL: config.get("rope_theta", 1e6), SLIDING: config.get("rope_local_base_freq", 1e4)}
    for kind, own in theta.items():
        rope = {"rope_theta": own, **(by_kind.get(kind) or {}), **(scaling if kind == FULL else {})}
        _check_one_rope(config, rope, f"rope_parameters of {kind}", head_dim, family)


def _check_one_rope(
    config: Mapping[str, Any], rope: Mapping[str, Any], where: str, head_dim: int, family: Family
) -> None:
    """Check the type of a rotary embedding, the share of a head that it rotates, and its numbers."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = family.rope_types or tuple(ROPE_TYPES)
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"rope_type {kind!r} in config.json is not supported; known: {', '.join(known)}")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1) and not family.partial_rope:
        raise UnsupportedError(
            f"partial_rotary_factor {share!r} in config.json is not supported; only whole heads are rotated"
        )
    rotated = head_dim if share is None else int(head_dim * share) if _positive(share) and share <= 1 else 0
    if rotated % 2 or not rotated:
        raise ConfigError(
            f"config.json: partial_rotary_factor must be a number in (0, 1] that leaves an even share of head_dim {head_dim}, "
            f"got {share!r}"
        )
    missing = next((name for name in ROPE_TYPES[kind] if name not in rope), None)
    if missing is not None:
        raise ConfigError(f"config.json: {where} of type {kind!r} has no {missing!r}")
    # transformers also reads these two beside the mapping: theta where the mapping has none, the other one first.
    numbers = {"rope_theta": config.get("rope_theta", 1e4), **rope}
    if "original_max_position_embeddings" in config:
        numbers["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    _check_rope_numbers(numbers, kind, f"config.json: {where}", rotated)


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
