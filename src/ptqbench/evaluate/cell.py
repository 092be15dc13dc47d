"""The evaluation of one cell: texts and tasks, block by block. Parts that are finished are not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ptqbench.data.tasks import requested
from ptqbench.evaluate.definitions import Prepared, generates, prepare
from ptqbench.evaluate.records import DIGEST_LENGTH, read_summary, write_records
from ptqbench.evaluate.scores import RunStore
from ptqbench.evaluate.zero_shot import Harness, flips, metrics_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ptqbench.cell.spec import EvaluationSpec, PerplexitySpec
    from ptqbench.evaluate.unquantized import Unquantized
    from ptqbench.models.blockwise import BlockwiseModel, Overlay
    from ptqbench.runs.attempt import Observer
    from ptqbench.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Ready:
    """What is loaded before the model is quantized, so that missing or unfit data are found before any work is done.

    Attributes:
        windows: Label -> (n_windows, seq_len) int64 token ids, of the texts that are not measured yet.
        tasks: All tasks, as ``definitions.prepare`` returns them.
    """

    windows: dict[str, Tensor]
    tasks: Prepared


@dataclasses.dataclass(frozen=True)
class CellEvaluation:
    """What the evaluation of a cell needs.

    Attributes:
        spec: What is measured.
        folder: The run folder, where records go.
        model: The checkpoint, in the basis of the cell.
        overlay: Puts the quantized weights into a loaded block; None leaves those of the checkpoint.
        tokenizer: The tokenizer of the model.
        observer: Is told of progress.
        measure: Context that adds the seconds inside it to a named timing.
        ready: What ``load`` found before the model was quantized.
        unquantized: What the model is compared with.
    """

    spec: EvaluationSpec
    folder: RunFolder
    model: BlockwiseModel
    overlay: Overlay | None
    tokenizer: Any
    observer: Observer
    measure: Callable[[str], AbstractContextManager[None]]
    ready: Ready
    unquantized: Unquantized

    def run(self) -> dict[str, Any]:
        """Measure what is not measured yet and return all metrics: name -> value, standard error and the facts behind them."""
        metrics: dict[str, Any] = {}
        for label, text in self.spec.texts.items():
            done = read_summary(self.folder.windows_path(label), self.folder.run_id)
            facts = dict(done if done is not None else self._text(label, text))
            compared = facts.pop("fidelity", {})
            metrics |= {f"{label}/{name}": found for name, found in {"perplexity": facts, **compared}.items()}
        return metrics | self._tasks()

    def _text(self, label: str, text: PerplexitySpec) -> dict[str, Any]:
        """Measure a text and write its records; returns the facts of its perplexity, and under ``fidelity`` further metrics."""
        import torch

        from ptqbench.evaluate import fidelity
        from ptqbench.evaluate.perplexity import perplexity

        windows = self.ready.windows[label]
        dtype: torch.dtype = getattr(torch, self.spec.ppl_dtype)
        # The reference comes first, so that one pass of the model gives its loss and its divergence.
        compared = fidelity.Divergence(self._reference(label, windows)) if self.spec.fidelity else None
        self.observer.stage(f"perplexity {label}", self.model.n_blocks)
        with self.measure("perplexity_s"):
            found = perplexity(self.model, windows, self.overlay, self.spec.batch_size, self._advance, dtype, compared)
        bos = self.tokenizer.bos_token_id
        summary: dict[str, Any] = {
            "value": found.perplexity,
            "mean_loss": found.mean_loss,
            "stderr": found.standard_error,
            "n_tokens": found.n_tokens,
            "n_windows": len(windows),
            "seq_len": windows.shape[1],
            "n_bos": 0 if bos is None else int((windows == bos).sum()),
            "protocol": text.protocol,
            "batch_size": self.spec.batch_size,
            "ppl_dtype": self.spec.ppl_dtype,
        }
        # What is known per window goes to the records, the rest to the summary.
        columns = {"nll": found.window_nll}
        if compared is not None:
            judged = fidelity.summarise(compared, len(windows))
            columns |= judged.windows
            with self.measure("fidelity_s"):
                noise = self.unquantized.noise(windows, self.spec.batch_size, self._advance)
            summary["fidelity"] = judged.metrics(noise)
        rows = [
            {"text": label, "window": i, "digest": _digest(window), "n_tokens": windows.shape[1] - 1}
            | {name: float(values[i]) for name, values in columns.items()}
            for i, window in enumerate(windows)
        ]
        write_records(self.folder.windows_path(label), rows, self.folder.run_id, summary)
        return summary

    def _reference(self, label: str, windows: Tensor) -> dict[str, Tensor]:
        self.observer.stage(f"reference {label}", self.model.n_blocks)
        with self.measure("fidelity_s"):
            return self.unquantized.of_text(windows, self._advance)

    def _advance(self, index: int) -> None:
        self.observer.advance()

    def _tasks(self) -> dict[str, Any]:
        """Score all requests in one pass over the blocks, then let lm-eval compute the metrics, task by task."""
        if not self.ready.tasks:
            return {}
        # Tasks come last: the whole model, where one needs it, is not run by blocks afterwards.
        self._score_by_blocks()
        asked = requested(self.spec.tasks)
        self.observer.stage("zero-shot", sum(len(members) for members in self.ready.tasks.values()))
        metrics: dict[str, Any] = {}
        for request, members in self.ready.tasks.items():
            summaries = []
            for name, task in members.items():
                path = self.folder.examples_path(name)
                summary = read_summary(path, self.folder.run_id)
                if summary is None:
                    rows, summary = self._task(name, request, task)
                    write_records(path, rows, self.folder.run_id, summary)
                summaries.append(summary)
                self.observer.advance()
            metrics |= metrics_of(request, asked[request], summaries)
        # All records exist, so that the scores behind them are not needed any more.
        shutil.rmtree(self._scores_path, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder may hold finished blocks, which stay
            self.folder.state_path.rmdir()
        return metrics

    def _task(self, name: str, request: str, task: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Records and figures of a task; where its choices are scored, also how many answers are not the unquantized model's."""
        whole = self._needs_whole(task)
        with self.measure("zero_shot_s"):
            rows, summary = (self._whole if whole else self._by_blocks).evaluate(name, request, task)
        if whole or not self.spec.fidelity:
            return rows, summary
        with self.measure("fidelity_s"):
            reference, _ = self._reference_harness.evaluate(name, request, task)
        changed, summary["flips"] = flips(rows, reference)
        return [row | {"flipped": flipped} for row, flipped in zip(rows, changed, strict=True)], summary

    def _score_by_blocks(self) -> None:
        tasks = [task for members in self.ready.tasks.values() for task in members.values()]
        waiting = [task for task in tasks if task is not None and not self._needs_whole(task)]
        if waiting and self.spec.fidelity:
            self.observer.stage("reference log-likelihoods", self.model.n_blocks)
            with self.measure("fidelity_s"):
                self._reference_harness.score_all(waiting)
        if waiting:
            self.observer.stage("log-likelihoods", self.model.n_blocks)
            with self.measure("zero_shot_s"):
                self._by_blocks.score_all(waiting)

    def _needs_whole(self, task: Any) -> bool:
        return self.spec.engine == "whole" or generates(task)

    @functools.cached_property
    def _by_blocks(self) -> Harness:
        from ptqbench.evaluate.loglikelihood import scorer

        store = RunStore(self._scores_path, self.folder.run_id)
        score = scorer(self.model, self.overlay, store, self._advance)
        return Harness(self.model.skeleton, self.tokenizer, self.spec, score)

    @functools.cached_property
    def _reference_harness(self) -> Harness:
        """The unquantized model, by blocks."""
        score = self.unquantized.scores(self._advance)
        return Harness(self.unquantized.model.skeleton, self.tokenizer, self.spec, score)

    @functools.cached_property
    def _whole(self) -> Harness:
        """The whole model in memory; nothing runs block by block after this."""
        return Harness(self.model.materialise(self.overlay), self.tokenizer, self.spec)

    @property
    def _scores_path(self) -> Path:
        """Finished chunks of log-likelihoods, until every task has its records."""
        return self.folder.state_path / "scores"


