"""How a transform splits the axes into precision parts, and what a quantized model stores."""

from __future__ import annotations

import dataclasses

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import UnsupportedError
from ptqbench.numerics.bits import high_rank


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a transform splits the axes into precision parts. The default splits nothing.

    Attributes:
        high_fraction: Share of the directions at ``high_bits``, the last ones of an axis.
        high_bits: Their bits; where the bulk has 16 bits, all parts have.
        lowest_fraction: Share of the directions at ``lowest_bits``, the first ones of an axis.
        lowest_bits: Their bits.
        int8_down_proj: Whether weight and input of down_proj have 8 bits.
        output_per_head: Whether the input of o is quantized per (token, query head), else per token: then the parts of all
            heads share a grid each.
        basis_changes: Stored (d, d) changes of the residual basis per block.
        basis_change_bits: Bits of their input, once activations or values are quantized.
        basis_change_weight_bits: Bits of their matrices, once weights are quantized.
        key_rotation_bits: Bits of the online key rotation, once keys are quantized.
        rope_output_bits: Bits of queries and keys before that rotation, once keys are quantized.
    """

    high_fraction: float = 0.0
    high_bits: int = UNTOUCHED_BITS
    lowest_fraction: float = 0.0
    lowest_bits: int = UNTOUCHED_BITS
    int8_down_proj: bool = False
    output_per_head: bool = False
    basis_changes: int = 0
    basis_change_bits: int = UNTOUCHED_BITS
    basis_change_weight_bits: int = UNTOUCHED_BITS
    key_rotation_bits: int = UNTOUCHED_BITS
    rope_output_bits: int = UNTOUCHED_BITS

    def parts(self, width: int) -> tuple[int, int, int]:
        """Split an axis into (lowest, bulk, high) channels with sum ``width``; shares round down, the bulk takes the rest.

        Raises:
            UnsupportedError: A share is positive but rounds to no channel, or the two shares exceed the axis.
        """
        lowest, high = high_rank(width, self.lowest_fraction), high_rank(width, self.high_fraction)
        if lowest + high > width:
            raise UnsupportedError(f"expected precision parts within {width} channels, got {lowest} + {high}")
        return lowest, width - lowest - high, high

    def bits(self, bulk: int) -> tuple[int, int, int]:
        """Bits of the (lowest, bulk, high) part; an untouched bulk leaves everything untouched."""
        return (bulk,) * 3 if bulk >= UNTOUCHED_BITS else (self.lowest_bits, bulk, self.high_bits)


@dataclasses.dataclass(frozen=True)
class StorageBits:
    """What a quantized model really stores, in bits per element.

    Attributes:
        nominal_w_bits: What the method's name promises for weights.
        code_w_bits: Codes alone, over the linears of all blocks.
        basis_change_w_bits: Stored basis changes, per weight of those linears. The key rotations (G, e, e) of a block are not
            counted.
        effective_w_bits: Codes, scales, zero points and basis changes.
        k_bits: A cached key element, grids included.
        v_bits: A cached value element, grids included.
    """

    nominal_w_bits: float
    code_w_bits: float
    basis_change_w_bits: float
    effective_w_bits: float
    k_bits: float
    v_bits: float
