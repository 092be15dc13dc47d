"""A cell of a sweep as the commands see it: whether it was composed, whether it makes sense, and its run folder.

Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptqbench.cell import labels
from ptqbench.runs.folder import RunFolder, folders_of

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.errors import PtqbenchError

SKIPPED, INVALID = "skipped", "invalid"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One requested cell.

    Attributes:
        name: A label for people.
        spec: The resolved cell; None if it could not be composed.
        problem: Why it could not be composed.
        skipped: Why the combination makes no sense; None if it does.
        folder: Its run folder, which need not exist yet.
        draft: The validated cell without digests, where only its model or data are missing. It can be estimated, but has no run id.
    """

    name: str
    spec: RunSpec | None
    problem: PtqbenchError | None = None
    skipped: str | None = None
    folder: RunFolder | None = None
    draft: RunSpec | None = None

    def state(self) -> str:
        """The state of the run folder, or ``skipped`` or ``invalid``."""
        if self.spec is None or self.folder is None:
            return INVALID
        return SKIPPED if self.skipped is not None else self.folder.state()


def with_folders(cells: Sequence[Cell]) -> list[Cell]:
    """Give every composed cell its run folder, keep the first of cells with the same run id, and make names distinct."""
    folders = iter(folders_of([cell.spec for cell in cells if cell.spec is not None]))
    kept: dict[str, Cell] = {}
    for place, cell in enumerate(cells):
        folder = next(folders) if cell.spec is not None else None
        kept.setdefault(folder.run_id if folder else str(place), dataclasses.replace(cell, folder=folder))
    names = labels.distinct([cell.name for cell in kept.values()], kept)
    return [dataclasses.replace(cell, name=name) for cell, name in zip(kept.values(), names, strict=True)]
