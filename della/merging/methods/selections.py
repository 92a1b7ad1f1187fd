"""Methods that choose element by element, by what the models do there: sce, nearswap, ram, arcee_fusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from della.dtypes import Array
from della.errors import Problem
from della.merging import compat, reference
from della.merging.drops.by_size import Band, find_bands
from della.merging.method import Method, Parameter, register
from della.merging.products import dot
from della.merging.tile import Expert, Grain, Passes, Subject, Tile

SELECT_TOPK = Parameter(
    "select_topk", "shared", float, 1.0,
    "share of the elements that is merged: of those whose variance over the models is not 0, the largest",
    (), 0.0, 1.0,
)  # fmt: skip
NEAR = Parameter("t", "shared", float, None, "how far from the base an element may go", (), 0.0)
EPSILON = Parameter("epsilon", "model", float, 1e-5, "deltas up to this size are no changes", (), 0.0)
R = Parameter(
    "r", "shared", float, 0.1, "how much a model's share of shared changes enlarges its own", (), 0.0
)
ALPHA = Parameter("alpha", "shared", float, 0.2, "the most of shared / own changes that counts", (), 0.0)


# ---- sce ---------------------------------------------------------------------------------------------------


def _variance(deltas: Sequence[Array]) -> Array:
    """Over the models, of each element, in the type of the deltas; its largest number where it overflows."""
    count = deltas[0].dtype.type(len(deltas))
    mean = _total(deltas) / count
    found = _total([(delta - mean) * (delta - mean) for delta in deltas]) / count
    largest = np.finfo(found.dtype).max
    return np.asarray(np.where(found <= largest, found, largest))


def _total(parts: Sequence[Array]) -> Array:
    """The sum in the order of the models."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _erased(deltas: Sequence[Array], weights: Sequence[Any]) -> Array:
    """The weighted mean of the deltas that have the sign of their sum."""
    real = deltas[0].dtype.type
    sign = np.where(_total(deltas) >= 0, real(1), real(-1))
    agree = [np.sign(delta) == sign for delta in deltas]
    above = _total(
        [np.where(a, real(w) * d, real(0)) for a, w, d in zip(agree, weights, deltas, strict=True)]
    )
    below = _total([np.where(a, real(w), real(0)) for a, w in zip(agree, weights, strict=True)])
    return np.asarray(above / np.maximum(below, real(1e-6)))


def _shares(masses: Sequence[float]) -> list[float]:
    total = sum(masses)
    return [mass / total if total > 0 else 1 / len(masses) for mass in masses]


@dataclass
class _Chosen:
    band: Band | None  # of variances; None where all are chosen
    weights: list[float]
    seen: Array

    def mask(self, deltas: Array) -> None:
        """Zero what is not chosen of the next deltas (models, elements)."""
        from della.merging.kernels import largest

        if self.band is not None:
            sizes = _variance(list(deltas))
            b, bits = self.band, sizes.view(np.uint32)
            largest.drop_band(bits, np.uint32(b.high), b.skip, np.uint32(b.low), b.take, self.seen)
            deltas[:, bits == 0] = 0


@register
class Sce(Method):
    """Select, calculate, erase: the elements on which the models differ most, weighted by their energy."""

    name, source = "sce", "arXiv 2408.07990, section 3.2"
    formula = (
        "base + the mean of the deltas that have the sign of their sum, weighted by each model's sum of "
        "squares, at the select_topk elements of largest variance"
    )
    takes = (SELECT_TOPK,)
    nanoseconds = 6.0

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        deltas = [model - base for model in models]
        if self.shared["select_topk"] < 1:
            sizes = _variance(deltas).reshape(-1)
            mask = reference.largest(sizes, 0, self._count(int(np.count_nonzero(sizes)))).reshape(base.shape)
            deltas = [np.where(mask, delta, delta.dtype.type(0)) for delta in deltas]
        masses = [dot(delta.reshape(-1), delta.reshape(-1)) for delta in deltas]
        return np.asarray(base + _erased(deltas, _shares(masses)))

    def _count(self, nonzero: int) -> int:
        return int(nonzero * self.shared["select_topk"])

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert self.compat is not None
        assert base is not None
        dtype = self.compat.numpy
        made = compat.sce(base.astype(dtype), [m.astype(dtype) for m in models], self.shared["select_topk"])
        return made.astype(dtype)

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> _Chosen:
        from della.merging.kernels import dots

        chosen = _Chosen(self._band(subject, passes), [], np.zeros(2, np.int64))
        lanes = np.zeros((len(subject.experts), 8))
        for tile in passes():
            deltas = tile.values.reshape(len(lanes), -1)
            chosen.mask(deltas)
            for t, delta in enumerate(deltas):
                dots.add_products(delta, delta, tile.start, lanes[t])
        chosen.weights = _shares([reference.ordered_sum(row) for row in lanes])
        chosen.seen[:] = 0
        return chosen

    def _band(self, subject: Subject, passes: Passes) -> Band | None:
        if self.shared["select_topk"] >= 1:
            return None
        nonzero = 0

        def sizes(tile: Tile, _: int) -> Array:
            nonlocal nonzero
            found = _variance(list(tile.values.reshape(len(subject.experts), -1)))
            nonzero += np.count_nonzero(found)
            return found

        (band,) = find_bands(1, sizes, lambda _: [(0, self._count(nonzero))], passes)
        return band

    def apply(self, tile: Tile, facts: _Chosen, out: Array) -> None:
        deltas = tile.values.reshape(len(facts.weights), -1)
        facts.mask(deltas)
        assert tile.base is not None
        out[:] = tile.base + _erased(list(deltas), facts.weights).reshape(out.shape)

    def idle_by(self, expert: Expert) -> str:
        return "select_topk" if self.shared["select_topk"] == 0 else ""

    def memory(self, experts: int, tile: int, elements: int) -> int:
        return super().memory(experts, tile, elements) + 4 * tile * (3 * experts + 4)

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {
            "a model's share is its share of the squares, however small (mergekit: all alike below a sum of "
            "mean squares of 1e-6)": len(subject.experts) > 1
        }


