"""Signals at random moments over cells of every method; each cell then goes on to its end.

Promised: the bytes of an undisturbed run, nothing finished done again, nothing left over, the right exit status, and no failure
on record for what a signal ended.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from random import Random

from torture import cells
from torture.kit import CELL_S, Ended, Outcome, Running, World, command, job

SHARE, LIMIT = 5.0, None
SIGNALS = {signal.SIGKILL: 8, signal.SIGINT: 5, signal.SIGTERM: 4, signal.SIGSTOP: 3}
ENDS = {signal.SIGKILL: (-9,), signal.SIGINT: (130,), signal.SIGTERM: (-15, 143), signal.SIGSTOP: ()}
PER_TRIAL = 6


def prepare(world: World) -> None:
    """Run every method undisturbed."""
    for method in cells.methods():
        cells.refer(world, method)


def trial(world: World, number: int) -> Outcome:
    """Disturb one cell several times, then let it end."""
    outcome, draw = Outcome(), world.draw(number)
    method = cells.methods()[number % len(cells.methods())]
    reference, keep = cells.refer(world, method), draw.random() > 0.15
    with world.trial_folder(number, outcome) as here:
        folder = here / "runs" / reference.name
        given = [
            *cells.words(method),
            f"execution.runs_dir={here / 'runs'}",
            *([] if keep else ["execution.keep_codes=false"]),
        ]
        for _ in range(PER_TRIAL):
            before = cells.finished(folder)
            door = job(folder) if (folder / "spec.json").exists() and draw.random() < 0.6 else command(*given)
            running = Running(door, here)
            struck = _strike(outcome, draw, running, reference.seconds, folder, here)
            ended = running.end()
            _check_status(outcome, struck, ended)
            cells.check_kept(outcome, before, folder, may_go=not keep)
            cells.check_records(outcome, here / "runs", ())
        before = cells.finished(folder)
        for _ in range(2):  # the second one shows what is done, and tidies
            ended = Running(command(*given), here).end()
            outcome.check(
                ended.status == 0 and "Traceback" not in ended.text, "status", f"{method} does not go on: {ended}"
            )
        cells.check_kept(outcome, before, folder, may_go=not keep)
        cells.check_end(outcome, folder, reference, keep)
        outcome.counts["cells"] += 1
    return outcome


def _strike(
    outcome: Outcome, draw: Random, running: Running, seconds: float, folder: Path, here: Path
) -> signal.Signals | None:
    """Send a signal at a random moment; None where the cell was faster."""
    number = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    if running.over(draw.uniform(0.0, 1.1 * seconds)) or not running.signal(number):
        return None
    outcome.counts["signals"] += 1
    outcome.counts[number.name] += 1
    if number == signal.SIGSTOP:
        _stopped(outcome, draw, folder, here)
        running.signal(signal.SIGCONT)
    return number


def _stopped(outcome: Outcome, draw: Random, folder: Path, here: Path) -> None:
    """A frozen holder keeps its cell: a second process leaves it alone."""
    time.sleep(0.02)  # the signal needs a moment
    held = _holder(folder) is not None and not (folder / "result.json").exists()
    if not held or draw.random() < 0.5:
        time.sleep(draw.uniform(0.0, 0.2))
        return
    second = Running(job(folder), here).end()
    right = second.status == 0 and ("being worked on" in second.text or "hanging process" in second.text)
    outcome.check(right, "frozen", f"a second process beside a stopped one: {second}")


def _holder(folder: Path) -> int | None:
    """The living process that the lease names; a killed one may have left it before."""
    try:
        pid = json.loads((folder / "lease.json").read_text())["pid"]
    except (OSError, ValueError):
        return None
    return pid if Path(f"/proc/{pid}").exists() else None


def _check_status(outcome: Outcome, struck: signal.Signals | None, ended: Ended) -> None:
    outcome.check(not ended.hung, "hang", f"no end within {CELL_S:.0f} s after {struck}")
    right = (0, *ENDS[struck]) if struck is not None else (0,)
    name = struck.name if struck is not None else "no signal"
    outcome.check(ended.status in right, "status", f"expected {right} after {name}, got {ended}")
    outcome.check("Traceback" not in ended.text, "traceback", f"after {name}: {ended}")
    if ended.status == 130:
        outcome.check(len(ended.said) <= 1, "lines", f"more than one line after {name}: {ended.said}")
