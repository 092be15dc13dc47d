"""Tasks as lm-eval defines them, loaded with the data and the shots of a cell.

Definitions are those of the installed lm-eval. Before a task is built, the global generators are seeded as
``lm_eval.simple_evaluate`` does, because some tasks shuffle the choices of a question with Python's ``random``. A shuffled split
is kept: lm-eval processes it several times, and the prompt and the right answer of a question must come from one shuffle.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.data import hub
from ptqbench.data.tasks import (
    LOCAL_DATA,
    TASKS,
    TINY_QUESTIONS,
    UNPINNED,
    Task,
    hub_commit,
    local_rows,
    requested,
    tiny_questions_path,
)
from ptqbench.errors import ConfigError, DataNotHereError, UnsupportedError, first_line
from ptqbench.evaluate.local_data import dataset, local_changes
from ptqbench.evaluate.task_files import check_metric, filtered, folder_of, unknown_task

if TYPE_CHECKING:
    from ptqbench.cell.spec import EvaluationSpec

Prepared = dict[str, dict[str, Any]]
"""Request -> task -> the loaded lm-eval task; None for a task that is measured already."""
PYTHON_SEED, NUMPY_SEED, TORCH_SEED = 0, 1234, 1234
"""Seeds of lm-eval's ``simple_evaluate``."""


def embedded_task() -> dict[str, Any]:
    """The packaged question set as an lm-eval task configuration: 4 choices, chance 25 %, zero shots.

    Texts are named by their field, not by a template: lm-eval would compile one per question, which is slower than the model.
    """
    return {
        "task": TINY_QUESTIONS,
        "custom_dataset": lambda **_: dataset(
            {"test": local_rows(tiny_questions_path().parent, ("questions",), "test")}
        ),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in TASKS[TINY_QUESTIONS].metrics
        ],
        "metadata": {"version": 1},
    }


def members(task: str) -> list[str]:
    """Names of the tasks that a requested name stands for, sorted: itself, or the tasks of a group and of its subgroups.

    Raises:
        ConfigError: lm-eval does not know the name, or does not weight the tasks of the group by size.
    """
    return [TINY_QUESTIONS] if task == TINY_QUESTIONS else sorted(set(_leaves(task)))


def prepare(spec: EvaluationSpec, tokenizer: Any, done: Callable[[str], bool] = lambda name: False) -> Prepared:
    """Load every task of a cell, so that what is wrong with one is found before the model is quantized.

    Args:
        spec: Tasks, shots and local data.
        tokenizer: The tokenizer of the model.
        done: Whether a task (not a group) is measured already; such a task is not loaded.

    Returns:
        Request -> task -> the loaded lm-eval task, or None for a finished one.

    Raises:
        ConfigError: lm-eval does not know a task or its metric, or the data cannot be read.
        UnsupportedError: The tokenizer has no token that a task needs.
    """
    found: Prepared = {}
    for request, metrics in requested(spec.tasks).items():
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UnsupportedError(
                f"evaluation.tasks: lm-eval needs a BOS or EOS token to score {request!r}, the tokenizer of the model has "
                f"neither: name one in its tokenizer_config.json, or measure perplexities alone with evaluation.tasks=[]"
            )
        found[request] = {name: None if done(name) else load_task(name, request, spec) for name in members(request)}
        for task in found[request].values():
            if task is not None:
                _check_task(task, request, metrics, tokenizer)
    return found


def _check_task(task: Any, request: str, metrics: list[str], tokenizer: Any) -> None:
    if generates(task) and tokenizer.eos_token_id is None:
        raise UnsupportedError(
            f"task {request!r} generates text, but the tokenizer of the model has no end-of-text token"
        )
    known = filtered(task.aggregation(), [chosen.name for chosen in task._filters])
    for metric in metrics:
        check_metric(request, metric, known)


def generates(task: Any) -> bool:
    """Whether a task writes text, for which the whole model must be in memory."""
    return bool(task.OUTPUT_TYPE == "generate_until")


def seed_generators() -> None:
    """Seed the global generators of Python, numpy and torch as lm-eval does."""
    import numpy as np
    import torch

    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)


def _manager(task: str) -> Any:
    """lm-eval's index of the folder that defines a task; for a group or tag that of all folders, which takes a minute."""
    return _indexed(folder_of(task))


