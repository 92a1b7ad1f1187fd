"""The files of a report: results.json, tables.md, index.html, and each plot as SVG and PNG.

results.json is one object.  Every scale has:

    schema      1
    scale       mini, 135m or 13b
    della       the version, and `versions` those of Python and the libraries that compute
    command     what makes it again
    seed        the first seed
    time        {"seconds": ...} and all else that differs from run to run
    rows        of tables: table, group, label, model (method and settings), seeds, measure, its value,
                over_seeds, by_seed, tasks (the scores of each), paper (the paper's scores)
    claims      that one row is above another: claim, group, better, worse, over_items, over_seeds, verdict
                (holds, within noise or reversed), paper (the paper's difference)

mini and 135m have singles (base and experts) and chosen (what was tried, or best, on validation) too, each
scale its own entries beside.  All is in percent but losses and perplexities; an interval is {"value",
"low", "high"}.  The same seed gives the same object but for `time`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from della.output import disk
from della.report.intervals import Interval
from della.report.page import Report, html, text
from della.report.plots import draw
from della.version import __version__

SCHEMA = 1


def head(scale: str, command: str, seed: int, seconds: float, *libraries: str) -> dict[str, Any]:
    """The entries that every scale has; ``libraries`` are distributions whose versions are told."""
    versions = {name: version(name) for name in sorted({"numpy", "numba", *libraries})}
    return {
        "schema": SCHEMA, "scale": scale, "della": __version__,
        "versions": {"python": platform.python_version()} | versions, "command": command, "seed": seed,
        "time": {"seconds": round(seconds, 1)},
    }  # fmt: skip


def as_json(found: Interval, digits: int = 6) -> dict[str, float]:
    """An interval for results.json."""
    return {name: round(getattr(found, name), digits) + 0.0 for name in ("value", "low", "high")}


def interval(found: Mapping[str, float]) -> Interval:
    """An interval out of results.json."""
    return Interval(found["value"], found["low"], found["high"])


def having(entries: Iterable[Mapping[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """The entries of a list in results.json that have these values."""
    return [dict(one) for one in entries if all(one[key] == value for key, value in wanted.items())]


def write(out: Path, results: Mapping[str, Any], report: Report) -> None:
    """Write all files into the folder ``out``, each in one step; EvaluationError without the extra paper."""
    drawn = {plot.name: draw(plot) for plot in report.plots}
    for name, (svg, png) in drawn.items():
        disk.put(out / f"{name}.svg", svg.encode())
        disk.put(out / f"{name}.png", png)
    disk.put(out / "tables.md", text(report).encode())
    disk.put(out / "index.html", html(report, {name: svg for name, (svg, _) in drawn.items()}).encode())
    disk.put(out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
