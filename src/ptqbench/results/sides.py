"""What the two words of ``compare`` mean: a cell, the seeds of one row of a table, or all rows of a sweep."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ptqbench.cell.folders import sweep_folder
from ptqbench.errors import ConfigError
from ptqbench.results.compare import Side
from ptqbench.results.named import ambiguous, label_of, runs_named
from ptqbench.results.sources import NOT_COMPOSED, sweep_cells
from ptqbench.results.tables import KEYS, Source, records, tidy
from ptqbench.results.tables.pivot import NEVER_RUN, draw_of, in_order
from ptqbench.runs.folder import DONE, RunFolder
from ptqbench.sweeps.words import assign

WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")
"""An override word within one quoted argument; its own quotes may hold spaces."""
METHOD = re.compile(r"\+*method=")
NOT_ROLES = ("rtn", "none")
"""Solvers that look at no data."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: finished cells of one model, method and bitwidth with equal evaluations.

    Attributes:
        names: Model, method and bitwidth, as a table calls them.
        cell: The record of its first cell in the tidy frame.
        side: The cells by seed.
    """

    names: tuple[str, str, str]
    cell: Mapping[str, Any]
    side: Side

    @property
    def run_ids(self) -> frozenset[str]:
        """The cells."""
        return frozenset(folder.run_id for folder in self.side.draws.values())

    def called(self) -> str:
        """Name the row for people: its label, and its run id or its seeds."""
        folders = list(self.side.draws.values())
        if len(folders) == 1:
            return f"{label_of(folders[0])} ({folders[0].run_id})"
        return (
            f"{' '.join(self.names)}, seeds {', '.join(self.side.draws)} ({', '.join(one.run_id for one in folders)})"
        )


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a word of ``compare`` means: the finished rows of a sweep, or one row.

    ``missing`` says of every cell of a sweep that has no result what it is.
    """

    rows: list[Row]
    sweep: bool
    missing: tuple[str, ...] = ()


def asked(word: str, root: str | None) -> Asked:
    """Find the cells that a word of ``compare`` means.

    Args:
        word: A sweep, perhaps with overrides behind it; the overrides of a cell, of which one may have several seeds; else what
            ``named.runs_named`` takes.
        root: Folder of run folders; None for that of the sweep or the cell, else ``runs``.

    Raises:
        ConfigError: The word means no cell, cells that differ in more than seeds, or cells that are not finished.
    """
    words = WORD.findall(word)
    here = [] if root is None else assign("execution.runs_dir", root)
    if words and all("=" in one for one in words[1:]) and _is_sweep(words[0]):
        from ptqbench.sweeps.files import load_sweep

        frame, folders = framed(sweep_cells(load_sweep(words[0]), words[1:] + here))
        rows, missing = rows_of(frame, folders), tuple(unfinished(frame))
        if not rows:
            wrong = frame.loc[frame["state"] == NOT_COMPOSED, "reason"]
            if missing and len(wrong) == len(missing):
                raise ConfigError(f"{word!r}: none of its {len(missing)} cells can be composed: {wrong.iloc[0]}")
            raise ConfigError(
                f"{word!r}: none of its {len(missing)} cells is finished; run it first: {sweep_command(words)}"
            )
        return Asked(rows, True, missing)
    if any(METHOD.match(one) for one in words):
        return Asked([_one_row(word, _composed(words + here))], sweep=False)
    return Asked([_one_row(word, runs_named(word, Path(root or "runs")))], sweep=False)


def sweep_command(words: Sequence[str]) -> str:
    """The command line that runs the cells of a sweep."""
    return shlex.join(["python", "-m", "ptqbench", "sweep", *words])


def unfinished(frame: pd.DataFrame) -> Iterator[str]:
    """Name every cell of a tidy frame that could have a result and has none, with its state."""
    waiting = frame[frame["metric"].isna() & ~frame["state"].isin([*NEVER_RUN, DONE])]
    for cell in records(waiting):
        seed = draw_of(cell)
        yield f"{cell['model']} {cell['method']} {cell['bitwidth']} seed {seed} ({cell['state']})"