# ---- nearswap ----------------------------------------------------------------------------------------------


@register
class Nearswap(Method):
    """The other model where it is near the base, else t towards it."""

    name, source = "nearswap", "mergekit 0.1.5, merge_methods/nearswap"
    formula = "model where |model - base| <= t, else base + t in the direction of the model"
    takes = (NEAR,)
    of_deltas = False
    experts = (1, 1)
    nanoseconds = 1.5

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        if shared.get("t") is None:
            said = "nearswap needs t, the most that an element may move"
            yield Problem(said, "write 't: 0.001', or another size, in parameters", parameter="t")

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        return self._moved(base, models[0])

    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        assert tile.base is not None
        out[:] = self._moved(tile.base, tile.values[0])

    def _moved(self, base: Array, model: Array) -> Array:
        delta, most = model - base, base.dtype.type(self.shared["t"])
        return np.where(np.abs(delta) <= most, model, base + np.copysign(most, delta))

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert self.compat is not None
        assert base is not None
        dtype = self.compat.numpy
        return compat.nearswap(base.astype(dtype), models[0].astype(dtype), self.shared["t"]).astype(dtype)

    def idle_by(self, expert: Expert) -> str:
        return "t" if self.shared["t"] == 0 else ""

    def departures(self, subject: Subject) -> dict[str, bool]:
        small = 0 < (self.shared["t"] or 0) < 1e-6
        return {"t below 1e-6 holds for differences below 1e-6 too (mergekit: in part)": small}


# ---- ram ---------------------------------------------------------------------------------------------------


class _Ram(Method):
    """Changes of one model are kept whole; changes that several models make are averaged."""

    source = "mergekit 0.1.5, merge_methods/ram"
    takes: ClassVar[tuple[Parameter, ...]] = (EPSILON,)
    nanoseconds = 3.0

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        deltas = [model - base for model in models]
        changed = self._changed(subject, deltas)
        how_many = _total([each.astype(np.int32) for each in changed])
        counts = [[np.count_nonzero(each & (how_many == 1)), np.count_nonzero(each & (how_many > 1))]
                  for each in changed]  # fmt: skip
        return self._merged(base, deltas, changed, how_many, self._factors(np.array(counts)))

    @staticmethod
    def _changed(subject: Subject, deltas: Sequence[Array]) -> list[Array]:
        ends = [delta.dtype.type(e) for delta, e in zip(deltas, subject.column("epsilon"), strict=True)]
        return [np.abs(delta) > end for delta, end in zip(deltas, ends, strict=True)]

    def _factors(self, counts: Array) -> list[float]:
        """What each model's own changes are multiplied by; ``counts``: of own, of shared changes."""
        return [1.0] * len(counts)

    @staticmethod
    def _merged(
        base: Array, deltas: Sequence[Array], changed: Sequence[Array], how_many: Array,
        factors: Sequence[float],
    ) -> Array:  # fmt: skip
        real = base.dtype.type
        many = np.maximum(how_many, 1).astype(base.dtype)
        parts = [
            np.where(each, np.where(how_many == 1, delta * real(factor), delta / many), real(0))
            for delta, each, factor in zip(deltas, changed, factors, strict=True)
        ]
        return np.asarray(base + _total(parts))

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> list[float]:
        return self._factors(np.zeros((len(subject.experts), 2), np.int64))

    def apply(self, tile: Tile, facts: list[float], out: Array) -> None:
        assert tile.base is not None
        deltas = list(tile.values)
        changed = self._changed(tile.subject, deltas)
        how_many = _total([each.astype(np.int32) for each in changed])
        out[:] = self._merged(tile.base, deltas, changed, how_many, facts)

    def memory(self, experts: int, tile: int, elements: int) -> int:
        return super().memory(experts, tile, elements) + 4 * tile * (2 * experts + 6)


