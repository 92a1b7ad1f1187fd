"""The stage: models, two recipes, and a folder for OUT; what may be found there afterwards."""

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
from della.errors import OutputError

EXPERTS = ("math", "code", "story")
ASIDE = ".out.della-old"
Tree = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """A command, and what there is before it: ``old`` whether OUT is an old model that may be replaced;
    ``part`` and ``finish`` as of `della merge` (the other parts are done); ``single`` one file; ``swaps``
    whether the file system can exchange two folders; ``recipe`` is "new", or "documents" for one of several.
    """

    name: str
    old: bool = False
    part: tuple[int, int] = (1, 1)
    finish: bool = False
    single: bool = False
    swaps: bool = True
    recipe: str = "new"

    @property
    def out(self) -> str:
        return "out.safetensors" if self.single else "out"

    @property
    def start(self) -> str:
        """What OUT is before."""
        return "old" if self.old else "absent"

    @property
    def end(self) -> str:
        """What OUT is when the command is done."""
        return self.start if self.part[1] > 1 else "new file" if self.single else self.recipe

    @property
    def arguments(self) -> list[str]:
        words = ["--overwrite=any"] * self.old + ["--finish"] * self.finish
        return words + (["--part", f"{self.part[0]}/{self.part[1]}"] if self.part[1] > 1 else [])


SCENARIOS = (
    Scenario("absent"),
    Scenario("old", old=True),
    Scenario("old, no exchange", old=True, swaps=False),
    Scenario("part", part=(1, 2)),
    Scenario("finish", old=True, finish=True),
    Scenario("one file", single=True),
    Scenario("documents", recipe="documents"),
    Scenario("documents, old", old=True, recipe="documents"),
)


@dataclass
class Scene:
    """A folder with models of ``layers`` and ``width``, recipes of the ``new`` and the ``old`` merge, and
    copies of all results; merges have ``threads`` and write shards of ``shard`` bytes.
    """

    folder: Path
    layers: int = 10
    width: int = 16
    shard: int = 4000
    threads: int = 1
    trees: dict[str, Tree] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """How every merge here runs."""
        return {"shard_bytes": self.shard, "threads": self.threads, "fsync": False}

    def build(self) -> Scene:
        """Make the models, and the merges undisturbed."""
        for seed, name in enumerate(("base", *EXPERTS)):
            save_model(self.folder / "models" / name, tensors(self.layers, self.width, seed))
        for which, method, density in (("new", "della", 0.5), ("old", "ties", 0.3)):
            recipe = {
                "merge_method": method,
                "base_model": "models/base",
                "models": [{"model": f"models/{e}", "parameters": {"density": density}} for e in EXPERTS],
            }
            (self.folder / f"{which}.yml").write_text(json.dumps(recipe))
            self.trees[which] = tree(self._merge(which, self.folder / which / "out"))
        first = {"name": "First", **json.loads((self.folder / "new.yml").read_text())}
        last = {**json.loads((self.folder / "old.yml").read_text()), "base_model": "First"}
        (self.folder / "documents.yml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}\n")
        self.trees["documents"] = tree(self._merge("documents", self.folder / "documents/out"))
        self.trees["new file"] = tree(self._merge("new", self.folder / "new file/out.safetensors"))
        self.trees["absent"] = {}
        return self

    def _merge(self, which: str, out: Path, **options: Any) -> Path:
        della.merge(self.folder / f"{which}.yml", out, **self.options, **options)
        return out

    def set_up(self, site: Path, scenario: Scenario) -> None:
        """``site`` anew, with what there is before the scenario's command."""
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir()
        if scenario.old:
            shutil.copytree(self.folder / "old/out", site / "out")
        if scenario.finish or scenario.part[1] > 1:
            done = (1, 2) if scenario.finish else (2,)
            for number in done:
                self._merge("new", site / "out", part=(number, 2), overwrite=scenario.old)

    def command(self, site: Path, scenario: Scenario) -> list[str]:
        """The merge, as a user would start it."""
        return [sys.executable, "-m", "della.cli.main", *self.arguments(site, scenario)]

    def arguments(self, site: Path, scenario: Scenario) -> list[str]:
        """What the user says to the command."""
        words = ["merge", str(self.folder / f"{scenario.recipe}.yml"), str(site / scenario.out), "--quiet"]
        words += ["--shard-size", f"{self.shard}B", "--threads", str(self.threads)]
        return words + scenario.arguments

    def state(self, site: Path, scenario: Scenario) -> str:
        """Which of absent, old and new OUT is, to the byte and by `della verify`; else what is wrong."""
        out = site / scenario.out
        found = tree(out)
        if not found and not scenario.swaps and tree(site / ASIDE) == self.trees["old"]:
            return "old"  # the next run puts it back
        known = [name for name, wanted in self.trees.items() if wanted == found]
        if not known:
            return f"OUT is neither absent, old nor new: {sorted(found)}"
        if found and not (verdict := della.verify(out, threads=self.threads)).is_well:
            return f"verify finds fault with a whole model: {verdict.bad}"
        return known[0]

    def again(self, site: Path, scenario: Scenario) -> tuple[str, int]:
        """The same once more, to the end: what is then wrong, and the tensors that were found done."""
        out = site / scenario.out
        options: dict[str, Any] = {**self.options, "overwrite": scenario.old or out.exists()}
        recipe = self.folder / f"{scenario.recipe}.yml"
        if scenario.part[1] > 1:
            della.merge(recipe, out, part=scenario.part, **options)
        try:
            resumed = della.merge(recipe, out, finish=scenario.finish, **options).resumed
        except OutputError:
            if not scenario.finish:
                raise
            resumed = della.merge(recipe, out, **options).resumed  # the parts were used up already
        state = self.state(site, scenario)
        if state != ("new file" if scenario.single else scenario.recipe):
            return f"after a second run: {state}", resumed
        left = sorted(set(os.listdir(site)) - {scenario.out})
        return (f"left beside OUT: {left}" if left else ""), resumed


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
        values, change = (rng.standard_normal((width, width), np.float32) for rng in (base, own))
        made[name] = (values + np.float32(0.1 * bool(seed)) * change).astype(ml_dtypes.bfloat16)
    return made


def save_model(folder: Path, named: dict[str, Any]) -> None:
    """A model's folder with weights, configuration and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "generation_config.json").write_text("{}")


def tree(path: Path) -> Tree:
    """Every file below ``path``, or the file itself."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A process to its end, the same from run to run."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=120, **options
    )
