"""Hostile files: small makers, each of which spoils a merge that works, and what della must answer to it.

    python -m attacks FOLDER     writes them all, each with a recipe.yml, to try them on any tool

A maker gets a folder with three models (base, math, code) and recipe.yml, which merges them, and changes
what it likes in that folder and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

RECIPE, INPUT, OUTPUT = 2, 3, 4  # exit codes: the recipe, an input model, the place of the result
PAYLOAD = "payload-ran"  # the file that every payload would make
MODULES = ("headers", "folders", "contents", "tensors", "recipes")
# What each kind of attack is about, by the number that its attacks begin with.
ROWS = {
    1: "a file that ends too early",
    2: "a header that lies",
    3: "one tensor in two shards",
    4: "ways out of the model's folder",
    5: "an index that is wrong",
    6: "NaN and infinity",
    7: "shapes that do not fit",
    8: "tensors missing or too many",
    9: "tied embeddings",
    10: "dtypes that differ",
    13: "a result where something is already",
    14: "a result that touches an input",
    16: "pickles",
    17: "a recipe that bombs",
    18: "a recipe with a key misspelt or misplaced",
    19: "a recipe with a value out of range",
    20: "markup in names and recipes",
    21: "side files",
    22: "code that comes with a model",
    25: "quantised models",
}

Maker = Callable[[Path], None]
Check = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Attack:
    """One attack: ``make`` spoils the folder it is given.

    ``exit_code`` 0 means that the merge is done and ``check(folder, out)`` finds the result as it should be;
    any other that it is refused, in a message which each pattern of ``says`` occurs in.  The folder's own
    path reads FOLDER there.  ``out`` is where the merge goes to, from the folder.
    """

    row: int
    name: str
    make: Maker
    exit_code: int
    says: tuple[str, ...] = ()
    check: Check | None = None
    out: str = "out"
    overwrite: bool = False

    @property
    def title(self) -> str:
        return f"{self.row:02d}-{self.name}"


_ATTACKS: list[Attack] = []


def refused(
    row: int, exit_code: int, *says: str, name: str = "", out: str = "out", overwrite: bool = False
) -> Callable[[Maker], Maker]:
    """Registers a maker whose attack is refused; by default it is named after the maker."""

    def register(make: Maker) -> Maker:
        title = name or make.__name__.replace("_", "-")
        _ATTACKS.append(Attack(row, title, make, exit_code, says, None, out, overwrite))
        return make

    return register


def survived(row: int, check: Check, *, name: str = "", out: str = "out") -> Callable[[Maker], Maker]:
    """Registers a maker whose attack must not spoil the result."""

    def register(make: Maker) -> Maker:
        _ATTACKS.append(Attack(row, name or make.__name__.replace("_", "-"), make, 0, (), check, out))
        return make

    return register


def all_attacks() -> list[Attack]:
    """Every attack of every module, in the order of the rows."""
    for module in MODULES:
        import_module(f"attacks.{module}")
    return sorted(_ATTACKS, key=lambda attack: attack.row)
