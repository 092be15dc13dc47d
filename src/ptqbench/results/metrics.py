"""Metrics by name: ``label/perplexity``, ``task/acc``, ``task/acc_norm``; their direction, order and print."""

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
    """Tell the direction of a metric."""
    return kind(metric) in ACCURACIES


def order(metric: str) -> tuple[bool, bool, bool, str]:
    """Sort key: perplexities first, then averages over tasks, acc, acc_norm."""
    return kind(metric) != "perplexity", not metric.startswith(AVERAGE), kind(metric) == "acc_norm", metric


def _missing(value: float | None) -> bool:
    """Whether there is no number; without pandas, which costs a third of a second."""
    return value is None or value != value


def format_value(metric: str, value: float) -> str:
    """Print accuracies in percent with one decimal, perplexities with two (three below 10), thousands in exponents."""
    return MISSING if _missing(value) else _format(metric, value, value)


def format_spread(metric: str, value: float, spread: float) -> str:
    """Print a mean and its spread with the decimals of the mean; the mean alone where there is no spread."""
    text = format_value(metric, value)
    return text if _missing(value) or _missing(spread) else text + PLUS_MINUS + _format(metric, spread, value)


def format_bits(bits: float) -> str:
    """Print bits with two decimals."""
    return MISSING if _missing(bits) else f"{bits:.2f}"


def format_nominal(bits: float) -> str:
    """Print nominal bits as short as they are: 4, 4.5."""
    return MISSING if _missing(bits) else f"{bits:g}"


def measured(metric: Mapping[str, Any]) -> float:
    """The value of a metric in a result; infinity for a perplexity that is ``LARGEST`` or has a mean loss alone."""
    unknown = metric.get("value") is None and metric.get("mean_loss") is not None
    value = math.inf if unknown else float(metric["value"])
    return math.inf if value >= LARGEST else value


def _format(metric: str, value: float, scale: float) -> str:
    if math.isinf(value):
        return "inf"
    if kind(metric) in ACCURACIES:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if scale < 10 else f"{value:.2f}" if scale < 1e4 else f"{value:.1e}"
