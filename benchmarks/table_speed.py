"""Time of ``table`` and ``status`` over many run folders: ``python benchmarks/table_speed.py [--folders 2000] [--repeats 3]``.

Writes that many finished cells (20 methods x 5 bitwidths x 20 seeds, four metrics each), then runs each command in a fresh
process, interpreter and imports included, and reports medians of wall-clock and CPU time. The baseline, measured in the same
run, reads and parses every spec.json and result.json with the standard library and does nothing with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ptqbench.cell.spec import RunSpec, build, to_dict
from ptqbench.runs.folder import RunFolder, folder_of

BASELINE = """
import json, pathlib, sys
for folder in pathlib.Path(sys.argv[1]).iterdir():
    for name in ("spec.json", "result.json"):
        json.loads((folder / name).read_text())
"""


def cell(root: Path, number: int) -> RunSpec:
    """One of the cells: method, bitwidth and seed follow from its number."""
    method, bits, seed = number % 20, 2 + number // 20 % 5, number // 100
    role = {"name": "none", "options": {}}
    data = {
        "model": {"name": "model", "digest": "sha256:0", "dtype": "bfloat16"},
        "method": {
            "name": f"method{method:02}",
            **dict.fromkeys(("transform", "target", "refine"), role),
            "solver": {
                "name": "gptq",
                "options": {"damping": 0.01 * (1 + method), "column_block": 128, "act_order": False},
            },
            "grid": {},
            "activation": {},
            "true_sequential": True,
        },
        "bitwidth": {"name": f"w{bits}", "w_bits": bits, "a_bits": 16, "k_bits": 16, "v_bits": 16},
        "calibration": {"dataset": "c4", "split": "train", "digest": "hub:c4@main"},
        "evaluation": {
            "name": "e",
            "texts": {name: {"dataset": name, "split": "test", "digest": name} for name in ("wikitext2", "c4")},
            "tasks": ["arc_easy"],
        },
        "seed": seed,
        "execution": {"runs_dir": str(root)},
    }
    return build(RunSpec, data)


def finish(spec: RunSpec) -> None:
    """Write the folder of a finished cell."""
    folder: RunFolder = folder_of(spec)
    attempt = folder.path / "attempts" / "001"
    attempt.mkdir(parents=True)
    (attempt / "meta.json").write_text("{}")
    (attempt / "heartbeat.json").write_text(json.dumps({"time": 0, "ended": True}))
    folder.spec_path.write_text(json.dumps(to_dict(spec), indent=2, sort_keys=True))
    value = {"value": 6.0 + spec.seed / 100, "stderr": 0.1, "n_tokens": 300000, "n_windows": 146, "seq_len": 2048}
    score = {
        "value": 0.6 + spec.seed / 1000,
        "stderr": 0.01,
        "n_examples": 2376,
        "task_version": 1,
        "lm_eval": "0.4.13",
    }
    names = {"wikitext2/perplexity": value, "c4/perplexity": value, "arc_easy/acc": score, "arc_easy/acc_norm": score}
    result = {
        "run_id": folder.run_id,
        "metrics": names,
        "bits": {"effective_w_bits": spec.bitwidth.w_bits + 0.01, "packed_bytes": 10**9},
        "timings": {"round_s": 100.0, "perplexity_s": 10.0},
    }
    folder.result_path.write_text(json.dumps(result, indent=2, sort_keys=True))


def medians(command: list[str], repeats: int) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of a fresh process; on a busy machine only the second means something."""
    wall, cpu = [], []
    for _ in range(repeats):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(wall), statistics.median(cpu)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.folders):
            finish(cell(Path(root), number))
        ours = [sys.executable, "-m", "ptqbench"]
        commands = {
            "read and parse alone": [sys.executable, "-c", BASELINE, root],
            "table --format md": [*ours, "table", "--runs-dir", root, "--format", "md"],
            "table": [*ours, "table", "--runs-dir", root],
            "status": [*ours, "status", "--runs-dir", root],
        }
        print(f"{options.folders} run folders, median of {options.repeats} fresh processes")
        for name, command in commands.items():
            wall, cpu = medians(command, options.repeats)
            print(f"{name:22} {wall:6.2f} s wall {cpu:6.2f} s CPU", flush=True)


if __name__ == "__main__":
    main()
