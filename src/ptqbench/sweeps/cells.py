"""A cell of a sweep as the commands see it: composed or not, possible or not, and what its run folder says.

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
        name: For people.
        spec: The resolved cell; None if it could not be composed.
        problem: Why it could not be composed.
        skipped: Why it makes no sense, if it makes none.
        folder: Its run folder, which need not exist yet.
        draft: The validated cell where only its model or data are not here, so that it can be estimated; it has no identity yet.
    """

    name: str
    spec: RunSpec | None
    problem: PtqbenchError | None = None
    skipped: str | None = None
    folder: RunFolder | None = None
    draft: RunSpec | None = None

    def state(self) -> str:
        """State of the run folder; ``skipped`` or ``invalid`` for a cell that has none."""
        if self.spec is None or self.folder is None:
            return INVALID
        return SKIPPED if self.skipped is not None else self.folder.state()


def with_folders(cells: Sequence[Cell]) -> list[Cell]:
    """Give every composed cell its run folder, drop duplicates (same run id), keeping the first, and names that are shared."""
    folders = iter(folders_of([cell.spec for cell in cells if cell.spec is not None]))
    kept: dict[str, Cell] = {}
    for place, cell in enumerate(cells):
        folder = next(folders) if cell.spec is not None else None
        kept.setdefault(folder.run_id if folder else str(place), dataclasses.replace(cell, folder=folder))
    names = labels.distinct([cell.name for cell in kept.values()], kept)
    return [dataclasses.replace(cell, name=name) for cell, name in zip(kept.values(), names, strict=True)]
