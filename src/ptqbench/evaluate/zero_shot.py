"""Tasks through lm-eval.

Prompts, splits, metrics and filters are lm-eval's own task definitions. lm-eval scores each choice of a question by its
log-likelihood given the context; ``acc`` takes the largest, ``acc_norm`` the largest per byte of the choice. lm-eval's caches are
not used: their keys do not contain the model, so two cells would share scores.

Tasks are evaluated one by one (of a group such as MMLU each subject), so that finished ones are kept. The value of a group is the
mean over all its examples (``weight_by_size``), as lm-eval aggregates accuracies.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptqbench.errors import ConfigError
from ptqbench.evaluate.definitions import data_of, seed_generators
from ptqbench.evaluate.records import DIGEST_LENGTH

if TYPE_CHECKING:
    from ptqbench.cell.spec import EvaluationSpec
    from ptqbench.evaluate.scores import Request, Score

FEWSHOT_SEED = 1234  # lm-eval's default
BOOTSTRAP_ITERATIONS = 1000
ALL_AT_ONCE = 1 << 30  # requests per call of lm-eval, where ``evaluate.loglikelihood`` makes the batches


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
                for context, continuation in (request.args for request in requests):
                    # lm-eval moves the spaces at the end of a context to its continuation.
                    _check_request((context, continuation), [0], context[len(context.rstrip()) :] + continuation, None)
                return super().loglikelihood(requests, disable_tqdm=True)

            def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().generate_until(requests, disable_tqdm=True)

            def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
                for text, context, continuation in requests:
                    _check_request(text, context, continuation, self.max_length)
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
            _seed(task)
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
            task: The task as ``definitions.prepare`` loaded it.

        Returns:
            One record per example (and filter of generated text), and the metrics of the task.
        """
        import lm_eval
        from lm_eval import evaluator

        _seed(task)
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


def _seed(task: Any) -> None:
    """Seed everything that the requests of a task draw on, so that they are the same each time and wherever the task stands."""
    seed_generators()
    task.set_fewshot_seed(FEWSHOT_SEED)


def _check_request(text: tuple[str, str] | None, context: Any, continuation: Any, longest: int | None) -> None:
    """Refuse a request that lm-eval cannot score.

    Args:
        text: Context and continuation; None where lm-eval cut a long text into windows.
        context: Its tokens.
        continuation: Its tokens, or its text before they are known.
        longest: Most tokens of a continuation; None if it is not counted.

    Raises:
        ConfigError: There is no token to predict, or none to predict it from, or the continuation exceeds the context of the model.
    """
    problem = None
    if not continuation:
        problem = "its continuation has no token"
    elif not context:
        problem = "its context has no token"
    elif longest is not None and len(continuation) > longest:
        problem = f"its continuation has {len(continuation)} tokens, the context of the model {longest}"
    if problem is not None:
        before, after = text or ("", "")
        raise ConfigError(
            f"a request of the tasks cannot be scored: {problem} (context ...{before[-60:]!r}, continuation {after[:60]!r}); "
            f"expected at least one token of each: mend the data of the task"
        )


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
