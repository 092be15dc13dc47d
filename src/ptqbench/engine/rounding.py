"""Round the linears of one stage with the members of a method, put the result into the block, and describe it.

Linears that are treated alike are stacked along their rows: they share their input, so they share all statistics and the
factorisation.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.errors import NumericalError, UnsupportedError
from ptqbench.methods.base import REFERENCE, Aim, Refine, Repaired, Solver, Statistic, Statistics, Target
from ptqbench.methods.refinements import NoRefinement
from ptqbench.methods.solvers import RoundToNearest
from ptqbench.methods.targets import Weight
from ptqbench.models.stages import STAGES, Stage
from ptqbench.numerics.grid import Grid, LinearResult, uniform_grid
from ptqbench.numerics.grid_spec import UNTOUCHED_BITS, GridSpec
from ptqbench.numerics.groups import split_rows
from ptqbench.numerics.report import relative_output_error, relative_weight_error
from ptqbench.numerics.targets import relative_correction

GridOf = Callable[[str, int], Grid]
"""Grid of a stage, by its name and its number of input channels."""


@dataclasses.dataclass(frozen=True)
class Method:
    """The members of the roles that act on a block, and what they round to.

    Attributes:
        target: Which weight rounding aims at.
        solver: How it is rounded.
        refine: What is repaired afterwards.
        grid: One grid for all columns, or a function of stage name and in_features for mixed precision.
        true_sequential: Whether a stage sees the stages before it rounded.
        during_calibration: Whether activation, key and value quantizers are on in the quantized stream of calibration.
        plain_moments: Whether statistics are those of the inputs before their quantizer nevertheless.
    """

    target: Target
    solver: Solver
    refine: Refine
    grid: GridSpec | GridOf
    true_sequential: bool
    during_calibration: bool = True
    plain_moments: bool = False

    def grid_of(self, stage: str, in_features: int) -> Grid:
        """Return the grid of the linears of a stage."""
        return (
            uniform_grid(in_features, self.grid) if isinstance(self.grid, GridSpec) else self.grid(stage, in_features)
        )

    def needs(self, stage: Stage) -> frozenset[Statistic]:
        """Return what to collect at a stage: the union over the members that act there, and what layer records need."""
        scoped = (member for member in (self.target, self.refine) if not set(stage.linears) <= set(member.exclude))
        return frozenset({Statistic.SECOND_MOMENT}).union(self.solver.needs, *(member.needs for member in scoped))

    @property
    def needs_reference(self) -> bool:
        """Whether the full-precision stream must be run at all."""
        return any(self.needs(stage) & REFERENCE for stage in STAGES)

    def groups(self, stage: Stage, in_features: int) -> list[tuple[str, ...]]:
        """Split the linears of a stage into groups that are treated alike; a scale per tensor is that of one linear."""
        by_itself = any(part.spec.format == "fp8" for part in self.grid_of(stage.name, in_features))
        groups: dict[tuple[bool, bool, str], list[str]] = {}
        for name in stage.linears:
            own = name if self.solver.one_by_one or by_itself else ""
            groups.setdefault((name in self.target.exclude, name in self.refine.exclude, own), []).append(name)
        return [tuple(names) for names in groups.values()]


@dataclasses.dataclass(frozen=True)
class Rounded:
    """One rounded linear.

    Attributes:
        name: Its name in the block.
        weight: (out, in) float32 original weight.
        aim: What the solver was asked for.
        repaired: The solver's result after refinement.
        degenerate: What is missing (inputs that are always zero, a weight that is zero) and what was done; None if nothing is.
        quantize_s: Seconds spent on it.
    """

    name: str
    weight: Tensor
    aim: Aim
    repaired: Repaired
    degenerate: str | None
    quantize_s: float


def round_stage(block: nn.Module, stage: Stage, method: Method, statistics: Statistics) -> list[Rounded]:
    """Round the linears of a stage and put the rounded weights into the block.

    Args:
        block: The block; its linears get new weights, the old ones are not modified.
        stage: The stage.
        method: Target, solver, refinement and grid.
        statistics: Statistics of the stage, not modified.

    Returns:
        One entry per linear, in the order of the stage.

    Raises:
        NumericalError: A weight or statistic is not finite, or a factorisation failed; names the linears.
        UnsupportedError: A grid that leaves some columns of a linear unrounded.
    """
    rounded: dict[str, Rounded] = {}
    # Every group is rounded from the original weights; the block is changed only after that.
    for names in method.groups(stage, len(statistics.second_moment)):
        try:
            for linear in _round_group(block, names, stage, method, dataclasses.replace(statistics, linears=names)):
                rounded[linear.name] = linear
        except NumericalError as error:
            raise NumericalError(f"{'/'.join(name.split('.')[-1] for name in names)}: {error}") from error
    for linear in rounded.values():
        _put(block.get_submodule(linear.name), linear.repaired.result)
    return [rounded[name] for name in stage.linears]


def _round_group(
    block: nn.Module, names: tuple[str, ...], stage: Stage, method: Method, statistics: Statistics
) -> list[Rounded]:
    start = time.perf_counter()
    # Stack the rows of the group: all of them meet the same inputs.
    weights: list[Tensor] = [block.get_submodule(name).weight.detach().float() for name in names]  # type: ignore[operator]
    stacked = torch.cat(weights)
    grid = method.grid_of(stage.name, stacked.shape[1])
    untouched = [part.spec.untouched for part in grid]
    if any(untouched) and not all(untouched):
        raise UnsupportedError(
            f"stage {stage.name}: expected a grid that rounds all columns or none, got a mixture with 16 bits"
        )
    # A channel that is zero for every token has H_jj = 0.
    dead = statistics.second_moment.diagonal() == 0
    if all(untouched) or bool(dead.all()):
        # At 16 bits the solver returns the weight. Without any input every rounding has the same error, and no moment can be
        # factored: round to nearest.
        aim = Weight().aim(stacked, statistics)
        solver = method.solver if all(untouched) else RoundToNearest()
        repaired = Repaired(solver.solve(aim, statistics, grid))
    else:
        # Aim at V, round it to Q on the grid, then repair Q; an excluded linear keeps W as its target, or Q as it is.
        target = Weight() if names[0] in method.target.exclude else method.target
        refine = NoRefinement() if names[0] in method.refine.exclude else method.refine
        aim = target.aim(stacked, statistics)
        result = method.solver.solve(aim, statistics, grid, refine.reads_working)
        repaired = refine.repair(stacked, aim, result, statistics)
        repaired = dataclasses.replace(repaired, result=dataclasses.replace(repaired.result, working=None))
    # Cut the stacked result into its linears; time is shared out by rows.
    rows = [len(weight) for weight in weights]
    per_row = (time.perf_counter() - start) / len(stacked)
    parts = zip(names, weights, _split_aim(aim, rows), _split_repaired(repaired, rows), strict=True)
    shared = None if all(untouched) else _zero_inputs(dead, repaired.result)
    return [Rounded(*part, degenerate=_remarks(shared, part[1]), quantize_s=per_row * len(part[1])) for part in parts]


def _remarks(shared: str | None, weight: Tensor) -> str | None:
    """Join what is said about the inputs of a group with what is said about the weight of one of its linears."""
    return "; ".join(filter(None, [shared, None if bool(weight.any()) else "the weight is zero"])) or None


def _zero_inputs(dead: Tensor, result: LinearResult) -> str | None:
    """Describe the inputs that are always zero, ``dead`` (in,) bool, and how their columns were rounded."""
    n_dead = int(dead.sum())
    if n_dead == 0:
        return None
    if n_dead == len(dead):
        return "no input: rounded to nearest"
    kept = bool(result.dequantized[:, dead].any())
    return f"{n_dead} of {len(dead)} inputs are zero: their columns are {'rounded to nearest' if kept else 'zero'}"


def _split_aim(aim: Aim, rows: list[int]) -> list[Aim]:
    return [dataclasses.replace(aim, weight=part, grid_weight=None) for part in aim.weight.split(rows)]


def _split_repaired(repaired: Repaired, rows: list[int]) -> list[Repaired]:
    results = split_rows(repaired.result, rows)
    scales = [None] * len(rows) if repaired.row_scale is None else repaired.row_scale.split(rows)
    return [Repaired(part, scale, repaired.null_space_rank) for part, scale in zip(results, scales, strict=True)]


def _put(linear: Any, result: LinearResult) -> None:
    """Give a linear the weight that its stored codes rebuild; at 16 bits it keeps its own."""
    if result.stored is not None:
        linear.weight = nn.Parameter(result.stored.weight().to(linear.weight.dtype), requires_grad=False)


def layer_record(index: int, linear: Rounded, statistics: Statistics) -> dict[str, Any]:
    """Describe one rounded linear: one row of ``layers.parquet``; every row has the same keys.

    ``relative_output_error`` compares with the original weight under the unweighted inputs of the quantized stream;
    ``relative_target_error`` with the target under the moment that rounding minimised. A figure is None where it would be
    relative to zero: a target has moved a weight that is zero, or whose output is.
    """
    weight, aim, result, row_scale = linear.weight, linear.aim, linear.repaired.result, linear.repaired.row_scale
    output_error = relative_output_error(weight, result.dequantized, statistics.second_moment)
    plain = aim.second_moment is statistics.second_moment and torch.equal(aim.weight, weight)
    return {
        "block": index,
        "linear": linear.name,
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "relative_weight_error": _finite(relative_weight_error(weight, result.dequantized)),
        "relative_output_error": _finite(output_error),
        "relative_target_error": _finite(
            output_error if plain else relative_output_error(aim.weight, result.dequantized, aim.second_moment)
        ),
        "correction_norm": _finite(relative_correction(aim.weight, weight)),
        "correction_damping": aim.damping,
        "effective_w_bits": float(UNTOUCHED_BITS) if result.stored is None else result.stored.bits(),
        "damping_used": result.damping_used,
        "damping_retries": result.damping_retries,
        "degenerate": linear.degenerate,
        "null_space_rank": linear.repaired.null_space_rank,
        "row_scale_min": None if row_scale is None else float(row_scale.min()),
        "row_scale_max": None if row_scale is None else float(row_scale.max()),
        "n_tokens": statistics.n_tokens,
        "quantize_s": linear.quantize_s,
    }


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
