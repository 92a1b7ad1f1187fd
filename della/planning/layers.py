"""Slices and modules as merges of their own: which tensors of which model each of them makes, renumbered.

Layers, embeddings and heads are known by the structure of the names, not by a table of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.view import Renamed, TensorView
from della.errors import CheckpointError, Collector, Location, Problem, RecipeError, some
from della.planning import configs, layer_config
from della.planning.heads import HEAD
from della.planning.job import Model, Section
from della.recipe.models import ModelEntry, Part, Recipe

# What stands before the layers; all else that stands outside of them is a final norm or a head.
BEFORE = re.compile(
    r"(^|\.)(embed\w*|wte|wpe|shared|tok_embeddings|word_embeddings\w*|position_embeddings|token_type_embeddings"
    r"|rotary\w*|project_in|patch_embed\w*|pos_embed\w*|class_embedding|pre_layrnorm|conv\d?|ln_pre|type_embed\w*)(\.|$)"
)
AFTER = re.compile(r"(^|\.)(embed_out|lm_head|lm_loss)(\.|$)")
# Modules by the names that mergekit gives them, and the prefixes that they have.
MODULES = {
    "text_decoder": ("language_model", "text_model"),
    "multi_modal_projector": (
        "multi_modal_projector", "visual.merger", "visual.deepstack_merger_list", "connector", "mm_projector",
    ),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_tower", "vision_model", "visual"),
    "audio_tower": ("audio_tower", "audio_model"),
}  # fmt: skip
REST = "text_decoder"  # has what no prefix claims
_WRAPPER = "model"  # stands before the prefixes of some models
WHOLE = "default"  # mergekit's name of the module of a model that has one


class Moved(Renamed):
    """A tensor of a layer under its new number."""


@dataclass
class Cutting:
    """The stack of one module, while its slices are put one after the other."""

    module: str
    stack: str
    cuts: list[layer_config.Cut] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many layers there are so far."""
        return sum(cut.end - cut.first for cut in self.cuts)

    def of(self, source: Source) -> int:
        """How many layers a model has."""
        return configs.stacks(source.tensors).get(self.stack, 0)


def depths(
    names: Iterable[str], stack: str = "", first: int = 0, count: int = 0
) -> dict[str, tuple[float, str]]:
    """(depth, label) of each tensor: where its layer, by the first number in its name, is in its own stack.

    As in mergekit, depth is 0 for what stands outside the layers (embeddings, final norm, head) and 1 where a
    stack has a single layer.  Of a slice, which has ``count`` layers of ``stack`` from ``first`` on, it runs
    over the slice.
    """
    names = list(names)
    counts, found = configs.stacks(names), {}
    for name in names:
        match = configs.STACK.match(name)
        if match is None:
            found[name] = (0.0, "")
            continue
        start, top = (first, count - 1) if stack and match[1] == stack else (0, counts[match[1]] - 1)
        found[name] = ((int(match[2]) - start) / top if top else 1.0, f"layer {int(match[2])}")
    return found


# ---- modules -----------------------------------------------------------------------------------------------


def owners(names: Sequence[str], parts: Sequence[Part]) -> dict[str, tuple[str, ...]]:
    """The prefixes of each module that ``parts`` have, found in ``names``.

    Raises RecipeError for a module of which there is no tensor.
    """
    found: dict[str, tuple[str, ...]] = {}
    problems = Collector(RecipeError)
    for part in parts:
        tried = (part.module, f"model.{part.module}")
        aliases = [f"{before}{x}" for x in MODULES.get(part.module, ()) for before in ("", "model.")]
        literal = [prefix for prefix in tried if any(n.startswith(f"{prefix}.") for n in names)]
        known = literal or [prefix for prefix in aliases if any(n.startswith(f"{prefix}.") for n in names)]
        found[part.module] = tuple(known)
        if not known and part.module not in (REST, WHOLE):
            there = sorted({_head(name) for name in names})
            said = f"module {part.module} has no tensor in the model: no name begins with {part.module!r}"
            fix = f"write one of {', '.join(there[:12])}"
            problems.add(said, fix, location=part.location, parameter="modules")
    problems.raise_any()
    return found


