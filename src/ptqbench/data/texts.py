"""Texts to calibrate on and to evaluate on. Imports neither torch nor transformers.

A text is a list of documents plus the way they are joined. Where documents are *separated* (stories, say), each is
tokenized by itself and opens with the model's BOS token if it has one; where they are *joined* (WikiText-2: by blank lines),
the joined string is tokenized once. Both conventions give one long row of tokens to cut windows from.
"""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources
from pathlib import Path

from ptqbench.errors import CalibrationError, ConfigError
from ptqbench.spec import TextSpec, nearest

EMBEDDED_SPLITS = ("calibration", "evaluation")


@dataclasses.dataclass(frozen=True)
class HubText:
    """A hub data set: repository, configuration, pinned revision, text column and how papers join its rows."""

    repository: str
    configuration: str | None
    column: str
    join: str | None
    files: dict[str, str] | None = None


HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n"),
    "c4": HubText(
        "allenai/c4",
        None,
        "text",
        None,
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
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
            characters of the single document otherwise.

    Raises:
        ConfigError: Unknown data set or split, a missing or unreadable file, an empty portion, a hub data set that is
            neither cached nor reachable.
    """
    if spec.dataset in HUB_TEXTS:
        text = _hub_text(spec)
    else:
        path = _local_path(spec)
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"text file {path} is not UTF-8: {error}") from None
        pieces = [piece.strip() for piece in content.split(spec.separator)] if spec.separator else [content]
        text = Text(tuple(piece for piece in pieces if piece), None)
    return _portion(text, spec)


def text_digest(spec: TextSpec) -> str:
    """Identify the content of a text without loading it into windows: a file hash, or a pinned hub revision."""
    if spec.dataset in HUB_TEXTS:
        return f"hub:{HUB_TEXTS[spec.dataset].repository}@{spec.revision or 'main'}"
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
    if spec.dataset != "file":
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


def _hub_text(spec: TextSpec) -> Text:
    import datasets

    hub = HUB_TEXTS[spec.dataset]
    files = None
    if hub.files is not None:
        if spec.split not in hub.files:
            raise ConfigError(
                f"dataset {spec.dataset!r} has no split {spec.split!r}; {nearest(str(spec.split), hub.files)}"
            )
        files = {str(spec.split): hub.files[spec.split]}
    try:
        rows = datasets.load_dataset(
            hub.repository, hub.configuration, data_files=files, split=spec.split, revision=spec.revision
        )
    except Exception as error:  # the library raises many types for one fact: it cannot get the data
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"dataset {spec.dataset!r} ({hub.repository}, split {spec.split}) is neither cached nor reachable: {reason}; "
            f"load it once where there is network, or use calibration=file / evaluation=file with local text"
        ) from None
    return Text(tuple(rows[hub.column]), hub.join)
