"""What is installed, what this machine has, and what may hinder a sweep."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ptqbench.cell import folders as confdir
from ptqbench.errors import ConfigError
from ptqbench.runs import provenance, queue

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def print_doctor(runs_dir: str = "runs") -> None:
    """Print versions, devices, SLURM, folders and whether the hub is switched off, with remarks on what may hinder a sweep.

    Args:
        runs_dir: Folder of run folders, which need not exist.
    """
    facts = provenance.collect()
    print(f"python        {facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        print(f"{name:13} {version}")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPU           {', '.join(gpus) or 'none'}")
    print(f"cores         {provenance.cores()}")
    for line in _slurm():
        print(f"SLURM         {line}")
    print(f"conf          {confdir.conf_folder()}")
    print(f"sweeps        {confdir.sweep_folder()}")
    print(f"runs          {_folder(Path(runs_dir))}")
    print(f"model cache   {_folder(_hub_cache())}")
    switched_off = [name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    print(
        f"hub           {'switched off by ' + ', '.join(switched_off) if switched_off else 'reachable if the network is'}"
    )


def _slurm() -> Iterator[str]:
    if shutil.which("sbatch") is None:
        yield "no sbatch on PATH: launcher=auto is the local pool"
        return
    yield str(shutil.which("sbatch"))
    try:
        yield from _remarks(queue.settings())
    except ConfigError as problem:
        yield str(problem)


def _remarks(values: Mapping[str, str]) -> Iterator[str]:
    """What the configuration of the cluster means for sweeps, one line per remark."""
    yield f"version {values.get('SLURM_VERSION', 'unknown')}, largest array {values.get('MaxArraySize', 'unknown')}"
    if values.get("JobRequeue") == "0":
        yield "JobRequeue=0: ptqbench submits with --requeue, which overrides it"
    # Each setting below changes what happens to jobs of a sweep.
    modes = values.get("PreemptMode", "OFF").upper()
    if "CANCEL" in modes:
        yield f"PreemptMode={modes}: preempted jobs are cancelled, not requeued; use sweep --wait, which submits them again"
    if int((re.match(r"\d+", values.get("KillWait", "30")) or ["30"])[0]) < 5:
        yield f"KillWait={values['KillWait']}: little time between the warning and the end of a preempted job"
    if values.get("AccountingStorageType", "").endswith("none"):
        yield "no accounting: fine, states are read from the run folders"


def _folder(path: Path) -> str:
    """A folder with the free space of its disk; one that does not exist yet is judged by the nearest that does."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = "" if os.access(existing, os.W_OK) else ", NOT WRITABLE"
    return f"{path.absolute()} ({free:.0f} GiB free{writable})"


def _hub_cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
