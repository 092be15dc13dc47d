"""Sweep files: unions of grids with holes."""

import re
from collections import Counter

import pytest
import yaml

from ptqbench.cell.folders import sweep_folder
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import Composer, cells, compose_data, requested
from ptqbench.sweeps.files import Sweep, expand, load_sweep, overrides
from ptqbench.sweeps.prefetch import prefetch
from ptqbench.sweeps.resolve import validated
from ptqbench.sweeps.yaml_file import read_yaml


def write(tmp_path, **content):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "grids": [{"method": ["rtn"]}]} | content, sort_keys=False))
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
        ({"grids": [{}]}, "expected a grid"),
        ({"grids": [{"zip": {}}]}, "expected a grid"),
        ({"grids": [{"zip": {"zip": {"method": ["gptq"]}}}]}, "expected an axis .* got 'zip'"),
        ({"grids": [{"method": []}]}, "axis method has no values"),
        ({"grids": [{"zip": {"method": []}}]}, "axis method has no values"),
        ({"grids": [{"a=1 b": [1]}]}, "expected an axis"),
        ({"grids": [{"x": [{"a b": 1}]}]}, "axis x: .* in a mapping, got 'a b'"),
        ({"grids": [{"hydra.verbose": [True]}]}, "expected an axis"),
        ({"grids": [{"seed": [1], "++seed": [2]}]}, r"axis \+\+seed overwrites what axis seed before it says"),
        (
            {"grids": [{"x.few_shot.a": [1], "x.few_shot": [{"b": 2}]}]},
            r"axis x\.few_shot overwrites what axis x\.few_shot\.a",
        ),
        ({"grids": [{"x.a": [1], "x": [None]}]}, r"axis x overwrites what axis x\.a"),
        ({"exclude": [{"method": "rtn", "reason": {"a": 1}}]}, "expected a reason that is text"),
        ({"exclude": [{"method": "rtn"}]}, "exclude removes every cell"),
        ({"exclude": [{"metod": "rtn"}]}, "no grid has an axis 'metod'; did you mean 'method'"),
        ({"exclude": [{"method": "rtnn"}]}, "method is never rtnn; its values: rtn"),
        ({"exclude": [{"reason": "why"}]}, "expected axes and values"),
        ({"exclude": [{}]}, "expected axes and values"),
        ({"grids": [{"a": [1, 2]}, {"a": 3, "b": 4}], "exclude": [{"a": 1, "b": 4}]}, "a=1 b=4 removes no cell"),
        ({"grids": [{"a": [1, 2]}], "exclude": [{"a": "1"}]}, "a is never '1'"),
        ({"grids": [{"a": [1, 2]}], "exclude": [{"a": True}]}, "a is never true"),
        ({"rows": ["metod"]}, "rows"),
        ({"columns": ["metrics"]}, "columns"),
        (
            {"grids": [{f"a{i}": list(range(30)) for i in range(8)}], "expect_cells": 5},
            "656,100,000,000 points.* says 5",
        ),
    ],
)
def test_bad_sweeps(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words):
        load_sweep(write(tmp_path, **content))


def test_an_axis_may_stand_beside_the_choice_of_its_section_or_follow_its_parent(compose):
    sweep = Sweep("s", [{"method": "gptq", "bitwidth.w_bits": [3], "bitwidth": ["w4a4kv4"], "evaluation": "tiny",
                         "evaluation.few_shot": [{"a": 1}], "evaluation.few_shot.a": [2]}])  # fmt: skip
    (point,) = expand(sweep)
    data = compose(overrides(sweep, point))
    assert (data["bitwidth"]["w_bits"], data["bitwidth"]["a_bits"], data["evaluation"]["few_shot"]) == (3, 4, {"a": 2})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: s\xe9", "not UTF-8"),
        (b"name: s\ngrids: [{a: 1}]\ngrids: [{b: 1}]", "'grids' is given twice"),
        (b"name: s\ngrids: [{a: 1, a: 2}]", "'a' is given twice"),
        (b"[" * 3000, "nested too deep"),
        (b"[" * 40 + b"]" * 40, "nested too deep"),
        (b"&a [*a]", "an alias stands for a value that contains it"),
        (b"a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
         + b"".join(b"a%d: &a%d [%s]\n" % (i + 1, i + 1, b",".join([b"*a%d" % i] * 9)) for i in range(8)), "aliases"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"name: !!binary aGk=", "not valid YAML"),
        (b"name: !!bool maybe", "'maybe' is no bool"),
        (b"name: !!bool [true]", "not valid YAML"),
        (b"name: !!int [1]", "not valid YAML"),
        (b"name: !!map [x]", "not valid YAML"),
        (b"name: !!float {a: 1}", "not valid YAML"),
        (b"seed: " + b"9" * 5000, "digits"),
        (b"", "expected a mapping with name and grids, got nothing"),
    ],
    ids=range(16),
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path, content, words):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as refused:
        load_sweep(str(tmp_path / "s.yaml"))
    assert "\n" not in str(refused.value)


def test_yaml_means_what_people_write(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "\ufeff[010, -3, 1e-3, 1.0, .5, 12e4567, no, on, null, ~, 2020-01-01, 1:30, 1_000, 'true', TRUE, .inf]\n",
        encoding="utf-8",
    )
    expected = [
        10,
        -3,
        1e-3,
        1.0,
        0.5,
        "12e4567",
        "no",
        "on",
        None,
        None,
        "2020-01-01",
        "1:30",
        "1_000",
        "true",
        True,
        ".inf",
    ]
    found = read_yaml(path)
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("name", ["nosuch/folder.yaml", "a" * 5000, "a" * 5000 + ".yaml", "", "."])
def test_no_such_sweep(name):
    with pytest.raises(ConfigError, match="no sweep"):
        load_sweep(name)


