"""Files that several processes and several people share: atomic writes, one reader of JSON, permissions, locks.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ptqbench.errors import StorageError
from ptqbench.runs.processes import machine, started

TEMPORARY = ".*tmp*"
"""Pattern of half-written files: those of ``replacing``, and those that safetensors makes beside them (``.tmpXXXXXX``)."""
OLD_S = 3600.0
"""Age in seconds from which a temporary file of an unknown writer is that of a killed process."""
WRITER = re.compile(r"\.([0-9a-f]{8})-(\d+)\.")
"""Machine and process number of the writer, in the name of a temporary file."""
END_OF_TIME_S = 253402300800.0
"""The year 10000 in seconds since the epoch; ``time.localtime`` and its like end before it."""
ABSENT = (errno.ENOENT, errno.ENOTDIR)
"""Errors that mean that there is no such file."""
ERRNO_IN_WORDS = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: a temporary file, ``fsync``, a rename. A reader sees the old content or the new, never a part.

    The permissions are those that the umask gives to a new file, also where the block replaces the temporary file by one of
    other permissions (safetensors creates 0600).

    Args:
        path: The file; its folder is created.

    Yields:
        The temporary file to write into. It replaces the file when the block ends, and is removed when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name says who writes it; the pattern TEMPORARY finds it after a kill.
    temporary = path.with_name(temporary_prefix(path) + "tmp")
    try:
        # Made here first, so that its permissions are known before the block replaces it.
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with temporary.open("rb") as stream:
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())  # before the rename, else a power loss could leave an empty file under the name
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_prefix(path: Path) -> str:
    """Beginning of the names of temporary files that this process writes for ``path``; they end in ``tmp``."""
    return f".{path.name}.{_here()}-{os.getpid()}."


@functools.cache
def _here() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, sorted and indented for people, with NaN refused."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_bytes(path: Path | str) -> bytes:
    """Read a whole file. For the small files of a run folder this takes a third of the time of ``Path.read_bytes``."""
    with open(path, "rb", buffering=0) as stream:
        return stream.read()


def read_json(path: Path | str) -> Any | None:
    """Read JSON.

    Returns:
        The content; None where the file is missing, truncated, nested too deep, or not JSON.

    Raises:
        StorageError: The file is there and cannot be read now, e.g. no permission or a failing file system.
    """
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise StorageError.of(error, f"{path} cannot be read") from error
    except (ValueError, RecursionError):
        return None


def read_record(path: Path | str) -> dict[str, Any]:
    """Read a JSON object as ``read_json`` does; empty where the content is missing or no object."""
    data = read_json(path)
    return data if isinstance(data, dict) else {}


def number(record: Mapping[str, Any], name: str) -> float | None:
    """Read a field of a record that is a finite number; None where it is missing or anything else."""
    value = record.get(name)
    # True is an int for Python, and no number for JSON.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def moment(record: Mapping[str, Any], name: str) -> float | None:
    """Read a field of a record that is a time, seconds since the epoch; None where it is no time from 1970 to 9999."""
    value = number(record, name)
    return value if value is not None and 0 <= value < END_OF_TIME_S else None


def is_readable(path: Path) -> bool:
    """Whether a file exists; for libraries that report every failure to open one as "no such file".

    Raises:
        StorageError: The file is there and cannot be read now.
    """
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise StorageError.of(error, f"{path} cannot be read") from error


def errno_of(error: BaseException) -> int | None:
    """The ``errno`` of an error, also where a library has it only in its message (``os error 28``); None where it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = ERRNO_IN_WORDS.search(str(error))
    return int(found[1]) if found else None


def file_lock(path: Path, timeout: float = -1) -> FileLock:
    """Make a lock that other users of the same group can take too.

    Args:
        path: The lock's file, created with the permissions that the umask gives.
        timeout: Seconds to wait for the lock; -1 waits for ever.
    """
    # filelock would create the file with permissions of its own.
    if not path.exists():
        path.touch()
    return FileLock(path, timeout=timeout, mode=stat.S_IMODE(path.stat().st_mode))


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove temporary files and folders; the caller knows that no living process writes them."""
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def abandoned(folder: Path) -> Iterator[Path]:
    """Find temporary files in a folder whose process has ended on this machine, or that are older than ``OLD_S``."""
    for path in folder.glob(TEMPORARY):
        writer = WRITER.search(path.name)
        gone = writer is not None and writer[1] == _here() and started(int(writer[2])) is None
        with contextlib.suppress(OSError):  # its writer has renamed it meanwhile
            if gone or time.time() - path.stat().st_mtime > OLD_S:
                yield path
