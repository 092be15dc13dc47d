"""The formats of ``numerics.formats`` in plain lines, in float64, for reading; ``numerics.reference`` has all else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FloatGrid(NamedTuple):
    """The elements of a format, value = scale * code: scale (m, 1), the codes +- ``magnitudes`` (K,), which begin with 0."""

    scale: Tensor
    magnitudes: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """Return the nearest codes of (m, c) values; between two of them the one at an even place wins."""
        x = (values / self.scale).abs()
        middle = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        place = torch.bucketize(x, middle)  # the lower one of two that are equally near
        tie = x == middle[place.clamp(max=len(middle) - 1)]
        return self.magnitudes[place + (tie & (place % 2 == 1))] * values.sign()

    def values(self, codes: Tensor) -> Tensor:
        """Return the (m, c) values of codes."""
        return self.scale * codes


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> Tensor:
    """List the magnitudes of a floating-point format in the order of its codes."""
    subnormal = [m * 2.0 ** (1 - bias - mantissa_bits) for m in range(2**mantissa_bits)]
    normal = [
        (1 + m / 2**mantissa_bits) * 2.0 ** (e - bias)
        for e in range(1, 2**exponent_bits)
        for m in range(2**mantissa_bits)
    ]
    return torch.tensor(subnormal + normal, dtype=torch.float64)


FORMATS = {
    "mxfp4": (32, minifloat(2, 1, 1), 1), "mxfp6": (32, minifloat(2, 3, 1), 3), "mxfp6_e3m2": (32, minifloat(3, 2, 3), 2),
    "mxfp8": (32, minifloat(4, 3, 7)[:-1], 1), "mxint8": (32, torch.arange(128).double() / 64, 6),
    "nvfp4": (16, minifloat(2, 1, 1), 0), "fp8_row": (None, minifloat(4, 3, 7)[:-1], 0),
}  # fmt: skip
"""Channels per scale, magnitudes, mantissa bits of the rule ``even``. The last code of e4m3 is NaN."""


def fit_format(values: Tensor, W: Tensor, name: str) -> FloatGrid:
    """Fit the scales of one block (m, c) of the weight W: compressed-tensors 0.20, in float64."""
    _, magnitudes, even_bits = FORMATS[name]
    a, top = values.abs().amax(1, keepdim=True), magnitudes[-1]
    if name == "fp8_row":  # s = a / 448
        return FloatGrid(torch.where(a == 0, 2.0**-23, a / top), magnitudes)
    if name == "nvfp4":  # s = E4M3(G a / 6) / G, G = 2688 / A: the largest block scale of the tensor is 448
        A = W.abs().max()
        G = 2688 * (1 / A) if A > 0 else torch.ones_like(A)
        e4m3 = FloatGrid(torch.ones_like(a), minifloat(4, 3, 7)[:-1])
        return FloatGrid(e4m3.codes(G * (a / top)).clamp(min=2.0**-9) / G, magnitudes)
    # s = 2^e, e = floor(log2 a) - emax, one more where the mantissa of a is above what the elements hold
    mantissa, exponent = torch.frexp(a)
    e = exponent - torch.frexp(top)[1] + (mantissa >= 1 - 2.0 ** -(even_bits + 2))
    return FloatGrid(2.0 ** torch.where(a == 0, -127, e.clamp(-127, 127)).double(), magnitudes)
