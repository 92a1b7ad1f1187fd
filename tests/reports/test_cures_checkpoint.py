"""What messages on the files of a model advise is done as a user would, and the model is merged, or refused
for what else is wrong with it."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import index, put
from cures import cures
from safetensors.numpy import load_file, save

import della
from della.checkpoint.header import build_header
from della.checkpoint.pickles import pickle_refusal
from della.checkpoint.source import fetch, open_source
from della.errors import CheckpointError, DellaError

Tensors = dict[str, Any]
BASE: Tensors = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.ones(4, np.float32)}
ONE: Tensors = {name: array + 2 for name, array in BASE.items()}
RECIPE = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: %s}]\n"
GOOD = save(ONE)
W, V = ({name: ONE[name]} for name in ("w", "v"))
SHARDS = {
    "model-00001-of-00002.safetensors": W,
    "model-00002-of-00002.safetensors": V,
    "model.safetensors.index.json": index(
        w="model-00001-of-00002.safetensors", v="model-00002-of-00002.safetensors"
    ),
}
FIRST, SECOND, INDEX = SHARDS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": ONE})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(model: str = "one", **options: Any) -> None:
    """The merge, which must come out right."""
    Path("recipe.yml").write_text(RECIPE % json.dumps(model))
    della.merge("recipe.yml", "out", fsync=False, overwrite=True, **options)
    found = load_file("out/model.safetensors")
    for name in BASE:
        assert np.array_equal(found[name], ONE[name]), name


def refused(advice: str, model: str = "one", **options: Any) -> str:
    Path("recipe.yml").write_text(RECIPE % json.dumps(model))
    with pytest.raises(DellaError) as caught:
        della.merge("recipe.yml", "out", fsync=False, **options)
    told = " | ".join(problem.fix or "" for problem in caught.value.problems)
    assert advice in told, str(caught.value)
    return told


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


HOLE = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'

AGAIN: dict[str, tuple[str, bytes]] = {
    "checkpoint/header.py:header_length": ("model.safetensors", b"abc"),
    "checkpoint/header.py:header_length ": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "checkpoint/header.py:header_length  ": ("model.safetensors", b"\xff" * 64),
    "checkpoint/header.py:header_length   ": ("model.safetensors", GOOD[:20]),
    "checkpoint/header.py:parse_header": ("model.safetensors", header(b"[]")),
    "checkpoint/header.py:_metadata": ("model.safetensors", header(b'{"__metadata__": 3}')),
    "checkpoint/header.py:_metadata ": ("model.safetensors", header(b'{"__metadata__": {"a": 3}}')),
    "checkpoint/header.py:_check_layout": ("model.safetensors", header(HOLE, bytes(8))),
    "checkpoint/header.py:_check_layout ": ("model.safetensors", GOOD + b"x"),
    "checkpoint/strict.py:json_object": ("config.json", b"[]"),
    "checkpoint/strict.py:json_value": ("config.json", b"\xff{}"),
    "checkpoint/strict.py:json_value ": ("config.json", b"[" * 100_000),
    "checkpoint/strict.py:json_value  ": ("config.json", b"{"),
    "checkpoint/layout.py:check_small": ("config.json", b" " * (1 << 25)),
}  # fmt: skip


@cures("checkpoint/header.py:header_length", "checkpoint/header.py:header_length")
@cures(
    "checkpoint/header.py:header_length",
    "checkpoint/header.py:_metadata",
    "checkpoint/header.py:_check_layout",
)
@cures("checkpoint/strict.py:json_value", "checkpoint/strict.py:json_value")
@pytest.mark.parametrize("key", AGAIN)
def test_downloaded_again(key: str) -> None:
    """A file that is damaged, and then as it was."""
    name, content = AGAIN[key]
    put(Path("one"), {name: content})
    refused("download the file again")
    put(Path("one"), {name: GOOD if name.endswith("safetensors") else b"{}"})
    merge()


SHARDED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "checkpoint/layout.py:_read_index": ({INDEX: {}}, "download the file again", {INDEX: SHARDS[INDEX]}),
    "checkpoint/layout.py:_read_index ": (
        {INDEX: {"weight_map": {"w": 3}}}, "download the file again", {INDEX: SHARDS[INDEX]}
    ),
    "checkpoint/layout.py:_assemble": (
        {SECOND: None}, "download the file again", {SECOND: V}
    ),
    "checkpoint/layout.py:_homes": (
        {SECOND: V | W, INDEX: None}, "download the index again", {INDEX: SHARDS[INDEX]}
    ),
    "checkpoint/layout.py:_against": ({FIRST: {}}, "download both again", SHARDS),
    "checkpoint/layout.py:_against ": ({FIRST: W | {"x": W["w"]}}, "download both again", SHARDS),
    "checkpoint/layout.py:_against  ": ({FIRST: W | {"v": W["w"]}}, "download both again", SHARDS),
    "checkpoint/layout.py:weight_files": (
        {"model.safetensors": W}, "move the stale one away", {"model.safetensors": None}
    ),
    "checkpoint/layout.py:weight_files ": ({INDEX: None, SECOND: None}, "download the missing ones", SHARDS),
}  # fmt: skip


@cures("checkpoint/layout.py:_read_index", "checkpoint/layout.py:_against", "checkpoint/layout.py:_against")
@cures("checkpoint/layout.py:weight_files")
@pytest.mark.parametrize("key", SHARDED)
def test_shards(key: str) -> None:
    broken, advice, cure = SHARDED[key]
    put_all({"model.safetensors": None} | SHARDS | broken)
    refused(advice)
    put_all(cure)
    merge()


def put_all(files: dict[str, Any]) -> None:
    for name, content in files.items():
        (Path("one") / name).unlink(missing_ok=True)
        if content is not None:
            put(Path("one"), {name: content})


@cures("checkpoint/layout.py:weight_files", "checkpoint/layout.py:_why_no_weights")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_one_file_that_is_meant(suffix: str) -> None:
    put_all({"model.safetensors": None})
    names = [f"a{suffix}", f"b{suffix}"]
    for name in names:
        if suffix == ".bin":
            torch = pytest.importorskip("torch")
            torch.save({k: torch.from_numpy(a) for k, a in ONE.items()}, Path("one") / name)
        else:
            put(Path("one"), {name: ONE})
    refused("name the one file", allow_pickle=True)
    merge(f"one/{names[0]}", allow_pickle=True)


@cures("checkpoint/layout.py:_why_no_weights", "checkpoint/layout.py:_why_no_weights")
@pytest.mark.parametrize("kind", ["adapter", "gguf"])
def test_no_model_of_its_own(kind: str) -> None:
    put_all({"model.safetensors": None})
    put_all({"m.gguf": b"GGUF"} if kind == "gguf" else {"adapter_config.json": {"peft_type": "LORA"}})
    refused("safetensors model that they were made from" if kind == "gguf" else "merge_and_unload")
    put(Path("merged"), {"model.safetensors": ONE})
    merge("merged")


@cures("checkpoint/adapters.py:factors")
def test_factors() -> None:
    put(Path("one"), {"model.safetensors": {f"w.lora_{k}.weight": np.ones((2, 4), np.float32) for k in "AB"}})
    refused("give the result")
    put(Path("one"), {"model.safetensors": ONE})
    merge()


@cures("checkpoint/layout.py:confined", "checkpoint/layout.py:confined")
@pytest.mark.parametrize("link", ["../elsewhere", "model.safetensors"])
def test_a_link_that_leads_away(link: str) -> None:
    path = Path("one/model.safetensors")
    path.rename("elsewhere")
    path.symlink_to(link)
    refused("put the file itself there")
    path.unlink()
    shutil.copy("elsewhere", path)
    merge()


@cures("checkpoint/pickles.py:pickle_refusal")
@pytest.mark.parametrize("place", ["one", 'it\'s "one" $HOME `x`', "one two"])
def test_a_pickle_is_converted(place: str, folder: Path) -> None:
    """The command is run as a shell would read it; tied, transposed and encoder models too, and shards."""
    torch = pytest.importorskip("torch")
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "model.safetensors").unlink(missing_ok=True)
    tensors = {"w": torch.from_numpy(ONE["w"].T.copy()).T, "v": torch.from_numpy(ONE["v"])}
    for k, name in enumerate("wv", 1):
        torch.save({name: tensors[name]}, folder / place / f"pytorch_model-0000{k}-of-00002.bin")
    told = refused("each such file", place)
    words = shlex.split(told[told.index("python -c") : told.rindex("; or allow")])
    assert words[:2] == ["python", "-c"]
    for k in (1, 2):
        exec(words[2].replace("-00001-", f"-0000{k}-"), {})
    merge(place)
    assert "--allow-pickle" not in told, "this is Python"


@cures(
    "checkpoint/pickles.py:_state_dict",
    "checkpoint/pickles.py:_state_dict",
    "checkpoint/pickles.py:_state_dict",
)
@cures("checkpoint/pickles.py:_state_dict", "checkpoint/pickles.py:_load")
@pytest.mark.parametrize("kind", ["training", "object", "entry", "sparse", "more"])
def test_what_a_pickle_must_be(kind: str) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in ONE.items()}
    what, advice = {
        "training": ({"state_dict": state, "epoch": 3}, "save that alone"),
        "object": ([1], "a state dict is needed"),
        "entry": (state | {"epoch": 3}, "a state dict is needed"),
        "sparse": (state | {"w": state["w"].to_sparse()}, "a plain, dense tensor"),
        "more": ({"state": os.system}, "Save its state dict alone"),
    }[kind]
    put_all({"model.safetensors": None})
    file = Path("one/pytorch_model.bin")
    torch.save(what, file)
    told = refused(advice, allow_pickle=True)
    if kind == "training":
        program = told[told.index("torch.save(") :].split(" | ")[0]
        exec(
            program.replace("'FILE'", f"{str(file)!r}").replace("'pytorch", "'one/pytorch"), {"torch": torch}
        )
    else:
        torch.save(state, file)
    merge(allow_pickle=True)


@cures("checkpoint/quantised.py:refuse_quantised_config", "checkpoint/quantised.py:refuse_quantised_config")
@cures("checkpoint/quantised.py:codes", "checkpoint/quantised.py:_codes")
@pytest.mark.parametrize("kind", ["config", "codes", "scale"])
def test_a_quantised_model(kind: str) -> None:
    """Without quantization_config plain tensors are merged, and codes are refused as what they are."""
    tensors: Tensors = ONE
    if kind != "config":
        tensors = {"w": ONE["w"].astype(np.int8), "v": ONE["v"], "w_scale": np.ones(3, np.float32)}
    if kind == "scale":
        tensors["w"] = ONE["w"].astype(ml_dtypes.float8_e4m3fn)
    put(Path("one"), {"model.safetensors": tensors, "config.json": {"quantization_config": {"bits": 4}}})
    refused("remove quantization_config from config.json")
    put(Path("one"), {"config.json": {}})
    if kind != "config":
        refused("the unquantised model")
        put(Path("one"), {"model.safetensors": ONE})
    merge()


REFERENCES: dict[str, tuple[str, str, Callable[[], object], str]] = {
    "checkpoint/source.py:_not_found": ("C:\\models\\one", "write it with /", lambda: None, "./one"),
    "checkpoint/source.py:_not_found ": ("oen", "did you mean 'one'", lambda: None, "one"),
    "checkpoint/source.py:_not_found  ": ("gpt9", "owner/name", lambda: None, "./one"),
    "checkpoint/source.py:open_source": ("./oen/x/y", "", lambda: None, "one"),
    "checkpoint/source.py:_snapshot": (
        "models--o--n", "name one of its snapshots", lambda: None, f"models--o--n/snapshots/{'a' * 40}"
    ),
}  # fmt: skip


@cures("checkpoint/source.py:_not_found", "checkpoint/source.py:_not_found")
@pytest.mark.parametrize("key", REFERENCES)
def test_how_a_model_is_named(key: str) -> None:
    given, advice, cure, then = REFERENCES[key]
    for commit in "ab":
        put(Path("models--o--n/snapshots") / (commit * 40), {"model.safetensors": ONE})
    refused(advice, given)
    cure()
    merge(then)


@cures("checkpoint/source.py:_not_found")
def test_an_adapter_on_its_base(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="merge the adapter into its base first"):
        open_source("one+two")
    (folder / "one").rename("one+two")
    merge("one+two")


@cures("checkpoint/source.py:open_file", "checkpoint/norms.py:misfits")
def test_a_file_of_norms_is_named(folder: Path) -> None:
    put(
        folder,
        {
            "norms.safetensors": {"w": np.ones(4, np.float32)},
            "off.safetensors": {"ww": np.ones(4, np.float32)},
        },
    )
    entry = {"model": "one", "input_norms": "norm.safetensors", "parameters": {"density": 1, "epsilon": 0}}
    recipe: Tensors = {"merge_method": "della", "base_model": "base", "models": [entry]}
    recipe["parameters"] = {"importance": "wanda"}
    for wrong, advice in (("norm", "did you mean 'norms.safetensors'"), ("off", "did you mean 'w'")):
        entry["input_norms"] = f"{wrong}.safetensors"
        with pytest.raises(CheckpointError, match=advice):
            della.plan(recipe)
    entry["input_norms"] = "norms.safetensors"
    della.merge(recipe, "out", fsync=False)
    assert np.array_equal(load_file("out/model.safetensors")["w"], ONE["w"])


@cures("checkpoint/weights.py:_open_unchanged", "checkpoint/weights.py:_open_unchanged")
@pytest.mark.parametrize("change", ["gone", "longer"])
def test_weights_that_change_after_they_were_opened(change: str) -> None:
    path = Path("one/model.safetensors")
    with open_source("one") as source:
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(GOOD + b"more")
        with pytest.raises(CheckpointError, match="moved" if change == "gone" else "start again"):
            source.tensors["w"].read()
    path.write_bytes(GOOD)
    merge()


@cures("checkpoint/header.py:build_header")
def test_a_header_of_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("della.checkpoint.header.MOST_HEADER_BYTES", 130)
    from della.dtypes import DTYPES

    many = [(f"tensor{k}", DTYPES["F32"], (1,)) for k in range(3)]
    with pytest.raises(DellaError, match="smaller shards"):
        build_header(many)
    build_header(many[:1])


@cures("checkpoint/source.py:fetch")
def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install huggingface_hub$"):
        fetch("owner/name", None, weights=True)


@cures("checkpoint/pickles.py:read_pickle", "checkpoint/pickles.py:_load", "checkpoint/pickles.py:_records")
@cures("checkpoint/pickles.py:read_pickle", "checkpoint/pickles.py:_mapped_at")
@cures("checkpoint/pickles.py:pickle_refusal")
@pytest.mark.parametrize("damage", ["cut", "text", "packed", "order"])
def test_a_damaged_pickle_is_downloaded_again(damage: str, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    put_all({"model.safetensors": None})
    file = Path("one/pytorch_model.bin")
    torch.save({name: torch.from_numpy(array) for name, array in ONE.items()}, file)
    whole = file.read_bytes()
    if damage in ("cut", "text"):
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no pickle")
    else:
        packing = zipfile.ZIP_DEFLATED if damage == "packed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", packing) as new:
            for name in old.namelist():
                new.writestr(
                    name, old.read(name).replace(b"little", b"little" if damage == "packed" else b"big")
                )
    advice = {"cut": "download it again", "order": "give the model as safetensors"}
    refused(advice.get(damage, "download the file again"), allow_pickle=True)
    if damage == "order":
        file.unlink()
        put(folder, {"one/model.safetensors": ONE})
        merge()
        return
    file.write_bytes(whole)
    on_hub = pickle_refusal(file, on_hub=True).fix or ""
    assert on_hub.startswith("download the folder yourself, give that, and allow it with allow_pickle=True")
    merge(allow_pickle=True)


@cures("checkpoint/sides.py:checked_side_files")
def test_a_side_file_is_renamed(folder: Path) -> None:
    put(folder, {"base/a:b.tiktoken": b"x"})
    refused("rename it")
    (folder / "base/a:b.tiktoken").rename(folder / "base/ab.tiktoken")
    merge()
    assert Path("out/ab.tiktoken").read_bytes() == b"x"


@cures("checkpoint/norms.py:checked")
def test_norms_are_calibrated_again(folder: Path) -> None:
    entry = {"model": "one", "input_norms": "n.safetensors", "parameters": {"density": 1, "epsilon": 0}}
    recipe: Tensors = {"merge_method": "della", "base_model": "base", "models": [entry]}
    recipe["parameters"] = {"importance": "wanda"}
    put(folder, {"n.safetensors": {"w": np.full(4, np.nan, np.float32)}})
    with pytest.raises(CheckpointError, match="calibrate again"):
        della.merge(recipe, "out", fsync=False)
    put(folder, {"n.safetensors": {"w": np.ones(4, np.float32)}})
    della.merge(recipe, "out", fsync=False)
    assert np.array_equal(load_file("out/model.safetensors")["w"], ONE["w"])
