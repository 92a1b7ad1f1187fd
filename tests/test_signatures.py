"""What `import della` promises, held against tests/signatures.txt: no name, parameter or default changes
without being meant.  `python tests/test_signatures.py` writes the file anew; CHANGELOG.md says what changed.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import della

PROMISED = Path(__file__).with_name("signatures.txt")
STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _imported(module: Any) -> dict[str, str]:
    """Where each class comes from that ``module`` imports, be it for type checkers alone."""
    tree = ast.parse(inspect.getsource(module))
    found = {node.name: module.__name__ for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("della."):
            found |= {alias.name: str(node.module) for alias in node.names}
    return found


def _classes(value: Any) -> Iterator[type]:
    """The classes of della that a public function's signature names."""
    module = inspect.getmodule(value)
    homes = _imported(module)
    hints = [ast.parse(str(hint)) for hint in inspect.get_annotations(value).values()]
    for name in {node.id for hint in hints for node in ast.walk(hint) if isinstance(node, ast.Name)}:
        if name in homes and inspect.isclass(found := getattr(importlib.import_module(homes[name]), name)):
            yield found


def _call(name: str, value: Any) -> str:
    """A signature, a parameter a line."""
    signature = inspect.signature(value)
    lines, is_keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword:
            lines.append("    *,")
            is_keyword = True
        stars = STARS.get(parameter.kind, "")
        hint = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {stars}{parameter.name}{hint}{default},")
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    return "\n".join([f"{name}(", *lines, f"){returned}"])


def _members(value: type) -> Iterator[str]:
    """The public methods and properties that a class has of its own or by inheritance within della."""
    for name in (name for name in dir(value) if not name.startswith("_")):
        member = inspect.getattr_static(value, name)
        if isinstance(member, property):
            assert member.fget is not None
            yield f"{value.__name__}.{name}: {inspect.signature(member.fget).return_annotation}"
        elif inspect.isfunction(member) and member.__module__.startswith("della"):
            yield _call(f"{value.__name__}.{name}", member)


def promised() -> str:
    """Every public name in order, with the classes that its signature names."""
    classes: dict[str, type] = {}
    lines = []
    for name in sorted(della.__all__):
        value = getattr(della, name)
        if inspect.isclass(value):
            classes[name] = value
        elif callable(value):
            lines.append(_call(f"della.{name}", value))
            classes |= {found.__name__: found for found in _classes(value)}
        else:
            lines.append(f"della.{name}: {type(value).__name__}")
    for name, found in sorted(classes.items()):
        bases = ", ".join(base.__name__ for base in found.__bases__)
        lines += [_call(f"class {name}[{bases}]", found), *_members(found)]
    return "\n\n".join(lines) + "\n"


def test_public_signatures_are_those_that_were_promised() -> None:
    changes = difflib.unified_diff(
        PROMISED.read_text().splitlines(), promised().splitlines(), "promised", "found", lineterm="", n=2
    )
    text = "\n".join(changes)
    assert not text, (
        f"{text}\n\nIf this is meant: python tests/test_signatures.py, and a line in CHANGELOG.md"
    )


if __name__ == "__main__":
    PROMISED.write_text(promised())
