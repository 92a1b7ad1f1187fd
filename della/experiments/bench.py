"""The scores of an experiment: of each cell and split once, kept on disk, and what gain a cell keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from della.errors import EvaluationError, Problem
from della.evaluate.generations import Store
from della.experiments.cells import Cell

T = TypeVar("T")
Floats = NDArray[np.float64]
Tell = Callable[[str], None]
# By task, what one model scored: the loss of each problem's answer in nats, and where answers are right or
# wrong, 1 or 0; of the full scale, by metric, a value with its interval and what each problem adds.
Scored = dict[str, dict[str, Any]]


class Scorer(Protocol):
    """What one scale has of its own: how a cell is merged and scored."""

    def key(self, cell: Cell, split: str) -> str:
        """What the scores are kept under, in every run that would find the same."""

    def score(self, cell: Cell, split: str) -> Scored:
        """Merge the cell, and score it on a split."""


class Bench:
    """Scores by cell and split; ``store`` has those of earlier runs, ``threads`` work at the same time.

    tokens: of the answers to the problems of a (split, task) that is scored by loss.  made_of: splits that
    are made of others, as pairs of a split and how many of its problems (None: all).
    """

    def __init__(
        self, scorer: Scorer, store: Store, tell: Tell, threads: int = 1,
        tokens: Mapping[tuple[str, str], Sequence[int]] | None = None,
        made_of: Mapping[str, Sequence[tuple[str, int | None]]] | None = None,
    ) -> None:  # fmt: skip
        self.tokens, self._made_of = tokens or {}, made_of or {}
        self._scorer, self._store, self._tell = scorer, store, tell
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def seconds(self) -> float:
        """What all stored scores took, merges included."""
        return sum(float(record["seconds"]) for record in self._store.records.values())

    def score(self, cell: Cell, split: str) -> Scored:
        """The scores of a cell, from the store where it has them."""
        if split in self._made_of:
            parts = [(self.score(cell, part), most) for part, most in self._made_of[split]]
            return {
                task: {what: [x for part, most in parts for x in part[task][what][:most]] for what in found}
                for task, found in parts[0][0].items()
            }
        key = self._scorer.key(cell, split)
        if key not in self._store.records:
            began = time.monotonic()
            scores = self._scorer.score(cell, split)
            self._store.add({"id": key, "seconds": round(time.monotonic() - began, 2), "scores": scores})
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

    def values(self, scored: Scored, split: str, task: str) -> tuple[Floats, Floats]:
        """What counts of each problem, and its weight: a right answer, or less loss per token."""
        if "right" in scored[task]:
            right = np.array(scored[task]["right"])
            return right, np.full(len(right), 1 / len(right))
        tokens = np.array(self.tokens[split, task], dtype=np.float64)
        return -np.array(scored[task]["loss"]) / tokens, tokens / tokens.sum()

    def shares(self, scored: Scored, split: str, tasks: Sequence[str]) -> tuple[Floats, Floats]:
        """By problem of all ``tasks``: the gain that is kept, and the weight that makes each task count as
        one.

        Kept gain of a task is (base - merge) / (base - own expert), in loss per token or in wrong answers; it
        is linear in the problems, so that each has a share in it.  0 is the base, 1 the task's own expert.
        """
        values, weights = [], []
        for task in tasks:
            base, expert = (
                self.values(self.score(Cell((name,)), split), split, task)[0] for name in ("base", task)
            )
            own, weight = self.values(scored, split, task)
            gain = float(((expert - base) * weight).sum())
            if gain <= 0:
                said = f"the {task} expert is no better than the base on {len(base)} {split} problems"
                fix = "score more problems, or train it longer"
                raise EvaluationError(Problem(f"{said}, so that there is nothing to keep", fix))
            values.append((own - base) / gain)
            weights.append(weight / len(tasks))
        return np.concatenate(values), np.concatenate(weights)

    def kept(self, cell: Cell, split: str) -> float:
        """The mean over the tasks of the cell's experts of the gain that it keeps."""
        values, weights = self.shares(self.score(cell, split), split, cell.experts)
        return float((values * weights).sum())

    def loss(self, cells: Iterable[Cell], split: str, task: str) -> float:
        """Loss per token of a task's answers, the mean over cells."""
        tokens = sum(self.tokens[split, task])
        return float(np.mean([sum(self.score(cell, split)[task]["loss"]) / tokens for cell in cells]))
