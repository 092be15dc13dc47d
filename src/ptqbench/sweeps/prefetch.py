"""Load everything that cells need from the network, on a node that has one; afterwards they run with the hub switched off.

Models, tokenizers, texts and tasks are loaded through the very functions that a run calls, so that what was found once is found
again. The manifest says what was loaded, from which revision, and what could not be.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import EvaluationSpec, ModelSpec, PerplexitySpec, RunSpec, TextSpec
from ptqbench.errors import PtqbenchError, StorageError
from ptqbench.runs.files import write_json


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that was loaded, or not.

    Attributes:
        kind: ``model``, ``text`` or ``task``.
        name: Its name.
        detail: Where it lies and from which revision; or why it could not be loaded.
        loaded: Whether it was.
    """

    kind: str
    name: str
    detail: str
    loaded: bool


def prefetch(specs: Iterable[RunSpec], manifest: Path, say: Callable[[Item], None] = lambda item: None) -> list[Item]:
    """Load what cells need.

    Args:
        specs: Validated cells; digests need not be filled in.
        manifest: JSON file that is written.
        say: Called with every item as it is settled.

    Returns:
        Every item once, in the order of first need.
    """
    wanted: dict[tuple[str, Any], Callable[[], str]] = {}
    for spec in specs:
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
    from ptqbench.evaluate.zero_shot import data_of, load_task, members

    only = dataclasses.replace(
        spec, tasks=tuple(word for word in spec.tasks if word.partition("/")[0] == name), few_shot={}
    )
    pinned = dataclasses.replace(spec, task_digests=task_digests(only))
    names = members(name)
    found = {data_of(load_task(member, name, pinned), pinned.task_digests[name]) for member in names}
    return f"{', '.join(sorted(map(str, found)))}: {len(names)} task{'s' * (len(names) > 1)}"
