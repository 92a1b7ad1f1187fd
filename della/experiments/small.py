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
from pathlib import Path

import xxhash

from della.api import merge
from della.errors import EvaluationError, Problem
from della.evaluate.generations import Store
from della.experiments.bench import Bench, Scored, Tell
from della.experiments.cells import Cell, Kind, as_text
from della.experiments.choice import Choice, ordered, tried
from della.experiments.demo import EXPERTS as TASKS
from della.experiments.options import ExperimentOptions, pairs
from della.experiments.results import head, write
from della.experiments.rows import SINGLES, Experiment, Found, Row, entry, numbers
from della.experiments.small_data import SPLITS, Example, check_data, data_file, examples
from della.experiments.small_model import item_losses, set_threads, tokenizer_of
from della.experiments.small_report import report
from della.experiments.small_train import train_experts
from della.experiments.tables import REAL, SMALL, SMALL_START, SMALL_VARIANTS, STEPS, Scale
from della.output import disk

LONGEST = 192  # tokens of prompt and response together, which bounds the time
BATCH = 16
# "exact" has the first test items again, in float32 throughout, "few" the same items in bfloat16.
EXACT_ITEMS = 100
MADE_OF = {"few": (("test", EXACT_ITEMS),)}
WIDE = SMALL["della-wide"].label


def run_small(options: ExperimentOptions, tell: Tell, scale: Scale = REAL) -> Path:
    """Run the whole experiment, or what of it is missing; returns OUT/results.json, which has tables and
    plots beside it (`della.experiments.results`).

    Raises EvaluationError where data, models or the extras train and paper are missing.
    """
    models, out, scale = pairs("--models", options.models, "ROLE=MODEL"), options.place, options.of(scale)
    if len(options.data) != 1:
        said = "--scale 135m needs --data FOLDER, a folder of TASK.SPLIT.jsonl (docs/paper.md)"
        raise EvaluationError(Problem(said, parameter="data"))
    if models.keys() - {"base"}:
        said = "--models of --scale 135m: expected base=FOLDER_OR_ID"
        raise EvaluationError(Problem(said, "experts: --experts FOLDER", parameter="models"))
    if scale.seeds < 1 or scale.items < 2 or scale.validation < 2:
        raise EvaluationError("seeds must be 1 or more, and items 2 or more a task")
    data, experts = Path(options.data[0]), options.experts or out / "experts"
    check_data(data, SPLITS if models else ("validation", "test"))
    set_threads(options.threads or 1)
    out.mkdir(parents=True, exist_ok=True)
    if models:
        train_experts(models["base"], data, experts, tell)
    missing = [name for name in SINGLES if not (experts / name / "model.safetensors").is_file()]
    if missing:
        fix = "give --models base=MODEL, so that they are trained, or --experts with a folder of"
        fix += f" {', '.join(SINGLES[:-1])} and {SINGLES[-1]}"
        raise EvaluationError(Problem(f"no {', '.join(missing)}", fix, subject=str(experts)))
    scorer = Merged(out, experts, _items(data, experts, scale), options.threads or 1, tell)
    with (
        Store(out / "scores.jsonl", {"scale": "135m"}, of="scores") as store,
        Bench(scorer, store, tell, tokens=scorer.tokens, made_of=MADE_OF) as bench,
    ):
        made, precision = _run(bench, scale)
        told = {
            "models": models and f"base={Path(models['base']).name}", "data": data.name,
            "experts": options.experts and experts.name, "out": out.name, "seeds": scale.seeds,
            "limit": scale.items,
        }  # fmt: skip
        # What makes the results again; folders by their names alone.
        command = " ".join(["della paper --scale 135m", *(f"--{k} {v}" for k, v in told.items() if v)])
        found = head("135m", command, scale.seed, bench.seconds, "torch", "transformers", "peft")
        found |= {"seeds": scale.seeds, **_made_of(experts, scorer, found["time"])}
        found |= numbers(bench, made, digits=8, by_task=True) | {"precision": precision}
    write(out, found, report(found))
    return out / "results.json"


def _items(data: Path, experts: Path, scale: Scale) -> dict[str, dict[str, list[Example]]]:
    """The held-out items by split and task."""
    tokenizer = tokenizer_of(experts / "base")
    items = {
        split: {task: examples(tokenizer, data_file(data, task, split), LONGEST, most) for task in TASKS}
        for split, most in (("validation", scale.validation), ("test", scale.items))
    }
    return {**items, "exact": {task: found[:EXACT_ITEMS] for task, found in items["test"].items()}}


