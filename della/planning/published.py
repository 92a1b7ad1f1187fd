"""What others may read of a plan: models by their names on the Hub or the last part of their path, the recipe
without paths of this machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path, PureWindowsPath

from della.checkpoint.source import HUB_ID, Source, plain
from della.errors import Collector, RecipeError
from della.recipe.reader import Recipe
from della.recipe.references import identities, named_model
from della.recipe.text import dump_all, parse_all
from della.recipe.tree import Entry, Items, Leaf, Node, Table, make_leaf

_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")
# Keys of a recipe under which a model is named, and what is none there.
_NAMING = ("base_model", "model", "input_norms", "tokenizer_source", "source")
_WORDS = ("base", "union")
_WORD = re.compile(r"""[^\s'"\[\]{},()`]+""")


def hub_name(source: Source) -> str | None:
    """owner/name of a model of the Hub: as it was named, by its folder in a hub cache, or as config.json says
    where it was loaded from; None where nothing tells."""
    match = HUB_ID.fullmatch(source.reference)
    if match and source.revision:
        return match["repo"]
    for part in source.path.parts:
        if cache := _CACHE.fullmatch(part):
            return f"{cache['owner']}/{cache['name']}"
    said = source.config.get("_name_or_path")
    is_name = isinstance(said, str) and HUB_ID.fullmatch(said) is not None and not os.path.lexists(said)
    return str(said).split("@")[0] if is_name else None


def shown_references(recipe: Recipe) -> dict[str, str]:
    """What each reference to a place of this machine is called elsewhere: the end of its path, as long as it
    needs to be one's own."""
    names: dict[str, str] = {}
    for reference in filter(is_absolute, _references(recipe)):
        parts = re.split(r"[/\\]", reference.rstrip("/\\"))
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            if name not in names.values():
                break
        names[reference] = name
    return names


def shown_text(text: str, names: Mapping[str, str]) -> str:
    """A text with each reference of ``names`` as it is called elsewhere, also where YAML escapes it."""
    for reference in sorted(names, key=len, reverse=True):
        for written in dict.fromkeys((reference, json.dumps(reference)[1:-1], reference.replace("'", "''"))):
            folded = r"\s+".join(map(re.escape, written.split(" ")))  # YAML breaks lines at spaces
            text = re.sub(folded, lambda _, name=names[reference]: name, text)  # type: ignore[misc]
    return text


def portable_references(recipe: Recipe) -> dict[str, str]:
    """Each reference to a place of this machine as a path from the deepest folder that holds them all; {}
    where no path of the recipe is absolute.

    Where only the root of the file system holds them all, it is a folder that may be made: a relative path
    would tell as much as the absolute one.  So it is where a path would call an expert otherwise, as what is
    dropped is drawn by that name.
    """
    references = _references(recipe)
    if not any(map(is_absolute, references)):
        return {}
    found = {reference: path.parts for reference in references if (path := _place(reference, recipe.path))}
    steps = zip(*(parts[:-1] for parts in found.values()), strict=False)
    common = sum(1 for _ in takewhile(lambda step: len(set(step)) == 1, steps))
    names = {reference: "/".join((".", *parts[common:])) for reference, parts in found.items()}
    if common < 2 or identities(names) != identities(names.values()):
        names = {reference: f"./{name}" for reference, name in shown_references(recipe).items()}
    return names


def silent(text: str) -> str:
    """The text of a recipe, without its comments where one of them tells of this machine."""
    words = {
        word for word in _WORD.findall(text) if is_absolute(word) and re.search(r"[\w~][/\\]|[/\\]\w", word)
    }
    if not words:
        return text
    roots = parse_all(text, "recipe", Collector(RecipeError))
    bare = dump_all(list(roots))
    return text if all(word in bare for word in words) else bare


def portable_text(recipe: Recipe, names: Mapping[str, str]) -> str:
    """The recipe with its models as ``names`` has them, without comments that tell of this machine."""
    if not names:
        return silent(recipe.text)
    known = {reference.rstrip("/\\"): name for reference, name in names.items()}
    roots = parse_all(recipe.text, "recipe", Collector(RecipeError))
    return dump_all([_renamed(root, known) for root in roots])


def _renamed(node: Node, names: Mapping[str, str], key: str = "") -> Node:
    """A tree in which models are called as ``names`` has them: below ``key``, or by an absolute path."""
    leaf = named_model(node, "", lambda *_: None) if key in _NAMING else node
    if isinstance(leaf, Leaf):
        is_word = key in _NAMING[3:] and leaf.text in _WORDS
        name = None if is_word else names.get(leaf.text.rstrip("/\\"))
        is_model = key in _NAMING or is_absolute(leaf.text)
        return make_leaf(leaf.location, name, False) if name and is_model else node
    if isinstance(node, Items):
        return Items(node.location, [_renamed(child, names) for child in node.nodes])
    assert isinstance(node, Table)
    entries = {
        name: Entry(entry.key, _renamed(entry.node, names, name)) for name, entry in node.entries.items()
    }
    return Table(node.location, entries)


def _references(recipe: Recipe) -> list[str]:
    documents = {other.name for other in recipe.others}
    found: list[str | None] = []
    for each in (recipe, *recipe.others):
        norms = (model.input_norms for model in each.models)
        found += [each.base_model, *(model.reference for model in each.models), *norms]
    return [name for name in dict.fromkeys(found) if name and name not in documents]


def _place(reference: str, recipe: Path | None) -> Path | None:
    """Where a reference leads on this machine; None for a model of the Hub."""
    path = Path(plain(reference)).expanduser()
    if path.is_absolute():
        return path
    roots = (recipe.parent.absolute(), Path.cwd()) if recipe else (Path.cwd(),)
    return next((root / path for root in roots if os.path.lexists(root / path)), None)


def is_absolute(reference: str) -> bool:
    """Whether a reference tells of this machine, in the words of any system."""
    windows = PureWindowsPath(reference)
    return Path(reference).is_absolute() or windows.is_absolute() or reference.startswith(("~", "file:"))
