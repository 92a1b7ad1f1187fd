"""The semantics in plain NumPy: what every merge must compute, byte for byte.

Equation names are those of DELLA-Merging (Deep, Bhardwaj, Poria 2024, arXiv 2406.11617).  Arrays come in as
arithmetic values (float32, or float64 where an input is float64); everything is computed in that type except
keep probabilities and sums of magnitudes, which are float64 before they are rounded once.  Sums run in a
fixed order: along a row from left to right, over experts in canonical order (sorted by identity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from della.merging.methods import Choice, Expert
from della.random import bits64, stream_key, systematic_shift, uniforms

Array = npt.NDArray[Any]

LARGEST = np.finfo(np.float32).max


def row_length(name: str, shape: Sequence[int]) -> int:
    """How many values feed one output node: the last axis of a matrix or of stacked experts (E, out, in);
    everything behind the first axis of a convolution (out, in, k...); all of a vector; 1 for a scalar."""
    if len(shape) <= 1:
        return shape[0] if shape else 1
    if len(shape) == 2 or (len(shape) == 3 and not _is_convolution(name, shape)):
        return shape[-1]
    return math.prod(shape[1:])


def _is_convolution(name: str, shape: Sequence[int]) -> bool:
    """A 3-D tensor is a 1-D convolution by name or by its small kernel, else a stack of matrices."""
    if "expert" in name:
        return False
    return "conv" in name or shape[-1] <= 16


def as_rows(name: str, values: Array) -> Array:
    """The tensor as (rows, row length); an empty tensor as (0, 1)."""
    if values.size == 0:
        return values.reshape(0, 1)
    return values.reshape(-1, row_length(name, values.shape))


# ---- Drop: from delta to delta' ----------------------------------------------------------------------------


def scores(expert: Expert, delta: Array) -> Array:
    """What is ranked, of a tensor given as (rows, n): |delta_ij|, or with importance: wanda |delta_ij| times
    the norm of input feature j (Sun et al. 2023, arXiv 2306.11695): both float32, the product rounded
    once, and the largest float32 where it overflows.
    """
    if expert.norms is None or not delta.size:
        return np.abs(delta)
    with np.errstate(all="ignore"):
        return np.asarray(np.minimum(np.abs(delta.astype(np.float32)) * expert.norms, LARGEST))


def average_ranks(sizes: Array) -> Array:
    """Twice the rank a_i of each score in its group, ascending from 0, ties averaged: int64, same shape
    (n,).
    """
    ordered = np.sort(sizes)
    less = np.searchsorted(ordered, sizes, side="left")
    not_more = np.searchsorted(ordered, sizes, side="right")
    return np.asarray(less + not_more - 1, np.int64)


def ladder(choice: Choice, expert: Expert, n: int) -> tuple[float, float]:
    """(q of rank 0, step of q per half rank) for a group of n deltas: q_i = low + step * 2 a_i."""
    d, e = expert.density, expert.epsilon
    if d in (0.0, 1.0) or n == 0:
        return d, 0.0
    if choice.ladder == "paper":  # q = 1 - [(p - e) + (2e/n) r], r = n - 1 - a
        return d + e - 2 * e / n * (n - 1), e / n
    if n == 1:
        return d, 0.0
    return d - e, e / (n - 1)


def clip_probability(q: Array) -> Array:
    """float64 probabilities rounded once to float32, inside [0, 1]."""
    return np.asarray(np.clip(q, 0.0, 1.0).astype(np.float32))


def _by_magnitude(expert: Expert, row: Array) -> Array:
    """The authors' no-rank variant: q linear in (score - min) / (max - min) of the row."""
    d, e = expert.density, expert.epsilon
    if d in (0.0, 1.0):
        return np.full(row.shape, d)
    size = row.astype(np.float64)
    low, high = size.min(), size.max()
    if low == high:
        return np.full(row.shape, d)
    return np.asarray((d - e) + (2 * e) * ((size - low) / (high - low)))


