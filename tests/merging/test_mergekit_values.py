"""Recipes as people write them: every parameter has the value at every tensor that mergekit gives it.

Needs an installed mergekit 0.1.5, as test_mergekit.py does.  DELLA_RECIPES may name a folder of recipes;
their models are replaced by small ones.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_mergekit import mergekit_python, models, save

import della

OURS = {
    "gradients and a filter": """
        models:
          - {model: a/one, parameters: {density: [1, 0.6, 0.2], weight: 1.0}}
          - {model: a/two, parameters: {density: 0.4, weight: [0, 0.2, 0.9, 1]}}
          - {model: a/three, parameters: {density: 0.3, weight: [{filter: mlp, value: 0.6}, {value: 0}]}}
        merge_method: ties
        base_model: a/base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16""",
    "the base among the models": """
        models:
          - {model: a/base, parameters: {weight: 0.4}}
          - {model: a/one, parameters: {weight: 0.3}}
          - {model: a/two, parameters: {weight: [1, 1, .5, .25, .01]}}
        merge_method: dare_ties
        base_model: a/base
        parameters: {density: 0.3, normalize: false}
        dtype: bfloat16""",
    "defaults of della": """
        models:
          - {model: a/one, parameters: {weight: 0.4, density: 0.5, epsilon: 0.3}}
          - {model: a/two, parameters: {weight: 0.2, density: 0.4}}
        merge_method: della
        base_model: a/base
        parameters: {lambda: 0.8, epsilon: 0.1}
        dtype: bfloat16""",
    "numbers as text": """
        models: [{model: a/one}, {model: a/two}]
        merge_method: karcher
        parameters: {tol: 1e-10, max_iter: 700}
        dtype: bfloat16""",
    "slerp by parts": """
        slices:
          - sources: [{model: a/one, layer_range: [0, 5]}, {model: a/two, layer_range: [0, 5]}]
        merge_method: slerp
        base_model: a/one
        parameters:
          t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5]}, {value: 0.5}]
        dtype: bfloat16""",
}
FOLDER = os.environ.get("DELLA_RECIPES")
MORE = sorted(Path(FOLDER).glob("*.yml")) if FOLDER else []
BESIDE = ("tokenizer", "tokenizer_source", "chat_template")  # rows are compared in test_mergekit_tokens.py
NO_EFFECT = {"int8_mask", "rescale", "swapping"}  # docs/methods.md: what is 0 or 1 as mergekit has it


def renamed(node: Any, names: dict[str, str]) -> Any:
    """A recipe whose models are called as their folders here."""
    if isinstance(node, list):
        return [renamed(each, names) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: renamed(value, names) for key, value in node.items() if key not in BESIDE}
    for key in ("model", "base_model"):
        if isinstance(made.get(key), str):
            made[key] = names.setdefault(made[key], f"m{len(names)}")
    return made


def refusal(text: str) -> str | None:
    """What della says of a recipe that it refuses, whatever its models are."""
    try:
        della.plan(text).close()
    except della.RecipeError as error:
        return str(error)
    except della.CheckpointError:
        pass
    return None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, every recipe as NAME.yml, and NAME.json with mergekit's values."""
    python, folder = mergekit_python(), tmp_path_factory.mktemp("values")
    texts = OURS | {path.stem: path.read_text() for path in MORE if not refusal(path.read_text())}
    names: dict[str, str] = {}
    for name, text in texts.items():
        (folder / f"{name}.yml").write_text(json.dumps(renamed(yaml.safe_load(text), names)))
    rng = np.random.default_rng(1)
    for name in names.values():
        change = {
            key: array + 0.01 * rng.standard_normal(array.shape) for key, array in models()["base"].items()
        }
        save(folder / name, {key: np.asarray(array, np.float32) for key, array in change.items()})
    (folder / "tasks.json").write_text(json.dumps({"values": [(f"{n}.yml", f"{n}.json") for n in texts]}))
    done = subprocess.run(
        [python, str(Path(__file__).with_name("mergekit_runner.py")), "tasks.json"], cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", [*OURS, *(path.stem for path in MORE)])
def test_every_value_agrees(site: Path, name: str, compat: bool) -> None:
    if not (site / f"{name}.yml").is_file():
        pytest.skip("refused by della: " + str(refusal((Path(str(FOLDER)) / f"{name}.yml").read_text())))
    theirs = json.loads((site / f"{name}.json").read_text())
    compared = 0
    with della.plan(site / f"{name}.yml", compat=compat) as plan:
        merged = {job.name: job for job in plan.jobs if job.method is not None}
        assert merged.keys() == theirs.keys()
        for tensor, (shared, own) in theirs.items():
            job = merged[tensor]
            settings = {key: value for key, value in shared.items() if key not in NO_EFFECT}
            ours = {key: job.method.shared.get(key) for key in settings}  # type: ignore[union-attr]
            assert ours == pytest.approx(settings), tensor
            for each in job.operands:
                wanted = own[Path(each.model.source.path).name]
                found = {key: each.expert.values.get(key) for key in wanted}
                assert found == pytest.approx(wanted), (tensor, each.model.entry.reference)
                compared += len(wanted)
            compared += len(settings)
    assert compared >= len(theirs)
