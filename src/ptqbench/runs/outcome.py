"""What an exception outside a cell means on a command line: one line for a person, and an exit status.

Status 1 means that the environment or a cell failed, 2 that the request was wrong. Exceptions inside a cell are recorded by
``runs.attempt``.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

from ptqbench.errors import CalibrationError, ConfigError, PtqbenchError, RunFailed, UnsupportedError
from ptqbench.runs.failures import classify

WRONG_PLACE = {
    errno.ENOENT: "is not there",
    errno.ENOTDIR: "lies below a file",
    errno.EISDIR: "is a folder, where a file is expected",
    errno.EEXIST: "is a file, where a folder is expected",
    errno.ENAMETOOLONG: "is a name that is too long",
    errno.ELOOP: "is a link that leads to itself",
    errno.EACCES: "may not be read or written by this user",
    errno.EPERM: "may not be changed by this user",
}
"""Errors about a path that a person named. All others are faults of a disk or a machine."""


WRONG, INTERRUPTED, CLOSED = 2, 130, 141
"""Exit statuses of a command whose request was wrong, that SIGINT has ended, and whose output its reader has closed."""


def report(error: BaseException) -> int:
    """Print one line about an exception on standard error; raise it again where ``PTQBENCH_TRACEBACK`` is set.

    Returns:
        The exit status of the command.
    """
    if _interrupts(error):
        print("ptqbench: interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    if os.environ.get("PTQBENCH_TRACEBACK"):
        raise error
    said, status = outcome(error)
    print(f"ptqbench: {said}", file=sys.stderr)
    return status


def _interrupts(error: BaseException | None) -> bool:
    """Whether an exception is an interruption, or a library raised it while it cleaned up after one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def outcome(error: BaseException) -> tuple[str, int]:
    """What went wrong in one line, and the exit status with which a command ends."""
    # Errors of ours say everything; what remains is whose fault they are.
    if isinstance(error, RunFailed):
        return one_line(error), 1
    if isinstance(error, PtqbenchError):
        place = isinstance(error.__cause__, OSError) and error.__cause__.errno in WRONG_PLACE
        wrong = isinstance(error, ConfigError | UnsupportedError | CalibrationError) or place
        return one_line(error), 2 if wrong else 1
    # A path that a person named.
    if isinstance(error, OSError) and error.filename is not None and error.errno in WRONG_PLACE:
        return f"{str(error.filename)!r} {WRONG_PLACE[error.errno]}", 2
    # Errors of the system and of libraries get the advice of their kind.
    kind = classify(error)
    status = 2 if kind.name == "config" else 1
    if isinstance(error, OSError):
        at = "" if error.filename is None else f" ({error.filename})"
        advice = f"; {kind.advice}" if kind.name != "code" else ""
        return f"{error.strerror or one_line(error)}{at}{advice}", status
    if isinstance(error, MemoryError):
        return f"out of memory; {kind.advice}", 1
    if kind.name != "code":
        return f"{type(error).__name__}: {one_line(error)}; {kind.advice}", status
    # No check and no library has foreseen it.
    return f"a defect of ptqbench, please report it: {type(error).__name__}: {one_line(error)} ({_place(error)})", 1


def as_problem(error: Exception) -> PtqbenchError:
    """Turn an exception that was raised while a cell was composed into the problem of that cell."""
    said, status = outcome(error)
    return ConfigError(said) if status == 2 else PtqbenchError(said)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _place(error: BaseException) -> str:
    """File and line of the last frame inside ptqbench."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ptqbench" in frame.filename] or frames
    return f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "unknown place"
