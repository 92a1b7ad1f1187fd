"""Merges that must not be: each is refused in plain words, and leaves the disk as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put, tree
from llamas import EXPERTS, Tensors, load, recipe, save, shapes, weights

import della
from della.dtypes import DTYPES
from della.errors import CheckpointError, DellaError, OutputError, RecipeError

CURE = "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"
PLAIN: list[dict[str, Any]] = [{}] * 3


def small(dtype: Any = np.float32) -> dict[str, Tensors]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4, 50))
    made = {"base": {"w": base, "v": base[0]}}
    for name in EXPERTS:
        made[name] = {"w": base + rng.standard_normal((4, 50)) / 10, "v": base[0] / 2}
    return {name: {key: v.astype(dtype) for key, v in tensors.items()} for name, tensors in made.items()}


def refused(kind: type[DellaError], made: Mapping[str, Any], out: Path, **options: Any) -> str:
    before = tree(out.parent)
    with pytest.raises(kind) as caught:
        della.merge(made, out, fsync=False, **options)
    assert tree(out.parent) == before
    return str(caught.value)


# ---- values -----------------------------------------------------------------------------------------------

KINDS = [row for row in DTYPES.values() if row.is_float]


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
@pytest.mark.parametrize("method", ["della", "linear"])
@pytest.mark.parametrize("model", ["base", "code"])
def test_nan_in_an_input(tmp_path: Path, row: Any, method: str, model: str) -> None:
    tensors = small(row.numpy)
    tensors[model]["w"][2, 17] = np.nan
    tensors[model]["w"][3, 1] = np.nan
    save(tmp_path / "models", tensors)
    made = recipe(tmp_path / "models", method, PLAIN, {}) | {"plain_fp8": row.bits == 8}
    if (method, model) == ("linear", "base"):  # of which it has no part
        della.merge(made, tmp_path / "out", fsync=False)
        return
    site = tmp_path / "models" / model
    for tile in (60, 1 << 17):
        assert refused(CheckpointError, made, tmp_path / "out", tile=tile) == (
            f"{site}/model.safetensors: tensor w of {site} holds 2 values that are NaN or infinite "
            f"(the first is element 117: nan); such a model is damaged: get it again, or {CURE}"
        )


def test_infinity_in_an_input_is_found_by_every_look_at_it(tmp_path: Path) -> None:
    tensors = small()
    tensors["story"]["v"][49] = -np.inf
    save(tmp_path / "models", tensors)
    looks = [("ties", {"scope": "model"}), ("della", {"rank_by": "tensor"}), ("della", {"rescale": "l1"})]
    for method, shared in looks:
        made = recipe(tmp_path / "models", method, [{"density": 0.5}] * 3, shared)
        assert (
            "models/story holds 1 value that is NaN or infinite (the first is element 49: -inf)"
            in refused(CheckpointError, made, tmp_path / "out")
        )
    made = recipe(tmp_path / "models", "ties", PLAIN, {}, compat="mergekit")
    assert "(the first is element 49: -inf)" in refused(CheckpointError, made, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "storage", "becomes"),
    [
        ("float16", np.float32, "inf"),
        ("bfloat16", np.float32, "inf"),
        ("float32", np.float64, "inf"),
        ("float8_e5m2", np.float32, "inf"),
        ("float8_e4m3fn", np.float32, "nan"),
    ],
)
def test_a_value_too_large_for_the_result(tmp_path: Path, dtype: str, storage: Any, becomes: str) -> None:
    tensors = small(storage)
    for name in EXPERTS:
        tensors[name]["w"][3, 7] = {"bfloat16": 3.4e38, "float32": 1e39}.get(dtype, 7e4)
    save(tmp_path / "models", tensors)
    put(tmp_path / "out", {"model.safetensors": b"old", "config.json": {}})
    for method in ("task_arithmetic", "linear"):
        made = recipe(tmp_path / "models", method, PLAIN, {}, out_dtype=dtype)
        if method == "task_arithmetic":
            made["parameters"] = {"normalize": True}
        assert refused(OutputError, made, tmp_path / "out", overwrite="any", tile=60) == (
            f"w: element 157 becomes {becomes} when it is rounded to {dtype}; "
            f"choose a wider out_dtype, or a smaller lambda; or {CURE}"
        )


def test_a_failure_in_one_tensor_stops_the_others(tmp_path: Path) -> None:
    """Many tensors, four threads, one of them bad: one error, and nothing left."""
    tensors = {f"t{number}": np.ones((50, 40), np.float32) for number in range(200)}
    bad = {**tensors, "t77": np.full((50, 40), np.nan, np.float32)}
    save(tmp_path / "models", {"base": tensors, "math": tensors, "code": bad, "story": tensors})
    made = recipe(tmp_path / "models", "della", [{"density": 0.5}] * 3, {})
    assert "tensor t77 of" in refused(CheckpointError, made, tmp_path / "deep/er/out", threads=4, tile=40)
    assert not (tmp_path / "deep").exists(), "folders made for the result go too"


# ---- models that do not fit -------------------------------------------------------------------------------


def against(folder: Path, name: str) -> str:
    return f"{folder}/{name}: against {folder}/base"


def test_tensors_that_are_missing_or_do_not_fit_are_all_told(tmp_path: Path) -> None:
    tensors = {name: weights(shapes(), 0, np.float32) for name in ("base", *EXPERTS)}
    for layer in range(3):
        del tensors["math"][f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["math"]["model.norm.weight"]
    del tensors["code"]["model.norm.weight"]
    tensors["code"]["model.layers.0.mlp.up_proj.weight"] = np.zeros((40, 25), np.float32)
    tensors["story"]["model.norm.weight"] = np.zeros(24, np.int32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors["story"][name] = np.zeros((52, 24), np.float32)
    folder = save(tmp_path / "models", tensors)
    lines = refused(CheckpointError, recipe(folder, "ties", PLAIN, {}), tmp_path / "out").splitlines()
    fit = "all models must be fine-tunes of one base; or 'missing: base' to take the base's"
    rows = "has shape [52, 24], expected [50, 24]; this model's vocabulary is larger: merge a version of it"
    assert lines[0] == "6 problems:"
    assert sorted(lines[1:]) == sorted(
        [
            f"  - {against(folder, 'math')}: lacks model.layers.0.mlp.up_proj.weight, "
            "model.layers.1.mlp.up_proj.weight, model.layers.2.mlp.up_proj.weight, model.norm.weight; "
            f"{fit}",
            f"  - {against(folder, 'code')}: lacks model.norm.weight; {fit}",
            f"  - {against(folder, 'code')}: model.layers.0.mlp.up_proj.weight has shape [40, 25], "
            "expected [40, 24]",
            f"  - {against(folder, 'story')}: model.embed_tokens.weight {rows} without the added rows",
            f"  - {against(folder, 'story')}: lm_head.weight {rows} without the added rows",
            f"  - {against(folder, 'story')}: model.norm.weight is stored as I32, expected F32",
        ]
    )


def test_what_the_base_lacks_is_refused_left_out_or_copied(tmp_path: Path) -> None:
    tensors = small()
    for number in range(4):
        tensors["code"][f"extra{number}"] = np.zeros(3, np.float32)
    tensors["math"]["extra0"] = np.zeros(3, np.float32)
    folder = save(tmp_path / "models", tensors)
    made = recipe(folder, "ties", PLAIN, {})
    ways = "write 'extra: ignore' to leave that out, or 'extra: copy' to take it over"
    four = "extra0, extra1, extra2, extra3"
    assert refused(CheckpointError, made, tmp_path / "out").splitlines() == [
        "2 problems:",
        f"  - {against(folder, 'math')}: has extra0 beyond the base's; {ways}",
        f"  - {against(folder, 'code')}: has {four} beyond the base's; {ways}",
    ]
    with della.plan({**made, "extra": "ignore"}) as plan:
        assert plan.notes == (
            f"{folder}/math: extra0 not in the base, and left out of the result (extra: ignore)",
            f"{folder}/code: {four} not in the base, and left out of the result (extra: ignore)",
        )
    della.merge({**made, "extra": "ignore"}, tmp_path / "out", fsync=False)
    assert sorted(load(tmp_path / "out")) == ["v", "w"]
    assert refused(CheckpointError, {**made, "extra": "copy"}, tmp_path / "new") == (
        f"extra0: in {folder}/math and in {folder}/code, but not in the base, so 'extra: copy' cannot tell "
        "which one is meant; write 'extra: ignore'"
    )
    del tensors["math"]["extra0"]
    tensors["code"]["extra3"] = np.arange(5)
    save(tmp_path / "models", tensors)
    della.merge({**made, "extra": "copy"}, tmp_path / "new", fsync=False)
    found = load(tmp_path / "new")
    assert sorted(found) == ["extra0", "extra1", "extra2", "extra3", "v", "w"]
    assert found["extra3"] == ("I64", (5,), np.arange(5).tobytes())
    assert {name: found[name] for name in "vw"} == load(tmp_path / "out")


def test_what_an_expert_lacks_may_be_the_bases(tmp_path: Path) -> None:
    tensors = small()
    own: list[dict[str, Any]] = [{"density": 0.5}] * 3
    tensors["code"]["v"] = tensors["base"]["v"]
    whole = recipe(save(tmp_path / "whole", tensors), "paper_della", own, {})
    del tensors["code"]["v"]
    made = recipe(save(tmp_path / "models", tensors), "paper_della", own, {}, missing="base")
    with della.plan(made) as plan:
        assert plan.notes == (
            f"{tmp_path}/models/code: lacks v; the base's stands in its place (missing: base)",
        )
    della.merge(made, tmp_path / "out", fsync=False)
    della.merge(whole, tmp_path / "same", fsync=False)
    assert load(tmp_path / "out") == load(tmp_path / "same")
    made = recipe(tmp_path / "models", "linear", PLAIN, {}, missing="base")
    assert refused(RecipeError, made, tmp_path / "new") == (
        "recipe at missing: 'missing: base' has no meaning: merge_method linear has no base; remove it"
    )


def test_a_tied_model_has_no_head_for_a_base_that_has_one(tmp_path: Path) -> None:
    untied = {name: weights(shapes(), 0, ml_dtypes.bfloat16) for name in ("base", *EXPERTS)}
    tied = {name: weights(shapes(tied=True), 0, ml_dtypes.bfloat16) for name in ("base", *EXPERTS)}
    models = {**untied, "code": tied["code"]}
    folder = save(tmp_path / "others", models, tie_word_embeddings=True)
    assert refused(CheckpointError, recipe(folder, "ties", PLAIN, {}), tmp_path / "out") == (
        f"{against(folder, 'code')}: ties its head to the embeddings where the base has a lm_head.weight "
        "of its own; untie this model: save it with tie_word_embeddings: false, or write 'missing: base' to "
        "keep the base's head"
    )


def test_another_storage_dtype_is_told(tmp_path: Path) -> None:
    tensors = small(ml_dtypes.bfloat16)
    tensors["code"] = small(np.float32)["code"]
    folder = save(tmp_path / "models", tensors)
    for keys, result in (
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"out_dtype": "fp32"}, "float32"),
    ):
        with della.plan(recipe(folder, "ties", PLAIN, {}, **keys)) as plan:
            assert plan.notes == (
                f"{folder}/code: stored in float32, the base in bfloat16; the result is stored in {result}",
            )


def test_every_model_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "models", small())
    (folder / "math/model.safetensors").unlink()
    raw = (folder / "code/model.safetensors").read_bytes()
    (folder / "code/model.safetensors").write_bytes(raw[:-1])
    said = refused(CheckpointError, recipe(folder, "ties", PLAIN, {}), tmp_path / "out").splitlines()
    assert said[0] == "2 problems:"
    assert said[1].startswith(f"  - {folder}/math: no model here")
    assert said[2].startswith(f"  - {folder}/code/model.safetensors: ")
    assert len(said) == 3


# ---- recipes that only the models can refuse --------------------------------------------------------------


def test_what_scope_model_needs(tmp_path: Path) -> None:
    tensors = small()
    folder = save(tmp_path / "models", tensors)
    own: list[dict[str, Any]] = [{"density": [{"filter": "w", "value": 0.5}, {"value": 0.6}]}] * 3
    assert refused(RecipeError, recipe(folder, "ties", own, {"scope": "model"}), tmp_path / "out") == (
        "recipe at parameters.scope: scope: model chooses one threshold for the whole model, so density must "
        "be the same for all tensors; use scope: tensor, or a density without gradient and filter"
    )
    tensors["code"]["v"] = tensors["code"]["v"].astype(np.float64)
    save(tmp_path / "models", tensors)
    own = [{"density": 0.5}] * 3
    assert refused(RecipeError, recipe(folder, "ties", own, {"scope": "model"}), tmp_path / "out") == (
        "recipe at parameters.scope: scope: model compares all tensors in float32, and v of an input is "
        "float64; use scope: tensor, or save that model in float32 first"
    )


@pytest.mark.parametrize(
    ("method", "shared", "said"),
    [
        ("della", {"rank_by": "optimal"}, "rank_by: optimal"),
        ("della", {"ladder": "paper", "coupling": "systematic"}, "ladder: paper, coupling: systematic"),
        ("ties", {"scope": "row"}, "scope: row"),
        ("della", {"fuse": "calibrated"}, "fuse: calibrated"),
        ("ties", {"vote": "unweighted"}, "vote: unweighted"),
        ("ties", {"lambda_scaling": "row"}, "lambda_scaling: row"),
        ("paper_ties", {}, "merge_method: paper_ties"),
    ],
)
def test_compat_does_not_ignore_what_mergekit_lacks(
    tmp_path: Path, method: str, shared: dict[str, Any], said: str
) -> None:
    folder = save(tmp_path / "models", small())
    made = recipe(folder, method, [{"density": 0.5}] * 3, shared)
    told = refused(RecipeError, made, tmp_path / "out", compat=True)
    where = "merge_method" if "merge_method" in said else f"parameters.{said.partition(':')[0]}"
    assert told.startswith(f"recipe at {where}: compat: mergekit has no {said}; remove it")


def test_weights_without_a_mean(tmp_path: Path) -> None:
    folder = save(tmp_path / "models", small())
    made = recipe(folder, "linear", [{"weight": 1}, {"weight": -0.5}, {"weight": -0.5}], {})
    assert refused(RecipeError, made, tmp_path / "out") == (
        "recipe at models.0.parameters.weight: the weights 1, -0.5, -0.5 add up to 0, so they have no mean; "
        "use normalize: false"
    )


@pytest.mark.parametrize("name", ["threads", "tile", "shard_bytes"])
def test_numbers_that_must_be_positive(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "models", small())
    made = recipe(folder, "ties", PLAIN, {})
    assert refused(RecipeError, made, tmp_path / "out", **{name: 0}) == (
        f"{name} 0: expected a whole number from 1 up"
    )


# ---- the place of the result ------------------------------------------------------------------------------


def test_the_result_may_not_touch_an_input(tmp_path: Path) -> None:
    folder = save(tmp_path / "models", small())
    made = recipe(folder, "ties", PLAIN, {})
    for out, touched in (
        (folder / "code", "code"),
        (folder / "code/out", "code"),
        (folder / "base/out.safetensors", "base"),
        (folder, "base"),
    ):
        before = tree(folder)
        with pytest.raises(OutputError) as caught:
            della.merge(made, out, overwrite="any", fsync=False)
        said = f"{out}: touches the input {folder}/{touched}; choose another place for the result"
        more = (
            f"{out}: not replaced: it is not a model, or more (it holds base/, code/, math/, story/); "
            "choose another place, or remove it yourself"
        )
        assert str(caught.value) in (said, f"2 problems:\n  - {more}\n  - {said}")
        assert tree(folder) == before


def test_an_old_result_is_kept_or_swapped_whole(tmp_path: Path) -> None:
    folder = save(tmp_path / "models", small())
    made, out = recipe(folder, "ties", PLAIN, {}), tmp_path / "site/out"
    della.merge(made, out, fsync=False, shard_bytes=100)
    assert (out / "model.safetensors.index.json").exists()
    assert refused(OutputError, made, out) == (
        f"{out}: exists already; choose another place, or allow it to be replaced: overwrite=True"
    )
    della.merge(made, out, fsync=False, overwrite="any")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "della.json", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_place_and_models_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    made = {"merge_method": "linear", "models": [{"model": str(tmp_path / "absent")}]}
    said = refused(CheckpointError, made, tmp_path / "out").splitlines()
    assert said[0] == "2 problems:"
    assert "not found" in said[1]
    assert "exists already" in said[2]
    assert "not a model, or more (it holds mine.txt)" in refused(
        CheckpointError, made, tmp_path / "out", overwrite="any"
    )
    assert "not found" in refused(CheckpointError, made, tmp_path / "elsewhere")
