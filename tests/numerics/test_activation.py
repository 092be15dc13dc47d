"""Laws of dynamic activation quantization, against a scalar oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.activation import (
    ActivationGrid,
    apply_grid,
    fake_quantize,
    fake_quantize_tensor,
    fit_range,
)
from ptqbench.numerics.grid_spec import code_limits


def oracle(row: list[float], bits: int, symmetric: bool, clip_ratio: float, range_contains_zero: bool) -> list[float]:
    """Quantize one row with Python floats, one value at a time (round() is half-to-even, like torch)."""
    if symmetric:
        scale = clip_ratio * max(abs(v) for v in row) / (2 ** (bits - 1) - 1) or 1.0
        return [scale * min(max(round(v / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in row]
    low, high = min(row), max(row)
    if range_contains_zero or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    low, high = low * clip_ratio, high * clip_ratio
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    return [scale * (min(max(round(v / scale) + zero_point, 0), 2**bits - 1) - zero_point) for v in row]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-200, 200).map(lambda v: v / 16), min_size=1, max_size=9),
    st.integers(2, 9),
    st.booleans(),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.booleans(),
)
def test_matches_scalar_oracle(
    row: list[float], bits: int, symmetric: bool, clip_ratio: float, range_contains_zero: bool
) -> None:
    got = fake_quantize(torch.tensor([row], dtype=torch.float64), bits, symmetric, clip_ratio, range_contains_zero)
    assert got[0].tolist() == pytest.approx(oracle(row, bits, symmetric, clip_ratio, range_contains_zero), abs=1e-12)


def test_golden_symmetric() -> None:
    x = torch.tensor([[-7.0, 0.4, 2.6, 7.0]])
    assert fake_quantize(x, 4, symmetric=True).tolist() == [[-7, 0, 3, 7]]
    clipped = fake_quantize(torch.tensor([[-14.0, 1.0]]), 4, symmetric=True, clip_ratio=0.5)
    assert clipped.tolist() == [[-8, 1]]  # the signed grid reaches one step further down


def test_golden_asymmetric() -> None:
    scale, zero_point = fit_range(torch.tensor([[-3.0, 12.0], [15.0, 30.0]]), 4, symmetric=False)
    assert (scale.flatten().tolist(), zero_point.flatten().tolist()) == ([1, 2], [3, 0])
    scale, zero_point = fit_range(torch.tensor([[15.0, 30.0]]), 4, symmetric=False, range_contains_zero=False)
    assert (scale.item(), zero_point.item()) == (1, -15)  # rounded, not clamped
    x = torch.tensor([[15.0, 20.2, 30.0]])
    assert fake_quantize(x, 4, range_contains_zero=False).tolist() == [[15, 20, 30]]
    assert fake_quantize(x, 4).tolist() == [[16, 20, 30]]


def test_asymmetric_clip_ratio() -> None:
    x = torch.tensor([[-10.0, 20.0]])
    scale, zero_point = fit_range(x, 4, symmetric=False, clip_ratio=0.9)
    assert scale.item() == pytest.approx(27 / 15)
    assert zero_point.item() == 5
    assert fake_quantize(x, 4, clip_ratio=0.9)[0].tolist() == pytest.approx([-9, 18])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_contains_zero", [True, False])
def test_zero_rows(symmetric: bool, range_contains_zero: bool) -> None:
    x = torch.stack([torch.zeros(4), torch.arange(4.0)])
    scale, zero_point = fit_range(x, 4, symmetric, 0.9, range_contains_zero)
    assert scale[0].item() == pytest.approx(1.0 if symmetric or not range_contains_zero else 2 / 15)
    allowed = (7, 8) if not symmetric and range_contains_zero else (0,)  # round(7.5) up to rounding of the scale
    assert zero_point[0].item() in allowed
    result = fake_quantize(x, 4, symmetric, 0.9, range_contains_zero)
    assert not result[0].any()
    assert result[1].any()


@pytest.mark.parametrize("value", [3.7, -0.01, 1e-30, -5e4])
@pytest.mark.parametrize("range_contains_zero", [True, False])
def test_single_channel_is_lossless(value: float, range_contains_zero: bool) -> None:
    x = torch.tensor([[value]])
    torch.testing.assert_close(fake_quantize(x, 4, range_contains_zero=range_contains_zero), x, rtol=1e-6, atol=0)
    constant = x.expand(1, 5)
    torch.testing.assert_close(fake_quantize(constant, 2, range_contains_zero=range_contains_zero), constant)


def test_tiny_range_does_not_divide_by_zero() -> None:
    x = torch.tensor([[1e-45, 0.0], [1.0, 1.0 + 1.2e-7], [3e-45, 1e-45]])
    for symmetric in (True, False):
        for contains_zero in (True, False):
            result = fake_quantize(x, 8, symmetric, 1.0, contains_zero)
            torch.testing.assert_close(result, x, atol=1e-2, rtol=0)


def test_error_is_at_most_half_a_step_inside_the_range() -> None:
    x = random(50, 32)
    for symmetric in (True, False):
        for contains_zero in (True, False):
            scale, _ = fit_range(x, 5, symmetric, 1.0, contains_zero)
            error = (fake_quantize(x, 5, symmetric, 1.0, contains_zero) - x).abs()
            # an integer zero_point may shift the grid by half a step at the ends of the range
            assert (error <= scale * (0.5 if symmetric else 1.0) + 1e-12).all()
            assert error.max() > 0


def test_rows_are_independent_and_scale_equivariant() -> None:
    x = random(6, 16)
    whole = fake_quantize(x, 4)
    assert torch.equal(whole[2], fake_quantize(x[2], 4))
    torch.testing.assert_close(fake_quantize(8 * x, 4), 8 * whole)
    assert torch.equal(fake_quantize(x.reshape(2, 3, 16), 4), whole.reshape(2, 3, 16))


def test_zero_stays_zero_when_in_range() -> None:
    x = random(20, 8)
    x[:, 3] = 0
    for symmetric in (True, False):
        assert not fake_quantize(x, 3, symmetric)[:, 3].any()


def test_symmetric_is_odd_and_idempotent() -> None:
    x = random(20, 8)
    once = fake_quantize(x, 4, symmetric=True)
    assert torch.equal(fake_quantize(-x, 4, symmetric=True), -once)
    torch.testing.assert_close(fake_quantize(once, 4, symmetric=True), once)


def test_sixteen_bits_returns_the_input_itself() -> None:
    x = random(3, 8).bfloat16()
    assert fake_quantize(x, 16) is x
    assert fake_quantize_tensor(x, 16) is x
    assert apply_grid(x, ActivationGrid(16), n_groups=2) is x
    assert apply_grid(x, ActivationGrid(16, high_bits=16, n_high=2)) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (100 * random(40, 64)).to(dtype)
    before = x.clone()
    assert torch.equal(fake_quantize(x, 4), fake_quantize(x.float(), 4).to(dtype))
    assert torch.equal(x, before)
    single = fake_quantize(x.float(), 4)
    assert single.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_contains_zero", [True, False])
def test_bad_rows_become_nan_and_stay_alone(bad: float, symmetric: bool, range_contains_zero: bool) -> None:
    x = random(3, 5)
    x[1, 2] = bad
    result = fake_quantize(x, 4, symmetric, 1.0, range_contains_zero)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_two_parts_are_two_independent_grids() -> None:
    x = random(5, 16) * torch.linspace(0.1, 9, 16, dtype=torch.float64)
    grid = ActivationGrid(4, high_bits=8, n_high=2)
    expected = torch.cat([fake_quantize(x[:, :14], 4), fake_quantize(x[:, 14:], 8)], -1)
    assert torch.equal(apply_grid(x, grid), expected)
    keep_high = apply_grid(x, ActivationGrid(4, high_bits=16, n_high=2))
    assert torch.equal(keep_high[:, 14:], x[:, 14:])
    assert torch.equal(keep_high[:, :14], expected[:, :14])
    three = apply_grid(x, ActivationGrid(4, high_bits=6, n_high=2, lowest_bits=2, n_lowest=2))
    parts = [fake_quantize(p, b) for p, b in zip(x.split([2, 12, 2], 1), (2, 4, 6), strict=True)]
    assert torch.equal(three, torch.cat(parts, -1))


def test_split_limits_are_uniform_grids() -> None:
    x = random(5, 16)
    assert torch.equal(apply_grid(x, ActivationGrid(4, high_bits=8, n_high=0)), fake_quantize(x, 4))
    assert torch.equal(apply_grid(x, ActivationGrid(4, high_bits=8, n_high=16)), fake_quantize(x, 8))
    regrouped = apply_grid(x, ActivationGrid(4, high_bits=4, n_high=8))
    assert torch.equal(regrouped, fake_quantize(x.reshape(5, 2, 8), 4).reshape(5, 16))


@pytest.mark.parametrize("contains_zero", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_one_grid_per_head(symmetric: bool, contains_zero: bool) -> None:
    x = 2 + random(3, 4, 24)
    grid = ActivationGrid(4, symmetric, 0.95, contains_zero, high_bits=8, n_high=1)
    got = apply_grid(x, grid, n_groups=3)
    for h in range(3):
        head = x[..., 8 * h : 8 * h + 8]
        low = fake_quantize(head[..., :7], 4, symmetric, 0.95, contains_zero)
        high = fake_quantize(head[..., 7:], 8, symmetric, 0.95, contains_zero)
        assert torch.equal(got[..., 8 * h : 8 * h + 8], torch.cat([low, high], -1))
    assert got.isfinite().all()


def test_mixed_precision_helps_where_the_high_part_is_large() -> None:
    x = random(64, 64) * torch.cat([torch.ones(56), 20 * torch.ones(8)])
    uniform, split = fake_quantize(x, 4), apply_grid(x, ActivationGrid(4, high_bits=8, n_high=8))
    assert (split - x).square().sum() < 0.05 * (uniform - x).square().sum()


def test_whole_tensor_grid() -> None:
    x = random(2, 4, 4)
    got = fake_quantize_tensor(x)
    scale = x.abs().max() / 127
    torch.testing.assert_close(got, (x / scale).round() * scale, atol=1e-14, rtol=0)
    assert torch.equal(fake_quantize_tensor(torch.zeros(2, 3, 3)), torch.zeros(2, 3, 3))


def test_code_limits() -> None:
    assert (code_limits(4, True), code_limits(4, False), code_limits(2, True)) == ((-8, 7), (0, 15), (-2, 1))


def test_errors_name_what_was_given() -> None:
    x = random(2, 10)
    for bits in (0, 1, 17):
        with pytest.raises(ConfigError, match=f"got {bits}"):
            fake_quantize(x, bits)
    for ratio in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="clip_ratio"):
            ActivationGrid(4, clip_ratio=ratio)
    with pytest.raises(ConfigError, match="floating-point"):
        fake_quantize(torch.arange(4), 4)
    with pytest.raises(ConfigError, match="high_bits"):
        ActivationGrid(4, n_high=2)
    with pytest.raises(ConfigError, match="n_lowest=-1"):
        ActivationGrid(4, lowest_bits=2, n_lowest=-1)
    with pytest.raises(ConfigError, match="at least 11"):
        apply_grid(x, ActivationGrid(4, high_bits=8, n_high=11))
    with pytest.raises(ConfigError, match="3 groups"):
        apply_grid(x, ActivationGrid(4), n_groups=3)
