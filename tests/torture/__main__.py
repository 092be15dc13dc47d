"""Run the parts within the time that is given; ``make torture`` calls this.

    PYTHONPATH=tests python -m torture --minutes 60 --seed 1 --workers 2 [--only kills,disk] [--number 17] [--output FOLDER]

``--only`` and ``--number`` repeat one trial of one part. ``--prove`` breaks the code under test in ways that each check must
notice, and says which did not. Exit status: 0 nothing found, 1 something found, 2 not started.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torture.kit import Outcome, World

PARTS = ("requests", "disk", "operations", "races", "cluster", "kills")  # the last one takes all the time that is left


def main() -> int:
    """Parse the command line, run the parts, print and write what they found."""
    parser = argparse.ArgumentParser(prog="python -m torture", description="Faults on purpose, for so many minutes.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="trials at once")
    parser.add_argument("--only", default="", help=f"parts, by commas: {', '.join(PARTS)}")
    parser.add_argument("--number", type=int, default=None, help="one trial of the part that --only names")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial: goes on with a campaign")
    parser.add_argument("--output", type=Path, default=None, help="where findings and torture.json stay")
    parser.add_argument("--prove", action="store_true", help="break the code on purpose: every check must notice")
    options = parser.parse_args()
    parts = [name for name in options.only.replace(",", " ").split() if name] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        print(f"torture: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    from torture import shim
    from torture.kit import World, warm

    folder = Path(os.environ.get("PTQBENCH_TORTURE_SHIM") or tempfile.mkdtemp(prefix="ptqbench-torture-"))
    shim.load(folder)
    os.environ |= {
        "PTQBENCH_CACHE": str(folder / "cache"),
        "COLUMNS": "400",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    (folder / "references").mkdir(exist_ok=True)
    warm()
    world = World(folder, options.seed, options.workers)
    if options.prove:
        from torture.sabotage import prove

        return prove(world, parts)
    begun, reports = time.time(), []
    for place, name in enumerate(parts):
        report = run_part(world, name, parts[place:], begun + 60 * options.minutes, options.number, options.first)
        reports.append(report)
        print(
            f"{name}: {report['trials']} trials, {len(report['findings'])} findings, {report['seconds']:.0f} s",
            flush=True,
        )
    return conclude(world, reports, begun, options.output)


def run_part(world: World, name: str, left: list[str], end: float, number: int | None, first: int) -> dict[str, Any]:
    """Run one part for its share of the time that is left; returns its report."""
    begun, counts, findings, trials = time.time(), Counter[str](), [], 0
    module = importlib.import_module(f"torture.{name}")
    world = dataclasses.replace(world, part=name)
    report: dict[str, Any] = {"part": name, "skipped": getattr(module, "absent", lambda world: None)(world)}
    if report["skipped"] is None:
        module.prepare(world)
        shares = [importlib.import_module(f"torture.{other}").SHARE for other in left]
        until = end if len(left) == 1 else time.time() + (end - time.time()) * shares[0] / sum(shares)
        for at, outcome in trials_of(world, module, until, number, first):
            trials += 1
            counts += outcome.counts
            for check, seen in outcome.findings:
                repeat = f"make torture ONLY={name} SEED={world.seed} NUMBER={at}"
                findings.append({"check": check, "seen": seen, "repeat": repeat})
                print(f"FOUND {name}/{check} ({repeat}): {seen}", flush=True)
    return report | {
        "trials": trials,
        "counts": dict(counts),
        "findings": findings,
        "seconds": round(time.time() - begun, 1),
    }


def trials_of(
    world: World, module: ModuleType, until: float, number: int | None, first: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield (number, outcome) of trials in forked workers until the time is over."""
    limit = module.LIMIT if hasattr(module, "LIMIT") else None
    total = min(x for x in (limit, module.total(world) if hasattr(module, "total") else None, 10**9) if x is not None)
    numbers = iter(range(first, total) if number is None else [number])
    workers = min(world.workers, getattr(module, "WORKERS", world.workers))
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: dict[Any, int] = {}
        while True:
            while (
                len(waiting) < workers
                and (number is not None or time.time() < until)
                and (at := next(numbers, None)) is not None
            ):
                waiting[pool.submit(guarded, module.__name__, world, at)] = at
            if not waiting:
                return
            for future in concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED").done:
                yield waiting.pop(future), future.result()


def guarded(module: str, world: World, number: int) -> Outcome:
    """Run a trial; a defect of the torture itself is a finding too."""
    from torture.kit import Outcome

    try:
        return sys.modules[module].trial(world, number)
    except Exception:
        outcome = Outcome()
        outcome.check(False, "torture itself", traceback.format_exc()[-400:])
        return outcome


def conclude(world: World, reports: list[dict[str, Any]], begun: float, output: Path | None) -> int:
    """Print the table, write ``torture.json``, and return the exit status."""
    found = sum(len(report["findings"]) for report in reports)
    print(f"\n{'part':<12}{'trials':>8}{'checks':>9}{'signals':>9}{'found':>7}{'seconds':>9}  counted")
    for report in reports:
        counts = report["counts"]
        more = report["skipped"] or ", ".join(
            f"{n} {name}" for name, n in sorted(counts.items()) if name not in ("checks", "signals")
        )
        line = (
            report["trials"],
            counts.get("checks", 0),
            counts.get("signals", 0),
            len(report["findings"]),
            report["seconds"],
        )
        print(f"{report['part']:<12}{line[0]:>8}{line[1]:>9}{line[2]:>9}{line[3]:>7}{line[4]:>9.0f}  {more}")
    for kind, n in Counter(f"{r['part']}/{f['check']}" for r in reports for f in r["findings"]).most_common():
        print(f"found {n:>5} times: {kind}")
    signals = sum(report["counts"].get("signals", 0) for report in reports)
    data = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(begun)), "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "seed": world.seed, "minutes": round((time.time() - begun) / 60, 1), "signals": signals, "found": found, "parts": reports,
    }  # fmt: skip
    folder = output or Path("torture")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "torture.json").write_text(json.dumps(data, indent=2) + "\n")
    print(f"{signals} signals, {found} findings in {data['minutes']} minutes; {folder / 'torture.json'}")
    if found:
        print(f"folders of the trials that found something: {world.folder}")
    else:
        shutil.rmtree(world.folder, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
