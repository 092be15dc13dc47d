"""Qronos: the worked example, direct least squares on the data, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import reference_solvers as reference
import torch
from reference_problems import DRIFT, F64, QUANTIZED_INPUTS, WEIGHT, correlated_inputs, random_weight

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, Grid, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.qronos import eigenvalue_damping, qronos
from ptqbench.numerics.rtn import round_to_nearest

D = 26
XQ = correlated_inputs(300, D, seed=0)
X = XQ + 0.2 * correlated_inputs(300, D, seed=1)
MOMENT, CROSS = XQ.T @ XQ, XQ.T @ (X - XQ)
SPLIT: Grid = (
    ColumnRange(0, 15, GridSpec(3, group_size=4)),
    ColumnRange(15, 20, GridSpec(4, "sym_signed")),
    ColumnRange(20, D, GridSpec(2)),
)


def corrected(weight: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return the minimiser of ||Xq V^T - X W^T||^2 + L ||V - W||^2, the target of LoaQ's linear level."""
    damped = MOMENT + damping * MOMENT.diagonal().mean() * torch.eye(D, dtype=F64)
    return weight + torch.linalg.solve(damped, CROSS @ weight.T).T


def output_error(weight: torch.Tensor, dequantized: torch.Tensor) -> float:
    """Return ||Xq Q^T - X W^T||^2 / ||X W^T||^2."""
    return float(((XQ @ dequantized.T - X @ weight.T) ** 2).sum() / ((X @ weight.T) ** 2).sum())


def test_worked_example() -> None:
    moment, cross = QUANTIZED_INPUTS.T @ QUANTIZED_INPUTS, QUANTIZED_INPUTS.T @ DRIFT
    result = qronos(WEIGHT, moment, cross, uniform_grid(4, GridSpec(2)))
    assert result.stored.codes.tolist() == [[3, 0, 2, 0], [1, 3, 0, 1]]


@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(4), GridSpec(3, "sym_signed")], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_least_squares_on_the_data(spec: GridSpec, act_order: bool) -> None:
    weight = random_weight(4, D, seed=2)
    order = torch.argsort(MOMENT.diagonal(), descending=True) if act_order else torch.arange(D)
    permuted = (t[:, order].numpy() for t in (weight, XQ, X))
    codes, values = reference.qronos(*permuted, spec)
    result = qronos(weight, MOMENT, CROSS, uniform_grid(D, spec), act_order=act_order, column_block=7)
    assert np.array_equal(result.stored.codes[:, order].numpy(), codes)
    assert np.allclose(result.dequantized[:, order].numpy(), values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}], ids=str)
@pytest.mark.parametrize("grid", [uniform_grid(D, GridSpec(3, group_size=8)), SPLIT], ids=["groups", "split"])
def test_without_drift_it_is_gptq(grid: Grid, options: dict) -> None:
    weight = random_weight(4, D, seed=3)
    ours = qronos(weight, MOMENT, torch.zeros_like(CROSS), grid, **options)
    plain = gptq(weight, MOMENT, grid, **options)
    assert torch.equal(ours.stored.codes, plain.stored.codes)
    assert torch.allclose(ours.dequantized, plain.dequantized, rtol=0, atol=1e-10)


def test_it_is_gptq_on_the_corrected_weight_except_around_the_first_channel() -> None:
    weight, grid = random_weight(64, D, seed=4), uniform_grid(D, GridSpec(2))
    ours = qronos(weight, MOMENT, CROSS, grid)
    aimed = gptq(corrected(weight), MOMENT, grid, grid_weight=weight)
    plain = gptq(weight, MOMENT, grid)
    same = (ours.stored.codes == aimed.stored.codes).double().mean().item()
    assert same > 0.75
    assert same > (ours.stored.codes == plain.stored.codes).double().mean().item()
    assert output_error(weight, ours.dequantized) == pytest.approx(output_error(weight, aimed.dequantized), rel=0.1)
    assert output_error(weight, ours.dequantized) < output_error(weight, plain.dequantized)
    # Give the first channel the choice that the corrected weight makes: from there on nothing differs.
    agree = ours.stored.codes[:, 0] == aimed.stored.codes[:, 0]
    assert agree.any()
    assert torch.equal(ours.stored.codes[agree], aimed.stored.codes[agree])


