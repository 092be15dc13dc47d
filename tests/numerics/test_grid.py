"""Grids: worked examples, an independent scalar implementation, and the properties every grid must have."""

from __future__ import annotations

import numpy as np
import pytest
import reference_solvers as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_problems import F64, random_weight

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics import clip_search
from ptqbench.numerics.affine import to_codes, to_values
from ptqbench.numerics.grid import (
    ColumnRange,
    code_dtype,
    effective_bits,
    fit,
    nominal_bits,
    uniform_grid,
    validate_grid,
)
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest

ROW = torch.tensor([[-1, -0.4, 0.1, 0.6, 0.8]], dtype=F64)
SPECS = [GridSpec(b, s) for b in (2, 3, 4, 8, 12) for s in ("asym", "sym_gptq", "sym_signed")] + [
    GridSpec(1, "asym"),
    GridSpec(3, "sym_gptq", sym_nonnegative_row="as_code"),
]


def round_trip(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    return to_values(to_codes(values, scale[:, None], zero_point[:, None], spec), scale[:, None], zero_point[:, None])


@pytest.mark.parametrize(
    ("bits", "scheme", "scale", "zero_point", "codes"),
    [
        (2, "asym", 0.6, 2, [0, 1, 2, 3, 3]),
        (2, "sym_gptq", 2 / 3, 2, [0, 1, 2, 3, 3]),
        (3, "asym", 0.257143, 4, [0, 2, 4, 6, 7]),
        (3, "sym_gptq", 0.285714, 4, [0, 3, 4, 6, 7]),
        (4, "asym", 0.12, 8, [0, 5, 9, 13, 15]),
        (4, "sym_gptq", 0.133333, 8, [0, 5, 9, 12, 14]),
        (2, "sym_signed", 1.0, 0, [-1, 0, 0, 1, 1]),
        (3, "sym_signed", 0.333333, 0, [-3, -1, 0, 2, 2]),
        (4, "sym_signed", 0.142857, 0, [-7, -3, 1, 4, 6]),
        (8, "sym_signed", 0.007874, 0, [-127, -51, 13, 76, 102]),
    ],
)
def test_worked_example(bits: int, scheme: str, scale: float, zero_point: int, codes: list[int]) -> None:
    spec = GridSpec(bits, scheme)
    got_scale, got_zero = fit(ROW, spec)
    assert got_scale.item() == pytest.approx(scale, abs=1e-6)
    assert got_zero.item() == zero_point
    assert to_codes(ROW, got_scale, got_zero, spec).tolist() == [codes]


@pytest.mark.parametrize(
    ("scheme", "bits", "shrink", "scale", "loss"),
    [
        ("sym_signed", 2, 0.55, 0.55, 0.05514786),
        ("sym_signed", 3, 0.76, 0.253333, 0.01247579),
        ("sym_signed", 4, 0.89, 0.127143, 0.00100784),
        ("asym", 2, 0.92, 0.552, 0.05512531),
        ("asym", 3, 0.99, 0.254571, 0.01247191),
        ("asym", 4, 1.00, 0.12, 0.00140819),
    ],
)
def test_clip_search_worked_example(scheme: str, bits: int, shrink: float, scale: float, loss: float) -> None:
    spec = GridSpec(bits, scheme, clip_search=True)
    got_scale, zero = fit(ROW, spec)
    full_scale, _ = fit(ROW, GridSpec(bits, scheme))
    values = round_trip(ROW, got_scale, zero, spec)
    assert got_scale.item() == pytest.approx(scale, abs=1e-6)
    assert (got_scale / full_scale).item() == pytest.approx(shrink, abs=1e-9)
    assert (values - ROW).abs().pow(2.4).sum().item() == pytest.approx(loss, abs=1e-8)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0], ids=["negative", "mixed", "positive"])
