"""Formats as nobody names them: codes with a scale of any name, factors as diffusers names them, and names
under another prefix beside tensors that only one of the models has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import della
from della.errors import DellaError

Tensors = dict[str, Any]
IDLE: dict[str, Any] = {"missing": "base", "extra": "ignore"}


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def pair(folder: Path, base: Tensors, expert: Tensors, **more: Any) -> Path:
    for name, tensors in (("BASE", base), ("FT", expert)):
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors")
    made = {"merge_method": "task_arithmetic", "base_model": "BASE", "models": [{"model": "FT"}]} | more
    (folder / "recipe.yml").write_text(json.dumps(made))
    return folder / "recipe.yml"


def refused(path: Path) -> str:
    with pytest.raises(DellaError) as caught:
        della.merge(path, path.parent / "out", fsync=False)
    assert not (path.parent / "out").exists()
    return str(caught.value)


CODES = [
    ("l.weight.int_data", np.int8, (8, 8), "l.weight.amplitude"), ("l.kernel", np.int8, (8, 8), "l.kernel_s"),
    ("l.w", np.uint8, (8, 8), "l.s"), ("l.B", np.int32, (8, 8), "l.s"),
    ("l.weight", np.uint8, (64,), "l.scale"), ("l.weight", np.int64, (8, 8), "l.d"),
    ("l.weight", bool, (8, 8), "l.d"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "shape", "scale"), CODES)
def test_codes_with_a_scale_of_any_name(
    tmp_path: Path, name: str, dtype: Any, shape: tuple[int, ...], scale: str
) -> None:
    model = {name: np.arange(64).reshape(shape).astype(dtype), scale: normal(1, 8, 1), "v": normal(2, 4)}
    assert "quantised" in refused(pair(tmp_path, model, model | {scale: normal(3, 8, 1)}))


def test_plain_float8_with_a_scale_of_any_name_stays_refused(tmp_path: Path) -> None:
    plain = {"l.weight": normal(1, 8, 8).astype(ml_dtypes.float8_e4m3fn), "l.bias": normal(2, 1)}
    scaled = plain | {"l.s": normal(3, 1)}
    assert "quantised" in refused(pair(tmp_path, scaled, scaled, plain_fp8=True))
    with della.plan(pair(tmp_path, plain, plain, plain_fp8=True)):
        pass  # a bias is no scale


@pytest.mark.parametrize("name", ["to_q.lora.down.weight", "x.to_q_lora.up.weight", "unet.q.lora.up.weight"])
def test_factors_as_diffusers_names_them(tmp_path: Path, name: str) -> None:
    model = {name: normal(1, 2, 8), "v": normal(2, 4)}
    assert "adapter" in refused(pair(tmp_path, model, model | {name: normal(3, 2, 8)}))


@pytest.mark.parametrize("more", [{}, IDLE])
@pytest.mark.parametrize("swapped", [False, True])
def test_fused_experts_among_many_common_names(tmp_path: Path, swapped: bool, more: dict[str, Any]) -> None:
    common = {f"l.{n}_proj.weight": normal(k, 8, 8) for k, n in enumerate("abcdefghijkl")}
    single = common | {f"l.experts.{e}.up_proj.weight": normal(e, 4, 8) for e in range(2)}
    fused = common | {"l.experts.gate_up_proj": normal(9, 2, 8, 8)}
    said = refused(pair(tmp_path, *((fused, single) if swapped else (single, fused)), **more))
    assert "experts are stored one by one" in said
    assert "missing: base" not in said
    assert "extra: ignore" not in said


@pytest.mark.parametrize(
    ("there", "beyond"),
    [("model.language_model.", "model.visual.x.weight"), ("module.model.", "module.y.weight")],
)
def test_a_prefix_beside_tensors_that_the_base_lacks(tmp_path: Path, there: str, beyond: str) -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{k}.q.weight" for k in range(3))]
    base = {name: normal(k, 8, 8) for k, name in enumerate(names)}
    wanted = {name: values + normal(50 + k, 8, 8) for k, (name, values) in enumerate(base.items())}
    expert = {there + name.removeprefix("model."): values for name, values in wanted.items()}
    expert[beyond] = normal(9, 5, 5)
    said = refused(pair(tmp_path, base, expert))
    assert beyond in said
    assert "extra: ignore" in said  # a cure that leaves out this one tensor alone
    path = pair(tmp_path, base, expert, extra="ignore")
    della.merge(path, tmp_path / "out", fsync=False)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, values in wanted.items():
        start, end = header[name]["data_offsets"]
        found = np.frombuffer(raw[8 + size + start : 8 + size + end], "<f4").reshape(8, 8)
        assert np.allclose(found, values, atol=1e-6)
    assert beyond not in header


TABLES = [
    ("l.codes_of", np.int64, (8, 8), "l.scale", (8, 1)), ("l.q", np.uint64, (8, 8), "l.q_scale", (1,)),
    ("l.kernel", bool, (8, 8), "l.kernel_scale", (8,)), ("l.indices", np.int64, (8, 8), "l.codebook", (8, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "shape", "scale", "scales"), TABLES)
def test_tables_with_a_scale_of_their_shape_are_codes(
    tmp_path: Path, name: str, dtype: Any, shape: tuple[int, ...], scale: str, scales: tuple[int, ...]
) -> None:
    model = {name: np.arange(64).reshape(shape).astype(dtype), scale: normal(1, *scales), "v": normal(2, 4)}
    assert "quantised" in refused(pair(tmp_path, model, model | {scale: normal(3, *scales)}))


BUFFERS = [  # as Swin v2, GPT-2, EfficientFormer have them, with what is trained beside them
    ("a.relative_position_index", np.int64, (16, 16), "a.logit_scale", (3, 1, 1)),
    ("a.relative_position_index", np.int64, (16, 16), "a.logit_scale", (16, 1, 1)),
    ("a.bias", bool, (1, 1, 8, 8), "a.scale", ()), ("a.mask", bool, (8, 8), "a.scale", ()),
    ("a.attention_bias_idxs", np.int64, (8, 8), "a.scale", (8,)),
    ("a.lookup", np.int64, (8, 8), "a.x", (8, 1)),
    ("a.visited", bool, (8,), "a.scale", (8,)), ("a.lookup", np.int64, (8, 8), "a.scale", (3, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "shape", "other", "shapes"), BUFFERS)
def test_buffers_beside_what_is_called_a_scale_are_copied(
    tmp_path: Path, name: str, dtype: Any, shape: tuple[int, ...], other: str, shapes: tuple[int, ...]
) -> None:
    rows = np.random.default_rng(5).integers(0, 2, shape).astype(dtype)
    model = {name: rows, other: np.asarray(normal(1, *shapes), np.float32)}
    expert = {name: np.asarray(1 - rows.astype(np.int64)).astype(dtype), other: model[other] + 1}
    expert[other] = np.asarray(expert[other], np.float32)
    with della.plan(pair(tmp_path, model, expert)) as plan:
        (note,) = [note for note in plan.notes if name in note]
    assert "copied" in note


ODD = [
    ("spectral.weights1", np.complex64, (4, 4, 2)), ("ssm.kernel", np.complex64, (4, 4)),
    ("l.packed", np.int8, (8, 8)), ("l.lexicon", np.int32, (4, 4)), ("l.words", np.uint16, (4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "shape"), ODD)
def test_trained_tables_that_are_no_floats_are_not_left_out_in_silence(
    tmp_path: Path, name: str, dtype: Any, shape: tuple[int, ...]
) -> None:
    model = {name: (normal(1, *shape) * 100).astype(dtype), "v": normal(2, 4)}
    expert = {name: (normal(3, *shape) * 100).astype(dtype), "v": normal(4, 4)}
    for more in ({}, IDLE):
        said = refused(pair(tmp_path, model, expert, **more))
        assert name in said
        assert "give the model" in said
    path = pair(tmp_path, model, expert | {name: model[name]})  # the cure that is named
    della.merge(path, tmp_path / "out", fsync=False)


def test_large_buffers_that_differ_are_told_with_their_count(tmp_path: Path) -> None:
    names = [f"l.{k}.attn.mask" for k in range(3)]
    model: Tensors = {name: np.zeros((1, 1500, 1500), np.uint8) for name in names} | {"v": normal(2, 4)}
    expert = model | {name: np.ones((1, 1500, 1500), np.uint8) for name in names}
    with della.plan(pair(tmp_path, model, expert)) as plan:
        (note,) = [note for note in plan.notes if "mask" in note]
    assert "3 tensors" in note or "2 more" in note or all(name in note for name in names)
