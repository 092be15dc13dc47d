"""Two finished cells, metric by metric: against scipy on the stored rows, and on the command line."""

import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fidelity_cells import N_TOKENS, fidelity_cell, fill
from scipy import stats as reference

import golden_store
from ptqbench.cell.spec import RunSpec, build, to_dict
from ptqbench.cli import main
from ptqbench.errors import ConfigError
from ptqbench.evaluate.records import window_scores, write_records
from ptqbench.results import analysis, compare, stats
from ptqbench.results.named import label_of, runs_named
from ptqbench.results.sides import framed, rows_of
from ptqbench.runs.folder import RunFolder, all_runs, create, write_json
from ptqbench.sweeps import compose
from ptqbench.sweeps.files import load_sweep


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("compared") / "runs"


@pytest.fixture(scope="module")
def cells(root):
    return {method: fidelity_cell(root, method) for method in ("fp16", "gptq", "rtn")}


@pytest.fixture(scope="module")
def judged(cells):
    return {one.metric: one for one in compare.compare_cells(cells["rtn"], cells["gptq"], ("rtn", "gptq"))}


def rows(folder, kind):
    path = folder.windows_path("wikitext2") if kind == "windows" else folder.examples_path("arc_easy")
    return pd.read_parquet(path)


@pytest.mark.parametrize("column", ["kl", "top1"])
def test_figures_of_windows_are_compared_by_the_paired_t_test(cells, judged, column):
    a, b = (rows(cells[method], "windows")[column] for method in ("rtn", "gptq"))
    one, expected = judged[f"wikitext2/{column}"], reference.ttest_rel(b, a)
    found, interval = one.found, expected.confidence_interval(0.95)
    assert (found.kind, found.n, found.test) == (column, 12, "paired t")
    assert (found.first, found.second) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.first == pytest.approx(cells["rtn"].result()["metrics"][f"wikitext2/{column}"]["value"])
    assert one.word == "better"


def test_changed_answers_are_compared_by_an_exact_test_on_the_examples(cells, judged):
    a, b = (rows(cells[method], "examples")["flipped"].to_numpy() for method in ("rtn", "gptq"))
    found = judged["arc_easy/flips"].found
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    assert only_first + only_second > 3
    assert found.p_value == pytest.approx(reference.binomtest(only_first, only_first + only_second).pvalue)
    assert (found.first, found.second, found.n) == (a.mean(), b.mean(), 40)
    assert found.low < found.difference < found.high < 0.2


def test_all_p_values_are_corrected_together(judged):
    raw = {name: one.found.p_value for name, one in judged.items()}
    assert len(raw) == 5
    assert {name: one.adjusted for name, one in judged.items()} == stats.holm(raw)


def test_verdicts_have_the_unit_and_the_direction(judged):
    divergence, agreement = judged["wikitext2/kl"], judged["wikitext2/top1"]
    assert divergence.verdict.startswith(
        f"gptq is better than rtn ({divergence.found.difference:+.3g} nats, 95 % interval"
    )
    assert agreement.verdict.startswith(f"gptq is better than rtn ({100 * agreement.found.difference:+.2f} points")
    assert agreement.verdict.endswith("12 windows)")
    more = {f"e{i}": float(i < 20) for i in range(60)}
    fewer = {f"e{i}": 0.0 for i in range(60)}
    said = stats.verdict(stats.compare_flips(fewer, more), "A", "B")
    assert said.startswith("B is worse than A (+33.33 points")
    assert said.endswith("60 examples)")


def test_a_difference_within_the_noise_floor_is_none():
    a = {i: 1e-7 + 1e-9 * (i % 3) for i in range(30)}
    b = {i: value + 5e-8 + 1e-10 * (i % 2) for i, value in a.items()}
    clear = stats.compare_windows(a, b, "kl")
    assert stats.verdict(clear, "A", "B").startswith("B is worse than A (+5e-08 nats")
    hidden = stats.compare_windows(a, b, "kl", noise=6e-8)
    assert stats.verdict(hidden, "A", "B").startswith(
        "B and A are not distinguishable within the noise floor of 6e-08 nats"
    )
    with pytest.raises(ConfigError, match="two windows"):
        stats.compare_windows({0: 1.0}, {0: 2.0}, "kl")


