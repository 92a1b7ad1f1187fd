"""The options of methods that work on deltas, each declared once: the parameter, and what its values mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from della.merging.method import Parameter

WEIGHT = Parameter("weight", "model", float, 1.0, "how much of this expert", in_every_case=True)
DENSITY = Parameter("density", "model", float, 1.0, "share of the deltas that is kept, 1 - p", (), 0.0, 1.0)
LAMBDA = Parameter("lambda", "shared", float, 1.0, "factor on the merged delta")


# ---- Elect -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """How the sign is elected: what an expert's delta' is multiplied by; does its sign alone count."""

    of_weight: Callable[[Any], Any]
    by_count: bool = False


VOTES: dict[str, Vote | None] = {
    "weighted": Vote(lambda weight: weight),
    "unweighted": Vote(np.sign),
    "count": Vote(lambda weight: weight, by_count=True),
    "none": None,
}
VOTE = Parameter(
    "vote", "shared", str, "weighted",
    "how the sign is elected: by the sum of weight * delta, of the deltas, of their signs, or not at all",
    tuple(VOTES), mergekit=("weighted", "count", "none"),
)  # fmt: skip


# ---- Fuse --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fuse:
    """How the agreeing deltas are combined: their mean or sum; the mean without what Elect inflates."""

    mean: bool
    calibrated: bool = False


FUSES = {"mean": Fuse(True), "sum": Fuse(False), "calibrated": Fuse(True, calibrated=True)}
FUSE = Parameter(
    "fuse", "shared", str, "mean",
    "how the agreeing deltas are combined; calibrated: the mean without the inflation that Elect causes",
    tuple(FUSES), mergekit=("mean", "sum"),
)  # fmt: skip
NORMALIZE = Parameter("normalize", "shared", bool, None, "true: fuse: mean; false: fuse: sum")


def fuse_of(fuse: str, normalize: bool | None) -> str:
    """The value of ``fuse`` once ``normalize`` has its say.

    >>> fuse_of("mean", False), fuse_of("calibrated", True), fuse_of("sum", None)
    ('sum', 'calibrated', 'sum')
    """
    if normalize is None:
        return fuse
    return (fuse if FUSES[fuse].mean else "mean") if normalize else "sum"


@dataclass(frozen=True)
class Scaling:
    """The paper's adaptive scaling (figure 5), a factor for each expert: nonzero over elected deltas per row
    or tensor, or the inverse."""

    by_row: bool
    inverse: bool = False


SCALINGS: dict[str, Scaling | None] = {
    "constant": None,
    "row": Scaling(by_row=True),
    "row_inverse": Scaling(by_row=True, inverse=True),
    "tensor": Scaling(by_row=False),
}
LAMBDA_SCALING = Parameter(
    "lambda_scaling", "shared", str, "constant",
    "instead of lambda, each expert's nonzero over its elected deltas, of the row or tensor, or the inverse",
    tuple(SCALINGS), mergekit=("constant",),
)  # fmt: skip


# ---- Drop --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rescale:
    """How survivors are enlarged: each by its own keep probability, or all of a tensor by one factor."""

    per_element: bool = False
    l1: bool = False


RESCALES = {"per_element": Rescale(per_element=True), "none": Rescale(), "l1": Rescale(l1=True)}
RESCALE = Parameter(
    "rescale", "shared", (str, bool), None,
    "how survivors are enlarged: by 1 / their keep probability, not, or by one factor that keeps the L1 norm;"
    " true: as this kind of Drop can, false: none",
    tuple(RESCALES),
)  # fmt: skip

IMPORTANCES = {"magnitude": False, "wanda": True}  # whether input norms are asked for
IMPORTANCE = Parameter(
    "importance", "shared", str, "magnitude",
    "what is ranked: |delta|, or that times the norm of the input it meets (input_norms)",
    tuple(IMPORTANCES), mergekit=("magnitude",),
)  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """What the largest deltas are chosen from: a tensor, a row, or the whole model."""

    by_row: bool = False
    of_model: bool = False


SCOPES = {"tensor": Scope(), "row": Scope(by_row=True), "model": Scope(of_model=True)}
SCOPE = Parameter(
    "scope", "shared", str, "tensor", "what the largest deltas are chosen from", tuple(SCOPES),
    mergekit=("tensor",),
)  # fmt: skip
