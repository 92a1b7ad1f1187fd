"""From a recipe and headers to a Plan: one job per output tensor.  Nothing is read but headers.

All that can be found wrong before the first byte is told at once: inputs, recipe, place of the result.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from della.checkpoint.layout import Tensor
from della.checkpoint.norms import misfits
from della.checkpoint.source import Source, open_file, open_source
from della.dtypes import DType
from della.errors import CheckpointError, DellaError, RecipeError, together
from della.merging.methods import choice, expert
from della.output.place import check_place, check_space, is_name
from della.output.staging import staged_bytes
from della.planning.compatibility import check_fit, extras, foreign_code, some, stand_in
from della.planning.differences import departures
from della.planning.job import Input, Job, Plan
from della.recipe.reader import ModelEntry, Recipe

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
# Settings that mergekit does not know, at what it does.
_USUAL = {
    "rank_by": "row",
    "importance": "magnitude",
    "ladder": "symmetric",
    "coupling": "independent",
    "scope": "tensor",
    "lambda_scaling": "constant",
}


@dataclass(frozen=True)
class Target:
    """Where a result shall go, and whether it may replace what is there."""

    out: Path
    overwrite: bool

    @property
    def is_single(self) -> bool:
        """Whether it is one file."""
        return self.out.suffix == ".safetensors"


@dataclass(frozen=True)
class Permissions:
    """What only the caller, and never a recipe, may allow."""

    pickle: bool = False
    auto_map: bool = False


def make_plan(
    recipe: Recipe, *, weights: bool = True, target: Target | None = None,
    permissions: Permissions = Permissions(),
) -> Plan:  # fmt: skip
    """Open the inputs of ``recipe`` and decide about every output tensor.

    ``weights=False`` is enough for looking: models of the Hub are then opened by their headers alone.  With
    ``target`` the place of the result is looked at too, before anything is downloaded.  Raises RecipeError,
    CheckpointError or OutputError, which lists everything that is wrong.
    """
    check = _Check()
    with ExitStack() as stack:
        with check:
            _check_target(target, ())
        weights = weights and not check.errors  # no download for a merge that cannot be
        opened = _open_all(recipe, weights, permissions, stack, check)
        norms = _open_norms(recipe, stack, check)
        with check:
            _check_target(target, [*opened.values(), *filter(None, norms)])
        models = tuple(opened[m.reference] for m in recipe.models if m.reference in opened)
        base = opened.get(_template(recipe))
        notes = list(recipe.notes)
        depths = _depths(base.tensors if base else ())
        with check:
            recipe.check_at_once()
            recipe.check((name, *at) for name, at in depths.items())
        if base is not None:
            with check:
                base.side_files()
            problems, said = check_fit(recipe, base, models)
            problems += [text for each in dict.fromkeys(filter(None, norms)) for text in misfits(each, base)]
            notes += said
            with check:
                if problems:
                    raise CheckpointError(*problems)
            with check:
                _check_space(target, recipe, base, models)
        check.raise_any()
        assert base is not None
        jobs = tuple(_jobs(recipe, base, models, norms, depths))
        _check_scope(jobs)
        _check_compat(recipe, jobs)
        notes += [*_storage(models, jobs), *_ranked(recipe, jobs), *foreign_code(base, permissions.auto_map)]
        made = tuple(departures(recipe, jobs))
        return Plan(recipe, base, models, norms, jobs, tuple(notes), made, stack.pop_all())


class _Check:
    """Collects errors, so that all are told at once; a context manager for each step."""

    def __init__(self) -> None:
        self.errors: list[DellaError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, DellaError):
            self.errors.append(error)
            return True
        return False

    def raise_any(self) -> None:
        if self.errors:
            raise together(self.errors) from self.errors[0]


def _template(recipe: Recipe) -> str:
    """The model that gives names, shapes and side files: the base, or the first model without one."""
    references = [m.reference for m in recipe.models]
    has_part = recipe.method.needs_base or recipe.base_model in references
    return recipe.base_model if recipe.base_model and has_part else references[0]


def _open_all(
    recipe: Recipe, weights: bool, permissions: Permissions, stack: ExitStack, check: _Check
) -> dict[str, Source]:
    """Every model by its reference, but those that cannot be opened."""
    folder = recipe.path.parent if recipe.path else None
    opened: dict[str, Source] = {}
    for reference in dict.fromkeys([_template(recipe), *(m.reference for m in recipe.models)]):
        with check:
            opened[reference] = stack.enter_context(
                open_source(reference, base_dir=folder, weights=weights, allow_pickle=permissions.pickle)
            )
    return opened


def _open_norms(recipe: Recipe, stack: ExitStack, check: _Check) -> tuple[Source | None, ...]:
    """Each model's file of input norms; None where it has none, or one that cannot be opened."""
    folder = recipe.path.parent if recipe.path else None
    opened: dict[str | None, Source] = {}
    for model in recipe.models:
        if model.input_norms and model.input_norms not in opened:
            with check:
                opened[model.input_norms] = stack.enter_context(_open_file(model, folder))
    return tuple(opened.get(model.input_norms) for model in recipe.models)


