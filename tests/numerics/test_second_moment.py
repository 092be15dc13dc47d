"""Moments: equal to the plain products, independent of batching and of panels, loud about bad inputs."""

from __future__ import annotations

import pytest
import torch
from reference_problems import DRIFT, F64, QUANTIZED_INPUTS, correlated_inputs, random_weight

from ptqbench.errors import CalibrationError, ConfigError, NumericalError
from ptqbench.numerics import second_moment as module
from ptqbench.numerics.report import relative_output_error, relative_weight_error
from ptqbench.numerics.second_moment import MomentSum


def second_moment(inputs: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    moment = MomentSum(inputs.shape[-1], dtype)
    moment.add(inputs)
    return moment.mean()


def cross_moment(quantized: torch.Tensor, full: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    moment = MomentSum(quantized.shape[-1], dtype)
    moment.add_cross(quantized, full)
    return moment.mean()


@pytest.mark.parametrize("panel", [1, 3, 100])
def test_second_moment_is_the_mean_outer_product(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_PANEL", panel)
    x = correlated_inputs(24, 10, seed=0).reshape(2, 3, 4, 10)
    expected = sum(torch.outer(row, row) for row in x.reshape(-1, 10)) / 24
    got = second_moment(x, dtype=F64)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got, got.T)


def test_cross_moment_is_the_mean_product_with_the_drift() -> None:
    got = cross_moment(QUANTIZED_INPUTS, QUANTIZED_INPUTS + DRIFT, dtype=F64)
    assert torch.allclose(got, QUANTIZED_INPUTS.T @ DRIFT / 4, rtol=0, atol=1e-15)
    assert (4 * got[0]).tolist() == pytest.approx([0.1, 0.02, 0.03, -0.05])


def test_batches_of_any_size_add_up() -> None:
    x = correlated_inputs(50, 8, seed=2)
    moment = MomentSum(8, F64)
    for batch in (x[:7].reshape(1, 7, 8), x[7:7], x[7:8], x[8:]):
        moment.add(batch)
    assert moment.n_tokens == 50
    assert torch.allclose(moment.mean(), second_moment(x, dtype=F64), rtol=1e-12, atol=0)


def test_inputs_of_sixteen_bits_are_multiplied_exactly() -> None:
    x = correlated_inputs(64, 8, seed=3, dtype=torch.bfloat16)
    y = (x.float() + 0.37 * x.flip(0).float()).to(torch.bfloat16)
    before = x.clone()
    assert torch.allclose(second_moment(x).double(), second_moment(x.double(), dtype=F64), rtol=1e-6, atol=1e-6)
    exact = cross_moment(x.double(), y.double(), dtype=F64)
    assert torch.allclose(cross_moment(x, y).double(), exact, rtol=1e-5, atol=1e-7)
    assert second_moment(x).dtype == torch.float32
    assert torch.equal(x, before)


def test_moments_refuse_what_they_cannot_sum() -> None:
    with pytest.raises(CalibrationError, match="token"):
        MomentSum(4).mean()
    with pytest.raises(ConfigError, match="inputs"):
        MomentSum(4).add(torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="inputs"):
        MomentSum(4).add(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="full"):
        MomentSum(4).add_cross(torch.zeros(3, 4), torch.zeros(2, 4))
    both = MomentSum(4)
    both.add(torch.ones(3, 4))
    with pytest.raises(ConfigError, match="both"):
        both.add_cross(torch.ones(3, 4), torch.ones(3, 4))
    bad = torch.ones(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(NumericalError, match=r"second_moment.*index \[0, 2\]"):
        second_moment(bad)


def test_relative_errors_are_what_they_say() -> None:
    x, weight = correlated_inputs(40, 6, seed=4), random_weight(3, 6, seed=5)
    rounded = weight.round()
    output = ((x @ (weight - rounded).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert relative_output_error(weight, rounded, x.T @ x) == pytest.approx(output.item(), rel=1e-12)
    assert relative_output_error(weight, rounded, 7 * x.T @ x) == pytest.approx(output.item(), rel=1e-12)
    squares = (weight - rounded).square().sum() / weight.square().sum()
    assert relative_weight_error(weight, rounded) == pytest.approx(squares.item(), rel=1e-12)


def test_relative_errors_of_zero_weights() -> None:
    zero, one, moment = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)
    assert relative_weight_error(zero, zero) == relative_output_error(zero, zero, moment) == 0.0
    assert relative_weight_error(zero, one) == relative_output_error(zero, one, moment) == float("inf")
    assert relative_output_error(one, zero, torch.zeros(3, 3)) == 0.0
