"""Sweep files: a union of grids with holes, expanded to override lists.

    name: demo
    title: ...
    common: [seed=0]                                  # overrides for every cell
    grids:
      - {method: [rtn, gptq], bitwidth: [w4, w3]}     # cartesian product
      - zip: {method: [q2n, loaq], bitwidth: [w2, w3]}   # pairs
    exclude: [{method: gptq, bitwidth: w4, reason: "..."}]
    expect_cells: 3                                   # guards against a typo that halves a table
    papers: ["ResQ, Table 1"]                         # what it reproduces, for `table --paper`
    config_dir: my                                    # a folder beside this file with configuration files of one's own

A cell gets every value of an axis exactly as it is written, of whatever type. Words of ``common`` are in Hydra's grammar, as on
the command line. Imports neither torch nor hydra; composing the override lists is ``compose.cells``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ptqbench.cell.folders import sweep_folder
from ptqbench.cell.spec import build, nearest, strict
from ptqbench.errors import ConfigError
from ptqbench.sweeps.words import assign, is_axis, key_of, literal

MOST_CELLS = 100_000
"""Most points of all grids of a sweep; more is taken for a mistake."""

Value = Any
"""A value of an axis: null, a bool, a number, text, or a list or mapping of these."""

Point = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A validated sweep file."""

    name: str
    grids: Annotated[list[dict[str, Any]], Field(min_length=1)]
    title: str = ""
    common: list[str] = dataclasses.field(default_factory=list)
    exclude: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    expect_cells: int | None = None
    rows: list[Literal["method", "bitwidth"]] = dataclasses.field(default_factory=lambda: ["method", "bitwidth"])
    columns: list[Literal["model", "metric"]] = dataclasses.field(default_factory=lambda: ["model", "metric"])
    papers: list[str] = dataclasses.field(default_factory=list)
    config_dir: str | None = None


def load_sweep(name: str) -> Sweep:
    """Read a sweep by the name of a shipped one or by the path of a file.

    Raises:
        ConfigError: There is no such sweep, the file is not YAML, a key is unknown, a grid has no cells or too many, an exclusion
            removes nothing, or the number of cells is not ``expect_cells``.
        OSError: The file cannot be read.
    """
    from ptqbench.sweeps.yaml_file import read_mapping

    path = Path(name) if name.endswith((".yaml", ".yml")) else sweep_folder() / f"{name}.yaml"
    try:
        there = path.is_file()
    except OSError as error:
        raise ConfigError(f"no sweep {name[:60]!r}: {error.strerror}") from None
    if not there:
        shipped = [p.stem for p in sweep_folder().glob("*.yaml")]
        raise ConfigError(f"no sweep {name!r}; {nearest(name, shipped)} (or give the path of a YAML file)")
    # What the file says is checked before any cell is composed.
    sweep: Sweep = build(strict(Sweep), read_mapping(path, "name and grids"), path.name)
    if sweep.config_dir is not None:  # relative to the file
        sweep = dataclasses.replace(sweep, config_dir=str(path.parent / sweep.config_dir))
    _check_size(sweep, str(path))
    _check_exclusions(sweep, str(path))
    count = len(expand(sweep))
    if not count:
        raise ConfigError(f"{path}: exclude removes every cell; expected at least one that is left")
    if sweep.expect_cells is not None and count != sweep.expect_cells:
        raise ConfigError(f"{path}: the grids expand to {count} cells, expect_cells says {sweep.expect_cells}")
    return sweep


def expand(sweep: Sweep) -> list[Point]:
    """Expand the grids to points (axis -> value) in file order, without those that are excluded and without duplicates."""
    return [point for point, rule in _every_point(sweep) if rule is None]


def excluded(sweep: Sweep) -> list[tuple[Point, str]]:
    """Points of the grids that an exclusion removes, with the reason, in file order and without duplicates."""
    default = "excluded by the sweep file"
    return [(point, str(rule.get("reason", default))) for point, rule in _every_point(sweep) if rule is not None]


def overrides(sweep: Sweep, point: Point) -> list[str]:
    """Override words of one point, after the common ones."""
    return sweep.common + [word for axis, value in point.items() for word in assign(axis, value)]


def describe(point: Point) -> str:
    """A label of a point for people; different points have different labels."""
    return " ".join(f"{axis}={literal(value)}" for axis, value in point.items())


def _every_point(sweep: Sweep) -> list[tuple[Point, Point | None]]:
    """Points of all grids without duplicates, each with the first exclusion that removes it."""
    points: dict[str, Point] = {}
    for grid in sweep.grids:
        for point in _points(grid, sweep.name):
            points.setdefault(describe(dict(sorted(point.items()))), point)  # the order of axes makes no difference
    return [(point, next((rule for rule in sweep.exclude if _matches(point, rule)), None)) for point in points.values()]


