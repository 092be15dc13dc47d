"""What a cell looks like in Weights & Biases: config, one history row per decoder block, layer table, summary, artifact.

Used in the helper process only. Everything comes from the run folder, so a cell looks the same whether it is projected while it
runs or a year later. The step of a history row is the index of its block, so that no block is logged twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import FORMAT, canonical_json, identity_fields
from ptqbench.cell.spec import RunSpec
from ptqbench.errors import ConfigError
from ptqbench.runs.folder import RunFolder

ARTIFACT_TIMEOUT_S = 60
TAG_LENGTH = 64
"""Longest tag that W&B accepts."""
PROBE_BYTES = 1 << 16
"""Size of a file that is written to see whether the disk is full."""
SERIES = (
    "relative_weight_error", "relative_output_error", "relative_target_error", "correction_norm", "damping_used",
    "damping_retries", "null_space_rank", "quantize_s",
)  # fmt: skip
FAILED, INTERRUPTED = 1, 255
"""Exit codes for which W&B shows a run as failed, and as killed."""


def config_of(spec: RunSpec) -> dict[str, Any]:
    """Describe a cell as W&B config: the identity fields and the names.

    ``spec`` repeats them as one JSON text, because W&B turns 1.0 into 1, which would give another run id.
    """
    fields = identity_fields(spec)
    for section in ("model", "method", "bitwidth", "evaluation"):
        fields[section]["name"] = getattr(spec, section).name
    for section in ("model", "calibration"):
        if f"{section}.path" in spec.changed:
            fields[section]["path"] = Path(
                getattr(spec, section).path
            ).name  # its name is part of the label, its place is not
    fields["changed"] = list(spec.changed)
    return {**fields, "format": FORMAT, "spec": canonical_json(fields)}


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """Describe a result as W&B summary: its figures under the names of table columns, and the whole result as one JSON text."""
    figures: dict[str, Any] = {}
    for name, metric in (result["metrics"] | result.get("averages", {})).items():
        figures[name] = metric["value"]
        if metric.get("stderr") is not None:
            figures[f"{name}_stderr"] = metric["stderr"]
    shared = result.get("shared", {})
    figures |= result["bits"] | result.get("timings", {})
    figures |= {key: shared[key] for key in ("spared_s", "waited_s") if key in shared}
    figures |= {key: result[key] for key in ("peak_host_gib", "peak_gpu_gib") if result.get(key) is not None}
    return {**figures, "result": canonical_json(result)}


def row_of(index: int, reports: list[dict[str, Any]]) -> dict[str, float]:
    """Lay out the reports of a block's linears as one history row: ``relative_output_error/q_proj``, ..., and means."""
    row: dict[str, float] = {"block": index}
    for name in SERIES:
        found = {report["linear"].rpartition(".")[2]: report.get(name) for report in reports}
        values = {linear: value for linear, value in found.items() if value is not None}
        row |= {f"{name}/{linear}": value for linear, value in values.items()}
        if values:
            row[f"{name}/mean"] = sum(values.values()) / len(values)
    return row


