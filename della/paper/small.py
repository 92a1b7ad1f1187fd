"""`della paper --scale 135m`: a real small model, three experts, every method, scored by loss per token.

Three LoRA experts of SmolLM2-135M-Instruct (or any small Llama) are trained or taken over, merged by
`della.merge`, and scored on held-out responses.  First TA, DARE and DELLA run at lambda 1 and equal p; then
lambda and p are chosen for every method on validation, and the choice is scored on test.  Every score is kept
in OUT/scores.jsonl, so a run that was cut short is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from della.errors import EvaluationError
from della.paper.small_grid import METHODS, Cell, climb, lambdas
from della.paper.small_items import TASKS, Example, check_data, data_file, examples
from della.paper.small_model import set_threads, tokenizer_of
from della.paper.small_report import Report, write_report
from della.paper.small_scores import Scores
from della.paper.small_train import train_experts

Tell = Callable[[str], None]
EQUAL = ("ta", "dare", "della", "della-wide")  # compared at equal p, at lambda 1
LONGEST = 192  # tokens of prompt and response together, which bounds the time


@dataclass(frozen=True, slots=True)
class SmallOptions:
    """What the command is told.

    data: a folder of TASK.SPLIT.jsonl (tasks lm, math, code; splits train, validation, test).  model: where
    the base comes from (`small_model.base_folder`), if the experts are to be trained.  experts: the folder of
    base, lm, math and code; by default OUT/experts, where they are made.  items and validation_items: a task.
    """

    data: Path
    out: Path
    model: str | None = None
    experts: Path | None = None
    seeds: int = 5
    items: int = 200
    validation_items: int = 40
    threads: int = 1


def run_small(options: SmallOptions, tell: Tell) -> Path:
    """Run the whole experiment, or what of it is missing; returns OUT/results.json, beside OUT/tables.md.

    Raises EvaluationError where data, models or the extra train are missing.
    """
    if options.seeds < 1 or options.items < 2 or options.validation_items < 2:
        raise EvaluationError("seeds must be 1 or more, and items 2 or more a task")
    set_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    experts = options.experts or options.out / "experts"
    if options.model is not None:
        train_experts(options.model, options.data, experts, tell)
    missing = [name for name in ("base", *TASKS) if not (experts / name / "model.safetensors").is_file()]
    if missing:
        raise EvaluationError(
            f"{experts}: no {', '.join(missing)}; give --model, so that they are trained, or --experts"
        )
    check_data(options.data, ("validation", "test"))
    items = _items(options, experts)
    scores = Scores(options.out, experts, items, options.threads, tell)
    report = Report(items, options.seeds, options.threads)
    for split in ("test", "validation"):
        for name in ("base", *TASKS):
            report.singles[name, split] = scores.expert(name, split)
    for cell in _equal(options.seeds):
        report.equal[cell] = scores.cell(cell, "test")
    chosen = _choose(scores, report)
    for seed in range(options.seeds):
        for cell in chosen:
            row = METHODS[cell.method]
            if row.random or seed == 0:
                one = Cell(cell.method, cell.p, cell.lambda_, seed)
                report.tuned[one] = scores.cell(one, "test")
    return write_report(report, options.out, scores.seconds)


def _items(options: SmallOptions, experts: Path) -> dict[str, dict[str, list[Example]]]:
    """The held-out items by split and task."""
    tokenizer = tokenizer_of(experts / "base")
    counts = {"validation": options.validation_items, "test": options.items}
    return {
        split: {
            task: examples(tokenizer, data_file(options.data, task, split), LONGEST, most) for task in TASKS
        }
        for split, most in counts.items()
    }


def _equal(seeds: int) -> list[Cell]:
    """The merges at lambda 1; all of one seed before the next, so that a run cut short has whole seeds."""
    cells = []
    for seed in range(seeds):
        for name in EQUAL:
            row = METHODS[name]
            if row.random or seed == 0:
                cells += [Cell(name, p, 1.0, seed) for p in row.drops]
    return cells


def _choose(scores: Scores, report: Report) -> list[Cell]:
    """Each method's best p and lambda on validation, by kept gain, with one seed."""
    chosen = []
    for name, row in METHODS.items():

        def kept(p: float, lambda_: float, name: str = name) -> float:
            cell = Cell(name, p, lambda_)
            report.validation[cell] = report.kept(scores.cell(cell, "validation"), "validation")
            return report.validation[cell]

        best = []
        for p in row.drops:
            found = climb(lambda lambda_, p=p: kept(p, lambda_), lambdas(name, p))  # type: ignore[misc]
            best.append(Cell(name, p, found))
        chosen.append(max(best, key=lambda cell: report.validation[cell]))
    return chosen
