"""Average bit widths: what a mixed-precision layout costs, on paper and in storage.

Objective: exact weighted means of bits over weight elements. Nominal bits ignore what the split does not cover;
effective bits count every decoder linear (and basis change) at its own precision.

Shapes: d hidden size, f intermediate size, H query heads, G key/value heads, e head_dim; H e may differ from d.

Source: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d, Zachary5895/CoQuant@0e2e343. Deviation: the
high part of o_proj has H int(high_fraction e) columns; the codes use int(high_fraction d), equal only when H e = d.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ptqbench.errors import ConfigError
from ptqbench.numerics.subspace import high_rank


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of one decoder block that decide its weight bits.

    Attributes:
        hidden_size: d.
        intermediate_size: f.
        n_heads: H.
        n_kv_heads: G.
        head_dim: e.
    """

    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of the seven linears by name."""
        d, f = self.hidden_size, self.intermediate_size
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q_proj": (query, d),
            "k_proj": (key, d),
            "v_proj": (key, d),
            "o_proj": (d, query),
            "gate_proj": (f, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
        }


def mean_bits(parts: Iterable[tuple[float, float]]) -> float:
    """Average bits over (size, bits) pairs.

    Args:
        parts: Pairs of a size (elements or shares) and its bits.

    Returns:
        ``sum(size bits) / sum(size)``.

    Raises:
        ConfigError: The sizes sum to nothing.
    """
    pairs = list(parts)
    total = sum(size for size, _ in pairs)
    if total <= 0:
        raise ConfigError(f"expected parts with a positive total size, got {pairs}")
    return sum(size * bits for size, bits in pairs) / total


def nominal_bits(bits: int, high_bits: int, high_fraction: float) -> float:
    """Return the bits a method's name promises: ``high_fraction`` of the directions at high_bits.

    Args:
        bits: Bulk bits.
        high_bits: Bits of the high part.
        high_fraction: Share in 0..1.

    Returns:
        Average bits.
    """
    return mean_bits([(1 - high_fraction, bits), (high_fraction, high_bits)])


def effective_w_bits(
    shape: DecoderShape,
    w_bits: int,
    high_bits: int,
    high_fraction: float,
    *,
    down_bits: int | None = None,
    n_basis_changes: int = 0,
) -> float:
    """Average weight bits over the seven linears of a decoder block, without scales.

    Args:
        shape: Sizes of the block.
        w_bits: Bulk bits.
        high_bits: Bits of the high input columns of every linear but down_proj.
        high_fraction: Share of high columns; 0 makes every linear uniform.
        down_bits: Bits of down_proj, which is not split; None means w_bits.
        n_basis_changes: Stored 16-bit (d, d) residual basis changes (2 for ``per_layer``, 0 for ``full_shared``). They
            add bits but no elements to the mean.

    Returns:
        Bits per linear weight element.

    Raises:
        ConfigError: high_fraction lies outside 0..1.
        UnsupportedError: high_fraction rounds to no channel.
    """
    high = high_rank(shape.hidden_size, high_fraction)
    high_columns = dict.fromkeys(shape.linears(), high)
    high_columns["o_proj"] = shape.n_heads * high_rank(shape.head_dim, high_fraction)
    high_columns["down_proj"] = 0
    elements, total = 0, n_basis_changes * shape.hidden_size**2 * 16
    for name, (rows, columns) in shape.linears().items():
        bulk = down_bits if name == "down_proj" and down_bits is not None else w_bits
        elements += rows * columns
        total += rows * ((columns - high_columns[name]) * bulk + high_columns[name] * high_bits)
    return total / elements


def kv_overhead_bits(head_dim: int, n_grids: int = 2, bits_per_grid: int = 32) -> float:
    """Return the extra bits per cached element for the grids of one token and head.

    Args:
        head_dim: e.
        n_grids: Grids per token and head (2 with a split).
        bits_per_grid: Scale and zero_point in fp16: 32.

    Returns:
        Bits per element.
    """
    return n_grids * bits_per_grid / head_dim
