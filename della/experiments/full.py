"""The paper's experiment with its own models: every merge of the tables, scored, beside the paper's numbers.

One merge at a time: recipe, merge, answers; then the merge is deleted, and its answers are scored.  What is
finished is kept under ``out`` and used by the next run:

    inputs/ copies of models that cannot be merged as they are     data/ the problems of both splits
    norms/ input norms for WANDA                                   recipes/ every recipe that was merged
    merges/ the merge at hand                                      answers/SPLIT/CELL/ answers and verdicts
    scores.jsonl                                                   results.json, tables.md, index.html
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from della.errors import EvaluationError, Problem
from della.evaluate.backends import Model
from della.evaluate.evaluation import Progress, Result, evaluate
from della.evaluate.generations import Store
from della.evaluate.options import EvaluationOptions
from della.evaluate.problems import load
from della.evaluate.scoring import Score
from della.experiments import full_data
from della.experiments.bench import Bench, Scored
from della.experiments.cells import Cell, as_text
from della.experiments.choice import Choice, ordered
from della.experiments.full_models import BASE_OF, prepare, references
from della.experiments.full_plan import Rates, plan_json
from della.experiments.full_report import numbers, report, reported
from della.experiments.full_rows import rows_of, tasks_of
from della.experiments.options import ExperimentOptions, pairs, stated
from della.experiments.results import head, write
from della.experiments.rows import Row
from della.options import build, default_threads
from della.output import disk

# What of the options is of `EvaluationOptions`, under the same names.
SCORING = (
    "limit", "backend", "prompt", "max_tokens", "batch", "dtype", "vllm_command", "judge", "annotator",
    "alpaca_command", "judge_url", "judge_key_env",
)  # fmt: skip


def scoring_of(options: ExperimentOptions) -> EvaluationOptions:
    """How answers are made and judged; tasks, folder and data are those of each cell."""
    asked = {name: getattr(options, name) for name in SCORING}
    asked |= {"tasks": "", "out": options.place, "vllm_arguments": options.vllm_args}
    return build(EvaluationOptions, asked)


def plan_full(options: ExperimentOptions) -> dict[str, Any]:
    """What `run_full` would take, as JSON; nothing is downloaded or written.  Raises EvaluationError."""
    scoring, wanted = scoring_of(options), rows_of(options)
    given = stated(tokens_per_second=options.tokens_per_second, judge_price=options.judge_price or None)
    rates = Rates(threads=options.threads or default_threads(), **given)
    return plan_json(wanted, _references(options, wanted), scoring.limit, rates)


def run_full(
    options: ExperimentOptions, command: str, tell: Callable[[str], None],
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the experiment, or resume it, and write its report (`results.write`); returns its results.json.

    command: what makes the results again.  tell: takes what is going on, a line at a time.  progress: takes
    how far a model's answers are.  Raises DellaError; the same call then resumes.
    """
    began, wanted = time.monotonic(), rows_of(options)
    run = _Run(options, wanted, tell, progress)
    found = []
    with (
        Store(options.place / "scores.jsonl", {"scale": "13b"}, of="scores") as store,
        Bench(run, store, tell) as bench,
    ):
        for number, row in enumerate(wanted, 1):
            chosen = replace(row, candidates=(_chosen(bench, row),))
            tell(f"[{number}/{len(wanted)}] table {row.table}, {row.group}, {row.label}: {chosen.cell.name}")
            scores = [reported(bench.score(cell, "test")) for cell in chosen.cells]
            found.append((chosen, scores))
    seed, seconds = run.scoring.seed, time.monotonic() - began
    results = head("13b", command, seed, seconds) | numbers(found, seed)
    write(options.place, results, report(results))
    return results


def _references(options: ExperimentOptions, wanted: Sequence[Row]) -> dict[str, str]:
    return references(pairs("--models", options.models, "ROLE=MODEL"), options.models_dir, _roles(wanted))


def _roles(wanted: Sequence[Row]) -> list[str]:
    experts = [row.cell.experts for row in wanted]
    return list(dict.fromkeys(role for found in experts for role in (BASE_OF[found[0]], *found)))


def _chosen(bench: Bench, row: Row) -> Cell:
    """The candidate with the highest mean score on validation."""
    if len(row.candidates) == 1:
        return row.cell
    return ordered(Choice(cell, _mean(bench, cell)) for cell in row.candidates)[0].cell


def _mean(bench: Bench, cell: Cell) -> float:
    values = [score.interval.value for score in reported(bench.score(cell, "validation")).values()]
    if not values:
        said = f"nothing to choose by: {', '.join(tasks_of(cell))} has no score without a judge"
        raise EvaluationError(Problem(said, "give --annotator", parameter="annotator"))
    return sum(values) / len(values)


