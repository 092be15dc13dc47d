"""Values of options of the command line: names of files and folders, checked before any work is done, and amounts."""

from __future__ import annotations

import contextlib
import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")


def output_file(name: str) -> str:
    """Check the name of a file to be written.

    Raises:
        ArgumentTypeError: No file can have this name.
    """
    path = Path(name)
    try:
        if not name or path.is_dir() or name.endswith("/"):
            raise ArgumentTypeError(f"expected the name of a file, got {name!r}" + " (a folder)" * bool(name))
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise ArgumentTypeError(f"{name[:60]!r}: {error.strerror}") from None
    if not above.is_dir():
        raise ArgumentTypeError(f"{name!r} lies below {str(above)!r}, which is a file")
    return name


def picture_file(name: str) -> str:
    """Check the name of a picture to be drawn."""
    if Path(output_file(name)).suffix.lower() not in PICTURES:
        raise ArgumentTypeError(f"expected a name that ends in {', '.join(PICTURES)}, got {name!r}")
    return name


def write_output(name: str, text: str) -> None:
    """Write a text to a place that a person chose. A link is followed, a device or a pipe is written to, a file is replaced whole.

    Args:
        name: A name that ``output_file`` has passed.
        text: The content, written as UTF-8.

    Raises:
        OSError: It cannot be written.
    """
    from ptqbench.runs.files import write_text

    # A rename would replace a link, a device or a pipe instead of writing to it.
    path = Path(os.path.realpath(name))
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
    else:
        write_text(path, text)


def runs_folder(name: str) -> str:
    """Check the name of a folder of run folders."""
    if not name:
        raise ArgumentTypeError("expected a folder, got ''")
    try:
        if Path(name).exists() and not Path(name).is_dir():
            raise ArgumentTypeError(f"expected a folder, got the file {name!r}")
    except OSError as error:
        raise ArgumentTypeError(f"{name[:60]!r}: {error.strerror}") from None
    return name


def existing_runs_folder(name: str) -> str:
    """Check the name of a folder of run folders for a command that only reads, so that the folder must exist."""
    if not Path(runs_folder(name)).is_dir():
        raise ArgumentTypeError(f"no such folder {name!r} (looked in {Path.cwd()})")
    return name


def gib(text: str) -> float:
    """Read an amount of memory or disk, GiB."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"expected GiB, a number of at least 0, got {text!r}")


def seconds(text: str) -> float:
    """Read the time between two looks, seconds."""
    with contextlib.suppress(ValueError):
        if 0.1 <= float(text) <= 86400:
            return float(text)
    raise ArgumentTypeError(f"expected seconds, a number from 0.1 to 86400, got {text!r} (the sweep stands before it)")


def natural(text: str) -> int:
    """Read a number of things."""
    if text.isascii() and text.isdigit():
        return int(text)
    raise ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
