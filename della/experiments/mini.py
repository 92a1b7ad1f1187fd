"""`della paper --scale mini`: the paper's tables and figures with the trio that della brings, on a CPU.

p, lambda and epsilon are chosen for each method and merge on validation; what was chosen is merged with
several seeds and scored on test.  Every score is kept in OUT/scores.jsonl, so that the same command resumes
where it was cut short.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments.bench import Bench
from della.experiments.cells import Cell
from della.experiments.demo import EXPERTS
from della.experiments.measures import Measured, difference, measure
from della.experiments.mini_report import report
from della.experiments.mini_rows import TABLES, Chooser, Experiment, lay_out
from della.experiments.mini_trio import CALIBRATION, MADE_OF, STORED, Programs, Trio
from della.experiments.published import published
from della.experiments.results import as_json, head, write
from della.experiments.rows import Claim, Row
from della.experiments.tables import Grid
from della.options import default_threads
from della.report import plots
from della.version import __version__

VERDICTS = {1: "holds", 0: "within noise", -1: "reversed"}
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MiniOptions:
    """What the command is told.

    seed: the first of ``seeds``, with which each chosen merge is made; figures and pruning get half as many.
    importance: wanda, or magnitude to leave out table 5.  Problems a task: ``items`` on test,
    ``validation_items`` for the first choice, ``final_items`` for the last one, among the best.  threads work
    at the same time; scores do not depend on them.  command: what makes the results again.
    """

    out: Path
    seed: int = 42
    seeds: int = 10
    importance: str = "wanda"
    items: int = 120
    validation_items: int = 48
    final_items: int = 120
    threads: int = field(default_factory=default_threads)
    grid: Grid = field(default_factory=Grid)
    command: str = "della paper --scale mini"

    @property
    def sweep(self) -> int:
        """Seeds of each point of a curve."""
        return max(1, self.seeds // 2)


def run_mini(options: MiniOptions, tell: Callable[[str], None]) -> Found:
    """Run the experiment, or what is missing of it, and write its report (`results.write`); its results.json.

    Raises EvaluationError, also where the extra paper is missing.
    """
    began = time.monotonic()
    _check(options)
    plots.check()
    programs = Programs.open()
    if programs.why:
        tell(f"note: {programs.why}; Code answers are read as arithmetic instead, and nothing is executed")
    items = {"validation": options.validation_items, "final": options.final_items, "test": options.items}
    trio = Trio(items, programs)
    trio.collect_norms()
    settings = {"della": __version__, "trio": trio.digest, "scorer": programs.kind}
    with Store(options.out / "scores.jsonl", settings, of="scores") as store:
        before = len(store.records)
        if before:
            tell(f"{before} scores of an earlier run are used")
        with Bench(trio, store, tell, options.threads, trio.tokens, MADE_OF) as bench:
            found = _run(bench, options)
        scored = len(store.records)
    results = head("mini", options.command, options.seed, 0.0, "tokenizers", "vl-convert-python")
    grid = {name: list(values) for name, values in asdict(options.grid).items()}
    results |= {
        "seeds": options.seeds, "sweep_seeds": options.sweep, "importance": options.importance,
        "items": items,
        "calibration_items": CALIBRATION, "grid": grid, "trio": trio.digest,
        "code": {"scored_by": programs.kind, "why": programs.why}, **found,
    }  # fmt: skip
    results["time"] = {
        "seconds": round(time.monotonic() - began, 1), "threads": options.threads, "sandbox": programs.name,
        "models_scored": scored, "scores_of_earlier_runs": before, "programs_asked": programs.asked,
        "programs_run": programs.run,
    }  # fmt: skip
    write(options.out, results, report(results))
    return results


def _check(options: MiniOptions) -> None:
    if min(options.seeds, options.items, options.validation_items, options.final_items, options.threads) < 1:
        raise EvaluationError("seeds, items and threads must be 1 or more")


def _run(bench: Bench, options: MiniOptions) -> Found:
    """Choose and score; base and experts come first, as all kept gains need them."""
    pairs = [(Cell((name,)), split) for split in STORED for name in ("base", *EXPERTS)]
    bench.each("base and experts", lambda pair: bench.score(*pair), pairs)
    names = [table for table in TABLES if table != "5" or options.importance == "wanda"]
    chooser = Chooser(bench, options.grid, options.seed)
    experiment = lay_out(chooser, names, options.seeds, options.sweep)
    bench.each("test", lambda cell: bench.score(cell, "test"), experiment.cells())
    return numbers(bench, experiment)


# ---- results.json -----------------------------------------------------------------------------------------


def numbers(bench: Bench, experiment: Experiment) -> Found:
    """Rows and claims as JSON."""
    measured = dict(
        zip(experiment.rows, bench.each("intervals", lambda row: _measured(bench, row), experiment.rows))
    )
    return {
        "singles": {
            name: {task: _task(bench, [Cell((name,))], task) for task in EXPERTS}
            for name in ("base", *EXPERTS)
        },
        "rows": bench.each("rows", lambda row: _row(bench, row, measured[row]), experiment.rows),
        "claims": bench.each(
            "claims", lambda c: claim_json(c, measured[c.better], measured[c.worse]), experiment.claims
        ),
        "chosen": _chosen(experiment),
    }


def _measured(bench: Bench, row: Row) -> Measured:
    """The main number of a row, in percent: of a merge the kept gain, of one pruned expert what is right."""
    experts = row.cell.experts
    return measure(bench, row.cells, "test", experts, kept=len(experts) > 1, unit=100.0)


def _chosen(experiment: Experiment) -> list[Found]:
    """What was best on validation for each p, and of all, with kept gains there in percent."""
    return [
        {
            "table": table, "group": merge, "label": label, "of": of, **choice.cell.stated(),
            "kept": round(100 * choice.kept, 3),
        }
        for table, chosen in experiment.chosen.items()
        for (label, merge), picked in chosen.items()
        for of, choice in (*(("p", each) for each in picked.by_p.values()), ("all", picked.best))
    ]  # fmt: skip


def _row(bench: Bench, row: Row, own: Measured) -> Found:
    return {
        "table": row.table, "group": row.group, "label": row.label, "model": row.cell.stated(),
        "seeds": len(own.seeds),
        "measure": "kept gain" if len(row.cell.experts) > 1 else "right answers",
        "value": as_json(own.over_items),
        "over_seeds": as_json(own.over_seeds) if len(own.seeds) > 1 else None,
        "by_seed": [round(value, 4) for value in own.seeds],
        "tasks": {task: _task(bench, row.cells, task) for task in row.cell.experts},
        "paper": dict(row.paper),
    }  # fmt: skip


def _task(bench: Bench, cells: Sequence[Cell], task: str) -> Found:
    """Raw scores of one task, means over seeds: loss per answer token, and perplexity or percent right."""
    loss = bench.loss(cells, "test", task)
    found = {"loss": round(loss, 5)}
    if task == "lm":
        return found | {"perplexity": round(math.exp(loss), 4)}
    right = [bench.score(cell, "test")[task]["right"] for cell in cells]
    return found | {"percent": round(100 * float(np.mean(right)), 3)}


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
