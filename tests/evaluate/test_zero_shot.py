"""Our path against lm-eval called directly, on real data and a real model; shots, groups, generation, records, batch sizes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from direct import direct_scores, task_file
from transformers import AutoTokenizer

from fake_hub import card, commit, table, write_cache
from ptqbench.cell.spec import EvaluationSpec
from ptqbench.data.tasks import TASKS
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.evaluate import definitions, task_files
from ptqbench.evaluate.definitions import load_task, members, prepare
from ptqbench.evaluate.zero_shot import Harness, metrics_of
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource

FLAT = ("piqa", "arc_easy", "arc_challenge", "winogrande", "boolq", "social_iqa", "hellaswag", "openbookqa")


class LoadingHarness(Harness):
    """Loads a task when it is measured."""

    def evaluate(self, name, request):
        return super().evaluate(name, request, load_task(name, request, self._spec))


def harness(folder, **settings):
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu")).materialise()
    return LoadingHarness(model, AutoTokenizer.from_pretrained(folder), EvaluationSpec(name="e", **settings))


def longer_context(source, folder):
    """The real model with a context in which every question fits (its tokens are short)."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


def compare(real_data, tmp_path, tasks, limit, batch_size=16):
    """Every metric, every example and every log-likelihood of ours equals lm-eval's own, bit for bit."""
    checkpoint = longer_context(real_data / "models" / "stories260K", tmp_path / "model")
    data = real_data / "zeroshot"
    if limit is not None:
        data = tmp_path / "head"
        data.mkdir()
    for task in tasks:
        (path,) = (real_data / "zeroshot").glob(f"{task}.*.jsonl")
        lines = path.read_text().splitlines(keepends=True)[:limit]
        task_file(tmp_path, task, [json.loads(line) for line in lines])
        if limit is not None:
            (data / path.name).write_text("".join(lines))
    expected, samples = direct_scores(checkpoint, tmp_path, tasks, batch_size)
    ours = harness(checkpoint, batch_size=batch_size, data_dir=str(data))
    for task in tasks:
        rows, summary = ours.evaluate(task, task)
        assert summary["n_examples"] == len(rows) == len(samples[task])
        for metric in TASKS[task].metrics:
            found = metrics_of(task, [metric], [summary])[f"{task}/{metric}"]
            assert found["value"] == expected[task][f"{metric},none"], (task, metric)
            assert found["stderr"] == expected[task][f"{metric}_stderr,none"], (task, metric)
            assert [row[metric] for row in rows] == [sample[metric] for sample in samples[task]]
        for row, sample in zip(rows, samples[task], strict=True):
            assert row["example"] == sample["doc_id"]
            assert row["log_likelihoods"] == [response[0] for response in sample["filtered_resps"]]


def test_every_flat_format_equals_lm_eval_called_directly(real_data, tmp_path):
    compare(real_data, tmp_path, FLAT, limit=6)


def write_rows(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(n, subject=None):
    more = {} if subject is None else {"subject": subject}
    return [
        {"question": f"Which tree is number {i}? ", "choices": ["oak", "elm", "ash tree", "fir"], "answer": i % 4}
        | more
        for i in range(n)
    ]


RACE = [
    {
        "article": "The bear sat by the river. " * (i + 1),
        "problems": str(
            [
                {"question": "Where was the bear?", "answer": "A", "options": ["By the river", "At home", "Far", "Up"]},
                {"question": f"What came {i}  _  .", "answer": "B", "options": ["a dog", "a fish", "rain", "night"]},
            ]
        ),
    }
    for i in range(4)
]
SUMS = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)]
ENDINGS = [
    {
        "ind": i, "activity_label": "Cooking", "ctx_a": f"A man [title] stands in room {i}.", "ctx_b": "he",
        "endings": ["eats  the fish.", "[step] runs away.", "sings.", "sleeps now."], "label": str(i % 4),
    }
    for i in range(5)
]  # fmt: skip


