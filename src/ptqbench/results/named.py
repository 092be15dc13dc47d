"""Find run folders by what people call them: its path, its run id, its name, or words of its label."""

from __future__ import annotations

import difflib
import functools
import os
import re
from pathlib import Path

from ptqbench.cell import labels
from ptqbench.errors import ConfigError, PtqbenchError
from ptqbench.results.tables.specs import SpecReader
from ptqbench.runs.folder import DONE, RunFolder, all_runs

SHORTEST_ID = 4
"""Digits of a run id that may be given in place of all."""
SHOWN = 4
"""Cells that an error message lists."""
SEEDS = re.compile(r" (?:\S*rotation_)?seed[= ]\d+")
"""The words of a label that say its seeds."""


def runs_named(name: str, root: Path) -> list[RunFolder]:
    """Find the run folder that a name means, or several that differ in their seeds.

    Args:
        name: A run folder; the beginning of a run id; a part of a folder's name between hyphens; or words of a label in any
            order, such as ``gptq w3``. Of several cells that have all words, finished ones are preferred; of cells whose labels
            differ in values alone, those with the fewest: ``gptq w3`` is not ``gptq damping=0.1 w3``.
        root: Folder of run folders.

    Raises:
        ConfigError: No cell has this name, or several have it that differ in more than seeds.
    """
    if os.path.isfile(os.path.join(name, "spec.json")):  # False, not an error, for what cannot be a name of a file
        return [RunFolder(Path(os.path.abspath(name)))]
    folders = list(all_runs(root))
    label = functools.partial(label_of, reader=SpecReader())
    found = [one for one in folders if len(name) >= SHORTEST_ID and one.run_id.startswith(name)]
    called: dict[str, list[RunFolder]] = {}
    if not found:
        for folder in folders:
            called.setdefault(label(folder), []).append(folder)
        wanted = set(name.split())
        fitting = {said: several for said, several in called.items() if wanted and wanted <= set(said.split())}
        found = _plainest(fitting) or [one for one in folders if f"-{name}-" in f"-{one.path.name}-"]
    if not found:
        raise ConfigError(f"no cell in {root} is called {name!r}; {_near(name, called)}")
    if len({SEEDS.sub("", label(one)) for one in found}) > 1:
        raise ambiguous(name, found)
    return found


def ambiguous(name: str, found: list[RunFolder]) -> ConfigError:
    """The error for a name of several cells that differ in more than seeds."""
    listed = [
        f"{said} ({one.run_id})"
        for said, one in zip(labels.brief(list(map(label_of, found[:SHOWN]))), found, strict=False)
    ]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ConfigError(f"{name!r} names {len(found)} cells: {'; '.join(listed)}{more}; say more words, or a run id")


def label_of(folder: RunFolder, reader: SpecReader | None = None) -> str:
    """The label of a cell; the name of its folder where its spec cannot be read."""
    try:
        return labels.name((reader or SpecReader()).read(folder)[0])
    except PtqbenchError:
        return folder.path.name


def _plainest(fitting: dict[str, list[RunFolder]]) -> list[RunFolder]:
    """Finished cells if there are any. Where their labels differ in values alone, those with the fewest, whatever their seeds."""
    done = {label: [one for one in several if one.state() == DONE] for label, several in fitting.items()}
    fitting = {label: several for label, several in done.items() if several} or fitting
    rows = {label: SEEDS.sub("", label).split() for label in fitting}
    names = {tuple(word for word in words if "=" not in word) for words in rows.values()}
    if len(names) == 1:
        fewest = min(map(len, rows.values()))
        fitting = {label: several for label, several in fitting.items() if len(rows[label]) == fewest}
    return [one for several in fitting.values() for one in several]


def _near(name: str, called: dict[str, list[RunFolder]]) -> str:
    """The labels closest to a name, by the words that they share, then by spelling."""
    if not called:
        return "it has no run folder"
    wanted = set(name.split())

    def likeness(label: str) -> tuple[int, float]:
        return len(wanted & set(label.split())), difflib.SequenceMatcher(None, name, label).ratio()

    near = labels.brief(sorted(called, key=likeness, reverse=True)[:SHOWN])
    return f"there are {len(called)} labels, the nearest: {'; '.join(near)}"
