"""Tasks with a form of their own, on rows with the columns of the hub, against lm-eval called directly."""

import json
import re

import pytest
import torch
from direct import direct_scores, task_file
from transformers import AutoTokenizer

from ptqbench.cell.spec import EvaluationSpec
from ptqbench.data.tasks import TASKS, task_digests
from ptqbench.errors import ConfigError
from ptqbench.evaluate import definitions
from ptqbench.evaluate.definitions import load_task, prepare
from ptqbench.evaluate.loglikelihood import log_likelihoods
from ptqbench.evaluate.zero_shot import Harness, metrics_of
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource

LAMBADA = [{"text": f"The bear saw {i} fish in the river. Then the bear ate the {word}"} for i, word in enumerate(
    ("fish", "river bank", "bear's lunch", "9"))]  # fmt: skip
GPQA = [
    {
        "Question": f"What is number {i}?",
        "Correct Answer": f"right {i}",
        **{f"Incorrect Answer {n}": f"wrong {i} {'very ' * n}" for n in (1, 2, 3)},
    }
    for i in range(12)
]
OPTIONS = ["red", "blue", "green", "grey", "pink"]
MMLU_PRO = [
    {
        "question": f"Which colour is {i}?", "options": OPTIONS[: 3 + i % 3], "answer": "ABC"[i % 3], "answer_index": i % 3,
        "category": "law" if i == 1 else "math", "cot_content": f"A: Let's think step by step. It is {i}. The answer is (B).",
    }
    for i in range(4)
]  # fmt: skip
MATH = [
    {"problem": f"What is ${i} + {i}$?", "solution": rf"It is $\boxed{{{2 * i}}}$.", "answer": str(2 * i), "subject": "Algebra"}
    for i in range(3)
]  # fmt: skip


def write_rows(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def blocks(folder):
    return BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))


def harness(folder, **settings):
    return Harness(blocks(folder).materialise(), AutoTokenizer.from_pretrained(folder), EvaluationSpec("e", **settings))


def by_blocks(folder, spec):
    """The harness of ``engine=blocks``."""
    model = blocks(folder)
    longest = model.config.max_position_embeddings
    score = lambda requests: log_likelihoods(model, requests, longest)
    return Harness(model.skeleton, AutoTokenizer.from_pretrained(folder), spec, score)


def likelihoods(samples):
    return [[response[0] for response in sample["filtered_resps"]] for sample in samples]


def writing(checkpoint):
    """A random model whose tokenizer has an end-of-text token."""
    folder = checkpoint("llama", max_position_embeddings=1024)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_last_word(checkpoint, tmp_path):
    folder = checkpoint("llama", max_position_embeddings=512)
    write_rows(tmp_path, "lambada_openai", LAMBADA)
    task_file(tmp_path, "lambada_openai", LAMBADA)
    expected, samples = direct_scores(folder, tmp_path, ["lambada_openai"], 2)
    spec = EvaluationSpec("e", batch_size=2, data_dir=str(tmp_path))
    rows, summary = harness(folder, batch_size=2, data_dir=str(tmp_path)).evaluate(
        "lambada_openai", "lambada_openai", load_task("lambada_openai", "lambada_openai", spec)
    )
    assert [row["log_likelihoods"] for row in rows] == likelihoods(samples["lambada_openai"])
    for metric in TASKS["lambada_openai"].metrics:
        found = metrics_of("lambada_openai", [metric], [summary])[f"lambada_openai/{metric}"]
        assert found["value"] == expected["lambada_openai"][f"{metric},none"]


