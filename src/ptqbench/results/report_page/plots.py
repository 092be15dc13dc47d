"""The plots of a page, as SVG in data addresses. They can be read in black and white."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.results import analysis
from ptqbench.results.analysis import WIDE, Look, deal_looks
from ptqbench.results.metrics import kind
from ptqbench.results.report_page.facts import Names, main_metrics, reference_value
from ptqbench.results.tables import Pivot, format_value, higher_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b4f8a", "#c2571a", "#2e7d4f", "#7a3e9d", "#8a6d00", "#444444")
COSTS = {"effective_w_bits": "true bits per weight", "quantize_s": "time to quantize, s"}
ERROR = "relative_output_error"
WIDE_COST = 2.0
"""Ratio of largest to smallest cost from which its axis is logarithmic: bits differ by factors, but small ones."""
PANELS_ACROSS = 4
ROOM_FOR_NAMES = 0.3
"""Share of the horizontal axis that is kept free at its end."""
HAIR = 1e-6
"""Boxes that overlap by no more than this touch."""
ASIDE, MARK, POINTS_PER_INCH = 8.0, 6.0, 72.0


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture for a page: heading, words for those who cannot see it, and the address that holds it."""

    title: str
    alt: str
    address: str


def trade_offs(frame: pd.DataFrame, found: Pivot, references: set[Names]) -> list[Plot]:
    """Draw quality against bits and against time: for every model one plot per main metric and cost.

    Args:
        frame: As ``tables.tidy`` returns it, not modified; with averages over tasks where there are any.
        found: Its pivot.
        references: Rows of unquantized models.

    Returns:
        No plot where no quantized cell is done.
    """
    plots = []
    looks = deal_looks(_quantized(frame)["bitwidth"].dropna(), COLOURS)
    compared = {(m, cost): _compared(frame, m, cost) for m in main_metrics(found) for cost in COSTS}
    for model in frame["model"].dropna().unique():
        for (metric, cost), rows in compared.items():
            part = rows[rows["model"] == model]
            if len(part):
                drawn = _scatter(part, looks, metric, COSTS[cost], reference_value(found, references, model, metric))
                title = f"{model}: {metric} against {COSTS[cost].removesuffix(', s')}"
                plots.append(Plot(title, _in_words(part, title), _address(drawn)))
    return plots


def layers(frame: pd.DataFrame) -> list[Plot]:
    """Draw the relative output error over the blocks, one panel per kind of linear, for the methods at the lowest bitwidth.

    Args:
        frame: As ``tables.tidy`` returns it with a column ``folder``, not modified.

    Returns:
        One plot per model; none for a model without a layer report.
    """
    report = analysis.layers(frame[(frame["folder"] != "") & frame["w_bits"].notna()])
    bits = frame.dropna(subset=["w_bits"]).groupby(["model", "bitwidth"], sort=False)["w_bits"].min()
    plots, looks = [], deal_looks(_quantized(frame)["method"].dropna(), COLOURS)
    for model, rows in report.groupby("model", sort=False):
        present = bits[model].loc[list(rows["bitwidth"].unique())]
        lowest = str(cast("pd.Series[int]", present).astype(int).idxmin())
        rows = rows[rows["bitwidth"] == lowest]
        title = f"{model}, {lowest}: relative output error"
        means = rows.groupby("method", sort=False)[ERROR].mean()
        words = ", ".join(f"{method} {value:.2g}" for method, value in means.items())
        alt = f"{title} by block and linear. Means over all linears: {words}."
        plots.append(Plot(title, alt, _address(_panels(rows, looks))))
    return plots


