"""Peak memory of quantizing a model that does not fit: ``python benchmarks/memory.py [--model-gib 4] [--allowed-gib 1]``.

Writes a random Llama checkpoint of the given size in shards. A child process quantizes it (RTN and, with ``--method gptq``, GPTQ),
measures its perplexity and scores multiple-choice questions. A watchdog samples the child's anonymous memory (RssAnon of Linux:
everything that no file backs) 500 times a second. It kills the child when that exceeds the allowance plus what the interpreter
and its libraries took before any weight was read. A child that loads the whole model is run as the baseline under the same rule:
it must be killed, or the rule proves nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import random_model
from tasks import five_shot

GIB = 2**30
OVER_LIMIT = 77


def build(folder: Path, gib: float) -> dict[str, float]:
    """Write a random checkpoint of about ``gib`` GiB in float32, one shard per block."""
    block = random_model.shape("llama-1024", 1)
    block_bytes = 4 * block.linear_params
    model = dataclasses.replace(block, n_blocks=max(2, round(gib * GIB / block_bytes)))
    random_model.write(folder, model)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return {"model_gib": size / GIB, "blocks": model.n_blocks, "block_gib": block_bytes / GIB}


def anonymous_gib() -> float:
    """Private memory of this process that no file backs, GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20


class Watchdog(threading.Thread):
    """Samples ``anonymous_gib`` and kills this process above a limit."""

    def __init__(self, limit_gib: float) -> None:
        super().__init__(daemon=True)
        self.limit, self.value, self.stop = limit_gib, 0.0, threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stop.wait(0.002):
            self.value = max(self.value, anonymous_gib())
            if self.value > self.limit:
                os._exit(OVER_LIMIT)


def child(folder: Path, allowed_gib: float, what: str) -> None:
    """Do the work under the limit and print the figures as JSON."""
    import torch

    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.pipeline import Method, Timings, quantize
    from ptqbench.evaluate.loglikelihood import log_likelihoods
    from ptqbench.evaluate.perplexity import perplexity
    from ptqbench.methods.refinements import NoRefinement
    from ptqbench.methods.solvers import Gptq, RoundToNearest
    from ptqbench.methods.targets import Weight
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource
    from ptqbench.numerics.grid import GridSpec

    torch.set_num_threads(1)
    torch.linalg.cholesky(torch.eye(8) @ torch.eye(8))  # libraries that load late are not the model's memory
    model = BlockwiseModel(ModelSource(folder), torch.float32, torch.device("cpu"))
    before = anonymous_gib()
    peak, start = Watchdog(before + allowed_gib), time.perf_counter()
    peak.start()
    windows = torch.randint(0, 1024, (4, 128), generator=torch.Generator().manual_seed(0))
    if what == "whole":
        model.materialise()
    else:
        solver = Gptq() if what == "gptq" else RoundToNearest()
        state = BlockState(folder.parent / f"state-{what}", "0" * 12)
        quantize(model, Method(Weight(), solver, NoRefinement(), GridSpec(4), True), windows, state, Timings())
        perplexity(model, windows, state.overlay, batch_size=1)
        questions = five_shot(1024, subjects=1, questions=4)
        assert all(score < 0 for score, _ in log_likelihoods(model, questions, 2048, state.overlay))
    peak.stop.set()
    print(json.dumps({"peak_gib": peak.value - before, "seconds": time.perf_counter() - start}))


def main() -> int:
    """Build the model, run the baseline and the methods under the limit, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-gib", type=float, default=4.0)
    parser.add_argument("--allowed-gib", type=float, default=1.0)
    parser.add_argument("--method", choices=["rtn", "gptq"], action="append", help="default: rtn")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), args.allowed_gib, args.child[1])
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        facts = build(folder, args.model_gib)
        print(f"model {facts['model_gib']:.2f} GiB, {facts['blocks']} blocks of {facts['block_gib']:.3f} GiB")
        print(f"allowed {args.allowed_gib:.2f} GiB, a {facts['model_gib'] / args.allowed_gib:.1f}th of the model")
        for what in ["whole", *(args.method or ["rtn"])]:
            command = [sys.executable, __file__, "--allowed-gib", str(args.allowed_gib), "--child", str(folder), what]
            done = subprocess.run(command, capture_output=True, text=True)
            name = "load the whole model" if what == "whole" else f"{what}, perplexity, questions"
            if done.returncode:
                over = done.returncode == OVER_LIMIT
                print(f"{name:30} {'killed: over the allowance' if over else done.stderr[-500:]}")
                if what != "whole":
                    return 1
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:30} peak {figures['peak_gib']:.3f} GiB, {figures['seconds']:.0f} s")
            if what == "whole":
                print("the baseline fitted: the limit proves nothing")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
