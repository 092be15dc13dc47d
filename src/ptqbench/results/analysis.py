"""Functions for the notebooks in ``analysis/``: layer records, Pareto fronts, paired comparisons, effects of a role, plots.

Frames in, frames out; a plot takes a frame and returns a figure that can be read in black and white. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.tables import KEYS, higher_is_better, pivot, tidy
from ptqbench.runs.folder import RunFolder, all_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>hp"
LINES = ("-", "--", ":", "-.")
WIDE = 5.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""
SHADES = tuple(grey for grey in ("0.0", "0.35", "0.55", "0.7") for _ in LINES)


@dataclasses.dataclass(frozen=True)
class Look:
    """How something is drawn wherever it is drawn; marker and line tell it apart in black and white too."""

    marker: str
    line: str
    colour: str


def deal_looks(names: Iterable[str], colours: Sequence[str] = SHADES) -> dict[str, Look]:
    """Give every name a look of its own; deal once for all plots that are looked at together.

    Args:
        names: Names, perhaps repeated; the first to come gets the first look.
        colours: Dealt one after another, again and again.

    Returns:
        Looks by name. No two of 48 are equal even where colours cannot be seen.
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
    parts = []
    for cell in frame.drop_duplicates("run_id").dropna(subset=["model"]).to_dict("records"):
        try:
            report = pd.read_parquet(RunFolder(Path(str(cell["folder"]))).layers_path)
        except (OSError, ValueError):
            continue
        parts.append(report.assign(**{str(key): cell[key] for key in (*KEYS, "seed", "run_id")}))
    if not parts:
        return pd.DataFrame(columns=[*KEYS, "seed", "run_id", "block", "linear"])
    whole = pd.concat(parts, ignore_index=True)
    first = [*KEYS, "seed", "run_id"]
    return whole[[*first, *(name for name in whole.columns if name not in first)]]


def by_linear(report: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean of a layer figure over blocks and seeds: one row per (model, method, bitwidth), one column per kind of linear."""
    grouped = report.groupby([*KEYS, "linear"], sort=False)[value].mean()
    return grouped.unstack("linear")


def wins(report: pd.DataFrame, first: str, second: str, value: str = "relative_output_error") -> pd.DataFrame:
    """Where is one method's figure lower than another's? One row per (model, bitwidth, linear).

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
            raise ConfigError(
                f"no layer report of method {name!r}; there are {', '.join(sorted(set(report['method'])))}"
            )
    ratio = (sides[1] / sides[0]).dropna().rename("ratio").reset_index()
    grouped = ratio.groupby(["model", "bitwidth", "linear"], sort=False)["ratio"]
    return pd.DataFrame(
        {"median_ratio": grouped.median(), "share_lower": grouped.agg(lambda found: float((found < 1).mean()))}
    )


def pareto(frame: pd.DataFrame, metric: str, cost: str = "effective_w_bits") -> pd.DataFrame:
    """Quality against cost, and which rows no other beats in both.

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
    costs = frame.dropna(subset=["metric"]).drop_duplicates("run_id").groupby(KEYS, sort=False)[cost].mean()
    rows = pd.DataFrame({"cost": costs, "quality": found.mean[metric], "spread": found.spread[metric]})
    rows = (
        rows.replace(np.inf, np.nan).dropna(subset=["cost", "quality"]).reset_index().sort_values("cost", kind="stable")
    )
    sign = -1.0 if higher_is_better(metric) else 1.0
    front = []
    for row in rows.itertuples():
        rivals = rows[rows["model"] == row.model]
        loss = sign * rivals["quality"]
        own = sign * cast("float", row.quality)
        as_good = (rivals["cost"] <= row.cost) & (loss <= own)
        front.append(not bool((as_good & ((rivals["cost"] < row.cost) | (loss < own))).any()))
    return rows.assign(front=front)


def paired_tests(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare every method with a reference of the same model, bitwidth and seed, on the same examples.

    Args:
        frame: As ``cells`` returns it, not modified.
        reference: A method.

    Returns:
        One row per (cell, metric): difference, interval, p-value (Holm over the metrics of the pair), and the verdict in words;
        a pair that cannot be compared has only the reason as its verdict.
    """
    from ptqbench.results.compare import compare_cells

    done = frame.dropna(subset=["metric"]).drop_duplicates("run_id")
    group = ["model", "bitwidth", "seed"]
    references = {tuple(row[key] for key in group): row for row in _records(done) if row["method"] == reference}
    rows: list[dict[str, Any]] = []
    for cell in _records(done):
        base = references.get(tuple(cell[key] for key in group))
        if base is None or cell["method"] == reference:
            continue
        named = {key: cell[key] for key in (*KEYS, "seed")}
        pair = RunFolder(Path(base["folder"])), RunFolder(Path(cell["folder"]))
        try:
            judged = compare_cells(*pair, (reference, cell["method"]))
        except ConfigError as error:
            rows.append({**named, "verdict": str(error)})
            continue
        rows += [
            {**named, "metric": one.metric, "difference": one.found.difference, "low": one.found.low, "high": one.found.high,
             "p_value": one.adjusted, "verdict": one.verdict}
            for one in judged
        ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*KEYS, "seed", "metric", "difference", "low", "high", "p_value", "verdict"])


