"""Methods on directions and lengths: slerp and its kin, the mean on the sphere, model stock.

A tensor is one vector, or each of its rows is; the models' products with each other say all (products.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.dtypes import Array
from della.errors import Problem
from della.merging import compat
from della.merging.method import Parameter, register
from della.merging.options import WEIGHT
from della.merging.products import Along, Combination
from della.merging.tile import Expert, Subject

PARALLEL = 0.9995  # |cosine| from which slerp is a straight line
T = Parameter(
    "t", "shared", float, None, "how far from the base to the other model; 0 is the base", in_every_case=True
)
FLATTEN = Parameter(
    "nuslerp_flatten", "shared", bool, True, "one angle for the whole tensor instead of one for each row"
)
ROW_WISE = Parameter(
    "nuslerp_row_wise", "shared", bool, False,
    "with nuslerp_flatten: false, one angle for each vector along the first axis instead of the last",
)  # fmt: skip
NORMALIZE_WEIGHTS = Parameter(
    "normalize_weights", "shared", bool, True, "whether the weights are divided by their sum"
)
EPS = Parameter("eps", "shared", float, 1e-8, "what is added to lengths before they divide", (), 0.0)
MAX_ITER = Parameter("max_iter", "shared", int, 10, "the most steps towards the mean", (), 1)
TOL = Parameter("tol", "shared", float, 1e-5, "the step, in radians, that ends the search", (), 0.0)
FILTER_WISE = Parameter("filter_wise", "shared", bool, False, "one ratio for each row instead of the tensor")
LEAST_SUM = 1e-6  # of weights that are divided by their sum


def _directions(cosine: Array, t: float, straight: Array) -> tuple[Array, Array]:
    """The factors of two vectors at ``t`` of the arc between them; of the line where it is ``straight``."""
    angle = np.arccos(np.where(straight, 0.0, cosine))
    ends = (np.sin(share * angle) / np.sin(angle) for share in (1 - t, t))
    first, second = (np.where(straight, share, end) for share, end in zip((1 - t, t), ends, strict=True))
    return first, second


def _lengths(gram: Array) -> Array:
    """The length of each vector: (vectors, models)."""
    return np.asarray(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)))


def _no_mean(weights: Sequence[float]) -> Iterator[Problem]:
    if abs(sum(weights)) < LEAST_SUM:
        listed = ", ".join(f"{weight:g}" for weight in weights)
        said = f"the weights {listed} add up to {sum(weights):g}, so they have no mean"
        yield Problem(said, "give weights whose sum is not 0", parameter="weight")


@register
class Slerp(Combination):
    """Spherical linear interpolation from the base to one other model."""

    name, source = "slerp", "Shoemake, SIGGRAPH 1985"
    formula = (
        "sin((1 - t) angle) / sin(angle) * base + sin(t angle) / sin(angle) * model; on a line where they "
        "are nearly parallel"
    )
    takes = (T,)
    of_deltas = False
    experts = (1, 1)
    is_wide_in_mergekit = True
    nanoseconds = 1.5

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        if shared.get("t") is None:
            yield Problem("slerp needs t", "write 't: 0.5' in parameters for the middle", parameter="t")

    def factors(self, subject: Subject, gram: Array) -> Array:
        lengths = _lengths(gram)
        base, model = np.where(lengths > 1e-8, lengths, 1.0).T
        cosine = np.clip(gram[:, 0, 1] / (base * model), -1.0, 1.0)
        return np.stack(_directions(cosine, self.shared["t"], np.abs(cosine) > PARALLEL), axis=-1)

    def idle_by(self, expert: Expert) -> str:
        return "t" if self.shared["t"] == 0 else ""


@register
class Nuslerp(Combination):
    """Slerp of two models by their weights; of their deltas where there is a base."""

    name, source = "nuslerp", "mergekit 0.1.5, merge_methods/nuslerp"
    formula = (
        "the point at t = weight of the second / the sum of the weights on the arc between the two models; "
        "with a base, of their deltas, added to it"
    )
    takes = (WEIGHT, FLATTEN, ROW_WISE)
    needs_base = of_deltas = False
    experts = (2, 2)
    nanoseconds = 1.0

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        if models:
            yield from _no_mean([cls.expert(identity, own)["weight"] for identity, own in models.items()])

    def axis(self) -> Along:
        if self.shared["nuslerp_flatten"]:
            return Along.TENSOR
        return Along.FIRST if self.shared["nuslerp_row_wise"] else Along.LAST

    def factors(self, subject: Subject, gram: Array) -> Array:
        first, second = subject.column("weight")
        lengths = np.maximum(_lengths(gram), 1e-7)
        cosine = np.clip(gram[:, 0, 1] / (lengths[:, 0] * lengths[:, 1]), -1.0, 1.0)
        straight = 1 - cosine.astype(np.float32) ** 2 <= 1e-16
        return np.stack(_directions(cosine, second / (first + second), straight), axis=-1)


class _NuslerpOfDeltas(Nuslerp):
    needs_base = of_deltas = True
    remark = (
        "of a tensor that only one of the two has changed, nuslerp takes sin(t * 90 degrees) of the change"
    )


Nuslerp.with_base = _NuslerpOfDeltas


@register
class Multislerp(Combination):
    """The directions of any number of models, averaged, with the mean of their lengths."""

    name, source = "multislerp", "mergekit 0.1.5, merge_methods/multislerp"
    formula = (
        "the direction of the sum of weight * model / its length, moved by the mean of what is left, times "
        "the sum of weight * length; with a base, of deltas, added to it"
    )
    takes = (WEIGHT, NORMALIZE_WEIGHTS, EPS)
    needs_base = of_deltas = False
    nanoseconds = 1.0

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        if models and cls(shared).shared["normalize_weights"]:
            yield from _no_mean([cls.expert(identity, own)["weight"] for identity, own in models.items()])

    @property
    def is_mean(self) -> bool:
        return bool(self.shared["normalize_weights"])

    def factors(self, subject: Subject, gram: Array) -> Array:
        weights = np.array(subject.column("weight"))
        if len(weights) == 1:
            return np.ones((1, 1))
        if self.shared["normalize_weights"]:
            weights = weights / weights.sum()
        (products,), (lengths,) = gram, _lengths(gram)
        eps = self.shared["eps"]
        unit = weights / np.where(lengths + eps > 0, lengths + eps, 1.0)
        size = math.sqrt(max(unit @ products @ unit, 0.0))
        if size <= eps:  # directions that cancel, or nothing but zeros
            return weights[None]
        mean = unit / size
        rest = unit - (unit @ products @ mean) * mean
        angle = math.sqrt(max(rest @ products @ rest, 0.0)) + eps
        turn = math.sin(angle) / angle if angle else 1.0
        return np.asarray((mean * math.cos(angle) + rest * turn) * (lengths @ weights))[None]

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {
            "three or more models whose directions cancel, or that change nothing, give their weighted mean "
            "(mergekit: stops)": len(subject.experts) > 2
        }


class _MultislerpOfDeltas(Multislerp):
    needs_base = of_deltas = True
    remark = (
        "a model that changes nothing in a tensor counts in the length: of two, half of the other's change"
    )


Multislerp.with_base = _MultislerpOfDeltas


@register
class Karcher(Combination):
    """The mean of the models' directions on the sphere, by gradient steps, with the mean of their lengths."""

    name, source = "karcher", "Karcher, Comm. Pure Appl. Math. 30 (1977), 509-541"
    formula = (
        "the point of the sphere with the least sum of squared angles to the models, times the mean length"
    )
    takes = (MAX_ITER, TOL)
    needs_base = of_deltas = False
    nanoseconds = 1.0

    def factors(self, subject: Subject, gram: Array) -> Array:
        (products,), (lengths,) = gram, _lengths(gram)
        if len(lengths) == 1:
            return np.ones((1, 1))
        found, there = np.zeros(len(lengths)), lengths > 0
        if there.any():
            inverse = 1 / lengths[there]
            cosines = products[np.ix_(there, there)] * inverse[:, None] * inverse
            found[there] = self._mean(cosines) * inverse * lengths.mean()
        return found[None]

    def _mean(self, cosines: Array) -> Array:
        """The mean of unit vectors, as factors of them."""
        count, tol = len(cosines), self.shared["tol"]
        point = np.full(count, 1 / count)
        size = math.sqrt(max(point @ cosines @ point, 0.0))
        point = point / size if size >= tol and size > 0 else np.eye(count)[0]
        for _ in range(int(self.shared["max_iter"])):
            near = np.clip(cosines @ point, -1.0, 1.0)
            angles = np.arccos(near)
            moves = angles >= max(tol, 1e-12)
            pull = np.where(moves, angles / np.where(moves, np.sin(angles), 1.0), 0.0) / count
            step = pull - (pull @ near) * point
            size = math.sqrt(max(float(step @ cosines @ step), 0.0))
            if size < tol or size == 0:
                break
            point = math.cos(size) * point + math.sin(size) / size * step
            point = point / math.sqrt(point @ cosines @ point)
        return point

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert self.compat is not None
        dtype = self.compat.numpy
        found = compat.karcher(
            [m.astype(dtype) for m in models], int(self.shared["max_iter"]), self.shared["tol"]
        )
        return found.astype(dtype)

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {
            f"every direction counts, however short (mergekit: none of a length up to "
            f"{self.shared['tol']:g}), and opposite ones start at the first by name (mergekit: listed)": True
        }


