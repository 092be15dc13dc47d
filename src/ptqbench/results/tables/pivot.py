"""Tidy frame -> comparison: one row per (model, method, bitwidth), with means over seeds, their spread, and reasons for gaps.

Three things are never averaged: seeds of which one is missing, accuracies over task sets that differ, and values measured under
different protocols, which get columns of their own (``name@2``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.metrics import AVERAGE, higher_is_better, kind, order
from ptqbench.results.tables.names import KEYS
from ptqbench.results.tables.tidy import DEVIATION, DRAW, NOISE

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
        noise: What a difference must exceed because the measurement itself is no finer; zero where nothing is known of it.
        count: Number of seeds in the mean.
        reasons: Why a row has missing cells: state, reason and seeds in words.
        deviations: In what the cells of a row depart from their method because of their model.
        protocols: What each column was measured on; several where cells of a column only differ in what cannot matter.
    """

    bits: pd.DataFrame
    mean: pd.DataFrame
    spread: pd.DataFrame
    error: pd.DataFrame
    noise: pd.DataFrame
    count: pd.DataFrame
    reasons: dict[tuple[str, ...], str]
    deviations: dict[tuple[str, ...], str]
    protocols: dict[str, str]


def pivot(frame: pd.DataFrame) -> Pivot:
    """Average a tidy frame over seeds, one row per (model, method, bitwidth).

    Args:
        frame: As ``tidy`` returns it, not modified. Cells whose model is unknown are left out.

    Returns:
        Rows model by model, the unquantized one first, bitwidths together, else in order of first appearance.
    """
    # A draw is a seed together with a rotation seed and a replicate; a cell that stands in the frame twice counts once.
    known = frame.dropna(subset=["model"])
    known = known.assign(draw=[draw(*seeds) for seeds in known[DRAW].itertuples(index=False)])
    done, protocols = _by_protocol(known.dropna(subset=["metric"]))
    done = done.drop_duplicates([*KEYS, "metric", *DRAW])
    rows = pd.MultiIndex.from_frame(_row_order(known))
    cells = known.drop_duplicates([*KEYS, "draw", "run_id", "state"])
    wanted = cells[~cells["state"].isin(NEVER_RUN)]
    # Values are divided by the largest of their group, so that no square in the standard deviation overflows.
    scale = done.groupby([*KEYS, "metric"], sort=False)["value"].transform(lambda found: found.abs().max() or 1.0)
    done = done.assign(noise=done.get(NOISE, 0.0))
    done = done.assign(scale=scale, scaled=(done["value"] / scale).where(np.isfinite(scale)))
    grouped = done.groupby([*KEYS, "metric"], sort=False)
    statistics = grouped.agg(
        mean=("value", "mean"), spread=("scaled", "std"), count=("draw", "nunique"), sampling=("stderr", "mean"),
        noise=("noise", "max"),
    )  # fmt: skip
    statistics["spread"] *= grouped["scale"].first()
    # One frame per statistic: rows of the table by metrics. A mean counts only if every draw that was asked for is in it.
    names = sorted(done["metric"].unique(), key=order)
    wide = {name: statistics[name].unstack("metric").reindex(index=rows, columns=names) for name in statistics}
    complete = wide["count"] >= _expected(done, wanted, rows, names)
    count = wide["count"].fillna(0).astype(int)
    seeds_error = wide["spread"] / count.where(count > 0) ** 0.5
    bits = known.groupby(KEYS, sort=False)[BITS].mean().reindex(rows)
    bits["n_seeds"] = wanted.groupby(KEYS, sort=False)["draw"].nunique().reindex(rows).fillna(0).astype(int)
    return Pivot(
        bits=bits,
        mean=wide["mean"].where(complete),
        spread=wide["spread"].where(complete),
        error=seeds_error.fillna(wide["sampling"]).where(complete),
        noise=wide["noise"].fillna(0.0),
        count=count,
        reasons=_reasons(cells),
        deviations=_deviations(cells),
        protocols=protocols,
    )


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """The comparison as one plain frame: bits, seeds and the mean of every metric (see ``pivot``)."""
    found = pivot(frame)
    return pd.concat([found.bits, found.mean], axis=1)


def best(found: Pivot) -> pd.DataFrame:
    """Mark the best value of each metric per (model, bitwidth), and the values that tie with it.

    A value ties with the best if their difference is at most its spread: the root of the sum of the two variances, over seeds
    where a row has several, else of the evaluation; it also ties if their difference is within the noise floor. This rule is
    cautious: a paired test tells more values apart.

    Returns:
        A boolean frame like ``found.mean``; nothing is marked where a value has no rival.
    """
    # Accuracies change their sign, so that the smallest is the best of every metric.
    loss = found.mean.mul([-1.0 if higher_is_better(metric) else 1.0 for metric in found.mean.columns])
    groups = loss.groupby(level=["model", "bitwidth"], sort=False)
    errors, top = found.spread.fillna(found.error).fillna(0.0), groups.transform("min")
    # Where several values are best, the largest of their errors counts.
    at_top = errors.where(loss == top).groupby(level=["model", "bitwidth"], sort=False)
    noise = np.maximum(np.hypot(errors, at_top.transform("max")), found.noise)
    return ((loss - top).abs() <= noise) & (groups.transform("count") > 1)


