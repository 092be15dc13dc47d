"""Draw a comparison: one panel per metric and bitwidth, one dot per method. Readable in black and white."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.results.drawing import WIDE, cut, set_scale
from ptqbench.results.metrics import kind
from ptqbench.results.tables import Pivot, format_bits, higher_is_better
from ptqbench.results.tables.sheet import main_metrics

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    Numbers = pd.Series[float]
INCHES_PER_METHOD = 0.27


def draw(found: Pivot, path: str) -> None:
    """Draw every metric at every bitwidth and write the picture.

    A panel lists the methods with their true bits per weight; bars are one standard error. The dotted line is the unquantized
    model. Rows without a value are left out.

    Args:
        found: As ``tables.pivot`` returns it, of one model or several, with at least one value.
        path: File name; its suffix says the format (PNG, PDF, SVG).
    """
    from matplotlib.figure import Figure

    # A row of panels per metric, a column per model and bitwidth; if nothing is quantized, the reference alone.
    metrics = main_metrics(list(found.mean.columns))
    metrics = [metric for metric in metrics if not metric.endswith("/acc_norm")] or metrics
    bits = found.bits["effective_w_bits"]
    reference, quantized = found.mean[bits >= UNTOUCHED_BITS], found.mean[bits < UNTOUCHED_BITS]
    groups = list(quantized.groupby(level=["model", "bitwidth"], sort=False)) or [(("", ""), reference)]
    models = {model for (model, _), _ in groups}
    height = 1.0 + INCHES_PER_METHOD * max(len(rows) for _, rows in groups)
    figure = Figure(figsize=(3.6 * len(groups), height * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(groups), squeeze=False)
    for row, metric in enumerate(metrics):
        for axis, (key, rows) in zip(axes[row], groups, strict=True):
            _panel(axis, rows[metric], found.error[metric], bits, reference[metric])
            axis.set_title(str(key[1]) if len(models) == 1 else " ".join(map(str, key)), fontsize=9)
            direction = "higher" if higher_is_better(metric) else "lower"
            axis.set_xlabel(f"{metric.replace('/', ' ')} ({direction} is better)", fontsize=8)
    if len(models) == 1:
        figure.suptitle(str(models.pop()), fontsize=9)
    figure.supxlabel("In brackets: true bits per weight, with scales, zero points and changes of basis", fontsize=8)
    # Drawn in memory first: what matplotlib leaves behind on a full disk hides the error of the disk.
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix.removeprefix("."), dpi=150)
    Path(path).write_bytes(drawn.getvalue())


def _panel(axis: Axes, values: Numbers, errors: Numbers, bits: Numbers, reference: Numbers) -> None:
    # Methods from top to bottom, with their standard errors.
    values = values[values.abs() < math.inf]
    places, bars = list(range(len(values))), errors.loc[values.index].fillna(0.0)
    axis.errorbar(values, places, xerr=bars, fmt="ko", markersize=5, elinewidth=1, capsize=2)
    keys = zip(values.index, bits.loc[values.index], strict=True)
    axis.set_yticks(places, [f"{cut(key[1])} ({format_bits(n)} bits)" for key, n in keys], fontsize=7)
    axis.set_ylim(len(values) - 0.5, -0.5)
    # A dotted line for each unquantized model.
    for value in reference.replace(math.inf, math.nan).dropna():
        axis.axvline(value, color="0.3", linewidth=1, linestyle=":")
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    if kind(str(values.name)) == "perplexity" and values.max() > WIDE * values.min():
        set_scale(axis, "x", values, WIDE)
        axis.tick_params(axis="x", labelrotation=60)
    axis.grid(True, linewidth=0.3, color="0.85")
