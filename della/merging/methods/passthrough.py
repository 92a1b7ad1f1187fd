"""One model as it is, or scaled: for models that are made of layers of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from della.dtypes import Array
from della.errors import Problem
from della.merging.method import Method, Parameter, register
from della.merging.tile import Expert, Subject, Tile

SCALE = Parameter("scale", "model", float, None, "factor on the tensor; without one it is copied")


@register
class Passthrough(Method):
    """A tensor of one model: copied byte for byte, or multiplied."""

    name, source = "passthrough", "mergekit 0.1.5 (frankenmerges)"
    formula = "the one model itself, byte for byte, or scale * model"
    takes = (SCALE,)
    needs_base = of_deltas = False
    one_by_one = True
    is_wide_in_mergekit = True
    nanoseconds = 0.2

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        if len(models) != 1:
            said = f"passthrough takes the tensors of one model, found {len(models)}: {', '.join(models)}"
            yield Problem(said, "give each model a slice of its own, or use merge_method: linear")

    def copies(self, experts: Sequence[Expert]) -> bool:
        return experts[0].values["scale"] in (None, 1.0)

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        (scale,) = subject.column("scale")
        return models[0] if scale is None else np.asarray(models[0] * models[0].dtype.type(scale))

    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        (scale,) = tile.subject.column("scale")
        for values in tile.each:
            np.multiply(values, np.float32(1 if scale is None else scale), out=out)
