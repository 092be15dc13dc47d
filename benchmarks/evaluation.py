"""What fake quantization costs perplexity: ``python benchmarks/evaluation.py [--shape qwen2-1024] [--windows 4] [--seq-len 512]``.

A random model of a named shape is evaluated as it is, which is the baseline, and with the quantizers of W4A4KV4 in place, weights
rebuilt from stored codes included: plain, in QuaRot's basis (online Hadamard transforms) and in ResQ's (mixed precision, basis
changes). Block loading is part of both. On a CPU: CPU seconds of one thread, the smallest of ``--repeats``; on a GPU wall-clock.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import random_model
from e2e import Stopwatch

METHODS = ("rtn", "quarot", "resq")


def opened(method: str, folder: Path, text: Path, runs: Path, device: Any) -> tuple[Any, Any]:
    """Quantize with a method on two windows; the model in its basis, and what puts the codes back."""
    from ptqbench.cell.registry import create
    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.rotations import prepare
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import locate
    from ptqbench.run import run_cell
    from ptqbench.runs.folder import create as create_folder
    from ptqbench.sweeps.compose import compose_cell

    spec = compose_cell([
        f"+method={method}", "bitwidth=w4a4kv4", "model=local", f"model.path={folder}", "calibration=file",
        f"calibration.path={text}", "calibration.portion=[0,0.5]", "calibration.n_samples=2", "calibration.seq_len=64",
        "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.portion=[0.5,1]",
        "evaluation.texts.file.seq_len=64", f"execution.runs_dir={runs}", "execution.keep_codes=true",
        "execution.artefacts_gib=0", *(["method.transform.n_samples=2"] if method == "resq" else []),
    ])  # fmt: skip
    run = create_folder(spec)
    run_cell(spec, run)
    transform = create("transform", spec.method.transform)
    model = BlockwiseModel(locate(spec.model), torch_dtype(spec.model.dtype), device)
    bases = prepare(transform, model, lambda n: None, spec, run.state_path, run.run_id, _Nobody())
    return model.reopened(transform.basis(spec, model.architecture, bases)), BlockState(
        run.state_path, run.run_id
    ).overlay


class _Nobody:
    def stage(self, name: str, total: int) -> None:
        """Ignore it."""

    def advance(self) -> None:
        """Ignore it."""


def torch_dtype(name: str) -> Any:
    """Return the torch data type of a name."""
    import torch

    return getattr(torch, name)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-1024")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import torch

    from ptqbench.evaluate.perplexity import perplexity
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.source import ModelSource

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device, watch, shape = torch.device(kind), Stopwatch(kind), random_model.shape(given.shape, given.blocks)
    if kind == "cpu":
        torch.set_num_threads(1)
    dtype = "float32" if kind == "cpu" else "bfloat16"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = random_model.write(scratch / "model", shape, dtype)
        text = random_model.write_text(scratch / "text.txt", shape, 1024)
        stock = BlockwiseModel(ModelSource(folder), torch_dtype(dtype), device)
        models = {"unquantized": (stock, None)}
        models |= {method: opened(method, folder, text, scratch / "runs", device) for method in METHODS}
        tokens = torch.randint(0, shape.vocab_size, (given.windows, given.seq_len), generator=torch.manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(given.repeats):
            for name, (model, overlay) in models.items():
                run = lambda m=model, o=overlay: perplexity(m, tokens, o, given.batch_size)  # noqa: E731
                seconds[name].append(watch.measure(run))
    print(f"{given.shape}, {shape.n_blocks} blocks, {given.windows} x {given.seq_len} tokens, {kind}, {dtype}")
    base = min(seconds["unquantized"])
    for name, values in seconds.items():
        print(f"  {name:12} {min(values):8.2f} s   {min(values) / base:5.2f} x unquantized")


if __name__ == "__main__":
    main()
