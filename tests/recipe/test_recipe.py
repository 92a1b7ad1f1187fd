"""What a recipe means: keys, settings and their precedence, gradients, identities, rules, overrides."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import HEAD, recipe_of, told

from della.dtypes import DTYPES
from della.errors import Location, RecipeError, printable
from della.merging.registry import METHODS
from della.recipe.reader import read_recipe
from della.recipe.settings import Gradient


def test_everything_a_recipe_may_say(tmp_path: Path) -> None:
    text = dedent("""\
        # Two experts and the base's own entry.
        name: trio
        merge_method: della
        base_model: owner/base
        models:
          - model: owner/base
          - model: owner/math
            parameters: {weight: 0.5, density: [0.9, 0.7], epsilon: 1e-2}
          - model: 'E:\\merges\\code'
        parameters:
          weight: 2
          lambda: "0.9"
        dtype: float32
        out_dtype: torch.bfloat16
        tokenizer_source: base
        chat_template:
        seed: 7
        compat: mergekit
        """)
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    recipe = read_recipe(path)
    assert read_recipe(str(path)) == recipe
    assert (recipe.path, recipe.text, recipe.name) == (path, text, "trio")
    assert (recipe.base_model, recipe.merge_method) == ("owner/base", "della")
    assert recipe.method is METHODS["della"]
    assert (recipe.dtype, recipe.out_dtype) == (DTYPES["F32"], DTYPES["BF16"])
    assert (recipe.seed, recipe.compat, recipe.notes) == (7, True, ())
    assert [m.reference for m in recipe.models] == ["owner/math", "E:\\merges\\code"]
    assert [m.identity for m in recipe.models] == ["math", "code"]
    assert [m.line for m in recipe.models] == [7, 9]
    shared, models = recipe.resolve("model.layers.0.mlp.up_proj.weight", 0.5)
    assert shared["lambda"] == 0.9
    assert shared["rank_by"] == "row"
    assert [m["weight"] for m in models] == [0.5, 2.0]
    assert [m["density"] for m in models] == [pytest.approx(0.8), 1.0]
    assert [m["epsilon"] for m in models] == [0.01, None]
    assert set(shared) | set(models[0]) == set(METHODS["della"].parameters)


def test_defaults() -> None:
    recipe = read_recipe(HEAD)
    assert (recipe.path, recipe.text, recipe.name) == (None, HEAD, None)
    assert (recipe.dtype, recipe.out_dtype, recipe.seed, recipe.compat) == (None, None, 42, False)
    assert (
        recipe.resolve("x", 0.0)[1]
        == ({"weight": 1.0, "density": 1.0, "epsilon": None, "window_size": None},) * 2
    )


def test_known_settings_without_effect_are_notes() -> None:
    recipe = read_recipe(
        dedent("""\
        merge_method: task_arithmetic
        base_model: owner/base/
        models:
          - model: owner/base
            parameters: {weight: 3, density: 0.1}
          - model: owner/math
            parameters: {density: 0.1, weight: 0.2}
          - model: owner/code
            parameters: {density: 0.1}
        parameters: {int8_mask: true}
        """)
    )
    assert recipe.notes == (
        "recipe:5:5: model 1 is the base model itself, so its parameters have no effect",
        "recipe:10:14: 'int8_mask' has no effect here: masks are not kept, so they take no memory",
        "recipe:7:18: 'density' has no effect with merge_method task_arithmetic (it is set in 2 locations)",
    )
    assert dict(recipe.parameters) == {}
    assert list(recipe.models[0].parameters) == ["weight"]


def test_linear_keeps_the_base_among_its_models() -> None:
    text = "merge_method: linear\nbase_model: b\nmodels:\n- model: b\n- model: x\n"
    assert [m.identity for m in read_recipe(text).models] == ["b", "x"]
    text = "merge_method: linear\nbase_model: b\nmodels:\n- model: x\n"
    said = "recipe:2:13: base_model has no part in merge_method linear unless 'models' lists it too"
    assert read_recipe(text).notes == (said,)


def test_one_reference_twice() -> None:
    recipe = read_recipe(recipe_of(models=[{"model": "a/x"}, {"model": "b/x"}, {"model": "a/x/"}]))
    assert [m.identity for m in recipe.models] == ["x", "x#2", "x#3"]
    assert recipe.notes == ("recipe at models.2: a/x/ is listed twice; it counts as two experts",)
    text = HEAD + "  - model: owner/math\n"
    assert read_recipe(text).notes == (
        "recipe:6:5: owner/math is listed twice, first in line 4; it counts as two experts",
    )


@pytest.mark.parametrize(
    ("reference", "identity"),
    [
        ("owner/name", "name"),
        ("owner/name@main", "name"),
        ("owner/name@refs/pr/12", "name"),
        ("name", "name"),
        ("./runs/math-v1.5/", "math-v1.5"),
        ("/data/me@work/model", "model"),
        ("E:\\merges\\Rocinante 12B v1.1", "Rocinante 12B v1.1"),
        ("D:/a/b\\c\\", "c"),
        ("x/Qwen2.5-14B", "Qwen2.5-14B"),
        ("x/expert.safetensors", "expert"),
        ("x/EXPERT.BIN", "EXPERT"),
        ("/", "/"),
    ],
)
def test_identity(reference: str, identity: str) -> None:
    assert read_recipe(recipe_of(models=[{"model": reference}])).models[0].identity == identity


def test_identities_stay_apart_even_from_names_that_look_counted() -> None:
    models = [{"model": m} for m in ("a/x#2", "a/x", "b/x", "c/x", "d/x#2")]
    names = [m.identity for m in read_recipe(recipe_of(models=models)).models]
    assert names == ["x#2", "x", "x#3", "x#4", "x#2#2"]


def test_python_objects_and_numpy_values_are_the_same_dialect() -> None:
    own_settings = {"weight": np.linspace(0, 1, 3), "density": np.float64(0.5)}
    recipe = read_recipe(
        {
            "merge_method": "dare_ties",
            "base_model": Path("/models/base"),
            "models": (
                {"model": "owner/math", "parameters": own_settings},
            ),
            "parameters": {"lambda": np.float32(0.5), "normalize": np.bool_(True)},
            "seed": np.int64(3),
            "name": None,
        }
    )  # fmt: skip
    assert (recipe.base_model, recipe.seed, recipe.name) == (str(Path("/models/base")), 3, None)
    shared, (own,) = recipe.resolve("x", 0.25)
    assert (shared["lambda"], shared["normalize"], own) == (0.5, True, {"weight": 0.25, "density": 0.5})
    again = read_recipe(recipe.text)
    assert (again.models[0].parameters, again.parameters) == (recipe.models[0].parameters, recipe.parameters)
    assert recipe.models[0].line == 0


def test_a_models_own_setting_goes_first_then_the_recipes_then_the_default() -> None:
    only_mlp = [{"filter": "mlp", "value": 0.25}, {"filter": "norm", "value": [0, 1]}]
    recipe = read_recipe(
        recipe_of(
            models=[
                {
                    "model": "a",
                    "parameters": {"weight": only_mlp, "density": {"filter": "mlp", "value": 0.5}},
                },
                {"model": "b"},
            ],
            parameters={"weight": [{"filter": "norm", "value": 7}, {"filter": "attn", "value": 0.75}]},
        )
    )
    weights = {
        name: tuple(own["weight"] for own in recipe.resolve(f"model.layers.1.{name}", 0.5)[1])
        for name in ("mlp.up", "norm", "attn.q", "embed")
    }
    assert weights == {"mlp.up": (0.25, 1.0), "norm": (0.5, 7.0), "attn.q": (0.75, 0.75), "embed": (1.0, 1.0)}
    assert [recipe.resolve(name, 0.0)[1][0]["density"] for name in ("mlp", "attn")] == [0.5, 1.0]


@pytest.mark.parametrize(
    "everything", [{"filter": "*", "value": 3}, {"value": 3}, {"filter": None, "value": 3}]
)
def test_a_case_for_everything(everything: dict[str, Any]) -> None:
    recipe = read_recipe(recipe_of(parameters={"weight": [{"filter": "mlp", "value": 2}, everything]}))
    assert [recipe.resolve(name, 0.0)[1][0]["weight"] for name in ("mlp", "", "x")] == [2.0, 3.0, 3.0]


def test_gradients_of_words_step_and_of_whole_numbers_round() -> None:
    fuses = recipe_of(parameters={"fuse": ["mean", "sum", "mean"], "rescale": [True, "none"]})
    recipe = read_recipe(fuses)
    assert [recipe.resolve("x", t)[0]["fuse"] for t in (0, 0.49, 0.5, 0.99, 1)] == [
        "mean",
        "mean",
        "sum",
        "sum",
        "mean",
    ]
    assert [recipe.resolve("x", t)[0]["rescale"] for t in (0, 0.99, 1)] == [True, True, "none"]
    assert Gradient((1, 4), Location(0, 0, "")).at(0.5) == 2


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    t=st.floats(0, 1),
    spread=st.integers(1, 80),
)
def test_gradients_are_linear_interpolation(values: list[float], t: float, spread: int) -> None:
    recipe = read_recipe(recipe_of("task_arithmetic", parameters={"weight": values}))
    knots = np.linspace(0, 1, len(values))
    for at in (t, *(i / spread for i in range(spread + 1))):
        found = recipe.resolve("x", at)[1][0]["weight"]
        assert found == pytest.approx(np.interp(at, knots, values), rel=1e-9, abs=1e-8)
        assert min(values) <= found <= max(values)
    assert recipe.resolve("x", 0.0)[1][0]["weight"] == values[0]
    assert recipe.resolve("x", 1.0)[1][0]["weight"] == values[-1]


@given(st.floats(-1e300, 1e300))
def test_numbers_survive_the_dump(value: float) -> None:
    recipe = read_recipe(recipe_of("task_arithmetic", parameters={"weight": value}))
    assert read_recipe(recipe.text).resolve("x", 0.0) == recipe.resolve("x", 0.0)


def test_rules_that_join_parameters_are_held_when_reading() -> None:
    said = "gives keep probabilities from -0.05 to 0.25, which leave [0, 1]; use an epsilon of at most 0.1"
    own = "    parameters: {density: 0.1}\n"
    assert told(HEAD + own) == f"recipe:6:27: code: density 0.1 with epsilon 0.15 {said}"
    own = "    parameters: {density: [0.8, 0.1]}\n"
    at_depth_1 = said.replace("1];", "1], at the last layer (depth 1);")
    assert told(HEAD + own) == f"recipe:6:27: code: density 0.1 with epsilon 0.15 {at_depth_1}"
    assert told(HEAD + "parameters:\n  window_size: 0.2\n  epsilon: 0.1\n") == (
        "2 problems:\n"
        "  - recipe:7:16: math: window_size is 2 * epsilon, so only one of them may be given\n"
        "  - recipe:7:16: code: window_size is 2 * epsilon, so only one of them may be given"
    )
    assert told(HEAD + "parameters: {fuse: sum, normalize: true}\n") == (
        "recipe:6:36: normalize: true contradicts fuse: sum; keep one of them"
    )


def test_check_names_label_tensor_model_and_line() -> None:
    recipe = read_recipe(
        HEAD + "    parameters:\n      density: [{filter: mlp, value: [0.8, 0.05, 0.8]}, {value: 0.5}]\n"
    )
    points = [
        (f"model.layers.{i}.{part}", i / 4, f"layer {i}") for i in range(5) for part in ("mlp.up", "attn.q")
    ]
    with pytest.raises(RecipeError) as caught:
        recipe.check(points)
    assert str(caught.value) == (
        "recipe:7:38: code: density 0.05 with epsilon 0.15 gives keep probabilities from -0.1 to 0.2, which "
        "leave [0, 1], at layer 2 (model.layers.2.mlp.up); use an epsilon of at most 0.05"
    )
    recipe.check(point for point in points if "attn" in point[0])


def test_check_tells_only_the_first_few() -> None:
    recipe = read_recipe(HEAD + "    parameters:\n      density: [{filter: mlp, value: [0.01, 0.14]}]\n")
    with pytest.raises(RecipeError, match=r"^5 problems:\n") as caught:
        recipe.check((f"layers.{i}.mlp", i / 99, f"layer {i}") for i in range(100))
    assert caught.value.problems[4].tensor == "layers.4.mlp"
    assert "at layer 4 (layers.4.mlp)" in str(caught.value)


def test_a_rule_about_all_models_together_names_none_of_them() -> None:
    models = [{"model": f"owner/m{i}"} for i in range(9)]
    assert told(recipe_of(models=models, parameters={"fuse": "calibrated"})) == (
        "recipe at parameters.fuse: fuse: calibrated is computed for at most 8 experts, and here are 9; "
        "use fuse: mean"
    )


def test_overrides_by_path_and_everywhere() -> None:
    text = HEAD + "    parameters: {weight: 0.5, density: 0.9}\n"
    sets = ["density=[0.5, 0.8]", "models.0.parameters.weight=3", "dtype=float16", "parameters.lambda=1e-1"]
    recipe = read_recipe(text, overrides=[*sets, "merge_method=della_linear", "seed=9"])
    shared, models = recipe.resolve("x", 0.0)
    assert [(m["weight"], m["density"]) for m in models] == [(3.0, 0.5), (0.5, 0.5)]
    assert (shared["lambda"], recipe.dtype, recipe.merge_method, recipe.seed) == (
        0.1,
        DTYPES["F16"],
        "della_linear",
        9,
    )
    assert recipe.notes == (
        "overrides density=[0.5, 0.8]: this holds for every model and replaces the setting of one model",
    )
    assert recipe.text == dedent("""\
        merge_method: della_linear
        base_model: owner/base
        models:
        - model: owner/math
          parameters:
            weight: 3
        - model: owner/code
          parameters:
            weight: 0.5
        parameters:
          density: [0.5, 0.8]
          lambda: 1e-1
        dtype: float16
        seed: 9
        """)
    again = read_recipe(recipe.text)
    assert (again.models, again.parameters) == (recipe.models, recipe.parameters)
    assert read_recipe(text, overrides=["parameters.weight=2", "epsilon=0"]).notes == ()


def test_an_override_of_an_aliased_setting_reaches_one_model_only() -> None:
    text = HEAD.replace("math\n", "math\n    parameters: &both {weight: 0.5}\n") + "    parameters: *both\n"
    assert [m["weight"] for m in read_recipe(text).resolve("x", 0.0)[1]] == [0.5, 0.5]
    recipe = read_recipe(text, overrides=["models.1.parameters.weight=2"])
    assert [m["weight"] for m in recipe.resolve("x", 0.0)[1]] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lambda", "an override has the form KEY=VALUE, such as lambda=0.9 or models.0.parameters.weight=1"),
        ("models..x=1", ("an override has the form KEY=VALUE, such as lambda=0.9 or "
                         "models.0.parameters.weight=1")),
        ("lamda=1", "unknown key 'lamda'; did you mean 'lambda'?"),
        ("models.7.model=x", "models has 2 entries, 0 to 1; '7' is none of them"),
        ("models.first.model=x", "models has 2 entries, 0 to 1; 'first' is none of them"),
        ("dtype.x=1", "'dtype' must be text, found a mapping"),
        ("merge_method.x=1", "merge_method is 'della', which has no 'x' in it"),
        ("density=2", "'density' must lie between 0 and 1, found 2"),
        ("density=", "'density' has no value"),
        ("lambda=[1, ", "a bracket before this is not closed, or a comma is missing"),
        ("lambda=\udc80", "the character U+DC80 is not allowed in a recipe; remove it"),
        ("models.0.density=1", ("'density' belongs under the parameters of model 1:\n      parameters:\n    "
                                "    density: 1")),
        ("parameters.x.y=1", "unknown key 'x' in parameters"),
        ("parameters={weight: 1, weight: 2}", ("the key 'weight' stands twice, here and before; keep one of "
                                               "them")),
    ],
)  # fmt: skip
def test_mistakes_in_overrides_name_the_override(override: str, message: str) -> None:
    assert told(HEAD, overrides=[override]) == f"overrides {printable(override)}: {message}"
