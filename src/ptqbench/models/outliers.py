"""Function-preserving outlier channels: the variant ``tiny-outlier`` of the embedded model.

Large models have a few channels with far larger activations than the rest, which makes low-bit activations hard. A model of a
million parameters has hardly any, so they are added by a change of scale that keeps the function: with gain ``g`` of a norm and
weight ``W`` of a linear that reads it, ``(g * s) * x_hat`` through ``W / s`` (columns) equals ``g * x_hat`` through ``W``. Inputs
of the linears then have channels that are ``factor`` times as large; the residual stream between the blocks does not change.

Limit of this variant: methods that fold the gains into the weights (Hadamard, ResQ, CoQuant) cancel the change exactly before
anything else, which favours them over methods that do not. Say so wherever results of this variant are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models.family import FAMILIES


def outlier_channels(hidden_size: int, n_channels: int = 4, seed: int = 0) -> list[int]:
    """Choose the channels that become outliers.

    Args:
        hidden_size: Width of the residual stream.
        n_channels: How many different channels.
        seed: Seed of the choice.

    Returns:
        Sorted channel indices.

    Raises:
        ConfigError: ``n_channels`` is not in ``[0, hidden_size]``.
    """
    if not 0 <= n_channels <= hidden_size:
        raise ConfigError(f"expected between 0 and {hidden_size} outlier channels (the hidden size), got {n_channels}")
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(hidden_size, generator=generator)[:n_channels].tolist())


def rescale_block(
    tensors: Mapping[str, Tensor], hidden_size: int, channels: Sequence[int], factor: float
) -> dict[str, Tensor]:
    """Multiply channels of both norm gains of a block, and divide the columns of the linears that read them.

    The function of the block is unchanged up to rounding, and exactly if ``factor`` is a power of two.

    Args:
        tensors: A Llama-style block, named without its prefix (``input_layernorm.weight`` and so on); not modified.
        hidden_size: Width of the residual stream.
        channels: Channels of the residual stream, each in ``[0, hidden_size)``; may be empty.
        factor: Positive finite scale of the gains.

    Returns:
        A new block; tensors that did not change are the same objects as before.

    Raises:
        ConfigError: A channel or the factor is out of range.
        UnsupportedError: A norm or a linear to rescale is missing.
    """
    norms = {name.removesuffix(".weight") for name in tensors if name.endswith("layernorm.weight")}
    if norms - set(FAMILIES["llama"].all_norms):
        raise UnsupportedError(
            f"expected a block with the norms of Llama, got {sorted(norms)}: outlier channels need norms whose gain only the "
            f"linears behind them read"
        )
    wrong = [channel for channel in channels if not 0 <= channel < hidden_size]
    if wrong:
        raise ConfigError(f"expected channels in [0, {hidden_size}), got {wrong[0]}: use outlier_channels()")
    if not 0.0 < factor < float("inf"):
        raise ConfigError(f"expected a positive finite factor of the norm gains, got {factor}")
    scale = torch.ones(hidden_size, dtype=torch.float64)
    scale[list(channels)] = factor
    rescaled = dict(tensors)
    for norm, linears in FAMILIES["llama"].readers.items():
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
