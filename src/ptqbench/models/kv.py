"""Fake quantization of keys and values inside attention, through the attention registry of transformers.

The installed attention module ends with a call of a registered function with queries and keys after RoPE. A key rotation and
the key and value quantizers belong there. ``ptqbench_sdpa`` and ``ptqbench_eager`` change q, k and v as the ``KvQuantizer`` of the
calling module says, then call the stock function. Without a plan a module behaves as the stock one, bit for bit.

Shapes: query (batch, H, tokens, e); key and value (batch, G, tokens, e), not yet repeated; H = g G query heads, of
which heads k g .. k g + g - 1 belong to key/value head k; e head_dim.

Source: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; arXiv 2404.00456 (QuaRot), code
spcl/QuaRot@5008669. Deviations: values are quantized here rather than at the output of v_proj (the same numbers); the key
rotation runs in float32 or float64.

A cache stores keys and values before they are quantized, and every use quantizes them again. Each grid belongs to one token, so
cached decoding gives the same numbers as one forward over all tokens, at the cost of the repeated work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.activation import ActivationGrid, apply_grid, fake_quantize, fake_quantize_tensor, part_peaks

_PREFIX = "ptqbench_"
_BASES = ("sdpa", "eager")


@dataclass(frozen=True)
class KvPlan:
    """How queries, keys and values of one block are rotated and quantized after RoPE.

    Attributes:
        rotation: (G, e, e) orthogonal, right factor of the keys of head k and of the queries that read them. It cancels in the
            scores of keys that are not quantized. None: no rotation.
        key_grid: Quantizer of the (rotated) keys; None or 16 bits: none.
        value_grid: Quantizer of the values, one grid per token and head; None or 16 bits: none.
        k_group: ``head``: one key grid per token and head; ``token``: one that all heads of a token share.
        rotation_bits: Round the rotation, as one stack, to a symmetric grid; only while keys are quantized.
        rope_output_bits: Round queries and keys per (token, head), asymmetric, before the rotation; only while keys are
            quantized, and with or without a rotation.
    """

    rotation: Tensor | None = None
    key_grid: ActivationGrid | None = None
    value_grid: ActivationGrid | None = None
    k_group: str = "head"
    rotation_bits: int = 16
    rope_output_bits: int = 16

    def __post_init__(self) -> None:
        """Check the options that do not depend on the model."""
        if self.k_group not in ("head", "token"):
            raise ConfigError(f"expected k_group in ['head', 'token'], got {self.k_group!r}")
        for name in ("rotation_bits", "rope_output_bits"):
            if not 2 <= getattr(self, name) <= 16:
                raise ConfigError(f"expected {name} from 2 to 16 (16 = untouched), got {getattr(self, name)}")


def apply_plan(
    plan: KvPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rotation: Tensor | None = None,
    enabled: bool = True,
    key_peaks: Tensor | None = None,
    value_peaks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to rope_output_bits, rotate and quantize q, k and v.

    Args:
        plan: Grids and bits.
        query: (batch, H, tokens, e) after RoPE, not modified.
        key: (batch, G, tokens, e) after RoPE, not modified.
        value: (batch, G, tokens, e), not modified.
        rotation: (G, e, e) on the device of the keys, used in place of ``plan.rotation`` (which may lie on another device).
        enabled: False applies the rotation alone, and does not round it.
        key_peaks: What ``key_grid`` needs of the calibration tokens (``numerics.activation.part_peaks``).
        value_peaks: The same for ``value_grid``.

    Returns:
        (query, key, value) of the same shapes and dtypes; the inputs themselves if nothing applies.
    """
    quantize_keys = enabled and _quantizes(plan.key_grid, key.shape[-1])
    rotation = plan.rotation if rotation is None else rotation
    # The output of RoPE, rounded to rope_output_bits.
    if quantize_keys:
        query, key = fake_quantize(query, plan.rope_output_bits), fake_quantize(key, plan.rope_output_bits)
    # q <- q T, k <- k T: the scores q k^T keep their values.
    if rotation is not None:
        used = fake_quantize_tensor(rotation, plan.rotation_bits) if quantize_keys else rotation
        query, key = _rotate(query, used), _rotate(key, used)
    # The rotated keys, and the values, are rounded to their grids.
    if quantize_keys and plan.key_grid is not None:
        key = (
            _per_token(key, plan.key_grid)
            if plan.k_group == "token"
            else apply_grid(key, plan.key_grid, peaks=key_peaks)
        )
    if enabled and plan.value_grid is not None:
        value = apply_grid(value, plan.value_grid, peaks=value_peaks)
    return query, key, value


