"""``--set KEY=VALUE``: changes to a recipe's tree before it is read."""

from __future__ import annotations

from collections.abc import Sequence

from della.errors import Collector, Location, clip, suggest
from della.merging.registry import ALL_PARAMETERS
from della.options import Changes, spelt
from della.recipe.slices import PARTED
from della.recipe.text import parse
from della.recipe.tree import Entry, Items, Node, Table, show


def apply_overrides(
    root: Table, overrides: Sequence[str], keys: Sequence[str], problems: Collector
) -> list[str]:
    """Change ``root`` as the overrides say, in order; returns notes.  ``keys`` are those of the top level."""
    notes: list[str] = []
    for number, override in enumerate(overrides):
        # Overrides are told after what stands in the file, in their own order.
        location = Location(10**9 + number, 0, f"{spelt(Changes, 'overrides')} {clip(override, 80)}")
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            said = "an override has the form KEY=VALUE, such as lambda=0.9 or models.0.parameters.weight=1"
            problems.add(said, location=location)
            continue
        value = parse(text, "", problems, location=location)
        if key in ALL_PARAMETERS and key not in keys:
            notes += _everywhere(root, key, value, location)
        elif "." in key or key in keys:
            _put(root, key.split("."), value, location, problems)
        else:
            hint = suggest(key, (*ALL_PARAMETERS, *keys))
            problems.add(f"unknown key {clip(key)!r}", hint, location=location, parameter=key)
    return notes


def _everywhere(root: Table, name: str, value: Node, location: Location) -> list[str]:
    """Make ``value`` the parameter's only setting; a note if models had their own."""
    removed = 0
    inner: list[Node] = [root.entries[key].node for key in ("models", *PARTED) if key in root.entries]
    while inner:
        node = inner.pop()
        if isinstance(node, Items):
            inner += node.nodes
        elif isinstance(node, Table):
            own = node.entries.get("parameters")
            if own and isinstance(own.node, Table) and own.node.entries.pop(name, None) is not None:
                removed += 1
            inner += [entry.node for key, entry in node.entries.items() if key != "parameters"]
    shared = root.entries.get("parameters")
    if shared is None or not isinstance(shared.node, Table):
        shared = root.entries["parameters"] = Entry(location, Table(location, {}))
    assert isinstance(shared.node, Table)
    shared.node.entries[name] = Entry(location, value)
    what = "the setting of one model" if removed == 1 else f"the settings of {removed} models"
    return [f"{location}: this holds for every model and replaces {what}"] if removed else []


def _put(root: Table, steps: list[str], value: Node, location: Location, problems: Collector) -> None:
    node: Node = root
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        so_far = clip(".".join(steps[:depth]))
        if isinstance(node, Items):
            if not step.isdecimal() or len(step) > 9 or int(step) >= len(node.nodes):
                count = len(node.nodes)
                has = f"{so_far} has {count} entries, 0 to {count - 1}" if count else f"{so_far} is empty"
                said = f"{has}; {clip(step)!r} is none of them"
                problems.add(said, location=location, parameter=".".join(steps))
                return
            if last:
                node.nodes[int(step)] = value
            node = node.nodes[int(step)]
        elif isinstance(node, Table):
            old = node.entries.get(step)
            if last:
                node.entries[step] = Entry(location, value)
            elif old is None or getattr(old.node, "value", "") is None:
                node.entries[step] = Entry(location, Table(location, {}))
            node = node.entries[step].node
        else:
            said = f"{so_far} is {show(node)}, which has no {clip(step)!r} in it"
            problems.add(said, location=location, parameter=".".join(steps))
            return
