"""Finite fields GF(p^k) and their quadratic character: the raw material of the Paley Hadamard matrices.

Objective: the exact integer matrix ``J[i, j] = chi(a_i - a_j)`` (Jacobsthal), with ``chi(0) = 0``, ``chi(square) = 1``
and ``chi(non-square) = -1``.

Shapes: q = p^k elements; an element is an integer code 0..q-1 whose base-p digits are its polynomial coefficients,
constant term first (for a prime field the code is the residue itself). Digit tensors are (..., k) int64.

Source: Paley 1933. The modulus is the first irreducible monic polynomial in lexicographic order of its coefficients, constant
term first. This fixes the order of the elements, and with it every matrix.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ptqbench.errors import UnsupportedError


def prime_power(q: int) -> tuple[int, int] | None:
    """Split q into a prime and an exponent.

    Args:
        q: Any integer.

    Returns:
        (p, k) with p prime, k >= 1 and p^k = q, or None when q is no prime power (also for q < 2).
    """
    if q < 2:
        return None
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    exponent, rest = 0, q
    while rest % prime == 0:
        exponent, rest = exponent + 1, rest // prime
    return (prime, exponent) if rest == 1 else None


def jacobsthal(q: int) -> Tensor:
    """Build the Jacobsthal matrix of GF(q).

    Args:
        q: Odd prime power.

    Returns:
        (q, q) int64 matrix chi(a_i - a_j): zero diagonal, +-1 elsewhere; symmetric for q = 1 mod 4, antisymmetric for
        q = 3 mod 4.

    Raises:
        UnsupportedError: q is no odd prime power.
    """
    split = prime_power(q)
    if split is None or split[0] == 2:
        raise UnsupportedError(f"expected an odd prime power for a Jacobsthal matrix, got q = {q}; use another order")
    p, k = split
    # chi(a_i - a_j): elements are subtracted digit by digit modulo p
    digits = _digits(torch.arange(q), p, k)
    differences = (digits[:, None, :] - digits[None, :, :]) % p
    return _quadratic_character(p, k)[_codes(differences, p)]


def irreducible_modulus(p: int, k: int) -> tuple[int, ...]:
    """Find the first irreducible monic polynomial of degree k over GF(p).

    Args:
        p: Prime.
        k: Degree, at least 1.

    Returns:
        The k lower coefficients, constant term first; the leading coefficient 1 is left out. For k = 1 this is (0,),
        the polynomial x, which leaves the residues themselves.
    """
    # A reducible polynomial of degree k has a monic divisor of degree k / 2 or less.
    divisors = [(*lower, 1) for degree in range(1, k // 2 + 1) for lower in itertools.product(range(p), repeat=degree)]
    candidates = itertools.product(range(p), repeat=k)
    return next(lower for lower in candidates if not any(_divides(divisor, (*lower, 1), p) for divisor in divisors))


def _quadratic_character(p: int, k: int) -> Tensor:
    """Tabulate chi over the q = p^k codes, as a (q,) int64 tensor."""
    # chi = 1 on the squares of the elements 1, ..., q - 1, chi(0) = 0, chi = -1 elsewhere
    q = p**k
    chi = torch.full((q,), -1)
    chi[_codes(_squares(_digits(torch.arange(1, q), p, k), p), p)] = 1
    chi[0] = 0
    return chi


def _squares(digits: Tensor, p: int) -> Tensor:
    """Square every element of a (n, k) digit tensor modulo the field's polynomial."""
    n, k = digits.shape
    product = torch.zeros(n, 2 * k - 1, dtype=torch.int64)
    # (sum_i d_i x^i)^2 = sum_ij d_i d_j x^(i + j)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += digits[:, i] * digits[:, j]
    # Reduce by the modulus from the highest power down: x^top = -(lower coefficients) x^(top - k).
    lower = torch.tensor(irreducible_modulus(p, k))
    for top in range(2 * k - 2, k - 1, -1):
        product[:, top - k : top] -= product[:, top : top + 1] * lower
    return product[:, :k] % p


def _divides(divisor: tuple[int, ...], polynomial: tuple[int, ...], p: int) -> bool:
    """Whether a monic divisor divides the polynomial over GF(p) (coefficients constant term first)."""
    rest = list(polynomial)
    degree = len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        # Long division: subtract factor x^(top - degree) times the divisor, which clears the power ``top``.
        factor = rest[top]
        for offset, coefficient in enumerate(divisor):
            rest[top - degree + offset] = (rest[top - degree + offset] - factor * coefficient) % p
    return not any(rest)


def _digits(codes: Tensor, p: int, k: int) -> Tensor:
    """Write codes as k base-p digits, constant term first, along a new last axis."""
    return torch.stack([codes // p**i % p for i in range(k)], dim=-1)


def _codes(digits: Tensor, p: int) -> Tensor:
    """Invert `_digits`."""
    powers = torch.tensor([p**i for i in range(digits.shape[-1])])
    return (digits * powers).sum(-1)
