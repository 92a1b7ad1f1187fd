"""Tables of a report: values and intervals as text, and a table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from della.report.intervals import Interval


@dataclass(frozen=True, slots=True)
class Table:
    """A table of ready text.  The first ``labels`` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns: {row}")


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with so many decimals; nothing for None, and no minus before zero."""
    if value is None:
        return ""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def with_interval(found: Interval, digits: int = 1, *, sign: bool = False) -> str:
    """``72.5 (70.1 to 74.9)``; the number alone where the interval is a single point."""
    value = number(found.value, digits, sign=sign)
    if found.low == found.high:
        return value
    low, high = number(found.low, digits, sign=sign), number(found.high, digits, sign=sign)
    return f"{value} ({low} to {high})"


def markdown(table: Table) -> str:
    """The table as Markdown, its title as a heading of the third rank."""
    rules = ["---" if i < table.labels else "---:" for i in range(len(table.columns))]
    lines = [f"### {table.title}", ""] if table.title else []
    lines += [_line(table.columns), f"|{'|'.join(rules)}|", *map(_line, table.rows)]
    return "\n".join([*lines, *(["", table.note] if table.note else [])]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