def _compared(frame: pd.DataFrame, metric: str, cost: str) -> pd.DataFrame:
    """Quantized rows with ``front``: not beaten in both by a row of equally precise activations, keys and values.

    The unquantized model is no rival: it takes no time at all.
    """
    quantized = [bits < UNTOUCHED_BITS for bits in frame["w_bits"]]
    precision = list(zip(frame["model"], frame["a_bits"], frame["k_bits"], frame["v_bits"], quantized, strict=True))
    leagues = {str(one): one for one in precision}
    rows = analysis.pareto(frame.assign(model=[str(one) for one in precision]), metric, cost)
    rows = rows[[leagues[name][-1] for name in rows["model"]]]
    return rows.assign(model=[leagues[name][0] for name in rows["model"]])


def _quantized(frame: pd.DataFrame) -> pd.DataFrame:
    bits = frame[["w_bits", "a_bits", "k_bits", "v_bits"]].astype(float)
    return frame[(bits < UNTOUCHED_BITS).any(axis=1)]


def _in_words(rows: pd.DataFrame, title: str) -> str:
    best = [f"{row['method']} {row['bitwidth']}" for row in rows[rows["front"]].to_dict("records")]
    return f"{title}: {len(rows)} methods and bitwidths. Not beaten in both: {', '.join(best)}."


def _scatter(rows: pd.DataFrame, looks: Mapping[str, Look], metric: str, label: str, reference: float | None) -> Figure:
    percent = 1.0 if kind(metric) == "perplexity" else 100.0
    rows = rows.assign(quality=percent * rows["quality"], spread=percent * rows["spread"])
    figure, (axis,) = _figure(5.4, 4.1)
    for bitwidth in (name for name in looks if (rows["bitwidth"] == name).any()):
        marker, colour = looks[bitwidth].marker, looks[bitwidth].colour
        axis.plot([], [], marker, color=colour, label=bitwidth)
        for on_front, part in rows[rows["bitwidth"] == bitwidth].groupby("front"):
            look: dict[str, Any] = {"fmt": marker, "color": colour, "mfc": colour if on_front else "white"}
            axis.errorbar(part["cost"], part["quality"], part["spread"].fillna(0.0), **look, capsize=2, elinewidth=0.8)
    _scale(axis, "y", rows["quality"], WIDE)
    _scale(axis, "x", rows["cost"], WIDE_COST)
    if reference is not None:
        axis.axhline(percent * reference, color="0.3", linewidth=1, linestyle=":")
        axis.annotate(
            f"unquantized {format_value(metric, reference)}", (1, percent * reference), (-3, 3), ("axes fraction", "data"),
            "offset points", ha="right", fontsize=7.5, color="0.3",
        )  # fmt: skip
    axis.set_xlabel(label)
    unit = "" if percent == 1 else ", %"
    axis.set_ylabel(f"{metric}{unit} ({'higher' if higher_is_better(metric) else 'lower'} is better)")
    axis.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=5)
    _name(axis, rows)
    return figure


