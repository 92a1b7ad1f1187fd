"""Every way della says no.

    DellaError                    exit code 1
    |-- RecipeError               exit code 2: the recipe, an option or an argument
    |-- CheckpointError           exit code 3: an input model
    `-- OutputError               exit code 4: the place the result should go to

A message is one sentence or two for the user: which file and tensor, what was expected, what was found, and
what to do about it.  Anything else that escapes is a defect of della.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class DellaError(Exception):
    """Base of all errors that della raises on purpose; ``exit_code`` is what the command returns."""

    exit_code = 1


class RecipeError(DellaError):
    """The recipe (or an argument that stands for a part of it) cannot be carried out."""

    exit_code = 2


class CheckpointError(DellaError):
    """An input model is missing, damaged, hostile, or does not fit the others."""

    exit_code = 3


class OutputError(DellaError):
    """The result cannot be written where it was asked for."""

    exit_code = 4


def nearest(word: str, candidates: Iterable[str]) -> str:
    """A closing hint ``; did you mean 'density'?`` or an empty string when nothing is near."""
    close = difflib.get_close_matches(word.lower(), list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listing(problems: Sequence[str], most: int = 20) -> str:
    """Several problems as one message, a line each; a single one stands alone."""
    if len(problems) == 1:
        return problems[0]
    shown = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  - and {len(problems) - most} more")
    return f"{len(problems)} problems:\n" + "\n".join(shown)
