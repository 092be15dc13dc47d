"""Argument checks shared by the numerics: finite values, matching shapes, known options.

Messages name the tensor and the first bad index. The caller knows which linear it was working on and adds that name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptqbench.errors import ConfigError, NumericalError


def require_finite(name: str, values: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raise ``NumericalError`` with the first bad index unless every entry of ``values`` is finite.

    Args:
        name: How the message calls the tensor, for example ``"weight"``.
        values: Any floating dtype; not modified.
        shape: Required shape, checked first; ``None`` for any.

    Raises:
        ConfigError: The shape differs.
        NumericalError: An entry is NaN or infinite.
    """
    if shape is not None:
        require_shape(name, values, shape)
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = torch.nonzero(~finite)
    first = tuple(int(i) for i in bad[0])
    raise NumericalError(
        f"{name}: expected finite values, got {values[first].item()} at index {list(first)} "
        f"({len(bad)} of {values.numel()} entries are bad); check the inputs that produced it"
    )


def require_shape(name: str, values: Tensor, expected: Sequence[int]) -> None:
    """Raise ``ConfigError`` unless ``values`` has the expected shape.

    Args:
        name: How the message calls the tensor.
        values: The tensor; not modified.
        expected: Required size of every axis.

    Raises:
        ConfigError: The shape differs.
    """
    if tuple(values.shape) != tuple(expected):
        raise ConfigError(f"{name}: expected shape {list(expected)}, got {list(values.shape)}")


def require_matrix(name: str, values: Tensor) -> None:
    """Raise ``ConfigError`` unless ``values`` is a non-empty floating-point matrix.

    Args:
        name: How the message calls the tensor.
        values: The tensor; not modified.

    Raises:
        ConfigError: Wrong number of axes, an empty axis, or an integer dtype.
    """
    if values.ndim != 2 or values.numel() == 0 or not values.is_floating_point():
        raise ConfigError(
            f"{name}: expected a non-empty floating-point matrix, got shape {list(values.shape)} of {values.dtype}"
        )


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``choices``.

    Args:
        name: Name of the option.
        value: The given value.
        choices: Every accepted value.

    Raises:
        ConfigError: The value is not among the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of ``tensors`` is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
