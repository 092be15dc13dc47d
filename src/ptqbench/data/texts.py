"""Texts to calibrate on and to evaluate on. Imports neither torch nor transformers.

A text is a list of documents plus the way they are joined. *Separated* documents (such as stories) are tokenized one by one, and
each opens with the BOS token of the model if it has one. *Joined* documents (WikiText-2: by blank lines) are tokenized as one
string. Both conventions give one long row of tokens to cut windows from.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from ptqbench.cell.spec import TextSpec, nearest
from ptqbench.data import hub
from ptqbench.data.hub_texts import HUB_TEXTS, Document, HubText, rows
from ptqbench.errors import CalibrationError, ConfigError, DataNotHereError, unreadable

EMBEDDED_SPLITS = ("calibration", "evaluation")
DATASETS = ("tiny", "file", *HUB_TEXTS)
MAX_CHARACTERS = 1 << 25
"""Most characters that are tokenized in one piece. A tokenizer takes about 140 bytes of memory for each."""
JSON_LINES = 'read JSON lines by their column "text" with dataset=c4 and path=FILE'


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in order. ``join`` is the string that joins them before tokenization; None if each is tokenized alone."""

    documents: tuple[str, ...]
    join: str | None


def load_text(spec: TextSpec) -> Text:
    """Read a text and keep its portion.

    Args:
        spec: Data set, split or file, separator and portion. A portion counts documents, or the characters of a single document.
            A hub data set is read at the commit in ``digest``, or, without a digest, at the commit that the revision names now.

    Raises:
        ConfigError: Unknown data set or split; a missing, unreadable or too long file; other content than ``digest`` says.
        CalibrationError: An empty portion.
        DataNotHereError: A hub data set is neither cached nor reachable.
    """
    known = HUB_TEXTS.get(spec.dataset)
    text = Text(tuple(document for _, _, document in documents_of(spec)), known.join if known else None)
    lengths = [len(document) for document in text.documents]
    longest = max(lengths) if text.join is None else sum(lengths)
    if longest > MAX_CHARACTERS:
        raise ConfigError(
            f"{_name(spec)} has {longest} characters that are tokenized in one piece, expected at most {MAX_CHARACTERS}: "
            f"give a separator between its documents (dataset=file), or a smaller portion"
        )
    return text


def check_options(spec: TextSpec, where: str) -> None:
    """Refuse options that the data set of a text does not read.

    Args:
        spec: The text.
        where: ``calibration`` or ``evaluation.texts.LABEL``.

    Raises:
        ConfigError: One is given.
    """
    of_hub = spec.dataset in HUB_TEXTS
    reads = {"path": spec.dataset != "tiny", "separator": not of_hub, "revision": of_hub and spec.path is None}
    reads["split"] = spec.dataset != "file"
    for name, read in reads.items():
        value = getattr(spec, name)
        if value is not None and not read:
            section = where.partition(".")[0]
            advice = f"say {section}=file to read a file of your own" if name == "path" else f"leave {where}.{name} out"
            raise ConfigError(f"{where}.{name}={value!r} is not read by dataset {spec.dataset!r}: {advice}")


def check_text(spec: TextSpec) -> None:
    """Check that a text on this machine can be read and may fill a window; texts of the hub are not read.

    Raises:
        ConfigError: As ``load_text``.
        CalibrationError: As ``load_text``, or the text has fewer bytes than a window has tokens.
    """
    if spec.dataset in HUB_TEXTS and spec.path is None:
        return
    documents, window = load_text(spec).documents, getattr(spec, "seq_len", 0)
    if sum(map(len, documents)) >= window:
        return  # at least as many bytes, which need not be counted
    # A token stands for one byte or more. A document also has a BOS token and the blank that some tokenizers put before it.
    most = sum(len(document.encode()) + 2 for document in documents)
    if most < window:
        raise CalibrationError(
            f"{_name(spec)} has at most {most} tokens, expected at least one window of seq_len={window}: give a longer text, or a "
            f"smaller seq_len"
        )


