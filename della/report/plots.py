"""Plots of a report: marks with intervals as Vega-Lite, drawn to SVG and PNG without a browser or a network.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; each series has a shape of its
own too.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from della.errors import EvaluationError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "stroke")
_INK, _FAINT = "#222222", "#DDDDDD"
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_CONFIG = {
    "background": "white",
    "font": "Roboto, Arial, sans-serif",
    "view": {"stroke": "#BBBBBB"},
    "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 500, "gridColor": _FAINT,
             "labelColor": _INK, "titleColor": _INK, "labelLimit": 260},
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "labelLimit": 320, "symbolSize": 90,
               "symbolOpacity": 1, "orient": "bottom", "title": None, "labelColor": _INK},
    "header": {"labelFontSize": 13, "labelFontWeight": 600, "title": None, "labelColor": _INK},
    "title": {"fontSize": 15, "fontWeight": 600, "anchor": "start", "color": _INK, "offset": 12},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """One estimate with its interval: of a ``series``, at ``x`` (or named ``label``), in a ``panel``."""

    series: str
    value: float
    low: float
    high: float
    x: float = 0.0
    label: str = ""
    panel: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: the stem of its files, what it shows in words, and its Vega-Lite specification."""

    name: str
    title: str
    text: str
    spec: dict[str, Any]


def lines(
    name: str, title: str, text: str, marks: Sequence[Mark], x_title: str, y_title: str, columns: int = 2,
    *, even: bool = False,
) -> Plot:  # fmt: skip
    """Values over a number: a line a series, intervals as bars, a small plot a panel.

    even: the positions on the axis are equally far apart, whatever their numbers.
    """
    places = sorted({mark.x for mark in marks})
    at = {place: float(i) if even else place for i, place in enumerate(places)}
    shift = _shifts(marks, list(at.values()))
    data = [asdict(mark) | {"at": at[mark.x] + shift[mark.series]} for mark in marks]
    y = {"field": "value", "type": "quantitative", "title": y_title, "scale": {"zero": False, "nice": True}}
    named = json.dumps({f"{position:g}": f"{place:g}" for place, position in at.items()})
    axis = {"values": list(at.values()), "labelOverlap": True, "grid": True,
            "labelExpr": f"{named}[format(datum.value, '.6~g')]"}  # fmt: skip
    x = {"field": "at", "type": "quantitative", "title": x_title, "axis": axis,
         "scale": {"zero": False, "nice": False, "padding": 14}}  # fmt: skip
    layer = [
        {"mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
         "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
        {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {"y": y}},
        {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
         "encoding": {"y": y, "shape": _shape(marks)}},
    ]  # fmt: skip
    inner = {"encoding": {"x": x, "color": _colour(marks)}, "layer": layer}
    return Plot(name, title, text, _panels(title, data, marks, inner, columns, 330, 230))


def dots(
    name: str, title: str, text: str, marks: Sequence[Mark], x_title: str, columns: int = 2
) -> Plot:  # fmt: skip
    """Values of named things: a row each, a dot with its interval, a small plot a panel."""
    labels = list(dict.fromkeys(mark.label for mark in marks))
    several = len({mark.series for mark in marks}) > 1
    y: dict[str, Any] = {
        "field": "label",
        "type": "nominal",
        "sort": labels,
        "title": None,
        "axis": {"grid": True},
    }
    x = {"field": "value", "type": "quantitative", "title": x_title, "scale": {"zero": False, "nice": True}}
    encoding: dict[str, Any] = {"y": y}
    if several:
        encoding |= {"color": _colour(marks), "yOffset": {"field": "series", "sort": _series(marks)}}
    paint = {} if several else {"color": COLOURS[0]}
    layer = [
        {"mark": {"type": "rule", "strokeWidth": 2} | paint,
         "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}}},
        {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1} | paint,
         "encoding": {"x": x} | ({"shape": _shape(marks)} if several else {})},
    ]  # fmt: skip
    height = max(60, 26 * len(labels) * (len(_series(marks)) if several else 1) // (2 if several else 1))
    inner = {"encoding": encoding, "layer": layer}
    return Plot(
        name,
        title,
        text,
        _panels(title, [asdict(mark) for mark in marks], marks, inner, columns, 300, height),
    )


def check() -> None:
    """EvaluationError without the extra paper: to be told before hours of work, not behind them."""
    if importlib.util.find_spec("vl_convert") is None:
        raise EvaluationError("vl-convert-python draws the plots; pip install '.[paper]' in della's checkout")


def draw(plot: Plot) -> tuple[str, bytes]:
    """The plot as SVG text and as a PNG file; EvaluationError without the extra paper."""
    check()
    import vl_convert

    svg = vl_convert.vegalite_to_svg(plot.spec)
    return _own_ids(svg, plot.name), vl_convert.vegalite_to_png(plot.spec, scale=2)


def _own_ids(svg: str, name: str) -> str:
    """Ids with the plot's name before them, so that several plots can stand in one page."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)


def _series(marks: Sequence[Mark]) -> list[str]:
    return list(dict.fromkeys(mark.series for mark in marks))


def _shifts(marks: Sequence[Mark], places: Sequence[float]) -> dict[str, float]:
    """Small steps aside, so that the intervals of several series at one x do not cover each other."""
    names = _series(marks)
    gap = min((b - a for a, b in itertools.pairwise(places)), default=0.0)
    width = min(gap * 0.5, (places[-1] - places[0]) * 0.012 * len(names)) if gap else 0.0
    return {name: width * ((i + 0.5) / len(names) - 0.5) for i, name in enumerate(names)}


def _colour(marks: Sequence[Mark]) -> dict[str, Any]:
    names = _series(marks)
    return {"field": "series", "type": "nominal", "sort": names, "legend": {"columns": 2},
            "scale": {"domain": names, "range": list(COLOURS[: len(names)])}}  # fmt: skip


def _shape(marks: Sequence[Mark]) -> dict[str, Any]:
    names = _series(marks)
    return {"field": "series", "type": "nominal", "sort": names, "legend": {"columns": 2},
            "scale": {"domain": names, "range": list(SHAPES[: len(names)])}}  # fmt: skip


def _panels(
    title: str, data: list[dict[str, Any]], marks: Sequence[Mark], inner: dict[str, Any], columns: int,
    width: int, height: int,
) -> dict[str, Any]:  # fmt: skip
    panels = list(dict.fromkeys(mark.panel for mark in marks))
    spec = {"$schema": _SCHEMA, "config": _CONFIG, "title": title, "data": {"values": data}}
    if len(panels) == 1:
        return spec | {"width": 2 * width, "height": height * 5 // 4} | inner
    facet = {"field": "panel", "type": "nominal", "sort": panels, "title": None}
    return spec | {
        "facet": facet, "columns": columns, "spec": {"width": width, "height": height} | inner,
        "align": "all",
    }  # fmt: skip
