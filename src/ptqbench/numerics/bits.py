"""Shares of channels, average bit widths and their distribution: the arithmetic of mixed precision. It imports no torch.

Objective: exact weighted means of bits over elements, the rule by which a share of an axis becomes a channel count, and the
bits of several tensors under a common budget.

Source: arXiv 2412.14363 (ResQ), code utkarsh-dmx/project-resq@cb87d0d; Zachary5895/CoQuant@0e2e343; arXiv 2502.15075, code
mohsenhariri/spectral-kv@e9ed423 (`allocate`). Deviations: a share that rounds to no channel raises an error, where the codes
leave a basis without a high part; gains are compared without the absolute tolerance of spectral-kv, which depends on the scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from ptqbench.errors import ConfigError, UnsupportedError


def high_rank(n: int, high_fraction: float) -> int:
    """Return the number of high-precision directions, int(high_fraction * n).

    Args:
        n: Width.
        high_fraction: Share in 0..1; 0 keeps everything low, 1 everything high.

    Returns:
        Channel count 0..n.

    Raises:
        ConfigError: The fraction lies outside 0..1.
        UnsupportedError: The fraction is positive but rounds to no channel.
    """
    if not 0 <= high_fraction <= 1:
        raise ConfigError(f"expected high_fraction between 0 and 1, got {high_fraction}")
    n_high = int(high_fraction * n)
    if high_fraction > 0 and n_high == 0:
        raise UnsupportedError(
            f"expected at least one high-precision channel, got int({high_fraction} * {n}) = 0 of width {n}; "
            "raise high_fraction or set it to 0"
        )
    return n_high


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


def kv_overhead_bits(width: int, n_grids: int, bits_per_grid: int) -> float:
    """Return the extra bits per cached element for the grids that ``width`` elements share.

    Args:
        width: head_dim, or all heads of a token where they share their grids.
        n_grids: Number of those grids (2 with a split into two parts).
        bits_per_grid: Bits of scale and zero_point together (32 for two float16 numbers).

    Returns:
        Bits per element.
    """
    return n_grids * bits_per_grid / width


def allocate(sizes: Sequence[float], total: int, choices: Sequence[int]) -> list[int]:
    """Distribute bits over tensors so that those with larger entries get more.

    Model of the error: ``sum_t s_t^2 4^(-b_t)``, to be small under ``sum_t b_t <= total``. Greedy: all tensors start at the
    fewest bits; again and again the step to the next choice that lowers the error most per bit is taken, as long as one fits.

    Args:
        sizes: s_t, not negative.
        total: Most bits over all tensors.
        choices: Bits to choose from, ascending.

    Returns:
        Bits of every tensor. Their sum may stay below the total, where no further step fits.

    Raises:
        ConfigError: The total is less than the fewest bits of all tensors, or a size is negative or not finite.
    """
    if not all(0 <= size < float("inf") for size in sizes):
        raise ConfigError(f"expected finite sizes of at least 0 to distribute bits by, got {list(sizes)}")
    if total < choices[0] * len(sizes):
        raise ConfigError(f"expected at least {choices[0]} bits for each of {len(sizes)} tensors, got {total} in all")
    following = dict(pairwise(choices))
    bits = [choices[0]] * len(sizes)
    while True:
        # (s^2 4^-b - s^2 4^-b') / (b' - b) for every step that fits; the first of the largest wins
        left = total - sum(bits)
        steps = [(t, following[b]) for t, b in enumerate(bits) if b in following and following[b] - b <= left]
        if not steps:
            return bits
        gains = [sizes[t] ** 2 * (4.0 ** -bits[t] - 4.0**-more) / (more - bits[t]) for t, more in steps]
        chosen, more = steps[gains.index(max(gains))]
        bits[chosen] = more
