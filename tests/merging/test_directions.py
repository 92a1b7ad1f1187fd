"""Methods on directions and on what models do at an element, against NumPy written from their formulas;
kernels against the reference, byte for byte; and what users get where a model has not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import della
from della.errors import CheckpointError, RecipeError
from della.merging.driver import merge_arrays
from della.merging.registry import METHODS
from della.merging.tile import Subject, canonical

Array = np.ndarray[Any, np.dtype[Any]]
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (5, 1), (1, 9), (40, 300), (4, 3, 3, 3), (3, 4, 40), (2, 5, 3), (3, 700), (0, 4), (2, 0),
]  # fmt: skip
CASES: list[tuple[str, dict[str, Any], int, bool]] = [
    ("slerp", {"t": 0.3}, 1, True), ("nearswap", {"t": 0.01}, 1, True), ("arcee_fusion", {}, 1, True),
    *(
        ("nuslerp", shared, 2, base)
        for base in (False, True)
        for shared in (
            {}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        )
    ),
    ("multislerp", {}, 3, True), ("multislerp", {}, 3, False), ("karcher", {}, 3, False),
    ("model_stock", {}, 3, True), ("model_stock", {"filter_wise": True}, 3, True),
    ("sce", {}, 3, True), ("sce", {"select_topk": 0.4}, 3, True), ("sce", {"select_topk": 0}, 3, True),
    ("ram", {}, 3, True), ("ramplus_tl", {"r": 0.3, "alpha": 0.5}, 3, True),
]  # fmt: skip
MERGE = della.merge_tensors


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize(("name", "shared", "count", "has_base"), CASES, ids=str)
def test_kernels_give_the_reference_bytes(
    name: str, shared: dict[str, Any], count: int, has_base: bool
) -> None:
    row = METHODS[name]
    row = row.with_base if has_base and row.with_base else row
    made, rng = row(shared), np.random.default_rng(5)
    for shape in SHAPES:
        base = rng.standard_normal(shape).astype(np.float32)
        changed = [rng.random(shape) < share for share in (0.7, 0.5, 0)][:count]  # the third changes nothing
        models = [(base + 0.05 * rng.standard_normal(shape) * where).astype(np.float32) for where in changed]
        experts = [row.expert(k, {"weight": w}) for k, w in zip("cab", (1, 0.7, 0.3), strict=True)][:count]
        root, order = base if row.needs_base else None, canonical(experts)
        wanted = made.merge("x", root, models, experts)
        subject = Subject("x", shape, tuple(experts[t] for t in order), 42)
        assert wanted.dtype == np.float32
        for target in (64, 1 << 17):
            got = merge_arrays(made, subject, root, [models[t] for t in order], target)
            assert got.tobytes() == wanted.tobytes(), (shape, target)


# ---- formulas ----------------------------------------------------------------------------------------------


def slerp(base: Array, other: Array, t: float) -> Array:
    a, b = base.astype(float).ravel(), other.astype(float).ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > 0.9995:
        return np.asarray((1 - t) * base + t * other)
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * base + np.sin(t * angle) * other) / np.sin(angle))


def vector(*values: float) -> Array:
    return np.array(values, np.float32)


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-0.5, 1.5), st.sampled_from([0.001, 0.1, 2.0]))
def test_slerp(seed: int, t: float, size: float) -> None:
    base = normal(seed, 6, 5)
    other = (base + np.float32(size) * normal(seed + 1, 6, 5)).astype(np.float32)
    close(MERGE(base, [other], method="slerp", t=t), slerp(base, other, t))


def test_the_ends_of_slerp_are_the_models() -> None:
    base, other = normal(0, 30, 7), normal(1, 30, 7)
    assert MERGE(base, [other], method="slerp", t=1.0).tobytes() == other.tobytes()
    assert np.array_equal(MERGE(base, [other], method="slerp", t=0.0), base)


def test_slerp_by_hand() -> None:
    base, other, half = vector(1, 0), vector(0, 2), np.sin(np.pi / 4)
    close(MERGE(base, [other], method="slerp", t=0.5), [half, 2 * half])
    zero = vector(0, 0)
    close(MERGE(base, [zero], method="slerp", t=0.5), [half, 0])
    close(MERGE(base, [vector(-1, 0)], method="slerp", t=0.25), [0.5, 0])


def test_nuslerp_of_one_change_takes_its_sine() -> None:
    base = normal(0, 4, 6)
    changed = (base + 0.1 * normal(1, 4, 6)).astype(np.float32)
    found = MERGE(base, [changed, base], weights=[1, 1], method="nuslerp")
    close(found - base, np.sin(np.pi / 4) * (changed - base))


def test_a_tensor_that_only_one_model_has_changed() -> None:
    base, delta = normal(0, 6, 7), (0.05 * normal(1, 6, 7)).astype(np.float32)
    models = [base + delta, base]
    shares = {"sce": 1, "ram": 1, "ties": 1, "della": 1, "model_stock": 0, "multislerp": 0.5}
    for method, share in shares.items():
        close(MERGE(base, models, method=method) - base, share * delta)
    for method in ("task_arithmetic", "nuslerp"):
        share = np.sin(np.pi / 4) if method == "nuslerp" else 0.5
        close(MERGE(base, models, weights=[0.5, 0.5], method=method) - base, share * delta)
    assert np.abs(MERGE(None, models, method="karcher") - base - delta / 2).max() < 0.002


@pytest.mark.parametrize("by_column", [False, True])
def test_nuslerp_of_rows_and_columns(by_column: bool) -> None:
    one, two = normal(1, 5, 8), normal(2, 5, 8)
    found = MERGE(
        None, [one, two], weights=[3, 1], method="nuslerp", nuslerp_flatten=False, nuslerp_row_wise=by_column
    )
    pairs = zip(one.T, two.T, strict=True) if by_column else zip(one, two, strict=True)
    wanted = np.array([slerp(a, b, 0.25) for a, b in pairs])
    close(found, wanted.T if by_column else wanted)


def test_multislerp_and_karcher_by_hand() -> None:
    """Between two vectors at a right angle; the length is the mean of theirs."""
    one, two, half = vector(2, 0), vector(0, 2), np.sin(np.pi / 4)
    for method in ("multislerp", "karcher"):
        close(MERGE(None, [one, two], method=method), [2 * half, 2 * half])
        close(MERGE(None, [one, 2 * two], method=method), [3 * half, 3 * half])
    close(MERGE(None, [one, vector(6, 0)], method="karcher"), [4, 0])


def test_frozen_tensors_stay_the_base() -> None:
    base = normal(0, 3, 4)
    for method in ("multislerp", "model_stock", "sce", "ram", "ramplus_tl"):
        assert MERGE(base, [base, base, base], method=method).tobytes() == base.tobytes(), method
    for t in (0.3, 0.7, 1.5):
        assert MERGE(base, [base], method="slerp", t=t).tobytes() == base.tobytes()
    for method in ("nuslerp", "multislerp", "karcher"):
        more: dict[str, Any] = {} if method == "karcher" else {"weights": [0.3, 1.1]}
        assert MERGE(None, [base, base], method=method, **more).tobytes() == base.tobytes(), method
    doubled = MERGE(None, [base, base], weights=[1, 1], method="multislerp", normalize_weights=False)
    close(doubled, 2 * base)


@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_model_stock_does_not_depend_on_the_size_of_deltas(size: float) -> None:
    base, deltas = np.zeros((6, 9), np.float32), [size * normal(k, 6, 9) + size for k in (1, 2, 3)]
    unit = [d.astype(float).ravel() / np.linalg.norm(d.astype(float)) for d in deltas]
    cosine = np.mean([unit[i] @ unit[j] for i, j in ((0, 1), (0, 2), (1, 2))])
    ratio = 3 * cosine / (1 + 2 * cosine)
    found = MERGE(base, [d.astype(np.float32) for d in deltas], method="model_stock")
    np.testing.assert_allclose(found, ratio * np.mean(deltas, axis=0), rtol=1e-4, atol=1e-6 * size)


def sce(base: Array, models: list[Array], share: float) -> Array:
    deltas = np.stack(models).astype(float) - base
    variance = deltas.var(axis=0).ravel()
    chosen = np.zeros(variance.size)
    chosen[np.argsort(-variance, kind="stable")[: int(np.count_nonzero(variance) * share)]] = 1
    deltas = deltas * chosen.reshape(base.shape) if share < 1 else deltas
    energy = (deltas**2).sum(axis=tuple(range(1, deltas.ndim)))
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    weights = np.where(np.sign(deltas) == sign, (energy / energy.sum()).reshape(-1, 1, 1), 0)
    below = weights.sum(axis=0)
    return np.asarray(base + (weights * deltas).sum(axis=0) / np.where(below > 0, below, 1))


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1])
def test_sce(share: float, size: float) -> None:
    """By the squares' shares, of small deltas too."""
    base = np.zeros((20, 30), np.float32)
    models = [(size * (k + 1) * normal(k, 20, 30)).astype(np.float32) for k in range(3)]
    found = MERGE(base, models, method="sce", select_topk=share)
    np.testing.assert_allclose(found, sce(base, models, share), rtol=1e-4, atol=1e-6 * size)


