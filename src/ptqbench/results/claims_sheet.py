"""Lay out the answers to claims: one line per claim, and the tests behind them; print them, or write them to a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ptqbench.results.claims import NOT_RUN, SO_FAR, Answer, Tested, of_paper, same_test
from ptqbench.results.compare import UNDECIDED
from ptqbench.results.metrics import format_value
from ptqbench.results.named import SHOWN
from ptqbench.results.stats import in_unit, p_text
from ptqbench.results.tables import Column, Entry, Sheet

if TYPE_CHECKING:
    import argparse

ONE_DRAW = "One draw of each side: nothing is known of the spread over seeds."
NO_DRAW = "Neither side depends on a seed."
ONE_OF_SOME = "In some tests each side is one draw: nothing is known of the spread over seeds there."


def print_claims(answers: Sequence[Answer], options: argparse.Namespace, command: str, title: str = "") -> None:
    """Print the answers to claims, or write them to a file.

    Args:
        answers: As ``claims.answer`` returns them.
        options: ``format`` and ``output``, as ``table`` takes them.
        command: The command line that runs the cells; empty where they are no sweep.
        title: Printed above.
    """
    from ptqbench.results.terminal import output_style, print_sheets, put

    style = output_style(options)
    if style == "csv":
        import pandas as pd

        put(pd.DataFrame(records(answers)).to_csv(index=False), options.output)
        return
    sheets = [claims_sheet(answers, command, title)]
    sheets += [tests_sheet(answers)] if any(answer.tests for answer in answers) else []
    print_sheets(sheets, style, options.output)


def claims_sheet(answers: Sequence[Answer], command: str, title: str = "") -> Sheet:
    """One row per claim: who says what, the answer with its p-value, and what limits it as a footnote."""
    heads = [("#", True), ("paper", False), ("claim", False), ("answer", False), ("p", True)]
    sheet = Sheet([Column(name, numeric=numeric) for name, numeric in heads], title=title)
    for number, answer in enumerate(answers, 1):
        note = " ".join([*limits(answer), *lacking(answer, command)])
        said = Entry(answer.word, answer.word not in (NOT_RUN, SO_FAR), sheet.note(note) if note else None)
        row = [Entry(str(number)), Entry(answer.claim.paper), Entry(answer.claim.says), said, Entry(_p_value(answer))]
        sheet.rows.append(row)
    sheet.remarks = [counted(answers), *speaks_for(answers), *([] if not _n_tests(answers) else [corrected(answers)])]
    return sheet


def tests_sheet(answers: Sequence[Answer]) -> Sheet:
    """One row per test: both values, the difference, its corrected p-value and what the first row is; numbered as the claims."""
    labels, figures = ("#", "model", "pair", "metric"), ("its", "other's", "difference", "p")
    sheet = Sheet(
        [*(Column(name, numeric=False) for name in labels), *map(Column, figures), Column("it is", numeric=False)]
    )
    sheet.title = "The tests behind the answers"
    for number, answer in enumerate(answers, 1):
        for test in answer.tests:
            sheet.add([Entry(str(number)), *_test_row(test, sheet)], number)
    sheet.remarks = [
        "Difference: its - other's, in percent of a perplexity, in points of a share, in nats of a KL divergence."
    ]
    return sheet


def _test_row(test: Tested, sheet: Sheet) -> list[Entry]:
    found, metric, (first, second) = test.judged.found, test.judged.metric, (test.first.names, test.second.names)
    # What is compared: bits once where both have the same; seeds and the tasks of an average as footnotes.
    bits = "" if first[2] == second[2] else f" {first[2]}"
    pair, seeds = f"{first[1]}{bits} against {second[1]} {second[2]}", found.draws
    several = None if seeds == (1, 1) else sheet.note(f"{seeds[1]} and {seeds[0]} seeds")
    note = sheet.note(metric) if "(" in metric else None
    name = f"average of {metric.count(',') + 1}" if "(" in metric else metric
    # Both values and what the test says.
    shown = "acc" if found.kind == "accuracy" else found.kind
    values = [format_value(shown, value) for value in (found.second, found.first)]
    figures = [*values, in_unit(found, found.difference), p_text(test.judged.adjusted)]
    word = Entry(test.judged.word, test.judged.word != UNDECIDED)
    return [Entry(first[0]), Entry(pair, note=several), Entry(name, note=note), *map(Entry, figures), word]


def limits(answer: Answer) -> list[str]:
    """What limits an answer, in sentences: models, single draws, settings that are not the paper's."""
    if not answer.tests:
        return []
    said, models = [], ", ".join(answer.models)
    if answer.claim.stated_for and not of_paper(answer.claim, answer.models):
        said.append(f"Answered on {models}, which is none of the paper's models.")
    else:
        said.append(f"Answered on {models}.")
    measured = list(dict.fromkeys(test.judged.metric for test in answer.tests if test.judged.found.kind == "accuracy"))
    if answer.claim.tasks and any(not set(answer.claim.tasks) <= set(re.split(r"[(/ ]", one)) for one in measured):
        said.append(f"Accuracy is that of {', '.join(measured)}, not of the paper's {len(answer.claim.tasks)} tasks.")
    if len(answer.tests) > 1:
        words = Counter(test.judged.word for test in answer.tests)
        said.append(f"Of {len(answer.tests)} tests: {', '.join(f'{count} {word}' for word, count in words.items())}.")
    single = [test.one_draw for test in answer.tests]
    if not any(side.random for test in answer.tests for side in (test.first.side, test.second.side)):
        said.append(NO_DRAW)
    else:
        said += [ONE_DRAW] if all(single) else [ONE_OF_SOME] if any(single) else []
    return said


