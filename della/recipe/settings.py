"""The value of a parameter as a recipe writes it: scalar, gradient over the layers, or cases by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from della.errors import Location, nearest
from della.merging.methods import Parameter
from della.recipe.tree import Items, Leaf, Node, Problems, Table, Value, clip, number, show


@dataclass(frozen=True)
class Scalar:
    """One value for every layer."""

    value: Value
    location: Location = field(compare=False, repr=False)

    def at(self, depth: float) -> Value:
        return self.value


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over the layers, from depth 0 at the first layer to 1 at the last.

    Numbers are interpolated linearly (whole numbers then rounded); of other values the one at or before the
    depth holds.
    """

    values: tuple[Value, ...]
    location: Location = field(compare=False, repr=False)

    def at(self, depth: float) -> Value:
        scaled = depth * (len(self.values) - 1)
        i = int(scaled)
        a, b = self.values[i], self.values[min(i + 1, len(self.values) - 1)]
        if isinstance(a, (bool, str)) or isinstance(b, (bool, str)):
            return a
        # Rounding must not leave the range of the two values: a density of 1 may not become 1 + 1e-16.
        between = min(max((1 - (scaled - i)) * a + (scaled - i) * b, min(a, b)), max(a, b))
        return round(between) if isinstance(a, int) and isinstance(b, int) else float(between)


@dataclass(frozen=True)
class Filtered:
    """Cases ``(part of the tensor's name, setting)``: the first that fits holds; an empty part fits all."""

    cases: tuple[tuple[str, Scalar | Gradient], ...]
    location: Location = field(compare=False, repr=False)


Setting = Scalar | Gradient | Filtered
CASE_KEYS = ("filter", "value")


def choose(chain: tuple[Setting, ...], tensor_name: str) -> Scalar | Gradient | None:
    """The setting that holds for a tensor: the first of the chain that has a case for its name."""
    for setting in chain:
        if not isinstance(setting, Filtered):
            return setting
        for part, case in setting.cases:
            if part in tensor_name:
                return case
    return None


def possible(setting: Setting | None) -> set[Value]:
    """Every value that stands in a setting."""
    if isinstance(setting, Filtered):
        return {value for _, case in setting.cases for value in possible(case)}
    return set() if setting is None else {setting.value} if isinstance(setting, Scalar) else {*setting.values}


def read_setting(parameter: Parameter, node: Node, subject: str, problems: Problems) -> Setting | None:
    """The Setting that ``node`` writes, or None after adding to ``problems``; messages name ``subject``."""
    before = len(problems)
    setting: Setting | None
    if isinstance(node, Table):
        setting = _filtered(parameter, [node], node.location, subject, problems)
    elif isinstance(node, Items) and node.nodes and all(isinstance(n, Table) for n in node.nodes):
        setting = _filtered(parameter, node.nodes, node.location, subject, problems)
    else:
        setting = _unfiltered(parameter, node, subject, problems)
    return setting if len(problems) == before else None


def _unfiltered(
    parameter: Parameter, node: Node, subject: str, problems: Problems
) -> Scalar | Gradient | None:
    if isinstance(node, Table):
        problems.add(node.location, f"{subject} must be {expected(parameter)} here, found a mapping")
        return None
    if isinstance(node, Leaf):
        value = read_value(parameter, node, subject, problems)
        return None if value is None else Scalar(value, node.location)
    if not node.nodes:
        problems.add(node.location, f"{subject} is an empty list; write at least one value")
        return None
    values: list[Value] = []
    for child in node.nodes:
        if isinstance(child, Leaf):
            value = read_value(parameter, child, subject, problems)
            if value is not None:
                values.append(value)
        else:
            said = "holds either values for the layers or {filter, value} cases"
            problems.add(
                child.location, f"the list of {subject} {said}, found {show(child)} among the others"
            )
    return Gradient(tuple(values), node.location)