def documents_of(spec: TextSpec) -> list[Document]:
    """Read the documents of a portion, with their places in the content.

    Raises:
        ConfigError, CalibrationError, DataNotHereError: As ``load_text``.
    """
    known = HUB_TEXTS.get(spec.dataset)
    path = _hub_file(spec, known) if known is not None and spec.path is None else _local_path(spec)
    content = _text_content(path)
    if not hub.is_identity(spec.digest) and spec.digest not in (None, _digest(content)):
        raise ConfigError(
            f"{_name(spec)} has changed since this cell was composed: expected the content {spec.digest}, found {_digest(content)}"
        )
    return _portion(_prose(path, content, spec.separator) if known is None else rows(path, content, known), spec)


def content_of(path: Path, what: str = "") -> bytes:
    """Read the bytes of a file that a user named.

    Raises:
        ConfigError, StorageError: It cannot be read; the message begins with ``what``.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(error, f"{what}{path} cannot be read") from error


def _text_content(path: Path) -> bytes:
    """The bytes of a text file, without the byte order mark that some editors put before UTF-8."""
    return content_of(path, "text file ").removeprefix(codecs.BOM_UTF8)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _name(spec: TextSpec) -> str:
    return f"text file {spec.path}" if spec.path is not None else f"dataset {spec.dataset!r}, split {spec.split}"


def _prose(path: Path, content: bytes, separator: str | None) -> list[Document]:
    """Split plain text into documents without the white space around them; without a separator it is one document."""
    for start, kind in ((b"\x1f\x8b", "gzip"), (b"PAR1", "Parquet")):
        if content.startswith(start):
            raise ConfigError(f"text file {path} is a {kind} file, expected plain UTF-8 text; {JSON_LINES}")
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"text file {path} is not UTF-8 ({error}): convert it, e.g. with iconv -f ENCODING -t UTF-8"
        ) from None
    if path.suffix in (".json", ".jsonl", ".ndjson") or _is_json(text.lstrip().partition("\n")[0]):
        raise ConfigError(f"text file {path} holds JSON, expected prose: write the texts out, or {JSON_LINES}")
    if not separator:
        return [(0, len(text), text)] if text.strip() else []
    # Remember where each document lies in the file, so that overlaps of texts can be found.
    found: list[tuple[int, int, str]] = []
    begin = 0
    for piece in text.split(separator):
        document = piece.strip()
        if document:
            first = begin + piece.index(document[0])
            found.append((first, first + len(document), document))
        begin += len(piece) + len(separator)
    return found


def _is_json(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def text_digest(spec: TextSpec, commit_of: Callable[[str, str], str] = hub.commit_of) -> str:
    """Identify the content of a text: the hash of a file, or a commit of the hub.

    Args:
        spec: The text.
        commit_of: Maps a repository and a revision to a commit.

    Raises:
        ConfigError: As ``load_text``.
        DataNotHereError: The revision is a branch or tag, and neither the hub nor the hub cache knows its commit.
    """
    if spec.dataset in HUB_TEXTS and spec.path is None:
        known = HUB_TEXTS[spec.dataset]
        try:
            return hub.digest(known.repository, commit_of(known.repository, spec.revision or known.revision))
        except DataNotHereError as error:
            raise _not_here(spec, error) from None
    return _digest(_text_content(_local_path(spec)))


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


def _portion(found: list[Document], spec: TextSpec) -> list[Document]:
    start, stop = spec.portion
    if len(found) == 1:
        ((first, _, whole),) = found
        begin, end = round(start * len(whole)), round(stop * len(whole))
        kept = [(first + begin, first + end, whole[begin:end])]
    else:
        kept = found[round(start * len(found)) : round(stop * len(found))]
    if not any(document for _, _, document in kept):
        raise CalibrationError(f"portion {list(spec.portion)} of {_name(spec)} is empty")
    return kept


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
