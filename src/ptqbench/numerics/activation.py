"""Dynamic fake quantization of activations, keys and values, with a two- or three-part mixed-precision split.

Objective: replace every row (token, or token and head) by the nearest point of a uniform grid fitted to that row's own
range; ``y = (clamp(round(x / scale) + zero_point) - zero_point) scale``.

Formats other than integers have a scale per block of channels instead (``numerics/microscaling.py``). Where they share a number per
tensor, it comes from the largest magnitude on the calibration tokens, or from the row itself.

Shapes: x (..., n), one grid per row and part; scale and zero_point (..., 1). Columns run from low to high importance,
so the high-precision part is the last.

Source: arXiv 2404.00456 (QuaRot), code spcl/QuaRot@5008669; arXiv 2412.14363 (ResQ), code
utkarsh-dmx/project-resq@cb87d0d. zero_point is rounded but not clamped; codes are clamped. Deviations: a plain-range row with
max = min is extended to contain 0 (the authors' codes divide by zero there); half-precision input is computed in float32.
A row with NaN or infinity becomes NaN, so that it stays visible. No call checks for it, because the host would have to wait.

Gradients pass rounding straight through: the gradient of the input is that of the output, with the range held fixed
(facebookresearch/SpinQuant@8f47aa3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqbench.errors import ConfigError
from ptqbench.numerics.formats import FORMATS, INTEGER, of_width
from ptqbench.numerics.grid_spec import UNTOUCHED_BITS, code_limits
from ptqbench.numerics.microscaling import peak_of, quantize_rows, tensor_number


@dataclass(frozen=True)
class ActivationGrid:
    """How one activation is quantized along its last axis.

    Attributes:
        bits: Bits of the bulk part, 2..16; 16 leaves it untouched.
        symmetric: Signed grid around 0 with ``scale = max|x| / (2^(bits-1) - 1)``; otherwise an integer zero_point.
        clip_ratio: Factor on the range, in (0, 1].
        range_contains_zero: Force ``min <= 0 <= max`` (general inputs) or take the plain range (grouped inputs).
        zero_point: ``integer``, or ``real`` (asymmetric grids alone): the minimum is subtracted before rounding, so that both
            ends are exact and zero need not be (the text of arXiv 2412.14363).
        high_bits: Bits of the last n_high channels; needed when n_high > 0.
        n_high: Channels of the high part.
        lowest_bits: Bits of the first n_lowest channels (``iso_bits``); needed when n_lowest > 0.
        n_lowest: Channels of the lowest part.
        format: ``int``, or a format; parts of other bits have the format of that width beside it. Of the fields about ranges,
            ``clip_ratio`` alone acts on formats.
        mx_scale: Rule for scales that are powers of two.
        static: Whether a number per tensor is that of the calibration tokens; otherwise it is that of each row.
        one_level: Leave out the number per tensor of NVFP4.

    Raises:
        ConfigError: A value lies outside its range.
    """

    bits: int
    symmetric: bool = False
    clip_ratio: float = 1.0
    range_contains_zero: bool = True
    zero_point: str = "integer"
    high_bits: int | None = None
    n_high: int = 0
    lowest_bits: int | None = None
    n_lowest: int = 0
    format: str = INTEGER
    mx_scale: str = "even"
    static: bool = True
    one_level: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if self.zero_point not in ("integer", "real") or (self.zero_point == "real" and self.symmetric):
            raise ConfigError(
                f"expected zero_point integer, or real on an asymmetric grid, got {self.zero_point!r} "
                f"with symmetric={self.symmetric}"
            )
        for bits in (self.bits, self.high_bits, self.lowest_bits):
            if bits is not None:
                _check(bits, self.clip_ratio)
        for bits in (self.bits, *(bits for bits in (self.high_bits, self.lowest_bits) if bits is not None)):
            if bits < UNTOUCHED_BITS and of_width(self.format, bits) is None:
                raise ConfigError(f"expected bits of a format beside {self.format}, got {bits}")
        for name, bits, count in (("high", self.high_bits, self.n_high), ("lowest", self.lowest_bits, self.n_lowest)):
            if count < 0 or (count > 0 and bits is None):
                raise ConfigError(f"expected {name}_bits with n_{name} > 0, got {name}_bits={bits}, n_{name}={count}")

    def parts(self, width: int) -> tuple[tuple[int, int, int], ...]:
        """List the column ranges of an axis as (start, stop, bits), without empty ones.

        Args:
            width: Length of the axis.

        Returns:
            One to three ranges that cover 0..width in order.

        Raises:
            ConfigError: The axis is shorter than the lowest and high parts together.
        """
        first, last = self.n_lowest, width - self.n_high
        if first > last:
            raise ConfigError(f"expected an axis of at least {self.n_lowest + self.n_high} channels, got {width}")
        ranges = (
            (0, first, self.lowest_bits or self.bits),
            (first, last, self.bits),
            (last, width, self.high_bits or self.bits),
        )
        return tuple(part for part in ranges if part[0] < part[1])

    @property
    def needs_peaks(self) -> bool:
        """Whether the largest magnitudes on the calibration tokens are needed."""
        names = {
            of_width(self.format, bits) for bits in (self.bits, self.high_bits, self.lowest_bits) if bits is not None
        }
        formats = [FORMATS[name] for name in names if name not in (None, INTEGER)]
        return self.static and any(form.per_tensor and not (self.one_level and form.block) for form in formats)


def part_peaks(x: Tensor, grid: ActivationGrid, n_groups: int = 1) -> Tensor:
    """Return the largest magnitude of every part, over all rows and groups.

    Args:
        x: As for ``apply_grid``.
        grid: The split.
        n_groups: As for ``apply_grid``.

    Returns:
        (parts,) float32, or float64 where x is; NaN if there is one.
    """
    grouped = x.reshape(-1, n_groups, x.shape[-1] // n_groups)
    work = grouped if x.dtype == torch.float64 else grouped.float()
    return torch.stack([work[..., start:stop].abs().max() for start, stop, _ in grid.parts(grouped.shape[-1])])


def apply_grid(x: Tensor, grid: ActivationGrid, n_groups: int = 1, peaks: Tensor | None = None) -> Tensor:
    """Fake-quantize the last axis with one range per row, group and part.

    Args:
        x: (..., n) floating point, not modified.
        grid: Bits, split and range rule; the split applies inside each group.
        n_groups: Equal groups of the last axis, e.g. the number of heads for per-(token, head) grids.
        peaks: ``part_peaks`` of the calibration tokens, for a grid that ``needs_peaks``; while they are not known, each row has
            its own.

    Returns:
        Same shape and dtype; x itself when every part has 16 bits.

    Raises:
        ConfigError: n_groups does not divide n, or a group is narrower than its high part.
    """
    if x.shape[-1] % n_groups:
        raise ConfigError(f"expected a last axis divisible by {n_groups} groups, got {x.shape[-1]}")
    # Every (row, group) is a row of its own: (..., n) -> (..., n_groups, n / n_groups).
    grouped = x.reshape(*x.shape[:-1], n_groups, x.shape[-1] // n_groups)
    parts = grid.parts(grouped.shape[-1])
    if all(bits == 16 for _, _, bits in parts):
        return x
    # Every part of the split has its own range and bits.
    known = [None] * len(parts) if peaks is None else peaks.to(x.device).unbind()
    quantized = [
        _fake_quantize_part(grouped[..., start:stop], grid, bits, peak)
        for (start, stop, bits), peak in zip(parts, known, strict=True)
    ]
    return torch.cat(quantized, dim=-1).reshape(x.shape) if len(parts) > 1 else quantized[0].reshape(x.shape)


def _fake_quantize_part(x: Tensor, grid: ActivationGrid, bits: int, peak: Tensor | None) -> Tensor:
    name = of_width(grid.format, bits) or INTEGER
    if name == INTEGER or bits == UNTOUCHED_BITS:
        return fake_quantize(x, bits, grid.symmetric, grid.clip_ratio, grid.range_contains_zero, grid.zero_point)
    form, work = FORMATS[name], x.detach() if x.dtype == torch.float64 else x.detach().float()
    number = None
    if form.per_tensor and not (grid.one_level and form.block):
        # A number per tensor from the calibration tokens, or from the row; a scale per tensor takes the clip ratio as well.
        peak = peak if peak is not None and grid.static else peak_of(work)[..., None]
        number = tensor_number(peak.to(work.dtype) * (1.0 if form.block else grid.clip_ratio), form)
    rounded = quantize_rows(work, form, grid.mx_scale, grid.clip_ratio, number).to(x.dtype)
    return straight_through(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


def fake_quantize(
    x: Tensor,
    bits: int,
    symmetric: bool = False,
    clip_ratio: float = 1.0,
    range_contains_zero: bool = True,
    zero_point: str = "integer",
) -> Tensor:
    """Round every row of the last axis to its own uniform grid.

    Args:
        x: (..., n) floating point, not modified.
        bits: 2..16; 16 returns x itself.
        symmetric: See `ActivationGrid`.
        clip_ratio: See `ActivationGrid`.
        range_contains_zero: See `ActivationGrid`; no effect on symmetric grids.
        zero_point: See `ActivationGrid`; no effect on symmetric grids.

    Returns:
        Same shape and dtype; float16 and bfloat16 are computed in float32. All-zero rows stay zero.

    Raises:
        ConfigError: bits or clip_ratio out of range, or x is not floating point.
    """
    _check(bits, clip_ratio)
    if not x.is_floating_point():
        raise ConfigError(f"expected a floating-point activation, got {x.dtype}")
    if bits == 16:
        return x
    work = x.detach() if x.dtype == torch.float64 else x.detach().float()
    scale, zero = fit_range(work, bits, symmetric, clip_ratio, range_contains_zero, zero_point)
    lowest, highest = code_limits(bits, symmetric)
    # codes = round(x / scale) + z; a real z is added before rounding
    codes = (work / scale).add_(zero).round_() if zero_point == "real" else (work / scale).round_().add_(zero)
    # y = (clamp(codes, lowest, highest) - z) scale
    rounded = codes.clamp_(lowest, highest).sub_(zero).mul_(scale).to(x.dtype)
    return straight_through(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded`` with the gradient of the identity in ``x``.

    Args:
        x: Any shape, floating point, not modified.
        rounded: Values of the same shape and dtype, not modified.

    Returns:
        A tensor equal to ``rounded`` bit for bit.
    """
    passed: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return passed


