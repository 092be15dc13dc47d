"""A paper's own table: every figure at its place, what is beyond the noise, why a figure is missing, and every format."""

import csv
import dataclasses
import itertools
import math
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
from reported_cells import add
from scipy import stats

from ptqbench.cell.folders import reported_folder, sweep_folder
from ptqbench.cli import main
from ptqbench.errors import ConfigError
from ptqbench.results import figures, tables
from ptqbench.results.figures import Figure
from ptqbench.results.paper_sheets import paper_sheets
from ptqbench.results.paper_tables import frame_of, noise_of, paper_tables
from ptqbench.results.reported import Value
from ptqbench.results.tables import Column, Entry, Sheet
from ptqbench.runs import folder as store
from ptqbench.sweeps.files import load_sweep

RESQ = "ResQ, Table 1"
TASKS = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande"]


def printed(paper, table):
    """Rows of a table in the file of the figures, read without our code."""
    with (reported_folder() / "reported.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row["paper"], row["table"]) == (paper, table)]


def frame(root):
    return tables.tidy((folder, None) for folder in store.all_runs(root))


def one(root, *papers):
    (sheet,) = paper_sheets(frame(root), papers)
    return sheet


def cell_of(sheet, row, column, group=None):
    """The text of one place with its footnotes written out, by the method in front of it and its heading."""
    place = next(n for n, c in enumerate(sheet.columns) if c.name.startswith(column) and group in (None, c.group))
    labels = [n for n, c in enumerate(sheet.columns) if not c.numeric]
    (found,) = [entries for entries in sheet.rows if row in [entries[n].text for n in labels]]
    entry = found[place]
    return entry.text if entry.note is None else f"{entry.text} [{sheet.notes[entry.note - 1]}]"


def label_note(sheet, row):
    return next(sheet.notes[e.note - 1] for entries in sheet.rows for e in entries if e.text == row and e.note)


@pytest.fixture
def resq(tmp_path):
    """ResQ's table for two models: seeds, a failure, a pending cell, a seed that is missing, another calibration text."""
    for model, scale in (("llama-3-8b", 1.0), ("llama-3.2-1b", 1.7)):
        add(tmp_path, "fp16", "fp16", 6.14 * scale, model)
        add(tmp_path, "rtn", "w4a4kv4", 220.0 * scale, model)
        for seed, perplexity in enumerate((7.13, 7.15, 7.17)):
            add(tmp_path, "resq", "w4a4kv4", None if (seed, scale) == (2, 1.7) else perplexity * scale, model, seed)
    failed = add(tmp_path, "gptq", "w4a4kv4", None, "llama-3-8b")
    store.write_json(failed.failure_path, {"class": "NumericalError", "message": "block 3: down_proj: NaN"})
    add(tmp_path, "gptq", "w4a4kv4", None, "llama-3.2-1b")
    add(tmp_path, "quarot", "w4a4kv4", 7.9, "llama-3-8b", changes=[("calibration.dataset", "c4")])
    add(tmp_path, "quarot", "w4a4kv4", 14.2, "llama-3.2-1b")
    add(tmp_path, "loaq", "w4a4kv4", 9.5, "llama-3-8b")
    return tmp_path


def test_the_table_has_the_papers_rows_and_columns_in_the_papers_order_and_every_figure_stands_once(resq):
    sheet, rows = (
        one(resq, RESQ),
        [r for r in printed("ResQ", "Table 1") if r["model"] in ("llama-3-8b", "llama-3.2-1b")],
    )
    methods, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "model"))
    shown = [row[1].text for row in sheet.rows]
    assert shown[: len(methods)] == methods
    assert shown[len(methods) :] == ["loaq"], "a row that the paper does not have comes last"
    assert list(dict.fromkeys(c.group for c in sheet.columns[2:])) == models
    names = {"wikitext2_ppl": "wikitext2 ppl", "zero_shot_avg_8": "avg of 8", "mmlu": "mmlu acc"}
    for row in rows:
        text = cell_of(sheet, row["method"], names[row["metric"]], row["model"])
        assert text.split(" / ")[1].split(" ")[0] == row["value"]
    assert sum(entry.text.split(" / ")[-1] not in ("-", "") for row in sheet.rows for entry in row[2:]) == len(rows)


