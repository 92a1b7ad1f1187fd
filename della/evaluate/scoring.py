"""From answers to scores: what each benchmark counts, with intervals, and whether two models differ."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from della.evaluate import loss as measured
from della.evaluate.problems import Item
from della.evaluate.templates import program_in
from della.report.intervals import Interval, paired_bootstrap, side, wilson
from della.running.workers import each

if TYPE_CHECKING:
    from della.sandbox.walls import Sandbox

Answers = Mapping[str, str]  # by the ids of the problems


@dataclass(frozen=True, slots=True)
class Score:
    """One number of a model on a task with its interval: a share from 0 to 1, unless it has a ``unit``.

    ``items`` has what each problem that counts adds to it, by id: 1 for right, 0 for wrong, .5 for a draw; of
    a loss its nats a token, and ``weights`` the tokens.
    """

    metric: str
    interval: Interval
    items: Mapping[str, float]
    weights: Mapping[str, int] = field(default_factory=dict)
    unit: str = ""

    @staticmethod
    def of(metric: str, items: Mapping[str, bool]) -> Score:
        """A share of right ones, with Wilson's interval."""
        right = sum(items.values())
        return Score(metric, wilson(right, len(items)), {key: float(value) for key, value in items.items()})


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a task, and for each problem, by id, what there is to tell of it."""

    scores: tuple[Score, ...]
    details: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far model ``b`` is above model ``a`` on the same problems, as a share or in ``unit``, by the paired
    bootstrap; ``differing`` of the ``items`` are not scored alike.
    """

    task: str
    metric: str
    a: str
    b: str
    interval: Interval
    items: int
    differing: int
    unit: str = ""

    @property
    def within_noise(self) -> bool:
        """Whether chance alone may explain it: the difference is not significant."""
        return side(self.interval, differing=self.differing) == 0

    def __str__(self) -> str:
        scale, digits = (1, 4) if self.unit else (100, 1)
        points = [scale * value for value in (self.interval.value, self.interval.low, self.interval.high)]
        by = f"{abs(points[0]):.{digits}f} {self.unit or 'points'}"
        known = (
            f"95 % interval {points[1]:+.{digits}f} to {points[2]:+.{digits}f}, {self.items} items, "
            f"{self.differing} differ"
        )
        where = f"{self.task}, {self.metric}"
        if self.within_noise:
            return f"{where}: {self.a} and {self.b} differ by {by}, which is within noise ({known})"
        side = "above" if points[0] > 0 else "below"
        return f"{where}: {self.b} is {by} {side} {self.a} ({known})"


def score_gsm8k(
    problems: Sequence[Item], answers: Answers, verdicts: Mapping[str, str | None] | None = None
) -> Scored:
    """Exact match of the number after "The answer is: " (strict) and of the last number (flexible).

    verdicts: a judge's, by id: "correct", "wrong" or None.  `judge` counts what could not be judged as wrong;
    `judge_judged` leaves it out, as the paper's release does.
    """
    from della.evaluate import gsm8k

    found = {p.id: (gsm8k.strict(answers[p.id]), gsm8k.flexible(answers[p.id])) for p in problems}
    details: dict[str, dict[str, Any]] = {
        p.id: {
            "strict": gsm8k.right(found[p.id][0], p.reference), "strict_answer": found[p.id][0],
            "flexible": gsm8k.right(found[p.id][1], p.reference), "flexible_answer": found[p.id][1],
        }
        for p in problems
    }  # fmt: skip
    scores = [Score.of(key, {p.id: details[p.id][key] for p in problems}) for key in ("strict", "flexible")]
    if verdicts is not None:
        judged = {p.id: verdicts.get(p.id) for p in problems}
        for key, verdict in judged.items():
            details[key]["judge"] = verdict
        scores.append(Score.of("judge", {key: verdict == "correct" for key, verdict in judged.items()}))
        heard = {key: verdict == "correct" for key, verdict in judged.items() if verdict is not None}
        if heard:
            scores.append(Score.of("judge_judged", heard))
    return Scored(tuple(scores), details)


def score_mbpp(problems: Sequence[Item], answers: Answers, sandbox: Sandbox) -> Scored:
    """pass@1: whether the program in an answer passes its asserts, in the sandbox."""
    from della.sandbox.programs import check

    def run(problem: Item) -> dict[str, Any]:
        verdict = check(sandbox, program_in(answers[problem.id]), problem.tests, problem.setup)
        return {"pass@1": verdict.passed, "reason": verdict.reason}

    found = each(run, problems, os.cpu_count() or 1)
    details = {problem.id: verdict for problem, verdict in zip(problems, found, strict=True)}
    return Scored((Score.of("pass@1", {key: d["pass@1"] for key, d in details.items()}),), details)


def score_loss(problems: Sequence[Item], answers: Answers, seed: int) -> Scored:
    """Nats a token by the bootstrap over texts, and its perplexity; by text loss, tokens and windows."""
    loss = measured.loss_of(answers[problem.id] for problem in problems)
    details: dict[str, dict[str, Any]] = {
        p.id: {"loss": measured.said(s / n) if n else None, "tokens": n, "windows": w}
        for p, s, n, w in zip(problems, loss.sums, loss.tokens, loss.windows, strict=True)
    }  # fmt: skip
    items = {key: float(one["loss"]) for key, one in details.items() if one["tokens"]}
    weights = {key: details[key]["tokens"] for key in items}
    found = loss.interval(seed)
    wide = Interval(*(measured.perplexity(nats) for nats in (found.value, found.low, found.high)))
    unit = "nats a token"
    scores = (Score("loss", found, items, weights, unit), Score("perplexity", wide, {}, unit="perplexity"))
    return Scored(scores, details)


def notes_of_loss(scored: Scored) -> list[str]:
    """What must be known of a loss: texts that are no number, that do not count, that were cut in windows."""
    told = scored.details
    kinds = {
        "have a loss that is no finite number, and so has the mean": [
            key for key, one in told.items() if isinstance(one["loss"], str)
        ],
        "do not count, as nothing precedes their only token": [
            key for key, one in told.items() if not one["tokens"]
        ],
        "are longer than a window, and read in several": [
            key for key, one in told.items() if one["windows"] > 1
        ],
    }
    return [
        f"{len(ids)} of {len(told)} texts {what} (such as {ids[0]})" for what, ids in kinds.items() if ids
    ]


def differences(task: str, scores: Mapping[str, Sequence[Score]], seed: int) -> list[Difference]:
    """Every further model against the first, for each metric that both have, on the problems both have;
    losses only where they are numbers, of as many tokens.
    """
    (first, others), found = (next(iter(scores.items())), list(scores.items())[1:]), []
    for name, theirs in others:
        for ours, score in ((o, s) for o in first[1] for s in theirs if o.metric == s.metric):
            shared = [key for key in ours.items if key in score.items]
            weights = [ours.weights.get(key, 1) for key in shared]
            known = all(map(math.isfinite, (ours.interval.value, score.interval.value)))
            if shared and known and weights == [score.weights.get(key, 1) for key in shared]:
                b, a = [score.items[key] for key in shared], [ours.items[key] for key in shared]
                differing = sum(x != y for x, y in zip(a, b, strict=True))
                interval = paired_bootstrap(b, a, weights=weights if ours.weights else None, seed=seed)
                found.append(
                    Difference(
                        task, score.metric, first[0], name, interval, len(shared), differing, score.unit
                    )
                )
    return found
