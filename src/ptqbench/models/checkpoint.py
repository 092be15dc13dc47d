"""The weight files and tokenizer files of a checkpoint, checked without loading a tensor. Imports neither torch nor transformers.

A checkpoint is what ``transformers`` 5 would load from the folder: ``model.safetensors`` if it is there, else every file that
``model.safetensors.index.json`` names. Only the file names in the index count. The headers say which tensor lies in which file.
Where two files hold the same tensor, the file with the later name wins.

Header of a safetensors file: 8 bytes, little-endian, give the length of a JSON object that follows; it maps each tensor name to
``dtype``, ``shape`` and ``data_offsets`` (begin and end, in bytes, counted from the end of the header).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptqbench.errors import ConfigError, UnsupportedError, unreadable

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types that weights may be stored in: safetensors' name -> torch's name. All are cast to the type of the cell."""
HEAD = "lm_head.weight"
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
        "F16": 16, "BF16": 16, "F32": 32, "F64": 64}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that can hold a tokenizer, in the order in which they are preferred."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names that transformers takes before any other weight file."""
QUANTIZED = re.compile(
    r"scales?(_inv|_\d+)?$|zero_points?$|\.(qweight|qzeros|g_idx|SCB|absmax|codebooks?|codes)$|_packed$|quant_state|quant_map"
)
ADAPTER = re.compile(r"\.(lora_\w+|base_layer)\b|^base_model\.")
SILENT = re.compile(r"rotary_emb\.inv_freq")
"""Buffers of old checkpoints. transformers computes them from the configuration and leaves the stored ones out without a report."""
OTHER_FORMATS = {
    ".bin": "PyTorch",
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".npz": "MLX",
}

