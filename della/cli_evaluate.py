"""The command `della eval`: its options, and how its results are shown."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from della.errors import EvaluationError
from della.speaker import Speaker, print_json, tell

if TYPE_CHECKING:
    from della.evaluate.evaluation import Progress, Result

PACE = 5.0  # seconds between two lines of progress

Text = Optional[str]  # noqa: UP045  (typer evaluates annotations on Python 3.10)
Texts = Optional[list[str]]  # noqa: UP045
Count = Optional[int]  # noqa: UP045


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders, hub ids, or names that a server knows; or NAME=MODEL."
        ),
    ],
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help="gsm8k, mbpp, alpaca_eval.", show_default=False)
    ],
    data: Annotated[
        Texts,
        typer.Option(metavar="[TASK=]FILE", help="Problems from a local file. [default: from the Hub]"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where answers and scores go.")] = Path("eval-out"),
    backend: Annotated[str, typer.Option(help="Who answers: hf, vllm, openai, numpy.")] = "hf",
    template: Annotated[
        Texts,
        typer.Option(metavar="[TASK=]NAME", help="alpaca, vicuna, chat. [default: as in the paper]"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="GSM8K's: fixed, or published with its slip.")] = "fixed",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 512,
    limit: Annotated[Count, typer.Option(min=1, help="Only the first N problems of each task.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the server and of the bootstrap.")] = 42,
    dtype: Annotated[str, typer.Option(help="hf, vllm: bfloat16, float16, float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="hf, numpy: prompts at a time.")] = 8,
    base_url: Annotated[
        Text, typer.Option(metavar="URL", help="openai: the server, mostly with /v1.")
    ] = None,
    model_name: Annotated[Text, typer.Option(help="openai: what it calls MODEL. [default: MODEL]")] = None,
    key_env: Annotated[str, typer.Option(help="openai: environment variable of its key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[
        Count, typer.Option(min=1, help="Requests at once. [default: 8, of vllm 64]")
    ] = None,
    vllm_command: Annotated[str, typer.Option(help="vllm: its program, of any environment.")] = "vllm",
    vllm_args: Annotated[str, typer.Option(help="vllm: further arguments of `vllm serve`, quoted.")] = "",
    judge: Annotated[Text, typer.Option(metavar="MODEL", help="gsm8k: the model that grades too.")] = None,
    annotator: Annotated[
        Text,
        typer.Option(
            help="alpaca_eval: who compares, such as alpaca_eval_gpt4. [default: only write answers]"
        ),
    ] = None,
    alpaca_command: Annotated[str, typer.Option(help="alpaca_eval: the package's command.")] = "alpaca_eval",
    length_controlled: Annotated[
        bool, typer.Option("--length-controlled", help="alpaca_eval: this win rate too; uses the Hub.")
    ] = False,
    judge_url: Annotated[Text, typer.Option(metavar="URL", help="Server of the judge and annotator.")] = None,
    judge_key_env: Annotated[
        str, typer.Option(help="Environment variable of the judge's key.")
    ] = "OPENAI_API_KEY",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers that are there.")] = False,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Score stored answers; load no model.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but errors and the table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and results as JSON lines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Score models: ask for answers, keep them in DIR, and compute scores with intervals.  The same command
    goes on where it was cut short; what has been answered is not asked for again.
    """
    from della.evaluate import evaluation
    from della.evaluate.settings import Settings

    chosen = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    settings = Settings(
        tasks=chosen, out=out,
        data={task: Path(file) for task, file in _by_task("--data", data or (), chosen, False).items()},
        backend=backend, templates=_by_task("--template", template or (), chosen, True), prompt=prompt,
        max_tokens=max_tokens, limit=limit, seed=seed, dtype=dtype, batch=batch, base_url=base_url,
        model_name=model_name, key_env=key_env, concurrency=concurrency,
        vllm_command=_words("--vllm-command", vllm_command),
        vllm_arguments=_words("--vllm-args", vllm_args), judge=judge, annotator=annotator,
        alpaca_command=alpaca_command, length_controlled=length_controlled, judge_url=judge_url,
        judge_key_env=judge_key_env, fresh=fresh, score_only=score_only,
    )  # fmt: skip
    say = Speaker(quiet, as_json)
    try:
        results = evaluation.evaluate(models, settings, progress=_progress(quiet, as_json), tell=say.note)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{out} keeps what is answered; the same command goes on from there"
        ) from None
    if as_json:
        print_json(event="evaluated", out=str(out), **evaluation.report(results, settings))
        return
    print(table(results), flush=True)
    for difference in evaluation.differences(results, seed):
        print(difference, flush=True)


def table(results: Sequence[Result]) -> str:
    """Aligned text: a line a score, in per cent."""
    rows = [("model", "task", "metric", "score", "95 % interval", "items")]
    for result in results:
        for score in result.scores:
            value, low, high = (
                100 * share for share in (score.interval.value, score.interval.low, score.interval.high)
            )
            counted = f"{len(score.items)} of {result.problems}" if score.items else f"{result.problems}"
            rows.append(
                (result.model, result.task, score.metric, f"{value:.1f}", f"{low:.1f} to {high:.1f}", counted)
            )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if at < 3 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _by_task(option: str, values: Sequence[str], tasks: Sequence[str], for_all: bool) -> dict[str, str]:
    """TASK=VALUE, or a VALUE for the only task, or (``for_all``) for every task that has no own."""
    found: dict[str, str] = {}
    plain = ""
    for text in values:
        task, equals, value = text.partition("=")
        if equals and task in tasks:
            found[task] = value
        elif len(tasks) == 1 or for_all:
            plain = text
        else:
            raise EvaluationError(f"{option} {text}: which task is it of? {option} TASK={text}")
    return {task: plain for task in tasks if plain} | found


def _words(option: str, text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise EvaluationError(f"{option} {text}: {error}") from None
    if not words and option == "--vllm-command":
        raise EvaluationError(f"{option}: expected vLLM's program")
    return words


def _progress(quiet: bool, as_json: bool) -> Callable[[Progress], None] | None:
    """A line every few seconds, and at the end of each task."""
    if quiet and not as_json:
        return None
    last = time.monotonic()

    def update(progress: Progress) -> None:
        nonlocal last
        if progress.done < progress.of and time.monotonic() - last < PACE:
            return
        last = time.monotonic()
        if as_json:
            print_json(
                event="progress", model=progress.model, task=progress.task, done=progress.done, of=progress.of
            )
        else:
            tell(f"{progress.model}, {progress.task}: {progress.done} of {progress.of} answers")

    return update
