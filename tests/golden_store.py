"""The store behind the golden tables: ``python tests/golden_store.py`` writes ``tests/data_store`` again.

The figures are invented, to have every case a table knows: seeds, ties, a seed that is missing, a failure, unequal bits. The
folders are named by run ids, so they are written again whenever the identity of a cell changes.
"""

import json
import math
import shutil
from pathlib import Path

from ptqbench.cell.spec import RunSpec, build
from ptqbench.runs.folder import RunFolder, create, write_json

FOLDER = Path(__file__).parent / "data_store"
TASKS = ["arc_easy", "winogrande"]
MODELS = {"toy-1b": (9.76, 0.61), "toy-3b": (7.81, 0.71)}
PENDING, FAILED = "pending", "failed"
ROWS = [
    # method, bitwidth, true bits, factor on the perplexity, loss of accuracy, seeds (a word: that seed's state)
    ("fp16", "fp16", 16, 1.0, 0.0, {0: ""}),
    ("rtn", "w3", 3.02, 7.5, 0.21, {0: "", 1: "", 2: ""}),
    ("gptq", "w3", 3.02, 1.31, 0.06, {0: "", 1: "", 2: ""}),
    ("loaq", "w3", 3.02, 1.308, 0.0602, {0: "", 1: "", 2: ""}),
    ("q2n", "w3", 3.02, 1.2, 0.05, {0: "", 1: "", 2: PENDING}),
    ("quarot", "w3", 3.01, 1.29, 0.05, {0: "", 1: "", 2: ""}),
    ("quarot", "w4a4kv4", 4.01, 1.4, 0.09, {0: ""}),
    ("coquant", "w4a4kv4", 6.57, 1.19, 0.04, {0: ""}),
    ("resq", "w4a4kv4", 4.36, 1.25, 0.045, {0: FAILED}),
]
BITS = {"fp16": (16, 16), "w3": (3, 16), "w4a4kv4": (4, 4)}
SUBSPACE = {"high_bits": 8, "high_fraction": 0.125}


def cell(model: str, method: str, bitwidth: str, seed: int, tasks=tuple(TASKS), **changes) -> RunSpec:
    """A cell as plain data, without any configuration."""
    none, (w_bits, a_bits) = {"name": "none"}, BITS[bitwidth]
    subspace = {"name": "subspace", "options": SUBSPACE | {"objective": method}}
    transforms = {"quarot": {"name": "hadamard"}, "coquant": subspace, "resq": subspace}
    data = {
        "model": {"name": model, "digest": f"sha256:{model}", "dtype": "bfloat16"},
        "method": {
            "name": method,
            "transform": transforms.get(method, none),
            "target": {"name": method if method in ("loaq", "qep") else "weight"},
            "solver": {"name": method if method in ("rtn", "gptaq") else "none" if method == "fp16" else "gptq"},
            "refine": {"name": "null_space"} if method == "q2n" else none,
            "grid": {},
            "activation": {"clip_ratio": 0.9 if method == "quarot" else 1.0},
            "true_sequential": True,
        },
        "bitwidth": {"name": bitwidth, "w_bits": w_bits, "a_bits": a_bits, "k_bits": a_bits, "v_bits": a_bits},
        "calibration": None if method == "fp16" else {"dataset": "c4", "split": "train", "digest": "hub:c4@main"},
        "evaluation": {
            "name": "toy",
            "texts": {"wikitext2": {"dataset": "wikitext2", "split": "test", "digest": "hub:wikitext2@main"}},
            "tasks": list(tasks),
        },
        "seed": seed,
    }
    return build(RunSpec, data | changes)


