"""Data sets of the hub: a branch becomes a commit, the commit enters the identity, and rows come from that commit."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys

import pytest

from fake_hub import card, commit, lines, table, write_cache
from ptqbench.cell.fingerprint import run_id
from ptqbench.cell.spec import EvaluationSpec, PerplexitySpec, TextSpec
from ptqbench.data import hub
from ptqbench.data.tasks import task_digests
from ptqbench.data.texts import HUB_TEXTS, load_text, text_digest
from ptqbench.errors import ConfigError, DataNotHereError, NotHereError
from ptqbench.sweeps.compose import compose_cell

RACE, PTB = "EleutherAI/race", HUB_TEXTS["ptb"].repository
TREEBANK = "refs/convert/parquet"
OLD, NEW = commit(1), commit(2)
PTB_TEST = TextSpec(dataset="ptb", split="test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    place = tmp_path / ".cache" / "hub"  # hidden, as the usual place is
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place


def race_rows(word, n=2):
    problem = {"question": f"{word} is _ .", "answer": "B", "options": ["red", "blue", "green", "grey"]}
    return [{"article": f"{word} {i}.", "problems": repr([problem]), "example_id": str(i)} for i in range(n)]


def race_files(word):
    return {
        "README.md": card(high={"test": "race_high_test.jsonl"}),
        "race_high_test.jsonl": lines(race_rows(word)),
    }


def ptb_files(word, split="test"):
    return {f"penn_treebank/{split}/0000.parquet": table(sentence=[f"{word} {i} <unk> N" for i in range(3)])}


def cell_words(tmp_path, *more):
    return [
        "+method=fp16",
        "bitwidth=fp16",
        "evaluation=tiny",
        "evaluation.tasks=[race/acc]",
        f"execution.runs_dir={tmp_path}",
        *more,
    ]


def test_the_commit_that_the_branch_names_is_the_identity_of_a_task(cache, tmp_path):
    write_cache(cache, RACE, OLD, race_files("old"))
    first = compose_cell(cell_words(tmp_path))
    assert first.evaluation.task_digests == {"race": f"hub:{RACE}@{OLD}"}
    assert run_id(first) == run_id(compose_cell(cell_words(tmp_path)))
    write_cache(cache, RACE, NEW, race_files("new"))
    second = compose_cell(cell_words(tmp_path))
    assert second.evaluation.task_digests == {"race": f"hub:{RACE}@{NEW}"}
    assert run_id(first) != run_id(second)


def test_the_commit_that_the_branch_names_is_the_identity_of_a_text(cache, tmp_path):
    def composed(*more):
        return compose_cell(
            ["+method=fp16", "bitwidth=fp16", "evaluation=ptb", "evaluation.texts.ptb.seq_len=512", *more]
        )

    write_cache(cache, PTB, OLD, ptb_files("old", "validation"), TREEBANK)
    first = composed()
    assert first.evaluation.texts["ptb"].digest == f"hub:{PTB}@{OLD}"
    write_cache(cache, PTB, NEW, ptb_files("new", "validation"), TREEBANK)
    second = composed()
    assert second.evaluation.texts["ptb"].digest == f"hub:{PTB}@{NEW}"
    assert run_id(first) != run_id(second)
    assert run_id(composed(f"evaluation.texts.ptb.revision={OLD}")) == run_id(first), (
        "how a commit is named is no matter"
    )
    write_cache(cache, PTB, NEW, {}, "mine")
    assert run_id(composed("evaluation.texts.ptb.revision=mine")) == run_id(second)


def test_a_text_is_read_at_the_commit_of_the_cell_whatever_the_branch_names_later(cache):
    write_cache(cache, PTB, OLD, ptb_files("old"), TREEBANK)
    pinned = dataclasses.replace(PTB_TEST, digest=text_digest(PTB_TEST))
    write_cache(cache, PTB, NEW, ptb_files("new"), TREEBANK)
    assert load_text(pinned).documents == ("old 0 <unk> N", "old 1 <unk> N", "old 2 <unk> N")
    assert load_text(PTB_TEST).documents[0] == "new 0 <unk> N"


@pytest.mark.parametrize(
    ("dataset", "name", "content", "rows"),
    [
        (
            "wikitext2",
            "wikitext-2-raw-v1/test-00000-of-00001.parquet",
            table(text=["", " = A = \n"]),
            ("", " = A = \n"),
        ),
        ("c4", "en/c4-validation.00000-of-00008.json.gz", None, ("a\nb", "é")),
    ],
)
def test_pinned_texts_are_read_from_the_snapshot_of_their_commit(cache, dataset, name, content, rows):
    import gzip

    known = HUB_TEXTS[dataset]
    content = content or gzip.compress(lines([{"text": row, "url": "u"} for row in rows]))
    write_cache(cache, known.repository, known.revision, {name: content}, reference=None)
    split = "test" if dataset == "wikitext2" else "validation"
    assert load_text(TextSpec(dataset=dataset, split=split)).documents == rows
    assert known.files[split] == name


def test_a_task_is_read_at_the_commit_of_the_cell_whatever_the_branch_names_later(cache, tmp_path, monkeypatch):
    import datasets

    from ptqbench.evaluate.definitions import data_of, load_task

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tables"))
    write_cache(cache, RACE, OLD, race_files("old"))
    spec = EvaluationSpec(name="e", tasks=("race/acc",))
    pinned = dataclasses.replace(spec, task_digests=task_digests(spec))
    write_cache(cache, RACE, NEW, race_files("new"))
    articles = lambda task: [doc["article"] for doc in task.test_docs()]
    assert articles(load_task("race", "race", spec)) == ["new 0.", "new 1."]
    task = load_task("race", "race", pinned)
    assert articles(task) == ["old 0.", "old 1."]
    assert data_of(task, pinned.task_digests["race"]) == f"hub:{RACE}@{OLD}"


UNPINNED_LOAD = """
import sys, datasets
print(datasets.load_dataset("some/set", revision=sys.argv[1], split="test")["word"][0])
"""


def test_datasets_alone_would_read_another_commit(tmp_path):
    """Rows must come from the snapshot: without network the library takes its last prepared table, whatever the revision."""
    import datasets

    (tmp_path / "test.jsonl").write_bytes(lines([{"word": "new"}]))
    found = datasets.load_dataset(
        "json", data_files={"test": str(tmp_path / "test.jsonl")}, cache_dir=tmp_path / "json"
    )
    prepared = next((tmp_path / "json").rglob("dataset_info.json")).parent
    assert found["test"]["word"][0] == "new"
    place = tmp_path / "tables" / "some___set" / "default" / "0.0.0" / NEW
    shutil.copytree(prepared, place)
    (place / "json-test.arrow").rename(place / "set-test.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "set"}))
    done = subprocess.run(
        [sys.executable, "-c", UNPINNED_LOAD, OLD],
        capture_output=True,
        text=True,
        env={
            "PATH": "",
            "HF_HOME": str(tmp_path),
            "HF_DATASETS_CACHE": str(tmp_path / "tables"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.stdout.strip() == "new", done.stderr


def test_a_branch_that_names_no_commit_here_says_what_is_missing_and_how_to_get_it(cache, tmp_path):
    with pytest.raises(NotHereError) as stopped:
        compose_cell(cell_words(tmp_path))
    said = str(stopped.value)
    assert "\n" not in said
    assert str(cache / "datasets--EleutherAI--race" / "refs" / "main") in said
    for words in ("task 'race'", RACE, "'main'", "python -m ptqbench prefetch", "evaluation.data_dir=FOLDER"):
        assert words in said
    sent = pickle.loads(pickle.dumps(stopped.value))
    assert (str(sent), sent.repository) == (said, RACE)
    with pytest.raises(DataNotHereError, match=r"'ptb'.*refs/convert/parquet.*ptqbench prefetch.*path=FILE"):
        text_digest(PTB_TEST)
    with pytest.raises(DataNotHereError, match="'abc'"):
        text_digest(PerplexitySpec(dataset="c4", revision="abc"))


def test_a_reference_without_its_data_is_not_enough_to_run(cache):
    write_cache(cache, PTB, OLD, {"README.md": b""}, TREEBANK)
    pinned = dataclasses.replace(PTB_TEST, digest=text_digest(PTB_TEST))
    with pytest.raises(
        DataNotHereError, match=rf"{PTB}@{OLD}.*test/0000\.parquet.*neither cached nor reachable.*prefetch"
    ):
        load_text(pinned)
    with pytest.raises(DataNotHereError, match=rf"{RACE}@{NEW}.*neither cached nor reachable.*prefetch"):
        hub.folder_at(RACE, NEW)


@pytest.mark.parametrize("identity", [f"hub:{PTB}@refs/convert/parquet", f"hub:{RACE}@main", "sha256:" + 40 * "0"])
def test_a_cell_of_before_with_a_moving_revision_is_refused(cache, identity):
    write_cache(cache, PTB, OLD, ptb_files("old"), TREEBANK)
    with pytest.raises(ConfigError, match="compose it again"):
        load_text(dataclasses.replace(PTB_TEST, digest=identity))


def test_damaged_parquet_is_one_line(cache):
    write_cache(cache, PTB, OLD, {"penn_treebank/test/0000.parquet": b"no table"}, TREEBANK)
    with pytest.raises(ConfigError, match=r"0000\.parquet: expected Parquet rows of ptb-text-only"):
        load_text(PTB_TEST)


def test_what_lm_eval_loads_unpinned_is_recorded_with_its_commit(tmp_path):
    import datasets

    from ptqbench.data.tasks import UNPINNED
    from ptqbench.evaluate.definitions import data_of

    def task(rows):
        return type("Task", (), {"dataset": datasets.DatasetDict(test=rows), "DATASET_PATH": "some/set"})()

    def made(info=None):
        return datasets.Dataset.from_list([{"a": 1}], info=info)

    sums = {f"hf://datasets/some/set@{OLD}/test.parquet": {"num_bytes": 1, "checksum": None}}
    assert data_of(task(made(datasets.DatasetInfo(download_checksums=sums))), UNPINNED) == f"hub:some/set@{OLD}"
    made().save_to_disk(tmp_path / NEW)  # as a prepared table lies in the cache of the library
    assert data_of(task(datasets.load_from_disk(tmp_path / NEW)), UNPINNED) == f"hub:some/set@{NEW}"
    assert data_of(task(made()), UNPINNED) == UNPINNED
    assert data_of(task(made()), "sha256:1") == "sha256:1"
