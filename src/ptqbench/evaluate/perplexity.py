"""Perplexity: exp of the mean negative log-likelihood per predicted token, in non-overlapping windows.

Protocol (GPTQ code): the text is cut into windows of ``seq_len`` tokens, and the remainder is dropped. Each window predicts its
last ``seq_len - 1`` tokens from those before them. All predicted tokens have equal weight.

The loss is computed from logits in chunks, so that (tokens x vocabulary) never exists as a whole. Logits and losses per token are
float32, or on request rounded to bfloat16 as in the codes of QuaRot, ResQ and CoQuant. Sums over tokens are float64. The model runs
block by block over all windows: memory is one block and the residual stream, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ptqbench.errors import NumericalError
from ptqbench.evaluate.passes import through_blocks
from ptqbench.evaluate.records import LARGEST
from ptqbench.models.blockwise import BlockwiseModel, Overlay

Observer = Callable[[Tensor, Tensor], None]
"""Sees logits (positions, vocabulary) and the tokens that follow (positions,), window by window, in chunks."""

CHUNK_ELEMENTS = 1 << 26
"""Logits held at once, in float32 elements (256 MiB)."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of one text.

    Attributes:
        mean_loss: Total negative log-likelihood / ``n_tokens``, nats.
        window_nll: Negative log-likelihood summed per window, (n_windows,) float64, nats.
        n_tokens: Number of predicted tokens.
    """

    mean_loss: float
    window_nll: Tensor
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(``mean_loss``), or ``LARGEST`` where that is larger."""
        return math.exp(self.mean_loss) if self.mean_loss < math.log(LARGEST) else LARGEST

    @property
    def standard_error(self) -> float | None:
        """Standard error of ``perplexity`` from the spread over windows: ppl * std(nll per token of a window) / sqrt(n).

        None for a single window, and where perplexity or error exceed ``LARGEST``.
        """
        n = len(self.window_nll)
        if n < 2 or self.perplexity == LARGEST:
            return None
        per_token = self.window_nll / (self.n_tokens / n)
        error = self.perplexity * float(per_token.std(unbiased=True)) / math.sqrt(n)
        return error if error < LARGEST else None


@torch.no_grad()
def perplexity(
    model: BlockwiseModel,
    windows: Tensor,
    overlay: Overlay | None = None,
    batch_size: int = 8,
    on_block: Callable[[int], None] = lambda index: None,
    dtype: torch.dtype = torch.float32,
    observe: Observer | None = None,
) -> Perplexity:
    """Measure perplexity block by block.

    Args:
        model: The checkpoint.
        windows: (n_windows, seq_len) int64 token ids, not modified.
        overlay: Replaces the weights of a block after loading (quantized ones).
        batch_size: Windows per forward.
        on_block: Called with the index of every finished block.
        dtype: Type of logits and of the loss per token: float32 (float64 for a float64 model) or bfloat16.
        observe: Shown the logits of every predicted position, before they are rounded to ``dtype``.

    Raises:
        NumericalError: The loss is not finite.
    """
    batches, positions = windows.split(batch_size), model.positions(windows.shape[1])
    hidden = through_blocks(model, batches, lambda batch: positions, overlay, on_block)
    # nll of a window = -sum_t log p(x_t | x_<t), from the stream behind the last block.
    step = max(1, CHUNK_ELEMENTS // model.architecture.vocab_size)
    with model.head() as head:
        nll = torch.cat(
            [
                _window_nll(head, step, h.to(model.device), w.to(model.device), dtype, observe)
                for h, w in zip(hidden, batches, strict=True)
            ]
        ).cpu()
    if not bool(torch.isfinite(nll).all()):
        bad = int((~torch.isfinite(nll)).nonzero()[0, 0])
        raise NumericalError(
            f"the loss of evaluation window {bad} is not finite: the model overflows (dtype {model.dtype})"
        )
    # mean loss = sum of nll / (windows * (seq_len - 1)); perplexity = exp of it.
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(float(nll.sum()) / n_tokens, nll, n_tokens)


def _window_nll(
    head: Callable[[Tensor], Tensor],
    step: int,
    hidden: Tensor,
    tokens: Tensor,
    dtype: torch.dtype,
    observe: Observer | None,
) -> Tensor:
    """Sum the negative log-likelihood of tokens 1.. of each window: (batch,) float64."""
    # Position t predicts token t + 1.
    states, labels = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    # Logits of ``step`` positions at a time, so that (tokens, vocabulary) never exists as a whole.
    losses = []
    for chunk, wanted in zip(states.split(step), labels.split(step), strict=True):
        logits = head(chunk)
        if observe is not None:
            observe(logits, wanted)
        losses.append(functional.cross_entropy(_as(logits, dtype), wanted, reduction="none"))
    return torch.cat(losses).view(tokens.shape[0], -1).double().sum(1)


def _as(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.to(dtype) if dtype == torch.bfloat16 else logits