@functools.lru_cache(maxsize=32)
def _indexed(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


def _leaves(task: str, root: str | None = None) -> list[str]:
    index = _manager(root or task).task_index
    if task not in index:
        raise ConfigError(unknown_task(task))
    entry = index[task]
    # A tag is a set of tasks; a group is a list of tasks and groups with rules of its own.
    if entry.kind.name == "TAG":
        return [name for member in sorted(entry.tags) for name in _leaves(member, root or task)]
    if entry.kind.name != "GROUP":
        return [task]
    # Only the mean over all examples is computed here, on the tasks as they are.
    rules = (entry.cfg or {}).get("aggregate_metric_list") or []
    if any(not rule.get("weight_by_size", True) for rule in rules):
        raise ConfigError(
            f"evaluation.tasks: group {task!r} does not weight its tasks by size; request its tasks one by one"
        )
    listed = (entry.cfg or {}).get("task") or []
    if not all(isinstance(member, str) for member in listed):
        raise ConfigError(f"evaluation.tasks: group {task!r} changes its members; request its tasks one by one")
    return [name for member in listed for name in _leaves(member, root or task)]


def load_task(name: str, request: str, spec: EvaluationSpec) -> Any:
    """Build an lm-eval task: its installed definition, of which only the data and the number of shots are changed."""
    from lm_eval.tasks import TaskManager

    if name == TINY_QUESTIONS:
        return TaskManager(include_defaults=False).load([embedded_task()])["tasks"][name]
    manager, known = _manager(request), TASKS.get(request)
    config: dict[str, Any] = manager.task_index[name].cfg or {}
    # Shots, then the data: local files, or the hub data set at its commit. Tasks outside the table load what lm-eval says.
    changes: dict[str, Any] = {}
    if request in spec.few_shot:
        changes["num_fewshot"] = spec.few_shot[request]
    if spec.data_dir is not None:
        shots = changes.get("num_fewshot", config.get("num_fewshot") or 0)
        changes |= local_changes(name, request, config, shots, Path(spec.data_dir).expanduser())
    elif known is not None and known.repository is not None:
        changes["dataset_path"] = _hub_folder(known, name, spec.task_digests.get(request))
    source = spec.data_dir or changes.get("dataset_path") or config.get("dataset_path")
    seed_generators()
    try:  # lm-eval changes fields of one of its tasks where the task is a member of an inline group
        changes = _processed_once(config.get("process_docs")) | changes
        return manager.load([{"group": "ptqbench", "task": [{"task": name, **changes}]}])["tasks"][name]
    except ConfigError:
        raise
    except IndexError as error:  # lm-eval looks at the first example
        raise ConfigError(
            f"task {name!r}: its data ({source}) hold no example of it; expected at least one in the split that is measured"
        ) from error
    except Exception as error:  # the libraries raise many types where data cannot be loaded
        raise ConfigError(
            f"task {name!r}: its data ({source}) cannot be loaded: {first_line(error)}; load it once where there is network "
            f"(python -m ptqbench prefetch), or give {LOCAL_DATA.format(name)}"
        ) from error


def _hub_folder(known: Task, name: str, identity: str | None) -> str:
    """The data of a task at its commit, as a folder that ``datasets`` reads like the repository itself."""
    assert known.repository is not None
    try:
        return str(hub.folder_at(known.repository, hub_commit(known, identity)))
    except DataNotHereError as error:
        raise DataNotHereError(f"task {name!r}: {error}, or give {LOCAL_DATA.format(name)}", known.repository) from None


def _processed_once(path: Any) -> dict[str, Any]:
    """Change ``process_docs`` of a definition so that every split is processed once, and its result kept.

    Args:
        path: The function, as lm-eval names it: the path of its module without suffix, a dot, its name. Nothing is changed where
            there is none, or where its module is no file there.
    """
    module_path, _, name = str(path).rpartition(".")
    file = Path(f"{module_path}.py")
    spec = importlib.util.spec_from_file_location(file.stem, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        return {}
    # Import the module of the function, as lm-eval does.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process = getattr(module, name)
    kept: dict[int, tuple[Any, Any]] = {}  # the split itself is kept, so that its id stays its own

    def processed(split: Any) -> Any:
        if id(split) not in kept:
            kept[id(split)] = split, process(split)
        return kept[id(split)][1]

    return {"process_docs": processed}


def data_of(task: Any, identity: str | None) -> str | None:
    """Identify the data that a task was measured on.

    Args:
        task: The lm-eval task, with its data loaded.
        identity: What the cell says of them.

    Returns:
        The same; for a task that the cell does not pin, the commits that its tables were made from, as ``datasets`` recorded.
    """
    if identity != UNPINNED:
        return identity
    commits: set[str] = set()
    for split in task.dataset.values() if isinstance(task.dataset, dict) else []:
        sources = re.findall(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or {}))
        prepared = [Path(file["filename"]).parent.name for file in getattr(split, "cache_files", [])]
        commits |= set(sources) or {name for name in prepared if hub.COMMIT.fullmatch(name)}
    return hub.digest(str(task.DATASET_PATH), "+".join(sorted(commits))) if commits else UNPINNED
