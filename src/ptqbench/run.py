"""Run one cell: load, quantize, evaluate, record. ``python -m ptqbench.run SPEC_OR_FOLDER`` needs no scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.attempt import Observer, Silent, attempt
from ptqbench.errors import PtqbenchError
from ptqbench.fingerprint import FORMAT
from ptqbench.registry import create
from ptqbench.spec import UNTOUCHED_BITS, RunSpec
from ptqbench.store import RunFolder, write_json

if TYPE_CHECKING:
    import torch

    from ptqbench.methods.precision import Precision
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.pipeline import Timings
    from ptqbench.state import BlockState

KEEP_CODES_BELOW_BYTES = 64 << 20


def run_cell(spec: RunSpec, folder: RunFolder, shown: Observer | None = None) -> dict[str, Any]:
    """Run a cell, or return its result if it is done already.

    Args:
        spec: The validated, resolved cell.
        folder: Its run folder, existing.
        shown: Observer that shows progress.

    Returns:
        The content of ``result.json``.

    Raises:
        RunFailed: The cell failed; see ``failure.json``.
    """
    done = folder.result()
    if done is not None:
        return done
    with attempt(folder, shown or Silent()) as current:
        result = _work(spec, folder, current)
        write_json(folder.result_path, result)
        _drop_codes(spec, folder, result["bits"]["packed_bytes"])
    return result


def _work(spec: RunSpec, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    from ptqbench.data.windows import load_tokenizer
    from ptqbench.models.source import locate
    from ptqbench.pipeline import Timings
    from ptqbench.state import BlockState

    observer.stage("load", 1)
    _configure(spec)
    source = locate(spec.model)
    tokenizer = load_tokenizer(source.folder)
    model = _open(spec, source)
    timings, state = Timings(), BlockState(folder.state_path, folder.run_id)
    transform = create("transform", spec.method.transform)
    precision = transform.precision(spec, model.architecture)
    if spec.quantizes:
        model = _transformed(spec, model, transform, tokenizer, folder, timings, observer)
        _quantize(spec, model, precision, tokenizer, state, timings, observer)
    metrics = _evaluate(spec, model, tokenizer, state, timings, observer)
    return _result(spec, folder, metrics, _record_layers(spec, folder, state, model, precision), timings)


def _configure(spec: RunSpec) -> None:
    import torch

    if spec.execution.threads is not None:
        torch.set_num_threads(spec.execution.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _open(spec: RunSpec, source: Any) -> BlockwiseModel:
    import torch

    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.outliers import outlier_channels, rescale_block

    device = spec.execution.device
    device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    width = int(source.config["hidden_size"])
    channels = outlier_channels(width, spec.model.outlier_channels)

    def with_outliers(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        return rescale_block(tensors, width, channels, spec.model.outlier_factor)

    dtype: torch.dtype = getattr(torch, spec.model.dtype)
    return BlockwiseModel(source, dtype, torch.device(device), with_outliers if channels else None)


def _windows(spec: RunSpec, model: BlockwiseModel, tokenizer: Any, n_samples: int | None = None) -> torch.Tensor:
    from ptqbench.data.windows import calibration_windows

    assert spec.calibration is not None, "a cell that quantizes has a calibration"
    calibration = dataclasses.replace(spec.calibration, n_samples=n_samples or spec.calibration.n_samples)
    return calibration_windows(calibration, tokenizer, model.architecture.vocab_size, spec.seed)


def _transformed(
    spec: RunSpec,
    model: BlockwiseModel,
    transform: Any,
    tokenizer: Any,
    folder: RunFolder,
    timings: Timings,
    observer: Observer,
) -> BlockwiseModel:
    """Open the model in the basis of the cell's transform, computing eigenbases first if it needs them."""
    from ptqbench.bases import compute_bases

    bases = None
    if transform.needs_statistics:
        windows = _windows(spec, model, tokenizer, transform.n_samples)
        observer.stage("bases", model.n_blocks)
        with timings.measure("bases_s"):
            advance = lambda index: observer.advance()  # noqa: E731
            bases = compute_bases(transform, model, windows, spec, folder.state_path, folder.run_id, advance)
    return model.reopened(transform.basis(spec, model.architecture, bases))


