"""What messages on slices advise is done as a user would, and the layers come that should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkpoints import put
from cures import cures

import della
from della.checkpoint.source import open_source
from della.errors import DellaError

PASS = """\
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 2]}]
  - sources: [{model: two, layer_range: [2, 4]}]
"""
LINEAR = """\
merge_method: linear
slices:
  - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 2]}]
"""
TASK = """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: one, layer_range: [0, 2]}]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, by in (("base", 0), ("one", 10), ("two", 20)):
        put(
            tmp_path,
            {f"{name}/model.safetensors": layers(by), f"{name}/config.json": {"num_hidden_layers": 4}},
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def layers(by: int, count: int = 4) -> dict[str, object]:
    return {f"model.layers.{k}.w": np.full((2, 2), by + k, np.float32) for k in range(count)}


def merged(text: str) -> list[float]:
    Path("recipe.yml").write_text(text)
    della.merge("recipe.yml", "out", fsync=False, overwrite=True)
    with open_source("out") as source:
        return [float(source.tensors[f"model.layers.{k}.w"].read()[0, 0]) for k in range(len(source.tensors))]


def refused(text: str, advice: str) -> None:
    Path("recipe.yml").write_text(text)
    with pytest.raises(DellaError) as caught:
        della.merge("recipe.yml", "out", fsync=False)
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)


class Edit(NamedTuple):
    """A recipe that is refused: ``good`` with ``text`` in place of ``of``, and the edit that is advised."""

    key: str
    good: str
    of: str
    text: str
    advice: str
    old: str
    new: str
    gives: Sequence[float]


TWO, ALL = "{model: two, layer_range: [2, 4]}", [10, 11, 22, 23]
EDITS = [
    Edit("recipe/slices.py:_pieces", PASS, "slices:", "models: [{model: one}]\nslices:", "keep one of",
         "models: [{model: one}]\n", "", ALL),
    Edit("recipe/slices.py:_pieces", PASS, PASS[PASS.index("slices"):], "modules: 3\n", "write 'modules: {",
         "modules: 3\n", "modules: {model: {models: [{model: one}]}}\n", [10, 11, 12, 13]),
    Edit("recipe/slices.py:_pieces", PASS, PASS[PASS.index("slices"):], "modules: {model: {}}\n",
         "'models:' or 'slices:'", "{}", "{models: [{model: one}]}", [10, 11, 12, 13]),
    Edit("recipe/slices.py:_pieces", PASS, PASS[PASS.index("slices"):], "slices: []\n", "'- sources:'",
         " []\n", "\n  - sources: [{model: one, layer_range: [1, 3]}]\n", [11, 12]),
    Edit("recipe/slices.py:_sources", PASS, f"[{TWO}]", "[]", "write 'sources: [{model: NAME", "sources: []",
         f"sources: [{TWO}]", ALL),
    Edit("recipe/slices.py:_range", PASS, ", layer_range: [2, 4]", "", "layer_range: [0, 8]",
         "{model: two}", "{model: two, layer_range: [0, 1]}", [10, 11, 20]),
    Edit("recipe/slices.py:_range", PASS, "[2, 4]", "2", "layer_range: [0, 8]", "layer_range: 2",
         "layer_range: [0, 2]", [10, 11, 20, 21]),
    Edit("recipe/slices.py:_range", PASS, "[2, 4]", "[4, 2]", "write [2, 4]", "[4, 2]", "[2, 4]", ALL),
    Edit("recipe/slices.py:check_lengths", LINEAR, "model: two, layer_range: [0, 2]",
         "model: two, layer_range: [1, 4]", "write [1, 3]", "[1, 4]", "[1, 3]", [15.5, 16.5]),
    Edit("planning/layers.py:_check_range", PASS, "[2, 4]", "[2, 8]", "write [2, 4]", "[2, 8]", "[2, 4]",
         ALL),
    Edit("recipe/reader.py:_Reader._model", TASK, "}]", "}, {model: base, layer_range: [2, 4]}]",
         "name another model", "model: base, layer_range: [2, 4]", "model: two, layer_range: [2, 4]",
         [32, 33]),
    Edit("recipe/reader.py:_Reader._model", TASK, "}]", "}, {model: base, layer_range: [2, 4]}]",
         "merge_method: linear", "task_arithmetic\nbase_model: base", "linear", [4, 5]),
    Edit("planning/layers.py:_base_layers", TASK, "{model: base, layer_range: [0, 2]}",
         "{model: two, layer_range: [1, 3]}", "'- {model: base, layer_range: [1, 3]}'", "[{model: two",
         "[{model: base, layer_range: [1, 3]}, {model: two", [30, 31]),
    Edit("planning/modules.py:owners", PASS, PASS[PASS.index("slices"):],
         "modules: {decoder: {models: [{model: one}]}}\n", "write one of model", "decoder", "model",
         [10, 11, 12, 13]),
]  # fmt: skip