def test_our_mean_has_one_decimal_more_than_the_printed_perplexity(resq):
    sheet = one(resq, RESQ)
    assert cell_of(sheet, "resq", "wikitext2", "llama-3-8b") == "7.15 / 7.1"
    assert cell_of(sheet, "fp16", "wikitext2", "llama-3-8b") == "6.14 / 6.1"
    assert cell_of(sheet, "rtn", "wikitext2", "llama-3-8b") == "220.00 / 218.9"
    assert any("mean over 3 seeds" in line for line in sheet.remarks)


def test_a_missing_figure_says_why(resq):
    sheet = one(resq, RESQ)
    assert cell_of(sheet, "gptq", "wikitext2", "llama-3-8b") == "- / 166.3 [failed: block 3: down_proj: NaN]"
    assert cell_of(sheet, "gptq", "wikitext2", "llama-3.2-1b") == "- / 108.9 [pending]"
    assert cell_of(sheet, "resq", "wikitext2", "llama-3.2-1b") == "- / 12.4 [seed 2 pending]"
    assert label_note(sheet, "smoothquant").startswith("not in this sweep")
    assert label_note(sheet, "spinquant") == "not in this sweep"
    assert cell_of(sheet, "loaq", "wikitext2", "llama-3-8b") == "9.500 / -"
    assert label_note(sheet, "loaq").startswith("not in the paper's table")
    assert cell_of(sheet, "loaq", "wikitext2", "llama-3.2-1b") == "-"
    assert (
        "Also printed there, for models that are not here: llama-3-70b, llama-3.2-3b, qwen2.5-3b, qwen2.5-72b."
        in sheet.remarks
    )


def test_another_protocol_is_marked_where_it_holds(resq):
    """At a place where a cell differs; at the label of a row that the paper does not describe; and nowhere else."""
    sheet = one(resq, RESQ)
    other = "calibration wikitext2 128 x 2048 there, c4 128 x 2048 here"
    assert cell_of(sheet, "quarot", "wikitext2", "llama-3-8b") == f"7.90 / 7.8 [{other}]"
    assert cell_of(sheet, "quarot", "wikitext2", "llama-3.2-1b") == "14.20 / 14.3"
    assert "the grids of this row are not stated" in label_note(sheet, "rtn")
    heads = {c.name: sheet.notes[c.note - 1] for c in sheet.columns if c.note}
    assert {name.split("\u00a0")[0]: "not stated" in note for name, note in heads.items()} == {
        "avg of 8": True,
        "mmlu acc": True,
    }


def test_a_deviation_from_the_method_stands_against_its_figure(tmp_path):
    folder = add(tmp_path, "quarot", "w4a4kv4", 14.2, "llama-3.2-1b")
    store.write_json(folder.result_path, folder.result() | {"deviations": ["heads are not mixed"]})
    add(tmp_path, "fp16", "fp16", 9.8, "llama-3.2-1b")
    assert "heads are not mixed" in cell_of(one(tmp_path, RESQ), "quarot", "wikitext2") + str(one(tmp_path, RESQ).notes)


def test_a_figure_of_equal_bits_is_not_compared_with_bits_by_block(tmp_path):
    add(tmp_path, "fp16", "fp16", 9.8, "llama-3.2-1b")
    add(tmp_path, "rtn", "w4a4kv4", 220.0, "llama-3.2-1b", changes=[("bitwidth.kv_measure", "activation")])
    sheet = one(tmp_path, RESQ)
    assert "bits of keys and values by block here" in " ".join([*sheet.notes, *sheet.remarks])


def test_what_stands_against_every_comparison_is_one_line_below(tmp_path):
    for method in ("fp16", "loaq"):
        add(tmp_path, method, "fp16" if method == "fp16" else "w3", 6.5, "llama-2-7b")
    sheet = one(tmp_path, "LPCD, Table 1")
    assert cell_of(sheet, "fp16", "llama-2-7b") == "6.500* / 4.8653"
    assert [line for line in sheet.remarks if line.startswith("Everywhere: its full-precision references differ")]
    assert not any("full-precision" in note for note in sheet.notes)


