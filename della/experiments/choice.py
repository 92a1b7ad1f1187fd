"""How p, lambda and epsilon are chosen on validation: lambda by climbing a ladder of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from della.experiments.cells import Cell, Kind


@dataclass(frozen=True, slots=True)
class Choice:
    """A cell, and its score on validation."""

    cell: Cell
    kept: float


def climb(score: Callable[[float], float], ladder: Sequence[float], start: int) -> float:
    """The best lambda of a ladder by hill climbing from index ``start``; ``score`` is asked once a value."""
    known: dict[int, float] = {}
    at = start
    while True:
        for i in (at, at - 1, at + 1):
            if 0 <= i < len(ladder) and i not in known:
                known[i] = score(ladder[i])
        best = max(known, key=lambda i: (known[i], -i))
        if best == at:
            return ladder[best]
        at = best


def tried(
    kind: Kind, experts: tuple[str, ...], p: float | None, ladder: Sequence[float], start: int,
    kept: Callable[[Cell], float], *, first: float | None = None, epsilons: Sequence[float] = (),
    seed: int = 0,
) -> list[Choice]:  # fmt: skip
    """What is tried of a kind at one p, in order: lambda with epsilon ``first``, then with the best lambda
    each of ``epsilons``; ``kept`` is asked once a cell.
    """
    known: dict[Cell, float] = {}

    def ask(lambda_: float, epsilon: float | None = first) -> float:
        cell = kind.cell(experts, p, lambda_, epsilon, seed)
        if cell not in known:
            known[cell] = kept(cell)
        return known[cell]

    lambda_ = climb(ask, ladder, start if kind.is_free else 0)
    for epsilon in epsilons:
        ask(lambda_, epsilon)
    return [Choice(cell, value) for cell, value in known.items()]


def ordered(choices: Iterable[Choice]) -> list[Choice]:
    """The best first; of equals the smaller p, then the earlier one."""
    return sorted(choices, key=lambda choice: (-choice.kept, choice.cell.p or 0.0))


def inflation(p: float, experts: int) -> float:
    """By how much Elect and the mean over survivors enlarge an update that all experts share, at an equal p:
    what the ladder is multiplied by where that is taken out.  (`merging.reference.inflation` is of any q.)
    """
    return (1 - p**experts) / (1 - p)
