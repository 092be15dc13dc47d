"""The papers' figures: what is stored, how it joins to cells, and when it may be judged."""

import math

import pytest
from reported_cells import add

from ptqbench.cell.folders import group_names
from ptqbench.results import tables
from ptqbench.results.figures import load
from ptqbench.results.reported import AGREES, DIFFERS, INCOMPARABLE, NO_RESULT, SECOND_HAND, check, check_sheet
from ptqbench.runs import folder as store


def checked(root, **where):
    found = check(tables.tidy((folder, None) for folder in store.all_runs(root)))
    for column, value in where.items():
        found = found[found[column] == value]
    return found.to_dict("records")


def test_store_is_complete_and_says_where_everything_comes_from():
    figures, words = load()
    assert len(figures) == 1980
    assert (
        figures[["paper", "arxiv_id", "table", "model", "method", "metric", "unit", "provenance", "protocol"]]
        .ne("")
        .all(axis=None)
    )
    assert figures["provenance"].value_counts().to_dict() == {"first_hand": 1207, "third_party": 674, "second_hand": 99}
    assert set(figures["protocol"]) == set(words["protocols"])
    assert set(words["methods"]) <= set(figures["method"])
    assert (figures["value"].isna() == figures["note"].str.contains(">1e3")).all()
    assert not (figures["paper"] == "Q2N").any(), "no figure of Q2N is known"


def test_units_bring_accuracies_of_all_papers_into_the_same_range():
    figures, _ = load()
    accuracies = figures[figures["metric"].str.match(r"acc_|zero_shot_avg(?!_delta)|mmlu")]
    assert set(accuracies["unit"]) == {"percent", "fraction"}
    scaled = accuracies["value"].where(accuracies["unit"] == "fraction", accuracies["value"] / 100)
    assert scaled.dropna().between(0, 1).all()


def test_same_protocol_is_judged(tmp_path):
    add(tmp_path, "resq", "w4a4kv4", 12.5)
    (row,) = checked(tmp_path, metric="wikitext2/perplexity")
    assert (row["reported"], row["ours"], row["verdict"], row["why"]) == (12.4, 12.5, AGREES, "")
    assert row["delta"] == pytest.approx(0.1)
    assert (row["paper"], row["table"], row["provenance"]) == ("ResQ", "Table 1", "first_hand")


def test_a_difference_above_the_tolerance_is_said(tmp_path):
    add(tmp_path, "resq", "w4a4kv4", 12.4 * 1.06)
    (row,) = checked(tmp_path, metric="wikitext2/perplexity")
    assert row["verdict"] == DIFFERS


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("calibration.n_samples", 64, "calibration wikitext2 128 x 2048 there, wikitext2 64 x 2048 here"),
        ("calibration.dataset", "c4", "wikitext2 128 x 2048 there, c4 128 x 2048 here"),
        ("evaluation.texts.wikitext2.seq_len", 1024, "windows of 1024"),
        ("evaluation.ppl_dtype", "float32", "float32 loss"),
        ("method.solver.options.act_order", True, "act_order false there, true here"),
        ("method.transform.options.n_samples", 128, "basis_samples 512 there, 128 here"),
    ],
)
def test_another_protocol_is_never_judged_and_says_why(tmp_path, path, value, words):
    add(tmp_path, "resq", "w4a4kv4", 12.4, changes=[(path, value)])
    (row,) = checked(tmp_path, metric="wikitext2/perplexity")
    assert row["verdict"] == INCOMPARABLE
    assert words in row["why"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bitwidth.k_bits", 16),
        ("bitwidth.group_size", 128),
        ("bitwidth.w_bits", 3),
        ("model.name", "llama-3.2-2b"),
        ("method.transform.options.objective", "joint"),
        ("method.target.name", "loaq"),
    ],
)
def test_figures_of_other_cells_do_not_join(tmp_path, path, value):
    add(tmp_path, "resq", "w4a4kv4", 12.4, changes=[(path, value)])
    assert not [row for row in checked(tmp_path) if row["paper"] == "ResQ"]


def test_the_two_variants_of_resq_keep_their_own_figures(tmp_path):
    per_layer = add(
        tmp_path,
        "resq",
        "w4a4kv4",
        12.0,
        changes=[("method.transform.options.granularity", "per_layer"), ("method.name", "p")],
    )
    add(tmp_path, "resq", "w4a4kv4", 12.5)
    assert per_layer.result() is not None
    found = {(row["method"], row["paper"]): row["reported"] for row in checked(tmp_path, metric="wikitext2/perplexity")}
    assert found == {("p", "CoQuant"): 12.03, ("resq", "ResQ"): 12.4}


def test_second_hand_is_shown_and_never_judged(tmp_path):
    add(tmp_path, "gptq", "w3", 6875.0, "llama-2-7b", changes=[("bitwidth.w_bits", 2)])
    rows = [row for row in checked(tmp_path) if row["paper"] == "LoaQ"]
    assert [(row["reported"], row["ours"], row["verdict"]) for row in rows] == [(6875.0, 6875.0, SECOND_HAND)]
    assert (
        "second hand" in check_sheet(check(tables.tidy((f, None) for f in store.all_runs(tmp_path)))).rows[0][-1].text
    )


