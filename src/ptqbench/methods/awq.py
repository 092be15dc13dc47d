"""AWQ: scales of input channels and clip thresholds, both found by search on the unquantized model.

All searches of a block see its original weights and inputs: an exponent for every scaled input, then a clip threshold for every row
and group of the scaled weights. The loss of an exponent is that of plain rounding on the grid of the cell: of the outputs of the
attention or the MLP behind q, k, v or gate, up, and of the linear itself for o and down, whose second moment is enough for that.

Source: arXiv 2306.00978, code mit-han-lab/llm-awq@d6e797a. Deviations: statistics are float64 (code: float16); the code clamps the
zero point of its grid to the codes, which differs from ``asym`` only where all weights of a group have one sign.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods.precision import STAGE_LINEARS
from ptqbench.methods.transform import Calibrated
from ptqbench.models.architecture import ATTENTION_INPUT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptqbench.cell.spec import RunSpec
    from ptqbench.methods.precision import Precision
    from ptqbench.models.architecture import Architecture
    from ptqbench.models.fuse import Basis
    from ptqbench.models.walk import BlockView

UNCLIPPED = ATTENTION_INPUT[:2]
"""q and k: their outputs are multiplied with each other."""
CLIP_TOKENS = 512
"""Tokens behind the errors of clipping, and up to twice as many."""
OF_MODULES = ("qkv", "gate_up")
"""Stages whose losses are those of the module behind them."""


@dataclasses.dataclass(frozen=True)
class Awq(Calibrated):
    """Scale the channels that matter up before rounding, and clip weights, as a search over output errors says.

    Attributes:
        scale: Whether scales are searched.
        n_grid: Exponents tried: 0, 1/n_grid, ..
        module_loss: Compare the outputs of attention and MLP for q, k, v and for gate, up (code); else those of the linears.
        o: Whether the input of o is scaled where query heads share values: not at all (code), or with one scale per value channel.
        clip: Whether clip thresholds are searched.
        clip_steps: Clip candidates are 1/clip_steps apart.
        max_shrink: Share of the range that clipping takes away, not reached itself.
        clip_tokens: Tokens behind the errors of clipping: every (T // 512)-th (code), or all.
        n_samples: Calibration windows of the search.
    """

    scale: bool = True
    n_grid: Annotated[int, Field(ge=1)] = 20
    module_loss: bool = True
    o: Literal["mha_only", "per_kv_head"] = "mha_only"
    clip: bool = True
    clip_steps: Annotated[int, Field(ge=1)] = 20
    max_shrink: Annotated[float, Field(gt=0, le=1)] = 0.5
    clip_tokens: Literal["strided", "all"] = "strided"
    n_samples: Annotated[int, Field(ge=1)] = 128

    pass_streams: ClassVar[int] = 5  # two inputs, and the output that a module is compared with, beside the stream

    def __post_init__(self) -> None:
        """Refuse a search for nothing."""
        if not self.scale and not self.clip:
            raise ConfigError("method.transform: scale=false and clip=false leave awq nothing to do; say none")

    def skip_reason(self, spec: RunSpec, architecture: Architecture) -> str | None:
        """Skip cells that round no weight."""
        bits = spec.bitwidth
        if bits.w_bits >= UNTOUCHED_BITS:
            return f"awq searches for least errors of rounded weights, bitwidth {bits.name} leaves them at {UNTOUCHED_BITS} bits"
        return self.precision(spec, architecture).skip_reason()

    def depends_on(self, spec: RunSpec) -> dict[str, Any]:
        """The options, and the grid that the search rounds to."""
        beside = ("name", "a_bits", "k_bits", "v_bits")
        bits = {name: value for name, value in dataclasses.asdict(spec.bitwidth).items() if name not in beside}
        return {**super().depends_on(spec), "bits": bits, "grid": dataclasses.asdict(spec.method.grid)}

    def scaled(self, architecture: Architecture) -> tuple[str, ...]:
        """The stages whose inputs are scaled: of those that have a norm or a linear to take the scale back."""
        from ptqbench.models.family import producers

        shared = architecture.n_heads != architecture.n_kv_heads
        skipped = ("o",) if shared and self.o == "mha_only" else ()
        kept = producers(architecture.family)
        return tuple(stage for stage in STAGE_LINEARS if self.scale and stage in kept and stage not in skipped)

    def clipped(self) -> tuple[str, ...]:
        """The linears that are clipped."""
        linears = [linear for group in STAGE_LINEARS.values() for linear in group]
        return tuple(linear for linear in linears if self.clip and linear not in UNCLIPPED)

    def solve_block(self, view: BlockView, spec: RunSpec) -> dict[str, Tensor]:
        """Search the scales of a block, then the clip thresholds of the scaled weights.

        Returns:
            ``STAGE`` scales, float64, and the exponent ``STAGE_ratio`` () for every scaled stage; ``clip_LINEAR`` (rows, groups)
            for every clipped linear.
        """
        precision = self.precision(spec, view.architecture)
        search = _Search(self, view, precision, _Seen.of(self, view, precision))
        return search.scales() | search.thresholds()

    def basis(self, spec: RunSpec, architecture: Architecture, bases: Mapping[str, Tensor] | None = None) -> Basis:
        """Apply scales, then clip.

        Raises:
            ConfigError: There are no scales.
        """
        from ptqbench.methods.basis import ScaledBasis

        if bases is None:
            raise ConfigError("transform 'awq' needs its scales: compute them first (ptqbench.engine.bases)")
        precision = self.precision(spec, architecture, bases)
        return ScaledBasis(precision, bases, self.scaled(architecture), self.clipped())

    def pass_flop(self, architecture: Architecture, tokens: int, forward: float) -> float:
        """Count a pass, one more for every exponent, the moments of the inputs of o and down and the losses from them."""
        d, widths = architecture.hidden_size, (architecture.q_dim, architecture.intermediate_size)
        squares = float(sum(width**2 for width in widths))
        return forward * (1 + self.n_grid * self.scale) + architecture.n_blocks * squares * (
            tokens + 2.0 * d * self.n_grid
        )


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one pass over the windows leaves, by stage.

    Attributes:
        mean: u (n,), mean magnitude of every channel.
        moments: S (n, n), where losses come from it.
        inputs: The inputs themselves, window by window, where losses need them.
        clip: Sums of x_g x_g^T over the tokens behind clipping, (groups, g, g).
    """

    mean: dict[str, Tensor]
    moments: dict[str, Tensor]
    inputs: dict[str, list[Tensor]]
    clip: dict[str, Tensor]

    @classmethod
    def of(cls, awq: Awq, view: BlockView, precision: Precision) -> _Seen:
        import torch

        from ptqbench.models.capture import Magnitudes
        from ptqbench.numerics.awq import group_moments
        from ptqbench.numerics.second_moment import MomentSum

        scaled, sizes, at = awq.scaled(view.architecture), Magnitudes(), 0
        sums: dict[str, MomentSum] = {}
        inputs: dict[str, list[Tensor]] = defaultdict(list)
        clip: dict[str, Tensor] = {}
        place = view.resting_place(awq.pass_streams)
        stride = max(1, view.n_tokens // CLIP_TOKENS) if awq.clip_tokens == "strided" else 1
        for window in view.inputs():
            for stage, tokens in window.items():
                flat = tokens.flatten(0, -2)
                sizes.add(stage, flat)
                # Modules are run again on their inputs; a linear needs no more than their second moment.
                if stage in scaled and awq.module_loss and stage in OF_MODULES:
                    inputs[stage].append(tokens.to(place))
                elif stage in scaled:
                    sums.setdefault(stage, MomentSum(flat.shape[1], torch.float64)).add(flat)
                if awq.clip:
                    chosen = group_moments(flat[-at % stride :: stride], group_size(precision, stage))
                    clip[stage] = clip[stage] + chosen if stage in clip else chosen
            at += flat.shape[0]
        moments = {stage: total.mean() for stage, total in sums.items()}
        return cls(sizes.means(), moments, inputs, clip)


@dataclasses.dataclass(frozen=True)
class _Search:
    awq: Awq
    view: BlockView
    precision: Precision
    seen: _Seen

    @cached_property
    def chosen(self) -> dict[str, tuple[Tensor, float]]:
        """Scale and exponent of every scaled stage."""
        stages = self.awq.scaled(self.view.architecture)
        if not stages:
            return {}
        with self.view.block() as block:
            return {stage: self._best(stage, block) for stage in stages}

    def scales(self) -> dict[str, Tensor]:
        import torch

        found = {stage: scale for stage, (scale, _) in self.chosen.items()}
        ratios = {
            f"{stage}_ratio": torch.tensor(ratio, dtype=torch.float64) for stage, (_, ratio) in self.chosen.items()
        }
        return found | ratios

    def thresholds(self) -> dict[str, Tensor]:
        """Clip the weights as they are after all scales, under inputs divided by them."""
        from ptqbench.methods.basis import clip_name
        from ptqbench.models.fuse import scale_block
        from ptqbench.numerics.awq import clip_thresholds, grouped

        scales = {stage: scale for stage, (scale, _) in self.chosen.items()}
        scaled = scale_block(self.view.tensors, scales, self.view.architecture)
        stage_of = {linear: stage for stage, linears in STAGE_LINEARS.items() for linear in linears}
        found = {}
        for linear in self.awq.clipped():
            stage = stage_of[linear]
            moments = self.seen.clip[stage]
            if stage in scales:
                inverse = grouped(1 / self._columns(stage, scales[stage]), moments.shape[-1])
                moments = moments * inverse[:, :, None] * inverse[:, None, :]
            weight, options = scaled[f"{linear}.weight"].float(), (self.awq.clip_steps, self.awq.max_shrink)
            found[clip_name(linear)] = clip_thresholds(weight, moments, self._rounding(stage), *options)
        return found

    def _best(self, stage: str, block: nn.Module) -> tuple[Tensor, float]:
        """Try every exponent; the first least loss wins."""
        from ptqbench.models.fuse import by_value_head
        from ptqbench.numerics.smoothing import awq_scale

        originals = [weight.clone() for weight in _weights(block, stage)]
        round_ = self._rounding(stage)
        mean, loss_of = self.seen.mean[stage], self._loss(stage, block, originals)
        if stage == "o":
            mean = by_value_head(mean, self.view.architecture).mean(0)
        best: tuple[Tensor, float] | None = None
        least = float("inf")
        for i in range(self.awq.n_grid):
            # W_s = Q(W diag s) diag(1/s)
            scale = awq_scale(mean, i / self.awq.n_grid)
            columns = self._columns(stage, scale).to(originals[0].dtype)
            loss = loss_of([round_(weight * columns) / columns for weight in originals])
            if loss < least:
                best, least = (scale, i / self.awq.n_grid), loss
        if best is None:
            raise NumericalError(f"awq, input {stage}: expected a finite loss for some exponent, got none")
        return best

    def _loss(self, stage: str, block: nn.Module, originals: list[Tensor]) -> Callable[[list[Tensor]], float]:
        from ptqbench.models.stages import behind
        from ptqbench.numerics.awq import moment_loss

        if stage in self.seen.moments:
            moment = self.seen.moments[stage]
            return lambda rounded: sum(moment_loss(*pair, moment) for pair in zip(originals, rounded, strict=True))
        # The module's outputs with its own weights, and with those that are tried.
        weights, device, positions = _weights(block, stage), self.view.device, self.view.walk.positions

        def run(inputs: Tensor) -> Tensor:
            return behind(block, stage, inputs.to(device), positions)

        wanted = [run(inputs).to(inputs.device) for inputs in self.seen.inputs[stage]]

        def loss(rounded: list[Tensor]) -> float:
            for weight, value in zip(weights, rounded, strict=True):
                weight.copy_(value)
            errors = [
                (run(inputs) - output.to(device)).square().double().sum()
                for inputs, output in zip(self.seen.inputs[stage], wanted, strict=True)
            ]
            for weight, value in zip(weights, originals, strict=True):
                weight.copy_(value)
            return float(sum(errors))

        return loss

    def _columns(self, stage: str, scale: Tensor) -> Tensor:
        from ptqbench.models.fuse import to_query_heads

        return to_query_heads(scale, self.view.architecture) if stage == "o" else scale

    def _rounding(self, stage: str) -> Callable[[Tensor], Tensor]:
        from ptqbench.numerics.rtn import round_to_nearest

        grid = self.precision.weight_grid(stage)
        return lambda weight: round_to_nearest(weight, grid).dequantized


def _weights(block: nn.Module, stage: str) -> list[Tensor]:
    """The weights of a stage in a live block."""
    return [block.get_parameter(f"{linear}.weight") for linear in STAGE_LINEARS[stage]]


def group_size(precision: Precision, stage: str) -> int:
    """Channels in a group of the input of a stage; all of them where rows have one grid."""
    width = precision.architecture.linear_shapes()[STAGE_LINEARS[stage][0]][1]
    return min(precision.spec.bitwidth.group_size or width, width)
