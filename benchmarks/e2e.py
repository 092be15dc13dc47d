"""Quantize a random model of a named shape from end to end: ``python benchmarks/e2e.py --shape qwen2-256 --samples 64``.

Every number is that of a whole job: reading the checkpoint, calibrating, rounding, writing the codes. ptqbench runs the cell that
the command line would run. In the same process and on the same windows run the baselines: the textbook loop (``baselines.py``)
and, where they are importable, llmcompressor and gptqmodel; all round weights to 4 bits in groups of 128 with GPTQ. On a CPU
everything runs with one thread and CPU seconds are printed, so that other work on the machine matters little; on a GPU wall-clock
seconds. ``--repeats`` runs everything several times, alternating, and prints the smallest of each.

Exactness is measured linear by linear on what the textbook sees: our solver gets the textbook's weight and Hessian and must
find the same codes. (Whole models cannot be compared code by code: one code that falls the other way, because sums were formed in
another order, changes the inputs of everything behind it.)

``--blocks N`` cuts the model to its first N blocks and states the extrapolation to all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import baselines
import random_model

if TYPE_CHECKING:
    from torch import Tensor

    from ptqbench.cell.spec import RunSpec

BASELINES = ("textbook", "llmcompressor", "gptqmodel")
QUANTIZING = ("load", "bases", "quantize")
METHODS = {"gptq": ["+method=gptq", "bitwidth=w4g128"], "coquant": ["+method=coquant", "bitwidth=w4a4kv4"]}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-256", help="qwen2-256, qwen2-1024, or a name of conf/model")
    parser.add_argument("--blocks", type=int, help="only the first so many blocks")
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--basis-samples", type=int, default=512, help="windows behind CoQuant's basis")
    parser.add_argument("--baseline", choices=BASELINES, action="append", help="default: those that are importable")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where model and runs go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


class Stopwatch:
    """CPU seconds of all threads on a CPU, wall-clock seconds on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, work: Callable[[], Any]) -> float:
        """Run something and return its seconds."""
        start = self.now()
        work()
        return self.now() - start


class Stages:
    """An observer of a cell that keeps the time at which every stage began."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self.began = watch, {}

    def stage(self, name: str, total: int) -> None:
        """Remember the beginning of a stage."""
        self.began[name] = self._watch.now()

    def advance(self) -> None:
        """Ignore a step."""


def cell(given: argparse.Namespace, folder: Path, text: Path, runs: str) -> RunSpec:
    """Compose the cell that is measured."""
    from ptqbench.sweeps.compose import compose_cell

    words = [
        *METHODS[given.method], "model=local", f"model.path={folder}", "calibration=file", f"calibration.path={text}",
        "calibration.portion=[0,0.8]", f"calibration.n_samples={given.samples}", f"calibration.seq_len={given.seq_len}",
        "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.portion=[0.8,1]",
        f"evaluation.texts.file.seq_len={given.seq_len}", f"execution.runs_dir={runs}", "execution.artefacts_gib=0",
    ]  # fmt: skip
    if given.method == "coquant":
        words.append(f"method.transform.n_samples={given.basis_samples}")
    return compose_cell(words)


def ours(spec: RunSpec, watch: Stopwatch) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the cell; seconds until its evaluation begins, in all and per stage, and its result."""
    from ptqbench.run import run_cell
    from ptqbench.runs.folder import create

    stages, start = Stages(watch), watch.now()
    result = run_cell(spec, create(spec), stages)
    evaluation = min(at for name, at in stages.began.items() if name not in QUANTIZING)
    return {"quantized": evaluation - start, "evaluated": watch.now() - evaluation}, result


