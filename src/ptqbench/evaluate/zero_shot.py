"""Tasks through lm-eval. The only importer of lm_eval.

Prompts, splits, metrics and filters are lm-eval's own task definitions. lm-eval scores each choice of a question by its
log-likelihood given the context; ``acc`` takes the largest, ``acc_norm`` the largest per byte of the choice. lm-eval's caches are
not used: their keys do not contain the model, so two cells would share scores.

Tasks are evaluated one by one (of a group such as MMLU each subject), so that finished ones are kept. The value of a group is the
mean over all its examples (``weight_by_size``), as lm-eval aggregates accuracies.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
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
from ptqbench.errors import ConfigError, DataNotHereError, UnsupportedError
from ptqbench.evaluate.local_data import dataset, local_changes
from ptqbench.evaluate.records import DIGEST_LENGTH
from ptqbench.evaluate.task_files import check_metric, filtered, folder_of, unknown_task

if TYPE_CHECKING:
    from ptqbench.cell.spec import EvaluationSpec
    from ptqbench.evaluate.scores import Request, Score

Prepared = dict[str, dict[str, Any]]
"""Request -> task -> the loaded lm-eval task; None for a task that is measured already."""
FEWSHOT_SEED = 1234  # lm-eval's default
BOOTSTRAP_ITERATIONS = 1000
ALL_AT_ONCE = 1 << 30  # requests per call of lm-eval, where ``evaluate.loglikelihood`` makes the batches


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


class Harness:
    """A model under lm-eval, for the tasks of one cell."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        spec: EvaluationSpec,
        score: Callable[[list[Request]], list[Score]] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A transformers causal language model on its device, not modified. With ``score`` it needs no weights.
            tokenizer: The tokenizer of the model.
            spec: Batch size, shots, limit and local data.
            score: Scores continuations in place of the model.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.models.huggingface import HFLM

        class Quiet(HFLM):  # type: ignore[misc]
            """The lm-eval model without its progress bars, which ignore TQDM_DISABLE."""

            def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().loglikelihood(requests, disable_tqdm=True)

            def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().generate_until(requests, disable_tqdm=True)

            def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
                if score is None:
                    return super()._loglikelihood_tokens(requests, *given, **named)
                return score([(list(context), list(continuation)) for _, context, continuation in requests])

        self._spec = spec
        self._model = Quiet(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=spec.batch_size if score is None else ALL_AT_ONCE,
            max_length=model.config.max_position_embeddings,
        )

    def score_all(self, tasks: list[Any]) -> None:
        """Score the requests of several tasks together; ``evaluate`` then finds every score."""
        instances: dict[str, list[Any]] = {"loglikelihood": [], "loglikelihood_rolling": []}
        for task in tasks:
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(limit=self._spec.limit, rank=0, world_size=1)
            for instance in task.instances:
                instances[instance.request_type].append(instance)
        for kind, found in instances.items():
            if found:
                getattr(self._model, kind)(found)

    def evaluate(self, name: str, request: str, task: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Measure one task.

        Args:
            name: The task, not a group.
            request: The requested name: the task itself or a group that contains it.
            task: The task as ``prepare`` loaded it.

        Returns:
            One record per example (and filter of generated text), and the metrics of the task.
        """
        import lm_eval
        from lm_eval import evaluator

        task.set_fewshot_seed(FEWSHOT_SEED)
        # With ``score``, the requests were scored by ``score_all`` before, and lm-eval only computes the metrics.
        report = evaluator.evaluate(
            lm=self._model,
            task_dict={"tasks": {name: task}},
            limit=self._spec.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
        )
        scores = report["results"][name]
        values = {key: value for key, value in scores.items() if "," in key and isinstance(value, int | float)}
        summary = {
            "task": name,
            "request": request,
            "values": {key: float(value) for key, value in values.items() if math.isfinite(value)},
            "n_examples": report["n-samples"][name]["effective"],
            "task_version": report["versions"].get(name),
            "n_shot": report["n-shot"].get(name, 0),
            "batch_size": self._spec.batch_size,
            "lm_eval": lm_eval.__version__,
            "data": data_of(task, self._spec.task_digests.get(request)),
        }
        return [_record(name, sample) for sample in report["samples"][name]], summary


def metrics_of(request: str, metrics: list[str], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Make result columns from the metrics of the tasks of a request.

    Args:
        request: The requested name.
        metrics: Its metrics; ``metric:FILTER`` where generated text is filtered.
        summaries: Metrics of the tasks, as ``Harness.evaluate`` returns them.

    Returns:
        ``request/metric`` -> value, standard error and the facts behind it, and ``request/flips`` where answers were compared. The
        value of a group is the mean over all examples; its standard error pools those of the tasks, as lm-eval does.

    Raises:
        ConfigError: The task does not yield the metric.
    """
    found = {}
    for metric in metrics:
        name, _, chosen = metric.partition(":")
        key, error_key = f"{name},{chosen or 'none'}", f"{name}_stderr,{chosen or 'none'}"
        if any(key not in summary["values"] for summary in summaries):
            known = sorted(summaries[0]["values"])
            raise ConfigError(f"evaluation.tasks: {request!r} yields no {metric!r}; lm-eval yields {', '.join(known)}")
        # mean over all examples = sum n_i v_i / sum n_i
        sizes = [summary["n_examples"] for summary in summaries]
        values = [summary["values"][key] for summary in summaries]
        errors = [summary["values"].get(error_key) for summary in summaries]
        shared = {k: summaries[0][k] for k in ("task_version", "n_shot", "batch_size", "lm_eval", "data")}
        found[f"{request}/{metric}"] = {
            "value": values[0]
            if len(values) == 1
            else math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes),
            "stderr": errors[0] if len(errors) == 1 else _pooled(errors, sizes),
            "n_examples": sum(sizes),
            **({"n_tasks": len(sizes)} if len(sizes) > 1 else {}),
            **shared,
        }
    if all("flips" in summary for summary in summaries):
        found[f"{request}/flips"] = _flips_of([summary["flips"] for summary in summaries])
    return found


