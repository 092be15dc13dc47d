"""Time of the column loop of GPTQ, and of the clip search: ``python benchmarks/column_loop.py [--shapes 512x512] [--device cpu]``.

W4 in groups of 128 channels on random weights (rows x columns) and correlated inputs; the factorisation is made before and not
timed, fitting the groups is. The baseline, measured in the same run, is the textbook loop written out below: float32, one column
at a time, every column updates the rest of its block of 128, every block the rest of the weight. Ours are the plain loop and, on
a CUDA device with triton, the fused kernel. The clip search of one group of 128 channels has a Python loop over the 80 factors as
its baseline. On a CPU: CPU seconds of one thread; on a GPU: wall-clock between synchronisations, kernels compiled before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import panels
from ptqbench.numerics import fused_columns
from ptqbench.numerics.affine import scale_from_range, to_codes, to_values, value_range
from ptqbench.numerics.clip_search import EXPONENT, STEP_DENOMINATOR, STEPS, best_shrink
from ptqbench.numerics.column_loop import LoopOptions
from ptqbench.numerics.compensated import compensated_rounding
from ptqbench.numerics.factorisation import factorise
from ptqbench.numerics.grid import GridSpec, fit, uniform_grid

BLOCK = 128
SPEC = GridSpec(4, group_size=BLOCK)
SHAPES = {
    "cpu": ["512x512", "1408x1024"],
    # the stacked linears of a block of Qwen2.5-7B: q, k, v; o; gate, up; down
    "cuda": ["4608x3584", "3584x3584", "37888x3584", "3584x18944"],
}


def textbook(weight: Tensor, upper: Tensor) -> Tensor:
    """Round ``weight`` (m, n) column by column with U (n, n); return the codes (m, n)."""
    work, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        block, errors = work[:, start:stop].clone(), torch.empty_like(work[:, start:stop])
        corner = upper[start:stop, start:stop]
        scale, zero_point = fit(block, SPEC)
        for i in range(stop - start):
            w = block[:, i]
            codes[:, start + i] = code = to_codes(w, scale, zero_point, SPEC)
            errors[:, i] = (w - to_values(code, scale, zero_point)) / corner[i, i]
            block[:, i:] -= torch.outer(errors[:, i], corner[i, i:])
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return codes


def loop_over_factors(values: Tensor, xmin: Tensor, xmax: Tensor) -> Tensor:
    """Return the best shrink factor of every row of ``values`` (r, c), trying one after the other."""
    best, best_loss = torch.ones_like(xmin), torch.full_like(xmin, torch.inf)
    for i in range(STEPS):
        factor = (STEP_DENOMINATOR - i) / STEP_DENOMINATOR
        scale, zero_point = (t[:, None] for t in scale_from_range(factor * xmin, factor * xmax, SPEC))
        trial = to_values(to_codes(values, scale, zero_point, SPEC), scale, zero_point)
        loss = (trial - values).abs().pow(EXPONENT).sum(dim=1)
        better = loss < best_loss
        best, best_loss = torch.where(better, factor, best), torch.where(better, loss, best_loss)
    return best


def timed(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, Tensor]:
    """Return the median seconds of a call and its result; the first call on a GPU, which compiles, does not count."""
    seconds, found = [], call() if device.type == "cuda" else torch.empty(0)
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            found = call()
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        else:
            began = time.process_time()
            found = call()
            seconds.append(time.process_time() - began)
    return statistics.median(seconds), found


def compare(title: str, calls: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int) -> None:
    """Print seconds, ratio to the first call, and the fraction of results that differ from its."""
    print(title)
    base, reference = 0.0, torch.empty(0)
    for name, call in calls.items():
        seconds, found = timed(call, device, repeats)
        if not base:
            base, reference = seconds, found
        apart = (found != reference).double().mean().item()
        print(f"  {name:28} {seconds:10.4f} s   ratio {seconds / base:7.4f}   differing {apart:.2e}", flush=True)


def _replaced(panel: panels.Panel, call: Callable[[], Tensor]) -> Tensor:
    with panels.replaced(panel):
        return call()


def columns(rows: int, width: int, device: torch.device, repeats: int, alternatives: dict[str, panels.Panel]) -> None:
    """Compare the loops on one shape."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, width, generator=generator, device=device)
    inputs = torch.randn(2 * width, width, generator=generator, device=device)
    inputs += 0.5 * inputs.roll(1, 1) + inputs[:, :1]
    factor = factorise(inputs.T @ inputs)
    del inputs
    grid, options = uniform_grid(width, SPEC), LoopOptions(column_block=BLOCK)

    def ours(engine: str) -> Callable[[], Tensor]:
        return lambda: compensated_rounding(weight, grid, factor, options, engine=engine).stored.codes.float()

    calls = {"textbook loop": lambda: textbook(weight, factor.upper), "plain loop": ours("plain")}
    if fused_columns.engine_on(device) != "plain":
        calls["fused kernel"] = ours("fused")
    for name, panel in alternatives.items():
        calls[name] = lambda panel=panel: _replaced(panel, ours("plain"))
        calls[name]()  # compiles
    compare(f"column loop, {rows} x {width}", calls, device, repeats)


def clip_search(rows: int, device: torch.device, repeats: int) -> None:
    """Compare the clip searches on one group of a weight with this many rows."""
    values = torch.randn(rows, BLOCK, generator=torch.Generator(device).manual_seed(1), device=device)
    xmin, xmax = value_range(values, SPEC)
    calls = {
        "loop over the factors": lambda: loop_over_factors(values, xmin, xmax),
        "best_shrink": lambda: best_shrink(values, xmin, xmax, SPEC),
    }
    compare(f"clip search, {rows} x {BLOCK}", calls, device, repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alternatives", action="store_true", help="also numba and torch.compile, on a CPU")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    print(f"{name}; torch {torch.__version__}; engine auto: {fused_columns.engine_on(device)}")
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in given.shapes or SHAPES[device.type]]
    found = panels.available() if given.alternatives and device.type == "cpu" else {}
    alternatives = {name: make() for name, make in found.items()}
    for rows, width in shapes:
        columns(rows, width, device, given.repeats, alternatives)
    for rows in dict.fromkeys(rows for rows, _ in shapes):
        clip_search(rows, device, given.repeats)


if __name__ == "__main__":
    main()
