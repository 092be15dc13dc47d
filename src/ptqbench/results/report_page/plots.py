"""The plots of a page, as SVG in data addresses. They can be read without colours."""

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
from ptqbench.results.drawing import WIDE, Look, cut, deal_looks, new_figure, set_scale
from ptqbench.results.metrics import kind, known
from ptqbench.results.report_page.facts import Names, main_metrics, reference_value, unquantized
from ptqbench.results.tables import Pivot, format_value, higher_is_better, pivot, records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {"effective_w_bits": "true bits per weight", "quantize_s": "time to quantize, s"}
KL_COST = "effective_w_bits"
"""The cost against which KL divergences are drawn."""
ERROR = "relative_output_error"
WIDE_COST = 2.0
"""Ratio of largest to smallest cost above which its axis is logarithmic. It is small, because bits differ by small factors."""
FAR = 1.5
"""Ratio of true bits to the next lower ones of a bitwidth from which marks stand at the edge of a plot: the others need room."""
FLOOR_IN_VIEW = 100.0
"""A noise floor further below the lowest KL divergence than by this factor is named, not drawn: it would hide all differences."""
PANELS_ACROSS = 4
ROOM_FOR_NAMES = 0.3
"""Share of the horizontal axis that is kept free at its end."""
HAIR = 1e-6
"""Boxes that overlap by no more than this only touch."""
ASIDE, MARK, POINTS_PER_INCH = 8.0, 6.0, 72.0


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture for a page: its heading, a description for readers who cannot see it, and the data address that holds it."""

    title: str
    alt: str
    address: str


def trade_offs(frame: pd.DataFrame, found: Pivot, references: set[Names]) -> list[Plot]:
    """Draw quality against bits and against time: for every model one plot per main metric and cost.

    Where cells were compared with their unquantized model, one more plot shows the first KL divergence against bits.

    Args:
        frame: As ``tables.tidy`` returns it, not modified; with averages over tasks where there are any.
        found: Its pivot.
        references: Rows of unquantized models.

    Returns:
        No plot where no quantized cell is done.
    """
    # One look per bitwidth for all plots of the page, whatever their rows are sorted by.
    plots = []
    looks = deal_looks(_quantized(frame)["bitwidth"].dropna())
    drawn_pairs = [(metric, cost) for metric in main_metrics(found) for cost in COSTS]
    drawn_pairs += [(metric, KL_COST) for metric in found.mean.columns if kind(metric) == "kl"][:1]
    compared = {(metric, cost): _compared(frame, metric, cost) for metric, cost in drawn_pairs}
    for model in frame["model"].dropna().unique():
        for (metric, cost), rows in compared.items():
            part = rows[rows["model"] == model]
            if len(part):
                line = _line(found, references, str(model), metric)
                drawn = _scatter(part, looks, metric, COSTS[cost], line)
                title = f"{model}: {metric} against {COSTS[cost].removesuffix(', s')}"
                plots.append(Plot(title, _in_words(part, title), _address(drawn)))
    return plots


def trade_off(frame: pd.DataFrame, model: str, metric: str, cost: str = KL_COST) -> Figure:
    """Draw one plot of ``trade_offs``: the quality of the quantized cells of a model against what they cost.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.
        model: The model.
        metric: The quality.
        cost: One of ``COSTS``.

    Raises:
        ConfigError: No cell has the metric.
    """
    rows, found = _compared(frame, metric, cost), pivot(frame)
    looks = deal_looks(_quantized(frame)["bitwidth"].dropna())
    line = _line(found, unquantized(frame), model, metric)
    return _scatter(rows[rows["model"] == model], looks, metric, COSTS[cost], line)


def _line(found: Pivot, references: set[Names], model: str, metric: str) -> tuple[str, float] | None:
    """What a plot has a horizontal line for: the unquantized model, or the noise floor of a KL divergence; None where unknown."""
    if kind(metric) == "kl":
        floor = float(found.noise[metric][found.noise.index.get_level_values("model") == model].max())
        return ("noise floor", floor) if floor > 0 else None
    reference = reference_value(found, references, model, metric)
    return None if reference is None else ("unquantized", reference)


def layers(frame: pd.DataFrame) -> list[Plot]:
    """Draw the relative output error over the blocks, one panel per kind of linear, for the methods at the lowest bitwidth.

    Args:
        frame: As ``tables.tidy`` returns it with a column ``folder``, not modified.

    Returns:
        One plot per model; none for a model without a layer report.
    """
    report = analysis.layers(frame[(frame["folder"] != "") & frame["w_bits"].notna()])
    bits = frame.dropna(subset=["w_bits"]).groupby(["model", "bitwidth"], sort=False)["w_bits"].min()
    plots, looks = [], deal_looks(_quantized(frame)["method"].dropna())  # one look per method for all models
    for model, rows in report.groupby("model", sort=False):
        present = bits[model].loc[list(rows["bitwidth"].unique())]
        lowest = str(cast("pd.Series[int]", present).astype(int).idxmin())
        rows = rows[rows["bitwidth"] == lowest]
        title = f"{model}, {lowest}: relative output error"
        means = rows.groupby("method", sort=False)[ERROR].mean()
        words = ", ".join(f"{method} {value:.2g}" for method, value in means.items())
        alt = f"{title} by block and linear. Means over all linears: {words}."
        plots.append(Plot(title, alt, _address(panels(rows, looks))))
    return plots


def _compared(frame: pd.DataFrame, metric: str, cost: str) -> pd.DataFrame:
    """Quantized rows with ``front``: not beaten by a row of equally precise activations, keys and values.

    The unquantized model is no rival, because it takes no time at all.
    """
    # ``pareto`` compares the rows of one model. Here a "model" is a model with the precision of everything but weights.
    quantized = [bits < UNTOUCHED_BITS for bits in frame["w_bits"]]
    others = ["model", "a_bits", "a_format", "k_bits", "v_bits", "kv_format"]
    precision = list(zip(*(frame[name] for name in others), quantized, strict=True))
    leagues = {str(one): one for one in precision}
    rows = analysis.pareto(frame.assign(model=[str(one) for one in precision]), metric, cost)
    rows = rows[[leagues[name][-1] for name in rows["model"]]]
    return rows.assign(model=[leagues[name][0] for name in rows["model"]])


def _quantized(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in which anything is stored in fewer than 16 bits."""
    bits = frame[["w_bits", "a_bits", "k_bits", "v_bits"]].astype(float)
    return frame[(bits < UNTOUCHED_BITS).any(axis=1)]


