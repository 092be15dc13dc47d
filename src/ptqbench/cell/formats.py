"""The formats that a bitwidth may name, which of its values agree, and the names of bits. ``numerics.formats`` has their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ptqbench.errors import ConfigError

if TYPE_CHECKING:
    from ptqbench.cell.spec import BitwidthSpec

INTEGER = "int"
FormatName = Literal["int", "mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8", "mxint4", "nvfp4", "fp8", "fp8_row"]
BITS = {
    "mxfp4": 4, "mxfp6": 6, "mxfp6_e3m2": 6, "mxfp8": 8, "mxint8": 8, "mxint4": 4, "nvfp4": 4, "fp8": 8, "fp8_row": 8,
}  # fmt: skip
"""Bits per code."""
UNTOUCHED_BITS = 16


def check(bits: BitwidthSpec) -> None:
    """Refuse values that contradict each other.

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


def _tensors(bits: BitwidthSpec) -> list[tuple[str, str, str, int]]:
    """Field of the format, the format, field of the bits, the bits."""
    return [
        ("w_format", bits.w_format, "w_bits", bits.w_bits),
        ("a_format", bits.a_format, "a_bits", bits.a_bits),
        ("kv_format", bits.kv_format, "k_bits", bits.k_bits),
        ("kv_format", bits.kv_format, "v_bits", bits.v_bits),
    ]


def bits_name(bits: BitwidthSpec) -> str:
    """Name bits by their values.

    >>> from ptqbench.cell.spec import BitwidthSpec
    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=4, k_bits=4, v_bits=8, group_size=32))
    'w4a4k4v8g32'
    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=16, k_bits=16, v_bits=16, w_format="nvfp4"))
    'nvfp4a16'
    """
    floats = bits.w_format != INTEGER
    weights = bits.w_format if floats else f"w{bits.w_bits}"
    parts = [_input_name(bits, floats)]
    if bits.kv_format != INTEGER:
        parts.append(f"_kv{bits.kv_format}")
    elif bits.k_bits != bits.v_bits:
        parts.append(f"k{bits.k_bits}v{bits.v_bits}")
    elif bits.k_bits < UNTOUCHED_BITS:
        parts.append(f"kv{bits.k_bits}")
    parts += [f"g{bits.group_size}"] if bits.group_size is not None else []
    parts += [f"_{bits.mx_scale}"] if bits.mx_scale != "even" else []
    parts += [f"_{bits.nv_input_scale}"] if bits.nv_input_scale != "static" else []
    rest = "".join(parts)
    return "fp16" if not rest and not floats and bits.w_bits >= UNTOUCHED_BITS else weights + rest


def _input_name(bits: BitwidthSpec, floats: bool) -> str:
    """Inputs of linears: nothing where a format of weights is that of inputs, too."""
    if bits.a_format == INTEGER:
        return f"a{bits.a_bits}" if floats or bits.a_bits < UNTOUCHED_BITS else ""
    if bits.a_format == bits.w_format:
        return ""
    usual = bits.w_format.startswith("mxfp") and bits.a_format == "mxfp8"
    return f"a{bits.a_bits}" if usual else f"_a{bits.a_format}"
