"""The statistics of a stage, collected over both streams in lock-step.

The quantized stream runs through the block being rounded; the full-precision stream, where some member needs it, runs
through an untouched copy of that block with all quantizers off. Window by window both are advanced to the same stage, so
that their tokens are aligned, and the sums of that stage are updated. Inputs are taken as the weight sees them: after online
transforms, activation quantizers and reordering of channels (``prepare``).

Sums are float32 (``numerics.second_moment``, ``numerics.targets``). The unweighted second moment is always formed the same
way, so that members which agree on it agree bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.errors import CalibrationError
from ptqbench.methods.base import REFERENCE, Statistic, Statistics
from ptqbench.models.quantized import QuantizedLinear, set_quantizers
from ptqbench.models.stages import Positions, Run, Stage, StageInput, prepared, staged
from ptqbench.numerics.null_space import PositionMean
from ptqbench.numerics.second_moment import MomentSum
from ptqbench.numerics.targets import RmsScale, TargetMoments, TokenWeights, token_weights


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to collect at a stage.

    Attributes:
        statistics: The union of what the members of the method need there.
        rms_scale: Which token weights, where ``TOKEN_WEIGHTS`` is among them.
        norm_eps: Epsilon of the norm behind the stage, in squared units of the residual stream.
        plain: Whether inputs of the quantized stream are taken before their quantizer.
    """

    statistics: frozenset[Statistic]
    rms_scale: RmsScale = "none"
    norm_eps: float = 0.0
    plain: bool = False

    def at(self, stage: Stage) -> Wanted:
        """Drop the statistics that exist only at stages whose output is added to the residual stream."""
        if stage.adds:
            return self
        adding = {Statistic.RESIDUAL_MOMENT, Statistic.TOKEN_WEIGHTS}
        return dataclasses.replace(self, statistics=self.statistics - adding)


def untouched_copy(block: nn.Module) -> nn.Module:
    """Copy a block for the full-precision stream: quantizers off, tensors shared.

    Sharing is safe because rounding replaces the weights of a block and never writes into them.
    """
    # deepcopy takes what the memo holds as its own copy: parameters, buffers and the configuration.
    configs = (module.config for module in block.modules() if hasattr(module, "config"))
    shared: tuple[Any, ...] = (*block.parameters(), *block.buffers(), *configs)
    reference = copy.deepcopy(block, {id(value): value for value in shared})
    set_quantizers(reference, False)
    return reference


