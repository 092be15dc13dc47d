"""AWQ's losses and clip thresholds: the golden toy, the token form, and that clipping never loses."""

import pytest
import torch

from ptqbench.numerics import reference
from ptqbench.numerics.awq import clamped, clip_thresholds, group_moments, grouped, moment_loss
from ptqbench.numerics.grid import uniform_grid
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.rtn import round_to_nearest
from ptqbench.numerics.smoothing import awq_scale

X = torch.tensor([[1, 0.2, -0.5, 0.1], [-2, 0.1, 0.4, 0.3], [4, -0.3, 0.2, -0.2]], dtype=torch.float64)
W = torch.tensor([[0.9, -0.3, 0.4, -0.8], [0.2, 0.7, -0.6, 0.1]], dtype=torch.float64)
STEPS, SHRINK = 20, 0.5


def rounding(width, bits=3, group_size=2, scheme="asym"):
    grid = uniform_grid(width, GridSpec(bits, scheme, group_size=group_size))
    return lambda weight: round_to_nearest(weight, grid).dequantized


def round_as_code(weight, bits=3, group_size=2):
    """The grid of the code: plain minimum and maximum of a group, zero point clamped to the codes."""
    groups, levels = weight.unflatten(1, (-1, group_size)), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / levels
    zero = (-torch.round(low / scale)).clamp(0, levels)
    codes = (torch.round(groups / scale) + zero).clamp(0, levels)
    return ((codes - zero) * scale).flatten(1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=0, atol=1e-6)


def test_the_toy_of_the_code():
    """Losses of the exponents, the scaled and rounded weight, and the thresholds at which it is clipped."""
    moment, sizes, round_ = X.T @ X / 3, X.abs().mean(0), round_as_code
    close(sizes, [2.333333, 0.2, 0.366667, 0.2])
    scales = [awq_scale(sizes, i / 20) for i in range(20)]
    losses = [moment_loss(W, round_(W * s) / s, moment) / 2 for s in scales]
    expected = [0.00740340, 0.01269945, 0.02110855, 0.01265658, 0.00367289, 0.00217193, 0.00933468, 0.02645902]
    close(torch.tensor(losses[:8], dtype=torch.float64), expected)
    assert min(range(20), key=losses.__getitem__) == 5
    s = scales[5]
    close(s, [1.359466, 0.735583, 0.855937, 0.735583])
    close(round_(W * s), [[1.237881, -0.206313, 0.398932, -0.531909], [0.243015, 0.243015, -0.503246, 0.083874]])
    moments = group_moments(X / s, 2)
    limits = clip_thresholds(W * s, moments, round_, STEPS, SHRINK)
    close(limits / grouped((W * s).abs(), 2).amax(-1), [[1, 0.95], [1, 1]])
    clipped = clamped(W * s, limits, 2)
    changed = clipped != W * s
    assert changed.nonzero().tolist() == [[0, 3]]
    close(clipped[0, 3], -0.559043)
    difference = grouped(round_(clipped) - W * s, 2)
    errors = torch.einsum("mgi,gij,mgj->mg", difference, moments / 3, difference)
    close(errors, [[0.000634, 0.000962], [0.003253, 0.000034]])


@pytest.mark.parametrize("bits", [3, 4])
def test_the_grid_of_the_code_is_ours_where_groups_have_both_signs(bits):
    weight = randn(40, 64, seed=5)
    torch.testing.assert_close(round_as_code(weight, bits, 32), rounding(64, bits, 32)(weight), rtol=1e-12, atol=1e-15)
    close(round_as_code(torch.tensor([[1.0, 2, 3, 4]]), 3, 4), [[0.857143, 2.142857, 3, 3]])


@pytest.mark.parametrize("group_size", [4, 5, 12, 99])
@pytest.mark.parametrize("scheme", ["asym", "sym_signed"])
def test_moments_give_the_choice_of_the_tokens(group_size, scheme):
    """Also where the last group is smaller, and where a group is the whole row."""
    inputs, weight, round_ = (
        randn(70, 12, seed=1),
        randn(6, 12, seed=2),
        rounding(12, group_size=group_size, scheme=scheme),
    )
    size = min(group_size, 12)
    found = clip_thresholds(weight, group_moments(inputs, size), round_, STEPS, SHRINK)
    torch.testing.assert_close(found, reference.awq_clip(weight, inputs, round_, size), rtol=1e-12, atol=0)
    assert found.shape == (6, -(-12 // size))
    scale = awq_scale(inputs.abs().mean(0), 0.3)
    rounded = round_(weight * scale) / scale
    by_tokens = (inputs @ (rounded - weight).T).square().sum() / len(inputs)
    assert moment_loss(weight, rounded, inputs.T @ inputs / len(inputs)) == pytest.approx(float(by_tokens), rel=1e-12)


def test_clipping_never_loses_and_groups_do_not_see_each_other():
    inputs, weight, round_ = randn(40, 12, seed=3), randn(5, 12, seed=4), rounding(12, group_size=4)
    moments = group_moments(inputs, 4)
    limits = clip_thresholds(weight, moments, round_, STEPS, SHRINK)

    def errors(rounded):
        difference = grouped(rounded - weight, 4)
        return torch.einsum("mgi,gij,mgj->mg", difference, moments, difference)

    plain, better = errors(round_(weight)), errors(round_(clamped(weight, limits, 4)))
    assert bool((better <= plain).all())
    assert bool((better < plain).any())
    largest = grouped(weight.abs(), 4).amax(-1)
    assert bool((limits <= largest).all())
    assert bool((limits > SHRINK * largest).all())
    # Whole groups in another order give their thresholds in that order; channels inside a group may change places.
    order = torch.tensor([9, 8, 11, 10, 0, 1, 2, 3, 4, 5, 6, 7])
    moved = clip_thresholds(weight[:, order], group_moments(inputs[:, order], 4), round_, STEPS, SHRINK)
    torch.testing.assert_close(moved, limits[:, [2, 0, 1]])
