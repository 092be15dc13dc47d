"""GPTQ: the worked example, explicit inverse downdates, the original loop, and the laws of the method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference_solvers as reference
import torch
from reference_problems import F64, HESSIAN, WEIGHT, correlated_inputs, random_weight

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics import column_loop, compensated
from ptqbench.numerics.gptaq import gptaq
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, Grid, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.groups import split_rows
from ptqbench.numerics.qronos import qronos
from ptqbench.numerics.report import relative_output_error, relative_weight_error
from ptqbench.numerics.rtn import round_to_nearest

D = 30
INPUTS = correlated_inputs(200, D, seed=0)
MOMENT = INPUTS.T @ INPUTS
SPLIT: Grid = (
    ColumnRange(0, 11, GridSpec(2, group_size=4)),
    ColumnRange(11, 25, GridSpec(3, "sym_signed")),
    ColumnRange(25, 26, GridSpec(8, "sym_gptq")),
    ColumnRange(26, 30, GridSpec(2, group_size=2)),
)
GRIDS = {
    "row": uniform_grid(D, GridSpec(3)),
    "signed": uniform_grid(D, GridSpec(2, "sym_signed", clip_search=True)),
    "sym_gptq": uniform_grid(D, GridSpec(3, "sym_gptq")),
    "groups": uniform_grid(D, GridSpec(3, group_size=8)),
    "one column": uniform_grid(D, GridSpec(3, group_size=1)),
    "large group": uniform_grid(D, GridSpec(3, group_size=64)),
    "split": SPLIT,
    "kept tail": (ColumnRange(0, 20, GridSpec(2, group_size=6)), ColumnRange(20, D, GridSpec(16))),
}


def toy(bits: int, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Return the toy of the method notes: W (64, 256), H of 2048 correlated inputs, a sym_signed grid."""
    x = correlated_inputs(2048, 256, seed=10)
    return random_weight(64, 256, seed=11), x.T @ x, uniform_grid(256, GridSpec(bits, "sym_signed", group_size=size))


def test_worked_example() -> None:
    grid = uniform_grid(4, GridSpec(2))
    result = gptq(WEIGHT, HESSIAN, grid)
    assert result.stored.scale.flatten().tolist() == pytest.approx([0.566667, 0.433333], abs=1e-6)
    assert result.stored.zero_point.flatten().tolist() == [1, 1]
    assert result.stored.codes.tolist() == [[3, 1, 1, 0], [1, 3, 0, 1]]
    expected = torch.tensor([[1.133333, 0, 0, -0.566667], [0, 0.866667, -0.433333, 0]], dtype=F64)
    assert torch.allclose(result.dequantized, expected, rtol=0, atol=1e-6)
    assert round_to_nearest(WEIGHT, grid).stored.codes.tolist() == [[3, 0, 2, 0], [1, 3, 0, 1]]


def moment_with_dead(dead: list[int]) -> torch.Tensor:
    moment = MOMENT.clone()
    moment[dead] = 0
    moment[:, dead] = 0
    return moment


@pytest.mark.parametrize("dead", [[], [3, 12, 28]], ids=["all live", "dead channels"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_explicit_inverse_downdates(
    name: str, act_order: bool, static: bool, dead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_loop, "PANEL", 5)
    monkeypatch.setitem(compensated.ROW_CHUNK, "cpu", 3)
    weight, moment = random_weight(4, D, seed=1), moment_with_dead(dead)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True).numpy() if act_order else None
    codes, values = reference.gptq(weight.numpy(), moment.numpy(), GRIDS[name], order=order, static=static)
    result = gptq(weight, moment, GRIDS[name], column_block=7, act_order=act_order, static_groups=static)
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "kept tail"])
def test_values_are_those_of_the_codes_and_dead_channels_get_the_code_of_zero(name: str, act_order: bool) -> None:
    dead = [3, 12, 28]
    result = gptq(random_weight(4, D, seed=1), moment_with_dead(dead), GRIDS[name], act_order=act_order)
    index = result.stored.group_index.long()
    assert torch.equal(
        result.stored.scale[:, index] * (result.stored.codes - result.stored.zero_point[:, index]), result.dequantized
    )
    assert torch.equal(result.stored.codes[:, dead].to(F64), result.stored.zero_point[:, index[dead]])
    assert (result.dequantized[:, dead] == 0).all()


