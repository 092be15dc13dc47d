"""Zero-shot tasks: the folder of their definition in lm-eval, their metrics, and the revision of their data.

Prompts, splits and scoring are lm-eval's own; they are read from its installed task files and not copied. The table here only
says which folder to index, and pins the data. A task that is not in the table is looked up in all of lm-eval. Its data are not
pinned beforehand, but their commit is recorded with the result.

Local data lie in one folder as JSON lines: ``TASK.SPLIT.jsonl`` or ``TASK.jsonl``, with the columns of the hub data set, or in
the flat form that is usual for copies of these sets (``choices`` is a list, ``label`` a number). Imports neither torch nor lm_eval.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import EvaluationSpec, nearest
from ptqbench.data import hub
from ptqbench.data.texts import content_of, embedded_folder
from ptqbench.errors import ConfigError, DataNotHereError

Row = dict[str, Any]
TINY_QUESTIONS = "tiny_questions"
UNPINNED = "hub:as lm-eval says"
ACC, BOTH = ("acc",), ("acc", "acc_norm")
"""Metrics of tasks that score given answers; a task outside the table with other metrics is taken to let the model write."""
LETTERS = "ABCDEFGHIJ"
LOCAL_DATA = "evaluation.data_dir=FOLDER with {}.SPLIT.jsonl"


def _letters(row: Row, question: str) -> Row:
    """Turn ``choices: [...], label: 1`` into the columns of ARC and OpenBookQA on the hub; rows that have them stay as they are."""
    if not isinstance(row.get("choices"), list):
        return row
    letters = list(LETTERS[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {"id": "", question: row["question"], "choices": choices, "answerKey": letters[row["label"]]}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that is known by name.

    Attributes:
        folder: Folder of its definition under ``lm_eval/tasks``; None for the packaged set.
        metrics: Its metrics; ``exact_match:FILTER`` where lm-eval filters generated text.
        repository: Hub data set.
        revision: Pinned commit, or a branch if no commit is known. A cell then pins the commit that the branch names when it is
            composed.
        adapt: Turns a row in the flat form into one with the columns of the hub.
        processed: Whether a row has already been through ``process_docs`` of the task.
        generates: Whether the model writes text.
    """

    folder: str | None
    metrics: tuple[str, ...]
    repository: str | None = None
    revision: str = "main"
    adapt: Callable[[Row], Row] = lambda row: row
    processed: Callable[[Row], bool] = lambda row: False
    generates: bool = False


