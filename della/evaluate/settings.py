"""What of the options of scoring is wrong, before anything is opened; and on which of them answers depend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from della.errors import EvaluationError, Problem, either, unknown
from della.evaluate.backends import BACKENDS, DTYPES, Model
from della.evaluate.endpoint import public
from della.evaluate.loss import BACKENDS as BACKENDS_OF_LOSS
from della.evaluate.options import EvaluationOptions, opt
from della.evaluate.problems import TASKS
from della.evaluate.templates import check_template
from della.options import refused


def check(models: Sequence[Model], settings: EvaluationOptions) -> None:
    """EvaluationError for what can be seen to be wrong before anything is opened."""
    if not models or not settings.tasks:
        raise EvaluationError("nothing to score: expected at least one model and one task")
    for task in (*settings.tasks, *settings.data, *settings.templates):
        if task not in TASKS:
            raise EvaluationError(unknown("task", task, TASKS))
    names = [model.name for model in models]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise EvaluationError(Problem(f"two models are called {double}", "name them: NAME=MODEL"))
    for what, value, known in (("backend", settings.backend, BACKENDS), ("dtype", settings.dtype, DTYPES)):
        if value not in known:
            raise EvaluationError(unknown(what, value, known))
    for task in settings.tasks:
        if task != "loss":
            check_template(settings.template(task), settings.prompt)
    if "loss" in settings.tasks:
        _check_loss(settings)
    for name in ("max_tokens", "batch", "limit", "concurrency"):
        if (getattr(settings, name) or 1) < 1 or getattr(settings, name) == 0:
            raise refused(EvaluationError, name, getattr(settings, name), "expected at least 1")
    if settings.seed < 0:
        raise refused(EvaluationError, "seed", settings.seed, "expected at least 0")
    if settings.backend == "openai" and not settings.base_url and not settings.score_only:
        said = "the backend openai needs the server's address"
        raise EvaluationError(
            Problem(said, f"give {opt('base_url', 'http://HOST/v1')}", parameter="base_url")
        )
    if settings.model_name and len(models) > 1:
        raise EvaluationError(
            Problem(
                f"{opt('model_name')} is of one model",
                "give several by the names that the server knows",
                parameter="model_name",
            )
        )
    if settings.backend != "openai" and not settings.score_only:
        for model in models:
            _ = model.local_or_hub
    if settings.fresh and settings.score_only:
        said = f"{opt('fresh')} forgets the answers that {opt('score_only')} is to score"
        raise EvaluationError(Problem(said, "leave one out", parameter="fresh"))


def _check_loss(settings: EvaluationOptions) -> None:
    if "loss" in settings.templates:
        option = either("--template TASK=NAME", 'templates={"TASK": NAME}')
        fix = f"write the prompts out in its file; {option} gives one to another task"
        raise EvaluationError(Problem("takes its texts as they are, and no template", fix, "loss"))
    if settings.backend not in BACKENDS_OF_LOSS and not settings.score_only:
        said = f"needs the probability of every token, which the backend {settings.backend} does not tell"
        fix = f"give {opt('backend', 'hf')}, or {opt('backend', 'numpy')} for a folder with a small Llama"
        raise EvaluationError(Problem(said, fix, "loss"))
    if settings.window < 2:
        raise refused(EvaluationError, opt("window"), settings.window, "expected at least 2")


def depends(model: Model, task: str, settings: EvaluationOptions) -> dict[str, Any]:
    """What the answers to a task depend on, beside the prompts, which are compared one by one."""
    own: dict[str, dict[str, Any]] = {
        "hf": {"dtype": settings.dtype, "batch": settings.batch},
        "numpy": {"batch": settings.batch},
        "vllm": {"dtype": settings.dtype, "vllm_arguments": settings.vllm_arguments},
        "openai": {"base_url": public(settings.base_url or ""), "model_name": settings.model_name},
    }
    if task == "loss":  # which batches do not change
        dtype = {"dtype": settings.dtype} if settings.backend == "hf" else {}
        told = {"task": task, "model": model.identity, "backend": settings.backend}
        return {**told, "window": settings.window, **dtype}
    return {
        "task": task, "model": model.identity, "backend": settings.backend,
        "template": settings.template(task), "prompt": settings.prompt, "max_tokens": settings.max_tokens,
        "seed": settings.seed, **own[settings.backend],
    }  # fmt: skip
