"""An independent implementation of the formats: all values are listed, the nearest is searched, blocks are scaled one by one.

numpy float32, one operation at a time in the order of the published codes. Codes are the bit patterns that checkpoints hold.
"""

from __future__ import annotations

import math

import numpy as np

F32 = np.float32
LAYOUTS = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e4m3": (4, 3, 7)}
"""Bits of exponent and mantissa, bias."""
ELEMENTS = {
    "mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp6_e3m2": "e3m2", "mxfp8": "e4m3", "nvfp4": "e2m1", "fp8": "e4m3", "fp8_row": "e4m3",
}  # fmt: skip
EVEN_BITS = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 1, "mxint8": 6, "mxint4": 2}


def magnitudes(name: str) -> list[float]:
    """The values of all codes without sign, in the order of the codes."""
    if name == "mxint8":
        return [k / 64 for k in range(128)]
    if name == "mxint4":
        return [k / 4 for k in range(8)]
    exponent_bits, mantissa_bits, bias = LAYOUTS[name]
    found = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if exponent == 0:
            found.append(mantissa * 2.0 ** (1 - bias - mantissa_bits))
        else:
            found.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return found[:-1] if name == "e4m3" else found  # the last code of e4m3 is NaN


def nearest(x: float, values: list[float]) -> int:
    """Index of the nearest value to x >= 0, ties to the even index."""
    best = min(range(len(values)), key=lambda i: (abs(values[i] - x), i % 2))
    return best if x < values[-1] else len(values) - 1


def elements_of(form: str) -> str:
    return ELEMENTS.get(form, form)


def e8m0(a: float, elements: str, rule: str) -> int:
    """Exponent of the scale of a block."""
    top = magnitudes(elements)[-1]
    emax = math.frexp(top)[1] - 1
    if a == 0:
        return -127
    mantissa, exponent = math.frexp(a)
    e = exponent - 1 - emax
    if rule == "even":
        e += 2 * mantissa >= 2 - 2.0 ** -(EVEN_BITS[elements] + 1)
    elif rule == "ceil":
        e += mantissa != 0.5
    elif rule == "rceil":
        mantissa, exponent = math.frexp(F32(a) / F32(top))
        e = exponent - (mantissa == 0.5)
    return max(-127, min(127, e))


def e4m3(x: np.float32) -> tuple[int, np.float32]:
    values = magnitudes("e4m3")
    code = nearest(float(x), values)
    return code, F32(values[code])


def quantize(
    W: np.ndarray, form: str, rule: str = "even", block: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, codes (index, plus half the number of codes for negative numbers) and scale bytes (or scales) of W (m, n)."""
    W = W.astype(F32)
    values = magnitudes(elements_of(form))
    block = block or {"nvfp4": 16, "fp8": W.shape[1], "fp8_row": W.shape[1]}.get(form, 32)
    A = F32(np.abs(W).max())
    Q, codes, scales = np.zeros_like(W), np.zeros(W.shape, int), []
    for i, row in enumerate(W):
        for start in range(0, len(row), block):
            x = row[start : start + block]
            a = F32(np.abs(x).max())
            if form == "nvfp4":
                G = F32(2688) * (F32(1) / A) if A else F32(1)
                stored, s = e4m3(G * (a / F32(6)))
                stored, s = (stored, s) if stored else (1, F32(2.0**-9))
                scale = s / G
            elif form.startswith("fp8"):
                scale = (A if form == "fp8" else a) / F32(448)
                stored = scale = scale if scale else F32(2.0**-23)
            elif rule == "four_thirds":
                stored = e8m0(float(a), "e2m1", "floor")
                scale = F32(2.0**stored) * F32(4 / 3)
            else:
                stored = e8m0(float(a), elements_of(form), rule)
                scale = F32(2.0**stored)
            scales.append(stored)
            for j, v in enumerate(x):
                code = nearest(abs(float(v / scale)), values)
                codes[i, start + j] = code + (len(values) + (form.startswith(("mxfp8", "fp8")))) * (v < 0 and code > 0)
                Q[i, start + j] = np.sign(v) * F32(values[code]) * scale
    return Q, codes, np.array(scales).reshape(len(W), -1)
