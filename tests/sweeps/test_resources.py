"""Estimated resources: laws that any estimate must obey, and the sizes that hardware forces."""

import dataclasses
from itertools import pairwise

import pytest

from ptqbench.cell.spec import ResourcesSpec
from ptqbench.data.task_sizes import SIZES
from ptqbench.data.tasks import TASKS
from ptqbench.errors import ConfigError
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


@pytest.mark.parametrize("method", ["coquant", "smoothquant", "awq"])
def test_the_windows_of_a_transforms_pass_fit_the_host(method):
    """Its streams are float32 and may have more windows than those of rounding: 512 x 2048 x 8192 numbers, twice, are 64 GiB."""
    spec = compose_cell([f"+method={method}", "model=tiny", "evaluation.tasks=[]", "calibration=wikitext2"])
    spec, shape = with_model(spec, dtype="bfloat16"), published()["llama-3-70b"]
    transform = spec.method.transform
    more = dataclasses.replace(transform, options=transform.options | {"n_samples": 1024})
    larger = dataclasses.replace(spec, method=dataclasses.replace(spec.method, transform=more))
    assert needs(larger, shape).host_mem_gib >= 2 * 1024 * 2048 * 8192 * 4 / 2**30
    assert needs(larger, shape).host_mem_gib > needs(spec, shape).host_mem_gib


def test_given_values_win(cell):
    given = ResourcesSpec(gpus=0, host_mem_gib=12.0, cpus=3, time_min=7)
    amount = needs(dataclasses.replace(cell, resources=given), published()["llama-3-8b"])
    assert (amount.gpus, amount.host_mem_gib, amount.cpus, amount.time_min) == (0, 12.0, 3, 7)


def test_another_try_has_more_memory(cell):
    amount = needs(with_model(cell, dtype="bfloat16"), published()["llama-3-8b"])
    more = doubled(amount)
    assert more.gpu_mem_gib > amount.gpu_mem_gib
    assert more.host_mem_gib == 2 * amount.host_mem_gib


def evaluated(cell, *tasks, engine="blocks", **changes):
    evaluation = dataclasses.replace(cell.evaluation, tasks=tasks, engine=engine, **changes)
    return dataclasses.replace(with_model(cell, dtype="bfloat16"), evaluation=evaluation)


def test_lm_evals_class_holds_the_whole_model(cell):
    shape = published()["llama-3-8b"]
    tasks = evaluated(cell, "piqa/acc", engine="whole")
    assert needs(tasks, shape).gpu_mem_gib * 2**30 > 2 * 8.03e9
    assert needs(tasks, shape).estimate_min > needs(evaluated(cell, "piqa/acc"), shape).estimate_min
    assert needs(evaluated(cell, "piqa/acc"), shape).estimate_min > needs(evaluated(cell), shape).estimate_min


def test_tasks_of_a_70b_model_are_scored_on_one_80_gb_gpu(cell):
    tasks = evaluated(cell, "hellaswag/acc", "mmlu/acc", few_shot={"mmlu": 5}, fidelity=True)
    found = needs(tasks, published()["llama-3-70b"])
    assert (found.gpus, found.gpu_mem_gib <= 80) == (1, True)


@pytest.mark.parametrize(
    ("model", "given", "gpus"),
    [("llama-3-8b", {}, 1), ("llama-3-70b", {}, 3), ("llama-3-70b", {"gpu_mem_gib": 141.0}, 2), ("llama-3-70b", {"gpus": 1}, 1)],
)  # fmt: skip
def test_a_model_that_writes_is_spread_over_as_many_gpus_as_hold_it(cell, model, given, gpus):
    writing = dataclasses.replace(evaluated(cell, "gsm8k/exact_match:strict-match"), resources=ResourcesSpec(**given))
    found = needs(writing, published()[model])
    assert found.gpus == gpus
    assert gpus * found.gpu_mem_gib * 2**30 > 2 * published()[model].linear_params


def test_what_is_written_takes_its_time_token_by_token(cell):
    shape, word = published()["llama-3-8b"], "gsm8k/exact_match:strict-match"
    one, eight = (needs(evaluated(cell, word, batch_size=size), shape).estimate_min for size in (1, 8))
    assert one > 5 * eight


def test_fidelity_adds_two_passes_of_every_text_and_one_of_the_tasks(cell):
    shape = published()["llama-3-8b"]
    plain, more = (
        needs(evaluated(cell, "hellaswag/acc", fidelity=fidelity), shape).estimate_min for fidelity in (False, True)
    )
    without = needs(evaluated(cell), shape).estimate_min
    assert more - plain > plain - without > 0


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_tasks_obey_their_laws(name):
    size = SIZES[name]
    assert size.trees <= size.whole
    assert size.examples <= size.requests
    assert size.read(True) <= size.read(False)
    assert size.read(True, shots=5) > size.read(True, shots=0)
    assert size.read(False, shots=5, limit=1) < size.read(False, shots=5)
    assert size.measured(10**9) == size.examples
    assert bool(size.written) == TASKS[name].generates == bool(size.most_written)


def test_every_known_task_has_its_size_and_shots_of_a_subject_are_read_few_times():
    assert set(SIZES) == set(TASKS)
    mmlu = SIZES["mmlu"]
    assert mmlu.measured(3) == 3 * 57
    assert mmlu.read(False, shots=5) > 4 * mmlu.read(True, shots=5)


def test_a_task_whose_answers_fill_the_context_is_refused(tmp_path, checkpoint):
    folder = checkpoint("llama", max_position_embeddings=2048)
    words = ["+method=rtn", "bitwidth=w4", "model=local", f"model.path={folder}", f"evaluation.data_dir={tmp_path}"]
    for task in ("gsm8k", "mmlu_pro"):
        (tmp_path / f"{task}.test.jsonl").write_text('{"question": "2?"}\n')
    gsm8k, mmlu_pro = "gsm8k/exact_match:strict-match", "mmlu_pro/exact_match:custom-extract"
    compose_cell([*words, "evaluation=gsm8k", f"evaluation.tasks=[{gsm8k}]"])
    with pytest.raises(
        ConfigError, match=r"'mmlu_pro' leaves room for 2048 written tokens.*max_position_embeddings=2048"
    ):
        compose_cell([*words, "evaluation=mmlu", "evaluation.few_shot={}", f"evaluation.tasks=[{mmlu_pro}]"])


def test_durations_for_people():
    assert [duration(m) for m in (0.5, 3, 125, 1680)] == ["30 s", "3 min", "2 h 05", "1 d 4 h"]