def averaged(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Add averages over tasks to a tidy frame; where there can be none, the frame as it is and a sentence that says why."""
    try:
        return task_average(frame), []
    except ConfigError as refusal:
        return frame, [f"{refusal}."]


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
    # The tasks that each cell has; cells that lack one of the wanted tasks get no average.
    if tasks is not None:
        scores = scores[scores["task"].isin(tasks)]
    found: dict[str, list[str]] = {}
    for cell, task in zip(scores["run_id"], scores["task"], strict=True):
        found.setdefault(cell, []).append(task)
    sets = {cell: tuple(sorted(several)) for cell, several in found.items()}
    if tasks is None:
        tasks = _common_tasks(sets)
    complete = [cell for cell, several in sets.items() if set(several) == set(tasks)]
    scores = scores[scores["run_id"].isin(complete)]
    # A task that was measured in two ways spoils the average.
    for task, words in scores.groupby("task")["protocol"].unique().items():
        if len(words) > 1:
            raise ConfigError(
                f"no average over tasks: {task} was measured under different protocols: {'; '.join(words)}"
            )
    if len(tasks) < 2 or scores.empty:
        return frame
    # One row per cell, like its first; the standard error is sqrt(sum_t se_t^2) / T over the T tasks.
    average = scores.drop_duplicates("run_id").set_index("run_id").drop(columns="task")
    cells = scores.groupby("run_id", sort=False)
    average["metric"], average["value"] = f"{AVERAGE}{len(tasks)}/acc", cells["value"].mean()
    average["stderr"] = cells["stderr"].agg(lambda errors: float(np.sqrt((errors**2).sum(skipna=False)) / len(errors)))
    average["protocol"] = f"mean over {', '.join(sorted(tasks))}: acc_norm where a task has it, else acc"
    return pd.concat([frame, average.reset_index()[list(frame.columns)]], ignore_index=True)


def _task_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per (cell, task): ``acc_norm`` where there is one, else ``acc``."""
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
    """Number the protocols of every metric that has several: the frame with the new names, and what each name was measured on."""
    names: dict[tuple[str, str], str] = {}
    for metric, words in done.groupby("metric", sort=False)["protocol"].unique().items():
        for place, protocol in enumerate(words, 1):
            names[str(metric), protocol] = f"{metric}@{place}" if len(words) > 1 else str(metric)
    renamed = [names[pair] for pair in zip(done["metric"], done["protocol"], strict=True)]
    return done.assign(metric=renamed), {name: protocol for (_, protocol), name in names.items()}


def _row_order(known: pd.DataFrame) -> pd.DataFrame:
    """Rows in order of first appearance, those of a model and bitwidth together, the unquantized model first."""
    rows = known.drop_duplicates(KEYS)
    places = rows[KEYS].assign(
        model_place=rows.groupby("model", sort=False).ngroup(),
        reference=~(rows["nominal_w_bits"] >= UNTOUCHED_BITS),
        group_place=rows.groupby(["model", "bitwidth"], sort=False, dropna=False).ngroup(),
    )
    return places.sort_values(["model_place", "reference", "group_place"], kind="stable")[KEYS]


def _expected(done: pd.DataFrame, wanted: pd.DataFrame, rows: pd.MultiIndex, names: list[str]) -> pd.DataFrame:
    """Number of draws that a mean must be made of: those of cells that ask for the metric, or for which that is unknown."""
    evaluations = done.groupby("metric")["evaluation"].unique().map(frozenset)
    seeds: dict[frozenset[str], pd.Series[int]] = {}
    for among in set(evaluations):
        asking = wanted[wanted["evaluation"].isin(among) | wanted["evaluation"].isna()]
        seeds[among] = asking.groupby(KEYS, sort=False)["draw"].nunique().reindex(rows)
    return pd.DataFrame({name: seeds[evaluations[name]] for name in names}, index=rows, columns=names).fillna(0)


def _reasons(cells: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """State and reason of the cells of each row that have no result, and which draws they are where a row has several."""
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


def _deviations(cells: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """What is recorded of deviations, by row."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    said = cells[[*KEYS, DEVIATION]].dropna().to_numpy().tolist() if DEVIATION in cells else []
    for *names, words in said:
        found.setdefault(tuple(names), {})[words] = None
    return {key: "; ".join(words) for key, words in found.items()}


def draw(seed: Any, rotation_seed: Any, replicate: Any) -> str:
    """The draw of a cell in words: ``0``; ``0/1`` with seed 1 of random rotations; ``0r2`` for replicate 2; ``?`` if unknown."""
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in (seed, rotation_seed) if pd.notna(one)]
    return ("/".join(words) or "?") + (f"r{replicate:g}" if pd.notna(replicate) else "")


def draw_of(cell: Mapping[str, Any]) -> str:
    """The draw of a record of the tidy frame in words."""
    return draw(*(cell[name] for name in DRAW))


def in_order(seeds: Iterable[str]) -> list[str]:
    """Seeds in the order of their numbers."""
    return sorted(seeds, key=lambda one: (len(one), one))


def _seeds(given: set[str], row: set[str]) -> str:
    """Some draws of a row in words; nothing where they are all of them."""
    return "" if given == row else f"{'seed' if len(given) == 1 else 'seeds'} {', '.join(in_order(given))} "
