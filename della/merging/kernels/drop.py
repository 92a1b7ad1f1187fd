"""Drop, fast: the kernels behind reference.drop, on tiles of whole rows (float32, C-contiguous, shape (rows,
n)).

Ranking is by counting, not by sorting.  The bits of |delta| as an integer grow with |delta|; their upper part
names a bucket (a fixed number for each power of two, so heavy tails cost nothing).  Deltas of 16-bit
checkpoints have few significant bits, so nearly all keys are "plain": equal to each other in their bucket,
their averaged rank follows from the counts.  The few "odd" ones, with lower bits set, are compared with the
other odd ones of their bucket.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from della.dtypes import MAGNITUDE_BITS
from della.merging.kernels.compile import inlined, kernel
from della.merging.random import GAMMA, MIX1, MIX2

STEP, _MIX1, _MIX2 = np.uint64(GAMMA), np.uint64(MIX1), np.uint64(MIX2)
_TICKS = np.int64((1 << 24) - 1)
_TICK = np.float32(2.0**-24)
_FEW = 24  # more odd keys than this in one bucket are sorted: comparing all with all would be quadratic


@inlined
def mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@inlined
def draw(key: Any, start: Any, shift: Any, u: Any) -> None:
    """random.uniforms into ``u``."""
    for i in range(u.shape[0]):
        ticks = np.int64(mix(key + np.uint64(start + i + 1) * STEP) >> np.uint64(40))
        u[i] = np.float32((ticks + shift) & _TICKS) * _TICK


@inlined
def sample(values: Any, q: Any, u: Any, per_element: Any) -> None:
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
def heap_sort(values: Any, begin: Any, end: Any) -> None:
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
def _count(keys: Any, top: Any, shift: Any, bucket: Any, table: Any, odd: Any) -> Any:
    """Assign each key (``top`` is the largest) its bucket and count: ``table`` becomes (odd keys << 32) +
    plain keys of each bucket, and ``odd`` the list of odd ones; how many they are.

    Bucket 0 is for zeros.  A key is plain when its lower bits are zero: all plain keys of a bucket are equal,
    and less than its odd ones.  In bucket 1, where all that is far below the largest goes, every key is odd.
    """
    n, buckets = keys.shape[0], table.shape[0] - 1
    floor = max(np.int32(top >> shift) - np.int32(buckets - 1), np.int32(-2))
    for i in range(n):
        bucket[i] = max(np.int32(keys[i] >> shift) - floor, np.int32(1)) if keys[i] != 0 else np.int32(0)
    for b in range(buckets):
        table[b] = 0
    lower, found = np.uint32((1 << shift) - 1), np.int32(0)
    for i in range(n):
        is_odd = ((keys[i] & lower) != 0) | (bucket[i] == 1)
        table[np.uint32(bucket[i])] += np.uint64(1 << 32) if is_odd else np.uint64(1)
        odd[np.uint32(found)] = i
        found += np.int32(is_odd)
    return found


@inlined
def chance(low: Any, step: Any, twice: Any) -> Any:
    """The keep probability of twice a rank."""
    return np.float32(min(max(low + step * np.float64(twice), 0.0), 1.0))


@inlined
def _rank_odd(
    keys: Any, bucket: Any, table: Any, start: Any, odd: Any, packed: Any, low: Any, step: Any, q: Any
) -> None:
    """Probabilities of the odd keys into ``q``; ``start`` says where the odd ones of each bucket begin."""
    for k in range(odd.shape[0]):
        b = np.uint32(bucket[odd[k]])
        slot = start[b] + np.int32(table[b] >> np.uint64(32)) - np.int32(1)
        table[b] -= np.uint64(1 << 32)
        packed[slot] = (np.uint64(keys[odd[k]]) << np.uint64(32)) | np.uint64(odd[k])
    for k in range(odd.shape[0]):
        b = np.uint32(bucket[odd[k]])
        begin, end = start[b], start[b + np.uint32(1)] - np.int32(np.uint32(table[b + np.uint32(1)]))
        if end - begin <= _FEW:
            less, not_more = begin, begin - np.int32(1)
            for i in range(begin, end):
                other = np.uint32(packed[i] >> np.uint64(32))
                less += np.int32(other < keys[odd[k]])
                not_more += np.int32(other <= keys[odd[k]])
            q[odd[k]] = chance(low, step, less + not_more)
        elif packed[begin] & np.uint64(0xFFFFFFFF) == odd[k]:  # its last one: sort it once, for all
            _rank_many(packed, begin, end, low, step, q)


@inlined
def _rank_many(packed: Any, begin: Any, end: Any, low: Any, step: Any, q: Any) -> None:
    """Probabilities of the odd keys of one bucket, which stand in ``packed`` from ``begin`` to ``end``."""
    heap_sort(packed, begin, end)
    first = begin
    while first < end:
        key = packed[first] >> np.uint64(32)
        behind = first + 1
        while behind < end and packed[behind] >> np.uint64(32) == key:
            behind += 1
        for i in range(first, behind):
            q[packed[i] & np.uint64(0xFFFFFFFF)] = chance(low, step, first + behind - 1)
        first = behind


@inlined
def _rank(
    keys: Any, top: Any, shift: Any, bucket: Any, table: Any, start: Any, ranks: Any, chances: Any, odd: Any,
    packed: Any, low: Any, step: Any, q: Any,
) -> None:  # fmt: skip
    """low + step * reference.average_ranks of the integers ``keys`` into ``q``; other arrays are scratch."""
    found = _count(keys, top, shift, bucket, table, odd)
    total = np.int32(0)
    for b in range(table.shape[0] - 1):
        plain, more = np.int32(np.uint32(table[b])), np.int32(table[b] >> np.uint64(32))
        ranks[b] = total + total + plain - np.int32(1)
        start[b] = total + plain
        total += plain + more
    start[table.shape[0] - 1] = total
    for b in range(ranks.shape[0]):
        chances[b] = chance(low, step, ranks[b])
    for i in range(keys.shape[0]):
        q[i] = chances[np.uint32(bucket[i])]
    if found > 0:
        _rank_odd(keys, bucket, table, start, odd[:found], packed, low, step, q)


@kernel
def continuous_rows(bits: Any, bucket_bits: Any, found: Any, others: Any) -> Any:
    """The rows of ``bits`` in which more than a third of the nonzero keys are odd, into ``found``; how many.
    All others into ``others``.

    64 keys show most rows that are not so.  A row with the largest of all keys is left out: no key stands
    behind it.
    """
    lower, count = np.uint32((1 << (26 - bucket_bits)) - 1), 0
    for r in range(bits.shape[0]):
        keys = bits[r]
        stride, odd = max(keys.shape[0] >> 6, 1), 0
        for i in range(0, keys.shape[0], stride):
            odd += (keys[i] & lower) != 0
        others[r - count] = r
        if odd < 4:
            continue
        odds, nonzeros, top = np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(keys.shape[0]):
            odds = np.uint32(odds + min(keys[i] & lower, np.uint32(1)))
            nonzeros = np.uint32(nonzeros + min(keys[i] & MAGNITUDE_BITS, np.uint32(1)))
            top = max(top, np.uint32(keys[i] & MAGNITUDE_BITS))
        if 3 * np.int64(odds) > np.int64(nonzeros) and top < MAGNITUDE_BITS:
            found[count] = r
            count += 1
    return count


@kernel
def drop_ranked(
    delta: Any, bits: Any, chosen: Any, random_order: Any, low: Any, step: Any, order_key: Any, key: Any,
    shift: Any, start_element: Any, per_element: Any, q_out: Any, bucket_bits: Any,
) -> None:  # fmt: skip
    """MAGPRUNE in place, in the rows ``chosen``, by the rank in its row of what ``bits`` are the bits of
    (delta, or its saliency), or (``random_order``) by a random rank.

    ``q_out``: (rows, n) to keep the probabilities, or (1, n) as scratch.
    """
    n, buckets = delta.shape[1], 1 << bucket_bits
    keys, bucket = np.empty(n, np.uint32), np.empty(n, np.int32)
    table, start = np.empty(buckets + 1, np.uint64), np.empty(buckets + 1, np.int32)
    ranks, chances = np.empty(buckets, np.int32), np.empty(buckets, np.float32)
    odd = np.empty(n + 1, np.int32)
    packed, u = np.empty(n, np.uint64), np.empty(n, np.float32)
    table[buckets] = 0
    bucket_shift = np.uint32(31 - bucket_bits if random_order else 26 - bucket_bits)
    for row in range(chosen.shape[0]):
        r = chosen[row]
        first = start_element + r * n
        top = np.uint32(0)
        if random_order:
            for i in range(n):
                keys[i] = np.uint32(mix(order_key + np.uint64(first + i + 1) * STEP) >> np.uint64(33))
                top = max(top, keys[i])
        else:
            for i in range(n):
                magnitude = np.uint32(bits[r, i] & MAGNITUDE_BITS)
                keys[i] = magnitude
                top = max(top, magnitude)
        q = q_out[r % q_out.shape[0]]
        _rank(keys, top, bucket_shift, bucket, table, start, ranks, chances, odd, packed, low, step, q)
        draw(key, first, shift, u)
        sample(delta[r], q, u, per_element)


def bucket_bits(n: int) -> int:
    """How many buckets (as a power of two) rank a row of n: fewer than elements, as was measured best."""
    size = math.log2(max(n, 2))
    return max(round(size / 2) + 4, math.ceil(size) - 3)


# ---- other keep probabilities ------------------------------------------------------------------------------


@kernel
def drop_given(delta: Any, q: Any, key: Any, shift: Any, start_element: Any, per_element: Any) -> None:
    """Sample in place with given probabilities: ``q`` of the delta's shape, or (1, n) for the same in every
    row.
    """
    u = np.empty(delta.shape[1], np.float32)
    for r in range(delta.shape[0]):
        draw(key, start_element + r * delta.shape[1], shift, u)
        sample(delta[r], q[r % q.shape[0]], u, per_element)


@kernel
def probability_by_magnitude(delta: Any, density: Any, epsilon: Any, q: Any) -> None:
    """reference.linear_probabilities into ``q``; ``delta``, here and below, may be saliency."""
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
    """reference.optimal_probabilities into ``q``."""
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
            key = bits[r, i] & MAGNITUDE_BITS
            begin, end = first[key >> np.uint32(15)], first[(key >> np.uint32(15)) + 1]
            while end - begin > 1:
                middle = (begin + end) // 2
                if distinct[middle] <= key:
                    begin = middle
                else:
                    end = middle
            q[r, i] = np.float32(min(max(low + step * np.float64(twice[begin]), 0.0), 1.0))
