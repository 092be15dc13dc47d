"""The notebooks run on the golden store, hold calls and no logic, and carry no output; what they call is right."""

import ast
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import golden_store
from ptqbench.errors import ConfigError
from ptqbench.results import analysis
from ptqbench.runs import folder as store

FOLDER = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    golden_store.write(root)
    golden_store.write_reports(root)
    return root


@pytest.fixture(scope="module")
def cells(runs):
    return analysis.cells(runs)


def test_there_are_five_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_carry_no_output_and_no_logic(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    logic = ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.If | ast.Try | ast.ListComp | ast.Lambda
    for source in code_cells(path):
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, runs, tmp_path, monkeypatch):
    """Executed cell by cell in one namespace; ``display`` collects instead of drawing."""
    shown = []
    ipython = types.ModuleType("IPython.display")
    ipython.display, ipython.HTML = lambda *things: shown.extend(things), str
    package = types.ModuleType("IPython")
    package.version_info, package.get_ipython = (9, 0), lambda: None  # matplotlib looks at both
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    for name, value in {"RUNS": runs, "FIGURES": tmp_path, "MODEL": "toy-1b", "BITWIDTH": "w3"}.items():
        monkeypatch.setenv(f"PTQBENCH_{name}", str(value))
    namespace = {}
    for number, source in enumerate(code_cells(path)):
        exec(compile(source, f"{path.name}, cell {number}", "exec"), namespace)
    assert shown or list(tmp_path.iterdir())
    assert not [one for one in shown if isinstance(one, pd.DataFrame) and one.empty]
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_layers_are_those_of_the_cells_that_have_a_report(cells):
    report = analysis.layers(cells)
    finished = cells.dropna(subset=["metric"])
    assert set(report["run_id"]) == set(finished.loc[finished["method"] != "fp16", "run_id"])
    assert analysis.by_linear(report, "correction_norm").loc[
        ("toy-1b", "gptq", "w3"), "mlp.down_proj"
    ] == pytest.approx(0.03)


