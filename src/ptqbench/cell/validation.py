"""Strict validation of dataclasses, with errors of one line. Imports neither torch nor hydra.

pydantic validates in strict mode. Its errors are rewritten: what was expected, what was given, where, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ptqbench.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Validate plain data strictly against a dataclass.

    Args:
        cls: The dataclass to build; ``Annotated`` constraints on its fields are enforced.
        data: Plain JSON-able data, not modified. A list is accepted for a tuple, an int for a float, nothing else.
        where: Dotted prefix for error messages, e.g. ``"method.solver"``.

    Returns:
        The frozen instance.

    Raises:
        ConfigError: One line: expected, given, where, nearest valid name.
    """
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or cls.__name__}: expected plain finite values, got {data!r} ({error})") from None
    try:
        return _adapter(cls).validate_json(text)  # type: ignore[no-any-return, arg-type]
    except ValidationError as error:
        raise ConfigError(_one_line(cls, error, where)) from None


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls if dataclasses.is_dataclass(cls) and hasattr(cls, "__pydantic_config__") else strict(cls))


@functools.cache
def strict(cls: type[T]) -> type[T]:
    """Give a standard-library dataclass (a role member) the same strict validation as the spec itself."""
    return dataclass(cls, config=STRICT, frozen=True)  # type: ignore[call-overload, no-any-return, return-value]


def nearest(name: str, known: Iterable[str]) -> str:
    """The closest known word and the list of known words, for error messages."""
    words = sorted(known)
    close = difflib.get_close_matches(str(name), words, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(words) or '(none)'}"


def may_hold(cls: type, path: Iterable[str]) -> set[str] | None:
    """Names of fields below a path of field names and labels; None where any name may stand, as in a mapping of values."""
    inner: Any = cls
    for part in path:
        hint = get_args(inner)[1] if get_origin(inner) is dict else get_type_hints(inner).get(part)
        kinds = (hint, *get_args(hint))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind) or get_origin(kind) is dict), None)
        if inner is None:
            return set()
    return None if get_origin(inner) is dict else {field.name for field in dataclasses.fields(inner)}


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names for a key that a class does not have."""


def _one_line(cls: type, error: ValidationError, where: str) -> str:
    # A misspelled key is missing too: what is unknown says more.
    problem = min(error.errors(include_url=False), key=lambda one: one["type"] not in UNKNOWN)
    path = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("tuple["))]
    place = ".".join(str(part) for part in ([where] if where else []) + path)
    if problem["type"] in UNKNOWN:
        owner = _class_at(cls, path[:-1])
        known = [f.name for f in dataclasses.fields(owner)] if owner else []
        return f"unknown key {place!r} (given {problem['input']!r}); {nearest(str(path[-1]), known)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"missing value for {place!r}" + ("" if where else f": give {place}=...")
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _class_at(cls: type, path: list[Any]) -> type | None:
    """Follow a path of field names through nested dataclasses and the values of mappings; None where it leads to no dataclass."""
    current: Any = cls
    for part in path:
        hint = get_type_hints(current).get(part) if dataclasses.is_dataclass(current) else None
        if hint is not None:  # else a label inside a mapping of specs
            current = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
    return current if dataclasses.is_dataclass(current) and isinstance(current, type) else None
