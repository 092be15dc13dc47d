"""Log-likelihoods of continuations given contexts, block by block: what multiple-choice tasks ask of a model.

    log p(c | x) = sum_i log softmax(head(h_{x c_<i}))[c_i],   greedy: every c_i is the largest logit

The model runs as for perplexity: each block is loaded once, all token trees pass through it, and the head is applied only at the
positions of continuations. Memory is one block and the hidden states of the tokens, whatever the size of the model. Prefixes that
requests share are computed once (``evaluate.trees``).

Source: EleutherAI/lm-evaluation-harness, ``HFLM._loglikelihood_tokens`` (truncation from the left to ``max_length`` inputs).
Deviation: the log-softmax is float32 whatever the type of the model; the harness takes that of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptqbench.errors import NumericalError
from ptqbench.evaluate.passes import through_blocks
from ptqbench.evaluate.perplexity import CHUNK_ELEMENTS
from ptqbench.evaluate.scores import CHUNK_BYTES, Request, Score, Scores, Store
from ptqbench.evaluate.trees import Row, attended, batches, pack
from ptqbench.models.blockwise import BlockwiseModel, Overlay
from ptqbench.models.stages import Positions

TOKEN_BUDGET = {"cpu": 1 << 12, "cuda": 1 << 14}
"""Tokens per forward of a block."""


def scorer(model: BlockwiseModel, overlay: Overlay | None, store: Store, on_block: Callable[[int], None]) -> Scores:
    """Scores of a model, computed by ``log_likelihoods`` where they are not stored.

    Args:
        model: The checkpoint.
        overlay: Replaces the weights of a block after loading (quantized ones).
        store: Where scores are stored.
        on_block: Called with the index of every finished block.
    """
    longest = int(model.config.max_position_embeddings)

    def compute(requests: list[Request]) -> list[Score]:
        return log_likelihoods(model, requests, longest, overlay, None, on_block)

    return Scores(compute, store, CHUNK_BYTES // (model.architecture.hidden_size * model.dtype.itemsize))


@torch.no_grad()
def log_likelihoods(
    model: BlockwiseModel,
    requests: Sequence[tuple[list[int], list[int]]],
    max_length: int,
    overlay: Overlay | None = None,
    token_budget: int | None = None,
    on_block: Callable[[int], None] = lambda index: None,
) -> list[tuple[float, bool]]:
    """Score continuations.

    Args:
        model: The checkpoint.
        requests: Token ids of context and continuation, neither of them empty; not modified.
        max_length: Most input tokens; longer inputs are cut at their beginning.
        overlay: Replaces the weights of a block after loading (quantized ones).
        token_budget: Tokens per forward, padding included; None takes that of the device. It changes nothing but the order of sums.
        on_block: Called with the index of every finished block.

    Returns:
        Log-likelihood in nats and whether the continuation is the greedy one, per request in order.

    Raises:
        NumericalError: A log-likelihood is not finite.
    """
    # The last token is predicted but never read, so an input has one token less.
    whole = [(context + continuation)[-(max_length + 1) :] for context, continuation in requests]
    rows = pack([tokens[:-1] for tokens in whole])
    groups = batches(rows, token_budget or TOKEN_BUDGET[model.device.type])
    states = _through_blocks(model, groups, overlay, on_block)
    step = max(1, CHUNK_ELEMENTS // model.architecture.vocab_size)
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    with model.head() as head:
        for group, hidden in zip(groups, states, strict=True):
            for row, h in zip(group, hidden, strict=True):
                # A request reads the states of its last len(continuation) inputs.
                at = {n: path[-len(requests[n][1]) :] for n, path in row.ends}
                targets = {n: whole[n][-len(nodes) :] for n, nodes in at.items()}
                for n, score in _scores(head, step, h.to(model.device), at, targets).items():
                    scores[n] = score
    bad = next((n for n, (value, _) in enumerate(scores) if not value > -torch.inf), None)
    if bad is not None:
        raise NumericalError(
            f"the log-likelihood of request {bad} is {scores[bad][0]}: the model overflows (dtype {model.dtype})"
        )
    return scores


def _through_blocks(
    model: BlockwiseModel, groups: list[list[Row]], overlay: Overlay | None, on_block: Callable[[int], None]
) -> list[Tensor]:
    """Residual stream after the last block, (rows, tokens, hidden_size) per group."""
    tokens = [_padded([torch.tensor(row.tokens) for row in group]) for group in groups]
    depths = [_padded([torch.tensor(row.depth) for row in group]) for group in groups]
    stops = [_padded([torch.tensor(row.stop) for row in group]) for group in groups]

    def positions(i: int) -> Positions:
        # Masks of all groups together would be large, so they are made anew for every block, on the device.
        return model.tree_positions(depths[i], attended(stops[i].to(model.device)))

    return through_blocks(model, tokens, positions, overlay, on_block)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _scores(
    head: Callable[[Tensor], Tensor], step: int, hidden: Tensor, at: dict[int, list[int]], targets: dict[int, list[int]]
) -> dict[int, tuple[float, bool]]:
    """Score the requests of a row.

    Args:
        head: Hidden states -> float32 logits.
        step: Positions whose logits are held at once.
        hidden: States of the row, (tokens, hidden_size).
        at: Request -> the tokens of the row whose states it reads.
        targets: Request -> the tokens that are to be predicted there.
    """
    nodes = sorted({node for path in at.values() for node in path})
    place = {node: i for i, node in enumerate(nodes)}
    # Pairs of (position, wanted token) of all requests, one after another.
    where = torch.tensor([place[node] for path in at.values() for node in path], device=hidden.device)
    wanted = torch.tensor([token for row in targets.values() for token in row], device=hidden.device)
    states = hidden[nodes]
    value = torch.empty(len(where), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(where), dtype=torch.bool, device=hidden.device)
    # Logits of ``step`` positions at a time, so that (tokens, vocabulary) never exists as a whole.
    for first in range(0, len(nodes), step):
        logits = head(states[first : first + step])
        here = (where >= first) & (where < first + step)
        found = logits.log_softmax(-1)[where[here] - first, wanted[here]]
        value[here] = found.double()
        greedy[here] = logits.argmax(-1)[where[here] - first] == wanted[here]
    # log p of a request is the sum over its pairs; it is greedy if all of them are.
    lengths = [len(path) for path in at.values()]
    return {
        n: (float(v.sum()), bool(g.all()))
        for n, v, g in zip(at, value.cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
    }
