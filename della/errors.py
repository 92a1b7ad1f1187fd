"""Every way della says no.

    DellaError                    exit code 1
    |-- RecipeError               exit code 2: the recipe, an option or an argument
    |-- CheckpointError           exit code 3: an input model
    |-- OutputError               exit code 4: the place the result should go to
    |-- DamageError               exit code 5: a finished model is not (or no longer) what was merged
    `-- EvaluationError           exit code 6: a model cannot be scored as asked

An error lists Problems: which file and tensor, what was expected, what was found, and what to do about it.
Anything else that escapes is a defect of della.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Location(NamedTuple):
    """Where something of a recipe is written.

    ``column`` 0 means that ``source`` alone says it (an override, a Python object); ``line`` then only keeps
    the order.
    """

    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.column else self.source


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; ``str(problem)`` is the sentence about it.

    Args:
        said: What is wrong, in words; it names the tensor and the parameter where there is one.
        fix: What to do about it.
        subject: What it is about: a file, a folder, a model.
        tensor: The name of the (first) tensor that it is about.
        parameter: The key of the recipe, or the argument, that is at fault.
        location: The line of the recipe.

    >>> str(Problem("has shape [2], expected [3]", "save it again", subject="model.safetensors"))
    'model.safetensors: has shape [2], expected [3]; save it again'
    """

    said: str
    fix: str | None = None
    subject: str | None = None
    tensor: str | None = None
    parameter: str | None = None
    location: Location | None = None

    def __str__(self) -> str:
        where = "".join(f"{part}: " for part in (self.location, self.subject) if part)
        return printable(where + self.said + (f"; {self.fix}" if self.fix else ""))

    def within(self, outer: str) -> Problem:
        """The same problem, of something that stands in ``outer``."""
        if self.location:
            source = f"{outer}: {self.location.source}"
            return replace(self, location=self.location._replace(source=source))
        return replace(self, subject=f"{outer}: {self.subject}" if self.subject else outer)


class DellaError(Exception):
    """Base of all errors that della raises on purpose; ``exit_code`` is what the command returns.

    Args:
        problems: All that is wrong, as a Problem each; a plain text is a Problem that says it.

    >>> try:
    ...     raise RecipeError(Problem("'density' must be a number", location=Location(3, 7, "recipe.yml")))
    ... except DellaError as error:
    ...     print(error.problems[0].location, error.exit_code)
    recipe.yml:3:7 2
    """

    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
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


def listing(problems: Sequence[Problem], most: int = 20) -> str:
    """Several problems as one message, a line each; a single one stands alone."""
    if len(problems) == 1:
        return str(problems[0])
    shown = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  - and {len(problems) - most} more")
    return f"{len(problems)} problems:\n" + "\n".join(shown)
