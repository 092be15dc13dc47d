"""Many processes that want the same cells at the same moment: ten on one cell, four pools on a sweep, pools that are killed.

Promised: each cell is finished once, by one attempt, with the bytes of an undisturbed run; every process ends with status 0.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil

from torture import cells
from torture.kit import Ended, Outcome, Running, World, command, job

SHARE, LIMIT, WORKERS = 5.0, None, 1  # each trial is several processes
PROCESSES, POOLS, CELLS = 10, 4, 100
METHODS = ("gptq", "coquant", "rtn", "fp16", "q2n")


def prepare(world: World) -> None:
    """Run the cells of both kinds undisturbed."""
    for method in METHODS:
        cells.refer(world, method)


def trial(world: World, number: int) -> Outcome:
    """Mostly ten processes on one cell; the second trial is four pools on a hundred cells, then killed pools now and then."""
    outcome, draw = Outcome(), world.draw(number)
    with world.trial_folder(number, outcome) as here:
        if number == 1:
            _pools(outcome, draw, world, here, POOLS, CELLS, kills=0)
        elif number % 12 == 5:
            _pools(outcome, draw, world, here, 2, 16, kills=6)
        else:
            _ten(outcome, draw, world, here, METHODS[number % len(METHODS)])
    return outcome


def _ten(outcome: Outcome, draw: Random, world: World, here: Path, method: str) -> None:
    """Ten processes on one cell, at once or one after the other; in half of the trials the first holder is killed."""
    reference, given = cells.refer(world, method), [*cells.words(method), f"execution.runs_dir={here / 'runs'}"]
    folder = here / "runs" / reference.name
    struck = draw.random() < 0.5
    if struck:
        first = Running(command(*given), here)
        if not first.over(draw.uniform(0.3, 1.0) * reference.seconds):
            outcome.counts["signals"] += first.signal(signal.SIGKILL)
        first.end()
    before, pause = cells.finished(folder), draw.choice((0.0, 0.0, 0.02, 0.1))
    doors: list[Callable[[], int]] = []
    for _ in range(PROCESSES):
        doors.append(job(folder) if (folder / "spec.json").exists() and draw.random() < 0.5 else command(*given))
    running = []
    for door in doors:
        running.append(Running(door, here))
        time.sleep(pause)
    for ended in [one.end() for one in running]:
        outcome.check(ended.status == 0 and "Traceback" not in ended.text, "ten: status", f"{method}: {ended}")
    ends = [end for end in _ends(folder) if end is not None]
    right = ends.count("done") == 1 if "result.json" not in before else len(ends) <= 1
    outcome.check(right, "ten: once", f"{method}: attempts ended {ends} in {folder}")
    cells.check_kept(outcome, before, folder)
    Running(command(*given), here).end()
    cells.check_end(outcome, folder, reference)
    cells.check_records(outcome, here / "runs", ())
    outcome.counts["times ten on one cell"] += 1


def _ends(folder: Path) -> list[str | None]:
    """How each attempt ended, by its last sign of life; None where it was killed."""
    found = []
    for path in sorted(folder.glob("attempts/*")):
        beat = None
        with contextlib.suppress(OSError, ValueError):
            beat = json.loads((path / "heartbeat.json").read_text())
        found.append(beat.get("ended") if beat else None)
    return found


def _pools(outcome: Outcome, draw: Random, world: World, here: Path, pools: int, count: int, kills: int) -> None:
    """Several sweeps of the same cells at the same moment, each with a local pool of one worker."""
    runs, sweep = here / "runs", here / "many.yaml"
    common = [word for word in cells.words("rtn")[1:] if not word.startswith("bitwidth")]
    seeds = list(range(count // 2))
    sweep.write_text(
        f"name: many\ncommon: {json.dumps(common)}\ngrids:\n  - {{method: [rtn, gptq], bitwidth: w3, seed: {seeds}}}\n"
    )
    words = ["sweep", str(sweep), "launcher=local", "launcher.workers=1", "--runs-dir", str(runs)]
    limit = 60.0 + 10.0 * count
    running = [Running(command(*words), here) for _ in range(pools)]
    struck, finished = 0, dict[Path, int]()
    while struck < kills and not all(one.over(0.0) for one in running):
        time.sleep(draw.uniform(0.5, 4.0))
        struck += _strike(outcome, draw, running)
        _once(outcome, finished, runs)
    ends = [one.end(limit) for one in running]
    if kills:  # whoever was killed gives the same command again
        ends = [Running(command(*words), here).end(limit)]
    for ended in ends:
        outcome.check(ended.status == 0 and not ended.hung and "Traceback" not in ended.text, "pools: status", ended)
    _once(outcome, finished, runs)
    done = [path for path in runs.glob("tiny-*") if (path / "result.json").is_file()]
    outcome.check(len(done) == count, "pools: all", f"{len(done)} of {count} cells are done in {runs}")
    for folder in done:
        ended = _ends(folder)
        outcome.check(ended.count("done") == 1, "pools: once", f"attempts of {folder} ended {ended}")
        if not kills:
            outcome.check(len(ended) == 1, "pools: one attempt", f"attempts of {folder} ended {ended}")
    _equal(outcome, here, done, sweep, draw)
    outcome.check(not cells.strays(runs), "pools: stray", f"{cells.strays(runs)} in {runs}")
    leases = [path.as_posix() for path in runs.glob("*/lease.json")]
    outcome.check(not leases, "pools: stray", f"leases are left: {leases[:3]}")
    cells.check_records(outcome, runs, ("killed",) if kills else ())
    outcome.counts["cells in pools"] += count


def _strike(outcome: Outcome, draw: Random, running: list[Running]) -> int:
    """Kill a pool or something that it started."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        root = psutil.Process(draw.choice(running).pid)
        victim = draw.choice([root, *root.children(recursive=True) * 3])
        victim.send_signal(draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        outcome.counts["signals"] += 1
        return 1
    return 0


def _once(outcome: Outcome, finished: dict[Path, int], runs: Path) -> None:
    """Remember when each cell finished: none does so twice."""
    for path in runs.glob("*/result.json"):
        stamp = path.stat().st_mtime_ns
        outcome.check(finished.setdefault(path, stamp) == stamp, "pools: once", f"{path} was written again")


def _equal(outcome: Outcome, here: Path, done: list[Path], sweep: Path, draw: Random) -> None:
    """Eight of the cells are run again undisturbed, elsewhere: the bytes agree."""
    for folder in draw.sample(done, min(8, len(done))):
        other = here / "again" / folder.name
        other.mkdir(parents=True)
        spec = json.loads((folder / "spec.json").read_text())
        spec["execution"]["runs_dir"] = str(other.parent)
        (other / "spec.json").write_text(json.dumps(spec))
        ended: Ended = Running(job(other), here).end()
        right = ended.status == 0 and cells.left(other) == cells.left(folder)
        outcome.check(right, "pools: bytes", f"{folder} differs from an undisturbed run: {ended}")
