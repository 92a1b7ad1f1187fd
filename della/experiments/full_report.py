"""The results of the full experiment as JSON and as a report, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.evaluate.scoring import Score, differences
from della.experiments.bench import Scored
from della.experiments.full_rows import tasks_of
from della.experiments.published import COLUMNS, NAMES
from della.experiments.results import as_json, interval
from della.experiments.rows import Row
from della.report.intervals import interval_of
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
COMPARED = ("1", "4", "5")  # tables in which DELLA is held against each other row
INTRODUCTION = (
    "The experiment of DELLA-Merging (arXiv 2406.11617) with its own models. All numbers are per cent, with "
    "95 % intervals over the problems; of several seeds they are of the mean over seeds.",
    "Hyperparameters were chosen on validation problems, which are not among those reported. GSM8K is scored "
    "by the judge where there was one, else by exact match of the last number.",
)


# What is reported of a task: the first of these scores that there is.
REPORTED = {"gsm8k": ("judge", "flexible"), "mbpp": ("pass@1",), "alpaca_eval": ("win_rate",)}
Scores = Mapping[str, Score]  # by task
# A row with what was chosen, of how many candidates, and its scores for each seed.
Found = tuple[Row, int, Sequence[Scores]]


def reported(scored: Scored) -> dict[str, Score]:
    """The score of each task that is reported; of a task that needs a judge and has none, none."""
    found = {}
    for task, metrics in scored.items():
        metric = next((metric for metric in REPORTED[task] if metric in metrics), None)
        if metric:
            found[task] = Score(metric, interval(metrics[metric]), metrics[metric]["items"])
    return found


def numbers(found: Sequence[Found], seed: int) -> dict[str, Any]:
    """Rows and differences as JSON; shares, not per cent."""
    means = [(row, of, {task: _mean(scores, task, seed) for task in _tasks(scores)}, scores)
             for row, of, scores in found]  # fmt: skip
    return {
        "rows": [_row(*one) for one in means],
        "differences": list(_differences([(row, scores) for row, _, scores, _ in means], seed)),
    }


def _tasks(seeds: Sequence[Scores]) -> list[str]:
    return list(dict.fromkeys(task for scores in seeds for task in scores))


def _mean(seeds: Sequence[Scores], task: str, seed: int) -> Score:
    """Of one model its own score; of several seeds, by problem the mean over the models that have it."""
    scored = [scores[task] for scores in seeds if task in scores]
    if len(scored) == 1:
        return scored[0]
    by_id: dict[str, list[float]] = {}
    for one in scored:
        for key, value in one.items.items():
            by_id.setdefault(key, []).append(value)
    items = {key: sum(values) / len(values) for key, values in by_id.items()}
    return Score(scored[0].metric, interval_of(np.array(list(items.values())), seed=seed), items)


def _row(row: Row, of: int, means: Scores, seeds: Sequence[Scores]) -> dict[str, Any]:
    paper = {name: value / 100 for name, value in row.paper.items()}
    ours: dict[str, dict[str, Any]] = {
        task: {
            "metric": mean.metric, **as_json(mean.interval),
            "seeds": [scores[task].interval.value for scores in seeds if task in scores],
            "items": next(len(scores[task].items) for scores in seeds if task in scores),
        }
        for task, mean in means.items()
    }  # fmt: skip
    values = {task: one["value"] for task, one in ours.items()}
    cell, tasks = row.cell, tasks_of(row.cell)
    if len(values) == len(tasks) > 1:
        values["average"] = sum(values.values()) / len(values)
    return {
        "table": int(row.table), "models": row.group, "label": row.label,
        "seeds": [cell.seed for cell in row.cells],
        "chosen": {
            "name": cell.name, "method": cell.method, "p": cell.p, "lambda": cell.lambda_,
            "window": None if cell.epsilon is None else 2 * cell.epsilon, **dict(cell.settings), "of": of,
        },
        "scores": ours, "average": values.get("average"), "paper": paper,
        "difference": {name: values[name] - paper[name] for name in values if name in paper},
    }  # fmt: skip


def _differences(found: Sequence[tuple[Row, Scores]], seed: int) -> Iterator[dict[str, Any]]:
    """DELLA minus each other row of the same table and merge, on the same problems."""
    della = {(row.table, row.group): scores for row, scores in found if row.label == "DELLA"}
    for row, theirs in found:
        if row.table not in COMPARED or row.label in ("DELLA", "alone"):
            continue
        ours = della[row.table, row.group]
        for task in [task for task in theirs if task in ours]:
            for gap in differences(task, {row.label: [theirs[task]], "DELLA": [ours[task]]}, seed):
                yield {
                    "table": int(row.table), "models": row.group, "task": task, "against": row.label,
                    **as_json(gap.interval), "items": gap.items, "within_noise": gap.within_noise,
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
            with_interval(interval(gap) * 100, sign=True),
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
    return "" if score is None else with_interval(interval(score) * 100)


def _percent(share: float | None, *, sign: bool = False) -> str:
    return number(None if share is None else 100 * share, sign=sign)
