"""The merges of the 135 M experiment and what follows from scores, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments.bench import Bench, Scored
from della.experiments.cells import Cell, as_text
from della.experiments.choice import climb, inflation
from della.experiments.demo import EXPERTS
from della.experiments.measures import Difference, difference, measure
from della.experiments.small import recipe
from della.experiments.small_data import read_pairs
from della.experiments.tables import REAL, SMALL, SMALL_START, SMALL_VARIANTS
from della.recipe.reader import read_recipe
from della.report.intervals import Interval

SMALL_DROPS, SMALL_LAMBDAS = REAL.grid.drops, REAL.grid.lambdas
KINDS = {**SMALL, **SMALL_VARIANTS}


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_is_a_recipe(name: str) -> None:
    kind = KINDS[name]
    for p in kind.places(SMALL_DROPS):
        read = read_recipe(as_text(recipe(kind.cell(EXPERTS, p, 1.5, seed=3))))
        assert read.seed == 3
        assert (read.method.name, [model.reference for model in read.models]) == (kind.method, [*EXPERTS])
        shared, own = read.resolve("model.norm.weight", 0.0)
        assert shared["lambda"] == 1.5
        for key, value in kind.settings:
            assert shared[key] == value
        for expert in own:
            assert expert.get("density") == (None if p is None else pytest.approx(1 - p))


def test_a_recipe_as_it_is_written() -> None:
    own = "  parameters:\n    weight: 1.0\n    density: 0.2\n    epsilon: 0.18\n"
    assert as_text(recipe(KINDS["ladder-paper"].cell(EXPERTS, 0.8, 1.25, seed=4))) == (
        f"models:\n- model: lm\n{own}- model: math\n{own}- model: code\n{own}"
        "base_model: base\nmerge_method: paper_della\nparameters:\n  lambda: 1.25\n  ladder: paper\n"
        "seed: 4\nout_dtype: float32\n"
    )


def test_names_of_cells_differ() -> None:
    cells = [
        one
        for kind in KINDS.values() for p in kind.places(SMALL_DROPS)
        for lambda_ in kind.ladder(SMALL_LAMBDAS, p, 3)
        for one in kind.cell(EXPERTS, p, lambda_).seeded(5)
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == len(cells)
    assert SMALL["ta"].cell(EXPERTS, None).name == "lm+math+code-ta-l1"
    assert SMALL["dare"].cell(EXPERTS, 0.5, 1.25, seed=2).name == "lm+math+code-dare-l1.25-p0.5-s2"


def test_ladders_of_lambda() -> None:
    def fifth(name: str, p: float | None) -> float:
        return KINDS[name].ladder(SMALL_LAMBDAS, p, 3)[4]

    assert KINDS["dare"].ladder(SMALL_LAMBDAS, 0.8, 3) == list(SMALL_LAMBDAS)
    assert inflation(0.5, 3) == pytest.approx(1.75), "the hidden factor of Elect + mean, three experts"
    assert inflation(0.8, 3) == pytest.approx(2.44)
    assert fifth("calibrated", 0.5) == 1.75
    assert fifth("none", 0.8) == pytest.approx(5.0)
    assert fifth("sum", None) == 0.5


@pytest.mark.parametrize("best", range(len(SMALL_LAMBDAS)))
def test_climbing_finds_the_top_and_asks_once(best: int) -> None:
    asked: list[float] = []

    def score(lambda_: float) -> float:
        asked.append(lambda_)
        return -abs(SMALL_LAMBDAS.index(lambda_) - best)

    assert climb(score, SMALL_LAMBDAS, SMALL_START) == SMALL_LAMBDAS[best]
    assert len(set(asked)) == len(asked) <= 3 + abs(best - SMALL_START)


class Known:
    """Scores that are given: two items a task, with 1 and 3 tokens; a cell's seed says which."""

    def __init__(self, *runs: tuple[float, float, float]) -> None:
        self.runs = runs
        self.alone = {"base": (2.0, 2.0, 2.0), "lm": (1.0, 2.0, 2.0), "math": (2.0, 1.5, 2.0),
                      "code": (2.0, 2.0, 1.6)}  # fmt: skip

    def key(self, cell: Cell, split: str) -> str:
        return cell.name

    def score(self, cell: Cell, split: str) -> Scored:
        losses = self.runs[cell.seed] if cell.method else self.alone[cell.experts[0]]
        return {task: {"loss": [loss, 3 * loss]} for task, loss in zip(EXPERTS, losses, strict=True)}


