"""Task data from a folder of JSON lines, handed to lm-eval's own task definitions. Imports neither torch nor lm_eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptqbench.data.tasks import TASKS, Task, local_rows
from ptqbench.errors import ConfigError

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def local_changes(name: str, request: str, config: dict[str, Any], shots: int, folder: Path) -> dict[str, Any]:
    """Changes to an lm-eval task with which it reads its splits from JSON lines. Splits without a file are left out.

    Args:
        name: The task, not a group.
        request: The requested name: the task itself or a group that contains it.
        config: lm-eval's definition of the task, not modified.
        shots: Examples in the prompt.
        folder: ``evaluation.data_dir``.

    Returns:
        Fields of the definition and their new values.

    Raises:
        ConfigError: There is no file for the split that is measured, or for the one that the shots come from.
    """
    # Read every split that the definition names and the folder has; the others become None.
    known = TASKS.get(request, Task(None, ()))
    rows: dict[str, list[dict[str, Any]]] = {}
    changes: dict[str, Any] = dict.fromkeys(SPLITS)
    for field in SPLITS:
        split: str | None = config.get(field)
        found = local_rows(folder, (name, request), split, config.get("dataset_name")) if split else None
        if split and found:
            rows[split], changes[field] = [known.adapt(row) for row in found], split
    tested = config.get("test_split") or config.get("validation_split")
    if tested not in rows:
        other = f" (nor {name}.jsonl)" if tested in ("validation", "test") else ""
        raise ConfigError(f"evaluation.data_dir={str(folder)!r} has no {name}.{tested}.jsonl{other}")
    shown = config.get("fewshot_split") or config.get("training_split")
    if shots and shown not in rows:
        raise ConfigError(
            f"task {name!r} with {shots} shots needs {name}.{shown}.jsonl in evaluation.data_dir={str(folder)!r}"
        )
    # Rows that went through lm-eval's own processing before they were written are not processed again.
    ready = {"process_docs": None} if known.processed(rows[tested][0]) else {}
    return {"custom_dataset": lambda **_: dataset(rows), "dataset_kwargs": None, **changes, **ready}


def dataset(splits: dict[str, Any]) -> Any:
    """Put rows into an in-memory data set, split by split; nothing is written to a cache."""
    import datasets

    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
