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
def site(tmp_path: Path) -> Path:
    shutil.copytree(DATA, tmp_path / "site")
    return tmp_path / "site"


@pytest.mark.parametrize("out", ["out", "one.safetensors"])
def test_its_models_are_verified(site: Path, out: str) -> None:
    verdict = della.verify(site / out, sources=1.0, inputs=True, base_dir=site)
    assert verdict.bad == []
    assert (verdict.tensors, verdict.recomputed, verdict.inputs) == (4, 4, 12)


def test_its_damaged_models_are_told(site: Path) -> None:
    shard = site / "out/model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (fault,) = della.verify(site / "out").bad
    assert "model.layers.0.mlp.up.weight" in fault


def test_the_same_recipe_gives_the_same_weights(site: Path) -> None:
    della.merge(site / "recipe.yml", site / "again", shard_bytes=100, fsync=False)
    then, now = (json.loads((site / out / "della.json").read_text()) for out in ("out", "again"))
    assert now["tensors"] == then["tensors"]
    assert now["format"] == then["format"] == 2
    for shard in sorted((site / "out").glob("*.safetensors")):
        assert (site / "again" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"finish": True}, {"part": (1, 2)}])
def test_its_staging_is_refused_and_stays(site: Path, options: dict[str, object]) -> None:
    staging = site / ".part.della-staging"
    (site / "part-staging").rename(staging)
    before = {path: path.read_bytes() for path in staging.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"another version of della.*remove the folder"):
        della.merge(site / "recipe.yml", site / "part", shard_bytes=100, fsync=False, **options)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in staging.rglob("*") if path.is_file()} == before
    assert not (site / "part").exists()
    shutil.rmtree(staging)
    della.merge(site / "recipe.yml", site / "part", shard_bytes=100, fsync=False)
