"""Compositions kept between commands, so that a second look at a sweep needs no Hydra. This saves ``plan demo`` 1.2 of 1.6 s.

A composition depends on the configuration files, the override words and the code that composes. The name of the cache file contains
a hash of files, code and user, and its keys are the words, so no entry can be out of date. A file is trusted only if it belongs to
this user, nobody else may write to it, and it contains the digest of its content. So in a cache folder that several people share,
nobody can change the cells of another user. A file that is not trusted, or cannot be read, counts as empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from importlib import metadata
from typing import Any

from ptqbench.cell.folders import cache_folder
from ptqbench.runs.folder import write_text

LARGEST_BYTES = 1 << 24
"""A file that grows beyond this is started afresh."""


class Compositions:
    """Composed data, by the words that they were composed from."""

    def __init__(self, state: dict[str, Any]) -> None:
        """Read what earlier commands composed.

        Args:
            state: What a composition depends on beside its words: configuration files and code, as JSON-able data.
        """
        versions = {name: metadata.version(name) for name in ("hydra-core", "omegaconf")}
        digest = _digest({**state, "versions": versions, "user": os.getuid()})
        self.path = cache_folder() / "compositions" / f"{digest[:16]}.json"
        self._known, self._new = self._read(), False

    def _read(self) -> dict[str, str]:
        try:
            with self.path.open(encoding="utf-8") as stream:
                about = os.fstat(stream.fileno())
                if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    return {}
                found = json.load(stream)
        except (OSError, ValueError, RecursionError):
            return {}
        known = found.get("known") if isinstance(found, dict) else None
        return known if isinstance(known, dict) and found.get("sha256") == _digest(known) else {}

    def get(self, words: list[str]) -> dict[str, Any] | None:
        """A copy of what was composed from these words; None if nothing was."""
        text = self._known.get(json.dumps(words))
        return None if text is None else json.loads(text)

    def put(self, words: list[str], data: dict[str, Any]) -> None:
        """Remember what was composed, if JSON gives it back unchanged."""
        with contextlib.suppress(TypeError, ValueError):
            text = json.dumps(data)
            if json.loads(text) == data:
                self._known[json.dumps(words)], self._new = text, True

    def save(self) -> None:
        """Write what is new, and keep what other processes have written meanwhile."""
        if not self._new:
            return
        known = self._read() | self._known
        text = json.dumps({"known": known, "sha256": _digest(known)})
        if len(text) > LARGEST_BYTES:
            text = "{}"
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text)
            self.path.chmod(0o600)  # a file that the group may write to is not trusted
        self._new = False


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
