"""Intervals for scores: how far a number can be trusted, and whether two models differ at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = Sequence[float] | npt.NDArray[np.floating]

LEVEL = 0.95
# So many items at least must differ between two models: were five to differ, all to one side, the sign test
# would still find that in 6 % of models that are alike, where the bootstrap sees no spread and no doubt.
FEWEST = 6
_Z = 1.959963984540054  # the normal quantile of LEVEL
# Student's quantiles of LEVEL for 1 .. 30 degrees of freedom, from its table.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the estimate, as a difference, is not significant."""
        return self.low <= 0 <= self.high

    def __mul__(self, factor: float) -> Interval:
        return Interval(factor * self.value, factor * self.low, factor * self.high)


def side(items: Interval, seeds: Interval | None = None, differing: int = FEWEST) -> int:
    """Of a difference 1 where it is significant and above zero, -1 where it is below, else 0: intervals over
    items, and over seeds if there are several, leave zero out, and enough items are ``differing``.
    """
    if items.holds_zero or (seeds is not None and seeds.holds_zero) or differing < FEWEST:
        return 0
    return 1 if items.value > 0 else -1


def wilson(right: int, total: int) -> Interval:
    """The share ``right / total`` with its score interval (Wilson 1927); ValueError without any trial."""
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} of {total} is no share")
    share = right / total
    scale = 1 + _Z**2 / total
    middle = (share + _Z**2 / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / scale
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean of one score over seeds, with Student's interval; of a single value, that value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, mean, mean)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = (_T[n - 2] if n <= len(_T) + 1 else _Z) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(
    a: Scores, b: Scores, *, weights: Scores | None = None, strata: Sequence[int] | None = None,
    draws: int = 10_000, seed: int = 42,
) -> Interval:  # fmt: skip
    """The difference of mean(a) - mean(b) over the same items, with the percentile interval of the bootstrap.

    a, b: one score an item, in the same order (0 or 1 for right or wrong; a loss per token with the number of
    tokens as weight).  weights: how much each item counts; equal by default.  strata: how many items each of
    several tasks has, one task after the other; every resample then has as many of each, and each task keeps
    its share of the weight.  The same seed gives the same interval.
    """
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(differences)
    if len(a) != len(b) or n == 0:
        raise ValueError(f"{len(a)} and {len(b)} scores are not of the same items")
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    sizes = [n] if strata is None else list(strata)
    if sum(sizes) != n or min(sizes, default=0) < 1:
        raise ValueError(f"strata of {sizes} items are not those of {n}")
    rng = np.random.Generator(np.random.PCG64(seed))
    means, begin = np.zeros(draws), 0
    for size in sizes:
        part = slice(begin, begin := begin + size)
        share = weight[part].sum() / weight.sum()
        means += share * _resampled(differences[part], weight[part], draws, rng)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float((differences * weight).sum() / weight.sum()), float(low), float(high))


def interval_of(
    items: npt.NDArray[np.float64], weights: Scores | None = None, strata: Sequence[int] | None = None,
    seed: int = 42,
) -> Interval:  # fmt: skip
    """The weighted mean of ``items`` by the bootstrap; of right answers (all 0 or 1, or 100) by Wilson,
    as the bootstrap would see no spread where all are alike.
    """
    if strata is None or len(strata) == 1:
        found = set(np.unique(items))
        for whole in (1.0, 100.0):
            if found <= {0.0, whole}:
                return wilson(round(float(items.sum()) / whole), len(items)) * whole
    return paired_bootstrap(items, np.zeros_like(items), weights=weights, strata=strata, seed=seed)


def _resampled(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], draws: int,
               rng: np.random.Generator) -> npt.NDArray[np.float64]:  # fmt: skip
    """The weighted means of ``draws`` samples of as many values, drawn with replacement."""
    n = len(values)
    means = np.empty(draws)
    chunk = max(1, 2_000_000 // n)
    for begin in range(0, draws, chunk):
        chosen = rng.integers(0, n, size=(min(chunk, draws - begin), n))
        total = weights[chosen]
        means[begin : begin + len(chosen)] = (values[chosen] * total).sum(1) / total.sum(1)
    return means
