"""Log-likelihoods through token trees: the law of the tree, and equality with whole sequences one by one."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_checkpoint
from ptqbench.evaluate.loglikelihood import log_likelihoods
from ptqbench.evaluate.trees import Row, attended, batches, pack
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource


def sequences(seed, n=40, vocabulary=4, longest=30):
    """Sequences over few tokens, so that many begin alike and some are equal or prefixes of others."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_a_path_of_one_row(seed):
    wanted = sequences(seed)
    found = {}
    for row in pack(wanted):
        for number, path in row.ends:
            assert number not in found
            found[number] = [row.tokens[i] for i in path]
            assert [row.depth[i] for i in path] == list(range(len(path)))
    assert [found[i] for i in range(len(wanted))] == wanted


@pytest.mark.parametrize("seed", range(5))
def test_a_token_attends_to_its_ancestors_and_itself(seed):
    for row in pack(sequences(seed)):
        length = len(row.tokens) + 3
        seen = attended(torch.tensor([row.stop + [0] * 3]))[0, 0]
        for _, path in row.ends:
            for i, node in enumerate(path):
                assert seen[node].nonzero().flatten().tolist() == sorted(path[: i + 1])
        padding = range(len(row.tokens), length)
        assert all(seen[i].nonzero().flatten().tolist() == [i] for i in padding)


def test_a_prefix_is_computed_once_and_equal_sequences_are_one():
    shared = list(range(100))
    rows = pack([[*shared, 7], [*shared, 8, 9], [*shared, 7]])
    assert [len(row.tokens) for row in rows] == [100 + 1 + 2]


def test_a_full_row_is_closed_and_the_next_repeats_the_prefix():
    shared = list(range(300))
    rows = pack([[*shared, *range(1000 + i, 1400 + i)] for i in range(12)])
    longest = 4 * 700
    assert len(rows) > 1
    assert all(len(row.tokens) <= longest for row in rows)
    assert all(row.tokens[:300] == shared for row in rows)


def test_batches_keep_the_budget_and_lose_no_row():
    rows = [Row(tokens=[0] * n) for n in (90, 60, 60, 30, 5)]
    groups = batches(rows, 120)
    assert [row for group in groups for row in group] == rows
    assert all(len(group) * len(group[0].tokens) <= 120 for group in groups)
    assert [len(group) for group in groups] == [1, 2, 2]


def requests_of(seed, vocabulary):
    """Questions with four choices of one to six tokens, some with an equal beginning, behind shots that all share."""
    rng = random.Random(seed)
    word = lambda longest: [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))]
    shots, found = word(30), []
    for _ in range(6):
        question = shots + word(25)
        found += [(question, word(6)) for _ in range(3)] + [(question, [rng.randrange(vocabulary)])]
    return found


def one_by_one(folder, requests, max_length):
    """The definition, with plain transformers and without any sharing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for context, continuation in requests:
        tokens = (context + continuation)[-(max_length + 1) :]
        with torch.no_grad():
            logs = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = torch.tensor(continuation)
        yield float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("max_length", [100, 24])
def test_scores_are_those_of_whole_sequences(kind, max_length, tmp_path):
    folder = random_checkpoint(tmp_path, kind)
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    requests = requests_of(0, model.architecture.vocab_size)
    expected = list(one_by_one(folder, requests, max_length))
    for budget in (64, 4096):
        found = log_likelihoods(model, requests, max_length, token_budget=budget)
        assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) < 1e-4
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_said_to_be_one(tmp_path):
    folder = random_checkpoint(tmp_path)
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    context = [5, 6, 7]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        best = int(whole(torch.tensor([context])).logits[0, -1].argmax())
    (_, first), (_, second) = log_likelihoods(model, [(context, [best]), (context, [best - 1])], 100)
    assert first
    assert not second
