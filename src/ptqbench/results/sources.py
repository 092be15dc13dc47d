"""The cells of a sweep for a table: the run folder of every cell, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ptqbench.cell.folders import with_own
from ptqbench.errors import PtqbenchError
from ptqbench.results.tables import KEYS, Absent, Source
from ptqbench.runs.folder import DONE, UNREADABLE
from ptqbench.sweeps.cells import Cell
from ptqbench.sweeps.compose import Composer, cells
from ptqbench.sweeps.files import Sweep, Value, describe, excluded, expand, load_sweep, overrides
from ptqbench.sweeps.naming import Naming
from ptqbench.sweeps.resolve import validated

NOT_COMPOSED = "not composed"
"""State of a cell that cannot be composed here."""


class Shown(NamedTuple):
    """Cells with the title and the columns of their table, and the papers that they reproduce."""

    cells: Sequence[Source]
    title: str = ""
    columns: tuple[str, ...] = ("metric",)
    papers: tuple[str, ...] = ()


def of_sweep(name: str, extra: list[str]) -> Shown:
    """The cells of a sweep file, with overrides for every cell, and what it says of its table."""
    sweep = load_sweep(name)
    return Shown(sweep_cells(sweep, extra), sweep.title, tuple(sweep.columns), tuple(sweep.papers))


def sweep_cells(sweep: Sweep, extra: list[str]) -> list[Source]:
    """List every cell of a sweep in the sweep's order, then the cells that it excludes.

    Args:
        sweep: A validated sweep.
        extra: Overrides for every cell.

    Returns:
        The run folder of a cell, with the cell; or an ``Absent`` with the reason why there is none: ``skipped`` by a role,
        ``NOT_COMPOSED`` (its model is not at hand, for example), or ``excluded`` by the sweep.
    """
    with with_own(sweep.config_dir):
        compose = Composer()
        points = {describe(point): point for point in expand(sweep)}
        found: list[Source] = []
        for cell in cells(sweep, extra):
            reason = str(cell.problem)
            if cell.draft is not None:
                found.append(Absent.of(cell.draft, NOT_COMPOSED, reason))
            elif cell.spec is None:
                found.append(_absent(compose, sweep, points[cell.name], extra, NOT_COMPOSED, reason))
            else:
                found.append(_source(cell))
        return found + [_absent(compose, sweep, point, extra, "excluded", why) for point, why in excluded(sweep)]


def _source(cell: Cell) -> Source:
    assert cell.spec is not None
    assert cell.folder is not None
    if cell.skipped is None or cell.folder.state() in (DONE, UNREADABLE):
        return cell.folder, cell.spec
    return Absent.of(cell.spec, "skipped", cell.skipped)


def _absent(
    compose: Composer, sweep: Sweep, point: dict[str, Value], extra: list[str], state: str, reason: str
) -> Absent:
    """Name a cell without a run id by its configuration; by its point of the sweep if the configuration is wrong."""
    try:
        return Absent.of(Naming(compose)(validated(compose(overrides(sweep, point) + extra))), state, reason)
    except PtqbenchError:
        model, method, bitwidth = (str(point.get(key, "?")) for key in KEYS)
        return Absent(model, method, bitwidth, str(point.get("seed", 0)), state, reason)
