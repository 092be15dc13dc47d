"""The identity of a cell: SHA-256 over the canonical JSON of its identity fields.

Two requests have the same run id exactly if all fields that can change a number are equal. Names, paths, devices and folders are
not among these fields; models and texts enter by the digest of their content. Fields declared with ``spec.added`` enter where they
differ from their default. Revisions enter where a cell uses the part of the code that was revised.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from ptqbench.cell.spec import IDENTITY, UNTOUCHED_BITS, RunSpec, left_at_default

FORMAT = 1
"""Raised by one whenever the numbers of every cell change, so that old results are never mistaken for new ones."""


def _rounds_to_sym_gptq(spec: RunSpec) -> bool:
    return spec.bitwidth.w_bits < UNTOUCHED_BITS and spec.method.grid.scheme == "sym_gptq"


def _refines_towards_working_copy(spec: RunSpec) -> bool:
    refine = spec.method.refine
    return refine.name == "null_space" and refine.options.get("reference") == "working"


def _shuffles_choices(spec: RunSpec) -> bool:
    return any(word in task for task in spec.evaluation.tasks for word in ("gpqa", "metabench", "arabic_mt_sciq"))


REVISIONS: dict[str, tuple[int, Callable[[RunSpec], bool]]] = {
    "sym_gptq_ties": (1, _rounds_to_sym_gptq),  # a weight half a step between two codes goes to the even one
    "null_space_working": (1, _refines_towards_working_copy),  # the working copy of the column loop, not the target
    "shuffled_choices": (1, _shuffles_choices),  # shuffled once, with lm-eval's seed
}
"""Parts of the code whose numbers have changed since ``FORMAT`` was last raised: name -> (revision, whether a cell uses the part).

Only cells that use a part get a new run id.
"""

RUN_ID_LENGTH = 12
_PLAIN = (str, int, float)


def identity_fields(value: Any) -> Any:
    """Extract the identity fields of a spec, recursively, as plain data.

    A mapping of specs (texts by label) keeps its labels, because they name columns of the results.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    fields = _identity_of(value.__class__)
    if fields is not None:
        given = ((field, getattr(value, field.name)) for field in fields)
        return {field.name: identity_fields(item) for field, item in given if not left_at_default(field, item)}
    if isinstance(value, dict):
        return {str(key): identity_fields(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity_fields(item) for item in value]
    return value


@functools.cache
def _identity_of(cls: type) -> tuple[dataclasses.Field[Any], ...] | None:
    """Identity fields of a part of a spec; None for any other class."""
    if not dataclasses.is_dataclass(cls):
        return None
    return tuple(f for f in dataclasses.fields(cls) if f.metadata["role"] == IDENTITY)


def canonical_json(value: Any) -> str:
    """Serialise plain data to the JSON text that is hashed: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def identity_texts(spec: RunSpec) -> dict[str, str]:
    """Serialise every identity field of a cell by itself, so that cells with an equal field can share its text."""
    given = ((field, getattr(spec, field.name)) for field in _identity_of(RunSpec) or ())
    texts = {f.name: canonical_json(identity_fields(value)) for f, value in given if not left_at_default(f, value)}
    return texts | revision_texts(spec)


def revision_texts(spec: RunSpec) -> dict[str, str]:
    """Serialise the revisions of the code that a cell uses; empty if it uses none."""
    revised = {name: revision for name, (revision, uses) in REVISIONS.items() if uses(spec)}
    return {"revisions": canonical_json(revised)} if revised else {}


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
    """Hash the result of ``identity_texts`` to the run id of the cell."""
    payload = joined({"format": canonical_json(FORMAT), "spec": joined(texts)})
    return hashlib.sha256(payload.encode()).hexdigest()[:RUN_ID_LENGTH]