@register
class Ram(_Ram):
    """RAM: own changes whole, shared ones averaged."""

    name = "ram"
    formula = "base + the delta where one model changes an element, the mean of the changes where several do"


@register
class RamPlus(_Ram):
    """RAM+: own changes are enlarged by how much a model shares."""

    name = "ramplus_tl"
    formula = (
        "as ram, a model's own changes times 1 + r * min(alpha, its shared changes / its own changes in the "
        "tensor)"
    )
    takes = (EPSILON, R, ALPHA)

    def _factors(self, counts: Array) -> list[float]:
        own, shared = counts.astype(np.float64).T
        ratio = np.where(shared > 0, shared / np.where(own > 0, own, 1e-5), 0.0)
        return [float(x) for x in 1 + self.shared["r"] * np.clip(ratio, 0.0, self.shared["alpha"])]

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> list[float]:
        counts = np.zeros((len(subject.experts), 2), np.int64)
        for tile in passes():
            changed = self._changed(subject, list(tile.values))
            how_many = _total([each.astype(np.int32) for each in changed])
            for row, each in zip(counts, changed, strict=True):
                row += np.count_nonzero(each & (how_many == 1)), np.count_nonzero(each & (how_many > 1))
        return self._factors(counts)


# ---- arcee_fusion ------------------------------------------------------------------------------------------


def _divergence(base: Array, model: Array) -> Array:
    """KL(softmax(model) | softmax(base)) of each row, in float64."""
    p, q = (_softmax(values.astype(np.float64)) + 1e-8 for values in (model, base))
    return np.asarray((p * np.log(p / q)).sum(axis=-1))


def _softmax(rows: Array) -> Array:
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _quartiles(size: int) -> list[int]:
    """The positions, from the smallest, of the lower quartile, the median and the upper quartile."""
    return [int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]


def _threshold(quarter: float, median: float, three: float) -> float:
    return median + 1.5 * (three - quarter)


@register
class ArceeFusion(Method):
    """The changes of the other model that matter most: by size and by how much they change their row."""

    name, source = "arcee_fusion", "mergekit 0.1.5, merge_methods/arcee_fusion"
    formula = (
        "model where |delta| * KL of the row's softmax from the base's is at least the median + 1.5 times "
        "the distance of the quartiles over the tensor, else base"
    )
    of_deltas = False
    grain = Grain.ROW
    experts = (1, 1)
    nanoseconds = 40.0

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        if not base.size:
            return base
        (model,), n = models, base.shape[-1] if base.shape else 1
        rows, other = base.reshape(-1, n), model.reshape(-1, n)
        sizes = np.abs((other - rows).astype(np.float64)) * _divergence(rows, other)[:, None]
        ordered = np.sort(sizes, axis=None)
        chosen = sizes >= _threshold(*(float(ordered[k]) for k in _quartiles(base.size)))
        return np.where(chosen, other, rows).reshape(base.shape)

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> tuple[Array, float]:
        n = subject.shape[-1] if subject.shape else 1
        found: list[Array] = []
        for tile in passes():
            assert tile.base is not None
            found.append(_divergence(tile.base.reshape(-1, n), tile.values[0].reshape(-1, n)))
        divergence = np.concatenate(found)
        keys = [self._quantile(passes, divergence, n, k) for k in _quartiles(subject.size)]
        return divergence, _threshold(*keys)

    def _quantile(self, passes: Passes, divergence: Array, n: int, position: int) -> float:
        """The size at ``position`` from the smallest: its bits, sixteen by sixteen."""
        chosen, mask = 0, 0
        for shift in (48, 32, 16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for tile in passes():
                bits = self._sizes(tile, divergence, n).reshape(-1).view(np.uint64)
                inside = bits[(bits & np.uint64(mask)) == np.uint64(chosen)]
                counts += np.bincount(
                    ((inside >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16
                )
            digit = int(np.searchsorted(np.cumsum(counts), position, side="right"))
            position -= int(counts[:digit].sum())
            chosen |= digit << shift
            mask |= 0xFFFF << shift
        return float(np.uint64(chosen).view(np.float64))

    @staticmethod
    def _sizes(tile: Tile, divergence: Array, n: int) -> Array:
        assert tile.base is not None
        delta = (tile.values[0] - tile.base).reshape(-1, n).astype(np.float64)
        own = divergence[tile.start // n :][: len(delta)]
        return np.asarray(np.abs(np.abs(delta) * own[:, None]))

    def apply(self, tile: Tile, facts: tuple[Array, float], out: Array) -> None:
        assert tile.base is not None
        divergence, least = facts
        n = tile.subject.shape[-1] if tile.subject.shape else 1
        chosen = self._sizes(tile, divergence, n) >= least
        out[:] = np.where(chosen.reshape(out.shape), tile.values[0], tile.base)

    def memory(self, experts: int, tile: int, elements: int) -> int:
        return super().memory(experts, tile, elements) + 8 * tile * 8

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {
            "in float64, with the quartiles of the whole tensor (mergekit: in the merge dtype, of a million "
            "random elements where there are more)": True
        }
