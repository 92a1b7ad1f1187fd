"""The command `della eval`: its options, and how its results are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from della.cli.console import Speaker, Speech, print_json
from della.cli.options import only
from della.errors import EvaluationError
from della.evaluate.options import EvaluationOptions
from della.options import Spec, refused

if TYPE_CHECKING:
    from della.evaluate.evaluation import Progress, Result

Models = Annotated[
    list[str],
    Spec(
        "A folder, a hub id, or what a server calls it; or NAME=MODEL.", metavar="MODEL", many=True,
        is_argument=True,
    ),
]  # fmt: skip


def evaluate(
    models: Models,
    options: EvaluationOptions,
    speech: Annotated[
        Speech,
        only(
            "debug", quiet="Say nothing but errors and scores.",
            as_json="Progress and scores as JSON lines.",
        ),
    ],
) -> None:  # fmt: skip
    """Score models: ask for answers, keep them in DIR, and compute scores with intervals.  The same command
    resumes what was cut short; what has been answered is not asked for again.
    """
    from della.evaluate import evaluation

    asked = (("judge", options.judge, "gsm8k"), ("annotator", options.annotator, "alpaca_eval"))
    for name, given, task in asked:
        if given and task not in options.tasks:
            said = f"is of {task}, which is not among --tasks {','.join(options.tasks)}"
            raise refused(EvaluationError, f"--{name}", given, said)
    say = Speaker(speech)
    progress = say.lines(_text, asdict, lambda p: p.done == p.of)
    try:
        results = evaluation.evaluate(models, options, progress=progress, tell=say.note)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{options.out} keeps what is answered; the same command resumes it"
        ) from None
    if speech.as_json:
        print_json(event="evaluated", out=str(options.out), **evaluation.report(results, options))
        return
    print(table(results), flush=True)
    for difference in evaluation.differences(results, options.seed):
        print(difference, flush=True)


def _text(progress: Progress) -> str:
    what = "texts" if progress.task == "loss" else "answers"
    return f"{progress.model}, {progress.task}: {progress.done} of {progress.of} {what}"


def table(results: Sequence[Result]) -> str:
    """Aligned text: a line a score, in per cent but where it has a unit."""
    rows = [("model", "task", "metric", "score", "95 % interval", "items")]
    for result in results:
        for score in result.scores:
            scale, digits = (1, 4) if score.unit else (100, 1)
            value, low, high = (
                f"{scale * number:.{digits}f}"
                for number in (score.interval.value, score.interval.low, score.interval.high)
            )
            span = "unknown" if math.isnan(score.interval.low) else f"{low} to {high}"
            counted = f"{len(score.items)} of {result.problems}" if score.items else f"{result.problems}"
            rows.append((result.model, result.task, score.metric, value, span, counted))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if at < 3 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