def _open_file(model: ModelEntry, folder: Path | None) -> Source:
    try:
        return open_file(str(model.input_norms), base_dir=folder)
    except CheckpointError as error:
        told = [replace(p, location=model.norms_location, parameter="input_norms") for p in error.problems]
        raise CheckpointError(*told) from error


def _check_target(target: Target | None, sources: Iterable[Source]) -> None:
    if target is not None:
        inputs = [path for source in sources for path in source.places]
        out = Path(os.path.abspath(target.out))
        check_place(out, target.overwrite, target.is_single, inputs)


def _check_space(target: Target | None, recipe: Recipe, base: Source, models: Sequence[Source]) -> None:
    if target is None or not is_name(target.out):
        return
    needed = sum(math.prod(t.shape) * _stored_as(recipe, t).bytes for t in base.tensors.values())
    needed += sum(tensor.nbytes for _, tensor in _copied(recipe, base, models))
    out = Path(os.path.abspath(target.out))
    check_space(out.parent, needed - staged_bytes(out))


def _stored_as(recipe: Recipe, tensor: Tensor) -> DType:
    """The storage dtype of a tensor of the result."""
    return (recipe.out_dtype or recipe.dtype or tensor.dtype) if tensor.dtype.is_float else tensor.dtype


def _depths(names: Iterable[str]) -> dict[str, tuple[float, str]]:
    """(t, label) of each tensor: its layer's place in its own stack of layers, by the first number in its
    name.

    As in mergekit, t is 0 for what stands outside the layers (embeddings, final norm, head) and 1 where a
    stack has a single layer.
    """
    layers = {name: _LAYER.match(name) for name in names}
    last: dict[str, int] = {}
    for match in layers.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    depths = {}
    for name, match in layers.items():
        if match is None:
            depths[name] = (0.0, "")
        else:
            index, top = int(match[2]), last[match[1]]
            depths[name] = (index / top if top else 1.0, f"layer {index}")
    return depths


def _jobs(
    recipe: Recipe, base: Source, models: Sequence[Source], norms: Sequence[Source | None],
    depths: Mapping[str, tuple[float, str]],
) -> Iterator[Job]:  # fmt: skip
    for name, (t, _) in depths.items():
        yield _job(recipe, name, t, base, models, norms)
    for model, tensor in _copied(recipe, base, models):
        yield Job(tensor.name, tensor.shape, tensor.dtype, model, tensor, None)


def _copied(recipe: Recipe, base: Source, models: Sequence[Source]) -> Iterator[tuple[Source, Tensor]]:
    """The tensors that the base lacks, where they shall be in the result (extra: copy)."""
    for model in dict.fromkeys(models if recipe.extra == "copy" else ()):
        if model is not base:
            yield from ((model, model.tensors[name]) for name in extras(base, model))