ARC = "210d026faf9955653af8916fad021475a3f00453"
TASKS = {
    TINY_QUESTIONS: Task(None, BOTH),
    "piqa": Task("piqa", BOTH, "baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    "arc_easy": Task("arc", BOTH, "allenai/ai2_arc", ARC, lambda row: _letters(row, "question")),
    "arc_challenge": Task("arc", BOTH, "allenai/ai2_arc", ARC, lambda row: _letters(row, "question")),
    "winogrande": Task("winogrande", ACC, "allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5"),
    "boolq": Task("super_glue/boolq", ACC, "aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646"),
    "social_iqa": Task("siqa", ACC, "lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
    "hellaswag": Task(
        "hellaswag", BOTH, "Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", processed=lambda row: "query" in row
    ),
    "openbookqa": Task(
        "openbookqa", BOTH, "allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454",
        lambda row: _letters(row, "question_stem"),
    ),
    "race": Task("race", ACC, "EleutherAI/race"),
    "mmlu": Task("mmlu/default", ACC, "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe"),
    "gsm8k": Task(
        "gsm8k", ("exact_match:strict-match", "exact_match:flexible-extract"),
        "openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", generates=True,
    ),
    "lambada_openai": Task("lambada", ACC, "EleutherAI/lambada_openai"),
    "gpqa_diamond_zeroshot": Task("gpqa/zeroshot", BOTH, "Idavidrein/gpqa"),
    "mmlu_pro": Task("mmlu_pro", ("exact_match:custom-extract",), "TIGER-Lab/MMLU-Pro", generates=True),
    "hendrycks_math500": Task("hendrycks_math", ("exact_match",), "HuggingFaceH4/MATH-500", generates=True),
}  # fmt: skip


def requested(tasks: tuple[str, ...]) -> dict[str, list[str]]:
    """Read ``task/metric`` words: task -> metrics, in order of first appearance.

    Raises:
        ConfigError: A word without a metric, a word given twice, or a metric that a known task does not have.
    """
    found: dict[str, list[str]] = {}
    for word in tasks:
        task, _, metric = word.rpartition("/")
        known = TASKS[task or metric].metrics if (task or metric) in TASKS else None
        if not task:
            examples = " or ".join(f"{metric}/{name}" for name in known or BOTH)
            raise ConfigError(f"evaluation.tasks: {word!r} names no metric; say {examples}")
        if known is not None and metric not in known:
            raise ConfigError(f"evaluation.tasks: task {task!r} has no metric {metric!r}; {nearest(metric, known)}")
        if metric in found.setdefault(task, []):
            raise ConfigError(f"evaluation.tasks: {word!r} is given twice")
        found[task].append(metric)
    return found


def task_digests(spec: EvaluationSpec, commit_of: Callable[[str, str], str] = hub.commit_of) -> dict[str, str]:
    """Identify the data behind every requested task: a hash of local files, or a commit of the hub.

    Args:
        spec: The tasks and where their data are.
        commit_of: Maps a repository and a revision to a commit.

    Returns:
        Task -> identity; ``hub:as lm-eval says`` for a task that is not in the table.

    Raises:
        ConfigError: As ``requested``; or shots for a task that is not requested; or no file of a task in ``data_dir``.
        DataNotHereError: Neither the hub nor the hub cache knows the commit of the branch of a task.
    """
    tasks = requested(spec.tasks)
    for task in spec.few_shot:
        if task not in tasks:
            raise ConfigError(f"evaluation.few_shot: {task!r} is not among the tasks; {nearest(task, tasks)}")
    if spec.data_dir is not None and not set(tasks) - {TINY_QUESTIONS}:
        raise ConfigError(
            f"evaluation.data_dir={spec.data_dir!r} is not read, for no task is asked for whose data could lie there; "
            f"give evaluation.tasks=[TASK/METRIC], or leave it out"
        )
    return {task: task_digest(spec, task, commit_of) for task in tasks}


def writes(tasks: tuple[str, ...]) -> bool:
    """Whether the model writes text in a task, for which its ``generation_config.json`` counts."""
    return any(
        TASKS[task].generates if task in TASKS else not set(metrics) <= set(BOTH)
        for task, metrics in requested(tasks).items()
    )


def hub_commit(task: Task, identity: str | None) -> str:
    """Find the commit at which the data of a task are loaded.

    Args:
        task: A task of the table with data on the hub.
        identity: Its entry in ``task_digests``; None if there is none yet, as in ``prefetch``.
    """
    assert task.repository is not None
    return hub.pinned_commit(identity) or hub.commit_of(task.repository, task.revision)


def task_digest(spec: EvaluationSpec, task: str, commit_of: Callable[[str, str], str]) -> str:
    """Identify the data behind one task, as ``task_digests`` does."""
    if task == TINY_QUESTIONS:
        return f"sha256:{_known_digest(tiny_questions_path())}"
    if spec.data_dir is not None:
        files = _files(Path(spec.data_dir).expanduser(), task)
        if not files:
            raise ConfigError(
                f"evaluation.data_dir={spec.data_dir!r} has no data of task {task!r}: expected {task}.SPLIT.jsonl or {task}.jsonl"
            )
        total = hashlib.sha256()
        for path in files:
            total.update(f"{path.name}:{_known_digest(path)}".encode())
        return f"sha256:{total.hexdigest()}"
    known = TASKS.get(task)
    if known is None or known.repository is None:
        return UNPINNED
    try:
        return hub.digest(known.repository, commit_of(known.repository, known.revision))
    except DataNotHereError as error:
        raise DataNotHereError(f"task {task!r}: {error}, or give {LOCAL_DATA.format(task)}", known.repository) from None


def _known_digest(path: Path) -> str:
    """The digest of a file of task data, computed once for each state of the file."""
    found = path.stat()
    return _checked_digest(path, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


@functools.lru_cache(maxsize=1024)
def _checked_digest(path: Path, *changed: int) -> str:
    """Hash a file of task data, after a check that its rows can be read."""
    content = content_of(path)
    _rows(path, content)
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path, task: str) -> list[Path]:
    """Files of a task and of its members (``mmlu_anatomy`` of ``mmlu``)."""
    return sorted({*folder.glob(f"{task}.jsonl"), *folder.glob(f"{task}.*.jsonl"), *folder.glob(f"{task}_*.jsonl")})


def local_rows(folder: Path, names: tuple[str, ...], split: str, subject: str | None = None) -> list[Row] | None:
    """Read the rows of a split from a folder of JSON lines; None if it has no file of that split.

    Args:
        folder: ``evaluation.data_dir``.
        names: Possible names of the file: the task, then the groups that it belongs to. The first file that exists counts.
        split: ``validation``, ``test``, ``train`` or ``dev``. A file without a split in its name is never a training split.
        subject: From a file of a whole group only the rows with this ``subject`` are taken.

    Raises:
        ConfigError: A line that is not a JSON object.
    """
    for place, name in enumerate(names):
        words = [f"{name}.{split}.jsonl"] + [f"{name}.jsonl"] * (split in ("validation", "test"))
        path = next((folder / word for word in words if (folder / word).is_file()), None)
        if path is not None:
            rows = _rows(path, content_of(path))
            # The file of the task itself, or that of a group, which holds all its tasks.
            return rows if place == 0 else [row for row in rows if row.get("subject") == subject]
    return None


def _rows(path: Path, content: bytes) -> list[Row]:
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 (JSON, one object a line): {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
            rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: expected at least one JSON object a line, got an empty file")
    return rows


def tiny_questions_path() -> Path:
    """The packaged question set."""
    return embedded_folder() / "questions.jsonl"
