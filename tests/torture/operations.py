"""A kill before every file operation of a cell, within every write (half of it is on the disk), and after the last one.

The disk after an operation is the disk before the next one, so that one of the two kills is enough.
Promised: as for kills at random moments. The cache of the command is in the same folder, so that it is struck too.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from torture import cells, shim
from torture.kit import Outcome, Running, World, command

SHARE, LIMIT = 64.0, None  # an hour of two free cores strikes all of them
METHODS = ("gptq", "coquant")
DRAWN = re.compile(r"[0-9a-f]{8}-\d+\.|(?<=\.tmp)\w{6,}|\w+(?=\.tmp/)|(?<=block_)\d+|[0-9a-f]{24}")
"""Parts of a file's name that differ between files of one kind: its writer, random letters, the block, a hash."""


def absent(world: World) -> str | None:
    """Why this part cannot run here."""
    return shim.absent()


def prepare(world: World) -> None:
    """Count the operations of both cells."""
    for method in METHODS:
        cells.refer(world, method)
        here = world.folder / "operations-of" / method
        here.mkdir(parents=True, exist_ok=True)
        work = shim.armed(command(*_words(method, here)), here, 0, 0, log=here.with_suffix(".txt"))
        ended = Running(work, here, {"PTQBENCH_CACHE": str(here / "cache")}).end()
        assert ended.status == 0, ended


def total(world: World) -> int:
    """How many trials there are."""
    return len(_plan(world.folder, world.seed))


def trial(world: World, number: int) -> Outcome:
    """Strike one operation, in a third of the cases another one of the resumed run, then let the cell end."""
    outcome, draw = Outcome(), world.draw(number)
    plan = _plan(world.folder, world.seed)
    method, operation, how, what = plan[number % len(plan)]
    reference = cells.refer(world, method)
    with world.trial_folder(number, outcome) as here:
        folder, given = here / "runs" / reference.name, _words(method, here)
        strikes = [
            (operation, how),
            *([(draw.randint(1, operation + 20), draw.choice([1, 2, 3]))] if draw.random() < 0.3 else []),
        ]
        for at, mode in strikes:
            before = cells.finished(folder)
            ended = Running(
                shim.armed(command(*given), here, at, mode), here, {"PTQBENCH_CACHE": str(here / "cache")}
            ).end()
            outcome.counts["signals"] += ended.status == -9
            outcome.counts[f"killed {shim.NAMES[mode]}"] += ended.status == -9
            outcome.check(ended.status in (-9, 0), "status", f"{method}, {shim.NAMES[mode]} {what}: {ended}")
            cells.check_kept(outcome, before, folder)
        before = cells.finished(folder)
        for _ in range(2):
            ended = Running(command(*given), here, {"PTQBENCH_CACHE": str(here / "cache")}).end()
            outcome.check(
                ended.status == 0 and "Traceback" not in ended.text,
                "status",
                f"after a kill {shim.NAMES[how]} {what}: {ended}",
            )
        cells.check_kept(outcome, before, folder)
        cells.check_end(outcome, folder, reference)
        cells.check_records(outcome, here / "runs", ())
        outcome.findings = [
            (name, f"{method}, kill {shim.NAMES[how]} operation {operation} ({what}): {seen}")
            for name, seen in outcome.findings
        ]
    return outcome


def _words(method: str, here: Path) -> list[str]:
    return [*cells.words(method), f"execution.runs_dir={here / 'runs'}"]


@functools.cache
def _plan(folder: Path, seed: int) -> list[tuple[str, int, int, str]]:
    """Every operation with every way to strike it, in an order drawn from the seed; the first of every kind come first."""
    import random

    first, again = [], []
    for method in METHODS:
        seen: set[str] = set()
        lines = (folder / "operations-of" / f"{method}.txt").read_text().splitlines()
        for number, line in enumerate(lines, 1):
            ways = [shim.BEFORE]
            ways += [shim.WITHIN] if line.startswith("write") else []
            ways += [shim.AFTER] if number == len(lines) else []
            kind = DRAWN.sub("", line)
            (again if kind in seen else first).extend((method, number, how, line.replace("\t", " ")) for how in ways)
            seen.add(kind)
    random.Random(f"{seed}/operations").shuffle(first)
    random.Random(f"{seed}/operations").shuffle(again)
    return first + again