def _axes(grid: Mapping[str, Any], where: str) -> tuple[dict[str, list[Any]], bool]:
    """The values of each axis of a grid, and whether they are paired (``zip``).

    Raises:
        ConfigError: This is not a grid, a name cannot be that of an axis, an axis has no values, or paired axes differ in length.
    """
    paired = "zip" in grid
    axes = grid["zip"] if paired else grid
    if not isinstance(axes, dict) or not axes or (paired and len(grid) > 1):
        raise ConfigError(
            f"sweep {where}: expected a grid such as {{method: [rtn, gptq]}} or {{zip: {{...}}}}, got {_brief(grid)}"
        )
    # Each axis by itself: its name and its values.
    lists = {axis: values if isinstance(values, list) else [values] for axis, values in axes.items()}
    for axis, values in lists.items():
        if axis == "zip" or not is_axis(axis) or re.match(r"hydra\b", key_of(axis)):
            raise ConfigError(
                f"sweep {where}: expected an axis such as seed, model.path or method/solver, got {axis!r}"
            )
        if not values:
            raise ConfigError(f"sweep {where}: axis {axis} has no values, so its grid has no cells; leave the grid out")
        for value in values:
            try:
                literal(value)
            except ConfigError as error:
                raise ConfigError(f"sweep {where}: axis {axis}: {error}") from None
    # Then the axes together.
    for first, second in itertools.combinations(lists, 2):
        if _overwrites(second, lists[second], first):
            raise ConfigError(
                f"sweep {where}: axis {second} overwrites what axis {first} before it says; put it first, or leave one of them out"
            )
    if paired and len({len(values) for values in lists.values()}) > 1:
        raise ConfigError(
            f"sweep {where}: zip needs lists of one length, got { ({a: len(v) for a, v in lists.items()}) }"
        )
    return lists, paired


def _overwrites(axis: str, values: list[Any], earlier: str) -> bool:
    """Whether a later axis gives its own value to the key of an earlier one. Hydra applies choices of files before all else."""
    key, before = key_of(axis), key_of(earlier)
    chooses = "." not in key and all(isinstance(value, str) for value in values)
    return key == before or (before.startswith(f"{key}.") and not chooses)


def _points(grid: Mapping[str, Any], where: str) -> Iterator[Point]:
    lists, paired = _axes(grid, where)
    combine = zip(*lists.values(), strict=True) if paired else itertools.product(*lists.values())
    for values in combine:
        yield dict(zip(lists, values, strict=True))


def _check_size(sweep: Sweep, where: str) -> None:
    """Refuse too many points, before any is made."""
    count = 0
    for grid in sweep.grids:
        lists, paired = _axes(grid, sweep.name)
        lengths = [len(values) for values in lists.values()]
        count += lengths[0] if paired else math.prod(lengths)
    if count > MOST_CELLS:
        said = "" if sweep.expect_cells is None else f"; expect_cells says {sweep.expect_cells}"
        raise ConfigError(f"{where}: the grids have {count:,} points, at most {MOST_CELLS:,} are taken{said}")


def _check_exclusions(sweep: Sweep, where: str) -> None:
    """Refuse an exclusion that removes nothing: with a typing error in it, cells would run that were to be left out."""
    points = [point for grid in sweep.grids for point in _points(grid, sweep.name)] if sweep.exclude else []
    for rule in sweep.exclude:
        if not isinstance(rule.get("reason", ""), str):
            raise ConfigError(f"{where}: exclude: expected a reason that is text, got {_brief(rule['reason'])}")
        if any(_matches(point, rule) for point in points):
            continue
        conditions = _conditions(rule)
        # Say which axis or value does not exist; where all do, no point has them together.
        for axis, value in conditions.items():
            there = {literal(point[axis]): None for point in points if axis in point}
            if not there:
                axes = {name for point in points for name in point}
                raise ConfigError(f"{where}: exclude: no grid has an axis {axis!r}; {nearest(axis, axes)}")
            if literal(value) not in there:
                known = ", ".join(list(there)[:20])
                raise ConfigError(f"{where}: exclude: {axis} is never {literal(value)}; its values: {known}")
        raise ConfigError(
            f"{where}: exclude: {describe(conditions)} removes no cell, since no cell has all of these values"
            if conditions
            else f"{where}: exclude: expected axes and values such as {{method: gptq, bitwidth: w4}}, got {_brief(rule)}"
        )


def _conditions(rule: Point) -> Point:
    return {axis: value for axis, value in rule.items() if axis != "reason"}


def _matches(point: Point, rule: Point) -> bool:
    """Whether a point has every value that an exclusion names; values are equal only where their types are too."""
    conditions = _conditions(rule).items()
    return bool(conditions) and all(
        axis in point and literal(point[axis]) == literal(value) for axis, value in conditions
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
