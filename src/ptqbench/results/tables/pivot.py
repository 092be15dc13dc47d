"""Tidy frame -> comparison: one row per (model, method, bitwidth), means over seeds with spread, what is missing and why.

Never averaged: seeds of which one is missing, task sets that differ, and values measured under different protocols, which get
columns of their own (``name@2``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import AVERAGE, higher_is_better, kind, order
from ptqbench.results.tables.names import KEYS

BITS = ["nominal_w_bits", "effective_w_bits"]
NEVER_RUN = ("excluded", "skipped")
NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Pivot:
    """A comparison. All frames have the same rows, and one column per metric.

    Attributes:
        bits: Columns ``nominal_w_bits``, ``effective_w_bits`` and ``n_seeds`` (those that were asked for).
        mean: Mean over seeds; NaN where any seed that was asked for is missing, infinite where a seed has no finite value.
        spread: Sample standard deviation over seeds; NaN for one seed, and where the mean is infinite.
        error: Standard error of the mean: from the seeds where there are several, else the sampling error of the evaluation.
        count: Number of seeds in the mean.
        reasons: Why a row has missing cells: state, reason and seeds in words.
        protocols: What each column was measured on; several where cells of a column only differ in what cannot matter.
    """

    bits: pd.DataFrame
    mean: pd.DataFrame
    spread: pd.DataFrame
    error: pd.DataFrame
    count: pd.DataFrame
    reasons: dict[tuple[str, ...], str]
    protocols: dict[str, str]


def pivot(frame: pd.DataFrame) -> Pivot:
    """Pivot a tidy frame.

    Args:
        frame: As ``tidy`` returns it, not modified. Cells whose model is unknown are left out.

    Returns:
        Rows model by model, the unquantized one first, bitwidths together, else in order of first appearance.
    """
    known = frame.dropna(subset=["model"])
    known = known.assign(draw=[draw(*seeds) for seeds in zip(known["seed"], known["rotation_seed"], strict=True)])
    done, protocols = _by_protocol(known.dropna(subset=["metric"]))
    done = done.drop_duplicates([*KEYS, "metric", "seed", "rotation_seed"])
    rows = pd.MultiIndex.from_frame(_row_order(known))
    cells = known.drop_duplicates([*KEYS, "draw", "run_id", "state"])
    wanted = cells[~cells["state"].isin(NEVER_RUN)]
    scale = done.groupby([*KEYS, "metric"], sort=False)["value"].transform(lambda found: found.abs().max() or 1.0)
    done = done.assign(scale=scale, scaled=(done["value"] / scale).where(np.isfinite(scale)))  # no square overflows
    grouped = done.groupby([*KEYS, "metric"], sort=False)
    statistics = grouped.agg(
        mean=("value", "mean"), spread=("scaled", "std"), count=("draw", "nunique"), sampling=("stderr", "mean")
    )
    statistics["spread"] *= grouped["scale"].first()
    names = sorted(done["metric"].unique(), key=order)
    wide = {name: statistics[name].unstack("metric").reindex(index=rows, columns=names) for name in statistics}
    complete = wide["count"] >= _expected(done, wanted, rows, names)
    count = wide["count"].fillna(0).astype(int)
    seeds_error = wide["spread"] / count.where(count > 0) ** 0.5
    by_row = known.groupby(KEYS, sort=False)
    bits = by_row[BITS].mean().reindex(rows)
    bits["n_seeds"] = wanted.groupby(KEYS, sort=False)["draw"].nunique().reindex(rows).fillna(0).astype(int)
    return Pivot(
        bits=bits,
        mean=wide["mean"].where(complete),
        spread=wide["spread"].where(complete),
        error=seeds_error.fillna(wide["sampling"]).where(complete),
        count=count,
        reasons=_reasons(cells),
        protocols=protocols,
    )


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """Pivot a tidy frame to one plain frame: bits, seeds and the mean of every metric (see ``pivot``)."""
    found = pivot(frame)
    return pd.concat([found.bits, found.mean], axis=1)


def metric_columns(table: pd.DataFrame) -> list[str]:
    """Name the metric columns of ``comparison``, in order."""
    return [column for column in table.columns if "/" in column]


def standard_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard error of every mean in ``comparison``: same rows, one column per metric, NaN where unknown."""
    return pivot(frame).error


