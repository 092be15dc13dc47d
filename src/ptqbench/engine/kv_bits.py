"""Bits of keys and values by block: the larger of them get more (``numerics.bits.allocate``).

Sizes: with ``weight_fro`` and ``weight_spec`` the Frobenius norm or the largest singular value of k_proj and v_proj as they are
stored; with ``activation`` the root of the mean squared norm of a key (after RoPE and the norm of keys, if there is one) and of a
value of the unquantized model, over kv heads and calibration tokens.

Source: arXiv 2502.15075, code mohsenhariri/spectral-kv@e9ed423 (both norms of weights). Deviation: ``activation`` is ours. A model
that normalises its keys decouples their size from that of k_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptqbench.errors import NumericalError
from ptqbench.methods.basis import FoldedBasis
from ptqbench.methods.transform import KV_BITS
from ptqbench.models.architecture import ATTENTION_INPUT
from ptqbench.models.capture import read_moments
from ptqbench.numerics.bits import allocate

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.engine.bases import StoredBases
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.runs.attempt import Observer

KV_PART = KV_BITS.partition(".")[0]


@torch.no_grad()
def distribute(
    model: BlockwiseModel, spec: RunSpec, stored: StoredBases, windows: Callable[[], Tensor], observer: Observer
) -> None:
    """Measure keys and values of every block, distribute the bits of a cell over them, and store the bits.

    Args:
        model: The checkpoint.
        spec: The cell; says the measure, the choices, and with ``k_bits`` and ``v_bits`` the mean.
        stored: Receives ``KV_BITS``, (L, 2) int64, keys before values.
        windows: Gives the calibration tokens, (n_samples, seq_len) int64, for ``activation``.
        observer: Shown the progress.

    Raises:
        NumericalError: A size is not finite; names the block.
    """
    observer.stage("kv bits", model.n_blocks)
    bits, sizes = spec.bitwidth, list[float]()
    by_block = _of_activations(model, windows()) if bits.kv_measure == "activation" else _of_weights(model, spec)
    for index, block in enumerate(by_block):
        if not bool(block.isfinite().all()):
            raise NumericalError(
                f"block {index}: the size of its keys or values is not finite; check the calibration forward"
            )
        sizes += block.tolist()
        observer.advance()
    # K_0 V_0 K_1 V_1 ..
    chosen = allocate(sizes, (bits.k_bits + bits.v_bits) * model.n_blocks, bits.kv_choices)
    stored.save(KV_PART, {KV_BITS.partition(".")[2]: torch.tensor(chosen).reshape(-1, 2)})


def _of_weights(model: BlockwiseModel, spec: RunSpec) -> Iterator[Tensor]:
    """Norms of the stored k_proj and v_proj of every block."""
    order = 2 if spec.bitwidth.kv_measure == "weight_spec" else "fro"
    for index in range(model.n_blocks):
        tensors = model.tensors(index)
        weights = (tensors[f"{linear}.weight"].double() for linear in ATTENTION_INPUT[1:])
        yield torch.stack([torch.linalg.matrix_norm(weight, ord=order) for weight in weights])


def _of_activations(model: BlockwiseModel, windows: Tensor) -> Iterator[Tensor]:
    """Root mean squared norms of keys and values of every block of the unquantized model, in float32."""
    plain = model.reopened(FoldedBasis(), torch.float32)
    embedded, positions = plain.embed(windows), plain.positions(windows.shape[1])
    hidden = list(embedded.to(plain.resting_place(embedded)).split(1))
    for index in range(plain.n_blocks):
        with plain.block(index) as block:
            moments, hidden = read_moments(block, hidden, positions, plain.device)
        # sqrt(mean over heads of trace E[k k^T])
        traces = (heads.diagonal(dim1=-2, dim2=-1).sum(-1).mean() for heads in (moments.key, moments.value))
        yield torch.stack(list(traces)).sqrt()
