"""Whether the layers and the tables of a model that is made of others fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from della.checkpoint.source import Source
from della.errors import CheckpointError, Collector, Problem, some
from della.planning import configs
from della.planning.heads import EMBEDDINGS, HEAD
from della.planning.job import Section

_Kind = frozenset[tuple[str, tuple[int, ...]]]


def check_kin(base: Source, sections: Sequence[Section], check: Collector) -> None:
    """Layers of one model are of one kind: each has tensors and shapes of a layer of ``base``, whose
    configuration is written."""
    kinds = {stack: _kinds(base, stack) for stack in {s.layers[0] for s in sections if s.layers}}
    for section in sections:
        if not section.layers or section.base.folder == base.folder:
            continue
        check.extend(_misfits(base, section))
        known = kinds[section.layers[0]]
        for kind, name in _kinds(section.base, section.layers[0]).items():
            if kind not in known:
                with check:
                    raise CheckpointError(_stranger(base, section, dict(kind), known, name))
                break


def _misfits(base: Source, section: Section) -> Iterator[Problem]:
    """What stands outside of the layers has the shape that the configuration says."""
    for name, view in section.base.tensors.items():
        ours = base.tensors.get(name)
        if ours is None or ours.shape == view.shape or configs.STACK.match(name):
            continue
        said = f"{section.label}: {name} has shape {list(view.shape)}, and that of {base.reference}"
        resize = "save it with as many rows (resize_token_embeddings of transformers)"
        is_table = EMBEDDINGS.search(name) or HEAD.search(name)
        fix = resize if is_table else "name a model of the same sizes"
        yield Problem(f"{said} {list(ours.shape)}", fix, section.base.reference, name)


def layers_of(source: Source, stack: str) -> dict[int, _Kind]:
    """What each layer consists of: names and shapes."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, view in source.tensors.items():
        if (match := configs.STACK.match(name)) and match[1] == stack:
            layers.setdefault(int(match[2]), {})[name[match.end() :]] = view.shape
    return {number: frozenset(own.items()) for number, own in layers.items()}


def _kinds(source: Source, stack: str) -> dict[_Kind, str]:
    """What a layer consists of, for each kind of layer; with the name of the first such layer."""
    found: dict[_Kind, str] = {}
    for number, kind in layers_of(source, stack).items():
        found.setdefault(kind, f"{stack}.{number}")
    return found


def _stranger(
    base: Source, section: Section, layer: Mapping[str, tuple[int, ...]],
    known: Mapping[_Kind, str], name: str,
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
