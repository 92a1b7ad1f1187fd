"""Several documents in one recipe (---): each is a merge, and may name the result of another as a model.

So one file says how a model is made in stages.  It gives one model: the result of the document that no other
one names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from della.errors import Collector, Location, RecipeError, clip, suggest
from della.options import Changes, spelt
from della.recipe.models import Recipe
from della.recipe.reader import read_recipe, read_tree
from della.recipe.references import named_model
from della.recipe.text import dump_all, load_text, parse_all
from della.recipe.tree import Items, Leaf, Node, Table

_NAMING = ("model", "base_model")
_SEPARATOR = re.compile(r"^---(\s|$)", re.MULTILINE)


def read_documents(
    source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), lenient: bool = False
) -> Recipe:
    """The recipe of the result, as `read_recipe` with ``check=False``; the documents that lead to it are its
    ``others``, in the order in which they are merged.

    Overrides of a parameter or of a key of the top level hold for every document.

    Raises RecipeError, also where documents name each other in a circle, have the same name, or lead nowhere.
    """
    problems = Collector(RecipeError)
    roots: list[Node] = []
    path, text = None, ""
    if not isinstance(source, Mapping):
        path, name, text = load_text(source)
        if _SEPARATOR.search(text):
            roots = [root for root in parse_all(text, name, problems) if not _is_empty(root)]
    if len(roots) < 2:
        return read_recipe(source, overrides=overrides, check=False, lenient=lenient)
    for override in overrides:
        if "." in (key := override.partition("=")[0]):
            said = f"{clip(key.strip())!r} leads into one document, and the recipe has {len(roots)}"
            fix = "change it in the file; only whole parameters, such as lambda=0.9, can be set for all"
            problems.add(f"{spelt(Changes, 'overrides')}: {said}", fix)
    problems.raise_any()
    read: dict[int, Recipe] = {}
    for number, root in enumerate(roots):
        with problems:
            read[number] = read_tree(root, path, None, problems, overrides, lenient)
    order = _Links(roots, path.parent if path else Path(), problems).order()
    problems.raise_any()
    *others, last = [read[number] for number in order]
    whole = dump_all(roots) if overrides or lenient else text
    return replace(last, text=whole, others=tuple(others))


def _is_empty(root: Node) -> bool:
    return isinstance(root, Leaf) and root.value is None


class _Links:
    """Which document needs which; what is wrong about that goes to ``problems``."""

    def __init__(self, roots: Sequence[Node], folder: Path, problems: Collector) -> None:
        self.roots, self.folder, self.problems = roots, folder, problems
        self.names: dict[str, int] = {}
        for number, root in enumerate(roots):
            if (name := self._name(root)) is None:
                continue
            first = self.names.setdefault(name, number)
            if first != number:
                at, line = _at(root, "name"), _at(roots[first], "name").line
                said = f"two documents are called {clip(name)!r}, here and in line {line}"
                problems.add(said, "give each a name of its own", location=at, parameter="name")
        self.is_lost = False
        self.needs = [list(self._needed(number)) for number in range(len(roots))]

    def order(self) -> list[int]:
        """The documents, each behind those that it needs; the result is the last one."""
        needed = {other for others in self.needs for other in others}
        ends = [number for number in range(len(self.roots)) if number not in needed]
        nameless = [number for number in ends if self._name(self.roots[number]) is None]
        for number in [n for n in ends if n != (nameless or ends)[-1] and not self.is_lost]:
            name = self._name(self.roots[number])
            said = f"no other document names {clip(name)!r}" if name else "this document has no name"
            fix = "name it as a model of another one" if name else "give it one, and name it in another one"
            fix += ", or move it into a file of its own: a recipe gives one model"
            self.problems.add(said, fix, location=self.roots[number].location, parameter="name")
        found: list[int] = []
        for number in [*ends, *range(len(self.roots))]:
            self._visit(number, found, [])
        return found

    def _visit(self, number: int, found: list[int], above: list[int]) -> None:
        if number in above:
            ring = above[above.index(number) :]
            first = ring.index(min(ring))
            ring = [*ring[first:], *ring[: first + 1]]
            names = " -> ".join(str(self._name(self.roots[each])) for each in ring)
            said, fix = (
                f"documents need each other in a circle: {names}",
                "let one of them name a model instead",
            )
            self.problems.add(said, fix, location=self.roots[ring[0]].location, parameter="models")
        elif number not in found:
            for other in self.needs[number]:
                self._visit(other, found, [*above, number])
            if number not in found:
                found.append(number)

    def _needed(self, number: int) -> Iterator[int]:
        """The documents that one names as models; names of nothing are told."""
        for reference, location in dict.fromkeys(_references(self.roots[number])):
            if reference in self.names:
                yield self.names[reference]
            elif not set(reference) & set("/\\:~") and not self._is_there(reference):
                self.is_lost = True
                said = f"{clip(reference)!r} is the name of no document, and no folder is called so"
                fix = suggest(reference, self.names) or f"there is {', '.join(map(clip, self.names))}"
                self.problems.add(said, fix, location=location, parameter="model")

    def _is_there(self, reference: str) -> bool:
        return any(os.path.lexists(root / reference) for root in (self.folder, Path()))

    def _name(self, root: Node) -> str | None:
        leaf = root.entries["name"].node if isinstance(root, Table) and "name" in root.entries else None
        return leaf.text if isinstance(leaf, Leaf) and leaf.text.strip() else None


def _at(root: Node, key: str) -> Location:
    return root.entries[key].key if isinstance(root, Table) else root.location


def _references(node: Node, key: str = "") -> Iterator[tuple[str, Location]]:
    """The models that stand in a document, and where."""
    if key in _NAMING and (leaf := named_model(node, "", lambda *_: None)):
        yield leaf.text, leaf.location
    elif isinstance(node, Items):
        for child in node.nodes:
            yield from _references(child)
    elif isinstance(node, Table) and key != "parameters":
        for name, entry in node.entries.items():
            yield from _references(entry.node, name)
