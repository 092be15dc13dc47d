"""What the decoder families differ in, as data and small functions. Imports neither torch nor transformers.

A family is one ``model_type`` of transformers: dense decoders with RMSNorm, RoPE, a gated MLP and grouped-query attention, whose
blocks are

    h' = h + N2(attention(N1(h)));    out = h' + N4(mlp(N3(h')))

Each of the four norms may be absent. The rules are those of the installed classes; a key that the class of a family ignores is
refused where it would ask for another function (``TRAITS``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ptqbench.errors import ConfigError, UnsupportedError

ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)

FULL, SLIDING = "full_attention", "sliding_attention"
"""What a block attends to: every earlier token, or those within the sliding window."""

TRAITS = (
    "attention_bias", "mlp_bias", "lm_head_bias", "use_sliding_window", "sliding_window", "no_rope_layers",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "use_qk_norm", "qk_layernorm",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "rope_local_base_freq",
    "num_experts", "num_local_experts",
)  # fmt: skip
"""Keys that change the function of some decoders. Null, false and zero ask for nothing."""


TEXT_PARTS = {"gemma3": "gemma3_text"}
"""``model_type`` of a model of images and texts -> that of its text part, which is supported."""
OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "compression_config", "per_layer_config",
                "transformers_weights", "configuration_files", "fusion_config")  # fmt: skip
"""Keys of such a model that count for its text part."""


@dataclasses.dataclass(frozen=True)
class Norms:
    """Names of the norms of a block; None where there is none."""

    before_attention: str | None = "input_layernorm"
    behind_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    behind_mlp: str | None = None


Config = Mapping[str, Any]
Kinds = tuple[str, ...]


def _every_token(config: Config, n_blocks: int) -> Kinds:
    """Every block attends to every earlier token; a ``layer_types`` that says otherwise is refused."""
    kinds = _listed_kinds(config, n_blocks)
    other = next((kind for kind in kinds or () if kind != FULL), None)
    if other is not None:
        raise UnsupportedError(f"layer_types in config.json asks for {other!r}; only 'full_attention' is supported")
    return (FULL,) * n_blocks


def _one_window(config: Config, n_blocks: int) -> Kinds:
    """Mistral and Phi-3: every block has the window, if there is one. The classes ignore ``layer_types``."""
    kinds = (FULL if config.get("sliding_window") is None else SLIDING,) * n_blocks
    listed = _listed_kinds(config, n_blocks)
    if listed is not None and listed != kinds:
        raise UnsupportedError(
            f"layer_types in config.json differs from sliding_window {config.get('sliding_window')!r}, which "
            f"{config['model_type']} applies to every block; remove one of them"
        )
    return kinds


def _later_windows(config: Config, n_blocks: int) -> Kinds:
    """Qwen: the blocks from ``max_window_layers`` on, if ``use_sliding_window`` says so."""
    on, first = bool(config.get("use_sliding_window")), config.get("max_window_layers")
    if type(first) is not int:
        raise ConfigError(f"config.json: max_window_layers must be an integer, got {first!r}")
    listed = _listed_kinds(config, n_blocks)
    if listed and SLIDING in listed and not on:
        raise ConfigError(f"config.json: layer_types asks for {SLIDING!r}, but use_sliding_window is not true")
    on = on and config.get("sliding_window") is not None
    return listed or tuple(SLIDING if on and index >= first else FULL for index in range(n_blocks))


def _windows_without_rope(config: Config, n_blocks: int) -> Kinds:
    """SmolLM3: the blocks without RoPE, if ``use_sliding_window`` says so."""
    on = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    listed = _listed_kinds(config, n_blocks)
    return listed or tuple(SLIDING if on and free else FULL for free in without_rope(config, n_blocks))


def _all_but_every_sixth(config: Config, n_blocks: int) -> Kinds:
    """Gemma 3: every block but each sixth (``sliding_window_pattern``)."""
    period = config.get("sliding_window_pattern", 6)
    if type(period) is not int or period < 1:
        raise ConfigError(f"config.json: sliding_window_pattern must be a positive integer, got {period!r}")
    listed = _listed_kinds(config, n_blocks)
    return listed or tuple(SLIDING if (index + 1) % period else FULL for index in range(n_blocks))


def _listed_kinds(config: Config, n_blocks: int) -> Kinds | None:
    """Read ``layer_types``; None where it is null or absent."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != n_blocks:
        raise ConfigError(
            f"config.json: layer_types must be a list with one entry for each of {n_blocks} blocks, got {kinds!r}"
        )
    other = next((kind for kind in kinds if kind not in (FULL, SLIDING)), None)
    if other is not None:
        raise UnsupportedError(
            f"layer_types in config.json asks for {other!r}; only {FULL!r} and, in some families, {SLIDING!r} are supported"
        )
    return tuple(kinds)


