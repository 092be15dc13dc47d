"""What the choice of a model or a method fills in, and what is given beside it."""

import pytest

from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import compose_data
from ptqbench.sweeps.resolve import validated


@pytest.fixture(scope="module")
def composed():
    """The embedded model with GPTQ, its evaluation left to the model."""
    return compose_data(["+method=gptq", "model=tiny"])


def evaluation(composed, **given):
    return validated(composed | {"evaluation": composed["evaluation"] | given}).evaluation


def test_no_texts_means_none_and_leaves_the_tasks(composed):
    usual, found = evaluation(composed), evaluation(composed, texts={})
    assert list(usual.texts) == ["tiny"]
    assert found.texts == {}
    assert (found.name, found.tasks) == (usual.name, usual.tasks)


def test_part_of_a_text_completes_the_usual_one(composed):
    found = evaluation(composed, texts={"tiny": {"seq_len": 128}}).texts["tiny"]
    assert (found.dataset, found.split, found.seq_len) == ("tiny", "evaluation", 128)


def test_another_text_stands_beside_the_usual_one(composed):
    found = evaluation(composed, texts={"mine": {"dataset": "file", "path": "t.txt"}}).texts
    assert [(label, text.dataset) for label, text in found.items()] == [("tiny", "tiny"), ("mine", "file")]


def test_part_of_an_unknown_text_says_what_is_missing(composed):
    with pytest.raises(ConfigError, match=r"missing value for 'evaluation\.texts\.tini\.dataset'"):
        evaluation(composed, texts={"tini": {"seq_len": 128}})


def test_an_evaluation_chosen_by_name_is_taken_as_it_is(composed):
    chosen = {"name": "mine", "texts": {"t": {"dataset": "tiny", "split": "evaluation"}}, "tasks": [], "batch_size": 1}
    assert list(evaluation(composed, **chosen).texts) == ["t"]


def test_an_unknown_section_is_named(composed):
    with pytest.raises(ConfigError, match="unknown key 'sed'; did you mean 'seed'"):
        validated(composed | {"sed": 1})