def test_the_noise_floor_comes_from_the_results(cells, tmp_path):
    others = []
    for method in ("rtn", "gptq"):
        folder = RunFolder(tmp_path / cells[method].path.name)
        shutil.copytree(cells[method].path, folder.path)
        others.append(folder)
    result = others[1].result()
    result["metrics"]["wikitext2/kl"]["noise"] = 10.0
    write_json(others[1].result_path, result)
    found = {one.metric: one for one in compare.compare_cells(*others)}
    assert found["wikitext2/kl"].word == "undecided"
    assert found["wikitext2/top1"].word == "better"


def test_where_cells_differ_most(cells):
    pair = cells["rtn"], cells["gptq"]
    apart, n_apart = compare.furthest_apart(*pair, "wikitext2/perplexity", 3)
    losses = [rows(cell, "windows")["nll"].to_numpy() / N_TOKENS for cell in pair]
    order = np.argsort(-np.abs(losses[1] - losses[0]))[:3]
    assert n_apart == 12
    assert [one.name for one in apart] == [f"window {i}" for i in order]
    assert [(one.first, one.second) for one in apart] == [(losses[0][i], losses[1][i]) for i in order]
    apart, n_apart = compare.furthest_apart(*pair, "arc_easy/acc", 100)
    right = [rows(cell, "examples")["acc"].to_numpy() for cell in pair]
    assert n_apart == len(apart) == (right[0] != right[1]).sum() > 0
    moved = [abs(one.margins[1] - one.margins[0]) for one in apart]
    assert moved == sorted(moved, reverse=True)
    for one in apart:
        number = int(one.name.split()[1])
        for cell, margin, value in zip(pair, one.margins, (one.first, one.second), strict=True):
            row = rows(cell, "examples").iloc[number]
            others = np.delete(row["log_likelihoods"], int(row["target"]))
            assert margin == pytest.approx(row["log_likelihoods"][int(row["target"])] - others.max())
            assert value == (margin > 0)


def test_an_example_without_choices_has_no_margin():
    assert math.isnan(compare._margin({"log_likelihoods": None, "target": "42"}))
    assert math.isnan(compare._margin({"log_likelihoods": [-1.0, -2.0], "target": "7"}))


def test_a_record_without_fidelity_names_the_column(cells):
    with pytest.raises(ConfigError, match="no column 'unknown'"):
        window_scores(cells["rtn"], "wikitext2", "unknown")


