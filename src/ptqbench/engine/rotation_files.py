"""Rotations given in a file: R1 and R2 as SpinQuant's code writes them (``R.bin``), or in safetensors with the same names.

Source of the names: facebookresearch/SpinQuant@8f47aa3. Deviation: a matrix is replaced by the nearest orthogonal one in
float64, so that it cancels exactly; the code uses it as it was learned and stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptqbench.engine.bases import SHARED, StoredBases
from ptqbench.errors import ConfigError
from ptqbench.models.source import file_digest
from ptqbench.numerics.orthogonal import nearest_orthogonal

if TYPE_CHECKING:
    from ptqbench.models.architecture import Architecture

OFF_ORTHOGONAL = 1e-2
"""Largest entry of |R^T R - I| accepted from a file: matrices stored in bfloat16 pass, others do not."""
HEADS_IN_FILE = "model.layers.{}.self_attn.R2"


def read_rotations(transform: Any, architecture: Architecture, stored: StoredBases) -> StoredBases:
    """Read R1 and R2 from a file of SpinQuant's code (``R.bin``) or from safetensors with the same names, or find them stored.

    What is read is replaced by the nearest orthogonal matrix in float64, so that it cancels exactly.

    Args:
        transform: Says which of ``r1`` and ``r2`` is wanted, where the file lies, and what it must contain.
        architecture: Dimensions to check against.
        stored: Where the rotations go.

    Returns:
        ``residual`` (d, d) and ``l.heads`` (e, e), as far as they are wanted.

    Raises:
        ConfigError: The file is missing, damaged or another than the cell was resolved with; a matrix is missing, has
            another shape, or is not orthogonal.
    """
    places: dict[str, tuple[str, int]] = {}
    if transform.r1 == "file":
        places["residual"] = ("R1", architecture.hidden_size)
    if transform.r2 == "file":
        for index in range(architecture.n_blocks):
            places[f"{index}.heads"] = (HEADS_IN_FILE.format(index), architecture.head_dim)
    if all(stored.has(name.rpartition(".")[0] or SHARED) for name in places):
        return stored
    tensors, path = _read_file(transform.rotation_file, transform.rotation_digest), transform.rotation_file
    stored.save_named({name: _checked(tensors, *place, path) for name, place in places.items()})
    return stored


def _read_file(given: str | None, digest: str) -> dict[str, Any]:
    if given is None or not Path(given).is_file():
        raise ConfigError(f"rotation_file {given!r} does not exist; the cell wants the content {digest}")
    path = Path(given)
    if file_digest(path) != digest:
        raise ConfigError(
            f"rotation_file {path} has changed: expected the content {digest}, got {file_digest(path)}; resolve anew"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ConfigError(
            f"rotation_file {path} cannot be read: it is no pickle of tensors alone, and nothing else is unpickled because that "
            f"can run code; save a mapping of names to tensors, best with safetensors"
        ) from None
    except Exception as error:  # both readers raise many types for one fact
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"rotation_file {path} cannot be read: {reason}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"rotation_file {path}: expected a mapping of names to matrices, got {type(loaded).__name__}")
    return loaded


def _checked(tensors: Mapping[str, Any], name: str, width: int, path: str) -> Tensor:
    matrix = tensors.get(name, tensors.get(f"{name}.weight"))
    if not isinstance(matrix, Tensor):
        raise ConfigError(
            f"rotation_file {path}: expected a matrix {name!r}, got {sorted(tensors)[:5]} ({len(tensors)} names)"
        )
    if tuple(matrix.shape) != (width, width) or not matrix.is_floating_point():
        raise ConfigError(
            f"rotation_file {path}: expected {name!r} of shape {(width, width)}, got {tuple(matrix.shape)} of "
            f"{matrix.dtype}; it belongs to another model"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"rotation_file {path}: {name!r} holds NaN or infinity")
    rotation, deviation = nearest_orthogonal(matrix)
    if deviation > OFF_ORTHOGONAL:
        raise ConfigError(
            f"rotation_file {path}: expected {name!r} to be orthogonal, got R^T R off the identity by {deviation:.2g} "
            f"(accepted: {OFF_ORTHOGONAL:g})"
        )
    return rotation
