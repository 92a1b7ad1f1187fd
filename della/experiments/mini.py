"""`della paper --scale mini`: the paper's tables and figures with the trio that della brings, on a CPU.

p, lambda and epsilon are chosen for each method and merge on validation; what was chosen is merged with
several seeds and scored on test.  Every score is kept in OUT/scores.jsonl, so that the same command resumes
where it was cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments.bench import Bench
from della.experiments.cells import Cell
from della.experiments.mini_report import report
from della.experiments.mini_rows import TABLES, Chooser, lay_out
from della.experiments.mini_trio import CALIBRATION, MADE_OF, STORED, Programs, Trio
from della.experiments.options import ExperimentOptions
from della.experiments.results import head, write
from della.experiments.rows import SINGLES, Found, numbers
from della.experiments.tables import MINI, Scale
from della.options import default_threads
from della.report import plots
from della.version import __version__


def run_mini(
    options: ExperimentOptions, command: str, tell: Callable[[str], None], scale: Scale = MINI
) -> Found:
    """Run the experiment, or what is missing of it, and write its report (`results.write`); its results.json.

    command: what makes the results again.  Threads work at the same time; scores do not depend on them.
    Raises EvaluationError, also where the extra paper is missing.
    """
    began = time.monotonic()
    out, scale, threads = options.place, options.of(scale), options.threads or default_threads()
    if min(scale.seeds, scale.items, scale.validation, scale.final) < 1:
        raise EvaluationError("seeds and items must be 1 or more")
    plots.check()
    programs = Programs.open()
    if programs.why:
        tell(f"note: {programs.why}; Code answers are read as arithmetic instead, and nothing is executed")
    items = {"validation": scale.validation, "final": scale.final, "test": scale.items}
    trio = Trio(items, programs)
    settings = {"della": __version__, "trio": trio.digest, "scorer": programs.kind}
    with Store(out / "scores.jsonl", settings, of="scores") as store:
        trio.collect_norms()
        before = len(store.records)
        if before:
            tell(f"{before} scores of an earlier run are used")
        with Bench(trio, store, tell, threads, trio.tokens, MADE_OF) as bench:
            found = _run(bench, scale, options.importance)
        scored = len(store.records)
    results = head("mini", command, scale.seed, 0.0, "tokenizers", "vl-convert-python")
    grid = {name: list(values) for name, values in asdict(scale.grid).items()}
    results |= {
        "seeds": scale.seeds, "sweep_seeds": scale.sweep, "importance": options.importance,
        "items": items,
        "calibration_items": CALIBRATION, "grid": grid, "trio": trio.digest,
        "code": {"scored_by": programs.kind, "why": programs.why}, **found,
    }  # fmt: skip
    results["time"] = {
        "seconds": round(time.monotonic() - began, 1), "threads": threads, "sandbox": programs.name,
        "models_scored": scored, "scores_of_earlier_runs": before, "programs_asked": programs.asked,
        "programs_run": programs.run,
    }  # fmt: skip
    write(out, results, report(results))
    return results


def _run(bench: Bench, scale: Scale, importance: str) -> Found:
    """Choose and score; base and experts come first, as all kept gains need them."""
    pairs = [(Cell((name,)), split) for split in STORED for name in SINGLES]
    bench.each("base and experts", lambda pair: bench.score(*pair), pairs)
    names = [table for table in TABLES if table != "5" or importance == "wanda"]
    chooser = Chooser(bench, scale.grid, scale.seed)
    experiment = lay_out(chooser, names, scale.seeds, scale.sweep)
    bench.each("test", lambda cell: bench.score(cell, "test"), experiment.cells())
    return numbers(bench, experiment)
