"""The mean of the models themselves, without a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.dtypes import Array, widen
from della.errors import Problem
from della.merging import compat, reference
from della.merging.method import Method, register
from della.merging.options import NORMALIZE, WEIGHT
from della.merging.tile import Expert, Subject, Tile

LEAST_SUM = 0.1  # of the weights, as a share of their sizes: a mean that enlarges everything tenfold is none


@register
class Linear(Method):
    """The weighted mean of the models (model soups)."""

    name, source = "linear", "arXiv 2203.05482, section 2"
    formula = "sum of weight * model, divided by the sum of the weights if normalize is true"
    takes = (WEIGHT, NORMALIZE)
    defaults = {"normalize": True}  # noqa: RUF012
    needs_base = of_deltas = False
    one_by_one = True
    is_wide_in_mergekit = True
    nanoseconds = 0.6

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        weights = [cls.expert(identity, own)["weight"] for identity, own in models.items()]
        total, size = sum(weights), sum(map(abs, weights))
        if models and cls(shared).shared["normalize"] and abs(total) <= LEAST_SUM * size:
            listed = ", ".join(f"{weight:g}" for weight in weights)
            said = f"the weights {listed} add up to {total:g}, so they have no mean"
            if abs(total) > 1e-8:
                said = (
                    f"the weights {listed} nearly cancel: their mean is {1 / abs(total):.3g} times their sum"
                )
            yield Problem(said, "use normalize: false", parameter="weight")

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        return reference.average(models, subject.column("weight"), self.shared["normalize"])

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert self.compat is not None
        dtype = self.compat.numpy
        wide = [widen(values.astype(dtype)) for values in models]
        return compat.average(wide, subject.column("weight"), self.shared["normalize"]).astype(dtype)

    def idle_by(self, expert: Expert) -> str:
        return "weight" if expert["weight"] == 0 else ""

    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        from della.merging.kernels import cast

        weights = [np.float32(w) for w in tile.subject.column("weight")]
        out.fill(0)
        for weight, values in zip(weights, tile.each, strict=True):
            cast.accumulate(out.reshape(-1), weight, values.reshape(-1))
        if self.shared["normalize"]:
            np.divide(out, sum(weights, np.float32(0)), out=out)
