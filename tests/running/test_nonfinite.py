"""NaN and infinity in inputs and results: refused with their number, let pass, or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llamas import EXPERTS, SEVERAL, Tensors, load, recipe, save

import della
from della.dtypes import DTYPES, widen
from della.errors import CheckpointError, OutputError
from della.merging.registry import METHODS

BAD = {3: np.nan, 17: np.inf, 64: -np.inf, 119: np.nan}
OWN: list[dict[str, Any]] = [{"density": 0.5}] * 3


def small(dtype: Any) -> dict[str, Tensors]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 20))
    models: dict[str, Tensors] = {"base": {"w": base.astype(dtype)}}
    for name in EXPERTS:
        models[name] = {"w": (base + rng.standard_normal((6, 20)) / 10).astype(dtype)}
    return models


def spoilt(models: dict[str, Tensors], model: str, values: dict[int, float] = BAD) -> dict[str, Tensors]:
    found = {name: {"w": tensors["w"].copy()} for name, tensors in models.items()}
    for at, value in values.items():
        found[model]["w"].reshape(-1)[at] = value
    return found


def merged(
    folder: Path, models: dict[str, Tensors], made: dict[str, Any], **options: Any
) -> np.ndarray[Any, Any]:
    save(folder / "models", models)
    out = folder / f"out{len(list(folder.iterdir()))}"
    della.merge(made, out, fsync=False, **options)
    dtype, shape, raw = load(out)["w"]
    return np.asarray(widen(np.frombuffer(raw, DTYPES[dtype].numpy)).reshape(shape), np.float64)


def of(folder: Path, method: str, shared: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    known = METHODS[method].parameters
    own = [{key: value for key, value in mine.items() if key in known} for mine in OWN]
    return recipe(folder / "models", method, own, shared or {}, **keys)


FLOATS = [row for row in DTYPES.values() if row.is_float and row.name not in ("F8_E4M3",)]


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
@pytest.mark.parametrize("method", ["della", "linear"])
def test_the_number_of_bad_values_and_the_first_one_are_told(tmp_path: Path, method: str, row: Any) -> None:
    save(tmp_path / "models", spoilt(small(row.numpy), "code"))
    site = tmp_path / "models/code"
    for tile in (7, 1 << 18):
        made = {**of(tmp_path, method), "plain_fp8": row.bits == 8}
        with pytest.raises(CheckpointError) as caught:
            della.merge(made, tmp_path / "out", tile=tile, fsync=False)
        assert str(caught.value) == (
            f"{site}/model.safetensors: tensor w of {site} holds 4 values that are NaN or infinite "
            "(the first is element 3: nan); such a model is damaged: get it again, or "
            "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("method", SEVERAL)
def test_zero_makes_no_change_of_what_is_not_finite(tmp_path: Path, method: str, dtype: Any) -> None:
    """An expert's bad value counts as the base's; without a base, and in the base, as 0."""
    models = small(dtype)
    healed = spoilt(models, "code", {at: models["base"]["w"].reshape(-1)[at] for at in BAD})
    if not METHODS[method].needs_base:
        healed = spoilt(models, "code", dict.fromkeys(BAD, 0.0))
    made = of(tmp_path, method, nonfinite="zero")
    found = merged(tmp_path, spoilt(models, "code"), made, tile=7)
    assert np.array_equal(found, merged(tmp_path, healed, made))
    if METHODS[method].needs_base:
        found = merged(tmp_path, spoilt(models, "base"), made, tile=7)
        assert np.array_equal(found, merged(tmp_path, spoilt(models, "base", dict.fromkeys(BAD, 0.0)), made))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in SEVERAL),
    *(("della", {"rank_by": rank}) for rank in ("tensor", "random", "random_tensor", "magnitude", "optimal")),
    ("della", {"rescale": "l1"}),
    ("della", {"fuse": "calibrated"}),
    ("della", {"lambda_scaling": "row"}),
    ("della", {"lambda_scaling": "tensor"}),
    ("ties", {"scope": "model"}),
    ("ties", {"scope": "row"}),
]


@pytest.mark.parametrize(("method", "shared"), OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_keep_lets_them_pass_and_nothing_breaks(
    tmp_path: Path, method: str, shared: dict[str, Any], dtype: Any
) -> None:
    made = of(tmp_path, method, shared, nonfinite="keep")
    models = spoilt(small(dtype), "code", {3: np.nan})
    found = merged(tmp_path, models, made)
    assert np.array_equal(found, merged(tmp_path, models, made, tile=20), equal_nan=True)
    if shared.get("rescale") != "l1" and "scope" not in shared and shared.get("lambda_scaling") != "tensor":
        assert np.isfinite(found[1:]).all() or method.startswith(("breadcrumbs", "paper", "ties"))
    if method in ("linear", "task_arithmetic"):
        assert np.flatnonzero(~np.isfinite(found)).tolist() == [3]


@pytest.mark.parametrize("row", [row for row in FLOATS if row.name != "F64"], ids=lambda row: row.name)
def test_overflow_in_the_result(tmp_path: Path, row: Any) -> None:
    models = small(np.float64)
    for name in ("base", *EXPERTS):
        for at in (41, 100, 102):
            models[name]["w"].reshape(-1)[at] = 1e39
    made = of(tmp_path, "linear", out_dtype=row.torch_name)
    with pytest.raises(OutputError) as caught:
        merged(tmp_path, models, made, tile=7)
    assert str(caught.value) == (
        f"w: element 41 becomes inf, and 2 more do so, when it is rounded to {row.torch_name}; "
        "choose a wider out_dtype, or a smaller lambda; or "
        "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"
    )
    kept = merged(tmp_path, models, {**made, "nonfinite": "keep"})
    assert np.flatnonzero(~np.isfinite(kept)).tolist() == [41, 100, 102]
    zeroed = merged(tmp_path, models, {**made, "nonfinite": "zero"})
    assert np.flatnonzero(zeroed == 0).tolist() == [41, 100, 102]
    assert np.array_equal(np.where(np.isfinite(kept), kept, 0), zeroed)


def test_what_is_zeroed_is_still_hashed_as_it_was_read(tmp_path: Path) -> None:
    save(tmp_path / "models", spoilt(small(np.float32), "code"))
    della.merge(of(tmp_path, "della", nonfinite="zero"), tmp_path / "out", fsync=False)
    verdict = della.verify(tmp_path / "out", inputs=True, sources=1.0, base_dir=tmp_path / "models")
    assert (verdict.bad, verdict.recomputed, verdict.inputs) == ([], 1, 4)


def test_tied_heads(tmp_path: Path) -> None:
    """Stored once, as in the base; a copy of it in an expert is no head of its own."""
    rng = np.random.default_rng(0)
    embeddings = {name: rng.standard_normal((5, 4)).astype(np.float32) for name in ("base", *EXPERTS)}

    def tied(name: str, twice: bool) -> Tensors:
        head = {"lm_head.weight": embeddings[name]} if twice else {}
        return {"model.embed_tokens.weight": embeddings[name], **head}

    for base_twice in (False, True):
        for expert_twice in (False, True):
            folder = tmp_path / f"{base_twice}{expert_twice}"
            models = {name: tied(name, base_twice if name == "base" else expert_twice) for name in embeddings}
            save(folder / "models", models, tie_word_embeddings=True)
            made = recipe(folder / "models", "task_arithmetic", [{}] * 3, {})
            with della.plan(made) as plan:
                said = "lm_head.weight is a copy of model.embed_tokens.weight, and left out"
                wanted = [f"{folder}/models/{name}: {said}" for name in EXPERTS if expert_twice]
                assert list(plan.notes) == wanted
            della.merge(made, folder / "out", fsync=False)
            found = load(folder / "out")
            assert sorted(found) == ["model.embed_tokens.weight"], "the head is still the embeddings"