@pytest.mark.parametrize("size", [300, 4])
def test_downdates_at_the_sizes_of_the_notes(size: int) -> None:
    x, weight = correlated_inputs(4 * size, size, seed=2), random_weight(1, size, seed=3)
    grid = uniform_grid(size, GridSpec(3))
    codes, _ = reference.gptq(weight.numpy(), (x.T @ x).numpy(), grid)
    assert np.array_equal(gptq(weight, x.T @ x, grid).stored.codes.numpy(), codes)


@pytest.mark.parametrize("size", [None, 4, 8, 12, 20])
@pytest.mark.parametrize("block", [8, 12])
def test_stale_refits_equal_the_original_loop(size: int | None, block: int) -> None:
    weight, spec = random_weight(4, D, seed=4), GridSpec(2, group_size=size)
    expected = reference.block_loop(weight.numpy(), MOMENT.numpy(), spec, block, np.zeros((D, D)))
    result = gptq(weight, MOMENT, uniform_grid(D, spec), column_block=block, group_refit="stale")
    assert np.allclose(result.dequantized.numpy(), expected, rtol=0, atol=1e-10)


def test_a_diagonal_moment_gives_rounding_to_nearest() -> None:
    weight, _, _ = toy(3)
    for grid in (uniform_grid(256, GridSpec(3, "sym_signed")), uniform_grid(256, GridSpec(2, group_size=48))):
        for c in (1.0, 7e-5):
            compensated_result = gptq(weight, c * torch.eye(256, dtype=F64), grid)
            plain = round_to_nearest(weight, grid)
            assert torch.equal(compensated_result.dequantized, plain.dequantized)
            assert torch.equal(compensated_result.stored.codes, plain.stored.codes)


def test_the_scale_of_the_moment_cancels_even_with_dead_channels() -> None:
    weight, moment, grid = toy(3)
    moment[:, 5] = moment[5] = 0
    results = [gptq(weight, c * moment, grid).dequantized for c in (1.0, 1e-7, 3e6)]
    assert all(torch.allclose(results[0], other, rtol=0, atol=1e-12) for other in results[1:])


@pytest.mark.parametrize("size", [None, 64, 128, 48])
@pytest.mark.parametrize("act_order", [False, True])
def test_column_block_changes_nothing_when_groups_are_fresh(size: int | None, act_order: bool) -> None:
    weight, moment, grid = toy(3, size)
    reference_result = gptq(weight, moment, grid, column_block=128, act_order=act_order)
    for block in (20, 32, 512):
        other = gptq(weight, moment, grid, column_block=block, act_order=act_order)
        assert torch.allclose(other.dequantized, reference_result.dequantized, rtol=0, atol=1e-10)


def test_column_block_changes_stale_groups_only_when_smaller_than_the_block() -> None:
    weight, moment, grid = toy(3, 64)
    narrow, wide = (gptq(weight, moment, grid, column_block=b, group_refit="stale").dequantized for b in (32, 128))
    fresh = gptq(weight, moment, grid).dequantized
    assert (narrow - wide).norm() / weight.norm() > 1e-3
    assert torch.allclose(narrow, fresh, rtol=0, atol=1e-10)
    weight, moment, grid = toy(3, 128)
    aligned = gptq(weight, moment, grid, column_block=128, group_refit="stale").dequantized
    assert torch.allclose(aligned, gptq(weight, moment, grid).dequantized, rtol=0, atol=1e-10)


def assert_equal_but_for_the_order_of_sums(a: torch.Tensor, b: torch.Tensor) -> None:
    """Some BLAS libraries sum in an order that depends on the number of rows; a grid fitted on updated weights shows it."""
    assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [None, 64])
def test_rows_are_independent(size: int | None) -> None:
    weight, moment, grid = toy(3, size)
    rows = [0, 5, 17, 63]
    whole, part = gptq(weight, moment, grid), gptq(weight[rows], moment, grid)
    assert torch.equal(whole.stored.codes[rows], part.stored.codes)
    assert_equal_but_for_the_order_of_sums(whole.dequantized[rows], part.dequantized)


def test_stacked_linears_split_into_their_own_results() -> None:
    weight, moment, grid = toy(3, 64)
    parts = split_rows(gptq(weight, moment, grid), [40, 8, 16])
    for part, own in zip(parts, (weight[:40], weight[40:48], weight[48:]), strict=True):
        alone = gptq(own, moment, grid)
        assert torch.equal(part.stored.codes, alone.stored.codes)
        assert_equal_but_for_the_order_of_sums(part.stored.scale, alone.stored.scale)
        assert_equal_but_for_the_order_of_sums(part.dequantized, alone.dequantized)
        assert part.damping_used == 0.01


