"""Hadamard matrices of many orders and the transform ``x -> x bar H_n^T``.

Objective: an exact +-1 matrix with ``H_n H_n^T = n I`` for every supported width, and ``bar H_n = H_n / sqrt(n)``
applied in O(n (K + log n)) for n = K 2^m: ``H_n = H_K kron H_2^m``.

Shapes: n width; K order of the odd part (1, 12, 20, 28, ...); x (..., n); H_K (K, K) int64.

Source: arXiv 2404.00456 (QuaRot), code spcl/QuaRot@5008669; the constructions of Paley, Williamson, Sylvester and Kronecker.
Weights and activations must both use this function: H_K from Paley I is not symmetric.

Deviations: matrices are constructed, so H_K may differ from the codes' table of the same order (equal quality, different
quantized model). A width without a known construction is an error. It is never zero-padded, because padding and cutting is not
orthogonal. The transform runs in float32 or float64; the QuaRot code rounds to half precision after every factor.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.checks import compute_dtype
from ptqbench.numerics.galois import jacobsthal, prime_power

OddHadamard = Literal["paley", "table", "as_code"]

#: The codes take the first divisor in these lists; n / K must then be a power of two (QuaRot; ResQ and CoQuant).
CODE_ORDERS: dict[str, tuple[int, ...]] = {
    "table": (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12),
    "as_code": (172, 156, 140, 108, 60, 52, 36, 231, 28, 44, 40, 20, 12, 37, 38),
}
#: Orders in ``as_code`` that are no Hadamard orders: the codes use a fixed random orthogonal matrix times sqrt(K).
ORTHOGONAL_ORDERS = frozenset({37, 38, 231})

#: Entries 1..(t-1)/2 of the symmetric circulant first rows A, B, C, D (entry 0 is +1) of the order 4 t matrices.
WILLIAMSON_ROWS: dict[int, tuple[str, str, str, str]] = {
    92: ("--++-+-+-++", "--+-+-+++++", "++---++--++", "--+--+++---"),
    116: ("+-+++--+-++---", "--+++--++-+---", "+-+-+++-++-+--", "++-+---++++-++"),
    156: ("-+-++-+--+--++-----", "-+++-++------+--+-+", "-+-++----+++--++---", "+---+-++++---+---+-"),
    172: (
        "+-+--++-+++----+++-++",
        "--++----+-+---+--++++",
        "--+++--+-+--+-+++++-+",
        "-+-+----++++-++++-++-",
    ),
}

#: With fewer columns a batched product on the left is slower than a transposed one, for a single column by a factor of 50.
NARROW = 16
_MAX_RADIX = 7  # dense Sylvester factors up to 128: one matrix product instead of seven passes over memory


@lru_cache(maxsize=256)
def factorise_order(n: int, odd_hadamard: OddHadamard = "paley") -> tuple[int, int]:
    """Choose K and m with n = K 2^m.

    ``paley`` takes the smallest K that can be built. It takes 2 K where K needs the field of a prime power and 2 K does not
    (25600 is 200 x 128, not 100 x 256). ``table`` and ``as_code`` follow the divisor lists of the published codes.

    Args:
        n: Width, at least 1.
        odd_hadamard: Rule that picks K.

    Returns:
        (K, m). K is 1 for powers of two. With ``as_code`` it may be 37, 38 or 231 (see `ORTHOGONAL_ORDERS`).

    Raises:
        ConfigError: Unknown rule or n < 1.
        UnsupportedError: No K serves; the message names n.
    """
    if n < 1:
        raise ConfigError(f"expected a Hadamard order of at least 1, got {n}")
    # n = odd * 2^j with the largest j
    odd = n // (n & -n)
    if odd_hadamard in CODE_ORDERS:
        # The first divisor of the list, if it leaves a power of two.
        base = next((k for k in CODE_ORDERS[odd_hadamard] if n % k == 0), 1)
        if (n // base).bit_count() == 1:
            return base, (n // base).bit_length() - 1
    elif odd_hadamard != "paley":
        raise ConfigError(f"expected odd_hadamard in ['paley', 'table', 'as_code'], got {odd_hadamard!r}")
    elif odd == 1:
        return 1, n.bit_length() - 1
    else:
        # K = odd * 4, odd * 8, ... as far as they can be built.
        candidates = [odd << j for j in range(2, (n & -n).bit_length()) if _construction(odd << j)]
        if candidates:
            base = candidates[0]
            if 2 * base in candidates and _field_degree(base) > 1 and _field_degree(2 * base) == 1:
                base *= 2
            return base, (n // base).bit_length() - 1
    raise UnsupportedError(
        f"expected a width K 2^m with a known Hadamard matrix of order K (rule {odd_hadamard!r}), got order {n}; "
        "leave this rotation out (none) or choose another rule for odd_hadamard"
    )


def hadamard_matrix(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Build the dense +-1 matrix H_n that `hadamard_transform` applies (without the 1/sqrt(n)).

    Args:
        n: Order.
        dtype: Result type.

    Returns:
        (n, n) matrix H_K kron H_2^m on the CPU, a fresh copy.

    Raises:
        UnsupportedError: The order cannot be built.
    """
    base, power = factorise_order(n)
    with torch.device("cpu"):
        return torch.kron(_base(base), _sylvester(power)).to(dtype)


