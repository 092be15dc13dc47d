"""Inputs, keys and values in the formats: blocks along the channels, numbers per tensor, split axes, gradients."""

from __future__ import annotations

import pytest
import reference_formats as reference
import torch

from ptqbench.errors import ConfigError
from ptqbench.numerics.activation import ActivationGrid, apply_grid, part_peaks
from ptqbench.numerics.formats import FORMATS

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 76, generator=GENERATOR) * torch.logspace(-3, 3, 5)[:, None]


def grid(form: str, **options: object) -> ActivationGrid:
    return ActivationGrid(FORMATS[form].elements.bits, format=form, **options)


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "fp8"])
def test_inputs_are_rounded_as_weights_are(form: str) -> None:
    """With the maximum of the whole tensor; ``fp8_row`` and powers of two do not need it. The last block is short."""
    rows = X.reshape(-1, 76)
    expected, _, _ = reference.quantize(rows.numpy(), form)
    found = apply_grid(X, grid(form), peaks=part_peaks(X, grid(form)))
    assert torch.equal(found.reshape(-1, 76) + 0.0, torch.from_numpy(expected) + 0.0)


def test_fp8_has_one_scale_from_the_calibration() -> None:
    peaks = part_peaks(X, grid("fp8"))
    assert peaks.tolist() == [float(X.abs().max())]
    expected, _, _ = reference.quantize(X.reshape(-1, 76).numpy(), "fp8")
    assert torch.equal(apply_grid(X, grid("fp8"), peaks=peaks).reshape(-1, 76) + 0.0, torch.from_numpy(expected) + 0.0)
    assert float(apply_grid(10 * X, grid("fp8"), peaks=peaks).abs().max()) == pytest.approx(float(peaks), rel=1e-6)


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_larger_inputs_than_those_of_the_calibration_saturate(form: str) -> None:
    peaks = part_peaks(X, grid(form))
    found = apply_grid(1000 * X, grid(form), peaks=peaks)
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) <= float(peaks) * (1 + 1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_rounds_by_itself(form: str) -> None:
    for options in ({}, {"static": False}, {"one_level": True}):
        whole = grid(form, **options)
        peaks = part_peaks(X, whole) if whole.needs_peaks else None
        together = apply_grid(X, whole, peaks=peaks)
        assert torch.equal(together[1, 2], apply_grid(X[1, 2], whole, peaks=peaks))


def test_which_grids_need_the_calibration() -> None:
    needs = {form: grid(form).needs_peaks for form in FORMATS}
    assert {form for form, need in needs.items() if need} == {"nvfp4", "fp8"}
    assert not grid("nvfp4", static=False).needs_peaks
    assert not grid("nvfp4", one_level=True).needs_peaks
    assert grid("fp8", one_level=True).needs_peaks
    assert not ActivationGrid(8).needs_peaks


def test_a_row_has_its_own_number_without_the_calibration() -> None:
    token = grid("nvfp4", static=False)
    rows = [apply_grid(row, token, peaks=part_peaks(row, token)) for row in X.reshape(-1, 76)]
    static = [apply_grid(row, grid("nvfp4"), peaks=part_peaks(row, token)) for row in X.reshape(-1, 76)]
    assert torch.equal(apply_grid(X, token).reshape(-1, 76), torch.stack(rows))
    assert torch.equal(torch.stack(rows), torch.stack(static))
    assert torch.equal(apply_grid(X, grid("nvfp4")), apply_grid(X, token)), "while peaks are not known"


def test_parts_of_a_split_axis_have_formats_numbers_and_blocks_of_their_own() -> None:
    split = grid("nvfp4", high_bits=8, n_high=12)
    peaks = part_peaks(X, split)
    assert peaks.tolist() == [float(X[..., :64].abs().max()), float(X[..., 64:].abs().max())]
    found = apply_grid(X, split, peaks=peaks)
    assert torch.equal(found[..., :64], apply_grid(X[..., :64], grid("nvfp4"), peaks=peaks[:1]))
    assert torch.equal(found[..., 64:], apply_grid(X[..., 64:], grid("mxfp8")))
    with pytest.raises(ConfigError, match="expected bits of a format beside mxint8, got 5"):
        grid("mxint8", high_bits=5, n_high=4)


def test_blocks_lie_within_a_group() -> None:
    """Heads of 19 channels: blocks of 16 and 3."""
    heads = X.reshape(3, 5, 4, 19)
    mx = grid("mxfp4")
    assert torch.equal(apply_grid(X, mx, n_groups=4), apply_grid(heads, mx).reshape(X.shape))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finite_stays_visible(form: str) -> None:
    bad = X.clone()
    bad[0, 0, 3], bad[0, 1, 3] = torch.nan, torch.inf
    found = apply_grid(bad, grid(form), peaks=part_peaks(X, grid(form)) if grid(form).needs_peaks else None)
    assert found[0, 0, 3].isnan()
    assert found[0, 1, 3].isnan()
    assert torch.isfinite(found[1:]).all()
    assert part_peaks(bad, grid(form)).isnan().all()


@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_passes_straight_through(form: str) -> None:
    x = X.clone().requires_grad_()
    (apply_grid(x, grid(form)) * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 3))


def test_the_clip_ratio_is_a_factor_on_the_largest_magnitude() -> None:
    row = torch.tensor([[448.0, 1.0, -3.0]])
    assert apply_grid(row, grid("fp8_row", clip_ratio=0.5)).tolist() == [[224.0, 1.0, -3.0]]
    clipped = apply_grid(row, grid("fp8", clip_ratio=0.5), peaks=torch.tensor([448.0]))
    assert clipped.tolist() == [[224.0, 1.0, -3.0]]
