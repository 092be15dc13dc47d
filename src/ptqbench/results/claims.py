"""What papers claim, as data, and what finished cells say to it. ``docs/claims.md`` describes the file and the answers.

A claim says that the cells of one selection are better (or worse) than those of another, by some metrics. Each pair of rows that
agrees in model, bits and evaluation is one test per metric. The p-values of all tests of all claims are corrected together (Holm),
and a row of several seeds must differ beyond their spread (``draws``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from ptqbench.cell.folders import claims_file, group_names
from ptqbench.cell.formats import INTEGER
from ptqbench.cell.spec import ROLES, build, nearest, strict
from ptqbench.errors import ConfigError
from ptqbench.results.compare import UNDECIDED, Judged, compare_metric, holm, judged, shared_metrics
from ptqbench.results.figures import load
from ptqbench.results.metrics import KINDS, kind
from ptqbench.results.sides import Row, framed, rows_of, unfinished
from ptqbench.results.stats import Comparison
from ptqbench.results.tables import KEYS, Source, records
from ptqbench.results.tables.pivot import NEVER_RUN
from ptqbench.results.tables.tidy import DRAW, SETTINGS
from ptqbench.sweeps.yaml_file import read_mapping

SUPPORTED, CONTRADICTED, UNDISTINGUISHABLE, NOT_RUN = "supported", "contradicted", "not distinguishable", "not run"
SO_FAR = "supported so far"
FORMATS = ("w_format", "a_format", "kv_format")
BITS = (
    "bitwidth",
    "w_bits",
    "a_bits",
    "k_bits",
    "v_bits",
    "group_size",
    *FORMATS,
    "nominal_w_bits",
    "nominal_a_bits",
    "nominal_kv_bits",
)
COLUMNS = ("method", "model", *BITS, *ROLES, *SETTINGS)
"""What a selection may say: columns of the tidy frame. ``method`` is a paper's name or that of a file in ``conf/method``."""
ACCURACY = "accuracy"
Selection = dict[str, Any]
Asked = tuple[frozenset[str], frozenset[str], str]
"""A test: the cells of the second row, those of the first one, and the metric."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        name: A short name, unique in its file.
        paper: Who claims it.
        source: Where it is printed.
        says: The claim in one sentence.
        first: The rows that it is about, column by column; a list holds alternatives.
        second: The rows that they are compared with.
        metrics: Metrics (``wikitext2/perplexity``), kinds of them (``perplexity``), or ``accuracy``.
        where: What both must have.
        alike: Columns in which the two rows of a pair agree, beside model, bits and evaluation.
        models: The models that it is about; empty for every model that there is.
        stated_for: The models for which the paper prints it.
        tasks: What ``accuracy`` is the mean of, if the cells have all of these tasks.
        direction: What the first rows are.
        scope: Whether it is claimed of every pair, or of one at least.
        sweep: The sweep that has its cells.
    """

    name: Annotated[str, Field(min_length=1)]
    paper: str
    says: Annotated[str, Field(min_length=1)]
    first: Annotated[Selection, Field(min_length=1)]
    second: Annotated[Selection, Field(min_length=1)]
    metrics: Annotated[list[str], Field(min_length=1)]
    source: str = ""
    where: Selection = dataclasses.field(default_factory=dict)
    alike: list[str] = dataclasses.field(default_factory=list)
    models: list[str] = dataclasses.field(default_factory=list)
    stated_for: list[str] = dataclasses.field(default_factory=list)
    tasks: list[str] = dataclasses.field(default_factory=list)
    direction: Literal["better", "worse"] = "better"
    scope: Literal["every", "some"] = "every"
    sweep: str = ""


