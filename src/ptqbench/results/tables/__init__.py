"""Run folders -> tidy frame -> comparison -> Markdown, LaTeX, HTML. Pure functions on pandas; no torch."""

from ptqbench.results.metrics import format_bits, format_value, higher_is_better
from ptqbench.results.tables.names import KEYS
from ptqbench.results.tables.pivot import Pivot, averaged, best, comparison, pivot, task_average
from ptqbench.results.tables.render import html, html_page, latex, markdown, with_head_notes
from ptqbench.results.tables.sheet import Column, Entry, Sheet, comparison_sheet
from ptqbench.results.tables.tidy import Absent, Source, records, tidy

__all__ = [
    "KEYS",
    "Absent",
    "Column",
    "Entry",
    "Pivot",
    "Sheet",
    "Source",
    "averaged",
    "best",
    "comparison",
    "comparison_sheet",
    "format_bits",
    "format_value",
    "higher_is_better",
    "html",
    "html_page",
    "latex",
    "markdown",
    "pivot",
    "records",
    "task_average",
    "tidy",
    "with_head_notes",
]  # fmt: skip
