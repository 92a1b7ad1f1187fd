"""`della paper --scale 135m`: a real small model, three experts, every method, scored by loss per token.

Three LoRA experts of SmolLM2-135M-Instruct (or any small Llama) are trained or taken over, merged by
`della.merge`, and scored on held-out responses.  First TA, DARE and DELLA run at lambda 1 and equal p; then
lambda and p are chosen for every method on validation, and the choice is scored on test.  All this is in
bfloat16; the merges of the first seed are then scored in float32 too, on fewer items.  Every score is kept in
OUT/scores.jsonl, so a run that was cut short is resumed.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from della.api import merge
from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments import tables
from della.experiments.bench import Bench, Scored, Tell
from della.experiments.cells import Cell, Kind, as_text
from della.experiments.choice import Choice, ordered, tried
from della.experiments.demo import EXPERTS as TASKS
from della.experiments.measures import Measured, difference, measure
from della.experiments.results import as_json, head, write
from della.experiments.small_data import SPLITS, Example, check_data, data_file, examples
from della.experiments.small_model import item_losses, set_threads, tokenizer_of
from della.experiments.small_report import report
from della.experiments.small_train import train_experts
from della.experiments.tables import SMALL, SMALL_VARIANTS, STEPS, TITLES
from della.output import disk
from della.report.intervals import Interval, paired_bootstrap

Found = dict[str, Any]
LONGEST = 192  # tokens of prompt and response together, which bounds the time
BATCH = 16
# "exact" has the first test items again, in float32 throughout, "few" the same items in bfloat16.
EXACT_ITEMS = 100
MADE_OF = {"few": (("test", EXACT_ITEMS),)}
SINGLES = ("base", *TASKS)
VERDICTS = {1: "better", 0: "within noise", -1: "worse"}


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
    plots beside it (`della.experiments.results`).

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
    missing = [name for name in SINGLES if not (experts / name / "model.safetensors").is_file()]
    if missing:
        raise EvaluationError(
            f"{experts}: no {', '.join(missing)}; give --models base=MODEL, so that they are trained, "
            "or --experts with a folder of base, lm, math and code"
        )
    scorer = Merged(options, experts, _items(options, experts), tell)
    with (
        Store(options.out / "scores.jsonl", {"scale": "135m"}, of="scores") as store,
        Bench(scorer, store, tell, tokens=scorer.tokens, made_of=MADE_OF) as bench,
    ):
        made = _run(bench, options.seeds)
        found = _results(bench, made, scorer, options)
    write(options.out, found, report(found))
    return options.out / "results.json"


def _items(options: SmallOptions, experts: Path) -> dict[str, dict[str, list[Example]]]:
    """The held-out items by split and task."""
    tokenizer = tokenizer_of(experts / "base")
    counts = {"validation": options.validation_items, "test": options.items}
    items = {
        split: {
            task: examples(tokenizer, data_file(options.data, task, split), LONGEST, most) for task in TASKS
        }
        for split, most in counts.items()
    }
    return {**items, "exact": {task: found[:EXACT_ITEMS] for task, found in items["test"].items()}}


class Merged:
    """Merges cells one by one, scores and deletes them; their recipes stay in OUT/recipes."""

    def __init__(
        self, options: SmallOptions, experts: Path, items: Mapping[str, Mapping[str, Sequence[Example]]],
        tell: Tell,
    ) -> None:  # fmt: skip
        self.items, self._experts, self._tell = items, experts, tell
        self._out, self._threads = options.out, options.threads
        self.tokens = {
            (split, task): [one.answered for one in found]
            for split, tasks in {**items, "few": items["exact"]}.items()
            for task, found in tasks.items()
        }
        self._of = self._fingerprint()

    def _fingerprint(self) -> str:
        """What scores depend on beside the cell: items, and models by size and time of change."""
        digest = xxhash.xxh3_128()
        for split, tasks in sorted(self.items.items()):
            for task, found in sorted(tasks.items()):
                digest.update(json.dumps([split, task, [(one.ids, one.asked) for one in found]]).encode())
        for name in SINGLES:
            stat = (self._experts / name / "model.safetensors").stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def key(self, cell: Cell, split: str) -> str:
        """What the scores of a cell are kept under: those of other items or experts are passed over."""
        return f"{split} {cell.name} {self._of}"

    def score(self, cell: Cell, split: str) -> Scored:
        """Losses in nats by item; a merge is made for it."""
        merged, items = self._out / "merged", self.items[split]
        try:
            folder = self._merge(cell, merged) if cell.method else self._experts / cell.experts[0]
            every = [one for task in TASKS for one in items[task]]
            flat = iter(item_losses(folder, every, "float32" if split == "exact" else "bfloat16", BATCH))
        finally:
            shutil.rmtree(merged, ignore_errors=True)
        losses = {task: [next(flat) for _ in items[task]] for task in TASKS}
        means = (f"{t} {sum(losses[t]) / sum(self.tokens[split, t]):.4f}" for t in TASKS)
        self._tell(f"{split}: {cell.name}: {', '.join(means)}")
        return {task: {"loss": values} for task, values in losses.items()}

    def _merge(self, cell: Cell, out: Path) -> Path:
        disk.put(self._out / "recipes" / f"{cell.name}.yml", as_text(recipe(cell)).encode())
        shutil.rmtree(out, ignore_errors=True)
        here = recipe(cell, {name: str((self._experts / name).absolute()) for name in SINGLES})
        merge(here, out, threads=self._threads, fsync=False)
        return out


def recipe(cell: Cell, places: Mapping[str, str] | None = None) -> Found:
    """The recipe of a cell; models are folders beside it, if ``places`` does not say otherwise."""
    found = places or {name: name for name in SINGLES}
    return cell.recipe(found["base"], found, out_dtype="float32")


# ---- what is run ------------------------------------------------------------------------------------------

Runs = dict[tuple[str, float | None], list[Cell]]  # by method and p, a cell with each seed


@dataclass(slots=True)
class Findings:
    """What was tried on validation, and what is scored on test: at lambda 1, and each at its own choice."""

    validation: list[tuple[str, Choice]] = field(default_factory=list)
    equal: Runs = field(default_factory=dict)
    tuned: Runs = field(default_factory=dict)


def _run(bench: Bench, seeds: int) -> Findings:
    made = Findings()
    _score(bench, [Cell((name,)) for name in SINGLES], "test", "validation")
    for name in STEPS:
        kind = SMALL[name]
        made.equal |= {(name, p): kind.cell(TASKS, p).seeded(seeds) for p in kind.places(tables.SMALL_DROPS)}
    _score(bench, _by_seed(made.equal), "test")
    drops: tuple[float, ...] = tables.SMALL_DROPS
    for kinds in (SMALL, SMALL_VARIANTS):
        chosen: Runs = {}
        for name, kind in kinds.items():
            choices = _tried(bench, kind, drops)
            made.validation += [(name, choice) for choice in choices]
            best = ordered(choices)[0].cell
            chosen[name, best.p] = best.seeded(seeds)
        _score(bench, _by_seed(chosen), "test")
        made.tuned |= chosen
        drops = tuple(p for name, p in chosen if name == "della-wide" and p is not None) or drops
    _score(bench, [Cell((name,)) for name in SINGLES], "exact")
    _score(bench, [cells[0] for runs in (made.equal, made.tuned) for cells in runs.values()], "exact")
    return made


def _tried(bench: Bench, kind: Kind, drops: tuple[float, ...]) -> list[Choice]:
    """What is tried of a method on validation, with one seed."""
    found = []
    for p in kind.places(drops):
        ladder = [round(x, 3) for x in kind.ladder(tables.SMALL_LAMBDAS, p, len(TASKS))]
        found += tried(
            kind, TASKS, p, ladder, tables.SMALL_START, lambda cell: bench.kept(cell, "validation")
        )
    return found


def _by_seed(runs: Runs) -> list[Cell]:
    """All cells of one seed before the next, so that a run cut short has whole seeds."""
    return [cell for row in itertools.zip_longest(*runs.values()) for cell in row if cell is not None]


def _score(bench: Bench, cells: Iterable[Cell], *splits: str) -> None:
    for split in splits:
        for cell in cells:
            bench.score(cell, split)


# ---- results.json -----------------------------------------------------------------------------------------


def _results(bench: Bench, made: Findings, scorer: Merged, options: SmallOptions) -> Found:
    record = (options.experts or options.out / "experts") / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found = head("135m", _command(options), 0, bench.seconds, "torch", "transformers", "peft")
    found["time"] |= {f"training_{task}": training[task]["seconds"] for task in TASKS if task in training}
    return found | {
        "seeds": options.seeds,
        "training": {
            task: {key: value for key, value in row.items() if key != "seconds"}
            for task, row in training.items()
        },
        "items": {
            split: {
                task: {"items": len(found), "response_tokens": sum(one.answered for one in found)}
                for task, found in tasks.items()
            }
            for split, tasks in scorer.items.items()
        },
        **numbers(bench, made),
    }


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


def numbers(bench: Bench, made: Findings) -> Found:
    """Rows, differences and claims."""
    ta, wide = (_of(made.tuned, name) for name in ("ta", "della-wide"))
    plain = made.equal["ta", None]
    once = {cells[0]: name for runs in (made.equal, made.tuned) for (name, _), cells in runs.items()}
    return {
        "singles": {
            name: {task: bench.loss([Cell((name,))], "test", task) for task in TASKS} for name in SINGLES
        },
        "validation": [_entry(name, choice.cell) | {"kept": choice.kept} for name, choice in made.validation],
        "tuned": [_row(bench, name, cells)
                  | {"less_ta": _less(bench, cells, ta), "less_della_wide": _less(bench, cells, wide)}
                  for (name, _), cells in made.tuned.items()],
        "equal": [_row(bench, name, cells) | {"less_ta": _less(bench, cells, plain)}
                  for (name, _), cells in made.equal.items()],
        "claims": _claims(bench, made),
        "precision": [_entry(name, cell) | {"bfloat16": bench.kept(cell, "few"),
                                            "float32": bench.kept(cell, "exact")}
                      for cell, name in once.items()],
    }  # fmt: skip


def _claims(bench: Bench, made: Findings) -> list[Found]:
    """The first look's order, step by step: at lambda 1 and equal p, and each method at its own choice."""
    settings: list[tuple[str, float | None, Runs]] = [
        ("equal", p, {of: cells for of, cells in made.equal.items() if of[1] in (p, None)})
        for p in tables.SMALL_DROPS
    ]
    return [
        {"setting": setting, "p": p, "better": high, "than": low}
        | _less(bench, _of(runs, high), _of(runs, low))
        for setting, p, runs in (*settings, ("tuned", None, made.tuned))
        for low, high in itertools.pairwise(STEPS)
    ]


