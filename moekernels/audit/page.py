"""The report as one HTML file with its pictures inside: no script, no other file.

Readable on a phone: every picture is there twice, for a narrow and for a wide screen, and a
table's rows become blocks where it would not fit.
"""

from __future__ import annotations

import io
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moekernels.audit.figures import FIGURES, HUES, NARROW, WIDE, svg
from moekernels.audit.report import Report
from moekernels.audit.screen import show

STYLE = f"""
body {{ font: 16px/1.45 sans-serif; color: #212529; margin: 0 auto; padding: 0 16px;
  max-width: 1100px; overflow-wrap: anywhere }}
h1 {{ font-size: 24px }} h2 {{ font-size: 20px }}
figure {{ margin: 0 0 24px; max-width: {WIDE}px }} figcaption {{ color: #495057 }}
svg {{ display: block; width: 100%; height: auto }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
table {{ border-collapse: collapse; font-size: 14px; margin: 16px 0 }}
caption {{ text-align: left; font-weight: bold }}
th, td {{ text-align: right; vertical-align: top; padding: 2px 8px; border-top: 1px solid #dee2e6 }}
th {{ border-top: 0 }} .left {{ text-align: left }}
.key span {{ display: inline-block; width: 14px; height: 14px; margin: 0 6px 0 0 }}
.key {{ list-style: none; padding: 0 }}
@media (min-width: {WIDE + 32}px) {{ .narrow {{ display: none }} }}
@media (max-width: {WIDE + 31}px) {{
  .wide, thead {{ display: none }}
  figure {{ max-width: {int(1.5 * NARROW)}px }}
  table, tbody, tr, caption {{ display: block }} tr {{ border-top: 1px solid #adb5bd }}
  td {{ display: flex; justify-content: space-between; gap: 16px; border: 0; padding: 1px 0 }}
  td::before {{ content: attr(data-name); color: #495057; text-align: left; flex: 0 0 30% }}
  td > div {{ text-align: right }}
}}
"""


class _Html(Console):
    """A console whose lines and tables become elements of a page."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=1000, highlight=False, color_system="truecolor")
        self.elements: list[str] = []

    def print(self, *objects: Any, **_: Any) -> None:
        for x in objects:
            self.elements.append(self._table(x) if isinstance(x, Table) else self._line(str(x)))

    def _line(self, text: str) -> str:
        return f"<p>{self._inline(text.strip())}</p>"

    def _inline(self, markup: str) -> str:
        parts = []
        for segment in Text.from_markup(markup, end="").render(self):
            rule = segment.style.get_html_style() if segment.style else ""
            text = escape(segment.text)
            parts.append(f'<span style="{escape(rule)}">{text}</span>' if rule else text)
        return "".join(parts)

    def _table(self, table: Table) -> str:
        names = [str(column.header) for column in table.columns]
        places = [' class="left"' * (column.justify == "left") for column in table.columns]
        head = "".join(f"<th{at}>{escape(name)}</th>" for name, at in zip(names, places))
        rows = []
        for cells in zip(*(column.cells for column in table.columns)):
            each = zip(cells, names, places)
            rows.append(
                "".join(
                    f'<td{at} data-name="{escape(name)}"><div>{self._inline(str(cell))}</div></td>'
                    for cell, name, at in each
                )
            )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<table><caption>{self._inline(str(table.title))}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def page(report: Report) -> str:
    """The whole file."""
    console = _Html()
    show(report, console, everything=True)
    key = "".join(
        f'<li><span style="background:{shades.split()[0]}"></span>{meaning}</li>'
        for meaning, shades in HUES.values()
    )
    figures = "".join(
        f"<h2>{name}</h2><figure>"
        f'<div class="narrow">{svg(name, report, NARROW)}</div>'
        f'<div class="wide">{svg(name, report, WIDE)}</div>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for name, (text, _) in FIGURES.items()
    )
    title = f"Plan: {escape(report.name)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>' + title + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<ul class="key">{key}</ul>{figures}<h2>In numbers</h2>'
        f"{''.join(console.elements)}</body></html>\n"
    )