def fit_range(
    x: Tensor,
    bits: int,
    symmetric: bool,
    clip_ratio: float = 1.0,
    range_contains_zero: bool = True,
    zero_point: str = "integer",
) -> tuple[Tensor, Tensor]:
    """Fit scale and zero_point to every row's own minimum and maximum.

    Args:
        x: (..., n) float32 or float64, n >= 1, not modified.
        bits: 2..15.
        symmetric: ``scale = clip max|x| / (2^(bits-1) - 1)``, zero_point 0; all-zero rows get scale 1. Otherwise
            ``scale = clip (max - min) / (2^bits - 1)``, ``zero_point = round(-clip min / scale)``, not clamped.
        clip_ratio: Factor on the range.
        range_contains_zero: Asymmetric only. True: min <= 0 <= max, all-zero rows take the range (-1, 1). False: the
            plain range; where it is empty it is extended to 0, all-zero rows get scale 1.
        zero_point: ``integer``, or ``real``: not rounded, except in all-zero rows.

    Returns:
        (scale, zero_point), each (..., 1), scale > 0.
    """
    if symmetric:
        # scale = clip max|x| / (2^(bits-1) - 1),   z = 0
        scale = x.abs().amax(-1, keepdim=True) * clip_ratio / (2 ** (bits - 1) - 1)
        return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    silent = (low == 0) & (high == 0)
    levels = 2**bits - 1
    with_zero_low, with_zero_high = low.clamp(max=0), high.clamp(min=0)
    # scale = (high - low) / (2^bits - 1) with low, high = clip min, clip max
    if range_contains_zero:
        # min <= 0 <= max; a row of zeros gets (-1, 1)
        empty = (with_zero_high - with_zero_low) * clip_ratio / levels == 0
        low = torch.where(empty, -1.0, with_zero_low * clip_ratio)
        high = torch.where(empty, 1.0, with_zero_high * clip_ratio)
        scale = (high - low) / levels
    else:
        # the plain range; one that is empty is extended to zero, and a row of zeros gets scale 1
        empty = (high - low) * clip_ratio / levels == 0
        low = torch.where(empty, with_zero_low, low) * clip_ratio
        high = torch.where(empty, with_zero_high, high) * clip_ratio
        scale = (high - low) / levels
        scale = torch.where(scale == 0, 1.0, scale)
    # z = -low / scale, rounded unless it is real; a row of zeros stays zero in either case
    zero = -low / scale
    return scale, torch.where(silent, zero.round(), zero) if zero_point == "real" else zero.round_()


def fake_quantize_tensor(x: Tensor, bits: int = 8) -> Tensor:
    """Round a whole tensor to one symmetric grid (the online key rotations of a block, one stack (G, e, e)).

    Args:
        x: Any shape, floating point, not modified.
        bits: 2..16; 16 returns x itself.

    Returns:
        Same shape and dtype.

    Raises:
        ConfigError: bits is out of range, or x is not floating point.
    """
    return x if bits == 16 else fake_quantize(x.reshape(1, -1), bits, symmetric=True).reshape(x.shape)


def _check(bits: int, clip_ratio: float) -> None:
    if not 2 <= bits <= 16:
        raise ConfigError(f"expected 2 to 16 activation bits (16 = untouched), got {bits}")
    if not 0 < clip_ratio <= 1:
        raise ConfigError(f"expected a clip_ratio in (0, 1], got {clip_ratio}")
