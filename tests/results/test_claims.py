"""Claims of papers: the shipped file against the printed figures, answers against scipy on stored windows, and errors in a file."""

import csv
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from fidelity_cells import fidelity_cell, fill
from scipy import stats as reference

from ptqbench.cell.folders import claims_file
from ptqbench.cli import main
from ptqbench.errors import ConfigError
from ptqbench.evaluate.records import write_records
from ptqbench.results import claims as module
from ptqbench.results.claims import answer, load_claims
from ptqbench.results.claims_sheet import limits
from ptqbench.results.reported import load
from ptqbench.results.sources import sweep_cells
from ptqbench.runs.folder import all_runs, create
from ptqbench.sweeps import compose
from ptqbench.sweeps.files import load_sweep

ACT = "gptq+act_order+true_sequential"
PPL = ["wikitext2_ppl", "ptb_ppl", "c4_ppl"]
PRINTED = {
    # claim: paper, tables, method and the one that it is compared with, bits, metrics
    "gptq-rtn-w4": ("GPTQ", ["Table 3", "Table 4", "Table 9", "Table 10", "Table 11", "Table 12"], "gptq", "rtn", ["w4a16"], PPL),
    "gptq-rtn-w3": ("GPTQ", ["Table 3", "Table 4", "Table 9", "Table 10", "Table 11", "Table 12"], "gptq", "rtn", ["w3a16"], PPL),
    "gptq-rtn-llama": ("GPTQ", ["README"], ACT, "rtn", ["w4a16", "w3a16"], PPL),
    "gptq-act-order": ("GPTQ", ["README"], ACT, "gptq", ["w4a16"], PPL),
    "gptaq-gptq-w4a4": ("GPTAQ", ["Table 1", "Table 2"], "quarot+gptaq", "quarot+gptq", ["w4a4"], PPL),
    "gptaq-gptq-w4a4-accuracy": ("GPTAQ", ["Table 2"], "quarot+gptaq", "quarot+gptq", ["w4a4"], ["zero_shot_avg_6"]),
    "gptaq-gptq-w3g128": ("GPTAQ", ["Table 3"], "gptaq", "gptq", ["w3a16_g128_sym"], PPL),
    "gptaq-gptq-rotated": ("GPTAQ", ["Table 7"], "quarot+gptaq", "quarot+gptq", ["w4a16", "w3a16", "w2a16"], PPL),
    **{
        f"resq-{rival}{end}": ("ResQ", ["Table 1"], "resq", rival, None, [metric])
        for rival in ("quarot", "spinquant")
        for end, metric in (("", "wikitext2_ppl"), ("-accuracy", "zero_shot_avg_8"), ("-mmlu", "mmlu"))
    },
    "resq-spinquant-gsm8k": ("ResQ", ["Table 2"], "resq", "spinquant", None, ["gsm8k_5shot_flexible"]),
    "resq-outliers": ("ResQ", ["Table 1"], "resq", "quik", None, PPL),
    "resq-gptq": ("ResQ", ["Table 1"], "resq", "gptq", None, PPL),
    "quarot-gptq": ("ResQ", ["Table 1"], "quarot", "gptq", None, PPL),
    "coquant-resq": ("CoQuant", ["Table 1"], "coquant", "resq", None, PPL),
    "loaq-gptq-w2": ("LoaQ", ["unspecified"], "loaq", "gptq", ["w2a16"], PPL),
    "loaq-gptaq-w2": ("LoaQ", ["unspecified"], "loaq", "gptaq", ["w2a16"], PPL),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_claimed_is_what_the_paper_prints(name):
    claim = next(one for one in load_claims() if one.name == name)
    paper, tables, first, second, bits, metrics = PRINTED[name]
    rows = load()[0]
    rows = rows[(rows["paper"] == paper) & rows["table"].isin(tables) & rows["metric"].isin(metrics)]
    rows = rows[rows["bits_label"].isin(bits)] if bits else rows
    key = ["table", "model", "metric", *(["bits_label"] if bits else [])]
    pairs = rows[rows["method"] == first].merge(rows[rows["method"] == second], on=key)
    better = pairs["value_x"] < pairs["value_y"] if metrics[0].endswith("_ppl") else pairs["value_x"] > pairs["value_y"]
    assert len(pairs)
    assert better.all()
    assert set(pairs["model"]) == set(claim.stated_for)


def test_the_sweep_of_a_claim_has_pairs_of_its_cells(tmp_path):
    claims = [claim for claim in load_claims() if claim.sweep]
    for name in {claim.sweep for claim in claims}:
        own = [claim for claim in claims if claim.sweep == name]
        for one in answer(own, sweep_cells(load_sweep(name), [f"execution.runs_dir={tmp_path}"])):
            assert (one.word, one.missing != []) == ("not run", True), one.claim.name


@pytest.mark.parametrize(
    ("word", "tasks", "expected"),
    [
        ("accuracy", [], ["average(a/acc_norm, b/acc)"]),
        ("accuracy", ["b"], ["b/acc"]),
        ("accuracy", ["b", "c"], ["average(a/acc_norm, b/acc)"]),
        ("acc", [], ["a/acc", "b/acc"]),
        ("perplexity", [], ["t/perplexity", "u/perplexity"]),
        ("u/perplexity", [], ["u/perplexity"]),
        ("v/perplexity", [], []),
        ("average(a/acc, b/acc)", [], ["average(a/acc, b/acc)"]),
        ("average(a/acc, c/acc)", [], []),
    ],
)
def test_metrics_that_a_word_means(word, tasks, expected):
    claim = module.Claim("c", "P", "It is.", {"method": "gptq"}, {"method": "rtn"}, [word], tasks=tasks)
    shared = ["t/perplexity", "u/perplexity", "a/acc", "a/acc_norm", "b/acc", "average(a/acc, b/acc)"]
    assert module._metrics(word, claim, shared) == expected


CLAIM = {
    "name": "c",
    "paper": "P",
    "says": "It is.",
    "first": {"method": "gptq"},
    "second": {"method": "rtn"},
    "metrics": ["perplexity"],
}


def file_of(tmp_path, *changes):
    path = tmp_path / "my.yaml"
    claims = [CLAIM | {"name": f"c{place}"} | change for place, change in enumerate(changes)]
    path.write_text(yaml.safe_dump({"claims": claims}))
    return str(path)


def answers(tmp_path, root, *changes):
    return answer(load_claims(file_of(tmp_path, *changes)), [(folder, None) for folder in all_runs(root)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("claimed")
    for method in ("fp16", "gptq", "gptaq", "rtn"):
        fidelity_cell(root, method)
    return root


def windows(root, method, seed=0):
    (path,) = root.glob(f"*-{method}-*-s{seed}-*")
    return pd.read_parquet(path / "records" / "windows" / "wikitext2.parquet")


def test_answers_and_their_p_values(root, tmp_path):
    found = answers(
        tmp_path, root, {}, {"direction": "worse"}, {"first": {"method": "rtn"}, "second": {"method": "gptq"}},
        {"metrics": ["accuracy"], "first": {"method": "gptaq"}, "second": {"method": "gptq"}}, {"second": {"method": "quarot"}},
        {"metrics": ["kl"], "scope": "some"},
    )  # fmt: skip
    assert [one.word for one in found] == [
        "supported", "contradicted", "contradicted", "not distinguishable", "not run", "supported",
    ]  # fmt: skip
    # By hand: four different tests, the first two claims share one.
    losses = {method: windows(root, method)["nll"] for method in ("gptq", "rtn")}
    one = reference.ttest_rel(losses["gptq"], losses["rtn"]).pvalue
    kl = reference.ttest_rel(windows(root, "gptq")["kl"], windows(root, "rtn")["kl"]).pvalue
    right = {}
    for method in ("gptq", "gptaq"):
        (path,) = root.glob(f"*-{method}-*")
        right[method] = pd.read_parquet(path / "records" / "examples" / "arc_easy.parquet")["acc"].to_numpy()
    only = [int(((right[a] == 1) & (right[b] == 0)).sum()) for a, b in (("gptq", "gptaq"), ("gptaq", "gptq"))]
    accuracy = reference.binomtest(only[0], sum(only)).pvalue
    # rtn against gptq is the first test with its sides exchanged, and is counted with it.
    raw = sorted([one, kl, accuracy])
    holm = np.minimum(np.maximum.accumulate([p * (3 - place) for place, p in enumerate(raw)]), 1.0)
    expected = dict(zip(raw, holm, strict=True))
    given = [found[0].p_value, found[1].p_value, found[2].p_value, found[5].p_value, found[3].p_value]
    assert given == [pytest.approx(expected[p]) for p in (one, one, one, kl, accuracy)]
    assert all(test.one_draw for one in found for test in one.tests)
    assert "One draw of each side: nothing is known of the spread over seeds." in limits(found[0])
    bits = {"first": {"method": "rtn", "w_bits": 3}, "second": {"method": "fp16"}, "direction": "worse"}
    (plain,) = answers(tmp_path, root, bits)
    assert (plain.word, limits(plain)) == ("supported", ["Answered on toy-1b.", "Neither side depends on a seed."])


def test_every_pair_must_be_as_claimed(root, tmp_path):
    both = {"first": {"method": ["gptq", "gptaq"]}, "second": {"method": ["rtn", "gptq"]}}
    every, some = answers(tmp_path, root, both, both | {"scope": "some"})
    pairs = {(test.first.names[1], test.second.names[1]): test.judged.word for test in every.tests}
    assert pairs == {("gptq", "rtn"): "better", ("gptaq", "rtn"): "better", ("gptaq", "gptq"): "undecided"}
    assert (every.word, some.word) == ("not distinguishable", "supported")
    assert every.p_value == max(test.judged.adjusted for test in every.tests)
    assert some.p_value == min(test.judged.adjusted for test in some.tests)


def test_pairs_agree_in_what_is_alike(root, tmp_path):
    found = answers(
        tmp_path, root, {"alike": ["calibration"]}, {"alike": ["solver"]}, {"models": ["toy-3b"]}, {"where": {"w_bits": 4}},
        {"where": {"w_bits": [3, 4], "group_size": None}},
    )  # fmt: skip
    assert [one.word for one in found] == ["supported", "not run", "not run", "not run", "supported"]


def shifted(folder, by, rng):
    """Give a cell other losses: those of the text, moved by a constant and a little noise in every window."""
    path = folder.windows_path("wikitext2")
    rows = pd.read_parquet(path).to_dict("records")
    noise = rng.normal(0, 1e-3, len(rows))
    hard = np.linspace(2, 3, len(rows))
    rows = [row | {"nll": 63 * (hard[i] + by + noise[i])} for i, row in enumerate(rows)]
    write_records(path, rows, folder.run_id, {})


@pytest.mark.parametrize(("spread", "word"), [(0.3, "not distinguishable"), (0.01, "supported")])
def test_with_several_seeds_a_claim_must_hold_beyond_their_spread(tmp_path, spread, word):
    rng = np.random.default_rng(0)
    for seed, sign in ((0, 0), (1, 1), (2, -1)):
        shifted(fidelity_cell(tmp_path, "gptq", seed=seed), 0.0, rng)
        shifted(fidelity_cell(tmp_path, "loaq", seed=seed), -0.1 + sign * spread, rng)
    (found,) = answers(tmp_path, tmp_path, {"first": {"method": "loaq"}, "second": {"method": "gptq"}})
    (test,) = found.tests
    assert (found.word, test.judged.found.draws, test.one_draw) == (word, (3, 3), False)
    differences = (
        np.array([windows(tmp_path, "loaq", s)["nll"] - windows(tmp_path, "gptq", s)["nll"] for s in range(3)]) / 63
    )
    over_windows, over_seeds = differences.mean(axis=0), differences.mean(axis=1)
    parts = [(over_windows.var(ddof=1) / 12, 11), (over_seeds.var(ddof=1) / 3, 2)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    assert found.p_value == pytest.approx(2 * reference.t.sf(abs(differences.mean()) / np.sqrt(variance), freedom))
    # The windows of each single seed alone would decide.
    assert all(reference.ttest_1samp(one, 0).pvalue < 1e-6 for one in differences)


SWEEP = """
name: mine
common: ["model=tiny", "evaluation.tasks=[]"]
grids: [{method: [rtn, gptq], bitwidth: [w3, w4]}]
"""


def run(capsys, *words):
    status = main(["claims", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command_says_what_is_missing_and_how_to_run_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(SWEEP)
    cells = compose.cells(load_sweep(str(sweep)), [f"execution.runs_dir={tmp_path}"])
    claims = file_of(
        tmp_path, {}, {"where": {"w_bits": 4}}, {"second": {"method": "loaq"}}, {"metrics": ["ptb/perplexity"]}
    )
    for cell in cells[:3]:  # gptq at w4 is not finished
        if cell.spec.bitwidth.w_bits == 3 or cell.spec.method.name == "rtn":
            fill(create(cell.spec, cell.folder), cell.spec, cell.spec.method.name)
    status, out, err = run(capsys, sweep, "--runs-dir", tmp_path, "--claims", claims)
    assert (status, err) == (0, "")
    flat = " ".join(out.split())
    assert "4 claims: 1 supported so far, 3 not run." in flat
    assert f"Missing: tiny gptq w4 seed 0 (pending). Run: python -m ptqbench sweep {sweep}" in flat
    assert "No such pair of cells is here." in flat
    assert "Not tested: tiny gptq and rtn: no ptb/perplexity measured." in flat
    assert "One draw of each side: nothing is known of the spread over seeds." in flat
    assert "These answers speak for tiny alone" in flat
    assert max(map(len, out.splitlines())) <= 200
    # Once it has run, nothing is missing.
    fill(create(cells[3].spec, cells[3].folder), cells[3].spec, "gptq")
    _, out, _ = run(capsys, sweep, "--runs-dir", tmp_path, "--claims", claims)
    assert "4 claims: 2 supported, 2 not run." in " ".join(out.split())
    assert "Missing" not in out


def test_formats(root, tmp_path, capsys, monkeypatch):
    claims = file_of(tmp_path, {}, {"second": {"method": "quarot"}, "sweep": "demo"})
    status, out, _ = run(capsys, "--runs-dir", root, "--claims", claims, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert status == 0
    assert [(row["claim"], row["answer"], row["method"]) for row in rows] == [
        ("c0", "supported", "gptq"),
        ("c1", "not run", ""),
    ]
    losses = [windows(root, method)["nll"].mean() / 63 for method in ("gptq", "rtn")]
    assert float(rows[0]["difference"]) == pytest.approx(np.expm1(losses[0] - losses[1]))
    assert float(rows[0]["value"]) == pytest.approx(np.exp(losses[0]))
    assert float(rows[0]["other_value"]) == pytest.approx(np.exp(losses[1]))
    _, out, _ = run(capsys, "--runs-dir", root, "--claims", claims, "--format", "md")
    assert "| 1 | P | It is. | **supported** [1] |" in out
    assert "Run: python -m ptqbench sweep demo" in out
    output = tmp_path / "claims.html"
    assert run(capsys, "--runs-dir", root, "--claims", claims, "--output", output)[0] == 0
    assert output.read_text().count("<table>") == 2
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "--runs-dir", root)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": ["perplexity"]}, "unknown key 'my.yaml.claims.0.metric'"),
        ({"metrics": []}, "my.yaml.claims.0.metrics: list should have at least 1 item"),
        ({"metrics": ["perplexty"]}, "my.yaml.claims.0 (c0): metrics: unknown metric 'perplexty'; did you mean 'perplexity'?"),
        ({"direction": "best"}, "my.yaml.claims.0.direction: input should be 'better' or 'worse', got 'best'"),
        ({"first": {"methd": "gptq"}}, "(c0): first: unknown column 'methd'; did you mean 'method'?"),
        ({"first": {"method": "gtpq"}}, "(c0): first: unknown method 'gtpq'; did you mean 'gptq'?"),
        ({"first": {"method": ["gptq", 3]}}, "(c0): first: unknown method 3"),
        ({"first": {}}, "my.yaml.claims.0.first: dictionary should have at least 1 item"),
        ({"where": {"w_bits": {"from": 3}}}, "(c0): where: w_bits: expected a value or a list of values"),
        ({"alike": ["bits"]}, "(c0): alike: unknown column 'bits'"),
        ({"name": ""}, "my.yaml.claims.0.name: string should have at least 1 character"),
    ],
)  # fmt: skip
def test_an_error_in_a_file_is_one_line_with_its_place(root, tmp_path, capsys, change, said):
    status, out, err = run(capsys, "--runs-dir", root, "--claims", file_of(tmp_path, change))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_other_errors_of_a_file(tmp_path):
    path = tmp_path / "my.yaml"
    for text, said in {
        "claims: []": "at least 1 item", "claims: {": "not valid YAML", "- 3": "expected a mapping with claims, got a list",
        yaml.safe_dump({"claims": [CLAIM, CLAIM]}): r"my.yaml.claims.1 \(c\): expected a name of its own",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_claims(str(path))
    with pytest.raises(ConfigError, match="no file of claims"):
        load_claims(str(tmp_path / "none.yaml"))


def test_a_user_reads_the_keys_in_the_documentation():
    page = (claims_file().parents[1] / "docs" / "claims.md").read_text()
    fields = set(module.Claim.__dataclass_fields__)
    assert fields == set(re.findall(r"^\| `(\w+)` \|", page, re.M)) & fields
