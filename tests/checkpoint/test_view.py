"""Views: what is read and hashed, held against plain NumPy and safetensors; and views that no code knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from checkpoints import TENSORS, put
from llamas import load
from safetensors.numpy import save_file

import della
from della.checkpoint import view as view_module
from della.checkpoint.layout import File, Tensor
from della.checkpoint.source import Source, open_source
from della.checkpoint.view import Hashes, Stored, TensorView
from della.checkpoint.weights import Weights
from della.dtypes import DTYPES, Array
from della.errors import CheckpointError
from della.planning import planner

RNG = np.random.default_rng(3)
BF16 = ml_dtypes.bfloat16


def hashed(array: Array) -> str:
    return xxhash.xxh3_128(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- reading and hashing ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Source:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return open_source(str(tmp_path))


def test_elements_are_those_that_safetensors_stored(source: Source) -> None:
    assert set(source.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        view = source.tensors[name]
        assert (view.name, view.shape, view.nbytes) == (name, array.shape, array.nbytes)
        assert view.dtype is view.element
        assert view.element.numpy == array.dtype
        assert (view.read().dtype, view.read().tobytes()) == (array.dtype, array.tobytes())
        assert view.where == f"{source.folder}/model.safetensors"
        assert view.reference == str(source.folder)
        flat = array.reshape(-1)
        for start in range(array.size + 1):
            for end in range(start, array.size + 1):
                out = np.empty(end - start, array.dtype)
                view.read_into(start, out)
                assert out.tobytes() == flat[start:end].tobytes()


def test_floats_are_widened(source: Source) -> None:
    for name in ("a.weight", "c.weight", "d.empty", "e.weight"):
        array = TENSORS[name].reshape(-1)
        out = np.full(max(array.size - 1, 0), np.nan, np.float32)
        source.tensors[name].read_floats(min(1, array.size), out)
        assert out.tobytes() == array[1:].astype(np.float32).tobytes()


@pytest.mark.parametrize("name", TENSORS)
def test_the_hash_is_that_of_the_stored_bytes(source: Source, name: str) -> None:
    view, wanted = source.parts[name], hashed(TENSORS[name])
    hashes = Hashes()
    view.read(hashes)
    assert hashes.of(view) == hashes.of(view) == wanted
    assert Hashes().of(view) == wanted, "what nobody has read is read for it"


def test_the_hash_does_not_depend_on_the_order_of_reading(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, size = source.parts["a.weight"], TENSORS["a.weight"].size
    monkeypatch.setattr(view_module, "PIECE_BYTES", 3)
    for _ in range(200):
        hashes = Hashes()
        for _ in range(RNG.integers(8)):
            start = int(RNG.integers(size))
            view.read_into(start, np.empty(RNG.integers(size - start), BF16), hashes)
        assert hashes.of(view) == hashed(TENSORS["a.weight"])


def test_bytes_that_come_in_order_are_read_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    view, hashes, read = source.parts["e.weight"], Hashes(), []
    real = Stored.read_bytes

    def read_bytes(self: Stored, start: int, buffer: memoryview) -> None:
        read.append((start, buffer.nbytes))
        real(self, start, buffer)

    monkeypatch.setattr(Stored, "read_bytes", read_bytes)
    for start in range(0, 9, 3):
        view.read_into(start, np.empty(3), hashes)
    assert hashes.of(view) == hashed(TENSORS["e.weight"])
    assert read == [(0, 24), (24, 24), (48, 24)]


def test_bits_that_are_held_in_memory(tmp_path: Path) -> None:
    path = put(tmp_path, {"x.bin": b"12345678"}) / "x.bin"
    grid = RNG.standard_normal((5, 4)).astype(np.float32)
    entry = Tensor("t", DTYPES["F32"], (4, 5), path, 0, grid.nbytes)
    view = Stored(entry, Weights("m", [File("x.bin", path, 8, "")]), grid.view(np.int32).T)
    hashes = Hashes()
    assert view.read(hashes).tobytes() == grid.T.tobytes()
    assert hashes.of(view) == hashed(grid.T)
    path.write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"x\.bin: "):
        view.read()


# ---- views of one's own, merged ---------------------------------------------------------------------------


class Turned(TensorView):
    """The transpose of a matrix; its elements come in the worst order."""

    def __init__(self, inner: TensorView) -> None:
        super().__init__(inner.name, inner.shape[::-1], inner.dtype, inner.parts, inner.element)
        self.inner = inner

    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        rows, columns = self.inner.shape
        for i in range(out.size):
            column, row = divmod(start + i, rows)
            self.inner.read_into(row * columns + column, out[i : i + 1], hashes)


class Scaled(TensorView):
    """A tensor times a number, in ``element``, and never rounded to the type in which it is stored."""

    def __init__(self, inner: TensorView, factor: float, element: str = "F32") -> None:
        super().__init__(inner.name, inner.shape, inner.dtype, inner.parts, DTYPES[element])
        self.inner, self.factor = inner, factor

    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        values = np.empty(out.size, np.float32)
        self.inner.read_floats(start, values, hashes)
        np.multiply(values, out.dtype.type(self.factor), out=out)


SHAPES = {"model.layers.0.mlp.up_proj.weight": (12, 8), "model.layers.1.mlp.up_proj.weight": (5, 9)}
FACTOR = 0.3


def model(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(BF16) for name, shape in SHAPES.items()}


def save(site: Path, expert: dict[str, Array], base: dict[str, Array] | None = None) -> Path:
    """A base, an expert and another one."""
    models = {"base": base or model(0), "expert": expert, "other": model(2)}
    return put(site, {f"{name}/model.safetensors": tensors for name, tensors in models.items()})


def seen(monkeypatch: pytest.MonkeyPatch, made: Callable[[TensorView], TensorView], site: Path) -> None:
    """From now on a merge sees the tensors of the model at ``site`` through a view."""

    def opened(reference: str, **options: Any) -> Source:
        source = open_source(reference, **options)
        if source.path == site:
            source.tensors = {name: made(view) for name, view in source.tensors.items()}
        return source

    monkeypatch.setattr(planner, "open_source", opened)


def recipe(site: Path, method: str, **more: Any) -> dict[str, Any]:
    own = {"weight": 0.8} | ({} if method in ("linear", "task_arithmetic") else {"density": 0.5})
    models = [{"model": str(site / name), "parameters": own} for name in ("other", "expert")]
    found = {"merge_method": method, "models": models, **more}
    return found if method == "linear" else found | {"base_model": str(site / "base")}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", {}), ("della", {}), ("ties", {}), ("breadcrumbs", {}), ("task_arithmetic", {}),
        ("ties", {"parameters": {"scope": "model"}}), ("della", {"parameters": {"rank_by": "tensor"}}),
        ("della", {"compat": "mergekit"}),
    ],
)  # fmt: skip
def test_a_merge_through_views_is_that_of_their_plain_twins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any]
) -> None:
    """One expert is stored transposed and unscaled, and seen turned and scaled."""
    stored = {name: np.ascontiguousarray(array.T) for name, array in model(1).items()}
    plain = {name: array.astype(np.float32) * np.float32(FACTOR) for name, array in model(1).items()}
    view, twin = save(tmp_path / "view", stored), save(tmp_path / "twin", plain)
    della.merge(recipe(twin, method, **more), tmp_path / "twin.safetensors", fsync=False)
    seen(monkeypatch, lambda inner: Turned(Scaled(inner, FACTOR)), view / "expert")
    out = tmp_path / "view.safetensors"
    found = della.merge(recipe(view, method, **more), out, tile=16, fsync=False)
    assert load(out) == load(tmp_path / "twin.safetensors")
    assert {dtype for dtype, _, _ in load(out).values()} == {"BF16"}
    assert found.manifest["inputs"]["models"][1]["tensors"] == {n: hashed(a) for n, a in stored.items()}
    verdict = della.verify(out, sources=1, inputs=True, base_dir=view)
    assert (verdict.bad, verdict.recomputed) == ([], len(SHAPES))
    assert verdict.inputs == len(SHAPES) * (2 if method == "linear" else 3)


def test_a_computed_base_and_float64_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {name: array.astype(np.float64) * FACTOR for name, array in model(1).items()}
    view, twin = save(tmp_path / "view", model(1)), save(tmp_path / "twin", exact)
    della.merge(recipe(twin, "ties"), tmp_path / "twin.safetensors", fsync=False)
    seen(monkeypatch, lambda inner: Scaled(inner, FACTOR, "F64"), view / "expert")
    della.merge(recipe(view, "ties"), tmp_path / "view.safetensors", fsync=False)
    assert load(tmp_path / "view.safetensors") == load(tmp_path / "twin.safetensors")
    wide = {name: array.astype(np.float32) * np.float32(FACTOR) for name, array in model(0).items()}
    made = recipe(save(tmp_path / "wide", model(1), wide), "della", out_dtype="bfloat16")
    della.merge(made, tmp_path / "wide.safetensors", fsync=False)
    seen(monkeypatch, lambda inner: Scaled(inner, FACTOR), view / "base")
    della.merge(recipe(view, "della"), tmp_path / "base.safetensors", fsync=False)
    assert load(tmp_path / "base.safetensors") == load(tmp_path / "wide.safetensors")


@pytest.mark.parametrize("element", ["F32", "F64"])
def test_a_computed_view_that_is_copied_is_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, element: str
) -> None:
    extra = RNG.standard_normal((7, 3)).astype(BF16)
    site = save(tmp_path, model(1) | {"extra": extra})
    seen(monkeypatch, lambda inner: Scaled(inner, FACTOR, element), site / "expert")
    made = recipe(site, "task_arithmetic", extra="copy")
    found = della.merge(made, tmp_path / "o.safetensors", fsync=False)
    wanted = extra.astype(DTYPES[element].numpy) * DTYPES[element].numpy.type(FACTOR)
    assert load(tmp_path / "o.safetensors")["extra"] == ("BF16", (7, 3), wanted.astype(BF16).tobytes())
    assert found.manifest["inputs"]["models"][1]["tensors"]["extra"] == hashed(extra)


def test_damage_is_told_of_the_file_behind_a_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = save(tmp_path, model(1))
    seen(monkeypatch, lambda inner: Scaled(inner, np.inf), site / "expert")
    with pytest.raises(CheckpointError) as caught:
        della.merge(recipe(site, "ties"), tmp_path / "o.safetensors", threads=1, fsync=False)
    name, shape = max(SHAPES.items(), key=lambda item: np.prod(item[1]))
    said = f"{site}/expert/model.safetensors: tensor {name} of {site}/expert holds {np.prod(shape)} values"
    assert said in str(caught.value)
