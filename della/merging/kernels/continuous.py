"""Drop by rank, fast for rows of continuous deltas, with nearly as many magnitudes as deltas.

Each key is put into a bucket by a function that grows with it, about as many buckets as elements; so all but
a few hold at most `_NEAR` keys, and the keys stand in order but for their order in a bucket.  A key's rank is
then its position, corrected by the signs of its differences to the keys at most `_NEAR` - 1 positions away:
plain loops over arrays, which the compiler vectorises.  The function only spreads the keys well; the ranks
are exact with any.

Zeros come last, behind all other keys, and are not compared.  Four counters of 16 bits make a word: those of
one word belong to the four quarters of the buckets, so a sum over words is four sums over buckets
(little-endian).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from della.dtypes import MAGNITUDE_BITS
from della.merging.kernels.compile import inlined, kernel
from della.merging.kernels.drop import STEP, chance, draw, heap_sort, mix, sample

_NEAR = 6  # keys in a bucket that the comparison with near keys ranks; unrolled in _rank_near
_FEW = 24  # keys in a bucket that are compared all with all
_PAD = 16
_ZEROS = 16  # counters of zeros, so that one zero need not wait for the one before
_ONES = np.uint64(0x0001000100010001)
_LANE_TOPS = np.uint64(0x8000800080008000)
_LAST = np.int32(0x7FFFFFFF)
_CEILING = np.float32(1e30)  # of the scale: times the number of buckets it must be finite
_SHORTEST, _LONGEST = 128, 1 << 15  # positions and counters have 16 bits


def suits(n: int) -> bool:
    """Whether rows of n may be ranked here."""
    return _SHORTEST <= n <= _LONGEST and sys.byteorder == "little"


@inlined
def _place(keys: Any, sizes: Any, scale: Any, quarter_bits: Any, cells: Any) -> None:
    """The counter of each magnitude (``sizes``: the keys as float32): B |x| / (|x| + scale) of B buckets."""
    buckets = np.float32(4 << quarter_bits)
    quarter, mask = np.uint32(quarter_bits), np.uint32((4 << quarter_bits) - 1)
    last, scaled = buckets - np.float32(1), buckets * scale
    for i in range(cells.shape[0]):
        f = buckets - scaled / (sizes[i] + scale)
        b = np.uint32(np.int32(f if f < last else last))
        cell = ((b << np.uint32(2)) & mask) | (b >> quarter)
        cells[i] = np.uint16(cell if keys[i] != 0 else mask + np.uint32(1) + np.uint32(i & (_ZEROS - 1)))


@inlined
def _place_evenly(keys: Any, quarter_bits: Any, cells: Any) -> None:
    """The same for keys that are even over 31 bits."""
    quarter, mask = np.uint32(quarter_bits), np.uint32((4 << quarter_bits) - 1)
    for i in range(cells.shape[0]):
        b = np.uint32(keys[i]) >> np.uint32(29 - quarter_bits)
        cell = ((b << np.uint32(2)) & mask) | (b >> quarter)
        cells[i] = np.uint16(cell if keys[i] != 0 else mask + np.uint32(1) + np.uint32(i & (_ZEROS - 1)))


@inlined
def _begin(words: Any, quarter: Any, nonzeros: Any, full: Any, full_words: Any) -> Any:
    """Counts become where each bucket begins; how many words have a bucket of more than _NEAR, as listed."""
    total = np.uint64(0)
    for j in range(quarter):
        total += words[j]
    behind = (total * _ONES) << np.uint64(16)
    found = 0
    for j in range(quarter):
        count = words[j]
        words[j] = behind
        behind += count
        if (count + np.uint64(0x7FFF - _NEAR) * _ONES) & _LANE_TOPS:
            full[found], full_words[found] = j, count
            found += 1
    behind = np.uint64(nonzeros)
    for j in range(quarter, quarter + _ZEROS // 4):
        count = words[j]
        sums = count * _ONES
        words[j] = (behind * _ONES) + (sums << np.uint64(16))
        behind += sums >> np.uint64(48)
    return found


@inlined
def _scatter(keys: Any, cells: Any, counters: Any, out: Any, positions: Any, packed: Any) -> None:
    """Each key to its bucket in ``out``; ``packed`` are ``positions`` as words of four."""
    whole = cells.shape[0] // 4
    for j in range(whole):
        i = np.uint64(j) << np.uint64(2)
        word = np.uint64(0)
        for s in range(4):
            cell = cells[i + np.uint64(s)]
            p = counters[cell]
            counters[cell] = np.uint16(p + np.uint16(1))
            out[p] = keys[i + np.uint64(s)]
            word |= np.uint64(p) << np.uint64(16 * s)
        packed[j] = word
    for i in range(whole * 4, cells.shape[0]):
        p = counters[cells[i]]
        counters[cells[i]] = np.uint16(p + np.uint16(1))
        out[p] = keys[i]
        positions[i] = p


@inlined
def _sign(a: Any, b: Any) -> Any:
    return min(max(np.int32(a - b), np.int32(-1)), np.int32(1))


@inlined
def _rank_near(padded: Any, zeros: Any, twice: Any) -> None:
    """Twice the rank of each nonzero key from those near it, into ``twice``."""
    keys = padded[_PAD:]
    a, b, c, d, e = (
        padded[_PAD - 5 :],
        padded[_PAD - 4 :],
        padded[_PAD - 3 :],
        padded[_PAD - 2 :],
        padded[_PAD - 1 :],
    )
    v, w, x, y, z = (
        padded[_PAD + 1 :],
        padded[_PAD + 2 :],
        padded[_PAD + 3 :],
        padded[_PAD + 4 :],
        padded[_PAD + 5 :],
    )
    for p in range(twice.shape[0]):
        k = keys[p]
        below = _sign(k, a[p]) + _sign(k, b[p]) + _sign(k, c[p]) + _sign(k, d[p]) + _sign(k, e[p])
        above = _sign(k, v[p]) + _sign(k, w[p]) + _sign(k, x[p]) + _sign(k, y[p]) + _sign(k, z[p])
        twice[p] = np.int32(2 * (p + zeros) + below + above)


@inlined
def _rank_full(
    keys: Any, counters: Any, full: Any, full_words: Any, zeros: Any, twice: Any, many: Any
) -> Any:
    """The same for the buckets of the words ``full``; (key, begin of its bucket, position) of those in
    large ones are listed in ``many``; how many those are.
    """
    listed = 0
    for f in range(full.shape[0]):
        for s in range(4):
            size = np.int64((full_words[f] >> np.uint64(16 * s)) & np.uint64(0xFFFF))
            if size <= _NEAR:
                continue
            end = np.int64(counters[full[f] * 4 + s])
            begin = end - size
            equal = True
            for p in range(begin, end):
                equal &= keys[p] == keys[begin]
            if equal:
                for p in range(begin, end):
                    twice[p] = np.int32(begin + end - 1 + 2 * zeros)
            elif size <= _FEW:
                for p in range(begin, end):
                    signs = np.int32(0)
                    for o in range(begin, end):
                        signs += _sign(keys[p], keys[o])
                    twice[p] = np.int32(begin + end - 1 + signs + 2 * zeros)
            else:
                for p in range(begin, end):
                    many[listed] = (np.uint64(keys[p]) << np.uint64(32)) | np.uint64((begin << 16) | p)
                    listed += 1
    return listed


@inlined
def _sort(many: Any, other: Any, counts: Any) -> None:
    """By the upper 32 bits, of which the first is 0."""
    if many.shape[0] <= 256:
        heap_sort(many, 0, many.shape[0])
        return
    for digit in range(4):
        shift, mask = np.uint64(32 + 8 * digit), np.uint64(0xFF)
        for k in range(256):
            counts[k] = 0
        for i in range(many.shape[0]):
            counts[(many[i] >> shift) & mask] += np.int32(1)
        total = np.int32(0)
        for k in range(256):
            total, counts[k] = np.int32(total + counts[k]), total
        for i in range(many.shape[0]):
            k = (many[i] >> shift) & mask
            other[np.uint32(counts[k])] = many[i]
            counts[k] += np.int32(1)
        for i in range(many.shape[0]):  # a copy by slices takes seconds to compile: what it would raise
            many[i] = other[i]


@inlined
def _rank_many(many: Any, zeros: Any, twice: Any) -> None:
    """The same for ``many``, sorted: as the buckets are in order, so are their parts of the list."""
    first, bucket, opened = 0, np.int64(-1), 0
    while first < many.shape[0]:
        key, begin = (
            many[first] >> np.uint64(32),
            np.int64((many[first] >> np.uint64(16)) & np.uint64(0xFFFF)),
        )
        if begin != bucket:
            bucket, opened = begin, first
        behind = first + 1
        while behind < many.shape[0] and many[behind] >> np.uint64(32) == key:
            behind += 1
        rank = np.int32(2 * (begin - opened + zeros) + first + behind - 1)
        for i in range(first, behind):
            twice[many[i] & np.uint64(0xFFFF)] = rank
        first = behind


@inlined
def _scale(keys: Any, zeros: Any) -> Any:
    """About twice the geometric mean of the nonzero magnitudes, by the mean of their bits."""
    total = np.int64(0)
    for i in range(keys.shape[0]):
        total += np.int64(keys[i] >> np.int32(9))
    mean = (total // (keys.shape[0] - zeros)) << 9
    fraction = np.float64(mean & 0x7FFFFF) / 0x800000
    return min(np.float32(math.ldexp(1.0 + fraction, (mean >> 23) - 126)), _CEILING)


@inlined
def _chances(twice: Any, low: Any, step: Any, chances: Any) -> None:
    if low >= 0.0 and step >= 0.0 and low + step * (2 * chances.shape[0]) <= 1.0:  # none leaves [0, 1]
        for p in range(twice.shape[0]):
            chances[p] = np.float32(low + step * np.float64(twice[p]))
    else:
        for p in range(twice.shape[0]):
            chances[p] = chance(low, step, twice[p])
    rest = chance(low, step, chances.shape[0] - twice.shape[0] - 1)
    for p in range(twice.shape[0], chances.shape[0]):
        chances[p] = rest


@inlined
def _nonzeros(keys: Any) -> Any:
    count = np.int32(0)
    for i in range(keys.shape[0]):
        count = np.int32(count + min(keys[i], np.int32(1)))
    return count


@inlined
def _random(order_key: Any, first: Any, keys: Any) -> Any:
    """Random keys, of which the largest is returned."""
    top = np.int32(0)
    for i in range(keys.shape[0]):
        keys[i] = np.int32(mix(order_key + np.uint64(first + i + 1) * STEP) >> np.uint64(33))
        top = max(top, keys[i])
    return top


@kernel
def drop_continuous(
    delta: Any, bits: Any, chosen: Any, random_order: Any, low: Any, step: Any, order_key: Any, key: Any,
    shift: Any, start_element: Any, per_element: Any, q_out: Any,
) -> Any:  # fmt: skip
    """As `drop.drop_ranked`, for the rows of `drop.continuous_rows`, or any in random order.

    Of these the first ones of ``chosen`` become those that are not touched, as nothing would stand behind
    their largest key; how many they are.
    """
    n = delta.shape[1]
    quarter_bits = 0
    while (4 << quarter_bits) < n:
        quarter_bits += 1
    quarter = 1 << quarter_bits
    keys, padded = np.empty(n, np.int32), np.empty(n + 2 * _PAD, np.int32)
    words, packed = np.empty(quarter + _ZEROS // 4, np.uint64), np.empty(n // 4 + 1, np.uint64)
    cells, counters, positions = np.empty(n, np.uint16), words.view(np.uint16), packed.view(np.uint16)
    full, full_words = np.empty(quarter, np.int64), np.empty(quarter, np.uint64)
    twice, chances, u = np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.float32)
    many, other, counts = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(256, np.int32)
    padded[:_PAD] = -1
    padded[_PAD:] = _LAST
    left = 0
    for row in range(chosen.shape[0]):
        r = chosen[row]
        first = start_element + r * n
        if random_order:
            if _random(order_key, first, keys) == _LAST:
                chosen[left] = r
                left += 1
                continue
        else:
            for i in range(n):
                keys[i] = np.int32(bits[r, i] & MAGNITUDE_BITS)
        zeros = n - _nonzeros(keys)
        if random_order:
            _place_evenly(keys, quarter_bits, cells)
        else:
            _place(keys, keys.view(np.float32), _scale(keys, zeros), quarter_bits, cells)
        words[:] = np.uint64(0)
        for i in range(n):
            counters[cells[i]] += np.uint16(1)
        found = _begin(words, quarter, n - zeros, full, full_words)
        out, ranks = padded[_PAD:], twice[: n - zeros]
        _scatter(keys, cells, counters, out, positions, packed)
        out[n - zeros : n] = _LAST
        _rank_near(padded, zeros, ranks)
        if found > 0:
            listed = _rank_full(out, counters, full[:found], full_words[:found], zeros, ranks, many)
            if listed > 0:
                _sort(many[:listed], other, counts)
                _rank_many(many[:listed], zeros, ranks)
        _chances(ranks, low, step, chances)
        q = q_out[r % q_out.shape[0]]
        for i in range(n):
            q[i] = chances[positions[i]]
        draw(key, first, shift, u)
        sample(delta[r], q, u, per_element)
    return left
