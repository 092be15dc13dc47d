"""How many tokens a task takes: counted requests, for estimates of time and memory. Imports no torch.

Tokens are those of the Qwen2.5 tokenizer on the zero-shot prompts of lm-eval. ``counted`` says that the complete set was counted.
Other sizes are estimated from the number of examples and their published lengths.
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
        sequences: Sequences that lm-eval's class runs; choices of one token behind one context are one sequence.
        whole: Tokens of these sequences.
        trees: Tokens in trees, where shared beginnings are computed once (``evaluate.trees``).
        example: Mean tokens of one example with its answer, as it stands in a prompt with shots.
        shots: Examples in the prompt unless ``evaluation.few_shot`` says otherwise.
        subjects: Tasks of a group, each with the same shots for all its examples; 0 where shots are drawn per example.
        generated: Tokens that the model writes per example.
        counted: Whether the complete set was counted, not estimated.
    """

    examples: int
    sequences: int
    whole: int
    trees: int
    example: float
    shots: int = 0
    subjects: int = 0
    generated: int = 0
    counted: bool = True

    def measured(self, limit: int | None) -> int:
        """Examples that are measured; ``evaluation.limit`` counts for every task of a group."""
        return self.examples if limit is None else min(self.examples, limit * max(self.subjects, 1))

    def tokens(self, shared: bool, shots: int | None = None, limit: int | None = None) -> int:
        """Tokens that the model reads.

        Args:
            shared: Whether prompts that begin alike are computed once, as ``evaluation.engine=blocks`` does.
            shots: Examples in the prompt; None for the default of the task.
            limit: ``evaluation.limit``.
        """
        share = self.measured(limit) / self.examples
        prefix = (self.shots if shots is None else shots) * self.example
        if not shared:
            return round(share * (self.whole + self.sequences * prefix))
        own = share * self.trees
        if self.subjects and prefix:
            # A row holds four times its longest sequence, so at least 3 prefix tokens of its own behind the shots of its subject.
            repeated = self.subjects * math.ceil(own / self.subjects / (3 * prefix))
        else:
            repeated = round(share * self.examples)
        return round(own + repeated * prefix)

    def written(self, limit: int | None = None) -> int:
        """Tokens that the model writes."""
        return self.generated * self.measured(limit)


SIZES = {
    "hellaswag": TaskSize(10_042, 40_168, 3_115_667, 1_635_894, 43.6),
    "piqa": TaskSize(1838, 3676, 126_526, 81_224, 36.4),
    "arc_easy": TaskSize(2376, 9501, 287_935, 84_207, 31.9),
    "arc_challenge": TaskSize(1172, 4687, 167_185, 52_877, 37.5),
    "openbookqa": TaskSize(500, 2000, 28_226, 9519, 16.3),
    "social_iqa": TaskSize(1954, 5862, 177_858, 61_555, 32.9),
    "winogrande": TaskSize(1267, 2534, 53_135, 27_662, 21.7),
    "boolq": TaskSize(3270, 3270, 477_754, 426_187, 151.3),
    TINY_QUESTIONS: TaskSize(400, 1600, 200_000, 200_000, 40.0),
    "mmlu": TaskSize(14_042, 14_042, 1_600_000, 1_600_000, 120.0, subjects=57, counted=False),
    "race": TaskSize(1045, 4180, 2_100_000, 560_000, 510.0, counted=False),
    "gsm8k": TaskSize(1319, 1319, 100_000, 100_000, 180.0, shots=5, generated=256, counted=False),
    "lambada_openai": TaskSize(5153, 5153, 450_000, 450_000, 90.0, counted=False),
    "gpqa_diamond_zeroshot": TaskSize(198, 792, 230_000, 60_000, 285.0, counted=False),
    "mmlu_pro": TaskSize(
        12_032, 12_032, 2_800_000, 2_800_000, 300.0, shots=5, subjects=14, generated=400, counted=False
    ),
    "hendrycks_math500": TaskSize(500, 500, 40_000, 40_000, 300.0, generated=256, counted=False),
}
OTHER = TaskSize(2000, 8000, 1_000_000, 1_000_000, 100.0, counted=False)
"""A task that is not in the table."""


def size_of(task: str) -> TaskSize:
    """The size of a task."""
    return SIZES.get(task, OTHER)