def test_nearswap_and_ram_by_hand() -> None:
    base = vector(1, 1, 1, 1)
    found = MERGE(base, [vector(1.5, 1.75, 0.25, 1)], method="nearswap", t=0.5)
    assert found.tolist() == [1.5, 1.5, 0.5, 1]
    one, two = vector(2, 3, 1, 1.000001), vector(4, 1, 1, 1)
    assert MERGE(base, [one, two], method="ram").tolist() == [3, 3, 1, 1]
    # one: 1 own change, 1 shared (ratio 1); two: 0 own. 1 + .5 * min(1, .9)
    plus = MERGE(base, [one, two], method="ramplus_tl", r=0.5, alpha=0.9)
    close(plus, [3, 1 + 1.45 * 2, 1, 1])


@pytest.mark.parametrize("size", [0.5, 1e-3])
def test_arcee_fusion(size: float) -> None:
    """Also of small deltas, whose divergence is lost in float32."""
    base = normal(0, 50, 40)
    other = (base + np.float32(size) * normal(1, 50, 40)).astype(np.float32)
    chances = [
        np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(axis=1, keepdims=True) for x in (other, base)
    ]
    p, q = (x + 1e-8 for x in chances)
    matters = np.abs(other.astype(float) - base) * (p * (np.log(p) - np.log(q))).sum(axis=1, keepdims=True)
    low, middle, high = np.quantile(matters, [0.25, 0.5, 0.75], method="lower")
    wanted = np.where(matters >= middle + 1.5 * (high - low), other, base)
    assert 0 < (wanted != base).sum() < base.size / 4
    assert np.array_equal(MERGE(base, [other], method="arcee_fusion"), wanted)