def seeds(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Spread over seeds: n, mean, standard deviation and t interval per (model, method, bitwidth)."""
    from ptqbench.results.stats import over_seeds

    values = frame[frame["metric"] == metric].groupby(KEYS, sort=False)["value"]
    found = {key: over_seeds([float(v) for v in group]) for key, group in values}
    columns = ["n", "mean", "std", "low", "high"]
    index = pd.MultiIndex.from_tuples(list(found), names=KEYS) if found else None
    return pd.DataFrame([[getattr(one, name) for name in columns] for one in found.values()], index, columns)


def member_name(cell: dict[str, Any], role: str) -> str:
    """A role's member, with the objective of a subspace: activation and joint are two transforms."""
    objective = cell.get("objective")
    named = f"{cell[role]} ({objective})" if role == "transform" and isinstance(objective, str) else cell[role]
    return str(named)


def role_table(frame: pd.DataFrame, metric: str, bitwidth: str) -> pd.DataFrame:
    """Mean over seeds of a metric by roles: rows transform and target, one column per refinement.

    Raises:
        ConfigError: A combination was measured with other settings too, so that the mean would mix them.
    """
    rows = _combinations(frame, metric, bitwidth)
    mixed = rows.groupby([*ROLES, "seed"])["variant"].nunique()
    if (mixed > 1).any():
        raise ConfigError(
            f"{mixed.idxmax()} was measured with several settings; select one before making a table of roles"
        )
    means = rows.groupby(["transform", "target", "refine"], sort=False)["value"].mean()
    return means.unstack("refine", sort=False)[sorted(set(rows["refine"]), key=_plain_first)]


def role_effects(frame: pd.DataFrame, metric: str, bitwidth: str, role: str, baseline: str) -> pd.DataFrame:
    """What does exchanging one member change, everything else equal? Differences are taken within a seed.

    Args:
        frame: A tidy frame, not modified.
        metric: The quality.
        bitwidth: The bitwidth that is looked at.
        role: The role whose members are exchanged.
        baseline: The member that the others are compared with, as ``member_name`` calls it.

    Returns:
        One row per member and combination of the other roles: mean difference to the baseline, its standard error over seeds
        (NaN for one), and the number of seeds.
    """
    rows = _combinations(frame, metric, bitwidth)
    others = [name for name in ROLES if name != role]
    key = [*others, "seed"]
    base = rows.loc[rows[role] == baseline, [*key, "value"]].rename(columns={"value": "base"})
    joined = rows[rows[role] != baseline].merge(base, on=key)
    grouped = joined.assign(difference=joined["value"] - joined["base"]).groupby([role, *others], sort=False)[
        "difference"
    ]
    n = grouped.count()
    return pd.DataFrame({"difference": grouped.mean(), "error": grouped.std() / np.sqrt(n), "n": n})


def _combinations(frame: pd.DataFrame, metric: str, bitwidth: str) -> pd.DataFrame:
    rows = frame[(frame["metric"] == metric) & (frame["bitwidth"] == bitwidth) & (frame["w_bits"] < UNTOUCHED_BITS)]
    if rows["model"].nunique() > 1:
        raise ConfigError(f"expected cells of one model, got {', '.join(sorted(set(rows['model'])))}")
    named = rows.assign(**{role: [member_name(cell, role) for cell in _records(rows)] for role in ROLES})
    members = list(zip(*(named[role] for role in ROLES), strict=True))
    keys = [(*map(_plain_first, of_row), seed) for of_row, seed in zip(members, named["seed"], strict=True)]
    return named.iloc[sorted(range(len(keys)), key=keys.__getitem__)]


def _plain_first(member: Any) -> tuple[bool, str]:
    """Order members by name, behind the one that does nothing."""
    return member not in ("none", "weight"), str(member)


def _by_look(rows: pd.DataFrame, looks: Mapping[str, Look] | None) -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """Split rows by method, in the order in which looks are dealt."""
    for method, look in (looks or deal_looks(sorted(rows["method"]))).items():
        group = rows[rows["method"] == method]
        if len(group):
            yield method, look, group


def plot_pareto(rows: pd.DataFrame, metric: str, cost: str, looks: Mapping[str, Look] | None = None) -> Figure:
    """Draw quality against cost: one marker per method, filled where nothing beats the row in both.

    Args:
        rows: As ``pareto`` returns it, not modified.
        metric: Name of the quality.
        cost: Name of the cost.
        looks: Looks by method, dealt once for all plots that are compared; None deals them by name.
    """
    figure, axis = _axes()
    for method, look, group in _by_look(rows, looks):
        for on_front, part in group.groupby("front"):
            label = method if on_front or not group["front"].any() else None
            face = look.colour if on_front else "white"
            style: dict[str, Any] = {"fmt": look.marker, "color": look.colour, "mfc": face, "label": label}
            axis.errorbar(part["cost"], part["quality"], part["spread"].fillna(0.0), **style, capsize=2)
    wide = len(rows) > 1 and rows["quality"].min() > 0 and rows["quality"].max() > WIDE * rows["quality"].min()
    axis.set_yscale("log" if wide else "linear")
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
    figure, axis = _axes()
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
    figure, axis = _axes(height=1.0 + 0.22 * max(len(effects), 4))
    places = list(range(len(effects)))
    axis.errorbar(
        effects["difference"],
        places,
        xerr=effects["error"].fillna(0.0),
        fmt="ko",
        markersize=4,
        capsize=2,
        elinewidth=1,
    )
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


def _axes(width: float = 6.0, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.grid(True, linewidth=0.3, color="0.85")
    axis.tick_params(labelsize=7)
    return figure, axis


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", frame.to_dict("records"))
