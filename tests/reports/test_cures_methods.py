"""What messages on methods and values advise is done as a user would, and gives the merge that it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from cures import cures

import della
from della.checkpoint.source import open_source
from della.errors import CheckpointError, DellaError, OutputError, RecipeError

Tensors = dict[str, Any]
BASE: Tensors = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
ONE, TWO = {"w": BASE["w"] + 2}, {"w": BASE["w"] - 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, tensors in {"base": BASE, "one": ONE, "two": TWO}.items():
        put(tmp_path, {f"{name}/model.safetensors": tensors})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(method: str, own: list[Tensors], shared: Tensors, models: str = "one two", **top: Any) -> Any:
    entries = [
        {"model": name, "parameters": {k: v for k, v in each.items() if k != "input_norms"}}
        | {k: v for k, v in each.items() if k == "input_norms"}
        for name, each in zip(models.split(), own, strict=False)
    ]
    recipe: Tensors = {"merge_method": method, "models": entries, "parameters": shared} | top
    options = {key: recipe.pop(key) for key in ("allow_idle",) if key in recipe}
    recipe |= {} if method in ("linear", "passthrough") else {"base_model": "base"}
    Path("recipe.yml").write_text(json.dumps(recipe))
    della.merge("recipe.yml", "out", fsync=False, overwrite=True, **options)
    with open_source("out") as source:
        return source.tensors["w"].read().astype(np.float32)


def refused(advice: str, *given: Any, **top: Any) -> None:
    with pytest.raises(DellaError) as caught:
        merged(*given, **top)
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)


@cures("merging/methods/averages.py:Linear.problems")
def test_weights_without_a_mean() -> None:
    own = [{"weight": 1}, {"weight": -1}]
    refused("normalize: false", "linear", own, {})
    assert np.allclose(merged("linear", own, {"normalize": False}), ONE["w"] - TWO["w"])


@cures("merging/methods/passthrough.py:Passthrough.problems")
def test_two_models_for_one() -> None:
    refused("merge_method: linear", "passthrough", [{}, {}], {})
    assert np.allclose(merged("linear", [{}, {}], {}), (ONE["w"] + TWO["w"]) / 2)


@cures("merging/methods/task_vectors.py:TaskVectors.problems")
@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_no_keep_probabilities_to_rescale_by(rescale: str) -> None:
    own = [{"density": 1, "weight": 1}]
    refused("l1 or none", "ties", own, {"rescale": "per_element"})
    assert np.allclose(merged("ties", own, {"rescale": rescale}), ONE["w"])


@cures("merging/methods/task_vectors.py:TaskVectors._fuse_problems")
@pytest.mark.parametrize("kept", [{"fuse": "sum"}, {"normalize": True}])
def test_sum_or_mean(kept: Tensors) -> None:
    own = [{"density": 1, "weight": 0.5}]
    refused("keep one of them", "ties", own, {"fuse": "sum", "normalize": True})
    assert np.allclose(merged("ties", own, kept), BASE["w"] + (1 if "fuse" in kept else 2))


@cures("merging/methods/task_vectors.py:TaskVectors._fuse_problems")
def test_nothing_to_calibrate_by() -> None:
    refused("fuse: mean", "ties", [{"density": 1}], {"fuse": "calibrated"})
    assert np.allclose(merged("ties", [{"density": 1}], {"fuse": "mean"}), ONE["w"])


@cures("merging/methods/task_vectors.py:TaskVectors._fuse_problems")
def test_too_many_to_calibrate() -> None:
    own, models = [{"density": 1, "epsilon": 0, "weight": 0.5}] * 9, "one " * 9
    refused("fuse: mean", "della", own, {"fuse": "calibrated"}, models)
    assert np.allclose(merged("della", own, {"fuse": "mean", "lambda": 0.5}, models), BASE["w"] + 1)


@cures("merging/drops/magprune.py:Magprune._range_problems")
@pytest.mark.parametrize("key", ["epsilon", "window_size"])
@pytest.mark.parametrize("density", [0.1, 0.9, 0.123456789, 0.987654321987])
def test_the_largest_range_is_one(density: float, key: str) -> None:
    """The number that is advised is taken as it is printed."""
    with pytest.raises(RecipeError) as caught:
        merged("della", [{"density": density, key: 0.5 if key == "epsilon" else 1.0}], {})
    fix = caught.value.problems[0].fix or ""
    assert key in fix
    most = float(fix.split()[-1])
    assert most == pytest.approx(min(density, 1 - density) * (1 if key == "epsilon" else 2), abs=2e-6)
    moved = (merged("della", [{"density": density, key: most}], {}, allow_idle=True) - BASE["w"]).ravel()
    assert np.all((moved == 0) | (moved >= 2)), "each delta is dropped, or kept and rescaled"


@cures("merging/drops/magprune.py:Magprune.problems", "merging/drops/drop.py:Drop.problems")
@pytest.mark.parametrize("removed", ["importance", "rank_by"])
def test_norms_rank_something(folder: Path, removed: str) -> None:
    own: Tensors = {"density": 1, "epsilon": 0}
    shared = {"importance": "wanda", "rank_by": "random"}
    norms = own | {"input_norms": "norms.safetensors"}
    put(folder, {"norms.safetensors": {"w": np.ones(4, np.float32)}})
    refused("remove one", "della", [norms], shared)
    del shared[removed]
    if removed == "rank_by":
        refused("input_norms: FILE", "della", [own], shared)
        own = norms
    assert np.allclose(merged("della", [own], shared), ONE["w"])


@cures("planning/overall.py:check_whole_model", "planning/overall.py:check_whole_model")
def test_one_threshold_for_all(folder: Path) -> None:
    cases = {"density": [{"filter": "w", "value": 1}, {"value": 0.5}]}
    put(folder, {f"{n}/model.safetensors": t | {"v": t["w"]} for n, t in (("base", BASE), ("one", ONE))})
    refused("scope: tensor", "ties", [cases], {"scope": "model"})
    assert np.allclose(merged("ties", [cases], {"scope": "tensor"}), ONE["w"])
    refused("density without gradient and filter", "ties", [cases], {"scope": "model"})
    assert np.allclose(merged("ties", [{"density": 1}], {"scope": "model"}), ONE["w"])
    put(folder, {"one/model.safetensors": {n: ONE["w"].astype(np.float64) for n in "wv"}})
    refused("save that model in float32", "ties", [{"density": 1}], {"scope": "model"})
    put(folder, {"one/model.safetensors": dict.fromkeys("wv", ONE["w"])})
    assert np.allclose(merged("ties", [{"density": 1}], {"scope": "model"}), ONE["w"])


@cures("planning/overall.py:check_compat")
def test_what_mergekit_has_not() -> None:
    own, shared = [{"density": 1}], {"vote": "unweighted"}
    refused("remove it", "ties", own, shared, compat="mergekit")
    assert np.allclose(merged("ties", own, {}, compat="mergekit"), ONE["w"])
    assert np.allclose(merged("ties", own, shared), ONE["w"])


@cures("running/compute.py:_Overflow.raise_any")
@pytest.mark.parametrize(
    ("top", "last"),
    [({"out_dtype": "float32"}, 70013.0), ({"nonfinite": "zero"}, 0.0), ({"nonfinite": "keep"}, np.inf)],
)
def test_too_large_for_its_dtype(folder: Path, top: Tensors, last: float) -> None:
    put(folder, {"one/model.safetensors": {"w": np.where(BASE["w"] == 11, 35012, ONE["w"])}})
    given: Any = ("task_arithmetic", [{"weight": 2}], {})
    refused("a wider out_dtype", *given, out_dtype="float16")
    stored: Tensors = {"out_dtype": "float16"} | top
    found = merged(*given, **stored)
    assert np.allclose(found.ravel()[:-1], BASE["w"].ravel()[:-1] + 4)
    assert found[2, 3] == last
    smaller = merged("task_arithmetic", [{"weight": 2}], {"lambda": 0.5}, out_dtype="float16")
    assert np.allclose(smaller.ravel()[:-1], ONE["w"].ravel()[:-1])


@cures("running/reading.py:damaged")
@pytest.mark.parametrize("policy", ["zero", "keep", "again"])
def test_a_damaged_model(folder: Path, policy: str) -> None:
    put(folder, {"one/model.safetensors": {"w": np.where(BASE["w"] == 11, np.nan, ONE["w"])}})
    given: Any = ("task_arithmetic", [{}], {})
    refused("get it again", *given)
    if policy == "again":
        put(folder, {"one/model.safetensors": ONE})
        assert np.allclose(merged(*given), ONE["w"])
        return
    found = merged(*given, nonfinite=policy)
    assert np.allclose(found.ravel()[:-1], ONE["w"].ravel()[:-1])
    assert found[2, 3] == 11 if policy == "zero" else np.isnan(found[2, 3])


def test_a_model_of_nothing_but_nan_is_no_merge(folder: Path) -> None:
    """What 'nonfinite: zero' leaves out may be all of a model."""
    put(folder, {"one/model.safetensors": {"w": np.full_like(BASE["w"], np.nan)}})
    refused("take it out", "task_arithmetic", [{}, {}], {}, nonfinite="zero")
    assert np.allclose(merged("task_arithmetic", [{}], {}, "two"), TWO["w"])
    refused("nothing would be merged", "task_arithmetic", [{}], {}, nonfinite="zero")


# ---- arrays in memory -------------------------------------------------------------------------------------


def arrays(error: type[DellaError], advice: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        della.merge_tensors(BASE["w"], [ONE["w"]], **options)
    assert advice in (caught.value.problems[0].fix or ""), str(caught.value)


@cures("arrays.py:merge_tensors", "arrays.py:_all_norms", "arrays.py:_shared")
def test_arguments_in_memory() -> None:
    arrays(RecipeError, 'scope="tensor"', method="ties", scope="model")
    found = della.merge_tensors(BASE["w"], [ONE["w"]], method="ties", density=1.0, scope="tensor")
    assert np.allclose(found, ONE["w"])
    assert np.allclose(merged("ties", [{"density": 1}], {"scope": "model"}), ONE["w"]), "the other cure"
    arrays(RecipeError, "remove it", method="linear", input_norms=[np.ones(4)])
    assert np.allclose(della.merge_tensors(BASE["w"], [ONE["w"]], method="linear"), ONE["w"])
    arrays(RecipeError, "did you mean 'lambda'", method="ties", lamda=2.0)
    assert np.allclose(
        della.merge_tensors(BASE["w"], [ONE["w"]], method="ties", density=1.0, lambda_=2.0), BASE["w"] + 4
    )


@cures("arrays.py:_rounded", "arrays.py:_as_array")
def test_dtypes_in_memory() -> None:
    half = [array["w"].astype(np.float16) * 1000 for array in (BASE, ONE)]
    large: Tensors = {"method": "task_arithmetic", "weights": 50.0}
    with pytest.raises(OutputError, match="wider dtype"):
        della.merge_tensors(half[0], [half[1]], **large)
    single = [array.astype(np.float32) for array in half]
    exact = single[0] + 50 * (single[1] - single[0])
    assert np.allclose(della.merge_tensors(single[0], [single[1]], **large), exact)
    small = della.merge_tensors(half[0], [half[1]], lambda_=0.02, **large)
    assert np.allclose(small, single[1], rtol=1e-3)
    with pytest.raises(CheckpointError, match="only floats"):
        della.merge_tensors(BASE["w"].astype(np.int32), [ONE["w"]], method="task_arithmetic")
    assert np.allclose(della.merge_tensors(BASE["w"], [ONE["w"]], method="task_arithmetic"), ONE["w"])


@cures("arrays.py:_from_torch")
def test_of_another_device() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(CheckpointError, match=r"\.cpu\(\)"):
        della.merge_tensors(torch.zeros(3, device="meta"), [torch.ones(3)], method="task_arithmetic")
    found = della.merge_tensors(torch.zeros(3), [torch.ones(3).cpu()], method="task_arithmetic")
    assert found.tolist() == [1, 1, 1]
