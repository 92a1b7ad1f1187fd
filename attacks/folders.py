"""Rows 3, 4, 5, 13 and 14: shards and their index, links, and a result that would touch its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from attacks import INPUT, OUTPUT, Maker, refused, survived
from attacks.files import (
    CONFIG,
    HEAD,
    INDEX,
    NORM,
    RECIPE_TEXT,
    WEIGHTS,
    file_of,
    good,
    put,
    same_as_undisturbed,
    sharded,
    tensors,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = f"base/{WEIGHTS}"

# ---- row 3: one tensor in two shards ----------------------------------------------------------------------


def twice(folder: Path, copy: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    """The head stands in s1, where the index says, and ``copy`` of it in s2."""
    sharded(folder / "math")
    put(folder / "math/s2.safetensors", file_of({NORM: tensors(1)[NORM], HEAD: copy}))


@survived(3, same_as_undisturbed)
def the_other_copy_is_rubbish(folder: Path) -> None:
    twice(folder, np.full((10, 8), 1e9, np.float32))


@refused(3, INPUT, "FOLDER/math", HEAD, r"F32 \[10, 8\] in s1", r"F32 \[8, 10\] in s2", "again")
def copies_of_two_shapes(folder: Path) -> None:
    twice(folder, np.zeros((8, 10), np.float32))


@refused(3, INPUT, "FOLDER/math", HEAD, r"F32 \[10, 8\] in s1", r"F16 \[10, 8\] in s2", "again")
def copies_of_two_dtypes(folder: Path) -> None:
    twice(folder, np.zeros((10, 8), np.float16))


@refused(3, INPUT, "FOLDER/math", HEAD, "model-00001-of-00002", "model-00002-of-00002", "no index", "again")
def two_copies_and_no_index(folder: Path) -> None:
    twice(folder, np.zeros((10, 8), np.float32))
    (folder / "math" / INDEX).unlink()
    for number in (1, 2):
        (folder / f"math/s{number}.safetensors").rename(
            folder / f"math/model-0000{number}-of-00002.safetensors"
        )


# ---- row 4: ways out of the folder ------------------------------------------------------------------------


def outside(folder: Path, shards: bool = False) -> Path:
    """Weights that would fit, beside the models."""
    put(folder / "outside/secret.safetensors", file_of({NORM: tensors(1)[NORM]} if shards else tensors(1)))
    put(folder / "outside/tokenizer.json", b'{"secret": 1}')
    put(folder / "outside/config.json", CONFIG)
    return folder / "outside/secret.safetensors"


PATHS = {
    "the-folder-above": "../outside/secret.safetensors",
    "up-and-down": "x/../../outside/secret.safetensors",
    "absolute": "/etc/secret.safetensors",
    "another-host": "//host/share/secret.safetensors",
    "drive": "C:\\secret.safetensors",
    "drive-without-a-slash": "C:secret.safetensors",
    "unc": "\\\\host\\share\\secret.safetensors",
    "backslashes": "..\\outside\\secret.safetensors",
    "device-of-windows": "\\\\.\\PhysicalDrive0\\x.safetensors",
    "url": "https://example.com/secret.safetensors",
    "nul": "s2.safetensors\0.safetensors",
    "empty": "",
    "the-folder-itself": ".",
    "a-pickle": "pytorch_model.bin",
}


def index_names(path: str) -> Maker:
    def make(folder: Path) -> None:
        outside(folder, shards=True)
        sharded(folder / "math", **{NORM: path})

    return make


for _name, _path in PATHS.items():
    refused(
        4, INPUT, f"FOLDER/math/{INDEX}", "not a .safetensors file of this folder", name=f"index-{_name}"
    )(index_names(_path))

LINK = "a link that leaves the folder, to FOLDER/outside"


@refused(4, INPUT, f"FOLDER/math/{WEIGHTS}", LINK, "put the file itself there")
def weights_linked(folder: Path) -> None:
    (folder / "math" / WEIGHTS).unlink()
    (folder / "math" / WEIGHTS).symlink_to(outside(folder))


@refused(4, INPUT, f"FOLDER/math/{WEIGHTS}", LINK)
def weights_linked_by_way_of_a_link(folder: Path) -> None:
    outside(folder)
    (folder / "math" / WEIGHTS).unlink()
    (folder / "math" / WEIGHTS).symlink_to("innocent")
    (folder / "math/innocent").symlink_to("../math/../outside/secret.safetensors")


@refused(4, INPUT, "FOLDER/math/s2.safetensors", LINK)
def a_shard_linked(folder: Path) -> None:
    sharded(folder / "math")
    (folder / "math/s2.safetensors").unlink()
    (folder / "math/s2.safetensors").symlink_to(outside(folder, shards=True))


@refused(4, INPUT, "FOLDER/math/sub/secret.safetensors", LINK)
def a_folder_linked(folder: Path) -> None:
    outside(folder, shards=True)
    sharded(folder / "math", **{NORM: "sub/secret.safetensors"})
    (folder / "math/sub").symlink_to(folder / "outside")


@refused(4, INPUT, f"FOLDER/math/{INDEX}", "a link that leaves the folder")
def the_index_linked(folder: Path) -> None:
    sharded(folder / "math")
    (folder / "math" / INDEX).rename(folder / "index.json")
    (folder / "math" / INDEX).symlink_to("../index.json")


@refused(4, INPUT, "FOLDER/base/config.json", LINK)
def the_configuration_linked(folder: Path) -> None:
    outside(folder)
    (folder / "base/config.json").unlink()
    (folder / "base/config.json").symlink_to("../outside/config.json")


@refused(4, INPUT, "FOLDER/base/tokenizer.json", LINK)
def a_side_file_linked(folder: Path) -> None:
    outside(folder)
    (folder / "base/tokenizer.json").symlink_to("../outside/tokenizer.json")


@refused(4, INPUT, "FOLDER/base-of-math/model.safetensors", "a link that leaves the folder")
def a_neighbour_whose_name_begins_alike(folder: Path) -> None:
    (folder / "base-of-math").mkdir()
    (folder / "base-of-math" / WEIGHTS).symlink_to(folder / BASE)
    (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", "./base-of-math"))


@refused(4, INPUT, f"FOLDER/hub/.*{COMMIT}/model.safetensors", "a link that leaves the folder")
def from_one_model_of_the_hub_cache_to_another(folder: Path) -> None:
    put(folder / "hub/models--o--private/blobs/abc", file_of(tensors(1)))
    snapshot = folder / "hub/models--o--public/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / WEIGHTS).symlink_to("../../../models--o--private/blobs/abc")
    reference = f"./hub/models--o--public/snapshots/{COMMIT}"
    (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", reference))


@refused(4, INPUT, f"FOLDER/math/{WEIGHTS}", "link cannot be followed")
def a_link_to_itself(folder: Path) -> None:
    (folder / "math" / WEIGHTS).unlink()
    (folder / "math" / WEIGHTS).symlink_to(WEIGHTS)


@refused(4, INPUT, f"FOLDER/math/{WEIGHTS}", "a link that leaves the folder, to /dev/zero")
def a_device(folder: Path) -> None:
    (folder / "math" / WEIGHTS).unlink()
    (folder / "math" / WEIGHTS).symlink_to("/dev/zero")


@refused(4, INPUT, "/dev/zero", "not a model", "expected a folder or a .safetensors file")
def a_device_as_a_model(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", "/dev/zero"))


def pipe_at(name: str) -> Maker:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


for _name in (f"math/{WEIGHTS}", f"math/{INDEX}", "math/config.json", "base/tokenizer.json"):
    refused(
        4, INPUT, f"FOLDER/{_name}", "not a regular file", "again|itself",
        name=f"a-pipe-at-{_name.replace('/', '-')}",
    )(pipe_at(_name))  # fmt: skip


@refused(4, INPUT, "FOLDER/pipe.safetensors", "not a regular file")
def a_pipe_as_a_model(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", "./pipe.safetensors"))


# ---- row 5: an index that is wrong ------------------------------------------------------------------------


@refused(5, INPUT, "FOLDER/math/s3.safetensors", "the index names this file, but it is not there", "again")
def a_shard_missing(folder: Path) -> None:
    sharded(folder / "math", more="s3.safetensors")


@refused(5, INPUT, "FOLDER/math/s1.safetensors", "tensor 'more' is missing", "again")
def a_tensor_missing(folder: Path) -> None:
    sharded(folder / "math", more="s1.safetensors")


@refused(5, INPUT, "FOLDER/math/s2.safetensors", "tensor 'more' is not in the index", "again")
def a_tensor_more(folder: Path) -> None:
    sharded(folder / "math")
    put(folder / "math/s2.safetensors", file_of({NORM: tensors(1)[NORM], "more": np.zeros(1)}))


@refused(5, INPUT, "4 problems", "s3.safetensors", "s4.safetensors", "'more'", "'less'")
def everything_at_once(folder: Path) -> None:
    sharded(folder / "math", a="s3.safetensors", b="s4.safetensors", less="s1.safetensors")
    put(folder / "math/s2.safetensors", file_of({NORM: tensors(1)[NORM], "more": np.zeros(1)}))


@refused(5, INPUT, f"FOLDER/math: {WEIGHTS} stands beside {INDEX}", "move the stale one away")
def an_old_file_beside_the_index(folder: Path) -> None:
    sharded(folder / "math")
    put(folder / "math" / WEIGHTS, file_of(tensors(2)))


@refused(5, INPUT, "FOLDER/math: expected 3 shards, found 2", "download the missing ones")
def no_index_and_a_number_missing(folder: Path) -> None:
    sharded(folder / "math")
    (folder / "math" / INDEX).unlink()
    for old, new in ((1, 1), (2, 3)):
        (folder / f"math/s{old}.safetensors").rename(folder / f"math/model-0000{new}-of-00003.safetensors")


def index_is(value: object) -> Maker:
    def make(folder: Path) -> None:
        sharded(folder / "math")
        put(folder / "math" / INDEX, value)

    return make


INDEXES: dict[str, tuple[object, str]] = {
    "nothing": (b"", "invalid JSON"),
    "a-list": ([], "expected a JSON object"),
    "no-map": ({"metadata": {}}, "expected an object weight_map"),
    "an-empty-map": ({"weight_map": {}}, "expected an object weight_map"),
    "numbers": ({"weight_map": {NORM: 1}}, "must name a file for each tensor"),
    "a-tensor-twice": (b'{"weight_map":{"a":"s1.safetensors","a":"s2.safetensors"}}', "stands twice"),
    "a-million-brackets": (b'{"weight_map":' + b"[" * 1_000_000, "nested too deeply"),
}
for _name, (_value, _says) in INDEXES.items():
    refused(5, INPUT, f"FOLDER/math/{INDEX}", _says, "again", name=f"index-{_name}")(index_is(_value))


# ---- row 13: OUT is there already -------------------------------------------------------------------------


@refused(13, OUTPUT, "FOLDER/out", "exists already", "to be replaced: .*overwrite")
def an_older_model_there(folder: Path) -> None:
    good(folder / "old")
    (folder / "old/base").rename(folder / "out")


@refused(13, OUTPUT, "FOLDER/out", "not a model", "thesis.tex", "choose another place", overwrite=True)
def something_dear_there(folder: Path) -> None:
    put(folder / "out/thesis.tex", b"years of work")
    put(folder / "out" / WEIGHTS, file_of(tensors(0)))


# ---- row 14: OUT touches an input -------------------------------------------------------------------------


def touches(out: str, *says: str) -> Callable[[Maker], Maker]:
    return refused(
        14, OUTPUT, *(says or ("touches the input", "choose another place")), out=out, overwrite=True
    )


@touches("base")
def the_base_itself(folder: Path) -> None:
    pass


@touches("code/merged")
def in_an_expert(folder: Path) -> None:
    pass


@touches("base/out.safetensors")
def a_file_in_the_base(folder: Path) -> None:
    pass


@touches(BASE)
def the_file_of_the_base(folder: Path) -> None:
    pass


@touches(".", "touches the input|not replaced", "choose another place")
def the_folder_above(folder: Path) -> None:
    pass


@touches("alias/out")
def in_the_base_through_a_link(folder: Path) -> None:
    (folder / "alias").symlink_to("base")


@touches("alias", "touches the input|a link", "choose|name the place")
def a_link_to_the_base(folder: Path) -> None:
    (folder / "alias").symlink_to("base")


@touches("alias.safetensors")
def another_name_of_the_same_file(folder: Path) -> None:
    os.link(folder / BASE, folder / "alias.safetensors")


@touches("store/base")
def what_the_base_is_a_link_to(folder: Path) -> None:
    (folder / "store").mkdir()
    (folder / "base").rename(folder / "store/base")
    (folder / "base").symlink_to("store/base")


@touches("hub/models--o--m/blobs")
def the_blobs_of_the_hub_cache(folder: Path) -> None:
    blobs = folder / "hub/models--o--m/blobs"
    put(blobs / "abc.safetensors", file_of(tensors(1)))
    snapshot = folder / "hub/models--o--m/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / WEIGHTS).symlink_to("../../blobs/abc.safetensors")
    reference = f"./hub/models--o--m/snapshots/{COMMIT}"
    (folder / "recipe.yml").write_text(RECIPE_TEXT.replace("./math", reference))
