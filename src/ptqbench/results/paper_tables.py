"""A paper's own table: in every place our figure beside the printed one, in the shape in which the paper prints them.

A row of the paper (its method and bits) holds the cells that have its roles and bits. Rows of the paper without a cell of ours
stay, and so do cells of ours that the paper does not have: a missing figure is a dash with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ptqbench.cell.spec import UNTOUCHED_BITS
from ptqbench.errors import ConfigError
from ptqbench.results.figures import COLLAPSED, Figure, figures, load, method_objections, objections, same_cell
from ptqbench.results.metrics import AVERAGE, known
from ptqbench.results.reported import SECOND_HAND, Key, Ours, Value, key_of
from ptqbench.results.tables import KEYS, records

DOWN = ("method",)
"""Axes that run down where ``protocols.yaml`` says nothing of a table; the others run across. Bits stand with the method."""
QUOTED = "unspecified"
"""Name of the table of figures that others quote without saying where they stand."""
NO_CELL = "not in this sweep"
PLACE = [
    "paper", "table", "model", "bits", "method", "our_method", "our_bitwidth", "metric", "ours", "spread", "seeds", "reported",
    "printed", "noise", "beyond_noise", "why", "missing",
]  # fmt: skip

Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """One place of a paper's table.

    Attributes:
        ours: What our cell has; None where there is no cell.
        figure: What the paper prints; None where it is not known.
        why: What stands against comparing the two.
        absent: Why there is no cell of ours, or no figure of the paper.
    """

    ours: Value | None
    figure: Figure | None
    why: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Why our cell has no value."""
        return (self.ours.missing,) if self.ours and self.ours.missing else ()

    @property
    def noise(self) -> float:
        """Distance up to which noise explains a difference: see ``noise_of``; NaN where a figure is missing."""
        both = self.ours is not None and self.figure is not None and not math.isnan(self.ours.mean - self.figure.value)
        return noise_of(self.ours, self.figure.rounding) if both and self.ours and self.figure else math.nan

    @property
    def beyond_noise(self) -> bool:
        """Whether the two figures differ by more than noise explains; of two collapsed models nothing is said."""
        if math.isnan(self.noise) or self.ours is None or self.figure is None:
            return False
        lower = min(self.ours.mean, self.figure.value)
        collapsed = known(self.figure.metric).of_text and lower >= COLLAPSED
        return abs(self.ours.mean - self.figure.value) > self.noise and not collapsed


@dataclasses.dataclass
class Line:
    """A method with its bits: a row of most papers' tables.

    Attributes:
        bits: As the paper prints them; our bitwidth where the paper does not have the row.
        method: The paper's word for it, or our method.
        cells: Our cells by model.
        figures: The printed figures by model and metric.
        with_bits: Whether our names must say the bitwidth, because cells of several belong to the paper's line.
    """

    bits: str
    method: str
    cells: dict[str, Cell] = dataclasses.field(default_factory=dict)
    figures: dict[tuple[str, str], Figure] = dataclasses.field(default_factory=dict)
    with_bits: bool = False

    @property
    def names(self) -> list[str]:
        """Our names of the method."""
        names = (
            f"{cell['method']} {cell['bitwidth']}" if self.with_bits else cell["method"] for cell in self.cells.values()
        )
        return list(dict.fromkeys(names))


@dataclasses.dataclass
class PaperTable:
    """A table of a paper with our figures in it.

    Attributes:
        paper: Its short name.
        table: Where the figures stand in it; empty if none of them belongs to a cell.
        arxiv: Its number on arXiv; empty if unknown.
        down: The axes that run down: ``model``, ``method`` or both.
        models: Models, in the paper's order.
        metrics: Our names of the metrics, in the paper's order.
        lines: Methods with their bits, in the paper's order; then those that the paper does not have.
        places: By number of the line, model and metric; a place where neither has a figure is absent.
        absent_models: Models of the paper's table that no cell has.
    """

    paper: str
    table: str
    arxiv: str
    down: tuple[str, ...]
    models: list[str]
    metrics: list[str]
    lines: list[Line]
    places: dict[tuple[int, str, str], Place]
    absent_models: list[str]

    def frame(self) -> pd.DataFrame:
        """One row per place, for plots and other programs; columns ``PLACE``."""
        rows = []
        for (number, model, metric), place in self.places.items():
            line = self.lines[number]
            cell, ours, figure = line.cells.get(model, {}), place.ours, place.figure
            rows.append({
                "paper": self.paper, "table": self.table, "model": model, "bits": line.bits, "method": line.method,
                "our_method": cell.get("method"), "our_bitwidth": cell.get("bitwidth"), "metric": metric,
                "ours": ours.mean if ours else math.nan, "spread": ours.spread if ours else math.nan,
                "seeds": ours.seeds if ours else 0, "reported": figure.value if figure else math.nan,
                "printed": figure.text if figure else "", "noise": place.noise, "beyond_noise": place.beyond_noise,
                "why": "; ".join(place.why), "missing": "; ".join(place.unmeasured + place.absent),
            })  # fmt: skip
        return pd.DataFrame(rows, columns=PLACE)


