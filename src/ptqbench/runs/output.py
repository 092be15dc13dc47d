"""A command and its standard output: characters that a terminal lacks, readers that close it, and no pauses for garbage."""

from __future__ import annotations

import codecs
import contextlib
import gc
import os
import sys
from collections.abc import Iterator


def print_anything() -> None:
    """Print characters that the terminal's encoding lacks in ASCII, instead of raising an error."""
    # Signs of our own tables and messages have a readable replacement; others are escaped.
    plain = dict(zip("±×–—−…≤≥→↓↑µ", ["+-", "x", "-", "-", "-", "...", "<=", ">=", "->", "v", "^", "u"], strict=True))

    def written(error: UnicodeError) -> tuple[str | bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(plain.get(c) or ascii(c)[1:-1] for c in error.object[error.start : error.end]), error.end

    codecs.register_error("ptqbench", written)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ptqbench")


def discard_output() -> None:
    """Drop what standard output did not take; else Python tries again at exit and prints a traceback."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would search thousands of rows that all stay in use to the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
