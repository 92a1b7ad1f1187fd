"""The semantics in plain NumPy: what Drop, Elect and Fuse must compute, byte for byte.

Equation names are those of DELLA-Merging (Deep, Bhardwaj, Poria 2024, arXiv 2406.11617).  Arrays come in as
arithmetic values (float32, or float64 where an input is float64), tensors as (rows, row length); everything
is computed in that type except keep probabilities and sums of magnitudes, which are float64 before they are
rounded once.  Sums run in a fixed order: along a row from left to right, over experts in canonical order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from della.dtypes import Array
from della.merging.options import Fuse, Scaling

LARGEST = np.finfo(np.float32).max


# ---- Drop: from delta to delta' ----------------------------------------------------------------------------


def saliency(norms: Array | None, delta: Array) -> Array:
    """What is ranked: |delta_ij|, or with input norms |delta_ij| times the norm of input feature j (Sun et
    al. 2023, arXiv 2306.11695): both float32, the product rounded once, and the largest float32 where it
    overflows.
    """
    if norms is None or not delta.size:
        return np.abs(delta)
    with np.errstate(all="ignore"):
        return np.asarray(np.minimum(np.abs(delta.astype(np.float32)) * norms, LARGEST))


def average_ranks(sizes: Array) -> Array:
    """Twice the rank a_i of each value in its group, ascending from 0, ties averaged: int64, same shape
    (n,).
    """
    ordered = np.sort(sizes)
    less = np.searchsorted(ordered, sizes, side="left")
    not_more = np.searchsorted(ordered, sizes, side="right")
    return np.asarray(less + not_more - 1, np.int64)


def symmetric_ladder(density: float, epsilon: float, n: int) -> tuple[float, float]:
    """(q of rank 0, step of q per half rank) for a group of n deltas: q_i = low + step * 2 a_i, from d - e to
    d + e."""
    if density in (0.0, 1.0) or n <= 1:
        return density, 0.0
    return density - epsilon, epsilon / (n - 1)


def printed_ladder(density: float, epsilon: float, n: int) -> tuple[float, float]:
    """The same by the formula as printed: q = 1 - [(p - e) + (2e/n) r], r = n - 1 - a."""
    if density in (0.0, 1.0) or n == 0:
        return density, 0.0
    return density + epsilon - 2 * epsilon / n * (n - 1), epsilon / n


def clip_probability(q: Array) -> Array:
    """float64 probabilities rounded once to float32, inside [0, 1]."""
    return np.asarray(np.clip(q, 0.0, 1.0).astype(np.float32))


def linear_probabilities(density: float, epsilon: float, row: Array) -> Array:
    """The authors' no-rank variant: q linear in (saliency - min) / (max - min) of the row."""
    if density in (0.0, 1.0):
        return np.full(row.shape, density)
    size = row.astype(np.float64)
    low, high = size.min(), size.max()
    if low == high:
        return np.full(row.shape, density)
    return np.asarray((density - epsilon) + (2 * epsilon) * ((size - low) / (high - low)))


def optimal_scale(sizes: Array, density: float) -> float:
    """c with mean(min(1, c saliency)) = density; inf keeps all that is nonzero.

    Of |delta| this is the unbiased sampler of least variance; of |delta| times input norms the one of least
    variance of the layer's outputs over the calibration data, since the draws are independent.
    """
    target = density * sizes.size
    saturated = 0
    rest = ordered_sum(sizes)
    while rest > 0.0 and saturated < target:
        scale = (target - saturated) / rest
        full = sizes * scale >= 1.0
        now = int(full.sum())
        if now <= saturated:
            return float(scale)
        saturated = now
        rest = ordered_sum(np.where(full, 0.0, sizes))
    return math.inf if saturated else 0.0


def optimal_probabilities(density: float, row: Array) -> Array:
    """q = min(1, c saliency) of a row."""
    if density in (0.0, 1.0):
        return np.full(row.shape, density)
    sizes = row.astype(np.float64)
    scale = optimal_scale(sizes, density)
    if math.isinf(scale):
        return np.where(sizes > 0.0, 1.0, 0.0)
    return np.minimum(1.0, sizes * scale)


def ordered_sum(values: Array) -> float:
    """The float64 sum from left to right (np.sum adds pairwise, in an order that depends on the length)."""
    return float(np.cumsum(values, dtype=np.float64)[-1]) if values.size else 0.0


def sample(delta: Array, q: Array, u: Array, divide: bool) -> Array:
    """m delta, or m delta / q, with m = [u < q]."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(u < q, delta / q if divide else delta, delta.dtype.type(0)).astype(delta.dtype)


def band(density: float, gamma: float, size: int) -> tuple[int, int]:
    """(first, count) of the deltas that breadcrumbs keeps of ``size``, counted from the largest: behind the
    gamma largest, moved up where density asks for more than gamma leaves.  TIES keeps as many from the first
    on.
    """
    count = int(density * size)
    return min(int(gamma * size), size - count), count


def largest(sizes: Array, first: int, count: int) -> Array:
    """A mask of ``count`` values behind the ``first`` largest, lowest index first among equals."""
    order = np.argsort(-sizes, kind="stable")
    mask = np.zeros(sizes.shape, bool)
    mask[order[first : first + count]] = True
    return mask


def l1_factor(delta: Array, kept: Array) -> float:
    """mergekit's rescale: sum |delta| / sum |m delta| of the tensor, row sums first."""
    before, after = (ordered_sum(np.array([ordered_sum(np.abs(row)) for row in x])) for x in (delta, kept))
    return l1_ratio(before, after)


