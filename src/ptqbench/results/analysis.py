"""Functions for the notebooks in ``analysis/``: layer records, Pareto fronts, paired comparisons, effects of a role, plots.

They take frames and return frames. A plot takes a frame and returns a figure that can be read in black and white. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.tables import KEYS, higher_is_better, pivot, records, tidy
from ptqbench.runs.folder import RunFolder, all_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>hp"
LINES = ("-", "--", ":", "-.")
WIDE = 5.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""
SHADES = tuple(grey for grey in ("0.0", "0.35", "0.55", "0.7") for _ in LINES)


@dataclasses.dataclass(frozen=True)
class Look:
    """How a method or bitwidth is drawn in every plot; marker and line tell it apart in black and white too."""

    marker: str
    line: str
    colour: str


def deal_looks(names: Iterable[str], colours: Sequence[str] = SHADES) -> dict[str, Look]:
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


def cells(root: str | Path) -> pd.DataFrame:
    """Read every run folder under a root into a tidy frame; column ``folder`` says where each cell lies."""
    folders = list(all_runs(Path(root)))
    frame = tidy((folder, None) for folder in folders)
    paths = {folder.run_id: str(folder.path) for folder in folders}
    return frame.assign(folder=[paths[run_id] for run_id in frame["run_id"]])


def layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Collect the layer records of cells.

    Args:
        frame: As ``cells`` returns it, not modified.

    Returns:
        One row per (cell, linear): model, method, bitwidth, seed, run_id, then the columns of ``layers.parquet``. Cells without
        a readable report are left out.
    """
    parts, first = [], [*KEYS, "seed", "run_id"]
    for cell in records(frame.drop_duplicates("run_id").dropna(subset=["model"])):
        try:
            report = pd.read_parquet(RunFolder(Path(cell["folder"])).layers_path)
        except (OSError, ValueError):
            continue
        parts.append(report.assign(**{key: cell[key] for key in first}))
    # The columns that name a cell come first.
    if not parts:
        return pd.DataFrame(columns=[*first, "block", "linear"])
    whole = pd.concat(parts, ignore_index=True)
    return whole[[*first, *(name for name in whole.columns if name not in first)]]


