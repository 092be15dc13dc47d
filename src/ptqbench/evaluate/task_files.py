"""What lm-eval's installed task files say of a task, read without importing lm-eval, which would import torch.

A request for a task or metric that does not exist is thus refused when the cell is composed. The scan of some 14,000 files takes
seconds, so its result is kept in the cache folder, by the version of lm-eval. The scan looks for ``task:``, ``group:`` and ``tag:``
at the beginning of a line. It finds every name that lm-eval knows, and a few more, which lm-eval refuses when the cell starts.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ptqbench.cell.folders import cache_folder
from ptqbench.cell.spec import nearest
from ptqbench.data.tasks import TASKS
from ptqbench.errors import ConfigError
from ptqbench.runs.files import write_text

SUFFIXES = ("", ".yaml", ".yml")
"""Of the files that are scanned. Files without a suffix are templates, which others include."""
ENTRY = r"""(?m)^["']?(task|group|tag)["']?[ \t]*:([^\n#]*)((?:\r?\n[ \t]*-[ \t][^\n]*)*)"""
"""A key, its value on the same line, and the items of a list below it."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which ``!function x.y`` stands for a Python function; it is read as None."""


_Loader.add_constructor("!function", lambda loader, node: None)


def check_tasks(words: tuple[str, ...]) -> None:
    """Refuse a task or metric that lm-eval's files do not have. Tasks of our own table are checked elsewhere (``data.tasks``).

    Args:
        words: ``task/metric``, as in ``evaluation.tasks``. A word without a metric is checked as a task.

    Raises:
        ConfigError: One line that offers near names.
    """
    for word in words:
        task, _, metric = word.rpartition("/")
        name = task or metric
        folder = None if name in TASKS else tasks_folder()
        if folder is None:
            continue
        path = _file(name, folder)
        if path is None:
            raise ConfigError(unknown_task(name))
        known = _metrics(name, path)
        if task and known is not None:
            check_metric(name, metric, known)


def check_metric(task: str, metric: str, known: Sequence[str]) -> None:
    """Refuse a metric that a task does not have."""
    if metric not in known:
        raise ConfigError(f"evaluation.tasks: {task!r} yields no {metric!r}; {nearest(metric, known)}")


def filtered(metrics: Iterable[str], filters: Sequence[str]) -> list[str]:
    """Names of the metrics of a task: ``metric``, or ``metric:FILTER`` where it filters generated text."""
    return [metric if chosen == "none" else f"{metric}:{chosen}" for metric in metrics for chosen in filters]


def folder_of(task: str) -> Path | None:
    """The folder of lm-eval's files that defines a task; None for groups and tags, whose tasks may lie anywhere."""
    folder = tasks_folder()
    if folder is None or (task in TASKS and TASKS[task].folder is None):
        return None
    if task in TASKS:
        return folder / str(TASKS[task].folder)
    path = _file(task, folder)
    return path.parent if path is not None and _definition(task, path) else None


def generates(task: str) -> bool:
    """Whether the model writes text in a task. A group outside our own table is taken not to, since its file does not say."""
    if task in TASKS:
        return TASKS[task].generates
    folder = tasks_folder()
    path = _file(task, folder) if folder is not None else None
    return path is not None and _definition(task, path).get("output_type") == "generate_until"


@functools.lru_cache(maxsize=128)
def unknown_task(name: str) -> str:
    """The error message for a task that lm-eval does not have."""
    folder = tasks_folder()
    known = {*TASKS, *(_remembered(folder) if folder is not None else ())}
    near = difflib.get_close_matches(name, known, n=3)
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "list its tasks with: lm-eval ls tasks"
    return f"evaluation.tasks: lm-eval {metadata.version('lm_eval')} has no task {name!r}; {advice}"


def tasks_folder() -> Path | None:
    """The folder of lm-eval's task files; None where lm-eval is not installed."""
    found = find_spec("lm_eval")
    places = found.submodule_search_locations if found is not None else None
    return Path(places[0]) / "tasks" if places else None


def _file(name: str, folder: Path) -> Path | None:
    """The file that defines a task, group or tag, or names it."""
    # Files may have come since the scan that is remembered, so nothing is unknown without a new scan.
    place = _remembered(folder).get(name) or _scanned(folder).get(name)
    return None if place is None else folder / place


@functools.cache
def _remembered(folder: Path) -> dict[str, str]:
    """What an earlier scan found, else what a scan finds now: name of a task, group or tag -> its file in the folder."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(_cache_file().read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(place, str) for place in found.values()):
            return found
    return _scanned(folder)


@functools.cache
def _scanned(folder: Path) -> dict[str, str]:
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1] in SUFFIXES
    ]
    defined: dict[str, str] = {}
    named: dict[str, str] = {}  # tags, and members of groups
    # lm-eval takes the first of two files that define one name, in alphabetical order. Templates define none by themselves.
    for path in sorted(paths, key=lambda path: (path.suffix != ".yaml", path.as_posix())):
        place = path.relative_to(folder).as_posix()
        for key, value, items in re.findall(ENTRY, path.read_text(encoding="utf-8", errors="replace")):
            for name in re.findall(r"""[^\s,\[\]"']+""", value):
                (named if key == "tag" else defined).setdefault(name, place)
            for name in re.findall(r"""-[ \t]+["']?([^\s"'#:]+)["']?[ \t]*(?=[\r\n#]|\Z)""", items):
                named.setdefault(name, place)
    found = named | defined
    with contextlib.suppress(OSError):
        write_text(_cache_file(), json.dumps(found))
    return found


def _cache_file() -> Path:
    return cache_folder() / f"lm_eval-{metadata.version('lm_eval')}-tasks.json"


def _metrics(name: str, path: Path) -> list[str] | None:
    """Metrics of a task as its file lists them; None where the file alone does not say."""
    config = _definition(name, path)
    try:
        filters = [str(chosen["name"]) for chosen in config.get("filter_list") or [{"name": "none"}]]
        names = [entry["metric"] for entry in config["metric_list"]]
    except (KeyError, TypeError):
        return None
    if "class" in config or not all(isinstance(metric, str) for metric in names):
        return None
    return filtered(names, filters)


@functools.lru_cache(maxsize=1024)
def _definition(name: str, path: Path) -> dict[str, Any]:
    """What a file says of a task; nothing where it cannot be read, or does not define this task."""
    try:
        config = _config(path, ())
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return config if config.get("task") == name and "group" not in config else {}


def _config(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A task file with what it includes, whose own keys win, as lm-eval merges them.

    Raises:
        ValueError: A file that includes itself.
    """
    if path in seen:
        raise ValueError(f"include cycle at {path}")
    own: dict[str, Any] = yaml.load(path.read_bytes(), _Loader)
    included = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        merged |= _config(path.parent / other, (*seen, path))
    return merged | own