def flips(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> tuple[list[bool], dict[str, int]]:
    """Compare the answers of a model with those of another.

    Args:
        rows: Records of a task, one per example.
        reference: Records of the other model on the same examples, in the same order.

    Returns:
        Per example whether the answer differs (the choice of largest log-likelihood; for a single continuation, whether it is
        the greedy one); and how many examples there are, how many changed, and how many of these became wrong or right.
    """
    pairs = list(zip(rows, reference, strict=True))
    changed = [_answer(row) != _answer(other) for row, other in pairs]
    became = [row["acc"] - other["acc"] for row, other in pairs if "acc" in row]
    return changed, {
        "n": len(pairs),
        "changed": sum(changed),
        "to_wrong": sum(value < 0 for value in became),
        "to_right": sum(value > 0 for value in became),
    }


def _answer(row: dict[str, Any]) -> Any:
    scores = row["log_likelihoods"]
    return scores.index(max(scores)) if len(scores) > 1 else row.get("acc")


def _flips_of(counts: list[dict[str, int]]) -> dict[str, Any]:
    """The share of changed answers over all examples of a request, with its binomial standard error."""
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    share = total["changed"] / total["n"]
    error = math.sqrt(share * (1 - share) / (total["n"] - 1)) if total["n"] > 1 else None
    return {
        "value": share,
        "stderr": error,
        "n_examples": total["n"],
        **{k: total[k] for k in ("to_wrong", "to_right")},
    }


def _pooled(errors: list[float | None], sizes: list[int]) -> float | None:
    """Standard error of a mean over all examples, from the sample variances n se^2 of the tasks: sqrt(pooled variance / total)."""
    if any(error is None for error in errors):
        return None
    # pooled variance = sum (n_i - 1) n_i se_i^2 / (N - tasks), as n se^2 is the sample variance within a task
    total = sum(sizes)
    if total == len(sizes):
        return None
    variance = math.fsum((n - 1) * n * (e or 0.0) ** 2 for e, n in zip(errors, sizes, strict=True))
    return math.sqrt(variance / (total - len(sizes)) / total)


def _record(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    """The record of one example: identity, scores, and the log-likelihoods of the choices or the generated text."""
    prompts = hashlib.sha256(repr((sample["arguments"], sample["target"])).encode()).hexdigest()[:DIGEST_LENGTH]
    # lm-eval gives (log-likelihood, greedy) per choice, or the generated text.
    answers = sample["filtered_resps"]
    scored = all(isinstance(answer, list | tuple) for answer in answers)
    return {
        "task": name,
        "example": int(sample["doc_id"]),
        "digest": prompts,
        "filter": sample["filter"],
        "target": str(sample["target"]),
        "log_likelihoods": [float(answer[0]) for answer in answers] if scored else [],
        "response": None if scored else str(sample["resps"][0][0]),
        **{metric: float(sample[metric]) for metric in sample["metrics"]},
    }


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
    try:  # lm-eval changes fields of one of its tasks where the task is a member of an inline group
        return manager.load([{"group": "ptqbench", "task": [{"task": name, **changes}]}])["tasks"][name]
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise many types where data cannot be loaded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        source = spec.data_dir or changes.get("dataset_path") or config.get("dataset_path")
        raise ConfigError(
            f"task {name!r}: its data ({source}) cannot be loaded: {reason}; load it once where there is network "
            f"(python -m ptqbench prefetch), or give {LOCAL_DATA.format(name)}"
        ) from error


def _hub_folder(known: Task, name: str, identity: str | None) -> str:
    """The data of a task at its commit, as a folder that ``datasets`` reads like the repository itself."""
    assert known.repository is not None
    try:
        return str(hub.folder_at(known.repository, hub_commit(known, identity)))
    except DataNotHereError as error:
        raise DataNotHereError(f"task {name!r}: {error}, or give {LOCAL_DATA.format(name)}", known.repository) from None


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
