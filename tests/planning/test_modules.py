"""Modules: parts of a model by prefix, each a merge of its own; the others come whole from the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layered import as_bytes, kept, layered, merged, renumbered
from llamas import Tensors

import della
from della.errors import DellaError, RecipeError

TEXT, VISION = "language_model.model.layers", "vision_tower.vision_model.encoder.layers"
PROJECTOR = "multi_modal_projector.linear_1.weight"
CONFIG: dict[str, Any] = {
    "model_type": "gemma3", "num_hidden_layers": None,
    "text_config": {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "full"]},
    "vision_config": {"num_hidden_layers": 3, "kinds": [0, 1, 2]},
}  # fmt: skip


def vlm(seed: int) -> Tensors:
    """Text and vision of three layers each, and a projector."""
    text = layered(seed, 3, TEXT)
    text["language_model.lm_head.weight"] = text.pop("lm_head.weight")
    vision = {
        name.replace("embed_tokens", "embeddings.patch_embedding"): value
        for name, value in layered(seed + 10, 3, VISION, head=False).items()
    }
    return text | vision | {PROJECTOR: np.full((4, 4), seed, np.float32)}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path


def two(site: Path) -> tuple[Tensors, Tensors]:
    return kept(site, "a", vlm(1), **CONFIG), kept(site, "b", vlm(2), **CONFIG)


def in_module(tensors: Tensors, prefix: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


@pytest.mark.parametrize("name", ["text_decoder", "language_model"])
def test_what_is_of_no_module_comes_whole_from_the_base(site: Path, name: str) -> None:
    a, b = two(site)
    text = f"merge_method: passthrough\nbase_model: a\nmodules: {{{name}: {{models: [{{model: b}}]}}}}\n"
    found, config = merged(site, text)
    assert found == as_bytes(a | in_module(b, "language_model"))
    assert config["text_config"] == CONFIG["text_config"]
    with della.plan(site / "recipe.yml") as plan:
        assert any("of no module" in line and "mergekit" in line for line in plan.departures)
        assert not plan.notes[1:], "but for heads"


def test_each_module_has_a_method_of_its_own(site: Path) -> None:
    a, b = two(site)
    found, _ = merged(
        site,
        "merge_method: linear\nbase_model: a\nparameters: {weight: [0, 1], normalize: false}\n"
        "modules:\n"
        "  text_decoder: {models: [{model: b}]}\n"
        "  vision_tower: {models: [{model: b}], merge_method: passthrough}\n"
        "  multi_modal_projector:\n"
        "    merge_method: task_arithmetic\n    models: [{model: b, parameters: {weight: 0.5}}]\n",
    )
    half = np.float32(0.5)
    wanted = (
        a | in_module(b, "vision_tower") | {PROJECTOR: a[PROJECTOR] + half * (b[PROJECTOR] - a[PROJECTOR])}
    )
    for name, value in in_module(b, "language_model").items():
        layer = int(name.split(".layers.")[1][0]) if ".layers." in name else 0
        wanted[name] = np.float32(layer / 2) * value + np.float32(0)
    assert found == as_bytes(wanted)


def test_slices_of_modules(site: Path) -> None:
    """Counts and lists of the module's own configuration alone, though the other has as many layers."""
    a, b = two(site)
    found, config = merged(
        site,
        "merge_method: passthrough\nbase_model: a\nmodules:\n"
        "  vision_tower:\n    slices:\n"
        "      - sources: [{model: a, layer_range: [0, 1]}]\n"
        "      - sources: [{model: b, layer_range: [0, 3]}]\n"
        "  text_decoder:\n    slices: [{sources: [{model: b, layer_range: [1, 3]}]}]\n",
    )
    vision = renumbered(a, 0, 1, 0, VISION) | renumbered(b, 0, 3, 1, VISION)
    wanted = vision | renumbered(b, 1, 3, 0, TEXT) | {PROJECTOR: a[PROJECTOR]}
    for name in b:
        if ".layers." not in name and name != PROJECTOR:
            wanted[name] = a[name] if "patch" in name else b[name]
    assert found == as_bytes(wanted)
    assert config["text_config"] == {"num_hidden_layers": 2, "layer_types": ["sliding", "full"]}
    assert config["vision_config"] == {"num_hidden_layers": 4, "kinds": [0, 0, 1, 2]}


