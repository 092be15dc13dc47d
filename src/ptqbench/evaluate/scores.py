"""Log-likelihoods of requests in chunks. Each chunk is stored when it is finished, so that a restart loses at most one.

    state/scores/<digest>.parquet    one row per request of a chunk: digest of its tokens, log-likelihood, whether it is greedy

Chunks are cut from all requests in lexicographic order. So requests that begin alike stay together, and a restart cuts the same
chunks. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ptqbench.evaluate.records import read_records, write_records

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.runs.artefacts import Artefacts

Request = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""
Score = tuple[float, bool]
"""Log-likelihood in nats, and whether the continuation is the greedy one."""
CHUNK_BYTES = 16 << 30
"""Residual streams of the tokens of a chunk, which are held at once. The weights are read once per chunk."""


class Store(Protocol):
    """Where finished chunks are kept."""

    def known(self) -> dict[bytes, Score]:
        """Scores by the digests of their requests, which need not be computed."""

    def get(self, keys: Sequence[bytes], compute: Callable[[], list[Score]]) -> list[Score]:
        """Scores of the requests of a chunk: stored ones, or computed and stored."""


@dataclasses.dataclass(frozen=True)
class RunStore:
    """Chunks in the run folder of a cell.

    Attributes:
        folder: The folder of the chunks.
        run_id: The cell; files of other cells are not read.
    """

    folder: Path
    run_id: str

    def known(self) -> dict[bytes, Score]:
        rows = [row for path in sorted(self.folder.glob("*.parquet")) for row in read_records(path, self.run_id)]
        return {row["key"]: (row["value"], row["greedy"]) for row in rows}

    def get(self, keys: Sequence[bytes], compute: Callable[[], list[Score]]) -> list[Score]:
        scores = compute()
        rows = [{"key": key, "value": v, "greedy": g} for key, (v, g) in zip(keys, scores, strict=True)]
        write_records(self.folder / f"{_name(keys)}.parquet", rows, self.run_id, {})
        return scores


@dataclasses.dataclass(frozen=True)
class SharedStore:
    """Chunks that all cells share.

    Attributes:
        artefacts: Where they are.
        key: What scores are a function of, beside the requests: plain data.
    """

    artefacts: Artefacts
    key: Mapping[str, Any]

    def known(self) -> dict[bytes, Score]:
        return {}

    def get(self, keys: Sequence[bytes], compute: Callable[[], list[Score]]) -> list[Score]:
        def make() -> dict[str, Tensor]:
            import torch

            values, greedy = zip(*compute(), strict=True)
            return {"value": torch.tensor(values, dtype=torch.float64), "greedy": torch.tensor(greedy)}

        found = self.artefacts.get("scores", {**self.key, "requests": _name(keys)}, make)
        return list(zip(found["value"].tolist(), found["greedy"].tolist(), strict=True))


class Scores:
    """Scores requests, and computes only what is not known yet."""

    def __init__(self, compute: Callable[[list[Request]], list[Score]], store: Store, chunk_tokens: int) -> None:
        """Read what an earlier attempt has stored.

        Args:
            compute: Scores the requests of a chunk.
            store: Where chunks are stored.
            chunk_tokens: Most tokens of a chunk, where shared prefixes count every time. A request is never cut.
        """
        self._compute, self._store, self._chunk_tokens = compute, store, chunk_tokens
        self._known = store.known()

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Score requests, in their order."""
        keys = [_key(request) for request in requests]
        # Equal requests have one key, so each is scored once. A chunk is computed as a whole even if some of its scores are known.
        for chunk in self._chunks(dict(zip(keys, requests, strict=True))):
            if any(key not in self._known for key in chunk):
                found = self._store.get(list(chunk), functools.partial(self._compute, list(chunk.values())))
                self._known |= dict(zip(chunk, found, strict=True))
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


def _key(request: Request) -> bytes:
    """Digest of a request, 16 bytes."""
    text = b"".join(array("q", [len(tokens), *tokens]).tobytes() for tokens in request)
    return hashlib.blake2b(text, digest_size=16).digest()


def _name(keys: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(keys)).hexdigest()[:16]