def without_rope(config: Config, n_blocks: int) -> tuple[bool, ...]:
    """Which blocks of SmolLM3 do not rotate queries and keys: those with 0 in ``no_rope_layers``, else every fourth."""
    listed, period = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if listed is None:
        if type(period) is not int or period < 1:
            raise ConfigError(f"config.json: no_rope_layer_interval must be a positive integer, got {period!r}")
        return tuple((index + 1) % period == 0 for index in range(n_blocks))
    if not isinstance(listed, list) or len(listed) < n_blocks or any(rotates not in (0, 1) for rotates in listed):
        raise ConfigError(
            f"config.json: no_rope_layers must be a list of 0 and 1 with an entry for each of {n_blocks} blocks, got {listed!r}"
        )
    return tuple(not rotates for rotates in listed[:n_blocks])


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``. The defaults are Llama's.

    Attributes:
        model_type: Its name in ``config.json``.
        defaults: Defaults of its configuration class for keys that published checkpoints leave out.
        norms: Where a block normalises.
        gain_offset: An RMSNorm multiplies by ``gain_offset + weight``.
        qk_norm: RMSNorm of queries and keys before RoPE: none, one per ``head``, or one of ``all`` heads together.
        biases: Whether q, k, v (first), o, and the linears of the MLP have a bias: always, never, or as a key says.
        fused: Linear of the installed class -> the linears that it holds, row by row. They are loaded and rounded one by one.
        head_dim: ``head_dim`` where the key is absent; None divides the width among the query heads.
        null_head_dim: Whether a null ``head_dim`` is the same as an absent one.
        kv_heads_optional: Whether an absent ``num_key_value_heads`` is the number of query heads; else it is an error.
        heads_divide_width: Whether the class wants a hidden size that is a multiple of the number of query heads.
        activation: Key of the activation function.
        attention: Configuration and number of blocks -> what each block attends to.
        rope_free: Configuration and number of blocks -> which blocks do not rotate queries and keys; None for no block.
        rope_types: Types of rotary embedding that are supported; None for all that transformers has.
        rope_by_kind: Whether the blocks with a sliding window have a rotary embedding of their own.
        partial_rope: Whether a part of each head may be rotated (``partial_rotary_factor``).
        scales_embedding: Whether the installed embedding multiplies its rows (``embed_scale``).
        caps_logits: Whether ``final_logit_softcapping`` bounds the logits.
        traits: Those of ``TRAITS`` that the class honours; None for a family whose configuration may hold keys of others.
    """

    model_type: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norms: Norms = Norms()
    gain_offset: float = 0.0
    qk_norm: Literal["none", "head", "all"] = "none"
    biases: tuple[bool | str, bool | str, bool | str] = ("attention_bias", "attention_bias", "mlp_bias")
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    null_head_dim: bool = False
    kv_heads_optional: bool = False
    heads_divide_width: bool = False
    activation: str = "hidden_act"
    attention: Callable[[Config, int], Kinds] = _every_token
    rope_free: Callable[[Config, int], tuple[bool, ...]] | None = None
    rope_types: tuple[str, ...] | None = None
    rope_by_kind: bool = False
    partial_rope: bool = False
    scales_embedding: bool = False
    caps_logits: bool = False
    traits: tuple[str, ...] | None = None

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Norm of a block -> the linears that read its output, and that its gain folds into."""
        norms = self.norms
        pairs = ((norms.before_attention, ATTENTION_INPUT), (norms.before_mlp, MLP_INPUT))
        return {norm: linears for norm, linears in pairs if norm is not None}

    @property
    def all_norms(self) -> tuple[str, ...]:
        """Names of the norms of a block that are as wide as the residual stream."""
        return tuple(norm for norm in dataclasses.astuple(self.norms) if norm is not None)

    @property
    def writes_through_norm(self) -> str | None:
        """The first norm between a linear and the residual stream that it writes; None where linears write it directly."""
        return self.norms.behind_attention or self.norms.behind_mlp

    def check_traits(self, config: Config) -> None:
        """Refuse what a configuration asks for and the installed class ignores.

        Raises:
            UnsupportedError: Such a key is neither null, false nor zero.
        """
        ignored = () if self.traits is None else sorted(set(TRAITS) - set(self.traits))
        key = next((key for key in ignored if config.get(key)), None)
        if key is not None:
            raise UnsupportedError(
                f"{key} {config[key]!r} in config.json has no effect in the {self.model_type} of transformers, so the model would "
                f"not be the one that was trained; remove it if it is not meant"
            )


