"""The merges of the 135 M experiment and what follows from scores, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della.errors import EvaluationError
from della.experiments.paper.climbing import climb, inflation
from della.experiments.paper.small_grid import METHODS, START, STEPS, Cell, lambdas, recipe
from della.experiments.paper.small_items import Example, read_pairs
from della.experiments.paper.small_report import Findings, Losses, verdict
from della.recipe.reader import read_recipe
from della.report.intervals import Interval


@pytest.mark.parametrize("name", METHODS)
def test_every_cell_is_a_recipe(name: str) -> None:
    row = METHODS[name]
    for p in row.drops:
        read = read_recipe(recipe(Cell(name, p, 1.5, 3)))
        assert read.seed == 3
        assert (read.method.name, [model.reference for model in read.models]) == (
            row.merge_method,
            ["lm", "math", "code"],
        )
        shared, own = read.resolve("model.norm.weight", 0.0)
        assert shared["lambda"] == 1.5
        for key, value in row.settings.items():
            assert shared[key] == value
        for expert in own:
            assert expert.get("density", 0.0) == pytest.approx(1 - p)


def test_a_recipe_as_it_is_written() -> None:
    assert recipe(Cell("ladder-paper", 0.8, 1.25, 4)) == (
        "# DELLA wide, ladder: paper: ladder-paper-p0.8-lambda1.25-seed4\n"
        "merge_method: paper_della\nbase_model: base\nmodels:\n"
        "  - model: lm\n    parameters:\n      weight: 1\n      density: 0.2\n      window_size: 0.36\n"
        "  - model: math\n    parameters:\n      weight: 1\n      density: 0.2\n      window_size: 0.36\n"
        "  - model: code\n    parameters:\n      weight: 1\n      density: 0.2\n      window_size: 0.36\n"
        "parameters:\n  lambda: 1.25\n  ladder: paper\nseed: 4\nout_dtype: float32\n"
    )


def test_names_of_cells_differ() -> None:
    cells = [
        Cell(name, p, lambda_, seed)
        for name, row in METHODS.items() for p in row.drops for lambda_ in lambdas(name, p)
        for seed in (range(5) if row.random else (0,))
    ]  # fmt: skip
    assert len({cell.id for cell in cells}) == len(cells)
    assert Cell("ta", 1.0, 1.0).id == "ta-lambda1"
    assert Cell("dare", 0.5, 1.25, 2).id == "dare-p0.5-lambda1.25-seed2"


def test_ladders_of_lambda() -> None:
    assert lambdas("dare", 0.8) == list(STEPS)
    assert inflation(0.5, 3) == pytest.approx(1.75), "the hidden factor of Elect + mean, three experts"
    assert inflation(0.8, 3) == pytest.approx(2.44)
    assert lambdas("calibrated", 0.5)[4] == 1.75
    assert lambdas("none", 0.8)[4] == 5.0
    assert lambdas("sum", 1.0)[4] == 0.5


@pytest.mark.parametrize("best", range(len(STEPS)))
def test_climbing_finds_the_top_and_asks_once(best: int) -> None:
    asked: list[float] = []

    def score(lambda_: float) -> float:
        asked.append(lambda_)
        return -abs(STEPS.index(lambda_) - best)

    assert climb(score, list(STEPS), START) == STEPS[best]
    assert len(set(asked)) == len(asked) <= 3 + abs(best - STEPS.index(1.25))


def items() -> dict[str, dict[str, list[Example]]]:
    """Two items a task; response tokens 1 and 3."""
    both = [Example((1, 2), 1), Example((1, 2, 3, 4), 1)]
    return {"test": dict.fromkeys(("lm", "math", "code"), both)}


def uniform(lm: float, math: float, code: float) -> Losses:
    """The same loss for every token of a task."""
    return {task: [loss, 3 * loss] for task, loss in (("lm", lm), ("math", math), ("code", code))}


def findings() -> Findings:
    found = Findings(items(), 2)
    found.singles["base", "test"] = uniform(2.0, 2.0, 2.0)
    found.singles["lm", "test"] = uniform(1.0, 2.0, 2.0)
    found.singles["math", "test"] = uniform(2.0, 1.5, 2.0)
    found.singles["code", "test"] = uniform(2.0, 2.0, 1.6)
    return found


def test_kept_gain_is_the_mean_over_tasks() -> None:
    merged = uniform(1.5, 1.5, 2.2)  # kept: one half, all, minus one half
    assert findings().kept(merged) == pytest.approx(1 / 3)
    assert findings().kept(uniform(1.0, 1.5, 1.6)) == pytest.approx(1.0)
    assert findings().per_token(merged, "math") == pytest.approx(1.5)


def test_longer_responses_count_by_their_tokens() -> None:
    uneven = uniform(2.0, 2.0, 2.0) | {"lm": [0.0, 6.0]}  # the short item is known by heart
    assert findings().kept(uneven) == pytest.approx((2 / 4) / 1.0 / 3)


def test_a_row_has_means_and_seeds() -> None:
    row = findings().row([uniform(1.5, 2.0, 2.0), uniform(1.3, 2.0, 2.0)])
    assert row["loss"] == {"lm": pytest.approx(1.4), "math": 2.0, "code": 2.0}
    assert row["kept"]["value"] == pytest.approx(0.2, abs=1e-6)
    assert row["kept_by_seed"] == pytest.approx([0.5 / 3, 0.7 / 3])
    assert row["kept_over_seeds"]["value"] == pytest.approx(0.2, abs=1e-6)
    half = 12.706 * (0.2 / 3 / np.sqrt(2)) / np.sqrt(2)  # Student, one degree of freedom
    assert row["kept_over_seeds"]["high"] == pytest.approx(0.2 + half, abs=1e-5)


def test_a_difference_pairs_items_and_seeds() -> None:
    a = [uniform(1.4, 1.8, 1.9), uniform(1.5, 1.8, 1.9)]
    one = findings().difference(a, [uniform(1.6, 1.8, 1.9)])
    assert one["items"] == {"value": 0.05, "low": 0.05, "high": 0.05}, "tasks differ, items of a task do not"
    assert one["seeds"]["value"] == pytest.approx(0.05, abs=1e-6)
    assert one["loss"]["lm"] == {"value": -0.15, "low": -0.15, "high": -0.15}
    paired = findings().difference(a, [uniform(1.5, 1.8, 1.9), uniform(1.6, 1.8, 1.9)])
    assert paired["seeds"] == pytest.approx({"value": 0.1 / 3, "low": 0.1 / 3, "high": 0.1 / 3}, abs=1e-6)


@pytest.mark.parametrize(
    ("of_items", "of_seeds", "said"),
    [
        ((0.01, 0.002, 0.02), (0.01, 0.005, 0.015), "better"),
        ((-0.01, -0.02, -0.002), (-0.01, -0.015, -0.005), "worse"),
        ((0.01, -0.002, 0.02), (0.01, 0.005, 0.015), "within noise"),
        ((0.01, 0.002, 0.02), (0.01, -0.005, 0.025), "within noise"),
    ],
)
def test_verdicts(of_items: Any, of_seeds: Any, said: str) -> None:
    assert verdict(Interval(*of_items), Interval(*of_seeds)) == said


def test_an_expert_without_a_gain_is_told() -> None:
    found = findings()
    found.singles["math", "test"] = uniform(2.0, 2.1, 2.0)
    said = r"^the math expert is no better than the base on test of math: it gains -0\.1000 nats a token"
    with pytest.raises(EvaluationError, match=said):
        found.kept(uniform(1.0, 1.0, 1.0))


def test_lines_of_data(tmp_path: Path) -> None:
    """A line separator of Unicode inside a text ends no line; blank lines are none."""
    pair = {"prompt": "a\u2028b", "response": "c\u0085"}
    line = json.dumps(pair, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"\n{line}\r\n\n", encoding="utf-8")
    assert read_pairs(tmp_path / "x.jsonl") == [("a\u2028b", "c\u0085")]
    (tmp_path / "x.jsonl").write_text(json.dumps(pair) + "\n{\n")
    with pytest.raises(EvaluationError, match=r"x\.jsonl, line 2: invalid JSON"):
        read_pairs(tmp_path / "x.jsonl")
