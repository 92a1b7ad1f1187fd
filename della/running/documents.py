"""Merge a recipe of several documents: one after the other, and the last into OUT (output/between.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from della.checkpoint.source import Source
from della.errors import OutputError, Problem, RecipeError
from della.options import Checks, Execution, Permissions, Target, spelt
from della.output.between import Between, opened
from della.output.place import check_space
from della.planning.documents import plan_documents
from della.planning.job import Plan
from della.planning.planner import make_plan
from della.recipe.models import Recipe
from della.running.run import Progress, Result, key_of, run, stamps_of
from della.running.verify import verify


def run_documents(
    recipe: Recipe, target: Target, execution: Execution, permissions: Permissions, *,
    progress: Callable[[Progress], None] | None = None, tell: Callable[[str], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Result:  # fmt: skip
    """Merge all documents of ``recipe``; all that is wrong with any of them is told before the first byte.

    Raises RecipeError, CheckpointError and OutputError.
    """
    if execution.finish or not execution.part.is_whole:
        option = spelt(Execution, "finish" if execution.finish else "part")
        said = f"a recipe of {len(recipe.others) + 1} documents is merged by one process"
        raise RecipeError(Problem(said, f"leave out {option}, or give each document a file of its own"))
    say, count = tell or (lambda text: None), len(recipe.others) + 1
    with plan_documents(recipe, target=target, permissions=permissions) as plan:
        every = (*plan.before, plan)
        needed = sum(each.bytes_written for each in every)
        check_space(Path(os.path.abspath(target.out)).parent, needed, Between(target.out).taken)
        if on_plan is not None:
            on_plan(plan)
    with Between(target.out) as between, ExitStack() as stack:
        given: dict[str, Source] = {}
        for number, each in enumerate(recipe.others, 1):
            place, name = between.place(number, each.name), str(each.name)
            with make_plan(each, permissions=permissions, given=given) as made:
                if between.holds(place, _key(made, target, permissions), _is_well):
                    say(f"document {number} of {count}, {name}, was merged before")
                else:
                    say(f"document {number} of {count}: {name}")
                    own = replace(target, out=place, overwrite=False)
                    run(made, own, execution, permissions, progress=progress, tell=tell)
            given[name] = stack.enter_context(opened(place, name))
        say(f"document {count} of {count}: {target.out}")
        with make_plan(recipe, target=target, permissions=permissions, given=given) as made:
            result = run(made, target, execution, permissions, progress=progress, tell=tell)
        stack.close()
        if execution.keep_intermediates:
            say(f"the results of the other documents are kept in {between.folder}")
        else:
            _remove(between, target.out)
    return result


def _remove(between: Between, out: Path) -> None:
    try:
        between.remove()
    except OutputError as error:
        raise OutputError(
            *(replace(p, said=f"{p.said} ({out} is complete)") for p in error.problems)
        ) from error


def _is_well(place: Path) -> bool:
    return verify(place, Checks(), Permissions(), Execution()).is_well


def _key(plan: Plan, target: Target, permissions: Permissions) -> str:
    """What a document's whole result depends on: its tensors, and the files that stand beside them."""
    files = [*plan.base.side_files().values(), plan.base.folder / "config.json"]
    found = [(str(path), os.stat(path)) for path in files if path.exists()]
    beside = [(path, each.st_size, each.st_mtime_ns) for path, each in found]
    return f"{key_of(plan, stamps_of(plan), 0)} {beside} {permissions} {target.record_paths}"
