"""A Hadamard transform inside every block of input channels, online at every linear (MR-GPTQ, arXiv 2509.23202).

    R = I (x) H_b / sqrt(b),   x <- x R before the quantizer,   W <- W R

H_b is Sylvester's matrix, so R is its own inverse. Nothing else changes: norms keep their gains, the residual stream its basis, and
nothing is stored. An outlier spreads within its block of b channels and leaves the scales of other blocks alone.

Source: IST-DASLab/FP-Quant@d2e3092. Deviation: a width that b does not divide takes the largest power of two that divides it; the
code refuses such a width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from ptqbench.methods.basis import PlainBasis
from ptqbench.methods.transform import Transform
from ptqbench.numerics.formats import FORMATS, INTEGER

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis, Tensors
    from ptqbench.models.quantized import BlockPlan

SMALLEST, USUAL = 4, 128


@dataclasses.dataclass(frozen=True)
class BlockHadamard(Transform):
    """Transform blocks of ``block`` input channels by Hadamard matrices, online.

    Attributes:
        block: Channels of a block; ``auto`` takes the blocks of the format of the weights, and 128 for a format without.
    """

    block: Literal["auto", 16, 32, 64, 128] = "auto"

    def sizes(self, spec: RunSpec, architecture: Architecture) -> dict[str, int]:
        """Return the order of the Hadamard matrix by linear: the largest power of two up to ``block`` that divides its input."""
        wanted = self.block if self.block != "auto" else _block_of(spec.bitwidth.w_format)
        widths = {linear: shape[1] for linear, shape in architecture.linear_shapes().items()}
        return {linear: min(wanted, width & -width) for linear, width in widths.items()}

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip widths that leave hardly anything to transform, and what does not go with the formats."""
        for linear, size in self.sizes(spec, architecture).items():
            if size < SMALLEST:
                width = architecture.linear_shapes()[linear][1]
                return f"block_hadamard: the {width} inputs of {linear} have no block of {SMALLEST} or more channels"
        return self.precision(spec, architecture).skip_reason()

    def basis(
        self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None
    ) -> Basis | None:
        return BlockBasis(self.precision(spec, architecture, bases), self.sizes(spec, architecture))


@dataclasses.dataclass(frozen=True)
class BlockBasis(PlainBasis):
    """The checkpoint with the input channels of every linear transformed block by block.

    Attributes:
        sizes: Order of the Hadamard matrix by linear.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def block(self, tensors: Tensors, index: int) -> Tensors:
        """Return all tensors in float64, weights of linears as W R."""
        changed = {name: tensor.double() for name, tensor in tensors.items()}
        for linear, size in self.sizes.items():
            changed[f"{linear}.weight"] = by_blocks(changed[f"{linear}.weight"], size)
        return changed

    def plan(self, index: int) -> BlockPlan | None:
        # One object per size, so that linears with one input share its preparation.
        transforms = {size: partial(by_blocks, size=size) for size in set(self.sizes.values())}
        online = {linear: transforms[size] for linear, size in self.sizes.items()}
        return self.precision.at(index).block_plan(online)


def by_blocks(x: Tensor, size: int) -> Tensor:
    """Transform blocks of ``size`` entries of the last axis (..., n) by H / sqrt(size); float64 stays float64."""
    from ptqbench.numerics.hadamard import hadamard_transform

    return hadamard_transform(x.unflatten(-1, (-1, size))).flatten(-2)


def _block_of(name: str) -> int:
    return USUAL if name == INTEGER else FORMATS[name].block or USUAL