def test_no_second_hand_figure_can_pass_or_fail(tmp_path):
    """Cells that hit every second-hand figure exactly are still not judged by one."""
    figures, words = load()
    models = sorted(set(figures.loc[figures["provenance"] == "second_hand", "model"]) - {"unspecified"})
    for model in models:
        for method in ("fp16", "rtn", "gptq", "loaq", "gptaq", "quarot"):
            for bitwidth in ("fp16",) if method == "fp16" else ("w3", "w4a4kv4"):
                add(tmp_path, method, bitwidth, 5.0, model)
    rows = checked(tmp_path, provenance="second_hand")
    assert rows
    assert {row["verdict"] for row in rows} == {SECOND_HAND}
    assert words["protocols"]["unchecked"]["never"] in rows[0]["why"]


def test_reimplementations_elsewhere_are_no_targets_for_loaq(tmp_path):
    add(tmp_path, "loaq", "w3", 6.85, "llama-2-7b")
    (row,) = [row for row in checked(tmp_path, metric="wikitext2/perplexity") if row["paper"] == "LPCD"]
    assert (row["reported"], row["verdict"]) == (6.8494, INCOMPARABLE)
    assert "last two blocks stay unquantized" in row["why"]


def test_missing_results_say_why(tmp_path):
    add(tmp_path, "resq", "w4a4kv4", None)
    (row,) = checked(tmp_path, metric="wikitext2/perplexity")
    assert (row["verdict"], row["missing"]) == (NO_RESULT, "pending")
    assert math.isnan(row["ours"])
    sheet = check_sheet(check(tables.tidy((f, None) for f in store.all_runs(tmp_path))))
    assert "pending" in sheet.notes


def test_averages_over_tasks_are_those_of_the_paper(tmp_path):
    tasks = load()[1]["protocols"]["resq"]["tasks"]
    add(tmp_path, "resq", "w4a4kv4", 12.4, tasks=tasks, changes=[("evaluation.tasks", tasks)])
    (row,) = [row for row in checked(tmp_path) if row["metric"].startswith("average")]
    assert row["reported"] == pytest.approx(0.501)
    assert "acc_norm is not stated" in row["why"]
    assert not math.isnan(row["ours"])


def test_seeds_are_averaged_before_they_are_compared(tmp_path):
    for seed, perplexity in enumerate((12.2, 12.4, 12.6)):
        add(tmp_path, "resq", "w4a4kv4", perplexity, seed=seed)
    (row,) = checked(tmp_path, metric="wikitext2/perplexity")
    assert (row["ours"], row["spread"]) == (pytest.approx(12.4), pytest.approx(0.2))


def test_a_cell_whose_model_is_not_at_hand_still_shows_the_figures(monkeypatch, tmp_path, capsys):
    from ptqbench.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    sweep = tmp_path / "s.yaml"
    sweep.write_text("name: s\ngrids: [{method: resq, model: llama-3.2-1b, bitwidth: w4a4kv4}]\n")
    assert main(["table", str(sweep), "--check", "--format", "md", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| llama-3.2-1b | resq | w4a4kv4 | wikitext2/perplexity | 12.4 | - [1] | - | no result" in text
    assert "not composed: hub model meta-llama/Llama-3.2-1B" in text


def test_models_of_the_figures_that_can_be_composed_have_their_names():
    figures, _ = load()
    known = set(figures["model"]) & set(group_names("model"))
    assert {"llama-2-7b", "llama-3-8b", "llama-3.2-1b", "qwen2.5-3b", "qwen3-8b"} <= known


def test_on_a_terminal_of_80_columns_no_word_is_broken(tmp_path, monkeypatch, capsys):
    """Model and bitwidth stand above their rows, sources below the table; every word of the sheet is on one line as it is."""
    from ptqbench.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    tasks = load()[1]["protocols"]["resq"]["tasks"]
    for model in ("llama-3.2-1b", "llama-3-8b"):
        add(tmp_path, "fp16", "fp16", 9.76, model)
        add(tmp_path, "quarot", "w4a4kv4", None, model)
        for seed, perplexity in enumerate((12.2, 12.4, 12.6)):
            add(tmp_path, "resq", "w4a4kv4", perplexity, model, seed, tasks, [("evaluation.tasks", tasks)])
    assert main(["table", "--check", "--runs-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    sheet = check_sheet(check(tables.tidy((folder, None) for folder in store.all_runs(tmp_path))), brief=True)
    words = {word for row in sheet.rows for entry in row for word in entry.text.replace(" ± ", "±").split()}
    assert words - {word for line in lines for word in line.split()} == set()
    for model in ("llama-3.2-1b", "llama-3-8b"):
        assert [line.split() for line in lines if line.startswith(model)] == [[model, "fp16"], [model, "w4a4kv4"]]
    assert "resq wikitext2 ppl 12.4 [1] 12.40±0.20 +0.000 agrees" in [" ".join(line.split()) for line in lines]
    assert "[1] ResQ, Table 1 (first hand)" in lines
