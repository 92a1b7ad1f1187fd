"""Score models on the benchmarks: problems, answers on disk, scores with intervals.

Answers and scores are apart: answers are asked for once, scores are computed from what is on the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from della.errors import EvaluationError, Problem
from della.evaluate import loss, scoring
from della.evaluate import problems as benchmarks
from della.evaluate.backends import Backend, Model
from della.evaluate.generations import Store
from della.evaluate.options import EvaluationOptions, opt
from della.evaluate.problems import Item
from della.evaluate.scoring import Difference, Score, Scored
from della.evaluate.settings import check, depends
from della.evaluate.templates import Prompt, cut, prompt_of
from della.output import disk
from della.report.intervals import Interval
from della.version import __version__

if TYPE_CHECKING:
    from della.evaluate.endpoint import Endpoint
    from della.sandbox.walls import Sandbox

OPENAI_URL = "https://api.openai.com/v1"
ANSWER_SECONDS = 600.0  # how long a server may be silent: it may have many requests to answer


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``of`` answers of a model on a task are there."""

    model: str
    task: str
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a model scored on a task: how many problems there were, how many answers were made now (the others
    were there), the scores, and what the answers were made with.
    """

    model: str
    task: str
    problems: int
    answered: int
    scores: tuple[Score, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def score(self, metric: str) -> Score:
        """The score of one metric; KeyError if there is none."""
        return {score.metric: score for score in self.scores}[metric]


def evaluate(
    models: Sequence[Model | str], settings: EvaluationOptions, *,
    progress: Callable[[Progress], None] | None = None, tell: Callable[[str], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Score every model on every task, and write answers, items and scores.json into ``settings.out``.

    What an earlier call has finished is used.  tell: takes notes for the user.  Raises EvaluationError.
    """
    found = [model if isinstance(model, Model) else Model.of(model) for model in models]
    check(found, settings)
    run = _Run(settings, progress, tell or (lambda _: None))
    for model in found if not settings.fresh else ():
        run.missing(model)  # so that no model is refused after others have been worked on for hours
    results = [result for model in found for result in run.model(model)]
    disk.put(settings.out / "scores.json", (json.dumps(report(results, settings), indent=1) + "\n").encode())
    return results


def differences(results: Sequence[Result], seed: int = 42) -> list[Difference]:
    """Every further model against the first one, task by task; a loss that is no number, or of other tokens,
    with none.
    """
    tasks = dict.fromkeys(result.task for result in results)
    return [
        difference
        for task in tasks
        for difference in scoring.differences(
            task, {result.model: result.scores for result in results if result.task == task}, seed
        )
    ]


def report(results: Sequence[Result], settings: EvaluationOptions) -> dict[str, Any]:
    """Results and differences as JSON; shares, not per cent."""
    return {
        "della": __version__,
        "settings": {
            "limit": settings.limit, "seed": settings.seed, "judge": settings.judge,
            "annotator": settings.annotator,
        },
        "answers": [
            {"model": result.model, "task": result.task, "settings": dict(result.settings)}
            for result in results
        ],
        "results": [
            {
                "model": result.model, "task": result.task, "metric": score.metric,
                **_numbers(score.interval), "items": len(score.items), "problems": result.problems,
                **({"tokens": sum(score.weights.values())} if score.weights else {}),
            }
            for result in results
            for score in result.scores
        ],
        "differences": [
            {
                "task": d.task, "metric": d.metric, "a": d.a, "b": d.b, **_numbers(d.interval),
                "items": d.items, "differing": d.differing, "within_noise": d.within_noise,
                "message": str(d),
            }
            for d in differences(results, settings.seed)
        ],
    }  # fmt: skip