def _head(name: str) -> str:
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == _WRAPPER and len(rest) > 1 else first


def _owner(name: str, prefixes: Mapping[str, tuple[str, ...]]) -> str | None:
    """The module of a tensor: that of the longest prefix; the text decoder has what no other claims."""
    fits = [(len(p), m) for m, own in prefixes.items() for p in own if name.startswith(f"{p}.")]
    if REST in prefixes:  # what belongs to a module that the recipe does not name is not the decoder's
        others = (p for m, own in MODULES.items() if m not in (*prefixes, REST) for p in own)
        fits += [(len(p), "") for p in others if re.match(rf"(model\.)?{re.escape(p)}\.", name)]
    if fits:
        return max(fits)[1] or None
    return REST if REST in prefixes else WHOLE if WHOLE in prefixes else None


# ---- slices ------------------------------------------------------------------------------------------------


def _stack(base: Source, names: Sequence[str], module: str) -> str:
    """The stack that slices cut: the only one, or the one whose layers config.json counts.

    Raises CheckpointError where there are several, or none.
    """
    found = configs.stacks(names)
    if len(found) > 1:
        counted = {s: n for s, n in found.items() if n in layer_config.counted(base.config, s)}
        found = counted or found
    if len(found) == 1:
        return next(iter(found))
    of = f" of module {module}" if module else ""
    if not found:
        said = f"has no layers{of} that could be cut: no name has a number in it"
        raise CheckpointError(Problem(said, "list whole models under 'models'", base.reference))
    listed = ", ".join(f"{stack}: {count}" for stack, count in found.items())
    inside = [_head(stack) for stack in found]
    fix = f"write the slices under 'modules', such as 'modules: {{{inside[0]}: {{slices: ...}}}}'"
    raise CheckpointError(Problem(f"has several stacks of layers{of} ({listed})", fix, base.reference))


def is_before(name: str) -> bool:
    """Whether a tensor outside of the layers stands before them: embeddings and what belongs to them."""
    return not AFTER.search(name) and not HEAD.search(name) and bool(BEFORE.search(name))


def _cut(
    source: Source, names: Sequence[str], cutting: Cutting, layers: tuple[int, int], ends: tuple[bool, bool]
) -> Source:
    """``source`` with the tensors of a slice alone, its layers renumbered; ``ends``: is it the first,
    is it the last?"""
    first, end = layers
    made: dict[str, TensorView] = {}
    for name in names:
        view, match = source.tensors[name], configs.STACK.match(name)
        if match and match[1] == cutting.stack:
            if first <= (number := int(match[2])) < end:
                new = f"{match[1]}.{number - first + cutting.count}.{name[match.end() :]}"
                made[new] = view if new == name else Moved(new, view)
        elif ends[0 if is_before(name) else 1]:
            made[name] = view
    cut = source.changed(made)
    cut.piece = layers
    count = configs.stacks(names).get(cutting.stack, 0)
    cut.config = layer_config.without_layers(source.config, cutting.stack, count)
    return cut


def _check_range(
    source: Source,
    names: Sequence[str],
    stack: str,
    entry: tuple[int, int],
    at: Location,
) -> None:
    """Raises RecipeError where a range ends beyond the layers, CheckpointError where nobody knows these."""
    count = configs.stacks(names).get(stack, 0)
    if entry[1] > count:
        said = (
            f"layer_range [{entry[0]}, {entry[1]}] of {source.reference} ends beyond its last layer: it has "
        )
        said += f"{count} layers of {stack}" if count else f"no layers of {stack}"
        start = min(entry[0], max(count - 1, 0))
        fix = f"write [{start}, {count}]" if count else "name a model of the same kind as the others"
        raise RecipeError(Problem(said, fix, location=at, parameter="layer_range"))
    layer_config.check_count(source, stack, count)


def _base_layers(part: Part) -> tuple[int, int]:
    """The layers of a base that its slice need not list: those that all others give.

    Raises RecipeError where they give others.
    """
    given = list(dict.fromkeys(entry.layers for entry in part.recipe.models))
    if part.base_layers:
        return part.base_layers
    if len(given) == 1 and given[0]:
        return given[0]
    ranges = [f"[{a}, {b}]" for a, b in filter(None, given)]
    said = f"{part.label} takes {' and '.join(ranges)}, so it does not say which layers of the base"
    fix = f"list it too: '- {{model: {part.recipe.base_model}, layer_range: {ranges[0]}}}'"
    raise RecipeError(Problem(said, fix, location=part.location, parameter="layer_range"))


