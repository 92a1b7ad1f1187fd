"""Whole merges of small models against the reference, byte for byte, whatever the threads and the tiles."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from checkpoints import put
from llamas import (
    EXACT,
    EXPERTS,
    SEVERAL,
    Stored,
    Tensors,
    as_stored,
    expected,
    load,
    recipe,
    reference_merge,
    save,
    trio,
)

import della
from della.dtypes import DTYPES, round_to, widen
from della.merging.registry import METHODS
from della.recipe.reader import read_recipe
from della.running.run import Progress

Trio = tuple[Path, dict[str, Tensors]]

OWN: list[dict[str, Any]] = [
    {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "gamma": 0.05},
    {"weight": 0.7, "density": 0.6, "epsilon": 0.4, "gamma": 0.5},
    {"weight": -0.3, "density": 0.3, "epsilon": 0.1, "gamma": 0.0},
]


def own_of(method: str, own: Sequence[Mapping[str, Any]] = OWN, **more: Any) -> list[dict[str, Any]]:
    """The parameters that the method has."""
    known = METHODS[method].parameters
    return [{key: value for key, value in {**mine, **more}.items() if key in known} for mine in own]


def merged(made: Mapping[str, Any], out: Path, **options: Any) -> Stored:
    """Merge, and look at the result: nothing else beside it, every hash in the manifest right."""
    before = set(os.listdir(out.parent))
    result = della.merge(made, out, fsync=False, **options)
    assert set(os.listdir(out.parent)) == before | {out.name}
    found = load(out)
    hashes = {name: xxhash.xxh3_128(raw).hexdigest() for name, (_, _, raw) in found.items()}
    assert result.manifest["tensors"] == hashes
    return found


@pytest.fixture(scope="module")
def models(models: Path) -> Trio:
    """The trio on disk, and its tensors."""
    return models, trio()


SHARED: list[tuple[str, dict[str, Any]]] = [
    ("della", {"rank_by": "tensor"}),
    ("della", {"rank_by": "random", "ladder": "paper"}),
    ("della", {"rank_by": "random_tensor"}),
    ("della", {"rank_by": "magnitude", "vote": "count"}),
    ("della", {"rank_by": "optimal", "coupling": "systematic"}),
    ("della", {"rescale": "none", "lambda": 0.7}),
    ("della", {"rescale": "l1", "normalize": False}),
    ("della", {"fuse": "calibrated", "lambda": 1.3}),
    ("della", {"lambda_scaling": "row", "vote": "unweighted"}),
    ("della", {"lambda_scaling": "tensor"}),
    ("della_linear", {"lambda_scaling": "row_inverse", "normalize": True}),
    ("della_linear", {"rank_by": "tensor", "ladder": "paper", "rescale": "l1"}),
    ("dare_ties", {"coupling": "systematic", "fuse": "calibrated"}),
    ("dare_linear", {"rescale": False}),
    ("ties", {"scope": "row", "lambda": 0.9}),
    ("ties", {"rescale": True, "vote": "none"}),
    ("task_arithmetic", {"vote": "weighted", "fuse": "mean", "lambda": -0.5}),
    ("breadcrumbs", {"rescale": "l1", "lambda_scaling": "tensor"}),
    ("breadcrumbs_ties", {"normalize": True}),
    ("linear", {"normalize": False}),
]


@pytest.mark.parametrize(("method", "shared"), [*((name, {}) for name in SEVERAL), *SHARED], ids=str)
def test_every_method_gives_the_bytes_of_the_reference(
    models: Trio, tmp_path: Path, method: str, shared: dict[str, Any]
) -> None:
    folder, tensors = models
    wanted = as_stored(expected(tensors, method, own_of(method), shared))
    made = recipe(folder, method, own_of(method), shared)
    assert merged(made, tmp_path / "out", threads=2, tile=500) == wanted
    assert merged(made, tmp_path / "out.safetensors", threads=1) == wanted


def test_the_seed_changes_the_draws_and_nothing_else(models: Trio, tmp_path: Path) -> None:
    folder, tensors = models
    made = recipe(folder, "della", own_of("della"), {})
    seven = merged(made, tmp_path / "a", seed=7)
    assert seven == as_stored(expected(tensors, "della", OWN, {}, seed=7))
    assert seven == merged({**made, "seed": 7}, tmp_path / "b")
    assert seven != merged(made, tmp_path / "c")
    ties = recipe(folder, "ties", own_of("ties"), {})
    assert merged(ties, tmp_path / "d", seed=7) == merged(ties, tmp_path / "e")


def test_gradients_and_filters_give_each_layer_its_own_values(models: Trio, tmp_path: Path) -> None:
    folder, tensors = models
    own = [mine | {"density": [0.2, 0.8], "epsilon": 0.1} for mine in own_of("della")]
    shared = {"lambda": [{"filter": "mlp", "value": 2.0}, {"value": [1.0, 0.5]}]}
    found = merged(recipe(folder, "della", own, shared), tmp_path / "out")
    at_layer = {"0": (0.2, 1.0), "1": (0.5, 0.75), "2": (0.8, 0.5)}
    for name, value in tensors["base"].items():
        if value.dtype != ml_dtypes.bfloat16:
            continue
        layer = name.split(".")[2] if name.startswith("model.layers.") else "0"
        density, factor = at_layer[layer]
        picked = METHODS["della"]({"lambda": 2.0 if "mlp" in name else factor})
        mine = [{**entry, "density": density} for entry in own]
        inputs = {identity: tensors[identity][name] for identity in EXPERTS}
        wanted = reference_merge(picked, name, value, inputs, mine, DTYPES["BF16"])
        assert found[name][2] == wanted.tobytes(), name


# Each needs another kind of look at a whole tensor, or at the whole model.
DEMANDING: list[tuple[str, dict[str, Any]]] = [
    ("della", {}),
    ("della", {"rank_by": "tensor", "rescale": "l1"}),
    ("della", {"fuse": "calibrated", "lambda_scaling": "tensor"}),
    ("ties", {"scope": "model"}),
    ("breadcrumbs_ties", {"rescale": "l1"}),
    ("linear", {}),
]


# Each two of threads, tile and order of the experts meet once.
COMBINATIONS = [
    (threads, tile, (row + column) % 3)
    for row, threads in enumerate((1, 2, 4))
    for column, tile in enumerate((64, 999, 1 << 17))
]


def without_order(manifest: dict[str, Any]) -> dict[str, Any]:
    """What may not depend on the order in which the experts are listed."""
    inputs = manifest["inputs"]
    sorted_models = sorted(inputs["models"], key=lambda entry: str(entry["identity"]))
    files = {name: entry for name, entry in manifest["files"].items() if name != "README.md"}
    told = {**manifest, "recipe": "", "inputs": {**inputs, "models": sorted_models}, "files": files}
    told.pop("seal")
    return told


@pytest.mark.parametrize(("method", "shared"), DEMANDING, ids=str)
def test_threads_tiles_and_the_order_of_experts_do_not_matter(
    models: Trio, tmp_path: Path, method: str, shared: dict[str, Any]
) -> None:
    folder, _ = models
    own = own_of(method, density=0.4) if shared.get("scope") else own_of(method)
    made = recipe(folder, method, own, shared, base_model=str(folder / "base"))
    hashes: list[dict[str, str]] = []
    manifests = []
    for threads, tile, turn in COMBINATIONS:
        out = tmp_path / f"{threads} {tile} {turn}" / "out"
        listed = {**made, "models": made["models"][turn:] + made["models"][:turn]}
        della.merge(listed, out, threads=threads, tile=tile, shard_bytes=9000, fsync=False)
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
        manifests.append(without_order(json.loads((out / "della.json").read_text())))
        if turn:  # these two hold the text of the recipe
            found |= {name: hashes[0][name] for name in ("README.md", "della.json")}
        hashes.append(found)
    assert len(hashes[0]) > 5
    assert [found for found in hashes if found != hashes[0]] == []
    if method == "linear":  # its template is the first model listed
        for told in manifests:
            told["inputs"].pop("base")
            for entry in told["inputs"]["models"]:  # and what is copied is read from it alone
                entry["tensors"] = {k: v for k, v in entry["tensors"].items() if k not in EXACT}
    assert [told for told in manifests if told != manifests[0]] == []


FLOATS = {name: row.numpy for name, row in DTYPES.items() if row.is_float}


@pytest.mark.parametrize("theirs", FLOATS)
@pytest.mark.parametrize("ours", FLOATS)
def test_every_combination_of_storage_dtypes(tmp_path: Path, ours: str, theirs: str) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, 40))
    tensors = {"base": {"w": base.astype(FLOATS[ours])}} | {
        name: {"w": (base + rng.standard_normal((5, 40)) / 4).astype(FLOATS[theirs])} for name in EXPERTS
    }
    save(tmp_path, tensors)
    own = own_of("della")
    plain = {"plain_fp8": True}
    for out_dtype in (None, *FLOATS):
        for key in ("dtype", "out_dtype") if out_dtype else ("dtype",):
            dtype = {key: out_dtype and DTYPES[out_dtype].torch_name}
            made = recipe(tmp_path, "della", own, {}, **dtype, **plain)
            out = tmp_path / f"{out_dtype} {key}"
            assert merged(made, out, tile=64) == as_stored(expected(tensors, "della", own, {}, out_dtype))
            config = json.loads((out / "config.json").read_text())
            assert config["torch_dtype"] == DTYPES[out_dtype or ours].torch_name
    made = recipe(tmp_path, "linear", own_of("linear"), {}, out_dtype="bfloat16", **plain)
    assert merged(made, tmp_path / "l") == as_stored(
        expected(tensors, "linear", own_of("linear"), {}, "BF16")
    )


def test_float64_is_not_squeezed_through_float32(tmp_path: Path) -> None:
    third = np.array([[1 / 3, 1e-200, 1e300]])
    save(tmp_path, {name: {"w": third * factor} for name, factor in zip(("base", *EXPERTS), (1, 2, 4, 8))})
    own = own_of("task_arithmetic", weight=0.5)
    found = merged(recipe(tmp_path, "task_arithmetic", own, {}), tmp_path / "out")
    assert (
        np.frombuffer(found["w"][2]).tolist() == (third + 0.5 * third + 1.5 * third + 3.5 * third)[0].tolist()
    )


def test_the_recipes_out_dtype_goes_before_its_dtype(models: Trio, tmp_path: Path) -> None:
    folder, tensors = models
    own = own_of("ties")
    made = recipe(folder, "ties", own, {}, dtype="float16", out_dtype="float32")
    assert merged(made, tmp_path / "out") == as_stored(expected(tensors, "ties", own, {}, "F32"))


def test_one_threshold_for_the_whole_model_is_that_of_its_concatenation(models: Trio, tmp_path: Path) -> None:
    folder, tensors = models
    own = own_of("ties", density=0.3)
    made = recipe(folder, "ties", own, {"scope": "model"})
    found = merged(made, tmp_path / "out", tile=700)
    with della.plan(made) as plan:  # equal magnitudes are kept in output order
        names = [job.name for job in plan.jobs if job.dtype.is_float]
    whole = {
        model: np.concatenate([widen(tensors[model][name]).ravel() for name in names]) for model in tensors
    }
    ties = METHODS["ties"]()
    experts = [ties.expert(identity, mine) for identity, mine in zip(EXPERTS, own, strict=True)]
    merged_whole = ties.merge("", whole["base"], [whole[n] for n in EXPERTS], experts)
    wanted = round_to(merged_whole, DTYPES["BF16"])
    assert b"".join(found[name][2] for name in names) == wanted.tobytes()
    assert found != merged(recipe(folder, "ties", own, {}), tmp_path / "other")


MERGEKITS = [name for name in SEVERAL if not name.startswith("paper_")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", MERGEKITS)
def test_compat_follows_mergekits_rules(models: Trio, tmp_path: Path, method: str, dtype: str) -> None:
    folder, tensors = models
    own = own_of(method)
    made = recipe(folder, method, own, {}, dtype=dtype)
    found = merged(made, tmp_path / "out", compat=True)
    merge_dtype = next(row for row in DTYPES.values() if row.torch_name == dtype)
    picked = METHODS[method]({}, merge_dtype)
    experts = [picked.expert(identity, mine) for identity, mine in zip(EXPERTS, own, strict=True)]
    order = sorted(range(3), key=EXPERTS.__getitem__)
    for name, base in tensors["base"].items():
        if base.dtype == ml_dtypes.bfloat16 and base.size:
            wide = [widen(tensors[EXPERTS[k]][name]) for k in order]
            wanted = picked.merge(name, widen(base), wide, [experts[k] for k in order])
            assert found[name] == (merge_dtype.name, base.shape, wanted.tobytes()), name
    assert found == merged({**made, "compat": "mergekit"}, tmp_path / "same")


def test_a_linear_merge_in_compat_rounds_its_inputs_to_the_merge_dtype(tmp_path: Path) -> None:
    values = np.array([[1 + 2.0**-8 + 2.0**-12], [1 + 2.0**-8 + 2.0**-12], [1]], np.float32)
    save(tmp_path, {name: {"w": value} for name, value in zip(EXPERTS, values, strict=True)})
    made = recipe(tmp_path, "linear", [{}] * 3, {}, dtype="bfloat16", out_dtype="float32")
    ours, theirs = merged(made, tmp_path / "ours"), merged(made, tmp_path / "theirs", compat=True)
    assert np.frombuffer(ours["w"][2], np.float32) == (values[0] + values[1] + values[2]) / np.float32(3)
    assert np.frombuffer(theirs["w"][2], np.float32) == 1 + 2.0**-7


def test_linear_needs_no_base_and_one_model_is_enough(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0]], np.float32)
    put(tmp_path, {"a.safetensors": {"w": values}, "b.safetensors": {"w": values * 3}})
    made: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / "a.safetensors")}, {"model": str(tmp_path / "b.safetensors")}],
    }
    found = merged(made, tmp_path / "out.safetensors")
    assert found == as_stored({"w": values * 2})
    alone = merged({**made, "models": made["models"][:1]}, tmp_path / "alone.safetensors")
    assert alone == as_stored({"w": values})


def test_progress_counts_every_byte_and_ends_at_the_total(models: Trio, tmp_path: Path) -> None:
    folder, _ = models
    made = recipe(folder, "della", own_of("della"), {})
    events: list[Progress] = []
    della.merge(made, tmp_path / "out", threads=4, tile=300, fsync=False, progress=events.append)
    with della.plan(made) as plan:
        total, count = plan.bytes_read + plan.bytes_written, len(plan.jobs)
        assert plan.bytes_written == sum(len(raw) for _, _, raw in load(tmp_path / "out").values())
    assert {(event.total, event.of_tensors) for event in events} == {(total, count)}
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert (events[-1].done, events[-1].tensors) == (total, count)
    assert len(events) > 2 * count


def test_a_bar_in_a_script_or_notebook_without_widgets(
    models: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = models
    made = recipe(folder, "della", own_of("della"), {})
    with della.plan(made) as plan:
        total = plan.bytes_read + plan.bytes_written
    for progress in (False, None):
        della.merge(made, tmp_path / "quiet", fsync=False, progress=progress, overwrite=True)
        assert capsys.readouterr() == ("", "")
    result = della.merge(made, tmp_path / "out", fsync=False, progress=True, threads=2)
    out, shown = capsys.readouterr()
    assert out == ""
    *_, last = shown.rstrip("\n").split("\r")
    assert re.match(rf"merging: 100%\|.*\| {total / 1000:.0f}k/{total / 1000:.0f}k \[", last), shown
    quiet = json.loads((tmp_path / "quiet/della.json").read_text())
    assert result.manifest["tensors"] == quiet["tensors"]
    assert della.verify(result.out, sources=0.5, base_dir=folder, progress=True).is_well
    assert "verifying: 100%" in capsys.readouterr().err
    with pytest.raises(della.OutputError):
        della.merge(made, tmp_path / "out", fsync=False, progress=True)
    *_, last, end = capsys.readouterr().err.split("\r")
    assert (last.strip(), end) == ("", ""), "of a merge that was refused nothing stays"


def test_a_bar_of_widgets_in_a_notebook(
    models: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tqdm.auto takes the widget by itself; what it is told is the same: all bytes, once."""
    import tqdm.auto

    told: list[tuple[str, float, float]] = []

    class Widget(tqdm.std.tqdm):  # type: ignore[misc]
        def display(self, *_: Any, **__: Any) -> None:
            told.append((self.desc, self.n, self.total or 0))

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    made = recipe(models[0], "della", own_of("della"), {})
    della.merge(made, tmp_path / "out", fsync=False, progress=True)
    assert told[-1][0].startswith("merging")
    assert told[-1][1] == told[-1][2] > 0


@pytest.mark.parametrize("record_paths", [True, False])
def test_a_recipe_that_was_read_repeats_itself(
    models: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_paths: bool
) -> None:
    """What the manifest calls the recipe is the whole recipe, with every change of the caller in it."""
    folder, _ = models
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe(folder, "della", own_of("della"), {})))
    if not record_paths:
        monkeypatch.chdir(folder)  # where the paths of the manifest start

    def merged(what: Any, name: str, **changes: Any) -> dict[str, Any]:
        out = tmp_path / name / "x"
        found = della.merge(what, out, fsync=False, record_paths=record_paths, **changes).manifest
        if not record_paths:
            del found["files"]["README.md"]  # it shows a recipe as it is written, but for its paths
        return found

    changed = merged(path, "a", seed=7, overrides="lambda=0.5", compat=True)
    assert merged(changed["recipe"], "b") == changed
    assert (changed["seed"], "lambda: 0.5" in changed["recipe"]) == (7, True)
    third = merged(read_recipe(path), "c", seed=7, overrides=["lambda=0.5"], compat=True)
    assert third["tensors"] == changed["tensors"]
    assert merged(third["recipe"], "d") == third
