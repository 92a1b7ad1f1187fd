"""What version 0.1.0 of della left on disk (tests/data/format2, made by it): models that are verified, and
staging that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import della
from della.errors import OutputError

DATA = Path(__file__).parents[1] / "data/format2"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copytree(DATA, tmp_path / "place")
    return tmp_path / "place"


@pytest.mark.parametrize("out", ["out", "one.safetensors"])
def test_its_models_are_verified(place: Path, out: str) -> None:
    verdict = della.verify(place / out, sources=1.0, inputs=True, base_dir=place)
    assert verdict.bad == []
    assert (verdict.tensors, verdict.recomputed, verdict.inputs) == (4, 4, 12)


def test_its_damaged_models_are_told(place: Path) -> None:
    shard = place / "out/model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (fault,) = della.verify(place / "out").bad
    assert "model.layers.0.mlp.up.weight" in fault


def test_the_same_recipe_gives_the_same_weights(place: Path) -> None:
    della.merge(place / "recipe.yml", place / "again", shard_bytes=100, fsync=False)
    then, now = (json.loads((place / out / "della.json").read_text()) for out in ("out", "again"))
    assert now["tensors"] == then["tensors"]
    assert now["format"] == then["format"] == 2
    for shard in sorted((place / "out").glob("*.safetensors")):
        assert (place / "again" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"finish": True}, {"part": (1, 2)}])
def test_its_staging_is_refused_and_stays(place: Path, options: dict[str, object]) -> None:
    staging = place / ".part.della-staging"
    (place / "part-staging").rename(staging)
    before = {path: path.read_bytes() for path in staging.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"another version of della.*remove the folder"):
        della.merge(place / "recipe.yml", place / "part", shard_bytes=100, fsync=False, **options)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in staging.rglob("*") if path.is_file()} == before
    assert not (place / "part").exists()
    shutil.rmtree(staging)
    della.merge(place / "recipe.yml", place / "part", shard_bytes=100, fsync=False)
