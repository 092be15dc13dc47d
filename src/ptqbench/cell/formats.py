"""The formats that a bitwidth may name, and which of its values agree. ``numerics.formats`` has their elements and scales."""

from __future__ import annotations

from typing import Any, Literal

from ptqbench.errors import ConfigError

INTEGER = "int"
FormatName = Literal["int", "mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8", "mxint4", "nvfp4", "fp8", "fp8_row"]
BITS = {
    "mxfp4": 4, "mxfp6": 6, "mxfp6_e3m2": 6, "mxfp8": 8, "mxint8": 8, "mxint4": 4, "nvfp4": 4, "fp8": 8, "fp8_row": 8,
}  # fmt: skip
"""Bits per code."""


def check(bits: Any) -> None:
    """Refuse values that contradict each other.

    Args:
        bits: A ``BitwidthSpec``.

    Raises:
        ConfigError: One line with the values and what to say instead.
    """
    for field, form, name, width in _tensors(bits):
        if form != INTEGER and width != BITS[form]:
            raise ConfigError(
                f"bitwidth.{field}={form} has {BITS[form]} bits, got bitwidth.{name}={width}; "
                f"integers and 16 bits are bitwidth.{field}={INTEGER}"
            )
    if bits.w_format != INTEGER and bits.group_size is not None:
        raise ConfigError(
            f"bitwidth.group_size={bits.group_size} is for integers: {bits.w_format} has blocks of its own; give null"
        )
    used = {form for _, form, _, _ in _tensors(bits)} - {INTEGER}
    powers = {form for form in used if form.startswith("mx")}
    if bits.mx_scale != "even" and not powers:
        raise ConfigError(
            f"bitwidth.mx_scale={bits.mx_scale} is for formats with power-of-two scales (mx...), got none"
        )
    if bits.mx_scale == "four_thirds" and powers != {"mxfp4"}:
        raise ConfigError(f"bitwidth.mx_scale=four_thirds is for mxfp4 alone, got {', '.join(sorted(powers))}")
    if bits.nv_input_scale != "static" and bits.a_format != "nvfp4":
        raise ConfigError(
            f"bitwidth.nv_input_scale={bits.nv_input_scale} is for bitwidth.a_format=nvfp4, got {bits.a_format}"
        )


def _tensors(bits: Any) -> list[tuple[str, str, str, int]]:
    """Field of the format, the format, field of the bits, the bits."""
    return [
        ("w_format", bits.w_format, "w_bits", bits.w_bits),
        ("a_format", bits.a_format, "a_bits", bits.a_bits),
        ("kv_format", bits.kv_format, "k_bits", bits.k_bits),
        ("kv_format", bits.kv_format, "v_bits", bits.v_bits),
    ]
