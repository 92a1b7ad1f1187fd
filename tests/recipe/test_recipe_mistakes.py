"""The sentence for every mistake in a recipe: where it is, what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import HEAD, THERE_IS, recipe_of, told

from della.dtypes import RECIPE_NAMES
from della.errors import suggest
from della.merging.registry import ALL_PARAMETERS, METHODS
from della.recipe.reader import _MODEL_KEYS, _TOP_KEYS


def test_all_problems_are_told_at_once_in_the_order_of_lines_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        HEAD + "    parameters:\n      densty: 0.5\n      weight: high\nout_dtype: bf61\ndtipe: x\n"
    )
    assert told(path) == (
        "4 problems:\n"
        f"  - {path}:7:7: unknown key 'densty' in parameters of model 2; did you mean 'density'?\n"
        f"  - {path}:8:15: 'weight' of model 2 must be a number, found 'high'\n"
        f"  - {path}:9:12: unknown out_dtype 'bf61'; did you mean 'bf16'?\n"
        f"  - {path}:10:1: unknown key 'dtipe' at the top level; did you mean 'dtype'?"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("densty: 1\n", "6:1: unknown key 'densty' at the top level; did you mean 'density'?"),
        ("qqq: 1\n", "6:1: unknown key 'qqq' at the top level"),
        ("    wieght: 1\n", "6:5: unknown key 'wieght' in model 2; did you mean 'weight'?"),
        (
            "    density: 0.5\n    weight: [0, 1]\n",
            ("6:5: 'density', 'weight' belong under the parameters of model 2:\n"
            "      parameters:\n        density: 0.5\n        weight: [0, 1]"),
        ),
        (
            "lambda: 0.9\n",
            ("6:1: 'lambda' belongs under the recipe's own parameters:\n      parameters:\n        lambda: "
             "0.9"),
        ),
        (
            "    lambda: 0.9\n",
            ("6:5: 'lambda' belongs under the recipe's own parameters:\n      parameters:\n        lambda: "
             "0.9"),
        ),
        (
            "    parameters:\n      lambda: 0.9\n",
            ("7:7: 'lambda' belongs under the recipe's own parameters, not under model 2:\n"
            "      parameters:\n        lambda: 0.9"),
        ),
        ("    dtype: x\n", "6:5: 'dtype' belongs at the top level of the recipe, not in model 2"),
        ("parameters:\n  seed: 1\n", "7:3: 'seed' belongs at the top level of the recipe, not in parameters"),
        (
            "parameters:\n  weight: {filtre: mlp, value: 1}\n",
            "7:12: unknown key 'filtre' in a case of 'weight'; did you mean 'filter'?",
        ),
        ("parameters:\n  weight: {filter: mlp}\n", "7:11: this case of 'weight' has no 'value'"),
        (
            "parameters:\n  weight: {filter: [mlp], value: 1}\n",
            "7:20: the filter of 'weight' must be a part of a tensor's name, found a list",
        ),
        ("parameters:\n  weight: []\n", "7:11: 'weight' is an empty list; write at least one value"),
        ("parameters:\n  weight:\n", "7:10: 'weight' has no value"),
        (
            "parameters:\n  weight: [1, {value: 1}]\n",
            ("7:15: the list of 'weight' holds either values for the layers or {filter, value} cases, "
            "found a mapping among the others"),
        ),
        (
            "parameters:\n  weight: {value: {value: 1}}\n",
            "7:19: 'weight' must be a number here, found a mapping",
        ),
        ("parameters:\n  weight: .nan\n", "7:11: 'weight' must be a finite number, found .nan"),
        ("parameters:\n  weight: 1e999\n", "7:11: 'weight' must be a finite number, found 1e999"),
        ("parameters:\n  weight: 010\n", "7:11: 'weight' must be a number, found '010'"),
        ("parameters:\n  weight: 1:30\n", "7:11: 'weight' must be a number, found '1:30'"),
        ("parameters:\n  weight: true\n", "7:11: 'weight' must be a number, found true"),
        ("parameters:\n  density: [1, 1.5]\n", "7:16: 'density' must lie between 0 and 1, found 1.5"),
        (
            "parameters:\n  normalize: maybe\n",
            "7:14: 'normalize' must be true or false, found 'maybe'",
        ),
        (
            "parameters:\n  fuse: meen\n",
            "7:9: 'fuse' must be one of mean, sum, calibrated, found 'meen'; did you mean 'mean'?",
        ),
        (
            "parameters:\n  rescale: 2\n",
            "7:12: 'rescale' must be one of per_element, none, l1, or true or false, found 2",
        ),
        (
            "parameters:\n  - density: 0.5\n",
            "7:3: 'parameters' must be a mapping of settings such as 'density: 0.5', found a list",
        ),
        ("  - owner/x\n", ("6:5: model 3 must be a mapping that begins with 'model:', found 'owner/x'; "
                          "write '- model: owner/x'")),
        ("  - parameters: {}\n", "6:5: model 3 does not say which model it is; add 'model: NAME'"),
        ("  - modle: x\n", "6:5: unknown key 'modle' in model 3; did you mean 'model'?"),
        ("  - model: [x]\n", "6:12: 'model' of model 3 must be text, found a list"),
        ("  - model: ' '\n", "6:12: 'model' of model 3 must be text, found empty text"),
        (
            "  - model: a/x+b/y\n",
            ("6:12: 'model' of model 3 'a/x+b/y' names a LoRA adapter (base+adapter), which is not part of "
             "this "
            "version yet; merge the adapter into its base first (or rename the folder)"),
        ),
        (
            '  - model: "E:\\new\\table"\n',
            ("6:12: 'model' of model 3 holds a tab, line break or control character; in double quotes a "
             "backslash "
            "begins an escape, so write a path in single quotes or with /"),
        ),
        ("slices: []\n", ("6:1: the recipe has 'models' and 'slices'; keep one of 'models', 'slices'")),
        ("modules: {}\n", ("6:1: the recipe has 'models' and 'modules'; keep one of 'models', 'modules'")),
        (
            "tokenizer:\n  source: union\ntokenizer_source: base\n",
            "6:1: 'tokenizer' and 'tokenizer_source' say the same; keep 'tokenizer' alone, with its 'source'",
        ),
        (
            "tokenizer: union\n",
            ("6:12: 'tokenizer' must be a mapping with 'source', found 'union'; write 'tokenizer: {source: "
             "union}', or 'tokenizer_source: base'"),
        ),
        (
            "chat_template: chatlm\n",
            "6:16: unknown chat_template 'chatlm'; did you mean 'chatml'?",
        ),
        ("seed: -1\n", "6:7: 'seed' must lie between 0 and 18446744073709551615, found -1"),
        ("seed: 1.5\n", "6:7: 'seed' must be a whole number, found 1.5"),
        ("seed: [1]\n", "6:7: 'seed' must be a single value, found a list"),
        ("compat: mergkit\n", "6:9: 'compat' must be mergekit, found 'mergkit'; did you mean 'mergekit'?"),
        ("dtype: int8\n", f"6:8: unknown dtype 'int8'; write one of {', '.join(RECIPE_NAMES)}"),
        ("name: [a]\n", "6:7: 'name' must be text, found a list"),
    ],
)  # fmt: skip
def test_mistakes(more: str, message: str) -> None:
    assert told(HEAD + more) == f"recipe:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  - model: x\n", f"1:1: 'merge_method' is missing; there is {THERE_IS}"),
        (HEAD.replace("della", "dela"), "1:15: unknown merge_method 'dela'; did you mean 'della'?"),
        (HEAD.replace("della", "Dare-Ties"), ("1:15: unknown merge_method 'Dare-Ties'; did you mean "
                                              "'dare_ties'?")),
        (HEAD.replace("della", "zzz"), f"1:15: unknown merge_method 'zzz'; there is {THERE_IS}"),
        ("merge_method: ties\nmodels:\n- model: x\n", "1:15: merge_method ties needs a base_model"),
        ("merge_method: linear\n", "1:1: the recipe lists no 'models' to merge"),
        ("merge_method: linear\nmodels:\n", "2:1: the recipe lists no 'models' to merge"),
        (
            "merge_method: linear\nmodels: []\n",
            "2:9: 'models' must be a list of entries that begin with '- model:', found an empty list",
        ),
        (
            "merge_method: linear\nmodels:\n  model: x\n",
            "3:3: 'models' must be a list of entries that begin with '- model:', found a mapping",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels:\n- model: b/\n",
            "4:1: 'models' lists only the base model; add at least one expert to merge into it",
        ),
        ("merge_method: ties\nbase_modle: b\nmodels:\n- model: x\n",
         "2:1: unknown key 'base_modle' at the top level; did you mean 'base_model'?"),
    ],
)  # fmt: skip
def test_what_a_recipe_must_have(text: str, message: str) -> None:
    assert told(text) == f"recipe:{message}"


def _slips(word: str) -> dict[str, str]:
    """Five kinds of slips of the fingers."""
    slips = {}
    for i, letter in enumerate(word):
        slips[word[:i] + word[i + 1 :]] = "dropped"
        slips[word[:i] + letter + word[i:]] = "doubled"
        slips[word[:i] + word[i + 1 : i + 2] + letter + word[i + 2 :]] = "swapped"
        if word[1:]:
            slips[word[:i] + "q" + word[i + 1 :]] = "wrong letter"
    slips |= {word.upper(): "case", word.title(): "case", word.replace("_", "-"): "hyphen"}
    return {slip: kind for slip, kind in slips.items() if slip != word}


@pytest.mark.parametrize("location", ["top", "model", "parameters", "case", "method"])
def test_the_nearest_name_is_right_for_every_slip_of_every_key(location: str) -> None:
    shared = [name for name, p in ALL_PARAMETERS.items() if p.scope == "shared"]
    keys: dict[str, list[str]] = {
        "top": [*_TOP_KEYS],
        "model": [*_MODEL_KEYS],
        "parameters": [*ALL_PARAMETERS],
        "case": ["filter", "value"],
        "method": [*METHODS],
    }
    for key in keys[location]:
        for slip, kind in _slips(key).items():
            if slip in keys[location] or not slip:
                continue
            sources: dict[str, dict[str, Any]] = {
                "top": {**recipe_of(), slip: 1},
                "model": recipe_of(models=[{"model": "x", slip: 1}]),
                "parameters": recipe_of(parameters={slip: 1})
                if key in shared
                else recipe_of(models=[{"model": "x", "parameters": {slip: 1}}]),
                "case": recipe_of(parameters={"weight": {slip: 1}}),
                "method": recipe_of(slip),
            }
            message = told(sources[location])
            assert f"unknown key {slip!r}" in message or f"unknown merge_method {slip!r}" in message
            hint = message.partition("did you mean ")[2].partition("?")[0]
            assert repr(key) in hint.split(" or "), (kind, message)


def test_a_suggestion_names_every_key_that_is_as_near() -> None:
    assert suggest("modles", ("models", "modules")) == "did you mean 'models' or 'modules'?"
    assert suggest("x" * 100_000, ("models",)) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"merge_method": {1}}, "recipe at merge_method: a recipe cannot hold a set"),
        ({1: 2}, "recipe: keys must be text, found 1"),
        (recipe_of(densty=1), ("recipe at densty: unknown key 'densty' at the top level; did you mean "
                               "'density'?")),
        (
            recipe_of(models=[{"model": "x", "parameters": {"weight": float("nan")}}]),
            "recipe at models.0.parameters.weight: 'weight' of model 1 must be a finite number, found nan",
        ),
        (recipe_of(seed=10**5000), ("recipe at seed: 'seed' must lie between 0 and 18446744073709551615, "
                                    "found 0x")),
        (recipe_of(parameters={"weight": -(10**400)}), ("recipe at parameters.weight: 'weight' must be a "
                                                        "finite number")),
        (recipe_of(name="\ud800"), ("recipe at name: the character U+D800 is not allowed in a recipe; "
                                    "remove it")),
    ],
)  # fmt: skip
def test_mistakes_in_python_objects_are_told_with_their_path(source: Any, message: str) -> None:
    assert told(source).startswith(message)


def test_the_same_fault_of_very_many_models_is_told_of_the_first_ones() -> None:
    many = "".join(f"  - model: m{n}\n" for n in range(1_000))
    said = told(f"merge_method: della\nbase_model: b\nmodels:\n{many}parameters: {{density: 0.1}}\n")
    assert said.startswith("1000 problems:\n  - recipe:1004:23: m0: density 0.1 with epsilon 0.15 gives")
    assert said.endswith(f"and {1_000 - said.count('gives')} more")


def test_an_object_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "is something in it a part of itself?" in told(recipe_of(parameters={"weight": endless}))