@pytest.mark.parametrize(
    ("perplexities", "beyond"),
    # Half the interval of three seeds with the standard deviation s is 4.303 s sqrt(4/3) = 4.969 s; 7.1 is off by 0.05 at most.
    [
        ((7.33, 7.35, 7.37), True),
        ((7.31, 7.35, 7.39), True),
        ((7.30, 7.35, 7.40), False),
        ((7.14, 7.15, 7.15), False),
        ((7.16,) * 3, True),
    ],
)
def test_seeds_say_what_is_noise(tmp_path, perplexities, beyond):
    for seed, perplexity in enumerate(perplexities):
        add(tmp_path, "resq", "w4a4kv4", perplexity, "llama-3-8b", seed)
    s = np.std(perplexities, ddof=1)
    assert (abs(np.mean(perplexities) - 7.1) > 4.9685 * s + 0.05) == beyond, "the cases of this test"
    text = cell_of(one(tmp_path, RESQ), "resq", "wikitext2", "llama-3-8b")
    assert ("*" in text) == beyond


@pytest.mark.parametrize(
    ("perplexity", "beyond"), [(7.29, False), (7.30, True)]
)  # error 1 %: 7.1 + 0.05 + 1.96 x 0.0729 = 7.293
def test_the_standard_error_of_the_evaluation_says_it_for_one_seed(tmp_path, perplexity, beyond):
    add(tmp_path, "resq", "w4a4kv4", perplexity, "llama-3-8b")
    assert ("*" in cell_of(one(tmp_path, RESQ), "resq", "wikitext2", "llama-3-8b")) == beyond


def test_a_further_seed_lies_within_the_noise_in_95_of_100_cases():
    draw = np.random.default_rng(0).normal(7.0, 0.3, (4000, 4))
    inside = 0
    for *known, further in draw.tolist():
        spread = float(np.std(known, ddof=1))
        ours = Value(float(np.mean(known)), spread, spread / math.sqrt(3), 3, "", "")
        inside += abs(further - ours.mean) <= noise_of(ours, 0.0)
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    low, _ = stats.t.interval(0.95, 2, loc=0.0, scale=0.3 * math.sqrt(1 + 1 / 3))
    assert noise_of(Value(7.0, 0.3, 0.1, 3, "", ""), 0.0) == pytest.approx(-low)


def test_two_collapsed_models_do_not_differ_but_one_does(tmp_path):
    for perplexity, model in ((9000.0, "qwen2.5-3b"), (9.0, "llama-3-8b")):
        for seed in range(2):  # no spread
            add(tmp_path, "rtn", "w4a4kv4", perplexity, model, seed)
    sheet = one(tmp_path, RESQ)
    assert cell_of(sheet, "rtn", "wikitext2", "qwen2.5-3b").startswith("9000.00 / 39033.0 [")
    assert cell_of(sheet, "rtn", "wikitext2", "llama-3-8b").startswith("9.00* / 218.9")


@pytest.mark.parametrize(
    ("value", "unit", "metric", "text", "rounding"),
    [
        ("8.0", "perplexity", "wikitext2/perplexity", "8.0", 0.05),
        ("102", "perplexity", "wikitext2/perplexity", "102", 0.5),
        ("7.3e3", "perplexity", "wikitext2/perplexity", "7.3e3", 50.0),
        ("67.1", "percent", "mmlu/acc", "67.1", 0.0005),
        ("0.5401", "fraction", "mmlu/acc", "54.01", 0.00005),
        ("0.7", "fraction", "mmlu/acc", "70", 0.05),
        ("", "perplexity", "wikitext2/perplexity", ">1e3", 0.5),
    ],
)
def test_a_printed_figure_keeps_its_digits_and_is_off_by_half_of_the_last_one_at_most(
    value, unit, metric, text, rounding
):
    figure = Figure(
        {"printed": value, "unit": unit, "value": value or "nan", "note": "x; printed as >1e3"}, {}, {}, metric
    )
    assert figure.text == text
    assert figure.rounding == pytest.approx(rounding)


