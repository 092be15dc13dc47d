"""Content by digest: a cell is pinned to its model, texts, task data and files when it is composed, and checked when it runs.

Between the two moments a cell may wait in a queue for days. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptqbench.cell.registry import file_options
from ptqbench.cell.spec import ROLES, CalibrationSpec, ModelSpec, Role, RoleSpec, RunSpec, TextSpec
from ptqbench.data import hub
from ptqbench.data.overlap import check_disjoint
from ptqbench.data.protocols import complete as complete_text
from ptqbench.data.tasks import task_digest, task_digests, writes
from ptqbench.data.texts import check_options, check_text, text_digest
from ptqbench.data.window_files import pin_windows
from ptqbench.errors import ConfigError, DataNotHereError, UnsupportedError, unreadable
from ptqbench.models import source

DTYPES = ("float32", "bfloat16", "float16")


class Known:
    """What has been looked up on disk already, so that the cells of one command share it. Lives as long as the command."""

    def __init__(self) -> None:
        self._digests: dict[Any, str] = {}
        self._windows: dict[CalibrationSpec, CalibrationSpec] = {}
        self._sources: dict[ModelSpec, source.ModelSource] = {}
        self._commits: dict[tuple[str, str], str | DataNotHereError] = {}

    def config(self, model: ModelSpec) -> dict[str, Any]:
        """The ``config.json`` of a model."""
        return self.checkpoint(model).config

    def checkpoint(self, model: ModelSpec) -> source.ModelSource:
        """The folder of a model."""
        if model not in self._sources:
            self._sources[model] = source.locate(model, weights=False)
        return self._sources[model]

    def model_digest(self, model: ModelSpec) -> str:
        """The content digest of a model."""
        if model not in self._digests:
            self._digests[model] = source.digest(model)
        return self._digests[model]

    def text_digest(self, text: TextSpec) -> str:
        """The content digest of a text, which can be read if it lies on this machine."""
        if text not in self._digests:
            self._digests[text] = text_digest(text, self.commit)
            check_text(text)
        return self._digests[text]

    def calibration(self, spec: CalibrationSpec) -> CalibrationSpec:
        """The same calibration data with their digest."""
        if spec.windows is None:
            return dataclasses.replace(spec, digest=self.text_digest(spec))
        if spec not in self._windows:
            self._windows[spec] = pin_windows(spec)
        return self._windows[spec]

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


def pin(spec: RunSpec, known: Known) -> RunSpec:
    """Fill in content digests and the data type, and drop what cannot matter to an unquantized cell.

    Raises:
        ConfigError: A missing or unreadable file, overlapping texts, windows longer than the context of the model.
        UnsupportedError: An architecture or a data type that the code cannot serve.
        NotHereError: A hub model that is not on this machine, or a hub data set whose branch names no commit here.
    """
    model = dataclasses.replace(spec.model, digest=known.model_digest(spec.model), dtype=_dtype(spec.model, known))
    _check_options(spec)
    calibration = known.calibration(spec.calibration) if spec.calibrates and spec.calibration is not None else None
    named = {label: complete_text(text, f"evaluation.texts.{label}") for label, text in spec.evaluation.texts.items()}
    texts = {label: dataclasses.replace(text, digest=known.text_digest(text)) for label, text in named.items()}
    for label, text in texts.items():
        if calibration is not None:
            check_disjoint(calibration, text, label)
    tasks = task_digests(spec.evaluation, known.commit)
    generation = known.checkpoint(spec.model).generation_digest if writes(spec.evaluation.tasks) else None
    pinned: dict[str, Any] = {role: _pin_files(role, getattr(spec.method, role)) for role in ROLES}
    found = dataclasses.replace(
        spec,
        model=model,
        method=dataclasses.replace(spec.method, **pinned),
        calibration=calibration,
        evaluation=dataclasses.replace(spec.evaluation, texts=texts, task_digests=tasks, generation_digest=generation),
        seed=spec.seed if spec.calibrates else 0,
    )
    _check_context(found, known.config(spec.model).get("max_position_embeddings"))
    return found


def _check_options(spec: RunSpec) -> None:
    texts: dict[str, TextSpec] = {f"evaluation.texts.{label}": text for label, text in spec.evaluation.texts.items()}
    if spec.calibrates and spec.calibration is not None:
        texts["calibration"] = spec.calibration
    for where, text in texts.items():
        check_options(text, where)


def _dtype(model: ModelSpec, known: Known) -> Any:
    dtype = model.dtype if model.dtype != "auto" else known.checkpoint(model).dtype
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"the checkpoint stores {dtype!r}; expected one of {', '.join(DTYPES)}: give model.dtype=..."
        )
    return dtype


def _check_context(spec: RunSpec, context: Any) -> None:
    """Refuse to measure in windows that are longer than what the model was made for, unless they are asked for.

    Longer calibration windows are a remark of the result (``engine.work``): they are the default of a method, not a measurement.
    """
    lengths = {f"evaluation.texts.{label}.seq_len": text.seq_len for label, text in spec.evaluation.texts.items()}
    for place, length in lengths.items():
        if isinstance(context, int) and length > context and not spec.execution.beyond_context:
            raise ConfigError(
                f"{place}={length} is longer than the context of model {spec.model.name!r} (max_position_embeddings="
                f"{context}): give {place}={context} or less, or say execution.beyond_context=true to measure there anyway"
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


def check_unchanged(spec: RunSpec) -> None:
    """Refuse to measure anything but the content that the identity of a cell names.

    Small files are read again. Those over 64 MiB are read again where size, times or inode differ from what the digest cache
    remembers. Data sets of the hub are read at the commit that names them, so they cannot change.

    Args:
        spec: The resolved cell. What has no digest is not looked at.

    Raises:
        ConfigError: Something has changed, or is no longer there.
        StorageError: Something cannot be read now.
    """
    for what, pinned, look in _contents(spec):
        try:
            found = look() if pinned is not None else None
        except OSError as error:
            raise unreadable(error, f"{what} can no longer be read") from error
        if found != pinned:
            raise ConfigError(
                f"{what} has changed since this cell was composed: expected the content {pinned}, found {found}; "
                f"put the old content back, or ask for the cell again, which then is another one"
            )


def _contents(spec: RunSpec) -> Iterator[tuple[str, str | None, Callable[[], str]]]:
    """Everything a cell reads: what it is, its digest in the identity, and how to find the digest of what lies there now."""
    model, data = spec.model, spec.calibration
    yield f"model {model.path or model.hub_id or model.name}", model.digest, lambda: source.digest(model)
    if writes(spec.evaluation.tasks):
        what = f"generation_config.json of model {model.path or model.hub_id or model.name}"
        yield what, str(spec.evaluation.generation_digest), lambda: str(source.locate(model).generation_digest)
    texts: list[tuple[str, TextSpec]] = [("calibration text", data)] if data and data.windows is None else []
    texts += [(f"text of evaluation.texts.{label}", text) for label, text in spec.evaluation.texts.items()]
    for what, text in texts:
        if not hub.is_identity(text.digest):
            yield f"{what} {text.path or text.dataset}", text.digest, lambda text=text: text_digest(text)  # type: ignore[misc]
    if data and data.windows is not None:
        yield f"calibration.windows={data.windows}", data.digest, lambda: str(pin_windows(data).digest)
    for task, pinned in spec.evaluation.task_digests.items():
        if not hub.is_identity(pinned):
            yield f"data of task {task}", pinned, lambda task=task: task_digest(spec.evaluation, task, hub.commit_of)  # type: ignore[misc]
    for role in ROLES:
        member: RoleSpec = getattr(spec.method, role)
        for option, digest in file_options(role, member.name).items():
            if option in member.files:
                path = Path(member.files[option])
                yield (
                    f"method.{role}.{option}={path}",
                    member.options[digest],
                    functools.partial(source.file_digest, path),
                )
