"""What the pages of all scales are made of, from results.json alone: columns, differences, marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from della.experiments.results import interval
from della.report.plots import Mark
from della.report.tables import Table, number, with_interval

Found = Mapping[str, Any]
Column = tuple[str, Callable[[Found], str]]  # its head, and its text of one entry
VERDICTS = ("holds", "within noise", "reversed")


def table(
    title: str, entries: Sequence[Found], columns: Sequence[Column], *, labels: int = 1, note: str = ""
) -> Table:
    """A table with a line an entry of results.json."""
    lines = tuple(tuple(of(entry) for _, of in columns) for entry in entries)
    return Table(title, tuple(head for head, _ in columns), lines, labels, note)


def said(head: str, key: str) -> Column:
    """A column of a text that the entry has."""
    return head, lambda entry: str(entry[key])


def given(value: float | None) -> str:
    """A setting, where there is one."""
    return "" if value is None else f"{value:g}"


def lambda_of(entry: Found) -> float | None:
    """Lambda of an entry's model, where it has a part."""
    model = entry["model"]
    has_none = "lambda_scaling" in model or model["method"] in ("", "linear")
    return None if has_none else model["lambda"]


P: Column = ("p", lambda entry: given(entry["model"]["p"]))
LAMBDA: Column = ("lambda", lambda entry: given(lambda_of(entry)))


def shown(
    found: Mapping[str, float] | None, digits: int = 1, unit: float = 1.0, *, sign: bool = False
) -> str:
    """An interval of results.json times ``unit``; nothing for None."""
    return "" if found is None else with_interval(interval(found) * unit, digits, sign=sign)


def mark(
    found: Mapping[str, float], series: str = "", label: str = "", panel: str = "", x: float = 0.0,
    unit: float = 1.0,
) -> Mark:  # fmt: skip
    """An interval of results.json in a plot."""
    one = interval(found) * unit
    return Mark(series, one.value, one.low, one.high, x=x, label=label, panel=panel)


def best_first(rows: Sequence[Found]) -> list[Found]:
    """Rows by their main number."""
    return sorted(rows, key=lambda row: -float(row["value"]["value"]))


def losses(tasks: Mapping[str, Mapping[str, float]], digits: int) -> list[str]:
    """The loss of each task that was scored."""
    return [number(scores["loss"], digits) for scores in tasks.values()]


def listed(words: Sequence[str]) -> str:
    """Words as an enumeration."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
