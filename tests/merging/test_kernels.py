"""The fast kernels give the reference's bytes: every method, every option, awkward shapes and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della.merging.driver import merge_arrays
from della.merging.registry import ALL_PARAMETERS, METHODS, Method
from della.merging.tile import Expert, Subject, canonical, row_length

Array = np.ndarray[Any, np.dtype[np.float32]]

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (5, 1), (1, 9), (40, 300), (4, 3, 3, 3), (3, 4, 40), (2, 5, 3), (3, 700), (0, 4), (2, 0),
]  # fmt: skip
OWN: tuple[dict[str, Any], ...] = (
    {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "gamma": 0.05, "input_norms": "FILE"},
    {"weight": 0.7, "density": 0.6, "epsilon": 0.4, "gamma": 0.5, "input_norms": "FILE"},
    {"weight": -0.3, "density": 0.3, "epsilon": 0.1, "gamma": 0.0, "input_norms": "FILE"},
)


def fast(
    method: Method, base: Array, models: Sequence[Array], experts: Sequence[Expert], name: str, target: int
) -> Array:
    """The merge by the kernels, in tiles of about ``target`` elements."""
    order = canonical(experts)
    subject = Subject(name, base.shape, tuple(experts[t] for t in order), 42)
    return merge_arrays(method, subject, base, [models[t] for t in order], target)


def three(name: str) -> list[Expert]:
    return [METHODS[name].expert(identity, own) for identity, own in zip("cab", OWN, strict=True)]


def two(name: str, density: float, epsilon: float) -> list[Expert]:
    own = {"density": density, "epsilon": epsilon}
    return [METHODS[name].expert(key, {"weight": w, **own}) for key, w in (("a", 1.0), ("b", 0.5))]


def bf16(values: Any) -> Array:
    return np.asarray(np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32))


def model_data(shape: tuple[int, ...], kind: str, seed: int) -> tuple[Array, list[Array]]:
    """A base and three experts: on the lattice of bfloat16, or continuous with heavy tails."""
    rng = np.random.default_rng(seed)
    if kind == "bf16":
        base = bf16(rng.standard_normal(shape) * 0.02)
        return base, [bf16(base + rng.standard_normal(shape) * 0.001) for _ in OWN]
    base = np.asarray(rng.standard_normal(shape), np.float32)
    return base, [np.asarray(base + rng.standard_t(1, shape), np.float32) for _ in OWN]


def options(refused: bool) -> list[tuple[str, dict[str, Any]]]:
    """Every method as it is, and with every other value of every option: those that fit, or the refused."""
    found: list[tuple[str, dict[str, Any]]] = []
    for method in METHODS.values():
        if "lambda" not in method.parameters:  # tests/merging/test_directions.py
            continue
        tries: list[dict[str, Any]] = [{}]
        for parameter in method.parameters.values():
            for value in parameter.choices:
                # calibrated corrects a vote; scope: model needs a whole model (tests/test_run.py)
                vote = {"vote": "weighted"} if value == "calibrated" else {}
                if value not in ("model", parameter.default):
                    tries.append({parameter.name: value} | vote)
        found += [
            (method.name, shared)
            for shared in tries
            if any(method.problems(shared, dict(zip("cab", OWN, strict=True)))) == refused
        ]
    return found


@pytest.mark.parametrize(("name", "shared"), options(refused=False), ids=str)
def test_every_option_gives_the_reference_bytes(name: str, shared: dict[str, Any]) -> None:
    picked = METHODS[name]({**shared, "lambda": 1.3})
    experts = three(name)
    for number, shape in enumerate(SHAPES):
        for kind in ("bf16", "f32"):
            base, models = model_data(shape, kind, number)
            wanted = picked.merge("x", base, models, experts)
            assert wanted.dtype == np.float32
            for target in (64, 1 << 17):
                got = fast(picked, base, models, experts, "x", target)
                assert got.tobytes() == wanted.tobytes(), (shape, kind, target)


def with_norms(experts: Sequence[Expert], n: int, seed: int) -> list[Expert]:
    """Two of three experts with norms of n features, some of them 0, equal, tiny or so large that scores
    overflow."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.standard_normal((2, n)) * 3).astype(np.float32)
    norms[:, ::5], norms[:, 1::5] = 0, 1.5
    norms[1, 2::7], norms[1, 3::7] = 1e-42, 3e38
    return [experts[0], *(replace(e, norms=own) for e, own in zip(experts[1:], norms, strict=True))]


