"""Where a checkpoint lies and what it contains, without loading it. Imports neither torch nor transformers.

A checkpoint is a folder in Hugging Face form: ``config.json``, safetensors (one file or an index of shards) and a tokenizer.
It is embedded in this package, a local folder, or a hub repository. Its digest identifies the content: the commit for a hub
repository, a SHA-256 over the files that matter for a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ptqbench.cell.folders import cache_folder
from ptqbench.cell.spec import ModelSpec
from ptqbench.errors import ConfigError, NotHereError, UnsupportedError, first_line, unreadable
from ptqbench.models.architecture import Architecture, from_config
from ptqbench.models.checkpoint import (
    HEAD,
    INDEX,
    MERGE,
    Stored,
    auto_dtype,
    check_tensors,
    check_tokenizer,
    ignored,
    read_headers,
    read_json,
    weight_files,
)
from ptqbench.models.config import check_config
from ptqbench.models.family import TEXT_PARTS, text_name, text_part

T = TypeVar("T")

EMBEDDED = ("tiny",)
SHOWN = 4
"""How many patterns of tensors a remark names."""
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
OTHER_COPIES = ["consolidated*.safetensors"]
"""Weights in the form of Mistral's own code, beside the same weights for transformers, which does not load them."""
CONFIG_PATTERNS = ["*.json", "tokenizer*", "*.model", "merges.txt", "vocab*"]
HASHED = (
    "config.json",
    INDEX,
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.model",
)
"""Beside the weights, the files that change what the model computes or which tokens a text becomes."""
GENERATION = "generation_config.json"
ALWAYS_HASHED_BYTES = 1 << 26
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A checkpoint folder. Its content is read on first use, and only once."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``; of a model of images and texts the part about texts."""
        return self._named(lambda: text_part(self._whole_config))

    @cached_property
    def _whole_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if (self.folder / "adapter_config.json").is_file():
            raise UnsupportedError(
                f"model folder {self.folder} holds an adapter (adapter_config.json), not a model alone; {MERGE}"
            )
        if not path.is_file():
            raise ConfigError(f"model folder {self.folder} has no config.json; expected a Hugging Face checkpoint")
        return read_json(path)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that transformers would load, sorted by name."""
        return self._named(lambda: weight_files(self.folder))

    @property
    def has_weights(self) -> bool:
        """Whether all weight files are on this machine; of a hub repository there may be the configuration alone."""
        try:
            return bool(self.weight_files)
        except ConfigError:
            return False

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Name of every stored tensor -> its type, shape and file. Of a model of images and texts, those of the text part."""
        if not self.has_images:
            return self._stored
        named = ((text_name(name), tensor) for name, tensor in self._stored.items())
        return {name: tensor for name, tensor in named if name is not None}

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        return read_headers(self.weight_files)

    @property
    def has_images(self) -> bool:
        """Whether this is a model of images and texts, of which only the text part is run."""
        return self._whole_config.get("model_type") in tuple(TEXT_PARTS)

    @cached_property
    def architecture(self) -> Architecture:
        """The dimensions. A stored output projection is used, even if the configuration ties it to the embedding."""
        shape = from_config(self.config)
        return dataclasses.replace(shape, tied_embeddings=shape.tied_embeddings and HEAD not in self.tensors)

    @cached_property
    def remarks(self) -> list[str]:
        """The parts of the checkpoint and its configuration that have no effect, as in transformers; for the record of a cell."""
        remarks = []
        if self.has_images:
            remarks.append("this is a model of images and texts, of which only the text part is run")
        unused = ignored(self.tensors, self.architecture.tensor_shapes())
        if unused:
            more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
            remarks.append(
                f"config.json does not mention these tensors, which are left out: {', '.join(unused[:SHOWN])}{more}"
            )
        if from_config(self.config).tied_embeddings and not self.architecture.tied_embeddings:
            remarks.append(f"config.json says tie_word_embeddings, but {HEAD} is stored and is used")
        return remarks

    @property
    def dtype(self) -> str:
        """Name of the type that ``dtype="auto"`` means: that of the configuration, else that of the weights."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or auto_dtype(self._stored, self.weight_files)

    @property
    def generation_digest(self) -> str | None:
        """Identity of ``generation_config.json``, which counts where the model writes text; None if there is no such file."""
        path = self.folder / GENERATION
        return f"sha256:{self._named(lambda: file_digest(path))}" if path.is_file() else None

    def check_config(self) -> None:
        """Refuse what the block executor does not model exactly. Needs no weights.

        Raises:
            ConfigError, UnsupportedError: As ``models.config.check_config``, with the folder.
        """
        self._named(lambda: check_config(self.config))

    def check_files(self) -> None:
        """Refuse weights that are not those of the configuration, and a missing or damaged tokenizer. Reads headers, no tensor.

        Raises:
            ConfigError, UnsupportedError: As ``models.checkpoint``, with the folder.
        """
        self._named(lambda: check_tensors(self.tensors, self.architecture.tensor_shapes()))
        self._named(lambda: check_tokenizer(self.folder))

    def _named(self, look: Callable[[], T]) -> T:
        """Call a function that reads the folder, and put the folder's name before the message of its errors."""
        try:
            return look()
        except (ConfigError, UnsupportedError) as error:
            known = str(self.folder) in str(error)
            raise type(error)(str(error) if known else f"{self.folder}: {error}") from None
        except OSError as error:
            raise unreadable(error, f"{error.filename or self.folder} cannot be read") from error

    def content_digest(self) -> str:
        """Hash configuration, weights and every file that the tokenizer reads: ``sha256:`` and 64 hexadecimal digits."""
        total = hashlib.sha256()
        read = {path for pattern in HASHED for path in self.folder.glob(pattern) if path.is_file()}
        for path in sorted({*self.weight_files, *read}):
            # One line per file: its name, and the digest of its content.
            total.update(
                path.name.encode() + b"\0" + self._named(functools.partial(file_digest, path)).encode() + b"\n"
            )
        return f"sha256:{total.hexdigest()}"


