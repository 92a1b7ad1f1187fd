"""What the papers promise, by measurement: unbiased sampling, keep rates, and the bias of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import della
from della.merging import reference
from della.merging.registry import METHODS
from della.merging.tile import Subject

Floats = np.ndarray[Any, np.dtype[np.float32]]

ROWS, N, SEEDS = 40, 1000, 60
RANK_BYS = ("row", "tensor", "random", "random_tensor", "magnitude", "optimal")


def deltas() -> Floats:
    """Rows on different scales, so that ranking in the tensor differs from ranking in the row."""
    rng = np.random.default_rng(3)
    scale = np.exp(rng.standard_normal((ROWS, 1)) * 0.5)
    return (rng.standard_normal((ROWS, N)) * scale).astype(np.float32)


def keep_probabilities(shared: dict[str, Any], epsilon: float, delta: Floats) -> Any:
    """Those of the reference at density 0.5, in float64."""
    method = METHODS["della_linear"]
    expert = method.expert("expert", {"density": 0.5, "epsilon": epsilon})
    subject = Subject("delta", delta.shape, (expert,), 0)
    return method(shared).drop.reference(subject, 0, delta)[1].astype(np.float64)  # type: ignore[attr-defined]


def decile(
    delta: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The decile of each magnitude in its row, 0 to 9."""
    order = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    return order * 10 // N


@pytest.mark.parametrize("rank_by", RANK_BYS)
@pytest.mark.parametrize("ladder", ["symmetric", "paper"])
def test_the_expectation_stays_in_every_decile_of_magnitude(rank_by: str, ladder: str) -> None:
    delta, group = deltas(), decile(deltas())
    q = keep_probabilities({"rank_by": rank_by, "ladder": ladder}, 0.3, delta)
    total = np.zeros((ROWS, N))
    for seed in range(SEEDS):
        total += della.magprune(delta, 0.5, 0.3, seed=seed, rank_by=rank_by, ladder=ladder)
    sign, size = np.sign(delta), np.abs(delta).astype(np.float64)
    if rank_by.startswith("random"):  # its probabilities change with the seed: bound them by the lowest
        q = np.full(q.shape, 0.2)
    for k in range(10):
        at = group == k
        mean, wanted = (total * sign)[at].sum() / SEEDS, size[at].sum()
        error = np.sqrt((size[at] ** 2 * (1 - q[at]) / q[at]).sum() / SEEDS)
        assert abs(mean - wanted) <= 5 * error, (k, mean / wanted)


@pytest.mark.parametrize("ladder", ["symmetric", "paper"])
def test_the_keep_rate_follows_the_ladder(ladder: str) -> None:
    delta, group = deltas(), decile(deltas())
    kept = np.zeros((ROWS, N))
    for seed in range(SEEDS):
        kept += della.magprune(delta, 0.5, 0.3, seed=seed, ladder=ladder) != 0
    for k in range(10):
        ranks = np.arange(100 * k, 100 * (k + 1))
        symmetric = 0.2 + 0.6 * ranks / (N - 1)
        q = symmetric if ladder == "symmetric" else 1 - ((0.5 - 0.3) + 0.6 / N * (N - 1 - ranks))
        rate, error = kept[group == k].mean() / SEEDS, 0.5 / np.sqrt(SEEDS * ROWS * 100)
        assert abs(rate - q.mean()) < 5 * error, k


@pytest.mark.parametrize(
    ("epsilon", "smallest", "largest"), [(0.15, 0.62, 1.16), (0.4, 0.15, 1.35)], ids=["e=.15", "e=.4"]
)
def test_rescale_l1_brings_back_the_known_bias(epsilon: float, smallest: float, largest: float) -> None:
    """One factor sum|delta| / sum|m delta|: with Gaussian deltas at density 0.5 the smallest and the largest
    entries are multiplied, in expectation, by the numbers that mergekit shows."""
    delta = np.random.default_rng(0).standard_normal((100, N)).astype(np.float32)
    total = np.zeros(delta.shape)
    for seed in range(40):
        total += della.magprune(delta, 0.5, epsilon, seed=seed, rescale="l1")
    order = np.argsort(np.abs(delta), axis=1)
    for part, wanted in ((order[:, :20], smallest), (order[:, -20:], largest)):
        ratio = (
            np.abs(np.take_along_axis(total, part, 1)).sum()
            / 40
            / np.abs(np.take_along_axis(delta, part, 1)).sum()
        )
        assert abs(ratio - wanted) < 0.02


def test_optimal_has_the_least_variance_and_the_wanted_density() -> None:
    """Noise variance relative to DARE at density 0.5, Gaussian deltas: 0.32 optimal, 0.84 at epsilon 0.07."""
    delta = np.random.default_rng(0).standard_normal((50, 4000)).astype(np.float32)

    def noise(rank_by: str, epsilon: float) -> float:
        q = keep_probabilities({"rank_by": rank_by}, epsilon, delta)
        assert abs(q.mean() - 0.5) < 1e-3
        return float(
            (delta**2 * (1 - q) / np.where(q > 0, q, 1)).sum() / (delta.astype(np.float64) ** 2).sum()
        )

    assert abs(noise("row", 0.0) - 1.0) < 1e-9
    assert abs(noise("optimal", 0.0) - 0.32) < 0.01
    assert abs(noise("row", 0.07) - 0.84) < 0.01


