"""The Drops of TIES and breadcrumbs: what is kept is chosen by size alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from della.dtypes import MAGNITUDE_BITS, Array
from della.merging import reference
from della.merging.drops.drop import WANDA, Drop, tile_saliency
from della.merging.method import Asking, Parameter, WholeModel
from della.merging.options import DENSITY, IMPORTANCE, RESCALE, SCOPE, SCOPES, Scope
from della.merging.tile import Expert, Grain, Passes, Subject, Tile, Workspace

MOST_ODD = 1 << 21  # sizes that are listed, of each expert
NONE = np.empty(0, np.uint32)
GAMMA = Parameter("gamma", "model", float, 0.01, "share of the largest deltas that is dropped", (), 0.0, 1.0)
OF_MODEL = WholeModel(
    Asking("scope", "model"), "chooses one threshold for the whole model", ("density",), "scope: tensor"
)


class Band(NamedTuple):
    """Which magnitudes are kept, as the bits of float32: from ``high`` without its first ``skip`` occurrences
    down to the first ``take`` occurrences of ``low``.
    """

    high: int
    skip: int
    low: int
    take: int


class _BySize(Drop, ABC):
    own_rescale = "l1"
    looks = True
    scope: Scope = Scope()

    @abstractmethod
    def range(self, expert: Expert, size: int) -> tuple[int, int]:
        """(first, count) of what is kept of ``size`` deltas, counted from the largest."""

    def kept(self, subject: Subject, t: int, delta: Array) -> tuple[Array, Array]:
        expert = subject.experts[t]
        sizes, mask = reference.saliency(expert.norms, delta), np.empty(delta.shape, bool)
        groups = zip(mask, sizes) if self.scope.by_row else [(mask.reshape(-1), sizes.reshape(-1))]
        for target, group in groups:
            target[:] = reference.largest(group, *self.range(expert, group.size))
        return np.where(mask, delta, delta.dtype.type(0)), np.ones(delta.shape, np.float32)

    # ---- tiles ----

    def learn(self, tensors: Sequence[tuple[Subject, Passes]]) -> dict[str, Any]:
        """A band for every tensor and expert, by one threshold for the whole model.

        Equal magnitudes at the threshold are kept in output order, so each tensor needs to know how many of
        them the tensors before it hold: a third pass counts those.
        """
        size = sum(subject.size for subject, _ in tensors)
        whole = self._bands(
            tensors[0][0].experts, size, lambda: (tile for _, passes in tensors for tile in passes())
        )
        left = [band.take for band in whole]
        learnt: dict[str, Any] = {}
        for subject, passes in tensors:
            learnt[subject.name] = [[b.high, b.skip, b.low, n] for b, n in zip(whole, left, strict=True)]
            for tile in passes():
                for t, band in enumerate(whole):
                    sizes = tile_saliency(tile.subject.experts[t], tile.values[t])
                    bits = sizes.view(np.uint32) & MAGNITUDE_BITS
                    left[t] -= int(np.count_nonzero(bits == band.low))
            left = [max(n, 0) for n in left]
        return learnt

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> list[Band]:
        if learnt is not None:
            return [Band(*row) for row in learnt]
        return [] if self.scope.by_row else self._bands(subject.experts, subject.size, passes)

    def begin(self, facts: list[Band]) -> tuple[list[Band], Array]:
        return facts, np.zeros((len(facts), 2), np.int64)  # how often the ends of a band were seen

    def apply(self, tile: Tile, t: int, delta: Array, facts: Any, q: Array | None) -> None:
        from della.merging.kernels import largest

        expert, (bands, seen) = tile.subject.experts[t], facts
        sizes = tile_saliency(expert, delta)
        bits = sizes.view(np.uint32)
        if sizes is not delta:  # all negative, so that a saliency of zero is not taken for a dropped one
            bits |= np.uint32(1 << 31)
        if self.scope.by_row:
            largest.drop_largest_rows(bits, self.range(expert, delta.shape[1])[1])
        else:
            b = bands[t]
            largest.drop_band(bits.reshape(-1), np.uint32(b.high), b.skip, np.uint32(b.low), b.take, seen[t])
        if sizes is not delta:
            delta[bits == 0] = 0

    def _bands(self, experts: Sequence[Expert], size: int, passes: Passes) -> list[Band]:
        """The band of magnitudes that each expert keeps of ``size`` deltas."""
        wanted = [self.range(expert, size) for expert in experts]
        return find_bands(
            len(experts),
            lambda tile, t: tile_saliency(tile.subject.experts[t], tile.values[t]),
            lambda _: wanted,
            passes,
        )

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {WANDA: self.wants_norms}


class Top(_BySize):
    """Keep the largest (arXiv 2306.01708, section 3.2)."""

    words = "delta where |delta| is among the density largest of the tensor, else 0"
    parameters = (DENSITY, RESCALE, SCOPE, IMPORTANCE)
    nanoseconds = 3.2

    def __init__(self, shared: Mapping[str, Any]) -> None:
        super().__init__(shared)
        self.scope = SCOPES[shared["scope"]]
        self.grain = Grain.ROW if self.scope.by_row else Grain.ELEMENT
        self.whole_model = OF_MODEL if self.scope.of_model else None

    def range(self, expert: Expert, size: int) -> tuple[int, int]:
        return 0, int(expert["density"] * size)

    def kept_by_mergekit(self, subject: Subject, t: int, delta: Array) -> Array:
        count = max(1, int(subject.experts[t]["density"] * delta.size))
        return _stable(delta, delta.size - count, count)

    def departures(self, subject: Subject) -> dict[str, bool]:
        return super().departures(subject) | {
            "a density that leaves a tensor less than one delta leaves it none (mergekit: one)": any(
                0 < density * subject.size < 1 for density in subject.column("density")
            )
        }


class Middle(_BySize):
    """Drop the largest, then the smallest (arXiv 2312.06795, section 3)."""

    words = "delta but for the gamma largest and then the smallest of the tensor, so that density is kept"
    parameters = (DENSITY, GAMMA, RESCALE, IMPORTANCE)
    nanoseconds = 3.5

    def range(self, expert: Expert, size: int) -> tuple[int, int]:
        return reference.band(expert["density"], expert["gamma"], size)

    def kept_by_mergekit(self, subject: Subject, t: int, delta: Array) -> Array:
        expert, size = subject.experts[t], delta.size
        count = int(expert["density"] * size)
        return _stable(delta, max(0, size - count - int(expert["gamma"] * size)), count)


def _stable(delta: Array, first: int, count: int) -> Array:
    """A mask of ``count`` values from the ``first`` smallest on."""
    order = np.argsort(np.abs(delta).ravel().astype(np.float64), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[order[first : first + count]] = True
    return mask.reshape(delta.shape)


# ---- thresholds --------------------------------------------------------------------------------------------


def find_bands(
    count: int,
    sizes: Callable[[Tile, int], Array],
    wanted: Callable[[Array], Sequence[tuple[int, int]]],
    passes: Passes,
) -> list[Band]:
    """The bands of ``count`` sets of sizes (float32).

    The first pass counts the upper halves of their bits and lists the sizes with a bit in the lower half.
    Of deltas of 16-bit checkpoints these are few, and nothing else needs to be known; of others a second pass
    counts the lower halves near the thresholds.

    Args:
        count: How many sets there are.
        sizes: Those of one set in a tile.
        wanted: (first, count) of what is kept of each set, counted from the largest; called with the
            number of sizes of each set in each of 65,536 ranges.
        passes: Starts a pass over the tiles.
    """
    from della.merging.kernels import largest

    def bits(tile: Tile, t: int) -> Array:
        return sizes(tile, t).reshape(-1).view(np.uint32)

    upper, lists = np.zeros((count, 1 << 16), np.int64), [_Odd() for _ in range(count)]
    for tile in passes():
        for t in range(count):
            lists[t].count(bits(tile, t), upper[t], tile.workspace)
    places = [_positions(*each) for each in wanted(upper)]
    coarse = [[_locate(upper[t], p) for p in places[t]] for t in range(count)]
    lower = [{half: lists[t].lower(half, upper[t]) for half, _ in ends} for t, ends in enumerate(coarse)]
    if any(each.too_many and ends for each, ends in zip(lists, coarse, strict=True)):
        for tile in passes():
            for t in range(count):
                for half, counts in lower[t].items() if lists[t].too_many else ():
                    largest.count_lower(bits(tile, t), np.uint32(half), counts)
    return [_band(ends, counts) for ends, counts in zip(coarse, lower, strict=True)]


class _Odd:
    """Of one set the sizes with a bit in the lower half, unless they are too many."""

    def __init__(self) -> None:
        self._keys: list[Array] = []
        self._room = MOST_ODD
        self.too_many = False

    def count(self, bits: Array, upper: Array, workspace: Workspace) -> None:
        """Take up a tile; ``upper`` has the counts of the upper halves."""
        from della.merging.kernels import largest

        if self.too_many:
            largest.count_upper(bits, upper)
            return
        odd = workspace.array("odd", bits.shape, np.uint32)
        found = int(largest.count_and_list(bits, upper, odd))
        self._room -= found
        if found > bits.size // 4 or self._room < 0:
            self.too_many, self._keys = True, []
        else:
            self._keys.append(odd[:found].copy())

    def lower(self, half: int, upper: Array) -> Array:
        """How often each lower half occurs with this upper one; zeros where they were too many."""
        if self.too_many:
            return np.zeros(1 << 15, np.int64)
        keys = np.concatenate([each[each >> np.uint32(15) == half] for each in self._keys] or [NONE])
        counts = np.bincount(keys & np.uint32(0x7FFF), minlength=1 << 15)
        counts[0] = upper[half] - keys.size
        return counts


def _positions(first: int, count: int) -> list[int]:
    """Those of the first and the last kept delta, counted from the largest; empty where none is kept."""
    return [first, first + count - 1] if count else []


def _locate(counts: Array, position: int) -> tuple[int, int]:
    """(the bucket that holds ``position`` counted from the top, the position inside it)."""
    behind = np.cumsum(counts[::-1])
    k = int(np.searchsorted(behind, position, side="right"))
    return counts.size - 1 - k, position - int(behind[k - 1] if k else 0)


def _band(coarse: Sequence[tuple[int, int]], counts: Mapping[int, Array]) -> Band:
    ends = []
    for half, inside in coarse:
        digit, occurrence = _locate(counts[half], inside)
        ends.append(((half << 15) | digit, occurrence))
    if not ends:
        return Band(high=0, skip=0, low=1 << 31, take=0)
    (high, skip), (low, last) = ends
    return Band(high, skip, low, last + 1)