def result(spec: RunSpec, folder: RunFolder, bits: float, perplexity: float, accuracy: float) -> dict:
    """A result file with every field a table reads."""
    facts = {"n_examples": 500, "task_version": 1, "n_shot": 0, "batch_size": 8, "lm_eval": "0.4.13"}
    metrics = {"wikitext2/perplexity": {"value": round(perplexity, 4), "stderr": round(perplexity / 100, 4)}}
    for place, task in enumerate(spec.evaluation.tasks):
        value = round(accuracy - 0.05 * place, 4)
        metrics[f"{task}/acc"] = {"value": value, "stderr": round(math.sqrt(value * (1 - value) / 499), 4), **facts}
        if task == "arc_easy":
            metrics[f"{task}/acc_norm"] = metrics[f"{task}/acc"] | {"value": round(value - 0.02, 4)}
    return {
        "format": 1,
        "run_id": folder.run_id,
        "model": spec.model.name,
        "method": spec.method.name,
        "bitwidth": spec.bitwidth.name,
        "seed": spec.seed,
        "metrics": metrics,
        "bits": {"nominal_w_bits": spec.bitwidth.w_bits, "effective_w_bits": bits, "packed_bytes": int(1e8 * bits)},
        "timings": {"round_s": 10.0 * bits, "perplexity_s": 5.0, "zero_shot_s": 20.0},
    }


def write(root: Path) -> None:
    """Write every folder of the store."""
    for model, (perplexity, accuracy) in MODELS.items():
        for method, bitwidth, bits, factor, loss, seeds in ROWS:
            for seed, state in seeds.items():
                spec = cell(model, method, bitwidth, seed, execution={"runs_dir": str(root)})
                folder = create(spec)
                spec_data = json.loads(folder.spec_path.read_text())
                spec_data["execution"]["runs_dir"] = "runs"
                write_json(folder.spec_path, spec_data)
                drift = 1 + 0.004 * (seed - 1)
                if state == FAILED:
                    write_json(
                        folder.failure_path, {"class": "NumericalError", "message": "block 3: o_proj: NaN in weight"}
                    )
                elif state != PENDING:
                    write_json(
                        folder.result_path,
                        result(spec, folder, bits, perplexity * factor * drift, accuracy - loss * drift),
                    )


def write_reports(root: Path) -> None:
    """Add invented layer reports and records of examples to the finished cells of a copy of the store (too large to commit)."""
    import pandas as pd

    from ptqbench.evaluate.records import write_records

    for path in sorted(root.glob("*/result.json")):
        folder, done = RunFolder(path.parent), json.loads(path.read_text())
        error = {"rtn": 4.0, "gptq": 2.0}.get(done["method"], 1.5)
        rows = [
            {
                "block": block, "linear": name, "relative_weight_error": 0.02 * error, "quantize_s": 0.5,
                "relative_output_error": 1e-3 * error * (1 + block + place), "correction_norm": 0.01 * place,
                "null_space_rank": 10 * block if done["method"] == "q2n" else None,
            }
            for block in range(4)
            for place, name in enumerate(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
        ]  # fmt: skip
        if done["method"] != "fp16":
            pd.DataFrame(rows).to_parquet(folder.layers_path)
        loss = math.log(done["metrics"]["wikitext2/perplexity"]["value"])
        windows = [
            {
                "window": n,
                "digest": f"w{n}",
                "nll": 2047 * (loss + 0.01 * (n % 3) + 1e-3 * (7 * n * len(folder.path.name) % 5)),
                "n_tokens": 2047,
            }
            for n in range(12)
        ]
        write_records(folder.windows_path("wikitext2"), windows, folder.run_id, {})
        for task in TASKS:
            right = round(100 * done["metrics"][f"{task}/acc"]["value"])
            examples = [
                {
                    "task": task,
                    "example": n,
                    "digest": f"e{n}",
                    "filter": "none",
                    "acc": float(n < right),
                    "acc_norm": float(n < right),
                }
                for n in range(100)
            ]
            write_records(folder.examples_path(task), examples, folder.run_id, {"task": task, "request": task})


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    write(FOLDER)
    print(f"{len(list(FOLDER.iterdir()))} cells in {FOLDER}; tests/golden holds the tables they must give")
