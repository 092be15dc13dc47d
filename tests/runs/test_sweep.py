"""Sweep files: unions of grids with holes."""

import pytest
import yaml

from ptqbench.compose import cells
from ptqbench.confdir import sweep_folder
from ptqbench.errors import ConfigError
from ptqbench.sweep import Sweep, expand, load_sweep, overrides


def write(tmp_path, **content):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "grids": [{"method": ["rtn"]}]} | content))
    return str(path)


def test_union_of_products_and_pairs_without_duplicates():
    sweep = Sweep("s", [{"a": [1, 2], "b": ["x", "y"]}, {"zip": {"a": [1, 3], "b": ["y", "z"]}}])
    assert [(p["a"], p["b"]) for p in expand(sweep)] == [(1, "x"), (1, "y"), (2, "x"), (2, "y"), (3, "z")]


def test_exclusion_matches_every_named_axis():
    sweep = Sweep("s", [{"a": [1, 2], "b": [3, 4]}], exclude=[{"a": 1, "b": 3, "reason": "no"}])
    assert len(expand(sweep)) == 3


def test_overrides_put_common_words_first_and_write_yaml_values():
    sweep = Sweep("s", [{"x": [True]}], common=["seed=1"])
    assert overrides(sweep, expand(sweep)[0]) == ["seed=1", "x=true"]


def test_scalar_axes_are_lists_of_one():
    assert expand(Sweep("s", [{"method": "rtn", "bitwidth": ["w4"]}])) == [{"method": "rtn", "bitwidth": "w4"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"expect_cells": 2}, "expand to 1 cells, expect_cells says 2"),
        ({"gridz": []}, "did you mean 'grids'"),
        ({"grids": []}, "grids"),
        ({"grids": [{"zip": {"a": [1], "b": [1, 2]}}]}, "one length"),
        ({"grids": [{"zip": {"a": [1]}, "b": [1]}]}, "expected a grid"),
        ({"common": "seed=1"}, "common"),
    ],
)
def test_bad_sweeps(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words):
        load_sweep(write(tmp_path, **content))


def test_not_yaml(tmp_path):
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_sweep(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("path", sorted(sweep_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_expands_and_states_its_size(path):
    sweep = load_sweep(path.stem)
    assert sweep.name == path.stem
    assert sweep.expect_cells == len(expand(sweep)), "a shipped sweep guards its number of cells"


def test_demo_composes_and_extra_words_reach_every_cell():
    found = cells(load_sweep("demo"), ["execution.runs_dir=elsewhere"])
    assert {cell.execution.runs_dir for cell in found} == {"elsewhere"}
    assert {cell.model.name for cell in found} == {"tiny"}
