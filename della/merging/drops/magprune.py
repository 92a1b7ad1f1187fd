"""DELLA's Drop, MAGPRUNE: what ranks higher is kept with a higher probability."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.dtypes import MAGNITUDE_BITS, Array
from della.errors import Problem
from della.merging import compat, reference
from della.merging.drops.bernoulli import COUPLING, Bernoulli
from della.merging.drops.drop import WANDA, tile_saliency
from della.merging.method import Parameter
from della.merging.options import DENSITY, IMPORTANCE, RESCALE
from della.merging.random import bits64
from della.merging.tile import Grain, Passes, Subject, Tile

EPSILON = Parameter(
    "epsilon", "model", float, None, "half the range of keep probabilities: from density - epsilon to "
    "density + epsilon", (), 0.0, 0.5,
)  # fmt: skip
RANKS = "ranks are exact integers with ties averaged (mergekit: ranks in the dtype of the tensor)"
ROWS = "a row of a tensor with three or more axes is what feeds one output (mergekit: the second axis)"
USUAL_EPSILON = 0.15
TOLERANCE = 1e-9  # 0.7 + 0.3 may be a rounding error above 1
WINDOW_SIZE = Parameter(
    "window_size", "model", float, None, "2 * epsilon, as the authors call it", (), 0.0, 1.0
)

LADDERS = {"symmetric": reference.symmetric_ladder, "paper": reference.printed_ladder}
LADDER = Parameter(
    "ladder", "shared", str, "symmetric",
    "from ranks to keep probabilities: with the density as their mean, or the formula as printed",
    tuple(LADDERS), mergekit=("symmetric",),
)  # fmt: skip

Table = tuple[Array, Array, Array]


class Ranking(ABC):
    """A value of ``rank_by``: what gives a delta its keep probability."""

    ranks_saliency: bool = True  # false for the paper's controls, which ignore magnitude
    by_rank: bool = True  # whether ranks decide, and not magnitudes themselves
    grain: Grain = Grain.ROW

    @abstractmethod
    def probabilities(self, drop: Magprune, subject: Subject, t: int, sizes: Array) -> Array:
        """The reference: q of a tensor from the saliency (rows, n) of expert ``t``, float32."""

    def prepare(self, drop: Magprune, subject: Subject, passes: Passes) -> list[Table]:
        """Tables of the whole tensor for each expert, where they are needed."""
        return []

    @abstractmethod
    def apply(
        self, drop: Magprune, tile: Tile, t: int, delta: Array, tables: list[Table], q: Array | None
    ) -> None:
        """Drop in place from ``delta`` (rows, n) of expert ``t``."""


class _Rows(Ranking):
    """By the rank in the row; at random for the paper's control."""

    def __init__(self, ranks_saliency: bool) -> None:
        self.ranks_saliency = ranks_saliency

    def probabilities(self, drop: Magprune, subject: Subject, t: int, sizes: Array) -> Array:
        n = sizes.shape[1]
        low, step = drop.ladder_of(subject, t, n)
        keys = [self._keys(subject, t, r, row) for r, row in enumerate(sizes)]
        q = [reference.clip_probability(low + step * reference.average_ranks(row)) for row in keys]
        return np.array(q, np.float32).reshape(sizes.shape)

    def _keys(self, subject: Subject, t: int, r: int, row: Array) -> Array:
        return row if self.ranks_saliency else _shuffled(subject, t, r * row.size, row.size)

    def apply(
        self, drop: Magprune, tile: Tile, t: int, delta: Array, tables: list[Table], q: Array | None
    ) -> None:
        from della.merging.kernels import continuous
        from della.merging.kernels import drop as kernels

        subject, (rows, n) = tile.subject, delta.shape
        low, step = drop.ladder_of(subject, t, n)
        key, shift = drop.stream(subject, t)
        probabilities = np.empty((1, n), np.float32) if q is None else q
        bits, at_random = tile_saliency(subject.experts[t], delta).view(np.uint32), not self.ranks_saliency
        settings = (
            at_random, low, step, np.uint64(subject.key(t, "rank")), np.uint64(key), shift, tile.start,
            drop.rescale.per_element, probabilities,
        )  # fmt: skip
        bucket_bits, chosen, ranked = kernels.bucket_bits(n), np.arange(rows), np.arange(rows)
        if continuous.suits(n):
            count = rows if at_random else kernels.continuous_rows(bits, bucket_bits, chosen, ranked)
            ranked = ranked[: rows - count]
            if count:  # each is compiled only where there are such rows
                left = continuous.drop_continuous(delta, bits, chosen[:count], *settings)
                ranked = np.concatenate([ranked, chosen[:left]])
        if ranked.size:
            kernels.drop_ranked(delta, bits, ranked, *settings, bucket_bits)