def bench(path: Path, *runs: tuple[float, float, float]) -> Bench:
    tokens = {("test", task): [1, 3] for task in EXPERTS}
    return Bench(Known(*runs), Store(path / "scores.jsonl", {}), print, tokens=tokens)


def cells(*seeds: int) -> list[Cell]:
    return [SMALL["dare"].cell(EXPERTS, 0.5, seed=seed) for seed in seeds]


def test_kept_gain_is_the_mean_over_tasks(tmp_path: Path) -> None:
    with bench(tmp_path, (1.5, 1.5, 2.2), (1.0, 1.5, 1.6)) as made:  # kept: one half, all, minus one half
        assert [made.kept(cell, "test") for cell in cells(0, 1)] == pytest.approx([1 / 3, 1.0])
        assert made.loss(cells(0), "test", "math") == pytest.approx(1.5)


def test_longer_responses_count_by_their_tokens(tmp_path: Path) -> None:
    with bench(tmp_path) as made:
        uneven = {"lm": {"loss": [0.0, 6.0]}}  # the short item is known by heart
        values, weights = made.shares(uneven, "test", ("lm",))
        assert (values * weights).sum() == pytest.approx(2 / 4)


def test_a_row_has_means_and_seeds(tmp_path: Path) -> None:
    with bench(tmp_path, (1.5, 2.0, 2.0), (1.3, 2.0, 2.0)) as made:
        assert made.loss(cells(0, 1), "test", "lm") == pytest.approx(1.4)
        row = measure(made, cells(0, 1), "test", EXPERTS)
    assert row.over_items.value == pytest.approx(20)
    assert row.seeds == pytest.approx((50 / 3, 70 / 3))
    half = 12.706 * (20 / 3 / np.sqrt(2)) / np.sqrt(2)  # Student, one degree of freedom
    assert row.over_seeds.high == pytest.approx(20 + half, abs=1e-3)


def test_a_difference_pairs_items_and_seeds(tmp_path: Path) -> None:
    with bench(tmp_path, (1.4, 1.8, 1.9), (1.5, 1.8, 1.9), (1.6, 1.8, 1.9)) as made:
        ab, bc, c = (measure(made, cells(*seeds), "test", EXPERTS) for seeds in ((0, 1), (1, 2), (2,)))
    found = difference(ab, c).items
    assert (found.value, found.low, found.high) == pytest.approx((5, 5, 5)), "tasks differ, items not"
    paired, alone = difference(ab, bc).seeds, difference(ab, c).seeds
    assert paired is not None
    assert (paired.value, paired.low, paired.high) == pytest.approx((10 / 3, 10 / 3, 10 / 3))
    assert alone is not None
    assert alone.value == pytest.approx(5), "one seed stands against all of the other's"
    assert difference(c, c).seeds is None


@pytest.mark.parametrize(
    ("of_items", "of_seeds", "side"),
    [
        ((0.01, 0.002, 0.02), (0.01, 0.005, 0.015), 1),
        ((-0.01, -0.02, -0.002), (-0.01, -0.015, -0.005), -1),
        ((0.01, -0.002, 0.02), (0.01, 0.005, 0.015), 0),
        ((0.01, 0.002, 0.02), (0.01, -0.005, 0.025), 0),
    ],
)
def test_a_side_only_where_both_intervals_leave_zero_out(of_items: Any, of_seeds: Any, side: int) -> None:
    assert Difference(Interval(*of_items), Interval(*of_seeds)).side == side


def test_an_expert_without_a_gain_is_told(tmp_path: Path) -> None:
    scorer = Known((1.0, 1.0, 1.0))
    scorer.alone["math"] = (2.0, 2.1, 2.0)
    tokens = {("test", task): [1, 3] for task in EXPERTS}
    with (
        Bench(scorer, Store(tmp_path / "s.jsonl", {}), print, tokens=tokens) as made,
        pytest.raises(
            EvaluationError, match=r"^the math expert is no better than the base on 2 test problems"
        ),
    ):
        made.kept(cells(0)[0], "test")


def test_lines_of_data(tmp_path: Path) -> None:
    """A line separator of Unicode inside a text ends no line; blank lines are none."""
    pair = {"prompt": "a\u2028b", "response": "c\u0085"}
    line = json.dumps(pair, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"\n{line}\r\n\n", encoding="utf-8")
    assert read_pairs(tmp_path / "x.jsonl") == [("a\u2028b", "c\u0085")]
    (tmp_path / "x.jsonl").write_text(json.dumps(pair) + "\n{\n")
    with pytest.raises(EvaluationError, match=r"x\.jsonl, line 2: invalid JSON"):
        read_pairs(tmp_path / "x.jsonl")
