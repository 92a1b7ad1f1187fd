"""Merges to verify, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import put
from llamas import EXPERTS, recipe, save, trio

import della
from della.api import verify
from della.checkpoint.header import read_header
from della.output.manifest import dump, embed, sealed

OWN: list[dict[str, Any]] = [{"weight": 0.5, "density": 0.5}] * 3
FOLDER, FILE = FORMS = ("out", "one.safetensors")
SIDES = {"tokenizer.json": {"a": 1}, "generation_config.json": {"b": 2}, "chat_template.jinja": b"{{ x }}"}


def make(folder: Path) -> Path:
    """Models, recipe.yml with relative paths, and a merge of them in four shards and one in a single file."""
    save(folder, trio())
    put(folder / "base", SIDES)
    table = recipe(Path("."), "della", OWN, {}) | {"base_model": "./base"}
    for model, name in zip(table["models"], EXPERTS, strict=True):
        model["model"] = f"./{name}"
    (folder / "recipe.yml").write_text(json.dumps(table, indent=1))
    della.merge(folder / "recipe.yml", folder / FOLDER, shard_bytes=12_000, fsync=False)
    della.merge(folder / "recipe.yml", folder / FILE, fsync=False)
    return folder


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors")) if out.is_dir() else [out]


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor lie in a file: the first, and the one behind the last."""
    header, _, _ = read_header(path)
    start = header.data_start
    return {name: (start + info.begin, start + info.end) for name, info in header.tensors.items()}


def find(out: Path, name: str) -> tuple[Path, int, int]:
    """Where a tensor lies: its file, and its span there."""
    return next((path, *found[name]) for path in shards(out) if name in (found := spans(path)))


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def reseal(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest, and seals it again as if nothing had happened."""
    if out.is_dir():
        manifest = json.loads((out / "della.json").read_text())
        change(manifest)
        (out / "della.json").write_bytes(dump(manifest))
        return
    raw = out.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    manifest = json.loads(header["__metadata__"]["della"])
    change(manifest)
    header["__metadata__"] = embed(manifest)
    text = json.dumps(header).encode()
    out.write_bytes(sealed(len(text).to_bytes(8, "little") + text) + raw[start:])


def refused(error: type[della.DellaError], *arguments: Any, **options: Any) -> str:
    """The message with which `della.verify` refuses."""
    with pytest.raises(error) as caught:
        verify(*arguments, **options)
    return str(caught.value)
