"""The papers' figures beside ours: what was reported, what we measured, the difference, and whether the two may be compared.

A figure belongs to a cell with the same model, roles, nominal bits, group size and metric. It is judged only where calibration,
evaluation and options are those of the paper's protocol; otherwise the table says why not. A second-hand figure (one paper
quoting another) is shown and never judged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import pandas as pd

from ptqbench.cell.folders import reported_folder
from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import MISSING, format_spread, format_value, known
from ptqbench.results.tables import KEYS, Column, Entry, Pivot, Sheet, pivot, records, task_average
from ptqbench.results.tables.pivot import NOT_MEASURED

PERPLEXITY_TOLERANCE = 0.05
"""Relative difference of perplexities up to which two figures agree: seeds, hardware and library versions move more than 1 %."""
ACCURACY_TOLERANCE = 0.015
"""Difference of accuracies up to which two figures agree, as a fraction: about two standard errors of 2000 questions."""
COLLAPSED = 1000.0
"""Perplexity from which a model no longer works, so that its value says nothing."""
AGREES, DIFFERS, NO_RESULT = "agrees", "differs", "no result"
INCOMPARABLE, SECOND_HAND = "not comparable", "second-hand"
IDLE_WITHOUT_DATA = ("calibration", "act_order", "true_sequential", "basis_samples")
"""Settings without effect in a cell that rounds to the nearest code and looks at no data."""
OPTIONS = ("act_order", "true_sequential", "clip_search")
"""What a method's own protocol may say beside its roles."""
NUMBERS = ["w_bits", "a_bits", "kv_bits", "group_size", "value"]
RESULT = [
    *KEYS, "metric", "reported", "ours", "spread", "delta", "verdict", "missing", "why", "paper", "table", "provenance", "protocol",
    "note",
]  # fmt: skip


@functools.cache
def load() -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the printed figures and their protocols. ``analysis/reported/README.md`` describes the columns; numbers are floats."""
    import yaml

    folder = reported_folder()
    frame = pd.read_csv(folder / "reported.csv", dtype=str, keep_default_na=False)
    frame = frame.assign(**{name: pd.to_numeric(frame[name]) for name in NUMBERS})
    return frame, yaml.safe_load((folder / "protocols.yaml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Figure:
    """One printed figure.

    Attributes:
        row: Its row of ``reported.csv``.
        protocol: How the paper measured it.
        method: What the paper's method consists of, as roles and options of ours.
        metric: Our name of its metric.
    """

    row: dict[str, Any]
    protocol: dict[str, Any]
    method: dict[str, Any]
    metric: str

    @property
    def value(self) -> float:
        """The figure in our unit: accuracies are fractions."""
        value = float(self.row["value"])
        return value / 100 if self.row["unit"] == "percent" else value


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Join the papers' figures to cells.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.

    Returns:
        One row per pair of a table's row (seeds averaged) and a printed figure, in the table's order. ``verdict`` is one of
        agrees, differs, not comparable, second-hand, no result. ``why`` says what stands against a comparison, ``missing`` why
        there is no value of ours.
    """
    figures, words = load()
    known = frame.dropna(subset=["model", "solver"])
    found, refusals = _with_averages(known, words)
    rows = []
    for cell in records(known.drop_duplicates(KEYS)):
        for figure in _figures(figures[figures["model"] == cell["model"]], words):
            if _same_cell(cell, figure):
                rows.append(_pair(cell, figure, found, refusals))
    order = {key: place for place, key in enumerate(found.mean.index)}
    rows.sort(key=lambda row: order[row["model"], row["method"], row["bitwidth"]])
    return pd.DataFrame(rows, columns=RESULT)


def _with_averages(known: pd.DataFrame, words: dict[str, Any]) -> tuple[Pivot, dict[str, str]]:
    """Pivot with the average over every task set that a protocol averages; why there is none, where cells disagree."""
    refusals = {}
    for tasks in {tuple(protocol["tasks"]) for protocol in words["protocols"].values() if "tasks" in protocol}:
        try:
            averaged = task_average(known, tasks)
        except ConfigError as error:
            refusals[_average(tasks)] = str(error)
            continue
        # Two task sets of one size are two metrics: the new rows get the names of the tasks.
        old = averaged.index < len(known)
        known = averaged.assign(metric=averaged["metric"].where(old, _average(tasks)))
    return pivot(known), refusals


