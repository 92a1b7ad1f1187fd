"""Cells and kinds: a cell is one merge of an experiment, a kind is a line of a table, whose p, lambda and
epsilon are still to be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from della.merging.registry import METHODS
from della.recipe.text import dump
from della.recipe.tree import from_objects

NARROW, FIRST, WIDE = 0.07, 0.15, 0.3  # epsilon; 0.07 is the release's window_size of 0.14
Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One model: a merge of ``experts``, or without a method a model as it is.

    ``p`` is the share of deltas that is dropped, None where nothing is; ``epsilon`` is None where there is no
    range of probabilities.  ``settings`` are further parameters of the recipe.
    """

    experts: tuple[str, ...]
    method: str = ""
    p: float | None = None
    lambda_: float = 1.0
    epsilon: float | None = None
    settings: Settings = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that says all of it, for files and scores; without the seed where no draw has a part."""
        parts = ["+".join(self.experts)]
        parts += [self.method.removeprefix("paper_"), f"l{self.lambda_:g}"] if self.method else []
        parts += [] if self.p is None else [f"p{self.p:g}"]
        parts += [] if self.epsilon is None else [f"w{2 * self.epsilon:g}"]
        parts += [f"{name}_{value}" for name, value in self.settings]
        return "-".join([*parts, f"s{self.seed}"] if self.is_random else parts)

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another model."""
        return bool(self.method) and "coupling" in METHODS[self.method].parameters

    @property
    def uses_norms(self) -> bool:
        """Whether it needs the input norms of its experts."""
        return ("importance", "wanda") in self.settings

    def seeded(self, count: int) -> list[Cell]:
        """The cell with its seed and those that follow; once where no draw has a part."""
        return [replace(self, seed=self.seed + i) for i in range(count if self.is_random else 1)]

    def options(self) -> dict[str, Any]:
        """The arguments of `della.merge_state_dicts`."""
        found = {"method": self.method, "names": list(self.experts), **self._own(), **self._shared()}
        return found | ({"seed": self.seed} if self.is_random else {})

    def recipe(
        self, base: str, models: Mapping[str, str], norms: Mapping[str, str] | None = None, **more: Any
    ) -> dict[str, Any]:
        """The recipe; models, norms: references and files by expert.  more: further keys of the document."""
        entries = [
            {"model": models[name], **({"input_norms": norms[name]} if norms and self.uses_norms else {}),
             "parameters": {"weight": 1.0, **self._own()}}
            for name in self.experts
        ]  # fmt: skip
        return {
            "models": entries, "base_model": base, "merge_method": self.method,
            "parameters": self._shared(), "seed": self.seed, **more,
        }  # fmt: skip

    def stated(self) -> dict[str, Any]:
        """What results.json says of it."""
        named = {"method": self.method, "p": self.p, "epsilon": self.epsilon, "lambda": self.lambda_}
        return {**named, **dict(self.settings)}

    def _own(self) -> dict[str, float]:
        found = {} if self.p is None else {"density": round(1 - self.p, 6)}
        return found | ({} if self.epsilon is None else {"epsilon": self.epsilon})

    def _shared(self) -> dict[str, Any]:
        return ({"lambda": self.lambda_} if METHODS[self.method].needs_base else {}) | dict(self.settings)


@dataclass(frozen=True, slots=True)
class Kind:
    """A line of a table: a method with settings.

    With ``is_free`` lambda is chosen, else it is 1.  Its ladder is multiplied by ``factor``, given p and the
    number of experts, where the merged delta is smaller or larger by that much.  ``epsilon`` is that of each
    p where none is chosen, ``drops`` are the p to choose among where they are not the grid's.
    """

    label: str
    method: str
    settings: Settings = ()
    is_free: bool = True
    factor: Callable[[float, int], float] = lambda p, experts: 1.0
    epsilon: Callable[[float], float] = lambda p: NARROW
    drops: tuple[float, ...] = ()

    def places(self, drops: tuple[float, ...]) -> tuple[float | None, ...]:
        """The p to choose among, of a grid's; None where the method drops nothing."""
        return (self.drops or drops) if "density" in METHODS[self.method].parameters else (None,)

    @property
    def has_range(self) -> bool:
        """Whether keep probabilities have a range, whose half-width is epsilon."""
        return "epsilon" in METHODS[self.method].parameters and ("rank_by", "optimal") not in self.settings

    def ladder(self, lambdas: tuple[float, ...], p: float | None, experts: int) -> list[float]:
        """The values of lambda for this p, ascending."""
        return [value * self.factor(p or 0.0, experts) for value in lambdas] if self.is_free else [1.0]

    def cell(
        self, experts: tuple[str, ...], p: float | None, lambda_: float = 1.0, epsilon: float | None = None,
        seed: int = 0,
    ) -> Cell:  # fmt: skip
        """Its merge; an epsilon that p has no room for becomes the widest that it has."""
        half = None
        if p is not None and "epsilon" in METHODS[self.method].parameters:
            half = fitting(self.epsilon(p) if epsilon is None else epsilon, p) if self.has_range else 0.0
        return Cell(experts, self.method, p, lambda_, half, self.settings, seed)


def fitting(epsilon: float, p: float) -> float:
    """The widest half-width up to ``epsilon`` that keeps all probabilities between 0 and 1."""
    return round(min(epsilon, p, 1 - p), 6)


def as_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return dump(from_objects(recipe))
