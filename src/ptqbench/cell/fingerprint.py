"""The identity of a cell: SHA-256 over the canonical JSON of its identity fields.

Two requests have the same run id exactly when every field that can change a number is equal. Names, paths, devices and
folders are not among them; models and texts enter by content digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ptqbench.cell.spec import IDENTITY, RunSpec

FORMAT = 1
"""Raised whenever the meaning of the numbers changes, so that old results are never mistaken for new ones."""

RUN_ID_LENGTH = 12
_PLAIN = (str, int, float)


def identity_fields(value: Any) -> Any:
    """Keep the identity fields of a spec, recursively, as plain data.

    A mapping of specs (texts by label) keeps its labels: they name result columns.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    names = _identity_names(value.__class__)
    if names is not None:
        return {name: identity_fields(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): identity_fields(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity_fields(item) for item in value]
    return value


@functools.cache
def _identity_names(cls: type) -> tuple[str, ...] | None:
    """Names of the identity fields of a part of a spec; None for any other class."""
    if not dataclasses.is_dataclass(cls):
        return None
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata["role"] == IDENTITY)


def canonical_json(value: Any) -> str:
    """Serialise plain data to the one JSON text that is hashed: sorted keys, no spaces, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def identity_texts(spec: RunSpec) -> dict[str, str]:
    """Serialise every identity field of a cell by itself: cells that share a field share its text."""
    return {name: canonical_json(identity_fields(getattr(spec, name))) for name in _identity_names(RunSpec) or ()}


def joined(texts: Mapping[str, str]) -> str:
    """Make the canonical JSON of an object from that of its values.

    >>> joined({"b": "[1]", "a": "null"})
    '{"a":null,"b":[1]}'
    """
    return "{" + ",".join(f'"{name}":{texts[name]}' for name in sorted(texts)) + "}"


def run_id(spec: RunSpec) -> str:
    """Hash the identity of a cell.

    Args:
        spec: A fully resolved cell (digests filled in), not modified.

    Returns:
        12 lower-case hexadecimal digits.
    """
    return identity_id(identity_texts(spec))


def identity_id(texts: Mapping[str, str]) -> str:
    """Hash what ``identity_texts`` returned for a cell, to its run id."""
    payload = joined({"format": canonical_json(FORMAT), "spec": joined(texts)})
    return hashlib.sha256(payload.encode()).hexdigest()[:RUN_ID_LENGTH]


def slug(spec: RunSpec) -> str:
    """Name a cell for people: ``model-method-bitwidth-sSEED``. Not an identifier."""
    parts = (spec.model.name, spec.method.name, spec.bitwidth.name, f"s{spec.seed}")
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)
