"""Results of the full experiment as JSON and as Markdown tables, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from della.evaluate.statistics import Interval, paired_bootstrap, wilson
from della.paper.full_grid import Cell, Row
from della.paper.full_published import COLUMNS, published

TITLES = {
    1: "Table 1: Drop, Elect, Fuse",
    2: "Table 2: rescale (lambda 1)",
    3: "Table 3: rescale, one expert (WizardCoder)",
    4: "Table 4: without Elect",
    5: "Table 5: WANDA scores instead of magnitudes",
    6: "Table 6: pruning WizardMath alone",
    7: "Table 7: drop rates of DELLA",
}
NAMES = {"alpaca_eval": "AlpacaEval", "gsm8k": "GSM8K", "mbpp": "MBPP", "average": "average"}
COMPARED = {1: "DELLA", 4: "DELLA", 5: "DELLA"}


@dataclass(frozen=True)
class Scores:
    """A model's score on a task: ``metric``, its value as a share, and what each problem adds to it."""

    metric: str
    value: float
    low: float
    high: float
    items: Mapping[str, float]


Found = tuple[Row, Cell, Sequence[Mapping[str, Scores]]]


def report(found: Sequence[Found], seed: int) -> dict[str, Any]:
    """Rows of (row, chosen cell, scores by task for each seed) as JSON; all numbers are shares."""
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
            interval = _interval(scored, seed)
            ours[task] = {
                "metric": scored[0].metric, "value": interval.value, "low": interval.low,
                "high": interval.high, "seeds": [one.value for one in scored], "items": len(scored[0].items),
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
        return Interval(scored[0].value, scored[0].low, scored[0].high)
    means = list(_means(scored).values())
    if all(mean in (0.0, 1.0) for mean in means):  # the bootstrap would see no spread at all
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
    for row, _, seeds in found:
        mine = COMPARED.get(row.table)
        if mine is None or row.label in (mine, "alone"):
            continue
        for other, _, theirs in found:
            if (other.table, other.models, other.label) != (row.table, row.models, mine):
                continue
            for task in row.tasks:
                a = _means([scores[task] for scores in theirs if task in scores])
                b = _means([scores[task] for scores in seeds if task in scores])
                shared = [key for key in a if key in b]
                if shared:
                    gap = paired_bootstrap([a[k] for k in shared], [b[k] for k in shared], seed=seed)
                    yield {
                        "table": row.table, "models": row.models, "a": mine, "b": row.label, "task": task,
                        "value": gap.value, "low": gap.low, "high": gap.high, "items": len(shared),
                        "within_noise": gap.holds_zero,
                    }  # fmt: skip


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: for each table ours with its interval, the paper's number, and ours minus the paper's."""
    lines = ["# DELLA at full size", "", "In percent, with 95 % intervals over the problems.", ""]
    for table, title in TITLES.items():
        rows = [row for row in results["rows"] if row["table"] == table]
        if rows:
            lines += [f"## {title}", "", *_table(rows), ""]
    gaps = results["differences"]
    if gaps:
        lines += ["## DELLA and the others, on the same problems", ""]
        lines += ["| table | models | task | against | DELLA minus it | |", "|---|---|---|---|---|---|"]
        for gap in gaps:
            noise = "within noise" if gap["within_noise"] else ""
            value = f"{100 * gap['value']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
            told = [gap["table"], gap["models"], NAMES[gap["task"]], gap["b"], value, noise]
            lines.append(_line(told))
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = [c for c in COLUMNS if any(c in row["scores"] or c in row["paper"] for row in rows)]
    head = ["models", "", "p", "lambda"]
    for column in columns:
        head += [NAMES[column], "paper", "difference"]
    yield _line(head)
    yield "|" + "---|" * len(head)
    for row in rows:
        cells: list[object] = [row["models"], row["label"], _number(row["chosen"]["p"])]
        cells.append(_number(row["chosen"]["lambda"]) if row["chosen"]["method"] else "")
        for column in columns:
            cells += [_ours(row, column), _percent(row["paper"].get(column))]
            cells.append(_percent(row["difference"].get(column), "+"))
        yield _line(cells)


def _ours(row: Mapping[str, Any], column: str) -> str:
    if column == "average":
        return _percent(row["average"])
    score = row["scores"].get(column)
    if score is None:
        return ""
    return f"{_percent(score['value'])} ({_percent(score['low'])} to {_percent(score['high'])})"


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{100 * share:{sign}.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
