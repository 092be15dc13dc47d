"""Time of the commands that only look: ``python benchmarks/start_up.py [--repeats 5]``.

``--help``, ``plan``, ``status`` and ``table`` of the shipped sweep of the embedded model, each in a fresh process with its
interpreter, in an empty folder; medians of wall-clock and CPU seconds. The baseline, in the same run, is importing torch and the
model classes of transformers, which the usual tool does before it reads its arguments.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from plan_speed import timed

COMMANDS = (["--help"], ["plan", "demo"], ["status", "demo"], ["table", "demo"])
BASELINE = "import torch, transformers.models.llama.modeling_llama"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    lines = {"import torch, transformers": [sys.executable, "-c", BASELINE]}
    lines |= {f"ptqbench {' '.join(words)}": [sys.executable, "-m", "ptqbench", *words] for words in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, list[tuple[float, float]]] = {title: [] for title in lines}
        for _ in range(given.repeats):
            for title, command in lines.items():
                found[title].append(timed(command, Path(name)))
    base = statistics.median(wall for wall, _ in next(iter(found.values())))
    for title, values in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{title:28} {wall:6.2f} s wall, {cpu:6.2f} s CPU, {wall / base:5.2f} of the baseline")


if __name__ == "__main__":
    main()
