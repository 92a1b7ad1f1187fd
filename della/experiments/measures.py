"""What scores say: a row's main number with its intervals, and whether two rows differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from della.experiments.bench import Bench, Floats
from della.experiments.cells import Cell
from della.report.intervals import Interval, interval_of, mean_over_seeds, paired_bootstrap, side


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's main number: by problem (mean over seeds) with weights, and by seed.

    ``strata`` counts the problems of each task.
    """

    items: Floats
    weights: Floats
    strata: tuple[int, ...]
    seeds: tuple[float, ...]

    @property
    def over_items(self) -> Interval:
        """The number with its interval over problems."""
        return interval_of(self.items, self.weights, self.strata)

    @property
    def over_seeds(self) -> Interval:
        """The number with its interval over seeds."""
        return mean_over_seeds(self.seeds)


def measure(
    bench: Bench, cells: Sequence[Cell], split: str, tasks: Sequence[str], *, kept: bool = True
) -> Measured:
    """The kept gain, in percent, of cells that differ in their seed; without ``kept`` what counts of the
    first task.
    """
    found = []
    for cell in cells:
        scored = bench.score(cell, split)
        found.append(bench.shares(scored, split, tasks) if kept else bench.values(scored, split, tasks[0]))
    by_seed = tuple(100.0 * float((values * weights).sum()) for values, weights in found)
    first = bench.score(cells[0], split)
    strata = tuple(len(next(iter(first[task].values()))) for task in (tasks if kept else tasks[:1]))
    return Measured(100.0 * np.mean([values for values, _ in found], axis=0), found[0][1], strata, by_seed)


@dataclass(frozen=True, slots=True)
class Difference:
    """One row less another: over problems (paired, means over seeds), and over seeds where there are several.

    ``side`` is 1 or -1 only where both intervals leave zero out.
    """

    items: Interval
    seeds: Interval | None

    @property
    def side(self) -> int:
        return side(self.items, self.seeds)


def difference(a: Measured, b: Measured) -> Difference:
    """How far ``a`` is above ``b``; seeds are paired, and a row of one seed stands against all of the
    other's.
    """
    items = paired_bootstrap(a.items, b.items, weights=a.weights, strata=a.strata)
    counts = len(a.seeds), len(b.seeds)
    pairs = [
        a.seeds[i % counts[0]] - b.seeds[i % counts[1]]
        for i in range(min(counts) if min(counts) > 1 else max(counts))
    ]
    return Difference(items, mean_over_seeds(pairs) if len(pairs) > 1 else None)
