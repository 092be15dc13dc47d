"""The figures that papers print: how each was measured, which cell it belongs to, and what stands against comparing the two.

A figure belongs to a cell with the same model, roles, nominal bits, group size and metric.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd

from ptqbench.cell.folders import reported_folder
from ptqbench.cell.formats import INTEGER
from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import MISSING, known
from ptqbench.results.tables import records
from ptqbench.results.tables.tidy import DEVIATION

COLLAPSED = 1000.0
"""Perplexity from which a model no longer works, so that its value says nothing."""
IDLE_WITHOUT_DATA = ("calibration", "act_order", "true_sequential", "basis_samples")
"""Settings without effect in a cell that rounds to the nearest code and looks at no data."""
OPTIONS = ("act_order", "true_sequential", "clip_search")
"""What a method's own protocol may say beside its roles."""
COLUMNS = [
    "paper", "arxiv_id", "table", "model", "method", "bits_label", "w_bits", "a_bits", "kv_bits", "group_size", "metric", "value",
    "unit", "provenance", "protocol", "note",
]  # fmt: skip
NUMBERS = ["w_bits", "a_bits", "kv_bits", "group_size", "value"]


def load() -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the printed figures and their protocols. ``analysis/reported/README.md`` describes the columns.

    Returns:
        The figures in the order of the file, with numbers as floats and ``printed`` as the text of ``value``; the protocols.

    Raises:
        ConfigError: The file lacks a column, or a figure is no number or has a protocol that is not described.
    """
    return _read(reported_folder())


@functools.cache
def _read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    import yaml

    path = folder / "reported.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    words = yaml.safe_load((folder / "protocols.yaml").read_text(encoding="utf-8"))
    if lacking := [name for name in COLUMNS if name not in frame]:
        raise ConfigError(f"{path}: expected the columns {', '.join(COLUMNS)}, but {', '.join(lacking)} is not there")
    for line, protocol in enumerate(frame["protocol"], 2):
        if protocol not in words["protocols"]:
            known = ", ".join(words["protocols"])
            raise ConfigError(f"{path}, line {line}: expected a protocol of protocols.yaml ({known}), got {protocol!r}")
    try:
        numbers = {name: pd.to_numeric(frame[name]) for name in NUMBERS}
    except ValueError as error:
        raise ConfigError(f"{path}: expected numbers in {', '.join(NUMBERS)}: {error}") from None
    return frame.assign(printed=frame["value"], **numbers), words


@dataclasses.dataclass(frozen=True)
class Figure:
    """One printed figure.

    Attributes:
        row: Its row of ``reported.csv``.
        protocol: How the paper measured it.
        method: What the paper's method consists of, as roles and options of ours; None for a method that ptqbench does not have.
        metric: Our name of its metric.
    """

    row: dict[str, Any]
    protocol: dict[str, Any]
    method: dict[str, Any] | None
    metric: str

    @property
    def value(self) -> float:
        """The figure in our unit: accuracies are fractions. NaN where the paper prints a bound."""
        value = float(self.row["value"])
        return value / 100 if self.row["unit"] == "percent" else value

    @property
    def text(self) -> str:
        """The figure as printed; an accuracy in percent, also where the paper prints a fraction; a bound as in the note."""
        printed: str = self.row["printed"]
        if not printed:
            bound = re.search(r"[<>]\S+", self.row["note"])
            return bound[0] if bound else MISSING
        return f"{Decimal(printed).scaleb(2):f}" if self._as_fraction else printed

    @property
    def decimals(self) -> int:
        """Decimals of ``text``; negative where the last digit of the figure stands before its point."""
        return -int(Decimal(self.row["printed"] or "0").as_tuple().exponent) - 2 * self._as_fraction

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit, in our unit: the true figure is at most so far away."""
        return 0.5 * 10.0**-self.decimals / (100 if known(self.metric).share else 1)

    @property
    def _as_fraction(self) -> bool:
        return bool(self.row["unit"] == "fraction")


def average_of(tasks: Sequence[str]) -> str:
    """Our name of the average over a protocol's tasks. Two task sets of one size are two metrics, so it names the tasks."""
    return f"average of {', '.join(sorted(tasks))}/acc"


