"""What the scores of the 135 M experiment say: kept gains, differences, intervals, as JSON and Markdown."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from della.errors import EvaluationError
from della.evaluate.statistics import Interval, mean_over_seeds, paired_bootstrap
from della.paper.small_grid import METHODS, WIDE, Cell
from della.paper.small_items import TASKS, Example
from della.paper.small_model import versions
from della.version import __version__

Losses = dict[str, list[float]]
Array = NDArray[np.float64]


@dataclass
class Report:
    """The scores by cell, and what follows from them.

    The gain that a merge keeps on a task is (base - merge) / (base - own expert) in loss per response token;
    its mean over the tasks is linear in the losses of the items, so that each item has a share in it, and the
    paired bootstrap works on these.
    """

    items: Mapping[str, Mapping[str, Sequence[Example]]]
    seeds: int
    threads: int
    singles: dict[tuple[str, str], Losses] = field(default_factory=dict)
    equal: dict[Cell, Losses] = field(default_factory=dict)
    tuned: dict[Cell, Losses] = field(default_factory=dict)
    validation: dict[Cell, float] = field(default_factory=dict)

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
            "kept": asdict(paired_bootstrap(values, np.zeros_like(values), weights=weights)),
            "kept_by_seed": [self.kept(run) for run in runs],
            "kept_over_seeds": asdict(mean_over_seeds([self.kept(run) for run in runs])),
        }

    def difference(self, a: Sequence[Losses], b: Sequence[Losses]) -> dict[str, Any]:
        """Kept gain of a less that of b: over items (means over seeds, paired), and over pairs of seeds."""
        one, weights = self._mean_shares(a)
        other, _ = self._mean_shares(b)
        runs = max(len(a), len(b))
        left, right = ([self.kept(x[i % len(x)]) for i in range(runs)] for x in (a, b))
        items = paired_bootstrap(one, other, weights=weights)
        seeds = mean_over_seeds([x - y for x, y in zip(left, right, strict=True)])
        by_task = {}
        for task in TASKS:
            tokens = self.tokens(task, "test")
            mean_a, mean_b = (np.mean([run[task] for run in runs], axis=0) / tokens for runs in (a, b))
            by_task[task] = asdict(paired_bootstrap(mean_a, mean_b, weights=tokens))
        return {
            "items": asdict(items),
            "seeds": asdict(seeds),
            "loss": by_task,
            "verdict": verdict(items, seeds),
        }

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


def results(report: Report, seconds: float) -> dict[str, Any]:
    """Everything as JSON."""
    equal, tuned = grouped(report.equal), grouped(report.tuned)
    singles = {
        name: {task: report.per_token(report.singles[name, "test"], task) for task in TASKS}
        for name in ("base", *TASKS)
    }
    return {
        "scale": "135m",
        "della": __version__,
        "versions": versions() | {"python": platform.python_version()},
        "threads": report.threads,
        "seeds": report.seeds,
        "seconds": round(seconds, 1),
        "items": {
            split: {
                task: {"items": len(found), "response_tokens": sum(one.answered for one in found)}
                for task, found in tasks.items()
            }
            for split, tasks in report.items.items()
        },
        "singles": singles,
        "equal": [_entry(key, report.row(runs)) for key, runs in equal.items()],
        "claims": claims(report, equal),
        "validation": [
            {"method": cell.method, "p": cell.p, "lambda": cell.lambda_, "kept": kept}
            for cell, kept in report.validation.items()
        ],
        "tuned": [
            _entry(key, report.row(runs)) | {"against_della_wide": report.difference(runs, _runs(tuned))}
            for key, runs in tuned.items()
        ],
    }


def claims(report: Report, equal: Mapping[tuple[str, float, float], list[Losses]]) -> list[dict[str, Any]]:
    """The first look's ordering at equal p and lambda 1, step by step."""
    found = []
    for p in WIDE:
        steps = [("ta", 1.0), ("dare", p), ("della", p), ("della-wide", p)]
        for (low, low_p), (high, high_p) in itertools.pairwise(steps):
            a, b = equal[high, high_p, 1.0], equal[low, low_p, 1.0]
            found.append({"p": p, "lambda": 1.0, "better": high, "than": low, **report.difference(a, b)})
    return found


def _runs(tuned: Mapping[tuple[str, float, float], list[Losses]]) -> list[Losses]:
    return next(runs for key, runs in tuned.items() if key[0] == "della-wide")


def _entry(key: tuple[str, float, float], row: Mapping[str, Any]) -> dict[str, Any]:
    method, p, lambda_ = key
    dropped = None if METHODS[method].drops == (1.0,) else p
    return {"method": method, "title": METHODS[method].title, "p": dropped, "lambda": lambda_, **row}


def write_report(report: Report, out: Path, seconds: float) -> Path:
    """OUT/results.json and OUT/tables.md; returns the first."""
    found = results(report, seconds)
    (out / "tables.md").write_text(tables(found), encoding="utf-8")
    path = out / "results.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def tables(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    head = "| method | p | lambda | LM | Math | Code | kept gain | over seeds |"
    rule = "|---|---|---|---|---|---|---|---|"
    lines = ["## Models alone", "", "Loss per response token on the test items.", ""]
    lines += ["| model | LM | Math | Code |", "|---|---|---|---|"]
    for name, loss in found["singles"].items():
        lines.append(f"| {name} | {_losses(loss)} |")
    lines += [
        "",
        "## Chosen on validation",
        "",
        head[:-1] + "| less DELLA wide | verdict |",
        rule + "---|---|",
    ]
    for row in sorted(found["tuned"], key=lambda row: -row["kept"]["value"]):
        against = row["against_della_wide"]
        lines.append(f"{_row(row)} {_signed(against['items'])} | {against['verdict']} |")
    lines += ["", "## At lambda 1 and equal p", "", head, rule]
    lines += [
        _row(row) for row in sorted(found["equal"], key=lambda row: (row["p"] or 0, row["kept"]["value"]))
    ]
    lines += ["", "| p | claim | difference over items | over seeds | verdict |", "|---|---|---|---|---|"]
    for claim in found["claims"]:
        lines.append(
            f"| {claim['p']:g} | {METHODS[claim['better']].title} above {METHODS[claim['than']].title} "
            f"| {_signed(claim['items'])} | {_signed(claim['seeds'])} | {claim['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def _losses(loss: Mapping[str, float]) -> str:
    return " | ".join(f"{loss[task]:.4f}" for task in TASKS)


def _row(row: Mapping[str, Any]) -> str:
    p = "-" if row["p"] is None else f"{row['p']:g}"
    kept, seeds = row["kept"], row["kept_over_seeds"]
    spread = f"± {seeds['high'] - seeds['value']:.4f}" if len(row["kept_by_seed"]) > 1 else "-"
    interval = f"{kept['value']:.4f} ({kept['low']:.4f} to {kept['high']:.4f})"
    return f"| {row['title']} | {p} | {row['lambda']:g} | {_losses(row['loss'])} | {interval} | {spread} |"


def _signed(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:+.4f} ({interval['low']:+.4f} to {interval['high']:+.4f})"
