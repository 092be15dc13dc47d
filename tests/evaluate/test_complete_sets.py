"""Complete task sets by blocks against lm-eval called directly on the whole model: hours of CPU, so only when asked for.

``PTQBENCH_TEST_COMPLETE=FOLDER`` names a checkpoint in float32 or bfloat16, such as the one of ``make real``. A task that has ended
leaves its figures in ``FOLDER/../complete/TASK.json``.
"""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from direct import direct_scores, task_file

from ptqbench.run import run_cell
from ptqbench.runs.folder import create
from ptqbench.sweeps.compose import compose_cell

CHECKPOINT = Path(os.environ.get("PTQBENCH_TEST_COMPLETE", ""))
SIZES = {
    "openbookqa": 500, "winogrande": 1267, "piqa": 1838, "arc_challenge": 1172, "social_iqa": 1954, "arc_easy": 2376,
    "boolq": 3270, "hellaswag": 10042,
}  # fmt: skip


@pytest.mark.skipif(
    not (CHECKPOINT / "config.json").is_file(), reason="complete sets take hours: set PTQBENCH_TEST_COMPLETE=CHECKPOINT"
)
@pytest.mark.parametrize("task", SIZES)
def test_complete_set_by_blocks_equals_lm_eval_called_directly(real_data, tmp_path, task):
    (path,) = (real_data / "zeroshot").glob(f"{task}.*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == SIZES[task]
    task_file(tmp_path, task, rows)
    start = time.process_time()
    expected, samples = direct_scores(CHECKPOINT, tmp_path, [task], 16)
    usual = time.process_time() - start
    metrics = ["acc"] if task in ("winogrande", "boolq", "social_iqa") else ["acc", "acc_norm"]
    words = ["+method=fp16", "model=local", f"model.path={CHECKPOINT}", "model.dtype=float32", "evaluation.texts={}"]
    words += ["evaluation.name=complete", f"evaluation.tasks=[{','.join(f'{task}/{name}' for name in metrics)}]"]
    words += [f"evaluation.data_dir={real_data / 'zeroshot'}", f"execution.runs_dir={tmp_path}"]
    spec = compose_cell(words)
    folder = create(spec)
    start = time.process_time()
    result = run_cell(spec, folder)
    ours = time.process_time() - start
    examples = pyarrow.parquet.read_table(folder.examples_path(task)).to_pylist()
    apart = max(
        abs(mine - response[0][0])
        for row, sample in zip(examples, samples[task], strict=True)
        for mine, response in zip(row["log_likelihoods"], sample["resps"], strict=True)
    )
    found = {name: result["metrics"][f"{task}/{name}"]["value"] for name in metrics}
    wanted = {name: expected[task][f"{name},none"] for name in metrics}
    kept = CHECKPOINT.parent / "complete"
    kept.mkdir(exist_ok=True)
    figures = {"lm-eval": wanted, "blocks": found, "largest_difference": apart, "lm-eval_s": usual, "blocks_s": ours}
    (kept / f"{task}.json").write_text(json.dumps(figures, indent=1))
    assert found == wanted
    assert apart < 1e-4