def hadamard_transform(x: Tensor, *, dtype: torch.dtype | None = None, odd_factor: Tensor | None = None) -> Tensor:
    """Multiply the last axis by the orthogonal ``bar H_n^T``.

    The input side of a weight and the activations that enter it use the same call: ``(x H^T)(W H^T)^T = x W^T``.

    Args:
        x: (..., n) floating point, not modified. NaN spreads over its row.
        dtype: Type of the arithmetic; None takes float64 for float64 input and float32 otherwise. On a GPU float32 needs
            full-precision matrix products (TF32 off). Half precision, as in the QuaRot code, rounds after every factor.
        odd_factor: (K, K) orthogonal matrix in place of H_K / sqrt(K), with n / K a power of two; see
            `orthogonal.odd_factor`.

    Returns:
        (..., n) in the dtype of x.

    Raises:
        ConfigError: x is not floating point, or odd_factor does not fit n.
        UnsupportedError: The order cannot be built.
    """
    dtype = dtype or compute_dtype(x)
    if not dtype.is_floating_point:
        raise ConfigError(f"expected a floating-point type for a Hadamard transform, got {dtype}")
    n = x.shape[-1]
    if odd_factor is None:
        base, power = factorise_order(n)
        factor, scale = _base_as(base, dtype, x.device), 1 / math.sqrt(n)
    else:
        base, power = _split_by_factor(n, odd_factor)
        factor, scale = odd_factor.to(dtype=dtype, device=x.device), math.sqrt(0.5**power)
    # H_n = H_K kron H_2^m: with the last axis as (K, 2^m), x H_n^T = H_K x H_2^m, H_2^m being symmetric.
    work = x.to(dtype).reshape(math.prod(x.shape[:-1]), base, 2**power)
    work = _sylvester_transform(work, power)
    if base > 1:
        work = _first_axis(factor, work)
    # bar H_n = H_n / sqrt(n)
    return (work * scale).reshape(x.shape).to(x.dtype)


def _first_axis(factor: Tensor, x: Tensor) -> Tensor:
    """Multiply the middle axis of (N, K, p) by a (K, K) matrix; for small p by one product instead of N tiny ones."""
    if x.shape[2] >= NARROW:
        return torch.matmul(factor, x)
    return (x.transpose(1, 2) @ factor.T).transpose(1, 2)


