"""The results of the full experiment as JSON and as a report, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.evaluate.scoring import Score, differences
from della.experiments.bench import Scored
from della.experiments.full_rows import tasks_of
from della.experiments.pages import LAMBDA, Column, P, said, shown, table
from della.experiments.published import COLUMNS, NAMES
from della.experiments.results import as_json, having, interval
from della.experiments.rows import VERDICTS, Row, entry
from della.report.intervals import Interval, interval_of, mean_over_seeds, side
from della.report.page import Report, Section
from della.report.tables import Table, number

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
Run = tuple[Row, Sequence[Scores]]  # a row with what was chosen, and its scores for each seed


def reported(scored: Scored) -> dict[str, Score]:
    """The score of each task that is reported; of a task that needs a judge and has none, none."""
    found = {}
    for task, metrics in scored.items():
        metric = next((metric for metric in REPORTED[task] if metric in metrics), None)
        if metric:
            found[task] = Score(metric, interval(metrics[metric]), metrics[metric]["items"])
    return found


def numbers(found: Sequence[Run], seed: int) -> dict[str, Any]:
    """Rows and claims as JSON, in percent; a row's main number is the mean over its tasks."""
    means = [(row, {task: _mean(scores, task, seed) for task in _tasks(scores)}) for row, scores in found]
    rows = [_row(row, mean, scores) for (row, mean), (_, scores) in zip(means, found, strict=True)]
    return {"rows": rows, "claims": list(_claims(means, seed))}


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


def _row(row: Row, means: Scores, seeds: Sequence[Scores]) -> dict[str, Any]:
    tasks = {
        task: {
            "metric": mean.metric, **as_json(mean.interval * 100), "items": len(mean.items),
            "by_seed": [round(100 * scores[task].interval.value, 6) for scores in seeds if task in scores],
        }
        for task, mean in means.items()
    }  # fmt: skip
    wanted = tasks_of(row.cell)
    whole = [scores for scores in seeds if len(scores) == len(wanted)]
    by_seed = [100 * sum(one.interval.value for one in scores.values()) / len(scores) for scores in whole]
    value = sum(mean.interval.value for mean in means.values()) / len(wanted)
    main = next(iter(means.values())).interval if len(wanted) == len(means) == 1 else Interval(*[value] * 3)
    return entry(row) | {
        "name": row.cell.name, "seeds": len(seeds), "measure": "score",
        "value": as_json(main * 100) if len(means) == len(wanted) else None,
        "over_seeds": as_json(mean_over_seeds(by_seed)) if len(by_seed) > 1 else None,
        "by_seed": [round(one, 4) for one in by_seed], "tasks": tasks, "paper": dict(row.paper),
    }  # fmt: skip


def _claims(found: Sequence[tuple[Row, Scores]], seed: int) -> Iterator[dict[str, Any]]:
    """DELLA less each other row of the same table and merge, by task, on the same problems."""
    della = {(row.table, row.group): (row, scores) for row, scores in found if row.label == "DELLA"}
    for row, theirs in found:
        if row.table not in COMPARED or row.label in ("DELLA", "alone"):
            continue
        best, ours = della[row.table, row.group]
        for task in [task for task in theirs if task in ours]:
            for gap in differences(task, {row.label: [theirs[task]], "DELLA": [ours[task]]}, seed):
                yield {
                    "claim": f"Table {row.table}: DELLA over {row.label}", "group": row.group,
                    "better": "DELLA", "worse": row.label, "task": task,
                    "over_items": as_json(gap.interval * 100), "over_seeds": None, "items": gap.items,
                    "verdict": VERDICTS[side(gap.interval, None, gap.differing)],
                    "paper": round(best.paper[task] - row.paper[task], 2),
                }  # fmt: skip


def report(results: Mapping[str, Any]) -> Report:
    """For each table ours with its interval, the paper's number, and ours minus the paper's."""
    sections = []
    for number_, title in TITLES.items():
        rows = having(results["rows"], table=str(number_))
        claims = [one for one in results["claims"] if one["claim"].startswith(f"Table {number_}:")]
        if rows:
            gaps = (table("DELLA and the others, on the same problems", claims, GAPS, labels=3),)
            sections.append(Section(title, tables=(_table(rows), *(gaps if claims else ()))))
    return Report("DELLA at full size", INTRODUCTION, tuple(sections))


GAPS: tuple[Column, ...] = (
    said("models", "group"), ("benchmark", lambda claim: NAMES[claim["task"]]), said("against", "worse"),
    ("DELLA minus it", lambda claim: shown(claim["over_items"], sign=True)),
    ("", lambda claim: "" if claim["verdict"] != VERDICTS[0] else VERDICTS[0]),
)  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns: list[Column] = [said("models", "group"), said("", "label"), P, LAMBDA]
    for name in COLUMNS:
        if any(_ours(row, name) for row in rows):
            columns += _of_benchmark(name)
    return table("", rows, columns, labels=2)


def _of_benchmark(name: str) -> tuple[Column, ...]:
    return (
        (NAMES[name], lambda row: shown(_ours(row, name))),
        ("paper", lambda row: number(row["paper"].get(name))),
        ("difference", lambda row: number(_less_paper(row, name), sign=True)),
    )


def _ours(row: Mapping[str, Any], name: str) -> Mapping[str, float] | None:
    """Our score of a benchmark, or of several their average."""
    if name != "average":
        return row["tasks"].get(name)  # type: ignore[no-any-return]
    return row["value"] if len(row["tasks"]) > 1 else None


def _less_paper(row: Mapping[str, Any], name: str) -> float | None:
    ours = _ours(row, name)
    return ours["value"] - row["paper"][name] if ours and name in row["paper"] else None