def test_matches_the_scalar_implementation(spec: GridSpec, offset: float) -> None:
    weight = random_weight(6, 17, seed=0) + offset
    codes, values = reference.rtn(weight.numpy(), spec)
    result = round_to_nearest(weight, uniform_grid(17, spec))
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheme", ["asym", "sym_gptq", "sym_signed"])
@pytest.mark.parametrize("budget", [1, 60, 10**6], ids=["one row, one factor", "few", "all at once"])
def test_clip_search_matches_the_scalar_search_for_every_chunking(
    scheme: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(clip_search.CHUNK_ELEMENTS, "cpu", budget)
    weight, spec = random_weight(5, 12, seed=1), GridSpec(3, scheme, clip_search=True)
    scale, zero = fit(weight, spec)
    expected = [reference.fit_group(row, spec) for row in weight.numpy()]
    assert np.allclose(scale.numpy(), [s for s, _ in expected], rtol=1e-12)
    assert zero.tolist() == [z for _, z in expected]
    assert not torch.equal(scale, fit(weight, GridSpec(3, scheme))[0])


@pytest.mark.parametrize("budget", [1, 10**6])
def test_clip_search_keeps_the_first_of_equal_losses(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clip_search.CHUNK_ELEMENTS, "cpu", budget)
    zeros = torch.zeros(3, 4, dtype=F64)
    for scheme in ("asym", "sym_gptq", "sym_signed"):
        assert torch.equal(fit(zeros, GridSpec(3, scheme, clip_search=True))[0], fit(zeros, GridSpec(3, scheme))[0])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=9),
    spec=st.sampled_from(SPECS),
)
def test_rounding_is_idempotent_and_within_half_a_step(values: list[float], spec: GridSpec) -> None:
    row = torch.tensor([values], dtype=F64)
    scale, zero = fit(row, spec)
    once = round_trip(row, scale, zero, spec)
    twice = round_trip(once, scale, zero, spec)
    assert torch.equal(once, twice)
    if spec.scheme in ("asym", "sym_signed"):
        # The asymmetric zero point is rounded, which may move the whole grid by up to half a step.
        slack = 1.0 if spec.scheme == "asym" else 0.5
        assert ((once - row).abs() <= scale * slack * (1 + 1e-9)).all()
        low, high = (0 - zero) * scale, (2**spec.bits - 1 - zero) * scale
        inside = (row >= low) & (row <= high) if spec.scheme == "asym" else torch.ones_like(row, dtype=torch.bool)
        assert ((once - row).abs() <= scale / 2 * (1 + 1e-9))[inside].all()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_zero_is_on_every_grid_and_zero_rows_are_finite(spec: GridSpec) -> None:
    weight = random_weight(3, 8, seed=2)
    weight[1] = 0
    weight[2] = 1e-320
    scale, zero = fit(weight, spec)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    zeros = torch.zeros_like(weight)
    assert torch.equal(to_codes(zeros, scale[:, None], zero[:, None], spec), zero[:, None].expand_as(weight))
    assert torch.equal(round_trip(zeros, scale, zero, spec), zeros)
    assert torch.isfinite(round_trip(weight, scale, zero, spec)).all()


def test_a_nonnegative_row_saturates_only_as_code() -> None:
    row = torch.tensor([[0.0, 0.5, 1.0]], dtype=F64)
    as_code = GridSpec(4, "sym_gptq", sym_nonnegative_row="as_code")
    repaired = GridSpec(4, "sym_gptq")
    assert fit(row, as_code)[0].item() == pytest.approx(1 / 15)
    assert fit(row, repaired)[0].item() == pytest.approx(2 / 15)
    assert to_codes(row, *fit(row, as_code), as_code).tolist() == [[8, 15, 15]]
    assert to_codes(row, *fit(row, repaired), repaired).tolist() == [[8, 12, 15]]


def test_sym_signed_floors_the_range() -> None:
    scale, _ = fit(torch.full((1, 4), 1e-7, dtype=F64), GridSpec(4, "sym_signed"))
    assert scale.item() == pytest.approx(1e-5 / 7)


def test_computation_is_float32_unless_the_values_are_float64() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        weight = random_weight(2, 8, seed=3, dtype=dtype)
        before = weight.clone()
        result = round_to_nearest(weight, uniform_grid(8, GridSpec(4)))
        assert (result.stored.scale.dtype, result.stored.zero_point.dtype, result.dequantized.dtype) == (
            expected,
            expected,
            dtype,
        )
        assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("ranges", "dtype"),
    [
        ([GridSpec(8)], torch.uint8),
        ([GridSpec(8, "sym_signed")], torch.int8),
        ([GridSpec(4), GridSpec(4, "sym_signed")], torch.int8),
        ([GridSpec(8), GridSpec(4, "sym_signed")], torch.int16),
        ([GridSpec(9)], torch.int16),
        ([GridSpec(15)], torch.int16),
        ([GridSpec(15, "sym_signed")], torch.int16),
        ([GridSpec(4), GridSpec(16)], torch.uint8),
    ],
)
def test_codes_use_the_smallest_dtype(ranges: list[GridSpec], dtype: torch.dtype) -> None:
    grid = tuple(ColumnRange(i * 5, i * 5 + 5, spec) for i, spec in enumerate(ranges))
    weight = random_weight(40, 5 * len(ranges), seed=4)
    result = round_to_nearest(weight, grid)
    assert code_dtype(grid) == dtype == result.stored.codes.dtype
    for part in grid:
        if not part.spec.untouched:
            expected, _ = reference.rtn(weight[:, part.start : part.stop].numpy(), part.spec)
            assert np.array_equal(result.stored.codes[:, part.start : part.stop].numpy(), expected)


