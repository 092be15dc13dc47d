"""What kind of failure an exception is, and whether trying again can help. Imports no torch: classes are known by name."""

from __future__ import annotations

import dataclasses
import errno

from ptqbench.errors import CalibrationError, ConfigError, NumericalError, TimeLimitTooShort, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of failures.

    Attributes:
        name: As recorded in ``failure.json``.
        retries: How often a launcher may try again by itself; a command of the user always may.
        more_memory: Whether a further try asks for twice the memory.
        advice: What the user can do.
    """

    name: str
    retries: int
    more_memory: bool
    advice: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("config", 0, False, "mend the request"),
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


def classify(error: BaseException) -> Kind:
    """Find the kind of an exception, by its class or, for the many errors torch raises as ``RuntimeError``, by its words."""
    text, names = str(error).lower(), {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, NumericalError):
        return KINDS["numerical"]
    if isinstance(error, TimeLimitTooShort):
        return KINDS["time_limit"]
    if isinstance(error, ConfigError | UnsupportedError | CalibrationError):
        return KINDS["config"]
    if names & {"OutOfMemoryError", "CudaError", "AcceleratorError"} and "memory" in text:
        return KINDS["gpu_memory"]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "cannot allocate memory" in text:
        return KINDS["host_memory"]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return KINDS["disk"]
    if names & {"HTTPError", "HfHubHTTPError", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return KINDS["network"]
    return KINDS["code"]