@register
class ModelStock(Combination):
    """The point between base and mean of the fine-tunes that the angle between them suggests."""

    name, source = "model_stock", "arXiv 2403.19522, section 3"
    formula = (
        "base + t * the mean of the deltas, t = n cos / (1 + (n - 1) cos), cos the mean cosine of each two "
        "of the n deltas"
    )
    takes = (FILTER_WISE,)
    experts = (2, None)
    remark = "of a tensor that only one model has changed, model_stock takes nothing: the cosines are 0"
    nanoseconds = 1.2

    def axis(self) -> Along:
        return Along.LAST if self.shared["filter_wise"] else Along.TENSOR

    def factors(self, subject: Subject, gram: Array) -> Array:
        n, lengths = gram.shape[-1], _lengths(gram)
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        sizes = [lengths[:, i] * lengths[:, j] for i, j in pairs]
        cosines = [
            np.clip(gram[:, i, j] / np.where(size > 0, size, 1.0), -1.0, 1.0)
            for (i, j), size in zip(pairs, sizes, strict=True)
        ]
        mean = sum(cosines) / len(pairs)
        below = 1 + (n - 1) * mean
        ratio = np.where(np.abs(below) < 1e-6, 0.0, n * mean / np.where(np.abs(below) < 1e-6, 1.0, below))
        return np.repeat(ratio[:, None] / n, n, axis=1)

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert self.compat is not None
        assert base is not None
        dtype = self.compat.numpy
        made = compat.model_stock(
            base.astype(dtype), [m.astype(dtype) for m in models], self.shared["filter_wise"]
        )
        return made.astype(dtype)

    def departures(self, subject: Subject) -> dict[str, bool]:
        return {"small deltas have their true cosine (mergekit: divided by at least 1e-6)": True}
