"""Requests of every kind: scored as by lm-eval called directly, or refused in one line."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqbench.cell.spec import EvaluationSpec
from ptqbench.errors import ConfigError
from ptqbench.evaluate.loglikelihood import scorer
from ptqbench.evaluate.zero_shot import Harness
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource

CONTEXT = 48
LONG = "the cat saw the bird in the old red house " * 12


class Forgets:
    """Keeps no scores."""

    def known(self):
        return {}

    def get(self, keys, compute):
        return compute()


@pytest.fixture
def folder(checkpoint):
    return checkpoint("llama", max_position_embeddings=CONTEXT)


def instances(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def ours(folder, engine):
    """The model under lm-eval, as a cell has it."""
    model, tokenizer = (
        BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu")),
        AutoTokenizer.from_pretrained(folder),
    )
    spec = EvaluationSpec("e", tasks=("piqa/acc",), batch_size=4, engine=engine)
    if engine == "whole":
        return Harness(model.materialise(), tokenizer, spec)._model
    return Harness(model.skeleton, tokenizer, spec, scorer(model, None, Forgets(), lambda index: None))._model


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)


def merging(folder):
    """A context and a continuation across whose border the tokenizer merges, so that tokens of the context change."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "the bird sings to the moon in the house"
    tokens = lambda words: tokenizer(words)["input_ids"]
    found = [
        (text[:i], text[i:]) for i in range(1, len(text)) if tokens(text)[: len(tokens(text[:i]))] != tokens(text[:i])
    ]
    assert found
    return found


@pytest.mark.parametrize("engine", ["whole", "blocks"])
def test_every_kind_of_request_is_scored_as_by_lm_eval(folder, engine):
    kinds = {
        "short": [("the cat", " sat"), ("the cat", " saw the bird")],
        "one token": [("the cat saw the", f" {word}") for word in ("a", "b", "c")],
        "twice": [("the cat", " sat")] * 3,
        "no context": [("", "the cat sat"), ("", "a")],
        "spaces at the border": [("the cat  ", "sat"), ("the cat ", " sat"), ("the cat ", "")],
        "too long for the context": [(LONG, " the bird"), (LONG + "and", " the bird"), (LONG + "and", " a")],
        "ends equal after truncation": [("one " + LONG, " sat"), ("two " + LONG, " sat")],
        "merged across the border": merging(folder),
    }
    pairs = [pair for found in kinds.values() for pair in found]
    # One by one, for lm-eval 0.4.13 is wrong where two requests are one sequence that is divided at different places.
    each = lambda model: [model.loglikelihood(instances([pair]), disable_tqdm=True)[0] for pair in pairs]
    expected = each(theirs(folder))
    model = ours(folder, engine)
    found = each(model) if engine == "whole" else model.loglikelihood(instances(pairs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({value for value, _ in found}) > len(pairs) / 2


@pytest.mark.parametrize("engine", ["whole", "blocks"])
def test_a_long_text_is_cut_into_windows_as_by_lm_eval(folder, engine):
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((LONG, "the cat", LONG + "b"))]
    expected = theirs(folder).loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours(folder, engine).loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("engine", ["whole", "blocks"])
@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("the cat", ""), "its continuation has no token"),
        (("", ""), "its continuation has no token"),
        (("the cat", " " + LONG), f"the context of the model {CONTEXT}"),
    ],
)
def test_what_cannot_be_scored_is_one_line(folder, engine, pair, words):
    with pytest.raises(ConfigError, match=words) as refused:
        ours(folder, engine).loglikelihood(instances([("the cat", " sat"), pair]))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