def test_systematic_coupling_keeps_marginals_and_spreads_the_experts() -> None:
    """At density 1/3 three experts never keep the same element, and each keeps a third."""
    zeros, ones = np.zeros((200, 500), np.float32), np.ones((200, 500), np.float32)
    options: dict[str, Any] = {"density": 1 / 3, "method": "dare_linear", "rescale": "none"}
    apart = della.merge_tensors(zeros, [ones] * 3, coupling="systematic", **options)
    assert set(np.unique(apart)) <= {0.0, 1.0}
    assert abs(apart.mean() - 1.0) < 0.001
    alone = della.merge_tensors(zeros, [ones], coupling="systematic", **options)
    assert abs(alone.mean() - 1 / 3) < 0.01


def test_elect_and_mean_inflate_a_shared_update_and_calibrated_does_not() -> None:
    """The hidden factor (1 - p^T) / (1 - p): 1.75 at three experts and p = 0.5."""
    zeros, ones = np.zeros((400, 1000), np.float32), np.ones((400, 1000), np.float32)
    merged = della.merge_tensors(zeros, [ones] * 3, method="dare_ties", density=0.5, fuse="mean")
    assert abs(merged.mean() - 1.75) < 0.01
    assert reference.inflation([0.5] * 3, [1.0] * 3) == 1.75
    assert abs(reference.inflation([0.1] * 3, [1.0] * 3) - 2.71) < 1e-9
    calibrated = della.merge_tensors(zeros, [ones] * 3, method="dare_ties", density=0.5, fuse="calibrated")
    assert abs(calibrated.mean() - 1.0) < 0.005


def test_density_one_keeps_all_and_zero_keeps_nothing() -> None:
    delta = deltas()
    np.testing.assert_array_equal(della.magprune(delta, 1.0, 0.4), delta)
    np.testing.assert_array_equal(della.magprune(delta, 0.0, 0.4), np.zeros_like(delta))
    base = np.full_like(delta, 3.0)
    np.testing.assert_array_equal(della.merge_tensors(base, [delta], density=0.0), base)


def test_equal_magnitudes_get_equal_chances() -> None:
    """Half of a row is zero and half has one magnitude: the averaged rank gives each half one probability."""
    delta = np.tile(np.array([2.0, 0.0], np.float32), (300, 500))
    kept = sum(della.magprune(delta, 0.5, 0.4, seed=s) != 0 for s in range(20)).astype(np.float64) / 20
    wanted = 0.1 + 0.8 * (500 + 499 / 2) / 999
    first, last = kept[:, :100:2].mean(), kept[:, -100::2].mean()
    assert abs(first - wanted) < 0.01
    assert abs(last - wanted) < 0.01


def test_ties_keeps_exactly_the_floor_and_the_lowest_index_among_equals() -> None:
    delta = np.array([[1, -1, 1, -1, 1], [2, 1, 1, 1, 1]], np.float32)
    merged = della.merge_tensors(np.zeros_like(delta), [delta], method="ties", density=0.39)  # floor(3.9) = 3
    np.testing.assert_array_equal(merged, [[1, -1, 0, 0, 0], [2, 0, 0, 0, 0]])
    by_row = della.merge_tensors(np.zeros_like(delta), [delta], method="ties", density=0.4, scope="row")
    np.testing.assert_array_equal(by_row, [[1, -1, 0, 0, 0], [2, 1, 0, 0, 0]])


def test_a_tied_vote_elects_nothing() -> None:
    base = np.zeros(3, np.float32)
    pair = [np.array([1, 2, -1], np.float32), np.array([-1, 1, -1], np.float32)]
    np.testing.assert_array_equal(della.merge_tensors(base, pair, method="ties"), [0, 1.5, -1])


def test_adaptive_scaling_multiplies_by_the_share_of_elected_deltas() -> None:
    """Of a's 4 nonzero deltas 2 are elected (factor 2), of b's 4 all (factor 1)."""
    a = np.array([[1, 1, 1, 1]], np.float32)
    b = np.array([[2, 2, -2, -2]], np.float32)
    zeros = np.zeros_like(a)
    options: dict[str, Any] = {"method": "task_arithmetic", "vote": "weighted", "fuse": "sum"}
    row = della.merge_tensors(zeros, [a, b], lambda_scaling="row", **options)
    np.testing.assert_array_equal(row, [[4, 4, -2, -2]])
    inverse = della.merge_tensors(zeros, [a, b], lambda_scaling="row_inverse", **options)
    np.testing.assert_array_equal(inverse, [[2.5, 2.5, -2, -2]])
