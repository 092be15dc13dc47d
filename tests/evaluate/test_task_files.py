"""Misspelt tasks and metrics are found in lm-eval's files, when a cell is composed and without lm-eval."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from ptqbench.data.tasks import TASKS
from ptqbench.errors import ConfigError
from ptqbench.evaluate import definitions, task_files
from ptqbench.evaluate.task_files import check_tasks
from ptqbench.sweeps.compose import compose_cell

# Tags in lists, keys in quotes, groups of groups, Python classes, templates without a suffix, filters, metrics in included files.
FOLDERS = (
    "arc",
    "mmlu/default",
    "anli",
    "gsm8k",
    "bbh/fewshot",
    "squadv2",
    "glue",
    "super_glue",
    "unscramble",
    "lambada",
)


@pytest.fixture
def installed():
    return task_files.tasks_folder()


@pytest.fixture
def few(tmp_path, monkeypatch, installed):
    """Some of lm-eval's folders in place of all: a scan of them takes no time."""
    folder = tmp_path / "tasks"
    for name in FOLDERS:
        shutil.copytree(installed / name, folder / name)
    monkeypatch.setattr(task_files, "tasks_folder", lambda: folder)
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_scan_finds_every_name_that_lm_eval_indexes_and_the_same_metrics(few):
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(few), include_defaults=False).task_index
    found = task_files._scanned(few)
    assert set(index) <= set(found)
    compared = 0
    for name, entry in index.items():
        ours = task_files._metrics(name, few / found[name])
        if name not in TASKS:
            assert (task_files.folder_of(name) is not None) == (entry.kind.name in ("TASK", "PY_TASK")), name
        if entry.kind.name != "TASK":
            assert ours is None
        elif ours is not None:
            filters = [chosen["name"] for chosen in entry.cfg.get("filter_list") or [{"name": "none"}]]
            metrics = [metric["metric"] for metric in entry.cfg["metric_list"]]
            assert ours == [m if f == "none" else f"{m}:{f}" for m in metrics for f in filters], name
            compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("anli_r11/acc", "has no task 'anli_r11'; did you mean 'anli_r1' or"),
        ("anli_r11", "has no task 'anli_r11'"),
        ("arc_esy/acc", "did you mean 'arc_easy'"),
        ("arc_esy", "did you mean 'arc_easy'"),
        ("qqqqqqqq/acc", "lm-eval ls tasks"),
        ("anli_r1/accc", "'anli_r1' yields no 'accc'; did you mean 'acc'"),
        ("gsm8k_cot/exact_match", "known: exact_match:flexible-extract, exact_match:strict-match"),
    ],
)
def test_a_slip_is_refused_in_one_line(few, word, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check_tasks((word,))
    assert "\n" not in str(refused.value)


def test_what_the_files_do_not_say_is_left_to_lm_eval(few):
    check_tasks(("squadv2/best_f1", "glue/acc", "ai2_arc/acc", "mmlu_stem/acc", "tiny_questions/none", "anli_r1/acc"))


def test_a_scan_is_remembered_and_repeated_before_anything_is_refused(few, monkeypatch):
    check_tasks(("anli_r1/acc",))
    (path,) = (few.parent / "cache").glob("*.json")
    scan = task_files._scanned.__wrapped__
    monkeypatch.setattr(task_files, "_scanned", lambda folder: pytest.fail("scanned again"))
    task_files._remembered.cache_clear()
    check_tasks(("anli_r1/acc",))
    path.write_text("[1]")  # damaged
    task_files._remembered.cache_clear()
    (few / "new.yaml").write_text("task: brand_new\nmetric_list: [{metric: acc}]\n")
    monkeypatch.setattr(task_files, "_scanned", scan)
    check_tasks(("brand_new/acc",))
    assert json.loads(path.read_text())["brand_new"] == "new.yaml"
    (few / "newer.yaml").write_text(yaml.safe_dump({"task": "newer", "include": ["new.yaml"]}))
    check_tasks(("newer/acc",))
    with pytest.raises(ConfigError, match="'newer' yields no 'bleu'"):
        check_tasks(("newer/bleu",))


def test_a_cell_with_a_misspelt_task_is_not_composed_wherever_its_model_is(few):
    for words in (["model=tiny"], ["model=llama-65b"]):
        with pytest.raises(ConfigError, match="has no task 'anli_r11'"):
            compose_cell(["+method=rtn", "bitwidth=w4", *words, "evaluation.tasks=[anli_r11/acc]"])
    assert compose_cell(["+method=rtn", "bitwidth=w4", "model=tiny", "evaluation.tasks=[anli_r1/acc]"])


@pytest.mark.parametrize("name", ["anli_r2", "squadv2", "gsm8k_cot", "mmlu_anatomy"])
def test_the_index_of_one_folder_has_the_same_definition_as_that_of_all(few, name):
    from lm_eval.tasks import TaskManager

    everything = TaskManager(include_path=str(few), include_defaults=False).task_index
    only = definitions._manager(name).task_index
    assert only[name] == everything[name]
    assert len(only) < len(everything)
    assert definitions.members(name) == [name]


def test_neither_lm_eval_nor_torch_is_imported(few):
    code = (
        "import sys; from pathlib import Path; from ptqbench.evaluate import task_files\n"
        f"task_files.tasks_folder = lambda: Path({str(few)!r})\n"
        "task_files.check_tasks(('anli_r1/acc',))\n"
        "assert not {'torch', 'lm_eval', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
