"""How many tokens a task takes: counted requests, for estimates of time and memory. Imports no torch.

Tokens are those of the Qwen2.5 tokenizer on the zero-shot prompts of lm-eval, and those of the embedded model for its own
questions. ``counted`` says that the complete set was counted. Other sizes are estimated from the number of examples and the usual
length of a prompt.
"""

from __future__ import annotations

import dataclasses
import math

from ptqbench.data.tasks import TINY_QUESTIONS


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """The size of a task.

    Attributes:
        examples: Questions.
        requests: Pairs of context and continuation, or prompts to which the model writes an answer.
        whole: Tokens of all requests, each by itself.
        trees: Tokens of all requests in trees, where shared beginnings are computed once (``evaluate.trees``).
        example: Mean tokens of one example with its answer, as it stands in a prompt with shots.
        shots: Examples in the prompt unless ``evaluation.few_shot`` says otherwise.
        subjects: Tasks of a group, each with the same shots for all its examples; 0 where shots are drawn per example.
        at_once: Requests of one context that differ in one token alone, which lm-eval's class runs as one.
        written: Tokens that the model is expected to write per example.
        most_written: Tokens that lm-eval leaves room for.
        counted: Whether the complete set was counted, not estimated.
    """

    examples: int
    requests: int
    whole: int
    trees: int
    example: float
    shots: int = 0
    subjects: int = 0
    at_once: int = 1
    written: int = 0
    most_written: int = 0
    counted: bool = True

    def measured(self, limit: int | None = None) -> int:
        """Examples that are measured; ``evaluation.limit`` counts for every task of a group."""
        return self.examples if limit is None else min(self.examples, limit * max(self.subjects, 1))

    def requested(self, shots: int | None = None, limit: int | None = None) -> int:
        """Tokens of all requests, each by itself, with the shots of its prompt."""
        return round(self._share(limit) * (self.whole + self.requests * self._prefix(shots)))

    def read(self, shared: bool, shots: int | None = None, limit: int | None = None) -> int:
        """Tokens that pass through the model, without those that it writes.

        Args:
            shared: Whether prompts that begin alike are computed once, as ``evaluation.engine=blocks`` does.
            shots: Examples in the prompt; None for the default of the task.
            limit: ``evaluation.limit``.
        """
        if not shared:
            return self.requested(shots, limit) // self.at_once
        # Questions once, and the shots before them as often as they begin a row or differ.
        own, prefix = self._share(limit) * self.trees, self._prefix(shots)
        repeated = float(self.measured(limit))
        if self.subjects and prefix:
            # A row is four times as long as its longest sequence, so it has this much room behind the shots of its subject.
            room = 3 * prefix + 4 * self.trees / self.examples
            repeated = self.subjects * math.ceil(own / self.subjects / room)
        return round(own + repeated * prefix)

    def _prefix(self, shots: int | None) -> float:
        return (self.shots if shots is None else shots) * self.example

    def _share(self, limit: int | None) -> float:
        return self.measured(limit) / self.examples


SIZES = {
    "hellaswag": TaskSize(10_042, 40_168, 3_115_667, 1_635_894, 43.6),
    "piqa": TaskSize(1838, 3676, 126_526, 81_224, 36.4),
    "arc_easy": TaskSize(2376, 9501, 287_935, 84_207, 31.9),
    "arc_challenge": TaskSize(1172, 4687, 167_185, 52_877, 37.5),
    "openbookqa": TaskSize(500, 2000, 28_226, 9519, 16.3),
    "social_iqa": TaskSize(1954, 5862, 177_858, 61_555, 32.9),
    "winogrande": TaskSize(1267, 2534, 53_135, 27_662, 21.7),
    "boolq": TaskSize(3270, 6540, 955_508, 426_187, 151.3, at_once=2),
    TINY_QUESTIONS: TaskSize(608, 2432, 114_438, 27_397, 48.0),
    "mmlu": TaskSize(14_042, 56_168, 6_400_000, 1_600_000, 120.0, subjects=57, at_once=4, counted=False),
    "race": TaskSize(1045, 4180, 2_100_000, 560_000, 510.0, counted=False),
    "lambada_openai": TaskSize(5153, 5153, 450_000, 450_000, 90.0, counted=False),
    "gpqa_diamond_zeroshot": TaskSize(198, 792, 230_000, 60_000, 285.0, counted=False),
    "gsm8k": TaskSize(1319, 1319, 100_000, 100_000, 180.0, 5, written=256, most_written=256, counted=False),
    "mmlu_pro": TaskSize(
        12_032, 12_032, 2_800_000, 2_800_000, 300.0, 5, 14, written=400, most_written=2048, counted=False
    ),
    "hendrycks_math500": TaskSize(500, 500, 40_000, 40_000, 300.0, written=256, most_written=256, counted=False),
}
OTHER = TaskSize(2000, 8000, 1_000_000, 1_000_000, 100.0, counted=False)
"""A task that is not in the table."""


def size_of(task: str) -> TaskSize:
    """The size of a task."""
    return SIZES.get(task, OTHER)
