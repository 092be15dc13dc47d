"""Exceptions that a user is meant to read.

Every message is one line and says what was expected, what was given, where, and what to do. The command line prints
``ConfigError`` and ``UnsupportedError`` without a traceback and exits with status 2. An error that is raised after a run has
begun is also recorded in ``failure.json`` of that run.
"""

from __future__ import annotations

import errno
from typing import Self


class PtqbenchError(Exception):
    """Base class of every error that ptqbench raises on purpose."""


class ConfigError(PtqbenchError):
    """The request itself is wrong: unknown name, wrong type, impossible value, missing file."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows instead of a traceback, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


class NotHereError(ConfigError):
    """A model or a data set of the hub is neither on this machine nor can it be downloaded now."""


class DataNotHereError(NotHereError):
    """A data set of the hub is neither on this machine nor can it be downloaded now."""

    def __init__(self, message: str, repository: str = "") -> None:
        """Say what is missing.

        Args:
            message: One line, for people.
            repository: The data set. It has a default because pickle passes the message alone and sets attributes afterwards.
        """
        super().__init__(message)
        self.repository = repository


class StorageError(PtqbenchError):
    """A file or folder cannot be read or written now: no permission, a full disk, a failing file system. It is not damaged."""

    @classmethod
    def of(cls, error: OSError, what: str) -> Self:
        """Make one line of an error of the system.

        Args:
            error: The error of the system.
            what: The beginning of the line: the file, and what could not be done with it.
        """
        advice = "; ask its owner for access" if error.errno in (errno.EACCES, errno.EPERM) else ""
        return cls(f"{what}: {error.strerror or error}{advice}")


class UnsupportedError(PtqbenchError):
    """The request is well formed but lies outside what the code can do exactly."""


class CalibrationError(PtqbenchError):
    """Calibration or evaluation data do not serve the request: too short, empty, or of another tokenizer."""


class NumericalError(PtqbenchError):
    """A tensor holds NaN or infinity, or a factorisation failed; names the block, the linear and the damping."""


class RunFailed(PtqbenchError):
    """A cell ended in failure; the details are in its ``failure.json``."""


class TimeLimitTooShort(PtqbenchError):
    """A job was requeued repeatedly and finished nothing within its time limit."""


class CellBusy(PtqbenchError):
    """Another living process works on the cell. Nothing is wrong."""


MISNAMED_OR_FORBIDDEN = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
)


def unreadable(error: OSError, what: str) -> PtqbenchError:
    """Make the error for a file that a user named and that cannot be read: a wrong request, or a disk that fails now.

    Args:
        error: The error of the system.
        what: The beginning of the line: the file, and that it cannot be read.
    """
    wrong = error.errno in MISNAMED_OR_FORBIDDEN
    return ConfigError(f"{what}: {error.strerror}") if wrong else StorageError.of(error, what)


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, or the name of its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