def _is_sweep(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or word in {path.stem for path in sweep_folder().glob("*.yaml")}


def _composed(words: list[str]) -> list[RunFolder]:
    """The folders of the cells that override words give; a word may have several values."""
    from ptqbench.sweeps.compose import resolved
    from ptqbench.sweeps.hydra_compose import combinations

    folders = []
    for cell in resolved([(" ".join(one), one) for one in combinations(words)]):
        if cell.problem is not None:
            raise cell.problem
        assert cell.folder is not None
        if cell.skipped is not None:
            raise ConfigError(f"{cell.name} is skipped: {cell.skipped}")
        folders.append(cell.folder)
    return folders


def _one_row(word: str, folders: list[RunFolder]) -> Row:
    """The row that some cells are the seeds of. A single cell need not be finished yet; who compares it says so."""
    if len(folders) == 1:
        frame, found = framed([(folders[0], None)] if folders[0].spec_path.is_file() else [])
        rows = rows_of(frame, found)
        return rows[0] if rows else Row((label_of(folders[0]), "", ""), {}, Side({"": folders[0]}))
    frame, found = framed((folder, None) for folder in folders if folder.spec_path.is_file())
    rows = rows_of(frame, found)
    missing = [one for one in folders if one.run_id not in {name for row in rows for name in row.run_ids}]
    if missing:
        raise ConfigError(
            f"{word!r}: {missing[0].path.name} is {missing[0].state()}; run it first, or name fewer seeds"
        )
    if len(rows) > 1:
        raise ambiguous(word, folders)
    return rows[0]


def framed(sources: Iterable[Source]) -> tuple[pd.DataFrame, dict[str, RunFolder]]:
    """The tidy frame of cells, and their run folders by run id."""
    cells = list(sources)
    folders = {one[0].run_id: one[0] for one in cells if isinstance(one, tuple) and isinstance(one[0], RunFolder)}
    return tidy(cells), folders


def rows_of(frame: pd.DataFrame, folders: Mapping[str, RunFolder]) -> list[Row]:
    """Collect finished cells that differ in seeds alone.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.
        folders: Run folders by run id; a cell that has none here is left out.

    Returns:
        Rows in the order of the frame, the seeds of each in the order of their numbers.
    """
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for cell in records(frame.dropna(subset=["model", "metric"]).drop_duplicates("run_id")):
        if cell["run_id"] in folders:
            key = (*(str(cell[name]) for name in KEYS), str(cell["evaluation"]))
            found.setdefault(key, {}).setdefault(draw_of(cell), cell)
    rows = []
    for (model, method, bitwidth, _), cells in found.items():
        first = next(iter(cells.values()))
        draws = {seed: folders[cells[seed]["run_id"]] for seed in in_order(set(cells))}
        rows.append(Row((model, method, bitwidth), first, Side(draws, _random(first))))
    return rows


def _random(cell: Mapping[str, Any]) -> bool:
    """Whether another seed gives other values: not where weights are rounded to the nearest code, or not at all."""
    plain = (cell["transform"], cell["target"], cell["refine"]) == ("none", "weight", "none")
    return not (plain and cell["solver"] in NOT_ROLES)


def pairs(first: Sequence[Row], second: Sequence[Row]) -> tuple[list[tuple[Row, Row]], list[Row]]:
    """Pair the rows of two sweeps by what the sweeps share.

    Rows that are in both sweeps are left out. Of the others, those belong together that agree in every one of model, method and
    bitwidth of which both sweeps have a common value.

    Returns:
        The pairs, in the order of the first sweep, and the rows of both sweeps that have no partner.

    Raises:
        ConfigError: No row of one sweep belongs to one of the other.
    """
    common = {row.run_ids for row in first} & {row.run_ids for row in second}
    left = [[row for row in rows if row.run_ids not in common] for rows in (first, second)]
    names = [[{row.names[place] for row in rows} for place in range(len(KEYS))] for rows in left]
    shared = [place for place in range(len(KEYS)) if names[0][place] & names[1][place]]
    found = [(a, b) for a in left[0] for b in left[1] if shared and all(a.names[k] == b.names[k] for k in shared)]
    if not found:
        in_both = f"; {len(common)} rows are in both" if common else ""
        raise ConfigError(
            f"expected finished cells of two sweeps that share model, method or bitwidth, got none beside equal cells{in_both}"
        )
    used = {row.run_ids for pair in found for row in pair}
    return found, [row for rows in left for row in rows if row.run_ids not in used]
