"""What is checked, and told, of all jobs of a plan together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from della.dtypes import round_to, widen
from della.errors import CheckpointError, Problem, RecipeError, some
from della.options import Changes, spelt
from della.planning.job import Job, Model
from della.recipe.reader import Recipe

_SOON_READ = 1 << 20  # elements of a tensor that a plan reads without delay


def check_whole_model(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """What a method learns of the whole model is of one kind: the same settings, and float32, everywhere."""
    whole = [(job, why) for job in jobs if job.method and (why := job.method.whole_model)]
    kinds = {(type(job.method), *(each.identity for each in job.experts)) for job, _ in whole}
    if len(kinds) > 1:
        why = whole[0][1]
        said = f"{why.option} {why.does}, and parts of the model are of other models or methods"
        fix = f"use {why.instead}, or the same sources and merge_method in every part"
        raise RecipeError(recipe.located(Problem(said, fix, parameter=why.option.parameter)))
    for why in dict.fromkeys(why for _, why in whole):
        mine, parameter = [job for job, own in whole if own is why], why.option.parameter
        for name in why.same:
            if len({tuple(job.subject.column(name)) for job in mine}) > 1:
                said = f"{why.option} {why.does}, so {name} must be the same for all tensors"
                fix = f"use {why.instead}, or a {name} without gradient and filter"
                raise RecipeError(recipe.located(Problem(said, fix, parameter=parameter)))
        double = [job.name for job in mine if job.exact_double]
        if double:
            said = f"{why.option} compares all tensors in float32, and {some(double)} of an input is float64"
            fix = f"use {why.instead}, or save that model in float32 first"
            raise RecipeError(recipe.located(Problem(said, fix, parameter=parameter), double[0]))


def check_compat(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """mergekit's rules cannot be followed where it has no such option; nothing is ignored in silence."""
    for job in jobs if recipe.compat else ():
        found = job.method.beyond_mergekit() if job.method else {}
        if found:
            said = "compat: mergekit has no " + ", ".join(f"{key}: {value}" for key, value in found.items())
            fix = f"remove it, or do without compat (of the recipe, or {spelt(Changes, 'compat', True)})"
            problem = Problem(said, fix, parameter=next(iter(found)))
            raise RecipeError(recipe.located(problem, job.name))


def ranked(models: Sequence[Model], jobs: Sequence[Job]) -> list[str]:
    """A note for each model on how many tensors are ranked by its input norms, and how many without."""
    notes = []
    told = [each for job in jobs if job.method and job.method.wants_norms for each in job.operands]
    for model in models:
        mine = [each.norms is not None for each in told if each.model is model]
        if mine:
            said = f"{sum(mine)} of {len(mine)} tensors are ranked by |delta| times input norms"
            rest = "" if all(mine) else "; the others have none, and are ranked by |delta|"
            notes.append(f"{model.entry.reference}: {said}{rest}")
    whole = [(job.method.whole_model, each) for job in jobs if job.method for each in job.operands]
    for why in dict.fromkeys(why for why, _ in whole if why and notes):
        if len({each.norms is None for own, each in whole if own is why}) > 1:
            notes.append(
                f"{why.option} compares saliency with and without input norms, which is of different scales"
            )
    return notes


def islands(jobs: Sequence[Job]) -> list[str]:
    """A note where the recipe's dtype is narrower than what a few tensors of the base are stored in, which
    is so for a reason: routers, decays, norms."""
    floats = [job for job in jobs if job.base.dtype.is_float and job.elements]
    sizes: Counter[str] = Counter()
    for job in floats:
        sizes[job.base.dtype.name] += job.elements
    usual = sizes.most_common(1)[0][0] if sizes else ""
    cut = [job for job in floats if job.base.dtype.name != usual and job.dtype.bits < job.base.dtype.bits]
    if not cut:
        return []
    wide, narrow = cut[0].base.dtype.torch_name, cut[0].dtype.torch_name
    said = f"{some([job.name for job in cut])} stored in {wide} in the base, and cut to {narrow} by dtype"
    return [f"{said}: {_lost(cut)}; leave out 'dtype' to keep each tensor's own type"]


def _lost(jobs: Sequence[Job]) -> str:
    """How many of the base's own values a narrower type cannot hold, where that is soon read."""
    small = [job for job in jobs if job.elements <= _SOON_READ]
    try:
        pairs = [
            (values, round_to(values, job.dtype)) for job in small for values in [widen(job.base.read())]
        ]
    except (CheckpointError, OSError):
        return "how many values that changes is not known before the merge"
    changed = sum(int(np.count_nonzero(widen(cut) != values)) for values, cut in pairs)
    return f"that changes {changed:,} of {sum(values.size for values, _ in pairs):,} values"


def storage(jobs: Sequence[Job]) -> list[str]:
    """A note for each model that is stored in another type than the base."""
    found: dict[str, None] = {}
    for job in jobs:
        for each in job.operands:
            if each.view.dtype is not job.base.dtype:
                theirs, ours = each.view.dtype.torch_name, job.base.dtype.torch_name
                said = f"{each.model.entry.reference}: stored in {theirs}, the base in {ours}"
                found[f"{said}; the result is stored in {job.dtype.torch_name}"] = None
    return list(found)