WANDA = [
    (name, {**shared, "importance": "wanda"})
    for name, shared in options(refused=False)
    if "importance" in METHODS[name].parameters and not shared.get("rank_by", "").startswith("random")
]


@pytest.mark.parametrize(("name", "shared"), WANDA, ids=str)
def test_scores_with_input_norms_give_the_reference_bytes(name: str, shared: dict[str, Any]) -> None:
    picked = METHODS[name](shared)
    plain = three(name)
    for number, shape in enumerate(shape for shape in SHAPES if len(shape) == 2):
        for kind in ("bf16", "f32"):
            base, models = model_data(shape, kind, number)
            experts = with_norms(plain, shape[1], number)
            wanted = picked.merge("x", base, models, experts)
            for target in (64, 1 << 17):
                got = fast(picked, base, models, experts, "x", target)
                assert got.tobytes() == wanted.tobytes(), (shape, kind, target)
            if shape == (40, 300):
                assert wanted.tobytes() != picked.merge("x", base, models, plain).tobytes()


def test_only_what_makes_no_sense_is_refused() -> None:
    without_probabilities = ("ties", "paper_ties", "breadcrumbs", "breadcrumbs_ties")
    per_element = [(name, {"rescale": "per_element"}) for name in without_probabilities]
    calibrated = [
        (name, {"fuse": "calibrated", "vote": "weighted"})
        for name in (*without_probabilities, "task_arithmetic", "paper_ta")
    ]
    assert sorted(options(refused=True), key=str) == sorted(per_element + calibrated, key=str)