def file_digest(path: Path) -> str:
    """Hash one file (SHA-256, 64 hexadecimal digits).

    Digests of files over 64 MiB are kept in the user's cache folder, by path, size, modification time, inode and change time.
    A program can set the modification time but not the change time, so an overwritten file is hashed again.
    """
    stat = path.stat()
    if stat.st_size <= ALWAYS_HASHED_BYTES:
        return _hash(path)
    state = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}|{stat.st_ctime_ns}"
    remembered = cache_folder() / "digests" / hashlib.sha256(state.encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = remembered.read_text()
        if DIGEST.fullmatch(known):
            return known
    digest = _hash(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(remembered)
    return digest


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def embedded_model_folder(name: str) -> Path:
    """The folder of a model that ships with the package."""
    return Path(str(resources.files("ptqbench"))) / "models" / "embedded" / name


def locate(spec: ModelSpec, *, weights: bool = True) -> ModelSource:
    """Find the folder of a checkpoint; download a hub repository if it is not in the hub cache.

    Args:
        spec: The checkpoint: ``path`` if given, else ``hub_id`` if given, else the embedded model of that name.
        weights: Whether the weights are needed beside the configuration and the tokenizer.

    Raises:
        ConfigError: A path that does not exist, a folder without configuration or weights, a hub repository that can
            neither be found in the cache nor downloaded.
        UnsupportedError: An architecture that is not supported.
    """
    if spec.path is not None:
        folder = Path(spec.path).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"model.path={spec.path!r}: no such folder (looked in {Path.cwd()})")
    elif spec.hub_id is not None:
        folder = _hub_folder(spec.hub_id, _revision(spec), weights)
    elif spec.name.removesuffix("-outlier") in EMBEDDED:
        folder = embedded_model_folder(spec.name.removesuffix("-outlier"))
    else:
        raise ConfigError(
            f"model {spec.name!r} needs a folder: give model.path=FOLDER (or model.hub_id=ORGANISATION/NAME)"
        )
    source = ModelSource(folder)
    source.check_config()
    if weights:
        _ = source.weight_files
    return source


def digest(spec: ModelSpec) -> str:
    """Identify the content of a checkpoint: the commit of a hub repository, else the hash of the folder.

    The weights of a hub repository are checked only if they are on this machine; the digest does not need them.

    Raises:
        ConfigError, UnsupportedError: As ``locate`` and ``ModelSource.check_files``.
    """
    hub = spec.path is None and spec.hub_id is not None
    source = locate(spec, weights=not hub)
    if not hub or source.has_weights:
        source.check_files()
        for remark in source.remarks:
            logging.getLogger(__name__).warning("%s: %s", source.folder, remark)
    return f"hub:{spec.hub_id}@{source.folder.name}" if hub else source.content_digest()


def _revision(spec: ModelSpec) -> str | None:
    """The commit in the digest if there is one, so that a composed cell does not follow a moving branch."""
    pinned = f"hub:{spec.hub_id}@"
    return spec.digest.removeprefix(pinned) if spec.digest and spec.digest.startswith(pinned) else spec.revision


def _hub_folder(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_COPIES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotHereError(
            f"hub model {hub_id} (revision {revision or 'main'}) is neither in the hub cache nor can it be downloaded: "
            f"{first_line(error)}; download it where there is network, or give model.path=FOLDER"
        ) from None
