"""How much of each model takes part in a merge, counted from its jobs: no merge that silently is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from della.checkpoint.source import Source
from della.checkpoint.view import TensorView
from della.errors import CheckpointError, Collector, Problem, RecipeError, distinct
from della.options import Permissions, spelt
from della.planning.job import Coverage, Job, Model
from della.planning.layers import Moved
from della.recipe.reader import Recipe

ABSENT = "not in the result"


def cure(each: Coverage, coverage: Sequence[Coverage]) -> str:
    """What to do about a model that takes no part, or changes nothing; without it a merge must be left."""
    if not any(other.changed for other in coverage if other is not each):
        return "nothing would be merged: give models and parameters that change something"
    return f"take it out of the recipe; or {spelt(Permissions, 'allow_idle', True)} lets it pass"


def covered(models: Sequence[Model], base: Source, jobs: Sequence[Job]) -> tuple[Coverage, ...]:
    """The coverage of each of ``models``, in their order, as far as headers and parameters tell it."""
    used: dict[Model, set[str]] = {model: set() for model in models}
    idle: dict[Model, dict[str, str]] = {model: {} for model in models}
    changed = dict.fromkeys(models, 0)
    by_source: dict[Source, Model] = {}
    for model in models:
        by_source.setdefault(model.source, model)
    homes = {id(view): model for source, model in by_source.items() for view in source.tensors.values()}
    for job in jobs:
        if job.method is None:
            if job.dtype.is_float and (home := homes.get(id(_own(job.base)))):
                used[home].add(_own(job.base).name)  # extra: copy, or of no module
                changed[home] += 1
            continue
        for each in job.operands:
            if each.view is job.base and each.model.source is not base and job.method.needs_base:
                continue  # missing: base
            if parameter := job.method.idle_by(each.expert):
                idle[each.model][_own(each.view).name] = f"without effect ({parameter}: 0)"
                continue
            used[each.model].add(_own(each.view).name)
            is_base = job.reads_base and each.view is job.base
            changed[each.model] += job.elements > 0 and not is_base
    names = distinct(model.entry.reference for model in models)
    return tuple(
        _coverage(name, model, used[model], idle[model], changed[model])
        for name, model in zip(names, models, strict=True)
    )


def _own(view: TensorView) -> TensorView:
    """A tensor as its model has it, whatever number its layer has in the result."""
    return view.view if isinstance(view, Moved) else view


def _coverage(name: str, model: Model, used: set[str], idle: dict[str, str], changed: int) -> Coverage:
    floats = [tensor for tensor, view in model.source.tensors.items() if view.dtype.is_float]
    left = [(tensor, idle.get(tensor, ABSENT)) for tensor in floats if tensor not in used]
    return Coverage(name, len(used), len(floats), changed, tuple(left))


def mostly_left_out(models: Sequence[Model], base: Source, coverage: Sequence[Coverage]) -> list[str]:
    """A note on each model of which less than half takes part, in less than half of the result."""
    ours = sum(view.dtype.is_float for view in base.tensors.values())
    return [
        f"{each.reference}: only {each.merged} of its {each.of} tensors take part in the merge, fewer than "
        f"half: what else it has learnt is lost. Is it a fine-tune of {base.reference}?"
        for model, each in zip(models, coverage, strict=True)
        if model.source is not base and 0 < 2 * each.merged < min(each.of, ours)
    ]


def check_idle(
    recipe: Recipe, models: Sequence[Model], base: Source, jobs: Sequence[Job], coverage: Sequence[Coverage]
) -> None:
    """Refuses a merge in which a model takes no part; that the base itself changes nothing is no fault.

    Raises RecipeError where its parameters are the cause, else CheckpointError.
    """
    check = Collector(CheckpointError)
    for model, each in zip(models, coverage, strict=True):
        if model.source is base or each.changed:
            continue
        said = f"takes no part in the merge: {each.why or 'it has no tensor of the result'}"
        mine = ((job, own) for job in jobs for own in job.operands if own.model is model)
        parameters = (job.method.idle_by(own.expert) for job, own in mine if job.method)
        if parameter := next(filter(None, parameters), None):
            at = recipe.located(
                Problem(said, cure(each, coverage), model.entry.identity, parameter=parameter)
            )
            with check:
                raise RecipeError(replace(at, subject=each.reference))
        else:
            check.add(said, cure(each, coverage), each.reference)
    check.raise_any()