@dataclasses.dataclass(frozen=True)
class ClaimsFile:
    """A file of claims."""

    claims: Annotated[list[Claim], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Tested:
    """One pair of rows and one metric; ``judged`` is the comparison of the first rows with the second ones."""

    first: Row
    second: Row
    judged: Judged

    @property
    def one_draw(self) -> bool:
        """Whether each side is one draw, so that nothing is known of the spread over seeds."""
        return self.judged.found.draws == (1, 1)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What finished cells say to a claim.

    Attributes:
        claim: The claim.
        word: ``supported``, ``supported so far`` (cells are missing), ``contradicted``, ``not distinguishable`` or ``not run``.
        tests: The tests behind it.
        missing: Its cells that have no result, with their states.
        refused: Why pairs of finished cells could not be tested, such as a metric that was not measured.
    """

    claim: Claim
    word: str
    tests: list[Tested]
    missing: list[str]
    refused: list[str]

    @property
    def p_value(self) -> float | None:
        """The corrected p-value that decides: the smallest where one test is enough for the answer, else the largest."""
        words = {SUPPORTED: self.claim.direction, SO_FAR: self.claim.direction, CONTRADICTED: _against(self.claim)}
        found = [
            test.judged.adjusted for test in self.tests if words.get(self.word, test.judged.word) == test.judged.word
        ]
        one_is_enough = (self.word == CONTRADICTED) == (self.claim.scope == "every")
        return (min if one_is_enough else max)(found, default=None)

    @property
    def models(self) -> list[str]:
        """The models that the answer speaks of."""
        return list(dict.fromkeys(test.first.names[0] for test in self.tests))


def load_claims(path: str | None = None) -> list[Claim]:
    """Read a file of claims; None for the one that ships with ptqbench.

    Raises:
        ConfigError: The file is not one of claims, or a claim names what does not exist.
    """
    file = claims_file() if path is None else Path(path)
    if not file.is_file():
        raise ConfigError(f"no file of claims {path!r} (looked in {Path.cwd()})")
    found: ClaimsFile = build(strict(ClaimsFile), read_mapping(file, "claims"), file.name)
    seen: set[str] = set()
    for place, claim in enumerate(found.claims):
        where = f"{file.name}.claims.{place} ({claim.name})"
        if claim.name in seen:
            raise ConfigError(f"{where}: expected a name of its own, got that of a claim above")
        seen.add(claim.name)
        _check(claim, where)
    return found.claims


def _check(claim: Claim, where: str) -> None:
    """Refuse columns, methods and metrics that do not exist."""
    for part in ("first", "second", "where"):
        for column, value in getattr(claim, part).items():
            if column not in COLUMNS:
                raise ConfigError(f"{where}: {part}: unknown column {column!r}; {nearest(column, COLUMNS)}")
            if isinstance(value, dict):
                raise ConfigError(f"{where}: {part}: {column}: expected a value or a list of values, got {value!r}")
            for method in _listed(value) if column == "method" else []:
                methods = {*load()[1]["methods"], *group_names("method")}
                if method not in methods:
                    raise ConfigError(f"{where}: {part}: unknown method {method!r}; {nearest(str(method), methods)}")
    for column in claim.alike:
        if column not in COLUMNS:
            raise ConfigError(f"{where}: alike: unknown column {column!r}; {nearest(column, COLUMNS)}")
    for metric in claim.metrics:
        if "/" not in metric and metric not in (*KINDS, ACCURACY):
            raise ConfigError(f"{where}: metrics: unknown metric {metric!r}; {nearest(metric, [*KINDS, ACCURACY])}")


def answer(claims: Sequence[Claim], sources: Iterable[Source]) -> list[Answer]:
    """Answer claims from finished cells.

    Args:
        claims: As ``load_claims`` returns them.
        sources: Cells, as ``tables.tidy`` takes them.

    Returns:
        One answer per claim, in order. P-values are corrected for the number of different tests of all claims.
    """
    frame, folders = framed(sources)
    rows = rows_of(frame, folders)
    # All tests first, since each p-value depends on the others. A test that two claims share counts once, whatever its direction.
    found: dict[Asked, Comparison] = {}
    asked = [_tests(claim, rows, found) for claim in claims]
    adjusted = holm({same_test(*key): one for key, one in found.items()})
    answers = []
    for claim, (wanted, refused) in zip(claims, asked, strict=True):
        tests = [
            Tested(a, b, judged(metric, found[key], adjusted[same_test(*key)], (_called(b, a), _called(a, b))))
            for a, b, metric, key in wanted
        ]
        missing = _unfinished(claim, frame)
        word = _word(claim, tests, complete=not missing and not refused)
        answers.append(Answer(claim, word, tests, missing, list(dict.fromkeys(refused))))
    return answers


def same_test(one: frozenset[str], other: frozenset[str], metric: str) -> Hashable:
    """What two tests of the same rows and metric share, in whichever direction they were made."""
    return frozenset((one, other)), metric


def _word(claim: Claim, tests: Sequence[Tested], complete: bool) -> str:
    words = [test.judged.word for test in tests]
    if not tests:
        return NOT_RUN
    wanted = words.count(claim.direction)
    if claim.scope == "some":
        if wanted:
            return SUPPORTED
        return CONTRADICTED if UNDECIDED not in words and complete else UNDISTINGUISHABLE
    if _against(claim) in words:
        return CONTRADICTED
    if wanted < len(words):
        return UNDISTINGUISHABLE
    return SUPPORTED if complete else SO_FAR


def _against(claim: Claim) -> str:
    """What the first rows are where they are the opposite of what is claimed."""
    return "worse" if claim.direction == "better" else "better"


def _called(row: Row, other: Row) -> str:
    """A row by its method, and by its bits where those of the other differ."""
    return row.names[1] if row.names[2] == other.names[2] else " ".join(row.names[1:])


def _tests(
    claim: Claim, rows: Sequence[Row], found: dict[Asked, Comparison]
) -> tuple[list[tuple[Row, Row, str, Asked]], list[str]]:
    """The tests of a claim; those that are new are added to ``found``. And why pairs cannot be tested."""
    wanted, refused = [], []
    for first, second in _pairs(claim, rows):
        try:
            shared = shared_metrics(first.side, second.side)
        except ConfigError as error:
            refused.append(str(error))
            continue
        for word in claim.metrics:
            metrics = _metrics(word, claim, shared)
            if not metrics:
                refused.append(
                    f"{first.names[0]} {_called(first, second)} and {_called(second, first)}: no {word} measured"
                )
            for metric in metrics:
                key = (second.run_ids, first.run_ids, metric)
                try:
                    found[key] = found.get(key) or compare_metric(second.side, first.side, metric)
                except ConfigError as error:
                    refused.append(str(error))
                    continue
                wanted.append((first, second, metric, key))
    return wanted, refused


def _pairs(claim: Claim, rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Pairs of rows that agree in model and evaluation, in bits unless a side names its own, and in what is ``alike``."""
    firsts, seconds = (
        [row for row in rows if _selected(row.cell, claim, side)] for side in (claim.first, claim.second)
    )
    for first in firsts:
        for second in seconds:
            alike = _common(claim, first.cell) == _common(claim, second.cell)
            if first.run_ids != second.run_ids and alike and first.cell["evaluation"] == second.cell["evaluation"]:
                yield first, second


def _selected(cell: Mapping[str, Any], claim: Claim, selection: Selection) -> bool:
    """Whether a record of the tidy frame is one that a selection means."""
    if claim.models and cell["model"] not in claim.models:
        return False
    conditions = {**claim.where, **selection}
    if "bitwidth" not in conditions:  # bits mean integers unless the claim names a format
        conditions = dict.fromkeys(FORMATS, INTEGER) | conditions
    return any(_fits(cell, one) for one in _spelled_out(conditions))


def _spelled_out(conditions: Selection) -> Iterator[Selection]:
    """Conditions with every method of a paper replaced by its roles and options; what is said beside it takes precedence."""
    methods = load()[1]["methods"]
    rest = {column: value for column, value in conditions.items() if column != "method"}
    for method in _listed(conditions["method"]) if "method" in conditions else [None]:
        if method is None:
            yield rest
        elif method in methods:
            yield {column: value for column, value in methods[method].items() if column in COLUMNS} | rest
        else:
            yield {**rest, "method": method}


def _fits(cell: Mapping[str, Any], conditions: Selection) -> bool:
    for column, value in conditions.items():
        # The name of a row begins with that of its file in conf/method.
        given = str(cell[column]).split()[0] if column == "method" else cell[column]
        if not any(_equal(given, one) for one in _listed(value)):
            return False
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other or (pd.isna(one) and pd.isna(other)))


