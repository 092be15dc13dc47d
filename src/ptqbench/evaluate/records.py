"""The records of a finished evaluation: one Parquet file (zstd) per text and per task, written and read here.

    records/windows/<label>.parquet    one row per window of a text: summed loss, digest of its tokens
    records/examples/<task>.parquet    one row per example (and filter): scores, log-likelihoods of the choices, digest of prompts

A file is written under a temporary name and renamed, and its metadata hold the run id and the figures of the result. So if it
exists, the text or task is finished and is not measured again. Log-likelihoods are those that lm-eval returns, summed over the
tokens of a choice. Imports neither torch nor lm_eval.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from ptqbench.errors import ConfigError
from ptqbench.runs.folder import RunFolder, replacing

KEY = b"ptqbench"
DIGEST_LENGTH = 16
LARGEST = 1e300
"""Reported in place of any larger perplexity (a mean loss above 690.8 nats), since floats end at 1.8e308."""


def write_records(path: Path, rows: list[dict[str, Any]], run_id: str, summary: dict[str, Any]) -> None:
    """Write the records of one text or task atomically.

    Args:
        path: The file.
        rows: One dictionary per row, all with the same keys.
        run_id: The cell.
        summary: JSON-able figures that the result is made of.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    metadata = {KEY: json.dumps({"run_id": run_id, "summary": summary}, allow_nan=False).encode()}
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def read_summary(path: Path, run_id: str) -> dict[str, Any] | None:
    """Read the figures of a finished text or task; None where no complete file exists.

    Raises:
        ConfigError: The file belongs to another cell.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        stored: dict[str, Any] = json.loads(metadata[KEY])
        summary: dict[str, Any] = stored["summary"]
    except (OSError, pyarrow.ArrowException, KeyError, ValueError):
        return None
    if stored.get("run_id") != run_id:
        raise ConfigError(f"{path} belongs to cell {stored.get('run_id')}, not {run_id}; remove it to start anew")
    return summary


def read_records(path: Path, run_id: str) -> list[dict[str, Any]]:
    """Read the rows of a file of this cell; an empty list where it is not complete or belongs to another cell."""
    import pyarrow.parquet

    try:
        return list(_rows(path)) if read_summary(path, run_id) is not None else []
    except (ConfigError, OSError, pyarrow.ArrowException):
        return []


def window_scores(folder: RunFolder, label: str, column: str = "nll") -> tuple[dict[Hashable, float], int]:
    """Read a column of a text, such as its losses in nats, and the predicted tokens per window.

    Returns:
        (number of the window, digest of its tokens) -> value; and the tokens.

    Raises:
        ConfigError: The cell has no record of the text, or the record no such column.
    """
    path = folder.windows_path(label)
    rows = list(_rows(path))
    if column not in rows[0]:
        raise ConfigError(f"{path}: no column {column!r}; there are {', '.join(rows[0])}")
    return {(row["window"], row["digest"]): row[column] for row in rows}, int(rows[0]["n_tokens"])


def example_scores(folder: RunFolder, metric: str, column: str = "") -> dict[Hashable, float]:
    """Read the scores behind ``task/metric``: (task, number of the example, digest of its prompts) -> score.

    Args:
        folder: The cell.
        metric: The metric.
        column: Column that holds the scores, where it is not called like the metric.

    Raises:
        ConfigError: The cell has no record of the task, or the task no such metric.
    """
    name = column or metric.rpartition("/")[2].partition(":")[0]
    return {
        (row["task"], row["example"], row["digest"]): float(row[name]) for row in example_rows(folder, metric, name)
    }


def example_rows(folder: RunFolder, metric: str, name: str) -> list[dict[str, Any]]:
    """Read the rows behind ``task/metric``, which have a column ``name``; errors are those of ``example_scores``."""
    task, _, word = metric.rpartition("/")
    chosen = word.partition(":")[2] or "none"
    found: list[dict[str, Any]] = []
    # A group has one file per task, each with the group's name as its request.
    for path in sorted((folder.records_path / "examples").glob("*.parquet")):
        summary = read_summary(path, folder.run_id) or {}
        if task not in (summary.get("task"), summary.get("request")):
            continue
        for row in _rows(path):
            if name not in row:
                raise ConfigError(f"{folder.path}: no metric {name!r} in the records of task {task!r}")
            if row["filter"] == chosen:
                found.append(row)
    if not found:
        raise ConfigError(f"{folder.path}: no record of {metric!r}")
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    if not path.is_file():
        raise ConfigError(f"{path} does not exist: the cell has no such record; run it (again) with this evaluation")
    yield from pyarrow.parquet.read_table(path).to_pylist()
