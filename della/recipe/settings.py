"""The setting of a parameter as a recipe writes it: scalar, gradient over the layers, or cases by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from della.errors import Collector, Location, Problem, clip, suggest
from della.merging.method import Parameter
from della.recipe.filters import KEYS as FILTERS
from della.recipe.filters import Filter, read_filter
from della.recipe.tree import Items, Leaf, Node, Table, Value, number, show
from della.recipe.values import checked, expected, takes


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
    """Cases ``(filter, setting)``: the first whose filter fits a tensor holds."""

    cases: tuple[tuple[Filter, Scalar | Gradient], ...]
    location: Location = field(compare=False, repr=False)

    def case(self, tensor_name: str) -> int | None:
        """Which of the cases holds for a tensor."""
        return next((k for k, (part, _) in enumerate(self.cases) if part.fits(tensor_name)), None)


Setting = Scalar | Gradient | Filtered
CASE_KEYS = (*FILTERS, "value")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def choose(chain: tuple[Setting, ...], tensor_name: str) -> Scalar | Gradient | None:
    """The setting that holds for a tensor: the first of the chain that has a case for its name."""
    for setting in chain:
        if not isinstance(setting, Filtered):
            return setting
        found = setting.case(tensor_name)
        if found is not None:
            return setting.cases[found][1]
    return None


def possible(setting: Setting | None) -> set[Value]:
    """Every value that stands in a setting."""
    if isinstance(setting, Filtered):
        return {value for _, case in setting.cases for value in possible(case)}
    return set() if setting is None else {setting.value} if isinstance(setting, Scalar) else {*setting.values}


def read_setting(parameter: Parameter, node: Node, subject: str, problems: Collector) -> Setting | None:
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
    parameter: Parameter, node: Node, subject: str, problems: Collector
) -> Scalar | Gradient | None:
    if isinstance(node, Table):
        said = f"{subject} must be {expected(parameter)} here, found a mapping"
        problems.add(said, location=node.location, parameter=parameter.name)
        return None
    if isinstance(node, Leaf):
        value = read_value(parameter, node, subject, problems)
        return None if value is None else Scalar(value, node.location)
    if not node.nodes:
        said, fix = f"{subject} is an empty list", "write at least one value"
        problems.add(said, fix, location=node.location, parameter=parameter.name)
        return None
    values: list[Value] = []
    for child in node.nodes:
        if isinstance(child, Leaf):
            value = read_value(parameter, child, subject, problems)
            if value is not None:
                values.append(value)
        else:
            said = f"the list of {subject} holds either values for the layers or {{filter, value}} cases"
            said += f", found {show(child)} among the others"
            problems.add(said, location=child.location, parameter=parameter.name)
    return Gradient(tuple(values), node.location)


def _filtered(
    parameter: Parameter, tables: list[Node], location: Location, subject: str, problems: Collector
) -> Filtered | None:
    cases: list[tuple[Filter, Scalar | Gradient]] = []
    for table in tables:
        assert isinstance(table, Table)
        for key, entry in table.entries.items():
            if key not in CASE_KEYS:
                said = f"unknown key {clip(key)!r} in a case of {subject}"
                problems.add(said, suggest(key, CASE_KEYS), location=entry.key, parameter=parameter.name)
        if "value" not in table.entries:
            if not any(suggest(key, ("value",)) for key in table.entries):
                said = f"this case of {subject} has no 'value'"
                problems.add(said, location=table.location, parameter=parameter.name)
            continue
        setting = _unfiltered(parameter, table.entries["value"].node, subject, problems)
        held = read_filter(table, subject, parameter.name, problems)
        if cases and not cases[-1][0]:
            said = f"this case of {subject} is never reached, since the one before it has no filter"
            fix = "put the case without filter last"
            problems.add(said, fix, location=table.location, parameter=parameter.name)
        elif setting is not None and held is not None:
            cases.append((held, setting))
    return Filtered(tuple(cases), location)


def read_value(parameter: Parameter, leaf: Leaf, subject: str, problems: Collector) -> Value | None:
    """The leaf as the parameter's type, within its bounds; None after adding to ``problems``."""
    if leaf.value is None:
        problems.add(f"{subject} has no value", location=leaf.location, parameter=parameter.name)
        return None
    value = checked(parameter, _meant(parameter, leaf), subject, show(leaf))
    if isinstance(value, Problem):
        problems.extend([replace(value, location=leaf.location)])
        return None
    return value


def _meant(parameter: Parameter, leaf: Leaf) -> Value | None:
    """The leaf's value as the parameter needs it: a number may stand in quotes, and 0 and 1 for false and
    true.
    """
    value, text = leaf.value, leaf.text.lower()
    if takes(parameter, bool) and text in _TRUTH:
        return _TRUTH[text]
    if takes(parameter, bool) and not takes(parameter, int, float) and number(text) in (0, 1):
        return number(text) == 1
    if isinstance(value, str) and takes(parameter, int, float) and (found := number(value)) is not None:
        return found
    return value
