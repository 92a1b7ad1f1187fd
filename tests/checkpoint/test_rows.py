"""Tables gathered by a map, read in pieces from anywhere, held against NumPy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from della.checkpoint.rows import MEAN, REST, ZERO, RowMap, Rows
from della.checkpoint.source import open_source
from della.checkpoint.view import Hashes, TensorView
from della.dtypes import Array

RNG = np.random.default_rng(11)


def view(folder: Path, name: str, array: Array) -> TensorView:
    folder.mkdir(exist_ok=True)
    save_file({"t": array}, folder / f"{name}.safetensors")
    return open_source(str(folder / f"{name}.safetensors")).tensors["t"]


@pytest.mark.parametrize("seed", range(8))
def test_any_piece_is_numpy_s(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [rng.standard_normal((n, 3)).astype(ml_dtypes.bfloat16) for n in (9, 7)]
    views = [view(tmp_path, str(k), table) for k, table in enumerate(tables)]
    which = rng.integers(ZERO, 2, 14)
    row = np.array([rng.integers(0, 7) if rng.random() < 0.4 else n % 7 for n in range(14)])
    gathered = Rows("t", views, RowMap(which, row))
    wanted = np.stack([np.zeros(3, tables[0].dtype) if k < 0 else tables[k][r] for k, r in zip(which, row)])
    assert gathered.element.name == "BF16"
    assert (gathered.shape, gathered.read().tobytes()) == ((14, 3), wanted.tobytes())
    flat = wanted.reshape(-1)
    for start in range(43):
        for end in range(start, 43):
            out = np.empty(end - start, flat.dtype)
            gathered.read_into(start, out)
            assert out.tobytes() == flat[start:end].tobytes()


def test_means_are_float32_and_the_last_rows_the_mean_of_the_others(tmp_path: Path) -> None:
    a, b = RNG.standard_normal((4, 5)).astype(np.float16), RNG.standard_normal((3, 5)).astype(np.float32)
    own, other = view(tmp_path, "a", a), view(tmp_path, "b", b)
    row_map = RowMap(
        np.array([0, MEAN, ZERO, 1, REST, REST]), np.array([3, 0, 0, 2, 0, 0]), {1: [(0, 1), (1, 0)]}
    )
    gathered = Rows("t", [own, other], row_map)
    mean = (a[1].astype(np.float64) + b[0]) / 2
    rows = np.stack([a[3], mean, np.zeros(5), b[2]])
    assert (gathered.dtype.name, gathered.element.name) == ("F16", "F32")
    np.testing.assert_allclose(gathered.read(), [*rows, rows.mean(0), rows.mean(0)], rtol=1e-6, atol=1e-7)
    piece = np.empty(9, np.float32)
    gathered.read_into(17, piece)
    assert piece.tobytes() == gathered.read().reshape(-1)[17:26].tobytes()
    hashes = Hashes()
    gathered.read(hashes)
    plain = Hashes()
    assert [hashes.of(part) for part in gathered.parts] == [
        plain.of(part) for each in (own, other) for part in each.parts
    ]


def test_a_row_of_biases_has_its_tokens_on_the_last_axis(tmp_path: Path) -> None:
    bias = RNG.standard_normal((1, 6)).astype(np.float32)
    gathered = Rows("t", [view(tmp_path, "a", bias)], RowMap(np.zeros(3), np.array([5, 0, 1])), axis=1)
    assert gathered.read().tolist() == [[float(bias[0, n]) for n in (5, 0, 1)]]


def test_a_map_knows_whether_it_changes_anything() -> None:
    same, other = RowMap(np.zeros(3), np.arange(3)), RowMap(np.zeros(3), np.array([0, 2, 1]))
    assert (same.is_identity, other.is_identity, same.computes) == (True, False, False)
    assert same.key != other.key == RowMap(np.zeros(3), np.array([0, 2, 1])).key
