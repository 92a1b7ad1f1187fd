"""DARE's Drop: each delta is kept with the same probability."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from della.dtypes import Array
from della.merging import reference
from della.merging.drops.drop import Drop
from della.merging.method import Parameter
from della.merging.options import DENSITY, RESCALE
from della.merging.random import systematic_shift, uniforms
from della.merging.tile import Subject, Tile

Stream = tuple[int, int]  # key and rotation of the uniforms of one expert


def _independent(subject: Subject, t: int) -> Stream:
    return subject.key(t), 0


def _systematic(subject: Subject, t: int) -> Stream:
    """One uniform for all, rotated by each expert's canonical position."""
    return subject.key(None), systematic_shift(t, len(subject.experts))


COUPLINGS: dict[str, Callable[[Subject, int], Stream]] = {
    "independent": _independent,
    "systematic": _systematic,
}
COUPLING = Parameter(
    "coupling", "shared", str, "independent",
    "how the experts' draws depend on each other; systematic: they keep different elements if they can",
    tuple(COUPLINGS), mergekit=("independent",),
)  # fmt: skip


class Bernoulli(Drop):
    """Keep each delta with probability `density`, and divide by it (arXiv 2311.03099, equation 2)."""

    words = "delta / density with probability density, else 0"
    parameters: ClassVar[tuple[Parameter, ...]] = (DENSITY, RESCALE, COUPLING)
    nanoseconds = 1.2
    has_probabilities = True
    own_rescale = "per_element"

    def __init__(self, shared: Mapping[str, Any]) -> None:
        super().__init__(shared)
        self.stream = COUPLINGS[shared["coupling"]]

    def probabilities(self, subject: Subject, t: int, delta: Array) -> Array:
        """q of expert ``t`` for a tensor given as (rows, n): float32, of its shape."""
        return np.full(delta.shape, subject.experts[t]["density"], np.float32)

    def kept(self, subject: Subject, t: int, delta: Array) -> tuple[Array, Array]:
        q = self.probabilities(subject, t, delta)
        key, shift = self.stream(subject, t)
        u = uniforms(key, 0, delta.size, shift).reshape(delta.shape)
        return reference.sample(delta, q, u, self.rescale.per_element), q

    def kept_by_mergekit(self, subject: Subject, t: int, delta: Array) -> Array:
        u = uniforms(subject.key(t), 0, delta.size).reshape(delta.shape)
        return np.asarray(u < self.mergekit_probabilities(subject, t, delta).astype(np.float32))

    def mergekit_probabilities(self, subject: Subject, t: int, delta: Array) -> Array:
        return np.asarray(subject.experts[t]["density"], delta.dtype)

    def apply(self, tile: Tile, t: int, delta: Array, facts: Any, q: Array | None) -> None:
        from della.merging.kernels import drop as kernels

        density = np.float32(tile.subject.experts[t]["density"])
        if q is not None:
            q.fill(density)
        if density == 0:
            delta.fill(0)
        elif density < 1:
            even = np.full((1, delta.shape[1]), density, np.float32)
            key, shift = self.stream(tile.subject, t)
            kernels.drop_given(delta, even, np.uint64(key), shift, tile.start, self.rescale.per_element)

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {
            "rescale: each survivor is divided by its keep probability (mergekit: one l1 factor, biased)": (
                self.rescale.per_element and self.draws(subject)
            )
        }
