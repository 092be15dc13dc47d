"""Measured times beside estimates: medians and ratios as one computes them by hand."""

import statistics

import pytest

from ptqbench.launch.summary import print_plan
from ptqbench.runs.folder import create, write_json
from ptqbench.sweeps.compose import compose_cell, resolved
from ptqbench.sweeps.measured import compared, in_words
from ptqbench.sweeps.plan import plan
from ptqbench.sweeps.resources import STAGES, START_S

TIMES = {"bases_s": 4.0, "load_s": 1.0, "forward_s": 2.5, "round_s": 1.5, "perplexity_s": 7.0, "zero_shot_s": 2.0}


def finish(cell, scale, cpu="a processor, 4 cores", gpu=None):
    folder = create(cell.spec, cell.folder)
    timings = {name: seconds * scale for name, seconds in TIMES.items()}
    write_json(
        folder.result_path,
        {"run_id": folder.run_id, "timings": timings, "peak_gpu_gib": gpu and 3.0, "peak_host_gib": 1.0},
    )
    write_json(folder.new_attempt() / "meta.json", {"cpu": cpu, "gpu": gpu and {"name": gpu}})


def comparison(rows):
    return compared((row.cell.spec, row.took) for row in rows if row.took is not None)


@pytest.fixture
def cells(tmp_path):
    words = ["+method=coquant", "model=tiny", f"execution.runs_dir={tmp_path}", "execution.device=cpu"]
    return resolved([(str(seed), [*words, f"seed={seed}"]) for seed in range(4)])


def test_the_stages_of_an_estimate_are_its_whole(cells):
    (row, *_) = plan(cells)
    assert 60 * row.needs.estimate_min == pytest.approx(START_S + sum(row.needs.stages))
    stages = dict(zip(STAGES, row.needs.stages, strict=True))
    other = dict(zip(STAGES, plan(resolved([("x", ["+method=gptq", "model=tiny"])]))[0].needs.stages, strict=True))
    assert stages["bases"] > other["bases"] == 0
    assert stages["evaluate"] == other["evaluate"]


def test_medians_and_words(cells, capsys):
    for cell, scale in zip(cells, (1.0, 3.0, 2.0), strict=False):
        finish(cell, scale)
    rows = plan(cells)
    ((device, (line,)),) = comparison(rows).items()
    assert device == "a processor, 4 cores"
    estimated = rows[0].needs.stages
    parts = [f"{m} / " for m in ("8.0", "10", "18")]  # twice 4, twice (1 + 2.5 + 1.5), twice (7 + 2)
    assert line[0] == f"tiny coquant {compose_cell(['+method=coquant', 'model=tiny']).bitwidth.name}"
    assert line[1] == "x3"
    assert all(said.startswith(part) for said, part in zip(line[2:5], parts, strict=True)), line
    ratio = statistics.median((START_S + scale * 18) / (START_S + sum(estimated)) for scale in (1.0, 3.0, 2.0))
    assert line[5] == in_words(ratio)
    print_plan(rows)
    said = capsys.readouterr().out
    assert "finished cells on a processor, 4 cores, measured / estimated (median):" in said
    assert f"x {ratio:.2f}, what 3 finished cells took" in said
    assert rows[3].needs.estimate_min == pytest.approx(ratio * (START_S + sum(estimated)) / 60)


def test_devices_are_compared_apart_and_a_cell_that_ran_elsewhere_than_planned_is_left_out(cells):
    finish(cells[0], 1.0)
    finish(cells[1], 1.0, cpu="another, 64 cores")
    finish(cells[2], 1.0, gpu="a GPU")  # planned on the CPU
    assert {device: len(lines) for device, lines in comparison(plan(cells)).items()} == {
        "a processor, 4 cores": 1,
        "another, 64 cores": 1,
    }


@pytest.mark.parametrize("damage", [{"timings": None}, {"timings": {"load_s": "x"}}, {"run_id": "x"}])
def test_a_damaged_record_is_no_measurement(cells, damage):
    finish(cells[0], 1.0)
    from ptqbench.runs.files import read_record

    write_json(cells[0].folder.result_path, read_record(cells[0].folder.result_path) | damage)
    assert comparison(plan(cells)) == {}
