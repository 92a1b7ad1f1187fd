"""Files of torch.save: what is read where they are allowed, that it is the same bytes, what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from checkpoints import COMMIT, ONE, index, put

import della
from della.checkpoint import source as source_module
from della.checkpoint.header import build_header
from della.checkpoint.pickles import copy_bytes
from della.checkpoint.source import Source, open_source
from della.dtypes import DTYPES
from della.errors import CheckpointError

torch: Any = pytest.importorskip("torch", reason="needs torch: pip install 'torch>=2.10'")

PLAIN = [dtype for dtype in DTYPES.values() if dtype.kind != "opaque"]
LEGACY = {"_use_new_zipfile_serialization": False}
# torch itself cannot read these from its older format.
NOT_IN_LEGACY = {"F8_E4M3", "F8_E5M2", "U16", "U32", "U64"}


def save(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def ones(**sizes: int) -> bytes:
    return save({name: torch.ones(size) for name, size in sizes.items()})


def bits(name: str) -> bytes:
    values = np.random.default_rng(3).integers(0, 2 if name == "BOOL" else 256, 15 * DTYPES[name].bytes)
    return values.astype(np.uint8).tobytes()


def tensor(name: str) -> Any:
    raw = torch.frombuffer(bytearray(bits(name)), dtype=torch.uint8)
    return raw.view(getattr(torch, DTYPES[name].torch_name)).reshape(3, 5)


def opened(path: Path) -> Source:
    return open_source(str(path), allow_pickle=True)


def refusal(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    return str(caught.value)


def repacked(raw: bytes, old: bytes = b"", new: bytes = b"", compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of torch.save again, with something else in its records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(out, "w", compression) as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, content.replace(old, new) if old else content)
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_the_same_bytes_as_from_safetensors(tmp_path: Path, options: dict[str, Any]) -> None:
    names = [dtype.name for dtype in PLAIN if not (options and dtype.name in NOT_IN_LEGACY)]
    header, _ = build_header([(name, DTYPES[name], (3, 5)) for name in names])
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(header + b"".join(map(bits, names)))
    path = tmp_path / "x.bin"
    path.write_bytes(save({name: tensor(name) for name in names}, **options))
    with opened(path) as source, open_source(str(twin)) as expected:
        assert (source.path, source.folder, source.config) == (path, tmp_path, {})
        assert set(source.tensors) == set(expected.tensors) == set(names)
        for name, entry in source.parts.items():
            got, wanted = source.tensors[name].read(), expected.tensors[name].read()
            assert (entry.dtype, entry.shape, entry.file) == (DTYPES[name], (3, 5), path)
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
            assert got.tobytes() == wanted.tobytes() == bits(name)


def test_ordinary_tensors_are_read_from_the_file_by_offset(tmp_path: Path) -> None:
    whole, tied = tensor("F32"), tensor("BF16")
    state = {
        "whole": whole, "part": whole[1:3], "one": whole[2, 4], "none": whole[:0], "tied.a": tied,
        "tied.b": tied, "parameter": torch.nn.Parameter(tensor("F16")), "F64": tensor("F64"),
    }  # fmt: skip
    path = tmp_path / "x.pt"
    path.write_bytes(save(state))
    raw = path.read_bytes()
    with opened(path) as source:
        for name, value in state.items():
            entry, plain = source.parts[name], value.detach()
            expected = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert source.tensors[name].read().shape == tuple(plain.shape)
            assert source.tensors[name].read().tobytes() == expected
            assert raw[entry.offset : entry.offset + entry.nbytes] == expected
        assert source.parts["tied.a"].offset == source.parts["tied.b"].offset
        offsets = [entry.offset for entry in source.parts.values()]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_other_tensors_are_read_as_their_row_major_copies(tmp_path: Path, options: dict[str, Any]) -> None:
    c, f = tensor("C64"), tensor("F32")
    state = {
        "t": tensor("BF16").t(), "u": tensor("BOOL").t(), "every second": tensor("F64")[:, ::2],
        "conj": c.conj(), "conj.t": c.conj().t(), "negated": tensor("C64").conj().imag,
        "cube": f.reshape(5, 3, 1).permute(2, 1, 0), "f": f,
    }  # fmt: skip
    (tmp_path / "x.ckpt").write_bytes(save(state, **options))
    with opened(tmp_path / "x.ckpt") as source:
        for name, value in state.items():
            plain = value.resolve_conj().resolve_neg().contiguous()
            numbers = torch.view_as_real(plain) if plain.is_complex() else plain
            expected = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert source.tensors[name].read().shape == tuple(value.shape)
            assert source.tensors[name].read().tobytes() == expected
            for start, count in ((0, 1), (3, 7), (5, 0), (len(expected) - 9, 9)):
                buffer = bytearray(count)
                source.parts[name].read_bytes(start, memoryview(buffer))
                assert buffer == expected[start : start + count]
            with pytest.raises(ValueError, match=r"^bytes "):
                source.parts[name].read_bytes(len(expected), memoryview(bytearray(1)))


def test_any_part_of_any_strides() -> None:
    grid = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (grid, grid.T, grid[::2, ::3], grid[::-1], grid[1:2, 1:2].T):
        whole = array.tobytes()
        for start in range(len(whole)):
            for count in (1, 2, 5, 9):
                if start + count <= len(whole):
                    buffer = bytearray(count)
                    copy_bytes(array, start, memoryview(buffer))
                    assert buffer == whole[start : start + count]


def test_the_fingerprint_is_of_size_and_table(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(save({"b": torch.ones(2, 3), "a": torch.ones(()).bfloat16()}))
    (file,) = opened(path).files
    size = path.stat().st_size
    table = b'[["a", "BF16", []], ["b", "F32", [2, 3]]]'
    digest = xxhash.xxh3_128(size.to_bytes(8, "little") + table).hexdigest()
    assert (file.name, file.path, file.size, file.fingerprint) == ("x.bin", path, size, digest)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({str(n): torch.full((4 << 20,), float(n)) for n in range(6)}, path)
    assert path.stat().st_size > 96 << 20
    program = (
        "import numpy as np, sys, torch, torch.serialization; from resource import *\n"
        "from della.checkpoint.source import open_source\n"
        "torch.ones(3).numpy(); buffer = np.zeros(1 << 20, np.uint8)\n"
        "before = getrusage(RUSAGE_SELF).ru_maxrss\n"
        "source = open_source(sys.argv[1], allow_pickle=True)\n"
        "for tensor in source.parts.values():\n"
        "    for start in range(0, tensor.nbytes, buffer.nbytes):\n"
        "        tensor.read_bytes(start, buffer.data)\n"
        "print(getrusage(RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40 << 10, "KiB"


def test_folders(tmp_path: Path) -> None:
    other = {"optimizer.bin": b"?", "training_args.bin": b"?", "adapter_model.safetensors": ONE}
    put(tmp_path / "one", {"pytorch_model.bin": ones(w=2), "config.json": {"a": 1}, **other})
    with opened(tmp_path / "one") as source:
        assert (source.folder, source.config) == (tmp_path / "one", {"a": 1})
        assert source.tensors["w"].read().tolist() == [1.0, 1.0]
    put(tmp_path / "diffusers", {"diffusion_pytorch_model.bin": ones(w=1)})
    assert list(opened(tmp_path / "diffusers").tensors) == ["w"]
    put(tmp_path / "both", {"pytorch_model.bin": b"never opened", "model.safetensors": ONE})
    assert opened(tmp_path / "both").files[0].name == "model.safetensors"
    put(tmp_path / "none", {"optimizer.bin": b"?", "x.pth": b"?"})
    assert refusal(tmp_path / "none") == (
        f"{tmp_path}/none: expected pytorch_model.bin or pytorch_model.bin.index.json, "
        "found optimizer.bin, x.pth; name the one file that is meant"
    )


def test_shards(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    files = {names[0]: ones(a=1, b=2), names[1]: save({"c": tensor("F32").t()})}
    put(tmp_path, files)
    assert list(opened(tmp_path).tensors) == ["a", "b", "c"]
    put(tmp_path, {"pytorch_model.bin.index.json": index(a=names[0], b=names[0], c=names[1])})
    with opened(tmp_path) as source:
        assert [file.name for file in source.files] == names
        assert {name: entry.file.name for name, entry in source.parts.items()} == {
            "a": names[0], "b": names[0], "c": names[1],
        }  # fmt: skip
        assert source.tensors["c"].read().tobytes() == tensor("F32").t().contiguous().numpy().tobytes()
    twice = index(a=names[0], b=names[0], c=names[1])
    put(
        tmp_path,
        {names[1]: save({"c": torch.zeros(5, 5).t(), "a": torch.zeros(1)}), names[0]: ones(a=1, b=2)},
    )
    put(tmp_path, {"pytorch_model.bin.index.json": twice})
    assert opened(tmp_path).tensors["a"].read().tolist() == [1.0], "the copy that the index names"


def test_all_that_is_wrong_with_shards_is_listed_at_once(tmp_path: Path) -> None:
    entries = index(a="s1.bin", b="s2.bin", c="s3.bin", d="s1.bin")
    put(tmp_path, {"s1.bin": ones(a=1), "s2.bin": ones(b=1, x=1), "pytorch_model.bin.index.json": entries})
    assert refusal(tmp_path) == (
        "3 problems:\n"
        f"  - {tmp_path}/s3.bin: the index names this file, but it is not there; download the file again\n"
        f"  - {tmp_path}/s1.bin: tensor 'd' is missing, which the index expects here; download both again\n"
        f"  - {tmp_path}/s2.bin: tensor 'x' is not in the index; download both again"
    )
    (tmp_path / "s3.bin").symlink_to(put(tmp_path.parent, {"outside.bin": ones(c=1)}) / "outside.bin")
    assert f"{tmp_path}/s3.bin: a link that leaves the folder" in refusal(tmp_path)
    for entry in ("../s1.bin", "/tmp/s1.bin", "a\\s1.bin", "s1\0.bin", "s1.safetensors", "s1.pt"):
        put(tmp_path, {"pytorch_model.bin.index.json": index(a=entry)})
        assert refusal(tmp_path) == (
            f"{tmp_path}/pytorch_model.bin.index.json: names {entry!r}, "
            "which is not a .bin file of this folder; download the file again"
        )


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("options", [{}, LEGACY, None], ids=["zip", "legacy", "bare"])
def test_a_hostile_file_runs_nothing(
    tmp_path: Path, options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = tmp_path / "owned"
    content = {"w": torch.ones(2), "x": Payload(owned)}
    raw = pickle.dumps(content) if options is None else save(content, **options)
    path = put(tmp_path / "m", {"pytorch_model.bin": raw}) / "pytorch_model.bin"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for site in (path, path.parent):
        with pytest.raises(CheckpointError, match="a pickle, which can run any code when it is loaded"):
            open_source(str(site))
        message = refusal(site)
        if options is None:
            assert message.startswith(f"{path}: not a file of torch.save: it begins with b'\\x80\\x04")
        else:
            assert message == (
                f"{path}: holds more than tensors ('{os.mkdir.__module__}.mkdir'), or is damaged; it was "
                "refused, and nothing in it was run. Save its state dict alone, or give the model as "
                "safetensors"
            )
    assert not owned.exists()
    if options is not None:
        torch.load(path, weights_only=False)
        assert owned.exists(), "the payload is a real one"


NEEDED = "a state dict is needed: a dict of tensors by name, and nothing else"


def test_what_is_not_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    assert refusal(path, save([torch.ones(1)])) == f"{path}: holds one object of type list; {NEEDED}"
    mixed = {"w": torch.ones(1), "step": 3, "note": None, 5: torch.ones(1), "__metadata__": torch.ones(1)}
    assert refusal(path, save(mixed)) == (
        "4 problems:\n"
        f"  - {path}: entry 'step' is of type int; {NEEDED}\n"
        f"  - {path}: entry 'note' is of type NoneType; {NEEDED}\n"
        f"  - {path}: the names must be strings, found one of type int\n"
        f"  - {path}: tensor '__metadata__': a name that no safetensors file can hold"
    )
    assert refusal(path, save({"state_dict": {"w": torch.ones(1)}, "epoch": 3})) == (
        f"{path}: a training checkpoint: the weights are in its entry 'state_dict'; save that alone: "
        "torch.save(torch.load('FILE', weights_only=True)['state_dict'], 'pytorch_model.bin')"
    )
    assert "holds more than tensors ('torch.nn.modules.linear.Linear')" in refusal(
        path, save(torch.nn.Linear(2, 2))
    )


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_a_plain_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    odd = {
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        "meta": torch.ones(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "expanded": torch.ones(1).expand(5),
        "plain": torch.ones(1),
    }
    assert refusal(path, save(odd)).replace("; give a plain, dense tensor", "") == (
        "6 problems:\n"
        f"  - {path}: tensor 'coo' is sparse (sparse_coo)\n"
        f"  - {path}: tensor 'csr' is sparse (sparse_csr)\n"
        f"  - {path}: tensor 'quantised' is quantised, and cannot be merged\n"
        f"  - {path}: tensor 'meta' is on the meta device: it has a shape, but no values\n"
        f"  - {path}: tensor 'nested' is nested: rows of several lengths\n"
        f"  - {path}: tensor 'expanded' repeats what is stored once: 5 elements, of which 1 are stored"
    )


def test_the_gate_is_that_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    state = {
        "": torch.ones(1),
        "a\0b": torch.ones(1),
        "wide": torch.ones(2, dtype=torch.complex128),
        "scales": torch.zeros(2).to(torch.float8_e8m0fnu),
        "deep": torch.ones([1] * 33),
    }
    assert refusal(path, save(state)).replace("; download the file again", "") == (
        "5 problems:\n"
        f"  - {path}: tensor '': a tensor's name must not be empty or contain NUL\n"
        f"  - {path}: tensor 'a\\x00b': a tensor's name must not be empty or contain NUL\n"
        f"  - {path}: tensor 'wide': unknown dtype 'complex128'; give the model in BF16, F16 or F32\n"
        f"  - {path}: tensor 'scales': dtype F8_E8M0 holds scaled or packed values that cannot be merged; "
        "give the model in BF16, F16 or F32\n"
        f"  - {path}: tensor 'deep': a shape has at most 32 axes, found 33"
    )
    assert "a model quantised by GPTQ or AWQ (tensor 'l.qweight')" in refusal(
        path, save({"l.qweight": torch.ones(1)})
    )
    put(tmp_path, {"config.json": {"quantization_config": {"quant_method": "gptq"}}})
    for site in (tmp_path, path):
        assert "a model quantised by GPTQ (quantization_config in config.json)" in refusal(site)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    raw, legacy = ones(a=2000, b=10), save({"a": torch.ones(2000)}, **LEGACY)
    begins = f"{path}: truncated or damaged: "
    for content in (raw[:-100], raw[:300], legacy[:-100], legacy[:40], repacked(raw, b"\x80\x02", b"\x80")):
        assert refusal(path, content).startswith(begins)
    for content in (b"", b"\x80", b"version https://git-lfs", raw[100:]):
        assert refusal(path, content) == (
            f"{path}: not a file of torch.save: it begins with {content[:8]!r}; download the file again"
        )
    path.unlink()
    os.mkfifo(path)
    assert refusal(path) == f"{path}: not a regular file; put the file itself there"


def test_a_storage_that_is_larger_than_its_record(tmp_path: Path) -> None:
    """torch reads on into the records behind it."""
    path = tmp_path / "x.bin"
    raw = ones(a=2000, b=3000)
    lie = repacked(raw, b"M" + struct.pack("<H", 2000), b"M" + struct.pack("<H", 2010))
    path.write_bytes(lie)
    assert torch.load(path, weights_only=True, mmap=True)["a"].shape == (2010,)
    assert refusal(path) == (
        f"{path}: damaged: the pickle expects a storage of 8,040 bytes, and the file has none of that size, "
        "or packs it; download the file again"
    )
    path.write_bytes(repacked(raw))
    assert opened(path).tensors["b"].read().tolist() == [1.0] * 3000, "a zip that something else has packed"
    packed = repacked(ones(a=50), compression=zipfile.ZIP_DEFLATED)
    assert refusal(path, packed).startswith(f"{path}: damaged: the pickle expects a storage of 200 bytes")
    assert refusal(path, repacked(raw, b"little", b"big")) == (
        f"{path}: written on a machine of another byte order; give the model as safetensors"
    )


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(save({"plain": torch.ones(3), "turned": tensor("F32").t()}))
    size = path.stat().st_size
    with opened(path) as source:
        source.tensors["turned"].read()
        os.truncate(path, size - 4)
        with pytest.raises(CheckpointError, match=r"x\.bin: shrank while it was read"):
            source.tensors["turned"].read()
    with pytest.raises(CheckpointError, match=r"x\.bin: changed since its header was read"):
        source.tensors["plain"].read()


def test_torch_must_be_there_and_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(ones(w=1))
    fix = 'pip install "torch>=2.10", or give the model as safetensors'
    for old in ("2.9.1+cpu", "1.13.0", "unknown"):
        monkeypatch.setattr(torch, "__version__", old)
        assert refusal(path) == (
            f"{path}: reading a pickle needs torch 2.10 or newer, found {old}: "
            f"a hostile file gets past older ones; {fix}"
        )
    for new in ("2.10.0", "2.11.0a0+git123", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", new)
        assert opened(path).tensors["w"].read().tolist() == [1.0]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(path) == f"{path}: reading a pickle needs torch, which is missing; {fix}"


def test_pickles_of_the_hub_stay_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--o--n/snapshots" / COMMIT
    put(folder, {"pytorch_model.bin": ones(w=1), "config.json": json.dumps({}).encode()})
    monkeypatch.setattr(source_module, "fetch", lambda *_, **__: (folder, {}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="a pickle, which can run any code when it is loaded"):
        open_source("o/n", allow_pickle=True)
    assert opened(folder).revision == COMMIT, "a snapshot that the user has downloaded is a folder"


def test_a_merge_of_pickles_is_that_of_their_twins(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("base", "math", "code")
    for name in names:
        arrays = {key: rng.standard_normal((8, 6)).astype(np.float32) for key in ("w", "v")}
        state = {key: torch.from_numpy(value) for key, value in arrays.items()}
        put(tmp_path / "twins" / name, {"model.safetensors": arrays})
        put(tmp_path / "pickles" / name, {"pytorch_model.bin": save(state)})

    def made(kind: str) -> dict[str, Any]:
        models = [
            {"model": str(tmp_path / kind / name), "parameters": {"density": 0.5}} for name in names[1:]
        ]
        return {"merge_method": "della", "base_model": str(tmp_path / kind / "base"), "models": models}

    twin = della.merge(made("twins"), tmp_path / "twin", fsync=False)
    with pytest.raises(CheckpointError, match="allow it with allow_pickle=True"):
        della.merge(made("pickles"), tmp_path / "out", fsync=False)
    result = della.merge(made("pickles"), tmp_path / "out", fsync=False, allow_pickle=True)
    assert result.manifest["tensors"] == twin.manifest["tensors"]
    verdict = della.verify(
        tmp_path / "out", sources=1.0, inputs=True, allow_pickle=True, base_dir=tmp_path / "pickles"
    )
    assert (verdict.bad, verdict.recomputed, verdict.inputs) == ([], 2, 6)
    with della.plan(made("pickles"), allow_pickle=True) as plan:
        assert plan.bytes_read == 2 * 3 * 8 * 6 * 4
