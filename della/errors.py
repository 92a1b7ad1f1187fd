"""Every way della says no.

    DellaError                    exit code 1
    |-- RecipeError               exit code 2: the recipe, an option or an argument
    |-- CheckpointError           exit code 3: an input model
    |-- OutputError               exit code 4: the place the result should go to
    |-- DamageError               exit code 5: a finished model is not (or no longer) what was merged
    `-- EvaluationError           exit code 6: a model cannot be scored as asked

A message is one sentence or two for the user: which file and tensor, what was expected, what was found, and
what to do about it.  Anything else that escapes is a defect of della.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class DellaError(Exception):
    """Base of all errors that della raises on purpose; ``exit_code`` is what the command returns.

    Built from one message, or from several problems, which it then lists.
    """

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(printable, problems))
        super().__init__(listing(self.problems) if problems else "")


class RecipeError(DellaError):
    """The recipe (or an argument that stands for a part of it) cannot be carried out."""

    exit_code = 2


class CheckpointError(DellaError):
    """An input model is missing, damaged, hostile, or does not fit the others."""

    exit_code = 3


class OutputError(DellaError):
    """The result cannot be written where it was asked for."""

    exit_code = 4


class DamageError(DellaError):
    """A finished model, or an input of it, is not what its manifest says."""

    exit_code = 5


class EvaluationError(DellaError):
    """A model cannot be scored as asked: a backend, a judge, the sandbox or the data of a task fail."""

    exit_code = 6


def together(errors: Sequence[DellaError]) -> DellaError:
    """Several errors as one, which lists all their problems; of the kind with the lowest exit code."""
    first = min(errors, key=lambda error: error.exit_code)
    problems = [problem for error in errors for problem in error.problems]
    return type(first)(*dict.fromkeys(problems))


def printable(text: str) -> str:
    """``text`` without what would command a terminal: names in models may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


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
