"""docs/recipes.md: every recipe on it merges, and gives what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from layered import as_bytes, kept, layered, merged, renumbered
from llamas import Tensors

import della

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def the_one(word: str) -> str:
    (text,) = (text for text in RECIPES if word in text)
    return str(text)


def models(site: Path) -> tuple[Tensors, Tensors]:
    return kept(site, "one", layered(1, 4)), kept(site, "two", layered(2, 4))


def test_two_slices(tmp_path: Path) -> None:
    one, two = models(tmp_path)
    found, config = merged(tmp_path, the_one("layer_range: [1, 4]"))
    wanted = renumbered(one, 0, 3, 0) | renumbered(two, 1, 4, 3)
    wanted |= {name: two[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert found == as_bytes(wanted | {name: value for name, value in one.items() if "embed" in name})
    assert config["num_hidden_layers"] == 6


def test_a_slice_with_a_method_of_its_own(tmp_path: Path) -> None:
    one, two = models(tmp_path)
    found, _ = merged(tmp_path, the_one("[1, 0.5]"))
    name = "model.layers.{}.input_layernorm.weight"
    assert found[name.format(0)] == one[name.format(0)].tobytes()
    assert found[name.format(2)] == ((one[name.format(2)] + two[name.format(2)]) / 2).tobytes()
    assert found[name.format(3)] != two[name.format(3)].tobytes()


def test_layers_that_change_nothing(tmp_path: Path) -> None:
    one, _ = models(tmp_path)
    found, _ = merged(tmp_path, the_one("scale"))
    for number, source in enumerate((0, 1, 2, 3, 2, 3)):
        for part in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            values = one[f"model.layers.{source}.{part}.weight"]
            values = values * 0 if number > 3 and part != "mlp.up_proj" else values
            assert found[f"model.layers.{number}.{part}.weight"] == values.tobytes()


def test_rows_follow_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    from vocabularies import TABLES, family, ids, loaded

    tensors = family(tmp_path, "bpe")
    (tmp_path / "recipe.yml").write_text(the_one("pad_to_multiple_of"))
    della.merge(tmp_path / "recipe.yml", tmp_path / "out", fsync=False)
    made, found = ids(tmp_path / "out"), loaded(tmp_path / "out")[TABLES[0]]
    assert made.keys() == ids(tmp_path / "base").keys() | {"<|a|>", "<|b|>", "<|c|>", "<|new|>"}
    assert (len(found) % 8, found[made["<|new|>"]].tolist()) == (0, [0.0] * 4)
    one = tensors["one"][TABLES[0]][ids(tmp_path / "one")["<|a|>"]]
    two = tensors["two"][TABLES[0]][ids(tmp_path / "two")["<|c|>"]]
    np.testing.assert_allclose(found[made["<|c|>"]], two + one - one, atol=1e-6)  # base and one have one's


def test_modules(tmp_path: Path) -> None:
    names = {"one": 1, "two": 2}
    both = {}
    for name, seed in names.items():
        text = layered(seed, 2, "model.language_model.layers")
        vision = layered(seed + 5, 3, "model.vision_tower.layers", head=False)
        both[name] = text | vision | {"model.connector.weight": np.full(3, seed, np.float32)}
        config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}
        kept(tmp_path, name, both[name], num_hidden_layers=None, **config)
    found, config = merged(tmp_path, the_one("modules:"))
    one, two = both["one"], both["two"]
    stack = "model.vision_tower.layers"
    wanted = renumbered(one, 0, 2, 0, stack) | renumbered(two, 1, 3, 2, stack)
    assert as_bytes(wanted).items() <= found.items()
    assert found["model.connector.weight"] == one["model.connector.weight"].tobytes()
    head = np.frombuffer(found["lm_head.weight"], np.float32).reshape(6, 4)
    assert np.allclose(head, 0.7 * one["lm_head.weight"] + 0.3 * two["lm_head.weight"])
    assert config["vision_config"]["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("layer", "part", "weight"),
    [
        (0, "mlp.up_proj", 0.75), (1, "mlp.up_proj", 0.25), (2, "mlp.up_proj", 0.25),
        (3, "mlp.up_proj", 0.75), (1, "mlp.down_proj", 1), (0, "self_attn.o_proj", 0.5),
        (2, "self_attn.o_proj", 0.5), (2, "input_layernorm", 1), (3, "input_layernorm", 0.75),
    ],
)  # fmt: skip
def test_filters(tmp_path: Path, layer: int, part: str, weight: float) -> None:
    one, two = models(tmp_path)
    found, _ = merged(tmp_path, the_one("layers: 1-2"))
    name = f"model.layers.{layer}.{part}.weight"
    assert found[name] == (np.float32(weight) * one[name] + two[name]).tobytes()
