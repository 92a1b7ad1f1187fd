"""From a recipe and headers to a Plan: one job per output tensor.  Nothing is read but headers.

All that can be found wrong before the first byte is told at once: inputs, recipe, place of the result.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from della.checkpoint.norms import misfits
from della.checkpoint.source import Source, open_file, open_source
from della.checkpoint.view import TensorView
from della.dtypes import DType, round_to, widen
from della.errors import CheckpointError, Collector, Problem, RecipeError, some
from della.merging.tile import canonical
from della.options import Changes, Permissions, Target, spelt
from della.output.place import check_place, check_space, is_name
from della.output.staging import staged_bytes
from della.planning import configs, tokenizers
from della.planning.alignment import aligned, differing_buffers, strangers
from della.planning.compatibility import check_fit, extras, foreign_code, stand_in
from della.planning.coverage import check_idle, covered, mostly_left_out
from della.planning.differences import departures
from della.planning.heads import settled
from della.planning.job import Job, Model, Operand, Plan
from della.planning.vocabularies import follow_tokens
from della.recipe.reader import ModelEntry, Recipe

_SOON_READ = 1 << 20  # elements of a tensor that a plan reads without delay


def make_plan(
    recipe: Recipe, *, weights: bool = True, target: Target | None = None,
    permissions: Permissions = Permissions(),
) -> Plan:  # fmt: skip
    """Open the inputs of ``recipe`` and decide about every output tensor.

    ``weights=False`` is enough for looking: models of the Hub are then opened by their headers alone.  With
    ``target`` the place of the result is looked at too, before anything is downloaded.  Raises RecipeError,
    CheckpointError or OutputError, which lists everything that is wrong.
    """
    check = Collector(CheckpointError)
    with ExitStack() as stack:
        with check:
            _check_target(target, ())
        weights = weights and not check  # no download for a merge that cannot be
        opened = _open_all(recipe, weights, permissions, stack, check)
        norms = _open_norms(recipe, stack, check)
        with check:
            _check_target(target, [*opened.values(), *norms.values()])
        notes = [*recipe.notes, *_align(_template(recipe), opened)]
        notes += follow_tokens(recipe, _template(recipe), opened, check)
        base = opened.get(_template(recipe))
        models = tuple(
            Model(m, opened[m.reference], norms.get(m.input_norms))
            for m in recipe.models
            if m.reference in opened
        )
        models, told = _without_base(recipe, base, models, check)
        recipe = replace(recipe, models=tuple(model.entry for model in models))
        notes += told
        depths = _depths(base.tensors if base else ())
        with check:
            recipe.check_at_once()
            if base is not None:
                recipe.check_cases([name for name, view in base.tensors.items() if view.dtype.is_float])
            recipe.check((name, *at) for name, at in depths.items())
        if base is not None:
            with check:
                base.side_files()
            notes += _check_models(recipe, base, [model.source for model in models], check)
            for each in norms.values():
                check.extend(misfits(each, base))
            with check:
                _check_space(target, recipe, base, models)
        check.raise_any()
        assert base is not None
        jobs = tuple(_jobs(recipe, base, models, depths))
        coverage = covered(models, base, jobs)
        if not permissions.allow_idle:
            check_idle(recipe, models, base, jobs, coverage)
        _check_whole_model(recipe, jobs)
        _check_compat(recipe, jobs)
        notes += [*mostly_left_out(models, base, coverage), *_about_jobs(base, models, jobs, permissions)]
        made = tuple(departures(recipe, jobs))
        return Plan(recipe, base, models, jobs, tuple(notes), made, coverage, stack.pop_all())


def _about_jobs(
    base: Source, models: Sequence[Model], jobs: Sequence[Job], permissions: Permissions
) -> list[str]:
    """Notes on what is merged, and on what is beside it."""
    notes = [*_storage(jobs), *_islands(jobs), *_ranked(models, jobs)]
    return [*notes, *foreign_code(base, permissions.keep_auto_map), *tokenizers.left_behind(base)]


def _template(recipe: Recipe) -> str:
    """The model that gives names, shapes and side files: the base, or the first model without one."""
    references = [m.reference for m in recipe.models]
    has_part = recipe.method.needs_base or recipe.base_model in references
    return recipe.base_model if recipe.base_model and has_part else references[0]


def _open_all(
    recipe: Recipe, weights: bool, permissions: Permissions, stack: ExitStack, check: Collector
) -> dict[str, Source]:
    """Every model by its reference, but those that cannot be opened."""
    folder = recipe.path.parent if recipe.path else None
    opened: dict[str, Source] = {}
    for reference in dict.fromkeys([_template(recipe), *(m.reference for m in recipe.models)]):
        with check:
            opened[reference] = stack.enter_context(
                open_source(
                    reference, base_dir=folder, weights=weights, allow_pickle=permissions.allow_pickle
                )
            )
    return opened


def _align(template: str, opened: dict[str, Source]) -> list[str]:
    """Makes of each model what takes part of it, under the names of the ``template``; notes."""
    base = opened.get(template)
    notes = [note for source in opened.values() for note in source.notes]
    for reference, source in opened.items():
        if base and source is not base:
            opened[reference], note = aligned(base, source)
            notes += [note] if note else []
    if base:
        made, told = settled(base, [source for source in opened.values() if source is not base])
        opened |= {reference: made.get(source, source) for reference, source in opened.items()}
        notes += told
    return notes


def _check_models(recipe: Recipe, base: Source, models: Sequence[Source], check: Collector) -> list[str]:
    """Notes on how ``models`` fit the base; what does not is in ``check``."""
    notes: list[str] = []
    fitting: list[Source] = []
    for source in dict.fromkeys((base, *models)):
        found = list(strangers(base, source, recipe.missing == "base"))
        check.extend(found)
        if not recipe.plain_fp8:
            check.extend(_fp8(source))
        if not found:
            fitting.append(source)
            notes += filter(None, (differing_buffers(base, source, check), configs.note(base, source)))
        if recipe.mismatch == "error" and not found:
            check.extend(configs.other_type(base, source))
    return (
        notes
        + check_fit(recipe, base, fitting, check)
        + tokenizers.compare(base, fitting, check, recipe.tokenizer)
    )


def _fp8(source: Source) -> Iterator[Problem]:
    """Float8 without a scale: codes of a scheme that is not known, or, rarely, the values themselves."""
    found = [name for name, view in source.tensors.items() if view.dtype.is_float and view.dtype.bits == 8]
    if found:
        said = f"{some(found)} stored in float8, which nearly always is codes that need a scale"
        fix = (
            "give the model in BF16, F16 or F32; if these are the values themselves, write 'plain_fp8: true'"
        )
        yield Problem(said, fix, source.reference, found[0])


def _without_base(
    recipe: Recipe, base: Source | None, models: tuple[Model, ...], check: Collector
) -> tuple[tuple[Model, ...], list[str]]:
    """The models but the base under another name, whose delta is zero; with notes, and on models of the same
    files."""
    notes: list[str] = []
    first: dict[object, str] = {}
    kept: list[Model] = []
    known = base.identity if base and base.files and recipe.method.needs_base else None
    for model in models:
        name, identity = model.entry.reference, model.source.identity
        if identity == known:
            said = "is the base model itself under another name, so it does not count as an expert"
            notes.append(f"{name}: {said}")
            continue
        earlier = first.setdefault(identity, name) if identity else name
        if earlier.rstrip("/") != name.rstrip("/"):
            notes.append(f"{name}: the same files as {earlier}; it counts as two experts")
        kept.append(model)
    if models and not kept:
        check.add("'models' lists only the base model", "add at least one expert to merge into it")
    return tuple(kept), notes


def _open_norms(recipe: Recipe, stack: ExitStack, check: Collector) -> dict[str | None, Source]:
    """Every file of input norms by its reference, but those that cannot be opened."""
    folder = recipe.path.parent if recipe.path else None
    opened: dict[str | None, Source] = {}
    for model in recipe.models:
        if model.input_norms and model.input_norms not in opened:
            with check:
                opened[model.input_norms] = stack.enter_context(_open_file(model, folder))
    return opened


def _open_file(model: ModelEntry, folder: Path | None) -> Source:
    try:
        return open_file(str(model.input_norms), base_dir=folder)
    except CheckpointError as error:
        told = [replace(p, location=model.norms_location, parameter="input_norms") for p in error.problems]
        raise CheckpointError(*told) from error


def _check_target(target: Target | None, sources: Iterable[Source]) -> None:
    if target is not None:
        inputs = [path for source in sources for path in source.paths]
        out = Path(os.path.abspath(target.out))
        check_place(out, target.overwrite, target.is_single, inputs)


def _check_space(target: Target | None, recipe: Recipe, base: Source, models: Sequence[Model]) -> None:
    if target is None or not is_name(target.out):
        return
    needed = sum(view.elements * _stored_as(recipe, view).bytes for view in base.tensors.values())
    needed += sum(view.elements * view.dtype.bytes for view in _copied(recipe, base, models))
    out = Path(os.path.abspath(target.out))
    check_space(out.parent, needed, staged_bytes(out))


def _stored_as(recipe: Recipe, view: TensorView) -> DType:
    """The storage dtype of a tensor of the result, which the base has as ``view``."""
    return (recipe.out_dtype or recipe.dtype or view.dtype) if view.dtype.is_float else view.dtype


def _depths(names: Iterable[str]) -> dict[str, tuple[float, str]]:
    """(depth, label) of each tensor: where its layer, by the first number in its name, is in its own stack.

    As in mergekit, depth is 0 for what stands outside the layers (embeddings, final norm, head) and 1 where a
    stack has a single layer.
    """
    names = list(names)
    counts, depths = configs.stacks(names), {}
    for name in names:
        match = configs.STACK.match(name)
        if match is None:
            depths[name] = (0.0, "")
        else:
            index, top = int(match[2]), counts[match[1]] - 1
            depths[name] = (index / top if top else 1.0, f"layer {index}")
    return depths


def _jobs(
    recipe: Recipe, base: Source, models: Sequence[Model], depths: Mapping[str, tuple[float, str]]
) -> Iterator[Job]:
    for name, (depth, _) in depths.items():
        yield _job(recipe, name, depth, base, models)
    for view in _copied(recipe, base, models):
        yield Job(view.name, view.shape, view.dtype, view, None)


def _copied(recipe: Recipe, base: Source, models: Sequence[Model]) -> Iterator[TensorView]:
    """The tensors that the base lacks, where they shall be in the result (extra: copy)."""
    for source in dict.fromkeys(model.source for model in models if recipe.extra == "copy"):
        if source is not base:
            yield from (source.tensors[name] for name in extras(base, source))


def _job(recipe: Recipe, name: str, depth: float, base: Source, models: Sequence[Model]) -> Job:
    view = base.tensors[name]
    dtype = _stored_as(recipe, view)
    if not view.dtype.is_float:
        return Job(name, view.shape, dtype, view, None)
    shared, values = recipe.resolve(name, depth)
    method = recipe.method(shared, (recipe.dtype or view.dtype) if recipe.compat else None)
    operands = []
    for model, own in zip(models, values, strict=True):
        found = stand_in(recipe, base, model.source, name)
        assert found is not None, "check_fit has looked"
        wanted = method.wants_norms and view.elements
        norms = model.norms.tensors.get(name) if model.norms and wanted else None
        operands.append(Operand(model, found, method.expert(model.entry.identity, own), norms))
    order = canonical([each.expert for each in operands])
    return Job(name, view.shape, dtype, view, method, tuple(operands[t] for t in order))


def _check_whole_model(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """What a method learns of the whole model is of one kind: the same settings, and float32, everywhere."""
    whole = [(job, why) for job in jobs if job.method and (why := job.method.whole_model)]
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


def _check_compat(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """mergekit's rules cannot be followed where it has no such option; nothing is ignored in silence."""
    for job in jobs if recipe.compat else ():
        found = job.method.beyond_mergekit() if job.method else {}
        if found:
            said = "compat: mergekit has no " + ", ".join(f"{key}: {value}" for key, value in found.items())
            fix = f"remove it, or do without compat (of the recipe, or {spelt(Changes, 'compat', True)})"
            problem = Problem(said, fix, parameter=next(iter(found)))
            raise RecipeError(recipe.located(problem, job.name))


def _ranked(models: Sequence[Model], jobs: Sequence[Job]) -> list[str]:
    """A note for each model on how many tensors are ranked by its input norms, and how many without."""
    notes = []
    ranked = [each for job in jobs if job.method and job.method.wants_norms for each in job.operands]
    for model in models:
        mine = [each.norms is not None for each in ranked if each.model is model]
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


def _islands(jobs: Sequence[Job]) -> list[str]:
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


def _storage(jobs: Sequence[Job]) -> list[str]:
    """A note for each model that is stored in another type than the base."""
    found: dict[str, None] = {}
    for job in jobs:
        for each in job.operands:
            if each.view.dtype is not job.base.dtype:
                theirs, ours = each.view.dtype.torch_name, job.base.dtype.torch_name
                said = f"{each.model.entry.reference}: stored in {theirs}, the base in {ours}"
                found[f"{said}; the result is stored in {job.dtype.torch_name}"] = None
    return list(found)
