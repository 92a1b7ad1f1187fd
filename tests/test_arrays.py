"""Merges in memory: the bytes of a merge of files, for NumPy, ml_dtypes and torch, without a copy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llamas import EXPERTS, SEVERAL, Tensors, as_stored, load, recipe, trio

import della
from della import arrays
from della.dtypes import DTYPES
from della.errors import CheckpointError, DellaError, OutputError, RecipeError
from della.merging.registry import METHODS

OWN: list[dict[str, Any]] = [
    {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "gamma": 0.05},
    {"weight": 0.7, "density": 0.6, "epsilon": 0.4, "gamma": 0.5},
    {"weight": -0.3, "density": 0.3, "epsilon": 0.1, "gamma": 0.0},
]
FLOATS = [row.numpy for row in DTYPES.values() if row.is_float]


@pytest.fixture(scope="module")
def models(models: Path) -> tuple[Path, dict[str, Tensors]]:
    """The trio on disk, and its tensors."""
    return models, trio()


def options(method: str, **shared: Any) -> dict[str, Any]:
    """What merge_tensors takes for the parameters OWN."""
    known = METHODS[method].parameters
    columns = {"weights": "weight", "density": "density", "epsilon": "epsilon", "gamma": "gamma"}
    own = {ours: [mine[name] for mine in OWN] for ours, name in columns.items() if name in known}
    return {"method": method, "names": EXPERTS, **own, **shared}


SHARED: list[tuple[str, dict[str, Any]]] = [
    ("della", {"rank_by": "tensor", "rescale": "l1", "lambda": 0.7}),
    ("della", {"fuse": "calibrated", "coupling": "systematic", "lambda_scaling": "tensor"}),
    ("dare_ties", {"rescale": False, "vote": "count"}),
    ("ties", {"scope": "row", "rescale": True}),
    ("linear", {"normalize": False}),
]


@pytest.mark.parametrize(("method", "shared"), [*((name, {}) for name in SEVERAL), *SHARED], ids=str)
def test_state_dicts_give_the_bytes_of_files(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path, method: str, shared: dict[str, Any]
) -> None:
    folder, tensors = models
    known = METHODS[method].parameters
    own = [{key: value for key, value in mine.items() if key in known} for mine in OWN]
    della.merge(recipe(folder, method, own, shared, seed=7), tmp_path / "out", fsync=False)
    named = {"lambda_" if key == "lambda" else key: value for key, value in shared.items()}
    merged = della.merge_state_dicts(
        tensors["base"] if METHODS[method].needs_base else None,
        [tensors[name] for name in EXPERTS], seed=7, **options(method, **named),
    )  # fmt: skip
    assert as_stored(merged) == load(tmp_path / "out")


def test_the_order_of_experts_does_not_matter_but_their_names_do(
    models: tuple[Path, dict[str, Tensors]],
) -> None:
    _, tensors = models
    name = "model.layers.1.mlp.up_proj.weight"
    base, experts = tensors["base"][name], [tensors[expert][name] for expert in EXPERTS]
    wanted = della.merge_tensors(base, experts, names=EXPERTS, density=0.5, name=name)
    turned = della.merge_tensors(base, experts[::-1], names=EXPERTS[::-1], density=0.5, name=name)
    assert turned.tobytes() == wanted.tobytes()
    others: list[dict[str, Any]] = [{"names": None}, {"name": "other"}, {"seed": 1}]
    for other in others:
        given: dict[str, Any] = {"names": EXPERTS, "density": 0.5, "name": name, **other}
        changed = della.merge_tensors(base, experts, **given)
        assert changed.tobytes() != wanted.tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 4), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_dtypes_stay(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    base, one, two = (np.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(3))
    for method in SEVERAL:
        merged = della.merge_tensors(base, [one, two], method=method, density=0.5, epsilon=0.1)
        assert (merged.shape, merged.dtype) == (shape, np.dtype(dtype))
        assert isinstance(merged, np.ndarray)
    for rank_by in ("row", "tensor", "random", "random_tensor", "magnitude", "optimal"):
        for ladder in ("symmetric", "paper"):
            pruned = della.magprune(base, 0.5, 0.2, rank_by=rank_by, ladder=ladder)
            wide = np.float64 if dtype == np.float64 else np.float32
            assert (pruned.shape, pruned.dtype) == (shape, np.dtype(wide))


def test_arrays_that_are_not_contiguous(models: tuple[Path, dict[str, Tensors]]) -> None:
    _, tensors = models
    name = "model.layers.1.mlp.up_proj.weight"
    straight = [tensors[model][name] for model in ("base", *EXPERTS)]
    spread = [np.repeat(np.repeat(array, 2, 0), 2, 1)[::2, ::2] for array in straight]
    turned = [np.asfortranarray(array) for array in straight]
    wanted = della.merge_tensors(straight[0], straight[1:], density=0.5)
    for given in (spread, turned):
        assert not given[0].flags.c_contiguous
        assert della.merge_tensors(given[0], given[1:], density=0.5).tobytes() == wanted.tobytes()
    delta = straight[1].astype(np.float32) - straight[0].astype(np.float32)
    assert della.magprune(np.asfortranarray(delta), 0.5).tobytes() == della.magprune(delta, 0.5).tobytes()


def test_inputs_are_not_changed() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        base, expert = (rng.standard_normal((5, 9)).astype(dtype) for _ in range(2))
        before = base.tobytes(), expert.tobytes()
        for method, row in METHODS.items():
            more: dict[str, Any] = {"t": 0.5} if "t" in row.parameters else {}
            merged = della.merge_tensors(base, [expert] * row.experts[0], method=method, density=0.5, **more)
            assert not np.shares_memory(merged, expert)
            assert not np.shares_memory(merged, base)
        della.magprune(expert, 0.5)
        assert (base.tobytes(), expert.tobytes()) == before
    ids = np.arange(3)
    copied = della.merge_state_dicts({"ids": ids}, [{"ids": ids + 1}])
    assert copied["ids"].tolist() == [0, 1, 2]
    assert not np.shares_memory(copied["ids"], ids)


def test_magprune_is_the_drop_of_a_merge() -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((6, 50)).astype(np.float32)
    pruned = della.magprune(delta, 0.6, 0.2, seed=3, name="w", expert="math")
    merged = della.merge_tensors(
        np.zeros_like(delta), [delta], method="della_linear", density=0.6, epsilon=0.2, seed=3, name="w",
        names=["math"],
    )  # fmt: skip
    assert pruned.tobytes() == merged.tobytes()
    assert 0 < np.count_nonzero(pruned) < delta.size
    assert della.magprune(delta, 1).tobytes() == delta.tobytes()
    assert not della.magprune(delta, 0).any()


def test_linear_is_the_mean_of_the_models_whatever_the_base() -> None:
    one, two = np.array([1.0, 5.0], np.float32), np.array([3.0, -1.0], np.float32)
    for base in (None, np.array([100.0, 100.0])):
        assert della.merge_tensors(base, [one, two], method="linear").tolist() == [2, 2]
        summed = della.merge_tensors(base, [one, two], method="linear", normalize=False)
        assert (summed.tolist(), summed.dtype) == ([4, 4], np.float32)
    merged = della.merge_state_dicts({"v": one}, [{"w": one}, {"w": two}], method="linear", weights=[1, 3])
    assert {name: value.tolist() for name, value in merged.items()} == {"w": [2.5, 0.5]}


def test_a_list_of_numbers_is_an_array_of_float64() -> None:
    merged = della.merge_tensors([0.0, 1.0], [[1.0, 3.0]], method="task_arithmetic", weights=0.5)
    assert (merged.tolist(), merged.dtype) == ([0.5, 2.0], np.float64)


# ---- refusals ---------------------------------------------------------------------------------------------

W = np.array([[1.0, 2.0]], np.float32)


def said(kind: type[DellaError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("experts", "given", "sentence"),
    [
        ([], {}, "no experts: at least one is needed"),
        ([W], {"method": "dela"}, "method 'dela': expected one of della, della_linear, dare_ties, "
         "dare_linear, ties, task_arithmetic, breadcrumbs, breadcrumbs_ties, linear, passthrough, slerp, "
         "nuslerp, multislerp, karcher, model_stock, sce, nearswap, ram, ramplus_tl, arcee_fusion, "
         "paper_ta, paper_dare, paper_ties, paper_della; did you mean 'della'?"),
        ([W], {"densty": 1}, "della has no parameter 'densty'"),
        ([W], {"rank_buy": "row"}, "della has no parameter 'rank_buy'; did you mean 'rank_by'?"),
        ([W], {"method": "ties", "rank_by": "row"}, "ties has no parameter 'rank_by'"),
        ([W], {"vote": "all"}, "'vote' must be one of weighted, unweighted, count, none, found 'all'"),
        ([W], {"vote": True}, "'vote' must be one of weighted, unweighted, count, none, found True"),
        ([W], {"lambda_": "1"}, "'lambda' must be a number, found '1'"),
        ([W], {"lambda_": float("nan")}, "'lambda' must be a finite number, found nan"),
        ([W], {"normalize": "no"}, "'normalize' must be true or false, found 'no'"),
        ([W], {"density": 1.5}, "'density' must lie between 0 and 1, found 1.5"),
        ([W], {"density": float("nan")}, "'density' must be a finite number, found nan"),
        ([W], {"weights": float("inf")}, "'weight' must be a finite number, found inf"),
        ([W], {"density": "0.5"}, "'density' must be a number, found '0.5'"),
        ([W, W], {"gamma": [0.1, 2]}, "'gamma' must lie between 0 and 1, found 2"),
        ([W, W], {"weights": [1]}, "weight: 1 values for 2 experts"),
        ([W, W], {"names": ["a", "a"]}, "names: expected 2 different names, found ['a', 'a']"),
        ([W, W], {"names": ["a"]}, "names: expected 2 different names, found ['a']"),
        ([W], {"density": 0.9}, "expert1: density 0.9 with epsilon 0.15 gives keep probabilities from 0.75 "
         "to 1.05, which leave [0, 1]; use an epsilon of at most 0.1"),
        ([W], {"method": "ties", "scope": "model"}, "scope: model needs the whole model; merge checkpoints "
         "instead, or give scope=\"tensor\""),
        ([W, W], {"method": "linear", "weights": [1, -1]}, "the weights 1, -1 add up to 0, so they have no "
         "mean; use normalize: false"),
    ],
)  # fmt: skip
def test_wrong_arguments(experts: Sequence[Any], given: dict[str, Any], sentence: str) -> None:
    assert said(RecipeError, lambda: della.merge_tensors(W, experts, **given)) == sentence


def test_a_method_that_needs_a_base() -> None:
    assert said(RecipeError, lambda: della.merge_tensors(None, [W])) == "della needs a base"
    assert said(RecipeError, lambda: della.merge_state_dicts({}, [])) == "no experts: at least one is needed"


def test_wrong_values_for_magprune() -> None:
    assert said(RecipeError, lambda: della.magprune(W, 0.5, rank_by="column")) == (
        "'rank_by' must be one of row, tensor, random, random_tensor, magnitude, optimal, found 'column'"
    )
    assert said(RecipeError, lambda: della.magprune(W, 2)) == ("'density' must lie between 0 and 1, found 2")
    assert said(CheckpointError, lambda: della.magprune(np.arange(3), 0.5)) == (
        "delta: dtype int64; only floats are merged"
    )


def test_wrong_arrays() -> None:
    assert said(CheckpointError, lambda: della.merge_tensors(W, [W, W.T], name="w")) == (
        "w of expert 2: has shape [2, 1], expected [1, 2]"
    )
    assert said(CheckpointError, lambda: della.merge_tensors(W, [W.astype(">f4")], name="w")) == (
        "w of expert 1: dtype >f4 is not one that models are stored in"
    )
    assert said(CheckpointError, lambda: della.merge_tensors(np.array(["x"]), [W], name="w")) == (
        "w of the base: dtype <U1 is not one that models are stored in"
    )
    for dtype in FLOATS:
        bad = np.array([[1, np.nan]], dtype)
        with pytest.raises(CheckpointError) as caught:
            della.merge_tensors(W, [W, bad], name="w")
        assert str(caught.value) == "w of expert 2: holds NaN or infinity (element 1 is nan)"


def test_state_dicts_that_do_not_fit() -> None:
    base = {"a": W, "b": W}
    assert said(CheckpointError, lambda: della.merge_state_dicts(base, [{"b": W}, {}])) == (
        "3 problems:\n  - expert 1: lacks a\n  - expert 2: lacks a\n  - expert 2: lacks b"
    )
    assert said(CheckpointError, lambda: della.merge_state_dicts({"a": W}, [{"a": W[0]}])) == (
        "a of expert 1: has shape [2], expected [1, 2]"
    )
    assert said(
        CheckpointError, lambda: della.merge_state_dicts({"a": W}, [{"a": np.ones((1, 2), int)}])
    ) == ("a of expert 1: dtype int64; only floats are merged")


def test_results_that_do_not_fit_their_dtype() -> None:
    half = np.array([1.0, 60000.0], np.float16)
    assert said(
        OutputError,
        lambda: della.merge_tensors(half * 0, [half], method="task_arithmetic", weights=2, name="w"),
    ) == (
        "w: element 1 becomes inf when it is rounded to float16; give arrays of a wider dtype, or a smaller "
        "lambda_"
    )
    double = np.array([1e300])
    with pytest.raises(OutputError, match=r"^w: element 0 becomes inf"):
        della.merge_tensors(-double, [double], method="task_arithmetic", weights=1e10, name="w")


# ---- torch ------------------------------------------------------------------------------------------------

TORCH_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_torch_tensors_are_merged_where_they_lie(name: str) -> None:
    torch: Any = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(6, 40, generator=generator).to(getattr(torch, name)) for _ in range(3))
    size = base.element_size()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    twin = DTYPES[next(key for key, row in DTYPES.items() if row.torch_name == name)].numpy
    mirrors = [np.asarray(tensor.view(bits).numpy()).view(twin) for tensor in (base, one, two)]
    seen = arrays._as_array(base, "base")
    assert (seen.dtype, seen.shape) == (twin, (6, 40))
    assert seen.ctypes.data == base.data_ptr(), "not a copy"
    merged = della.merge_tensors(base, [one, two], density=0.5)
    wanted = della.merge_tensors(mirrors[0], mirrors[1:], density=0.5)
    assert (merged.dtype, tuple(merged.shape)) == (base.dtype, (6, 40))
    assert merged.view(bits).numpy().tobytes() == wanted.tobytes()
    pruned = della.magprune(one, 0.5)
    assert pruned.dtype == (torch.float64 if name == "float64" else torch.float32)
    assert pruned.numpy().tobytes() == della.magprune(mirrors[1], 0.5).tobytes()


def test_torch_parameters_state_dicts_and_devices() -> None:
    torch: Any = pytest.importorskip("torch")
    layer, other = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    layer.register_buffer("count", torch.tensor(3))
    other.register_buffer("count", torch.tensor(4))
    layer.register_buffer("mask", torch.tensor([True, False]))
    other.register_buffer("mask", torch.tensor([True, True]))
    assert layer.weight.requires_grad
    merged = della.merge_tensors(layer.weight, [other.weight], method="ties", density=0.5)
    assert not merged.requires_grad
    whole = della.merge_state_dicts(layer.state_dict(), [other.state_dict()], method="ties", density=0.5)
    assert {type(value) for value in whole.values()} == {torch.Tensor}
    assert torch.equal(whole["weight"], merged) or whole["weight"].shape == merged.shape
    assert (whole["count"].item(), whole["mask"].tolist()) == (3, [True, False])
    layer.load_state_dict(whole)
    with pytest.raises(CheckpointError) as caught:
        della.merge_tensors(torch.ones(2, device="meta"), [torch.ones(2)], name="w")
    assert str(caught.value) == "w of the base: on device meta; move it to the CPU first: .cpu()"
    turned = torch.arange(6.0).reshape(2, 3).T
    assert not turned.is_contiguous()
    assert torch.equal(della.merge_tensors(turned, [turned], method="linear"), turned)


def test_torch_is_never_imported() -> None:
    program = (
        "import sys, numpy, della\n"
        "w = numpy.ones((2, 3), numpy.float32)\n"
        "della.merge_state_dicts({'w': w}, [{'w': w * 2}], method='ties', density=0.5)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
