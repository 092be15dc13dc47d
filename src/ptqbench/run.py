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

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import FORMAT, identity_fields
from ptqbench.cell.registry import create
from ptqbench.cell.spec import UNTOUCHED_BITS, CalibrationSpec, RunSpec
from ptqbench.errors import CellBusy, ConfigError, PtqbenchError, RunFailed, StorageError
from ptqbench.runs.artefacts import FOLDER, Artefacts
from ptqbench.runs.attempt import Observer, Silent, attempt, record_failure
from ptqbench.runs.folder import RunFolder, read_json, replacing, write_json
from ptqbench.runs.lease import Lease, lease
from ptqbench.runs.outcome import outcome
from ptqbench.sweeps.pins import check_unchanged
from ptqbench.tracking.guard import followed

if TYPE_CHECKING:
    import torch

    from ptqbench.engine.bases import Shelf
    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.timings import Timings
    from ptqbench.evaluate.cell import Ready
    from ptqbench.methods.precision import Precision
    from ptqbench.methods.transform import Transform
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
        StorageError: The run folder cannot be read or written.
    """
    done = folder.result()
    if done is not None:
        return done
    with lease(folder) as held:
        done = folder.result()  # perhaps finished by the previous holder between the first look and the lease
        return done if done is not None else _attempt(spec, folder, shown or Silent(), held)


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
        return run_cell(folder.read_spec(), folder)
    except (CellBusy, RunFailed):  # nothing is wrong; recorded by the attempt
        raise
    except PtqbenchError as error:
        with contextlib.suppress(OSError):
            if folder.spec_path.exists():  # else there is no cell whose failure could be recorded
                record_failure(folder, error)
        raise


def _attempt(spec: RunSpec, folder: RunFolder, shown: Observer, held: Lease) -> dict[str, Any]:
    with followed(spec, folder), attempt(folder, shown, held) as current:
        check_unchanged(spec)
        result = _work(spec, folder, current)
        with held.confirmed():
            write_json(folder.result_path, result)
        _drop_codes(spec, folder, result["bits"]["packed_bytes"])
    return result


def _work(spec: RunSpec, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    observer.stage("load", 1)
    _configure(spec)
    cell = _Work.begin(spec, folder, observer)
    if spec.calibrates:
        cell = cell.transformed()
    if spec.quantizes:
        cell.quantize()
    metrics = cell.evaluate()
    result = cell.result(metrics, cell.bits())
    _check_still(spec, folder, cell.calibration.artefacts)
    return result


def _check_still(spec: RunSpec, folder: RunFolder, artefacts: Artefacts) -> None:
    """Throw the work away if what it was done on has changed meanwhile; it stays where that cannot be read now."""
    try:
        check_unchanged(spec)
    except StorageError:
        raise
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


def device_of(spec: RunSpec) -> torch.device:
    """The device on which a cell runs on this machine.

    Raises:
        ConfigError: It is to run on a GPU, and there is none.
    """
    import torch

    device, found = spec.execution.device, torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ConfigError(
            "execution.device=cuda: expected a GPU on this machine, torch finds none; say execution.device=cpu, or run the cell "
            "where there is one"
        )
    return torch.device(device if device != "auto" else "cuda" if found else "cpu")


def _open(spec: RunSpec, source: Any) -> BlockwiseModel:
    import torch

    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.models.outliers import outlier_channels, rescale_block

    width = int(source.config["hidden_size"])
    channels = outlier_channels(width, spec.model.outlier_channels)

    def with_outliers(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        return rescale_block(tensors, width, channels, spec.model.outlier_factor)

    dtype: torch.dtype = getattr(torch, spec.model.dtype)
    return BlockwiseModel(source, dtype, device_of(spec), with_outliers if channels else None)


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


@dataclasses.dataclass(frozen=True)
class _Work:
    """A cell being worked on.

    Attributes:
        spec: The cell.
        folder: Its run folder.
        observer: Shown the progress.
        model: The checkpoint; `transformed` opens it in the basis of the cell.
        tokenizer: Its tokenizer.
        calibration: The calibration text, and what cells share about it.
        transform: The member that says in which basis the model is quantized.
        precision: The grids.
        timings: Where the time goes.
        state: The finished blocks.
        ready: Texts and tasks of the evaluation, loaded before the first block.
    """

    spec: RunSpec
    folder: RunFolder
    observer: Observer
    model: BlockwiseModel
    tokenizer: Any
    calibration: _Calibration
    transform: Transform
    precision: Precision
    timings: Timings
    state: BlockState
    ready: Ready

    @classmethod
    def begin(cls, spec: RunSpec, folder: RunFolder, observer: Observer) -> _Work:
        """Open the checkpoint and its tokenizer, and load what is to be measured."""
        from ptqbench.data.tokenizer import load_tokenizer
        from ptqbench.engine.blocks_on_disk import BlockState
        from ptqbench.engine.timings import Timings
        from ptqbench.evaluate.cell import load
        from ptqbench.models.source import locate

        source = locate(spec.model)
        tokenizer = load_tokenizer(source.folder)
        model = _open(spec, source)
        transform: Transform = create("transform", spec.method.transform)
        return cls(
            spec=spec,
            folder=folder,
            observer=observer,
            model=model,
            tokenizer=tokenizer,
            calibration=_Calibration(spec, model, tokenizer),
            transform=transform,
            precision=transform.precision(spec, model.architecture),
            timings=Timings(),
            state=BlockState(folder.state_path, folder.run_id),
            ready=load(spec.evaluation, folder, tokenizer, model.architecture.vocab_size),
        )

    def transformed(self) -> _Work:
        """Open the model in the basis of the cell's transform, once what that needs is computed, learned or read."""
        from ptqbench.engine.bases import recorded_facts
        from ptqbench.engine.rotations import Preparation

        preparation = Preparation(
            self.model, self.spec, self.folder.state_path, self.folder.run_id, self.observer, self.calibration
        )
        with self.timings.measure("bases_s"):
            bases = preparation.of(self.transform)
        said = {} if bases is None else recorded_facts(bases)
        if said:
            write_json(self.folder.bases_path, said)
        basis = self.transform.basis(self.spec, self.model.architecture, bases)
        return dataclasses.replace(self, model=self.model.reopened(basis))

    def quantize(self) -> None:
        """Round every linear, block by block; finished blocks go to ``state``."""
        from ptqbench.engine.pipeline import Method, quantize

        asked = self.spec.method
        method = Method(
            target=create("target", asked.target),
            solver=create("solver", asked.solver),
            refine=create("refine", asked.refine),
            grid=lambda stage, in_features: self.precision.weight_grid(stage),
            true_sequential=asked.true_sequential,
            during_calibration=asked.activation.during_calibration,
        )
        with self.timings.measure("windows_s"):
            windows = self.calibration.windows()
        self.observer.stage("quantize", self.model.n_blocks)
        quantize(self.model, method, windows, self.state, self.timings, lambda index: self.observer.advance())

    def evaluate(self) -> dict[str, Any]:
        """Measure the model with the stored weights; returns the metrics by column name."""
        from ptqbench.evaluate.cell import CellEvaluation

        overlay = self.state.overlay if self.spec.bitwidth.w_bits < UNTOUCHED_BITS else None
        measured = (self.model, overlay, self.tokenizer, self.observer, self.timings.measure, self.ready)
        return CellEvaluation(self.spec.evaluation, self.folder, *measured).run()

    def bits(self) -> dict[str, Any]:
        """Account for the bits that are really stored, and write ``layers.parquet``."""
        shape = self.model.architecture
        bits: dict[str, Any] = dataclasses.asdict(self.precision.storage_bits())
        bits["packed_bytes"] = round(bits["effective_w_bits"] * shape.linear_params / 8)
        bits["kv_bytes_per_token"] = shape.n_blocks * shape.kv_dim * (bits["k_bits"] + bits["v_bits"]) / 8
        if not self.spec.quantizes:
            return bits
        self._record_layers()
        return bits | {"codes_digest": self.state.codes_digest(self.model.n_blocks)}

    def _record_layers(self) -> None:
        import pyarrow
        import pyarrow.parquet

        from ptqbench.engine.bases import left_at_identity

        said = read_json(self.folder.bases_path) or {}
        rows = self.state.reports(self.model.n_blocks)
        for row in rows:
            remarks = [row["degenerate"], left_at_identity(said, row["block"]).get(row["linear"])]
            row["degenerate"] = "; ".join(remark for remark in remarks if remark) or None
        schema = pyarrow.Table.from_pylist(rows).schema
        column = schema.get_field_index("degenerate")  # text, also where no linear has a remark
        schema = schema.set(column, pyarrow.field("degenerate", pyarrow.string())) if rows else schema
        with replacing(self.folder.layers_path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)

    def result(self, metrics: dict[str, Any], bits: dict[str, Any]) -> dict[str, Any]:
        """Put together what ``result.json`` holds."""
        from ptqbench.engine.cost import work
        from ptqbench.evaluate.cell import averages
        from ptqbench.numerics.fused_columns import engine_on
        from ptqbench.runs import provenance

        spec = self.spec
        tokens = {label: metrics[f"{label}/perplexity"]["n_tokens"] for label in spec.evaluation.texts}
        done = work(spec, self.model.architecture, tokens)
        return {
            "format": FORMAT,
            "run_id": self.folder.run_id,
            "model": labels.model(spec),
            "method": labels.method(spec),
            "bitwidth": labels.bitwidth(spec),
            "seed": spec.seed,
            "metrics": metrics,
            "averages": averages(spec.evaluation.tasks, metrics),
            "bits": bits,
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.seconds.items()},
            "flop": done.flop,
            "n_tokens": done.n_tokens,
            "column_loop": engine_on(self.model.device),
            "peak_host_gib": round(provenance.peak_host_gib(), 4),
            "peak_gpu_gib": provenance.peak_gpu_gib(),
            "attempts": len(self.folder.attempts),
            "remarks": self.model.source.remarks,
            "tokenizer": type(self.tokenizer).__name__,
            "shared": self.calibration.artefacts.account(),
        }


def _drop_codes(spec: RunSpec, folder: RunFolder, packed_bytes: int) -> None:
    """Remove finished blocks unless they are to be kept; after the result is written, so that a kill costs no work."""
    keep = spec.execution.keep_codes
    if keep is False or (keep is None and packed_bytes > KEEP_CODES_BELOW_BYTES):
        shutil.rmtree(folder.state_path, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run the cell of a run folder or of its ``spec.json``.

    Args:
        arguments: The path, and ``--with-parent`` where the process is to end with its parent.

    Returns:
        Exit status 0 when the cell is done (or somebody else works on it), 1 when it failed, 2 on misuse, 130 when it was
        interrupted.
    """
    from ptqbench.results.tables.metrics import format_value, measured

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
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("PTQBENCH_TRACEBACK"):
            raise
        said, status = outcome(error)
        print(f"ptqbench: {said}", file=sys.stderr)
        return 1 if os.path.exists(folder.failure_path) else status
    for name, metric in result["metrics"].items():
        print(f"{name} = {format_value(name, measured(metric))}")
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
