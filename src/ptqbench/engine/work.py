"""A cell being worked on: open the checkpoint, prepare the basis, quantize, evaluate, and put the result together."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import FORMAT, identity_fields
from ptqbench.cell.formats import INTEGER
from ptqbench.cell.registry import create
from ptqbench.cell.spec import CalibrationSpec, RunSpec
from ptqbench.errors import ConfigError
from ptqbench.runs.artefacts import FOLDER, Artefacts
from ptqbench.runs.folder import RunFolder, read_json, replacing, write_json

if TYPE_CHECKING:
    import torch

    from ptqbench.engine.bases import Shelf
    from ptqbench.engine.blocks_on_disk import BlockState
    from ptqbench.engine.timings import Timings
    from ptqbench.evaluate.cell import Ready
    from ptqbench.methods.precision import Precision
    from ptqbench.methods.transform import Transform
    from ptqbench.models.blockwise import BlockwiseModel
    from ptqbench.runs.attempt import Observer


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
    return BlockwiseModel(source, dtype, device_of(spec), with_outliers if channels else None, replicate=spec.replicate)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration text of a cell, and what cells share about it."""

    spec: RunSpec
    model: BlockwiseModel
    tokenizer: Any

    def windows(self, n_samples: int | None = None) -> torch.Tensor:
        """Draw windows, (n_samples, seq_len) int64, or find those that another cell drew; by default those of the cell."""
        from ptqbench.data.windows import calibration_windows

        text, rows, seed = self._text(n_samples), self.model.architecture.vocab_size, self.spec.seed
        key = {"model": self.spec.model.digest, "calibration": identity_fields(text), "seed": seed, "rows": rows}
        make = lambda: {"windows": calibration_windows(text, self.tokenizer, rows, seed)}  # noqa: E731
        return self.artefacts.get("calibration", key, make)["windows"]

    def shelf(self, n_samples: int) -> Shelf:
        """Where moments over ``n_samples`` windows are left for other cells."""
        from ptqbench.engine.bases import Shelf

        key = {
            "model": identity_fields(self.spec.model),
            "calibration": identity_fields(self._text(n_samples)),
            "seed": self.spec.seed,
            "device": self.model.device.type,
            **({"replicate": self.spec.replicate} if self.spec.replicate else {}),
        }
        return Shelf(self.artefacts, key)

    def _text(self, n_samples: int | None) -> CalibrationSpec:
        assert self.spec.calibration is not None, "a cell that quantizes has a calibration"
        return dataclasses.replace(self.spec.calibration, n_samples=n_samples or self.spec.calibration.n_samples)

    @functools.cached_property
    def artefacts(self) -> Artefacts:
        """What cells of the runs folder share; one object per cell, which counts what the cell did not have to compute."""
        execution = self.spec.execution
        return Artefacts(Path(execution.runs_dir) / FOLDER, int(execution.artefacts_gib * 2**30))


