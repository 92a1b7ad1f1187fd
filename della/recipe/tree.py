"""A recipe as a tree whose nodes know where they were written; from objects here, from text in recipe_yaml.

Numbers are read as in YAML 1.2 and JSON: ``1e-10`` is a number; ``010`` and ``1:30``, which YAML 1.1 reads as
8 and 90, stay text, so that a numeric setting refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from della.errors import Location, Problem, RecipeError, clip

MAX_DEPTH = 32
MAX_VALUES = 10_000

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")

Value = bool | int | float | str


@dataclass(frozen=True)
class Leaf:
    """One scalar: what it means, and its ``text`` as written; ``plain`` is False for quoted text."""

    location: Location
    text: str
    plain: bool
    value: Value | None


@dataclass
class Items:
    """A list."""

    location: Location
    nodes: list[Node]


class Entry(NamedTuple):
    """One ``key: value`` of a Table."""

    key: Location
    node: Node


@dataclass
class Table:
    """A mapping; keys are text as written."""

    location: Location
    entries: dict[str, Entry]


Node = Leaf | Items | Table


def refusal(location: Location, said: str, fix: str | None = None) -> RecipeError:
    """One fault of a recipe behind which nothing of it can be read."""
    return RecipeError(Problem(said, fix, location=location))


def show(node: Node) -> str:
    """A value as an error message names it."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    if node.value is None:
        return "nothing"
    return repr(clip(node.text)) if isinstance(node.value, str) else clip(node.text)


def example(node: Node) -> str:
    """A value as an example in an error message writes it."""
    if isinstance(node, Items) and all(isinstance(child, Leaf) for child in node.nodes):
        return clip("[" + ", ".join(child.text for child in node.nodes if isinstance(child, Leaf)) + "]")
    return clip(node.text) if isinstance(node, Leaf) and node.text else "..."


def number(text: str) -> int | float | None:
    """The number that ``text`` writes in plain decimal, or None."""
    if _INTEGER.fullmatch(text) and len(text) <= 40:
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return None


def meaning(text: str) -> Value | None:
    """What unquoted text means."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    lower = text.lower()
    if lower in _TRUE + _FALSE and text in (lower, lower.title(), lower.upper()):
        return lower in _TRUE
    value = number(text)
    return text if value is None else value


def forbidden(character: str) -> tuple[str, str]:
    """(what is wrong, what to do) about a character that no recipe may have."""
    return f"the character U+{ord(character):04X} is not allowed in a recipe", "remove it"


def make_leaf(location: Location, text: str, plain: bool) -> Leaf:
    bad = FORBIDDEN.search(text)
    if bad:
        raise refusal(location, *forbidden(bad[0]))
    return Leaf(location, text, plain, meaning(text) if plain else text)


def from_objects(value: Any) -> Node:
    """The tree of a recipe given as Python objects; NumPy values, tuples and paths are welcome."""
    made = 0

    def convert(value: Any, path: str, depth: int) -> Node:
        nonlocal made
        made += 1
        location = Location(made, 0, f"recipe at {clip(path, 200)}" if path else "recipe")
        if depth > MAX_DEPTH or made > MAX_VALUES:
            raise refusal(location, "nested too deep or too large", "is something in it a part of itself?")
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, Mapping):
            table = Table(location, {})
            for key, child in value.items():
                if not isinstance(key, str):
                    raise refusal(location, f"keys must be text, found {clip(repr(key))}")
                node = convert(child, f"{path}.{key}" if path else key, depth + 1)
                table.entries[make_leaf(location, key, False).text] = Entry(node.location, node)
            return table
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
            return Items(
                location, [convert(child, f"{path}.{i}", depth + 1) for i, child in enumerate(value)]
            )
        if isinstance(value, PurePath):
            value = str(value)
        if isinstance(value, str):
            return make_leaf(location, value, False)
        if value is None or isinstance(value, (bool, int, float)):
            return Leaf(location, _plain_text(value), True, value)
        raise refusal(location, f"a recipe cannot hold a {type(value).__name__}")

    return convert(value, "", 1)


def _plain_text(value: float | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else hex(value)
    text = repr(float(value))
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
