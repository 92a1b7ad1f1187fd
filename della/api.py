"""The library's way in: `della.merge`, `della.plan` and `della.verify`, from a recipe to a model on disk.

The command line calls the same three drivers (`run_merge`, `run_plan`, `run_verify`), with options as
values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della.options import TILE, Changes, Checks, Execution, Permissions, Share, Target
from della.output.disk import refusals_of_system
from della.planning.documents import Planned, plan_documents
from della.planning.job import Plan
from della.planning.planner import make_plan
from della.recipe.documents import read_documents
from della.recipe.reader import Recipe

if TYPE_CHECKING:
    from della.running.run import Progress, Result
    from della.running.verify import Verdict

Source = str | Path | Mapping[str, Any] | Recipe


def merge(
    recipe: Source, out: str | Path, *,
    seed: int | None = None, threads: int | None = None, overwrite: bool | str = False,
    overrides: Sequence[str] | str = (), compat: bool = False, fsync: bool = True,
    shard_bytes: int = 5_000_000_000, tile: int = TILE, part: tuple[int, int] = (1, 1), finish: bool = False,
    allow_pickle: bool = False, keep_auto_map: bool = False, allow_idle: bool = False,
    record_paths: bool = False, lenient: bool = False, keep_intermediates: bool = False,
    progress: Callable[[Progress], None] | bool | None = None, tell: Callable[[str], None] | None = None,
) -> Result:  # fmt: skip
    """Merge as ``recipe`` says and write the model to ``out``; until the last step ``out`` is what it was.

    A run that was cut short is resumed by the same call.

    Args:
        recipe: path of a YAML file, YAML text, the same as a mapping, or a Recipe.
        out: a folder, or a single file where the name ends in .safetensors.
        seed: instead of the recipe's (default 42).
        threads: by default as many as there are processors; the bytes do not depend on it.
        overwrite: ``out`` may be replaced where della has made it; "any": if it is a model.
        overrides: ``KEY=VALUE`` changes to the recipe, or one such change.
        compat: follow mergekit's rules where they differ.
        fsync: wait until ``out`` is safe on the disk.
        shard_bytes: most bytes of weights in one file.
        tile: elements worked on at a time; the bytes do not depend on it.
        part: (i, n) computes only the i-th of n shares of the files, in any process or host.
        finish: check what all parts have computed, and make ``out`` of it.
        allow_pickle: read .bin and .pt files too, by torch and as weights only.
        keep_auto_map: keep what the base's configuration says of code of its own.
        allow_idle: merge although a model takes no part, or changes nothing.
        record_paths: keep absolute paths of models in della.json and README.md.
        lenient: ignore keys of the recipe that are not known, with a note.
        keep_intermediates: keep the results of a recipe's other documents, in a folder beside ``out``.
        progress: True shows a bar, in notebooks too; a function is called with a Progress after every piece,
            from worker threads, one at a time.
        tell: called with notes on resuming.

    Returns:
        A Result: out, manifest, seconds, bytes.

    Raises:
        RecipeError: the recipe or an argument cannot be.
        CheckpointError: an input is missing, damaged, or does not fit the others.
        OutputError: ``out`` cannot be written.

    Example:
        >>> import della
        >>> result = della.merge("recipe.yml", "out", overrides="weight=0.5")
        >>> sorted(path.name for path in result.out.iterdir())
        ['README.md', 'della.json', 'model.safetensors']
    """
    target = Target(Path(out), overwrite, record_paths)
    changes = Changes(seed, _several(overrides), compat, lenient)
    execution = Execution(threads, shard_bytes, Share(*part), finish, fsync, tile, keep_intermediates)
    permissions = Permissions(allow_pickle, keep_auto_map, allow_idle)
    from della.running.bar import shown

    with shown(progress, "merging") as update:
        return run_merge(recipe, target, changes, execution, permissions, progress=update, tell=tell)


def plan(
    recipe: Source,
    *,
    seed: int | None = None,
    overrides: Sequence[str] | str = (),
    compat: bool = False,
    allow_pickle: bool = False,
    allow_idle: bool = False,
    lenient: bool = False,
) -> Plan:
    """What `merge` would do, from headers alone.

    Args:
        recipe: as for `merge`, and so are all others.
        seed: instead of the recipe's.
        overrides: changes to the recipe.
        compat: follow mergekit's rules.
        allow_pickle: read .bin and .pt files too.
        allow_idle: as for `merge`.
        lenient: as for `merge`.

    Returns:
        A Plan (jobs, bytes, notes, departures); close it, or use it in a with-block.

    Raises:
        RecipeError: the recipe or an argument cannot be.
        CheckpointError: an input is missing, damaged, or does not fit the others.

    Example:
        >>> import della
        >>> with della.plan("recipe.yml") as found:
        ...     found.jobs[0].name, found.bytes_written
        ('w', 8)
    """
    permissions = Permissions(allow_pickle=allow_pickle, allow_idle=allow_idle)
    return run_plan(recipe, Changes(seed, _several(overrides), compat, lenient), permissions)


def verify(
    out: str | Path,
    *,
    sources: float | None = None,
    inputs: bool = False,
    strict: bool = False,
    base_dir: str | Path | None = None,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Verdict:
    """Compare every byte of a merged model with its manifest.

    Args:
        out: a folder or file that `merge` wrote.
        sources: also compute this share (0 to 1, at least one tensor) of the tensors again, chosen at random.
        inputs: also compare the inputs with what was read when they were merged.  Both open the models that
            the recipe in the manifest names.
        strict: a model card that was edited is a fault, too, and not only told.
        base_dir: where its relative paths start, by default the working directory, or the nearest folder
            above ``out`` that holds them all.
        allow_pickle: as for `merge`.
        threads: by default as many as there are processors.
        progress: as for `merge`; it begins anew for what is computed again.

    Returns:
        A Verdict: is_well, bad (what is wrong), notes, counts.

    Raises:
        OutputError: there is nothing to verify.
        RecipeError: an argument cannot be, or the recipe in the manifest is none.
        CheckpointError: inputs cannot be opened.

    Example:
        >>> import della
        >>> out = della.merge("recipe.yml", "out.safetensors").out
        >>> verdict = della.verify(out, sources=1.0, inputs=True)
        >>> verdict.is_well, verdict.tensors, verdict.recomputed, verdict.inputs
        (True, 1, 1, 2)
    """
    checks = Checks(sources, inputs, strict, None if base_dir is None else Path(base_dir))
    permissions = Permissions(allow_pickle=allow_pickle)
    from della.running.bar import shown

    with shown(progress, "verifying") as update:
        return run_verify(Path(out), checks, permissions, Execution(threads), progress=update)


# ---- the drivers: options as values -----------------------------------------------------------------------


def run_merge(
    recipe: Source, target: Target, changes: Changes, execution: Execution, permissions: Permissions, *,
    progress: Callable[[Progress], None] | None = None, tell: Callable[[str], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Result:  # fmt: skip
    """As `merge`; ``on_plan`` is called with the plan, before the first byte is computed."""
    with refusals_of_system(target.out):
        return _merged(read(recipe, changes), target, execution, permissions, progress, tell, on_plan)


def _merged(
    read_in: Recipe, target: Target, execution: Execution, permissions: Permissions,
    progress: Callable[[Progress], None] | None, tell: Callable[[str], None] | None,
    on_plan: Callable[[Plan], None] | None,
) -> Result:  # fmt: skip
    if read_in.others:
        from della.running.documents import run_documents

        return run_documents(
            read_in, target, execution, permissions, progress=progress, tell=tell, on_plan=on_plan
        )
    with make_plan(read_in, target=target, permissions=permissions) as made:
        if on_plan is not None:
            on_plan(made)
        from della.running.run import run

        return run(made, target, execution, permissions, progress=progress, tell=tell)


def run_plan(recipe: Source, changes: Changes, permissions: Permissions, sample: bool = False) -> Plan:
    """As `plan`; with ``sample`` some of each tensor is read, and the coverage has what that says."""
    with refusals_of_system():
        return _planned(
            plan_documents(read(recipe, changes), weights=sample, permissions=permissions), sample
        )


def _planned(made: Plan, sample: bool) -> Plan:
    for each in (*made.before, made) if sample else ():
        if any(isinstance(source, Planned) for source in each.sources):
            continue  # of what is not merged yet there is no sample
        from della.running import measure

        each.coverage = measure.sampled(each)
        each.notes += tuple(measure.warnings(each, each.coverage))
    return made


def run_verify(
    out: Path, checks: Checks, permissions: Permissions, execution: Execution, *,
    progress: Callable[[Progress], None] | None = None,
) -> Verdict:  # fmt: skip
    """As `verify`."""
    from della.running.verify import verify

    with refusals_of_system(out):
        return verify(out, checks, permissions, execution, progress)


def read(recipe: Source, changes: Changes) -> Recipe:
    """The recipe with ``changes`` written into it, so that its text alone repeats the merge."""
    lines = [*changes.overrides]
    lines += [] if changes.seed is None else [f"seed={changes.seed}"]
    lines += ["compat=mergekit"] if changes.compat else []
    if not isinstance(recipe, Recipe):
        # make_plan checks, with all other checks
        return read_documents(recipe, overrides=lines, lenient=changes.lenient)
    if not lines:
        return recipe
    found = read_documents(recipe.text + "\n", overrides=lines)
    others = tuple(replace(other, path=recipe.path) for other in found.others)
    return replace(found, path=recipe.path, others=others)


def _several(overrides: Sequence[str] | str) -> tuple[str, ...]:
    return (overrides,) if isinstance(overrides, str) else tuple(overrides)
