"""Slices and modules: a recipe that makes a model out of parts is read as several recipes, one for each part.

A part's recipe is written as a tree: what stands in the slice goes before what stands in its module, and that
before what stands at the top level.  So the same reader reads it, and the same planner plans it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from della.errors import Location
from della.merging.registry import METHODS
from della.recipe.filters import KEYS as FILTERS
from della.recipe.models import ModelEntry, Part, Recipe
from della.recipe.references import identities, same
from della.recipe.tree import Entry, Items, Leaf, Node, Table, example, show

PARTED = ("slices", "modules")
SLICE_KEYS = ("sources", "merge_method", "base_model", "parameters", "residual_weight")
MODULE_KEYS = ("models", "slices", "merge_method", "base_model", "parameters")
# Of the top level: not of a part, or what a part inherits.
_ABOVE = ("models", "slices", "modules", "name", "merge_method", "base_model", "parameters")
Tell = Callable[[Location, str, str, str | None], None]
Strange = Callable[[Table, Sequence[str], str, str], None]


class Piece(NamedTuple):
    """A part as a tree: its recipe with ``models``, its label ("slice 2"), its module, whether it is cut."""

    table: Table
    label: str
    module: str
    at: Location
    is_cut: bool


def is_parted(root: Table) -> bool:
    """Whether a recipe makes a model out of parts."""
    return any(_given(root, key) for key in PARTED)


def pieces(root: Table, tell: Tell, strange: Strange) -> list[Piece]:
    """The parts of a recipe; what is wrong goes to ``tell``, keys that are not known to ``strange``."""
    found = [*_pieces(root, {}, "", "", tell, strange)]
    tops = {key: entry for key, entry in root.entries.items() if key not in _ABOVE}
    return [
        piece._replace(table=Table(piece.table.location, tops | piece.table.entries))
        for piece in _without_idle(found, root.entries.get("base_model"))
    ]


def _pieces(
    level: Table, above: Mapping[str, Entry], of: str, module: str, tell: Tell, strange: Strange
) -> Iterator[Piece]:
    """The parts that stand in the recipe itself or in one of its modules."""
    kinds = ("models", "slices", *(() if module else ("modules",)))
    stand = [key for key in kinds if _given(level, key)]
    if len(stand) != 1:
        where = f"module {module}" if module else "the recipe"
        said = f"{where} has {' and '.join(map(repr, stand)) or 'neither models nor slices'}"
        fix = f"keep one of {', '.join(map(repr, stand))}" if stand else "write 'models:' or 'slices:' in it"
        at = max((level.entries[key].key for key in stand), default=level.location)
        tell(at, "slices", said, fix)
        return
    given, key, node = _below(above, level), stand[0], level.entries[stand[0]].node
    if key == "models":
        table = Table(level.location, {**given, "models": level.entries["models"]})
        yield Piece(table, of.removeprefix(" of "), module, level.location, False)
    elif key == "modules":
        if not isinstance(node, Table) or not node.entries:
            said = "'modules' must be a mapping of names to models or slices"
            tell(node.location, key, f"{said}, found {show(node)}", "write 'modules: {text_decoder: ...}'")
            return
        for name, entry in node.entries.items():
            if not isinstance(entry.node, Table):
                said = f"module {name} must be a mapping with 'models' or 'slices', found {show(entry.node)}"
                tell(entry.node.location, key, said, None)
                continue
            strange(entry.node, MODULE_KEYS, f"in module {name}", f"module {name}")
            yield from _pieces(entry.node, given, f" of module {name}", name, tell, strange)
    elif not isinstance(node, Items) or not node.nodes:
        found = "an empty list" if isinstance(node, Items) else show(node)
        said = f"'slices' must be a list of entries that begin with '- sources:', found {found}"
        tell(node.location, key, said, "write '- sources:' with a list of models below it")
    else:
        for number, child in enumerate(node.nodes, 1):
            label = f"slice {number}{of}"
            if own := _sources(child, label, tell, strange):
                table = Table(own.location, {**_below(given, own), "models": own.entries["sources"]})
                yield Piece(table, label, module, own.location, True)


def _sources(node: Node, label: str, tell: Tell, strange: Strange) -> Table | None:
    """A slice that has sources; None after telling what is wrong."""
    if not isinstance(node, Table):
        said = f"{label} must be a mapping that begins with 'sources:', found {show(node)}"
        tell(node.location, "slices", said, None)
        return None
    strange(node, SLICE_KEYS, f"in {label}", label)
    entry = node.entries.get("sources")
    if entry is None or not isinstance(entry.node, Items) or not entry.node.nodes:
        found = "" if entry is None else f", found {show(entry.node)}"
        said = f"{label} needs 'sources', a list of entries with 'model' and 'layer_range'{found}"
        fix = "write 'sources: [{model: NAME, layer_range: [0, 8]}]'"
        tell(node.location if entry is None else entry.node.location, "sources", said, fix)
        return None
    return node


def _given(table: Table, key: str) -> bool:
    node = table.entries[key].node if key in table.entries else None
    return node is not None and not (isinstance(node, Leaf) and node.value is None)


def _below(above: Mapping[str, Entry], level: Table) -> dict[str, Entry]:
    """What a part inherits: the keys of ``level`` before those ``above`` it."""
    found = dict(above)
    for key in ("merge_method", "base_model"):
        found |= {key: level.entries[key]} if _given(level, key) else {}
    if _given(level, "parameters"):
        own = level.entries["parameters"]
        outer = above["parameters"].node if "parameters" in above else None
        if isinstance(own.node, Table) and isinstance(outer, Table):
            own = Entry(own.key, Table(own.node.location, _settings(own.node, outer)))
        found["parameters"] = own
    return found


def _settings(own: Table, outer: Table) -> dict[str, Entry]:
    found = dict(outer.entries)
    for key, entry in own.entries.items():
        node = _before(entry.node, outer.entries[key].node) if key in outer.entries else entry.node
        found[key] = Entry(entry.key, node)
    return found


def _before(own: Node, outer: Node) -> Node:
    """A setting, with another for those tensors for which none of its cases holds."""
    mine, theirs = _cases(own), _cases(outer)
    if not mine or not any(_given(mine[-1], key) and _text(mine[-1], key) != "*" for key in FILTERS):
        return own
    rest = theirs or [Table(outer.location, {"value": Entry(outer.location, outer)})]
    return Items(own.location, [*mine, *rest])


def _cases(node: Node) -> list[Table]:
    nodes = node.nodes if isinstance(node, Items) else [node]
    tables = [each for each in nodes if isinstance(each, Table)]
    return tables if len(tables) == len(nodes) else []


def _without_idle(found: Sequence[Piece], base: Entry | None) -> list[Piece]:
    """Without what a part inherits and cannot use: the ``base`` of the whole, parameters of others."""
    methods = [METHODS.get(_text(piece.table, "merge_method")) for piece in found]
    used = {name for method in methods if method for name in method.parameters}
    based = [
        method is None or (method.with_base or method).needs_base or _lists_base(piece.table)
        for piece, method in zip(found, methods, strict=True)
    ]
    made = []
    for piece, method, has_base in zip(found, methods, based, strict=True):
        entries = dict(piece.table.entries)
        if not has_base and entries.get("base_model") is base:
            entries.pop("base_model", None)
        given = entries.get("parameters")
        if method and given and isinstance(given.node, Table):
            own = {k: e for k, e in given.node.entries.items() if k in method.parameters or k not in used}
            entries["parameters"] = Entry(given.key, Table(given.node.location, own))
        made.append(piece._replace(table=Table(piece.table.location, entries)))
    return made


def _text(table: Table, key: str) -> str:
    node = table.entries[key].node if key in table.entries else None
    return node.text if isinstance(node, Leaf) else ""


def _lists_base(table: Table) -> bool:
    base, node = _text(table, "base_model"), table.entries["models"].node
    listed = node.nodes if isinstance(node, Items) else []
    return any(isinstance(each, Table) and same(_text(each, "model"), base) for each in listed)


# ---- what a slice says of layers --------------------------------------------------------------------------


def layer_range(source: Table, owner: str, tell: Tell) -> tuple[tuple[int, int] | None, Location]:
    """The layers ``[first, end)`` that a source gives, None after telling what is wrong; where it says so."""
    entry = source.entries.get("layer_range")
    at = entry.node.location if entry else source.location
    return _range(entry.node if entry else None, owner, at, tell), at


def _range(node: Node | None, owner: str, location: Location, tell: Tell) -> tuple[int, int] | None:
    key, cure = "layer_range", "write 'layer_range: [0, 8]' for its first eight layers"
    if node is None:
        tell(location, key, f"{owner} does not say which layers it gives", cure)
        return None
    values = [n.value if isinstance(n, Leaf) else None for n in node.nodes] if isinstance(node, Items) else []
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(values) != 2 or len(whole) != 2:
        said = f"{key!r} of {owner} must be two whole numbers [first, end], the end not being one of them"
        tell(node.location, key, f"{said}, found {example(node)}", cure)
        return None
    first, end = whole
    if not 0 <= first <= end:
        said = f"{key!r} of {owner} is [{first}, {end}], and a range goes from 0 or a later layer upwards"
        tell(node.location, key, said, f"write [{min(abs(first), abs(end))}, {max(abs(first), abs(end))}]")
        return None
    return first, end


def check_lengths(ranges: Sequence[tuple[str, tuple[int, int] | None, Location]], tell: Tell) -> None:
    """The sources of a slice give as many layers each; ``ranges`` are (owner, range, location)."""
    known = [(owner, given, at) for owner, given, at in ranges if given]
    for owner, (first, end), at in known[1:]:
        other, (a, b), _ = known[0]
        if end - first != b - a:
            said = f"{owner} gives {_many(end - first)} ([{first}, {end}]), and {other} {b - a} ([{a}, {b}])"
            tell(at, "layer_range", said, f"write [{first}, {first + b - a}], or give both the same length")
            return


def _many(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


# ---- the whole --------------------------------------------------------------------------------------------


def joined(
    parts: Sequence[Part], base: str | None, name: str | None, text: str, notes: Sequence[str]
) -> Recipe:
    """The recipe of the whole: the models of all parts, each once, and what they share."""
    order: dict[tuple[str, str | None, int], ModelEntry] = {}
    keys: list[list[tuple[str, str | None, int]]] = []
    for part in parts:
        counts: dict[tuple[str, str | None], int] = {}
        keys.append([])
        for entry in part.recipe.models:
            known = entry.reference, entry.input_norms
            counts[known] = counts.get(known, 0) + 1
            keys[-1].append((*known, counts[known]))
            order.setdefault(keys[-1][-1], entry)
    names = dict(zip(order, identities([entry.reference for entry in order.values()]), strict=True))
    made = []
    for part, own in zip(parts, keys, strict=True):
        models = tuple(
            replace(entry, identity=names[key]) for entry, key in zip(part.recipe.models, own, strict=True)
        )
        made.append(replace(part, recipe=replace(part.recipe, models=models)))
    first = next((p.recipe for p in parts if p.recipe.method.needs_base), parts[0].recipe)
    return replace(
        first,
        name=name,
        text=text,
        parts=tuple(made),
        base_model=base or first.base_model,
        models=tuple(replace(entry, identity=names[k], layers=None) for k, entry in order.items()),
        merge_method=", ".join(dict.fromkeys(part.recipe.merge_method for part in parts)),
        notes=tuple(dict.fromkeys((*notes, *(note for part in parts for note in part.recipe.notes)))),
    )
