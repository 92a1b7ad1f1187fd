"""Golden bytes: the demo's trio by every method and with every option once, against committed hashes.

The expected bytes of other tests come from reference.py, so a change that moves the reference and the kernels
alike passes there; here it does not.  `python tests/test_golden.py` writes the hashes anew, for a change that
is meant to move bytes: CHANGELOG.md then says which, and why.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, by which safetensors reads)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import della
from della.experiments.demo import EXPERTS, TRIO

HASHES = Path(__file__).with_name("golden.json")
METHODS = (
    "della", "della_linear", "dare_ties", "dare_linear", "ties", "task_arithmetic", "breadcrumbs",
    "breadcrumbs_ties", "linear", "paper_ta", "paper_dare", "paper_ties", "paper_della",
)  # fmt: skip
WEIGHTS = {"lm": 0.5, "math": 0.9, "code": 0.7}
Case = dict[str, Any]


def _options() -> dict[str, Case]:
    """Every option once, beside the defaults: name -> what it changes of the recipe of `_recipe`."""
    found: dict[str, Case] = {}
    values: dict[str, dict[str, tuple[Any, ...]]] = {
        "della": {
            "rank_by": ("tensor", "random", "random_tensor", "magnitude", "optimal"),
            "importance": ("wanda",),
            "ladder": ("paper",),
            "coupling": ("systematic",),
            "rescale": ("none", "l1", True, False),
            "vote": ("unweighted", "count", "none"),
            "fuse": ("sum", "calibrated"),
            "normalize": (True, False),
            "lambda_scaling": ("row", "row_inverse", "tensor"),
            "lambda": (0.6,),
            "epsilon": (0.05,),
            "window_size": (0.4,),
            "density": (0, 1),
        },
        "ties": {"scope": ("row", "model"), "importance": ("wanda",), "rescale": ("l1",)},
        "breadcrumbs": {"gamma": (0.05,), "importance": ("wanda",)},
        "dare_ties": {"coupling": ("systematic",), "rescale": ("none",)},
        "linear": {"normalize": (False,)},
    }
    for method, table in values.items():
        for key, choices in table.items():
            for value in choices:
                found[f"{method}, {key}: {value}"] = {"merge_method": method, "parameters": {key: value}}
    found["della, rank_by: optimal, importance: wanda"] = {
        "merge_method": "della", "parameters": {"rank_by": "optimal", "importance": "wanda"},
    }  # fmt: skip
    found["ties, scope: model, importance: wanda"] = {
        "merge_method": "ties", "parameters": {"scope": "model", "importance": "wanda"},
    }  # fmt: skip
    filtered = [{"filter": "mlp", "value": 0.8}, {"value": [0.2, 0.4]}]
    found["della, gradient and filter"] = {"merge_method": "della", "parameters": {"density": filtered}}
    for key, value in (
        ("seed", 7), ("dtype", "float32"), ("dtype", "float16"), ("out_dtype", "float8_e4m3fn"),
        ("out_dtype", "float64"), ("nonfinite", "keep"), ("nonfinite", "zero"),
    ):  # fmt: skip
        found[f"della, {key}: {value}"] = {"merge_method": "della", key: value}
    for method in METHODS[:9]:
        found[f"{method}, compat: mergekit"] = {"merge_method": method, "compat": "mergekit"}
    found["della, inputs in float32"] = {"merge_method": "della", "inputs": "float32"}
    found["ties, inputs in float32"] = {"merge_method": "ties", "inputs": "float32"}
    found["della, inputs in float64"] = {"merge_method": "della", "inputs": "float64"}
    found["linear, inputs in float64"] = {"merge_method": "linear", "inputs": "float64"}
    found["della, inputs in float16"] = {"merge_method": "della", "inputs": "float16"}
    for method in ("della", "ties", "paper_della", "task_arithmetic", "linear"):
        found[f"{method}, a negative weight"] = {"merge_method": method, "weights": {"code": -0.4}}
    found["ties, a negative weight, compat: mergekit"] = {
        "merge_method": "ties", "weights": {"code": -0.4}, "compat": "mergekit",
    }  # fmt: skip
    found["della, missing: base"] = {"merge_method": "della", "missing": "base", "inputs": "without"}
    found["della, extra: copy"] = {"merge_method": "della", "extra": "copy", "inputs": "beyond"}
    return found


CASES: dict[str, Case] = {method: {"merge_method": method} for method in METHODS} | _options()

# What says the same in two ways; every other option changes bytes.
SAME = [
    [
        "della", "della, rescale: True", "della, normalize: True", "della, nonfinite: keep",
        "della, nonfinite: zero",
    ],
    ["della, dtype: float32", "della, inputs in float32"],
    ["della, fuse: sum", "della, normalize: False"],
    ["della, rescale: none", "della, rescale: False"],
    ["paper_della", "della, vote: unweighted"],
]  # fmt: skip


def _recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The recipe of a case; models and norms come from ``folder``."""
    case = {key: value for key, value in case.items() if key != "inputs"}
    weights = WEIGHTS | case.pop("weights", {})
    own = dict(case.pop("parameters", {}))
    method = case["merge_method"]
    if method not in ("task_arithmetic", "linear", "paper_ta"):
        own.setdefault("density", 0.5)
    models = []
    for expert in EXPERTS:
        model: dict[str, Any] = {"model": str(folder / expert), "parameters": {"weight": weights[expert]}}
        if own.get("importance") == "wanda":
            model["input_norms"] = str(folder / f"{expert}-norms.safetensors")
        models.append(model)
    return {"models": models, "base_model": str(folder / "base"), "parameters": own} | case


