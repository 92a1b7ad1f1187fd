"""How lambda is found on validation: by climbing a ladder of values."""

from __future__ import annotations

from collections.abc import Callable


def climb(score: Callable[[float], float], ladder: list[float], start: int) -> float:
    """The best lambda of a ladder by hill climbing from place ``start``; ``score`` is asked once a value."""
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


def inflation(p: float, experts: int) -> float:
    """By how much Elect and the mean over survivors enlarge an update that all experts share, at an equal p:
    what the ladder is multiplied by where that is taken out.  (`merging.reference.inflation` is of any q.)
    """
    return (1 - p**experts) / (1 - p)
