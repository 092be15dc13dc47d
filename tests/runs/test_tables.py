"""Tables are pure functions of run folders."""

import math

import pytest

from ptqbench import store, tables
from ptqbench.spec import RunSpec, build


def make_cell(root, method="gptq", bitwidth="w4", seed=0, perplexity=None, acc=0.5, model="m"):
    role = {"name": "none", "options": {"label": method}}
    data = {
        "model": {"name": model, "digest": "d", "dtype": "float32"},
        "method": {
            "name": method, "transform": role, "target": role, "solver": role, "refine": role,
            "grid": {}, "activation": {}, "true_sequential": True,
        },
        "bitwidth": {"name": bitwidth, "w_bits": int(bitwidth[1]), "a_bits": 16, "k_bits": 16, "v_bits": 16},
        "calibration": {"dataset": "tiny"},
        "evaluation": {"name": "e"},
        "seed": seed,
        "execution": {"runs_dir": str(root)},
    }  # fmt: skip
    folder = store.create(build(RunSpec, data))
    if perplexity is not None:
        metrics = {"t/perplexity": {"value": perplexity, "stderr": 0.1}, "q/acc": {"value": acc, "stderr": None}}
        store.write_json(
            folder.result_path,
            {
                "run_id": folder.run_id,
                "metrics": metrics,
                "bits": {"effective_w_bits": 4.25, "packed_bytes": 10},
                "timings": {"round_s": 2.0},
            },
        )
    return folder


def frame_of(root):
    return tables.tidy((folder, None) for folder in store.all_runs(root))


def test_golden_markdown(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.25, acc=0.25)
    make_cell(tmp_path, "gptq", perplexity=6.5, acc=0.255)
    make_cell(tmp_path, "gptq", "w2", perplexity=123456.0, acc=0.1)
    assert tables.markdown(tables.comparison(frame_of(tmp_path))) == (
        "| model | method | bitwidth | true w bits | t/perplexity | q/acc |\n"
        "|---|---|---|---:|---:|---:|\n"
        "| m | gptq | w2 | 4.25 | 1.2e+05 | 10.0 |\n"
        "| m | gptq | w4 | 4.25 | **6.500** | **25.5** |\n"
        "| m | rtn | w4 | 4.25 | 9.250 | 25.0 |\n"
    )


def test_mean_over_seeds_never_hides_a_missing_seed(tmp_path):
    make_cell(tmp_path, seed=0, perplexity=4.0)
    make_cell(tmp_path, seed=1, perplexity=6.0)
    assert tables.comparison(frame_of(tmp_path))["t/perplexity"].tolist() == [5.0]
    make_cell(tmp_path, seed=2)
    table, frame = tables.comparison(frame_of(tmp_path)), frame_of(tmp_path)
    assert math.isnan(table["t/perplexity"].iloc[0])
    assert table["n_seeds"].tolist() == [3]
    assert tables.missing(frame) == ["m gptq w4 seed 2: pending"]


def test_failed_cell_shows_its_reason(tmp_path):
    folder = make_cell(tmp_path)
    store.write_json(folder.failure_path, {"message": "block 3: not positive definite"})
    frame = frame_of(tmp_path)
    assert tables.missing(frame) == ["m gptq w4 seed 0: block 3: not positive definite"]
    assert "| m | gptq | w4 | - |" in tables.markdown(tables.comparison(frame))


@pytest.mark.parametrize("name", ["result.json", "spec.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_files_become_a_reason_never_an_exception(tmp_path, name, content):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    folder = make_cell(tmp_path, "gptq", perplexity=6.0)
    (folder.path / name).write_text(content)
    frame = frame_of(tmp_path)
    assert len(tables.missing(frame)) == 1
    assert "9.000" in tables.markdown(tables.comparison(frame))


def test_best_needs_a_rival_and_knows_the_direction(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.0, acc=0.9)
    make_cell(tmp_path, "gptq", perplexity=6.0, acc=0.5)
    make_cell(tmp_path, "gptq", "w2", perplexity=1.0, acc=1.0)
    marks = tables.best(tables.comparison(frame_of(tmp_path)))
    assert marks.loc[("m", "gptq", "w4")].tolist() == [True, False]
    assert marks.loc[("m", "rtn", "w4")].tolist() == [False, True]
    assert not marks.loc[("m", "gptq", "w2")].any()


def test_standard_errors_follow_the_rows_of_the_comparison(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    make_cell(tmp_path, "gptq", "w2", perplexity=6.0)
    frame = frame_of(tmp_path)
    errors = tables.standard_errors(frame)
    assert list(errors.index) == list(tables.comparison(frame).index)
    assert errors["t/perplexity"].tolist() == [0.1, 0.1]


def test_picture_is_written(tmp_path):
    from ptqbench.picture import draw

    make_cell(tmp_path, "rtn", perplexity=9.0)
    make_cell(tmp_path, "gptq", perplexity=6.0)
    frame = frame_of(tmp_path)
    draw(tables.comparison(frame), str(tmp_path / "p.png"), tables.standard_errors(frame))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
