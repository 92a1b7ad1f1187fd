"""della verify: are the inputs what was merged, and do they give the same again?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from checkpoints import put
from llamas import EXACT, EXPERTS, recipe, trio
from merged import FOLDER, FORMS, OWN, find, flip, refused, reseal

import della
from della.api import verify
from della.errors import CheckpointError

# ---- the inputs and the merge again -----------------------------------------------------------------------


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    """Models, recipe and merges of one's own to spoil."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def test_relative_paths_start_from_the_base_dir(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made / FOLDER, tmp_path / "out"))
    monkeypatch.chdir(made.parent)
    assert verify(out, inputs=True, sources=0.01, base_dir=made).recomputed == 1
    said = refused(CheckpointError, out, inputs=True)
    assert f"  - ./base: not found; tried {made.parent}/base" in said
    hint = said.splitlines()[-1]
    assert hint.startswith("  - ./base: it starts where the recipe was")
    assert hint.endswith("name that folder: base_dir=FOLDER")
    monkeypatch.chdir(made)
    assert verify(out, inputs=True).inputs == 151


def test_inputs_are_found_beside_the_model_or_above_it(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verify(whole / FOLDER, inputs=True, sources=0.01).inputs == 151
    (whole / "merges/of today").mkdir(parents=True)
    out = (whole / FOLDER).rename(whole / "merges/of today/out")
    assert verify(out.relative_to(tmp_path), inputs=True).inputs == 151
    (out.parent / "base").mkdir()  # a folder that holds one of them is not where they are
    assert verify(out, inputs=True).inputs == 151
    shutil.rmtree(whole / "story")
    assert "name that folder: base_dir=FOLDER" in refused(CheckpointError, out, inputs=True)
    assert verify(out, inputs=True, base_dir=made).inputs == 151


def test_an_input_with_other_bytes(whole: Path) -> None:
    path, begin, _ = find(whole / "code", "lm_head.weight")
    flip(path, begin)
    assert verify(whole / FOLDER).is_well, "inputs are looked at only when asked for"
    found = verify(whole / FOLDER, inputs=True, base_dir=whole)
    assert found.bad == [f"{path}: tensor 'lm_head.weight' is not what was merged"]
    found = verify(whole / FOLDER, sources=1, base_dir=whole)
    assert found.bad == [f"{whole}/out: tensor 'lm_head.weight' is not what its sources give"]
    assert found.notes == [], "the same versions"


def test_an_input_with_another_header(whole: Path) -> None:
    path, begin, _ = find(whole / "story", "gate")
    flip(path, begin)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes((start - 7).to_bytes(8, "little") + raw[8:start] + b" " + raw[start:])
    bad = [
        f"{path}: not the file that was merged (its size or header)",
        f"{path}: tensor 'gate' is not what was merged",
    ]
    assert verify(whole / FOLDER, inputs=True, base_dir=whole).bad == bad
    other = path.rename(whole / "story/model-00001-of-00001.safetensors")
    assert verify(whole / FOLDER, inputs=True, base_dir=whole).bad == [
        f"{other}: not among the files that were merged",
        f"{path}: was merged, and is no part of the model any more",
        f"{other}: tensor 'gate' is not what was merged",
    ]


def test_an_input_that_is_damaged_now(whole: Path) -> None:
    path, begin, _ = find(whole / "math", "model.norm.weight")
    raw = bytearray(path.read_bytes())
    raw[begin : begin + 2] = b"\xff\xff"
    path.write_bytes(raw)
    (bad,) = verify(whole / FOLDER, sources=1, base_dir=whole).problems
    assert (bad.subject, bad.tensor) == (str(path), "model.norm.weight")
    assert "1 value that is NaN" in bad.said
    assert f"tensor 'model.norm.weight' of {whole}/out cannot be checked" in bad.said
    assert "nonfinite" in (bad.fix or "")
    path.unlink()
    said = refused(CheckpointError, whole / FOLDER, sources=1, base_dir=whole)
    assert said.startswith(f"{whole}/math: no model here")


def pickled(site: Path) -> None:
    torch: Any = pytest.importorskip("torch", reason="needs torch")
    from safetensors.torch import load_file

    torch.save(load_file(site / "math/model.safetensors"), site / "math/pytorch_model.bin")
    (site / "math/model.safetensors").unlink()


def widened(site: Path) -> None:
    for name, tensors in trio().items():
        wide = {k: v if k in EXACT else v.astype(np.float64) for k, v in tensors.items()}
        put(site / name, {"model.safetensors": wide})


def uneven(site: Path) -> None:
    tensors = trio()["math"]
    tensors["more"] = tensors.pop("one")
    put(site / "math", {"model.safetensors": tensors})


TWICE = [{"model": "math", "parameters": {"weight": 0.3, "density": 0.5}}] * 2
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None]] = {
    "model scope": ("ties", {"parameters": {"scope": "model"}}, None),
    "no base": ("linear", {}, None),
    "compat": ("della", {"compat": "mergekit"}, None),
    "another seed and type": ("dare_ties", {"seed": 7, "out_dtype": "float32"}, None),
    "a pickle": ("della", {}, pickled),
    "float64": ("della", {}, widened),
    "uneven": ("della", {"missing": "base", "extra": "copy"}, uneven),
    "a model twice": ("della", {"models": [*TWICE, {"model": "base"}]}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_merge_comes_out_again(whole: Path, kind: str) -> None:
    method, keys, prepare = KINDS[kind]
    if prepare:
        prepare(whole)
    own = [{"weight": 0.5} if method == "linear" else each for each in OWN]
    table = recipe(Path("."), method, own, {}) | keys
    table["models"] = [model | {"model": str(whole / model["model"])} for model in table["models"]]
    if method != "linear":
        table["base_model"] = str(whole / "base")
    allow, merged = prepare is pickled, whole / "o.safetensors"
    della.merge(table, merged, fsync=False, allow_pickle=allow)
    found = verify(merged, sources=1, inputs=True, allow_pickle=allow)
    assert (found.bad, found.recomputed) == ([], found.tensors)
    if allow:
        assert "allow_pickle=True" in refused(CheckpointError, merged, inputs=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_forged_tensor_does_not_come_out_of_its_sources(whole: Path, form: str) -> None:
    name, site = "lm_head.weight", whole / form
    path, begin, end = find(site, name)
    flip(path, begin + 1, 7)
    forged = xxhash.xxh3_128_hexdigest(path.read_bytes()[begin:end])

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][name] = forged
        manifest["versions"]["numpy"] = "0.9"

    reseal(site, change)
    assert verify(site, inputs=True, base_dir=whole).is_well, "a manifest is no signature"
    found = verify(site, sources=1, base_dir=whole)
    assert found.bad == [f"{site}: tensor {name!r} is not what its sources give"]
    versions = f"merged with numpy 0.9 (here {np.__version__})"
    assert found.notes == [f"{site}: {versions}, which may be why its sources give other bytes"]


def test_other_tensors_than_its_sources_give(whole: Path) -> None:
    for name, tensors in trio().items():
        tensors["portal"] = tensors.pop("gate")
        put(whole / name, {"model.safetensors": tensors})
    out = whole / FOLDER
    assert verify(out, sources=1, base_dir=whole).bad == [
        f"{out}: tensor 'gate' does not come from its sources",
        f"{out}: lacks tensor 'portal', which its sources give",
    ]
    bad = verify(out, inputs=True, base_dir=whole).bad
    files = [f"{whole}/{name}/model.safetensors" for name in ("base", *EXPERTS)]
    references = ["./base", *(f"./{name}" for name in EXPERTS)]
    assert sorted(bad) == sorted(
        [f"{file}: not the file that was merged (its size or header)" for file in files]
        + [f"{reference}: tensor 'gate', which was merged, is missing" for reference in references]
    )
