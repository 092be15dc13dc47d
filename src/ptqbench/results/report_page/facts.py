"""What a page says in words and small tables: what was measured, what came out best, what it cost, where and when it ran."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import StorageError
from ptqbench.results.metrics import AVERAGE, MISSING, kind
from ptqbench.results.tables import KEYS, Column, Entry, Pivot, Sheet, best, format_bits, format_value, higher_is_better
from ptqbench.results.tables.pivot import draw
from ptqbench.results.tables.tidy import EVALUATION_TIMINGS, quantize_seconds, spared_seconds
from ptqbench.runs.files import number, read_record
from ptqbench.runs.folder import DONE, RunFolder

NOT_RECORDED = "not recorded"
MILLION, BILLION, MIB = 1e6, 1e9, 2**20
YEAR_10000 = 253402300800
"""Seconds since the epoch; no clock is right beyond."""
Names = tuple[str, str, str]
"""Model, method and bitwidth, as a table calls them."""
Facts = list[tuple[str, list[str]]]
"""Terms with what there is to say about each, a line per entry."""


@dataclasses.dataclass(frozen=True)
class PageCell:
    """One cell as a page needs it.

    Attributes:
        names: Model, method, bitwidth, as the table calls them.
        seed: Its seed.
        run_id: None for a cell that can have no run folder.
        state: As the run folder says, or why there is no folder.
        result: ``result.json``; empty unless the cell is done.
        attempts: ``meta.json`` of every attempt that has one.
        n_attempts: Number of attempts.
        ended: When the last attempt gave its last sign of life, seconds since the epoch.
    """

    names: Names
    seed: str
    run_id: str | None
    state: str
    result: dict[str, Any]
    attempts: list[dict[str, Any]]
    n_attempts: int
    ended: float | None


def read_cells(frame: pd.DataFrame, folders: Mapping[str, RunFolder]) -> list[PageCell]:
    """Read results and provenance of the cells of a tidy frame, in its order.

    Args:
        frame: As ``tables.tidy`` returns it, not modified; cells that nothing names are left out.
        folders: Run folders by run id.
    """
    known = frame.dropna(subset=["model"]).drop_duplicates([*KEYS, "seed", "rotation_seed", "run_id", "state"])
    return [_cell(row, folders.get(str(row["run_id"]))) for row in known.to_dict("records")]


def _cell(row: Mapping[Any, Any], folder: RunFolder | None) -> PageCell:
    names, state = cast("Names", tuple(str(row[key]) for key in KEYS)), str(row["state"])
    seed = draw(row["seed"], row["rotation_seed"])
    if folder is None:
        return PageCell(names, seed, None, state, {}, [], 0, None)
    result = folder.result() if state == DONE else None
    try:
        attempts, beat = [read_record(path / "meta.json") for path in folder.attempts], folder.beat_time()
    except (StorageError, OSError):
        attempts, beat = [], None
    ended = beat if beat is not None and 0 <= beat < YEAR_10000 else None
    return PageCell(names, seed, folder.run_id, state, result or {}, [*filter(None, attempts)], len(attempts), ended)


def main_metrics(found: Pivot) -> list[str]:
    """The metrics that plots show: the first perplexity, and the average accuracy or else the first accuracy."""
    metrics = [str(name) for name in found.mean.columns]
    perplexities = [name for name in metrics if kind(name) == "perplexity"]
    scores = [name for name in metrics if kind(name) != "perplexity"]
    return perplexities[:1] + scores[:1]


def unquantized(frame: pd.DataFrame) -> set[Names]:
    """Rows of a tidy frame in which nothing is rounded: neither weights nor activations, keys and values."""
    bits = frame[["nominal_w_bits", "nominal_a_bits", "nominal_kv_bits"]].astype(float)
    rows = frame[(bits >= UNTOUCHED_BITS).all(axis=1)]
    return set(zip(*(rows[key] for key in KEYS), strict=True))


def lead(found: Pivot, cells: Sequence[PageCell], references: set[Names]) -> str:
    """What was measured, in one sentence."""
    if not cells:
        return "There is no cell to report on."
    quantized = [cell.names for cell in cells if cell.names not in references]
    _, methods, bitwidths = map(dict.fromkeys, zip(*quantized, strict=True)) if quantized else ({}, {}, {})
    seeds = sorted({cell.seed for cell in cells})
    sizes = _sizes(cells)
    models = [f"{name} ({sizes[name]})" if name in sizes else name for name in dict.fromkeys(c.names[0] for c in cells)]
    measures = _and(_measures(found))
    return (
        f"{_count(len(methods), 'quantization method')} on {_and(models)} at {_and(bitwidths) or 'full precision'}, "
        f"with {'seed' if len(seeds) == 1 else 'seeds'} {_and(map(str, seeds))}"
        f"{f', compared by {measures}.' if measures else '; nothing is measured yet.'}"
    )


def states(cells: Sequence[PageCell]) -> str:
    """How many cells are done, and what the others are."""
    counts = Counter(cell.state for cell in cells)
    done = counts.pop(DONE, 0)
    others = "".join(f"; {count} {state}" for state, count in sorted(counts.items()))
    return f"{done} of {len(cells)} cells are done{others}."


def headlines(found: Pivot, references: set[Names]) -> list[str]:
    """The best of every model and bitwidth by the first main metric, what ties with it, and the unquantized value."""
    lines, marks = [], best(found)
    for metric in main_metrics(found)[:1]:
        word, up = ("highest", True) if higher_is_better(metric) else ("lowest", False)
        for (model, bitwidth), rows in found.mean.groupby(level=["model", "bitwidth"], sort=False):
            ties = rows.loc[marks.loc[rows.index, metric], metric].sort_values(ascending=not up)
            if ties.empty:
                continue
            (_, top, _), *others = cast("list[Names]", list(ties.index))
            bits = format_bits(cast("float", found.bits.at[(model, top, bitwidth), "effective_w_bits"]))
            tied = f"; {_and(key[1] for key in others)} within the spread of the difference to it" if others else ""
            reference = reference_value(found, references, str(model), metric)
            full = "" if reference is None else f"; {format_value(metric, reference)} unquantized"
            value = format_value(metric, float(ties.iloc[0]))
            lines.append(f"{model}, {bitwidth}: {word} {metric} {value}, by {top} at {bits} true bits{tied}{full}.")
    return lines


def reference_value(found: Pivot, references: set[Names], model: str, metric: str) -> float | None:
    """A metric of the unquantized model, None where it was not measured or is infinite."""
    values = found.mean[metric].replace(math.inf, math.nan).dropna()
    return next((float(value) for key, value in values.items() if key in references and key[0] == model), None)


def measured(frame: pd.DataFrame, found: Pivot, cells: Sequence[PageCell]) -> Facts:
    """What was measured: models, bitwidths, calibration, evaluation protocols, seeds."""
    sizes = _sizes(cells)
    models = [f"{name}: {sizes[name]}" if name in sizes else name for name in dict.fromkeys(c.names[0] for c in cells)]
    texts = [f"{text} tokens".replace(" x ", " windows of ") for text in frame["calibration"].dropna().unique()]
    samples = [f"{int(n)} windows for eigenbases" for n in frame["basis_samples"].dropna().unique()]
    protocols: dict[str, list[str]] = {}
    for metric, words in found.protocols.items():
        protocols.setdefault(words, []).append(metric)
    facts = [
        ("Model", models),
        ("Methods", [", ".join(dict.fromkeys(cell.names[1] for cell in cells))]),
        ("Bitwidths", _bitwidths(frame)),
        ("Calibration", texts + samples),
        ("Evaluation", [f"{', '.join(names)}: {words}" for words, names in protocols.items()]),
        ("Seeds", [", ".join(map(str, sorted({cell.seed for cell in cells})))]),
    ]
    return [(term, lines) for term, lines in facts if any(lines)]


def cost(cells: Sequence[PageCell], found: Pivot) -> Sheet:
    """Time, memory and size of every row of the table, means over its finished cells."""
    heads = [Column(key, numeric=False) for key in KEYS]
    heads += [Column(name, "time, s") for name in ("quantize", "of it found", "evaluate")]
    heads += [Column("packed", "weights, MiB"), Column("host", "peak memory, GiB"), Column("GPU", "peak memory, GiB")]
    sheet = Sheet(heads)
    previous = None
    for key in cast("list[Names]", list(found.mean.index)):
        done = [cell for cell in cells if cell.names == key and cell.result]
        if not done:
            continue
        if previous is not None and (key[0], key[2]) != previous:
            sheet.sections.append(len(sheet.rows))
        previous = key[0], key[2]
        resumed = any(cell.n_attempts > 1 for cell in done)
        note = sheet.note("resumed: the time is that of the last attempt alone") if resumed else None
        quantize = Entry(f"{_mean(quantize_seconds(cell.result) for cell in done):.1f}", note=note)
        sheet.rows.append([*map(Entry, key), quantize, _found(done, sheet), *_rest(done)])
    sheet.remarks = [
        "Time to quantize is the full cost: what a cell found (calibration windows, moments, eigenbases that another cell had "
        "left) counts with the time that making it took, as if the cell had made it itself.",
    ]
    if _share_a_process(cells):
        sheet.remarks.append(
            "Several of these cells ran one after another in one process: its peak memory is the highest so far, so a figure is "
            "an upper bound for its row."
        )
    return sheet


def _rest(done: Sequence[PageCell]) -> list[Entry]:
    """Entries behind the time to quantize."""
    packed = _mean(number(_part(cell.result, "bits"), "packed_bytes") for cell in done)
    memory = [_mean(number(cell.result, name) for cell in done) for name in ("peak_host_gib", "peak_gpu_gib")]
    size = None if packed is None else packed / MIB
    return [Entry(_evaluation(done)), *(Entry(MISSING if n is None else f"{n:.2f}") for n in (size, *memory))]


def _found(done: Sequence[PageCell], sheet: Sheet) -> Entry:
    """Mean seconds that made what the cells found."""
    spared = [spared_seconds(cell.result) for cell in done]
    if None in spared and any(quantize_seconds(cell.result) for cell in done):
        return Entry(MISSING, note=sheet.note("not recorded: the time leaves out what the cell found"))
    return Entry(f"{_mean(spared) or 0.0:.1f}")


def _evaluation(done: Sequence[PageCell]) -> str:
    """Mean seconds of evaluation."""
    sums = [[number(_part(cell.result, "timings"), name) or 0.0 for name in EVALUATION_TIMINGS] for cell in done]
    return f"{_mean(map(sum, sums)):.1f}"


def provenance(cells: Sequence[PageCell]) -> Facts:
    """Software, machines and time of the finished cells; a value that not all of them share says how many do."""
    done = [cell for cell in cells if cell.result]
    if not done:
        return []
    started = [str(meta["time"]) for cell in done for meta in cell.attempts if "time" in meta]
    ended = [_utc(cell.ended) for cell in done if cell.ended is not None]
    return [
        ("ptqbench", _shared(done, lambda meta: _part(meta, "packages").get("ptqbench"))),
        ("Commit", _shared(done, lambda meta: _commit(meta.get("git")))),
        ("Packages", _shared(done, lambda meta: _packages(_part(meta, "packages")))),
        ("Python", _shared(done, lambda meta: meta.get("python"))),
        ("Host", _shared(done, lambda meta: meta.get("host"))),
        ("Platform", _shared(done, lambda meta: meta.get("platform"))),
        ("CPU", _shared(done, lambda meta: meta.get("cpu"))),
        ("GPU", _shared(done, lambda meta: _gpu(meta.get("gpu")))),
        ("Time", [f"{min(started)} to {max(ended or started)}"] if started else [NOT_RECORDED]),
    ]


def reproduce(cells: Sequence[PageCell], command: Sequence[str]) -> list[str]:
    """Command lines that make the cells again; with the commit where all attempts were made from one, unchanged."""
    states = [_part(meta, "git") for cell in cells if cell.result for meta in cell.attempts]
    commits = {str(state["commit"]) for state in states if "commit" in state}
    clean = all(state and "dirty" not in state for state in states)
    lines = [f"git checkout {commits.pop()}"] if len(commits) == 1 and clean else []
    if not command:
        return [*lines, "python -m ptqbench.run RUN_FOLDER   # each on a copy that holds spec.json alone"]
    words = [*command, "--runs-dir", "reproduced"]
    return [*lines, *(shlex.join(["python", "-m", "ptqbench", word, *words]) for word in ("sweep", "report"))]


def listing(cells: Sequence[PageCell]) -> Sheet:
    """Every cell with its run id, state and the time it ended."""
    heads = [*KEYS, "seed", "run id", "state", "ended", "attempts"]
    sheet = Sheet([Column(name, numeric=name in ("seed", "attempts")) for name in heads])
    for cell in cells:
        ended = MISSING if cell.ended is None else _utc(cell.ended)
        texts = [*cell.names, str(cell.seed), cell.run_id or MISSING, cell.state, ended, str(cell.n_attempts)]
        sheet.rows.append([Entry(text) for text in texts])
    return sheet


def _sizes(cells: Sequence[PageCell]) -> dict[str, str]:
    """Weights in the linears of each model, from the packed bytes of a finished cell and its true bits."""
    sizes = {}
    for cell in cells:
        packed, bits = (number(_part(cell.result, "bits"), name) for name in ("packed_bytes", "effective_w_bits"))
        if cell.names[0] not in sizes and packed and bits:
            n = 8 * packed / bits
            said = f"{n / BILLION:.3g} billion" if n >= BILLION else f"{n / MILLION:.3g} million"
            sizes[cell.names[0]] = f"{said} weights in its linears"
    return sizes


def _bitwidths(frame: pd.DataFrame) -> list[str]:
    lines = {}
    for row in frame.dropna(subset=["w_bits"]).drop_duplicates("bitwidth").to_dict("records"):
        group = "" if pd.isna(row["group_size"]) else f" in groups of {row['group_size']:g}"
        weights = f"weights {_bits(row['w_bits'])}{group if row['w_bits'] < UNTOUCHED_BITS else ''}"
        others = {"inputs of linears": row["a_bits"], "keys": row["k_bits"], "values": row["v_bits"]}
        rounded = [f"{name} {_bits(bits)}" for name, bits in others.items() if bits < UNTOUCHED_BITS]
        rest = _and(name for name, bits in others.items() if bits >= UNTOUCHED_BITS)
        words = [weights, *rounded, *([f"{rest} untouched"] if rest else [])]
        lines[row["bitwidth"]] = f"{row['bitwidth']}: {', '.join(words)}"
    return list(lines.values())


def _bits(bits: float) -> str:
    return "untouched" if bits >= UNTOUCHED_BITS else f"{bits:g} bits"


def _measures(found: Pivot) -> list[str]:
    """Metrics in words: perplexity of these texts, accuracy on these tasks."""
    texts: dict[str, None] = {}
    tasks: dict[str, None] = {}
    for metric in found.mean.columns:
        label = metric.rpartition("/")[0]
        if not label.startswith(AVERAGE):
            (texts if kind(metric) == "perplexity" else tasks)[label] = None
    scores = _and(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
    return [f"perplexity on {_and(texts)}"] * bool(texts) + [f"accuracy on {scores}"] * bool(tasks)


def _share_a_process(cells: Sequence[PageCell]) -> bool:
    last = [cell.attempts[-1] for cell in cells if cell.result and cell.attempts]
    return any(
        n > 1 for n in Counter(str([meta.get(name) for name in ("host", "pid", "command")]) for meta in last).values()
    )


def _shared(done: Sequence[PageCell], value: Any) -> list[str]:
    """The values of a fact over cells, most frequent first."""
    counts: Counter[str] = Counter()
    for cell in done:
        counts.update(
            dict.fromkeys((str(value(meta) or NOT_RECORDED) for meta in cell.attempts), 1) or {NOT_RECORDED: 1}
        )
    if len(counts) == 1 and counts.most_common(1)[0][1] == len(done):
        return list(counts)
    return [f"{words} ({_count(count, 'cell')})" for words, count in counts.most_common()]


def _commit(git: Any) -> str | None:
    if not isinstance(git, dict):
        return None
    changes = f" with uncommitted changes ({git['dirty']})" if "dirty" in git else ""
    return f"{git.get('commit')}{changes}"


def _part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within a record; empty where there is none."""
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _packages(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items() if name != "ptqbench")


def _gpu(gpu: Any) -> str:
    return f"{gpu.get('count')} x {gpu.get('name')}, CUDA {gpu.get('cuda')}" if isinstance(gpu, dict) else "none"


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _and(words: Iterable[str]) -> str:
    listed = list(words)
    return ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1] if listed else ""
