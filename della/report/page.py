"""A report as one HTML page that needs nothing else: tables, and plots as SVG inside it; and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from della.report.plots import Plot
from della.report.tables import Table, markdown

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #222;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .5rem; }
p, li { max-width: 46rem; }
nav { margin: 1.2rem 0; padding: .7rem 1rem; background: #f5f7f9; border-radius: .4rem; font-size: .93rem; }
nav ul { margin: 0; padding: 0; list-style: none; columns: 18rem; column-gap: 2rem; }
code { background: #f2f4f6; padding: .1em .3em; border-radius: .2rem; font-size: .9em; }
a { color: #0b5a94; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }
th { vertical-align: bottom; border-bottom: 2px solid #999; font-weight: 600; white-space: normal; }
th.label, td.label { text-align: left; }
td.label:first-child { position: sticky; left: 0; background: inherit; }
th.label:first-child { position: sticky; left: 0; background: #fff; }
tbody tr { background: #fff; }
tbody tr:nth-child(even) { background: #f7f9fa; }
.note { font-size: .88rem; color: #555; }
figure { margin: 1.2rem 0; }
figure svg { max-width: 100%; height: auto; }
@media (max-width: 40rem) { figure svg { max-width: none; } body { padding: 1rem .8rem 3rem; } }
figcaption { font-size: .88rem; color: #555; max-width: 46rem; }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: paragraphs, then tables, then plots."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.  Text is plain but for `code`: what looks like HTML is shown as it is."""

    title: str
    text: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def plots(self) -> list[Plot]:
        """All plots, in order."""
        return [plot for section in self.sections for plot in section.plots]


def html(report: Report, drawings: Mapping[str, str]) -> str:
    """The page; ``drawings`` are the plots' SVG by name."""
    links = [f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(report.sections, 1)]
    body = [f"<h1>{escape(report.title)}</h1>", *_paragraphs(report.text)]
    body += [f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>']
    for i, section in enumerate(report.sections, 1):
        body += [f'<h2 id="s{i}">{escape(section.title)}</h2>', *_paragraphs(section.text)]
        body += [_table(table) for table in section.tables]
        body += [_figure(plot, drawings[plot.name]) for plot in section.plots]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    return "\n".join(["<!doctype html>", '<html lang="en">', *head, *body, "</html>"]) + "\n"


def text(report: Report) -> str:
    """The report as Markdown; plots are links to their SVG files, which lie beside it."""
    lines = [f"# {report.title}", "", *_spaced(report.text)]
    for section in report.sections:
        lines += [f"## {section.title}", "", *_spaced(section.text)]
        for table in section.tables:
            lines += [markdown(table)]
        for plot in section.plots:
            lines += [f"![{plot.title}]({plot.name}.svg)", "", plot.text, ""]
    return "\n".join(lines).rstrip() + "\n"


def _spaced(paragraphs: Sequence[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _paragraphs(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs; those that begin with a hyphen are the points of a list."""
    made: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("- "):
            points = "".join(f"<li>{_inline(point[2:])}</li>" for point in paragraph.split("\n"))
            made.append(f"<ul>{points}</ul>")
        else:
            made.append(f"<p>{_inline(paragraph)}</p>")
    return made


def _inline(text: str) -> str:
    """Plain text, in which backticks mean code, as in Markdown."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="label"' if i < table.labels else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    return f'{title}<div class="wide" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>{note}'


def _figure(plot: Plot, svg: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.title)}" ', 1)
    return f'<figure><div class="wide">{labelled}</div><figcaption>{_inline(plot.text)}</figcaption></figure>'
