"""A sheet as Markdown, LaTeX (booktabs) or HTML. The same sheet gives the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from html import escape

from ptqbench.results.metrics import MISSING, PLUS_MINUS
from ptqbench.results.tables.sheet import Column, Entry, Sheet

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≤": r"$\leq$", "…": r"\ldots{}",
})  # fmt: skip
STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em;color:#111}table{border-collapse:collapse}"
    "caption{text-align:left;font-weight:600;padding-bottom:.5em}th,td{padding:.15em .7em;text-align:left}"
    "thead tr:last-child th{border-bottom:1px solid #111}th[colspan]{text-align:center}td.n,th.n{text-align:right}"
    "td.n{font-variant-numeric:tabular-nums}tr.s td{border-top:1px solid #999}ol,p{max-width:60em;color:#333}"
)


def _entry(entry: Entry, escaped: Callable[[str], str], bold: str, note: str) -> str:
    """One cell in a markup language, given how it escapes text, and its patterns for bold text and for a footnote."""
    text = escaped(entry.text)
    text = bold % text if entry.bold else text
    return text if entry.note is None else note % (text, entry.note)


def markdown(sheet: Sheet) -> str:
    """Print a sheet as a pipe table, footnotes and remarks below."""
    heads = [_pipes(f"{column.group} {column.name}".strip()) for column in with_head_notes(sheet).columns]
    lines = [f"**{sheet.title}**", ""] if sheet.title else []
    lines += [_line(heads), "|" + "".join("---:|" if column.numeric else "---|" for column in sheet.columns)]
    lines += [_line([_entry(entry, _pipes, "**%s**", "%s [%d]") for entry in row]) for row in sheet.rows]
    for text in sheet.below():
        lines += ["", " ".join(text.split())]
    return "\n".join(lines) + "\n"


def with_head_notes(sheet: Sheet) -> Sheet:
    """The same sheet with the numbers of footnotes in the text of its headings, for plain text."""
    columns = [c if c.note is None else dataclasses.replace(c, name=f"{c.name} [{c.note}]", note=None) for c in sheet.columns]
    return dataclasses.replace(sheet, columns=columns)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pipes(text: str) -> str:
    return text.replace("|", "\\|")


def latex(sheet: Sheet) -> str:
    r"""Print a sheet as a ``table`` environment; the document needs ``\usepackage{booktabs}``."""
    # The head, with rules of booktabs; a rule before every section.
    columns = "".join("r" if column.numeric else "l" for column in sheet.columns)
    lines = [r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{_tex(sheet.title)}}}"] if sheet.title else []
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *_latex_head(sheet), r"\midrule"]
    for place, row in enumerate(sheet.rows):
        lines += [r"\midrule"] if place in sheet.sections else []
        lines.append(" & ".join(map(_latex_entry, row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    # Footnotes and remarks in a box of the width of the text.
    notes = [rf"\textsuperscript{{{number}}}\,{_tex(text)}" for number, text in enumerate(sheet.notes, 1)]
    below = notes + [_tex(text) for text in sheet.remarks]
    if below:
        lines += [r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize\raggedright"]
        lines += [" \\\\\n".join(below), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_head(sheet: Sheet) -> list[str]:
    """Headings, below those of groups with a rule under each group."""
    upper, rules, start = [], [], 1
    for group, width in sheet.groups():
        upper.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(group)}}}" if group else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if group else []
        start += width
    lines = [" & ".join(upper) + r" \\", " ".join(rules)] if upper else []
    return [*lines, " & ".join(_latex_entry(Entry(c.name, note=c.note)) for c in sheet.columns) + r" \\"]


def _latex_entry(entry: Entry) -> str:
    dashed = dataclasses.replace(entry, text="--" if entry.text == MISSING else entry.text)
    return _entry(dashed, _tex, r"\textbf{%s}", r"%s\textsuperscript{%d}")


def _tex(text: str) -> str:
    return text.replace(PLUS_MINUS, "±").translate(LATEX)


def html(sheet: Sheet) -> str:
    """Print a sheet as a ``<table>`` with its footnotes, to be put into a page."""
    # The table, then its footnotes as a numbered list, then remarks.
    lines = ["<table>"]
    lines += [f"<caption>{escape(sheet.title)}</caption>"] if sheet.title else []
    lines += ["<thead>", *_html_head(sheet), "</thead>", "<tbody>"]
    for place, row in enumerate(sheet.rows):
        cells = "".join(_html_entry(entry, c) for entry, c in zip(row, sheet.columns, strict=True))
        lines.append(f"{'<tr class=s>' if place in sheet.sections else '<tr>'}{cells}</tr>")
    lines += ["</tbody>", "</table>"]
    if sheet.notes:
        lines += ["<ol>", *(f"<li>{escape(text)}</li>" for text in sheet.notes), "</ol>"]
    lines += [f"<p>{escape(text)}</p>" for text in sheet.remarks]
    return "\n".join(lines) + "\n"


def html_page(body: str, title: str) -> str:
    """Wrap printed sheets into a self-contained page."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _html_head(sheet: Sheet) -> list[str]:
    """Headings, below those of groups; a group without a name is an empty cell."""
    spans = [
        f'<th scope=colgroup colspan="{width}">{escape(group)}</th>' if group else f'<td colspan="{width}"></td>'
        for group, width in sheet.groups()
    ]
    names = [f"<th scope=col{' class=n' if c.numeric else ''}>{_html_text(Entry(c.name, note=c.note))}</th>" for c in sheet.columns]
    return [f"<tr>{''.join(cells)}</tr>" for cells in (spans, names) if cells]


def _html_entry(entry: Entry, column: Column) -> str:
    return f"{'<td class=n>' if column.numeric else '<td>'}{_html_text(entry)}</td>"


def _html_text(entry: Entry) -> str:
    return _entry(entry, escape, "<b>%s</b>", "%s<sup>%d</sup>")