def by_linear(report: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean of a layer figure over blocks and seeds: one row per (model, method, bitwidth), one column per kind of linear."""
    return report.groupby([*KEYS, "linear"], sort=False)[value].mean().unstack("linear")


def wins(report: pd.DataFrame, first: str, second: str, value: str = "relative_output_error") -> pd.DataFrame:
    """Where one method's figure is lower than another's: one row per (model, bitwidth, linear).

    Args:
        report: As ``layers`` returns it, not modified.
        first: Method whose figures are the denominator.
        second: Method whose figures are compared.
        value: A column in which lower is better.

    Returns:
        ``median_ratio`` of second over first, and the share of blocks and seeds in which the second is lower.

    Raises:
        ConfigError: A method has no report.
    """
    key = ["model", "bitwidth", "seed", "block", "linear"]
    sides = [report[report["method"] == name].set_index(key)[value] for name in (first, second)]
    for name, side in zip((first, second), sides, strict=True):
        if side.empty:
            known = ", ".join(sorted(set(report["method"])))
            raise ConfigError(f"no layer report of method {name!r}; there are {known}")
    # The same linear of the same block and seed in both.
    ratio = (sides[1] / sides[0]).dropna().rename("ratio").reset_index()
    grouped = ratio.groupby(["model", "bitwidth", "linear"], sort=False)["ratio"]
    share = grouped.agg(lambda found: float((found < 1).mean()))
    return pd.DataFrame({"median_ratio": grouped.median(), "share_lower": share})


def pareto(frame: pd.DataFrame, metric: str, cost: str = "effective_w_bits") -> pd.DataFrame:
    """Quality against cost, and the rows that no other row of the model beats.

    A row is beaten by one that is at least as good in both, and better in one.

    Args:
        frame: A tidy frame, not modified.
        metric: The quality.
        cost: A column of the tidy frame in which lower is better: ``effective_w_bits``, ``packed_bytes`` or ``quantize_s``.

    Returns:
        One row per (model, method, bitwidth) with ``cost``, ``quality``, ``spread`` (seeds) and ``front``, cheapest first.
    """
    found = pivot(frame)
    if metric not in found.mean:
        raise ConfigError(f"no metric {metric!r}; there are {', '.join(found.mean.columns)}")
    # A row costs the mean over its cells; a row without a finite quality is left out.
    costs = frame.dropna(subset=["metric"]).drop_duplicates("run_id").groupby(KEYS, sort=False)[cost].mean()
    rows = pd.DataFrame({"cost": costs, "quality": found.mean[metric], "spread": found.spread[metric]})
    rows = rows.replace(np.inf, np.nan).dropna(subset=["cost", "quality"]).reset_index()
    rows = rows.sort_values("cost", kind="stable")
    # Every row (across) against every other of its model (down): as good in both, and better in one.
    price, loss = rows["cost"].to_numpy(), (-1.0 if higher_is_better(metric) else 1.0) * rows["quality"].to_numpy()
    model = rows["model"].to_numpy()
    as_good = (price[:, None] <= price) & (loss[:, None] <= loss) & (model[:, None] == model)
    better = (price[:, None] < price) | (loss[:, None] < loss)
    return rows.assign(front=~(as_good & better).any(axis=0))


def paired_tests(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare every method with a reference of the same model, bitwidth and seed, on the same examples.

    Args:
        frame: As ``cells`` returns it, not modified.
        reference: A method.

    Returns:
        One row per (model, method, bitwidth, seed, metric): difference, interval, p-value (Holm over the metrics of the pair), and
        the verdict in words. Cells that differ in their rotation seed are one row. A pair that cannot be compared has only the
        reason as its verdict.
    """
    from ptqbench.results.compare import compare_sides
    from ptqbench.results.sides import rows_of

    # Every finished row of a seed, all its rotation seeds together, against the reference of its model and bitwidth.
    done = frame.dropna(subset=["metric"])
    folders = {name: RunFolder(Path(path)) for name, path in zip(done["run_id"], done["folder"], strict=True)}
    found: list[dict[str, Any]] = []
    for seed, part in done.groupby("seed", sort=False):
        rows = rows_of(part, folders)
        references = {(row.names[0], row.names[2]): row for row in rows if row.names[1] == reference}
        for row in rows:
            base = references.get((row.names[0], row.names[2]))
            if base is None or row.names[1] == reference:
                continue
            named = {**dict(zip(KEYS, row.names, strict=True)), "seed": seed}
            try:
                judged = compare_sides(base.side, row.side, (reference, row.names[1]))
            except ConfigError as error:
                found.append({**named, "verdict": str(error)})
                continue
            for one in judged:
                said = {"metric": one.metric, "p_value": one.adjusted, "verdict": one.verdict}
                found.append(named | dataclasses.asdict(one.found) | said)
    return pd.DataFrame(found, columns=[*KEYS, "seed", "metric", "difference", "low", "high", "p_value", "verdict"])


def seeds(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Spread over seeds: n, mean, standard deviation and t interval per (model, method, bitwidth)."""
    from ptqbench.results.stats import over_seeds

    values = frame[frame["metric"] == metric].groupby(KEYS, sort=False)["value"]
    found = {key: dataclasses.astuple(over_seeds(group.tolist())) for key, group in values}
    index = pd.MultiIndex.from_tuples(list(found), names=KEYS) if found else None
    return pd.DataFrame(list(found.values()), index, ["n", "mean", "std", "low", "high"])


def member_name(cell: dict[str, Any], role: str) -> str:
    """Name the member of a role; a subspace with its objective, because activation and joint are two transforms."""
    objective = cell.get("objective")
    return f"{cell[role]} ({objective})" if role == "transform" and isinstance(objective, str) else str(cell[role])


def role_table(frame: pd.DataFrame, metric: str, bitwidth: str) -> pd.DataFrame:
    """Mean over seeds of a metric by roles: rows transform and target, one column per refinement.

    Raises:
        ConfigError: A combination was measured with other settings too, so that the mean would mix them.
    """
    rows = _combinations(frame, metric, bitwidth)
    means = rows.groupby(["transform", "target", "refine"], sort=False)["value"].mean()
    return means.unstack("refine", sort=False)[list(rows["refine"].sort_values(key=_plain_first).unique())]


def role_effects(frame: pd.DataFrame, metric: str, bitwidth: str, role: str, baseline: str) -> pd.DataFrame:
    """What exchanging one member of a role changes, with everything else equal. Differences are taken within a seed.

    Args:
        frame: A tidy frame, not modified.
        metric: The quality.
        bitwidth: The bitwidth of the cells that are compared.
        role: The role whose members are exchanged.
        baseline: The member that the others are compared with, as ``member_name`` calls it.

    Returns:
        One row per member and combination of the other roles: mean difference to the baseline, its standard error over seeds
        (NaN for one), and the number of seeds.

    Raises:
        ConfigError: As ``role_table``.
    """
    rows = _combinations(frame, metric, bitwidth)
    # One value per combination and seed: rotation seeds are averaged first, so that n counts what is independent.
    rows = rows.groupby([*ROLES, "seed"], sort=False)["value"].mean().reset_index()
    others = [name for name in ROLES if name != role]
    base = rows[rows[role] == baseline].drop(columns=role).rename(columns={"value": "base"})
    pairs = rows[rows[role] != baseline].merge(base, on=[*others, "seed"])
    pairs["difference"] = pairs["value"] - pairs["base"]
    grouped = pairs.groupby([role, *others], sort=False)["difference"]
    n = grouped.count()
    return pd.DataFrame({"difference": grouped.mean(), "error": grouped.std() / np.sqrt(n), "n": n})


def _combinations(frame: pd.DataFrame, metric: str, bitwidth: str) -> pd.DataFrame:
    """Rows of one metric and bitwidth with the names of their members, ordered by members, then by seed."""
    rows = frame[(frame["metric"] == metric) & (frame["bitwidth"] == bitwidth) & (frame["w_bits"] < UNTOUCHED_BITS)]
    if rows["model"].nunique() > 1:
        raise ConfigError(f"expected cells of one model, got {', '.join(sorted(set(rows['model'])))}")
    named = rows.assign(**{role: [member_name(cell, role) for cell in records(rows)] for role in ROLES})
    mixed = named.groupby([*ROLES, "seed"])["variant"].nunique()
    if (mixed > 1).any():
        members = mixed.idxmax()
        raise ConfigError(f"{members} was measured with several settings; select one before comparing roles")
    return named.sort_values([*ROLES, "seed"], kind="stable", key=_plain_first)


def _plain_first(members: pd.Series[str]) -> pd.Series[str]:
    """Sort key of members: the one that does nothing, then the others by name."""
    return members.where(~members.isin(["none", "weight"]), "")


def _by_look(rows: pd.DataFrame, looks: Mapping[str, Look] | None) -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """Rows of one method after another with its look, in the order in which looks were dealt."""
    for method, look in (looks or deal_looks(sorted(rows["method"]))).items():
        group = rows[rows["method"] == method]
        if len(group):
            yield method, look, group


def plot_pareto(rows: pd.DataFrame, metric: str, cost: str, looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw quality against cost: one marker per method, filled where no other row beats it.

    Args:
        rows: As ``pareto`` returns it, not modified.
        metric: Name of the quality.
        cost: Name of the cost.
        looks: Looks by method, dealt once for all plots that are compared; None deals them by name.
    """
    figure, (axis,) = new_figure(6.0, 3.6)
    for method, look, group in _by_look(rows, looks):
        for on_front, part in group.groupby("front"):
            label = method if on_front or not group["front"].any() else None
            face = look.colour if on_front else "white"
            style: dict[str, Any] = {"fmt": look.marker, "color": look.colour, "mfc": face, "label": label}
            axis.errorbar(part["cost"], part["quality"], part["spread"].fillna(0.0), **style, capsize=2)
    set_scale(axis, "y", rows["quality"], WIDE)
    axis.set_xlabel(f"{cost} (lower is better)")
    axis.set_ylabel(f"{metric} ({'higher' if higher_is_better(metric) else 'lower'} is better)")
    axis.legend(fontsize=7, title="filled: not beaten in both", title_fontsize=7)
    return figure


def plot_layers(report: pd.DataFrame, value: str, linear: str, looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw a layer figure over the blocks, one look per method; mean over seeds.

    Args:
        report: As ``layers`` returns it, not modified.
        value: One of its columns.
        linear: The kind of linear.
        looks: Looks by method, dealt once for all plots that are compared; None deals them by name.
    """
    rows = report[report["linear"] == linear]
    figure, (axis,) = new_figure(6.0, 3.6)
    for method, look, group in _by_look(rows, looks):
        curve = group.groupby("block")[value].mean()
        style: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "label": method}
        axis.plot(curve.index, curve, **style, markersize=3, linewidth=1)
    axis.set_xlabel("block")
    axis.set_ylabel(f"{value}, {linear}")
    axis.set_yscale("log" if (rows[value].dropna() > 0).all() and len(rows) else "linear")
    axis.legend(fontsize=7)
    return figure


def plot_effects(effects: pd.DataFrame, metric: str) -> Figure:
    """Draw finite differences to a baseline with one standard error, one row per combination."""
    effects = effects[np.isfinite(effects["difference"])]
    figure, (axis,) = new_figure(6.0, 1.0 + 0.22 * max(len(effects), 4))
    places = list(range(len(effects)))
    style: dict[str, Any] = {"fmt": "ko", "markersize": 4, "capsize": 2, "elinewidth": 1}
    axis.errorbar(effects["difference"], places, xerr=effects["error"].fillna(0.0), **style)
    axis.axvline(0.0, color="0.4", linewidth=1, linestyle=":")
    axis.set_yticks(places, [f"{key[0]}  ({' + '.join(map(str, key[1:]))})" for key in effects.index], fontsize=6)
    axis.invert_yaxis()
    better = "right" if higher_is_better(metric) else "left"
    axis.set_xlabel(f"change of {metric} (better: {better})")
    return figure


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF, without the time of day in either."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{name}.png", root / f"{name}.pdf"]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def new_figure(width: float, height: float, panels: int = 1, across: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of this size in inches, its panels on common axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
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
