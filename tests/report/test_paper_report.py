"""The parts that the reports of all scales share: the paper's numbers, tables, plots, page, files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from della.errors import OutputError
from della.experiments import published, results
from della.report import page, plots, tables
from della.report.intervals import Interval
from della.report.plots import Mark

PNG = b"\x89PNG\r\n\x1a\n"


def marks(series: int = 2, panels: int = 2) -> list[Mark]:
    return [
        Mark(f"series {s}", y := 10 * s + p, y - 1, y + 2, p / 10, f"row {p}", f"panel {q}")
        for s in range(series)
        for q in range(panels)
        for p in (1, 3, 9)
    ]  # fmt: skip


def a_report(title: str = "A report") -> page.Report:
    table = tables.Table(
        "Scores <1>", ("method", "score"), (("TA | sum", "1.0"), ("DELLA", "2.5")), note="A note."
    )
    drawn = (
        plots.lines("over-p", "Over p", "What it shows.", marks(), "p", "score"),
        plots.dots("by-row", "By row & more", "Rows.", marks(1, 1), "score"),
    )
    section = page.Section("First", ("One.", "- a point\n- another"), (table,), drawn)
    return page.Report(title, ("Text with <b>tags</b> & `code`.",), (section, page.Section("Second")))


# ---- the paper's numbers, typed here a second time ---------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "models", "label", "scores"),
    [
        (1, "LM+Math", "TA", {"alpaca_eval": 79.1, "gsm8k": 60.6, "average": 69.9}),
        (1, "LM+Code", "TA", {"alpaca_eval": 73.3, "mbpp": 0, "average": 36.7}),
        (1, "LM+Code", "TIES", {"alpaca_eval": 77.4, "mbpp": 9.6, "average": 43.5}),
        (1, "Math+Code", "DARE", {"gsm8k": 61.9, "mbpp": 20.0, "average": 41.0}),
        (1, "Math+Code", "DELLA", {"gsm8k": 64.9, "mbpp": 20.0, "average": 42.4}),
        (1, "all three", "TIES", {"alpaca_eval": 77.5, "gsm8k": 66.9, "mbpp": 27.2, "average": 57.2}),
        (1, "all three", "DELLA", {"alpaca_eval": 80.4, "gsm8k": 61.8, "mbpp": 31.4, "average": 57.9}),
        (1, "lm", "alone", {"alpaca_eval": 80.8, "gsm8k": 45.9, "mbpp": 31.4}),
        (1, "math", "alone", {"gsm8k": 63.5}),
        (1, "code", "alone", {"mbpp": 27.0}),
        (2, "Math+Code", "without rescale", {"gsm8k": 42.2, "mbpp": 25.6, "average": 33.9}),
        (2, "Math+Code", "with rescale", {"gsm8k": 63.8, "mbpp": 19.2, "average": 41.5}),
        (3, "p=0.3", "DARE without rescale", {"mbpp": 39.7}),
        (3, "p=0.7", "DELLA without rescale", {"mbpp": 19.7}),
        (3, "p=0.9", "DELLA with rescale", {"mbpp": 49.1}),
        (6, "p=0.3", "row", {"gsm8k": 65.2}),
        (6, "p=0.8", "DARE", {"gsm8k": 65.8}),
        (6, "p=0.9", "random layer", {"gsm8k": 61.8}),
        (9, "all three", "TA", {}),
    ],
)
def test_published_rows(table: int, models: str, label: str, scores: dict[str, float]) -> None:
    assert published.published(table, models, label) == scores


@pytest.mark.parametrize(
    ("table", "label", "averages"),
    [
        (1, "TA", (69.9, 36.7, 39.4, 40.1)),
        (1, "DARE", (72.3, 56.1, 41.0, 56.5)),
        (1, "TIES", (72.2, 43.5, 43.4, 57.2)),
        (1, "DELLA", (72.9, 57.5, 42.4, 57.9)),
        (4, "TA", (69.5, 50.2, 29.6, 40.1)),
        (4, "DARE", (68.9, 50.3, 27.9, 49.4)),
        (4, "TIES", (68.9, 49.8, 29.3, 51.2)),
        (4, "DELLA", (70.2, 50.2, 28.6, 58.0)),
        (5, "WANDA, top-K", (70.8, 29.9, 41.3, 51.2)),
        (5, "WANDA, p by rank", (71.9, 55.6, 40.8, 55.0)),
        (5, "DELLA", (72.9, 57.5, 42.4, 57.9)),
        (7, "p=0.1", (70.2, 37.0, 39.3, 46.4)),
        (7, "p=0.3", (72.1, 38.5, 40.1, 56.4)),
        (7, "p=0.5", (72.4, 47.7, 41.6, 57.5)),
        (7, "p=0.7", (69.9, 56.9, 41.2, 54.1)),
        (7, "p=0.9", (57.0, 50.0, 37.5, 42.1)),
    ],
)
def test_published_averages(table: int, label: str, averages: tuple[float, ...]) -> None:
    merges = ("LM+Math", "LM+Code", "Math+Code", "all three")
    found = tuple(published.published(table, models, label)["average"] for models in merges)
    assert found == averages


# ---- tables -----------------------------------------------------------------------------------------------


def test_numbers_and_intervals() -> None:
    assert tables.number(None) == ""
    assert tables.number(-0.04) == "0.0"
    assert tables.number(1.25, 1) == "1.2"
    assert tables.number(3, 2, sign=True) == "+3.00"
    assert tables.with_interval(Interval(72.51, 70.14, 74.9)) == "72.5 (70.1 to 74.9)"
    assert tables.with_interval(Interval(-1, -2, 0.5), 2, sign=True) == "-1.00 (-2.00 to +0.50)"
    assert tables.with_interval(Interval(5, 5, 5)) == "5.0"


def test_a_table_as_markdown() -> None:
    table = tables.Table("T", ("a", "b", "c"), (("x|y", "z", "1"),), labels=2, note="N.")
    expected = "### T\n\n| a | b | c |\n|---|---|---:|\n| x\\|y | z | 1 |\n\nN.\n"
    assert tables.markdown(table) == expected


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^T: 1 cells for 2 columns: \('x',\)$"):
        tables.Table("T", ("a", "b"), (("x",),))


# ---- plots and the page -----------------------------------------------------------------------------------


def texts(svg: str) -> set[str]:
    return {e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text") and e.text}


def test_a_plot_names_its_panels_series_axes_and_rows() -> None:
    pytest.importorskip("vl_convert")
    over, rows = a_report().plots
    svg, png = plots.draw(over)
    assert texts(svg) >= {
        "Over p",
        "panel 0",
        "panel 1",
        "series 0",
        "series 1",
        "p",
        "score",
        "0.1",
        "0.3",
        "0.9",
    }
    assert png.startswith(PNG)
    assert texts(plots.draw(rows)[0]) >= {"By row & more", "row 1", "row 3", "row 9", "score"}


def test_every_interval_is_drawn() -> None:
    pytest.importorskip("vl_convert")
    one = plots.dots(
        "one", "One", "", [Mark("s", 5, 4, 7, label="a"), Mark("s", 6, 5, 6.5, label="b")], "score"
    )
    assert len(re.findall(r'aria-roledescription="rule mark"', plots.draw(one)[0])) == 2


def test_series_at_one_place_stand_side_by_side() -> None:
    spec = plots.lines("n", "t", "", marks(3, 1), "p", "y").spec
    first = [row["at"] for row in spec["data"]["values"] if row["x"] == 0.1]
    assert first == sorted(first)
    assert len(set(first)) == 3
    assert all(abs(at - 0.1) < 0.05 for at in first)


def test_places_may_stand_evenly_and_keep_their_names() -> None:
    pytest.importorskip("vl_convert")
    close = [Mark("s", p, p, p, x=p) for p in (0.3, 0.92, 0.93)]
    plot = plots.lines("n", "t", "", close, "p", "y", even=True)
    assert [row["at"] for row in plot.spec["data"]["values"]] == [0, 1, 2]
    assert texts(plots.draw(plot)[0]) >= {"0.3", "0.92", "0.93"}


def test_colours_are_as_many_as_shapes_and_all_differ() -> None:
    assert len(set(plots.COLOURS)) == len(set(plots.SHAPES)) == 8


def test_the_page_needs_nothing_else() -> None:
    pytest.importorskip("vl_convert")
    report = a_report()
    made = page.html(report, {plot.name: plots.draw(plot)[0] for plot in report.plots})
    assert "<script" not in made
    assert not re.search(r"""\b(src|href)\s*=\s*["'](?!#)""", made)
    assert not re.search(r"url\((?!#)|@import", made)
    assert set(re.findall(r"https?://[^\"' <]+", made)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert "Text with &lt;b&gt;tags&lt;/b&gt; &amp; <code>code</code>." in made
    assert "<ul><li>a point</li><li>another</li></ul>" in made
    assert '<td class="label">TA | sum</td><td>1.0</td>' in made
    assert made.count("<svg ") == 2
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids))