def best(found: Pivot) -> pd.DataFrame:
    """Mark the best value of each metric per (model, bitwidth), and what cannot be told from it.

    A value ties with the best when their difference is at most their spread: the root of the sum of the two variances, over seeds
    where a row has several, else of the evaluation. That is a cautious rule: a paired test tells more apart.

    Returns:
        A boolean frame like ``found.mean``; nothing is marked where a value has no rival.
    """
    groups = found.mean.groupby(level=["model", "bitwidth"], sort=False)
    errors, top = found.spread.fillna(found.error).fillna(0.0), groups.transform("min")
    upwards = [metric for metric in found.mean.columns if higher_is_better(metric)]
    if upwards:
        top[upwards] = groups[upwards].transform("max")
    at_top = errors.where(found.mean == top).groupby(level=["model", "bitwidth"], sort=False)
    noise = np.hypot(errors, at_top.transform("max"))
    return ((found.mean - top).abs() <= noise) & (groups.transform("count") > 1)


def task_average(frame: pd.DataFrame, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """Append the mean accuracy over tasks of every cell, as metric ``average_N/acc``.

    ``acc_norm`` where a task has it, else ``acc``: the rule of the ResQ and CoQuant evaluation code.

    Args:
        frame: As ``tidy`` returns it, not modified.
        tasks: The tasks to average over; a cell that lacks one gets no average. None: all tasks, which must be the same, under
            the same protocols, in every cell that has any.

    Returns:
        The frame with one more row per cell that has an average; unchanged where there are fewer than two tasks.

    Raises:
        ConfigError: The cells were measured on different task sets, or on one set under different protocols.
    """
    scores = _task_scores(frame)
    if tasks is not None:
        scores = scores[scores["task"].isin(tasks)]
    sets: dict[str, tuple[str, ...]] = {}
    for cell, task in zip(scores["run_id"], scores["task"], strict=True):
        sets[cell] = (*sets.get(cell, ()), task)
    sets = {cell: tuple(sorted(found)) for cell, found in sets.items()}
    if tasks is None:
        tasks = _common_tasks(sets)
    complete = [cell for cell, found in sets.items() if set(found) == set(tasks)]
    scores = scores[scores["run_id"].isin(complete)]
    for task, words in scores.groupby("task")["protocol"].unique().items():
        if len(words) > 1:
            raise ConfigError(
                f"no average over tasks: {task} was measured under different protocols: {'; '.join(words)}"
            )
    if len(tasks) < 2 or scores.empty:
        return frame
    average = scores.drop_duplicates("run_id").set_index("run_id").drop(columns="task")
    cells = scores.groupby("run_id", sort=False)
    average["metric"], average["value"] = f"{AVERAGE}{len(tasks)}/acc", cells["value"].mean()
    average["stderr"] = cells["stderr"].agg(lambda errors: float(np.sqrt((errors**2).sum(skipna=False)) / len(errors)))
    average["protocol"] = f"mean over {', '.join(sorted(tasks))}: acc_norm where a task has it, else acc"
    return pd.concat([frame, average.reset_index()[list(frame.columns)]], ignore_index=True)


def _task_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per (cell, task): acc_norm where there is one, else acc."""
    measured = frame.dropna(subset=["metric"])
    kinds = pd.Series([kind(name) for name in measured["metric"]], measured.index, dtype=object)
    tasks = [name.rpartition("/")[0] for name in measured["metric"]]
    scores = measured.assign(task=pd.Series(tasks, measured.index, dtype=object), normed=kinds == "acc_norm")
    scores = scores[kinds.isin(["acc", "acc_norm"])].sort_values("normed", ascending=False, kind="stable")
    return scores.drop_duplicates(["run_id", "task"]).drop(columns="normed").sort_index()


def _common_tasks(sets: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    distinct = list(dict.fromkeys(sets.values()))
    if len(distinct) > 1:
        listed = "; ".join(", ".join(found) for found in distinct)
        raise ConfigError(f"no average over tasks: cells were measured on different task sets: {listed}")
    return distinct[0] if distinct else ()


def _by_protocol(done: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Number the protocols of a metric that has several; returns the frame with names and what the names mean."""
    names: dict[tuple[str, str], str] = {}
    for metric, words in done.groupby("metric", sort=False)["protocol"].unique().items():
        for place, protocol in enumerate(words, 1):
            names[str(metric), protocol] = f"{metric}@{place}" if len(words) > 1 else str(metric)
    renamed = [names[pair] for pair in zip(done["metric"], done["protocol"], strict=True)]
    return done.assign(metric=renamed), {name: protocol for (_, protocol), name in names.items()}


def _row_order(known: pd.DataFrame) -> pd.DataFrame:
    """Rows in order of first appearance, those of a model and bitwidth together, the unquantized model first."""
    rows = known.drop_duplicates(KEYS)
    rows = rows[KEYS].assign(reference=~(rows["nominal_w_bits"] >= UNTOUCHED_BITS))
    models = {model: place for place, model in enumerate(dict.fromkeys(rows["model"]))}
    groups = {
        pair: place for place, pair in enumerate(dict.fromkeys(zip(rows["model"], rows["bitwidth"], strict=True)))
    }
    rows["model_place"] = [models[model] for model in rows["model"]]
    rows["group_place"] = [groups[pair] for pair in zip(rows["model"], rows["bitwidth"], strict=True)]
    return rows.sort_values(["model_place", "reference", "group_place"], kind="stable")[KEYS]


def _expected(done: pd.DataFrame, wanted: pd.DataFrame, rows: pd.MultiIndex, names: list[str]) -> pd.DataFrame:
    """Number of seeds of which a mean must be made: those of cells that ask for the metric, or may do so."""
    evaluations = done.groupby("metric")["evaluation"].unique()
    seeds: dict[frozenset[str], pd.Series[int]] = {}
    for name in names:
        among = frozenset(evaluations[name])
        if among not in seeds:
            asking = wanted[wanted["evaluation"].isin(among) | wanted["evaluation"].isna()]
            seeds[among] = asking.groupby(KEYS, sort=False)["draw"].nunique().reindex(rows)
    expected = {name: seeds[frozenset(evaluations[name])] for name in names}
    return pd.DataFrame(expected, index=rows, columns=names).fillna(0)


def _reasons(cells: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """Words for the cells of each row that have no result: state and reason, and which seeds where there are several."""
    found: dict[tuple[str, ...], dict[str, set[str]]] = {}
    seeds: dict[tuple[str, ...], set[str]] = {}
    for *names, metric, state, reason, seed in cells[[*KEYS, "metric", "state", "reason", "draw"]].to_numpy().tolist():
        seeds.setdefault(tuple(names), set()).add(seed)
        if pd.isna(metric):
            words = f"{state}: {reason}" if isinstance(reason, str) and reason else str(state)
            found.setdefault(tuple(names), {}).setdefault(words, set()).add(seed)
    return {
        key: "; ".join(_seeds(given, seeds[key]) + words for words, given in which.items())
        for key, which in found.items()
    }


def draw(seed: Any, rotation_seed: Any) -> str:
    """One draw of what is random in a cell: its seed, and behind a slash the seed of random rotations where it has any."""
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in (seed, rotation_seed) if pd.notna(one)]
    return "/".join(words) or "?"


def _seeds(given: set[str], row: set[str]) -> str:
    if len(row) == 1:
        return ""
    return f"{'seed' if len(given) == 1 else 'seeds'} {', '.join(sorted(given, key=lambda one: (len(one), one)))} "
