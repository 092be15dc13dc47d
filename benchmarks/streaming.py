"""What reading ahead saves: ``python benchmarks/streaming.py [--shape qwen2-1024] [--blocks 2] [--mib-per-s 200]``.

A pass over a random model, window by window and block by block, with the thread that reads the next block and without it: the
baseline, in the same run. Local files come from the page cache at gigabytes per second, so a file system of a given speed is
imitated: every block takes its bytes over that speed longer to read. Wall-clock seconds, and the sum of what reading and
computing take alone: the best that can be had is the longer of the two.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import random_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1024")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--mib-per-s", type=float, default=200.0)
    given = parser.parse_args()
    import torch

    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource
    from ptqbench.models.stages import forward

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = random_model.shape(given.shape, given.blocks)

    class Slow(BlockwiseModel):
        """Reads as slowly as the file system that is imitated."""

        delay, spent = True, 0.0

        def _read_module(self, name: str) -> dict[str, Any]:
            start = time.perf_counter()
            tensors = super()._read_module(name)
            if self.delay and "layers" in name:
                time.sleep(sum(t.numel() * t.element_size() for t in tensors.values()) / (given.mib_per_s * 2**20))
            self.spent += time.perf_counter() - start
            return tensors

    class Behind(Slow):
        """Reads a block when it is asked for."""

        def _read_block(self, index: int) -> dict[str, Any]:
            return self._read_module(f"model.layers.{index}")

    @torch.no_grad()
    def run(model: Slow, tokens: Any) -> float:
        hidden, positions = list(model.embed(tokens).to(device).split(1)), model.positions(tokens.shape[1])
        model.spent, start = 0.0, time.perf_counter()
        for index in range(model.n_blocks):
            with model.block(index) as block:
                hidden = [forward(block, x, positions) for x in hidden]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as name:
        source = ModelSource(random_model.write(Path(name), shape, str(dtype).removeprefix("torch.")))
        tokens = torch.randint(0, shape.vocab_size, (given.windows, given.seq_len), generator=torch.manual_seed(0))
        run(Behind(source, dtype, device), tokens[:, :8])
        behind, ahead = Behind(source, dtype, device), Slow(source, dtype, device)
        base = run(behind, tokens)
        took = run(ahead, tokens)
    size = f"{shape.n_blocks} blocks, {given.windows} x {given.seq_len} tokens"
    print(f"{given.shape}, {size}, {device.type}, {given.mib_per_s:g} MiB/s")
    print(f"  read when asked for  {base:7.2f} s, of which reading {behind.spent:.2f} s")
    print(f"  read ahead           {took:7.2f} s   {took / base:5.2f} of the baseline")


if __name__ == "__main__":
    main()
