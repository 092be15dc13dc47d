"""A sheet as Markdown, LaTeX (booktabs) or HTML. The same sheet gives the same bytes."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape

from ptqbench.results.metrics import MISSING, PLUS_MINUS
from ptqbench.results.tables.sheet import PADDING, WIDEST, Column, Entry, Sheet

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≤": r"$\leq$", "…": r"\ldots{}",
    "*": "$^{*}$", "[": "{[}", "\u00a0": "~",  # behind a line break, * and [ would be its arguments
})  # fmt: skip
STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em;color:#111}table{border-collapse:collapse}"
    "caption{text-align:left;font-weight:600;padding-bottom:.5em}th,td{padding:.15em .7em;text-align:left}"
    "thead tr:last-child th{border-bottom:1px solid #111}th[colspan]{text-align:center}td.n,th.n{text-align:right}"
    "td.n{font-variant-numeric:tabular-nums}*+table{margin-top:1.5em}tr.s td{border-top:1px solid #999}"
    "sup{line-height:0}ol,p{max-width:60em;color:#333}"
)


COLUMN_WIDTH, PAGE_WIDTH, LONG_WIDTH = 75, 120, 95
"""Characters in a line of a page with one column, in small type; up to how many a table is shrunk to that; those in the type of a
wide ``longtable``."""
PAGE_HEIGHT = 48
"""Lines of a page."""
NOTE_SIZES = {r"\footnotesize": (85, 0.86), r"\scriptsize": (98, 0.73)}
"""Types of footnotes: characters in a line, and the height of a line beside other lines."""
BROKEN = r">{\raggedright\arraybackslash}p{12em}"
"""The column of a tabular with labels that are longer than ``WIDEST``."""
BREAK = re.compile(r"=|\\_|\.|/")
"""Behind what a long label may be broken, beside spaces."""


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
    columns = [
        c if c.note is None else dataclasses.replace(c, name=f"{c.name} [{c.note}]", note=None) for c in sheet.columns
    ]
    return dataclasses.replace(sheet, columns=columns)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pipes(text: str) -> str:
    return text.replace("|", "\\|")


def latex(sheet: Sheet) -> str:
    r"""Print a sheet as a ``table`` environment, or as ``longtable`` where it is longer than a page.

    A sheet that is too wide for a page is cut between its groups of columns, and the parts stand below each other. The first line
    is a comment that names the packages which the document needs: ``booktabs``; ``graphicx`` for a sheet that is wider than a
    line and is shrunk to it; ``longtable``; and ``array`` for long labels.
    """
    parts = sheet.parts(PAGE_WIDTH)
    # Footnotes and remarks, one per paragraph.
    notes = [rf"\textsuperscript{{{number}}}\,{_tex(text)}" for number, text in enumerate(sheet.notes, 1)]
    below = notes + [_tex(text) for text in sheet.remarks]
    # In the largest type of footnotes with which all fits on a page.
    for size, (width, height) in NOTE_SIZES.items():
        if sum(map(_height, parts)) + height * sum(1 + len(text) // width for text in below) <= PAGE_HEIGHT:
            body = _float(sheet.title, parts, below, size)
            break
    else:
        body = _pages(sheet, below)
    needed = {"graphicx": r"\resizebox", "longtable": r"\begin{longtable}", "array": BROKEN}
    packages = ["booktabs", *(name for name, sign in needed.items() if sign in body)]
    return rf"% \usepackage{{{','.join(packages)}}}" + f"\n{body}\n"


def _float(title: str, parts: Sequence[Sheet], below: Sequence[str], size: str) -> str:
    lines = [r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{_tex(title)}}}"] if title else []
    for number, part in enumerate(parts):
        lines += [r"\par\medskip"] * bool(number) + _tabular(part)
    if below:
        lines += [r"\par\medskip", rf"\begin{{minipage}}{{\linewidth}}{size}\raggedright"]
        lines += [" \\\\\n".join(below), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"])


def _pages(sheet: Sheet, below: Sequence[str]) -> str:
    lines = [r"\begingroup", *(line for part in sheet.parts(LONG_WIDTH) for line in _longtable(part))]
    lines += [r"\footnotesize\noindent\raggedright", " \\\\\n".join(below), r"\par"] if below else []
    return "\n".join([*lines, r"\endgroup"])


def _tabular(sheet: Sheet) -> list[str]:
    """Rows between rules; shrunk to the line where they are wider."""
    lines = [
        rf"\begin{{tabular}}{{{_latex_columns(sheet)}}}",
        r"\toprule",
        *_latex_head(sheet),
        r"\midrule",
        *_latex_rows(sheet),
    ]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if sum(sheet.widths()) <= COLUMN_WIDTH:
        return lines
    lines[0] = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%" + "\n" + lines[0]
    return [*lines[:-1], lines[-1] + "}"]


def _longtable(sheet: Sheet) -> list[str]:
    """Rows that go on from page to page, with the head on each. It cannot be shrunk, so a wide one has a smaller type."""
    head = [r"\toprule", *_latex_head(sheet), r"\midrule"]
    narrow = sum(sheet.widths()) <= COLUMN_WIDTH
    lines = [r"\small" if narrow else r"\scriptsize\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\begin{{longtable}}{{{_latex_columns(sheet)}}}"]
    lines += [rf"\caption{{{_tex(sheet.title)}}}\\"] if sheet.title else []
    lines += [*head, r"\endfirsthead", *head, r"\endhead"]
    lines += [
        rf"\midrule\multicolumn{{{len(sheet.columns)}}}{{r}}{{continued}} \\",
        r"\endfoot",
        r"\bottomrule",
        r"\endlastfoot",
    ]
    return [*lines, *_latex_rows(sheet), r"\end{longtable}"]


def _height(sheet: Sheet) -> float:
    """Height of a tabular in lines of text, after it is shrunk to the line."""
    broken = [max(1 + len(entry.text) // WIDEST for entry in row) for row in sheet.rows]
    return (sum(broken) + 4 + 0.4 * len(sheet.sections)) * min(1.0, COLUMN_WIDTH / sum(sheet.widths()))


def _broken(sheet: Sheet) -> list[bool]:
    """Which columns hold labels that are so long that they are broken into lines."""
    longest = [max((len(row[n].text) for row in sheet.rows), default=0) for n in range(len(sheet.columns))]
    return [not c.numeric and length > WIDEST for c, length in zip(sheet.columns, longest, strict=True)]


def _latex_columns(sheet: Sheet) -> str:
    kinds = zip(sheet.columns, _broken(sheet), strict=True)
    return "".join("r" if column.numeric else BROKEN if broken else "l" for column, broken in kinds)


def _latex_rows(sheet: Sheet) -> list[str]:
    """The rows of a tabular, with a rule before every section."""
    lines, broken = [], _broken(sheet)
    for place, row in enumerate(sheet.rows):
        lines += [r"\midrule"] if place in sheet.sections else []
        entries = ((_latex_entry(entry), breaks) for entry, breaks in zip(row, broken, strict=True))
        texts = [BREAK.sub(r"\g<0>\\allowbreak{}", text) if breaks else text for text, breaks in entries]
        heading = not any(entry.text for entry, column in zip(row, sheet.columns, strict=True) if column.numeric)
        lines.append(
            " & ".join(texts) + (r" \\*" if heading else r" \\")
        )  # no page ends behind a row that is a heading
    return lines


def _latex_head(sheet: Sheet) -> list[str]:
    """Headings, below those of groups with a rule under each group."""
    upper, rules, start = [], [], 1
    for group, width in sheet.groups():
        upper.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(group)}}}" if group else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if group else []
        start += width
    lines = [" & ".join(upper) + r" \\", " ".join(rules)] if upper else []
    names = [_latex_name(column, width - PADDING) for column, width in zip(sheet.columns, sheet.widths(), strict=True)]
    return [*lines, " & ".join(names) + r" \\"]


def _latex_name(column: Column, width: int) -> str:
    """A heading; that of numbers in several lines where it is wider than they are."""
    pieces = textwrap.wrap(column.name, width, break_long_words=False, break_on_hyphens=False) if column.numeric else []
    stacked = r"\\".join(map(_tex, pieces or [column.name]))
    stacked = rf"\shortstack[r]{{{stacked}}}" if len(pieces) > 1 else stacked
    return stacked if column.note is None else rf"{stacked}\textsuperscript{{{column.note}}}"


def _latex_entry(entry: Entry) -> str:
    dashed = dataclasses.replace(
        entry, text=" ".join("--" if word == MISSING else word for word in entry.text.split(" "))
    )
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
    names = [
        f"<th scope=col{' class=n' if c.numeric else ''}>{_html_text(Entry(c.name, note=c.note))}</th>"
        for c in sheet.columns
    ]
    return [f"<tr>{''.join(cells)}</tr>" for cells in (spans, names) if cells]


def _html_entry(entry: Entry, column: Column) -> str:
    return f"{'<td class=n>' if column.numeric else '<td>'}{_html_text(entry)}</td>"


def _html_text(entry: Entry) -> str:
    return _entry(entry, escape, "<b>%s</b>", "%s<sup>%d</sup>")