def wrapped_attention(base_name: str | None) -> str:
    """Name the registered attention function that wraps a stock one.

    Args:
        base_name: ``config._attn_implementation``. None is eager, as in the attention modules. A name that is wrapped already is
            returned unchanged.

    Returns:
        ``ptqbench_sdpa`` or ``ptqbench_eager``.

    Raises:
        UnsupportedError: Another implementation: its function may need repeated keys, or another mask.
    """
    base = (base_name or "eager").removeprefix(_PREFIX)
    if base not in _BASES:
        raise UnsupportedError(
            f"expected attention implementation sdpa or eager for key and value quantization, got {base_name!r}; "
            "load the model with attn_implementation='sdpa'"
        )
    return _PREFIX + base


def check_kv(attention: nn.Module, plan: KvPlan) -> None:
    """Raise ConfigError or UnsupportedError if a plan does not fit an attention module."""
    module: Any = attention
    n_heads, head_dim = int(module.config.num_key_value_heads), int(module.head_dim)
    if plan.rotation is not None and plan.rotation.shape != (n_heads, head_dim, head_dim):
        raise ConfigError(
            f"expected a key rotation of shape {(n_heads, head_dim, head_dim)} (kv heads, head_dim, head_dim) in block "
            f"{module.layer_idx}, got {tuple(plan.rotation.shape)}"
        )
    for grid in (plan.key_grid, plan.value_grid):
        _quantizes(grid, head_dim)
    wrapped_attention(module.config._attn_implementation)


