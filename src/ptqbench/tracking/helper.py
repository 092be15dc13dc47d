"""The process that talks to wandb: one job per line on standard input, one outcome per line on standard output.

A job names a run folder. A live one is followed until standard input ends, which it does when the cell ends, however that
happens. The parent may end this process at any time; should there be no parent any more, an alarm does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import TrackingSpec, build
from ptqbench.runs.folder import RunFolder
from ptqbench.tracking.projection import Projection

POLL_S = 1.0
REASON_LENGTH = 300
LAST_S = 180
"""Seconds after which this process is ended by an alarm, counted from the end of the cell."""


def project(job: dict[str, Any], ended: Callable[[], bool]) -> dict[str, Any]:
    """Project one cell.

    Args:
        job: ``folder``, ``tracking`` (a ``TrackingSpec`` as plain data) and ``timeout_s`` for W&B's first answer.
        ended: Waits a moment and tells whether the cell has ended.

    Returns:
        ``reason`` is None where everything was handed over, else why not; ``failed_after_s`` says how long wandb took to
        fail, where it failed; ``project``, ``entity`` and ``url`` where the run is.
    """
    folder = RunFolder(Path(job["folder"]))
    start, place = time.monotonic(), {}
    try:
        spec = dataclasses.replace(folder.read_spec(), tracking=build(TrackingSpec, job["tracking"]))
        projection = Projection(spec, folder)
        projection.open(job["timeout_s"])
        place = projection.place
        start = time.monotonic()
        while not ended():
            projection.update()
            start = time.monotonic()
        signal.alarm(LAST_S)
        projection.close()
    except Exception as error:  # wandb raises all kinds of things; none of them may reach a cell
        reason = " ".join(str(error).replace(folder.run_id, "...").split())[:REASON_LENGTH] or type(error).__name__
        return {"reason": reason, "failed_after_s": round(time.monotonic() - start, 3), **place}
    return {"reason": None, **place}


def main() -> None:
    """Serve jobs until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # SLURM warns every process of a job; this one ends with the cell
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what wandb prints goes to the log
    with open(0, "rb", buffering=0, closefd=False) as jobs:
        for line in iter(jobs.readline, b""):
            job = json.loads(line)
            live = job["live"]
            if not live:
                signal.alarm(LAST_S)
            ended = (lambda: bool(select.select([jobs], [], [], POLL_S)[0])) if live else (lambda: True)
            print(json.dumps(project(job, ended)), file=answers, flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
    os._exit(0)  # wandb's exit hooks would wait for a host that does not answer