def test_act_order_commutes_with_permutations_of_the_channels() -> None:
    weight, moment, grid = toy(3)
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(12))
    ordered, plain = (
        relative_weight_error(
            gptq(weight, moment, grid, act_order=act_order).dequantized[:, shuffle],
            gptq(weight[:, shuffle], moment[shuffle][:, shuffle], grid, act_order=act_order).dequantized,
        )
        for act_order in (True, False)
    )
    assert ordered < 1e-24
    assert plain > 1e-4


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_output_error_falls_while_weight_error_rises(bits: int) -> None:
    weight, moment, grid = toy(bits)
    plain, solved = round_to_nearest(weight, grid).dequantized, gptq(weight, moment, grid).dequantized
    assert relative_output_error(weight, solved, moment) < relative_output_error(weight, plain, moment)
    assert relative_weight_error(weight, solved) > relative_weight_error(weight, plain)


def test_dynamic_groups_in_processing_order_are_reported_by_group_index() -> None:
    weight, moment, grid = toy(3, 64)
    order = torch.argsort(moment.diagonal(), descending=True)
    dynamic = gptq(weight, moment, grid, act_order=True).stored.group_index
    assert dynamic[order].tolist() == [p // 64 for p in range(256)]
    static = gptq(weight, moment, grid, act_order=True, static_groups=True).stored.group_index
    assert static.tolist() == [j // 64 for j in range(256)]


@pytest.mark.parametrize("options", [{}, {"act_order": True, "static_groups": True}], ids=str)
@pytest.mark.parametrize("name", ["row", "groups", "split"])
def test_grids_of_consecutive_channels_from_another_weight_are_those_of_rounding_it(name: str, options: dict) -> None:
    weight, other = random_weight(4, D, seed=5), 1.7 * random_weight(4, D, seed=6)
    result = gptq(weight, MOMENT, GRIDS[name], grid_weight=other, **options)
    assert torch.equal(result.stored.scale, round_to_nearest(other, GRIDS[name]).stored.scale)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}], ids=str)
@pytest.mark.parametrize("name", ["row", "groups", "split"])
def test_grids_from_another_weight_do_not_depend_on_the_rounding(name: str, options: dict) -> None:
    weight, other = random_weight(4, D, seed=5), 1.7 * random_weight(4, D, seed=6)
    result = gptq(weight, MOMENT, GRIDS[name], grid_weight=other, **options)
    unit = torch.eye(D, dtype=F64) * MOMENT.diagonal()
    same = gptq(weight, unit, GRIDS[name], grid_weight=other, **options)
    assert torch.equal(result.stored.scale, same.stored.scale)
    itself = gptq(weight, MOMENT, uniform_grid(D, GridSpec(3)), grid_weight=weight, **options)
    assert torch.equal(itself.stored.codes, gptq(weight, MOMENT, uniform_grid(D, GridSpec(3)), **options).stored.codes)


def test_row_grids_are_fitted_before_dead_channels_are_zeroed_and_static_ones_after() -> None:
    weight, moment = random_weight(3, D, seed=7), MOMENT.clone()
    weight[:, 4] = 50.0
    moment[4] = moment[:, 4] = 0
    zeroed = weight.clone()
    zeroed[:, 4] = 0
    row, groups = uniform_grid(D, GridSpec(4)), uniform_grid(D, GridSpec(4, group_size=10))
    assert torch.equal(gptq(weight, moment, row).stored.scale, round_to_nearest(weight, row).stored.scale)
    static = gptq(weight, moment, groups, static_groups=True)
    assert torch.equal(static.stored.scale, round_to_nearest(zeroed, groups).stored.scale)


