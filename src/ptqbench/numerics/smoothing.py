"""Scales of input channels that leave the function as it is: dividing the channel cancels multiplying the column.

    SmoothQuant   s_j = max( xmax_j^alpha / max(wmax_j, 1e-5)^(1 - alpha), 1e-5 )
    AWQ           s = max(u^r, 1e-4),  s <- s / sqrt(max s * min s)            one of the candidates r = 0, 1/20, .. 19/20

Legend: n input channels; xmax, u (n,) largest and mean magnitude of the inputs; wmax (n,) largest magnitude of the columns of all
weights that read them. Everything is float64.
Source: arXiv 2211.10438, code mit-han-lab/smoothquant@c61476d; arXiv 2306.00978, code mit-han-lab/llm-awq@d6e797a.
Deviation: the codes compute in the type of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.errors import NumericalError

SMOOTHING_FLOOR = 1e-5
AWQ_FLOOR = 1e-4


def smoothing_scale(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """Compute SmoothQuant's scales, which move a share ``alpha`` of the range of a channel from the inputs to the weights.

    Args:
        largest_input: xmax (n,), not modified.
        largest_weight: wmax (n,), not modified.
        alpha: From 0 (columns all peak at 1) to 1 (inputs all peak at 1); at 1/2 both have the same peak.

    Returns:
        s (n,), float64, positive.

    Raises:
        NumericalError: A scale is not finite; names the channel.
    """
    scale = largest_input.double() ** alpha / largest_weight.double().clamp(min=SMOOTHING_FLOOR) ** (1 - alpha)
    return usable(scale.clamp(min=SMOOTHING_FLOOR))


def awq_scale(mean_input: Tensor, ratio: float) -> Tensor:
    """Compute AWQ's scales for one exponent. They are normalised by the geometric mean of their extremes.

    Args:
        mean_input: u (n,), not modified.
        ratio: r; at 0 all scales are 1.

    Returns:
        s (n,), float64, positive.

    Raises:
        NumericalError: A scale is not finite; names the channel.
    """
    scale = (mean_input.double() ** ratio).clamp(min=AWQ_FLOOR)
    return usable(scale / (scale.amax() * scale.amin()).sqrt())


def usable(scale: Tensor) -> Tensor:
    """Return a scale (n,) that is positive and finite everywhere.

    Raises:
        NumericalError: It is not; names the first channel.
    """
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise NumericalError(f"scale of channel {at}: expected a positive finite number, got {float(scale[at]):g}")
    return scale
