"""The block loop: stream calibration tokens through a model once and round every linear on the way.

Per decoder block: load it, run it in stages (``models.stages``), and at each stage collect the statistics of the input that
has just become complete (``collect``), round the linears it feeds (``rounding``), and continue with the rounded weights.
Every linear is executed exactly once with true-sequential semantics; without ``true_sequential`` the untouched block is run
once for statistics and once more to propagate. A full-precision stream accompanies the quantized one, in lock-step through
an untouched copy of the block, only if the method compares the two. A finished block is stored before the next begins: the
unit of resume is one block.

A block is written in the background while the next one is computed, and read ahead while the one before is
(``models.blockwise``). Streams rest between blocks where ``BlockwiseModel.resting_place`` says; this module alone moves tensors
between devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptqbench.engine.blocks_on_disk import BlockState, stored_parts
from ptqbench.engine.collect import Collector, Lockstep, Wanted, untouched_copy
from ptqbench.engine.rounding import Method, layer_record, round_stage
from ptqbench.engine.timings import Timings
from ptqbench.errors import NumericalError
from ptqbench.methods.base import Statistics
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.peaks import needs_peaks, observing, peaks_of
from ptqbench.models.quantized import set_quantizers
from ptqbench.models.stages import Positions, Stage, finish, forward, stages_of
from ptqbench.numerics.grid import LinearResult

__all__ = ["Method", "Streams", "Timings", "quantize"]

BATCH = 1
"""Windows per forward. One, so that sums are formed in the same order whatever the machine."""

Results = dict[str, LinearResult]
Rows = list[dict[str, Any]]


@dataclasses.dataclass
class Streams:
    """The calibration windows between two blocks.

    Attributes:
        quantized: Residual stream behind quantized blocks, one (batch, tokens, hidden_size) tensor per batch.
        reference: The same behind unquantized blocks; None if the method compares nothing.
    """

    quantized: list[Tensor]
    reference: list[Tensor] | None


@torch.no_grad()
def quantize(
    model: BlockwiseModel,
    method: Method,
    windows: Tensor,
    state: BlockState,
    timings: Timings,
    on_block: Callable[[int], None] = lambda index: None,
) -> None:
    """Round every linear of every block; results and layer records go to ``state``.

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
    # Both streams start from the same embedded tokens; they part at the first rounded block.
    with timings.measure("embed_s"):
        hidden = model.embed(windows)
        home = model.resting_place(hidden, 1 + method.needs_reference)
        batches = list(hidden.to(home).split(BATCH))
    # RoPE tables and mask are the same for all windows and blocks.
    positions, park = model.positions(windows.shape[1]), model.parking_place(hidden, 1 + method.needs_reference)
    loop = _Loop(model, method, positions, timings, home, park)
    streams = Streams(batches, list(batches) if method.needs_reference else None)
    with _Writer(state, timings, on_block) as writer:
        for index in range(model.n_blocks):
            # A finished block is not rounded again: the streams only pass through it.
            if state.has(index):
                streams = loop.replay(index, streams, state)
                on_block(index)
                continue
            # Load the block, round it stage by stage, and let it go before the next one is loaded.
            with ExitStack() as held:
                with timings.measure("load_s"):
                    block = held.enter_context(model.block(index))
                held.enter_context(_calibrating(block, method))
                loop.observe(block, streams)
                streams, results, rows = loop.round_block(index, block, streams)
                parts = stored_parts(results) | peaks_of(block)
            # Write it while the next block is computed.
            writer.save(index, parts, rows)


class _Writer:
    """Saves a block while the next one is computed. At most one save is under way; a block counts once it is on disk."""

    def __init__(self, state: BlockState, timings: Timings, on_block: Callable[[int], None]) -> None:
        self._state, self._timings, self._on_block = state, timings, on_block
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: tuple[int, Future[None]] | None = None

    def save(self, index: int, parts: dict[str, Tensor], rows: Rows) -> None:
        """Wait for the previous save, then start this one. An error of the previous save is raised here."""
        self._finish()
        self._pending = index, self._thread.submit(self._state.save, index, parts, rows)

    def _finish(self) -> None:
        if self._pending is not None:
            (index, saving), self._pending = self._pending, None
            with self._timings.measure("save_s"):
                saving.result()
            self._on_block(index)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._thread:  # a save under way is completed even after an error
            if failed is None:
                self._finish()


