"""Recipes as they are found: mergekit's other keys, forms of values, and recipes of other tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from commands import Command
from recipes import told
from safetensors.numpy import load_file

import della
from della.recipe.dialect import WITHOUT_EFFECT, reason
from della.recipe.reader import read_recipe

TIES: dict[str, Any] = {
    "merge_method": "ties", "base_model": "b", "models": [{"model": "x", "parameters": {"weight": 1}}],
}  # fmt: skip
LINEAR = """\
merge_method: linear
models:
- {model: one, parameters: {weight: 1}}
- {model: two, parameters: {weight: 3}}
"""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 1.0), ("two", 3.0)):
        put(tmp_path / name, {"model.safetensors": {"w": np.full(2, value, np.float32)}, "config.json": {}})
    return tmp_path


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_that_change_nothing_are_told_with_the_reason(key: str) -> None:
    recipe = read_recipe({**TIES, key: True, "parameters": {key: True}})
    notes = [note for note in recipe.notes if f"{key!r} has no effect" in note]
    assert len(notes) == 2
    assert reason(key) in notes[0]


def test_a_seed_under_mergekits_name_is_refused_with_ours() -> None:
    for lenient in (False, True):
        assert "write 'seed'" in told({**TIES, "random_seed": 7}, lenient=lenient)
    assert read_recipe({**TIES, "seed": 7}).seed == 7


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1.0", True), ("0.0", False), ("1", True), ("0", False), ("'1.0'", True), ("yes", True),
        ("True", True), ("'false'", False),
    ],
)  # fmt: skip
def test_forms_of_true_and_false(written: str, value: bool) -> None:
    text = "merge_method: ties\nbase_model: b\nmodels: [{model: x, parameters: {weight: '5e-1'}}]\n"
    recipe = read_recipe(text + f"parameters:\n  normalize: {written}\n  density: 1e-1\n")
    assert recipe.resolve("w", 0.0)[0]["normalize"] is value
    assert recipe.resolve("w", 0.0)[1][0]["weight"] == 0.5
    assert recipe.resolve("w", 0.0)[1][0]["density"] == 0.1


@pytest.mark.parametrize("written", ["2", "0.5", "'2.0'"])
def test_other_numbers_are_not_true(written: str) -> None:
    assert "true or false" in told(
        f"merge_method: ties\nbase_model: b\nmodels: [{{model: x, parameters: {{weight: 1}}}}]\n"
        f"parameters: {{normalize: {written}}}\n"
    )


def test_another_architecture_cannot_be_asked_for() -> None:
    model = {"model": {"path": "x", "override_architecture": "Llama"}}
    found = told({**TIES, "models": [{"model": model}]})
    assert "override_architecture" in found
    assert "remove it" in found
    del model["model"]["override_architecture"]
    assert read_recipe({**TIES, "models": [{**TIES["models"][0], **model}]}).models[0].reference == "x"


# ---- lenient ----------------------------------------------------------------------------------------------

STRANGE = LINEAR + "descripton: a blend\nparameters: {wieght: 2, normalize: true}\n"


def test_unknown_keys_are_ignored_where_that_is_asked_for(pair: Path) -> None:
    assert "unknown key 'descripton'" in told(STRANGE)
    recipe = read_recipe(STRANGE, lenient=True)
    assert "recipe:5:1: unknown key 'descripton' at the top level, ignored" in recipe.notes
    assert [note for note in recipe.notes if "'wieght'" in note and "did you mean 'weight'" in note]
    assert "descripton" not in recipe.text
    result = della.merge(STRANGE, pair / "out", lenient=True)
    assert load_file(pair / "out/model.safetensors")["w"].tolist() == [2.5, 2.5]
    assert della.verify(result.out, sources=1.0).is_well


def test_the_command_ignores_unknown_keys_too(pair: Path, command: Command) -> None:
    (pair / "r.yml").write_text(STRANGE)
    assert command(pair, "plan", "r.yml").returncode == 2
    done = command(pair, "plan", "r.yml", "--lenient")
    assert done.returncode == 0
    assert "descripton" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"normalize": 7}}, "normalize"),  # a value
        ({"normalize": True}, "belong"),  # a key in another place than its own
        ({"parameters": {"dtype": "float16"}}, "top level"),
        ({"merge_method": None, "merge_methd": "ties"}, "'merge_method' is missing"),
        ({"parameters": {"normalize": [{"filtr": "mlp", "value": True}]}}, "filter"),  # would hold for all
    ],
)
def test_lenient_forgives_no_values(change: dict[str, Any], words: str) -> None:
    assert words in told({**TIES, **change}, lenient=True)


# ---- recipes of other tools -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"genome": {"models": ["a"], "merge_method": "ties"}, "tasks": [{"name": "x"}]}, "mergekit-evolve"),
        ({"base_model": "a", "gate_mode": "hidden", "experts": []}, "mergekit-moe"),
        ({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "a"}, "PEFT"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "config.json"),
        ({"metadata": {}, "weight_map": {}}, "index"),
        ('MODEL_NAME = "Blend-7B"\nyaml_config = """\nmodels:\n  - model: a\n"""\n', "LazyMergekit"),
        ('version 0.1.0\nmodel "a"\nmerge "weighted_sum" &0 &1\n', "sd-mecha"),
    ],
)
def test_a_recipe_of_another_tool_is_told_as_such(recipe: Any, words: str) -> None:
    found = told(recipe)
    assert words in found
    assert "; " in found  # what to do


def test_the_recipe_between_the_quotes_of_a_notebook_is_one() -> None:
    found = told(f'MODEL_NAME = "x"\nyaml_config = """\n{LINEAR}"""\n')
    assert found.startswith("recipe:1:1:")
    assert "keep only the lines between" in found
    assert read_recipe(LINEAR).merge_method == "linear"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_recipe_that_is_one_text_in_quotes(quote: str) -> None:
    found = told(f"{quote}{LINEAR}{quote}\n")
    assert "one text in quotes" in found
    assert "remove the quotes" in found


def test_keys_in_wrong_locations_are_told_with_line_and_example(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(
        "merge_method: ties\nbase_model: b\nnormalize: true\nmodels:\n  - model: ./one\n    density: 1.0\n"
        "    weight: 0.6\n  - model: two\n    parameters:\n      weight: 1\n      dtype: float16\n"
    )
    found = told(path)
    assert f"{path}:3:1: 'normalize' belongs under the recipe's own parameters" in found
    assert f"{path}:6:5: 'density', 'weight' belong under the parameters of model 1" in found
    assert f"{path}:11:7: 'dtype' belongs at the top level" in found
    path.write_text(
        "merge_method: ties\nbase_model: b\ndtype: float16\nparameters:\n  normalize: true\nmodels:\n"
        "  - model: ./one\n    parameters:\n      density: 1.0\n      weight: 0.6\n"
        "  - model: two\n    parameters:\n      weight: 1\n"
    )
    assert len(read_recipe(path).models) == 2


# ---- recipes as people published them, with small models under their names ------------------------------

WINDOWS = """\
models:
  - model: E:\\mergekit\\one
    parameters: {weight: 0.5, density: 1}
  - model: "D:/My Models/two"
    parameters: {weight: [1, 1, .5], density: 1}
merge_method: della_linear
base_model: E:\\mergekit\\base
parameters:
  epsilon: 0.05
  lambda: 1
  int8_mask: true
dtype: float32
tokenizer_source: base
"""


def test_paths_of_windows_and_a_base_among_the_models(pair: Path) -> None:
    for name, place in (("one", "E:\\mergekit\\one"), ("two", "D:/My Models/two")):
        shutil.copytree(pair / name, pair / place)
    base = {"model.safetensors": {"w": np.full(2, 2.0, np.float32)}, "config.json": {}}
    put(pair / "E:\\mergekit\\base", base)
    again = WINDOWS.replace(
        "models:\n", "models:\n  - model: E:\\mergekit\\base\n    parameters: {weight: 9}\n"
    )
    for number, text in enumerate((WINDOWS, again)):
        della.merge(text, pair / f"out{number}")
        # base 2, deltas -1 and 1 of weights 0.5 and 1 (a tensor outside the layers: the gradient's first)
        assert load_file(pair / f"out{number}/model.safetensors")["w"].tolist() == [2.5, 2.5]
