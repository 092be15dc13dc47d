"""Compose many cells that share override words, one section of the configuration at a time."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptqbench.cell.folders import conf_texts
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose_cache import Compositions
from ptqbench.sweeps.hydra_compose import compose_data, value_of
from ptqbench.sweeps.words import check_request, section_of

HYDRA_GROUPS = tuple(
    f"hydra/{name}"
    for name in "output help hydra_help env hydra_logging job_logging sweeper launcher".split()  # noqa: SIM905
)
CODE = ("composer.py", "hydra_compose.py", "words.py")


class Composer:
    """Composes cells. Each section of the configuration (model, method, ...) is composed once per set of words about it.

    The result equals that of composing the whole, because a configuration file of ptqbench writes to its own section only. The one
    exception is a method, which chooses the bitwidth where no word does. Cells with words that do not belong to one section
    (Hydra's own settings, deletions, packages, interpolations) are composed whole.
    """

    def __init__(self, compose: Callable[[list[str]], dict[str, Any]] | None = None) -> None:
        """Start with nothing composed.

        Args:
            compose: Composes override words; None is :func:`compose_data`.
        """
        self._trims = compose is None  # else Hydra composes a job of a multirun, and wants its settings
        self._compose_words = compose or self._remembered
        self._read: dict[str, Any] = {}
        self._sections: dict[tuple[str, tuple[str, ...]], bytes] = {}
        self._whole: dict[str, Any] | None = None
        files = conf_texts()
        # A file of the user may write to another section than its own.
        self._interpolates = any("${" in text or "@package" in text for text in files.values())
        code = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CODE}
        self._before = None if compose or self._interpolates else Compositions({"files": files, "code": code})

    def __call__(self, words: list[str]) -> dict[str, Any]:
        """Compose override words to plain data, as :func:`compose_data` does."""
        # Hydra wants "+method=x"; without the sign the word has the form of the others.
        words = [word.removeprefix("+") if re.match(r"\+method=", word) else word for word in words]
        owners = [section_of(word) for word in words]
        if self._interpolates or None in owners:
            return self._compose_words(words)
        check_request(words)
        choice = [word for word in words if word.startswith("method=")]
        try:
            data = self._by_sections(words, owners, choice)
        except ConfigError:  # composing the whole tells what is wrong in view of all words
            return self._compose_words(words)
        # A word about a section that does not exist has been read by nobody.
        return data if data.keys() >= set(owners) else self._compose_words(words)

    def _remembered(self, words: list[str]) -> dict[str, Any]:
        """Compose words, unless an earlier command did."""
        data = None if self._before is None else self._before.get(words)
        if data is None:
            data = compose_data(words, self._read)
            if self._before is not None:
                self._before.put(words, data)
        return data

    def save(self) -> None:
        """Keep what was composed for later commands."""
        if self._before is not None:
            self._before.save()

    def _by_sections(self, words: list[str], owners: list[str | None], choice: list[str]) -> dict[str, Any]:
        """Compose a cell section by section; ``choice`` is the word that chooses the method."""
        data = {}
        for section in self._usual(choice):
            about = [word for word, owner in zip(words, owners, strict=True) if owner == section]
            # A method chooses the bitwidth where no word does.
            if section == "bitwidth" and not any(word.startswith("bitwidth=") for word in about):
                about = choice + about
            data[section] = pickle.loads(self._compose(section, about, choice))
        return data

    def _usual(self, choice: list[str]) -> dict[str, Any]:
        """All sections as they are with the method alone."""
        if self._whole is None:
            self._whole = self._compose_words(choice)
        return self._whole

    def _compose(self, section: str, about: list[str], choice: list[str]) -> bytes:
        """Compose a section and pickle it: each cell needs a copy of its own, and unpickling is the fastest way to copy."""
        key = (section, tuple(about))
        if key not in self._sections:
            self._sections[key] = pickle.dumps(self._compose_section(section, about, choice))
        return self._sections[key]

    def _compose_section(self, section: str, about: list[str], choice: list[str]) -> Any:
        usual = self._usual(choice)
        if not about:
            return usual[section]
        if len(about) == 1 and about[0].startswith(f"{section}=") and not isinstance(usual[section], dict):
            return value_of(about[0])  # such as the seed
        has_method = any(word.startswith("method=") for word in about)
        given = about if has_method else [*choice, *about]
        others = [name for name, value in usual.items() if isinstance(value, dict) and name not in (section, "method")]
        return self._compose_words([*given, *self._without(others)])[section]

    def _without(self, sections: list[str]) -> list[str]:
        """Words that delete sections and Hydra's own settings from a composition, which halves its time."""
        return [f"~{name}" for name in (*sections, *HYDRA_GROUPS)] if self._trims else []
