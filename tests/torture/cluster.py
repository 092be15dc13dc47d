"""A sweep on a real SLURM of this machine (tests/cluster/slurm.sh) that loses jobs, nodes and its controller.

Promised: three sweeps at the same moment put every cell into the queue once; whatever is cancelled, requeued or drained, the
same command ends with status 0, every cell done by one attempt, with the bytes of a run on this machine alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from torture import cells
from torture.kit import Outcome, Running, World, command, job

SHARE, LIMIT, WORKERS = 7.0, None, 1
SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm.sh"
CELLS, FAULTS, ROUND_S = 12, 10, 900.0
NAME = "ptqbench-"


def absent(world: World) -> str | None:
    """Why there can be no cluster here."""
    missing = [
        name
        for name in ("sbatch", "slurmctld", "munged")
        if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None
    ]
    if missing:
        return f"no SLURM on this machine ({', '.join(missing)}): run tests/cluster/slurm.sh install"
    return None if os.geteuid() == 0 else "SLURM's daemons start jobs for others: run as root"


def prepare(world: World) -> None:
    """Nothing: each trial has a cluster of its own."""


def trial(world: World, number: int) -> Outcome:
    """One sweep of twelve cells under ten faults."""
    outcome, draw = Outcome(), world.draw(number)
    with world.trial_folder(number, outcome) as here, _cluster(here, world.workers):
        common = [word for word in cells.words("rtn")[1:] if not word.startswith("bitwidth")]
        common += ["resources.cpus=1", "resources.host_mem_gib=2", "resources.time_min=20", "resources.gpus=0"]
        sweep, runs = here / "many.yaml", here / "runs"
        sweep.write_text(
            f"name: many\ncommon: {json.dumps(common)}\n"
            f"grids: [{{method: [rtn, gptq], bitwidth: w3, seed: {list(range(CELLS // 2))}}}]\n"
        )
        words = ["sweep", str(sweep), "launcher=slurm", "--runs-dir", str(runs)]
        nodes = [f"node{n + 1}" for n in range(world.workers)]
        _drain(nodes)
        for ended in [one.end() for one in [Running(command(*words), here) for _ in range(3)]]:
            outcome.check(
                ended.status == 0 and "Traceback" not in ended.text, "status", f"three sweeps at once: {ended}"
            )
        queued = len(_queue())
        outcome.check(
            queued == CELLS,
            "submitted once",
            f"{queued} tasks in the queue for {CELLS} cells after three sweeps at once",
        )
        _resume(nodes)
        begun, finished = time.time(), dict[Path, int]()
        waiting = Running(command(*words, "--wait"), here)
        for _ in range(FAULTS):
            if waiting.over(draw.uniform(1.0, 8.0)):
                break
            _fault(outcome, draw, nodes, words, here)
            _once(outcome, finished, runs)
        _resume(nodes)
        ended = waiting.end(ROUND_S)
        for _ in range(4):  # a cancelled or killed task is given again by the same command
            if ended.status == 0 or time.time() - begun > ROUND_S:
                break
            ended = Running(command(*words, "--wait"), here).end(ROUND_S)
        outcome.check(ended.status == 0 and not ended.hung, "status", f"the last sweep: {ended}")
        _once(outcome, finished, runs)
        _judge(outcome, runs, here)
    return outcome


@contextlib.contextmanager
def _cluster(here: Path, nodes: int) -> Iterator[None]:
    """A cluster whose nodes claim one core each, so that no more run at once than are allowed."""
    settings = {
        "CLUSTER_DIR": str(here / "cluster"),
        "CLUSTER_NODES": str(nodes),
        "CLUSTER_CPUS": "1",
        "CLUSTER_GPUS": "1",
    }
    os.environ |= settings
    try:
        subprocess.run([SCRIPT, "up"], check=True, capture_output=True, timeout=300)
        os.environ["SLURM_CONF"] = str(here / "cluster" / "slurm.conf")
        yield
    finally:
        subprocess.run([SCRIPT, "down"], check=False, capture_output=True, timeout=300)
        os.environ.pop("SLURM_CONF", None)


def _queue() -> list[str]:
    """Numbers of the tasks in the queue that are the product's."""
    done = subprocess.run(["squeue", "-h", "-r", "--format=%i|%j|%T"], capture_output=True, text=True, timeout=60)
    return [line.split("|")[0] for line in done.stdout.splitlines() if NAME in line and "COMPLETING" not in line]