def _split_by_factor(n: int, odd_factor: Tensor) -> tuple[int, int]:
    base = odd_factor.shape[0]
    if odd_factor.shape != (base, base) or n % base or (n // base).bit_count() != 1:
        raise ConfigError(
            f"expected a square odd_factor whose order divides n = {n} with a power-of-two quotient, "
            f"got shape {tuple(odd_factor.shape)}"
        )
    return base, (n // base).bit_length() - 1


def _sylvester_transform(x: Tensor, power: int) -> Tensor:
    """Multiply the last axis (2^power) by the unscaled H_2^power in a few dense factors: H_2^(a+b) = H_2^a kron H_2^b."""
    rows, base, width = x.shape
    stages = -(-power // _MAX_RADIX)
    done = 1
    for stage in range(stages):
        # One dense factor H_2^bits acts on the next ``bits`` bits of the index, from the fastest on; the bits before them count
        # ``done`` positions.
        bits = power // stages + (stage < power % stages)
        factor = _sylvester_as(bits, x.dtype, x.device)
        lines = rows * base * width // (done * 2**bits)
        if done == 1:
            x = torch.matmul(x.reshape(lines, 2**bits), factor)
        else:
            x = torch.matmul(factor, x.reshape(lines, 2**bits, done))
        done *= 2**bits
    return x.reshape(rows, base, width)


def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(power):
        # H_2^(a+1) = [[1, 1], [1, -1]] kron H_2^a
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
    return matrix


def paley(q: int) -> Tensor:
    """Build the matrix of Paley I (q = 3 mod 4) or of Paley II (q = 1 mod 4).

    With J the Jacobsthal matrix: Paley I is ``I + [[0, 1^T], [-1, J]]``, of order q + 1. Paley II is
    ``C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]]`` with ``C = [[0, 1^T], [1, J]]``, of order 2 (q + 1).

    Args:
        q: Odd prime power.

    Returns:
        int64. Paley I is not symmetric (its off-diagonal part is antisymmetric), Paley II is.

    Raises:
        UnsupportedError: q is no odd prime power.
    """
    # S or C: a border of ones around J, antisymmetric for Paley I
    skew = q % 4 == 3
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1 if skew else 1, jacobsthal(q)
    identity = torch.eye(q + 1, dtype=torch.int64)
    if skew:
        return identity + bordered
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(bordered, plus) + torch.kron(identity, minus)


def williamson(order: int) -> Tensor:
    """Build the Williamson matrix of four symmetric circulants with A A + B B + C C + D D = order I.

    Args:
        order: One of `WILLIAMSON_ROWS`.

    Returns:
        (order, order) int64.

    Raises:
        UnsupportedError: The first rows of this order are not stored.
    """
    if order not in WILLIAMSON_ROWS:
        raise UnsupportedError(f"expected a Williamson order in {sorted(WILLIAMSON_ROWS)}, got order {order}")
    a, b, c, d = (_symmetric_circulant(signs) for signs in WILLIAMSON_ROWS[order])
    # [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _symmetric_circulant(signs: str) -> Tensor:
    first = torch.tensor([1] + [1 if sign == "+" else -1 for sign in signs + signs[::-1]])
    return torch.stack([first.roll(shift) for shift in range(len(first))])


@lru_cache(maxsize=1024)
def _construction(order: int) -> tuple[str, int] | None:
    """Return how H_order is built, as (name, argument); None where no construction is known.

    Paley I and II over prime fields come first, then Williamson, then Paley over prime powers, then Kronecker products.
    """
    for prime_only in (True, False):
        for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
            split = prime_power(q) if order % 4 == 0 and q % 4 == residue else None
            if split and (split[1] == 1 or not prime_only):
                return "paley", q
        if order in WILLIAMSON_ROWS:
            return "williamson", order
    # H_left kron H_right
    for left in range(12, math.isqrt(order) + 1, 4):
        if order % left == 0 and _construction(left) and _construction(order // left):
            return "kronecker", left
    return None


def _field_degree(order: int) -> int:
    """Return the exponent k of the field GF(p^k) behind a Paley order; 1 for every other construction."""
    name, argument = _construction(order) or ("", 0)
    split = prime_power(argument) if name == "paley" else None
    return split[1] if split else 1


@lru_cache(maxsize=32)
def _base(order: int) -> Tensor:
    """Build H_K on the CPU. The cached tensor is shared, so it never leaves this module unconverted."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    name, argument = _construction(order) or ("", 0)
    with torch.inference_mode(False), torch.device("cpu"):
        if name == "kronecker":
            return torch.kron(_base(argument), _base(order // argument))
        return paley(argument) if name == "paley" else williamson(argument)


@lru_cache(maxsize=32)
def _base_as(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would break later autograd
        return _base(order).to(dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _sylvester_as(power: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return _sylvester(power).to(dtype=dtype, device=device)