@dataclass
class Sections:
    """What is planned as one merge each: the whole of a model, or its parts.

    Args:
        models: Every model that is merged.
        each: The sections.
        cuttings: The stacks that were cut.
        left: The tensors of the base that no part makes: they are copied.
    """

    models: tuple[Model, ...]
    each: list[Section] = field(default_factory=list)
    cuttings: list[Cutting] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)

    def against(self, base: Source, is_strict: bool, check: Collector) -> Iterator[str]:
        """Notes on parts whose models are not the one whose configuration is written."""
        trimmed = base.changed(base.tensors)
        for cutting in self.cuttings:
            count = cutting.of(base)
            trimmed.config = layer_config.without_layers(trimmed.config, cutting.stack, count)
        for section in self.each:
            if section.label and section.base.folder != base.folder:
                own = trimmed if section.layers else base
                yield from filter(None, [configs.note(own, section.base)])
                check.extend(configs.other_type(own, section.base) if is_strict else ())
        check_kin(base, self.each, check)

    def joined(self, base: Source) -> tuple[dict[str, Any], list[str]]:
        """The configuration of the result, and notes."""
        config, notes = base.config, list[str]()
        for cutting in self.cuttings if config else ():
            config, told, lists = layer_config.joined(config, cutting.stack, cutting.cuts)
            notes += told
            self.lists += lists
        return config, notes

    def departures(self) -> Iterator[str]:
        """What mergekit 0.1.5 does otherwise."""
        if self.lists:
            said = f"{', '.join(dict.fromkeys(self.lists))} of config.json: cut and joined layer by layer"
            yield f"{said} (mergekit: it fails when it saves the configuration)"
        for cutting in self.cuttings:
            mine = [s for s in self.each if s.layers and s.layers[0] == cutting.stack]
            if mine and len(mine[-1].models) > len(mine[0].models):
                said = f"final norm and head come from all {len(mine[-1].models)} sources of {mine[-1].label}"
                yield f"{said} (mergekit: from as many as the first slice has)"
        cut = [s for s in self.each if s.layers and s.recipe.method.needs_base]
        unlisted = [section.label for section in cut if not section.lists_base]
        if unlisted:
            yield f"{', '.join(unlisted)}: base_model is not among the sources (mergekit: an error)"
        if self.left:
            yield f"{some(self.left)} of no module in the recipe: copied from the base (mergekit: left out)"


def parted(
    recipe: Recipe, opened: Mapping[str, Source], models: tuple[Model, ...], check: Collector
) -> Sections:
    """Each part as a merge of its own, of models that have its tensors alone.

    Args:
        recipe: Of parts.
        opened: Every model and base by its reference.
        models: Every model that is merged.
        check: Takes what is wrong.
    """
    base, made = opened[recipe.template], Sections(models)
    homes = {model.entry.identity: model for model in models}
    prefixes: dict[str, tuple[str, ...]] = {}
    before = len(check)
    with check:
        prefixes = owners(list(base.tensors), [part for part in recipe.parts if part.module])
    if len(check) > before:
        return made
    cuttings: dict[str, Cutting] = {}
    for k, part in enumerate(recipe.parts):
        with check:
            names = {r: _names(opened[r], part, prefixes) for r in part.recipe.references}
            if part.is_cut and part.module not in cuttings:
                mine = _names(base, part, prefixes)
                cuttings[part.module] = Cutting(part.module, _stack(base, mine, part.module))
            same = [j for j, other in enumerate(recipe.parts) if other.module == part.module]
            ends = (k == same[0], k == same[-1])
            made.each.append(_section(part, opened, names, homes, cuttings.get(part.module), ends))
    made.cuttings = list(cuttings.values())
    made.left = [name for name in base.tensors if prefixes and _owner(name, prefixes) is None]
    return made