def _job(
    recipe: Recipe, name: str, t: float, base: Source, models: Sequence[Source],
    norms: Sequence[Source | None],
) -> Job:  # fmt: skip
    tensor = base.tensors[name]
    dtype = _stored_as(recipe, tensor)
    if not tensor.dtype.is_float:
        return Job(name, tensor.shape, dtype, base, tensor, None)
    shared, values = recipe.resolve(name, t)
    experts = [expert(m.identity, own) for m, own in zip(recipe.models, values, strict=True)]
    picked = choice(recipe.method, shared, (recipe.dtype or tensor.dtype) if recipe.compat else None)
    inputs = []
    for k in sorted(range(len(experts)), key=lambda k: experts[k].identity):
        found = stand_in(recipe, base, models[k], name)
        assert found is not None, "check_fit has looked"
        file = norms[k] if picked.importance == "wanda" and 0 not in tensor.shape else None
        own = (file, file.tensors[name]) if file and name in file.tensors else None
        inputs.append(Input(k, *found, experts[k], own))
    return Job(name, tensor.shape, dtype, base, tensor, picked, tuple(inputs), shared, values)


def _check_scope(jobs: Sequence[Job]) -> None:
    """With scope: model there is one threshold for the model: each expert has one density, and one type."""
    whole = [job for job in jobs if job.choice and job.choice.drop == "top" and job.choice.scope == "model"]
    if len({tuple(e.density for e in job.experts) for job in whole}) > 1:
        raise RecipeError(
            "scope: model chooses one threshold for the whole model, so density must be the same for all "
            "tensors; use scope: tensor, or a density without gradient and filter"
        )
    double = [job.name for job in whole if job.exact_double]
    if double:
        raise RecipeError(
            f"scope: model compares all tensors in float32, and {some(double)} of an input is float64; "
            "use scope: tensor, or save that model in float32 first"
        )


def _check_compat(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """mergekit's rules cannot be followed where it has no such option; nothing is ignored in silence."""
    for job in jobs if recipe.compat else ():
        found = [f"{k}: {v}" for k, usual in _USUAL.items() if (v := getattr(job.choice, k, usual)) != usual]
        if job.choice and job.choice.fuse == "calibrated":
            found.append("fuse: calibrated")
        if job.choice and job.choice.vote == "unweighted":
            found.append("vote: unweighted")
        if recipe.method.defaults.get("vote") == "unweighted":
            found = [f"merge_method {recipe.merge_method}"]
        if found:
            raise RecipeError(
                f"compat: mergekit has no {', '.join(found)}; remove it, or do without compat (--compat)"
            )


def _ranked(recipe: Recipe, jobs: Sequence[Job]) -> list[str]:
    """A note for each model on how many tensors are ranked by its input norms, and how many without."""
    notes = []
    for k, model in enumerate(recipe.models):
        mine = [
            e for j in jobs if j.choice and j.choice.importance == "wanda" for e in j.inputs if e.model == k
        ]
        with_norms = sum(each.norms is not None for each in mine)
        if mine:
            said = f"{with_norms} of {len(mine)} tensors are ranked by |delta| times input norms"
            rest = "the others have none, and are ranked by |delta|"
            notes.append(f"{model.reference}: {said}" + (f"; {rest}" if with_norms < len(mine) else ""))
    whole = [each for job in jobs if job.choice and job.choice.scope == "model" for each in job.inputs]
    if notes and len({each.norms is None for each in whole}) > 1:
        notes.append(
            "scope: model compares scores with and without input norms, which are of different scales"
        )
    return notes


def _storage(models: Sequence[Source], jobs: Sequence[Job]) -> list[str]:
    """A note for each model that is stored in another type than the base."""
    found: dict[str, None] = {}
    for job in jobs:
        for each in job.inputs:
            if each.tensor.dtype is not job.base.dtype:
                theirs, ours = each.tensor.dtype.torch_name, job.base.dtype.torch_name
                result = f"the result is stored in {job.dtype.torch_name}"
                found[f"{models[each.model].reference}: stored in {theirs}, the base in {ours}; {result}"] = (
                    None
                )
    return list(found)