def optimal_scale(sizes: Array, density: float) -> float:
    """c with mean(min(1, c score)) = density; inf keeps all that is nonzero.

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


def _optimal(expert: Expert, row: Array) -> Array:
    if expert.density in (0.0, 1.0):
        return np.full(row.shape, expert.density)
    sizes = row.astype(np.float64)
    scale = optimal_scale(sizes, expert.density)
    if math.isinf(scale):
        return np.where(sizes > 0.0, 1.0, 0.0)
    return np.minimum(1.0, sizes * scale)


def ordered_sum(values: Array) -> float:
    """The float64 sum from left to right (np.sum adds pairwise, in an order that depends on the length)."""
    return float(np.cumsum(values, dtype=np.float64)[-1]) if values.size else 0.0


def keep_probabilities(choice: Choice, expert: Expert, delta: Array, seed: int, name: str) -> Array:
    """q_i of MAGPRUNE (or of DARE) for a tensor given as (rows, n): float32, same shape."""
    rows, n = delta.shape
    if choice.drop == "bernoulli":
        return np.full(delta.shape, expert.density, np.float32)
    sizes = scores(expert, delta)
    if choice.rank_by == "tensor":
        low, step = ladder(choice, expert, delta.size)
        return clip_probability(low + step * average_ranks(sizes.ravel())).reshape(delta.shape)
    # The paper's controls: the same ladder in an order that ignores magnitude.
    order_key = stream_key(seed, expert.identity, name, "rank")
    if choice.rank_by == "random_tensor":
        low, step = ladder(choice, expert, delta.size)
        order = bits64(order_key, 0, delta.size) >> np.uint64(33)
        return clip_probability(low + step * average_ranks(order)).reshape(delta.shape)
    low, step = ladder(choice, expert, n)
    q = np.empty(delta.shape, np.float32)
    for r in range(rows):
        if choice.rank_by == "random":
            order = bits64(order_key, r * n, n) >> np.uint64(33)
            q[r] = clip_probability(low + step * average_ranks(order))
        elif choice.rank_by == "magnitude":
            q[r] = clip_probability(_by_magnitude(expert, sizes[r]))
        elif choice.rank_by == "optimal":
            q[r] = clip_probability(_optimal(expert, sizes[r]))
        else:
            q[r] = clip_probability(low + step * average_ranks(sizes[r]))
    return q


def draw(
    choice: Choice, expert: Expert, position: int, experts: int, count: int, seed: int, name: str
) -> Array:
    """The uniforms of one expert: its own stream, or the shared one rotated by its canonical position."""
    if choice.coupling == "systematic":
        return uniforms(stream_key(seed, "", name), 0, count, systematic_shift(position, experts))
    return uniforms(stream_key(seed, expert.identity, name), 0, count)


def band(expert: Expert, size: int) -> tuple[int, int]:
    """(first, count) of the deltas that are kept, counted from the largest: TIES from the first on,
    breadcrumbs behind the gamma largest, moved up where density asks for more than gamma leaves.
    """
    count = int(expert.density * size)
    return min(int(expert.gamma * size), size - count), count


def largest(sizes: Array, first: int, count: int) -> Array:
    """A mask of ``count`` values behind the ``first`` largest, lowest index first among equals."""
    order = np.argsort(-sizes, kind="stable")
    mask = np.zeros(sizes.shape, bool)
    mask[order[first : first + count]] = True
    return mask


def kept_by_size(choice: Choice, expert: Expert, delta: Array) -> Array:
    """The mask of TIES and breadcrumbs for a tensor given as (rows, n), per tensor or per row."""
    mask, sizes = np.empty(delta.shape, bool), scores(expert, delta)
    groups = (
        zip(mask, sizes, strict=True) if choice.scope == "row" else [(mask.reshape(-1), sizes.reshape(-1))]
    )
    for target, group in groups:
        first, count = band(expert, group.size)
        target[:] = largest(group, first if choice.drop == "band" else 0, count)
    return mask


def l1_factor(delta: Array, kept: Array) -> float:
    """mergekit's rescale: sum |delta| / sum |m delta| of the tensor, row sums first; 1 where either is below
    1e-7.
    """
    before = ordered_sum(np.array([ordered_sum(np.abs(row)) for row in delta]))
    after = ordered_sum(np.array([ordered_sum(np.abs(row)) for row in kept]))
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def drop(
    choice: Choice, expert: Expert, delta: Array, position: int, experts: int, seed: int, name: str
) -> tuple[Array, Array]:
    """delta' (m_i delta_i / q_i, or another rescale) and q of one expert's tensor given as (rows, n)."""
    zero = delta.dtype.type(0)
    q = np.ones(delta.shape, np.float32)
    if choice.drop == "none":
        return delta, q
    if choice.drop in ("top", "band"):
        kept = np.where(kept_by_size(choice, expert, delta), delta, zero)
    else:
        q = keep_probabilities(choice, expert, delta, seed, name)
        u = draw(choice, expert, position, experts, delta.size, seed, name).reshape(delta.shape)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            kept = np.where(u < q, delta / q if choice.rescale == "per_element" else delta, zero)
    if choice.rescale == "l1":
        kept = kept * delta.dtype.type(l1_factor(delta, kept))
    return kept.astype(delta.dtype), q


# ---- Elect and Fuse ----------------------------------------------------------------------------------------


def elect(choice: Choice, weights: Sequence[float], dropped: Sequence[Array]) -> Array:
    """S, the elected sign of each position: -1, 0 or 1 in the arithmetic type; a tie elects nothing."""
    total = np.zeros_like(dropped[0])
    for w, values in zip(weights, dropped, strict=True):
        if choice.vote == "weighted":
            total = total + total.dtype.type(w) * values
        elif choice.vote == "unweighted":
            total = total + total.dtype.type(np.sign(w)) * values
        else:
            total = total + np.sign(total.dtype.type(w) * values)
    return np.sign(total)


def adaptive_factor(choice: Choice, values: Array, agrees: Array) -> Array:
    """The paper's adaptive scaling (figure 5) of one expert: (nonzero deltas) / (elected deltas) per row or
    tensor, shape (rows, 1) or (1, 1), or the inverse; 0 where there is nothing to divide by.
    """
    axis = None if choice.lambda_scaling == "tensor" else 1
    nonzero = np.count_nonzero(values, axis=axis, keepdims=True).astype(np.float64)
    elected = np.count_nonzero(agrees, axis=axis, keepdims=True).astype(np.float64)
    over, under = (elected, nonzero) if choice.lambda_scaling == "row_inverse" else (nonzero, elected)
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0).astype(values.dtype)


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
    choice: Choice, weights: Sequence[float], base: Array, deltas: Sequence[Array], dropped: Sequence[Array],
    q: Sequence[Array],
) -> Array:  # fmt: skip
    """theta_m = theta + lambda * (mean or sum over the agreeing experts of w delta'), everything (rows,
    n).
    """
    real = base.dtype.type
    votes = choice.vote != "none"
    signs = elect(choice, weights, dropped) if votes else np.ones_like(base)
    above, below = np.zeros_like(base), np.zeros_like(base)
    for w, values in zip(weights, dropped, strict=True):
        part = real(w) * values
        agrees = (np.sign(part) == signs) & (signs != 0) if votes else np.ones(base.shape, bool)
        if choice.lambda_scaling != "constant":
            part = part * adaptive_factor(choice, values, agrees & (values != 0))
        above = above + np.where(agrees, part, real(0))
        below = below + np.where(agrees, real(w), real(0))
    if choice.fuse != "sum":
        empty = below == 0 if votes else np.abs(below) < 1e-8
        above = above / np.where(empty, real(1), below)
    if choice.fuse == "calibrated":
        above = above / calibration(signs, weights, deltas, q)
    scale = real(choice.lambda_ if choice.lambda_scaling == "constant" else 1.0)
    return np.asarray(base + scale * above)


def merge(
    choice: Choice, base: Array, models: Sequence[Array], experts: Sequence[Expert], seed: int, name: str
) -> Array:
    """One merged tensor from the base's and the experts' arithmetic values (any one shape, any order of
    experts).
    """
    order = sorted(range(len(experts)), key=lambda t: experts[t].identity)
    experts = [experts[t] for t in order]
    rows = as_rows(name, base)
    deltas = [as_rows(name, models[t]) - rows for t in order]
    pairs = [
        drop(choice, e, d, t, len(experts), seed, name)
        for t, (e, d) in enumerate(zip(experts, deltas, strict=True))
    ]
    dropped, q = [p[0] for p in pairs], [p[1] for p in pairs]
    return fuse(choice, [e.weight for e in experts], rows, deltas, dropped, q).reshape(base.shape)


def average(models: Sequence[Array], experts: Sequence[Expert], normalize: bool) -> Array:
    """The weighted mean (or sum) of the models themselves, added in canonical order."""
    order = sorted(range(len(experts)), key=lambda t: experts[t].identity)
    real = models[0].dtype.type
    total = np.zeros_like(models[0])
    for t in order:
        total = total + real(experts[t].weight) * models[t]
    if normalize:
        total = total / sum((real(experts[t].weight) for t in order), real(0))
    return np.asarray(total)
