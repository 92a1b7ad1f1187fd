"""passthrough: one model byte for byte, or scaled, whatever its tensors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from llamas import Tensors, load

import della
from della.dtypes import of_array
from della.errors import RecipeError

# Odd bits: a NaN with a payload, minus zero, infinity, the smallest number.
BITS = np.array([0x7FC1, 0x8000, 0x7F80, 0x0001, 0x3F80, 0xC049], np.uint16)
MODEL: Tensors = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3).astype(np.float16),
    "model.layers.0.self_attn.o_proj.weight": BITS.view(ml_dtypes.bfloat16).reshape(2, 3),
    "model.layers.0.mlp.down_proj.weight": np.arange(6, dtype=np.float64).reshape(2, 3) / 3,
    "model.layers.0.mlp.up_proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
    "model.norm.weight": np.array([1, 2, 3], np.float32),
    "steps": np.arange(3),
}


def merged(folder: Path, tensors: Tensors, **keys: Any) -> Any:
    put(folder, {"a/model.safetensors": dict(tensors)})
    entry = {"model": str(folder / "a")} | ({"parameters": keys.pop("own")} if "own" in keys else {})
    made = {"merge_method": "passthrough", "models": [entry], **keys}
    return load(della.merge(made, folder / "out", fsync=False).out)


def test_every_byte_is_copied_of_any_type(tmp_path: Path) -> None:
    wanted = {name: (of_array(v).name, v.shape, v.tobytes()) for name, v in MODEL.items()}
    assert merged(tmp_path, MODEL) == wanted
    assert della.verify(tmp_path / "out", sources=1.0, inputs=True).is_well


def test_a_scale_holds_where_its_filter_does(tmp_path: Path) -> None:
    """The residual form: two parts of a layer are scaled, the others copied."""
    plain = {name: v for name, v in MODEL.items() if "o_proj" not in name}
    cases = [{"filter": "down_proj", "value": 0.0}, {"filter": "up_proj", "value": -0.5}]
    found = merged(tmp_path, plain, own={"scale": cases})
    for name, value in plain.items():
        factor = 0 if "down" in name else -0.5 if "up" in name else 1
        assert found[name][2] == (value * value.dtype.type(factor)).tobytes(), name


def test_another_type_rounds_once(tmp_path: Path) -> None:
    plain = {name: v for name, v in MODEL.items() if "o_proj" not in name}
    found = merged(tmp_path, plain, dtype="bfloat16")
    for name, value in plain.items():
        wanted = value if name == "steps" else value.astype(ml_dtypes.bfloat16)
        assert found[name][2] == wanted.tobytes(), name


def test_over_arrays() -> None:
    values = np.array([1, 2, -3], np.float32)
    assert della.merge_tensors(None, [values], method="passthrough").tobytes() == values.tobytes()
    scaled = della.merge_tensors(None, [values], method="passthrough", scale=0.5)
    assert scaled.tolist() == [0.5, 1, -1.5]


def test_two_models_are_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    put(tmp_path, {f"{name}/model.safetensors": dict(MODEL) for name in "ab"})
    made: dict[str, Any] = {"models": [{"model": str(tmp_path / name)} for name in "ab"]}
    with pytest.raises(RecipeError, match=r"one model, found 2: a, b; .* linear") as caught:
        della.merge(made | {"merge_method": "passthrough"}, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    della.plan(made | {"merge_method": "linear"}).close()
