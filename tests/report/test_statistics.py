"""Intervals against published values and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from della.report.intervals import Interval, mean_over_seeds, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 30, 0.3315, 0.6685), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_gives_the_known_intervals(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert found.value == right / total
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 10_000), st.data())
def test_wilson_holds_its_own_share(total: int, data: st.DataObject) -> None:
    found = wilson(data.draw(st.integers(0, total)), total)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_what_is_no_share_is_refused(right: int, total: int) -> None:
    with pytest.raises(ValueError, match=rf"^{right} of {total} is no share$"):
        wilson(right, total)


def test_the_mean_over_seeds() -> None:
    assert mean_over_seeds([0.5]) == Interval(0.5, 0.5, 0.5)
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high == pytest.approx(2 + 4.303 / 3**0.5)
    many = mean_over_seeds([0.0, 1.0] * 50)
    assert many.high == pytest.approx(0.5 + 1.96 * 0.50252 / 10, abs=1e-4)


def test_the_bootstrap_is_seeded_and_paired() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    a, b = hard + 0.01, hard
    found = paired_bootstrap(list(a), list(b))
    assert found.value == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01)
    assert found.high == pytest.approx(0.01)
    assert not found.holds_zero
    c, d = rng.random((2, 100))
    assert paired_bootstrap(c, d, seed=7) == paired_bootstrap(c, d, seed=7)
    assert paired_bootstrap(c, d, seed=7) != paired_bootstrap(c, d, seed=8)


def test_the_bootstrap_covers_what_it_should() -> None:
    """Of 200 differences of zero, about 95 % of the intervals hold zero."""
    rng = np.random.default_rng(3)
    held = sum(
        paired_bootstrap(rng.normal(size=80), rng.normal(size=80), draws=1000, seed=i).holds_zero
        for i in range(200)
    )
    assert 180 <= held <= 199


def test_the_bootstrap_weighs_items() -> None:
    found = paired_bootstrap([1.0, 0.0], [0.0, 0.0], weights=[3, 1])
    assert found.value == 0.75
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_bootstrap_of_strata_leaves_each_its_share() -> None:
    """Two tasks, each without spread: only a resample that mixes them would vary."""
    a, tasks = [1.0] * 30 + [-1.0] * 10, [30, 10]
    weights = [1 / 30] * 30 + [1 / 10] * 10
    found = paired_bootstrap(a, [0.0] * 40, weights=weights, strata=tasks)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.low == pytest.approx(0, abs=1e-12)
    assert found.high == pytest.approx(0, abs=1e-12)
    mixed = paired_bootstrap(a, [0.0] * 40, weights=weights)
    assert mixed.low < -0.2 < 0.2 < mixed.high


def test_the_bootstrap_of_strata_covers_what_it_should() -> None:
    """Of 200 differences of 1 in one task and -1 in the other, about 95 % of the intervals hold zero."""
    rng = np.random.default_rng(5)
    apart = np.repeat([1.0, -1.0], [60, 20])
    weights = np.repeat([1 / 60, 1 / 20], [60, 20])
    held = sum(
        paired_bootstrap(
            apart + rng.normal(size=80),
            rng.normal(size=80),
            weights=weights,
            strata=[60, 20],
            draws=1000,
            seed=i,
        ).holds_zero
        for i in range(200)
    )
    assert 180 <= held <= 199


@pytest.mark.parametrize("strata", [[1, 2], [2, 0], []])
def test_strata_of_other_items_are_refused(strata: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^strata of \[.*\] items are not those of 2$"):
        paired_bootstrap([1, 0], [1, 1], strata=strata)


def test_scores_of_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^2 and 1 scores are not of the same items$"):
        paired_bootstrap([1, 0], [1])
