"""GPTAQ: the worked example, an explicit least-squares recursion, the original loop, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import reference_solvers as reference
import torch
from reference_problems import DRIFT, F64, QUANTIZED_INPUTS, WEIGHT, correlated_inputs, random_weight

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics import column_loop, compensated
from ptqbench.numerics.factorisation import factorise
from ptqbench.numerics.gptaq import drift_matrix, gptaq, repeated_damping
from ptqbench.numerics.gptq import gptq
from ptqbench.numerics.grid import ColumnRange, Grid, uniform_grid
from ptqbench.numerics.grid_spec import GridSpec

D = 26
XQ = correlated_inputs(300, D, seed=0)
X = XQ + 0.2 * correlated_inputs(300, D, seed=1)
MOMENT, CROSS = XQ.T @ XQ, XQ.T @ (X - XQ)
GRIDS: dict[str, Grid] = {
    "row": uniform_grid(D, GridSpec(3)),
    "groups": uniform_grid(D, GridSpec(3, "sym_signed", group_size=8)),
    "split": (ColumnRange(0, 15, GridSpec(2, group_size=4)), ColumnRange(15, D, GridSpec(4, "sym_signed"))),
}


def output_error(weight: torch.Tensor, dequantized: torch.Tensor, x: torch.Tensor, xq: torch.Tensor) -> float:
    """Return ||Xq Q^T - X W^T||^2 / ||X W^T||^2."""
    return float(((xq @ dequantized.T - x @ weight.T) ** 2).sum() / ((x @ weight.T) ** 2).sum())


def test_worked_example() -> None:
    moment, cross = QUANTIZED_INPUTS.T @ QUANTIZED_INPUTS, QUANTIZED_INPUTS.T @ DRIFT
    p = drift_matrix(factorise(moment), cross, 1.0)
    above = [p[i, j].item() for i in range(4) for j in range(i + 1, 4)]
    assert above == pytest.approx([-0.000954, 0.118764, -0.021293, 0.074702, 0.013665, 0.063517], abs=1e-6)
    assert torch.equal(p, p.triu(1))
    grid = uniform_grid(4, GridSpec(2))
    assert gptq(WEIGHT, moment, grid).stored.codes.tolist() == [[3, 1, 1, 0], [1, 3, 0, 1]]
    assert gptaq(WEIGHT, moment, cross, grid).stored.codes.tolist() == [[3, 1, 1, 0], [1, 3, 0, 1]]
    assert gptaq(WEIGHT, moment, cross, grid, strength=1.0).stored.codes.tolist() == [[3, 1, 2, 0], [1, 3, 0, 1]]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_explicit_recursion(name: str, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_loop, "PANEL", 5)
    monkeypatch.setitem(compensated.ROW_CHUNK, "cpu", 2)
    weight = random_weight(3, D, seed=2)
    order = torch.argsort(MOMENT.diagonal(), descending=True).numpy() if act_order else np.arange(D)
    moment, cross = (m.numpy()[np.ix_(order, order)] for m in (MOMENT, CROSS))
    p = 0.7 * reference.gptaq_drift(moment, cross, 0.01)
    codes, values = reference.gptq(weight.numpy(), MOMENT.numpy(), GRIDS[name], order=order, drift=p)
    result = gptaq(weight, MOMENT, CROSS, GRIDS[name], strength=0.7, column_block=7, act_order=act_order)
    assert np.array_equal(result.stored.codes.numpy(), codes)
    assert np.allclose(result.dequantized.numpy(), values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [None, 4, 8])
def test_as_code_equals_the_original_loop(size: int | None) -> None:
    weight, spec = random_weight(4, D, seed=3), GridSpec(3, group_size=size)
    p = reference.gptaq_drift(MOMENT.numpy(), CROSS.numpy(), 0.01)
    expected = reference.block_loop(weight.numpy(), MOMENT.numpy(), spec, 8, p)
    options = {"strength": 1.0, "column_block": 8, "group_refit": "stale"}
    result = gptaq(weight, MOMENT, CROSS, uniform_grid(D, spec), as_code=True, **options)
    assert np.allclose(result.dequantized.numpy(), expected, rtol=0, atol=1e-10)
    ours = gptaq(weight, MOMENT, CROSS, uniform_grid(D, spec), **options)
    assert not torch.equal(ours.dequantized, result.dequantized)


def test_no_strength_and_no_drift_are_gptq() -> None:
    weight = random_weight(4, D, seed=4)
    for grid in GRIDS.values():
        plain = gptq(weight, MOMENT, grid)
        assert torch.equal(gptaq(weight, MOMENT, CROSS, grid, strength=0.0).dequantized, plain.dequantized)
        still = gptaq(weight, MOMENT, torch.zeros_like(CROSS), grid, strength=1.0)
        assert torch.equal(still.dequantized, plain.dequantized)


def test_column_block_changes_nothing_with_fresh_groups() -> None:
    weight = random_weight(4, D, seed=5)
    for grid in GRIDS.values():
        results = [gptaq(weight, MOMENT, CROSS, grid, strength=1.0, column_block=b).dequantized for b in (1, 6, 9, 64)]
        assert all(torch.allclose(results[0], other, rtol=0, atol=1e-10) for other in results[1:])


def test_a_common_scale_of_both_moments_cancels() -> None:
    weight, grid = random_weight(4, D, seed=6), GRIDS["groups"]
    first = gptaq(weight, MOMENT, CROSS, grid, strength=1.0).dequantized
    other = gptaq(weight, 1e-4 * MOMENT, 1e-4 * CROSS, grid, strength=1.0).dequantized
    assert torch.allclose(first, other, rtol=0, atol=1e-12)


def test_the_mismatched_output_error_falls_below_gptq() -> None:
    weight, grid = random_weight(64, D, seed=7), uniform_grid(D, GridSpec(4))
    plain, half = gptq(weight, MOMENT, grid), gptaq(weight, MOMENT, CROSS, grid, strength=0.25)
    full = gptaq(weight, MOMENT, CROSS, grid, strength=1.0)
    errors = [output_error(weight, r.dequantized, X, XQ) for r in (plain, half, full)]
    assert errors[0] > errors[1] > errors[2]


def test_dead_channels_carry_no_drift() -> None:
    weight, moment, cross = random_weight(3, D, seed=8), MOMENT.clone(), CROSS.clone()
    moment[5] = moment[:, 5] = 0
    cross[5] *= 1e3  # cannot happen with real moments: Xq_5 is zero
    result = gptaq(weight, moment, cross, GRIDS["row"], strength=1.0)
    cross[5] = cross[:, 5] = 0
    assert (result.dequantized[:, 5] == 0).all()
    assert torch.equal(result.stored.codes, gptaq(weight, moment, cross, GRIDS["row"], strength=1.0).stored.codes)


def test_repeated_damping_is_the_original_s_accumulation() -> None:
    moment = MOMENT.clone()
    for times in (1, 2, 3):
        moment.diagonal().add_(0.01 * moment.diagonal().mean())
        once = MOMENT + repeated_damping(0.01, times) * MOMENT.diagonal().mean() * torch.eye(D, dtype=F64)
        assert torch.allclose(moment, once, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match="times"):
        repeated_damping(0.01, 0)


def test_inputs_are_checked_and_kept() -> None:
    weight, cross = random_weight(3, D, seed=9), CROSS.clone()
    copies = weight.clone(), MOMENT.clone()
    gptaq(weight, MOMENT, cross, GRIDS["groups"], act_order=True)
    assert torch.equal(weight, copies[0])
    assert torch.equal(MOMENT, copies[1])
    assert torch.equal(cross, CROSS)
    assert torch.equal(gptaq(weight, MOMENT, CROSS, uniform_grid(D, GridSpec(16))).dequantized, weight)
    cross[2, 3] = torch.inf
    with pytest.raises(NumericalError, match=r"cross_moment.*\[2, 3\]"):
        gptaq(weight, MOMENT, cross, GRIDS["row"])
    with pytest.raises(ConfigError, match="cross_moment"):
        gptaq(weight, MOMENT, CROSS[:3], GRIDS["row"])
