"""Multiple-choice tasks: seconds of lm-eval's class on the whole model, and of ours by blocks, on the same requests.

    python benchmarks/tasks.py [--data FOLDER --tokenizer FOLDER] [--shape qwen2-256] [--limit 100] [--batch-size 8]

``--data`` holds task sets as for ``evaluation.data_dir``, ``--tokenizer`` the tokenizer.json of Qwen2.5; both classes get the token
ids that lm-eval makes of its own prompts. Without them only the five-shot questions are measured. These are made up: subjects of
20 questions behind 600 tokens of examples, four choices of one token, as in MMLU. On a CPU: CPU seconds of one thread, the
smallest of ``--repeats``; on a GPU wall-clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_model
from e2e import Stopwatch

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "social_iqa", "winogrande", "boolq")
SUBJECTS, QUESTIONS, SHOTS, QUESTION = 2, 20, 600, 60
LINE = "{:14} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6}  {}"
Request = tuple[list[int], list[int]]
Scores = list[tuple[float, bool]]


def five_shot(vocabulary: int, subjects: int = SUBJECTS, questions: int = QUESTIONS) -> list[Request]:
    """Made-up requests of the form of five-shot MMLU."""
    draw = random.Random(0)
    words = lambda n: [draw.randrange(vocabulary) for _ in range(n)]  # noqa: E731
    found = []
    for _ in range(subjects):
        shots = words(SHOTS)
        for _ in range(questions):
            question = shots + words(QUESTION)
            found += [(question, words(1)) for _ in range(4)]
    return found


def of_task(name: str, data: Path, limit: int | None, model: Any, tokenizer: Any) -> list[Request]:
    """The requests that lm-eval makes of a task."""
    from ptqbench.cell.spec import EvaluationSpec
    from ptqbench.evaluate.definitions import prepare
    from ptqbench.evaluate.zero_shot import Harness

    seen: list[Request] = []

    def score(requests: list[Request]) -> Scores:
        seen.extend(requests)
        return [(0.0, False)] * len(requests)

    spec = EvaluationSpec("benchmark", tasks=(f"{name}/acc",), data_dir=str(data), limit=limit)
    Harness(model, tokenizer, spec, score).score_all(list(prepare(spec, tokenizer)[name].values()))
    return seen


def measure(watch: Stopwatch, repeats: int, work: Callable[[], Scores]) -> tuple[float, Scores]:
    """Run something several times; the smallest seconds and the last result."""
    found: list[Scores] = []
    seconds = [watch.measure(lambda: found.append(work())) for _ in range(repeats)]
    return min(seconds), found[-1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-256")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    if bool(given.data) != bool(given.tokenizer):
        parser.error("--data and --tokenizer go together")
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from lm_eval.models.huggingface import HFLM

    from ptqbench.data.tokenizer import load_tokenizer
    from ptqbench.evaluate.loglikelihood import log_likelihoods
    from ptqbench.evaluate.trees import pack
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device, watch, shape = torch.device(kind), Stopwatch(kind), random_model.shape(given.shape, given.blocks)
    if kind == "cpu":
        torch.set_num_threads(1)
    if given.tokenizer:
        shape = dataclasses.replace(shape, vocab_size=151_936)
    dtype = "float32" if kind == "cpu" else "bfloat16"
    with tempfile.TemporaryDirectory() as name:
        folder = random_model.write(Path(name) / "model", shape, dtype)
        if given.tokenizer:
            for path in given.tokenizer.glob("*.json"):
                shutil.copy(path, folder)
        model = BlockwiseModel(ModelSource(folder), getattr(torch, dtype), device)
        tokenizer = load_tokenizer(folder)
        sets = {"five-shot": five_shot(shape.vocab_size)}
        if given.data:
            sets |= {t: of_task(t, given.data, given.limit, model.skeleton, tokenizer) for t in TASKS}
            sets["all eight"] = [request for task in TASKS for request in sets[task]]
        whole = BlockwiseModel(ModelSource(folder), getattr(torch, dtype), device).materialise()
        harness = HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=given.batch_size, max_length=4096)
        print(f"{given.shape}, {shape.n_blocks} blocks, vocabulary {shape.vocab_size}, {kind}, {dtype}")
        print(f"batch size {given.batch_size}, {given.limit} examples a task, {torch.get_num_threads()} threads")
        print(LINE.format("", "requests", "tokens", "in trees", "lm-eval", "blocks", "ratio", "largest difference"))
        for task, requests in sets.items():
            asked = [(("", ""), context, continuation) for context, continuation in requests]
            usual = lambda asked=asked: harness._loglikelihood_tokens(asked, disable_tqdm=True)  # noqa: E731
            ours = lambda requests=requests: log_likelihoods(model, requests, 4096)  # noqa: E731
            theirs_s, theirs = measure(watch, given.repeats, usual)
            ours_s, scores = measure(watch, given.repeats, ours)
            tokens = sum(len(a) + len(b) - 1 for a, b in requests)
            trees = sum(len(row.tokens) for row in pack([(a + b)[:-1] for a, b in requests]))
            apart = max(abs(a - b) for (a, _), (b, _) in zip(theirs, scores, strict=True))
            words = (f"{len(requests):,}", f"{tokens:,}", f"{trees:,}", f"{theirs_s:.1f} s", f"{ours_s:.1f} s")
            print(LINE.format(task, *words, f"{theirs_s / ours_s:.2f}", f"{apart:.1e}"), flush=True)


if __name__ == "__main__":
    main()
