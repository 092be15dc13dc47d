"""The loss of the quantized network and its gradient with respect to rotations, with one block in memory.

A forward pass keeps the residual stream before every block; a backward pass runs the blocks again in reverse, each with its
gradient. A block is rebuilt from the checkpoint for either pass: its tensors are fused with the rotations (float64,
differentiable), rounded to the model's data type, and run through the installed decoder block with all quantizers on. Rounding
is passed straight through (``numerics.activation``).

Source: arXiv 2405.16406 (SpinQuant), code facebookresearch/SpinQuant@8f47aa3. Deviations: the output projection is applied to
the stream rotated back and the embedding is rotated after the look-up, which is the same function without a rotated vocabulary;
the loss is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptqbench.errors import NumericalError
from ptqbench.methods.basis import FoldedBasis
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.quantized import BlockPlan, install
from ptqbench.models.stages import Positions
from ptqbench.numerics.activation import straight_through
from ptqbench.numerics.rtn import round_to_nearest

if TYPE_CHECKING:
    from ptqbench.models.fuse import Basis
    from ptqbench.numerics.grid import Grid

Rotations = dict[str, Tensor]


@contextmanager
def opened(model: BlockwiseModel, seq_len: int, grids: Mapping[str, Grid] | None = None) -> Iterator[Network]:
    """Hold what all steps share: positions, the norm-folded embedding and head, and a block of each kind for the others' weights.

    Args:
        model: The checkpoint.
        seq_len: Tokens per window.
        grids: Linears that the loss rounds to nearest -> their grids; none of them where weights are left alone.
    """
    shape = model.architecture
    folded = model.reopened(FoldedBasis(family=shape.family))
    kinds = {shape.block_kind(index): index for index in reversed(range(shape.n_blocks))}
    with ExitStack() as held:
        blocks = {kind: held.enter_context(folded.block(index)) for kind, index in kinds.items()}
        head = held.enter_context(folded.head())
        yield Network(model, folded, blocks, head, folded.positions(seq_len), grids or {})


def _repeatable_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Choose attention whose backward pass sums in a fixed order; the fused GPU kernels have none."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


@dataclasses.dataclass(frozen=True)
class Network:
    """The loss of the network in a basis, and its gradient, block by block.

    Attributes:
        model: The checkpoint, whose tensors are fused with the rotations.
        folded: The same with norms folded; gives embedding and head.
        blocks: A decoder block of the installed class for every kind of block, whose weights are replaced in every call.
        head: Final norm and output projection.
        positions: RoPE tables and mask.
        grids: Linears that the loss rounds to nearest -> their grids.
    """

    model: BlockwiseModel
    folded: BlockwiseModel
    blocks: Mapping[tuple[str, bool], nn.Module]
    head: Callable[[Tensor], Tensor]
    positions: Positions
    grids: Mapping[str, Grid]

    def gradients(
        self, build: Callable[[Rotations], Basis], rotations: Rotations, windows: Tensor
    ) -> tuple[float, Rotations]:
        """Return the mean loss per predicted token, and its gradient with respect to every rotation.

        Args:
            build: Rotations -> basis; called anew for every part of the network, so that parts share no graph.
            rotations: Name -> (n, n) float64, not modified.
            windows: (batch, tokens) int64, not modified.

        Raises:
            NumericalError: The loss is not finite.
        """
        total, sums = 0.0, {name: torch.zeros_like(value) for name, value in rotations.items()}
        for window in windows.split(1):
            total += self._add(build, rotations, window, sums) / len(windows)
        return total, {name: value / len(windows) for name, value in sums.items()}

    def _add(self, build: Callable[[Rotations], Basis], rotations: Rotations, window: Tensor, sums: Rotations) -> float:
        # The rotations as leaves of the graphs of all parts.
        leaves = {name: value.detach().requires_grad_() for name, value in rotations.items()}
        entering = [self.folded.embed(window).to(self.model.device)]
        # Forward: keep only the stream that enters each part; part -1 is the embedding.
        with torch.no_grad():
            for index in range(-1, self.model.n_blocks):
                entering.append(self._part(build(leaves), index, entering[-1]))
        # The loss, from the stream behind the last block.
        stream = entering.pop().requires_grad_()
        loss = self._loss(build(leaves), stream, window.to(self.model.device))
        if not bool(torch.isfinite(loss)):
            raise NumericalError(f"the loss is {float(loss)}; the model overflows (dtype {self.model.dtype})")
        # Backward: run each part again with its graph, and pass dL / d(input) on to the part before it.
        flowing = self._backward(loss, None, stream, leaves, sums)
        for index in reversed(range(-1, self.model.n_blocks)):
            stream = entering.pop().requires_grad_(index >= 0)
            with torch.enable_grad():
                leaving = self._part(build(leaves), index, stream)
            flowing = self._backward(leaving, flowing, stream, leaves, sums)
        return float(loss.detach())

    @staticmethod
    def _backward(
        leaving: Tensor, flowing: Tensor | None, stream: Tensor, leaves: Rotations, sums: Rotations
    ) -> Tensor | None:
        """Add the contribution of a part to the gradients of the rotations. Returns the gradient of its input."""
        wanted = [*leaves.values(), *([stream] if stream.requires_grad else [])]
        # sum_R += (d leaving / dR)^T dL / d(leaving); a part need not depend on every rotation.
        found = torch.autograd.grad(leaving, wanted, flowing, allow_unused=True)
        for name, gradient in zip(leaves, found, strict=False):
            if gradient is not None:
                sums[name] += gradient
        return found[-1] if stream.requires_grad else None

    def _part(self, basis: Basis, index: int, stream: Tensor) -> Tensor:
        """Run block ``index``; index -1 multiplies embedding rows by the basis."""
        if index < 0:
            # The basis of the stream, applied after the look-up: e -> e R.
            turn = basis.embedding({"weight": self._identity()})["weight"]
            return (stream.double() @ turn).to(self.model.dtype)
        # Fuse the rotations into the weights in float64, W <- T'^T W T, then round to the model's data type.
        weights = {
            name: tensor.to(self.model.dtype)
            for name, tensor in basis.block(self.model.tensors(index), index).items()
        }  # fmt: skip
        # Round the linears to nearest; the gradient passes straight through.
        for linear, grid in self.grids.items():
            name = f"{linear}.weight"
            weights[name] = straight_through(weights[name], round_to_nearest(weights[name].detach(), grid).dequantized)
        # Run the installed block with these weights and its quantizers on.
        block = self.blocks[self.model.architecture.block_kind(index)]
        install(block, basis.plan(index) or BlockPlan())
        own = self.positions.of(block)
        placed = {"attention_mask": own.mask, "position_embeddings": own.rope}
        with _repeatable_attention(stream.device):
            output = torch.func.functional_call(block, weights, (stream,), placed)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def _loss(self, basis: Basis, stream: Tensor, window: Tensor) -> Tensor:
        """Return the mean loss per predicted token, float32 or float64."""
        with torch.enable_grad():
            # The head stays in the basis of the checkpoint: it reads h R^T.
            unit = 1 - self.model.architecture.family.gain_offset
            gain = torch.full(stream.shape[-1:], unit, dtype=torch.float64, device=stream.device)
            turn = basis.head({"norm.weight": gain, "lm_head.weight": self._identity()})["lm_head.weight"]
            logits = self.head((stream[:, :-1].double() @ turn.mT).to(self.model.dtype))
            return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    def _identity(self) -> Tensor:
        return torch.eye(self.model.architecture.hidden_size, dtype=torch.float64, device=self.model.device)
