"""Scales of SmoothQuant and AWQ: golden toys, and what a scale must satisfy whatever the data."""

import pytest
import torch

from ptqbench.errors import NumericalError
from ptqbench.numerics import reference
from ptqbench.numerics.grid import uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest
from ptqbench.numerics.smoothing import awq_scale, smoothing_scale

XMAX = torch.tensor([8, 1, 2, 0.5], dtype=torch.float64)
WEIGHT = torch.tensor([[0.9, -0.3, 0.4, -0.8], [0.2, 0.7, -0.6, 0.1]], dtype=torch.float64)
WMAX = WEIGHT.abs().amax(0)
GRID = uniform_grid(4, GridSpec(4, "sym_signed"))
ALPHAS = (0.0, 0.3, 0.5, 0.85, 1.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "scale", "smoothed", "row_scales", "codes", "gain"),
    [
        (0.5, [2.981424, 1.195229, 1.825742, 0.790569], [2.683282, 0.836660, 1.095445, 0.632456], [0.383326, 0.156492],
         [[7, -1, 2, -2], [4, 5, -7, 1]], [0.670820, 0.836660, 0.273861, 5.059644]),
        (0.85, [5.949632, 1.054958, 1.946045, 0.573669], [1.344621, 0.947905, 1.027726, 0.871583], [0.764953, 0.169989],
         [[7, 0, 1, -1], [7, 4, -7, 0]], [0.336155, 0.947905, 0.256931, 6.972668]),
    ],
)  # fmt: skip
def test_the_toy_of_the_code(alpha, scale, smoothed, row_scales, codes, gain):
    found = smoothing_scale(XMAX, WMAX, alpha)
    close = lambda got, expected: torch.testing.assert_close(got, torch.tensor(expected).to(got), rtol=0, atol=1e-6)
    close(found, scale)
    close(XMAX / found, smoothed)
    rounded = round_to_nearest(WEIGHT * found, GRID)
    close(rounded.stored.scale[:, 0], row_scales)
    assert rounded.stored.codes.tolist() == codes
    # With the gain of the norm folded first the smoothed weight is the same and the gain becomes 1 / s0 (the signs return with it).
    g = torch.tensor([2, 1, 0.5, 4], dtype=torch.float64)
    folded = smoothing_scale(XMAX / g, WMAX * g, alpha)
    torch.testing.assert_close(WEIGHT * g * folded, WEIGHT * found, rtol=1e-12, atol=0)
    close(1 / folded, gain)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_laws_of_smoothing(alpha):
    inputs, weight = randn(50, 8).abs().amax(0), randn(6, 8, seed=1)
    largest = weight.abs().amax(0)
    scale = smoothing_scale(inputs, largest, alpha)
    torch.testing.assert_close(scale, reference.smoothing_scale(inputs[None], weight, alpha))
    if alpha == 0.5:
        torch.testing.assert_close(inputs / scale, largest * scale)
    if alpha == 1:
        torch.testing.assert_close(inputs / scale, torch.ones_like(scale))
    if alpha == 0:
        torch.testing.assert_close(largest * scale, torch.ones_like(scale))
    # A constant factor on the inputs or the weights changes no code; a permutation of the channels permutes the scales.
    grid = uniform_grid(8, GridSpec(4, "sym_signed"))
    codes = round_to_nearest(weight * scale, grid).stored.codes
    for louder in (smoothing_scale(4 * inputs, largest, alpha), smoothing_scale(inputs, 4 * largest, alpha)):
        assert torch.equal(round_to_nearest(weight * louder, grid).stored.codes, codes)
    order = torch.tensor([3, 1, 0, 7, 6, 2, 5, 4])
    assert torch.equal(smoothing_scale(inputs[order], largest[order], alpha), scale[order])
    # A norm gain of any sign commutes, as long as magnitudes are taken.
    gain = randn(8, seed=2)
    folded = smoothing_scale(inputs / gain.abs(), largest * gain.abs(), alpha)
    torch.testing.assert_close(weight * gain.abs() * folded, weight * scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_dead_channel_gets_a_finite_scale(alpha):
    zero, one = torch.zeros(1), torch.ones(1)
    for largest_input, largest_weight in ((zero, zero), (zero, one), (one, zero)):
        scale = smoothing_scale(largest_input, largest_weight, alpha)
        assert 1e-5 <= float(scale) <= 1e5


def test_a_scale_that_is_not_finite_names_its_channel():
    for broken in (float("inf"), float("nan")):
        sizes = torch.tensor([1.0, 1.0, broken])
        with pytest.raises(NumericalError, match="channel 2: expected a positive finite number"):
            smoothing_scale(sizes, torch.ones(3), 0.5)
    with pytest.raises(NumericalError, match="channel 0"):
        awq_scale(torch.tensor([float("nan"), 1.0]), 0.5)


def test_laws_of_awq_scales():
    sizes = randn(8).abs() + 0.1
    assert torch.equal(awq_scale(sizes, 0.0), torch.ones(8, dtype=torch.float64))
    for ratio in (0.05, 0.5, 0.95):
        scale = awq_scale(sizes, ratio)
        torch.testing.assert_close(scale.amax() * scale.amin(), torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(awq_scale(7 * sizes, ratio), scale)  # the normalisation cancels a constant factor
        torch.testing.assert_close(awq_scale(torch.full((8,), 3.0), ratio), torch.ones(8, dtype=torch.float64))
    assert float(awq_scale(torch.tensor([0.0, 1.0]), 0.5)[0]) == pytest.approx(1e-2)  # the floor 1e-4 over sqrt(1e-4)
