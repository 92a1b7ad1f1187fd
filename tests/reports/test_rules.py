"""Settings that silently gave another merge than their writer meant: negative weights, cases by name, the
same model under two names, values cut by a dtype; and how a recipe names a model."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from hypothesis import given, settings
from hypothesis import strategies as st

import della
from della.checkpoint.source import open_source
from della.errors import RecipeError
from della.recipe.reader import read_recipe

Tensors = dict[str, Any]
BASE: Tensors = {
    "layers.0.q_proj.weight": np.arange(64, dtype=np.float32).reshape(8, 8) / 64,
    "layers.0.up_proj.weight": np.ones((8, 4), np.float32),
    "layers.1.q_proj.weight": -np.arange(64, dtype=np.float32).reshape(8, 8) / 64,
}


def tuned(seed: int, base: Tensors = BASE) -> Tensors:
    rng = np.random.default_rng(seed)
    return {k: (v + rng.normal(0, 0.05, v.shape)).astype(v.dtype) for k, v in base.items()}


def models(folder: Path, **tensors: Tensors) -> None:
    for name, own in ({"base": BASE, "one": tuned(1), "two": tuned(2)} | tensors).items():
        put(folder, {f"{name}/model.safetensors": own})


def recipe(folder: Path, entries: dict[str, Any], method: str = "task_arithmetic", **more: Any) -> Path:
    made: dict[str, Any] = {"merge_method": method} | ({} if method == "linear" else {"base_model": "base"})
    made["models"] = [{"model": name, "parameters": own} for name, own in entries.items()]
    path = folder / "recipe.yml"
    path.write_text(json.dumps(made | more))
    return path


def merged(path: Path, **options: Any) -> Tensors:
    out = path.parent / "out"
    della.merge(path, out, fsync=False, overwrite=True, **options)
    with open_source(str(out)) as model:
        return {name: view.read() for name, view in model.tensors.items()}


def notes(path: Path, **options: Any) -> list[str]:
    with della.plan(path, **options) as plan:
        return [*plan.notes, *plan.departures]


# ---- negative weights, and weights that nearly cancel -----------------------------------------------------

ELECTING = ["ties", "della", "paper_ta", "paper_dare", "paper_ties", "paper_della"]


@pytest.mark.parametrize(
    "method", [*ELECTING, "dare_ties", "breadcrumbs_ties", "task_arithmetic", "della_linear"]
)
def test_one_negative_weight_keeps_its_sign(tmp_path: Path, method: str) -> None:
    base, one = {"w": np.zeros((2, 4), np.float32)}, {"w": np.full((2, 4), 0.5, np.float32)}
    models(tmp_path, base=base, one=one)
    parameters: dict[str, Any] = {} if method in ELECTING else {"normalize": True}
    parameters |= {"gamma": 0} if "breadcrumbs" in method else {}
    found = merged(recipe(tmp_path, {"one": {"weight": -0.3, "density": 1}}, method, parameters=parameters))[
        "w"
    ]
    assert np.allclose(found, -0.5), "the mean of one delta is that delta, with the weight's sign"


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_mean_never_leaves_what_is_averaged(weights: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(3, 5)).astype(np.float32)
    deltas = rng.normal(size=(len(weights), 3, 5)).astype(np.float32)
    experts = [base + delta for delta in deltas]
    found = della.merge_tensors(base, experts, method="ties", weights=weights) - base
    parts = np.array(weights, np.float32)[:, None, None] * (np.array(experts) - base)
    sign = np.sign(parts.sum(axis=0))
    agrees = np.sign(parts) == sign
    sizes = np.where(agrees, np.abs(np.array(weights))[:, None, None], 0).sum(axis=0)
    wanted = np.where(agrees, parts, 0).sum(axis=0) / np.where(sizes == 0, 1, sizes)
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.abs(found).max() <= np.abs(np.array(experts) - base).max() * (1 + 1e-5)


def test_compat_keeps_the_other_rule_and_says_so(tmp_path: Path) -> None:
    base, one = {"w": np.zeros((2, 4), np.float32)}, {"w": np.full((2, 4), 0.5, np.float32)}
    models(tmp_path, base=base, one=one)
    path = recipe(tmp_path, {"one": {"weight": -0.3}}, "ties")
    assert np.allclose(merged(path, compat=True)["w"], 0.5)
    assert any("turns its own sign round" in note for note in notes(path, compat=True))
    assert any("sum of |weight|" in note for note in notes(path))
    models(tmp_path)
    assert not any(
        "weight" in n for n in notes(recipe(tmp_path, {"one": {"weight": 0.3}}, "ties"), compat=True)
    )


@pytest.mark.parametrize("weights", [(1, -0.999), (1, 1, -1.95), (0.5, -0.5), (-1, 0.95)])
def test_a_mean_of_models_whose_weights_nearly_cancel(tmp_path: Path, weights: tuple[float, ...]) -> None:
    models(tmp_path, three=tuned(3))
    entries = {
        name: {"weight": weight} for name, weight in zip(("one", "two", "three"), weights, strict=False)
    }
    with pytest.raises(RecipeError, match=r"nearly cancel|no mean") as told:
        della.plan(recipe(tmp_path, entries, "linear"))
    assert told.value.problems[0].parameter == "weight"
    assert f"{weights[1]:g}" in str(told.value)
    path = recipe(tmp_path, entries, "linear", parameters={"normalize": False})  # the cure that is named
    wanted = sum(w * tuned(k)["layers.0.q_proj.weight"] for k, w in enumerate(weights, 1))
    assert np.allclose(merged(path)["layers.0.q_proj.weight"], wanted, atol=1e-6)


def test_a_gradient_that_cancels_on_the_way(tmp_path: Path) -> None:
    models(tmp_path)
    with pytest.raises(RecipeError, match=r"last layer|layer 1"):
        della.plan(recipe(tmp_path, {"one": {"weight": 1}, "two": {"weight": [0, -1]}}, "linear"))


def test_extrapolation_is_no_cancelling(tmp_path: Path) -> None:
    models(tmp_path)
    found = merged(recipe(tmp_path, {"one": {"weight": 1.5}, "two": {"weight": -0.5}}, "linear"))
    name = "layers.0.up_proj.weight"
    assert np.allclose(found[name], 1.5 * tuned(1)[name] - 0.5 * tuned(2)[name], atol=1e-6)


# ---- the same files under two names -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./base", "base/", "base/model.safetensors", "linked", "hard", "ABSOLUTE"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_base_under_another_name_is_no_expert(tmp_path: Path, name: str, method: str) -> None:
    models(tmp_path)
    (tmp_path / "linked").symlink_to("base")
    (tmp_path / "hard").mkdir()
    os.link(tmp_path / "base/model.safetensors", tmp_path / "hard/model.safetensors")
    name = str(tmp_path / "base") if name == "ABSOLUTE" else name
    path = recipe(
        tmp_path, {name: {"weight": 1}, "one": {"weight": 1}}, method, parameters={"normalize": True}
    )
    found = merged(path)
    for key, values in tuned(1).items():
        assert np.allclose(found[key], values, atol=1e-6), "the delta is not halved"
    if name not in ("base/",):
        assert any("the base model itself" in note for note in notes(path))
    assert della.verify(tmp_path / "out", sources=1.0, inputs=True, base_dir=tmp_path).is_well


def test_only_the_base_under_another_name(tmp_path: Path) -> None:
    models(tmp_path)
    with pytest.raises(della.DellaError, match="only the base model"):
        della.plan(recipe(tmp_path, {"./base": {"weight": 1}}))


def test_one_expert_under_two_names_is_told(tmp_path: Path) -> None:
    models(tmp_path)
    path = recipe(tmp_path, {"one": {"weight": 1}, "./one": {"weight": 1}, "two": {"weight": 1}})
    assert [note for note in notes(path) if "same files as one" in note and note.startswith("./one")]
    assert not [note for note in notes(recipe(tmp_path, {"one": {}, "two": {}})) if "same files" in note]


# ---- cases by name ----------------------------------------------------------------------------------------


def case(value: Any, part: str | None = None) -> dict[str, Any]:
    return {"value": value} if part is None else {"filter": part, "value": value}


def test_a_weight_for_some_tensors_is_none_for_the_others(tmp_path: Path) -> None:
    models(tmp_path)
    own = {"weight": [case(0.5, "q_proj")]}
    with pytest.raises(
        RecipeError, match=r"'weight' of one has no value for layers.0.up_proj.weight"
    ) as told:
        della.plan(recipe(tmp_path, {"one": own}))
    assert told.value.problems[0].tensor == "layers.0.up_proj.weight"
    wanted = BASE["layers.0.up_proj.weight"] + 0.25 * (tuned(1)["layers.0.up_proj.weight"] - 1)
    for shared in ({"weight": 0.25}, {}):  # the cures that are named
        entry = own if shared else {"weight": [case(0.5, "q_proj"), case(0.25)]}
        found = merged(recipe(tmp_path, {"one": entry}, parameters=shared))
        assert np.allclose(found["layers.0.up_proj.weight"], wanted, atol=1e-6)


def test_a_density_falls_to_its_default(tmp_path: Path) -> None:
    models(tmp_path)
    path = recipe(tmp_path, {"one": {"weight": 1, "density": [case(0.5, "q_proj")]}}, "ties")
    with della.plan(path) as plan:
        found = {job.name: job.operands[0].expert["density"] for job in plan.jobs}
    assert found == {name: 0.5 if "q_proj" in name else 1.0 for name in BASE}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("mlp", "is in the name of no tensor"),
        ("layers.*.q_proj", "no pattern"),
        ("layers.[0]", "no pattern"),
        ("q_porj", "did you mean 'q_proj'"),
        ("^layers", "no pattern"),
    ],
)
def test_a_filter_that_matches_nothing(tmp_path: Path, part: str, words: str) -> None:
    models(tmp_path)
    path = recipe(tmp_path, {"one": {"weight": [case(0.2, part), case(1)]}})
    with pytest.raises(RecipeError, match="is in the name of no tensor") as told:
        della.plan(path)
    assert words in str(told.value)
    assert part in told.value.problems[0].said


def test_a_case_behind_one_without_filter(tmp_path: Path) -> None:
    models(tmp_path)
    for first in (case(1), case(1, "*")):
        path = recipe(tmp_path, {"one": {"weight": [first, case(0.2, "q_proj")]}})
        with pytest.raises(RecipeError, match=r"never reached.*put the case without filter last"):
            della.plan(path)
    merged(recipe(tmp_path, {"one": {"weight": [case(0.2, "q_proj"), case(1, "*")]}}))


def test_the_plan_counts_what_each_case_holds_for(tmp_path: Path) -> None:
    from della.planning.describe import plan_json, plan_text

    models(tmp_path)
    path = recipe(tmp_path, {"one": {"weight": [case(0.5, "layers.0"), case(0.2, "q_proj"), case(1)]}})
    with della.plan(path) as plan:
        found, text = plan_json(plan, 1)["filters"], plan_text(plan, 1)
    assert [(row["filter"], row["tensors"]) for row in found] == [("layers.0", 2), ("q_proj", 1), ("", 0)]
    assert "one: weight, q_proj: 1 tensors" in text


# ---- values that a dtype cuts -----------------------------------------------------------------------------


def island() -> Tensors:
    return {
        "w": np.ones((8, 8), ml_dtypes.bfloat16),
        "mlp.gate.bias": (10 + np.arange(8) * 0.001).astype(np.float32),
    }


def test_a_float32_island_is_told(tmp_path: Path) -> None:
    models(tmp_path, base=island(), one={k: (v * 1.5).astype(v.dtype) for k, v in island().items()})
    path = recipe(tmp_path, {"one": {"weight": 1}}, dtype="bfloat16")
    (note,) = [note for note in notes(path) if "mlp.gate.bias" in note]
    values = island()["mlp.gate.bias"]
    changed = int((values.astype(ml_dtypes.bfloat16).astype(np.float32) != values).sum())
    assert "float32" in note
    assert f"changes {changed} of 8 values" in note
    path = recipe(tmp_path, {"one": {"weight": 1}})  # the cure that is named
    assert merged(path)["mlp.gate.bias"].dtype == np.float32
    assert not [note for note in notes(path) if "mlp.gate.bias" in note]


# ---- how a recipe names a model ---------------------------------------------------------------------------

FORMS: list[Any] = [
    {"path": "one"},
    {"model": "one"},
    {"model": {"path": "one"}},
    {"path": "one", "lora": None},
]


@pytest.mark.parametrize(("base", "form"), list(itertools.product(["base", {"path": "base"}], FORMS)))
def test_mappings_that_name_a_model(tmp_path: Path, base: Any, form: Any) -> None:
    models(tmp_path)
    made = {"merge_method": "task_arithmetic", "base_model": base, "models": [{"model": form}]}
    (tmp_path / "recipe.yml").write_text(json.dumps(made))
    found = merged(tmp_path / "recipe.yml")
    assert all(np.allclose(found[name], values, atol=1e-6) for name, values in tuned(1).items())


def test_a_revision_stands_behind_the_name() -> None:
    form = {"path": "owner/name", "revision": "v2"}
    made = {"merge_method": "linear", "models": [{"model": form}, {"model": {"model": form}}]}
    assert [model.reference for model in read_recipe(made).models] == ["owner/name@v2"] * 2


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"model": "one", "lora": "adapter"}, "LoRA adapter"),
        ({"model": {"path": "one"}, "lora": {"path": "adapter"}}, "LoRA adapter"),
        ({"path": "one", "model": "two"}, "needs one of 'path' and 'model'"),
        ({"revision": "v2"}, "needs one of 'path' and 'model'"),
        ({"path": ["one"]}, "must be text"),
        ({"pathh": "one"}, "did you mean 'path'"),
        ({"path": "one", "revision": [1]}, "revision"),
    ],
)
def test_mappings_that_name_none(form: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe({"merge_method": "linear", "models": [{"model": form}]})


def test_a_recipe_of_a_mixture_is_named_as_one() -> None:
    made = {
        "base_model": "b",
        "gate_mode": "hidden",
        "experts": [{"source_model": "x", "positive_prompts": []}],
    }
    with pytest.raises(RecipeError, match="mergekit-moe"):
        read_recipe(made)


def test_a_buffer_of_the_first_model_that_others_lack(tmp_path: Path) -> None:
    one = tuned(1) | {"position_ids": np.arange(4)}
    models(tmp_path, one=one)
    path = recipe(tmp_path, {"one": {}, "two": {}}, "linear")
    assert [note for note in notes(path) if note.startswith("two: lacks position_ids")]
    found = merged(path)
    assert found["position_ids"].tolist() == [0, 1, 2, 3]
    name = "layers.0.up_proj.weight"
    assert np.allclose(found[name], (tuned(1)[name] + tuned(2)[name]) / 2, atol=1e-6)