class _Run:
    """One call of `evaluate`; everything that could fail without a model does so before the first answer."""

    def __init__(
        self,
        settings: EvaluationOptions,
        progress: Callable[[Progress], None] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._settings, self._progress, self._tell = settings, progress, tell
        self._problems = {
            task: benchmarks.load(task, settings.data.get(task), settings.limit) for task in settings.tasks
        }
        self._prompts = {
            task: [_prompt(problem, settings) for problem in problems]
            for task, problems in self._problems.items()
        }
        self._sandbox = _sandbox() if "mbpp" in settings.tasks else None
        self._judge = _judge(settings) if "gsm8k" in settings.tasks else None
        if "alpaca_eval" in settings.tasks and settings.annotator:
            self._check_annotator(settings.annotator)

    def model(self, model: Model) -> list[Result]:
        """Answer what is missing of all tasks, then score them."""
        folder = self._settings.out / model.name
        with self._opened(model) as stores:
            missing = {task: self._missing(task, store) for task, store in stores.items()}
            if any(missing.values()):
                self._generate(model, stores, missing)
            results = []
            for task, store in stores.items():
                problems = self._problems[task]
                answers = {problem.id: str(store.records[problem.id]["answer"]) for problem in problems}
                scored = self._score(task, problems, answers, folder, model)
                lines = [json.dumps({"id": p.id, **scored.details.get(p.id, {})}) + "\n" for p in problems]
                disk.put(folder / f"{task}.items.jsonl", "".join(lines).encode())
                made = len(missing[task])
                results.append(
                    Result(model.name, task, len(problems), made, scored.scores, store.settings or {})
                )
        return results

    def missing(self, model: Model) -> int:
        """How many answers are missing; EvaluationError if those that are there are of something else."""
        with self._opened(model) as stores:
            return sum(len(self._missing(task, store)) for task, store in stores.items())

    @contextmanager
    def _opened(self, model: Model) -> Iterator[dict[str, Store]]:
        with ExitStack() as stack:
            yield {task: stack.enter_context(self._store(model, task)) for task in self._problems}

    def _store(self, model: Model, task: str) -> Store:
        path, settings = self._settings.out / model.name / f"{task}.jsonl", self._settings
        if settings.score_only:
            if not path.is_file():
                said = "no such file, so there is nothing to score"
                raise EvaluationError(Problem(said, f"leave out {opt('score_only')}", str(path)))
            return Store(path, None)
        return Store(path, depends(model, task, settings), fresh=settings.fresh)

    def _missing(self, task: str, store: Store) -> list[Prompt]:
        missing = []
        for prompt in self._prompts[task]:
            record = store.records.get(prompt.id)
            if record is None:
                missing.append(prompt)
            elif record.get("prompt") != _key(prompt) or not isinstance(record.get("answer"), str):
                said = (
                    f"problem {prompt.id} was put otherwise than now: the data, the template or della's "
                    "version has changed"
                )
                fix = f"choose another {opt('out')}, or begin anew with {opt('fresh', True)}"
                raise EvaluationError(Problem(said, fix, str(store.path)))
        if missing and self._settings.score_only:
            said = f"{len(missing)} of {len(self._prompts[task])} answers are missing"
            raise EvaluationError(Problem(said, f"leave out {opt('score_only')}", str(store.path)))
        return missing

    def _generate(
        self, model: Model, stores: Mapping[str, Store], missing: Mapping[str, Sequence[Prompt]]
    ) -> None:
        with ExitStack() as stack:
            backend: Backend | None = None
            for task, prompts in missing.items():
                store, asked = stores[task], {prompt.id: prompt for prompt in prompts}
                of = len(self._prompts[task])

                def keep(
                    answers: Mapping[str, str], task: str = task, store: Store = store, of: int = of,
                    asked: Mapping[str, Prompt] = asked,
                ) -> None:  # fmt: skip
                    store.add(*(
                        {"id": key, "prompt": _key(asked[key]), "answer": cut(answer, asked[key].stops)}
                        for key, answer in answers.items()
                    ))  # fmt: skip
                    if self._progress is not None:
                        done = sum(prompt.id in store.records for prompt in self._prompts[task])
                        self._progress(Progress(model.name, task, done, of))

                if prompts and task == "loss":
                    settings, items = self._settings, [p for p in self._problems[task] if p.id in asked]
                    scorer = loss.scorer(model, settings.backend, settings.dtype)
                    loss.answer(scorer, items, keep, window=settings.window, batch=settings.batch)
                elif prompts:
                    backend = backend or stack.enter_context(_backend(model, self._settings))
                    backend.answer(prompts, keep)

    def _score(
        self, task: str, problems: Sequence[Item], answers: Mapping[str, str], folder: Path, model: Model
    ) -> Scored:
        if task == "mbpp":
            assert self._sandbox is not None
            return scoring.score_mbpp(problems, answers, self._sandbox)
        if task == "gsm8k":
            return scoring.score_gsm8k(problems, answers, self._verdicts(problems, answers, folder))
        if task == "loss":
            scored = scoring.score_loss(problems, answers, self._settings.seed)
            for note in scoring.notes_of_loss(scored):
                self._tell(f"{model.name}, loss: {note}")
            return scored
        return self._score_alpaca_eval(problems, answers, folder, model)

    def _verdicts(
        self, problems: Sequence[Item], answers: Mapping[str, str], folder: Path
    ) -> Mapping[str, str | None] | None:
        if self._judge is None:
            return None
        from della.evaluate import judge

        path = folder / "gsm8k.judge.jsonl"
        with Store(path, judge.SETTINGS, fresh=self._settings.fresh) as store:
            return judge.judge(self._judge, problems, answers, store).verdicts

    def _score_alpaca_eval(
        self, problems: Sequence[Item], answers: Mapping[str, str], folder: Path, model: Model
    ) -> Scored:
        """The answers in the format of alpaca_eval, and by an annotator its win rates."""
        from della.evaluate import alpaca

        outputs, settings = folder / "alpaca_eval.json", self._settings
        alpaca.write_outputs(outputs, problems, answers, model.name)
        if settings.annotator is None:
            self._tell(
                f"{outputs} holds the answers for alpaca_eval; {opt('annotator', 'NAME')} has them judged"
            )
            return Scored((), {})
        references = folder / "alpaca_eval.reference.json"
        alpaca.write_outputs(references, problems, {p.id: p.reference for p in problems}, "reference")
        won = alpaca.win_rate(
            outputs, references, folder / "alpaca_eval", command=settings.alpaca_command,
            annotator=settings.annotator, judge_url=settings.judge_url, key_env=settings.judge_key_env,
            length_controlled=settings.length_controlled,
        )  # fmt: skip
        if won.judged < won.total:
            self._tell(f"alpaca_eval: {won.total - won.judged} of {won.total} answers could not be judged")
        items = {p.id: won.preferences[p.instruction] for p in problems if p.instruction in won.preferences}
        scores = [Score("win_rate", _share(won.interval), items)]
        if won.length_controlled is not None:
            value, error = won.length_controlled
            interval = Interval(value, max(0.0, value - 1.96 * error), min(100.0, value + 1.96 * error))
            scores.append(Score("length_controlled_win_rate", _share(interval), {}))
        return Scored(tuple(scores), {key: {"preference": value} for key, value in items.items()})

    def _check_annotator(self, annotator: str) -> None:
        from della.evaluate import alpaca

        found = self._problems["alpaca_eval"]
        lacking = [problem.id for problem in found if not problem.reference]
        if lacking:
            said = (
                f"{len(lacking)} of {len(found)} instructions have no reference 'output', such as number "
                f"{lacking[0]}"
            )
            fix = f"take a file that has them, or leave out {opt('annotator')}"
            raise EvaluationError(Problem(said, fix, "alpaca_eval"))
        alpaca.check_judge(self._settings.alpaca_command, annotator)


@contextmanager
def _backend(model: Model, settings: EvaluationOptions) -> Iterator[Backend]:
    if settings.backend == "numpy":
        from della.evaluate.numpy_backend import NumpyModel

        yield NumpyModel(model.reference, batch=settings.batch, max_tokens=settings.max_tokens)
    elif settings.backend == "hf":
        from della.evaluate.hf import HfModel

        yield HfModel(model, dtype=settings.dtype, batch=settings.batch, max_tokens=settings.max_tokens)
    elif settings.backend == "openai":
        yield _served(
            settings.base_url or "", settings.model_name or model.reference, settings, settings.key_env, 8
        )
    else:
        from della.evaluate.vllm_server import vllm_server

        with vllm_server(
            model, settings.out / model.name / "vllm.log", command=settings.vllm_command,
            arguments=settings.vllm_arguments, dtype=settings.dtype, seed=settings.seed,
        ) as base_url:  # fmt: skip
            yield _served(base_url, model.name, settings, "", 64)  # our own server needs no key


def _served(base_url: str, name: str, settings: EvaluationOptions, key_env: str, at_once: int) -> Backend:
    from della.evaluate.endpoint import Endpoint
    from della.evaluate.server import ServedModel

    return ServedModel(
        Endpoint(base_url, name, key_env=key_env, timeout=ANSWER_SECONDS),
        concurrency=settings.concurrency or at_once, max_tokens=settings.max_tokens, seed=settings.seed,
    )  # fmt: skip


def _sandbox() -> Sandbox:
    from della.sandbox.walls import open_sandbox

    return open_sandbox()


def _judge(settings: EvaluationOptions) -> Endpoint | None:
    if settings.judge is None:
        return None
    from della.evaluate.endpoint import Endpoint

    return Endpoint(settings.judge_url or OPENAI_URL, settings.judge, key_env=settings.judge_key_env)


def _prompt(problem: Item, settings: EvaluationOptions) -> Prompt:
    if problem.task == "loss":  # nothing is asked; the text is what the store compares
        return Prompt(problem.id, json.dumps([problem.instruction, problem.reference]))
    return prompt_of(problem, settings.template(problem.task), settings.prompt)


def _key(prompt: Prompt) -> str:
    """What tells one prompt from another under the same id."""
    told = json.dumps([prompt.text, prompt.is_chat, prompt.stops])
    return xxhash.xxh3_64_hexdigest(told.encode())


def _numbers(interval: Interval) -> dict[str, float | None]:
    return loss.plain({"value": interval.value, "low": interval.low, "high": interval.high})


def _share(percent: Interval) -> Interval:
    """Of a single item alpaca_eval knows no error: nothing is known then but the whole range."""
    low, high = (0.0, 100.0) if math.isnan(percent.low + percent.high) else (percent.low, percent.high)
    return Interval(percent.value / 100, low / 100, high / 100)