def _made_of(experts: Path, scorer: Merged, time: Found) -> Found:
    """What the experts and the items are; how long the training took goes to ``time``."""
    record = experts / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    time |= {f"training_{task}": training[task].pop("seconds") for task in TASKS if task in training}
    return {
        "training": training,
        "items": {
            split: {
                task: {"items": len(found), "response_tokens": sum(one.answered for one in found)}
                for task, found in tasks.items()
            }
            for split, tasks in scorer.items.items()
        },
    }


class Merged:
    """Merges cells one by one, scores and deletes them; their recipes stay in OUT/recipes."""

    def __init__(
        self, out: Path, experts: Path, items: Mapping[str, Mapping[str, Sequence[Example]]], threads: int,
        tell: Tell,
    ) -> None:  # fmt: skip
        self.items, self._experts, self._tell = items, experts, tell
        self._out, self._threads = out, threads
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


def _run(bench: Bench, scale: Scale) -> tuple[Experiment, list[Found]]:
    """Rows at lambda 1 ("equal", by p) and each at its own choice ("tuned"), and their scores in float32."""
    seeds, drops = scale.seeds, scale.grid.drops
    made, singles = Experiment(), [Cell((name,)) for name in SINGLES]
    _score(bench, singles, "test", "validation")
    equal = [
        Row("equal", "" if p is None else f"p={p:g}", SMALL[name].label, (SMALL[name].cell(TASKS, p),), seeds)
        for name in STEPS for p in SMALL[name].places(drops)
    ]  # fmt: skip
    _score(bench, _by_seed(equal), "test")
    tuned: list[Row] = []
    for kinds in (SMALL, SMALL_VARIANTS):
        chosen = []
        for kind in kinds.values():
            choices = _tried(bench, kind, drops, scale.grid.lambdas)
            made.chosen += [
                {"table": "tuned", "group": "", "label": kind.label, "of": "tried", **choice.cell.stated(),
                 "kept": round(100 * choice.kept, 6)}
                for choice in choices
            ]  # fmt: skip
            chosen.append(Row("tuned", "", kind.label, (ordered(choices)[0].cell,), seeds))
        _score(bench, _by_seed(chosen), "test")
        tuned += chosen
        drops = tuple(row.cell.p for row in chosen if row.label == WIDE and row.cell.p is not None) or drops
    made.rows = [*equal, *tuned]
    _claims(made, scale.grid.drops)
    _score(bench, singles, "exact")
    once = {row.cell: row for row in made.rows}
    _score(bench, once, "exact")
    return made, [
        entry(row) | {of: round(100 * bench.kept(cell, split), 6)
                      for of, split in (("bfloat16", "few"), ("float32", "exact"))}
        for cell, row in once.items()
    ]  # fmt: skip


def _tried(bench: Bench, kind: Kind, drops: tuple[float, ...], lambdas: tuple[float, ...]) -> list[Choice]:
    """What is tried of a method on validation, with one seed."""
    found = []
    for p in kind.places(drops):
        ladder = [round(x, 3) for x in kind.ladder(lambdas, p, len(TASKS))]
        found += tried(kind, TASKS, p, ladder, SMALL_START, lambda cell: bench.kept(cell, "validation"))
    return found


def _claims(made: Experiment, drops: tuple[float, ...]) -> None:
    """The first look's order, step by step, at lambda 1 and equal p, and each method at its own choice; and
    each against TA and against DELLA with a wide range.
    """
    plain = next(row for row in made.rows if row.table == "equal" and not row.group)
    for p in drops:
        rows = [row for row in made.rows if row.table == "equal" and row.group == f"p={p:g}"]
        for row in rows:
            made.claim("equal", row.group, row, plain)
        for worse, better in itertools.pairwise(rows):
            made.claim("equal", better.group, better, worse)
    tuned = {row.label: row for row in made.rows if row.table == "tuned"}
    steps = itertools.pairwise(SMALL[name].label for name in STEPS)
    against = [(label, worse) for label in tuned for worse in (SMALL["ta"].label, WIDE)]
    for high, low in dict.fromkeys([*against, *((high, low) for low, high in steps)]):
        if high != low:
            made.claim("tuned", "", tuned[high], tuned[low])


def _by_seed(rows: Sequence[Row]) -> list[Cell]:
    """All cells of one seed before the next, so that a run cut short has whole seeds."""
    by_seed = itertools.zip_longest(*(row.cells for row in rows))
    return [cell for cells in by_seed for cell in cells if cell is not None]


def _score(bench: Bench, cells: Iterable[Cell], *splits: str) -> None:
    for split in splits:
        for cell in cells:
            bench.score(cell, split)