def lacking(answer: Answer, command: str) -> list[str]:
    """What an answer lacks, and the command that makes it, in sentences."""
    said = []
    if answer.missing:
        said.append(f"Missing: {_first(answer.missing)}.{f' Run: {command}' if command else ''}")
    if answer.refused:
        said.append(f"Not tested: {_first(answer.refused)}.")
    if not answer.tests and not answer.missing:
        said += [] if answer.refused else ["No such pair of cells is here."]
        said += [f"Run: python -m ptqbench sweep {answer.claim.sweep}"] if answer.claim.sweep else []
    return said


def _first(words: Sequence[str]) -> str:
    return "; ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def speaks_for(answers: Sequence[Answer]) -> list[str]:
    """A sentence on the models that all answers together speak of."""
    models = list(dict.fromkeys(model for answer in answers for model in answer.models))
    return [f"These answers speak for {' and '.join(models)} alone, as quantized and measured here."] if models else []


def counted(answers: Sequence[Answer]) -> str:
    """How many claims have which answer."""
    words = Counter(answer.word for answer in answers)
    return f"{len(answers)} claims: {', '.join(f'{count} {word}' for word, count in words.items())}."


def corrected(answers: Sequence[Answer]) -> str:
    """What the p-values are."""
    return (
        "p: two-sided, of paired tests on the same windows and examples, corrected for the number of tests "
        f"({_n_tests(answers)}; Holm). "
        "supported: p < 0.05 and as claimed in every test. contradicted: p < 0.05 and the opposite in one test. With several seeds "
        "the tests count their spread."
    )


def records(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Plain rows, one per test; one row for a claim without a test."""
    return [
        row for answer in answers for row in ([_record(answer, test) for test in answer.tests] or [_record(answer)])
    ]


def _record(answer: Answer, test: Tested | None = None) -> dict[str, Any]:
    claim = answer.claim
    row: dict[str, Any] = {"claim": claim.name, "paper": claim.paper, "says": claim.says, "answer": answer.word}
    if test is None:
        return row
    found = test.judged.found
    names = {"model": test.first.names[0], "bitwidth": test.first.names[2], "method": test.first.names[1]}
    figures = {name: getattr(found, name) for name in ("difference", "low", "high", "p_value", "n", "test")}
    values = {"value": found.second, "other_value": found.first, "seeds": found.draws[1], "other_seeds": found.draws[0]}
    rival = {"against": test.second.names[1], "against_bitwidth": test.second.names[2], "metric": test.judged.metric}
    return row | names | rival | values | figures | {"p_adjusted": test.judged.adjusted, "is": test.judged.word}


def _n_tests(answers: Iterable[Answer]) -> int:
    return len({same_test(t.first.run_ids, t.second.run_ids, t.judged.metric) for one in answers for t in one.tests})


def _p_value(answer: Answer) -> str:
    return "" if answer.p_value is None else p_text(answer.p_value)
