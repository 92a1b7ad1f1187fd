"""The grid of the full experiment, its recipes, and what its plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from della.errors import EvaluationError
from della.experiments.cells import Cell, as_text
from della.experiments.full_models import BASE_OF, MODELS, references
from della.experiments.full_plan import Rates, plan_json, plan_text, work_of
from della.experiments.full_rows import GRID, rows
from della.experiments.published import MERGES
from della.recipe.reader import read_recipe

NAMES = {role: known.hub_id for role, known in MODELS.items()}
NORMS = {role: f"/norms/{role}.safetensors" for role in MODELS}
SMALL = rows((1,), replace(GRID, drops=(0.5,), lambdas=(1.0,)), seeds=2)


def base(cell: Cell) -> str:
    return BASE_OF[cell.experts[0]]


def labels(table: int) -> list[tuple[str, str]]:
    return [(row.group, row.label) for row in rows((table,))]


def test_the_rows_are_the_papers() -> None:
    methods = ["TA", "DARE", "TIES", "DELLA"]
    merged = [(models, label) for models in MERGES for label in methods]
    alone = [("lm", "alone"), ("math", "alone"), ("code", "alone")]
    assert labels(1) == labels(4) == alone + merged
    assert labels(2) == [("Math+Code", "without rescale"), ("Math+Code", "with rescale")]
    assert len(labels(3)) == 5 * 4
    assert labels(3)[-1] == ("p=0.9", "DELLA with rescale")
    assert labels(5)[3:6] == [("LM+Math", x) for x in ("WANDA, top-K", "WANDA, p by rank", "DELLA")]
    assert len(labels(6)) == 9 * 5
    assert labels(6)[-1] == ("p=0.94", "random layer")
    assert labels(7)[:5] == [("LM+Math", f"p={p}") for p in (0.1, 0.3, 0.5, 0.7, 0.9)]


def test_every_recipe_of_the_grid_is_one_that_della_merges() -> None:
    cells = {cell for row in rows() for cell in row.candidates if cell.method}
    assert len({cell.name for cell in cells}) == len(cells), "names of files"
    for cell in cells:
        recipe = read_recipe(as_text(cell.recipe(NAMES[base(cell)], NAMES, NORMS)))
        shared, models = recipe.resolve("model.norm.weight", 0.0)
        assert recipe.base_model == NAMES[base(cell)]
        assert [model.reference for model in recipe.models] == [NAMES[role] for role in cell.experts]
        assert (recipe.merge_method, recipe.seed) == (cell.method, 42)
        assert shared["lambda"] == cell.lambda_
        for own in models:
            assert own.get("density") == (None if cell.p is None else round(1 - cell.p, 6))
            assert own.get("epsilon") == cell.epsilon


def test_only_table_3_uses_the_expert_of_another_base() -> None:
    for row in rows():
        for cell in row.candidates:
            assert ("coder" in cell.experts) == (row.table == "3")
            assert base(cell) == ("coder_base" if row.table == "3" else "base")


def test_a_range_of_probabilities_never_leaves_0_to_1() -> None:
    epsilons = {row.group: row.cell.epsilon for row in rows((6,)) if row.label == "row"}
    assert epsilons["p=0.3"] == epsilons["p=0.93"] == 0.07
    assert epsilons["p=0.94"] == 0.06


def test_only_stochastic_methods_are_repeated() -> None:
    seeds = {row.label: tuple(cell.seed for cell in row.cells) for row in SMALL}
    assert seeds == {"alone": (42,), "TA": (42,), "TIES": (42,), "DARE": (42, 43), "DELLA": (42, 43)}


def test_a_cell_is_named_by_all_that_makes_it() -> None:
    cell = Cell(("lm", "math"), "paper_della", 0.3, 1.1, 0.07, (("vote", "none"),), 43)
    assert cell.name == "lm+math-della-l1.1-p0.3-w0.14-vote_none-s43"
    assert Cell(("math", "code"), "paper_ta", lambda_=1.1).name == "math+code-ta-l1.1"
    assert Cell(("lm",)).name == "lm"


@pytest.mark.parametrize(
    ("numbers", "wrong", "seeds", "message"),
    [
        ((1, 9), {}, 1, "tables (1, 9): expected some of 1 to 7"),
        ((1,), {"drops": (1.0,)}, 1, "drop rate 1.0: expected a number between 0 and 1"),
        ((1,), {}, 0, "expected at least one drop rate, one lambda and one seed"),
        ((1,), {"epsilons": (0.75,)}, 1, "window 1.5: expected a number from 0 up to 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(
    numbers: tuple[int, ...], wrong: dict[str, Any], seeds: int, message: str
) -> None:
    with pytest.raises(EvaluationError) as raised:
        rows(numbers, replace(GRID, **wrong), seeds)
    assert str(raised.value) == message


def test_the_plan_counts_every_model_once() -> None:
    work = work_of(rows((1, 5, 7), replace(GRID, drops=(0.3, 0.5), lambdas=(1.0, 1.1))))
    chosen = [each for each in work if each.split == "validation"]
    assert len({each.cell for each in chosen}) == len(chosen)
    # 4 merges: TA has 2 candidates, DARE, TIES, DELLA and the two of WANDA 4 each.
    assert len(chosen) == 4 * (2 + 5 * 4)
    # 3 experts alone; 4 merges: TA, TIES and WANDA top-K once, DARE, DELLA, WANDA by rank and 2 rates thrice.
    assert len([each for each in work if each.split == "test"]) == 3 + 4 * (3 + 5 * 3)


def test_the_plan_says_what_it_takes_and_downloads_nothing(tmp_path: Path) -> None:
    found = references({}, None, ("base", "lm", "math", "code"))
    plan = plan_json(SMALL, found, None, Rates(tokens_per_second=1000, judge_price=(10, 20)))
    assert json.loads(json.dumps(plan)) == plan
    # Nothing is chosen: TA, TIES once, DARE and DELLA with two seeds, on each of four merges.
    assert plan["merges"] == {"validation": 0, "test": 4 * 6}
    assert plan["models_scored"] == 27
    assert plan["answers"]["gsm8k"] == 1319 * (2 + 3 * 6)
    assert plan["disk"]["downloads"] == {
        "meta-llama/Llama-2-13b-hf": 26.0e9,
        "WizardLMTeam/WizardLM-13B-V1.2": 26.0e9,
        "vanillaOVO/WizardMath-13B-V1.0": 52.1e9,
        "layoric/llama-2-13b-code-alpaca": 26.0e9,
    }
    assert plan["disk"]["peak"] == pytest.approx(130.1e9 + 104.1e9 + 26e9)
    tokens = plan["answers"]["gsm8k"] * 170 + plan["answers"]["mbpp"] * 120
    tokens += plan["answers"]["alpaca_eval"] * 300
    assert plan["gpu_hours"] == pytest.approx((27 * 60 + tokens / 1000) / 3600)
    calls = plan["judge"]["calls"]
    assert calls == {"gsm8k": plan["answers"]["gsm8k"], "alpaca_eval": plan["answers"]["alpaca_eval"]}
    read, written = plan["judge"]["tokens_read"], plan["judge"]["tokens_written"]
    assert read == calls["gsm8k"] * 600 + calls["alpaca_eval"] * 900
    assert plan["judge"]["dollars"] == pytest.approx((read * 10 + written * 20) / 1e6)
    text = plan_text(plan)
    assert "  merges      24 (0 to choose on validation, 24 for test)" in text
    assert "52.1 GB  vanillaOVO/WizardMath-13B-V1.0" in text
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_models_that_are_here_uses_their_own_sizes(tmp_path: Path) -> None:
    for role in ("base", "math"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.safetensors").write_bytes(bytes(1000))
    wanted = rows((6,), replace(GRID, pruned=(0.5,), pruned_more=()), seeds=1)
    found = {role: str(tmp_path / role) for role in ("base", "math")}
    plan = plan_json(wanted, found, 5, Rates())
    assert plan["disk"] == {
        "downloads": {}, "inputs": 2000, "copies_at_most": 1000, "one_merge": 1000, "peak": 4000,
    }  # fmt: skip
    assert plan["answers"] == {"gsm8k": 5 * 5, "mbpp": 0, "alpaca_eval": 0}


def test_references_are_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "meta-llama/Llama-2-13b-hf").mkdir(parents=True)
    found = references({"lm": "me/mine"}, tmp_path, ("base", "lm"))
    assert found == {"base": str(tmp_path / "meta-llama/Llama-2-13b-hf"), "lm": "me/mine"}
    with pytest.raises(EvaluationError) as raised:
        references({}, tmp_path, ("base", "math"))
    folder = tmp_path / "vanillaOVO/WizardMath-13B-V1.0"
    assert str(raised.value) == (
        f"{folder}: no such folder; hf download vanillaOVO/WizardMath-13B-V1.0 --local-dir {folder}, "
        "or say where the model is: --models math=FOLDER"
    )
    with pytest.raises(EvaluationError, match=r"^--models maths=\.\.\.: expected one of base, lm, math, "):
        references({"maths": "x"}, None, ("math",))