def run(capsys, root, *words):
    status = main(["compare", *words, "--runs-dir", str(root)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command_prints_every_metric_in_80_columns(cells, root, judged, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, root, "rtn", "gptq w3", "--examples", "2")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert f"A: toy-1b rtn w3 seed 0 ({cells['rtn'].run_id})" in out
    flat = " ".join(out.split())
    kl = judged["wikitext2/kl"].found
    assert f"{kl.first:.3f} {kl.second:.4f} {kl.difference:+.3g} {kl.low:+.3g} to {kl.high:+.3g}" in flat
    perplexity = judged["wikitext2/perplexity"].found
    assert f"{perplexity.first:.2f}"[:4] in flat
    assert f"{100 * perplexity.difference:+.2f}" in flat
    assert "better" in flat
    assert flat.index("perplexity") < flat.index("wikitext2/kl"), "the order of tables"
    assert "wikitext2/kl: the 2 of 12 windows that differ most" in flat
    assert "arc_easy/acc: the 2 of" in flat
    assert "margin: log-likelihood of the right choice" in flat


def test_an_average_over_tasks_has_a_short_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "average(arc_easy/acc, arc_easy/acc)"
    for method in ("rtn", "gptq"):
        folder = fidelity_cell(tmp_path, method)
        average = {"value": 0.5, "stderr": 0.1, "tasks": ["arc_easy/acc", "arc_easy/acc"]}
        write_json(folder.result_path, folder.result() | {"averages": {name: average}})
    status, out, _ = run(capsys, tmp_path, "rtn", "gptq", "--examples", "1")
    flat = " ".join(out.split())
    assert status == 0
    assert "average of 2 35.0 55.0 +20.00" in flat, "the rest of its name is on the next line"
    assert f"average of 2 tasks: {name}." in flat


def test_command_says_where_protocols_differ(cells, tmp_path, capsys):
    other = fidelity_cell(tmp_path, "gptq")
    result = other.result()
    result["metrics"]["arc_easy/acc"]["batch_size"] = 99
    write_json(other.result_path, result)
    shutil.copytree(cells["rtn"].path, tmp_path / cells["rtn"].path.name)
    status, out, _ = run(capsys, tmp_path, "rtn", "gptq")
    assert status == 0
    flat = " ".join(out.split())
    assert (
        "[1] measured differently: A lm-eval 0.4.13 arc_easy version 1, 0 shots, 500 examples, 8 batch; B lm-eval"
        in flat
    )
    assert "99 batch" in flat


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rtn", "gtpq"), "no cell in {root} is called 'gtpq'; there are 3 labels, the nearest: toy-1b gptq w3 seed 0; "),
        (("w3", "gptq"), "'w3' names 2 cells: toy-1b gptq w3 seed 0 ("),
        (("rtn", "rtn w3"), "twice ('rtn' and 'rtn w3')"),
        (("x" * 5000, "gptq"), "there are 3 labels, the nearest"),
        (("rtn",), "compare: the following arguments are required: B"),
        (("rtn", "gptq", "--examples", "-1"), "expected a whole number of at least 0, got '-1'"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_status_2(cells, root, capsys, words, said):
    status, out, err = run(capsys, root, *words)
    assert (status, out) == (2, "")
    assert said.format(root=root) in err
    assert err.count("\n") == 1


def test_unfinished_and_unlike_cells_are_refused(cells, tmp_path, capsys):
    fidelity_cell(tmp_path, "rtn", finished=False)
    other = fidelity_cell(tmp_path, "gptq")
    shutil.copytree(cells["fp16"].path, tmp_path / cells["fp16"].path.name)
    status, _, err = run(capsys, tmp_path, "rtn", "gptq")
    assert status == 2
    assert "expected two finished cells" in err
    assert "it is pending; run it first" in err
    longer = rows(other, "windows").assign(digest="other").to_dict("records")
    write_records(other.windows_path("wikitext2"), longer, other.run_id, {})
    status, _, err = run(capsys, tmp_path, "fp16", "gptq")
    assert status == 2
    assert "wikitext2/kl: expected two cells measured on the same examples" in err
    assert err.count("\n") == 1


def test_names_of_cells(cells, root, tmp_path):
    gptq = cells["gptq"]
    for name in (
        gptq.run_id,
        gptq.run_id[:5],
        "gptq",
        "w3 gptq",
        "gptq-w3",
        "toy_1b-gptq",
        gptq.path.name,
        str(gptq.path),
    ):
        assert [one.path.name for one in runs_named(name, root)] == [gptq.path.name], name
    copied = fidelity_cell(tmp_path / "edited", "gptq")
    write_json(copied.spec_path, {"no": "cell"})
    assert runs_named(copied.path.name, copied.path.parent) == [copied]
    assert label_of(copied) == copied.path.name
    with pytest.raises(ConfigError, match="it has no run folder"):
        runs_named("gptq", tmp_path)


def test_a_finished_cell_and_the_plainer_label_are_preferred(tmp_path):
    done, waiting = fidelity_cell(tmp_path, "rtn"), fidelity_cell(tmp_path, "rtn", seed=1, finished=False)
    assert runs_named("rtn", tmp_path) == [done]
    assert runs_named("rtn 1", tmp_path) == [waiting]
    more = {"calibration": {"dataset": "c4", "n_samples": 7}, "changed": ("calibration.n_samples",)}
    other = fidelity_cell(tmp_path, "rtn", **more)
    assert runs_named("rtn w3", tmp_path) == [done]
    assert runs_named("rtn calibration.n_samples=7", tmp_path) == [other]
    second = fidelity_cell(tmp_path, "rtn", seed=2)
    assert runs_named("rtn", tmp_path) == [done, second], "its seeds, and not the cell with another calibration"
    assert runs_named("rtn 2", tmp_path) == [second]
    with pytest.raises(ConfigError, match=r"'toy_1b-rtn' names 4 cells: .*; say more words, or a run id"):
        runs_named("toy_1b-rtn", tmp_path)


def rotated(root, method, seeds):
    """Cells of one row that differ in their rotation seed alone."""
    for rotation in seeds:
        data = to_dict(golden_store.cell("toy-1b", method, "w3", 0, ("arc_easy",)))["method"]
        data["transform"]["options"]["rotation_seed"] = rotation
        changed = ("method.transform.options.rotation_seed",) if rotation else ()
        spec = golden_store.cell(
            "toy-1b", method, "w3", 0, ("arc_easy",), execution={"runs_dir": str(root)}, changed=changed
        )
        spec = build(RunSpec, to_dict(spec) | {"method": data})
        yield fill(create(spec), spec, method, draw=rotation)


def test_all_rotation_seeds_of_a_side_are_used(tmp_path, capsys):
    many, one = list(rotated(tmp_path, "quarot", (0, 1, 2))), fidelity_cell(tmp_path, "gptq")
    assert set(runs_named("quarot w3", tmp_path)) == set(many)
    assert [row.path for row in runs_named("quarot rotation_seed=1", tmp_path)] == [many[1].path]
    status, out, _ = run(capsys, tmp_path, "gptq", "quarot")
    flat = " ".join(out.replace("│", " ").split())
    assert status == 0
    assert "B: toy-1b quarot w3, seeds 0/0, 0/1, 0/2" in flat
    losses = [np.mean([rows(cell, "windows")["nll"].mean() for cell in cells]) / N_TOKENS for cells in ([one], many)]
    assert f"{np.exp(losses[0]):.2f} {np.exp(losses[1]):.2f} {100 * np.expm1(losses[1] - losses[0]):+.2f}" in flat
    assert "Several seeds: values are means over them" in flat
    # The table of the notebook says the same of the same cells.
    found = analysis.paired_tests(analysis.cells(tmp_path), "gptq").set_index("metric")
    assert found["difference"]["wikitext2/perplexity"] == pytest.approx(np.expm1(losses[1] - losses[0]))
    assert found["verdict"]["wikitext2/perplexity"].endswith("12 windows, 1 and 3 seeds)")
    said = run(capsys, tmp_path, "gptq", "quarot", "--examples", "1")
    assert said[0] == 2
    assert "expected one seed of each side" in said[2]


SWEEP = """
name: {name}
common: ["model=tiny", "evaluation.tasks=[]"]
grids:
  - {{method: [{methods}], bitwidth: [w3, w4], seed: [0, 1]}}
"""


@pytest.fixture
def sweeps(tmp_path):
    """Two sweeps with two methods each, of which one is in both; their cells are finished, with invented figures."""
    for name, methods in {"one": "rtn, gptq", "two": "gptq, gptaq"}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(SWEEP.format(name=name, methods=methods))
        for cell in compose.cells(load_sweep(str(path)), [f"execution.runs_dir={tmp_path}"]):
            fill(create(cell.spec, cell.folder), cell.spec, cell.spec.method.name, cell.spec.seed)
    return tmp_path


def test_two_sweeps_are_compared_pair_by_pair(sweeps, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    one, two = (str(sweeps / f"{name}.yaml") for name in ("one", "two"))
    status, out, err = run(capsys, sweeps, one, two)
    assert (status, err) == (0, "")
    # gptq is in both sweeps, so that rtn and gptaq are left, and are paired within their bits.
    named = [re.split(r"[ │]{2,}", line.strip()) for line in out.splitlines() if " | " in line]
    assert [line[:2] for line in named] == [
        [f"rtn | gptaq {bits}", metric] for bits in ("w3", "w4")
        for metric in ("wikitext2/perplexity", "wikitext2/kl", "wikitext2/top1", "arc_easy/acc", "arc_easy/flips")
    ]  # fmt: skip
    # The same by hand: means over the seeds, and Holm over all ten.
    frame, folders = framed((folder, None) for folder in all_runs(sweeps))
    sides = {row.names[1:]: row.side for row in rows_of(frame, folders)}
    assert {len(side.draws) for side in sides.values()} == {2}
    found = {
        (bits, metric): compare.compare_metric(sides["rtn", bits], sides["gptaq", bits], metric)
        for bits, metric in ((line[0][-2:], line[1]) for line in named)
    }
    adjusted = stats.holm({f"{key}": one.p_value for key, one in found.items()})
    for line, (key, one) in zip(named, found.items(), strict=True):
        p_value = adjusted[f"{key}"]
        shown = f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.0e}"
        assert line[4:] == [stats.in_unit(one, one.difference), f"{stats.in_unit(one, one.low)} to {stats.in_unit(one, one.high)}",
                            shown, line[-1]]  # fmt: skip
        assert line[-1] == ("undecided" if p_value >= 0.05 else "better" if one.better else "worse")
    assert "corrected for the number of lines (10)" in out


def test_sweeps_say_what_is_not_finished_and_what_has_no_partner(sweeps, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    one, two = (str(sweeps / f"{name}.yaml") for name in ("one", "two"))
    status, _, err = run(capsys, sweeps, one, f"{two} calibration.n_samples=3")
    assert status == 2
    assert (
        f"none of its 8 cells is finished; run it first: python -m ptqbench sweep {two} calibration.n_samples=3" in err
    )
    status, _, err = run(capsys, sweeps, one, f"{two} replicate=x")
    wrong = "none of its 8 cells can be composed: replicate: input should be a valid integer, got 'x'"
    assert (status, wrong in err) == (2, True), err
    assert run(capsys, sweeps, one, one)[2].endswith("got none beside equal cells; 4 rows are in both\n")
    shutil.rmtree(next(sweeps.glob("tiny-gptaq-w4-*s1-*")))
    shutil.rmtree(next(sweeps.glob("tiny-gptaq-w3-*s0-*")))
    shutil.rmtree(next(sweeps.glob("tiny-gptaq-w3-*s1-*")))
    status, out, _ = run(capsys, sweeps, one, two)
    assert status == 0
    assert "B has 3 cells without a result: tiny gptaq w3 seed 0 (pending); tiny gptaq w3 seed 1 (pending); tiny" in out
    assert "without a partner: tiny rtn w3." in out
    assert "corrected for the number of lines (5)" in out


def test_overrides_name_cells_by_identity(sweeps, capsys):
    words = "model=tiny evaluation.tasks=[] bitwidth=w3"
    status, out, err = run(capsys, sweeps, f"method=rtn {words} seed=0,1", f"+method=gptaq {words} seed=0,1")
    assert (status, err) == (0, "")
    assert "A: tiny rtn w3, seeds 0, 1 (" in out
    one = next(sweeps.glob("tiny-gptaq-w3-*s1-*"))
    status, out, _ = run(capsys, sweeps, f"method=rtn {words}", f"method=gptaq {words} seed=1")
    assert f"({one.name[-12:]})" in out
    for given, said in {
        f"method=rtn {words} seed=7": "-s7-",
        f"method=rtn {words} seed=0,7": "is pending; run it first, or name fewer seeds",
        f"method=rtn,gptq {words}": "names 2 cells",
        f"method=rnt {words}": "did you mean 'rtn'",
        f"method=rtn {words} seed=[": "seed=[",
        str(sweeps / "one.yaml"): "expected two sweeps or two cells",
        str(sweeps / "none.yaml"): "no sweep",
    }.items():
        status, out, err = run(capsys, sweeps, given, f"method=gptaq {words} seed=1")
        assert (status, out) == (2, ""), given
        assert said in err, given
        assert err.count("\n") == 1, given
