"""Single bits flipped in finished merges, a folder of shards and a single file: `della verify` finds each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import della
from della.checkpoint.header import read_header
from della.errors import DellaError
from fuzz.job import Job

SHAPES = {"embed.weight": (24, 16), "norm.weight": (16,), "scale": (), "none.weight": (0, 16)}
LAYERS, SHARD_BYTES = 6, 1500
MOST_SHOWN = 300


def run(job: Job, most: int) -> None:
    """Every file is hit once, then bits anywhere, each byte of all files as likely as any other."""
    job.counts.update({"in tensors": 0, "in headers": 0, "in other files": 0})
    wholes = _merges(job.folder)
    homes = {path: whole for whole in wholes for path in (_files(whole) if whole.is_dir() else [whole])}
    whole_bytes = {path: path.read_bytes() for path in homes}
    _all_is_well(job, wholes, "before the first flip")
    paths = list(homes)
    sizes = [len(whole_bytes[path]) for path in paths]
    for case in job.numbers(most):
        rng = job.rng(case)
        path = paths[case] if case < len(paths) else rng.choices(paths, sizes)[0]
        raw = whole_bytes[path]
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        tensor = _tensor_at(path, at)
        damaged = bytearray(raw)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        found = job.timed(case, bytes(damaged), partial(_faults, homes[path]))
        path.write_bytes(raw)
        is_weights = path.suffix == ".safetensors"
        job.counts["in tensors" if tensor else "in headers" if is_weights else "in other files"] += 1
        if wrong := _wrong(found, path, tensor):
            job.fail(case, f"{path.name}, byte {at}, bit {bit}: {wrong}", bytes(damaged))
    _all_is_well(job, wholes, "after the last flip was undone")


def _merges(folder: Path) -> tuple[Path, Path]:
    """A merge in several shards, with side files; and the same in a single file."""
    names = dict(SHAPES)
    for layer in range(LAYERS):
        names |= {f"layers.{layer}.{part}.weight": (12, 16) for part in ("up", "gate")}
    for seed, name in enumerate(("base", "one", "two")):
        rng = np.random.default_rng(seed)
        model = {tensor: _random(rng, *shape) for tensor, shape in names.items()} | {"ids": np.arange(9)}
        (folder / name).mkdir()
        save_file(model, folder / name / "model.safetensors")
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    (folder / "base/tokenizer.json").write_text('{"version": "1.0"}')
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    sharded, single = folder / "out", folder / "out.safetensors"
    for out in (sharded, single):
        della.merge(recipe, out, shard_bytes=SHARD_BYTES, fsync=False, threads=1)
    return sharded, single


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape), np.float32).astype(ml_dtypes.bfloat16)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _tensor_at(path: Path, at: int) -> str:
    """The tensor whose data holds the byte ``at`` of a file, which is whole; empty where none does."""
    if path.suffix != ".safetensors":
        return ""
    header, _, _ = read_header(path)
    at -= header.data_start
    return next((name for name, info in header.tensors.items() if info.begin <= at < info.end), "")


def _faults(whole: Path) -> list[str] | Exception:
    """What `della.verify` says: the faults that it found, or the error that it raised."""
    try:
        return della.verify(whole, threads=1, strict=True).bad
    except Exception as error:
        return error


def _wrong(found: list[str] | Exception, path: Path, tensor: str) -> str:
    """What is wrong with an answer about a flip; empty if nothing is."""
    if isinstance(found, Exception) and not isinstance(found, DellaError):
        return f"raised {type(found).__name__}: {str(found)[:MOST_SHOWN]}"
    said = [str(found)] if isinstance(found, Exception) else found
    if not said:
        return "not found"
    if tensor and said != [f"{path}: tensor {tensor!r} has changed"]:
        return f"expected tensor {tensor!r} to be named, and nothing else: {'; '.join(said)[:MOST_SHOWN]}"
    if not any(str(path) in text for text in said):
        return f"the file is not named: {'; '.join(said)[:MOST_SHOWN]}"
    return ""


def _all_is_well(job: Job, wholes: tuple[Path, ...], when: str) -> None:
    for whole in wholes:
        if found := _faults(whole):
            job.fail(-1, f"{whole.name}: fault was found {when}: {str(found)[:MOST_SHOWN]}", b"")
