"""Read the cells of many run folders, validating and serialising only once what they share.

The text of ``spec.json`` is split into the fields of the cell, which its indentation shows. A field whose exact text was part of a
valid cell before is not validated again, and the canonical JSON of its identity is known. A cell of such fields alone is put
together from them and hashed as usual. A file with a new field, or with another layout, is read as a whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from ptqbench.cell.fingerprint import identity_id, identity_texts, revision_texts
from ptqbench.cell.spec import RunSpec
from ptqbench.runs.folder import RunFolder

SPECS = TypeAdapter(RunSpec)
FIELD = b'\n  "'
"""The text before every field of the cell in an indented file. It is in no value, because a string of JSON holds no line break."""
SPACE = b" \t\r\n"


class SpecReader:
    """Reads cells, and remembers every field that it has seen by its text."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[str, Any, str | None]] = {}

    def read(self, folder: RunFolder) -> tuple[RunSpec, dict[str, str]]:
        """Read a cell and its identity (``fingerprint.identity_texts``).

        Raises:
            ConfigError: As ``RunFolder.read_spec``, which says what is wrong.
        """
        with contextlib.suppress(OSError, ValueError):
            content = folder.spec_bytes()
            fields = _fields(content)
            found = self._put_together(fields) or self._read(content, fields)
            if identity_id(found[1]) == folder.run_id:
                return found
        # The fast way failed or gave another cell: the slow way reads it, or says what is wrong.
        spec = folder.read_spec()
        return spec, identity_texts(spec)

    def _put_together(self, fields: Sequence[bytes]) -> tuple[RunSpec, dict[str, str]] | None:
        """A cell of known fields; None where one is new or given twice."""
        known = [self._known.get(field) for field in fields]
        given = [field for field in known if field is not None]
        values = {name: value for name, value, _ in given}
        if not values or len(values) < len(known):
            return None
        spec = RunSpec(**values)
        return spec, {name: text for name, _, text in given if text is not None} | revision_texts(spec)

    def _read(self, content: bytes, fields: Sequence[bytes]) -> tuple[RunSpec, dict[str, str]]:
        """Validate a whole cell, and remember its fields unless one is given twice."""
        spec = SPECS.validate_json(content)
        texts = identity_texts(spec)
        names = [_name(field) for field in fields]
        if len(set(names) - {None}) == len(names):
            for name, field in zip(map(str, names), fields, strict=True):
                self._known[field] = name, getattr(spec, name), texts.get(name)
        return spec, texts


def _fields(content: bytes) -> list[bytes]:
    """Split the text of an indented object into its members; an empty list where the layout is not that of ``write_json``."""
    head, *fields = content.split(FIELD)
    last = fields[-1].rstrip(SPACE) if fields else b""
    if head != b"{" or not last.endswith(b"}") or not all(field.endswith(b",") for field in fields[:-1]):
        return []
    return [*(field[:-1] for field in fields[:-1]), last[:-1].rstrip(SPACE)]


def _name(field: bytes) -> str | None:
    """The name of a member; None if the text is not exactly one member of an object."""
    try:
        member = json.loads(b'{"' + field + b"}")
    except ValueError:
        return None
    return next(iter(member)) if len(member) == 1 else None
