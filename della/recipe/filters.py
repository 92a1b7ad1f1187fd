"""For which tensors a case of a setting holds: by a part of the name, a pattern, the number of the layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from della.errors import Collector, clip
from della.recipe.tree import Items, Leaf, Node, Table, example, show

KEYS = ("filter", "layers", "not")
PATTERN = "re:"
_LAYER = re.compile(r".*?\.(\d+)\.")
_RANGE = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?")
_MOST_SIGNS, _LONGEST = 4, 200  # a pattern comes from anywhere, and must end soon


@dataclass(frozen=True)
class Filter:
    """All of what is said must hold: ``part`` and not ``never`` (a part of the name, or ``re:`` and a regular
    expression), and the number of the layer in one of ``layers`` (first, last).  Nothing said holds for all.

    >>> Filter("mlp", ((3, 7),), "down").fits("model.layers.5.mlp.up_proj.weight")
    True
    >>> str(Filter("mlp", ((3, 7),), "down"))
    'mlp, layers: 3-7, not: down'
    """

    part: str = ""
    layers: tuple[tuple[int, int], ...] = ()
    never: str = ""

    def fits(self, tensor_name: str) -> bool:
        """Whether it holds for a tensor."""
        if not _is_in(self.part, tensor_name) or (self.never and _is_in(self.never, tensor_name)):
            return False
        if not self.layers:
            return True
        match = _LAYER.match(tensor_name)
        return match is not None and any(first <= int(match[1]) <= last for first, last in self.layers)

    @property
    def is_plain(self) -> bool:
        """Whether it says a part of a name alone, as mergekit knows it."""
        return not (self.layers or self.never or self.part.startswith(PATTERN))

    def __str__(self) -> str:
        numbers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.layers)
        said = (self.part, f"layers: {numbers}" * bool(numbers), f"not: {self.never}" * bool(self.never))
        return ", ".join(filter(None, said))

    def __bool__(self) -> bool:
        """Whether it leaves out any tensor."""
        return self != Filter()


def _is_in(part: str, name: str) -> bool:
    if part.startswith(PATTERN):
        return re.search(part[len(PATTERN) :].strip(), name) is not None  # which re keeps compiled
    return part in name


def read_filter(case: Table, subject: str, about: str, problems: Collector) -> Filter | None:
    """The filter of a case of the parameter ``about``; None after adding to ``problems``."""
    before = len(problems)
    nodes = {key: case.entries[key].node for key in KEYS if key in case.entries}
    known = {key: node for key, node in nodes.items() if not (isinstance(node, Leaf) and node.value is None)}

    def tell(node: Node, said: str, fix: str | None = None) -> None:
        problems.add(said, fix, location=node.location, parameter=about)

    parts = {"filter": "", "not": ""}
    for key in (key for key in parts if key in known):
        node = known[key]
        if not isinstance(node, Leaf):
            what = "filter" if key == "filter" else f"{key!r}"
            tell(node, f"the {what} of {subject} must be a part of a tensor's name, found {show(node)}")
        elif key == "not" and node.text == "*":
            tell(node, f"'not: *' of {subject} holds for no tensor", "leave the case out")
        elif node.text != "*":
            parts[key] = node.text
            if wrong := _wrong(node.text):
                tell(node, f"the pattern {clip(node.text)!r} of {subject} {wrong[0]}", wrong[1])
    layers = _layers(known["layers"], subject, tell) if "layers" in known else ()
    return Filter(parts["filter"], layers, parts["not"]) if len(problems) == before else None


def _wrong(text: str) -> tuple[str, str | None] | None:
    """(what is wrong, what to do) about a pattern."""
    if not text.startswith(PATTERN):
        return None
    pattern = text[len(PATTERN) :].strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what Python will read otherwise one day
            re.compile(pattern)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}", "a '.' is any character, and '\\.' a dot"
    plain = re.sub(r"\\.", "x", pattern)
    loops = re.findall(r"[*+?]|\{\d*,", re.sub(r"\[[^\]]*\]", "x", plain))
    if re.search(r"\)[*+?{]|\(\?[^:]", plain) or len(loops) > _MOST_SIGNS or len(pattern) > _LONGEST:
        said = f"may take forever: it repeats a group, or has more than {_MOST_SIGNS} of *, + and ?"
        return said, "write it with alternatives such as (up|down), or as several cases"
    return None


def _layers(node: Node, subject: str, tell: Any) -> tuple[tuple[int, int], ...]:
    """The ranges of ``layers: 3-7``, ``layers: 5`` or ``layers: [0, 3-7]``; last ones are among them."""
    leaves = node.nodes if isinstance(node, Items) else [node]
    found = []
    for text in _pieces(leaves):
        match = _RANGE.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            said = (
                f"'layers' of {subject} must be numbers of layers and ranges of them, found {example(node)}"
            )
            tell(node, said, "write 'layers: 3-7' for the layers 3 to 7, or 'layers: [0, 3-7]'")
            return ()
        found.append((first, last))
    return tuple(found)


def _pieces(nodes: Iterable[Node]) -> list[str]:
    """The texts of a list, of which one may hold several."""
    texts = [node.text if isinstance(node, Leaf) else "" for node in nodes]
    return [piece.strip() for text in texts for piece in text.split(",")] or [""]
