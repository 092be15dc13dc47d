"""Laws and golden numbers of the Hadamard matrices and of the finite fields behind them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics import hadamard as module
from ptqbench.numerics.galois import irreducible_modulus, jacobsthal, prime_power
from ptqbench.numerics.hadamard import (
    CODE_ORDERS,
    ORTHOGONAL_ORDERS,
    factorise_order,
    hadamard_matrix,
    hadamard_transform,
    paley,
    williamson,
)
from ptqbench.numerics.orthogonal import generator, odd_factor

# Every width of the supported models and the recommended (K, m), K x 2^m.
RECOMMENDED = {
    **{2**m: (1, m) for m in range(14)},
    **{12 << m: (12, m) for m in (0, 1, 7, 8, 9, 10)},
    **{20 << m: (20, m) for m in (0, 1, 7, 8)},
    **{28 << m: (28, m) for m in (0, 5, 7, 9, 10)},
    4864: (76, 6),
    9728: (76, 7),
    8960: (140, 6),
    11008: (172, 6),
    13824: (108, 7),
    27648: (108, 8),
    17408: (68, 8),
    18944: (148, 7),
    25600: (200, 7),
    29568: (924, 5),
    172: (172, 0),
    344: (172, 1),
}
# Multiples of 4 up to 600 that none of the constructions reaches.
UNREACHABLE = {188, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508, 520, 532}
UNREACHABLE |= {536, 584, 596}
VERIFIED_ORDERS = [
    4,
    8,
    12,
    20,
    24,
    28,
    36,
    44,
    52,
    60,
    68,
    76,
    92,
    100,
    108,
    116,
    140,
    144,
    148,
    156,
    172,
    200,
    344,
    924,
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def is_hadamard(matrix: torch.Tensor) -> bool:
    n = len(matrix)
    gram = matrix.double() @ matrix.double().T  # products of +-1 up to 2^53: exact
    return bool((matrix.abs() == 1).all()) and torch.equal(gram, n * torch.eye(n, dtype=torch.float64))


def test_golden_transform_of_four() -> None:
    assert hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5, -1, -2, 0]


def test_golden_paley() -> None:
    assert paley(3).tolist() == [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    twelve = hadamard_matrix(12)
    assert twelve[0].tolist() == [1] * 12
    assert twelve[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]
    assert not torch.equal(twelve, twelve.T)
    other = paley(5)
    assert other[0].tolist() == [1, -1] + [1] * 10
    assert other[1].tolist() == [-1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]
    assert torch.equal(other, other.T)


def test_golden_transforms_of_counting_vectors() -> None:
    twelve = [19.052559, 3.464102, 0.577350, 4.041452, 1.154701, -1.732051]
    twelve += [-4.618802, -1.154701, 2.309401, 5.773503, 2.886751, 6.350853]
    result = hadamard_transform(torch.arange(12, dtype=torch.float64))
    torch.testing.assert_close(result, torch.tensor(twelve, dtype=torch.float64), atol=5e-7, rtol=0)
    head = hadamard_transform(torch.arange(24, dtype=torch.float64))[:4]
    expected = torch.tensor([56.338264, -2.449490, 9.797959, 0], dtype=torch.float64)
    torch.testing.assert_close(head, expected, atol=5e-7, rtol=0)


@pytest.mark.parametrize("q", [3, 11, 5, 13])
def test_paley_matches_scalar_oracle(q: int) -> None:
    """Build the bordered matrix entry by entry, with chi from Euler's criterion."""
    chi = [0] + [1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q)]
    border = -1 if q % 4 == 3 else 1
    core = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    for i, j in itertools.product(range(q + 1), repeat=2):
        if i == 0 or j == 0:
            core[i, j] = 0 if i == j else (1 if i == 0 else border)
        else:
            core[i, j] = chi[(i - j) % q]
    if q % 4 == 3:
        expected = core + torch.eye(q + 1, dtype=torch.int64)
    else:
        expected = torch.zeros(2 * q + 2, 2 * q + 2, dtype=torch.int64)
        for i, j in itertools.product(range(q + 1), repeat=2):
            block = torch.tensor([[1, 1], [1, -1]]) * core[i, j]
            expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
            if i == j:
                expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += torch.tensor([[1, -1], [-1, -1]])
    assert torch.equal(paley(q), expected)


def test_prime_powers_and_moduli() -> None:
    assert [q for q in range(30) if prime_power(q)] == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29]
    assert (prime_power(343), prime_power(461), prime_power(-3)) == ((7, 3), (461, 1), None)
    found = {q: irreducible_modulus(*prime_power(q)) for q in (9, 25, 27, 49, 343)}
    assert found == {9: (1, 0), 49: (1, 0), 343: (1, 0, 1), 27: (1, 0, 2), 25: (1, 1)}


