"""YAML as far as a recipe needs it: text to a tree (recipe_tree.py) and back.  No other module knows YAML.

Nothing is constructed from tags, and what a hostile text can cost is bounded: size, depth, number of values,
and what aliases expand to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from della.errors import Collector, Location, Problem, RecipeError, clip
from della.recipe.dialect import other_text
from della.recipe.tree import (
    FORBIDDEN,
    MAX_DEPTH,
    MAX_VALUES,
    Entry,
    Items,
    Leaf,
    Node,
    Table,
    forbidden,
    from_objects,
    make_leaf,
    meaning,
    refusal,
    show,
)

MAX_BYTES = 1 << 20
MAX_EXPANDED = 10_000
MAX_DOCUMENTS = 100
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep, which no recipe is"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.SafeLoader("")
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_BRACKET = re.compile(r"""[\[{}\]]|"(?:[^"\\]|\\.)*"|'[^']*'""")
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def load_text(source: str | Path) -> tuple[Path | None, str, str]:
    """(path, name for messages, text) of a recipe file, or of YAML text, which is told by its line break."""
    if isinstance(source, str) and "\n" in source:
        data, name, path = source.encode("utf-8", "surrogatepass"), "recipe", None
    else:
        name, path = clip(str(source), 1000), Path(source)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            hint = "YAML given as text must hold a line break" if ": " in name else None
            raise RecipeError(Problem("no such file", hint, name)) from None
        except IsADirectoryError:
            raise RecipeError(Problem("this is a folder", "name the recipe file in it", name)) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RecipeError(Problem(f"cannot be read: {reason}", subject=name)) from None
    if len(data) > MAX_BYTES:
        said = "larger than 1 MiB, which no recipe is"
        raise RecipeError(Problem(said, "is this the right file?", name))
    return path, name, _decode(data, name)