def test_in_the_readme_of_gptq_models_run_down_and_a_cell_stands_where_its_options_are_said(tmp_path):
    plain = [("bitwidth.w_bits", 4), ("calibration.dataset", "c4"), ("method.true_sequential", False)]
    ordered = [
        ("bitwidth.w_bits", 4),
        ("calibration.dataset", "c4"),
        ("method.solver.options", {"act_order": True}),
        ("method.name", "ordered"),
    ]
    add(tmp_path, "gptq", "w3", 7.1, "llama-7b", changes=plain)
    for model, perplexity in (("llama-13b", 5.4), ("llama-7b", 6.1)):
        add(tmp_path, "fp16", "fp16", 5.0, model)
        add(tmp_path, "gptq", "w3", perplexity, model, changes=ordered)
    (table,) = paper_tables(frame(tmp_path), ["GPTQ, README"])
    sheet = one(tmp_path, "GPTQ, README")
    assert [row[0].text for row in sheet.rows] == ["llama-7b", "llama-13b"], "the paper's order, not that of the cells"
    assert [(c.group, c.name) for c in sheet.columns[1:4]] == [
        ("fp16", "fp16"), ("w4a16", "rtn"), ("w4a16", "gptq +act_order +true_sequential")
    ]  # fmt: skip
    assert cell_of(sheet, "llama-7b", "gptq +act", "w4a16") == "6.100 / 6.09"
    assert cell_of(sheet, "llama-13b", "gptq +act", "w4a16") == "5.400 / 5.36"
    last = sheet.columns[-1]
    assert (last.group, last.name) == ("w4a16", "gptq")
    assert cell_of(sheet, "llama-7b", "gptq", "w4a16").startswith("6.100"), "the first of the two"
    assert [row[-1].text for row in sheet.rows] == ["7.100 / 7.15", "-"]
    assert [line.names for line in table.lines if line.method == "gptq"] == [["gptq"]]
    assert sheet.title.endswith("README: wikitext2 ppl\u00a0↓")


def test_models_and_methods_run_down_where_tasks_run_across(tmp_path):
    for model in ("llama-3-8b", "llama-2-7b"):
        add(tmp_path, "quarot", "w4a4kv4", 7.5, model, changes=[("bitwidth.k_bits", 16), ("bitwidth.v_bits", 16)])
    sheet = one(tmp_path, "GPTAQ, Table 2")
    assert [c.name for c in sheet.columns[:3]] == ["model", "bits", "method"]
    assert [row[0].text for row in sheet.rows if row[0].text] == ["llama-3-8b", "llama-2-7b"]
    assert len(sheet.columns) == 3 + len({row["metric"] for row in printed("GPTAQ", "Table 2")})
    assert len(sheet.sections) == 1


def test_several_cells_of_one_row_of_the_paper_get_a_row_each(tmp_path):
    for damping in (0.01, 0.1):
        options = {"act_order": False, "damping": damping}
        add(tmp_path, "quarot", "w4a4kv4", 7.8 + damping, "llama-3-8b", changes=[("method.solver.options", options)])
    sheet = one(tmp_path, RESQ)
    rows = [row for row in sheet.rows if row[1].text == "quarot"]
    assert [row[2].text for row in rows] == ["7.81 / 7.8", "7.90 / 7.8"]
    assert [sheet.notes[row[1].note - 1] for row in rows] == ["here: quarot damping=0.01", "here: quarot damping=0.1"]
    assert "Of 24 printed figures, 1 have" in sheet.remarks[0], "a figure beside two cells is one figure"


def test_of_a_paper_that_is_known_in_part_every_cell_is_shown_and_of_an_unknown_one_ours_alone(tmp_path):
    per_layer = [
        (
            "method.transform.options",
            {
                "objective": "joint",
                "granularity": "per_layer",
                "n_samples": 512,
                "high_bits": 8,
                "high_fraction": 0.125,
            },
        )
    ]
    add(tmp_path, "coquant", "w4a4kv4", 11.7, changes=per_layer)
    add(tmp_path, "coquant", "w4a4kv4", 9.1, "llama-3.2-3b", changes=per_layer)
    add(tmp_path, "q2n", "w3", 8.0, "llama-3-8b")
    sheet = one(tmp_path, "CoQuant")
    assert cell_of(sheet, "coquant", "llama-3.2-1b") == "11.700 / 11.60"
    assert cell_of(sheet, "coquant", "llama-3.2-3b") == "9.100 / - [not among the figures that ptqbench knows]"
    assert cell_of(sheet, "q2n", "llama-3-8b").startswith("8.000 / -")
    unknown = one(tmp_path, "Q2N")
    assert cell_of(unknown, "q2n", "llama-3-8b") == "8.000 / -"
    assert "No figure of Q2N that ptqbench knows belongs to these cells." in unknown.remarks


