"""Figures of merit of a rounded linear."""

import math

import pytest
import torch

from ptqbench.numerics.report import energy, relative_output_error, relative_weight_error


@pytest.mark.parametrize("size", [1, 7, 255, 256, 300, 600, 2100])
def test_energy_is_the_trace(size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(5, size, generator=generator, dtype=torch.float64)
    factor = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    moment = factor @ factor.T
    assert math.isclose(float(energy(x, moment)), float(torch.trace(x @ moment @ x.T)), rel_tol=1e-12)


def test_output_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 520, generator=generator, dtype=torch.float64)
    weight = torch.randn(33, 520, generator=generator, dtype=torch.float64)
    rounded = weight + 0.1 * torch.randn(33, 520, generator=generator, dtype=torch.float64)
    expected = float((inputs @ (weight - rounded).T).square().sum() / (inputs @ weight.T).square().sum())
    assert math.isclose(relative_output_error(weight, rounded, inputs.T @ inputs / 900), expected, rel_tol=1e-11)
    assert math.isclose(
        relative_weight_error(weight, rounded), float((weight - rounded).square().sum() / weight.square().sum())
    )


def test_quotients_of_nothing():
    zero, one, moment = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)
    assert relative_output_error(zero, zero, moment) == 0.0
    assert relative_output_error(zero, one, moment) == float("inf")
    assert relative_weight_error(zero, one) == float("inf")
    assert relative_output_error(one, zero, torch.zeros(3, 3)) == 0.0
