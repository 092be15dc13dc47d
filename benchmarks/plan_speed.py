"""Time of ``plan`` and ``status`` for a sweep of 2,000 cells: ``python benchmarks/plan_speed.py [--repeats 3]``.

The sweep is 20 compositions of roles x 5 bitwidths x 20 seeds of the embedded model. Every command runs in a fresh process,
interpreter and imports included; medians of wall-clock and CPU time. The baseline, measured in the same run, composes 20 of the
cells one by one through Hydra and is scaled to 2,000.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SWEEP = """
name: two_thousand
common: [model=tiny]
grids:
  - method: [rtn, gptq, gptaq, qronos, qep, loaq, q2n, gptq_q2n, loaq_q2n]
    bitwidth: [w8, w4, w3, w2, w4g128]
    seed: {seeds}
  - method: [quarot, quarot_q2n, quarot_loaq, resq, resq_per_layer, resq_outlier, coquant, coquant_loaq, spinquant, gptq, rtn]
    bitwidth: [w4a4kv4, w4a8kv8, w4a4, w8, w4]
    seed: {seeds}
"""
BASELINE = """
import sys
from ptqbench.sweeps.compose import compose_cell
for seed in range(20):
    compose_cell(["+method=gptq", "model=tiny", "bitwidth=w3", f"seed={seed}"])
"""


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command and return (wall, CPU) seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sweep.yaml").write_text(SWEEP.format(seeds=list(range(20))))
        ptqbench = [sys.executable, "-m", "ptqbench"]
        commands = {
            "20 cells one by one, x 100": [sys.executable, "-c", BASELINE],
            "plan --groups": [*ptqbench, "plan", "sweep.yaml", "--groups"],
            "plan (every cell listed)": [*ptqbench, "plan", "sweep.yaml"],
            "status of the sweep": [*ptqbench, "status", "sweep.yaml"],
        }
        for title, command in commands.items():
            times = [timed(command, folder) for _ in range(repeats)]
            factor = 100 if "x 100" in title else 1
            wall, cpu = (factor * statistics.median(column) for column in zip(*times, strict=True))
            print(f"{title:28} wall {wall:8.2f} s   CPU {cpu:8.2f} s")


if __name__ == "__main__":
    main()
