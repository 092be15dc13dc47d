"""Sweep files: a union of grids with holes, expanded to override lists.

    name: demo
    title: ...
    common: [seed=0]                                  # overrides for every cell
    grids:
      - {method: [rtn, gptq], bitwidth: [w4, w3]}     # cartesian product
      - zip: {method: [q2n, loaq], bitwidth: [w2, w3]}   # pairs
    exclude: [{method: gptq, bitwidth: w4, reason: "..."}]
    expect_cells: 3                                   # guards against a typo that halves a table

Imports neither torch nor hydra; composing the override lists is ``compose.cells``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ptqbench.cell.folders import sweep_folder
from ptqbench.cell.spec import build, nearest, strict
from ptqbench.errors import ConfigError

Value = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A validated sweep file."""

    name: str
    grids: Annotated[list[dict[str, Any]], Field(min_length=1)]
    title: str = ""
    common: list[str] = dataclasses.field(default_factory=list)
    exclude: list[dict[str, Value]] = dataclasses.field(default_factory=list)
    expect_cells: int | None = None
    rows: list[str] = dataclasses.field(default_factory=lambda: ["method", "bitwidth"])
    columns: list[str] = dataclasses.field(default_factory=lambda: ["model", "metric"])


def load_sweep(name: str) -> Sweep:
    """Read a sweep by the name of a shipped one or by the path of a file.

    Raises:
        ConfigError: No such sweep, not YAML, an unknown key, or a number of cells other than ``expect_cells``.
    """
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else sweep_folder() / f"{name}.yaml"
    if not path.is_file():
        shipped = [p.stem for p in sweep_folder().glob("*.yaml")]
        raise ConfigError(f"no sweep {name!r}; {nearest(name, shipped)} (or give the path of a YAML file)")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with name and grids, got {type(data).__name__}")
    sweep: Sweep = build(strict(Sweep), data, path.name)
    count = len(expand(sweep))
    if sweep.expect_cells is not None and count != sweep.expect_cells:
        raise ConfigError(f"{path}: the grids expand to {count} cells, expect_cells says {sweep.expect_cells}")
    return sweep


def expand(sweep: Sweep) -> list[dict[str, Value]]:
    """Expand the grids to points (axis -> value), without exclusions and duplicates, in file order."""
    points: dict[tuple[tuple[str, Value], ...], dict[str, Value]] = {}
    for grid in sweep.grids:
        for point in _points(grid, sweep.name):
            if not any(_matches(point, rule) for rule in sweep.exclude):
                points.setdefault(tuple(sorted(point.items())), point)
    return list(points.values())


def overrides(sweep: Sweep, point: dict[str, Value]) -> list[str]:
    """Write one point as Hydra overrides, the common ones first."""
    return sweep.common + [f"{axis}={_text(value)}" for axis, value in point.items()]


def excluded(sweep: Sweep) -> list[tuple[dict[str, Value], str]]:
    """Points of the grids that an exclusion removes, each with its reason, in file order, once."""
    found: list[tuple[dict[str, Value], str]] = []
    for grid in sweep.grids:
        for point in _points(grid, sweep.name):
            rule = next((rule for rule in sweep.exclude if _matches(point, rule)), None)
            if rule is not None and all(point != other for other, _ in found):
                found.append((point, str(rule.get("reason", "excluded by the sweep file"))))
    return found


def describe(point: dict[str, Value]) -> str:
    """Name a point for people."""
    return " ".join(f"{axis}={_text(value)}" for axis, value in point.items())


def _points(grid: dict[str, Any], where: str) -> Iterator[dict[str, Value]]:
    paired = "zip" in grid
    axes = grid["zip"] if paired else grid
    if not isinstance(axes, dict) or not axes or (paired and len(grid) > 1):
        raise ConfigError(
            f"sweep {where}: expected a grid such as {{method: [rtn, gptq]}} or {{zip: {{...}}}}, got {grid!r}"
        )
    lists = {axis: values if isinstance(values, list) else [values] for axis, values in axes.items()}
    if paired and len({len(values) for values in lists.values()}) > 1:
        raise ConfigError(
            f"sweep {where}: zip needs lists of one length, got { ({a: len(v) for a, v in lists.items()}) }"
        )
    combine = zip(*lists.values(), strict=True) if paired else itertools.product(*lists.values())
    for values in combine:
        yield dict(zip(lists, values, strict=True))


def _matches(point: dict[str, Value], rule: dict[str, Value]) -> bool:
    conditions = {key: value for key, value in rule.items() if key != "reason"}
    return bool(conditions) and all(point.get(key) == value for key, value in conditions.items())


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