SIXTEEN_BITS = "give the original checkpoint in 16 or 32 bits, or dequantize this one and save it as bfloat16"
MERGE = "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(NEW_FOLDER)"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as its header describes it: type by safetensors' name, shape, the file that holds it, and its name there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    name: str


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a UTF-8 file.

    Raises:
        ConfigError: The file cannot be read, is a pointer of git-lfs, or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(error, f"{path} cannot be read") from error
    except (ValueError, RecursionError) as error:
        _refuse_pointer(path)
        raise ConfigError(f"{path} is not valid JSON: {error or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files that transformers would load, sorted by name.

    Raises:
        ConfigError: There are none, the index is malformed, or it names a file that is missing or outside the folder.
    """
    distributed = next((path.name for path in sorted(folder.iterdir()) if DISTRIBUTED.fullmatch(path.name)), None)
    if distributed is not None:
        raise ConfigError(
            f"{folder} is a distributed checkpoint ({distributed}); save the whole model with save_pretrained"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ConfigError(_no_weights(folder))
    index = read_json(folder / INDEX)
    places: Any = index.get("weight_map")
    mapped = isinstance(places, dict) and places and all(isinstance(name, str) for name in places.values())
    if not mapped or not isinstance(index.get("metadata"), dict):
        raise ConfigError(
            f"{folder / INDEX} is not a valid safetensors index: expected 'weight_map', which maps tensors to files, and a "
            f"mapping 'metadata', which may be empty"
        )
    names = sorted(set(places.values()))
    for name in names:
        inside = posixpath.normpath(name)
        if posixpath.isabs(name) or inside == ".." or inside.startswith("../"):
            raise ConfigError(f"{folder / INDEX} names {name!r}, which lies outside the folder of the model")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / INDEX} names {name}, which is not in {folder}: the download is incomplete")
    return [folder / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """Read the headers of weight files: tensor name -> type, shape and file. Of equal names the last counts.

    Raises:
        ConfigError: As ``read_header``.
    """
    return {name: tensor for path in files for name, tensor in read_header(path).items()}


def read_header(path: Path) -> dict[str, Stored]:
    """Read the header of one safetensors file, sorted by name as the library does.

    The library would import numpy or torch for this, which would cost every command a sixth of a second.

    Raises:
        ConfigError: The file is no safetensors file, or its size is not what the header says.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size - 8 - length
            if not 0 < length <= MAX_HEADER_BYTES or size < 0:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        _check_offsets(header, size)
        return {
            name: Stored(header[name]["dtype"], tuple(header[name]["shape"]), path, name) for name in sorted(header)
        }
    except OSError as error:
        raise unreadable(error, f"{path} cannot be read") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _refuse_pointer(path)
        raise ConfigError(f"{path} is corrupt or truncated, not a readable safetensors file: {error}") from None


def _check_offsets(header: Mapping[str, Any], size: int) -> None:
    """Refuse tensors that overlap, leave gaps, do not fill the file, or have another number of bytes than their shape needs."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, bits = entry["shape"], BITS.get(entry["dtype"])
        whole = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
        if not whole or begin != position or end < begin:
            raise ValueError(f"tensor {name!r} has offsets {begin} to {end}, expected them to begin at {position}")
        if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(
                f"tensor {name!r} of shape {tuple(shape)} and type {entry['dtype']} cannot fill {end - begin} bytes"
            )
        position = end
    if position != size:
        raise ValueError(f"expected {position} bytes of tensors, got {size}")


def check_tensors(tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that transformers would load into another model than the configuration describes.

    Args:
        tensors: What is stored.
        shapes: Every tensor that the model needs -> shape.

    Raises:
        ConfigError: A tensor is missing, has another shape, or is stored under two names.
        UnsupportedError: A tensor has a type other than float16, bfloat16, float32 and float64, or there are tensors of a
            quantized model or of an adapter.
    """
    others = sorted(set(tensors) - set(shapes))
    scale = next((name for name in others if QUANTIZED.search(name)), None)
    for name in filter(tensors.__contains__, shapes):
        stored = tensors[name]
        if stored.dtype not in FLOATS:
            raise UnsupportedError(
                f"{stored.file.name}: tensor {name!r} is stored as dtype {stored.dtype}{f' with {scale!r}' if scale else ''}, "
                f"expected one of {', '.join(FLOATS)}: it is quantized or no weight; {SIXTEEN_BITS}"
            )
    if scale:
        raise UnsupportedError(f"the weights are quantized already (tensor {scale!r}); {SIXTEEN_BITS}")
    adapter = next((name for name in others if ADAPTER.search(name)), None)
    if adapter:
        raise UnsupportedError(f"the weights hold an adapter that is not merged (tensor {adapter!r}); {MERGE}")
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ConfigError(
            f"the weights lack tensor {missing[0]!r} ({len(missing)} missing in all){_advice(missing, tensors)}"
        )
    for name, shape in shapes.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise ConfigError(f"{stored.file.name}: tensor {name!r} has shape {stored.shape}, config.json says {shape}")
    # transformers adds or removes the prefix of names that the model does not have, so such a tensor may replace the right one.
    for name in others:
        meant = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
        if meant in shapes or meant == HEAD:
            raise ConfigError(
                f"{tensors[name].file.name}: transformers reads tensor {name!r} as {meant!r}, which must be stored once; "
                f"remove {name!r}"
            )


def ignored(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List tensors that the configuration does not mention; the numbers of their blocks become ranges.

    Returns:
        Patterns such as ``model.layers.0-3.self_attn.q_proj.bias``, sorted; empty if every tensor is used.
    """
    blocks: dict[tuple[str, str], list[int]] = {}
    others = []
    for name in set(names) - set(shapes):
        numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if SILENT.search(name):
            continue
        if numbered:
            blocks.setdefault((numbered[1], numbered[3]), []).append(int(numbered[2]))
        else:
            others.append(name)
    return sorted(others + [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in blocks.items()])


def auto_dtype(tensors: Mapping[str, Stored], files: list[Path]) -> str:
    """Find the type that ``dtype="auto"`` means where the configuration has none: that of the first floating tensor by name.

    As in transformers, the metadata of an index come first, only the first file counts, and float8 does not count.

    Returns:
        Name of the type in torch.
    """
    first = files[0]
    if first.name != SINGLE:
        declared = read_json(first.parent / INDEX).get("metadata", {}).get("dtype")
        if declared is not None:
            return str(declared)
    floats = (FLOATS[t.dtype] for _, t in sorted(tensors.items()) if t.file == first and t.dtype in FLOATS)
    return next(floats, "float32")


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder from which no tokenizer can be loaded, as far as this shows without building one.

    Raises:
        ConfigError: There is no tokenizer file, a file is damaged or a pointer of git-lfs, or a package that reads it is missing.
    """
    name = next((name for name in TOKENIZERS if (folder / name).is_file()), None)
    if name is None:
        raise ConfigError(
            f"model folder {folder} has no tokenizer: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        )
    _refuse_pointer(folder / name)
    if name == "tokenizer.json":
        # Parsing megabytes of JSON would cost every command a tenth of a second; a cut copy shows at its end.
        content = (folder / name).read_bytes().strip()
        if not (content.startswith(b"{") and content.endswith(b"}") and b'"model"' in content):
            raise ConfigError(
                f"{folder / name} is damaged: expected a JSON object with the key 'model'; copy it from the original checkpoint"
            )
    elif name == "tokenizer.model":
        _check_reader(folder / name)
    elif not (folder / "merges.txt").is_file():
        raise ConfigError(
            f"model folder {folder} has vocab.json without merges.txt: copy merges.txt or tokenizer.json there"
        )
    for settings in TOKENIZER_SETTINGS:
        if (folder / settings).is_file():
            read_json(folder / settings)


def _check_reader(path: Path) -> None:
    """Refuse a tokenizer.model whose library is not installed; a file of sentencepiece begins with a line feed."""
    from importlib.util import find_spec

    with path.open("rb") as stream:
        package = "sentencepiece" if stream.read(1) == b"\n" else "tiktoken"
    if find_spec(package) is None:
        raise ConfigError(
            f"{path.parent} has tokenizer.model but no tokenizer.json, and the package {package} that reads it is not installed: "
            f"pip install {package}, or copy the tokenizer.json of the model there"
        )


def _refuse_pointer(path: Path) -> None:
    """Refuse a file that git-lfs has not replaced by its content."""
    with path.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            raise ConfigError(
                f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in {path.parent}"
            )


def _no_weights(folder: Path) -> str:
    """The error where there are no safetensors weights, with the way to convert weights of another format."""
    expected = f"model folder {folder} has no weights: expected {SINGLE} or {INDEX}"
    for path in sorted(folder.iterdir()):
        form = OTHER_FORMATS.get(path.suffix)
        if form == "PyTorch":
            return (
                f"{expected}, got {path.name} ({form}); save it as safetensors: "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER)"
            )
        if form or path.suffix == ".safetensors":
            return f"{expected}, got {path.name}; save the model with save_pretrained of transformers"
    return expected


def _advice(missing: list[str], tensors: Mapping[str, Stored]) -> str:
    """The likely reason why tensors are missing, and what to do about it."""
    if missing[0].removeprefix("model.") in tensors:
        return "; the names lack the prefix 'model.': save the model with its head, as a ...ForCausalLM"
    if missing == [HEAD]:
        return "; set tie_word_embeddings to true in config.json if the output projection is the embedding"
    return ""


def _ranges(numbers: list[int]) -> str:
    """Write numbers as ranges: 0, 1, 2, 5 as ``0-2,5``."""
    # Consecutive numbers have the same distance from their place in the sorted list.
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda placed: placed[1] - placed[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