@pytest.mark.parametrize(("size", "groups"), [(None, 1), (5, 3), (4, 4), (1, 13), (13, 1), (99, 1)])
def test_groups_and_remainders(size: int | None, groups: int) -> None:
    weight, spec = random_weight(3, 13, seed=5), GridSpec(3, group_size=size)
    result = round_to_nearest(weight, uniform_grid(13, spec))
    codes, values = reference.rtn(weight.numpy(), spec)
    assert result.stored.scale.shape == result.stored.zero_point.shape == (3, groups)
    assert result.stored.group_index.tolist() == [j // (size or 13) for j in range(13)]
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, atol=1e-14)


def test_sixteen_bits_leave_the_weight_untouched() -> None:
    weight = random_weight(3, 6, seed=6, dtype=torch.bfloat16)
    whole = round_to_nearest(weight, uniform_grid(6, GridSpec(16)))
    assert whole.stored is None
    assert torch.equal(whole.dequantized, weight)
    assert whole.dequantized.data_ptr() != weight.data_ptr()
    mixed = round_to_nearest(weight, (ColumnRange(0, 4, GridSpec(2)), ColumnRange(4, 6, GridSpec(16))))
    assert torch.equal(mixed.dequantized[:, 4:], weight[:, 4:])
    assert not torch.equal(mixed.dequantized, weight)


def test_rtn_can_take_the_grid_of_another_weight() -> None:
    weight, other, grid = random_weight(3, 8, seed=7), 3 * random_weight(3, 8, seed=8), uniform_grid(8, GridSpec(3))
    result = round_to_nearest(weight, grid, grid_weight=other)
    assert torch.equal(result.stored.scale, round_to_nearest(other, grid).stored.scale)
    expected = to_codes(weight, result.stored.scale, result.stored.zero_point, GridSpec(3))
    assert torch.equal(result.stored.codes.double(), expected)


def test_bit_accounting() -> None:
    assert effective_bits(uniform_grid(4096, GridSpec(4, group_size=128)), 8) == 4 + (16 + 4) / 128
    assert effective_bits(uniform_grid(4096, GridSpec(4, "sym_signed", group_size=128)), 8) == 4 + 16 / 128
    assert effective_bits(uniform_grid(100, GridSpec(2)), 8) == 2 + 18 / 100
    assert effective_bits(uniform_grid(100, GridSpec(2, range_contains_zero=False)), 8) == 2 + 32 / 100
    assert effective_bits(uniform_grid(100, GridSpec(2, zero_point="real")), 8) == 2 + 32 / 100
    assert effective_bits(uniform_grid(100, GridSpec(2, group_size=64)), 8) == 2 + 2 * 18 / 100
    assert effective_bits(uniform_grid(100, GridSpec(16)), 8) == 16
    split = (ColumnRange(0, 56, GridSpec(4, "sym_signed")), ColumnRange(56, 64, GridSpec(8, "sym_signed")))
    assert nominal_bits(split) == 4.5
    assert effective_bits(split, 8) == 4.5 + 2 * 16 / 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits: expected 1..16"),
        ({"bits": 17}, "bits: expected 1..16"),
        ({"bits": 4, "scheme": "symmetric"}, "scheme: expected one of asym"),
        ({"bits": 1, "scheme": "sym_signed"}, "no positive code"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": -1}, "group_size"),
        ({"bits": 4, "sym_nonnegative_row": "x"}, "as_code"),
        ({"bits": 4, "zero_point": "float"}, "zero_point: expected one of integer, real"),
        ({"bits": 4, "scheme": "sym_signed", "zero_point": "real"}, "belong to scheme asym"),
        ({"bits": 4, "scheme": "sym_gptq", "range_contains_zero": False}, "belong to scheme asym"),
    ],
)
def test_impossible_specs_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridSpec(**arguments)


@pytest.mark.parametrize(
    "ranges", [[(0, 4), (5, 8)], [(0, 5), (4, 8)], [(1, 8)], [(0, 7)], [(0, 9)], [(0, 0), (0, 8)], []], ids=str
)
def test_gaps_and_overlaps_are_rejected(ranges: list[tuple[int, int]]) -> None:
    grid = tuple(ColumnRange(a, b, GridSpec(4)) for a, b in ranges)
    with pytest.raises(ConfigError, match="grid"):
        validate_grid(grid, 8)
    with pytest.raises(ConfigError, match="grid"):
        round_to_nearest(random_weight(2, 8, seed=9), grid)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_named(bad: float) -> None:
    weight = random_weight(3, 4, seed=10)
    weight[1, 2] = bad
    with pytest.raises(NumericalError, match=r"weight.*\[1, 2\]"):
        round_to_nearest(weight, uniform_grid(4, GridSpec(4)))
    with pytest.raises(NumericalError, match="grid_weight"):
        round_to_nearest(torch.zeros(3, 4), uniform_grid(4, GridSpec(4)), grid_weight=weight)


def test_an_overflowing_range_is_an_error_not_a_nan() -> None:
    weight = torch.tensor([[3e38, -3e38, 1.0]])
    with pytest.raises(NumericalError, match="dequantized"):
        round_to_nearest(weight, uniform_grid(3, GridSpec(4)))