def _decode(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise refusal(Location(1, 1, name), "saved as UTF-16", "save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", "replace")
        location = _location_at(before, len(before), name)
        byte = data[error.start]
        raise refusal(location, f"not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8") from None
    fence = text.lstrip()[:3]
    if fence in ("'''", '"""', "```"):
        location = _location_at(text, text.index(fence), name)
        first = clip(text.lstrip().splitlines()[0].rstrip())
        said = "a recipe is a mapping that begins with a key such as 'models:', but this begins with"
        fix = f"remove the line with {fence} at the beginning and the one at the end"
        raise refusal(location, f"{said} {first!r}", fix)
    if foreign := other_text(text):
        raise refusal(_location_at(text, foreign[0], name), *foreign[1:])
    return text


def _location_at(text: str, index: int, name: str) -> Location:
    breaks = [match.end() for match in _LINE_BREAK.finditer(text, 0, index)]
    return Location(len(breaks) + 1, index - (breaks[-1] if breaks else 0) + 1, name)


def parse(text: str, name: str, problems: Collector, *, location: Location | None = None) -> Node:
    """The tree of one YAML document.  Every node is placed at ``location`` if it is given (an override)."""
    return parse_all(text, name, problems, location=location, most=1)[0]


def parse_all(
    text: str, name: str, problems: Collector, *, location: Location | None = None, most: int = MAX_DOCUMENTS
) -> list[Node]:
    """The trees of all YAML documents (---) of a text, at least one and at ``most`` so many."""
    bad = FORBIDDEN.search(text)
    if bad:
        raise refusal(location or _location_at(text, bad.start(), name), *forbidden(bad[0]))
    try:
        return _Composer(text, name, problems, location).documents(most)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" in str(error.problem):
            at, said, fix = _too_deep(text, error.problem_mark, name), TOO_DEEP, None
        else:
            at, said, fix = _explain(error, text, name)
    except yaml.YAMLError as error:
        at, fix = Location(0, 0, name), None
        said = f"this is not valid YAML: {clip(str(error).splitlines()[0])}"
    raise refusal(location or at, said, fix)


def _too_deep(text: str, mark: Any, name: str) -> Location:
    """Where a recipe's deepest level is left, in a text whose nesting made libyaml give up at ``mark``.

    It gives up in looking ahead for the ':' of a key, which must come in the same line and within 1,024
    characters.  So all that opens before them has been told as an event, and what opens in them is counted.
    """
    depth = begin = 0
    try:
        for event in _events(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            begin = event.end_mark.index
    except yaml.YAMLError:
        pass
    index = mark.index
    for match in _BRACKET.finditer(text, max(begin, index - mark.column), index):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            index = match.start()
            break
    return _location_at(text, index, name)


def _events(text: str) -> Iterator[Any]:
    return iter(_LOADER(text).get_event, None)


class _Composer:
    """Parser events to nodes, with the bounds that PyYAML's own composer lacks."""

    def __init__(self, text: str, name: str, problems: Collector, location: Location | None) -> None:
        self.events = _events(text)
        self.name, self.problems, self.fixed = name, problems, location
        self.values = self.expanded = 0
        self.anchors: dict[str, tuple[Node, int] | None] = {}

    def documents(self, most: int) -> list[Node]:
        roots: list[Node] = []
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if len(roots) == most:
                    said = "one document more (---) begins here than can be read"
                    raise refusal(self.location(event), said, "use one file each")
                self.anchors.clear()
                roots.append(self.node(next(self.events), 1))
        return roots or [Leaf(self.fixed or Location(1, 1, self.name), "", True, None)]

    def location(self, event: Any) -> Location:
        mark = event.start_mark
        return self.fixed or Location(mark.line + 1, mark.column + 1, self.name)

    def node(self, event: Any, depth: int) -> Node:
        location, before, anchor = self.location(event), self.values, event.anchor
        self.values += 1
        if depth > MAX_DEPTH:
            raise refusal(location, TOO_DEEP)
        if self.values > MAX_VALUES:
            raise refusal(location, f"more than {MAX_VALUES:,} values, which no recipe has")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(anchor, location, depth)
        if event.tag is not None:
            tag = clip(event.tag.replace("tag:yaml.org,2002:", "!!"))
            raise refusal(location, f"the tag {tag} is not read in a recipe", "remove it")
        if anchor:
            self.anchors[anchor] = None
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = make_leaf(location, event.value, event.implicit[0])
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Items(location, [])
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                node.nodes.append(self.node(event, depth + 1))
        else:
            node = Table(location, {})
            while not isinstance(event := next(self.events), yaml.MappingEndEvent):
                self.entry(node, self.node(event, depth + 1), depth)
        if anchor:
            self.anchors[anchor] = node, self.values - before
        return node

    def entry(self, table: Table, key: Node, depth: int) -> None:
        value = self.node(next(self.events), depth + 1)
        if not isinstance(key, Leaf):
            raise refusal(key.location, f"{show(key)} cannot be a key", "a key is a word such as 'weight'")
        elif key.plain and key.text == "<<":
            said = "merge keys (<<) are not read in a recipe"
            self.problems.add(said, "write the keys out here", location=key.location)
        elif key.text in table.entries:
            first = table.entries[key.text].key
            at = f"in line {first.line}" if first.column else "before"
            said = f"the key {clip(key.text)!r} stands twice, here and {at}"
            self.problems.add(said, "keep one of them", location=key.location, parameter=key.text)
        else:
            table.entries[key.text] = Entry(key.location, value)

    def alias(self, name: str, location: Location, depth: int) -> Node:
        if name not in self.anchors:
            raise refusal(location, f"the alias *{clip(name)} has no anchor &{clip(name)} before it")
        target = self.anchors[name]
        if target is None:
            raise refusal(location, f"the alias *{clip(name)} refers to itself")
        self.expanded += target[1]
        if self.expanded > MAX_EXPANDED:
            raise refusal(
                location, f"aliases expand to more than {MAX_EXPANDED:,} values, which no recipe needs"
            )
        self.values += target[1]
        return self.copy(target[0], depth)

    def copy(self, node: Node, depth: int) -> Node:
        """An alias becomes a copy, so that an override of one model does not reach another."""
        if depth > MAX_DEPTH:
            raise refusal(node.location, TOO_DEEP)
        if isinstance(node, Items):
            return Items(node.location, [self.copy(child, depth + 1) for child in node.nodes])
        if isinstance(node, Table):
            copied = {key: Entry(e.key, self.copy(e.node, depth + 1)) for key, e in node.entries.items()}
            return Table(node.location, copied)
        return node


_LOST_INDENT = (
    "what belongs to a list item stands under its first key:\n"
    "      - model: NAME\n"
    "        parameters:\n"
    "          density: 0.5"
)


def _explain(error: yaml.MarkedYAMLError, text: str, name: str) -> tuple[Location, str, str | None]:
    """A parser's complaint in plain words, with advice; libyaml and PyYAML's own parser word theirs
    differently.
    """
    problem, context = str(error.problem or ""), str(error.context or "")
    mark = error.problem_mark
    here = Location(mark.line + 1, mark.column + 1, name) if mark else Location(1, 1, name)
    opened = error.context_mark
    start = Location(opened.line + 1, opened.column + 1, name) if opened else here
    lines = _LINE_BREAK.split(text)
    line = lines[here.line - 1] if here.line <= len(lines) else ""
    character = line[here.column - 1 : here.column]
    colon = "a ':' cannot stand here: the line is indented too far, or a text with ': ' in it needs quotes"
    escape = any(word in problem for word in ("escape", "hexdecimal"))
    rules: tuple[tuple[bool, Location, str, str | None], ...] = (
        (
            character == "\t" or "a tab" in problem,
            here,
            "a tab stands here",
            "YAML is indented with spaces only",
        ),
        ("mapping values" in problem, here, colon, None),
        (
            escape,
            start,
            "in double quotes a backslash begins an escape",
            "write a path in single quotes, or with / instead",
        ),
        (
            "start any token" in problem,
            here,
            f"a value cannot begin with {character!r}",
            "put it into quotes",
        ),
        (
            "scalar" in context and "quote" in context,
            start,
            "the quote that opens here is never closed",
            None,
        ),
        ("flow" in context, here, "a bracket before this is not closed, or a comma is missing", None),
        (character in ("]", "}"), here, f"this {character!r} closes nothing", None),
        (
            "block" in context and "scalar" not in context,
            here,
            "the indentation does not fit the lines before it",
            _LOST_INDENT,
        ),
        ("expected ':'" in problem, start, "this line is not of the form 'key: value'", None),
    )
    for applies, location, said, fix in rules:
        if applies:
            return location, said, fix
    return here, f"this is not valid YAML: {clip(problem or context)}", None


def dump(node: Node) -> str:
    """The tree as clean YAML text, which reads back as the same tree."""
    known: dict[tuple[str, bool], tuple[str, str, str | None]] = {}

    def scalar(text: str, plain: bool) -> yaml.Node:
        if (text, plain) not in known:
            known[text, plain] = _written(text, plain)
        tag, value, style = known[text, plain]
        return yaml.ScalarNode(tag, value, style=style)

    def convert(node: Node) -> yaml.Node:
        if isinstance(node, Table):
            pairs = [(scalar(key, False), convert(entry.node)) for key, entry in node.entries.items()]
            return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
        if isinstance(node, Items):
            flow = all(isinstance(child, Leaf) for child in node.nodes)
            return yaml.SequenceNode(
                "tag:yaml.org,2002:seq", [convert(n) for n in node.nodes], flow_style=flow
            )
        return scalar(node.text, node.plain)

    text: str = yaml.serialize(convert(node), Dumper=_DUMPER, allow_unicode=True, width=1 << 20)
    return text


def dump_all(roots: Sequence[Node]) -> str:
    """Several trees as the documents of one text."""
    return "---\n".join(map(dump, roots))


def to_yaml(recipe: Mapping[str, Any]) -> str:
    """A recipe given as Python objects (NumPy values, tuples and paths are welcome) as YAML text.

    Raises RecipeError for what no recipe can hold.

    >>> print(to_yaml({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.5}}]}))
    merge_method: linear
    models:
    - model: a
      parameters:
        weight: 0.5
    <BLANKLINE>
    """
    return dump(from_objects(recipe))


def _written(text: str, plain: bool) -> tuple[str, str, str | None]:
    """(tag, text, style) with which the dumper writes a scalar so that it reads back as it was."""
    if plain:
        return _RESOLVER.resolve(yaml.ScalarNode, text or "null", (True, False)), text or "null", None
    # What this module, unlike YAML 1.1, reads as a number must keep its quotes; double ones keep breaks.
    style = None if isinstance(meaning(text), str) else "'"
    return "tag:yaml.org,2002:str", text, '"' if _LINE_BREAK.search(text) else style
