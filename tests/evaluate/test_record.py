"""The record of a whole cell: figures, averages, and what the model costs to store."""

import json

import pytest

from ptqbench.errors import ConfigError
from ptqbench.run import run_cell
from ptqbench.runs import folder as store
from ptqbench.sweeps.compose import compose_cell


@pytest.fixture
def words(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"The {a} cat saw {b} red birds near house {a * b}.|" for a in range(20) for b in range(20))
    )
    rows = [{"goal": f"Open door {i}", "sol1": "Turn it.", "sol2": "Eat it.", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"passage": "Birds sing.", "question": f"do {i} birds sing", "label": i % 2} for i in range(6)]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "model=local", f"model.path={checkpoint()}", "calibration=file", f"calibration.path={text}",
        "calibration.separator='|'", "calibration.portion=[0,0.5]", "calibration.n_samples=4", "calibration.seq_len=32",
        "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'",
        "evaluation.texts.file.portion=[0.9,1]", "evaluation.texts.file.seq_len=32", "evaluation.limit=4",
        "evaluation.tasks=[piqa/acc_norm,boolq/acc]", f"evaluation.data_dir={tmp_path}",
        f"execution.runs_dir={tmp_path / 'runs'}",
    ]  # fmt: skip


def run(words):
    spec = compose_cell(words)
    folder = store.create(spec)
    return run_cell(spec, folder), folder


def test_record_of_a_quantized_cell(words):
    result, folder = run(["+method=rtn", "bitwidth=w4a4kv4", *words])
    assert list(result["metrics"]) == ["file/perplexity", "piqa/acc_norm", "boolq/acc"]
    assert result["metrics"]["piqa/acc_norm"]["n_examples"] == 4
    assert result["metrics"]["piqa/acc_norm"]["data"].startswith("sha256:")
    (name,) = result["averages"]
    assert name == "average(piqa/acc_norm, boolq/acc)"
    # 2 blocks of 48 x 64 + 2 x 48 x 32 + 64 x 48 + 3 x 48 x 76 weights; per row one scale of 16 bits and a zero point of 4
    rows = 64 + 2 * 32 + 48 + 2 * 76 + 48
    weights = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 76
    assert result["bits"]["effective_w_bits"] == pytest.approx(4 + 20 * rows / weights)
    assert result["bits"]["packed_bytes"] == round(2 * (4 * weights + 20 * rows) / 8)
    # 2 blocks x 2 heads x (16 codes of 4 bits + scale and zero point of 16 bits) x keys and values
    assert result["bits"]["kv_bytes_per_token"] == 2 * 2 * (16 * 4 + 32) * 2 / 8
    assert sorted(path.name for path in (folder.records_path / "examples").iterdir()) == [
        "boolq.parquet",
        "piqa.parquet",
    ]


def test_record_of_an_untouched_cell(words):
    result, _ = run(["+method=fp16", "bitwidth=fp16", *words])
    assert result["bits"]["effective_w_bits"] == 16
    assert result["bits"]["kv_bytes_per_token"] == 2 * 2 * 16 * 2 * 2


def test_requests_that_cannot_be_served_fail_before_a_folder_exists(words, tmp_path):
    for wrong, message in (
        ("evaluation.tasks=[piqa]", "names no metric"),
        ("evaluation.tasks=[arc_easy/acc]", "no data of task 'arc_easy'"),
        ("+evaluation.texts.file.protocol=c4_joined", "is for c4"),
        ("+evaluation.few_shot.mmlu=5", "not among the tasks"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(["+method=fp16", "bitwidth=fp16", *words, wrong])
    assert not (tmp_path / "runs").exists()
