"""Asymmetric grids whose range need not contain zero or whose zero point is real: worked examples, laws, bit accounting."""

from __future__ import annotations

import numpy as np
import pytest
import reference_solvers as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_problems import F64, correlated_inputs, random_weight

from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.numerics.affine import to_codes, to_values
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import fit, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest

FREE = [
    GridSpec(b, range_contains_zero=contains, zero_point=kind)
    for b in (2, 4, 8)
    for contains, kind in ((False, "integer"), (False, "real"), (True, "real"))
]


def round_trip(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    return to_values(to_codes(values, scale[:, None], zero_point[:, None], spec), scale[:, None], zero_point[:, None])


@pytest.mark.parametrize("spec", FREE, ids=repr)
@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0], ids=["negative", "mixed", "positive"])
def test_matches_the_scalar_implementation(spec: GridSpec, offset: float) -> None:
    weight = random_weight(6, 17, seed=0) + offset
    codes, values = reference.rtn(weight.numpy(), spec)
    result = round_to_nearest(weight, uniform_grid(17, spec))
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("contains", "kind", "scale", "zero_point", "codes"),
    [
        (True, "integer", 0.3, 0, [1, 2, 3, 3]),  # 0.4 of the range is spent between zero and the smallest weight
        (False, "integer", 1 / 6, -2, [0, 1, 3, 3]),  # 0.4 = 2.4 steps: the grid starts at 2 steps, 0.9 is clipped
        (True, "real", 0.3, 0.0, [1, 2, 3, 3]),
        (False, "real", 1 / 6, -2.4, [0, 1, 2, 3]),
    ],
)
def test_free_range_worked_example(
    contains: bool, kind: str, scale: float, zero_point: float, codes: list[int]
) -> None:
    row = torch.tensor([[0.4, 0.56, 0.77, 0.9]], dtype=F64)
    spec = GridSpec(2, range_contains_zero=contains, zero_point=kind)
    got_scale, got_zero = fit(row, spec)
    assert got_scale.item() == pytest.approx(scale)
    assert got_zero.item() == pytest.approx(zero_point)
    assert to_codes(row, got_scale, got_zero, spec).tolist() == [codes]


