"""The staged output: the right bytes, all of them on the disk, and told in plain words when they are not."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoints import PLAN, RNG, TENSORS, numbers, save_model, tree

from della.checkpoint.source import open_source
from della.dtypes import DTYPES
from della.errors import OutputError
from della.output import disk
from della.output.shards import plan_shards
from della.output.writer import StagedOutput


def write_all(output: StagedOutput, tensors: dict[str, Any] = TENSORS) -> None:
    for name, array in tensors.items():
        output.write(name, 0, array.tobytes())


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_shards_are_filled_in_order() -> None:
    sizes = [4, 4, 8, 20, 1, 1, 0, 9]
    plan = [(str(n), DTYPES["U8"], (size,)) for n, size in enumerate(sizes)]
    assert plan_shards(plan, 8) == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert plan_shards(plan, 1000) == [list(range(8))]
    assert plan_shards([("x", DTYPES["F32"], (3, 5)), ("y", DTYPES["F16"], ())], 61) == [[0], [1]]
    assert plan_shards([], 8) == [[]]


def test_one_file_is_read_back_by_the_official_package(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", PLAN, metadata={"format": "pt", "by": "della"}) as output:
        write_all(output)
        output.add_file("config.json", b"{}")
        assert not (tmp_path / "out").exists()
        output.commit()
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    path = tmp_path / "out/model.safetensors"
    assert path.stat().st_size == output.nbytes
    raw = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    assert {name: bytes(info["data"]) for name, info in raw.items()} == {
        name: array.tobytes() for name, array in TENSORS.items()
    }
    assert {name: (info["dtype"], tuple(info["shape"])) for name, info in raw.items()} == {
        name: (dtype.name, shape) for name, dtype, shape in PLAN
    }
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "by": "della"}
        assert file.get_tensor("a.weight").tobytes() == TENSORS["a.weight"].tobytes()
    with open_source(str(tmp_path / "out")) as source:
        for name, array in TENSORS.items():
            assert source.tensors[name].read().tobytes() == array.tobytes()
            assert source.parts[name].offset % max(1, array.dtype.itemsize) == 0, "every tensor is aligned"


def test_shards_and_their_index(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", PLAN, shard_bytes=80, stem="m") as output:
        write_all(output)
        output.commit()
    names = ["m-00001-of-00003.safetensors", "m-00002-of-00003.safetensors", "m-00003-of-00003.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "m.safetensors.index.json"]
    assert json.loads((tmp_path / "out/m.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": sum(array.nbytes for array in TENSORS.values())},
        "weight_map": dict(
            zip(TENSORS, [names[0], names[0], names[1], names[1], names[2], names[2]], strict=True)
        ),
    }
    (tmp_path / "out/m.safetensors.index.json").rename(tmp_path / "out/model.safetensors.index.json")
    with open_source(str(tmp_path / "out")) as source:
        assert {name: source.tensors[name].read().tobytes() for name in TENSORS} == {
            name: array.tobytes() for name, array in TENSORS.items()
        }


def test_threads_write_parts_in_any_order(tmp_path: Path) -> None:
    plan = [(f"t{n}", DTYPES["U8"], (100_000,)) for n in range(4)]
    arrays = {name: RNG.integers(0, 256, 100_000, dtype=np.uint8) for name, _, _ in plan}
    parts = [(name, start) for name in arrays for start in range(0, 100_000, 7_000)]
    with StagedOutput(tmp_path / "out", plan, shard_bytes=150_000, fsync=False) as output:

        def work(mine: list[tuple[str, int]]) -> None:
            for name, start in mine:
                output.write(name, start, arrays[name][start : start + 7_000].data)

        threads = [threading.Thread(target=work, args=(parts[::-1][n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        output.commit()
    with open_source(str(tmp_path / "out")) as source:
        assert all(np.array_equal(source.tensors[name].read(), array) for name, array in arrays.items())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: whole(fd, content[:7], at))
    with StagedOutput(tmp_path / "out", PLAN) as output:
        write_all(output)
        output.commit()
    with open_source(str(tmp_path / "out")) as source:
        assert all(
            source.tensors[name].read().tobytes() == array.tobytes() for name, array in TENSORS.items()
        )


def test_a_part_outside_its_tensor_is_a_defect(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", PLAN) as output:
        for start, count in ((60, 11), (-1, 1), (71, 0)):
            with pytest.raises(ValueError, match=r"^bytes .* of a\.weight: it has 70$"):
                output.write("a.weight", start, bytes(count))
        with pytest.raises(KeyError):
            output.write("absent", 0, b"")


def test_an_incomplete_model_is_not_committed(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", PLAN[:2]) as output:
        output.write("a.weight", 10, bytes(50))
        with pytest.raises(OutputError) as caught:
            output.commit()
    assert str(caught.value) == (
        "2 problems:\n"
        f"  - {tmp_path}/out: not complete: tensor 'b.scalar': 8 bytes were not written\n"
        f"  - {tmp_path}/out: not complete: tensor 'a.weight': 20 bytes were not written"
    )
    assert os.listdir(tmp_path) == []


def test_side_files(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", []) as output:
        output.add_file("tokenizer.json", b"{1}")
        output.add_file("1_Pooling/deeper/config.json", b"{2}")
        for name in (
            "",
            ".",
            "..",
            "../x",
            "/x",
            "a/../b",
            "a//b",
            "a/",
            "a/.",
            "model.safetensors/b",
            "a\\b",
            "C:x",
            "x\0",
            "model.safetensors",
            "model.safetensors.index.json",
        ):
            with pytest.raises(OutputError) as caught:
                output.add_file(name, b"")
            assert str(caught.value) == (
                f"{tmp_path}/out: {name!r} cannot be the name of a side file; a plain name is needed"
            )
        with pytest.raises(OutputError) as caught:
            output.add_file("tokenizer.json", b"")
        folder = tmp_path / ".out.della-staging/model/tokenizer.json"
        assert str(caught.value) == f"{folder}: exists already; choose another place"
        output.commit()
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json": 0o644,
        "model.safetensors": 0o644,
        "1_Pooling": 0o755,
    }
    assert (tmp_path / "out/1_Pooling/deeper/config.json").read_bytes() == b"{2}"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{1}"


def test_everything_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(
        disk, "sync", lambda fd: events.append(os.path.basename(os.path.realpath(f"/proc/self/fd/{fd}")))
    )
    real = disk.move_in

    def move_in(staged: Path, out: Path, replace: bool, aside: Path) -> None:
        events.append("rename")
        real(staged, out, replace, aside)

    monkeypatch.setattr(disk, "move_in", move_in)
    with StagedOutput(tmp_path / "deep/er/out", PLAN, shard_bytes=80) as output:
        assert events == [tmp_path.name, "deep"]
        write_all(output)
        output.add_file("config.json", b"{}")
        output.commit()
    shards = [shard.name for shard in output.shards]
    files = ["config.json", "model.safetensors.index.json", *shards]
    assert sorted(events[2:-3]) == sorted(files)
    assert events[-3:] == ["model", "rename", "er"]


def failing(code: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "the disk is full; free some space, or write to another disk"),
        (errno.EIO, "the disk reports an error; check it, and write to another one"),
        (errno.EACCES, "permission denied; choose a place that you may write to"),
        (errno.EROFS, "the file system is read-only; choose a place that you may write to"),
        (errno.EFBIG, "cannot be written (File too large)"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
def test_errors_of_the_disk_name_the_file_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, why: str
) -> None:
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(OutputError) as caught:
        save_model(tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}/.out.della-staging/model/model.safetensors: {why}"
    assert os.listdir(tmp_path) == []


def test_where_blocks_cannot_be_reserved_the_size_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    assert numbers(save_model(tmp_path / "out", 5.0)) == [5.0, 5.0]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    old = tree(save_model(tmp_path / "old", 1.0))
    for name, overwrite in (("new", False), ("old", "any")):
        with suppress(KeyboardInterrupt), StagedOutput(tmp_path / name, PLAN, overwrite=overwrite) as output:
            write_all(output)
            assert len(os.listdir(tmp_path)) == 2
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == ["old"]
    with StagedOutput(tmp_path / "new", PLAN):
        pass
    assert os.listdir(tmp_path) == ["old"]
    assert tree(tmp_path / "old") == old
    assert not [
        fd for fd in os.listdir("/proc/self/fd") if "staging" in os.path.realpath(f"/proc/self/fd/{fd}")
    ]