def load(spec: EvaluationSpec, folder: RunFolder, tokenizer: Any, vocab_size: int) -> Ready:
    """Load the texts and tasks of a cell that are not measured yet, before anything is computed.

    Args:
        spec: What is measured.
        folder: The run folder, where records are.
        tokenizer: The tokenizer of the model.
        vocab_size: Rows of the model's embedding.

    Raises:
        ConfigError: A text, a task, its metric or its data do not exist or cannot be read.
        CalibrationError: A text is shorter than one window, or has tokens that the model does not have.
        UnsupportedError: The tokenizer lacks a token that a task needs.
    """
    from ptqbench.data.windows import evaluation_windows

    def done(path: Path) -> bool:
        return read_summary(path, folder.run_id) is not None

    windows = {
        label: evaluation_windows(text, tokenizer, vocab_size)
        for label, text in spec.texts.items()
        if not done(folder.windows_path(label))
    }
    if not spec.tasks:
        return Ready(windows, {})
    return Ready(windows, prepare(spec, tokenizer, lambda name: done(folder.examples_path(name))))


def averages(tasks: tuple[str, ...], metrics: dict[str, Any]) -> dict[str, Any]:
    """Average the requested task metrics, where each task has one.

    Args:
        tasks: ``task/metric`` words.
        metrics: Metrics of the cell.

    Returns:
        ``average(task/metric, ...)`` -> value, standard error (tasks fixed, examples vary: sqrt(sum se^2) / T) and the list;
        empty for fewer than two tasks, or where a task is asked for by several metrics.
    """
    if len(tasks) < 2 or any(len(names) > 1 for names in requested(tasks).values()):
        return {}
    errors = [metrics[name]["stderr"] for name in tasks]
    known = None not in errors
    return {
        f"average({', '.join(tasks)})": {
            "value": math.fsum(metrics[name]["value"] for name in tasks) / len(tasks),
            "stderr": math.sqrt(math.fsum(error**2 for error in errors)) / len(tasks) if known else None,
            "tasks": list(tasks),
        }
    }


def _digest(window: Tensor) -> str:
    return hashlib.sha256(window.numpy().astype("<i8").tobytes()).hexdigest()[:DIGEST_LENGTH]