def test_without_a_name_every_table_with_a_quantized_cell_is_shown(tmp_path, capsys):
    add(tmp_path, "fp16", "fp16", 6.14, "llama-3-8b")
    assert main(["table", "--paper", "--output", str(tmp_path / "t.md"), "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no printed figure belongs to a quantized cell here\n"
    assert paper_sheets(frame(tmp_path)) == [], "every paper prints the unquantized model"
    add(tmp_path, "resq", "w4a4kv4", 7.1, "llama-3-8b")
    found = paper_tables(frame(tmp_path))
    assert [(table.paper, table.table) for table in found] == [("ResQ", "Table 1"), ("ResQ", "Table 6")]
    assert frame_of(found)["ours"].dtype == float


def test_a_table_that_does_not_exist_is_refused(resq):
    with pytest.raises(ConfigError, match=r"expected a table of ResQ that is known \(Table 1, .*\), got 'Table 99'"):
        paper_sheets(frame(resq), ["ResQ, Table 99"])


def test_every_shipped_sweep_of_a_paper_prints_the_papers_figures(tmp_path, monkeypatch, capsys):
    """Nothing has run. The figures of the tables that a sweep names are there, each beside the reason why ours is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    named = {path.stem: load_sweep(path.stem).papers for path in sweep_folder().glob("*.yaml")}
    studies = {"demo", "composition", "formats", "kv_bits", "smollm2", "smollm2_seeds"}
    assert {name for name, papers in named.items() if not papers} == studies
    words, known = figures.load()[1], {(row["paper"], row["table"]) for row in csv_rows()}
    for paper in itertools.chain(*named.values()):
        name, *table = paper.split(", ")
        assert not table or (name, table[0]) in known, paper
    assert {tuple(key.split(", ")) for key in words["tables"]} <= known
    assert main(["table", "gptq_llama", "--paper", "--format", "csv", "--runs-dir", str(tmp_path)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert sorted(row["printed"] for row in rows) == sorted(
        r["value"] for r in printed("GPTQ", "README") if r["model"] != "opt-66b"
    )
    assert {row["missing"].split(":")[0] for row in rows} == {"not composed"}


def csv_rows():
    with (reported_folder() / "reported.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def own_figures(folder, **changes):
    """A folder of figures with one of Q2N's more, as a reader of the paper types it in."""
    shutil.copytree(reported_folder(), folder)
    row = {
        "paper": "Q2N", "arxiv_id": "2506.11044", "table": "Table 2", "model": "llama-3-8b", "method": "gptq+q2n",
        "bits_label": "w3a16", "w_bits": "3", "a_bits": "16", "kv_bits": "16",
        "metric": "wikitext2_ppl", "value": "8.31", "unit": "perplexity",
        "provenance": "first_hand", "protocol": "q2n",
    } | changes  # fmt: skip
    with (folder / "reported.csv").open("a", encoding="utf-8") as file:
        csv.DictWriter(file, list(csv_rows()[0]), restval="").writerow(row)
    path, text = folder / "protocols.yaml", (folder / "protocols.yaml").read_text(encoding="utf-8")
    method = "  gptq+q2n: {transform: none, target: weight, solver: gptq, refine: null_space}"
    for head, line in (("protocols:", "  q2n: {calibration: wikitext2 128 x 2048}"), ("methods:", method)):
        text = text.replace(f"\n{head}\n", f"\n{head}\n{line}\n", 1)
    path.write_text(text, encoding="utf-8")


def test_figures_of_ones_own_stand_beside_ours(tmp_path, monkeypatch):
    add(tmp_path / "runs", "q2n", "w3", 8.3, "llama-3-8b")
    own_figures(tmp_path / "figures")
    monkeypatch.setenv("PTQBENCH_REPORTED", str(tmp_path / "figures"))
    assert cell_of(one(tmp_path / "runs", "Q2N"), "gptq+q2n", "llama-3-8b") == "8.300 / 8.31"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "q3n"}, r"line 1982: expected a protocol .*, got 'q3n'"),
        ({"value": "8,31"}, "expected numbers in .*8,31"),
    ],
)
def test_a_wrong_figure_of_ones_own_is_one_line(tmp_path, monkeypatch, changes, words):
    own_figures(tmp_path / "figures", **changes)
    monkeypatch.setenv("PTQBENCH_REPORTED", str(tmp_path / "figures"))
    with pytest.raises(ConfigError, match=words):
        figures.load()
    monkeypatch.setenv("PTQBENCH_REPORTED", str(tmp_path))
    with pytest.raises(ConfigError, match=r"PTQBENCH_REPORTED=.*expected a folder with reported.csv"):
        figures.load()


