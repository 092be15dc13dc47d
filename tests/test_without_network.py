"""``prefetch`` from a hub, then a cell with the hub switched off: real processes, the real library, a hub of our own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ptqbench as package
from fake_hub import FakeHub, card, commit, lines, serve, table
from ptqbench.runs.folder import RunFolder

SOURCE = str(Path(package.__file__).parents[1])  # so that processes import the code under test, not what is installed

MODEL, PTB, RACE = "some/llama", "ptb-text-only/ptb_text_only", "EleutherAI/race"
PTB_OLD, PTB_NEW, RACE_OLD, RACE_NEW, MODEL_AT = map(commit, range(5))
WORDS = [
    "+method=rtn", "bitwidth=w4", "model=local", f"model.hub_id={MODEL}", "calibration=file", "calibration.dataset=ptb",
    "calibration.split=train", "calibration.n_samples=2", "calibration.seq_len=16", "evaluation=ptb",
    "evaluation.texts.ptb.seq_len=16", "evaluation.tasks=[race/acc]", "execution.threads=1",
]  # fmt: skip
COMPOSE = """
import sys
from ptqbench.sweeps.compose import compose_cell
evaluation = compose_cell(sys.argv[1:]).evaluation
print(evaluation.texts["ptb"].digest, evaluation.task_digests["race"])
"""


def ptb_files(word):
    sentences = [f"the {word} cat saw {i} red birds" for i in range(40)]
    splits = ("train", "validation", "test")
    return {
        f"penn_treebank/{split}/0000.parquet": table(sentence=[f"{s} {split}" for s in sentences]) for split in splits
    }


def race_files(word):
    problem = {"question": f"{word} is  _  .", "answer": "B", "options": ["red", "blue", "green", "grey"]}
    rows = [{"example_id": str(i), "article": f"A {word} story {i}.", "problems": repr([problem])} for i in range(3)]
    return {"README.md": card(high={"test": "race_high_test.jsonl"}), "race_high_test.jsonl": lines(rows)}


@pytest.fixture
def hub(checkpoint):
    """A hub with a small random model, a text and a task."""
    made = FakeHub()
    folder = checkpoint("llama", max_position_embeddings=256)
    made.add("models", MODEL, MODEL_AT, {path.name: path.read_bytes() for path in folder.iterdir()})
    made.add("datasets", PTB, PTB_OLD, ptb_files("old"), "refs/convert/parquet")
    made.add("datasets", RACE, RACE_OLD, race_files("old"))
    return made


def run(*arguments, folder, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "300", "PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=kept | home | environment,
    )


def ptqbench(*arguments, folder, **environment):
    return run("-m", "ptqbench", *arguments, folder=folder, **environment)


def test_prefetch_then_run_with_the_hub_switched_off(hub, tmp_path):
    with serve(hub):
        done = ptqbench("prefetch", *WORDS, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "runs" / "prefetch.json").read_text())
    found = {(item["kind"], item["name"]): item["detail"] for item in manifest["items"]}
    assert set(found) == {("model", MODEL), ("text", "ptb train"), ("text", "ptb validation"), ("task", "race")}
    assert found["model", MODEL].startswith(f"hub:{MODEL}@{MODEL_AT} ")
    assert found["text", "ptb validation"] == found["text", "ptb train"] == f"hub:{PTB}@{PTB_OLD}"
    assert found["task", "race"] == f"hub:{RACE}@{RACE_OLD}: 1 task"

    hub.add("datasets", PTB, PTB_NEW, ptb_files("new"), "refs/convert/parquet")
    hub.add("datasets", RACE, RACE_NEW, race_files("new"))
    hub.asked.clear()
    with serve(hub):  # which is never asked
        done = ptqbench(*WORDS, folder=tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.asked == []
    (cell,) = [RunFolder(path.parent) for path in (tmp_path / "runs").glob("*/spec.json")]
    result, spec = cell.result(), json.loads(cell.spec_path.read_text())
    evaluation = spec["evaluation"]
    assert spec["model"]["digest"] == f"hub:{MODEL}@{MODEL_AT}"
    assert spec["calibration"]["digest"] == evaluation["texts"]["ptb"]["digest"] == f"hub:{PTB}@{PTB_OLD}"
    assert evaluation["task_digests"] == {"race": f"hub:{RACE}@{RACE_OLD}"}
    assert result["metrics"]["race/acc"]["data"] == f"hub:{RACE}@{RACE_OLD}"
    assert result["metrics"]["race/acc"]["n_examples"] == 3
    assert result["metrics"]["ptb/perplexity"]["n_windows"] > 0

    with serve(hub):  # the branches moved, so with network it is another cell
        done = run("-c", COMPOSE, *WORDS, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
    assert done.stdout.split() == [f"hub:{PTB}@{PTB_NEW}", f"hub:{RACE}@{RACE_NEW}"], done.stderr


def test_without_prefetch_the_cell_does_not_run_and_says_what_to_do(hub, tmp_path):
    with serve(hub):
        only = ["+method=fp16", "bitwidth=fp16", *WORDS[2:4], "evaluation=tiny", "evaluation.tasks=[]"]
        done = ptqbench("prefetch", *only, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr
    done = ptqbench(*WORDS, folder=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{PTB}: revision 'refs/convert/parquet' names no commit here" in done.stderr
    assert "python -m ptqbench prefetch" in done.stderr
    assert not list((tmp_path / "runs").glob("*/spec.json"))