def figures(rows: pd.DataFrame, words: dict[str, Any]) -> list[Figure]:
    """The figures among these rows whose metric cells measure, in their order."""
    found = []
    for row in records(rows):
        protocol = words["protocols"][row["protocol"]]
        metric = _metric(row["metric"], protocol, words["tasks"])
        if metric is not None:
            found.append(Figure(row, protocol, words["methods"].get(row["method"]), metric))
    return found


def _metric(reported: str, protocol: dict[str, Any], tasks: dict[str, str]) -> str | None:
    """Translate a metric; None for what cells do not measure (times, memory, other benchmarks)."""
    if reported.endswith("_ppl"):
        return f"{reported.removesuffix('_ppl')}/perplexity"
    if reported == "mmlu":
        return "mmlu/acc"
    if reported.startswith("zero_shot_avg") and "delta" not in reported:
        return average_of(protocol["tasks"]) if "tasks" in protocol else "average/acc"
    found = re.fullmatch(r"(acc_norm|acc)_(.+)", reported)
    return f"{tasks.get(found[2], found[2])}/{found[1]}" if found else None


def same_cell(cell: dict[str, Any], figure: Figure) -> bool:
    """Whether a figure is one of this cell: roles, bits, variant of a subspace and group size agree."""
    row, method = figure.row, figure.method
    if method is None or any(role in method and cell[role] != method[role] for role in ROLES):
        return False
    if method["solver"] == "none":
        return bool(cell["nominal_w_bits"] >= UNTOUCHED_BITS)
    if {cell["w_format"], cell["a_format"], cell["kv_format"]} != {INTEGER}:  # figures that papers print for integers
        return False
    bits = [("nominal_w_bits", "w_bits"), ("nominal_a_bits", "a_bits"), ("nominal_kv_bits", "kv_bits")]
    if pd.isna(row["w_bits"]) or any(pd.notna(row[name]) and cell[ours] != row[name] for ours, name in bits):
        return False
    # A protocol may say another granularity of the subspaces than the method does.
    expected = {name: method[name] for name in ("objective", "granularity") if name in method}
    if any(cell[name] != figure.protocol.get(name, value) for name, value in expected.items()):
        return False
    group = None if pd.isna(row["group_size"]) else int(row["group_size"])
    return "group_size not stated" in row["note"] or (cell["group_size"] or None) == group


def objections(cell: dict[str, Any], figure: Figure, measured_on: str) -> list[str]:
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
    reasons += method_objections(cell, figure)
    # What the printed figure itself leaves open.
    if "group_size not stated" in row["note"]:
        reasons.append("group size not stated")
    if pd.isna(row["value"]):
        reasons.append(f"printed as a bound ({row['note']})")
    elif perplexity and (row["value"] >= COLLAPSED or (row["method"] == "rtn" and row["w_bits"] <= 2)):
        reasons.append("a collapsed model: order of magnitude only")
    return reasons


def method_objections(cell: dict[str, Any], figure: Figure) -> list[str]:
    """Settings that are not those of the paper; what has no effect in this cell, or is unknown, stands against nothing."""
    protocol, method = figure.protocol, figure.method
    if method is None or method["solver"] == "none":
        return []
    expected = {name: protocol[name] for name in ("calibration",) if name in protocol} | protocol.get("settings", {})
    expected |= {name: value for name, value in method.items() if name in OPTIONS}
    rounds_alone = (cell["solver"], cell["target"], cell["refine"]) == ("rtn", "weight", "none")
    idle = IDLE_WITHOUT_DATA if rounds_alone and pd.isna(cell["basis_samples"]) else ()
    reasons = [cell[DEVIATION]] if isinstance(cell.get(DEVIATION), str) else []
    reasons += ["bits of keys and values by block here"] if isinstance(cell.get("kv_measure"), str) else []
    for name, value in expected.items():
        ours = cell[name]
        if name not in idle and pd.notna(ours) and ours != value:
            reasons.append(f"{name} {_text(value)} there, {_text(ours)} here")
    return reasons


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