def frame_of(tables: Sequence[PaperTable]) -> pd.DataFrame:
    """All places of some tables, one per row; columns ``PLACE``."""
    frames = [table.frame() for table in tables]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=PLACE)


def noise_of(ours: Value, rounding: float) -> float:
    """How far from our mean a figure of one more run lies, at most, with 95 % probability.

    With several seeds, half of the prediction interval of a further seed: t(n-1) s sqrt(1 + 1/n), Student's t, s the sample
    standard deviation. With one seed, 1.96 standard errors of the evaluation, which is cautious because the paper's run saw the
    same text and examples. The rounding of the printed figure is added.
    """
    from scipy import stats

    if ours.seeds > 1 and not math.isnan(ours.spread):
        half = float(stats.t.ppf(0.975, ours.seeds - 1)) * ours.spread * math.sqrt(1 + 1 / ours.seeds)
    else:
        half = 0.0 if math.isnan(ours.error) else float(stats.norm.ppf(0.975)) * ours.error
    return half + rounding * (1 + 1e-9)  # a figure that is off by its rounding alone is not beyond it


def paper_tables(frame: pd.DataFrame, papers: Sequence[str] = ()) -> list[PaperTable]:
    """Put cells into the tables of papers.

    Args:
        frame: As ``tables.tidy`` returns it, not modified.
        papers: ``PAPER`` or ``PAPER, TABLE``, as in ``reported.csv``. Empty: every table with a figure of a quantized cell.

    Returns:
        A named paper without a figure for these cells gives our values alone. Otherwise one table for each that has any.

    Raises:
        ConfigError: There are figures of a paper, but not of the named table.
    """
    printed, words = load()
    cells = frame.dropna(subset=["model", "solver"])
    ours = Ours(cells, words)
    by_model: dict[str, list[Cell]] = {}
    for cell in records(cells.drop_duplicates(KEYS)):
        by_model.setdefault(cell["model"], []).append(cell)
    tables = [
        _build(paper, table, rows, by_model, ours, words, alone)
        for paper, table, rows, alone in _chosen(printed, words, papers, by_model)
    ]
    return tables if papers else sorted(tables, key=lambda table: -sum(_judged(p) for p in table.places.values()))


def _judged(place: Place) -> bool:
    return place.ours is not None and place.figure is not None and place.figure.row["provenance"] != "second_hand"


def _chosen(
    printed: pd.DataFrame, words: dict[str, Any], papers: Sequence[str], cells: dict[str, list[Cell]]
) -> Iterable[tuple[str, str, pd.DataFrame, bool]]:
    """The tables that are asked for, with their rows of ``reported.csv``; and whether a named paper has no better known table."""
    names = [[part.strip() for part in name.split(",", 1)] for name in papers]
    printed = printed[printed["paper"].isin([paper for paper, *_ in names])] if papers else printed
    joined = {
        (figure.row["paper"], figure.row["table"])
        for figure in figures(printed[printed["model"].isin(cells)], words)
        if any(
            same_cell(cell, figure) and cell["nominal_w_bits"] < UNTOUCHED_BITS for cell in cells[figure.row["model"]]
        )
    }
    for paper, *named in names or [[paper] for paper in dict.fromkeys(printed["paper"])]:
        of_paper = printed[printed["paper"] == paper]
        there = list(dict.fromkeys(of_paper["table"]))
        if named and there and named[0] not in there:
            raise ConfigError(
                f"papers: expected a table of {paper} that is known ({', '.join(there)}), got {named[0]!r}"
            )
        found = [table for table in named or there if (paper, table) in joined]
        if not found and papers:
            yield paper, "", of_paper[:0], True
        for table in found:
            alone = bool(papers) and (table != QUOTED or found == [QUOTED])
            yield paper, table, of_paper[of_paper["table"] == table], alone


def _build(
    paper: str,
    table: str,
    rows: pd.DataFrame,
    cells: dict[str, list[Cell]],
    ours: Ours,
    words: dict[str, Any],
    alone: bool,
) -> PaperTable:
    """One table: lines of the paper with our cells, then our other cells, and the figures of both in every place."""
    about = words.get("tables", {}).get(f"{paper}, {table}", {})
    partly = about.get("incomplete", table in ("", QUOTED))
    # Of a table that is known in part, all cells and metrics are shown; else those of its models, bits and metrics.
    whole = bool(alone and partly)
    given = figures(rows[rows["model"].isin(cells)], words)
    models = [model for model in dict.fromkeys(rows["model"]) if model in cells]
    models += [model for model in cells if whole and model not in models]
    measured = [figure.metric for figure in given] + (_usual(ours.metrics) if whole else [])
    metrics = list(dict.fromkeys(measured)) or [""]
    lines = _lines(given, {model: cells[model] for model in models}, whole)
    gap = "not among the figures that ptqbench knows" if partly else "not in the paper's table"
    places = {
        (number, model, metric): place
        for number, line in enumerate(lines)
        for model in models
        for metric in metrics
        if (place := _place(line, model, metric, ours, gap)) is not None
    }
    absent = [model for model in dict.fromkeys(rows["model"]) if model not in cells]
    down = tuple(about.get("down", DOWN))
    return PaperTable(paper, table, "".join(rows["arxiv_id"][:1]), down, models, metrics, lines, places, absent)