class Lockstep:
    """One window under way in both streams.

    Attributes:
        quantized: Its run through the block being rounded.
        reference: Its run through the untouched copy, or None; always advanced to the same stage.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        reference_block: nn.Module | None,
        reference_hidden: Tensor | None,
        positions: Positions,
        park: torch.device | None = None,
    ) -> None:
        """Enter a block.

        Args:
            block: The block being rounded.
            hidden: Quantized stream entering it, (batch, tokens, hidden_size), not modified.
            reference_block: The untouched copy; None for no full-precision stream.
            reference_hidden: Full-precision stream entering it, shaped alike, not modified.
            positions: RoPE tables and mask.
            park: Where the window waits between stages; None for where it is.
        """
        self._parks = park is not None
        self.quantized: Run = staged(block, hidden, positions, park)
        self.reference: Run | None = None
        if reference_block is not None and reference_hidden is not None:
            self.reference = staged(reference_block, reference_hidden, positions, park)

    def park(self) -> None:
        """Move the window to where it waits; call this after its stage input has been read."""
        if self._parks:
            next(self.quantized)
            if self.reference is not None:
                next(self.reference)


class Collector:
    """Running sums of one stage."""

    def __init__(self, stage: Stage, wanted: Wanted, block: nn.Module, reference_block: nn.Module | None) -> None:
        """Start with empty sums.

        Args:
            stage: The stage.
            wanted: What to collect, of all stages; what this one cannot have is left out.
            block: The block being rounded, whose linears of this stage are still unrounded.
            reference_block: The untouched copy; required for statistics that compare the streams.
        """
        self.stage, self.wanted = stage, wanted.at(stage)
        self._linear: Any = block.get_submodule(stage.linears[0])
        self._reference_linear: Any = None
        if reference_block is not None:
            self._reference_linear = reference_block.get_submodule(stage.linears[0])
        elif self.wanted.statistics & REFERENCE:
            raise CalibrationError(f"stage {stage.name}: expected a full-precision stream to compare with, got none")
        width = block.get_parameter(f"{stage.linears[0]}.weight").shape[1]
        self._second = MomentSum(width)
        self._cross = MomentSum(width)
        self._compared: TargetMoments | None = None
        self._position: PositionMean | None = None

    def add(self, quantized: StageInput, reference: StageInput | None) -> None:
        """Add one batch of whole windows. Both streams hold the same tokens in the same order; neither is modified."""
        # X_q as the weight sees it: H += X_q^T X_q.
        inputs_q = self._prepared(quantized.inputs)
        self._second.add(inputs_q)
        # Mean over windows of X_q at every position.
        if Statistic.POSITION_MEAN in self.wanted.statistics:
            if self._position is None:
                _, seq_len, width = inputs_q.shape
                self._position = PositionMean(seq_len, width, device=inputs_q.device)
            self._position.add(inputs_q)
        if reference is None or not self.wanted.statistics & REFERENCE:
            return
        # X of the full-precision stream: C += X_q^T (X - X_q), alone or with token weights and residuals.
        inputs = prepared(self._reference_linear, reference.inputs)
        if self.wanted.statistics & REFERENCE == {Statistic.CROSS_MOMENT}:
            self._cross.add_cross(inputs_q, inputs)
        else:
            self._compare(inputs_q, inputs, quantized.residual, reference.residual)

    def _prepared(self, inputs: Tensor) -> Tensor:
        """The inputs as the weight sees them, perhaps without their quantizer."""
        if not (self.wanted.plain and isinstance(self._linear, QuantizedLinear)):
            return prepared(self._linear, inputs)
        enabled, self._linear.enabled = self._linear.enabled, False
        try:
            return prepared(self._linear, inputs)
        finally:
            self._linear.enabled = enabled

    def _compare(self, inputs_q: Tensor, inputs: Tensor, residual_q: Tensor | None, residual: Tensor | None) -> None:
        """Add to the moments of a stage whose output is added to the residual stream."""
        assert residual_q is not None, "the stage adds to the residual stream"
        assert residual is not None, "both streams are at the same stage"
        wanted = self.wanted.statistics
        weights: TokenWeights | None = None
        # d = 1 / rms(R + X W^T + b) per token: the scale of the RMSNorm behind the addition.
        if Statistic.TOKEN_WEIGHTS in wanted:
            if self._linear.bias is not None:  # the bias cancels only where both streams have equal token weights
                residual_q, residual = residual_q + self._linear.bias, residual + self._reference_linear.bias
            hidden_q = residual_q + nn.functional.linear(inputs_q, self._linear.weight)
            hidden = residual + nn.functional.linear(inputs, self._reference_linear.weight)
            weights = token_weights(self.wanted.rms_scale, hidden, hidden_q, eps=self.wanted.norm_eps)
        with_residual = Statistic.RESIDUAL_MOMENT in wanted
        if self._compared is None:
            self._compared = TargetMoments(
                inputs_q.shape[-1],
                residual_q.shape[-1] if with_residual else None,
                cross=Statistic.CROSS_MOMENT in wanted,
                device=inputs_q.device,
            )
        # H, C and G of numerics.targets, with the rows of both streams scaled by d.
        given = {"residual": residual, "residual_q": residual_q} if with_residual else {}
        self._compared.add(inputs, inputs_q, weights=weights, **given)

    def statistics(self) -> Statistics:
        """Return the means over all tokens added.

        Raises:
            CalibrationError: Nothing was added.
            NumericalError: A sum holds NaN or infinity.
        """
        # The unweighted moment is there at every stage; the others as far as they were collected.
        weighted = cross = residual = None
        if self._compared is not None:
            weighted, cross, residual = self._compared.means()
            weighted = weighted if Statistic.TOKEN_WEIGHTS in self.wanted.statistics else None
        elif self._cross.n_tokens:
            cross = self._cross.mean()
        return Statistics(
            second_moment=self._second.mean(),
            n_tokens=self._second.n_tokens,
            weighted_moment=weighted,
            cross_moment=cross,
            residual_moment=residual,
            position_moment=None if self._position is None else self._position.second_moment(),
            linears=self.stage.linears,
        )
