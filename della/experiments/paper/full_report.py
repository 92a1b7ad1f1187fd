"""The results of the full experiment as JSON and as a report, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from della.experiments.paper.full_grid import Cell, Row
from della.experiments.paper.published import COLUMNS, NAMES, published
from della.experiments.paper.results import as_json, interval
from della.report.intervals import FEWEST, Interval, paired_bootstrap, wilson
from della.report.page import Report, Section
from della.report.tables import Table, number, with_interval

TITLES = {
    1: "Table 1: Drop, Elect, Fuse",
    2: "Table 2: rescale (lambda 1)",
    3: "Table 3: rescale, one expert (WizardCoder)",
    4: "Table 4: without Elect",
    5: "Table 5: WANDA scores instead of magnitudes",
    6: "Table 6: pruning WizardMath alone",
    7: "Table 7: drop rates of DELLA",
}
COMPARED = (1, 4, 5)  # tables in which DELLA is held against each other row
INTRODUCTION = (
    "The experiment of DELLA-Merging (arXiv 2406.11617) with its own models. All numbers are per cent, with "
    "95 % intervals over the problems; of several seeds they are of the mean over seeds.",
    "Hyperparameters were chosen on validation problems, which are not among those reported. GSM8K is scored "
    "by the judge where there was one, else by exact match of the last number.",
)


@dataclass(frozen=True)
class Scores:
    """A model's score on a task: ``metric``, its value as a share, and what each problem adds to it."""

    metric: str
    interval: Interval
    items: Mapping[str, float]


Found = tuple[Row, Cell, Sequence[Mapping[str, Scores]]]


def numbers(found: Sequence[Found], seed: int) -> dict[str, Any]:
    """Rows of (row, chosen cell, scores by task for each seed) as JSON; shares, not per cent."""
    return {
        "rows": [_row(row, chosen, scores, seed) for row, chosen, scores in found],
        "differences": list(_differences(found, seed)),
    }


def _row(row: Row, chosen: Cell, seeds: Sequence[Mapping[str, Scores]], seed: int) -> dict[str, Any]:
    paper = {name: value / 100 for name, value in published(row.table, row.models, row.label).items()}
    ours: dict[str, dict[str, Any]] = {}
    for task in row.tasks:
        scored = [scores[task] for scores in seeds if task in scores]
        if scored:
            ours[task] = {
                "metric": scored[0].metric, **as_json(_interval(scored, seed)),
                "seeds": [one.interval.value for one in scored], "items": len(scored[0].items),
            }  # fmt: skip
    values = {task: one["value"] for task, one in ours.items()}
    if len(values) == len(row.tasks) > 1:
        values["average"] = sum(values.values()) / len(values)
    return {
        "table": row.table, "models": row.models, "label": row.label, "seeds": list(row.seeds),
        "chosen": {
            "name": chosen.name, "method": chosen.method, "p": chosen.drop, "lambda": chosen.lambda_,
            "window": chosen.window, **dict(chosen.settings), "of": len(row.candidates),
        },
        "scores": ours, "average": values.get("average"), "paper": paper,
        "difference": {name: values[name] - paper[name] for name in values if name in paper},
    }  # fmt: skip


def _interval(scored: Sequence[Scores], seed: int) -> Interval:
    """Of one model its own interval; of several seeds, that of the mean over seeds, over the problems."""
    if len(scored) == 1:
        return scored[0].interval
    means = list(_means(scored).values())
    if all(mean in (0.0, 1.0) for mean in means):  # the bootstrap would see no spread where all are equal
        return wilson(round(sum(means)), len(means))
    return paired_bootstrap(means, [0.0] * len(means), seed=seed)


def _means(scored: Sequence[Scores]) -> dict[str, float]:
    """By problem, the mean over the models that have it."""
    by_id: dict[str, list[float]] = {}
    for one in scored:
        for key, value in one.items.items():
            by_id.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in by_id.items()}


def _differences(found: Sequence[Found], seed: int) -> Iterator[dict[str, Any]]:
    """DELLA minus each other row of the same table and merge, on the same problems."""
    della = {(row.table, row.models): seeds for row, _, seeds in found if row.label == "DELLA"}
    for row, _, seeds in found:
        if row.table not in COMPARED or row.label in ("DELLA", "alone"):
            continue
        for task in row.tasks:
            ours, theirs = (
                _means([scores[task] for scores in each if task in scores])
                for each in (della[row.table, row.models], seeds)
            )
            shared = [key for key in ours if key in theirs]
            if shared:
                gap = paired_bootstrap([ours[k] for k in shared], [theirs[k] for k in shared], seed=seed)
                noise = gap.holds_zero or sum(ours[k] != theirs[k] for k in shared) < FEWEST
                yield {
                    "table": row.table, "models": row.models, "task": task, "against": row.label,
                    **as_json(gap), "items": len(shared), "within_noise": noise,
                }  # fmt: skip


def report(results: Mapping[str, Any]) -> Report:
    """For each table ours with its interval, the paper's number, and ours minus the paper's."""
    sections = []
    for table, title in TITLES.items():
        rows = [row for row in results["rows"] if row["table"] == table]
        gaps = [gap for gap in results["differences"] if gap["table"] == table]
        if rows:
            shown = [_table(rows), *([_gaps(gaps)] if gaps else [])]
            sections.append(Section(title, tables=tuple(shown)))
    return Report("DELLA at full size", INTRODUCTION, tuple(sections))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [c for c in COLUMNS if any(c in row["difference"] or c in row["scores"] for row in rows)]
    head = ["models", "", "p", "lambda"]
    for column in columns:
        head += [NAMES[column], "paper", "difference"]
    body = []
    for row in rows:
        chosen = row["chosen"]
        cells = [row["models"], row["label"], "" if chosen["p"] is None else f"{chosen['p']:g}"]
        cells.append(f"{chosen['lambda']:g}" if chosen["method"] else "")
        for column in columns:
            cells += [_ours(row, column), _percent(row["paper"].get(column))]
            cells.append(_percent(row["difference"].get(column), sign=True))
        body.append(tuple(cells))
    return Table("", tuple(head), tuple(body), labels=2)


def _gaps(gaps: Sequence[Mapping[str, Any]]) -> Table:
    body = [
        (
            gap["models"], NAMES[gap["task"]], gap["against"],
            with_interval(_hundredfold(interval(gap)), sign=True),
            "within noise" if gap["within_noise"] else "",
        )
        for gap in gaps
    ]  # fmt: skip
    head = ("models", "benchmark", "against", "DELLA minus it", "")
    return Table("DELLA and the others, on the same problems", head, tuple(body), labels=3)


def _ours(row: Mapping[str, Any], column: str) -> str:
    if column == "average":
        return _percent(row["average"])
    score = row["scores"].get(column)
    return "" if score is None else with_interval(_hundredfold(interval(score)))


def _hundredfold(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


def _percent(share: float | None, *, sign: bool = False) -> str:
    return number(None if share is None else 100 * share, sign=sign)
