"""The block loop: stream calibration tokens through a model once and round every linear on the way.

Per decoder block: load it, run it in stages (``models.stages``), and at each stage form the second moment of the input that
has just become complete, round the linears it feeds, and continue with the rounded weights. Every linear is executed exactly
once with true-sequential semantics; without ``true_sequential`` the untouched block is run once for statistics and once more
to propagate. A finished block is stored before the next begins: the unit of resume is one block.

Residual streams are kept on the CPU between blocks; this module alone moves tensors between devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.errors import NumericalError
from ptqbench.methods.base import Refine, Solver, Statistics, Target
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.stages import STAGES, Positions, Stage, finish, forward, staged
from ptqbench.numerics.grid import Grid, GridSpec, LinearResult, effective_bits, uniform_grid
from ptqbench.numerics.report import relative_output_error, relative_weight_error
from ptqbench.numerics.second_moment import MomentSum
from ptqbench.state import BlockState, stored_weight

BATCH = 1
"""Windows per forward. One, so that sums are formed in the same order whatever the machine."""

Results = dict[str, LinearResult]
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """The members of the four roles that act on a block, and the grid they round to."""

    target: Target
    solver: Solver
    refine: Refine
    grid: GridSpec
    true_sequential: bool


@dataclasses.dataclass
class Timings:
    """Seconds per kind of work, summed over blocks."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the enclosed work to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] += time.perf_counter() - start


@torch.no_grad()
def quantize(
    model: BlockwiseModel,
    method: Method,
    windows: Tensor,
    state: BlockState,
    timings: Timings,
    on_block: Callable[[int], None] = lambda index: None,
) -> None:
    """Round every linear of every block; results and reports go to ``state``.

    Args:
        model: The checkpoint.
        method: What to do with each group of linears.
        windows: Calibration tokens, (n_samples, seq_len) int64, not modified.
        state: Where finished blocks are stored; blocks found there are not computed again but replayed.
        timings: Receives seconds per kind of work.
        on_block: Called with the index of every finished block.

    Raises:
        NumericalError: A weight or statistic is not finite, or a factorisation failed; names the block and the linears.
    """
    with timings.measure("embed_s"):
        hidden = [model.embed(batch) for batch in windows.split(BATCH)]
        positions = model.positions(windows.shape[1])
    for index in range(model.n_blocks):
        finished = state.has(index)
        with model.block(index, state.overlay if finished else None) as block:
            if finished:
                hidden = _propagate(block, hidden, positions, model.device, timings)
            else:
                hidden, results, rows = _round_block(block, index, method, hidden, positions, model.device, timings)
                with timings.measure("save_s"):
                    state.save(index, results, rows)
        on_block(index)


def _propagate(block: nn.Module, hidden: list[Tensor], positions: Positions, device: torch.device, timings: Timings) -> list[Tensor]:
    with timings.measure("forward_s"):
        return [forward(block, states.to(device), positions).cpu() for states in hidden]


def _round_block(
    block: nn.Module,
    index: int,
    method: Method,
    hidden: list[Tensor],
    positions: Positions,
    device: torch.device,
    timings: Timings,
) -> tuple[list[Tensor], Results, Rows]:
    """Round one block; returns the residual stream behind it, the rounded linears and one report row per linear."""
    results: Results = {}
    rows: Rows = []
    runs = [staged(block, states.to(device), positions) for states in hidden]
    if method.true_sequential:
        for stage in STAGES:
            statistics = _collect(runs, timings)
            _round_stage(block, index, stage, method, statistics, timings, results, rows)
        with timings.measure("forward_s"):
            return [finish(run).cpu() for run in runs], results, rows
    moments = _collect_untouched(runs, timings)
    for stage, statistics in zip(STAGES, moments, strict=True):
        _round_stage(block, index, stage, method, statistics, timings, results, rows)
    return _propagate(block, hidden, positions, device, timings), results, rows


def _collect(runs: list[Any], timings: Timings) -> Statistics:
    """Advance every window to its next stage and sum the second moment of the inputs found there."""
    moment: MomentSum | None = None
    for run in runs:
        with timings.measure("forward_s"):
            inputs = next(run)
        with timings.measure("moment_s"):
            moment = moment or MomentSum(inputs.shape[-1])
            moment.add(inputs)
    assert moment is not None, "a cell has at least one calibration window"
    return Statistics(moment.mean(), moment.n_tokens)


def _collect_untouched(runs: list[Any], timings: Timings) -> list[Statistics]:
    """Sum the second moments of all stages in one pass, window by window."""
    moments: list[MomentSum | None] = [None] * len(STAGES)
    for run in runs:
        for i in range(len(STAGES)):
            with timings.measure("forward_s"):
                inputs = next(run)
            with timings.measure("moment_s"):
                moment = moments[i] or MomentSum(inputs.shape[-1])
                moment.add(inputs)
                moments[i] = moment
        run.close()
    return [Statistics(m.mean(), m.n_tokens) for m in moments if m is not None]


def _round_stage(
    block: nn.Module,
    index: int,
    stage: Stage,
    method: Method,
    statistics: Statistics,
    timings: Timings,
    results: Results,
    rows: Rows,
) -> None:
    """Round the linears of one stage together (their rows share the input), put the result into the block, report."""
    weights = {name: block.get_submodule(name).weight.detach() for name in stage.linears}  # type: ignore[union-attr]
    stacked = torch.cat([weight.float() for weight in weights.values()])
    grid = uniform_grid(stacked.shape[1], method.grid)
    start = time.perf_counter()
    try:
        with timings.measure("round_s"):
            target, second_moment = method.target.aim(stacked, statistics)
            result = method.solver.solve(target, second_moment, statistics, grid)
            result = method.refine.repair(stacked, result, statistics)
    except NumericalError as error:
        raise NumericalError(f"block {index}, {'/'.join(name.split('.')[-1] for name in stage.linears)}: {error}") from error
    seconds = time.perf_counter() - start
    row = 0
    for name, weight in weights.items():
        part = _rows_of(result, row, row + weight.shape[0])
        linear = block.get_submodule(name)
        if part.codes is not None:
            stored = stored_weight(part.codes, part.scale, part.zero_point, part.group_index)
            linear.weight = nn.Parameter(stored.to(weight.dtype), requires_grad=False)
        aim = target[row : row + weight.shape[0]]
        rows.append(_report(index, name, weight, aim, part, statistics, grid) | {"quantize_s": seconds * len(weight) / len(stacked)})
        results[name] = part
        row += weight.shape[0]


def _rows_of(result: LinearResult, start: int, stop: int) -> LinearResult:
    return dataclasses.replace(
        result,
        codes=None if result.codes is None else result.codes[start:stop],
        scale=result.scale[start:stop],
        zero_point=result.zero_point[start:stop],
        dequantized=result.dequantized[start:stop],
    )


def _report(
    index: int, name: str, weight: Tensor, target: Tensor, result: LinearResult, statistics: Statistics, grid: Grid
) -> dict[str, Any]:
    """Describe one rounded linear: one row of ``layers.parquet``."""
    weight = weight.float()
    return {
        "block": index,
        "linear": name,
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "relative_weight_error": relative_weight_error(weight, result.dequantized),
        "relative_output_error": relative_output_error(weight, result.dequantized, statistics.second_moment),
        "correction_norm": float((target - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny)),
        "effective_w_bits": effective_bits(grid),
        "damping_used": result.damping_used,
        "damping_retries": result.damping_retries,
        "n_tokens": statistics.n_tokens,
    }
