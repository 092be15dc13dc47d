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
"""Pattern of files half written: those of ``replacing``, and those that safetensors writes beside them (``.tmpXXXXXX``)."""
OLD_S = 3600.0
"""A file half written that is so old has no writer any more, wherever that was."""
WRITER = re.compile(r"\.([0-9a-f]{8})-(\d+)\.")
"""Which machine and which process write a temporary file, in its name."""
END_OF_TIME_S = 253402300800.0
"""The beginning of the year 10000, which no calendar of the system goes beyond."""
ABSENT = (errno.ENOENT, errno.ENOTDIR)
ERRNO_IN_WORDS = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a reader sees the old content or the new, never a part: temporary, fsync, rename.

    The permissions are those that the umask gives to a new file, whatever the writer inside does (safetensors creates 0600).

    Args:
        path: The file; its folder is created.

    Yields:
        Where to write the new content. It takes the file's place when the block ends, and is removed when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_prefix(path) + "tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with temporary.open("rb") as stream:
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_prefix(path: Path) -> str:
    """How the names of files begin that this process writes on the way to ``path``; they end in ``tmp``."""
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
    """Read a file as a whole: a third of the time of ``Path.read_bytes`` for the small files of a run folder."""
    with open(path, "rb", buffering=0) as stream:
        return stream.read()


def read_json(path: Path | str) -> Any | None:
    """Read JSON.

    Returns:
        The content; None where the file is missing, truncated, nested too deep, or not JSON.

    Raises:
        StorageError: The file is there and cannot be read now: no permission, a failing file system.
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
    """Read a JSON object; empty where ``read_json`` has None or something else."""
    data = read_json(path)
    return data if isinstance(data, dict) else {}


def number(record: Mapping[str, Any], name: str) -> float | None:
    """Read a field that is a finite number; None where it is missing or anything else."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def moment(record: Mapping[str, Any], name: str) -> float | None:
    """Read a field that is a time, seconds since the epoch; None where it is anything else, or in no year from 1970 to 9999."""
    value = number(record, name)
    return value if value is not None and 0 <= value < END_OF_TIME_S else None


def is_readable(path: Path) -> bool:
    """Whether a file is there, before a library opens it that calls every failure to open "no such file".

    Raises:
        StorageError: The file is there and cannot be read now; it is not damaged.
    """
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise StorageError.of(error, f"{path} cannot be read") from error


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, also where a library has it in its words only (``os error 28``)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = ERRNO_IN_WORDS.search(str(error))
    return int(found[1]) if found else None


def file_lock(path: Path, timeout: float = -1) -> FileLock:
    """Make the lock of a file that others of the same group can take too.

    Args:
        path: The lock's file, created with the permissions that the umask gives.
        timeout: Seconds to wait for it; -1 is for ever.
    """
    if not path.exists():
        path.touch()
    return FileLock(path, timeout=timeout, mode=stat.S_IMODE(path.stat().st_mode))


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove files or folders half written whose writer is gone; the caller knows that they are nobody's."""
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def abandoned(folder: Path) -> Iterator[Path]:
    """Find the files half written in a folder whose process is gone from this machine, or that are older than ``OLD_S``."""
    for path in folder.glob(TEMPORARY):
        writer = WRITER.search(path.name)
        gone = writer is not None and writer[1] == _here() and started(int(writer[2])) is None
        with contextlib.suppress(OSError):  # its writer has just put it in its place
            if gone or time.time() - path.stat().st_mtime > OLD_S:
                yield path
