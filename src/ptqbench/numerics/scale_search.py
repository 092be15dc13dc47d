"""Choose the scale of a block so that rounding costs least.

Objective, per row of a block: the first strict minimum of ``sum |q_j - x_j|^p`` over candidate scales.

    clip_search    scales of the peaks f a, f in {1, 0.99, ..., 0.21}                                      p = 2.4, any format
    exponent       e, e - 1, e + 1 around the rule                                                         p = 2, powers of two
    four_over_six  E4M3(g), E4M3(fl(1.5 g)), g = fl(G fl(a / 6))                                           p = 2, nvfp4
    scale_sweep    the E4M3 codes c - 3 .. c + 7 around that of g, within 1 .. 126                         p = 2, nvfp4
    fpq_mse        f a, f in {1, 0.992, ..., 0.208}; the loss is that of the scale before it is rounded    p = 2.4, mxfp4, nvfp4

``four_over_six`` and ``scale_sweep`` raise scales, so that the largest one is 256 beforehand: G = 1536 / A instead of 2688 / A.
``scale_sweep`` finds the best of all 126 codes: no scale outside its window can be better.

Legend: r rows, c channels of one block; a, A and G as in ``numerics/microscaling.py``.
Source: IST-DASLab/gptq@2d65066 (``clip_search``); intel/auto-round@b9f3d0079 (``exponent``); mit-han-lab/fouroversix@dadfad6, arXiv
2512.02010; efsotr/nvfp4quant_test@310ffb0, arXiv 2606.07618 (``scale_sweep``); IST-DASLab/FP-Quant@d2e3092, arXiv 2509.23202
(``fpq_mse``). Deviation: candidates of ``clip_search`` are scales as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ptqbench.numerics.formats import E4M3, Elements, Format
from ptqbench.numerics.grid_spec import GridSpec
from ptqbench.numerics.microscaling import LARGEST_EXPONENT, SMALLEST_E4M3, block_scale, peak_of, to_element

CLIP_STEPS, CLIP_EXPONENT = 80, 2.4
FPQ_STEPS, FPQ_STEP = 100, 0.008
SWEEP = range(-3, 8)


def fit_scale(values: Tensor, spec: GridSpec, number: Tensor | None) -> Tensor:
    """Return the scale of every row of a block.

    Args:
        values: (r, c) finite, float32 or float64, not modified.
        spec: A grid with a format, and its search.
        number: ``microscaling.tensor_number`` of the tensor, a scalar, where the format has one.

    Returns:
        (r,) > 0.
    """
    form, peak = spec.own_format, peak_of(values)
    scale = block_scale(peak, form, spec.mx_scale, number)
    if spec.clip_search and form.scale != "tensor":
        shrunk = (peak * ((100 - i) / 100) for i in range(CLIP_STEPS))
        candidates = (block_scale(one, form, spec.mx_scale, number) for one in shrunk)
        return _best(values, form.elements, candidates, CLIP_EXPONENT)
    if spec.scale_search == "exponent":
        smallest, largest = (2.0**e * form.elements.unit for e in (-LARGEST_EXPONENT, LARGEST_EXPONENT))
        around = ((scale * factor).clamp(smallest, largest) for factor in (1.0, 0.5, 2.0))
        return _best(values, form.elements, around, 2)
    if spec.scale_search in ("four_over_six", "scale_sweep"):
        assert number is not None, "the format has a number per tensor"
        wanted = peak / 6 * number
        stored = _sixes(wanted) if spec.scale_search == "four_over_six" else _sweep(wanted)
        return _best(values, form.elements, (one.clamp(min=SMALLEST_E4M3) / number for one in stored), 2)
    if spec.scale_search == "fpq_mse":
        return _searched_before_rounding(values, peak, form, spec.mx_scale, number)
    return scale


def _sixes(wanted: Tensor) -> Iterator[Tensor]:
    """The largest element of the block is at 6, or at 4."""
    yield to_element(wanted, E4M3)
    yield to_element(wanted * 1.5, E4M3)


def _sweep(wanted: Tensor) -> Iterator[Tensor]:
    """The E4M3 numbers next to the wanted one."""
    numbers = torch.arange(127, dtype=torch.uint8, device=wanted.device).view(torch.float8_e4m3fn).to(wanted.dtype)
    code = torch.bucketize(to_element(wanted, E4M3), numbers)
    for offset in SWEEP:
        yield numbers[(code + offset).clamp(1, 126)]


def _best(values: Tensor, elements: Elements, candidates: Iterable[Tensor], exponent: float) -> Tensor:
    """Return the first of the candidate scales (r,) with the least loss, row by row."""
    best = best_loss = last = None
    for scale in candidates:
        if last is not None and torch.equal(scale, last):  # a power of two serves many peaks
            continue
        last, column = scale, scale[:, None]
        error = to_element(values / column, elements).mul_(column).sub_(values)
        loss = (error.square_() if exponent == 2 else error.abs_().pow_(exponent)).sum(dim=1)
        if best is None or best_loss is None:
            best, best_loss = scale, loss
            continue
        better = loss < best_loss
        best, best_loss = torch.where(better, scale, best), torch.where(better, loss, best_loss)
    assert best is not None, "there is a candidate"
    return best


def _searched_before_rounding(
    values: Tensor, peak: Tensor, form: Format, mx_scale: str, number: Tensor | None
) -> Tensor:
    """Return the rounded scale of the peak whose unrounded scale has the least loss: as the authors' code does."""
    scale = torch.where(peak == 0, 1.0, peak / form.elements.largest)
    shares = [1 - FPQ_STEP * i for i in range(FPQ_STEPS)]
    found = _best(values, form.elements, (scale * share for share in shares), CLIP_EXPONENT)
    return block_scale(torch.where(peak == 0, 0.0, found * form.elements.largest), form, mx_scale, number)
