"""Values and scales of the formats of ``numerics/formats.py``.

    scale = rule(largest magnitude of the block),   code = element(x / scale),   value = code * scale

All formulas are evaluated in float32 in the order written, or in float64 where the values are float64; fl(.) is one operation. a is
the largest magnitude of a block, A that of the tensor, top and emax belong to the elements::

    e8m0     even         2^e, e = floor(log2 a) + [mantissa of a >= 2 - 2^-(r + 1)] - emax, r the elements' ``even_bits``
             floor, ceil  2^e, e = floor(log2 a) - emax, ceil(log2 a) - emax
             rceil        2^e, e = ceil(log2 fl(a / top))
             four_thirds  2^(floor(log2 a) - 2) 4/3                             -127 <= e <= 127 in all rules
    e4m3     G = fl(2688 fl(1 / A));   s = max(E4M3(fl(G fl(a / 6))), 2^-9);   scale = fl(s / G)
             without A: scale = max(E4M3(fl(a / 6)), 2^-6)
    row      scale = fl(a / 448), 2^-23 instead of 0                            tensor: the same of A

Rounding is to the nearest element, ties to even codes, and saturates. Exponents are read from the bits of the number: a logarithm
in float32 is wrong just below powers of two.

Legend: r rows, c channels of one block.
Source: compressed-tensors 0.20 (``even``, nvfp4, fp8), OCP MX 1.0 (``floor``), NVIDIA (``rceil``), torchao 0.18 (one-level nvfp4),
IST-DASLab/FP-Quant@d2e3092 (``four_thirds``). Deviations: a block of NVFP4 whose scale would round to zero gets the smallest scale,
2^-9 (modelopt; compressed-tensors takes 1/8); a negative zero counts as zero; a block with NaN or infinity becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqbench.numerics.formats import E4M3, Elements, Format

SMALLEST_E4M3 = 2.0**-9
SMALLEST_ONE_LEVEL = 2.0**-6
SMALLEST_FP8_SCALE = 2.0**-23
LARGEST_EXPONENT = 127


def floor_power(x: Tensor) -> Tensor:
    """Return 2^floor(log2 ``|x|``) of every entry, exactly; 0 for subnormal numbers and zero, infinity for NaN and infinity."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def to_element(x: Tensor, elements: Elements) -> Tensor:
    """Round to the nearest code.

    Args:
        x: Values over the scale, any shape, float32 or float64, not modified; not finite stays NaN.
        elements: The set.

    Returns:
        Codes in the dtype of x.
    """
    x = x.clamp(-elements.top, elements.top)
    if elements.emin is None:
        return x.round_().add_(0.0)
    # step = 2^(max(floor(log2 |x|), emin) - mantissa),   code = rint(x / step) step
    step = floor_power(x).clamp_(min=2.0**elements.emin).mul_(2.0**-elements.mantissa)
    return x.div_(step).round_().mul_(step).add_(0.0)


def tensor_number(peak: Tensor, form: Format, largest: float = E4M3.top) -> Tensor:
    """Return what is stored once per tensor: G of NVFP4, or the scale of ``fp8``.

    Args:
        peak: A, any shape, not negative, not modified.
        form: A format with such a number.
        largest: The block scale that A gets; below 448 where a search may raise it.

    Returns:
        Shape and dtype of ``peak``; finite and positive. A = 0 gives G = 1.
    """
    if form.scale == "tensor":
        return _fp8_scale(peak)
    number = 6 * largest * (1 / peak)
    return torch.where(peak == 0, 1.0, number).clamp(max=torch.finfo(peak.dtype).max)


def block_scale(peak: Tensor, form: Format, mx_scale: str = "even", number: Tensor | None = None) -> Tensor:
    """Return the scale of blocks, which multiplies their codes.

    Args:
        peak: a of every block, any shape, float32 or float64, not modified.
        form: The format.
        mx_scale: Rule for powers of two.
        number: ``tensor_number``, broadcast against ``peak``; None for a format or variant without one.

    Returns:
        Shape and dtype of ``peak``, positive; NaN where the peak is not finite.
    """
    if form.scale == "e8m0":
        scale = _power_of_two(peak, form.elements, mx_scale) * form.elements.unit
    elif form.scale == "e4m3":
        # the largest element of the block is to be 6
        wanted = peak / 6
        if number is None:
            scale = to_element(wanted, E4M3).clamp_(min=SMALLEST_ONE_LEVEL)
        else:
            scale = to_element(wanted * number, E4M3).clamp_(min=SMALLEST_E4M3) / number
    else:
        scale = _fp8_scale(peak) if number is None else number.expand_as(peak)
    return torch.where(peak.isfinite(), scale, torch.nan)


def _fp8_scale(peak: Tensor) -> Tensor:
    scale = peak / E4M3.top
    return torch.where(scale == 0, SMALLEST_FP8_SCALE, scale)


def _power_of_two(peak: Tensor, elements: Elements, rule: str) -> Tensor:
    """Return the E8M0 scale of blocks with these largest magnitudes; four_thirds times 4/3."""
    # frexp: largest = mantissa 2^exponent, mantissa in [.5, 1)
    largest = peak / elements.largest if rule == "rceil" else peak
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent.to(torch.int32) - 1
    if rule == "even":
        exponent += mantissa >= 1 - 2.0 ** -(elements.even_bits + 2)
    elif rule in ("ceil", "rceil"):
        exponent += mantissa > 0.5
    if rule != "rceil":
        exponent -= elements.emax
    exponent = torch.where(largest == 0, -LARGEST_EXPONENT, exponent.clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT))
    # 2^e from its bits: float32 holds 2^-127 as a subnormal number
    bits = torch.where(exponent > -LARGEST_EXPONENT, (exponent + 127) << 23, 0x00400000)
    power: Tensor = bits.to(torch.int32).view(torch.float32).to(peak.dtype)
    return power.mul(4 / 3) if rule == "four_thirds" else power


def peak_of(x: Tensor) -> Tensor:
    """Return the largest magnitude along the last axis; NaN if there is one."""
    largest: Tensor = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1)
    return largest


def quantize_rows(
    x: Tensor, form: Format, mx_scale: str = "even", clip_ratio: float = 1.0, number: Tensor | None = None
) -> Tensor:
    """Round every row of the last axis, block by block; a last block may be short.

    Args:
        x: (..., n) float32 or float64, not modified.
        form: The format.
        mx_scale: Rule for powers of two.
        clip_ratio: Factor on the largest magnitude of a block.
        number: ``tensor_number``, a scalar or (..., 1), where the format has one.

    Returns:
        Values of the same shape and dtype.
    """
    width = x.shape[-1]
    block = min(form.block or width, width)
    # (..., n) -> (..., blocks, block); zeros at the end change no value
    blocks = torch.nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    scale = block_scale(peak_of(blocks) * clip_ratio, form, mx_scale, number)[..., None]
    return to_element(blocks / scale, form.elements).mul_(scale).flatten(-2)[..., :width]
