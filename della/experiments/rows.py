"""Rows and claims: what the tables of a report consist of, and what results.json says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from della.experiments.bench import Bench
from della.experiments.cells import Cell
from della.experiments.demo import EXPERTS
from della.experiments.measures import Measured, difference, measure
from della.experiments.published import published
from della.experiments.results import as_json
from della.report.intervals import paired_bootstrap

Found = dict[str, Any]
VERDICTS = {1: "holds", 0: "within noise", -1: "reversed"}
SINGLES = ("base", *EXPERTS)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: cells to choose among, of which the best is merged with so many seeds.

    ``group`` is the merge, or p where one expert is pruned.
    """

    table: str
    group: str
    label: str
    candidates: tuple[Cell, ...]
    seeds: int = 1

    @property
    def cell(self) -> Cell:
        """What was chosen, where that is known; else the first candidate, which stands for it."""
        return self.candidates[0]

    @property
    def cells(self) -> list[Cell]:
        """The cells whose mean it is."""
        return self.cell.seeded(self.seeds)

    @property
    def paper(self) -> Mapping[str, float]:
        """The paper's scores of this row, by benchmark; {} where it has none."""
        return published(int(self.table), self.group, self.label) if self.table.isdigit() else {}


@dataclass(frozen=True, slots=True)
class Claim:
    """That ``better`` keeps more than ``worse``."""

    about: str
    group: str
    better: Row
    worse: Row


@dataclass(slots=True)
class Experiment:
    """All rows and claims, by the choices on validation, and these choices as results.json has them."""

    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    chosen: list[Found] = field(default_factory=list)

    def claim(self, about: str, group: str, better: Row, worse: Row) -> None:
        self.claims.append(Claim(about, group, better, worse))

    def cells(self) -> list[Cell]:
        """What is to be scored on test, each once; merges of three first, as they take longest."""
        found = {cell.name: cell for row in self.rows for cell in row.cells}
        return sorted(found.values(), key=lambda cell: -len(cell.experts))


# ---- results.json -----------------------------------------------------------------------------------------


def numbers(bench: Bench, made: Experiment, digits: int = 5, *, by_task: bool = False) -> Found:
    """Rows and claims as JSON, in percent; losses have so many ``digits``.

    by_task: claims have the differences of losses too.
    """
    measured = dict(
        zip(made.rows, bench.each("intervals", lambda row: _measured(bench, row), made.rows), strict=True)
    )

    def claimed(claim: Claim) -> Found:
        found = claim_json(claim, measured[claim.better], measured[claim.worse])
        return found | ({"loss": _losses(bench, claim)} if by_task else {})

    return {
        "singles": {
            name: {task: _task(bench, [Cell((name,))], task, digits) for task in EXPERTS} for name in SINGLES
        },
        "rows": bench.each("rows", lambda row: _row(bench, row, measured[row], digits), made.rows),
        "claims": bench.each("claims", claimed, made.claims),
        "chosen": made.chosen,
    }


def entry(row: Row) -> Found:
    """What every row has in results.json, whatever its measure."""
    return {"table": row.table, "group": row.group, "label": row.label, "model": row.cell.stated()}


def _measured(bench: Bench, row: Row) -> Measured:
    """The main number of a row, in percent: of a merge the kept gain, of one pruned expert what is right."""
    experts = row.cell.experts
    return measure(bench, row.cells, "test", experts, kept=len(experts) > 1)


def _row(bench: Bench, row: Row, own: Measured, digits: int) -> Found:
    return entry(row) | {
        "seeds": len(own.seeds),
        "measure": "kept gain" if len(row.cell.experts) > 1 else "right answers",
        "value": as_json(own.over_items),
        "over_seeds": as_json(own.over_seeds) if len(own.seeds) > 1 else None,
        "by_seed": [round(value, digits - 1) for value in own.seeds],
        "tasks": {task: _task(bench, row.cells, task, digits) for task in row.cell.experts},
        "paper": dict(row.paper),
    }


def _task(bench: Bench, cells: Sequence[Cell], task: str, digits: int) -> Found:
    """Raw scores of one task, means over seeds: loss per answer token, and perplexity or percent right."""
    loss = bench.loss(cells, "test", task)
    found = {"loss": round(loss, digits)}
    scored = [bench.score(cell, "test")[task] for cell in cells]
    if "right" not in scored[0]:
        return found | {"perplexity": round(math.exp(loss), digits - 1)}
    right = [one["right"] for one in scored]
    return found | {"percent": round(100 * float(np.mean(right)), digits - 2)}


def claim_json(claim: Claim, better: Measured, worse: Measured) -> Found:
    """The difference over problems and over seeds, what follows, and the paper's own difference, in its own
    scores, where it has both rows.
    """

    def score(row: Row) -> float | None:
        found = row.paper if row.table.isdigit() else published(1, row.group, row.label)
        values = [found["average"]] if "average" in found else list(found.values())
        return values[0] if values else None

    less, a, b = difference(better, worse), score(claim.better), score(claim.worse)
    return {
        "claim": claim.about, "group": claim.group, "better": claim.better.label, "worse": claim.worse.label,
        "over_items": as_json(less.items),
        "over_seeds": None if less.seeds is None else as_json(less.seeds),
        "verdict": VERDICTS[less.side], "paper": None if a is None or b is None else round(a - b, 2),
    }  # fmt: skip


def _losses(bench: Bench, claim: Claim) -> Found:
    """The difference of losses by task, over problems."""

    def means(row: Row, task: str) -> Any:
        values = [bench.values(bench.score(cell, "test"), "test", task)[0] for cell in row.cells]
        return -np.mean(values, axis=0)

    return {
        task: as_json(
            paired_bootstrap(
                means(claim.better, task), means(claim.worse, task), weights=bench.tokens["test", task]
            )
        )
        for task in claim.better.cell.experts
    }
