"""Multiple-choice accuracy through lm-eval, on the quantized model in memory. The only importer of lm_eval.

lm-eval scores each choice by its log-likelihood given the context; ``acc`` takes the largest, ``acc_norm`` the largest per
byte of the choice. Nothing is cached: lm-eval's cache is not keyed by the model, so two cells would share scores.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ptqbench.data.texts import embedded_folder
from ptqbench.errors import ConfigError

TINY_QUESTIONS = "tiny_questions"
METRICS = ("acc", "acc_norm")


def embedded_task() -> dict[str, Any]:
    """The packaged question set as an lm-eval task configuration: 4 choices, chance 25 %, zero shots.

    Texts are named by their field, not by a template: lm-eval compiles a template for every question, longer than the model runs.
    """
    return {
        "task": TINY_QUESTIONS,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(embedded_folder() / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        "metadata": {"version": 1},
    }


def zero_shot(model: Any, tokenizer: Any, tasks: tuple[str, ...], batch_size: int) -> dict[str, Any]:
    """Measure accuracy on tasks.

    Args:
        model: A transformers causal language model on its device, not modified.
        tokenizer: Its tokenizer.
        tasks: Names; ``tiny_questions`` is the packaged set, any other name is lm-eval's own.
        batch_size: Sequences per forward; part of the record, since padding moves scores in the last digits.

    Returns:
        ``task/acc`` (and ``task/acc_norm``) -> value, stderr, n_examples, task version, lm-eval version.

    Raises:
        ConfigError: A name that lm-eval does not know.
    """
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [embedded_task()] if TINY_QUESTIONS in tasks else []
    others = [name for name in tasks if name != TINY_QUESTIONS]
    manager = TaskManager(include_defaults=bool(others))
    unknown = [name for name in others if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"evaluation.tasks: lm-eval {lm_eval.__version__} has no task {unknown[0]!r}")

    class Quiet(HFLM):  # type: ignore[misc]
        """The lm-eval model without progress bars of its own (they do not listen to TQDM_DISABLE)."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

    wrapped = Quiet(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=model.config.max_position_embeddings,
    )
    report = evaluator.evaluate(
        lm=wrapped, task_dict=manager.load(own + others), bootstrap_iters=1000, verbosity="ERROR"
    )
    return _metrics(report, batch_size, lm_eval.__version__)


def _metrics(report: dict[str, Any], batch_size: int, version: str) -> dict[str, Any]:
    metrics = {}
    for task, scores in report["results"].items():
        for metric in METRICS:
            value = scores.get(f"{metric},none")
            if value is None:
                continue
            stderr = scores.get(f"{metric}_stderr,none")
            metrics[f"{task}/{metric}"] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, float) and math.isfinite(stderr) else None,
                "n_examples": report["n-samples"][task]["effective"],
                "task_version": report["versions"].get(task),
                "n_shot": report["n-shot"].get(task, 0),
                "batch_size": batch_size,
                "lm_eval": version,
            }
    return metrics