@dataclasses.dataclass
class Projection:
    """A cell's run in W&B, open for writing.

    Attributes:
        spec: The cell; its ``tracking`` says where to.
        folder: Its run folder. Nothing is written there but W&B's own files.
    """

    spec: RunSpec
    folder: RunFolder

    def open(self, timeout_s: float) -> None:
        """Begin the run in W&B, or continue it.

        Args:
            timeout_s: Seconds within which W&B must answer.

        Raises:
            ConfigError: The folder for W&B's files cannot be written.
            Exception: Whatever wandb raises.
        """
        # Its files go where the cell says or nowhere: wandb would take the system's temporary folder instead.
        target = files_of(self.spec, self.folder)
        refused = "cannot write W&B's files to {}: {}; say tracking.folder=DIR"
        try:
            (target / "wandb").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(refused.format(target, error.strerror)) from None
        if not os.access(target / "wandb", os.W_OK):
            raise ConfigError(refused.format(target, "not writable"))
        for name, default in {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}.items():
            os.environ.setdefault(name, str((target / "wandb" / default).absolute()))  # not into a home folder's quota
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        tracking = self.spec.tracking
        tags = dict.fromkeys((labels.model(self.spec), labels.bitwidth(self.spec), *tracking.tags))
        self._run = wandb.init(
            project=tracking.project, entity=tracking.entity, group=tracking.group, job_type=labels.method(self.spec),
            id=self.folder.run_id, name=labels.slug(self.spec), resume="allow", tags=[tag[:TAG_LENGTH] for tag in tags],
            config=config_of(self.spec), allow_val_change=True, dir=str(target),
            mode="offline" if tracking.mode == "offline" else "online",
            settings=wandb.Settings(
                init_timeout=timeout_s, login_timeout=timeout_s, silent=True, console="off", disable_git=True,
                disable_code=True, x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
            ),
        )  # fmt: skip
        # Every series is drawn over blocks; the summary holds the result alone.
        self._run.define_metric("block", summary="none")
        self._run.define_metric("*", step_metric="block", summary="none")
        self._next, self._stage = int(self._run.starting_step), ""

    @property
    def place(self) -> dict[str, Any]:
        """Where the run is in W&B: the ``project``, ``entity`` and ``url`` that ``synced.json`` records."""
        run, online = self._run, self.spec.tracking.mode == "online"
        entity = run.entity if online else self.spec.tracking.entity
        return {"project": run.project, "entity": entity, "url": run.url if online else None}

    def update(self) -> None:
        """Log the blocks that were finished since the last call, and the stage that the cell is at."""
        while (reports := self._reports(self._next)) is not None:
            self._run.log(row_of(self._next, reports), step=self._next)
            self._next += 1
        stage = str((self.folder.heartbeat() or {}).get("stage", ""))
        if stage != self._stage:
            self._run.summary["stage"] = self._stage = stage

    def close(self) -> None:
        """Log how the cell ended and wait until W&B has it.

        Raises:
            OSError: The disk is full.
            Exception: Whatever wandb raises; W&B did not accept the artifact with the result.
        """
        import wandb

        result = self.folder.result()
        self.update()
        if result is None:
            failure = self.folder.failure()
            self._run.summary["failure"] = None if failure is None else str(failure.get("message"))
            self._run.finish(exit_code=INTERRUPTED if failure is None else FAILED)
            return
        # The layer table, the summary, and the files of the result as an artifact.
        columns, rows = self._layers()
        if rows:
            self._run.log({"layers": wandb.Table(columns=columns, data=rows)}, step=max(self._next, self._run.step))
        self._run.summary.update(summary_of(result) | {"failure": None})
        artifact = wandb.Artifact(f"cell-{self.folder.run_id}", type="result")
        for path in (self.folder.result_path, self.folder.spec_path, self.folder.layers_path):
            if path.exists():
                artifact.add_file(str(path))
        logged = self._run.log_artifact(artifact)
        if self.spec.tracking.mode == "online":
            logged.wait(
                timeout=ARTIFACT_TIMEOUT_S
            )  # until the server has it: wandb does not raise when it loses a summary
        self._run.finish(exit_code=0)
        if self.spec.tracking.mode == "offline":
            self._check_space()

    def _check_space(self) -> None:
        """Raise OSError if the disk is full; wandb cuts its own file short without saying so."""
        probe = files_of(self.spec, self.folder) / "wandb" / ".probe"
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(PROBE_BYTES))
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _reports(self, index: int) -> list[dict[str, Any]] | None:
        """Reports of a finished block: from its file or, if that was deleted, from the layer table; None if it is not finished."""
        from safetensors import SafetensorError, safe_open

        path = self.folder.block_path(index)
        try:
            with safe_open(path, framework="np") as stored:
                found: list[dict[str, Any]] = json.loads((stored.metadata() or {})["reports"])
                return found
        except (OSError, SafetensorError):
            columns, rows = self._layers()
            reports = [dict(zip(columns, row, strict=True)) for row in rows]
            return [report for report in reports if report["block"] == index] or None

    def _layers(self) -> tuple[list[Any], list[Any]]:
        """Columns and rows of ``layers.parquet``; both empty where there is no such file."""
        if not self.folder.layers_path.exists():
            return [], []
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.folder.layers_path)
        return table.column_names, [list(row.values()) for row in table.to_pylist()]


def files_of(spec: RunSpec, folder: RunFolder) -> Path:
    """The folder for W&B's own files of a cell: one per cell, so that cells at work at the same time do not share it."""
    return folder.path if spec.tracking.folder is None else Path(spec.tracking.folder) / folder.path.name
