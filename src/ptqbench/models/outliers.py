"""Function-preserving outlier channels: the variant ``tiny-outlier`` of the embedded model.

Large models have a few channels whose activations dwarf the rest, and these are what makes low-bit activations hard.
A model of a million parameters hardly has any, so they are put in by a change of scale that the function does not
notice: with gain ``g`` of a norm and weight ``W`` of a linear behind it, ``(g * s) * x_hat`` through ``W / s``
(columns) equals ``g * x_hat`` through ``W``. Inputs of the linears then have channels ``factor`` times as large,
while the residual stream between the blocks stays as it was.

What it cannot show: every method that folds the gains into the weights (Hadamard, ResQ, CoQuant) cancels the change
exactly before it does anything else, which flatters it against methods that do not. Say so wherever this variant is
shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, UnsupportedError

FOLLOWERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def outlier_channels(hidden_size: int, n_channels: int = 4, seed: int = 0) -> list[int]:
    """Choose the channels that become outliers.

    Args:
        hidden_size: Width of the residual stream.
        n_channels: How many different channels.
        seed: Names the choice.

    Returns:
        Sorted channel indices.

    Raises:
        ConfigError: If ``n_channels`` is not in ``[0, hidden_size]``.
    """
    if not 0 <= n_channels <= hidden_size:
        raise ConfigError(f"expected between 0 and {hidden_size} outlier channels (the hidden size), got {n_channels}")
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(hidden_size, generator=generator)[:n_channels].tolist())


def rescale_block(
    tensors: Mapping[str, Tensor], hidden_size: int, channels: Sequence[int], factor: float
) -> dict[str, Tensor]:
    """Multiply channels of both norm gains of a block and divide the columns of the linears behind them.

    The function of the block is unchanged up to rounding (exactly, when ``factor`` is a power of two).

    Args:
        tensors: A Llama-style block, named without its prefix (``input_layernorm.weight`` and so on); not modified.
        hidden_size: Width of the residual stream.
        channels: Channels of the residual stream, each in ``[0, hidden_size)``; may be empty.
        factor: Positive finite scale of the gains.

    Returns:
        A new block; tensors that did not change are the same objects as before.

    Raises:
        ConfigError: If a channel or the factor is out of range.
        UnsupportedError: If a norm or a linear that should be rescaled is missing.
    """
    wrong = [channel for channel in channels if not 0 <= channel < hidden_size]
    if wrong:
        raise ConfigError(f"expected channels in [0, {hidden_size}), got {wrong[0]}: use outlier_channels()")
    if not 0.0 < factor < float("inf"):
        raise ConfigError(f"expected a positive finite factor of the norm gains, got {factor}")
    scale = torch.ones(hidden_size, dtype=torch.float64)
    scale[list(channels)] = factor
    rescaled = dict(tensors)
    for norm, linears in FOLLOWERS.items():
        # The gain grows, so the output of the norm does: (g s) x_hat.
        _scale_columns(rescaled, f"{norm}.weight", scale)
        for linear in linears:
            # The linear takes it back: (W / s) (g s) x_hat = W (g x_hat).
            _scale_columns(rescaled, f"{linear}.weight", 1.0 / scale)
    return rescaled


def _scale_columns(tensors: dict[str, Tensor], name: str, scale: Tensor) -> None:
    if name not in tensors:
        raise UnsupportedError(
            f"expected a Llama-style block with {name}, which is missing: outlier channels can only be put into a "
            "model whose blocks have these norms and linears"
        )
    old = tensors[name]
    tensors[name] = (old.double() * scale.to(old.device)).to(old.dtype)
