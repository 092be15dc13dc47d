"""How the fields of a cell are declared: identity or execution, and the types that they share. Imports neither torch nor hydra."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field

IDENTITY, EXECUTION = "identity", "execution"
UNTOUCHED_BITS = 16

Bits = Annotated[int, Field(ge=2, le=UNTOUCHED_BITS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


def identity(**kwargs: Any) -> Any:
    """Declare a field that enters the run id."""
    return dataclasses.field(metadata={"role": IDENTITY}, **kwargs)


def added(default: Any) -> Any:
    """Declare an identity field that did not exist from the start, of a spec or of a member of a role.

    It enters the run id only where it differs from its default. Older cells therefore keep their identity, provided that the
    default gives the same bytes as the code before the field existed.
    """
    return dataclasses.field(default=default, metadata={"role": IDENTITY, "added": True})


def left_at_default(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field was declared with ``added`` and has its default, so that it stays out of the identity."""
    return bool(field.metadata.get("added")) and value == field.default


def execution(**kwargs: Any) -> Any:
    """Declare a field that does not change any number: a label, a place, a device, a degree of verbosity."""
    return dataclasses.field(metadata={"role": EXECUTION}, **kwargs)
