"""Functions for the notebooks in ``analysis/``: layer records, Pareto fronts, paired comparisons, effects of a role, plots.

They take frames and return frames. A plot takes a frame and returns a figure that can be read in black and white. Quality against
cost and errors by layer are drawn as on the report page (``report_page.plots``). No torch.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ptqbench.cell.spec import ROLES, UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.drawing import new_figure, set_scale
from ptqbench.results.metrics import kind, known, part
from ptqbench.results.tables import KEYS, higher_is_better, pivot, records, tidy
from ptqbench.results.tables.tidy import DRAW
from ptqbench.runs.folder import RunFolder, all_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS = ("../runs", "../demo/runs")
"""Where a notebook looks for run folders, from its own folder."""
LEVEL = 0.05
"""P-value below which a difference is marked as one."""
WITH_FIDELITY = '"python -m ptqbench sweep SWEEP evaluation.fidelity=true" measures it'


def here(*roots: str) -> pd.DataFrame:
    """Read the run folders that a notebook is about, and print where they are.

    Args:
        roots: Folders of run folders. The first that has a finished cell is read. None is given: ``PTQBENCH_RUNS`` if set, else
            ``RUNS``.

    Returns:
        As ``cells``.

    Raises:
        ConfigError: No folder has a finished cell.
    """
    looked = roots or tuple(filter(None, [os.environ.get("PTQBENCH_RUNS")])) or RUNS
    for root in looked:
        frame = cells(root)
        n_done = frame.dropna(subset=["metric"])["run_id"].nunique()
        if n_done:
            print(f"{n_done} finished cells in {root}")
            return frame
    raise ConfigError(
        f'no finished cell in {" or ".join(looked)}: run "make demo" in the repository, or set PTQBENCH_RUNS=FOLDER'
    )


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
    sides = [report[report["method"] == name].groupby(key, sort=False)[value].mean() for name in (first, second)]
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
        the verdict in words. Cells that differ in their rotation seed or replicate are one row. A pair that cannot be compared
        has only the reason as its verdict.
    """
    from ptqbench.results.compare import compare_sides
    from ptqbench.results.sides import rows_of

    # Every finished row of a seed, all its rotation seeds together, against the reference of its model and bitwidth.
    done = frame.dropna(subset=["metric"])
    folders = {name: RunFolder(Path(path)) for name, path in zip(done["run_id"], done["folder"], strict=True)}
    found: list[dict[str, Any]] = []
    for seed, cells_of_seed in done.groupby("seed", sort=False):
        rows = rows_of(cells_of_seed, folders)
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
    """Spread over seeds: n, mean, standard deviation and t interval per (model, method, bitwidth).

    A cell that was also measured with another evaluation counts once. What is unknown, as the spread of one seed, is NaN.
    """
    from ptqbench.results.stats import over_seeds

    rows = frame[frame["metric"] == metric].drop_duplicates([*KEYS, *DRAW])
    values = rows.groupby(KEYS, sort=False)["value"]
    found = {key: dataclasses.astuple(over_seeds(group.tolist())) for key, group in values}
    index = pd.MultiIndex.from_tuples(list(found), names=KEYS) if found else None
    table = pd.DataFrame(list(found.values()), index, ["n", "mean", "std", "low", "high"])
    return table.astype(dict.fromkeys(("std", "low", "high"), float))


def member_name(cell: dict[str, Any], role: str) -> str:
    """Name the member of a role; a subspace with its objective, because activation and joint are two transforms."""
    objective = cell.get("objective")
    return f"{cell[role]} ({objective})" if role == "transform" and isinstance(objective, str) else str(cell[role])


def role_table(frame: pd.DataFrame, metric: str, bitwidth: str) -> pd.DataFrame:
    """Mean over seeds of a metric by roles: rows transform, target and solver, one column per refinement.

    Raises:
        ConfigError: There is no such cell, or a combination was measured with other settings too, so that the mean would mix them.
    """
    rows = _combinations(frame, metric, bitwidth)
    means = rows.groupby([*ROLES], sort=False)["value"].mean()
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
    if rows.empty:
        known = "; ".join(
            " ".join(names) for names in frame[["model", "bitwidth"]].dropna().drop_duplicates().to_numpy()
        )
        raise ConfigError(
            f"no quantized cell at bitwidth {bitwidth!r} with {metric}; there are {known or 'none at all'}"
        )
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


