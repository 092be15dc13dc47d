"""One tiny cell of every method, in this process: what `make test-fast` runs of whole cells."""

import math

import pytest

from conftest import random_cell_words
from ptqbench.cell.folders import group_names
from ptqbench.run import run_cell
from ptqbench.runs.folder import create
from ptqbench.sweeps.compose import compose_cell


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random model of 2 blocks, 24 windows of 16 tokens for calibration and a few for perplexity, no tasks."""
    return random_cell_words(tmp_path_factory.mktemp("cells"), 24)


FEW = ["method.transform.n_samples=4"]
SHORT = {"subspace": FEW, "smoothquant": FEW, "awq": FEW, "learned_rotation": ["method.transform.steps=2"]}


@pytest.mark.parametrize("method", group_names("method"))
def test_a_cell_of_every_method(words, method):
    spec = compose_cell([f"+method={method}", *words])
    spec = compose_cell([f"+method={method}", *words, *SHORT.get(spec.method.transform.name, [])])
    result = run_cell(spec, create(spec))
    assert math.isfinite(result["metrics"]["file/perplexity"]["value"])
    assert (result["bits"]["effective_w_bits"] < 16) == (method != "fp16")
    assert create(spec).layers_path.exists() == (method != "fp16")


@pytest.mark.parametrize("method", ["gptq", "coquant"])
def test_replicates_of_a_cell_differ_and_are_measured_on_the_same_stream(words, method):
    """Other codes and bases from a stream that is moved in its last place; an unquantized cell measures what it measured."""
    short = [*words, "model.dtype=bfloat16", *(["method.transform.n_samples=4"] if method == "coquant" else [])]
    cells = [compose_cell([f"+method={method}", *short, f"replicate={number}"]) for number in (0, 1, 2)]
    results = [run_cell(spec, create(spec)) for spec in cells]
    losses = [result["metrics"]["file/perplexity"]["value"] for result in results]
    assert len({result["run_id"] for result in results}) == 3
    assert [r["replicate"] for r in results] == [0, 1, 2]
    assert len(set(losses)) == 3
    assert max(losses) / min(losses) < 1.1
    unquantized = [compose_cell(["+method=fp16", *words, f"replicate={number}"]) for number in (0, 1)]
    plain, moved = (run_cell(spec, create(spec))["metrics"] for spec in unquantized)
    assert plain == moved
