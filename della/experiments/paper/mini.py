"""`della paper --scale mini`: the paper's tables and figures with the trio that della brings, on a CPU.

p, lambda and epsilon are chosen for each method and merge on validation; what was chosen is merged with
several seeds and scored on test.  Every score is kept in OUT/scores.jsonl, so that the same command goes on
where it was cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from della.errors import EvaluationError, unknown
from della.evaluate.generations import Store
from della.experiments.paper import mini_numbers, mini_rows
from della.experiments.paper.mini_bench import Bench
from della.experiments.paper.mini_grid import Grid
from della.experiments.paper.mini_report import report
from della.experiments.paper.mini_trio import CALIBRATION, Programs, Trio
from della.experiments.paper.results import head, write
from della.options import default_threads
from della.report import plots
from della.version import __version__

IMPORTANCES = ("wanda", "magnitude")


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


def run_mini(options: MiniOptions, tell: Callable[[str], None]) -> dict[str, Any]:
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
    with Store(options.out / "scores.jsonl", settings) as store:
        before = len(store.records)
        if before:
            tell(f"{before} scores of an earlier run are used")
        with Bench(trio, store, options.grid, options.threads, options.seed, tell) as bench:
            bench.singles()
            tables = [table for table in mini_rows.TABLES if table != "5" or options.importance == "wanda"]
            experiment = mini_rows.choose(bench, tables, options.seeds, options.sweep, options.seed)
            bench.each("test", lambda cell: bench.score(cell, "test"), experiment.cells())
            found = mini_numbers.numbers(bench, experiment)
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
    if options.importance not in IMPORTANCES:
        raise EvaluationError(unknown("--importance", options.importance, IMPORTANCES))
    if min(options.seeds, options.items, options.validation_items, options.final_items, options.threads) < 1:
        raise EvaluationError("seeds, items and threads must be 1 or more")
