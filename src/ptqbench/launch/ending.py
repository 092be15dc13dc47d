"""The word at the end of a sweep: ``launcher.on_done``, a command of the user that is run once, and on SLURM ``launcher.mail``.

A sweep has ended when none of its cells runs or waits in a queue. Whoever sees that first runs the command: a command that waits
for the cells, or on SLURM a last job, which depends on all arrays of the sweep and carries the mail. A mark in the folder of runs
names what the end looked like (every cell with its state and the time of its record). So the command is run once, however many
processes see the same end, and again when the sweep has ended anew.

The last job is ``python -m ptqbench.launch.ending RECORD``. SLURM may start it while cells still run: in another job, or again
after their processes were killed. It then puts itself back into the queue, which sends no mail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptqbench.cell.labels import tallied
from ptqbench.cell.spec import LauncherSpec, build
from ptqbench.errors import StorageError
from ptqbench.launch.slurm import JOBS_FOLDER, clean_environment
from ptqbench.runs.files import read_record, write_json
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, UNREADABLE, RunFolder
from ptqbench.runs.outcome import INTERRUPTED, one_line
from ptqbench.runs.queue import QUEUED, look
from ptqbench.sweeps.cells import INVALID, SKIPPED, Cell
from ptqbench.sweeps.plan import describe

MARKS = ".ended"
"""Folder of the marks, in the folder of runs."""
MINUTES, MEMORY = 60, "2G"
"""What the last job asks for."""
NEEDED_EVERYWHERE = ("reservation", "wckey", "clusters")
"""Options of ``launcher.sbatch`` without which a cluster may not take a job, whatever it needs."""
ENDED = (DONE, FAILED, CANCELLED, UNREADABLE, SKIPPED, INVALID)
"""States of cells that have ended."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is needed to tell how a sweep ended.

    Attributes:
        name: Its name.
        folders: Absolute paths of the run folders of its cells.
        skipped: Number of cells that make no sense.
        invalid: Number of cells that could not be composed.
        on_done: The command; None is none.
        mail: Address of the mail; None sends none.
    """

    name: str
    folders: tuple[str, ...]
    skipped: int = 0
    invalid: int = 0
    on_done: str | None = None
    mail: str | None = None

    @classmethod
    def of(cls, name: str, cells: Sequence[Cell], launcher: LauncherSpec) -> Sweep:
        """Describe the sweep of composed cells."""
        states = [cell.state() if cell.spec is None or cell.skipped is not None else "" for cell in cells]
        kept = [cell.folder for cell, state in zip(cells, states, strict=True) if not state and cell.folder is not None]
        paths = tuple(str(folder.path.resolve()) for folder in kept)
        return cls(name, paths, states.count(SKIPPED), states.count(INVALID), launcher.on_done, launcher.mail)

    @property
    def root(self) -> Path:
        """The folder of runs."""
        return Path(self.folders[0]).parent


def status_of(counts: Counter[str]) -> int:
    """Exit status of a sweep that has ended so: 1 if a cell is neither done, skipped nor cancelled; else 130 or 0."""
    if sum(counts.values()) > counts[DONE] + counts[SKIPPED] + counts[CANCELLED]:
        return 1
    return INTERRUPTED if counts[CANCELLED] else 0


def left_over(counts: Mapping[str, int]) -> int:
    """Number of cells that have not ended."""
    return sum(count for state, count in counts.items() if state not in ENDED)


def conclude(sweep: Sweep, say: Say) -> Counter[str]:
    """Run the command of a sweep if the sweep has ended and nobody has done so yet.

    Args:
        sweep: The sweep.
        say: Prints a warning.

    Returns:
        Number of cells by state.
    """
    folders = [RunFolder(Path(path)) for path in sweep.folders]
    queue = look(folders)
    states = [describe(folder, queue)[0] for folder in folders]
    counts = Counter(states) + Counter({SKIPPED: sweep.skipped, INVALID: sweep.invalid})
    if sweep.on_done is None or not folders or counts[RUNNING] or counts[QUEUED]:
        return counts
    try:
        if not _marked(sweep, folders, states):
            return counts
    except OSError as error:
        say(f"launcher.on_done was not run: {sweep.root / MARKS} cannot be written: {one_line(error)}")
        return counts
    environment = os.environ | {f"PTQBENCH_SWEEP_{key}": str(value) for key, value in _told(sweep, counts).items()}
    sys.stdout.flush()
    ended = subprocess.run(sweep.on_done, shell=True, env=environment, stdin=subprocess.DEVNULL).returncode
    if ended:
        say(f"launcher.on_done ended with status {ended}: {sweep.on_done}")
    return counts


def _told(sweep: Sweep, counts: Counter[str]) -> dict[str, Any]:
    """What the command learns from its environment."""
    failed = counts[FAILED] + counts[INVALID] + counts[UNREADABLE]
    known = {"DONE": counts[DONE], "FAILED": failed, "SKIPPED": counts[SKIPPED], "CANCELLED": counts[CANCELLED]}
    return {
        "NAME": sweep.name, "STATUS": status_of(counts), "CELLS": sum(counts.values()), **known, "LEFT": left_over(counts),
        "RUNS": sweep.root,
    }  # fmt: skip


def _marked(sweep: Sweep, folders: Sequence[RunFolder], states: Sequence[str]) -> bool:
    """Leave the mark of this end; returns whether it was not there yet."""
    seen = [sweep.name, sweep.on_done, *sorted(zip(sweep.folders, states, map(_changed, folders, states), strict=True))]
    mark = sweep.root / MARKS / hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        mark.open("x").close()
    except FileExistsError:
        return False
    return True


def _changed(folder: RunFolder, state: str) -> int:
    """When the record of a finished, failed or cancelled cell was written, ns; else the number of its attempts."""
    path = {DONE: folder.result_path, FAILED: folder.failure_path, CANCELLED: folder.cancel_path}.get(state)
    with contextlib.suppress(OSError):
        return len(folder.attempts) if path is None else path.stat().st_mtime_ns
    return 0


def follow_up(sweep: Sweep, launcher: LauncherSpec, say: Say) -> None:
    """See to it that SLURM runs the end of a sweep: submit its last job, or let the one that waits already wait for more jobs.

    Args:
        sweep: The sweep, some of whose cells were submitted. A last job that waits already keeps its command and its address where
            the sweep has none.
        launcher: Partition, account and the like.
        say: Prints a warning. Nothing that goes wrong here concerns the cells.
    """
    if not sweep.folders:
        return
    slug = re.sub(r"[^\w.-]", "_", sweep.name)[:100]
    record = sweep.root / JOBS_FOLDER / f"end-{slug}.json"
    try:
        before, asked = read_record(record), sweep.on_done is not None or sweep.mail is not None
        if not asked and not before:
            return
        queue = look([RunFolder(Path(path)) for path in sweep.folders])
        jobs = [queue.job_of(RunFolder(Path(path))) for path in sweep.folders]
        arrays = sorted({job.job_id.partition("_")[0] for job in jobs if job is not None})
        if not arrays:
            return
        waits_for = f"afterany:{':'.join(arrays)}"
        kept = {key: getattr(sweep, key) or before.get(key) for key in ("on_done", "mail")}
        if before.get("job") and _moved(str(before["job"]), waits_for, kept["mail"]):
            write_json(record, dataclasses.asdict(sweep) | kept | {"job": before["job"]})
        elif asked:
            write_json(record, dataclasses.asdict(sweep) | {"job": None})
            number = _submit(sweep, launcher, waits_for, record)
            write_json(record, dataclasses.asdict(sweep) | {"job": number})
    except (OSError, StorageError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or one_line(error)
        say(f"no word will come when the sweep ends: {' '.join(str(said).split())}")


def _moved(job: str, waits_for: str, mail: str | None) -> bool:
    """Let a last job that has not started wait for other jobs; returns whether that was possible."""
    words = [f"Dependency={waits_for}", *([f"MailUser={mail}", "MailType=END,FAIL"] if mail else [])]
    update = ["scontrol", "update", f"JobId={job}", *words]
    return subprocess.run(update, capture_output=True, timeout=60).returncode == 0


def _submit(sweep: Sweep, launcher: LauncherSpec, waits_for: str, record: Path) -> str:
    """Submit the last job of a sweep; returns its number."""
    known = {
        "job-name": f"ptqbench sweep {sweep.name}", "dependency": waits_for, "time": MINUTES, "mem": MEMORY, "cpus-per-task": 1,
        "output": record.with_suffix(".log"), "open-mode": "append", "partition": launcher.partition, "account": launcher.account,
        "qos": launcher.qos, "mail-user": sweep.mail, "mail-type": "END,FAIL" if sweep.mail else None,
    }  # fmt: skip
    known |= {name: launcher.sbatch[name] for name in NEEDED_EVERYWHERE if name in launcher.sbatch}
    command = [
        "sbatch",
        "--parsable",
        "--requeue",
        *(f"--{name}={value}" for name, value in known.items() if value is not None),
    ]
    script = ["#!/bin/bash", *launcher.setup, shlex.join([sys.executable, "-m", "ptqbench.launch.ending", str(record)])]
    with clean_environment():
        done = subprocess.run(
            command, input="\n".join(script) + "\n", capture_output=True, text=True, check=True, timeout=60
        )
    return done.stdout.strip().partition(";")[0]


def main(arguments: Sequence[str]) -> int:
    """Be the last job of a sweep.

    Args:
        arguments: The record of the sweep.

    Returns:
        Exit status as ``status_of`` has it, which the mail shows.
    """
    data, me = read_record(Path(arguments[0])), os.environ.get("SLURM_JOB_ID", "")
    if data.get("job") not in (None, me):  # another one was submitted while this one ran, and was put back
        subprocess.run(["scontrol", "update", f"JobId={me}", "MailType=NONE"], check=False)
        return 0
    sweep = build(Sweep, {key: value for key, value in data.items() if key != "job"})
    first = not int(os.environ.get("SLURM_RESTART_COUNT", 0))
    counts = conclude(dataclasses.replace(sweep, on_done=None), print)
    # Cells run or wait elsewhere, or were killed a moment ago, so that a waiting command may submit them again.
    if counts[RUNNING] or counts[QUEUED] or (left_over(counts) and first):
        print("not over yet:", dict(counts), flush=True)
        if subprocess.run(["scontrol", "requeue", me]).returncode == 0:
            time.sleep(60)  # SLURM ends this process
            return 0
    counts = conclude(sweep, print)
    print(tallied(counts), flush=True)
    return status_of(counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
