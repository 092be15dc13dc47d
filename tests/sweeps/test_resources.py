"""Estimated resources: laws that any estimate must obey, and the sizes that hardware forces."""

import dataclasses
from itertools import pairwise

import pytest

from ptqbench.cell.spec import ResourcesSpec
from ptqbench.models.architecture import published
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resources import doubled, duration, needs


@pytest.fixture(scope="module")
def cell():
    return compose_cell(["+method=coquant", "model=tiny", "evaluation.tasks=[]"])


def with_model(spec, **changes):
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, **changes))


def test_more_work_never_needs_less(cell):
    shapes = [published()[name] for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3-70b")]
    found = [needs(with_model(cell, dtype="bfloat16"), shape) for shape in shapes]
    for smaller, larger in pairwise(found):
        assert smaller.gpu_mem_gib <= larger.gpu_mem_gib
        assert smaller.host_mem_gib <= larger.host_mem_gib
        assert smaller.estimate_min < larger.estimate_min
        assert smaller.time_min <= larger.time_min
    assert all(amount.time_min >= amount.estimate_min for amount in found)


def test_a_70b_model_fits_one_80_gb_gpu_and_the_tiny_one_needs_none(cell):
    big = needs(with_model(cell, dtype="bfloat16"), published()["llama-3-70b"])
    assert (big.gpus, big.gpu_mem_gib <= 80) == (1, True)
    from ptqbench.models.architecture import from_config
    from ptqbench.sweeps.resolve import Known

    small = needs(cell, from_config(Known().config(cell.model)))
    assert (small.gpus, small.gpu_mem_gib) == (0, 0.0)


def test_given_values_win(cell):
    given = ResourcesSpec(gpus=0, host_mem_gib=12.0, cpus=3, time_min=7)
    amount = needs(dataclasses.replace(cell, resources=given), published()["llama-3-8b"])
    assert (amount.gpus, amount.host_mem_gib, amount.cpus, amount.time_min) == (0, 12.0, 3, 7)


def test_another_try_has_more_memory(cell):
    amount = needs(with_model(cell, dtype="bfloat16"), published()["llama-3-8b"])
    more = doubled(amount)
    assert more.gpu_mem_gib > amount.gpu_mem_gib
    assert more.host_mem_gib == 2 * amount.host_mem_gib


def test_zero_shot_tasks_hold_the_whole_model(cell):
    tasks = dataclasses.replace(cell.evaluation, tasks=("piqa",))
    shape, cell = published()["llama-3-8b"], with_model(cell, dtype="bfloat16")
    assert needs(dataclasses.replace(cell, evaluation=tasks), shape).gpu_mem_gib * 2**30 > 2 * 8.03e9
    assert needs(dataclasses.replace(cell, evaluation=tasks), shape).estimate_min > needs(cell, shape).estimate_min


def test_tasks_block_by_block_hold_one_block(cell):
    shape, cell = published()["llama-3-70b"], with_model(cell, dtype="bfloat16")
    streamed = dataclasses.replace(cell.evaluation, tasks=("hellaswag/acc",), engine="blocks")
    generating = dataclasses.replace(streamed, tasks=("gsm8k/exact_match:strict-match",))
    assert needs(dataclasses.replace(cell, evaluation=streamed), shape).gpu_mem_gib <= 80
    assert needs(dataclasses.replace(cell, evaluation=generating), shape).gpu_mem_gib * 2**30 > 2 * 70e9


def test_durations_for_people():
    assert [duration(m) for m in (0.5, 3, 125, 1680)] == ["30 s", "3 min", "2 h 05", "1 d 4 h"]
