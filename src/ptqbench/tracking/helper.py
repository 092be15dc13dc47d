"""The process that talks to wandb: one job per line on standard input, one outcome per line on standard output.

A job names a run folder. A live folder is followed until standard input ends, which happens when the cell's process ends, for
whatever reason. The parent may kill this process at any time. If there is no parent any more, an alarm ends it.
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
"""Seconds between two looks at a live folder."""
REASON_LENGTH = 300
"""Characters of wandb's message that are kept."""
LAST_S = 180
"""Seconds from the end of the cell after which an alarm ends this process."""


def project(job: dict[str, Any], ended: Callable[[], bool]) -> dict[str, Any]:
    """Project one cell.

    Args:
        job: ``folder``, ``tracking`` (a ``TrackingSpec`` as plain data) and ``timeout_s`` for W&B's first answer.
        ended: Waits a moment and returns whether the cell has ended.

    Returns:
        ``reason``, which is None if W&B took everything, else why not; ``failed_after_s``, how long the call of wandb took that
        failed; and ``project``, ``entity`` and ``url`` of the run.
    """
    folder = RunFolder(Path(job["folder"]))
    start, place = time.monotonic(), {}  # the start of the step that may fail
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
    except Exception as error:  # wandb raises exceptions of any class; none may reach a cell
        reason = " ".join(str(error).replace(folder.run_id, "...").split())[:REASON_LENGTH] or type(error).__name__
        return {"reason": reason, "failed_after_s": round(time.monotonic() - start, 3), **place}
    return {"reason": None, **place}


def main() -> None:
    """Serve jobs until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # SLURM warns every process of a job; this one ends with the cell
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what wandb prints goes to the log, not among the answers
    with open(0, "rb", buffering=0, closefd=False) as jobs:
        for line in iter(jobs.readline, b""):
            job = json.loads(line)
            live = job["live"]
            if not live:
                signal.alarm(LAST_S)
            # Standard input of a live job becomes readable when it is closed.
            ended = (lambda: bool(select.select([jobs], [], [], POLL_S)[0])) if live else (lambda: True)
            print(json.dumps(project(job, ended)), file=answers, flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
    os._exit(0)  # wandb's exit hooks would wait for a host that does not answer
