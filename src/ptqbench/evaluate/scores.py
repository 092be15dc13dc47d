"""Log-likelihoods of requests in chunks. Each chunk is stored when it is finished, so that a restart loses at most one.

    state/scores/<digest>.parquet    one row per request of a chunk: digest of its tokens, log-likelihood, whether it is greedy

Chunks are cut from all requests in lexicographic order. So requests that begin alike stay together, and a restart cuts the same
chunks. Imports no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from ptqbench.evaluate.records import read_records, write_records

Request = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""
Score = tuple[float, bool]
"""Log-likelihood in nats, and whether the continuation is the greedy one."""
CHUNK_BYTES = 16 << 30
"""Residual streams of the tokens of a chunk, which are held at once. The weights are read once per chunk."""


class Scores:
    """Scores requests, and computes only what is not known yet."""

    def __init__(
        self, compute: Callable[[list[Request]], list[Score]], folder: Path, run_id: str, chunk_tokens: int
    ) -> None:
        """Read what an earlier attempt has stored.

        Args:
            compute: Scores the requests of a chunk.
            folder: Where chunks are stored.
            run_id: The cell; files of other cells are not read.
            chunk_tokens: Most tokens of a chunk, where shared prefixes count every time. A request is never cut.
        """
        self._compute, self._folder, self._run_id, self._chunk_tokens = compute, folder, run_id, chunk_tokens
        self._known: dict[bytes, Score] = {}
        for path in sorted(folder.glob("*.parquet")):
            self._learn(read_records(path, run_id))

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Score requests, in their order."""
        keys = [_key(request) for request in requests]
        # Equal requests have one key, so each is scored once. A chunk is computed as a whole even if some of its scores are known.
        for chunk in self._chunks(dict(zip(keys, requests, strict=True))):
            if any(key not in self._known for key in chunk):
                self._score(chunk)
        return [self._known[key] for key in keys]

    def _chunks(self, requests: dict[bytes, Request]) -> list[dict[bytes, Request]]:
        chunks: list[dict[bytes, Request]] = []
        size = 0
        for key, (context, continuation) in sorted(requests.items(), key=lambda item: item[1][0] + item[1][1]):
            size += len(context) + len(continuation)
            if not chunks or size > self._chunk_tokens:
                chunks.append({})
                size = len(context) + len(continuation)
            chunks[-1][key] = context, continuation
        return chunks

    def _score(self, chunk: dict[bytes, Request]) -> None:
        scores = self._compute(list(chunk.values()))
        rows = [{"key": key, "value": v, "greedy": g} for key, (v, g) in zip(chunk, scores, strict=True)]
        name = hashlib.sha256(b"".join(chunk)).hexdigest()[:16]
        write_records(self._folder / f"{name}.parquet", rows, self._run_id, {})
        self._learn(rows)

    def _learn(self, rows: list[dict[str, object]]) -> None:
        self._known |= {row["key"]: (row["value"], row["greedy"]) for row in rows}  # type: ignore[misc]


def _key(request: Request) -> bytes:
    """Digest of a request, 16 bytes."""
    text = b"".join(array("q", [len(tokens), *tokens]).tobytes() for tokens in request)
    return hashlib.blake2b(text, digest_size=16).digest()
