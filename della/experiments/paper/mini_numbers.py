"""What the scores of the miniature's rows say: means with intervals, claims with verdicts; all as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from della.experiments.demo import EXPERTS
from della.experiments.paper.mini_bench import Bench, Floats
from della.experiments.paper.mini_grid import Cell, stated
from della.experiments.paper.mini_rows import Comparison, Experiment, Row
from della.experiments.paper.mini_trio import Scored
from della.experiments.paper.published import published
from della.experiments.paper.results import as_json
from della.report.intervals import Interval, mean_over_seeds, paired_bootstrap, wilson

HOLDS, NOISE, REVERSED = "holds", "within noise", "reversed"
Number = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's main number in percent: by problem (mean over seeds) with weights, and by seed.

    Of a merge it is the kept gain, of one pruned expert the share of right answers.  ``strata`` counts the
    problems of each task.
    """

    items: Floats
    weights: Floats
    strata: tuple[int, ...]
    seeds: tuple[float, ...]

    @property
    def value(self) -> float:
        return float((self.items * self.weights).sum())


def measure(bench: Bench, row: Row) -> Measured:
    """The main number of a row on test."""
    merged = len(row.cell.experts) > 1
    tasks = row.cell.tasks if merged else row.cell.tasks[:1]
    found = []
    for cell in row.cells:
        scored = bench.score(cell, "test")
        found.append(
            bench.shares(scored, "test", tasks) if merged else bench.values(scored, "test", tasks[0])
        )
    by_seed = tuple(100 * float((values * weights).sum()) for values, weights in found)
    strata = tuple(len(bench.trio.problems["test", task].items) for task in tasks)
    return Measured(100 * np.mean([values for values, _ in found], axis=0), found[0][1], strata, by_seed)


def numbers(bench: Bench, experiment: Experiment) -> Number:
    """Rows and claims as JSON."""
    measured = dict(
        zip(
            map(_name, experiment.rows), bench.each("intervals", lambda r: measure(bench, r), experiment.rows)
        )
    )
    rows = bench.each("rows", lambda row: _row(bench, row, measured[_name(row)]), experiment.rows)
    claims = bench.each(
        "claims",
        lambda c: _claim(c, measured[_name(c.better)], measured[_name(c.worse)]),
        experiment.comparisons,
    )
    return {"singles": _singles(bench), "rows": rows, "claims": claims, "chosen": _chosen(experiment)}


def _name(row: Row) -> tuple[str, str, str]:
    return row.table, row.group, row.label


def _singles(bench: Bench) -> dict[str, Number]:
    """Base and experts as they are, on all tasks of the test split."""
    return {
        name: {task: _task(bench, [bench.score(Cell((name,)), "test")], task) for task in EXPERTS}
        for name in ("base", *EXPERTS)
    }


def _chosen(experiment: Experiment) -> list[Number]:
    """What was best on validation for each p, and of all, with kept gains there in percent."""
    return [
        {
            "table": table, "group": merge, "label": label, "of": of, **stated(choice.cell),
            "kept": round(100 * choice.kept, 3),
        }
        for table, chosen in experiment.chosen.items()
        for (label, merge), picked in chosen.items()
        for of, choice in (*(("p", each) for each in picked.by_p.values()), ("all", picked.best))
    ]  # fmt: skip


def _row(bench: Bench, row: Row, own: Measured) -> Number:
    scored = [bench.score(cell, "test") for cell in row.cells]
    several = len(own.seeds) > 1
    return {
        "table": row.table, "group": row.group, "label": row.label, "model": stated(row.cell),
        "seeds": len(own.seeds),
        "measure": "kept gain" if len(row.cell.experts) > 1 else "right answers",
        "value": as_json(_over_items(own)),
        "over_seeds": as_json(mean_over_seeds(own.seeds)) if several else None,
        "by_seed": [round(value, 4) for value in own.seeds],
        "tasks": {task: _task(bench, scored, task) for task in row.cell.tasks},
        "paper": dict(row.paper),
    }  # fmt: skip


def _over_items(own: Measured) -> Interval:
    if len(own.seeds) == 1 and set(np.unique(own.items)) <= {0.0, 100.0}:
        found = wilson(round(float(own.items.sum()) / 100), len(own.items))
        return Interval(100 * found.value, 100 * found.low, 100 * found.high)
    return _bootstrap(own, np.zeros_like(own.items))


def _bootstrap(own: Measured, other: Floats) -> Interval:
    return paired_bootstrap(own.items, other, weights=own.weights, strata=own.strata)


def _task(bench: Bench, scored: Sequence[Scored], task: str) -> Number:
    """Raw scores of one task, means over seeds: loss per answer token, and perplexity or percent right."""
    tokens = sum(bench.trio.problems["test", task].tokens)
    loss = float(np.mean([sum(one[task]["loss"]) / tokens for one in scored]))
    found = {"loss": round(loss, 5)}
    if task == "lm":
        return found | {"perplexity": round(math.exp(loss), 4)}
    return found | {"percent": round(100 * float(np.mean([one[task]["right"] for one in scored])), 3)}


def _claim(claim: Comparison, better: Measured, worse: Measured) -> Number:
    """The difference over problems (paired, means over seeds) and over seeds, and what follows.

    A claim holds, or is reversed, only where both intervals leave zero out.
    """
    items = _bootstrap(better, worse.items)
    count = max(len(better.seeds), len(worse.seeds))
    pairs = [
        better.seeds[i % len(better.seeds)] - worse.seeds[i % len(worse.seeds)]
        for i in range(min(len(better.seeds), len(worse.seeds)) if _both(better, worse) else count)
    ]
    seeds = mean_over_seeds(pairs) if len(pairs) > 1 else None
    noise = items.holds_zero or (seeds is not None and seeds.holds_zero)
    return {
        "claim": claim.about, "group": claim.group, "better": claim.better.label, "worse": claim.worse.label,
        "over_items": as_json(items), "over_seeds": None if seeds is None else as_json(seeds),
        "verdict": NOISE if noise else HOLDS if items.value > 0 else REVERSED,
        "paper": _in_paper(claim),
    }  # fmt: skip


def _both(better: Measured, worse: Measured) -> bool:
    return len(better.seeds) > 1 and len(worse.seeds) > 1


def _in_paper(claim: Comparison) -> float | None:
    """The paper's own difference, in its own scores, where it has both rows."""

    def score(row: Row) -> float | None:
        found = row.paper if row.table.isdigit() else published(1, row.group, row.label)
        values = [found["average"]] if "average" in found else list(found.values())
        return values[0] if values else None

    a, b = score(claim.better), score(claim.worse)
    return None if a is None or b is None else round(a - b, 2)
