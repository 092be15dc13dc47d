"""The notebooks as a reader sees them: executed in Jupyter's kernel on finished cells, on cells without fidelity, and on none."""

import ast
import base64
import io
import json
import re
import shutil
from pathlib import Path

import fidelity_cells
import matplotlib.image
import pytest

import golden_store
import notebooks
from ptqbench.results import analysis

FOLDER = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
FIDELITY = "06_fidelity"
N_PICTURES = {"01_paper_tables": 0, "02_why": 1, "03_pareto": 2, "04_significance": 1, "05_composition": 3, FIDELITY: 3}


def code_cells(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_carry_no_output_and_no_logic(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    logic = ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.If | ast.Try | ast.ListComp | ast.Lambda
    for source in code_cells(path):
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Notebooks with outputs and the error that ended them, by what lies beside them: cells, cells with fidelity, nothing."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("cells", "fidelity", "nothing"):
        shutil.copytree(FOLDER, root / name / "analysis", ignore=shutil.ignore_patterns("figures"))
    golden_store.write(root / "cells" / "runs")
    golden_store.write_reports(root / "cells" / "runs")
    for method in fidelity_cells.LEVELS:  # where the demo leaves its cells
        fidelity_cells.fidelity_cell(root / "fidelity" / "demo" / "runs", method)
    wanted = [("cells", name) for name in NAMES] + [("fidelity", FIDELITY)] + [("nothing", name) for name in NAMES]
    paths = [root / beside / "analysis" / f"{name}.ipynb" for beside, name in wanted]
    done = notebooks.execute(paths, PTQBENCH_BITWIDTH="w3", PTQBENCH_RUNS="", PTQBENCH_FIGURES="")
    return root, dict(zip(wanted, done, strict=True))


def outputs(notebook):
    return [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_show_their_figures(executed, name):
    root, pages = executed
    beside = "fidelity" if name == FIDELITY else "cells"
    notebook, error = pages[beside, name]
    assert not error
    ending = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.endswith("\nfigure")]
    assert len(ending) == N_PICTURES[name]
    for cell in ending:
        shown = cell.outputs[-1]
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(shown.data["image/png"])))
        # Drawn sharper than the page shows it, and not blank.
        assert picture.shape[1] == 2 * shown.metadata["image/png"]["width"] > 1000
        assert picture[..., :3].std() > 0.05
    names = re.findall(r'drawing.save\(figure, "(\w+)"\)', "".join(code_cells(FOLDER / f"{name}.ipynb")))
    assert len(names) == len(ending)
    for saved in (root / beside / "analysis" / "figures" / one for one in names):
        assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert saved.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_say_what_they_read_and_show_tables(executed, name):
    root, pages = executed
    beside, where = ("fidelity", "../demo/runs") if name == FIDELITY else ("cells", "../runs")
    first, *rest = outputs(pages[beside, name][0])
    n = len(list((root / beside / "analysis" / where).glob("*/result.json")))
    assert first.text == f"{n} finished cells in {where}\n"
    for one in rest:
        html = one.get("data", {}).get("text/html", "")
        empty = "<tbody></tbody>" in "".join(html.split())
        assert not empty or "no printed figure belongs to these cells" in html, "an empty table answers nothing"
        assert one.get("name") != "stderr", one.text


@pytest.mark.parametrize(("beside", "name"), [("nothing", name) for name in NAMES] + [("cells", FIDELITY)])
def test_missing_cells_are_one_line_that_says_how_to_make_some(executed, beside, name):
    notebook, error = executed[1][beside, name]
    expected = {
        "nothing": 'ConfigError: no finished cell in ../runs or ../demo/runs: run "make demo" in the repository, '
        "or set PTQBENCH_RUNS=FOLDER",
        "cells": 'ConfigError: no cell was compared with its unquantized model; "python -m ptqbench sweep SWEEP '
        'evaluation.fidelity=true" measures it',
    }[beside]
    assert error == expected
    (shown,) = [one for one in outputs(notebook) if one.output_type == "error"]
    assert shown.traceback == [expected]


def test_the_widths_of_the_divergence_are_those_of_the_record(tmp_path):
    folder = fidelity_cells.fidelity_cell(tmp_path, "gptq")
    record = json.loads((folder.path / "result.json").read_text())["metrics"]["wikitext2/kl"]
    found = analysis.divergence(analysis.cells(tmp_path), "wikitext2/kl").iloc[0]
    assert found.to_dict() == {"mean": record["value"], **{name: record[name] for name in found.index[1:]}}
