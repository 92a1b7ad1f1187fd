"""What is published with a merge: a model card without paths, that the Hub takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import put

import della

BASE: dict[str, Any] = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}


def card(folder: Path, models: list[str], base: str, written: str = "yaml") -> str:
    made = {"merge_method": "della", "base_model": base, "models": [{"model": name} for name in models]}
    text = json.dumps(made) if written == "json" else yaml.safe_dump(made)
    (folder / "recipe.yml").write_text(text)
    della.merge(folder / "recipe.yml", folder / "out", fsync=False, overwrite=True)
    return (folder / "out/README.md").read_text()


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize("written", ["yaml", "json"])
def test_no_path_of_this_machine(tmp_path: Path, written: str) -> None:
    secret = tmp_path / "home of somebody"
    put(secret, {"a/base/model.safetensors": BASE, "it's/one/model.safetensors": {"w": BASE["w"] + 1}})
    put(secret, {"b/one/model.safetensors": {"w": BASE["w"] + 2}})
    text = card(tmp_path, [f"{secret}/it's/one", f"{secret}/b/one"], f"{secret}/a/base", written)
    assert "somebody" not in text
    assert str(tmp_path) not in text
    assert "base_model" not in front(text), "a folder is no model of the Hub"
    assert front(text)["tags"] == ["merge", "della"]
    assert "expert: one: 1 of 1 tensors" in text
    assert "expert: b/one: 1 of 1 tensors" in text, "equal names are told apart by more of the path"


def test_names_on_the_hub_where_they_are_known(tmp_path: Path) -> None:
    commit = "a" * 40
    put(tmp_path, {f"models--own--base/snapshots/{commit}/model.safetensors": BASE})
    put(
        tmp_path,
        {"one/model.safetensors": {"w": BASE["w"] + 1}, "one/config.json": {"_name_or_path": "own/one"}},
    )
    put(
        tmp_path,
        {"two/model.safetensors": {"w": BASE["w"] + 2}, "two/config.json": {"_name_or_path": "/x/y"}},
    )
    base = str(tmp_path / f"models--own--base/snapshots/{commit}")
    text = card(tmp_path, [str(tmp_path / "one"), str(tmp_path / "two")], base)
    assert front(text)["base_model"] == ["own/base", "own/one"]
    assert front(text)["base_model_relation"] == "merge"


def test_in_a_notebook(tmp_path: Path) -> None:
    put(tmp_path, {"base/model.safetensors": BASE, "<b>one/model.safetensors": {"w": BASE["w"] + 1}})
    made = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    recipe = made | {"models": [{"model": str(tmp_path / "<b>one")}]}
    plan = della.plan(recipe)
    result = della.merge(recipe, tmp_path / "out", fsync=False)
    for shown in (plan, result):
        assert len(repr(shown)) < 200
        page = shown._repr_html_()
        assert "<td>1 of 1</td>" in page
        assert "&lt;b&gt;one" in page
        assert "<b>" not in page
    assert repr(plan) == "<Plan: task_arithmetic, 1 models, 1 tensors, 48 bytes>"
    plan.close()
    plan.close()


def test_a_plan_shows_layers_in_their_order(tmp_path: Path) -> None:
    from della.planning.describe import plan_text

    base = {f"layers.{k}.w": np.full((2, 2), k, np.float32) for k in range(12)}
    put(
        tmp_path,
        {"base/model.safetensors": base, "one/model.safetensors": {k: v + 1 for k, v in base.items()}},
    )
    own = {"weight": [0.1, 1.2]}
    made = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    with della.plan(made | {"models": [{"model": str(tmp_path / "one"), "parameters": own}]}) as plan:
        lines = [line.strip() for line in plan_text(plan, 1, everything=True).split("\n")]
    assert [line for line in lines if line.startswith("layers.")] == [f"layers.{k}.*" for k in range(12)]
