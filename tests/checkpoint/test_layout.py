"""Folders: which files and tensors they hold, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import COMMIT, ONE, index, put, refusal
from safetensors.numpy import save

from della.checkpoint.pickles import PICKLES
from della.checkpoint.source import open_source
from della.errors import CheckpointError


def shards(tmp_path: Path, **changes: Any) -> Path:
    files: dict[str, Any] = {
        "model.safetensors.index.json": index(a="s1.safetensors", b="s2.safetensors"),
        "s1.safetensors": {"a": np.array([1.0], np.float32)},
        "s2.safetensors": {"b": np.array([2.0], np.float32)},
    }
    return put(tmp_path, {**files, **changes})


def test_shards_with_an_index(tmp_path: Path) -> None:
    with open_source(str(shards(tmp_path))) as source:
        assert [file.name for file in source.files] == ["s1.safetensors", "s2.safetensors"]
        assert {name: view.read().item() for name, view in source.tensors.items()} == {"a": 1.0, "b": 2.0}


def test_diffusers_naming_and_a_subfolder(tmp_path: Path) -> None:
    put(tmp_path / "one", {"diffusion_pytorch_model.safetensors": ONE})
    assert list(open_source(str(tmp_path / "one")).tensors) == ["w"]
    put(
        tmp_path / "two",
        {
            "diffusion_pytorch_model.safetensors.index.json": index(w="sub/x.safetensors"),
            "sub/x.safetensors": ONE,
        },
    )
    assert open_source(str(tmp_path / "two")).parts["w"].file == tmp_path / "two/sub/x.safetensors"


def test_shards_without_an_index(tmp_path: Path) -> None:
    names = [f"x-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    put(tmp_path, {name: {name[4:7]: np.zeros(1)} for name in names})
    assert [file.name for file in open_source(str(tmp_path)).files] == names
    (tmp_path / names[1]).unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected 3 shards, found 2: {names[0]}, {names[2]}; download the missing ones"
    )
    put(tmp_path, {names[1]: {"001": np.zeros(1)}})
    assert refusal(tmp_path) == (
        f"{tmp_path}: tensor '001' stands in {names[0]} and in {names[1]}, "
        "and there is no index to say which one is meant; download the index again"
    )


def test_several_files_that_are_no_shards(tmp_path: Path) -> None:
    put(tmp_path, {"a.safetensors": ONE, "b.safetensors": ONE})
    assert refusal(tmp_path) == (
        f"{tmp_path}: several .safetensors files and no model.safetensors.index.json: "
        "a.safetensors, b.safetensors; name the one file that is meant"
    )


def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    both = {"a": np.array([9.0], np.float32), "b": np.array([2.0], np.float32)}
    with open_source(str(shards(tmp_path, **{"s2.safetensors": both}))) as source:
        assert source.tensors["a"].read().item() == 1.0
    both["a"] = np.array([[9.0]], np.float16)
    assert refusal(shards(tmp_path, **{"s2.safetensors": both})) == (
        f"{tmp_path}: tensor 'a' is F32 [1] in s1.safetensors but F16 [1, 1] in s2.safetensors; "
        "download both again"
    )


def test_all_that_is_wrong_with_shards_is_listed_at_once(tmp_path: Path) -> None:
    folder = shards(
        tmp_path,
        **{
            "model.safetensors.index.json": index(
                a="s1.safetensors",
                b="s2.safetensors",
                c="s3.safetensors",
                d="s1.safetensors",
                e="s4.safetensors",
            ),
            "s2.safetensors": {"b": np.zeros(1), "x": np.zeros(1)},
            "s4.safetensors": save({"e": np.zeros(1)})[:-1],
        },
    )
    assert refusal(folder) == (
        "4 problems:\n"
        f"  - {folder}/s3.safetensors: the index names this file, but it is not there; "
        "download the file again\n"
        f"  - {folder}/s4.safetensors: truncated: expected 72 bytes, found 71; "
        "download the file again\n"
        f"  - {folder}/s1.safetensors: tensor 'd' is missing, which the index expects here; "
        "download both again\n"
        f"  - {folder}/s2.safetensors: tensor 'x' is not in the index; download both again"
    )


def test_a_stale_file_beside_an_index(tmp_path: Path) -> None:
    assert refusal(shards(tmp_path, **{"model.safetensors": ONE})) == (
        f"{tmp_path}: model.safetensors stands beside model.safetensors.index.json, which does not name it; "
        "some programs load one and some the other: move the stale one away"
    )


@pytest.mark.parametrize(
    "entry",
    [
        "../s1.safetensors",
        "/tmp/s1.safetensors",
        "C:s1.safetensors",
        "C:\\s1.safetensors",
        "a\\s1.safetensors",
        "\\\\host\\s1.safetensors",
        "s1\x00.safetensors",
        "",
        "a/../s1.safetensors",
        "./s1.safetensors",
        "a//s1.safetensors",
        "s1.bin",
        "config.json",
    ],
)
def test_an_index_may_not_point_outside(tmp_path: Path, entry: str) -> None:
    folder = shards(tmp_path, **{"model.safetensors.index.json": index(a=entry, b="s2.safetensors")})
    assert refusal(folder) == (
        f"{folder}/model.safetensors.index.json: names {entry!r}, "
        "which is not a .safetensors file of this folder; download the file again"
    )


LONG = "is longer than the name of a file can be; rename it here and in the folder"
ODD = "some systems do not read as a plain file of this folder; rename it here and in the folder"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("CON.safetensors", ODD),
        ("sub/lpt1.x.safetensors", ODD),
        ("sub./s1.safetensors", ODD),
        (".. /s1.safetensors", ODD),
        (" s1.safetensors", ODD),
        ("~/s1.safetensors", ODD),
        ("$HOME/s1.safetensors", ODD),
        ("..%2fs1.safetensors", ODD),
        ("*.safetensors", ODD),
        ("..\uff0fs1.safetensors", ODD),
        ("..\u2215s1.safetensors", ODD),
        ("\u2025/s1.safetensors", ODD),
        ("s1\u202e.safetensors", ODD),
        ("s1\n.safetensors", ODD),
        ("a" * 244 + ".safetensors", LONG),
        ("a/" * 600 + "s1.safetensors", LONG),
    ],
)
def test_an_index_may_not_name_what_some_system_reads_otherwise(tmp_path: Path, entry: str, why: str) -> None:
    folder = shards(tmp_path, **{"model.safetensors.index.json": index(a=entry, b="s2.safetensors")})
    assert refusal(folder) == f"{folder}/model.safetensors.index.json: names {entry[:200]!r}, which {why}"


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.00.safetensors",
        "console.safetensors",
        ".hidden/a b (1).safetensors",
        "模型（1）.safetensors",
        "\u00e9.safetensors",
        "e\u0301.safetensors",
        "a~b+c=d,e[1].safetensors",
        "a" * 243 + ".safetensors",
    ],
)
def test_an_index_may_name_all_other_files(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"model.safetensors.index.json": index(w=name), name: ONE})
    with open_source(str(tmp_path)) as source:
        assert source.tensors["w"].read().tobytes() == ONE["w"].tobytes()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b'{"weight_map":{"a":"s1.safetensors","a":"s2.safetensors"}}',
            "invalid JSON: the key 'a' stands twice",
        ),
        (b"[]", "expected a JSON object, found a list"),
        (b"{}", "expected an object weight_map (tensor -> file), found none"),
        (b'{"weight_map":{"a":1}}', "weight_map must name a file for each tensor"),
        (b'{"weight_map":' + b"[" * 99_999, "JSON is nested too deeply; download the file again"),
    ],
)
def test_a_bad_index(tmp_path: Path, content: bytes, why: str) -> None:
    folder = shards(tmp_path, **{"model.safetensors.index.json": content})
    assert refusal(folder).startswith(f"{folder}/model.safetensors.index.json: {why}")


def test_links_stay_inside(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside", {"m.safetensors": ONE, "config.json": {}, "tokenizer.json": {}})
    folder = put(tmp_path / "model", {"kept.safetensors": ONE})
    (folder / "model.safetensors").symlink_to("kept.safetensors")
    assert list(open_source(str(folder)).tensors) == ["w"]
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        target = outside / name.replace("model.", "m.")
        (folder / name).symlink_to(target)
        expected = f"{folder}/{name}: a link that leaves the folder, to {target}; put the file itself there"
        if name == "tokenizer.json":
            with pytest.raises(CheckpointError) as caught, open_source(str(folder)) as source:
                source.side_files()
            assert str(caught.value) == expected
        else:
            assert refusal(folder) == expected
            (folder / name).unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert refusal(folder).startswith(f"{folder}/model.safetensors: the link cannot be followed (")
    alias = tmp_path / "alias"
    alias.symlink_to(outside)
    assert list(open_source(str(alias)).tensors) == ["w"], "a folder that the user names may be a link"


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    repo = put(tmp_path / "models--o--n", {"blobs/abc.safetensors": ONE})
    put(tmp_path / "models--o--other", {"blobs/abc.safetensors": ONE})
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc.safetensors")
    with open_source(str(snapshot)) as source:
        assert (source.revision, source.tensors["w"].read().tobytes()) == (COMMIT, ONE["w"].tobytes())
        assert source.parts["w"].file == snapshot / "model.safetensors"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--o--other/blobs/abc.safetensors")
    assert "a link that leaves the folder" in refusal(snapshot)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a":1,"a":2}', "invalid JSON: the key 'a' stands twice; download the file again"),
        (b'{"a":NaN}', "invalid JSON: NaN is not JSON; download the file again"),
        (b'{"a":"\xff"}', "text is not UTF-8 ("),
        (b" " * 10_000_001, "10,000,001 bytes, and 10,000,000 is the most"),
    ],
)
def test_config_is_strict(tmp_path: Path, content: bytes, why: str) -> None:
    put(tmp_path, {"model.safetensors": ONE, "config.json": content})
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json: {why}")


def test_config_may_hold_infinity_as_published_ones_do(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": ONE, "config.json": b'{"time_step_limit":[0.0,Infinity],"n":-1}'})
    assert open_source(str(tmp_path)).config == {"time_step_limit": [0.0, float("inf")], "n": -1}


UNQUANTISED = "give the unquantised model that it was made from, and quantise the merge instead"


@pytest.mark.parametrize(
    ("method", "name"),
    [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("fp8", "FP8"), ("new", "new")],
)
def test_quantised_by_its_config(tmp_path: Path, method: str, name: str) -> None:
    put(
        tmp_path, {"model.safetensors": ONE, "config.json": {"quantization_config": {"quant_method": method}}}
    )
    assert refusal(tmp_path) == (
        f"{tmp_path}: a model quantised by {name} (quantization_config in config.json) cannot be merged; "
        f"{UNQUANTISED}. If its tensors are in fact plain, remove quantization_config from config.json"
    )


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        (".qweight", "GPTQ or AWQ"),
        (".qzeros", "GPTQ or AWQ"),
        (".scales", "GPTQ, AWQ or MLX"),
        (".weight.absmax", "bitsandbytes 4-bit"),
        (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        (".SCB", "bitsandbytes 8-bit"),
        (".weight_scale_inv", "FP8"),
    ],
)
def test_quantised_by_its_tensors(tmp_path: Path, suffix: str, name: str) -> None:
    put(tmp_path, {"model.safetensors": {f"l.q{suffix}": np.zeros(1, np.int32)}})
    assert refusal(tmp_path) == (
        f"{tmp_path}: a model quantised by {name} (tensor 'l.q{suffix}') cannot be merged; {UNQUANTISED}"
    )


def test_folders_without_weights(tmp_path: Path) -> None:
    assert refusal(put(tmp_path, {"e/x": {}}) / "e") == (
        f"{tmp_path}/e: no model here: expected model.safetensors or model.safetensors.index.json, found x"
    )
    adapter = put(tmp_path / "a", {"adapter_config.json": {}, "adapter_model.safetensors": ONE})
    assert refusal(adapter) == (
        f"{adapter}: an adapter, not a whole model; adapters come in a later version: "
        "merge it into its base model first (peft: merge_and_unload), and give the result"
    )
    assert refusal(put(tmp_path / "g", {"m.gguf": b""})) == (
        f"{tmp_path}/g: holds only GGUF files; give the safetensors model that they were made from"
    )


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path, {f"pytorch_model{suffix}": b"\x80"}) / f"pytorch_model{suffix}"
    said = refusal(path)
    assert refusal(tmp_path) == said
    assert said.startswith(f"{path}: a pickle, which can run any code when it is loaded, so it is not read; ")
    assert f'python -c "import torch, safetensors.torch as s; d = torch.load({str(path)!r}' in said
    assert "weights_only=True" in said
    assert said.endswith("; or allow it with allow_pickle=True, which needs torch")
