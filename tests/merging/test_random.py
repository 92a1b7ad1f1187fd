"""The random streams: known values, so that no release can change the bytes of a merge unnoticed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from della.merging.random import bits64, stream_key, systematic_shift, uniforms


def test_bits_are_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 1234567, as published with its reference code.
    assert bits64(1234567, 0, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_are_pinned() -> None:
    assert stream_key(42, "math", "model.layers.0.mlp.up_proj.weight") == 0x1D470F85876368D0


def test_keys_keep_their_parts_apart() -> None:
    assert stream_key(1, "ab", "c") != stream_key(1, "a", "bc")
    assert stream_key(1, "a", "b") != stream_key(1, "b", "a")
    assert stream_key(1, "a", "b") != stream_key(1, "a", "b", "rank")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_an_element_does_not_depend_on_where_a_draw_starts(key: int, start: int, skip: int, n: int) -> None:
    whole = bits64(key, start, skip + n)
    np.testing.assert_array_equal(whole[skip:], bits64(key, start + skip, n))


def test_uniforms_are_even_and_below_one() -> None:
    u = uniforms(7, 0, 1 << 20)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    assert (
        (counts - counts.mean()) ** 2 / counts.mean()
    ).sum() < 120  # chi-squared, 63 degrees: p about 2e-5


def test_systematic_shift_spreads_one_uniform_over_the_circle() -> None:
    u = np.stack([uniforms(7, 0, 1000, systematic_shift(t, 4)) for t in range(4)]).astype(np.float64)
    np.testing.assert_array_equal((u - u[0]) % 1.0, np.broadcast_to([[0], [0.25], [0.5], [0.75]], u.shape))
