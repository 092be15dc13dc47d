"""Tables are pure functions of run folders."""

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest

import golden_store
from ptqbench.cell.spec import RunSpec, build
from ptqbench.errors import ConfigError
from ptqbench.results import tables
from ptqbench.runs import folder as store


def make_cell(root, method="gptq", bitwidth="w4", seed=0, perplexity=None, acc=0.5, model="m", replicate=0, digest="d"):
    role = {"name": "none", "options": {"label": method}}
    data = {
        "model": {"name": model, "digest": digest, "dtype": "float32"},
        "method": {
            "name": method, "transform": role, "target": role, "solver": role, "refine": role,
            "grid": {}, "activation": {}, "true_sequential": True,
        },
        "bitwidth": {"name": bitwidth, "w_bits": int(bitwidth[1]), "a_bits": 16, "k_bits": 16, "v_bits": 16},
        "calibration": {"dataset": "tiny"},
        "evaluation": {"name": "e"},
        "seed": seed, "replicate": replicate,
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


GOLDEN = Path(__file__).parent / "golden"
RENDERERS = {"md": tables.markdown, "tex": tables.latex, "html": tables.html}
LAYOUTS = {"rows": ["metric"], "models": ["model", "metric"]}


def golden_sheet(layout):
    return tables.comparison_sheet(
        frame_of(golden_store.FOLDER), "Invented figures & 100 % toy_models", LAYOUTS[layout]
    )


def test_golden_store_is_what_its_script_writes(tmp_path):
    golden_store.write(tmp_path)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.json")}
    stored = {p.relative_to(golden_store.FOLDER): p.read_text() for p in golden_store.FOLDER.rglob("*.json")}
    assert stored == fresh, (
        "the schema of a cell has changed: run `python tests/golden_store.py` and commit tests/data_store"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", RENDERERS)
def test_golden_store_gives_these_bytes(layout, suffix):
    path = GOLDEN / f"{layout}.{suffix}"
    assert RENDERERS[suffix](golden_sheet(layout)).encode() == path.read_bytes(), f"compare with {path.name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latex_compiles(layout, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on PATH: the LaTeX table is compared with its golden text only")
    body = tables.latex(golden_sheet(layout))
    preamble = (
        r"\documentclass{article}\usepackage[margin=1cm,landscape]{geometry}"
        + body[2 : body.index("\n")]
        + r"\begin{document}"
    )
    (tmp_path / "t.tex").write_text(preamble + body + r"\end{document}")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_escapes_what_tex_would_read():
    sheet = tables.Sheet([tables.Column("a_b", numeric=False)], [[tables.Entry("50 % & #1 {x} ~ ^ \\ $")]])
    assert r"a\_b \\" in tables.latex(sheet)
    assert r"50 \% \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$" in tables.latex(sheet)


def test_html_and_markdown_escape():
    sheet = tables.Sheet(
        [tables.Column("<a|b>", numeric=False)], [[tables.Entry("x|<y>", bold=True, note=1)]], notes=["<n>"]
    )
    assert "<td><b>x|&lt;y&gt;</b><sup>1</sup></td>" in tables.html(sheet)
    assert "<li>&lt;n&gt;</li>" in tables.html(sheet)
    assert "**x\\|<y>** [1]" in tables.markdown(sheet)


def test_mean_over_seeds_never_hides_a_missing_seed(tmp_path):
    make_cell(tmp_path, seed=0, perplexity=4.0)
    make_cell(tmp_path, seed=1, perplexity=6.0)
    found = tables.pivot(frame_of(tmp_path))
    assert found.mean["t/perplexity"].tolist() == [5.0]
    assert found.spread["t/perplexity"].tolist() == [pytest.approx(math.sqrt(2))]
    assert found.error["t/perplexity"].tolist() == [pytest.approx(1.0)]
    make_cell(tmp_path, seed=2)
    found = tables.pivot(frame_of(tmp_path))
    assert math.isnan(found.mean["t/perplexity"].iloc[0])
    assert found.bits["n_seeds"].tolist() == [3]
    assert found.reasons == {("m", "gptq", "w4"): "seed 2 pending"}


def test_replicates_are_draws_of_one_row_as_seeds_are(tmp_path):
    for replicate, perplexity in enumerate((4.0, 6.0, 5.0)):
        make_cell(tmp_path, replicate=replicate, perplexity=perplexity)
    make_cell(tmp_path, seed=1, perplexity=7.0)
    found = tables.pivot(frame_of(tmp_path))
    assert found.mean["t/perplexity"].tolist() == [5.5]
    assert found.bits["n_seeds"].tolist() == [4]
    assert found.spread["t/perplexity"].tolist() == pytest.approx([statistics.stdev([4, 6, 5, 7])])
    make_cell(tmp_path, replicate=3)
    assert tables.pivot(frame_of(tmp_path)).reasons == {("m", "gptq", "w4"): "seed 0r3 pending"}


def test_spread_and_number_of_seeds_are_printed(tmp_path):
    for seed, perplexity in enumerate((4.0, 6.0, 5.0)):
        make_cell(tmp_path, seed=seed, perplexity=perplexity)
    make_cell(tmp_path, "rtn", perplexity=9.0)
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "| m | gptq | w4 | 4 | 4.25 | 3 | **5.000 ± 1.000** |" in text
    assert "| m | rtn | w4 | 4 | 4.25 | 1 | 9.000 |" in text
    assert "standard deviation over seeds. n = 3." in text


def test_a_deviation_is_a_footnote_of_its_method_and_names_the_model_where_models_share_the_row(tmp_path):
    for model, said in (("m", []), ("n", ["heads are not mixed"])):  # two models of one method
        folder = make_cell(tmp_path, "quarot", perplexity=9.0, model=model, digest=model)
        store.write_json(folder.result_path, folder.result() | {"deviations": said})
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "| m | quarot | w4 |" in text
    assert "| n | quarot [1] | w4 |" in text
    assert "[1] heads are not mixed\n" in text
    wide = tables.markdown(tables.comparison_sheet(frame_of(tmp_path), columns=["model", "metric"]))
    assert "| quarot [1] | w4 |" in wide
    assert "[1] n: heads are not mixed\n" in wide


def test_failed_cell_is_a_dash_with_its_reason(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    folder = make_cell(tmp_path)
    store.write_json(folder.failure_path, {"message": "block 3: not\npositive definite"})
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "| m | gptq | w4 | 4 | - | - [1] | - [1] |" in text
    assert "[1] failed: block 3: not positive definite\n" in text


def test_cells_that_were_never_run_say_why_and_spoil_no_mean(tmp_path):
    folder = make_cell(tmp_path, "gptq", perplexity=6.0)
    absent = [
        tables.Absent("m", "fp16", "w4", 0, "skipped", "rounds nothing"),
        tables.Absent("m", "q2n", "w4", 0, "excluded", "not defined"),
        tables.Absent("m", "gptq", "w4", 1, "excluded", "too dear"),
    ]
    text = tables.markdown(tables.comparison_sheet(tables.tidy([(folder, None), *absent])))
    assert "| m | gptq [1] | w4 | 4 | 4.25 | 6.000 |" in text
    assert "| m | fp16 | w4 | - | - | - [2] |" in text
    assert [line for line in text.splitlines() if line.startswith("[")] == [
        "[1] seed 1 excluded: too dear",
        "[2] skipped: rounds nothing",
        "[3] excluded: not defined",
    ]


def test_a_table_without_any_result_still_says_why(tmp_path):
    make_cell(tmp_path)
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "| m | gptq [1] | w4 | 4 | - |" in text
    assert "[1] pending" in text


FILES = [
    "spec.json",
    "result.json",
    "attempts/001/heartbeat.json",
    "attempts/001/meta.json",
    "failure.json",
    "lease.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"run_id": 1}', "\x00", "half"])
def test_any_missing_or_truncated_file_gives_a_reason_never_an_exception(tmp_path, name, content):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    folder = make_cell(tmp_path, "gptq", perplexity=6.0)
    for other in FILES[2:]:
        (folder.path / other).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / other).write_text('{"time": 0, "message": "x"}')
    path = folder.path / name
    if content is None:
        path.unlink()
    else:
        path.write_text(path.read_text()[: path.stat().st_size // 2] if content == "half" else content)
    for known in (None, golden_spec(folder)):
        text = tables.markdown(tables.comparison_sheet(tables.tidy([(folder, known), (rtn_of(tmp_path), None)])))
        assert "9.000" in text
        if name == "result.json" or (name == "spec.json" and known is None):
            assert "6.000" not in text
            assert folder.run_id in text or "[1] " in text
        else:
            assert "6.000" in text


def golden_spec(folder):
    rebuilt = make_cell(folder.path.parent / "again", "gptq")
    return rebuilt.read_spec()


def rtn_of(root):
    return next(folder for folder in store.all_runs(root) if "rtn" in folder.path.name)


@pytest.mark.parametrize("field", ["metrics", "bits"])
def test_a_result_that_lacks_a_field_is_damaged(tmp_path, field):
    folder = make_cell(tmp_path, perplexity=6.0)
    data = json.loads(folder.result_path.read_text())
    del data[field]
    store.write_json(folder.result_path, data)
    frame = frame_of(tmp_path)
    assert frame["state"].tolist() == ["damaged"]
    assert field in frame["reason"].iloc[0]


def test_best_needs_a_rival_and_knows_the_direction(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.0, acc=0.9)
    make_cell(tmp_path, "gptq", perplexity=6.0, acc=0.5)
    make_cell(tmp_path, "gptq", "w2", perplexity=1.0, acc=1.0)
    marks = tables.best(tables.pivot(frame_of(tmp_path)))
    assert marks.loc[("m", "gptq", "w4")].tolist() == [True, False]
    assert marks.loc[("m", "rtn", "w4")].tolist() == [False, True]
    assert not marks.loc[("m", "gptq", "w2")].any()


def test_ties_within_noise_share_the_bold(tmp_path):
    # the cells' standard errors are 0.1, so differences up to 0.1414 are noise
    for method, perplexity in {"rtn": 6.142, "gptq": 6.0, "loaq": 6.141}.items():
        make_cell(tmp_path, method, perplexity=perplexity, acc=0.5 + 0.01 * perplexity)
    marks = tables.best(tables.pivot(frame_of(tmp_path)))
    assert marks["t/perplexity"].to_dict() == {
        ("m", "gptq", "w4"): True,
        ("m", "loaq", "w4"): True,
        ("m", "rtn", "w4"): False,
    }
    assert marks["q/acc"].sum() == 1, "without a known error only equal values tie"


def test_variants_of_one_name_get_rows_that_say_what_differs(tmp_path):
    root = make_cell(tmp_path, perplexity=6.0).path.parent
    data = json.loads(next(root.glob("*/spec.json")).read_text())
    data["method"]["solver"]["options"]["label"] = "other"
    data["calibration"]["n_samples"] = 64
    other = store.create(build(RunSpec, data))
    source = json.loads(next(root.glob("*/result.json")).read_text())
    store.write_json(other.result_path, source | {"run_id": other.run_id})
    rows = tables.comparison(frame_of(tmp_path))
    assert sorted(rows.index.get_level_values("method")) == [
        "gptq solver.label=gptq calibration.n_samples=128",
        "gptq solver.label=other calibration.n_samples=64",
    ]


def test_rows_of_variants_are_never_merged(tmp_path):
    """Members of one name differ in options alone; a label that left those out would average them."""
    for number, options in enumerate([{"objective": "joint"}, {"objective": "activation"}, {}]):
        spec = golden_store.cell(
            "m", "coquant" if options else "gptq", "w4a4kv4", 0, execution={"runs_dir": str(tmp_path)}
        )
        data = store.to_dict(spec)
        data["method"]["name"] = "same"
        data["method"]["transform"]["options"] |= options
        folder = store.create(build(RunSpec, data))
        store.write_json(folder.result_path, golden_store.result(spec, folder, 4.0, 5.0 + number, 0.5))
    found = tables.pivot(frame_of(tmp_path))
    assert found.count["wikitext2/perplexity"].tolist() == [1, 1, 1]
    assert sorted(name for _, name, _ in found.mean.index) == [
        "same transform=none",
        "same transform=subspace objective=activation",
        "same transform=subspace objective=joint",
    ]


def with_evaluation(root, metric_changes=None, tasks=("arc_easy", "winogrande"), method="gptq", seq_len=2048):
    spec = golden_store.cell("m", method, "w3", 0, tasks, execution={"runs_dir": str(root)})
    data = store.to_dict(spec)
    data["evaluation"]["texts"]["wikitext2"]["seq_len"] = seq_len
    folder = store.create(build(RunSpec, data))
    result = golden_store.result(spec, folder, 3.0, 6.0, 0.5)
    for metric in result["metrics"].values():
        metric |= metric_changes or {}
    store.write_json(folder.result_path, result)
    return folder


def test_different_protocols_are_never_averaged_or_ranked_together(tmp_path):
    with_evaluation(tmp_path, seq_len=2048)
    with_evaluation(tmp_path, seq_len=1024, method="rtn")
    found = tables.pivot(frame_of(tmp_path))
    assert [name for name in found.mean if "perplexity" in name] == ["wikitext2/perplexity@1", "wikitext2/perplexity@2"]
    assert found.count[["wikitext2/perplexity@1", "wikitext2/perplexity@2"]].to_numpy().tolist() == [[1, 0], [0, 1]]
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "wikitext2/perplexity@2: wikitext2 test, windows of 1024" in text
    assert "not measured" in text


def test_average_over_tasks_takes_acc_norm_where_there_is_one(tmp_path):
    with_evaluation(tmp_path)
    frame = tables.task_average(frame_of(tmp_path))
    (average,) = frame[frame["metric"] == "average_2/acc"].to_dict("records")
    assert average["value"] == pytest.approx((0.48 + 0.45) / 2)
    errors = [math.sqrt(v * (1 - v) / 499) for v in (0.5, 0.45)]
    assert average["stderr"] == pytest.approx(math.hypot(*errors) / 2, rel=1e-2)


def test_average_refuses_different_task_sets_and_different_protocols(tmp_path):
    with_evaluation(tmp_path)
    with_evaluation(tmp_path, tasks=("arc_easy",), method="rtn")
    frame = frame_of(tmp_path)
    with pytest.raises(ConfigError, match="different task sets: arc_easy, winogrande; arc_easy"):
        tables.task_average(frame)
    assert "different task sets" in tables.markdown(tables.comparison_sheet(frame))
    chosen = tables.task_average(frame, ["arc_easy", "winogrande"])
    assert (chosen["metric"] == "average_2/acc").sum() == 1, "the cell that lacks a task gets no average"
    with_evaluation(tmp_path, {"n_shot": 5}, method="loaq")
    with pytest.raises(ConfigError, match="different protocols"):
        tables.task_average(frame_of(tmp_path), ["arc_easy", "winogrande"])


def test_nominal_bits_count_the_high_share_of_a_subspace():
    assert (
        tables.tidy([(store.folder_of(golden_store.cell("m", "coquant", "w4a4kv4", 0)), None)])["run_id"].notna().all()
    )
    from ptqbench.results.tables.tidy import nominal

    assert nominal(golden_store.cell("m", "coquant", "w4a4kv4", 0), 4) == 4.5
    assert nominal(golden_store.cell("m", "gptq", "w3", 0), 3) == 3
    assert nominal(golden_store.cell("m", "coquant", "w3", 0), 16) == 16


def test_standard_errors_follow_the_rows_of_the_comparison(tmp_path):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    make_cell(tmp_path, "gptq", "w2", perplexity=6.0)
    frame = frame_of(tmp_path)
    errors = tables.pivot(frame).error
    assert list(errors.index) == list(tables.comparison(frame).index)
    assert errors["t/perplexity"].tolist() == [0.1, 0.1]


def test_picture_is_written(tmp_path):
    from ptqbench.results.picture import draw

    make_cell(tmp_path, "rtn", perplexity=9.0)
    make_cell(tmp_path, "gptq", perplexity=6.0)
    draw(tables.pivot(frame_of(tmp_path)), str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "start"),
    {"t.md": "| model", "t.tex": r"% \usepackage{booktabs", "t.html": "<!doctype", "t.csv": "model,"}.items(),
)
def test_command_writes_the_format_of_the_suffix(name, start, tmp_path, monkeypatch, capsys):
    from ptqbench.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["table", "--runs-dir", str(golden_store.FOLDER), "--output", name]) == 0
    assert (tmp_path / name).read_text().startswith(start)
    assert capsys.readouterr().out == f"written: {name}\n"


def test_command_refuses_a_suffix_it_does_not_know(capsys):
    from ptqbench.cli import main

    assert main(["table", "--runs-dir", str(golden_store.FOLDER), "--output", "t.docx"]) == 2
    assert ".md, .tex, .html, .csv" in capsys.readouterr().err


def test_terminal_table_of_one_model_fits_80_columns(tmp_path, monkeypatch, capsys):
    from ptqbench.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    assert main(["table", "demo", "--runs-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("│" in line for line in lines) >= 15
    assert "[1] pending" in "\n".join(lines)


def test_tables_need_no_torch():
    code = "import sys, ptqbench.results.tables, ptqbench.results.reported; sys.exit('torch' in sys.modules)"
    import sys

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_perplexity_beyond_the_largest_is_infinite_and_never_bold(tmp_path):
    for seed, perplexity in enumerate((1e300, 5.0)):
        make_cell(tmp_path, "rtn", seed=seed, perplexity=perplexity)
        make_cell(tmp_path, "gptq", seed=seed, perplexity=9.0 + seed)
        make_cell(tmp_path, "loaq", seed=seed, perplexity=1e299 * (1 + 2 * seed))
    found = tables.pivot(frame_of(tmp_path))
    mean, spread = (frame["t/perplexity"].to_dict() for frame in (found.mean, found.spread))
    assert mean["m", "rtn", "w4"] == float("inf")
    assert np.isnan(spread["m", "rtn", "w4"])
    assert (mean["m", "loaq", "w4"], spread["m", "loaq", "w4"]) == pytest.approx((2e299, 2**0.5 * 1e299))
    assert spread["m", "gptq", "w4"] == pytest.approx(0.5**0.5)
    bold = tables.best(found)["t/perplexity"]
    assert [method for _, method, _ in bold[bold].index] == ["gptq"]
    text = tables.markdown(tables.comparison_sheet(frame_of(tmp_path)))
    assert "| m | rtn | w4 | 4 | 4.25 | 2 | inf |" in text
    assert "inf: a perplexity above 1e+300" in text
    from ptqbench.results.picture import draw

    draw(found, str(tmp_path / "x.png"))


@pytest.mark.parametrize("name", ["result.json", "spec.json", "failure.json"])
def test_a_file_that_cannot_be_read_is_said_and_hides_no_other_cell(tmp_path, name):
    make_cell(tmp_path, "rtn", perplexity=9.0)
    folder = make_cell(tmp_path)
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).mkdir()
    frame = frame_of(tmp_path)
    assert set(frame.loc[frame["run_id"] == folder.run_id, "state"]) == {"unreadable"}
    assert name in frame.set_index("run_id").at[folder.run_id, "reason"]
    assert 9.0 in frame["value"].tolist()


def test_a_reason_that_all_seeds_share_names_no_seeds(tmp_path):
    for seed in range(3):
        make_cell(tmp_path, seed=seed)
    assert tables.pivot(frame_of(tmp_path)).reasons == {("m", "gptq", "w4"): "pending"}