def same_codes(bits: int, group_size: int) -> tuple[Callable[[Tensor, Tensor, Tensor], None], dict[str, int]]:
    """Return a check of our solver against another's codes, and the counts that it keeps."""
    from ptqbench.numerics.gptq import gptq
    from ptqbench.numerics.grid import GridSpec, uniform_grid

    counts = {"codes": 0, "different": 0, "far": 0}

    def check(weight: Tensor, hessian: Tensor, codes: Tensor) -> None:
        grid = uniform_grid(weight.shape[1], GridSpec(bits, group_size=group_size))
        found = gptq(weight.float(), hessian, grid, damping=0.01).stored.codes
        distance = (found.int() - codes.int()).abs()
        counts["codes"] += distance.numel()
        counts["different"] += int((distance > 0).sum())
        counts["far"] += int((distance > 1).sum())

    return check, counts


def run(given: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    """Measure everything."""
    from ptqbench.data.tokenizer import load_tokenizer
    from ptqbench.data.windows import calibration_windows

    watch, model = Stopwatch(device), random_model.shape(given.shape, given.blocks)
    dtype = "float32" if device == "cpu" else "bfloat16"
    checkpoint = random_model.write(folder / "model", model, dtype)
    text = random_model.write_text(folder / "text.txt", model, 12 * given.seq_len)
    specs = [cell(given, checkpoint, text, str(folder / f"runs{i}")) for i in range(given.repeats)]
    windows = calibration_windows(specs[0].calibration, load_tokenizer(checkpoint), model.vocab_size, specs[0].seed)
    names = [] if given.no_baseline or given.method != "gptq" else given.baseline or available()
    seconds: dict[str, list[float]] = {"ptqbench": [], **{name: [] for name in names}}
    for spec in specs:
        measured, result = ours(spec, watch)
        seconds["ptqbench"].append(measured["quantized"])
        for name in names:
            work = getattr(baselines, name)
            seconds[name].append(watch.measure(lambda work=work: work(checkpoint, windows, 4, 128, device)))
    found = {
        "shape": given.shape, "blocks": model.n_blocks, "method": given.method, "samples": given.samples,
        "seq_len": given.seq_len, "device": machine(device), "seconds": {k: min(v) for k, v in seconds.items()},
        "all": seconds, "stages": result["timings"], "peak_gpu_gib": result["peak_gpu_gib"],
        "peak_host_gib": result["peak_host_gib"], "flop": result["flop"],
    }  # fmt: skip
    if "textbook" in names:
        check, counts = same_codes(4, 128)
        baselines.textbook(checkpoint, windows[: min(8, len(windows))], 4, 128, device, check)
        found["exactness"] = counts
    return found


def available() -> list[str]:
    """Baselines that can be run here."""
    return [name for name in BASELINES if name == "textbook" or importlib.util.find_spec(name)]


def machine(device: str) -> str:
    """Name what everything ran on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread"


def show(found: dict[str, Any], given: argparse.Namespace) -> None:
    """Print the figures."""
    cpu = found["device"].endswith("thread")
    print(
        f"{found['method']} on {found['shape']}, {found['blocks']} blocks, {found['samples']} x {found['seq_len']} tokens"
    )
    print(f"{found['device']}; {'CPU' if cpu else 'wall-clock'} seconds, the smallest of {given.repeats}")
    own = found["seconds"]["ptqbench"]
    for name, value in found["seconds"].items():
        print(f"  {name:14} {value:8.1f} s   {value / own:5.2f} x ptqbench")
    whole = random_model.shape(given.shape).n_blocks
    if found["blocks"] < whole:
        scaled = own * whole / found["blocks"]
        print(f"  all {whole} blocks, extrapolated in proportion: {scaled:.0f} s")
    print("  stages (wall-clock): " + ", ".join(f"{k} {v:.1f}" for k, v in found["stages"].items()))
    print(f"  peak: host {found['peak_host_gib']:.2f} GiB, GPU {found['peak_gpu_gib']}")
    if "exactness" in found:
        counts = found["exactness"]
        print(
            f"  same weight and Hessian, linear by linear: {counts['different']} of {counts['codes']} codes differ from the "
            f"textbook's, {counts['far']} by more than one step"
        )


def main() -> None:
    """Measure and print."""
    given = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    logging.disable(logging.INFO)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = run(given, Path(folder), device)
    show(found, given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
