"""Run folders -> tidy DataFrame -> comparison table. Pure functions on pandas; no torch.

Tidy: one row per (cell, metric). A cell without a usable result keeps a row with the reason, so that a table shows a dash
and says why instead of having a hole.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ptqbench.errors import PtqbenchError
from ptqbench.spec import RunSpec
from ptqbench.store import DONE, RunFolder

KEYS = ["model", "method", "bitwidth", "w_bits", "a_bits", "k_bits", "v_bits", "group_size", "seed", "run_id"]
HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "perplexity": False}
MISSING = "-"


def tidy(cells: Iterable[tuple[RunFolder, RunSpec | None]]) -> pd.DataFrame:
    """Collect cells into one row per metric.

    Args:
        cells: Run folders, each with its cell if it is known (a cell of a sweep may have no folder yet).

    Returns:
        Columns ``KEYS``, ``effective_w_bits``, ``packed_bytes``, ``quantize_s``, ``metric``, ``value``, ``stderr``, ``state``
        and ``reason``; ``metric`` and ``value`` are missing where the cell has no result. Order of the input is kept.
    """
    rows: list[dict[str, object]] = []
    for folder, known in cells:
        try:
            spec = known or folder.read_spec()
        except PtqbenchError as error:
            rows.append({"run_id": folder.run_id, "state": "damaged", "reason": str(error)})
            continue
        rows += _cell_rows(folder, spec)
    columns = [*KEYS, "effective_w_bits", "packed_bytes", "quantize_s", "metric", "value", "stderr", "state", "reason"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _cell_rows(folder: RunFolder, spec: RunSpec) -> list[dict[str, object]]:
    bits = spec.bitwidth
    key: dict[str, object] = {
        "model": spec.model.name,
        "method": spec.method.name,
        "bitwidth": bits.name,
        "w_bits": bits.w_bits,
        "a_bits": bits.a_bits,
        "k_bits": bits.k_bits,
        "v_bits": bits.v_bits,
        "group_size": bits.group_size,
        "seed": spec.seed,
        "run_id": folder.run_id,
    }
    state, result = folder.state(), folder.result()
    if state != DONE or result is None:
        failure = folder.failure() or {}
        return [key | {"state": state, "reason": failure.get("message") or state}]
    timings = result.get("timings", {})
    key |= {
        "effective_w_bits": result["bits"]["effective_w_bits"],
        "packed_bytes": result["bits"]["packed_bytes"],
        "quantize_s": sum(seconds for name, seconds in timings.items() if name not in ("perplexity_s", "zero_shot_s")),
        "state": state,
    }
    metrics = result["metrics"].items()
    return [key | {"metric": name, "value": m["value"], "stderr": m.get("stderr")} for name, m in metrics]


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """Pivot a tidy frame: one row per (model, method, bitwidth), mean over seeds per metric.

    Returns:
        Index ``model, method, bitwidth``: bitwidths of a model together, else in order of first appearance; columns
        ``effective_w_bits``, ``n_seeds`` and one per metric; NaN where a cell is missing. A mean is taken only over seeds
        that all have the metric.
    """
    index = ["model", "method", "bitwidth"]
    known = frame.dropna(subset=["model"])
    order = known[index].drop_duplicates()
    places = order[["model", "bitwidth"]].drop_duplicates().reset_index(drop=True).reset_index(names="place")
    order = order.merge(places, on=["model", "bitwidth"]).sort_values("place", kind="stable")[index]
    done = known.dropna(subset=["metric"])
    seeds = known.groupby(index, sort=False)["seed"].nunique().rename("n_seeds")
    table = pd.DataFrame(
        {"effective_w_bits": done.groupby(index, sort=False)["effective_w_bits"].mean(), "n_seeds": seeds}
    )
    for metric in sorted(done["metric"].unique(), key=_metric_order):
        grouped = done[done["metric"] == metric].groupby(index, sort=False)
        with_metric = grouped["seed"].nunique()
        table[metric] = grouped["value"].mean().where(with_metric == seeds.reindex(with_metric.index))
    return table.reindex(pd.MultiIndex.from_frame(order))


def standard_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard error of every mean in ``comparison`` from the sampling error of its cells: same rows, one column per metric.

    Seeds share the evaluation data, so their errors are averaged, not divided by the number of seeds. NaN where unknown.
    """
    done = frame.dropna(subset=["metric"])
    errors = done.groupby(["model", "method", "bitwidth", "metric"], sort=False)["stderr"].mean()
    return errors.unstack("metric").reindex(comparison(frame).index)


def _metric_order(metric: str) -> tuple[bool, bool, str]:
    """Perplexities first, then acc, then acc_norm."""
    return not metric.endswith("/perplexity"), metric.endswith("/acc_norm"), metric


def missing(frame: pd.DataFrame) -> list[str]:
    """One line per cell without a result: what it is and why."""
    absent = frame[frame["metric"].isna()].astype({"seed": "Int64"})
    lines = []
    for row in absent.to_dict("records"):
        named = pd.notna(row["model"])
        cell = f"{row['model']} {row['method']} {row['bitwidth']} seed {row['seed']}" if named else str(row["run_id"])
        lines.append(f"{cell}: {row['reason']}")
    return lines


def metric_columns(table: pd.DataFrame) -> list[str]:
    """Name the metric columns of ``comparison``, in order."""
    return [column for column in table.columns if "/" in column]


def higher_is_better(metric: str) -> bool:
    """Tell the direction of a metric from its last word."""
    return HIGHER_IS_BETTER.get(metric.rsplit("/", 1)[1], False)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Mark the best value of each metric per (model, bitwidth): a boolean frame over the metric columns of ``comparison``."""
    groups = table.groupby(level=["model", "bitwidth"], sort=False)
    marks = {}
    for column in metric_columns(table):
        top = groups[column].transform("max" if higher_is_better(column) else "min")
        marks[column] = (table[column] == top) & (groups[column].transform("count") > 1)
    return pd.DataFrame(marks, index=table.index)


def format_value(metric: str, value: float) -> str:
    """Print accuracies in percent with one decimal, perplexities with two (three below 10), thousands in exponents."""
    if pd.isna(value):
        return MISSING
    if metric.endswith(("/acc", "/acc_norm")):
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def format_bits(bits: float) -> str:
    """Print true bits with two decimals."""
    return MISSING if pd.isna(bits) else f"{bits:.2f}"


def markdown(table: pd.DataFrame) -> str:
    """Print a comparison as a Markdown table, the best value per model and bitwidth in bold."""
    marks, metrics = best(table), metric_columns(table)
    head = ["model", "method", "bitwidth", "true w bits", *metrics]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * (len(head) - 3)]
    for key, row in table.iterrows():
        assert isinstance(key, tuple)
        cells = [f"**{format_value(m, row[m])}**" if marks.loc[key, m] else format_value(m, row[m]) for m in metrics]
        lines.append("| " + " | ".join([*map(str, key), format_bits(row["effective_w_bits"]), *cells]) + " |")
    return "\n".join(lines) + "\n"
