"""Sweep files: unions of grids with holes."""

import re
from collections import Counter

import pytest
import yaml

from ptqbench.cell.folders import sweep_folder
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import Composer, cells, compose_data
from ptqbench.sweeps.files import Sweep, expand, load_sweep, overrides
from ptqbench.sweeps.resolve import validated


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
    assert [cell.problem for cell in found if cell.spec is None] == []
    assert {cell.spec.execution.runs_dir for cell in found} == {"elsewhere"}
    assert {cell.spec.model.name for cell in found} == {"tiny"}


@pytest.fixture(scope="module")
def compose():
    return Composer()


def covering(points):
    """Few points that hold every value of every axis, alone and with the method it is used with."""
    seen = set()
    for point in points:
        new = {(axis, value, point.get("method")) for axis, value in point.items() if axis != "model"} | {
            ("model", point.get("model"))
        }
        if new - seen:
            seen |= new
            yield point


@pytest.mark.parametrize("path", sorted(sweep_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_composes(path, compose):
    sweep = load_sweep(path.stem)
    names = set()
    for point in covering(expand(sweep)):
        cell = validated(compose(overrides(sweep, point)))
        names.add(cell.method.name)
        assert cell.method.name == point["method"]
        assert point.get("bitwidth") in (None, cell.bitwidth.name)
        assert point.get("model", "tiny") == cell.model.name
    assert names == {point["method"] for point in expand(sweep)}


@pytest.mark.parametrize("name", ["composition", "loaq_weight_only", "resq_table1"])
def test_composer_agrees_with_hydra(name, compose):
    sweep = load_sweep(name)
    words = overrides(sweep, expand(sweep)[-1])
    assert compose(words) == compose_data(words)


@pytest.mark.parametrize("path", sorted(sweep_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_say_their_source(path):
    sweep = load_sweep(path.stem)
    assert sweep.title
    assert sweep.columns == ["model", "metric"]
    if path.stem not in ("demo", "composition"):
        text = path.read_text()
        assert re.search(r"arXiv \d{4}\.\d{5}", text)
        assert "Known:" in text or "README" in text


def test_composition_crosses_the_three_roles_with_three_seeds():
    points = [point for point in expand(load_sweep("composition")) if point["method"] != "fp16"]
    axes = [f"method/{role}" for role in ("transform", "target", "refine")]
    combinations = {tuple(point[axis] for axis in axes) for point in points}
    assert len(combinations) == 5 * 3 * 3
    bitwidths = {"learned_rotation": {"w4a4kv4"}}  # without quantized activations there is nothing to learn
    for combination in combinations:
        cells = [point for point in points if tuple(point[axis] for axis in axes) == combination]
        wanted = bitwidths.get(combination[0], {"w3", "w4a4kv4"})
        assert Counter((point["bitwidth"], point["seed"]) for point in cells) == Counter(
            (bits, seed) for bits in wanted for seed in (0, 1, 2)
        )
    assert {choice for choices in combinations for choice in choices} >= {
        "subspace_joint",
        "learned_rotation",
        "hadamard",
        "loaq",
        "null_space",
        "scale_refit",
    }
