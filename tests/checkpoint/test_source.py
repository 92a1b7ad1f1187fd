"""References and reading: what is found where, and that the right bytes arrive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from checkpoints import ONE, put, refusal

from della.checkpoint.source import Source, open_source
from della.errors import CheckpointError


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    tensors = {
        "bf": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
        "f8": np.array([0.5, 448.0], ml_dtypes.float8_e4m3fn),
        "long": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
        "yes": np.array([True, False]),
    }
    put(tmp_path, {"model.safetensors": tensors, "config.json": {"a": 1}})
    raw = (tmp_path / "model.safetensors").read_bytes()
    with open_source(str(tmp_path)) as source:
        assert (source.folder, source.path, source.reference) == (tmp_path, tmp_path, str(tmp_path))
        assert (source.config, source.revision) == ({"a": 1}, None)
        (file,) = source.files
        start = 8 + int.from_bytes(raw[:8], "little")
        digest = xxhash.xxh3_128(len(raw).to_bytes(8, "little") + raw[:start]).hexdigest()
        path = tmp_path / "model.safetensors"
        assert (file.name, file.path, file.size, file.fingerprint) == (path.name, path, len(raw), digest)
        assert set(source.tensors) == set(tensors)
        for name, expected in tensors.items():
            tensor, got = source.parts[name], source.tensors[name].read()
            assert (
                (got.dtype, got.shape)
                == (expected.dtype, expected.shape)
                == (tensor.dtype.numpy, tensor.shape)
            )
            assert got.tobytes() == expected.tobytes() == raw[tensor.offset : tensor.offset + tensor.nbytes]
        offsets = [tensor.offset for tensor in source.parts.values()]
        assert offsets == sorted(offsets)


def test_parts_of_a_tensor_go_into_the_callers_buffer(tmp_path: Path) -> None:
    put(tmp_path, {"m.safetensors": {"w": np.arange(100, dtype=np.uint8)}})
    with open_source(str(tmp_path / "m.safetensors")) as source:
        assert (source.path, source.folder) == (tmp_path / "m.safetensors", tmp_path)
        tensor = source.tensors["w"]
        buffer = np.zeros(16, np.uint8)
        tensor.read_into(10, buffer)
        assert buffer.tobytes() == bytes(range(10, 26))
        tensor.read_into(100, buffer[:0])
        for start, count in ((93, 8), (-1, 4), (101, 0)):
            with pytest.raises(ValueError, match=r"^bytes .* of w: 100$"):
                tensor.read_into(start, np.zeros(count, np.uint8))


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"model.safetensors": {"w": np.arange(100, dtype=np.uint8)}})
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: whole(fd, [parts[0][:7]], at))
    with open_source(str(tmp_path)) as source:
        assert source.tensors["w"].read().tobytes() == bytes(range(100))


def test_many_threads_share_one_source(tmp_path: Path) -> None:
    tensors = {f"t{n}": np.full(50_000, n, np.int32) for n in range(8)}
    put(tmp_path, {"model.safetensors": tensors})
    with open_source(str(tmp_path)) as source:
        sums: dict[str, int] = {}

        def read_all(turn: int) -> None:
            for name in list(tensors)[turn:] + list(tensors)[:turn]:
                sums[f"{turn} {name}"] = int(source.tensors[name].read().sum())

        before = len(os.listdir("/dev/fd"))
        threads = [threading.Thread(target=read_all, args=(turn,)) for turn in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/dev/fd")) == before + 1
    assert len(os.listdir("/dev/fd")) == before
    assert sums == {f"{turn} t{n}": n * 50_000 for turn in range(8) for n in range(8)}


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, {"model.safetensors": ONE}) / "model.safetensors"
    raw = path.read_bytes()
    with open_source(str(tmp_path)) as source:
        path.write_bytes(raw[:-4])
        with pytest.raises(CheckpointError) as caught:
            source.tensors["w"].read()
        size = len(raw)
        assert str(caught.value) == (
            f"{path}: changed since its header was read: expected {size} bytes, found {size - 4}; start again"
        )
        path.write_bytes(raw)
        assert source.tensors["w"].read().tobytes() == ONE["w"].tobytes()
        os.truncate(path, size - 4)
        with pytest.raises(CheckpointError) as caught:
            source.tensors["w"].read()
        assert str(caught.value) == f"{path}: shrank while it was read; is something writing to it?"


def test_side_files_come_from_a_list(tmp_path: Path) -> None:
    wanted = ["chat_template.jinja", "generation_config.json", "qwen.tiktoken", "tokenizer.json", "vocab.txt"]
    unwanted = ["modeling_x.py", "README.md", "optimizer.bin", "tokenizer.py", "secrets.json"]
    put(tmp_path, {"model.safetensors": ONE, **dict.fromkeys(wanted + unwanted, b"{}")})
    with open_source(str(tmp_path)) as source:
        assert source.side_files() == {name: tmp_path / name for name in wanted}


def test_references_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = put(tmp_path / "recipes", {"Llama-Base/model.safetensors": ONE, "x.json": {}})
    assert refusal("Lama-Base", base) == (
        f"Lama-Base: not found; tried {base}/Lama-Base, {tmp_path}/Lama-Base; did you mean 'Llama-Base'?"
    )
    assert refusal("zzz", base) == (
        f"zzz: not found; tried {base}/zzz, {tmp_path}/zzz; a model of the Hub is written owner/name"
    )
    assert refusal("./a/b") == f"./a/b: not found; tried {tmp_path}/a/b"
    for long in ("a" * 300, "a" * 5000, "a/" * 4000):
        assert refusal(long) == f"{f'{tmp_path}/{long}'[:1000]}: cannot be opened (File name too long)"
    assert refusal("x.json", base) == f"{base}/x.json: not a model: expected a folder or a .safetensors file"
    for path in ("C:\\models\\x", "C:/models/x", "\\\\host\\x", "models\\x", "./a\\b", "a/b\\c"):
        assert refusal(path) == (
            f"{path}: a Windows path, and this is not Windows; write it with / (under WSL: /mnt/c/...)"
        )
    for nothing in ("", "a\0b"):
        assert refusal(nothing) == (
            f"{nothing!r} is not a model: expected a folder, a .safetensors file or owner/name"
        )


def test_the_folder_of_the_recipe_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"here/m/model.safetensors": ONE, "recipes/m/model.safetensors": ONE})
    monkeypatch.chdir(tmp_path / "here")
    assert open_source("m", base_dir=tmp_path / "recipes").folder == tmp_path / "recipes/m"
    assert open_source("m", base_dir=tmp_path).folder == tmp_path / "here/m"
    assert open_source("m").folder == tmp_path / "here/m"
    put(tmp_path, {"here/owner/name/model.safetensors": ONE})
    source: Source = open_source("owner/name")
    assert source.folder == tmp_path / "here/owner/name", "a folder is preferred to the Hub"


def test_importing_is_cheap() -> None:
    program = "import sys, della.checkpoint.source, della.output.writer; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "numba", "torch", "transformers", "safetensors"} & set(run.stdout.split())