def _quantize(
    spec: RunSpec,
    model: BlockwiseModel,
    precision: Precision,
    tokenizer: Any,
    state: BlockState,
    timings: Timings,
    observer: Observer,
) -> None:
    from ptqbench.pipeline import Method, quantize

    roles = {role: create(role, getattr(spec.method, role)) for role in ("target", "solver", "refine")}
    method = Method(
        **roles,
        grid=lambda stage, in_features: precision.weight_grid(stage),
        true_sequential=spec.method.true_sequential,
        during_calibration=spec.method.activation.during_calibration,
    )
    windows = _windows(spec, model, tokenizer)
    observer.stage("quantize", model.n_blocks)
    quantize(model, method, windows, state, timings, lambda index: observer.advance())


def _evaluate(
    spec: RunSpec, model: BlockwiseModel, tokenizer: Any, state: BlockState, timings: Timings, observer: Observer
) -> dict[str, Any]:
    from ptqbench.data.windows import evaluation_windows
    from ptqbench.evaluate.perplexity import perplexity

    overlay = state.overlay if spec.bitwidth.w_bits < UNTOUCHED_BITS else None
    metrics: dict[str, Any] = {}
    for label, text in spec.evaluation.texts.items():
        windows = evaluation_windows(text, tokenizer, model.architecture.vocab_size)
        observer.stage(f"perplexity {label}", model.n_blocks)
        with timings.measure("perplexity_s"):
            measured = perplexity(model, windows, overlay, spec.evaluation.batch_size, lambda index: observer.advance())
        metrics[f"{label}/perplexity"] = {
            "value": measured.perplexity,
            "stderr": measured.standard_error,
            "n_tokens": measured.n_tokens,
            "n_windows": len(windows),
            "seq_len": windows.shape[1],
        }
    if spec.evaluation.tasks:
        from ptqbench.evaluate.zero_shot import zero_shot

        observer.stage("zero-shot", 1)
        with timings.measure("zero_shot_s"):
            whole = model.materialise(overlay)
            metrics |= zero_shot(whole, tokenizer, spec.evaluation.tasks, spec.evaluation.batch_size)
        observer.advance()
    return metrics


def _record_layers(
    spec: RunSpec, folder: RunFolder, state: BlockState, model: BlockwiseModel, precision: Precision
) -> dict[str, Any]:
    """Write ``layers.parquet`` and account for the bits that are really stored."""
    bits: dict[str, Any] = dataclasses.asdict(precision.storage_bits())
    bits["packed_bytes"] = round(bits["effective_w_bits"] * model.architecture.linear_params / 8)
    if not spec.quantizes:
        return bits
    import pyarrow
    import pyarrow.parquet

    temporary = folder.layers_path.with_name(f".layers.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(state.reports(model.n_blocks)), temporary)
    temporary.replace(folder.layers_path)
    return bits | {"codes_digest": state.codes_digest(model.n_blocks)}


def _result(
    spec: RunSpec, folder: RunFolder, metrics: dict[str, Any], bits: dict[str, Any], timings: Timings
) -> dict[str, Any]:
    from ptqbench import provenance

    return {
        "format": FORMAT,
        "run_id": folder.run_id,
        "model": spec.model.name,
        "method": spec.method.name,
        "bitwidth": spec.bitwidth.name,
        "seed": spec.seed,
        "metrics": metrics,
        "bits": bits,
        "timings": {name: round(seconds, 4) for name, seconds in timings.seconds.items()},
        "peak_host_gib": round(provenance.peak_host_gib(), 4),
        "peak_gpu_gib": provenance.peak_gpu_gib(),
        "attempts": len(folder.attempts),
    }


def _drop_codes(spec: RunSpec, folder: RunFolder, packed_bytes: int) -> None:
    """Remove finished blocks unless they are to be kept; after the result is written, so that a kill costs no work."""
    keep = spec.execution.keep_codes
    if keep is False or (keep is None and packed_bytes > KEEP_CODES_BELOW_BYTES):
        for path in folder.state_path.glob("*.safetensors"):
            path.unlink()
        with contextlib.suppress(OSError):
            folder.state_path.rmdir()


def main(arguments: list[str]) -> int:
    """Run the cell of a run folder or of its ``spec.json``; exit status 0 when it is done, 1 when it failed, 2 on misuse."""
    if len(arguments) != 1:
        print("usage: python -m ptqbench.run RUN_FOLDER_OR_SPEC_JSON", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    folder = RunFolder(path.parent if path.name == "spec.json" else path)
    try:
        result = run_cell(folder.read_spec(), folder)
    except PtqbenchError as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 1 if folder.failure_path.exists() else 2
    for name, metric in result["metrics"].items():
        print(f"{name} = {metric['value']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
