"""Slices, gradients over them and passthrough beside mergekit itself: names and values are its own.

Needs an installed mergekit 0.1.5, as test_mergekit.py does.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mergekit import load, mergekit_python, models, save

import della

RESIDUAL = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], "parameters": parameters}


def recipe(method: str, slices: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": slices, "dtype": "float32", **keys}


def slices(*each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"sources": sources} for sources in each]


WEIGHT, DOUBLE = {"weight": 0.7}, {"filter": "mlp", "value": 2}
BASE = {"base_model": "base"}
RECIPES = {
    "passthrough": recipe("passthrough", slices([source("code", 0, 3)], [source("math", 1, 5)])),
    "the same over and over": recipe(
        "passthrough", slices(*([source("code", n, n + 2)] for n in (0, 1, 1, 3)))
    ),
    "one layer": recipe("passthrough", slices([source("code", 2, 3, scale=[0.5, 3])])),
    "scale by filters": recipe(
        "passthrough", slices([source("code", 0, 5)], [source("code", 2, 4, scale=RESIDUAL)])
    ),
    "gradients restart": recipe(
        "linear",
        slices(
            [source("code", 0, 3, weight=[0.2, 0.9, 0.4]), source("math", 2, 5, weight=0.5)],
            [source("math", 1, 3, weight=[1, 0]), source("story", 3, 5, weight=0.25)],
        ),
    ),
    "parameters at every level": recipe(
        "linear",
        [
            {"sources": [source("code", 0, 3), source("math", 0, 3, weight=3)], "parameters": WEIGHT},
            {"sources": [source("story", 3, 5), source("math", 2, 4, weight=[DOUBLE])]},
        ],
        parameters={"weight": [{"filter": "norm", "value": 0.3}, {"value": [0.5, 1]}], "normalize": False},
    ),
    "a base in every slice": recipe(
        "task_arithmetic",
        slices(
            [source("base", 0, 4), source("code", 1, 5, weight=0.5)],
            [source("math", 0, 2, weight=[1, 0.5]), source("base", 3, 5)],
        ),
        **BASE, parameters={"lambda": [0.5, 1.5]},
    ),
    "ties": recipe(
        "ties",
        slices(
            [source("base", 0, 3), source("code", 0, 3, weight=0.5), source("math", 0, 3, weight=0.3)],
            [source("base", 1, 4), source("code", 1, 4, weight=0.5), source("story", 1, 4, weight=0.3)],
        ),
        **BASE, parameters={"density": [0.3, 0.9]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, every recipe as NUMBER.yml, and what mergekit makes of it as mergekit-NUMBER."""
    python = mergekit_python()
    folder = tmp_path_factory.mktemp("slices")
    for name, tensors in models().items():
        save(folder / name, tensors)
    for number, made in enumerate(RECIPES.values()):
        (folder / f"{number}.yml").write_text(json.dumps(made))
    merges = [(f"{number}.yml", f"mergekit-{number}") for number in range(len(RECIPES))]
    (folder / "tasks.json").write_text(json.dumps({"merges": merges}))
    runner = Path(__file__).with_name("mergekit_runner.py")
    done = subprocess.run(
        [python, str(runner), "tasks.json"], cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_agrees(site: Path, tmp_path: Path, name: str) -> None:
    number = list(RECIPES).index(name)
    out = della.merge(site / f"{number}.yml", tmp_path / "out", fsync=False, threads=1, allow_idle=True).out
    ours, theirs = load(out), load(site / f"mergekit-{number}")
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert np.abs(ours[tensor].astype(np.float64) - expected).max() <= 1e-6 * np.abs(expected).max(), (
            tensor
        )
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (out, site / f"mergekit-{number}")
    ]
    assert len({config["num_hidden_layers"] for config in configs}) == 1
