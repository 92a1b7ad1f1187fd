"""Storage types: widening is exact, rounding is once and to nearest even, from both arithmetic types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from della.dtypes import DTYPES, RECIPE_NAMES, DType, of_array, round_to, widen

NARROW = [DTYPES[name] for name in ("BF16", "F16", "F8_E4M3", "F8_E5M2")]
FLOATS = [*NARROW, DTYPES["F32"], DTYPES["F64"]]


def every_value(dtype: DType) -> np.ndarray[Any, np.dtype[Any]]:
    """Every bit pattern of a narrow type."""
    unsigned = {8: np.uint8, 16: np.uint16}[dtype.bits]
    return np.arange(1 << dtype.bits, dtype=unsigned).view(dtype.numpy)


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
def test_every_value_widens_exactly_and_comes_back(dtype: DType) -> None:
    stored = every_value(dtype)
    with np.errstate(invalid="ignore"):
        wanted = stored.astype(np.float32)
    wide, into = widen(stored), np.empty(stored.shape, np.float32)
    assert widen(stored, into) is into
    for got in (wide, into):
        np.testing.assert_array_equal(got, wanted)
    finite = np.isfinite(wide)
    assert round_to(wide, dtype)[finite].tobytes() == stored[finite].tobytes()


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
def test_rounding_is_once_to_nearest_even(dtype: DType, real: Any) -> None:
    """Around the middle of every two neighbours: below it down, above it up, on it to the even one."""
    stored = every_value(dtype)
    wide = widen(stored)
    order = np.flatnonzero(np.isfinite(wide) & (wide >= 0) & ~np.signbit(wide))
    low, high = stored[order[:-1]], stored[order[1:]]
    middle = (widen(low).astype(np.float64) + widen(high)) / 2
    even = np.where(low.view(f"u{dtype.bytes}") % 2 == 0, low, high)
    fits = middle.astype(real) == middle
    for sign in (1, -1):
        for values, wanted in (
            (middle, even),
            (np.nextafter(middle.astype(real), np.asarray(np.inf, real)), high),
            (np.nextafter(middle.astype(real), np.asarray(-np.inf, real)), low),
        ):
            got = round_to((sign * values).astype(real), dtype)
            np.testing.assert_array_equal(widen(got)[fits], sign * widen(wanted)[fits])


def test_the_table_agrees_with_numpy() -> None:
    for dtype in DTYPES.values():
        if dtype.kind != "opaque":
            assert dtype.numpy.itemsize == dtype.bytes
            assert of_array(np.zeros(1, dtype.numpy)) is dtype
    assert {d.name for d in RECIPE_NAMES.values()} == {d.name for d in FLOATS}


def test_float32_and_float64_stay_as_they_are() -> None:
    for real in (np.float32, np.float64):
        values = np.array([1.5, -0.0, 3e-40], real)
        assert widen(values) is values