# ---- recipes -----------------------------------------------------------------------------------------------


def models_in(folder: Path) -> dict[str, dict[str, Array]]:
    base = {"w": normal(0, 8, 6), "layers.0.v": normal(1, 9), "layers.1.v": normal(2, 9)}
    made = {"base": base} | {
        name: {key: (v + 0.1 * normal(seed, *v.shape)).astype(np.float32) for key, v in base.items()}
        for name, seed in (("one", 5), ("two", 6), ("three", 7))
    }
    for name, tensors in made.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return made


def write(folder: Path, method: str, *models: str, base: Any = "base", **shared: Any) -> Path:
    made = {"merge_method": method, "models": [{"model": name} for name in models], "parameters": shared}
    (folder / "recipe.yml").write_text(json.dumps(made | ({"base_model": base} if base else {})))
    return folder / "recipe.yml"


def merged(path: Path) -> dict[str, Array]:
    della.merge(path, path.parent / "out", fsync=False, overwrite=True)
    return load_file(path.parent / "out" / "model.safetensors")


def test_slerp_as_recipes_write_it(tmp_path: Path) -> None:
    """The base among the models, and t by layer and by name."""
    made = models_in(tmp_path)
    cases = [{"filter": "v", "value": [0.2, 0.9]}, {"value": 0.5}]
    found = merged(write(tmp_path, "slerp", "base", "one", t=cases))
    for name, t in (("w", 0.5), ("layers.0.v", 0.2), ("layers.1.v", 0.9)):
        close(found[name], slerp(made["base"][name], made["one"][name], t))


@pytest.mark.parametrize("method", ["karcher", "multislerp", "model_stock", "sce", "ram"])
def test_the_order_of_the_models_changes_no_byte(tmp_path: Path, method: str) -> None:
    models_in(tmp_path)
    base = None if method == "karcher" else "base"
    one = merged(write(tmp_path, method, "one", "two", "three", base=base))
    other = merged(write(tmp_path, method, "three", "one", "two", base=base))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(
    ("method", "wrong", "right", "said"),
    [
        ("slerp", ["one", "two"], ["one"], "slerp merges 1 model beside base_model, found 2: one, two"),
        ("nuslerp", ["one"], ["one", "two"], "nuslerp merges 2 models beside base_model, found 1"),
        ("model_stock", ["one"], ["one", "two"], "model_stock merges 2 or more models beside base_model"),
        ("arcee_fusion", ["one", "two"], ["one"], "arcee_fusion merges 1 model beside"),
    ],
)
def test_how_many_models(tmp_path: Path, method: str, wrong: list[str], right: list[str], said: str) -> None:
    models_in(tmp_path)
    shared = {"t": 0.5} if method == "slerp" else {}
    with pytest.raises(RecipeError, match=said):
        della.plan(write(tmp_path, method, *wrong, **shared))
    assert merged(write(tmp_path, method, *right, **shared))["w"].shape == (8, 6)


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
def test_t_must_be_given(tmp_path: Path, method: str) -> None:
    models_in(tmp_path)
    with pytest.raises(RecipeError, match=f"{method} needs t.*write 't: 0"):
        della.plan(write(tmp_path, method, "one"))
    merged(write(tmp_path, method, "one", t=0.5))


