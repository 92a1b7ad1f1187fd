"""The grid of the full experiment, its recipes, and what its plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from della.errors import EvaluationError
from della.experiments.paper.full_grid import Cell, Grid, rows
from della.experiments.paper.full_models import MODELS, references
from della.experiments.paper.full_plan import Rates, plan_json, plan_text, work_of
from della.experiments.paper.published import MERGES
from della.recipe.reader import read_recipe

NAMES = {role: known.hub_id for role, known in MODELS.items()}
NORMS = {role: f"/norms/{role}.safetensors" for role in MODELS}
SMALL = Grid(tables=(1,), drop_rates=(0.5,), lambdas=(1.0,), seeds=2)


def labels(table: int) -> list[tuple[str, str]]:
    return [(row.models, row.label) for row in rows(Grid(tables=(table,)))]


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
    cells = {cell for row in rows(Grid()) for cell in row.candidates if cell.method}
    assert len({cell.name for cell in cells}) == len(cells), "names of files"
    for cell in cells:
        recipe = read_recipe(cell.recipe(NAMES, NORMS))
        shared, models = recipe.resolve("model.norm.weight", 0.0)
        assert recipe.base_model == NAMES[cell.base]
        assert [model.reference for model in recipe.models] == [NAMES[role] for role in cell.experts]
        assert (recipe.merge_method, recipe.seed) == (cell.method, 42)
        assert shared["lambda"] == cell.lambda_
        for own in models:
            assert own.get("density") == (None if cell.drop is None else round(1 - cell.drop, 6))
            assert own.get("window_size") == cell.window


def test_only_table_3_uses_the_expert_of_another_base() -> None:
    for row in rows(Grid()):
        for cell in row.candidates:
            assert ("coder" in cell.experts) == (row.table == 3)
            assert cell.base == ("coder_base" if row.table == 3 else "base")


def test_a_range_of_probabilities_never_leaves_0_to_1() -> None:
    windows = {row.models: row.candidates[0].window for row in rows(Grid(tables=(6,))) if row.label == "row"}
    assert windows["p=0.3"] == windows["p=0.93"] == 0.14
    assert windows["p=0.94"] == 0.12


def test_only_stochastic_methods_are_repeated() -> None:
    seeds = {row.label: row.seeds for row in rows(SMALL)}
    assert seeds == {"alone": (42,), "TA": (42,), "TIES": (42,), "DARE": (42, 43), "DELLA": (42, 43)}


def test_a_cell_is_named_by_all_that_makes_it() -> None:
    cell = Cell(("lm", "math"), "paper_della", 1.1, 0.3, 0.14, (("vote", "none"),), 43)
    assert cell.name == "lm+math-della-l1.1-p0.3-w0.14-vote_none-s43"
    assert Cell(("math", "code"), "paper_ta", 1.1).name == "math+code-ta-l1.1"
    assert Cell(("lm",)).name == "lm"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tables": (1, 9)}, "tables (1, 9): expected some of 1 to 7"),
        ({"drop_rates": (1.0,)}, "drop rate 1.0: expected a number between 0 and 1"),
        ({"seeds": 0}, "expected at least one drop rate, one lambda and one seed"),
        ({"window": 1.5}, "window 1.5: expected a number from 0 up to 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError) as raised:
        Grid(**wrong)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_the_plan_counts_every_model_once() -> None:
    work = work_of(rows(Grid(tables=(1, 5, 7), drop_rates=(0.3, 0.5), lambdas=(1.0, 1.1), seeds=3)))
    chosen = [each for each in work if each.split == "validation"]
    assert len({each.cell for each in chosen}) == len(chosen)
    # 4 merges: TA has 2 candidates, DARE, TIES, DELLA and the two of WANDA 4 each.
    assert len(chosen) == 4 * (2 + 5 * 4)
    # 3 experts alone; 4 merges: TA, TIES and WANDA top-K once, DARE, DELLA, WANDA by rank and 2 rates thrice.
    assert len([each for each in work if each.split == "test"]) == 3 + 4 * (3 + 5 * 3)


def test_the_plan_says_what_it_takes_and_downloads_nothing(tmp_path: Path) -> None:
    found = references({}, None, ("base", "lm", "math", "code"))
    plan = plan_json(rows(SMALL), found, None, Rates(tokens_per_second=1000, judge_price=(10, 20)))
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
    grid = Grid(tables=(6,), pruned=(0.5,), seeds=1)
    found = {role: str(tmp_path / role) for role in ("base", "math")}
    plan = plan_json(rows(grid), found, 5, Rates())
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
