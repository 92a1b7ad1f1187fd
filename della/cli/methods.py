"""`della methods`: what merge_method may be, and the parameters of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from della.cli.console import Speech
from della.cli.options import only
from della.options import argument


@dataclass(frozen=True)
class Which:
    """The methods that are shown."""

    name: str | None = argument("Only this method, with its parameters.", None, metavar="[NAME]")


def methods(which: Which, speech: Annotated[Speech, only("debug", as_json="As JSON.")]) -> None:
    """Show the methods: what each computes, and its parameters with their values, defaults and meaning."""
    from della.errors import RecipeError, unknown
    from della.merging.catalogue import list_text, method_json, method_text
    from della.merging.registry import METHODS

    name = which.name
    if name is not None and name not in METHODS:
        raise RecipeError(unknown("method", name, METHODS))
    if speech.as_json:
        table = [method_json(method) for method in METHODS.values()]
        print(json.dumps(method_json(METHODS[name]) if name else table, indent=1))
    else:
        print(method_text(METHODS[name]) if name else list_text())
