"""Draw a comparison: quality against the bits that are really stored. Readable in black and white."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS, LINES, GREYS = "osD^vPX*", ("-", "--", "-.", ":"), ("0.0", "0.35", "0.6")
RANDOM_GUESS = 0.25


def draw(table: pd.DataFrame, path: str) -> None:
    """Draw one panel per metric and write the picture.

    Args:
        table: As ``tables.comparison`` returns it; rows without a value are left out.
        path: File name; its suffix says the format (PNG, PDF, SVG).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [column for column in table.columns if "/" in column and not column.endswith("acc_norm")]
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(4.6 * len(metrics), 3.8), squeeze=False, layout="constrained"
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        _panel(axis, table, metric)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(", ".join(map(str, table.index.get_level_values("model").unique())), fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Axes, table: pd.DataFrame, metric: str) -> None:
    styles = itertools.cycle(zip(itertools.cycle(MARKERS), itertools.cycle(LINES), itertools.cycle(GREYS)))
    for (_, method), rows in table.groupby(level=["model", "method"], sort=False):
        marker, line, grey = next(styles)
        points = rows[["effective_w_bits", metric]].dropna().sort_values("effective_w_bits")
        if points.empty:
            continue
        if (points["effective_w_bits"] >= 16).all():
            axis.axhline(points[metric].iloc[0], color="0.5", linewidth=1, linestyle=":", label=f"{method} (16 bits)")
            continue
        axis.plot(
            points["effective_w_bits"], points[metric], marker + line, color=grey, label=str(method), markersize=6
        )
    if metric.endswith("/perplexity"):
        axis.set_yscale("log")
    axis.set_xlabel("true bits per weight (codes, scales and zero points)")
    axis.set_title(metric.replace("/", " "), fontsize=10)
    axis.grid(True, which="both", linewidth=0.3, color="0.85")
