"""The command `della eval`: its options, and how its results are shown."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from della.cli.console import Speaker, Speech, print_json, tell
from della.errors import EvaluationError

if TYPE_CHECKING:
    from della.evaluate.evaluation import Progress, Result

PACE = 5.0  # seconds between two lines of progress

_Text = Optional[str]  # noqa: UP045  (typer evaluates annotations on Python 3.10)
_Texts = Optional[list[str]]  # noqa: UP045
_Count = Optional[int]  # noqa: UP045


def _option(help_: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, **more)


Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="A folder, a hub id, or what a server calls it; or NAME=MODEL."),
]
Tasks = Annotated[str, _option("gsm8k, mbpp, alpaca_eval.", metavar="TASK,...", show_default=False)]
Data = Annotated[_Texts, _option("Problems from a local file. [default: the Hub]", metavar="[TASK=]FILE")]
Out = Annotated[Path, _option("Where answers and scores go.", metavar="DIR")]
Backend = Annotated[str, _option("Who answers: hf, vllm, openai, numpy.", metavar="NAME")]
Template = Annotated[
    _Texts, _option("alpaca, vicuna, chat. [default: as in the paper]", metavar="[TASK=]NAME")
]
PromptForm = Annotated[str, _option("gsm8k: fixed, or published with its slip.", metavar="NAME")]
MaxTokens = Annotated[int, _option("Most new tokens of an answer.", min=1)]
Limit = Annotated[_Count, _option("Only the first N problems of each task.", min=1, metavar="N")]
Seed = Annotated[int, _option("Seed of the server and of the bootstrap.", min=0)]
Dtype = Annotated[str, _option("hf, vllm: bfloat16, float16, float32.", metavar="NAME")]
Batch = Annotated[int, _option("hf, numpy: prompts at a time.", min=1)]
BaseUrl = Annotated[_Text, _option("openai: the server's address, mostly with /v1.", metavar="URL")]
ModelName = Annotated[_Text, _option("openai: what it calls MODEL. [default: MODEL]", metavar="NAME")]
KeyEnv = Annotated[str, _option("openai: environment variable of its key.", metavar="NAME")]
Concurrency = Annotated[_Count, _option("Requests at once. [default: 8, of vllm 64]", min=1, metavar="N")]
VllmCommand = Annotated[str, _option("vllm: its program, of any environment.", metavar="PROGRAM")]
VllmArgs = Annotated[str, _option("vllm: further arguments of `vllm serve`, quoted.", metavar="TEXT")]
Judge = Annotated[_Text, _option("gsm8k: a model that grades the answers too.", metavar="MODEL")]
Annotator = Annotated[
    _Text,
    _option("alpaca_eval: who compares, such as alpaca_eval_gpt4. [default: nobody]", metavar="NAME|FOLDER"),
]
AlpacaCommand = Annotated[str, _option("alpaca_eval: the package's command.", metavar="PROGRAM")]
LengthControlled = Annotated[
    bool, _option("alpaca_eval: that win rate too; it needs the Hub.", "--length-controlled")
]
JudgeUrl = Annotated[_Text, _option("Server of judge and annotator. [default: OpenAI's]", metavar="URL")]
JudgeKeyEnv = Annotated[str, _option("Environment variable of its key.", metavar="NAME")]
Fresh = Annotated[bool, _option("Forget the answers that are there.", "--fresh")]
ScoreOnly = Annotated[bool, _option("Score stored answers; load no model.", "--score-only")]
Quiet = Annotated[bool, _option("Say nothing but errors and scores.", "--quiet", "-q")]
AsJson = Annotated[bool, _option("Progress and scores as JSON lines.", "--json")]
Debug = Annotated[bool, _option("Show the traceback of an error.", "--debug")]


def evaluate(
    models: Models, tasks: Tasks, data: Data = None, out: Out = Path("eval-out"), backend: Backend = "hf",
    template: Template = None, prompt: PromptForm = "fixed", max_tokens: MaxTokens = 512,
    limit: Limit = None, seed: Seed = 42, dtype: Dtype = "bfloat16", batch: Batch = 8,
    base_url: BaseUrl = None, model_name: ModelName = None, key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = None, vllm_command: VllmCommand = "vllm", vllm_args: VllmArgs = "",
    judge: Judge = None, annotator: Annotator = None, alpaca_command: AlpacaCommand = "alpaca_eval",
    length_controlled: LengthControlled = False, judge_url: JudgeUrl = None,
    judge_key_env: JudgeKeyEnv = "OPENAI_API_KEY", fresh: Fresh = False, score_only: ScoreOnly = False,
    quiet: Quiet = False, as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Score models: ask for answers, keep them in DIR, and compute scores with intervals.  The same command
    goes on where it was cut short; what has been answered is not asked for again.
    """
    from della.evaluate import evaluation
    from della.evaluate.settings import Settings

    chosen = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    for option, given, task in (("--judge", judge, "gsm8k"), ("--annotator", annotator, "alpaca_eval")):
        if given and task not in chosen:
            raise EvaluationError(f"{option} {given}: is of {task}, which is not among --tasks {tasks}")
    settings = Settings(
        tasks=chosen, out=out,
        data={task: Path(file) for task, file in _by_task("--data", data or (), chosen, False).items()},
        backend=backend, templates=_by_task("--template", template or (), chosen, True), prompt=prompt,
        max_tokens=max_tokens, limit=limit, seed=seed, dtype=dtype, batch=batch, base_url=base_url,
        model_name=model_name, key_env=key_env, concurrency=concurrency,
        vllm_command=words("--vllm-command", vllm_command),
        vllm_arguments=words("--vllm-args", vllm_args), judge=judge, annotator=annotator,
        alpaca_command=alpaca_command, length_controlled=length_controlled, judge_url=judge_url,
        judge_key_env=judge_key_env, fresh=fresh, score_only=score_only,
    )  # fmt: skip
    say = Speaker(Speech(quiet, as_json))
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
    from della.evaluate.problems import TASKS

    found: dict[str, str] = {}
    for text in values:
        task, equals, value = text.partition("=")
        if not (equals and task in tasks):
            if equals and task in TASKS:
                raise EvaluationError(f"{option} {text}: {task} is not among --tasks {','.join(tasks)}")
            if len(tasks) > 1 and not for_all:
                raise EvaluationError(f"{option} {text}: which task is it of? {option} TASK=FILE")
            task, value = "", text
        if task in found:
            raise EvaluationError(f"{option} {text}: one was given before: {found[task]}")
        found[task] = value
    plain = found.pop("", None)
    return ({} if plain is None else dict.fromkeys(tasks, plain)) | found


def words(option: str, text: str) -> tuple[str, ...]:
    """The words of ``text``, as a shell takes them; EvaluationError where a quote stays open."""
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise EvaluationError(f"{option} {text}: {error}") from None
    if not found and option == "--vllm-command":
        raise EvaluationError(f"{option}: expected vLLM's program")
    return found


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
