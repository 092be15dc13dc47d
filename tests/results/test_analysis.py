"""What the notebooks call is right."""

import itertools
import shutil

import numpy as np
import pytest

import golden_store
from ptqbench.errors import ConfigError
from ptqbench.results import analysis
from ptqbench.results.drawing import deal_looks
from ptqbench.runs import folder as store


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    golden_store.write(root)
    golden_store.write_reports(root)
    return root


@pytest.fixture(scope="module")
def cells(runs):
    return analysis.cells(runs)


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


def test_looks_stay_apart_without_colours():
    looks = deal_looks([*map(str, range(48)), "0"])
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
    assert table.loc[("none", "loaq", "gptq"), "null_space"] == pytest.approx(6.4)


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
    assert list(expected.index) == [("none", "weight", "gptq"), ("none", "loaq", "gptq")]
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


def test_role_table_keeps_solvers_apart(tmp_path):
    """Rounding to nearest and GPTQ are the same transform, target and refinement: their mean is nobody's perplexity."""
    for method, perplexity in {"rtn": 9.0, "gptq": 6.0}.items():
        spec = golden_store.cell("tiny", method, "w3", 0, execution={"runs_dir": str(tmp_path)})
        folder = store.create(spec)
        store.write_json(folder.result_path, golden_store.result(spec, folder, 3.0, perplexity, 0.5))
    table = analysis.role_table(analysis.cells(tmp_path), "wikitext2/perplexity", "w3")
    assert table["none"].to_dict() == {("none", "weight", "gptq"): 6.0, ("none", "weight", "rtn"): 9.0}


def test_roles_that_were_not_measured_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no quantized cell at bitwidth 'w2' with wikitext2/perplexity; there are tiny w3$"
    ):
        analysis.role_table(crossed(tmp_path), "wikitext2/perplexity", "w2")


def test_a_seed_that_was_evaluated_twice_counts_once(tmp_path):
    """The same cells with one task more: other cells, the same perplexity."""
    for tasks in (("arc_easy",), ("arc_easy", "winogrande")):
        for seed, perplexity in enumerate((6.0, 8.0)):
            spec = golden_store.cell("tiny", "gptq", "w3", seed, tasks=tasks, execution={"runs_dir": str(tmp_path)})
            folder = store.create(spec)
            store.write_json(folder.result_path, golden_store.result(spec, folder, 3.0, perplexity, 0.5))
    frame = analysis.cells(tmp_path)
    assert frame["run_id"].nunique() == 4
    (row,) = analysis.seeds(frame, "wikitext2/perplexity").itertuples(index=False)
    assert (row.n, row.mean) == (2, 7.0)
    assert row.std == pytest.approx(2**0.5)
    one = analysis.seeds(frame[frame["seed"] == 0], "wikitext2/perplexity")
    assert one[["std", "low", "high"]].isna().all(axis=None)


def test_differences_are_drawn_where_the_tests_put_them(cells):
    tests = analysis.paired_tests(cells[cells["model"] == "toy-1b"], "gptq")
    (axis,) = analysis.plot_tests(tests, "arc_easy/acc", "gptq").axes
    real, undecided = axis.lines[:2]
    drawn = [point for line in (real, undecided) for point in zip(*line.get_data(), strict=True)]
    rows = tests[tests["metric"] == "arc_easy/acc"]
    assert sorted(x for x, _ in drawn) == pytest.approx(sorted(100 * rows["difference"]))
    assert sorted(real.get_xdata()) == pytest.approx(sorted(100 * rows.loc[rows["p_value"] < 0.05, "difference"]))
    # Several seeds: they are part of the names. The best is on top, which is where an axis that points down begins.
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert {"rtn w3 0", "loaq w3 2"} <= set(names)
    assert names[0].startswith("q2n")
    assert min(drawn, key=lambda point: point[1])[0] == max(drawn)[0]
    with pytest.raises(ConfigError, match="no cell could be compared with x"):
        analysis.plot_tests(analysis.paired_tests(cells, "x"), "arc_easy/acc", "x")
