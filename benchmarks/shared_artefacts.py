"""What a second method saves on the same model and windows: ``python benchmarks/shared_artefacts.py [--model-gib 0.3]``.

Runs ResQ on a random Llama, then CoQuant (which finds ResQ's second moments) and ResQ with another rotation seed (which finds
its bases) in the same folder. The baselines, in the same run, are the same cells in empty folders. Every cell is a process of
its own; its times are those of ``result.json``: the calibration pass behind the bases, and everything but the evaluation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import random_model
from memory import build


def run(folder: Path, runs: str, options: list[str], n_samples: int) -> dict[str, float]:
    """Run a cell; seconds of its calibration pass and of all of quantizing."""
    common = [
        "model=local", f"model.path={folder / 'model'}", "bitwidth=w4a4kv4", "calibration=file", "evaluation=file",
        f"calibration.path={folder / 'text.txt'}", f"evaluation.texts.file.path={folder / 'text.txt'}",
        "calibration.portion=[0,0.9]", "evaluation.texts.file.portion=[0.9,1]", f"calibration.n_samples={n_samples}",
        "calibration.seq_len=256",
        "evaluation.texts.file.seq_len=256", f"execution.runs_dir={runs}", "execution.progress=false",
        f"method.transform.n_samples={n_samples}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ptqbench", *options, *common]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    newest = max((folder / runs).glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    timings = json.loads(newest.read_text())["timings"]
    quantizing = {name: seconds for name, seconds in timings.items() if not name.startswith(("perplexity", "tasks"))}
    return {"bases": timings["bases_s"], "quantizing": sum(quantizing.values())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-gib", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = build(folder / "model", given.model_gib)
        random_model.write_text(folder / "text.txt", random_model.shape("llama-1024"), 16_384)
        print(f"{made['blocks']} blocks of {made['block_gib']:.3f} GiB, {given.samples} windows of 256 tokens")
        resq, coquant = ["+method=resq"], ["+method=coquant"]
        other_seed = [*resq, "method.transform.rotation_seed=1"]
        first = run(folder, "shared", resq, given.samples)
        print(
            f"{'ResQ, the first':34} bases {first['bases']:7.1f} s   quantizing {first['quantizing']:7.1f} s",
            flush=True,
        )
        for title, options in (("CoQuant", coquant), ("ResQ, another rotation", other_seed)):
            alone = run(folder, f"alone-{title.split()[-1]}", options, given.samples)
            after = run(folder, "shared", options, given.samples)
            for how, found in ((f"{title}, alone", alone), (f"{title}, after ResQ", after)):
                print(f"{how:34} bases {found['bases']:7.1f} s   quantizing {found['quantizing']:7.1f} s")
            ratio = {key: after[key] / alone[key] for key in alone}
            print(f"{'  ratio':34} bases {ratio['bases']:7.2f}     quantizing {ratio['quantizing']:7.2f}", flush=True)


if __name__ == "__main__":
    main()
