"""The stage: models, two recipes, and a place for OUT; what may be found there afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import della

EXPERTS = ("math", "code", "story")
OPTIONS: dict[str, Any] = {"shard_bytes": 4000, "threads": 1}
ARGUMENTS = ("--shard-size", "4000B", "--threads", "1", "--quiet")
Tree = dict[str, bytes]


@dataclass
class Scene:
    """A folder with models, recipes of the ``new`` and the ``old`` merge, and copies of both results."""

    folder: Path
    layers: int = 10
    trees: dict[str, Tree] = field(default_factory=dict)

    def build(self) -> Scene:
        """Make the models, and both merges undisturbed."""
        for seed, name in enumerate(("base", *EXPERTS)):
            save_model(self.folder / "models" / name, tensors(self.layers, 16, seed))
        for which, method, density in (("new", "della", 0.5), ("old", "ties", 0.3)):
            recipe = {
                "merge_method": method,
                "base_model": "models/base",
                "models": [{"model": f"models/{e}", "parameters": {"density": density}} for e in EXPERTS],
            }
            (self.folder / f"{which}.yml").write_text(json.dumps(recipe))
            out = self.folder / which / "out"
            della.merge(self.folder / f"{which}.yml", out, fsync=False, **OPTIONS)
            self.trees[which] = tree(out)
        self.trees["absent"] = {}
        return self

    def set_up(self, place: Path, start: str) -> None:
        """``place`` anew: nothing in it, or the old model as OUT."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if start == "old":
            shutil.copytree(self.folder / "old/out", place / "out")

    def command(self, place: Path, start: str) -> list[str]:
        """The merge, as a user would start it."""
        overwrite = ["--overwrite"] if start == "old" else []
        recipe, out = self.folder / "new.yml", place / "out"
        return [sys.executable, "-m", "della.cli", "merge", str(recipe), str(out), *ARGUMENTS, *overwrite]

    def state(self, place: Path) -> str:
        """Which of absent, old and new OUT is, to the byte and by `della verify`; else what is wrong."""
        found = tree(place / "out")
        known = [name for name, wanted in self.trees.items() if wanted == found]
        if not known:
            return f"OUT is neither absent, old nor new: {sorted(found)}"
        if found and not (verdict := della.verify(place / "out", threads=1)).is_well:
            return f"verify finds fault with a whole model: {verdict.bad}"
        return known[0]

    def again(self, place: Path, start: str) -> tuple[str, int]:
        """The same merge once more: what is then wrong ("" for nothing), and the tensors it found done."""
        result = della.merge(
            self.folder / "new.yml", place / "out", overwrite=start == "old" or (place / "out").exists(),
            fsync=False, **OPTIONS,
        )  # fmt: skip
        if (state := self.state(place)) != "new":
            return f"after a second run: {state}", result.resumed
        left = sorted(set(os.listdir(place)) - {"out"})
        return (f"left beside OUT: {left}" if left else ""), result.resumed


def tensors(layers: int, width: int, seed: int) -> dict[str, Any]:
    """A small model in the shape of a Llama; the same base for every seed, and a change of it."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    names = ["model.embed_tokens.weight"]
    for layer in range(layers):
        names += [
            f"model.layers.{layer}.{part}.weight" for part in ("attn.q", "attn.o", "mlp.up", "mlp.down")
        ]
    made: dict[str, Any] = {}
    for name in names:
        values, change = base.standard_normal((width, width)), own.standard_normal((width, width))
        made[name] = (values + 0.1 * change * bool(seed)).astype(ml_dtypes.bfloat16)
    return made


def save_model(folder: Path, named: dict[str, Any]) -> None:
    """A model's folder with weights, configuration and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "generation_config.json").write_text("{}")


def tree(folder: Path) -> Tree:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A process to its end, the same from run to run."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=120, **options
    )
