"""From text to windows of tokens: (n_windows, seq_len) int64.

Calibration draws windows at random (seeded); evaluation follows a named protocol (``data.protocols``).
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqbench.cell.spec import CalibrationSpec, PerplexitySpec
from ptqbench.data.protocols import MAX_DRAWS, PROTOCOLS, complete
from ptqbench.data.texts import Text, load_text
from ptqbench.errors import CalibrationError, ConfigError


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint folder.

    Raises:
        ConfigError: It cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers reports a damaged file by a bare Exception
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from None


def tokenize(text: Text, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Turn a text into rows of token ids: one per document, or a single one if the documents are joined.

    Raises:
        CalibrationError: The tokenizer yields ids the model has no embedding for.
    """
    if text.join is not None:
        rows = [tokenizer(text.join.join(text.documents), verbose=False).input_ids]
    else:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        encoded = tokenizer(list(text.documents), add_special_tokens=False, verbose=False).input_ids
        rows = [bos + list(ids) for ids in encoded]
    _check(rows, vocab_size)
    return rows


def _check(rows: list[list[int]], vocab_size: int) -> None:
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer does not match the model: it yields token id {largest}, the model embeds ids below {vocab_size}"
        )


def calibration_windows(spec: CalibrationSpec, tokenizer: Any, vocab_size: int, seed: int) -> Tensor:
    """Draw calibration windows.

    Args:
        spec: ``joined_random`` draws start positions uniformly over the whole row of tokens; ``document_random`` draws a
            document until it is longer than ``seq_len``, then a crop of it (the C4 protocol of the GPTQ code).
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.
        seed: Seed of the cell.

    Returns:
        (n_samples, seq_len) int64.

    Raises:
        CalibrationError: The text is shorter than one window, or no document is long enough.
    """
    text, rng = load_text(spec), _rng(seed, "calibration")
    if spec.sampling == "document_random":
        windows = [_document_crop(text, spec.seq_len, tokenizer, vocab_size, rng) for _ in range(spec.n_samples)]
    else:
        row = [token for row in tokenize(text, tokenizer, vocab_size) for token in row]
        if len(row) <= spec.seq_len:
            raise CalibrationError(
                f"calibration text {spec.dataset!r} has {len(row)} tokens, not more than calibration.seq_len={spec.seq_len}"
            )
        starts = [_below(rng, len(row) - spec.seq_len) for _ in range(spec.n_samples)]
        windows = [row[start : start + spec.seq_len] for start in starts]
    return torch.tensor(windows, dtype=torch.int64)


def _document_crop(text: Text, seq_len: int, tokenizer: Any, vocab_size: int, rng: random.Random) -> list[int]:
    for _ in range(MAX_DRAWS):
        document = text.documents[_below(rng, len(text.documents))]
        row = tokenize(Text((document,), None), tokenizer, vocab_size)[0]
        if len(row) > seq_len:
            start = _below(rng, len(row) - seq_len)
            return row[start : start + seq_len]
    raise CalibrationError(
        f"no document of more than {seq_len} tokens in {MAX_DRAWS} draws; use calibration.sampling=joined_random"
    )


def evaluation_windows(spec: PerplexitySpec, tokenizer: Any, vocab_size: int) -> Tensor:
    """Cut a text into windows (n_windows, seq_len) int64 as its protocol says.

    Args:
        spec: Text, protocol (that of its data set by default) and window length.
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.

    Raises:
        CalibrationError: The text is shorter than one window, or no document is long enough to crop.
    """
    spec = complete(spec)
    protocol, text = PROTOCOLS[str(spec.protocol)], load_text(spec)
    documents = text.documents[: protocol.first_documents]
    if protocol.sampled:
        return _sampled_windows(documents, spec.seq_len, protocol.max_windows or 0, tokenizer, vocab_size)
    rows = tokenize(Text(documents, protocol.join), tokenizer, vocab_size)
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    n_windows = len(tokens) // spec.seq_len
    if n_windows == 0:
        raise CalibrationError(
            f"evaluation text {spec.dataset!r} has {len(tokens)} tokens, fewer than one window of seq_len={spec.seq_len}"
        )
    windows = tokens[: n_windows * spec.seq_len].view(n_windows, spec.seq_len)
    return windows[: protocol.max_windows]


def _sampled_windows(
    documents: tuple[str, ...], seq_len: int, n_windows: int, tokenizer: Any, vocab_size: int
) -> Tensor:
    """Crop windows from documents drawn with replacement until one is longer than ``seq_len`` (GPTQ's ``get_c4``, seed 0).

    Deviation: the GPTQ code also accepts a document of exactly ``seq_len`` tokens and then fails in ``randint``; here it is
    drawn again.
    """
    rng, windows = random.Random(0), []
    for _ in range(n_windows):
        for _ in range(MAX_DRAWS):
            row = tokenizer(documents[rng.randint(0, len(documents) - 1)], verbose=False).input_ids
            if len(row) > seq_len:
                break
        else:
            raise CalibrationError(
                f"no document of more than {seq_len} tokens in {MAX_DRAWS} draws of the evaluation text"
            )
        start = rng.randint(0, len(row) - seq_len - 1)
        windows.append(list(row[start : start + seq_len]))
    _check(windows, vocab_size)
    return torch.tensor(windows, dtype=torch.int64)


def _rng(seed: int, name: str) -> random.Random:
    """Derive an independent stream from (seed, name); only ``random()`` is used, which no Python version may change."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big"))


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)
