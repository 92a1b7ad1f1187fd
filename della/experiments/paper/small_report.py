"""What the scores of the 135 M experiment say: kept gains, differences, intervals, as results.json."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from della.errors import EvaluationError
from della.experiments.paper.results import as_json, head
from della.experiments.paper.small_grid import METHODS, WIDE, Cell
from della.experiments.paper.small_items import TASKS, Example
from della.report.intervals import Interval, mean_over_seeds, paired_bootstrap

Losses = dict[str, list[float]]
Array = NDArray[np.float64]


@dataclass
class Findings:
    """The scores by cell, and what follows from them.

    The gain that a merge keeps on a task is (base - merge) / (base - own expert) in loss per response token;
    its mean over the tasks is linear in the losses of the items, so that each item has a share in it, and the
    paired bootstrap works on these.
    """

    items: Mapping[str, Mapping[str, Sequence[Example]]]
    seeds: int
    singles: dict[tuple[str, str], Losses] = field(default_factory=dict)
    equal: dict[Cell, Losses] = field(default_factory=dict)
    tuned: dict[Cell, Losses] = field(default_factory=dict)
    validation: dict[Cell, float] = field(default_factory=dict)
    exact: dict[Cell, Losses] = field(default_factory=dict)  # float32, on the first test items

    def tokens(self, task: str, split: str) -> Array:
        """Response tokens by item."""
        return np.array([one.answered for one in self.items[split][task]], dtype=np.float64)

    def per_token(self, losses: Losses, task: str, split: str = "test") -> float:
        """Mean loss of a task's response tokens."""
        return float(sum(losses[task]) / self.tokens(task, split).sum())

    def shares(self, losses: Losses, split: str = "test") -> tuple[Array, Array]:
        """Kept gain by item of all tasks, and the items' weights, which are 1 in sum for each task."""
        values, weights = [], []
        for task in TASKS:
            tokens, base = self.tokens(task, split), self.singles["base", split]
            gain = self.per_token(base, task, split) - self.per_token(self.singles[task, split], task, split)
            if gain <= 0:
                raise EvaluationError(
                    f"the {task} expert is no better than the base on {split} of {task}: it gains "
                    f"{gain:.4f} nats a token, so there is nothing to keep; train longer, or on other data"
                )
            values.append((np.array(base[task]) - np.array(losses[task])) / tokens / gain)
            weights.append(tokens / tokens.sum())
        return np.concatenate(values), np.concatenate(weights)

    def kept(self, losses: Losses, split: str = "test") -> float:
        """The mean over tasks of the gain that is kept: 0 is the base, 1 every expert on its own task."""
        values, weights = self.shares(losses, split)
        return float((values * weights).sum() / weights.sum())

    def row(self, runs: Sequence[Losses]) -> dict[str, Any]:
        """One method: losses, kept gain with its interval over items, and over seeds."""
        values, weights = self._mean_shares(runs)
        return {
            "loss": {task: float(np.mean([self.per_token(run, task) for run in runs])) for task in TASKS},
            "kept": as_json(self._over_items(values, weights)),
            "kept_by_seed": [self.kept(run) for run in runs],
            "kept_over_seeds": as_json(mean_over_seeds([self.kept(run) for run in runs])),
        }

    def difference(self, a: Sequence[Losses], b: Sequence[Losses]) -> dict[str, Any]:
        """Kept gain of a less that of b: over items (means over seeds, paired), and over pairs of seeds."""
        one, weights = self._mean_shares(a)
        other, _ = self._mean_shares(b)
        runs = max(len(a), len(b))
        left, right = ([self.kept(x[i % len(x)]) for i in range(runs)] for x in (a, b))
        items = self._over_items(one - other, weights)
        seeds = mean_over_seeds([x - y for x, y in zip(left, right, strict=True)])
        by_task = {}
        for task in TASKS:
            tokens = self.tokens(task, "test")
            mean_a, mean_b = (np.mean([run[task] for run in runs], axis=0) / tokens for runs in (a, b))
            by_task[task] = as_json(paired_bootstrap(mean_a, mean_b, weights=tokens))
        return {
            "items": as_json(items),
            "seeds": as_json(seeds),
            "loss": by_task,
            "verdict": verdict(items, seeds),
        }

    def _over_items(self, values: Array, weights: Array) -> Interval:
        """The weighted mean of shares, with the interval of a bootstrap that draws items of each task."""
        sizes = [len(self.items["test"][task]) for task in TASKS]
        return paired_bootstrap(values, np.zeros_like(values), weights=weights, strata=sizes)

    def _mean_shares(self, runs: Sequence[Losses]) -> tuple[Array, Array]:
        found = [self.shares(run) for run in runs]
        return np.mean([values for values, _ in found], axis=0), found[0][1]


