"""The shape of the repository: import direction, one importer per heavy library, sizes, configuration files."""

import ast
import statistics
import tomllib
from pathlib import Path

import pytest
import yaml

from ptqbench.confdir import conf_folder, sweep_folder

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ptqbench"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module may import modules of lower or equal rank.
RANK = {
    "errors": 0,
    "liveness": 1, "failures": 1,
    "spec": 1, "fingerprint": 2, "confdir": 2, "registry": 3, "store": 3,
    "artefacts": 3, "doctor": 3, "prefetch": 5, "lease": 4, "cells": 4, "squeue": 4, "cost": 4, "resources": 4, "plan": 5,
    "timings": 1,
    "numerics": 1, "models": 2, "data": 2, "methods": 3,
    "stats": 1, "provenance": 1, "resolve": 4, "sweep": 4, "state": 4, "attempt": 4, "evaluate": 4,
    "collect": 5, "rounding": 5, "bases": 5, "network_loss": 5, "rotation_files": 5, "rotations": 5, "pipeline": 6,
    "tables": 4, "picture": 4, "reported": 5, "analysis": 5, "show": 6, "report_page": 6,
    "compositions": 4, "gather": 9, "tracking": 6, "run": 7, "foreground": 8, "launch": 8, "compose": 9,
    "cli": 10, "__main__": 11, "__init__": 0,
}  # fmt: skip
ONLY_IMPORTER = {
    "lm_eval": "evaluate/zero_shot.py",
    "hydra": "compose.py",
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


def part(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_import_direction(path):
    for name in imports(path):
        pieces = name.split(".")
        if (
            pieces[0] == "ptqbench"
            and len(pieces) > 1
            and (SOURCE / pieces[1]).with_suffix(".py").exists() | (SOURCE / pieces[1]).is_dir()
        ):
            assert RANK[pieces[1]] <= RANK[part(path)], f"{part(path)} must not import {name}"


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