def _in_words(rows: pd.DataFrame, title: str) -> str:
    best = [f"{row['method']} {row['bitwidth']}" for row in records(rows[rows["front"]])]
    return f"{title}: {len(rows)} methods and bitwidths. Not beaten in both: {', '.join(best)}."


def _scatter(
    rows: pd.DataFrame, looks: Mapping[str, Look], metric: str, label: str, line: tuple[str, float] | None
) -> Figure:
    percent = 100.0 if known(metric).share else 1.0  # shares are fractions in the frame
    rows = rows.assign(quality=percent * rows["quality"], spread=percent * rows["spread"], name=rows["method"].map(cut))
    if label == COSTS[KL_COST]:
        rows = _within_reach(rows)
    figure, (axis,) = new_figure(5.4, 4.1)
    for bitwidth in (name for name in looks if (rows["bitwidth"] == name).any()):
        marker, colour = looks[bitwidth].marker, looks[bitwidth].colour
        axis.plot([], [], marker, color=colour, label=bitwidth)
        for on_front, part in rows[rows["bitwidth"] == bitwidth].groupby("front"):
            look: dict[str, Any] = {"fmt": marker, "color": colour, "mfc": colour if on_front else "white"}
            axis.errorbar(part["cost"], part["quality"], part["spread"].fillna(0.0), **look, capsize=2, elinewidth=0.8)
    # Scales, then the line, then words: names go where marks and axes leave room.
    lowest, in_view = rows["quality"].min(), line is not None
    if kind(metric) == "kl":  # logarithmic in any case
        in_view = line is not None and line[1] >= lowest / FLOOR_IN_VIEW
        set_scale(axis, "y", pd.Series([*rows["quality"], line[1] if line is not None and in_view else lowest]), 0.0)
    else:
        set_scale(axis, "y", rows["quality"], WIDE)
    set_scale(axis, "x", rows["cost"], WIDE_COST)
    if line is not None:
        name, value = line
        words, height = f"{name} {format_value(metric, value)}", percent * value
        if in_view:
            axis.axhline(height, color="0.3", linewidth=1, linestyle=":")
        axis.annotate(
            words if in_view else f"{words}, below this axis", (1, height if in_view else 0),
            (-3, 3), ("axes fraction", "data" if in_view else "axes fraction"),
            "offset points", ha="right", fontsize=7.5, color="0.3",
        )  # fmt: skip
    axis.set_xlabel(label)
    unit = ", nats" if kind(metric) == "kl" else ", %" if known(metric).share else ""
    axis.set_ylabel(f"{metric}{unit} ({'higher' if higher_is_better(metric) else 'lower'} is better)")
    axis.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=5)
    _name(axis, rows)
    return figure


