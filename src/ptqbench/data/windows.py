"""From text to windows of tokens, (n_windows, seq_len) int64.

Calibration draws windows at random, with the seed of the cell. Evaluation follows a named protocol (``data.protocols``).
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqbench.cell.spec import CalibrationSpec, PerplexitySpec
from ptqbench.data.protocols import MAX_DRAWS, PROTOCOLS, complete
from ptqbench.data.texts import Text, load_text
from ptqbench.data.window_files import read_windows, windows_digest
from ptqbench.errors import CalibrationError, ConfigError

BATCH_CHARACTERS = 1 << 20
"""Documents are tokenized in batches of at most so many characters, or one longer document, which bounds the memory."""


def tokenize(text: Text, tokenizer: Any, vocab_size: int) -> Iterator[list[int]]:
    """Turn a text into rows of token ids: one per document, or a single one if the documents are joined.

    Raises:
        CalibrationError: The tokenizer yields ids that the model has no embedding for.
    """
    # Joined: one string, with the special tokens that the tokenizer adds.
    if text.join is not None:
        joined = [tokenizer(text.join.join(text.documents), verbose=False).input_ids]
        _check(joined, vocab_size)
        yield from joined
        return
    # Separated: every document opens with BOS if there is one, whatever the tokenizer adds.
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for batch in _batches(text.documents):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
        rows = [bos + list(ids) for ids in encoded]
        _check(rows, vocab_size)
        yield from rows


def _batches(documents: tuple[str, ...]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and size + len(document) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


def _row(text: Text, tokenizer: Any, vocab_size: int) -> Tensor:
    """All tokens of a text one after another, (n_tokens,) int64."""
    row = array("q")  # eight bytes per token, where a list would take more
    for ids in tokenize(text, tokenizer, vocab_size):
        row.extend(ids)
    return torch.frombuffer(row, dtype=torch.int64) if row else torch.zeros(0, dtype=torch.int64)


def _check(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    largest = max((max(row) for row in rows if len(row)), default=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer does not match the model: it yields token id {largest}, the model embeds ids below {vocab_size}"
        )


def calibration_windows(spec: CalibrationSpec, tokenizer: Any, vocab_size: int, seed: int) -> Tensor:
    """Draw calibration windows.

    Args:
        spec: If ``windows`` names a file, its first ``n_samples`` windows are taken. ``joined_random`` draws start positions
            uniformly over the whole row of tokens. ``document_random`` draws documents until one is longer than ``seq_len``, then
            a crop of it (the C4 protocol of the GPTQ code).
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.
        seed: Seed of the cell.

    Returns:
        (n_samples, seq_len) int64.

    Raises:
        CalibrationError: The text is shorter than one window, no document is long enough, or the file has fewer windows or
            token ids that the model does not have.
        ConfigError: The file of windows has changed since the cell was composed.
    """
    if spec.windows is not None:
        return _given_windows(spec, vocab_size)
    text, rng = load_text(spec), _rng(seed, "calibration")
    if spec.sampling == "document_random":
        return _crops(
            (spec.n_samples, spec.seq_len),
            text.documents,
            encode=lambda document: next(tokenize(Text((document,), None), tokenizer, vocab_size)),
            draw=lambda n: _below(rng, n),
            advice="; use calibration.sampling=joined_random",
        )
    row = _row(text, tokenizer, vocab_size)
    if len(row) <= spec.seq_len:
        raise CalibrationError(
            f"calibration text {spec.dataset!r} has {len(row)} tokens, not more than calibration.seq_len={spec.seq_len}"
        )
    starts = [_below(rng, len(row) - spec.seq_len) for _ in range(spec.n_samples)]
    return torch.stack([row[start : start + spec.seq_len] for start in starts])


def _given_windows(spec: CalibrationSpec, vocab_size: int) -> Tensor:
    ids = read_windows(str(spec.windows))
    if spec.digest is not None and windows_digest(ids) != spec.digest:
        raise ConfigError(
            f"calibration.windows={spec.windows!r} has changed since this cell was composed: expected the content "
            f"{spec.digest}, found {windows_digest(ids)}"
        )
    if len(ids) < spec.n_samples:
        raise CalibrationError(
            f"calibration.windows={spec.windows!r} has {len(ids)} windows, the method takes {spec.n_samples}"
        )
    if ids.max() >= vocab_size:
        raise CalibrationError(
            f"calibration.windows={spec.windows!r} holds token id {ids.max()}, the model embeds ids below {vocab_size}: "
            f"the windows belong to another tokenizer"
        )
    return torch.from_numpy(ids[: spec.n_samples].astype("int64"))


def _crops(
    shape: tuple[int, int],
    documents: tuple[str, ...],
    encode: Callable[[str], list[int]],
    draw: Callable[[int], int],
    advice: str,
) -> Tensor:
    """Crop windows (n_windows, seq_len) from documents, each from the first drawn document that is longer than ``seq_len``.

    ``draw(n)`` gives an integer below n; documents are drawn with replacement. Deviation: the GPTQ code also accepts a document of
    exactly ``seq_len`` tokens and then fails in ``randint``. Here another document is drawn.
    """
    n_windows, seq_len = shape
    windows = []
    for _ in range(n_windows):
        rows = (encode(documents[draw(len(documents))]) for _ in range(MAX_DRAWS))
        row = next((row for row in rows if len(row) > seq_len), None)
        if row is None:
            raise CalibrationError(f"no document of more than {seq_len} tokens in {MAX_DRAWS} draws{advice}")
        start = draw(len(row) - seq_len)
        windows.append(row[start : start + seq_len])
    return torch.tensor(windows, dtype=torch.int64)


def evaluation_windows(spec: PerplexitySpec, tokenizer: Any, vocab_size: int) -> Tensor:
    """Cut a text into windows (n_windows, seq_len) int64 as its protocol says.

    Args:
        spec: Text, protocol (by default that of its data set) and window length.
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.

    Raises:
        CalibrationError: The text is shorter than one window, or no document is long enough to crop.
    """
    spec = complete(spec)
    protocol, text = PROTOCOLS[str(spec.protocol)], load_text(spec)
    documents = text.documents[: protocol.first_documents]
    # Random crops, each of one document.
    if protocol.sampled:
        rng = random.Random(0)  # the seed and the draws of GPTQ's get_c4
        windows = _crops(
            (protocol.max_windows or 0, spec.seq_len),
            documents,
            encode=lambda document: tokenizer(document, verbose=False).input_ids,
            draw=lambda n: rng.randint(0, n - 1),
            advice=" of the evaluation text",
        )
        _check(windows.tolist(), vocab_size)
        return windows
    # Or all tokens in a row, cut without overlap; the remainder is dropped.
    tokens = _row(Text(documents, protocol.join), tokenizer, vocab_size)
    n_windows = len(tokens) // spec.seq_len
    if n_windows == 0:
        raise CalibrationError(
            f"evaluation text {spec.dataset!r} has {len(tokens)} tokens, fewer than one window of seq_len={spec.seq_len}"
        )
    windows = tokens[: n_windows * spec.seq_len].view(n_windows, spec.seq_len)
    return windows[: protocol.max_windows]


def _rng(seed: int, name: str) -> random.Random:
    """Derive an independent stream from (seed, name). Only its ``random()`` is used, which no version of Python may change."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big"))


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)
