"""Run one cell: load, quantize, evaluate, record. ``python -m ptqbench.run SPEC_OR_FOLDER`` needs no scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell.fingerprint import FORMAT, identity_fields
from ptqbench.cell.registry import create
from ptqbench.cell.spec import UNTOUCHED_BITS, CalibrationSpec, RunSpec
from ptqbench.errors import CellBusy, PtqbenchError
from ptqbench.runs.artefacts import FOLDER, Artefacts
from ptqbench.runs.attempt import Observer, Silent, attempt, record_failure
from ptqbench.runs.folder import RunFolder, replacing, write_json
from ptqbench.runs.lease import lease
from ptqbench.sweeps.pins import check_unchanged
from ptqbench.tracking.guard import followed

if TYPE_CHECKING:
    import torch

    from ptqbench.engine.bases import Shelf
    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.timings import Timings
    from ptqbench.methods.precision import Precision
    from ptqbench.models.blockwise import BlockwiseModel

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
        CellBusy: Another living process works on the cell.
    """
    done = folder.result()
    if done is not None:
        return done
    with lease(folder):
        done = folder.result()  # perhaps finished by the previous holder between the first look and the lease
        return done if done is not None else _attempt(spec, folder, shown or Silent())


def run_folder(folder: RunFolder) -> dict[str, Any]:
    """Run the cell that a folder describes; what jobs and workers call.

    Args:
        folder: Run folder with ``spec.json``.

    Returns:
        The content of ``result.json``.

    Raises:
        PtqbenchError: As :func:`run_cell`; an unreadable or foreign ``spec.json`` is recorded in ``failure.json`` too.
    """
    try:
        spec = folder.read_spec()
    except PtqbenchError as error:
        if folder.spec_path.exists():  # else there is no cell whose failure could be recorded
            record_failure(folder, error)
        raise
    return run_cell(spec, folder)


def _attempt(spec: RunSpec, folder: RunFolder, shown: Observer) -> dict[str, Any]:
    with followed(spec, folder), attempt(folder, shown) as current:
        check_unchanged(spec)
        result = _work(spec, folder, current)
        write_json(folder.result_path, result)
        _drop_codes(spec, folder, result["bits"]["packed_bytes"])
    return result