# Values that break naive ranking: zeros of both signs, denormals, equal magnitudes, many powers of two apart.
awkward = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0000001, 3e38, -3e38, 2.0**-20, 2.0**-90]),
    st.floats(-4, 4, width=16),
    st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(awkward, min_size=1, max_size=80), min_size=1, max_size=3),
    st.sampled_from(ALL_PARAMETERS["rank_by"].choices),
    st.sampled_from(["symmetric", "paper"]),
    st.sampled_from(["della", "della_linear", "ties", "dare_ties", "breadcrumbs"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_values_give_the_reference_bytes(
    rows: list[list[float]], rank_by: str, ladder: str, name: str, density: float, width: float
) -> None:
    n = min(len(row) for row in rows)
    delta = np.array([row[:n] for row in rows], np.float32)
    base = np.zeros_like(delta)
    epsilon = width * min(density, 1 - density)
    shared = {"rank_by": rank_by, "ladder": ladder} if name.startswith("della") else {}
    picked = METHODS[name](shared)
    experts = two(name, density, epsilon)
    models = [delta, delta[::-1, ::-1].copy()]
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = picked.merge("x", base, models, experts)
    assert fast(picked, base, models, experts, "x", 7).tobytes() == wanted.tobytes()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(awkward, min_size=1, max_size=60), min_size=1, max_size=3),
    st.lists(awkward.map(abs), min_size=60, max_size=60),
    st.sampled_from(["row", "tensor", "magnitude", "optimal"]),
    st.sampled_from(["tensor", "row"]),
    st.sampled_from(["della", "ties", "breadcrumbs"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_norms_give_the_reference_bytes(
    rows: list[list[float]], norms: list[float], rank_by: str, scope: str, name: str, density: float,
    width: float,
) -> None:  # fmt: skip
    n = min(len(row) for row in rows)
    delta = np.array([row[:n] for row in rows], np.float32)
    shared = {"rank_by": rank_by} if name == "della" else {"scope": scope} if name == "ties" else {}
    picked = METHODS[name]({**shared, "importance": "wanda"})
    epsilon = width * min(density, 1 - density)
    vector = np.array(norms[:n], np.float32)
    one, other = two(name, density, epsilon)
    experts = [replace(one, norms=vector), other]
    models = [delta, delta[::-1, ::-1].copy()]
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = picked.merge("x", np.zeros_like(delta), models, experts)
    got = fast(picked, np.zeros_like(delta), models, experts, "x", 7)
    assert got.tobytes() == wanted.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 400), st.integers(0, 1000))
def test_ranks_of_rows_with_many_equal_and_many_different_values(n: int, distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(distinct) * 10.0 ** rng.integers(-9, 9, distinct)
    delta = values[rng.integers(0, distinct, (2, n))].astype(np.float32)
    picked, experts = METHODS["della_linear"]({}), two("della_linear", 0.5, 0.4)[:1]
    wanted = picked.merge("x", np.zeros_like(delta), [delta], experts)
    got = fast(picked, np.zeros_like(delta), [delta], experts, "x", 1 << 17)
    assert got.tobytes() == wanted.tobytes()


def continuous_rows(n: int) -> Array:
    """Rows that spread badly over buckets: crowds, equal values, outliers, zeros, denormals, NaN, inf."""
    gauss = np.random.default_rng(n).standard_normal((8, n)).astype(np.float32)
    gauss[0, ::2] *= np.float32(1e-4)
    gauss[1] = 1 + gauss[1] * np.float32(1e-4)
    gauss[2, :16] *= 1e30
    gauss[3] = np.exp(3 * gauss[3])
    gauss[4] = gauss[4, np.arange(n) % max(n // 3, 1)]
    gauss[5] *= np.float32(1e-42)
    gauss[6, ::7], gauss[6, 1::7], gauss[6, 2::50] = 0.0, -0.0, np.inf
    gauss[7, 3::40] = np.nan
    gauss[7].view(np.uint32)[0] = 0xFFFFFFFF
    return gauss


@pytest.mark.parametrize("n", [5, 127, 128, 129, 1023, 4096, 32768, 32769])
@pytest.mark.parametrize("rank_by", ["row", "random"])
def test_continuous_rows_give_the_reference_bytes(n: int, rank_by: str) -> None:
    delta = continuous_rows(n)
    picked, experts = METHODS["della_linear"]({"rank_by": rank_by}), two("della_linear", 0.5, 0.4)[:1]
    # A NaN has no rank in the reference: the last row only must not disturb the others.
    wanted = picked.merge("x", np.zeros_like(delta), [delta], experts)
    got = fast(picked, np.zeros_like(delta), [delta], experts, "x", delta.size)
    assert got[:7].tobytes() == wanted[:7].tobytes()


def test_a_long_row_of_continuous_values() -> None:
    delta = np.random.default_rng(0).standard_normal((1, 300_000)).astype(np.float32)
    picked, experts = METHODS["della_linear"]({}), two("della_linear", 0.5, 0.4)[:1]
    wanted = picked.merge("x", np.zeros_like(delta), [delta], experts)
    assert fast(picked, np.zeros_like(delta), [delta], experts, "x", 1024).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("name", "shape", "length"),
    [
        ("w", (), 1), ("w", (5,), 5), ("w", (3, 4), 4), ("conv.weight", (8, 4, 3), 12), ("w", (8, 4, 3), 12),
        ("mlp.experts.down_proj", (8, 4, 3), 3), ("w", (8, 64, 32), 32),
        ("pos_conv.weight", (8, 64, 128), 8192),
        ("w", (8, 4, 3, 3), 36), ("w", (8, 4, 3, 3, 3), 108),
    ],
)  # fmt: skip
def test_a_row_is_what_feeds_one_output(name: str, shape: tuple[int, ...], length: int) -> None:
    assert row_length(name, shape) == length