@pytest.mark.parametrize(("task", "rows"), [("race", RACE), ("hellaswag", ENDINGS)])
def test_hub_columns_in_a_local_folder_go_through_lm_evals_own_processing(checkpoint, tmp_path, task, rows):
    folder = checkpoint("llama", max_position_embeddings=512)
    write_rows(tmp_path, task, rows)
    task_file(tmp_path, task, rows)
    expected, samples = direct_scores(folder, tmp_path, [task], 4)
    found, summary = harness(folder, batch_size=4, data_dir=str(tmp_path)).evaluate(task, task)
    assert summary["values"]["acc,none"] == expected[task]["acc,none"]
    likelihoods = [[response[0] for response in sample["filtered_resps"]] for sample in samples[task]]
    assert [row["log_likelihoods"] for row in found] == likelihoods
    assert len({str(row["log_likelihoods"]) for row in found}) > 1


def test_subject_of_a_group_with_shots_equals_lm_eval_called_directly(checkpoint, tmp_path):
    folder, task = checkpoint("qwen2", max_position_embeddings=1024), "mmlu_anatomy"
    write_rows(tmp_path, f"{task}.test", questions(9))
    write_rows(tmp_path, f"{task}.dev", questions(5)[::-1])
    splits = {name: str(tmp_path / f"{task}.{name}.jsonl") for name in ("dev", "test")}
    task_file(tmp_path, task, questions(9), dataset_kwargs={"data_files": splits}, fewshot_split="dev")
    expected, samples = direct_scores(folder, tmp_path, [task], 3, num_fewshot=5)
    ours = harness(folder, batch_size=3, data_dir=str(tmp_path), few_shot={"mmlu": 5})
    rows, summary = ours.evaluate(task, "mmlu")
    assert summary["values"]["acc,none"] == expected[task]["acc,none"]
    likelihoods = [[response[0] for response in sample["filtered_resps"]] for sample in samples[task]]
    assert [row["log_likelihoods"] for row in rows] == likelihoods
    assert samples[task][0]["arguments"][0][0].count("Answer:") == 6