def _of(runs: Runs, method: str) -> list[Cell]:
    return next(cells for (name, _), cells in runs.items() if name == method)


def _entry(name: str, cell: Cell) -> Found:
    return {"method": name, "title": TITLES[name], "p": cell.p, "lambda": cell.lambda_}


def _measured(bench: Bench, cells: Sequence[Cell]) -> Measured:
    return measure(bench, cells, "test", TASKS)


def _row(bench: Bench, name: str, cells: Sequence[Cell]) -> Found:
    """Losses, and the kept gain with its interval over items, and over seeds."""
    own = _measured(bench, cells)
    return _entry(name, cells[0]) | {
        "loss": {task: bench.loss(cells, "test", task) for task in TASKS},
        "kept": as_json(own.over_items),
        "kept_by_seed": list(own.seeds),
        "kept_over_seeds": as_json(own.over_seeds),
    }


def _less(bench: Bench, a: Sequence[Cell], b: Sequence[Cell]) -> Found:
    """Kept gain of a less that of b: over items and over seeds; and the difference of losses by task."""
    less = difference(_measured(bench, a), _measured(bench, b))
    by_task = {}
    for task in TASKS:
        one, other = (
            np.mean([bench.values(bench.score(cell, "test"), "test", task)[0] for cell in cells], axis=0)
            for cells in (a, b)
        )
        by_task[task] = as_json(paired_bootstrap(-one, -other, weights=bench.tokens["test", task]))
    value = less.items.value
    return {
        "items": as_json(less.items), "seeds": as_json(less.seeds or Interval(value, value, value)),
        "loss": by_task, "verdict": VERDICTS[less.side],
    }  # fmt: skip
