"""Run folders -> tidy frame: one row per (cell, metric). No torch.

A cell without a usable result keeps one row with its state and the reason, so that a table shows a dash and says why. Two cells
may share a row of a table only if everything but seeds and evaluation is equal; ``variant`` is a digest of exactly that. ``names``
gives equal cells one name, and cells that differ different ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any, Protocol, cast

import pandas as pd

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import identity_texts, joined
from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS, RunSpec
from ptqbench.engine.timings import EVALUATION_TIMINGS
from ptqbench.errors import PtqbenchError, StorageError
from ptqbench.results.metrics import kind, known, measured
from ptqbench.results.tables.names import KEYS, settle
from ptqbench.results.tables.specs import SpecReader
from ptqbench.runs.folder import DAMAGED, DONE, UNREADABLE, RunFolder

SETTINGS = [
    "calibration", "basis_samples", "objective", "granularity", "true_sequential", "act_order", "scheme", "clip_search",
    "a_symmetric", "a_clip_ratio", "kv_measure",
]  # fmt: skip
NUMBERS = [
    "nominal_w_bits", "nominal_a_bits", "nominal_kv_bits", "effective_w_bits", "packed_bytes", "quantize_s", "spared_s",
    "value", "stderr",
]  # fmt: skip
DRAW = ["seed", "rotation_seed", "replicate"]
"""Columns that tell the draws of a row apart. A table averages over them."""
COLUMNS = [
    *KEYS, "w_bits", "a_bits", "k_bits", "v_bits", "group_size", "w_format", "a_format", "kv_format", *ROLES, *SETTINGS, *DRAW,
    "run_id", "variant", "evaluation",
    *NUMBERS[:-2], "metric", *NUMBERS[-2:], "protocol", "state", "reason",
]  # fmt: skip
NOISE = "noise"
"""Column of a frame in which any cell has a noise floor: KL divergence of the unquantized model from itself, in nats."""
DEVIATION = "deviation"
"""Column of a frame in which any cell departs from its method because of its model: in what."""
BESIDE_VARIANT = ("seed", "replicate", "evaluation")
ROTATION_SEED = re.compile(r'"rotation_seed":\d+,?')
"""The seed of random rotations in the canonical JSON of a method. A table averages over it as over the seed of the cell."""
"""Timings of a result that are not part of quantizing."""


@dataclasses.dataclass(frozen=True)
class Absent:
    """A cell without a run folder: it is excluded, skipped, or cannot be composed here.

    ``spec`` is what is known of the cell. Where its model is not at hand, that is everything but digests.
    """

    model: str
    method: str
    bitwidth: str
    seed: int | str
    state: str
    reason: str
    spec: RunSpec | None = None

    @classmethod
    def of(cls, spec: RunSpec, state: str, reason: str) -> Absent:
        """A cell of which everything but digests is known."""
        return cls(labels.model(spec), labels.method(spec), labels.bitwidth(spec), spec.seed, state, reason, spec)


class Measured(Protocol):
    """A cell whose result is not in a run folder; it answers the same questions as a ``RunFolder``."""

    @property
    def run_id(self) -> str: ...

    def result(self) -> dict[str, Any] | None: ...

    def state(self) -> str: ...

    def failure(self) -> dict[str, Any] | None: ...


Source = tuple[RunFolder, RunSpec | None] | tuple[Measured, RunSpec] | Absent


def tidy(cells: Iterable[Source]) -> pd.DataFrame:
    """Collect cells into one row per metric.

    Args:
        cells: Run folders, each with its cell if that is known (the folder of a planned cell may not exist), and absent cells.

    Returns:
        Columns ``COLUMNS``; ``metric`` and ``value`` are missing where the cell has no result, and ``reason`` says why.
        ``protocol`` says in words what a value was measured on. Where a cell was compared with its unquantized model, ``NOISE``
        is one more column, and where a cell departs from its method, ``DEVIATION``. Order of the input is kept.
    """
    # Plain dictionaries first; one frame at the end is faster than many.
    rows: list[dict[str, Any]] = []
    reader = SpecReader()
    for cell in cells:
        if isinstance(cell, Absent):
            given = {key: getattr(cell, key) for key in (*KEYS, "seed", "state", "reason")}
            rows.append(given | ({} if cell.spec is None else _key(cell.spec)))
            continue
        folder, spec = cell
        try:  # what the cell is; a folder that does not say keeps a row
            if spec is None:
                assert isinstance(folder, RunFolder), "only a run folder can be read for its cell"
                spec, texts = reader.read(folder)
            else:
                texts = identity_texts(spec)
        except PtqbenchError as error:
            rows.append(_nameless(folder, error))
            continue
        rows += _measurements(folder, spec, {**_key(spec), "run_id": folder.run_id, **_digests(texts)})
    settle(rows)
    return _framed(rows)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dictionaries."""
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def _framed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Lay out rows in ``COLUMNS``; a field that a row lacks is missing."""
    names = COLUMNS + [name for name in (NOISE, DEVIATION) if any(name in row for row in rows)]
    kinds = {name: float if name in (*NUMBERS, NOISE) else object for name in names}
    columns = {name: [row.get(name, math.nan) for row in rows] for name in names}
    return pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in kinds.items()})


def _nameless(folder: Measured, error: PtqbenchError) -> dict[str, Any]:
    """The row of a cell whose spec is lost; its result, if it can be read, repeats the names."""
    state = UNREADABLE if isinstance(error, StorageError) else DAMAGED
    result: dict[str, Any] = {}
    with contextlib.suppress(StorageError):
        result = folder.result() or {}
    names = {key: result[key] for key in (*KEYS, "seed") if isinstance(result.get(key), str | int)}
    return {**names, "run_id": folder.run_id, "state": state, "reason": str(error)}


def _digests(texts: dict[str, str]) -> dict[str, str]:
    """Digests that tell cells apart: ``variant`` of everything but seeds and evaluation, ``evaluation`` of the evaluation."""
    # Two cells with the same digest may stand in one row, as seeds of it.
    variant = {name: text for name, text in texts.items() if name not in BESIDE_VARIANT}
    variant["method"] = ROTATION_SEED.sub("", variant["method"])
    return {"variant": _digest(joined(variant)), "evaluation": _digest(texts["evaluation"])}


def _key(spec: RunSpec) -> dict[str, Any]:
    """The columns that every row of a cell has, with its ``spec``, which ``names`` needs."""
    bits = spec.bitwidth
    fields = ("w_bits", "a_bits", "k_bits", "v_bits", "group_size", "w_format", "a_format", "kv_format")
    widths = {name: getattr(bits, name) for name in fields}
    rotation_seed = spec.method.transform.options.get("rotation_seed")
    seeds = {"seed": spec.seed, "rotation_seed": rotation_seed, "replicate": spec.replicate or None}
    return {
        "spec": spec,
        **widths,
        **{role: getattr(spec.method, role).name for role in ROLES},
        **seeds,
        **_settings(spec),
        "nominal_w_bits": nominal(spec, bits.w_bits),
        "nominal_a_bits": nominal(spec, bits.a_bits),
        "nominal_kv_bits": (nominal(spec, bits.k_bits) + nominal(spec, bits.v_bits)) / 2,
    }


def _settings(spec: RunSpec) -> dict[str, Any]:
    """Settings beside roles and bits that must agree before a cell is compared with a paper's figure."""
    text, subspace, method = spec.calibration, spec.method.transform.options, spec.method
    rounded = spec.bitwidth.a_bits < UNTOUCHED_BITS
    return {
        "calibration": None if text is None else f"{text.dataset} {text.n_samples} x {text.seq_len}",
        "basis_samples": subspace.get("n_samples"),
        "objective": subspace.get("objective"),
        "granularity": subspace.get("granularity"),
        "true_sequential": method.true_sequential,
        "act_order": method.solver.options.get("act_order"),
        "scheme": method.grid.scheme,
        "clip_search": method.grid.clip_search,
        "a_symmetric": method.activation.symmetric if rounded else None,
        "a_clip_ratio": method.activation.clip_ratio if rounded else None,
        "kv_measure": spec.bitwidth.kv_measure,
    }


