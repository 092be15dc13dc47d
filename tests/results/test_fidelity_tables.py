"""Fidelity in tables and on the report page: KL divergence, equal first tokens, changed answers."""

import doctest

import pandas as pd
import pytest
from fidelity_cells import LEVELS, NOISE, fidelity_cell

from ptqbench.results import metrics, tables
from ptqbench.results.report_page import report_page
from ptqbench.results.report_page.facts import main_metrics
from ptqbench.runs import folder as store


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in LEVELS:
        fidelity_cell(root, method)
    return root


def sources(root):
    return [(folder, None) for folder in store.all_runs(root)]


@pytest.fixture(scope="module")
def frame(runs):
    return tables.tidy(sources(runs))


@pytest.mark.parametrize(
    ("metric", "value", "printed"),
    [
        ("t/kl", 0.00123, "0.00123"), ("t/kl", 1.2e-8, "1.2e-08"), ("t/kl", 5.842e-8, "5.84e-08"), ("t/kl", 0.5, "0.500"),
        ("t/kl", 12.345, "12.3"), ("t/kl", 12345.0, "1.23e+04"), ("t/kl", 0.0, "0"), ("t/kl@2", 0.0123, "0.0123"),
        ("t/top1", 0.7346, "73.5"), ("q/flips", 0.18, "18.0"), ("q/acc", 0.5, "50.0"), ("t/perplexity", 5.0, "5.000"),
        ("q/exact_match:strict-match", 0.5, "50.0"),
    ],
)  # fmt: skip
def test_digits_are_those_of_the_kind(metric, value, printed):
    assert metrics.format_value(metric, value) == printed


def test_a_spread_has_the_decimals_of_its_mean():
    assert metrics.format_spread("t/kl", 0.173, 0.01188) == "0.173 ± 0.012"
    assert metrics.format_spread("t/kl", 5.84e-8, 1.1e-9) == "5.84e-08 ± 1.1e-09"


def test_examples_in_the_module_hold():
    assert doctest.testmod(metrics).failed == 0


def test_directions():
    higher = {name for name in metrics.KINDS if metrics.higher_is_better(f"x/{name}")}
    assert higher == {"acc", "acc_norm", "exact_match", "top1"}


def test_kinds_of_a_text_stand_side_by_side_and_the_others_keep_their_order():
    expected = [
        "c4/perplexity", "c4/kl", "c4/top1", "wikitext2-x/perplexity", "wikitext2/perplexity", "wikitext2/perplexity@2",
        "wikitext2/kl", "average_2/acc", "arc/acc", "gsm8k/exact_match:strict", "piqa/acc", "arc/acc_norm", "arc/flips",
    ]  # fmt: skip
    assert sorted(set(expected), key=metrics.order) == expected


def test_the_table_says_what_fidelity_is_and_bolds_the_smaller_divergence(frame):
    sheet = tables.comparison_sheet(frame)
    heads = [f"{column.group} {column.name}".strip() for column in sheet.columns]
    texts = ["wikitext2 perplexity ↓", "wikitext2 kl ↓", "wikitext2 top1 ↑"]
    assert heads[5:] == [*texts, "arc_easy acc ↑", "arc_easy flips ↓"]
    rows = {row[1].text: dict(zip(heads, row, strict=True)) for row in sheet.rows}
    assert [rows[method]["wikitext2 kl ↓"].bold for method in LEVELS] == [False, True, False]
    assert rows["gptq"]["wikitext2 kl ↓"].text == "0.0503"
    assert rows["fp16"]["arc_easy flips ↓"].text == "0.0"
    for name in ("kl", "top1", "flips"):
        assert f"{name}: {metrics.KINDS[name].meaning}." in sheet.remarks
    for printed in (tables.markdown(sheet), tables.latex(sheet), tables.html(sheet)):
        assert "kl" in printed
        assert "0.0503" in printed
    brief = tables.comparison_sheet(frame, brief=True)
    assert [column.name for column in brief.columns] == [column.name for column in sheet.columns]


def test_without_fidelity_nothing_is_added(frame):
    plain = frame[frame["metric"].isin(["wikitext2/perplexity", "arc_easy/acc"])].drop(columns="noise")
    sheet = tables.comparison_sheet(plain)
    assert not any(word in line for line in sheet.remarks for word in ("kl", "top1", "flips", "noise"))
    assert not tables.pivot(plain).noise.to_numpy().any()
    assert list(plain.columns) == tables.tidy.__globals__["COLUMNS"]