def _scale(axis: Axes, which: str, values: pd.Series[float], wide: float) -> None:
    """Make an axis logarithmic where the largest value is so many times the smallest; plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if values.empty or values.min() <= 0 or values.max() <= wide * values.min():
        return
    decades = np.log10(values.max() / values.min())
    axis.set(**{f"{which}scale": "log"})
    line = axis.xaxis if which == "x" else axis.yaxis
    line.set_major_locator(
        LogLocator(subs=(1, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,))
    )
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_locator(NullLocator())


def _name(axis: Axes, rows: pd.DataFrame) -> None:
    """Write the method beside every mark, moved up or down where names would cover names or marks."""
    from matplotlib.lines import Line2D

    axis.margins(0.06, 0.08)
    scale = axis.transScale
    (left, _), (right, _) = scale.transform([(side, 1.0) for side in axis.get_xlim()])
    right += ROOM_FOR_NAMES / (1 - ROOM_FOR_NAMES) * (right - left)
    axis.set_xlim(right=float(scale.inverted().transform((right, 0.0))[0]))
    figure = cast("Figure", axis.figure)
    names = [
        axis.annotate(row["method"], (row["cost"], row["quality"]), (ASIDE, 0), "data", "offset points", va="center",
                      fontsize=7.5, in_layout=False)
        for row in rows.to_dict("records")
    ]  # fmt: skip
    _lay_out(figure)  # from here on nothing moves but the names
    pixel = figure.dpi / POINTS_PER_INCH
    middles = axis.transData.transform(rows[["cost", "quality"]].to_numpy(float))
    marks = np.hstack([middles - MARK * pixel / 2, middles + MARK * pixel / 2])
    boxes = [name.get_window_extent().extents for name in names]
    for name, shift, (x, y) in zip(names, _shifts(np.array([*boxes, *marks]), len(names)), middles, strict=True):
        name.set_position((ASIDE, shift / pixel))
        ends = np.array([[x, x + (ASIDE - 1) * pixel], [y, y + shift]]) / figure.dpi
        leader = Line2D(*ends, color="0.65", linewidth=0.6, transform=figure.dpi_scale_trans, zorder=1)
        axis.add_artist(leader)


def _shifts(boxes: np.ndarray, n_free: int) -> list[float]:
    """How far to move boxes up so that none overlaps another.

    Args:
        boxes: (n, 4), left, lower, right and upper end of each; not modified.
        n_free: Number of boxes that may move, the first ones.

    Returns:
        A distance for each free box, in the unit of the boxes: to the nearest place that is free when its turn comes, the lowest
        box first.
    """
    placed = list(boxes[n_free:])
    shifts = [0.0] * n_free
    for one in np.argsort(boxes[:n_free, [1, 3]].mean(axis=1), kind="stable"):
        left, low, right, high = boxes[one]
        beside = np.array([box for box in placed if box[0] < right and left < box[2]]).reshape(-1, 4)
        tries = sorted([0.0, *(beside[:, 3] - low), *(beside[:, 1] - high)], key=abs)
        taken = [((beside[:, 1] < high + by - HAIR) & (low + by + HAIR < beside[:, 3])).any() for by in tries]
        shifts[one] = float(tries[taken.index(False)])  # above the highest there is always room
        placed.append(boxes[one] + np.array([0.0, shifts[one], 0.0, shifts[one]]))
    return shifts


def _panels(rows: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """One panel per kind of linear over the blocks; mean over seeds."""
    from matplotlib.ticker import MaxNLocator

    linears = list(rows["linear"].unique())
    present = set(rows["method"])
    methods = [name for name in looks if name in present]
    down = -(-(len(linears) + 1) // PANELS_ACROSS)
    figure, axes = _figure(11.0, 0.4 + 2.1 * down, down * PANELS_ACROSS, PANELS_ACROSS)
    for method in methods:
        look = looks[method]
        style: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "label": method}
        means = rows[rows["method"] == method].groupby(["linear", "block"])[ERROR].mean()
        for axis, linear in zip(axes, linears, strict=False):
            curve = means[linear] if linear in means else means.iloc[:0]
            axis.plot(curve.index, curve, **style, markersize=3.5, linewidth=1)
    for axis, linear in zip(axes, linears, strict=False):
        axis.set_title(linear, fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes[0], "y", rows[ERROR].dropna(), WIDE)
    for axis in axes[len(linears) :]:
        axis.axis("off")
    figure.supxlabel("block", fontsize=8.5)
    figure.supylabel("relative output error", fontsize=8.5)
    axes[len(linears)].legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="center", ncols=1 + len(methods) // 9
    )
    return figure


def _figure(width: float, height: float, panels: int = 1, across: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches, its panels on common axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(panels // across, across, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.grid(True, linewidth=0.3, color="0.85")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7.5, labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lay_out(figure: Figure) -> None:
    """Make room for what is written around the axes, once; saving would do it several times."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _address(figure: Figure) -> str:
    """A figure as SVG in a data address: letters as paths, no date, nothing that refers to the outside."""
    import matplotlib

    _lay_out(figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ptqbench", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = stream.getvalue()
    svg = drawn[drawn.index("<svg") :]  # what is before names a document type on the web
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
