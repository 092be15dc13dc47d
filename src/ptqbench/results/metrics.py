"""Metrics by name (``label/perplexity``, ``task/acc``, ``task/acc_norm``): direction, order and print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ptqbench.evaluate.records import LARGEST

ACCURACIES = ("acc", "acc_norm", "exact_match")
MISSING = "-"
AVERAGE = "average_"
PLUS_MINUS = " ± "


def kind(metric: str) -> str:
    """The last word of a metric's name, without lm-eval's filter and the number that tells protocols apart.

    >>> kind("wikitext2/perplexity@2")
    'perplexity'
    """
    return metric.rsplit("/", 1)[-1].split("@")[0].split(":")[0]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is the better one: accuracies, not perplexities."""
    return kind(metric) in ACCURACIES


def order(metric: str) -> tuple[bool, bool, bool, str]:
    """Sort key: perplexities first, then averages over tasks, acc, acc_norm."""
    return kind(metric) != "perplexity", not metric.startswith(AVERAGE), kind(metric) == "acc_norm", metric


def _missing(value: float | None) -> bool:
    """Whether there is no number. Not ``pandas.isna``: importing pandas takes a third of a second."""
    return value is None or value != value


def format_value(metric: str, value: float) -> str:
    """Print an accuracy in percent with one decimal; a perplexity with three decimals below 10, two below 10^4, else as 1.2e+04."""
    return MISSING if _missing(value) else _format(metric, value, value)


def format_spread(metric: str, value: float, spread: float) -> str:
    """Print a mean and its spread, both with the decimals of the mean; the mean alone where the spread is unknown."""
    text = format_value(metric, value)
    return text if _missing(value) or _missing(spread) else text + PLUS_MINUS + _format(metric, spread, value)


def format_bits(bits: float) -> str:
    """Print bits per weight with two decimals."""
    return MISSING if _missing(bits) else f"{bits:.2f}"


def part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within a record that was read from disk; empty where a damaged record has none."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def measured(metric: Mapping[str, Any]) -> float:
    """The value of a metric in a result. Infinity where it is at least ``LARGEST``, or where only a mean loss is recorded."""
    unknown = metric.get("value") is None and metric.get("mean_loss") is not None
    value = math.inf if unknown else float(metric["value"])
    return math.inf if value >= LARGEST else value


def _format(metric: str, value: float, scale: float) -> str:
    """Print a value with the decimals that suit ``scale``."""
    if math.isinf(value):
        return "inf"
    if kind(metric) in ACCURACIES:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if scale < 10 else f"{value:.2f}" if scale < 1e4 else f"{value:.1e}"
