"""Label composed cells: compare each with what its files under ``conf/`` say by themselves (see ``cell.labels``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.folders import conf_folder, group_names
from ptqbench.cell.spec import ROLES, RunSpec
from ptqbench.errors import PtqbenchError
from ptqbench.sweeps.resolve import validated

Compose = Callable[[list[str]], dict[str, Any]]


class Naming:
    """Labels cells; what the files of a model and method say is composed once."""

    def __init__(self, compose: Compose) -> None:
        """Start without any file read.

        Args:
            compose: Composes override words to plain data.
        """
        self._compose = compose
        self._composed: dict[tuple[str, ...], RunSpec | None] = {}
        self._names: dict[str, dict[str, str]] = {}

    def __call__(self, spec: RunSpec) -> RunSpec:
        """Name the bits of a cell by their values, and note what else is not as in its files.

        Args:
            spec: A validated cell without digests.

        Returns:
            The same cell: the same identity, with the names that people will read.
        """
        method = self._files("method", spec.method.name)
        bits = [
            self._from([f"method={one}", f"bitwidth={file}"])
            for one in method[:1]
            for file in self._files("bitwidth", spec.bitwidth.name)
        ]
        if not any(named is not None and named.bitwidth == spec.bitwidth for named in bits):
            spec = dataclasses.replace(
                spec, bitwidth=dataclasses.replace(spec.bitwidth, name=labels.bits_name(spec.bitwidth))
            )
        words = [
            f"{group}={file}"
            for group, files in (("method", method), ("model", self._files("model", spec.model.name)))
            for file in files[:1]
        ]
        named = self._from(words)
        if named is None or len(words) < 2:
            return spec
        replaced, words = self._replaced(spec, named, words)
        found = replaced + [path for path in labels.changes(spec, self._from(words) or named) if path not in replaced]
        found.sort(key=lambda path: labels.SECTIONS.index(path.partition(".")[0]))
        return dataclasses.replace(spec, changed=tuple(found))

    def _replaced(self, spec: RunSpec, named: RunSpec, words: list[str]) -> tuple[list[str], list[str]]:
        """Parts for which another file was chosen than the method and model name: their paths, and words that choose it too."""
        paths: list[str] = []
        for path, word in _choices(spec, named):
            group, _, name = word.partition("=")
            tried = [[*words, f"{group}={file}"] for file in self._files(group, name)]
            fitting = [
                (len(labels.changes(spec, found)), one) for one in tried if (found := self._from(one)) is not None
            ]
            if fitting:
                paths, words = [*paths, path], min(fitting)[1]
        return paths, words

    def _from(self, words: Sequence[str]) -> RunSpec | None:
        """The cell that files make by themselves; None where they make none."""
        key = tuple(words)
        if key not in self._composed:
            try:
                self._composed[key] = validated(self._compose(list(words)))
            except PtqbenchError:
                self._composed[key] = None
        return self._composed[key]

    def _files(self, group: str, name: str) -> list[str]:
        """Files of a group that bear a name: by their own name or, where none does, by the one they contain."""
        if group not in self._names:
            self._names[group] = {file: file for file in group_names(group)}
        files = self._names[group]
        return [name] if name in files else [file for file in files if _contained(group, file) == name]


def _choices(spec: RunSpec, named: RunSpec) -> Iterator[tuple[str, str]]:
    for role in ROLES:
        member = getattr(spec.method, role).name
        if member != getattr(named.method, role).name:
            yield f"method.{role}.name", f"method/{role}={member}"
    text, usual = spec.calibration, named.calibration
    if text is not None and usual is not None and text.dataset != usual.dataset:
        yield "calibration.dataset", f"calibration={text.dataset}"
    if spec.evaluation.name != named.evaluation.name:
        yield "evaluation.name", f"evaluation={spec.evaluation.name}"


def _contained(group: str, file: str) -> str | None:
    import yaml

    data = yaml.safe_load((conf_folder() / group / f"{file}.yaml").read_text(encoding="utf-8"))
    return data.get("name") if isinstance(data, dict) else None