def test_shots_and_generated_text_equal_lm_eval_called_directly(checkpoint, tmp_path):
    """gsm8k: examples from the training split, greedy text, two filters."""
    folder = checkpoint("llama", max_position_embeddings=1024)
    write_rows(tmp_path, "gsm8k.train", SUMS)
    write_rows(tmp_path, "gsm8k.test", SUMS[:2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="end-of-text token"):
        prepare(local_spec(tmp_path, "gsm8k/exact_match:strict-match"), tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    splits = {name: str(tmp_path / f"gsm8k.{name}.jsonl") for name in ("train", "test")}
    task_file(
        tmp_path, "gsm8k", SUMS, dataset_kwargs={"data_files": splits}, training_split="train", fewshot_split="train"
    )
    expected, samples = direct_scores(folder, tmp_path, ["gsm8k"], 2, num_fewshot=3)
    rows, summary = harness(folder, batch_size=2, data_dir=str(tmp_path), few_shot={"gsm8k": 3}).evaluate(
        "gsm8k", "gsm8k"
    )
    assert summary["n_shot"] == 3
    for metric in TASKS["gsm8k"].metrics:
        name, chosen = metric.split(":")
        found = metrics_of("gsm8k", [metric], [summary])[f"gsm8k/{metric}"]
        assert found["value"] == expected["gsm8k"][f"{name},{chosen}"]
    assert [row["response"] for row in rows] == [sample["resps"][0][0] for sample in samples["gsm8k"]]
    assert {row["filter"] for row in rows} == {"strict-match", "flexible-extract"}
    assert samples["gsm8k"][0]["arguments"][0][0].count("####") == 3


def test_shots_without_their_split_are_refused(checkpoint, tmp_path):
    write_rows(tmp_path, "gsm8k.test", SUMS[:3])
    with pytest.raises(ConfigError, match=r"with 5 shots needs gsm8k\.train\.jsonl"):
        harness(checkpoint(), data_dir=str(tmp_path)).evaluate("gsm8k", "gsm8k")
    with pytest.raises(ConfigError, match=r"no piqa\.validation\.jsonl"):
        harness(checkpoint(), data_dir=str(tmp_path)).evaluate("piqa", "piqa")


def test_group_is_the_share_of_all_examples(checkpoint, tmp_path):
    """MMLU: its own 57 subjects, read from one file per subject or one file with a subject column."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    names = members("mmlu")
    assert len(names) == 57
    assert len(definitions._manager("mmlu").all_tasks) < 100  # only its folder is indexed
    write_rows(tmp_path, "mmlu.test", questions(7, "anatomy") + questions(4, "astronomy"))
    write_rows(tmp_path, "mmlu.dev", questions(5, "astronomy"))
    write_rows(tmp_path, "mmlu_anatomy.dev", questions(5))
    write_rows(tmp_path, "mmlu_virology.test", questions(9))
    write_rows(tmp_path, "mmlu_virology.dev", questions(5))
    chosen = ["mmlu_anatomy", "mmlu_astronomy", "mmlu_virology"]
    assert set(chosen) < set(names)
    ours = harness(checkpoint("llama", max_position_embeddings=1024), data_dir=str(tmp_path), few_shot={"mmlu": 2})
    records, summaries = zip(*(ours.evaluate(name, "mmlu") for name in chosen), strict=True)
    assert [summary["n_examples"] for summary in summaries] == [7, 4, 9]
    found = metrics_of("mmlu", ["acc"], list(summaries))["mmlu/acc"]
    correct = [row["acc"] for rows in records for row in rows]
    assert found["value"] == pytest.approx(sum(correct) / 20, abs=1e-15)
    values, errors = zip(*((s["values"]["acc,none"], s["values"]["acc_stderr,none"]) for s in summaries), strict=True)
    assert found["value"] == pytest.approx(aggregate_subtask_metrics(values, [7, 4, 9]), abs=1e-15)
    assert found["stderr"] == pytest.approx(pooled_sample_stderr(errors, [7, 4, 9]), abs=1e-15)
    assert (found["n_examples"], found["n_tasks"], found["n_shot"]) == (20, 3, 2)


def test_batch_size_moves_no_answer_and_only_the_last_digits(checkpoint, tmp_path):
    """Stated tolerance: 1e-4 nats of a log-likelihood in float32."""
    folder = checkpoint("qwen3", max_position_embeddings=512)
    write_rows(tmp_path, "race", RACE)
    found = [harness(folder, batch_size=size, data_dir=str(tmp_path)).evaluate("race", "race") for size in (1, 3, 16)]
    scores = torch.tensor([[row["log_likelihoods"] for row in rows] for rows, _ in found], dtype=torch.float64)
    assert (scores - scores[0]).abs().max() < 1e-4
    assert len({summary["values"]["acc,none"] for _, summary in found}) == 1
    assert [summary["batch_size"] for _, summary in found] == [1, 3, 16]


def test_no_cache_is_ever_opened(checkpoint, tmp_path, monkeypatch):
    """Two models, one process, one folder: no cache of lm-eval is touched, and each gets scores of its own."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator

    def forbidden(*args, **kwargs):
        raise AssertionError("a cache of lm-eval was opened")

    monkeypatch.setattr(lm_eval.api.model.CachingLM, "__init__", forbidden)
    monkeypatch.setattr(lm_eval.api.task, "save_to_cache", forbidden)
    write_rows(tmp_path, "race", RACE)
    first, second = (
        harness(checkpoint(kind, max_position_embeddings=512), data_dir=str(tmp_path)).evaluate("race", "race")[0]
        for kind in ("llama", "qwen2")
    )
    assert [row["digest"] for row in first] == [row["digest"] for row in second]
    assert [row["log_likelihoods"] for row in first] != [row["log_likelihoods"] for row in second]


def test_hub_data_are_read_at_their_pin_and_their_absence_says_what_to_do(checkpoint, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tables"))
    asked = harness(checkpoint("llama", max_position_embeddings=512), tasks=("boolq/acc",))
    with pytest.raises(
        ConfigError, match=r"task 'boolq': hub data set aps/super_glue@3de24cf80.*evaluation\.data_dir=FOLDER"
    ):
        asked.evaluate("boolq", "boolq")
    rows = {"question": ["is it red", "is it blue"], "passage": ["It is red."] * 2, "idx": [0, 1], "label": [1, 0]}
    files = {"boolq/validation.parquet": table(**rows), "boolq/train.parquet": table(**rows)}
    for at, kept in ((TASKS["boolq"].revision, 2), (commit(1), 1)):
        shown = {name: table(**{key: value[:kept] for key, value in rows.items()}) for name in files}
        shown["README.md"] = card(boolq={"train": "boolq/train.parquet", "validation": "boolq/validation.parquet"})
        write_cache(tmp_path / "hub", "aps/super_glue", at, shown)
    found, summary = asked.evaluate("boolq", "boolq")
    assert len(found) == summary["n_examples"] == 2, "the pinned commit, not the one that main names"


def test_table_of_tasks_agrees_with_the_installed_lm_eval():
    for request, known in TASKS.items():
        if known.folder is None:
            continue
        index = definitions._manager(request).task_index
        for name in members(request):
            config = index[name].cfg
            assert config["dataset_path"] == known.repository, name
            filters = [entry["name"] for entry in config.get("filter_list", [])]
            # "perplexity" is the name of a text's metric.
            names = [entry["metric"] for entry in config["metric_list"] if entry["metric"] != "perplexity"]
            expected = [f"{metric}:{chosen}" for metric in names for chosen in filters] if filters else names
            assert list(known.metrics) == expected, name


def test_unknown_names_are_one_line(monkeypatch):
    known = definitions._manager("arc_easy")
    monkeypatch.setattr(definitions, "_manager", lambda task: known)  # indexing all of lm-eval takes seconds
    monkeypatch.setattr(task_files, "tasks_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"lm-eval .* has no task 'arc_esay'; did you mean 'arc_easy'"):
        members("arc_esay")
    summary = {
        "values": {"acc,none": 0.5},
        "n_examples": 4,
        "task_version": 1,
        "n_shot": 0,
        "batch_size": 1,
        "lm_eval": "",
    }
    with pytest.raises(ConfigError, match=r"yields no 'acc_norm'; lm-eval yields acc,none"):
        metrics_of("winogrande", ["acc_norm"], [summary])


def local_spec(folder, *tasks):
    return EvaluationSpec(name="e", tasks=tasks, data_dir=str(folder))


def tokenizer_with(**tokens):
    return SimpleNamespace(**{"bos_token_id": None, "eos_token_id": None, **tokens})


@pytest.mark.parametrize(
    ("task", "tokens", "error", "words"),
    [
        ("race/acc", {}, UnsupportedError, "neither: name one in its tokenizer_config.json"),
        ("race/accuracy", {"bos_token_id": 1}, ConfigError, "'race' yields no 'accuracy'; did you mean 'acc'"),
        ("rase/acc", {"eos_token_id": 1}, ConfigError, "has no task 'rase'; did you mean 'race'"),
        ("piqa/acc", {"bos_token_id": 1}, ConfigError, r"has no piqa\.validation\.jsonl"),
    ],
)
def test_what_is_wrong_with_a_task_is_found_when_it_is_loaded(tmp_path, monkeypatch, task, tokens, error, words):
    index = definitions._manager
    monkeypatch.setattr(definitions, "_manager", lambda name: index(name if name in TASKS else "race"))
    monkeypatch.setattr(task_files, "_remembered", lambda folder: {})
    monkeypatch.setattr(
        definitions, "requested", lambda words: {word.split("/")[0]: [word.split("/")[1]] for word in words}
    )
    write_rows(tmp_path, "race", RACE)
    with pytest.raises(error, match=words):
        prepare(local_spec(tmp_path, task), tokenizer_with(**tokens))


def test_finished_tasks_are_not_loaded(tmp_path):
    write_rows(tmp_path, "race", RACE)
    spec, tokenizer = local_spec(tmp_path, "race/acc", "tiny_questions/acc"), tokenizer_with(bos_token_id=1)
    found = prepare(spec, tokenizer, done=lambda name: name == "race")
    assert found["race"] == {"race": None}
    assert found["tiny_questions"]["tiny_questions"].OUTPUT_TYPE == "multiple_choice"


def test_packaged_questions(checkpoint):
    folder = checkpoint("llama", max_position_embeddings=512)
    rows, summary = harness(folder, limit=8).evaluate("tiny_questions", "tiny_questions")
    assert members("tiny_questions") == ["tiny_questions"]
    found = metrics_of("tiny_questions", ["acc", "acc_norm"], [summary])
    assert found["tiny_questions/acc"]["n_examples"] == len(rows) == 8
    assert all(len(row["log_likelihoods"]) == 4 for row in rows)
