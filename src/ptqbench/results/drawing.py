"""What all plots share: how a method is drawn, empty figures that Jupyter shows, scales, files."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = ("#0b4f8a", "#c2571a", "#2e7d4f", "#7a3e9d", "#8a6d00", "#444444", "#0f8b8d", "#b03060")
MARKERS = "osD^vP*X<>hp"
LINES = ("-", "--", ":", "-.")
WIDE = 5.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""
LONGEST_NAME = 26
SHARPNESS = 2
"""Dots of a picture in a notebook per dot of the page."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How a method or bitwidth is drawn in every plot; marker and line tell it apart in black and white too."""

    marker: str
    line: str
    colour: str


def deal_looks(names: Iterable[str], colours: Sequence[str] = COLOURS) -> dict[str, Look]:
    """Give every name a look of its own. Deal once for all plots that are compared.

    Args:
        names: Names, perhaps repeated; looks are dealt in the order in which names first appear.
        colours: Dealt in turn, from the beginning again after the last.

    Returns:
        Looks by name. 48 names differ in marker or line, so that they can be told apart without colours.
    """
    return {
        name: Look(MARKERS[i % len(MARKERS)], LINES[(i + i // len(MARKERS)) % len(LINES)], colours[i % len(colours)])
        for i, name in enumerate(dict.fromkeys(names))
    }


class Picture(Figure):
    """A figure that Jupyter shows as a picture. pyplot, which would do the same, keeps every figure until it is closed."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, and the size in dots at which the page shows it."""
        drawn = io.BytesIO()
        self.savefig(drawn, format="png", dpi=SHARPNESS * self.dpi, metadata={"Software": None})
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        return drawn.getvalue(), {"width": width, "height": height}


def new_figure(width: float, height: float, panels: int = 1, across: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of this size in inches, its panels on common axes."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(panels // across, across, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.grid(True, linewidth=0.3, color="0.85")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7.5, labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def set_scale(axis: Axes, which: str, values: pd.Series[float], wide: float) -> None:
    """Make an axis logarithmic if the largest value is more than ``wide`` times the smallest; its ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if values.empty or values.min() <= 0 or values.max() <= wide * values.min():
        return
    decades = np.log10(values.max() / values.min())  # the fewer, the more ticks within each
    axis.set(**{f"{which}scale": "log"})
    line = axis.xaxis if which == "x" else axis.yaxis
    line.set_major_locator(
        LogLocator(subs=(1, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,))
    )
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_locator(NullLocator())


def cut(name: str) -> str:
    """A name that fits beside a mark or an axis; options at its end are left out."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def save(figure: Figure, name: str, folder: str | Path | None = None) -> list[Path]:
    """Write a figure as PNG and PDF, without the time of day in either.

    Args:
        figure: The figure.
        name: Name of both files.
        folder: Where they are written; None is ``PTQBENCH_FIGURES`` if set, else ``figures``.

    Returns:
        Both files.
    """
    root = Path(folder or os.environ.get("PTQBENCH_FIGURES") or "figures")
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{name}.png", root / f"{name}.pdf"]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths
