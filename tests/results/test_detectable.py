"""The smallest difference that an evaluation can show: by simulation of the tests that are made, and from finished cells."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from fidelity_cells import N_EXAMPLES, fill
from scipy import stats as reference

from ptqbench.evaluate.records import write_records
from ptqbench.launch.summary import print_plan
from ptqbench.results import detectable as module
from ptqbench.results.stats import mcnemar
from ptqbench.runs.folder import create
from ptqbench.sweeps import compose
from ptqbench.sweeps.files import load_sweep
from ptqbench.sweeps.plan import Row, plan


def test_a_difference_of_that_size_is_found_with_the_stated_power():
    rng, n, discordant = np.random.default_rng(0), 1200, 0.15
    least = module.of_shares(n, discordant)
    assert least == pytest.approx(2.8016 * math.sqrt(discordant / n), rel=1e-4)
    found = []
    for _ in range(400):
        draw = rng.random(n)
        first = (draw < (discordant - least) / 2).astype(float)  # right in the first cell alone
        second = ((draw >= 0.5) & (draw < 0.5 + (discordant + least) / 2)).astype(float)
        found.append(mcnemar(first, second) < 0.05)
    assert 0.72 < np.mean(found) < 0.88  # the exact test is a little less powerful than its normal approximation


def test_the_same_of_perplexities_and_averages():
    rng, n, spread = np.random.default_rng(1), 150, 0.03
    moved = math.log1p(module.of_perplexity(n, spread))
    found = [reference.ttest_1samp(rng.normal(moved, spread, n), 0).pvalue < 0.05 for _ in range(600)]
    assert 0.74 < np.mean(found) < 0.86
    parts = [(500, 0.15), (2000, 0.1)]
    error = math.sqrt(0.15 / 500 + 0.1 / 2000) / 2
    power = reference.norm.cdf(module.of_average(parts) / error - reference.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=1e-4)


SWEEP = """
name: mine
common: [model=tiny]
grids: [{method: fp16}, {method: [rtn, gptq, gptaq], bitwidth: w3}]
"""


@pytest.fixture
def cells(tmp_path):
    (tmp_path / "mine.yaml").write_text(SWEEP)
    return compose.cells(load_sweep(str(tmp_path / "mine.yaml")), [f"execution.runs_dir={tmp_path}"])


def printed(cells, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    print_plan(plan(cells), every_cell=False)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(module.HEADING)]


def test_plan_takes_the_spread_of_finished_cells_else_what_it_assumes(cells, capsys, monkeypatch):
    lines = printed(cells, capsys, monkeypatch)
    assert len(lines) == 2, "one for texts, one for tasks, whatever the number of cells"
    assert lines[0].endswith("windows that differ by 0.09 nats, assumed)")
    share = 100 * 2.8016 * math.sqrt(0.15 / 608)
    assert lines[1].endswith(
        f" of tiny_questions: {share:.1f} points of 608 examples (15 % of answers differ, assumed)"
    )
    # Finished cells: records of the same text and task; the unquantized cell is none of them.
    records = []
    for cell in cells:
        folder = fill(create(cell.spec, cell.folder), cell.spec, cell.spec.method.name)
        windows = pd.read_parquet(folder.windows_path("wikitext2"))
        folder.windows_path("wikitext2").rename(folder.windows_path("tiny"))
        examples = pd.read_parquet(folder.examples_path("arc_easy"))
        rows = examples.assign(task="tiny_questions").to_dict("records")
        folder.examples_path("arc_easy").unlink()
        write_records(folder.examples_path("tiny_questions"), rows, folder.run_id, {"task": "tiny_questions"})
        if cell.spec.quantizes:
            records.append((windows["nll"] / windows["n_tokens"], examples["acc"]))
    pairs = list(itertools.combinations(records, 2))
    assert len(pairs) == 3
    spread = np.median([(b[0] - a[0]).std(ddof=1) for a, b in pairs])
    share = np.median([(a[1] != b[1]).mean() for a, b in pairs])
    lines = printed(cells, capsys, monkeypatch)
    n = len(records[0][0])
    least = 100 * math.expm1(2.8016 * spread / math.sqrt(n))
    assert (
        f"tiny/perplexity: {least:.2g} % ({n} windows that differ by {spread:.2g} nats, as in finished cells)"
        in lines[0]
    )
    least = 100 * 2.8016 * math.sqrt(share / N_EXAMPLES)
    assert (
        f"{least:.1f} points of {N_EXAMPLES} examples ({100 * share:.2g} % of answers differ, as in finished"
        in lines[1]
    )
    # A damaged record leaves the assumption.
    for cell in cells:
        cell.folder.windows_path("tiny").write_bytes(b"PAR1")
    assert printed(cells, capsys, monkeypatch)[0].endswith("assumed)")


def test_many_tasks_are_one_line():
    found = compose.requested(["+method=rtn", "model=tiny", "evaluation=paper_8", "bitwidth=w3"])
    text, tasks = module.detectable([Row(cell, cell.state(), None) for cell in found])
    assert "wikitext2/perplexity: 0.68 % (170 windows that differ by 0.032 nats, assumed)" in text
    assert " of 8 tasks: " in tasks
    assert f"to {100 * 2.8016 * math.sqrt(0.15 / 500):.1f} (openbookqa), of their mean" in tasks


def test_plan_needs_no_heavy_library():
    heavy = ("torch", "pandas", "scipy", "pyarrow")
    code = f"import sys, ptqbench.launch.summary; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
