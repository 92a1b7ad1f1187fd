"""The plots of the miniature, and its tables over p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from della.experiments.pages import Found, mark, shown
from della.report.plots import Plot, dots, lines
from della.report.tables import Table, number

BARS = "Bars are 95 % intervals over problems."


def pruning_table(title: str, rows: Sequence[Found], note: str) -> Table:
    """One expert over p: a row a p, for each label ours with its interval and the paper's number."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    columns = ("p", *(name for label in labels for name in (label, "paper")))
    cells = []
    for group in dict.fromkeys(row["group"] for row in rows):
        by_label = {row["label"]: row for row in rows if row["group"] == group}
        texts = [group.removeprefix("p=")]
        for label in labels:
            row = by_label[label]
            texts += [shown(row["value"]), number(next(iter(row["paper"].values()), None))]
        cells.append(tuple(texts))
    return Table(title, columns, tuple(cells), note=note)


def gains(name: str, title: str, rows: Sequence[Found]) -> Plot:
    """Kept gains of merges: a small plot a merge."""
    marks = [mark(row["value"], "", row["label"], row["group"]) for row in rows]
    return dots(name, title, f"Kept gain, percent. {BARS}", marks, "kept gain, %")


def figure3(found: Found) -> Plot:
    """Pruning one expert: MAGPRUNE, DARE and top-K."""
    text = "MAGPRUNE, DARE and top-K without rescale (as in TIES), lambda 1."
    return _pruned(found, "figure3", "Figure 3: pruning the Math expert", text, {
        ("6", "row"): "MAGPRUNE", ("figure 3", "row, wide"): "MAGPRUNE, wide range", ("6", "DARE"): "DARE",
        ("figure 3", "top-K"): "top-K",
    })  # fmt: skip


def figure4(found: Found) -> Plot:
    """Ranks of the row and of the layer."""
    title = "Figure 4: ranks within the row and within the layer"
    return _pruned(found, "figure4", title, "The Math expert alone, lambda 1.", {
        ("6", "row"): "row", ("6", "layer"): "layer", ("figure 3", "row, wide"): "row, wide range",
        ("figure 3", "layer, wide"): "layer, wide range",
    })  # fmt: skip


def figure6(found: Found) -> Plot:
    """MAGPRUNE, DARE and top-K in merges, over p."""
    names = {"7": "MAGPRUNE (DELLA)", "DARE": "DARE", "TIES": "top-K (TIES)"}
    marks = []
    for row in found["rows"]:
        if row["table"] in ("7", "figure 6"):
            series = names["7" if row["table"] == "7" else row["label"].partition(" ")[0]]
            marks.append(mark(row["value"], series, "", row["group"], row["model"]["p"]))
    marks.sort(key=lambda one: list(names.values()).index(one.series))
    text = f"Elect and the mean; lambda (and DELLA's epsilon) chosen for each p on validation. {BARS}"
    return lines(
        "figure6", "Figure 6: what is dropped, in merges", text, marks, "drop rate p", "kept gain, %"
    )


def _pruned(found: Found, name: str, title: str, text: str, series: Mapping[tuple[str, str], str]) -> Plot:
    marks = [
        mark(row["value"], series[row["table"], row["label"]], x=row["model"]["p"])
        for row in found["rows"]
        if (row["table"], row["label"]) in series
    ]
    marks.sort(key=lambda one: list(series.values()).index(one.series))
    return lines(name, title, f"{text} {BARS}", marks, "drop rate p", "Math, % right", even=True)