@pytest.mark.parametrize("grid", [uniform_grid(D, GridSpec(3, group_size=8)), SPLIT], ids=["groups", "split"])
def test_column_block_and_scale_change_nothing(grid: Grid) -> None:
    weight = random_weight(4, D, seed=5)
    expected = qronos(weight, MOMENT, CROSS, grid).dequantized
    for block in (1, 9, 16):
        other = qronos(weight, MOMENT, CROSS, grid, column_block=block).dequantized
        assert torch.allclose(expected, other, rtol=0, atol=1e-10)
    scaled = qronos(weight, 1e5 * MOMENT, 1e5 * CROSS, grid).dequantized
    assert torch.allclose(expected, scaled, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dead", [0, 9])
def test_dead_channels_are_dropped(dead: int) -> None:
    weight, moment, cross = random_weight(3, D, seed=6), MOMENT.clone(), CROSS.clone()
    moment[dead] = moment[:, dead] = 0
    cross[dead] = 0
    for act_order in (False, True):
        result = qronos(weight, moment, cross, uniform_grid(D, GridSpec(3)), act_order=act_order)
        assert (result.dequantized[:, dead] == 0).all()
        kept = torch.arange(D) != dead
        # A dead channel counts in the mean diagonal, hence the damping of the smaller problem.
        smaller = qronos(
            weight[:, kept], moment[kept][:, kept], cross[kept][:, kept], uniform_grid(D - 1, GridSpec(3)),
            grid_weight=torch.cat([weight.amin(1, True), weight.amax(1, True), 0 * weight[:, : D - 3]], 1),
            damping=0.01 * (D - 1) / D, act_order=act_order,
        )  # fmt: skip
        if dead or act_order:
            assert torch.equal(result.stored.codes[:, kept], smaller.stored.codes)


def test_the_correction_of_a_dead_channel_is_ignored() -> None:
    weight, moment, cross = random_weight(3, D, seed=6), MOMENT.clone(), CROSS.clone()
    moment[9] = moment[:, 9] = 0
    cross[9] *= 1e3  # cannot happen with real moments: Xq_9 is zero
    result = qronos(weight, moment, cross, uniform_grid(D, GridSpec(3)))
    cross[9] = cross[:, 9] = 0
    assert torch.equal(result.stored.codes, qronos(weight, moment, cross, uniform_grid(D, GridSpec(3))).stored.codes)


@pytest.mark.parametrize("size", [None, 8])
def test_grids_can_come_from_another_weight(size: int | None) -> None:
    weight, other = random_weight(3, D, seed=9), 1.7 * random_weight(3, D, seed=10)
    grid = uniform_grid(D, GridSpec(3, group_size=size))
    result = qronos(weight, MOMENT, CROSS, grid, grid_weight=other)
    assert torch.equal(result.stored.scale, round_to_nearest(other, grid).stored.scale)


def test_an_untouched_first_range_takes_the_correction_whole() -> None:
    weight = random_weight(3, D, seed=7)
    grid = (ColumnRange(0, 4, GridSpec(16)), ColumnRange(4, D, GridSpec(8)))
    result = qronos(weight, MOMENT, CROSS, grid)
    first = weight[:, 0] + (CROSS @ weight.T)[0] / MOMENT[0, 0]
    assert torch.allclose(result.dequantized[:, 0], first, rtol=1e-12, atol=0)


def test_eigenvalue_damping_is_the_same_amount() -> None:
    largest = torch.linalg.eigvalsh(MOMENT)[-1]
    assert eigenvalue_damping(MOMENT, 1e-3) * MOMENT.diagonal().mean() == pytest.approx(float(1e-3 * largest))


def test_inputs_are_checked_and_kept() -> None:
    weight, cross, moment = random_weight(3, D, seed=8), CROSS.clone(), MOMENT.clone()
    copy = weight.clone()
    qronos(weight, moment, cross, SPLIT, act_order=True)
    assert torch.equal(weight, copy)
    assert torch.equal(cross, CROSS)
    assert torch.equal(moment, MOMENT)
    assert torch.equal(qronos(weight, moment, cross, uniform_grid(D, GridSpec(16))).dequantized, weight)
    cross[0, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"cross_moment.*\[0, 1\]"):
        qronos(weight, moment, cross, SPLIT)
    with pytest.raises(ConfigError, match="cross_moment"):
        qronos(weight, moment, CROSS[:, :3], SPLIT)
    with pytest.raises(NumericalError, match="damping"):
        qronos(weight, torch.ones(D, D, dtype=F64), CROSS, SPLIT, damping=0.0)
