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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Location(NamedTuple):
    """Where something of a recipe is written.

    Args:
        line: From 1; where there is no column it only keeps the order.
        column: From 1; 0 where ``source`` alone says it (an override, a Python object).
        source: The file, or what else said it.

    >>> str(Location(3, 7, "recipe.yml"))
    'recipe.yml:3:7'
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

    def as_dict(self) -> dict[str, Any]:
        """The problem for JSON: its fields, a location as {source, line, column}; None is left out."""
        found = {key: value for key, value in vars(self).items() if value is not None}
        if self.location:
            source, at = self.location.source, {"line": self.location.line, "column": self.location.column}
            found["location"] = {"source": source} | (at if self.location.column else {})
        return found

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


class Collector:
    """What is wrong, collected so that all of it is told at once: each problem once, those of a recipe in the
    order of its lines.

    As a context manager it takes up the DellaErrors of a step, and what follows it runs.

    Args:
        kind: The kind of error that `add` is about.

    >>> problems = Collector(RecipeError)
    >>> with problems:
    ...     raise OutputError("out: exists already")
    >>> problems.add("'seed' must be a whole number", parameter="seed")
    >>> try:
    ...     problems.raise_any()
    ... except RecipeError as error:
    ...     print(error)
    2 problems:
      - 'seed' must be a whole number
      - out: exists already
    """

    def __init__(self, kind: type[DellaError]) -> None:
        self._kind = kind
        self._found: list[tuple[type[DellaError], Problem]] = []
        self._cause: DellaError | None = None

    def add(
        self, said: str, fix: str | None = None, subject: str | None = None, tensor: str | None = None,
        **about: Any,
    ) -> None:  # fmt: skip
        """Take up the Problem of these fields."""
        self.extend([Problem(said, fix, subject, tensor, **about)])

    def extend(self, problems: Iterable[Problem]) -> None:
        """Take up several Problems, as `add` does."""
        self._found += [(self._kind, problem) for problem in problems]

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DellaError):
            return False
        self._found += [(type(error), problem) for problem in error.problems]
        self._cause = self._cause or error
        return True

    def raise_any(self) -> None:
        """Raise what was found as one error, of the kind with the lowest exit code; return if nothing was."""
        if self._found:
            ordered = sorted(self._found, key=_order)
            raise ordered[0][0](*dict.fromkeys(problem for _, problem in ordered)) from self._cause


def _order(found: tuple[type[DellaError], Problem]) -> tuple[int, bool, tuple[int, ...]]:
    kind, problem = found
    return kind.exit_code, problem.location is None, problem.location[:2] if problem.location else ()


_on_command_line = False


@contextmanager
def command_line() -> Iterator[None]:
    """Meanwhile messages name options as the command has them, and not as arguments of Python."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def either(command: str, python: str) -> str:
    """The words for who uses the command line, or Python."""
    return command if _on_command_line else python


def printable(text: str) -> str:
    """``text`` without what would command a terminal: names in models may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def clip(text: str, most: int = 60) -> str:
    """Text that came from outside, short enough for an error message."""
    return text if len(text) <= most else text[: most - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str | None:
    """What may have been meant by ``word``, as advice; None when nothing in ``known`` is near.

    Every known word that is one slip of the fingers away is named, since two may be: 'modles' is 'models'
    with two letters swapped and 'modules' with one left out.

    >>> suggest("densty", ["weight", "density"])
    "did you mean 'density'?"
    """
    plain = {_plain(name): name for name in known}
    clean = _plain(clip(word, 200))
    close = [clean] if clean in plain else [name for name in plain if _one_slip(clean, name)]
    close = close or difflib.get_close_matches(clean, plain, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(repr(plain[name]) for name in close)}?" if close else None


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter added, left out, changed, or swapped with the next one turns ``a`` into ``b``."""
    if abs(len(a) - len(b)) > 1 or len(a) == len(b) == 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    return x[1:] == y or x == y[1:] or x[1:] == y[1:] or (x[:2] == y[:2][::-1] and x[2:] == y[2:])


def unknown(what: str, word: str, known: Iterable[str]) -> Problem:
    """The Problem of an argument ``what`` whose value is not one of ``known``.

    >>> str(unknown("task", "gsm8", ["gsm8k", "mbpp"]))
    "task 'gsm8': expected one of gsm8k, mbpp; did you mean 'gsm8k'?"
    """
    known = list(known)
    said = f"{what} {clip(word)!r}: expected one of {', '.join(known)}"
    return Problem(said, suggest(word, known), parameter=what)


def distinct(names: Iterable[str]) -> list[str]:
    """The names, of which equal ones are made distinct by their occurrence.

    >>> distinct(["math", "code", "math"])
    ['math', 'code', 'math#2']
    """
    given: list[str] = []
    counts: dict[str, int] = {}
    for name in names:
        unique = name
        while unique in counts:
            counts[name] += 1
            unique = f"{name}#{counts[name]}"
        counts[unique] = 1
        given.append(unique)
    return given


def listing(problems: Sequence[Problem], most: int = 20) -> str:
    """Several problems as one message, a line each; a single one stands alone."""
    if len(problems) == 1:
        return str(problems[0])
    shown = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  - and {len(problems) - most} more")
    return f"{len(problems)} problems:\n" + "\n".join(shown)


def some(names: Sequence[str], most: int = 3, what: str = "tensors") -> str:
    """Names in words: all of a few, the first ones and their number of many."""
    shown = ", ".join(names[:most])
    return f"{len(names)} {what} ({shown}, ...)" if len(names) > most else shown
