"""A pass of many sequences through all decoder blocks, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptqbench.models.blockwise import BlockwiseModel, Overlay
from ptqbench.models.stages import Positions, forward


def through_blocks(
    model: BlockwiseModel,
    batches: Sequence[Tensor],
    positions: Callable[[int], Positions],
    overlay: Overlay | None,
    on_block: Callable[[int], None],
) -> list[Tensor]:
    """Run token ids through the embedding and every block.

    Args:
        model: The checkpoint.
        batches: Token ids, (rows, tokens) int64 each; not modified.
        positions: Batch number -> its RoPE tables and attention mask.
        overlay: Replaces the weights of a block after loading (quantized ones).
        on_block: Called with the index of every finished block.

    Returns:
        Residual stream behind the last block, (rows, tokens, hidden_size) per batch, on the device if it fits there.
    """
    # One call embeds all tokens, because it reads the embedding table from disk.
    embedded = model.embed(torch.cat([batch.flatten() for batch in batches])[None])[0]
    home = model.resting_place(embedded)
    pieces = embedded.split([batch.numel() for batch in batches])
    hidden = [piece.view(*batch.shape, -1).to(home) for piece, batch in zip(pieces, batches, strict=True)]
    del embedded, pieces
    for index in range(model.n_blocks):
        # The block is loaded once, and all batches pass through it before the next is loaded.
        with model.block(index, overlay) as block:
            for i, states in enumerate(hidden):
                hidden[i] = forward(block, states.to(model.device), positions(i)).to(home)
        on_block(index)
    return hidden
