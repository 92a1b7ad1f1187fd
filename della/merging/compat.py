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


# ---- methods on directions, and on what the models do at an element ----------------------------------------


def karcher(models: Sequence[Array], max_iter: int, tol: float) -> Array:
    """The mean on the sphere, without the directions of vectors whose length is at most ``tol``."""
    flat = [model.astype(np.float64).reshape(-1) for model in models]
    lengths = [float(np.linalg.norm(values)) for values in flat]
    unit = [values / size for values, size in zip(flat, lengths, strict=True) if size > tol]
    if len(models) == 1 or not unit:
        return models[0] if len(models) == 1 else np.zeros_like(models[0])
    point = sum(unit[1:], unit[0]) / len(unit)
    size = float(np.linalg.norm(point))
    point = unit[0] if size < tol else point / size
    for _ in range(max_iter):
        step = np.zeros_like(point)
        for values in unit:
            cosine = min(max(float(point @ values), -1.0), 1.0)
            angle = float(np.arccos(cosine))
            if angle >= tol:
                step = step + angle / np.sin(angle) / len(unit) * (values - cosine * point)
        size = float(np.linalg.norm(step))
        if size < tol:
            break
        point = np.cos(size) * point + np.sin(size) / size * step
        point = point / np.linalg.norm(point)
    return np.asarray(sum(lengths) / len(models) * point).reshape(models[0].shape)


def model_stock(base: Array, models: Sequence[Array], filter_wise: bool) -> Array:
    """The ratio by cosines whose divisor is at least 1e-6."""
    shape = base.shape if filter_wise and base.ndim > 1 else (1, -1)
    wide = base.astype(np.float64).reshape(shape)
    deltas = [model.astype(np.float64).reshape(shape) - wide for model in models]
    lengths, n = [np.linalg.norm(delta, axis=-1) for delta in deltas], len(models)
    cosines = [
        np.clip((deltas[i] * deltas[j]).sum(axis=-1) / np.maximum(lengths[i] * lengths[j], 1e-6), -1, 1)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    mean = (sum(cosines) / len(cosines))[..., None]
    below = 1 + (n - 1) * mean
    ratio = np.where(np.abs(below) < 1e-6, 0, n * mean / np.where(np.abs(below) < 1e-6, 1, below))
    return np.asarray(wide + ratio * sum(deltas) / n).reshape(base.shape)


def sce(base: Array, models: Sequence[Array], select_topk: float) -> Array:
    """Weights are alike where the mean squares add up to less than 1e-6."""
    deltas = np.stack([model - base for model in models])
    if select_topk < 1:
        variance = np.square(deltas - deltas.mean(axis=0, dtype=deltas.dtype)).mean(
            axis=0, dtype=deltas.dtype
        )
        count = int(np.count_nonzero(variance) * select_topk)
        order = np.argsort(-variance.reshape(-1).astype(np.float64), kind="stable")
        mask = np.zeros(variance.size, bool)
        mask[order[:count]] = True
        deltas = np.where(mask.reshape(variance.shape), deltas, 0).astype(base.dtype)
    keep = np.sign(deltas) == np.where(_sum(deltas) >= 0, 1, -1)
    squares = np.array([np.mean(np.square(delta)) if delta.size else 0 for delta in deltas])
    total = squares.sum()
    weights = np.full(len(models), 1 / len(models)) if abs(total) < 1e-6 else squares / total
    own = weights.astype(base.dtype).reshape(-1, *(1 for _ in base.shape)) * keep
    return np.asarray(base + _sum(deltas * own) / np.maximum(_sum(own), base.dtype.type(1e-6)))


def nearswap(base: Array, model: Array, t: float) -> Array:
    """Weights of the other model from t over a distance of at least 1e-6."""
    share = np.clip(base.dtype.type(t) / np.maximum(np.abs(base - model), base.dtype.type(1e-6)), 0, 1)
    return np.asarray(share * model + (1 - share) * base)