def _changed(tensors: dict[str, Any], expert: str, kind: str) -> dict[str, Any]:
    """A model of the trio as the case wants it: in another type, without a tensor, or with one more."""
    if kind.startswith("float"):
        return {name: values.astype(kind) for name, values in tensors.items()}
    if kind == "without" and expert == "math":
        return {name: values for name, values in tensors.items() if "layers.1.mlp.up" not in name}
    if kind == "beyond" and expert == "code":
        return tensors | {"beyond.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return tensors


def _inputs(folder: Path, kind: str | None) -> Path:
    """The trio, or a changed copy of it, with norms that no library computes: the same on every machine."""
    home = folder / (kind or "plain")
    if home.exists():
        return home
    for number, expert in enumerate(("base", *EXPERTS)):
        tensors = load_file(TRIO / expert / "model.safetensors")
        (home / expert).mkdir(parents=True)
        save_file(_changed(tensors, expert, kind or ""), home / expert / "model.safetensors")
        norms = {
            name: ((np.arange(values.shape[1]) * (3 + number) + len(name)) % 17 + 0.5).astype(np.float32)
            for name, values in tensors.items()
            if values.ndim == 2 and "embed" not in name
        }
        save_file(norms, home / f"{expert}-norms.safetensors")
    return home


def hash_of(name: str, folder: Path) -> str:
    """sha256 of the file of weights that a case gives."""
    out = folder / "out"
    recipe = _recipe(CASES[name], _inputs(folder, CASES[name].get("inputs")))
    della.merge(recipe, out, overwrite=True, fsync=False, allow_idle=True)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def test_every_case_has_a_hash() -> None:
    expected = json.loads(HASHES.read_text())
    assert list(expected) == list(CASES)
    alike: dict[str, list[str]] = {}
    for name, digest in expected.items():
        alike.setdefault(digest, []).append(name)
    assert sorted(names for names in alike.values() if len(names) > 1) == SAME


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(name: str, folder: Path) -> None:
    assert hash_of(name, folder) == json.loads(HASHES.read_text())[name]


def main() -> None:
    with tempfile.TemporaryDirectory() as site:
        found = {name: hash_of(name, Path(site)) for name in CASES}
    HASHES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
