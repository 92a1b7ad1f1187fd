"""``compat: mergekit``: the rules of mergekit 0.1.5 in plain NumPy, for those who need to repeat an old
merge.

Every operation rounds to the merge dtype (of linear, only inputs and result), ranks live in that dtype with
ties broken by position, survivors share one l1 factor per tensor, and a tied vote is positive.  Only the
draws are ours: mergekit's come from an unseeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from della.dtypes import Array
from della.merging.options import Vote


def combined(
    base: Array, parts: Sequence[Array], weights: Sequence[float], vote: Vote | None, mean: bool,
    lambda_: float,
) -> Array:  # fmt: skip
    """Elect and Fuse of what the experts' Drops have left (``parts``), in the type of ``base``."""
    factors = np.array(weights).astype(base.dtype).reshape(-1, *(1 for _ in base.shape))
    deltas = np.stack(parts) * factors
    if vote is None:
        mixed, divisor = _sum(deltas), np.broadcast_to(_sum(factors), base.shape).copy()
        divisor[np.abs(divisor) < 1e-8] = 1
    else:
        votes = np.sign(deltas) if vote.by_count else deltas
        agrees = np.sign(deltas) == np.where(_sum(votes) >= 0, 1, -1).astype(base.dtype)
        mixed, divisor = _sum(np.where(agrees, deltas, 0)), _sum(np.where(agrees, factors, 0))
        divisor[divisor == 0] = 1
    if mean:
        mixed = mixed / divisor
    if lambda_ != 1:
        mixed = _times(mixed, lambda_)
    return np.asarray(base + mixed)


def average(models: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """reference.average as torch computes it: each product is added before it is rounded (fma)."""
    real = models[0].dtype.type
    factors = [real(w) for w in weights]
    total = np.zeros_like(models[0])
    for w, values in zip(factors, models, strict=True):
        total = (total.astype(np.float64) + np.float64(w) * values.astype(np.float64)).astype(real)
    return np.asarray(total / sum(factors, real(0)) if normalize else total)


def _times(values: Array, factor: float) -> Array:
    """By a Python number, which torch does not round to the dtype first."""
    wide: Any = np.float64 if values.dtype == np.float64 else np.float32
    return np.asarray((values.astype(wide) * wide(factor)).astype(values.dtype))


def _sum(values: Array) -> Array:
    """Over experts, added in float32 and rounded once, as torch does for 16-bit types on a CPU."""
    wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    return np.asarray(wide.sum(axis=0)).astype(values.dtype)


def probabilities(density: float, epsilon: float, delta: Array) -> Array:
    """mergekit's ladder: ranks, 1 .. n along axis 1, in the dtype of the tensor (float32 for float16)."""
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    real = np.dtype(np.float32) if delta.dtype == np.float16 else delta.dtype
    order = np.argsort(np.abs(rows).astype(np.float64), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable").astype(real) + real.type(1)
    low, high = ranks.min(axis=1, keepdims=True), ranks.max(axis=1, keepdims=True)
    spread = np.where(high > low, high - low, real.type(1))
    norm = np.clip((ranks - low) / spread, real.type(0), real.type(1))
    q = real.type(density - epsilon) + norm * real.type(2) * real.type(epsilon)
    return np.asarray(q).reshape(delta.shape)


def rescaled(delta: Array, kept: Array) -> Array:
    """One factor per tensor: sum |delta| / sum |m delta|, each rounded to the dtype."""
    before, after = (_sum(np.abs(x).reshape(-1)) for x in (delta, kept))
    if before < 1e-7 or after < 1e-7:
        return kept
    return np.asarray(kept * (before / after))
