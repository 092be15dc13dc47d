"""Rotations and eigenbases given in files: those of SpinQuant's, ResQ's and CoQuant's codes, or safetensors with their names.

A transform says with ``from_files`` which names mean what. Sources of the names: facebookresearch/SpinQuant@8f47aa3,
utkarsh-dmx/project-resq@cb87d0d, Zachary5895/CoQuant@0e2e343. Deviation: a matrix is replaced by the nearest orthogonal one in
float64, so that it cancels exactly; the codes use it as it was stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptqbench.engine.bases import StoredBases
from ptqbench.errors import ConfigError, first_line
from ptqbench.models.source import file_digest
from ptqbench.numerics.orthogonal import nearest_orthogonal

if TYPE_CHECKING:
    from ptqbench.methods.transform import FileMatrix, Transform
    from ptqbench.models.architecture import Architecture

OFF_ORTHOGONAL = 1e-2
"""Largest entry of |R^T R - I| accepted from a file: matrices stored in bfloat16 pass, others do not."""
READ = "files"
"""Part that is stored, without tensors, once the files have been read."""


def read_rotations(transform: Transform, architecture: Architecture, stored: StoredBases) -> StoredBases:
    """Read what the files of a transform hold, or find it stored.

    Args:
        transform: Says where the files lie, what they must contain, and which matrices are wanted.
        architecture: Dimensions to check against.
        stored: Where the matrices go, under the names of ``transform.from_files``.

    Returns:
        ``stored``.

    Raises:
        ConfigError: A file is missing, damaged or another than the cell was resolved with; a matrix is missing, has another
            shape, or is not orthogonal.
    """
    if stored.has(READ):
        return stored
    # All matrices of all files by name, without the ``.weight`` that a state dictionary adds.
    held: dict[str, Any] = {}
    for digest, path in transform.files.items():
        held |= {name.removesuffix(".weight"): value for name, value in _read_file(path, digest).items()}
    where = " and ".join(str(path) for path in transform.files.values())
    # The transform says which of them it wants and in which shape.
    wanted = transform.from_files(architecture, held)
    stored.save_named({name: _checked(held, matrix, where) for name, matrix in wanted.items()})
    stored.save(READ, {})
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
        raise ConfigError(f"rotation_file {path} cannot be read: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"rotation_file {path}: expected a mapping of names to matrices, got {type(loaded).__name__}")
    return loaded


def _checked(held: Mapping[str, Any], wanted: FileMatrix, where: str) -> Tensor:
    # It is there, has the right shape, and is finite.
    matrix, name = held.get(wanted.name), wanted.name
    if not isinstance(matrix, Tensor):
        raise ConfigError(
            f"rotation_file {where}: expected a matrix {name!r}, got {sorted(held)[:5]} ({len(held)} names)"
        )
    if tuple(matrix.shape) != wanted.shape or not (
        matrix.is_floating_point() or (wanted.table and not matrix.is_complex())
    ):
        raise ConfigError(
            f"rotation_file {where}: expected {name!r} of shape {wanted.shape}, got {tuple(matrix.shape)} of "
            f"{matrix.dtype}; it belongs to another model"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"rotation_file {where}: {name!r} holds NaN or infinity")
    if wanted.table and float(matrix.double().square().mean()) > (1 + 1 / len(matrix)) / 2:
        matrix = matrix.double() / math.sqrt(len(matrix))  # entries of mean square 1, not 1 / K
    # Replace each by the nearest orthogonal matrix.
    single = [_orthogonal(one, name, where) for one in matrix.reshape(-1, *matrix.shape[-2:])]
    return torch.stack(single).reshape(matrix.shape)


def _orthogonal(matrix: Tensor, name: str, where: str) -> Tensor:
    rotation, deviation = nearest_orthogonal(matrix)
    if deviation > OFF_ORTHOGONAL:
        raise ConfigError(
            f"rotation_file {where}: expected {name!r} to be orthogonal, got R^T R off the identity by {deviation:.2g} "
            f"(accepted: {OFF_ORTHOGONAL:g})"
        )
    return rotation