def _filtered(
    parameter: Parameter, tables: list[Node], location: Location, subject: str, problems: Problems
) -> Filtered | None:
    cases: list[tuple[str, Scalar | Gradient]] = []
    for table in tables:
        assert isinstance(table, Table)
        for key, entry in table.entries.items():
            if key not in CASE_KEYS:
                hint = suggest(key, CASE_KEYS)
                problems.add(entry.key, f"unknown key {clip(key)!r} in a case of {subject}{hint}")
        if "value" not in table.entries:
            if not any(suggest(key, ("value",)) for key in table.entries):
                problems.add(table.location, f"this case of {subject} has no 'value'")
            continue
        setting = _unfiltered(parameter, table.entries["value"].node, subject, problems)
        part = table.entries["filter"].node if "filter" in table.entries else None
        if part is not None and not isinstance(part, Leaf):
            problems.add(
                part.location,
                f"the filter of {subject} must be a part of a tensor's name, found {show(part)}",
            )
        elif setting is not None:
            everything = part is None or part.value is None or part.text == "*"
            cases.append(("" if everything or part is None else part.text, setting))
    return Filtered(tuple(cases), location)


def expected(parameter: Parameter) -> str:
    """What the parameter may be, in words."""
    kinds = _kinds(parameter)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    said = [words[kind] for kind in kinds if kind is not str or not parameter.choices]
    if parameter.choices:
        said.insert(
            0,
            "one of " + ", ".join(parameter.choices) if len(parameter.choices) > 1 else parameter.choices[0],
        )
    return ", or ".join(said)


def _kinds(parameter: Parameter) -> tuple[type, ...]:
    return parameter.kind if isinstance(parameter.kind, tuple) else (parameter.kind,)


def read_value(parameter: Parameter, leaf: Leaf, subject: str, problems: Problems) -> Value | None:
    """The leaf as the parameter's type, within its bounds; None after adding to ``problems``."""
    if leaf.value is None:
        problems.add(leaf.location, f"{subject} has no value")
        return None
    for kind in _kinds(parameter):
        value = _AS[kind](leaf)
        if value is None or (isinstance(value, str) and parameter.choices and value not in parameter.choices):
            continue
        said = _out_of_bounds(parameter, value)
        if said:
            problems.add(leaf.location, f"{subject} {said}, found {show(leaf)}")
            return None
        return value
    hint = suggest(leaf.text, parameter.choices) if isinstance(leaf.value, str) else ""
    problems.add(leaf.location, f"{subject} must be {expected(parameter)}, found {show(leaf)}{hint}")
    return None


def _out_of_bounds(parameter: Parameter, value: Value) -> str:
    if isinstance(value, (bool, str)):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    low, high = parameter.low, parameter.high
    if (low is None or value >= low) and (high is None or value <= high):
        return ""
    if low is not None and high is not None:
        return (
            f"must lie between {low:g} and {high:g}" if high < 1e6 else f"must lie between {low} and {high}"
        )
    return f"must be at least {low:g}" if low is not None else f"must be at most {high:g}"


def _as_bool(leaf: Leaf) -> bool | None:
    if isinstance(leaf.value, bool):
        return leaf.value
    return {"true": True, "1": True, "false": False, "0": False}.get(leaf.text.lower())


def _as_float(leaf: Leaf) -> float | None:
    value = number(leaf.value) if isinstance(leaf.value, str) else leaf.value
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_int(leaf: Leaf) -> int | None:
    value = number(leaf.value) if isinstance(leaf.value, str) else leaf.value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_str(leaf: Leaf) -> str | None:
    return leaf.value if isinstance(leaf.value, str) else None


_AS: dict[type, Callable[[Leaf], Value | None]] = {
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: _as_str,
}


def suggest(word: str, known: tuple[str, ...]) -> str:
    """A hint ``; did you mean 'density'?`` or an empty string.

    Every known word that is one slip of the fingers away is named, since two may be: 'modles' is 'models'
    with two letters swapped and 'modules' with one left out.
    """
    clean = clip(word).lower().replace("-", "_").replace(" ", "_")
    if clean in known:
        return f"; did you mean {clean!r}?"
    close = [repr(name) for name in known if _one_slip(clean, name)]
    return f"; did you mean {' or '.join(close)}?" if close else nearest(clean, known)


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter added, left out, changed, or swapped with the next one turns ``a`` into ``b``."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    return x[1:] == y or x == y[1:] or x[1:] == y[1:] or (x[:2] == y[:2][::-1] and x[2:] == y[2:])