def verdict(items: Interval, seeds: Interval) -> str:
    """What a difference is worth: better or worse only where both intervals leave zero out."""
    if items.holds_zero or seeds.holds_zero:
        return "within noise"
    return "better" if items.value > 0 else "worse"


def grouped(cells: Mapping[Cell, Losses]) -> dict[tuple[str, float, float], list[Losses]]:
    """The runs of each method and setting, by seed."""
    found: dict[tuple[str, float, float], list[Losses]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        found.setdefault((cell.method, cell.p, cell.lambda_), []).append(cells[cell])
    return found


def results(report: Findings, command: str, training: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Everything as JSON; ``seconds`` is what merging and scoring took."""
    equal, tuned = grouped(report.equal), grouped(report.tuned)
    ta, wide = (next(runs for key, runs in tuned.items() if key[0] == name) for name in ("ta", "della-wide"))
    plain = next(runs for key, runs in equal.items() if key[0] == "ta")
    singles = {
        name: {task: report.per_token(report.singles[name, "test"], task) for task in TASKS}
        for name in ("base", *TASKS)
    }
    found = head("135m", command, 0, seconds, "torch", "transformers", "peft")
    found["time"] |= {f"training_{task}": training[task]["seconds"] for task in TASKS if task in training}
    return found | {
        "seeds": report.seeds,
        "training": {
            task: {key: value for key, value in row.items() if key != "seconds"}
            for task, row in training.items()
        },
        "items": {
            split: {
                task: {"items": len(found), "response_tokens": sum(one.answered for one in found)}
                for task, found in tasks.items()
            }
            for split, tasks in report.items.items()
        },
        "singles": singles,
        "validation": [_entry(cell.method, cell.p, cell.lambda_) | {"kept": kept}
                       for cell, kept in report.validation.items()],
        "tuned": [_entry(*key) | report.row(runs)
                  | {"less_ta": report.difference(runs, ta), "less_della_wide": report.difference(runs, wide)}
                  for key, runs in tuned.items()],
        "equal": [_entry(*key) | report.row(runs) | {"less_ta": report.difference(runs, plain)}
                  for key, runs in equal.items()],
        "claims": claims(report, equal, tuned),
        "precision": precision(report),
    }  # fmt: skip


Runs = Mapping[tuple[str, float, float], list[Losses]]
STEPS = ("ta", "dare", "della", "della-wide")  # the order that the first look found


def claims(report: Findings, equal: Runs, tuned: Runs) -> list[dict[str, Any]]:
    """The first look's order, step by step: at lambda 1 and equal p, and each method at its own choice."""
    settings: list[tuple[str, float | None, dict[str, list[Losses]]]] = [
        ("equal", p, {m: runs for (m, at, _), runs in equal.items() if at == p or METHODS[m].drops == (1.0,)})
        for p in WIDE
    ]
    settings.append(("tuned", None, {m: runs for (m, _, _), runs in tuned.items()}))
    return [
        {"setting": setting, "p": p, "better": high, "than": low, **report.difference(runs[high], runs[low])}
        for setting, p, runs in settings
        for low, high in itertools.pairwise(STEPS)
    ]


def precision(report: Findings) -> list[dict[str, Any]]:
    """Kept gain of the first seed's merges on the same items, in bfloat16 and in float32."""
    few = {"test": report.items["exact"]}
    rounded, whole = Findings(few, 1), Findings(few, 1)

    def cut(losses: Losses) -> Losses:
        return {task: losses[task][: len(few["test"][task])] for task in TASKS}

    for name in ("base", *TASKS):
        rounded.singles[name, "test"] = cut(report.singles[name, "test"])
        whole.singles[name, "test"] = report.singles[name, "exact"]
    scored = {**report.equal, **report.tuned}
    return [
        _entry(cell.method, cell.p, cell.lambda_)
        | {"bfloat16": rounded.kept(cut(scored[cell])), "float32": whole.kept(losses)}
        for cell, losses in report.exact.items()
    ]


def _entry(method: str, p: float, lambda_: float) -> dict[str, Any]:
    dropped = None if METHODS[method].drops == (1.0,) else p
    return {"method": method, "title": METHODS[method].title, "p": dropped, "lambda": lambda_}