def test_quartic_modulus_has_no_quadratic_factor() -> None:
    """A quartic without roots can still split into quadratics: x^4 + 1 does over GF(3)."""
    assert irreducible_modulus(3, 4) != (1, 0, 0, 0)
    assert prime_power(81) == (3, 4)
    assert is_hadamard(paley(81))


@pytest.mark.parametrize("q", [3, 5, 7, 9, 13, 25, 27, 49, 125])
def test_jacobsthal_laws(q: int) -> None:
    matrix = jacobsthal(q)
    ones = torch.ones(q, q, dtype=torch.int64)
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.int64) - ones)
    assert not (matrix @ ones).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


def test_character_is_multiplicative_in_gf49() -> None:
    """chi(ab) = chi(a) chi(b) with products of a + b i, i^2 = -1, multiplied here by hand."""
    chi = jacobsthal(49)[:, 0]
    for a, b in itertools.product(range(49), repeat=2):
        (a0, a1), (b0, b1) = (a % 7, a // 7), (b % 7, b // 7)
        product = (a0 * b0 - a1 * b1) % 7 + 7 * ((a0 * b1 + a1 * b0) % 7)
        assert chi[product] == chi[a] * chi[b]


def test_williamson_172_is_the_coset_construction() -> None:
    subgroup = (1, 6, 7, 36, 37, 42)
    circulants = []
    for signs in ("++++---", "-++--+-", "-+-+++-", "--++-++"):
        row = [1] * 43
        for i, s in itertools.product(range(7), subgroup):
            row[pow(3, i, 43) * s % 43] = 1 if signs[i] == "+" else -1
        circulants.append(torch.tensor([[row[(j - i) % 43] for j in range(43)] for i in range(43)]))
    a, b, c, d = circulants
    rows = ([a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a])
    assert torch.equal(williamson(172), torch.cat([torch.cat(row, 1) for row in rows]))


@pytest.mark.parametrize("n", VERIFIED_ORDERS)
def test_matrices_are_hadamard(n: int) -> None:
    assert is_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize("q", [27, 343])
def test_paley_one_over_prime_powers(q: int) -> None:
    assert is_hadamard(paley(q))


@pytest.mark.parametrize("n", sorted(module.WILLIAMSON_ROWS))
def test_williamson_orders(n: int) -> None:
    assert is_hadamard(williamson(n))


def test_sylvester_is_bit_parity() -> None:
    expected = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    assert hadamard_matrix(32).tolist() == expected


@pytest.mark.parametrize(("n", "factors"), RECOMMENDED.items())
def test_recommended_factorisation(n: int, factors: tuple[int, int]) -> None:
    assert factorise_order(n) == factors
    assert is_hadamard(hadamard_matrix(factors[0]))


@pytest.mark.parametrize("n", [1, 2, 8, 12, 16, 24, 28, 40, 64, 92, 104, 128, 172, 256, 344, 512, 896, 1536])
def test_transform_equals_dense_product(n: int) -> None:
    x = random(3, 2, n)
    expected = x @ hadamard_matrix(n, torch.float64).T / n**0.5
    torch.testing.assert_close(hadamard_transform(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", RECOMMENDED)
def test_transform_structure_at_full_width(n: int) -> None:
    """Isometry, and the two Kronecker parts separately: columns of H are H_K columns times Sylvester columns."""
    x = random(4, n)
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, atol=1e-12 * n, rtol=0)
    base, power = factorise_order(n)
    a, j = base // 2, 2**power // 3
    unit = torch.zeros(n, dtype=torch.float64)
    unit[a * 2**power + j] = 1
    parity = torch.tensor([(-1.0) ** (i & j).bit_count() for i in range(2**power)], dtype=torch.float64)
    column = torch.kron(hadamard_matrix(base, torch.float64)[:, a], parity) / n**0.5
    torch.testing.assert_close(hadamard_transform(unit), column, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("n", [64, 12, 24, 28])
def test_weights_and_activations_cancel(n: int) -> None:
    """Holds for symmetric and non-symmetric H_K because both sides use x -> x bar H^T."""
    x, weight = random(5, n), random(7, n, seed=1)
    rotated = hadamard_transform(x) @ hadamard_transform(weight).T
    torch.testing.assert_close(rotated, x @ weight.T, atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600))
def test_every_order_is_exact_or_refused(n: int) -> None:
    if n in (1, 2) or (n % 4 == 0 and n not in UNREACHABLE):
        base, power = factorise_order(n)
        assert base << power == n
        assert is_hadamard(hadamard_matrix(n))
    else:
        with pytest.raises(UnsupportedError, match=rf"\b{n}\b"):
            hadamard_transform(torch.ones(n))


@pytest.mark.parametrize("n", [3, 6, 14, 22, 50, 668, 896 + 2])
def test_unsupported_orders_are_named(n: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"\b{n}\b"):
        hadamard_transform(torch.ones(2, n))


def test_code_rules() -> None:
    as_code = {11008: (172, 6), 13824: (108, 7), 8192: (1, 13), 14336: (28, 9), 28672: (28, 10), 4864: (38, 7)}
    as_code |= {8960: (140, 6), 18944: (37, 9), 27648: (108, 8), 29568: (231, 7)}
    assert {n: factorise_order(n, "as_code") for n in as_code} == as_code
    for n in (4864, 9728, 17408, 18944, 25600, 29568):
        with pytest.raises(UnsupportedError, match=str(n)):
            factorise_order(n, "table")
    assert factorise_order(5120, "table") == (40, 7)
    for rule in ("table", "as_code"):
        for base in set(CODE_ORDERS[rule]) - ORTHOGONAL_ORDERS:
            assert is_hadamard(hadamard_matrix(base))
    with pytest.raises(ConfigError, match="paley"):
        factorise_order(64, "sloane")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        factorise_order(0)


@pytest.mark.parametrize(("n", "base"), [(4864, 38), (18944, 37), (29568, 231), (11008, 172), (8192, 1)])
def test_as_code_factor(n: int, base: int) -> None:
    factor = odd_factor(n, "as_code", generator(0, "down"))
    assert factor.shape == (base, base)
    torch.testing.assert_close(factor @ factor.T, torch.eye(base, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(factor, odd_factor(n, "as_code", generator(0, "down")))
    assert (base in ORTHOGONAL_ORDERS) != torch.equal(factor, odd_factor(n, "as_code", generator(1, "down")))
    x = random(2, n)
    y = hadamard_transform(x, odd_factor=factor)
    dense = torch.einsum("ab,rbj->raj", factor, x.reshape(2, base, -1))
    dense = hadamard_transform(dense).reshape(2, n)
    torch.testing.assert_close(y, dense, atol=1e-11, rtol=0)


def test_odd_factor_of_the_default_rule_changes_nothing() -> None:
    x = random(2, 896)
    factor = odd_factor(896, "paley", generator(0, "down"))
    torch.testing.assert_close(hadamard_transform(x, odd_factor=factor), hadamard_transform(x), atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="odd_factor"):
        hadamard_transform(random(2, 48), odd_factor=factor)


def test_dtypes() -> None:
    x = random(4, 96)
    untouched = x.clone()
    exact = hadamard_transform(x)
    assert exact.dtype == torch.float64
    assert torch.equal(x, untouched)
    single = hadamard_transform(x, dtype=torch.float32)
    assert single.dtype == torch.float64
    assert torch.equal(single, single.float().double())
    assert torch.equal(hadamard_transform(x.float()), hadamard_transform(x.float(), dtype=torch.float32))
    assert not torch.equal(hadamard_transform(x.float()), hadamard_transform(x.float(), dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(hadamard_transform(half), hadamard_transform(half.float()).to(dtype))
    wide = hadamard_transform(x.half(), dtype=torch.float64)
    assert torch.equal(wide, hadamard_transform(x.half().double()).half())
    rough = hadamard_transform(x.half(), dtype=torch.float16)
    assert not torch.equal(rough, hadamard_transform(x.half())), "half precision rounds after every factor"
    torch.testing.assert_close(rough.double(), exact, atol=2e-2, rtol=0)
    with pytest.raises(ConfigError, match="floating-point type"):
        hadamard_transform(x, dtype=torch.int64)


def test_empty_batch_and_fresh_matrices() -> None:
    assert hadamard_transform(torch.ones(0, 3, 24)).shape == (0, 3, 24)
    hadamard_matrix(12).zero_()
    assert is_hadamard(hadamard_matrix(12))


def test_matrices_cached_in_inference_mode_still_allow_gradients() -> None:
    module._base.cache_clear(), module._base_as.cache_clear(), module._sylvester_as.cache_clear()
    with torch.inference_mode():
        hadamard_transform(torch.ones(2, 88))
    x = torch.ones(2, 88, requires_grad=True)
    hadamard_transform(x).sum().backward()
    expected = hadamard_matrix(88, torch.float32).sum(0) / 88**0.5
    torch.testing.assert_close(x.grad[0], expected, atol=1e-5, rtol=1e-5)