SECTIONS = {
    "model.path": [
        "/a=b",
        "a,b",
        "m[1]",
        "modèle",
        "m#1",
        "it's",
        "$(x)",
        "${x}",
        "a b\\",
        "null",
        "010",
        "",
        " ",
        None,
    ],
    "evaluation.limit": [None, 64],
    "evaluation.tasks": [["a/b", "c=d"], []],
    "evaluation.few_shot": [{}, {"a": 1, "b-c": 2}],
    "method.solver.damping": [1e-5, 0.5],
    "evaluation.texts": [{}, {"other": {"dataset": "file", "path": "x=y"}}],
}


@pytest.mark.parametrize("axis", SECTIONS)
def test_a_cell_gets_what_is_written(axis, compose):
    """Through Hydra and through the sections of the composer; a mapping replaces what was there."""
    sweep = Sweep("s", [{"method": "gptq", "evaluation": "tiny", axis: SECTIONS[axis]}])
    points = expand(sweep)
    assert len(points) == len(SECTIONS[axis])
    for point in points:
        data = compose(overrides(sweep, point))
        for part in axis.split("."):
            data = data[part]
        assert data == point[axis]
        assert type(data) is type(point[axis])
    section = axis.partition(".")[0]
    words = overrides(sweep, points[-1])
    assert compose_data(words)[section] == compose(words)[section]


@pytest.mark.parametrize("value", [None, {"w_bits": 4}, ["w4"], 4, True])
def test_a_section_is_chosen_by_name(value):
    (cell,) = cells(Sweep("s", [{"method": "rtn", "bitwidth": [value]}]), [])
    assert re.match(
        r"(bitwidth=.*: expected the name of a choice; known: .*w4|section 'bitwidth' is missing)", str(cell.problem)
    )


def test_points_that_differ_in_type_alone_are_two():
    assert len(expand(Sweep("s", [{"a": [1, "1", True, 1, "1"]}]))) == 3


def test_whatever_is_wrong_with_one_cell_stops_no_other(monkeypatch):
    from ptqbench.sweeps import compose as composing

    real = composing.pin

    def broken(spec, known):
        if spec.seed < 4:
            raise (KeyError("x"), OSError(28, "No space left on device", "f"), RecursionError(), ValueError("a\nb"))[
                spec.seed
            ]
        return real(spec, known)

    monkeypatch.setattr(composing, "pin", broken)
    found = cells(Sweep("s", [{"method": "rtn", "seed": [0, 1, 2, 3, 4]}]), [])
    assert [cell.spec is not None for cell in found] == [False] * 4 + [True]
    problems = [str(cell.problem) for cell in found[:4]]
    assert "KeyError" in problems[0]
    assert "No space left on device" in problems[1]
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("word", ["seed=[", "seed=0,1", "seed", "model.path=/a=b"])
def test_a_slip_in_a_word_of_all_cells_is_refused_at_once(word):
    for sweep, extra in (
        (Sweep("s", [{"method": "rtn"}]), [word]),
        (Sweep("s", [{"method": "rtn"}], common=[word]), []),
    ):
        with pytest.raises(ConfigError, match=re.escape(word)):
            cells(sweep, extra)


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
    names, model = set(), next((word.partition("=")[2] for word in sweep.common if word.startswith("model=")), "tiny")
    for point in covering(expand(sweep)):
        cell = validated(compose(overrides(sweep, point)))
        names.add(cell.method.name)
        assert cell.method.name == point["method"]
        assert point.get("bitwidth") in (None, cell.bitwidth.name)
        assert point.get("model", model) == cell.model.name
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
    if sweep.papers:
        text = path.read_text()
        assert re.search(r"arXiv \d{4}\.\d{5}", text)
        assert "Known:" in text or "README" in text


def test_composition_crosses_the_three_roles_with_three_seeds():
    points = [point for point in expand(load_sweep("composition")) if point["method"] != "fp16"]
    axes = [f"method/{role}" for role in ("transform", "target", "refine")]
    combinations = {tuple(point[axis] for axis in axes) for point in points}
    assert len(combinations) == 6 * 3 * 3
    bitwidths = {"learned_rotation": {"w4a4kv4"}}  # without quantized activations there is nothing to learn
    for combination in combinations:
        cells = [point for point in points if tuple(point[axis] for axis in axes) == combination]
        wanted = bitwidths.get(combination[0], {"w3", "w4a4kv4"})
        assert Counter((point["bitwidth"], point["seed"]) for point in cells) == Counter(
            (bits, seed) for bits in wanted for seed in (0, 1, 2)
        )
    assert {choice for choices in combinations for choice in choices} >= {
        "subspace_joint",
        "subspace_joint_shared",
        "learned_rotation",
        "hadamard",
        "loaq",
        "null_space",
        "scale_refit",
    }


def test_a_cell_that_makes_no_sense_does_not_keep_prefetch_from_the_others(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\ngrids: [{method: rtn, model: tiny, evaluation: tiny, evaluation.tasks: [[]], bitwidth.w_bits: [99, 4]}]\n"
    )
    items = prefetch(requested([str(path)]), tmp_path / "manifest.json")
    assert [(item.kind, item.loaded) for item in items] == [
        ("cell", False),
        ("model", True),
        ("text", True),
        ("text", True),
    ]
    assert "bitwidth.w_bits" in items[0].detail
