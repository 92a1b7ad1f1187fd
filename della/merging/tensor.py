"""One tensor, tile by tile: the stages Drop, Elect and Fuse chained over the fast kernels.

A tile is a run of whole rows (or of single elements, where the method knows no rows).  Some choices need a
number of the whole tensor first (a threshold, a sum, a rank table): ``prepare`` reads the tiles once or twice
for those, then ``apply`` merges each tile.  The same code serves files and arrays in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from della.merging import reference
from della.merging.kernels import drop as kernels
from della.merging.kernels import fuse as fusing
from della.merging.kernels import largest
from della.merging.methods import OF_TENSOR, Choice, Expert
from della.random import bits64, stream_key, systematic_shift

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tile:
    """Rows of one tensor: ``start`` (in elements), the base (rows, n) and the experts' deltas (experts, rows,
    n), all float32.  The deltas are consumed: ``apply`` drops in place.
    """

    start: int
    base: Array
    deltas: Array


@dataclass(frozen=True)
class Band:
    """Which magnitudes are kept, as the bits of float32: from ``high`` without its first ``skip`` occurrences
    down to the first ``take`` occurrences of ``low``.
    """

    high: int
    skip: int
    low: int
    take: int


class Workspace:
    """Buffers of one thread, reused from tile to tile."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """An uninitialised C-contiguous array of this shape; the last one of the same name is void."""
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < wanted:
            buffer = self._buffers[name] = np.empty(wanted, np.uint8)
        return np.asarray(buffer[:wanted].view(dtype).reshape(shape))


def cut(choice: Choice, name: str, shape: Sequence[int], target: int) -> list[tuple[int, int, int]]:
    """The tiles of a tensor as (start, rows, n): whole rows, or runs of elements where the method knows no
    rows, of about ``target`` elements each.
    """
    size = math.prod(shape)
    by_row = (
        (choice.drop == "magprune" and choice.rank_by not in OF_TENSOR)
        or (choice.drop == "top" and choice.scope == "row")
        or choice.lambda_scaling in ("row", "row_inverse")
        or choice.rescale == "l1"
        or choice.importance == "wanda"
    )
    if not by_row:
        return [(start, 1, min(target, size - start)) for start in range(0, size, target)]
    n = reference.row_length(name, shape)
    rows = max(1, target // max(n, 1))
    return [(start, min(rows, (size - start) // n), n) for start in range(0, size, rows * n)] if size else []


class TensorMerge:
    """The merge of one tensor of ``size`` elements.  ``experts`` are in canonical order (sorted by identity).

    ``bands`` gives TIES' thresholds where they come from the whole model (scope: model).
    """

    def __init__(
        self, name: str, size: int, choice: Choice, experts: Sequence[Expert], seed: int,
        bands: Sequence[Band] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.size, self.choice, self.experts, self.seed = name, size, choice, experts, seed
        self.weights = np.array([e.weight for e in experts], np.float32)
        self.votes = _votes(choice, self.weights)
        self.by_count = True if choice.vote == "count" else None
        self._bands = bands
        self._tables: list[tuple[Array, Array, Array]] = []
        self._rescale: list[np.float32] = []
        self._factors: Array | None = None
        self._seen = np.zeros((len(experts), 2), np.int64)

    # ---- numbers of the whole tensor ----

    def prepare(self, tiles: Callable[[], Iterable[Tile]]) -> None:
        """Gather what the choice needs to know of the whole tensor; ``tiles`` starts a new pass at each
        call.
        """
        choice = self.choice
        if self.size == 0:
            return
        if choice.drop in ("top", "band") and choice.scope != "row" and self._bands is None:
            self._bands = find_bands(
                choice, self.experts, self.size, lambda: (all_scores(self.experts, t) for t in tiles())
            )
        if choice.drop == "magprune" and choice.rank_by in OF_TENSOR:
            self._tables = [
                _rank_table(self._keys(t, tile.start, scores(e, tile.deltas[t])) for tile in tiles())
                for t, e in enumerate(self.experts)
            ]
        if choice.rescale == "l1":
            self._rescale = self._l1_factors(tiles())
        if choice.lambda_scaling == "tensor":
            self._factors = self._tensor_factors(tiles())[:, 0]

    def _l1_factors(self, tiles: Iterable[Tile]) -> list[np.float32]:
        before: list[list[Array]] = [[] for _ in self.experts]
        after: list[list[Array]] = [[] for _ in self.experts]
        for tile in tiles:
            for t in range(len(self.experts)):
                before[t].append(_row_sums(tile.deltas[t]))
                after[t].append(_row_sums(self._drop(t, tile.start, tile.deltas[t])))
        self._seen[:] = 0
        factors = []
        for b, a in zip(before, after, strict=True):
            total, kept = (reference.ordered_sum(np.concatenate(x)) for x in (b, a))
            factors.append(np.float32(total / kept if total >= 1e-7 and kept >= 1e-7 else 1.0))
        return factors

    def _tensor_factors(self, tiles: Iterable[Tile]) -> Array:
        counts = np.zeros((len(self.experts), 1, 2), np.int64)
        for tile in tiles:
            counts += self._counts(self._drop_all(tile)).sum(axis=1, keepdims=True)
        self._seen[:] = 0
        return self._adaptive(counts)

    # ---- one tile ----

    def apply(self, tile: Tile, out: Array, workspace: Workspace) -> None:
        """Merge one tile into ``out`` (rows, n), float32.  Tiles of one tensor come in order."""
        rows, n = tile.base.shape
        q = None
        deltas = tile.deltas
        if self.choice.fuse == "calibrated":
            q = workspace.array("q", tile.deltas.shape)
            deltas = workspace.array("deltas", tile.deltas.shape)
            deltas[:] = tile.deltas
        dropped = self._drop_all(tile, q).reshape(len(self.experts), -1)
        divisor = None
        if q is not None:
            signs, divisor = workspace.array("signs", (rows, n)), workspace.array("divisor", (rows, n))
            fusing.elect(_few(self.votes), self.by_count, _few(dropped), signs.reshape(-1))
            fusing.calibrate(self.weights, deltas, q, signs, divisor)
            divisor = divisor.reshape(-1)
        base, out = tile.base.reshape(-1), out.reshape(-1)
        if self.choice.lambda_scaling not in ("row", "row_inverse"):
            self._fuse(base, dropped, self._factors, divisor, out)
            return
        factors = self._adaptive(self._counts(tile.deltas))
        for r in range(rows):
            at = slice(r * n, (r + 1) * n)
            by_row = None if divisor is None else divisor[at]
            self._fuse(base[at], dropped[:, at], factors[:, r], by_row, out[at])

    def _fuse(
        self, base: Array, dropped: Array, factors: Array | None, divisor: Array | None, out: Array
    ) -> None:
        scale = np.float32(self.choice.lambda_ if self.choice.lambda_scaling == "constant" else 1.0)
        fusing.fuse(
            base, _few(self.weights), _few(self.votes), self.by_count, self.choice.fuse != "sum", scale,
            _few(dropped), _few(factors), divisor, out,
        )  # fmt: skip

    def _counts(self, dropped: Array) -> Array:
        """(experts, rows, 2): the nonzero and the elected deltas of each expert in each row."""
        signs = np.empty(dropped.shape[1:], np.float32)
        flat = dropped.reshape(len(dropped), -1)
        fusing.elect(_few(self.votes), self.by_count, _few(flat), signs.reshape(-1))
        counts = np.empty((*dropped.shape[:2], 2), np.int64)
        fusing.count_elected(self.weights, self.votes is not None, dropped, signs, counts)
        return counts

    def _adaptive(self, counts: Array) -> Array:
        nonzero, elected = counts[..., 0].astype(np.float64), counts[..., 1].astype(np.float64)
        over, under = (
            (elected, nonzero) if self.choice.lambda_scaling == "row_inverse" else (nonzero, elected)
        )
        return np.divide(over, under, out=np.zeros_like(over), where=under > 0).astype(np.float32)

    def _drop_all(self, tile: Tile, q: Array | None = None) -> Array:
        for t in range(len(self.experts)):
            self._drop(t, tile.start, tile.deltas[t], None if q is None else q[t])
        return tile.deltas

    def _drop(self, t: int, start: int, delta: Array, q: Array | None = None) -> Array:
        """Drop in place: delta' of expert ``t`` for a tile (rows, n); its probabilities into ``q`` where
        asked.
        """
        choice, expert = self.choice, self.experts[t]
        if choice.drop == "none":
            return delta
        if choice.drop in ("top", "band"):
            self._drop_by_size(t, delta)
        elif expert.density in (0.0, 1.0) or choice.drop == "bernoulli":
            self._drop_evenly(t, start, delta, q)
        else:
            self._magprune(t, start, delta, q)
        if self._rescale:
            np.multiply(delta, self._rescale[t], out=delta)
        return delta

    def _drop_by_size(self, t: int, delta: Array) -> None:
        sizes = scores(self.experts[t], delta)
        bits = sizes.view(np.uint32)
        if sizes is not delta:  # all negative, so that a score of zero is not taken for a dropped one
            bits |= np.uint32(1 << 31)
        if self._bands is None:
            largest.drop_largest_rows(bits, reference.band(self.experts[t], delta.shape[1])[1])
        else:
            b = self._bands[t]
            largest.drop_band(
                bits.reshape(-1), np.uint32(b.high), b.skip, np.uint32(b.low), b.take, self._seen[t]
            )
        if sizes is not delta:
            delta[bits == 0] = 0

    def _drop_evenly(self, t: int, start: int, delta: Array, q: Array | None) -> None:
        density = np.float32(self.experts[t].density)
        if q is not None:
            q.fill(density)
        if density == 0:
            delta.fill(0)
        elif density < 1:
            even = np.full((1, delta.shape[1]), density, np.float32)
            kernels.drop_given(delta, even, *self._stream(t), start, self._per_element)

    @property
    def _per_element(self) -> bool:
        return self.choice.rescale == "per_element"

    def _stream(self, t: int) -> tuple[np.uint64, int]:
        """(key, rotation) of the uniforms of expert ``t``."""
        if self.choice.coupling == "systematic":
            return np.uint64(stream_key(self.seed, "", self.name)), systematic_shift(t, len(self.experts))
        return np.uint64(stream_key(self.seed, self.experts[t].identity, self.name)), 0

    def _magprune(self, t: int, start: int, delta: Array, q: Array | None) -> None:
        choice, expert = self.choice, self.experts[t]
        key, shift = self._stream(t)
        n, sizes = delta.shape[1], scores(expert, delta)
        if choice.rank_by in ("row", "random"):
            low, step = reference.ladder(choice, expert, n)
            order = np.uint64(stream_key(self.seed, expert.identity, self.name, "rank"))
            probabilities = np.empty((1, n), np.float32) if q is None else q
            kernels.drop_ranked(
                delta, sizes.view(np.uint32), choice.rank_by == "random", kernels.bucket_bits(n), low, step,
                order, key, shift, start, self._per_element, probabilities,
            )  # fmt: skip
            return
        probabilities = np.empty_like(delta) if q is None else q
        if choice.rank_by == "magnitude":
            kernels.probability_by_magnitude(sizes, expert.density, expert.epsilon, probabilities)
        elif choice.rank_by == "optimal":
            kernels.probability_optimal(sizes, expert.density, probabilities)
        else:
            low, step = reference.ladder(choice, expert, self.size)
            keys = self._keys(t, start, sizes)
            kernels.probability_from_table(keys, *self._tables[t], low, step, probabilities)
        kernels.drop_given(delta, probabilities, key, shift, start, self._per_element)

    def _keys(self, t: int, start: int, sizes: Array) -> Array:
        """What is ranked in the whole tensor, as integers of 31 bits (and a sign that is of no account)."""
        if self.choice.rank_by == "tensor":
            return sizes.view(np.uint32)
        order = stream_key(self.seed, self.experts[t].identity, self.name, "rank")
        keys = (bits64(order, start, sizes.size) >> np.uint64(33)).astype(np.uint32)
        return np.asarray(keys.reshape(sizes.shape))


def scores(expert: Expert, delta: Array) -> Array:
    """reference.scores of a tile (rows, n) but for their signs; ``delta`` itself where there are no norms."""
    if expert.norms is None:
        return delta
    with np.errstate(all="ignore"):
        sizes = np.asarray(delta * expert.norms)
    return np.clip(sizes, -reference.LARGEST, reference.LARGEST, out=sizes)


def all_scores(experts: Sequence[Expert], tile: Tile) -> list[Array]:
    """The same of every expert."""
    return [scores(expert, delta) for expert, delta in zip(experts, tile.deltas, strict=True)]


def _votes(choice: Choice, weights: Array) -> Array | None:
    """What each expert's delta' counts for in the vote; None where there is none."""
    if choice.vote == "none":
        return None
    return np.asarray(np.sign(weights)) if choice.vote == "unweighted" else weights


def _few(values: Array | None) -> Any:
    """Few experts as a tuple, so that the compiler knows their number."""
    return tuple(values) if values is not None and len(values) <= fusing.MOST_UNROLLED else values


def _row_sums(values: Array) -> Array:
    sums = np.empty(values.shape[0])
    largest.row_sums(values, sums)
    return sums


# ---- thresholds and ranks of a whole tensor ----------------------------------------------------------------


def find_bands(
    choice: Choice, experts: Sequence[Expert], size: int, passes: Callable[[], Iterable[Sequence[Array]]]
) -> list[Band]:
    """The band of magnitudes that each expert keeps of ``size`` deltas; ``passes`` starts a new pass over
    their scores, in pieces with an array for each expert.  Two passes: the upper half of the bits, then the
    lower half near the thresholds.
    """
    upper = np.zeros((len(experts), 1 << 16), np.int64)
    for sizes in passes():
        for t in range(len(experts)):
            largest.count_upper(sizes[t].reshape(-1).view(np.uint32), upper[t])
    wanted = [_positions(choice, e, size) for e in experts]
    coarse = [[_locate(upper[t], p) for p in wanted[t]] for t in range(len(experts))]
    lower = {(t, half): np.zeros(1 << 15, np.int64) for t in range(len(experts)) for half, _ in coarse[t]}
    for sizes in passes():
        for (t, half), counts in lower.items():
            largest.count_lower(sizes[t].reshape(-1).view(np.uint32), np.uint32(half), counts)
    return [_band(wanted[t], coarse[t], lower, t) for t in range(len(experts))]


def _positions(choice: Choice, expert: Expert, size: int) -> list[int]:
    """The positions, counted from the largest, of the first and the last kept delta; empty where none is
    kept.
    """
    first, count = reference.band(expert, size)
    first = first if choice.drop == "band" else 0
    return [first, first + count - 1] if count else []


def _locate(counts: Array, position: int) -> tuple[int, int]:
    """(the bucket that holds ``position`` counted from the top, the position inside it)."""
    behind = np.cumsum(counts[::-1])
    k = int(np.searchsorted(behind, position, side="right"))
    return counts.size - 1 - k, position - int(behind[k - 1] if k else 0)


def _band(
    wanted: list[int], coarse: list[tuple[int, int]], lower: dict[tuple[int, int], Array], t: int
) -> Band:
    if not wanted:
        return Band(high=0, skip=0, low=1 << 31, take=0)
    ends = []
    for half, inside in coarse:
        digit, occurrence = _locate(lower[t, half], inside)
        ends.append(((half << 15) | digit, occurrence))
    (high, skip), (low, last) = ends
    return Band(high, skip, low, last + 1)


def _rank_table(pieces: Iterable[Array]) -> tuple[Array, Array, Array]:
    """(where each upper half begins, the distinct keys in order, twice the averaged rank of each) of one
    expert, whose keys come in pieces.
    """
    tables: list[tuple[Array, Array]] = []
    for keys in pieces:
        tables.append(np.unique(keys & np.uint32(0x7FFFFFFF), return_counts=True))
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
