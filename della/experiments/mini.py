"""`della paper --scale mini`: the paper's tables and figures with the trio that della brings, on a CPU.

p, lambda and epsilon are chosen for each method and merge on validation; what was chosen is merged with
several seeds and scored on test.  Every score is kept in OUT/scores.jsonl, so that the same command resumes
where it was cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments.bench import Bench
from della.experiments.cells import Cell
from della.experiments.mini_report import report
from della.experiments.mini_rows import TABLES, Chooser, lay_out
from della.experiments.mini_trio import CALIBRATION, MADE_OF, STORED, Programs, Trio
from della.experiments.results import head, write
from della.experiments.rows import SINGLES, Found, numbers
from della.experiments.tables import Grid
from della.options import default_threads
from della.report import plots
from della.version import __version__


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
    settings = {"della": __version__, "trio": trio.digest, "scorer": programs.kind}
    with Store(options.out / "scores.jsonl", settings, of="scores") as store:
        trio.collect_norms()
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
    pairs = [(Cell((name,)), split) for split in STORED for name in SINGLES]
    bench.each("base and experts", lambda pair: bench.score(*pair), pairs)
    names = [table for table in TABLES if table != "5" or options.importance == "wanda"]
    chooser = Chooser(bench, options.grid, options.seed)
    experiment = lay_out(chooser, names, options.seeds, options.sweep)
    bench.each("test", lambda cell: bench.score(cell, "test"), experiment.cells())
    return numbers(bench, experiment)
