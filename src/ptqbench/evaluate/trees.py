"""Pack token sequences that begin alike into trees, so that a model computes every shared prefix once.

A row holds several sequences as a tree of tokens. A token attends to its ancestors and to itself, and its position is its
depth; so it sees exactly what it would see in its own sequence, and one forward over the row gives every sequence its
states. Quantizers that work per token are not changed by this.

Legend: T tokens of a row; ``parent`` of a token is the index of the token before it in its sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

SHORTEST_ROW = 512
"""A row is at least so long where there are tokens to fill it: short trees share a row."""
ROW_FACTOR = 4
"""A row is at most so many times the longest sequence: attention costs its square."""


@dataclasses.dataclass
class Row:
    """A tree of tokens.

    Attributes:
        tokens: Token ids.
        depth: Position of each token in its sequence.
        runs: Added pieces: first token of the piece, and the indices of its ancestors in the row.
        ends: (number of the sequence, indices of its tokens in the row).
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
        """Which tokens each token attends to, (length, length) bool; padding attends to itself."""
        seen = torch.eye(length, dtype=torch.bool)
        stops = [first for first, _ in self.runs[1:]] + [len(self.tokens)]
        for (first, ancestors), stop in zip(self.runs, stops, strict=True):
            seen[first:stop, ancestors] = True
            seen[first:stop, first:stop] = torch.ones(stop - first, stop - first, dtype=torch.bool).tril()
        return seen


def pack(sequences: Sequence[list[int]]) -> list[Row]:
    """Pack sequences into rows, longest row first.

    In lexicographic order a sequence shares its longest prefix with the one before it, so one pass finds all that can be
    shared inside a row. A row that is full is closed, and the next one repeats the prefix.

    Args:
        sequences: Token ids, none empty; not modified. Equal ones become one.

    Returns:
        Rows; every number of a sequence stands in ``ends`` of exactly one of them.
    """
    limit = max(SHORTEST_ROW, ROW_FACTOR * max(map(len, sequences), default=0))
    rows: list[Row] = []
    before: list[int] = []
    path: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[number]
        shared = _common(before, sequence)
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