@pytest.mark.parametrize("wrapped", [False, True])
def test_modules_by_the_names_that_mergekit_gives_them(site: Path, wrapped: bool) -> None:
    """Qwen2-VL: the projector lies within the prefix of the vision tower, the head outside of the text's."""
    before = "model." * wrapped
    text = f"{before}language_model" if wrapped else "model"
    names = [f"{text}.layers.0.mlp.up_proj.weight", f"{before}visual.blocks.0.mlp.fc1.weight"]
    names += [f"{before}visual.merger.mlp.0.weight", "lm_head.weight"]
    models = {
        key: kept(site, key, {n: np.full((2, 2), k, np.float32) for n in names}, num_hidden_layers=None)
        for k, key in enumerate("abcd")
    }
    entry = "{{models: [{{model: {}}}]}}"
    text = "merge_method: passthrough\nbase_model: a\nmodules:\n"
    text += "".join(
        f"  {module}: {entry.format(model)}\n"
        for module, model in (("text_decoder", "b"), ("vision_tower", "c"), ("multi_modal_projector", "d"))
    )
    found, _ = merged(site, text)
    wanted = {n: models[model][n] for n, model in zip(names, "bcdb", strict=True)}
    assert found == as_bytes(wanted)
    found, _ = merged(site, "".join(line + "\n" for line in text.splitlines() if "projector" not in line))
    assert found == as_bytes(wanted | {names[2]: models["a"][names[2]]})


def test_encoder_and_decoder(site: Path) -> None:
    both = {"shared.weight": np.ones((3, 2), np.float32)}
    both |= {
        f"{side}.block.{n}.w": np.full((2, 2), n, np.float32)
        for side in ("encoder", "decoder")
        for n in (0, 1)
    }
    kept(site, "a", both, num_layers=2, num_decoder_layers=2, num_hidden_layers=None, model_type="t5")
    slices = (
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [1, 2]}]}]"
    )
    found, config = merged(site, f"merge_method: passthrough\nmodules: {{decoder: {{{slices}}}}}\n")
    assert found == as_bytes(both | {"decoder.block.2.w": both["decoder.block.1.w"]})
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)


def told(site: Path, text: str) -> str:
    (site / "recipe.yml").write_text(text)
    with pytest.raises(DellaError) as caught:
        della.plan(site / "recipe.yml")
    assert isinstance(caught.value, RecipeError)
    assert caught.value.exit_code == 2
    return str(caught.value)


MISTAKES = [
    ("vision_twer: {models: [{model: b}]}", 4, ["vision_twer", "vision_tower"], ("_twer", "_tower")),
    ("vision_tower: {modles: [{model: b}]}", 4, ["modles", "'models'"], ("modles", "models")),
    ("vision_tower: {}", 4, ["module vision_tower", "models:"], ("{}", "{models: [{model: b}]}")),
    ("vision_tower: [{model: b}]", 4, ["mapping", "models"], ("[{model: b}]", "{models: [{model: b}]}")),
    (
        "vision_tower: {models: [{model: b}], dtype: float32}", 4, ["'dtype'", "top level"],
        (", dtype: float32", ""),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "at", "words", "cure"), MISTAKES)
def test_mistakes(site: Path, line: str, at: int, words: list[str], cure: tuple[str, str]) -> None:
    two(site)
    text = f"merge_method: passthrough\nbase_model: a\nmodules:\n  {line}\n"
    said = told(site, text)
    assert f"recipe.yml:{at}:" in said
    assert all(word in said for word in words), said
    (site / "recipe.yml").write_text(text.replace(*cure))
    della.plan(site / "recipe.yml").close()