def _within_reach(rows: pd.DataFrame) -> pd.DataFrame:
    """Move marks that lie far behind the others to the edge of the plot; their names say where they belong."""
    # Of every bitwidth, in the order of their bits, the marks behind the first jump.
    steps = rows.sort_values("cost").groupby("bitwidth", sort=False)["cost"]
    jumps = steps.transform(lambda bits: (bits > FAR * bits.shift()).cummax()).reindex(rows.index).astype(bool)
    near = rows["cost"][~jumps]
    far = jumps & (rows["cost"] > near.max())
    edge = near.max() + 0.15 * max(near.max() - near.min(), 1.0)
    said = [f"{name}: {cost:.2f} bits →" for name, cost in zip(rows["name"], rows["cost"], strict=True)]
    return rows.assign(cost=rows["cost"].mask(far, edge), name=rows["name"].mask(far, pd.Series(said, rows.index)))


def _name(axis: Axes, rows: pd.DataFrame) -> None:
    """Write the method beside every mark. A name that would cover a name or mark is moved up or down, with a leader line."""
    from matplotlib.lines import Line2D

    # Widen the axis to the right, in its own scale, for the names.
    axis.margins(0.06, 0.08)
    scale = axis.transScale
    (left, _), (right, _) = scale.transform([(side, 1.0) for side in axis.get_xlim()])
    right += ROOM_FOR_NAMES / (1 - ROOM_FOR_NAMES) * (right - left)
    axis.set_xlim(right=float(scale.inverted().transform((right, 0.0))[0]))
    figure = cast("Figure", axis.figure)
    names = [
        axis.annotate(row["name"], (row["cost"], row["quality"]), (ASIDE, 0), "data", "offset points", va="center",
                      fontsize=7.5, in_layout=False)
        for row in records(rows)
    ]  # fmt: skip
    _lay_out(figure)  # from here on nothing moves but the names
    # Boxes of names and marks in pixels; the names move until none overlaps.
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
    """How far to move boxes up or down so that none overlaps another.

    Args:
        boxes: (n, 4), left, lower, right and upper end of each; not modified.
        n_free: Number of boxes that may move, the first ones.

    Returns:
        For each free box the distance upwards, in the unit of the boxes. The lowest box is placed first; each box goes to the
        nearest place that is free when its turn comes.
    """
    placed = list(boxes[n_free:])
    shifts = [0.0] * n_free
    for one in np.argsort(boxes[:n_free, [1, 3]].mean(axis=1), kind="stable"):
        # Only boxes that share a vertical line with this one are in its way; it may touch any of them from above or below.
        left, low, right, high = boxes[one]
        beside = np.array([box for box in placed if box[0] < right and left < box[2]]).reshape(-1, 4)
        tries = sorted([0.0, *(beside[:, 3] - low), *(beside[:, 1] - high)], key=abs)
        taken = [((beside[:, 1] < high + by - HAIR) & (low + by + HAIR < beside[:, 3])).any() for by in tries]
        shifts[one] = float(tries[taken.index(False)])  # above the highest there is always room
        placed.append(boxes[one] + np.array([0.0, shifts[one], 0.0, shifts[one]]))
    return shifts


def panels(rows: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """One panel per kind of linear over the blocks; mean over seeds."""
    from matplotlib.ticker import MaxNLocator

    linears = list(rows["linear"].unique())
    present = set(rows["method"])
    methods = [name for name in looks if name in present]
    down = -(-(len(linears) + 1) // PANELS_ACROSS)
    figure, axes = new_figure(11.0, 0.4 + 2.1 * down, down * PANELS_ACROSS, PANELS_ACROSS)
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
    set_scale(axes[0], "y", rows[ERROR].dropna(), WIDE)
    for axis in axes[len(linears) :]:
        axis.axis("off")
    figure.supxlabel("block", fontsize=8.5)
    figure.supylabel("relative output error", fontsize=8.5)
    axes[len(linears)].legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="center", ncols=1 + len(methods) // 9
    )
    return figure


def _lay_out(figure: Figure) -> None:
    """Make room for what is written around the axes, once; saving a figure would do it several times."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _address(figure: Figure) -> str:
    """A figure as SVG in a data address: letters are paths, there is no date, and nothing refers to the outside."""
    import matplotlib

    _lay_out(figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ptqbench", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = stream.getvalue()
    svg = drawn[drawn.index("<svg") :]  # the text before it refers to a document type on the web
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
