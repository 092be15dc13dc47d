"""The parts of a block against what the usual code does: ``python benchmarks/stages.py [--shape qwen2-1024] [--tokens 4096]``.

* forwards: the block run in stages, once, against four runs that collect and one that propagates;
* second moments: one symmetric product per distinct input against a full float32 product per linear; on a GPU also 16-bit
  products with float32 sums against float32 products, with the largest difference between the two;
* factorisations: one inverse factor per distinct input against Cholesky, inverse and Cholesky per linear.

One random block of a named shape and one window after the other. On a CPU: CPU seconds of one thread; on a GPU: wall-clock.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_model
from e2e import Stopwatch


def timed(watch: Stopwatch, repeats: int, **works: Callable[[], Any]) -> dict[str, float]:
    """Run every work in turn, several times; the smallest seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(watch.measure(work))
    return {name: min(seconds) for name, seconds in found.items()}


def show(title: str, seconds: dict[str, float]) -> None:
    """Print seconds, and ratios to the first, which is the baseline."""
    base = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {name.replace('_', ' '):34} {value:9.3f} s   {value / base:6.3f} of the baseline")


def forwards(block: Any, hidden: list[Any], positions: Any) -> dict[str, Callable[[], Any]]:
    """Five runs of the block, and one in stages."""
    from ptqbench.models.stages import finish, forward, staged

    return {
        "five_block_runs": lambda: [forward(block, x, positions) for _ in range(5) for x in hidden],
        "one_run_in_stages": lambda: [finish(staged(block, x, positions)) for x in hidden],
    }


def moments(inputs: dict[int, list[Any]], linears: list[int]) -> dict[str, Callable[[], Any]]:
    """A full product per linear, and a symmetric one per distinct input, in the type of the inputs."""
    import torch

    from ptqbench.numerics.second_moment import MomentSum

    def usual() -> None:
        for width in linears:
            total = torch.zeros(width, width, device=inputs[width][0].device)
            for x in inputs[width]:
                flat = x.reshape(-1, width).t().float()
                total += flat @ flat.t()

    def shared(dtype: torch.dtype | None = None) -> list[Any]:
        sums = []
        for width in dict.fromkeys(linears):
            for _ in range(1 + (linears.count(width) > 3)):  # o has the width of q, k, v and an input of its own
                total = MomentSum(width)
                for x in inputs[width]:
                    total.add(x if dtype is None else x.to(dtype))
                sums.append(total.mean())
        return sums

    works: dict[str, Callable[[], Any]] = {"float32_per_linear": usual, "symmetric_shared": shared}
    if next(iter(inputs.values()))[0].is_cuda:
        works["symmetric_shared_in_float32"] = lambda: shared(torch.float32)
    return works


def factors(inputs: dict[int, list[Any]], linears: list[int]) -> dict[str, Callable[[], Any]]:
    """Three factorisations per linear, and an inverse factor per distinct input."""
    import torch

    from ptqbench.numerics.factorisation import factorise
    from ptqbench.numerics.second_moment import MomentSum

    held = {}
    for width, xs in inputs.items():
        total = MomentSum(width)
        total.add(torch.cat([x.reshape(-1, width) for x in xs]))
        held[width] = total.mean()

    def usual() -> None:
        for width in linears:
            h = held[width].clone()
            h.diagonal().add_(0.01 * h.diagonal().mean())
            torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)

    def shared() -> None:
        for width in dict.fromkeys(linears):
            for _ in range(1 + (linears.count(width) > 3)):
                factorise(held[width], damping=0.01)

    return {"three_per_linear": usual, "one_per_input": shared}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-1024")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import torch

    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    shape, watch, device = random_model.shape(given.shape, 1), Stopwatch(kind), torch.device(kind)
    draw = torch.Generator(device).manual_seed(0)
    count = given.tokens // given.seq_len
    linears = [width for _, width in shape.linear_shapes().values()]
    print(f"{given.shape}, one block, {count} x {given.seq_len} tokens, {kind}, {dtype}")

    def windows(width: int) -> list[Any]:
        drawn = torch.randn(count, given.seq_len, width, generator=draw, device=device)
        return list(drawn.to(dtype).split(1))

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = random_model.write(Path(name), shape, str(dtype).removeprefix("torch."))
        model = BlockwiseModel(ModelSource(folder), dtype, device)
        positions = model.positions(given.seq_len)
        with model.block(0) as block:
            works = forwards(block, windows(shape.hidden_size), positions)
            show("forwards", timed(watch, given.repeats, **works))
    inputs = {width: windows(width) for width in dict.fromkeys(linears)}
    works = moments(inputs, linears)
    show("second moments", timed(watch, given.repeats, **works))
    if kind == "cuda":
        pairs = zip(works["symmetric_shared"](), works["symmetric_shared_in_float32"](), strict=True)
        apart = max(float((a - b).abs().max() / b.diagonal().mean()) for a, b in pairs)
        print(f"  largest difference between 16-bit and float32 products, over the mean diagonal: {apart:.2e}")
    show("factorisations", timed(watch, given.repeats, **factors(inputs, linears)))


if __name__ == "__main__":
    main()