def _work(spec: RunSpec, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    from ptqbench.data.tokenizer import load_tokenizer
    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.timings import Timings
    from ptqbench.evaluate.cell import prepared_tasks
    from ptqbench.models.source import locate

    observer.stage("load", 1)
    _configure(spec)
    source = locate(spec.model)
    tokenizer = load_tokenizer(source.folder)
    model = _open(spec, source)
    timings, state = Timings(), BlockState(folder.state_path, folder.run_id)
    transform = create("transform", spec.method.transform)
    precision = transform.precision(spec, model.architecture)
    calibration = _Calibration(spec, model, tokenizer)
    tasks = prepared_tasks(spec.evaluation, folder, tokenizer)
    if spec.quantizes:
        model = _transformed(spec, model, transform, calibration, folder, timings, observer)
        _quantize(spec, model, precision, calibration, state, timings, observer)
    metrics = _evaluate(spec, folder, model, tokenizer, tasks, state, timings, observer)
    result = _result(spec, folder, model, metrics, _record_layers(spec, folder, state, model, precision), timings)
    _check_still(spec, folder, calibration.artefacts)
    return result | {"tokenizer": type(tokenizer).__name__, "shared": calibration.artefacts.account()}


def _check_still(spec: RunSpec, folder: RunFolder, artefacts: Artefacts) -> None:
    """Throw the work away if what it was done on has changed meanwhile."""
    try:
        check_unchanged(spec)
    except PtqbenchError:
        for path in (folder.state_path, folder.records_path):
            shutil.rmtree(path, ignore_errors=True)
        artefacts.discard()
        raise


def _configure(spec: RunSpec) -> None:
    # Read when a GPU is first used: products in a fixed order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from ptqbench.numerics.fused_columns import forbid_fused

    if spec.execution.threads is not None:
        torch.set_num_threads(spec.execution.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    forbid_fused(spec.execution.column_loop == "plain")


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


@dataclasses.dataclass(frozen=True)
class _Calibration:
    """The calibration text of a cell, and what cells share about it."""

    spec: RunSpec
    model: BlockwiseModel
    tokenizer: Any

    def windows(self, n_samples: int | None = None) -> torch.Tensor:
        """Draw windows, (n_samples, seq_len) int64, or find those that another cell drew."""
        from ptqbench.data.windows import calibration_windows

        text, rows, seed = self._text(n_samples), self.model.architecture.vocab_size, self.spec.seed
        key = {
            "model": self.spec.model.digest,
            "calibration": identity_fields(text),
            "seed": seed,
            "rows": rows,
        }
        make = lambda: {"windows": calibration_windows(text, self.tokenizer, rows, seed)}  # noqa: E731
        return self.artefacts.get("calibration", key, make)["windows"]

    def shelf(self, n_samples: int) -> Shelf:
        """Where moments over so many windows are left for other cells."""
        from ptqbench.engine.bases import Shelf

        key = {
            "model": identity_fields(self.spec.model),
            "calibration": identity_fields(self._text(n_samples)),
            "seed": self.spec.seed,
            "device": self.model.device.type,
        }
        return Shelf(self.artefacts, key)

    def _text(self, n_samples: int | None) -> CalibrationSpec:
        assert self.spec.calibration is not None, "a cell that quantizes has a calibration"
        return dataclasses.replace(self.spec.calibration, n_samples=n_samples or self.spec.calibration.n_samples)

    @functools.cached_property
    def artefacts(self) -> Artefacts:
        """One object for the whole cell: it knows what the cell was spared."""
        execution = self.spec.execution
        return Artefacts(Path(execution.runs_dir) / FOLDER, int(execution.artefacts_gib * 2**30))


def _transformed(
    spec: RunSpec,
    model: BlockwiseModel,
    transform: Any,
    calibration: _Calibration,
    folder: RunFolder,
    timings: Timings,
    observer: Observer,
) -> BlockwiseModel:
    """Open the model in the basis of the cell's transform, once what that needs is computed, learned or read."""
    from ptqbench.engine.rotations import prepare

    draw, shelf = calibration.windows, calibration.shelf
    with timings.measure("bases_s"):
        bases = prepare(transform, model, draw, spec, folder.state_path, folder.run_id, observer, shelf)
    return model.reopened(transform.basis(spec, model.architecture, bases))


def _quantize(
    spec: RunSpec,
    model: BlockwiseModel,
    precision: Precision,
    calibration: _Calibration,
    state: BlockState,
    timings: Timings,
    observer: Observer,
) -> None:
    from ptqbench.engine.pipeline import Method, quantize

    roles = {role: create(role, getattr(spec.method, role)) for role in ("target", "solver", "refine")}
    method = Method(
        **roles,
        grid=lambda stage, in_features: precision.weight_grid(stage),
        true_sequential=spec.method.true_sequential,
        during_calibration=spec.method.activation.during_calibration,
    )
    with timings.measure("windows_s"):
        windows = calibration.windows()
    observer.stage("quantize", model.n_blocks)
    quantize(model, method, windows, state, timings, lambda index: observer.advance())


def _evaluate(
    spec: RunSpec,
    folder: RunFolder,
    model: BlockwiseModel,
    tokenizer: Any,
    tasks: Any,
    state: BlockState,
    timings: Timings,
    observer: Observer,
) -> dict[str, Any]:
    from ptqbench.evaluate.cell import CellEvaluation

    overlay = state.overlay if spec.bitwidth.w_bits < UNTOUCHED_BITS else None
    return CellEvaluation(spec.evaluation, folder, model, overlay, tokenizer, observer, timings.measure, tasks).run()


def _record_layers(
    spec: RunSpec, folder: RunFolder, state: BlockState, model: BlockwiseModel, precision: Precision
) -> dict[str, Any]:
    """Write ``layers.parquet`` and account for the bits that are really stored."""
    bits: dict[str, Any] = dataclasses.asdict(precision.storage_bits())
    bits["packed_bytes"] = round(bits["effective_w_bits"] * model.architecture.linear_params / 8)
    cached = model.architecture.n_blocks * model.architecture.kv_dim
    bits["kv_bytes_per_token"] = cached * (bits["k_bits"] + bits["v_bits"]) / 8
    if not spec.quantizes:
        return bits
    import pyarrow
    import pyarrow.parquet

    with replacing(folder.layers_path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(state.reports(model.n_blocks)), temporary)
    return bits | {"codes_digest": state.codes_digest(model.n_blocks)}


def _result(
    spec: RunSpec,
    folder: RunFolder,
    model: BlockwiseModel,
    metrics: dict[str, Any],
    bits: dict[str, Any],
    timings: Timings,
) -> dict[str, Any]:
    from ptqbench.engine.cost import work
    from ptqbench.evaluate.cell import averages
    from ptqbench.numerics.fused_columns import engine_on
    from ptqbench.runs import provenance

    tokens = {label: metrics[f"{label}/perplexity"]["n_tokens"] for label in spec.evaluation.texts}
    done = work(spec, model.architecture, tokens)

    return {
        "format": FORMAT,
        "run_id": folder.run_id,
        "model": spec.model.name,
        "method": spec.method.name,
        "bitwidth": spec.bitwidth.name,
        "seed": spec.seed,
        "metrics": metrics,
        "averages": averages(spec.evaluation.tasks, metrics),
        "bits": bits,
        "timings": {name: round(seconds, 4) for name, seconds in timings.seconds.items()},
        "flop": done.flop,
        "n_tokens": done.n_tokens,
        "column_loop": engine_on(model.device),
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
    """Run the cell of a run folder or of its ``spec.json``.

    Args:
        arguments: The path, and ``--with-parent`` where the process is to end with its parent.

    Returns:
        Exit status 0 when the cell is done (or somebody else works on it), 1 when it failed, 2 on misuse, 130 when it was
        interrupted.
    """
    words = [word for word in arguments if word != "--with-parent"]
    if len(words) != 1:
        print("usage: python -m ptqbench.run [--with-parent] RUN_FOLDER_OR_SPEC_JSON", file=sys.stderr)
        return 2
    if "--with-parent" in arguments:
        _end_with_parent()
    path = Path(words[0])
    folder = RunFolder(path.parent if path.name == "spec.json" else path)
    try:
        result = run_folder(folder)
    except CellBusy as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 0
    except PtqbenchError as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 1 if folder.failure_path.exists() else 2
    except KeyboardInterrupt:
        return 130
    for name, metric in result["metrics"].items():
        print(f"{name} = {metric['value']:.4f}")
    return 0


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent process ends, so that a killed launcher leaves no workers behind."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent or parent == 1:
        sys.exit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