def test_weights_without_a_sum_have_no_mean() -> None:
    one, two = normal(0, 3), normal(1, 3)
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(RecipeError, match="add up to 0"):
            MERGE(None, [one, two], weights=[1, -1], method=method)
        MERGE(None, [one, two], weights=[1, -0.5], method=method)


@pytest.mark.parametrize("method", ["slerp", "nearswap", "arcee_fusion", "sce"])
def test_a_model_equal_to_the_base_is_refused(tmp_path: Path, method: str) -> None:
    """Of methods on weights too, whose values are never zero."""
    made = models_in(tmp_path)
    save_file(made["base"], tmp_path / "one" / "model.safetensors")
    with pytest.raises(CheckpointError, match="changes nothing"):
        della.merge(
            write(tmp_path, method, "one", **({"t": 0.5} if method != "sce" else {})), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_what_hardly_anyone_expects_is_said(tmp_path: Path) -> None:
    models_in(tmp_path)
    with della.plan(write(tmp_path, "nuslerp", "one", "two")) as plan:
        assert any("only one of the two has changed" in note for note in plan.notes)
    with della.plan(write(tmp_path, "nuslerp", "one", "two", base=None)) as plan:
        assert not any("only one of the two" in note for note in plan.notes)
    with della.plan(write(tmp_path, "model_stock", "one", "two")) as plan:
        assert any("model_stock takes nothing" in note for note in plan.notes)
    with della.plan(write(tmp_path, "karcher", "one", "two")) as plan:
        assert any("base_model has no part in merge_method karcher" in note for note in plan.notes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "shared", "count", "has_base"), CASES, ids=str)
def test_files_give_the_bytes_of_arrays(
    tmp_path: Path, method: str, shared: dict[str, Any], count: int, has_base: bool, dtype: Any
) -> None:
    made = models_in(tmp_path)
    names = ["one", "two", "three"][:count]
    stored = {key: {name: v.astype(dtype) for name, v in tensors.items()} for key, tensors in made.items()}
    for key, tensors in stored.items():
        save_file(tensors, tmp_path / key / "model.safetensors")
    path = write(tmp_path, method, *names, base="base" if has_base else None, **shared)
    if shared.get("select_topk") == 0:
        with pytest.raises(RecipeError, match="takes no part"):
            della.merge(path, tmp_path / "out", fsync=False)
        return
    della.merge(path, tmp_path / "out", fsync=False, tile=16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = della.merge_state_dicts(
        stored["base"] if has_base else None,
        [stored[name] for name in names],
        method=method,
        names=names,
        **shared,
    )
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}


@pytest.mark.parametrize(("method", "shared", "count", "has_base"), CASES, ids=str)
def test_hostile_values_neither_stop_nor_warn(
    method: str, shared: dict[str, Any], count: int, has_base: bool
) -> None:
    """Infinities, NaN, the largest and the smallest floats: what comes is the reference's, and no warning."""
    row = METHODS[method]
    row = row.with_base if has_base and row.with_base else row
    rng = np.random.default_rng(1)
    pool = vector(0, -0.0, 1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, 1, 2)
    experts = [row.expert(k, {}) for k in "abc"][:count]
    for most in (5, 6, 9, 11):  # the first of the pool: tiny, large, infinite, any
        base, *models = (rng.choice(pool[:most], (6, 20)) for _ in range(count + 1))
        root, subject = base if row.needs_base else None, Subject("x", (6, 20), tuple(experts), 42)
        wanted = row(shared).merge("x", root, models, experts)
        with np.errstate(all="ignore"):
            found = merge_arrays(row(shared), subject, root, models, 64)
        assert np.array_equal(found, wanted, equal_nan=True)
