"""From a recipe and headers to a Plan: one job per output tensor.  Nothing is read but headers.

All that can be found wrong before the first byte is told at once: inputs, recipe, place of the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from della.checkpoint.norms import misfits
from della.checkpoint.source import Source, open_file, open_source
from della.checkpoint.view import TensorView
from della.checkpoint.vocabulary import Read, read_vocabulary
from della.dtypes import DType
from della.errors import CheckpointError, Collector, Problem, some
from della.merging.tile import canonical
from della.options import Permissions, Target
from della.output.place import check_place, check_space, is_name
from della.output.staging import staged_bytes
from della.planning import configs, tokenizers
from della.planning.alignment import aligned, differing_buffers, strangers
from della.planning.compatibility import check_fit, extras, foreign_code, stand_in
from della.planning.coverage import check_idle, covered, mostly_left_out
from della.planning.differences import departures
from della.planning.heads import settled
from della.planning.job import Job, Model, Operand, Plan, Section
from della.planning.layers import Sections, depths, parted
from della.planning.overall import check_compat, check_whole_model, islands, ranked, storage
from della.planning.templates import settle_template
from della.planning.vocabularies import follow_tokens
from della.recipe.reader import ModelEntry, Recipe

ONE_FILE = "one file has no tokenizer beside it, though its rows follow one; write to a folder to have it"


def make_plan(
    recipe: Recipe, *, weights: bool = True, target: Target | None = None,
    permissions: Permissions = Permissions(), given: Mapping[str, Source] = MappingProxyType({}),
) -> Plan:  # fmt: skip
    """Open the inputs of ``recipe`` and decide about every output tensor.

    ``weights=False`` is enough for looking: models of the Hub are then opened by their headers alone.  With
    ``target`` the place of the result is looked at too, before anything is downloaded.  ``given`` are models
    that are open already, by their reference.  Raises RecipeError,
    CheckpointError or OutputError, which lists everything that is wrong.
    """
    check = Collector(CheckpointError)
    with ExitStack() as stack:
        with check:
            _check_target(target, ())
        weights = weights and not check  # no download for a merge that cannot be
        opened = _open_all(recipe, weights, permissions, given, stack, check)
        norms = _open_norms(recipe, stack, check)
        with check:
            _check_target(target, [*opened.values(), *norms.values()])
        notes = [*recipe.notes, *_align(recipe.template, opened)]
        read = cache(read_vocabulary)
        told, by_token = follow_tokens(recipe, recipe.template, opened, check, read)
        notes += told
        if target and target.is_single and recipe.tokenizer:
            notes.append(ONE_FILE)
        sections = _sections(recipe, opened, norms, check)
        base = opened.get(recipe.template)
        models, told = _checked(recipe, base, sections, check, read)
        recipe, notes = replace(recipe, models=tuple(model.entry for model in models)), [*notes, *told]
        if base is not None:
            notes += settle_template(recipe, base, opened.values(), check)
        with check:
            _check_space(target, base, sections)
        check.raise_any()
        assert base is not None
        base.config, told = sections.joined(base)
        jobs = tuple(_jobs(base, models, sections))
        coverage = covered(models, base, jobs)
        if not permissions.allow_idle:
            check_idle(recipe, models, base, jobs, coverage)
        check_whole_model(recipe, jobs)
        check_compat(recipe, jobs)
        notes += [*told, *(() if recipe.parts else mostly_left_out(models, base, coverage))]
        notes += _about_jobs(base, models, jobs, permissions)
        made = (*departures(recipe, jobs), *by_token, *sections.departures())
        return Plan(
            recipe, base, models, jobs, tuple(notes), made, coverage, tuple(sections.each), stack.pop_all()
        )


def _about_jobs(
    base: Source, models: Sequence[Model], jobs: Sequence[Job], permissions: Permissions
) -> list[str]:
    """Notes on what is merged, and on what is beside it."""
    notes = [*storage(jobs), *islands(jobs), *ranked(models, jobs)]
    return [*notes, *foreign_code(base, permissions.keep_auto_map), *tokenizers.left_behind(base)]


def _open_all(
    recipe: Recipe, weights: bool, permissions: Permissions, given: Mapping[str, Source], stack: ExitStack,
    check: Collector,
) -> dict[str, Source]:  # fmt: skip
    """Every model by its reference, but those that cannot be opened."""
    folder = recipe.path.parent if recipe.path else None
    opened: dict[str, Source] = {}
    for reference in recipe.references:
        if reference in given:
            opened[reference] = given[reference].changed(given[reference].tensors)
            continue
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


def _sections(
    recipe: Recipe, opened: Mapping[str, Source], norms: Mapping[str | None, Source], check: Collector
) -> Sections:
    """What is planned as one merge: the whole, or each part of it; the models that could be opened."""
    models = tuple(
        Model(m, opened[m.reference], norms.get(m.input_norms))
        for m in recipe.models
        if m.reference in opened
    )
    base = opened.get(recipe.template)
    if base is None or (recipe.parts and any(r not in opened for r in recipe.references)):
        with check:
            recipe.check_at_once()
        return Sections(models)
    if recipe.parts:
        return parted(recipe, opened, models, check)
    return Sections(models, [Section("", recipe, base, models, depths(base.tensors))])


def _checked(
    recipe: Recipe, base: Source | None, sections: Sections, check: Collector, read: Read
) -> tuple[tuple[Model, ...], list[str]]:
    """The models that are merged, and notes; ``sections`` lose the others."""
    notes: list[str] = []
    fitting: list[Source] = []
    if base is not None:
        with check:
            base.side_files()
    complete = all(len(section.models) == len(section.recipe.models) for section in sections.each)
    sections.each = [_without_base(section, check, notes) for section in sections.each]
    seen = {at for section in sections.each for at in section.recipe.matched(section.floats)}
    for section in sections.each:
        with check:
            if complete:  # else a model could not be opened, which is told
                section.recipe.check_count()
            section.recipe.check_at_once()
            section.recipe.check_cases(section.floats, seen)
            section.recipe.check((name, *at) for name, at in section.depths.items())
        notes += _check_models(section, fitting, check)
    if base is not None:
        notes += sections.against(base, recipe.mismatch == "error", check)
        once: dict[object, Source] = {}
        for source in fitting:
            once.setdefault((source.folder, source.reference), source)
        notes += tokenizers.compare(
            base, [*once.values()], check, recipe.tokenizer, read, bool(recipe.chat_template)
        )
    for section in sections.each:
        for each in dict.fromkeys(model.norms for model in section.models if model.norms):
            check.extend(misfits(each, section.base))
    kept = {model.entry.identity for section in sections.each for model in section.models}
    return tuple(m for m in sections.models if m.entry.identity in kept), list(dict.fromkeys(notes))


def _check_models(section: Section, fitting: list[Source], check: Collector) -> list[str]:
    """Notes on how models fit the base; what does not is in ``check``, what does in ``fitting`` too."""
    recipe, base, notes = section.recipe, section.base, list[str]()
    mine: list[Source] = []
    for source in dict.fromkeys((base, *(model.source for model in section.models))):
        found = list(strangers(base, source, recipe.missing == "base"))
        check.extend(found)
        if not recipe.plain_fp8:
            check.extend(_fp8(source))
        if not found:
            mine.append(source)
            notes += filter(None, (differing_buffers(base, source, check), configs.note(base, source)))
        if recipe.mismatch == "error" and not found:
            check.extend(configs.other_type(base, source))
    fitting += mine
    return notes + check_fit(recipe, base, mine, check)


def _fp8(source: Source) -> Iterator[Problem]:
    """Float8 without a scale: codes of a scheme that is not known, or, rarely, the values themselves."""
    found = [name for name, view in source.tensors.items() if view.dtype.is_float and view.dtype.bits == 8]
    if found:
        said = f"{some(found)} stored in float8, which nearly always is codes that need a scale"
        fix = (
            "give the model in BF16, F16 or F32; if these are the values themselves, write 'plain_fp8: true'"
        )
        yield Problem(said, fix, source.reference, found[0])


def _without_base(section: Section, check: Collector, notes: list[str]) -> Section:
    """A section without the base under another name, whose delta is zero; notes on that, and on models of
    the same files."""
    recipe, base = section.recipe, section.base
    first: dict[object, str] = {}
    kept: list[Model] = []
    known = base.identity if base.files and recipe.method.needs_base else None
    for model in section.models:
        name, identity = model.entry.reference, model.source.identity
        if identity == known:
            said = "is the base model itself under another name, so it does not count as an expert"
            notes.append(f"{name}: {said}")
            continue
        earlier = first.setdefault(identity, name) if identity else name
        if earlier.rstrip("/") != name.rstrip("/"):
            notes.append(f"{name}: the same files as {earlier}; it counts as two experts")
        kept.append(model)
    if section.models and not kept:
        said = f"{section.label}: lists" if section.label else "'models' lists"
        check.add(f"{said} only the base model", "add at least one expert to merge into it")
    recipe = replace(recipe, models=tuple(model.entry for model in kept))
    return replace(section, recipe=recipe, models=tuple(kept))


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


def _check_space(target: Target | None, base: Source | None, sections: Sections) -> None:
    if target is None or base is None or not is_name(target.out):
        return
    needed = sum(base.tensors[name].elements * base.tensors[name].dtype.bytes for name in sections.left)
    for section in sections.each:
        views = section.base.tensors.values()
        needed += sum(view.elements * _stored_as(section.recipe, view).bytes for view in views)
        needed += sum(view.elements * view.dtype.bytes for view in _copied(section))
    out = Path(os.path.abspath(target.out))
    check_space(out.parent, needed, staged_bytes(out))


def _stored_as(recipe: Recipe, view: TensorView) -> DType:
    """The storage dtype of a tensor of the result, which the base has as ``view``."""
    return (recipe.out_dtype or recipe.dtype or view.dtype) if view.dtype.is_float else view.dtype


def _jobs(base: Source, models: Sequence[Model], sections: Sections) -> Iterator[Job]:
    homes = {model.entry.identity: model for model in models}
    for section in sections.each:
        for name, (depth, _) in section.depths.items():
            yield _job(section, name, depth, homes)
        for view in _copied(section):
            yield Job(view.name, view.shape, view.dtype, view, None)
    for view in (base.tensors[name] for name in sections.left):
        yield Job(view.name, view.shape, view.dtype, view, None)


def _copied(section: Section) -> Iterator[TensorView]:
    """The tensors that the base lacks, where they shall be in the result (extra: copy)."""
    sources = (model.source for model in section.models if section.recipe.extra == "copy")
    for source in dict.fromkeys(sources):
        if source is not section.base:
            yield from (source.tensors[name] for name in extras(section.base, source))


def _job(section: Section, name: str, depth: float, homes: Mapping[str, Model]) -> Job:
    recipe, base = section.recipe, section.base
    view = base.tensors[name]
    dtype = _stored_as(recipe, view)
    if not view.dtype.is_float:
        return Job(name, view.shape, dtype, view, None)
    shared, values = recipe.resolve(name, depth)
    method = recipe.method(shared, (recipe.dtype or view.dtype) if recipe.compat else None)
    operands = []
    for model, own in zip(section.models, values, strict=True):
        found = stand_in(recipe, base, model.source, name)
        assert found is not None, "check_fit has looked"
        wanted = method.wants_norms and view.elements
        norms = model.norms.tensors.get(name) if model.norms and wanted else None
        home = homes[model.entry.identity]
        operands.append(Operand(home, found, method.expert(model.entry.identity, own), norms))
    order = canonical([each.expert for each in operands])
    return Job(name, view.shape, dtype, view, method, tuple(operands[t] for t in order))