@dataclasses.dataclass(frozen=True)
class Work:
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
    calibration: Calibration
    transform: Transform
    precision: Precision
    timings: Timings
    state: BlockState
    ready: Ready

    @classmethod
    def begin(cls, spec: RunSpec, folder: RunFolder, observer: Observer) -> Work:
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
            calibration=Calibration(spec, model, tokenizer),
            transform=transform,
            precision=transform.precision(spec, model.architecture),
            timings=Timings(),
            state=BlockState(folder.state_path, folder.run_id),
            ready=load(spec.evaluation, folder, tokenizer, model.architecture.vocab_size),
        )

    def transformed(self) -> Work:
        """Open the model in the basis of the cell's transform, once what that needs is computed, learned or read."""
        from ptqbench.engine.bases import recorded_facts
        from ptqbench.engine.rotations import Preparation

        preparation = Preparation(
            self.model, self.spec, self.folder.state_path, self.folder.run_id, self.observer, self.calibration
        )
        with self.timings.measure("bases_s"):
            bases = preparation.of(self.transform)
        # Keep what is worth knowing about eigenbases, then open the model in their basis.
        said = {} if bases is None else recorded_facts(bases)
        if said:
            write_json(self.folder.bases_path, said)
        basis = self.transform.basis(self.spec, self.model.architecture, bases)
        precision = self.transform.precision(self.spec, self.model.architecture, bases)
        return dataclasses.replace(self, model=self.model.reopened(basis), precision=precision)

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
            plain_moments=asked.activation.moment_input == "plain",
        )
        with self.timings.measure("windows_s"):
            windows = self.calibration.windows()
        self.observer.stage("quantize", self.model.n_blocks)
        quantize(self.model, method, windows, self.state, self.timings, lambda index: self.observer.advance())

    def evaluate(self) -> dict[str, Any]:
        """Measure the model with the stored weights; returns the metrics by column name."""
        from ptqbench.evaluate.cell import CellEvaluation
        from ptqbench.evaluate.unquantized import Unquantized

        overlay = self.state.overlay if self.spec.quantizes else None
        key = {"model": identity_fields(self.spec.model), "device": self.model.device.type}
        model = self.model.measured()
        unquantized = Unquantized(model, key, self.calibration.artefacts)
        measured = (model, overlay, self.tokenizer, self.observer, self.timings.measure, self.ready, unquantized)
        with self.calibration.artefacts.beside():
            return CellEvaluation(self.spec.evaluation, self.folder, *measured).run()

    def bits(self) -> dict[str, Any]:
        """Account for the bits that are really stored, and write ``layers.parquet``."""
        shape = self.model.architecture
        bits: dict[str, Any] = dataclasses.asdict(self.precision.storage_bits())
        bits["packed_bytes"] = round(bits["effective_w_bits"] * shape.linear_params / 8)
        bits["kv_bytes_per_token"] = shape.n_blocks * shape.kv_dim * (bits["k_bits"] + bits["v_bits"]) / 8
        if self.precision.kv_bits is not None:
            bits["kv_bits_of_blocks"] = [list(block) for block in self.precision.kv_bits]
        if not self.spec.quantizes:
            return bits
        rows = self._record_layers()
        extra = self._unplanned_bits(rows)
        if extra:
            bits["effective_w_bits"] += extra
            bits["packed_bytes"] = round(bits["effective_w_bits"] * shape.linear_params / 8)
        return bits | {"codes_digest": self.state.codes_digest(self.model.n_blocks)}

    def _unplanned_bits(self, rows: list[dict[str, Any]]) -> float:
        """Bits per weight that linears store beyond their grids: row scales that no scale of a format could take up."""
        from ptqbench.numerics.bits import mean_bits
        from ptqbench.numerics.grid import effective_bits

        sizes = [row["out_features"] * row["in_features"] for row in rows]
        planned = [effective_bits(self.precision.weight_grid(row["linear"]), row["out_features"]) for row in rows]
        beyond = [row["effective_w_bits"] - bits for row, bits in zip(rows, planned, strict=True)]
        return mean_bits(zip(sizes, beyond, strict=True)) if any(beyond) else 0.0

    def _record_layers(self) -> list[dict[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        from ptqbench.engine.bases import left_at_identity

        # What is missing about a linear, and which bases were left at the identity, in one remark.
        said = read_json(self.folder.bases_path) or {}
        rows = self.state.layer_records(self.model.n_blocks)
        for row in rows:
            remarks = [row["degenerate"], left_at_identity(said, row["block"]).get(row["linear"])]
            row["degenerate"] = "; ".join(remark for remark in remarks if remark) or None
        schema = pyarrow.Table.from_pylist(rows).schema
        column = schema.get_field_index("degenerate")  # text, also where no linear has a remark
        schema = schema.set(column, pyarrow.field("degenerate", pyarrow.string())) if rows else schema
        with replacing(self.folder.layers_path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)
        return rows

    def _context_remarks(self) -> list[str]:
        """Say so where calibration windows are longer than the context that the model was made for."""
        context, calibration = getattr(self.model.config, "max_position_embeddings", None), self.spec.calibration
        if not isinstance(context, int) or calibration is None or calibration.seq_len <= context:
            return []
        return [
            f"calibration.seq_len={calibration.seq_len} is longer than the context of the model (max_position_embeddings={context})"
        ]

    def result(self, metrics: dict[str, Any], bits: dict[str, Any]) -> dict[str, Any]:
        """Put together what ``result.json`` holds."""
        import torch

        from ptqbench.engine.cost import work
        from ptqbench.evaluate.cell import averages
        from ptqbench.numerics.fused_columns import engine_on
        from ptqbench.runs import provenance

        # Operations counted beside the seconds that they took: estimates of later cells rest on both.
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
            "replicate": spec.replicate,
            "metrics": metrics,
            "averages": averages(spec.evaluation.tasks, metrics),
            "bits": bits,
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.seconds.items()},
            "flop": done.flop,
            "n_tokens": done.n_tokens,
            "column_loop": engine_on(self.model.device) if spec.bitwidth.w_format == INTEGER else "plain",
            "threads": torch.get_num_threads(),
            "peak_host_gib": round(provenance.peak_host_gib(), 4),
            "peak_gpu_gib": provenance.peak_gpu_gib(),
            "attempts": len(self.folder.attempts),
            "remarks": [*self.model.source.remarks, *self._context_remarks()],
            "deviations": [*self.transform.deviations(self.model.architecture), *self.precision.unused()],
            "tokenizer": type(self.tokenizer).__name__,
            "shared": self.calibration.artefacts.account(),
        }
