"""Load everything that cells need from the network, on a node that has one; afterwards they run without it.

Models, tokenizers, texts and tasks are loaded by the functions that a run calls, so a run finds what was loaded. The manifest lists
what was loaded, from which revision, and what could not be.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import EvaluationSpec, ModelSpec, PerplexitySpec, TextSpec
from ptqbench.errors import PtqbenchError, StorageError
from ptqbench.runs.files import write_json
from ptqbench.sweeps.cells import Cell


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that was loaded, or could not be.

    Attributes:
        kind: ``model``, ``text`` or ``task``; ``cell`` for a cell that could not be validated.
        name: Its name.
        detail: Where it is and its revision, or why it could not be loaded.
        loaded: Whether it was loaded.
    """

    kind: str
    name: str
    detail: str
    loaded: bool


def prefetch(cells: Iterable[Cell], manifest: Path, say: Callable[[Item], None] = lambda item: None) -> list[Item]:
    """Load what cells need.

    Args:
        cells: Cells with a draft, whose digests may be missing, or with a problem.
        manifest: JSON file to write.
        say: Called with every item as soon as it is loaded or has failed.

    Returns:
        Every item once, in the order of first need. A cell with a problem is an item that could not be loaded.

    Raises:
        StorageError: The manifest cannot be written.
    """
    # First collect what is to be loaded, so that cells which share something load it once.
    wanted: dict[tuple[str, Any], Callable[[], str]] = {}
    for cell in cells:
        if cell.draft is None:
            wanted["cell", (cell.name,)] = lambda problem=cell.problem: _refused(problem)  # type: ignore[misc]
            continue
        spec = cell.draft
        wanted.setdefault(("model", _key(spec.model)), lambda model=spec.model: _model(model))  # type: ignore[misc]
        texts = [
            *spec.evaluation.texts.values(),
            *([spec.calibration] if spec.calibration and spec.calibration.windows is None and spec.calibrates else []),
        ]
        for text in texts:
            wanted.setdefault(("text", _key(text)), lambda text=text: _text(text))  # type: ignore[misc]
        for task in dict.fromkeys(word.partition("/")[0] for word in spec.evaluation.tasks):
            key = ("task", (task, spec.evaluation.data_dir))
            wanted.setdefault(key, lambda task=task, e=spec.evaluation: _task(task, e))  # type: ignore[misc]
    items = []
    for (kind, key), load in wanted.items():
        name = str(key[0])
        try:
            item = Item(kind, name, load(), loaded=True)
        except (PtqbenchError, OSError) as error:  # e.g. a full disk
            item = Item(kind, name, " ".join(str(error).split()), loaded=False)
        say(item)
        items.append(item)
    try:
        write_json(manifest, {"time": time.time(), "items": [dataclasses.asdict(item) for item in items]})
    except OSError as error:
        raise StorageError.of(error, f"{manifest} cannot be written") from error
    return items


def _refused(problem: PtqbenchError) -> str:
    raise problem


def _key(value: ModelSpec | TextSpec) -> tuple[Any, ...]:
    if isinstance(value, ModelSpec):
        return value.hub_id or value.path or value.name, value.revision
    return f"{value.dataset} {value.split or ''}".strip(), value.revision, value.path


def _model(spec: ModelSpec) -> str:
    from ptqbench.data.tokenizer import load_tokenizer
    from ptqbench.models import source

    found = source.locate(spec)
    found.check_files()
    load_tokenizer(found.folder)
    return f"{source.digest(spec)} in {found.folder}"


def _text(spec: TextSpec) -> str:
    from ptqbench.data.protocols import complete
    from ptqbench.data.texts import load_text, text_digest

    text = complete(spec) if isinstance(spec, PerplexitySpec) else spec
    text = dataclasses.replace(text, digest=text_digest(text))
    load_text(text)
    return str(text.digest)


def _task(name: str, spec: EvaluationSpec) -> str:
    from ptqbench.data.tasks import task_digests
    from ptqbench.evaluate.definitions import data_of, load_task, members

    only = dataclasses.replace(
        spec, tasks=tuple(word for word in spec.tasks if word.partition("/")[0] == name), few_shot={}
    )
    pinned = dataclasses.replace(spec, task_digests=task_digests(only))
    names = members(name)
    found = {data_of(load_task(member, name, pinned), pinned.task_digests[name]) for member in names}
    return f"{', '.join(sorted(map(str, found)))}: {len(names)} task{'s' * (len(names) > 1)}"
