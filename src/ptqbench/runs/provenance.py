"""Where, when and with what a number was made; recorded in every attempt. Uses torch only where it is imported already."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "ptqbench", "torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "lm_eval", "hydra-core", "numpy",
)  # fmt: skip


SLURM = re.compile(r"SLURM_\w*_ID|SLURMD_NODENAME")
"""Environment variables by which SLURM says which job this is, and on which node."""


def collect() -> dict[str, Any]:
    """Describe this process, its machine and its software as plain data."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "git": git_state(),
        "slurm": {key: value for key, value in os.environ.items() if SLURM.fullmatch(key)},
        "cpu": cpu(),
        "gpu": _gpu(),
    }


@functools.cache
def git_state() -> dict[str, str] | None:
    """Commit of the checkout that this package runs from, and a digest of its uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        changes = _git(folder, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    # A commit alone does not name the code where files were edited since.
    dirty = {"dirty": hashlib.sha256(changes.encode()).hexdigest()[:12]} if changes else {}
    return {"commit": commit} | dirty


@functools.cache
def cpu() -> str:
    """Name of the processor, and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores()} cores"


@functools.cache
def cores() -> int:
    """Number of cores that this process may use: affinity and the quota of its control group count."""
    import joblib

    return int(joblib.cpu_count())


def peak_host_gib() -> float:
    """Peak resident host memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def peak_gpu_gib() -> float | None:
    """Peak GPU memory allocated by this process so far, GiB; None without a GPU."""
    torch = _torch_with_gpu()
    return None if torch is None else float(torch.cuda.max_memory_allocated()) / 2**30


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=20).stdout


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _torch_with_gpu() -> Any:
    """The module torch where it is imported already and sees a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _gpu() -> dict[str, Any] | None:
    torch = _torch_with_gpu()
    if torch is None:
        return None
    return {"name": torch.cuda.get_device_name(), "count": torch.cuda.device_count(), "cuda": torch.version.cuda}