class _Run:
    """One call of `run_full`: everything is looked at before the first merge."""

    def __init__(
        self, options: ExperimentOptions, wanted: Sequence[Row], tell: Callable[[str], None],
        progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self._options, self._tell, self._progress = options, tell, progress
        self._out, self.scoring = options.place, scoring_of(options)
        files = pairs("--data", options.data, "NAME=FILE")
        self._files = {name: Path(file) for name, file in files.items()}
        tasks = list(dict.fromkeys(task for row in wanted for task in tasks_of(row.cell)))
        found = _references(options, wanted)
        _check_settings(self._out / "settings.json", self.scoring, found)
        self._data = full_data.split(self._files, tasks, self._out / "data")
        if "mbpp" in tasks:
            from della.sandbox.walls import open_sandbox

            open_sandbox()
        self._models = {
            role: prepare(role, found, self._out / "inputs", options.allow_pickle, tell)
            for role in _roles(wanted)
        }
        normed = {role for row in wanted for c in row.candidates if c.uses_norms for role in c.experts}
        self._norms = {role: self._calibrated(role) for role in sorted(normed)}

    def key(self, cell: Cell, split: str) -> str:
        """What the scores of a cell are kept under; with other problems or another judge they are others."""
        settings = self._settings(cell, split)
        asked = {"limit": settings.limit, "judge": settings.judge, "annotator": settings.annotator}
        return " ".join([split, cell.name, *(f"{k}={v}" for k, v in asked.items() if v is not None)])

    def score(self, cell: Cell, split: str) -> Scored:
        """The scores of a cell by task and metric."""
        results = self._evaluated(cell, self._settings(cell, split))
        return {result.task: {score.metric: _stored(score) for score in result.scores} for result in results}

    def _settings(self, cell: Cell, split: str) -> EvaluationOptions:
        """GSM8K is judged on test alone: choosing by exact match costs nothing."""
        scoring = self.scoring
        return replace(
            scoring, tasks=tasks_of(cell), out=self._out / "answers" / split, data=self._data[split],
            judge=scoring.judge if split == "test" else None, fresh=False, score_only=False,
        )  # fmt: skip

    def _evaluated(self, cell: Cell, settings: EvaluationOptions) -> list[Result]:
        """Answers first, then the merge may go, and then what a judge says of them."""
        plain = replace(settings, judge=None, annotator=None)
        model = Model(cell.name, self._place(cell))
        if _is_answered(model, plain):
            plain = replace(plain, score_only=True)
        else:
            self._make(cell)
        results = {r.task: r for r in evaluate([model], plain, progress=self._progress)}
        if cell.method and not self._options.keep_merges:
            shutil.rmtree(self._place(cell), ignore_errors=True)
        judged = [t for t, by in (("gsm8k", settings.judge), ("alpaca_eval", settings.annotator)) if by]
        again = tuple(task for task in settings.tasks if task in judged)
        if again:
            scored = replace(settings, tasks=again, score_only=True)
            results |= {r.task: r for r in evaluate([model], scored, tell=self._tell)}
        return list(results.values())

    def _place(self, cell: Cell) -> str:
        return str(self._out / "merges" / cell.name) if cell.method else self._models[cell.experts[0]]

    def _make(self, cell: Cell) -> None:
        """Merge, unless the merge is there."""
        if not cell.method:
            return
        from della.api import merge

        recipe, place = self._out / "recipes" / f"{cell.name}.yml", Path(self._place(cell))
        base = self._models[BASE_OF[cell.experts[0]]]
        text = as_text(cell.recipe(base, self._models, self._norms))
        is_there = place.is_dir()
        if is_there and recipe.is_file() and recipe.read_text(encoding="utf-8") == text:
            return
        disk.put(recipe, text.encode())
        merge(recipe, place, overwrite=is_there, threads=self._options.threads, fsync=False)

    def _calibrated(self, role: str) -> str:
        """The file of input norms of an expert."""
        from della.evaluate.calibration import calibrate

        path = self._out / "norms" / f"{Path(self._models[role]).name}.safetensors"
        if not path.is_file():
            self._tell(f"{self._models[role]}: collecting the norms of its inputs, for WANDA")
            texts = full_data.calibration(self._files, role, self._out / "data")
            backend = "numpy" if self.scoring.backend == "numpy" else "hf"
            path.parent.mkdir(parents=True, exist_ok=True)
            calibrate(self._models[role], texts, path, backend=backend)
        return str(path.absolute())


def _check_settings(path: Path, scoring: EvaluationOptions, found: Mapping[str, str]) -> None:
    """Refuse to mix answers of other models or other settings with those that are there."""
    now = {
        "backend": scoring.backend, "templates": dict(scoring.templates), "prompt": scoring.prompt,
        "max_tokens": scoring.max_tokens, "seed": scoring.seed, "dtype": scoring.dtype,
    }  # fmt: skip
    now |= {f"model {role}": reference for role, reference in found.items()}
    then = _read(path)
    changed = [name for name in now if name in then and then[name] != now[name]]
    if changed:
        told = "; ".join(f"{name} {then[name]}, now {now[name]}" for name in changed)
        raise EvaluationError(
            Problem(
                f"begun with other settings: {told}",
                "choose another --out",
                subject=str(path.parent),
                parameter="out",
            )
        )
    disk.put(path, (json.dumps(then | now, indent=1) + "\n").encode())


def _is_answered(model: Model, settings: EvaluationOptions) -> bool:
    """Whether the answers to all problems are stored."""
    for task in settings.tasks:
        path = settings.out / model.name / f"{task}.jsonl"
        if not path.is_file():
            return False
        with Store(path, None) as store:
            asked = load(task, settings.data[task], settings.limit)
            if any(problem.id not in store.records for problem in asked):
                return False
    return True


def _stored(score: Score) -> dict[str, Any]:
    return {**asdict(score.interval), "items": dict(score.items)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
