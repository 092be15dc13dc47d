"""Bits of several tensors under one budget: golden numbers of spectral-kv's code, and the laws of its greedy rule."""

import itertools
import random

import pytest

from ptqbench.errors import ConfigError
from ptqbench.numerics.bits import allocate

CHOICES = (2, 3, 4, 6, 8)
STORIES = {  # stories260K: Frobenius norms, largest singular values, mean traces of keys and values, by block
    "weight_fro": ([10.240, 10.463, 8.2735, 9.2586, 6.8746], [2.0903, 2.2226, 2.7637, 3.2026, 4.6615]),
    "weight_spec": ([8.319, 8.353, 6.2004, 7.4591, 4.8883], [0.637, 0.6293, 0.8768, 0.9663, 1.3517]),
    "activation": ([x**0.5 for x in (213.65, 382.46, 165.27, 230.14, 92.60)], [x**0.5 for x in (1.20, 1.30, 1.88, 2.32, 4.02)]),
}  # fmt: skip


def error(sizes, bits):
    return sum(size**2 * 4.0**-b for size, b in zip(sizes, bits, strict=True))


@pytest.mark.parametrize(
    ("sizes", "total", "choices", "expected"),
    [
        ([1.5, 2, 1], 12, CHOICES, [4, 4, 4]),
        ([4, 1, 2, 1], 16, CHOICES, [6, 3, 4, 3]),
        ([8, 1], 8, CHOICES, [6, 2]),
        ([2, 1], 8, (2, 4, 8), [4, 4]),
        ([5, 0.001724, 0.009982, 5], 25, CHOICES, [8, 3, 6, 8]),  # 8 4 4 8 with the tolerance of the code
    ],
)
def test_golden_allocations(sizes, total, choices, expected):
    assert allocate(sizes, total, choices) == expected


@pytest.mark.parametrize(
    ("measure", "budget", "keys", "values"),
    [
        ("weight_fro", 3, [4, 4, 4, 4, 3], [2, 2, 2, 2, 3]),
        ("weight_fro", 4, [6, 6, 4, 4, 4], [3, 3, 3, 3, 4]),
        ("weight_spec", 3, [4] * 5, [2] * 5),
        ("weight_spec", 4, [6, 6, 6, 6, 4], [2, 2, 2, 3, 3]),
        ("activation", 3, [4] * 5, [2] * 5),
        ("activation", 4, [6, 6, 6, 6, 4], [2, 2, 2, 3, 3]),
    ],
)
def test_golden_bits_of_stories260k(measure, budget, keys, values):
    pairs = zip(*STORIES[measure], strict=True)
    found = allocate([size for pair in pairs for size in pair], budget * 10, CHOICES)
    assert (found[::2], found[1::2]) == (keys, values)


def test_greedy_is_the_optimum_where_steps_are_of_one_bit():
    draw = random.Random(0)
    for _ in range(200):
        sizes, total = [draw.lognormvariate(0, 2) for _ in range(4)], draw.randint(8, 20)
        best = min(
            (bits for bits in itertools.product((2, 3, 4, 5), repeat=4) if sum(bits) <= total),
            key=lambda bits: error(sizes, bits),
        )
        assert error(sizes, allocate(sizes, total, (2, 3, 4, 5))) == pytest.approx(error(sizes, best))


def test_laws_of_the_rule():
    draw = random.Random(1)
    for _ in range(200):
        sizes, total = [draw.lognormvariate(0, 3) for _ in range(6)], draw.randint(12, 48)
        bits = allocate(sizes, total, CHOICES)
        assert sum(bits) <= total
        steps = [later - b for b, later in itertools.product(bits, CHOICES) if later > b]
        assert not steps or sum(bits) + min(steps) > total, "no single further step fits"
        assert allocate([1e-6 * size for size in sizes], total, CHOICES) == bits, "no scale is preferred"
        order = draw.sample(range(6), 6)
        assert allocate([sizes[i] for i in order], total, CHOICES) == [bits[i] for i in order]
        ranked = [b for _, b in sorted(zip(sizes, bits, strict=True))]
        assert ranked == sorted(ranked), "a larger tensor never gets fewer bits"
    assert allocate([3.0] * 6, 24, CHOICES) == [4] * 6
    assert sum(allocate([0.0, 0.0], 8, CHOICES)) == 8, "bits of tensors that are zero are not left over"


def test_impossible_budgets_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="at least 2 bits for each of 3"):
        allocate([1, 1, 1], 5, CHOICES)
    for size in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite sizes"):
            allocate([1.0, size], 8, CHOICES)