def with_fidelity(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of a tidy frame that were compared with their unquantized model.

    Raises:
        ConfigError: There is none.
    """
    measured = frame.loc[[isinstance(name, str) and known(name).relative for name in frame["metric"]], "run_id"]
    if measured.empty:
        raise ConfigError(f"no cell was compared with its unquantized model; {WITH_FIDELITY}")
    return frame[frame["run_id"].isin(set(measured))]


def divergence(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How the KL divergence from the unquantized model is spread over positions.

    Args:
        frame: As ``cells`` returns it, not modified.
        metric: A metric ``LABEL/kl``.

    Returns:
        One row per (model, method, bitwidth, seed) with this metric: ``mean``, ``median``, ``p90``, ``p99``, ``max`` and ``noise``
        in nats.

    Raises:
        ConfigError: No cell has the metric.
    """
    rows = frame[frame["metric"] == metric].drop_duplicates([*KEYS, *DRAW])
    if rows.empty:
        raise ConfigError(f"no finished cell has {metric}; {WITH_FIDELITY}")
    names = ["median", "p90", "p99", "max", "noise"]
    recorded = [part((RunFolder(Path(folder)).result() or {})["metrics"], metric) for folder in rows["folder"]]
    found = pd.DataFrame([[one.get(name) for name in names] for one in recorded], columns=names, dtype=float)
    index = pd.MultiIndex.from_frame(rows[[*KEYS, "seed"]])
    return found.set_index(index).assign(mean=rows["value"].to_numpy())[["mean", *names]]


def plot_divergence(spread: pd.DataFrame) -> Figure:
    """Draw what ``divergence`` returns, one row per cell: a line from the median to the 99th percentile, a mark at the mean.

    Cells at the noise floor, such as the unquantized model, are left out.
    """
    spread = spread[spread["mean"] > 2 * spread["noise"]].sort_values("mean", kind="stable")
    figure, axis, places = _rows([f"{method} {bitwidth}" for _, method, bitwidth, _ in spread.index])
    axis.hlines(places, spread["median"], spread["p99"], color="0.55", linewidth=1)
    for name, mark in {"median": "|", "mean": "o", "p90": "D", "p99": ">"}.items():
        axis.plot(spread[name], places, mark, color="black", markersize=4 if mark in "oD" else 6, label=name)
    set_scale(axis, "x", pd.concat([spread["median"], spread["p99"]]), 1.0)
    axis.set_xlabel("KL divergence of a position, nats (lower is better)")
    figure.legend(loc="outside upper right", ncols=4, fontsize=7.5, frameon=False)
    return figure


def plot_tests(tests: pd.DataFrame, metric: str, reference: str) -> Figure:
    """Draw the differences of a metric to a reference with their 95 % intervals, the best method on top.

    Args:
        tests: As ``paired_tests`` returns it, not modified.
        metric: The metric.
        reference: The method that the others are compared with.

    Raises:
        ConfigError: No pair has the metric.
    """
    up = higher_is_better(metric)
    rows = tests[tests["metric"] == metric].dropna(subset=["difference"])
    if rows.empty:
        raise ConfigError(f"no cell could be compared with {reference} in {metric}; name another reference or metric")
    rows = rows.sort_values(["bitwidth", "difference"], ascending=[True, not up], kind="stable")
    # What differs between rows names them. KL divergences are in nats, all else in percent.
    keys = [key for key in (*KEYS, "seed") if key in ("method", "bitwidth") or rows[key].nunique() > 1]
    scale = 1.0 if kind(metric) == "kl" else 100.0
    figure, axis, places = _rows([" ".join(map(str, names)) for names in rows[keys].to_numpy()])
    middle, low, high = (scale * rows[name].to_numpy(float) for name in ("difference", "low", "high"))
    axis.hlines(places, low, high, color="0.35", linewidth=1)
    real = (rows["p_value"] < LEVEL).to_numpy()
    for these, face, sign in ((real, "black", "<"), (~real, "white", "≥")):
        style: dict[str, Any] = {
            "color": "black",
            "mfc": face,
            "markersize": 4.5,
            "label": f"p {sign} {LEVEL:g}, corrected",
        }
        axis.plot(middle[these], np.array(places)[these], "o", **style)
    axis.axvline(0.0, color="0.4", linewidth=1, linestyle=":")
    unit = {"perplexity": "%", "kl": "nats"}.get(kind(metric), "points")
    axis.set_xlabel(f"{metric}: difference to {reference}, {unit} (better: {'right' if up else 'left'})")
    figure.legend(loc="outside upper right", ncols=2, fontsize=7.5, frameon=False)
    return figure


def plot_effects(effects: pd.DataFrame, metric: str) -> Figure:
    """Draw finite differences to a baseline with one standard error, one row per combination."""
    effects = effects[np.isfinite(effects["difference"])]
    figure, axis, places = _rows([f"{key[0]}  ({' + '.join(map(str, key[1:]))})" for key in effects.index])
    style: dict[str, Any] = {"fmt": "ko", "markersize": 4, "capsize": 2, "elinewidth": 1}
    axis.errorbar(effects["difference"], places, xerr=effects["error"].fillna(0.0), **style)
    axis.axvline(0.0, color="0.4", linewidth=1, linestyle=":")
    better = "right" if higher_is_better(metric) else "left"
    axis.set_xlabel(f"change of {metric} (better: {better})")
    return figure


def _rows(names: list[str]) -> tuple[Figure, Axes, list[int]]:
    """A figure with one named row after another from top to bottom, and the heights of the rows."""
    figure, (axis,) = new_figure(6.0, 1.0 + 0.22 * max(len(names), 2))
    places = list(range(len(names)))
    axis.set_yticks(places, names, fontsize=7.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=6)
    return figure, axis, places