def l1_ratio(before: float, after: float) -> float:
    """The factor that makes a sum of magnitudes what it was; 1 where either is below 1e-7."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


# ---- Elect and Fuse ----------------------------------------------------------------------------------------


def elect(votes: Sequence[float], by_count: bool, dropped: Sequence[Array]) -> Array:
    """S, the elected sign of each position: -1, 0 or 1 in the arithmetic type; a tie elects nothing.

    ``votes``: what each expert's delta' is multiplied by; ``by_count``: only the sign of that counts.
    """
    total = np.zeros_like(dropped[0])
    for v, values in zip(votes, dropped, strict=True):
        vote = total.dtype.type(v) * values
        total = total + (np.sign(vote) if by_count else vote)
    return np.sign(total)


def adaptive_factor(scaling: Scaling, nonzero: Array, elected: Array) -> Array:
    """The paper's adaptive scaling (figure 5) of numbers of deltas: (nonzero) / (elected), or the inverse; 0
    where there is nothing to divide by.  float64.
    """
    over, under = (elected, nonzero) if scaling.inverse else (nonzero, elected)
    over, under = over.astype(np.float64), under.astype(np.float64)
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)


def inflation(probabilities: Sequence[float], weights: Sequence[float]) -> float:
    """By how much Elect + mean enlarges, in expectation, an update that experts with these q and weights
    share: E[sum m w / q over survivors / sum m w]; (1 - p^T) / (1 - p) where all are equal.
    """
    total = 0.0
    for survivors in product((False, True), repeat=len(probabilities)):
        chance, above, below = 1.0, 0.0, 0.0
        for alive, q, w in zip(survivors, probabilities, weights, strict=True):
            chance *= q if alive else 1.0 - q
            if alive and q > 0.0:
                above += abs(w) / q
                below += abs(w)
        if below > 0.0:
            total += chance * (above / below)
    return total


def calibration(signs: Array, weights: Sequence[float], deltas: Sequence[Array], q: Sequence[Array]) -> Array:
    """The expected inflation at each position, given the experts whose own delta has the elected sign: (rows,
    n).
    """
    factor = np.ones(signs.shape, np.float64)
    exact = [float(signs.dtype.type(w)) for w in weights]
    agreeing = [
        (np.sign(d * d.dtype.type(w)) == signs) & (signs != 0) for w, d in zip(weights, deltas, strict=True)
    ]
    for index in np.ndindex(signs.shape):
        members = [t for t, agrees in enumerate(agreeing) if agrees[index]]
        if members:
            expected = inflation([float(q[t][index]) for t in members], [exact[t] for t in members])
            factor[index] = expected if expected > 0.0 else 1.0
    return factor.astype(signs.dtype)


def fuse(
    how: Fuse, scaling: Scaling | None, weights: Sequence[float], signs: Array | None, lambda_: float,
    base: Array, deltas: Sequence[Array], dropped: Sequence[Array], q: Sequence[Array],
) -> Array:  # fmt: skip
    """theta_m = theta + lambda * (mean or sum over the agreeing experts of w delta'), everything (rows, n).

    The mean divides by the sum of |w|: by that of w, a negative weight would turn its own sign round, and
    weights that nearly cancel would blow up what is left.  ``signs``: the elected ones, None without Elect.
    """
    real = base.dtype.type
    above, below = np.zeros_like(base), np.zeros_like(base)
    for w, values in zip(weights, dropped, strict=True):
        part = real(w) * values
        agrees = np.ones(base.shape, bool) if signs is None else (np.sign(part) == signs) & (signs != 0)
        if scaling is not None:
            axis = 1 if scaling.by_row else None
            counted = values != 0, agrees & (values != 0)
            part = part * adaptive_factor(
                scaling, *(np.count_nonzero(x, axis=axis, keepdims=True) for x in counted)
            ).astype(values.dtype)
        above = above + np.where(agrees, part, real(0))
        below = below + np.where(agrees, real(abs(w)), real(0))
    if how.mean:
        empty = below < 1e-8 if signs is None else below == 0
        above = above / np.where(empty, real(1), below)
    if how.calibrated and signs is not None:
        above = above / calibration(signs, weights, deltas, q)
    return np.asarray(base + real(lambda_ if scaling is None else 1.0) * above)


def average(models: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """The weighted mean (or sum) of the models themselves."""
    real = models[0].dtype.type
    total = np.zeros_like(models[0])
    for w, values in zip(weights, models, strict=True):
        total = total + real(w) * values
    return np.asarray(total / sum((real(w) for w in weights), real(0)) if normalize else total)
