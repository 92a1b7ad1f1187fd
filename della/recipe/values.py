"""What a parameter may be, and what is wrong with a value that it may not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from della.errors import Problem, clip, suggest
from della.merging.method import Parameter
from della.recipe.tree import Value


def checked(
    parameter: Parameter, value: Any, subject: str | None = None, found: str | None = None
) -> Value | Problem:
    """``value`` as the parameter's type, within its bounds; or what is wrong with it.

    ``subject`` is how the sentence names the parameter, and ``found`` how it shows the value.
    """
    subject, found = subject or repr(parameter.name), found or clip(repr(value))
    for kind in _kinds(parameter):
        typed = _AS[kind](value)
        if typed is None or (parameter.choices and kind is str and typed not in parameter.choices):
            continue
        said = _out_of_bounds(parameter, typed)
        if said:
            return Problem(f"{subject} {said}, found {found}", parameter=parameter.name)
        return typed
    hint = suggest(value, parameter.choices) if isinstance(value, str) else None
    said = f"{subject} must be {expected(parameter)}, found {found}"
    return Problem(said, hint, parameter=parameter.name)


def expected(parameter: Parameter) -> str:
    """What the parameter may be, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    said = [words[kind] for kind in _kinds(parameter) if kind is not str or not parameter.choices]
    if parameter.choices:
        one = "one of " if len(parameter.choices) > 1 else ""
        said.insert(0, one + ", ".join(parameter.choices))
    return ", or ".join(said)


def takes(parameter: Parameter, *kinds: type) -> bool:
    """Whether the parameter may be of one of these kinds."""
    return any(kind in kinds for kind in _kinds(parameter))


def _kinds(parameter: Parameter) -> tuple[type, ...]:
    return parameter.kind if isinstance(parameter.kind, tuple) else (parameter.kind,)


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


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_int(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_AS: dict[type, Callable[[Any], Value | None]] = {
    bool: lambda value: value if isinstance(value, bool) else None,
    int: _as_int,
    float: _as_float,
    str: lambda value: value if isinstance(value, str) else None,
}