def test_a_damaged_layer_report_is_left_out(runs, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    damaged = next(copy.glob("*-gptq-w3-s0-*"))
    (damaged / "layers.parquet").write_bytes(b"PAR1")
    report = analysis.layers(analysis.cells(copy))
    assert store.RunFolder(damaged).run_id not in set(report["run_id"])
    assert len(report)


def test_wins_pair_the_same_linear(cells):
    found = analysis.wins(analysis.layers(cells), "rtn", "gptq")
    assert found["median_ratio"].unique().tolist() == [0.5]
    assert found["share_lower"].unique().tolist() == [1.0]
    with pytest.raises(ConfigError, match="no layer report of method 'x'"):
        analysis.wins(analysis.layers(cells), "rtn", "x")


def test_front_agrees_with_the_definition(cells):
    rows = analysis.pareto(cells, "wikitext2/perplexity")
    for row in rows.to_dict("records"):
        rivals = rows[
            (rows["model"] == row["model"]) & (rows["cost"] <= row["cost"]) & (rows["quality"] <= row["quality"])
        ]
        beaten = ((rivals["cost"] < row["cost"]) | (rivals["quality"] < row["quality"])).any()
        assert row["front"] == (not beaten)
    assert 0 < rows["front"].sum() < len(rows)
    accuracy = analysis.pareto(cells, "arc_easy/acc")
    best = accuracy.loc[accuracy[accuracy["model"] == "toy-1b"]["quality"].idxmax()]
    assert best["method"] == "fp16"
    assert best["front"]


def legend(figure):
    (axis,) = figure.axes
    marks, names = axis.get_legend_handles_labels()
    lines = [mark if hasattr(mark, "get_marker") else mark.lines[0] for mark in marks]
    return {name: (line.get_marker(), line.get_color()) for name, line in zip(names, lines, strict=True)}


@pytest.mark.parametrize("given", [True, False])
def test_a_method_looks_the_same_in_every_plot(cells, given):
    looks = analysis.deal_looks(cells["method"].dropna()) if given else None
    rows = analysis.pareto(cells, "wikitext2/perplexity")
    backwards = rows.iloc[::-1]
    first, second = (
        legend(analysis.plot_pareto(each, "wikitext2/perplexity", "x", looks)) for each in (rows, backwards)
    )
    assert first == second
    assert list(first) == [name for name in (looks or sorted(first)) if name in first]
    assert len({marker for marker, _ in first.values()}) == len(first)
    report = analysis.layers(cells)
    curves = legend(analysis.plot_layers(report, "relative_output_error", "mlp.down_proj", looks))
    assert len(curves) > 3
    assert given is all(first[name] == curves[name] for name in first.keys() & curves.keys())


def test_looks_stay_apart_without_colours():
    looks = analysis.deal_looks([*map(str, range(48)), "0"])
    assert len(looks) == len({(look.marker, look.line) for look in looks.values()}) == 48


def test_paired_tests_use_the_examples_and_say_what_lacks_them(cells, tmp_path):
    found = analysis.paired_tests(cells[cells["model"] == "toy-1b"], "gptq")
    rtn = found[(found["method"] == "rtn") & (found["seed"] == 0) & (found["metric"] == "wikitext2/perplexity")]
    assert rtn["verdict"].iloc[0].startswith("rtn is worse than gptq")
    assert rtn["difference"].iloc[0] == pytest.approx(7.5 / 1.31 - 1, rel=1e-2)
    assert set(found["method"]) == {"rtn", "loaq", "q2n", "quarot"}, "same bitwidth and seed only"
    golden_store.write(tmp_path)
    without = analysis.paired_tests(analysis.cells(tmp_path), "gptq")
    assert without["verdict"].str.contains("does not exist|no record").all()


def crossed(root):
    """Every target x refinement, three seeds, with known effects: loaq -0.5, null_space -0.1, seeds add their number."""
    for target, by_target in {"weight": 0.0, "loaq": -0.5}.items():
        for refine, by_refine in {"none": 0.0, "null_space": -0.1}.items():
            for seed in range(3):
                spec = golden_store.cell("tiny", "gptq", "w3", seed, execution={"runs_dir": str(root)})
                data = store.to_dict(spec)
                data["method"]["target"]["name"], data["method"]["refine"]["name"] = target, refine
                folder = store.create(store.build(store.RunSpec, data))
                perplexity = 6.0 + by_target + by_refine + seed
                store.write_json(folder.result_path, golden_store.result(spec, folder, 3.0, perplexity, 0.5))
    return analysis.cells(root)


def test_effects_of_a_role_are_taken_within_a_seed(tmp_path):
    frame = crossed(tmp_path)
    effects = analysis.role_effects(frame, "wikitext2/perplexity", "w3", "target", "weight")
    assert np.allclose(effects["difference"], -0.5)
    assert np.allclose(effects["error"], 0.0, atol=1e-9), "the spread over seeds cancels"
    assert effects["n"].tolist() == [3, 3]
    table = analysis.role_table(frame, "wikitext2/perplexity", "w3")
    assert table.loc[("none", "loaq"), "null_space"] == pytest.approx(6.4)


def test_seeds_of_rotations_do_not_count_as_seeds_of_an_effect(tmp_path):
    """Three rotations of each of two seeds, on both sides: an effect has two independent differences, not eighteen pairs."""
    for target, shift in {"weight": 0.0, "loaq": -0.5}.items():
        for seed, rotation in itertools.product(range(2), range(3)):
            data = store.to_dict(golden_store.cell("tiny", "quarot", "w3", seed, execution={"runs_dir": str(tmp_path)}))
            data["method"]["target"]["name"] = target
            data["method"]["transform"]["options"]["rotation_seed"] = rotation
            spec = store.build(store.RunSpec, data)
            folder = store.create(spec)
            result = golden_store.result(spec, folder, 3.0, 6.0 + shift + (1 + 2 * seed) * rotation * (shift < 0), 0.5)
            store.write_json(folder.result_path, result)
    effects = analysis.role_effects(analysis.cells(tmp_path), "wikitext2/perplexity", "w3", "target", "weight")
    assert effects[["difference", "error", "n"]].to_numpy().tolist() == [[pytest.approx(1.5), pytest.approx(1.0), 2]]


def test_roles_come_in_one_order_whatever_the_order_of_folders(tmp_path):
    frame = crossed(tmp_path)
    expected = analysis.role_table(frame, "wikitext2/perplexity", "w3")
    assert list(expected.index) == [("none", "weight"), ("none", "loaq")]
    assert list(expected.columns) == ["none", "null_space"]
    for seed in range(3):
        shuffled = frame.sample(frac=1, random_state=seed)
        assert analysis.role_table(shuffled, "wikitext2/perplexity", "w3").equals(expected)
        effects = analysis.role_effects(shuffled, "wikitext2/perplexity", "w3", "refine", "none")
        assert list(effects.index.get_level_values("target")) == ["weight", "loaq"]


def test_role_table_refuses_to_mix_settings(tmp_path):
    crossed(tmp_path)
    spec = golden_store.cell("tiny", "gptq", "w3", 0, execution={"runs_dir": str(tmp_path)})
    data = store.to_dict(spec)
    data["calibration"]["n_samples"] = 7
    folder = store.create(store.build(store.RunSpec, data))
    store.write_json(folder.result_path, golden_store.result(spec, folder, 3.0, 5.0, 0.5))
    mixed = analysis.cells(tmp_path)
    with pytest.raises(ConfigError, match="several settings"):
        analysis.role_table(mixed, "wikitext2/perplexity", "w3")
    with pytest.raises(ConfigError, match="several settings"):
        analysis.role_effects(mixed, "wikitext2/perplexity", "w3", "target", "weight")
