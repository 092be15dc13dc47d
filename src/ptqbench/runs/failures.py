"""What kind of failure an exception is, and whether another try can help. Imports no torch: its exceptions are known by name."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Mapping
from typing import Any

from ptqbench.errors import (
    CalibrationError,
    ConfigError,
    NumericalError,
    StorageError,
    TimeLimitTooShort,
    UnsupportedError,
)
from ptqbench.runs.files import errno_of


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of failures.

    Attributes:
        name: As recorded in ``failure.json``.
        retries: How often a launcher tries again by itself. A command of the user always tries again.
        more_memory: Whether another try needs twice the memory.
        advice: What the user can do.
    """

    name: str
    retries: int
    more_memory: bool
    advice: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("config", 0, False, "mend the request, or what it names: a file, a permission"),
        Kind("numerical", 0, False, "look for NaN or infinity in the weights, or raise the damping"),
        Kind("gpu_memory", 1, True, "ask for a larger GPU, or lower evaluation.batch_size"),
        Kind("host_memory", 1, True, "ask for more memory with resources.host_mem_gib"),
        Kind("disk", 1, False, "free space, or move execution.runs_dir"),
        Kind("killed", 3, False, "the process was killed: memory limit, node failure or a person"),
        Kind("time_limit", 0, False, "raise resources.time_min"),
        Kind("network", 2, False, "prefetch on a node with network"),
        Kind("code", 0, False, "a defect: see the traceback in failure.json"),
    )
}


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG, errno.ENODEV, errno.ENXIO}
ACCESS = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
PREPARING = ("start", "load")
"""Stages that open what the user named. An exception there is about that input, even where no check of ours foresaw it."""
DAMAGED_INPUT = {
    "UnicodeError", "EOFError", "BadGzipFile", "JSONDecodeError", "BadZipFile", "ArrowInvalid", "OverflowError",
}  # fmt: skip
NO_GPU = ("no nvidia driver", "not compiled with cuda", "no cuda gpus are available", "invalid device ordinal")


GPU_OF_NODE = re.compile(r"cuda|cublas|cudnn|nccl|nvml|nvidia|\becc\b", re.IGNORECASE)
OF_PROGRAM = re.compile(
    r"out of memory|assert|invalid (argument|value|configuration|device ordinal)|not supported|no kernel image|not compiled",
    re.IGNORECASE,
)
"""Words in errors of a GPU, and those that say that not the GPU but the program or the request is at fault."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def speaks_of_node(failure: Mapping[str, Any], shared: str) -> bool:
    """Whether a recorded failure is a reason not to use the node on which it happened.

    Args:
        failure: Content of ``failure.json``.
        shared: Folder that all nodes share. An error about a file there says nothing about one node.

    Returns:
        True for errors of a GPU and of a disk that are not the fault of the program, the request or the shared folder.
    """
    kind, message = failure.get("kind"), str(failure.get("message"))
    if kind == "disk":
        named = re.findall(r"(?:^|[\s'\"(])(/[^\s'\":;,)]+)", message)
        full = any(os.strerror(number) in message or f"os error {number})" in message for number in FULL)
        # A full disk that is not named is most likely the shared one, to which a cell writes everything.
        return not any(path.startswith(shared) for path in named) and (bool(named) or not full)
    # An error of CUDA while a model is loaded counts as wrong input elsewhere.
    return kind in ("code", "config") and bool(GPU_OF_NODE.search(message)) and not OF_PROGRAM.search(message)


def classify(error: BaseException, stage: str = "") -> Kind:
    """The kind of an exception, by its class, its ``errno``, its message, and what the cell was doing.

    Args:
        error: What was raised.
        stage: Stage of the attempt in which it was raised.
    """
    text, names = str(error).lower(), {cls.__name__ for cls in type(error).__mro__}
    cause, number = error.__cause__, errno_of(error)
    # Exceptions of ours; UncompletedJobError is submitit's, after launcher.max_requeues.
    if isinstance(error, NumericalError):
        return KINDS["numerical"]
    if isinstance(error, TimeLimitTooShort) or "UncompletedJobError" in names:
        return KINDS["time_limit"]
    if isinstance(error, StorageError) and cause is not None:
        return classify(cause, stage)
    if isinstance(error, ConfigError | UnsupportedError | CalibrationError):
        return KINDS["config"]
    # Exceptions of libraries and of the system, the more specific first.
    if names & {"OutOfMemoryError", "CudaError", "AcceleratorError"} and "memory" in text:
        return KINDS["gpu_memory"]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "cannot allocate memory" in text:
        return KINDS["host_memory"]
    if number in DISK:
        return KINDS["disk"]
    if names & {"HTTPError", "HfHubHTTPError", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return KINDS["network"]
    if number in ACCESS or names & DAMAGED_INPUT or stage in PREPARING or any(words in text for words in NO_GPU):
        return KINDS["config"]
    return KINDS["code"]