def _update(node: str, state: str) -> None:
    subprocess.run(
        ["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=torture"], capture_output=True, timeout=60
    )


def _drain(nodes: list[str]) -> None:
    for node in nodes:
        _update(node, "DRAIN")


def _resume(nodes: list[str]) -> None:
    for node in nodes:
        _update(node, "RESUME")


def _fault(outcome: Outcome, draw: Random, nodes: list[str], words: list[str], here: Path) -> None:
    kind, tasks = (
        draw.choice(("scancel", "scancel", "requeue", "requeue", "drain", "down", "restart", "three sweeps")),
        _queue(),
    )
    if kind in ("scancel", "requeue") and tasks:
        how = ["scancel"] if kind == "scancel" else ["scontrol", "requeue"]
        subprocess.run([*how, draw.choice(tasks)], capture_output=True, timeout=60)
        outcome.counts["signals"] += 1
    elif kind in ("drain", "down"):
        node = draw.choice(nodes)
        _update(node, kind.upper())
        time.sleep(draw.uniform(0.5, 4.0))
        _update(node, "RESUME")
    elif kind == "restart":
        subprocess.run([SCRIPT, "restart"], capture_output=True, timeout=120)
    elif kind == "three sweeps":
        for ended in [one.end() for one in [Running(command(*words), here) for _ in range(3)]]:
            outcome.check("Traceback" not in ended.text, "status", f"three sweeps at once: {ended}")
        left = sum(not (path.parent / "result.json").exists() for path in (here / "runs").glob("*/spec.json"))
        queued = len(_queue())
        outcome.check(
            queued <= left + len(nodes),
            "submitted once",
            f"{queued} tasks in the queue for {left} cells that are not done",
        )
    outcome.counts[kind] += 1


def _once(outcome: Outcome, finished: dict[Path, int], runs: Path) -> None:
    for path in runs.glob("*/result.json"):
        stamp = path.stat().st_mtime_ns
        outcome.check(finished.setdefault(path, stamp) == stamp, "once", f"{path} was written again")


def _judge(outcome: Outcome, runs: Path, here: Path) -> None:
    """Every cell is done, by one attempt, with the bytes of a run without a cluster."""
    folders = sorted(path.parent for path in runs.glob("*/spec.json"))
    done = [folder for folder in folders if (folder / "result.json").is_file()]
    outcome.check(len(done) == CELLS, "all", f"{len(done)} of {CELLS} cells are done")
    for folder in done:
        beats = [json.loads(path.read_text()) for path in folder.glob("attempts/*/heartbeat.json")]
        outcome.check(
            [beat.get("ended") for beat in beats].count("done") == 1, "once", f"attempts of {folder}: {beats}"
        )
        other = here / "again" / folder.name
        other.mkdir(parents=True)
        spec = json.loads((folder / "spec.json").read_text())
        spec["execution"]["runs_dir"] = str(other.parent)
        (other / "spec.json").write_text(json.dumps(spec))
        ended = Running(job(other), here).end()
        here_, there = cells.left(folder), cells.left(other)
        here_.pop("submission.json", None)
        outcome.check(here_ == there, "bytes", f"{folder} differs from a run without a cluster: {ended}")
    outcome.check(not cells.strays(runs), "stray", f"{cells.strays(runs)}")
    cells.check_records(outcome, runs, ("killed",))
    outcome.counts["cells"] += len(done)
