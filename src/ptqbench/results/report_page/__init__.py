"""The report of a sweep: one self-contained HTML page with table, plots, cost and provenance. Imports no torch.

A page is a view of run folders: the same folders give the same bytes. It holds no script and refers to nothing outside itself:
plots are SVG inside the page, and the style is in its head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptqbench.models.source import EMBEDDED
from ptqbench.results import claims_sheet, tables
from ptqbench.results.claims import answer, load_claims
from ptqbench.results.layout import without_common
from ptqbench.results.metrics import known
from ptqbench.results.report_page import facts, plots
from ptqbench.results.reported import check, check_sheet
from ptqbench.results.tables import Sheet, Source
from ptqbench.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "page.html.jinja"


def report_page(
    sources: Sequence[Source], title: str = "", columns: Sequence[str] = ("metric",), command: Sequence[str] = ()
) -> str:
    """Write the page of some cells.

    Args:
        sources: As ``tables.tidy`` takes them. Unfinished and failed cells are shown with their states; there may be no cell.
        title: Heading of the page.
        columns: As ``tables.comparison_sheet`` takes them.
        command: Words of the command line that runs these cells; empty where they are no sweep.

    Returns:
        The text of the page, HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # What is known of the cells: one frame, its comparison, the papers' figures, and the provenance in the folders.
    folders = {one[0].run_id: one[0] for one in sources if isinstance(one, tuple) and isinstance(one[0], RunFolder)}
    frame = tables.tidy(sources)
    frame = frame.assign(folder=[str(folders[name].path) if name in folders else "" for name in frame["run_id"]])
    averaged, _ = tables.averaged(frame)  # the comparison says so where there is no average
    found = tables.pivot(averaged)
    references = facts.unquantized(frame)
    cells, papers = facts.read_cells(frame, folders), check(frame)
    answers = [one for one in answer(load_claims(), sources) if one.tests]
    lines, about = facts.claims(answers)
    # The page: the template lays out what these functions say.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=StrictUndefined)
    environment.loader = FileSystemLoader(Path(__file__).parent)
    return environment.get_template(TEMPLATE).render(
        title=title or "Comparison of finished cells",
        lead=facts.lead(found, cells, references),
        states=facts.states(cells),
        headlines=facts.headlines(found, references),
        embedded=sorted(name for name in set(frame["model"].dropna()) if name.removesuffix("-outlier") in EMBEDDED),
        claims=lines,
        claims_lead=about,
        claims_remark=claims_sheet.corrected(answers),
        claim_tests=dataclasses.replace(claims_sheet.tests_sheet(answers), title=""),
        measured=facts.measured(frame, found, cells),
        comparison=_comparison(frame, columns) if len(frame) else None,
        trade_offs=plots.trade_offs(averaged, found, references),
        fidelity=any(known(metric).relative for metric in found.mean.columns),
        layers=plots.layers(frame),
        cost=facts.cost(cells, found) if len(found.mean.columns) else None,
        papers=check_sheet(papers) if len(papers) else None,
        provenance=facts.provenance(cells),
        reproduce=facts.reproduce(cells, command),
        listing=facts.listing(cells),
        html=tables.html,
        bare=_bare,
    )


def _comparison(frame: pd.DataFrame, columns: Sequence[str]) -> Sheet:
    """The comparison; a model that all rows share stands above it, as in a terminal."""
    sheet, common = without_common(tables.comparison_sheet(frame, columns=columns), ("model",))
    return dataclasses.replace(sheet, title="; ".join(common))


def _bare(sheet: Sheet) -> Sheet:
    """A sheet without the words below it. The template prints them itself, so that they stay in view when a table is scrolled."""
    return dataclasses.replace(sheet, notes=[], remarks=[])
