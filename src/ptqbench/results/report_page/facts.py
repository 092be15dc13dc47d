"""The words and small tables of a page: what was measured, what is best, what it cost, where and when it ran."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import pandas as pd

from ptqbench.cell.formats import INTEGER
from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.engine.timings import EVALUATION_TIMINGS
from ptqbench.errors import StorageError
from ptqbench.results import tables
from ptqbench.results.claims import Answer
from ptqbench.results.claims_sheet import lacking, limits, speaks_for
from ptqbench.results.metrics import AVERAGE, MISSING, format_bits, format_value, higher_is_better, known, part
from ptqbench.results.tables import KEYS, Column, Entry, Pivot, Sheet
from ptqbench.results.tables.pivot import draw, in_order
from ptqbench.results.tables.tidy import DRAW, quantize_seconds, spared_seconds
from ptqbench.runs.files import number, read_record
from ptqbench.runs.folder import DONE, RunFolder

NOT_RECORDED = "not recorded"
MILLION, BILLION, MIB = 1e6, 1e9, 2**20
Names = tuple[str, str, str]
"""Model, method and bitwidth, as a table calls them."""
Facts = list[tuple[str, list[str]]]
"""Terms, each with lines about it."""


@dataclasses.dataclass(frozen=True)
class PageCell:
    """One cell as a page needs it.

    Attributes:
        names: Model, method, bitwidth, as the table calls them.
        seed: Its seed in words, with its replicate if it has one; ``?`` where it is unknown.
        rotation_seed: The seed of its random rotations; empty where it has none.
        run_id: None for a cell without a run folder.
        state: As the run folder says, or why there is no folder.
        result: ``result.json``; empty unless the cell is done.
        attempts: ``meta.json`` of every attempt that has one.
        n_attempts: Number of attempts.
        ended: Time of the last sign of life of the last attempt, seconds since the epoch.
    """

    names: Names
    seed: str
    rotation_seed: str
    run_id: str | None
    state: str
    result: dict[str, Any]
    attempts: list[dict[str, Any]]
    n_attempts: int
    ended: float | None


def read_cells(frame: pd.DataFrame, folders: Mapping[str, RunFolder]) -> list[PageCell]:
    """Read results and provenance of the cells of a tidy frame, in its order.

    Args:
        frame: As ``tables.tidy`` returns it, not modified; cells whose model is unknown are left out.
        folders: Run folders by run id.
    """
    known = frame.dropna(subset=["model"]).drop_duplicates([*KEYS, *DRAW, "run_id", "state"])
    return [_cell(row, folders.get(str(row["run_id"]))) for row in tables.records(known)]


def _cell(row: Mapping[str, Any], folder: RunFolder | None) -> PageCell:
    names, state = cast("Names", tuple(str(row[key]) for key in KEYS)), str(row["state"])
    seed = draw(row["seed"], None, row["replicate"])
    rotation = "" if pd.isna(row["rotation_seed"]) else draw(row["rotation_seed"], None, None)
    if folder is None:
        return PageCell(names, seed, rotation, None, state, {}, [], 0, None)
    result = folder.result() if state == DONE else None
    try:
        attempts, ended = [read_record(path / "meta.json") for path in folder.attempts], folder.beat_time()
    except (StorageError, OSError):
        attempts, ended = [], None
    known = [*filter(None, attempts)]
    return PageCell(names, seed, rotation, folder.run_id, state, result or {}, known, len(attempts), ended)


def main_metrics(found: Pivot) -> list[str]:
    """The metrics that plots show: the first perplexity, and the average accuracy or else the first accuracy."""
    metrics = [str(name) for name in found.mean.columns if not known(name).relative]
    perplexities = [name for name in metrics if known(name).of_text]
    scores = [name for name in metrics if not known(name).of_text]
    return perplexities[:1] + scores[:1]


def unquantized(frame: pd.DataFrame) -> set[Names]:
    """Rows of a tidy frame in which nothing is rounded: neither weights, activations, keys nor values."""
    bits = frame[["nominal_w_bits", "nominal_a_bits", "nominal_kv_bits"]].astype(float)
    rows = frame[(bits >= UNTOUCHED_BITS).all(axis=1)]
    return set(zip(*(rows[key] for key in KEYS), strict=True))


def lead(found: Pivot, cells: Sequence[PageCell], references: set[Names]) -> str:
    """What was measured, in one sentence."""
    if not cells:
        return "There is no cell to report on."
    # Methods and bitwidths are those of quantized cells.
    quantized = [cell.names for cell in cells if cell.names not in references]
    _, methods, bitwidths = map(dict.fromkeys, zip(*quantized, strict=True)) if quantized else ({}, {}, {})
    models, measures = _and(_models(cells, "{} ({})")), _and(_measures(found))
    return (
        f"{_count(len(methods), 'quantization method')} on {models} at {_and(bitwidths) or 'full precision'}, "
        f"with {_and(_seeds(cells))}{f', compared by {measures}.' if measures else '; nothing is measured yet.'}"
    )


def states(cells: Sequence[PageCell]) -> str:
    """How many cells are done, and what the others are."""
    counts = Counter(cell.state for cell in cells)
    done = counts.pop(DONE, 0)
    others = "".join(f"; {count} {state}" for state, count in sorted(counts.items()))
    return f"{done} of {len(cells)} cells are done{others}."


def headlines(found: Pivot, references: set[Names]) -> list[str]:
    """A line for every model and bitwidth: the best by the first main metric, what ties with it, and the unquantized value."""
    lines, marks = [], tables.best(found)
    for metric in main_metrics(found)[:1]:
        word, up = ("highest", True) if higher_is_better(metric) else ("lowest", False)
        for (model, bitwidth), rows in found.mean.groupby(level=["model", "bitwidth"], sort=False):
            # Bold values of this group, the best first.
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


def claims(answers: Sequence[Answer]) -> tuple[list[tuple[str, str, str, str]], str]:
    """The claims of papers that the cells answer, and sentences about all answers.

    Returns:
        Of every claim the answer, the claim, who says it, and the p-value with what limits the answer; a limit that all answers
        share is among the sentences instead.
    """
    said = [limits(one) for one in answers]
    shared = [limit for limit in said[0] if all(limit in other for other in said)] if len(said) > 1 else []
    lines = []
    for one, own in zip(answers, said, strict=True):
        p_value = f"p = {one.p_value:.2g}." if one.p_value is not None else ""
        rest = " ".join([p_value, *(limit for limit in own if limit not in shared), *lacking(one, "")])
        lines.append((one.word, one.claim.says, f"{one.claim.paper}, {one.claim.source}", rest))
    return lines, " ".join([*speaks_for(answers), *shared])


def reference_value(found: Pivot, references: set[Names], model: str, metric: str) -> float | None:
    """A metric of the unquantized model; None where it was not measured or is infinite."""
    values = found.mean[metric].replace(math.inf, math.nan).dropna()
    return next((float(value) for key, value in values.items() if key in references and key[0] == model), None)


def measured(frame: pd.DataFrame, found: Pivot, cells: Sequence[PageCell]) -> Facts:
    """What was measured: models, bitwidths, calibration, evaluation protocols, seeds."""
    texts = [f"{text} tokens".replace(" x ", " windows of ") for text in frame["calibration"].dropna().unique()]
    samples = [f"{int(n)} windows for bases or scales" for n in frame["basis_samples"].dropna().unique()]
    # Metrics that were measured on the same are said together.
    protocols: dict[str, list[str]] = {}
    for metric, words in found.protocols.items():
        protocols.setdefault(words, []).append(metric)
    facts = [
        ("Model", _models(cells, "{}: {}")),
        ("Methods", [", ".join(dict.fromkeys(cell.names[1] for cell in cells))]),
        ("Bitwidths", _bitwidths(frame)),
        ("Calibration", texts + samples),
        ("Evaluation", [f"{', '.join(names)}: {words}" for words, names in protocols.items()]),
        ("Seeds", _seeds(cells)),
    ]
    return [(term, lines) for term, lines in facts if any(lines)]


def cost(cells: Sequence[PageCell], found: Pivot) -> Sheet:
    """Time, memory and size of every row of the table, means over its finished cells."""
    heads = [Column(key, numeric=False) for key in KEYS]
    heads += [Column(name, "time, s") for name in ("quantize", "of it found", "evaluate")]
    heads += [Column("packed", "weights, MiB"), Column("host", "peak memory, GiB"), Column("GPU", "peak memory, GiB")]
    sheet = Sheet(heads)
    for key in cast("list[Names]", list(found.mean.index)):
        done = [cell for cell in cells if cell.names == key and cell.result]
        if not done:
            continue
        results = [cell.result for cell in done]
        # Times: the full cost of quantizing, what of it the cells found ready, and evaluation.
        resumed = any(cell.n_attempts > 1 for cell in done)
        note = sheet.note("resumed: the time is that of the last attempt alone") if resumed else None
        quantize = Entry(f"{_mean(map(quantize_seconds, results)):.1f}", note=note)
        ready = _ready(results, sheet)
        evaluate = _mean(
            sum(number(part(one, "timings"), name) or 0.0 for name in EVALUATION_TIMINGS) for one in results
        )
        # Sizes: of the packed weights, and of the memory at its peak.
        packed = _mean(number(part(one, "bits"), "packed_bytes") for one in results)
        peaks = [_mean(number(one, name) for one in results) for name in ("peak_host_gib", "peak_gpu_gib")]
        sizes = [None if packed is None else packed / MIB, *peaks]
        texts = [f"{evaluate:.1f}", *(MISSING if size is None else f"{size:.2f}" for size in sizes)]
        sheet.add([*map(Entry, key), quantize, ready, *map(Entry, texts)], (key[0], key[2]))
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


def _ready(results: Sequence[dict[str, Any]], sheet: Sheet) -> Entry:
    """Mean seconds that it took others to make what the cells found."""
    spared = [spared_seconds(result) for result in results]
    if None in spared and any(map(quantize_seconds, results)):
        return Entry(MISSING, note=sheet.note("not recorded: the time leaves out what the cell found"))
    return Entry(f"{_mean(spared) or 0.0:.1f}")


def provenance(cells: Sequence[PageCell]) -> Facts:
    """Software, machines and time of the finished cells; a value that not all cells share says how many have it."""
    done = [cell for cell in cells if cell.result]
    if not done:
        return []
    started = [str(meta["time"]) for cell in done for meta in cell.attempts if "time" in meta]
    ended = [_utc(cell.ended) for cell in done if cell.ended is not None]
    terms: dict[str, Callable[[dict[str, Any]], Any]] = {
        "ptqbench": lambda meta: part(meta, "packages").get("ptqbench"),
        "Commit": lambda meta: _commit(part(meta, "git")),
        "Packages": lambda meta: _packages(part(meta, "packages")),
        "Python": lambda meta: meta.get("python"),
        "Host": lambda meta: meta.get("host"),
        "Platform": lambda meta: meta.get("platform"),
        "CPU": lambda meta: meta.get("cpu"),
        "GPU": lambda meta: _gpu(part(meta, "gpu")),
    }
    time_span = [f"{min(started)} to {max(ended or started)}"] if started else [NOT_RECORDED]
    return [*((term, _shared(done, value)) for term, value in terms.items()), ("Time", time_span)]


def reproduce(cells: Sequence[PageCell], command: Sequence[str]) -> list[str]:
    """Command lines that run the cells again. The commit is among them if all attempts ran from it, without changes."""
    states = [part(meta, "git") for cell in cells if cell.result for meta in cell.attempts]
    commits = {str(state["commit"]) for state in states if "commit" in state}
    clean = all(state and "dirty" not in state for state in states)
    lines = [f"git checkout {commits.pop()}"] if len(commits) == 1 and clean else []
    if not command:
        return [*lines, "python -m ptqbench.run RUN_FOLDER   # each on a copy that holds spec.json alone"]
    words = [*command, "--runs-dir", "reproduced"]
    return [*lines, *(shlex.join(["python", "-m", "ptqbench", word, *words]) for word in ("sweep", "report"))]


def listing(cells: Sequence[PageCell]) -> Sheet:
    """Every cell with its run id, state and the time it ended."""
    rotated = any(cell.rotation_seed for cell in cells)
    heads = [*KEYS, "seed", *(["rotation seed"] if rotated else []), "run id", "state", "ended", "attempts"]
    sheet = Sheet([Column(name, numeric=name in ("seed", "rotation seed", "attempts")) for name in heads])
    for cell in cells:
        seeds = [cell.seed, cell.rotation_seed or MISSING] if rotated else [cell.seed]
        ended = MISSING if cell.ended is None else _utc(cell.ended)
        texts = [*cell.names, *seeds, cell.run_id or MISSING, cell.state, ended, str(cell.n_attempts)]
        sheet.rows.append([Entry(text) for text in texts])
    return sheet


def _seeds(cells: Sequence[PageCell]) -> list[str]:
    """The seeds of some cells in words, those of random rotations by themselves."""
    found = {"seed": {cell.seed for cell in cells}, "rotation seed": {cell.rotation_seed for cell in cells} - {""}}
    return [f"{word}{'' if len(given) == 1 else 's'} {_and(in_order(given))}" for word, given in found.items() if given]


def _models(cells: Sequence[PageCell], pattern: str) -> list[str]:
    """The models of some cells; one whose size is known with its size, in the pattern."""
    sizes = _sizes(cells)
    names = dict.fromkeys(cell.names[0] for cell in cells)
    return [pattern.format(name, sizes[name]) if name in sizes else name for name in names]


def _sizes(cells: Sequence[PageCell]) -> dict[str, str]:
    """Number of weights in the linears of each model: packed bits of a finished cell over its true bits per weight."""
    sizes = {}
    for cell in cells:
        packed, bits = (number(part(cell.result, "bits"), name) for name in ("packed_bytes", "effective_w_bits"))
        if cell.names[0] not in sizes and packed and bits:
            n = 8 * packed / bits
            said = f"{n / BILLION:.3g} billion" if n >= BILLION else f"{n / MILLION:.3g} million"
            sizes[cell.names[0]] = f"{said} weights in its linears"
    return sizes


def _bitwidths(frame: pd.DataFrame) -> list[str]:
    """Each bitwidth in words: the weights, what else is rounded, and what is not."""
    lines = []
    for row in tables.records(frame.dropna(subset=["w_bits"]).drop_duplicates("bitwidth")):
        group = "" if pd.isna(row["group_size"]) else f" in groups of {row['group_size']:g}"
        weights = f"weights {_bits(row['w_bits'], row['w_format'])}{group if row['w_bits'] < UNTOUCHED_BITS else ''}"
        others = {"inputs of linears": (row["a_bits"], row["a_format"])}
        by_block = isinstance(row["kv_measure"], str)
        caches = {"keys": (row["k_bits"], row["kv_format"]), "values": (row["v_bits"], row["kv_format"])}
        others |= {} if by_block else caches
        rounded = [f"{name} {_bits(bits, form)}" for name, (bits, form) in others.items() if bits < UNTOUCHED_BITS]
        mean = (row["k_bits"] + row["v_bits"]) / 2
        rounded += [f"keys and values {mean:g} bits in the mean, by block ({row['kv_measure']})"] if by_block else []
        rest = _and(name for name, (bits, _) in others.items() if bits >= UNTOUCHED_BITS)
        words = [weights, *rounded, *([f"{rest} untouched"] if rest else [])]
        lines.append(f"{row['bitwidth']}: {', '.join(words)}")
    return lines


def _bits(bits: float, form: str) -> str:
    if bits >= UNTOUCHED_BITS:
        return "untouched"
    return f"{bits:g} bits" if form == INTEGER else f"in {form.upper()}"


def _measures(found: Pivot) -> list[str]:
    """Metrics in words: perplexity on these texts, accuracy on these tasks, and whether there is any fidelity."""
    metrics = [metric for metric in found.mean.columns if not metric.startswith(AVERAGE)]
    absolute = [metric for metric in metrics if not known(metric).relative]
    texts = dict.fromkeys(metric.rpartition("/")[0] for metric in absolute if known(metric).of_text)
    tasks = dict.fromkeys(metric.rpartition("/")[0] for metric in absolute if not known(metric).of_text)
    scores = _and(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
    words = [f"perplexity on {_and(texts)}"] * bool(texts) + [f"accuracy on {scores}"] * bool(tasks)
    return words + ["fidelity to the unquantized model"] * (len(absolute) < len(metrics))


def _share_a_process(cells: Sequence[PageCell]) -> bool:
    """Whether the last attempts of two finished cells ran in the same process."""
    last = (cell.attempts[-1] for cell in cells if cell.result and cell.attempts)
    processes = Counter(str([meta.get(name) for name in ("host", "pid", "command")]) for meta in last)
    return any(n > 1 for n in processes.values())


def _shared(done: Sequence[PageCell], value: Callable[[dict[str, Any]], Any]) -> list[str]:
    """The values of a fact over cells, most frequent first; a cell whose attempts differ counts for each of its values."""
    said = (dict.fromkeys(str(value(meta) or NOT_RECORDED) for meta in cell.attempts) for cell in done)
    counts = Counter(chain.from_iterable(values or [NOT_RECORDED] for values in said))
    if list(counts.values()) == [len(done)]:
        return list(counts)
    return [f"{words} ({_count(count, 'cell')})" for words, count in counts.most_common()]


def _commit(git: Mapping[str, Any]) -> str:
    changes = f" with uncommitted changes ({git['dirty']})" if "dirty" in git else ""
    return f"{git.get('commit')}{changes}" if git else ""


def _packages(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items() if name != "ptqbench")


def _gpu(gpu: Mapping[str, Any]) -> str:
    return f"{gpu.get('count')} x {gpu.get('name')}, CUDA {gpu.get('cuda')}" if gpu else "none"


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
