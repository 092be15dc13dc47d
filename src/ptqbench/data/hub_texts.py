"""Texts of the hub: their files, how papers join their rows, and how rows are read. Imports neither torch nor datasets."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptqbench.errors import ConfigError

Document = tuple[int, int, str]
"""Start and stop of a document in the content, in characters (in rows of a Parquet file), and the document."""


@dataclasses.dataclass(frozen=True)
class HubText:
    """A hub data set: repository, revision, text column, how papers join its rows, and the file of each split.

    ``keep_newline`` says how a line of a plain text file becomes a row: WikiText rows end with their newline.
    """

    repository: str
    revision: str
    column: str
    join: str | None
    files: dict[str, str]
    keep_newline: bool = False


def _parquet(pattern: str) -> dict[str, str]:
    return {split: pattern.format(split) for split in ("train", "validation", "test")}


HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "text",
        "\n\n",
        _parquet("wikitext-2-raw-v1/{}-00000-of-00001.parquet"),
        keep_newline=True,
    ),
    "c4": HubText(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "text",
        None,
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    # This data set is a script; only the hub's own conversion to Parquet can still be loaded. The reference to it can move and
    # no commit is known here, so a cell pins the commit that it finds.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "refs/convert/parquet",
        "sentence",
        "\n\n",
        _parquet("penn_treebank/{}/0000.parquet"),
    ),
}


def rows(path: Path, content: bytes, known: HubText) -> list[Document]:
    """Read rows: Parquet, JSON lines with the column of the hub (``.gz`` or not), or one row per line.

    Args:
        path: The file; its name gives the format.
        content: Its bytes.
        known: The data set that the rows belong to.

    Raises:
        ConfigError: The content has another format than the name says, or a row is not text.
    """
    try:
        if path.suffix == ".parquet":
            column = parquet_column(content, known.column)
            found = [(number, number + 1, row) for number, row in enumerate(column)]
        else:
            found = list(_lines(path, content, known))
    except (EOFError, OSError, zlib.error, KeyError, TypeError, ValueError, RecursionError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "UTF-8"
        raise ConfigError(
            f"{path}: expected {kind} rows of {known.repository} (JSON lines or Parquet with {known.column!r}, or lines of "
            f"text): {error!r}"
        ) from None
    number = next((number for number, (_, _, row) in enumerate(found, 1) if not isinstance(row, str)), None)
    if number is not None:
        raise ConfigError(f"{path}, row {number}: expected text in {known.column!r}, got {found[number - 1][2]!r:.60}")
    return found


def _lines(path: Path, content: bytes, known: HubText) -> Iterator[Document]:
    raw = io.BytesIO(content)
    stream = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, encoding="utf-8-sig")
    is_json, stop = bool({".json", ".jsonl"} & set(path.suffixes)), 0
    for line in stream:
        start, stop = stop, stop + len(line)
        if not is_json:
            row = (line if line.strip() else "") if known.keep_newline else line.strip()
        elif line.strip():
            row = json.loads(line)[known.column]
        else:
            continue
        yield start, stop, row


def parquet_column(content: bytes, column: str) -> list[Any]:
    """Read one column of a Parquet file.

    Raises:
        ValueError: It is no Parquet file.
        KeyError: It has no such column.
    """
    import pyarrow
    from pyarrow import parquet

    with pyarrow.BufferReader(content) as stream:
        found: list[Any] = parquet.ParquetFile(stream).read(columns=[column])[column].to_pylist()
    return found
