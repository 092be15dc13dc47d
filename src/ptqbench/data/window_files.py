"""Calibration windows drawn by another code: token ids from a file. Imports torch only to read ``.pt``.

Codes of the GPTQ family save their samples as ``torch.save([(inputs, targets), ...])`` with ``inputs`` (1, seq_len), or as one
tensor. A cell is identified by the token ids, whatever the format and the place of the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell.spec import CalibrationSpec
from ptqbench.errors import ConfigError

if TYPE_CHECKING:
    import numpy

WINDOWS = "windows"
"""Name of the data set of a calibration whose windows come from a file."""
NAMES = ("input_ids", "windows")
"""Keys of the token ids in a file of several tensors."""


def pin_windows(spec: CalibrationSpec) -> CalibrationSpec:
    """Identify a calibration by the windows in its file.

    Args:
        spec: A calibration with ``windows``.

    Returns:
        A calibration with that file, the digest of its token ids, its number of windows and their length.

    Raises:
        ConfigError: As ``read_windows``.
    """
    ids = read_windows(str(spec.windows))
    n_samples, seq_len = map(int, ids.shape)
    return CalibrationSpec(
        WINDOWS, digest=windows_digest(ids), n_samples=n_samples, seq_len=seq_len, windows=spec.windows
    )


def windows_digest(ids: numpy.ndarray[Any, Any]) -> str:
    """Identify windows (n_windows, seq_len) by their shape and token ids."""
    content = f"{ids.shape[0]}x{ids.shape[1]}:".encode() + ids.tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_windows(given: str) -> numpy.ndarray[Any, Any]:
    """Read token ids (n_windows, seq_len), little-endian int64.

    Args:
        given: A ``.pt`` or ``.pth`` file of a tensor, of a list of tensors or of a list of (inputs, targets), a ``.safetensors``
            file of one tensor or with ``input_ids``, a ``.npy`` file, or a ``.json`` file of a list of lists.

    Raises:
        ConfigError: The file is missing or unreadable, or holds something else than equally long windows of token ids.
    """
    import numpy

    path = Path(given).expanduser()
    if path.suffix not in READERS:
        raise ConfigError(f"calibration.windows={given!r}: expected a file named {', '.join(READERS)}")
    if not path.is_file():
        raise ConfigError(f"calibration.windows={given!r}: no such file (looked in {Path.cwd()})")
    try:
        found = numpy.asarray(_stacked(READERS[path.suffix](path)))
    except Exception as error:  # the readers raise many types for one fact
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"calibration.windows={given!r} cannot be read as windows of token ids: {reason}") from None
    if found.ndim == 3 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.shape[0] or found.shape[1] < 2 or found.min() < 0:
        raise ConfigError(
            f"calibration.windows={given!r}: expected token ids (windows, tokens), integers from 0 and at least two tokens a "
            f"window, got {found.dtype} of shape {found.shape}"
        )
    return numpy.ascontiguousarray(found, dtype="<i8")


def _stacked(data: Any) -> Any:
    """Turn saved data into one array: the inputs of pairs, the token ids of a mapping."""
    if isinstance(data, dict):
        name = next((name for name in NAMES if name in data), None)
        if name is None and len(data) != 1:
            raise ValueError(f"expected one tensor or one named {' or '.join(NAMES)}, got {sorted(data)[:5]}")
        return _stacked(data[name] if name is not None else next(iter(data.values())))
    if isinstance(data, list | tuple) and data and not isinstance(data[0], int):
        pairs = isinstance(data[0], tuple) and len(data[0]) == 2
        return [_stacked(item[0] if pairs else item) for item in data]
    return data.numpy() if hasattr(data, "numpy") else data


def _pt(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(path)


def _npy(path: Path) -> Any:
    import numpy

    return numpy.load(path, allow_pickle=False)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


READERS = {".pt": _pt, ".pth": _pt, ".safetensors": _safetensors, ".npy": _npy, ".json": _json}