def test_the_noise_floor_is_named_where_a_difference_is_not_beyond_it(frame):
    (line,) = [one for one in tables.comparison_sheet(frame).remarks if "noise" in one]
    assert line.startswith("wikitext2/kl: differences of up to 2e-07 nats are noise")
    beyond = frame[frame["method"] != "fp16"]  # 0.05 and 0.2: neither they nor their difference are within it
    assert not [one for one in tables.comparison_sheet(beyond).remarks if "noise" in one]
    near = beyond.assign(noise=beyond["noise"] * 1e6)  # 0.2
    assert [one for one in tables.comparison_sheet(near).remarks if "noise" in one]


def test_values_within_the_noise_of_the_best_are_bold_too(frame):
    near = frame[(frame["metric"] == "wikitext2/kl") & (frame["method"] != "fp16")].assign(stderr=0.0, noise=1e-3)
    near = near.assign(value=[1e-4, 9e-4])
    assert tables.best(tables.pivot(near))["wikitext2/kl"].tolist() == [True, True]
    assert tables.best(tables.pivot(near.assign(noise=1e-5)))["wikitext2/kl"].sum() == 1


def test_protocols_tell_measures_of_fidelity_apart_from_others(frame):
    words = frame[frame["method"] == "rtn"].set_index("metric")["protocol"]
    unrounded = words["wikitext2/perplexity"].replace(", float32 loss", "")
    assert words["wikitext2/top1"] == f"{unrounded}, against the unquantized model"
    assert words["wikitext2/kl"] == f"{words['wikitext2/top1']} by its 256 likeliest tokens and the rest"
    accuracy = words["arc_easy/acc"].replace("500 examples", "40 examples")
    assert words["arc_easy/flips"] == f"{accuracy}, against the unquantized model"


def test_fidelity_is_no_part_of_the_time_to_quantize(runs, tmp_path):
    folder = fidelity_cell(tmp_path, "rtn")
    before = tables.tidy([(folder, None)])["quantize_s"].iloc[0]
    result = folder.result()
    store.write_json(folder.result_path, result | {"timings": result["timings"] | {"fidelity_s": 100.0}})
    assert tables.tidy([(folder, None)])["quantize_s"].iloc[0] == before


def test_the_page_draws_the_divergence_against_bits_and_says_what_it_is(runs, frame):
    page = report_page(sources(runs))
    assert page.count("<h3>toy-1b: wikitext2/kl against true bits per weight</h3>") == 1
    assert "<b>Fidelity</b> compares a model with its own unquantized one" in page
    assert "fidelity to the unquantized model" in page
    assert main_metrics(tables.pivot(frame)) == ["wikitext2/perplexity", "arc_easy/acc"]


@pytest.mark.parametrize(("noise", "drawn"), [(NOISE, False), (0.01, True)])
def test_the_noise_floor_is_a_line_where_it_hides_nothing(frame, noise, drawn, monkeypatch):
    from ptqbench.results.report_page import plots

    figures = []
    monkeypatch.setattr(plots, "_address", lambda figure: figures.append(figure) or "")
    found = tables.pivot(frame.assign(noise=frame["noise"].where(pd.isna(frame["noise"]), noise)))
    plots.trade_offs(frame, found, set())
    (axis,) = figures[-1].axes
    assert axis.get_yscale() == "log"
    assert "nats" in axis.get_ylabel()
    (words,) = [text.get_text() for text in axis.texts if "noise floor" in text.get_text()]
    assert words == ("noise floor 0.0100" if drawn else "noise floor 2e-07, below this axis")
    low, _ = axis.get_ylim()
    assert (low < 0.01) == drawn


def test_directions_of_lm_evals_metrics_are_lm_evals_own():
    from lm_eval.api import metrics as defined  # fills the registry
    from lm_eval.api import registry

    assert defined
    known = [name for name in registry.higher_is_better_registry if name not in ("perplexity", "bypass")]
    assert len(known) > 10
    for name in known:  # "perplexity" is the name of a text's metric
        assert metrics.higher_is_better(f"task/{name}") == registry.is_higher_better(name), name