def test_the_report_as_markdown() -> None:
    assert page.text(a_report()) == (
        "# A report\n\nText with <b>tags</b> & `code`.\n\n## First\n\nOne.\n\n- a point\n- another\n\n"
        "### Scores <1>\n\n| method | score |\n|---|---:|\n| TA \\| sum | 1.0 |\n| DELLA | 2.5 |\n\n"
        "A note.\n\n"
        "![Over p](over-p.svg)\n\nWhat it shows.\n\n![By row & more](by-row.svg)\n\nRows.\n\n## Second\n"
    )


# ---- files ------------------------------------------------------------------------------------------------


def test_a_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    found = results.head("mini", "della paper --scale mini", 42, 1.26) | {
        "score": results.as_json(Interval(1 / 3, -0.0, 1))
    }
    assert found["time"] == {"seconds": 1.3}
    assert found["score"] == {"value": 0.333333, "low": 0.0, "high": 1.0}
    results.write(tmp_path / "out", found, a_report())
    results.write(tmp_path / "out", found, a_report())  # over what is there
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "by-row.png", "by-row.svg", "index.html", "over-p.png", "over-p.svg", "results.json", "tables.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert results.interval(found["score"]) == Interval(0.333333, 0.0, 1.0)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    (tmp_path / "tables.md.new").mkdir()
    with pytest.raises(OutputError, match=r"tables\.md: cannot be written \(Is a directory\)$"):
        results.write(tmp_path, results.head("mini", "c", 1, 0), a_report())
