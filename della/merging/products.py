"""Methods that know all they need of the models by their products with each other: the result is a sum of
the models, each times a number (`Combination`).

So two passes are enough for angles, means on a sphere and ratios of norms: one for the products (float64, in
a fixed order), one for the sum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from della.dtypes import Array
from della.merging.method import Method
from della.merging.reference import ordered_sum
from della.merging.tile import Grain, Passes, Subject, Tile

_BLOCK = 1 << 16  # elements that stay in the cache while all pairs of models are multiplied


class Along(Enum):
    """What is one vector: the whole tensor, each vector along the last axis, or each along the first."""

    TENSOR = 0
    LAST = 1
    FIRST = 2

    def of(self, shape: Sequence[int]) -> Along:
        """The same for a tensor of this shape: a scalar or a vector is one vector either way."""
        return self if len(shape) > 1 else Along.TENSOR

    def vectors(self, values: Array) -> Array:
        """A tensor as (vectors, elements)."""
        if self is Along.LAST:
            return values.reshape(-1, values.shape[-1]) if values.size else values.reshape(0, 1)
        if self is Along.FIRST:
            return values.reshape(values.shape[0], -1).T if values.size else values.reshape(0, 1)
        return values.reshape(1, -1)


def dot(x: Array, y: Array) -> float:
    """The product of two vectors (flat) in float64: eight lanes, each of every eighth element from left to
    right, then the lanes in their order.

    >>> dot(np.float32([1, 2]), np.float32([3, 4]))
    11.0
    """
    lanes = np.zeros((-(-x.size // 8), 8))
    lanes.reshape(-1)[: x.size] = x.astype(np.float64) * y.astype(np.float64)
    return ordered_sum(np.cumsum(lanes, axis=0)[-1]) if x.size else 0.0


def gram(vectors: Sequence[Array], along: Along) -> Array:
    """The products of tensors of one shape with each other: float64 (vectors, tensors, tensors)."""
    split = [along.vectors(each) for each in vectors]
    found = np.zeros((split[0].shape[0], len(split), len(split)))
    for s in range(len(split)):
        for t in range(s + 1):
            if along is Along.FIRST:
                pairs = split[s].astype(np.float64) * split[t].astype(np.float64)
                sums = np.cumsum(pairs, axis=1)[:, -1] if pairs.size else np.zeros(0)
            else:
                sums = np.array([dot(x, y) for x, y in zip(split[s], split[t], strict=True)])
            found[:, s, t] = found[:, t, s] = sums
    return found


class Combination(Method):
    """[base +] the sum of factor * model; the factors follow from products.

    A class gives `factors`; with ``of_deltas = False`` and a base, the base is the first of the vectors.
    """

    is_in_mergekit: ClassVar[bool] = True
    along: Along = Along.TENSOR

    @abstractmethod
    def factors(self, subject: Subject, gram: Array) -> Array:
        """What each vector is multiplied by.

        Args:
            subject: The tensor.
            gram: The products, float64 (vectors, models, models).

        Returns:
            float64 (vectors, models).
        """

    def __init__(self, shared: Any = None, compat: Any = None) -> None:
        super().__init__(shared, compat)
        self.along = self.axis()
        self.grain = Grain.ELEMENT if self.along is Along.TENSOR else Grain.ROW

    def axis(self) -> Along:
        """What is one vector with these settings."""
        return Along.TENSOR

    @property
    def is_mean(self) -> bool:
        """Whether vectors that are all the same give that vector."""
        return True

    def _factors(self, subject: Subject, gram: Array) -> Array:
        """`factors`; of vectors that are all the same the first, so that what no model changed stays as it
        is to the last bit."""
        found = self.factors(subject, gram)
        same = (gram == gram[:, :1, :1]).all(axis=(1, 2)) & self.is_mean
        first = np.arange(found.shape[1]) == 0
        return np.where(same[:, None], first, found)

    @property
    def _has_base_vector(self) -> bool:
        return self.needs_base and not self.of_deltas

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        vectors = list(models)
        if base is not None and self.needs_base:
            vectors = [model - base for model in models] if self.of_deltas else [base, *models]
        along = self.along.of(subject.shape)
        factors = self._factors(subject, gram(vectors, along))
        total = np.zeros_like(vectors[0])
        for column, values in zip(factors.T, vectors, strict=True):
            total = total + self._spread(along, column.astype(total.dtype), total.shape) * values
        return np.asarray(base + total if base is not None and self.of_deltas else total)

    @staticmethod
    def _spread(along: Along, column: Array, shape: tuple[int, ...]) -> Array:
        """The factor of each vector, in a shape that fits the tensor's."""
        if along is Along.TENSOR or not np.prod(shape):
            return column[:1].reshape(()) if column.size else np.zeros((), column.dtype)
        return column.reshape((*shape[:-1], 1) if along is Along.LAST else (1, *shape[1:]))

    # ---- tiles ----

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> Array:
        along, count = self.along.of(subject.shape), len(subject.experts) + self._has_base_vector
        if along is Along.TENSOR:
            found = _of_tensor(passes, count)
        elif along is Along.LAST:
            found = _of_rows(passes, count, subject.shape[-1])
        else:
            found = _of_columns(passes, count, subject.size // subject.shape[0])
        return self._factors(subject, found).astype(np.float32)

    def apply(self, tile: Tile, facts: Array, out: Array) -> None:
        from della.merging.kernels import cast, dots

        along, flat = self.along.of(tile.subject.shape), out.reshape(-1)
        out.fill(0)
        for factors, values in zip(facts.T, _vectors(tile, facts.shape[1]), strict=True):
            if along is Along.TENSOR:
                cast.accumulate(flat, factors[0], values)
            elif along is Along.LAST:
                n = tile.subject.shape[-1]
                own = np.ascontiguousarray(factors[tile.start // n :][: flat.size // n])
                dots.accumulate_rows(flat.reshape(-1, n), own, values.reshape(-1, n))
            else:
                dots.accumulate_columns(flat, np.ascontiguousarray(factors), tile.start, values)
        if self.of_deltas and tile.base is not None:
            out += tile.base


def _vectors(tile: Tile, count: int) -> list[Array]:
    """What of a tile is multiplied, flat: the values of each model, and before them the base's where it is
    one more."""
    found = [values.reshape(-1) for values in tile.values]
    if count > len(found):
        assert tile.base is not None
        found.insert(0, tile.base.reshape(-1))
    return found


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(s, t) for s in range(count) for t in range(s + 1)]


def _of_tensor(passes: Passes, count: int) -> Array:
    from della.merging.kernels import dots

    lanes = np.zeros((count, count, 8))
    for tile in passes():
        vectors = _vectors(tile, count)
        for begin in range(0, vectors[0].size, _BLOCK):
            at = slice(begin, begin + _BLOCK)
            for s, t in _pairs(count):
                dots.add_products(vectors[s][at], vectors[t][at], tile.start + begin, lanes[s, t])
    return _mirrored(np.cumsum(lanes, axis=-1)[None, ..., -1])


def _of_rows(passes: Passes, count: int, n: int) -> Array:
    from della.merging.kernels import dots

    found: list[Array] = []
    for tile in passes():
        vectors = [values.reshape(-1, n) for values in _vectors(tile, count)]
        sums = np.zeros((count, count, vectors[0].shape[0]))
        for s, t in _pairs(count):
            dots.products_of_rows(vectors[s], vectors[t], sums[s, t])
        found.append(np.moveaxis(sums, -1, 0))
    return _mirrored(np.concatenate(found))


def _of_columns(passes: Passes, count: int, inner: int) -> Array:
    from della.merging.kernels import dots

    sums = np.zeros((count, count, inner))
    for tile in passes():
        vectors = _vectors(tile, count)
        for s, t in _pairs(count):
            dots.add_columns(vectors[s], vectors[t], tile.start, sums[s, t])
    return _mirrored(np.moveaxis(sums, -1, 0))


def _mirrored(half: Array) -> Array:
    """The products of all pairs, from those with s >= t."""
    return np.asarray(np.tril(half) + np.swapaxes(np.tril(half, -1), -1, -2))
