"""Keeping the largest, fast: the kernels behind TIES and breadcrumbs, and sums of magnitudes.

The bits of |delta| as an integer grow with |delta|: thresholds are found by counting upper, then lower bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.dtypes import MAGNITUDE_BITS
from della.merging.kernels.compile import inlined, kernel

_BLOCK = 256


@kernel
def count_upper(bits: Any, counts: Any) -> None:
    """Add to ``counts`` (65,536) how often each upper half of a magnitude's 31 bits occurs in ``bits``
    (flat).
    """
    for i in range(bits.shape[0]):
        counts[(bits[i] & MAGNITUDE_BITS) >> np.uint32(15)] += 1


@kernel
def count_and_list(bits: Any, counts: Any, odd: Any) -> Any:
    """As `count_upper`; the magnitudes with a lower bit set become the first ones of ``odd``, of as many
    elements as ``bits``; how many they are.
    """
    found = np.uint64(0)
    for i in range(bits.shape[0]):
        key = np.uint32(bits[i] & MAGNITUDE_BITS)
        counts[key >> np.uint32(15)] += 1
        odd[found] = key
        found += np.uint64(key & np.uint32(0x7FFF) != 0)
    return found


@kernel
def count_lower(bits: Any, upper: Any, counts: Any) -> None:
    """Add to ``counts`` (32,768) the lower 15 bits of the magnitudes whose upper half is ``upper``."""
    for i in range(bits.shape[0]):
        key = bits[i] & MAGNITUDE_BITS
        if key >> np.uint32(15) == upper:
            counts[key & np.uint32(0x7FFF)] += 1


@inlined
def _band_exactly(bits: Any, high: Any, skip: Any, low: Any, take: Any, seen: Any) -> None:
    for i in range(bits.shape[0]):
        key = bits[i] & MAGNITUDE_BITS
        keep = low < key < high
        if key == high or key == low:  # noqa: SIM109 (a tuple would cost time)
            keep = (key < high or seen[0] >= skip) and (key > low or seen[1] < take)
            seen[0] += key == high
            seen[1] += key == low
        bits[i] = bits[i] if keep else np.uint32(0)


@kernel
def drop_band(bits: Any, high: Any, skip: Any, low: Any, take: Any, seen: Any) -> None:
    """Zero the bits of all deltas but those from the magnitude ``high`` (without its first ``skip``
    occurrences) down to ``low`` (only its first ``take`` occurrences); everything flat.  ``seen`` counts the
    occurrences of both from tile to tile.

    Blocks in which no count runs out are kept by one comparison, which the compiler vectorises.
    """
    ceiling = high if skip > 0 else high + np.uint32(1)
    for begin in range(0, bits.shape[0], _BLOCK):
        block = bits[begin : begin + _BLOCK]
        above, equal = np.int32(0), np.int32(0)
        for i in range(block.shape[0]):
            key = block[i] & MAGNITUDE_BITS
            above += np.int32(key >= ceiling)
            equal += np.int32(key == low)
        fits = seen[1] + equal <= take
        if above == 0 and (fits or seen[1] >= take) and low < MAGNITUDE_BITS:
            floor = low if fits else low + np.uint32(1)
            for i in range(block.shape[0]):
                block[i] = block[i] if block[i] & MAGNITUDE_BITS >= floor else np.uint32(0)
            seen[1] += equal
        else:
            _band_exactly(block, high, skip, low, take, seen)


@inlined
def _select(keys: Any, position: Any, counts: Any) -> Any:
    """(the key at ``position`` counted from the largest, how many are larger): three rounds of radix
    selection.
    """
    chosen, mask, larger = np.uint32(0), np.uint32(0), 0
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        counts[:] = 0
        digit_mask = np.uint32((1 << width) - 1)
        for i in range(keys.shape[0]):
            if keys[i] & mask == chosen:
                counts[(keys[i] >> np.uint32(shift)) & digit_mask] += 1
        digit = (1 << width) - 1
        while larger + counts[digit] <= position:
            larger += counts[digit]
            digit -= 1
        chosen |= np.uint32(digit) << np.uint32(shift)
        mask |= digit_mask << np.uint32(shift)
    return chosen, larger


@kernel
def drop_largest_rows(bits: Any, count: Any) -> None:
    """Zero the bits of all but the ``count`` largest of each row, lowest index first among equals (scope:
    row).
    """
    n = bits.shape[1]
    keys, counts = np.empty(n, np.uint32), np.empty(2048, np.int64)
    for r in range(bits.shape[0]):
        for i in range(n):
            keys[i] = bits[r, i] & MAGNITUDE_BITS
        if count == 0:
            bits[r, :] = 0
            continue
        low, larger = _select(keys, count - 1, counts)
        take = count - larger
        for i in range(n):
            keep = keys[i] > low
            if keys[i] == low and take > 0:
                keep = True
                take -= 1
            bits[r, i] = bits[r, i] if keep else np.uint32(0)


@kernel
def row_sums(values: Any, out: Any) -> None:
    """The float64 sum of |values| of each row, from left to right."""
    for r in range(values.shape[0]):
        total = 0.0
        for i in range(values.shape[1]):
            total += np.float64(abs(values[r, i]))
        out[r] = total


def sums_of_rows(values: Any) -> Any:
    """`row_sums` in an array of its own."""
    sums = np.empty(values.shape[0])
    row_sums(values, sums)
    return sums
