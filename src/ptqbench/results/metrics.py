"""Metrics by name (``text/perplexity``, ``text/kl``, ``task/acc``): what kinds there are, their direction, order and print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ptqbench.evaluate.records import LARGEST


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a kind of metric.

    Attributes:
        higher: Whether a larger value is better.
        share: Whether it is a share, which is printed in percent.
        of_text: Whether its name begins with a text; otherwise it begins with a task.
        relative: Whether it compares a model with its own unquantized one.
        place: Place among the kinds of a text or a task.
        column: Column of the records that holds it per window or example, where that is not the name of the kind.
        meaning: What it is, for the lines below a table; empty where everybody knows.
    """

    higher: bool = False
    share: bool = False
    of_text: bool = False
    relative: bool = False
    place: int = 0
    column: str = ""
    meaning: str = ""


KINDS = {
    "perplexity": Kind(of_text=True, column="nll"),
    "kl": Kind(
        of_text=True, relative=True, place=1,
        meaning="mean KL divergence from the unquantized model, in nats per token",
    ),
    "top1": Kind(
        higher=True, share=True, of_text=True, relative=True, place=2,
        meaning="share of positions at which the unquantized model ranks the same token first, %",
    ),
    "acc": Kind(higher=True, share=True),
    "exact_match": Kind(higher=True, share=True),
    "acc_norm": Kind(higher=True, share=True, place=1),
    "flips": Kind(
        share=True, relative=True, place=2, column="flipped", meaning="share of answers that are not the unquantized model's, %"
    ),
}  # fmt: skip
KINDS |= dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"), Kind())
OTHER = Kind(higher=True)
"""What is taken of a kind that is not listed, as of most metrics of lm-eval (f1, bleu, mcc)."""
MISSING = "-"
AVERAGE = "average_"
PLUS_MINUS = " ± "
NATS = 1e-4
"""Divergence below which powers of ten are printed."""


def kind(metric: str) -> str:
    """The last word of a metric's name, without lm-eval's filter and the number that tells protocols apart.

    >>> kind("wikitext2/perplexity@2")
    'perplexity'
    """
    return metric.rsplit("/", 1)[-1].split("@")[0].split(":")[0]


def known(metric: str) -> Kind:
    """What is known of the kind of a metric."""
    return KINDS.get(kind(metric), OTHER)


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is the better one: accuracies, not perplexities."""
    return known(metric).higher


def order(metric: str) -> tuple[bool, bool, str, int, str]:
    """Sort key: texts first, with all kinds of a text side by side; then averages over tasks, acc, acc_norm, flips."""
    about = known(metric)
    text = metric.rpartition("/")[0] + "/" if about.of_text else ""
    return not about.of_text, not metric.startswith(AVERAGE), text, about.place, metric


def _missing(value: float | None) -> bool:
    """Whether there is no number. Not ``pandas.isna``: importing pandas takes a third of a second."""
    return value is None or value != value


def format_value(metric: str, value: float) -> str:
    """Print a metric with the digits of its kind.

    A share is printed in percent with one decimal. A KL divergence has three significant digits. Any other metric, such as a
    perplexity, has three decimals below 10, two below 10^4, and is printed as 1.2e+04 above.

    >>> format_value("t/kl", 0.001234), format_value("t/kl", 1.2e-08), format_value("t/top1", 0.7346)
    ('0.00123', '1.2e-08', '73.5')
    """
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
    if known(metric).share:
        return f"{100 * value:.1f}"
    if kind(metric) == "kl":
        return format_nats(value, scale)
    return f"{value:.3f}" if scale < 10 else f"{value:.2f}" if scale < 1e4 else f"{value:.1e}"


def format_nats(value: float, scale: float | None = None) -> str:
    """Print a divergence with three significant digits, or with the decimals that give three to ``scale``."""
    scale = abs(value if scale is None else scale)
    if not NATS <= scale < 1000:
        return f"{value:.3g}"
    return f"{value:.{2 - math.floor(math.log10(scale))}f}"
