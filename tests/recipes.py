"""Recipes for tests, and what is told of them."""

from __future__ import annotations

from typing import Any

import pytest

from della.errors import RecipeError
from della.merging.registry import METHODS
from della.recipe.reader import read_recipe

HEAD = """\
merge_method: della
base_model: owner/base
models:
  - model: owner/math
  - model: owner/code
"""
THERE_IS = ", ".join(METHODS)


def told(source: Any, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(source, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def recipe_of(method: str = "della", **parts: Any) -> dict[str, Any]:
    base = {"merge_method": method, "base_model": "owner/base", "models": [{"model": "owner/math"}]}
    return {**base, **parts}