def _names(source: Source, part: Part, prefixes: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [n for n in source.tensors if not part.module or _owner(n, prefixes) == part.module]


def _section(
    part: Part, opened: Mapping[str, Source], names: Mapping[str, list[str]], homes: Mapping[str, Model],
    cutting: Cutting | None, ends: tuple[bool, bool],
) -> Section:  # fmt: skip
    """One part.  Raises RecipeError and CheckpointError."""
    recipe, made = part.recipe, dict[tuple[str, object], Source]()

    def cut(reference: str, layers: tuple[int, int] | None, at: ModelEntry | None) -> Source:
        source = opened[reference]
        if (reference, layers) not in made:
            if cutting is None or layers is None:
                made[reference, layers] = source.changed({n: source.tensors[n] for n in names[reference]})
            else:
                _check_range(
                    source, names[reference], cutting.stack, layers, at.location if at else part.location
                )
                made[reference, layers] = _cut(source, names[reference], cutting, layers, ends)
        return made[reference, layers]

    models = []
    for entry in recipe.models:
        home = homes[entry.identity]
        norms = home.norms
        if norms and cutting and entry.layers:
            norms = _cut(norms, list(norms.tensors), cutting, entry.layers, ends)
        models.append(Model(entry, cut(entry.reference, entry.layers, entry), norms))
    template = next((m for m in recipe.models if m.reference == recipe.template), None)
    layers = template.layers if template else _base_layers(part) if cutting else None
    base = cut(recipe.template, layers, template)
    if cutting is None or layers is None:
        return Section(part.label, recipe, base, tuple(models), depths(base.tensors))
    first, number = cutting.count, layers[1] - layers[0]
    known = depths(base.tensors, cutting.stack, first, number)
    whole = opened[recipe.template]
    count = configs.stacks(names[recipe.template]).get(cutting.stack, 0)
    cutting.cuts.append(layer_config.Cut(whole, count, *layers))
    place = cutting.stack, first, number
    return Section(part.label, recipe, base, tuple(models), known, place, part.base_layers is not None)


def check_kin(base: Source, sections: Sequence[Section], check: Collector) -> None:
    """Layers of one model are of one kind: each has tensors and shapes of a layer of ``base``, whose
    configuration is written."""
    kinds = {stack: _kinds(base, stack) for stack in {s.layers[0] for s in sections if s.layers}}
    for section in sections:
        if not section.layers or section.base.folder == base.folder:
            continue
        known = kinds[section.layers[0]]
        for kind, name in _kinds(section.base, section.layers[0]).items():
            if kind not in known:
                with check:
                    raise CheckpointError(_stranger(base, section, dict(kind), known, name))
                break


def _kinds(source: Source, stack: str) -> dict[frozenset[tuple[str, tuple[int, ...]]], str]:
    """What a layer consists of, for each kind of layer; with the name of the first such layer."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, view in source.tensors.items():
        if (match := configs.STACK.match(name)) and match[1] == stack:
            layers.setdefault(name[: match.end() - 1], {})[name[match.end() :]] = view.shape
    found: dict[frozenset[tuple[str, tuple[int, ...]]], str] = {}
    for layer, own in layers.items():
        found.setdefault(frozenset(own.items()), layer)
    return found


def _stranger(
    base: Source, section: Section, layer: Mapping[str, tuple[int, ...]],
    known: Mapping[frozenset[tuple[str, tuple[int, ...]]], str], name: str,
) -> Problem:  # fmt: skip
    theirs = max((dict(kind) for kind in known), key=lambda kind: len(kind.keys() & layer.keys()), default={})
    here = f"{section.label}: {name}"
    fix = "all layers of a model must be of one kind and size: name a model of the same architecture"
    for part in layer.keys() & theirs.keys():
        if layer[part] != theirs[part]:
            said = f"{here}.{part} has shape {list(layer[part])}, and a layer of {base.reference}"
            return Problem(f"{said} {list(theirs[part])}", fix, section.base.reference, f"{name}.{part}")
    more, fewer = sorted(layer.keys() - theirs.keys()), sorted(theirs.keys() - layer.keys())
    said = f"has {some(more)}, which no layer of {base.reference} has" if more else f"lacks {some(fewer)}"
    return Problem(f"{here} {said}", fix, section.base.reference, name)