def test_two_tables_at_once_are_refused(tmp_path, capsys):
    for more, words in ((["--check"], "choose one"), (["--picture", str(tmp_path / "x.png")], "without --paper")):
        assert main(["table", "--paper", *more, "--runs-dir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("width", [80, 160])
def test_on_a_terminal_a_model_is_never_torn_apart(resq, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["table", "--paper", "--runs-dir", str(resq)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    first = next(line for line in lines if "218.9" in line)
    figures_of = {"llama-3-8b": ("218.9", "39.3", "23.6"), "llama-3.2-1b": ("329.1", "38.1", "23.8")}
    for model, three in figures_of.items():
        assert any(all(f"/ {figure}" in line for figure in three) for line in lines), model
    assert ("/ 329.1" in first) == (width == 160)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_of_columns_is_broken_only_where_it_is_wider_than_a_part(seed):
    draw = random.Random(seed)
    groups = [draw.choice(["a", "b", "", "c"]) for _ in range(draw.randint(1, 12))]
    sheet = Sheet([Column("label", numeric=False), *(Column(f"n{n}", group) for n, group in enumerate(groups))])
    needed, room = [5] + [draw.randint(2, 9) for _ in groups], draw.randint(9, 30)
    parts = sheet.packed(needed, room)
    assert [place for part in parts for place in part] == list(range(1, len(groups) + 1))
    assert all(sum(needed[place] for place in part) <= room for part in parts)
    for group, members in itertools.groupby(range(1, len(groups) + 1), key=lambda place: groups[place - 1]):
        together = set(members)
        torn = sum(bool(together & set(part)) for part in parts) > 1
        assert not (group and torn) or sum(needed[place] for place in together) > room


def test_parts_of_a_wide_sheet_say_everything_once():
    columns = [Column("method", numeric=False), *(Column(f"metric {n}", f"model{n // 3}") for n in range(12))]
    rows = [[Entry(name), *(Entry(f"{name}{n}.123456 / 1.1") for n in range(12))] for name in "abc"]
    sheet = Sheet(columns, rows, [1], ["a note"], ["a remark"], "Title")
    parts = sheet.parts(64)
    assert [part.columns[1].group for part in parts] == [f"model{n}" for n in range(4)]
    assert [(part.title, part.notes, part.remarks) for part in parts] == [
        ("Title", [], []), ("", [], []), ("", [], []), ("", ["a note"], ["a remark"])
    ]  # fmt: skip
    assert all([row[0].text for row in part.rows] == list("abc") for part in parts)
    assert sheet.parts(10_000) == [sheet]


def compiled(body, folder):
    """Compile a table in a plain document and return its text by page, and what LaTeX warns of."""
    for tool in ("pdflatex", "pdftotext"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH")
    packages = re.match(r"% (\\usepackage\{.*\})\n", body)[1]
    (folder / "t.tex").write_text(
        rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}", encoding="utf-8"
    )
    for _ in range(2):  # longtable settles the widths of its columns in the second run
        done = subprocess.run(
            ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:]
    text = subprocess.run(
        ["pdftotext", "-layout", "t.pdf", "-"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    return text.split("\f"), [
        line for line in done.stdout.splitlines() if "too large" in line or "Overfull \\hbox" in line
    ]


def test_latex_of_a_papers_table_fits_the_page(resq, tmp_path):
    for model in ("llama-3-70b", "llama-3.2-3b", "qwen2.5-3b", "qwen2.5-72b"):
        add(resq, "rtn", "w4a4kv4", 450.0, model)
    sheet = one(resq, RESQ)
    longer = dataclasses.replace(sheet, notes=sheet.notes + [f"note {n}" for n in range(30)])
    for shown, pages_wanted, inside in ((sheet, 1, r"\scriptsize\raggedright"), (longer, 4, r"\begin{longtable}")):
        body = tables.latex(shown)
        assert inside in body
        assert pages_wanted > 1 or body.count(r"\begin{tabular}") == 3, "two models beside each other"
        pages, warnings = compiled(body, tmp_path)
        assert not warnings
        assert len(pages) - 1 <= pages_wanted  # behind the last page is an empty text
        assert all(figure in "".join(pages) for figure in ("218.9", "81.5", "39033.0", "noise explains"))


def long_sheet():
    columns = [Column("method", numeric=False), Column("metric", numeric=False), Column("reported"), Column("delta")]
    rows = [
        [Entry(f"gptq grid.scheme=sym_signed row_{n:03d}"), Entry("acc"), Entry("1.5", note=1), Entry("*")]
        for n in range(130)
    ]
    rows[0] = [Entry("heading", bold=True), *[Entry("")] * 3]
    return Sheet(columns, rows, [], ["[x] note"], ["*: a star at the start of a line", "[y]"], "Long")


def test_latex_of_a_long_table_goes_on_over_pages_with_its_head_on_each(tmp_path):
    body = tables.latex(long_sheet())
    pages, warnings = compiled(body, tmp_path)
    assert not warnings
    shown = [page for page in pages if "row" in page]
    assert len(shown) > 2
    assert all("reported" in page for page in shown)
    flat = re.sub(r"\s+", "", "".join(pages))
    assert all(f"row{sign}{n:03d}" in flat for n in (1, 60, 129) for sign in ["_" if f"row_{n:03d}" in flat else ""])
    assert "[x]note" in flat
    assert "[y]" in flat
    assert ":astaratthestartofaline" in flat


def test_what_latex_is_written_without_a_latex_at_hand():
    body = tables.latex(long_sheet())
    assert body.startswith("% \\usepackage{booktabs,longtable,array}\n")
    assert body.count(r"\endhead") == 1
    assert r"\textbf{heading} &  &  &  \\*" in body
    assert "\\\\\n*" not in body, "a star behind a line break would be swallowed"
    assert r"grid.\allowbreak{}scheme=\allowbreak{}sym\_\allowbreak{}signed" in body
    short = Sheet(long_sheet().columns[:1], [[Entry("a")]])
    assert tables.latex(short).startswith("% \\usepackage{booktabs}\n\\begin{table}\n")


def test_every_format_is_written(resq, tmp_path, monkeypatch):
    sweep = tmp_path / "runs.csv"
    for suffix, sign in {
        ".md": "| rtn",
        ".tex": r"\begin{table}",
        ".html": "<td>rtn<sup>",
        ".csv": "paper,table,model",
    }.items():
        path = sweep.with_suffix(suffix)
        assert main(["table", "--paper", "--output", str(path), "--runs-dir", str(resq)]) == 0
        assert sign in path.read_text(encoding="utf-8"), suffix
    rows = list(csv.DictReader(sweep.with_suffix(".csv").read_text(encoding="utf-8").splitlines()))
    found = next(
        r
        for r in rows
        if (r["table"], r["model"], r["method"], r["metric"])
        == ("Table 1", "llama-3-8b", "resq", "wikitext2/perplexity")
    )
    assert (found["printed"], found["seeds"], found["beyond_noise"]) == ("7.1", "3", "False")
    assert float(found["ours"]) == pytest.approx(7.15)
    assert float(found["noise"]) == pytest.approx(stats.t.ppf(0.975, 2) * 0.02 * math.sqrt(4 / 3) + 0.05)
