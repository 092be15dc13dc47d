"""A disk that fills, is over quota, fails, or turns read-only while a cell is at work; then there is space again.

Promised: status 1, one line, what is recorded has the kind ``disk``, and the cell goes on to the bytes of an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from random import Random

from torture import cells, shim
from torture.kit import Ended, Outcome, Running, World, command

SHARE, LIMIT = 3.0, 400
METHODS = ("gptq", "coquant", "rtn", "spinquant")
CODES = (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def prepare(world: World) -> None:
    """Run the cells undisturbed."""
    for method in METHODS:
        cells.refer(world, method)


def trial(world: World, number: int) -> Outcome:
    """One cell on a bad disk, then on a good one; every fourth on a real small file system where this is root."""
    outcome, draw = Outcome(), world.draw(number)
    method = METHODS[number % len(METHODS)]
    reference = cells.refer(world, method)
    with world.trial_folder(number, outcome) as here:
        runs = here / "runs"
        runs.mkdir()
        given = [*cells.words(method), f"execution.runs_dir={runs}"]
        real = os.geteuid() == 0 and (number % 4 == 3 or shim.absent() is not None)
        if real:
            _small_disk(outcome, draw, given, runs, here)
        elif shim.absent() is None:
            _errors(outcome, draw, given, runs, here)
        else:
            outcome.counts["skipped"] += 1
            return outcome
        try:
            ended = Running(command(*given), here).end()
            outcome.check(
                ended.status == 0 and "Traceback" not in ended.text, "resume", f"{method} with space again: {ended}"
            )
            cells.check_end(outcome, runs / reference.name, reference)
        finally:
            if real:
                subprocess.run(["umount", runs], check=True)
        outcome.counts["cells"] += 1
    return outcome


def _small_disk(outcome: Outcome, draw: Random, given: list[str], runs: Path, here: Path) -> None:
    size = draw.choice([4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", runs], check=True)
    ended = Running(command(*given), here).end()
    outcome.counts["real file systems"] += 1
    _check(outcome, ended, runs, f"{size} KiB of space")
    subprocess.run(["mount", "-o", "remount,size=64m", runs], check=True)


def _errors(outcome: Outcome, draw: Random, given: list[str], runs: Path, here: Path) -> None:
    code, how = draw.choice(CODES), draw.choice([shim.FAIL_ONCE, shim.FAIL_ON, shim.FAIL_ON])
    operation = draw.randint(1, 160)
    ended = Running(shim.armed(command(*given), runs, operation, how, code), here).end()
    outcome.counts[errno.errorcode[code]] += 1
    _check(outcome, ended, runs, f"{errno.errorcode[code]} {shim.NAMES[how]} operation {operation}")


def _check(outcome: Outcome, ended: Ended, runs: Path, what: str) -> None:
    outcome.check(not ended.hung, "hang", f"{what}: {ended}")
    outcome.check("Traceback" not in ended.text, "traceback", f"{what}: {ended}")
    outcome.check(ended.status in (0, 1), "status", f"{what}: expected 1 (or 0, where it was not needed), got {ended}")
    if ended.status != 0:
        outcome.counts["failed for want of it"] += 1
        one = len(ended.said) == 1 and ended.said[0].startswith("ptqbench: ")
        outcome.check(one, "lines", f"{what}: expected one line, got {ended.said}")
    cells.check_records(outcome, runs, ("disk",))
