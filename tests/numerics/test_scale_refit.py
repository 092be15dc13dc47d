"""Output-optimal row scales, against least squares on the raw outputs of every row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptqbench.errors import ConfigError, NumericalError
from ptqbench.numerics.null_space import apply_row_scale, null_space_row_scale, signal_space
from ptqbench.numerics.scale_refit import refit_row_scale


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight (6, 16), a coarse rounding of it, and correlated inputs (50, 16)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=g, dtype=torch.float64)
    inputs = torch.randn(50, 16, generator=g, dtype=torch.float64) @ torch.randn(
        16, 16, generator=g, dtype=torch.float64
    )
    return weight, torch.round(weight), inputs


def output_error(inputs: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((inputs @ (weight - rounded).T).square().sum())


def test_equals_least_squares_on_the_outputs_of_every_row() -> None:
    weight, rounded, inputs = layer()
    alpha = refit_row_scale(weight, rounded, inputs.T @ inputs)
    for i in range(6):
        slow = torch.linalg.lstsq((inputs @ rounded[i])[:, None], (inputs @ weight[i])[:, None]).solution
        assert float(alpha[i]) == pytest.approx(float(slow), rel=1e-10)


def test_golden_two_by_two() -> None:
    """W H Q^T = 2*1*1 + 1*(1*2 + 3*1) + 4*3*2 = 31 and Q H Q^T = 2 + 2*2 + 16 = 22, by hand."""
    weight, rounded = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert refit_row_scale(weight, rounded, moment).tolist() == pytest.approx([31 / 22, 1.0])


def test_no_row_scale_is_better_and_null_space_scales_are_worse() -> None:
    weight, rounded, inputs = layer()
    moment = inputs.T @ inputs
    alpha = refit_row_scale(weight, rounded, moment)
    best = output_error(inputs, weight, apply_row_scale(alpha, rounded))
    null_space = null_space_row_scale(weight, rounded, signal_space(moment, threshold=0.1), ridge=0.2)
    assert best < 0.99 * output_error(inputs, weight, apply_row_scale(null_space, rounded))
    assert best < 0.99 * output_error(inputs, weight, rounded)
    for row in range(6):
        for step in (-0.01, 0.01):
            moved = alpha.clone()
            moved[row] += step
            assert output_error(inputs, weight, apply_row_scale(moved, rounded)) > best


def test_perfect_rounding_and_second_refit_leave_one() -> None:
    weight, rounded, inputs = layer()
    moment = inputs.T @ inputs
    assert torch.equal(refit_row_scale(weight, weight, moment), torch.ones(6, dtype=torch.float64))
    once = apply_row_scale(refit_row_scale(weight, rounded, moment), rounded)
    torch.testing.assert_close(refit_row_scale(weight, once, moment), torch.ones(6, dtype=torch.float64))


def test_invariances() -> None:
    """Scale of the moment, joint scale of the weights, and any orthogonal change of the channels."""
    weight, rounded, inputs = layer()
    moment = inputs.T @ inputs
    alpha = refit_row_scale(weight, rounded, moment)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double()).Q
    torch.testing.assert_close(refit_row_scale(weight, rounded, 1e-6 * moment), alpha)
    torch.testing.assert_close(refit_row_scale(7 * weight, 7 * rounded, moment), alpha)
    turned = refit_row_scale(weight @ rotation, rounded @ rotation, rotation.T @ moment @ rotation)
    torch.testing.assert_close(turned, alpha)
    torch.testing.assert_close(refit_row_scale(weight, 4 * rounded, moment), alpha / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undetermined_rows_get_one(dtype: torch.dtype) -> None:
    """A zero row, and rows that the inputs cannot see: exactly, or only up to round-off."""
    direction = torch.tensor([1.0, 1.0, 1.0], dtype=dtype) / 3
    moment = torch.outer(direction, direction)
    rounded = torch.tensor([[0, 0, 0], [1, -1, 0], [0.1, 0.2, -0.3], [1, 1, 0]], dtype=dtype)
    alpha = refit_row_scale(torch.full((4, 3), 2.0, dtype=dtype), rounded, moment)
    assert alpha[:3].tolist() == [1, 1, 1]
    assert float(alpha[3]) == pytest.approx(3)
    assert torch.equal(refit_row_scale(rounded, rounded + 1, torch.zeros_like(moment)), torch.ones(4, dtype=dtype))


def test_narrow_weights_are_widened_and_inputs_kept() -> None:
    weight, rounded, inputs = layer()
    moment = (inputs.T @ inputs).float()
    arguments = [weight.bfloat16(), rounded.bfloat16(), moment]
    before = [argument.clone() for argument in arguments]
    alpha = refit_row_scale(*arguments)
    assert alpha.dtype == torch.float32
    exact = refit_row_scale(arguments[0].double(), arguments[1].double(), moment.double())
    torch.testing.assert_close(alpha.double(), exact, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_argument_is_named(which: int, value: float) -> None:
    weight, rounded, inputs = layer()
    arguments = [weight, rounded, inputs.T @ inputs]
    arguments[which][0, 0] = value
    with pytest.raises(NumericalError, match=["weight", "dequantized", "second_moment"][which]):
        refit_row_scale(*arguments)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ConfigError, match="dequantized"):
        refit_row_scale(torch.ones(2, 3), torch.ones(3, 2), torch.eye(3))
    with pytest.raises(ConfigError, match="second_moment"):
        refit_row_scale(torch.ones(2, 3), torch.ones(2, 3), torch.eye(2))