def test_untouched_ranges_take_up_error_and_stay_real() -> None:
    weight = random_weight(4, D, seed=8)
    kept = gptq(weight, MOMENT, GRIDS["kept tail"])
    assert (kept.dequantized[:, 20:] != weight[:, 20:]).all()
    assert (kept.stored.codes[:, 20:] == 0).all()
    rounded = round_to_nearest(weight, GRIDS["kept tail"])
    assert relative_output_error(weight, kept.dequantized, MOMENT) < relative_output_error(
        weight, rounded.dequantized, MOMENT
    )
    whole = gptq(weight, MOMENT, uniform_grid(D, GridSpec(16)))
    assert whole.stored is None
    assert torch.equal(whole.dequantized, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_bytes_and_inputs(dtype: torch.dtype) -> None:
    weight, moment = random_weight(8, D, seed=9, dtype=dtype), MOMENT.float()
    weight[3] = 0
    copies = weight.clone(), moment.clone()
    first, second = (gptq(weight, moment, GRIDS["groups"], act_order=True) for _ in range(2))
    assert first.dequantized.dtype == dtype
    assert first.stored.scale.dtype == torch.float32
    assert torch.equal(first.dequantized.view(torch.uint8), second.dequantized.view(torch.uint8))
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])
    assert (first.dequantized[3] == 0).all()
    assert torch.isfinite(first.stored.scale).all()
    assert not torch.signbit(first.dequantized[first.dequantized == 0]).any()
    exact = gptq(weight.double(), MOMENT, GRIDS["groups"], act_order=True)
    live = torch.arange(8) != 3  # the zero point of a zero row is a tie, which float32 may break the other way
    assert (first.stored.codes != exact.stored.codes)[live].double().mean() < 0.02


def test_a_float64_moment_is_factorised_in_float64_for_a_16_bit_weight() -> None:
    weight = random_weight(8, D, seed=10, dtype=torch.bfloat16)
    result = gptq(weight, MOMENT, GRIDS["row"])
    assert result.stored.scale.dtype == torch.float32
    assert result.dequantized.dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    weight, grid = random_weight(2, 4, seed=11), uniform_grid(4, GridSpec(4))
    with pytest.raises(ConfigError, match="second_moment"):
        gptq(weight, torch.eye(5, dtype=F64), grid)
    with pytest.raises(ConfigError, match="grid_weight"):
        gptq(weight, HESSIAN, grid, grid_weight=weight[:1])
    with pytest.raises(ConfigError, match="group_refit"):
        gptq(weight, HESSIAN, grid, group_refit="old")
    with pytest.raises(ConfigError, match="column_block"):
        gptq(weight, HESSIAN, grid, column_block=0)
    with pytest.raises(ConfigError, match="grid"):
        gptq(weight, HESSIAN, uniform_grid(5, GridSpec(4)))
    weight[1, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"weight.*\[1, 0\]"):
        gptq(weight, HESSIAN, grid)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"group_refit": "stale"}], ids=str)
def test_the_working_copy_holds_the_updates_of_earlier_blocks_and_none_of_its_own(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed from the finished rounding: what earlier blocks left of the error, spread by regression on the rest."""
    monkeypatch.setitem(compensated.ROW_CHUNK, "cpu", 3)
    dead, block, grid = [3, 12], 8, GRIDS["groups"]
    weight, moment = random_weight(4, D, seed=1), moment_with_dead(dead)
    result = gptq(weight, moment, grid, column_block=block, keep_working=True, **options)
    order = torch.arange(D) if result.order is None else result.order
    live = weight.clone()
    live[:, dead] = 0
    damped = moment + moment.diagonal().mean() * (0.01 * torch.eye(D, dtype=F64) + torch.diag(moment.diagonal() == 0))
    assert result.working is not None
    for start in range(0, D, block):
        done, here = order[:start], order[start : start + block]
        rest = order[start:]
        moved = (live - result.dequantized)[:, done] @ damped[done][:, rest]  # min over the rest of the damped error
        expected = live[:, rest] + moved @ torch.linalg.inv(damped[rest][:, rest])
        assert torch.allclose(result.working[:, here], expected[:, : len(here)], rtol=0, atol=1e-10)
    assert [part.working.shape[0] for part in split_rows(result, [1, 3])] == [1, 3]
    without = gptq(weight, moment, grid, column_block=block, **options)
    assert without.working is None
    assert torch.equal(without.dequantized, result.dequantized)


@pytest.mark.parametrize("solver", [gptaq, qronos])
def test_solvers_with_drift_hand_out_their_working_copy_too(solver: Callable) -> None:
    weight, drift = random_weight(4, D, seed=1), 0.1 * MOMENT.roll(1, 0)
    result = solver(weight, MOMENT, drift, GRIDS["row"], column_block=D, keep_working=True)
    wide = solver(weight, MOMENT, drift, GRIDS["row"], column_block=D // 2, keep_working=True)
    assert torch.allclose(wide.dequantized, result.dequantized, rtol=0, atol=1e-10)
    assert torch.allclose(wide.working[:, : D // 2], result.working[:, : D // 2], rtol=0, atol=1e-10)
    assert (wide.working[:, D // 2 :] != result.working[:, D // 2 :]).all()