def _metrics(word: str, claim: Claim, shared: Sequence[str]) -> list[str]:
    """The metrics of two rows that a word of a claim means."""
    if word == ACCURACY:
        # acc_norm where a task has it, else acc.
        tasks = {name.rpartition("/")[0]: name for name in shared if kind(name) == "acc"}
        tasks |= {name.rpartition("/")[0]: name for name in shared if kind(name) == "acc_norm"}
        chosen = claim.tasks if claim.tasks and set(claim.tasks) <= set(tasks) else list(tasks)
        names = [tasks[task] for task in chosen if "(" not in task]
        return [f"average({', '.join(names)})"] if len(names) > 1 else names
    if "(" in word:
        parts = word.partition("(")[2].rstrip(")").split(", ")
        return [word] if set(parts) <= set(shared) else []
    if "/" in word:
        return [word] if word in shared else []
    return [name for name in shared if kind(name) == word and "(" not in name]


def _unfinished(claim: Claim, frame: pd.DataFrame) -> list[str]:
    """The cells without a result that a pair of the claim waits for."""
    asked = frame[~frame["state"].isin(NEVER_RUN)].dropna(subset=["model", "solver"])
    cells = records(asked.drop_duplicates([*KEYS, *DRAW]))
    sides = [[cell for cell in cells if _selected(cell, claim, side)] for side in (claim.first, claim.second)]
    # What the cells of a pair have in common must occur on both sides; else there is nothing to wait for.
    common = [{_common(claim, cell) for cell in side} for side in sides]
    kept = [cell for side in sides for cell in side if _common(claim, cell) in common[0] & common[1]]
    return list(dict.fromkeys(unfinished(pd.DataFrame(kept, columns=frame.columns))))


def _common(claim: Claim, cell: Mapping[str, Any]) -> tuple[str, ...]:
    """What the two rows of a pair must have in common, beside the evaluation, of a record of the tidy frame."""
    own_bits = any(column in claim.first or column in claim.second for column in BITS)
    columns = ["model", *([] if own_bits else ["bitwidth"]), *claim.alike]
    return tuple("" if pd.isna(cell[column]) else str(cell[column]) for column in columns)


def of_paper(claim: Claim, models: Iterable[str]) -> bool:
    """Whether the paper prints its claim for one of these models."""
    return any(model in claim.stated_for for model in models)
