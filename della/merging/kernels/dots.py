"""Products of vectors, the same on every machine: sums of float64 in an order that does not depend on tiles.

A product of two float32 is exact in float64, so only the sums round.  They run in eight lanes, each of every
eighth element from left to right, which the compiler keeps in one or two registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.merging.kernels.compile import inlined, kernel


@inlined
def _add(x: Any, y: Any, start: Any, lanes: Any) -> None:
    head = min((8 - start % 8) % 8, x.shape[0])
    for i in range(head):
        lanes[(start + i) % 8] += np.float64(x[i]) * np.float64(y[i])
    a, b, c, d, e, f, g, h = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7]
    whole = head + (x.shape[0] - head) // 8 * 8
    for i in range(head, whole, 8):
        a += np.float64(x[i]) * np.float64(y[i])
        b += np.float64(x[i + 1]) * np.float64(y[i + 1])
        c += np.float64(x[i + 2]) * np.float64(y[i + 2])
        d += np.float64(x[i + 3]) * np.float64(y[i + 3])
        e += np.float64(x[i + 4]) * np.float64(y[i + 4])
        f += np.float64(x[i + 5]) * np.float64(y[i + 5])
        g += np.float64(x[i + 6]) * np.float64(y[i + 6])
        h += np.float64(x[i + 7]) * np.float64(y[i + 7])
    lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7] = a, b, c, d, e, f, g, h
    for i in range(whole, x.shape[0]):
        lanes[(start + i) % 8] += np.float64(x[i]) * np.float64(y[i])


@kernel
def add_products(x: Any, y: Any, start: Any, lanes: Any) -> None:
    """Add x * y (flat float32, from element ``start`` of the vectors on) to ``lanes`` (8, float64)."""
    _add(x, y, start, lanes)


@kernel
def products_of_rows(x: Any, y: Any, out: Any) -> None:
    """The product of each row of x with the same of y: float32 (rows, n) to float64 (rows,)."""
    lanes = np.empty(8, np.float64)
    for r in range(x.shape[0]):
        lanes[:] = 0.0
        _add(x[r], y[r], 0, lanes)
        total = lanes[0]
        for lane in range(1, 8):
            total += lanes[lane]
        out[r] = total


@kernel
def add_columns(x: Any, y: Any, start: Any, sums: Any) -> None:
    """Add x * y (flat, from element ``start`` on) to ``sums``, of which element i has the part i % size."""
    k = start % sums.shape[0]
    for i in range(x.shape[0]):
        sums[k] += np.float64(x[i]) * np.float64(y[i])
        k = k + 1 if k + 1 < sums.shape[0] else 0


@kernel
def accumulate_rows(total: Any, weights: Any, values: Any) -> None:
    """total += weight of the row * values, (rows, n)."""
    for r in range(total.shape[0]):
        for i in range(total.shape[1]):
            total[r, i] += weights[r] * values[r, i]


@kernel
def accumulate_columns(total: Any, weights: Any, start: Any, values: Any) -> None:
    """total += weight * values, flat from element ``start`` on; element i has the weight i % size."""
    k = start % weights.shape[0]
    for i in range(total.shape[0]):
        total[i] += weights[k] * values[i]
        k = k + 1 if k + 1 < weights.shape[0] else 0
