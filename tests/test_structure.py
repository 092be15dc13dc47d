"""The shape of the repository: import direction, one importer per heavy library, sizes, configuration files."""

import ast
import statistics
import tomllib
from pathlib import Path

import pytest
import yaml

from ptqbench.cell.folders import conf_folder, sweep_folder

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ptqbench"
MODULES = sorted(SOURCE.rglob("*.py"))

# Bottom to top. A room imports from the lines above its own; rooms of one line do not import each other.
ORDER = """
    __init__ errors
    cell
    numerics
    models data runs
    methods evaluate
    engine
    sweeps
    results
    tracking
    run doctor
    foreground
    launch
    hydra_app
    cli
    __main__
"""
RANK = {room: rank for rank, line in enumerate(ORDER.strip().splitlines()) for room in line.split()}
ONLY_IMPORTER = {
    "lm_eval": ("evaluate/definitions.py", "evaluate/zero_shot.py"),
    "hydra": ("sweeps/hydra_compose.py", "hydra_app.py"),
    "wandb": "tracking",
    "submitit": "launch",
    "triton": "numerics/column_kernel.py",
}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def names(module):
    """Dotted name of a module, without the package."""
    return ".".join(module.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


OURS = {names(path): path for path in MODULES}


def our_imports(path):
    """Modules of the package that a module imports anywhere: on top, in functions, and for annotations."""
    found = {name.removeprefix("ptqbench.") for name in imports(path) if name.startswith("ptqbench.")}
    return {name for name in found if name in OURS} - {names(path)}


def test_every_room_is_in_the_order():
    assert {room(path) for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_down(path):
    for name in our_imports(path):
        other = room(OURS[name])
        assert other == room(path) or RANK[other] < RANK[room(path)], f"{names(path)} must not import {name}"


def test_no_circle():
    """Neither a package's own name nor what only annotations need is an excuse."""
    left = {names(path): our_imports(path) for path in MODULES}
    for package in [name for name, path in OURS.items() if path.name == "__init__.py"]:
        for name in left:  # `from package import module` is an import of the module, not of the package's own file
            if name.startswith(f"{package}."):
                left[name] -= {package}
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_one_importer_per_heavy_library(path):
    here = path.relative_to(SOURCE).as_posix()
    for name in imports(path):
        allowed = ONLY_IMPORTER.get(name.split(".")[0])
        assert allowed is None or here.startswith(allowed), f"{here} imports {name}"


def test_numerics_is_pure():
    for path in (SOURCE / "numerics").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("ptqbench")}
        assert all(name.startswith(("ptqbench.errors", "ptqbench.numerics")) for name in ours), path.name
        foreign = {name.split(".")[0] for name in imports(path)} & {
            "logging",
            "yaml",
            "json",
            "os",
            "pathlib",
            "transformers",
            "pandas",
        }
        assert not foreign, f"{path.name} imports {foreign}"


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_sizes():
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 400
    assert statistics.median(lengths.values()) <= 150
    sizes = [size for path in MODULES for _, size in functions(path)]
    assert max(sizes) <= 120
    assert statistics.median(sizes) <= 15


def test_version_is_one():
    from ptqbench import __version__

    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_every_yaml_file_parses():
    files = [*conf_folder().rglob("*.yaml"), *sweep_folder().rglob("*.yaml")]
    assert len(files) > 40
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_repository_names_no_machine_path():
    bad = ("/" + "work/", "/" + "root/", "/" + "opt/")
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".yaml", ".md", ".toml", ".txt", ".cff"} and not {
            ".venv",
            ".git",
            "demo",
            "runs",
        } & set(path.parts):
            assert not any(word in path.read_text(errors="replace") for word in bad), path
