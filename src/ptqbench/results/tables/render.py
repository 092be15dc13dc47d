"""A sheet as Markdown, LaTeX (booktabs) or HTML. The same sheet gives the same bytes."""

from __future__ import annotations

import html as escapes
from itertools import groupby

from ptqbench.results.metrics import MISSING, PLUS_MINUS
from ptqbench.results.tables.sheet import Column, Entry, Sheet

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≤": r"$\leq$", "…": r"\ldots{}",
}  # fmt: skip
STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em;color:#111}table{border-collapse:collapse}"
    "caption{text-align:left;font-weight:600;padding-bottom:.5em}th,td{padding:.15em .7em;text-align:left}"
    "thead tr:last-child th{border-bottom:1px solid #111}th[colspan]{text-align:center}td.n,th.n{text-align:right}"
    "td.n{font-variant-numeric:tabular-nums}tr.s td{border-top:1px solid #999}ol,p{max-width:60em;color:#333}"
)


def markdown(sheet: Sheet) -> str:
    """Print a sheet as a pipe table, footnotes and remarks below."""
    heads = [f"{column.group} {column.name}".strip().replace("|", "\\|") for column in sheet.columns]
    lines = [f"**{sheet.title}**", ""] if sheet.title else []
    lines += ["| " + " | ".join(heads) + " |", "|" + "".join("---:|" if c.numeric else "---|" for c in sheet.columns)]
    lines += ["| " + " | ".join(_markdown_entry(entry) for entry in row) + " |" for row in sheet.rows]
    for text in [*(f"[{number}] {note}" for number, note in enumerate(sheet.notes, 1)), *sheet.remarks]:
        lines += ["", " ".join(text.split())]
    return "\n".join(lines) + "\n"


def _markdown_entry(entry: Entry) -> str:
    text = entry.text.replace("|", "\\|")
    text = f"**{text}**" if entry.bold else text
    return text if entry.note is None else f"{text} [{entry.note}]"


def latex(sheet: Sheet) -> str:
    r"""Print a sheet as a ``table`` environment; the document needs ``\usepackage{booktabs}``."""
    columns = "".join("r" if column.numeric else "l" for column in sheet.columns)
    lines = [r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{_tex(sheet.title)}}}"] if sheet.title else []
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *_latex_head(sheet), r"\midrule"]
    for place, row in enumerate(sheet.rows):
        lines += [r"\midrule"] if place in sheet.sections else []
        lines.append(" & ".join(map(_latex_entry, row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = [rf"\textsuperscript{{{number}}}\,{_tex(text)}" for number, text in enumerate(sheet.notes, 1)]
    below = notes + [_tex(text) for text in sheet.remarks]
    if below:
        lines += [r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize\raggedright"]
        lines += [" \\\\\n".join(below), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_head(sheet: Sheet) -> list[str]:
    if not any(column.group for column in sheet.columns):
        return [" & ".join(_tex(column.name) for column in sheet.columns) + r" \\"]
    upper, rules, start = [], [], 1
    for group, members in groupby(sheet.columns, key=lambda column: column.group):
        width = len(list(members))
        upper.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(group)}}}" if group else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if group else []
        start += width
    return [" & ".join(upper) + r" \\", " ".join(rules), " & ".join(_tex(c.name) for c in sheet.columns) + r" \\"]


def _latex_entry(entry: Entry) -> str:
    text = "--" if entry.text == MISSING else _tex(entry.text)
    text = rf"\textbf{{{text}}}" if entry.bold else text
    return text if entry.note is None else rf"{text}\textsuperscript{{{entry.note}}}"


def _tex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text.replace(PLUS_MINUS, "±"))


def html(sheet: Sheet) -> str:
    """Print a sheet as a ``<table>`` with its footnotes, to be put into a page."""
    lines = ["<table>"]
    lines += [f"<caption>{escapes.escape(sheet.title)}</caption>"] if sheet.title else []
    lines += ["<thead>", *_html_head(sheet.columns), "</thead>", "<tbody>"]
    for place, row in enumerate(sheet.rows):
        cells = "".join(_html_entry(entry, c) for entry, c in zip(row, sheet.columns, strict=True))
        lines.append(f"{'<tr class=s>' if place in sheet.sections else '<tr>'}{cells}</tr>")
    lines += ["</tbody>", "</table>"]
    if sheet.notes:
        lines += ["<ol>", *(f"<li>{escapes.escape(text)}</li>" for text in sheet.notes), "</ol>"]
    lines += [f"<p>{escapes.escape(text)}</p>" for text in sheet.remarks]
    return "\n".join(lines) + "\n"


def html_page(body: str, title: str) -> str:
    """Wrap printed sheets into a self-contained page."""
    head = f'<meta charset="utf-8"><title>{escapes.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _html_head(columns: list[Column]) -> list[str]:
    lines = []
    if any(column.group for column in columns):
        spans = [(group, len(list(members))) for group, members in groupby(columns, key=lambda column: column.group)]
        lines.append(f"<tr>{''.join(_html_group(*span) for span in spans)}</tr>")
    names = [f"<th scope=col{' class=n' if c.numeric else ''}>{escapes.escape(c.name)}</th>" for c in columns]
    return [*lines, f"<tr>{''.join(names)}</tr>"]


def _html_group(group: str, width: int) -> str:
    text = escapes.escape(group)
    return f'<th scope=colgroup colspan="{width}">{text}</th>' if group else f'<td colspan="{width}"></td>'


def _html_entry(entry: Entry, column: Column) -> str:
    text = escapes.escape(entry.text)
    text = f"<b>{text}</b>" if entry.bold else text
    text += f"<sup>{entry.note}</sup>" if entry.note is not None else ""
    return f"{'<td class=n>' if column.numeric else '<td>'}{text}</td>"
