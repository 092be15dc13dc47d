"""Targets: the weight that rounding aims at.

Composition with solvers that correct drift themselves (gptaq, qronos): an output-aware target of strength alpha has corrected
that share of the drift, so the solver is given the remaining (1 - alpha) C. At alpha = 1 gptaq then equals gptq.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ptqbench.methods.base import Aim, LinearName, Statistic, Statistics, Target

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec
    from ptqbench.models.architecture import Architecture

Strength = Annotated[float, Field(ge=0, le=1)]
Damping = Annotated[float, Field(ge=0, le=10)]  # more leaves nothing of the moment: rounding to nearest


@dataclasses.dataclass(frozen=True)
class Weight(Target):
    """Aim at the weight itself, under the second moment of the quantized stream."""

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        return None

    def aim(self, weight: Tensor, statistics: Statistics) -> Aim:
        """Return ``weight`` (out, in), the second moment (in, in) and the whole drift, all as they are."""
        return Aim(weight, statistics.second_moment, statistics.cross_moment)


@dataclasses.dataclass(frozen=True)
class Loaq(Target):
    """Aim at the weight with which the quantized stream reproduces the full-precision output (LoaQ, arXiv 2509.06297).

    q, k, v, gate and up reproduce their own output; o and down, as far as ``level`` says, the residual stream behind them.
    With both strengths at 0 the target is exactly ``weight`` and no token is weighted: the cell is plain GPTQ.

    Attributes:
        level: ``linear`` (own output everywhere), ``sublayer`` (o, down: residual stream), ``rms`` (o, down: RMSNorm of it).
        rms_scale: Reading of ``rms``: ``split`` (each stream's own scale), ``common`` (the full-precision one), ``none``.
        alpha: Share of the input drift that is corrected.
        beta: Share of the residual drift that is corrected (o, down).
        damping: Damping of the correction, a fraction of the mean diagonal; the solver has its own.
        grid_from: Fit the grids on the ``target`` or on the original ``weight``.
        dead_channels: Drift of channels without input in the quantized stream: ``zero`` ignores row and column of the cross
            moment, ``keep_column`` lets live channels make up for what the dead one contributed in full precision.
        exclude: Linears that are not corrected: the scope of the strengths.
    """

    level: Literal["linear", "sublayer", "rms"] = "rms"
    rms_scale: Literal["none", "common", "split"] = "split"
    alpha: Strength = 1.0
    beta: Strength = 1.0
    damping: Damping = 0.01
    grid_from: Literal["target", "weight"] = "target"
    dead_channels: Literal["zero", "keep_column"] = "zero"
    exclude: tuple[LinearName, ...] = ()

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip families in which o and down do not write the residual stream directly, unless all aim at their own output."""
        norm = architecture.family.writes_through_norm
        if norm is not None and self.needs - {Statistic.CROSS_MOMENT}:
            return (
                f"level={self.level} aims at the residual stream behind o and down, but {architecture.model_type} passes their "
                f"outputs through a norm ({norm}) first; set method.target.level=linear"
            )
        return super().skip_reason(spec, architecture)

    @property
    def needs(self) -> frozenset[Statistic]:
        """Drift where it is corrected, token weights where the norm counts; nothing at zero strength."""
        found = set()
        if self.alpha > 0:
            found.add(Statistic.CROSS_MOMENT)
        if self.beta > 0 and self.level != "linear":
            found.add(Statistic.RESIDUAL_MOMENT)
        if found and self.level == "rms" and self.rms_scale != "none":
            found.add(Statistic.TOKEN_WEIGHTS)
        return frozenset(found)

    def aim(self, weight: Tensor, statistics: Statistics) -> Aim:
        """Return the corrected weight (out, in) and the second moment it was corrected under, token weights included."""
        from ptqbench.numerics.targets import corrected_target

        if not self.needs:
            return Weight().aim(weight, statistics)
        # V = W + (alpha W C^T + beta G^T) (H + lambda I)^-1
        moment = statistics.second_moment if statistics.weighted_moment is None else statistics.weighted_moment
        target = corrected_target(
            weight,
            moment,
            statistics.cross_moment,
            statistics.residual_moment,
            alpha=self.alpha,
            beta=self.beta,
            damping=self.damping,
            dead_channels=self.dead_channels,
        )
        grid_weight = weight if self.grid_from == "weight" else None
        return Aim(target, moment, _remaining(statistics, self.alpha), grid_weight, self.damping)


@dataclasses.dataclass(frozen=True)
class Qep(Target):
    """Aim at the weight that compensates a share of the input drift (QEP, arXiv 2504.09629).

    Attributes:
        alpha: Share of the drift that is corrected.
        damping: Damping of the correction, a fraction of the mean diagonal; 1.0 in the authors' code.
        exclude: Linears that are not corrected; the authors' code leaves out down_proj.
    """

    alpha: Strength = 0.5
    damping: Damping = 1.0
    exclude: tuple[LinearName, ...] = ("mlp.down_proj",)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.CROSS_MOMENT} if self.alpha > 0 else ())

    def aim(self, weight: Tensor, statistics: Statistics) -> Aim:
        """Return the corrected weight (out, in) and the second moment (in, in) as it is."""
        from ptqbench.numerics.targets import corrected_target

        if not self.needs:
            return Weight().aim(weight, statistics)
        # V = W + alpha W C^T (H + lambda I)^-1
        moment, cross = statistics.second_moment, statistics.cross_moment
        target = corrected_target(weight, moment, cross, alpha=self.alpha, beta=0.0, damping=self.damping)
        return Aim(target, moment, _remaining(statistics, self.alpha), damping=self.damping)


def _remaining(statistics: Statistics, alpha: float) -> Tensor | None:
    """Return the drift (1 - alpha) C that a correction leaves, or None if it leaves none."""
    cross = statistics.cross_moment
    return None if cross is None or alpha == 1 else (1 - alpha) * cross
