"""Models of another architecture, whatever differs in it: one problem, which says what, in one short line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put

import della
from della.errors import DellaError

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "num_hidden_layers": 6, "vocab_size": 32,
}  # fmt: skip


def model(**changes: Any) -> dict[str, Any]:
    """Tensors of a Llama of these sizes, and its config.json."""
    size = SIZES | changes
    wide, inner, rows = size["hidden_size"], size["intermediate_size"], size["vocab_size"]
    asked, kept = (size[f"num_{kind}_heads"] * size["head_dim"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (rows, wide)),
        "model.norm.weight": (wide,),
    }
    for layer in range(size["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (asked, wide), "self_attn.k_proj": (kept, wide),
                "self_attn.v_proj": (kept, wide), "self_attn.o_proj": (wide, asked),
                "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner),
                "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
            }.items()
        }  # fmt: skip
    tensors = {name: np.full(shape, layer, np.float32) for layer, (name, shape) in enumerate(shapes.items())}
    return {"model.safetensors": tensors, "config.json": {"model_type": "llama", **size}}


def problems(folder: Path, base: dict[str, Any], *experts: dict[str, Any]) -> list[str]:
    names = [f"m{n}" for n in range(len(experts))]
    for name, files in zip(["base", *names], [base, *experts], strict=True):
        put(folder, {f"{name}/{file}": content for file, content in files.items()})
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names],
    }
    with pytest.raises(DellaError) as caught:
        della.plan(recipe)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 8}, "hidden_size 8 against 16"),
        ({"intermediate_size": 40}, "intermediate_size 40 against 24"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 against 2"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 against 4"),
        ({"head_dim": 8}, "head_dim 8 against 4"),
        ({"num_hidden_layers": 2}, "2 against 6"),
        ({"num_hidden_layers": 9}, "9 layers against 6"),
        (
            {"num_hidden_layers": 5, "intermediate_size": 40},
            "num_hidden_layers 5 against 6, intermediate_size 40",
        ),
        (
            {"num_hidden_layers": 9, "hidden_size": 8},
            "hidden_size 8 against 16, num_hidden_layers 9",
        ),
        (
            {"num_hidden_layers": 1, "hidden_size": 8},
            "hidden_size 8 against 16, num_hidden_layers 1",
        ),
        (
            {"model_type": "qwen2", "hidden_size": 8},
            "model_type qwen2 against llama, hidden_size 8",
        ),
    ],
)
def test_what_differs_is_said_first_and_once(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (found,) = problems(tmp_path, model(), model(**changes))
    assert said in found
    assert len(found) < 450
    (found,) = problems(tmp_path / "turned", model(**changes), model())
    for key, new in changes.items():
        assert re.search(rf"\b{(SIZES | {'model_type': 'llama'})[key]}( layers)? against {new}\b", found)
    assert len(found) < 450


def test_a_model_with_another_kind_of_tensors(tmp_path: Path) -> None:
    expert = model()
    tensors = expert["model.safetensors"]
    expert["model.safetensors"] = {n: v.astype(np.int64) if "norm" in n else v for n, v in tensors.items()}
    (found,) = problems(tmp_path, model(), expert)
    assert "is stored as I64, expected F32, and 12 more alike" in found


def test_few_tensors_are_named_one_by_one_and_each_model_is_told(tmp_path: Path) -> None:
    few = model()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        few["model.safetensors"][name] = np.ones((3, 3), np.float32)
    found = sorted(problems(tmp_path, model(), few, model(intermediate_size=40), model(hidden_size=8)))
    assert [each.split(":")[0] for each in found] == ["m0", "m0", "m1", "m2"]
    assert "model.norm.weight has shape [3, 3], expected [16]" in found[0] + found[1]
    assert "18 of them of another shape (intermediate_size 40 against 24)" in found[2]
    assert "mlp.down_proj.weight has shape [16, 40], expected [16, 24]" in found[2]
    assert "57 of them of another shape (hidden_size 8 against 16)" in found[3]


def test_added_tokens_are_told_with_their_cure(tmp_path: Path) -> None:
    found = problems(tmp_path, model(), model(vocab_size=36))
    assert len(found) == 2
    assert all("vocabulary is larger" in each for each in found)