class _Given(Ranking):
    """By probabilities that a kernel finds for a tile before it is sampled."""

    def apply(
        self, drop: Magprune, tile: Tile, t: int, delta: Array, tables: list[Table], q: Array | None
    ) -> None:
        from della.merging.kernels import drop as kernels

        probabilities = np.empty_like(delta) if q is None else q
        self.find(drop, tile, t, tile_saliency(tile.subject.experts[t], delta), tables, probabilities)
        key, shift = drop.stream(tile.subject, t)
        kernels.drop_given(delta, probabilities, np.uint64(key), shift, tile.start, drop.rescale.per_element)

    @abstractmethod
    def find(self, drop: Magprune, tile: Tile, t: int, sizes: Array, tables: list[Table], q: Array) -> None:
        """The probabilities into ``q``."""


class _Tensor(_Given):
    """By the rank in the whole tensor (the paper's layer-wise variant); at random for its control."""

    grain = Grain.ELEMENT

    def __init__(self, ranks_saliency: bool) -> None:
        self.ranks_saliency = ranks_saliency

    def probabilities(self, drop: Magprune, subject: Subject, t: int, sizes: Array) -> Array:
        low, step = drop.ladder_of(subject, t, sizes.size)
        keys = sizes.ravel() if self.ranks_saliency else _shuffled(subject, t, 0, sizes.size)
        return reference.clip_probability(low + step * reference.average_ranks(keys)).reshape(sizes.shape)

    def prepare(self, drop: Magprune, subject: Subject, passes: Passes) -> list[Table]:
        return [
            rank_table(
                self._keys(subject, t, tile.start, tile_saliency(tile.subject.experts[t], tile.values[t]))
                for tile in passes()
            )
            for t in range(len(subject.experts))
        ]

    def find(self, drop: Magprune, tile: Tile, t: int, sizes: Array, tables: list[Table], q: Array) -> None:
        from della.merging.kernels import drop as kernels

        low, step = drop.ladder_of(tile.subject, t, tile.subject.size)
        keys = self._keys(tile.subject, t, tile.start, sizes)
        kernels.probability_from_table(keys, *tables[t], low, step, q)

    def _keys(self, subject: Subject, t: int, start: int, sizes: Array) -> Array:
        """What is ranked, as integers of 31 bits (and a sign that is ignored)."""
        if self.ranks_saliency:
            return sizes.view(np.uint32)
        return _shuffled(subject, t, start, sizes.size).astype(np.uint32).reshape(sizes.shape)


class _Magnitude(_Given):
    """The authors' no-rank variant: by the magnitude between the least and the largest of the row."""

    by_rank = False

    def probabilities(self, drop: Magprune, subject: Subject, t: int, sizes: Array) -> Array:
        d, e = subject.experts[t]["density"], subject.experts[t]["epsilon"]
        return _by_row(sizes, lambda row: reference.linear_probabilities(d, e, row))

    def find(self, drop: Magprune, tile: Tile, t: int, sizes: Array, tables: list[Table], q: Array) -> None:
        from della.merging.kernels import drop as kernels

        expert = tile.subject.experts[t]
        kernels.probability_by_magnitude(sizes, expert["density"], expert["epsilon"], q)


class _Optimal(_Given):
    """The unbiased sampler of least variance: in proportion to the saliency, as far as 1 allows."""

    by_rank = False

    def probabilities(self, drop: Magprune, subject: Subject, t: int, sizes: Array) -> Array:
        density = subject.experts[t]["density"]
        return _by_row(sizes, lambda row: reference.optimal_probabilities(density, row))

    def find(self, drop: Magprune, tile: Tile, t: int, sizes: Array, tables: list[Table], q: Array) -> None:
        from della.merging.kernels import drop as kernels

        kernels.probability_optimal(sizes, tile.subject.experts[t]["density"], q)


def _by_row(sizes: Array, probabilities: Any) -> Array:
    q = [reference.clip_probability(probabilities(row)) for row in sizes]
    return np.array(q, np.float32).reshape(sizes.shape)


def _shuffled(subject: Subject, t: int, start: int, count: int) -> Array:
    """Random integers of 31 bits instead of magnitudes."""
    return np.asarray(bits64(subject.key(t, "rank"), start, count) >> np.uint64(33))


RANKINGS: dict[str, Ranking] = {
    "row": _Rows(ranks_saliency=True),
    "tensor": _Tensor(ranks_saliency=True),
    "random": _Rows(ranks_saliency=False),
    "random_tensor": _Tensor(ranks_saliency=False),
    "magnitude": _Magnitude(),
    "optimal": _Optimal(),
}
RANK_BY = Parameter(
    "rank_by", "shared", str, "row",
    "what gives a delta its keep probability: the rank of its magnitude in the row or tensor, a random rank "
    "(the paper's controls), the magnitude itself; optimal: the unbiased sampler of least variance",
    tuple(RANKINGS), mergekit=("row",),
)  # fmt: skip


