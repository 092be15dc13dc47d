"""Pack token sequences that begin alike into trees, so that a model computes every shared prefix once.

A row holds several sequences as a tree of tokens. A token attends to its ancestors and to itself, and its position is its depth.
So it sees exactly what it would see in its own sequence, and one forward over the row computes the states of every sequence.
Quantizers that work per token give the same result.

Legend: T tokens of a row; ``parent`` of a token is the index of the token before it in its sequence.
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
        runs: Pieces that were added: index of the first token, and indices of its ancestors in the row.
        ends: Per sequence, its number and the indices of its tokens in the row.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    depth: list[int] = dataclasses.field(default_factory=list)
    runs: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)
    ends: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)

    def add(self, number: int, sequence: Sequence[int], path: list[int], shared: int) -> list[int]:
        """Add a sequence below the first ``shared`` tokens of ``path``; return its own path."""
        first = len(self.tokens)
        path = path[:shared] + list(range(first, first + len(sequence) - shared))
        if len(sequence) > shared:
            self.runs.append((first, path[:shared]))
            self.tokens += sequence[shared:]
            self.depth += range(shared, len(sequence))
        self.ends.append((number, path))
        return path

    def mask(self, length: int) -> Tensor:
        """Which tokens (second axis) each token attends to, (length, length) bool; padding attends to itself."""
        seen = torch.eye(length, dtype=torch.bool)
        stops = [first for first, _ in self.runs[1:]] + [len(self.tokens)]
        # A piece sees the tokens before it in its sequence, and itself causally.
        for (first, ancestors), stop in zip(self.runs, stops, strict=True):
            seen[first:stop, ancestors] = True
            seen[first:stop, first:stop] = torch.ones(stop - first, stop - first, dtype=torch.bool).tril()
        return seen


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
            rows.append(Row())
            shared = 0
        path = rows[-1].add(number, sequence, path, shared)
        before = sequence
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