def _average(tasks: Sequence[str]) -> str:
    return f"average of {', '.join(sorted(tasks))}/acc"


def _figures(rows: pd.DataFrame, words: dict[str, Any]) -> list[_Figure]:
    """The figures among these rows whose method and metric we have."""
    figures = []
    for row in records(rows[rows["method"].isin(words["methods"])]):
        protocol = words["protocols"][row["protocol"]]
        metric = _metric(row["metric"], protocol, words["tasks"])
        if metric is not None:
            figures.append(_Figure(row, protocol, words["methods"][row["method"]], metric))
    return figures


def _metric(reported: str, protocol: dict[str, Any], tasks: dict[str, str]) -> str | None:
    """Translate a metric; None for what cells do not measure (times, memory, other benchmarks)."""
    if reported.endswith("_ppl"):
        return f"{reported.removesuffix('_ppl')}/perplexity"
    if reported == "mmlu":
        return "mmlu/acc"
    if reported.startswith("zero_shot_avg") and "delta" not in reported:
        return _average(protocol["tasks"]) if "tasks" in protocol else "average/acc"
    found = re.fullmatch(r"(acc_norm|acc)_(.+)", reported)
    return f"{tasks.get(found[2], found[2])}/{found[1]}" if found else None


def _same_cell(cell: dict[str, Any], figure: _Figure) -> bool:
    """Whether a figure is one of this cell: roles, bits, variant of a subspace and group size agree."""
    row, method = figure.row, figure.method
    if any(role in method and cell[role] != method[role] for role in ROLES):
        return False
    if method["solver"] == "none":
        return bool(cell["nominal_w_bits"] >= UNTOUCHED_BITS)
    bits = [("nominal_w_bits", "w_bits"), ("nominal_a_bits", "a_bits"), ("nominal_kv_bits", "kv_bits")]
    if pd.isna(row["w_bits"]) or any(pd.notna(row[name]) and cell[ours] != row[name] for ours, name in bits):
        return False
    # A protocol may say another granularity of the subspaces than the method does.
    expected = {name: method[name] for name in ("objective", "granularity") if name in method}
    if any(cell[name] != figure.protocol.get(name, value) for name, value in expected.items()):
        return False
    group = None if pd.isna(row["group_size"]) else int(row["group_size"])
    return "group_size not stated" in row["note"] or (cell["group_size"] or None) == group


def _pair(cell: dict[str, Any], figure: _Figure, found: Pivot, refusals: dict[str, str]) -> dict[str, Any]:
    """One row of the result: a figure beside the mean of a cell's row."""
    key = (cell["model"], cell["method"], cell["bitwidth"])
    column = _column(found, key, figure.metric)
    ours, spread = (_number(frame, key, column) for frame in (found.mean, found.spread))
    reasons = _objections(cell, figure, found.protocols[column] if column is not None else "")
    missing = found.reasons.get(key) or refusals.get(figure.metric) or NOT_MEASURED
    given = {name: figure.row[name] for name in ("paper", "table", "provenance", "protocol", "note")}
    values = {"metric": figure.metric, "reported": figure.value, "ours": ours, "spread": spread}
    verdict = {"delta": ours - figure.value, "verdict": _verdict(figure, ours, bool(reasons))}
    words = {"missing": missing if math.isnan(ours) else "", "why": "; ".join(reasons)}
    return dict(zip(KEYS, key, strict=True)) | given | values | verdict | words


def _column(found: Pivot, key: tuple[str, ...], metric: str) -> str | None:
    """The column that holds a cell's value of a metric; a metric that was measured under several protocols has several columns."""
    columns = [name for name in found.mean.columns if name.split("@")[0] == metric]
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
    relative = not known(figure.metric).share
    difference = abs(ours - figure.value) / (figure.value if relative else 1.0)
    return AGREES if difference <= (PERPLEXITY_TOLERANCE if relative else ACCURACY_TOLERANCE) else DIFFERS