class Magprune(Bernoulli):
    """Keep each delta with a probability that grows with its rank, from density - epsilon to density +
    epsilon, and divide by it (arXiv 2406.11617, section 2.1)."""

    words = (
        "delta / q with probability q, else 0; q grows with the rank of |delta| in its row, from "
        "density - epsilon to density + epsilon"
    )
    parameters = (DENSITY, EPSILON, WINDOW_SIZE, RESCALE, RANK_BY, IMPORTANCE, LADDER, COUPLING)
    nanoseconds = 3.5

    def __init__(self, shared: Mapping[str, Any]) -> None:
        super().__init__(shared)
        self.ranking, self.ladder = RANKINGS[shared["rank_by"]], LADDERS[shared["ladder"]]
        self.rank_by, self.grain = shared["rank_by"], self.ranking.grain
        self.table_bytes = 12 if self.grain is Grain.ELEMENT else 0

    @classmethod
    def values_of(cls, own: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: value for key, value in own.items() if key != WINDOW_SIZE.name}
        if values["epsilon"] is None:
            width = own[WINDOW_SIZE.name]
            values["epsilon"] = USUAL_EPSILON if width is None else width / 2
        return values

    def problems(self, models: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
        if self.wants_norms and not self.ranking.ranks_saliency:
            said = f"importance: wanda has no part in rank_by: {self.rank_by}, which ranks nothing"
            yield Problem(said, "remove one", parameter="importance")
        else:
            yield from super().problems(models)
        for identity, own in models.items():
            yield from self._range_problems(identity, own)

    def _range_problems(self, identity: str, own: Mapping[str, Any]) -> Iterator[Problem]:
        if own.get("window_size") is not None and own.get("epsilon") is not None:
            said = "window_size is 2 * epsilon, so only one of them may be given"
            yield Problem(said, subject=identity, parameter="window_size")
            return
        e = self.values_of({"epsilon": None, "window_size": None, **own})["epsilon"]
        d = 1.0 if own.get("density") is None else own["density"]
        low, high = d - e, d + e
        # Of density 0 or 1 nothing or everything is kept, whatever epsilon says.
        if d not in (0.0, 1.0) and (low < -TOLERANCE or high > 1 + TOLERANCE):
            name, times = ("epsilon", 1) if own.get("window_size") is None else ("window_size", 2)
            most = times * min(d, 1 - d)
            if float(f"{most:g}") > most + TOLERANCE:  # rounded up
                most = math.floor(most * 1e6) / 1e6
            yield Problem(
                f"density {d:g} with epsilon {e:g} gives keep probabilities from {low:g} to "
                f"{high:g}, which leave [0, 1]",
                f"use {'an' if times == 1 else 'a'} {name} of at most {most:g}",
                identity,
                parameter="density",
            )

    def ladder_of(self, subject: Subject, t: int, n: int) -> tuple[float, float]:
        """(q of rank 0, step of q per half rank) of expert ``t`` for a group of ``n`` deltas."""
        expert = subject.experts[t]
        return self.ladder(expert["density"], expert["epsilon"], n)

    def probabilities(self, subject: Subject, t: int, delta: Array) -> Array:
        sizes = reference.saliency(subject.experts[t].norms, delta)
        return self.ranking.probabilities(self, subject, t, sizes)

    def mergekit_probabilities(self, subject: Subject, t: int, delta: Array) -> Array:
        return compat.probabilities(subject.experts[t]["density"], subject.experts[t]["epsilon"], delta)

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> list[Table]:
        return self.ranking.prepare(self, subject, passes)

    def apply(self, tile: Tile, t: int, delta: Array, facts: Any, q: Array | None) -> None:
        if tile.subject.experts[t]["density"] in (0.0, 1.0):  # nothing or everything is kept
            super().apply(tile, t, delta, facts, q)
        else:
            self.ranking.apply(self, tile, t, delta, facts, q)

    def departures(self, subject: Subject) -> dict[str, bool]:
        ranked = (
            self.ranking.by_rank
            and self.ranking.ranks_saliency
            and any(0 < e["density"] < 1 and e["epsilon"] > 0 for e in subject.experts)
        )
        return super().departures(subject) | {
            RANKS: ranked,
            WANDA: self.wants_norms,
            ROWS: ranked and len(subject.shape) > 2,
        }


# ---- ranks of a whole tensor -------------------------------------------------------------------------------


def rank_table(pieces: Iterable[Array]) -> Table:
    """(where each upper half begins, the distinct keys in order, twice the averaged rank of each) of one
    expert, whose keys come in pieces.
    """
    tables: list[tuple[Array, Array]] = []
    for keys in pieces:
        tables.append(np.unique(keys & MAGNITUDE_BITS, return_counts=True))
        # Only tables of like sizes, so that no value is joined often.
        while len(tables) > 1 and tables[-2][0].size <= 2 * tables[-1][0].size:
            tables[-2:] = [_joined(tables[-2:])]
    distinct, counts = _joined(tables) if tables else (np.zeros(0, np.uint32), np.zeros(0, np.int64))
    behind = np.cumsum(counts)
    first = np.searchsorted(distinct >> np.uint32(15), np.arange((1 << 16) + 1)).astype(np.int64)
    return first, distinct, 2 * behind - counts - 1


def _joined(tables: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """(distinct values in order, how often each occurs) of several such tables."""
    values, times = (np.concatenate(column) for column in zip(*tables, strict=True))
    distinct, where = np.unique(values, return_inverse=True)
    return distinct, np.bincount(where, times, distinct.size).astype(np.int64)
