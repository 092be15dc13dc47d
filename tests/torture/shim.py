"""The counter of file operations: built with the C compiler, loaded before everything else, armed in a child."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BEFORE, WITHIN, AFTER, FAIL_ONCE, FAIL_ON = range(1, 6)
NAMES = {BEFORE: "before", WITHIN: "within", AFTER: "after", FAIL_ONCE: "failing at", FAIL_ON: "failing from"}


def load(folder: Path) -> None:
    """Build the library and start this program again with it; without a C compiler, say so and go on."""
    if "PTQBENCH_TORTURE_SHIM" in os.environ:
        del os.environ["LD_PRELOAD"]  # not for processes that a child starts
        return
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "PTQBENCH_TORTURE_SHIM": str(folder)}
    os.execve(sys.executable, [sys.executable, "-m", "torture", *sys.argv[1:]], environment)


def absent() -> str | None:
    """Why file operations cannot be counted here, if they cannot."""
    return None if "PTQBENCH_TORTURE_SHIM" in os.environ else "no C compiler (cc): file operations cannot be counted"


def armed(
    function: Callable[[], int], folder: Path, operation: int, how: int, error: int = 0, log: Path | None = None
) -> Callable[[], int]:
    """Run a function whose process is struck at its n-th file operation below a folder.

    Args:
        function: The work.
        folder: Operations elsewhere do not count.
        operation: From 1; 0 strikes nothing.
        how: One of the names above.
        error: The errno, of the two that let operations fail.
        log: File that gets one line per operation.
    """

    def go() -> int:
        trace = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        ctypes.CDLL(None).torture_arm(
            os.fsencode(folder), ctypes.c_long(operation), how if operation else 0, error, trace
        )
        return function()

    return go
