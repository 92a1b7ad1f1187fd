"""Which cures della's messages name, as its source says, and which tests carry them out.

A cure is what a Problem (or who makes one) is given as ``fix``; its key is "module.py:function", which no
wording changes.  A function that names three cures needs three tests.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

DELLA = Path(__file__).parents[1] / "della"
ARGUMENTS = {"Problem": 1, "add": 1, "_tell": 3, "_missing": 4, "refusal": 2, "tell": 3, "refused": 4}
ARGUMENTS |= {"_refused": 3, "_failed": 1, "_error": 1, "parsed": 2}
Test = TypeVar("Test", bound=Callable[..., object])
Function = ast.FunctionDef | None


def cures(*keys: str) -> Callable[[Test], Test]:
    """Marks a test that carries out the cures of ``keys``, which are read from its source."""
    assert keys
    return lambda test: test


def named() -> Counter[str]:
    """How many cures each function of della names."""
    found = {
        (f"{path.relative_to(DELLA).as_posix()}:{'.'.join(within)}", leaf.lineno, leaf.col_offset)
        for path in DELLA.rglob("*.py")
        for function, within, call in _calls(ast.parse(path.read_text()), None, ())
        if (fix := _fix(call)) is not None
        for leaf in _leaves(fix, function)
    }
    return Counter(key for key, _, _ in sorted(found))


def _calls(
    node: ast.AST, function: Function, within: tuple[str, ...]
) -> Iterator[tuple[Function, tuple[str, ...], ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner, names = function, within
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names = (*within, child.name)
            inner = child if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call):
            yield inner, names, child
        yield from _calls(child, inner, names)


def _fix(call: ast.Call) -> ast.expr | None:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    for keyword in call.keywords:
        if keyword.arg == "fix":
            return keyword.value
    at = ARGUMENTS.get(name, len(call.args))
    if isinstance(call.func, ast.Name) and name == "tell":
        at = 3 if len(call.args) == 4 else 2  # those that recipe/ hands on: with a key, or without
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return call.args[at] if at < len(call.args) and not starred else None


def _leaves(fix: ast.expr, function: Function) -> list[ast.expr]:
    """The texts that ``fix`` may be: one of each branch, and of each value that a name is given."""
    if isinstance(fix, ast.IfExp):
        return _leaves(fix.body, function) + _leaves(fix.orelse, function)
    if isinstance(fix, ast.BoolOp):
        return [leaf for value in fix.values for leaf in _leaves(value, function)]
    if isinstance(fix, ast.Constant):
        return [fix] if isinstance(fix.value, str) and fix.value else []
    if isinstance(fix, ast.Name) and function is not None:
        if fix.id in {each.arg for each in ast.walk(function) if isinstance(each, ast.arg)}:
            return []  # whoever calls names it
        given = [value for node in ast.walk(function) for value in _given(node, fix.id)]
        if given:
            return [leaf for value in given for leaf in _leaves(value, None)]
    return [fix]


def _given(node: ast.AST, name: str) -> Iterator[ast.expr]:
    """The values that a statement gives to ``name``."""
    if not isinstance(node, ast.Assign | ast.AugAssign):
        return
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Name) and target.id == name:
            yield node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for each, value in zip(target.elts, node.value.elts, strict=True):
                if isinstance(each, ast.Name) and each.id == name:
                    yield value


def tried() -> Counter[str]:
    """How many cures of each function the tests beside this file say that they carry out."""
    keys: Counter[str] = Counter()
    for path in sorted((Path(__file__).parent / "reports").glob("test_cures_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_key(node.value):
                keys[node.value] += 1
    return keys


def source(key: str) -> str:
    """The text of a key's module."""
    return (DELLA / key.partition(":")[0]).read_text()


def _is_key(text: str) -> bool:
    module, _, function = text.partition(".py:")
    return bool(function) and " " not in text and (DELLA / f"{module}.py").is_file()
