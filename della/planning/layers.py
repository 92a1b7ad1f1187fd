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
from della.planning.heads import HEAD, embeddings_of, is_tied
from della.planning.job import Model, Section
from della.planning.kin import check_kin, layers_of
from della.planning.modules import owner, owners, prefix_of
from della.recipe.models import Part, Recipe

# What stands before the layers; all else that stands outside of them is a final norm or a head.
BEFORE = re.compile(
    r"(^|\.)(embed\w*|wte|wpe|shared|tok_embeddings|word_embeddings\w*|position_embeddings|token_type_embeddings"
    r"|rotary\w*|project_in|patch_embed\w*|pos_embed\w*|class_embedding|pre_layrnorm|conv\d?|ln_pre|type_embed\w*)(\.|$)"
)
AFTER = re.compile(r"(^|\.)(embed_out|lm_head|lm_loss)(\.|$)")


class Moved(Renamed):
    """A tensor of a layer under its new number, or embeddings that are a head too."""


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
    inside = [prefix_of(stack) for stack in found]
    fix = f"write the slices under 'modules', such as 'modules: {{{inside[0]}: {{slices: ...}}}}'"
    raise CheckpointError(Problem(f"has several stacks of layers{of} ({listed})", fix, base.reference))


def is_before(name: str) -> bool:
    """Whether a tensor outside of the layers stands before them: embeddings and what belongs to them."""
    return not AFTER.search(name) and not HEAD.search(name) and bool(BEFORE.search(name))


@dataclass
class _Split:
    """The tensors that a model has of a module: those of each layer of its stack, and the others."""

    source: Source
    layers: dict[int, list[tuple[str, str]]]
    outside: tuple[list[str], list[str]]
    trimmed: dict[str, Any]

    @classmethod
    def of(cls, source: Source, names: Sequence[str], stack: str) -> _Split:
        layers: dict[int, list[tuple[str, str]]] = {}
        outside: tuple[list[str], list[str]] = ([], [])
        for name in names:
            match = configs.STACK.match(name)
            if match and match[1] == stack:
                layers.setdefault(int(match[2]), []).append((name, name[match.end() :]))
            else:
                outside[0 if is_before(name) else 1].append(name)
        count = max(layers, default=-1) + 1
        return cls(source, layers, outside, layer_config.without_layers(source.config, stack, count))

    @property
    def count(self) -> int:
        """How many layers there are."""
        return max(self.layers, default=-1) + 1

    def cut(self, cutting: Cutting, layers: tuple[int, int], ends: tuple[bool, bool]) -> Source:
        """The tensors of a slice alone, its layers renumbered; ``ends``: is it the first, is it the last?"""
        made: dict[str, TensorView] = {}
        tensors = self.source.tensors
        made |= {name: tensors[name] for name in (self.outside[0] if ends[0] else ())}
        for number in range(*layers):
            for name, rest in self.layers.get(number, ()):
                new = f"{cutting.stack}.{number - layers[0] + cutting.count}.{rest}"
                made[new] = tensors[name] if new == name else Moved(new, tensors[name])
        made |= {name: tensors[name] for name in (self.outside[1] if ends[1] else ())}
        cut = self.source.changed(made)
        cut.piece, cut.config = layers, self.trimmed
        return cut


def _check_range(split: _Split, stack: str, layers: tuple[int, int], at: Location) -> None:
    """Raises RecipeError where a range ends beyond the layers, CheckpointError where nobody knows these."""
    count, (first, end) = split.count, layers
    if end > count:
        said = f"layer_range [{first}, {end}] of {split.source.reference} ends beyond its last layer"
        said += f": it has {count or 'no'} layers of {stack}"
        fix = f"write [{min(first, max(count - 1, 0))}, {count}]"
        fix = fix if count else "name a model of the same kind as the others"
        raise RecipeError(Problem(said, fix, location=at, parameter="layer_range"))
    layer_config.check_count(split.source, stack, count)


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
            if not lists:
                self._check_numbers(base, cutting)
        return config, notes

    def _check_numbers(self, base: Source, cutting: Cutting) -> None:
        """Where layers are of several kinds, and no list of the configuration says which is which, it goes by
        their numbers.  Raises CheckpointError for a layer of another kind than the base's of its number.
        """
        kinds = layers_of(base, cutting.stack)
        if len(set(kinds.values())) < 2:
            return
        for section in (s for s in self.each if s.layers and s.layers[0] == cutting.stack):
            for number, kind in layers_of(section.base, cutting.stack).items():
                if kinds.get(number, kind) != kind:
                    said = f"{section.label}: layer {number} of the result is of another kind than layer"
                    said += f" {number} of {base.reference}, and its config.json tells kinds by their numbers"
                    fix = "choose ranges in which layers of a kind of their own keep their numbers"
                    raise CheckpointError(Problem(said, fix, section.base.reference))

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
    before = len(check)
    with check:
        prefixes = owners(list(base.tensors), [part for part in recipe.parts if part.module])
    if len(check) > before:
        return made
    opened = _with_heads(opened)
    parting = _Parting(recipe, opened, {model.entry.identity: model for model in models}, prefixes)
    for part in recipe.parts:
        with check:
            made.each.append(parting.section(part))
    made.cuttings = list(parting.cuttings.values())
    made.left = [name for name in base.tensors if prefixes and owner(name, prefixes) is None]
    return made


