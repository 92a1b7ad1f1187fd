"""`della paper --scale 135m`: a real small model, three experts, every method, scored by loss per token.

Three LoRA experts of SmolLM2-135M-Instruct (or any small Llama) are trained or taken over, merged by
`della.merge`, and scored on held-out responses.  First TA, DARE and DELLA run at lambda 1 and equal p; then
lambda and p are chosen for every method on validation, and the choice is scored on test.  All this is in
bfloat16; the merges of the first seed are then scored in float32 too, on fewer items.  Every score is kept in
OUT/scores.jsonl, so a run that was cut short is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from della.errors import EvaluationError
from della.experiments.paper.climbing import climb
from della.experiments.paper.results import write
from della.experiments.paper.small_grid import METHODS, START, Cell, lambdas
from della.experiments.paper.small_items import SPLITS, TASKS, Example, check_data, data_file, examples
from della.experiments.paper.small_model import set_threads, tokenizer_of
from della.experiments.paper.small_page import report
from della.experiments.paper.small_report import Findings, results
from della.experiments.paper.small_scores import EXACT, Scores
from della.experiments.paper.small_train import train_experts

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
    """Run the whole experiment, or what of it is missing; returns OUT/results.json, which has tables and
    plots beside it (`della.experiments.paper.results`).

    Raises EvaluationError where data, models or the extras train and paper are missing.
    """
    if options.seeds < 1 or options.items < 2 or options.validation_items < 2:
        raise EvaluationError("seeds must be 1 or more, and items 2 or more a task")
    check_data(options.data, ("validation", "test") if options.model is None else SPLITS)
    set_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    experts = options.experts or options.out / "experts"
    if options.model is not None:
        train_experts(options.model, options.data, experts, tell)
    missing = [name for name in ("base", *TASKS) if not (experts / name / "model.safetensors").is_file()]
    if missing:
        raise EvaluationError(
            f"{experts}: no {', '.join(missing)}; give --models base=MODEL, so that they are trained, "
            "or --experts with a folder of base, lm, math and code"
        )
    items = _items(options, experts)
    scores = Scores(options.out, experts, items, options.threads, tell)
    findings = Findings(items, options.seeds)
    for split in ("test", "validation"):
        for name in ("base", *TASKS):
            findings.singles[name, split] = scores.expert(name, split)
    for cell in _equal(options.seeds):
        findings.equal[cell] = scores.cell(cell, "test")
    chosen: dict[str, Cell] = {}
    for variant in (False, True):
        names = [name for name, row in METHODS.items() if row.variant == variant]
        for name in names:
            chosen[name] = _choose(name, scores, findings, chosen.get("della-wide"))
        for cell in _by_seed([chosen[name] for name in names], options.seeds):
            findings.tuned[cell] = scores.cell(cell, "test")
    findings.items = scores.items
    for name in ("base", *TASKS):
        findings.singles[name, EXACT] = scores.expert(name, EXACT)
    for cell in [*findings.equal, *findings.tuned]:
        if cell.seed == 0:
            findings.exact[cell] = scores.cell(cell, EXACT)
    record = experts / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found = results(findings, _command(options), training, scores.seconds)
    write(options.out, found, report(found))
    return options.out / "results.json"


def _command(options: SmallOptions) -> str:
    """What makes the results again; folders by their names alone."""
    told: dict[str, object] = {
        "models": options.model and f"base={Path(options.model).name}",
        "data": options.data.name,
        "experts": options.experts and options.experts.name,
        "out": options.out.name,
        "seeds": options.seeds,
        "limit": options.items,
    }
    return " ".join(["della paper --scale 135m", *(f"--{k} {v}" for k, v in told.items() if v is not None)])


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
    """The merges at lambda 1."""
    return _by_seed([Cell(name, p, 1.0) for name in EQUAL for p in METHODS[name].drops], seeds)


def _by_seed(cells: list[Cell], seeds: int) -> list[Cell]:
    """The cells with every seed; all of one before the next, so that a run cut short has whole seeds."""
    return [
        replace(cell, seed=seed)
        for seed in range(seeds)
        for cell in cells
        if METHODS[cell.method].random or seed == 0
    ]


def _choose(name: str, scores: Scores, findings: Findings, wide: Cell | None) -> Cell:
    """A method's best p and lambda on validation, by kept gain, with one seed; a variant has the p of DELLA
    ``wide``.
    """

    def kept(p: float, lambda_: float) -> float:
        cell = Cell(name, p, lambda_)
        findings.validation[cell] = findings.kept(scores.cell(cell, "validation"), "validation")
        return findings.validation[cell]

    row = METHODS[name]
    drops = (wide.p,) if row.variant and wide else row.drops
    best = [Cell(name, p, climb(partial(kept, p), lambdas(name, p), START)) for p in drops]
    return max(best, key=lambda cell: findings.validation[cell])
