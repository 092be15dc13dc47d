"""Where a checkpoint lies and what it contains, without loading it. Imports neither torch nor transformers.

A checkpoint is a folder in Hugging Face form: ``config.json``, safetensors (one file or an index of shards) and a tokenizer.
It is embedded in this package, a local folder, or a hub repository. Its digest identifies the content: the commit for a hub
repository, a SHA-256 over the files that matter for a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from ptqbench.cell.folders import cache_folder
from ptqbench.cell.spec import ModelSpec
from ptqbench.errors import ConfigError, NotHereError, UnsupportedError
from ptqbench.models.architecture import from_config

EMBEDDED = ("tiny",)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
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
ALWAYS_HASHED_BYTES = 1 << 26
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A checkpoint folder that has been looked at: it has a readable configuration and lists its weights."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        path = self.folder / "config.json"
        try:
            data: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"model folder {self.folder} has no config.json; expected a Hugging Face checkpoint"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        return data

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name -> file, read from the index; a single file is listed under the name ``"*"``.

        Raises:
            ConfigError: There are no weights, or the index names a file that is missing.
        """
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ConfigError(f"{index} is not a valid safetensors index: {error!r}") from None
            missing = sorted({file for file in names.values() if not (self.folder / file).is_file()})
            if missing:
                raise ConfigError(
                    f"{index} names {missing[0]}, which is not in {self.folder}: the download is incomplete"
                )
            return {name: self.folder / file for name, file in names.items()}
        if (self.folder / SINGLE).is_file():
            return {"*": self.folder / SINGLE}
        raise ConfigError(f"model folder {self.folder} has no weights: expected {SINGLE} or {INDEX}")

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted, each once."""
        return sorted(set(self.shards.values()))

    def check_architecture(self) -> None:
        """Refuse what the block executor does not model exactly.

        Raises:
            UnsupportedError: Not a Llama, Qwen2 or Qwen3 causal language model, already quantized, or with sliding attention.
        """
        kind = self.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise UnsupportedError(
                f"model_type {kind!r} in {self.folder} is not supported; known: {', '.join(ARCHITECTURES)}"
            )
        if self.config.get("quantization_config"):
            raise UnsupportedError(
                f"{self.folder} is already quantized (quantization_config in config.json); give the original"
            )
        if self.config.get("use_sliding_window"):
            raise UnsupportedError(f"{self.folder} uses sliding-window attention, which is not supported")

    def check_files(self) -> None:
        """Open every weight file and look for a tokenizer, without reading a tensor.

        Raises:
            ConfigError: A file is truncated or not safetensors, a tensor of the architecture is missing, or there is no tokenizer.
        """
        present = {name for path in self.weight_files for name in _tensor_names(path)}
        missing = [name for name in from_config(self.config).tensor_shapes() if name not in present]
        if missing:
            raise ConfigError(f"{self.folder}: the weights lack tensor {missing[0]!r} ({len(missing)} missing in all)")
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"model folder {self.folder} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}"
            )

    def content_digest(self) -> str:
        """Hash configuration, weights and every file that the tokenizer reads: ``sha256:`` and 64 hexadecimal digits."""
        total = hashlib.sha256()
        read = {path for pattern in HASHED for path in self.folder.glob(pattern) if path.is_file()}
        for path in sorted({*self.weight_files, *read}):
            total.update(path.name.encode() + b"\0" + file_digest(path).encode() + b"\n")
        return f"sha256:{total.hexdigest()}"


def _tensor_names(path: Path) -> set[str]:
    """Read the names in the header of a safetensors file: 8 bytes of length, then JSON with the place of every tensor.

    The library would do the same with numpy or torch in tow, a sixth of a second that every command would pay.

    Raises:
        ConfigError: The file is no safetensors file, or shorter than its header says.
    """
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            actual = path.stat().st_size
            header = json.loads(stream.read(size)) if 0 < size <= actual else None
        ends = {name: entry["data_offsets"][1] for name, entry in (header or {}).items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path} is corrupt or truncated, not a readable safetensors file: {error}") from None
    expected = 8 + size + max(ends.values(), default=0)
    if header is None or expected != actual:
        raise ConfigError(
            f"{path} is corrupt or truncated, not a readable safetensors file: expected {expected} bytes, got {actual}"
        )
    return set(ends)


def file_digest(path: Path) -> str:
    """Hash one file (SHA-256, 64 hexadecimal digits).

    Digests of files over 64 MiB are remembered in the user's cache folder by path, size, modification time, inode and change
    time. A program can set the modification time but not the change time, so an overwritten file is hashed again.
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
    """Find the folder of a checkpoint, downloading a hub repository when it is not in the hub cache.

    Args:
        spec: Which checkpoint; exactly one of an embedded name, ``path`` or ``hub_id`` applies, ``path`` first.
        weights: Whether the weights themselves are needed, or only the configuration and the tokenizer.

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
    source.check_architecture()
    if weights:
        _ = source.shards
    return source


def digest(spec: ModelSpec) -> str:
    """Identify the content of a checkpoint: the commit of a hub repository, else the hash of the folder."""
    if spec.path is None and spec.hub_id is not None:
        return f"hub:{spec.hub_id}@{_hub_folder(spec.hub_id, _revision(spec), weights=False).name}"
    source = locate(spec)
    source.check_files()
    return source.content_digest()


def verify(spec: ModelSpec) -> None:
    """Compare the checkpoint and the tokenizer on disk with the digest in a cell; to be called when the cell starts.

    Files up to 64 MiB are always hashed, larger ones only if size, times or inode differ from when they were hashed last. The
    digest of a hub model is a commit, which never changes; the commit must be in the hub cache or on the hub.

    Args:
        spec: The model of a composed cell, with its digest.

    Raises:
        ConfigError: The content is another one than when the cell was composed, or it is no longer there.
    """
    found = digest(spec)
    if found != spec.digest:
        raise ConfigError(
            f"the checkpoint or tokenizer of model {spec.name!r} has changed since the cell was composed: expected {spec.digest}, "
            f"got {found} in {locate(spec, weights=False).folder}; restore the files, or compose the cell again"
        )


def _revision(spec: ModelSpec) -> str | None:
    """The commit of the digest if there is one, so that a branch that moves leaves a composed cell alone."""
    pinned = f"hub:{spec.hub_id}@"
    return spec.digest.removeprefix(pinned) if spec.digest and spec.digest.startswith(pinned) else spec.revision


def _hub_folder(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotHereError(
            f"hub model {hub_id} (revision {revision or 'main'}) is neither in the hub cache nor can it be downloaded: {reason}; "
            f"download it where there is network, or give model.path=FOLDER"
        ) from None
