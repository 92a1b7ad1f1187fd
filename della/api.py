"""The library's way in: `della.merge` and `della.plan`, from a recipe to a model on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della.checkpoint.writer import check_place
from della.errors import RecipeError
from della.planning import TILE, Plan, default_threads, make_plan
from della.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from della.run import Progress, Result

Source = str | Path | Mapping[str, Any] | Recipe


def merge(
    recipe: Source,
    out: str | Path,
    *,
    seed: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] | str = (),
    compat: bool = False,
    fsync: bool = True,
    shard_bytes: int = 5_000_000_000,
    tile: int = TILE,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Merge as ``recipe`` says and write the model to ``out``; until the last step ``out`` is what it was.

    recipe: path of a YAML file, YAML text, the same as a mapping, or a Recipe.  out: a folder, or a single
    file where the name ends in .safetensors.  seed: instead of the recipe's (default 42).  threads: default,
    all processors; the bytes do not depend on it, nor on ``tile`` (elements worked on at a time).  overrides:
    ``KEY=VALUE`` changes to the recipe (or one such change).  compat: mergekit's rules.  shard_bytes: most
    bytes of weights in one file.  fsync=False does not wait for the disk.  progress: called with a Progress
    after every piece, from worker threads, one at a time.

    Returns a Result (out, manifest, seconds).  Raises RecipeError, CheckpointError or OutputError.
    """
    from della.run import run

    for name, value in (("threads", threads), ("tile", tile), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} {value}: expected a whole number from 1 up")
    with open_plan(read(recipe, seed, overrides, compat), Path(out), overwrite) as made:
        return run(
            made, Path(out), threads=threads or default_threads(), overwrite=overwrite, fsync=fsync,
            shard_bytes=shard_bytes, tile=tile, progress=progress,
        )  # fmt: skip


def plan(
    recipe: Source, *, seed: int | None = None, overrides: Sequence[str] | str = (), compat: bool = False
) -> Plan:
    """What `merge` would do, from headers alone: a Plan (jobs, bytes, notes, departures); close it, or use it
    in a with-block.  Arguments and errors as for `merge`.
    """
    return make_plan(read(recipe, seed, overrides, compat), weights=False)


def open_plan(recipe: Recipe, out: Path, overwrite: bool) -> Plan:
    """The Plan of a merge into ``out``, which is looked at before a model is downloaded."""
    check_place(Path(os.path.abspath(out)), overwrite, out.suffix == ".safetensors")
    return make_plan(recipe)


def read(recipe: Source, seed: int | None, overrides: Sequence[str] | str, compat: bool) -> Recipe:
    """The recipe with ``seed`` and ``compat`` written into it, so that its text alone repeats the merge."""
    changes = [overrides] if isinstance(overrides, str) else list(overrides)
    changes += [] if seed is None else [f"seed={seed}"]
    changes += ["compat=mergekit"] if compat else []
    if not isinstance(recipe, Recipe):
        return read_recipe(recipe, overrides=changes)
    if not changes:
        return recipe
    return replace(read_recipe(recipe.text + "\n", overrides=changes), path=recipe.path)