class KvQuantizer(nn.Module):
    """The installed form of a `KvPlan`.

    Attributes:
        plan: The plan.
        enabled: Whether the quantizers are on.
        observing: Whether peaks are being found: the quantizers are off then.
        key_peaks: Largest magnitudes of the parts on the calibration tokens, for a grid that needs them; None while they are not
            known. Likewise ``value_peaks``.
        rotation: (G, e, e) on the device of the attention, float64 beside float64 weights and float32 beside others; or None.
    """

    rotation: Tensor | None
    key_peaks: Tensor | None
    value_peaks: Tensor | None

    def __init__(self, plan: KvPlan, attention: nn.Module) -> None:
        super().__init__()
        self.plan, self.enabled, self.observing = plan, True, False
        self.register_buffer("key_peaks", None, persistent=False)
        self.register_buffer("value_peaks", None, persistent=False)
        rotation, weight = plan.rotation, next(attention.parameters())
        if rotation is not None:
            rotation = rotation.to(home(weight), torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.register_buffer("rotation", rotation, persistent=False)
        self.guard = attention.register_forward_pre_hook(_require_wrapped)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the plan; see ``apply_plan``."""
        peaks = {"key_peaks": self.key_peaks, "value_peaks": self.value_peaks}
        query, key, value = apply_plan(
            self.plan, query, key, value, rotation=self.rotation, enabled=self.enabled, **peaks
        )
        if self.observing and self.plan.key_grid is not None and self.plan.key_grid.needs_peaks:
            self.key_peaks = larger(self.key_peaks, part_peaks(key, self.plan.key_grid))
        if self.observing and self.plan.value_grid is not None and self.plan.value_grid.needs_peaks:
            self.value_peaks = larger(self.value_peaks, part_peaks(value, self.plan.value_grid))
        return query, key, value

    @property
    def needs_peaks(self) -> bool:
        """Whether a quantizer needs the largest magnitudes on the calibration tokens."""
        return any(grid is not None and grid.needs_peaks for grid in (self.plan.key_grid, self.plan.value_grid))


def larger(earlier: Tensor | None, found: Tensor) -> Tensor:
    """The larger of two peaks, entry by entry; NaN if there is one."""
    return found if earlier is None else torch.maximum(earlier, found)


def install_kv(attention: nn.Module, plan: KvPlan | None) -> None:
    """Replace the plan of an attention module, with quantizers on, and route its model through the wrapped function.

    The configuration object is shared by all blocks of a model, so the first call switches the whole model; modules
    without a plan are not affected.

    Args:
        attention: Installed transformers attention module, modified: it gets a submodule ``kv_quantizer``.
        plan: The plan; None removes an earlier one.
    """
    earlier = _installed(attention)
    if earlier is not None:
        earlier.guard.remove()
        del attention.kv_quantizer
    if plan is not None:
        attention.register_module("kv_quantizer", KvQuantizer(plan, attention))
        config: Any = attention.config
        config._attn_implementation = wrapped_attention(config._attn_implementation)


def _installed(attention: nn.Module) -> KvQuantizer | None:
    return next((module for module in attention.children() if isinstance(module, KvQuantizer)), None)


def home(parameter: Tensor) -> torch.device:
    """The device of added tensors: that of the weights, or the CPU while those are not loaded."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def _require_wrapped(attention: nn.Module, _: Any) -> None:
    """Refuse to run a module whose attention implementation ignores its plan."""
    module: Any = attention
    name = module.config._attn_implementation
    if not str(name).startswith(_PREFIX):
        raise UnsupportedError(
            f"block {module.layer_idx} has a key and value plan, but its attention implementation was set back to "
            f"{name!r}, which ignores it; set wrapped_attention({name!r}) instead"
        )


def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Apply the module's plan, if it has one, and call the stock attention function."""
    quantizer = _installed(module)
    if quantizer is not None:
        query, key, value = quantizer(query, key, value)
    return _stock(base, module)(module, query, key, value, attention_mask, **kwargs)


def _stock(base: str, module: nn.Module) -> Callable[..., Any]:
    """Find the installed function; eager attention is not registered but defined beside each attention class."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = AttentionInterface().get_interface(base, eager)
    if function is None:
        raise UnsupportedError(f"{type(module).__module__} defines no eager attention; use attn_implementation='sdpa'")
    return function  # type: ignore[no-any-return]


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply the heads of kv head k by ``rotation[k]`` from the right, in float32 or float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grouped = x.unflatten(1, (rotation.shape[0], -1)).to(dtype)
    rotated: Tensor = (grouped @ rotation.to(dtype).unsqueeze(1)).flatten(1, 2).to(x.dtype)
    return rotated


def _per_token(key: Tensor, grid: ActivationGrid) -> Tensor:
    """Quantize with one grid per token and part, shared by all heads.

    Channel-major order (channel 0 of every head, channel 1, ...) keeps the high part of all heads together at the end.
    """
    n_heads, head_dim = key.shape[1], key.shape[-1]
    shared = replace(grid, n_high=grid.n_high * n_heads, n_lowest=grid.n_lowest * n_heads)
    # (batch, G, tokens, e) -> (batch, tokens, e G): one row per token.
    rows = key.permute(0, 2, 3, 1).flatten(2)
    quantized: Tensor = apply_grid(rows, shared).unflatten(2, (head_dim, n_heads)).permute(0, 3, 1, 2)
    return quantized


def _quantizes(grid: ActivationGrid | None, width: int) -> bool:
    return grid is not None and any(bits < 16 for _, _, bits in grid.parts(width))


for _base in _BASES:
    AttentionInterface.register(_PREFIX + _base, partial(_attend, _base))
    # Without the same mask as the stock function, padded batches and cached decoding would be silently wrong.
    AttentionMaskInterface.register(_PREFIX + _base, AttentionMaskInterface()[_base])