def _with_heads(opened: Mapping[str, Source]) -> dict[str, Source]:
    """Where one model has a head of its own, that of a tied one is its embeddings."""
    head = next((name for source in opened.values() for name in source.tensors if HEAD.search(name)), None)
    made = dict(opened)
    for reference, source in opened.items():
        first = embeddings_of(source)
        if head and first and is_tied(source) and not any(map(HEAD.search, source.tensors)):
            made[reference] = source.changed({**source.tensors, head: Moved(head, source.tensors[first])})
    return made


class _Parting:
    """Makes the sections of one recipe, one after the other."""

    def __init__(
        self, recipe: Recipe, opened: Mapping[str, Source], homes: Mapping[str, Model],
        prefixes: Mapping[str, tuple[str, ...]],
    ) -> None:  # fmt: skip
        self.recipe, self.opened, self.homes, self.prefixes = recipe, opened, homes, prefixes
        self.cuttings: dict[str, Cutting] = {}
        self.last = {part.module: part for part in recipe.parts}
        self._names: dict[tuple[Source, str], list[str]] = {}
        self._splits: dict[tuple[Source, str], _Split] = {}

    def section(self, part: Part) -> Section:
        """One part.  Raises RecipeError and CheckpointError."""
        recipe, module = part.recipe, part.module
        listed = next((m for m in recipe.models if m.reference == recipe.template), None)
        if not part.is_cut:
            whole = {r: self._whole(r, module) for r in part.recipe.references}
            each = [Model(m, whole[m.reference], self.homes[m.identity].norms) for m in recipe.models]
            base = whole[recipe.template]
            return Section(part.label, recipe, base, tuple(each), depths(base.tensors))
        cutting = self._cutting(module)
        ends = not cutting.cuts, part is self.last[module]
        made: dict[tuple[str, object], Source] = {}

        def cut(reference: str, layers: tuple[int, int], at: Location) -> Source:
            if (reference, layers) not in made:
                split = self._split(self.opened[reference], module)
                _check_range(split, cutting.stack, layers, at)
                made[reference, layers] = split.cut(cutting, layers, ends)
            return made[reference, layers]

        models = []
        for entry in recipe.models:
            assert entry.layers is not None, "the reader has looked"
            norms = self.homes[entry.identity].norms
            own = norms and self._split(norms, module).cut(cutting, entry.layers, ends)
            models.append(Model(entry, cut(entry.reference, entry.layers, entry.location), own))
        layers = listed.layers if listed and listed.layers else _base_layers(part)
        base = cut(recipe.template, layers, listed.location if listed else part.location)
        place = cutting.stack, cutting.count, layers[1] - layers[0]
        known = depths(base.tensors, *place)
        split = self._split(self.opened[recipe.template], module)
        cutting.cuts.append(layer_config.Cut(split.source, split.count, *layers))
        return Section(part.label, recipe, base, tuple(models), known, place, part.base_layers is not None)

    def _whole(self, reference: str, module: str) -> Source:
        source = self.opened[reference]
        return source.changed({name: source.tensors[name] for name in self._of(source, module)})

    def _of(self, source: Source, module: str) -> list[str]:
        """The names of a module's tensors."""
        if (source, module) not in self._names:
            names = [n for n in source.tensors if not module or owner(n, self.prefixes) == module]
            self._names[source, module] = names
        return self._names[source, module]

    def _cutting(self, module: str) -> Cutting:
        if module not in self.cuttings:
            base = self.opened[self.recipe.template]
            stack = _stack(base, self._of(base, module), module)
            self.cuttings[module] = Cutting(module, stack)
        return self.cuttings[module]

    def _split(self, source: Source, module: str) -> _Split:
        if (source, module) not in self._splits:
            stack = self.cuttings[module].stack
            self._splits[source, module] = _Split.of(source, self._of(source, module), stack)
        return self._splits[source, module]