@contextmanager
def _calibrating(block: nn.Module, method: Method) -> Iterator[None]:
    """Switch the quantizers of a block to their state during calibration; switch them on again afterwards."""
    set_quantizers(block, method.during_calibration)
    try:
        yield
    finally:
        set_quantizers(block, True)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What stays the same from block to block.

    ``home`` is where streams rest between blocks, ``park`` where windows wait between the stages of one.
    """

    model: BlockwiseModel
    method: Method
    positions: Positions
    timings: Timings
    home: torch.device
    park: torch.device | None

    def replay(self, index: int, streams: Streams, state: BlockState) -> Streams:
        """Run both streams through a finished block: the quantized one with the stored weights, the other without."""
        # The reference sees the block of the checkpoint.
        reference = streams.reference
        if reference is not None:
            with self.model.block(index) as block:
                reference = self._propagate(untouched_copy(block), reference, "reference_s")
        # The quantized stream sees the weights that the stored codes rebuild, as in the run that made them.
        with self.model.block(index, state.overlay) as block, _calibrating(block, self.method):
            return Streams(self._propagate(block, streams.quantized), reference)

    def observe(self, block: nn.Module, streams: Streams) -> None:
        """Find the largest inputs, keys and values of the unrounded block, where its quantizers need them beforehand."""
        if needs_peaks(block):
            with observing(block), self.timings.measure("forward_s"):
                for states in streams.quantized:
                    forward(block, states.to(self.model.device), self.positions)

    def round_block(self, index: int, block: nn.Module, streams: Streams) -> tuple[Streams, Results, Rows]:
        """Round one block. Returns the streams that leave it, the rounded linears and one layer record per linear."""
        # The reference runs through a copy of the block that shares its weights and has no quantizers.
        reference = None if streams.reference is None else untouched_copy(block)
        windows = [self._enter(block, reference, i, streams) for i in range(len(streams.quantized))]
        results: Results = {}
        rows: Rows = []
        stages = stages_of(self.model.architecture.family)
        if self.method.true_sequential:
            # Statistics of a stage come from inputs that the stages before it, already rounded, have computed.
            for stage in stages:
                (statistics,) = self._collect(index, windows, (stage,), block, reference)
                self._round(index, block, stage, statistics, results, rows)
            # Every linear has run once; only the last addition to the residual stream is left.
            with self.timings.measure("forward_s"):
                quantized = [finish(window.quantized).to(self.home) for window in windows]
            return Streams(quantized, self._leave(windows)), results, rows
        # Otherwise one pass through the unrounded block gives the statistics of all four stages, and a second pass
        # through the rounded block gives the stream of the next one.
        together = self._collect(index, windows, stages, block, reference)
        behind = self._leave(windows)  # the reference has passed all stages; only its last addition is left
        for stage, statistics in zip(stages, together, strict=True):
            self._round(index, block, stage, statistics, results, rows)
        return Streams(self._propagate(block, streams.quantized), behind), results, rows

    def _enter(self, block: nn.Module, reference: nn.Module | None, i: int, streams: Streams) -> Lockstep:
        device = self.model.device
        beside = None if streams.reference is None else streams.reference[i].to(device)
        return Lockstep(block, streams.quantized[i].to(device), reference, beside, self.positions, self.park)

    def _collect(
        self,
        index: int,
        windows: list[Lockstep],
        stages: Sequence[Stage],
        block: nn.Module,
        reference: nn.Module | None,
    ) -> list[Statistics]:
        """Advance every window through the next stages, one window after the other, and sum what is found there."""
        # The union of what target, solver and refinement need at each stage.
        eps = float(self.model.config.rms_norm_eps)
        options = (self.method.target.rms_scale, eps, self.method.plain_moments)
        wanted = [Wanted(self.method.needs(stage), *options) for stage in stages]
        collectors = [Collector(*pair, block, reference) for pair in zip(stages, wanted, strict=True)]
        for window in windows:
            for collector in collectors:
                # Advance both streams of the window to the input of the same stage.
                with self.timings.measure("forward_s"):
                    quantized = next(window.quantized)
                with self.timings.measure("reference_s"):
                    beside = None if window.reference is None else next(window.reference)
                assert quantized is not None, "a run announces its input before it parks"
                # Add its tokens to the sums: H += X_q^T X_q, and whatever else the members need.
                with self.timings.measure("moment_s"):
                    collector.add(quantized, beside)
                # Drop the last references to the window's tensors, so that they can leave the device.
                del quantized, beside
                window.park()
        return [self._statistics(index, collector) for collector in collectors]

    def _statistics(self, index: int, collector: Collector) -> Statistics:
        try:
            return collector.statistics()
        except NumericalError as error:
            linears = "/".join(name.rpartition(".")[2] for name in collector.stage.linears)
            raise NumericalError(f"block {index}, input of {linears}: {error}{self._way_out()}") from error

    def _way_out(self) -> str:
        """What to do about numbers that are not finite, where the data type may be the reason."""
        if self.model.dtype != torch.float16:
            return ""
        return "; the model runs in float16, whose largest number is 65504: give model.dtype=bfloat16 or model.dtype=float32"

    def _round(
        self, index: int, block: nn.Module, stage: Stage, statistics: Statistics, results: Results, rows: Rows
    ) -> None:
        # Aim, solve, refine, and put the rounded weights into the block.
        try:
            with self.timings.measure("round_s"):
                linears = round_stage(block, stage, self.method, statistics)
        except NumericalError as error:
            raise NumericalError(f"block {index}, {error}{self._way_out()}") from error
        # Keep the codes for the file of the block, and describe every linear.
        results |= {linear.name: linear.repaired.result for linear in linears}
        with self.timings.measure("report_s"):
            rows += [layer_record(index, linear, statistics) for linear in linears]

    def _propagate(self, block: nn.Module, hidden: list[Tensor], timing: str = "forward_s") -> list[Tensor]:
        with self.timings.measure(timing):
            return [forward(block, states.to(self.model.device), self.positions).to(self.home) for states in hidden]

    def _leave(self, windows: list[Lockstep]) -> list[Tensor] | None:
        with self.timings.measure("reference_s"):
            behind = [finish(window.reference).to(self.home) for window in windows if window.reference is not None]
        return behind or None
