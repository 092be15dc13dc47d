"""A walk through an unquantized float32 model, block by block, that computes what it is asked for and nothing else.

Transforms look at the model through it before anything is rounded (``methods.transform.Calibrated``). One block is in memory. The
model is opened, and the stream advanced, only for what is not found where cells share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from ptqbench.models.architecture import Architecture
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.capture import BlockMoments, Magnitudes, read_moments
from ptqbench.models.fuse import Basis, Tensors
from ptqbench.models.stages import STAGES, Positions, finish, forward, staged

Share = Callable[[str, int, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""(kind, block, make) -> the tensors that ``make`` computes, or those that another cell left."""


class Walk:
    """The residual streams of all calibration windows on their way through a model.

    Attributes:
        given: The checkpoint, in the basis and type that it was opened in.
        share: Where statistics of blocks are left for other cells.
        windows: Calibration tokens, (n_samples, seq_len) int64.
    """

    def __init__(self, given: BlockwiseModel, basis: Basis | None, windows: Tensor, share: Share) -> None:
        """Prepare a walk; nothing is read yet.

        Args:
            given: The checkpoint; opened anew in float32.
            basis: The form in which it is walked through; None for its own.
            windows: Calibration tokens, (n_samples, seq_len) int64, not modified.
            share: Where statistics of blocks are left for other cells.
        """
        self.given, self.share, self.windows = given, share, windows
        self._basis, self._at = basis, 0
        self._hidden: list[Tensor] = []

    @cached_property
    def model(self) -> BlockwiseModel:
        """The float32 model."""
        return self.given.reopened(self._basis, torch.float32)

    @cached_property
    def positions(self) -> Positions:
        """RoPE tables and mask of a window."""
        return self.model.positions(self.windows.shape[1])

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Hold a block in memory."""
        with self.model.block(index) as block, _fast_products(self.model.device):
            yield block

    def enter(self, index: int) -> list[Tensor]:
        """Return the streams entering a block, (1, seq_len, d) each, on their resting place. Indices must increase."""
        assert self._at <= index, "the stream has passed this block"
        if not self._hidden:
            hidden = self.model.embed(self.windows)
            self._hidden = list(hidden.to(self.model.resting_place(hidden)).split(1))
        # Advance to the block, past those of which nothing had to be computed.
        while self._at < index:
            with self.block(self._at) as block:
                device = self.model.device
                self._hidden = [forward(block, x.to(device), self.positions).to(x.device) for x in self._hidden]
            self._at += 1
        return self._hidden

    def leave(self, hidden: list[Tensor]) -> None:
        """Go on with the streams that left the block that was entered."""
        self._hidden, self._at = hidden, self._at + 1


@dataclasses.dataclass(frozen=True)
class BlockView:
    """What can be asked about one block on a walk: at most one of ``moments``, ``magnitudes`` and ``inputs``, which run it.

    Attributes:
        walk: The walk.
        index: The block.
    """

    walk: Walk
    index: int

    @property
    def architecture(self) -> Architecture:
        """Dimensions."""
        return self.walk.given.architecture

    @property
    def device(self) -> torch.device:
        """Where the block lives."""
        return self.walk.given.device

    def resting_place(self, streams: int) -> torch.device:
        """Choose where so many tensors of the size of all windows are kept, as `BlockwiseModel.resting_place` does."""
        hidden = self.walk.enter(self.index)
        return self.walk.model.resting_place(hidden[0], streams * len(hidden))

    @property
    def n_tokens(self) -> int:
        """Number of calibration tokens."""
        return self.walk.windows.numel()

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors of the block as they are in the checkpoint, on the device."""
        return self.walk.given.tensors(self.index)

    @cached_property
    def moments(self) -> BlockMoments:
        """Second moments of the block, over all windows."""
        found = self.walk.share("moments", self.index, lambda: self._read_moments().tensors())
        return BlockMoments.of(found, self.device)

    @cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """``largest.STAGE`` and ``mean_abs.STAGE``: magnitudes of the input channels of every stage, float64."""
        found = self.walk.share("magnitudes", self.index, self._read_magnitudes)
        return {name: size.to(self.device) for name, size in found.items()}

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Run window after window through the block.

        Yields:
            Name of a stage (``qkv``, ``o``, ``gate_up``, ``down``) -> input of its linears, (1, seq_len, in), on the device.
        """
        leaving: list[Tensor] = []
        entering, device = self.walk.enter(self.index), self.device
        with self.block() as block:
            for states in entering:
                run = staged(block, states.to(device), self.walk.positions)
                found: dict[str, Tensor] = {}
                for stage in STAGES:
                    announced = next(run)
                    assert announced is not None, "a run that does not park announces inputs alone"
                    found[stage.name] = announced.inputs
                yield found
                leaving.append(finish(run).to(states.device))
        self.walk.leave(leaving)

    def block(self) -> AbstractContextManager[nn.Module]:
        """Hold the live float32 block in memory."""
        return self.walk.block(self.index)

    def _read_moments(self) -> BlockMoments:
        # One pass sums the moments and gives the stream behind the block.
        entering, walk = self.walk.enter(self.index), self.walk
        with self.block() as block:
            moments, leaving = read_moments(block, entering, walk.positions, self.device)
        walk.leave(leaving)
        return moments

    def _read_magnitudes(self) -> dict[str, Tensor]:
        sizes = Magnitudes()
        for inputs in self.inputs():
            for name, tokens in inputs.items():
                sizes.add(name, tokens.flatten(0, -2))
        found = {f"largest.{name}": size for name, size in sizes.largest.items()}
        return found | {f"mean_abs.{name}": size for name, size in sizes.means().items()}


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU compute float32 products on its TF32 units; the published codes run this pass in bfloat16, which is coarser.

    Sums of moments are float64 and are not affected.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
