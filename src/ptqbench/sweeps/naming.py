"""Label composed cells: what differs from the files under ``conf/`` that a cell is named after (``cell.labels``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.folders import group_files, group_names
from ptqbench.cell.spec import ROLES, RunSpec
from ptqbench.errors import PtqbenchError
from ptqbench.sweeps.resolve import validated

OWN = "local"
"""The file of ``conf/model`` that a model under a name of one's own is compared with."""
Compose = Callable[[list[str]], dict[str, Any]]


class Naming:
    """Labels cells. What the files of a model and a method contain is composed once."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self._composed: dict[tuple[str, ...], RunSpec | None] = {}
        self._names: dict[str, dict[str, str]] = {}

    def __call__(self, spec: RunSpec) -> RunSpec:
        """Label a cell; its identity stays the same.

        Args:
            spec: A validated cell without digests.

        Returns:
            The cell with its bits named by their values where no file has them, and with ``changed`` filled in.
        """
        method = next(iter(self._files("method", spec.method.name)), None)
        model = next(iter(self._files("model", spec.model.name)), None)
        spec = self._with_bits_named(spec, method)
        words = [f"method={method}", f"model={model or OWN}"]
        named = self._from(words) if method else None
        if named is None:
            return spec
        replaced, words = self._replaced(spec, named, words)
        named = self._from(words) or named
        if model is None:  # a name of one's own says which checkpoint it is
            places = {name: getattr(spec.model, name) for name in labels.PLACES if hasattr(spec.model, name)}
            named = dataclasses.replace(named, model=dataclasses.replace(named.model, **places))
        found = replaced + [path for path in labels.changes(spec, named) if path not in replaced]
        found.sort(key=lambda path: labels.SECTIONS.index(path.partition(".")[0]))
        return dataclasses.replace(spec, changed=tuple(found))

    def _with_bits_named(self, spec: RunSpec, method: str | None) -> RunSpec:
        """Keep the name of the bitwidth only where a file of that name has exactly these bits."""
        files = self._files("bitwidth", spec.bitwidth.name) if method else []
        found = [self._from([f"method={method}", f"bitwidth={file}"]) for file in files]
        if any(named is not None and named.bitwidth == spec.bitwidth for named in found):
            return spec
        return dataclasses.replace(
            spec, bitwidth=dataclasses.replace(spec.bitwidth, name=labels.bits_name(spec.bitwidth))
        )

    def _replaced(self, spec: RunSpec, named: RunSpec, words: list[str]) -> tuple[list[str], list[str]]:
        """Parts for which another file was chosen than method and model say: their paths, and ``words`` with these choices."""
        paths: list[str] = []
        for path, word in _choices(spec, named):
            group, _, name = word.partition("=")
            # Several files may contain the name. The one that leaves the fewest differences is taken for the chosen one.
            tried = [[*words, f"{group}={file}"] for file in self._files(group, name)]
            fitting = [
                (len(labels.changes(spec, found)), one) for one in tried if (found := self._from(one)) is not None
            ]
            if fitting:
                paths, words = [*paths, path], min(fitting)[1]
        return paths, words

    def _from(self, words: Sequence[str]) -> RunSpec | None:
        """The cell that files make by themselves; None where they do not make a valid one."""
        key = tuple(words)
        if key not in self._composed:
            try:
                self._composed[key] = validated(self._compose(list(words)))
            except PtqbenchError:
                self._composed[key] = None
        return self._composed[key]

    def _files(self, group: str, name: str) -> list[str]:
        """The file of a group with this name, else those whose content has it as ``name``."""
        if group not in self._names:
            self._names[group] = {file: file for file in group_names(group)}
        files = self._names[group]
        return [name] if name in files else [file for file in files if _contained(group, file) == name]


def _choices(spec: RunSpec, named: RunSpec) -> Iterator[tuple[str, str]]:
    """Parts in which a cell has another name than its files: path of the part, and the word that may have chosen it."""
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

    data = yaml.safe_load(group_files(group)[file].read_text(encoding="utf-8"))
    return data.get("name") if isinstance(data, dict) else None
