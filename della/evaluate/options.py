"""The options of scoring and of calibration, declared once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from della.errors import EvaluationError
from della.options import option, refused, spelt


def _tasks(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _files(values: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    found = _by_task("--data", values, tasks)
    if "" in found and len(tasks) > 1:
        raise refused(EvaluationError, "--data", found[""], "names no task", "give --data TASK=FILE")
    return {task: Path(file) for task, file in _spread(found, tasks).items()}


def _templates(values: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    return _spread(_by_task("--template", values, tasks), tasks)


def _by_task(name: str, values: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Each TASK=VALUE by its task; by "" a VALUE without one."""
    from della.evaluate.problems import TASKS

    found: dict[str, str] = {}
    for text in values:
        task, equals, value = text.partition("=")
        if not equals or task not in TASKS:
            task, value = "", text
        elif task not in tasks:
            raise refused(EvaluationError, name, text, f"{task} is not among --tasks {','.join(tasks)}")
        if task in found:
            raise refused(EvaluationError, name, text, f"one was given before: {found[task]}")
        found[task] = value
    return found


def _spread(found: dict[str, str], tasks: Sequence[str]) -> dict[str, str]:
    """What has no task goes to every task that has no own."""
    return (dict.fromkeys(tasks, found[""]) if "" in found else {}) | {k: v for k, v in found.items() if k}


def words_of(text: str, name: str, *, least: int = 0) -> tuple[str, ...]:
    """The words of ``text``, as a shell takes them.

    Raises:
        EvaluationError: a quote stays open, or there are fewer than ``least``; ``name`` is what the error
            calls the text.
    """
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise refused(EvaluationError, name, text, str(error)) from None
    if len(found) < least:
        raise refused(EvaluationError, name, repr(text), "expected a program")
    return found


def _program(text: str) -> tuple[str, ...]:
    return words_of(text, "--vllm-command", least=1)


def _arguments(text: str) -> tuple[str, ...]:
    return words_of(text, "--vllm-args")


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How models are scored.

    ``data``, local files, and ``templates`` are by task.  The seed is of a server's sampler, which is greedy,
    and of the bootstrap.  ``score_only`` takes stored answers whatever they were made with.
    """

    tasks: tuple[str, ...] = option("gsm8k, mbpp, alpaca_eval, loss.", metavar="TASK,...", read=_tasks)
    data: Mapping[str, Path] = option(
        "Problems from a local file. [default: the Hub]", dict, metavar="[TASK=]FILE", many=True,
        read=_files, after="tasks",
    )  # fmt: skip
    out: Path = option("Where answers and scores go.", Path("eval-out"), metavar="DIR")
    backend: str = option("Who answers: hf, vllm, openai, numpy.", "hf", metavar="NAME")
    templates: Mapping[str, str] = option(
        "alpaca, vicuna, chat. [default: as in the paper]", dict, "--template", metavar="[TASK=]NAME",
        many=True, read=_templates, after="tasks",
    )  # fmt: skip
    prompt: str = option("gsm8k: fixed, or published with its slip.", "fixed", metavar="NAME")
    max_tokens: int = option("Most new tokens of an answer.", 512, least=1)
    limit: int | None = option("Only the first N problems of each task.", None, least=1, metavar="N")
    seed: int = option("Seed of the server and of the bootstrap.", 42, least=0)
    dtype: str = option("hf, vllm: bfloat16, float16, float32.", "bfloat16", metavar="NAME")
    batch: int = option("hf, numpy: prompts at a time.", 8, least=1)
    window: int = option("loss: most tokens a model sees at once.", 2048, least=2)
    base_url: str | None = option("openai: the server's address, mostly with /v1.", None, metavar="URL")
    model_name: str | None = option("openai: what it calls MODEL. [default: MODEL]", None, metavar="NAME")
    key_env: str = option("openai: environment variable of its key.", "OPENAI_API_KEY", metavar="NAME")
    concurrency: int | None = option("Requests at once. [default: 8, of vllm 64]", None, least=1, metavar="N")
    vllm_command: tuple[str, ...] = option(
        "vllm: its program, of any environment.", ("vllm",), metavar="PROGRAM", read=_program, text="vllm"
    )
    vllm_arguments: tuple[str, ...] = option(
        "vllm: further arguments of `vllm serve`, quoted.", (), "--vllm-args", metavar="TEXT",
        read=_arguments, text="",
    )  # fmt: skip
    judge: str | None = option("gsm8k: a model that grades the answers too.", None, metavar="MODEL")
    annotator: str | None = option(
        "alpaca_eval: who compares, such as alpaca_eval_gpt4. [default: nobody]", None,
        metavar="NAME|FOLDER",
    )  # fmt: skip
    alpaca_command: str = option("alpaca_eval: the package's command.", "alpaca_eval", metavar="PROGRAM")
    length_controlled: bool = option("alpaca_eval: that win rate too; it needs the Hub.", False)
    judge_url: str | None = option("Server of judge and annotator. [default: OpenAI's]", None, metavar="URL")
    judge_key_env: str = option("Environment variable of its key.", "OPENAI_API_KEY", metavar="NAME")
    fresh: bool = option("Forget the answers that are there.", False)
    score_only: bool = option("Score stored answers; load no model.", False)

    def template(self, task: str) -> str:
        """The template of a task; "" of loss, which has none."""
        from della.evaluate.templates import DEFAULTS

        return self.templates.get(task, DEFAULTS.get(task, ""))


def opt(name: str, value: bool | str | None = None) -> str:
    """An option of an evaluation as its user writes it, as `spelt` does."""
    return spelt(EvaluationOptions, name, value)


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How input norms are collected."""

    data: Path = option(
        "Texts, one a line; or JSON lines (.jsonl) with text, or with prompt and answer.", metavar="FILE"
    )
    out: Path = option("The .safetensors file to write.", metavar="NORMS")
    backend: str = option("Who runs the model: hf (torch), or numpy for a small Llama.", "hf", metavar="NAME")
    limit: int | None = option("Only the first N texts.", None, least=1, metavar="N")
