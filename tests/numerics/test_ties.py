"""Ties of symmetric grids with an even number of levels: codes by exact arithmetic, in every dtype and engine."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused_columns import DEVICE, needs_kernel

from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest


def exact_codes(row: list[Fraction], bits: int) -> list[int]:
    """Codes of ``sym_gptq``: scale = 2 max|w| / (2^bits - 1), ties to even (that is what ``round`` does)."""
    scale = 2 * max(map(abs, row)) / (2**bits - 1)
    return [min(max(round(w / scale) + 2 ** (bits - 1), 0), 2**bits - 1) for w in row]


def tied_rows(bits: int) -> list[list[Fraction]]:
    """Rows of 16-bit weights: the largest magnitude m negative, and every half step whose value is such a number."""
    rows, levels = [], 2**bits - 1
    for m in (1, 3, 5, 7, 11, 17, 37, 83, 105, 251):
        # m k / levels is a binary fraction only where it is an integer, levels being odd
        exact = [Fraction(m * k, levels) for k in range(-levels, levels + 1, 2) if m * k % levels == 0]
        rows.append([Fraction(-m), *exact, Fraction(0)])
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 15])
def test_rounding_decides_ties_as_exact_arithmetic_does(bits: int, dtype: torch.dtype) -> None:
    for row in tied_rows(bits):
        for power in (-9, 0, 4):  # a power of two changes no code
            weight = torch.tensor([[float(w) * 2.0**power for w in row]], dtype=dtype)
            grid = uniform_grid(len(row), GridSpec(bits, "sym_gptq"))
            assert round_to_nearest(weight, grid).stored.codes.tolist() == [exact_codes(row, bits)]


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.integers(-255, 255), min_size=1, max_size=12).filter(lambda row: min(row) < 0),
    scale=st.floats(1e-3, 1e3),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_row_of_few_bits_is_rounded_exactly(row: list[int], scale: float, bits: int, dtype: torch.dtype) -> None:
    unit = Fraction(float(torch.tensor(scale, dtype=torch.bfloat16)))  # so that products with integers are exact
    exact = [w * unit for w in row]
    result = round_to_nearest(
        torch.tensor([[float(w) for w in exact]], dtype=dtype), uniform_grid(len(row), GridSpec(bits, "sym_gptq"))
    )
    assert result.stored.codes.tolist() == [exact_codes(exact, bits)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weight_gets_the_lowest_code_in_the_column_loop(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight[:, 0] = -(weight.abs().amax(dim=1) + 0.1)
    moment = torch.eye(3, dtype=dtype) + 0.5
    for size in (None, 3):
        result = gptq(weight, moment, uniform_grid(3, GridSpec(bits, "sym_gptq", group_size=size)), engine="plain")
        assert (result.stored.codes[:, 0] == 0).all()


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_kernel_decides_ties_as_exact_arithmetic_does(bits: int) -> None:
    for row in tied_rows(bits)[2:7:2]:
        weight = torch.tensor([[float(w) for w in row]], device=DEVICE)
        result = gptq(
            weight,
            torch.eye(len(row), device=DEVICE),
            uniform_grid(len(row), GridSpec(bits, "sym_gptq")),
            engine="fused",
        )
        assert result.stored.codes.tolist() == [exact_codes(row, bits)]
