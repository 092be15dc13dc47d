"""Project the finished cells that W&B does not have yet, one after the other, in one helper process."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import RunSpec, TrackingSpec
from ptqbench.errors import PtqbenchError
from ptqbench.runs.folder import DONE, RunFolder
from ptqbench.tracking.guard import SLOW_S, Helper, is_marked, mark, towards
from ptqbench.tracking.projection import files_of

PATIENCE_S = 120.0
"""Seconds that one cell may take."""
WORDS = {"online": "uploaded", "offline": "written"}
Sources = Sequence[tuple[RunFolder, RunSpec | None]]


def sync(cells: Sources, mode: str, project: str | None = None, entity: str | None = None) -> int:
    """Project every finished cell that is not in W&B yet, and print the outcome.

    Args:
        cells: Run folders, each with its cell if that is known.
        mode: ``online`` uploads; ``offline`` writes W&B's own files.
        project: W&B project; None takes that of each cell.
        entity: W&B user or team; None takes that of each cell, or the default of the account.

    Returns:
        Exit status: 1 if a finished cell could not be projected, else 0.
    """
    counts, reasons = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as logs, contextlib.closing(_Uploader(Path(logs) / "wandb.log")) as uploader:
        for folder, known in cells:
            # Cells that are not to be projected: unfinished ones, unreadable ones, and those that W&B has.
            if folder.state() != DONE:
                counts["not finished"] += 1
                continue
            try:
                spec = known or folder.read_spec()
            except PtqbenchError as error:
                reasons[str(error)] += 1
                continue
            tracking = towards(spec, mode, project, entity)
            if is_marked(folder, tracking):
                counts["there already"] += 1
                continue
            outcome = uploader.project(folder, tracking)
            if outcome["reason"] is not None:
                reasons[outcome["reason"]] += 1
                continue
            mark(folder, spec.execution.runs_dir, mode, outcome)
            counts[WORDS[mode]] += 1
            print(f"{WORDS[mode]} {folder.path.name}: {outcome['url'] or files_of(spec, folder) / 'wandb'}")
    for reason, count in reasons.items():
        print(f"not {WORDS[mode]}: {count} {'cell' if count == 1 else 'cells'}: {reason}")
    counts[f"not {WORDS[mode]}"] = reasons.total()
    print(", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no cells")
    return 1 if reasons else 0


class _Uploader:
    """A helper process that is started again after a failure. After a failure that took long, no other cell is tried."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._helper: Helper | None = None
        self._broken: dict[str, Any] | None = None

    def project(self, folder: RunFolder, tracking: TrackingSpec) -> dict[str, Any]:
        """Project one cell and return the outcome (see ``helper.project``)."""
        if self._broken is not None:
            return self._broken
        self._helper = self._helper or Helper(self._log)
        self._helper.give(folder, tracking, live=False)
        outcome = self._helper.outcome(PATIENCE_S)
        if outcome["reason"] is not None:
            self.close()
            if outcome.get("failed_after_s", 0.0) > SLOW_S:
                self._broken = outcome
        return outcome

    def close(self) -> None:
        """End the process if there is one."""
        if self._helper is not None:
            self._helper.end()
        self._helper = None
