"""The models that makers spoil, and a writer of safetensors files that checks nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from della.dtypes import of_array

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBED: (10, 8),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (6, 8) for layer in range(5)},
    NORM: (200,),
    HEAD: (10, 8),
}
CONFIG: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "float32"}
RECIPE_TEXT = """\
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./math
    parameters: {weight: 0.5}
  - model: ./code
    parameters: {weight: 0.5}
"""


def tensors(seed: int, dtype: Any = np.float32) -> Tensors:
    """The tensors of the base (seed 0) or of a fine-tune of it."""
    base, rng = np.random.default_rng(0), np.random.default_rng(seed)
    made = {name: base.standard_normal(shape) for name, shape in SHAPES.items()}
    if seed:
        made = {name: values + rng.standard_normal(values.shape) / 10 for name, values in made.items()}
    return {name: values.astype(dtype) for name, values in made.items()}


def good(folder: Path) -> None:
    """Three models and a recipe, with nothing wrong about them."""
    for seed, name in enumerate(("base", "math", "code")):
        model(folder / name, tensors(seed))
    (folder / "recipe.yml").write_text(RECIPE_TEXT)


def model(folder: Path, named: Mapping[str, Array], **config: Any) -> Path:
    """A folder with model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(file_of(named))
    put(folder / "config.json", CONFIG | config)
    return folder


def put(path: Path, value: object) -> None:
    """Bytes as they are, anything else as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def table_of(named: Mapping[str, Array]) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, as an object, and its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in named.items():
        begin, data = len(data), data + values.tobytes()
        spans = {"shape": list(values.shape), "data_offsets": [begin, len(data)]}
        header[name] = {"dtype": of_array(values).name, **spans}
    return header, data


def blob(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header, given as bytes or as an object."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def file_of(named: Mapping[str, Array]) -> bytes:
    return blob(*table_of(named))


@contextmanager
def changed(folder: Path, **config: Any) -> Iterator[Tensors]:
    """The tensors of a model, saved again when the block ends."""
    named = tensors(("base", "math", "code").index(folder.name))
    yield named
    model(folder, named, **config)


def sharded(folder: Path, **weight_map: str) -> dict[str, Any]:
    """Splits a model in two shards, s1 and s2, with their index, which is returned."""
    named = tensors(("base", "math", "code").index(folder.name))
    (folder / WEIGHTS).unlink()
    homes = {name: f"s{1 + (name == NORM)}.safetensors" for name in named}
    for shard in ("s1.safetensors", "s2.safetensors"):
        put(folder / shard, file_of({n: v for n, v in named.items() if homes[n] == shard}))
    index = {"metadata": {"total_size": 0}, "weight_map": homes | weight_map}
    put(folder / INDEX, index)
    return index


def read(path: Path) -> Tensors:
    """The tensors of a file that is well formed."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    types = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    return {
        name: np.frombuffer(
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], types[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def stored_dtypes(path: Path) -> set[str]:
    """The dtypes that a file's header names."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def merged(folder: Path) -> Tensors:
    """What the untouched recipe makes of the untouched models."""
    base, *experts = (tensors(seed) for seed in range(3))
    found = {}
    for name, values in base.items():
        delta = sum((np.float32(0.5) * (expert[name] - values) for expert in experts), np.float32(0))
        found[name] = np.asarray(values + delta)
    return found


def same_as_undisturbed(folder: Path, out: Path) -> None:
    """The result is what it would have been without the attack."""
    found, wanted = read(out / WEIGHTS), merged(folder)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.allclose(found[name], values, rtol=0, atol=1e-5), name
