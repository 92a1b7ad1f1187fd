"""Scores of the miniature's cells, computed by a few threads, each once, and kept on disk; and what is chosen
by them on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from della.errors import EvaluationError
from della.evaluate.generations import Store
from della.experiments.demo import EXPERTS
from della.experiments.paper.climbing import climb
from della.experiments.paper.mini_grid import DELLA, FIRST, Cell, Grid, Kind, fitting
from della.experiments.paper.mini_trio import STORED, Scored, Trio
from della.experiments.paper.published import MERGES

T = TypeVar("T")
Floats = NDArray[np.float64]

# On validation another draw than those that are reported: a lucky one would be chosen and then reported.
APART = 1_000_000


FINALISTS = 3  # that are compared on more problems


@dataclass(frozen=True, slots=True)
class Choice:
    """A cell, and its kept gain on validation."""

    cell: Cell
    kept: float


@dataclass(frozen=True, slots=True)
class Picked:
    """What validation chose for a kind and a merge: the best of every p, and of all that was tried the one to
    report, with its kept gain on the larger split.
    """

    by_p: dict[float | None, Choice]
    best: Choice


Chosen = dict[tuple[str, str], Picked]  # by label of the kind, and name of the merge


class Bench:
    """Scores by cell and split.  ``store`` has those of earlier runs; ``threads`` work at the same time."""

    def __init__(
        self, trio: Trio, store: Store, grid: Grid, threads: int, seed: int, tell: Callable[[str], None]
    ) -> None:
        self.trio, self.grid = trio, grid
        self._store, self._seed, self._tell = store, seed, tell
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(self, cell: Cell, split: str) -> Scored:
        """The scores of a cell, from the store where it has them."""
        if split == "final":
            first, more = self.score(cell, "validation"), self.score(cell, "more")
            return {
                task: {what: values + more[task][what] for what, values in found.items()}
                for task, found in first.items()
            }
        key = f"{split} {cell.key}"
        if key not in self._store.records:
            self._store.add({"id": key, "scores": self.trio.score(cell, split)})
        found: Scored = self._store.records[key]["scores"]
        return found

    def each(self, doing: str, work: Callable[[T], Any], things: Iterable[T]) -> list[Any]:
        """``work`` done on all things, several at a time; results in their order."""
        todo: list[Future[Any]] = [self._pool.submit(work, thing) for thing in things]
        try:
            waiting = set(todo)
            while waiting:
                done, waiting = wait(waiting, timeout=15)
                for future in done:
                    future.result()
                self._tell(f"{doing}: {len(todo) - len(waiting)} of {len(todo)}")
        finally:
            for future in todo:
                future.cancel()
        return [future.result() for future in todo]

    # ---- kept gains ----------------------------------------------------------------------------------------

    def shares(self, scored: Scored, split: str, tasks: Sequence[str]) -> tuple[Floats, Floats]:
        """By problem of all ``tasks``: the gain that is kept, and the weight that makes each task count as
        one.

        Kept gain of a task is (base - merge) / (base - own expert), in loss per token (LM) or in wrong
        answers; it is linear in the problems, so that each has a share in it.
        """
        values, weights = [], []
        for task in tasks:
            base, expert = (
                self.values(self.score(Cell((name,)), split), split, task)[0] for name in ("base", task)
            )
            own, weight = self.values(scored, split, task)
            gain = float(((expert - base) * weight).sum())
            if gain <= 0:
                raise EvaluationError(
                    f"the {task} expert is no better than the base on {len(base)} {split} problems, so that "
                    "there is nothing to keep; score more problems"
                )
            values.append((own - base) / gain)
            weights.append(weight / len(tasks))
        return np.concatenate(values), np.concatenate(weights)

    def values(self, scored: Scored, split: str, task: str) -> tuple[Floats, Floats]:
        """What counts of each problem, and its weight: less loss per token, or a right answer."""
        if task != "lm":
            right = np.array(scored[task]["right"])
            return right, np.full(len(right), 1 / len(right))
        tokens = np.array(self.trio.problems[split, task].tokens, dtype=np.float64)
        return -np.array(scored[task]["loss"]) / tokens, tokens / tokens.sum()

    def kept(self, cell: Cell, split: str) -> float:
        """The mean over the cell's tasks of the gain that it keeps."""
        values, weights = self.shares(self.score(cell, split), split, cell.tasks)
        return float((values * weights).sum())

    # ---- choices on validation -----------------------------------------------------------------------------

    def choose(
        self, kind: Kind, experts: tuple[str, ...], p: float | None, epsilon: float | None
    ) -> list[Choice]:
        """What is tried for a kind at one p, the best first: lambda, and without a given epsilon DELLA's too,
        once lambda is found.
        """
        tried: dict[Cell, float] = {}

        def kept(lambda_: float, half: float = FIRST if epsilon is None else epsilon) -> float:
            cell = kind.cell(experts, p, lambda_, half, self._seed)
            if cell not in tried:
                tried[cell] = self.kept(_apart(cell), "validation")
            return tried[cell]

        ladder = kind.ladder(self.grid, p, len(experts))
        start = self.grid.lambdas.index(1.0) if kind.is_free else 0
        lambda_ = climb(kept, ladder, start)
        if epsilon is None and kind.has_range and p is not None:
            for half in dict.fromkeys(fitting(half, p) for half in self.grid.epsilons):
                kept(lambda_, half)
        return _ordered(Choice(cell, value) for cell, value in tried.items())

    def choices(
        self, doing: str, wanted: Sequence[tuple[str, Kind, str]],
        epsilons: Mapping[tuple[str, float | None], float] | None = None,
    ) -> dict[str, Chosen]:  # fmt: skip
        """What is chosen for each (table, kind, name of the merge), by table.

        epsilons: those to take, by (name of the merge, p); without them they are chosen too.
        """
        units = [(*one, p) for one in wanted for p in one[1].places(self.grid)]
        long_first = sorted(units, key=lambda unit: -len(MERGES[unit[2]]))

        def work(unit: tuple[str, Kind, str, float | None]) -> list[Choice]:
            _, kind, merge, p = unit
            epsilon = None if epsilons is None else epsilons.get((merge, p), FIRST)
            return self.choose(kind, MERGES[merge], p, epsilon)

        tried = dict(zip(long_first, self.each(f"{doing}, on validation", work, long_first), strict=True))
        by_p: dict[tuple[str, Kind, str], dict[float | None, list[Choice]]] = {one: {} for one in wanted}
        for table, kind, merge, p in units:
            by_p[table, kind, merge][p] = tried[table, kind, merge, p]
        lasts = self._lasts(doing, [
            _ordered(choice for choices in by_p[one].values() for choice in choices)[:FINALISTS]
            for one in wanted
        ])  # fmt: skip
        found: dict[str, Chosen] = {}
        for one, best in zip(wanted, lasts, strict=True):
            table, kind, merge = one
            firsts = {p: choices[0] for p, choices in by_p[one].items()}
            found.setdefault(table, {})[kind.label, merge] = Picked(firsts, best)
        return found

    def _lasts(self, doing: str, finalists: Sequence[Sequence[Choice]]) -> list[Choice]:
        """Of each group the best on the split "final"."""
        flat = [choice.cell for group in finalists for choice in group]
        kept = self.each(f"{doing}, finalists", lambda cell: self.kept(_apart(cell), "final"), flat)
        known = dict(zip(flat, kept, strict=True))
        return [
            _ordered(Choice(choice.cell, known[choice.cell]) for choice in group)[0] for group in finalists
        ]

    def singles(self) -> None:
        """The models of the trio as they are, on all problems; first, as all kept gains need them."""
        models = [Cell((name,)) for name in ("base", *EXPERTS)]
        pairs = [(cell, split) for split in STORED for cell in models]
        self.each("base and experts", lambda pair: self.score(*pair), pairs)


def epsilons(chosen: Chosen) -> dict[tuple[str, float | None], float]:
    """DELLA's epsilon by merge and p, for the rows that share it."""
    return {
        (merge, p): choice.cell.epsilon
        for (label, merge), picked in chosen.items()
        if label == DELLA.label
        for p, choice in picked.by_p.items()
        if choice.cell.epsilon is not None
    }


def _ordered(choices: Iterable[Choice]) -> list[Choice]:
    """The best first; of equals the smaller p, then the earlier one."""
    return sorted(choices, key=lambda choice: (-choice.kept, choice.cell.p or 0.0))


def _apart(cell: Cell) -> Cell:
    return replace(cell, seed=cell.seed + APART)
