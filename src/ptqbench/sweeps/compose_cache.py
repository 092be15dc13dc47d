"""What was composed before, so that looking at a sweep again needs no Hydra: half of what ``plan`` and ``status`` take.

A composition is a function of the configuration files, the words, and the code that composes. They make up the name of the file in
the user's cache folder and the keys in it, so that nothing in it can be out of date; a file that cannot be read or written counts
as empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ptqbench.cell.folders import cache_folder
from ptqbench.runs.folder import write_text

LARGEST_BYTES = 1 << 24
"""A file above this is begun anew."""


class Compositions:
    """Composed data by the words they were composed from."""

    def __init__(self, files: Mapping[str, str], code: Path) -> None:
        """Read what is known about a state of the configuration.

        Args:
            files: Every configuration file, name -> text.
            code: The module that composes.
        """
        state = {name: metadata.version(name) for name in ("hydra-core", "omegaconf")}
        state |= {"code": code.read_text(encoding="utf-8"), "files": json.dumps(files, sort_keys=True)}
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / "compositions" / f"{digest}.json"
        self._known, self._new = self._read(), False

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def get(self, words: list[str]) -> dict[str, Any] | None:
        """What was composed from these words, a copy of its own; None if nothing was."""
        text = self._known.get(json.dumps(words))
        return json.loads(text) if isinstance(text, str) else None

    def put(self, words: list[str], data: dict[str, Any]) -> None:
        """Remember what was composed, if it is plain data."""
        with contextlib.suppress(TypeError, ValueError):
            text = json.dumps(data)
            if json.loads(text) == data:
                self._known[json.dumps(words)], self._new = text, True

    def save(self) -> None:
        """Write what is new, beside what others have written meanwhile."""
        if not self._new:
            return
        text = json.dumps(self._read() | self._known)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text if len(text) <= LARGEST_BYTES else json.dumps({}))
        self._new = False
