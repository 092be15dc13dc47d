"""Pack token sequences that begin alike into trees, so that a model computes every shared prefix once.

A row holds several sequences as a tree of tokens. A token attends to its ancestors and to itself, and its position is its depth.
So it sees exactly what it would see in its own sequence, and one forward over the row computes the states of every sequence.
Quantizers that work per token give the same result.

Sequences are added in lexicographic order, so the tokens of a row stand in preorder: those that continue token j are the ones
from j up to ``stop[j]``. Token i therefore attends to j if

    j <= i < stop[j].

Legend: T tokens of a row, padding included where rows form a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

SHORTEST_ROW = 512
"""A row takes tokens up to this length at least: short trees share a row."""
ROW_FACTOR = 4
"""A longer row is at most so many times the longest sequence, since the cost of attention grows with the square."""


@dataclasses.dataclass
class Row:
    """A tree of tokens.

    Attributes:
        tokens: Token ids.
        depth: Position of each token in its sequence.
        stop: Index behind the last token that continues each token; 0 while it may get more (``close``).
        ends: Per sequence, its number and the indices of its tokens in the row.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    depth: list[int] = dataclasses.field(default_factory=list)
    stop: list[int] = dataclasses.field(default_factory=list)
    ends: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)

    def add(self, number: int, sequence: Sequence[int], path: list[int], shared: int) -> list[int]:
        """Add a sequence below the first ``shared`` tokens of ``path``, the one added last; return its own path."""
        first = len(self.tokens)
        self.close(path[shared:])
        path = path[:shared] + list(range(first, first + len(sequence) - shared))
        self.tokens += sequence[shared:]
        self.depth += range(shared, len(sequence))
        self.stop += [0] * (len(sequence) - shared)
        self.ends.append((number, path))
        return path

    def close(self, tokens: list[int]) -> None:
        """Say that nothing more continues these tokens."""
        for token in tokens:
            self.stop[token] = len(self.tokens)


def attended(stops: Tensor) -> Tensor:
    """Which tokens (last axis) each token attends to.

    Args:
        stops: ``Row.stop`` of rows, (rows, T) int64; padding has 0.

    Returns:
        (rows, 1, T, T) bool on the same device; padding attends to itself.
    """
    at = torch.arange(stops.shape[1], device=stops.device)
    stops = stops.maximum(at + 1)
    return ((at <= at[:, None]) & (at[:, None] < stops[:, None]))[:, None]


def pack(sequences: Sequence[list[int]]) -> list[Row]:
    """Pack sequences into rows, longest row first.

    In lexicographic order a sequence shares its longest prefix with the one before it, so one pass finds all prefixes that can be
    shared inside a row. A full row is closed, and the next one repeats the prefix.

    Args:
        sequences: Token ids, none of them empty; not modified. Equal ones are stored once.

    Returns:
        Rows; each sequence has its entry in ``ends`` of exactly one of them.
    """
    limit = max(SHORTEST_ROW, ROW_FACTOR * max(map(len, sequences), default=0))
    rows: list[Row] = []
    before: list[int] = []
    path: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[number]
        shared = _common(before, sequence)
        # Only the tokens behind the shared prefix are new to the row.
        if not rows or len(rows[-1].tokens) + len(sequence) - shared > limit:
            if rows:
                rows[-1].close(path)
            rows.append(Row())
            path, shared = [], 0
        path = rows[-1].add(number, sequence, path, shared)
        before = sequence
    if rows:
        rows[-1].close(path)
    return sorted(rows, key=lambda row: -len(row.tokens))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches(rows: Sequence[Row], token_budget: int) -> list[list[Row]]:
    """Cut rows, longest first, into batches of at most ``token_budget`` tokens, padding included; a row is never cut."""
    found: list[list[Row]] = []
    for row in rows:
        if found and (len(found[-1]) + 1) * len(found[-1][0].tokens) <= token_budget:
            found[-1].append(row)
        else:
            found.append([row])
    return found
