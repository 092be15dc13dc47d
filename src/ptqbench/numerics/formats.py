"""Floating-point and microscaling formats: a set of element values, and how blocks of channels share a scale. It imports no torch.

    value = scale * element,   one scale per row and block of neighbouring input channels

========== ========================= ====== ===============================================
name       elements                  block  scale
========== ========================= ====== ===============================================
mxfp4      e2m1 (0 .5 1 1.5 2 3 4 6) 32     power of two, 8 bits (E8M0)
mxfp6      e2m3, up to 7.5           32     the same
mxfp6_e3m2 e3m2, up to 28            32     the same
mxfp8      e4m3, up to 448           32     the same
mxint8     k / 64, abs(k) <= 127     32     the same
mxint4     k / 4, abs(k) <= 7        32     the same
nvfp4      e2m1                      16     E4M3, 8 bits, over one 32-bit number per tensor
fp8_row    e4m3                      row    16 bits per row (a token, or an output channel)
fp8        e4m3                      tensor one 32-bit number
========== ========================= ====== ===============================================

Source: OCP MX 1.0 as compressed-tensors 0.20, torchao 0.18, nvidia-modelopt 0.47 and microsoft/microxcaling@7bc4195 implement it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScaleKind = Literal["e8m0", "e4m3", "row", "tensor"]
INTEGER = "int"
"""The name of the formats that are not here: integer grids with scales of 16 bits."""
MX_SCALES = ("even", "floor", "rceil", "ceil", "four_thirds")
"""Rules for the exponent of an E8M0 scale (``numerics/microscaling.py``)."""
SEARCHES = {
    "exponent": ("mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8", "mxint4"),
    "four_over_six": ("nvfp4",),
    "scale_sweep": ("nvfp4",),
    "fpq_mse": ("mxfp4", "nvfp4"),
}
"""Searches for the scale of a block (``numerics/scale_search.py``), and the formats that they are for."""
E8M0_BITS, E4M3_BITS, ROW_BITS = 8, 8, 16


@dataclass(frozen=True)
class Elements:
    """A symmetric set of values that a code may stand for; codes are values over ``unit``.

    Attributes:
        bits: Bits per code, sign included.
        top: Largest code.
        emax: Exponent of the largest value.
        emin: Exponent of the smallest normal value; None where the codes are all integers up to ``top``.
        mantissa: Mantissa bits of normal values.
        unit: Value of the code 1, a power of two.
        even_bits: Mantissa bits that decide the rule ``even`` (compressed-tensors; others: all they have, as in torchao).
    """

    bits: int
    top: float
    emax: int
    emin: int | None = None
    mantissa: int = 0
    unit: float = 1.0
    even_bits: int = 1

    @property
    def largest(self) -> float:
        """The largest value."""
        return self.top * self.unit


E2M1 = Elements(4, 6.0, emax=2, emin=0, mantissa=1)
E2M3 = Elements(6, 7.5, emax=2, emin=0, mantissa=3, even_bits=3)
E3M2 = Elements(6, 28.0, emax=4, emin=-2, mantissa=2, even_bits=2)
E4M3 = Elements(8, 448.0, emax=8, emin=-6, mantissa=3)
INT8 = Elements(8, 127.0, emax=0, unit=1 / 64, even_bits=6)
INT4 = Elements(4, 7.0, emax=0, unit=1 / 4, even_bits=2)


@dataclass(frozen=True)
class Format:
    """Elements and the rule of their scale; ``block`` is None where a scale covers all channels."""

    elements: Elements
    scale: ScaleKind
    block: int | None = None

    @property
    def per_tensor(self) -> bool:
        """Whether a number is shared by the whole tensor."""
        return self.scale in ("e4m3", "tensor")

    @property
    def bits_per_block(self) -> int:
        """Bits of one stored scale per row and block."""
        return {"e8m0": E8M0_BITS, "e4m3": E4M3_BITS, "row": ROW_BITS, "tensor": 0}[self.scale]


FORMATS = {
    "mxfp4": Format(E2M1, "e8m0", 32),
    "mxfp6": Format(E2M3, "e8m0", 32),
    "mxfp6_e3m2": Format(E3M2, "e8m0", 32),
    "mxfp8": Format(E4M3, "e8m0", 32),
    "mxint8": Format(INT8, "e8m0", 32),
    "mxint4": Format(INT4, "e8m0", 32),
    "nvfp4": Format(E2M1, "e4m3", 16),
    "fp8_row": Format(E4M3, "row"),
    "fp8": Format(E4M3, "tensor"),
}

WIDER = {"mxint4": {8: "mxint8"}, "mxint8": {4: "mxint4"}, "fp8": {8: "fp8"}, "fp8_row": {8: "fp8_row"}}
"""Formats of another width beside a format: for the precision parts of a split axis. The other formats: ``MX_FLOAT``."""
MX_FLOAT = {4: "mxfp4", 6: "mxfp6", 8: "mxfp8"}


def of_width(name: str, bits: int) -> str | None:
    """Return the format that stands beside ``name`` for parts of other bits, itself for its own; None if there is none."""
    if name == INTEGER or bits == FORMATS[name].elements.bits:
        return name
    return WIDER.get(name, MX_FLOAT).get(bits)
