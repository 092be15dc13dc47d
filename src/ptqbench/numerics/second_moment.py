"""Second moments of a linear's inputs, accumulated over batches.

    second moment   S = (1/T) sum_t x_t x_t^T                 cross moment   C = (1/T) sum_t xq_t (x_t - xq_t)^T

Legend: T tokens, in input channels; inputs (..., in) with any leading axes. Token-weighted moments: ``numerics/targets.py``.
Source: IST-DASLab/gptq@2d65066 (which scales by 2/N with N sequences; every solver here is indifferent to the scale);
arXiv 2504.02692 for the cross moment.

Precision: sums run in float32, or in float64 on request. Inputs are never scaled before the product, so 16-bit inputs
on a GPU go through its 16-bit matrix units with exact products and float32 sums. A second moment is symmetric: only the blocks
on and below the diagonal are formed (nine sixteenths of the work at eight panels) and mirrored at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqbench.errors import CalibrationError, ConfigError
from ptqbench.numerics.checks import require_finite, require_shape

PANELS = 8
MIN_PANEL = 256
"""Least width of the panels of a symmetric product; below it one product is faster."""


@dataclass
class MomentSum:
    """Running sum of either a second moment or a cross moment.

    Attributes:
        in_features: Input channels.
        dtype: dtype of the sum, float32 or float64.
        total: (in, in) sum so far, ``None`` before the first batch. Of a second moment only the blocks on and below the
            diagonal are meaningful: read it through ``mean``.
        n_tokens: Tokens summed so far.
        symmetric: Whether ``total`` is a second moment; ``None`` before the first batch.
    """

    in_features: int
    dtype: torch.dtype = torch.float32
    total: Tensor | None = None
    n_tokens: int = 0
    symmetric: bool | None = None

    def add(self, inputs: Tensor) -> None:
        """Add the second moment of a batch.

        Args:
            inputs: (..., in) floating point, not modified.

        Raises:
            ConfigError: A shape is wrong, or this sum holds a cross moment.
        """
        x = self._flat("inputs", inputs, symmetric=True)
        total = self._total(x)
        x = x if _exact_in_half(x, total) else x.to(self.dtype)
        for start, stop in panels(self.in_features):
            # S[start:stop, :stop] += X[:, start:stop]^T X[:, :stop]
            _add_product(total[start:stop, :stop], x[:, start:stop], x[:, :stop])
        self.n_tokens += len(x)

    def add_cross(self, quantized: Tensor, full: Tensor) -> None:
        """Add the cross moment Xq^T (X - Xq) of a batch.

        Args:
            quantized: (..., in) inputs Xq in the quantized stream, not modified.
            full: (..., in) inputs X of the same tokens in the full-precision stream, not modified.

        Raises:
            ConfigError: A shape is wrong, or this sum holds a second moment.
        """
        require_shape("full", full, quantized.shape)
        xq = self._flat("quantized", quantized, symmetric=False)
        total = self._total(xq)
        # C += Xq^T (X - Xq). A difference of 16-bit numbers needs more bits than they have: subtract in the dtype of the sum.
        difference = full.reshape(xq.shape).to(self.dtype) - xq.to(self.dtype)
        _add_product(total, xq.to(self.dtype), difference)
        self.n_tokens += len(xq)

    def mean(self) -> Tensor:
        """Return the moment per token, (in, in) in ``dtype``, exactly symmetric for a second moment.

        Raises:
            CalibrationError: No token was added.
            NumericalError: NaN or infinity among the inputs, or an overflow.
        """
        if self.total is None or self.n_tokens == 0:
            raise CalibrationError("moment: expected at least one calibration token, got none")
        mean = self.total / self.n_tokens
        # The upper triangle of S is the mirror image of the lower one.
        if self.symmetric:
            mean = mean.tril_() + mean.tril(-1).T
        require_finite("second_moment" if self.symmetric else "cross_moment", mean)
        return mean

    def _flat(self, name: str, inputs: Tensor, *, symmetric: bool) -> Tensor:
        """Return (T, in) after checking the shape and the kind of moment."""
        if inputs.ndim < 1 or inputs.shape[-1] != self.in_features or not inputs.is_floating_point():
            raise ConfigError(
                f"{name}: expected floating point of shape (..., {self.in_features}), "
                f"got {list(inputs.shape)} of {inputs.dtype}"
            )
        if self.symmetric not in (None, symmetric):
            raise ConfigError("moment: expected a second or a cross moment, got batches of both; keep one sum for each")
        self.symmetric = symmetric
        return inputs.detach().reshape(-1, self.in_features)

    def _total(self, like: Tensor) -> Tensor:
        if self.total is None:
            self.total = torch.zeros(self.in_features, self.in_features, dtype=self.dtype, device=like.device)
        return self.total


def panels(size: int) -> list[tuple[int, int]]:
    """Cut the channels of a symmetric product into panels (start, stop), so that its upper blocks can be left out."""
    width = max(MIN_PANEL, -(-size // PANELS))
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to ``total`` in place, in the precision of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=total.dtype)


def _exact_in_half(x: Tensor, total: Tensor) -> bool:
    """Whether the device multiplies 16-bit inputs exactly with a float32 sum, so that no copy is needed."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and total.dtype == torch.float32
