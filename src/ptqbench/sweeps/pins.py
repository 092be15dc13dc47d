"""Content by digest: a cell is pinned to its model, texts, task data and files when it is composed, and checked when it runs.

In between, a cell may wait in a queue for days. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ptqbench.cell.registry import file_options
from ptqbench.cell.spec import ROLES, CalibrationSpec, ModelSpec, PerplexitySpec, Role, RoleSpec, RunSpec, TextSpec
from ptqbench.data import hub
from ptqbench.data.overlap import check_disjoint
from ptqbench.data.protocols import complete as complete_text
from ptqbench.data.task_sizes import size_of
from ptqbench.data.tasks import requested, task_digest, task_digests, writes
from ptqbench.data.texts import check_options, check_text, text_digest
from ptqbench.data.window_files import pin_windows
from ptqbench.errors import ConfigError, PtqbenchError, UnsupportedError, unreadable
from ptqbench.evaluate.task_files import check_tasks
from ptqbench.models import source
from ptqbench.models.family import Norms, family_of
from ptqbench.sweeps.lengths import check_length

T = TypeVar("T")
Text = TypeVar("Text", CalibrationSpec, PerplexitySpec)
DTYPES = ("float32", "bfloat16", "float16")


class Known:
    """What has been looked up, on disk and on the hub, so that the cells of one command share it."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], look: Callable[[], T]) -> T:
        """Look something up once. An error is remembered too, so that every cell which it concerns has it, and none waits again."""
        if key not in self._found:
            try:
                self._found[key] = look()
            except PtqbenchError as error:
                self._found[key] = error
        found: T | PtqbenchError = self._found[key]
        if isinstance(found, PtqbenchError):
            raise found.with_traceback(None)
        return found

    def config(self, model: ModelSpec) -> dict[str, Any]:
        """The ``config.json`` of a model."""
        return self.checkpoint(model).config

    def checkpoint(self, model: ModelSpec) -> source.ModelSource:
        """The folder of a model."""
        return self._once(("checkpoint", model), lambda: source.locate(model, weights=False))

    def model_digest(self, model: ModelSpec) -> str:
        """The content digest of a model."""
        return self._once(("digest", model), lambda: source.digest(model))

    def pinned(self, text: Text, where: str, model: ModelSpec) -> Text:
        """The same text with its digest. A text on this machine is read, and must fill a window of the model."""

        def look() -> Text:
            digest = text_digest(text, self.commit)
            check_text(text)
            check_length(text, where, self.checkpoint(model).folder)
            return dataclasses.replace(text, digest=digest)

        return self._once(("text", text, where, model), look)

    def calibration(self, spec: CalibrationSpec, model: ModelSpec) -> CalibrationSpec:
        """The same calibration data with their digest."""
        if spec.windows is None:
            return self.pinned(spec, "calibration", model)
        return self._once(("windows", spec), lambda: pin_windows(spec))

    def commit(self, repository: str, revision: str) -> str:
        """The commit that a revision of a hub data set names now. All cells of a command get the same one.

        Raises:
            DataNotHereError: As ``hub.commit_of``.
        """
        return self._once(("commit", repository, revision), lambda: hub.commit_of(repository, revision))


def pin(spec: RunSpec, known: Known) -> RunSpec:
    """Fill in content digests and the data type, and drop calibration and seed where they cannot change the result.

    Raises:
        ConfigError: A missing or unreadable file, overlapping texts, windows longer than the context of the model, a task or
            metric that lm-eval does not have.
        CalibrationError: A text that is shorter than one window.
        UnsupportedError: An architecture or a data type that the code cannot serve.
        NotHereError: A hub model that is not on this machine, or a hub data set whose branch names no commit here.
    """
    # What is wrong with the request itself is said first, whether or not its model and data are here.
    _check_options(spec)
    check_tasks(spec.evaluation.tasks)
    model = dataclasses.replace(spec.model, digest=known.model_digest(spec.model), dtype=_dtype(spec.model, known))
    calibration = known.calibration(spec.calibration, spec.model) if spec.calibrates and spec.calibration else None
    # A text is read by its protocol, and must not contain what calibration may have seen.
    texts: dict[str, PerplexitySpec] = {}
    for label, text in spec.evaluation.texts.items():
        where = f"evaluation.texts.{label}"
        texts[label] = known.pinned(complete_text(text, where), where, spec.model)
        if calibration is not None:
            check_disjoint(calibration, texts[label], label)
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
    _check_outliers(found.model, known.config(spec.model))
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


def _check_outliers(model: ModelSpec, config: Mapping[str, Any]) -> None:
    """Refuse more outlier channels than the residual stream has, and blocks that have no place for them."""
    width, kind = config.get("hidden_size"), config.get("model_type")
    if isinstance(width, int) and model.outlier_channels > width:
        raise ConfigError(
            f"model.outlier_channels={model.outlier_channels}: expected 0 to {width}, the hidden size of {model.name!r}"
        )
    if model.outlier_channels and family_of(kind).norms != Norms():
        raise ConfigError(
            f"model.outlier_channels={model.outlier_channels}: expected a model with the norms of Llama, got a {kind} model"
        )


def _check_context(spec: RunSpec, context: Any) -> None:
    """Refuse evaluation windows that are longer than the context of the model, unless ``execution.beyond_context`` permits them.

    A task whose answers may fill the context is always refused, since lm-eval refuses it.

    Longer calibration windows are the default of some methods and no measurement; the result notes them (``engine.work``).
    """
    lengths = {f"evaluation.texts.{label}.seq_len": text.seq_len for label, text in spec.evaluation.texts.items()}
    for place, length in lengths.items():
        if isinstance(context, int) and length > context and not spec.execution.beyond_context:
            raise ConfigError(
                f"{place}={length} is longer than the context of model {spec.model.name!r} (max_position_embeddings="
                f"{context}): give {place}={context} or less, or say execution.beyond_context=true to measure there anyway"
            )
    for task in requested(spec.evaluation.tasks):
        room = size_of(task).most_written
        if isinstance(context, int) and room >= context:
            raise ConfigError(
                f"evaluation.tasks: {task!r} leaves room for {room} written tokens, expected fewer than the context of model "
                f"{spec.model.name!r} (max_position_embeddings={context}): leave the task out, or take another model"
            )


def _pin_files(role: Role, member: RoleSpec) -> RoleSpec:
    """Replace the path of every file among the options of a member by its digest; the path goes to ``files``."""
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
    """Refuse to measure content other than that in the identity of a cell.

    Files up to 64 MiB are read again; larger ones only where size, times or inode differ from what the digest cache has. Data sets
    of the hub are read at a commit, so they cannot change.

    Args:
        spec: The resolved cell. Content without a digest is not checked.

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
    """Everything that a cell reads: its name, its digest in the identity, and a function that finds its digest now."""
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
