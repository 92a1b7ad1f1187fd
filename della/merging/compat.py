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
import numpy.typing as npt

from della.dtypes import widen
from della.merging.methods import Choice, Expert
from della.random import stream_key, uniforms

Array = npt.NDArray[Any]


def merge(
    choice: Choice, base: Array, models: Sequence[Array], experts: Sequence[Expert], seed: int, name: str
) -> Array:
    """One merged tensor, in ``choice.compat``, from arithmetic values of one shape; experts in canonical
    order.
    """
    assert choice.compat is not None
    dtype = choice.compat.numpy
    if choice.drop == "average":
        return _average([widen(m.astype(dtype)) for m in models], experts, choice.fuse != "sum").astype(dtype)
    base = base.astype(dtype)
    weights = np.array([e.weight for e in experts]).astype(dtype)
    weights = weights.reshape(-1, *(1 for _ in base.shape))
    parts = [
        _drop(choice, e, m.astype(dtype) - base, seed, name) for e, m in zip(experts, models, strict=True)
    ]
    deltas = np.stack(parts) * weights
    if choice.vote == "none":
        mixed, divisor = _sum(deltas), np.broadcast_to(_sum(weights), base.shape).copy()
        divisor[np.abs(divisor) < 1e-8] = 1
    else:
        votes = np.sign(deltas) if choice.vote == "count" else deltas
        agrees = np.sign(deltas) == np.where(_sum(votes) >= 0, 1, -1).astype(dtype)
        mixed, divisor = _sum(np.where(agrees, deltas, 0)), _sum(np.where(agrees, weights, 0))
        divisor[divisor == 0] = 1
    if choice.fuse != "sum":
        mixed = mixed / divisor
    if choice.lambda_ != 1:
        mixed = _times(mixed, choice.lambda_)
    return np.asarray(base + mixed)


def _average(models: Sequence[Array], experts: Sequence[Expert], normalize: bool) -> Array:
    """reference.average as torch computes it: each product is added before it is rounded (fma)."""
    real = models[0].dtype.type
    weights = [real(e.weight) for e in experts]
    total = np.zeros_like(models[0])
    for w, values in zip(weights, models, strict=True):
        total = (total.astype(np.float64) + np.float64(w) * values.astype(np.float64)).astype(real)
    return np.asarray(total / sum(weights, real(0)) if normalize else total)


def _times(values: Array, factor: float) -> Array:
    """By a Python number, which torch does not round to the dtype first."""
    wide = np.float64 if values.dtype == np.float64 else np.float32
    return np.asarray((values.astype(wide) * wide(factor)).astype(values.dtype))


def _sum(values: Array) -> Array:
    """Over experts, added in float32 and rounded once, as torch does for 16-bit types on a CPU."""
    wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    return np.asarray(wide.sum(axis=0)).astype(values.dtype)


def _drop(choice: Choice, expert: Expert, delta: Array, seed: int, name: str) -> Array:
    if choice.drop == "none" or expert.density >= 1:
        return delta
    if expert.density <= 0 or delta.size == 0:
        return np.zeros_like(delta)
    if choice.drop in ("top", "band"):
        kept = np.where(_by_size(choice, expert, delta), delta, np.zeros_like(delta))
    else:
        u = uniforms(stream_key(seed, expert.identity, name), 0, delta.size).reshape(delta.shape)
        q = (
            _probabilities(expert, delta)
            if choice.drop == "magprune"
            else np.asarray(expert.density, delta.dtype)
        )
        kept = np.where(u < q.astype(np.float32), delta, np.zeros_like(delta))
    return kept if choice.rescale == "none" else _rescale(delta, kept)


def _probabilities(expert: Expert, delta: Array) -> Array:
    """mergekit's ranks, 1 .. n along axis 1, in the dtype of the tensor (float32 for float16)."""
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    real = np.dtype(np.float32) if delta.dtype == np.float16 else delta.dtype
    order = np.argsort(np.abs(rows).astype(np.float64), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable").astype(real) + real.type(1)
    low, high = ranks.min(axis=1, keepdims=True), ranks.max(axis=1, keepdims=True)
    spread = np.where(high > low, high - low, real.type(1))
    norm = np.clip((ranks - low) / spread, real.type(0), real.type(1))
    q = real.type(expert.density - expert.epsilon) + norm * real.type(2) * real.type(expert.epsilon)
    return np.asarray(q).reshape(delta.shape)


def _by_size(choice: Choice, expert: Expert, delta: Array) -> Array:
    size, target = delta.size, int(expert.density * delta.size)
    order = np.argsort(np.abs(delta).ravel().astype(np.float64), kind="stable")
    if choice.drop == "top":
        kept = order[size - max(1, target) :]
    else:
        first = max(0, size - target - int(expert.gamma * size))
        kept = order[first : first + target]
    mask = np.zeros(size, bool)
    mask[kept] = True
    return mask.reshape(delta.shape)


def _rescale(delta: Array, kept: Array) -> Array:
    """One factor per tensor: sum |delta| / sum |m delta|, each rounded to the dtype."""
    before, after = (_sum(np.abs(x).reshape(-1)) for x in (delta, kept))
    if before < 1e-7 or after < 1e-7:
        return kept
    return np.asarray(kept * (before / after))
