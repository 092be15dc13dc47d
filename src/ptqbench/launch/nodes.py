"""Nodes of a cluster on which cells failed for a reason that lies with the node, so that the next submission leaves them out.

The attempts in a folder of runs are the evidence. It counts against a node that an error of its GPU or its disk ended an attempt,
or that the process was killed before it had finished anything. A node is left out if this happened to two cells, unless

* the cell failed in this way on another node too, which speaks of the cell;
* a cell was finished on the node later;
* it was longer ago than ``launcher.forgive_h`` hours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ptqbench.cell.labels import counted
from ptqbench.errors import StorageError
from ptqbench.launch.job import finished_since
from ptqbench.runs.failures import speaks_of_node
from ptqbench.runs.files import moment, read_record
from ptqbench.runs.folder import RunFolder, all_runs

CELLS = 2
"""Number of cells that must have failed on a node."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an attempt ended that says something about its node.

    Attributes:
        node: Name of the node.
        time: Seconds since the epoch.
        why: What speaks against the node; None where the cell was finished there.
    """

    node: str
    time: float
    why: str | None


def failing(root: Path, hours: float) -> dict[str, str]:
    """Find the nodes that the next submission leaves out.

    Args:
        root: Folder of runs.
        hours: How long a failure counts.

    Returns:
        A few words on each node, by its name as SLURM has it.
    """
    since, failures, finished = time.time() - 3600 * hours, defaultdict[str, list[Ended]](list), dict[str, float]()
    for folder in all_runs(root) if hours else ():
        with contextlib.suppress(OSError, StorageError):  # what cannot be read now is no evidence
            ended = [found for found in _ended(folder, since) if found.time >= since]
            blamed = [found for found in ended if found.why is not None]
            if len({found.node for found in blamed}) == 1:
                failures[blamed[-1].node].append(blamed[-1])
            for found in ended:
                if found.why is None:
                    finished[found.node] = max(found.time, finished.get(found.node, 0.0))
    # What happened before the node finished a cell is forgotten.
    counting = {
        node: [found for found in several if found.time > finished.get(node, 0.0)] for node, several in failures.items()
    }
    bad = {node: several for node, several in counting.items() if len(several) >= CELLS}
    known = _nodes() if bad else None
    return {node: _words(several) for node, several in sorted(bad.items()) if known is None or node in known}


def _ended(folder: RunFolder, since: float) -> Iterator[Ended]:
    """What the attempts at a cell say about nodes. A folder that nobody has written to since then is not read."""
    places = [folder.path, folder.path / "attempts"]
    if max(place.stat().st_mtime for place in places if place.exists()) < since:
        return
    attempts = folder.attempts
    for attempt in attempts:
        slurm = read_record(attempt / "meta.json").get("slurm")
        if not isinstance(slurm, dict) or not slurm.get("SLURMD_NODENAME"):
            continue
        node, beat = str(slurm["SLURMD_NODENAME"]), read_record(attempt / "heartbeat.json")
        at, failure = moment(beat, "time") or 0.0, read_record(attempt / "failure.json")
        if beat.get("ended") == "done":
            yield Ended(node, at, None)
        elif failure:
            if speaks_of_node(failure, str(folder.path.parent.resolve())):
                yield Ended(node, at, str(failure.get("message")))
        elif "ended" not in beat and not folder.cancel_path.exists():
            # No process writes to an attempt that is not the last, or that has no living holder.
            gone = attempt != attempts[-1] or folder.holder() is None
            if gone and not finished_since(folder, attempt):
                yield Ended(node, at, "killed before anything was finished")


def _words(failures: list[Ended]) -> str:
    last = max(failures, key=lambda found: found.time)
    when = time.strftime("%H:%M", time.localtime(last.time))
    return f"{counted(len(failures), 'cell')} failed there, the last at {when}: {last.why}"


def _nodes() -> set[str] | None:
    """Names of all nodes, since ``sbatch`` refuses a name that it does not know; None where SLURM does not answer."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return set(done.stdout.split()) if done.returncode == 0 else None
    return None


def say_left_out(nodes: dict[str, str]) -> str:
    """One line on the nodes that are left out; empty where there are none."""
    if not nodes:
        return ""
    names, (first, why) = list(nodes), next(iter(nodes.items()))
    where = f"; {first}: " if len(names) > 1 else ": "
    return f"left out: {', '.join(names)}{where}{why}; launcher.forgive_h=0 forgives"