def _usual(metrics: list[str]) -> list[str]:
    """What papers print: perplexities and the average over most tasks."""
    averages = [name for name in metrics if name.startswith((AVERAGE, "average of "))]
    longest = sorted(averages, key=lambda name: name.count(","))[-1:]
    return [name for name in metrics if known(name).of_text and not known(name).relative] + longest


def _lines(given: list[Figure], cells: dict[str, list[Cell]], whole: bool) -> list[Line]:
    """The paper's lines with our cells, then lines of our other cells; ``whole`` takes those at other bits too."""
    by_line: dict[tuple[str, str], dict[str, list[Figure]]] = {}
    for figure in given:
        of_line = by_line.setdefault((figure.row["bits_label"], figure.row["method"]), {})
        of_line.setdefault(figure.row["model"], []).append(figure)
    # Every cell goes to the line to which the least stands against it; of equals, to the one that says most of its method.
    chosen: dict[tuple[str, str], dict[str, list[Cell]]] = {key: {} for key in by_line}
    left: list[Cell] = []
    for model, several in cells.items():
        for cell in several:
            fitting = [
                (len(method_objections(cell, figure)), -len(figure.method or ()), place, key)
                for place, (key, of_line) in enumerate(by_line.items())
                for figure in of_line.get(model, [])[:1]
                if same_cell(cell, figure)
            ]
            if fitting:
                chosen[min(fitting)[-1]].setdefault(model, []).append(cell)
            else:
                left.append(cell)
    lines = [line for key, of_line in by_line.items() for line in _variants(key, of_line, chosen[key], left)]
    widths = {cell["bitwidth"] for line in lines for cell in line.cells.values()}
    ours: dict[tuple[str, str], Line] = {}
    for cell in left:
        if whole or cell["bitwidth"] in widths:
            line = ours.setdefault((cell["bitwidth"], cell["method"]), Line(cell["bitwidth"], cell["method"]))
            line.cells[cell["model"]] = cell
    first = list(dict.fromkeys(width for width, _ in ours))
    lines += [line for _, line in sorted(ours.items(), key=lambda pair: first.index(pair[0][0]))]
    return sorted(
        lines, key=lambda line: not any(cell["nominal_w_bits"] >= UNTOUCHED_BITS for cell in line.cells.values())
    )


def _variants(
    key: tuple[str, str], printed: dict[str, list[Figure]], chosen: dict[str, list[Cell]], left: list[Cell]
) -> list[Line]:
    """A line of the paper; one per variant of ours where a model has several. Takes cells of the same names from ``left``."""
    by_metric = {(model, figure.metric): figure for model, several in printed.items() for figure in several}
    if all(len(several) == 1 for several in chosen.values()):
        lines = [Line(*key, {model: several[0] for model, several in chosen.items()}, by_metric)]
    else:
        variants: dict[Key, dict[str, Cell]] = {}
        for model, several in chosen.items():
            for cell in several:
                variants.setdefault(key_of(cell)[1:], {})[model] = cell
        with_bits = len({width for _, width in variants}) > 1
        lines = [Line(*key, found, by_metric, with_bits) for found in variants.values()]
    for line in lines:
        pairs = {key_of(cell)[1:] for cell in line.cells.values()}
        for cell in [cell for cell in left if key_of(cell)[1:] in pairs]:
            if cell["model"] not in line.cells:
                line.cells[cell["model"]] = cell
                left.remove(cell)
    return lines


def _place(line: Line, model: str, metric: str, ours: Ours, gap: str) -> Place | None:
    """Ours and the paper's figure with what is to be said of them; None where there is neither."""
    cell, figure = line.cells.get(model), line.figures.get((model, metric))
    if cell is None and figure is None:
        return None
    if cell is None:
        assert figure is not None
        return Place(None, figure, absent=(NO_CELL if figure.method else f"ptqbench does not have {line.method}",))
    value = ours.value(key_of(cell), metric)
    if figure is None:
        return Place(value, None, absent=(gap,))
    why = objections(cell, figure, value.measured_on)
    why += [SECOND_HAND] if figure.row["provenance"] == "second_hand" and not why else []
    return Place(value, figure, tuple(why))
