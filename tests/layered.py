"""Toy models of layers, for slices and modules: every tensor of its own, by which it is known again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import put
from llamas import Tensors, load

import della

PARTS = ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")


def layered(seed: int, layers: int, stack: str = "model.layers", *, head: bool = True) -> Tensors:
    """Embeddings, ``layers`` layers, final norm and head."""
    rng = np.random.default_rng(seed)
    before = stack.rpartition(".")[0]
    shapes: dict[str, tuple[int, ...]] = {f"{before}.embed_tokens.weight": (6, 4)}
    for number in range(layers):
        shapes |= {f"{stack}.{number}.{part}.weight": (4, 4) for part in PARTS}
        shapes[f"{stack}.{number}.input_layernorm.weight"] = (4,)
    shapes[f"{before}.norm.weight"] = (4,)
    shapes |= {"lm_head.weight": (6, 4)} if head else {}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def kept(folder: Path, name: str, tensors: Tensors, **config: Any) -> Tensors:
    """A model ``name`` in ``folder``; its tensors."""
    found = {n for n in tensors if ".layers." in n}
    count = 1 + max((int(n.split(".layers.")[1].split(".")[0]) for n in found), default=-1)
    said = {"model_type": "llama", "num_hidden_layers": count, "tie_word_embeddings": False} | config
    put(folder, {f"{name}/model.safetensors": dict(tensors), f"{name}/config.json": said})
    return tensors


def merged(folder: Path, text: str, **options: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a recipe makes: its tensors as bytes, and its config.json; its sources give it again."""
    path = folder / "recipe.yml"
    path.write_text(text)
    out = della.merge(path, folder / "out", fsync=False, overwrite=True, **options).out
    verdict = della.verify(out, sources=1.0, inputs=True, base_dir=folder)
    assert verdict.is_well, verdict.bad
    found = {name: raw for name, (_, _, raw) in load(out).items()}
    return found, json.loads((out / "config.json").read_text())


def renumbered(tensors: Tensors, first: int, end: int, offset: int, stack: str = "model.layers") -> Tensors:
    """The layers [first, end) under new numbers."""
    found: Tensors = {}
    for number in range(first, end):
        old, new = f"{stack}.{number}.", f"{stack}.{number - first + offset}."
        found |= {new + name[len(old) :]: value for name, value in tensors.items() if name.startswith(old)}
    return found


def as_bytes(tensors: Tensors) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in tensors.items()}
