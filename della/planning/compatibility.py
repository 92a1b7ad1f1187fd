"""Whether models fit the base they shall be merged into: names, shapes, types, tied heads.  Headers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from della.checkpoint.source import Source
from della.checkpoint.view import TensorView
from della.errors import Collector, Problem, clip, some
from della.planning.alignment import FEW, of_vocabulary
from della.planning.configs import NUMBER, depths
from della.planning.heads import HEAD, is_tied
from della.recipe.reader import Recipe

CODE = ("auto_map", "custom_pipelines")  # keys of config.json that name code outside the library


def stand_in(recipe: Recipe, base: Source, model: Source, name: str) -> TensorView | None:
    """The tensor that stands for ``name`` of ``model``: its own, or the base's, if the recipe says so
    (missing: base).  None where there is none.
    """
    return model.tensors.get(name) or (base.tensors[name] if recipe.missing == "base" else None)


def extras(base: Source, model: Source) -> list[str]:
    """The tensors of ``model`` that the base lacks."""
    return [name for name in model.tensors if name not in base.tensors]


def check_fit(recipe: Recipe, base: Source, models: Sequence[Source], problems: Collector) -> list[str]:
    """Notes on what models lack and have beyond the base; where it or a shape does not fit, ``problems`` has
    it.
    """
    notes = []
    others = [model for model in dict.fromkeys(models) if model is not base]
    for model in others:
        lacked = [n for n, view in base.tensors.items() if stand_in(recipe, base, model, n) is None]
        missing = [n for n in lacked if base.tensors[n].dtype.is_float]
        if buffers := [n for n in lacked if n not in missing]:
            notes.append(
                f"{model.reference}: lacks {some(buffers)}, which is no weight; {base.reference}'s is copied"
            )
        problems.extend(_against(model, base, _lacking(recipe, base, model, missing)))
        absent = [n for n in base.tensors if n not in model.tensors and n not in lacked]
        if absent:
            said = "the base's stands in its place (missing: base)"
            notes.append(f"{model.reference}: lacks {some(absent)}; {said}")
        problems.extend(_against(model, base, _misfits(base, model)))
        extra = extras(base, model)
        why = _why_no_copy(base, model, extra)
        if extra and recipe.extra == "error":
            fix = "write 'extra: ignore' to leave that out, or 'extra: copy' to take it over"
            said = f"has {some(extra, FEW if why else 20)} beyond the base's{f' ({why})' * bool(why)}"
            if why:
                fix = "all models must be fine-tunes of one base; 'extra: ignore' leaves that out"
            problems.extend(_against(model, base, [Problem(said, fix, tensor=extra[0])]))
        elif why and recipe.extra == "copy":
            said = f"{why}: 'extra: copy' would write what config.json does not count"
            problems.extend(_against(model, base, [Problem(said, "write 'extra: ignore'", tensor=extra[0])]))
        elif extra:
            end = "left out of the result" if recipe.extra == "ignore" else "copied into the result"
            told = f"{some(extra, 20)} not in the base, and {end} (extra: {recipe.extra})"
            notes.append(f"{model.reference}: {told}")
    if recipe.extra == "copy":
        problems.extend(_claimed_twice(base, others))
    return notes


def _why_no_copy(base: Source, model: Source, extra: Sequence[str]) -> str:
    """Why a result with ``extra`` would not be what its config.json says; "" where it would."""
    if not extra:
        return ""
    if depth := depths(base, model):
        return depth
    held = {part for name in base.tensors for part in _numbered(name)}
    stems = {stem for stem, _ in held}
    if beyond := [n for n in extra if any(p[0] in stems and p not in held for p in _numbered(n))]:
        return f"{some(beyond)}: a layer or an expert that the base has none of"
    ours, theirs = base.config.get("architectures"), model.config.get("architectures")
    if ours and theirs and ours != theirs:
        return f"another kind of model: {clip(str(theirs))} against {clip(str(ours))}"
    lost = [name for name in base.tensors if HEAD.search(name) and name not in model.tensors]
    return f"another kind of head: the base has {lost[0]}" if lost else ""


def _numbered(name: str) -> list[tuple[str, str]]:
    """Each number in a name, such as a layer's, with what is before it."""
    return [(name[: match.start()], match[1]) for match in NUMBER.finditer(name)]


def _against(model: Source, base: Source, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems of a model that the base shows."""
    for problem in problems:
        yield replace(problem, said=f"against {base.reference}: {problem.said}", subject=model.reference)


def _lacking(recipe: Recipe, base: Source, model: Source, missing: Sequence[str]) -> Iterator[Problem]:
    heads = [name for name in missing if HEAD.search(name)]
    if heads and len(heads) == len(missing) and is_tied(model):
        said = f"ties its head to the embeddings where the base has a {heads[0]} of its own"
        fix = "untie this model: save it with tie_word_embeddings: false"
        fix += ", or write 'missing: base' to keep the base's head" if recipe.method.needs_base else ""
        yield Problem(said, fix, tensor=heads[0])
    elif missing:
        depth, more = depths(base, model), extras(base, model)
        said = f"lacks {some(missing, FEW if depth else 20)}{f' ({depth})' * bool(depth)}"
        said += f", and has {some(more)} instead: another kind of head" if heads and more else ""
        fix = "all models must be fine-tunes of one base"
        fix += "; or 'missing: base' to take the base's" if recipe.method.needs_base else ""
        yield Problem(said, fix, tensor=missing[0])


def _claimed_twice(base: Source, models: Sequence[Source]) -> Iterator[Problem]:
    homes: dict[str, Source] = {}
    for model in models:
        for name in extras(base, model):
            if homes.setdefault(name, model) is not model:
                said = (
                    f"{name}: in {homes[name].reference} and in {model.reference}, but not in the base, so "
                    "'extra: copy' cannot tell which one is meant"
                )
                yield Problem(said, "write 'extra: ignore'", tensor=name, parameter="extra")


def _misfits(base: Source, model: Source) -> Iterator[Problem]:
    kinds = list[Problem]()
    for name, ours in base.tensors.items():
        theirs = model.tensors.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            whose = "this model's" if theirs.shape > ours.shape else "the base's"
            fix = f"{whose} vocabulary is larger: merge a version of it without the added rows"
            said = f"{name} has shape {list(theirs.shape)}, expected {list(ours.shape)}"
            yield Problem(said, fix if of_vocabulary(ours, theirs) else None, tensor=name)
        elif theirs.dtype.is_float != ours.dtype.is_float:
            said = f"{name} is stored as {theirs.dtype.name}, expected {ours.dtype.name}"
            kinds.append(Problem(said, tensor=name))
    if len(kinds) > FEW:
        kinds = [replace(kinds[0], said=f"{kinds[0].said}, and {len(kinds) - 1} more alike")]
    yield from kinds


def foreign_code(base: Source, kept: bool) -> list[str]:
    """A note where the base's configuration names code of its own."""
    found = [key for key in CODE if key in base.config]
    said = f"{base.reference}: config.json names code of its own ({', '.join(found)})"
    end = "kept as you asked" if kept else "left out of the result"
    return [f"{said}; it is never run, and {end}"] if found else []
