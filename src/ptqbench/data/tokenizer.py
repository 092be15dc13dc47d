"""The tokenizer of a checkpoint, checked against the token ids of its ``tokenizer.json``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ptqbench.errors import ConfigError, first_line

T = TypeVar("T")

SAMPLE = (
    "Once upon a time, there was a little girl who didn't like 3.14159 or 1,024 apples; she'd say: \"No!\"\n\n"
    " = Robert Boulter = \n\tfor (int i = 0; i < n; ++i) { x[i] += 2**i; }  # two  spaces\r\n"
    "Größe, naïve façade, Ελληνικά, Русский язык, 你好，世界。こんにちは 안녕하세요 مرحبا שלום हिन्दी "
    "\u00e9 e\u0301 ﬁ ½ ™ … – — “quoted” ‘so’ 😀 👩‍👩‍👧 \u00a0\u200b\u3000 END_of CamelCase HTTPServer2 aaaaaaaa ........ \n\n\n x"
)
"""Text that tokenizers divide in different ways: quotes, digits, spaces, line ends, code, scripts, composed characters, emoji."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint folder.

    transformers builds the tokenizers of some classes from the vocabulary alone. If such a tokenizer gives other ids for ``SAMPLE``
    than ``tokenizer.json``, the tokenizer is made from ``tokenizer.json``, and the log says so.

    Raises:
        ConfigError: It cannot be read, or does not follow its own ``tokenizer.json``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _read(folder, lambda: AutoTokenizer.from_pretrained(folder))
    expected = _read(folder, lambda: _ids_of_file(file))
    # Take the class that transformers chooses, if it gives the ids of the file.
    found: Any = None
    try:
        found = _read(folder, lambda: AutoTokenizer.from_pretrained(folder))
        if _read(folder, lambda: _ids(found)) == expected:
            return found
    except ConfigError:  # the class that the configuration names may be unable to read or use a sound file
        pass
    # Else the file itself is the tokenizer.
    plain = _read(folder, lambda: PreTrainedTokenizerFast.from_pretrained(folder))
    if _ids(plain) != expected:
        raise ConfigError(
            f"the tokenizer in {folder} gives other token ids than its tokenizer.json; expected the same ids: restore the "
            f"tokenizer files of the original checkpoint"
        )
    logging.getLogger("ptqbench").warning(
        "token ids are those of %s: %s, the class that transformers takes, gives others or cannot read it",
        file,
        type(found).__name__ if found is not None else "AutoTokenizer",
    )
    return plain


def _read(folder: Path, look: Callable[[], T]) -> T:
    """Call a function that reads or uses the tokenizer of a folder; its errors become one line.

    Raises:
        ConfigError: It fails in any way.
    """
    try:
        return look()
    except Exception as error:  # tokenizers reports a damaged file by a bare Exception
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from None


def _ids_of_file(file: Path) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # Settings of a training run that may be saved with it; transformers sets its own for every call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return list(tokenizer.encode(SAMPLE, add_special_tokens=False).ids)


def _ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(SAMPLE, add_special_tokens=False, verbose=False).input_ids)
