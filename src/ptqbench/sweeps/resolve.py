"""From composed configuration to a cell: fill in defaults that depend on other choices, validate, pin content by digest.

Everything a user can get wrong is found here, before a run folder exists. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptqbench.cell.registry import complete, create, file_options
from ptqbench.cell.spec import ROLES, ModelSpec, Role, RoleSpec, RunSpec, TextSpec, build, nearest
from ptqbench.data import hub
from ptqbench.data.protocols import complete as complete_text
from ptqbench.data.tasks import task_digests
from ptqbench.data.texts import check_disjoint, text_digest
from ptqbench.errors import ConfigError, DataNotHereError, UnsupportedError
from ptqbench.models import source
from ptqbench.models.architecture import from_config

DEFAULT_EVALUATION: dict[str, Any] = {
    "name": "wikitext2",
    "texts": {"wikitext2": {"dataset": "wikitext2", "split": "test", "seq_len": 2048}},
    "tasks": [],
    "batch_size": 8,
}
DTYPES = ("float32", "bfloat16", "float16")


class Known:
    """What has been looked up on disk already, so that the cells of one command share it. Lives as long as the command."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self._digests: dict[Any, str] = {}
        self._configs: dict[ModelSpec, dict[str, Any]] = {}
        self._commits: dict[tuple[str, str], str | DataNotHereError] = {}

    def config(self, model: ModelSpec) -> dict[str, Any]:
        """The ``config.json`` of a model."""
        if model not in self._configs:
            self._configs[model] = source.locate(model, weights=False).config
        return self._configs[model]

    def model_digest(self, model: ModelSpec) -> str:
        """The content digest of a model."""
        if model not in self._digests:
            self._digests[model] = source.digest(model)
        return self._digests[model]

    def text_digest(self, text: TextSpec) -> str:
        """The content digest of a text."""
        if text not in self._digests:
            self._digests[text] = text_digest(text, self.commit)
        return self._digests[text]

    def commit(self, repository: str, revision: str) -> str:
        """The commit that a revision of a hub data set names; asked once, so that all cells of a command agree.

        Raises:
            DataNotHereError: As ``hub.commit_of``.
        """
        key = (repository, revision)
        if key not in self._commits:
            try:
                self._commits[key] = hub.commit_of(repository, revision)
            except DataNotHereError as error:  # remembered too: without network every look takes its time
                self._commits[key] = error
        found = self._commits[key]
        if isinstance(found, DataNotHereError):
            raise DataNotHereError(str(found), repository)
        return found


def resolve(config: Mapping[str, Any], known: Known | None = None) -> RunSpec:
    """Turn a composed configuration into a validated cell with content digests.

    Args:
        config: Plain data as Hydra composed it; not modified. ``model`` and ``method`` may carry ``calibration`` and
            ``evaluation`` defaults, used where the top-level sections leave a value null.
        known: Shared by the cells of one command.

    Returns:
        The cell.

    Raises:
        ConfigError: Unknown key, wrong type, impossible value, missing file, overlapping texts.
        UnsupportedError: An architecture or a data type that the code cannot serve.
        NotHereError: A hub model that is not on this machine, or a hub data set whose branch names no commit here.
    """
    return pin(_validated(config), known or Known())


def skip_reason(spec: RunSpec, known: Known | None = None) -> str | None:
    """Say why the cell makes no sense (first objection of its four roles), or None."""
    architecture = from_config((known or Known()).config(spec.model))
    members = [create(role, getattr(spec.method, role)) for role in ROLES]
    reasons = (member.skip_reason(spec, architecture) for member in members)
    return next((reason for reason in reasons if reason is not None), None)


def validated(config: Mapping[str, Any]) -> RunSpec:
    """Validate a composed configuration without looking at model or texts: everything of the cell but digests and data type."""
    return _validated(config)


def _validated(config: Mapping[str, Any]) -> RunSpec:
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for section in ("model", "method", "bitwidth", "calibration", "evaluation"):
        if not isinstance(data.get(section), dict):
            raise ConfigError(f"section {section!r} is missing or not a mapping: choose one with {section}=NAME")
    model, method = data["model"], data["method"]
    defaults = {key: model.pop(key, None) or {} for key in ("calibration", "evaluation")}
    fallback = {key: method.pop(key, None) or {} for key in ("calibration", "evaluation")}
    data["calibration"] = _fill(data["calibration"], "dataset", defaults["calibration"] or fallback["calibration"])
    evaluation = defaults["evaluation"] or fallback["evaluation"] or DEFAULT_EVALUATION
    data["evaluation"] = _fill(data["evaluation"], "texts", evaluation)
    for role in ROLES:
        given = method.get(role)
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"method.{role}: expected a mapping with a name, got {given!r}; choose one with method/{role}=NAME"
            )
        method[role] = dataclasses.asdict(complete(role, given))
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(RunSpec)})
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r}; {nearest(unknown[0], [f.name for f in dataclasses.fields(RunSpec)])}"
        )
    return build(RunSpec, data)


def _fill(given: dict[str, Any], witness: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a section whose ``witness`` value is null from defaults; values that were given stay."""
    base = {} if given.get(witness) is not None else defaults
    return {**base, **{key: value for key, value in given.items() if value is not None or key not in base}}


def pin(spec: RunSpec, known: Known) -> RunSpec:
    """Fill in content digests and the data type of a validated cell, and drop what cannot matter to an unquantized one.

    Raises:
        PtqbenchError: As ``resolve``.
    """
    config = known.config(spec.model)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = spec.model.dtype if spec.model.dtype != "auto" else stored
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"the checkpoint stores {dtype!r}; expected one of {', '.join(DTYPES)}: give model.dtype=..."
        )
    model = dataclasses.replace(spec.model, digest=known.model_digest(spec.model), dtype=dtype)  # type: ignore[arg-type]
    calibration = None
    if spec.quantizes and spec.calibration is not None:
        calibration = dataclasses.replace(spec.calibration, digest=known.text_digest(spec.calibration))
    named = {label: complete_text(text, f"evaluation.texts.{label}") for label, text in spec.evaluation.texts.items()}
    texts = {label: dataclasses.replace(text, digest=known.text_digest(text)) for label, text in named.items()}
    for label, text in texts.items():
        if calibration is not None:
            check_disjoint(calibration, text, label)
    pinned: dict[str, Any] = {role: _pin_files(role, getattr(spec.method, role)) for role in ROLES}
    return dataclasses.replace(
        spec,
        model=model,
        method=dataclasses.replace(spec.method, **pinned),
        calibration=calibration,
        evaluation=dataclasses.replace(
            spec.evaluation, texts=texts, task_digests=task_digests(spec.evaluation, known.commit)
        ),
        seed=spec.seed if spec.quantizes else 0,
    )


def _pin_files(role: Role, member: RoleSpec) -> RoleSpec:
    """Put the digest of every file that a member reads among its options, and the path aside."""
    options, files = dict(member.options), dict(member.files)
    for option, digest in file_options(role, member.name).items():
        given = options.get(option)
        if given is None:
            continue
        path = Path(given).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"method.{role}.{option}={given!r}: no such file (looked in {Path.cwd()})")
        files[option], options[option], options[digest] = str(path), None, source.file_digest(path)
    return dataclasses.replace(member, options=options, files=files)
