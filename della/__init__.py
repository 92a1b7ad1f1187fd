"""della: model merging as it should be.

Merge fine-tuned models of one base into one, with the methods of DELLA-Merging (arXiv 2406.11617) and its
family: exact, fast on a plain CPU, reproducible to the byte, and safe.

    import della
    della.merge("recipe.yml", "out/")

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from della.errors import CheckpointError, DamageError, DellaError, OutputError, Problem, RecipeError
from della.version import __version__

if TYPE_CHECKING:
    from della.api import merge, plan, verify
    from della.arrays import magprune, merge_state_dicts, merge_tensors

__all__ = [
    "CheckpointError",
    "DamageError",
    "DellaError",
    "OutputError",
    "Problem",
    "RecipeError",
    "__version__",
    "magprune",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "verify",
]

_HOMES = {
    "merge": "della.api",
    "plan": "della.api",
    "verify": "della.api",
    "magprune": "della.arrays",
    "merge_tensors": "della.arrays",
    "merge_state_dicts": "della.arrays",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'della' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
