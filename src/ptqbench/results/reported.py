"""The papers' figures beside ours: reported, reproduced, the difference, and whether the two may be compared at all.

A figure belongs to a cell with the same model, the same roles, the same nominal bits and group size, and the same metric. It is
judged only where calibration, evaluation and options are those of its protocol; else the reason is said in words. A second-hand
figure is shown and never judged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import pandas as pd

from ptqbench.cell.folders import reported_folder
from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import MISSING, format_spread, format_value, kind
from ptqbench.results.tables import KEYS, Column, Entry, Pivot, Sheet, pivot, task_average
from ptqbench.results.tables.pivot import NOT_MEASURED

PERPLEXITY_TOLERANCE = 0.05
"""Relative difference of perplexities up to which two figures agree: seeds, hardware and library versions move more than 1 %."""
ACCURACY_TOLERANCE = 0.015
"""Difference of accuracies up to which two figures agree, as a fraction: about two standard errors of 2000 questions."""
COLLAPSED = 1000.0
AGREES, DIFFERS, INCOMPARABLE, SECOND_HAND, NO_RESULT = (
    "agrees",
    "differs",
    "not comparable",
    "second-hand",
    "no result",
)
IDLE_WITHOUT_DATA = ("calibration", "act_order", "true_sequential", "basis_samples")
NUMBERS = ["w_bits", "a_bits", "kv_bits", "group_size", "value"]
RESULT = [
    *KEYS, "metric", "reported", "ours", "spread", "delta", "verdict", "missing", "why", "paper", "table", "provenance", "protocol",
    "note",
]  # fmt: skip


@functools.cache
def load() -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the figures and their protocols. Columns: see ``analysis/reported/README.md``; numbers are floats."""
    import yaml

    folder = reported_folder()
    frame = pd.read_csv(folder / "reported.csv", dtype=str, keep_default_na=False)
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name])
    return frame, yaml.safe_load((folder / "protocols.yaml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Figure:
    """One printed figure with its protocol and its metric in our words."""

    row: dict[str, Any]
    protocol: dict[str, Any]
    metric: str

    @property
    def value(self) -> float:
        """In our unit: accuracies are fractions."""
        value = float(self.row["value"])
        return value / 100 if self.row["unit"] == "percent" else value


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Join the papers' figures to cells.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.

    Returns:
        One row per pair of a table's row (seeds averaged) and a printed figure, in the table's order. ``verdict`` is one of
        agrees, differs, not comparable, second-hand, no result; ``why`` says what stands against a comparison, ``missing`` why
        there is nothing of ours.
    """
    figures, words = load()
    known = frame.dropna(subset=["model", "solver"])
    found, refusals = _with_averages(known, words)
    rows = []
    for cell in _records(known.drop_duplicates(KEYS)):
        for figure in _figures(figures[figures["model"] == cell["model"]], words):
            if _same_cell(cell, figure, words):
                rows.append(_pair(cell, figure, words, found, refusals))
    order = {key: place for place, key in enumerate(found.mean.index)}
    rows.sort(key=lambda row: order[row["model"], row["method"], row["bitwidth"]])
    return pd.DataFrame(rows, columns=RESULT)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def _with_averages(known: pd.DataFrame, words: dict[str, Any]) -> tuple[Pivot, dict[str, str]]:
    """Pivot with the average over every task set that a protocol averages; why there is none, where cells disagree."""
    refusals = {}
    for tasks in {tuple(protocol["tasks"]) for protocol in words["protocols"].values() if "tasks" in protocol}:
        try:
            known = _named(task_average(known, tasks), known, tasks)
        except ConfigError as error:
            refusals[_average(tasks)] = str(error)
    return pivot(known), refusals


def _named(averaged: pd.DataFrame, known: pd.DataFrame, tasks: tuple[str, ...]) -> pd.DataFrame:
    """Two task sets of one size are two metrics."""
    new = averaged.index >= len(known)
    return averaged.assign(metric=averaged["metric"].where(~new, _average(tasks)))


def _average(tasks: tuple[str, ...] | list[str]) -> str:
    return f"average of {', '.join(sorted(tasks))}/acc"


def _figures(rows: pd.DataFrame, words: dict[str, Any]) -> list[_Figure]:
    figures = []
    for row in _records(rows):
        protocol = words["protocols"][row["protocol"]]
        metric = _metric(str(row["metric"]), protocol, words["tasks"])
        if metric is not None and row["method"] in words["methods"]:
            figures.append(_Figure(row, protocol, metric))
    return figures


def _metric(reported: str, protocol: dict[str, Any], tasks: dict[str, str]) -> str | None:
    """Translate a metric; None for what cells do not measure (times, memory, other benchmarks)."""
    if reported.endswith("_ppl"):
        return f"{reported.removesuffix('_ppl')}/perplexity"
    if reported == "mmlu":
        return "mmlu/acc"
    if reported.startswith("zero_shot_avg") and "delta" not in reported:
        return _average(protocol["tasks"]) if "tasks" in protocol else "average/acc"
    for prefix, name in (("acc_norm_", "acc_norm"), ("acc_", "acc")):
        if reported.startswith(prefix):
            task = reported.removeprefix(prefix)
            return f"{tasks.get(task, task)}/{name}"
    return None


def _same_cell(cell: dict[str, Any], figure: _Figure, words: dict[str, Any]) -> bool:
    row, method = figure.row, words["methods"][figure.row["method"]]
    if any(role in method and cell[role] != method[role] for role in ROLES):
        return False
    if method["solver"] == "none":
        return bool(cell["nominal_w_bits"] >= UNTOUCHED_BITS)
    bits = [("nominal_w_bits", "w_bits"), ("nominal_a_bits", "a_bits"), ("nominal_kv_bits", "kv_bits")]
    if pd.isna(row["w_bits"]) or any(pd.notna(row[name]) and cell[ours] != row[name] for ours, name in bits):
        return False
    expected = dict(method)
    if "granularity" in expected:
        expected["granularity"] = figure.protocol.get("granularity", expected["granularity"])
    if any(cell[name] != expected[name] for name in ("objective", "granularity") if name in expected):
        return False
    group = None if pd.isna(row["group_size"]) else int(row["group_size"])
    return "group_size not stated" in row["note"] or (cell["group_size"] or None) == group


def _pair(
    cell: dict[str, Any], figure: _Figure, words: dict[str, Any], found: Pivot, refusals: dict[str, str]
) -> dict[str, Any]:
    key = (cell["model"], cell["method"], cell["bitwidth"])
    column = _column(found, key, figure.metric)
    ours, spread = (_number(frame, key, column) for frame in (found.mean, found.spread))
    reasons = _objections(cell, figure, words, found.protocols[column] if column is not None else "")
    verdict = _verdict(figure, ours, bool(reasons))
    missing = found.reasons.get(key) or refusals.get(figure.metric) or NOT_MEASURED
    return {
        **{name: cell[name] for name in KEYS},
        "metric": figure.metric,
        "reported": figure.value,
        "ours": ours,
        "spread": spread,
        "delta": ours - figure.value,
        "verdict": verdict,
        "missing": missing if math.isnan(ours) else "",
        "why": "; ".join(reasons),
        **{name: figure.row[name] for name in ("paper", "table", "provenance", "protocol", "note")},
    }


def _column(found: Pivot, key: tuple[str, ...], metric: str) -> str | None:
    """The column that holds a cell's value of a metric: a metric measured under several protocols has several."""
    columns = [str(name) for name in found.mean.columns if str(name).split("@")[0] == metric]
    return next((name for name in columns if not math.isnan(_number(found.mean, key, name))), None)


def _number(frame: pd.DataFrame, key: tuple[str, ...], column: str | None) -> float:
    return float("nan") if column is None else float(cast("float", frame.at[key, column]))


def _verdict(figure: _Figure, ours: float, objections: bool) -> str:
    if figure.row["provenance"] == "second_hand":
        return SECOND_HAND
    if pd.isna(ours):
        return NO_RESULT
    if objections:
        return INCOMPARABLE
    relative = kind(figure.metric) == "perplexity"
    difference = abs(ours - figure.value) / (figure.value if relative else 1.0)
    return AGREES if difference <= (PERPLEXITY_TOLERANCE if relative else ACCURACY_TOLERANCE) else DIFFERS


def _objections(cell: dict[str, Any], figure: _Figure, words: dict[str, Any], measured_on: str) -> list[str]:
    """What stands against comparing a figure with a cell, in words; empty if nothing does."""
    row, protocol = figure.row, figure.protocol
    reasons = [protocol["never"]] if "never" in protocol else []
    reasons += [why for name, why in protocol.get("metrics", {}).items() if str(row["metric"]).startswith(name)]
    reasons += [protocol["rows"][row["method"]]] if row["method"] in protocol.get("rows", {}) else []
    wanted = protocol.get("perplexity")
    if wanted and measured_on and kind(figure.metric) == "perplexity" and wanted not in measured_on:
        reasons.append(f"perplexity over {wanted} there, {measured_on} here")
    reasons += _method_objections(cell, figure, words)
    if "group_size not stated" in row["note"]:
        reasons.append("group size not stated")
    if pd.isna(row["value"]):
        reasons.append(f"printed as a bound ({row['note']})")
    elif kind(figure.metric) == "perplexity" and (
        row["value"] >= COLLAPSED or (row["method"] == "rtn" and row["w_bits"] <= 2)
    ):
        reasons.append("a collapsed model: order of magnitude only")
    return reasons


def _method_objections(cell: dict[str, Any], figure: _Figure, words: dict[str, Any]) -> list[str]:
    protocol, method = figure.protocol, words["methods"][figure.row["method"]]
    if method["solver"] == "none":
        return []
    expected = {name: protocol[name] for name in ("calibration",) if name in protocol} | protocol.get("settings", {})
    expected |= {
        name: value for name, value in method.items() if name in ("act_order", "true_sequential", "clip_search")
    }
    blind = (
        cell["solver"] == "rtn"
        and cell["transform"] != "subspace"
        and (cell["target"], cell["refine"]) == ("weight", "none")
    )
    reasons = []
    for name, value in expected.items():
        ours = cell[name]
        if (blind and name in IDLE_WITHOUT_DATA) or (ours is None and name != "calibration") or pd.isna(ours):
            continue
        if ours != value:
            reasons.append(f"{name} {_text(value)} there, {_text(ours)} here")
    return reasons


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_sheet(found: pd.DataFrame, title: str = "", brief: bool = False) -> Sheet:
    """Lay out what ``check`` returned; why two figures do not compare is a footnote.

    Args:
        found: As ``check`` returns it, not modified.
        title: Printed above.
        brief: For a terminal: model and bitwidth stand above their rows instead of in each, and where a figure is printed is a
            footnote too.
    """
    lead = [] if brief else [Column(name, numeric=False) for name in KEYS]
    heads = [*(lead or [Column("method", numeric=False)]), Column("metric", numeric=False, wrap=True)]
    heads += [*map(Column, ("reported", "ours", "delta")), Column("verdict", numeric=False, wrap=True)]
    heads += [] if brief else [Column("source", numeric=False, wrap=True)]
    sheet = Sheet(heads, title=title)
    previous = None
    for row in _records(found):
        group = row["model"], row["bitwidth"]
        if group != previous:
            sheet.sections += [len(sheet.rows)] if sheet.rows else []
            above = [*(Entry(name, bold=True) for name in group), *[Entry("")] * (len(heads) - 2)]
            sheet.rows += [above] if brief else []
        previous = group
        sheet.rows.append(_check_row(sheet, row, brief))
    counts = found["verdict"].value_counts()
    summary = (
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        or "no printed figure belongs to these cells"
    )
    sheet.remarks = [
        f"{summary}.",
        f"agrees: within {100 * PERPLEXITY_TOLERANCE:g} % of a perplexity or {100 * ACCURACY_TOLERANCE:g} points of an accuracy, "
        "and nothing stands against the comparison. Second-hand figures are never judged.",
    ]
    return sheet


def _check_row(sheet: Sheet, row: dict[str, Any], brief: bool) -> list[Entry]:
    metric, missing, why = row["metric"], row["missing"], row["why"]
    source = f"{row['paper']}, {row['table']} ({row['provenance'].replace('_', ' ')})"
    printed, name = _printed(metric, row["reported"]), _brief(metric)
    if brief:
        lead = [Entry(row["method"]), Entry(name.replace("/perplexity", " ppl").replace("/", " "))]
        reported, rest = Entry(printed, note=sheet.note(source)), []
    else:
        lead, reported, rest = [*(Entry(row[key]) for key in KEYS), Entry(name)], Entry(printed), [Entry(source)]
    ours = Entry(format_spread(metric, row["ours"], row["spread"]), note=sheet.note(missing) if missing else None)
    verdict = Entry(row["verdict"], note=sheet.note(why) if why else None)
    return [*lead, reported, ours, Entry(_delta(metric, row["delta"])), verdict, *rest]


def _brief(metric: str) -> str:
    """An average by the number of its tasks: their names are a line long."""
    if not metric.startswith("average of "):
        return metric
    return f"average of {metric.count(',') + 1}/acc"


def _printed(metric: str, value: float) -> str:
    """A figure with the digits it was printed with."""
    if pd.isna(value):
        return MISSING
    return f"{value:g}" if kind(metric) == "perplexity" else f"{100 * value:.4g}"


def _delta(metric: str, delta: float) -> str:
    if pd.isna(delta):
        return MISSING
    sign = "+" if delta >= 0 else "-"
    return sign + format_value(metric, abs(delta))
