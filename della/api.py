"""The library's way in: `della.merge`, `della.plan` and `della.verify`, from a recipe to a model on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della.errors import RecipeError
from della.planning.job import TILE, Plan, default_threads
from della.planning.planner import Permissions, Target, make_plan
from della.recipe.reader import Recipe, read_recipe

if TYPE_CHECKING:
    from della.running.run import Progress, Result

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
    part: tuple[int, int] = (1, 1),
    finish: bool = False,
    allow_pickle: bool = False,
    keep_auto_map: bool = False,
    progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Merge as ``recipe`` says and write the model to ``out``; until the last step ``out`` is what it was.

    recipe: path of a YAML file, YAML text, the same as a mapping, or a Recipe.  out: a folder, or a single
    file where the name ends in .safetensors.  seed: instead of the recipe's (default 42).  threads: default,
    all processors; the bytes do not depend on it, nor on ``tile`` (elements worked on at a time).  overrides:
    ``KEY=VALUE`` changes to the recipe (or one such change).  compat: mergekit's rules.  shard_bytes: most
    bytes of weights in one file.  fsync=False does not wait for the disk.  part: (i, n) computes only the
    i-th of n shares of the files, in as many processes or hosts as you like; then ``finish`` checks all and
    makes ``out`` of them.  allow_pickle: read .bin and .pt files too, by torch and as weights only.
    keep_auto_map: keep what the base's configuration says of code of its own.  progress: called with a
    Progress after every piece, from worker threads, one at a time.  tell: called with notes on resuming.

    A run that was cut short is gone on with by the same call.  Returns a Result (out, manifest, seconds).
    Raises RecipeError, CheckpointError or OutputError.
    """
    from della.running.run import Options, run

    for name, value in (("threads", threads), ("tile", tile), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} {value}: expected a whole number from 1 up")
    check_part(part, finish)
    target, permissions = Target(Path(out), overwrite), Permissions(allow_pickle, keep_auto_map)
    options = Options(
        threads or default_threads(), overwrite, fsync, shard_bytes, tile, part, finish, keep_auto_map,
        progress, tell,
    )  # fmt: skip
    read_in = read(recipe, seed, overrides, compat)
    with make_plan(read_in, target=target, permissions=permissions) as made:
        return run(made, Path(out), options)


def plan(
    recipe: Source,
    *,
    seed: int | None = None,
    overrides: Sequence[str] | str = (),
    compat: bool = False,
    allow_pickle: bool = False,
) -> Plan:
    """What `merge` would do, from headers alone: a Plan (jobs, bytes, notes, departures); close it, or use it
    in a with-block.  Arguments and errors as for `merge`.
    """
    permissions = Permissions(pickle=allow_pickle)
    return make_plan(read(recipe, seed, overrides, compat), weights=False, permissions=permissions)


def check_part(part: tuple[int, int], finish: bool) -> None:
    """Refuse a part that cannot be (RecipeError)."""
    number, count = part
    if not 1 <= number <= count:
        raise RecipeError(f"part {number}/{count}: expected i/n with 1 <= i <= n, such as 2/7")
    if finish and count > 1:
        raise RecipeError("finish puts all parts together; leave out part")


def read(recipe: Source, seed: int | None, overrides: Sequence[str] | str, compat: bool) -> Recipe:
    """The recipe with ``seed`` and ``compat`` written into it, so that its text alone repeats the merge."""
    changes = [overrides] if isinstance(overrides, str) else list(overrides)
    changes += [] if seed is None else [f"seed={seed}"]
    changes += ["compat=mergekit"] if compat else []
    if not isinstance(recipe, Recipe):
        return read_recipe(recipe, overrides=changes, check=False)  # make_plan does, with all other checks
    if not changes:
        return recipe
    return replace(read_recipe(recipe.text + "\n", overrides=changes, check=False), path=recipe.path)