def test_shuffled_choices_stand_as_lm_eval_shuffles_them_wherever_the_task_stands(checkpoint, tmp_path):
    """Choices are shuffled with Python's ``random``, each time lm-eval processes the rows."""
    folder, task = checkpoint("llama", max_position_embeddings=512), "gpqa_diamond_zeroshot"
    write_rows(tmp_path, f"{task}.train", GPQA)
    write_rows(tmp_path, "lambada_openai", LAMBADA)
    task_file(tmp_path, task, GPQA)
    expected, samples = direct_scores(folder, tmp_path, [task], 4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for words in ((f"{task}/acc",), ("lambada_openai/acc", f"{task}/acc_norm", f"{task}/acc")):
        spec = EvaluationSpec("e", tasks=words, batch_size=4, data_dir=str(tmp_path))
        loaded = prepare(spec, tokenizer)[task][task]
        rows, summary = harness(folder, batch_size=4, data_dir=str(tmp_path)).evaluate(task, task, loaded)
        assert [row["log_likelihoods"] for row in rows] == likelihoods(samples[task])
        assert [row["target"] for row in rows] == [sample["target"] for sample in samples[task]]
        for metric in ("acc", "acc_norm"):
            assert summary["values"][f"{metric},none"] == expected[task][f"{metric},none"]
        # The right answer is the one that stands behind its letter in the prompt that the model saw.
        for instance in loaded.instances:
            assert f"{instance.doc['answer']} right {instance.doc_id}\n" in instance.args[0]
    assert len({row["target"] for row in rows}) > 1


@pytest.mark.parametrize("task", ["mmlu_pro_math", "hendrycks_math500"])
def test_written_answers(checkpoint, tmp_path, task):
    """Shots of one subject in order; text after the last box."""
    folder, request, shots = writing(checkpoint), "mmlu_pro" if task == "mmlu_pro_math" else task, 0
    changes = {"generation_kwargs": {"until": ["Question:"], "max_gen_toks": 12, "do_sample": False}}
    if request == "mmlu_pro":
        shots = 2
        write_rows(tmp_path, "mmlu_pro.test", MMLU_PRO)
        write_rows(tmp_path, "mmlu_pro.validation", MMLU_PRO)
        files = {name: str(tmp_path / f"mmlu_pro.{name}.jsonl") for name in ("test", "validation")}
        changes |= {"dataset_kwargs": {"data_files": files}}
    else:
        write_rows(tmp_path, f"{task}.test", MATH)
    task_file(tmp_path, task, MMLU_PRO if shots else MATH, **changes)
    expected, samples = direct_scores(folder, tmp_path, [task], 2, num_fewshot=shots)
    few_shot = {request: shots}
    spec = EvaluationSpec("e", data_dir=str(tmp_path), few_shot=few_shot)
    loaded = load_task(task, request, spec)
    loaded.config.generation_kwargs = changes["generation_kwargs"]
    rows, summary = harness(folder, batch_size=2, data_dir=str(tmp_path)).evaluate(task, request, loaded)
    assert [row["response"] for row in rows] == [sample["resps"][0][0] for sample in samples[task]]
    assert len({row["response"] for row in rows}) > 1
    prompts = [instance.args[0] for instance in loaded.instances]
    assert prompts == [sample["arguments"][0][0] for sample in samples[task]]
    (metric,) = TASKS[request].metrics
    name, _, chosen = metric.partition(":")
    found = metrics_of(request, [metric], [summary])[f"{request}/{metric}"]
    assert found["value"] == expected[task][f"{name},{chosen or 'none'}"]


def test_a_task_without_examples_is_one_line(tmp_path):
    write_rows(tmp_path, "mmlu_pro.test", MMLU_PRO)
    write_rows(tmp_path, "mmlu_pro.validation", MMLU_PRO)
    spec = EvaluationSpec("e", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"'mmlu_pro_biology'.*hold no example of it") as refused:
        load_task("mmlu_pro_biology", "mmlu_pro", spec)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("task", ["lambada_openai", "gpqa_diamond_zeroshot", "mmlu_pro", "hendrycks_math500"])
def test_a_branch_is_pinned_when_a_cell_is_composed(task):
    spec = EvaluationSpec("e", tasks=(f"{task}/{TASKS[task].metrics[0]}",))
    asked = []
    digests = task_digests(spec, lambda *given: asked.append(given) or "0" * 40)
    assert digests == {task: f"hub:{TASKS[task].repository}@{'0' * 40}"}
    assert asked == [(TASKS[task].repository, "main")]
    assert re.fullmatch(r"[\w-]+/[\w-]+", TASKS[task].repository)


@pytest.mark.parametrize("path", [None, "/nowhere/utils.process_docs", "/somewhere/lm_eval.tasks.noreval.utils.filter"])
def test_what_lm_eval_finds_elsewhere_is_left_to_it(path):
    assert definitions._processed_once(path) == {}