@pytest.mark.parametrize("scheme", ["asym", "sym_gptq", "sym_signed"])
def test_a_fixed_share_of_the_range_scales_both_ends(scheme: str) -> None:
    """By hand: the step is the share of the plain one, the zero point stays, and what lies beyond is clipped."""
    weight = random_weight(6, 17, seed=0)
    plain, clipped = (GridSpec(4, scheme, clip_ratio=ratio) for ratio in (1.0, 0.8))
    (scale, zero), (smaller, same) = fit(weight, plain), fit(weight, clipped)
    assert torch.allclose(smaller, 0.8 * scale, rtol=1e-12)
    assert torch.equal(same, zero)
    expected = round_trip(weight, 0.8 * scale, zero, plain)
    assert torch.allclose(round_to_nearest(weight, uniform_grid(17, clipped)).dequantized, expected, rtol=1e-12)
    # DuQuant's weights: 0.8 of the plain minimum and maximum, which need not contain zero.
    free = GridSpec(4, range_contains_zero=False, clip_ratio=0.8)
    scale, zero = fit(weight + 5, free)
    low, high = 0.8 * (weight + 5).amin(1), 0.8 * (weight + 5).amax(1)
    assert torch.allclose(scale, (high - low) / 15, rtol=1e-12)
    assert torch.equal(zero, (-low / scale).round())
    with pytest.raises(ConfigError, match="clip_ratio"):
        GridSpec(4, clip_ratio=0.0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=9),
    spec=st.sampled_from(FREE),
)
def test_free_ranges_spend_every_code_on_the_values(values: list[float], spec: GridSpec) -> None:
    row = torch.tensor([values], dtype=F64)
    if float(row.max() - row.min()) < 1e-6 * float(row.abs().max()):
        row = torch.zeros_like(row)
    scale, zero = fit(row, spec)
    once = round_trip(row, scale, zero, spec)
    assert torch.equal(once, round_trip(once, scale, zero, spec))
    slack = 0.5 if spec.zero_point == "real" else 1.0  # a rounded zero point may shift the grid by half a step
    assert ((once - row).abs() <= scale * slack * (1 + 1e-6)).all()
    plain = fit(row, GridSpec(spec.bits))[0]
    assert bool((scale <= plain * (1 + 1e-12)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_real_zero_point_puts_both_ends_on_the_grid(bits: int) -> None:
    weight = random_weight(8, 11, seed=11) + 2
    for contains in (True, False):
        spec = GridSpec(bits, range_contains_zero=contains, zero_point="real")
        scale, zero = fit(weight, spec)
        low = weight.amin(1) if not contains else weight.amin(1).clamp(max=0)
        high = weight.amax(1) if not contains else weight.amax(1).clamp(min=0)
        assert torch.allclose(scale * (0 - zero), low, atol=1e-14)
        assert torch.allclose(scale * (2**bits - 1 - zero), high, atol=1e-14)
    assert not torch.equal(zero, zero.round())


def test_free_ranges_agree_with_plain_ones_where_signs_are_mixed_and_halve_the_step_where_they_are_not() -> None:
    mixed = random_weight(4, 16, seed=12)
    assert all(map(torch.equal, fit(mixed, GridSpec(3)), fit(mixed, GridSpec(3, range_contains_zero=False))))
    shifted = torch.linspace(1, 2, 9, dtype=F64)[None]
    assert fit(shifted, GridSpec(3, range_contains_zero=False))[0].item() == pytest.approx(1 / 7)
    assert fit(shifted, GridSpec(3))[0].item() == pytest.approx(2 / 7)


@pytest.mark.parametrize("spec", FREE, ids=repr)
def test_constant_and_zero_rows_are_exact_on_free_ranges(spec: GridSpec) -> None:
    weight = torch.tensor([[0.3] * 5, [-2.0] * 5, [0.0] * 5], dtype=F64)
    result = round_to_nearest(weight, uniform_grid(5, spec))
    assert torch.allclose(result.dequantized, weight, rtol=1e-12, atol=0)
    assert torch.isfinite(result.stored.scale).all()


@pytest.mark.parametrize("spec", FREE, ids=repr)
def test_free_ranges_in_the_column_loop(spec: GridSpec) -> None:
    """With a diagonal moment GPTQ is rounding to nearest; codes rebuild the values bit for bit in float32 too."""
    for dtype in (F64, torch.float32):
        weight = (random_weight(6, 40, seed=13) + 1.5).to(dtype)
        grid = uniform_grid(40, spec)
        result, plain = gptq(weight, torch.eye(40, dtype=dtype), grid), round_to_nearest(weight, grid)
        assert torch.equal(result.stored.codes, plain.stored.codes)
        assert torch.equal(
            result.stored.scale * (result.stored.codes.to(dtype) - result.stored.zero_point), result.dequantized
        )
    inputs = correlated_inputs(64, 40, seed=14)
    moment = inputs.T @ inputs / 64
    weight = random_weight(6, 40, seed=15) + 1.5
    codes, values = reference.gptq(weight.numpy(), moment.numpy(), uniform_grid(40, spec))
    result = gptq(weight, moment, uniform_grid(40, spec))
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, atol=1e-10)


def test_clip_search_needs_a_range_around_zero() -> None:
    with pytest.raises(UnsupportedError, match="range_contains_zero"):
        GridSpec(4, clip_search=True, range_contains_zero=False)
    row = random_weight(3, 20, seed=16)
    searched = fit(row, GridSpec(2, clip_search=True, zero_point="real"))
    assert not torch.equal(searched[0], fit(row, GridSpec(2, zero_point="real"))[0])
