"""Drop, fast: the kernels behind reference.drop, on tiles of whole rows (float32, C-contiguous, shape (rows,
n)).

Ranking is by counting, not by sorting.  The bits of |delta| as an integer grow with |delta|; their upper part
names a bucket (hundreds of buckets per power of two, so heavy tails cost nothing).  Deltas of 16-bit
checkpoints have few distinct values, so almost every bucket holds one value only, and its rank follows from
the counts.  The others are found by a checksum of their lower bits and sorted one by one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from della.merging.kernel import inlined, kernel
from della.random import GAMMA, MIX1, MIX2

Array = npt.NDArray[Any]

_GAMMA, _MIX1, _MIX2 = np.uint64(GAMMA), np.uint64(MIX1), np.uint64(MIX2)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_TICKS = np.int64((1 << 24) - 1)
_TICK = np.float32(2.0**-24)
_HEAP_FROM = 24  # a bucket of more values than this is heap-sorted: insertion would be quadratic


@inlined
def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@inlined
def _draw(key: Any, start: Any, shift: Any, u: Any) -> None:
    """random.uniforms into ``u``."""
    for i in range(u.shape[0]):
        ticks = np.int64(_mix(key + np.uint64(start + i + 1) * _GAMMA) >> np.uint64(40))
        u[i] = np.float32((ticks + shift) & _TICKS) * _TICK


@inlined
def _sample(values: Any, q: Any, u: Any, per_element: Any) -> None:
    """delta becomes m delta / q, or m delta, in place (with a second array LLVM would have to fear an
    overlap).
    """
    if per_element:
        for i in range(values.shape[0]):
            enlarged = values[i] / q[i]
            values[i] = enlarged if u[i] < q[i] else np.float32(0)
    else:
        for i in range(values.shape[0]):
            values[i] = values[i] if u[i] < q[i] else np.float32(0)


# ---- ranks -------------------------------------------------------------------------------------------------


@inlined
def _heap_sort(values: Any, begin: Any, end: Any) -> None:
    count = end - begin
    for phase in range(count // 2 + count):
        if phase < count // 2:
            root, size = count // 2 - 1 - phase, count
        else:
            size = count - 1 - (phase - count // 2)
            values[begin], values[begin + size] = values[begin + size], values[begin]
            root = 0
        while 2 * root + 1 < size:
            child = 2 * root + 1
            if child + 1 < size and values[begin + child] < values[begin + child + 1]:
                child += 1
            if values[begin + root] >= values[begin + child]:
                break
            values[begin + root], values[begin + child] = values[begin + child], values[begin + root]
            root = child


@inlined
def _sort(values: Any, begin: Any, end: Any) -> None:
    if end - begin > _HEAP_FROM:
        _heap_sort(values, begin, end)
        return
    for i in range(begin + 1, end):
        value = values[i]
        j = i
        while j > begin and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value


@inlined
def _count(keys: Any, shift: Any, bucket: Any, union: Any, table: Any) -> None:
    """Assign each key its bucket and count them: ``table`` becomes (count << 32) + the sum of the keys' lower
    bits, ``union`` the OR of its keys.  Bucket 0 is for zeros alone, bucket 1 for all that is far below the
    largest.
    """
    n, buckets = keys.shape[0], table.shape[0]
    top = np.uint32(0)
    for i in range(n):
        top = max(top, keys[i])
    floor = max(np.int32(top >> shift) - np.int32(buckets - 1), np.int32(-2))
    for i in range(n):
        bucket[i] = max(np.int32(keys[i] >> shift) - floor, np.int32(1)) if keys[i] != 0 else np.int32(0)
    for b in range(buckets):
        table[b] = 0
        union[b] = 0
    lower, one = np.uint32((1 << shift) - 1), np.uint64(1 << 32)
    for i in range(n):
        b = np.uint32(bucket[i])
        table[b] += one + np.uint64(keys[i] & lower)
        union[b] |= keys[i]


@inlined
def _find_mixed(table: Any, union: Any, shift: Any, start: Any, mixed: Any, listed: Any) -> Any:
    """Where each bucket starts, and a list of those with more than one distinct value; how many they are.
    All values of a bucket are the same when the sum of their lower bits is their number times the OR of their
    lower bits.
    """
    lower = np.uint32((1 << shift) - 1)
    for b in range(table.shape[0]):
        count = np.uint32(table[b] >> np.uint64(32))
        start[b + 1] = np.int32(count)
        mixed[b] = np.int32(np.uint32(table[b]) != np.uint32(count * (union[b] & lower)))
    mixed[1] = np.int32(start[2] > 1)
    total, found = np.int32(0), np.int32(0)
    start[0] = 0
    for b in range(table.shape[0]):
        total += start[b + 1]
        start[b + 1] = total
        listed[np.uint32(found)] = b
        found += mixed[b]
    return found


@inlined
def _collect(keys: Any, bucket: Any, twice: Any, cursor: Any, place: Any, packed: Any) -> None:
    """Put the elements of mixed buckets (-1 in ``twice``) at their buckets' places in ``packed``, as (key,
    index).
    """
    found = 0
    for i in range(keys.shape[0]):
        place[found] = i
        found += np.int64(twice[i] < 0)
    for k in range(found):
        i = place[k]
        b = np.uint32(bucket[i])
        packed[cursor[b]] = (np.uint64(keys[i]) << np.uint64(32)) | np.uint64(i)
        cursor[b] += np.int32(1)


@inlined
def _rank_bucket(packed: Any, begin: Any, end: Any, twice: Any) -> None:
    """Ranks inside one mixed bucket, whose elements stand in ``packed`` from ``begin`` to ``end``."""
    low = high = packed[begin] >> np.uint64(32)
    for i in range(begin + 1, end):
        low, high = min(low, packed[i] >> np.uint64(32)), max(high, packed[i] >> np.uint64(32))
    lows, highs = 0, 0
    for i in range(begin, end):
        lows += packed[i] >> np.uint64(32) == low
        highs += packed[i] >> np.uint64(32) == high
    if lows + highs == end - begin:  # two values, as in most: no need to sort
        of_low, of_high = np.int32(2 * begin + lows - 1), np.int32(2 * (begin + lows) + highs - 1)
        for i in range(begin, end):
            index = packed[i] & np.uint64(0xFFFFFFFF)
            twice[index] = of_low if packed[i] >> np.uint64(32) == low else of_high
        return
    _sort(packed, begin, end)
    first = begin
    while first < end:
        key = packed[first] >> np.uint64(32)
        behind = first + 1
        while behind < end and packed[behind] >> np.uint64(32) == key:
            behind += 1
        for i in range(first, behind):
            twice[packed[i] & np.uint64(0xFFFFFFFF)] = np.int32(first + behind - 1)
        first = behind


@inlined
def _rank(
    keys: Any, shift: Any, bucket: Any, union: Any, table: Any, start: Any, ranks: Any, listed: Any,
    packed: Any, twice: Any,
) -> None:  # fmt: skip
    """reference.average_ranks of the integers ``keys`` into ``twice``; the other arrays are scratch."""
    _count(keys, shift, bucket, union, table)
    found = _find_mixed(table, union, shift, start, ranks, listed)
    for b in range(table.shape[0]):
        ranks[b] = start[b] + start[b + 1] - np.int32(1)
    cursor = union.view(np.int32)  # the union has served
    for k in range(found):
        ranks[listed[k]] = -1
        cursor[listed[k]] = start[listed[k]]
    for i in range(keys.shape[0]):
        twice[i] = ranks[np.uint32(bucket[i])]
    if found > 0:
        _collect(keys, bucket, twice, cursor, packed[keys.shape[0] :], packed)
    for k in range(found):
        _rank_bucket(packed, start[listed[k]], start[listed[k] + 1], twice)


@inlined
def _probability(twice: Any, low: Any, step: Any, q: Any) -> None:
    for i in range(q.shape[0]):
        q[i] = np.float32(min(max(low + step * np.float64(twice[i]), 0.0), 1.0))


@kernel
def drop_ranked(
    delta: Any, random_order: Any, bucket_bits: Any, low: Any, step: Any, order_key: Any, key: Any,
    shift: Any, start_element: Any, per_element: Any, q_out: Any,
) -> None:  # fmt: skip
    """MAGPRUNE in place by the rank of |delta| in its row, or (``random_order``) by a random rank.

    ``q_out``: (rows, n) to keep the probabilities, or (1, n) as scratch.
    """
    rows, n = delta.shape
    bits = delta.view(np.uint32)
    keys, bucket, twice = np.empty(n, np.uint32), np.empty(n, np.int32), np.empty(n, np.int32)
    buckets = 1 << bucket_bits
    union, table, ranks = (
        np.empty(buckets, np.uint32),
        np.empty(buckets, np.uint64),
        np.empty(buckets, np.int32),
    )
    start, listed = np.empty(buckets + 1, np.int32), np.empty(buckets + 1, np.int64)
    packed, u = np.empty(2 * n + 1, np.uint64), np.empty(n, np.float32)
    bucket_shift = np.uint32(31 - bucket_bits if random_order else 26 - bucket_bits)
    for r in range(rows):
        first = start_element + r * n
        if random_order:
            for i in range(n):
                keys[i] = np.uint32(_mix(order_key + np.uint64(first + i + 1) * _GAMMA) >> np.uint64(33))
        else:
            for i in range(n):
                keys[i] = bits[r, i] & _MAGNITUDE
        _rank(keys, bucket_shift, bucket, union, table, start, ranks, listed, packed, twice)
        q = q_out[r % q_out.shape[0]]
        _probability(twice, low, step, q)
        _draw(key, first, shift, u)
        _sample(delta[r], q, u, per_element)


def bucket_bits(n: int) -> int:
    """How many buckets (as a power of two) rank a row of n: about one per element (measured best), so that
    the sums of lower bits stay below 2^32.
    """
    return max(math.ceil(math.log2(max(n, 2))), 8)


# ---- other keep probabilities ------------------------------------------------------------------------------


@kernel
def drop_given(delta: Any, q: Any, key: Any, shift: Any, start_element: Any, per_element: Any) -> None:
    """Sample in place with given probabilities: ``q`` of the delta's shape, or (1, n) for the same in every
    row.
    """
    u = np.empty(delta.shape[1], np.float32)
    for r in range(delta.shape[0]):
        _draw(key, start_element + r * delta.shape[1], shift, u)
        _sample(delta[r], q[r % q.shape[0]], u, per_element)


@kernel
def probability_by_magnitude(delta: Any, density: Any, epsilon: Any, q: Any) -> None:
    """reference._by_magnitude into ``q``."""
    for r in range(delta.shape[0]):
        low, high = np.float64(abs(delta[r, 0])), np.float64(abs(delta[r, 0]))
        for i in range(delta.shape[1]):
            size = np.float64(abs(delta[r, i]))
            low, high = min(low, size), max(high, size)
        for i in range(delta.shape[1]):
            size = np.float64(abs(delta[r, i]))
            share = density
            if high > low:
                share = (density - epsilon) + (2 * epsilon) * ((size - low) / (high - low))
            q[r, i] = np.float32(min(max(share, 0.0), 1.0))


@kernel
def probability_optimal(delta: Any, density: Any, q: Any) -> None:
    """reference._optimal into ``q``."""
    n = delta.shape[1]
    for r in range(delta.shape[0]):
        target, saturated, scale = density * n, 0, np.inf
        while True:
            rest, full = 0.0, 0
            for i in range(n):
                size = np.float64(abs(delta[r, i]))
                if saturated > 0 and size * scale >= 1.0:
                    full += 1
                else:
                    rest += size
            if not (rest > 0.0 and saturated < target):
                scale = np.inf if saturated > 0 else 0.0
                break
            scale = (target - saturated) / rest
            now = 0
            for i in range(n):
                now += np.float64(abs(delta[r, i])) * scale >= 1.0
            if now <= saturated:
                break
            saturated = now
        for i in range(n):
            size = np.float64(abs(delta[r, i]))
            if np.isinf(scale):
                q[r, i] = np.float32(1 if size > 0.0 else 0)
            else:
                q[r, i] = np.float32(min(1.0, size * scale))


@kernel
def probability_from_table(
    bits: Any, first: Any, distinct: Any, twice: Any, low: Any, step: Any, q: Any
) -> None:
    """Probabilities from the ranks of a whole tensor: ``distinct`` magnitudes in order with ``twice`` their
    rank; ``first[k]`` is where those begin whose upper 16 bits are k.
    """
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            key = bits[r, i] & _MAGNITUDE
            begin, end = first[key >> np.uint32(15)], first[(key >> np.uint32(15)) + 1]
            while end - begin > 1:
                middle = (begin + end) // 2
                if distinct[middle] <= key:
                    begin = middle
                else:
                    end = middle
            q[r, i] = np.float32(min(max(low + step * np.float64(twice[begin]), 0.0), 1.0))