def nominal(spec: RunSpec, low: float) -> float:
    """Mean nominal bits where the bitwidth says ``low``: the share of channels that a subspace keeps at high bits counts.

    >>> 4 * (1 - 0.125) + 8 * 0.125
    4.5
    """
    options = spec.method.transform.options
    if low >= UNTOUCHED_BITS or "high_fraction" not in options or options.get("iso_bits"):
        return float(low)
    share = float(options["high_fraction"])
    return low * (1 - share) + float(options["high_bits"]) * share


def _measurements(folder: Measured, spec: RunSpec, key: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per metric of a cell; one row with the reason where there is none."""
    try:
        result = folder.result()
        if result is None:
            state = folder.state()
            message = str((folder.failure() or {}).get("message") or "") if state != DONE else ""
            return [{**key, "state": state, "reason": " ".join(message.split())}]
    except StorageError as error:
        return [{**key, "state": UNREADABLE, "reason": str(error)}]
    # A result that lacks a field is damaged, whatever kind of error that gives.
    try:
        shared, metrics = _shared(result), list(_with_harness(result["metrics"]).items())
        rows = [{**key, **shared, **_measurement(spec, name, metric)} for name, metric in metrics]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return [{**key, "state": DAMAGED, "reason": f"result.json lacks something: {error!r}"}]
    return rows or [{**key, **shared, "reason": "the cell measures nothing"}]


def _shared(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a result that all its metrics share."""
    deviations = "; ".join(result.get("deviations", []))
    return {
        **({DEVIATION: deviations} if deviations else {}),
        "effective_w_bits": float(result["bits"]["effective_w_bits"]),
        "packed_bytes": int(result["bits"]["packed_bytes"]),
        "quantize_s": quantize_seconds(result),
        "spared_s": spared_seconds(result),
        "state": DONE,
    }


def quantize_seconds(result: dict[str, Any]) -> float:
    """Full cost of quantizing: a cell's own work and what it took to make the artefacts that it found, without waiting."""
    own = sum(seconds for name, seconds in result.get("timings", {}).items() if name not in EVALUATION_TIMINGS)
    return float(own + (spared_seconds(result) or 0.0) - result.get("shared", {}).get("waited_s", 0.0))


def spared_seconds(result: dict[str, Any]) -> float | None:
    """Seconds that other cells spent on artefacts that this one found; None in an old result, which does not record them."""
    spared = result.get("shared", {}).get("spared_s")
    return None if spared is None else float(spared)


def _with_harness(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metrics of a result; changed answers with what the result says of the harness at the accuracy of the same task."""
    harness = {name.rpartition("/")[0]: metric for name, metric in metrics.items() if "lm_eval" in metric}
    return {
        name: harness.get(name.rpartition("/")[0], {}) | metric if kind(name) == "flips" else metric
        for name, metric in metrics.items()
    }


def _measurement(spec: RunSpec, name: str, metric: dict[str, Any]) -> dict[str, Any]:
    value, stderr, noise = measured(metric), metric.get("stderr"), metric.get("noise")
    if math.isnan(value):
        raise ValueError(f"{name} is {value}")
    return {
        "metric": name,
        "value": value,
        "stderr": None if stderr is None else float(stderr),
        **({} if noise is None else {NOISE: float(noise)}),
        "protocol": protocol(spec, name, metric),
    }


def protocol(spec: RunSpec, name: str, metric: dict[str, Any]) -> str:
    """Say what a metric was measured on. Two values with different words are never averaged or ranked together."""
    label, about = name.rpartition("/")[0], known(name)
    text = spec.evaluation.texts.get(label)
    against = ", against the unquantized model" if about.relative else ""
    if text is not None and about.of_text:  # text, portion, windows, precision of the loss, content
        portion = "" if tuple(text.portion) == (0.0, 1.0) else f" portion {text.portion[0]:g}-{text.portion[1]:g}"
        digest = (text.digest or "").removeprefix("sha256:")[:12]
        named = f" ({text.protocol})" if text.protocol not in (None, text.dataset) else ""
        loss = (
            "" if about.relative else f", {spec.evaluation.ppl_dtype} loss"
        )  # divergences are those of unrounded logits
        windows = f"windows of {text.seq_len}{loss}"
        top = f" by its {metric['top']} likeliest tokens and the rest" if "top" in metric else ""
        return f"{text.dataset} {text.split or ''}{named}{portion}, {windows}, {digest}{against}{top}"
    # A task: library and version, and what its harness was told.
    n = {"shots": metric.get("n_shot", 0), "examples": metric.get("n_examples"), "batch": metric.get("batch_size")}
    facts = ", ".join(f"{count} {word}" for word, count in n.items() if count is not None)
    return f"lm-eval {metric.get('lm_eval', '')} {label} version {metric.get('task_version')}, {facts}{against}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