QWEN = {"sliding_window": 4096, "max_window_layers": 28}
GEMMA3 = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 4096, "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
NO_BIAS = (False, False, False)
ATTENTION_BIAS = ("attention_bias", "attention_bias", False)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", null_head_dim=True, kv_heads_optional=True, heads_divide_width=True),
        Family("qwen2", QWEN, biases=(True, False, False), attention=_later_windows),
        Family("qwen3", QWEN, biases=ATTENTION_BIAS, qk_norm="head", head_dim=128, attention=_later_windows),
        Family(
            "mistral", {"sliding_window": 4096}, biases=NO_BIAS, null_head_dim=True, attention=_one_window,
            traits=("sliding_window",),
        ),
        Family(
            "smollm3", {"tie_word_embeddings": True}, attention=_windows_without_rope, rope_free=without_rope,
            traits=("attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "no_rope_layers"),
        ),
        Family(
            "phi3", biases=NO_BIAS, kv_heads_optional=True, attention=_one_window, partial_rope=True,
            fused={"self_attn.qkv_proj": ATTENTION_INPUT, "mlp.gate_up_proj": MLP_INPUT},
            rope_types=("default", "longrope"), traits=("sliding_window",),
        ),
        Family(
            "gemma3_text", GEMMA3,
            norms=Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            gain_offset=1.0, qk_norm="head", biases=ATTENTION_BIAS, head_dim=256, heads_divide_width=True,
            activation="hidden_activation", attention=_all_but_every_sixth, rope_types=("default", "linear"), rope_by_kind=True,
            scales_embedding=True, caps_logits=True,
            traits=("attention_bias", "sliding_window", "query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq"),
        ),
        Family(
            "olmo2", norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), qk_norm="all",
            biases=ATTENTION_BIAS, kv_heads_optional=True, traits=("attention_bias",),
        ),
    )
}  # fmt: skip
"""Every supported family by its ``model_type``."""


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``config.json`` says about the text model: all of it, or one section in a model of images and texts.

    Raises:
        ConfigError: The section is no mapping, or of another family.
        UnsupportedError: It asks for what the class of the whole model ignores.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        return dict(config)
    section, meant = config.get("text_config") or {}, TEXT_PARTS[kind]
    given = section.get("model_type", meant) if isinstance(section, Mapping) else section
    if given != meant:
        raise ConfigError(
            f"config.json: text_config of a {kind} model must be a mapping with model_type {meant!r}, got {given!r}"
        )
    if section.get("final_logit_softcapping") is not None:
        raise UnsupportedError(
            f"final_logit_softcapping in text_config has no effect in the {kind} of transformers; remove it"
        )
    own = {key: value for key, value in section.items() if key not in OF_THE_WHOLE}
    whole = {key: config[key] for key in OF_THE_WHOLE if key in config}
    return {**FAMILIES[meant].defaults, **own, **whole, "model_type": meant}


def text_name(name: str) -> str | None:
    """Return the name of a tensor of a model of images and texts in its text part; None for a tensor of the other parts."""
    for prefix, short in (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.", ""),
    ):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name if name.startswith("lm_head.") else None


def family_of(model_type: Any) -> Family:
    """Find a family.

    Raises:
        UnsupportedError: It is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(f"model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def producers(family: Family) -> dict[str, str]:
    """Stage -> what produces its input channel by channel: a norm or a linear. Without a norm before it, a stage has none."""
    norms = {"qkv": family.norms.before_attention, "gate_up": family.norms.before_mlp}
    return {stage: norm for stage, norm in norms.items() if norm} | {"o": ATTENTION_INPUT[2], "down": MLP_INPUT[1]}
