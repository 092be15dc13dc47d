"""Whether a short text fills one window, counted in the tokens of its model. Imports neither torch nor transformers.

``data.windows`` cuts the windows when the cell starts. A text that is too short would be found only there, so it is counted here by
the model's ``tokenizer.json``, whose token ids are those of the cell (``data.tokenizer``).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import CalibrationSpec, PerplexitySpec
from ptqbench.data.hub_texts import HUB_TEXTS
from ptqbench.data.protocols import PROTOCOLS
from ptqbench.data.texts import load_text
from ptqbench.errors import CalibrationError

BYTES_PER_TOKEN = 16
"""A text with more bytes than this for each token of a window is taken to fill the window, and is not tokenized here."""


def check_length(text: CalibrationSpec | PerplexitySpec, where: str, folder: Path) -> None:
    """Refuse a text of this machine that has fewer tokens than one window. Texts of the hub are not looked at.

    Args:
        text: The text, with its protocol.
        where: ``calibration`` or ``evaluation.texts.LABEL``.
        folder: The model, whose tokenizer counts. Without a ``tokenizer.json`` nothing is counted.

    Raises:
        CalibrationError: The text is too short, even with every special token that the tokenizer may add.
    """
    file = folder / "tokenizer.json"
    if (text.dataset in HUB_TEXTS and text.path is None) or not file.is_file():
        return
    documents, join, crops = _reading(text)
    pieces = documents if join is None else (join.join(documents),)
    # A crop lies inside one document; other windows are cut from the tokens of all documents together.
    together = max if crops else sum
    # A start is drawn from all tokens but those of the last window, so there must be one token more than a window.
    needed = text.seq_len + (crops or isinstance(text, CalibrationSpec))
    if together(len(piece.encode()) for piece in pieces) >= BYTES_PER_TOKEN * needed:
        return
    tokenizer = _tokenizer(file, file.stat().st_mtime_ns)
    if tokenizer is None:
        return
    # The tokenizer puts its special tokens around joined texts and around crops of an evaluation; else a document has a BOS alone.
    special = 2 if join is not None or (crops and isinstance(text, PerplexitySpec)) else int(_has_bos(folder))
    most = together(len(tokenizer.encode(piece, add_special_tokens=False).ids) + special for piece in pieces)
    if most < needed:
        raise CalibrationError(
            f"{where}: {text.path or text.dataset} has at most {most} tokens{' in a document' if crops else ''}, expected at "
            f"least {needed} for {where}.seq_len={text.seq_len}: give a longer text, or a smaller seq_len"
        )


def _reading(text: CalibrationSpec | PerplexitySpec) -> tuple[tuple[str, ...], str | None, bool]:
    """How ``data.windows`` reads a text: its documents, what joins them, and whether each window is a crop of one document."""
    found = load_text(text)
    if isinstance(text, CalibrationSpec):
        crops = text.sampling == "document_random"
        return found.documents, None if crops else found.join, crops
    protocol = PROTOCOLS[str(text.protocol)]
    return found.documents[: protocol.first_documents], protocol.join, protocol.sampled


@functools.lru_cache(maxsize=8)
def _tokenizer(file: Path, changed: int) -> Any:
    """The tokenizer of a file; None where it cannot be read, which the start of the cell explains."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises a bare Exception for a damaged file
        return None
    found.no_truncation()
    found.no_padding()
    return found


def _has_bos(folder: Path) -> bool:
    """Whether a document may open with a BOS token: unless the tokenizer's settings say that there is none."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(settings, dict) or settings.get("bos_token", "") is not None