@cures("recipe/slices.py:_range")
@pytest.mark.parametrize("edit", EDITS, ids=[f"{e.key}-{e.advice}" for e in EDITS])
def test_edited_as_the_message_says(edit: Edit) -> None:
    assert edit.of in edit.good
    broken = edit.good.replace(edit.of, edit.text)
    refused(broken, edit.advice)
    assert edit.old in broken
    assert merged(broken.replace(edit.old, edit.new)) == edit.gives


@cures("merging/methods/passthrough.py:Passthrough.problems")
def test_a_slice_of_its_own_for_each_model() -> None:
    refused("merge_method: passthrough\nmodels: [{model: one}, {model: two}]\n", "a slice of its own")
    assert merged(PASS) == ALL


@cures("planning/layer_config.py:check_count")
def test_a_configuration_that_counts_other_layers(folder: Path) -> None:
    put(folder, {"one/config.json": {"num_hidden_layers": 5}})
    refused(PASS, "as it was saved by transformers")
    put(folder, {"one/config.json": {"num_hidden_layers": 4}})
    assert merged(PASS) == ALL


@cures("planning/layers.py:_check_range", "planning/layers.py:_check_range", "planning/kin.py:_stranger")
@pytest.mark.parametrize("kind", ["no layers", "other sizes"])
def test_a_model_of_the_same_kind(folder: Path, kind: str) -> None:
    odd = {"v": np.ones(3, np.float32)}
    if kind == "other sizes":
        odd = {f"model.layers.{k}.w": np.ones((3, 3), np.float32) for k in range(4)}
    put(folder, {"odd/model.safetensors": odd})
    refused(PASS.replace("model: two", "model: odd"), f"name a model of the same {ODD[kind]}")
    assert merged(PASS) == ALL


ODD = {"no layers": "kind as the others", "other sizes": "architecture"}


@cures("planning/layers.py:_stack", "planning/layers.py:_stack")
def test_which_layers_are_cut(folder: Path) -> None:
    put(folder, {"plain/model.safetensors": {"v": np.ones(3, np.float32)}})
    refused(PASS.replace("model: one", "model: plain"), "list whole models under 'models'")
    della.merge("merge_method: passthrough\nmodels: [{model: plain}]\n", "whole", fsync=False)
    with open_source("whole") as source:
        assert source.tensors["v"].read().tolist() == [1, 1, 1]
    two = {f"{stack}.layers.{k}.w": np.full(2, by + k, np.float32) for stack, by in (("a", 0), ("b", 10))
           for k in range(3)}  # fmt: skip
    put(folder, {"both/model.safetensors": two})
    cut = "slices: [{sources: [{model: both, layer_range: [1, 3]}]}]"
    refused(f"merge_method: passthrough\n{cut}\n", "write the slices under 'modules', such as 'modules: {a")
    Path("recipe.yml").write_text(
        f"merge_method: passthrough\nmodules: {{a: {{{cut}}}, b: {{models: [{{model: both}}]}}}}\n"
    )
    della.merge("recipe.yml", "parts", fsync=False)
    with open_source("parts") as source:
        found = {name: float(view.read()[0]) for name, view in source.tensors.items()}
    assert found == {"a.layers.0.w": 1, "a.layers.1.w": 2} | {f"b.layers.{k}.w": 10 + k for k in range(3)}
