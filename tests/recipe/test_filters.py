"""Cases by name: a part of it, a regular expression, the number of the layer, and what is not in it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layered import kept, layered
from recipes import HEAD, recipe_of, told

import della
from della.errors import RecipeError
from della.recipe.reader import read_recipe

NAMES = [
    f"model.layers.{n}.{part}.weight" for n in (0, 1, 7, 12) for part in ("mlp.up_proj", "self_attn.q_proj")
] + ["model.embed_tokens.weight", "lm_head.weight"]  # fmt: skip


def holds(case: dict[str, Any]) -> list[str]:
    recipe = read_recipe(recipe_of(parameters={"weight": [{**case, "value": 2}, {"value": 1}]}), check=False)
    return [name for name in NAMES if recipe.resolve(name, 0)[1][0]["weight"] == 2]


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ({"filter": "layers.1"}, r"layers\.1"),
        ({"filter": "re:layers\\.1\\."}, r"layers\.1\."),
        ({"filter": "re: (up|q)_proj"}, "up_proj|q_proj"),
        ({"filter": "re:^lm_head"}, "^lm_head"),
        ({"layers": 7}, r"layers\.7\."),
        ({"layers": "1-7"}, r"layers\.[17]\."),
        ({"layers": "0, 8 - 12"}, r"layers\.(0|12)\."),
        ({"layers": [0, "7-9"]}, r"layers\.[07]\."),
        ({"not": "proj"}, "embed|lm_head"),
        ({"filter": "mlp", "not": "re:[07]\\."}, r"layers\.(1|12)\.mlp"),
        ({"filter": "q_proj", "layers": "0-1", "not": "layers.0"}, r"layers\.1\.self"),
        ({"filter": "*", "not": "model"}, "lm_head"),
    ],
    ids=str,
)
def test_what_a_case_holds_for(case: dict[str, Any], pattern: str) -> None:
    assert holds(case) == [name for name in NAMES if re.search(pattern, name)]


def test_a_part_of_a_name_is_no_pattern() -> None:
    assert holds({"filter": "m.p"}) == []


MISTAKES = [
    (
        '{filter: "re:(up", value: 1}',
        "'re:(up' of 'weight' is no regular expression",
        '"re:(up)"',
        '"re:(up"',
    ),
    ('{filter: "re:(a+)+b", value: 1}', "may take forever", '"re:(up|down)"', '"re:(a+)+b"'),
    ("{layers: 7-3, value: 1}", "found 7-3", "3-7", "7-3"),
    ("{layers: some, value: 1}", "found some", "[0, 3-7]", "some"),
    ("{layers: [-1], value: 1}", "found [-1]", "3-7", "[-1]"),
    ("{not: [mlp], value: 1}", "'not' of 'weight' must be a part", "mlp", "[mlp]"),
    ("{layer: 3, value: 1}", "did you mean 'layers'", "layers", "layer"),
]


@pytest.mark.parametrize(("case", "said", "better", "worse"), MISTAKES)
def test_mistakes(case: str, said: str, better: str, worse: str) -> None:
    text = HEAD + f"parameters:\n  weight: [{case}, {{value: 2}}]\n"
    found = told(text)
    assert "recipe:7:" in found
    assert said in found
    read_recipe(text.replace(worse, better), check=False)


def test_a_case_for_no_tensor() -> None:
    text = HEAD + "parameters:\n  weight: [{not: '*', value: 1}, {value: 2}]\n"
    assert "leave the case out" in told(text)
    read_recipe(text.replace("{not: '*', value: 1}, ", ""))


@pytest.mark.parametrize("case", ["layers: 7", 'filter: "re:^mlp"', "not: weight"])
def test_a_case_that_holds_for_no_tensor(tmp_path: Path, case: str) -> None:
    kept(tmp_path, "a", layered(1, 2))
    text = (
        f"merge_method: passthrough\nmodels:\n- model: a\n  parameters: {{scale: [{{{case}, value: 2}}]}}\n"
    )
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(
        RecipeError, match=r"recipe.yml:4:.* holds for no tensor; .*, for example, "
    ) as caught:
        della.plan(tmp_path / "recipe.yml")
    (tmp_path / "recipe.yml").write_text(text.replace(case, f"filter: {str(caught.value).split()[-1]}"))
    della.plan(tmp_path / "recipe.yml").close()


@given(st.text("ab.(|)[]*+?{,}1\\\\^$", max_size=30))
def test_no_pattern_takes_long(pattern: str) -> None:
    made = recipe_of(parameters={"weight": [{"filter": f"re:{pattern}", "value": 2}, {"value": 1}]})
    started = time.process_time()
    try:
        recipe = read_recipe(made, check=False)
    except RecipeError:
        return
    recipe.resolve("a" * 30 + "." + "b" * 30, 0)
    assert time.process_time() - started < 5
