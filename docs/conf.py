"""Configuration of the documentation site (``make docs``).

The help of commands and the lists of modules come from the code. Notebooks are executed on the runs of the demo, if it was made.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ptqbench"
sys.path.insert(0, str(ROOT / "scripts"))
MARK = re.compile(r"^\{\{ (help|modules) ?([a-z]*) \}\}$", re.MULTILINE)

COMMIT = re.compile(r"\b([\w-]+/[\w.-]+)@([0-9a-f]{7,40})\b")

project, author = "ptqbench", "The ptqbench authors"
copyright = "The ptqbench authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "ptqbench"
html_static_path = html_css_files = ["notebooks.css"]
html_theme_options = {
    "source_repository": "https://github.com/ptqbench/ptqbench/",
    "source_branch": "main",
    "source_directory": "docs/",
}
myst_heading_anchors = 3
nb_execution_mode = "off"  # the pages are executed below, all in one kernel
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True


def setup(app: Any) -> None:
    """Connect the functions below; called by Sphinx."""
    app.connect("builder-inited", execute_notebooks)
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", link_sources)


def execute_notebooks(app: Any) -> None:
    """Write the pages ``notebooks/*.ipynb``: those of ``analysis/``, executed as far as there are runs."""
    import nbformat

    import notebooks

    # Named from the folder of the notebooks, because the pages repeat it.
    runs = os.path.relpath(os.environ.get("PTQBENCH_DOCS_RUNS", ROOT / "demo" / "runs"), ROOT / "analysis")
    pages = Path(app.srcdir) / "notebooks"
    pages.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as figures:
        paths = sorted((ROOT / "analysis").glob("*.ipynb"))
        done = notebooks.execute(paths, PTQBENCH_RUNS=runs, PTQBENCH_FIGURES=figures)
        for path, (page, error) in zip(paths, done, strict=True):
            kind, _, reason = error.partition(": ")
            if kind not in ("", "ConfigError"):
                raise RuntimeError(f"{path}: {error}")
            for place, cell in enumerate(page.cells):
                if any(output.output_type == "error" for output in cell.get("outputs", [])):
                    cell.outputs = []
                    note = f"```{{note}}\nNot executed from here on: {reason}.\n```"
                    page.cells.insert(place, nbformat.v4.new_markdown_cell(note))
                    break
            nbformat.write(page, pages / path.name)


def link_sources(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn ``organisation/repository@commit`` into a link; docutils would take it for an e-mail address."""
    lines[:] = [COMMIT.sub(r"`\g<0> <https://github.com/\1/tree/\2>`__", line) for line in lines]


def fill_in(app: Any, page: str, source: list[str]) -> None:
    """Replace ``{{ help COMMAND }}`` by what the command prints and ``{{ modules ROOM }}`` by the docstrings of a room."""
    source[0] = MARK.sub(lambda mark: (command_help if mark[1] == "help" else modules)(mark[2]), source[0])


def command_help(command: str) -> str:
    """What ``python -m ptqbench COMMAND --help`` prints, as a block."""
    words = [sys.executable, "-m", "ptqbench", *([command] if command else []), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "90"})
    return f"```text\n{done.stdout.strip()}\n```"


def modules(room: str) -> str:
    """Every module of a room with its public members."""
    names = sorted(path.stem for path in (SOURCE / room).glob("*.py") if path.stem not in ("__init__", "column_kernel"))
    blocks = [
        f"## {name}\n\n```{{eval-rst}}\n.. automodule:: ptqbench.{room}.{name}\n   :members:\n```" for name in names
    ]
    return "\n\n".join(blocks)
