"""Between storage and arithmetic: every bfloat16, every rounding, and no inf or NaN unseen."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della.merging.kernels import cast

EVERY = np.arange(1 << 16, dtype=np.uint16)
FINITE = EVERY[np.isfinite(EVERY.view(ml_dtypes.bfloat16).astype(np.float32))]
Array = np.ndarray[Any, np.dtype[Any]]


def widened(stored: Array) -> tuple[Array, bool]:
    out = np.empty(stored.size, np.float32)
    return out, bool(cast.widen_bf16(stored, out.view(np.uint32)))


def test_every_bfloat16_is_widened_exactly() -> None:
    out, finite = widened(EVERY)
    assert out.tobytes() == (EVERY.astype(np.uint32) << 16).tobytes()
    assert not finite
    assert widened(FINITE)[1]
    assert widened(EVERY[:0])[1]


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7F81, 0xFFFF], ids=hex)
@pytest.mark.parametrize("at", [0, 1, 8191, 8192, 20_000])
def test_one_bad_value_is_seen_wherever_it_stands(bad: int, at: int) -> None:
    stored = np.resize(FINITE, 20_001)
    base, delta = np.ones(stored.size, np.float32), np.empty(stored.size, np.float32)
    assert widened(stored)[1]
    assert cast.subtract_bf16(stored, base, delta, delta.view(np.uint32))
    stored[at] = bad
    assert not widened(stored)[1]
    assert not cast.subtract_bf16(stored, base, delta, delta.view(np.uint32))
    assert not cast.all_finite(stored, "BF16")
    wide = widened(stored)[0]
    assert not cast.all_finite(wide, "F32")
    assert cast.all_finite(np.delete(wide, at), "F32")


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, FINITE.size])
def test_the_difference_is_that_of_widened_values(size: int) -> None:
    stored = FINITE[:size]
    base = np.random.default_rng(0).standard_normal(size).astype(np.float32) * np.float32(1e3)
    delta = np.empty(size, np.float32)
    assert cast.subtract_bf16(stored, base, delta, delta.view(np.uint32))
    with np.errstate(over="ignore"):
        assert delta.tobytes() == (widened(stored)[0] - base).tobytes()


def rounded(bits: Array) -> tuple[Array, bool]:
    out = np.empty(bits.size, np.uint16)
    return out, bool(cast.round_bf16(bits, out))


def check_rounding(bits: Array) -> None:
    out, finite = rounded(bits)
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    numbers = ~np.isnan(values)
    assert np.array_equal(out[numbers], wanted.view(np.uint16)[numbers])
    assert np.isnan(out.view(ml_dtypes.bfloat16).astype(np.float32)[~numbers]).all()
    assert finite == np.isfinite(wanted.astype(np.float32)).all()


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=70))
def test_rounding_is_to_nearest_even(bits: list[int]) -> None:
    check_rounding(np.array(bits, np.uint32))


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_rounding_at_every_bfloat16(low: int) -> None:
    bits = (EVERY.astype(np.uint32) << 16) | np.uint32(low)
    check_rounding(bits)
    for each in (0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0xFF7F8000, 0xFFFFFFFF, 0x7FFFFFFF):
        check_rounding(np.array([each], np.uint32))
