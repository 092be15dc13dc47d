"""Why a method does not go with the formats of a bitwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.numerics.formats import INTEGER, SEARCHES, of_width

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec


def format_reason(spec: RunSpec, widths: Callable[[int], Iterable[int]]) -> str | None:
    """Say which option of a method is for integers alone, or which precision part has no format, or None.

    Args:
        spec: The cell.
        widths: Bits of the bulk part -> bits of all parts.
    """
    bits, grid, inputs = spec.bitwidth, spec.method.grid, spec.method.activation
    if grid.scale_search != "none" and bits.w_format not in SEARCHES[grid.scale_search]:
        formats = ", ".join(SEARCHES[grid.scale_search])
        return f"method.grid.scale_search={grid.scale_search} is for the weight formats {formats}, got {bits.w_format}"
    if bits.w_format != INTEGER:
        asked = {
            "range_contains_zero=false": not grid.range_contains_zero,
            "zero_point=real": grid.zero_point == "real",
            "sym_nonnegative_row=as_code": grid.sym_nonnegative_row == "as_code",
            f"clip_ratio={grid.clip_ratio:g}": grid.clip_ratio != 1,
        }
        for option in (option for option, given in asked.items() if given):
            return f"method.grid.{option} is for integer grids, {bits.w_format} is symmetric with scales of its own"
    if bits.a_format != INTEGER and inputs.group_size is not None:
        return f"activation.group_size={inputs.group_size} is for integers, {bits.a_format} has blocks of its own"
    if bits.kv_format != INTEGER and inputs.k_group == "token":
        return f"activation.k_group=token lets heads share a grid, {bits.kv_format} has blocks within a head; use k_group=head"
    # Parts of another width need a format of that width.
    bulks = {(bits.w_format, bits.w_bits), (bits.a_format, bits.a_bits), (bits.kv_format, bits.k_bits)}
    for name, width in sorted((name, width) for name, bulk in bulks if name != INTEGER for width in widths(bulk)):
        if width < UNTOUCHED_BITS and of_width(name, width) is None:
            return no_format(name, width)
    return None


def no_format(name: str, bits: int) -> str:
    """Say that a precision part has no format."""
    return f"the method has a part of {bits} bits beside {name}, but no format of that family has {bits} bits"
