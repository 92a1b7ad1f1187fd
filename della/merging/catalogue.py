"""What methods say of themselves, as text, JSON and Markdown: `della methods`, README.md and docs/methods.md.

``python -m della.merging.catalogue`` writes the tables of both pages anew, between their markers.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from della.merging.method import Method, Parameter
from della.merging.registry import ALL_PARAMETERS, METHODS

WIDTH = 100
PAGES = ("README.md", "docs/methods.md")


def defaults(method: type[Method]) -> dict[str, Any]:
    """The value of every parameter of a method where a recipe says nothing, as it takes effect.

    Args:
        method: Any method.

    Returns:
        Values by the name of the parameter; those that must be given (t) or give way to others (window_size)
        are not there.

    >>> defaults(METHODS["ties"])["density"], defaults(METHODS["ties"])["fuse"]
    (1.0, 'mean')
    """
    usual = {**method.expert("", {}).values, **method().shared}
    return {name: value for name, value in usual.items() if value is not None}


def method_json(method: type[Method]) -> dict[str, Any]:
    """A method as a JSON object: name, formula, source, whether it needs a base, and its parameters.

    Args:
        method: Any method.

    Returns:
        ``{"name", "formula", "source", "needs_base", "parameters": [...]}``; each parameter with its name,
        scope, default, choices, whether true and false are values, lowest and highest number, and doc.

    >>> method_json(METHODS["linear"])["parameters"][0]["name"]
    'weight'
    """
    usual = defaults(method)
    rows = [
        {
            "name": p.name,
            "scope": p.scope,
            "default": usual.get(p.name),
            "choices": list(p.choices),
            "bool": bool in p.kinds,
            "low": p.low,
            "high": p.high,
            "doc": p.doc,
        }
        for p in method.parameters.values()
    ]
    return {
        "name": method.name,
        "formula": method.formula,
        "source": method.source,
        "needs_base": method.needs_base,
        "parameters": rows,
    }


def list_text() -> str:
    """Every method with what it computes, for people."""
    lines = []
    for method in METHODS.values():
        lines += [f"{method.name}  ({method.source})", *_wrapped(method.formula, 4)]
    return "\n".join(
        [*lines, "", "delta = expert - base.  della methods NAME shows the parameters of a method."]
    )


def method_text(method: type[Method]) -> str:
    """One method with its parameters, for people."""
    usual = defaults(method)
    lines = [f"{method.name}  ({method.source})", *_wrapped(method.formula, 4)]
    lines.append("    " + ("needs a base_model" if method.needs_base else "needs no base_model"))
    for scope, title in (("model", "of each model"), ("shared", "of the recipe")):
        lines += ["", f"parameters {title}:"]
        for p in (p for p in method.parameters.values() if p.scope == scope):
            said = f", default {_said(usual[p.name])}" if p.name in usual else ""
            lines += [f"  {p.name}: {p.range}{said}", *_wrapped(p.doc, 6)]
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _said(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- Markdown ----------------------------------------------------------------------------------------------


def _methods_table() -> Iterator[str]:
    yield "| method | what it computes | source |"
    yield "|---|---|---|"
    for method in METHODS.values():
        yield f"| `{method.name}` | {_cell(method.formula)} | {method.source} |"


def _parameters_table() -> Iterator[str]:
    yield "| parameter | of | values | default | |"
    yield "|---|---|---|---|---|"
    for p in sorted(ALL_PARAMETERS.values(), key=lambda p: p.scope):
        users = [method for method in METHODS.values() if p.name in method.parameters]
        if users:
            found = dict.fromkeys(_said(defaults(m)[p.name]) for m in users if p.name in defaults(m))
            default = "" if not found else _code(next(iter(found))) if len(found) == 1 else "by method"
            of = "a model" if p.scope == "model" else "the recipe"
            yield f"| `{p.name}` | {of} | {_values(p)} | {default} | {_cell(p.doc)} |"


def _each_method() -> Iterator[str]:
    for method in METHODS.values():
        yield f"### {method.name}"
        yield ""
        yield f"{method.formula[0].upper()}{method.formula[1:]}. Source: {method.source}."
        yield ""
        usual = defaults(method)
        for scope, title in (("model", "Of a model"), ("shared", "Of the recipe")):
            names = [p.name for p in method.parameters.values() if p.scope == scope]
            yield f"- {title}: " + ", ".join(
                f"`{name}` {_said(usual[name])}" if name in usual else f"`{name}`" for name in names
            )
        yield ""


TABLES = {"methods": _methods_table, "parameters": _parameters_table, "each method": _each_method}


def _values(parameter: Parameter) -> str:
    values = [*parameter.choices, *(("true", "false") if bool in parameter.kinds else ())]
    return ", ".join(map(_code, values)) if values else parameter.range


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|")


def written(page: str) -> str:
    """A page with its tables made anew: what stands between ``<!-- NAME -->`` and ``<!-- end -->``.

    Args:
        page: Markdown; NAME is one of TABLES.

    Returns:
        The same Markdown, up to date.

    >>> written("<!-- methods -->\\n<!-- end -->").splitlines()[1]
    '| method | what it computes | source |'
    """

    def made(match: re.Match[str]) -> str:
        return "\n".join([match[1], *_trimmed(TABLES[match[2]]()), "<!-- end -->"])

    return re.sub(rf"(<!-- ({'|'.join(TABLES)}) -->)\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def _trimmed(lines: Iterable[str]) -> list[str]:
    return "\n".join(lines).rstrip("\n").split("\n")


if __name__ == "__main__":
    for name in PAGES:
        path = Path(name)
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
