"""Draw a comparison: one panel per metric and bitwidth, one dot per method. Readable in black and white."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.results.tables import format_bits, higher_is_better, metric_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INCHES_PER_METHOD = 0.27


def draw(table: pd.DataFrame, path: str, errors: pd.DataFrame | None = None) -> None:
    """Draw every metric at every bitwidth and write the picture.

    A panel lists the methods with their true bits per weight; the dotted line is the unquantized model. Rows without a
    value are left out, and so are panels without one.

    Args:
        table: As ``tables.comparison`` returns it, of one model or several (labelled then).
        path: File name; its suffix says the format (PNG, PDF, SVG).
        errors: As ``tables.standard_errors`` returns it; drawn as bars of one standard error.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [column for column in metric_columns(table) if not column.endswith("/acc_norm")]
    reference = table[table["effective_w_bits"] >= UNTOUCHED_BITS]
    quantized = table[table["effective_w_bits"] < UNTOUCHED_BITS]
    groups = list(quantized.groupby(level=["model", "bitwidth"], sort=False)) or [(("", ""), reference)]
    height = 1.0 + INCHES_PER_METHOD * max(len(rows) for _, rows in groups)
    size = (3.6 * len(groups), height * len(metrics))
    figure, axes = pyplot.subplots(len(metrics), len(groups), figsize=size, squeeze=False, layout="constrained")
    for row, metric in enumerate(metrics):
        for column, (key, rows) in enumerate(groups):
            _panel(axes[row][column], rows, metric, reference, errors)
            axes[row][column].set_title(" ".join(map(str, key)), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Axes, rows: pd.DataFrame, metric: str, reference: pd.DataFrame, errors: pd.DataFrame | None) -> None:
    rows = rows[rows[metric].abs() < float("inf")]
    names = [
        f"{key[1]} ({format_bits(bits)} bits)" for key, bits in zip(rows.index, rows["effective_w_bits"], strict=True)
    ]
    places = list(range(len(rows)))
    bars = None if errors is None or metric not in errors else errors[metric].reindex(rows.index).fillna(0.0)
    axis.errorbar(rows[metric], places, xerr=bars, fmt="ko", markersize=5, elinewidth=1, capsize=2)
    axis.set_yticks(places, names, fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    for value in reference[metric].replace(float("inf"), float("nan")).dropna():
        axis.axvline(value, color="0.3", linewidth=1, linestyle=":")
    direction = "higher" if higher_is_better(metric) else "lower"
    axis.set_xlabel(f"{metric.replace('/', ' ')} ({direction} is better)", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(True, linewidth=0.3, color="0.85")
