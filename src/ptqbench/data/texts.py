"""Texts to calibrate on and to evaluate on. Imports neither torch nor transformers.

A text is a list of documents plus the way they are joined. Where documents are *separated* (stories, say), each is
tokenized by itself and opens with the model's BOS token if it has one; where they are *joined* (WikiText-2: by blank lines),
the joined string is tokenized once. Both conventions give one long row of tokens to cut windows from.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from ptqbench.cell.spec import TextSpec, nearest
from ptqbench.data import hub
from ptqbench.errors import CalibrationError, ConfigError, DataNotHereError

EMBEDDED_SPLITS = ("calibration", "evaluation")


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
    # A script data set, of which only the hub's own conversion to Parquet can still be loaded. Its reference can move and no
    # commit of it is known here, so that a cell pins the one that it finds.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "refs/convert/parquet",
        "sentence",
        "\n\n",
        _parquet("penn_treebank/{}/0000.parquet"),
    ),
}
DATASETS = ("tiny", "file", *HUB_TEXTS)


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in order; ``join`` is the string that joins them before tokenization, None if each stands alone."""

    documents: tuple[str, ...]
    join: str | None


def load_text(spec: TextSpec) -> Text:
    """Read a text and keep its portion.

    Args:
        spec: Data set, split or file, separator and portion. A portion counts documents where there are several,
            characters of the single document otherwise. A hub data set is read at the commit in ``digest``; if there is no
            digest yet, at the commit that the revision names now.

    Raises:
        ConfigError: Unknown data set or split, a missing or unreadable file, an empty portion.
        DataNotHereError: A hub data set is neither cached nor reachable.
    """
    if spec.dataset in HUB_TEXTS:
        known = HUB_TEXTS[spec.dataset]
        path = _hub_file(spec, known) if spec.path is None else _local_path(spec)
        text = Text(_rows(path, known), known.join)
    else:
        path = _local_path(spec)
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"text file {path} is not UTF-8: {error}") from None
        pieces = [piece.strip() for piece in content.split(spec.separator)] if spec.separator else [content]
        text = Text(tuple(piece for piece in pieces if piece), None)
    return _portion(text, spec)


def text_digest(spec: TextSpec, commit_of: Callable[[str, str], str] = hub.commit_of) -> str:
    """Identify the content of a text without loading it into windows: a file hash, or a commit of the hub.

    Args:
        spec: The text.
        commit_of: Says which commit a revision of a repository names.

    Raises:
        ConfigError: As ``load_text``.
        DataNotHereError: The revision is a branch or tag, and neither the hub nor the hub cache says which commit it is.
    """
    if spec.dataset in HUB_TEXTS and spec.path is None:
        known = HUB_TEXTS[spec.dataset]
        try:
            return hub.digest(known.repository, commit_of(known.repository, spec.revision or known.revision))
        except DataNotHereError as error:
            raise _not_here(spec, error) from None
    return "sha256:" + hashlib.sha256(_local_path(spec).read_bytes()).hexdigest()


def check_disjoint(calibration: TextSpec, evaluation: TextSpec, label: str) -> None:
    """Refuse to evaluate on text that calibration may have seen.

    Raises:
        ConfigError: Same content, same split and overlapping portions.
    """
    same = (calibration.digest, calibration.split) == (evaluation.digest, evaluation.split)
    start, stop = max(calibration.portion[0], evaluation.portion[0]), min(calibration.portion[1], evaluation.portion[1])
    if same and start < stop:
        raise ConfigError(
            f"evaluation.texts.{label} overlaps the calibration text (portions {list(calibration.portion)} and "
            f"{list(evaluation.portion)} of the same content); give disjoint portions, e.g. calibration.portion=[0,0.8] "
            f"evaluation.texts.{label}.portion=[0.8,1]"
        )


def embedded_folder() -> Path:
    """The folder of the texts that ship with the package."""
    return Path(str(resources.files("ptqbench"))) / "data" / "embedded"


def _local_path(spec: TextSpec) -> Path:
    if spec.dataset == "tiny":
        if spec.split not in EMBEDDED_SPLITS:
            raise ConfigError(
                f"dataset 'tiny' has no split {spec.split!r}; {nearest(str(spec.split), EMBEDDED_SPLITS)}"
            )
        return embedded_folder() / f"{spec.split}.txt"
    if spec.dataset not in ("file", *HUB_TEXTS):
        raise ConfigError(f"unknown dataset {spec.dataset!r}; {nearest(spec.dataset, DATASETS)}")
    if spec.path is None:
        raise ConfigError("dataset 'file' needs a path: give calibration.path=FILE and evaluation.texts.file.path=FILE")
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise ConfigError(f"text file {spec.path!r} does not exist (looked in {Path.cwd()})")
    return path


def _portion(text: Text, spec: TextSpec) -> Text:
    start, stop = spec.portion
    if len(text.documents) == 1:
        whole = text.documents[0]
        kept: tuple[str, ...] = (whole[round(start * len(whole)) : round(stop * len(whole))],)
    else:
        kept = text.documents[round(start * len(text.documents)) : round(stop * len(text.documents))]
    if not any(kept):
        raise CalibrationError(f"portion {list(spec.portion)} of dataset {spec.dataset!r} is empty")
    return Text(kept, text.join)


def _hub_file(spec: TextSpec, known: HubText) -> Path:
    if spec.split not in known.files:
        raise ConfigError(
            f"dataset {spec.dataset!r} has no split {spec.split!r}; {nearest(str(spec.split), known.files)}"
        )
    try:
        commit = hub.pinned_commit(spec.digest) or hub.commit_of(known.repository, spec.revision or known.revision)
        return hub.file_at(known.repository, commit, known.files[spec.split])
    except DataNotHereError as error:
        raise _not_here(spec, error) from None


def _not_here(spec: TextSpec, error: DataNotHereError) -> DataNotHereError:
    return DataNotHereError(
        f"dataset {spec.dataset!r}, split {spec.split}: {error}, or use calibration=file / evaluation=file with local text, or "
        f"give path=FILE with the same rows",
        error.repository,
    )


def _rows(path: Path, known: HubText) -> tuple[str, ...]:
    """Read rows from a file: Parquet, JSON lines with the column of the hub (``.gz`` or not), or one row per line."""
    if path.suffix == ".parquet":
        return _parquet_rows(path, known)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            lines = list(stream)
        if {".json", ".jsonl"} & set(path.suffixes):
            return tuple(json.loads(line)[known.column] for line in lines if line.strip())
    except (UnicodeDecodeError, gzip.BadGzipFile, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected UTF-8 rows of {known.repository} (JSON lines with {known.column!r}, or lines of text): {error!r}"
        ) from None
    return tuple((line if line.strip() else "") if known.keep_newline else line.strip() for line in lines)


def _parquet_rows(path: Path, known: HubText) -> tuple[str, ...]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as stream:
            return tuple(parquet.ParquetFile(stream).read(columns=[known.column])[known.column].to_pylist())
    except (pyarrow.ArrowInvalid, KeyError) as error:
        raise ConfigError(
            f"{path}: expected Parquet rows of {known.repository} with {known.column!r}: {error!r}"
        ) from None