def _objections(cell: dict[str, Any], figure: _Figure, measured_on: str) -> list[str]:
    """What stands against comparing a figure with a cell, in words; empty if nothing does."""
    row, protocol, perplexity = figure.row, figure.protocol, known(figure.metric).of_text
    # What the protocol says about all its figures, about a metric, about a method.
    reasons = [protocol["never"]] if "never" in protocol else []
    reasons += [why for name, why in protocol.get("metrics", {}).items() if row["metric"].startswith(name)]
    reasons += [protocol["rows"][row["method"]]] if row["method"] in protocol.get("rows", {}) else []
    # What was measured, and with which options.
    wanted = protocol.get("perplexity")
    if wanted and measured_on and perplexity and wanted not in measured_on:
        reasons.append(f"perplexity over {wanted} there, {measured_on} here")
    reasons += _method_objections(cell, figure)
    # What the printed figure itself leaves open.
    if "group_size not stated" in row["note"]:
        reasons.append("group size not stated")
    if pd.isna(row["value"]):
        reasons.append(f"printed as a bound ({row['note']})")
    elif perplexity and (row["value"] >= COLLAPSED or (row["method"] == "rtn" and row["w_bits"] <= 2)):
        reasons.append("a collapsed model: order of magnitude only")
    return reasons


def _method_objections(cell: dict[str, Any], figure: _Figure) -> list[str]:
    """Settings that are not those of the paper; what has no effect in this cell, or is unknown, stands against nothing."""
    protocol, method = figure.protocol, figure.method
    if method["solver"] == "none":
        return []
    expected = {name: protocol[name] for name in ("calibration",) if name in protocol} | protocol.get("settings", {})
    expected |= {name: value for name, value in method.items() if name in OPTIONS}
    rounds_alone = (cell["solver"], cell["target"], cell["refine"]) == ("rtn", "weight", "none")
    idle = IDLE_WITHOUT_DATA if rounds_alone and cell["transform"] != "subspace" else ()
    reasons = []
    for name, value in expected.items():
        ours = cell[name]
        if name not in idle and pd.notna(ours) and ours != value:
            reasons.append(f"{name} {_text(value)} there, {_text(ours)} here")
    return reasons


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_sheet(found: pd.DataFrame, title: str = "", brief: bool = False) -> Sheet:
    """Lay out what ``check`` returned. Footnotes say why two figures may not be compared.

    Args:
        found: As ``check`` returns it, not modified.
        title: Printed above.
        brief: For a terminal: model and bitwidth stand above their rows instead of in every row, and the source of a figure is
            a footnote too.
    """
    labels = ["method", "metric"] if brief else [*KEYS, "metric"]
    columns = [*labels, "reported", "ours", "delta", "verdict", *([] if brief else ["source"])]
    sheet = Sheet([Column(name, numeric=name in ("reported", "ours", "delta")) for name in columns], title=title)
    previous = None
    for row in records(found):
        group = row["model"], row["bitwidth"]
        if brief and group != previous:
            sheet.add([*(Entry(name, bold=True) for name in group), *[Entry("")] * (len(columns) - 2)], group)
        previous = group
        sheet.add(_check_row(sheet, row, brief), group)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in found["verdict"].value_counts().items())
    summary = counted or "no printed figure belongs to these cells"
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
    """A metric; an average over tasks says how many there are, because their names fill a line."""
    if not metric.startswith("average of "):
        return metric
    return f"average of {metric.count(',') + 1}/acc"


def _printed(metric: str, value: float) -> str:
    """A figure with the digits that the paper prints."""
    if pd.isna(value):
        return MISSING
    return f"{100 * value:.4g}" if known(metric).share else f"{value:g}"


def _delta(metric: str, delta: float) -> str:
    if pd.isna(delta):
        return MISSING
    sign = "+" if delta >= 0 else "-"
    return sign + format_value(metric, abs(delta))
