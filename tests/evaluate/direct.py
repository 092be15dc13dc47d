"""lm-eval called directly: a model from ``from_pretrained``, task files that include lm-eval's own, ``simple_evaluate``."""

import json
from pathlib import Path

import yaml

FOLDERS = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "social_iqa": ("siqa/siqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "race": ("race/race.yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", "test"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "gpqa_diamond_zeroshot": ("gpqa/zeroshot/gpqa_diamond_zeroshot.yaml", "train"),
    "mmlu_pro_math": ("mmlu_pro/mmlu_pro_math.yaml", "test"),
    "hendrycks_math500": ("hendrycks_math/hendrycks_math500.yaml", "test"),
}


def hub_row(task, row):
    """A row of the flat files with the columns of the hub data set, written out by hand per task."""
    if task in ("arc_easy", "arc_challenge"):
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        return {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["label"]],
        }
    if task == "openbookqa":
        labels = ["A", "B", "C", "D"]
        return {
            "question_stem": row["question"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["label"]],
        }
    return row


def task_file(folder, task, rows, **changes):
    """Write an lm-eval task file that includes lm-eval's own and reads the rows through the ``json`` builder."""
    import lm_eval

    name, split = FOLDERS[task]
    data = folder / f"direct_{task}.jsonl"
    data.write_text("".join(json.dumps(hub_row(task, row)) + "\n" for row in rows))
    config = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / name),
        "task": f"direct_{task}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
        "training_split": None,
        "validation_split": split if split in ("validation", "train") else None,
        "test_split": split if split == "test" else None,
        **changes,
    }
    if task == "hellaswag" and "query" in rows[0]:
        config["process_docs"] = None
    (folder / f"direct_{task}.yaml").write_text(yaml.safe_dump(config))


def direct_scores(checkpoint, folder, tasks, batch_size, **more):
    """Scores of lm-eval itself: task -> its results, and task -> its samples."""
    import lm_eval
    import lm_eval.evaluator
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=batch_size)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results, samples = {}, {}
    lm_eval.evaluator.add_env_info = lambda report: None  # describes the machine, for seconds, and no score
    for task in tasks:
        report = lm_eval.simple_evaluate(
            wrapped, tasks=[f"direct_{task}"], task_manager=manager, bootstrap_iters=100, **more
        )
        results[task] = report["results"][f"direct_{task}"]
        samples[task] = report["samples"][f"direct_{task}"]
    return results, samples
