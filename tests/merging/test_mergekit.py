"""Beside mergekit itself: deterministic methods agree, compat repeats it to the bit, and its della is biased.

Needs an installed mergekit 0.1.5 (scripts/compare makes one) and is skipped without; all of its merges run in
one process.  Two results agree where, at every element, they differ by at most 1e-6 of the largest magnitude
that has a part in it: the base's value, the experts', or the result's.  The deltas are as large as the base,
so this bound holds for them too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import della

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-6
HIDDEN, WIDE, LAYERS, VOCABULARY = 32, 48, 5, 64
EXPERTS = ("code", "math", "story")  # in the order of their names, which is the order in which ours are added
HALF = "tale"  # the last expert once more, in float16
QUANTUM = 2.0**-24
DENSITY, EPSILON = 0.5, 0.15
DRAWS, BIAS_SHAPE = 500, (8, 1000)

Tensors = dict[str, NDArray[np.floating[Any]]]


# ---- recipes ----------------------------------------------------------------------------------------------


def recipe(method: str, own: Any = None, shared: Any = None, **keys: Any) -> dict[str, Any]:
    """``own``: the parameters of each expert (one set for all, or a list), a weight added where missing."""
    sets = own if isinstance(own, list) else [own or {}] * len(EXPERTS)
    weights = (0.5, 0.3, 0.9)
    models = [
        {"model": name, "parameters": {"weight": weight, **mine}}
        for name, weight, mine in zip(EXPERTS, weights, sets, strict=True)
    ]
    made = {"models": models, "merge_method": method, "parameters": shared or {}, "dtype": "float32", **keys}
    return made if method == "linear" else made | {"base_model": "base"}


def with_base(made: dict[str, Any], **parameters: float) -> dict[str, Any]:
    """The same with the base listed among the models."""
    entry = {"model": "base", **({"parameters": parameters} if parameters else {})}
    return {**made, "models": [made["models"][0], entry, *made["models"][1:]]}


def shared_only(made: dict[str, Any]) -> dict[str, Any]:
    """The same with no parameters of the models' own."""
    return {**made, "models": [{"model": entry["model"]} for entry in made["models"]]}


def with_half(made: dict[str, Any]) -> dict[str, Any]:
    """The same with one expert more, which is stored in float16."""
    more = {} if made["merge_method"] == "sce" else {"weight": 0.4}
    return {**made, "models": [*made["models"], {"model": HALF, "parameters": more}]}


def other_order(made: dict[str, Any]) -> dict[str, Any]:
    """The same with the models listed the other way round."""
    return {**made, "models": made["models"][::-1]}


NEGATIVE = [{"weight": 0.7}, {"weight": -0.4}, {"weight": 1.1}]
GRADIENTS = [{"weight": [0.2, 0.9, 0.4]}, {"weight": [1, 0]}, {"weight": 0.6}]
FILTERS = [
    {"weight": [{"filter": "mlp", "value": 0.3}, {"filter": "attn", "value": [0.2, 0.8]}, {"value": 0.5}]},
    {"weight": [{"filter": "embed", "value": 0}, {"filter": "lm_head", "value": 2}, {"value": [0.5, 1]}]},
    {"weight": {"filter": "*", "value": 0.7}},
]
DENSITIES = [
    {"density": [0.2, 0.9]},
    {"density": 0.35},
    {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.8}]},
]
BAND = {"density": [0.5, 0.9], "gamma": [0.1, 0]}
AGAIN = {"normalize": True, "rescale": True}


def some(method: str, *models: str, base: bool = True, **shared: Any) -> dict[str, Any]:
    """Several models with no weights but those that ``shared`` gives in lists, beside a base or without."""
    columns = {key: shared.pop(key) for key in ("weight",) if key in shared}
    entries = [
        {"model": name, "parameters": {key: column[t] for key, column in columns.items()}}
        for t, name in enumerate(models)
    ]
    made = {"models": entries, "merge_method": method, "parameters": shared, "dtype": "float32"}
    return made | ({"base_model": "base"} if base else {})


