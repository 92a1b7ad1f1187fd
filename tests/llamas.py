"""Small Llamas on disk, and what a merge of them must hold: by the reference, in plain NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from checkpoints import put

from della.dtypes import DTYPES, DType, of_array, round_to, widen
from della.merging.registry import METHODS, Method

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape and bytes of each tensor

LAYERS, HIDDEN, WIDE, VOCABULARY = 3, 24, 40, 50
EXPERTS = ("math", "code", "story")
# Methods of any number of models, element by element; for others see tests/merging/test_directions.py.
SEVERAL = tuple(name for name, row in METHODS.items() if "lambda" in row.parameters or name == "linear")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def shapes(layers: int = LAYERS, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        found |= {f"{name}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{name}.mlp.{part}_proj.weight": (WIDE, HIDDEN) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        found |= {f"{name}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (VOCABULARY, HIDDEN)}


# What other architectures hold: convolutions, stacked experts, scalars, nothing at all.
ODD_SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (6, 4, 3), "conv2d.weight": (4, 3, 3, 3), "mlp.experts.up": (3, 8, 24), "gate": (),
    "none.weight": (0, 24), "one": (1,), "column": (9, 1),
}  # fmt: skip
EXACT: Tensors = {
    "buffer.ids": np.arange(7),
    "buffer.mask": np.array([[True, False]]),
    "buffer.count": np.array(3, np.uint8),
}


def weights(
    named: Mapping[str, tuple[int, ...]], seed: int, dtype: Any, around: Tensors | None = None
) -> Tensors:
    """Random weights, or random changes ``around`` a base's, in a storage dtype."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in named.items():
        values = np.asarray(rng.standard_normal(shape) * (0.1 if around is None else 0.02))
        made[name] = np.asarray(values if around is None else values + around[name].astype(np.float64))
    return {name: values.astype(np.float32).astype(dtype) for name, values in made.items()}


def trio(dtype: Any = ml_dtypes.bfloat16) -> dict[str, Tensors]:
    """A base and three experts of it, with odd tensors too."""
    named = shapes() | ODD_SHAPES
    base = weights(named, 0, dtype)
    others = {key: np.asarray(~v if v.dtype == bool else v + v.dtype.type(1)) for key, v in EXACT.items()}
    models = {"base": base | EXACT}
    for seed, name in enumerate(EXPERTS, 1):
        models[name] = weights(named, seed, dtype, base) | others
    return models


def save(folder: Path, models: Mapping[str, Tensors], **config: Any) -> Path:
    """Each model as a folder NAME with model.safetensors and config.json."""
    for name, tensors in models.items():
        put(folder / name, {"model.safetensors": dict(tensors), "config.json": CONFIG | config})
    return folder


def recipe(
    folder: Path, method: str, own: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], **keys: Any
) -> dict[str, Any]:
    """A recipe of the trio in ``folder``: ``own`` are the parameters of each expert, in their order."""
    models = [
        {"model": str(folder / name), "parameters": dict(mine)}
        for name, mine in zip(EXPERTS, own, strict=True)
    ]
    made: dict[str, Any] = {"merge_method": method, "models": models, "parameters": dict(shared), **keys}
    return made if method == "linear" else {"base_model": str(folder / "base"), **made}


def reference_merge(
    picked: Method, name: str, base: Array | None, models: Mapping[str, Array],
    own: Sequence[Mapping[str, Any]], dtype: DType, seed: int = 42,
) -> Array:  # fmt: skip
    """One tensor by the reference: ``models`` by identity, ``own`` in the same order."""
    inputs = [*models.values(), *([] if base is None else [base])]
    real = np.float64 if any(array.dtype == np.float64 for array in inputs) else np.float32
    wide = [widen(array).astype(real) for array in models.values()]
    experts = [picked.expert(identity, mine) for identity, mine in zip(models, own, strict=True)]
    root = None if base is None else widen(base).astype(real)
    return round_to(picked.merge(name, root, wide, experts, seed), dtype)


def expected(
    models: Mapping[str, Tensors], method: str, own: Sequence[Mapping[str, Any]], shared: Mapping[str, Any],
    dtype: str | None = None, seed: int = 42,
) -> Tensors:  # fmt: skip
    """The merge of a trio by the reference."""
    row = METHODS[method]
    base = models["base"] if row.needs_base else None
    found: Tensors = {}
    for name, value in (models[EXPERTS[0]] if base is None else base).items():
        stored = of_array(value)
        found[name] = value
        if stored.is_float:
            found[name] = reference_merge(
                row(shared), name, None if base is None else value,
                {identity: models[identity][name] for identity in EXPERTS}, own,
                DTYPES[dtype] if dtype else stored, seed,
            )  # fmt: skip
    return found


def as_stored(tensors: Tensors) -> Stored:
    return {
        name: (of_array(value).name, tuple(value.shape), value.tobytes()) for name, value in tensors.items()
    }


def load(out: Path) -> Stored:
    """A folder or file, read by the official safetensors package; shards by their index."""
    if out.is_dir():
        table = out / "model.safetensors.index.json"
        names = (
            sorted(set(json.loads(table.read_text())["weight_map"].values()))
            if table.exists()
            else ["model.safetensors"]
        )
        files = [out / name for name in names]
    else:
        files = [out]
    found: Stored = {}
    for path in files:
        for name, info in safetensors.deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            assert name not in found
            found[name] = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return found


def listing(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
