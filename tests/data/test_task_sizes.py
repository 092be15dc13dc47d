"""Sizes of tasks against counted requests."""

import random

import pytest

from ptqbench.data.task_sizes import SIZES, TaskSize
from ptqbench.evaluate.trees import pack


def in_trees(requests):
    return sum(len(row.tokens) for row in pack([(context + continuation)[:-1] for context, continuation in requests]))


def test_the_size_of_a_task_is_its_counted_size(real_data, checkpoint):
    """OpenBookQA, complete, with the tokenizer of Qwen2.5 and the prompts of lm-eval."""
    import torch
    from transformers import AutoTokenizer

    from ptqbench.cell.spec import EvaluationSpec
    from ptqbench.evaluate.definitions import prepare
    from ptqbench.evaluate.zero_shot import Harness
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource

    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen2.5")
    model = BlockwiseModel(ModelSource(checkpoint()), torch.float32, torch.device("cpu"))
    spec = EvaluationSpec("e", tasks=("openbookqa/acc",), data_dir=str(real_data / "zeroshot"))
    found = []
    score = lambda requests: found.extend(requests) or [(0.0, False)] * len(requests)
    model.config.max_position_embeddings = 4096
    Harness(model.skeleton, tokenizer, spec, score).score_all([prepare(spec, tokenizer)["openbookqa"]["openbookqa"]])
    size = SIZES["openbookqa"]
    assert len(found) == size.requests
    assert sum(len(context) + len(continuation) - 1 for context, continuation in found) == size.whole
    assert in_trees(found) == size.trees


@pytest.mark.parametrize("questions", [20, 150])
def test_shots_of_a_subject_are_read_once_per_row(questions):
    """Made-up subjects of MMLU's form: four choices of one token, behind shots that a subject shares."""
    rng, shots, subjects = random.Random(0), 600, 3
    word = lambda n: [rng.randrange(30_000) for _ in range(n)]
    plain, behind = [], []
    for _ in range(subjects):
        prefix = word(shots)
        for _ in range(questions):
            question = word(rng.randint(60, 160))
            for _ in range(4):
                answer = word(1)
                plain.append((question, answer))
                behind.append((prefix + question, answer))
    examples = subjects * questions
    whole = sum(len(context) for context, _ in plain)
    size = TaskSize(examples, 4 * examples, whole, in_trees(plain), shots / 5, subjects=subjects, at_once=4)
    assert size.read(True, shots=5) == pytest.approx(in_trees(behind), rel=0.15)
    assert size.requested(shots=5) == sum(len(context) for context, _ in behind)
    assert size.read(False, shots=5) == size.requested(shots=5) // 4