def in_double(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "dtype": "float64"}


ARC = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": 0.9},
    {"value": 0.5},
]
PAIR = ("code", "math")
THREE: dict[str, Any] = {"weight": [0.5, 0.3, 0.9]}

RECIPES: dict[str, dict[str, Any]] = {
    "slerp": some("slerp", "base", "code", t=0.3),
    "slerp, base not listed": some("slerp", "code", t=0.6),
    "slerp, gradients": some("slerp", "base", "code", t=ARC),
    "slerp, beyond the ends": some("slerp", "base", "code", t=1.5),
    "nuslerp": some("nuslerp", *PAIR, weight=[0.7, 0.2]),
    "nuslerp, without a base": some("nuslerp", *PAIR, weight=[0.7, 0.2], base=False),
    "nuslerp, rows": some("nuslerp", *PAIR, weight=[0.7, 0.2], nuslerp_flatten=False),
    "nuslerp, columns": some(
        "nuslerp", *PAIR, weight=[0.2, 0.7], base=False, nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "nuslerp, negative": some("nuslerp", *PAIR, weight=[1.2, -0.2]),
    "multislerp": some("multislerp", *EXPERTS, **THREE),
    "multislerp, without a base": some("multislerp", *EXPERTS, base=False, **THREE),
    "multislerp, weights as they are": some("multislerp", *EXPERTS, normalize_weights=False, **THREE),
    "karcher": some("karcher", *EXPERTS, base=False),
    "karcher, many steps": some("karcher", "base", *EXPERTS, base=False, max_iter=1200, tol=1e-10),
    "model_stock": some("model_stock", *EXPERTS),
    "model_stock, filter_wise": some("model_stock", *PAIR, filter_wise=True),
    "sce": some("sce", *EXPERTS),
    "sce, select_topk": some("sce", *EXPERTS, select_topk=0.3),
    "sce, half precision": with_half(some("sce", *EXPERTS, select_topk=0.8)),
    "nearswap": some("nearswap", "base", "code", t=0.02),
    "nearswap, gradients": some("nearswap", "code", t=[0.001, 0.05]),
    "ram": some("ram", *EXPERTS, epsilon=0.02),
    "ramplus_tl": some("ramplus_tl", *EXPERTS, epsilon=0.02),
    "ramplus_tl, r": some("ramplus_tl", *EXPERTS, epsilon=0.03, r=0.5, alpha=0.9),
    "arcee_fusion, float64": in_double(some("arcee_fusion", "base", "code")),
    "slerp, float64": in_double(some("slerp", "base", "code", t=0.3)),
    "nuslerp, float64": in_double(some("nuslerp", *PAIR, weight=[0.7, 0.2])),
    "multislerp, float64": in_double(some("multislerp", *EXPERTS, **THREE)),
    "karcher, float64": in_double(some("karcher", *EXPERTS, base=False)),
    "model_stock, float64": in_double(some("model_stock", *EXPERTS)),
    "sce, float64": in_double(some("sce", *EXPERTS, select_topk=0.5)),
    "nearswap, float64": in_double(some("nearswap", "base", "code", t=0.02)),
    "ramplus_tl, float64": in_double(some("ramplus_tl", *EXPERTS, epsilon=0.02)),
    "linear": recipe("linear"),
    "linear, normalize false": recipe("linear", shared={"normalize": False}),
    "linear, negative": recipe("linear", NEGATIVE),
    "linear, gradients": recipe("linear", GRADIENTS),
    "linear, half precision": with_half(recipe("linear")),
    "linear, filters": recipe("linear", FILTERS),
    "linear, base among the models": with_base(recipe("linear"), weight=0.25),
    "linear, base_model listed": with_base(recipe("linear", base_model="base"), weight=0.25),
    "task_arithmetic": recipe("task_arithmetic"),
    "task_arithmetic, normalize": recipe("task_arithmetic", shared={"normalize": True}),
    "task_arithmetic, negative": recipe("task_arithmetic", NEGATIVE, {"normalize": True, "lambda": 0.7}),
    "task_arithmetic, gradients": recipe("task_arithmetic", GRADIENTS, {"lambda": [0.5, 1.5]}),
    "task_arithmetic, filters": recipe("task_arithmetic", FILTERS),
    "task_arithmetic, half precision": with_half(recipe("task_arithmetic")),
    "task_arithmetic, base listed": with_base(recipe("task_arithmetic")),
    "task_arithmetic, base listed with a weight": with_base(recipe("task_arithmetic"), weight=3.0),
    "task_arithmetic, one weight for all": shared_only(recipe("task_arithmetic", shared={"weight": 0.4})),
    "ties, density 1": recipe("ties", {"density": 1}),
    "ties, density .5": recipe("ties", {"density": 0.5}),
    "ties, density .2": recipe("ties", {"density": 0.2}, {"lambda": 1.3}),
    "ties, normalize false": recipe("ties", {"density": 0.5}, {"normalize": False}),
    "ties, int8_mask": recipe("ties", {"density": 0.5}, {"int8_mask": True}),
    "ties, rescale": recipe("ties", {"density": 0.3}, {"rescale": True}),
    "ties, density for all": recipe("ties", shared={"density": 0.4}),
    "ties, density for all but one": recipe("ties", [{}, {"density": 0.9}, {}], {"density": 0.4}),
    "ties, densities": recipe("ties", DENSITIES),
    "ties, negative": recipe("ties", [{**mine, "density": 0.6} for mine in NEGATIVE]),
    "ties, gradients": recipe("ties", GRADIENTS, {"density": [0.3, 0.9], "lambda": [1, 0.5, 1]}),
    "ties, filters": recipe("ties", FILTERS, {"density": [{"filter": "norm", "value": 1}, {"value": 0.5}]}),
    "ties, another order": other_order(recipe("ties", {"density": 0.5})),
    "ties, base listed": with_base(recipe("ties", {"density": 0.5})),
    "breadcrumbs": recipe("breadcrumbs", {"density": 0.8}),
    "breadcrumbs, gamma": recipe("breadcrumbs", {"density": 0.6, "gamma": 0.1}, {"lambda": 0.6}),
    "breadcrumbs, gamma gives way": recipe("breadcrumbs", {"density": 0.95, "gamma": 0.2}),
    "breadcrumbs, normalize": recipe("breadcrumbs", NEGATIVE, {"density": 0.7, "normalize": True}),
    "breadcrumbs_ties": recipe("breadcrumbs_ties", {"density": 0.8, "gamma": 0.05}),
    "breadcrumbs_ties, gradients": recipe("breadcrumbs_ties", GRADIENTS, BAND),
    "breadcrumbs_ties, normalize": recipe("breadcrumbs_ties", {"density": 0.7}, AGAIN),
    "della, density 1": recipe("della", {"density": 1, "epsilon": 0.1}),
    "della, defaults": recipe("della", NEGATIVE),
    "della, normalize false": recipe("della", {"density": 1}, {"normalize": False, "lambda": 1.2}),
    "della, gradients": recipe("della", GRADIENTS, {"density": 1, "lambda": [0.4, 1.1]}),
    "della_linear, density 1": recipe("della_linear", {"density": 1}, {"lambda": 0.9}),
    "della_linear, normalize": recipe("della_linear", FILTERS, {"normalize": True}),
    "dare_ties, density 1": recipe("dare_ties", {"density": 1}),
    "dare_ties, normalize": recipe("dare_ties", NEGATIVE, {"density": 1, "normalize": True}),
    "dare_linear, density 1": recipe("dare_linear", {"density": 1}),
    "dare_linear, filters": recipe("dare_linear", FILTERS, {"lambda": 0.5}),
}  # fmt: skip

# A negative weight in a mean: ours divides by the sum of |weight| (values: tests/reports/test_rules.py).
NEGATIVE_MEANS = (
    "task_arithmetic, negative", "ties, negative", "breadcrumbs, normalize", "della, defaults",
    "dare_ties, normalize",
)  # fmt: skip

# Not those that choose by magnitude: in bf16 many are equal, and mergekit's sort is unstable.
EXACT = [
    name
    for name, made in RECIPES.items()
    if made["merge_method"].startswith(("task_arithmetic", "dare", "della")) and "half" not in name
]


def in_bf16(made: dict[str, Any]) -> dict[str, Any]:
    """The same for the models of the folder bf16."""
    models = [{**entry, "model": f"bf16/{entry['model']}"} for entry in made["models"]]
    return {**made, "models": models, "base_model": "bf16/base", "dtype": "bfloat16"}


# ---- checkpoints ------------------------------------------------------------------------------------------


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """A Llama with grouped queries, by name."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, rows, columns in (
            *((f"self_attn.{letter}_proj", HIDDEN, HIDDEN) for letter in "qo"),
            *((f"self_attn.{letter}_proj", HIDDEN // 2, HIDDEN) for letter in "kv"),
            *((f"mlp.{kind}_proj", WIDE, HIDDEN) for kind in ("gate", "up")),
            ("mlp.down_proj", HIDDEN, WIDE),
        ):
            yield f"{name}.{part}.weight", (rows, columns)
        yield f"{name}.input_layernorm.weight", (HIDDEN,)
        yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def models() -> dict[str, Tensors]:
    """The base and the experts: random multiples of 2^-24, so that every delta is exact in float32.

    No two magnitudes of an expert's deltas are equal within a tensor: the tools break ties differently.
    Modulo 8 the magnitudes of the three experts are 1, 2 and 4, so no vote of equal weights can be tied.
    """
    made: dict[str, Tensors] = {name: {} for name in ("base", *EXPERTS)}
    for number, (name, shape) in enumerate(shapes()):
        rng = np.random.default_rng([20240617, number])
        size = int(np.prod(shape))
        base = rng.integers(-(1 << 20), 1 << 20, size)
        made["base"][name] = (base * QUANTUM).astype(np.float32).reshape(shape)
        for expert, residue in zip(EXPERTS, (1, 2, 4), strict=True):
            sizes = rng.choice(1 << 17, size, replace=False) * 8 + residue
            values = base + sizes * rng.choice((-1, 1), size)
            made[expert][name] = (values * QUANTUM).astype(np.float32).reshape(shape)
    made[HALF] = {name: values.astype(np.float16) for name, values in made[EXPERTS[-1]].items()}
    return made


def save(folder: Path, tensors: Tensors) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# ---- mergekit, once ---------------------------------------------------------------------------------------


def mergekit_python() -> str:
    """The Python that has mergekit; the test is skipped where there is none."""
    named = os.environ.get("DELLA_MERGEKIT_PYTHON")
    python = Path(named or ROOT / ".venv-mergekit/bin/python")
    if not python.is_file():
        if named:
            pytest.fail(f"DELLA_MERGEKIT_PYTHON is {named}, which is not there")
        pytest.skip("mergekit is not installed: scripts/compare installs it into .venv-mergekit")
    return str(python.absolute())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, every recipe as NUMBER.yml, mergekit's result of it as mergekit-NUMBER.

    Those in bf16 are bf16-NUMBER.yml and mergekit-bf16-NUMBER.
    """
    python = mergekit_python()
    folder = tmp_path_factory.mktemp("mergekit")
    for name, tensors in models().items():
        save(folder / name, tensors)
        save(folder / "bf16" / name, {key: np.asarray(t, ml_dtypes.bfloat16) for key, t in tensors.items()})
    recipes = {str(number): made for number, made in enumerate(RECIPES.values())}
    recipes |= {f"bf16-{number}": in_bf16(RECIPES[name]) for number, name in enumerate(EXACT)}
    for number, made in recipes.items():
        (folder / f"{number}.yml").write_text(json.dumps(made))
    merges = [(f"{number}.yml", f"mergekit-{number}") for number in recipes]
    np.save(folder / "delta.npy", bias_delta())
    bias = {"delta": "delta.npy", "draws": DRAWS, "density": DENSITY, "epsilon": EPSILON, "out": "mean.npy"}
    (folder / "tasks.json").write_text(json.dumps({"merges": merges, "bias": bias}))
    runner = Path(__file__).with_name("mergekit_runner.py")
    done = subprocess.run(
        [python, str(runner), "tasks.json"], cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


# ---- the tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True], ids=["own rules", "compat"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_agrees(site: Path, tmp_path: Path, name: str, compat: bool) -> None:
    number = list(RECIPES).index(name)
    if name in NEGATIVE_MEANS and not compat:
        with della.plan(site / f"{number}.yml") as plan:
            assert any("sum of |weight|" in line for line in plan.departures)
        return
    della.merge(site / f"{number}.yml", tmp_path / "out", compat=compat, fsync=False, threads=1)
    ours, theirs = load(tmp_path / "out"), load(site / f"mergekit-{number}")
    inputs = [load(site / model) for model in ("base", *EXPERTS, HALF)]
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype == np.dtype(RECIPES[name]["dtype"])
        parts = [np.abs(values[tensor]) for values in inputs]
        scale = np.max([*parts, np.abs(expected)], axis=0)
        off = np.abs(ours[tensor].astype(np.float64) - expected) / scale
        assert off.max() <= TOLERANCE, f"{tensor}: element {off.argmax()} is off by {off.max():.2e}"


@pytest.mark.parametrize("name", EXACT)
def test_compat_repeats_bf16_to_the_bit(site: Path, tmp_path: Path, name: str) -> None:
    number = EXACT.index(name)
    della.merge(site / f"bf16-{number}.yml", tmp_path / "out", compat=True, fsync=False, threads=1)
    ours, theirs = load(tmp_path / "out"), load(site / f"mergekit-bf16-{number}")
    assert ours.keys() == theirs.keys()
    different = [tensor for tensor, expected in theirs.items() if not np.array_equal(ours[tensor], expected)]
    assert different == []


def bias_delta() -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal(BIAS_SHAPE).astype(np.float32)


def factors(mean: NDArray[Any], groups: int) -> NDArray[np.float64]:
    """By what the deltas were multiplied in the mean, for equal groups by the magnitude's rank in its row."""
    delta = bias_delta()
    order = np.argsort(np.abs(delta), axis=1)
    above, below = (
        np.take_along_axis(np.abs(values), order, axis=1).reshape(delta.shape[0], groups, -1).sum(axis=(0, 2))
        for values in (mean, delta)
    )
    return np.asarray(above / below, np.float64)


def test_della_of_mergekit_is_biased(site: Path) -> None:
    mean = np.load(site / "mean.npy")
    assert np.all(np.diff(factors(mean, 10)) > 0)
    by_percent = factors(mean, 100)
    assert by_percent[0] == pytest.approx(0.62, abs=0.02)
    assert by_percent[-1] == pytest.approx(1.16, abs=0.02)


def test_our_della_is_unbiased(tmp_path: Path) -> None:
    """Many tensors with one delta are many draws: the random stream is that of the tensor's name."""
    names = [f"draw.{number}.weight" for number in range(DRAWS)]
    save_file(dict.fromkeys(names, np.zeros(BIAS_SHAPE, np.float32)), tmp_path / "base.safetensors")
    save_file(dict.fromkeys(names, bias_delta()), tmp_path / "expert.safetensors")
    made = {
        "models": [{"model": str(tmp_path / "expert.safetensors")}],
        "base_model": str(tmp_path / "base.safetensors"),
        "merge_method": "della",
        "parameters": {"density": DENSITY, "epsilon": EPSILON},
    }
    della.merge(made, tmp_path / "out.safetensors", fsync=False, threads=1)
    drawn = np.stack(list(load_file(tmp_path / "out.safetensors").values()))
    mean = np.asarray(drawn.mean(axis=0, dtype=np.float64))
    assert factors(mean, 10) == pytest.approx(1, abs=0.01)
    assert factors(mean, 100) == pytest.approx(1, abs=0.03)
